"""Train a Bayesian network of which only a small, moving set of weights exists, from the first step to the last.

`Training Bayesian Neural Networks with Sparse Subspace Variational Inference <https://arxiv.org/abs/2402.11025>`_ (Li
et al., 2024): q(theta) = prod_i [g_i N(mu_i, sigma_i^2) + (1 - g_i) delta_0], sum_i g_i = s; the ELBO trains mu, sigma,
and now and then the active weights of least E|theta| / sd|theta| give way to those of the largest likelihood gradient.

As a lever of ``fit``, :class:`SparseSubspace` goes on from a trained model and ends in sparse layers of the means.

Departures:
- :class:`SparseSubspace` starts from the largest trained weights of each layer, which is what the criterion keeps while
  all sigma are equal, and not from a random set, which would throw the training away; only layers that can be executed
  sparse are drawn, and what comes out is one set of weights, without its uncertainty.
- A new weight starts at mu = 0 with the mean sigma of those that stay in its layer (the published code takes the mean
  before the softplus); the gradients that call it are averaged over the last ``gradient_steps`` steps, one draw each.
- A weight that was just removed is no candidate in the same step, so that density 1 is ordinary mean-field inference.
- Every linear and convolution layer is sparse, also the first; biases and norms are point estimates.
- E|theta| / sd|theta| is least, 1.32, at mu = 0 whatever sigma is: there the smaller E|theta| goes first.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from torchgraft.bench.task import Batch, Split, Task, call
from torchgraft.catalogue import Card, Claim
from torchgraft.engines.finetune import holding
from torchgraft.engines.masks import keep_best, magnitude, prunable, uniform
from torchgraft.engines.sparse.procedure import SparseTraining
from torchgraft.engines.sparse_training import SparsityTags, cosine_fraction
from torchgraft.errors import BadInput, nearest

__all__ = ["CARD", "CRITERIA", "SSVI", "TAGS", "Predictive", "SparseSubspace", "folded_moments"]

CARD = Card(
    key="ssvi",
    title="Sparse subspace variational inference",
    seed_id=108,
    authors="Li et al., 2024",
    reference="https://arxiv.org/abs/2402.11025",
    family="shrink/prune",
    kind="procedure",
    engine=("masks", "parametrize", "surgery"),
    equation="L = E_q[-log p(D | theta)] + beta sum_{g_i = 1} KL(N(mu_i, sigma_i^2) || N(0, s^2)); remove least"
    " E|theta_i| / sd|theta_i|, add largest |E_q grad_i|",
    entry="SparseSubspace",
    stage="weights",
    capabilities=frozenset({"needs-data", "needs-labels", "needs-training"}),
    example={"timed": False, "steps": 2, "update_every": 1},
    oracles=(
        "the number of distinct active weights is s after every step, in each layer where the scope is the layer",
        "moments of |theta| equal Monte Carlo to 1%, and sigma sqrt(2 / pi) at mu = 0; E exp(l |theta|) likewise",
        "inactive weights add nothing to the output nor to the KL, which equals torch.distributions' sum",
        "with density 1 outputs and gradients equal mean-field inference written out, and no step changes the set",
        "the weights removed have the least score, those added the largest averaged gradient of the likelihood",
        "begun at given masks only they are drawn, all other weights are those of the model, and counts stay",
    ),
    claim=Claim(
        text="digits MLP 64-256-256-10 at 5% density against dense mean-field inference, static random masks of the"
        " same counts, and removal by |mu|; test accuracy and expected calibration error, 3 seeds",
        figure="accuracy >= dense mean-field - 2 points with ECE no worse (by 0.01), >= static random + 1.5 points,"
        " snr_abs >= |mu|",
    ),
    choose_when="you want calibrated uncertainty from a model that never holds more than a few per cent of its weights;"
    " or single weights of a trained one are to go by how sure they are and not by how large",
    choose_instead="lottery-ticket or sparseland-handbook's drop-and-grow training where one set of weights is enough;"
    " dense mean-field inference (density 1) where memory is no concern",
    confidence="medium",
    bibtex="""@inproceedings{li2024training,
  title={Training Bayesian Neural Networks with Sparse Subspace Variational Inference},
  author={Li, Junbo and Miao, Zichen and Qiu, Qiang and Zhang, Ruqi},
  booktitle={International Conference on Learning Representations},
  year={2024}
}""",
)

#: What kind of sparsity this is.
TAGS = SparsityTags(
    stage="during",
    trajectory="sparse-to-sparse",
    mask="dynamic",
    moves=("drop", "grow"),
    budget=("train-flops", "infer-flops", "memory"),
)


def folded_moments(mu: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and the variance of |theta|, theta ~ N(mu, sigma^2), in float64.

    Example:
        >>> mean, variance = folded_moments(torch.zeros(1), torch.ones(1))
        >>> round(float(mean), 4), round(float(variance), 4)
        (0.7979, 0.3634)
    """
    mu, sigma = mu.double(), sigma.double()
    ratio = mu / sigma
    mean = sigma * math.sqrt(2 / math.pi) * torch.exp(-ratio.square() / 2) + mu * torch.erf(ratio / math.sqrt(2))
    return mean, (mu.square() + sigma.square() - mean.square()).clamp_min(torch.finfo(torch.float64).tiny)


def _log_exp_mean(mu: Tensor, sigma: Tensor, scale: float) -> Tensor:
    """Return log E exp(scale |theta|)."""
    mu, sigma = mu.double(), sigma.double()
    shift = scale * sigma
    ways = [
        sign * scale * mu + shift.square() / 2 + torch.special.log_ndtr(sign * mu / sigma + shift) for sign in (1, -1)
    ]
    return torch.logaddexp(*ways)


def _snr_abs(mu: Tensor, sigma: Tensor) -> Tensor:
    mean, variance = folded_moments(mu, sigma)
    return mean / variance.sqrt()


def _snr_exp(mu: Tensor, sigma: Tensor) -> Tensor:
    first, second = _log_exp_mean(mu, sigma, 1.0), _log_exp_mean(mu, sigma, 2.0)
    return torch.expm1((second - 2 * first).clamp_min(1e-12)).rsqrt()


#: How much a weight is worth, from its mean and standard deviation; also scores for pruning.
CRITERIA: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "abs_mean": lambda mu, sigma: mu.double().abs(),
    "snr": lambda mu, sigma: mu.double().abs() / sigma.double(),
    "mean_abs": lambda mu, sigma: folded_moments(mu, sigma)[0],
    "snr_abs": _snr_abs,
    "exp_abs": lambda mu, sigma: _log_exp_mean(mu, sigma, 1.0).exp(),
    "snr_exp": _snr_exp,
}


class Predictive(NamedTuple):
    """The mean of what draws of the weights say, and their standard deviation."""

    mean: Tensor
    std: Tensor


class SSVI(nn.Module):
    """A network whose linear and convolution weights are drawn anew at every call; only active ones are stored.

    Train it by any optimiser on ``nll(ssvi(x), y) + beta / N * ssvi.kl()``, N the number of training samples, and call
    :meth:`step` after every step of the optimiser.

    Args:
        model: the network; a copy is taken, and its weights at the active places are the first means.
        density: the share of the weights that is active.
        prior_std: standard deviation of the prior.
        criterion: what decides which weights go, a name in :data:`CRITERIA`.
        update_every: steps between two changes of the active set.
        replace_rate: the share that changes at first; it falls on a cosine.
        steps: the length of the training; the set stays in its last quarter.
        scope: ``"layer"`` keeps the density of every layer (as the published code does), ``"global"`` that of all.
        gradient_steps: steps before a change over which the gradients are averaged.
        start_std: the first standard deviation.
        active: masks of the first active set, by the names of the weights that are drawn; others stay as they are, and
            ``density`` does not count. By default all are drawn and the set is random.
        seed: of the first active set.

    Raises:
        BadInput: a setting is out of range, or the model has no weight to draw.

    Example:
        >>> ssvi = SSVI(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2)), density=0.25)
        >>> ssvi(torch.zeros(3, 8)).shape, ssvi.mu.shape
        (torch.Size([3, 2]), torch.Size([40]))
        >>> ssvi.predict(torch.zeros(3, 8), samples=4).std.shape
        torch.Size([3, 2])
    """

    active: Tensor

    def __init__(
        self,
        model: nn.Module,
        *,
        density: float = 0.05,
        prior_std: float = 0.2,
        criterion: str = "snr_abs",
        update_every: int = 1000,
        replace_rate: float = 0.3,
        steps: int = 78_000,
        scope: Literal["layer", "global"] = "layer",
        gradient_steps: int = 10,
        start_std: float = 0.02,
        active: Mapping[str, Tensor] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if criterion not in CRITERIA:
            raise BadInput(f"unknown criterion {criterion!r}{nearest(criterion, list(CRITERIA))}")
        if scope not in ("layer", "global"):
            raise BadInput(f"scope must be 'layer' or 'global', got {scope!r}")
        if not 0.0 < density <= 1.0 or not 0.0 <= replace_rate <= 1.0:
            raise BadInput(f"density must lie in (0, 1] and replace_rate in [0, 1], got {density} and {replace_rate}")
        if not prior_std > 0 or not start_std > 0:
            raise BadInput(f"standard deviations must be positive, got {prior_std} and {start_std}")
        if min(update_every, steps, gradient_steps) < 1:
            raise BadInput(f"steps are at least 1, got {update_every}, {steps} and {gradient_steps}")
        self.network = copy.deepcopy(model)
        found = prunable(self.network)
        for name in active or ():
            if name not in found:
                raise BadInput(f"the model has no weight {name!r} to draw{nearest(name, list(found))}")
        weights = {name: w.detach().clone() for name, w in found.items() if active is None or name in active}
        if not weights:
            raise BadInput(f"{type(model).__name__} has no linear or convolution weight to draw")
        self.criterion, self.prior_std, self.scope = criterion, prior_std, scope
        self.update_every, self.replace_rate, self.gradient_steps = update_every, replace_rate, gradient_steps
        self.end = max(1, round(0.75 * steps))
        self.shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
        self.sizes = [weight.numel() for weight in weights.values()]
        generator = torch.Generator().manual_seed(seed)
        if active is not None:
            masks = [active[name].flatten() != 0 for name in weights]
            counts = [int(mask.sum()) for mask in masks]
            self.counts = counts if scope == "layer" else [sum(counts)]
            places = torch.cat(masks).nonzero().flatten()
        elif scope == "layer":
            self.counts = list(uniform(self.shapes, 1.0 - density).values())
            starts = [sum(self.sizes[:number]) for number in range(len(self.sizes))]
            drawn = [
                start + torch.randperm(size, generator=generator)[:count].sort().values
                for start, size, count in zip(starts, self.sizes, self.counts, strict=True)
            ]
            places = torch.cat(drawn)
        else:
            whole = sum(self.sizes)
            places = torch.randperm(whole, generator=generator)[: round(density * whole)].sort().values
            self.counts = [len(places)]
        dense = torch.cat([weight.flatten() for weight in weights.values()])
        places = places.to(dense.device)
        self.mu = nn.Parameter(dense[places].clone())
        self.rho = nn.Parameter(torch.full_like(self.mu, math.log(math.expm1(start_std))))
        self.register_buffer("active", places)
        self.register_buffer("done", torch.zeros((), dtype=torch.long))
        for name in weights:  # no dense weight is kept anywhere
            layer = self.network.get_submodule(name.rpartition(".")[0])
            layer.weight = nn.Parameter(dense.new_empty(0), requires_grad=False)
        self._slope: Tensor | None = None
        self._draws = 0

    @property
    def sigma(self) -> Tensor:
        """Standard deviations of the active weights."""
        return F.softplus(self.rho)

    def _spread(self, values: Tensor) -> Tensor:
        return values.new_zeros(sum(self.sizes)).scatter(0, self.active, values)

    def _named(self, dense: Tensor) -> dict[str, Tensor]:
        parts = torch.split(dense, self.sizes)
        return {name: part.reshape(self.shapes[name]) for name, part in zip(self.shapes, parts, strict=True)}

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """Return what the network says with one draw of its weights."""
        dense = self._spread(self.mu + self.sigma * torch.randn_like(self.mu))
        if self.training and dense.requires_grad and self._near():
            dense.register_hook(self._note)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        return functional_call(self.network, self._named(dense), inputs, named)

    def _near(self) -> bool:
        done = int(cast(Tensor, self.done))
        return done < self.end and done % self.update_every >= self.update_every - self.gradient_steps

    def _note(self, slope: Tensor) -> None:
        self._slope = slope.detach().clone() if self._slope is None else self._slope + slope.detach()

    def kl(self) -> Tensor:
        """Return KL(q || prior), summed over the active weights."""
        sigma = self.sigma
        ratio = sigma / self.prior_std
        return (0.5 * (ratio.square() + (self.mu / self.prior_std).square() - 1) - ratio.log()).sum()

    @torch.no_grad()
    def step(self, optimizer: torch.optim.Optimizer | None = None) -> int:
        """Count a step of training, change the active set where it is time, and return how many weights changed.

        Args:
            optimizer: its state for the weights that change is cleared.
        """
        done = cast(Tensor, self.done)
        done += 1
        number = int(done)
        if number % self.update_every or number >= self.end:
            return 0
        share = cosine_fraction(number, end=self.end, fraction=self.replace_rate)
        slope, self._slope = self._slope, None
        return 0 if slope is None else self._replace(slope.abs(), share, optimizer)

    @torch.no_grad()
    def _replace(self, slope: Tensor, share: float, optimizer: torch.optim.Optimizer | None) -> int:
        free = torch.ones_like(slope, dtype=torch.bool)
        free[self.active] = False
        sigma = self.sigma
        # Scores that agree to float32 are ties, which rounding in float64 may have parted.
        score, tie = CRITERIA[self.criterion](self.mu, sigma).float(), folded_moments(self.mu, sigma)[0]
        changed: list[Tensor] = []
        place, first = 0, 0
        sizes = self.sizes if self.scope == "layer" else [sum(self.sizes)]
        for count, size in zip(self.counts, sizes, strict=True):
            here = slice(first, first + size)
            moves = min(int(share * count), int(free[here].sum()))
            order = torch.argsort(tie[place : place + count], stable=True)
            order = order[torch.argsort(score[place : place + count][order], stable=True)]
            gone = place + order[:moves]
            best = torch.argsort(slope[here].masked_fill(~free[here], -math.inf), descending=True, stable=True)[:moves]
            if moves:
                stays = place + order[moves:]
                mean = sigma[stays if len(stays) else gone].mean()
                self.active[gone] = first + best
                self.mu[gone] = 0.0
                self.rho[gone] = torch.log(torch.expm1(mean))
                changed.append(gone)
            place, first = place + count, first + size
        moved = torch.cat(changed) if changed else self.active.new_empty(0)
        for parameter in (self.mu, self.rho):
            for value in (optimizer.state.get(parameter, {}) if optimizer else {}).values():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    value[moved] = 0.0
        return len(moved)

    @torch.no_grad()
    def scores(self, criterion: str | None = None) -> dict[str, Tensor]:
        """Return the criterion of every weight by name, 0 where it is not active: scores for ``engines.masks``."""
        chosen = self.criterion if criterion is None else criterion
        if chosen not in CRITERIA:
            raise BadInput(f"unknown criterion {chosen!r}{nearest(chosen, list(CRITERIA))}")
        return self._named(self._spread(CRITERIA[chosen](self.mu, self.sigma)))

    @torch.no_grad()
    def predict(self, *inputs: Any, samples: int = 10, transform: Callable[[Any], Tensor] | None = None) -> Predictive:
        """Return mean and standard deviation over draws of the weights, in eval mode; of probabilities by default.

        Args:
            inputs: as for the network.
            samples: how many draws.
            transform: what is averaged, from the network's output; softmax over the last axis by default.
        """
        if samples < 1:
            raise BadInput(f"samples must be at least 1, got {samples}")
        mode = self.training
        self.eval()
        try:
            read = transform or (lambda output: torch.softmax(output, dim=-1))
            draws = torch.stack([read(self(*inputs)) for _ in range(samples)])
        finally:
            self.train(mode)
        return Predictive(draws.mean(0), draws.std(0, correction=0))

    @torch.no_grad()
    def mean_model(self) -> nn.Module:
        """Return the plain network with the means as its weights, zeros where no weight is active."""
        made = copy.deepcopy(self.network)
        for name, weight in self._named(self._spread(self.mu.detach())).items():
            made.get_submodule(name.rpartition(".")[0]).weight = nn.Parameter(weight.clone())
        return made


def _batches(split: Split, size: int, seed: int) -> Iterator[Batch]:
    """Yield batches without end, each epoch a fresh permutation whose incomplete last batch is left out."""
    generator, size = torch.Generator().manual_seed(seed), min(size, len(split))
    while True:
        yield from (batch for batch in split.batches(size, generator=generator) if len(batch[1]) == size)


class SparseSubspace(SparseTraining):
    """Sparse linear layers and 1x1 convolutions of the means that the inference ends with.

    Strength is how few weights stay, as (1 - most) ** strength. Which layers become sparse is decided as in
    :class:`~torchgraft.engines.sparse.procedure.SparseProcedure`: only where that pays.

    Args:
        steps: training steps.
        lr: the highest learning rate; default: the task's.
        beta: what the KL is multiplied with, besides 1 / N.
        criterion: what decides which weights go, a name in :data:`CRITERIA`.
        prior_std: standard deviation of the prior.
        start_std: the first standard deviation.
        update_every: steps between two changes of the active set.
        replace_rate: the share that changes at first.
        most: the sparsity at strength 1.
        timed: whether only layers that are measured to be faster become sparse.

    Example:
        >>> x, y = torch.randn(32, 6), torch.randint(0, 3, (32,))
        >>> model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))
        >>> loss = nn.functional.cross_entropy
        >>> task = Task(model, (x, y), (x, y), (x, y), loss, lambda out, target: (out.argmax(1) == target).float())
        >>> SparseSubspace(timed=False, steps=2).apply(model, task, 1.0)[2]
        SparseLinear(16, 16, bias=True, sparsity=0.949, block=1x1, backend='kernel')

    Raises:
        BadInput: a setting is out of range.
    """

    card = CARD

    def __init__(
        self,
        *,
        steps: int = 200,
        lr: float | None = None,
        beta: float = 0.1,
        criterion: str = "snr_abs",
        prior_std: float = 0.2,
        start_std: float = 0.02,
        update_every: int = 20,
        replace_rate: float = 0.3,
        most: float = 0.95,
        timed: bool = True,
    ) -> None:
        super().__init__(block=1, most=most, timed=timed)
        if beta < 0:
            raise BadInput(f"beta must not be negative, got {beta}")
        self.lr, self.beta = lr, beta
        self.steps, self.criterion, self.prior_std, self.start_std = steps, criterion, prior_std, start_std
        self.update_every, self.replace_rate = update_every, replace_rate
        with torch.random.fork_rng(devices=[]):
            self._infer(nn.Linear(1, 1), None)  # which refuses settings that are out of range

    def _infer(self, model: nn.Module, active: Mapping[str, Tensor] | None) -> SSVI:
        return SSVI(
            model,
            criterion=self.criterion,
            prior_std=self.prior_std,
            start_std=self.start_std,
            steps=self.steps,
            update_every=self.update_every,
            replace_rate=self.replace_rate,
            active=active,
        )

    def pruned(
        self, model: nn.Module, task: Task, kept: Mapping[str, int], *, ignore: Sequence[str], seed: int
    ) -> nn.Module:
        """Return the model of the means, zeros where no weight is active. See :class:`SparseTraining`.

        A layer that takes no gradient keeps its weights, and the largest of them stay.
        """
        free = {f"{name}.weight": n for name, n in kept.items() if model.get_submodule(name).weight.requires_grad}
        if not free:
            return copy.deepcopy(model)
        ssvi = self._infer(model, keep_best(magnitude({name: model.get_parameter(name) for name in free}), free))
        rate = task.learning_rate if self.lr is None else self.lr
        with holding(ssvi.network, ignore):
            moving = [value for value in ssvi.parameters() if value.requires_grad]
            optimizer = torch.optim.Adam(moving, lr=rate, fused=True)
            ssvi.train()
            for step, (inputs, target) in enumerate(
                itertools.islice(_batches(task.train, task.batch_size, seed), self.steps)
            ):
                for group in optimizer.param_groups:
                    group["lr"] = rate * cosine_fraction(step, end=self.steps, fraction=1.0)
                optimizer.zero_grad(set_to_none=True)
                loss = task.loss(call(ssvi, inputs), target) + self.beta / len(task.train) * ssvi.kl()
                if not math.isfinite(float(loss.detach())):
                    raise BadInput(f"the loss became {float(loss.detach())} at step {step + 1}; lower the rate")
                loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
                optimizer.step()
                ssvi.step(optimizer)
        return ssvi.mean_model()
