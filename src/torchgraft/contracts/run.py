"""Which checks a card promises, and running them; pytest and ``torchgraft check`` both come through here."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable

from torchgraft.catalogue import Card
from torchgraft.catalogue.registry import entry
from torchgraft.contracts import attention, cards, elastic, memories, mixers, modules, norms, procedures, recovery
from torchgraft.contracts.check import Check, CheckFailure, CheckResult, Subject
from torchgraft.errors import BadInput, nearest

__all__ = ["CHECKS", "checks_for", "run_check", "run_checks", "subject_of"]

#: Every check there is, in the order in which they run.
CHECKS: tuple[Check, ...] = (
    *cards.CHECKS,
    *procedures.CHECKS,
    *recovery.CHECKS,
    *elastic.CHECKS,
    *modules.CHECKS,
    *mixers.CHECKS,
    *attention.CHECKS,
    *memories.CHECKS,
    *norms.CHECKS,
)


def checks_for(card: Card) -> list[Check]:
    """Return the checks that ``card`` promises to pass, chosen by its kind, stage and capabilities.

    Raises:
        BadInput: the card expects a check to fail that is none of its checks.
    """
    chosen = [check for check in CHECKS if check.applies(card)]
    names = [check.name for check in chosen]
    for expected in card.expected_failures:
        if expected not in names:
            raise BadInput(f"card {card.key!r} expects {expected!r} to fail, no check of its{nearest(expected, names)}")
    return chosen


def subject_of(card: Card) -> Subject:
    """Import the method of ``card`` for checking."""
    return Subject(card=card, entry=entry(card), module=importlib.import_module(card.module_name))


def run_check(check: Check, subject: Subject) -> CheckResult:
    """Run one check; a failure that the card expects is well, and one that it expects but does not happen is not."""
    expected = subject.card.expected_failures.get(check.name)
    start = time.perf_counter()
    problem: str | None = None
    try:
        check.function(subject)
    except CheckFailure as failure:
        problem = str(failure)
    except Exception as error:  # a method may raise anything; each is a failure with its place
        problem = f"{type(error).__name__}: {error}{_place(error)}"
    seconds = time.perf_counter() - start
    if expected is None:
        return CheckResult(check.name, "passed" if problem is None else "failed", problem or "", seconds)
    if problem is None:
        reason = f"passes, though the card expects a failure ({expected}); delete the entry"
        return CheckResult(check.name, "unexpected pass", reason, seconds)
    return CheckResult(check.name, "expected failure", expected, seconds)


def run_checks(
    card: Card, *, subject: Subject | None = None, on_result: Callable[[CheckResult], None] | None = None
) -> list[CheckResult]:
    """Run every check that ``card`` promises.

    Args:
        card: the card.
        subject: what to check; by default the method that the card names.
        on_result: called with each result as it comes.
    """
    subject = subject_of(card) if subject is None else subject
    results: list[CheckResult] = []
    for check in checks_for(card):
        results.append(run_check(check, subject))
        if on_result is not None:
            on_result(results[-1])
    return results


def _place(error: BaseException) -> str:
    trace = error.__traceback__
    if trace is None:
        return ""
    while trace.tb_next is not None:
        trace = trace.tb_next
    return f" (at {trace.tb_frame.f_code.co_filename}:{trace.tb_lineno})"
