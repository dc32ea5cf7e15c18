"""Norm folding: batch norms stay while a model trains, and go into the layers beside them at its end."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from torchgraft.bench.task import Task
from torchgraft.engines.normalize.fold_away import FoldAway, NoteNorms
from torchgraft.engines.surgery.edits import apply_edits, history
from torchgraft.errors import BadInput, Untraceable
from torchgraft.shrink.prune.magnitude_pruning import MagnitudePruning
from torchgraft.shrink.prune.norm_folding import NormFolding


class _Conv(nn.Module):
    """A convolution with its batch norm behind it, and a batch norm in front of an unpadded convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.norm2, self.conv2 = nn.BatchNorm2d(4), nn.Conv2d(4, 3, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.norm1(self.conv1(x)))
        out: Tensor = self.conv2(self.norm2(hidden * hidden)).mean((2, 3))
        return out


class _Branching(_Conv):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if bool(x.sum() > -1e9) else x


def _task(model: nn.Module) -> Task:
    draw = torch.Generator().manual_seed(3)
    x = torch.randn(40, 1, 4, 4, generator=draw, dtype=torch.float64)
    y = torch.randint(0, 3, (40,), generator=draw)
    return Task(
        model,
        (x, y),
        (x, y),
        (x, y),
        nn.functional.cross_entropy,
        lambda out, target: (out.argmax(-1) == target).float(),
        example_inputs=x[:4],
    )


def _random(model: nn.Module) -> nn.Module:
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for value in (*model.parameters(), *model.buffers()):
            if value.dtype.is_floating_point:
                value.copy_(torch.rand(value.shape, generator=draw) + 0.2)
    return model.double().eval()


def _norms(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)]


@pytest.mark.parametrize("strength", [0.01, 1.0])
def test_norms_stay_while_the_model_trains_and_then_fold_exactly(strength: float) -> None:
    model = _random(_Conv())
    task = _task(model)
    procedure = NormFolding()
    changed = procedure.apply(model, task, strength)
    assert _norms(changed) == ["norm1", "norm2"]
    changed.train()
    optimizer = torch.optim.SGD(changed.parameters(), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(changed(task.train.inputs), task.train.target).backward()
        optimizer.step()
    changed.eval()
    assert not torch.equal(changed.norm1.running_mean, model.norm1.running_mean)  # type: ignore[union-attr]
    (fold,) = procedure.ending(changed, task)
    assert isinstance(fold, FoldAway)
    assert fold.behind == (("conv1", "norm1"),)
    assert fold.ahead == (("norm2", ("conv2",)),)
    ended = apply_edits(changed, [fold])
    assert _norms(ended) == []
    x = torch.randn(3, 1, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(ended(x), changed(x), rtol=1e-12, atol=1e-12)
    assert procedure.ending(ended, task) == []


def test_what_is_to_be_left_alone_keeps_its_norm() -> None:
    model = _random(_Conv())
    task = _task(model)
    procedure = NormFolding()
    (edit,) = procedure.plan(model, task, 1.0, ignore=["conv2"])
    assert edit == NoteNorms(names=("norm1",))
    (fold,) = procedure.ending(apply_edits(model, [edit]), task)
    assert fold.describe() == {"conv1": "norm folded in", "norm1": "norm folded into conv1"}
    assert NormFolding().applies_to(model, task, ignore=["conv1", "norm2"]) == []


def test_a_model_that_was_narrowed_is_not_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _random(_Conv())
    task = _task(model)
    procedure = NormFolding()
    noted = procedure.apply(model, task, 1.0)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("traced again")

    monkeypatch.setattr("torchgraft.engines.normalize.fold_away.read_norms", refuse)
    narrow = procedure.apply(MagnitudePruning().apply(model, task, 0.5), task, 1.0)
    assert narrow.conv1.out_channels < model.conv1.out_channels  # type: ignore[union-attr, operator]
    (fold,) = procedure.ending(narrow, task)
    assert (fold,) == tuple(procedure.ending(noted, task))
    x = torch.randn(3, 1, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(apply_edits(narrow, [fold])(x), narrow(x), rtol=1e-12, atol=1e-12)


def test_a_model_without_the_note_ends_as_it_is() -> None:
    model = _random(_Conv())
    task = _task(model)
    assert NormFolding().ending(model, task) == []
    assert history(NormFolding().apply(model, task, 0.0)) == ()


def test_a_note_of_what_is_no_batch_norm_is_refused() -> None:
    with pytest.raises(BadInput, match="no batch norm 'conv1'"):
        NoteNorms(names=("conv1",)).rewrite(_Conv())


def test_a_model_that_branches_on_its_data_is_refused_with_the_line() -> None:
    model = _random(_Branching())
    with pytest.raises(Untraceable) as caught:
        NormFolding().applies_to(model, _task(model))
    assert caught.value.line is not None
