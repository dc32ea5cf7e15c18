"""Long convolutions against their defining sums, in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchgraft.engines.longconv import DampedEMA, DilatedStack, damped_ema, dilated_conv, direct_conv, fft_conv
from torchgraft.engines.longconv.dilated import receptive_field
from torchgraft.engines.longconv.ema import damped_ema_steps
from torchgraft.engines.longconv.fft import fast_length
from torchgraft.errors import BadInput

F64 = torch.float64


def test_the_direct_sum_is_the_definition() -> None:
    x, k = torch.randn(2, 5, 3, dtype=F64), torch.randn(4, 3, dtype=F64)
    for causal in (True, False):
        y = direct_conv(x, k, causal=causal)
        for b in range(2):
            for t in range(5):
                for c in range(3):
                    terms = [k[lag, c] * x[b, (t - lag) % 5, c] for lag in range(4) if t >= lag or not causal]
                    assert abs(float(y[b, t, c] - sum(terms))) < 1e-12


@settings(max_examples=40, deadline=None)
@given(tokens=st.integers(1, 140), taps=st.integers(1, 200), causal=st.booleans(), own=st.booleans())
def test_fft_is_the_direct_sum_with_its_gradients(tokens: int, taps: int, causal: bool, own: bool) -> None:
    torch.manual_seed(tokens * 1000 + taps)
    taps = taps if causal else min(taps, tokens)
    x = torch.randn(2, tokens, 2, dtype=F64, requires_grad=True)
    kernel = torch.randn(*((2,) if own else ()), taps, 2, dtype=F64, requires_grad=True)
    weight = torch.randn(2, tokens, 2, dtype=F64)
    fast, slow = fft_conv(x, kernel, causal=causal), direct_conv(x, kernel, causal=causal)
    torch.testing.assert_close(fast, slow, rtol=0, atol=1e-11)
    got = torch.autograd.grad((fast * weight).sum(), (x, kernel))
    want = torch.autograd.grad((slow * weight).sum(), (x, kernel))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


def test_bfloat16_is_computed_in_float32() -> None:
    x, kernel = torch.randn(1, 300, 2).bfloat16(), torch.randn(300, 2).bfloat16()
    want = direct_conv(x.double(), kernel.double())
    got = fft_conv(x, kernel)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, want.bfloat16(), rtol=2**-7, atol=1e-3)  # one rounding, at the end


def test_empty_batch_and_wrong_shapes() -> None:
    assert fft_conv(torch.zeros(0, 5, 3), torch.zeros(5, 3)).shape == (0, 5, 3)
    with pytest.raises(BadInput, match="kernel"):
        fft_conv(torch.zeros(1, 5, 3), torch.zeros(5, 4))
    with pytest.raises(BadInput, match="at most T = 5"):
        fft_conv(torch.zeros(1, 5, 3), torch.zeros(6, 3), causal=False)
    with pytest.raises(BadInput, match="batch"):
        fft_conv(torch.zeros(3, 5, 3), torch.zeros(2, 5, 3))


def test_fast_length_is_smooth_and_close() -> None:
    for n in range(1, 2000):
        found = fast_length(n)
        assert n <= found < 2 * n or n == found
        rest = found
        for prime in (2, 3, 5):
            while rest % prime == 0:
                rest //= prime
        assert rest == 1


@settings(max_examples=25, deadline=None)
@given(tokens=st.integers(1, 200), cut=st.integers(0, 200))
def test_ema_by_fft_is_the_recurrence_and_goes_on_anywhere(tokens: int, cut: int) -> None:
    torch.manual_seed(tokens)
    x = torch.randn(2, tokens, 3, dtype=F64)
    update, readout = torch.randn(3, 4, dtype=F64), torch.randn(3, 4, dtype=F64)
    log_decay = -torch.rand(3, 4, dtype=F64) * 3
    state = torch.randn(2, 3, 4, dtype=F64)
    want, last = damped_ema_steps(x, update, log_decay, readout, state=state)
    s, y = state.clone(), []  # the recurrence once more, written out
    for t in range(tokens):
        s = update * x[:, t, :, None] + log_decay.exp() * s
        y.append((s * readout).sum(-1))
    torch.testing.assert_close(want, torch.stack(y, 1), rtol=0, atol=1e-12)
    got, after = damped_ema(x, update, log_decay, readout, state=state)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-10)
    torch.testing.assert_close(after, last, rtol=0, atol=1e-10)
    cut = 1 + cut % tokens
    first, mid = damped_ema(x[:, :cut], update, log_decay, readout, state=state)
    if cut < tokens:
        second, end = damped_ema(x[:, cut:], update, log_decay, readout, state=mid)
        torch.testing.assert_close(torch.cat([first, second], 1), want, rtol=0, atol=1e-10)
        torch.testing.assert_close(end, last, rtol=0, atol=1e-10)


def test_ema_coefficients_are_megas_and_survive_extremes() -> None:
    ema = DampedEMA(3, order=4).double()
    update, log_decay, readout = ema.coefficients()
    alpha, delta = ema.alpha.sigmoid(), ema.delta.sigmoid()
    torch.testing.assert_close(update, alpha * ema.beta)
    torch.testing.assert_close(log_decay.exp(), 1 - alpha * delta)
    torch.testing.assert_close(readout, ema.eta / 2)
    with torch.no_grad():
        ema.alpha.fill_(-60.0)
    assert bool((ema.coefficients()[1] < 0).all())  # 1 - 1e-26 is 1, its logarithm is not 0
    with torch.no_grad():
        ema.alpha.fill_(60.0)
        ema.delta.fill_(60.0)
    y, state = ema.float()(torch.randn(1, 50, 3) * 1e3)
    assert bool(torch.isfinite(y).all())
    assert bool(torch.isfinite(state["ema"]).all())


@settings(max_examples=25, deadline=None)
@given(
    tokens=st.integers(1, 60),
    kernel=st.integers(1, 4),
    dilation=st.integers(1, 7),
    groups=st.sampled_from([None, 1, 2]),
    cut=st.integers(0, 59),
)
def test_dilated_convolution_is_its_sum_and_goes_on(
    tokens: int, kernel: int, dilation: int, groups: int | None, cut: int
) -> None:
    torch.manual_seed(tokens)
    x = torch.randn(2, tokens, 4, dtype=F64)
    shape = (4, kernel) if groups is None else (4, 4 // groups, kernel)
    weight = torch.randn(shape, dtype=F64)
    dense = torch.zeros(4, 4, kernel, dtype=F64)  # the same as a full matrix a tap
    for out in range(4):
        if groups is None:
            dense[out, out] = weight[out]
        else:
            size = 4 // groups
            dense[out, out // size * size : (out // size + 1) * size] = weight[out]
    want = torch.zeros_like(x)
    for t in range(tokens):
        for lag in range(kernel):
            if t >= lag * dilation:
                want[:, t] += x[:, t - lag * dilation] @ dense[:, :, lag].T
    got, state = dilated_conv(x, weight, dilation=dilation, groups=groups or 1)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    cut = 1 + cut % tokens
    first, mid = dilated_conv(x[:, :cut], weight, dilation=dilation, groups=groups or 1)
    if cut == tokens:
        torch.testing.assert_close(mid, state)
        return
    second, end = dilated_conv(x[:, cut:], weight, dilation=dilation, groups=groups or 1, state=mid)
    torch.testing.assert_close(torch.cat([first, second], 1), want, rtol=0, atol=1e-12)
    torch.testing.assert_close(end, state)


def test_tree_dilation_gives_every_lag_one_path() -> None:
    kernel, depth = 3, 3
    stack = DilatedStack(1, kernel=kernel, depth=depth, activation=False, residual=False).double()
    assert stack.receptive_field == kernel**depth
    impulse = torch.zeros(1, 40, 1, dtype=F64)
    impulse[0, 0] = 1
    response = stack(impulse)[0].flatten()
    weights = [weight.detach()[0] for weight in stack.weights]
    for lag in range(40):
        digits = [lag // kernel**layer % kernel for layer in range(depth)]
        want = 0.0
        if lag < kernel**depth:
            want = float(torch.stack([w[j] for w, j in zip(weights, digits, strict=True)]).prod())
        assert abs(float(response[lag].detach()) - want) < 1e-12


@pytest.mark.parametrize(("kernel", "depth", "factor"), [(8, 2, None), (3, 3, 2), (2, 4, 3)])
def test_receptive_field_is_exact(kernel: int, depth: int, factor: int | None) -> None:
    stack = DilatedStack(2, kernel=kernel, depth=depth, factor=factor, activation=False, residual=False).double()
    f = factor or kernel
    reach = 1 + (kernel - 1) * (f**depth - 1) // (f - 1)
    assert stack.receptive_field == reach == receptive_field(kernel, [f**layer for layer in range(depth)])
    x = torch.randn(1, reach + 3, 2, dtype=F64, requires_grad=True)
    (grad,) = torch.autograd.grad(stack(x)[0][0, reach + 1].sum(), x)
    assert float(grad[0, 2].abs().min()) > 0  # lag reach - 1
    assert float(grad[0, :2].abs().max()) == 0  # lag reach and beyond
    assert float(grad[0, reach + 2 :].abs().max()) == 0  # the future


def test_refusals() -> None:
    with pytest.raises(BadInput, match="groups"):
        DilatedStack(4, groups=3)
    with pytest.raises(BadInput, match="state"):
        dilated_conv(torch.zeros(1, 3, 2), torch.zeros(2, 3), state=torch.zeros(1, 1, 2))
    with pytest.raises(BadInput, match="update"):
        damped_ema(torch.zeros(1, 3, 2), torch.zeros(3, 2), torch.zeros(3, 2), torch.zeros(3, 2))
