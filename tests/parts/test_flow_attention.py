"""Flow-Attention: conservation of flow, the linear form beside written-out matrices, the causal form beside a loop."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from torchgraft.parts.mixers.flow_attention import (
    BidirectionalFlowAttention,
    FlowAttention,
    causal_flow_attention,
    flow_attention,
)


def draw(sinks: int, sources: int, size: int = 3, value: int = 4, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    kind = {"generator": g, "dtype": torch.float64}
    return (
        torch.randn(2, sinks, 2, size, **kind),
        torch.randn(2, sources, 2, size, **kind),
        torch.randn(2, sources, 2, value, **kind),
    )


def written_out(q: Tensor, k: Tensor, v: Tensor, eps: float, clamp: float | None) -> Tensor:
    """Return one head's result by explicit N x M matrices of flow; q (N, K), k (M, K), v (M, V)."""
    a, b = q.sigmoid(), k.sigmoid()
    n, m = len(a), len(b)
    incoming = torch.stack([(a[i] + eps) @ (sum(b[j] for j in range(m)) + eps) for i in range(n)])
    outgoing = torch.stack([(b[j] + eps) @ (sum(a[i] for i in range(n)) + eps) for j in range(m)])
    received = torch.stack([(a[i] + eps) @ (sum(b[j] / outgoing[j] for j in range(m)) + eps) for i in range(n)])
    emitted = torch.stack([(b[j] + eps) @ (sum(a[i] / incoming[i] for i in range(n)) + eps) for j in range(m)])
    if clamp is not None:
        emitted = emitted.clamp(-clamp, clamp)
    attention = (a @ b.T) / incoming[:, None] * (m * emitted.softmax(0))  # (N, M)
    return (received * n / m).sigmoid()[:, None] * (attention @ v)


@pytest.mark.parametrize(("n", "m"), [(5, 5), (4, 9), (7, 3), (1, 1)])
@pytest.mark.parametrize("clamp", [None, 1.0, 0.3])
def test_linear_form_equals_the_matrix_written_out(n: int, m: int, clamp: float | None) -> None:
    q, k, v = draw(n, m)
    found = flow_attention(q, k, v, eps=1e-6, clamp=clamp)
    for row in range(2):
        for head in range(2):
            expected = written_out(q[row, :, head], k[row, :, head], v[row, :, head], 1e-6, clamp)
            torch.testing.assert_close(found[row, :, head], expected, rtol=0, atol=1e-12)


def test_flow_is_conserved_without_clamp_and_eps() -> None:
    """Values of one make the output gate * M sum_j (Q'/I . K'_j) softmax_j(Ohat), from which the sums can be read."""
    q, k, _ = draw(6, 9)
    a, b = q.sigmoid(), k.sigmoid()
    incoming = torch.einsum("bnhk,bhk->bnh", a, b.sum(1))
    outgoing = torch.einsum("bmhk,bhk->bmh", b, a.sum(1))
    one = torch.ones((), dtype=torch.float64)
    arriving = torch.einsum("bnhk,bmhk->bnh", a / incoming[..., None], b)
    leaving = torch.einsum("bmhk,bnhk->bmh", b / outgoing[..., None], a)
    torch.testing.assert_close(arriving, one.expand_as(arriving), rtol=0, atol=1e-12)
    torch.testing.assert_close(leaving, one.expand_as(leaving), rtol=0, atol=1e-12)
    # with equal keys all sources emit alike: every weight of the competition is 1, the sum of Ihat over sinks is M,
    # and a sink receives gate * value
    same = k[:, :1].expand(-1, 9, -1, -1)
    received = torch.einsum(
        "bnhk,bhk->bnh", a, (same.sigmoid() / torch.einsum("bmhk,bhk->bmh", same.sigmoid(), a.sum(1))[..., None]).sum(1)
    )
    torch.testing.assert_close(received.sum(1), 9 * one.expand(2, 2), rtol=0, atol=1e-12)
    values = torch.ones(2, 9, 2, 1, dtype=torch.float64)
    found = flow_attention(q, same, values, eps=0.0, clamp=None)[..., 0]
    torch.testing.assert_close(found, (received * 6 / 9).sigmoid(), rtol=0, atol=1e-12)


def test_competition_weights_sum_to_the_number_of_sources() -> None:
    """One-hot values and equal queries: a sink gets gate * K'-share * M * softmax, whose sum over sources is known."""
    q, k, _ = draw(1, 5)
    found = flow_attention(
        q, k, torch.eye(5, dtype=torch.float64)[None, :, None].expand(2, 5, 2, 5), eps=0.0, clamp=None
    )
    a, b = q.sigmoid(), k.sigmoid()
    share = torch.einsum("bnhk,bmhk->bnhm", a, b)
    share = share / share.sum(-1, keepdim=True)
    outgoing = torch.einsum("bmhk,bhk->bmh", b, a.sum(1))
    gate = (torch.einsum("bnhk,bhk->bnh", a, (b / outgoing[..., None]).sum(1)) / 5).sigmoid()
    weights = found / gate[..., None] / share
    torch.testing.assert_close(weights.sum(-1), torch.full((2, 1, 2), 5.0, dtype=torch.float64), rtol=0, atol=1e-11)
    assert float(weights.std(-1).min()) > 1e-3  # and they do differ


def causal_loop(q: Tensor, k: Tensor, v: Tensor, eps: float, clamp: float) -> Tensor:
    """Return the causal result of one head with every sum taken anew at every token, (T, V)."""
    a, b = q.sigmoid(), k.sigmoid()
    incoming, outgoing, weights, out = [], [], [], []
    for t in range(len(q)):
        n = t + 1
        incoming.append((a[t] + eps) @ (b[:n].sum(0) + eps) / n)
        outgoing.append((b[t] + eps) @ (a[:n].sum(0) + eps) / n)
        received = (a[t] + eps) @ (sum(b[j] / outgoing[j] for j in range(n)) + eps) / n
        emitted = ((b[t] + eps) @ (sum(a[j] / incoming[j] for j in range(n)) + eps) / n).clamp(-clamp, clamp)
        weights.append(emitted.exp())
        values = [v[j] * weights[j] / sum(weights[: j + 1]) * (j + 1) for j in range(n)]
        mixed = sum((a[t] @ b[j]) * values[j] for j in range(n)) / (incoming[t] * n)
        out.append(received.sigmoid() * mixed)
    return torch.stack(out)


@pytest.mark.parametrize("form", ["auto", "step", "chunk", "parallel"])
@pytest.mark.parametrize("tokens", [1, 2, 13, 21])
def test_causal_form_equals_a_loop(form: str, tokens: int) -> None:
    q, k, v = draw(tokens, tokens)
    found, _ = causal_flow_attention(q, k, v, form=form)  # type: ignore[arg-type]
    for row in range(2):
        for head in range(2):
            expected = causal_loop(q[row, :, head], k[row, :, head], v[row, :, head], 1e-6, 1.0)
            torch.testing.assert_close(found[row, :, head], expected, rtol=0, atol=1e-11)


def test_last_causal_flows_equal_the_bidirectional_ones() -> None:
    """At the last token all sums are whole, so its incoming flow, the last sink's, is that of the full form."""
    q, k, _ = draw(6, 6)
    state = causal_flow_attention(q, k, q)[1]
    torch.testing.assert_close(state["sources"], k.sigmoid().sum(1))
    torch.testing.assert_close(state["sinks"], q.sigmoid().sum(1))
    assert state["count"].tolist() == [6.0, 6.0]


def test_float32_statistics_keep_counting_in_bfloat16() -> None:
    mixer = FlowAttention(8, num_heads=2).bfloat16()
    state = mixer.prefill(torch.randn(1, 700, 8, dtype=torch.bfloat16))[1]
    assert {value.dtype for value in state.values()} == {torch.float32}
    assert float(state["count"]) == 700.0


def test_bidirectional_mixer_does_not_know_the_order() -> None:
    torch.manual_seed(0)
    mixer = BidirectionalFlowAttention(8, num_heads=2).double()
    x, order = torch.randn(2, 30, 8, dtype=torch.float64), torch.randperm(30)
    torch.testing.assert_close(mixer(x[:, order]), mixer(x)[:, order], rtol=0, atol=1e-12)
    assert not mixer.causal
    ends = torch.tensor([0, 4, 9])
    packed = mixer.packed(x[:1, :9], ends)
    torch.testing.assert_close(packed[:, 4:], mixer(x[:1, 4:9]), rtol=0, atol=1e-12)


def test_gradients_of_both_forms() -> None:
    q, k, v = (t[:1].clone().requires_grad_() for t in draw(4, 4))
    assert torch.autograd.gradcheck(lambda q, k, v: flow_attention(q, k, v, clamp=None), (q, k, v))
    assert torch.autograd.gradcheck(lambda q, k, v: causal_flow_attention(q, k, v, clamp=None)[0], (q, k, v))
