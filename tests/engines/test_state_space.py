"""State spaces: the memories against their closed forms, discretisation against scipy, kernels against recurrences."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.interpolate import pade
from scipy.linalg import expm
from scipy.special import eval_legendre

from torchgraft.engines.recurrence.state_space import (
    discretise,
    hippo,
    krylov_kernel,
    quasiseparable,
    state_output,
    state_scan,
    state_update,
)
from torchgraft.errors import BadInput

F64 = torch.float64


def test_legs_by_the_papers_formula() -> None:
    A, B = hippo("legs", 5)
    for n in range(5):
        assert abs(float(B[n]) - math.sqrt(2 * n + 1)) < 1e-14
        for k in range(5):
            want = -math.sqrt((2 * n + 1) * (2 * k + 1)) if n > k else -(n + 1) if n == k else 0.0
            assert abs(float(A[n, k]) - want) < 1e-14


def test_legs_remembers_legendre_polynomials_of_exp_minus_age() -> None:
    A, B = hippo("legs", 6)
    for age in (0.0, 0.3, 1.7):
        found = expm(A.numpy() * age) @ B.numpy()
        n = np.arange(6)
        want = math.exp(-age) * np.sqrt(2 * n + 1) * eval_legendre(n, 2 * math.exp(-age) - 1)
        np.testing.assert_allclose(found, want, atol=1e-12)


@pytest.mark.parametrize("size", [2, 3, 5])
def test_legt_delays_by_the_pade_approximant(size: int) -> None:
    """The value of the Legendre expansion at the far end of the window is the input one unit of time ago."""
    A, B = (value.numpy() for value in hippo("legt", size))
    taylor = [(-1) ** i / math.factorial(i) for i in range(2 * size)]
    above, below = pade(taylor, size, size - 1)
    C = np.sqrt(2 * np.arange(size) + 1) * (-1.0) ** np.arange(size)
    for s in (0.3, 1.1, 2.5j, -0.4 + 1j):
        found = C @ np.linalg.solve(s * np.eye(size) - A, B.astype(complex))
        assert abs(found - above(s) / below(s)) < 1e-10


def test_random_is_stable_and_a_function_of_its_seed() -> None:
    A, B = hippo("random", 12, seed=3)
    assert float(torch.linalg.eigvals(A).real.max()) == pytest.approx(-1.0)
    again = hippo("random", 12, seed=3)
    assert torch.equal(A, again[0])
    assert torch.equal(B, again[1])
    assert not torch.equal(A, hippo("random", 12, seed=4)[0])


@pytest.mark.parametrize("measure", ["legs", "legt"])
def test_the_structured_form_gives_the_memory(measure: str) -> None:
    p, d, q, T = quasiseparable(measure, 7)
    assert float((T - T.tril(1).triu(-1)).abs().max()) == 0
    found = p[:, None] * (torch.diag(d) + torch.linalg.inv(T)) * q
    torch.testing.assert_close(found, hippo(measure, 7)[0], rtol=0, atol=1e-9)


def test_backward_euler_of_a_leak_is_a_gate() -> None:
    z = torch.linspace(-8, 8, 33, dtype=F64)
    one = torch.ones(1, dtype=F64)
    Abar, Bbar = discretise(-one[:, None], one, z.exp(), alpha=1.0)
    torch.testing.assert_close(Abar.flatten(), 1 - z.sigmoid(), rtol=0, atol=1e-12)
    torch.testing.assert_close(Bbar.flatten(), z.sigmoid(), rtol=0, atol=1e-12)


def test_zero_order_hold_is_exact_for_held_inputs() -> None:
    A, B = hippo("legs", 4)
    dt = torch.tensor([0.05, 0.7], dtype=F64)
    Abar, Bbar = discretise(A, B, dt, method="zoh")
    for row, step in enumerate(dt.tolist()):
        power = expm(A.numpy() * step)
        np.testing.assert_allclose(Abar[row].numpy(), power, atol=1e-12)
        held = np.linalg.solve(A.numpy(), (power - np.eye(4)) @ B.numpy())
        np.testing.assert_allclose(Bbar[row].numpy(), held, atol=1e-12)


@pytest.mark.parametrize(("alpha", "order"), [(0.5, 2), (0.0, 1), (1.0, 1)])
def test_order_of_convergence(alpha: float, order: int) -> None:
    """Under a constant input the end point at t = 1 comes closer as dt^order."""
    A, B = hippo("legs", 4)
    exact = np.linalg.solve(A.numpy(), (expm(A.numpy()) - np.eye(4)) @ B.numpy())
    steps, errors = [32, 64, 128, 256], []
    for count in steps:
        Abar, Bbar = discretise(A, B, torch.tensor(1 / count, dtype=F64), alpha=alpha)
        x = torch.zeros(4, dtype=F64)
        for _ in range(count):
            x = Abar @ x + Bbar
        errors.append(float(np.linalg.norm(x.numpy() - exact)))
    slope = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert abs(slope - order) < 0.15


@settings(max_examples=30, deadline=None)
@given(length=st.integers(1, 300), alpha=st.sampled_from([0.0, 0.25, 0.5, 1.0]), size=st.integers(1, 6))
def test_convolution_is_the_recurrence_from_any_state(length: int, alpha: float, size: int) -> None:
    torch.manual_seed(length)
    A, B = hippo("legs", size)
    dt = torch.tensor([0.01, 0.07, 0.2], dtype=F64)
    C = torch.randn(3, 2, size, dtype=F64)
    u, x0 = torch.randn(2, length, 3, dtype=F64), torch.randn(2, 3, size, dtype=F64)
    Abar, Bbar = discretise(A, B, dt, alpha=alpha)
    x, y, updated = x0, [], x0
    for t in range(length):
        x = torch.einsum("dnm,bdm->bdn", Abar, x) + Bbar * u[:, t, :, None]
        y.append(torch.einsum("dmn,bdn->bdm", C, x))
        updated = state_update(A, B, dt, updated, u[:, t], alpha=alpha)
    want = torch.stack(y, 1)  # (B, L, D, M)
    kernel = krylov_kernel(Abar, Bbar, C, length)  # (D, M, L)
    got = state_output(Abar, C, x0, length)
    for t in range(length):
        got[:, t] += torch.einsum("bsd,dms->bdm", u[:, : t + 1].flip(1), kernel[..., : t + 1])
    torch.testing.assert_close(got, want, rtol=0, atol=1e-8)
    torch.testing.assert_close(state_scan(Abar, Bbar, u, x0), x, rtol=0, atol=1e-9)
    torch.testing.assert_close(updated, x, rtol=0, atol=1e-9)
    zero = state_scan(Abar, Bbar, u, torch.zeros_like(x0))
    torch.testing.assert_close(state_scan(Abar, Bbar, u), zero, rtol=0, atol=1e-12)


def test_gradients_of_the_kernel() -> None:
    A, B = hippo("legs", 3)
    A, B = (0.2 * A).requires_grad_(), B.requires_grad_()
    C, dt = torch.randn(2, 1, 3, dtype=F64, requires_grad=True), torch.rand(2, dtype=F64, requires_grad=True)
    for method in ("gbt", "zoh"):

        def kernel(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, d: torch.Tensor, how: str = method) -> object:
            return krylov_kernel(*discretise(a, b, d, method=how), c, 7)

        assert torch.autograd.gradcheck(kernel, (A, B, C, dt))


def test_refusals() -> None:
    A, B = hippo("legs", 3)
    with pytest.raises(BadInput, match="measure"):
        hippo("fourier", 3)
    with pytest.raises(BadInput, match="alpha"):
        discretise(A, B, torch.tensor(0.1).double(), alpha=1.5)
    with pytest.raises(BadInput, match="method"):
        discretise(A, B, torch.tensor(0.1).double(), method="rk4")
    with pytest.raises(BadInput, match="length"):
        krylov_kernel(A, B, B[None], 0)
    with pytest.raises(BadInput, match="structured"):
        quasiseparable("random", 3)
