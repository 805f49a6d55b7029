"""The methods that are compared, as a table, and what identifies a run."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from peft.tuners.lora.config import CordaConfig


FEED_FORWARD = ["gate_proj", "up_proj", "down_proj"]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
SHARED = {"target_modules": FEED_FORWARD, "task_type": "CAUSAL_LM"}
# LoRA has no fewer parameters than the others, and the same scale at the start: the gates of six of twelve experts sum
# to 1/2.
LORA = {"r": 30, "lora_alpha": 40, **SHARED}
PAPER = {
    "r": 4, "lora_alpha": 32, "num_experts": 6, "balance_target": "paper", "balance_importance": "sum", "balance_delta": 0.1,
    "balance_loss_weight": 0.1, "balance_detach": False, **SHARED,
}  # fmt: skip
NULL = {
    "r": 4, "lora_alpha": 64, "num_experts": 12, "null_groups": [0], "balance_delta": 0.7, "balance_loss_weight": 0.1,
    "balance_detach": False, **SHARED,
}  # fmt: skip
DETACHED = {**NULL, "balance_detach": True}
CORDA = {**LORA, "init_lora_weights": "corda", "corda_config": CordaConfig(corda_method="kpm")}
MICA = {**LORA, "init_lora_weights": "mica"}
OSF = {"effective_rank": 0.5, **SHARED}


@dataclass(frozen=True)
class Method:
    """A way of fine-tuning.

    Attributes:
        tuner: "lora", "loramoe", "osf", or "full" for full fine-tuning; None for the base model as it is.
        config: options of the tuner's PEFT configuration.
        lr: learning rate.
        router_lr_multiplier: of the routers' learning rate.
        replay: samples of facts, as a share of the tasks' samples, mixed with them.
        replay_type: their task type; 1 is what they get where nothing is labelled.
        anchors: texts of the model's own, of type 0, as a share of the tasks' samples, in a forward pass of their own.
        anchor_file: JSONL file with a "text" in each line, from which anchors are taken; None for the study's own.
        anchor_balance: the balance term sees the anchors.
        anchor_lm_weight: weight of the anchors' language-modelling loss beside the tasks' mean loss.
        anchor_kl_weight: weight of the mean divergence KL(base model || model) over the anchors' tokens, in nats.
        anchor_schedule: "every_step" for as many in each step, "shuffled" for a random number.
        term: "package", or a term of `terms.py`.
        normalised_router: the routers read x divided by its root mean square.
        load_in_4bit: the base model is quantised to 4 bits (NF4, computing in float32).
        scale: factor of what was trained, applied before scoring: of the adapter, or of the change of all weights.
    """

    tuner: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    lr: float = 1e-3
    router_lr_multiplier: float = 1.0
    replay: float = 0.0
    replay_type: int = 0
    anchors: float = 0.0
    anchor_file: str | None = None
    anchor_balance: bool = False
    anchor_lm_weight: float = 0.0
    anchor_kl_weight: float = 0.0
    anchor_schedule: str = "every_step"
    term: str = "package"
    normalised_router: bool = False
    load_in_4bit: bool = False
    scale: float = 1.0

    @property
    def is_mixture(self) -> bool:
        """Whether it trains LoRAMoE experts."""
        return self.tuner == "loramoe"

    @property
    def changes_base(self) -> bool:
        """Whether weights of the base model change: in training, or, by CorDA, when the adapter is initialised."""
        return self.tuner == "full" or "corda_config" in self.config

    def with_options(self, options: dict[str, Any]) -> Method:
        """The method with some attributes or options of its configuration replaced."""
        own = {name: value for name, value in options.items() if name in {f.name for f in fields(self)}}
        rest = {name: value for name, value in options.items() if name not in own}
        return replace(self, **{"config": {**self.config, **rest}, **own})


REPLAY, ANCHORS, ANCHOR_LM = 0.02, 0.10, 0.4
BALANCED = {"anchors": ANCHORS, "anchor_balance": True}
METHODS = {
    "base": Method(),
    "lora": Method("lora", LORA),
    "lora, all linears": Method(
        "lora", {**LORA, "r": 16, "lora_alpha": 64 / 3, "target_modules": FEED_FORWARD + ATTENTION}
    ),
    "lora+replay": Method("lora", LORA, replay=REPLAY),
    "lora+anchors": Method("lora", LORA, anchors=ANCHORS, anchor_lm_weight=ANCHOR_LM),
    "lora+kl": Method("lora", LORA, anchors=ANCHORS, anchor_kl_weight=1.0),
    "corda": Method("lora", CORDA),
    "corda+kl": Method("lora", CORDA, anchors=ANCHORS, anchor_kl_weight=1.0),
    "mica": Method("lora", MICA),
    "mica+kl": Method("lora", MICA, anchors=ANCHORS, anchor_kl_weight=1.0),
    "osf": Method("osf", OSF, lr=1e-4),
    "osf+kl": Method("osf", OSF, lr=1e-4, anchors=ANCHORS, anchor_kl_weight=1.0),
    "full": Method("full", lr=1e-4),
    "full+kl": Method("full", lr=1e-4, anchors=ANCHORS, anchor_kl_weight=1.0),
    "paper": Method("loramoe", PAPER),
    "paper+replay": Method("loramoe", PAPER, replay=REPLAY),
    "null+replay": Method("loramoe", NULL, replay=REPLAY),
    "retain, balance only": Method("loramoe", DETACHED, router_lr_multiplier=10, **BALANCED),
    "retain": Method("loramoe", DETACHED, router_lr_multiplier=10, anchor_lm_weight=ANCHOR_LM, **BALANCED),
    "retain, kl": Method("loramoe", DETACHED, router_lr_multiplier=10, anchor_kl_weight=1.0, **BALANCED),
}


@dataclass(frozen=True)
class Run:
    """One fine-tuning.

    Attributes:
        method: a name in `METHODS`.
        seed: of the training samples, their order and the adapter's initialisation.
        samples: of the tasks.
        batch: samples of the tasks in a step.
        part: the share of the items that is scored.
        options: attributes of the method, or options of its configuration, that are replaced.
    """

    method: str
    seed: int
    samples: int = 1280
    batch: int = 20
    part: float = 1.0
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """What tells a row from others."""
        return json.dumps(asdict(self), sort_keys=True)

    @property
    def name(self) -> str:
        """A name for a folder: method, seed and replaced options, such as "retain-kl-121-anchor_kl_weight-0.3"."""
        parts = [self.method, self.seed, *(f"{option}-{value}" for option, value in self.options.items())]
        return re.sub(r"[^\w.+]+", "-", "-".join(map(str, parts))).strip("-")

    def at_scale(self, scale: float) -> Run:
        """The run whose result is scaled by `scale` after training."""
        return self if scale == 1 else replace(self, options={**self.options, "scale": scale})

    @property
    def settings(self) -> Method:
        """The method with the run's options."""
        return METHODS[self.method].with_options(self.options)


# The methods that matter, at the recommended weight of the divergence.
MAIN = {"lora": {}, "lora+kl": {"anchor_kl_weight": 0.3}, "retain, kl": {"anchor_kl_weight": 0.3}}


def on_many_samples(samples: int, *seeds: int) -> list[Run]:
    """The main methods on many samples, with anchors of their own."""
    anchors = {"anchor_file": "build/retention/anchors.jsonl"}
    return [
        Run(method, seed, samples, 100, options={**own, **anchors}) for seed in seeds for method, own in MAIN.items()
    ]


# What the command `variant` runs, in this order.
VARIANTS: dict[str, list[Run]] = {
    "cpu": [
        Run("base", 121),
        *(Run(name, seed, options=own) for seed in range(121, 126) for name, own in MAIN.items()),
    ],
    "gpu": [
        Run("base", 131),
        *on_many_samples(50_000, 131, 132, 133),
        *on_many_samples(10_000, 131, 132, 133, 134, 135),
        *on_many_samples(50_000, 134, 135),
    ],
}
