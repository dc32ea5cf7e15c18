"""What the checks run on: tiny models and tasks for procedures, tiny configurations of parts, random inputs.

Weights and data are random; nothing is trained.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft.bench.task import Inputs, Split, Task, call, take
from torchgraft.catalogue import Card
from torchgraft.contracts.check import Subject, require

__all__ = [
    "MODELS",
    "PARTICULAR",
    "Bare",
    "Case",
    "Guarded",
    "Guess",
    "build_part",
    "case",
    "cases_of",
    "draw_like",
    "output",
    "settings",
]

_CLASSES = 4


class Mlp(nn.Module):
    """Three equal hidden layers between two others."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs = nn.Linear(16, 32)
        self.hidden = nn.Sequential(*(nn.Sequential(nn.Linear(32, 32), nn.GELU()) for _ in range(3)))
        self.head = nn.Linear(32, _CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, 16) to (B, classes)."""
        out: Tensor = self.head(self.hidden(self.inputs(x).relu()))
        return out


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))))


class Cnn(nn.Module):
    """A residual network of three equal blocks, with batch norms whose running statistics are not the initial ones."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.blocks = nn.Sequential(*(_Block(16) for _ in range(3)))
        self.head = nn.Linear(16, _CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, 1, 8, 8) to (B, classes)."""
        out: Tensor = self.head(self.blocks(F.relu(self.norm(self.stem(x)))).mean((2, 3)))
        return out


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # each (B, H, T, K)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, -1)
        out: Tensor = self.proj(mixed)
        return out


class _Layer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = _Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 2 * width)
        self.fc2 = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        out: Tensor = x + self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return out


class Transformer(nn.Module):
    """Three pre-norm layers with a fused query, key and value projection."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 32)
        self.layers = nn.Sequential(*(_Layer(32, 4) for _ in range(3)))
        self.norm = nn.LayerNorm(32)
        self.head = nn.Linear(32, _CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, 6, 8) to (B, classes)."""
        out: Tensor = self.head(self.norm(self.layers(self.embed(x))).mean(1))
        return out


class Recurrent(nn.Module):
    """An LSTM of two layers and both directions, a GRU that takes time first, and a tanh RNN, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 16, num_layers=2, bidirectional=True, batch_first=True)
        self.gru = nn.GRU(32, 16)
        self.rnn = nn.RNN(16, 16, batch_first=True)
        self.head = nn.Linear(16, _CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, 6, 8) to (B, classes)."""
        both, _ = self.lstm(x)
        first, _ = self.gru(both.transpose(0, 1))
        states, _ = self.rnn(first.transpose(0, 1))
        out: Tensor = self.head(states.mean(1))
        return out


class _DecoderLayer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).chunk(3, -1)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v, is_causal=True))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class Decoder(nn.Module):
    """Two causal layers over twelve tokens, whose last gives the answer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 32)
        self.layers = nn.Sequential(*(_DecoderLayer(32) for _ in range(2)))
        self.norm = nn.LayerNorm(32)
        self.head = nn.Linear(32, _CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, 12, 8) to (B, classes)."""
        out: Tensor = self.head(self.norm(self.layers(self.embed(x))[:, -1]))
        return out


class Guess(nn.Module):
    """A model that calls another after a branch on its data, which no static trace can follow."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        """Call the inner model, twice where the inputs are large."""
        out: Tensor = self.inner(x)
        if bool(x.abs().max() > 1e6):
            out = out + self.inner(-x)
        return out


class Bare(nn.Module):
    """A model in which there is nothing to prune, factorise, quantise or skip."""

    def __init__(self) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.zeros(_CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, ...) to (B, classes)."""
        return self.offset + x.flatten(1).mean(1, keepdim=True)


class Guarded(Task):
    """A task that reports every look at its validation or test samples, and at its training samples on demand.

    Args:
        base: the task that is guarded.
        forbidden: names of the splits that may not be looked at.
    """

    def __init__(self, base: Task, forbidden: Sequence[str]) -> None:
        self.seen: list[str] = []
        self.forbidden: tuple[str, ...] = ()
        super().__init__(
            **{name: getattr(base, name) for name in ("model", "train", "val", "test", "loss", "score", "name")},
            batch_size=base.batch_size,
            example_inputs=base.example,
            weights=base.weights,
        )
        self.forbidden = tuple(forbidden)

    def __getattribute__(self, name: str) -> Any:
        if name in ("train", "val", "test") and name in object.__getattribute__(self, "forbidden"):
            object.__getattribute__(self, "seen").append(name)
        return super().__getattribute__(name)


@dataclass(frozen=True)
class Case:
    """A check model and its task.

    Args:
        name: the model's name in :data:`MODELS` or :data:`PARTICULAR`.
        build: ``build(seed)`` -> the architecture with random weights, in eval mode.
        task: random samples of its inputs.
    """

    name: str
    build: Callable[[int], nn.Module]
    task: Task

    @property
    def model(self) -> nn.Module:
        """A fresh copy of the model that is checked."""
        return self.build(0)

    @property
    def inputs(self) -> Inputs:
        """Samples that no procedure has seen."""
        return take(self.task.val.inputs, slice(8))


#: name -> (constructor, shape of one sample)
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (Mlp, (16,)),
    "cnn": (Cnn, (1, 8, 8)),
    "transformer": (Transformer, (6, 8)),
}
#: Check models of a kind that few procedures act on, each for the cards that name it: ``example={"model": ...}``.
PARTICULAR: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "recurrent": (Recurrent, (6, 8)),
    "decoder": (Decoder, (12, 8)),
}


def case(name: str) -> Case:
    """Return the check model ``name`` with its task.

    Example:
        >>> tiny = case("mlp")
        >>> output(tiny.model, tiny.inputs).shape
        torch.Size([8, 4])
    """
    make, shape = {**MODELS, **PARTICULAR}[name]

    def build(seed: int) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = make().eval()
            with torch.no_grad():
                for module in model.modules():
                    if isinstance(module, nn.BatchNorm2d):
                        module.running_mean = torch.randn_like(module.bias) * 0.2
                        module.running_var = 0.5 + torch.rand_like(module.bias)
                    if isinstance(module, nn.BatchNorm2d | nn.LayerNorm):
                        module.weight.uniform_(0.5, 1.5)
                        module.bias.uniform_(-0.3, 0.3)
        return model

    draw = torch.Generator().manual_seed(1)

    def split(count: int) -> Split:
        inputs = torch.randn(count, *shape, generator=draw)
        return Split(inputs, torch.randint(_CLASSES, (count,), generator=draw))

    task = Task(
        model=lambda: build(0),
        train=split(32),
        val=split(16),
        test=split(16),
        loss=F.cross_entropy,
        score=lambda out, target: (out.argmax(-1) == target).float(),
        name=f"check-{name}",
        batch_size=8,
    )
    return Case(name, build, task)


def cases_of(subject: Subject, applies: Callable[[nn.Module, Task], Sequence[Any]]) -> list[Case]:
    """Return the check models on which the subject has something to do, found out once.

    Args:
        subject: the procedure.
        applies: its ``applies_to``.
    """
    if "cases" not in subject.kept:
        cases = [case(name) for name in _names(subject.card)]
        subject.kept["cases"] = [tiny for tiny in cases if applies(tiny.model, tiny.task)]
    found: list[Case] = subject.kept["cases"]
    require(bool(found), f"{subject.card.key} applies to none of the check models {', '.join(_names(subject.card))}")
    return found


def _names(card: Card) -> list[str]:
    """Return the check models of a procedure: those for all, and one of :data:`PARTICULAR` where its card names it."""
    named = card.example.get("model")
    return [*MODELS, *(name for name in PARTICULAR if name == named)]


def settings(card: Card) -> dict[str, Any]:
    """Return the settings with which the procedure of ``card`` is built for checking (few training steps, say)."""
    return {name: value for name, value in card.example.items() if name != "model"}


def output(model: nn.Module, inputs: Inputs) -> Tensor:
    """Return what ``model`` says to ``inputs``, without gradients."""
    with torch.no_grad():
        out: Tensor = call(model, inputs)
    return out


def build_part(subject: Subject, *, seed: int = 0, dtype: torch.dtype = torch.float32, moved: bool = True) -> nn.Module:
    """Return the part in the tiny configuration of its card, in eval mode.

    Args:
        subject: the part.
        seed: of the initial values.
        dtype: of its parameters and buffers.
        moved: whether small random amounts are added to the parameters, so that no wrong term hides behind a zero or a
            one that it starts from.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        part = subject.entry(**settings(subject.card))
        require(isinstance(part, nn.Module), f"{subject.card.entry} makes a {type(part).__name__}, which is no Module")
        module: nn.Module = part.to(dtype).eval()
        if moved:
            with torch.no_grad():
                for value in module.parameters():
                    value.add_(0.02 * torch.randn_like(value))
    return module


def draw_like(subject: Subject, *sizes: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a random input of the first declared shape, its leading sizes replaced by ``sizes``."""
    require(bool(subject.card.shapes), f"the card of {subject.card.key} gives no input shape")
    shape = subject.card.shapes[0]
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(*sizes, *shape[len(sizes) :], generator=draw, dtype=torch.float64).to(dtype)
