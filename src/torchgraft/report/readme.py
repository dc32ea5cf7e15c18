"""The table of methods in README.md: ``python -m torchgraft.report.readme`` writes it from the catalogue's index."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

from torchgraft.bench.files import write_atomic
from torchgraft.catalogue.registry import Record, records
from torchgraft.errors import BadInput
from torchgraft.report.catalogue_pages import catalogue_rows

__all__ = ["main", "readme_table", "with_table"]

OPEN, CLOSE = "<!-- catalogue -->", "<!-- /catalogue -->"


def readme_table(methods: Iterable[Record]) -> str:
    """Return the Markdown table of ``methods``, a row a family: its methods, and how many claims were reproduced.

    Rooms of one family share a row, except those of ``parts``.
    """
    lines = ["| family | methods | claims reproduced |", "|---|---|---|"]
    rows: dict[str, list[Record]] = {}
    for family, each in catalogue_rows(methods).items():
        rows.setdefault(family if family.startswith("parts/") else family.partition("/")[0], []).extend(each)
    for family, members in rows.items():
        links = [f"[`{each.card.key}`](src/{each.card.module_name.replace('.', '/')}.py)" for each in members]
        claims = [each.verdict for each in members if each.card.claim is not None]
        held = f"{claims.count('reproduced')} of {len(claims)}" if claims else "baselines, no claims"
        lines.append(f"| {family} | {', '.join(links)} | {held} |")
    return "\n".join(lines)


def with_table(text: str, table: str) -> str:
    """Return ``text`` with ``table`` between its two markers.

    Raises:
        BadInput: the markers are not there once each, in order.

    Example:
        >>> with_table("a\\n<!-- catalogue -->\\nold\\n<!-- /catalogue -->\\nb", "new").split("\\n")
        ['a', '<!-- catalogue -->', 'new', '<!-- /catalogue -->', 'b']
    """
    head, opened, rest = text.partition(OPEN)
    _, closed, tail = rest.partition(CLOSE)
    if not opened or not closed or OPEN in tail or CLOSE in tail:
        raise BadInput(f"README.md needs the markers {OPEN} and {CLOSE} once each, in this order")
    return f"{head}{OPEN}\n{table}\n{CLOSE}{tail}"


def main(arguments: list[str] | None = None) -> int:
    """Write the table into README.md; with ``--check``, only say whether it is up to date."""
    parser = argparse.ArgumentParser(prog="python -m torchgraft.report.readme", description=main.__doc__)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("path", nargs="?", type=Path, default=Path("README.md"))
    chosen = parser.parse_args(arguments)
    try:
        text = chosen.path.read_text(encoding="utf-8")
        wanted = with_table(text, readme_table(records().values()))
    except (OSError, BadInput) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if text == wanted:
        return 0
    if chosen.check:
        print(f"{chosen.path} is stale; run: python -m torchgraft.report.readme", file=sys.stderr)
        return 1
    write_atomic(chosen.path, wanted)
    return 0


if __name__ == "__main__":
    sys.exit(main())
