"""What training needs beyond the model: task types through the data path, trainer glue, logging, optimizer groups, resuming."""

from .callback import RouterCallback
from .checkpoints import last_complete_checkpoint
from .collator import TaskTypeCollator
from .optimizer import optimizer_groups
from .trainer import LoRAMoETrainerMixin


__all__ = [
    "LoRAMoETrainerMixin",
    "RouterCallback",
    "TaskTypeCollator",
    "last_complete_checkpoint",
    "optimizer_groups",
]
