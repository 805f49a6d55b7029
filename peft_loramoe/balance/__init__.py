"""The localized balancing constraint.

Its term, the samples it is computed over, and the hooks that put it into the loss.
"""

from .hooks import LayerRouting
from .results import balance_loss, balance_terms, collect_balance, layer_routing


__all__ = ["LayerRouting", "balance_loss", "balance_terms", "collect_balance", "layer_routing"]
