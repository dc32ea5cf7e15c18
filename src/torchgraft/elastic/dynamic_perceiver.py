"""Exit early from a classifier of its own, which reads a convolutional network by latent tokens and feeds back into it.

`Dynamic Perceiver for Efficient Visual Recognition <https://arxiv.org/abs/2306.11248>`_ (Han et al., 2023).

Equation: ``z <- z + A(z, pool(x + DW(x))), x <- x + A(x, z)`` with A cross-attention; a sample leaves at the first
exit e with ``max softmax(y_e) >= theta_e``.

Departures: layer norm stands in the exits where the paper has batch norm, which fails on a batch of one. One
self-attention block a stage. Without ``stages`` the backbone is a plain network of two convolutions a stage.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft.bench.meters.counts import CountingMode
from torchgraft.catalogue import Card
from torchgraft.catalogue.card import Claim
from torchgraft.engines.routing import choose_exits, exit_thresholds, expected_cost, geometric_shares, ratio_for_cost
from torchgraft.errors import BadInput

__all__ = ["CARD", "EXITS", "DynPerceiver", "ExitPolicy", "exit_loss"]

#: The exits, first to last: two of the classification branch, that of the features, and that of both.
EXITS = ("z3", "z4", "x", "merge")

CARD = Card(
    key="dynamic-perceiver",
    title="Dynamic Perceiver",
    seed_id=264,
    authors="Han, Han, Liu, Wang, Pan, Pu, Deng, Feng, Song and Huang, 2023",
    reference="https://arxiv.org/abs/2306.11248",
    family="elastic",
    kind="part",
    engine=("attention", "nesting"),
    equation="z <- z + A(z, pool(x + DW(x))); x <- x + A(x, z); leave at the first e with max softmax(y_e) >= theta_e",
    entry="DynPerceiver",
    capabilities=frozenset({"channels-first"}),
    example={"channels": 3, "classes": 5, "width": 8, "latents": 16, "reduce": 2, "kernel": 3},
    shapes=((4, 3, 16, 16),),
    declared={
        "parameters": "9 * channels * width + 9 * 42 * width**2 + 9 * 85 * width**2 + 4 * 15 * width"  # convolutions
        " + latents * width + kernel**2 * 15 * width"  # latent tokens, depth-wise convolutions
        " + 2 * (5 * 15 * width + 4 * 85 * width**2 // reduce)"  # both directions of cross-attention
        " + 8 * 85 * width**2 + 8 * 15 * width"  # self-attention
        " + 6 * 7 * width + 2 * 21 * width**2 + 21 * latents**2 // 32 + 7 * latents // 8"  # between stages
        " + 2 * (classes**2 + 3 * classes) + 36 * width * classes + 2 * classes**2 + 4 * classes"  # exits
        " + 2 * (16 * width + classes)"
    },
    oracles=(
        "without feedback to the features their exit equals the plain network bit for bit; without reading them the "
        "exits of the classification branch do not depend on the input",
        "on the calibration samples floor(N p_k) leave at exit k, the expected cost is sum p_k c_k, and all mass on "
        "one exit is that classifier",
        "the first exit has no gradient to the fourth stage",
        "leaving early gives each sample the logits of its exit in the full pass, and runs nothing behind it",
    ),
    claim=Claim(
        text="Digits at 16x16 over clutter. Beside it: the same convolutional network with linear exits behind "
        "stages 1 to 4, and alone. Accuracy at 40 percent of the multiply-accumulates of the plain network's last "
        "exit, thresholds set on validation samples, and of the last exit.",
        figure="at 40 % of the MACs >= 2 points above linear exits, last exit no more than 0.5 points below the plain "
        "network (mean of 3 seeds)",
    ),
    choose_when="an image classifier is trained from scratch and is to answer easy images early",
    choose_instead="first-layer-routers for a network that is trained already; linear exits where it is already wide "
    "and deep behind each exit",
    bibtex="@inproceedings{han2023dynamic, title={Dynamic Perceiver for Efficient Visual Recognition}, author={Han, "
    "Yizeng and Han, Dongchen and Liu, Zeyu and Wang, Yulin and Pan, Xuran and Pu, Yifan and Deng, Chao and Feng, "
    "Junlan and Song, Shiji and Huang, Gao}, booktitle={ICCV}, year={2023}}",
)


class CrossAttention(nn.Module):
    """One head that lets tokens read others: (B, T, D), (B, S, E) -> (B, T, D).

    Args:
        d_query: D.
        d_source: E.
        inner: width of query, key and value.
    """

    def __init__(self, d_query: int, d_source: int, inner: int) -> None:
        super().__init__()
        self.norm_query, self.norm_source = nn.LayerNorm(d_query), nn.LayerNorm(d_source)
        self.query = nn.Linear(d_query, inner, bias=False)
        self.key = nn.Linear(d_source, inner, bias=False)
        self.value = nn.Linear(d_source, inner, bias=False)
        self.out = nn.Linear(inner, d_query)

    def forward(self, x: Tensor, source: Tensor) -> Tensor:
        """Return what ``x`` reads from ``source``."""
        source = self.norm_source(source)
        read = F.scaled_dot_product_attention(self.query(self.norm_query(x)), self.key(source), self.value(source))
        y: Tensor = self.out(read)
        return y


class _SelfAttention(nn.Module):
    """A pre-norm block with a feed-forward part of twice the width: (B, T, D) -> (B, T, D)."""

    def __init__(self, d_model: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.qkv = nn.Linear(d_model, 3 * d_model, bias=False)
        self.out = nn.Linear(d_model, d_model)
        self.fc1, self.fc2 = nn.Linear(d_model, 2 * d_model), nn.Linear(2 * d_model, d_model)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = torch.unflatten(self.qkv(self.norm1(x)), -1, (3, self.heads, -1)).permute(
            2, 0, 3, 1, 4
        )  # (B, H, T, K)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        y: Tensor = x + self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return y


class _Onward(nn.Module):
    """Half as many tokens, twice as wide: (B, K, C) -> (B, K / 2, 2 C)."""

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.norm_tokens, self.norm_width = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mix, self.expand = nn.Linear(tokens, tokens // 2), nn.Linear(width, 2 * width)

    def forward(self, z: Tensor) -> Tensor:
        z = self.mix(self.norm_tokens(z).transpose(1, 2)).transpose(1, 2)
        y: Tensor = self.expand(self.norm_width(z))
        return y


class _Shared(nn.Module):
    """What an exit tells later ones: (B, classes) -> (B, classes)."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.fc, self.norm = nn.Linear(classes, classes), nn.LayerNorm(classes)

    def forward(self, y: Tensor) -> Tensor:
        return F.relu(self.norm(self.fc(y)))


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
        self.think = nn.ModuleList(_SelfAttention(d, 2**i) for i, d in enumerate(depth))
        self.tell = nn.ModuleList(CrossAttention(c, d, d // reduce) for d, c in zip(depth, wide, strict=True))
        self.onward = nn.ModuleList(_Onward(latents // 2**i, depth[i]) for i in range(3))
        self.share3, self.share4 = _Shared(classes), _Shared(classes)
        self.exit3 = nn.Linear(depth[2], classes)
        self.exit4 = nn.Linear(depth[3] + classes, classes)
        self.exit_x = nn.Linear(wide[3], classes)
        both = wide[3] + depth[3] + classes
        self.exit_merge = nn.Sequential(nn.LayerNorm(both), nn.Linear(both, classes))

    def _stage(self, i: int, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """Run stage ``i`` of both branches, without what the latent tokens tell the features."""
        x = self.stages[i](x)
        if self.x2z:
            seen = x + self.look[i](x)
            size = (min(self.pooled, x.shape[2]), min(self.pooled, x.shape[3]))
            z = z + self.read[i](z, F.adaptive_avg_pool2d(seen, size).flatten(2).transpose(1, 2))
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
