"""Hold every spatial kernel of a convolution as a sum of products of one-way filters.

`A priori compression of convolutional neural networks for wave simulators <https://arxiv.org/abs/2304.04964>`_
(Boukraichi et al., 2023): W[o, i] = sum_{r=1..R} u1_{oir} (x) u2_{oir} (x) u3_{oir}, only the filters are parameters.

What falls: parameters, from prod_n k_n to R sum_n k_n for each pair of channels (7 x 7: 49 to 14 at R = 1). What need
not fall: MACs. No two pairs of channels share a filter, so a layer either composes its kernel at every call and runs
the dense convolution, MACs as before, or chains one-way convolutions through C_out C_in R channels in between: fewer
MACs, more memory, and more time (``torchgraft.engines.separable_kernels``).

Departures: :class:`SeparableKernelConv` (the procedure) factors a trained model, the paper trains in factored form from
scratch (:func:`convert`); ranks over layers are chosen by error against parameters, the paper gives one to all.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from torchgraft.bench.task import Inputs, Task, call
from torchgraft.catalogue import Card, Claim
from torchgraft.engines.lowrank import RankStep, ranks_at
from torchgraft.engines.procedure import Procedure, Refusal, Site, ignored
from torchgraft.engines.separable_kernels import (
    Execution,
    SeparableKernelConv1d,
    SeparableKernelConv2d,
    SeparableKernelConv3d,
    SeparateKernels,
    compose,
    cp_factors,
    from_dense,
    full_rank,
    plain_convolutions,
    put,
    separable_like,
)
from torchgraft.engines.surgery.edits import Edit
from torchgraft.errors import BadInput

__all__ = [
    "CARD",
    "SeparableKernelConv",
    "SeparableKernelConv1d",
    "SeparableKernelConv2d",
    "SeparableKernelConv3d",
    "SeparateKernels",
    "chain_macs",
    "compose",
    "convert",
    "cp_factors",
    "from_dense",
]

CARD = Card(
    key="separable-kernel-conv",
    title="Convolutions with separable kernels",
    seed_id=148,
    authors="Boukraichi et al., 2023",
    reference="https://arxiv.org/abs/2304.04964",
    family="shrink/factorize",
    kind="procedure",
    engine=("parametrize", "surgery"),
    equation="W[o, i] = sum_r u1_{oir} (x) u2_{oir} (x) u3_{oir}",
    entry="SeparableKernelConv",
    stage="rank",
    oracles=(
        "the composed kernel's convolution equals the chained one-way convolutions, 1e-12 in float64, over strides,"
        " paddings, dilations and padding modes, outputs and gradients",
        "from_dense at full rank gives the dense convolution, 1e-12; below it the error of every kernel is"
        " sqrt(sum of dropped sigma^2), and kernels of three axes that are products are found, 1e-6",
        "the composed kernel's variance at the start is He's within 10 % for C_in C_out = 4096",
        "counted MACs of the chain are the formula's, and sites where they would not fall are refused",
    ),
    claim=Claim(
        text="2-D wave equation, 16 x 16 grid, leapfrog, random Gaussian bumps, 160 training and 40 test trajectories;"
        " CNN of 4 layers (8 channels, 7 x 7) predicting the next frame from the last two: R = 1 from the start"
        " against dense",
        figure="relative L2 on test <= 1.15 x the dense model's with <= 35 % of its parameters, and a gap between test"
        " and training that is no larger; mean of 3 seeds",
    ),
    choose_when="kernels are large (5 x 5 and up, or three-dimensional) and the bytes of the weights are what counts",
    choose_instead="svd-truncation with form='separable', whose chain shares R channels among all pairs and is fast;"
    " this one for time never, nor for 1 x 1 and one-dimensional kernels, where nothing can fall",
    confidence="medium",
    bibtex="""@article{boukraichi2023apriori,
  title={A priori compression of convolutional neural networks for wave simulators},
  author={Boukraichi, Hamza and Akkari, Nissrine and Casenave, Fabien and Ryckelynck, David},
  journal={arXiv preprint arXiv:2304.04964},
  year={2023}
}""",
)


def convert(model: nn.Module, rank: int = 1, *, execution: Execution = "compose") -> nn.Module:
    """Return a copy of ``model`` in which every convolution that gains by it is separable, drawn anew, to be trained.

    Args:
        model: any module; left as it was. Grouped convolutions and those where ``rank`` saves nothing stay.
        rank: R, cut to what a kernel can have.
        execution: how the layers run.

    Example:
        >>> [type(layer).__name__ for layer in convert(nn.Sequential(nn.Conv2d(1, 4, 7), nn.Conv2d(4, 4, 1)))]
        ['SeparableKernelConv2d', 'Conv2d']
    """
    if rank < 1:
        raise BadInput(f"rank must be at least 1, got {rank}")
    made = copy.deepcopy(model)
    for name, layer in plain_convolutions(made).items():
        sizes = cast("tuple[int, ...]", layer.kernel_size)
        cut = min(rank, full_rank(sizes))
        if cut * sum(sizes) < math.prod(sizes):
            put(made, name, separable_like(layer, cut, execution))
    return made


def _spatial(model: nn.Module, inputs: Inputs) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """Return the sizes that go into and come out of each convolution that ``model`` calls, the last time it does."""
    seen: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}
    looked_at = copy.deepcopy(model).eval()

    def noter(name: str, dims: int) -> Any:
        def note(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            seen[name] = tuple(args[0].shape[-dims:]), tuple(output.shape[-dims:])

        return note

    for name, layer in plain_convolutions(looked_at).items():
        layer.register_forward_hook(noter(name, cast(Tensor, layer.weight).ndim - 2))
    with torch.no_grad():
        call(looked_at, inputs)
    return seen


def chain_macs(conv: nn.Module, rank: int, before: Sequence[int], after: Sequence[int]) -> tuple[int, int]:
    """Return the MACs a sample of the chain at ``rank`` and of the dense convolution, from sizes before and after it.

    Example:
        >>> chain_macs(nn.Conv2d(2, 2, 3, padding=1), 1, (8, 8), (8, 8))
        (1536, 2304)
    """
    layer = cast(Any, conv)
    pairs = layer.in_channels * layer.out_channels
    chained, sizes = 0, list(before)
    for axis in range(len(sizes) - 1, -1, -1):
        sizes[axis] = after[axis]
        chained += rank * pairs * layer.kernel_size[axis] * math.prod(sizes)
    return chained, pairs * math.prod(layer.kernel_size) * math.prod(after)


class SeparableKernelConv(Procedure):
    """Separable kernels in a trained model, without training; the recovery of ``fit`` trains the filters on.

    Args:
        execution: ``"compose"`` (fewer parameters, MACs as before) or ``"chain"`` (fewer of both, more memory and
            time); layers whose chain would not take fewer MACs are then refused. Where ``fit`` measures MACs and
            neither latency nor memory, it takes the chain.

    Example:
        >>> from torchgraft.bench.task import Task
        >>> x, y = torch.randn(16, 1, 8, 8), torch.randint(0, 3, (16,))
        >>> model = nn.Sequential(nn.Conv2d(1, 4, 5), nn.Flatten(), nn.Linear(64, 3))
        >>> task = Task(model, (x, y), (x, y), (x, y), nn.functional.cross_entropy, lambda out, t: out[:, 0])
        >>> SeparableKernelConv().apply(model, task, 1.0)[0].rank
        1
    """

    card = CARD
    expense = 0

    def __init__(self, *, execution: Execution = "compose") -> None:
        if execution not in ("compose", "chain"):
            raise BadInput(f"execution must be 'compose' or 'chain', got {execution!r}")
        self.execution = execution

    def for_costs(self, costs: Sequence[str]) -> Procedure:
        """Return the chain where MACs are measured and neither latency nor memory."""
        slow = any("latency" in cost or "memory" in cost for cost in costs)
        return SeparableKernelConv(execution="chain") if "macs" in costs and not slow else self

    def _ranks(self, model: nn.Module, task: Task, ignore: Sequence[str]) -> tuple[dict[str, int], list[Refusal]]:
        """Return the largest rank that saves anything, by layer, and the layers where none does."""
        found: dict[str, int] = {}
        refused: list[Refusal] = []
        sizes = _spatial(model, task.train[:2].inputs)
        for name, layer in plain_convolutions(model).items():
            if ignored(name, ignore) or name not in sizes:
                continue
            window = cast("tuple[int, ...]", layer.kernel_size)
            highest = min((math.prod(window) - 1) // sum(window), full_rank(window))
            reason = f"R sum k is no less than prod k for a window of {'x'.join(map(str, window))}"
            if self.execution == "chain" and highest:
                one, dense = chain_macs(layer, 1, *sizes[name])
                highest = min(highest, (dense - 1) // one)
                reason = f"the chain takes {one} MACs a sample at R = 1, the dense convolution {dense}"
            if highest:
                found[name] = highest
            else:
                refused.append(Refusal(name, reason))
        return found, refused

    def applies_to(self, model: nn.Module, task: Task, *, ignore: Sequence[str] = ()) -> list[Site]:
        """Return the convolutions whose separable form is smaller."""
        layers = plain_convolutions(model)
        return [
            Site(name, "convolution", rank, cast(Tensor, layers[name].weight).numel())
            for name, rank in self._ranks(model, task, ignore)[0].items()
        ]

    def refusals(self, model: nn.Module, task: Task, *, ignore: Sequence[str] = ()) -> list[Refusal]:
        """Return the convolutions that would not become smaller, and why."""
        return self._ranks(model, task, ignore)[1]

    def plan(
        self, model: nn.Module, task: Task, strength: float, *, ignore: Sequence[str] = (), seed: int = 0
    ) -> list[Edit]:
        """Return one edit with the rank of every convolution; those that lose least for what they save come first."""
        layers = plain_convolutions(model)
        steps = _steps({name: (layers[name], rank) for name, rank in self._ranks(model, task, ignore)[0].items()})
        ranks = ranks_at(steps, strength)
        return [SeparateKernels(ranks=ranks, execution=self.execution)] if ranks else []


def _steps(layers: Mapping[str, tuple[nn.Module, int]]) -> list[RankStep]:
    """Return the steps from dense to rank 1: least error for what is saved first, those of one layer in order."""
    ordered: list[tuple[float, int, int, RankStep]] = []
    for place, (name, (layer, highest)) in enumerate(layers.items()):
        weight = cast(Tensor, layer.weight).detach()
        kernels = weight.flatten(0, 1).double()
        window = kernels.shape[1:]
        whole = float(kernels.square().sum()) or 1.0
        before, error, dearest = math.prod(window), 0.0, 0.0
        for rank in range(highest, 0, -1):
            lost = float((compose(cp_factors(kernels, rank)) - kernels).square().sum()) / whole
            saved = float(len(kernels) * (before - rank * sum(window)))
            dearest = max(dearest, (lost - error) / saved)  # a later step never comes before an earlier one
            ordered.append((dearest, place, -rank, RankStep(name, rank, saved, lost - error)))
            before, error = rank * sum(window), lost
    return [step for *_, step in sorted(ordered, key=lambda item: item[:3])]
