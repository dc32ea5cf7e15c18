"""LAMA on docstrings, from which the part of the standard library that their function stands in is told.

Classes are the five packages with the most documented functions and everything else, six in all, drawn so that none has
more than 700 samples; files are split before samples are drawn. Every pooling stands on a bidirectional GRU of width 64
and before one linear layer; the transformer encoder layer stands in the GRU's place, with the mean after it. The
parameters compared are those of the pooling, and of the transformer's attention. Six epochs of Adam at 3e-3 for all,
chosen on seed 100; the epoch with the best validation accuracy is kept.
"""

from __future__ import annotations

import copy
import time
from collections import Counter
from collections.abc import Callable, Sequence
from statistics import fmean

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft.bench.tasks.stdlib import source_files
from torchgraft.bench.tasks.stdlib_search import pairs, tokens
from torchgraft.claims.record import ClaimRecord, judge
from torchgraft.parts.mixers.lama_compact_attention import CARD, Lama, LamaEncoder

__all__ = ["run"]

_VOCABULARY, _LENGTH, _WIDTH, _HEADS, _CLASSES, _MOST = 2048, 24, 64, 8, 6, 700
_LR, _BATCH, _EPOCHS = 3e-3, 64, 6


class _Mean(nn.Module):
    """The mean of the tokens, as often as there are heads, so that what follows has the same size."""

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        kept = valid[..., None].to(x.dtype)
        mean = (x * kept).sum(1) / kept.sum(1).clamp_min(1.0)
        return mean[:, None].expand(-1, _HEADS, -1)


class _Structured(nn.Module):
    """Structured self-attention (Lin et al., 2017): softmax_t(W2 tanh(W1 x_t)), u hidden units."""

    def __init__(self, hidden: int = 64) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(_WIDTH, hidden, bias=False), nn.Linear(hidden, _HEADS, bias=False)

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        scores = self.second(self.first(x).tanh()).mT.masked_fill(~valid[:, None], torch.finfo(x.dtype).min)
        pooled: Tensor = scores.softmax(-1) @ x
        return pooled


class _Transformer(nn.Module):
    """One transformer encoder layer over embeddings and positions, and the mean."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(_VOCABULARY, _WIDTH, padding_idx=0)
        self.place = nn.Parameter(0.02 * torch.randn(_LENGTH, _WIDTH))
        self.layer = nn.TransformerEncoderLayer(_WIDTH, _HEADS, 2 * _WIDTH, 0.1, batch_first=True, norm_first=True)
        self.pool, self.head = _Mean(), nn.Linear(_WIDTH * _HEADS, _CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        valid = tokens != 0
        x = self.layer(self.embed(tokens) + self.place, src_key_padding_mask=~valid)
        logits: Tensor = self.head(F.dropout(self.pool(x, valid).flatten(1), 0.2, self.training))
        return logits


def _data() -> tuple[tuple[Tensor, Tensor], ...]:
    """Return tokens and classes of the training, validation and test samples."""
    found: list[tuple[str, int, str]] = []
    for number, path in enumerate(source_files(packages=True)):
        try:
            texts = [words for words, _ in pairs(path.read_text(encoding="utf-8"))]
        except (SyntaxError, UnicodeDecodeError):
            continue
        found += [(words, number % 5, path.parent.name) for words in dict.fromkeys(texts)]
    common = [name for name, _ in Counter(package for _, _, package in found).most_common(_CLASSES - 1)]
    draw = torch.Generator().manual_seed(0)
    splits: list[list[tuple[list[int], int]]] = [[], [], []]
    seen: Counter[int] = Counter()
    for place in torch.randperm(len(found), generator=draw).tolist():
        words, number, package = found[place]
        label = common.index(package) if package in common else _CLASSES - 1
        if seen[label] < _MOST:
            seen[label] += 1
            splits[{3: 1, 4: 2}.get(number, 0)].append((tokens(words, _LENGTH), label))
    return tuple((torch.tensor([t for t, _ in part]), torch.tensor([c for _, c in part])) for part in splits)


def _accuracy(model: nn.Module, data: tuple[Tensor, Tensor]) -> float:
    model.eval()
    with torch.no_grad():
        return float((model(data[0]).argmax(-1) == data[1]).float().mean())


def _trained(model: nn.Module, data: tuple[tuple[Tensor, Tensor], ...], seed: int) -> float:
    """Return the test accuracy of the epoch that is best in validation."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=_LR, weight_decay=0.01)
    draw = torch.Generator().manual_seed(seed)
    best, kept = -1.0, copy.deepcopy(model)
    for _ in range(_EPOCHS):
        model.train()
        for rows in torch.split(torch.randperm(len(data[0][0]), generator=draw), _BATCH):
            optimiser.zero_grad()
            F.cross_entropy(model(data[0][0][rows]), data[0][1][rows]).backward()  # type: ignore[no-untyped-call]  # torch's
            optimiser.step()
        score = _accuracy(model, data[1])
        if score > best:
            best, kept = score, copy.deepcopy(model)
    return _accuracy(kept, data[2])


def run(seeds: Sequence[int] = (0, 1, 2)) -> ClaimRecord:
    """Run the claim.

    Args:
        seeds: weights and order of the data.
    """
    begun = time.perf_counter()
    data = _data()
    pools: dict[str, Callable[[], nn.Module]] = {
        "lama": lambda: Lama(_WIDTH, num_heads=_HEADS),
        "mean": _Mean,
        "structured self-attention": _Structured,
    }
    metrics: dict[str, list[float]] = {}
    size: dict[str, int] = {}
    for seed in seeds:
        for name in (*pools, "transformer"):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                if name in pools:
                    pool = pools[name]()
                    model: nn.Module = LamaEncoder(_VOCABULARY, _CLASSES, d_model=_WIDTH, num_heads=_HEADS, pool=pool)
                    part = pool
                else:
                    model = _Transformer()
                    part = model.layer.self_attn
                size[name] = sum(p.numel() for p in part.parameters())
                metrics.setdefault(f"accuracy, {name}", []).append(round(_trained(model, data, seed), 4))
    mean = {name: fmean(metrics[f"accuracy, {name}"]) for name in size}
    gap = mean["lama"] - max(value for name, value in mean.items() if name != "lama")
    share = size["lama"] / size["transformer"]
    return judge(
        CARD.key,
        CARD.claim.figure if CARD.claim is not None else "",
        metrics={**metrics, "attention parameters": [float(size["lama"]), float(size["transformer"])]},
        effects={"accuracy over the best baseline": round(gap, 4), "share of attention parameters": round(share, 4)},
        parts={
            "accuracy >= best baseline - 0.005": gap >= -0.005,
            "parameters <= 1/5 of the transformer's": share <= 0.2,
        },
        seeds=seeds,
        seconds=time.perf_counter() - begun,
    )
