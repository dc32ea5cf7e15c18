"""Norm removal: the line of each channel, what is replaced, and a model that says the same once its norms fold."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from torchgraft.bench.task import Task
from torchgraft.engines.normalize.fold_away import ChannelLine, FoldAway
from torchgraft.engines.surgery.edits import apply_edits, history
from torchgraft.errors import BadInput
from torchgraft.parts.norms.slab_prepbn import PRepBN
from torchgraft.shrink.prune.norm_removal import NormRemoval, ReplaceNorms, nearest_line


class _Net(nn.Module):
    """Tokens (B, T, 6): a norm read by one layer, one read by two, one that is added to, and one on a single token."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3, self.norm4 = (nn.LayerNorm(6) for _ in range(4))
        self.fc1, self.fc2, self.fc3 = nn.Linear(6, 6), nn.Linear(6, 6, bias=False), nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.fc1(self.norm1(x))
        y = self.norm2(x)
        x = x + self.fc2(y) * torch.sigmoid(self.fc3(y))
        x = x + self.norm3(x) * 0.5
        out: Tensor = self.head(self.norm4(x[:, 0]))
        return out


def _task(model: nn.Module, *shape: int) -> Task:
    draw = torch.Generator().manual_seed(3)
    x, y = torch.randn(40, *shape, generator=draw), torch.randint(0, 3, (40,), generator=draw)
    example = x[:4].to(next(model.parameters()).dtype)
    x = x.to(example.dtype)
    loss = nn.functional.cross_entropy
    return Task(model, (x, y), (x, y), (x, y), loss, lambda o, t: (o.argmax(-1) == t).float(), example_inputs=example)


def _random(model: nn.Module) -> nn.Module:
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for value in (*model.parameters(), *model.buffers()):
            if value.dtype.is_floating_point:
                value.copy_(torch.rand(value.shape, generator=draw) + 0.2)
    return model.double().eval()


def test_the_line_of_a_channel_is_that_of_least_squares() -> None:
    draw = torch.Generator().manual_seed(0)
    x, y = (torch.randn(50, 3, generator=draw, dtype=torch.float64) for _ in range(2))
    _, _, slope, height, rest = nearest_line(x, y)
    left = 0.0
    for channel in range(3):
        design = torch.stack([x[:, channel] - x[:, channel].mean(), torch.ones(50, dtype=torch.float64)], 1)
        found = torch.linalg.lstsq(design, y[:, channel : channel + 1])
        torch.testing.assert_close(torch.stack([slope[channel], height[channel]]), found.solution.flatten())
        left += float((y[:, channel : channel + 1] - design @ found.solution).square().sum())
    assert rest == pytest.approx(left / float((y - y.mean(0)).square().sum()))


def test_a_channel_that_never_changes_has_no_slope() -> None:
    _, _, slope, height, rest = nearest_line(torch.ones(4, 1), torch.tensor([[1.0], [2.0], [3.0], [4.0]]))
    assert (slope.item(), height.item(), rest) == (0.0, 2.5, 1.0)


def test_before_any_training_a_norm_gives_the_nearest_line() -> None:
    model = _random(_Net())
    task = _task(model, 5, 6)
    changed = NormRemoval().apply(model, task, 1.0)
    x = torch.cat(list(task.train.inputs))  # type: ignore[union-attr]
    y = model.norm1(x)  # type: ignore[operator]
    _, _, slope, height, _ = nearest_line(x, y.detach())
    torch.testing.assert_close(changed.norm1(x), slope * (x - x.mean(0)) + height)  # type: ignore[operator]


def test_the_ended_model_says_what_the_trained_one_says_and_holds_no_replaced_norm() -> None:
    model = _random(_Net())
    task = _task(model, 5, 6)
    procedure = NormRemoval(steps=3)
    changed = procedure.apply(model, task, 1.0)
    assert {name for name, module in changed.named_modules() if isinstance(module, PRepBN)} == {
        "norm1",
        "norm2",
        "norm3",
        "norm4",
    }
    changed.train()
    optimizer = torch.optim.SGD(changed.parameters(), lr=0.01)
    for _ in range(5):
        optimizer.zero_grad()
        nn.functional.cross_entropy(changed(task.train.inputs), task.train.target).backward()
        optimizer.step()
    changed.eval()
    (fold,) = procedure.ending(changed, task)
    assert isinstance(fold, FoldAway)
    assert dict(fold.ahead) == {"norm1": ("fc1",), "norm2": ("fc2", "fc3"), "norm4": ("head",)}
    assert fold.lines == ("norm3",)
    ended = apply_edits(changed, [fold])
    kinds = {name: type(module) for name, module in ended.named_children() if name.startswith("norm")}
    assert kinds == {"norm1": nn.Identity, "norm2": nn.Identity, "norm3": ChannelLine, "norm4": nn.Identity}
    x = torch.randn(7, 5, 6, dtype=torch.float64)
    torch.testing.assert_close(ended(x), changed(x), rtol=1e-12, atol=1e-12)
    assert procedure.ending(ended, task) == []


def test_strength_is_the_share_of_layer_norms_and_the_best_explained_go_first() -> None:
    model = _random(_Net())
    task = _task(model, 5, 6)
    counts = []
    for strength in (0.1, 0.5, 0.75, 1.0):
        (edit,) = NormRemoval().plan(model, task, strength)
        assert isinstance(edit, ReplaceNorms)
        counts.append(len(edit.names))
    assert counts == [1, 2, 3, 4]
    (first,) = NormRemoval().plan(model, task, 0.1)
    from torchgraft.engines.taps import record

    names = ["norm1", "norm2", "norm3", "norm4"]
    with record(model, names, what="input") as into:
        model(task.train.inputs)
    rest = {}
    for name in names:
        x = torch.cat([each.flatten(0, -2) for each in into.calls(name)])
        rest[name] = nearest_line(x, model.get_submodule(name)(x).detach()).rest
    assert isinstance(first, ReplaceNorms)
    assert first.names == (min(rest, key=rest.__getitem__),)


def test_what_is_to_be_left_alone_takes_up_no_norm() -> None:
    model = _random(_Net())
    task = _task(model, 5, 6)
    procedure = NormRemoval()
    changed = procedure.apply(model, task, 1.0, ignore=["fc3", "norm4"])
    assert isinstance(changed.norm4, nn.LayerNorm)
    (fold,) = procedure.ending(changed, task, ignore=["fc3", "norm4"])
    assert isinstance(fold, FoldAway)
    assert dict(fold.ahead) == {"norm1": ("fc1",)}
    assert set(fold.lines) == {"norm2", "norm3"}


def test_ending_anothers_model_does_nothing_and_a_model_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _random(_Net())
    task = _task(model, 5, 6)
    procedure = NormRemoval()
    assert procedure.ending(model, task) == []
    changed = procedure.apply(model, task, 1.0)
    first = procedure.ending(changed, task)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("traced again")

    monkeypatch.setattr("torchgraft.engines.normalize.fold_away.norm_pairs", refuse)
    assert procedure.ending(copy.deepcopy(changed), task) == first
    other = procedure.apply(model, task, 0.1)
    assert history(other) != history(changed)
    with pytest.raises(AssertionError, match="traced again"):
        procedure.ending(other, task)


def test_a_replayed_edit_that_names_no_layer_norm_is_refused() -> None:
    with pytest.raises(BadInput, match="no layer norm"):
        ReplaceNorms(names=("fc1",), steps=1).rewrite(_Net())


@pytest.mark.parametrize("settings", [{"steps": -1}, {"samples": 1}])
def test_settings_out_of_range_are_refused(settings: dict[str, int]) -> None:
    with pytest.raises(BadInput, match="got"):
        NormRemoval(**settings)


@pytest.mark.parametrize("norm", [nn.LayerNorm(6, eps=0.0), nn.LayerNorm(6, elementwise_affine=False)])
def test_a_norm_for_which_no_batch_norm_can_stand_is_no_site(norm: nn.LayerNorm) -> None:
    model = _random(_Net())
    model.norm1 = norm.double().eval()
    sites = [site.name for site in NormRemoval().applies_to(model, _task(model, 5, 6))]
    assert sites == ["norm2", "norm3", "norm4"]


def test_by_hand_a_line_goes_into_its_reader() -> None:
    # Rows (0, 2) and (0, 4) both become (-1, 1): slopes 0, heights -1 and 1, so 2 (-1) + 3 (1) + 1 = 2 for any input.
    x, y = torch.tensor([[0.0, 2.0], [0.0, 4.0]]), torch.tensor([0, 0])
    model = nn.Sequential(nn.LayerNorm(2, eps=1e-12), nn.Linear(2, 1)).eval()
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[2.0, 3.0]]))
        model[1].bias.fill_(1.0)
    loss = nn.functional.cross_entropy
    task = Task(model, (x, y), (x, y), (x, y), loss, lambda out, t: out[:, 0], example_inputs=x)
    procedure = NormRemoval()
    changed = procedure.apply(model, task, 1.0)
    ended = apply_edits(changed, procedure.ending(changed, task))
    assert isinstance(ended[0], nn.Identity)
    assert ended(torch.tensor([[7.0, 9.0]])).item() == pytest.approx(2.0, abs=1e-5)
