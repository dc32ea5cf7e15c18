"""Few-bit layers: grids by hand, packed storage, the edit, what is saved, and norms by mean magnitudes."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft.bench.files import pack_tensors, size_of_tensors, unpack_tensors
from torchgraft.bench.meters import params
from torchgraft.engines.quantize import additive, integers, l1_norms
from torchgraft.engines.quantize.fewbit import (
    HALF,
    FewBit,
    PowerQuantizer,
    bend,
    code_layers,
    codes_of,
    grid,
    largest_code,
    magnitudes,
    power_codes,
    power_values,
    set_codes,
    stochastic_round,
    storable_halves,
    storable_layers,
    storable_values,
)
from torchgraft.engines.surgery.edits import apply_edits, edit_from_record, edit_to_record, history
from torchgraft.errors import BadInput
from torchgraft.shrink.quantize.nupes_power_quant import with_halves


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def net(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tied = nn.Linear(6, 6)
        twin = nn.Linear(6, 6)
        twin.weight = tied.weight
        return nn.Sequential(nn.Conv1d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 6), tied, twin).eval()


# Grids


def test_a_bent_grid_by_hand() -> None:
    # 3 bits, a = 1/2: levels (i/3)^2; 0.3 -> sqrt(0.3) 3 = 1.64 -> 2 -> 4/9; 0.2 -> 1.34 -> 1 -> 1/9
    w = torch.tensor([[0.3, -0.2, 1.0, 0.0]], dtype=torch.float64)
    scale = magnitudes(w)
    codes = power_codes(w, scale, bits=3, exponent=0.5)
    assert codes.tolist() == [[2, -1, 3, 0]]
    expected = torch.tensor([[4 / 9, -1 / 9, 1.0, 0.0]], dtype=torch.float64)
    assert torch.allclose(power_values(codes, scale, bits=3, exponent=0.5), expected, atol=1e-15)
    assert torch.allclose(grid(3, 0.5), torch.tensor([-9.0, -4, -1, 0, 1, 4, 9], dtype=torch.float64) / 9)
    # scales: a channel (either axis) or the tensor, and a channel of zeros stays zero
    two = torch.tensor([[1.0, -4.0], [0.0, 0.0]])
    assert magnitudes(two).tolist() == [[4.0], [0.0]]
    assert magnitudes(two, axis=1).tolist() == [[1.0, 4.0]]
    assert magnitudes(two, "tensor").tolist() == [[4.0]]
    assert not PowerQuantizer(4)(two)[1].any()


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 8), st.floats(0.1, 1.0), st.integers(0, 10**6))
def test_codes_fill_their_range_and_come_back(bits: int, exponent: float, seed: int) -> None:
    n = largest_code(bits)
    every = torch.arange(-n, n + 1, dtype=torch.int32)
    scale = torch.tensor([2.5], dtype=torch.float64)
    values = power_values(every, scale, bits=bits, exponent=exponent)
    assert torch.equal(power_codes(values, scale, bits=bits, exponent=exponent), every)
    w = draw(3, 9, seed=seed)
    codes = power_codes(w, magnitudes(w), bits=bits, exponent=exponent)
    assert int(codes.abs().max()) == n


def test_stochastic_rounding_is_unbiased_and_keeps_whole_numbers() -> None:
    values = torch.tensor([-1.25, 0.5, 2.9, 7.0], dtype=torch.float64)
    made = stochastic_round(values.expand(20000, 4), generator=torch.Generator().manual_seed(0))
    assert torch.equal(made[:, 3], torch.full((20000,), 7.0, dtype=torch.float64))
    fraction = values - values.floor()
    error = (made.mean(0) - values).abs()
    assert bool((error <= 4 * (fraction * (1 - fraction) / 20000).sqrt() + 1e-12).all())
    assert set((made - values.floor()).unique().tolist()) == {0.0, 1.0}


# Layers


def test_the_layer_runs_from_its_codes() -> None:
    linear = nn.Linear(5, 3).double()
    x = draw(4, 5)
    made = apply_edits(linear, [FewBit(bits={"": 3}, exponents={"": 0.6})])
    expected = PowerQuantizer(3, 0.6)(linear.weight)
    assert torch.allclose(made(x), x @ expected.T + linear.bias, atol=1e-12)
    assert isinstance(made, nn.Linear)
    assert torch.equal(codes_of(made), power_codes(linear.weight, magnitudes(linear.weight), bits=3, exponent=0.6))
    assert made.weight_codes.numel() == math.ceil(3 * 15 / 8)
    assert params(made) == params(linear)
    assert made.weight is made.weight  # put together once
    before = made(x).clone()
    set_codes(made, -codes_of(made), 0.6)
    assert torch.allclose(made(x) - linear.bias, linear.bias - before, atol=1e-12)
    with pytest.raises(BadInput, match=r"codes must be"):
        set_codes(made, torch.full((3, 5), 9), 0.6)


def test_plain_layers_are_taken_and_those_that_share_a_weight_share_its_codes() -> None:
    model = net()  # the layers 4 and 5 have one weight
    assert storable_layers(model) == ["0", "3", "4"]
    assert storable_layers(model, ignore=["0", "5"]) == ["3"]
    edit = FewBit(bits={"0": 4, "3": 2}, exponents={"0": 0.5}, granularity="tensor")
    made = apply_edits(model, [edit])
    assert list(code_layers(made)) == ["0", "3"]
    assert made[0].weight_scale.shape == (1, 1, 1)
    assert made[4].weight is made[5].weight
    assert not code_layers(model)
    tied = apply_edits(model, [FewBit(bits={"4": 3})])
    assert list(code_layers(tied)) == ["4", "5"]
    assert tied[4].weight_codes is tied[5].weight_codes
    assert tied[4].weight is tied[5].weight
    expected = PowerQuantizer(3, 1.0)(model[4].weight)
    assert torch.equal(tied[5].weight, expected)
    set_codes(tied[5], -codes_of(tied[5]))
    assert torch.equal(tied[4].weight, -expected)
    for bad in ({"9": 4}, {"5": 4}):
        with pytest.raises(BadInput, match="finds no weight"):
            apply_edits(model, [FewBit(bits=bad)])
    with pytest.raises(BadInput, match="2 to 8 bits"):
        apply_edits(model, [FewBit(bits={"0": 9})])
    with pytest.raises(BadInput, match="exponent must lie"):
        apply_edits(model, [FewBit(bits={"0": 4}, exponents={"0": 1.5})])


def test_an_embedding_tied_to_the_head_runs_from_one_set_of_codes() -> None:
    model = nn.Sequential(nn.Embedding(7, 32), nn.ReLU(), nn.Linear(32, 7, bias=False))
    model[2].weight = model[0].weight
    assert storable_layers(model) == ["0"]
    made = apply_edits(model, [FewBit(bits={"0": 4}, exponents={"0": 0.5})])
    whole = PowerQuantizer(4, 0.5)(model[0].weight)
    tokens = torch.tensor([[0, 6, 3]])
    assert torch.equal(made(tokens), F.linear(F.relu(F.embedding(tokens, whole)), whole))
    assert params(made) == params(model)
    assert size_of_tensors(made.state_dict()) < size_of_tensors(model.state_dict())
    # a norm that writes into the weight at a call, and a holder of another kind, leave it as it is
    assert storable_layers(nn.Embedding(7, 32, max_norm=1.0)) == []
    model.register_parameter("other", model[0].weight)
    assert storable_layers(model) == []


class Placed(nn.Module):
    """A linear layer, a position for each of eight tokens, and a vector of the same size."""

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(draw(1, 8, 32))
        self.flat = nn.Parameter(draw(256))
        self.head = nn.Linear(32, 3, dtype=torch.float64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x + self.position)


def test_parameters_of_no_layer_run_from_codes_too() -> None:
    model = Placed()
    assert storable_values(model) == ["position"]
    assert storable_values(model, least=257) == storable_values(model, ignore=["position"]) == []
    made = apply_edits(model, [FewBit(bits={"position": 4, "head": 5}, exponents={"position": 0.5})])
    assert isinstance(made, Placed)
    place = PowerQuantizer(4, 0.5)(model.position, axis=1)  # a scale a token, since the first axis has length 1
    assert made.position_scale.shape == (1, 8, 1)
    weight = PowerQuantizer(5, 1.0)(model.head.weight)
    x = draw(2, 8, 32)
    assert torch.allclose(made(x), F.linear(x + place, weight, model.head.bias), atol=1e-12)
    assert list(code_layers(made)) == ["head"]
    assert params(made) == params(model)
    assert size_of_tensors(made.state_dict()) < 0.6 * size_of_tensors(model.state_dict())
    again = apply_edits(Placed(), [edit_from_record(edit_to_record(edit)) for edit in history(made)])
    again.load_state_dict(made.state_dict())
    assert torch.equal(again(x), made(x))


class Half(nn.Module):
    """A parameter, and a buffer that stands for another one."""

    parameter_buffers = ("codes",)

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(draw(16, 16))
        self.register_buffer("codes", torch.zeros(4, 4, dtype=torch.int8))


def test_what_stood_for_a_parameter_before_still_counts_as_one() -> None:
    made = apply_edits(Half(), [FewBit(bits={"table": 4})])
    assert params(made) == params(Half()) == 16 * 16 + 4 * 4


def test_globs_of_modules_keep_their_parameters() -> None:
    model = nn.Sequential(nn.MultiheadAttention(16, 2), nn.Linear(16, 16))
    assert storable_values(model, ignore=["0"]) == []
    assert storable_values(model, ignore=["0.out_proj"]) == ["0.in_proj_weight"]


def test_two_parameters_of_one_module_and_what_must_keep_its_own() -> None:
    model = nn.MultiheadAttention(16, 2, batch_first=True)
    assert storable_values(model) == ["in_proj_weight", "out_proj.weight"]
    pair = Placed()
    pair.other = nn.Parameter(draw(2, 128))
    made = apply_edits(pair, [FewBit(bits={"position": 3, "other": 8})])
    assert type(made).__mro__[1] is Placed
    assert torch.equal(made.position, PowerQuantizer(3, 1.0)(pair.position, axis=1))
    assert torch.equal(made.other, PowerQuantizer(8, 1.0)(pair.other))
    assert storable_values(nn.LSTM(16, 16)) == storable_values(nn.ParameterList([draw(16, 16)])) == []
    assert storable_values(nn.LazyLinear(300)) == []
    weighted = nn.utils.parametrizations.weight_norm(nn.Linear(16, 32))
    assert storable_values(weighted) == []


def _block() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 32), nn.LayerNorm(32), nn.GELU(), nn.Linear(32, 5)).eval()


def _halved(model: nn.Module, **changes: Any) -> nn.Module:
    bits = {"0": 4, "3": 3, "0.bias": HALF, "1.weight": HALF, "1.bias": HALF, **changes}
    return apply_edits(model, [FewBit(bits=bits, scales="float16")])


def test_scales_biases_and_norms_in_half_precision_by_hand() -> None:
    model = _block()
    with torch.no_grad():
        for value in (model[0].bias, model[1].weight, model[1].bias):
            value.copy_(torch.randn(32))
    assert storable_halves(model) == ["0.bias", "1.weight", "1.bias"]
    assert storable_halves(model, least=1, ignore=["1"]) == ["0.bias", "3.bias"]
    made = _halved(model)
    x = torch.randn(7, 20)

    def rounded(value: Tensor) -> Tensor:
        return value.detach().to(torch.float16).to(torch.float32)

    weights = []
    for layer, bits in ((model[0], 4), (model[3], 3)):
        scale = rounded(layer.weight.detach().abs().amax(1, keepdim=True))
        n = 2 ** (bits - 1) - 1
        weights.append((n * layer.weight.detach() / scale).round().clamp(-n, n) / n * scale)
    y = F.layer_norm(F.linear(x, weights[0], rounded(model[0].bias)), (32,), rounded(model[1].weight), None)
    expected = F.linear(F.gelu(y + rounded(model[1].bias)), weights[1], model[3].bias)
    with torch.no_grad():
        assert torch.allclose(made(x), expected, atol=1e-5)
        assert torch.equal(made[1].bias, rounded(model[1].bias))
    assert list(code_layers(made)) == ["0", "3"]  # a norm in half precision has no codes
    assert params(made) == params(model)
    plain = apply_edits(model, [FewBit(bits={"0": 4, "3": 3})])
    saved = 2 * (32 + 32 + 32) + 2 * (32 + 5)  # vectors and scales, two bytes each
    names = len("_half") * 3
    assert abs(size_of_tensors(plain.state_dict()) - size_of_tensors(made.state_dict()) - saved) <= names + 16


def test_codes_are_of_the_scale_that_is_stored() -> None:
    layer = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.1, 0.049999]]))
    # In half precision 0.1 is 0.0999756: 3 x 0.049999 / 0.0999756 = 1.50034 rounds to 2; over 0.1 it would be 1.49997.
    made = apply_edits(nn.Sequential(layer), [FewBit(bits={"0": 3}, scales="float16")])
    assert codes_of(made[0]).tolist() == [[3, 2]]
    assert made[0].weight.tolist() == [[pytest.approx(0.0999756), pytest.approx(2 * 0.0999756 / 3, rel=1e-5)]]


def test_what_is_stored_in_half_precision_follows_conversions_copies_and_files() -> None:
    model, x = _block(), torch.randn(3, 20)
    made = _halved(model)
    with torch.no_grad():
        expected = made(x)
        wide = copy.deepcopy(made).double()
        assert wide[1].weight.dtype == wide[0].weight.dtype == torch.float64
        assert torch.allclose(wide(x.double()), expected.double(), atol=1e-5)
        assert torch.equal(wide[1].weight_half, made[1].weight_half)  # bits are left alone
        narrow = copy.deepcopy(made).bfloat16()
        assert narrow(x.bfloat16()).dtype == torch.bfloat16
        assert torch.equal(narrow.float()[0].bias, made[0].bias)  # and back without a loss
        again = apply_edits(_block(), [edit_from_record(edit_to_record(edit)) for edit in history(made)])
        again.load_state_dict(made.state_dict())
        assert torch.equal(again(x), expected)
        made[1].weight_half.zero_()
        assert not torch.equal(made(x), expected)
    assert not [name for name in made.state_dict() if name.endswith("_kind")]


def test_what_half_precision_cannot_hold_is_refused() -> None:
    model = _block()
    with torch.no_grad():
        model[1].bias[3] = 1e6
    with pytest.raises(BadInput, match=r"'1\.bias' holds values beyond"):
        _halved(model)
    with pytest.raises(BadInput, match=r"half precision at '9\.bias'"):
        _halved(_block(), **{"9.bias": HALF})
    with torch.no_grad():
        model[0].weight[0, 0] = 1e6
    with pytest.raises(BadInput, match="scales of '0' lie beyond"):
        apply_edits(model, [FewBit(bits={"0": 4}, scales="float16")])
    with pytest.raises(BadInput, match="2 to 8 bits, got 9"):
        apply_edits(model, [FewBit(bits={"0": 9})])


def test_nupes_stores_in_half_precision_what_that_holds() -> None:
    model = _block()
    edit = with_halves(FewBit(bits={"0": 4, "3": 4}), model)
    assert edit.scales == "float16"
    assert [name for name, bits in edit.bits.items() if bits == HALF] == ["0.bias", "1.weight", "1.bias"]
    with torch.no_grad():
        model[1].bias[3], model[3].weight[2] = 1e6, 1e-6 * torch.randn(32)
    edit = with_halves(FewBit(bits={"0": 4, "3": 4}), model)
    assert edit.scales == "float32"  # a scale of 1e-6 would lose a tenth of itself
    assert [name for name, bits in edit.bits.items() if bits == HALF] == ["0.bias", "1.weight"]


def test_edits_and_files_bring_the_same_layer_back() -> None:
    model = net()
    made = apply_edits(model, [FewBit(bits={"0": 4, "3": 5}, exponents={"3": 0.7})])
    set_codes(made[3], codes_of(made[3]).roll(1, 0))  # what learning may leave behind
    edits = [edit_from_record(record) for record in json.loads(json.dumps([edit_to_record(e) for e in history(made)]))]
    fresh = apply_edits(net(7), edits)
    weights, _ = unpack_tensors(pack_tensors(made.state_dict()))
    fresh.load_state_dict(weights)
    x = torch.randn(3, 2, 6)
    assert torch.equal(fresh(x), made(x))
    assert size_of_tensors(made.state_dict()) < size_of_tensors(model.state_dict())
    twin = copy.deepcopy(made)
    twin[3].weight_codes.zero_()
    assert not torch.equal(twin(x), made(x))
    assert torch.equal(fresh(x), made(x))
    assert made.to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16


def test_the_bend_is_odd_and_can_be_held_off_zero() -> None:
    x = torch.tensor([-0.5, 0.0, 0.5], dtype=torch.float64, requires_grad=True)
    a = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    bend(x, a, least=1e-6).sum().backward()
    assert bool(x.grad.isfinite().all())
    assert float(bend(x.detach(), 0.5).sum()) == 0.0


# The other files of the engine have their tests with the methods that stand on them


def test_the_parts_of_the_engine_are_there() -> None:
    assert additive.offset(4) == 3
    assert integers.fixed_point(1.0, bits=4) == (8, 3)
    assert l1_norms.rounded_values(torch.tensor([0.1, 1.0]), 2).tolist() == [0.0, 1.0]
