"""What the plugins for launchers read from a configuration file: a preset, options of LoRAMoEConfig, and anchors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from peft import PeftConfig, PeftType

from ..config import LoRAMoEConfig
from ..fields import PRESETS
from ..options import shown
from ..training.anchor_pass import ANCHOR_OPTIONS, check_anchor_options


ADAPTER = "loramoe"  # the name in the launchers' files
ANCHORS = ("anchors", *ANCHOR_OPTIONS)


@dataclass(frozen=True)
class LauncherOptions:
    """A section of a launcher's file.

    Attributes:
        config: of a new adapter.
        anchors: arguments of `LoRAMoETrainerMixin`.
        given: the options of `config` that the section determines, itself or by its `preset`.
    """

    config: LoRAMoEConfig
    anchors: dict[str, Any]
    given: tuple[str, ...]

    @classmethod
    def read(cls, section: Mapping[str, Any]) -> LauncherOptions:
        """Read a section.

        Args:
            section: `preset` ("retain", "paper" or "plain"; default "retain"), the anchor options of
                `LoRAMoETrainerMixin`, and any options of `LoRAMoEConfig`.

        Raises:
            TypeError: there is no such option, or one has a value of the wrong type.
            ValueError: an option has a value out of its range, or has no effect.

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
        check_anchor_options(
            anchors.get("anchors") is not None,
            **{name: value for name, value in anchors.items() if name != "anchors"},
        )
        make = getattr(LoRAMoEConfig, preset) if preset in PRESETS else LoRAMoEConfig
        of_preset = PRESETS.get(preset, {}) if "preset" in section else {}
        return cls(make(**{"task_type": "CAUSAL_LM", **options}), anchors, (*of_preset, *options))

    def check_saved(self, source: str) -> None:
        """Refuse options that training of a saved adapter would ignore, since its own configuration counts.

        Args:
            source: the adapter's folder or Hub id.

        Raises:
            ValueError: it is no LoRAMoE adapter, or was trained with another value of an option that is given.
        """
        saved = PeftConfig.from_pretrained(source)
        if not isinstance(saved, LoRAMoEConfig):
            peft_type = PeftType(saved.peft_type).value
            raise ValueError(f"'{source}' has peft_type={peft_type!r}; give the folder of a LoRAMoE adapter.")
        for name in self.given:
            value, of_saved = getattr(self.config, name), getattr(saved, name)
            # PEFT saves the names of the linears instead.
            if value != of_saved and (name, value) != ("target_modules", "all-linear"):
                raise ValueError(
                    f"{name}={shown(value)} has no effect, since the adapter in '{source}' has {name}="
                    f"{shown(of_saved)} and keeps it: leave {name} out, or train a new adapter."
                )
