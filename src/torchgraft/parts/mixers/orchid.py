"""A convolution over the whole sequence whose kernel is computed from the sequence, between two gates.

`Orchid: Flexible and Data-Dependent Convolution for Sequence Modeling <https://arxiv.org/abs/2402.18508>`_ (Karami and
Ghodsi, 2024): z = x0 (h(v) * (x1 v)) + r * u with x0, x1, v short convolutions of linear maps of u, h = static +
adaptive kernel and F h the spectrum |F(conv v)|^2 convolved along frequency ("abs-freq"), or conj(F k) F q / T
("cross-corr").

Departures: short convolutions are centred and wrap around, which makes the layer shift-equivariant as the paper proves
(its code pads with zeros); the conditioning network has one layer and reads v before the short convolution, as in the
code; no DCT. The kernel sees the whole sequence, so with an adaptive kernel the mixer is bidirectional, and ``causal``
is refused: zeros beyond the end would make the convolution causal and leave the kernel all-seeing.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from torchgraft.catalogue import Card, Claim
from torchgraft.engines.longconv import fft_conv, fft_filter
from torchgraft.engines.recurrence.mixer import Mixer
from torchgraft.errors import BadInput, nearest

__all__ = ["CARD", "Conditioning", "OrchidMixer", "StaticKernel", "short_conv"]

CARD = Card(
    key="orchid",
    title="Orchid: convolution with a kernel computed from the input",
    seed_id=17,
    authors="Karami and Ghodsi, 2024",
    reference="https://arxiv.org/abs/2402.18508",
    family="parts/mixers",
    kind="part",
    engine=("longconv",),
    equation="y = W (x0 . (h(v) * (x1 . v)) + r * u),  h^F(v) = static^F + conv_f(|F(conv_t v)|^2) or conj(k^F) . q^F",
    entry="OrchidMixer",
    capabilities=frozenset({"linear-time"}),
    declared={
        "parameters": "d_model*(4*d_model + 4) + 3*d_model*(short + 1) + d_model*(short + 3) + 2*d_model*(short + 1)"
        " + 2*(7*filter_width + 2*filter_width*(filter_width + 1) + filter_width*d_model + d_model)"
    },
    example={"d_model": 8, "max_len": 32, "filter_width": 6},
    shapes=((2, 12, 8),),
    oracles=(
        "a rolled input gives the rolled output, and its adaptive kernel does not change",
        "the FFT path equals the direct circular convolution",
        "the cross-corr kernel is the circular cross-correlation of k and q computed directly",
        "with the adaptive kernel at zero it is the order-2 Hyena operator",
    ),
    claim=Claim(
        text="Associative recall (20 symbols, 64 tokens, the answer at the last one), width 64, two blocks: Orchid "
        "beside the same block with the static kernel alone (Hyena) and softmax attention; and its time by length.",
        figure="accuracy >= static + 10 points, or 95 % in half the steps of static; time exponent < 1.3, 256 to 4096",
    ),
    choose_when="whole sequences at once (classification, masked models) where the mixing should depend on the input; "
    "the mixer is bidirectional: every output sees every token",
    choose_instead="any causal mixer (gla, gated-deltanet, tcnca) for generation: Orchid's kernel leaks the future",
    bibtex="""@inproceedings{karami2024orchid,
  title={Orchid: Flexible and Data-Dependent Convolution for Sequence Modeling},
  author={Karami, Mahdi and Ghodsi, Ali},
  booktitle={Advances in Neural Information Processing Systems},
  year={2024}
}""",
)

_CONDITIONING = ("abs-freq", "cross-corr", "none")


def short_conv(x: Tensor, weight: Tensor, bias: Tensor, *, causal: bool = False) -> Tensor:
    """Weigh each channel's few neighbouring tokens, around the present one and past the ends, or before it.

    Shapes:
        x: (B, T, C); weight: (C, taps); bias: (C,) -> (B, T, C).

    Example:
        >>> x, weight = torch.tensor([[[1.0], [2.0], [4.0]]]), torch.tensor([[1.0, 0.0, 10.0]])
        >>> short_conv(x, weight, torch.zeros(1)).flatten().tolist()
        [42.0, 14.0, 21.0]
    """
    tokens, taps = x.shape[1], weight.shape[-1]
    weight, y = weight.to(x.dtype), bias.to(x.dtype).expand_as(x)
    for tap in range(taps):
        if causal:  # tap 0 is the present token
            shifted = torch.cat([torch.zeros_like(x[:, :tap]), x[:, : max(tokens - tap, 0)]], dim=1)[:, :tokens]
        else:
            shifted = x.roll(tap - (taps - 1) // 2, dims=1)
        y = y + shifted * weight[:, tap]
    return y


class _Short(nn.Module):
    """The weights of a short convolution."""

    def __init__(self, channels: int, taps: int, *, causal: bool = False) -> None:
        super().__init__()
        self.causal = causal
        self.weight = nn.Parameter(torch.empty(channels, taps).uniform_(-(taps**-0.5), taps**-0.5))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return short_conv(x, self.weight, self.bias, causal=self.causal)


class StaticKernel(nn.Module):
    """Hyena's implicit kernel: a network of sines over the position, times a decay of each channel's own.

    Args:
        channels: C.
        max_len: the length over which positions run from 0 to 1; longer kernels go on beyond.
        width: of the network.

    Shapes:
        length -> (length, C); ``skip``, (C,), weighs the token itself beside the kernel.
    """

    decay: Tensor

    def __init__(self, channels: int, max_len: int, width: int = 64) -> None:
        super().__init__()
        self.max_len = max_len
        self.layers = nn.ModuleList([nn.Linear(5, width), nn.Linear(width, width), nn.Linear(width, width)])
        self.frequency = nn.Parameter(torch.ones(width))
        self.out = nn.Linear(width, channels, bias=False)
        self.skip = nn.Parameter(torch.randn(channels))
        # after 0.3 (the last channel) to 1.5 (the first) lengths, 1 % is left
        self.register_buffer("decay", math.log(1e-2) / torch.linspace(1.5, 0.3, channels), persistent=False)

    def forward(self, length: int) -> Tensor:
        """Return the first ``length`` taps."""
        wide = torch.promote_types(self.skip.dtype, torch.float32)
        place = torch.arange(length, device=self.skip.device, dtype=wide) / self.max_len
        angle = 2 * math.pi * place[:, None] * torch.arange(1, 3, device=place.device, dtype=wide)
        h = torch.cat([place[:, None], angle.cos(), angle.sin()], dim=-1).to(self.skip.dtype)  # (L, 5)
        for layer in self.layers:
            h = torch.sin(self.frequency * layer(h))
        taps: Tensor = self.out(h)
        return taps.to(wide) * (place[:, None] * self.decay.to(wide)).exp()


class Conditioning(nn.Module):
    """From the input to the spectrum of its own kernel, which does not change when the input is rolled.

    Args:
        channels: C.
        kind: ``"abs-freq"`` or ``"cross-corr"``.
        taps: of the short convolutions in time and along frequency.

    Shapes:
        v: (B, T, C) -> (B, T // 2 + 1, C), complex.
    """

    def __init__(self, channels: int, kind: str, taps: int = 3) -> None:
        super().__init__()
        self.kind = kind
        self.time = _Short(channels, taps)
        self.norm = nn.LayerNorm(channels)
        # abs-freq: the real and the imaginary part of the spectrum; cross-corr: q's convolution in time
        self.second = _Short(2 * channels if kind == "abs-freq" else channels, taps)
        self.second_norm = nn.Identity() if kind == "abs-freq" else nn.LayerNorm(channels)

    def forward(self, v: Tensor) -> Tensor:
        """Return the spectrum of the adaptive kernel."""
        tokens = v.shape[1]
        k = self._spectrum(self.norm(self.time(v)))
        if self.kind == "cross-corr":
            return k.conj() * self._spectrum(self.second_norm(self.second(v)))
        power = k.real.square() + k.imag.square()  # (B, F, C)
        mirrored = torch.cat([power, power[:, 1 : (tokens + 1) // 2].flip(1)], dim=1)  # all T frequencies
        both = self.second(mirrored.repeat(1, 1, 2))[:, : tokens // 2 + 1]
        real, imag = both.chunk(2, dim=-1)
        return torch.complex(real, imag)

    @staticmethod
    def _spectrum(x: Tensor) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        if x.numel() == 0:
            return torch.complex(wide, torch.zeros_like(wide))[:, : x.shape[1] // 2 + 1]
        spectrum: Tensor = torch.fft.rfft(wide, dim=1, norm="ortho")
        return spectrum


class OrchidMixer(Mixer):
    """Gate, convolve with a kernel that the input decides, gate; bidirectional unless the kernel is static.

    Args:
        d_model: width D.
        max_len: the length over which the static kernels' positions run; longer inputs are taken too.
        conditioning: how the kernel comes from the input, ``"abs-freq"`` or ``"cross-corr"``; ``"none"`` leaves the
            static kernel alone, which is Hyena of order 2.
        short: taps of the short convolutions.
        static_kernel: whether a static kernel is added to the adaptive one.
        residual: whether a static convolution of the input is added to the output of the gates.
        filter_width: width of the networks that give the static kernels.
        causal: whether outputs see earlier tokens only; possible with ``conditioning="none"`` alone.

    Shapes:
        (B, T, D) -> (B, T, D).

    Example:
        >>> mixer = OrchidMixer(8, max_len=32)
        >>> mixer(torch.randn(2, 12, 8)).shape, mixer.causal
        (torch.Size([2, 12, 8]), False)

    Raises:
        BadInput: an argument is out of range, or ``causal`` is asked of a kernel that sees the whole input.
    """

    causal = False

    def __init__(
        self,
        d_model: int,
        *,
        max_len: int = 1024,
        conditioning: Literal["abs-freq", "cross-corr", "none"] = "abs-freq",
        short: int = 3,
        static_kernel: bool = True,
        residual: bool = True,
        filter_width: int = 64,
        causal: bool = False,
    ) -> None:
        super().__init__(d_model)
        if conditioning not in _CONDITIONING:
            raise BadInput(f"conditioning is {conditioning!r}{nearest(str(conditioning), list(_CONDITIONING))}")
        if min(max_len, short, filter_width) < 1:
            raise BadInput(
                f"max_len, short and filter_width must be at least 1, got {max_len}, {short} and {filter_width}"
            )
        if causal and conditioning != "none":
            raise BadInput(
                "causal=True needs conditioning='none': an adaptive kernel is computed from the whole sequence, "
                f"got {conditioning!r}"
            )
        if conditioning == "none" and not static_kernel:
            raise BadInput("conditioning='none' needs static_kernel=True: there is no kernel otherwise")
        self.causal, self.conditioning = causal, conditioning
        self.inner = nn.Linear(d_model, 3 * d_model)
        self.short = _Short(3 * d_model, short, causal=causal)
        self.adaptive = None if conditioning == "none" else Conditioning(d_model, conditioning, short)
        self.static = StaticKernel(d_model, max_len, filter_width) if static_kernel else None
        self.residual = StaticKernel(d_model, max_len, filter_width) if residual else None
        self.out = nn.Linear(d_model, d_model)

    def forward(self, x: Tensor) -> Tensor:
        """Mix ``x``, (B, T, D) -> (B, T, D)."""
        tokens = self.checked(x).shape[1]
        inner = self.inner(x)
        x0, x1, v = self.short(inner).chunk(3, dim=-1)
        gated = x1 * v
        y = torch.zeros_like(gated)
        if self.static is not None:
            y = y + fft_conv(gated, self.static(tokens), causal=self.causal) + gated * self.static.skip
        if self.adaptive is not None:
            y = y + fft_filter(gated, self.adaptive(inner[..., 2 * self.d_model :])).to(gated.dtype)
        y = x0 * y
        if self.residual is not None:
            y = y + fft_conv(x, self.residual(tokens), causal=self.causal) + x * self.residual.skip
        out: Tensor = self.out(y.to(self.out.weight.dtype))
        return out
