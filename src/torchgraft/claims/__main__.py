"""Run claims and keep their records: ``python -m torchgraft.claims [KEY ...] [--fastest N] [--dry]``."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

from torchgraft.bench.files import write_atomic
from torchgraft.catalogue import cards, lookup
from torchgraft.catalogue.card import Card
from torchgraft.claims.record import ClaimRecord

__all__ = ["claim_module", "main", "record_path", "run_claim"]


def claim_module(card: Card) -> str:
    """Return the dotted name of the module that runs the claim of ``card``."""
    return f"torchgraft.claims.{card.family.replace('/', '_')}.{card.key.replace('-', '_')}"


def record_path(key: str, root: Path | None = None) -> Path:
    """Return where the record of ``key`` is kept."""
    return (root or Path("results")) / "claims" / f"{key}.json"


def run_claim(key: str) -> ClaimRecord:
    """Run the claim of ``key`` now and return its record; nothing is written."""
    record: ClaimRecord = importlib.import_module(claim_module(lookup(key))).run()
    return record


def _last_seconds(key: str) -> float:
    path = record_path(key)
    return ClaimRecord.model_validate_json(path.read_text()).seconds if path.exists() else float("inf")


def main(arguments: list[str] | None = None) -> int:
    """Run the claims of the given keys, or of all, one after another."""
    parser = argparse.ArgumentParser(prog="python -m torchgraft.claims", description=main.__doc__)
    parser.add_argument("keys", nargs="*")
    parser.add_argument("--fastest", type=int, help="only the N whose last run was shortest, and rests on no times")
    parser.add_argument("--dry", action="store_true", help="keep no records; fail where a verdict has changed")
    chosen = parser.parse_args(arguments)
    keys = chosen.keys or [card.key for card in cards().values() if card.claim is not None]
    if chosen.fastest:
        untimed = [
            key for key in keys if not getattr(importlib.import_module(claim_module(lookup(key))), "TIMED", False)
        ]
        keys = sorted(untimed, key=_last_seconds)[: chosen.fastest]
    changed = 0
    for key in keys:
        record = run_claim(key)
        print(f"{key}: {record.verdict} ({record.seconds:.0f} s) {record.effects}", flush=True)
        path = record_path(key)
        if not chosen.dry:
            write_atomic(path, record.model_dump_json(indent=1) + "\n")
        elif path.exists():
            kept = ClaimRecord.model_validate_json(path.read_text()).verdict
            if kept != record.verdict:
                print(f"{key}: the kept verdict is {kept}", file=sys.stderr)
                changed += 1
    return 1 if changed else 0


if __name__ == "__main__":
    sys.exit(main())
