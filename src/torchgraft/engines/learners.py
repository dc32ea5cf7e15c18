"""A layer as a sum of learners, of which each token gets as many as a gate says, beside the layer itself.

The learners are slices of one hidden layer; the first k of them run on the tokens that chose at least k, and on no
others. What it costs to run a learner is taken off the gate's scores, so that one gate serves several budgets.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft.bench.meters.forward import resting
from torchgraft.bench.task import Inputs, call
from torchgraft.engines.feedforward import ACTIVATIONS, FeedForwardLayer, feedforwards
from torchgraft.engines.nesting import ElasticModule
from torchgraft.engines.routing import refine, straight_through
from torchgraft.engines.sites import ignored
from torchgraft.engines.surgery.edits import Edit, apply_edits
from torchgraft.engines.surgery.swap import replace_module
from torchgraft.engines.taps import record
from torchgraft.errors import BadInput

__all__ = ["ACM", "AcmModel", "Acmize", "acmize", "learner_edit", "start_from_layers", "watch"]


class ACM(nn.Module):
    """Learners s_1..s_N, each linear - activation - linear, whose answers add up, and a gate that says how many run.

    In training mode a straight-through Gumbel sample chooses and all learners run; else :attr:`mode` decides.

    Args:
        dim_in: width of the inputs.
        dim_out: width of the outputs.
        learners: N.
        hidden: neurons of a learner; default: the mean width over N.
        activation: a name of :data:`torchgraft.engines.feedforward.ACTIVATIONS`, or ``"identity"``.
        gate_hidden: neurons of the gate; default: ``dim_in`` / 16, between 2 and 16.
        least: the fewest learners that the gate may choose.
        tau: temperature of the samples in training.

    Shapes:
        (..., dim_in) -> (..., dim_out)

    Example:
        >>> acm = ACM(8, 6, learners=4, hidden=3).eval()
        >>> acm.mode = 2
        >>> acm(torch.zeros(5, 8)).shape, acm.spent == 5 * 2 * acm.learner_macs
        (torch.Size([5, 6]), True)

    Raises:
        BadInput: a size is below 1 or a name unknown.
    """

    def __init__(
        self,
        dim_in: int,
        dim_out: int,
        *,
        learners: int = 4,
        hidden: int | None = None,
        activation: str = "gelu",
        gate_hidden: int | None = None,
        least: int = 0,
        tau: float = 0.8,
    ) -> None:
        super().__init__()
        hidden = max(1, (dim_in + dim_out) // (2 * learners)) if hidden is None and learners > 0 else hidden or 0
        gate_hidden = min(16, max(2, dim_in // 16)) if gate_hidden is None else gate_hidden
        if min(dim_in, dim_out, learners, hidden, gate_hidden) < 1 or not 0 <= least <= learners:
            raise BadInput(
                f"an ACM needs sizes of at least 1 and least in 0..learners, got {dim_in}, {dim_out}, learners "
                f"{learners}, hidden {hidden}, gate_hidden {gate_hidden}, least {least}"
            )
        if activation != "identity" and activation not in ACTIVATIONS:
            raise BadInput(f"activation must be identity or one of {', '.join(ACTIVATIONS)}, got {activation!r}")
        self.dim_in, self.dim_out, self.learners, self.hidden = dim_in, dim_out, learners, hidden
        self.activation, self.least, self.tau = activation, least, tau
        #: What a layer's whole error, 1 at the gate, is worth beside the Gumbel noise of size 1.
        self.sharpness = 30.0
        self.up = nn.Linear(dim_in, learners * hidden)
        self.down = nn.Linear(learners * hidden, dim_out, bias=False)
        self.biases = nn.Parameter(torch.zeros(learners + 1, dim_out))  # b_0, and one of each learner
        self.gate = nn.Sequential(nn.Linear(dim_in, gate_hidden), nn.GELU(), nn.Linear(gate_hidden, learners + 1))
        #: ``"gated"``, ``"all"``, or the number of learners that every token gets.
        self.mode: str | int = "gated"
        #: What a learner costs at the gate's scores: lambda.
        self.price = 0.0
        #: Multiply-accumulates of the learners in the latest call in eval mode; gates not counted.
        self.spent = 0
        #: The sample of the latest call in training mode, (N, learners + 1).
        self.sample: Tensor | None = None

    @property
    def learner_macs(self) -> int:
        """Multiply-accumulates of one learner on one token."""
        return self.hidden * (self.dim_in + self.dim_out)

    @property
    def gate_macs(self) -> int:
        """Multiply-accumulates of the gate on one token."""
        width = len(self.gate[0].bias)  # type: ignore[arg-type]  # a linear layer's
        return width * (self.dim_in + self.learners + 1)

    def _act(self, x: Tensor) -> Tensor:
        return x if self.activation == "identity" else ACTIVATIONS[self.activation](x)

    def _learner(self, n: int) -> Callable[[Tensor], Tensor]:
        rows = slice((n - 1) * self.hidden, n * self.hidden)

        def learner(x: Tensor) -> Tensor:
            inner = self._act(F.linear(x, self.up.weight[rows], self.up.bias[rows]))
            answer: Tensor = F.linear(inner, self.down.weight[:, rows], self.biases[n])
            return answer

        return learner

    def scores(self, x: Tensor) -> Tensor:
        """Return the gate's scores of 0..N learners, with the price taken off; (..., D) -> (..., N + 1)."""
        steps = torch.arange(self.learners + 1, device=x.device, dtype=x.dtype)
        scores: Tensor = self.sharpness * self.gate(x) - self.price * steps
        return scores.masked_fill(steps < self.least, -math.inf)

    def partial_sums(self, x: Tensor) -> Tensor:
        """Return h_0..h_N, (M, dim_in) -> (N + 1, M, dim_out)."""
        inner = torch.unflatten(self._act(self.up(x)), -1, (self.learners, self.hidden))  # (M, N, hidden)
        down = torch.unflatten(self.down.weight, 1, (self.learners, self.hidden))  # (F, N, hidden)
        answers = torch.einsum("mnh,fnh->nmf", inner, down) + self.biases[1:, None]
        start = self.biases[:1, None].expand(1, len(x), -1)
        return torch.cat([start, answers]).cumsum(0)

    def forward(self, x: Tensor) -> Tensor:
        """Return what the chosen learners say."""
        if x.shape[-1:] != (self.dim_in,):
            raise BadInput(f"an ACM of {self.dim_in} inputs got shape {tuple(x.shape)}")
        rows = x.reshape(-1, self.dim_in)
        if self.training:
            self.sample = straight_through(self.scores(rows), tau=self.tau)
            # Learner n counts where at least n were chosen; its neurons are scaled by that, which is one product.
            weight = self.sample.flip(-1).cumsum(-1).flip(-1)  # (M, N + 1); column n: 1 where choice >= n
            inner = self._act(self.up(rows)) * weight[:, 1:].repeat_interleave(self.hidden, -1)
            made = self.down(inner) + weight @ self.biases
        elif self.mode == "gated":
            made = self._chosen(rows, self.scores(rows).argmax(-1))
        else:
            count = self.learners if self.mode == "all" else int(self.mode)
            if not 0 <= count <= self.learners:
                raise BadInput(f"mode must be 'gated', 'all' or a number of learners to {self.learners}, got {count}")
            made = self._chosen(rows, torch.full((len(rows),), count, device=x.device))
        out: Tensor = made.reshape(*x.shape[:-1], self.dim_out)
        return out

    def _chosen(self, rows: Tensor, choice: Tensor) -> Tensor:
        self.sample = None
        self.spent = int(choice.sum()) * self.learner_macs
        return refine(rows, choice, self.biases[0], [self._learner(n) for n in range(1, self.learners + 1)])


class AcmPlace(nn.Module):
    """The original layer and its ACM; ``level`` says which of them runs, and at which price."""

    def __init__(self, original: nn.Module, acm: ACM, levels: int) -> None:
        super().__init__()
        self.original, self.acm = original, acm
        self.prices: Tensor
        self.register_buffer("prices", torch.zeros(levels, dtype=torch.float64))
        self.level: int | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.level is None:
            out: Tensor = self.original(x)
        else:
            self.acm.price = float(self.prices[self.level])
            out = self.acm(x)
        return out


class AcmModel(ElasticModule):
    """A model with ACMs beside some of its layers, and a price of computing for each budget.

    Args:
        model: the model, its layers replaced by pairs of the layer and its ACM.
        wanted: rising shares, in (0, 1), of what the ACMs can spend; one budget each, and the full one.
    """

    by_sample: ClassVar[bool] = True

    def __init__(self, model: nn.Module, wanted: Sequence[float]) -> None:
        super().__init__((*wanted, 1.0))
        self.model = model
        self.wanted = tuple(wanted)

    @property
    def places(self) -> dict[str, AcmPlace]:
        """The replaced layers, by their name in the original model."""
        return {name: module for name, module in self.model.named_modules() if isinstance(module, AcmPlace)}

    @property
    def acms(self) -> dict[str, ACM]:
        """The ACMs, by the name of the layer in the original model."""
        return {name: place.acm for name, place in self.places.items()}

    def select(self, level: int) -> None:
        """Run the originals at the last level, ACMs at the level's price at the others."""
        for place in self.places.values():
            place.level = None if level == len(self.wanted) else level

    def set_price(self, level: int, price: float) -> None:
        """Say what a learner of mean size costs at ``level``; larger ones cost more in proportion."""
        for place, weight in zip(self.places.values(), self.weights, strict=True):
            place.prices[level] = price * weight

    @property
    def weights(self) -> list[float]:
        """What a learner of each place costs, in units of their mean."""
        sizes = [acm.learner_macs for acm in self.acms.values()]
        return [size * len(sizes) / sum(sizes) for size in sizes]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model at the budget that is set."""
        return self.model(*args, **kwargs)


class Acmize(Edit):
    """Put ACMs beside layers.

    Args:
        names: dotted names of the layers.
        dims: (inputs, outputs, hidden neurons of a learner) of each.
        activations: of each; ``"identity"`` where the layer is linear.
        learners: N.
        wanted: shares of what the ACMs can spend, as for :class:`AcmModel`.
    """

    op: ClassVar[str] = "acmize"
    names: tuple[str, ...] = Field(min_length=1)
    dims: tuple[tuple[int, int, int], ...]
    activations: tuple[str, ...]
    learners: int = Field(ge=1)
    wanted: tuple[float, ...] = Field(min_length=1)

    def rewrite(self, model: nn.Module) -> nn.Module:
        """Replace each layer by itself and an ACM with fresh weights."""
        anchor = next(model.parameters())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            for name, (dim_in, dim_out, hidden), activation in zip(
                self.names, self.dims, self.activations, strict=True
            ):
                least = 1 if activation == "identity" else 0
                acm = ACM(
                    dim_in, dim_out, learners=self.learners, hidden=hidden, activation=activation, least=least
                ).to(anchor)
                replace_module(model, name, AcmPlace(model.get_submodule(name), acm.eval(), len(self.wanted)))
        return AcmModel(model, self.wanted)

    def describe(self) -> dict[str, str]:
        """Return the number of learners of each layer."""
        return dict.fromkeys(self.names, f"{self.learners} learners, as many a token as its gate says")


def _feedforward_places(
    model: nn.Module, example: Inputs, learners: int, ignore: Sequence[str]
) -> dict[str, FeedForwardLayer]:
    return {
        layer.name: layer
        for layer in feedforwards(model, example)
        if layer.gate is None
        and layer.hidden >= learners
        and not any(ignored(f"{layer.name}.{inner}", ignore) for inner in (layer.up, layer.down))
    }


def _linear_places(model: nn.Module, example: Inputs, learners: int, ignore: Sequence[str]) -> dict[str, nn.Linear]:
    """Return the linear layers that are called once and worth it; not the one that gives the answer."""
    linears = {name: module for name, module in model.named_modules() if type(module) is nn.Linear and name}
    if not linears:
        return {}
    with resting(model), record(model, list(linears), "output") as seen, torch.no_grad():
        call(model, example)
    called = [name for name in seen if len(seen.calls(name)) == 1]
    return {name: linears[name] for name in called[:-1] if _rank(linears[name], learners) and not ignored(name, ignore)}


def _rank(layer: nn.Linear, learners: int) -> int:
    """Return the neurons of a learner so that all learners cost at most what the layer does."""
    return layer.in_features * layer.out_features // (learners * (layer.in_features + layer.out_features))


def acmize(
    model: nn.Module,
    example: Inputs,
    *,
    learners: int = 4,
    wanted: Sequence[float] = (0.5,),
    ignore: Sequence[str] = (),
) -> AcmModel:
    """Return a copy of ``model`` with ACMs, whose weights are random, beside its feed-forward and linear layers.

    Args:
        model: a trained model.
        example: inputs for it.
        learners: N of each.
        wanted: shares of what the ACMs can spend, rising, in (0, 1).
        ignore: globs of module names that stay as they are.

    Raises:
        BadInput: there is no such layer.
    """
    edit = learner_edit(model, example, learners=learners, wanted=wanted, ignore=ignore)
    made = apply_edits(model, [edit])
    return made.eval()  # type: ignore[return-value]  # the edit makes one


def learner_edit(
    model: nn.Module, example: Inputs, *, learners: int, wanted: Sequence[float], ignore: Sequence[str]
) -> Acmize:
    """Return the edit that :func:`acmize` makes; arguments and errors are its."""
    ffns = _feedforward_places(model, example, learners, ignore)
    linears = _linear_places(model, example, learners, ignore)
    inside = tuple(f"{name}." for name in ffns)
    plan: dict[str, tuple[tuple[int, int, int], str]] = {}
    for name, layer in ffns.items():
        down = layer.linears(model.get_submodule(name))[1]
        plan[name] = ((layer.d_model, down.out_features, layer.hidden // learners), layer.activation)
    for name, linear in linears.items():
        if not name.startswith(inside):
            plan[name] = ((linear.in_features, linear.out_features, _rank(linear, learners)), "identity")
    if not plan:
        raise BadInput(f"there is no feed-forward or linear layer to replace in {type(model).__name__}")
    return Acmize(
        names=tuple(plan),
        dims=tuple(dims for dims, _ in plan.values()),
        activations=tuple(activation for _, activation in plan.values()),
        learners=learners,
        wanted=tuple(wanted),
    )


def watch(elastic: AcmModel, inputs: Inputs) -> dict[str, tuple[Tensor, Tensor]]:
    """Return what each original layer takes and gives at the full budget, as rows (M, inputs) and (M, outputs)."""
    names = {f"model.{name}.original": name for name in elastic.places}
    elastic.set_budget(1.0)
    with torch.no_grad(), record(elastic, list(names), "input") as taken, record(elastic, list(names)) as given:
        call(elastic, inputs)
    return {name: (taken[path].flatten(0, -2), given[path].flatten(0, -2)) for path, name in names.items()}


@torch.no_grad()
def start_from_layers(elastic: AcmModel, inputs: Inputs) -> None:
    """Set learners to slices of the layers that they stand for, the neurons or directions that matter most first."""
    elastic.set_budget(1.0)
    layers = {layer.name: layer for layer in feedforwards(elastic, inputs)}
    seen = watch(elastic, inputs)
    for name, place in elastic.places.items():
        acm = place.acm
        total = acm.learners * acm.hidden
        acm.biases.zero_()
        acm.up.bias.zero_()
        if isinstance(place.original, nn.Linear):
            u, s, v = torch.linalg.svd(place.original.weight.double(), full_matrices=False)
            root = s[:total].sqrt()
            acm.up.weight.copy_(root[:, None] * v[:total])
            acm.down.weight.copy_(u[:, :total] * root)
            bias: Tensor | None = place.original.bias
        else:
            up, down, _ = layers[f"model.{name}.original"].linears(place.original)
            inner = acm._act(up(seen[name][0]))
            order = (inner.abs().mean(0) * down.weight.norm(dim=0)).argsort(descending=True, stable=True)[:total]
            acm.up.weight.copy_(up.weight[order])
            if up.bias is not None:
                acm.up.bias.copy_(up.bias[order])
            acm.down.weight.copy_(down.weight[:, order])
            bias = down.bias
        if bias is not None:
            acm.biases[0] = bias
