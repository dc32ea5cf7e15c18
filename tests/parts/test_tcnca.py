"""TCNCA: chunks that do not see each other, the gates by hand, and Mega's average in the same place."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from torchgraft.errors import BadInput
from torchgraft.parts.mixers.tcnca import TCNCA, chunk_attention

F64 = torch.float64


@pytest.mark.parametrize(("tokens", "chunk"), [(1, 4), (4, 4), (13, 4), (5, 32)])
def test_chunk_attention_by_its_definition(tokens: int, chunk: int) -> None:
    q, k = (torch.randn(2, tokens, 3, 5, dtype=F64) for _ in range(2))
    v, bias = torch.randn(2, tokens, 3, 4, dtype=F64), torch.randn(3, chunk, dtype=F64)
    got = chunk_attention(q, k, v, bias)
    for t in range(tokens):
        first = t // chunk * chunk
        for h in range(3):
            scores = torch.einsum("bk,bsk->bs", q[:, t, h], k[:, first : t + 1, h]) / 5**0.5
            scores = scores + bias[h, : t - first + 1].flip(0)
            want = torch.einsum("bs,bsv->bv", scores.softmax(-1), v[:, first : t + 1, h])
            torch.testing.assert_close(got[:, t, h], want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("simple", [False, True])
def test_with_the_convolutions_bypassed_chunks_are_apart(simple: bool) -> None:
    mixer = TCNCA(8, chunk=5, simple=simple, temporal="none", num_heads=2).double()
    x = torch.randn(1, 15, 8, dtype=F64, requires_grad=True)
    (grad,) = torch.autograd.grad(mixer(x)[0, 5:10].square().sum(), x)
    assert float(grad[0, :5].abs().max()) == 0
    assert float(grad[0, 10:].abs().max()) == 0
    assert float(grad[0, 5:10].abs().min()) > 0


def test_with_the_convolutions_chunks_see_back_as_far_as_they_reach() -> None:
    mixer = TCNCA(4, chunk=2, kernel=2, depth=3).double()
    assert mixer.receptive_field() == 8
    x = torch.randn(1, 20, 4, dtype=F64, requires_grad=True)
    (grad,) = torch.autograd.grad(mixer(x)[0, 17].sum(), x)  # its chunk begins at 16, which sees back to 9
    assert float(grad[0, :9].abs().max()) == 0
    assert float(grad[0, 9].abs().max()) > 0
    assert float(grad[0, 18:].abs().max()) == 0


def test_the_gates_are_megas() -> None:
    mixer = TCNCA(6, chunk=4, kernel=2, depth=2, key_size=3).double()
    with torch.no_grad():
        mixer.bias.normal_()
        mixer.shift.normal_()
    x = torch.randn(2, 9, 6, dtype=F64)
    seen = mixer.temporal(x)[0]
    W, b = mixer.inner.weight, mixer.inner.bias
    z, g, u, h = (seen @ W.T + b).split([3, 12, 6, 6], dim=-1)
    z = F.silu(z)
    q, k = (z * mixer.scale[i, 0] + mixer.shift[i, 0] for i in (0, 1))
    v = F.silu(mixer.value(x))
    read = chunk_attention(q[:, :, None], k[:, :, None], v[:, :, None], mixer.bias)[:, :, 0]
    candidate = F.silu(h + (F.silu(g) * read) @ mixer.out.weight.T)
    gate = torch.sigmoid(u)
    torch.testing.assert_close(mixer(x), gate * candidate + (1 - gate) * x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("temporal", ["tcn", "ema", "none"])
@pytest.mark.parametrize("simple", [False, True])
def test_rows_at_different_places_of_their_chunks_go_on_as_alone(temporal: str, simple: bool) -> None:
    torch.manual_seed(0)
    mixer = TCNCA(8, chunk=7, kernel=3, depth=2, num_heads=2, simple=simple, temporal=temporal).double()  # type: ignore[arg-type]
    with torch.no_grad():
        mixer.bias.normal_()
    x = torch.randn(3, 40, 8, dtype=F64)
    with torch.no_grad():
        want = mixer(x)
        begins = [6, 7, 11]
        states = [mixer.prefill(x[row : row + 1, :begin])[1] for row, begin in enumerate(begins)]
        state = {name: torch.cat([each[name] for each in states]) for name in states[0]}
        for length in (1, 9, 1, 14):
            rows = torch.stack([x[row, begin : begin + length] for row, begin in enumerate(begins)])
            y, state = mixer.prefill(rows, state)
            for row, begin in enumerate(begins):
                torch.testing.assert_close(y[row], want[row, begin : begin + length], rtol=0, atol=1e-9)
            begins = [begin + length for begin in begins]


def test_refusals() -> None:
    with pytest.raises(BadInput, match="temporal"):
        TCNCA(8, temporal="lstm")  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="chunk"):
        TCNCA(8, chunk=0)
    with pytest.raises(BadInput, match="receptive_field"):
        TCNCA(8, temporal="ema").receptive_field()
    with pytest.raises(BadInput, match="lacks"):
        TCNCA(8).prefill(torch.zeros(1, 2, 8), {"filled": torch.zeros(1, dtype=torch.long)})
