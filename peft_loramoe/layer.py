"""`LoRAMoELinear`: a linear layer of the base model and the experts of its adapters."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, MutableMapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .experts import LoRAExperts
from .peft_api import BaseTunerLayer, get_in_out_features, get_pattern_key


if TYPE_CHECKING:
    from .config import LoRAMoEConfig
    from .recorder import Recorder


CANNOT_MERGE = (
    "LoRAMoE adapters cannot be merged: the router weighs the experts anew for every token, so no single weight matrix "
    "equals the mixture. Keep the adapter attached, or use unload() to get the base model back without it."
)


class LoRAMoELinear(nn.Module, BaseTunerLayer):
    """Base layer plus the mixtures of its active adapters: ``base_layer(x) + sum over active adapters of experts(x)``.

    One class serves every backend (dense, Conv1D, quantised): the mixture is added, out of place, to whatever the base layer
    returns.

    Args:
        base_layer: the linear layer, left as it is.
        name: name of the layer inside the base model.
        recorder: takes the router probabilities of each forward pass.
    """

    adapter_layer_names = ("loramoe_experts",)
    other_param_names = ()
    # PEFT's disable_input_dtype_casting sets it. Here it changes nothing: the input is never cast, only the small weights.
    cast_input_dtype_enabled = True

    def __init__(self, base_layer: nn.Module, name: str, recorder: Recorder) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.name = name
        self.recorder = recorder
        self.loramoe_experts = nn.ModuleDict({})
        self._disable_adapters = False
        self.merged_adapters = []
        self.in_features, self.out_features = get_in_out_features(self.get_base_layer())

    def update_layer(self, adapter_name: str, config: LoRAMoEConfig) -> None:
        """Add (or replace) the experts of an adapter, initialised as `config` says, on the base layer's device."""
        r = config.rank_pattern.get(get_pattern_key(config.rank_pattern, self.name), config.r)
        alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern, self.name), config.lora_alpha)
        pattern_key = get_pattern_key(config.num_experts_pattern, self.name)
        experts = LoRAExperts(
            self.in_features,
            self.out_features,
            r=r,
            expert_groups=config.groups_of(pattern_key if pattern_key in config.num_experts_pattern else None),
            null_groups=config.null_groups or [],
            scaling=config.scaling(r, alpha),
            dropout=config.lora_dropout,
            temperature=config.router_temperature,
            router_dtype=getattr(torch, config.router_dtype),
            top_k=config.top_k,
            balance_detach=config.balance_detach,
        )
        experts.reset_parameters(config.init_weights, config.router_init)
        self.loramoe_experts[adapter_name] = experts
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Tensor:
        """Apply the base layer and add the mixtures.

        Args:
            x: shape (..., in_features).
            *args: passed to the base layer.
            adapter_names: one adapter for each sample (dimension 0 of `x`); "__base__" for none.
            **kwargs: passed to the base layer.

        Returns:
            Shape (..., out_features), in the base layer's output dtype.

        Raises:
            ValueError: `adapter_names` does not have one name for each sample.
        """
        result = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return result
        if adapter_names is not None:
            return self._forward_per_sample(x, result, adapter_names)
        for adapter in self.active_adapters:
            if adapter in self.loramoe_experts:
                experts = self.loramoe_experts[adapter]
                delta, probabilities = experts(x)
                result = result + delta.to(result.dtype)
                self.recorder.record(adapter, self.name, experts, probabilities)
        return result

    def _forward_per_sample(self, x: Tensor, result: Tensor, adapter_names: list[str]) -> Tensor:
        if len(x) != len(adapter_names):  # some models flatten batch and sequence before their feed-forward layers
            width = self.recorder.tokens_per_row(len(x), self.name) if x.dim() == 2 else None
            adapter_names = [name for name in adapter_names for _ in range(width or 1)]
        if len(x) != len(adapter_names):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {len(x)} respectively."
            )
        for adapter in dict.fromkeys(adapter_names):
            if adapter in self.loramoe_experts:
                rows = torch.tensor([i for i, name in enumerate(adapter_names) if name == adapter], device=x.device)
                delta, _ = self.loramoe_experts[adapter](x[rows])
                result = result.index_add(0, rows, delta.to(result.dtype))
        return result

    @property
    def scaling(self) -> MutableMapping[str, float]:
        """The current scale of each adapter, by name; may be written to, as in PEFT's LoRA."""
        return _Scaling(self.loramoe_experts)

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set the scale of an adapter to `scale` times its configured one; a layer without that adapter ignores it."""
        if adapter in self.loramoe_experts:
            self.loramoe_experts[adapter].scaling = scale * self.loramoe_experts[adapter].initial_scaling

    def scale_layer(self, scale: float) -> None:
        """Multiply the current scale of all active adapters by `scale`."""
        for experts in self._active_experts():
            experts.scaling *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the current scale of all active adapters by `scale`; None sets it back to the configured one."""
        for experts in self._active_experts():
            experts.scaling = experts.initial_scaling if scale is None else experts.scaling / scale

    def _active_experts(self) -> list[LoRAExperts]:
        return [self.loramoe_experts[name] for name in self.active_adapters if name in self.loramoe_experts]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refused.

        Raises:
            ValueError: always; the routing depends on the token.
        """
        raise ValueError(CANNOT_MERGE)

    def unmerge(self) -> None:
        """Nothing is ever merged; warns like PEFT's LoRA does."""
        warnings.warn("Already unmerged. Nothing to do.")

    def __repr__(self) -> str:
        return "loramoe." + super().__repr__()


class _Scaling(MutableMapping):
    """The scales of a layer's adapters: a view of what their experts hold."""

    def __init__(self, experts: nn.ModuleDict) -> None:
        self._experts = experts

    def __getitem__(self, adapter: str) -> float:
        return self._experts[adapter].scaling

    def __setitem__(self, adapter: str, scale: float) -> None:
        self._experts[adapter].scaling = scale

    def __delitem__(self, adapter: str) -> None:
        raise TypeError(f"The scale of adapter '{adapter}' goes with it: use delete_adapter('{adapter}').")

    def __iter__(self) -> Iterator[str]:
        return iter(self._experts)

    def __len__(self) -> int:
        return len(self._experts)
