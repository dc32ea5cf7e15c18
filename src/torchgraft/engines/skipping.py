"""Blocks that run or not by sample, as routers say, and second weights for the budgets below the full one.

What a router decides holds for all tokens of a sample. Samples that skip a block are not in the batch that it sees.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft.bench.meters import macs
from torchgraft.bench.meters.forward import resting
from torchgraft.bench.task import Inputs, call, take
from torchgraft.engines.depth import stacks
from torchgraft.engines.nesting import ElasticModule
from torchgraft.engines.routing import run_rows, solve_falling
from torchgraft.engines.sites import Refusal, ignored
from torchgraft.engines.surgery.edits import Edit
from torchgraft.engines.surgery.swap import replace_module
from torchgraft.engines.taps import record

__all__ = ["AddRouters", "FoldedLinear", "RoutedBlock", "RoutedModel", "calibrate_routers", "router_edit", "skippable"]


class RoutedBlock(nn.Module):
    """A block and its router.

    Args:
        block: takes a tensor of samples and returns one of that shape.
        width: features of a token.
        dim: where the features stand, 1 or -1.
        levels: how many thresholds there are.
        prompt: how many of the first tokens decide; 0: all.
        bias: b of the router at the start.
    """

    def __init__(self, block: nn.Module, width: int, *, dim: int, levels: int, prompt: int, bias: float) -> None:
        super().__init__()
        self.block = block
        self.router = nn.Linear(width, 1)
        nn.init.normal_(self.router.weight, std=0.02)
        nn.init.constant_(self.router.bias, bias)
        self.thresholds: Tensor
        self.register_buffer("thresholds", torch.full((levels,), 0.5, dtype=torch.float64))
        self.dim, self.prompt = dim, prompt
        #: Index of the threshold; ``None``: the block runs and nobody asks the router.
        self.level: int | None = None
        #: A decision for all samples, or for each, in place of the router's.
        self.forced: bool | Tensor | None = None
        #: Whether gates scale the block's change, token by token, in place of deciding.
        self.soft = False
        #: Gates of the latest soft call, and decisions of the latest hard one, by sample.
        self.gates: Tensor | None = None
        self.ran: Tensor | None = None

    def scores(self, x: Tensor) -> Tensor:
        """Return the mean gate over the tokens that decide, (B, ...) -> (B,), in float64."""
        tokens = x.movedim(self.dim, -1).reshape(len(x), -1, x.shape[self.dim])  # (B, T, D)
        deciding = tokens[:, : self.prompt] if self.prompt else tokens
        return torch.sigmoid(self.router(deciding)[..., 0].double()).mean(1)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Run the block on the samples that are to have it; the others stay what they are."""
        if self.level is None:
            return self._run(x, args, kwargs)
        if self.soft:
            gates = torch.sigmoid(self.router(x.movedim(self.dim, -1)))  # (B, ..., 1)
            self.gates = gates
            gate = gates.movedim(-1, self.dim)
            return gate * self._run(x, args, kwargs) + (1 - gate) * x
        if self.forced is None:
            keep = self.scores(x.detach()) >= self.thresholds[self.level]
        else:
            keep = torch.as_tensor(self.forced, device=x.device).expand(len(x))
        self.gates, self.ran = None, keep.detach()
        return run_rows(x, keep, lambda rows: self._run(rows, args, kwargs))

    def _run(self, x: Tensor, args: Any, kwargs: Any) -> Tensor:
        out: Tensor = self.block(x, *args, **kwargs)
        return out


class FoldedLinear(nn.Module):
    """A linear layer with a second weight, W + B A, that is used where ``active``.

    Args:
        layer: the original, which stays as it is.
        rank: of B A.
    """

    def __init__(self, layer: nn.Linear, rank: int) -> None:
        super().__init__()
        self.layer = layer
        self.low = nn.Parameter(torch.randn(rank, layer.in_features).to(layer.weight) * layer.in_features**-0.5)
        self.high = nn.Parameter(layer.weight.new_zeros(layer.out_features, rank))
        self.folded: Tensor
        self.register_buffer("folded", layer.weight.detach().clone())
        self.active = False
        #: Whether B A is added at every call, so that it can be trained.
        self.open = False

    def forward(self, x: Tensor) -> Tensor:
        """Apply one of the two weights."""
        if not self.active:
            out: Tensor = self.layer(x)
            return out
        weight = self.layer.weight + self.high @ self.low if self.open else self.folded
        return F.linear(x, weight, self.layer.bias)

    def fold(self) -> None:
        """Write W + B A where smaller budgets look for it."""
        with torch.no_grad():
            self.folded.copy_(self.layer.weight + self.high @ self.low)


class RoutedModel(ElasticModule):
    """A model whose blocks have routers, and thresholds for each budget.

    Args:
        model: the model, its blocks replaced by :class:`RoutedBlock`.
        wanted: rising shares, in (0, 1), of the blocks' cost; one budget each, and the full one.
    """

    by_sample: ClassVar[bool] = True

    def __init__(self, model: nn.Module, wanted: Sequence[float]) -> None:
        super().__init__((*wanted, 1.0))
        self.model = model
        self.wanted = tuple(wanted)

    @property
    def blocks(self) -> list[RoutedBlock]:
        """The routed blocks, first to last."""
        return [module for module in self.model.modules() if isinstance(module, RoutedBlock)]

    @property
    def adapters(self) -> list[FoldedLinear]:
        """The linear layers with a second weight."""
        return [module for module in self.model.modules() if isinstance(module, FoldedLinear)]

    def select(self, level: int) -> None:
        """Run everything as it was at the last level; routers and second weights below it."""
        full = level == len(self.wanted)
        for block in self.blocks:
            block.level = None if full else level
        for adapter in self.adapters:
            adapter.active = not full

    def force(self, decisions: Sequence[bool | Tensor] | None) -> None:
        """Decide for the routers, block by block; ``None`` lets them decide again."""
        for place, block in enumerate(self.blocks):
            block.forced = None if decisions is None else decisions[place]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model at the budget that is set."""
        return self.model(*args, **kwargs)


class AddRouters(Edit):
    """Give blocks routers, and the linear layers inside a second weight.

    Args:
        names: dotted names of the blocks.
        widths: features of a token of each.
        dims: where the features stand.
        wanted: as for :class:`RoutedModel`.
        prompt: as for :class:`RoutedBlock`.
        rank: of the second weights' difference; 0 for none.
        bias: of the routers at the start.
    """

    op: ClassVar[str] = "add-routers"
    names: tuple[str, ...] = Field(min_length=1)
    widths: tuple[int, ...]
    dims: tuple[int, ...]
    wanted: tuple[float, ...] = Field(min_length=1)
    prompt: int = Field(ge=0)
    rank: int = Field(ge=0)
    bias: float

    def rewrite(self, model: nn.Module) -> nn.Module:
        """Wrap each block, and the linear layers in it."""
        anchor = next(model.parameters())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            for name, width, dim in zip(self.names, self.widths, self.dims, strict=True):
                block = model.get_submodule(name)
                inside = [each for each, module in block.named_modules() if type(module) is nn.Linear and each]
                for each in inside if self.rank else ():
                    layer: Any = block.get_submodule(each)
                    replace_module(block, each, FoldedLinear(layer, self.rank).eval())
                routed = RoutedBlock(block, width, dim=dim, levels=len(self.wanted), prompt=self.prompt, bias=self.bias)
                routed.router.to(anchor)
                replace_module(model, name, routed.eval())
        return RoutedModel(model, self.wanted)

    def describe(self) -> dict[str, str]:
        """Return that each block may be skipped."""
        return dict.fromkeys(self.names, "runs where its router says so")


def skippable(
    model: nn.Module, example: Inputs, ignore: Sequence[str], refused: list[Refusal] | None = None
) -> dict[str, tuple[int, int]]:
    """Return (width, where the features stand) of the blocks that can be skipped by sample."""
    names = [
        name
        for stack in stacks(model, example)
        for name in stack.blocks
        if not any(
            ignored(f"{name}.{inner}".rstrip("."), ignore) for inner, _ in model.get_submodule(name).named_modules()
        )
    ]
    if not names:
        return {}
    with resting(model), record(model, names, "input") as taken, record(model, names) as given, torch.no_grad():
        call(model, example)
    found: dict[str, tuple[int, int]] = {}
    for name in names:
        values = taken[name]
        values = list(values.values()) if isinstance(values, dict) else values
        first, *others = [values] if isinstance(values, Tensor) else list(values)
        plain = isinstance(first, Tensor) and first.ndim >= 2 and isinstance(given[name], Tensor)
        if plain and not any(isinstance(other, Tensor) for other in others):
            convolves = any(isinstance(module, nn.Conv2d) for module in model.get_submodule(name).modules())
            dim = 1 if convolves and first.ndim == 4 else -1
            found[name] = (first.shape[dim], dim)
        elif refused is not None:
            refused.append(Refusal(name, "it takes other tensors beside the hidden state, or returns several"))
    return found


def router_edit(
    found: dict[str, tuple[int, int]], wanted: Sequence[float], prompt: int, rank: int, init_keep: bool
) -> AddRouters:
    """Return the edit that gives the blocks that :func:`skippable` found their routers."""
    widths, dims = zip(*found.values(), strict=True)
    bias = 2.0 if init_keep else 0.0
    return AddRouters(
        names=tuple(found), widths=widths, dims=dims, wanted=tuple(wanted), prompt=prompt, rank=rank, bias=bias
    )


@torch.no_grad()
def calibrate_routers(model: RoutedModel, inputs: Inputs) -> None:
    """Find the threshold of each budget on samples, and declare the multiply-accumulates that are then counted.

    Args:
        model: the model; left at its full budget.
        inputs: training samples; thresholds are found on the first 128.
    """
    blocks = model.blocks
    few = take(inputs, slice(128))
    whole, full = macs(model.set_budget(1.0), inputs), macs(model, few)
    model.select(0)
    model.force([False] * len(blocks))
    rest = macs(model, few)
    costs = []
    for place in range(len(blocks)):
        model.force([other == place for other in range(len(blocks))])
        costs.append(macs(model, few) - rest)
    model.force(None)
    asked = _routing_macs(model, few)

    def spent(threshold: float, level: int) -> float:
        for block in blocks:
            block.thresholds[level] = threshold
        model.select(level)
        call(model, few)
        shares = [float(block.ran.double().mean()) for block in blocks if block.ran is not None]
        return sum(cost * share for cost, share in zip(costs, shares, strict=True))

    most = min(float(sum(costs)), full - rest - asked)
    shares: list[float] = []
    for level, share in enumerate(model.wanted):
        best = solve_falling(lambda at: spent(at, level), share * most, low=0.0, high=1.0, steps=30)  # noqa: B023
        for block in blocks:
            block.thresholds[level] = best
        model.select(level)
        shares.append(macs(model, inputs) / whole)
    model.declare(shares)
    model.set_budget(1.0)


def _routing_macs(model: RoutedModel, inputs: Inputs) -> int:
    """Return what asking all routers costs."""
    for block in model.blocks:
        block.thresholds[0] = 2.0  # none runs
    model.select(0)
    asked = macs(model, inputs)
    model.force([False] * len(model.blocks))
    silent = macs(model, inputs)
    model.force(None)
    return asked - silent
