"""Commands that compare mixers and use what they learned: try, generate."""

from __future__ import annotations

import contextlib
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from torchgraft.cli.console import on_terminal, print_json, print_table, remark
from torchgraft.cli.methods import known_keys

if TYPE_CHECKING:
    from torchgraft.compare import Moment

__all__ = ["register"]

_STOPPED = 130


@contextlib.contextmanager
def _watching() -> Iterator[Callable[[Moment], None]]:
    """Yield what shows the progress: a bar on a terminal, one line a finished run elsewhere."""

    def line(moment: Moment) -> None:
        if moment.done is not None:
            remark(f"{moment.key}, seed {moment.seed}: score {moment.done.score:.4f} after {moment.done.steps} steps")

    if not on_terminal():
        yield line
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        job = bar.add_task("")

        def show(moment: Moment) -> None:
            text = f"{moment.key}, seed {moment.seed} ({moment.cell + 1} of {moment.cells})"
            bar.update(job, description=text, total=moment.steps, completed=moment.step)

        yield show


def try_methods(
    keys: Annotated[
        list[str],
        typer.Argument(
            metavar="KEY...", help="Mixers; the first is what others are held against.", autocompletion=known_keys
        ),
    ],
    task: Annotated[str, typer.Option(help="A built-in task on sequences, or a file with a task() function.")],
    seeds: Annotated[int, typer.Option(help="How many seeds, from 0 on.")] = 3,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps of every run; default 400.")] = None,
    time: Annotated[str | None, typer.Option(help="Time of every run instead, such as 30s.")] = None,
    d_model: Annotated[int, typer.Option(help="Width of the model.")] = 64,
    layers: Annotated[int, typer.Option(help="Blocks of the model.")] = 2,
    batch_size: Annotated[int | None, typer.Option(help="Samples a step; default: the task's own.")] = None,
    lr: Annotated[float | None, typer.Option(help="Highest learning rate; default: the task's own.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the outputs; by default runs/try-TASK.")] = None,
    save: Annotated[Path | None, typer.Option(help="Keep the model of each mixer in this folder too.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The comparison as JSON.")] = False,
) -> None:
    """Train the same model with each mixer on one task, and compare scores, speed and state.

    The same command after an interruption goes on where it was.

    Example: torchgraft try softmax-attention gated-linear-attention --task recall --steps 300
    """
    from torchgraft.compare import try_
    from torchgraft.report.comparison import comparison_rows, write_figure

    seconds = None
    if time is not None:
        from torchgraft.fit.budget import parse_duration

        seconds = parse_duration(time)
    folder = out or Path("runs") / f"try-{Path(task).stem}"
    try:
        with _watching() as show:
            found = try_(
                keys,
                task,
                seeds=seeds,
                steps=steps,
                seconds=seconds,
                d_model=d_model,
                layers=layers,
                batch_size=batch_size,
                lr=lr,
                out=folder,
                save=save,
                progress=show,
            )
    except KeyboardInterrupt:
        typed = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
        remark(f"stopped; finished runs are kept, and the same command goes on: {typed}")
        raise typer.Exit(_STOPPED) from None
    figure = write_figure(found, folder)[0]
    if as_json:
        print_json(found.model_dump(mode="json"))
        return
    print_table(*comparison_rows(found))
    if found.reference is not None:
        print(f"the task's own trained model is known to reach {found.reference:g}")
    print(f"every run: {folder / 'try.json'}; figure: {figure}")
    if save is not None:
        print(f"models: {', '.join(str(save / key) for key in keys)}")


def generate(
    folder: Annotated[Path, typer.Argument(help="A model that `torchgraft try ... --save DIR` kept: DIR/KEY.")],
    prompt: Annotated[str, typer.Option(help="The text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(help="How many bytes to add.")] = 200,
    temperature: Annotated[float, typer.Option(help="Divides the logits; 0 takes the likeliest byte.")] = 1.0,
    top_k: Annotated[int | None, typer.Option(help="Draw from this many likeliest bytes only.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw from the likeliest bytes up to this probability.")] = None,
    seed: Annotated[int | None, typer.Option(help="Makes the draws repeatable.")] = None,
) -> None:
    """Continue a text with a trained sequence model over bytes, as it is drawn.

    Example: torchgraft generate models/gated-linear-attention --prompt "def " --temperature 0.8
    """
    from torchgraft.parts.blocks.sequence_model import SequenceModel
    from torchgraft.parts.blocks.text import continue_text

    pieces = continue_text(
        SequenceModel.from_pretrained(folder),
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
    )
    print(prompt, end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()


def register(app: typer.Typer) -> None:
    """Add the commands of this module to ``app``."""
    app.command("try")(try_methods)
    app.command()(generate)
