"""Run small one-dimensional networks on integers alone: products, sums and shifts, with every rescale declared.

`PulseDL-II: A System-on-Chip Neural Network Accelerator for Timing and Energy Extraction of Nuclear Detector Signals
<https://arxiv.org/abs/2209.00884>`_ (Ai et al., 2023).

    acc = sum q_x q_w + q_b, q_b = round(b / (s_x s_w));  q_y = clip((acc m + 2^(k-1)) >> k), m 2^-k ~ s_x s_w / s_y

Activations and weights have b bits, sums 32, m 15; ReLU is a clip at 0. The last layer gives its sums, which one
declared scale turns into numbers. Integers are executed as torch's 64-bit integers: the numbers are those of the
hardware, the speed is not. It is no lever of ``fit``: it takes chains of layers without branches, and where it does,
``int8-dynamic`` stores as little and is executed faster.

Departures: bit widths, layer subset and rescale of the chip could not be read; this is the usual integer-only scheme
that its description implies, with unsigned codes behind a ReLU. Activation scales are the largest magnitudes on
calibration samples and stay fixed in fine-tuning. The input may have more bits than the layers, as converters have.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from torchgraft.catalogue import Card
from torchgraft.catalogue.card import Claim
from torchgraft.engines.quantize.integers import (
    FakeQuantNet,
    IntegerLayer,
    IntegerNet,
    fake_quantize,
    fixed_point,
    rescale,
    to_integer,
)
from torchgraft.errors import BadInput

__all__ = [
    "CARD",
    "FakeQuantNet",
    "IntegerLayer",
    "IntegerNet",
    "PulseRegressor1d",
    "constant_fraction",
    "fake_quantize",
    "fixed_point",
    "pulses",
    "rescale",
    "to_integer",
]

CARD = Card(
    key="pulsedl-int",
    title="PulseDL-II: integer-only networks for timing and energy of detector pulses",
    seed_id=125,
    authors="Ai et al., 2023",
    reference="https://arxiv.org/abs/2209.00884",
    family="shrink/quantize",
    kind="tool",
    engine=("surgery", "parametrize"),
    equation="acc = sum q_x q_w + q_b; q_y = clip((acc m + 2^(k-1)) >> k), m 2^-k = s_x s_w / s_y",
    entry="to_integer",
    oracles=(
        "fed with the same integers, every integer layer equals the fake-quantised one within 1; runs repeat bit for "
        "bit, and nothing but integers stands between the first rounding and the last scale",
        "|x - s q| <= s / 2 inside the range",
        "no sum can leave acc_bits: the bound is asserted for every layer, reached by the worst input, and refused "
        "beyond",
        "m 2^-k equals the ratio of the scales to a relative 2^-15; the shift rounds half up as written",
        "integer convolutions, also transposed and strided, equal torch's in float64",
    ),
    claim=Claim(
        text="20k synthetic pulses, convolutional net of < 10k parameters, 3 seeds, 47 and 30 dB: int8 (12-bit input) "
        "after quantisation-aware fine-tuning, executed on integers, against float32 and against constant-fraction "
        "discrimination with linear interpolation (best fraction, offset calibrated).",
        figure="47 dB: int8 time resolution within 10 % of float32, energy resolution within 10 %; 30 dB: int8 time "
        "resolution >= 1.5 times better than constant fraction",
    ),
    choose_when="A small net must run where only integers are: a gate array, a microcontroller, a detector's front "
    "end.",
    choose_instead="int8-dynamic for models on an ordinary processor; this covers Linear, Conv1d, ConvTranspose1d and "
    "ReLU.",
    confidence="low",
    bibtex="@article{ai2023pulsedl, title={PulseDL-II: A System-on-Chip Neural Network Accelerator for Timing and "
    "Energy Extraction of Nuclear Detector Signals}, author={Ai, Pengcheng and Deng, Zhi and Wang, Yi and Gong, Hui "
    "and Ran, Xinchi and Lang, Zijian}, journal={IEEE Transactions on Nuclear Science}, year={2023}}",
)

# Pulses ---------------------------------------------------------------------------------------------------------------


class PulseRegressor1d(nn.Sequential):
    """Strided convolutions, then linear layers: time and energy of a pulse.

    Args:
        channels: of the convolutions, each of stride 2.
        samples: length of a pulse.
        hidden: width of the linear layer between.

    Shapes:
        (B, 1, samples) -> (B, 2): time and energy, in the units that it is trained on

    Example:
        >>> PulseRegressor1d()(torch.zeros(3, 1, 64)).shape
        torch.Size([3, 2])
    """

    def __init__(self, channels: tuple[int, ...] = (8, 16, 16), *, samples: int = 64, hidden: int = 32) -> None:
        if not channels or min(channels) < 1 or samples < 2 ** len(channels):
            raise BadInput(f"channels must be positive and halve {samples} samples each, got {channels}")
        layers: list[nn.Module] = []
        width, length = 1, samples
        for count in channels:
            layers += [nn.Conv1d(width, count, 5, stride=2, padding=2), nn.ReLU()]
            width, length = count, (length - 1) // 2 + 1
        layers += [nn.Flatten(), nn.Linear(width * length, hidden), nn.ReLU(), nn.Linear(hidden, 2)]
        super().__init__(*layers)


def pulses(
    count: int, *, snr_db: float = 47.0, samples: int = 64, tau: float = 16.0, jitter: float = 2.0, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Return pulses s(t) = A (t - t0) / tau exp(1 - (t - t0) / tau) for t > t0 under white noise, with t0 and A.

    t0 is uniform in the ``jitter`` samples that follow the first eighth of the record, as a trigger leaves it, A in
    [0.5, 1]; the ratio of signal to noise is that of A = 1 to sigma.

    Shapes:
        (count, 1, samples), (count, 2)

    Raises:
        BadInput: a setting is not positive.
    """
    if count < 1 or samples < 16 or not tau > 0 or not 0 <= jitter <= samples / 2:
        raise BadInput(
            f"pulses need count >= 1, samples >= 16, tau > 0 and jitter in [0, samples / 2], got {count}, {samples}, "
            f"{tau} and {jitter}"
        )
    draw = torch.Generator().manual_seed(seed)
    start = samples / 8 + jitter * torch.rand(count, 1, generator=draw)
    height = 0.5 + 0.5 * torch.rand(count, 1, generator=draw)
    late = ((torch.arange(samples) - start) / tau).clamp(min=0)
    noise = 10 ** (-snr_db / 20) * torch.randn(count, samples, generator=draw)
    return (height * late * (1 - late).exp() + noise)[:, None], torch.cat([start, height], 1)


def constant_fraction(x: Tensor, fraction: float) -> Tensor:
    """Return when each pulse first crosses ``fraction`` of its largest sample, interpolated linearly.

    Shapes:
        (B, 1, L) -> (B,)

    Example:
        >>> constant_fraction(torch.tensor([[[0.0, 1.0, 3.0, 4.0, 1.0]]]), 0.5)
        tensor([1.5000])
    """
    signal = x[:, 0]
    level = fraction * signal.amax(1, keepdim=True)
    # the last sample below the level before the top: noise on the flat part is passed over
    places = torch.arange(signal.shape[1], device=x.device)
    rising = (signal < level) & (places < signal.argmax(1, keepdim=True))
    before = torch.where(rising, places, 0).amax(1, keepdim=True)
    low, high = signal.gather(1, before), signal.gather(1, before + 1)
    return (before + (level - low) / (high - low).clamp(min=1e-9)).squeeze(1)
