"""What a linear attention learns after it took over the projections: to weigh as softmax did, then the task itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from torchgraft.bench.task import Inputs, Task, call
from torchgraft.bench.training import supervised, train
from torchgraft.engines.distill import Teacher, objective
from torchgraft.engines.linearize.convert import SHORT_NAMES, Linearize, attentions, linear_attentions, method_of
from torchgraft.engines.linearize.graft import projections
from torchgraft.engines.linearize.kernel import (
    FeatureKernel,
    Heads,
    Kernel,
    softmax_weights,
)
from torchgraft.engines.parametrize import Spec, fold, parametrize
from torchgraft.engines.surgery.edits import apply_edits
from torchgraft.errors import BadInput

__all__ = ["LowRankUpdate", "attention_cross_entropy", "linearize", "mimic"]


def attention_cross_entropy(p: Tensor, a: Tensor, rows: Tensor | None = None) -> Tensor:
    """Return ``-sum_j p_ij log a_ij``, the mean over rows; at least the entropy of p, and equal to it where a = p.

    Args:
        p: the weights to be mimicked; no gradient flows into them.
        a: the weights that mimic.
        rows: which rows count; default all.

    Shapes:
        (B, H, T, S), (B, H, T, S), (B, T) -> ()

    Example:
        >>> p = torch.full((1, 1, 2, 2), 0.5)
        >>> attention_cross_entropy(p, p)
        tensor(0.6931)
    """
    loss = -(p.detach() * a.clamp_min(1e-12).log()).sum(-1)  # (B, H, T)
    if rows is None:
        return loss.mean()
    return (loss * rows[:, None]).sum() / (rows.sum() * loss.shape[1]).clamp_min(1)


@contextmanager
def _watching(model: nn.Module, watch: Callable[[Kernel, Heads, bool], Tensor]) -> Iterator[None]:
    places = list(linear_attentions(model).values())
    for place in places:
        place.watch = watch
    try:
        yield
    finally:
        for place in places:
            place.watch = None


def mimic(
    model: nn.Module, task: Task, *, steps: int, lr: float = 1e-2, batch_size: int | None = None, seed: int = 0
) -> list[float]:
    """Train the feature maps of ``model`` in place so that its attention weighs as softmax would; nothing else moves.

    While it learns, every attention passes on what softmax mixes, so each layer sees what it saw in the original.

    Args:
        model: a model whose attentions were replaced by ones with learned features.
        task: where training samples come from; targets are not looked at.
        steps: optimiser steps.
        lr: learning rate.
        batch_size: samples a step; default: the task's.
        seed: makes the order of the samples.

    Returns:
        The loss of every step, the mean over layers.

    Raises:
        BadInput: no attention of the model has features to learn.
    """
    kernels = [place.kernel for place in linear_attentions(model).values()]
    learning = [value for kernel in kernels for value in kernel.parameters()]
    if not all(isinstance(kernel, FeatureKernel) for kernel in kernels) or not learning:
        raise BadInput("mimicry needs linear attentions with features to learn; take to='hedgehog'")
    losses: list[Tensor] = []

    def watch(kernel: Kernel, heads: Heads, causal: bool) -> Tensor:
        p = softmax_weights(heads, causal=causal)
        if isinstance(kernel, FeatureKernel):
            losses.append(attention_cross_entropy(p, kernel.weights(heads, causal=causal), heads.seen))
        return torch.einsum("bhts,bshv->bthv", p.to(heads.v.dtype), heads.v)

    def loss(student: nn.Module, inputs: Inputs, target: Tensor, rows: Tensor) -> Tensor:
        losses.clear()
        call(student, inputs)
        return torch.stack(losses).mean()

    frozen = {id(value) for value in learning}
    asked = [(value, value.requires_grad) for value in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    try:
        for value in model.parameters():
            value.requires_grad_(id(value) in frozen)
        with _watching(model, watch):
            record = train(
                model,
                task.train,
                loss,
                steps=steps,
                batch_size=batch_size or task.batch_size,
                lr=lr,
                seed=seed,
                weight_decay=0.0,
            )
    finally:
        for value, wanted in asked:
            value.requires_grad_(wanted)
        for module, training in modes:
            module.training = training
    return list(record.losses)


@dataclass(frozen=True)
class LowRankUpdate(Spec):
    """weight = dense + up down / R, the dense tensor kept; starts at the dense tensor.

    Args:
        rank: R.

    Example:
        >>> layer = nn.Linear(3, 2)
        >>> before = layer.weight.detach().clone()
        >>> torch.equal(parametrize(layer, LowRankUpdate(1)).weight, before)
        True
    """

    rank: int = 8

    def start(self, dense: Tensor) -> tuple[Tensor, ...]:
        """Return factors whose product is zero."""
        down = torch.randn(self.rank, dense.shape[1], dtype=dense.dtype, device=dense.device)
        return dense.new_zeros(dense.shape[0], self.rank), down

    def constants(self, dense: Tensor) -> dict[str, Tensor]:
        """Return the dense tensor."""
        return {"dense": dense.detach().clone()}

    def weight(self, parts: tuple[Tensor, ...], constants: Mapping[str, Tensor], shape: torch.Size) -> Tensor:
        """Return the updated tensor."""
        return constants["dense"] + parts[0] @ parts[1] / self.rank


@contextmanager
def _low_rank(model: nn.Module, rank: int) -> Iterator[None]:
    """Let only low-rank updates of queries, keys and values learn (and kernels); merge them in the end."""
    places = list(linear_attentions(model).values())
    asked = [(value, value.requires_grad) for value in model.parameters()]
    for value, _ in asked:
        value.requires_grad_(False)
    layers = {
        layer: 3 * rank if len(projections(place)) == 1 else rank for place in places for layer in projections(place)
    }
    flags: dict[nn.Module, bool] = {}
    for layer, most in layers.items():
        weight = layer.get_parameter("weight")
        flags[layer] = next(wanted for value, wanted in asked if value is weight)
        parametrize(layer, LowRankUpdate(min(most, *weight.shape)))
        for part in layer.parametrizations.parameters():  # type: ignore[union-attr]  # made by parametrize
            part.requires_grad_(True)
    for place in places:
        place.kernel.requires_grad_(True)
    try:
        yield
    finally:
        for value, wanted in asked:
            value.requires_grad_(wanted)
        for layer, wanted in flags.items():
            fold(layer)
            layer.get_parameter("weight").requires_grad_(wanted)


def linearize(
    model: nn.Module,
    to: str = "hedgehog",
    *,
    task: Task | None = None,
    ignore: Sequence[str] = (),
    options: Mapping[str, bool | int | float | str | None] | None = None,
    mimic_steps: int = 100,
    mimic_lr: float = 1e-2,
    steps: int = 300,
    lr: float | None = None,
    tune: str | None = None,
    distil: bool | None = None,
    rank: int = 8,
    batch_size: int | None = None,
    seed: int = 0,
) -> nn.Module:
    """Return a copy of a softmax transformer whose attention is linear, its projections taken over.

    With a task, what was lost is recovered as the method's paper does it: ``hedgehog`` first learns feature maps that
    mimic the weights of softmax, then the whole model learns the task; ``liger`` learns the task by low-rank updates of
    queries, keys and values; ``lit`` learns the task and, in equal parts, what the softmax model answers.

    Known are torchgraft's own attentions, ``nn.MultiheadAttention`` on itself, attentions with ``qkv`` and ``proj``,
    and those of BERT-, GPT-2-, ViT- and Llama-shaped models of transformers. What is returned notes the change in its
    history, so that a recipe rebuilds it.

    Args:
        model: the trained model; left as it is.
        to: ``"hedgehog"``, ``"liger"`` (causal only), ``"lit"``, or the key of another such method.
        task: where training samples, loss and batch size come from; without one nothing is trained.
        ignore: globs of module names that must stay as they are.
        options: what the method's kernel is built with, such as ``{"window": 32}`` for liger.
        mimic_steps: steps of mimicry, where the method has it.
        mimic_lr: its learning rate.
        steps: steps of recovery on the task.
        lr: its learning rate; default: 1e-3 for low-rank updates, else the task's.
        tune: ``"all"`` parameters, or ``"lora"``; default: the method's.
        distil: whether recovery follows the softmax model's answers in equal parts; default: the method's.
        rank: of the low-rank updates.
        batch_size: samples a step; default: the task's.
        seed: makes every random choice.

    Example:
        >>> encoder = nn.TransformerEncoderLayer(8, 2, batch_first=True).eval()
        >>> type(linearize(encoder, "hedgehog").self_attn.kernel).__name__
        'HedgehogKernel'

    Raises:
        BadInput: there is no such method or option, or nothing in the model can be replaced by it.
    """
    method = method_of(to)
    if tune not in (None, "all", "lora"):
        raise BadInput(f"tune must be 'all' or 'lora', got {tune!r}")
    found = attentions(model, ignore=ignore)
    if not found:
        raise BadInput(f"{type(model).__name__} has no softmax attention that is known")
    image = any(isinstance(module, nn.Conv2d) for module in model.modules())
    key = SHORT_NAMES.get(to, to)
    changed = apply_edits(model, [Linearize(to=key, names=tuple(found), options=dict(options or {}), image=image)])
    if task is None:
        return changed
    size = task.batch_size if batch_size is None else batch_size
    if method.mimics and mimic_steps:
        mimic(changed, task, steps=mimic_steps, lr=mimic_lr, batch_size=size, seed=seed)
    if not steps:
        return changed
    way = method.tune if tune is None else tune
    rate = lr if lr is not None else 1e-3 if way == "lora" else task.learning_rate
    loss = supervised(task.loss)
    if method.distils if distil is None else distil:
        loss = objective(Teacher(model, task), temperature=1.0, alpha=0.5)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        with _low_rank(changed, rank) if way == "lora" else nullcontext():
            train(changed, task.train, loss, steps=steps, batch_size=size, lr=rate, seed=seed + 1)
    return changed.train(model.training)
