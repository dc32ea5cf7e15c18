"""Inner layers that attend alike share one attention matrix, and the student is adjusted to its teacher.

`EchoAtt: Attend, Copy, then Adjust for More Efficient Large Language Models <https://arxiv.org/abs/2409.14595>`_
(Rajabzadeh et al., 2024).

Equation: ``y_f = A_l (X_f W_V,f) W_O,f`` for the followers f of a leader l, ``c(l, m) = mean cos(A_l, A_m)`` over rows.

Departures: the paper shares blocks of k consecutive inner layers (:func:`share_attention` with ``k``); as a procedure,
:class:`EchoAtt` joins neighbours one by one, the most similar first, so that there is a dial. The weights of the three
terms of the first stage are not stated; they are 1. Where fewer than two inner layers would be left, the last and then
the first layer may share, too.
"""

from __future__ import annotations

import itertools
import math
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft.bench.task import Inputs, Task, call, take
from torchgraft.bench.training import supervised, train
from torchgraft.catalogue import Card, Claim
from torchgraft.engines.attention_maps import attention_maps
from torchgraft.engines.distill import IGNORED, Teacher, soft_loss
from torchgraft.engines.procedure import Procedure, Refusal, Site
from torchgraft.engines.shared_attention import ShareAttention, shareable
from torchgraft.engines.surgery.convert import convert
from torchgraft.engines.surgery.edits import Edit, apply_edits, history
from torchgraft.engines.taps import record
from torchgraft.errors import BadInput

__all__ = ["CARD", "EchoAtt", "attention_similarity", "distill", "share_attention"]

CARD = Card(
    key="echoatt",
    title="EchoAtt: shared attention of inner layers",
    seed_id=227,
    authors="Rajabzadeh, Jafari, Sharma, Jami, Kwon, Ghodsi, Chen and Rezagholizadeh, 2024",
    reference="https://arxiv.org/abs/2409.14595",
    family="shrink/distill",
    kind="procedure",
    engine=("attention", "surgery"),
    equation="y_f = A_l (X_f W_V,f) W_O,f,  c(l, m) = mean cos(A_l, A_m)",
    entry="EchoAtt",
    stage="mixer",
    conflicts=dict.fromkeys(
        ("chain-of-layers", "ld-pruner", "n2n-learning"),
        "a layer that is skipped or taken out may be the one whose attention others take over",
    ),
    capabilities=frozenset({"needs-data"}),
    oracles=(
        "groups of one leave the model bit for bit as it was; equal queries, keys and inputs make sharing exact",
        "a follower mixes by the very tensor of its leader, and has 2 D^2 parameters (and biases) less",
        "a cached pass, token by token, equals the full one, and a follower caches values only",
        "the similarity is symmetric, one on the diagonal, and lies in [0, 1]",
    ),
    claim=Claim(
        text="Byte language model over the standard library's source, 8 layers of width 64, trained; inner layers "
        "share in blocks of 2 and the student is distilled, against sharing without distillation, and against sharing "
        "the least similar neighbours instead of the most similar",
        figure="perplexity of the distilled student within 2 % of the teacher's, >= 10 % less time a token at 256 "
        "tokens, and the most similar pair costs less loss than the least similar; mean of 3 seeds",
    ),
    choose_when="a deep transformer whose inner layers attend alike, and a distillation can be afforded",
    choose_instead="linearization for long sequences; chain-of-layers where whole layers can go",
    confidence="medium",
    bibtex="@inproceedings{rajabzadeh2024echoatt, title={{EchoAtt}: Attend, Copy, then Adjust for More Efficient Large "
    "Language Models}, author={Rajabzadeh, Hossein and Jafari, Aref and Sharma, Aman and Jami, Benyamin and Kwon, "
    "Hyock Ju and Ghodsi, Ali and Chen, Boxing and Rezagholizadeh, Mehdi}, booktitle={ENLSP}, year={2024}}",
)


def attention_similarity(model: nn.Module, inputs: Inputs) -> Tensor:
    """Return the mean cosine between the attention rows of every two layers.

    Args:
        model: runs once on ``inputs``; layers are numbered by the order of their attentions.
        inputs: some samples.

    Shapes:
        -> (L, L)

    Raises:
        BadInput: layers differ in heads or tokens.

    Example:
        >>> from torchgraft.bench.models import Attention
        >>> layers = nn.Sequential(Attention(8, 2), Attention(8, 2))
        >>> attention_similarity(layers, torch.randn(2, 5, 8)).diagonal().tolist()
        [1.0, 1.0]
    """
    with torch.no_grad(), attention_maps(model) as seen:
        call(model, inputs)
    if len({layer.weights.shape for layer in seen}) != 1:
        shapes = [tuple(layer.weights.shape) for layer in seen]
        raise BadInput(f"layers are compared row by row and must have one shape of attention, got {shapes}")
    flat = torch.stack([_unit(layer.weights) for layer in seen])  # (L, rows, S)
    found = torch.einsum("lrs,mrs->lm", flat, flat) / flat.shape[1]
    return found.clamp(0.0, 1.0).fill_diagonal_(1.0)


def _unit(weights: Tensor) -> Tensor:
    """Return the rows of (B, H, T, S) at unit length, (B H T, S)."""
    return F.normalize(weights.double(), dim=-1).flatten(0, 2)


def _stacks(names: Sequence[str]) -> list[list[str]]:
    """Return runs of names that differ in their numbers only: the layers of one stack."""
    found: list[list[str]] = []
    last = None
    for name in names:
        pattern = re.sub(r"\d+", "*", name)
        if pattern != last:
            found.append([])
        found[-1].append(name)
        last = pattern
    return found


def _inner(names: Sequence[str], first: int, last: int) -> list[str]:
    """Return the layers that may share: all but the outer ones, as long as two remain."""
    while len(names) - first - last < 2 and (first or last):
        first, last = (first, last - 1) if last else (first - 1, last)
    return list(names[first : len(names) - last])


def share_attention(
    model: nn.Module,
    *,
    k: int = 2,
    groups: Sequence[Sequence[str]] | None = None,
    keep_first: int = 1,
    keep_last: int = 1,
) -> nn.Module:
    """Return a copy of ``model`` whose inner attentions share their weights in blocks of ``k`` consecutive layers.

    Args:
        model: holds softmax attentions that are known.
        k: layers a block; 1 shares nothing.
        groups: the names of the attentions of each block instead, in the order in which they run.
        keep_first: layers at the beginning of a stack that stay independent.
        keep_last: layers at its end that do.

    Raises:
        BadInput: ``k`` is below 1, or a name is no attention that is known.

    Example:
        >>> from torchgraft.bench.models import Attention
        >>> model = nn.Sequential(*(Attention(8, 2) for _ in range(4)))
        >>> shared = share_attention(model)
        >>> sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in shared.parameters())
        144
    """
    if k < 1 or keep_first < 0 or keep_last < 0:
        raise BadInput(f"k must be at least 1 and the layers kept at least 0, got {k}, {keep_first}, {keep_last}")
    if groups is None:
        inner = [_inner(stack, keep_first, keep_last) for stack in _stacks(shareable(model))]
        groups = [names[start : start + k] for names in inner for start in range(0, len(names), k)]
    shared = tuple(tuple(group) for group in groups if len(group) > 1)
    return apply_edits(model, [ShareAttention(groups=shared)] if shared else [])


def _blocks(student: nn.Module) -> list[str]:
    """Return the blocks whose attention is shared: what holds the attention and runs, or the attention itself."""
    found = set()
    for edit in history(student):
        for name in (name for group in edit.groups for name in group) if isinstance(edit, ShareAttention) else ():
            holder = name.rpartition(".")[0]
            within = holder and not isinstance(
                student.get_submodule(holder), (nn.ModuleList, nn.ModuleDict, nn.Sequential)
            )
            found.add(holder if within else name)
    return sorted(found)


def _first(output: Any) -> Tensor:
    """Return the tensor of an output, or the first of several: the hidden states."""
    value = output[0] if isinstance(output, (tuple, list)) else output
    if not isinstance(value, Tensor):
        raise BadInput(f"a block with shared attention must return hidden states first, got {type(value).__name__}")
    return value


def distill(
    student: nn.Module,
    teacher: nn.Module,
    task: Task,
    *,
    stage1: int,
    stage2: int,
    weights: tuple[float, float, float] = (1.0, 1.0, 1.0),
    lr: float | None = None,
    seed: int = 0,
    deadline: float | None = None,
) -> int:
    """Adjust ``student`` in place to its teacher, then train it on the data; return the steps taken.

    Stage 1: a CE(student, a draw from the teacher) + b KL(teacher || student) + c MSE of the outputs of the blocks
    whose attention is shared. Stage 2: the task's own loss.

    Args:
        student: what :func:`share_attention` returned.
        teacher: the model that it was made from.
        task: training samples and loss.
        stage1: steps of the first stage.
        stage2: steps of the second.
        weights: a, b and c.
        lr: highest learning rate; by default the task's.
        seed: makes the order of the samples.
        deadline: a :func:`time.monotonic` moment after which no step is begun.

    Raises:
        BadInput: a number of steps is negative.
    """
    if stage1 < 0 or stage2 < 0:
        raise BadInput(f"stage1 and stage2 must be at least 0 steps, got {stage1} and {stage2}")
    a, b, c = weights
    blocks = _blocks(student)
    guide = Teacher(teacher, task)

    def adjust(model: nn.Module, inputs: Inputs, target: Tensor, rows: Tensor) -> Tensor:
        with torch.no_grad(), record(teacher, blocks) as wanted:
            logits = guide.run(inputs)
        with record(model, blocks, detach=False) as found:
            own = task.output_logits(call(model, inputs))
        loss = b * soft_loss(own, logits, temperature=1.0, target=target)
        drawn = torch.multinomial(logits.flatten(0, -2).softmax(-1), 1)[:, 0]
        if target.shape == own.shape[:-1] and not target.is_floating_point():
            drawn = drawn.masked_fill(target.flatten() == IGNORED, IGNORED)
        loss = loss + a * F.cross_entropy(own.flatten(0, -2), drawn, ignore_index=IGNORED)
        apart = (F.mse_loss(_first(found[name]), _first(wanted[name])) for name in blocks)
        return loss + c * sum(apart, loss.new_zeros(()))

    taken = 0
    rate = task.learning_rate if lr is None else lr
    for steps, objective in ((stage1, adjust), (stage2, supervised(task.loss))):
        if steps and (deadline is None or time.monotonic() < deadline):
            done = train(
                student,
                task.train,
                objective,
                steps=steps,
                batch_size=task.batch_size,
                lr=rate,
                seed=seed,
                deadline=deadline,
            )
            taken += done.steps
    return taken


class EchoAtt(Procedure):
    """Attention shared between neighbours, the most similar first.

    Args:
        samples: training samples by which layers are compared.
        keep_first: layers at the beginning of a stack that stay independent.
        keep_last: layers at its end that do.

    Example:
        >>> EchoAtt(samples=8).samples
        8
    """

    card = CARD
    expense = 1

    def __init__(self, *, samples: int = 32, keep_first: int = 1, keep_last: int = 1) -> None:
        if samples < 1 or keep_first < 0 or keep_last < 0:
            raise BadInput(
                f"samples must be at least 1 and the layers kept at least 0, got {samples}, {keep_first}, {keep_last}"
            )
        self.samples, self.keep_first, self.keep_last = samples, keep_first, keep_last
        self._why = ""

    def _inner(self, model: nn.Module, ignore: Sequence[str]) -> list[list[str]]:
        stacks = (_inner(stack, self.keep_first, self.keep_last) for stack in _stacks(shareable(model)))
        allowed = shareable(model, ignore=ignore)
        return [kept for stack in stacks if len(kept := [name for name in stack if name in allowed]) > 1]

    def applies_to(self, model: nn.Module, task: Task, *, ignore: Sequence[str] = ()) -> list[Site]:
        """Return the inner attentions of every stack that has two or more of them."""
        self._why = ""
        found = []
        for name in (name for stack in self._inner(model, ignore) for name in stack):
            count = sum(value.numel() for value in model.get_submodule(name).parameters())
            found.append(Site(name, "attention", 1, count))
        if found:
            try:  # what cannot be compared cannot be shared either
                self._similarity(model, task, samples=1)
            except BadInput as error:
                self._why = str(error)
                return []
        return found

    def refusals(self, model: nn.Module, task: Task, *, ignore: Sequence[str] = ()) -> list[Refusal]:
        """Return why nothing is a site, where there are attentions."""
        return [Refusal("every attention", self._why)] if self._why else []

    def _similarity(
        self, model: nn.Module, task: Task, *, samples: int | None = None
    ) -> Mapping[tuple[str, str], float]:
        """Return the similarity of the attentions that run one after another, by their names."""
        opened = convert(model).eval()
        names = shareable(opened)
        with torch.no_grad(), attention_maps(opened) as seen:
            call(opened, take(task.train.inputs, slice(samples or self.samples)))
        if len(seen) != len(names):
            raise BadInput(f"{len(names)} attentions are known and {len(seen)} ran, so layers cannot be told apart")
        found = {}
        for (one, first), (other, second) in itertools.pairwise(zip(names, seen, strict=True)):
            if first.weights.shape == second.weights.shape:
                found[one, other] = float((_unit(first.weights) * _unit(second.weights)).sum(-1).mean())
        return found

    def plan(
        self, model: nn.Module, task: Task, strength: float, *, ignore: Sequence[str] = (), seed: int = 0
    ) -> list[Edit]:
        """Return the edit that joins a share of the neighbours, the most similar first."""
        similar = self._similarity(model, task)
        stacks = self._inner(model, ignore)
        pairs = [pair for stack in stacks for pair in itertools.pairwise(stack)]
        joined = set(sorted(pairs, key=lambda pair: -similar.get(pair, -1.0))[: math.ceil(strength * len(pairs))])
        groups: list[list[str]] = []
        for stack in stacks:
            groups.append([stack[0]])
            for pair in itertools.pairwise(stack):
                if pair in joined:
                    groups[-1].append(pair[1])
                else:
                    groups.append([pair[1]])
        return [ShareAttention(groups=tuple(tuple(group) for group in groups if len(group) > 1))]
