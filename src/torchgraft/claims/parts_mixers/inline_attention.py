"""InLine attention on digits of 64 pixel tokens, with and without its local term, beside softmax and division.

All four stand in the same model of two blocks of width 32 whose inputs hold each pixel's row and column. The learning
rate of each is the better of 3e-3 and 1e-2 on seed 100, outside the claim. Query pairs are those of one head and image,
over the first 32 test images and both blocks of the trained models.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import fmean

import torch
from torch import Tensor
from torch.nn import functional as F

from torchgraft.bench.task import Split
from torchgraft.bench.tasks.sequential_digits import pixel_splits
from torchgraft.bench.training import supervised, train
from torchgraft.claims.record import ClaimRecord, judge
from torchgraft.contracts.mixers import Meter
from torchgraft.engines.recurrence.heads import merge_heads, split_heads
from torchgraft.engines.recurrence.mixer import Mixer
from torchgraft.parts.blocks.sequence_model import SequenceModel
from torchgraft.parts.mixers.inline_attention import CARD, InLineAttention, injectivity_probe, inline_attention

__all__ = ["run"]

_WIDTH, _HEADS, _STEPS, _BATCH = 32, 2, 200, 64
_RATES = {"softmax": 3e-3, "linear": 3e-3, "InLine without local": 1e-2, "InLine": 3e-3}


def _softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    logits = torch.einsum("bthk,bnhk->bhtn", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("bhtn,bnhv->bthv", logits.softmax(-1), v)


def _divided(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k = q.relu(), k.relu()
    total = torch.einsum("bthk,bhk->bth", q, k.sum(1))[..., None]
    return torch.einsum("bthk,bhkv->bthv", q, torch.einsum("bnhk,bnhv->bhkv", k, v)) / (total + 1e-6)


class _Other(InLineAttention):
    """The same projections under another attention."""

    def __init__(self, d_model: int, rule: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__(d_model, num_heads=_HEADS, local=False)
        self.rule = rule

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (split_heads(part, _HEADS) for part in self.qkv(x).chunk(3, dim=-1))
        y: Tensor = self.out(merge_heads(self.rule(q, k, v)))
        return y


_BUILDS: dict[str, Callable[[int], Mixer]] = {
    "softmax": lambda d_model: _Other(d_model, _softmax),
    "linear": lambda d_model: _Other(d_model, _divided),
    "InLine without local": lambda d_model: InLineAttention(d_model, num_heads=_HEADS, local=False),
    "InLine": lambda d_model: InLineAttention(d_model, num_heads=_HEADS, width=8),
}
_RULES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "softmax": _softmax,
    "linear": _divided,
    "InLine without local": inline_attention,
}


def _placed(split: Split) -> Split:
    """Return pixels with a one-hot row and column beside each, (N, 64, 17)."""
    if not isinstance(split.inputs, Tensor):
        raise TypeError("the digits are one tensor")
    place = torch.eye(8)
    places = torch.cat([place.repeat_interleave(8, 0), place.repeat(8, 1)], -1)
    return Split(torch.cat([split.inputs, places.expand(len(split), -1, -1)], -1), split.target)


def _confused(model: SequenceModel, x: Tensor, rule: Callable[[Tensor, Tensor, Tensor], Tensor]) -> float:
    """Return the share of query pairs whose weights have a cosine above 0.999, over all blocks."""
    seen: list[Tensor] = []
    hooks = [mixer.register_forward_pre_hook(lambda _, given: seen.append(given[0])) for mixer in model.mixers()]
    with torch.no_grad():
        model(x)
        shares = []
        for mixer, given in zip(model.mixers(), seen, strict=True):
            if not isinstance(mixer, InLineAttention):
                raise TypeError("every mixer here has the projections of InLineAttention")
            q, k, _ = (split_heads(part, _HEADS) for part in mixer.qkv(given).chunk(3, dim=-1))
            eye = torch.eye(64)[None, :, None].expand(len(x), -1, _HEADS, -1)  # outputs are then the weights
            shares.append(injectivity_probe(rule(q, k, eye).transpose(1, 2)))
    for hook in hooks:
        hook.remove()
    return fmean(shares)


def _work(tokens: int) -> int:
    mixer, x = InLineAttention(_WIDTH, num_heads=_HEADS, width=32), torch.randn(1, tokens, _WIDTH)
    with torch.no_grad(), Meter() as meter:
        mixer(x)
    return int(meter.work)


def run(seeds: Sequence[int] = (0, 1, 2)) -> ClaimRecord:
    """Run the claim.

    Args:
        seeds: weights and order of the data.
    """
    begun = time.perf_counter()
    metrics: dict[str, list[float]] = {}
    digits, unseen = _placed(pixel_splits()[0]), _placed(pixel_splits()[2])
    for seed in seeds:
        for name, build in _BUILDS.items():
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                model = SequenceModel(_WIDTH, 2, build, in_features=17, outputs=10, pool="mean")
            loss, rate = supervised(F.cross_entropy), _RATES[name]
            train(model, digits, loss, steps=_STEPS, batch_size=_BATCH, lr=rate, seed=seed)
            with torch.no_grad():
                right = torch.cat([(model(x).argmax(-1) == y).float() for x, y in unseen.batches(128)])
            metrics.setdefault(f"{name}: accuracy", []).append(round(float(right.mean()), 4))
            if name in _RULES and isinstance(unseen.inputs, Tensor):
                share = _confused(model, unseen.inputs[:32], _RULES[name])
                metrics.setdefault(f"{name}: confused query pairs", []).append(round(share, 6))
    mean = {name: fmean(values) for name, values in metrics.items()}
    linear, ours = mean["linear: confused query pairs"], mean["InLine without local: confused query pairs"]
    effects = {
        "accuracy above linear, without local": mean["InLine without local: accuracy"] - mean["linear: accuracy"],
        "accuracy below softmax, with local": mean["softmax: accuracy"] - mean["InLine: accuracy"],
        "confused query pairs, linear": linear,
        "confused query pairs, InLine": ours,
        "work at 4096 tokens over 1024": _work(4096) / _work(1024),
    }
    return judge(
        CARD.key,
        CARD.claim.figure if CARD.claim is not None else "",
        metrics=metrics,
        effects={name: round(value, 4) for name, value in effects.items()},
        parts={
            "without local at least 2 points above linear": effects["accuracy above linear, without local"] >= 0.02,
            "with local at most 0.5 points below softmax": effects["accuracy below softmax, with local"] <= 0.005,
            "confused query pairs at least 5x fewer": linear > 0 and ours * 5 <= linear,
            "work grows less than 5x": effects["work at 4096 tokens over 1024"] < 5,
        },
        seeds=seeds,
        seconds=time.perf_counter() - begun,
    )
