import copy
import pickle

import pytest
import torch
from peft import get_peft_model, inject_adapter_in_model
from torch import nn
from transformers import (
    AlbertConfig,
    AlbertModel,
    BertConfig,
    BertForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from peft_loramoe import LoRAMoEConfig, balance_loss, balance_terms, collect_balance, layer_routing
from peft_loramoe.balance.constraint import balance_targets, balance_term, importance
from tiny import capture, labelled, loramoe, tiny_llama, token_batch


pytestmark = pytest.mark.usefixtures("input_size")

TYPES = torch.tensor([0, 1, -1])


def expected_terms(model, batch, task_types, config=None):
    """The balance terms from the layers' probabilities, the mask and the types, without the recorder."""
    config = config or model.peft_config["default"]
    seen = capture(model)
    model(**batch)
    rows, width = batch["attention_mask"].shape
    ids, real = torch.arange(rows).repeat_interleave(width), batch["attention_mask"].flatten().bool()
    options = dict(formula=config.balance_formula, target=config.balance_target, importance=config.balance_importance)
    targets = balance_targets(task_types, config.groups_of(), config.balance_delta)
    return {
        layer: balance_term(*importance(p.flatten(0, 1), ids, real, rows), targets, **options)
        for layer, p in seen.items()
    }


def test_the_training_loss_is_the_models_loss_plus_the_weighted_terms():
    batch, model = labelled(token_batch()), loramoe(balance_loss_weight=0.5)
    expected = expected_terms(copy.deepcopy(model).eval(), batch, TYPES)
    plain = model.eval()(**batch).loss
    output = model.train()(**batch, task_types=TYPES)
    assert len(expected) == 6
    torch.testing.assert_close(output.loss, plain + 0.5 * sum(expected.values()))
    torch.testing.assert_close(balance_terms(model), {"default": expected})
    torch.testing.assert_close(balance_loss(model), 0.5 * sum(expected.values()))


def test_the_evaluation_loss_is_the_models_but_the_term_can_be_read():
    batch, model = labelled(token_batch()), loramoe()
    in_training = model(**batch, task_types=TYPES).loss
    in_evaluation = model.eval()(**batch, task_types=TYPES).loss
    torch.testing.assert_close(in_training, in_evaluation + balance_loss(model))
    with model.disable_adapter():
        base = model(**batch, task_types=TYPES).loss
    assert not torch.isclose(base, in_evaluation)
    assert balance_loss(model) == 0


def test_weight_zero_adds_nothing():
    batch, model = labelled(token_batch()), loramoe(balance_loss_weight=0.0)
    torch.testing.assert_close(model(**batch).loss, model.eval()(**batch).loss)


def test_the_term_reaches_the_router_and_the_layers_below_exactly_once():
    batch, weight = labelled(token_batch()), 3.0
    gradients = []
    for in_loss in (True, False):
        model = loramoe(balance_loss_weight=weight)
        output = model(**batch, task_types=TYPES)
        if in_loss:
            output.loss.backward()
        else:
            logits = output.logits[:, :-1].flatten(0, 1)
            cross_entropy = nn.functional.cross_entropy(logits, batch["labels"][:, 1:].flatten())
            (cross_entropy + weight * sum(balance_terms(model)["default"].values())).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    torch.testing.assert_close(*gradients)


def test_detached_balancing_reaches_the_router_only():
    batch = token_batch()
    gradients = {}
    for detach in (False, True):
        model = loramoe(balance_detach=detach)
        model(**batch, task_types=TYPES)
        balance_loss(model).backward()
        gradients[detach] = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all(g is None for name, g in gradients[True].items() if not name.endswith("router"))
    assert all(g.abs().sum() > 0 for name, g in gradients[True].items() if name.endswith("router"))
    assert any(g is not None and g.abs().sum() > 0 for name, g in gradients[False].items() if name.endswith(".A"))


def test_padding_does_not_count():
    model, batch = loramoe().eval(), token_batch()
    model(**batch, task_types=TYPES)
    short = balance_loss(model)
    longer = {name: nn.functional.pad(value, (0, 4)) for name, value in batch.items()}
    model(**longer, task_types=TYPES)
    torch.testing.assert_close(balance_loss(model), short)


def test_a_packed_batch_gives_the_terms_of_the_samples_it_packs():
    model, batch = loramoe().eval(), token_batch(rows=2, width=4)
    batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
    batch["input_ids"].clamp_(min=1)
    model(**batch, task_types=torch.tensor([1, 0]))
    apart = {layer: importance.importance for layer, importance in ((r.layer, r) for r in layer_routing(model))}
    packed = dict(
        input_ids=batch["input_ids"].reshape(1, 8),
        position_ids=torch.arange(4).repeat(1, 2),
        task_types=torch.tensor([[1] * 4 + [0] * 4]),
    )
    model(**packed)
    first = layer_routing(model)[0]
    assert first.token_counts.tolist() == [4, 4, 0, 0, 0, 0, 0, 0]
    assert first.task_types[:2].tolist() == [1, 0]
    # layer 0's up_proj sees attention outputs, which packing without a block mask changes for the second sample only
    torch.testing.assert_close(first.importance[0], apart[first.layer][0])


def test_names_of_types_are_accepted():
    batch = labelled(token_batch())
    by_name = loramoe(task_type_names=["facts", "tasks"])(**batch, task_types=["facts", "tasks", -1]).loss
    torch.testing.assert_close(by_name, loramoe()(**batch, task_types=TYPES).loss)


def test_routing_gives_importance_counts_and_types_of_every_layer():
    model, batch = loramoe().eval(), token_batch()
    model(**batch, task_types=TYPES)
    records = layer_routing(model)
    assert [r.layer for r in records][:3] == [f"model.layers.0.mlp.{n}" for n in ("gate_proj", "up_proj", "down_proj")]
    for record in records:
        assert record.adapter == "default" and not record.importance.requires_grad
        assert record.token_counts.tolist() == [7, 6, 5] and record.task_types.tolist() == [0, 1, -1]
        torch.testing.assert_close(record.importance.sum(-1), record.token_counts.float())
        assert record.groups.sizes == (3, 3)


def test_routing_gives_the_entropy_of_the_real_tokens():
    model, batch = loramoe().eval(), token_batch()
    seen = capture(model)
    model(**batch, task_types=TYPES)
    for record in layer_routing(model):
        p = seen[record.layer]
        entropies = -(p * p.log()).sum(-1) * batch["attention_mask"]
        torch.testing.assert_close(record.entropy, entropies.sum(-1))


def test_routing_gives_the_probabilities_of_every_token_without_gradient():
    model, batch = loramoe(), token_batch()
    seen = capture(model)
    model(**batch, task_types=TYPES)
    for record in layer_routing(model):
        assert torch.equal(record.probabilities, seen[record.layer]) and record.probabilities.shape == (3, 7, 6)
        assert seen[record.layer].requires_grad and not record.probabilities.requires_grad


def test_a_plain_peft_model_and_injected_adapters_balance_too():
    batch, config = labelled(token_batch()), LoRAMoEConfig(r=2, init_weights=False)
    losses = []
    for attach in (get_peft_model, lambda model, config: inject_adapter_in_model(config, model)):
        model = tiny_llama()
        torch.manual_seed(1)
        model = attach(model, config).train()
        losses.append(model(**batch, task_types=TYPES).loss)
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(losses[0], loramoe()(**batch, task_types=TYPES).loss)


def test_transformers_add_adapter_balances_too():
    batch, model = labelled(token_batch()), tiny_llama()
    torch.manual_seed(1)
    model.add_adapter(LoRAMoEConfig(r=2, init_weights=False), adapter_name="default")
    torch.testing.assert_close(
        model.train()(**batch, task_types=TYPES).loss, loramoe()(**batch, task_types=TYPES).loss
    )


def test_tuples_of_outputs_carry_the_term_in_the_loss():
    batch, model = labelled(token_batch()), loramoe()
    expected = model(**batch, task_types=TYPES).loss
    loss, logits, *_ = model(**batch, task_types=TYPES, return_dict=False)
    torch.testing.assert_close(loss, expected)
    assert logits.shape == (3, 7, 64)


def test_outputs_without_a_loss_are_untouched():
    model, batch = loramoe(), token_batch()
    output = model(**batch, task_types=TYPES)
    assert output.loss is None
    (logits, *_) = model(**batch, task_types=TYPES, return_dict=False)
    torch.testing.assert_close(logits, output.logits)


def test_positional_arguments_are_understood():
    model, batch = loramoe().eval(), token_batch()
    model.base_model.model(batch["input_ids"], batch["attention_mask"], task_types=TYPES)
    assert layer_routing(model)[0].token_counts.tolist() == [7, 6, 5]


def test_a_model_that_is_no_transformer():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    model = get_peft_model(model, LoRAMoEConfig(r=1, target_modules=["0", "2"], init_weights=False))
    model(torch.randn(5, 4), task_types=torch.tensor([0, 0, 1, 1, -1]))
    assert layer_routing(model)[0].token_counts.tolist() == [1] * 5
    assert balance_loss(model).requires_grad


def test_encoder_decoder_models():
    config = T5Config(
        d_model=16,
        d_kv=8,
        d_ff=24,
        num_layers=1,
        num_heads=2,
        vocab_size=64,
        decoder_start_token_id=0,
        dropout_rate=0.0,
    )
    torch.manual_seed(0)
    model = loramoe(T5ForConditionalGeneration(config), task_type="SEQ_2_SEQ_LM")
    batch = token_batch()
    labels = torch.tensor([[5, 6, -100, -100], [5, 6, 7, 8], [1, -100, -100, -100]])
    output = model(**batch, labels=labels, task_types=TYPES)
    counts = {r.layer: r.token_counts.tolist() for r in layer_routing(model)}
    assert counts["encoder.block.0.layer.1.DenseReluDense.wi"] == [7, 6, 5]
    assert counts["decoder.block.0.layer.2.DenseReluDense.wi"] == [2, 4, 1]
    term = balance_loss(model)
    torch.testing.assert_close(output.loss, model.eval()(**batch, labels=labels).loss + term)


def test_sequence_classification():
    config = BertConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    torch.manual_seed(0)
    model = loramoe(BertForSequenceClassification(config), task_type="SEQ_CLS")
    model.eval()
    batch = {**token_batch(), "labels": torch.tensor([0, 1, 0])}
    plain = model(**batch).loss
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    output = model(**batch, task_types=TYPES)
    torch.testing.assert_close(output.loss, plain + balance_loss(model))


def test_two_active_adapters_contribute_their_own_terms():
    model, batch = loramoe(balance_loss_weight=0.5), labelled(token_batch())
    torch.manual_seed(5)
    other = LoRAMoEConfig(r=1, num_experts=3, expert_groups=[3], balance_loss_weight=0.25, init_weights=False)
    model.add_adapter("other", other)
    model.base_model.set_adapter(["default", "other"])
    loss = model(**batch, task_types=torch.tensor([0, -1, -1])).loss
    terms = balance_terms(model)
    assert {name: len(layers) for name, layers in terms.items()} == {"default": 6, "other": 6}
    total = 0.5 * sum(terms["default"].values()) + 0.25 * sum(terms["other"].values())
    torch.testing.assert_close(loss, model.eval()(**batch).loss + total)


@pytest.mark.parametrize("accumulation", [1, 3])
def test_the_term_is_weighted_by_the_share_of_label_tokens(accumulation):
    batch, model = labelled(token_batch()), loramoe()
    tokens = (batch["labels"][:, 1:] != -100).sum()
    whole = model(**batch, task_types=TYPES).loss
    share = model(**batch, task_types=TYPES, num_items_in_batch=tokens * accumulation).loss
    torch.testing.assert_close(share, whole / accumulation)


@pytest.mark.parametrize("total", [None, 0, 6, 60])
def test_a_batch_without_labels_has_its_term(total):
    batch, model = token_batch(), loramoe(balance_loss_weight=0.5)
    labels = torch.full_like(batch["input_ids"], -100)
    items = {} if total is None else {"num_items_in_batch": torch.tensor(total)}
    loss = model(**batch, labels=labels, task_types=TYPES, **items).loss
    share = labels.numel() / 60 if total == 60 else 1.0
    torch.testing.assert_close(loss, balance_loss(model) * share)
    loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.grad is not None:
            assert parameter.grad.isfinite().all(), name
    assert all(p.grad.abs().max() > 0 for name, p in model.named_parameters() if "router" in name)


def test_labels_shifted_by_the_collator_are_counted_as_they_are():
    batch, model = labelled(token_batch()), loramoe()
    shifted = nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    arguments = {**batch, "shift_labels": shifted, "task_types": TYPES}
    tokens = (shifted != -100).sum()
    whole = model(**arguments, num_items_in_batch=tokens).loss
    torch.testing.assert_close(model(**arguments, num_items_in_batch=tokens * 4).loss, whole / 4)


def test_a_term_that_nobody_reads_gives_one_warning(recwarn):
    model, batch = loramoe(), token_batch()
    for _ in range(2):  # read
        model(**batch, task_types=TYPES)
        balance_loss(model)
    with torch.no_grad():
        for _ in range(2):  # not trained
            model(**batch, task_types=TYPES)
    assert not [w for w in recwarn if "balance" in str(w.message)]
    for _ in range(3):
        model(**batch, task_types=TYPES)
    messages = [str(w.message) for w in recwarn if "balance" in str(w.message)]
    assert len(messages) == 1 and "reached no loss" in messages[0] and "add balance_loss(model)" in messages[0]


def test_the_model_below_the_head_records_too():
    model, batch = loramoe(), token_batch()
    model(**batch, task_types=TYPES)
    expected = balance_loss(model)
    model.base_model.model.model(**batch, task_types=TYPES)
    torch.testing.assert_close(balance_loss(model), expected)


def test_a_call_that_failed_leaves_nothing_behind():
    model, batch = loramoe(), token_batch()
    model(**batch, task_types=TYPES)
    expected = balance_loss(model)
    with pytest.raises(IndexError):
        model(**{**batch, "input_ids": batch["input_ids"] + 1000}, task_types=TYPES)
    model(**batch, task_types=TYPES)
    torch.testing.assert_close(balance_loss(model), expected)
    assert len(layer_routing(model)) == 6


def test_a_layer_that_runs_several_times_balances_all_of_its_samples():
    config = AlbertConfig(
        vocab_size=64,
        embedding_size=8,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
    )
    torch.manual_seed(0)
    model = loramoe(AlbertModel(config), target_modules=["ffn"], task_type=None).eval()
    batch = token_batch()
    model(**batch, task_types=TYPES)
    records = layer_routing(model)
    assert len(records) == 3 and len({r.layer for r in records}) == 1
    counts, types = (torch.cat([getattr(r, name) for r in records]) for name in ("token_counts", "task_types"))
    options = model.peft_config["default"]
    term = balance_term(
        torch.cat([r.importance for r in records]),
        counts,
        balance_targets(types, options.groups_of(), options.balance_delta),
        formula="cv_squared",
        target="corrected",
        importance="mean",
    )
    torch.testing.assert_close(balance_terms(model)["default"][records[0].layer], term)


def halves(batch):
    return [{name: value[rows] for name, value in batch.items()} for rows in (slice(0, 1), slice(1, 3))]


def test_collected_passes_form_one_batch():
    model, batch = loramoe(), labelled(token_batch())
    model(**batch, task_types=TYPES)
    expected = balance_loss(model)
    plain = [model.eval()(**half).loss for half in halves(batch)]
    with collect_balance(model.train()):
        losses = [model(**half, task_types=types).loss for half, types in zip(halves(batch), (TYPES[:1], TYPES[1:]))]
        with torch.no_grad():
            model(**batch, task_types=TYPES)
    torch.testing.assert_close(losses, plain)
    torch.testing.assert_close(balance_loss(model), expected)
    term = balance_loss(model)
    term.backward()
    collected = [p.grad for p in model.parameters() if p.grad is not None]
    model = loramoe()
    model(**batch, task_types=TYPES)
    balance_loss(model).backward()
    torch.testing.assert_close(collected, [p.grad for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_two_passes_with_losses_of_their_own_before_one_backward_pass(checkpointing):
    batch, gradients = labelled(token_batch()), []
    for together in (True, False):
        model = loramoe()
        if together and checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.enable_input_require_grads()
        if together:
            sum(model(**half, task_types=t).loss for half, t in zip(halves(batch), (TYPES[:1], TYPES[1:]))).backward()
        else:
            for half, types in zip(halves(batch), (TYPES[:1], TYPES[1:])):
                model(**half, task_types=types).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("types", [[0, 1, -1], TYPES], ids=["list", "tensor"])
def test_collected_types_are_repeated_for_repeated_rows(types):
    model, batch = loramoe(), token_batch()
    twice = {name: value.repeat(2, 1) for name, value in batch.items()}
    with collect_balance(model, types):
        model(**twice)
    assert layer_routing(model)[0].task_types.tolist() == [0, 1, -1, 0, 1, -1]


def test_collected_types_that_do_not_fit_are_refused():
    model = loramoe()
    with pytest.raises(ValueError, match=r"shape \(2,\), but the batch has 3 rows"), collect_balance(model, [0, 1]):
        model(**token_batch())


def test_after_collecting_the_loss_contains_the_term_again():
    model, batch = loramoe(), labelled(token_batch())
    expected = model(**batch, task_types=TYPES).loss
    with pytest.raises(RuntimeError, match="stop"), collect_balance(model, TYPES):
        raise RuntimeError("stop")
    torch.testing.assert_close(model(**batch, task_types=TYPES).loss, expected)


def test_data_parallel_replicas_are_refused():
    model = loramoe()
    model.base_model.model._is_replica = True  # what torch.nn.parallel.replicate sets on the copy for each GPU
    with pytest.raises(ValueError, match=r"nn.DataParallel.*torchrun, accelerate launch"):
        model(**token_batch())


def test_one_warning_for_forgotten_task_types(recwarn):
    model, batch = loramoe(), labelled(token_batch())
    for _ in range(2):
        model(**batch)
    messages = [str(w.message) for w in recwarn if "task_types" in str(w.message)]
    assert len(messages) == 1 and "every sample counts as of unknown type" in messages[0]


def test_without_task_types_all_are_unknown():
    batch = labelled(token_batch())
    with pytest.warns(UserWarning, match="called without task_types"):
        absent = loramoe()(**batch).loss
    torch.testing.assert_close(absent, loramoe()(**batch, task_types=[-1, -1, -1]).loss)


def test_gradient_checkpointing_gives_the_same_gradients():
    batch, gradients = labelled(token_batch()), []
    for checkpointing in (False, True):
        model = loramoe()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.enable_input_require_grads()
        model.train()(**batch, task_types=TYPES).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for plain, checkpointed in zip(*gradients):
        assert torch.equal(plain, checkpointed)


def test_copies_and_pickles_of_a_model_record_for_themselves():
    model, batch = loramoe(), labelled(token_batch())
    expected = model(**batch, task_types=TYPES).loss
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(clone(**batch, task_types=TYPES).loss, expected)
        clone(**token_batch(rows=2), task_types=TYPES[:2])
        assert layer_routing(clone)[0].token_counts.tolist() == [7, 6]
        assert layer_routing(model)[0].token_counts.tolist() == [7, 6, 5]


@pytest.mark.parametrize(
    ("task_types", "error", "message"),
    [
        (torch.tensor([0, 1]), ValueError, r"shape \(2,\), but the batch has 3 rows"),
        (
            torch.zeros(3, 2, dtype=torch.long),
            ValueError,
            r"shape \(3, 2\); .* shape \(3,\), or per token, shape \(3, 7\)",
        ),
        (torch.tensor([0, 1, 2]), ValueError, "contains 2, but the adapter has 2 expert groups"),
        (torch.tensor([0.0, 1.0, 1.0]), TypeError, "dtype torch.float32"),
        (["facts"] * 3, ValueError, "no task_type_names"),
    ],
)
def test_bad_task_types_are_refused(task_types, error, message):
    with pytest.raises(error, match=message):
        loramoe()(**labelled(token_batch()), task_types=task_types)


def test_a_batch_without_a_real_token_is_refused():
    batch = labelled(token_batch())
    batch["attention_mask"] = torch.zeros_like(batch["attention_mask"])
    with pytest.raises(ValueError, match="without a real token: attention_mask is zero everywhere"):
        loramoe()(**batch, task_types=TYPES)


def test_reading_from_a_model_without_adapters_is_refused():
    with pytest.raises(ValueError, match="LlamaForCausalLM has no LoRAMoE layers"):
        balance_loss(tiny_llama())


@pytest.mark.parametrize(
    "read",
    [balance_loss, balance_terms, layer_routing, lambda model: collect_balance(model).__enter__()],
    ids=["loss", "terms", "routing", "collect"],
)
def test_reading_from_two_adapted_models_at_once_is_refused(read):
    both = nn.ModuleDict({"first": loramoe(), "second": loramoe()})
    with pytest.raises(ValueError, match="ModuleDict holds 2 adapted models.*ask each of them, and add the terms"):
        read(both)
