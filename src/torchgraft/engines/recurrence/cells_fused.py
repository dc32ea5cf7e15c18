"""Non-linear recurrences with a backward pass written by hand, as one operator that ``torch.compile`` keeps whole.

The loop over tokens does only what depends on the token before: one matrix product for all heads and gates, and a few
pointwise operations into buffers made before the loop. Everything else is done for a block of tokens at a time, while
the block is in the cache: the product with the input weights, the factors that carry a gradient from the new state to
the gates, and the gradients of both weights, each one product (batched over heads) a block. The forward pass keeps the
gates; the backward pass runs the block's tokens in reverse, each at the cost of one matrix product and a few
multiplications.

Memory layout is time first, (T, B, H, G * K), with the gates of a cell in the order of :data:`GATES`. This order puts
next to each other what is treated alike: the LSTM's o, i, f share a sigmoid, and its i, f, z share a factor dc.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from torchgraft.engines.recurrence.tiling import block_of_tokens

__all__ = ["GATES", "STATES", "cell_operator"]

#: Gates of each cell, in the order in which they are stored.
GATES: dict[str, tuple[str, ...]] = {
    "elman": ("n",),
    "gru": ("r", "z", "n"),
    "lstm": ("o", "i", "f", "z"),
    "slstm": ("o", "i", "f", "z"),
}
#: What each cell carries from token to token; the output y comes first.
STATES: dict[str, tuple[str, ...]] = {
    "elman": ("y",),
    "gru": ("y",),
    "lstm": ("y", "c"),
    "slstm": ("y", "c", "n", "m"),
}
#: How many values of size K the forward pass keeps for each token, beside the output: activated gates, then states.
#: gru: r, z, n, R_n y + bias; slstm: o, i', f', z, minus the slope of log f.
_KEPT: dict[str, tuple[int, int]] = {"elman": (0, 0), "gru": (4, 0), "lstm": (4, 1), "slstm": (5, 2)}
#: Elements of the gates of one block: 1 MiB in float32.
_ROOM = 1 << 18


def _product(matrix: Tensor, out: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a function (a, x) -> ``out`` = a + x @ matrix over heads; with one head no batch is needed."""
    if len(matrix) == 1:
        only, flat = matrix[0], out[0]
        return lambda add, x: torch.addmm(add[0], x[0], only, out=flat)
    return lambda add, x: torch.baddbmm(add, x, matrix, out=out)


def _steps(x: Tensor, T: int) -> Sequence[Tensor]:
    """Return (H, B, ...) views of (T, B, H, ...), the only one T times where a single token's room is reused."""
    views = x.transpose(1, 2).unbind(0)
    return views if len(views) == T else views * T


def _parts(x: Tensor, count: int) -> Tensor:
    """Return ``x`` with its last dimension split into ``count`` parts, (..., count * K) -> (..., count, K)."""
    return x.view(*x.shape[:-1], count, x.shape[-1] // count)


def _inputs(
    x: Tensor, weight: Tensor, bias: Tensor, H: int, cuts: Sequence[tuple[int, int]]
) -> Iterator[tuple[Tensor, ...]]:
    """Yield what the input gives to the gates, token by token, (H, B, part) for every part of ``cuts``."""
    T, B = x.shape[:2]
    if x.ndim == 4:
        yield from zip(*(_steps(x[..., a:b], T) for a, b in cuts), strict=True)
        return
    rows = len(weight)
    block = block_of_tokens(T, B * rows, _ROOM)
    buffer = x.new_empty(block * B, rows)
    by_head = buffer.view(block, B, H, rows // H)
    views = list(zip(*(_steps(by_head[..., a:b], block) for a, b in cuts), strict=True))
    for start in range(0, T, block):
        part = x[start : start + block].flatten(0, 1)
        torch.addmm(bias, part, weight.t(), out=buffer[: len(part)])
        yield from views[: min(block, T - start)]


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor, recurrent: Tensor, side: Tensor, state: Tensor, cell: str, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    T, B = x.shape[:2]
    H, K, wide = recurrent.shape
    slots, (acts, inner) = (T if keep else 1), _KEPT[cell]
    y_all = x.new_empty(T, B, H, K)
    kept, states = x.new_empty(slots, B, H, acts * K), x.new_empty(slots, B, H, inner * K)
    last = torch.empty_like(state)
    outs = _steps(y_all, T)
    y = state[0].transpose(0, 1)  # (H, B, K)
    work = x.new_empty(H, B, wide)
    product = _product(recurrent, work)

    def slot(first: int, end: int) -> Sequence[Tensor]:
        return _steps(kept[..., first * K : end * K], T)

    whole = ((0, wide),)
    if cell == "elman":
        for (add,), out in zip(_inputs(x, weight, bias, H, whole), outs, strict=True):
            product(add, y)
            y = torch.tanh(work, out=out)
    elif cell == "gru":
        pushed = side[:, None].expand(H, B, wide)
        rz, from_y = work[..., : 2 * K], work[..., 2 * K :]
        cuts = ((0, 2 * K), (2 * K, wide))
        views = zip(
            _inputs(x, weight, bias, H, cuts), slot(0, 2), slot(0, 1), slot(1, 2), slot(2, 3), slot(3, 4), outs,
            strict=True,
        )  # fmt: skip
        for (in_rz, in_n), both, r, z, n, kept_y, out in views:
            product(pushed, y)
            rz.add_(in_rz)
            torch.sigmoid(rz, out=both)
            if keep:
                kept_y.copy_(from_y)
            torch.addcmul(in_n, r, from_y, out=n).tanh_()
            y = torch.lerp(n, y, z, out=out)
    elif cell == "lstm":
        c, warm = state[1].transpose(0, 1), x.new_empty(H, B, K)
        oif, pre_z = work[..., : 3 * K], work[..., 3 * K :]
        views = zip(
            _inputs(x, weight, bias, H, whole), slot(0, 3), *(slot(g, g + 1) for g in range(4)),
            _steps(states, T), outs,
            strict=True,
        )  # fmt: skip
        for (add,), three, o, i, f, z, new, out in views:
            product(add, y)
            torch.sigmoid(oif, out=three)
            torch.tanh(pre_z, out=z)
            c = torch.mul(f, c, out=new).addcmul_(i, z)
            torch.tanh(c, out=warm)
            y = torch.mul(o, warm, out=out)
        last[1] = c.transpose(0, 1)
    else:
        cn = torch.stack([state[1], state[2]], dim=-2).transpose(0, 1)  # (H, B, 2, K)
        m = torch.where(state[2] == 0, -torch.inf, state[3]).transpose(0, 1).contiguous()
        pair, put = x.new_empty(H, B, 2, K), x.new_ones(H, B, 2, K)  # (i, log f + m) and (z, 1)
        z, m_row, warm = put[..., 0, :], m[..., None, :], x.new_empty(H, B, K)
        pre_o, pre_i, pre_f, pre_z = _parts(work, 4).unbind(-2)
        pair_i, pair_f = pair.unbind(-2)
        views = zip(
            _inputs(x, weight, bias, H, whole),
            slot(0, 1), slot(3, 4), slot(4, 5),
            _steps(_parts(kept[..., K : 3 * K], 2), T), _steps(_parts(states, 2), T), outs,
            strict=True,
        )  # fmt: skip
        for (add,), o, kept_z, slope, scales, new, out in views:
            product(add, y)
            torch.sigmoid(pre_o, out=o)
            torch.tanh(pre_z, out=z)
            log_f = torch.nn.functional.logsigmoid(pre_f)
            torch.add(log_f, m, out=pair_f)
            pair_i.copy_(pre_i)
            torch.maximum(pair_i, pair_f, out=m)
            torch.exp(pair.sub_(m_row), out=scales)
            if keep:
                kept_z.copy_(z)
                torch.expm1(log_f, out=slope)
            cn = torch.mul(scales[..., 1:, :], cn, out=new).addcmul_(scales[..., :1, :], put)
            torch.div(cn[..., 0, :], cn[..., 1, :], out=warm)
            y = torch.mul(o, warm, out=out)
        last[1:3] = cn.permute(2, 1, 0, 3)
        last[3] = m.transpose(0, 1)
    last[0] = y.transpose(0, 1)
    return y_all, last, kept, states


def _before(first: Tensor, seen: Tensor, start: int, stop: int) -> Tensor:
    """Return rows ``start - 1 .. stop - 2`` of ``seen``, where row -1 is ``first``."""
    return seen[start - 1 : stop - 1] if start else torch.cat([first[None], seen[: stop - 1]])


def _slope_of_tanh(value: Tensor, times: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """Return ``times`` * (1 - value^2), ``times`` being 1 where it is not given."""
    if times is None:
        return torch.addcmul(value.new_ones(()), value, value, value=-1, out=out)
    return torch.addcmul(times, times * value, value, value=-1, out=out)


def _gauge(d_last: Tensor, last: Tensor, kept: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return what a loss on the sLSTM's last (c, n, m) sends to i and f of every token by way of m, and to the first m.

    The output does not depend on m, which only scales c and n; so this is 0 unless the loss looks at the state itself,
    and then it goes, undivided, to whatever m was copied from: i, or f and the m before.
    """
    excess = d_last[3] - last[1] * d_last[1] - last[2] * d_last[2]  # (B, H, K)
    if not bool((excess != 0).any()):
        return None
    _, _, f, _, slope = _parts(kept, 5).unbind(-2)
    forgot = (f == 1).to(f.dtype)  # log f + m was the larger
    chain = torch.cat([forgot[1:], torch.ones_like(forgot[:1])]).flip(0).cumprod(0).flip(0) * excess
    return torch.stack([chain * (1 - forgot), -chain * forgot * slope], dim=-2), chain[0] * forgot[0]


def _backward(
    dy: Tensor, d_last: Tensor, x: Tensor, weight: Tensor, recurrent: Tensor, state: Tensor, y: Tensor, last: Tensor,
    kept: Tensor, states: Tensor, cell: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    T, B, H, K = y.shape
    wide, given = recurrent.shape[2], x.ndim == 4
    G, acts = wide // K, _KEPT[cell][0]
    d_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    d_weight, d_bias = torch.zeros_like(weight), x.new_zeros(0 if given else H * wide)
    d_recurrent, d_side = x.new_zeros(H, K, wide), x.new_zeros(H, wide if cell == "gru" else 0)
    d_state = torch.zeros_like(state)
    block = block_of_tokens(T, B * H * wide, _ROOM)
    room = x.new_empty(block, B, H, wide)  # factors at first, then the gradients of what R y gave
    spare = x.new_empty(block, B, H, 2 * K)  # carry, or the GRU's gradient of n
    dh = x.new_empty(H, B, K)
    product = _product(recurrent.mT if B == 1 else recurrent.mT.contiguous(), dh)
    dys, nothing, ahead = _steps(dy, T), torch.zeros_like(dh), torch.zeros_like(dh)
    rows = _steps(room, block)
    gates = _parts(room, G)
    dh.copy_(dys[-1]).add_(d_last[0].transpose(0, 1))
    dh_row = dh[..., None, :]
    if cell == "gru":
        d_ns, triple, zs = _steps(spare[..., :K], block), _steps(gates, block), _steps(kept[..., K : 2 * K], T)
    elif cell == "lstm":
        carries, fs = _steps(spare[..., :K], block), _steps(kept[..., 2 * K : 3 * K], T)
        from_o, from_c = _steps(gates[..., 0, :], block), _steps(gates[..., 1:, :], block)
        dc = d_last[1].transpose(0, 1).clone(memory_format=torch.contiguous_format)
        dc_row = dc[..., None, :]
    elif cell == "slstm":
        carries, fs = _steps(_parts(spare, 2), block), _steps(_parts(kept[..., 2 * K : 3 * K], 1), T)
        from_o, from_z = _steps(gates[..., 0, :], block), _steps(gates[..., 3, :], block)
        from_if = _steps(gates[..., 1:3, :], block)
        into = x.new_empty(block, B, H, 2, 2, K)  # d (i, f) / d (c, n), m held
        intos = _steps(into, block)
        mixed = x.new_empty(H, B, 2, 2, K)
        d_cn = torch.stack([d_last[1], d_last[2]], dim=-2).transpose(0, 1).contiguous()  # (H, B, 2, K)
        dc, d_cn_row = d_cn[..., 0, :], d_cn[..., None, :, :]
        gauge = _gauge(d_last, last, kept)
    for start in reversed(range(0, T, block)):
        stop = min(start + block, T)
        n = stop - start
        inward = gates[:n]
        acted = _parts(kept[start:stop], acts).unbind(-2) if acts else ()
        if cell == "elman":
            _slope_of_tanh(y[start:stop], out=room[:n])
            for t in reversed(range(n)):
                rows[t].mul_(dh)
                product(dys[start + t - 1] if start + t else nothing, rows[t])
        elif cell == "gru":
            r, z, new, side = acted
            d_n = _slope_of_tanh(new, 1 - z, out=spare[:n, ..., :K])  # d pre-activation of n / d y
            torch.mul(d_n, r, out=inward[..., 2, :])
            torch.sub(_before(state[0], y, start, stop), new, out=inward[..., 1, :])
            inward[..., 1, :].mul_(torch.addcmul(z, z, z, value=-1))
            torch.mul(d_n, side, out=inward[..., 0, :]).mul_(torch.addcmul(r, r, r, value=-1))
            for t in reversed(range(n)):
                triple[t].mul_(dh_row)
                d_ns[t].mul_(dh)
                if start + t:
                    torch.addcmul(dys[start + t - 1], dh, zs[start + t], out=ahead)
                else:
                    torch.mul(dh, zs[0], out=ahead)
                product(ahead, rows[t])
        elif cell == "lstm":
            o, i, _, z = acted
            three = _parts(kept[start:stop], 4)[..., :3, :]
            torch.addcmul(three, three, three, value=-1, out=inward[..., :3, :])
            warm = states[start:stop].tanh()
            inward[..., 0, :].mul_(warm)
            inward[..., 1, :].mul_(z)
            inward[..., 2, :].mul_(_before(state[1], states, start, stop))
            _slope_of_tanh(z, i, out=inward[..., 3, :])
            _slope_of_tanh(warm, o, out=spare[:n, ..., :K])
            for t in reversed(range(n)):
                dc.addcmul_(dh, carries[t])
                from_o[t].mul_(dh)
                from_c[t].mul_(dc_row)
                dc.mul_(fs[start + t])
                product(dys[start + t - 1] if start + t else nothing, rows[t])
        else:
            o, i, f, z, slope = acted
            cn = _parts(states[start:stop], 2)
            c, norm = cn.unbind(-2)
            first = torch.cat([state[1], state[2]], dim=-1)
            old = _parts(_before(first, states, start, stop), 2)
            warm = c / norm
            torch.div(o, norm, out=spare[:n, ..., :K])
            torch.mul(spare[:n, ..., :K], -warm, out=spare[:n, ..., K:])
            torch.mul(i, z, out=into[:n, ..., 0, 0, :])
            into[:n, ..., 0, 1, :] = i
            torch.mul(old, -(slope * f)[..., None, :], out=into[:n, ..., 1, :, :])
            torch.addcmul(o, o, o, value=-1, out=inward[..., 0, :]).mul_(warm)
            _slope_of_tanh(z, i, out=inward[..., 3, :])
            for t in reversed(range(n)):
                d_cn.addcmul_(dh_row, carries[t])
                from_o[t].mul_(dh)
                from_z[t].mul_(dc)
                torch.mul(d_cn_row, intos[t], out=mixed)
                torch.add(mixed[..., 0, :], mixed[..., 1, :], out=from_if[t])
                if gauge is not None:
                    from_if[t].add_(gauge[0][start + t].transpose(0, 1))
                d_cn.mul_(fs[start + t])
                product(dys[start + t - 1] if start + t else nothing, rows[t])
        past = _before(state[0], y, start, stop).reshape(n * B, H, K).permute(1, 2, 0)
        flat = room[:n].view(n * B, H, wide)
        d_recurrent.baddbmm_(past, flat.transpose(0, 1))
        if cell == "gru":  # the new gate's input stands outside the reset gate
            d_side += flat.sum(dim=0)
            inward[..., 2, :] = spare[:n, ..., :K]
        if given:
            d_x[start:stop] = room[:n]
        else:
            joined = flat.view(n * B, H * wide)
            d_x[start:stop] = torch.mm(joined, weight).view(n, B, x.shape[-1])
            d_weight.addmm_(joined.t(), x[start:stop].flatten(0, 1))
            d_bias += joined.sum(dim=0)
    d_state[0] = dh.transpose(0, 1)
    if cell == "lstm":
        d_state[1] = dc.transpose(0, 1)
    elif cell == "slstm":
        d_state[1:3] = d_cn.permute(2, 1, 0, 3)
        d_state[3] = state[1] * d_state[1] + state[2] * d_state[2]
        if gauge is not None:
            d_state[3] += gauge[1]
    return d_x, d_weight, d_bias, d_recurrent, d_side, d_state


@torch.library.custom_op("torchgraft::cell", mutates_args=())
def cell_operator(
    x: Tensor, weight: Tensor, bias: Tensor, recurrent: Tensor, side: Tensor, state: Tensor, cell: str, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run a cell over all tokens.

    Args:
        x: the input, or what it gives to every gate, where it has four dimensions.
        weight: of the input, with rows by head, gate and unit; of size 0 where ``x`` is gates.
        bias: likewise.
        recurrent: what the last output is multiplied by from the right.
        side: the GRU's bias on the recurrent side; of size 0 elsewhere.
        state: the states in the order of :data:`STATES`.
        cell: one of :data:`GATES`.
        keep: whether a backward pass will follow.

    Shapes:
        (T, B, D) or (T, B, H, G K), (H G K, D), (H G K,), (H, K, G K), (H, 3 K) or (H, 0), (S, B, H, K)
        -> outputs (T, B, H, K), last state (S, B, H, K), and what the backward pass needs.
    """
    with torch.autocast(x.device.type, enabled=False):
        return _forward(x, weight, bias, recurrent, side, state, cell, keep)


@cell_operator.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor, recurrent: Tensor, side: Tensor, state: Tensor, cell: str, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (T, B), (H, K, _), (acts, inner) = x.shape[:2], recurrent.shape, _KEPT[cell]
    slots = T if keep else 1
    return (
        x.new_empty(T, B, H, K),
        torch.empty_like(state),
        x.new_empty(slots, B, H, acts * K),
        x.new_empty(slots, B, H, inner * K),
    )


@torch.library.custom_op("torchgraft::cell_backward", mutates_args=())
def _backward_operator(
    dy: Tensor, d_last: Tensor, x: Tensor, weight: Tensor, recurrent: Tensor, state: Tensor, y: Tensor, last: Tensor,
    kept: Tensor, states: Tensor, cell: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    with torch.autocast(dy.device.type, enabled=False):
        return _backward(dy, d_last, x, weight, recurrent, state, y, last, kept, states, cell)


@_backward_operator.register_fake
def _(
    dy: Tensor, d_last: Tensor, x: Tensor, weight: Tensor, recurrent: Tensor, state: Tensor, y: Tensor, last: Tensor,
    kept: Tensor, states: Tensor, cell: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    H, K, wide = recurrent.shape
    return (
        x.new_empty(x.shape),
        torch.empty_like(weight),
        x.new_empty(0 if x.ndim == 4 else H * wide),
        x.new_empty(H, K, wide),
        x.new_empty(H, wide if cell == "gru" else 0),
        torch.empty_like(state),
    )


def _setup(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[object, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, _, recurrent, _, state, cell, _ = inputs
    y, last, kept, states = output
    ctx.save_for_backward(x, weight, recurrent, state, y, last, kept, states)  # type: ignore[arg-type]  # untyped
    ctx.cell = cell  # type: ignore[attr-defined]  # as autograd's own examples do
    ctx.mark_non_differentiable(kept, states)


def _gradients(
    ctx: torch.autograd.function.FunctionCtx, dy: Tensor, d_last: Tensor, *_: Tensor | None
) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # type: ignore[attr-defined]  # untyped in torch
    grads = _backward_operator(dy, d_last, *saved, ctx.cell)  # type: ignore[attr-defined]
    return (*grads, None, None)


cell_operator.register_autograd(_gradients, setup_context=_setup)
