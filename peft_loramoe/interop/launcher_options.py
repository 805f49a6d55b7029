"""What the plugins for launchers read from a configuration file: a preset, options of LoRAMoEConfig, and anchors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..config import LoRAMoEConfig
from ..fields import PRESETS


ADAPTER = "loramoe"  # the name in the launchers' files
ANCHORS = ("anchors", "anchor_loss_weight", "anchor_kl_weight", "anchors_per_batch", "anchors_every")


@dataclass(frozen=True)
class LauncherOptions:
    """A section of a launcher's file.

    Attributes:
        config: of the adapter.
        anchors: arguments of `LoRAMoETrainerMixin`.
    """

    config: LoRAMoEConfig
    anchors: dict[str, Any]

    @classmethod
    def read(cls, section: Mapping[str, Any]) -> LauncherOptions:
        """Read a section.

        Args:
            section: `preset` ("retain", "paper" or "plain"; default "retain"), the anchor options of
                `LoRAMoETrainerMixin`, and any options of `LoRAMoEConfig`.

        Raises:
            TypeError: there is no such option, or one has a value of the wrong type.
            ValueError: an option has a value out of its range.

        Example:
            >>> options = LauncherOptions.read({"r": 8, "anchors": "anchors.jsonl"})
            >>> options.config.r, options.config.null_groups, options.anchors
            (8, [0], {'anchors': 'anchors.jsonl'})
        """
        options = dict(section)
        preset = options.pop("preset", "retain")
        if preset not in (*PRESETS, "plain"):
            raise ValueError(f"preset={preset!r} is not one of {', '.join(PRESETS)}, plain.")
        anchors = {name: options.pop(name) for name in ANCHORS if name in options}
        make = getattr(LoRAMoEConfig, preset) if preset in PRESETS else LoRAMoEConfig
        return cls(make(**{"task_type": "CAUSAL_LM", **options}), anchors)
