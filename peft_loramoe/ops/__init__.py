"""The arithmetic of a mixture: one operator, its backends, and the reference that they are tested against."""

from .mixture import MixtureOptions


__all__ = ["MixtureOptions"]
