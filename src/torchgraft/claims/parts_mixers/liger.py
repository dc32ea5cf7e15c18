"""Liger on a byte model: what low-rank updates alone recover, with and without a window and gates.

Every conversion has the same steps of low-rank updates on queries, keys and values (rank 8; 24 on the projection that
joins the three). The learning rate, 5e-3 for all, is the better for liger of 1e-3 and 5e-3 on seed 100, outside the
claim.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from statistics import fmean

from torch import Tensor
from torch.nn import functional as F

from torchgraft.bench.tasks import load_task
from torchgraft.claims.record import ClaimRecord, judge
from torchgraft.claims.sequences import bits_per_byte, train_mixer
from torchgraft.engines.linearize import linearize
from torchgraft.parts.mixers.liger import CARD

__all__ = ["run"]

_STEPS, _TUNE = 300, 80
_RATE = 5e-3


def _elu(x: Tensor) -> Tensor:
    return F.elu(x) + 1


def run(seeds: Sequence[int] = (0, 1, 2), *, steps: int = _STEPS, tune: int = _TUNE) -> ClaimRecord:
    """Run the claim.

    Args:
        seeds: of the softmax models and of the order of the samples.
        steps: of training the softmax model.
        tune: steps of low-rank updates.
    """
    begun = time.perf_counter()
    metrics: dict[str, list[float]] = {}
    task = load_task("stdlib-bytes")
    for seed in seeds:
        softmax = train_mixer(task, "softmax-attention", steps=steps, d_model=96, layers=2, batch_size=8, seed=seed)
        metrics.setdefault("softmax", []).append(bits_per_byte(softmax, task))
        for name, to, options in (
            ("liger", "liger", {}),
            ("elu + 1", "lit", {"kernel_size": 0, "groups": None, "act": "elu"}),
            ("hedgehog", "hedgehog", {}),
        ):
            model = linearize(
                softmax,
                to,
                task=task,
                options=options,
                mimic_steps=0,
                steps=tune,
                lr=_RATE,
                tune="lora",
                distil=False,
                batch_size=8,
                seed=seed,
            )
            metrics.setdefault(name, []).append(bits_per_byte(model, task))
            added = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in softmax.parameters())
            metrics.setdefault(f"parameters added by {name}", []).append(float(added))
    mean = {name: fmean(values) for name, values in metrics.items()}
    uniform = math.log2(256)
    effects = {
        "share of the gain over a uniform guess": (uniform - mean["liger"]) / (uniform - mean["softmax"]),
        "bits below elu + 1": mean["elu + 1"] - mean["liger"],
        "parameters added": mean["parameters added by liger"],
    }
    return judge(
        CARD.key,
        CARD.claim.figure if CARD.claim is not None else "",
        metrics={name: [round(value, 4) for value in values] for name, values in metrics.items()},
        effects={name: round(value, 4) for name, value in effects.items()},
        parts={
            "at least 90 % of the gain": effects["share of the gain over a uniform guess"] >= 0.9,
            "at least 0.1 bits below elu + 1": effects["bits below elu + 1"] >= 0.1,
            "no parameter added": effects["parameters added"] == 0,
        },
        seeds=seeds,
        seconds=time.perf_counter() - begun,
    )
