"""Every trainer of transformers and TRL, what it needs for two steps on a tiny model, and how these steps go.

The first token of a sample says its task type, so that the rows that a trainer hands to the model have a type of their
own, however the trainer arranged them.
"""

import importlib
import inspect
import pkgutil
import random
import warnings
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import transformers
import trl
from datasets import Dataset
from packaging.version import Version
from peft import TaskType
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    DataCollatorForSeq2Seq,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainerCallback,
)

from peft_loramoe import balance_loss, collect_balance
from peft_loramoe.training import LoRAMoETrainerMixin
from tiny import VOCAB, loramoe, tiny_llama, tiny_tokenizer


TRL_BEFORE_1_16 = Version(trl.__version__) < Version("1.16")
WEIGHT = 0.5
MICRO_BATCHES = 2
TYPES = [0, 1, 2, 1, 0, 2, 2, 0]
FIRST = 2  # a sample of type 2 begins with the token w4
PROMPTS = [f"w{FIRST + kind} w{20 + i} w{30 + i}"[: None if i % 2 else -4] for i, kind in enumerate(TYPES)]
CHOSEN, REJECTED = [[f" w{start + i} w{50 + i}" for i in range(8)] for start in (40, 45)]
MESSAGES = [
    [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer.strip()}]
    for prompt, answer in zip(PROMPTS, CHOSEN)
]
TOKENS = [[int(word[1:]) for word in (prompt + answer).split()] for prompt, answer in zip(PROMPTS, CHOSEN)]
OPTIONS = dict(
    per_device_train_batch_size=4,
    per_device_eval_batch_size=4,
    gradient_accumulation_steps=MICRO_BATCHES,
    max_steps=2,
    seed=5,  # every micro-batch has several types
    learning_rate=1e-3,
    optim="sgd",
    max_grad_norm=0.0,
    report_to="none",
    use_cpu=True,
    bf16=False,
    gradient_checkpointing=False,
    save_strategy="no",
    disable_tqdm=True,
)
PROMPTED = {"prompt": PROMPTS}
PAIRED = {"prompt": PROMPTS, "chosen": CHOSEN, "rejected": REJECTED}


@dataclass(frozen=True)
class Case:
    """What a trainer needs for two steps.

    Attributes:
        columns: of the data set; `task_type` is added.
        options: of the training arguments, beside `OPTIONS`.
        given: makes further arguments of the trainer, anew for each; it gets a folder.
        evaluates: whether the trainer has an evaluation.
        model: a model with an adapter of this `balance_loss_weight`.
        stub: a context that stands for what is not installed, such as a server.
        note: how it worked, for the table.
    """

    columns: dict[str, list]
    options: dict[str, Any] = field(default_factory=dict)
    given: Any = None
    evaluates: bool = True
    model: Any = None
    stub: Any = nullcontext
    note: str = ""


def causal(weight, **options):
    return loramoe(expert_groups=[2, 2, 2], balance_loss_weight=weight, router_lr_multiplier=1.0, **options)


def with_reward_head(weight):
    torch.manual_seed(0)
    base = LlamaForSequenceClassification(tiny_llama(num_labels=1).config)
    options = dict(expert_groups=[2, 2, 2], balance_loss_weight=weight, router_lr_multiplier=1.0)
    return loramoe(base, task_type=TaskType.SEQ_CLS, **options)


def encoder_decoder(weight):
    torch.manual_seed(0)
    sizes = dict(vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, dropout_rate=0.0)
    base = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0, feed_forward_proj="gated-gelu"))
    options = dict(expert_groups=[2, 2, 2], balance_loss_weight=weight, router_lr_multiplier=1.0)
    return loramoe(base, task_type=TaskType.SEQ_2_SEQ_LM, **options)


def chat_tokenizer():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message['content'] }} {% if message['role'] == 'assistant' %}w1 {% endif "
        "%}{% endfor %}"
    )
    return tokenizer


def tokenized(folder):
    return {"processing_class": tiny_tokenizer()}


def collated(folder):
    return {"data_collator": DataCollatorForSeq2Seq(tiny_tokenizer())}


def rewarded(folder):
    return {**tokenized(folder), "reward_funcs": lambda completions, **_: [float(len(c) % 3) for c in completions]}


def binary_rewarded(folder):
    return {**tokenized(folder), "reward_funcs": lambda completions, **_: [float(len(c) % 2) for c in completions]}


def taught(folder):
    return {"processing_class": chat_tokenizer(), "teacher_model": tiny_llama(seed=5)}


def taught_from_folder(folder):
    given = taught(folder)
    for saved in given.values():
        saved.save_pretrained(folder / "teacher")
    given["teacher_model"].config._name_or_path = str(folder / "teacher")
    return given


def taught_by_bytes(folder):
    """With a tokenizer of bytes, whose merges are w0 to w4."""
    characters = ["w", *"0123456789", "\u0120"]  # the last is how a space is written
    vocabulary = {f"w{i}": i for i in range(5)} | {c: 5 + i for i, c in enumerate(characters)}
    model = models.BPE(vocabulary, [("w", str(i)) for i in range(5)])
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="w0", eos_token="w1", padding_side="left")
    fast.chat_template = chat_tokenizer().chat_template
    return {"processing_class": fast, "teacher_model": tiny_llama(seed=5)}


class TeacherServer:
    """Stands for TRL's client of a teacher behind a vLLM server."""

    def __init__(self, *args, **kwargs):
        pass

    def get_sequence_logprobs(self, sequences, prompt_lengths, top_logprobs, temperature):
        lengths = [len(s) - p for s, p in zip(sequences, prompt_lengths)]
        answers = [s[p:] for s, p in zip(sequences, prompt_lengths)]
        logprobs = [[[-1.0] * top_logprobs] * n for n in lengths]
        tokens = [[[token] * top_logprobs for token in answer] for answer in answers]
        actual = {
            "actual_logprobs": [[[-1.0]] * n for n in lengths],
            "actual_token_ids": [[[t] for t in a] for a in answers],
        }
        return {"logprobs": logprobs, "logprob_token_ids": tokens, **actual}


def served():
    return mock.patch("trl.generation.vllm_client.VLLMClient", TeacherServer)


GENERATES = {"max_completion_length": 4, "num_generations": 2}
CASES = {
    "transformers.Trainer": Case({"input_ids": TOKENS, "labels": TOKENS}, given=collated),
    "transformers.Seq2SeqTrainer": Case(
        {"input_ids": TOKENS, "labels": TOKENS}, {"predict_with_generate": True}, collated, encoder_decoder
    ),
    "trl.SFTTrainer": Case({"prompt": PROMPTS, "completion": CHOSEN}, given=tokenized),
    "trl.DPOTrainer": Case(PAIRED, given=tokenized),
    "trl.KTOTrainer": Case({"prompt": PROMPTS, "completion": CHOSEN, "label": [True, False] * 4}, given=tokenized),
    "trl.RewardTrainer": Case(PAIRED, given=tokenized, model=with_reward_head),
    "trl.GRPOTrainer": Case(PROMPTED, GENERATES, rewarded),
    "trl.RLOOTrainer": Case(PROMPTED, GENERATES, rewarded),
    "trl.DistillationTrainer": Case(PROMPTED, {"max_completion_length": 4}, taught),
    "trl.experimental.a2po.A2POTrainer": Case(PROMPTED, {"max_completion_length": 4}, binary_rewarded),
    "trl.experimental.async_distillation.AsyncDistillationTrainer": Case(PROMPTED, given=tokenized),
    "trl.experimental.async_grpo.AsyncGRPOTrainer": Case(PROMPTED, given=rewarded),
    "trl.experimental.bema_for_ref_model.DPOTrainer": Case(PAIRED, given=tokenized),
    "trl.experimental.cpo.CPOTrainer": Case(PAIRED, given=tokenized),
    "trl.experimental.distillation.DistillationTrainer": Case(PROMPTED, {"max_completion_length": 4}, taught),
    "trl.experimental.gkd.GKDTrainer": Case({"messages": MESSAGES}, {"max_new_tokens": 4}, taught),
    "trl.experimental.gmpo.GMPOTrainer": Case(PROMPTED, GENERATES, rewarded),
    "trl.experimental.gold.GOLDTrainer": Case({"messages": MESSAGES}, {"max_completion_length": 4}, taught_by_bytes),
    "trl.experimental.iw_opd.IWOPDTrainer": Case(
        {"messages": MESSAGES}, {"max_completion_length": 4}, taught_from_folder
    ),
    "trl.experimental.kto.KTOTrainer": Case(
        {"prompt": PROMPTS, "completion": CHOSEN, "label": [True, False] * 4}, given=tokenized
    ),
    "trl.experimental.online_dpo.OnlineDPOTrainer": Case(PROMPTED, {"max_new_tokens": 4}, rewarded, evaluates=False),
    "trl.experimental.orpo.ORPOTrainer": Case(PAIRED, given=tokenized),
    "trl.experimental.sdft.SDFTTrainer": Case(
        {**PROMPTED, "privileged_context": CHOSEN}, {**GENERATES, "distillation_topk": 8}, tokenized
    ),
    "trl.experimental.sdpo.SDPOTrainer": Case(
        {**PROMPTED, "privileged_context": CHOSEN},
        {**GENERATES, "distillation_topk": 8, "teacher_model_kind": "base"},
        rewarded,
    ),
    "trl.experimental.server_distillation.ServerDistillationTrainer": Case(
        PROMPTED,
        {"max_completion_length": 4, "teacher_model_server_url": "http://localhost:1"},
        tokenized,
        stub=served,
        note="with a stub of the teacher's server",
    ),
    "trl.experimental.tpo.TPOTrainer": Case({**PAIRED, "reference": CHOSEN}, given=tokenized),
}


def shipped() -> dict[str, type]:
    """The trainers of the installed transformers and TRL by the name that a user imports."""
    found = {f"transformers.{name}": getattr(transformers, name) for name in ("Trainer", "Seq2SeqTrainer")}
    for info in pkgutil.walk_packages(trl.__path__, "trl."):
        if not info.name.startswith(("trl.trainer.", "trl.experimental.")):
            continue
        try:
            module = importlib.import_module(info.name)
        except ImportError:  # needs something optional
            continue
        package = "trl" if info.name.startswith("trl.trainer.") else ".".join(info.name.split(".")[:3])
        for name, value in vars(module).items():
            own = inspect.isclass(value) and value.__module__ == info.name and not name.startswith("_")
            if own and issubclass(value, Trainer):
                found[f"{package}.{name}"] = value
    return found


def load(name: str) -> tuple[type, type]:
    """The trainer of that name, and the class of its arguments."""
    package, _, trainer = name.rpartition(".")
    module = importlib.import_module(package)
    arguments = trainer.replace("Trainer", "TrainingArguments" if package == "transformers" else "Config")
    return getattr(module, trainer), getattr(module, arguments, trl.DPOConfig)


def mixed(trainer_class: type) -> type:
    return type(f"LoRAMoE{trainer_class.__name__}", (LoRAMoETrainerMixin, trainer_class), {})


def importable(name: str) -> bool:
    """Whether the trainer can be imported with the installed transformers, and is what these cases are for."""
    if TRL_BEFORE_1_16 and name.startswith("trl.experimental."):
        return False
    try:
        load(name)
    except (ImportError, AttributeError):
        return False
    return True


class FirstGradient(TrainerCallback):
    """Keeps the gradient of the first optimizer step."""

    def __init__(self):
        self.gradient = None

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if self.gradient is None:
            self.gradient = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@dataclass
class Steps:
    """How the steps of a trainer went.

    Attributes:
        evaluated: the evaluation's loss before them.
        gradient: of the first step, by parameter.
        micro_batches: of the first step; the arguments of the calls of the model that a gradient passes through.
        taken: number of optimizer steps.
    """

    evaluated: float | None
    gradient: dict[str, torch.Tensor]
    micro_batches: list[list[dict[str, torch.Tensor]]]
    taken: int


def build(name: str, folder, mixin: bool, weight: float = WEIGHT, **options):
    """The trainer of a case."""
    case, (trainer_class, arguments) = CASES[name], load(name)
    dataset = Dataset.from_dict({**case.columns, "task_type": TYPES})
    if not mixin:
        dataset = dataset.remove_columns("task_type")
    return (mixed(trainer_class) if mixin else trainer_class)(
        model=(case.model or causal)(weight),
        args=arguments(output_dir=str(folder), **{**OPTIONS, **case.options, **options}),
        train_dataset=dataset,
        eval_dataset=dataset,
        **case.given(folder),
    )


def run(name: str, folder, mixin: bool, weight: float = WEIGHT, **options) -> Steps:
    """Evaluate, then train for two steps."""
    with CASES[name].stub():
        trainer = build(name, folder, mixin, weight, **options)
        micro_batches = []
        compute_loss = trainer.compute_loss

        def counted(model, inputs, *args, **kwargs):
            if model.training:
                micro_batches.append([])
            return compute_loss(model, inputs, *args, **kwargs)

        def note(module, args, kwargs):
            if module.training and torch.is_grad_enabled() and micro_batches:
                names = inspect.signature(module.forward).parameters
                given = {**dict(zip(names, args)), **kwargs}
                kept = ("input_ids", "attention_mask", "labels")
                micro_batches[-1].append({key: given[key] for key in kept if given.get(key) is not None})

        trainer.compute_loss = counted
        base = trainer.model.get_base_model()
        getattr(base, "model", base).register_forward_pre_hook(note, with_kwargs=True)
        first = FirstGradient()
        trainer.add_callback(first)
        torch.manual_seed(3)
        random.seed(3)
        evaluated = trainer.evaluate()["eval_loss"] if CASES[name].evaluates else None
        torch.manual_seed(4)
        random.seed(4)
        trainer.train()
        return Steps(evaluated, first.gradient, micro_batches[:MICRO_BATCHES], trainer.state.global_step)


def types_of(call: dict[str, torch.Tensor]) -> torch.Tensor:
    """The task type of each row, as its first token says."""
    first = call["attention_mask"].argmax(1, keepdim=True)
    return call["input_ids"].gather(1, first).squeeze(1) - FIRST


def gradient_of_terms(name: str, micro_batches: list[list[dict[str, torch.Tensor]]]) -> dict[str, torch.Tensor]:
    """Of the mean of the micro-batches' weighted terms, in a loop of its own."""
    model = (CASES[name].model or causal)(WEIGHT).train()
    total = 0
    for calls in micro_batches:
        with collect_balance(model):
            for call in calls:
                model(**call, task_types=types_of(call))
        total = total + balance_loss(model) / len(micro_batches)
    names, values = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad))
    gradients = torch.autograd.grad(total, values, allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for n, p, g in zip(names, values, gradients)}


def outcome(name: str, folder, **options) -> str:
    """Train with the mixin, and check the gradient against the plain trainer's and the term's.

    Args:
        name: of the trainer.
        folder: for its files.
        options: further training arguments.

    Returns:
        "works", or "refused" with the mixin's sentence, as the table has it.
    """
    try:
        with warnings.catch_warnings(record=True) as caught:
            balanced = run(name, folder, True, **options)
    except ValueError as error:
        if "LoRAMoE" not in str(error):
            raise
        return f"refused: {error}"
    assert not [w for w in caught if "task_type" in str(w.message)]
    plain = run(name, folder, False, 0.0, **options)
    assert balanced.taken == plain.taken == 2
    assert balanced.evaluated == plain.evaluated
    assert len(balanced.micro_batches) == MICRO_BATCHES and all(balanced.micro_batches)
    assert all(len(set(types_of(call).tolist())) > 1 for calls in balanced.micro_batches for call in calls)
    expected = gradient_of_terms(name, balanced.micro_batches)
    assert max(g.abs().max() for n, g in expected.items() if "router" in n) > 1e-3
    for parameter, gradient in plain.gradient.items():
        torch.testing.assert_close(
            balanced.gradient[parameter], gradient + expected[parameter], atol=2e-6, rtol=1e-4, msg=parameter
        )
    note = CASES[name].note
    return f"works ({note})" if note else "works"
