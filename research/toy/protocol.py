"""What is run: methods, seeds, sizes and grids of each variant of the study, and how learning rates are chosen.

docs/evidence.md says why. Nothing here computes anything but averages.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Any


FEED_FORWARD = ["gate_proj", "up_proj", "down_proj"]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]

# Group 0 is for knowledge, group 1 for the tasks. All mixtures on the feed-forward linears have 24 rank channels. LoRA
# has, at its rank, at least as many parameters as any of them with its routers, and the scale with which the mixtures
# start.
MIXTURE = {
    "r": 4,
    "lora_alpha": 32,
    "num_experts": 6,
    "balance_delta": 0.1,
    "balance_loss_weight": 0.1,
    "balance_detach": False,
    "router_lr_multiplier": 1.0,
    "task_type_names": ["knowledge", "tasks"],
    "target_modules": FEED_FORWARD,
}
NULL = {**MIXTURE, "lora_alpha": 64, "num_experts": 12, "null_groups": [0], "balance_delta": 0.7}
PRINTED = {"balance_target": "paper", "balance_importance": "sum"}


@dataclass(frozen=True)
class Method:
    """A way of fine-tuning.

    Attributes:
        kind: "full", "lora" or "loramoe".
        title: what it is called in tables.
        options: of LoraConfig or LoRAMoEConfig.
    """

    kind: str
    title: str
    options: dict[str, Any] = field(default_factory=dict)


METHODS = {
    "full": Method("full", "full fine-tuning"),
    "lora": Method("lora", "LoRA", {"r": 30, "lora_alpha": 40, "target_modules": FEED_FORWARD}),
    "lora-attention": Method(
        "lora", "LoRA, attention too", {"r": 17, "lora_alpha": 17 * 4 / 3, "target_modules": ATTENTION + FEED_FORWARD}
    ),
    "unbalanced": Method("loramoe", "LoRAMoE, no balancing", {**MIXTURE, "balance_loss_weight": 0.0}),
    "printed": Method("loramoe", "LoRAMoE as printed, delta 0.1", {**MIXTURE, **PRINTED}),
    "delta-0.1": Method("loramoe", "LoRAMoE, delta 0.1", MIXTURE),
    "delta-0.5": Method("loramoe", "LoRAMoE, delta 0.5", {**MIXTURE, "balance_delta": 0.5}),
    "detached": Method(
        "loramoe", "LoRAMoE, delta 0.5, detached", {**MIXTURE, "balance_delta": 0.5, "balance_detach": True}
    ),
    "null": Method("loramoe", "null experts, delta 0.7", NULL),
    "null-detached": Method("loramoe", "null experts, delta 0.7, detached", {**NULL, "balance_detach": True}),
    "null-single": Method("loramoe", "one null and one LoRA expert, delta 0.7", {**NULL, "r": 24, "num_experts": 2}),
    "null-attention": Method(
        "loramoe",
        "null experts, delta 0.7, attention too",
        {**NULL, "r": 2, "num_experts": 10, "lora_alpha": 80 / 3, "target_modules": ATTENTION + FEED_FORWARD},
    ),
}
BASELINE = "lora"
RECIPE = "null"  # what is recommended, and tested against the bar


@dataclass(frozen=True)
class Run:
    """One fine-tuning: a method with options of its own, on one seed's model and samples."""

    method: str
    seed: int
    samples: int
    learning_rate: float
    replay: float
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """What identifies it among the rows."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)


@dataclass(frozen=True)
class Variant:
    """One size of the study.

    Attributes:
        name: of the variant.
        about: what it is, a sentence or two for its report.
        cities: number of cities.
        relations: facts of each city.
        vocab_size: of the tokenizer.
        model: sizes of the Llama.
        pretrain_steps: batches of pretraining.
        pretrain_rows: rows of 64 tokens in each.
        pretrain_learning_rate: the highest.
        samples: sizes of the fine-tuning data, growing; learning rates are chosen at the last.
        ablation_samples: size of the data for grids, experts and replay.
        batch_size: samples of a step.
        scored_exercises: number of new exercises that are scored.
        learning_rates: candidates, by method or kind of method.
        validation_seeds: for choosing, and for grids.
        test_seeds: for what is reported.
        methods: names of those that take part.
        growth: names of those that are run on all sizes.
        replay_methods: names of those that are run with all replay shares.
        replay_shares: of the samples that are questions about known facts.
        grid: method -> pairs of balance_delta and balance_loss_weight to try.
        experts: options to try in place of those of "null".
        changed: options of methods that differ in this variant.
    """

    name: str
    about: str
    cities: int
    relations: int
    vocab_size: int
    model: dict[str, int]
    pretrain_steps: int
    pretrain_rows: int
    pretrain_learning_rate: float
    samples: list[int]
    ablation_samples: int
    batch_size: int
    scored_exercises: int
    learning_rates: dict[str, list[float]]
    validation_seeds: list[int]
    test_seeds: list[int]
    methods: list[str] = field(default_factory=lambda: list(METHODS))
    growth: list[str] = field(default_factory=lambda: ["full", "lora", "unbalanced", "null"])
    replay_methods: list[str] = field(default_factory=lambda: ["lora", "unbalanced", "null"])
    replay_shares: list[float] = field(default_factory=lambda: [0.0, 0.02, 0.1, 0.3])
    grid: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    experts: list[dict[str, Any]] = field(default_factory=list)
    changed: dict[str, dict[str, Any]] = field(default_factory=dict)

    def candidates(self, method: str) -> list[float]:
        """The learning rates to choose from."""
        return self.learning_rates.get(method) or self.learning_rates[METHODS[method].kind]

    def options(self, run: Run) -> dict[str, Any]:
        """The options of a run's method, with those of the variant and of the run in place of the method's."""
        return {**METHODS[run.method].options, **self.changed.get(run.method, {}), **run.options}

    @property
    def seeds(self) -> list[int]:
        """All of them."""
        return self.validation_seeds + self.test_seeds


REPLAY = 0.02  # share of replayed questions wherever it is not what is varied
REPLAYED_CITIES = 0.3  # share of the cities whose facts may be replayed; those of the others are scored
GRID = {
    "delta-0.1": list(product([0.1, 0.5, 0.9], [0.03, 0.3])),
    "null": [*product([0.3, 0.5, 0.7, 0.9], [0.03, 0.3]), (0.7, 0.0)],
}
EXPERTS = [  # lora_alpha / (r * num_experts), the scale of an expert at the start, is the same for all
    {"num_experts": 4, "r": 12},
    {"num_experts": 24, "r": 2},
    {"num_experts": 7, "expert_groups": [1, 6], "lora_alpha": 64 * 7 / 12},
    {"r": 2, "lora_alpha": 32},
    {"r": 8, "lora_alpha": 128},
]

VARIANTS = {
    variant.name: variant
    for variant in (
        Variant(
            name="miniature",
            about="Sizes with which the program is tested; the scores mean nothing.",
            cities=4,
            relations=2,
            vocab_size=320,
            model={"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1},
            pretrain_steps=2,
            pretrain_rows=4,
            pretrain_learning_rate=3e-3,
            samples=[8, 16],
            ablation_samples=8,
            batch_size=8,
            scored_exercises=8,
            learning_rates={"full": [1e-3], "lora": [1e-3, 2e-3], "loramoe": [1e-3]},
            validation_seeds=[0],
            test_seeds=[1, 2],
            methods=["full", "lora", "unbalanced", "null"],
            growth=["lora", "null"],
            replay_methods=["lora"],
            replay_shares=[0.0, 0.02],
            grid={"null": [(0.7, 0.1), (0.7, 0.3)]},
            experts=[{"r": 2, "lora_alpha": 32}],
        ),
        Variant(
            name="toy",
            about="A Llama of four blocks with 96 channels and 600 facts.",
            cities=150,
            relations=4,
            vocab_size=1280,
            model={"hidden_size": 96, "intermediate_size": 256},
            pretrain_steps=350,
            pretrain_rows=32,
            pretrain_learning_rate=3e-3,
            samples=[2048, 4096, 8192],
            ablation_samples=4096,
            batch_size=64,
            scored_exercises=400,
            learning_rates={
                "full": [1.25e-4, 2.5e-4, 5e-4, 1e-3],
                "lora": [2e-3, 4e-3, 8e-3],
                "loramoe": [2e-3, 4e-3, 8e-3],
                "lora-attention": [1e-3, 2e-3, 4e-3],
                "null-attention": [1e-3, 2e-3, 4e-3],
            },
            validation_seeds=[100, 101],
            test_seeds=[300, 301, 302, 303, 304],
            grid=GRID,
            experts=EXPERTS,
        ),
        Variant(
            name="moe",
            about='A sparse model, a Qwen3-MoE of four blocks with eight routed experts, two for each token. "LoRA" is '
            "PEFT's of the routed experts (`target_parameters`); the mixtures are beside the sparse blocks.",
            cities=150,
            relations=4,
            vocab_size=1280,
            model={
                "hidden_size": 96,
                "head_dim": 24,
                "moe_intermediate_size": 64,
                "num_experts": 8,
                "num_experts_per_tok": 2,
            },
            pretrain_steps=350,
            pretrain_rows=32,
            pretrain_learning_rate=3e-3,
            samples=[8192],
            ablation_samples=8192,
            batch_size=64,
            scored_exercises=400,
            learning_rates={"lora": [1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2], "loramoe": [5e-4, 1e-3, 2e-3, 4e-3, 8e-3]},
            validation_seeds=[100],
            test_seeds=[300, 301, 302, 303],
            methods=["lora", "null"],
            growth=[],
            replay_methods=[],
            changed={
                "lora": {
                    "r": 4,
                    "lora_alpha": 16 / 3,
                    "target_modules": [],
                    "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
                },
                "null": {"r": 9, "lora_alpha": 144, "target_modules": None},
            },
        ),
        Variant(
            name="large",
            about="A Llama for one GPU.",
            cities=5000,
            relations=5,
            vocab_size=16384,
            model={"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12},
            pretrain_steps=20000,
            pretrain_rows=256,
            pretrain_learning_rate=6e-4,
            samples=[65536, 262144, 1048576],
            ablation_samples=65536,
            batch_size=256,
            scored_exercises=4000,
            learning_rates={"full": [1e-5, 3e-5, 1e-4], "lora": [2e-4, 5e-4, 1e-3], "loramoe": [2e-4, 5e-4, 1e-3]},
            validation_seeds=[100],
            test_seeds=[200, 201, 202],
            grid=GRID,
            experts=EXPERTS,
        ),
    )
}


# --- what is run


def selection_runs(variant: Variant) -> list[Run]:
    """Every method with every learning rate on the validation seeds, with the most samples."""
    return [
        Run(method, seed, variant.samples[-1], learning_rate, REPLAY)
        for method in variant.methods
        for learning_rate in variant.candidates(method)
        for seed in variant.validation_seeds
    ]


def test_runs(variant: Variant, chosen: Mapping[str, float]) -> list[Run]:
    """Every method with its learning rate on the test seeds, some of them with fewer samples too."""
    return [
        Run(method, seed, samples, chosen[method], REPLAY)
        for samples in reversed(variant.samples)
        for method in (variant.methods if samples == variant.samples[-1] else variant.growth)
        for seed in variant.test_seeds
    ]


def ablation_runs(variant: Variant, chosen: Mapping[str, float]) -> list[Run]:
    """Grids, experts and replay shares on the validation seeds."""

    def runs(method: str, replay: float = REPLAY, **options: Any) -> list[Run]:
        base = METHODS[method].options
        changed = {name: value for name, value in options.items() if base.get(name) != value}
        return [
            Run(method, seed, variant.ablation_samples, chosen[method], replay, changed)
            for seed in variant.validation_seeds
        ]

    found = [
        run
        for method, pairs in variant.grid.items()
        for delta, weight in pairs
        for run in runs(method, balance_delta=delta, balance_loss_weight=weight)
    ]
    found += [run for options in variant.experts for run in runs("null", **options)]
    found += [
        run for method in variant.replay_methods for share in variant.replay_shares for run in runs(method, share)
    ]
    return list({run.key: run for run in found}.values())


def choose_learning_rates(variant: Variant, rows: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """The learning rate of each method, from means over the validation seeds; the lower one in a tie.

    The baseline gets the best `overall_score`. Every other method gets, among the rates that solve at least as many
    exercises as the baseline then does, the one that keeps the most knowledge, so that all are compared at what the
    baseline learns; where no rate solves as many, the one that solves the most.
    """
    by_key = {row["key"]: row for row in rows}
    scores: dict[str, dict[float, list[Mapping[str, float]]]] = {method: {} for method in variant.methods}
    for run in sorted(selection_runs(variant), key=lambda run: run.learning_rate):
        scores[run.method].setdefault(run.learning_rate, []).append(by_key[run.key]["scores"])

    def mean(method: str, rate: float, measure: Callable[[Mapping[str, float]], float]) -> float:
        return sum(map(measure, scores[method][rate])) / len(scores[method][rate])

    chosen = {BASELINE: max(scores[BASELINE], key=lambda rate: mean(BASELINE, rate, overall_score))}
    wanted = mean(BASELINE, chosen[BASELINE], tasks_solved)
    for method in variant.methods:
        if method != BASELINE:
            enough = [rate for rate in scores[method] if mean(method, rate, tasks_solved) >= wanted]
            measure = knowledge_kept if enough else tasks_solved
            chosen[method] = max(enough or scores[method], key=lambda rate: mean(method, rate, measure))
    return chosen


def knowledge_kept(scores: Mapping[str, float]) -> float:
    """Mean of questions and statements, in percent."""
    return (scores["questions"] + scores["statements"]) / 2


def tasks_solved(scores: Mapping[str, float]) -> float:
    """New exercises that are solved, in percent."""
    return scores["tasks"]


def overall_score(scores: Mapping[str, float]) -> float:
    """Half what is known, half what was learned, in percent."""
    return (knowledge_kept(scores) + tasks_solved(scores)) / 2
