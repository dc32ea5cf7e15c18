"""The contract of memories: what is read depends on what is stored and asked, not on order, company or padding.

A card of family ``parts/memories`` says by capabilities what holds: ``permutation-equivariant`` (the tokens are the
stored patterns, a set), ``padding-mask`` (``forward(x, mask=)``, boolean (B, T), True where a pattern is there). What
its entry has says the rest: a method ``retrieved(x)`` -> (read (B, H, T, K), stored (B, H, S, K)) promises mixtures of
what is stored; a method ``fetch(x)`` -> numbers (C, B) of the rows of its parameter ``values`` (C, N, V) promises that
the other rows are neither read nor trained.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from torchgraft.catalogue import Card
from torchgraft.catalogue.registry import entry
from torchgraft.contracts.check import Check, CheckFailure, Subject, require
from torchgraft.contracts.modules import EXACT, HALF, gradients
from torchgraft.contracts.sameness import close, same_output, same_state
from torchgraft.contracts.subjects import build_part, draw_like, output

__all__ = ["CHECKS"]

_DOUBLE = torch.float64
#: Enough that a sum kept in bfloat16 (8 bits) stops growing long before its end.
_MANY = 1500
_DIRECTIONS = 200


def _gap(left: Tensor, right: Tensor) -> float:
    """Return the largest difference of two tensors, 0 where they are empty."""
    return float((left - right).detach().abs().max()) if left.numel() else 0.0


def check_each_row_reads_alone(subject: Subject) -> None:
    """What one sample of a batch reads, alone, is what it reads in the batch (1e-9)."""
    part, x = build_part(subject, dtype=_DOUBLE), draw_like(subject, dtype=_DOUBLE)
    whole = output(part, x)
    for row in range(min(len(x), 3)):
        close(output(part, x[row : row + 1]), whole[row : row + 1], EXACT, f"row {row} alone")


def check_reading_leaves_the_memory(subject: Subject) -> None:
    """In eval mode ten reads of other inputs, with gradients, change no weight and no later read, bit for bit."""
    part, x = build_part(subject), draw_like(subject)
    before, first = copy.deepcopy(part), output(part, x)
    for seed in range(1, 11):
        other = (3 * draw_like(subject, seed=seed)).requires_grad_()
        gradients(part, part(other), other)
    same_state(before, part, "the memory after ten reads")
    same_output(output(part, x), first, "the first read again")


def check_memory_stays_finite(subject: Subject) -> None:
    """Equal patterns, opposite ones, and sizes from 1e-6 to 1e4 give finite outputs and gradients, bfloat16 too."""
    for dtype in (torch.float32, torch.bfloat16):
        part, x = build_part(subject, dtype=dtype, moved=False), draw_like(subject, dtype=dtype)
        cases = {
            "equal patterns": x[:, :1].expand_as(x) if x.ndim > 2 else x[:1].expand_as(x),
            "opposite patterns": x * torch.where(torch.arange(x.shape[-2]) % 2 > 0, 1e3, -1e3).to(dtype)[:, None],
            **{f"{size:g} x": size * x for size in (1e-6, 1e-3, 1e3, 1e4)},
        }
        for name, value in cases.items():
            given = value.clone().requires_grad_()
            out = part(given)
            require(bool(out.isfinite().all()), f"{name} in {dtype}: the output is not finite")
            bad = [key for key, grad in gradients(part, out, given).items() if grad is not None and _broken(grad)]
            require(not bad, f"{name} in {dtype}: the gradient of {', '.join(bad[:3])} is not finite")


def _broken(value: Tensor) -> bool:
    return not bool(value.isfinite().all())


def check_order_of_patterns_does_not_matter(subject: Subject) -> None:
    """Patterns in another order are read the same; what each token reads moves with it (1e-9)."""
    part, x = build_part(subject, dtype=_DOUBLE), draw_like(subject, dtype=_DOUBLE)
    order = torch.randperm(x.shape[1], generator=torch.Generator().manual_seed(3))
    close(output(part, x[:, order]), output(part, x)[:, order], EXACT, "another order")


def check_many_patterns_keep_their_sum(subject: Subject) -> None:
    """With 1500 patterns in bfloat16 the output stays within 5 % of float32: nothing is summed in bfloat16."""
    part = build_part(subject, dtype=torch.bfloat16)
    x = (1 + draw_like(subject, 1, _MANY)).bfloat16()
    expected = output(copy.deepcopy(part).float(), x.float())
    gap = float((output(part, x).float() - expected).norm() / expected.norm().clamp(min=1e-6))
    require(gap <= HALF, f"{_MANY} patterns in bfloat16: differs by {gap:.3g} of the output's norm, {HALF} is allowed")


def check_what_is_masked_is_not_read(subject: Subject) -> None:
    """Patterns that ``mask`` leaves out change no other read and get no gradient; with none left all is finite."""
    part, x = build_part(subject, dtype=_DOUBLE), draw_like(subject, dtype=_DOUBLE)
    if x.ndim != 3:
        raise CheckFailure(f"the card says padding-mask; its shape {tuple(x.shape)} is not (B, T, D)")
    real = x.shape[1]
    rubbish = 50 * draw_like(subject, len(x), 7, seed=5, dtype=_DOUBLE)
    padded = torch.cat([x, rubbish], 1).requires_grad_()
    mask = (torch.arange(real + 7) < real).expand(len(x), -1)
    out = part(padded, mask=mask)[:, :real]
    close(out, output(part, x), EXACT, "seven masked patterns")
    grad = gradients(part, out, padded)["x"]
    require(grad is not None and bool(grad.any()), "no gradient reaches the input")
    leak = 0.0 if grad is None else float(grad[:, real:].abs().max())
    require(leak == 0, f"a masked pattern gets a gradient of {leak:.3g}")
    moved = _gap(part(padded, mask=torch.ones_like(mask))[:, :real], out)
    require(moved > 1e-6, f"the mask changes nothing ({moved:.3g})")
    require(
        not _broken(part(padded, mask=torch.zeros_like(mask))), "with every pattern masked the output is not finite"
    )


def check_retrieved_is_a_mixture_of_the_stored(subject: Subject) -> None:
    """What is read lies in 200 random directions between the stored patterns (1e-9); of one pattern it is that one."""
    part, x = _with(subject, "retrieved").requires_grad_(False), 3 * draw_like(subject, dtype=_DOUBLE)
    read, stored = part.retrieved(x)  # (B, H, T, K), (B, H, S, K)
    along = torch.randn(read.shape[-1], _DIRECTIONS, generator=torch.Generator().manual_seed(2), dtype=_DOUBLE)
    ahead, ends = read @ along, stored @ along
    slack = EXACT * float(ends.abs().max())
    for name, beyond in {
        "above": ahead - ends.amax(-2, keepdim=True),
        "below": ends.amin(-2, keepdim=True) - ahead,
    }.items():
        require(float(beyond.max()) <= slack, f"what is read lies {float(beyond.max()):.3g} {name} all that is stored")
    read, stored = part.retrieved(x[:, :1])
    close(read, stored, EXACT, "what is read of one pattern")


def check_only_what_was_fetched_learns(subject: Subject) -> None:
    """Values that no input fetched are not read, get a gradient of exactly zero and do not move, bit for bit."""
    part, x = _with(subject, "fetch"), draw_like(subject, 2, dtype=_DOUBLE)
    with torch.no_grad():
        part.values.add_(torch.randn(part.values.shape, generator=torch.Generator().manual_seed(4)))
    indices, values = part.fetch(x), part.values  # (C, B), (C, N, V)
    mask = torch.zeros(values.shape[:2], dtype=torch.bool).scatter_(1, indices, True)
    require(not bool(mask.all()), "the tiny configuration fetches every value of a batch of two; give it more")
    out = part(x)
    grad = gradients(part, out, x.clone().requires_grad_())["values"]
    if grad is None:
        raise CheckFailure("no gradient reaches the values")
    require(bool(grad[mask].any(-1).all()), "a value that was fetched gets no gradient")
    require(
        not bool(grad[~mask].any()), f"a value that was not fetched gets a gradient of {grad[~mask].abs().max():.3g}"
    )
    before = values.detach().clone()
    with torch.no_grad():
        values.sub_(0.5 * grad)
    require(torch.equal(values[~mask], before[~mask]), "a step moves a value that was not fetched")
    said = output(part, x)
    with torch.no_grad():
        values[~mask] += 7
    same_output(output(part, x), said, "after the values that were not fetched were changed")


def _with(subject: Subject, method: str) -> Any:
    part: nn.Module = build_part(subject, dtype=_DOUBLE)
    require(callable(getattr(part, method, None)), f"{subject.card.entry} has no method {method}")
    return part


def _is_memory(card: Card) -> bool:
    return card.kind == "part" and card.family == "parts/memories"


def _declares(capability: str) -> Callable[[Card], bool]:
    return lambda card: _is_memory(card) and capability in card.capabilities


def _has(method: str) -> Callable[[Card], bool]:
    return lambda card: _is_memory(card) and hasattr(entry(card), method)


CHECKS = (
    Check(check_each_row_reads_alone, _is_memory),
    Check(check_reading_leaves_the_memory, _is_memory),
    Check(check_memory_stays_finite, _is_memory),
    Check(check_order_of_patterns_does_not_matter, _declares("permutation-equivariant")),
    Check(check_many_patterns_keep_their_sum, _declares("permutation-equivariant")),
    Check(check_what_is_masked_is_not_read, _declares("padding-mask")),
    Check(check_retrieved_is_a_mixture_of_the_stored, _has("retrieved")),
    Check(check_only_what_was_fetched_learns, _has("fetch")),
)
