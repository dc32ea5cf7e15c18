"""DyCL: three dynamic networks as host programs over ONNX, beside eager and a trace of one path.

Protocol. Each net is trained on digits with Gaussian noise of a deviation drawn from [0, 0.6] for each image, and then
classifies 1,000 noisy images of the validation and test samples, one at a time, on one thread: a CNN with exits where
the class is likely enough, a residual net that skips blocks by a gate, and a recurrent net that reads strips of the
image until the class is likely enough. The trace is ``torch.jit.trace`` on the first of these inputs; it
mispredicts where it names another class than the net itself. Latencies are means over 200 inputs, medians of 5 rounds
in which eager and program take turns. Sizes, steps and thresholds were chosen on seed 100.
"""

from __future__ import annotations

import itertools
import time
import warnings
from collections.abc import Callable, Sequence
from statistics import fmean, median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft.bench.tasks.digits import splits
from torchgraft.claims.record import ClaimRecord, judge
from torchgraft.elastic.dycl_compile import CARD, compile_dynamic

__all__ = ["TIMED", "run"]

TIMED = True
INPUTS = 1000
#: steps and learning rate of each net's training
TRAINING = {"early exit": (200, 3e-3), "layer skip": (200, 3e-3), "recurrent": (500, 1e-2)}


class EarlyExit(nn.Module):
    """Three convolutions, each with a head; the answer of the first head that is sure enough."""

    def __init__(self) -> None:
        super().__init__()
        widths = (1, 8, 16, 32)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, stride=1 + (b > 8), padding=1), nn.ReLU())
            for a, b in itertools.pairwise(widths)
        )
        self.heads = nn.ModuleList(nn.Linear(width * side * side, 10) for width, side in ((8, 8), (16, 4), (32, 2)))
        self.threshold = 0.8

    def all(self, x: Tensor) -> list[Tensor]:
        """Return the logits of every head."""
        found = []
        for block, head in zip(self.blocks, self.heads, strict=True):
            x = block(x)
            found.append(head(x.flatten(1)))
        return found

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the mean loss of the heads."""
        return torch.stack([F.cross_entropy(each, y) for each in self.all(x)]).mean()

    def forward(self, x: Tensor) -> Tensor:
        """Map one image (1, 1, 8, 8) to logits (1, 10)."""
        for i, (block, head) in enumerate(zip(self.blocks, self.heads, strict=True)):
            x = block(x)
            logits = head(x.flatten(1))
            if i < len(self.blocks) - 1 and logits.softmax(-1).max() > self.threshold:
                break
        out: Tensor = logits
        return out


class SkipBlock(nn.Module):
    """A residual block that runs where its gate says so."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate = nn.Sequential(nn.Linear(width, 1), nn.BatchNorm1d(1, affine=False))  # half of a batch above 0
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)

    def soft(self, x: Tensor) -> Tensor:
        """Return the block for a batch with a straight-through gate."""
        score = self.gate(x.mean((2, 3)))
        noisy = torch.sigmoid(score + 0.3 * torch.randn_like(score))
        hard = ((noisy > 0.5).float() + noisy - noisy.detach())[:, :, None, None]
        body = torch.relu(x + self.conv2(torch.relu(self.conv1(x))))
        return x + hard * (body - x)

    def forward(self, x: Tensor) -> Tensor:
        """Run, or pass on."""
        if self.gate(x.mean((2, 3))) > 0:
            return torch.relu(x + self.conv2(torch.relu(self.conv1(x))))
        return x


class LayerSkip(nn.Module):
    """A residual net whose blocks are run or left out by gates."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, stride=2, padding=1)
        self.blocks = nn.Sequential(*(SkipBlock(16) for _ in range(2)))
        self.head = nn.Linear(16 * 16, 10)

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the loss of a batch."""
        x = torch.relu(self.stem(x))
        for block in self.blocks:
            x = block.soft(x)  # type: ignore[operator]  # a SkipBlock
        return F.cross_entropy(self.head(x.flatten(1)), y)

    def forward(self, x: Tensor) -> Tensor:
        """Map one image (1, 1, 8, 8) to logits (1, 10)."""
        x = self.blocks(torch.relu(self.stem(x)))
        out: Tensor = self.head(x.flatten(1))
        return out


class Reader(nn.Module):
    """A recurrent net that reads an image in four strips until it is sure."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.GRUCell(16, 32), nn.Linear(32, 10)
        self.enough = 0.7

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the mean loss of the answers after every strip."""
        strips = x.reshape(len(x), 4, 16)
        h, losses = x.new_zeros(len(x), 32), []
        for strip in strips.unbind(1):
            h = self.cell(strip, h)
            losses.append(F.cross_entropy(self.head(h), y))
        return torch.stack(losses).mean()

    def forward(self, x: Tensor) -> Tensor:
        """Map one image (1, 1, 8, 8) to logits (1, 10)."""
        x = x.reshape(1, 4, 16)
        h = torch.zeros(1, 32)
        for place in range(4):
            h = self.cell(x[:, place], h)
            logits = self.head(h)
            if logits.softmax(-1).max() > self.enough:
                break
        out: Tensor = logits
        return out


NETS: dict[str, Callable[[], nn.Module]] = {"early exit": EarlyExit, "layer skip": LayerSkip, "recurrent": Reader}


def _noisy(x: Tensor, draw: torch.Generator) -> Tensor:
    scale = 0.6 * torch.rand(len(x), 1, 1, 1, generator=draw)
    made: Tensor = x + scale * torch.randn(x.shape, generator=draw)
    return made


def _latencies(model: nn.Module, others: dict[str, Any], inputs: Sequence[Tensor]) -> dict[str, float]:
    """Return microseconds a call, means over the inputs, medians over rounds that take turns."""
    callers: dict[str, Any] = {"eager": model, **others}
    found: dict[str, list[float]] = {name: [] for name in callers}
    with torch.no_grad():
        for row in range(6):
            for name, each in callers.items():
                begun = time.perf_counter()
                for x in inputs:
                    each(x)
                if row:  # the first round warms up
                    found[name].append((time.perf_counter() - begun) / len(inputs) * 1e6)
    return {name: median(values) for name, values in found.items()}


def _measured(name: str, seed: int, backend: Any = "onnx") -> dict[str, float]:
    first, val, test = splits()
    draw = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model: Any = NETS[name]()
    optimizer = torch.optim.AdamW(model.parameters(), lr=TRAINING[name][1])
    images = torch.as_tensor(first.inputs)
    for _ in range(TRAINING[name][0]):
        rows = torch.randint(0, len(images), (64,), generator=draw)
        loss = model.loss(_noisy(images[rows], draw), first.target[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    pool = torch.cat([torch.as_tensor(val.inputs), torch.as_tensor(test.inputs)])
    target = torch.cat([val.target, test.target])
    rows = torch.randint(0, len(pool), (INPUTS,), generator=draw)
    inputs = list(torch.split(_noisy(pool[rows], draw), 1))
    compiled = compile_dynamic(model, inputs[0], backend)
    checked = compiled.verify(inputs, tolerance=1e-4)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        trace: Any = torch.jit.trace
        traced = trace(model, inputs[0], check_trace=False)
        paths = [tuple(compiled.run(x)[1].path) for x in inputs]
        own = torch.cat([model(x) for x in inputs]).argmax(-1)
        ours = torch.cat([compiled(x) for x in inputs]).argmax(-1)
        flat = torch.cat([traced(x) for x in inputs]).argmax(-1)
    other = torch.tensor([path != paths[0] for path in paths])
    times = _latencies(model, {"program": compiled, "trace": traced}, inputs[:200])
    return {
        f"{name}: accuracy": float((own == target[rows]).float().mean()),
        f"{name}: share on another path": float(other.float().mean()),
        f"{name}: paths": float(len(set(paths))),
        f"{name}: trace mispredicts on other paths": float((flat != own)[other].float().mean()) if other.any() else 0.0,
        f"{name}: program mispredicts": float((ours != own).sum()),
        f"{name}: outputs or decisions that differ": float(checked["mismatches"] + checked["decisions"]),
        f"{name}: eager us": times["eager"],
        f"{name}: program us": times["program"],
        f"{name}: trace us": times["trace"],
        f"{name}: sub-networks": float(len(compiled.subgraphs)),
    }


def run(seeds: Sequence[int] = (0, 1, 2)) -> ClaimRecord:
    """Run the claim; about half a minute a seed."""
    begun = time.perf_counter()
    with torch.random.fork_rng():
        found = [{k: v for name in NETS for k, v in _measured(name, seed).items()} for seed in seeds]
    metrics = {name: [each[name] for each in found] for name in found[0]}
    wrong = [fmean(metrics[f"{name}: trace mispredicts on other paths"]) for name in NETS]
    differing = sum(
        sum(metrics[f"{name}: program mispredicts"]) + sum(metrics[f"{name}: outputs or decisions that differ"])
        for name in NETS
    )
    faster = [
        fmean(
            eager / program
            for eager, program in zip(metrics[f"{name}: eager us"], metrics[f"{name}: program us"], strict=True)
        )
        for name in NETS
    ]
    effects = {
        "trace mispredicts on other paths, mean of nets": fmean(wrong),
        "calls of the program that differ": differing,
        **{f"{name}: times faster than eager": value for name, value in zip(NETS, faster, strict=True)},
    }
    return judge(
        CARD.key,
        CARD.claim.figure if CARD.claim else "",
        metrics=metrics,
        effects=effects,
        parts={
            "the trace mispredicts >= 20 % on other paths": fmean(wrong) >= 0.2,
            "the program differs nowhere": differing == 0,
            ">= 1.1x faster than eager on each net": min(faster) >= 1.1,
        },
        seeds=seeds,
        seconds=time.perf_counter() - begun,
    )
