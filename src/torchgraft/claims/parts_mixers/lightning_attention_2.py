"""Lightning attention beside softmax attention and the token-by-token loop: tokens a second as the length grows.

Nothing is trained; a seed draws the inputs. Every method is run once unmeasured and then three times at each length, in
turn with the others, and the median counts; a time is that of 8192 tokens in as many calls as it takes, but for the
two slow methods, which are called once. A method's outputs are compared with the token loop's in the same run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import fmean, median

import torch
from torch import Tensor
from torch.nn import functional as F

from torchgraft.claims.record import ClaimRecord, judge
from torchgraft.engines.recurrence.linear import linear_recurrence
from torchgraft.parts.mixers.lightning_attention_2 import CARD, lightning_attention, slopes

__all__ = ["TIMED", "run"]

#: Its verdict rests on times, which a busy machine may change.
TIMED = True

_LENGTHS = (512, 1024, 2048, 4096, 8192)
_HEADS, _SIZE = 4, 64
_QUADRATIC = 2048  # longer ones would need a gigabyte of scores
_Rule = Callable[[Tensor, Tensor, Tensor], Tensor]


def _softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def _rules() -> dict[str, _Rule]:
    decay = -slopes(_HEADS)

    def lightning(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        found = lightning_attention(q, k, v, decay)
        return found if isinstance(found, Tensor) else found[0]

    def loop(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        found = linear_recurrence(q, k, v, log_decay=decay, form="step")
        return found if isinstance(found, Tensor) else found[0]

    def quadratic(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        found = linear_recurrence(q, k, v, log_decay=decay, form="parallel")
        return found if isinstance(found, Tensor) else found[0]

    return {"lightning": lightning, "softmax": _softmax, "token loop": loop, "quadratic": quadratic}


def _inputs(length: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, length, _HEADS, _SIZE, generator=draw) for _ in range(3))
    return F.normalize(q, dim=-1), F.normalize(k, dim=-1), v


def _speeds(length: int, seed: int, rounds: int) -> tuple[dict[str, float], float]:
    """Return thousands of tokens a second of every method, and the largest gap between lightning and the loop."""
    q, k, v = _inputs(length, seed)
    rules = {name: rule for name, rule in _rules().items() if name != "quadratic" or length <= _QUADRATIC}
    with torch.no_grad():
        first = {name: rule(q, k, v) for name, rule in rules.items()}
        spent: dict[str, list[float]] = {name: [] for name in rules}
        for _ in range(rounds):
            for name, rule in rules.items():
                calls = _LENGTHS[-1] // length if name in ("lightning", "softmax") else 1
                begun = time.perf_counter()
                for _ in range(calls):
                    rule(q, k, v)
                spent[name].append((time.perf_counter() - begun) / calls)
    gap = float((first["lightning"] - first["token loop"]).abs().max())
    return {name: length / median(times) / 1e3 for name, times in spent.items()}, gap


def run(seeds: Sequence[int] = (0, 1, 2), rounds: int = 3) -> ClaimRecord:
    """Run the claim.

    Args:
        seeds: inputs.
        rounds: measured runs of every method at every length.
    """
    begun = time.perf_counter()
    metrics: dict[str, list[float]] = {}
    for seed in seeds:
        for length in _LENGTHS:
            speeds, gap = _speeds(length, seed, rounds)
            for name, found in speeds.items():
                metrics.setdefault(f"thousand tokens/s, {name}, {length} tokens", []).append(round(found, 2))
            metrics.setdefault(f"largest gap to the token loop, {length} tokens", []).append(gap)

    def speed(name: str, length: int) -> float:
        return median(metrics[f"thousand tokens/s, {name}, {length} tokens"])

    steady = [speed("lightning", length) for length in _LENGTHS[1:]]
    variation = max(steady) / min(steady) - 1
    over_softmax = speed("lightning", 8192) / speed("softmax", 8192)
    over_loop = speed("lightning", 8192) / speed("token loop", 8192)
    gaps = [fmean(metrics[f"largest gap to the token loop, {length} tokens"]) for length in _LENGTHS]
    return judge(
        CARD.key,
        CARD.claim.figure if CARD.claim is not None else "",
        metrics=metrics,
        effects={
            "fastest over slowest from 1k to 8k tokens, less 1": round(variation, 3),
            "times softmax at 8k": round(over_softmax, 2),
            "times the token loop at 8k": round(over_loop, 2),
        },
        parts={
            "tokens/s vary < 25% from 1k to 8k": variation < 0.25,
            ">= 3x softmax at 8k": over_softmax >= 3.0,
            ">= 5x the token loop at 8k": over_loop >= 5.0,
        },
        seeds=seeds,
        seconds=time.perf_counter() - begun,
        inconclusive="" if max(gaps) < 1e-3 else f"outputs disagree with the token loop by {max(gaps):.2g}",
    )
