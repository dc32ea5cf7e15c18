"""Exit early from a classifier of its own, which reads a convolutional network by latent tokens and feeds back into it.

`Dynamic Perceiver for Efficient Visual Recognition <https://arxiv.org/abs/2306.11248>`_ (Han et al., 2023).

Equation: ``z <- z + A(z, pool(x + DW(x))), x <- x + A(x, z)`` with A cross-attention; a sample leaves at the first
exit e with ``max softmax(y_e) >= theta_e``.

Departures: layer norm stands in the exits where the paper has batch norm, which fails on a batch of one. One
self-attention block a stage. Without ``stages`` the backbone is a plain network of two convolutions a stage.
:class:`PerceiverExits` adds the latent tokens to a classifier that is trained already and stays as it is, so that the
full budget says what it said: nothing is fed back into the features, who leaves nowhere gets the classifier's own
logits in place of the exits on the features and on both, exits follow those logits and the labels, every stage of the
tokens has an exit, and samples may begin to leave at a later one.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft.bench.meters.counts import CountingMode
from torchgraft.catalogue import Card
from torchgraft.catalogue.card import Claim
from torchgraft.engines.attention.latents import (
    CrossAttention,
    LatentBlock,
    Onward,
    Shared,
    equal_windows,
    pooled_tokens,
)
from torchgraft.engines.nesting.branch_exits import AddBranch, BranchProcedure, State
from torchgraft.engines.routing import choose_exits, exit_thresholds, expected_cost, geometric_shares, ratio_for_cost
from torchgraft.engines.surgery.waists import Waist
from torchgraft.errors import BadInput

__all__ = [
    "CARD",
    "EXITS",
    "DynPerceiver",
    "ExitPolicy",
    "PerceiverBranch",
    "PerceiverExits",
    "exit_loss",
]

#: The exits, first to last: two of the classification branch, that of the features, and that of both.
EXITS = ("z3", "z4", "x", "merge")

CARD = Card(
    key="dynamic-perceiver",
    title="Dynamic Perceiver",
    seed_id=264,
    authors="Han, Han, Liu, Wang, Pan, Pu, Deng, Feng, Song and Huang, 2023",
    reference="https://arxiv.org/abs/2306.11248",
    family="elastic",
    kind="procedure",
    engine=("attention", "nesting", "surgery"),
    equation="z <- z + A(z, pool(x + DW(x))); x <- x + A(x, z); leave at the first e with max softmax(y_e) >= theta_e",
    entry="PerceiverExits",
    capabilities=frozenset({"elastic", "needs-data", "needs-labels", "needs-trace", "needs-training"}),
    oracles=(
        "without feedback to the features their exit equals the plain network bit for bit; without reading them the "
        "exits of the classification branch do not depend on the input",
        "on the calibration samples floor(N p_k) leave at exit k, the expected cost is sum p_k c_k, and all mass on "
        "one exit is that classifier",
        "the first exit has no gradient to the fourth stage",
        "leaving early gives each sample the logits of its exit in the full pass, and runs nothing behind it",
        "beside a trained classifier: at thresholds 0 all leave at the first exit, above 1 all answers are the "
        "classifier's, bit for bit, and its own weights never move",
        "every declared budget is the count of multiply-accumulates on the samples that thresholds were found on",
    ),
    claim=Claim(
        text="Digits at 16x16 over clutter. Beside it: the same convolutional network with linear exits behind "
        "stages 1 to 4, and alone. Accuracy at 40 percent of the multiply-accumulates of the plain network's last "
        "exit, thresholds set on validation samples, and of the last exit.",
        figure="at 40 % of the MACs >= 2 points above linear exits, last exit no more than 0.5 points below the plain "
        "network (mean of 3 seeds)",
    ),
    choose_when="an image classifier is trained from scratch and is to answer easy images early; in fit --elastic a "
    "convolutional classifier that is trained already, in batches, or large enough that a few more layers do not show",
    choose_instead="adaptive-nanodrone-pose where the classifier is no convolutional network, first-layer-routers "
    "where it is a deep residual one; linear exits where it is already wide and deep behind each exit",
    bibtex="@inproceedings{han2023dynamic, title={Dynamic Perceiver for Efficient Visual Recognition}, author={Han, "
    "Yizeng and Han, Dongchen and Liu, Zeyu and Wang, Yulin and Pan, Xuran and Pu, Yifan and Deng, Chao and Feng, "
    "Junlan and Song, Shiji and Huang, Gao}, booktitle={ICCV}, year={2023}}",
)


def _stage(inputs: int, outputs: int, stride: int) -> nn.Module:
    """Return two 3x3 convolutions, the first with a stride."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
        nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


class DynPerceiver(nn.Module):
    """Two branches, features x and latent tokens z, that read each other, and four exits.

    Args:
        channels: colour channels.
        classes: number of classes.
        width: channels of the first stage and width of the latent tokens there; doubles from stage to stage. Must be
            divisible by ``reduce`` and by 8.
        latents: number K of latent tokens in the first stage; halves from stage to stage. Must be divisible by 8.
        reduce: cross-attention works at this fraction of the width.
        kernel: size of the depth-wise convolution by which z reads x; odd.
        pooled: z reads x averaged to this height and width.
        stages: four modules in place of the plain convolutions.
        widths: channels that the four ``stages`` return.
        z2x: whether features read latent tokens.
        x2z: whether latent tokens read features.

    Shapes:
        (B, channels, h, w) -> (B, 4, classes): logits of :data:`EXITS`

    Example:
        >>> model = DynPerceiver(1, classes=3, width=8, latents=8).eval()
        >>> logits = model(torch.zeros(6, 1, 16, 16))
        >>> policy = ExitPolicy.from_budget(logits, model.exit_costs(torch.zeros(1, 1, 16, 16)), ratio=0.5)
        >>> answers, exits = model.predict(torch.zeros(6, 1, 16, 16), policy)
        >>> logits.shape, answers.shape, exits.shape
        (torch.Size([6, 4, 3]), torch.Size([6, 3]), torch.Size([6]))

    Raises:
        BadInput: a size is out of range, or the stages do not fit their widths.
    """

    def __init__(
        self,
        channels: int = 3,
        *,
        classes: int = 10,
        width: int = 16,
        latents: int = 128,
        reduce: int = 8,
        kernel: int = 7,
        pooled: int = 7,
        stages: Sequence[nn.Module] | None = None,
        widths: Sequence[int] | None = None,
        z2x: bool = True,
        x2z: bool = True,
    ) -> None:
        super().__init__()
        if min(channels, classes, width, latents, reduce, pooled) < 1 or kernel < 1 or kernel % 2 == 0:
            raise BadInput(
                f"sizes must be at least 1 and kernel odd, got channels {channels}, classes {classes}, width {width}, "
                f"latents {latents}, reduce {reduce}, kernel {kernel}, pooled {pooled}"
            )
        if width % 8 or latents % 8 or width % reduce:
            raise BadInput(
                f"width and latents must be divisible by 8 and width by reduce, got {width}, {latents} and {reduce}"
            )
        if (stages is None) != (widths is None) or len(stages or range(4)) != 4 or len(widths or range(4)) != 4:
            raise BadInput("stages and widths belong together, four of each")
        self.channels, self.pooled, self.z2x, self.x2z = channels, pooled, z2x, x2z
        depth = [width * 2**i for i in range(4)]
        wide = depth if widths is None else list(widths)
        plain = [_stage(depth[i - 1] if i else channels, depth[i], 2 if i else 1) for i in range(4)]
        self.stages = nn.ModuleList(plain if stages is None else stages)
        self.latents = nn.Parameter(torch.randn(latents, width) * 0.02)
        self.look = nn.ModuleList(nn.Conv2d(c, c, kernel, padding=kernel // 2, groups=c, bias=False) for c in wide)
        self.read = nn.ModuleList(CrossAttention(d, c, d // reduce) for d, c in zip(depth, wide, strict=True))
        self.think = nn.ModuleList(LatentBlock(d, 2**i) for i, d in enumerate(depth))
        self.tell = nn.ModuleList(CrossAttention(c, d, d // reduce) for d, c in zip(depth, wide, strict=True))
        self.onward = nn.ModuleList(Onward(latents // 2**i, depth[i]) for i in range(3))
        self.share3, self.share4 = Shared(classes), Shared(classes)
        self.exit3 = nn.Linear(depth[2], classes)
        self.exit4 = nn.Linear(depth[3] + classes, classes)
        self.exit_x = nn.Linear(wide[3], classes)
        both = wide[3] + depth[3] + classes
        self.exit_merge = nn.Sequential(nn.LayerNorm(both), nn.Linear(both, classes))

    def _stage(self, i: int, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """Run stage ``i`` of both branches, without what the latent tokens tell the features."""
        x = self.stages[i](x)
        if self.x2z:
            z = z + self.read[i](z, pooled_tokens(x, self.look[i], self.pooled))
        return x, self.think[i](z)

    def _told(self, i: int, x: Tensor, z: Tensor) -> Tensor:
        if not self.z2x:
            return x
        tokens = x.flatten(2).transpose(1, 2)  # (B, h w, C)
        told: Tensor = self.tell[i](tokens, z)
        return x + told.transpose(1, 2).reshape(x.shape)

    def _to_z3(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        x, z = state["x"], self.latents.to(state["x"].dtype).expand(len(state["x"]), -1, -1)
        for i in range(3):
            if i:
                x, z = self._told(i - 1, x, z), self.onward[i - 1](z)
            x, z = self._stage(i, x, z)
        return {"x": x, "z": z, "y": self.exit3(z.mean(1))}

    def _to_z4(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        x, z = self._stage(3, self._told(2, state["x"], state["z"]), self.onward[2](state["z"]))
        mean = z.mean(1)
        y = self.exit4(torch.cat([mean, self.share3(state["y"])], 1))
        return {"x": x, "z": z, "mean": mean, "y": y, "y4": y}

    def _to_x(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        pool = self._told(3, state["x"], state["z"]).mean((2, 3))
        return {"pool": pool, "mean": state["mean"], "y4": state["y4"], "y": self.exit_x(pool)}

    def _to_merge(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        merged = torch.cat([state["pool"], state["mean"], self.share4(state["y4"])], 1)
        return {"y": self.exit_merge(merged)}

    @property
    def _ways(self) -> tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], ...]:
        """What runs between one exit and the next."""
        return self._to_z3, self._to_z4, self._to_x, self._to_merge

    def _checked(self, image: Tensor) -> Tensor:
        if image.ndim != 4 or image.shape[1] != self.channels or not image.is_floating_point():
            raise BadInput(
                f"images must be floating point of shape (B, {self.channels}, h, w), got {image.dtype} "
                f"{tuple(image.shape)}"
            )
        return image

    def forward(self, image: Tensor) -> Tensor:
        """Return the logits of all exits."""
        state, logits = {"x": self._checked(image)}, []
        for way in self._ways:
            state = way(state)
            logits.append(state["y"])
        return torch.stack(logits, 1)

    @torch.no_grad()
    def predict(self, image: Tensor, policy: ExitPolicy) -> tuple[Tensor, Tensor]:
        """Return the logits of the exit at which each sample leaves, and its number; nothing behind it is run."""
        state = {"x": self._checked(image)}
        left = torch.arange(len(image), device=image.device)
        exits = torch.full((len(image),), len(EXITS) - 1, device=image.device)
        answers: Tensor | None = None
        for number, way in enumerate(self._ways):
            state = way(state)
            y = state["y"]
            answers = y.new_zeros(len(image), y.shape[1]) if answers is None else answers
            going = y.softmax(1).amax(1).double() >= policy.thresholds[number]
            if number == len(EXITS) - 1:
                going = torch.ones_like(going)
            answers[left[going]], exits[left[going]] = y[going], number
            left, state = left[~going], {name: value[~going] for name, value in state.items()}
            if len(left) == 0:
                break
        if answers is None:
            raise BadInput("there are no exits")
        return answers, exits

    @torch.no_grad()
    def exit_costs(self, image: Tensor) -> Tensor:
        """Return the multiply-accumulates from the image to each exit, the mean over ``image``'s samples, (4,)."""
        state, costs, counting = {"x": self._checked(image)}, [], CountingMode()
        with counting:
            for way in self._ways:
                state = way(state)
                costs.append(counting.total / len(image))
        return torch.tensor(costs, dtype=torch.float64)


@dataclass(frozen=True)
class ExitPolicy:
    """The confidence, largest probability of a class, from which on a sample leaves at each exit.

    Args:
        thresholds: one an exit; the last takes whoever is left.
    """

    thresholds: tuple[float, ...]

    @classmethod
    def from_budget(
        cls, logits: Tensor, costs: Tensor, *, ratio: float | None = None, budget: float | None = None
    ) -> ExitPolicy:
        """Return the policy by which calibration samples leave in shares p_k proportional to ratio^k.

        Args:
            logits: of samples that no accuracy is later reported on, (N, E, C).
            costs: from the beginning to each exit, (E,).
            ratio: q.
            budget: in its place, the expected cost sum p_k c_k; q is found.

        Raises:
            BadInput: not exactly one of ratio and budget is given, or the budget lies outside the costs.
        """
        if (ratio is None) == (budget is None):
            raise BadInput(f"give either ratio or budget, got {ratio} and {budget}")
        found = ratio_for_cost(costs.tolist(), budget) if budget is not None else ratio
        shares = geometric_shares(float(found or 0.0), len(costs))
        return cls(tuple(exit_thresholds(logits.softmax(-1).amax(-1), shares).tolist()))

    def choose(self, logits: Tensor) -> Tensor:
        """Return the exit at which each sample leaves, (N, E, C) -> (N,)."""
        return choose_exits(logits.softmax(-1).amax(-1), torch.tensor(self.thresholds, dtype=torch.float64))

    def cost(self, logits: Tensor, costs: Tensor) -> float:
        """Return the mean cost of samples whose logits at every exit are known."""
        return expected_cost(self.choose(logits), costs)


def exit_loss(logits: Tensor, target: Tensor, *, distill: float = 0.5, temperature: float = 1.0) -> Tensor:
    """Return the loss of all exits: cross-entropies, and the others' divergence from the last.

    Args:
        logits: of :data:`EXITS`, (B, 4, C).
        target: classes (B,).
        distill: weight of the divergences.
        temperature: T.
    """
    each = [F.cross_entropy(logits[:, number], target) for number in range(len(EXITS))]
    hard = 0.5 * (each[0] + each[1]) + each[2] + each[3]
    teacher = (logits[:, -1:].detach() / temperature).log_softmax(-1)
    student = (logits[:, :-1] / temperature).log_softmax(-1)
    soft = (teacher.exp() * (teacher - student)).sum(-1).mean(0).sum()
    return hard + distill * temperature**2 * soft


class PerceiverBranch(nn.Module):
    """Latent tokens that read the features of a classifier at some places, and an exit behind each.

    Args:
        channels: of the features at each place.
        kernels: size of the depth-wise convolution at each; odd.
        classes: number of classes.
        width: of the latent tokens at the first place; doubles from one to the next.
        latents: number of latent tokens at the first place; halves from one to the next.
        reduce: cross-attention works at this fraction of the width.
        pooled: tokens read features averaged to this height and width, at each place.

    Shapes:
        features (B, C, h, w) at a place -> tokens (B, K, D), logits (B, classes)

    Example:
        >>> branch = PerceiverBranch((4, 6), kernels=(3, 3), pooled=(4, 4), classes=5, width=8, latents=4)
        >>> z, y = branch(0, torch.zeros(2, 4, 8, 8), ())
        >>> z, y = branch(1, torch.zeros(2, 6, 4, 4), (z, y))
        >>> z.shape, y.shape
        (torch.Size([2, 2, 16]), torch.Size([2, 5]))

    Raises:
        BadInput: a size is out of range.
    """

    def __init__(
        self,
        channels: Sequence[int],
        *,
        kernels: Sequence[int],
        pooled: Sequence[int],
        classes: int,
        width: int = 32,
        latents: int = 8,
        reduce: int = 2,
    ) -> None:
        super().__init__()
        count = len(channels)
        if not len(kernels) == len(pooled) == count > 0:
            raise BadInput(
                f"channels, kernels and pooled need one entry a place, got {tuple(channels)}, {tuple(kernels)} and "
                f"{tuple(pooled)}"
            )
        if min(*channels, *kernels, *pooled, classes, width, reduce) < 1:
            raise BadInput(
                f"sizes must be at least 1, got channels {tuple(channels)}, kernels {tuple(kernels)}, pooled "
                f"{tuple(pooled)}, classes {classes}, width {width} and reduce {reduce}"
            )
        if any(kernel % 2 == 0 for kernel in kernels) or width % reduce or latents < 1 or latents % 2 ** (count - 1):
            raise BadInput(
                f"kernels must be odd, width divisible by reduce, and latents by {2 ** (count - 1)}; got "
                f"{tuple(kernels)}, {width} and {reduce}, and {latents}"
            )
        self.pooled = tuple(pooled)
        depth = [width * 2**i for i in range(count)]
        self.latents = nn.Parameter(torch.randn(latents, width) * 0.02)
        self.look = nn.ModuleList(
            nn.Conv2d(c, c, kernel, padding=kernel // 2, groups=c, bias=False)
            for c, kernel in zip(channels, kernels, strict=True)
        )
        self.read = nn.ModuleList(CrossAttention(d, c, d // reduce) for d, c in zip(depth, channels, strict=True))
        self.think = nn.ModuleList(LatentBlock(d, 2**i) for i, d in enumerate(depth))
        self.onward = nn.ModuleList(Onward(latents // 2**i, depth[i]) for i in range(count - 1))
        self.share = nn.ModuleList(Shared(classes) for _ in range(count - 1))
        self.exits = nn.ModuleList(nn.Linear(d + (classes if i else 0), classes) for i, d in enumerate(depth))

    def forward(self, place: int, x: Tensor, state: State) -> State:
        """Return tokens and logits behind a place; ``state`` is what the place before it returned, or empty."""
        z = self.onward[place - 1](state[0]) if place else self.latents.to(x.dtype).expand(len(x), -1, -1)
        seen = pooled_tokens(x, self.look[place], self.pooled[place])
        z = self.think[place](z + self.read[place](z, seen))
        mean = z.mean(1)
        y = self.exits[place](torch.cat([mean, self.share[place - 1](state[1])], 1) if place else mean)
        return z, y


class AddPerceiver(AddBranch):
    """Put latent tokens with exits beside a classifier.

    Args:
        kernels: as for :class:`PerceiverBranch`, as the other sizes.
    """

    op: ClassVar[str] = "add-perceiver"
    kernels: tuple[int, ...] = Field(min_length=1)
    pooled: tuple[int, ...] = Field(min_length=1)
    width: int = Field(ge=1)
    latents: int = Field(ge=1)
    reduce: int = Field(ge=1)

    def branch(self) -> PerceiverBranch:
        """Return new latent tokens."""
        return PerceiverBranch(
            self.channels,
            kernels=self.kernels,
            pooled=self.pooled,
            classes=self.classes,
            width=self.width,
            latents=self.latents,
            reduce=self.reduce,
        )


class PerceiverExits(BranchProcedure):
    """Let latent tokens read a trained convolutional classifier, and samples leave where the tokens are sure.

    Args:
        exits: places at which the tokens read features, and samples may leave.
        wanted: rising shares of the multiply-accumulates, one budget each; those that the first exit alone would
            exceed are left out.
        share: the most that latent tokens and exits may cost beside the classifier.
        width: greatest width of the tokens at the first place; as much of it is taken as ``share`` allows.
        latents: tokens at the first place.
        reduce: cross-attention works at this fraction of the width.
        kernel: size of the depth-wise convolutions, cut to the features' size; odd. At most 3 where the tokens would
            otherwise exceed ``share``.
        pooled: tokens read features averaged to this height and width, or to a little less in equal windows.
        samples: training samples by which thresholds are found, at most; of 320 training samples or more, a fifth at
            most is kept from the tokens for that.
        alpha: share of distillation from the original in training, the rest is the task's loss.
        temperature: of the distillation.

    Example:
        >>> from torchgraft.bench.models import ResidualNet
        >>> from torchgraft.bench.task import Task
        >>> x, y = torch.randn(16, 1, 8, 8), torch.randint(0, 10, (16,))
        >>> model = ResidualNet(widths=(16, 32), depth=2).eval()
        >>> task = Task(model, (x, y), (x, y), (x, y), nn.functional.cross_entropy, lambda out, t: out[:, 0])
        >>> elastic = PerceiverExits(wanted=(0.5, 0.8)).build(model, task)
        >>> len(elastic.budgets), torch.equal(elastic(x), model(x)), elastic.set_budget(0.9)(x).shape
        (3, True, torch.Size([16, 10]))

    Raises:
        BadInput: a setting is out of range.
    """

    card: ClassVar[Card] = CARD

    def __init__(
        self,
        *,
        exits: int = 3,
        wanted: Sequence[float] = (0.25, 0.35, 0.5, 0.7),
        share: float = 0.15,
        width: int = 64,
        latents: int = 8,
        reduce: int = 2,
        kernel: int = 7,
        pooled: int = 7,
        samples: int = 512,
        alpha: float = 0.9,
        temperature: float = 4.0,
    ) -> None:
        super().__init__(exits=exits, wanted=wanted, share=share, samples=samples, alpha=alpha, temperature=temperature)
        if min(reduce, kernel, pooled) < 1 or kernel % 2 == 0:
            raise BadInput(f"reduce and pooled must be at least 1 and kernel odd, got {reduce}, {pooled} and {kernel}")
        if width < 8 or width % 8 or 8 % reduce or latents < 1 or latents % 2 ** (exits - 1):
            raise BadInput(
                f"width must be divisible by 8, which reduce must divide, and latents by {2 ** (exits - 1)}, twice "
                f"for each exit but one; got {width}, {reduce} and {latents}"
            )
        self.width, self.latents, self.reduce, self.kernel, self.pooled = width, latents, reduce, kernel, pooled

    def sizes(self, places: Sequence[Waist], classes: int, wanted: Sequence[float]) -> Iterator[AddPerceiver]:
        """Yield tokens of ever less width, then with small convolutions. See :class:`BranchProcedure`."""
        for kernel, width in itertools.product(
            sorted({self.kernel, min(self.kernel, 3)}, reverse=True), range(self.width, 7, -8)
        ):
            yield AddPerceiver(
                places=tuple(each.name for each in places),
                channels=tuple(each.channels for each in places),
                classes=classes,
                wanted=tuple(wanted),
                kernels=tuple(min(kernel, (max(each.size) - 1) // 2 * 2 + 1) for each in places),
                pooled=tuple(equal_windows(each.size, self.pooled) for each in places),
                width=width,
                latents=self.latents,
                reduce=self.reduce,
            )
