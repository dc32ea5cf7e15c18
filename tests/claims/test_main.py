"""Running claims from the command line: what a sample takes, and when a changed verdict fails."""

from __future__ import annotations

import importlib

import pytest

from torchgraft.catalogue import cards, lookup
from torchgraft.claims import __main__ as command
from torchgraft.claims.record import ClaimRecord


def record(key: str, verdict: str) -> ClaimRecord:
    return ClaimRecord(
        key=key,
        figure="",
        metrics={},
        effects={},
        parts={},
        verdict=verdict,
        seeds=[0],
        seconds=1.0,  # type: ignore[arg-type]
    )


def test_the_sample_takes_no_claim_that_rests_on_times(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    def run(key: str) -> ClaimRecord:
        ran.append(key)
        path = command.record_path(key)
        return ClaimRecord.model_validate_json(path.read_text()) if path.exists() else record(key, "inconclusive")

    timed = {
        key
        for key, card in cards().items()
        if card.claim is not None
        and getattr(importlib.import_module(command.claim_module(lookup(key))), "TIMED", False)
    }
    assert "lightning-attention-2" in timed
    monkeypatch.setattr(command, "run_claim", run)
    monkeypatch.setattr(command, "_last_seconds", lambda key: 0.0 if key in timed else 1.0)
    assert command.main(["--fastest", "3", "--dry"]) == 0
    assert len(ran) == 3
    assert not timed & set(ran)


def test_a_changed_verdict_fails_a_dry_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "run_claim", lambda key: record(key, "inconclusive"))
    assert command.main(["quantized-distillation", "--dry"]) == 1
