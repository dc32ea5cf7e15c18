"""Hold linear layers in int8 and execute them so, where an integer kernel is faster on this machine.

`Integer Quantization for Deep Learning Inference <https://arxiv.org/abs/2004.09602>`_ (Wu et al., 2020):
W_q = round(W / s), s = max_k |W_k| / 127 a row; y = s_x s (x_q - z) W_q^T + b, x_q quantised anew at each call.

Departures: no calibration; a layer whose fastest executor is fp32 is stored in int8 and executed in fp32, or left
alone; layers join in order of the error that they make on training samples.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchgraft.bench.task import Task, call, take
from torchgraft.catalogue import Card
from torchgraft.engines.int8 import BACKENDS, Int8, Int8Linear, choose, is_linear, is_storable, store
from torchgraft.engines.procedure import Procedure, Site, ignored
from torchgraft.engines.surgery.edits import Edit
from torchgraft.errors import BadInput, nearest

__all__ = ["CARD", "Int8Dynamic"]

CARD = Card(
    key="int8-dynamic",
    title="Dynamic int8 that is executed as int8",
    authors="Wu et al., 2020",
    reference="https://arxiv.org/abs/2004.09602",
    family="shrink/quantize",
    kind="procedure",
    engine=("surgery",),
    equation="y = s_x s (x_q - z) W_q^T + b, W_q = round(W / s), s = max_k |W_k| / 127",
    entry="Int8Dynamic",
    stage="precision",
    capabilities=frozenset({"needs-data"}),
    oracles=(
        "no weight moves by more than half its row's scale, no activation by more than half its own",
        "integer sums equal those of 64-bit integers, whatever kernel makes them",
        "the output equals the same integer arithmetic in float64 to 1e-5",
    ),
    choose_when="large linear layers meet enough tokens for integer kernels to pay, or the file must be a quarter",
    choose_instead="magnitude-pruning or svd where the layers are small: rounding costs more than it saves there",
    bibtex="""@article{wu2020integer,
  title={Integer Quantization for Deep Learning Inference: Principles and Empirical Evaluation},
  author={Wu, Hao and Judd, Patrick and Zhang, Xiaojie and Isaev, Mikhail and Micikevicius, Paulius},
  journal={arXiv preprint arXiv:2004.09602},
  year={2020}
}""",
)


def _linear_rows(model: nn.Module, sites: dict[str, nn.Module], example: Any) -> dict[str, int]:
    """Return how many tokens reach each linear layer in one forward pass on ``example`` (per call, the most)."""
    rows: dict[str, int] = dict.fromkeys(sites, 0)

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            rows[name] = max(rows[name], args[0].numel() // args[0].shape[-1])

        return hook

    handles = [module.register_forward_pre_hook(watch(name)) for name, module in sites.items() if is_linear(module)]
    try:
        with torch.no_grad():
            call(model, example)
    finally:
        for handle in handles:
            handle.remove()
    return rows


def _errors(model: nn.Module, edited: dict[str, nn.Module], samples: Any) -> dict[str, float]:
    """Return the squared error of each layer's output over its energy, every layer fed by the unchanged model."""
    error: Counter[str] = Counter()
    energy: Counter[str] = Counter()

    def compare(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            error[name] += float((edited[name](*args) - out).square().sum())  # type: ignore[assignment]
            energy[name] += float(out.square().sum())  # type: ignore[assignment]

        return hook

    handles = [model.get_submodule(name).register_forward_hook(compare(name)) for name in edited]
    try:
        with torch.no_grad():
            call(model, samples)
    finally:
        for handle in handles:
            handle.remove()
    return {name: error[name] / max(energy[name], 1e-30) for name in edited}


class Int8Dynamic(Procedure):
    """Dynamic int8 for linear layers (and int8 storage for convolutions); strength is the share of layers that join.

    Args:
        storage: whether a layer that no integer kernel makes faster is still stored in int8 and executed in fp32.
        backend: a name in :data:`torchgraft.engines.int8.BACKENDS` for every linear layer, or ``"auto"`` to time the
            backends on this machine at the number of tokens that the task's example brings.
        samples: training samples that the order of the layers is judged on.

    Example:
        >>> from torchgraft.bench.task import Task
        >>> x, y = torch.randn(32, 6), torch.randint(0, 3, (32,))
        >>> model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> loss = nn.functional.cross_entropy
        >>> task = Task(model, (x, y), (x, y), (x, y), loss, lambda out, target: (out.argmax(1) == target).float())
        >>> Int8Dynamic(backend="float").apply(model, task, 1.0)[0].state_dict()["weight"].dtype
        torch.int8

    Raises:
        BadInput: the backend is unknown, or ``samples`` is below 1.
    """

    card = CARD

    def __init__(self, *, storage: bool = True, backend: str = "auto", samples: int = 64) -> None:
        if backend != "auto" and backend not in BACKENDS:
            raise BadInput(f"unknown int8 backend {backend!r}{nearest(backend, ['auto', *BACKENDS])}")
        if samples < 1:
            raise BadInput(f"samples must be at least 1, got {samples}")
        self.storage = storage
        self.backend = backend
        self.samples = samples
        self.timed = backend == "auto"

    def for_costs(self, costs: Sequence[str]) -> Int8Dynamic:
        """Return this procedure, without timing where latency does not count; layers are then only stored in int8."""
        if "latency" in costs or self.backend != "auto":
            return self
        return Int8Dynamic(storage=self.storage, backend="float", samples=self.samples)

    def applies_to(self, model: nn.Module, task: Task, *, ignore: Sequence[str] = ()) -> list[Site]:
        """Return the plain linear layers and, where storage counts, convolutions; tied weights are left alone."""
        owners = Counter(
            id(value) for module in model.modules() for value in module._parameters.values() if value is not None
        )
        sites = []
        for name, module in model.named_modules():
            linear = is_linear(module)
            if ignored(name, ignore) or not (linear or (self.storage and is_storable(module))):
                continue
            weight = module.get_parameter("weight")
            if owners[id(weight)] > 1:
                continue
            bias = getattr(module, "bias", None)
            count = weight.numel() + (0 if bias is None else bias.numel())
            sites.append(Site(name, "linear" if linear else "layer", 1, count))
        return sites

    def plan(
        self, model: nn.Module, task: Task, strength: float, *, ignore: Sequence[str] = (), seed: int = 0
    ) -> list[Edit]:
        """Take the layers that err least first, each with its fastest executor."""
        sites = {site.name: model.get_submodule(site.name) for site in self.applies_to(model, task, ignore=ignore)}
        modes = [(module, module.training) for module in model.modules()]
        model.eval()
        try:
            backends = self._backends(model, sites, task)
            edited = {
                name: store(sites[name]) if backend == "float" else Int8Linear.from_linear(sites[name], backend=backend)
                for name, backend in backends.items()
            }
            errors = _errors(model, edited, take(task.train.inputs, slice(self.samples)))
        finally:
            for module, training in modes:
                module.training = training
        order = sorted(backends, key=lambda name: errors[name])  # ties keep the order of the model
        taken = set(order[: math.ceil(strength * len(order))])
        chosen = {name: backend for name, backend in backends.items() if name in taken}
        return [Int8(modules=chosen)] if chosen else []

    def _backends(self, model: nn.Module, sites: dict[str, nn.Module], task: Task) -> dict[str, str]:
        rows = _linear_rows(model, sites, task.example)
        backends: dict[str, str] = {}
        for name, module in sites.items():
            backend = "float"
            if is_linear(module) and rows[name] > 0:
                weight = module.get_parameter("weight")
                d_out, d_in = weight.shape if isinstance(module, nn.Linear) else weight.shape[::-1]
                backend = choose(rows[name], d_in, d_out).backend if self.backend == "auto" else self.backend
            if backend != "float" or (self.storage and is_storable(module)):
                backends[name] = backend
        return backends
