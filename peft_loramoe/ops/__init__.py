"""The mixture's arithmetic. `mixture` is what layers use; `reference` is the formula it is tested against."""

from .mixture import Options, mixture


__all__ = ["Options", "mixture"]
