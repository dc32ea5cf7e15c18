"""The contract of elastic models: the full budget is the original, costs are what they say, switching is one call."""

from __future__ import annotations

import copy
import itertools
import json
import time

import torch
from torch import Tensor, nn

from torchgraft.bench.files import pack_tensors, unpack_tensors
from torchgraft.bench.meters import macs
from torchgraft.bench.task import Task, take
from torchgraft.catalogue import Card
from torchgraft.contracts.check import Check, Subject, require
from torchgraft.contracts.sameness import close, fittings, same_output, same_state, surroundings
from torchgraft.contracts.subjects import Bare, Case, Guarded, cases_of, output, settings
from torchgraft.engines.nesting import ElasticModule, ElasticProcedure
from torchgraft.engines.surgery.edits import apply_edits, edit_from_record, edit_to_record, history
from torchgraft.errors import BadInput

__all__ = ["CHECKS"]

_STEPS = 3
_SWITCH_SECONDS = 1e-3
_COST_TOLERANCE = 0.1


def _procedure(subject: Subject) -> ElasticProcedure:
    made = subject.entry(**settings(subject.card))
    require(isinstance(made, ElasticProcedure), f"{subject.card.entry} makes a {type(made).__name__}")
    found: ElasticProcedure = made
    return found


def _cases(subject: Subject) -> list[Case]:
    return cases_of(subject, _procedure(subject).applies_to)


def _built(subject: Subject, tiny: Case, *, trained: bool = False, task: Task | None = None) -> ElasticModule:
    """Return an elastic model, a private copy of one that is made once."""
    if task is None:
        key = f"{tiny.name}:{trained}"
        if key not in subject.kept:
            subject.kept[key] = _make(subject, tiny, tiny.task, trained=trained)
        kept: ElasticModule = copy.deepcopy(subject.kept[key])
        return kept
    return _make(subject, tiny, task, trained=trained)


def _make(subject: Subject, tiny: Case, task: Task, *, trained: bool) -> ElasticModule:
    procedure = _procedure(subject)
    elastic = procedure.build(tiny.model, task)
    if trained:
        procedure.train(elastic, task, steps=_STEPS)
    return elastic.eval()


def check_budgets_rise_to_one(subject: Subject) -> None:
    """There are at least two budgets, and a new model stands at the full one."""
    for tiny in _cases(subject):
        elastic = _built(subject, tiny)
        require(len(elastic.budgets) >= 2, f"{tiny.name}: one budget only, {elastic.budgets}")
        require(elastic.budget == elastic.budgets[-1] == 1.0, f"{tiny.name}: starts at {elastic.budget}")


def check_full_budget_equals_the_original(subject: Subject) -> None:
    """At the full budget the outputs are those of the original to 1e-6, before and after training, and after others."""
    for tiny, trained in itertools.product(_cases(subject), (False, True)):
        elastic = _built(subject, tiny, trained=trained)
        expected = output(tiny.model, tiny.inputs)
        close(output(elastic, tiny.inputs), expected, 1e-6, f"{tiny.name}: trained {trained}")
        for budget in elastic.budgets:
            output(elastic.set_budget(budget), tiny.inputs)
        close(output(elastic, tiny.inputs), expected, 1e-6, f"{tiny.name}: trained {trained}, after the other budgets")


def check_smaller_budgets_differ(subject: Subject) -> None:
    """Below the full budget the outputs are finite, of the same shape, and not those of the original."""
    for tiny in _cases(subject):
        elastic = _built(subject, tiny, trained=True)
        expected = output(tiny.model, tiny.inputs)
        for budget in elastic.budgets[:-1]:
            out = output(elastic.set_budget(budget), tiny.inputs)
            require(out.shape == expected.shape, f"{tiny.name} at {budget:.3g}: {tuple(out.shape)}")
            require(bool(torch.isfinite(out).all()), f"{tiny.name} at {budget:.3g}: not finite")
            require(not torch.equal(out, expected), f"{tiny.name} at {budget:.3g}: says what the original says")


def check_costs_are_what_they_say(subject: Subject) -> None:
    """Counted multiply-accumulates over the training samples are within 10 % of each budget, and rise with it."""
    for tiny in _cases(subject):
        elastic = _built(subject, tiny, trained=True)
        inputs = tiny.task.train.inputs
        full = macs(tiny.model, inputs)
        shares = [macs(elastic.set_budget(budget), inputs) / full for budget in elastic.budgets]
        wrong = [
            f"{share:.3f} at {budget:.3f}"
            for share, budget in zip(shares, elastic.budgets, strict=True)
            if abs(share - budget) > _COST_TOLERANCE * budget
        ]
        require(not wrong, f"{tiny.name}: counted shares differ from their budgets: {', '.join(wrong)}")
        require(all(a < b for a, b in itertools.pairwise(shares)), f"{tiny.name}: costs do not rise: {shares}")


def check_a_sample_alone_equals_it_in_a_batch(subject: Subject) -> None:
    """At every budget a batch gives what its samples give one by one."""
    for tiny in _cases(subject):
        elastic = _built(subject, tiny, trained=True)
        for budget in elastic.budgets:
            elastic.set_budget(budget)
            batch = output(elastic, tiny.inputs)
            alone = torch.cat([output(elastic, take(tiny.inputs, slice(i, i + 1))) for i in range(len(batch))])
            close(alone, batch, 1e-5, f"{tiny.name} at {budget:.3g}")


def check_switching_is_quick_and_copies_nothing(subject: Subject) -> None:
    """Setting a budget takes less than a millisecond and leaves every weight where it lies."""
    for tiny in _cases(subject):
        elastic = _built(subject, tiny)
        places = {name: value.data_ptr() for name, value in elastic.state_dict().items()}
        best = float("inf")
        for _ in range(5):
            begun = time.perf_counter()
            for budget in elastic.budgets:
                elastic.set_budget(budget)
            best = min(best, (time.perf_counter() - begun) / len(elastic.budgets))
        require(best < _SWITCH_SECONDS, f"{tiny.name}: switching takes {1e3 * best:.2f} ms")
        after = {name: value.data_ptr() for name, value in elastic.state_dict().items()}
        require(places == after, f"{tiny.name}: switching moves weights")


def check_bad_budgets_are_refused(subject: Subject) -> None:
    """A budget outside (0, 1], or below the least, is refused with its value, and the model stays as it was."""
    tiny = _cases(subject)[0]
    elastic = _built(subject, tiny)
    for budget in (0.0, -1.0, 1.5, float("nan"), elastic.budgets[0] / 2):
        before = elastic.budget
        try:
            elastic.set_budget(budget)
        except BadInput as error:
            require(str(budget) in str(error), f"the refusal of {budget} does not say it: {error}")
        else:
            require(False, f"budget {budget} is accepted")
        require(elastic.budget == before, f"a refused budget moves the model to {elastic.budget}")


def check_elastic_original_is_untouched(subject: Subject) -> None:
    """Neither building nor training changes the original, its modes and hooks, or the world around it."""
    for tiny in _cases(subject):
        model = tiny.model
        model.train()
        weights, parts, around = copy.deepcopy(model), fittings(model), surroundings()
        procedure = _procedure(subject)
        procedure.train(procedure.build(model, tiny.task), tiny.task, steps=1)
        for name, value in surroundings().items():
            require(value == around[name], f"{tiny.name}: {name} changed")
        for name, value in fittings(model).items():
            require(value == parts[name], f"{tiny.name}: the {name} of the original changed")
        same_state(weights, model, f"{tiny.name}: the original")


def check_elastic_training_reaches_the_smaller_budgets(subject: Subject) -> None:
    """Training with no steps changes nothing; with some it is repeatable with one seed and moves a smaller budget."""
    for tiny in _cases(subject):
        first, again = _built(subject, tiny, trained=True), _built(subject, tiny, trained=True, task=tiny.task)
        same_state(first, again, f"{tiny.name}: two runs with seed 0")
        rested = _built(subject, tiny)
        _procedure(subject).train(rested, tiny.task, steps=0)
        untrained = _built(subject, tiny)
        same_state(untrained, rested, f"{tiny.name}: after 0 steps")
        moved = [
            budget
            for budget in first.budgets[:-1]
            if budget not in untrained.budgets
            or not torch.equal(
                output(first.set_budget(budget), tiny.inputs), output(untrained.set_budget(budget), tiny.inputs)
            )
        ]
        require(bool(moved), f"{tiny.name}: training moves none of the budgets {first.budgets[:-1]}")


def check_elastic_without_training_trains_nothing(subject: Subject) -> None:
    """Where the card declares no training, none is done: no step is taken, and no weight or budget moves."""
    for tiny in _cases(subject):
        elastic = _built(subject, tiny)
        steps = _procedure(subject).train(elastic, tiny.task, steps=_STEPS)
        require(steps == 0, f"{tiny.name}: {steps} steps, though the card lacks needs-training")
        same_state(_built(subject, tiny), elastic, f"{tiny.name}: after training, though the card lacks needs-training")


def check_elastic_training_ends_in_time(subject: Subject) -> None:
    """A deadline that has passed allows one step at most, and a negative number of steps is refused."""
    tiny = _cases(subject)[0]
    procedure = _procedure(subject)
    elastic = _built(subject, tiny)
    begun = time.monotonic()
    steps = procedure.train(elastic, tiny.task, steps=100_000, deadline=begun)
    require(steps <= 1, f"{steps} steps after the deadline")
    try:
        procedure.train(elastic, tiny.task, steps=-1)
    except BadInput as error:
        require("\n" not in str(error), f"the refusal has several lines: {error}")
    else:
        require(False, "steps = -1 is accepted")


def check_elastic_sees_training_samples_only(subject: Subject) -> None:
    """Neither building nor training looks at validation or test samples."""
    for tiny in _cases(subject):
        guarded = Guarded(tiny.task, ("val", "test"))
        _built(subject, tiny, trained=True, task=guarded)
        require(not guarded.seen, f"{tiny.name}: looked at {guarded.seen}")


def check_elastic_reload_gives_the_same_outputs(subject: Subject) -> None:
    """Edits through JSON on a fresh architecture, then the saved weights, give the same outputs at every budget."""
    for tiny in _cases(subject):
        elastic = _built(subject, tiny, trained=True)
        records = json.loads(json.dumps([edit_to_record(edit) for edit in history(elastic)]))
        fresh = apply_edits(tiny.build(7), [edit_from_record(record) for record in records])
        weights, _ = unpack_tensors(pack_tensors(elastic.state_dict()))
        require(not fresh.state_dict().keys() ^ weights.keys(), f"{tiny.name}: other names after the edits")
        fresh.load_state_dict(weights)
        fresh.eval()
        require(isinstance(fresh, ElasticModule), f"{tiny.name}: the edits make a {type(fresh).__name__}")
        for budget in elastic.budgets:
            wanted = output(elastic.set_budget(budget), tiny.inputs)
            same_output(wanted, _at(fresh, budget, tiny), f"{tiny.name} at {budget:.3g} after reload")


def _at(model: nn.Module, budget: float, tiny: Case) -> Tensor:
    require(isinstance(model, ElasticModule), f"{tiny.name}: not elastic")
    model.set_budget(budget)  # type: ignore[operator]
    return output(model, tiny.inputs)


def check_elastic_copy_is_independent(subject: Subject) -> None:
    """A deep copy says the same at every budget, and switching or changing it leaves the first alone."""
    for tiny in _cases(subject):
        elastic = _built(subject, tiny, trained=True)
        expected = output(elastic, tiny.inputs)
        twin = copy.deepcopy(elastic)
        for budget in elastic.budgets:
            wanted = output(elastic.set_budget(budget), tiny.inputs)
            same_output(wanted, output(twin.set_budget(budget), tiny.inputs), f"{tiny.name} at {budget:.3g}: copy")
        elastic.set_budget(1.0)
        twin.set_budget(twin.budgets[0])
        with torch.no_grad():
            for value in (*twin.parameters(), *twin.buffers()):
                value.zero_()
        same_output(expected, output(elastic, tiny.inputs), f"{tiny.name}: after its copy was zeroed")


def check_elastic_ignored_modules_stay(subject: Subject) -> None:
    """A site that an ignore glob names is no site, and ignoring all leaves none."""
    procedure = _procedure(subject)
    for tiny in _cases(subject):
        sites = procedure.applies_to(tiny.model, tiny.task)
        glob = sites[0].name.split(":")[0]
        left = [site.name for site in procedure.applies_to(tiny.model, tiny.task, ignore=[glob])]
        require(sites[0].name not in left, f"{tiny.name}: {glob!r} is ignored, yet a site")
        require(not procedure.applies_to(tiny.model, tiny.task, ignore=["*"]), f"{tiny.name}: sites though all ignored")


def check_elastic_model_without_sites_is_refused(subject: Subject) -> None:
    """A model in which nothing can be made elastic is refused by a one-line BadInput that names the method."""
    tiny = _cases(subject)[0]
    try:
        _procedure(subject).build(Bare(), tiny.task)
    except BadInput as error:
        require("\n" not in str(error) and subject.card.key in str(error), f"the refusal is unclear: {error}")
    else:
        require(False, "a model of one bias vector is accepted")


def _is_elastic(card: Card) -> bool:
    return card.kind == "procedure" and "elastic" in card.capabilities


def _trains(card: Card) -> bool:
    return _is_elastic(card) and "needs-training" in card.capabilities


def _trains_not(card: Card) -> bool:
    return _is_elastic(card) and "needs-training" not in card.capabilities


CHECKS = (
    *(
        Check(function, _is_elastic)
        for function in (
            check_budgets_rise_to_one,
            check_full_budget_equals_the_original,
            check_smaller_budgets_differ,
            check_costs_are_what_they_say,
            check_a_sample_alone_equals_it_in_a_batch,
            check_switching_is_quick_and_copies_nothing,
            check_bad_budgets_are_refused,
            check_elastic_original_is_untouched,
            check_elastic_training_ends_in_time,
            check_elastic_sees_training_samples_only,
            check_elastic_reload_gives_the_same_outputs,
            check_elastic_copy_is_independent,
            check_elastic_ignored_modules_stay,
            check_elastic_model_without_sites_is_refused,
        )
    ),
    Check(check_elastic_training_reaches_the_smaller_budgets, _trains),
    Check(check_elastic_without_training_trains_nothing, _trains_not),
)
