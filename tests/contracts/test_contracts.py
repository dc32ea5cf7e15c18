"""Every method of the registry keeps what its card promises; and the registry is all that is tested."""

from __future__ import annotations

import functools
import importlib.util

import pytest

from torchgraft.catalogue import Card
from torchgraft.catalogue.registry import cards, discover
from torchgraft.contracts import CHECKS, Check, Subject, checks_for
from torchgraft.contracts.run import run_check, subject_of

FOUND = discover()
TESTED = [(card, check) for card in FOUND.values() for check in checks_for(card)]
#: The fewest checks that a card of a kind promises.
LEAST = {"procedure": 15, "analysis": 7, "tool": 7, "part": 29}


@functools.cache
def _subject(key: str) -> Subject:
    return subject_of(FOUND[key])


@pytest.mark.parametrize(("card", "check"), [pytest.param(c, k, id=f"{c.key}-{k.name}") for c, k in TESTED])
def test_promise_is_kept(card: Card, check: Check, request: pytest.FixtureRequest) -> None:
    result = run_check(check, _subject(card.key))
    if result.outcome == "expected failure":
        pytest.xfail(result.reason)
    assert result.good, f"{result.outcome}: {result.reason}"


def test_what_is_tested_is_the_registry() -> None:
    assert {card.key for card, _ in TESTED} == set(FOUND) == set(cards())


def test_every_card_promises_enough() -> None:
    few = {card.key: len(checks_for(card)) for card in FOUND.values() if len(checks_for(card)) < LEAST[card.kind]}
    assert not few


def test_every_check_is_promised_by_some_card() -> None:
    assert {check.name for check in CHECKS} == {check.name for _, check in TESTED}


def test_check_names_are_unique_and_say_what_is_promised() -> None:
    names = [check.name for check in CHECKS]
    assert len(set(names)) == len(names)
    assert all(check.promise.endswith(".") for check in CHECKS)


@pytest.mark.parametrize("key", [card.key for card in FOUND.values() if card.claim is not None])
def test_every_claim_has_its_experiment(key: str) -> None:
    card = FOUND[key]
    name = f"torchgraft.claims.{card.family.replace('/', '_')}.{key.replace('-', '_')}"
    try:
        found = importlib.util.find_spec(name)
    except ModuleNotFoundError:
        found = None
    assert found is not None, f"no module {name}"
