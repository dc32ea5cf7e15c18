"""Gated linear attention: its gates, its limits, and the equation written out."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from torchgraft.engines.recurrence.heads import merge_heads, split_heads
from torchgraft.engines.recurrence.linear import linear_recurrence
from torchgraft.parts.mixers.gated_linear_attention import GatedLinearAttention, gate


def mixer(**options: float) -> GatedLinearAttention:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return GatedLinearAttention(16, num_heads=2, gate_rank=4, **options).double()  # type: ignore[arg-type]


def tokens(length: int = 40) -> torch.Tensor:
    return torch.randn(2, length, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_equation_written_out() -> None:
    made, x = mixer(), tokens()
    q, k, v = (split_heads(project(x), 2) for project in (made.query, made.key, made.value))
    alpha = split_heads(torch.sigmoid(made.decay(x)) ** (1 / 16), 2)
    state = torch.zeros(2, 2, 4, 8, dtype=torch.float64)
    outputs = []
    for t in range(x.shape[1]):
        state = alpha[:, t, :, :, None] * state + k[:, t, :, :, None] * v[:, t, :, None, :]
        read = torch.einsum("bhkv,bhk->bhv", state, q[:, t]) / 4**0.5
        outputs.append(read / (read.square().mean(-1, keepdim=True) + made.norm.eps).sqrt() * made.norm.weight)
    wanted = made.out(F.silu(made.swish(x)) * merge_heads(torch.stack(outputs, dim=1)))
    torch.testing.assert_close(made(x), wanted)


def test_open_gates_are_linear_attention_and_a_constant_gate_is_retention() -> None:
    made, x = mixer(), tokens()
    for parameter in made.decay[0].parameters():
        parameter.data.zero_()
    q, k, v = (split_heads(project(x), 2) for project in (made.query, made.key, made.value))
    for bias, decay in ((1e4, torch.zeros(2)), (-1.0, gate(torch.tensor(-1.0, dtype=torch.float64), 16.0).expand(2))):
        made.decay[1].bias.data.fill_(bias)
        o = linear_recurrence(q, k, v, log_decay=decay.double(), scale=4**-0.5, form="parallel")
        assert isinstance(o, torch.Tensor)
        torch.testing.assert_close(made(x), made.output(o, x))


def test_gates_of_a_ten_thousandth_over_1024_tokens() -> None:
    made = mixer(tau=1.0).float()
    made.decay[1].bias.data.fill_(-9.2)  # sigmoid is 1e-4
    for form in ("chunk", "step"):
        made.form = form  # type: ignore[assignment]
        y = made(tokens(1024).float())
        assert bool(y.isfinite().all())
        y.sum().backward()
        assert all(bool(p.grad.isfinite().all()) for p in made.parameters() if p.grad is not None)


def test_gate_is_the_logarithm_of_the_root_of_a_sigmoid() -> None:
    logits = torch.linspace(-30, 30, 7, dtype=torch.float64)
    torch.testing.assert_close(gate(logits, 16.0).exp(), torch.sigmoid(logits) ** (1 / 16))
    assert gate(logits.bfloat16(), 16.0).dtype == torch.float32
