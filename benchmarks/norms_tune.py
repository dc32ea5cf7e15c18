"""Step time and memory of Tune mode beside Eval mode, as paired ratios, on ConvBN networks of four kinds.

A step is forward and backward with every parameter trained and the batch norms' statistics frozen. Rounds are
interleaved, and of each ratio the median and its 95 % interval are given. Then the layers of this family on (64, 128,
512), forward and backward, over the torch layer that they stand for. Memory is what the forward pass keeps for the
backward pass, parameters and buffers not counted; it is exact. Losses are compared in the same run.

Run: ``python benchmarks/norms_tune.py [--threads 1] [--rounds 15]``. Writes results/norms_tune.json.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft.bench.files import write_atomic
from torchgraft.bench.meters import interval
from torchgraft.bench.models import ResidualNet
from torchgraft.engines.normalize.tune import kept_bytes
from torchgraft.parts.norms.convbn_tune_mode import deploy, tune_mode
from torchgraft.parts.norms.layernorm_scaling import DepthScaledNorm
from torchgraft.parts.norms.powernorm import PowerNorm
from torchgraft.parts.norms.slab_prepbn import PRepBN


class Branch(nn.Module):
    """x plus a chain of convolutions with batch norm; ``depthwise`` for the inverted residual of MobileNet."""

    def __init__(self, width: int, inner: int, *, depthwise: bool = False) -> None:
        super().__init__()
        groups = inner if depthwise else 1
        self.body = nn.Sequential(
            nn.Conv2d(width, inner, 1, bias=False),
            nn.BatchNorm2d(inner),
            nn.ReLU(),
            nn.Conv2d(inner, inner, 3, padding=1, groups=groups, bias=False),
            nn.BatchNorm2d(inner),
            nn.ReLU(),
            nn.Conv2d(inner, width, 1, bias=False),
            nn.BatchNorm2d(width),
        )
        self.depthwise = depthwise

    def forward(self, x: Tensor) -> Tensor:
        """Add the branch."""
        y: Tensor = x + self.body(x)
        return y if self.depthwise else F.relu(y)


def stem(width: int) -> list[nn.Module]:
    """Return a convolution from three channels, its norm and ReLU."""
    return [nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]


def networks() -> dict[str, tuple[nn.Module, Tensor]]:
    """Return the networks and a batch for each."""
    torch.manual_seed(0)
    return {
        "bottleneck blocks, 64 channels": (
            nn.Sequential(*stem(64), *(Branch(64, 16) for _ in range(4))),
            torch.randn(16, 3, 32, 32),
        ),
        "bottleneck blocks, 256 channels": (
            nn.Sequential(*stem(256), *(Branch(256, 64) for _ in range(3))),
            torch.randn(8, 3, 32, 32),
        ),
        "basic blocks, 16 to 64 channels": (ResidualNet(3, widths=(16, 32, 64)), torch.randn(16, 3, 32, 32)),
        "inverted residuals, 24 channels": (
            nn.Sequential(*stem(24), *(Branch(24, 96, depthwise=True) for _ in range(4))),
            torch.randn(16, 3, 32, 32),
        ),
    }


def seconds(model: nn.Module, x: Tensor) -> float:
    """Return the time of one step."""
    begun = time.perf_counter()
    model.zero_grad()
    model(x).square().mean().backward()
    return time.perf_counter() - begun


def measured(plain: nn.Module, x: Tensor, rounds: int) -> dict[str, Any]:
    """Return the ratios of one network."""
    for module in plain.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            module.running_var = 0.5 + torch.rand_like(module.weight)
    forms = {"eval": plain.eval(), "tune": copy.deepcopy(plain), "deploy": copy.deepcopy(plain)}
    pairs = len(tune_mode(forms["tune"], x).pairs)
    deploy(forms["deploy"], x)
    with torch.no_grad():
        gap = float((forms["tune"](x) - plain(x)).norm() / plain(x).norm())
    for model in forms.values():
        seconds(model, x)
    rows = []
    for turn in range(rounds):
        order = list(forms) if turn % 2 == 0 else list(reversed(forms))
        rows.append({name: seconds(forms[name], x) for name in order})
    speeds = {name: interval([row["eval"] / row[name] for row in rows]) for name in ("tune", "deploy")}
    return {
        "pairs": pairs,
        "output differs by": gap,
        **{f"eval over {name}, time": [each.value, each.low, each.high] for name, each in speeds.items()},
        "tune over eval, kept bytes": kept_bytes(forms["tune"], x) / kept_bytes(plain, x),
        "deploy over eval, kept bytes": kept_bytes(forms["deploy"], x) / kept_bytes(plain, x),
    }


def layers(rounds: int) -> dict[str, list[float]]:
    """Return forward and backward of each layer on (64, 128, 512) over that of the torch layer."""
    torch.manual_seed(0)
    width = 512
    x, grad = torch.randn(64, 128, width), torch.randn(64, 128, width)

    def timed(layer: nn.Module) -> float:
        leaf = x.clone().requires_grad_()
        begun = time.perf_counter()
        torch.autograd.grad(layer(leaf), [leaf, *layer.parameters()], grad, allow_unused=True)
        return time.perf_counter() - begun

    modules: dict[str, nn.Module] = {
        "LayerNorm": nn.LayerNorm(width),
        "BatchNorm1d": Rows(nn.BatchNorm1d(width)),
        "PowerNorm, group_scale=0": PowerNorm(width, group_scale=0),
        "PowerNorm": PowerNorm(width),
        "PRepBN, lam 0": PRepBN(width, steps=0),
        "DepthScaledNorm": DepthScaledNorm(width, layer_index=7),
    }
    for layer in modules.values():
        timed(layer)
    rows = [{name: timed(layer) for name, layer in modules.items()} for _ in range(rounds)]
    found = {}
    for name in list(modules)[2:]:
        for base in ("LayerNorm", "BatchNorm1d") if "PRep" in name else ("LayerNorm",):
            each = interval([row[name] / row[base] for row in rows])
            found[f"{name} over {base}"] = [each.value, each.low, each.high]
    return found


class Rows(nn.Module):
    """A batch norm on all tokens as rows."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        """Normalise every token as a row."""
        y: Tensor = self.norm(x.flatten(0, 1)).view(x.shape)
        return y


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found = {name: measured(model, x, options.rounds) for name, (model, x) in networks().items()}
    table = Table("network", "pairs", "Tune: times as fast as Eval", "Deploy: times as fast", "kept bytes, Tune / Eval")
    for name, cell in found.items():
        shown = ["{:.2f} [{:.2f}, {:.2f}]".format(*cell[f"eval over {form}, time"]) for form in ("tune", "deploy")]
        table.add_row(name, str(cell["pairs"]), *shown, f"{cell['tune over eval, kept bytes']:.2f}")
    Console(width=140).print(table)
    of_layers = layers(options.rounds)
    for name, (value, low, high) in of_layers.items():
        Console().print(f"{name}: {value:.2f} [{low:.2f}, {high:.2f}]")
    record = {
        "layers, forward and backward": of_layers,
        "threads": options.threads,
        "rounds": options.rounds,
        "machine": f"{platform.machine()}, {platform.system()}",
        "torch": torch.__version__,
        "networks": found,
    }
    write_atomic(Path("results/norms_tune.json"), json.dumps(record, indent=1).encode())


if __name__ == "__main__":
    main()
