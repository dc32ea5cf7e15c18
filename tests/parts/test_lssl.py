"""LSSL: gates as a special case, every setting in every form, resampling, and the structured A."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from torchgraft.engines.recurrence.state_space import discretise, hippo
from torchgraft.errors import BadInput
from torchgraft.parts.mixers.lssl import LSSL

F64 = torch.float64


def _by_hand(mixer: LSSL, u: torch.Tensor) -> torch.Tensor:
    """Return the layer's output by x_t = Abar x_{t-1} + Bbar u_t, channel by channel."""
    A, B = hippo(mixer.measure, mixer.d_state, seed=mixer.seed)
    y = torch.zeros(*u.shape, mixer.outputs, dtype=F64)
    for d in range(mixer.d_model):
        Abar, Bbar = discretise(A, B, mixer.log_dt[d].exp(), method=mixer.method, alpha=mixer.alpha)
        for b in range(len(u)):
            x = torch.zeros(mixer.d_state, dtype=F64)
            for t in range(u.shape[1]):
                x = Abar @ x + Bbar * u[b, t, d]
                y[b, t, d] = mixer.C[d] @ x + mixer.D[d] * u[b, t, d]
    return F.linear(F.gelu(y.flatten(-2)), mixer.out.weight, mixer.out.bias)


@pytest.mark.parametrize("measure", ["legs", "legt", "random"])
@pytest.mark.parametrize(("method", "alpha"), [("gbt", 0.0), ("gbt", 0.3), ("gbt", 0.5), ("gbt", 1.0), ("zoh", 0.5)])
def test_every_form_is_the_recurrence_by_hand(measure: str, method: str, alpha: float) -> None:
    mixer = LSSL(3, d_state=5, outputs=2, measure=measure, method=method, alpha=alpha, seed=1).double()  # type: ignore[arg-type]
    u = torch.randn(2, 37, 3, dtype=F64)
    with torch.no_grad():
        want = _by_hand(mixer, u)
        for form in ("auto", "step", "chunk", "parallel"):
            mixer.form = form  # type: ignore[assignment]
            torch.testing.assert_close(mixer(u), want, rtol=0, atol=1e-8)
            y, state = mixer.prefill(u[:, :20])
            rest, _ = mixer.prefill(u[:, 20:36], state)
            last, _ = mixer.step(u[:, 36], _)
            torch.testing.assert_close(torch.cat([y, rest, last[:, None]], 1), want, rtol=0, atol=1e-8)


def test_one_channel_with_a_of_minus_one_is_a_gate() -> None:
    """legs of size 1 is A = -1, B = 1: backward Euler with dt = e^z leaves 1 - sigmoid(z) and takes sigmoid(z)."""
    mixer = LSSL(4, d_state=1, alpha=1.0, learn_dt=True).double()
    z = torch.tensor([-3.0, -0.5, 0.0, 2.0], dtype=F64)
    with torch.no_grad():
        mixer.log_dt.copy_(z)
        u, state = torch.randn(2, 4, dtype=F64), {"x": torch.randn(2, 4, 1, dtype=F64)}
        after = mixer.step(u, state)[1]["x"][..., 0]
    want = (1 - z.sigmoid()) * state["x"][..., 0] + z.sigmoid() * u
    torch.testing.assert_close(after, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("measure", ["legs", "legt"])
def test_the_structured_layer_begins_as_the_fixed_one(measure: str) -> None:
    torch.manual_seed(0)
    fixed = LSSL(3, d_state=6, measure=measure).double()  # type: ignore[arg-type]
    learned = LSSL(3, d_state=6, measure=measure, learn_A=True, learn_dt=True).double()  # type: ignore[arg-type]
    learned.load_state_dict(fixed.state_dict(), strict=False)
    u = torch.randn(2, 50, 3, dtype=F64)
    torch.testing.assert_close(learned(u), fixed(u), rtol=0, atol=1e-4)  # its parameters were made in float32
    learned(u).square().sum().backward()
    for name in ("structure", "log_dt"):
        grad = dict(learned.named_parameters())[name].grad
        assert grad is not None
        assert float(grad.abs().max()) > 0
    y, state = learned.prefill(u[:, :21])
    torch.testing.assert_close(torch.cat([y, learned.prefill(u[:, 21:], state)[0]], 1), learned(u), rtol=0, atol=1e-9)


def test_resampling_follows_a_signal_at_half_the_rate() -> None:
    """A smooth input at every second point, with dt doubled, gives nearly the same outputs at those points."""
    torch.manual_seed(0)
    mixer = LSSL(2, d_state=8, dt_min=2e-3, dt_max=1e-2).double()
    time = torch.linspace(0, 1, 801, dtype=F64)
    u = torch.stack([(6 * time).sin() ** 2, 1 - (4 * time).cos()], dim=-1)[None]
    with torch.no_grad():
        fine = mixer(u)[:, ::2]
        dull = mixer(u[:, ::2])
        coarse = mixer.resample_(2.0)(u[:, ::2])
    assert float((coarse - fine).abs().max()) < 0.02 * float(fine.std())
    assert float((dull - fine).norm()) > 10 * float((coarse - fine).norm())


def test_long_float32_inputs_stay_finite_and_close() -> None:
    torch.manual_seed(0)
    mixer = LSSL(4, d_state=32)
    u = torch.randn(1, 5000, 4)
    with torch.no_grad():
        single, double = mixer(u), LSSL.forward(mixer.double(), u.double())
    assert float((single - double).abs().max()) < 1e-3 * float(double.abs().max())


def test_refusals() -> None:
    with pytest.raises(BadInput, match="structured"):
        LSSL(4, measure="random", learn_A=True)
    with pytest.raises(BadInput, match="alpha"):
        LSSL(4, alpha=2.0)
    with pytest.raises(BadInput, match="dt"):
        LSSL(4, dt_min=0.1, dt_max=0.01)
    with pytest.raises(BadInput, match="state must hold x"):
        LSSL(4, d_state=8).step(torch.zeros(2, 4), {"x": torch.zeros(2, 4, 9)})
