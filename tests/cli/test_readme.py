"""What the README tells a newcomer to type works as it stands there."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

README = Path(__file__).parents[2] / "README.md"


def _run(folder: Path, words: list[str]) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "torchgraft.cli", *words], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


def test_the_readme_is_short_and_its_code_comes_early() -> None:
    lines = README.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 100
    assert next(i for i, line in enumerate(lines) if line.startswith("```")) < 40


def test_the_task_of_the_readme_is_fitted_measured_and_rebuilt_as_it_says(tmp_path: Path) -> None:
    text = README.read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(# my_task\.py\n.*?)```", text, re.DOTALL)
    (tmp_path / "my_task.py").write_text(code)
    commands = re.findall(r"^\$ torchgraft (.*my_task.*)$", text, re.MULTILINE)
    assert [command.split()[0] for command in commands] == ["fit", "measure", "apply", "fit"]
    fit, measure, apply, elastic = (command.split("#")[0].split() for command in commands)
    # Machines that run tests are busy, the reader's is not: an exact cost stands in for latency, trials for time.
    fit = [word.replace("latency=0.5x", "macs=0.5x") for word in fit]
    fit[fit.index("--time") : fit.index("--time") + 2] = ["--cost", "macs", "--trials", "2"]
    _run(tmp_path, [*fit, "--procedures", "taylor-pruning"])
    front = json.loads((tmp_path / "runs" / "my_task" / "front.json").read_text())
    (best,) = [candidate for candidate in front if candidate["best"]]
    assert best["costs"]["macs"]["ratio"] <= 0.5
    assert best["costs"]["size"]["ratio"] <= 0.6
    measured = json.loads(_run(tmp_path, [*measure, "--json", "--costs", "macs"]))
    assert measured["ratios"]["macs"]["value"] == best["costs"]["macs"]["ratio"]
    _run(tmp_path, apply)
    _run(tmp_path, [*elastic, "--cost", "macs", "--procedures", "sortednet", "--max-drop", "0.05"])
    levels = json.loads((tmp_path / "runs" / "elastic" / "front.json").read_text())
    assert levels[-1]["costs"]["macs"]["ratio"] == 1.0
    assert len(levels) >= 3
