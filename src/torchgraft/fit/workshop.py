"""Making one candidate: apply the chosen procedures so that the budget is met, recover, measure.

One dial of a choice is not sampled but solved for: the strength of the last float procedure is searched so that the
measured cost comes to lie just inside the budget. A trial therefore spends its training on a model that may count.
"""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn

from torchgraft.bench import meters
from torchgraft.bench.meters.latency import interleaved
from torchgraft.bench.task import Task
from torchgraft.bench.training import evaluate
from torchgraft.catalogue.card import STAGES
from torchgraft.engines.distill import Teacher, distill
from torchgraft.engines.surgery.edits import Edit, apply_edits, history
from torchgraft.errors import BadInput
from torchgraft.fit.budget import Limit
from torchgraft.fit.plan import Plan

__all__ = ["LAST", "Choice", "Made", "Workshop"]

#: Which stage's strength is solved for, the first one present: the finer the dial, the sooner.
FILLERS = ("width", "rank", "weights", "depth", "mixer", "precision")
#: Stages that stand on a model once it is trained.
LAST = ("precision", "execution")
#: Costs that are noisy and are therefore aimed at with a margin.
NOISY = ("latency",)
MARGIN = 0.93
#: Timing rounds of a quick measurement.
QUICK = 5
#: How far below the target a solved strength may fall before the search goes on.
SLACK = 0.94


@dataclass(frozen=True)
class Choice:
    """What a trial tries.

    Args:
        procedures: stage -> (procedure key, strength); the strength of the filler stage is only a first guess.
        target: how far below the budget to aim, as a share of it; 1 aims at the budget itself.
        free_ending: whether the precision procedure stands for all of them, so that the best one ends the model.
    """

    procedures: Mapping[str, tuple[str, float]]
    target: float = 1.0
    free_ending: bool = False

    @property
    def filler(self) -> str | None:
        """The stage whose strength is solved for."""
        return next((stage for stage in FILLERS if stage in self.procedures), None)


@dataclass
class Made:
    """A candidate on its way.

    Args:
        model: the float model before the precision stage (what recovery trains).
        strengths: procedure key -> strength, in order of application; precision included.
        ratios: cost -> ratio to the original, as quickly measured on the finished model; empty without a budget.
        met: whether the quickly measured ratios meet the targets.
    """

    model: nn.Module
    strengths: dict[str, float]
    ratios: dict[str, float] = field(default_factory=dict)
    met: bool = False


#: The original's logits are kept for all recoveries where the training samples make no more batches than this.
KEPT_BATCHES = 64
#: How many recovery steps are timed, to tell them from what a recovery takes beside them.
STEPS_TIMED = 5


class Workshop:
    """Everything that the trials of one run share.

    Args:
        task: the task.
        original: the original model.
        plan: what may be done.
        limits: the budget.
        costs: which costs are measured.
        ignore: globs of module names that must stay as they are.
        seed: the seed of the run.
        max_drop: the largest fall of the score that is asked for, or ``None``.
    """

    def __init__(
        self,
        task: Task,
        original: nn.Module,
        plan: Plan,
        limits: Sequence[Limit],
        costs: Sequence[str],
        *,
        ignore: Sequence[str] = (),
        seed: int = 0,
        max_drop: float | None = None,
    ) -> None:
        #: The fall of the score at which a model is worth nothing in a run without a budget: one of ``max_drop``, which
        #: is still allowed, is worth half.
        self.span = None if max_drop is None else max(2.0 * max_drop, 1e-6)
        self.task, self.original, self.plan = task, original, plan
        self.limits, self.costs, self.ignore, self.seed = tuple(limits), tuple(costs), tuple(ignore), seed
        #: Models that lost layers only, by their edits, so that what can be cut in each is found out once.
        self._shorter: dict[tuple[str, ...], nn.Module] = {}
        #: Ways to run a model that were no faster -> the parameters of the largest such model.
        self.unhurried: dict[str, int] = {}
        self.baseline = meters.measure(original, task.example, costs=self.costs)
        self.validation = evaluate(original, task, task.val)
        if not bool(torch.isfinite(self.validation).all()):
            raise BadInput("the original model's validation score is NaN or infinite; the model or the data is damaged")

    @cached_property
    def _guide(self) -> Teacher:
        """The original as a teacher of all recoveries: its answers are kept where it pays, else it runs fastest."""
        size = len(self.task.train)
        if size <= KEPT_BATCHES * self.task.batch_size:
            guide = Teacher(self.original, self.task).prepare(size)
            if guide.keeps:  # each is asked for once, which no program would pay for
                return guide
        stage = self.plan.stages.get(LAST[-1], {})
        # A pass that rounds is in the plan where it was found to be faster than one that does not.
        ways = dict.fromkeys(sorted(stage, key=lambda key: stage[key].exact)[:1], 1.0)
        return Teacher(self.finish(self.original, ways, self.seed), self.task)

    def bound(self, cost: str) -> float:
        """Return the limit on ``cost`` as a ratio, infinite where there is none."""
        for limit in self.limits:
            if limit.cost == cost:
                return limit.ratio(self.baseline.readings[cost].value)
        return math.inf

    @property
    def primary(self) -> str:
        """The cost that the search minimises where no budget is given."""
        return self.limits[0].cost if self.limits else self.costs[0]

    def quick_ratios(self, model: nn.Module, costs: Sequence[str] | None = None) -> dict[str, float]:
        """Return the cost ratios of ``model`` with few rounds."""
        return self.quick_ratios_of([model], costs)[0]

    def quick_ratios_of(
        self, models: Sequence[nn.Module], costs: Sequence[str] | None = None
    ) -> list[dict[str, float]]:
        """Return the cost ratios of each of ``models`` with few rounds, in which they take turns with the original."""
        wanted = list(self.costs if costs is None else costs)
        exact = [cost for cost in wanted if cost not in NOISY]
        found: list[dict[str, float]] = [{} for _ in models]
        for model, ratios in zip(models, found, strict=True):
            readings = meters.measure(model, self.task.example, costs=exact).readings
            for cost in exact:
                before = self.baseline.readings[cost].value
                ratios[cost] = readings[cost].value / before if before else 1.0
        if any(cost in NOISY for cost in wanted):  # latency is the only one
            seconds = interleaved([self.original, *models], self.task.example, rounds=QUICK)
            for place, ratios in enumerate(found, 1):
                ratios["latency"] = statistics.median((seconds[:, place] / seconds[:, 0]).tolist())
        return found

    def load(self, ratios: Mapping[str, float]) -> float:
        """Return the largest ratio relative to its limit; at most 1 where the budget is met.

        Without a budget it is the geometric mean of all ratios there are, so that no cost is forgotten.
        """
        if not self.limits:
            found = [max(ratios[cost], 1e-9) for cost in self.costs if cost in ratios]
            return math.exp(sum(map(math.log, found)) / len(found))
        return max(ratios[limit.cost] / self.bound(limit.cost) for limit in self.limits)

    def _aim(self, ratios: Mapping[str, float], target: float) -> float:
        """Return the load against the targets: limits times ``target``, with a margin where readings are noisy."""
        return max(
            ratios[limit.cost] / (self.bound(limit.cost) * target * (MARGIN if limit.cost in NOISY else 1.0))
            for limit in self.limits
        )

    def _apply(self, model: nn.Module, key: str, strength: float, seed: int) -> nn.Module:
        procedure = self.plan.procedures[key]
        if strength > 0 and not procedure.applies_to(model, self.task, ignore=self.ignore):
            return model  # an earlier procedure has left nothing to act on
        made = procedure.apply(model, self.task, strength, ignore=self.ignore, seed=seed)
        card = procedure.card
        if model is self.original and card.stage == "depth" and "needs-training" not in card.capabilities:
            edits = tuple(edit.model_dump_json() for edit in history(made)[len(history(model)) :])
            made = self._shorter.setdefault(edits, made)
        return made

    def finish(
        self, model: nn.Module, strengths: Mapping[str, float], seed: int, *, stages: Sequence[str] = LAST
    ) -> nn.Module:
        """Return ``model`` after what its procedures leave to its end, and those of ``stages``, the last ones."""
        last = {key: stage for stage in LAST for key in self.plan.stages.get(stage, {}) if key in strengths}
        for key in strengths:
            if key not in last and (edits := self._endings(model, key)):
                model = apply_edits(model, edits)
        for key, stage in last.items():
            if stage in stages:
                model = self._apply(model, key, strengths[key], seed)
        return model

    def score_of(self, made: Made, seed: int) -> float:
        """Return the mean validation score of a candidate."""
        return float(self.score(self.as_scored(made.model, made.strengths, seed)).mean())

    def as_scored(self, model: nn.Module, strengths: Mapping[str, float], seed: int) -> nn.Module:
        """Return ``model`` as :meth:`finish` does, but for an execution that changes nothing of its score."""
        rounds = any(not p.exact for key, p in self.plan.stages.get(LAST[-1], {}).items() if key in strengths)
        return self.finish(model, strengths, seed, stages=LAST if rounds else LAST[:-1])

    def _endings(self, model: nn.Module, key: str) -> list[Edit]:
        return self.plan.procedures[key].ending(model, self.task, ignore=self.ignore)

    def make(self, choice: Choice, seed: int) -> Made:
        """Apply ``choice``, its filler's strength solved so that the aimed-at cost is met with as little as possible.

        Without a budget there is nothing to aim at: the strengths are those of the choice, and nothing is measured.

        Returns:
            The float model, its strengths and quickly measured ratios; ``met`` says whether the aim was reached.
        """
        filler = choice.filler
        watched = [limit.cost for limit in self.limits]
        prefix, prefix_until = self.original, -1
        if filler is not None and filler != "precision":
            prefix_until = STAGES.index(filler)
            for stage in STAGES[:prefix_until]:
                if stage in choice.procedures:
                    key, strength = choice.procedures[stage]
                    prefix = self._apply(prefix, key, strength, seed)

        def build(strength: float) -> Made:
            model, strengths = prefix, {}
            for position, stage in enumerate(STAGES):
                if stage not in choice.procedures:
                    continue
                key, given = choice.procedures[stage]
                strengths[key] = strength if stage == filler else given
                if position >= max(prefix_until, 0) and stage not in LAST:
                    model = self._apply(model, key, strengths[key], seed)
            if any(model is shorter for shorter in self._shorter.values()):
                model = copy.deepcopy(model)  # it is going to be trained
            made = Made(model, strengths, met=not self.limits)
            if self.limits:
                made.ratios = self.quick_ratios(self.finish(model, strengths, seed), watched)
                made.met = self._aim(made.ratios, choice.target) <= 1.0
            return made

        low, high = 0.0, 1.0
        best: Made | None = None
        strength = min(max(choice.procedures[filler][1], 0.05), 1.0) if filler is not None else 1.0
        if not self.limits:
            return build(strength)
        for _ in range(6):
            made = build(strength)
            if made.met:
                best, high = made, strength
                if filler is None or self._aim(made.ratios, choice.target) >= SLACK or high - low < 0.01:
                    break
            else:
                low = strength
                if best is None and strength >= 1.0:
                    best = made  # as far as it goes; it may still lie within the budget, which is wider than the aim
                    break
            strength = (low + high) / 2 if best is not None else min(1.0, (strength + 1.0) / 2 + 0.05)
        if best is None:
            best = build(1.0)
        if best.ratios.keys() != set(self.costs):
            finished = self.finish(best.model, best.strengths, seed)
            best.ratios.update(self.quick_ratios(finished, [c for c in self.costs if c not in best.ratios]))
        return best

    def recover(self, model: nn.Module, *, steps: int, seed: int, deadline: float | None = None) -> int:
        """Train ``model`` in place to follow the original; return how many steps were taken.

        The original itself, to which a precision procedure alone is applied at the end, has nothing to recover, and
        neither has a copy about which something was only noted.
        """
        edits = history(model)[len(history(self.original)) :]
        if steps <= 0 or model is self.original or (edits and all(edit.idle for edit in edits)):
            return 0
        record = distill(model, self._guide, self.task, steps=steps, seed=seed, deadline=deadline)
        model.eval()
        return record.steps

    def score(self, model: nn.Module) -> Tensor:
        """Return the validation score of every sample, shape (N,).

        Raises:
            BadInput: the model returns NaN.
        """
        scores = evaluate(model, self.task, self.task.val)
        if not bool(torch.isfinite(scores).all()):
            raise BadInput("the changed model's validation score is NaN or infinite")
        return scores

    def step_seconds(self, model: nn.Module | None = None) -> float:
        """Return about how long one recovery step takes, measured on a copy after one step of warm-up.

        What a recovery takes beside its steps, such as the first of the teacher's answers, is not counted: in half a
        minute it would be most of what is measured.

        Args:
            model: what would be recovered; by default the original.
        """
        probe = copy.deepcopy(model) if model is not None else self.task.architecture()
        if model is None:
            probe.load_state_dict(self.original.state_dict())
        self.recover(probe, steps=1, seed=self.seed)
        ends = [time.perf_counter()]
        for steps in (1, 1 + STEPS_TIMED):
            self.recover(probe, steps=steps, seed=self.seed)
            ends.append(time.perf_counter())
        few, more = ends[1] - ends[0], ends[2] - ends[1]
        return max((more - few) / STEPS_TIMED, 0.1 * more / STEPS_TIMED, 1e-4)
