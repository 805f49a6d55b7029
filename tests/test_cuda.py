"""A user's path on a CUDA device, with the mixture computed by torch and by the Triton kernels.

PEFT_LORAMOE_TEST_DEVICE=cpu runs these tests on the CPU, without the kernels: a rehearsal where there is no device.
"""

import contextlib
import json
import math
import os
import socket
import subprocess
import sys

import pytest
import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, PeftModel, prepare_model_for_kbit_training
from safetensors.torch import load_file
from torch._dynamo.testing import CompileCounterWithBackend
from trainer_cases import FirstGradient
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    CompileConfig,
    DataCollatorForSeq2Seq,
    StaticCache,
    Trainer,
    TrainingArguments,
)
from transformers.models.llama import modeling_llama
from trl import SFTConfig

from peft_loramoe import balance_loss, balance_terms, collect_balance, layer_routing
from peft_loramoe.analysis import (
    Question,
    answer_questions,
    expert_similarity,
    expert_usage,
    group_weights,
    router_statistics,
    router_trace,
    score_answers,
)
from peft_loramoe.cli import main
from peft_loramoe.ops import mixture as mixture_module
from peft_loramoe.ops import mixture_torch
from peft_loramoe.training import LoRAMoETrainerMixin, RouterCallback, read_anchors
from peft_loramoe.training.sft import LoRAMoESFTTrainer
from tiny import labelled, loramoe, tiny_llama, tiny_tokenizer, token_batch
from triton_cases import unpack


pytestmark = pytest.mark.gpu

TYPES = torch.tensor([0, 1, -1])
OPTIONS = {"dense": {}, "sparse": {"top_k": 2, "null_groups": [0], "balance_detach": True}}
FLOAT32, BFLOAT16 = 1e-4, 5e-2  # relative errors
ANCHORS = [f"w{i} w{i + 1} w{i + 2} w{i + 3}" for i in range(20, 36, 4)]
ROWS = [[5 + i, 6 + i, 7 + i, *range(40, 40 + i % 3)] for i in range(8)]
COLUMNS = {"input_ids": ROWS, "labels": [[-100, *row[1:]] for row in ROWS], "task_type": [0, 1, -1, 1, 0, 1, 0, -1]}


@pytest.fixture(params=["torch", "triton"])
def implementation(request, device, monkeypatch):
    """Which implementation computes the mixture. For the kernels it is checked that they ran."""
    if request.param == "torch":
        monkeypatch.setattr(mixture_module, "KERNELS", None)
        yield request.param
        return
    if device == "cpu":
        pytest.skip("the kernels need a CUDA device")
    kernels = pytest.importorskip("peft_loramoe.ops.mixture_triton")
    calls, forward = [], kernels.forward
    monkeypatch.setattr(kernels, "forward", lambda *args: calls.append(1) or forward(*args))
    monkeypatch.setattr(mixture_module, "KERNELS", kernels)
    yield request.param
    assert calls, "the Triton kernels did not run"


def on(device, batch):
    return {name: tensor.to(device) for name, tensor in batch.items()}


def logits(model, batch=None):
    batch = token_batch() if batch is None else batch
    with torch.no_grad():
        return model.eval()(**on(model.device, batch)).logits


def loss_and_gradients(model, call=None, batch=None):
    """Loss of a training step, and the gradients of the adapter."""
    model.train().zero_grad()
    batch = on(model.device, labelled(token_batch() if batch is None else batch))
    loss = (model if call is None else call)(**batch, task_types=TYPES.to(model.device)).loss
    loss.backward()
    return {"loss": loss.detach(), **{name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}}


def assert_close(found, expected, tolerance):
    """Each tensor's error is small against its norm."""
    assert found.keys() == expected.keys() and any(name.endswith("router") for name in found)
    for name, tensor in expected.items():
        error = (found[name].cpu().double() - tensor.cpu().double()).norm() / tensor.double().norm().cpu()
        assert error < tolerance, f"{name}: {error:.1e}"


# torch.compile; first, because it takes the longest


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_compiled_training_step_is_one_graph_for_all_lengths(options, implementation, device):
    backend = CompileCounterWithBackend("aot_eager" if device == "cpu" else "inductor")
    model = loramoe(tiny_llama(num_hidden_layers=1), **options).to(device)
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=True)
    compilations = []
    for width in range(5, 9):
        batch = token_batch(width=width)
        expected = loss_and_gradients(model, batch=batch)
        assert_close(loss_and_gradients(model, compiled, batch), expected, FLOAT32)
        compilations.append(backend.frame_count)
    assert len(set(compilations)) == 1, compilations  # 2 where dynamo starts over, with floats in place of symbols


def test_a_compiled_training_step_under_autocast_replays_cuda_graphs(implementation, device):
    model = loramoe(tiny_llama(num_hidden_layers=1)).to(device)
    how = {"backend": "aot_eager"} if device == "cpu" else {"mode": "reduce-overhead"}
    compiled = torch.compile(model, fullgraph=True, **how)
    with torch.autocast(device, dtype=torch.bfloat16):
        for seed in range(4):  # warms up, records, replays
            batch = token_batch(seed=seed)
            expected = loss_and_gradients(model, batch=batch)
            torch.compiler.cudagraph_mark_step_begin()
            assert_close(loss_and_gradients(model, compiled, batch), expected, BFLOAT16)


# gradients


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        (OPTIONS["dense"], torch.float32),
        (OPTIONS["sparse"], torch.float32),
        (OPTIONS["dense"], torch.bfloat16),  # not sparse: rounded activations choose other experts
    ],
    ids=["dense", "sparse", "dense, bfloat16"],
)
def test_gradients_are_those_of_float64_on_the_cpu(options, dropout, dtype, implementation, device, monkeypatch):
    backend = mixture_module.KERNELS or mixture_torch
    masks, draw = [], backend.dropout_mask

    def drawn(x, dropout):
        masks.append((draw(x, dropout), x.shape[1]))
        return masks[-1][0]

    monkeypatch.setattr(backend, "dropout_mask", drawn)
    found = loss_and_gradients(loramoe(tiny_llama().to(dtype), lora_dropout=dropout, **options).to(device))
    assert len(masks) == (6 if dropout else 0)
    again = iter(keep if keep.dtype == torch.bool else unpack(keep, columns) for keep, columns in masks)
    monkeypatch.setattr(mixture_torch, "dropout_mask", lambda x, dropout: next(again).to(x.device))
    # The rounded base model, computed exactly.
    exact = loramoe(tiny_llama().to(dtype), lora_dropout=dropout, **options).double()
    assert_close(found, loss_and_gradients(exact), FLOAT32 if dtype == torch.float32 else BFLOAT16)


@pytest.mark.parametrize("reentrant", [False, True], ids=["not reentrant", "reentrant"])
def test_checkpointing_changes_no_gradient(reentrant, implementation, device):
    expected = loss_and_gradients(loramoe().to(device))
    model = loramoe().to(device)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert_close(loss_and_gradients(model), expected, 1e-5)


def test_checkpointing_draws_the_same_dropout_again(implementation, device):
    results = []
    for checkpointing in (False, True):
        model = loramoe(lora_dropout=0.3).to(device)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        torch.manual_seed(3)
        results.append(loss_and_gradients(model))
    assert_close(*results, 1e-5)


PRECISIONS = {
    "bf16 autocast": dict(autocast=torch.bfloat16),
    "fp16 autocast, scaled": dict(autocast=torch.float16, scaled=True),
    "bf16 backbone": dict(backbone=torch.bfloat16),
    "bf16 backbone and autocast": dict(backbone=torch.bfloat16, autocast=torch.bfloat16),
    "fp16 backbone, scaled": dict(backbone=torch.float16, autocast=torch.float16, scaled=True),
}


def curve(device, backbone=torch.float32, autocast=None, scaled=False):
    """Losses of a few steps."""
    model = loramoe(tiny_llama().to(backbone)).to(device).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32}
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.0)
    scaler = torch.amp.GradScaler(device, enabled=scaled, init_scale=2.0**10)
    batch, losses = on(device, labelled(token_batch())), []
    for _ in range(25):
        with torch.autocast(device, dtype=autocast, enabled=autocast is not None):
            loss = model(**batch, task_types=TYPES.to(device)).loss
        losses.append(loss.detach())
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert balance_loss(model).dtype == torch.float32
    return torch.stack(losses).cpu()


@pytest.mark.parametrize("options", PRECISIONS.values(), ids=PRECISIONS)
def test_the_loss_curve_follows_float32_on_the_cpu(options, implementation, device):
    expected = curve("cpu")
    assert expected[-1] < expected[0] - 0.4
    torch.testing.assert_close(curve(device, **options), expected, atol=0.05, rtol=0)


# trainers


class BalancedTrainer(LoRAMoETrainerMixin, Trainer):
    pass


def build(kind, device, folder, model=None, **options):
    anchors = dict(anchors=ANCHORS, anchor_loss_weight=0.4, anchor_kl_weight=0.3, anchors_per_batch=2)
    arguments = dict(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=device == "cpu",
        gradient_checkpointing=False,
    )
    arguments |= options
    given = {"data_collator": DataCollatorForSeq2Seq(tiny_tokenizer())} if kind is BalancedTrainer else {}
    data = Dataset.from_dict(COLUMNS)
    return kind(
        model=loramoe(balance_loss_weight=0.5, router_lr_multiplier=1.0) if model is None else model,
        args=(TrainingArguments if kind is BalancedTrainer else SFTConfig)(**arguments),
        train_dataset=data,
        eval_dataset=data,
        processing_class=tiny_tokenizer(),
        **anchors,
        **given,
    )


def logged(trainer, name="loss"):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def assert_all_finite(log_history):
    values = [value for entry in log_history for value in entry.values()]
    assert values and all(math.isfinite(value) for value in values)


@pytest.mark.parametrize("kind", [BalancedTrainer, LoRAMoESFTTrainer])
def test_training_in_bfloat16_learns_and_logs_finite_values(kind, implementation, device, tmp_path):
    trainer = build(kind, device, tmp_path, bf16=True, max_steps=20)
    trainer.add_callback(RouterCallback(layer_groups=1))
    trainer.train()
    trainer.evaluate()
    losses = logged(trainer)
    assert len(losses) == 20 and sum(losses[-4:]) < sum(losses[:4]) - 1.0
    names = {name for entry in trainer.state.log_history for name in entry}
    assert any(name.startswith("router/") for name in names) and "eval_loss" in names
    assert_all_finite(trainer.state.log_history)
    assert {p.device.type for p in trainer.model.parameters()} == {device}
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.float32}


def first_gradient(*args, **options):
    trainer, first = build(*args, bf16=False, max_steps=1, max_grad_norm=0.0, seed=5, **options), FirstGradient()
    trainer.add_callback(first)
    trainer.train()
    return first.gradient


CHECKPOINTING = {
    "plain": {},
    "checkpoints": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    "reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
}


@pytest.mark.parametrize("options", CHECKPOINTING.values(), ids=CHECKPOINTING)
@pytest.mark.parametrize("kind", [BalancedTrainer, LoRAMoESFTTrainer])
def test_a_trainers_gradient_is_that_of_the_cpu(kind, options, implementation, device, tmp_path):
    expected = first_gradient(kind, "cpu", tmp_path)
    found = first_gradient(kind, device, tmp_path, **options)
    assert {tensor.device.type for tensor in found.values()} == {device}
    assert_close(found, expected, FLOAT32)


def test_liger_kernels_give_the_same_gradient(implementation, device, tmp_path, monkeypatch):
    pytest.importorskip("liger_kernel")
    if device == "cpu":
        pytest.skip("its kernels need a CUDA device")
    for name in ("apply_rotary_pos_emb", "LlamaRMSNorm", "LlamaMLP"):  # replaced for all models; put back afterwards
        monkeypatch.setattr(modeling_llama, name, getattr(modeling_llama, name))
    plain = first_gradient(BalancedTrainer, device, tmp_path)
    assert_close(first_gradient(BalancedTrainer, device, tmp_path, use_liger_kernel=True), plain, 1e-3)


def test_training_resumes_as_if_it_had_not_stopped(implementation, device, tmp_path):
    def trained(steps, resume=None):
        options = {"max_steps": steps, "bf16": False, "save_strategy": "steps", "save_steps": 2}
        trainer = build(BalancedTrainer, device, tmp_path, **options)
        trainer.train(resume_from_checkpoint=resume)
        return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}

    whole = trained(4)
    assert_close(trained(4, str(tmp_path / "checkpoint-2")), whole, FLOAT32)


# 4 bits


def in_4_bit(folder, device):
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, dtype=torch.bfloat16, device_map={"": device}
    )


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "paged_adamw_8bit"])
def test_qlora_trains_saves_and_loads(optim, implementation, device, tmp_path):
    pytest.importorskip("bitsandbytes")
    tiny_llama(hidden_size=64, intermediate_size=128, num_attention_heads=2).save_pretrained(tmp_path / "base")
    base = prepare_model_for_kbit_training(in_4_bit(tmp_path / "base", device))
    model = loramoe(base, lora_dropout=0.05, router_lr_multiplier=1.0)
    trainer = build(LoRAMoESFTTrainer, device, tmp_path, model, bf16=True, max_steps=20, optim=optim)
    trainer.train()
    losses = logged(trainer)
    assert sum(losses[-4:]) < sum(losses[:4]) - 1.0
    assert_all_finite(trainer.state.log_history)
    trainer.save_model(str(tmp_path / "adapter"))
    base = prepare_model_for_kbit_training(in_4_bit(tmp_path / "base", device))
    with torch.autocast(device, dtype=torch.bfloat16):  # as the trainer calls its model
        trained = logits(trainer.model).float()
        assert trained.device.type == device
        loaded = PeftModel.from_pretrained(base, tmp_path / "adapter")
        assert torch.equal(logits(loaded).float(), trained)
        with loaded.disable_adapter():
            assert not torch.allclose(logits(loaded).float(), trained, atol=1e-2)


# saving and loading

LOADERS = {
    "torch_device": lambda base, adapter, device: PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, device_map=device), adapter, torch_device=device
    ),
    "device_map": lambda base, adapter, device: PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, device_map=device), adapter, device_map=device
    ),
    "by default": lambda base, adapter, device: PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base).to(device), adapter
    ),
    "low_cpu_mem_usage": lambda base, adapter, device: PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, device_map=device), adapter, low_cpu_mem_usage=True
    ),
    "AutoPeftModel": lambda base, adapter, device: AutoPeftModelForCausalLM.from_pretrained(
        adapter, device_map=device
    ),
}


@pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS)
def test_adapters_move_between_devices(load, implementation, device, tmp_path):
    base = tmp_path / "base"
    tiny_llama().save_pretrained(base)
    first = loramoe(AutoModelForCausalLM.from_pretrained(base, device_map=device))
    expected = logits(first)
    first.save_pretrained(tmp_path / "first")
    on_cpu = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "first")
    assert {p.device.type for p in on_cpu.parameters()} == {"cpu"}
    torch.testing.assert_close(logits(on_cpu), expected.cpu(), atol=1e-4, rtol=1e-4)
    on_cpu.save_pretrained(tmp_path / "second")
    back = load(base, tmp_path / "second", device)
    assert {p.device.type for p in back.parameters()} == {device}
    assert torch.equal(logits(back), expected)
    files = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("first", "second")]
    assert files[0].keys() == files[1].keys() and all(torch.equal(files[1][n], t) for n, t in files[0].items())


# decoding

CACHES = {
    "dynamic": {},
    "static": {"cache_implementation": "static", "disable_compile": True},
    "static, compiled": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
}


def left_padded():
    batch = token_batch()
    return {name: tensor.flip(1) for name, tensor in batch.items()}


def generated(model, batch, **options):
    settings = dict(max_new_tokens=8, do_sample=False, eos_token_id=None, **options)
    return model.eval().generate(**on(model.device, batch), **settings).cpu()


@pytest.mark.parametrize("adapter", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("cache", CACHES.values(), ids=CACHES)
def test_greedy_decoding_gives_the_tokens_of_the_cpu(cache, adapter, implementation, device):
    torch._dynamo.utils.counters.clear()
    expected = generated(loramoe(**adapter), left_padded())
    compiled = cache.get("cache_implementation") == "static" and "disable_compile" not in cache
    if compiled:
        config = CompileConfig(fullgraph=True, mode="reduce-overhead")
        if device == "cpu":
            config = CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
            config._compile_all_devices = True
        cache = {**cache, "compile_config": config}
    model = loramoe(**adapter).to(device)
    assert torch.equal(generated(model, left_padded(), **cache), expected)
    assert (torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0) == compiled


def replayed(step, device):
    """`step` in a CUDA graph: a function that replays it. On a CPU, `step`."""
    if device == "cpu":
        return step
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def test_a_cuda_graph_decodes_and_follows_the_weights(implementation, device):
    model, prompt = loramoe().to(device).eval(), token_batch(rows=1)["input_ids"].to(device)
    cache = StaticCache(config=model.config, max_cache_len=32)
    token = torch.zeros(1, 1, dtype=torch.long, device=device)

    def read(ids):
        token.copy_(model(input_ids=ids, past_key_values=cache).logits[:, -1:].argmax(-1))

    def decode(step):
        cache.reset()
        read(prompt)
        tokens = [token.clone()]
        for _ in range(7):
            step()
            tokens.append(token.clone())
        return torch.cat([prompt, *tokens], dim=1).cpu()

    def eager():
        return generated(model, {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)})

    with torch.no_grad():
        read(prompt)
        step = replayed(lambda: read(token), device)
        before = eager()
        assert torch.equal(decode(step), before)
        for name, parameter in model.named_parameters():
            if name.endswith(".B"):
                parameter.copy_(-3 * parameter)
        after = eager()
        assert not torch.equal(after, before)
        assert torch.equal(decode(step), after)


# what routers did


def test_recorded_routing_is_that_of_the_cpu(implementation, device):
    seen = []
    for place in ("cpu", device):
        model = loramoe(balance_loss_weight=0.5).to(place).train()
        batch = on(place, labelled(token_batch()))
        with collect_balance(model, TYPES):
            losses = [model(**batch).loss, model(**batch).loss]
        (sum(losses) + balance_loss(model)).backward()
        terms = {
            f"{adapter} {layer}": term for adapter, of in balance_terms(model).items() for layer, term in of.items()
        }
        gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        model.zero_grad()
        model(**batch, task_types=TYPES)  # from the CPU, as a list of integers would be
        routing = {
            f"{layer.layer} {name}": getattr(layer, name)
            for layer in layer_routing(model)
            for name in ("importance", "entropy", "token_counts", "probabilities")
        }
        assert {tensor.device.type for tensor in routing.values()} == {place}
        assert all(layer.task_types.tolist() == TYPES.tolist() for layer in layer_routing(model))
        seen.append({**terms, **gradients, **routing, "term": balance_loss(model)})
    assert_close(*reversed(seen), FLOAT32)


def flat(value, place=""):
    """Numbers and texts inside of records, by their place."""
    if isinstance(value, dict):
        return {k: v for name, part in value.items() for k, v in flat(part, f"{place}.{name}").items()}
    if isinstance(value, (list, tuple)):
        return {k: v for i, part in enumerate(value) for k, v in flat(part, f"{place}[{i}]").items()}
    return {place: value}


def analyses(model):
    tokenizer, batch = tiny_tokenizer(), {**token_batch(), "task_types": TYPES}
    statistics = router_statistics(model, [batch, batch])
    asked = answer_questions(model, tokenizer, [Question("w5 w6", ("w7",))], template="{question}", max_new_tokens=3)
    scores = score_answers(model, tokenizer, ["w5 w6", "w7"], ["w8 w9", "w10"])
    return flat(
        {
            "experts": statistics.experts,
            "layers": statistics.layers,
            "groups": group_weights(statistics.experts),
            "usage": expert_usage(statistics),
            "trace": router_trace(model, tokenizer, "w5 w6 w7").layers,
            "similarity": expert_similarity(model),
            "answers": [[response.given, response.loss] for response in asked.responses],
            "scores": [[score.correct, score.loss] for score in scores],
        }
    )


def test_analyses_are_those_of_the_cpu(implementation, device):
    expected, found = analyses(loramoe()), analyses(loramoe().to(device))
    assert len(expected) > 100 and found.keys() == expected.keys()
    for place, value in expected.items():
        same = pytest.approx(value, rel=1e-3, abs=1e-5) if isinstance(value, float) else value
        assert found[place] == same, place


# the command line


@pytest.fixture
def base(tmp_path):
    tiny_llama(eos_token_id=1, hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def run(*words):
    assert main([str(word) for word in words]) == 0


@pytest.mark.parametrize("options", [["--bf16"], ["--no-bf16"], ["--load-in-4bit"]], ids=["bf16", "float32", "4 bits"])
def test_the_command_line_trains_and_evaluates(options, implementation, device, base, tmp_path, capsys):
    if "--load-in-4bit" in options:
        pytest.importorskip("bitsandbytes")
    records = [
        {"prompt": f"w{i} w{i + 1}", "completion": f"w{i + 2} w{i + 3}", "task_type": i % 2} for i in range(20, 28)
    ]
    train_file = write(tmp_path / "train.jsonl", records)
    anchors = write(tmp_path / "anchors.jsonl", [{"text": text} for text in ANCHORS])
    given = ["--model", base, "--train-file", train_file, "--output-dir", tmp_path / "out", "--anchors", anchors]
    given += ["--max-steps", 3, "--batch-size", 2, "--gradient-accumulation-steps", 2, *options]
    run("train", *given, *(["--device", "cpu"] if device == "cpu" else []))
    adapter = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert adapter and all(tensor.isfinite().all() for tensor in adapter.values())
    questions = write(tmp_path / "questions.jsonl", [{"question": "w20 w21", "answer": ["w22", "w23"]}] * 3)
    capsys.readouterr()
    asked = ["--questions", questions, "--shots", 0, "--template", "{question}", "--max-new-tokens", 2]
    run("evaluate", "--adapter", tmp_path / "out", *asked, "--device", device, "--json")
    report = json.loads(capsys.readouterr().out)
    assert [model["adapter"] for model in report["closed_book"][0]["models"]] == [None, str(tmp_path / "out")]


def test_the_command_line_samples_anchors_and_labels_data(device, base, tmp_path):
    common = ["--model", base, "--device", device]
    run("anchors", *common, "--number", 6, "-o", tmp_path / "a.jsonl", "--max-tokens", 8, "--batch-size", 4)
    assert len(read_anchors(tmp_path / "a.jsonl")) == 6
    data = write(tmp_path / "data.jsonl", [{"prompt": "w20", "completion": f"w{i}"} for i in range(40, 44)])
    results = []
    for i, place in enumerate(("cpu", device)):
        typed = tmp_path / f"typed-{i}.jsonl"
        run("label", data, "--model", base, "-o", typed, "--max-loss", 4.2, "--device", place)
        results.append([json.loads(line)["task_type"] for line in typed.read_text().splitlines()])
    assert results[0] == results[1] and set(results[0]) == {0, 1}


# several processes on one device

SCRIPT = """
import os
import sys

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from peft_loramoe import balance_loss
from peft_loramoe.ops import mixture
from tiny import loramoe, token_batch

device, across = sys.argv[1], sys.argv[2] == "True"
dist.init_process_group("gloo")
rank = dist.get_rank()
assert (mixture.KERNELS is not None) == (os.environ["PEFT_LORAMOE_TRITON"] == "1")
ids = token_batch(rows=4)["input_ids"].clamp(min=1).to(device)
types = torch.tensor([0, 1, 1, 0], device=device)


def gradients(model, rows):
    model.zero_grad()
    given = {"input_ids": ids[rows], "attention_mask": torch.ones_like(ids[rows]), "labels": ids[rows]}
    model(**given, task_types=types[rows]).loss.backward()
    return {name.removeprefix("module."): p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def build(across):
    return loramoe(balance_loss_weight=0.5, balance_across_processes=across).to(device).train()


found = gradients(DistributedDataParallel(build(across)), slice(2 * rank, 2 * rank + 2))
if across:
    expected = gradients(build(False), slice(0, 4))
else:  # each process has a term of its own
    halves = [gradients(build(False), slice(start, start + 2)) for start in (0, 2)]
    expected = {name: (gradient + halves[1][name]) / 2 for name, gradient in halves[0].items()}
assert found.keys() == expected.keys() and len(found) == 18
for name, gradient in expected.items():
    assert (found[name] - gradient).norm() < 1e-4 * gradient.norm(), name
dist.destroy_process_group()
"""


@pytest.mark.distributed
@pytest.mark.parametrize("across", [False, True], ids=["own term", "common term"])
@pytest.mark.parametrize("kernels", [False, True], ids=["torch", "triton"])
def test_two_processes_have_the_gradients_of_one(kernels, across, device):
    if kernels and device == "cpu":
        pytest.skip("the kernels need a CUDA device")
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = str(probe.getsockname()[1])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    environment |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    environment["PEFT_LORAMOE_TRITON"] = str(int(kernels))
    command = [sys.executable, "-c", SCRIPT, device, str(across)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with contextlib.ExitStack() as stack:
        processes = [
            stack.enter_context(subprocess.Popen(command, env={**environment, "RANK": rank}, **pipes)) for rank in "01"
        ]
        for process in processes:
            stack.callback(process.kill)  # one that waits for the other, which failed
        for process in processes:
            _, errors = process.communicate(timeout=120)
            assert process.returncode == 0, errors
