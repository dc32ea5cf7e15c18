"""How the outcome of a check follows from the card: failures that are expected are strict."""

from __future__ import annotations

import types
from typing import Any

import pytest

from torchgraft.catalogue import lookup
from torchgraft.contracts import CHECKS, Check, CheckFailure, CheckResult, Subject, checks_for, run_checks
from torchgraft.contracts.run import run_check
from torchgraft.contracts.subjects import cases_of
from torchgraft.errors import BadInput

CARD = lookup("magnitude-pruning")


def _holds(subject: Subject) -> None:
    """Nothing is promised."""


def _fails(subject: Subject) -> None:
    """What is promised does not hold."""
    raise CheckFailure("2 is not 3")


def _crashes(subject: Subject) -> None:
    """The method raises."""
    raise KeyError("gone")


def _result(function: Any, *, expected: bool) -> CheckResult:
    check = Check(function, lambda card: True)
    failures = {check.name: "a reason that is long enough"} if expected else {}
    card = CARD.model_copy(update={"expected_failures": failures})
    return run_check(check, Subject(card, None, types.ModuleType("toy")))


@pytest.mark.parametrize(
    ("function", "expected", "outcome", "good"),
    [
        (_holds, False, "passed", True),
        (_holds, True, "unexpected pass", False),
        (_fails, False, "failed", False),
        (_fails, True, "expected failure", True),
        (_crashes, False, "failed", False),
        (_crashes, True, "expected failure", True),
    ],
)
def test_outcome(function: Any, expected: bool, outcome: str, good: bool) -> None:
    result = _result(function, expected=expected)
    assert (result.outcome, result.good) == (outcome, good)
    assert result.seconds >= 0


def test_reasons_carry_the_numbers_and_the_place() -> None:
    assert _result(_fails, expected=False).reason == "2 is not 3"
    crash = _result(_crashes, expected=False).reason
    assert crash.startswith("KeyError: 'gone' (at ")
    assert f"{__file__}:" in crash


def test_expected_failure_must_name_a_check_of_the_card() -> None:
    card = CARD.model_copy(update={"expected_failures": {"card-is-indexd": "a reason that is long enough"}})
    with pytest.raises(BadInput, match="did you mean 'card-is-indexed'"):
        checks_for(card)


def test_checks_follow_from_stage_and_capabilities() -> None:
    def names(**facts: Any) -> set[str]:
        return {check.name for check in checks_for(CARD.model_copy(update=facts))}

    promised = names(stage="width", capabilities=frozenset())
    assert "removed-equals-masked" in promised
    assert "removed-equals-masked" not in names(stage="rank")
    assert "result-can-be-trained" not in names(stage="precision")
    assert promised - names(stage="width", capabilities=frozenset({"needs-data"})) == {"undeclared-data-is-not-used"}
    assert promised - names(capabilities=frozenset({"needs-training"})) == {"only-declared-sites-move"}
    assert names(stage=None).isdisjoint(names(stage="rank") - names(kind="analysis"))


def test_results_come_one_by_one() -> None:
    card = CARD.model_copy(update={"kind": "analysis"})
    seen: list[str] = []
    results = run_checks(card, on_result=lambda result: seen.append(result.check))
    assert seen == [result.check for result in results] == [check.name for check in CHECKS if check.applies(card)]


def test_a_particular_model_is_checked_for_the_cards_that_name_it() -> None:
    named = CARD.model_copy(update={"example": {"model": "recurrent"}})
    for card, last in ((CARD, "transformer"), (named, "recurrent")):
        subject = Subject(card, None, types.ModuleType("toy"))
        assert cases_of(subject, lambda model, task: [model])[-1].name == last
    with pytest.raises(CheckFailure, match="none of the check models mlp, cnn, transformer, recurrent"):
        cases_of(Subject(named, None, types.ModuleType("toy")), lambda model, task: [])
