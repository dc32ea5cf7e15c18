"""An LSTM of width 96 with and without layer norm: steps to the same validation loss, and batches of one.

Digits: one row of eight pixels a token, the class after the last row. Text: 32 bytes of the standard library's source,
the next byte at every place. Both models start from torch's LSTM weights (gains of one), and are trained by Adam at a
constant rate with gradients clipped to norm 1; every ten steps the validation loss is read. The rate of each model on
each task was chosen by the best validation loss on seed 100 from 1e-3, 3e-3 and 1e-2, before the first run with these
seeds. The share of steps is that at which layer norm first comes to the lowest loss of the baseline, over the step at
which the baseline had it; twice all steps where it never does. Batches of one see as many samples as batches of 32.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import fmean

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft.bench.task import Split
from torchgraft.bench.tasks.digits import splits
from torchgraft.bench.tasks.stdlib_bytes import byte_splits
from torchgraft.claims.record import ClaimRecord, judge
from torchgraft.parts.norms.layer_norm import CARD, LNLSTMCell

__all__ = ["RATES", "run", "trained"]

_WIDTH, _BATCH, _EVERY = 96, 32, 10
_STEPS = {"digits": 200, "text": 200}
_SAMPLES = 3200
#: (task, model) -> learning rate, chosen on seed 100.
RATES = {
    ("digits", "lstm"): 1e-2,
    ("digits", "layer norm"): 3e-3,
    ("text", "lstm"): 1e-2,
    ("text", "layer norm"): 1e-2,
    ("digits, batches of one", "layer norm"): 1e-3,
}


class _Reader(nn.Module):
    """Tokens -> recurrent outputs -> logits, at every place or after the last."""

    def __init__(self, task: str, model: str) -> None:
        super().__init__()
        self.text = task == "text"
        features, outputs = (32, 256) if self.text else (8, 10)
        self.embed = nn.Embedding(256, features) if self.text else nn.Identity()
        kind: Callable[[], nn.Module] = (
            (lambda: nn.LSTM(features, _WIDTH, batch_first=True))
            if model == "lstm"
            else (lambda: LNLSTMCell(features, _WIDTH))
        )
        self.core = kind()
        self.head = nn.Linear(_WIDTH, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        x = self.embed(x)
        out = self.core.sequence(x)[0] if isinstance(self.core, LNLSTMCell) else self.core(x)[0]
        logits: Tensor = self.head(out if self.text else out[:, -1])
        return logits


def _data(task: str) -> tuple[Split, Split]:
    if task == "text":
        train, val, _ = byte_splits(32, 4096, 128)
        return train, val
    train, val = (Split(part.inputs.flatten(0, 1), part.target) for part in splits()[:2])  # type: ignore[union-attr]
    return train, val


def _loss(model: nn.Module, split: Split, rows: Tensor) -> Tensor:
    out = model(split.inputs[rows])  # type: ignore[index]  # one tensor
    return F.cross_entropy(out.flatten(0, -2), split.target[rows].flatten())


def trained(task: str, model: str, seed: int, lr: float, *, batch: int = _BATCH, steps: int = 0) -> list[float]:
    """Return the validation losses, one every ten steps of 32 samples."""
    train, val = _data(task)
    steps = steps or _STEPS[task]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = _Reader(task, model)
    optimizer = torch.optim.Adam(net.parameters(), lr=lr)
    draw = torch.Generator().manual_seed(seed)
    order = torch.cat([torch.randperm(len(train), generator=draw) for _ in range(steps * batch // len(train) + 1)])
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        _loss(net, train, order[step * batch : (step + 1) * batch]).backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        if (step + 1) * batch % (_EVERY * _BATCH) == 0:
            with torch.no_grad():
                losses.append(float(_loss(net, val, torch.arange(len(val)))))
    return losses


def run(seeds: Sequence[int] = (0, 1, 2)) -> ClaimRecord:
    """Run the claim.

    Args:
        seeds: weights and order of the data.
    """
    begun = time.perf_counter()
    metrics: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        metrics.setdefault(name, []).append(round(value, 4))

    for seed in seeds:
        for task in _STEPS:
            plain, normed = (trained(task, model, seed, RATES[task, model]) for model in ("lstm", "layer norm"))
            best = min(plain)
            first = next((place for place, loss in enumerate(normed, 1) if loss <= best), 2 * len(plain))
            note(f"{task}: lowest loss, lstm", best)
            note(f"{task}: lowest loss, layer norm", min(normed))
            note(f"{task}: share of steps", first / (plain.index(best) + 1))
        steps = _SAMPLES // _BATCH
        many = trained("digits", "layer norm", seed, RATES["digits", "layer norm"], steps=steps)
        rate = RATES["digits, batches of one", "layer norm"]
        one = trained("digits", "layer norm", seed, rate, batch=1, steps=_SAMPLES)
        note("digits: lowest loss, batches of 32", min(many))
        note("digits: lowest loss, batches of one", min(one))
    mean = {name: fmean(values) for name, values in metrics.items()}
    effects = {
        **{f"{task}: share of steps": mean[f"{task}: share of steps"] for task in _STEPS},
        "loss with batches of one over that with 32": mean["digits: lowest loss, batches of one"]
        / mean["digits: lowest loss, batches of 32"],
    }
    return judge(
        CARD.key,
        CARD.claim.figure if CARD.claim is not None else "",
        metrics=metrics,
        effects={name: round(value, 4) for name, value in effects.items()},
        parts={
            **{f"{task}: at most 70 % of the steps": effects[f"{task}: share of steps"] <= 0.7 for task in _STEPS},
            "batches of one at most 5 % above": effects["loss with batches of one over that with 32"] <= 1.05,
        },
        seeds=seeds,
        seconds=time.perf_counter() - begun,
    )
