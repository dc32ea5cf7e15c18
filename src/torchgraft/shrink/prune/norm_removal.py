"""Take the layer norms out of a model: they become batch norms, which fold away once it is trained.

`SLAB: Efficient Transformers with Simplified Linear Attention and Progressive Re-parameterized Batch Normalization
<https://arxiv.org/abs/2405.11582>`_ (Guo et al., 2024), whose replacement this sets going in a trained model:
y = lam LN(x) + (1 - lam) (BN(x) + eta x), lam from 1 to 0 over the first steps of recovery; then y = a x + c goes into
the layers that read it.

Departures: the batch norm does not start from LN's gain and shift but from the line a x + c that comes nearest to what
the layer norm gives on calibration samples, channel by channel, so that a model is of use before any training. Layer
norms that such a line explains best are replaced first. A line that no layer can take up stays as one multiplication
and addition.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn

from torchgraft.bench.meters.forward import resting
from torchgraft.bench.task import Inputs, Task, call, take
from torchgraft.catalogue import Card
from torchgraft.engines.normalize.fold_away import FoldAway, FoldReader
from torchgraft.engines.normalize.fold_readers import places
from torchgraft.engines.normalize.placement import leave_fast_path
from torchgraft.engines.procedure import Procedure, Site, ignored
from torchgraft.engines.surgery.edits import Edit, history
from torchgraft.engines.surgery.swap import replace_module
from torchgraft.engines.taps import Record, record
from torchgraft.errors import BadInput
from torchgraft.parts.norms.slab_prepbn import PRepBN, from_layer_norm

__all__ = ["CARD", "Line", "NormRemoval", "ReplaceNorms", "nearest_line"]

CARD = Card(
    key="norm-removal",
    title="Layer norms that fold away",
    authors="Guo et al., 2024",
    reference="https://arxiv.org/abs/2405.11582",
    family="shrink/prune",
    kind="procedure",
    engine=("normalize", "surgery"),
    equation="LN(x) -> lam LN(x) + (1 - lam) (BN(x) + eta x), lam -> 0; then W (a x + c) + b = (W a) x + (b + W c)",
    entry="NormRemoval",
    stage="norms",
    capabilities=frozenset({"needs-data", "needs-trace"}),
    oracles=(
        "the line of a channel is that of least squares, by hand and by torch.linalg.lstsq",
        "before any training a replaced norm gives the nearest line, on the samples of calibration",
        "the ended model gives what the recovered one gives in eval mode, 1e-12 in float64, and has no norm left that "
        "was replaced",
    ),
    choose_when="latency or size counts and the model is cut so small that its norms cost as much as its layers",
    choose_instead="nothing at all where norms are a small share of the work; layer norms stay in causal models whose "
    "training must not see later tokens, since batch statistics do",
    bibtex="@inproceedings{guo2024slab, title={{SLAB}: Efficient Transformers with Simplified Linear Attention and "
    "Progressive Re-parameterized Batch Normalization}, author={Guo, Jialong and Chen, Xinghao and Tang, Yehui and "
    "Wang, Yunhe}, booktitle={ICML}, year={2024}}",
)


class ReplaceNorms(Edit):
    """Layer norms become :class:`~torchgraft.parts.norms.slab_prepbn.PRepBN`.

    Args:
        names: of the layer norms.
        steps: training passes over which each gives way.
    """

    op: ClassVar[str] = "replace-norms"
    names: tuple[str, ...]
    steps: int

    def rewrite(self, model: nn.Module) -> nn.Module:
        """Replace the layer norms of ``model``, in place."""
        for name in self.names:
            old = model.get_submodule(name)
            if not isinstance(old, nn.LayerNorm):
                raise BadInput(f"replace-norms: {name!r} is a {type(old).__name__}, no layer norm")
            leave_fast_path(model.get_submodule(name.rpartition(".")[0]))
            replace_module(model, name, from_layer_norm(old, steps=self.steps))
        return model

    def describe(self) -> dict[str, str]:
        """Say what becomes of each norm."""
        return dict.fromkeys(self.names, "layer norm to batch norm")


class Line(NamedTuple):
    """y ~ slope (x - mean) + height, a number a channel, the variance of x, and the share of y's left unexplained."""

    mean: Tensor
    var: Tensor
    slope: Tensor
    height: Tensor
    rest: float


def nearest_line(x: Tensor, y: Tensor) -> Line:
    """Return the line of least squares of each channel.

    Args:
        x, y: what goes into a norm and what comes out, (N, C).

    Example:
        >>> x = torch.tensor([[0.0], [1.0], [2.0]])
        >>> line = nearest_line(x, 3 * x + 1)
        >>> line.slope.item(), line.height.item(), line.rest
        (3.0, 4.0, 0.0)
    """
    mean, height = x.mean(0), y.mean(0)
    var = (x - mean).square().mean(0)
    slope = ((x - mean) * (y - height)).mean(0) / torch.where(var > 0, var, torch.ones_like(var))
    left, whole = (y - height - slope * (x - mean)).square().sum(), (y - height).square().sum()
    return Line(mean, var, slope, height, float(left / whole) if whole > 0 else 0.0)


def _inputs(model: nn.Module, inputs: Inputs, names: Sequence[str]) -> Record:
    with resting(model), torch.no_grad(), record(model, names, what="input") as into:
        call(model, inputs)
    return into


def _replaceable(norm: nn.LayerNorm) -> bool:
    """Say whether a batch norm can stand for ``norm``: of one axis, with a gain that tells its dtype, and an eps."""
    return len(norm.normalized_shape) == 1 and norm.elementwise_affine and norm.eps > 0


class NormRemoval(Procedure):
    """Let layer norms go, a share of them that is the strength; :meth:`ending` folds what they have become.

    Args:
        steps: training passes over which a layer norm gives way to its batch norm.
        samples: training samples of the calibration.
    """

    card: ClassVar[Card] = CARD

    def __init__(self, *, steps: int = 30, samples: int = 256) -> None:
        if steps < 0 or samples < 2:
            raise BadInput(f"steps must not be negative and samples at least 2, got {steps} and {samples}")
        self.steps, self.samples = steps, samples
        self._reader = FoldReader()

    def _norms(self, model: nn.Module, task: Task, ignore: Sequence[str]) -> list[str]:
        """Return the names of the layer norms over tokens."""
        names = [
            name
            for name, module in places(model)[0].items()
            if type(module) is nn.LayerNorm and _replaceable(module) and not ignored(name, ignore)
        ]
        if not names:
            return []
        into = _inputs(model, task.example, names)
        tokens = {
            name
            for name in names
            if name in into and all(isinstance(x, Tensor) and x.ndim in (2, 3) for x in into.calls(name))
        }
        return [name for name in names if name in tokens]

    def applies_to(self, model: nn.Module, task: Task, *, ignore: Sequence[str] = ()) -> list[Site]:
        """Return the layer norms over tokens. See :class:`Procedure`."""
        return [
            Site(name, "layer norm", 1, sum(p.numel() for p in model.get_submodule(name).parameters()))
            for name in self._norms(model, task, ignore)
        ]

    def _lines(self, model: nn.Module, task: Task, names: Sequence[str]) -> dict[str, Line]:
        into = _inputs(model, take(task.train.inputs, slice(min(self.samples, len(task.train)))), names)
        found = {}
        for name in names:
            x = torch.cat([each.flatten(0, -2) for each in into.calls(name)])
            found[name] = nearest_line(x, model.get_submodule(name)(x).detach())
        return found

    def plan(
        self, model: nn.Module, task: Task, strength: float, *, ignore: Sequence[str] = (), seed: int = 0
    ) -> list[Edit]:
        """Return one edit: the layer norms that a line explains best. See :class:`Procedure`."""
        names = self._norms(model, task, ignore)
        lines = self._lines(model, task, names)
        nearest = sorted(names, key=lambda name: lines[name].rest)[: math.ceil(strength * len(names))]
        return [ReplaceNorms(names=tuple(name for name in names if name in nearest), steps=self.steps)]

    def apply(
        self, model: nn.Module, task: Task, strength: float, *, ignore: Sequence[str] = (), seed: int = 0
    ) -> nn.Module:
        """Return a changed copy, its batch norms already near to the layer norms. See :class:`Procedure`."""
        changed = super().apply(model, task, strength, ignore=ignore, seed=seed)
        edits = [edit for edit in history(changed)[len(history(model)) :] if isinstance(edit, ReplaceNorms)]
        names = [name for edit in edits for name in edit.names]
        if not names:
            return changed
        with torch.no_grad():
            for name, line in self._lines(model, task, names).items():
                new = cast(PRepBN, changed.get_submodule(name)).rep
                new.running_mean.copy_(line.mean)
                new.running_var.copy_(line.var)
                gain = (line.slope - new.eta) * torch.sqrt(new.running_var + new.eps)
                new.get_parameter("weight").copy_(gain)
                new.get_parameter("bias").copy_(line.height - new.eta * line.mean)
        return changed

    def ending(self, model: nn.Module, task: Task, *, ignore: Sequence[str] = ()) -> list[Edit]:
        """Return the edit that folds away what this procedure has replaced. See :class:`Procedure`."""
        edits = history(model)
        begun = any(isinstance(edit, ReplaceNorms) for edit in edits)
        if not begun or any(isinstance(edit, FoldAway) for edit in edits):
            return []
        return [self._reader.read(model, task.example, ignore=ignore)]
