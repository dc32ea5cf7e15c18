"""Long convolutions: by the FFT, causal or circular; as damped exponential moving averages; by dilation."""

from torchgraft.engines.longconv.dilated import DilatedStack, dilated_conv, receptive_field
from torchgraft.engines.longconv.ema import DampedEMA, damped_ema
from torchgraft.engines.longconv.fft import direct_conv, fft_conv, fft_filter

__all__ = [
    "DampedEMA",
    "DilatedStack",
    "damped_ema",
    "dilated_conv",
    "direct_conv",
    "fft_conv",
    "fft_filter",
    "receptive_field",
]
