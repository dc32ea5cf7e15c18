"""Structured slicing on small models whose groups are worked out by hand, and what it refuses."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from torchgraft.bench.models import VisionTransformer
from torchgraft.engines.surgery import Group, Slice, apply_edits, slicing, structure, trace
from torchgraft.engines.surgery.axes import axes
from torchgraft.engines.surgery.edits import edit_from_record, edit_to_record
from torchgraft.engines.surgery.replay import replay
from torchgraft.engines.surgery.rules import analyse
from torchgraft.errors import BadInput, Untraceable


def refused(model: nn.Module, example: Tensor) -> dict[str, str]:
    return {each.name: f"{each.reason} | {each.line}" for each in structure(model, example).refused}


class Lenet(nn.Module):
    """Its view holds literal sizes, as in the well-known tutorial."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.wide = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 6, 3)
        self.fc, self.out = nn.Linear(6 * 4 * 4, 10), nn.Linear(10, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.wide(torch.relu(self.conv(x))))
        x = x.view(-1, 6 * 4 * 4)
        return self.out(torch.relu(self.fc(x)))


def test_a_literal_view_is_refused_with_its_line_and_the_rest_is_cut() -> None:
    found = structure(Lenet(), torch.randn(4, 1, 8, 8))
    assert [(group.name, group.size) for group in found.groups] == [("conv", 4), ("fc", 10)]
    (reason,) = (each for each in found.refused if each.name == "wide")
    assert "sliced model" in reason.reason
    assert reason.line is not None
    assert "test_slicing.py" in reason.line
    assert "x.view(-1, 6 * 4 * 4)" in reason.line
    with pytest.raises(BadInput, match="'wide' cannot be cut: the sliced model"):
        found.slice({"wide": [0]})


def test_a_linear_layer_by_hand() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)).double()
    found = structure(model, torch.zeros(2, 2, dtype=torch.float64))
    assert found.groups == (Group("0", "channels", 3, parameters=4, exact=True),)
    edit = found.slice({"0": [0, 2]})
    assert edit.tensors == {
        "0.weight": {0: ((0, 1), (2, 3))},
        "0.bias": {0: ((0, 1), (2, 3))},
        "2.weight": {1: ((0, 1), (2, 3))},
    }
    assert edit.attributes == {"0.out_features": 2, "2.in_features": 2}
    sliced = apply_edits(model, [edit])
    assert torch.equal(sliced[0].weight, model[0].weight[[0, 2]])  # type: ignore[index]  # a Sequential
    assert torch.equal(sliced[2].weight, model[2].weight[:, [0, 2]])  # type: ignore[index]
    assert model[0].out_features == 3
    assert edit.describe() == {"0": "2 of 3 channels kept"}


def test_scores_are_summed_over_what_a_unit_owns() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    found = structure(model, torch.zeros(2, 2))
    scores = {
        "0.weight": torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]),
        "0.bias": torch.tensor([10.0, 20.0, 30.0]),
        "2.weight": torch.tensor([[100.0, 200.0, 300.0]]),
    }
    assert found.unit_scores("0", scores).tolist() == [113.0, 227.0, 341.0]
    assert found.unit_scores("0", {"0.bias": scores["0.bias"]}).tolist() == [10.0, 20.0, 30.0]
    with pytest.raises(BadInput, match=r"scores\['0.bias'\] must have shape \(3,\), got \(2,\)"):
        found.unit_scores("0", {"0.bias": torch.zeros(2)})


class Loop(nn.Module):
    """One square layer in a residual stream: each unit owns a row and a column, and their crossing once."""

    def __init__(self) -> None:
        super().__init__()
        self.grow, self.square, self.out = nn.Linear(2, 3), nn.Linear(3, 3, bias=False), nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.grow(x)
        return self.out(x + self.square(x))


def test_an_entry_owned_through_two_dimensions_counts_once() -> None:
    found = structure(Loop(), torch.zeros(2, 2))
    (group,) = found.groups
    assert (group.name, group.size) == ("grow", 3)
    assert group.parameters == (2 + 1) + (9 - 4) + 1
    square = torch.arange(9.0).reshape(3, 3)
    by_hand = [square[i].sum() + square[:, i].sum() - square[i, i] for i in range(3)]
    assert found.unit_scores("grow", {"square.weight": square}).tolist() == [float(each) for each in by_hand]


class Gate(nn.Module):
    def __init__(self, mixing: str) -> None:
        super().__init__()
        self.mixing, self.a, self.b = mixing, nn.Linear(3, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        if self.mixing == "softmax":
            return self.b(torch.softmax(x, -1))
        if self.mixing == "mean":
            return self.b(x * x.mean(-1, keepdim=True))
        if self.mixing == "sum":
            return self.b(x * x.sum(-1, keepdim=True))
        if self.mixing == "sum of exponentials":
            return self.b(x * x.exp().sum(-1, keepdim=True))
        if self.mixing == "layer norm":
            return self.b(functional.layer_norm(x, [x.shape[-1]]))
        return self.b(torch.sigmoid(x))


@pytest.mark.parametrize(
    ("mixing", "exact"),
    [
        ("sigmoid", True),
        ("sum", True),
        ("softmax", False),
        ("mean", False),
        ("sum of exponentials", False),
        ("layer norm", False),
    ],
)
def test_exactness_is_told_and_true(mixing: str, exact: bool) -> None:
    torch.manual_seed(0)
    model, x = Gate(mixing).double().eval(), torch.randn(4, 3, dtype=torch.float64)
    found = structure(model, x)
    (group,) = found.groups
    assert group.exact is exact
    keep = {group.name: [0, 2, 3]}
    sliced, masked = apply_edits(model, [found.slice(keep)]), apply_edits(model, [])
    found.mask_(masked, keep)
    same = float((sliced(x) - masked(x)).detach().abs().max()) < 1e-12
    assert same is exact


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 4, 1), nn.BatchNorm2d(4)
        self.grow, self.shrink = nn.Conv2d(4, 6, 1), nn.Conv2d(6, 4, 1)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x))
        return self.head((x + self.shrink(torch.relu(self.grow(x)))).mean((2, 3)))


def test_ignored_modules_keep_every_dimension() -> None:
    found = structure(Residual(), torch.randn(2, 1, 3, 3), ignore=["norm"])
    assert [group.name for group in found.groups] == ["grow"]
    assert ("stem", "norm.weight is ignored") in [(each.name, each.reason) for each in found.refused]
    assert structure(Residual(), torch.randn(2, 1, 3, 3), ignore=["s*", "head"]).groups == ()


def test_sizes_that_modules_keep_follow() -> None:
    found = structure(Residual(), torch.randn(2, 1, 3, 3))
    sliced = apply_edits(Residual(), [found.slice({"stem": [0, 3], "grow": [5]})])
    assert (sliced.stem.out_channels, sliced.norm.num_features, sliced.grow.in_channels) == (2, 2, 2)
    assert (sliced.grow.out_channels, sliced.shrink.in_channels, sliced.head.in_features) == (1, 1, 2)
    assert sliced.norm.running_var.shape == (2,)


def test_grouped_and_depthwise_convolutions_set_their_groups() -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 6, 1),
        nn.Conv2d(6, 6, 3, groups=6),
        nn.Conv2d(6, 8, 1),
        nn.Conv2d(8, 12, 1, groups=2),
        nn.Flatten(),
    )
    found = structure(model, torch.randn(2, 1, 3, 3))
    sizes = {group.name: group.size for group in found.groups}
    # The last layer's outputs are the model's, but its two groups and what is within them come from layer 2.
    assert sizes == {"0": 6, "2": 4}
    sliced = apply_edits(model, [found.slice({"0": [1, 2], "2": [0, 1, 2]})])
    assert (sliced[1].groups, sliced[1].in_channels, sliced[1].out_channels) == (2, 2, 2)  # type: ignore[index]
    assert (sliced[3].groups, sliced[3].in_channels, sliced[3].out_channels) == (2, 6, 12)  # type: ignore[index]


@pytest.mark.parametrize("kept", [[], [2, 1], [0, 0], [4], [-1]])
def test_kept_indices_are_checked(kept: list[int]) -> None:
    found = structure(Residual(), torch.randn(2, 1, 3, 3))
    with pytest.raises(BadInput, match=r"keep\['stem'\] must be ascending indices below 4, at least one"):
        found.slice({"stem": kept})


def test_an_unknown_group_names_the_nearest() -> None:
    found = structure(Residual(), torch.randn(2, 1, 3, 3))
    with pytest.raises(BadInput, match="unknown group 'stm'; did you mean 'stem'"):
        found.slice({"stm": [0]})


def test_a_slice_is_data_and_fits_its_model_only() -> None:
    found = structure(Residual(), torch.randn(2, 1, 3, 3))
    edit = found.slice({"grow": [0, 1, 2, 5]})
    again = edit_from_record(json.loads(json.dumps(edit_to_record(edit))))
    assert again == edit
    with pytest.raises(BadInput, match="no module 'grow', which a slice was made for"):
        edit.rewrite(nn.Linear(2, 2))
    narrow = apply_edits(Residual(), [found.slice({"grow": [0, 1]})])
    with pytest.raises(BadInput, match=r"grow.weight of shape \(2, 4, 1, 1\) is too small"):
        edit.rewrite(narrow)


def test_frozen_parameters_stay_frozen() -> None:
    model = Residual()
    model.grow.weight.requires_grad_(False)
    sliced = apply_edits(model, [structure(model, torch.randn(2, 1, 3, 3)).slice({"grow": [1]})])
    assert not sliced.grow.weight.requires_grad
    assert sliced.grow.bias.requires_grad


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(x)
        if x.sum() > 0:
            return x
        return -x


def test_an_untraceable_model_is_named_with_its_line(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(Untraceable) as caught:
        structure(Branching(), torch.zeros(2, 2))
    message = str(caught.value)
    assert "\n" not in message
    assert "Branching cannot be traced: its forward pass branches on the values of a tensor" in message
    assert "if x.sum() > 0:" in message
    assert caught.value.line is not None
    assert "test_slicing.py:" in caught.value.line
    assert capfd.readouterr().err == ""


def test_a_forward_that_raises_is_named_with_its_line() -> None:
    with pytest.raises(Untraceable, match=r"Sequential cannot be traced: .*"):
        structure(nn.Sequential(nn.Linear(3, 2)), torch.zeros(2, 5))


class Unknown(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.fft.fft(self.a(x)).real)


def test_an_unknown_operation_freezes_what_it_touches() -> None:
    (reason,) = (text for name, text in refused(Unknown(), torch.randn(2, 3)).items() if name == "a")
    assert "no rule says what fft_fft does to its dimensions" in reason
    assert "torch.fft.fft(self.a(x))" in reason


def test_a_recurrent_layer_is_refused() -> None:
    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.mid, self.head = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 5), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.relu(self.mid(self.cell(x)[0])))

    found = structure(Tagger(), torch.randn(2, 6, 3))
    assert [group.name for group in found.groups] == ["mid"]
    assert any("lstm" in each.reason for each in found.refused)


def test_the_model_is_left_as_it_was() -> None:
    model = Residual().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    structure(model, torch.randn(2, 1, 3, 3))
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_an_empty_slice_changes_nothing() -> None:
    model = Residual()
    found = structure(model, torch.randn(2, 1, 3, 3))
    assert found.slice({}) == Slice(tensors={}, attributes={}, units={})
    every = found.slice({group.name: list(range(group.size)) for group in found.groups})
    assert every.tensors == {}


class Halved(nn.Module):
    """Its heads have no scale of their own, so slicing their features changes the scale and is not masking."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.head_dim = 4, 4
        self.grow, self.qkv, self.out = nn.Linear(3, 16), nn.Linear(16, 48), nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = self.qkv(self.grow(x)).view(b, t, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        return self.out(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, -1))


def test_an_inexact_cut_computes_the_same_thing_at_smaller_sizes() -> None:
    """With four heads of four, names decide which attribute is which, and the trace at the new sizes checks it."""
    torch.manual_seed(0)
    model, x = Halved().double(), torch.randn(2, 5, 3, dtype=torch.float64)
    found = structure(model, x)
    exact = {group.name: group.exact for group in found.groups}
    assert exact == {"grow": True, "qkv:heads": True, "qkv:features": False}
    edit = found.slice({"qkv:features": [1, 3]})
    sliced = apply_edits(model, [edit])
    assert (sliced.num_heads, sliced.head_dim) == (4, 2)
    rows = torch.tensor([4 * head + each for head in range(12) for each in (1, 3)])
    by_hand = functional.linear(model.grow(x), model.qkv.weight[rows], model.qkv.bias[rows]).view(2, 5, 3, 4, 2)
    q, k, v = by_hand.permute(2, 0, 3, 1, 4)
    mixed = torch.softmax(q @ k.transpose(-2, -1) / 2**0.5, -1) @ v
    expected = functional.linear(mixed.transpose(1, 2).reshape(2, 5, 8), model.out.weight[:, rows[:8]], model.out.bias)
    torch.testing.assert_close(sliced(x), expected, rtol=1e-10, atol=1e-10)
    traced = trace(model, x)
    analysis = analyse(traced)
    (axis,) = {axis for term in analysis.tensors["qkv.weight"].dims for axis in axes(term) if "features" in axis.marks}
    keep = {axis: torch.tensor([False, True, False, True])}
    (replayed,) = replay(traced, analysis, keep, dict(sliced.named_parameters()), [x])
    torch.testing.assert_close(replayed, expected, rtol=1e-10, atol=1e-10)


def test_parts_of_one_number_stay_alike() -> None:
    """``chunk`` divides evenly, so the two halves are cut together although nothing else joins them."""

    class Chunked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.both, self.a, self.b = nn.Linear(3, 8), nn.Linear(4, 2), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            first, second = self.both(x).chunk(2, -1)
            return self.a(first) + self.b(torch.relu(second))

    found = structure(Chunked(), torch.randn(2, 3))
    assert [(group.name, group.size, group.parameters) for group in found.groups] == [("both", 4, 2 * 4 + 2 + 2)]


def test_only_what_follows_a_literal_boundary_is_offered() -> None:
    """A boundary written as a number stays where it is: what is before it keeps its size, what is after may shrink."""

    class Literal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.both, self.a, self.b = nn.Linear(3, 8), nn.Linear(4, 2), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.both(x)
            return self.a(y[:, :4]) + self.b(torch.relu(y[:, 4:]))

    found = structure(Literal(), torch.randn(2, 3))
    assert [(group.name, group.size) for group in found.groups] == [("both:2", 4)]
    assert found.slice({"both:2": [0]}).tensors["both.weight"] == {0: ((0, 5),)}
    (refusal,) = (each for each in found.refused if each.name == "both")
    assert refusal.reason.startswith("the sliced model")


def test_what_had_to_be_joined_in_one_attention_is_joined_at_once_in_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[list[str]] = []
    failure = slicing._Trial.failure

    def counted(self: Any, found: Any, groups: Any, first: int = 2) -> Any:
        tried.append([group.name for group in groups])
        return failure(self, found, groups, first)

    monkeypatch.setattr(slicing._Trial, "failure", counted)
    found = structure(VisionTransformer(d_model=16, depth=3, num_heads=2), torch.randn(2, 1, 8, 8))
    names = {group.name for group in found.groups}
    assert {f"blocks.{block}.attn.query:features" for block in range(3)} <= names
    alone = [group for groups in tried if len(groups) == 1 for group in groups]
    assert alone.count("blocks.0.attn.value:values") > 0  # it was tried by itself, and failed
    for block in (1, 2):
        assert f"blocks.{block}.attn.value:values" not in alone
        assert alone.count(f"blocks.{block}.attn.query:features") == 1
