"""Commands that make a method show that it works: check, reproduce."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from torchgraft.catalogue import Card, lookup
from torchgraft.cli.console import print_json, remark
from torchgraft.cli.methods import Key
from torchgraft.errors import BadInput

if TYPE_CHECKING:
    from torchgraft.contracts import CheckResult

__all__ = ["register"]


def check(
    key: Key, as_json: Annotated[bool, typer.Option("--json", help="One record a check, as JSON.")] = False
) -> None:
    """Run the contract checks of a method, one line each; exit code 1 where one does not hold.

    Example: torchgraft check magnitude-pruning
    """
    card = lookup(key)
    import torch

    from torchgraft.contracts import run_checks

    torch.set_num_threads(1)  # the check models are so small that a second thread only costs time

    def say(result: CheckResult) -> None:
        reason = f": {' '.join(result.reason.split())}" if result.reason else ""
        print(f"{result.outcome:<16} {result.check} ({result.seconds:.2f} s){reason}", flush=True)

    results = run_checks(card, on_result=None if as_json else say)
    bad = sum(not result.good for result in results)
    if as_json:
        print_json([vars(result) for result in results])
    else:
        print(f"{card.key}: {len(results) - bad} of {len(results)} checks as promised")
    if bad:
        raise typer.Exit(1)


def _seeds(text: str) -> tuple[int, ...]:
    try:
        seeds = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise BadInput(f"--seeds takes numbers with commas between, such as 0,1,2, got {text!r}") from None
    if min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise BadInput(f"--seeds takes different numbers of at least 0, got {text!r}")
    return seeds


def _claim(card: Card) -> Any:
    if card.claim is None:
        raise BadInput(f"{card.key} is a baseline and claims nothing")
    return importlib.import_module(f"torchgraft.claims.{card.family.replace('/', '_')}.{card.key.replace('-', '_')}")


def reproduce(
    key: Key,
    seeds: Annotated[str, typer.Option(help="Seeds, with commas between.")] = "0,1,2",
    save: Annotated[bool, typer.Option("--save", help="Keep the record in results/claims/KEY.json.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The record as JSON.")] = False,
) -> None:
    """Run the experiment behind a method's claim and print the verdict; exit code 0 whatever the verdict is.

    Example: torchgraft reproduce optin --seeds 0,1,2
    """
    card = lookup(key)
    chosen = _seeds(seeds)
    module = _claim(card)
    record = module.run(seeds=chosen)
    if save:
        from torchgraft.bench.files import write_atomic

        path = Path("results/claims") / f"{key}.json"
        write_atomic(path, record.model_dump_json(indent=1) + "\n")
        remark(f"kept in {path}; `python -m torchgraft.contracts.index` brings the verdict into the catalogue")
    if as_json:
        print_json(record.model_dump(mode="json"))
    else:
        print(f"{card.key}: {record.verdict}")
        print(f"  to reach  {record.figure}")
        for name, held in record.parts.items():
            print(f"  {'held' if held else 'missed':<9} {name}")
        for name, value in record.effects.items():
            print(f"  {value:<9.4g} {name}")
        for name, values in record.metrics.items():
            print(f"  by seed   {name}: {', '.join(f'{value:.4g}' for value in values)}")
        if record.notes:
            print(f"  note      {record.notes}")
        print(f"  took      {record.seconds:.1f} s for seeds {', '.join(map(str, record.seeds))}")


def register(app: typer.Typer) -> None:
    """Add the commands of this module to ``app``."""
    app.command()(check)
    app.command()(reproduce)
