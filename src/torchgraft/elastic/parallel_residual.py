"""Merge consecutive transformer blocks into wider ones that run side by side, so that fewer, larger products are left.

`Make Deep Networks Shallow Again <https://arxiv.org/abs/2309.08414>`_ (Bermeitinger et al., 2023) puts the branches of
a residual stack side by side on one input; that attention heads of several layers fit into one wide layer is `Wide
Attention Is The Way Forward For Transformers? <https://arxiv.org/abs/2210.00640>`_ (Brown et al., 2022).

Equation: ``u = x + sum_i A_i(norm(x)), y = u + sum_i M_i(norm(u))`` in the place of blocks i of a span, as one block.

Departures: both papers train such networks from scratch; here a trained one is converted, pair by pair where the
model's answers move least on training samples, and recovery is ``fit``'s. Attentions share an input and feed-forward
parts share another, where the paper's branch is the whole block; only then do the products join. Parameters and
multiplications stay (norms aside), so that nothing but latency falls, and only where a product is too small to fill
the machine: with large batches a wider block may be slower, which is measured before anything is offered to ``fit``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from torchgraft.bench.meters.forward import resting
from torchgraft.bench.meters.latency import interleaved
from torchgraft.bench.task import Batch, Task, call, take
from torchgraft.catalogue import Card
from torchgraft.engines.control_flow.fused import traits
from torchgraft.engines.depth import Stack, rewired, stacks
from torchgraft.engines.distill import soft_loss
from torchgraft.engines.procedure import Procedure, Refusal, Site, ignored
from torchgraft.engines.residual import Widen, obstacle, skips, widened
from torchgraft.engines.residual.parallel import calls
from torchgraft.engines.surgery.edits import Edit, apply_edits
from torchgraft.errors import BadInput

__all__ = ["CARD", "ParallelBlocks"]

CARD = Card(
    key="parallel-residual",
    title="Residual blocks merged side by side",
    authors="Bermeitinger, Hrycej and Handschuh, 2023",
    reference="https://arxiv.org/abs/2309.08414",
    family="elastic",
    kind="procedure",
    engine=("surgery",),
    equation="u = x + sum_i A_i(norm(x)); y = u + sum_i M_i(norm(u))",
    entry="ParallelBlocks",
    stage="depth",
    capabilities=frozenset({"needs-data"}),
    example={"model": "transformer", "samples": 16},
    oracles=(
        "a merged block equals x plus the sum of its blocks' attentions, and that plus the sum of their feed-forward "
        "parts, to 1e-12 in float64",
        "strength 1 leaves one block of a stack, and the blocks that are merged first stay merged at every strength",
        "a block that adds nothing is merged first, and the outputs then do not change",
        "convolutional, post-norm and recurrent blocks are refused with the reason",
    ),
    choose_when="a transformer answers few tokens at a time and the start of each operation costs as much as its work",
    choose_instead="chain-of-layers where batches are large: a layer left out saves its work, a merged one does not",
    bibtex="@article{bermeitinger2023shallow, title={Make Deep Networks Shallow Again}, author={Bermeitinger, Bernhard "
    "and Hrycej, Tomas and Handschuh, Siegfried}, journal={arXiv preprint arXiv:2309.08414}, year={2023}}",
)

#: What merging must gain, as a share of the latency, before ``fit`` is offered it: above the noise of the measurement.
_GAIN = 0.03
#: Seconds that the start of an operation takes, generously.
_START = 8e-6
#: What one round must show for no more to be needed: far above that noise.
_HOPELESS = 1.1
_NO_LATENCY = "parameters and multiplications stay when blocks are merged; only latency falls, and it is not measured"


class ParallelBlocks(Procedure):
    """Merge neighbouring blocks; strength is the share of the steps from block to block that goes.

    Args:
        samples: how many training samples the order of the merges is judged on.
        timed: whether to act only where merged blocks are faster on the task's example, measured once; ``fit`` asks
            for it.
        latency: whether latency counts at all; where it does not, nothing is a site.

    Example:
        >>> from torchgraft.bench.models import VisionTransformer
        >>> x, y = torch.randn(8, 1, 8, 8), torch.randint(0, 10, (8,))
        >>> model = VisionTransformer(d_model=8, depth=4, num_heads=2)
        >>> task = Task(model, (x, y), (x, y), (x, y), nn.functional.cross_entropy, lambda out, t: out[:, 0])
        >>> [len(ParallelBlocks().apply(model, task, strength).blocks) for strength in (0.0, 0.5, 1.0)]
        [4, 2, 1]

    Raises:
        BadInput: ``samples`` is below 1.
    """

    card: ClassVar[Card] = CARD
    expense: ClassVar[int] = 2

    def __init__(self, *, samples: int = 64, timed: bool = False, latency: bool = True) -> None:
        if samples < 1:
            raise BadInput(f"samples must be at least 1, got {samples}")
        self.samples, self.timed, self.latency = samples, timed, latency
        self._slow: str | None = None
        self._refusals: list[Refusal] = []

    def for_costs(self, costs: Sequence[str]) -> ParallelBlocks:
        """Return this procedure, timing where latency counts and doing nothing where it does not."""
        counts = "latency" in costs
        return ParallelBlocks(samples=self.samples, timed=counts, latency=counts)

    def applies_to(self, model: nn.Module, task: Task, *, ignore: Sequence[str] = ()) -> list[Site]:
        """Return the stacks with neighbours that can become one. See :class:`Procedure`."""
        self._refusals = []
        found = self._joints(model, task, ignore)
        if found and not self.latency:
            self._refusals.append(Refusal("every stack", _NO_LATENCY))
            return []
        if found and self.timed:
            if self._slow is None:
                self._slow = _why_slow(model, task, found)
            if self._slow:
                self._refusals.append(Refusal("every stack", self._slow))
                return []
        return [
            Site(stack.name or "(model)", "layer", len(joints) + 1, sum(stack.parameters)) for stack, joints in found
        ]

    def refusals(self, model: nn.Module, task: Task, *, ignore: Sequence[str] = ()) -> list[Refusal]:
        """Return the blocks that cannot be merged, and why. See :class:`Procedure`."""
        return list(self._refusals)

    def plan(
        self, model: nn.Module, task: Task, strength: float, *, ignore: Sequence[str] = (), seed: int = 0
    ) -> list[Edit]:
        """Return one edit a stack. See :class:`Procedure`."""
        found = self._joints(model, task, ignore)
        count = max(1, round(strength * sum(len(joints) for _, joints in found)))
        return _edits(self._order(model, task, found, count, seed))

    def _joints(self, model: nn.Module, task: Task, ignore: Sequence[str]) -> list[tuple[Stack, list[int]]]:
        """Return every stack with the places i at which block i and block i + 1 can become one."""
        example = take(task.train.inputs, slice(4))
        found: list[tuple[Stack, list[int]]] = []
        for stack in stacks(model, example):
            given = calls(model, stack.blocks, example)
            skip = skips(model, stack, example)
            fit: list[bool] = []
            for name, has_skip in zip(stack.blocks, skip, strict=True):
                why: str | None = "it has no skip connection around all that it does"
                if has_skip:
                    with resting(model):
                        why = obstacle(model.get_submodule(name), *given[name][0])
                if why is not None and why not in [refusal.reason for refusal in self._refusals]:
                    self._refusals.append(Refusal(name, why))
                fit.append(why is None and not _any_ignored(model, name, ignore))
            joints = [
                place
                for place in range(stack.length - 1)
                if fit[place] and fit[place + 1] and self._alike(model, stack.blocks[place : place + 2])
            ]
            if joints:
                found.append((stack, joints))
        return found

    def _alike(self, model: nn.Module, names: Sequence[str]) -> bool:
        try:
            widened([model.get_submodule(name) for name in names])
        except BadInput as error:
            self._refusals.append(Refusal(names[1], str(error)))
            return False
        return True

    def _order(
        self, model: nn.Module, task: Task, found: list[tuple[Stack, list[int]]], count: int, seed: int
    ) -> dict[Stack, list[int]]:
        """Return the first ``count`` joints to go, greedily; the same first ones for every larger count."""
        gone: dict[Stack, list[int]] = {stack: [] for stack, _ in found}
        if count >= sum(len(joints) for _, joints in found):
            return {stack: list(joints) for stack, joints in found}
        rows = torch.randperm(len(task.train), generator=torch.Generator().manual_seed(seed))[: self.samples]
        batches = list(task.train[rows.sort().values].batches(task.batch_size))
        with resting(model), torch.no_grad():
            wanted = [task.output_logits(call(model, inputs)) for inputs, _ in batches]
        for _ in range(count):
            # Later places come first, so that they win where nothing else decides.
            open_ = [(s, place) for s, joints in reversed(found) for place in reversed(joints) if place not in gone[s]]
            moved = [_moved(model, task, s, sorted([*gone[s], place]), gone, batches, wanted) for s, place in open_]
            stack, place = open_[min(range(len(open_)), key=lambda i: moved[i])]
            gone[stack] = sorted([*gone[stack], place])
        return gone


def _any_ignored(model: nn.Module, name: str, ignore: Sequence[str]) -> bool:
    inside = [f"{name}.{inner}" if inner else name for inner, _ in model.get_submodule(name).named_modules()]
    return any(ignored(each, ignore) for each in inside)


def _spans(joints: Sequence[int]) -> list[tuple[int, int]]:
    """Return the spans (first, length) that the joints between blocks i and i + 1 make."""
    spans: list[tuple[int, int]] = []
    for place in sorted(joints):
        if spans and sum(spans[-1]) == place + 1:
            spans[-1] = (spans[-1][0], spans[-1][1] + 1)
        else:
            spans.append((place, 2))
    return spans


def _edits(gone: dict[Stack, list[int]]) -> list[Edit]:
    places: dict[tuple[str, int], list[int]] = {}
    for stack, joints in gone.items():
        places.setdefault((stack.name, stack.size), []).extend(stack.first + place for place in joints)
    return [Widen(name=name, size=size, spans=tuple(_spans(at))) for (name, size), at in places.items() if at]


def _merged(model: nn.Module, stack: Stack, joints: Sequence[int]) -> list[nn.Module]:
    """Return the blocks of ``stack`` with those at ``joints`` merged; the others are the model's own."""
    blocks = [model.get_submodule(name) for name in stack.blocks]
    for first, length in reversed(_spans(joints)):
        blocks[first : first + length] = [widened(blocks[first : first + length])]
    return blocks


def _moved(
    model: nn.Module,
    task: Task,
    stack: Stack,
    joints: Sequence[int],
    gone: dict[Stack, list[int]],
    batches: Sequence[Batch],
    wanted: Sequence[Tensor],
) -> float:
    """Return how far the logits move when the joints of ``stack`` are gone, beside those of the other stacks."""
    edited = model
    others = {other: places for other, places in gone.items() if other is not stack and places}
    if others:
        edited = apply_edits(model, _edits({**others, stack: list(joints)}))
        return _distance(edited, task, batches, wanted)
    with rewired(model, stack, _merged(model, stack, joints)):
        return _distance(edited, task, batches, wanted)


def _distance(model: nn.Module, task: Task, batches: Sequence[Batch], wanted: Sequence[Tensor]) -> float:
    total = 0.0
    with resting(model), torch.no_grad():
        for (inputs, target), logits in zip(batches, wanted, strict=True):
            now = task.output_logits(call(model, inputs))
            loss = soft_loss(now, logits, kind=task.distill, temperature=1.0, target=target)
            total += float(loss) * len(target)
    return total if math.isfinite(total) else math.inf


def _most_saved(model: nn.Module, task: Task) -> float:
    """Return the share of a pass that merging may save at most: half of the operations start no more."""
    given = (task.example,) if isinstance(task.example, Tensor) else task.example
    args, named = ((), given) if isinstance(given, Mapping) else (tuple(given), {})
    operators, seconds = traits(model, args, named).operators, interleaved([model], task.example, rounds=1)
    return 0.5 * operators * _START / float(seconds.min())


def _why_slow(model: nn.Module, task: Task, found: list[tuple[Stack, list[int]]]) -> str:
    """Return why merging does not pay on the task's example, or an empty string where it does."""
    most = _most_saved(model, task)
    if most < _GAIN:
        return f"operations start within {2 * most:.1%} of a pass, of which merging saves half at most"
    pairs = {stack: [place for place in joints if (place - joints[0]) % 2 == 0] for stack, joints in found}
    whole = {stack: list(joints) for stack, joints in found}
    models = [apply_edits(model, []), *(apply_edits(model, _edits(gone)) for gone in (pairs, whole))]
    for rounds in (1, 5):
        seconds = interleaved(models, task.example, rounds=rounds)
        ratios = np.median(seconds[:, 1:] / seconds[:, :1], axis=0)
        if max(ratios) > _HOPELESS:
            break
    if max(ratios) <= 1.0 - _GAIN:
        return ""
    return (
        f"merged in pairs a pass takes {ratios[0]:.2f} of its time and merged as a whole {ratios[1]:.2f}: it pays "
        "where a pass has few tokens"
    )
