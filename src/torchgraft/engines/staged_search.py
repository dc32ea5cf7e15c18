"""A plain convolutional network in stages, and the mixture of all networks that its first blocks and channels make."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft.engines.width_search import channel_interpolate, draw_two
from torchgraft.errors import BadInput

__all__ = ["Architecture", "StagedCNN", "Widths", "expected_macs", "staged_macs", "supernet"]

#: Channels of every block, by stage.
Widths: TypeAlias = tuple[tuple[int, ...], ...]


class _ConvBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x)))

    def narrow(self, x: Tensor, outputs: int) -> Tensor:
        """Run the first ``outputs`` channels on as many input channels as come, normalised within the batch."""
        y = F.conv2d(x, self.conv.weight[:outputs, : x.shape[1]], padding=1)
        return F.relu(F.batch_norm(y, None, None, self.norm.weight[:outputs], self.norm.bias[:outputs], training=True))


class StagedCNN(nn.Module):
    """Stages of 3 x 3 convolutions with batch norm, the image halved between stages, a mean and a linear head.

    Args:
        widths: channels of every block, by stage.
        channels: of the image.
        classes: number of classes.

    Shapes:
        (B, channels, H, W) -> (B, classes)

    Example:
        >>> StagedCNN(((4, 4), (8,)))(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """

    def __init__(self, widths: Sequence[Sequence[int]], *, channels: int = 1, classes: int = 10) -> None:
        super().__init__()
        if not widths or any(not stage or min(stage) < 1 for stage in widths):
            raise BadInput(f"widths must be stages of at least one block of at least one channel, got {widths}")
        self.widths: Widths = tuple(tuple(stage) for stage in widths)
        self.channels, self.classes = channels, classes
        before = [channels, *itertools.chain(*self.widths)]
        sizes = iter(itertools.pairwise(before))
        self.stages = nn.ModuleList(nn.Sequential(*(_ConvBlock(*next(sizes)) for _ in stage)) for stage in self.widths)
        self.head = nn.Linear(before[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        for place, stage in enumerate(self.stages):
            x = stage(x if place == 0 else F.max_pool2d(x, 2))
        y: Tensor = self.head(x.mean((2, 3)))
        return y

    def sliced(self, widths: Sequence[Sequence[int]]) -> StagedCNN:
        """Return the network of the first blocks and channels, as ``widths`` says, with these weights."""
        made = StagedCNN(widths, channels=self.channels, classes=self.classes)
        own = self.state_dict()
        state = {
            name: own[name][tuple(slice(size) for size in value.shape)] for name, value in made.state_dict().items()
        }
        made.load_state_dict(state)
        return made.train(self.training)


#: The widths that are drawn for a block, and their weights.
Draw: TypeAlias = tuple[Sequence[int], Tensor]


def supernet(
    model: StagedCNN, images: Tensor, blocks: Sequence[Sequence[Draw]], depths: Sequence[Tensor | None]
) -> Tensor:
    """Return the logits of the mixture of networks that were drawn, normalised within the batch.

    Args:
        model: holds the weights of all of them.
        images: (B, channels, H, W).
        blocks: by stage and block, the widths drawn and their weights; weights of exactly zero are left out.
        depths: by stage, the weight of ending after each block, or ``None`` for the last.
    """
    x = images
    for place, stage in enumerate(cast("list[nn.Sequential]", list(model.stages))):
        x = x if place == 0 else F.max_pool2d(x, 2)
        ends = []
        for block, (widths, weights) in zip(cast("list[_ConvBlock]", list(stage)), blocks[place], strict=True):
            x = block.narrow(x, max(c for c, p in zip(widths, weights, strict=True) if p > 0))
            x = _mixed([x[:, :c] for c in widths], weights)
            ends.append(x)
        ending = depths[place]
        x = x if ending is None else _mixed(ends, ending)
    return F.linear(x.mean((2, 3)), model.head.weight[:, : x.shape[1]], model.head.bias)


def _mixed(parts: Sequence[Tensor], weights: Tensor) -> Tensor:
    """Return the weighted sum of feature maps, all interpolated to the widest that counts."""
    counted = [(part, weight) for part, weight in zip(parts, weights, strict=True) if weight > 0]
    most = max(part.shape[1] for part, _ in counted)
    return torch.stack([weight * channel_interpolate(part, most) for part, weight in counted]).sum(0)


def expected_macs(
    options: Sequence[Sequence[Tensor]],
    chances: Sequence[Sequence[Tensor]],
    depths: Sequence[Tensor | None],
    *,
    positions: Sequence[int],
    channels: int = 1,
    classes: int = 10,
) -> Tensor:
    """Return the expected MACs an image of a :class:`StagedCNN` whose widths and depths are drawn independently.

    Args:
        options: by stage and block, the widths, (K,).
        chances: by stage and block, their probabilities, (K,).
        depths: by stage, the probability of ending after each block, or ``None`` for the last.
        positions: pixels of a channel, by stage.
        channels: of the image.
        classes: of the head.
    """
    before: Tensor | float = float(channels)
    total: Tensor | float = 0.0
    for stage, (counts, p) in enumerate(zip(options, chances, strict=True)):
        means = [(c * q).sum() for c, q in zip(counts, p, strict=True)]
        end = depths[stage]
        ending = F.one_hot(torch.tensor(len(means) - 1), len(means)).to(means[0]) if end is None else end
        for block, mean in enumerate(means):
            reached = ending[block:].sum()
            total = total + 9 * positions[stage] * reached * mean * (before if block == 0 else means[block - 1])
        before = (ending * torch.stack(means)).sum()
    return cast(Tensor, total + before * classes)


@dataclass(frozen=True)
class Architecture:
    """The logits of a :class:`StagedCNN`.

    Args:
        options: by stage and block, the widths to choose among, (K,).
        widths: their logits.
        depths: by stage, logits of ending after each block, or ``None`` where it ends after the last.
    """

    options: list[list[Tensor]]
    widths: list[list[Tensor]]
    depths: list[Tensor | None]

    def parameters(self) -> list[Tensor]:
        """Return all logits."""
        return [*itertools.chain(*self.widths), *(each for each in self.depths if each is not None)]

    def likeliest(self) -> Widths:
        """Return the widths and depths of the largest logits."""
        ends = [len(w) if d is None else int(d.argmax()) + 1 for w, d in zip(self.widths, self.depths, strict=True)]
        return tuple(
            tuple(int(c[int(a.argmax())]) for c, a in zip(counts[:end], logits[:end], strict=True))
            for counts, logits, end in zip(self.options, self.widths, ends, strict=True)
        )

    def draw(self, tau: float) -> tuple[list[list[Draw]], list[Tensor | None]]:
        """Return two widths of every block, and every stage's weights of its ends, at temperature ``tau``."""
        blocks: list[list[Draw]] = []
        for counts, logits in zip(self.options, self.widths, strict=True):
            drawn = [(c, *draw_two(a, tau=tau)) for c, a in zip(counts, logits, strict=True)]
            blocks.append([([int(c[i]) for i in places], weights) for c, places, weights in drawn])
        return blocks, [None if d is None else F.gumbel_softmax(d, tau=tau) for d in self.depths]

    def expected(self, model: StagedCNN, positions: Sequence[int]) -> Tensor:
        """Return the expected MACs; see :func:`expected_macs`."""
        return expected_macs(
            self.options,
            [[torch.softmax(a, 0) for a in stage] for stage in self.widths],
            [None if d is None else torch.softmax(d, 0) for d in self.depths],
            positions=positions,
            channels=model.channels,
            classes=model.classes,
        )


def staged_macs(model: StagedCNN, widths: Widths, positions: Sequence[int]) -> float:
    """Return the MACs an image of a network of ``widths``, beside ``model`` in everything else."""
    counts = [[torch.tensor([float(c)]) for c in stage] for stage in widths]
    ones = [[torch.ones(1) for _ in stage] for stage in widths]
    none = [None] * len(widths)
    return float(expected_macs(counts, ones, none, positions=positions, channels=model.channels, classes=model.classes))
