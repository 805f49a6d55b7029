"""Where vLLM is changed: reading an adapter, placing it in slots, and what a linear does between its two products.

Needs vLLM. Only `LoRAConfig.compute_hash` and the signatures of `PunicaWrapperBase` are documented interfaces; the
rest is private, and each name is used here only.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any, get_args

import torch
from torch import Tensor, nn
from vllm.config.lora import LoRAConfig, MaxLoRARanks
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.lora.layers import (
    BaseLayerWithLoRA,
    ColumnParallelLinearWithShardedLoRA,
    LoRAMapping,
    MergedColumnParallelLinearWithShardedLoRA,
    MergedQKVParallelLinearWithShardedLoRA,
    QKVParallelLinearWithShardedLoRA,
    RowParallelLinearWithLoRA,
    RowParallelLinearWithShardedLoRA,
)
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.lora.lora_model import LoRAModel
from vllm.lora.model_manager import LoRAModelManager
from vllm.lora.peft_helper import PEFTHelper
from vllm.lora.utils import parse_fine_tuned_lora_name
from vllm.model_executor.models.utils import PPMissingLayer

from ..interop.files import CONFIG, PREFIX, abbreviate
from ..version import __version__
from .adapter import SlotLayer, read_layers
from .gates import GateTables


# Largest difference from the formula at loading, relative to the largest output. Rounding to bfloat16 stays below it,
# and wrong gates do not.
TOLERANCE = 5e-2
CHECKED_TOKENS = 4
FULLY_SHARDED = (
    ColumnParallelLinearWithShardedLoRA,
    MergedColumnParallelLinearWithShardedLoRA,
    MergedQKVParallelLinearWithShardedLoRA,
    QKVParallelLinearWithShardedLoRA,
    RowParallelLinearWithShardedLoRA,
)


def install() -> None:
    """Replace the methods below, once in a process."""
    if getattr(LoRAModelManager, "_loramoe", False):
        return
    LoRAModelManager._loramoe = True
    _replace(LoRAConfig, "compute_hash", _compute_hash)
    _replace(PEFTHelper, "from_local_dir", _from_local_dir)
    _replace(LoRAModel, "from_local_checkpoint", _from_local_checkpoint)
    _replace(BaseLayerWithLoRA, "set_mapping", _set_mapping)
    _replace(LoRAModelManager, "_add_adapter", _add_adapter)
    _replace(LoRAModelManager, "activate_adapter", _activate_adapter)


def _replace(owner: type, name: str, function: Callable) -> None:
    """Put `function` in place of a method; its first argument is what the method did before."""
    kind = owner.__dict__[name]
    before = kind.__func__ if isinstance(kind, classmethod) else kind

    @wraps(before)
    def after(*args: Any, **kwargs: Any) -> Any:
        return function(before, *args, **kwargs)

    setattr(owner, name, classmethod(after) if isinstance(kind, classmethod) else after)


def _compute_hash(before: Callable, self: LoRAConfig) -> str:
    """Graphs that vLLM has compiled and kept without the plugin have no gates, so they must not be used with it."""
    return f"{before(self)}-loramoe-{__version__}"


class MixtureHelper(PEFTHelper):
    """What vLLM knows of a LoRAMoE adapter before it loads the tensors: it looks like a LoRA with scaling 1."""

    layers: dict[str, SlotLayer]
    folder: str

    def validate_legal(self, lora_config: LoRAConfig) -> None:
        """Check the rank of the slots, which depends on their dtype.

        Raises:
            ValueError: `max_lora_rank` is too small; the message says what to set.
        """
        module, layer = max(self.layers.items(), key=lambda item: item[1].layout.rank(lora_config.lora_dtype))
        layout = layer.layout
        self.r = self.lora_alpha = rank = layout.rank(lora_config.lora_dtype)
        if rank <= lora_config.max_lora_rank:
            return
        enough = next((limit for limit in get_args(MaxLoRARanks) if limit >= rank), None)
        advice = (
            f"start vLLM with --max-lora-rank {enough} (max_lora_rank={enough})"
            if enough
            else f"vLLM's largest is {max(get_args(MaxLoRARanks))}; serve it with PEFT, or train fewer experts"
        )
        raise ValueError(
            f"max_lora_rank={lora_config.max_lora_rank} is too small for the LoRAMoE adapter '{self.folder}': with "
            f"{len(layout.experts)} experts of rank {layout.r} and a router of {layout.num_experts} outputs, in "
            f"{lora_config.lora_dtype}, '{module}' takes a rank of {rank}; {advice}."
        )


def _from_local_dir(before: Callable, cls: type, lora_path: str, max_position_embeddings: int | None) -> PEFTHelper:
    if not _is_loramoe(lora_path):
        return before(cls, lora_path, max_position_embeddings)
    helper = MixtureHelper(
        r=1, lora_alpha=1, target_modules=[], vllm_max_position_embeddings=max_position_embeddings
    )  # the rank follows when the dtype of the slots is known
    helper.layers, helper.folder = read_layers(lora_path), lora_path
    return helper


def _is_loramoe(folder: str) -> bool:
    try:
        with open(os.path.join(folder, CONFIG), encoding="utf-8") as file:
            config = json.load(file)
    except (OSError, ValueError):  # vLLM says what is wrong
        return False
    return isinstance(config, dict) and config.get("peft_type") == "LORAMOE"


def _from_local_checkpoint(
    before: Callable,
    cls: type,
    lora_dir: str,
    expected_lora_modules: set[str],
    peft_helper: PEFTHelper,
    **options: Any,
) -> LoRAModel:
    if not isinstance(peft_helper, MixtureHelper):
        return before(cls, lora_dir, expected_lora_modules, peft_helper, **options)
    dtype, mapper = options["dtype"], options.get("weights_mapper")
    tensors, layers = {}, {}
    for module, layer in peft_helper.layers.items():
        name = f"{PREFIX}{module}.lora_A.weight"
        tensors[name] = layer.lora_a(dtype)
        tensors[f"{PREFIX}{module}.lora_B.weight"] = layer.lora_b(dtype)
        layers[parse_fine_tuned_lora_name(name, mapper)[0]] = layer
    kept = ("lora_model_id", "device", "dtype", "model_vocab_size", "weights_mapper", "skip_prefixes")
    lora = cls.from_lora_tensors(
        tensors=tensors, peft_helper=peft_helper, **{name: options[name] for name in kept if name in options}
    )
    lora.loramoe = layers
    lora.loramoe_folder = lora_dir
    return lora


class GatedPunica:
    """The punica wrapper of one linear, with the gates between its two products.

    vLLM's linears reach their kernels through it, whether they are packed, sharded, or run on a stream of their own.

    Args:
        wrapper: the wrapper that all linears share.
        tables: how the slots of this linear are gated.
        sums_logits: whether each process has the logits of a shard of the input only.
    """

    def __init__(self, wrapper: Any, tables: GateTables, sums_logits: bool) -> None:
        self.wrapper, self.tables, self.sums_logits = wrapper, tables, sums_logits

    def __getattr__(self, name: str) -> Any:
        if name == "wrapper":  # not set yet, as in a copy
            raise AttributeError(name)
        return getattr(self.wrapper, name)

    def add_lora_linear(
        self,
        y: Tensor,
        x: Tensor,
        lora_a_stacked: tuple[Tensor, ...],
        lora_b_stacked: tuple[Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        *,
        add_inputs: bool = True,
        **kwargs: Any,
    ) -> Tensor | None:
        """``y += gated(x A'^T) B'^T``, for each token with the matrices and gates of its slot."""
        tables, width = self.tables, None
        if x.device.type == "cpu" and not _is_kept(x):
            # There vLLM copies the matrices of a slot for every token, so what no slot uses is left out.
            if not tables.rank_in_use and add_inputs:
                return None
            if tables.occupied:
                width = tables.channels_in_use
                lora_a_stacked = tuple(stacked[:, :, : tables.rank_in_use] for stacked in lora_a_stacked)
                lora_b_stacked = tuple(stacked[..., :width] for stacked in lora_b_stacked)
        if not self._is_gated(x):
            kwargs = kwargs if add_inputs else {**kwargs, "add_inputs": False}
            return self.wrapper.add_lora_linear(y, x, lora_a_stacked, lora_b_stacked, scale, output_slices, **kwargs)
        # zeros, since kernels leave out rows without an adapter
        shape = (len(output_slices), x.shape[0], lora_a_stacked[0].shape[-2])
        channels = torch.zeros(shape, dtype=torch.float32, device=x.device)
        returned = self.wrapper.add_shrink(channels, x, lora_a_stacked, scale)
        channels = channels if returned is None else returned  # where nothing is changed in place
        # a copy, since some devices sum in place
        logits = tensor_model_parallel_all_reduce(channels.clone()) if self.sums_logits else None
        gated = self._gate(channels, logits, width)
        return self.wrapper.add_expand(y, gated, lora_b_stacked, output_slices, add_inputs=add_inputs)

    def add_expand(
        self, y: Tensor, x: Tensor, lora_b_stacked: tuple[Tensor, ...], output_slices: tuple[int, ...], **kwargs: Any
    ) -> Tensor | None:
        """``y += gated(x) B'^T``; fully sharded layers have gathered the channels before it."""
        x = self._gate(x) if self._is_gated(x) else x
        return self.wrapper.add_expand(y, x, lora_b_stacked, output_slices, **kwargs)

    def _is_gated(self, x: Tensor) -> bool:
        return _is_kept(x) or self.tables.occupied

    def _gate(self, channels: Tensor, logits: Tensor | None = None, width: int | None = None) -> Tensor:
        slots = self.wrapper._token_lora_indices[: channels.shape[1]]
        return self.tables.gate(channels, slots, logits, selective=True if _is_kept(channels) else None, width=width)


def _is_kept(x: Tensor) -> bool:
    """Whether what is done now is recorded in a graph, which will run with whatever adapters are loaded later."""
    return torch.compiler.is_compiling() or (x.is_cuda and torch.cuda.is_current_stream_capturing())


def _set_mapping(before: Callable, self: BaseLayerWithLoRA, punica_wrapper: Any) -> None:
    if isinstance(self, BaseLinearLayerWithLoRA):
        slots, _, _, rank = self.lora_b_stacked[0].shape
        dtype, device = self.lora_b_stacked[0].dtype, self.lora_b_stacked[0].device
        tables = GateTables(self.n_slices, slots, rank, dtype, device)
        fully_sharded = self.lora_config.fully_sharded_loras
        sums_logits = isinstance(self, RowParallelLinearWithLoRA) and self.tp_size > 1 and not fully_sharded
        punica_wrapper = GatedPunica(punica_wrapper, tables, sums_logits)
    before(self, punica_wrapper)


def _add_adapter(before: Callable, self: LoRAModelManager, lora: LoRAModel) -> None:
    """Refuse a mixture whose linears are not all there, with the right sizes: vLLM would leave them out."""
    layers = getattr(lora, "loramoe", None)
    if layers is not None:
        placed = dict(_placed(self, layers))
        found = {id(layer) for parts in placed.values() for layer in parts}
        left = [name for name, layer in layers.items() if id(layer) not in found and not _is_elsewhere(self, name)]
        if left:
            raise ValueError(
                f"'{lora.loramoe_folder}' adapts {abbreviate(left)}, which are no linears that this vLLM adapts (its "
                f"model has {abbreviate(self.supported_lora_modules, 20)}; --lora-target-modules may leave some out). "
                "Check that the base model is the one that the adapter was trained on, or train with other "
                "target_modules."
            )
        for name, parts in placed.items():
            _check_sizes(lora.loramoe_folder, name, self.modules[name], parts)
    before(self, lora)


def _placed(manager: LoRAModelManager, layers: dict[str, SlotLayer]) -> Iterator[tuple[str, list[SlotLayer | None]]]:
    """Each linear of vLLM that has a mixture, and the mixtures of its slices."""
    prefixes = ("", "model.") if manager.is_pooling_model else ("",)  # which may be missing there
    for name, module in manager.modules.items():
        if isinstance(module, BaseLinearLayerWithLoRA):
            parts = [
                next((layers[key] for prefix in prefixes if (key := part.removeprefix(prefix)) in layers), None)
                for part in manager.packed_modules.get(name, [name])
            ]
            if any(part is not None for part in parts):
                yield name, parts


def _is_elsewhere(manager: LoRAModelManager, name: str) -> bool:
    """Whether another process of a pipeline has the layer."""
    module: nn.Module = manager.model
    for part in name.split("."):
        module = getattr(module, part, None)
        if not isinstance(module, nn.Module):
            return False
        if isinstance(module, PPMissingLayer):
            return True
    return False


def _check_sizes(folder: str, name: str, module: BaseLinearLayerWithLoRA, parts: list[SlotLayer | None]) -> None:
    if len(parts) not in (1, module.n_slices):
        raise ValueError(
            f"'{folder}': vLLM packs {len(parts)} linears with {module.n_slices} outputs into '{name}', which is not "
            "supported; train with target_modules that leave them out."
        )
    is_row_parallel = isinstance(module, RowParallelLinearWithLoRA)
    in_features = module.lora_a_stacked[0].shape[-1] * (module.tp_size if is_row_parallel else 1)
    outputs = _local_outputs(module, [None if part is None else part.B for part in parts])
    for i, (output, stacked) in enumerate(zip(outputs, module.lora_b_stacked)):
        if output is None:
            continue
        A = (parts[0] if len(parts) == 1 else parts[i]).A
        if (A.shape[1], output.shape[0]) != (in_features, stacked.shape[2]):
            raise ValueError(
                f"'{folder}' has A of {A.shape[1]} inputs and B of {output.shape[0]} outputs for '{name}', which has "
                f"{in_features} and {stacked.shape[2]}. Check that the base model is the one that the adapter was "
                "trained on."
            )


def _local_outputs(module: BaseLinearLayerWithLoRA, outputs: list[Tensor | None]) -> list[Tensor | None]:
    """The rows of each slice that this process has, of tensors with all rows of what was adapted."""
    if len(outputs) < module.n_slices:  # one linear in the checkpoint
        outputs = list(outputs[0].split(module.base_layer.output_sizes))
    if module.tp_size == 1:
        return outputs
    return module.slice_lora_b(outputs) if module.n_slices > 1 else [module.slice_lora_b(outputs[0])]


def _activate_adapter(before: Callable, self: LoRAModelManager, lora_id: int) -> bool:
    activated = before(self, lora_id)
    if not activated:
        return activated
    slot = self.lora_index_to_id.index(lora_id)
    lora = self._registered_adapters[lora_id]
    layers = getattr(lora, "loramoe", None)
    placed = dict(_placed(self, layers or {}))
    free = [index for index, held in enumerate(self.lora_index_to_id) if held is None]
    for name, module in self.modules.items():
        if isinstance(module, BaseLinearLayerWithLoRA):
            parts = placed.get(name, [None])
            layouts = [None if part is None else part.layout for part in parts]
            tables = module.punica_wrapper.tables
            layouts = layouts * module.n_slices if len(layouts) == 1 else layouts
            tables.set(slot, layouts, plain=layers is None)
            for index in free:
                tables.clear(index)
    if placed and not getattr(lora, "loramoe_checked", False):
        try:
            _check_outputs(self, lora, placed)
        except BaseException:
            self.remove_adapter(lora_id)
            raise
        lora.loramoe_checked = True
    return activated


def _check_outputs(manager: LoRAModelManager, lora: LoRAModel, placed: dict[str, list[SlotLayer | None]]) -> None:
    """Compare what a layer of each kind adds with the formula: nothing that vLLM has changed may go unnoticed.

    Raises:
        RuntimeError: they differ.
    """
    kinds = {}
    for name, parts in placed.items():
        module = manager.modules[name]
        kind = (type(module), *(part and (part.layout, part.A.shape, part.B.shape) for part in parts))
        kinds.setdefault(kind, (name, module, parts))
    # the last one without an adapter
    rows = (lora.id,) * CHECKED_TOKENS + (0,) * (manager.max_num_seqs > 1)
    manager.set_adapter_mapping(LoRAMapping(rows, rows, is_prefill=True))
    checked = manager._get_punica_wrapper(next(iter(placed)))
    try:
        for name, module, parts in kinds.values():
            if module.punica_wrapper.wrapper is checked:  # encoders of images have others
                _check_output(lora.loramoe_folder, name, module, parts, len(rows))
    finally:
        manager._last_mapping = None  # the batch sets its own again


@torch.no_grad()
def _check_output(
    folder: str, name: str, module: BaseLinearLayerWithLoRA, parts: list[SlotLayer | None], rows: int
) -> None:
    slots = module.lora_a_stacked[0]
    present = [part for part in parts if part is not None]
    x = torch.randn(rows, present[0].A.shape[1], generator=torch.Generator().manual_seed(0)).to(slots.dtype)
    certain = torch.stack([part.is_certain(x) for part in present]).all(0)
    whole = [None if part is None else part.reference(x, slots.dtype).T for part in parts]
    is_row_parallel = isinstance(module, RowParallelLinearWithLoRA)
    if is_row_parallel:
        expected = torch.cat(whole).T
        x = module.slice_lora_a(x) if module.tp_size > 1 else x
    else:
        zeros = [torch.zeros(stacked.shape[2], rows) for stacked in module.lora_b_stacked]
        local = _local_outputs(module, whole)
        expected = torch.cat([zero if part is None else part for part, zero in zip(local, zeros)]).T
    expected[CHECKED_TOKENS:] = 0
    base = _Zeros(expected.shape[1])
    module.__dict__["_get_quant_method"] = lambda: base
    try:
        x = x.to(slots.device)
        if isinstance(module, FULLY_SHARDED):
            output = module.apply(x)
        else:
            output = module._apply_lora_to_output(x, base.apply(module.base_layer, x))
    finally:
        del module.__dict__["_get_quant_method"]
    if is_row_parallel and module.tp_size > 1:
        output = tensor_model_parallel_all_reduce(output)
    if not certain.any():
        return
    difference = (output.double().cpu() - expected)[certain].abs().max().item()
    scale = expected.abs().max().item()
    if not difference <= TOLERANCE * scale:
        raise RuntimeError(
            f"vLLM does not compute the LoRAMoE adapter '{folder}' as the formula does, so it is refused: what "
            f"'{name}' adds differs by {difference:.2g} (largest entry {scale:.2g}). Use a version of vLLM that "
            "peft_loramoe was tried with (docs/serving.md)."
        )


class _Zeros:
    """A base layer that adds nothing."""

    def __init__(self, out_features: int) -> None:
        self.out_features = out_features

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return x.new_zeros(len(x), self.out_features)
