"""`--tuner_type loramoe` in ms-swift: call `register` in a file of your own and name it with `--external_plugins`."""

from __future__ import annotations

from typing import Any

from peft import PeftModel, get_peft_model
from swift.trainers import Seq2SeqTrainer, TrainerFactory
from swift.tuner_plugin import PeftTuner, tuners_map
from torch import nn

from ..balance.results import find_recorder
from ..training import LoRAMoETrainerMixin
from .launcher_options import ADAPTER, LauncherOptions


TRAINER = "LoRAMoESeq2SeqTrainer"  # an attribute of this module, since ms-swift finds trainers by their import path


def register(**options: Any) -> None:
    """Add the tuner type `loramoe` to ms-swift, and have its trainer for causal language models train it.

    For models without LoRAMoE layers the trainer is as before. A second call replaces the first.

    Args:
        **options: `preset`, anchors and options of `LoRAMoEConfig`, as `LauncherOptions.read` takes them.

    Raises:
        TypeError: there is no such option, or one has a value of the wrong type.
        ValueError: an option has a value out of its range, or has no effect.
    """
    read = LauncherOptions.read(options)

    class LoRAMoETuner(PeftTuner):
        @staticmethod
        def prepare_model(args: Any, model: nn.Module) -> PeftModel:
            return get_peft_model(model, read.config)

        @staticmethod
        def from_pretrained(model: nn.Module, model_id: str, **kwargs: Any) -> nn.Module:
            if kwargs.get("is_trainable"):
                read.check_saved(model_id)
            return PeftTuner.from_pretrained(model, model_id, **kwargs)

    class LoRAMoESeq2SeqTrainer(LoRAMoETrainerMixin, Seq2SeqTrainer):
        """ms-swift's trainer with the balance term and the anchors."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            model = kwargs.get("model", args[0] if args else None)
            has_mixture = model is not None and find_recorder(model) is not None
            super().__init__(*args, **(read.anchors if has_mixture else {}), **kwargs)

    tuners_map[ADAPTER] = LoRAMoETuner
    globals()[TRAINER] = LoRAMoESeq2SeqTrainer
    TrainerFactory.TRAINER_MAPPING["causal_lm"] = f"{__name__}.{TRAINER}"
