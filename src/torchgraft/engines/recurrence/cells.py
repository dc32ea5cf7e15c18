"""Non-linear recurrences: Elman, GRU, LSTM and the stabilised sLSTM, dense or head-wise (block-diagonal).

    g_t = x_t + R y_{t-1},   (y_t, c_t, ...) = P(y_{t-1}, c_{t-1}, ..., g_t)

R has one (K, K) block a head and gate, so one head is the dense cell. What the input gives to the gates is made outside
the loop over tokens. Two forms give the same numbers:

- ``"step"``: a plain loop in which autograd does the backward pass; the reference, which can be differentiated twice.
- ``"fused"``: one operator with a backward pass written by hand; see :mod:`torchgraft.engines.recurrence.cells_fused`.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft.engines.recurrence.cells_fused import GATES, STATES, cell_operator
from torchgraft.engines.recurrence.mixer import State
from torchgraft.errors import BadInput, nearest

__all__ = ["Cell", "GATES", "STATES", "cell_state", "cell_step", "from_torch", "project_gates", "run_cell", "scan_cell"]

Cell: TypeAlias = Literal["elman", "gru", "lstm", "slstm"]
Form: TypeAlias = Literal["auto", "fused", "step"]
_TORCH: dict[str, tuple[Cell, tuple[int, ...]]] = {
    "RNN": ("elman", (0,)),
    "GRU": ("gru", (0, 1, 2)),
    "LSTM": ("lstm", (3, 0, 1, 2)),
}


def _known(cell: str) -> None:
    if cell not in GATES:
        raise BadInput(f"cell must be one of {', '.join(GATES)}, got {cell!r}{nearest(cell, list(GATES))}")


def project_gates(x: Tensor, weight: Tensor, bias: Tensor | None, *, num_heads: int, gates: int) -> Tensor:
    """Return what the input gives to every gate, for all tokens by one matrix product.

    The result is a view of time-first memory, which is what :func:`scan_cell` reads without a copy.

    Args:
        x: the input.
        weight: rows ordered by head, then gate, then unit.
        bias: likewise.
        num_heads: H.
        gates: G.

    Shapes:
        (B, T, D), (H G K, D), (H G K,) -> (B, T, H, G, K)

    Example:
        >>> project_gates(torch.zeros(2, 5, 3), torch.zeros(24, 3), None, num_heads=2, gates=4).shape
        torch.Size([2, 5, 2, 4, 3])
    """
    flat = F.linear(x.transpose(0, 1), weight, bias)  # (T, B, H G K)
    return flat.view(*flat.shape[:2], num_heads, gates, len(weight) // (num_heads * gates)).transpose(0, 1)


def cell_state(cell: Cell, like: Tensor, batch_size: int, num_heads: int, size: int) -> State:
    """Return the state before the first token, zeros (B, H, K) by name, with the dtype and device of ``like``.

    Raises:
        BadInput: ``cell`` is not known.
    """
    _known(cell)
    return {name: like.new_zeros(batch_size, num_heads, size) for name in STATES[cell]}


def cell_step(
    gates: Tensor, recurrent: Tensor, state: State, *, cell: Cell, bias: Tensor | None = None
) -> tuple[Tensor, State]:
    """Take one token: the definition of each cell, which every other form is tested against.

    Args:
        gates: what the input gives to the gates, in the order of ``GATES[cell]``.
        recurrent: R.
        state: of the token before. The sLSTM's normaliser n is 0 (no token yet) or at least 1.
        cell: which cell.
        bias: what the GRU adds to R y inside the reset gate, torch's ``bias_hn``.

    Shapes:
        gates (B, H, G, K), recurrent (H, G, K, K) as (head, gate, to, from), state (B, H, K) each, bias (H, K)
        -> (B, H, K) and the next state.

    Example:
        >>> state = cell_state("elman", torch.zeros(1), 1, 1, 2)
        >>> y, state = cell_step(torch.tensor([[[[0.0, 100.0]]]]), torch.eye(2)[None, None], state, cell="elman")
        >>> y
        tensor([[[0., 1.]]])
    """
    y = state["y"]
    pushed = torch.einsum("hgkj,bhj->bhgk", recurrent, y)
    if cell == "elman":
        y = torch.tanh(gates + pushed).squeeze(-2)
        return y, {"y": y}
    if cell == "gru":
        side = pushed[..., 2, :] if bias is None else pushed[..., 2, :] + bias
        r, z = torch.sigmoid(gates[..., :2, :] + pushed[..., :2, :]).unbind(-2)
        n = torch.tanh(gates[..., 2, :] + r * side)
        y = z * y + (1 - z) * n
        return y, {"y": y}
    o, i, f, z = (gates + pushed).unbind(-2)
    if cell == "lstm":
        c = torch.sigmoid(f) * state["c"] + torch.sigmoid(i) * torch.tanh(z)
        y = torch.sigmoid(o) * torch.tanh(c)
        return y, {"y": y, "c": c}
    kept = F.logsigmoid(f) + torch.where(state["n"] == 0, -torch.inf, state["m"])
    m = torch.maximum(i, kept)
    i, f = torch.exp(i - m), torch.exp(kept - m)
    c = f * state["c"] + i * torch.tanh(z)
    n = f * state["n"] + i
    y = torch.sigmoid(o) * c / n
    return y, {"y": y, "c": c, "n": n, "m": m}


def _checked(gates: Tensor, recurrent: Tensor, cell: str, bias: Tensor | None, state: State | None) -> None:
    _known(cell)
    G = len(GATES[cell])
    if gates.ndim != 5 or gates.shape[3] != G or gates.shape[1] < 1:
        raise BadInput(f"gates of {cell} must have shape (B, T >= 1, H, {G}, K), got {tuple(gates.shape)}")
    B, _, H, _, K = gates.shape
    if recurrent.shape != (H, G, K, K):
        raise BadInput(f"recurrent must have shape {(H, G, K, K)}, got {tuple(recurrent.shape)}")
    if bias is not None and (cell != "gru" or bias.shape != (H, K)):
        raise BadInput(f"bias is for cell='gru' and has shape {(H, K)}, got {tuple(bias.shape)} for {cell!r}")
    if state is not None:
        for name in STATES[cell]:
            if name not in state or state[name].shape != (B, H, K):
                found = tuple(state[name].shape) if name in state else sorted(state)
                raise BadInput(f"state[{name!r}] must have shape {(B, H, K)}, got {found}")


def _exact(cell: Cell, tensors: tuple[Tensor, ...], state: State | None, B: int, H: int, K: int) -> tuple[Tensor, ...]:
    """Return ``tensors`` in their widest dtype, float32 at least, and then the state, (S, B, H, K)."""
    wide = torch.float32
    for tensor in tensors:
        wide = torch.promote_types(wide, tensor.dtype)
    if state is None:
        state = cell_state(cell, tensors[0].new_empty(0, dtype=wide), B, H, K)
    return (*(tensor.to(wide) for tensor in tensors), torch.stack([state[name].to(wide) for name in STATES[cell]]))


def _run(
    x: Tensor, weight: Tensor, bias: Tensor, recurrent: Tensor, side: Tensor | None, stacked: Tensor, cell: Cell
) -> tuple[Tensor, State]:
    """Hand time-first gates or inputs to the operator; return (B, T, H, K) and the state."""
    H, _, K, _ = recurrent.shape
    row = x.new_zeros(H, 0)
    if cell == "gru":
        row = x.new_zeros(H, 3 * K) if side is None else F.pad(side, (2 * K, 0))
    matrix = recurrent.permute(0, 3, 1, 2).flatten(-2)  # (H, K, G K)
    leaves = (x, weight, bias, matrix, row, stacked)
    keep = torch.is_grad_enabled() and any(leaf.requires_grad for leaf in leaves)
    y, last, _, _ = cell_operator(*leaves, cell, keep)
    return y.transpose(0, 1), dict(zip(STATES[cell], last.unbind(0), strict=True))


def scan_cell(
    gates: Tensor,
    recurrent: Tensor,
    *,
    cell: Cell,
    bias: Tensor | None = None,
    state: State | None = None,
    form: Form = "auto",
) -> tuple[Tensor, State]:
    """Run a cell over what the input gives to its gates.

    bfloat16 and float16 are computed in float32 and returned in the dtype of ``gates``; states stay in float32.

    Args:
        gates: what the input gives to every gate, biases included; see :func:`project_gates`.
        recurrent: R.
        cell: ``"elman"``, ``"gru"``, ``"lstm"`` or ``"slstm"``.
        bias: of the GRU's recurrent side; see :func:`cell_step`.
        state: after the token before; ``None`` is the state of :func:`cell_state`.
        form: ``"fused"``, ``"step"``, or ``"auto"``, which steps for a single token and is fused otherwise.

    Shapes:
        gates (B, T, H, G, K), recurrent (H, G, K, K) as (head, gate, to, from), bias (H, K), state (B, H, K) each
        -> (B, T, H, K) and the state after the last token.

    Example:
        >>> y, state = scan_cell(torch.randn(2, 7, 3, 4, 5), torch.randn(3, 4, 5, 5), cell="lstm")
        >>> y.shape, sorted(state)
        (torch.Size([2, 7, 3, 5]), ['c', 'y'])

    Raises:
        BadInput: a shape does not fit, or ``cell`` or ``form`` is not known.
    """
    _checked(gates, recurrent, cell, bias, state)
    if form not in ("auto", "fused", "step"):
        raise BadInput(f"form must be 'auto', 'fused' or 'step', got {form!r}")
    B, T, H, _, K = gates.shape
    sides = () if bias is None else (bias,)
    wide, matrix, *rest, stacked = _exact(cell, (gates, recurrent, *sides), state, B, H, K)
    side = rest[0] if rest else None
    if form == "step" or (form == "auto" and T == 1):
        state = dict(zip(STATES[cell], stacked.unbind(0), strict=True))
        device = gates.device.type
        with torch.autocast(device if torch.amp.is_autocast_available(device) else "cpu", enabled=False):
            outputs = []
            for gate in wide.unbind(1):
                y, state = cell_step(gate, matrix, state, cell=cell, bias=side)
                outputs.append(y)
            return torch.stack(outputs, dim=1).to(gates.dtype), state
    none = wide.new_empty(0)
    y, state = _run(wide.transpose(0, 1).flatten(-2), none, none, matrix, side, stacked, cell)
    return y.to(gates.dtype), state


def run_cell(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    recurrent: Tensor,
    *,
    cell: Cell,
    recurrent_bias: Tensor | None = None,
    state: State | None = None,
    form: Form = "auto",
) -> tuple[Tensor, State]:
    """Run a cell over its input: :func:`project_gates` and :func:`scan_cell` in one, a block of tokens at a time.

    A float32 LSTM on the CPU that is dense, or has a batch of one, is run by oneDNN, one call a head: the kernel that
    ``torch.nn.LSTM`` uses. There a token costs little more than its matrix product, and a loop from outside adds to
    that. Not while compiling, and never with ``form="fused"``.

    Args:
        x: the input.
        weight: of the input; rows ordered by head, then gate, then unit.
        bias: likewise.
        recurrent, cell, state, form: as for :func:`scan_cell`.
        recurrent_bias: its ``bias``.

    Shapes:
        x (B, T, D), weight (H G K, D), bias (H G K,) -> (B, T, H, K) and the state after the last token.

    Example:
        >>> x, weight, recurrent = torch.randn(2, 7, 6), torch.randn(60, 6), torch.randn(3, 4, 5, 5)
        >>> y, state = run_cell(x, weight, torch.zeros(60), recurrent, cell="lstm")
        >>> y.shape
        torch.Size([2, 7, 3, 5])

    Raises:
        BadInput: as :func:`scan_cell` does.
    """
    _known(cell)
    B, T, _ = x.shape
    H, G, K, _ = recurrent.shape
    if weight.shape != (H * G * K, x.shape[-1]) or bias.shape != weight.shape[:1]:
        shapes = tuple(weight.shape), tuple(bias.shape)
        raise BadInput(f"weight and bias must have shapes {(H * G * K, x.shape[-1])}, {(H * G * K,)}, got {shapes}")
    if form == "step" or (form == "auto" and T == 1):
        gates = project_gates(x, weight, bias, num_heads=H, gates=G)
        return scan_cell(gates, recurrent, cell=cell, bias=recurrent_bias, state=state, form=form)
    _checked(x.new_empty(()).expand(B, T, H, G, K), recurrent, cell, recurrent_bias, state)
    if form not in ("auto", "fused"):
        raise BadInput(f"form must be 'auto', 'fused' or 'step', got {form!r}")
    given = (x, weight, bias, recurrent, *(() if recurrent_bias is None else (recurrent_bias,)))
    device = x.device.type
    lowered = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if lowered else x.dtype
    wide, matrix, row, R, *rest, stacked = _exact(cell, given, state, B, H, K)
    if form == "auto" and cell == "lstm" and (B == 1 or H == 1) and _onednn_runs(wide):
        y, state = _onednn(wide, matrix, row, R, stacked)
    else:
        y, state = _run(wide.transpose(0, 1), matrix, row, R, rest[0] if rest else None, stacked, cell)
    return y.to(dtype), state


def _onednn_runs(x: Tensor) -> bool:
    if torch.compiler.is_compiling() or x.dtype != torch.float32 or x.device.type != "cpu":
        return False
    return bool(torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled)  # type: ignore[no-untyped-call]


def _onednn(x: Tensor, weight: Tensor, bias: Tensor, recurrent: Tensor, stacked: Tensor) -> tuple[Tensor, State]:
    """Run an LSTM by oneDNN, head by head; gates o, i, f, z become its i, f, z, o."""
    H, G, K, _ = recurrent.shape
    inward = weight.view(H, G, K, -1).roll(-1, dims=1).flatten(1, 2)
    pushed, added = recurrent.roll(-1, dims=1).flatten(1, 2), bias.view(H, G, K).roll(-1, dims=1).flatten(1)
    nothing, seq, ends = torch.zeros_like(added[0]), x.transpose(0, 1), []
    with torch.autocast("cpu", enabled=False):
        for head in range(H):
            flat = [inward[head], pushed[head], added[head], nothing]
            start = [stacked[which, None, :, head].contiguous() for which in range(2)]
            ends.append(torch.lstm(seq, start, flat, True, 1, 0.0, torch.is_grad_enabled(), False, False))
    y = torch.stack([end[0] for end in ends], dim=2)  # (T, B, H, K)
    last = [torch.stack([end[which][0] for end in ends], dim=1) for which in (1, 2)]
    return y.transpose(0, 1), dict(zip(STATES["lstm"], last, strict=True))


def from_torch(rnn: nn.RNN | nn.GRU | nn.LSTM) -> tuple[Cell, Tensor, Tensor, Tensor, Tensor | None]:
    """Return cell, input weight, input bias, R and the GRU's recurrent bias of one of torch's layers, with one head.

    Args:
        rnn: one layer, one direction, no projection; tanh where it is an RNN.

    Shapes:
        -> (G K, D), (G K,), (1, G, K, K), (1, K) or None

    Example:
        >>> cell, weight, bias, recurrent, side = from_torch(nn.LSTM(3, 5))
        >>> cell, weight.shape, recurrent.shape
        ('lstm', torch.Size([20, 3]), torch.Size([1, 4, 5, 5]))

    Raises:
        BadInput: it has more layers, both directions, a projection or another nonlinearity.
    """
    if rnn.num_layers != 1 or rnn.bidirectional or rnn.proj_size or (rnn.mode == "RNN_RELU"):
        raise BadInput(f"rnn must have one layer, one direction, no projection and tanh, got {rnn}")
    cell, order = _TORCH[type(rnn).__name__]
    G, K = len(order), rnn.hidden_size
    parts = dict(rnn.named_parameters())
    picked = torch.tensor(order, device=parts["weight_ih_l0"].device)
    weight = parts["weight_ih_l0"].view(G, K, -1)[picked].flatten(0, 1)
    recurrent = parts["weight_hh_l0"].view(G, K, K)[picked][None]
    zero = parts["weight_ih_l0"].new_zeros(G * K)
    bias = parts.get("bias_ih_l0", zero).view(G, K)[picked]
    side = parts.get("bias_hh_l0", zero).view(G, K)[picked]
    if cell == "gru":
        bias = bias + torch.cat([side[:2], torch.zeros_like(side[2:])])
        return "gru", weight, bias.flatten(), recurrent, side[2:]
    return cell, weight, (bias + side).flatten(), recurrent, None
