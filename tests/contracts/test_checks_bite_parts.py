"""Each check of parts can fail: sound toys pass all of them, and for each there is a broken toy that it catches."""

from __future__ import annotations

import itertools
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft.catalogue import Card
from torchgraft.contracts import CHECKS, Check, Subject, checks_for, mixers, modules
from torchgraft.contracts.modules import evaluate
from torchgraft.contracts.run import run_check
from torchgraft.engines.recurrence.mixer import Mixer, State, StatefulMixer
from torchgraft.errors import BadInput
from torchgraft.parts.mixers import softmax_attention

FACTS: dict[str, Any] = {
    "key": "toy-mixer",
    "title": "A toy",
    "authors": "Nobody, 2026",
    "reference": "https://example.org/toy",
    "family": "parts/mixers",
    "kind": "part",
    "equation": "s_t = a s_{t-1} + g_t x_t",
    "entry": "Ema",
    "example": {"d_model": 8, "num_heads": 2},
    "shapes": ((2, 12, 8),),
    "oracles": ("none",),
    "choose_when": "never, it is a toy",
    "choose_instead": "anything else at all",
    "bibtex": "@misc{toy, title={A {T}oy}, author={Nobody}, year={2026}}",
}
STATEFUL = Card(
    **FACTS,
    capabilities=frozenset({"causal", "stateful", "linear-time", "compilable"}),
    declared={"parameters": "2*d_model**2 + num_heads"},
)
SET = Card(
    **{**FACTS, "entry": "Mean"},
    capabilities=frozenset({"linear-time", "permutation-equivariant", "compilable"}),
    declared={"parameters": "3*d_model**2"},
)


class Ema(StatefulMixer):
    """A gated moving average.

    Args:
        d_model: the width D.
        num_heads: how many decays there are.

    Shapes:
        x: (B, T, D) -> (B, T, D).

    Example:
        >>> Ema(8)(torch.randn(2, 5, 8)).shape
        torch.Size([2, 5, 8])
    """

    form: str = "auto"

    def __init__(self, d_model: int, *, num_heads: int = 2) -> None:
        super().__init__(d_model)
        if num_heads < 1 or d_model % num_heads:
            raise BadInput(f"num_heads must divide d_model = {d_model}, got {num_heads}")
        self.num_heads = num_heads
        self.gate = nn.Linear(d_model, d_model, bias=False)
        self.out = nn.Linear(d_model, d_model, bias=False)
        self.decay = nn.Parameter(torch.zeros(num_heads))
        self.register_buffer("scale", torch.tensor(0.5))

    def init_state(self, batch_size: int) -> State:
        return {"sum": self.decay.new_zeros(batch_size, self.d_model)}

    def update(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.gate(x)) * x * self.scale

    def read(self, sums: Tensor) -> Tensor:
        """Map (B, T, D) of running sums to the output."""
        return self.out(sums)

    def logs(self) -> Tensor:
        return F.logsigmoid(self.decay).repeat_interleave(self.d_model // self.num_heads)  # (D,)

    def kernel(self, tokens: int) -> Tensor:
        """Return how much of token s is left at token t, (T, T, D)."""
        place = torch.arange(tokens, device=self.decay.device)
        lag = (place[:, None] - place[None]).tril()
        return torch.exp(self.logs() * lag[..., None]) * torch.ones_like(lag).tril()[..., None]

    def prefill(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        x = self.checked(x)
        state = self.init_state(len(x)) if state is None else state
        update, last, sums = self.update(x).to(x.dtype), state["sum"], []
        if len(last) != len(x):
            raise BadInput(f"the state is of {len(last)} rows, the input of {len(x)}")
        chunk = {"step": 1, "parallel": x.shape[1]}.get(self.form, 64)
        for piece in update.split(max(chunk, 1), 1):
            kernel, size = self.kernel(piece.shape[1]).to(x.dtype), piece.shape[1]
            carried = torch.exp(self.logs() * torch.arange(1, size + 1, device=x.device)[:, None]).to(x.dtype)
            sums.append(torch.einsum("tsd,bsd->btd", kernel, piece).to(x.dtype) + carried * last[:, None])
            last = sums[-1][:, -1]
        return self.read(torch.cat(sums, 1)).to(x.dtype), {"sum": last.to(state["sum"].dtype)}


class Mean(Mixer):
    """Each token beside the mean of all.

    Args:
        d_model: the width D.
        num_heads: not used.

    Shapes:
        x: (B, T, D) -> (B, T, D).

    Example:
        >>> Mean(8)(torch.randn(2, 5, 8)).shape
        torch.Size([2, 5, 8])
    """

    causal = False

    def __init__(self, d_model: int, *, num_heads: int = 2) -> None:
        super().__init__(d_model)
        if num_heads < 1:
            raise BadInput(f"num_heads must be at least 1, got {num_heads}")
        self.own = nn.Linear(d_model, d_model, bias=False)
        self.key = nn.Linear(d_model, d_model, bias=False)
        self.value = nn.Linear(d_model, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.checked(x)
        weights = torch.softmax(self.key(x).float() if x.dtype == torch.bfloat16 else self.key(x), 1)
        return self.own(x) + (weights.to(x.dtype) * self.value(x)).sum(1, keepdim=True)


# --- broken ones: what an nn.Module promises


class ByPosition(Ema):
    def __init__(self, d_model: int = 8, num_heads: int = 2) -> None:
        super().__init__(d_model, num_heads=num_heads)


class NeedsMore(Ema):
    def __init__(self, d_model: int, *, num_heads: int) -> None:
        super().__init__(d_model, num_heads=num_heads)


class BornDouble(Ema):
    def __init__(self, d_model: int, *, num_heads: int = 2) -> None:
        super().__init__(d_model, num_heads=num_heads)
        self.decay = nn.Parameter(self.decay.detach().double())

    def to(self, *args: Any, **options: Any) -> BornDouble:
        return self


class WithoutShapes(Ema):
    """A gated moving average.

    Example:
        >>> 1 + 1
        2
    """


class WithoutExample(Ema):
    """A gated moving average.

    Shapes:
        x: (B, T, D) -> (B, T, D).
    """


class OneMoreWeight(Ema):
    def __init__(self, d_model: int, *, num_heads: int = 2) -> None:
        super().__init__(d_model, num_heads=num_heads)
        self.more = nn.Parameter(torch.zeros(1))


class SpeaksSingle(Ema):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).float()


class DependsOnDtype(Ema):
    def read(self, sums: Tensor) -> Tensor:
        return self.out(sums) * (1.1 if sums.dtype == torch.float64 else 1.0)


class LosesDigits(Ema):
    """Sums a large and a small number in the dtype of the input."""

    def update(self, x: Tensor) -> Tensor:
        return (super().update(x) + 30.0) - 30.0


class LosesDigitsInAutocast(Ema):
    def update(self, x: Tensor) -> Tensor:
        kept = super().update(x)
        return (kept.bfloat16() + 30.0 - 30.0).to(x.dtype) if torch.is_autocast_enabled("cpu") else kept


class DetachesGate(Ema):
    def update(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.gate(x)).detach() * x * self.scale


class WrongBackward(Ema):
    class _Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return 2 * grad

    def update(self, x: Tensor) -> Tensor:
        return self._Doubled.apply(super().update(x))


class NeedsWeightGradients(Ema):
    def update(self, x: Tensor) -> Tensor:
        kept = super().update(x)
        return kept if self.decay.requires_grad else kept.detach()


class HiddenWeight(Ema):
    """What decides the output is not in the state dict."""

    def __init__(self, d_model: int, *, num_heads: int = 2) -> None:
        super().__init__(d_model, num_heads=num_heads)
        self.hidden = torch.rand(d_model)

    def update(self, x: Tensor) -> Tensor:
        return super().update(x) * self.hidden.to(x)


class TransientBuffer(Ema):
    def __init__(self, d_model: int, *, num_heads: int = 2) -> None:
        super().__init__(d_model, num_heads=num_heads)
        self.register_buffer("drawn", torch.rand(d_model), persistent=False)

    def update(self, x: Tensor) -> Tensor:
        return super().update(x) * self.drawn


class ForgetsOnSaving(Ema):
    """Leaves a weight out of what it saves, and starts from another one."""

    def state_dict(self, *args: Any, **options: Any) -> Any:
        found = super().state_dict(*args, **options)
        found["out.weight"] = found["out.weight"].double() if isinstance(found["out.weight"], Tensor) else 0
        return {
            name: value.half() if name == "out.weight" and next(_SAVES) % 2 else value for name, value in found.items()
        }


_SAVES = itertools.count(1)


class Shared(Ema):
    """Copies share the gate with the first."""

    def __deepcopy__(self, memo: Any) -> Shared:
        twin = type(self)(self.d_model, num_heads=self.num_heads)
        twin.load_state_dict(self.state_dict())
        twin.gate = self.gate
        return twin.eval()


class Noisy(Ema):
    def update(self, x: Tensor) -> Tensor:
        return super().update(x) * (1 + 1e-3 * torch.rand(()))


class OtherInInference(Ema):
    def read(self, sums: Tensor) -> Tensor:
        return super().read(sums) * (1.01 if torch.is_grad_enabled() else 1.0)


class OwnNoise(Ema):
    """Draws from a generator that no seed resets."""

    def update(self, x: Tensor) -> Tensor:
        draw = torch.Generator().manual_seed(next(_SAVES))
        noise = torch.rand(x.shape, generator=draw).to(x) if self.training else 0.0
        return super().update(x) + noise


class WritesInput(Ema):
    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        if not x.requires_grad:
            x.mul_(1.5)
        return out


class DrawsGlobally(Ema):
    def forward(self, x: Tensor) -> Tensor:
        torch.rand(1)
        return super().forward(x)


class CountsCalls(Ema):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.scale.add_(1e-3)
        return super().forward(x)


class FailsOnNone(Ema):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if len(x) else x[:, :1]


class NansOnNone(Ema):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.decay.sum() ** (0.0 if len(x) else 1) + (
            0 if len(x) else self.decay.sum() / 0.0
        )


class ReadsMemory(Ema):
    """Takes the order in memory for the order of tokens."""

    def forward(self, x: Tensor) -> Tensor:
        plain = x if x.is_contiguous() else x.as_strided(x.shape, torch.empty(x.shape).stride())
        return super().forward(plain)


class TakesAnyShape(Ema):
    def checked(self, x: Tensor) -> Tensor:
        return F.pad(x, (0, self.d_model - x.shape[-1])).reshape(-1, x.shape[-2], self.d_model)


class TakesIntegers(Ema):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.is_floating_point() else x.float())


class TorchComplains(Ema):
    def checked(self, x: Tensor) -> Tensor:
        return x


class TakesAnySize(Ema):
    def __init__(self, d_model: int, *, num_heads: int = 2) -> None:
        super().__init__(max(d_model, 8), num_heads=max(num_heads, 1))


class DividesByNorm(Ema):
    def update(self, x: Tensor) -> Tensor:
        return super().update(x) / x.norm(dim=-1, keepdim=True)


class Overflows(Ema):
    def update(self, x: Tensor) -> Tensor:
        return super().update(x) * torch.exp(x.abs().amax(-1, keepdim=True))


class BranchesOnData(Ema):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if bool(x.sum() < 1e9) else x


class OtherWhenCompiled(Ema):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (2.0 if torch.compiler.is_compiling() else 1.0)


class TransientWeight(Ema):
    """Saves under other names than it has."""

    def state_dict(self, *args: Any, **options: Any) -> Any:
        return {f"toy.{name}": value for name, value in super().state_dict(*args, **options).items()}


class StaysOnTheCpu(Ema):
    def update(self, x: Tensor) -> Tensor:
        return super().update(x) + torch.zeros(self.d_model)


# --- broken ones: what a mixer promises


class DropsShort(Ema):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[:, : 30 if x.shape[1] == 31 else None]


class SeesOtherRows(Ema):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1e-3 * x.mean(0, keepdim=True)


class Alone(Ema):
    def prefill(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        return self.read(self.update(self.checked(x))), self.init_state(len(x))


class PacksTogether(Ema):
    def packed(self, x: Tensor, cu_seqlens: Tensor) -> Tensor:
        return self.forward(x)


class PacksAnything(Ema):
    def packed(self, x: Tensor, cu_seqlens: Tensor) -> Tensor:
        ends = torch.cat([cu_seqlens[:-1], torch.tensor([x.shape[1]])])
        return super().packed(x, ends)


class LooksAhead(Ema):
    """Normalises by a statistic of the whole sequence."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / (1 + 1e-3 * x.square().mean((1, 2), keepdim=True))


class SaysNotCausal(Ema):
    def __init__(self, d_model: int, *, num_heads: int = 2) -> None:
        super().__init__(d_model, num_heads=num_heads)
        self.causal = False


class LeaksGradient(Ema):
    """Its values are causal, the derivative is not."""

    def forward(self, x: Tensor) -> Tensor:
        ahead = x.roll(-1, 1)
        return super().forward(x) + 1e-3 * (ahead - ahead.detach())


class CountsTokens(Ema):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1 + 1e-4 * x.shape[1])


class KeepsOrder(Mean):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1e-4 * torch.arange(x.shape[1], dtype=x.dtype, device=x.device)[:, None]


class CausalMean(Mean):
    def forward(self, x: Tensor) -> Tensor:
        return self.own(x) + self.value(x).cumsum(1)


class SaysCausalMean(Mean):
    causal = True


class StartsElsewhere(Ema):
    def init_state(self, batch_size: int) -> State:
        return {"sum": self.decay.new_ones(batch_size, self.d_model)}

    def prefill(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        return super().prefill(x, {"sum": self.decay.new_zeros(len(x), self.d_model)} if state is None else state)


class OtherForward(Ema):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 1.001


class ForgetsAtCuts(Ema):
    def prefill(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        y, state = super().prefill(x, state)
        return y, {"sum": state["sum"] * (1 - 1e-6)}


class CutsGradientAtCuts(Ema):
    def prefill(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        y, state = super().prefill(x, state)
        return y, {"sum": state["sum"] if x.shape[1] > 100 else state["sum"].detach()}


class OtherStep(Ema):
    def step(self, x_t: Tensor, state: State) -> tuple[Tensor, State]:
        y, state = super().step(x_t, state)
        return y * (1 + 1e-7), state


class DetachedStep(Ema):
    def step(self, x_t: Tensor, state: State) -> tuple[Tensor, State]:
        return super().step(x_t, {"sum": state["sum"].detach()})


class OtherChunk(Ema):
    def update(self, x: Tensor) -> Tensor:
        return super().update(x) * (1 + 1e-7 * (self.form == "chunk"))


class OtherParallelGradient(Ema):
    def update(self, x: Tensor) -> Tensor:
        return super().update(x if self.form != "parallel" else 2 * x - x.detach())


class StateTurnsDouble(Ema):
    def prefill(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        y, after = super().prefill(x, None if state is None else {"sum": state["sum"].to(x.dtype)})
        return y, {"sum": after["sum"].double()}


class BatchLast(Ema):
    def init_state(self, batch_size: int) -> State:
        return {"sum": super().init_state(batch_size)["sum"].T}

    def prefill(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        y, state = super().prefill(x, None if state is None else {"sum": state["sum"].T})
        return y, {"sum": state["sum"].T}


class WritesState(Ema):
    def prefill(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        y, after = super().prefill(x, state)
        if state is not None and not torch.is_grad_enabled():
            state["sum"].copy_(after["sum"])
        return y, after


class SharesBuffer(Ema):
    """The states of two continuations lie in one buffer."""

    def step(self, x_t: Tensor, state: State) -> tuple[Tensor, State]:
        y, after = super().step(x_t, state)
        if not hasattr(self, "place") or self.place[0].shape != after["sum"].shape:
            self.place = [torch.zeros_like(after["sum"])]
        return y, {"sum": self.place[0].copy_(after["sum"])}


class RemembersByItself(Ema):
    """Part of the state is kept in the mixer."""

    def prefill(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        y, after = super().prefill(x, state)
        before = getattr(self, "kept", [0.0])[0] if state is not None else 0.0
        self.kept = [y[:, -1:].detach().mean()]
        return y + before, after


class RowsByNumber(Ema):
    """Each row of the batch has its own rule."""

    def prefill(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        y, state = super().prefill(x, state)
        return y, {"sum": state["sum"] + torch.arange(len(x), dtype=x.dtype)[:, None]}


class BroadcastsState(Ema):
    def prefill(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        return super().prefill(x, None if state is None else {"sum": state["sum"][: len(x)]})


class ForgivesEmptyState(Ema):
    def prefill(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        return super().prefill(x, state or None)


class TakesLongStep(Ema):
    def step(self, x_t: Tensor, state: State) -> tuple[Tensor, State]:
        if x_t.shape[-1] != self.d_model:
            raise BadInput(f"x_t must have width {self.d_model}, got {x_t.shape[-1]}")
        return self.prefill(x_t.reshape(len(x_t), -1, self.d_model), state)


class OtherStepInHalf(Ema):
    def step(self, x_t: Tensor, state: State) -> tuple[Tensor, State]:
        y, state = super().step(x_t, state)
        half = x_t.dtype == torch.bfloat16 or torch.is_autocast_enabled("cpu")
        return y * (1.2 if half else 1.0), state


class GrowsState(Ema):
    """Keeps every token it has seen."""

    def init_state(self, batch_size: int) -> State:
        return {**super().init_state(batch_size), "seen": self.decay.new_zeros(batch_size, 0, self.d_model)}

    def prefill(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        state = self.init_state(len(x)) if state is None else state
        y, after = super().prefill(x, state)
        return y, {**after, "seen": torch.cat([state["seen"], x], 1)}


class Quadratic(Ema):
    """All pairs of tokens at once."""

    def __init__(self, d_model: int, *, num_heads: int = 2) -> None:
        super().__init__(d_model, num_heads=num_heads)
        self.plain = True

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1e-9 * ((x @ x.mT).tril() @ x)


class KeepsSquare(Ema):
    """Keeps a matrix of all pairs for the backward pass."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1e-9 * torch.sigmoid(x @ x.mT).sum(-1, keepdim=True)


class GrowsWithoutBound(Ema):
    def logs(self) -> Tensor:
        return 0.05 - 0.01 * super().logs()


#: check name -> the toys that it must catch.
BROKEN: dict[str, tuple[type[nn.Module], ...]] = {
    "part-is-what-the-card-says": (ByPosition, NeedsMore, BornDouble),
    "shapes-are-documented": (WithoutShapes, WithoutExample),
    "declared-numbers-are-true": (OneMoreWeight,),
    "double-precision-agrees": (SpeaksSingle, DependsOnDtype),
    "bfloat16-is-near-float32": (SpeaksSingle, LosesDigits),
    "autocast-is-near-float32": (LosesDigitsInAutocast,),
    "every-parameter-gets-a-gradient": (OneMoreWeight, DetachesGate),
    "gradients-are-the-derivatives": (WrongBackward, DetachesGate),
    "frozen-parameters-stay-out": (NeedsWeightGradients,),
    "weights-load-into-another": (HiddenWeight, TransientBuffer),
    "weights-pass-through-safetensors": (ForgetsOnSaving,),
    "deepcopy-is-equal-and-apart": (Shared,),
    "tensors-are-registered": (HiddenWeight,),
    "same-input-gives-the-same-output": (Noisy, OtherInInference),
    "training-repeats-with-the-seed": (OwnNoise,),
    "surroundings-stay": (WritesInput, DrawsGlobally, CountsCalls),
    "batch-of-none-and-one": (FailsOnNone, NansOnNone),
    "memory-layout-does-not-matter": (ReadsMemory,),
    "wrong-shape-is-refused": (TakesAnyShape, TorchComplains),
    "integers-are-refused": (TakesIntegers, TorchComplains),
    "bad-settings-are-refused": (TakesAnySize,),
    "extremes-stay-finite": (DividesByNorm, Overflows),
    "compiles-without-breaks": (BranchesOnData, OtherWhenCompiled),
    "exports-to-a-graph": (BranchesOnData, OtherWhenCompiled, TransientWeight),
    "runs-on-another-device": (StaysOnTheCpu,),
    "mixer-keeps-the-shape": (DropsShort,),
    "rows-do-not-see-each-other": (SeesOtherRows,),
    "tokens-see-each-other": (Alone,),
    "packed-equals-each-alone": (PacksTogether, PacksAnything),
    "future-is-not-seen": (LooksAhead, SaysNotCausal),
    "future-gets-no-gradient": (LooksAhead, LeaksGradient),
    "padding-does-not-matter": (CountsTokens,),
    "future-is-seen-where-not-causal": (CausalMean, SaysCausalMean),
    "order-does-not-matter": (KeepsOrder,),
    "forms-agree": (OtherChunk, OtherParallelGradient),
    "prefill-is-forward": (StartsElsewhere, OtherForward),
    "split-anywhere-equals-whole": (ForgetsAtCuts, CutsGradientAtCuts),
    "steps-equal-forward": (OtherStep, DetachedStep),
    "state-keeps-its-form": (StateTurnsDouble, BatchLast),
    "state-is-not-changed": (WritesState, SharesBuffer, RemembersByItself),
    "state-can-be-kept-and-sorted": (RowsByNumber,),
    "wrong-state-is-refused": (BroadcastsState, ForgivesEmptyState, TakesLongStep),
    "steps-work-in-bfloat16": (OtherStepInHalf,),
    "state-does-not-grow": (GrowsState,),
    "work-grows-linearly": (Quadratic,),
    "kept-memory-grows-linearly": (KeepsSquare,),
    "long-extreme-input-stays-finite": (GrowsWithoutBound,),
}

PARTS: dict[str, Check] = {check.name: check for check in (*modules.CHECKS, *mixers.CHECKS)}
#: What only a set promises, and what it does not.
_SET_ONLY = {"future-is-seen-where-not-causal", "order-does-not-matter"}
_OF_SETS = [name for name, check in PARTS.items() if name != "forms-agree" and check.applies(SET)]


def subject(toy: type[nn.Module], **facts: Any) -> Subject:
    """Return ``toy`` as something that can be checked."""
    card = SET if issubclass(toy, Mean) else STATEFUL
    return Subject(card=card.model_copy(update=facts), entry=toy, module=types.ModuleType("toy"))


@pytest.mark.parametrize("name", [name for name in PARTS if name not in _SET_ONLY])
def test_sound_recurrence_passes(name: str) -> None:
    result = run_check(PARTS[name], subject(Ema))
    assert result.outcome == "passed", result.reason


@pytest.mark.parametrize("name", _OF_SETS)
def test_sound_set_passes(name: str) -> None:
    result = run_check(PARTS[name], subject(Mean))
    assert result.outcome == "passed", result.reason


@pytest.mark.parametrize(("name", "toy"), [(name, toy) for name, toys in BROKEN.items() for toy in toys])
def test_broken_part_is_caught(name: str, toy: type[nn.Module]) -> None:
    result = run_check(PARTS[name], subject(toy))
    assert result.outcome == "failed"
    assert "(at " not in result.reason, f"the toy crashed instead of failing the check: {result.reason}"


@pytest.mark.parametrize(
    "facts",
    [
        {"declared": {"parameters": "3*d_model"}},
        {"declared": {}},
        {"declared": {"parameters": "2*d_model**2 + num_heads", "speed": 3.0}},
    ],
)
def test_false_declaration_is_caught(facts: dict[str, Any]) -> None:
    result = run_check(PARTS["declared-numbers-are-true"], subject(Ema, **facts))
    assert result.outcome == "failed"
    assert "(at " not in result.reason


def test_mixer_of_another_class_is_caught() -> None:
    result = run_check(PARTS["steps-equal-forward"], subject(Mean))
    assert result.outcome == "failed"
    assert "no StatefulMixer" in result.reason


@pytest.mark.parametrize(
    ("formula", "value"),
    [
        ("3 * n**2 + n // 2", 50),
        ("n if wide else 2", 4),
        ("n * (n > 3) + min(n, 1)", 5),
        ("n if kind == 'a' else -n", 4),
        (7, 7),
    ],
)
def test_formula_is_evaluated(formula: str | float, value: int) -> None:
    assert evaluate(formula, {"n": 4, "wide": True, "kind": "a"}) == value


def test_checks_follow_from_capabilities() -> None:
    card = softmax_attention.CARD

    def names(*capabilities: str) -> set[str]:
        promised = checks_for(card.model_copy(update={"capabilities": frozenset(capabilities)}))
        return {check.name for check in promised}

    assert names("causal") ^ names() == {
        "future-is-not-seen",
        "future-gets-no-gradient",
        "padding-does-not-matter",
        "future-is-seen-where-not-causal",
    }
    assert "state-does-not-grow" in names("stateful", "linear-time") - names("stateful") - names("linear-time")
    assert "steps-equal-forward" in names("stateful") - names("linear-time")
    assert "work-grows-linearly" in names("linear-time") - names("stateful")
    assert names("permutation-equivariant") - names() == {"order-does-not-matter"}
    assert "forms-agree" not in names("causal", "stateful", "linear-time", "compilable")
    modules_only = checks_for(card.model_copy(update={"kind": "analysis"}))
    assert not PARTS.keys() & {check.name for check in modules_only}


@pytest.mark.parametrize("formula", ["n +", "a = 1", "1; 2"])
def test_formula_that_is_no_expression_is_refused(formula: str) -> None:
    with pytest.raises(BadInput, match="one expression"):
        evaluate(formula, {"n": 4})


@pytest.mark.parametrize("formula", ["n.real", "print(n)", "[n][0]", "missing + 1", "(lambda: 1)()", "int(x=1)"])
def test_formula_that_is_not_arithmetic_is_refused(formula: str) -> None:
    with pytest.raises(BadInput, match="arithmetic"):
        evaluate(formula, {"n": 4})


@pytest.mark.parametrize(("family", "good"), [("shrink/prune", True), ("parts/blocks", True), ("parts/mixers", False)])
def test_parts_of_another_room_may_be_imported(family: str, good: bool, tmp_path: Path) -> None:
    path = tmp_path / "toy.py"
    path.write_text("from torchgraft.parts.mixers.softmax_attention import SoftmaxAttention\n")
    module = types.ModuleType("toy")
    module.__file__ = str(path)
    check = next(check for check in CHECKS if check.name == "module-stands-alone")
    result = run_check(check, Subject(STATEFUL.model_copy(update={"family": family}), Ema, module))
    assert (result.outcome == "passed") is good, result.reason
    assert "(at " not in result.reason


def test_every_check_of_parts_has_a_toy_that_it_catches() -> None:
    assert set(BROKEN) == set(PARTS)
    assert PARTS.keys() <= {check.name for check in CHECKS}
