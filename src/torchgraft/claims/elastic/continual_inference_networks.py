"""Continual inference networks: a 3D convolutional net as a stream, and SPLoRA beside fine-tuning with pruning.

Protocol. (1) A net of three valid 3D convolutions, global pool and linear layer is trained on clips of 16 frames of a
blob that stands still or moves in one of four directions. It is converted and fed streams of 90 frames in which the
movement changes every 30; at every valid step its class is compared with the clip network's on the last 16 frames.
MACs are counted, times are medians of interleaved rounds on one thread (told, not judged). (2) A network of two hidden
layers of 256, trained on digits, is adapted to digits turned by 45 degrees while its hidden units are pruned in three
stages (at 0, 1/4 and 1/2 of the steps) by the L2 norm of their weights as they then are: all weights learned, or frozen
ones with an adapter of rank 8; hidden biases stay as in the source and the head is learned in both. Steps and learning
rates (each method its own, the better of two) were chosen on seed 100.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import fmean

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft.bench.meters import interleaved, macs
from torchgraft.bench.tasks.digits import correct, splits
from torchgraft.claims.record import ClaimRecord, judge
from torchgraft.elastic.continual_inference_networks import CARD, SPLoRA, to_continual

__all__ = ["run"]

CLIP = 16
SIDE = 12
MOVES = ((0.0, 0.0), (0.5, 0.0), (-0.5, 0.0), (0.0, 0.5), (0.0, -0.5))
RATIOS = (0.5, 0.65, 0.8)
STEPS = 300
RANK = 8
LEARNING_RATES = {"fine-tuning": 3e-3, "splora": 1e-2}


def _frames(moves: Tensor, draw: torch.Generator) -> Tensor:
    """Return frames (B, 1, T, 12, 12) of a blob that moves round the edges; moves: (B, T) of classes."""
    velocity = torch.tensor(MOVES)[moves]  # (B, T, 2)
    start = SIDE * torch.rand(len(moves), 1, 2, generator=draw)
    place = (start + velocity.cumsum(1)) % SIDE
    grid = torch.arange(SIDE, dtype=torch.float32)
    gap = (grid - place[..., None] + SIDE / 2) % SIDE - SIDE / 2  # (B, T, 2, 12)
    blob = torch.exp(-gap.square() / 3.0)
    clean = blob[:, :, 0, :, None] * blob[:, :, 1, None, :]
    return (clean + 0.3 * torch.randn(clean.shape, generator=draw))[:, None]


def _video_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv3d(1, 8, 3, padding=(0, 1, 1)),
        nn.BatchNorm3d(8),
        nn.ReLU(),
        nn.MaxPool3d((1, 2, 2)),
        nn.Conv3d(8, 16, 3, padding=(0, 1, 1)),
        nn.BatchNorm3d(16),
        nn.ReLU(),
        nn.Conv3d(16, 16, 3, padding=(0, 1, 1)),
        nn.BatchNorm3d(16),
        nn.ReLU(),
        nn.AdaptiveAvgPool3d(1),
        nn.Flatten(1),
        nn.Linear(16, len(MOVES)),
    )


def _stream(seed: int) -> dict[str, float]:
    torch.manual_seed(seed)
    draw = torch.Generator().manual_seed(seed)
    model = _video_net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(100):
        target = torch.randint(0, len(MOVES), (32,), generator=draw)
        loss = F.cross_entropy(model(_frames(target[:, None].expand(-1, CLIP), draw)), target)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
    model.eval()
    stream = to_continual(model, torch.zeros(1, 1, CLIP, SIDE, SIDE))
    moves = torch.randint(0, len(MOVES), (4, 3), generator=draw).repeat_interleave(30, 1)  # (4, 90)
    frames = _frames(moves, draw)
    found, expected, targets = [], [], []
    with torch.no_grad():
        for t in range(frames.shape[2]):
            out = stream.forward_step(frames[:, :, t])
            if out is not None:
                found.append(out)
                expected.append(model(frames[:, :, t - CLIP + 1 : t + 1]))
                steady = moves[:, t] == moves[:, t - CLIP + 1]
                targets.append(torch.where(steady, moves[:, t], -1))
        ours, theirs, target = torch.stack(found), torch.stack(expected), torch.stack(targets)
        stream.reset()
        stream.forward_steps(frames[:1, :, :CLIP])
        frame, clip = frames[:1, :, CLIP], frames[:1, :, :CLIP]
        times = interleaved([stream.per_frame(), model], [frame, clip], rounds=7)
    return {
        "steps with the same class": float((ours.argmax(-1) == theirs.argmax(-1)).float().mean()),
        "largest difference": float((ours - theirs).abs().max()),
        "accuracy of the stream within a movement": float(correct(ours, target)[target >= 0].mean()),
        "accuracy of the window within a movement": float(correct(theirs, target)[target >= 0].mean()),
        "clip MACs / stream MACs": macs(model, clip) / macs(stream.per_frame(), frame),
        "clip time / stream time": float((times[:, 1] / times[:, 0]).mean()),
    }


class _Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.ModuleList([nn.Linear(64, 256), nn.Linear(256, 256)])
        self.head = nn.Linear(256, 10)
        self.masks: list[Tensor | None] = [None, None]

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        for layer, mask in zip(self.hidden, self.masks, strict=True):
            x = F.relu(layer(x))
            if mask is not None:
                x = x * mask
        out: Tensor = self.head(x)
        return out

    def prune(self, ratio: float) -> None:
        """Mask the units whose weights, as they now are, are smallest."""
        before: Tensor | None = None
        for place, layer in enumerate(self.hidden):
            weight = layer.weight() if isinstance(layer, SPLoRA) else layer.weight
            norms = torch.as_tensor(weight).detach().norm(dim=1)
            old = self.masks[place]
            if old is not None:
                norms = norms * old
            mask = torch.zeros(len(norms), dtype=torch.bool)
            mask[norms.topk(len(norms) - round(ratio * len(norms))).indices] = True
            self.masks[place] = mask
            if isinstance(layer, SPLoRA):
                layer.prune(out=mask, inputs=before)
            before = mask

    def learned(self) -> int:
        """Learned weights of the units that are left, without the head."""
        total, before = 0, 64
        for layer, mask in zip(self.hidden, self.masks, strict=True):
            left = 256 if mask is None else int(mask.sum())
            total += layer.learned if isinstance(layer, SPLoRA) else left * before
            before = left
        return total


def _turned(x: Tensor) -> Tensor:
    """Return images turned by 45 degrees about their middle."""
    half = 0.5**0.5
    turn = torch.tensor([[half, -half, 0.0], [half, half, 0.0]]).expand(len(x), 2, 3)
    return F.grid_sample(x, F.affine_grid(turn, list(x.shape), align_corners=False), align_corners=False)


def _train(model: nn.Module, x: Tensor, y: Tensor, *, steps: int, lr: float, seed: int, ratio: float = 0.0) -> None:
    draw = torch.Generator().manual_seed(seed)
    learned = [value for value in model.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=lr, weight_decay=0.0)
    stages = {0: ratio / 3, steps // 4: 2 * ratio / 3, steps // 2: ratio}
    for step in range(steps):
        if ratio and step in stages and isinstance(model, _Mlp):
            model.prune(stages[step])
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - step / steps)
        rows = torch.randint(0, len(x), (64,), generator=draw)
        loss = F.cross_entropy(model(x[rows]), y[rows])
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()


def _adapted(seed: int, rates: dict[str, float] | None = None) -> dict[str, float]:
    first, _, test = splits()
    torch.manual_seed(seed)
    source = _Mlp()
    images, unseen = torch.as_tensor(first.inputs), torch.as_tensor(test.inputs)
    _train(source, images, first.target, steps=STEPS, lr=2e-3, seed=seed)
    turned, shown = _turned(images), _turned(unseen)
    results: dict[str, float] = {}
    for ratio in RATIOS:
        for name, lr in (rates or LEARNING_RATES).items():
            model = _Mlp()
            model.load_state_dict(source.state_dict())
            torch.manual_seed(seed)
            if name == "splora":
                model.hidden = nn.ModuleList(
                    SPLoRA(layer, rank=RANK) for layer in model.hidden if isinstance(layer, nn.Linear)
                )
            else:
                for layer in model.hidden:
                    if isinstance(layer, nn.Linear):
                        layer.bias.requires_grad_(False)
            _train(model, turned, first.target, steps=STEPS, lr=lr, seed=seed, ratio=ratio)
            with torch.no_grad():
                results[f"{name} at {ratio:.0%}"] = float(correct(model(shown), test.target).mean())
            results[f"{name} learned at {ratio:.0%}"] = float(model.learned())
    return results


def run(seeds: Sequence[int] = (0, 1, 2)) -> ClaimRecord:
    """Run the claim; about half a minute a seed."""
    begun = time.perf_counter()
    with torch.random.fork_rng():
        found = [{**_stream(seed), **_adapted(seed)} for seed in seeds]
    metrics = {name: [each[name] for each in found] for name in found[0]}
    mean = {name: fmean(values) for name, values in metrics.items()}
    shares = [mean[f"splora learned at {ratio:.0%}"] / mean[f"fine-tuning learned at {ratio:.0%}"] for ratio in RATIOS]
    gains = [mean[f"splora at {ratio:.0%}"] - mean[f"fine-tuning at {ratio:.0%}"] for ratio in RATIOS]
    effects = {
        "least share of steps with the same class": min(metrics["steps with the same class"]),
        "times fewer MACs a frame": mean["clip MACs / stream MACs"],
        "times faster a frame": mean["clip time / stream time"],
        "points of SPLoRA above fine-tuning": 100 * fmean(gains),
        "largest share of learned weights": max(shares),
    }
    return judge(
        CARD.key,
        CARD.claim.figure if CARD.claim else "",
        metrics=metrics,
        effects=effects,
        parts={
            "the same class at every valid step": effects["least share of steps with the same class"] == 1.0,
            ">= 8x fewer MACs a frame": min(metrics["clip MACs / stream MACs"]) >= 8.0,
            "SPLoRA >= fine-tuning": fmean(gains) >= 0.0,
            "<= 1/3 of the learned weights": max(shares) <= 1 / 3,
        },
        seeds=seeds,
        seconds=time.perf_counter() - begun,
    )
