"""Non-linear cells: the step form by hand and against torch, the fused form against the step form."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from torchgraft.engines.recurrence import cells_fused
from torchgraft.engines.recurrence.cells import (
    GATES,
    STATES,
    Cell,
    Form,
    cell_state,
    cell_step,
    from_torch,
    project_gates,
    run_cell,
    scan_cell,
)
from torchgraft.engines.recurrence.mixer import State
from torchgraft.errors import BadInput

CELLS: tuple[Cell, ...] = ("elman", "gru", "lstm", "slstm")
FORMS: tuple[Form, ...] = ("step", "fused")
F64 = torch.float64


def _drawn(
    cell: Cell, B: int, T: int, H: int, K: int, seed: int = 0, dtype: torch.dtype = F64
) -> tuple[Tensor, Tensor, Tensor, State]:
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=F64).to(dtype).requires_grad_()

    state = {name: normal(B, H, K) for name in STATES[cell]}
    if cell == "slstm":  # a state that can be reached: n is at least 1
        state["n"] = (state["n"].detach().abs() + 1).requires_grad_()
    return normal(B, T, H, len(GATES[cell]), K), normal(H, len(GATES[cell]), K, K), normal(H, K), state


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_one_step_by_hand() -> None:
    """One unit, from a state of (y, c) = (0.5, 0.25)."""
    one = torch.ones(1, 1, 1, dtype=F64)
    R = torch.tensor([0.1, 0.2, -0.3, 0.4], dtype=F64).view(1, 4, 1, 1)
    x = torch.tensor([1.0, -1.0, 0.5, 2.0], dtype=F64).view(1, 1, 4, 1)
    o, i, f, z = (float(a) + float(b) * 0.5 for a, b in zip(x.flatten(), R.flatten(), strict=True))
    y, state = cell_step(x, R, {"y": 0.5 * one, "c": 0.25 * one}, cell="lstm")
    c = _sigmoid(f) * 0.25 + _sigmoid(i) * math.tanh(z)
    assert float(state["c"]) == pytest.approx(c, abs=1e-14)
    assert float(y) == pytest.approx(_sigmoid(o) * math.tanh(c), abs=1e-14)
    # sLSTM without its stabiliser: C = e^i tanh z + sig(f) C, N = e^i + sig(f) N, y = sig(o) C / N, over two tokens
    state = cell_state("slstm", one, 1, 1, 1)
    C = N = last = 0.0
    for push in (x, 3 * x):
        o, i, f, z = (float(a) + float(b) * last for a, b in zip(push.flatten(), R.flatten(), strict=True))
        C, N = _sigmoid(f) * C + math.exp(i) * math.tanh(z), _sigmoid(f) * N + math.exp(i)
        last = _sigmoid(o) * C / N
        y, state = cell_step(push, R, state, cell="slstm")
        assert float(y) == pytest.approx(last, abs=1e-14)
        assert float(state["c"] * state["m"].exp()) == pytest.approx(C, abs=1e-14)
        assert float(state["n"]) >= 1
    y, _ = cell_step(x[:, :, :1], R[:, :1], {"y": 0.5 * one}, cell="elman")
    assert float(y) == pytest.approx(math.tanh(1.05), abs=1e-14)
    y, _ = cell_step(x[:, :, :3], R[:, :3], {"y": 0.5 * one}, cell="gru", bias=torch.tensor([[0.7]], dtype=F64))
    r, z = _sigmoid(1.05), _sigmoid(-0.9)
    assert float(y) == pytest.approx(z * 0.5 + (1 - z) * math.tanh(0.5 + r * (-0.15 + 0.7)), abs=1e-14)


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
@pytest.mark.parametrize("form", ["step", "fused"])
@pytest.mark.parametrize("bias", [True, False])
def test_one_head_is_torchs_cell(kind: type[nn.RNN | nn.GRU | nn.LSTM], form: Form, bias: bool) -> None:
    torch.manual_seed(0)
    rnn = kind(3, 5, batch_first=True, bias=bias).double()
    x = torch.randn(2, 9, 3, dtype=F64, requires_grad=True)
    start = [torch.randn(1, 2, 5, dtype=F64, requires_grad=True) for _ in range(2 if kind is nn.LSTM else 1)]
    expected, _ = rnn(x, tuple(start) if kind is nn.LSTM else start[0])
    cell, weight, add, R, side = from_torch(rnn)
    gates = project_gates(x, weight, add, num_heads=1, gates=len(GATES[cell]))
    state = {name: value.transpose(0, 1) for name, value in zip("yc", start, strict=False)}
    found, last = scan_cell(gates, R, cell=cell, bias=side, state=state, form=form)
    torch.testing.assert_close(found.squeeze(2), expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(last["y"][:, 0], expected[:, -1], atol=1e-12, rtol=0)
    sought = [x, *start, *rnn.parameters()]
    push = torch.randn_like(expected)
    ours, theirs = (torch.autograd.grad(y, sought, push.view_as(y)) for y in (found, expected))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-11, rtol=0)


@settings(max_examples=25, deadline=None)
@given(
    cell=st.sampled_from(CELLS),
    B=st.integers(0, 3),
    T=st.integers(1, 40),
    H=st.integers(1, 3),
    K=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_fused_is_step(cell: Cell, B: int, T: int, H: int, K: int, seed: int) -> None:
    """Outputs, last states and all gradients, the loss being a random sum of all of them."""
    gates, R, bias, state = _drawn(cell, B, T, H, K, seed)
    side = bias if cell == "gru" else None
    leaves = [gates, R, *state.values(), *([bias] if cell == "gru" else [])]
    outcome = []
    for form in FORMS:
        y, last = scan_cell(gates, R, cell=cell, bias=side, state=state, form=form)
        outs = [y, *(last[name] for name in STATES[cell])]
        draw = torch.Generator().manual_seed(seed)
        loss = sum(((out * torch.randn(out.shape, generator=draw, dtype=F64)).sum() for out in outs), torch.zeros(()))
        outcome.append((outs, torch.autograd.grad(loss, leaves)))
    for one, other in zip(outcome[0][0], outcome[1][0], strict=True):
        torch.testing.assert_close(one, other, atol=1e-11, rtol=1e-11)
    for one, other in zip(outcome[0][1], outcome[1][1], strict=True):
        torch.testing.assert_close(one, other, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize(("B", "T", "H", "K"), [(2, 37, 2, 3), (1, 5, 1, 4), (3, 2, 1, 2), (1, 1, 2, 2), (0, 4, 2, 2)])
def test_blocks_with_their_projection_are_steps(
    cell: Cell, B: int, T: int, H: int, K: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of four tokens, gradients of input, weights and states included."""
    monkeypatch.setattr(cells_fused, "_ROOM", max(1, B) * H * len(GATES[cell]) * K * 4)
    _, R, bias, state = _drawn(cell, B, T, H, K)
    side = bias if cell == "gru" else None
    draw = torch.Generator().manual_seed(1)
    rows = H * len(GATES[cell]) * K
    x, weight, add = (
        torch.randn(*shape, generator=draw, dtype=F64).requires_grad_() for shape in ((B, T, 5), (rows, 5), (rows,))
    )
    leaves = [x, weight, add, R, *state.values(), *([bias] if cell == "gru" else [])]
    outcome = []
    for form in FORMS:
        y, last = run_cell(x, weight, add, R, cell=cell, recurrent_bias=side, state=state, form=form)
        loss = (y * torch.linspace(-1, 2, y.numel(), dtype=F64).view_as(y)).sum()
        loss = loss + sum((last[name].square().sum() for name in STATES[cell]), torch.zeros(()))
        outcome.append((y, *last.values(), *torch.autograd.grad(loss, leaves)))
    for one, other in zip(*outcome, strict=True):
        torch.testing.assert_close(one, other, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("H", [1, 3])
def test_onednn_is_the_same_lstm(H: int, monkeypatch: pytest.MonkeyPatch) -> None:
    _, R, _, state = _drawn("lstm", 1, 9, H, 4, dtype=torch.float32)
    x, weight, add = torch.randn(1, 9, 5), torch.randn(H * 16, 5), torch.randn(H * 16)
    leaves = [x.requires_grad_(), weight.requires_grad_(), add.requires_grad_(), R, *state.values()]
    own, calls, forms = torch.lstm, [], tuple[Form, Form](("auto", "fused"))
    outcome = []

    def counted(*args: Any) -> Any:
        calls.append(1)
        return own(*args)

    monkeypatch.setattr(torch, "lstm", counted)
    for form in forms:
        y, last = run_cell(x, weight, add, R, cell="lstm", state=state, form=form)
        loss = y.square().sum() + last["y"].sum() + last["c"].sum()
        outcome.append((y, last["y"], last["c"], *torch.autograd.grad(loss, leaves)))
    assert len(calls) == H  # for auto only
    for one, other in zip(*outcome, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("cell", CELLS)
def test_backward_passes_gradcheck(cell: Cell) -> None:
    gates, R, bias, state = _drawn(cell, 2, 4, 2, 2)
    names = STATES[cell]

    def run(gates: Tensor, R: Tensor, side: Tensor | None, *states: Tensor) -> tuple[Tensor, ...]:
        given_state = dict(zip(names, states, strict=True))
        y, last = scan_cell(gates, R, cell=cell, bias=side, state=given_state, form="fused")
        return (y, *(last[name] for name in names))

    side = bias if cell == "gru" else None
    leaves: list[Any] = [gates, R, side, *(state[name] for name in names)]
    assert torch.autograd.gradcheck(run, tuple(leaves))


@pytest.mark.parametrize("cell", CELLS)
def test_heads_are_blocks_of_a_dense_matrix(cell: Cell) -> None:
    gates, R, bias, state = _drawn(cell, 2, 6, 3, 2)
    side = bias if cell == "gru" else None
    y, _ = scan_cell(gates, R, cell=cell, bias=side, state=state)
    dense = torch.stack(
        [
            torch.block_diag(*R[:, g].unbind(0))  # type: ignore[no-untyped-call]
            for g in range(R.shape[1])
        ]
    )[None]  # (1, G, H K, H K)
    joined = gates.transpose(2, 3).flatten(-2)[:, :, None]  # (B, T, 1, G, H K)
    merged = {name: value.flatten(1)[:, None] for name, value in state.items()}
    whole, _ = scan_cell(joined, dense, cell=cell, bias=None if side is None else side.view(1, -1), state=merged)
    torch.testing.assert_close(y.flatten(-2), whole.flatten(-2), atol=1e-12, rtol=0)


@pytest.mark.parametrize("cell", CELLS)
def test_split_anywhere_and_no_grad(cell: Cell) -> None:
    gates, R, _, _ = _drawn(cell, 2, 7, 2, 3)
    whole, last = scan_cell(gates, R, cell=cell)
    with torch.no_grad():
        first, state = scan_cell(gates[:, :1], R, cell=cell)
        middle, state = scan_cell(gates[:, 1:5], R, cell=cell, state=state)
        end, state = scan_cell(gates[:, 5:], R, cell=cell, state=state)
    torch.testing.assert_close(torch.cat([first, middle, end], dim=1), whole.detach(), atol=1e-12, rtol=0)
    for name in STATES[cell]:
        torch.testing.assert_close(state[name], last[name].detach(), atol=1e-12, rtol=0)


@pytest.mark.parametrize("cell", CELLS)
def test_extreme_gates_stay_finite(cell: Cell) -> None:
    gates, R, _, _ = _drawn(cell, 1, 50, 1, 4, dtype=torch.float32)
    leaf = (gates.detach() * 1e4).requires_grad_()
    for form in FORMS:
        y, last = scan_cell(leaf, R, cell=cell, form=form)
        (slope,) = torch.autograd.grad(y.sum(), leaf)
        assert bool(torch.isfinite(y).all() and torch.isfinite(slope).all())
        assert all(bool(torch.isfinite(value).all()) for value in last.values())


def test_low_precision_runs_in_float32() -> None:
    gates, R, _, _ = _drawn("lstm", 2, 12, 2, 4, dtype=torch.bfloat16)
    y, state = scan_cell(gates, R, cell="lstm")
    assert y.dtype == torch.bfloat16
    assert state["c"].dtype == torch.float32
    wide, _ = scan_cell(gates.float(), R.float(), cell="lstm")
    assert torch.equal(y, wide.bfloat16())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under, _ = scan_cell(gates.float(), R.float(), cell="lstm")
        (slope,) = torch.autograd.grad(under.sum(), gates)
    assert under.dtype == torch.float32
    assert torch.equal(under, wide)
    assert bool(torch.isfinite(slope).all())


@pytest.mark.parametrize("cell", ["lstm", "slstm"])
def test_compiles_whole(cell: Cell) -> None:
    gates, R, _, _ = _drawn(cell, 2, 5, 2, 3)

    def run(gates: Tensor, R: Tensor) -> Tensor:
        return scan_cell(gates, R, cell=cell)[0].square()

    expected = run(gates, R)
    found = torch.compile(run, fullgraph=True, backend="aot_eager")(gates, R)
    torch.testing.assert_close(found, expected)
    ours, theirs = (torch.autograd.grad(y.sum(), (gates, R)) for y in (found, expected))
    torch.testing.assert_close(ours, theirs)


def test_wrong_input_is_named() -> None:
    gates, R, _, state = _drawn("lstm", 2, 5, 2, 3)
    with pytest.raises(BadInput, match=r"cell must be one of .* 'lstmm'; did you mean 'lstm'"):
        scan_cell(gates, R, cell="lstmm")  # type: ignore[arg-type]
    with pytest.raises(BadInput, match=r"recurrent must have shape \(2, 4, 3, 3\)"):
        scan_cell(gates, R[:1], cell="lstm")
    with pytest.raises(BadInput, match=r"gates of gru must have shape"):
        scan_cell(gates, R, cell="gru")
    with pytest.raises(BadInput, match=r"state\['c'\]"):
        scan_cell(gates, R, cell="lstm", state={"y": state["y"]})
    with pytest.raises(BadInput, match="form must be"):
        scan_cell(gates, R, cell="lstm", form="chunk")  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="one layer"):
        from_torch(nn.LSTM(2, 2, num_layers=2))
