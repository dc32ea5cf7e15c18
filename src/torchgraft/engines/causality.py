"""Whether a model looks ahead: what it makes of a token must stay as it is when later tokens change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from torchgraft.bench.meters.forward import leaf_tensors, resting
from torchgraft.bench.task import Inputs, call
from torchgraft.engines.taps import record
from torchgraft.errors import BadInput

__all__ = ["looks_ahead"]


def _has_tokens(value: Tensor, tokens: int) -> bool:
    return value.ndim >= 2 and value.shape[1] == tokens


def _other_end(value: Tensor, start: int) -> Tensor:
    """Return ``value`` with the tokens from ``start`` on taken from the next sample, or else from its own beginning."""
    for other in (value.roll(1, 0), value.flip(1).roll(start, 1)):
        changed = torch.cat([value[:, :start], other[:, start:]], 1)
        if not torch.equal(changed, value):
            return changed
    return value


def _changed_ends(inputs: Inputs, tokens: int, start: int) -> Inputs:
    def change(value: Tensor) -> Tensor:
        return _other_end(value, start) if _has_tokens(value, tokens) else value

    if isinstance(inputs, Tensor):
        return change(inputs)
    if isinstance(inputs, Mapping):
        return {name: change(value) for name, value in inputs.items()}
    return tuple(change(value) for value in inputs)


def _same(one: Inputs, other: Inputs) -> bool:
    return all(torch.equal(a, b) for a, b in zip(leaf_tensors(one), leaf_tensors(other), strict=True))


def _differ(before: Tensor, after: Tensor) -> bool:
    """Say whether two tensors differ by more than rounding does."""
    share = 1e-2 if before.is_floating_point() and torch.finfo(before.dtype).eps > 1e-5 else 1e-4
    a, b = before.double(), after.double()
    gap = torch.where(a == b, 0.0, (a - b).abs())  # infinities that stay are equal
    return not bool((gap <= share * a.nan_to_num(0.0, 0.0, 0.0).abs().max()).all())


@torch.no_grad()
def looks_ahead(model: nn.Module, example: Inputs, names: Sequence[str], *, tokens: int) -> list[str]:
    """Return the modules that take something which depends on later tokens, ``""`` where what the model says does.

    The tokens from a quarter, from the middle, and from the one after it on are replaced by other samples' in the
    inputs, and what stands before them is compared. What has no axis of tokens, such as one answer a sample, is not.

    Args:
        model: takes sequences, tokens along dimension 1; left as it was.
        example: inputs for it; two samples or more tell more than one.
        names: the modules whose inputs are looked at.
        tokens: T.

    Example:
        >>> from torchgraft.bench.models import ByteTransformer, VisionTransformer
        >>> x = torch.randint(16, (2, 8))
        >>> looks_ahead(ByteTransformer(16, 8, d_model=8, depth=1, num_heads=2), x, ["blocks.0.mlp"], tokens=8)
        []

    Raises:
        BadInput: the inputs have no axis of so many tokens, or their ends are all alike.
    """
    if not any(_has_tokens(value, tokens) for value in leaf_tensors(example)):
        raise BadInput(f"the {tokens} tokens are not those of the inputs, so that none can be said to come later")

    def run(inputs: Inputs) -> dict[str, list[Tensor]]:
        with resting(model), record(model, list(names), "input") as seen:
            said = call(model, inputs)
        found = {name: leaf_tensors(seen.calls(name)) for name in names} | {"": leaf_tensors(said)}
        return {name: [each for each in values if _has_tokens(each, tokens)] for name, values in found.items()}

    before = run(example)
    ahead: set[str] = set()
    told = False
    # Next to each other, so that a model whose tokens see each other in pairs is found out too.
    for start in sorted({max(1, tokens // 4), tokens // 2, tokens // 2 + 1} & set(range(1, tokens))):
        inputs = _changed_ends(example, tokens, start)
        if _same(example, inputs):
            continue
        told = True
        after = run(inputs)
        for name, values in before.items():
            pairs = zip(values, after[name], strict=True)
            if any(_differ(old[:, :start], new[:, :start]) for old, new in pairs):
                ahead.add(name)
    if not told:
        raise BadInput("all samples end alike, so that it cannot be seen whether the model looks ahead")
    return [name for name in before if name in ahead]
