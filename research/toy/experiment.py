"""One run: a pretrained model is fine-tuned with one method, and what it knew and what it learned is scored."""

from __future__ import annotations

import functools
import json
import random
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)

from peft_loramoe import LoRAMoEConfig
from peft_loramoe.analysis import group_weights, router_statistics, score_answers
from peft_loramoe.training import LoRAMoETrainerMixin

from .language_model import build_model, pretrain, train_tokenizer
from .protocol import METHODS, REPLAYED_CITIES, Run, Variant
from .world import DOWNSTREAM, KNOWLEDGE, Sample, build_facts, draw_skill, draw_task


class LoRAMoETrainer(LoRAMoETrainerMixin, Trainer):
    """Trainer with task types and the balance term; with a model without LoRAMoE layers, the plain Trainer."""


facts_of = functools.cache(build_facts)  # read once in a process


class World:
    """The facts of a variant, and which of them each seed replays in fine-tuning."""

    def __init__(self, variant: Variant) -> None:
        self.variant = variant
        self.facts = facts_of(variant.cities, variant.relations)

    def split(self, seed: int) -> tuple[list[int], list[int]]:
        """Indices of the facts that may be replayed, and of those that are scored: no city has facts among both."""
        cities = list(range(len(self.facts.cities)))
        random.Random(f"split {seed}").shuffle(cities)
        replayed = set(cities[: round(REPLAYED_CITIES * len(cities))])
        parts: tuple[list[int], list[int]] = ([], [])
        for fact, city in enumerate(self.facts.city_of):
            parts[city not in replayed].append(fact)
        return parts

    def training_samples(self, run: Run) -> list[Sample]:
        """The run's samples, the same for all methods; Trainer shuffles them by the run's seed."""
        generator = random.Random(f"training {run.seed}")
        questions = [self.facts.questions[i] for i in self.split(run.seed)[0]]
        replayed = round(run.replay * run.samples)
        samples = [draw_task(self.facts.cities, generator, scored=False) for _ in range(run.samples - replayed)]
        generator.shuffle(questions)
        samples += [questions[i % len(questions)] for i in range(replayed)]
        generator.shuffle(samples)
        return samples

    def scored_samples(self, seed: int) -> dict[str, list[Sample]]:
        """What is scored: questions and statements of facts that fine-tuning never shows, and exercises."""
        scored = self.split(seed)[1]
        generator = random.Random(f"scored {seed}")
        generator.shuffle(scored)  # so that any part of them has facts of all relations
        return {
            "questions": [self.facts.questions[i] for i in scored],
            "statements": [statement for i in scored for statement in self.facts.statements[i]],
            "tasks": [
                draw_task(self.facts.cities, generator, scored=True) for _ in range(self.variant.scored_exercises)
            ],
        }


def pretrain_model(variant: Variant, seed: int, folder: Path) -> dict[str, Any]:
    """Train tokenizer and model of a seed on the facts and the skills, save them to `folder`, and score them."""
    started = time.perf_counter()
    world, generator = World(variant), random.Random(f"pretraining {seed}")
    set_seed(seed)
    facts = world.facts
    texts = [question.text for question in facts.questions]
    texts += [statement.text for forms in facts.statements for statement in forms]
    exercises = [draw_task(facts.cities, generator, scored=False).text for _ in range(100)]
    skills = [draw_skill(facts.cities, generator) for _ in range(500)]
    tokenizer = train_tokenizer(texts + skills + exercises, variant.vocab_size)
    model = build_model(tokenizer, **variant.model).to(device())
    pretrain(
        model,
        tokenizer,
        texts,
        lambda generator: draw_skill(facts.cities, generator),
        variant.pretrain_steps,
        generator,
        learning_rate=variant.pretrain_learning_rate,
        rows=variant.pretrain_rows,
        skills_per_text=1.0,
        progress=False,
    )
    scores = score(model, tokenizer, world.scored_samples(seed))
    shutil.rmtree(folder, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as partial:  # never half a model
        model.save_pretrained(Path(partial, "model"))
        tokenizer.save_pretrained(Path(partial, "model"))
        Path(partial, "model").rename(folder)
    return {"scores": scores, "seconds": {"all": round(time.perf_counter() - started, 1)}}


def run_experiment(variant: Variant, run: Run, pretrained: Path, output: Path | None = None) -> dict[str, Any]:
    """Fine-tune and score; with `output`, save the adapter there.

    Returns:
        `scores` as `score` returns them; `trainable`, the number of parameters; for mixtures, `router`, see `routing`;
        `seconds` of training and of everything.
    """
    started = time.perf_counter()
    world = World(variant)
    set_seed(run.seed)
    tokenizer = AutoTokenizer.from_pretrained(pretrained)
    model = build_adapted_model(METHODS[run.method].kind, variant.options(run), pretrained)
    train(model, tokenizer, world.training_samples(run), variant, run)
    trained = time.perf_counter()
    scored = world.scored_samples(run.seed)
    result = {
        "scores": score(model, tokenizer, scored),
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }
    if METHODS[run.method].kind == "loramoe":
        result["router"] = routing(model, tokenizer, scored)
    if output is not None:
        model.save_pretrained(output)
    seconds = {"training": round(trained - started, 1), "all": round(time.perf_counter() - started, 1)}
    return {**result, "seconds": seconds}


def write_texts(variant: Variant, seed: int, pretrained: Path, folder: Path, size: int = 200) -> None:
    """What is scored for a seed, as files for `peft-loramoe analyze` (texts.jsonl) and `evaluate`.

    (questions.jsonl).
    """
    scored, tokenizer = World(variant).scored_samples(seed), AutoTokenizer.from_pretrained(pretrained)
    types, bos = {"questions": KNOWLEDGE, "statements": -1, "tasks": DOWNSTREAM}, tokenizer.bos_token
    texts = [
        {"text": bos + s.text, "task_type": types[kind]} for kind, samples in scored.items() for s in samples[:size]
    ]
    questions = []
    for sample in scored["questions"]:
        decoded = tokenizer.decode(tokenizer(sample.answer, add_special_tokens=False).input_ids)  # 86 becomes "8 6"
        questions.append({"question": bos + sample.prompt, "answer": list(dict.fromkeys([sample.answer, decoded]))})
    for name, records in (("texts", texts), ("questions", questions)):
        lines = "".join(f"{json.dumps(record)}\n" for record in records)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")


def build_adapted_model(kind: str, options: dict[str, Any], pretrained: Path) -> PreTrainedModel | PeftModel:
    """The pretrained model with the method's adapter; for full fine-tuning, as it is."""
    model = AutoModelForCausalLM.from_pretrained(pretrained, dtype=torch.float32).to(device())
    if kind == "full":
        return model
    config_class = {"lora": LoraConfig, "loramoe": LoRAMoEConfig}[kind]
    return get_peft_model(model, config_class(task_type="CAUSAL_LM", **options))


def train(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, samples: list[Sample], variant: Variant, run: Run
) -> None:
    """One epoch over the samples; the loss is that of the answers."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            per_device_train_batch_size=variant.batch_size,
            learning_rate=run.learning_rate,
            lr_scheduler_type="linear",
            warmup_steps=max(1, run.samples // variant.batch_size // 20),
            num_train_epochs=1,
            weight_decay=0.0,
            max_grad_norm=1.0,
            bf16=device() == "cuda",
            use_cpu=device() == "cpu",  # the Trainer would take an MPS device
            seed=run.seed,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = LoRAMoETrainer(
            model,
            arguments,
            data_collator=DataCollatorForSeq2Seq(tokenizer),
            train_dataset=[_encode(sample, tokenizer) for sample in samples],
        )
        if arguments.n_gpu > 1:
            raise ValueError(
                f"{arguments.n_gpu} GPUs are visible, and Trainer would use them all; set CUDA_VISIBLE_DEVICES=0."
            )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)  # scored in float32, as before the training


def _encode(sample: Sample, tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    prompt = tokenizer(sample.prompt, add_special_tokens=False).input_ids
    answer = [*tokenizer(sample.answer, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    ids = [tokenizer.bos_token_id, *prompt, *answer]
    return {"input_ids": ids, "labels": [-100] * (len(prompt) + 1) + answer, "task_type": sample.task_type}


def score(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, scored: dict[str, list[Sample]]
) -> dict[str, float | dict[str, float]]:
    """Percent of answers that greedy decoding gives token for token, by kind of sample and by task."""
    correct = {}
    for kind, samples in scored.items():
        prompts = [tokenizer.bos_token + sample.prompt for sample in samples]
        scores = score_answers(model, tokenizer, prompts, [sample.answer for sample in samples], batch_size=256)
        correct[kind] = [answer.correct for answer in scores]
    by_task: dict[str, list[bool]] = {}
    for sample, solved in zip(scored["tasks"], correct["tasks"]):
        by_task.setdefault(sample.task, []).append(solved)
    percent = {kind: _percent(values) for kind, values in correct.items()}
    return {**percent, "by_task": {task: _percent(by_task[task]) for task in sorted(by_task)}}


def _percent(values: list[bool]) -> float:
    return round(100 * sum(values) / len(values), 2)


def routing(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, scored: dict[str, list[Sample]], size: int = 256
) -> dict[str, dict[str, Any]]:
    """Router weight of each expert group, averaged over the linears and by linear, for each kind of sample."""
    collate = DataCollatorForSeq2Seq(tokenizer)
    weights = {}
    for kind, samples in scored.items():
        batch = dict(collate([_encode(sample, tokenizer) for sample in samples[:size]]))
        types = batch.pop("task_type").tolist()
        statistics = router_statistics(model, [{**batch, "task_types": types}])
        layers: dict[str, list[dict[str, Any]]] = {}
        for record in group_weights(statistics.experts, per_layer=True):
            layers.setdefault(record["layer"], []).append(record)
        weights[kind] = {
            "groups": _rounded(group_weights(statistics.experts)),
            "layers": {layer: _rounded(records) for layer, records in layers.items()},
        }
    return weights


def _rounded(records: list[dict[str, Any]]) -> list[float]:
    return [round(record["weight"], 3) for record in sorted(records, key=lambda record: record["group"])]


def device() -> str:
    """Where everything runs."""
    return "cuda" if torch.cuda.is_available() else "cpu"
