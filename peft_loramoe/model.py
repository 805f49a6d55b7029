"""`LoRAMoEModel`: injects `LoRAMoELinear` layers into a base model and keeps account of its adapters."""

from __future__ import annotations

import re
from collections.abc import Generator
from contextlib import contextmanager
from functools import partial
from threading import get_ident
from typing import Any, cast

from torch import nn

from .balance.hooks import Recorder
from .balance.results import find_recorder
from .config import LoRAMoEConfig
from .gradients import NonReentrantCheckpointing, UnpackedWeights
from .layer import CANNOT_MERGE, LoRAMoEBlock, LoRAMoELayer, LoRAMoELinear
from .loading import check_adapter_tensors, unchanged_on_failure
from .names import check_adapter_name, is_of_experts, without_adapter_name
from .options import shown
from .peft_api import (
    PEFT_AT_LEAST_0_21,
    AuxiliaryTrainingWrapper,
    BaseTuner,
    BaseTunerLayer,
    quantization_backend_of,
)
from .targets import (
    FEED_FORWARD,
    around_routed_experts,
    block_features,
    candidates,
    check_names,
    default_targets,
    is_block,
    is_bypassed,
    is_linear,
    is_routed_expert,
    is_router,
)


class LoRAMoEModel(BaseTuner):
    """Adds LoRAMoE adapters to a model; what `get_peft_model(model, LoRAMoEConfig(...))` creates.

    Args:
        model: the base model.
        peft_config: the adapter's configuration.
        adapter_name: its name.
        low_cpu_mem_usage: create the adapter's parameters on the meta device.

    Raises:
        ValueError: a targeted module is no linear layer, or no module is targeted.

    Example:
        >>> from peft import get_peft_model
        >>> from torch import nn
        >>> from peft_loramoe import LoRAMoEConfig
        >>> base = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
        >>> model = get_peft_model(base, LoRAMoEConfig(target_modules=["0"]))
        >>> type(model.base_model).__name__, type(model.base_model.model[0]).__name__
        ('LoRAMoEModel', 'LoRAMoELinear')
    """

    prefix = "loramoe_"
    tuner_layer_cls = LoRAMoELayer
    target_module_mapping = FEED_FORWARD

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the base model; PEFT before 0.21 calls its `forward` and so passes the recorder's hooks by."""
        return self.model(*args, **kwargs)

    def _check_new_adapter_config(self, config: LoRAMoEConfig) -> None:
        config.check()
        others = sorted({c.peft_type for c in self.peft_config.values() if c.peft_type} - {"LORAMOE"})
        if others and not PEFT_AT_LEAST_0_21:
            raise ValueError(
                f"The model already has adapters of {', '.join(others)}, and PEFT before 0.21 would freeze them. "
                "Upgrade PEFT, or unload them."
            )
        if config.bias != "none" and not PEFT_AT_LEAST_0_21:
            raise ValueError(
                f"bias={config.bias!r} needs peft>=0.21: older versions train the biases but do not save them. "
                "Upgrade PEFT, or set bias='none'."
            )
        super()._check_new_adapter_config(config)

    def _prepare_adapter_config(self, peft_config: LoRAMoEConfig, model_config: dict[str, Any]) -> LoRAMoEConfig:
        if peft_config.target_modules is None:
            targets = default_targets(
                self.model, model_config, peft_config.exclude_modules, self.target_module_mapping
            )
            # PEFT makes sets of lists, too.
            peft_config.target_modules, peft_config.exclude_modules = cast("Any", targets)
        check_names(self.model, peft_config.target_modules)
        self._check_nothing_inside_adapted_blocks(peft_config)
        return peft_config

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Inject an adapter as PEFT does; if it is refused half-way, the model is as it was before.

        Raises:
            ValueError: the adapter's name cannot be saved, or its options do not fit the model.
        """
        check_adapter_name(adapter_name)
        with unchanged_on_failure(model):
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            if (recorder := find_recorder(model)) is not None:
                recorder.handles.append(UnpackedWeights(model))

    def _create_and_replace(
        self,
        peft_config: LoRAMoEConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **_: Any,
    ) -> None:
        if isinstance(target, LoRAMoELayer):
            target.update_layer(adapter_name, peft_config)
            return
        if isinstance(target, BaseTunerLayer):
            raise ValueError(
                f"Target module '{current_key}' already carries a {type(target).__module__} adapter. A layer holds "
                "adapters of one method: unload that adapter, or target other modules."
            )
        if is_bypassed(parent, target_name):
            raise ValueError(
                f"Target module '{current_key}' is incompatible with Mamba-based models: kernels of the mixer read "
                "its weight and never call it, so an adapter there would have no effect. Leave it out with "
                f"exclude_modules. Linear layers that can be adapted: {candidates(self.model)}."
            )
        if is_routed_expert(self.model, current_key):
            raise ValueError(
                f"Target module '{current_key}' is one of the backbone's routed experts, which "
                f"{around_routed_experts(self.model)} Where a name fits both, set "
                r"exclude_modules=r'.*\.experts\..*'."
            )
        if is_router(target):
            raise ValueError(
                f"Target module '{current_key}' is the backbone's router: it returns which experts a token goes to, "
                "so nothing can be added to its output. Leave it out with exclude_modules. Linear layers that can be "
                f"adapted: {candidates(self.model)}."
            )
        if is_linear(target):
            layer = LoRAMoELinear(target, current_key, self._shared_recorder())
            layer.quantization_backend = quantization_backend_of(target)
        elif is_block(target):
            self._check_nothing_inside(peft_config, current_key, target)
            features = block_features(self.model, current_key)
            layer = LoRAMoEBlock(target, current_key, features, self._shared_recorder())
        else:
            raise ValueError(
                f"Target module {target} is not supported: '{current_key}' is no linear layer that the model calls, "
                "nor a block of them with one input. Use target_modules to name nn.Linear, Conv1D or quantised linear "
                "layers, or feed-forward blocks, or exclude_modules to leave it out."
            )
        layer._active_adapter = self.active_adapters
        layer.update_layer(adapter_name, peft_config)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)  # a further adapter waits for set_adapter
        self._replace_module(parent, target_name, layer, target)

    def _check_nothing_inside(self, config: LoRAMoEConfig, name: str, block: nn.Module) -> None:
        """Refuse a block if a module inside it is targeted or adapted too.

        Raises:
            ValueError: one is.
        """
        for child, module in list(block.named_modules())[1:]:
            inside = f"{name}.{child}"
            if isinstance(module, BaseTunerLayer) or self._check_target_module_exists(config, inside):
                what = "is adapted already" if isinstance(module, BaseTunerLayer) else "is targeted too"
                raise ValueError(
                    f"Target module '{name}' is a block, and '{inside}' inside it {what}. A mixture beside a block "
                    "covers what is inside: name the block or the layers, or leave one out with exclude_modules."
                )

    def _check_nothing_inside_adapted_blocks(self, config: LoRAMoEConfig) -> None:
        """Refuse targets inside of blocks that have an adapter already: PEFT would pass over them.

        Raises:
            ValueError: there is one.
        """
        blocks = [module for module in self.model.modules() if isinstance(module, LoRAMoEBlock)]
        for block in blocks:
            for child, module in block.base_layer.named_modules():
                inside = f"{block.name}.{child}"
                if child and is_linear(module) and self._check_target_module_exists(config, inside):
                    raise ValueError(
                        f"Target module '{inside}' is inside of the block '{block.name}', which is adapted already. A "
                        "mixture beside a block covers what is inside: leave the layer out with exclude_modules."
                    )

    def _shared_recorder(self) -> Recorder:
        """The base model's recorder; the first call installs its hooks."""
        recorder = find_recorder(self.model)
        if recorder is None:
            recorder = Recorder(self.peft_config)
            recorder.install(self.model)
            recorder.handles.append(self.model.register_load_state_dict_pre_hook(check_adapter_tensors))
            below_head = getattr(self.model, "base_model", self.model)
            for model in {self.model, below_head}:  # trainers that apply the head themselves call the second
                recorder.handles.append(model.register_forward_pre_hook(NonReentrantCheckpointing(recorder)))
        recorder.adapters = self.peft_config
        return recorder

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT would move the adapter again, to where a `weight` is: on "meta" if accelerate offloads it, and GPTQ, AWQ
        # and HQQ layers have none.
        setattr(parent, child_name, new_module)

    @classmethod
    def _get_adapter_state_dict(cls, *args: Any, state_dict: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """What PEFT saves, and the layers inside wrapped decoder layers, which it overlooks."""
        own = {key: tensor for key, tensor in state_dict.items() if is_of_experts(key)}
        return {**own, **super()._get_adapter_state_dict(*args, state_dict=state_dict, **kwargs)}

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return without_adapter_name(key, adapter_name) if is_of_experts(key) else key

    def _add_modules_to_save_to_tie(self, peft_config: LoRAMoEConfig, tied_weight_keys: list[str]) -> None:
        """Save the input embedding only, and let PEFT tie its copies (`ensure_weight_tying`)."""
        embedding = self.model.get_input_embeddings()
        name = next(name for name, module in self.model.named_modules() if module is embedding)
        tied = set(tied_weight_keys)
        saved = [
            module
            for module in peft_config.modules_to_save or []
            if not any(re.match(rf"(^|.*\.){module}($|\..*)", key) for key in tied)
        ]
        peft_config.modules_to_tie = tied
        peft_config.modules_to_save = [*saved, *([] if name in saved else [name])]

    def _add_targets_to_tie(self, peft_config: LoRAMoEConfig, tied_weight_keys: list[str]) -> None:
        raise ValueError(
            f"ensure_weight_tying=True cannot tie the adapters of target_modules={shown(peft_config.target_modules)}: "
            "an embedding has no linear layer to adapt. Name the embedding in modules_to_save instead, or set "
            "ensure_weight_tying=False."
        )

    def _check_merge_allowed(self) -> None:
        raise ValueError(CANNOT_MERGE)

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Refused: a weighted sum of mixtures with routers of their own is no such mixture.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "LoRAMoE adapters cannot be combined into one by weights: each has a router of its own. Activate several "
            "adapters together instead, model.base_model.set_adapter([...]): their contributions add up."
        )

    def _unload_and_optionally_merge(self, merge: bool = True, **kwargs: Any) -> nn.Module:
        recorder = find_recorder(self.model)
        model = cast("nn.Module", super()._unload_and_optionally_merge(merge=merge, **kwargs))  # PEFT's type: None
        if recorder is not None:
            recorder.remove()
        return model

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Generator[None]:
        """Hand `adapter_names`, one for each sample, to the adapted layers for the duration of one call."""
        adapter_names = kwargs.pop("adapter_names", None)
        if adapter_names is None:
            yield
            return
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        layers = [m for m in self.modules() if isinstance(m, (LoRAMoELayer, AuxiliaryTrainingWrapper))]
        known = {name for m in layers if isinstance(m, LoRAMoELayer) for name in m.loramoe_experts}
        if unknown := sorted(set(adapter_names) - known - {"__base__"}):
            raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}")

        # Beam search repeats every sample, but an encoder runs before it does.
        num_beams = kwargs.get("num_beams")
        names = [name for name in adapter_names for _ in range(num_beams if isinstance(num_beams, int) else 1)]
        encoder = self.model.get_encoder() if hasattr(self.model, "get_encoder") else None
        in_encoder = set(encoder.modules()) if isinstance(encoder, nn.Module) and encoder is not self.model else set()
        handles = [
            layer.register_forward_pre_hook(
                partial(
                    _pass_adapter_names, names=adapter_names if layer in in_encoder else names, thread=get_ident()
                ),
                with_kwargs=True,
            )
            for layer in layers
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _pass_adapter_names(
    module: nn.Module, args: Any, kwargs: Any, *, names: list[str], thread: int
) -> tuple[Any, Any]:
    # Hooks are shared by all threads, the names belong to the call of one.
    return (args, {**kwargs, "adapter_names": names}) if get_ident() == thread else (args, kwargs)
