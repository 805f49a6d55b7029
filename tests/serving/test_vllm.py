"""vLLM's answers against PEFT's. Needs vLLM: `make test-vllm` installs it and runs these tests."""

import importlib.util
import logging
import sys

import pytest
import serving_cases as cases
import torch


pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason=f"vLLM is not installed; {cases.INSTALL}"
)
# Of a log-probability, in float32; vLLM's base model is as far from transformers'.
TOLERANCE = 2e-4


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return cases.tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def engine(model):
    return cases.start_vllm(model)


@pytest.fixture(scope="module")
def ids():
    return {}


def assert_same(reference, answers, prompts=cases.PROMPTS):
    wrong, largest = cases.differences(reference, answers, prompts)
    assert wrong == 0
    assert largest < TOLERANCE


@pytest.mark.parametrize("options", cases.OPTIONS.values(), ids=cases.OPTIONS)
def test_every_option_gives_the_answers_of_peft(options, model, engine, ids, tmp_path):
    adapter = cases.save_adapter(model, tmp_path, options)
    adapted = cases.with_adapter(model, adapter)
    assert_same(adapted, cases.ask_vllm(engine, [adapter] * 3, ids=ids))
    assert cases.effect_of_routing(adapted) > 100 * TOLERANCE  # wrong gates would have been seen


def test_a_batch_mixes_mixtures_and_the_base_model(model, engine, ids, tmp_path):
    first = cases.save_adapter(model, tmp_path / "first", {}, seed=1)
    second = cases.save_adapter(model, tmp_path / "second", cases.OPTIONS["retain"], seed=2)
    prompts = [cases.PROMPTS[i % 3] for i in range(6)]
    adapters = [first, None, second, first, second, None]
    answers = cases.ask_vllm(engine, adapters, prompts, ids)
    for adapter in (first, second, None):
        rows = [i for i in range(6) if adapters[i] == adapter]
        reference = cases.load(model) if adapter is None else cases.with_adapter(model, adapter)
        assert_same(reference, [answers[i] for i in rows], [prompts[i] for i in rows])


def test_a_batch_mixes_a_mixture_and_a_plain_lora(model, engine, ids, tmp_path):
    mixture = cases.save_adapter(model, tmp_path / "mixture", {}, seed=3)
    lora = cases.save_lora(model, tmp_path / "lora")
    answers = cases.ask_vllm(engine, [mixture, lora, lora], ids=ids)
    assert_same(cases.with_adapter(model, mixture), answers[:1], cases.PROMPTS[:1])
    assert_same(cases.with_adapter(model, lora), answers[1:], cases.PROMPTS[1:])


def test_slots_are_reused(model, engine, ids, tmp_path):
    """Two slots, and in turn mixtures and plain LoRAs in them."""
    folders = [
        cases.save_adapter(model, tmp_path / "0", cases.OPTIONS["top_k"], seed=4),
        cases.save_lora(model, tmp_path / "1", seed=4),
        cases.save_adapter(model, tmp_path / "2", cases.OPTIONS["attention"], seed=5),
        cases.save_lora(model, tmp_path / "3", seed=5),
    ]
    for folder in folders + folders[::-1]:
        assert_same(cases.with_adapter(model, folder), cases.ask_vllm(engine, [folder] * 3, ids=ids))


def add(engine, folder, number):
    from vllm.lora.request import LoRARequest

    return engine.llm_engine.add_lora(LoRARequest(str(folder), number, str(folder)))


def test_a_rank_that_is_too_small_names_the_one_to_set(model, engine, tmp_path):
    folder = cases.save_adapter(model, tmp_path, {"r": 16, "num_experts": 8})
    with pytest.raises(ValueError, match=r"max_lora_rank=64 is too small .* 8 experts of rank 16 and a router of 8 outputs.*rank of 136; .*--max-lora-rank 256"):  # fmt: skip
        add(engine, folder, 901)


def test_an_option_that_is_not_served_is_refused(model, engine, tmp_path):
    folder = cases.save_adapter(model, tmp_path, {"modules_to_save": ["lm_head"]})
    with pytest.raises(ValueError, match=r"modules_to_save=\['lm_head'\]"):
        add(engine, folder, 902)


def test_the_output_layer_is_refused(model, engine, tmp_path):
    folder = cases.save_adapter(model, tmp_path, {"target_modules": ["lm_head", "down_proj"]})
    with pytest.raises(ValueError, match="holds 'base_model.model.lm_head.base_layer.weight'"):
        add(engine, folder, 903)


def test_a_mixture_beside_a_block_is_refused(model, engine, tmp_path):
    folder = cases.save_adapter(model, tmp_path, {"target_modules": ["mlp"]})
    with pytest.raises(ValueError, match=r"adapts 'model\.layers\.0\.mlp'.*, which are no linears that this"):
        add(engine, folder, 908)


def test_a_layer_that_the_model_lacks_is_refused(engine, tmp_path):
    deeper = cases.tiny_model(tmp_path / "deeper", num_hidden_layers=3)
    folder = cases.save_adapter(deeper, tmp_path / "adapter", {"target_modules": ["down_proj"]})
    with pytest.raises(ValueError, match=r"adapts 'model\.layers\.2\.mlp\.down_proj', which are no linears that this"):
        add(engine, folder, 907)


def test_an_adapter_of_another_base_model_is_refused(model, engine, tmp_path):
    from tiny import loramoe

    loramoe(num_experts=2, r=2).save_pretrained(tmp_path)  # a smaller Llama
    with pytest.raises(ValueError, match="A of 32 inputs and B of 48 outputs .* has 64 and 96"):
        add(engine, tmp_path, 904)


def test_a_refused_adapter_leaves_the_engine_as_it_was(model, engine, ids, tmp_path):
    folder = cases.save_adapter(model, tmp_path / "good", {}, seed=6)
    damaged = cases.save_adapter(model, tmp_path / "damaged", {})
    path = damaged / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="incomplete or damaged"):
        add(engine, damaged, 905)
    assert 905 not in engine.llm_engine.list_loras()
    assert_same(cases.with_adapter(model, folder), cases.ask_vllm(engine, [folder] * 3, ids=ids))


def test_wrong_numbers_are_found_when_an_adapter_is_loaded(model, engine, tmp_path, monkeypatch):
    """As if another vLLM did not ask for the gates."""
    from peft_loramoe.serving import vllm_seams

    folder = cases.save_adapter(model, tmp_path, {}, seed=7)
    monkeypatch.setattr(vllm_seams.GatedPunica, "_gate", lambda self, channels, logits, width: channels[..., :width])
    with pytest.raises(RuntimeError, match="does not compute the LoRAMoE adapter .* as the formula does.*is refused"):
        add(engine, folder, 906)
    assert 906 not in engine.llm_engine.list_loras()


def test_the_plugin_may_be_registered_again(model, engine, ids, tmp_path):
    from peft_loramoe.serving.vllm import register

    register()
    folder = cases.save_adapter(model, tmp_path, {}, seed=8)
    assert_same(cases.with_adapter(model, folder), cases.ask_vllm(engine, [folder] * 3, ids=ids))


def test_grpo_trains_on_completions_of_the_adapter_as_it_is(model, engine, tmp_path):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    from peft_loramoe.serving.rollouts import VLLMRollouts
    from peft_loramoe.training import LoRAMoETrainerMixin
    from tiny import tiny_tokenizer

    add(engine, cases.save_adapter(model, tmp_path / "other", {}, seed=9), 1)
    adapted = cases.with_adapter(model, cases.save_adapter(model, tmp_path / "adapter", {}), is_trainable=True)
    rollouts, steps = VLLMRollouts(engine), []

    def checked(prompts, trainer):
        output = rollouts(prompts, trainer)
        with torch.no_grad():
            for prompt, tokens, logprobs in zip(
                *(output[key] for key in ("prompt_ids", "completion_ids", "logprobs"))
            ):
                logits = adapted(input_ids=torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
                wanted = logits.log_softmax(-1).gather(-1, torch.tensor(tokens)[:, None])[:, 0]
                assert (wanted - torch.tensor(logprobs)).abs().max() < TOLERANCE
        steps.append((trainer.state.global_step, adapted.get_parameter(parameter).detach().clone()))
        return output

    parameter = next(name for name, _ in adapted.named_parameters() if name.endswith("experts.default.router"))
    args = trl.GRPOConfig(
        output_dir=str(tmp_path / "out"),
        per_device_train_batch_size=4,
        num_generations=2,
        max_completion_length=6,
        max_steps=3,
        learning_rate=0.05,
        beta=0.0,
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
    )

    class Trainer(LoRAMoETrainerMixin, trl.GRPOTrainer): ...

    trainer = Trainer(
        model=adapted,
        args=args,
        reward_funcs=lambda completion_ids, **_: [float(sum(ids)) for ids in completion_ids],
        train_dataset=datasets.Dataset.from_list(
            [{"prompt": f"w{i} w{i + 1} w7", "task_type": i % 2} for i in range(2, 14)]
        ),
        processing_class=tiny_tokenizer(),
        rollout_func=checked,
    )
    trainer.train()
    assert [step for step, _ in steps] == [0, 1, 2]
    assert not torch.equal(steps[0][1], steps[2][1])  # what is served changes with the training


class CUDAKernels:
    """Stands for vLLM's kernels on CUDA: one tensor for all slices, rows without an adapter left out."""

    def __init__(self, tokens):
        self._token_lora_indices = torch.full((tokens,), -1)

    def _of_rows(self, stacked, rows):
        slots = self._token_lora_indices[:rows]
        return stacked[slots.clamp(min=0), 0] * (slots >= 0)[:, None, None]

    def add_shrink(self, y, x, lora_a_stacked, scale, **kwargs):
        for i, a in enumerate(lora_a_stacked):
            y[i] = torch.einsum("ti,tri->tr", x, self._of_rows(a, x.shape[0])) * scale

    def add_expand(self, y, x, lora_b_stacked, output_slices, offset_start=0, add_inputs=True, **kwargs):
        assert x.ndim == 3 and x.shape[0] == len(output_slices)
        for channels, b, width in zip(x, lora_b_stacked, output_slices):
            added = torch.einsum("tr,tor->to", channels, self._of_rows(b, channels.shape[0]))
            part = y[:, offset_start : offset_start + width]
            part.copy_(part + added if add_inputs else added)
            offset_start += width


def test_a_graph_that_was_captured_before_a_mixture_was_loaded_gates_it():
    """What vLLM's compiled graphs do; on CPUs it does not compile models with LoRAs."""
    from peft_loramoe.ops import MixtureOptions
    from peft_loramoe.serving.adapter import SlotLayer
    from peft_loramoe.serving.gates import GateTables
    from peft_loramoe.serving.vllm_seams import GatedPunica

    torch.manual_seed(0)
    inputs, width, rank, slots = 24, 20, 20, 2
    a = tuple(torch.randn(slots, 1, rank, inputs) for _ in range(2))
    b = tuple(torch.randn(slots, 1, width, rank) for _ in range(2))
    kernels, tables = CUDAKernels(tokens=16), GateTables(2, slots, rank, torch.float32, "cpu")
    punica, graphs = GatedPunica(kernels, tables, sums_logits=False), []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    @torch.compile(backend=count, fullgraph=True, dynamic=True)
    def add(y, x):
        punica.add_lora_linear(y, x, a, b, 1.0, (width, width), add_inputs=False)
        return y

    x = torch.randn(7, inputs)
    kernels._token_lora_indices[:] = torch.tensor([0, 1, -1, 0, 1, 1, -1, *[2**40] * 9])  # rows that pad are not set
    plain = add(torch.zeros(7, 2 * width), x)
    mixture = SlotLayer(torch.randn(12, inputs), torch.randn(width, 12), torch.randn(4, inputs), MixtureOptions((0, 1, 3), 2.0, top_k=2))  # fmt: skip
    a[1][1, 0].zero_(), b[1][1, 0].zero_()
    a[1][1, 0, :16], b[1][1, 0, :, :16] = mixture.lora_a(torch.float32), mixture.lora_b(torch.float32)
    tables.set(1, [None, mixture.layout])
    gated = add(torch.zeros(7, 2 * width), x)
    in_slot_1 = [1, 4, 5]
    torch.testing.assert_close(gated[in_slot_1, width:].double(), mixture.reference(x[in_slot_1], torch.float32), rtol=1e-4, atol=1e-4)  # fmt: skip
    assert torch.equal(gated[:, :width], plain[:, :width])
    others = [0, 2, 3, 6]
    assert torch.equal(gated[others], plain[others])
    assert not gated[[2, 6]].any()
    assert len(graphs) == 1


def test_graphs_compiled_without_the_plugin_are_not_taken_for_its():
    from vllm.config.lora import LoRAConfig

    before = LoRAConfig.compute_hash.__wrapped__
    config = LoRAConfig(max_lora_rank=16)
    assert config.compute_hash().startswith(before(config)) and config.compute_hash() != before(config)


def test_a_version_that_was_not_tried_is_warned_about(caplog):
    from peft_loramoe.serving.vllm import TRIED, warn_of_version

    with caplog.at_level(logging.WARNING, logger="vllm.peft_loramoe"):
        warn_of_version(f"{next(iter(TRIED))}+cpu")
        assert not caplog.messages
        warn_of_version("99.1.0")
    assert "was not tried with vLLM 99.1.0" in caplog.messages[0]


def test_a_vllm_that_lacks_a_name_is_refused_with_the_versions_that_were_tried(monkeypatch):
    from peft_loramoe.serving.vllm import register

    monkeypatch.setitem(sys.modules, "peft_loramoe.serving.vllm_seams", None)
    with pytest.raises(ImportError, match=r"cannot serve LoRAMoE adapters with vLLM .*tried: 0\.32\.0"):
        register()
