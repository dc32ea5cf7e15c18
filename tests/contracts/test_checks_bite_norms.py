"""Each check of norms can fail: sound toys pass all of them, and for each there is a broken toy that it catches."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft.catalogue import Card
from torchgraft.contracts import CHECKS, Check, Subject, checks_for, norms
from torchgraft.contracts.run import run_check
from torchgraft.engines.normalize import Norm, RunningNorm
from torchgraft.errors import BadInput

FACTS: dict[str, Any] = {
    "key": "toy-norm",
    "title": "A toy",
    "authors": "Nobody, 2026",
    "reference": "https://example.org/toy",
    "family": "parts/norms",
    "kind": "part",
    "equation": "y = (x - mean) / std",
    "entry": "Batch",
    "oracles": ("none",),
    "choose_when": "never, it is a toy",
    "choose_instead": "anything else at all",
    "bibtex": "@misc{toy, title={A {T}oy}, author={Nobody}, year={2026}}",
}
BATCH = Card(
    **FACTS,
    capabilities=frozenset(
        {"running-statistics", "scale-invariant", "shift-invariant", "equals-replaced", "compilable"}
    ),
    declared={"parameters": "2*channels", "replaces": "BatchNorm2d"},
    example={"channels": 6},
    shapes=((2, 6, 4, 4),),
)
TOKEN = Card(
    **{**FACTS, "entry": "Token"},
    capabilities=frozenset(
        {"batch-independent", "train-eval-equal", "scale-invariant", "shift-invariant", "equals-replaced"}
    ),
    declared={"parameters": "2*channels", "replaces": "LayerNorm"},
    example={"channels": 8},
    shapes=((2, 5, 8),),
)
PADDED = Card(
    **{**FACTS, "entry": "Padded"},
    capabilities=frozenset({"running-statistics", "foldable", "padding-mask"}),
    declared={"parameters": "2*channels", "replaces": "BatchNorm1d"},
    example={"channels": 8},
    shapes=((2, 5, 8),),
)


class Batch(RunningNorm):
    def __init__(self, channels: int) -> None:
        super().__init__(channels, layout="first", ndim=(4,))

    def forward(self, x: Tensor) -> Tensor:
        return self.standardized(self.checked(x))


class Token(Norm):
    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(self.checked(x), (self.channels,), self.weight, self.bias, self.eps)


class Padded(RunningNorm):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.standardized(self.checked(x), mask=mask)

    def fold_into(self, linear: nn.Linear) -> nn.Linear:
        scale = self.weight * torch.rsqrt(self.running_var + self.eps)
        shift = self.bias - self.running_mean * scale
        with torch.no_grad():
            linear.bias += linear.weight @ shift
            linear.weight *= scale
        return linear


# --- broken ones


class LosesRows(Batch):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[:4]


class ReadsMemory(Batch):
    def forward(self, x: Tensor) -> Tensor:
        strides = torch.empty(x.shape).stride()
        return super().forward(x if x.is_contiguous() else x.as_strided(x.shape, strides))


class NeedsMore(Batch):
    def __init__(self, channels: int, groups: int | None = None) -> None:
        if groups is None:
            raise BadInput("give the number of groups")
        super().__init__(channels)


class OtherNames(Batch):
    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.gamma, self.beta = self.weight, self.bias
        self.weight = self.bias = None

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.gamma[:, None, None] + self.beta[:, None, None]


class OtherShape(Batch):
    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.weight = nn.Parameter(torch.ones(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, None, None, self.weight.flatten(), self.bias, True)


class HalfStatistics(Batch):
    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean((0, 2, 3), keepdim=True)
        var = (x - mean).square().mean((0, 2, 3), keepdim=True)
        return self.affine((x - mean) / (var + self.eps).sqrt()).to(x.dtype)


class Detached(Batch):
    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        var, mean = (value.detach() for value in torch.var_mean(x, (0, 2, 3), keepdim=True, correction=0))
        return self.affine((x - mean) * torch.rsqrt(var + self.eps))


class Unbiased(Token):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1 - 1 / x.shape[-1]) ** 0.5


class Apart(Batch):
    """Torch's batch norm saves its running statistics for the backward pass; these are kept apart from it."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or x.numel() <= self.channels:
            return super().forward(x)
        out = F.batch_norm(x, None, None, self.weight, self.bias, True, eps=self.eps)
        self.moved(x.detach(), out)
        return out

    def moved(self, x: Tensor, out: Tensor) -> None:
        self.track(mean=x.mean((0, 2, 3)), var=x.var((0, 2, 3)))


class BiasedRunning(Apart):
    def moved(self, x: Tensor, out: Tensor) -> None:
        self.track(mean=x.mean((0, 2, 3)), var=x.var((0, 2, 3), correction=0))


class SeesOthersInEvaluation(Batch):
    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        return out if self.training else out + 1e-6 * x.mean(0, keepdim=True)


class SeesOthers(Token):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1e-6 * x.mean(0, keepdim=True)


class LeaksGradient(Token):
    def forward(self, x: Tensor) -> Tensor:
        other = x.roll(1, 0)
        return super().forward(x) + 1e-3 * (other - other.detach())


class NoisyInTraining(Token):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1.001 if self.training else 1.0)


class Remembers(Token):
    """Evaluation depends on what was seen in training."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.register_buffer("seen", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen.copy_(x.detach().abs().mean())
            return super().forward(x)
        return super().forward(x) * self.seen


class MovesTwice(Batch):
    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            super().forward(x)
        return super().forward(x)


class NeverMoves(Apart):
    def moved(self, x: Tensor, out: Tensor) -> None:
        pass


class MovesInEvaluation(Batch):
    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        if not self.training:
            self.track(mean=x.mean((0, 2, 3)))
        return out


class MovesInBackward(Apart):
    def moved(self, x: Tensor, out: Tensor) -> None:
        super().moved(x, out)
        out.register_hook(self._hook)

    def _hook(self, grad: Tensor) -> Tensor:
        self.running_mean.add_(0.1)
        return grad


class ForgetsVariance(Batch):
    """Never reads the running variance."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return super().forward(x)
        return self.affine(x - self.running_mean[:, None, None])


class CountsNothing(Batch):
    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        if self.training and len(x) == 0:
            self.running_var.mul_(0.9)
        return out


class NansOnOne(Batch):
    def forward(self, x: Tensor) -> Tensor:
        one = self.training and x.numel() == self.channels
        return x / 0.0 * 0.0 if one else super().forward(x)


class HasOwnScale(Batch):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1e-4 * x.tanh()


class ScalesTogether(Token):
    """Scale-free only where all samples are scaled alike."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1e-3 * (x / x.norm()).mean(-1, keepdim=True)


class BranchesOnData(Batch):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if bool(x.sum() < 1e9) else x


class MovesOtherwiseCompiled(Batch):
    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        if torch.compiler.is_compiling():
            self.running_mean.add_(1.0)
        return out


class FoldsWithoutMean(Padded):
    def fold_into(self, linear: nn.Linear) -> nn.Linear:
        bias = linear.bias.detach().clone() + linear.weight.detach() @ self.bias.detach()
        folded = super().fold_into(linear)
        with torch.no_grad():
            folded.bias.copy_(bias)
        return folded


class FoldsToTwo(Padded):
    def fold_into(self, linear: nn.Linear) -> nn.Module:  # type: ignore[override]
        return nn.Sequential(self, linear)


class FoldsNot(Padded):
    fold_into = None  # type: ignore[assignment]


class IgnoresMask(Padded):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().forward(x)


class TracksPadding(Padded):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        out = super().forward(x, mask)
        if self.training and mask is not None:
            self.running_mean.add_(0.1 * x.detach().mean((0, 1)))
        return out


#: check name -> the toys that it must catch.
BROKEN: dict[str, tuple[type[nn.Module], ...]] = {
    "norm-keeps-the-shape": (LosesRows, ReadsMemory),
    "drop-in-for-the-torch-layer": (NeedsMore, OtherNames, OtherShape),
    "statistics-are-in-single-precision": (HalfStatistics,),
    "training-gradients-are-the-derivatives": (Detached,),
    "equals-the-torch-layer": (Unbiased, BiasedRunning, Detached),
    "samples-are-apart-in-evaluation": (SeesOthersInEvaluation,),
    "batch-size-does-not-matter": (SeesOthers, LeaksGradient),
    "training-is-evaluation": (NoisyInTraining, Remembers),
    "statistics-move-once-a-pass": (MovesTwice, NeverMoves, MovesInEvaluation, MovesInBackward),
    "evaluation-is-training-that-settled": (ForgetsVariance, NeverMoves),
    "batch-of-none-leaves-statistics": (CountsNothing, NansOnOne),
    "scale-does-not-matter": (HasOwnScale, ScalesTogether),
    "shift-does-not-matter": (HasOwnScale,),
    "training-compiles": (BranchesOnData, MovesOtherwiseCompiled),
    "folded-equals-unfolded": (FoldsWithoutMean, FoldsToTwo, FoldsNot),
    "padding-is-left-out": (IgnoresMask, TracksPadding),
}
NORMS: dict[str, Check] = {check.name: check for check in norms.CHECKS}
SOUND = [
    (toy, check)
    for toy, card in ((Batch, BATCH), (Apart, BATCH), (Token, TOKEN), (Padded, PADDED))
    for check in norms.CHECKS
    if check.applies(card)
]


def subject(toy: type[nn.Module], **facts: Any) -> Subject:
    """Return ``toy`` as something that can be checked."""
    card = TOKEN if issubclass(toy, Token) else PADDED if issubclass(toy, Padded) else BATCH
    return Subject(card=card.model_copy(update=facts), entry=toy, module=types.ModuleType("toy"))


@pytest.mark.parametrize(("toy", "check"), SOUND, ids=[f"{toy.__name__}-{check.name}" for toy, check in SOUND])
def test_sound_norm_passes(toy: type[nn.Module], check: Check) -> None:
    result = run_check(check, subject(toy))
    assert result.outcome == "passed", result.reason


@pytest.mark.parametrize(("name", "toy"), [(name, toy) for name, toys in BROKEN.items() for toy in toys])
def test_broken_norm_is_caught(name: str, toy: type[nn.Module]) -> None:
    result = run_check(NORMS[name], subject(toy))
    assert result.outcome == "failed"
    assert "(at " not in result.reason, f"the toy crashed instead of failing the check: {result.reason}"


def test_unknown_torch_layer_is_caught() -> None:
    result = run_check(NORMS["drop-in-for-the-torch-layer"], subject(Batch, declared={"replaces": "LayerNrom"}))
    assert result.outcome == "failed"
    assert "known are" in result.reason


def test_padding_of_images_is_caught() -> None:
    result = run_check(NORMS["padding-is-left-out"], subject(Batch))
    assert result.outcome == "failed"
    assert "is not (B, T, D)" in result.reason


def test_checks_follow_from_the_card() -> None:
    def names(card: Card, *capabilities: str) -> set[str]:
        promised = checks_for(card.model_copy(update={"capabilities": frozenset(capabilities)}))
        return NORMS.keys() & {check.name for check in promised}

    assert names(BATCH.model_copy(update={"declared": {}})) == {"samples-are-apart-in-evaluation"}
    assert names(BATCH, "batch-independent") - names(BATCH) == {"batch-size-does-not-matter"}
    assert names(BATCH, "foldable") - names(BATCH) == {"folded-equals-unfolded"}
    assert "training-compiles" in names(BATCH, "running-statistics", "compilable") - names(BATCH, "compilable")
    assert names(BATCH.model_copy(update={"kind": "analysis"}), "foldable") == set()
    assert names(BATCH.model_copy(update={"family": "parts/linears"}), "foldable") == set()


def test_every_check_of_norms_has_a_toy_that_it_catches() -> None:
    assert set(BROKEN) == set(NORMS) == {check.name for _, check in SOUND}
    assert NORMS.keys() <= {check.name for check in CHECKS}
