"""What the tests of serving and docs/make_serving.py share: models, adapters of every option, and the comparison of
an engine's answers with PEFT's.

vLLM is imported where it is used; without it, everything else here works.
"""

import copy
import os
import warnings
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from peft_loramoe import LoRAMoEConfig
from peft_loramoe.interop import export_lora


INSTALL = "make test-vllm installs it and runs the tests"
# Greedy tokens after each of the prompts; three times twelve.
PROMPTS = [[5, 17, 3, 42, 8, 21, 9], [11, 2, 33], [7, 7, 30, 12, 25, 40, 51, 6, 19, 28, 13]]
NEW_TOKENS = 12
LOGPROBS = 5
MAX_LORA_RANK = 64
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
# Options of LoRAMoEConfig that change what is served; with float32 slots, every one needs a rank of at most 64.
OPTIONS = {
    "default targets": {},
    "retain": {"preset": "retain"},
    "paper": {"preset": "paper"},
    "attention": {"target_modules": ATTENTION},
    "all-linear": {"target_modules": "all-linear"},
    "part of packed linears": {"target_modules": ["gate_proj", "k_proj"]},
    "some layers": {"target_modules": ["down_proj", "q_proj"], "layers_to_transform": [1]},
    "rank_pattern": {"rank_pattern": {"layers.0.mlp.up_proj": 2, "down_proj": 6}},
    "alpha_pattern": {"alpha_pattern": {"gate_proj": 9, "layers.1.mlp.down_proj": 1}},
    "num_experts_pattern": {"num_experts_pattern": {"up_proj": 2, "layers.1.mlp.down_proj": [1, 5]}},
    "expert_groups": {"num_experts": 5, "expert_groups": [1, 4]},
    "null_groups": {"num_experts": 6, "expert_groups": [2, 4], "null_groups": [0]},
    "null group in the middle": {"num_experts": 6, "expert_groups": [2, 1, 3], "null_groups": [1]},
    "top_k": {"top_k": 2},
    "top_k=1": {"top_k": 1},
    "top_k with null experts": {"num_experts": 6, "null_groups": [0], "top_k": 3},
    "router_temperature": {"router_temperature": 0.3},
    "use_rslora": {"use_rslora": True},
    "lora_dropout": {"lora_dropout": 0.3},
    "odd number of experts": {"num_experts": 3, "expert_groups": [3]},
    "saved in bfloat16": {"saved_as": torch.bfloat16},
}


@dataclass
class Answer:
    """Greedy tokens after a prompt, and the log-probabilities of the likeliest tokens at each position."""

    tokens: list[int]
    logprobs: list[dict[int, float]]


def tiny_model(folder: Path, **options) -> Path:
    """Save a random Llama that engines load: two layers, heads of 32 entries, grouped queries."""
    torch.manual_seed(0)
    defaults = dict(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=128,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=None,
    )
    config = LlamaConfig(**{**defaults, **options})
    LlamaForCausalLM(config).eval().save_pretrained(folder)
    return folder


def load(model: Path, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """The base model, in transformers: a copy of its own."""
    return copy.deepcopy(_loaded(model, dtype))


@lru_cache(maxsize=2)
def _loaded(model: Path, dtype: torch.dtype) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(model, dtype=dtype, attn_implementation="eager").eval()


def save_adapter(model: Path, folder: Path, options: dict, seed: int = 0) -> Path:
    """Save a random LoRAMoE adapter whose experts and routers matter for the answers."""
    options = {"task_type": "CAUSAL_LM", "init_weights": False, **options}
    preset, dtype = options.pop("preset", None), options.pop("saved_as", torch.float32)
    if preset is None:
        options = {"r": 4, "lora_alpha": 6, "num_experts": 4, **options}
    config = (getattr(LoRAMoEConfig, preset) if preset else LoRAMoEConfig)(**options)
    torch.manual_seed(100 + seed)
    adapted = get_peft_model(load(model), config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if name.endswith("experts.default.router"):
                parameter.mul_(4)
    adapted.to(dtype).save_pretrained(folder)
    return folder


def save_lora(model: Path, folder: Path, seed: int = 0) -> Path:
    """Save a random plain LoRA."""
    torch.manual_seed(200 + seed)
    config = LoraConfig(r=8, target_modules=["down_proj", "q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(load(model), config).save_pretrained(folder)
    return folder


def start_vllm(model: Path, **options):
    """An engine in this process, small enough for a test."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    from vllm import LLM

    defaults = dict(
        dtype="float32",
        enforce_eager=True,
        max_model_len=128,
        max_num_seqs=8,
        enable_lora=True,
        max_loras=2,
        max_lora_rank=MAX_LORA_RANK,
        logprobs_mode="processed_logprobs",
        skip_tokenizer_init=True,
        seed=0,
    )
    return LLM(str(model), **{**defaults, **options})


def ask_vllm(engine, adapters: list[Path | None], prompts: list[list[int]] = PROMPTS, ids: dict | None = None):
    """Answers to prompts, in one batch, each with its adapter (None: the base model).

    Args:
        engine: from `start_vllm`.
        adapters: one for each prompt.
        prompts: token ids.
        ids: adapter -> the number that vLLM is told; kept by the caller between calls.
    """
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    ids = {} if ids is None else ids
    requests = []
    for adapter in adapters:
        number = adapter and ids.setdefault(adapter, len(ids) + 1)
        requests.append(adapter and LoRARequest(str(adapter), number, str(adapter)))
    sampling = SamplingParams(
        temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, logprobs=LOGPROBS, detokenize=False
    )
    outputs = engine.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts], sampling, lora_request=requests, use_tqdm=False
    )
    answers = [output.outputs[0] for output in outputs]
    return [
        Answer(list(answer.token_ids), [{t: p.logprob for t, p in at.items()} for at in answer.logprobs])
        for answer in answers
    ]


def export(model: Path, adapter: Path, folder: Path) -> Path:
    """Export a mixture as a plain LoRA."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the error of the export is not what is measured here
        export_lora(with_adapter(model, adapter), folder, show=False)
    return folder


@torch.no_grad()
def logprobs_of(model: torch.nn.Module, prompt: list[int], answer: Answer) -> torch.Tensor:
    """Log-probabilities of all tokens at each position of an answer, shape (tokens, vocabulary), float32."""
    ids = torch.tensor([prompt + answer.tokens])
    return model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)


def differences(model: torch.nn.Module, answers: list[Answer], prompts: list[list[int]] = PROMPTS):
    """How far an engine's answers are from those of a model in transformers or PEFT.

    Returns:
        The number of greedy tokens that differ, and the largest difference of a log-probability.
    """
    wrong, largest = 0, 0.0
    for prompt, answer in zip(prompts, answers):
        wanted = logprobs_of(model, prompt, answer)
        wrong += int((wanted.argmax(-1) != torch.tensor(answer.tokens)).sum())
        largest = max(largest, *(abs(p - wanted[i, t].item()) for i, at in enumerate(answer.logprobs) for t, p in at.items()))  # fmt: skip
    return wrong, largest


def mean_difference(answers: list[Answer], prompts: list[list[int]], model: torch.nn.Module, other=None) -> float:
    """Mean difference of the answers' log-probabilities between an engine, or another model, and a model."""
    found = []
    for prompt, answer in zip(prompts, answers):
        wanted = logprobs_of(model, prompt, answer)
        given = None if other is None else logprobs_of(other, prompt, answer)
        for i, at in enumerate(answer.logprobs):
            found += [abs((p if given is None else given[i, t].item()) - wanted[i, t].item()) for t, p in at.items()]
    return sum(found) / len(found)


def with_adapter(model: Path, adapter: Path, dtype: torch.dtype = torch.float32, **options) -> torch.nn.Module:
    """The base model with an adapter, in PEFT."""
    return PeftModel.from_pretrained(load(model, dtype), adapter, **options).eval()


@torch.no_grad()
def effect_of_routing(adapted: torch.nn.Module, prompt: list[int] = PROMPTS[0]) -> float:
    """How much log-probabilities change if every router gives all experts the same weight; the model is left so."""
    before = adapted(input_ids=torch.tensor([prompt])).logits.float().log_softmax(-1)
    for name, parameter in adapted.named_parameters():
        if name.endswith("experts.default.router"):
            parameter.zero_()
    return (adapted(input_ids=torch.tensor([prompt])).logits.float().log_softmax(-1) - before).abs().max().item()
