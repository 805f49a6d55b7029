"""How a trained router uses its experts: statistics and plots."""

from .plots import plot_group_weights
from .statistics import group_weights, router_statistics


__all__ = ["group_weights", "plot_group_weights", "router_statistics"]
