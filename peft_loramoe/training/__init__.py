"""What training needs beyond the model.

Task types through the data path, trainer glue, logging, optimizer groups, resuming.
"""

from .anchors import anchors_from_texts, read_anchors, sample_anchors, write_anchors
from .callback import RouterCallback
from .checkpoints import last_complete_checkpoint
from .collator import TaskTypeCollator
from .optimizer import optimizer_groups
from .trainer import LoRAMoETrainerMixin


__all__ = [
    "LoRAMoETrainerMixin",
    "RouterCallback",
    "TaskTypeCollator",
    "anchors_from_texts",
    "last_complete_checkpoint",
    "optimizer_groups",
    "read_anchors",
    "sample_anchors",
    "write_anchors",
]
