"""Causal convolutions with gaps between the taps, and stacks of them whose reach grows as a power of the depth."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft.errors import BadInput

__all__ = ["DilatedStack", "dilated_conv", "receptive_field"]


def receptive_field(kernel: int, dilations: list[int]) -> int:
    """Return how many tokens, the present one included, a stack of causal convolutions sees.

    Args:
        kernel: taps of every layer.
        dilations: gap between the taps of each layer.

    Example:
        >>> receptive_field(2, [1, 2, 4]), receptive_field(8, [1, 8, 64])
        (8, 512)
    """
    return 1 + (kernel - 1) * sum(dilations)


def dilated_conv(
    x: Tensor, weight: Tensor, *, dilation: int = 1, groups: int = 1, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return y_t = sum_j weight_j x_{t - j dilation} and the last inputs, which a next call goes on from.

    Args:
        x: the signal.
        weight: the taps, lag 0 first; a tensor of two dimensions weighs every channel by itself.
        dilation: gap between the taps.
        groups: groups of channels that do not see each other, where ``weight`` has three dimensions.
        state: the inputs before the first token; default zeros.

    Shapes:
        x: (B, T, C); weight: (C, kernel) or (C_out, C / groups, kernel); state: (B, (kernel - 1) dilation, C)
        -> (B, T, C_out) and the next state.

    Example:
        >>> x, weight = torch.tensor([[[1.0], [2.0], [3.0]]]), torch.tensor([[1.0, 10.0]])
        >>> dilated_conv(x, weight, dilation=2)[0].flatten().tolist()
        [1.0, 2.0, 13.0]
    """
    kernel = weight.shape[-1]
    reach = (kernel - 1) * dilation
    tokens = x.shape[1]
    before = x.new_zeros(len(x), reach, x.shape[-1]) if state is None else state.to(x.dtype)
    if before.shape != (len(x), reach, x.shape[-1]):
        raise BadInput(f"state must have shape {(len(x), reach, x.shape[-1])}, got {tuple(before.shape)}")
    seen = torch.cat([before, x], dim=1)  # (B, reach + T, C)
    if weight.ndim == 2:  # shifted copies: with the backward pass 1.3 to 4 times faster than conv1d
        taps = weight.to(x.dtype)
        y = x * taps[:, 0]
        for lag in range(1, kernel):
            start = reach - lag * dilation
            y = torch.addcmul(y, seen[:, start : start + tokens], taps[:, lag])
    else:
        y = F.conv1d(seen.mT, weight.flip(-1).to(x.dtype), dilation=dilation, groups=groups).mT
    return y, seen[:, tokens:]


class DilatedStack(nn.Module):
    """Causal dilated convolutions h^{l+1} = act(conv_l(h^l)) + h^l with dilations 1, f, f^2, ...

    With ``factor`` = ``kernel``, the default, each of the kernel^depth tokens in reach comes to the output by exactly
    one path: the stack is a tree.

    Args:
        channels: C.
        kernel: taps of every layer.
        depth: layers.
        factor: f; default ``kernel``.
        groups: groups of channels that do not see each other; default: every channel by itself.
        activation: whether SiLU follows each convolution.
        residual: whether each layer adds its input.

    Shapes:
        x: (B, T, C), state: {"tcn_l": (B, (kernel - 1) f^l, C)} -> (B, T, C) and the next state.

    Example:
        >>> stack = DilatedStack(4, kernel=2, depth=3)
        >>> stack.receptive_field
        8
        >>> y, state = stack(torch.zeros(1, 5, 4))
        >>> y.shape, state["tcn_2"].shape
        (torch.Size([1, 5, 4]), torch.Size([1, 4, 4]))
    """

    def __init__(
        self,
        channels: int,
        *,
        kernel: int = 8,
        depth: int = 3,
        factor: int | None = None,
        groups: int | None = None,
        activation: bool = True,
        residual: bool = True,
    ) -> None:
        super().__init__()
        factor = kernel if factor is None else factor
        if min(channels, kernel, depth, factor) < 1:
            raise BadInput(
                f"channels, kernel, depth and factor must be at least 1, got {channels}, {kernel}, {depth} and {factor}"
            )
        if groups is not None and (groups < 1 or channels % groups):
            raise BadInput(f"groups must divide the {channels} channels, got {groups}")
        self.channels, self.kernel, self.groups = channels, kernel, channels if groups is None else groups
        self.dilations = [factor**layer for layer in range(depth)]
        self.activation, self.residual = activation, residual
        alone = self.groups == channels
        shape = (channels, kernel) if alone else (channels, channels // self.groups, kernel)
        bound = (3.0 / (kernel * channels // self.groups)) ** 0.5  # keeps the variance
        self.weights = nn.ParameterList(torch.empty(shape).uniform_(-bound, bound) for _ in self.dilations)

    @property
    def receptive_field(self) -> int:
        """How many tokens, the present one included, an output sees."""
        return receptive_field(self.kernel, self.dilations)

    def init_state(self, batch_size: int) -> dict[str, Tensor]:
        """Return zeros: nothing stands before the first token."""
        first = self.weights[0]
        return {
            f"tcn_{layer}": first.new_zeros(batch_size, (self.kernel - 1) * dilation, self.channels)
            for layer, dilation in enumerate(self.dilations)
        }

    def forward(self, x: Tensor, state: dict[str, Tensor] | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Convolve ``x`` after ``state``; return the output and the last inputs of every layer."""
        after: dict[str, Tensor] = {}
        for layer, (weight, dilation) in enumerate(zip(self.weights, self.dilations, strict=True)):
            name = f"tcn_{layer}"
            before = None if state is None else state[name]
            y, after[name] = dilated_conv(x, weight, dilation=dilation, groups=self.groups, state=before)
            if self.activation:
                y = F.silu(y)
            x = x + y if self.residual else y
        return x, after
