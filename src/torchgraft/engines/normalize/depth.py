"""What every block of a transformer does to the residual stream: its size, its gradient, what each block adds."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torchgraft.bench.task import Inputs, call
from torchgraft.engines.normalize.attach import attach, detach, first_of
from torchgraft.engines.normalize.placement import find_blocks

__all__ = ["Depth", "LayerReport", "depth_report", "residual_stream", "variance_profile"]


@contextlib.contextmanager
def residual_stream(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collect what every block takes, and what the last of each stack gives, in the passes made in the block.

    Example:
        >>> stack = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2), 3, enable_nested_tensor=False)
        >>> with residual_stream(stack) as stream:
        ...     _ = stack(torch.randn(4, 1, 8))
        >>> len(stream)
        4
    """
    blocks = find_blocks(model)
    last = {block.stack: block.name for block in blocks}
    stream: list[Tensor] = []
    handles = []

    def taken(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        stream.append(first_of(args, kwargs))

    def given(_: nn.Module, __: Any, out: Any) -> None:
        stream.append(out[0] if isinstance(out, tuple) else out)

    try:
        for block in blocks:
            module = model.get_submodule(block.name)
            handles.append(module.register_forward_pre_hook(taken, with_kwargs=True))
            if last[block.stack] == block.name:
                handles.append(module.register_forward_hook(given))
        yield stream
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class Depth:
    """The residual stream at one depth.

    Args:
        depth: number of blocks before it.
        variance: of all its entries.
        largest: its largest magnitude.
        gradient: norm of the loss's gradient with respect to it; ``nan`` where there is none.
    """

    depth: int
    variance: float
    largest: float
    gradient: float


def variance_profile(
    model: nn.Module, batch: Inputs, *, loss: Callable[[Any], Tensor] | None = None
) -> tuple[Depth, ...]:
    """Return size and gradient of the residual stream before every block and after the last.

    Args:
        model: holds blocks of a known kind; its mode and gradients are left as they are.
        batch: its inputs.
        loss: from the model's output to a scalar; by default the output's own ``loss``, or its mean square.

    Example:
        >>> from torchgraft.bench.models import VisionTransformer
        >>> profile = variance_profile(VisionTransformer(d_model=8, depth=3, num_heads=2), torch.randn(2, 1, 8, 8))
        >>> [row.depth for row in profile]
        [0, 1, 2, 3]
    """
    with torch.enable_grad(), residual_stream(model) as stream:
        out = call(model, batch)
    if loss is not None:
        value = loss(out)
    elif isinstance(getattr(out, "loss", None), Tensor):
        value = out.loss
    else:
        leaves = [each for each in torch.utils._pytree.tree_leaves(_plain(out)) if isinstance(each, Tensor)]
        value = leaves[0].float().square().mean()
    moving = [x for x in stream if x.requires_grad]
    grads = iter(torch.autograd.grad(value, moving, allow_unused=True) if moving and value.requires_grad else ())
    rows = []
    for depth, x in enumerate(stream):
        grad = next(grads, None) if x.requires_grad else None
        wide = x.detach().double()
        rows.append(
            Depth(
                depth,
                float(wide.var(unbiased=False)),
                float(wide.abs().max()),
                float("nan") if grad is None else float(grad.double().norm()),
            )
        )
    return tuple(rows)


def _plain(out: Any) -> Any:
    return out.to_tuple() if hasattr(out, "to_tuple") else out  # what Hugging Face's models return


@dataclass(frozen=True)
class LayerReport:
    """One block of a stack.

    Args:
        block: its name.
        variance: of the residual stream that it takes.
        jacobian_distance: |J^T v - v| / |v| of the block's Jacobian J for a random v, which estimates its distance to
            the identity; 0 where the block does nothing.
        angle: arccos of the cosine between a token before and after the block, over pi, averaged.
        drop_loss: the loss without this block less that with it; ``nan`` where no loss was given.
    """

    block: str
    variance: float
    jacobian_distance: float
    angle: float
    drop_loss: float


class _Skipped(nn.Module):
    """On a block: gives what it takes."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return first_of(args, kwargs)


def depth_report(
    model: nn.Module, data: Inputs, *, loss: Callable[[Any], Tensor] | None = None, seed: int = 0
) -> tuple[LayerReport, ...]:
    """Return how much every block contributes to the residual stream and to the loss.

    Args:
        model: holds blocks of a known kind, each of which gives one tensor; left as it is.
        data: its inputs.
        loss: from the model's output to a scalar, for the drop-one loss.
        seed: of the directions for the Jacobians.

    Example:
        >>> from torchgraft.bench.models import VisionTransformer
        >>> model = VisionTransformer(d_model=8, depth=3, num_heads=2)
        >>> len(depth_report(model, torch.randn(2, 1, 8, 8), loss=lambda out: out.square().mean()))
        3

    Raises:
        BadInput: no block is recognised.
    """
    blocks = find_blocks(model)
    modes = {module: module.training for module in model.modules()}
    model.eval()
    draw = torch.Generator().manual_seed(seed)
    rows = []
    try:
        calls: dict[str, tuple[Any, Any]] = {}
        handles = [
            model.get_submodule(block.name).register_forward_pre_hook(
                lambda _, args, kwargs, name=block.name: calls.__setitem__(name, (args, kwargs)), with_kwargs=True
            )
            for block in blocks
        ]
        with torch.no_grad(), residual_stream(model) as stream:
            whole = float("nan") if loss is None else float(loss(call(model, data)))
            if loss is None:
                call(model, data)
        for handle in handles:
            handle.remove()
        for block, x in zip(blocks, stream, strict=False):
            module = model.get_submodule(block.name)
            moved, along = _pulled_back(module, calls[block.name], torch.randn(x.shape, generator=draw).to(x))
            dropped = float("nan")
            if loss is not None:
                attach(module, _Skipped)
                try:
                    with torch.no_grad():
                        dropped = float(loss(call(model, data))) - whole
                finally:
                    detach(module, _Skipped)
            cosine = torch.cosine_similarity(x.double(), moved.double(), dim=-1).clamp(-1.0, 1.0)
            rows.append(
                LayerReport(
                    block.name,
                    float(x.double().var(unbiased=False)),
                    along,
                    float(torch.arccos(cosine).mean() / math.pi),
                    dropped,
                )
            )
    finally:
        for module, mode in modes.items():
            module.training = mode
    return tuple(rows)


def _pulled_back(module: nn.Module, given: tuple[Any, Any], v: Tensor) -> tuple[Tensor, float]:
    """Return the block's output at what it was called with, and |J^T v - v| / |v|."""
    args, kwargs = given
    x = first_of(args, kwargs)
    moving = x.detach().clone().requires_grad_()
    with torch.enable_grad():
        out = module(
            *(moving if each is x else each for each in args),
            **{name: moving if each is x else each for name, each in kwargs.items()},
        )
        found: Tensor = out[0] if isinstance(out, tuple) else out
        (back,) = torch.autograd.grad(found, moving, v)
    return found.detach(), float((back - v).norm() / v.norm())
