"""The mixture's arithmetic. `mixture` is what layers use; `reference` is the formula it is tested against."""

from .mixture import MixtureOptions, mixture


__all__ = ["MixtureOptions", "mixture"]
