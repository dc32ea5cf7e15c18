"""Negative eigenvalues: counting by hand-set weights, what positive ones cannot do, and signs folded into q and k."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from torchgraft.engines.recurrence.linear import householder_recurrence, with_state
from torchgraft.parts.mixers.negative_eigenvalue_rnn import (
    DiagonalEigenvalueRNN,
    NegativeEigenvalueRNN,
    eig_range,
    signed_decay,
)

F64 = torch.float64


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_beta_two_counts_parity_exactly_over_a_hundred_thousand_tokens(dtype: torch.dtype) -> None:
    bits = torch.randint(2, (1, 100_000, 1), generator=torch.Generator().manual_seed(0))
    ones = torch.ones(1, 100_000, 1, 1, dtype=dtype)
    start = torch.ones(1, 1, 1, 1, dtype=dtype)
    out, _ = with_state(ones, ones, torch.zeros_like(ones), beta=2.0 * bits.to(dtype), state=start)
    assert torch.equal(out.flatten(), 1.0 - 2.0 * (bits.flatten().cumsum(0) % 2).to(dtype))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(0, 2**31))
def test_positive_shares_never_flip_a_sign_nor_grow(length: int, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    beta = torch.rand(1, length, 1, generator=draw, dtype=F64)
    ones = torch.ones(1, length, 1, 1, dtype=F64)
    start = torch.ones(1, 1, 1, 1, dtype=F64)  # by steps: chunks leave roundoff of 1e-16 where the state is as small
    path = with_state(ones, ones, 0 * ones, beta=beta, state=start, form="step")[0].flatten()
    assert bool((path >= 0).all())
    assert bool((path.diff() <= 0).all())
    assert float(path[0]) <= 1


@pytest.mark.parametrize("angle", [0.3, 2 * math.pi / 3, 2.0])
def test_two_householders_are_a_rotation(angle: float) -> None:
    turns = torch.tensor([0.0, angle / 2], dtype=F64)
    keys = torch.stack([turns.cos(), turns.sin()], -1).view(1, 1, 2, 1, 2)
    eye = torch.eye(2, dtype=F64)[None, None]
    _, found = householder_recurrence(
        eye[:, :1, :1], keys, keys.new_zeros(1, 1, 2, 1, 2), keys.new_full((1, 1, 2, 1), 2.0), state=eye
    )
    wanted = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]], dtype=F64)
    torch.testing.assert_close(found[0, 0], wanted, rtol=0, atol=1e-12)


def test_rotations_by_a_third_count_modulo_three() -> None:
    length = 3000
    digits = torch.randint(3, (length,), generator=torch.Generator().manual_seed(1))
    normal = digits.to(F64) * math.pi / 3  # half the angle between the two normals of a turn by 2 pi / 3 a unit
    first = torch.zeros_like(normal)
    turns = torch.stack([first, normal], -1)  # (T, N)
    keys = torch.stack([turns.cos(), turns.sin()], -1)[None, :, :, None]  # (1, T, N, 1, 2)
    start = torch.tensor([[1.0], [0.0]], dtype=F64)[None, None]
    beta = keys.new_full((1, length, 2, 1), 2.0)
    reads = []
    for channel in torch.eye(2, dtype=F64):
        q = channel.expand(1, length, 1, 2)
        reads.append(
            householder_recurrence(q, keys, keys.new_zeros(1, length, 2, 1, 1), beta, state=start)[0].flatten()
        )
    phase = torch.atan2(reads[1], reads[0]) / (2 * math.pi / 3)
    wanted = digits.cumsum(0) % 3
    assert torch.equal(phase.round().long() % 3, wanted)
    assert float((phase - phase.round()).abs().max()) < 1e-9


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 3), st.integers(0, 2**31))
def test_the_transition_has_norm_at_most_one(householders: int, seed: int) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        mixer = NegativeEigenvalueRNN(8, num_heads=2, householders=householders).double()
        x = 10 * torch.randn(1, 6, 8, dtype=F64)
        norms = torch.linalg.matrix_norm(mixer.transitions(x).detach(), ord=2)
    assert float(norms.max()) <= 1 + 1e-12


@pytest.mark.parametrize("householders", [1, 2, 3])
def test_transitions_are_what_a_state_goes_through(householders: int) -> None:
    torch.manual_seed(2)
    mixer = NegativeEigenvalueRNN(8, num_heads=2, householders=householders, conv=0, gated=True).double()
    x, state = torch.randn(1, 5, 8, dtype=F64), torch.randn(1, 2, 4, 4, dtype=F64)
    with torch.no_grad():
        written, moved = mixer.prefill(x)[1]["memory"], mixer.prefill(x, {"memory": state})[1]["memory"]
        wanted = state
        for t in range(5):
            wanted = mixer.transitions(x)[:, t] @ wanted
    torch.testing.assert_close(moved - written, wanted, rtol=0, atol=1e-12)


def test_several_steps_a_token_are_written_in_their_order() -> None:
    torch.manual_seed(3)
    mixer = NegativeEigenvalueRNN(6, num_heads=2, householders=2, conv=0).double()
    x = torch.randn(1, 4, 6, dtype=F64)
    k, v = F.silu(x @ mixer.key.weight.T)[0], F.silu(x @ mixer.value.weight.T)[0]
    memory = torch.zeros(2, 3, 3, dtype=F64)
    for t in range(4):
        for step in range(2):
            for head in range(2):
                place = 2 * step + head
                key, value = k[t].view(4, 3)[place], v[t].view(4, 3)[place]
                key = key / key.norm()
                beta = 2 * torch.sigmoid(mixer.beta.weight[place] @ x[0, t])
                memory[head] = memory[head] + beta * torch.outer(key, value - memory[head].T @ key)
    torch.testing.assert_close(mixer.prefill(x)[1]["memory"][0], memory, rtol=0, atol=1e-12)


@pytest.mark.parametrize("positive", [False, True])
def test_folded_signs_equal_the_signed_loop(positive: bool) -> None:
    torch.manual_seed(4)
    mixer = DiagonalEigenvalueRNN(8, num_heads=2, positive=positive).double()
    x, start = 2 * torch.randn(2, 70, 8, dtype=F64), torch.randn(2, 2, 4, 4, dtype=F64)

    def heads(y: Tensor) -> Tensor:
        return y.view(2, 70, 2, 4)

    def loop() -> Tensor:
        delta = F.softplus(x @ mixer.delta.weight.T + mixer.delta.bias)
        s = heads((-delta * mixer.rate.exp()).exp())
        a = s if positive else 2 * s - 1
        q, k, v = (heads(x @ layer.weight.T) for layer in (mixer.query, mixer.key, mixer.value))
        k = heads(delta) * k
        memory, reads = start, []
        for t in range(70):
            memory = a[:, t, ..., None] * memory + k[:, t, ..., None] * v[:, t, :, None]
            reads.append((memory * q[:, t, ..., None]).sum(2) / 2)
        return torch.cat([mixer.output(torch.stack(reads, 1), x).flatten(), memory.flatten()])

    y, state = mixer.prefill(x, {"memory": start})
    found, wanted = torch.cat([y.flatten(), state["memory"].flatten()]), loop()
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-9)
    weight = torch.randn(len(found), dtype=F64)
    parameters = list(mixer.parameters())
    ours, theirs = (torch.autograd.grad((z * weight).sum(), parameters) for z in (found, wanted))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)


@given(st.floats(0, 200))
def test_signed_decay_is_twice_s_less_one(rate: float) -> None:
    log_size, sign = signed_decay(torch.tensor(rate, dtype=F64))
    assert float(log_size) <= 0
    assert float(sign * log_size.exp()) == pytest.approx(2 * math.exp(-rate) - 1, abs=1e-11)


def test_signed_decay_is_sharp_at_both_ends_and_finite_in_the_middle() -> None:
    rate = torch.tensor([1e-9, 30.0, math.log(2.0)], requires_grad=True)
    log_size, sign = signed_decay(rate)
    assert sign.tolist()[:2] == [1.0, -1.0]
    torch.testing.assert_close(log_size[:2].detach(), torch.tensor([-2e-9, -2 * math.exp(-30.0)]), rtol=1e-5, atol=0)
    log_size.sum().backward()  # type: ignore[no-untyped-call]
    assert rate.grad is not None
    assert bool(rate.grad.isfinite().all())
    assert bool(log_size.isfinite().all())


def test_eig_range_tells_signs_and_turns() -> None:
    torch.manual_seed(5)
    x = 5 * torch.randn(2, 20, 8, dtype=F64)
    one = eig_range(NegativeEigenvalueRNN(8, num_heads=2).double(), x)
    twin = eig_range(NegativeEigenvalueRNN(8, num_heads=2, positive=True).double(), x)
    two = eig_range(NegativeEigenvalueRNN(8, num_heads=2, householders=2).double(), x)
    line = eig_range(DiagonalEigenvalueRNN(8, num_heads=2).double(), x)
    assert float(one.least.min()) < -0.1
    assert float(twin.least.min()) >= -1e-12
    assert float(one.turn.max()) < 1e-6
    assert float(two.turn.max()) > 0.1
    assert float(line.least.min()) < -0.1
    assert float(line.turn.max()) == 0
    for found in (one, twin, two, line):
        assert found.least.shape == (2, 20, 2)
        assert float(found.radius.max()) <= 1 + 1e-9
    mixer = NegativeEigenvalueRNN(8, num_heads=2).double()
    beta = 2 * torch.sigmoid(mixer.beta(x)).detach()
    torch.testing.assert_close(eig_range(mixer, x).least, 1 - beta.clamp(min=0), rtol=0, atol=1e-9)
