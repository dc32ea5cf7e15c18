"""A family of networks joined at their layers: run the beginning of one, a linear map, and the end of another.

Any network with a stack of layers (``engines.depth``) can take part. It is entered and left while its own forward pass
runs: a block that leaves hands over what it made and ends the pass, a block that enters puts what it was given in the
place of its input. So what stands before the stack of the entered network runs too, and is counted.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from torchgraft.bench.meters.forward import resting
from torchgraft.bench.task import Inputs, call
from torchgraft.engines.depth import Stack, container_of, set_children
from torchgraft.engines.nesting.elastic import ElasticModule
from torchgraft.engines.surgery.edits import Edit, edit_from_record
from torchgraft.errors import BadInput

__all__ = [
    "Route",
    "Stitch",
    "Stitched",
    "StitchedElastic",
    "blocks_of",
    "channel_dim",
    "layer_outputs",
    "least_squares",
    "standing",
    "windows",
]


@dataclasses.dataclass(frozen=True)
class Route:
    """Layers 1 to ``left`` of anchor ``front``, the map ``stitch``, then ``end`` from layer ``entered`` + 1 on."""

    front: int
    end: int
    left: int
    entered: int
    stitch: str


def windows(fronts: int, ends: int, *, kernel: int = 2, stride: int = 1) -> list[list[tuple[int, int]]]:
    """Return for each window the pairs (layers run of the front, layers skipped of the end) that it joins.

    Windows slide over the layers of the end; those of the front are at the same share of its depth. A pair stands in
    the first window that holds it; at least one layer of either network runs.

    Args:
        fronts: layers of the front network.
        ends: layers of the end network.
        kernel: layers a window.
        stride: layers from one window to the next.

    Example:
        >>> windows(3, 3, kernel=2)
        [[(1, 1), (1, 2), (2, 1), (2, 2)], [(3, 2)]]

    Raises:
        BadInput: a number is below 1.
    """
    if min(fronts, ends, kernel, stride) < 1:
        raise BadInput(f"windows need numbers of at least 1, got {fronts}, {ends}, {kernel}, {stride}")
    seen: set[tuple[int, int]] = set()
    found = []
    for start in range(1, max(ends - kernel, 0) + 2, stride):
        places = range(start, min(start + kernel, ends + 1))
        lefts = sorted({min(max(round(place * fronts / ends), 1), fronts) for place in places})
        pairs = [(left, place) for left in lefts for place in places if place < ends and (left, place) not in seen]
        seen.update(pairs)
        if pairs:
            found.append(pairs)
    return found


def least_squares(x: Tensor, y: Tensor, *, rcond: float = 1e-6) -> tuple[Tensor, Tensor]:
    """Return weight (E, D) and bias (E,) of the map of least squared error from rows of ``x`` to rows of ``y``.

    Of many such maps it is the one of least norm.

    Shapes:
        x (N, D), y (N, E)
    """
    wide = torch.cat([x.double(), torch.ones(len(x), 1, dtype=torch.float64, device=x.device)], 1)
    solution = torch.linalg.pinv(wide, rcond=rcond) @ y.double()  # (D + 1, E)
    return solution[:-1].T.to(x.dtype), solution[-1].to(x.dtype)


class _Reached(Exception):  # it reports no error: the pass ends where it was to end
    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


class _Leave(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        raise _Reached(self.block(*args, **kwargs))


class _Enter(nn.Module):
    def __init__(self, block: nn.Module, hidden: Tensor) -> None:
        super().__init__()
        self.block, self.hidden = block, hidden

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if args:
            return self.block(self.hidden, *args[1:], **kwargs)
        return self.block(**{**kwargs, next(iter(kwargs)): self.hidden})


@contextmanager
def standing(model: nn.Module, stack: Stack, blocks: Sequence[nn.Module], *, rest: bool) -> Iterator[None]:
    """Let ``blocks`` stand for those of the stack, followed by what follows it where ``rest``."""
    container = container_of(model, stack.name)
    children = list(container)
    after = children[stack.first + stack.length :] if rest else []
    try:
        set_children(container, [*children[: stack.first], *blocks, *after])
        yield
    finally:
        set_children(container, children)


def blocks_of(model: nn.Module, stack: Stack) -> list[nn.Module]:
    """Return the blocks of ``stack``."""
    return list(container_of(model, stack.name))[stack.first : stack.first + stack.length]


def layer_outputs(model: nn.Module, stack: Stack, inputs: Inputs) -> list[Tensor]:
    """Return what every layer of the stack makes of ``inputs``, in eval mode and without gradients.

    Raises:
        BadInput: a layer returns no plain tensor.
    """
    found: list[Any] = []
    handles = [
        block.register_forward_hook(lambda module, args, output: found.append(output))
        for block in blocks_of(model, stack)
    ]
    try:
        with resting(model), torch.no_grad():
            call(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    if not all(isinstance(value, Tensor) for value in found):
        raise BadInput(f"the layers of {stack.name!r} do not return plain tensors, so nothing can be stitched there")
    return found


def channel_dim(hidden: Tensor) -> int:
    """Return the dimension that a stitch maps: 1 of images (B, C, h, w), else the last."""
    return 1 if hidden.ndim == 4 else -1


class Stitched(nn.Module):
    """Anchors and the routes between them; :meth:`use` chooses which runs.

    Args:
        anchors: networks of one task, small to large; taken over, not copied.
        stacks: the stack of each anchor whose layers are joined.
        routes: how they are joined.
        sizes: by stitch, the channels that it takes and makes.
        channels: the dimension that stitches map.

    The configs are the anchors, in order, then the routes.
    """

    config: int

    def __init__(
        self,
        anchors: Sequence[nn.Module],
        stacks: Sequence[Stack],
        routes: Sequence[Route],
        sizes: dict[str, tuple[int, int]],
        channels: int = -1,
    ) -> None:
        super().__init__()
        self.anchors = nn.ModuleList(anchors)
        self.stacks = tuple(stacks)
        self.routes = tuple(routes)
        self.stitches = nn.ModuleDict({key: nn.Linear(*sizes[key]) for key in sizes})
        self.channels = channels
        self.config = len(self.anchors) - 1

    def __len__(self) -> int:
        return len(self.anchors) + len(self.routes)

    def use(self, config: int) -> Stitched:
        """Run ``config`` from the next call on, and return the network."""
        if not 0 <= config < len(self):
            raise BadInput(f"config must lie in [0, {len(self)}), got {config}")
        self.config = config
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the anchor or the route that is chosen."""
        if self.config < len(self.anchors):
            return self.anchors[self.config](*args, **kwargs)
        route = self.routes[self.config - len(self.anchors)]
        hidden = self.leave(route.front, route.left, *args, **kwargs)
        mapped = self.stitches[route.stitch](hidden.movedim(self.channels, -1)).movedim(-1, self.channels)
        end, stack = self.anchors[route.end], self.stacks[route.end]
        blocks = blocks_of(end, stack)[route.entered :]
        with standing(end, stack, [_Enter(blocks[0], mapped), *blocks[1:]], rest=True):
            return end(*args, **kwargs)

    def leave(self, anchor: int, layers: int, *args: Any, **kwargs: Any) -> Tensor:
        """Return the hidden state after the first ``layers`` layers of an anchor; nothing after them runs."""
        model, stack = self.anchors[anchor], self.stacks[anchor]
        blocks = blocks_of(model, stack)[:layers]
        with standing(model, stack, [*blocks[:-1], _Leave(blocks[-1])], rest=False):
            try:
                model(*args, **kwargs)
            except _Reached as reached:
                return reached.hidden
        raise BadInput(f"anchor {anchor} does not run its layers {stack.name!r}")

    def fit_stitches(self, inputs: Inputs) -> None:
        """Set every stitch to the mean of the least-squares maps of the routes that share it, in place."""
        outputs = [
            layer_outputs(anchor, stack, inputs) for anchor, stack in zip(self.anchors, self.stacks, strict=True)
        ]

        def rows(anchor: int, layers: int) -> Tensor:
            return outputs[anchor][layers - 1].movedim(self.channels, -1).flatten(0, -2)

        for key, stitch in self.stitches.items():
            maps = [
                least_squares(rows(route.front, route.left), rows(route.end, route.entered))
                for route in self.routes
                if route.stitch == key
            ]
            with torch.no_grad():
                stitch.weight.copy_(torch.stack([weight for weight, _ in maps]).mean(0))  # type: ignore[operator]
                stitch.bias.copy_(torch.stack([bias for _, bias in maps]).mean(0))  # type: ignore[operator]


class StitchedElastic(ElasticModule):
    """The frozen original and a smaller anchor, stitched; a config of the family for each budget.

    Args:
        family: the anchors, the original last, and the routes.
        configs: the config of each budget, rising in cost; the last is the original.
        budgets: see :class:`ElasticModule`.
    """

    def __init__(self, family: Stitched, configs: Sequence[int], budgets: Sequence[float]) -> None:
        super().__init__(budgets)
        self.family = family
        self.configs = tuple(configs)
        self.full.requires_grad_(False)

    @property
    def full(self) -> nn.Module:
        """The original."""
        return self.family.anchors[-1]

    def select(self, level: int) -> None:
        """Choose the family's config."""
        self.family.use(self.configs[level])

    def train(self, mode: bool = True) -> StitchedElastic:
        """Set the mode of all but the original, which stays in eval mode."""
        super().train(mode)
        self.full.eval()
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the config of the budget that is set."""
        return self.family(*args, **kwargs)


class Stitch(Edit):
    """Stitch a smaller copy of the model to the model.

    Args:
        small: records of the edits that make the smaller anchor.
        stack: name, first block, number of blocks and number of children of the stack that is stitched.
        routes: for each route (layers left after, layers skipped, stitch).
        sizes: channels that a stitch takes and makes.
        channels: the dimension that stitches map.
        configs: the family's config of each budget.
        budgets: shares of the full model's multiply-accumulates, the last one 1.
    """

    op: ClassVar[str] = "stitch"
    small: tuple[dict[str, Any], ...]
    stack: tuple[str, int, int, int]
    routes: tuple[tuple[int, int, str], ...]
    sizes: tuple[int, int]
    channels: int
    configs: tuple[int, ...]
    budgets: tuple[float, ...]

    def rewrite(self, model: nn.Module) -> nn.Module:
        """Return the elastic model."""
        return StitchedElastic(self.family(model), self.configs, self.budgets).train(model.training)

    def family(self, model: nn.Module) -> Stitched:
        """Return the anchors, the model among them, and their routes."""
        small = copy.deepcopy(model)
        for record in self.small:
            small = edit_from_record(record).rewrite(small)
        stack = Stack(*self.stack, parameters=(), loops=False)
        routes = [Route(0, 1, left, entered, key) for left, entered, key in self.routes]
        sizes = {key: self.sizes for _, _, key in self.routes}
        return Stitched([small.requires_grad_(True), model], [stack, stack], routes, sizes, self.channels)

    def describe(self) -> dict[str, str]:
        """Return the budgets."""
        return {self.stack[0]: "stitched to a smaller copy, budgets " + ", ".join(f"{b:.3g}" for b in self.budgets)}
