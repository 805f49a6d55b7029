"""`ExpertGroups`: which experts of a layer belong together, and which groups are null."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ExpertGroups:
    """The expert groups of one linear layer; experts are numbered group by group.

    Attributes:
        sizes: number of experts in each group.
        null: indices of the groups whose experts are null: a router output without parameters or contribution.
        names: the task type that each group is for, if the types have names.

    Example:
        >>> groups = ExpertGroups((2, 3), null=(0,))
        >>> groups.num_experts, groups.lora_experts
        (5, (2, 3, 4))
        >>> groups.of_experts
        (0, 0, 1, 1, 1)
        >>> groups.slices
        (slice(0, 2, None), slice(2, 5, None))
    """

    sizes: tuple[int, ...]
    null: tuple[int, ...] = ()
    names: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "sizes", tuple(self.sizes))
        object.__setattr__(self, "null", tuple(self.null))
        object.__setattr__(self, "names", tuple(self.names) if self.names else None)

    def __len__(self) -> int:
        return len(self.sizes)

    @property
    def num_experts(self) -> int:
        """Number of router outputs, null experts included."""
        return sum(self.sizes)

    @property
    def of_experts(self) -> tuple[int, ...]:
        """The group of each expert."""
        return tuple(group for group, size in enumerate(self.sizes) for _ in range(size))

    @property
    def lora_experts(self) -> tuple[int, ...]:
        """The experts that are not null, ascending."""
        return tuple(expert for expert, group in enumerate(self.of_experts) if group not in self.null)

    @property
    def slices(self) -> tuple[slice, ...]:
        """The experts of each group."""
        ends = [sum(self.sizes[: group + 1]) for group in range(len(self.sizes))]
        return tuple(slice(end - size, end) for end, size in zip(ends, self.sizes))
