"""Mixtures of LoRA experts with localized balancing (LoRAMoE, arXiv 2312.09979) as a PEFT tuner.

Importing this package registers the tuner type ``LORAMOE`` with PEFT.
"""

import sys

from .version import __version__


# Python looks for the module of `python -m peft_loramoe`.
if sys.argv[:1] == ["-m"] and sys.orig_argv[sys.orig_argv.index("-m") + 1 :][:1] == [__name__]:
    import _peft_loramoe_command

    _peft_loramoe_command.PARSING = True

# The command line parses its arguments first, and then imports this file again.
if not getattr(sys.modules.get("_peft_loramoe_command"), "PARSING", False):
    from .balance import LayerRouting, balance_loss, balance_terms, collect_balance, layer_routing
    from .config import LoRAMoEConfig
    from .experts import LoRAExperts
    from .layer import LoRAMoELinear
    from .model import LoRAMoEModel
    from .registration import register

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
