"""Orchid: equivariance to rolling, kernels against direct sums, and Hyena as the case without conditioning."""

from __future__ import annotations

import math

import pytest
import torch

from torchgraft.engines.longconv import direct_conv
from torchgraft.errors import BadInput
from torchgraft.parts.mixers.orchid import OrchidMixer, short_conv

F64 = torch.float64
KINDS = pytest.mark.parametrize("kind", ["abs-freq", "cross-corr"])


def _mixer(kind: str, **settings: object) -> OrchidMixer:
    torch.manual_seed(0)
    mixer = OrchidMixer(4, max_len=16, filter_width=6, conditioning=kind, **settings).double()  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return mixer


@KINDS
@pytest.mark.parametrize("tokens", [1, 2, 8, 13])
@pytest.mark.parametrize("static", [True, False])
def test_a_rolled_input_gives_the_rolled_output_by_the_same_kernel(kind: str, tokens: int, static: bool) -> None:
    mixer = _mixer(kind, static_kernel=static)
    x, v = torch.randn(2, tokens, 4, dtype=F64), torch.randn(2, tokens, 4, dtype=F64)
    assert mixer.adaptive is not None
    for shift in (1, 5):
        torch.testing.assert_close(mixer(x.roll(shift, 1)), mixer(x).roll(shift, 1), rtol=0, atol=1e-10)
        torch.testing.assert_close(mixer.adaptive(v.roll(shift, 1)), mixer.adaptive(v), rtol=0, atol=1e-10)


@KINDS
@pytest.mark.parametrize("tokens", [7, 12])
def test_the_layer_is_the_chain_with_direct_convolutions(kind: str, tokens: int) -> None:
    mixer = _mixer(kind)
    assert mixer.adaptive is not None
    assert mixer.static is not None
    assert mixer.residual is not None
    x = torch.randn(2, tokens, 4, dtype=F64)
    inner = x @ mixer.inner.weight.T + mixer.inner.bias
    x0, x1, v = short_conv(inner, mixer.short.weight, mixer.short.bias).split(4, dim=-1)
    adaptive = torch.fft.irfft(mixer.adaptive(inner[..., 8:]), tokens, dim=1)  # (B, T, C) taps in time
    y = direct_conv(x1 * v, mixer.static(tokens) + adaptive, causal=False) + x1 * v * mixer.static.skip
    y = x0 * y + direct_conv(x, mixer.residual(tokens), causal=False) + x * mixer.residual.skip
    torch.testing.assert_close(mixer(x), y @ mixer.out.weight.T + mixer.out.bias, rtol=0, atol=1e-11)


def test_cross_corr_is_the_correlation_of_k_and_q() -> None:
    mixer = _mixer("cross-corr")
    net, tokens = mixer.adaptive, 9
    assert net is not None
    v = torch.randn(2, tokens, 4, dtype=F64)
    k, q = net.norm(net.time(v)), net.second_norm(net.second(v))
    found = torch.fft.irfft(net(v), tokens, dim=1)
    for lag in range(tokens):
        want = sum(k[:, t] * q[:, (t + lag) % tokens] for t in range(tokens)) / tokens
        torch.testing.assert_close(found[:, lag], want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("tokens", [1, 2, 6, 9])
def test_abs_freq_is_the_power_convolved_along_all_frequencies(tokens: int) -> None:
    mixer = _mixer("abs-freq")
    net = mixer.adaptive
    assert net is not None
    v = torch.randn(2, tokens, 4, dtype=F64)
    power = torch.fft.fft(net.norm(net.time(v)), dim=1).abs().square() / tokens
    weight, bias = net.second.weight, net.second.bias  # (8, 3): real parts, then imaginary ones
    found = net(v)
    for f in range(tokens // 2 + 1):
        around = torch.stack([power[:, (f + 1 - tap) % tokens] for tap in range(3)], dim=-1)  # (B, C, 3)
        torch.testing.assert_close(found[:, f].real, (around * weight[:4]).sum(-1) + bias[:4], rtol=0, atol=1e-11)
        torch.testing.assert_close(found[:, f].imag, (around * weight[4:]).sum(-1) + bias[4:], rtol=0, atol=1e-11)


@KINDS
def test_with_the_adaptive_kernel_at_zero_it_is_hyena(kind: str) -> None:
    mixer = _mixer(kind, residual=False)
    hyena = _mixer("none", residual=False)
    hyena.load_state_dict({name: value for name, value in mixer.state_dict().items() if "adaptive" not in name})
    assert mixer.adaptive is not None
    with torch.no_grad():
        for parameter in mixer.adaptive.parameters():
            parameter.zero_()
    x = torch.randn(2, 11, 4, dtype=F64)
    torch.testing.assert_close(mixer(x), hyena(x), rtol=0, atol=1e-12)


def test_hyena_of_order_two_by_its_own_formula_is_causal() -> None:
    mixer = _mixer("none", residual=False, causal=True)
    static = mixer.static
    assert mixer.causal
    assert static is not None
    x = torch.randn(1, 10, 4, dtype=F64)
    inner = x @ mixer.inner.weight.T + mixer.inner.bias
    want = torch.zeros_like(inner)
    for t in range(10):
        for tap in range(min(3, t + 1)):
            want[:, t] += inner[:, t - tap] * mixer.short.weight[:, tap]
    x0, x1, v = (want + mixer.short.bias).split(4, dim=-1)
    place = torch.arange(10, dtype=F64)[:, None] / 16
    h = torch.cat([place] + [wave(2 * math.pi * n * place) for wave in (torch.cos, torch.sin) for n in (1, 2)], dim=1)
    for layer in static.layers:
        h = (static.frequency * layer(h)).sin()
    h = static.out(h) * (place * static.decay).exp()
    y = x0 * (direct_conv(x1 * v, h) + x1 * v * static.skip)
    torch.testing.assert_close(mixer(x), y @ mixer.out.weight.T + mixer.out.bias, rtol=0, atol=1e-11)
    x2 = x.clone()
    x2[:, 6:] += 1
    torch.testing.assert_close(mixer(x2)[:, :6], mixer(x)[:, :6], rtol=0, atol=1e-11)


def test_a_causal_adaptive_kernel_is_refused() -> None:
    for kind in ("abs-freq", "cross-corr"):
        with pytest.raises(BadInput, match="whole sequence"):
            OrchidMixer(4, conditioning=kind, causal=True)  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="did you mean 'abs-freq'"):
        OrchidMixer(4, conditioning="absfreq")  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="no kernel"):
        OrchidMixer(4, conditioning="none", static_kernel=False)
