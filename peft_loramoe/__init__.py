"""Mixtures of LoRA experts with localized balancing (LoRAMoE, arXiv 2312.09979) as a PEFT tuner.

Importing this package registers the tuner type ``LORAMOE`` with PEFT.
"""

from .balance import LayerRouting, balance_loss, balance_terms, collect_balance, layer_routing
from .config import LoRAMoEConfig
from .experts import LoRAExperts
from .layer import LoRAMoELinear
from .model import LoRAMoEModel
from .registration import register
from .version import __version__


register()

__all__ = [
    "LayerRouting",
    "LoRAExperts",
    "LoRAMoEConfig",
    "LoRAMoELinear",
    "LoRAMoEModel",
    "__version__",
    "balance_loss",
    "balance_terms",
    "collect_balance",
    "layer_routing",
]
