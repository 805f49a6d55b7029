"""The methods that are compared, as a table, and what identifies a run."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any


FEED_FORWARD = ["gate_proj", "up_proj", "down_proj"]
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


@dataclass(frozen=True)
class Method:
    """A way of fine-tuning.

    Attributes:
        config: options of `LoRAMoEConfig` if it has `num_experts`, else of `LoraConfig`; empty for the base model.
        lr: learning rate.
        router_lr_multiplier: of the routers' learning rate.
        replay: samples of facts, as a share of the tasks' samples, mixed with them.
        replay_type: their task type; 1 is what they get where nothing is labelled.
        anchors: texts of the model's own, of type 0, as a share of the tasks' samples, in a forward pass of their own.
        anchor_balance: the balance term sees the anchors.
        anchor_lm_weight: weight of the anchors' language-modelling loss beside the tasks' mean loss.
        anchor_schedule: "every_step" for as many in each step, "shuffled" for a random number.
        term: "package", or a term of `terms.py`.
        normalised_router: the routers read x divided by its root mean square.
    """

    config: dict[str, Any] = field(default_factory=dict)
    lr: float = 1e-3
    router_lr_multiplier: float = 1.0
    replay: float = 0.0
    replay_type: int = 0
    anchors: float = 0.0
    anchor_balance: bool = False
    anchor_lm_weight: float = 0.0
    anchor_schedule: str = "every_step"
    term: str = "package"
    normalised_router: bool = False

    @property
    def is_mixture(self) -> bool:
        """Whether it trains LoRAMoE experts."""
        return "num_experts" in self.config

    def with_options(self, options: dict[str, Any]) -> Method:
        """The method with some attributes or options of its configuration replaced."""
        own = {name: value for name, value in options.items() if name in {f.name for f in fields(self)}}
        rest = {name: value for name, value in options.items() if name not in own}
        return replace(self, **{"config": {**self.config, **rest}, **own})


REPLAY, ANCHORS, ANCHOR_LM = 0.02, 0.10, 0.4
BALANCED = {"anchors": ANCHORS, "anchor_balance": True}
METHODS = {
    "base": Method(),
    "lora": Method(LORA),
    "lora+replay": Method(LORA, replay=REPLAY),
    "lora+anchors": Method(LORA, anchors=ANCHORS, anchor_lm_weight=ANCHOR_LM),
    "paper": Method(PAPER),
    "paper+replay": Method(PAPER, replay=REPLAY),
    "null+replay": Method(NULL, replay=REPLAY),
    "retain, balance only": Method(DETACHED, router_lr_multiplier=10, **BALANCED),
    "retain": Method(DETACHED, router_lr_multiplier=10, anchor_lm_weight=ANCHOR_LM, **BALANCED),
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
    def settings(self) -> Method:
        """The method with the run's options."""
        return METHODS[self.method].with_options(self.options)
