"""Take the norms out of a model: batch norms fold away as they are, layer norms after they have become batch norms.

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

import json
import math
from collections.abc import Sequence
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from torchgraft.bench.meters.forward import resting
from torchgraft.bench.task import Inputs, Task, call, take
from torchgraft.catalogue import Card
from torchgraft.engines.normalize.fold import ChannelAffine, Folds, channel_affine, fold_affine, plan_folds
from torchgraft.engines.normalize.fold_readers import places, read_norms
from torchgraft.engines.normalize.placement import leave_fast_path
from torchgraft.engines.parametrize import FoldNorms, norm_pairs
from torchgraft.engines.procedure import Procedure, Site, check_strength, ignored
from torchgraft.engines.surgery.edits import Edit, apply_edits, edit_to_record, history
from torchgraft.engines.surgery.swap import replace_module
from torchgraft.engines.taps import Record, record
from torchgraft.errors import BadInput
from torchgraft.parts.norms.slab_prepbn import PRepBN, from_layer_norm

__all__ = ["CARD", "ChannelLine", "FoldAway", "NormRemoval", "ReplaceNorms", "nearest_line"]

CARD = Card(
    key="norm-removal",
    title="Norms that fold away",
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
        "with batch norms alone the ended model gives the same outputs, 1e-12 in float64",
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

_BATCH = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class ChannelLine(nn.Module):
    """y = weight * x + bias, a number a channel, the channels last: what is left of a norm that nothing takes up.

    Args:
        channels: C.

    Shapes:
        (..., C) -> the same
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Return the line at ``x``."""
        return torch.addcmul(self.bias, x, self.weight)


class ReplaceNorms(Edit):
    """Layer norms become :class:`~torchgraft.parts.norms.slab_prepbn.PRepBN`; batch norms are noted, to be folded.

    Args:
        layer_norms: their names.
        batch_norms: names of those that are to be folded once the model is trained.
        steps: training passes over which a layer norm gives way.
    """

    op: ClassVar[str] = "replace-norms"
    layer_norms: tuple[str, ...]
    batch_norms: tuple[str, ...]
    steps: int

    def rewrite(self, model: nn.Module) -> nn.Module:
        """Replace the layer norms of ``model``, in place."""
        for name in self.layer_norms:
            old = model.get_submodule(name)
            if not isinstance(old, nn.LayerNorm):
                raise BadInput(f"replace-norms: {name!r} is a {type(old).__name__}, no layer norm")
            leave_fast_path(model.get_submodule(name.rpartition(".")[0]))
            replace_module(model, name, from_layer_norm(old, steps=self.steps))
        return model

    def describe(self) -> dict[str, str]:
        """Say what becomes of each norm."""
        replaced = dict.fromkeys(self.layer_norms, "layer norm to batch norm")
        return {**replaced, **dict.fromkeys(self.batch_norms, "batch norm to be folded")}


class FoldAway(Edit):
    """Multiply norms into the layers before or behind them; what nothing takes up becomes a :class:`ChannelLine`.

    Args:
        behind: (layer, batch norm): the layer before the norm takes it up.
        ahead: (norm, layers): the layers that read the norm take it up.
        lines: norms that stay as a line.
    """

    op: ClassVar[str] = "fold-norms-away"
    behind: tuple[tuple[str, str], ...] = ()
    ahead: tuple[tuple[str, tuple[str, ...]], ...] = ()
    lines: tuple[str, ...] = ()

    @torch.no_grad()
    def rewrite(self, model: nn.Module) -> nn.Module:
        """Fold the norms of ``model``, in place."""
        if self.behind:
            FoldNorms(pairs=self.behind).rewrite(model)
        for name, readers in self.ahead:
            scale, shift = _affine_of(model, name)
            for reader in readers:
                layer = model.get_submodule(reader)
                weight = layer.get_parameter("weight")
                if (
                    getattr(layer, "bias", None) is None
                ):  # whatever the shift: what replays this edit knows the shapes alone
                    layer.bias = nn.Parameter(weight.new_zeros(_outputs(layer)), requires_grad=weight.requires_grad)
                fold_affine(layer, scale, shift)
            replace_module(model, name, nn.Identity())
        for name in self.lines:
            scale, shift = _affine_of(model, name)
            anchor = next(model.get_submodule(name).parameters())
            line = ChannelLine(len(scale)).to(anchor.device, anchor.dtype)
            line.weight.copy_(scale)
            line.bias.copy_(shift)
            replace_module(model, name, line.train(model.get_submodule(name).training))
        return model

    def describe(self) -> dict[str, str]:
        """Say where each norm went."""
        behind = {norm: f"norm folded into {layer}" for layer, norm in self.behind}
        ahead = {norm: f"norm folded into {', '.join(readers)}" for norm, readers in self.ahead}
        readers = {layer: "norm folded in" for layer, _ in self.behind}
        readers |= {layer: "norm folded in" for _, layers in self.ahead for layer in layers}
        return {**readers, **behind, **ahead, **dict.fromkeys(self.lines, "norm is a line a channel")}


def _outputs(layer: nn.Module) -> int:
    return cast(int, getattr(layer, "out_features", None) or getattr(layer, "out_channels", None) or layer.nf)


def _affine_of(model: nn.Module, name: str) -> tuple[Tensor, Tensor]:
    norm = model.get_submodule(name).eval()
    return channel_affine(norm.folded() if isinstance(norm, Folds) else norm)


def nearest_line(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, float]:
    """Return slope and height of y ~ slope (x - mean of x) + height, (C,) each, and the share left unexplained.

    Args:
        x, y: what goes into a norm and what comes out, (N, C).

    Example:
        >>> x = torch.tensor([[0.0], [1.0], [2.0]])
        >>> slope, height, rest = nearest_line(x, 3 * x + 1)
        >>> slope.item(), height.item(), rest
        (3.0, 4.0, 0.0)
    """
    off, height = x - x.mean(0), y.mean(0)
    power = off.square().sum(0)
    slope = (off * (y - height)).sum(0) / torch.where(power > 0, power, torch.ones_like(power))
    rest, whole = (y - height - slope * off).square().sum(), (y - height).square().sum()
    return slope, height, float(rest / whole) if whole > 0 else 0.0


class NormRemoval(Procedure):
    """Let batch norms go, and layer norms too: a share of them that is the strength.

    Batch norms fold exactly, so all of them go at any strength. Nothing is folded before the model is trained:
    :meth:`ending` does it.

    Args:
        steps: training passes over which a layer norm gives way to its batch norm.
        samples: training samples of the calibration.
    """

    card: ClassVar[Card] = CARD

    def __init__(self, *, steps: int = 30, samples: int = 256) -> None:
        if steps < 0 or samples < 2:
            raise BadInput(f"steps must not be negative and samples at least 2, got {steps} and {samples}")
        self.steps, self.samples = steps, samples
        self._known: dict[str, FoldAway] = {}

    def _norms(self, model: nn.Module, task: Task, ignore: Sequence[str]) -> tuple[list[str], list[str]]:
        """Return the names of layer norms over tokens, and of batch norms that can be folded."""
        free = places(model)[0]
        names = [
            name
            for name, module in free.items()
            if type(module) is nn.LayerNorm and len(module.normalized_shape) == 1 and not ignored(name, ignore)
        ]
        if names:
            into = self._inputs(model, task.example, names)
            names = [
                name
                for name in names
                if name in into and all(isinstance(x, Tensor) and x.ndim in (2, 3) for x in into.calls(name))
            ]
        batch = []
        if any(isinstance(module, _BATCH) for module in free.values()):
            folds = self._folds(model, [], task, ignore)
            batch = [norm for _, norm in folds.behind] + [norm for norm, _ in folds.ahead]
        return names, batch

    @staticmethod
    def _inputs(model: nn.Module, inputs: Inputs, names: Sequence[str]) -> Record:
        with resting(model), torch.no_grad(), record(model, names, what="input") as into:
            call(model, inputs)
        return into

    def applies_to(self, model: nn.Module, task: Task, *, ignore: Sequence[str] = ()) -> list[Site]:
        """Return the layer norms over tokens and the batch norms that can be folded. See :class:`Procedure`."""
        layer, batch = self._norms(model, task, ignore)
        size = {name: sum(p.numel() for p in model.get_submodule(name).parameters()) for name in (*layer, *batch)}
        kinds = {**dict.fromkeys(layer, "layer norm"), **dict.fromkeys(batch, "batch norm")}
        return [Site(name, kind, 1, size[name]) for name, kind in kinds.items()]

    def _lines(
        self, model: nn.Module, task: Task, names: Sequence[str]
    ) -> dict[str, tuple[Tensor, Tensor, Tensor, Tensor, float]]:
        """Return for every layer norm mean and variance of its input, and the line that comes nearest to it."""
        found: dict[str, tuple[Tensor, Tensor, Tensor, Tensor, float]] = {}
        if not names:
            return found
        into = self._inputs(model, take(task.train.inputs, slice(min(self.samples, len(task.train)))), names)
        for name in names:
            x = torch.cat([each.flatten(0, -2) for each in into.calls(name)])
            slope, height, rest = nearest_line(x, model.get_submodule(name)(x).detach())
            found[name] = (x.mean(0), x.var(0, unbiased=False), slope, height, rest)
        return found

    def plan(
        self, model: nn.Module, task: Task, strength: float, *, ignore: Sequence[str] = (), seed: int = 0
    ) -> list[Edit]:
        """Return one edit that names the norms to go. See :class:`Procedure`."""
        layer, batch = self._norms(model, task, ignore)
        lines = self._lines(model, task, layer)
        nearest = sorted(layer, key=lambda name: lines[name][-1])[: math.ceil(strength * len(layer))]
        names = tuple(name for name in layer if name in nearest)
        return [ReplaceNorms(layer_norms=names, batch_norms=tuple(batch), steps=self.steps)]

    def apply(
        self, model: nn.Module, task: Task, strength: float, *, ignore: Sequence[str] = (), seed: int = 0
    ) -> nn.Module:
        """Return a changed copy whose batch norms stand in for layer norms already. See :class:`Procedure`."""
        changed = super().apply(model, task, strength, ignore=ignore, seed=seed)
        names = [name for name, module in changed.named_modules() if isinstance(module, PRepBN)]
        fresh = [name for name in names if isinstance(model.get_submodule(name), nn.LayerNorm)]
        if check_strength(strength) == 0.0 or not fresh:
            return changed
        with torch.no_grad():
            for name, (mean, var, slope, height, _) in self._lines(model, task, fresh).items():
                batch_norm = cast(PRepBN, changed.get_submodule(name)).rep
                batch_norm.running_mean.copy_(mean)
                batch_norm.running_var.copy_(var)
                gain = (slope - batch_norm.eta) * torch.sqrt(batch_norm.running_var + batch_norm.eps)
                batch_norm.get_parameter("weight").copy_(gain)
                batch_norm.get_parameter("bias").copy_(height - batch_norm.eta * mean)
        return changed

    def ending(self, model: nn.Module, task: Task, *, ignore: Sequence[str] = ()) -> list[Edit]:
        """Return the edit that folds away what this procedure has replaced and noted. See :class:`Procedure`."""
        edits = [edit for edit in history(model) if isinstance(edit, ReplaceNorms)]
        if not edits or any(isinstance(edit, FoldAway) for edit in history(model)):
            return []
        names = [name for name, module in model.named_modules() if isinstance(module, PRepBN)]
        return [self._folds(model, names, task, ignore)]

    def _folds(self, model: nn.Module, replaced: Sequence[str], task: Task, ignore: Sequence[str]) -> FoldAway:
        """Return :meth:`_read`, which traces, once for models that are built alike; a run asks for each many times."""
        edits = [e for e in history(model) if not isinstance(e, ReplaceNorms) or e.layer_norms]
        key = json.dumps([edit_to_record(edit) for edit in edits], sort_keys=True) + repr(model) + repr(list(ignore))
        if key not in self._known:
            self._known[key] = self._read(model, replaced, task, ignore)
        return self._known[key]

    def _read(self, model: nn.Module, replaced: Sequence[str], task: Task, ignore: Sequence[str]) -> FoldAway:
        plain = apply_edits(model, []).eval()
        if any(isinstance(module, _BATCH) for module in plain.modules()):
            read_norms(plain, task.example, {})  # what cannot be traced is refused here, with the line
        for name in replaced:
            replace_module(plain, name, cast(PRepBN, plain.get_submodule(name)).folded())
        behind = tuple(
            pair for pair in norm_pairs(plain, task.example) if not any(ignored(name, ignore) for name in pair)
        )
        gone = {norm for _, norm in behind}
        ahead = tuple(
            (fold.name, fold.readers)
            for fold in plan_folds(plain, task.example, affine=False)
            if fold.readers
            and fold.name not in gone
            and isinstance(plain.get_submodule(fold.name), (ChannelAffine, *_BATCH))
            and not any(ignored(name, ignore) for name in (fold.name, *fold.readers))
        )
        taken = {norm for norm, _ in ahead}
        return FoldAway(behind=behind, ahead=ahead, lines=tuple(name for name in replaced if name not in taken))
