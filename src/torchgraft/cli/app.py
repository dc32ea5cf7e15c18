"""The program ``torchgraft``: its commands, and what becomes of errors.

Exit codes: 0 done, 1 a check failed or the program has a defect, 2 bad input, 3 the budget cannot be met, 130 stopped.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

import torchgraft
from torchgraft.cli import evidence, fitting, methods, trying
from torchgraft.cli.console import remark
from torchgraft.errors import BadInput

__all__ = ["app", "main", "run"]

_FIRST = """\
torchgraft fits published methods onto your PyTorch model and measures what each one buys.

  torchgraft fit digits-vit --budget latency=0.5x    make a built-in model twice as fast
  torchgraft fit my_task.py --budget size=1MB        the same for your own model
  torchgraft list                                    the methods, and what became of their claims
  torchgraft COMMAND --help                          what a command takes
"""

app = typer.Typer(
    name="torchgraft",
    help="Fit published methods onto your PyTorch model, and measure what each one buys.",
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _module in (fitting, trying, methods, evidence):
    _module.register(app)

# click's base of every usage error; typer carries click inside since 0.29, so that it has no public name.
_UsageError: type[Exception] = typer.BadParameter.__mro__[2]


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"torchgraft {torchgraft.__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def first(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and stop.")
    ] = False,
    verbose: Annotated[int, typer.Option("--verbose", "-v", count=True, help="Say more; twice, still more.")] = 0,
) -> None:
    """Fit published methods onto your PyTorch model, and measure what each one buys."""
    logger = logging.getLogger("torchgraft")
    logger.setLevel((logging.WARNING, logging.INFO, logging.DEBUG)[min(verbose, 2)])
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
        logger.addHandler(handler)
    if context.invoked_subcommand is None:
        print(_FIRST, end="")


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the program on ``arguments`` (by default those of the process) and return its exit code."""
    try:
        code = app(args=None if arguments is None else list(arguments), standalone_mode=False)
    except BadInput as error:
        remark(f"error: {error}")
        return 2
    except _UsageError as error:
        message = error.format_message() if hasattr(error, "format_message") else str(error)
        remark(f"error: {message.rstrip('.')} (see torchgraft --help)")
        return 2
    except (typer.Abort, KeyboardInterrupt):
        remark("stopped")
        return 130
    except Exception:
        remark("torchgraft has a defect; please report it with the lines below and the command that you typed")
        raise
    return code if isinstance(code, int) else 0


def main() -> None:
    """Run the program and leave with its exit code."""
    sys.exit(run())
