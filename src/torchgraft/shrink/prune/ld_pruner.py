"""Replace operators by the identity where the final latents of a generator, or a model's outputs, change least.

`LD-Pruner: Efficient Pruning of Latent Diffusion Models using Task-Agnostic Insights
<https://arxiv.org/abs/2404.11936>`_ (Castells et al., 2024): with the same noise for the whole model and for the model
without operator o,

    score(o) = || avg(L) - avg(L_o) ||_2 + || std(L) - std(L_o) ||_2,

avg and std element by element over the latents L of n samples. The k operators of lowest score go; all other weights
stay.

Departures:
- Operators are modules that return what has the shape, type and number of what they are given; cheaper stand-ins for
  operators that change the shape are not used.
- Whole blocks are operators beside their parts; a part of a removed block counts as removed.
- :class:`LDPruning` is the same for any model: its outputs on training samples stand for the latents.
- std is that of the population, so that it is 0 for one sample.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from torchgraft.bench.meters.forward import resting
from torchgraft.bench.task import Task, call
from torchgraft.catalogue import Card, Claim
from torchgraft.engines.procedure import Procedure, Site, ignored
from torchgraft.engines.surgery.edits import Edit, apply_edits
from torchgraft.engines.surgery.swap import cut, replace_module
from torchgraft.engines.width import calibration
from torchgraft.errors import BadInput

__all__ = ["CARD", "Bypass", "LDPruner", "LDPruning", "latent_scores", "operators", "score"]

CARD = Card(
    key="ld-pruner",
    title="LD-Pruner: operators scored by latents",
    seed_id=118,
    authors="Castells et al., 2024",
    reference="https://arxiv.org/abs/2404.11936",
    family="shrink/prune",
    kind="procedure",
    engine=("masks", "surgery"),
    equation="score(o) = || avg(L) - avg(L_o) ||_2 + || std(L) - std(L_o) ||_2",
    entry="LDPruning",
    stage="depth",
    capabilities=frozenset({"needs-data"}),
    oracles=(
        "an operator that is the identity, or whose branch is multiplied by zero, scores exactly 0",
        "scores do not change when samples change places, and a decoder behind the latents is never asked",
        "with one sample the score is the plain L2 change of its latent",
        "what is left is bit for bit what it was; a larger k removes all that a smaller one does",
    ),
    claim=Claim(
        text="DDPM of 50 steps on 16 principal components of digits, a residual net of 12 operators; 3 of them removed"
        " and a fifth of the training steps repeated: lowest, highest, random scores; MMD of 1,000 samples to digits",
        figure="MMD of the lowest within 10 % of the whole model's (as much trained), highest and random each >= 1.5x"
        " that of the lowest; mean of 3 seeds",
    ),
    choose_when="a generator, or any residual network, should lose whole operators, and no labels are at hand",
    choose_instead="chain-of-layers where only whole layers are to go; any choice where long retraining follows: in our"
    " claim random choices did 8 times the damage before retraining, and 1.1 times after it",
    bibtex="""@inproceedings{castells2024ldpruner,
  title={{LD-Pruner}: Efficient Pruning of Latent Diffusion Models using Task-Agnostic Insights},
  author={Castells, Thibault and Song, Hyoung-Kyu and Kim, Bo-Kyeong and Choi, Shinkook},
  booktitle={CVPR Workshop on Efficient and On-Device Generation},
  year={2024}
}""",
)


class Bypass(Edit):
    """Put an identity in the place of modules.

    Args:
        names: which modules.
    """

    op: ClassVar[str] = "bypass"
    names: tuple[str, ...] = Field(min_length=1)

    def rewrite(self, model: nn.Module) -> nn.Module:
        """Replace the modules."""
        for name in self.names:
            training = model.get_submodule(name).training
            cut(model, name)
            model.get_submodule(name).train(training)
        return model

    def describe(self) -> dict[str, str]:
        """Return which operators were removed."""
        return dict.fromkeys(self.names, "replaced by the identity")


def operators(model: nn.Module, run: Callable[[nn.Module], Any], *, ignore: Sequence[str] = ()) -> list[str]:
    """Return the modules that an identity could stand for: one tensor in, one like it out, at every call of ``run``.

    Args:
        model: the model; left as it was.
        run: runs it.
        ignore: globs of modules that stay, and with them what holds them.
    """
    named = {name: module for name, module in model.named_modules() if name}
    fits: dict[str, bool] = {}
    handles = []

    def watch(name: str) -> Callable[..., None]:
        def seen(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
            single = len(args) == 1 and not kwargs and isinstance(args[0], Tensor) and isinstance(out, Tensor)
            like = single and args[0].shape == out.shape and args[0].dtype == out.dtype
            fits[name] = like and fits.get(name, True)

        return seen

    try:
        handles = [each.register_forward_hook(watch(name), with_kwargs=True) for name, each in named.items()]
        with resting(model), torch.no_grad():
            run(model)
    finally:
        for handle in handles:
            handle.remove()
    stay = [name for name in named if ignored(name, ignore)]
    kinds = (nn.Identity, nn.ModuleList, nn.ModuleDict, nn.Dropout)
    return [
        name
        for name, module in named.items()
        if fits.get(name, False)
        and not isinstance(module, kinds)
        and not any(name == other or other.startswith(f"{name}.") for other in stay)
    ]


def score(whole: Tensor, without: Tensor) -> float:
    """Return how far the statistics of two sets of latents lie apart.

    Shapes:
        both (N, ...), made from the same noise.

    Example:
        >>> score(torch.tensor([[0.0], [2.0]]), torch.tensor([[1.0], [1.0]]))
        1.0
    """
    whole, without = whole.double(), without.double()
    means = torch.linalg.vector_norm(whole.mean(0) - without.mean(0))
    spreads = torch.linalg.vector_norm(whole.std(0, unbiased=False) - without.std(0, unbiased=False))
    return float(means + spreads)


def latent_scores(model: nn.Module, names: Sequence[str], latents: Callable[[nn.Module], Tensor]) -> dict[str, float]:
    """Return the score of each operator, infinity where the model does not run without it; it is left as it was.

    Args:
        model: the whole model.
        names: operators.
        latents: latents (N, ...) of a model, from the same noise or inputs at every call.
    """
    found: dict[str, float] = {}
    with torch.no_grad(), resting(model):
        whole = latents(model)
        for name in names:
            module = model.get_submodule(name)
            stand_in = nn.Identity()
            try:
                replace_module(model, name, stand_in)
                value = score(whole, latents(model))
            except Exception:  # whatever the model's own code raises means the same: it needs this module
                value = math.inf
            finally:
                replace_module(model, name, module)
            found[name] = value if math.isfinite(value) else math.inf
    return found


def lowest(scores: Mapping[str, float], count: int) -> list[str]:
    """Return the ``count`` operators of lowest finite score, without parts of those that go anyway."""
    order = sorted((name for name in scores if math.isfinite(scores[name])), key=lambda name: scores[name])[:count]
    return [name for name in order if not any(name.startswith(f"{other}.") for other in order)]


class LDPruner:
    """LD-Pruner for a generator.

    Args:
        sampler: ``sampler(denoiser, n, generator)`` -> final latents (n, ...), before any decoder.
        denoiser: the network that is pruned; never changed.
        operators: names of the operators, or ``"auto"`` for all that keep the shape.
        n_latents: samples.
        seed: of the noise; the same for all.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.Tanh())
        >>> pruner = LDPruner(lambda model, n, draw: model(torch.randn(n, 2, generator=draw)), net, n_latents=8)
        >>> sorted(pruner.scores), type(pruner.prune(2)[1]).__name__
        (['0', '1'], 'Identity')
    """

    def __init__(
        self,
        sampler: Callable[[nn.Module, int, torch.Generator], Tensor],
        denoiser: nn.Module,
        *,
        operators: Sequence[str] | Literal["auto"] = "auto",
        n_latents: int = 64,
        seed: int = 0,
    ) -> None:
        if n_latents < 1:
            raise BadInput(f"n_latents must be at least 1, got {n_latents}")
        self.sampler, self.denoiser, self.n_latents, self.seed = sampler, denoiser, n_latents, seed
        names = _operators(denoiser, self.latents) if operators == "auto" else list(operators)
        unknown = sorted(set(names) - {name for name, _ in denoiser.named_modules() if name})
        if unknown or not names:
            raise BadInput(f"operators must name modules of the denoiser, got {unknown or 'none'}")
        #: operator -> score.
        self.scores: dict[str, float] = latent_scores(denoiser, names, self.latents)

    def latents(self, model: nn.Module) -> Tensor:
        """Return the latents of a model from the noise of the seed."""
        return self.sampler(model, self.n_latents, torch.Generator().manual_seed(self.seed))

    def prune(self, k: int) -> nn.Module:
        """Return a copy of the denoiser without the ``k`` operators of lowest score."""
        if not 0 <= k <= len(self.scores):
            raise BadInput(f"k must lie in [0, {len(self.scores)}], got {k}")
        names = tuple(lowest(self.scores, k))
        return apply_edits(self.denoiser, [Bypass(names=names)] if names else [])


_operators = operators


class LDPruning(Procedure):
    """LD-Pruner on any model, by its outputs.

    Args:
        samples: training samples.

    Example:
        >>> LDPruning(samples=16).samples
        16
    """

    card = CARD
    expense = 2

    def __init__(self, *, samples: int = 64) -> None:
        if samples < 1:
            raise BadInput(f"samples must be at least 1, got {samples}")
        self.samples = samples

    def applies_to(self, model: nn.Module, task: Task, *, ignore: Sequence[str] = ()) -> list[Site]:
        """Return the operators that keep the shape; none where none of them holds a parameter."""
        names = operators(model, lambda each: call(each, task.example), ignore=ignore)
        sizes = {name: sum(value.numel() for value in model.get_submodule(name).parameters()) for name in names}
        if not any(sizes.values()):
            return []
        return [Site(name, "operator", 1, sizes[name]) for name in names]

    def plan(
        self, model: nn.Module, task: Task, strength: float, *, ignore: Sequence[str] = (), seed: int = 0
    ) -> list[Edit]:
        """Return one edit that removes a share of the operators, those of lowest score first."""
        names = [site.name for site in self.applies_to(model, task, ignore=ignore)]
        inputs = calibration(task, self.samples, seed).inputs
        own = apply_edits(model, [])
        scores = latent_scores(own, names, lambda each: task.output_logits(call(each, inputs)))
        chosen = tuple(lowest(scores, math.ceil(strength * len(names))))
        return [Bypass(names=chosen)] if chosen else []
