"""What is read of a model's recorder: the balance term, the terms of its layers, how they routed."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ..config import LoRAMoEConfig
from .hooks import LayerRouting, Recorder


def find_recorder(model: nn.Module) -> Recorder | None:
    """The recorder of the adapted layers in `model`, or None if it has none."""
    return next((r for m in model.modules() if isinstance(r := getattr(m, "recorder", None), Recorder)), None)


def _recorder_of(model: nn.Module) -> Recorder:
    found = {id(r): r for m in model.modules() if isinstance(r := vars(m).get("recorder"), Recorder)}
    if not found:
        raise ValueError(f"{type(model).__name__} has no LoRAMoE layers; attach them with get_peft_model first.")
    if len(found) > 1:
        raise ValueError(
            f"{type(model).__name__} holds {len(found)} adapted models. Each has a balance term and a routing of its "
            "own: ask each of them, and add the terms."
        )
    return next(iter(found.values()))


def configs_of(model: nn.Module) -> dict[str, LoRAMoEConfig]:
    """The configurations of the LoRAMoE adapters, by adapter name.

    Raises:
        ValueError: the model has no LoRAMoE layers.
    """
    return _recorder_of(model).configs


def balance_loss(model: nn.Module) -> Tensor:
    """The balance term of the last forward pass: the sum over layers, times `balance_loss_weight`.

    In training mode `outputs.loss` already contains it. Add it yourself where the loss is computed outside the model,
    before the next forward pass; it carries gradient. After `collect_balance`, it is the term of all passes collected.

    Args:
        model: the adapted model, wrapped in whatever way.

    Returns:
        A scalar in the dtype of the router probabilities, float32 by default; zero if no adapter was active.

    Raises:
        RuntimeError: it is read with gradient in a `compute_loss` to which `LoRAMoETrainerMixin` adds it.
        ValueError: `model` has no LoRAMoE layers or holds several adapted models, or the term cannot be computed (the
            message says why).

    Example:
        >>> import torch
        >>> model = tiny_model().train()
        >>> batch = {"input_ids": torch.tensor([[5, 6, 7], [8, 9, 10]])}
        >>> output = model(**batch, task_types=[0, 1])
        >>> loss = torch.nn.functional.cross_entropy(output.logits[:, :-1].mT, batch["input_ids"][:, 1:])
        >>> (loss + balance_loss(model)).backward()
    """
    return _recorder_of(model).loss()


@contextmanager
def collect_balance(model: nn.Module, task_types: Any = None) -> Generator[None]:
    """Take all training passes inside for one batch; read its term with `balance_loss` afterwards.

    For losses that are computed outside the model, or from several passes (preference and contrastive losses): inside,
    no `outputs.loss` contains the term. Passes without gradient, such as a reference model's, are left out.

    Args:
        model: the adapted model, wrapped in whatever way.
        task_types: for calls that are not given any, as the model takes them, or one integer or name for all samples;
            a call that has the batch's rows several times over (first all chosen, then all rejected answers) repeats
            them.

    Raises:
        ValueError: `model` has no LoRAMoE layers, or holds several adapted models.
        RuntimeError: `collect_balance` is open already.

    Example:
        >>> import torch
        >>> model = tiny_model().train()
        >>> chosen, rejected = torch.tensor([[5, 6, 7]]), torch.tensor([[5, 8, 9]])
        >>> with collect_balance(model, task_types=[1]):
        ...     margin = (model(input_ids=chosen).logits - model(input_ids=rejected).logits).mean()
        >>> (margin + balance_loss(model)).backward()
    """
    with _recorder_of(model).collect(task_types):
        yield


def balance_terms(model: nn.Module) -> dict[str, dict[str, Tensor]]:
    """The unweighted balance term of each adapted linear in the last forward pass: adapter -> layer name -> scalar.

    They are computed together, so that a backward pass through one of them before another needs `retain_graph=True`.

    Raises:
        ValueError: as `balance_loss`.

    Example:
        >>> import torch
        >>> model = tiny_model().train()
        >>> batch = {"input_ids": torch.tensor([[5, 6, 7], [8, 9, 10]])}
        >>> output = model(**batch, task_types=[0, 1])
        >>> [name.split(".")[-1] for name in balance_terms(model)["default"]][:3]
        ['gate_proj', 'up_proj', 'down_proj']
    """
    return _recorder_of(model).terms()


def layer_routing(model: nn.Module) -> list[LayerRouting]:
    """How each adapted linear routed the samples of the last forward pass, in the order of the layers.

    Raises:
        ValueError: as `balance_loss`.

    Example:
        >>> import torch
        >>> model = tiny_model()
        >>> output = model(input_ids=torch.tensor([[5, 6, 7], [8, 9, 10]]), task_types=[0, 1])
        >>> first = layer_routing(model)[0]
        >>> first.layer, first.importance.shape, first.token_counts.tolist()
        ('model.layers.0.mlp.gate_proj', torch.Size([2, 6]), [3, 3])
    """
    return _recorder_of(model).routing()
