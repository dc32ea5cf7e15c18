"""Every two procedures of which the rules allow both: applied, saved, reloaded, compared; every other two refused."""

from __future__ import annotations

import functools
import itertools
from pathlib import Path

import pytest
import torch
from torch import nn

from torchgraft.bench.meters import measure
from torchgraft.catalogue import registry
from torchgraft.contracts.sameness import same_output
from torchgraft.contracts.subjects import Case, case, output, settings
from torchgraft.engines import recipe
from torchgraft.engines.control_flow.compiled import difference
from torchgraft.engines.control_flow.execution import RunCompiled
from torchgraft.engines.procedure import Procedure
from torchgraft.engines.surgery.edits import apply_edits, history
from torchgraft.errors import BadInput
from torchgraft.fit.plan import check_combination
from torchgraft.fit.workshop import LAST

EXACT = ("params", "macs", "size")
KEYS = sorted(card.key for card in registry.cards().values() if card.stage is not None)
PAIRS = list(itertools.combinations(KEYS, 2))


def _ordered(pair: tuple[str, str]) -> list[str] | None:
    try:
        return check_combination(pair)
    except BadInput:
        return None


ALLOWED = [pair for pair in PAIRS if _ordered(pair) is not None]
#: Sparse kernels run as Python, where the machine is found to be faster by them.
COMPILABLE = [key for key in KEYS if registry.lookup(key).stage not in ("weights", "execution")]
REFUSED = [pair for pair in PAIRS if _ordered(pair) is None]


@functools.cache
def _case(name: str) -> Case:
    return case(name)


def _procedure(key: str) -> Procedure:
    card = registry.lookup(key)
    made: Procedure = registry.entry(card)(**settings(card))
    return made if card.stage == "execution" else made.for_costs(EXACT)  # it acts where latency counts


@functools.cache
def _first(key: str, name: str) -> nn.Module | None:
    """Return the check model after one procedure, or None where it finds nothing to do there."""
    tiny, procedure = _case(name), _procedure(key)
    if not procedure.applies_to(tiny.model, tiny.task):
        return None
    return procedure.apply(tiny.model, tiny.task, 0.5)


def _ended(key: str, model: nn.Module, tiny: Case) -> nn.Module:
    edits = _procedure(key).ending(model, tiny.task)
    return apply_edits(model, edits) if edits else model


def _exact(model: nn.Module, tiny: Case) -> dict[str, float]:
    return {cost: reading.value for cost, reading in measure(model, tiny.inputs, costs=EXACT).readings.items()}


@pytest.mark.parametrize("name", ["cnn", "transformer"])
@pytest.mark.parametrize("pair", ALLOWED, ids="+".join)
def test_an_allowed_pair_is_saved_and_comes_back_the_same(pair: tuple[str, str], name: str, tmp_path: Path) -> None:
    ordered = _ordered(pair)
    assert ordered is not None
    tiny = _case(name)
    begun = _first(ordered[0], name)
    base = tiny.model if begun is None else begun
    second = _procedure(ordered[1])
    both = base
    if second.applies_to(base, tiny.task):  # the first may have left nothing to act on, as fit allows
        ended = _ended(ordered[0], base, tiny) if registry.lookup(ordered[1]).stage in LAST else base
        both = second.apply(ended, tiny.task, 0.5)
        assert len(history(both)) > len(history(base))
    for key in ordered:
        both = _ended(key, both, tiny)
    recipe.save(both, tmp_path, task="")
    again = recipe.rebuild(recipe.read_recipe(tmp_path), tiny.build(7), tmp_path)
    same_output(output(both, tiny.inputs), output(again, tiny.inputs), f"{'+'.join(ordered)} on {name}")
    costs = _exact(again, tiny)
    assert costs == _exact(both, tiny)
    dearer = any("cost-never-rises-with-strength" in registry.lookup(key).expected_failures for key in ordered)
    idle = all(isinstance(edit, RunCompiled) for edit in history(both))  # it lowers latency alone
    if not idle and not dearer:  # a card says, with the reason, where the check models are too small to gain
        before = _exact(tiny.model, tiny)
        assert any(costs[cost] < before[cost] for cost in EXACT), (costs, before)


@pytest.mark.parametrize("pair", REFUSED, ids="+".join)
def test_a_refused_pair_is_refused_with_the_reason(pair: tuple[str, str]) -> None:
    with pytest.raises(BadInput) as caught:
        check_combination(pair)
    text = str(caught.value)
    assert all(key in text for key in pair)
    assert "\n" not in text
    one, other = (registry.lookup(key) for key in pair)
    conflict = one.conflicts.get(other.key) or other.conflicts.get(one.key)
    assert (one.stage == other.stage and str(one.stage) in text) or (conflict is not None and conflict in text)


def test_hardly_any_pair_is_empty() -> None:
    """On one of the two models at least, nearly every procedure finds something to do."""
    idle = [key for key in KEYS if all(_first(key, name) is None for name in ("cnn", "transformer"))]
    assert len(idle) <= len(KEYS) // 5, idle


@pytest.mark.parametrize("name", ["cnn", "transformer"])
@pytest.mark.parametrize("key", COMPILABLE)
def test_what_a_procedure_makes_can_be_compiled(key: str, name: str) -> None:
    tiny, model = _case(name), _first(key, name)
    if model is None:
        model = tiny.model
    both = _procedure("dycl-compile").apply(_ended(key, model, tiny), tiny.task, 1.0)
    with torch.no_grad():
        found = both(tiny.task.example)
    assert both.__dict__["forward"].compiled(tiny.task.example)
    assert difference(output(_ended(key, model, tiny), tiny.task.example), found) < 1e-4
