"""`adapter: loramoe` in axolotl's YAML: name `peft_loramoe.interop.axolotl.LoRAMoEPlugin` under `plugins:`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from axolotl.integrations.base import AdapterCapabilities, BasePlugin
from peft import PeftConfig, PeftModel, get_peft_model
from pydantic import BaseModel, Field
from transformers import PreTrainedModel, Trainer

from ..training import LoRAMoETrainerMixin
from .launcher_options import ADAPTER, LauncherOptions


# Keys of axolotl that have no effect with this adapter, and what to do instead.
REFUSED = {
    "load_in_4bit": "axolotl quantises for its own adapters only; `peft-loramoe train --load-in-4bit` does it",
    "load_in_8bit": "axolotl quantises for its own adapters only",
    "rl": "axolotl's trainers for preferences and rewards take no trainer class from plugins",
    "reward_model": "the plugin trains causal language models",
    "process_reward_model": "the plugin trains causal language models",
    "trainer_cls": "the plugin brings the trainer",
    "merge_lora": "the router decides for every token, so the adapter cannot be merged",
    "relora": "the adapter cannot be merged, which ReLoRA does",
}


class LoRAMoEArgs(BaseModel):
    """The section that the plugin adds to axolotl's YAML."""

    loramoe: dict[str, Any] = Field(
        default_factory=dict,
        description="preset (retain, paper or plain), options of LoRAMoEConfig, anchors and their options",
    )


class LoRAMoEPlugin(BasePlugin):
    """The plugin that axolotl loads.

    Training has the balance term, the routers' own learning rate, and the anchors of the section `loramoe`.
    """

    def register(self, cfg: dict[str, Any]) -> None:
        """Check the file before anything is loaded.

        Raises:
            ValueError: a key has no effect with this adapter, an option is out of its range, or the adapter of
                `lora_model_dir` is no LoRAMoE adapter or has another value of an option in the section.
            TypeError: an option is unknown or of the wrong type.
        """
        if cfg.get("adapter") != ADAPTER:
            return
        for key, reason in REFUSED.items():
            if cfg.get(key):
                raise ValueError(f"{key}: {cfg[key]} does not work with adapter: {ADAPTER}: {reason}.")
        for key, value in cfg.items():
            if key.startswith(("lora_", "peft_")) and key != "lora_model_dir" and value is not None:
                raise ValueError(
                    f"{key}: {value} has no effect with adapter: {ADAPTER}; write the option of LoRAMoEConfig under "
                    f"`{ADAPTER}:`."
                )
        options = _options(cfg)
        if folder := cfg.get("lora_model_dir"):
            options.check_saved(folder)

    def get_input_args(self) -> str:
        """The class of the section that the plugin adds."""
        return f"{__name__}.{LoRAMoEArgs.__name__}"

    def get_adapter_capabilities(self) -> list[AdapterCapabilities]:
        """The adapter's name."""
        return [AdapterCapabilities(name=ADAPTER)]

    def load_adapter(
        self, model: PreTrainedModel, cfg: Mapping[str, Any], inference: bool = False, config_only: bool = False
    ) -> tuple[PeftModel | None, PeftConfig] | None:
        """Attach a new adapter, or load that of `lora_model_dir`."""
        if cfg.get("adapter") != ADAPTER:
            return None
        folder, config = cfg.get("lora_model_dir"), _options(cfg).config
        if config_only:
            return None, PeftConfig.from_pretrained(folder) if folder else config
        if folder:
            adapted = PeftModel.from_pretrained(model, folder, is_trainable=not inference)
        else:
            adapted = get_peft_model(model, config)
        adapted.print_trainable_parameters()
        return adapted, adapted.active_peft_config

    def get_trainer_cls(self, cfg: Mapping[str, Any]) -> type[Trainer] | None:
        """Axolotl's trainer with the balance term and the anchors."""
        if cfg.get("adapter") != ADAPTER:
            return None
        from axolotl.core.trainers import AxolotlTrainer

        anchors = _options(cfg).anchors

        class LoRAMoEAxolotlTrainer(LoRAMoETrainerMixin, AxolotlTrainer):
            def __init__(self, *args: Any, **kwargs: Any) -> None:
                super().__init__(*args, **anchors, **kwargs)

        return LoRAMoEAxolotlTrainer


def _options(cfg: Mapping[str, Any]) -> LauncherOptions:
    section = cfg.get(ADAPTER)
    section = section.to_dict() if hasattr(section, "to_dict") else dict(section or {})
    return LauncherOptions.read(section)
