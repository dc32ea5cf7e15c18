"""Let a router at each block of a residual stack say, for a whole sequence at once, whether the block runs at all.

`FiRST: Finetuning Router-Selective Transformers for Input-Adaptive Latency Reduction
<https://arxiv.org/abs/2410.12513>`_ (Jain et al., 2025).

Equation: ``h <- g h' + (1 - g) h`` in training, ``g = sigmoid(w . h_t + b)``; then ``b_l = [mean_t g_l >= theta]``.

Departures: the paper's second regulariser is not given; ours, g (1 - g), pushes gates to a side. Several budgets share
the routers and differ in theta, found on training samples (the paper: 0.5). LoRA is folded into second weights that the
smaller budgets use, so that the full budget stays the original model; convolutions get none. With ``prompt`` the first
tokens alone decide, as at prefill; 0 lets all tokens of a sample decide.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from torchgraft.bench.meters.forward import resting
from torchgraft.bench.task import Inputs, Task, call, take
from torchgraft.bench.training import train
from torchgraft.catalogue import Card
from torchgraft.catalogue.card import Claim
from torchgraft.engines.nesting import ElasticModule, ElasticProcedure
from torchgraft.engines.sites import Refusal, Site
from torchgraft.engines.skipping import RoutedBlock, RoutedModel, calibrate_routers, router_edit, skippable
from torchgraft.engines.surgery.edits import Edit, apply_edits
from torchgraft.errors import BadInput
from torchgraft.parts.blocks.sequence_model import SequenceModel

__all__ = [
    "CARD",
    "Generated",
    "LayerRouters",
    "RoutedModel",
    "add_layer_routers",
    "calibrate_routers",
    "fit_lora",
    "fit_routers",
    "generate",
    "plan",
]

CARD = Card(
    key="first-layer-routers",
    title="Routers that skip layers by sequence",
    seed_id=211,
    authors="Jain, Sharma, Mukherjee and Pal, 2025",
    reference="https://arxiv.org/abs/2410.12513",
    family="elastic",
    kind="procedure",
    engine=("nesting", "surgery"),
    equation="h <- g h' + (1 - g) h in training; then block l runs where mean_t sigmoid(w_l . h_t + b_l) >= theta",
    entry="LayerRouters",
    capabilities=frozenset({"elastic", "needs-data", "needs-training"}),
    oracles=(
        "a plan in which all blocks run gives the original model bit for bit, any other what the model gives from "
        "which the blocks were deleted; gates of exactly 0 and 1 give the same as skipping",
        "decoding with a cache equals reading the whole text again with the same plan, and blocks that are skipped "
        "cache nothing",
        "tokens after the prompt never change the plan",
        "a block that no sample of a batch chose is not called, and one that some chose sees those alone",
    ),
    claim=Claim(
        text="An 8-layer character model trained on strings to copy backwards and sums modulo 13, told apart by a tag; "
        "a quarter of the layers is skipped. Beside it: the same number of evenly spaced layers skipped for all, "
        "with the same LoRA phase. Exact match, and time a token in decoding.",
        figure="exact match >= 3 points above static skipping at no more layers, plans of the two tasks differ, and "
        "decoding takes >= 15 percent less time than without skipping (mean of 3 seeds)",
    ),
    choose_when="a deep residual network meets inputs of several kinds, and whole layers should go for the easy ones",
    choose_instead="chain-of-layers where one path fits all inputs; adaptive-computation-module where tokens differ "
    "within an input",
    confidence="medium",
    bibtex="@inproceedings{jain2025first, title={{FiRST}: Finetuning Router-Selective Transformers for Input-Adaptive "
    "Latency Reduction}, author={Jain, Akriti and Sharma, Saransh and Mukherjee, Koyel and Pal, Soumyabrata}, "
    "booktitle={Findings of EMNLP}, year={2025}}",
)


def add_layer_routers(
    model: nn.Module,
    example: Inputs,
    *,
    layers: Sequence[int] | None = None,
    init_keep: bool = True,
    wanted: Sequence[float] = (0.75,),
    prompt: int = 0,
    rank: int = 8,
) -> RoutedModel:
    """Return a copy of ``model`` whose blocks have routers; at the full budget it is what ``model`` is.

    Args:
        model: a model with a residual stack.
        example: inputs for it.
        layers: which blocks get one, counted from 0; default: all.
        init_keep: whether routers start from keeping their block (a gate of 0.88) or from not knowing (0.5).
        wanted: shares of the blocks' cost, rising, in (0, 1); one budget each.
        prompt: how many of the first tokens decide; 0: all.
        rank: of the adapters that :func:`fit_lora` trains.

    Raises:
        BadInput: there is no block that can be skipped, or no such layer.
    """
    found = skippable(model, example, ())
    names = list(found)
    chosen = names if layers is None else [names[layer] for layer in layers if 0 <= layer < len(names)]
    if not chosen or (layers is not None and len(chosen) != len(layers)):
        raise BadInput(
            f"layers must be among 0..{len(names) - 1}, got {layers}" if names else "no block can be skipped"
        )
    return apply_edits(
        model, [router_edit({name: found[name] for name in chosen}, wanted, prompt, rank, init_keep)]
    ).eval()  # type: ignore[return-value]  # the edit makes one


def _train(
    model: RoutedModel,
    task: Task,
    moving: list[nn.Parameter],
    loss: Callable[[Inputs, Tensor], Tensor],
    steps: int,
    lr: float,
    seed: int,
    deadline: float | None,
) -> int:
    flags = {value: value.requires_grad for value in model.parameters()}
    model.requires_grad_(False)
    held = nn.ParameterList(moving)
    for value in held:
        value.requires_grad_(True)
    try:
        size = min(task.batch_size, len(task.train))
        done = train(
            held,
            task.train,
            lambda _model, inputs, target, _rows: loss(inputs, target),
            steps=steps,
            batch_size=size,
            lr=lr,
            seed=seed,
            weight_decay=0.0,
            deadline=deadline,
        )
    finally:
        for value, flag in flags.items():
            value.requires_grad_(flag)
        for block in model.blocks:
            block.soft, block.gates, block.ran = False, None, None
        for adapter in model.adapters:
            adapter.open = False
            if moving:
                adapter.fold()
        model.set_budget(1.0)
    return done.steps


def fit_routers(
    model: RoutedModel,
    task: Task,
    *,
    steps: int,
    skip_weight: float = 0.01,
    shape_weight: float = 0.01,
    lr: float = 1e-2,
    seed: int = 0,
    deadline: float | None = None,
) -> int:
    """First phase: train the routers alone, blocks scaled by their gates; return the steps.

    Args:
        model: the model.
        task: its task.
        steps: optimiser steps.
        skip_weight: lambda, how much the mean gate weighs beside the task's loss.
        shape_weight: alpha, how much g (1 - g) weighs.
        lr: learning rate.
        seed: makes the order of the samples.
        deadline: a :func:`time.monotonic` moment after which no step is begun.
    """

    def loss(inputs: Inputs, target: Tensor) -> Tensor:
        model.select(0)
        for block in model.blocks:
            block.soft = True
        found = task.loss(call(model, inputs), target)
        gates = torch.stack([block.gates.mean() for block in model.blocks if block.gates is not None])
        shape = torch.stack([(b.gates * (1 - b.gates)).mean() for b in model.blocks if b.gates is not None])
        total: Tensor = found + skip_weight * gates.mean() + shape_weight * shape.mean()
        return total

    moving = [value for block in model.blocks for value in block.router.parameters()]
    return _train(model, task, moving, loss, steps, lr, seed, deadline)


def fit_lora(
    model: RoutedModel, task: Task, *, steps: int, lr: float = 2e-3, seed: int = 0, deadline: float | None = None
) -> int:
    """Second phase: train the adapters at the routers' decisions, all budgets in turn; return the steps."""
    moving = [value for adapter in model.adapters for value in (adapter.low, adapter.high)]
    turn = [0]

    def loss(inputs: Inputs, target: Tensor) -> Tensor:
        model.select(turn[0] % len(model.wanted))
        turn[0] += 1
        for adapter in model.adapters:
            adapter.open = True
        found = task.loss(call(model, inputs), target)
        # A batch that skips every block has no gradient.
        return found if found.requires_grad else found + 0.0 * moving[0].sum()

    return _train(model, task, moving, loss, steps, lr, seed, deadline) if moving else 0


@torch.no_grad()
def plan(model: RoutedModel, prompt: Tensor) -> Tensor:
    """Return which blocks each sequence gets at the budget that is set, decided by its prompt; (B, T) -> (B, L)."""
    blocks = model.blocks
    if model.level == len(model.wanted):
        return torch.ones(len(prompt), len(blocks), dtype=torch.bool)
    call(model, prompt)
    return torch.stack([block.ran for block in blocks if block.ran is not None], 1)


@dataclass(frozen=True)
class Generated:
    """What :func:`generate` made.

    Args:
        tokens: prompts and what follows, (B, T + new).
        plan: the blocks of each sequence, (B, L).
        cache_bytes: bytes that the blocks' states hold at the end, of each sequence, (B,).
    """

    tokens: Tensor
    plan: Tensor
    cache_bytes: Tensor


@torch.no_grad()
def generate(model: RoutedModel, prompt: Tensor, *, max_new_tokens: int, fixed: Tensor | None = None) -> Generated:
    """Continue prompts greedily, each by the blocks that its plan names; the plan is fixed before the first new token.

    Args:
        model: a routed :class:`SequenceModel`.
        prompt: tokens (B, T).
        max_new_tokens: how many to add.
        fixed: plans (B, L) in place of those that the prompts make.

    Raises:
        BadInput: the model keeps no state between tokens, or the plans do not fit.
    """
    lm = model.model
    if not isinstance(lm, SequenceModel):
        raise BadInput(f"generate needs a SequenceModel under the routers, got {type(lm).__name__}")
    decided = plan(model, prompt) if fixed is None else fixed.bool()
    if decided.shape != (len(prompt), len(model.blocks)):
        raise BadInput(f"plans need shape {(len(prompt), len(model.blocks))}, got {tuple(decided.shape)}")
    routed = {id(block): place for place, block in enumerate(model.blocks)}
    made = torch.cat([prompt, prompt.new_zeros(len(prompt), max_new_tokens)], 1)
    held = torch.zeros(len(prompt), dtype=torch.long)
    for way in torch.unique(decided, dim=0):
        rows = (decided == way).all(1)
        kept = [b for b in lm.blocks if id(b) not in routed or bool(way[routed[id(b)]])]
        blocks: list[Any] = [b.block if isinstance(b, RoutedBlock) else b for b in kept]
        tokens, used = _decode(lm, blocks, prompt[rows], max_new_tokens)
        made[rows], held[rows] = tokens, used
    return Generated(made, decided, held)


def _decode(lm: SequenceModel, blocks: Sequence[Any], prompt: Tensor, count: int) -> tuple[Tensor, int]:
    """Return prompts with ``count`` tokens added by ``blocks`` alone, and the bytes of state a sequence."""
    x, states = lm.embed(prompt), []
    for block in blocks:
        mixed, state = block.mixer.prefill(block.norm(x), None)
        x = block.after(x, mixed)
        states.append(state)
    tokens, last = [prompt], x[:, -1]
    for number in range(count):
        token = lm.head(lm.norm(last)).argmax(-1)
        tokens.append(token[:, None])
        if number + 1 < count:
            last = lm.embed(token[:, None])[:, 0]
            for place, block in enumerate(blocks):
                mixed, states[place] = block.mixer.step(block.norm(last), states[place])
                last = block.after(last, mixed)
    used = sum(value.numel() * value.element_size() for state in states for value in state.values())
    return torch.cat(tokens, 1), used // max(len(prompt), 1)


class LayerRouters(ElasticProcedure):
    """Make every block of a residual stack skippable by sample, at several budgets.

    Args:
        wanted: shares of the blocks' cost, one budget each.
        prompt: how many of the first tokens decide; 0: all. Where a model answers at every position, a quarter of
            them at most, so that few answers see a plan that later tokens took part in.
        rank: of the adapters in the second phase.
        samples: training samples on which costs are counted, at most.

    Example:
        >>> from torchgraft.bench.models import VisionTransformer
        >>> x, y = torch.randn(8, 1, 8, 8), torch.randint(0, 10, (8,))
        >>> model = VisionTransformer(d_model=16, depth=4, num_heads=2).eval()
        >>> task = Task(model, (x, y), (x, y), (x, y), nn.functional.cross_entropy, lambda out, t: out[:, 0])
        >>> elastic = LayerRouters().build(model, task)
        >>> len(elastic.budgets), torch.equal(elastic(x), model(x))
        (4, True)

    Raises:
        BadInput: a setting is out of range.
    """

    card: ClassVar[Card] = CARD

    def __init__(
        self, *, wanted: Sequence[float] = (0.4, 0.6, 0.8), prompt: int = 0, rank: int = 8, samples: int = 256
    ) -> None:
        if prompt < 0 or rank < 0 or samples < 1:
            raise BadInput(
                f"prompt and rank must be at least 0, samples at least 1; got {prompt}, {rank} and {samples}"
            )
        if not wanted or any(not 0 < share < 1 for share in wanted) or sorted(set(wanted)) != list(wanted):
            raise BadInput(f"wanted must be rising shares in (0, 1), got {tuple(wanted)}")
        self.wanted, self.prompt, self.rank, self.samples = tuple(wanted), prompt, rank, samples
        self._refused: list[Refusal] = []

    def _found(self, model: nn.Module, task: Task, ignore: Sequence[str]) -> dict[str, tuple[int, int]]:
        self._refused = []
        return skippable(model, take(task.train.inputs, slice(4)), ignore, self._refused)

    def applies_to(self, model: nn.Module, task: Task, *, ignore: Sequence[str] = ()) -> list[Site]:
        """Return the blocks that can be skipped by sample. See :class:`ElasticProcedure`."""
        return [
            Site(name, "layer", 1, sum(value.numel() for value in model.get_submodule(name).parameters()))
            for name in self._found(model, task, ignore)
        ]

    def refusals(self, model: nn.Module, task: Task, *, ignore: Sequence[str] = ()) -> list[Refusal]:
        """Return the blocks that cannot be skipped by sample. See :class:`ElasticProcedure`."""
        return list(self._refused)

    def plan(self, model: nn.Module, task: Task, *, ignore: Sequence[str] = (), seed: int = 0) -> list[Edit]:
        """Return the one edit that adds the routers. See :class:`ElasticProcedure`."""
        example = take(task.train.inputs, slice(4))
        prompt = self.prompt
        with resting(model), torch.no_grad():
            said = task.output_logits(call(model, example))
        if prompt == 0 and isinstance(example, Tensor) and said.ndim == 3 and said.shape[1] == example.shape[1]:
            prompt = max(1, said.shape[1] // 4)
        return [router_edit(self._found(model, task, ignore), self.wanted, prompt, self.rank, True)]

    def _calibrate(self, elastic: RoutedModel, task: Task) -> None:
        calibrate_routers(elastic, take(task.train.inputs, slice(self.samples)))

    def initialise(self, elastic: ElasticModule, task: Task, *, seed: int = 0) -> None:
        """Find thresholds for the untrained routers. See :class:`ElasticProcedure`."""
        elastic.eval()
        self._calibrate(_routed(elastic), task)

    def train(
        self, elastic: ElasticModule, task: Task, *, steps: int, seed: int = 0, deadline: float | None = None
    ) -> int:
        """Spend half of the steps on the routers, the rest on the adapters. See :class:`ElasticProcedure`."""
        model = _routed(elastic)
        if steps < 0:
            raise BadInput(f"steps must not be negative, got {steps}")
        if steps == 0:
            return 0
        first = (steps + 1) // 2
        done = fit_routers(model, task, steps=first, seed=seed, deadline=deadline)
        self._calibrate(model, task)
        adapted = fit_lora(model, task, steps=steps - first, seed=seed + 1, deadline=deadline)
        if adapted:  # a router reads what adapters before it have changed
            self._calibrate(model, task)
        return done + adapted


def _routed(elastic: ElasticModule) -> RoutedModel:
    if not isinstance(elastic, RoutedModel):
        raise BadInput(f"{CARD.key} made no {type(elastic).__name__}")
    return elastic
