"""Whole runs of fit on exact costs: what is written, what repeats, what is refused."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import torchgraft
from torchgraft.bench.files import read_tensors
from torchgraft.bench.task import Split, Task, call
from torchgraft.bench.tasks import load_task
from torchgraft.errors import BadInput
from torchgraft.fit import FitResult

PROCEDURES = ("magnitude-pruning", "svd-truncation", "int8-dynamic")
TRIALS = 6


def _fit(task: str | Path | Task, out: Path, **options: Any) -> FitResult:
    settings: dict[str, Any] = {
        "budget": "macs=0.5x",
        "costs": ["macs", "params"],
        "trials": TRIALS,
        "procedures": PROCEDURES,
        "max_drop": 0.1,
    }
    return torchgraft.fit(str(task) if isinstance(task, Path) else task, out=out, **{**settings, **options})


@pytest.fixture(scope="module")
def finished(task_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, FitResult]:
    """One finished run and its task file."""
    return task_file, _fit(task_file, tmp_path_factory.mktemp("finished") / "run")


def test_the_budget_is_met_and_the_original_stands_first(finished: tuple[Path, FitResult]) -> None:
    _, result = finished
    front = json.loads((result.folder / "front.json").read_text())
    assert front[0]["name"] == "original"
    assert front[0]["costs"]["macs"]["ratio"] == 1.0
    assert result.feasible
    assert result.best is not None
    assert result.best.costs["macs"].ratio <= 0.5
    assert result.best.drop.value <= 0.1
    assert {"report.html", "front.png", "front.svg", "run.json", "recipe.yaml", "model.safetensors"} <= {
        path.name for path in result.folder.iterdir()
    }


def test_only_chosen_models_have_a_test_score(finished: tuple[Path, FitResult]) -> None:
    _, result = finished
    for candidate in result.front:
        assert (candidate.test is not None) == candidate.chosen
    assert result.front[0].test is not None
    assert result.best is not None
    assert result.best.test is not None


def test_another_process_rebuilds_the_model_bit_for_bit(finished: tuple[Path, FitResult]) -> None:
    source, result = finished
    code = (
        "import sys, torch, torchgraft\n"
        "from torchgraft.bench.files import write_tensors\n"
        "torch.set_num_threads(1)\n"
        "task = torchgraft.load_task(sys.argv[1])\n"
        "model = torchgraft.apply(sys.argv[2], task=task)\n"
        "with torch.inference_mode(): write_tensors(sys.argv[3], {'y': model(task.val.inputs)})\n"
    )
    written = result.folder.parent / "y.safetensors"
    subprocess.run(
        [sys.executable, "-c", code, str(source), str(result.folder / "recipe.yaml"), str(written)], check=True
    )
    assert result.model is not None
    inputs = load_task(str(source)).val.inputs
    with torch.inference_mode():
        expected = call(result.model, inputs)
    assert torch.equal(read_tensors(written)[0]["y"], expected)


def test_the_same_command_repeats_itself(finished: tuple[Path, FitResult], tmp_path: Path) -> None:
    source, result = finished
    again = _fit(source, tmp_path / "again")
    assert (again.folder / "front.json").read_text() == (result.folder / "front.json").read_text()
    weights = (result.folder / "model.safetensors").read_bytes()
    assert (again.folder / "model.safetensors").read_bytes() == weights
    other = _fit(source, tmp_path / "other", seed=1)
    assert (other.folder / "model.safetensors").read_bytes() != weights


def test_a_finished_run_is_taken_up_and_not_repeated(finished: tuple[Path, FitResult], tmp_path: Path) -> None:
    source, result = finished
    shutil.copytree(result.folder, tmp_path / "copy")
    messages: list[str] = []
    again = _fit(source, tmp_path / "copy", progress=lambda p: messages.append(p.message))
    assert not [message for message in messages if message.startswith("trial")]
    assert (again.folder / "front.json").read_text() == (result.folder / "front.json").read_text()


def test_other_settings_in_the_same_folder_are_refused(finished: tuple[Path, FitResult]) -> None:
    source, result = finished
    with pytest.raises(BadInput, match=r"other settings \(budget"):
        _fit(source, result.folder, budget="macs=0.4x")


_CHILD = f"""
import sys, torch, torchgraft
torch.set_num_threads(1)
torchgraft.fit(sys.argv[1], budget="macs=0.5x", costs=["macs", "params"], trials=int(sys.argv[3]), max_drop=0.1,
    procedures={PROCEDURES!r}, out=sys.argv[2], study=sys.argv[4] if len(sys.argv) > 4 else None,
    progress=lambda p: print(p.phase, p.message, flush=True))
"""


def _start(source: Path, out: Path, *study: Path, trials: int = TRIALS) -> subprocess.Popen[str]:
    words = [sys.executable, "-c", _CHILD, str(source), str(out), str(trials), *map(str, study)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.parametrize("moment", ["trial 0", "trial 2", "trial 4", "recovering", "measuring"])
def test_kill_at_any_moment_then_the_same_command(
    finished: tuple[Path, FitResult], tmp_path: Path, moment: str
) -> None:
    source, result = finished
    child = _start(source, tmp_path / "run")
    assert child.stdout is not None
    for line in child.stdout:
        if moment in line:
            time.sleep(0.05)
            break
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    child.stdout.close()
    again = _fit(source, tmp_path / "run")
    assert (again.folder / "front.json").read_text() == (result.folder / "front.json").read_text()


@pytest.mark.parametrize("folders", [("a", "b"), ("run", "run")], ids=["own folders", "one folder"])
def test_two_processes_share_one_study(
    finished: tuple[Path, FitResult], tmp_path: Path, folders: tuple[str, str]
) -> None:
    source, _ = finished
    study = [tmp_path / "shared.journal"] if folders[0] != folders[1] else []  # else the default journal of the folder
    trials = 16  # enough that the slower process to start finds some left
    children = [_start(source, tmp_path / name, *study, trials=trials) for name in folders]
    outputs = [child.communicate(timeout=200)[0] for child in children]
    assert [child.returncode for child in children] == [0, 0], outputs
    ran = [{line.split(":")[0] for line in output.splitlines() if "search trial" in line} for output in outputs]
    assert ran[0]
    assert ran[1]
    assert len(ran[0] | ran[1]) == trials
    for name in folders:
        record = json.loads((tmp_path / name / "run.json").read_text())
        assert [trial["number"] for trial in record["trials"]] == list(range(trials))
        assert record["feasible"]
        torchgraft.apply(tmp_path / name / "recipe.yaml", task=load_task(str(source)))


def test_an_impossible_budget_names_the_nearest(task_file: Path, tmp_path: Path) -> None:
    result = _fit(task_file, tmp_path / "run", budget="macs=0.001x", trials=2)
    assert not result.feasible
    assert result.best is None
    assert result.model is None
    assert "trial" in result.nearest
    assert "over the budget in macs" in result.nearest
    assert not (tmp_path / "run" / "model.safetensors").exists()
    assert (tmp_path / "run" / "report.html").exists()


def test_several_budgets_hold_together(task_file: Path, tmp_path: Path) -> None:
    result = _fit(
        task_file,
        tmp_path / "run",
        budget={"macs": "0.6x", "params": "70%", "size": "5kB"},
        costs=["macs", "params", "size"],
        procedures=PROCEDURES,
        max_drop=0.3,
    )
    assert result.best is not None
    costs = result.best.costs
    assert costs["macs"].ratio <= 0.6
    assert costs["params"].ratio <= 0.7
    assert costs["size"].value <= 5000


def test_no_training_leaves_the_weights_untrained(task_file: Path, tmp_path: Path) -> None:
    result = _fit(task_file, tmp_path / "run", training=False, trials=2, max_drop=None)
    assert {candidate.recovery_steps for candidate in result.front} == {0}
    assert result.model is not None
    original = load_task(str(task_file)).trained()
    kept = {value for tensor in original.state_dict().values() for value in tensor.flatten().tolist()}
    weights = result.model.state_dict()
    if any("pruning" in applied.key for applied in (result.best.procedures if result.best else [])):
        assert all(value in kept for tensor in weights.values() for value in tensor.flatten().tolist())


def test_ignored_modules_stay(task_file: Path, tmp_path: Path) -> None:
    result = _fit(task_file, tmp_path / "run", budget="macs=0.8x", ignore=["0"], trials=2, max_drop=None)
    assert result.model is not None
    assert result.model.get_submodule("0").weight.shape == (32, 12)  # type: ignore[union-attr]


def test_the_test_split_is_read_only_at_the_end(task_file: Path, tmp_path: Path) -> None:
    task = load_task(str(task_file))
    reads: list[str] = []

    class Watched(Split):
        def batches(self, *arguments: Any, **options: Any) -> Any:
            reads.append("test")
            return super().batches(*arguments, **options)

    task.test = Watched(task.test.inputs, task.test.target)
    phases: list[tuple[str, int]] = []
    result = _fit(task, tmp_path / "run", trials=2, progress=lambda p: phases.append((p.phase, len(reads))))
    assert all(count == 0 for phase, count in phases if phase != "done")
    assert len(reads) == sum(candidate.chosen for candidate in result.front)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"budget": "latncy=0.5x"}, "did you mean 'latency'"),
        ({"costs": ["mac"]}, "did you mean 'macs'"),
        ({"procedures": ["magnitude-prunin"]}, "did you mean 'magnitude-pruning'"),
        ({"procedures": ["distillation"]}, "no place in fit"),
        ({"max_drop": -1.0}, "max_drop"),
        ({"trials": 0}, "trials"),
        ({"export": "tflite"}, "export"),
        ({"time": "5 weeks"}, "duration"),
        ({"study": "mysterydb://x"}, "study"),
    ],
)
def test_bad_arguments(task_file: Path, tmp_path: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(BadInput, match=words):
        _fit(task_file, tmp_path / "run", **options)


def _command(*arguments: Path | str) -> list[str]:
    words = [sys.executable, "-m", "torchgraft.cli", "fit", *map(str, arguments)]
    words += ["--budget", "macs=0.5x", "--cost", "macs", "--cost", "params", "--max-drop", "0.1"]
    return [*words, "--trials", str(TRIALS), "--procedures", ",".join(PROCEDURES)]


@pytest.mark.parametrize("room", [9_000, 30_000])
def test_a_full_disk_is_one_line_and_loses_nothing(finished: tuple[Path, FitResult], tmp_path: Path, room: int) -> None:
    source, result = finished

    def small_disk() -> None:  # no file may grow beyond this; the writer is told so as it is on a full disk
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))

    full = subprocess.run(
        _command(source, "--out", tmp_path / "run"), capture_output=True, text=True, preexec_fn=small_disk, check=False
    )
    assert full.returncode == 2, full.stderr
    errors = [line for line in full.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert "disk is full" in errors[0]
    assert "Traceback" not in full.stderr
    messages: list[str] = []
    again = _fit(source, tmp_path / "run", progress=lambda p: messages.append(p.message))
    if room == 30_000:  # enough for some trials, not for the report
        assert len([message for message in messages if message.startswith("trial")]) < TRIALS
    assert (again.folder / "front.json").read_text() == (result.folder / "front.json").read_text()


_UNTRACEABLE = """

class Moody(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(12, 64), nn.ReLU(), nn.Linear(64, 3))

    def forward(self, x):
        if float(x.mean()) > 1e9:  # a branch on the data
            x = -x
        return self.layers(x)


plain = task


def task():
    made = plain()
    return Task(model=Moody(), train=made.train, val=made.val, test=made.test, loss=made.loss, score=made.score)
"""


def test_a_model_that_cannot_be_traced_is_named_and_still_fits(task_file: Path, tmp_path: Path) -> None:
    source = tmp_path / "moody.py"
    source.write_text(task_file.read_text() + _UNTRACEABLE)
    line = 1 + source.read_text().splitlines().index("        if float(x.mean()) > 1e9:  # a branch on the data")
    result = _fit(source, tmp_path / "run", budget="size=0.8x", costs=["size"], procedures=None, trials=3, max_drop=1.0)
    assert result.best is not None
    assert result.best.costs["size"].ratio <= 0.8
    refused = {each.procedure: each for each in result.record.refused}
    assert f"moody.py:{line}" in str(refused["taylor-pruning"].line)
    assert "taylor-pruning" not in {applied.key for c in result.front for applied in c.procedures}


@pytest.mark.parametrize(("form", "name"), [("onnx", "model.onnx"), ("torch", "model.pt2")])
def test_the_best_model_is_exported_and_compared(task_file: Path, tmp_path: Path, form: str, name: str) -> None:
    result = _fit(task_file, tmp_path / "run", trials=2, training=False, max_drop=None, export=form)
    assert (tmp_path / "run" / name).stat().st_size > 1000
    (note,) = [note for note in result.record.notes if name in note]
    assert float(note.rpartition("largest difference ")[2].split()[0]) < 1e-5
    if form == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(str(tmp_path / "run" / name), providers=["CPUExecutionProvider"])
        task = load_task(str(task_file))
        assert isinstance(task.example, torch.Tensor)
        (found,) = session.run(None, {session.get_inputs()[0].name: task.example.numpy()})
        assert result.model is not None
        with torch.inference_mode():
            expected = result.model(task.example)
        torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-5)
