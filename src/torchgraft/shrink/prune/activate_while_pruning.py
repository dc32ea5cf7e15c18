"""Wrap an iterative pruner so that some of what it removes are negative weights that keep neurons off.

`AP: Selective Activation for De-sparsifying Pruned Neural Networks <https://arxiv.org/abs/2212.06145>`_ (Liu et al.,
2023): of n weights left, the host removes (p - q) n / 100, then the q n / 100 with w < 0 and least |w - w_prev| go;
DNR = mean_x #{neurons with ReLU output 0} / #neurons, of which the static part has no incoming weight left.

It is no lever of ``fit``: the second score needs the way that weights have gone since their first values. In a short
training that goes on from trained weights it removes what is worth more than what a host alone removes.

Departures:
- Only weights of linear and convolution layers are pruned; the official script also prunes those of norms.
- Every cycle prunes by both scores; the script leaves the first cycle out.
- Where fewer negative weights are left than are to go, the host's score takes the others, so that counts are exact.
- A neuron is static only if it is dead; one without incoming weights and with a positive bias is alive.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from torchgraft.bench.task import Batch, Task, call
from torchgraft.catalogue import Card, Claim
from torchgraft.engines.masks import lamp_scores, magnitude, prunable, random
from torchgraft.engines.sparse_training import Rewound, SparsityTags, TrainFn, prune_and_rewind, remove_lowest
from torchgraft.errors import BadInput, nearest

__all__ = ["CARD", "HOSTS", "TAGS", "ActivatingPruner", "DeadNeurons", "activating_masks", "dead_neuron_rate"]

CARD = Card(
    key="activate-while-pruning",
    title="Activating while pruning",
    seed_id=263,
    authors="Liu et al., 2023",
    reference="https://arxiv.org/abs/2212.06145",
    family="shrink/prune",
    kind="tool",
    engine=("masks", "taps"),
    equation="host removes (p - q)%, then q% with w < 0 and least |w - w_prev|; DNR = mean #{ReLU = 0} / #neurons",
    entry="ActivatingPruner",
    capabilities=frozenset({"needs-data", "needs-labels", "needs-training"}),
    oracles=(
        "one cycle removes round((p - q) n / 100) + round(q n / 100) of n weights exactly; q = 0 gives the host's mask",
        "what the second score removes was negative and moved at most as far as any negative weight that is left",
        "with inputs >= 0, zeroing a negative weight lowers no pre-activation and raises no dead neuron rate",
        "total rate = static + dynamic on nets built by hand, with linear and convolution layers",
    ),
    claim=Claim(
        text="digits MLP 64-32-32-10, SGD with momentum, 14 cycles at p = 20 down to 4.4% of the weights, rewound"
        " each time; magnitude with q = 2 against magnitude alone; dynamic dead neuron rate and accuracy on test"
        " samples, mean of 3 seeds and of the cycles in each range",
        figure="at <= 10% density dynamic DNR >= 2 points lower and accuracy >= 1 point higher; at > 50% density"
        " accuracy equal within 0.5 points",
    ),
    choose_when="a ReLU network is pruned iteratively to few weights, and many of its neurons have gone quiet",
    choose_instead="lottery-ticket or any host alone at moderate sparsity, and wherever there is no ReLU",
    bibtex="""@article{liu2023ap,
  title={AP: Selective Activation for De-sparsifying Pruned Neural Networks},
  author={Liu, Shiyu and Ghosh, Rohan and Motani, Mehul},
  journal={Transactions on Machine Learning Research},
  year={2023}
}""",
)

#: What kind of sparsity this is.
TAGS = SparsityTags(stage="after", trajectory="dense-to-sparse", mask="dynamic", moves=("drop",))

Scorer = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
#: Scores by name; larger is more important.
HOSTS: Mapping[str, Scorer] = {
    "magnitude": magnitude,
    "lamp": lambda weights: lamp_scores(magnitude(weights)),
    "random": random,
}


def activating_masks(
    end: Mapping[str, Tensor],
    start: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    *,
    host: Scorer = magnitude,
    p: float = 20.0,
    q: float = 2.0,
) -> dict[str, Tensor]:
    """Return ``masks`` without p per cent of what is left: p - q by the host, q by sign and movement.

    Args:
        end: weights at the end of the cycle.
        start: weights at its start.
        masks: which of them are there.
        host: ``host(weights)`` -> scores, over all layers; the lowest go.
        p: per cent of the weights left that go.
        q: per cent that go by sign and movement.

    Raises:
        BadInput: not 0 <= q <= p < 100.

    Example:
        >>> end = {"w": torch.tensor([0.1, -0.5, -2.0, 3.0])}
        >>> start = {"w": torch.tensor([0.0, 1.0, -1.9, 0.0])}
        >>> activating_masks(end, start, {"w": torch.ones(4, dtype=torch.bool)}, p=50, q=25)
        {'w': tensor([False,  True, False,  True])}
    """
    if not 0.0 <= q <= p < 100.0:
        raise BadInput(f"shares need 0 <= q <= p < 100, got p {p} and q {q}")
    left = sum(int(mask.sum()) for mask in masks.values())
    by_host, by_sign = round((p - q) / 100 * left), round(q / 100 * left)
    scores = host({name: torch.where(mask, end[name], 0.0) for name, mask in masks.items()})
    found = remove_lowest(scores, masks, by_host)
    negative = {name: mask & (end[name] < 0) for name, mask in found.items()}
    there = sum(int(mask.sum()) for mask in negative.values())
    moved = {name: (end[name] - start[name]).abs() for name in masks}
    first = min(by_sign, there)
    left_negative = remove_lowest(moved, negative, first)  # those that moved least go
    found = {name: mask & (left_negative[name] | ~negative[name]) for name, mask in found.items()}
    return remove_lowest(scores, found, by_sign - first)


class ActivatingPruner:
    """Prune iteratively by a host's score and by sign and movement, and rewind after each cycle.

    Args:
        host: a name in :data:`HOSTS`, or ``host(weights)`` -> scores by name.
        p: per cent of the weights left that go each cycle.
        q: per cent that go by sign and movement; 0 is the host alone.

    Raises:
        BadInput: the host is unknown, or not 0 <= q <= p < 100.

    Example:
        >>> model = nn.Sequential(nn.Linear(10, 10), nn.ReLU(), nn.Linear(10, 10))
        >>> found = ActivatingPruner(p=20, q=2).prune(model, lambda net, stop: None, 2)
        >>> [round(one.density, 3) for one in found.rounds], round(found.density, 3)
        ([1.0, 0.8], 0.64)
    """

    def __init__(self, host: str | Scorer = "magnitude", *, p: float = 20.0, q: float = 2.0) -> None:
        if isinstance(host, str) and host not in HOSTS:
            raise BadInput(f"unknown host {host!r}{nearest(host, list(HOSTS))}")
        if not 0.0 <= q <= p < 100.0:
            raise BadInput(f"shares need 0 <= q <= p < 100, got p {p} and q {q}")
        self.host: Scorer = HOSTS[host] if isinstance(host, str) else host
        self.p, self.q = p, q

    def masks(
        self, end: Mapping[str, Tensor], start: Mapping[str, Tensor], masks: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return the masks after a cycle; see :func:`activating_masks`."""
        return activating_masks(end, start, masks, host=self.host, p=self.p, q=self.q)

    def prune(self, model: nn.Module, train_fn: Task | TrainFn, cycles: int, *, rewind_step: int = 0) -> Rewound:
        """Train, prune and rewind ``cycles`` times; ``model`` is left as it was.

        Args:
            model: the model with its first weights.
            train_fn: ``train_fn(model, stop)`` trains a model in place, learning-rate warm-up included; or a task.
            cycles: how often.
            rewind_step: the step of the first run whose weights the cycles go back to.
        """
        return prune_and_rewind(model, train_fn, self.masks, cycles, rewind_step=rewind_step)


@dataclass(frozen=True)
class DeadNeurons:
    """Shares of hidden neurons whose ReLU puts out 0, mean over inputs; total = static + dynamic.

    Args:
        total: dead for whatever reason.
        static: dead and without incoming weights.
        layers: (total, static) of each ReLU, in the order of the forward pass.
    """

    total: float
    static: float
    layers: tuple[tuple[float, float], ...] = field(default=())

    @property
    def dynamic(self) -> float:
        """Dead although weights come in."""
        return self.total - self.static


_RELUS = {torch.relu, torch.relu_, Tensor.relu, Tensor.relu_, nn.functional.relu, nn.functional.relu_}


class _Counter(TorchFunctionMode):
    """Counts zeros in what ReLUs put out, and among them those of channels without incoming weights."""

    def __init__(self) -> None:
        super().__init__()
        self.bare: Tensor | None = None  # channels of the layer that ran last, True where nothing comes in
        self.axis = 1
        self.calls = 0
        self.counts: list[list[int]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in _RELUS:
            self.add(out)
        return out

    def add(self, out: Tensor) -> None:
        zero = out.detach() == 0  # torch calls this with the mode off
        static = 0
        if self.bare is not None and zero.ndim > 1 and zero.shape[self.axis] == len(self.bare):
            static = int(zero.movedim(self.axis, -1)[..., self.bare].sum())
        if self.calls == len(self.counts):
            self.counts.append([0, 0, 0])
        row = self.counts[self.calls]
        row[0] += int(zero.sum())
        row[1] += static
        row[2] += zero.numel()
        self.calls += 1


def dead_neuron_rate(model: nn.Module, loader: Iterable[Batch]) -> DeadNeurons:
    """Return the dead neuron rate of ``model`` on ``loader``, in eval mode, over all ReLUs that it calls.

    A neuron's incoming weights are those of the linear layer or convolution that ran last before its ReLU; where its
    outputs do not match (as behind a sum of two branches of other widths), no neuron counts as static.

    Args:
        model: the model; its mode is restored.
        loader: (inputs, target) pairs; the targets are not used.

    Raises:
        BadInput: there is no batch, or the model calls no ReLU.

    Example:
        >>> model = nn.Sequential(nn.Linear(1, 2), nn.ReLU())
        >>> with torch.no_grad():
        ...     _ = model[0].weight.copy_(torch.tensor([[0.0], [-1.0]])), model[0].bias.fill_(-1.0)
        >>> found = dead_neuron_rate(model, [(torch.ones(3, 1), torch.zeros(3))])
        >>> found.total, found.static, found.dynamic
        (1.0, 0.5, 0.5)
    """
    counter = _Counter()
    bare = {
        name.rpartition(".")[0]: (weight.detach() == 0).flatten(1).all(1)
        for name, weight in prunable(model).items()
        if isinstance(model.get_submodule(name.rpartition(".")[0]), (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d))
    }

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, out: Tensor) -> None:
            counter.bare, counter.axis = bare[name], -1 if isinstance(module, nn.Linear) else 1

        return hook

    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    batches = 0
    try:
        with ExitStack() as stack:
            for name in bare:
                stack.callback(model.get_submodule(name).register_forward_hook(note(name)).remove)
            stack.enter_context(torch.no_grad())
            for inputs, _ in loader:
                counter.calls, counter.bare = 0, None
                batches += 1
                with counter:
                    call(model, inputs)
    finally:
        for module, training in modes:
            module.training = training
    if not batches or not counter.counts:
        raise BadInput("a dead neuron rate needs a batch and a model with a ReLU")
    units = sum(row[2] for row in counter.counts)
    return DeadNeurons(
        sum(row[0] for row in counter.counts) / units,
        sum(row[1] for row in counter.counts) / units,
        tuple((row[0] / row[2], row[1] / row[2]) for row in counter.counts),
    )
