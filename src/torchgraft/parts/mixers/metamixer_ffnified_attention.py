"""Query, key, value without attention: two depthwise convolutions around GELU, a feed-forward part over space.

`MetaMixer Is All You Need <https://arxiv.org/abs/2406.02021>`_ (Yun et al., 2024): O = DW_{k2}(GELU(DW_{k1}(q))),
q = BN(W X), the template O = value(act(key(query(X)))) with convolutions as keys and values.

Departures: drop path and squeeze-excitation are left out.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft.catalogue import Card
from torchgraft.catalogue.card import Claim
from torchgraft.engines.parametrize import fold
from torchgraft.errors import BadInput

__all__ = ["CARD", "FFBlock", "FFNet", "FFNifiedAttention", "MetaMixer", "TwoScale", "folded"]

CARD = Card(
    key="metamixer-ffnified-attention",
    title="FFNified attention (MetaMixer)",
    seed_id=146,
    authors="Yun et al., 2024",
    reference="https://arxiv.org/abs/2406.02021",
    family="parts/mixers",
    kind="part",
    engine=("surgery",),
    equation="O = DW_{k2}(GELU(DW_{k1}(BN(W X))))",
    entry="FFNifiedAttention",
    capabilities=frozenset({"grid", "channels-first", "foldable"}),
    declared={"parameters": "d_model**2 + 2*d_model + 2*d_model*(k1**2 + 9 + 4)"},
    example={"d_model": 6, "k1": 5, "k2": 5},
    shapes=((2, 6, 9, 8),),
    oracles=(
        "folded = unfolded in eval mode, in float64 to 1e-12, with the 7 x 7 and 3 x 3 branches and all batch norms",
        "away from the border it commutes with shifts, and one pixel moves a window of k1 + k2 - 1 and nothing else",
        "the template with products and softmax is attention, with linear layers and GELU a feed-forward part",
        "without the 1 x 1 query a channel depends on itself alone",
    ),
    claim=Claim(
        text="Digits at 16 x 16, networks of three blocks with equal channel mixers: FFNified attention beside "
        "self-attention, a ConvNeXt-style block, and itself without GELU; latency of one image.",
        figure="accuracy at most 0.2 points below self-attention at 1.5 times lower latency, not below the "
        "ConvNeXt-style block; without GELU at least 0.5 points lower",
    ),
    choose_when="images on devices where convolutions are fast and attention is not, with batch norms that fold away",
    choose_instead="axial-attention or softmax-attention where far positions must see each other by content",
    bibtex="""@article{yun2024metamixer,
  title={{MetaMixer} Is All You Need},
  author={Yun, Seokju and Lee, Dongheon and Ro, Youngmin},
  journal={arXiv preprint arXiv:2406.02021},
  year={2024}
}""",
)


class MetaMixer(nn.Module):
    """The template: value(act(key(query(x)))).

    Args:
        query: what makes queries of the input.
        key: what compares them with the keys.
        act: what is done to the result.
        value: what reads the values.

    Example:
        >>> MetaMixer(nn.Identity(), nn.Linear(4, 8), F.gelu, nn.Linear(8, 4))(torch.randn(2, 4)).shape
        torch.Size([2, 4])
    """

    def __init__(self, query: nn.Module, key: nn.Module, act: Callable[[Tensor], Tensor], value: nn.Module) -> None:
        super().__init__()
        self.query, self.key, self.act, self.value = query, key, act, value

    def forward(self, x: Tensor) -> Tensor:
        """Return the mixed input."""
        y: Tensor = self.value(self.act(self.key(self.query(x))))
        return y


class TwoScale(nn.Module):
    """A depthwise convolution trained as two: BN(DW_k(x)) + BN(DW_3(x)), which are one after training.

    Args:
        channels: C.
        kernel: k, odd, 3 or more.

    Shapes:
        (B, C, H, W) -> (B, C, H, W)

    Raises:
        BadInput: the kernel is even or below 3.
    """

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        if kernel < 3 or kernel % 2 == 0:
            raise BadInput(f"kernel must be odd and at least 3, got {kernel}")

        def branch(size: int) -> nn.Sequential:
            convolution = nn.Conv2d(channels, channels, size, padding=size // 2, groups=channels, bias=False)
            return nn.Sequential(convolution, nn.BatchNorm2d(channels))

        self.large, self.small = branch(kernel), branch(3)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve."""
        y: Tensor = self.large(x) + self.small(x)
        return y

    @torch.no_grad()
    def plain(self) -> nn.Conv2d:
        """Return the one convolution that this module is in eval mode."""
        large, small = (fold(copy.deepcopy(branch).eval())[0] for branch in (self.large, self.small))
        if not (isinstance(large, nn.Conv2d) and isinstance(small, nn.Conv2d)):
            raise BadInput("the branches are no longer a convolution and a batch norm each")
        margin = (large.kernel_size[0] - 3) // 2
        bias = [
            torch.zeros_like(each.weight[:, 0, 0, 0]) if each.bias is None else each.bias for each in (large, small)
        ]
        large.weight += F.pad(small.weight, [margin] * 4)
        large.bias = nn.Parameter(bias[0] + bias[1])
        return large


def _checked(x: Tensor, channels: int) -> Tensor:
    if x.ndim != 4 or x.shape[1] != channels or not x.is_floating_point():
        raise BadInput(f"x must be floating point of shape (B, {channels}, H, W), got {x.dtype} {tuple(x.shape)}")
    return x


class FFNifiedAttention(nn.Module):
    """A 1 x 1 query, a depthwise convolution as keys, GELU, and another as values.

    Args:
        d_model: channels C.
        k1: size of the keys' window, odd.
        k2: size of the values' window, odd.
        act: between them.

    Shapes:
        (B, C, H, W) -> (B, C, H, W)

    Example:
        >>> FFNifiedAttention(4, k1=3, k2=3)(torch.randn(1, 4, 5, 5)).shape
        torch.Size([1, 4, 5, 5])

    Raises:
        BadInput: a window is even or below 3, or there is no channel.
    """

    def __init__(self, d_model: int, *, k1: int = 7, k2: int = 7, act: Callable[[Tensor], Tensor] = F.gelu) -> None:
        super().__init__()
        if d_model < 1:
            raise BadInput(f"d_model must be at least 1, got {d_model}")
        self.d_model = d_model
        query = nn.Sequential(nn.Conv2d(d_model, d_model, 1, bias=False), nn.BatchNorm2d(d_model))
        self.mixer = MetaMixer(query, TwoScale(d_model, k1), act, TwoScale(d_model, k2))

    def forward(self, x: Tensor) -> Tensor:
        """Mix positions."""
        y: Tensor = self.mixer(_checked(x, self.d_model))
        return y


class FFBlock(nn.Module):
    """x + s1 * attention(x), then x + s2 * channels(x), with a depthwise convolution before the channel mixer.

    Args:
        d_model: channels C.
        ratio: width of the channel mixer over C.
        kernel: window of the depthwise convolutions.
        scale: both layer scales at the start; the paper's, for long training, is 1e-5.
        mixer: another mixer of positions in the place of FFNified attention.

    Shapes:
        (B, C, H, W) -> (B, C, H, W)
    """

    def __init__(
        self, d_model: int, *, ratio: int = 3, kernel: int = 7, scale: float = 1e-5, mixer: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.mixer = FFNifiedAttention(d_model, k1=kernel, k2=kernel) if mixer is None else mixer
        local = nn.Conv2d(d_model, d_model, kernel, padding=kernel // 2, groups=d_model, bias=False)
        self.channels = nn.Sequential(
            nn.Sequential(local, nn.BatchNorm2d(d_model)),
            nn.Conv2d(d_model, ratio * d_model, 1),
            nn.GELU(),
            nn.Conv2d(ratio * d_model, d_model, 1),
        )
        self.scale1 = nn.Parameter(torch.full((d_model, 1, 1), scale))
        self.scale2 = nn.Parameter(torch.full((d_model, 1, 1), scale))

    def forward(self, x: Tensor) -> Tensor:
        """Mix positions, then channels."""
        x = x + self.scale1 * self.mixer(x)
        y: Tensor = x + self.scale2 * self.channels(x)
        return y


class FFNet(nn.Module):
    """Stages of blocks, each after a convolution of stride 2, and a linear head on the mean.

    Args:
        dims: channels of each stage.
        depths: blocks of each stage.
        in_channels: channels of the image.
        classes: number of classes.
        scale: layer scales at the start.
        kernel: window of the depthwise convolutions.
        mixer: builds another mixer of positions from the channels.

    Shapes:
        (B, in_channels, H, W) -> (B, classes)

    Example:
        >>> FFNet((8, 16), (1, 1))(torch.randn(2, 1, 16, 16)).shape
        torch.Size([2, 10])

    Raises:
        BadInput: there are no stages, or not as many depths as widths.
    """

    def __init__(
        self,
        dims: Sequence[int],
        depths: Sequence[int],
        *,
        in_channels: int = 1,
        classes: int = 10,
        scale: float = 1e-5,
        kernel: int = 7,
        mixer: Callable[[int], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        if not dims or len(dims) != len(depths):
            raise BadInput(f"dims and depths must be of one length, at least 1, got {list(dims)} and {list(depths)}")
        self.in_channels = in_channels
        stages: list[nn.Module] = []
        before = in_channels
        for width, depth in zip(dims, depths, strict=True):
            stages.append(
                nn.Sequential(nn.Conv2d(before, width, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(width))
            )
            for _ in range(depth):
                own = None if mixer is None else mixer(width)
                stages.append(FFBlock(width, kernel=kernel, scale=scale, mixer=own))
            before = width
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(before, classes)

    def forward(self, image: Tensor) -> Tensor:
        """Return class logits."""
        logits: Tensor = self.head(self.stages(_checked(image, self.in_channels)).mean((2, 3)))
        return logits


def folded(model: nn.Module) -> nn.Module:
    """Return a copy of ``model`` for inference: two-scale convolutions are one, batch norms are in their convolutions.

    Raises:
        BadInput: the model is in training mode, in which batch norms cannot be folded.
    """
    if model.training:
        raise BadInput("folding needs the model in eval mode; call model.eval() first")
    model = copy.deepcopy(model)
    if isinstance(model, TwoScale):
        return model.plain()
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, TwoScale):
                setattr(module, name, child.plain())
    for module in list(model.modules()):
        if type(module) is nn.Sequential:
            fold(module)
    return model
