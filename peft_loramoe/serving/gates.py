"""The gates of slots: tables that say for each slot how its rank channels are gated, and the gating of a batch.

A batch mixes tokens of all slots. Everything is looked up by the slot of each token in tensors of fixed shape, without
a loop over slots or a copy to the host, so that CUDA graphs and torch.compile take it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .adapter import SlotLayout, num_parts, part_scales


class GateTables:
    """How the rank channels of one linear's slots are gated; a slot without a mixture is not.

    Args:
        slices: linears that the engine has packed into this one, such as query, key and value; 1 if it is not packed.
        slots: number of adapters that are held at a time.
        rank: rank of each slot.
        dtype: of the slots.
        device: where the batch is.

    Attributes:
        occupied: whether any slot holds a mixture.
        selective: whether any of them has `top_k`.
        rank_in_use: rank channels that some slot uses, the router's included; all later ones are zero.
        channels_in_use: rank channels that some slot's second matrix reads; all later columns of it are zero.

    Example:
        >>> tables = GateTables(slices=1, slots=2, rank=8, dtype=torch.float32, device="cpu")
        >>> tables.set(1, [SlotLayout(experts=(1,), num_experts=2, r=2, scaling=3.0, top_k=None)])
        >>> channels = torch.tensor([[[1.0, 1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0]]])
        >>> tables.gate(channels, slots=torch.tensor([1]))  # expert 0 is null, expert 1 has half of the weight
        tensor([[[1.5000, 1.5000, 0.0000, 0.0000, 0.0000, 0.0000, 0.0000, 0.0000]]])
        >>> tables.gate(channels, slots=torch.tensor([0]))  # no mixture
        tensor([[[1., 1., 0., 0., 1., 1., 1., 1.]]])
    """

    def __init__(self, slices: int, slots: int, rank: int, dtype: torch.dtype, device: torch.device | str) -> None:
        self.slices, self.slots, self.rank, self.dtype = slices, slots, rank, dtype
        self.parts = num_parts(dtype)
        self.max_experts = max(rank // self.parts, 1)
        # One more row than slots: index -1 is a token without an adapter.
        self.columns = torch.zeros(slices, slots + 1, self.parts * self.max_experts, dtype=torch.long, device=device)
        self.offsets = torch.zeros(slices, slots + 1, self.max_experts, device=device)
        self.limits = torch.full((slices, slots + 1), self.max_experts, device=device)
        self.experts = torch.zeros(slices, slots + 1, rank, dtype=torch.long, device=device)
        self.factors = torch.zeros(slices, slots + 1, rank, device=device)
        self.scales = torch.tensor(part_scales(dtype), device=device)[:, None]
        self._mixtures: dict[int, bool] = {}  # slot -> whether it has top_k
        self._in_use: dict[int, tuple[int, int]] = {}  # slot -> rank, and the channels that are read
        self.rank_in_use = self.channels_in_use = 0
        for slot in range(slots):
            self.set(slot, [None] * slices)

    @property
    def occupied(self) -> bool:
        """Whether any slot holds a mixture."""
        return bool(self._mixtures)

    @property
    def selective(self) -> bool:
        """Whether any of them has `top_k`."""
        return any(self._mixtures.values())

    def set(self, slot: int, layouts: Sequence[SlotLayout | None], plain: bool = False) -> None:
        """Note what a slot holds.

        Args:
            slot: its index.
            layouts: the mixture of each slice; None for a plain LoRA, or nothing.
            plain: whether it may hold a plain LoRA.
        """
        for i, layout in enumerate(layouts):
            for table, row in zip(
                (self.columns, self.offsets, self.limits, self.experts, self.factors), self._rows(layout)
            ):
                table[i, slot].copy_(row)
        present = [layout for layout in layouts if layout is not None]
        self._mixtures.pop(slot, None)
        if present:
            self._mixtures[slot] = any(layout.top_k is not None for layout in present)
        rank = max((layout.rank(self.dtype) for layout in present), default=0)
        channels = max((layout.channels for layout in present), default=0)
        self._in_use[slot] = (self.rank, self.rank) if plain else (rank, channels)
        self._measure()

    def clear(self, slot: int) -> None:
        """Note that no token will ask for a slot until it is set again."""
        self._mixtures.pop(slot, None)
        self._in_use.pop(slot, None)
        self._measure()

    def _measure(self) -> None:
        self.rank_in_use, self.channels_in_use = map(max, zip((0, 0), *self._in_use.values()))

    def gate(
        self,
        channels: Tensor,
        slots: Tensor,
        logits_from: Tensor | None = None,
        selective: bool | None = None,
        width: int | None = None,
    ) -> Tensor:
        """Gate the rank channels of a batch.

        Args:
            channels: what the slots' first matrices make of the input, shape (slices, T, rank), float32; the last ones
                may be left out if no slot uses them.
            slots: slot of each token, -1 for none, shape (T,). Other values are read as the nearest of these.
            logits_from: where the logits are read, if not in `channels`: their sum over the shards of the input.
            selective: whether to look for `top_k`; None: if any slot has it.
            width: how many of the channels to gate; None for all.

        Returns:
            The gated channels, shape (slices, T, width); zeros for tokens without an adapter.
        """
        slots = slots.clamp(-1, self.slots - 1)  # rows that pad the batch have no slot yet
        source = channels if logits_from is None else logits_from
        parts = source.gather(-1, self.columns[:, slots]).unflatten(-1, (self.parts, self.max_experts))
        logits = parts[..., 0, :] if self.parts == 1 else (parts * self.scales).sum(-2)
        gates = torch.softmax(logits + self.offsets[:, slots], dim=-1)
        if self.selective if selective is None else selective:
            gates = gates * self._chosen(gates, self.limits[:, slots])
            gates = gates / gates.sum(-1, keepdim=True)
        gates = torch.cat([gates, torch.ones_like(gates[..., :1])], dim=-1)
        width = channels.shape[-1] if width is None else width
        experts, factors = self.experts[..., :width][:, slots], self.factors[..., :width][:, slots]
        return channels[..., :width] * (gates.gather(-1, experts) * factors)

    def _chosen(self, gates: Tensor, limits: Tensor) -> Tensor:
        """Whether an expert is among the `limits` largest; of equal ones the first is."""
        larger = gates[..., None, :] > gates[..., :, None]
        equal = gates[..., None, :] == gates[..., :, None]
        before = torch.ones(2 * (self.max_experts,), dtype=torch.bool, device=gates.device).tril(-1)
        return (larger | (equal & before)).sum(-1) < limits[..., None]

    def _rows(self, layout: SlotLayout | None) -> tuple[Tensor, ...]:
        columns = torch.zeros(self.parts, self.max_experts, dtype=torch.long)
        offsets = torch.zeros(self.max_experts)
        limit = torch.tensor(self.max_experts)
        experts = torch.full((self.rank,), self.max_experts)  # the gate that is one
        factors = torch.ones(self.rank)
        if layout is not None:
            n = layout.num_experts
            router = torch.arange(layout.channels, layout.rank(self.dtype))
            columns[:, :n] = router.view(self.parts, n)
            offsets[n:] = -torch.inf
            limit = torch.tensor(layout.top_k or n)
            experts[: layout.channels] = torch.tensor(layout.experts).repeat_interleave(layout.r)
            factors[: layout.channels] = layout.scaling
            factors[layout.channels :] = 0
        return columns.flatten(), offsets, limit, experts, factors
