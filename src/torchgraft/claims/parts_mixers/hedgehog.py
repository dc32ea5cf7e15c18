"""Hedgehog on the softmax transformers of digits and recall: how near its weights come, and what conversion costs.

Each model is converted to hedgehog, to elu + 1 and to ReLU features. Hedgehog learns its maps first, for as many steps
as all three are fine-tuned for after that. Distances are taken before the fine-tuning, on validation samples. The
exponential features and the rate of mimicry, 5e-2, were chosen on a byte model of seed 100, outside the claim.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import fmean

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft.bench.task import Task, call
from torchgraft.bench.tasks import load_task
from torchgraft.bench.training import evaluate, supervised, train
from torchgraft.claims.record import ClaimRecord, judge
from torchgraft.engines.linearize import attention_cross_entropy, linear_attentions, linearize, mimic
from torchgraft.engines.linearize.kernel import FeatureKernel, Heads, Kernel, softmax_weights, wide
from torchgraft.parts.mixers.hedgehog import CARD, spikiness

__all__ = ["run"]

_STEPS, _BATCH = 150, 32
_RATE, _MIMIC_RATE = 1e-3, 5e-2
_MAPS: dict[str, Callable[[Tensor], Tensor]] = {"elu + 1": lambda x: F.elu(x) + 1, "relu": F.relu}


class _Fixed(FeatureKernel):
    """Linear attention by a fixed function of each channel."""

    def __init__(self, like: Kernel, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__(num_heads=like.num_heads, key_size=like.key_size, value_size=like.value_size)
        self.function = function

    @property
    def memory_shape(self) -> tuple[int, int, int]:
        """Heads, features, and values + 1 of the memory."""
        return self.num_heads, self.key_size, self.value_size + 1

    def features(self, heads: Heads) -> tuple[Tensor, Tensor]:
        """Return the function of queries and keys."""
        return self.function(wide(heads.q)), self.function(wide(heads.k))


def _distances(model: nn.Module, task: Task) -> tuple[float, float]:
    """Return KL(p || a) and the absolute difference of entropies, means over layers, heads and rows, in nats."""
    found: list[tuple[float, float]] = []

    def watch(kernel: Kernel, heads: Heads, causal: bool) -> Tensor:
        p = softmax_weights(heads, causal=causal)
        if isinstance(kernel, FeatureKernel):
            a = kernel.weights(heads, causal=causal)
            entropy = spikiness(p)
            gap = (spikiness(a) - entropy).abs().mean()
            found.append((float(attention_cross_entropy(p, a) - entropy.mean()), float(gap)))
        return torch.einsum("bhts,bshv->bthv", p.to(heads.v.dtype), heads.v)

    places = list(linear_attentions(model).values())
    for place in places:
        place.watch = watch
    with torch.no_grad():
        call(model, task.val[:128].inputs)
    for place in places:
        place.watch = None
    return fmean(pair[0] for pair in found), fmean(pair[1] for pair in found)


def run(seeds: Sequence[int] = (0, 1, 2), *, steps: int = _STEPS) -> ClaimRecord:
    """Run the claim.

    Args:
        seeds: of the softmax models and of the order of the samples.
        steps: of mimicry, and of fine-tuning.
    """
    begun = time.perf_counter()
    metrics: dict[str, list[float]] = {}
    for seed in seeds:
        for name in ("digits-vit", "recall"):
            task = load_task(name, seed=seed)
            teacher = task.trained()
            metrics.setdefault(f"{name}, softmax", []).append(float(evaluate(teacher, task, "test").mean()))
            for method in ("hedgehog", *_MAPS):
                model = linearize(teacher, "hedgehog", options={"act": "exp"})
                if method == "hedgehog":
                    mimic(model, task, steps=steps, lr=_MIMIC_RATE, batch_size=_BATCH, seed=seed)
                else:
                    for place in linear_attentions(model).values():
                        place.kernel = _Fixed(place.kernel, _MAPS[method])
                divergence, gap = _distances(model, task)
                train(
                    model,
                    task.train,
                    supervised(task.loss),
                    steps=steps,
                    batch_size=_BATCH,
                    lr=_RATE,
                    seed=seed,
                )
                metrics.setdefault(f"{name}, KL of {method}", []).append(divergence)
                metrics.setdefault(f"{name}, entropy gap of {method}", []).append(gap)
                metrics.setdefault(f"{name}, {method}", []).append(float(evaluate(model, task, "test").mean()))
    mean = {name: fmean(values) for name, values in metrics.items()}
    both = {
        f"{what} of {method}": fmean(mean[f"{name}, {what} of {method}"] for name in ("digits-vit", "recall"))
        for what in ("KL", "entropy gap")
        for method in ("hedgehog", "elu + 1")
    }
    effects = {
        "KL, hedgehog / elu + 1": both["KL of hedgehog"] / both["KL of elu + 1"],
        "entropy gap of hedgehog": both["entropy gap of hedgehog"],
        "digits, share of softmax": mean["digits-vit, hedgehog"] / mean["digits-vit, softmax"],
        "recall, share of softmax": mean["recall, hedgehog"] / mean["recall, softmax"],
        "recall, loss of elu + 1": mean["recall, softmax"] - mean["recall, elu + 1"],
    }
    return judge(
        CARD.key,
        CARD.claim.figure if CARD.claim is not None else "",
        metrics={name: [round(value, 4) for value in values] for name, values in metrics.items()},
        effects={name: round(value, 4) for name, value in effects.items()},
        parts={
            "KL at most a fifth of that of elu + 1": effects["KL, hedgehog / elu + 1"] <= 0.2,
            "entropy gap below 0.3 nats": effects["entropy gap of hedgehog"] < 0.3,
            "digits at least 99 % of softmax": effects["digits, share of softmax"] >= 0.99,
            "recall at least 90 % of softmax": effects["recall, share of softmax"] >= 0.90,
            "elu + 1 loses at least 10 points on recall": effects["recall, loss of elu + 1"] >= 0.10,
        },
        seeds=seeds,
        seconds=time.perf_counter() - begun,
    )
