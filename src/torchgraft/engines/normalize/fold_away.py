"""Fold the norms of a trained model away as one edit: into the layers before or behind them, or to a line a channel."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from torchgraft.bench.task import Inputs
from torchgraft.engines.normalize.fold import ChannelAffine, Folds, channel_affine, fold_affine, plan_folds
from torchgraft.engines.normalize.fold_readers import read_norms
from torchgraft.engines.parametrize import FoldNorms, norm_pairs
from torchgraft.engines.sites import ignored
from torchgraft.engines.surgery.edits import Edit, apply_edits, edit_to_record, history
from torchgraft.engines.surgery.slicing import Slice
from torchgraft.engines.surgery.swap import replace_module
from torchgraft.errors import BadInput

__all__ = ["BATCH_NORMS", "ChannelLine", "FoldAway", "FoldReader", "NoteNorms"]

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


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


class NoteNorms(Edit):
    """Note which batch norms are to be folded once the model is trained; nothing is changed yet.

    Args:
        names: of the batch norms.
    """

    op: ClassVar[str] = "note-norms"
    idle: ClassVar[bool] = True
    names: tuple[str, ...]

    def rewrite(self, model: nn.Module) -> nn.Module:
        """Return ``model`` as it is."""
        known = dict(model.named_modules())
        for name in self.names:
            if not isinstance(known.get(name), BATCH_NORMS):
                raise BadInput(f"note-norms: the model has no batch norm {name!r}")
        return model

    def describe(self) -> dict[str, str]:
        """Say what will become of each norm."""
        return dict.fromkeys(self.names, "batch norm to be folded")


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


class FoldReader:
    """Finds out which norms of a model fold away; asked again of a model that is built alike, it remembers."""

    def __init__(self) -> None:
        self._known: dict[str, FoldAway] = {}

    def read(self, model: nn.Module, example: Inputs, *, ignore: Sequence[str] = ()) -> FoldAway:
        """Return what folds in ``model``, which is left as it is.

        Args:
            model: any module; it is read as in eval mode.
            example: its inputs, on which it is traced.
            ignore: globs of modules that take up nothing and stay.

        Raises:
            Untraceable: the model has batch norms and cannot be traced, and no neighbours in it tell who reads what.
        """
        # Neither how wide its layers are nor a note changes who reads what.
        edits = [edit_to_record(edit) for edit in history(model) if not isinstance(edit, (Slice, NoteNorms))]
        parts = [(name, type(module).__qualname__) for name, module in model.named_modules()]
        key = json.dumps([parts, edits, list(ignore)], sort_keys=True)
        if key not in self._known:
            self._known[key] = self._traced(model, example, ignore)
        return self._known[key]

    def _traced(self, model: nn.Module, example: Inputs, ignore: Sequence[str]) -> FoldAway:
        plain = apply_edits(model, []).eval()
        kinds = dict(plain.named_modules())
        replaced = [name for name, module in kinds.items() if isinstance(module, Folds) and not ignored(name, ignore)]
        for name in replaced:
            replace_module(plain, name, cast(Folds, kinds[name]).folded())
        behind = tuple(pair for pair in norm_pairs(plain, example) if not any(ignored(name, ignore) for name in pair))
        if not behind and any(isinstance(module, BATCH_NORMS) for module in kinds.values()):
            read_norms(plain, example, {})  # a model that cannot be traced is refused here, with the line
        gone = {norm for _, norm in behind}
        left = [
            name
            for name, module in plain.named_modules()
            if isinstance(module, (ChannelAffine, *BATCH_NORMS)) and name not in gone and not ignored(name, ignore)
        ]
        ahead = tuple(
            (fold.name, fold.readers)
            for fold in (plan_folds(plain, example, affine=False) if left else ())
            if fold.name in left and fold.readers and not any(ignored(name, ignore) for name in fold.readers)
        )
        taken = {norm for norm, _ in ahead}
        lines = [n for n in replaced if n not in taken and isinstance(plain.get_submodule(n), ChannelAffine)]
        return FoldAway(behind=behind, ahead=ahead, lines=tuple(lines))
