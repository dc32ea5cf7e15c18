"""Fold batch norms into the layers beside them once a model is trained; nothing of what it computes changes.

`Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference
<https://arxiv.org/abs/1712.05877>`_ (Jacob et al., 2018), section 3.2: w_fold = gain w / sqrt(var + eps).

Departures: into the layer behind, too, where that reads the norm alone and does not pad with zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import nn

from torchgraft.bench.task import Task
from torchgraft.catalogue import Card
from torchgraft.engines.normalize.fold_away import BATCH_NORMS, FoldAway, FoldReader, NoteNorms
from torchgraft.engines.procedure import Procedure, Site
from torchgraft.engines.surgery.edits import Edit, history

__all__ = ["CARD", "NormFolding"]

CARD = Card(
    key="norm-folding",
    title="Batch norms folded into their layers",
    authors="Jacob et al., 2018",
    reference="https://arxiv.org/abs/1712.05877",
    family="shrink/prune",
    kind="procedure",
    engine=("normalize", "surgery"),
    equation="gain (W x - mean) / sqrt(var + eps) + shift = W' x + b'",
    entry="NormFolding",
    stage="norms",
    capabilities=frozenset({"needs-trace"}),
    oracles=(
        "the ended model gives the same outputs, 1e-12 in float64, and has no batch norm left that could be folded",
        "training before the end sees the batch norms",
    ),
    choose_when="always, where a model has batch norms: it costs nothing",
    choose_instead="norm-removal where the norms are layer norms",
    bibtex="@inproceedings{jacob2018quantization, title={Quantization and Training of Neural Networks for Efficient "
    "Integer-Arithmetic-Only Inference}, author={Jacob, Benoit and others}, booktitle={CVPR}, year={2018}}",
)


class NormFolding(Procedure):
    """Fold every batch norm that can be folded exactly, at any strength above 0, once the model is trained.

    Example:
        >>> import torch
        >>> from torchgraft.engines.surgery.edits import apply_edits
        >>> x, y = torch.randn(8, 1, 4, 4), torch.randint(0, 2, (8,))
        >>> layers = nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 2)
        >>> loss = nn.functional.cross_entropy
        >>> data = (x, y), (x, y), (x, y)
        >>> task = Task(nn.Sequential(*layers).eval(), *data, loss, lambda out, t: (out.argmax(1) == t).float())
        >>> folding = NormFolding()
        >>> model = folding.apply(nn.Sequential(*layers).eval(), task, 1.0)
        >>> apply_edits(model, folding.ending(model, task))[1]
        Identity()
    """

    card: ClassVar[Card] = CARD
    exact = True
    expense = 0

    def __init__(self) -> None:
        self._reader = FoldReader()

    def _names(self, model: nn.Module, task: Task, ignore: Sequence[str]) -> list[str]:
        if not any(isinstance(module, BATCH_NORMS) for module in model.modules()):
            return []
        folds = self._reader.read(model, task.example, ignore=ignore)
        return [norm for _, norm in folds.behind] + [norm for norm, _ in folds.ahead]

    def applies_to(self, model: nn.Module, task: Task, *, ignore: Sequence[str] = ()) -> list[Site]:
        """Return the batch norms that can be folded. See :class:`Procedure`."""
        return [
            Site(name, "batch norm", 1, sum(p.numel() for p in model.get_submodule(name).parameters()))
            for name in self._names(model, task, ignore)
        ]

    def plan(
        self, model: nn.Module, task: Task, strength: float, *, ignore: Sequence[str] = (), seed: int = 0
    ) -> list[Edit]:
        """Return one edit that notes them. See :class:`Procedure`."""
        return [NoteNorms(names=tuple(self._names(model, task, ignore)))]

    def ending(self, model: nn.Module, task: Task, *, ignore: Sequence[str] = ()) -> list[Edit]:
        """Return the edit that folds them. See :class:`Procedure`."""
        edits = history(model)
        noted = {name for edit in edits if isinstance(edit, NoteNorms) for name in edit.names}
        if not noted or any(isinstance(edit, FoldAway) for edit in edits):
            return []
        folds = self._reader.read(model, task.example, ignore=ignore)
        behind = tuple(pair for pair in folds.behind if pair[1] in noted)
        ahead = tuple(pair for pair in folds.ahead if pair[0] in noted)
        return [FoldAway(behind=behind, ahead=ahead)] if behind or ahead else []
