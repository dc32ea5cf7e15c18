"""Recurrent layers that hold matrices sparse: the same numbers as masked dense ones, in whatever way they are used."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from torchgraft.bench.files import size_of_tensors
from torchgraft.bench.meters import memory
from torchgraft.engines.sparse.stored import (
    HoldSparse,
    SparseGRU,
    SparseLSTM,
    SparseRecurrent,
    SparseRNN,
    matrix_obstacles,
    pattern_bytes,
    read_places,
    recurrent_matrices,
    write_places,
)
from torchgraft.engines.surgery.edits import apply_edits
from torchgraft.errors import BadInput

#: torch says so of every LSTM with projections.
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")

LAYERS: dict[str, Callable[[], nn.RNNBase]] = {
    "lstm": lambda: nn.LSTM(5, 12, num_layers=2, bidirectional=True, batch_first=True),
    "lstm-time-first": lambda: nn.LSTM(5, 12, bias=False),
    "lstm-projected": lambda: nn.LSTM(5, 12, num_layers=2, proj_size=4, batch_first=True),
    "gru": lambda: nn.GRU(5, 12, num_layers=2, bidirectional=True),
    "gru-batch-first": lambda: nn.GRU(5, 12, batch_first=True),
    "tanh": lambda: nn.RNN(5, 12, num_layers=2, bidirectional=True, batch_first=True),
    "relu": lambda: nn.RNN(5, 12, nonlinearity="relu"),
}


def _pair(kind: str, *, share: float = 0.2, dtype: torch.dtype = torch.float32) -> tuple[nn.RNNBase, SparseRecurrent]:
    """Return a dense layer with zeros where the sparse one beside it holds nothing, in eval mode."""
    torch.manual_seed(0)
    dense = LAYERS[kind]().to(dtype).eval()
    weights = recurrent_matrices(dense)
    counts = {name: int(share * value.numel()) for name, value in weights.items()}
    held = apply_edits(dense, [HoldSparse(parameters=counts)])
    assert isinstance(held, SparseRecurrent)
    with torch.no_grad():
        for name, value in weights.items():
            places = value.abs().flatten().argsort(descending=True, stable=True)[counts[name] :]
            value.view(-1)[places] = 0.0
    return dense, held


def _data(layer: nn.RNNBase, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(3, 6, layer.input_size, generator=torch.Generator().manual_seed(1)).to(dtype)


def _outputs(layer: nn.Module, x: Any) -> list[Tensor]:
    out, state = layer(x)
    return [out.data if isinstance(out, PackedSequence) else out, *((state,) if isinstance(state, Tensor) else state)]


def _same(one: nn.Module, other: nn.Module, x: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(_outputs(one, x), _outputs(other, x), strict=True))


def test_a_matrix_by_hand() -> None:
    layer = nn.RNN(2, 2, bias=False).double()
    with torch.no_grad():
        layer.weight_ih_l0.copy_(torch.tensor([[1.0, -3.0], [0.5, 2.0]]))
        layer.weight_hh_l0.copy_(torch.tensor([[0.5, 0.5], [-0.5, 0.5]]))
    held = apply_edits(layer, [HoldSparse(parameters={"weight_ih_l0": 2, "weight_hh_l0": 2})])
    assert held.weight_ih_l0.tolist() == [[0.0, -3.0], [0.0, 2.0]]  # M = 1[|w| >= 1.5], the 50th percentile
    assert held.weight_hh_l0.tolist() == [[0.5, 0.5], [0.0, 0.0]]  # of equal ones the earlier
    assert held.weight_ih_l0_values.tolist() == [-3.0, 2.0]
    assert held.weight_ih_l0_pattern.tolist() == [0b1010]
    x = torch.tensor([[[0.1, 0.2]], [[0.3, -0.4]]], dtype=torch.float64)  # (T, B, D)
    first = torch.tanh(torch.tensor([-0.6, 0.4], dtype=torch.float64))
    second = torch.tanh(torch.stack([1.2 + 0.5 * first.sum(), torch.tensor(-0.8, dtype=torch.float64)]))
    out, state = cast(tuple[Tensor, Tensor], held(x))
    torch.testing.assert_close(out, torch.stack([first, second])[:, None], rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(state[0, 0], second, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_outputs_are_those_of_the_masked_layer(kind: str, dtype: torch.dtype) -> None:
    dense, held = _pair(kind, dtype=dtype)
    x = _data(dense, dtype)
    with torch.no_grad():
        assert _same(dense, held, x)
        assert _same(dense, held, x)  # and again, from what was kept
        assert _same(dense, held, x[:1])
        assert _same(dense, held, x[0])  # no batch
    packed = pack_padded_sequence(x.transpose(0, 1), torch.tensor([2, 3, 1]), enforce_sorted=False)
    assert _same(dense, held, packed)
    assert isinstance(held, {"l": SparseLSTM, "g": SparseGRU}.get(kind[0], SparseRNN))
    assert isinstance(held, type(dense))
    assert f"sparsity={held.sparsity:.3f}" in repr(held)


@pytest.mark.parametrize("kind", LAYERS)
def test_gradients_are_those_of_the_masked_layer(kind: str) -> None:
    dense, held = _pair(kind, dtype=torch.float64)
    x = _data(dense, torch.float64)
    dense.train()
    held.train()
    for layer in (dense, held):
        torch.autograd.backward([part.square().sum() for part in _outputs(layer, x)])
    for name, value in dense.named_parameters():
        assert value.grad is not None
        if name.startswith(("weight_hr", "bias")):
            torch.testing.assert_close(held.get_parameter(name).grad, value.grad)
            continue
        places = held.get_buffer(f"{name}_places").long()
        torch.testing.assert_close(held.get_parameter(f"{name}_values").grad, value.grad.flatten()[places])


@pytest.mark.parametrize("kind", ["lstm", "gru", "tanh"])
def test_copies_conversions_and_functional_calls(kind: str) -> None:
    dense, held = _pair(kind)
    x = _data(dense)
    held.train()
    _outputs(held, x)[0].sum().backward()  # its list of weights is now part of a graph
    twin, thawed = copy.deepcopy(held).eval(), pickle.loads(pickle.dumps(held)).eval()
    held.eval()
    assert _same(held, twin, x)
    assert _same(held, thawed, x)
    with torch.no_grad():
        twin.get_parameter("weight_hh_l0_values").zero_()
        assert not _same(held, twin, x)
        assert _same(held, dense, x)
        # In place, where the parameter stays the same object at the same version.
        wide = copy.deepcopy(dense).double()
        _outputs(held, x)
        assert all(
            torch.allclose(a, b, rtol=0, atol=1e-12)
            for a, b in zip(_outputs(held.double(), x.double()), _outputs(wide, x.double()), strict=True)
        )
        assert _same(held.float(), dense, x)
        held.train()
        held.get_parameter("weight_hh_l0_values").data.mul_(2.0)
        dense.get_parameter("weight_hh_l0").mul_(2.0)
        assert _same(held, dense, x)
        assert _same(held.eval(), dense, x)
    doubled = {name: 2 * value.detach() for name, value in held.named_parameters()}
    expected = {name: 2 * value.detach() for name, value in dense.named_parameters()}
    out: Tensor = functional_call(held, doubled, (x,))[0]
    assert torch.equal(out, functional_call(dense, expected, (x,))[0])
    assert _same(held, dense, x)


def test_what_is_not_trained_stays_so_and_only_what_trains_is_filled_in_anew() -> None:
    layer = nn.GRU(4, 8).requires_grad_(False).eval()
    held = apply_edits(layer, [HoldSparse(parameters={"weight_hh_l0": 20})])
    assert not any(value.requires_grad for value in held.parameters())
    assert isinstance(held, SparseGRU)
    held(torch.zeros(2, 1, 4))
    assert held.weight_hh_l0 is held.weight_hh_l0
    held.requires_grad_(True)
    assert held.weight_hh_l0 is not held.weight_hh_l0
    with torch.no_grad():
        assert held.weight_hh_l0 is held.weight_hh_l0
        before = held.weight_hh_l0
        held.weight_hh_l0_values.add_(1.0)
        assert held.weight_hh_l0 is not before
    with pytest.raises(AttributeError, match="no_such_thing"):
        held.no_such_thing  # noqa: B018
    assert held.flatten_parameters() is None


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_another_pattern_loads_and_a_wrong_one_is_refused(kind: str) -> None:
    dense, held = _pair(kind)
    torch.manual_seed(5)
    counts = {name: int(0.2 * value.numel()) for name, value in recurrent_matrices(dense).items()}
    other = apply_edits(LAYERS[kind]().eval(), [HoldSparse(parameters=counts)])
    x = _data(dense)
    with torch.no_grad():
        assert not _same(held, other, x)
        held.load_state_dict(other.state_dict())
        assert _same(held, other, x)
    state = other.state_dict()
    for wrong in (state["weight_hh_l0_pattern"].flip(0) // 2, state["weight_hh_l0_pattern"][:-1]):
        with pytest.raises(RuntimeError, match="weight_hh_l0_pattern is no pattern of"):
            held.load_state_dict({**state, "weight_hh_l0_pattern": wrong})
    with torch.no_grad():
        assert _same(held, other, x)


@given(st.integers(1, 3000), st.floats(0.0, 1.0), st.integers(0, 100))
@settings(max_examples=80, deadline=None)
def test_places_come_back_from_the_bytes_they_are_said_to_take(total: int, share: float, seed: int) -> None:
    kept = max(1, round(share * total))
    places = torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:kept].sort().values
    data = write_places(places, total)
    assert data.dtype == torch.uint8
    assert len(data) == pattern_bytes(kept, total) <= min(kept + total // 255, total // 8 + 1)
    found = read_places(data, kept, total)
    assert found is not None
    assert torch.equal(found, places)
    assert read_places(data, kept + 1, total) is None
    assert read_places(data.int(), kept, total) is None


def test_a_pattern_that_leaves_the_matrix_is_refused() -> None:
    data = write_places(torch.tensor([5, 90, 99]), 100)
    assert read_places(data, 3, 100) is not None
    assert read_places(data + torch.tensor([0, 0, 1], dtype=torch.uint8), 3, 100) is None


def test_the_filled_matrix_counts_as_memory_and_the_file_does_not_hold_it() -> None:
    torch.manual_seed(0)
    layer = nn.Sequential(nn.LSTM(32, 64, batch_first=True)).eval()
    counts = {name: value.numel() // 10 for name, value in recurrent_matrices(layer).items()}
    held = apply_edits(layer, [HoldSparse(parameters=counts)])
    x = torch.zeros(2, 3, 32)
    dense = sum(4 * value.numel() for value in recurrent_matrices(layer).values())
    assert memory(held, x) >= dense + 4 * sum(counts.values())
    assert size_of_tensors(held.state_dict()) < 0.2 * size_of_tensors(layer.state_dict())


class _Own(nn.LSTM):
    """A layer that could read its weights in any way."""


def test_what_cannot_be_held_is_refused_with_the_reason() -> None:
    model = nn.ModuleDict({name: nn.LSTM(4, 8) for name in ("one", "two", "made", "normed", "free")})
    model["own"] = _Own(4, 8)
    model["two"].weight_hh_l0 = model["one"].weight_hh_l0
    nn.utils.parametrizations.orthogonal(model["made"], "weight_hh_l0")
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(model["normed"], "weight_hh_l0")  # type: ignore[no-untyped-call]
    found = {
        "one.weight_hh_l0": "shared with another",
        "two.weight_hh_l0": "shared with another",
        "made.weight_ih_l0": "is parametrised",
        "made.weight_hh_l0": "is parametrised",
        "normed.weight_hh_l0": "made of other parameters",
        "own.weight_ih_l0": "_Own is a class of its own",
        "own.weight_hh_l0": "_Own is a class of its own",
    }
    reasons = matrix_obstacles(model)
    assert list(reasons) == list(found)
    assert all(words in reasons[name] for name, words in found.items())
    assert list(recurrent_matrices(model)) == [
        f"{name}_l0"
        for name in ("one.weight_ih", "two.weight_ih", "normed.weight_ih", "free.weight_ih", "free.weight_hh")
    ]
    for name, words in found.items():
        with pytest.raises(BadInput, match=words):
            HoldSparse(parameters={name: 3}).rewrite(model)
    x = torch.randn(3, 2, 4)
    expected = model["normed"](x)[0]
    held = HoldSparse(parameters={"normed.weight_ih_l0": 128, "free.weight_hh_l0": 9}).rewrite(model)
    assert torch.equal(held["normed"](x)[0], expected)  # type: ignore[index]
    assert "held sparse already" in matrix_obstacles(held)["free.weight_hh_l0"]
    assert "free.weight_ih_l0" in recurrent_matrices(held)
    again = apply_edits(held["free"], [HoldSparse(parameters={"weight_ih_l0": 7})])
    assert (len(again.weight_ih_l0_values), len(again.weight_hh_l0_values)) == (7, 9)  # type: ignore[arg-type]
    for wrong in (0, 129):
        with pytest.raises(BadInput, match=f"1 to 128 weights can be kept, got {wrong}"):
            HoldSparse(parameters={"free.weight_ih_l0": wrong}).rewrite(model)
    with pytest.raises(BadInput, match=r"no recurrent matrix 'fre.weight_ih_l0'; did you mean 'free.weight_ih_l0'"):
        HoldSparse(parameters={"fre.weight_ih_l0": 1}).rewrite(model)


def test_a_layer_at_two_places_is_one_and_is_ignored_by_either_name() -> None:
    model = nn.Module()
    model.one = nn.GRU(4, 8)
    model.two = model.one
    assert list(recurrent_matrices(model)) == ["one.weight_ih_l0", "one.weight_hh_l0"]
    assert not recurrent_matrices(model, ignore=["two"])
    assert list(recurrent_matrices(model, ignore=["two.weight_ih*"])) == ["one.weight_hh_l0"]
    held = apply_edits(model, [HoldSparse(parameters={"one.weight_hh_l0": 10})])
    assert held.one is held.two
    assert isinstance(held.two, SparseGRU)


@pytest.mark.filterwarnings("ignore:The tensor attributes self.0._flat_weights")  # as of torch's own layers
@pytest.mark.parametrize("kind", ["lstm", "gru", "tanh"])
def test_it_can_be_exported(kind: str) -> None:
    dense, held = _pair(kind)
    model, x = nn.Sequential(held).eval(), _data(dense)
    expected = _outputs(dense, x)[0]
    with torch.no_grad():
        program = torch.export.export(model, (x,)).module()
        torch.testing.assert_close(program(x)[0], expected)
