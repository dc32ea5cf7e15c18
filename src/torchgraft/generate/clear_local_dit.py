"""Attention of a trained diffusion transformer cut down to discs of the image, which makes its cost linear in tokens.

`CLEAR: Conv-Like Linearization Revs Pre-Trained Diffusion Transformers Up <https://arxiv.org/abs/2412.16112>`_ (Liu,
Tan and Wang, 2024): image token i attends to all text and to image tokens j with |y_i - y_j|^2 + |x_i - x_j|^2 < r^2,
by the same softmax and the same weights; then L = |v_s - v|^2 + a |v_s - v_t|^2 + b mean_l |A_l^s - A_l^t|^2 for the
attention layers alone, where A_l is what layer l puts out.

Departures: gathered indices instead of a block-sparse kernel; scores of larger images are scaled by image tokens alone,
where its code counts text too and, with coarse keys, ten times all. That coarse keys are sums of keys already rotated,
and that text does not see them, is as in its code. Modules are taken as attentions if they have ``query``, ``key``,
``value``, ``out`` and ``num_heads``; those of diffusers get a processor of :mod:`torchgraft.generate.clear_diffusers`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft.bench.task import Inputs, call
from torchgraft.catalogue import Card
from torchgraft.catalogue.card import Claim
from torchgraft.engines.attention.local import local_attention, strip_attention
from torchgraft.engines.recurrence.heads import head_size, merge_heads, split_heads
from torchgraft.engines.surgery.swap import Where, swap
from torchgraft.engines.taps import record
from torchgraft.errors import BadInput

__all__ = [
    "CARD",
    "DiscAttention",
    "checked_discs",
    "clear_linearize",
    "distill_attention",
    "distillation_terms",
    "mix_discs",
]

CARD = Card(
    key="clear-local-dit",
    title="CLEAR: local attention for trained diffusion transformers",
    seed_id=273,
    authors="Liu, Tan and Wang, 2024",
    reference="https://arxiv.org/abs/2412.16112",
    family="generate",
    kind="part",
    engine=("surgery", "attention"),
    equation="A_ij = softmax_j(q_i . k_j / sqrt(K)) over text j and |y_i - y_j|^2 + |x_i - x_j|^2 < r^2",
    entry="DiscAttention",
    declared={"parameters": "4*d_model**2 + 4*d_model + (down**2 if down > 1 else 0)"},
    example={"d_model": 16, "num_heads": 2, "grid": 2, "radius": 1.2, "down": 2, "text_len": 1},
    shapes=((2, 5, 16),),
    oracles=(
        "a radius beyond the diagonal gives the teacher's outputs; radius 1 leaves each image token itself and text",
        "radius 8 sees 193 tokens, and the derivative by tokens outside the disc is exactly zero",
        "by strips with halos image tokens get the numbers of one piece",
        "both terms of the distillation are zero where student and teacher are equal, and attention weights alone move",
        "as a processor of diffusers' attentions it is their joint attention where the radius covers the image",
    ),
    claim=Claim(
        text="A flow-matching transformer on 8x8 digits, a token a pixel (64 tokens, three blocks of width 48): discs "
        "of radius 2 after fine-tuning the attention, without it, and linear attention (elu + 1) fine-tuned alike; "
        "Frechet distance of samples in the features of a digits classifier.",
        figure="distance after CLEAR <= 1.2 times the teacher's, without fine-tuning >= 2 times, and products of the "
        "attention fewer by >= 75 %",
    ),
    choose_when="a trained image transformer with thousands of tokens must draw larger images, or draw them faster",
    choose_instead="lit-linear-dit for a state of constant size; nothing where images have few tokens",
    bibtex="""@article{liu2024clear,
  title={CLEAR: Conv-Like Linearization Revs Pre-Trained Diffusion Transformers Up},
  author={Liu, Songhua and Tan, Zhenxiong and Wang, Xinchao},
  journal={arXiv:2412.16112},
  year={2024}
}""",
)

_PARTS = ("query", "key", "value", "out", "num_heads")


def checked_discs(
    grid: int | tuple[int, int], *, radius: float, down: int, text_len: int, train_tokens: int | None, strips: int
) -> tuple[int, int]:
    """Return rows and tokens a row of ``grid``.

    Raises:
        BadInput: a setting of :class:`DiscAttention` is out of range.
    """
    sides = (grid, grid) if isinstance(grid, int) else grid
    if not 0 < radius < math.inf or text_len < 0 or min(sides) < 1:
        raise BadInput(f"radius and grid must be positive, text_len not negative, got {radius}, {grid}, {text_len}")
    if down < 1 or sides[0] % down or sides[1] % down:
        raise BadInput(f"down must divide both sides of the grid {sides}, got {down}")
    if train_tokens is not None and train_tokens < 2:
        raise BadInput(f"train_tokens must be at least 2, got {train_tokens}")
    if not 1 <= strips <= sides[0]:
        raise BadInput(f"strips must lie in 1 to {sides[0]}, the rows of the grid, got {strips}")
    return sides


def _coarse(x: Tensor, spatial: Tensor, grid: tuple[int, int], text: int) -> Tensor:
    """Return sums over patches of the image, (B, text + h w, H, K), (down^2,) -> (B, h w / down^2, H, K)."""
    down = math.isqrt(len(spatial))
    image = torch.unflatten(x[:, text:], 1, (grid[0] // down, down, grid[1] // down, down))
    patches = image.transpose(2, 3).flatten(3, 4)  # (B, rows, columns, down^2, H, K)
    return torch.einsum("byxphk,p->byxhk", patches, spatial.to(x.dtype)).flatten(1, 2)


def mix_discs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    grid: tuple[int, int],
    radius: float,
    text: int = 0,
    spatial: Tensor | None = None,
    train_tokens: int | None = None,
    strips: int = 1,
) -> Tensor:
    """Return what queries mix from text and discs, (B, text + h w, H, K) -> (B, text + h w, H, V).

    Args:
        q, k, v: of text tokens first, then of the image row by row; positions are in them already.
        grid, radius, train_tokens, strips: as for :class:`DiscAttention`.
        text: tokens in front that are text.
        spatial: weights of the patches whose sums all image tokens see besides, (down^2,).
    """
    scale = None
    if train_tokens is not None:
        scale = math.sqrt(math.log(grid[0] * grid[1]) / math.log(train_tokens) / q.shape[-1])
    coarse = None if spatial is None else (_coarse(k, spatial, grid, text), _coarse(v, spatial, grid, text))
    mix = local_attention if strips == 1 else partial(strip_attention, parts=strips)
    return mix(q, k, v, grid=grid, radius=radius, text=text, coarse=coarse, scale=scale)


class DiscAttention(nn.Module):
    """Multi-head softmax attention within discs of an image, and to and from all text.

    Args:
        d_model: the width D.
        num_heads: H; divides ``d_model``.
        grid: rows of the image and tokens a row, or one number for a square.
        radius: an image token sees those less than this far away.
        down: side of the patches whose average keys and values all image tokens see besides; 1 for none.
        text_len: tokens in front that are text.
        train_tokens: where given, scores are scaled by sqrt(log_n N / K) for n image tokens in training and N now.
        strips: into how many strips of rows the work is split, each reading its halo only; see
            :func:`torchgraft.engines.attention.local.strip_attention`.

    Shapes:
        (B, text + h w, D) -> (B, text + h w, D)

    Example:
        >>> DiscAttention(8, num_heads=2, grid=(2, 3), radius=2, text_len=1)(torch.zeros(1, 7, 8)).shape
        torch.Size([1, 7, 8])

    Raises:
        BadInput: heads do not divide the width, or a size is out of range.
    """

    def __init__(
        self,
        d_model: int,
        *,
        num_heads: int = 4,
        grid: int | tuple[int, int] = 16,
        radius: float = 16.0,
        down: int = 1,
        text_len: int = 0,
        train_tokens: int | None = None,
        strips: int = 1,
    ) -> None:
        super().__init__()
        if d_model < 1:
            raise BadInput(f"d_model must be at least 1, got {d_model}")
        head_size(d_model, num_heads)
        sides = checked_discs(
            grid, radius=radius, down=down, text_len=text_len, train_tokens=train_tokens, strips=strips
        )
        self.query, self.key, self.value, self.out = (nn.Linear(d_model, d_model) for _ in range(4))
        self.place: nn.Module | None = None
        self.d_model, self.num_heads, self.grid, self.radius, self.down = d_model, num_heads, sides, radius, down
        self.text_len, self.train_tokens, self.strips = text_len, train_tokens, strips
        self.spatial = nn.Parameter(torch.full((down * down,), 1 / down**2)) if down > 1 else None

    def take_over(self, old: nn.Module) -> DiscAttention:
        """Use the projections and, if it has one, the ``place`` of another attention; they are shared, not copied.

        Raises:
            BadInput: the other lacks one.
        """
        lacking = [name for name in _PARTS if not hasattr(old, name)]
        if lacking:
            raise BadInput(f"an attention must have {', '.join(_PARTS)}; {type(old).__name__} lacks {lacking}")
        self.query, self.key, self.value, self.out = (getattr(old, name) for name in _PARTS[:4])
        self.place = getattr(old, "place", None)
        return self.to(self.query.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Mix text and image tokens."""
        tokens = self.grid[0] * self.grid[1]
        if x.ndim != 3 or tuple(x.shape[1:]) != (self.text_len + tokens, self.d_model):
            raise BadInput(f"x must have shape (B, {self.text_len + tokens}, {self.d_model}), got {tuple(x.shape)}")
        if not x.is_floating_point():
            raise BadInput(f"x must be floating point, got {x.dtype}")
        q, k, v = (split_heads(part(x), self.num_heads) for part in (self.query, self.key, self.value))
        if self.place is not None:
            q, k = self.place(q), self.place(k)
        mixed = mix_discs(
            q,
            k,
            v,
            grid=self.grid,
            radius=self.radius,
            text=self.text_len,
            spatial=self.spatial,
            train_tokens=self.train_tokens,
            strips=self.strips,
        )
        y: Tensor = self.out(merge_heads(mixed))
        return y


def _is_attention(name: str, module: nn.Module) -> bool:
    return all(hasattr(module, part) for part in _PARTS)


def clear_linearize(
    dit: nn.Module,
    *,
    grid: int | tuple[int, int],
    radius: float = 16.0,
    down: int = 1,
    text_len: int = 0,
    train_tokens: int | None = None,
    strips: int = 1,
    where: Where = _is_attention,
) -> nn.Module:
    """Return a copy of a diffusion transformer whose attentions see discs of the image, all weights kept.

    Args:
        dit: the trained model; left as it is.
        grid: rows of the image and tokens a row, or one number for a square.
        radius: an image token sees those less than this far away; the paper takes 8, 16 and 32.
        down: side of the patches whose average keys and values all image tokens see besides, such as 4; 1 for none.
        text_len: tokens in front that are text.
        train_tokens: image tokens in training, where the grid is now larger: scores are scaled in proportion.
        strips: into how many strips of rows the work is split.
        where: which modules are attentions: a class, a glob of names, or a predicate.

    Example:
        >>> from torchgraft.generate.flow_transformer import FlowTransformer
        >>> student = clear_linearize(FlowTransformer((8, 8)), grid=(8, 8), radius=3, text_len=1)
        >>> type(student.blocks[0].attn).__name__
        'DiscAttention'

    Raises:
        BadInput: there is no attention, one lacks a part, or a size is out of range.
    """
    student = copy.deepcopy(dit)

    def build(old: nn.Module, name: str) -> nn.Module:
        made = DiscAttention(
            getattr(getattr(old, "query", None), "in_features", 1),
            num_heads=getattr(old, "num_heads", 1),
            grid=grid,
            radius=radius,
            down=down,
            text_len=text_len,
            train_tokens=train_tokens,
            strips=strips,
        )
        return made.take_over(old)

    with torch.random.fork_rng(devices=[]):  # the first weights are thrown away
        swap(student, where, build)
    return student


def _layers(student: nn.Module, kind: type[nn.Module] = DiscAttention) -> dict[str, nn.Module]:
    found = {name: module for name, module in student.named_modules() if isinstance(module, kind)}
    if not found:
        raise BadInput(f"the student has no {kind.__name__}; make it by clear_linearize")
    return found


def distillation_terms(
    student: nn.Module, teacher: nn.Module, inputs: Inputs, target: Tensor, *, kind: type[nn.Module] = DiscAttention
) -> tuple[Tensor, Tensor, Tensor]:
    """Return how far the student is from the target and from the teacher, in its output and in its layers.

    Args:
        student: a model made by :func:`clear_linearize`.
        teacher: the model that it was made of; no gradient flows there.
        inputs: what both take, noise and all.
        target: the velocity.
        kind: class of the layers whose outputs are compared.

    Returns:
        Mean squares: to the target, to the teacher, and over layers and their outputs.
    """
    names = list(_layers(student, kind))
    with torch.no_grad(), record(teacher, names) as wanted:
        guide = call(teacher, inputs)
    with record(student, names, detach=False) as given:
        found = call(student, inputs)
    layers = torch.stack([F.mse_loss(given[name], wanted[name]) for name in names]).mean()
    return F.mse_loss(found, target), F.mse_loss(found, guide), layers


def distill_attention(
    student: nn.Module,
    teacher: nn.Module,
    data: Callable[[torch.Generator], tuple[Inputs, Tensor]],
    *,
    steps: int = 10_000,
    lr: float = 1e-4,
    a: float = 0.5,
    b: float = 0.5,
    seed: int = 0,
    kind: type[nn.Module] = DiscAttention,
) -> list[float]:
    """Train the attention layers of ``student`` in place to follow ``teacher``; return the loss of every step.

    Args:
        student: a model made by :func:`clear_linearize`.
        teacher: the model that it was made of.
        data: gives inputs and velocities of one step, drawn by the generator that it gets.
        steps: optimiser steps.
        lr: learning rate of AdamW, which falls to zero as a cosine.
        a: weight of the distance to the teacher's velocity.
        b: weight of the distance to the teacher's attention outputs.
        seed: of the data.
        kind: class of the layers that are trained.

    Raises:
        BadInput: the student has no such layer, or a setting is out of range.
    """
    if steps < 1 or not lr > 0 or a < 0 or b < 0:
        raise BadInput(f"steps and lr must be positive, a and b not negative, got {steps}, {lr}, {a}, {b}")
    layers = _layers(student, kind).values()
    moving = [value for layer in layers for value in layer.parameters()]
    before = {name: value.requires_grad for name, value in student.named_parameters()}
    draw = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(moving, lr=lr, weight_decay=0.0)
    losses: list[float] = []
    student.requires_grad_(False)
    for value in moving:
        value.requires_grad_(True)
    try:
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = lr * (0.5 + 0.5 * math.cos(math.pi * step / steps))
            inputs, target = data(draw)
            flow, guide, outputs = distillation_terms(student, teacher, inputs, target, kind=kind)
            loss = flow + a * guide + b * outputs
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            nn.utils.clip_grad_norm_(moving, 1.0)
            optimizer.step()
            losses.append(float(loss.detach()))
    finally:
        for name, value in student.named_parameters():
            value.requires_grad_(before[name])
            value.grad = None
    return losses
