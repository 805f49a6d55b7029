"""Figures of routers and of the trade-off between learning and forgetting. They need matplotlib."""

from .frontier import plot_frontier
from .routing import plot_entropy, plot_group_weights, plot_load
from .trace import plot_trace


__all__ = ["plot_entropy", "plot_frontier", "plot_group_weights", "plot_load", "plot_trace"]
