"""A linear layer, or a whole block, of the base model and the experts of its adapters."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from .experts import LoRAExperts
from .gradients import passes_gradient
from .groups import ExpertGroups
from .peft_api import BaseTunerLayer, get_in_out_features


if TYPE_CHECKING:
    from .config import LoRAMoEConfig


class Recorder(Protocol):
    """What a layer hands its router probabilities to; `balance.hooks.Recorder` is one."""

    def record(self, adapter: str, layer: str, groups: ExpertGroups, trained: bool, probabilities: Tensor) -> None:
        """Take the router probabilities of one use of the layer, shape (..., N)."""

    def entries_per_row(self, tokens: tuple[int, ...], layer: str) -> int | None:
        """How many consecutive entries of a layer's input come from one row of the batch; None if nothing tells."""


CANNOT_MERGE = (
    "LoRAMoE adapters cannot be merged: the router weighs the experts anew for every token, so no single weight "
    "matrix equals the mixture. Keep the adapter attached, use unload() to get the base model back without it, or "
    "approximate it by a plain LoRA with peft_loramoe.interop.export_lora."
)


_GLOBAL_HOOKS = [
    getattr(nn.modules.module, f"_global_{kind}_hooks")
    for kind in ("forward", "forward_pre", "backward", "backward_pre")
]


class LoRAMoELayer(nn.Module, BaseTunerLayer):
    """A module of the base model and the mixtures of its adapters, whose sum is added to the module's output.

    Args:
        base_layer: the module, left as it is.
        name: its name inside the base model.
        in_features: size of what it reads.
        out_features: size of what it returns.
        recorder: takes the router probabilities of each forward pass; None for inference without the balance term.
    """

    adapter_layer_names = ("loramoe_experts",)
    other_param_names = ()
    # PEFT's disable_input_dtype_casting sets it. Here it changes nothing: the mixture chooses its dtypes itself, and a
    # large input is never cast, only the small weights.
    cast_input_dtype_enabled = True
    input_name = "x"  # of the argument of `forward` that the experts read

    def __init__(
        self, base_layer: nn.Module, name: str, in_features: int, out_features: int, recorder: Recorder | None
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.name = name
        self.recorder = recorder
        # torch types the values of a ModuleDict as Module
        self.loramoe_experts = cast("MutableMapping[str, LoRAExperts]", nn.ModuleDict())
        self._disable_adapters = False
        self.merged_adapters = []
        self.in_features, self.out_features = in_features, out_features

    def update_layer(self, adapter_name: str, config: LoRAMoEConfig) -> None:
        """Add (or replace) the experts of an adapter, initialised as `config` says, on the base layer's device.

        Args:
            adapter_name: of the adapter.
            config: its configuration, of which the entries of patterns that match the layer's name count here.

        Raises:
            ValueError: the layer's experts would have more rank than a layer can have.
        """
        experts = LoRAExperts(
            self.in_features,
            self.out_features,
            r=config.rank_of(self.name),
            groups=config.groups_of(self.name),
            options=config.mixture_options(self.name),
            frozen=config.freeze_experts,
        )
        experts.reset_parameters(config.init_weights, config.router_init)
        self.loramoe_experts[adapter_name] = experts
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Move an adapter to where the base layer computes, also if accelerate keeps its weights elsewhere."""
        super()._move_adapter_to_device_of_base_layer(adapter_name, device or _device(self.base_layer))

    @property
    def _active(self) -> list[tuple[str, LoRAExperts]]:
        """Names and experts of the adapters whose mixtures are added."""
        if self._disable_adapters:
            return []
        experts = self.loramoe_experts  # each attribute of a module takes torch half a microsecond
        return [(name, experts[name]) for name in self.active_adapters if name in experts]

    def _add_mixtures(
        self, x: Tensor, base: Tensor | None, active: Sequence[tuple[str, LoRAExperts]], **linear: Tensor | None
    ) -> Tensor:
        """Add the mixtures of adapters, and record their router probabilities.

        Args:
            x: shape (..., in_features).
            base: the base layer's output, shape (..., out_features).
            active: their names and experts.
            **linear: instead, the weight and bias with which the first mixture computes it.
        """
        for adapter, experts in active:
            base, probabilities = experts(x, base, **linear)
            linear = {}
            if self.recorder is not None:
                self.recorder.record(adapter, self.name, experts.groups, experts.router.requires_grad, probabilities)
        assert base is not None  # or there is no adapter, and the caller has the base layer's output
        return base

    def _check_gradient(self, x: Tensor, base: Tensor) -> None:
        if not (self.training and x.requires_grad and torch.is_grad_enabled()):
            return
        passed_on = base.requires_grad if torch.compiler.is_compiling() else passes_gradient(x, base)
        if not passed_on:
            raise ValueError(
                f"The base layer of '{self.name}', {type(self.base_layer).__name__}, passes no gradient on, so what "
                "is below would not be trained. Its backend may be for inference only, or packed its weights for "
                "inference when the model was evaluated: load the base model anew, or with a backend that can be "
                "trained (docs/quantization.md)."
            )

    def _add_mixtures_per_sample(self, x: Tensor, result: Tensor, adapter_names: list[str]) -> Tensor:
        # Some models flatten batch and sequence before their feed-forward layers.
        entries = 1 if self.recorder is None else self.recorder.entries_per_row(tuple(x.shape[:-1]), self.name)
        if entries is None and len(set(adapter_names)) > 1:
            raise ValueError(
                f"Nothing tells to which samples the {tuple(x.shape[:-1])} tokens of layer '{self.name}' belong, so "
                "`adapter_names` cannot differ between the samples: pass one name for all, or leave the layer out "
                "with exclude_modules."
            )
        if entries is None:
            adapter_names = adapter_names[:1] * len(x)
        adapter_names = [name for name in adapter_names for _ in range(entries or 1)]
        if len(x) != len(adapter_names):
            raise ValueError(
                f"Length of `adapter_names` should be the same as the number of inputs, but got {len(adapter_names)} "
                f"and {len(x)} respectively."
            )
        for adapter in dict.fromkeys(adapter_names):
            if adapter in self.loramoe_experts:
                rows = torch.tensor([i for i, name in enumerate(adapter_names) if name == adapter], device=x.device)
                delta, _ = self.loramoe_experts[adapter](x[rows])
                result = result.index_add(0, rows, delta.to(result.dtype))
        return result

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Activate adapters and make them trainable, as PEFT does, but for experts that `freeze_experts` freezes."""
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        self._keep_frozen()

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Make adapters trainable or not, as PEFT does, but for experts that `freeze_experts` freezes."""
        super().set_requires_grad(adapter_names, requires_grad)
        self._keep_frozen()

    def _keep_frozen(self) -> None:
        for experts in self.loramoe_experts.values():
            if experts.frozen:
                for parameter in (experts.A, experts.B):
                    if parameter.is_leaf:  # FSDP2's are not always, and PEFT passes those by too
                        parameter.requires_grad_(False)

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


class LoRAMoELinear(LoRAMoELayer):
    """A linear layer plus the mixtures of its active adapters: ``base_layer(x) + sum of experts(x)``.

    One class serves every backend (dense, Conv1D, quantised): the mixture is added, out of place, to whatever the base
    layer returns.

    Args:
        base_layer: the linear layer, left as it is.
        name: name of the layer inside the base model.
        recorder: takes the router probabilities of each forward pass; None for inference without the balance term.

    Example:
        >>> import torch
        >>> from peft_loramoe import LoRAMoEConfig
        >>> layer = LoRAMoELinear(nn.Linear(8, 16), name="up_proj")
        >>> layer.update_layer("default", LoRAMoEConfig(r=2))
        >>> layer(torch.randn(3, 8)).shape
        torch.Size([3, 16])
    """

    def __init__(self, base_layer: nn.Module, name: str, recorder: Recorder | None = None) -> None:
        sizes = cast("tuple[int, int]", get_in_out_features(base_layer))  # None for what is no linear layer
        super().__init__(base_layer, name, *sizes, recorder)

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
            ValueError: `adapter_names` does not have one name for each sample, or the base layer passes no gradient
                on.
        """
        if adapter_names is not None and not self.disable_adapters:
            return self._add_mixtures_per_sample(x, self.base_layer(x, *args, **kwargs), adapter_names)
        active = self._active
        if active and not args and not kwargs and (linear := self._frozen_linear()):
            return self._add_mixtures(x, None, active, **linear)
        base = self.base_layer(x, *args, **kwargs)
        self._check_gradient(x, base)
        return self._add_mixtures(x, base, active)

    def _frozen_linear(self) -> dict[str, Tensor | None]:
        """Weight and bias of the base layer if calling it is `F.linear` with these, frozen, and nothing else; or
        nothing.

        The experts may then compute it.
        """
        layer = self.base_layer
        if not (
            type(layer) is nn.Linear
            and not torch.compiler.is_compiling()  # the compiler has fusions of its own for it
            and not is_in_torch_dispatch_mode()  # selective checkpointing, counters of operations
            and _file_of(nn.Linear.forward) == nn.modules.linear.__file__  # not patched
            and "forward" not in layer.__dict__
            and not (
                layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks
            )
            and not any(_GLOBAL_HOOKS)
        ):
            return {}
        # A module's attributes take torch three times as long as these. FSDP 1 may have other tensors in their place.
        parameters = layer._parameters
        weight, bias = parameters.get("weight"), parameters.get("bias")
        plain = _is_plain(weight) and "bias" in parameters and (bias is None or _is_plain(bias))
        return {"weight": weight, "bias": bias} if plain else {}


class LoRAMoEBlock(LoRAMoELayer):
    """A whole block, such as a sparse feed-forward layer, plus mixtures beside it: ``block(x) + sum of experts(x)``.

    Every token passes the block, so importance by sample is defined where the block sends tokens to experts of its
    own, and null experts leave a token to the untouched block. This is the parallel form of PERFT (Liu et al. 2024,
    arXiv 2411.08212) with the experts and the router of LoRAMoE.

    Args:
        base_layer: the block, left as it is. It reads a tensor of shape (..., features) and returns one of the same
            shape, or with its tokens in one dimension, or a tuple that begins with it.
        name: name of the block inside the base model.
        features: size of what it reads and returns.
        recorder: takes the router probabilities of each forward pass; None for inference without the balance term.

    Example:
        >>> import torch
        >>> from peft_loramoe import LoRAMoEConfig
        >>> block = nn.Sequential(nn.Linear(8, 32), nn.SiLU(), nn.Linear(32, 8))
        >>> layer = LoRAMoEBlock(block, name="mlp", features=8)
        >>> layer.update_layer("default", LoRAMoEConfig(r=2))
        >>> layer(torch.randn(3, 8)).shape
        torch.Size([3, 8])
    """

    def __init__(self, base_layer: nn.Module, name: str, features: int, recorder: Recorder | None = None) -> None:
        super().__init__(base_layer, name, features, features, recorder)
        self.input_name = next(iter(inspect.signature(base_layer.forward).parameters))

    def forward(self, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Any:
        """Apply the block and add the mixtures to its output.

        Args:
            *args: passed to the block; the first one, or the keyword argument of its name, is what the experts read,
                shape (..., features).
            adapter_names: one adapter for each sample (dimension 0 of what the experts read); "__base__" for none.
            **kwargs: passed to the block.

        Returns:
            What the block returns, with the mixtures added to it, or to its first item if it is a tuple.

        Raises:
            ValueError: what the block returns has another shape than what it reads, `adapter_names` does not have one
                name for each sample, or the block passes no gradient on.
        """
        returned = self.base_layer(*args, **kwargs)
        if self.disable_adapters:
            return returned
        x = args[0] if args else kwargs[self.input_name]
        in_tuple = type(returned) is tuple and bool(returned)
        output: Any = returned[0] if in_tuple else returned
        tokens = self._as_returned(x, output)
        if adapter_names is not None:
            output = self._add_mixtures_per_sample(tokens, output, adapter_names)
        else:
            self._check_gradient(x, output)
            output = self._add_mixtures(tokens, output, self._active)
        return (output, *returned[1:]) if in_tuple else output

    def _as_returned(self, x: Tensor, output: Any) -> Tensor:
        """What the block read, in the shape of what it returned: the same, or with its tokens in one dimension."""
        if isinstance(output, Tensor) and x.shape[-1] == self.in_features:
            tokens = x if output.dim() == x.dim() else x.flatten(0, -2)
            # Dimension by dimension: torch.compile does not compare symbolic sizes inside of tuples.
            if output.dim() == tokens.dim() and all(a == b for a, b in zip(output.shape, tokens.shape)):
                return tokens
        found = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(
            f"Block '{self.name}' returned {found} for an input of shape {tuple(x.shape)}. Beside a block, a mixture "
            f"adds to an output of the input's shape, (..., {self.in_features}), or the same with its tokens in one "
            "dimension: target the linear layers inside the block instead."
        )

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Move an adapter to where the block computes, and to its largest tensor's dtype unless it is quantised."""
        experts = self.loramoe_experts[adapter_name]
        largest = _largest_tensor(self.base_layer)
        if largest is None or experts.A.is_meta:
            return
        dtype = largest.dtype if largest.dtype.is_floating_point else None
        self.loramoe_experts[adapter_name] = experts.to(device or _device(self.base_layer), dtype)


def first_layer(model: nn.Module) -> LoRAMoELayer | None:
    """The first layer of a model that has mixtures, or None."""
    return next((module for module in model.modules() if isinstance(module, LoRAMoELayer)), None)


def adapted_layers(model: nn.Module) -> list[LoRAMoELayer]:
    """The layers of a model that have mixtures, in their order.

    Raises:
        ValueError: there are none.
    """
    layers = [module for module in model.modules() if isinstance(module, LoRAMoELayer)]
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no LoRAMoE layers; attach them with get_peft_model, or load an adapter with "
            "PeftModel.from_pretrained."
        )
    return layers


def _largest_tensor(module: nn.Module) -> Tensor | None:
    """The largest parameter or buffer: some quantisation libraries keep weights in buffers."""
    return max([*module.parameters(), *module.buffers()], key=Tensor.numel, default=None)


def _device(module: nn.Module) -> torch.device | None:
    """Where a module computes; None if it has no tensors."""
    for part in module.modules():
        hook = getattr(part, "_hf_hook", None)  # accelerate's
        for single in getattr(hook, "hooks", (hook,)):
            # The weights are on "meta" between calls.
            device = getattr(single, "execution_device", None)
            if getattr(single, "offload", False) and device is not None:
                return torch.device(device)
    largest = _largest_tensor(module)
    return None if largest is None else largest.device


def _is_plain(parameter: nn.Parameter | None) -> bool:
    """Frozen, and neither a subclass (quantised, sharded) nor partitioned by ZeRO."""
    return type(parameter) is nn.Parameter and not parameter.requires_grad and not hasattr(parameter, "ds_id")


def _file_of(function: Any) -> str | None:
    return getattr(getattr(function, "__code__", None), "co_filename", None)


class _Scaling(MutableMapping[str, float]):
    """The scales of a layer's adapters: a view of what their experts hold."""

    def __init__(self, experts: Mapping[str, LoRAExperts]) -> None:
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
