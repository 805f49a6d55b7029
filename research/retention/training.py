"""One run: fine-tune, score, and what happened to the routers on the way."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import math
import random
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, OSFConfig, PeftModel, get_peft_model
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.osf.layer import OSFLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

import peft_loramoe
from peft_loramoe.training import optimizer_groups

from .base_model import load
from .knowledge import Encoder, is_held_back, read, read_facts
from .methods import Method, Run
from .scoring import Item, Score, answer_logits, base_of, packed_answer_logits, score
from .tasks import samples
from .terms import TERMS, Importance, normalise_routers


SCORED_TASKS = 160
CLIP = 1.0
WARMUP = 0.05
LOG_EVERY = 8
MOST_LOGGED = 200  # steps of a run
GRADIENT_STEPS = (0, 8, 24)


def run(
    one: Run,
    scales: Sequence[float] = (1.0,),
    model_name: str | None = None,
    device: str = "cpu",
    adapters: Path | None = None,
) -> Iterator[tuple[float, dict[str, Any]]]:
    """Fine-tune once, and score what was trained at each scale.

    Args:
        one: what to run.
        scales: values of the method's `scale`.
        model_name: name or folder of the base model; None for SmolLM2.
        device: where the model is.
        adapters: folder in which the adapter is saved, in a folder named after the run; None to save none.

    Yields:
        The scale, and the row: scores, router weights, log of the training, times.
    """
    start = time.perf_counter()
    method = one.settings
    base, tokenizer = load(model_name, load_in_4bit=method.load_in_4bit)
    base, encoder = base.to(device), Encoder(tokenizer)
    model, training, trainable = base, {}, 0
    before = copy.deepcopy(base).requires_grad_(False) if method.changes_base else None
    if method.tuner:
        model = adapt(base, method, one.seed, encoder)
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        training = train(model, method, one, encoder, before)
    training_time = time.perf_counter() - start
    if adapters is not None and isinstance(model, PeftModel):
        model.save_pretrained(str(adapters / one.name))
    for scale in scales:
        start = time.perf_counter()
        with scaled(model, scale, before.state_dict() if method.tuner == "full" else None):
            scores = evaluate(model, encoder, one)
        yield (
            scale,
            {
                "settings": dataclasses.asdict(one.at_scale(scale).settings),
                **scores,
                **training,
                "trainable": trainable,
                "seconds": {"training": round(training_time), "scoring": round(time.perf_counter() - start)},
            },
        )


def adapt(base: PreTrainedModel, method: Method, seed: int, encoder: Encoder) -> nn.Module:
    """The base model with the method's adapter, initialised by `seed`, or with all weights trainable."""
    torch.manual_seed(seed)
    if method.tuner == "full":
        return base.requires_grad_(True)
    if method.tuner == "osf":
        return get_peft_model(base, OSFConfig(**method.config))
    if method.is_mixture:
        model = get_peft_model(base, peft_loramoe.LoRAMoEConfig(**method.config))
        if method.normalised_router:
            normalise_routers(model)
        return model
    config = LoraConfig(**method.config)
    if config.corda_config:  # in knowledge-preserved mode the directions that matter least for the anchors are trained
        anchors = training_anchors(encoder)
        preprocess_corda(base, config, run_model=torch.no_grad()(lambda: packed_answer_logits(base, anchors)))
    return get_peft_model(base, config)


def scale_layer(layer: BaseTunerLayer, scale: float) -> Callable[[], None]:
    """Multiply what a layer's adapter adds by `scale`; call what is returned to undo it."""
    if not isinstance(layer, OSFLayer):
        layer.scale_layer(scale)
        return layer.unscale_layer
    # OSF has no scale. It adds U S V - U_0 S_0 V_0, so both sets of singular values are scaled.
    values = [layer.osf_svd_params["default"]["S_low"].data, layer._osf_S_low_init["default"]]
    former = [value.clone() for value in values]
    for value in values:
        value.mul_(scale)

    def unscale() -> None:
        for value, kept in zip(values, former):
            value.copy_(kept)

    return unscale


@contextmanager
def scaled(model: nn.Module, scale: float, before: dict[str, Tensor] | None) -> Iterator[None]:
    """Multiply what was trained by `scale`: the adapter, or, with the weights before, the change of all weights."""
    if scale == 1:
        yield
        return
    if before is None:
        undo = [scale_layer(module, scale) for module in model.modules() if isinstance(module, BaseTunerLayer)]
        yield
        for unscale in undo:
            unscale()
        return
    after = copy.deepcopy(model.state_dict())
    model.load_state_dict({name: before[name].lerp(after[name], scale) for name in after})
    yield
    model.load_state_dict(after)


def training_batches(method: Method, one: Run, encoder: Encoder) -> list[tuple[list[Item], list[int], list[Item]]]:
    """The steps of a run: samples, their task types, and the anchors beside them."""
    draw = random.Random(f"order {one.seed}")
    rows = [(encoder.sample(sample), 1) for sample in samples(one.samples, one.seed, scored=False)]
    facts = [encoder.replay(fact) for fact in read_facts() if fact.use == "replay"]
    chosen = draw.sample(range(len(facts)), round(method.replay * one.samples))
    rows += [(facts[i], method.replay_type) for i in chosen]
    draw.shuffle(rows)
    steps = [rows[i : i + one.batch] for i in range(0, len(rows), one.batch)]
    anchors = training_anchors(encoder, method.anchor_file) if method.anchors else []
    draw.shuffle(anchors)
    number = round(method.anchors * one.samples)
    anchors = (anchors * math.ceil(number / max(1, len(anchors))))[:number]
    if method.anchor_schedule == "every_step":
        of_step = [i * len(steps) // max(1, number) for i in range(number)]
    else:
        of_step = [draw.randrange(len(steps)) for _ in range(number)]
    beside = defaultdict(list)
    for anchor, step in zip(anchors, of_step):
        beside[step].append(anchor)
    return [([item for item, _ in rows], [kind for _, kind in rows], beside[i]) for i, rows in enumerate(steps)]


def training_anchors(encoder: Encoder, file: str | None = None) -> list[Item]:
    """The anchors that are trained on: those of a file, or the study's own, of which the others are scored."""
    if file:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
        return [encoder.text(json.loads(line)["text"]) for line in lines]
    return [encoder.text(row["text"]) for i, row in enumerate(read("anchors.jsonl")) if not is_held_back(i)]


def train(
    model: nn.Module, method: Method, one: Run, encoder: Encoder, before: nn.Module | None = None
) -> dict[str, Any]:
    """Fine-tune in one pass; returns the log.

    `before` is the base model if it cannot be had from `model`.
    """
    batches = training_batches(method, one, encoder)
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": parameters}]
    if method.is_mixture:
        groups = optimizer_groups(model, lr=method.lr, router_lr=method.lr * method.router_lr_multiplier)
    optimizer = torch.optim.AdamW(groups, lr=method.lr, weight_decay=0.0)
    warmup, steps = max(1, round(WARMUP * len(batches))), len(batches)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(1, (i + 1) / warmup) * (1 - i / steps))
    importance = Importance(model) if method.term != "package" else None
    log: dict[str, list] = {"steps": [], "gradients": []}
    tokens = sum(len(item.before) + len(item.answer) for items, _, anchors in batches for item in items + anchors)
    began = time.perf_counter()
    model.train()
    for step, (items, types, anchors) in enumerate(batches):
        task, anchor, kl, term, weights = losses(
            model, method, items, types, anchors, importance, before, log=step % LOG_EVERY == 0
        )
        if method.is_mixture and not method.config.get("balance_detach") and step in GRADIENT_STEPS:
            log["gradients"].append({"step": step, "loss": gradients(model, task), "term": gradients(model, term)})
        (task + method.anchor_lm_weight * anchor + method.anchor_kl_weight * kl + term).backward()
        norm = nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % (1 + steps // MOST_LOGGED):
            continue
        values = {"step": step, "task": task, "anchor": anchor, "kl": kl, "term": term, "gradient_norm": norm}
        log["steps"].append(
            {name: round(torch.as_tensor(value).item(), 4) for name, value in values.items()} | weights
        )
        print(log["steps"][-1], flush=True)
    model.eval()
    return {"log": log, "tokens": tokens, "tokens_per_second": round(tokens / (time.perf_counter() - began), 1)}


def losses(
    model: nn.Module,
    method: Method,
    items: list[Item],
    types: Sequence[int],
    anchors: list[Item],
    importance: Importance | None,
    before: nn.Module | None = None,
    *,
    log: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, dict[str, float]]:
    """The losses of one step, and the null group's weights.

    Returns:
        The tasks' language-modelling loss, the anchors', their divergence from the base model, the balance term; the
        weights by task type.
    """
    mixture = method.is_mixture
    weights: dict[str, float] = {}
    anchor = kl = term = torch.zeros(())
    if anchors and method.anchor_kl_weight:
        with torch.no_grad(), nullcontext() if before else model.disable_adapter():
            expected = _logits(before or model, anchors, None, importance)[0].log_softmax(-1)
    with peft_loramoe.collect_balance(model) if mixture else nullcontext():
        logits, tokens = _forward(model, items, importance, types if mixture else None)
        task = nn.functional.cross_entropy(logits, tokens)
        if anchors and (method.anchor_balance or method.anchor_lm_weight or method.anchor_kl_weight):
            logits, tokens = _forward(model, anchors, importance, [0] * len(anchors) if mixture else None)
            anchor = nn.functional.cross_entropy(logits, tokens)
            if method.anchor_kl_weight:
                kl = nn.functional.kl_div(logits.log_softmax(-1), expected, reduction="batchmean", log_target=True)
    if mixture and importance is None:
        term = peft_loramoe.balance_loss(model)
    elif importance is not None:
        beta, delta = method.config["balance_loss_weight"], method.config["balance_delta"]
        term = beta * TERMS[method.term](*importance.pop(), importance.groups, delta)
    if mixture and log:
        weights = _weights_by_type(model)
    return task, anchor, kl, term, weights


def _forward(
    model: nn.Module, items: list[Item], importance: Importance | None, types: Sequence[int] | None
) -> tuple[Tensor, Tensor]:
    logits, tokens = _logits(model, items, types, importance)
    if importance is not None:
        importance.end_pass([len(item.before) + len(item.answer) for item in items], types)
    return logits, tokens


def _logits(
    model: nn.Module, items: list[Item], types: Sequence[int] | None, importance: Importance | None
) -> tuple[Tensor, Tensor]:
    # On a GPU padding costs little, and the attention over a row of hundreds of items much. `Importance` reads rows
    # without padding.
    pack = importance is not None or base_of(model).device.type == "cpu"
    return (packed_answer_logits if pack else answer_logits)(model, items, types)


def _weights_by_type(model: nn.Module) -> dict[str, float]:
    by_type = defaultdict(list)
    for layer in peft_loramoe.layer_routing(model):
        shares = layer.importance[:, layer.groups.slices[0]].sum(-1) / layer.token_counts
        for kind, share, count in zip(layer.task_types.tolist(), shares.tolist(), layer.token_counts.tolist()):
            if count:
                by_type[kind].append(share)
    return {f"null_{kind}": round(sum(values) / len(values), 3) for kind, values in sorted(by_type.items())}


def gradients(model: nn.Module, loss: Tensor) -> dict[str, list[float]]:
    """Norm of a loss's gradient with respect to A, B and the routers of each block."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, [p for _, p in named], retain_graph=True, allow_unused=True)
    squares: dict[str, dict[int, float]] = defaultdict(lambda: defaultdict(float))
    for (name, _), gradient in zip(named, found):
        role, block = name.rsplit(".", 1)[1], int(re.search(r"layers\.(\d+)\.", name)[1])
        squares[role][block] += float(gradient.square().sum()) if gradient is not None else 0.0
    return {role: [float(f"{blocks[b] ** 0.5:.3g}") for b in sorted(blocks)] for role, blocks in squares.items()}


@functools.cache
def scored_sets(encoder: Encoder, part: float) -> dict[str, tuple[list[Item], list[str]]]:
    """What is scored, by name: items and the kind of each."""
    facts = read_facts()
    sets: dict[str, list[tuple[Item, str]]] = {}
    for form in ("statement", "question"):
        sets[form] = [(encoder.fact(fact, form), fact.kind) for fact in facts if fact.use in (form, "both")]
    sets["text"] = [(encoder.text(row["text"]), row["kind"]) for row in read("texts.jsonl")]
    sets["anchor"] = [
        (encoder.text(row["text"]), row["kind"]) for i, row in enumerate(read("anchors.jsonl")) if is_held_back(i)
    ]
    sets["request"] = [(encoder.request(row["request"], row["answer"]), row["kind"]) for row in read("requests.jsonl")]
    sets["task"] = [(encoder.sample(sample), sample.task) for sample in samples(SCORED_TASKS, "scored", scored=True)]
    chosen = {}
    for name, pairs in sets.items():
        pairs = random.Random(name).sample(pairs, round(part * len(pairs)))
        chosen[name] = ([item for item, _ in pairs], [kind for _, kind in pairs])
    return chosen


def evaluate(model: nn.Module, encoder: Encoder, one: Run) -> dict[str, Any]:
    """Scores of all sets, and the null group's weight on each."""
    model.eval()
    scores, weights = {}, {}
    for name, (items, kinds) in scored_sets(encoder, one.part).items():
        found, null = score(model, items)
        scores[name] = summary(found, items, kinds)
        if null is not None:
            weights[name] = {
                "mean": round(float(null.mean()), 4),
                "linears": [round(w, 3) for w in null.mean(0).tolist()],
            }
    return {"scores": scores, "null_weight": weights}


def summary(scores: list[Score], items: list[Item], kinds: list[str]) -> dict[str, Any]:
    """Loss in nats per token, also by kind.

    For each item, whether it is greedy and ranked right, as strings of 0 and 1.
    """

    def loss(chosen: Sequence[int]) -> float:
        total = sum(scores[i].log_likelihood for i in chosen)
        return round(-total / sum(len(items[i].answer) for i in chosen), 4)

    by_kind = {kind: [i for i, other in enumerate(kinds) if other == kind] for kind in sorted(set(kinds))}
    return {
        "loss": loss(range(len(items))),
        "greedy": "".join(str(int(result.greedy)) for result in scores),
        "ranked": "".join(str(int(result.ranked)) for result in scores),
        "loss_by_kind": {kind: loss(chosen) for kind, chosen in by_kind.items()},
        "greedy_by_kind": {kind: round(sum(scores[i].greedy for i in c) / len(c), 3) for kind, c in by_kind.items()},
    }
