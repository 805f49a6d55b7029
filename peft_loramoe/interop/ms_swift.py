"""`--tuner_type loramoe` in ms-swift: call `register` in a file of your own and name it with `--external_plugins`."""

from __future__ import annotations

from typing import Any

from peft import PeftModel, get_peft_model
from swift.trainers import Seq2SeqTrainer, TrainerFactory
from swift.tuner_plugin import PeftTuner, tuners_map
from torch import nn

from ..training import LoRAMoETrainerMixin
from .launcher_options import ADAPTER, LauncherOptions


class LoRAMoESeq2SeqTrainer(LoRAMoETrainerMixin, Seq2SeqTrainer):
    """ms-swift's trainer with the balance term and the anchors; for other adapters it is as before."""

    anchor_options: dict[str, Any] = {}

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **self.anchor_options, **kwargs)


def register(**options: Any) -> None:
    """Add the tuner type `loramoe` to ms-swift, and have its trainer for causal language models train it.

    Args:
        **options: `preset`, anchors and options of `LoRAMoEConfig`, as `LauncherOptions.read` takes them.

    Raises:
        TypeError: there is no such option, or one has a value of the wrong type.
        ValueError: an option has a value out of its range.
    """
    read = LauncherOptions.read(options)

    class LoRAMoETuner(PeftTuner):
        @staticmethod
        def prepare_model(args: Any, model: nn.Module) -> PeftModel:
            return get_peft_model(model, read.config)

    tuners_map[ADAPTER] = LoRAMoETuner
    LoRAMoESeq2SeqTrainer.anchor_options = read.anchors
    TrainerFactory.TRAINER_MAPPING["causal_lm"] = f"{__name__}.{LoRAMoESeq2SeqTrainer.__name__}"
