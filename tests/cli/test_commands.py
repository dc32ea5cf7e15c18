"""What each command prints and with which exit code it leaves; everything in one process, nothing is trained."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import torchgraft
from torchgraft.catalogue.registry import records
from torchgraft.cli.app import run
from torchgraft.errors import BadInput

MY_TASK = """
import torch
from torchgraft import Task

def task():
    torch.manual_seed(0)
    x = torch.randn(48, 16)
    y = (x[:, 0] > 0).long()
    model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 2))
    split = (x, y)
    score = lambda out, target: (out.argmax(-1) == target).float()
    return Task(model, split, split, split, torch.nn.functional.cross_entropy, score, name="mine")
"""


@dataclass(frozen=True)
class Said:
    code: int
    out: str
    err: str


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    def _say(*arguments: str) -> Said:
        code = run(arguments)
        found = capsys.readouterr()
        return Said(code, found.out, found.err)

    return _say


@pytest.fixture
def task_file(tmp_path: Path) -> Path:
    path = tmp_path / "my_task.py"
    path.write_text(MY_TASK)
    return path


@pytest.fixture
def recipe(task_file: Path, tmp_path: Path) -> Path:
    """Return the recipe of a small model made narrower."""
    from torchgraft.bench.tasks import load_task
    from torchgraft.catalogue import load
    from torchgraft.engines.recipe import save

    task = load_task(str(task_file))
    model = load("magnitude-pruning")().apply(task.trained(), task, 0.7)
    return save(model, tmp_path / "run", task=str(task_file), procedures={"magnitude-pruning": 0.7}, validation=0.5)


def bad(said: Said, *words: str) -> None:
    """Require one line on standard error that starts with ``error:`` and holds ``words``, and exit code 2."""
    assert said.code == 2
    assert said.err.startswith("error: ")
    assert said.err.count("\n") == 1
    assert "Traceback" not in said.err
    for word in words:
        assert word in said.err


def test_no_argument_says_what_to_type_first(say: Callable[..., Said]) -> None:
    said = say()
    assert said.code == 0
    assert "torchgraft fit digits-vit --budget latency=0.5x" in said.out
    assert len(said.out.splitlines()) < 10


def test_version(say: Callable[..., Said]) -> None:
    assert say("--version").out == f"torchgraft {torchgraft.__version__}\n"


@pytest.mark.parametrize(
    "command", ["fit", "try", "generate", "apply", "measure", "list", "show", "check", "cite", "reproduce"]
)
def test_help_gives_an_example(say: Callable[..., Said], command: str) -> None:
    said = say(command, "--help")
    assert said.code == 0
    assert f"Example: torchgraft {command}" in said.out


def test_list_as_json_has_one_record_a_card(say: Callable[..., Said]) -> None:
    found = json.loads(say("list", "--json").out)
    assert [record["key"] for record in found] == list(records())
    assert all(set(record) == {"key", "seed_id", "family", "kind", "checks", "verdict"} for record in found)
    assert {record["key"]: record["seed_id"] for record in found}["optin-pruning"] == 48


@pytest.mark.parametrize(
    ("arguments", "holds", "lacks"),
    [
        (["--family", "shrink/prune"], "magnitude-pruning", "int8-dynamic"),
        (["--family", "shrink"], "int8-dynamic", "chain-of-layers"),
        (["--goal", "size"], "int8-dynamic", "distillation"),
        (["--goal", "accuracy"], "distillation", "int8-dynamic"),
        (["taylor"], "taylor-pruning", "int8-dynamic"),
        (["STRUCTURED", "magnitude"], "magnitude-pruning", "random-pruning"),
    ],
)
def test_list_can_be_narrowed(say: Callable[..., Said], arguments: Sequence[str], holds: str, lacks: str) -> None:
    keys = [line.split()[0] for line in say("list", *arguments).out.splitlines()]
    assert holds in keys
    assert lacks not in keys


def test_show_and_cite(say: Callable[..., Said]) -> None:
    shown = say("show", "optin-pruning").out
    assert "arxiv.org" in shown
    assert "from torchgraft.shrink.prune.optin_pruning import" in shown
    assert json.loads(say("show", "optin-pruning", "--json").out)["seed_id"] == 48
    cited = say("cite", "optin-pruning", "magnitude-pruning", "optin-pruning").out
    assert cited.count("@") == 2


def test_cite_what_a_model_uses(say: Callable[..., Said], recipe: Path) -> None:
    cited = say("cite", "--recipe", str(recipe)).out
    assert cited == say("cite", "magnitude-pruning").out


def test_check_prints_a_line_a_check(say: Callable[..., Said], monkeypatch: pytest.MonkeyPatch) -> None:
    from torchgraft import contracts
    from torchgraft.contracts import CheckResult

    results = [CheckResult("a", "passed", "", 0.1), CheckResult("b", "failed", "2 is not\n3", 0.1)]

    def fake(card: Any, *, on_result: Callable[[CheckResult], None] | None = None) -> list[CheckResult]:
        for result in results:
            if on_result is not None:
                on_result(result)
        return results

    monkeypatch.setattr(contracts, "run_checks", fake)
    said = say("check", "optin-pruning")
    assert said.code == 1
    assert said.out.splitlines() == [
        "passed           a (0.10 s)",
        "failed           b (0.10 s): 2 is not 3",
        "optin-pruning: 1 of 2 checks as promised",
    ]
    assert [record["outcome"] for record in json.loads(say("check", "optin-pruning", "--json").out)] == [
        "passed",
        "failed",
    ]
    results.pop()
    assert say("check", "optin-pruning").code == 0


def test_check_runs_the_contract(say: Callable[..., Said]) -> None:
    said = say("check", "distillation")
    assert said.code == 0, said.out
    assert len(said.out.splitlines()) == records()["distillation"].checks + 1


@pytest.mark.parametrize("held", [True, False])
def test_reproduce(say: Callable[..., Said], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, held: bool) -> None:
    from torchgraft.claims.record import judge

    def experiment(seeds: Sequence[int]) -> Any:
        parts = {"drop is small": held}
        return judge("optin-pruning", "x", metrics={}, effects={"drop": 0.1}, parts=parts, seeds=seeds, seconds=1.0)

    name = "torchgraft.claims.shrink_prune.optin_pruning"
    monkeypatch.setitem(sys.modules, name, SimpleNamespace(run=experiment))
    monkeypatch.chdir(tmp_path)
    said = say("reproduce", "optin-pruning", "--seeds", "3,4", "--save")
    assert said.code == 0, "a claim that does not hold is a result, and no failure of the program"
    kept = json.loads((tmp_path / "results" / "claims" / "optin-pruning.json").read_text())
    assert kept["seeds"] == [3, 4]
    assert kept["verdict"] == ("reproduced" if held else "not reproduced")


def test_apply_rebuilds_and_writes(say: Callable[..., Said], recipe: Path, task_file: Path, tmp_path: Path) -> None:
    arguments = ["apply", str(recipe), "--task", str(task_file), "--cost", "params,macs"]
    said = say(*arguments, "--out", str(tmp_path / "copy"))
    assert said.code == 0, said.err
    assert "weights verified" in said.out
    assert "the recipe says 0.5000" in said.out
    assert (tmp_path / "copy" / "model.safetensors").read_bytes() == (recipe.parent / "model.safetensors").read_bytes()


def test_measure_one_model(say: Callable[..., Said], task_file: Path) -> None:
    found = json.loads(say("measure", str(task_file), "--costs", "params,macs", "--json").out)
    assert found["costs"]["params"]["value"] == 16 * 32 + 32 + 32 * 2 + 2
    assert 0 <= found["validation"]["value"] <= 1


def test_measure_side_by_side(say: Callable[..., Said], task_file: Path, recipe: Path) -> None:
    arguments = ["measure", str(task_file), "--against", str(recipe), "--rounds", "3"]
    found = json.loads(say(*arguments, "--json").out)
    assert set(found["ratios"]) == {"latency", "macs", "params", "memory", "size"}
    ratio = found["ratios"]["params"]
    assert ratio["low"] == ratio["value"] == ratio["high"] < 1
    assert set(found["test"]) == {"original", "changed", "drop"}
    told = say(*arguments, "--cost", "params")
    assert told.code == 0
    assert "test score, changed" in told.out


def test_measure_a_recipe_against_itself_is_a_tie(say: Callable[..., Said], task_file: Path, recipe: Path) -> None:
    said = say("measure", str(recipe), "--against", str(recipe), "--task", str(task_file), "--cost", "params", "--json")
    found = json.loads(said.out)
    assert found["ratios"]["params"]["verdict"] == "tie"
    assert found["test"]["drop"]["value"] == 0.0


def _fit(monkeypatch: pytest.MonkeyPatch, outcome: Any) -> dict[str, Any]:
    given: dict[str, Any] = {}

    def fake(task: str, **options: Any) -> Any:
        given.update(task=task, **options)
        options["progress"](SimpleNamespace(phase="search", message="trial 1", share=0.5, trials=()))
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    monkeypatch.setattr(torchgraft, "fit", fake, raising=False)
    monkeypatch.setattr("torchgraft.cli.fitting._print_front", lambda result: print("the front"))
    return given


def _result(*, feasible: bool) -> Any:
    best = SimpleNamespace(name="trial-3") if feasible else None
    share = SimpleNamespace(key="svd-truncation", models=2, lost_without=0.25)
    record = SimpleNamespace(notes=["exported"], contributions=[share])
    return SimpleNamespace(
        record=record, folder=Path("runs/x"), feasible=feasible, best=best, nearest="trial-1: 0.6x of 0.5x"
    )


def test_fit_passes_everything_on(say: Callable[..., Said], monkeypatch: pytest.MonkeyPatch) -> None:
    given = _fit(monkeypatch, _result(feasible=True))
    said = say(
        *("fit", "digits-vit", "-b", "latency=0.5x,size=1MB", "--budget", "macs=0.4x", "--time", "5m", "--seed", "3"),
        *("--trials", "4", "--no-training", "--ignore", "head", "--ignore", "a.*,b", "--study", "s.log"),
        *("--cost", "params", "--out", "o", "--export", "onnx", "--procedures", "int8-dynamic"),
        *("--max-drop", "0.02", "--data", "d.jsonl", "--elastic"),
    )
    assert said.code == 0, said.err
    given.pop("progress")
    assert given == {
        "task": "digits-vit",
        "budget": ["latency=0.5x", "size=1MB", "macs=0.4x"],
        "time": "5m",
        "seed": 3,
        "trials": 4,
        "training": False,
        "ignore": ["head", "a.*", "b"],
        "study": "s.log",
        "costs": ["params"],
        "out": Path("o"),
        "export": "onnx",
        "procedures": ["int8-dynamic"],
        "max_drop": 0.02,
        "data": Path("d.jsonl"),
        "elastic": True,
    }
    assert "search: trial 1" in said.out
    assert "svd-truncation" in said.out
    assert "25.0%" in said.out
    assert "best: trial-3" in said.out


def test_fit_leaves_unset_options_to_the_library(say: Callable[..., Said], monkeypatch: pytest.MonkeyPatch) -> None:
    given = _fit(monkeypatch, _result(feasible=True))
    assert say("fit", "digits-vit").code == 0
    assert given["time"] is given["trials"] is given["costs"] is given["procedures"] is given["out"] is None
    assert given["training"] is True
    assert given["elastic"] is False


def test_fit_that_is_infeasible(say: Callable[..., Said], monkeypatch: pytest.MonkeyPatch) -> None:
    _fit(monkeypatch, _result(feasible=False))
    said = say("fit", "digits-vit")
    assert said.code == 3
    assert said.out.splitlines()[-1] == "infeasible; the nearest is trial-1: 0.6x of 0.5x"


def test_fit_that_is_stopped(say: Callable[..., Said], monkeypatch: pytest.MonkeyPatch) -> None:
    _fit(monkeypatch, KeyboardInterrupt())
    said = say("fit", "digits-vit")
    assert said.code == 130
    assert "the same command goes on" in said.err


def test_defect_keeps_its_traceback(say: Callable[..., Said], monkeypatch: pytest.MonkeyPatch) -> None:
    _fit(monkeypatch, ZeroDivisionError("oh"))
    with pytest.raises(ZeroDivisionError):
        say("fit", "digits-vit")


def test_bad_input_of_several_lines_is_said_in_one(say: Callable[..., Said], monkeypatch: pytest.MonkeyPatch) -> None:
    _fit(monkeypatch, BadInput("first\n  second"))
    assert say("fit", "digits-vit").err == "error: first second\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["fti"], ["fti"]),
        (["list", "--familly", "x"], ["--familly"]),
        (["list", "--family", "shrnk"], ["did you mean 'shrink'"]),
        (["list", "--goal", "latncy"], ["did you mean 'latency'"]),
        (["show", "optin-prunin"], ["did you mean 'optin-pruning'"]),
        (["show"], ["KEY"]),
        (["check", "nothing"], ["unknown method 'nothing'"]),
        (["cite"], ["--recipe"]),
        (["cite", "nothing"], ["unknown method 'nothing'"]),
        (["cite", "--recipe", "no/such.yaml"], ["no/such.yaml"]),
        (["reproduce", "magnitude-pruning"], ["claims nothing"]),
        (["reproduce", "optin-pruning", "--seeds", "a,b"], ["'a,b'"]),
        (["reproduce", "optin-pruning", "--seeds", "1,1"], ["'1,1'"]),
        (["fit", "digits-vti"], ["did you mean 'digits-vit'"]),
        (["fit", "digits-vit", "--budget", "latncy=0.5x"], ["did you mean 'latency'"]),
        (["fit", "digits-vit", "--budget", "size=1XB"], ["XB"]),
        (["fit", "digits-vit", "--budget", "latency"], ["latency=0.5x"]),
        (["fit", "digits-vit", "--seed", "one"], ["--seed", "integer"]),
        (["fit", "digits-vit", "--time", "soon"], ["soon"]),
        (["fit", "digits-vit", "--export", "tflite"], ["tflite"]),
        (["fit", "digits-vit", "--cost", "beauty"], ["beauty"]),
        (["measure", "digits-vit", "--cost", "beauty"], ["beauty"]),
        (["measure", "no-such-task"], ["no-such-task"]),
        (["measure", "no_such_file.py"], ["no_such_file.py"]),
        (["apply", "no_such.yaml"], ["no_such.yaml"]),
    ],
    ids=" ".join,
)
def test_bad_arguments(say: Callable[..., Said], arguments: Sequence[str], words: Sequence[str]) -> None:
    bad(say(*arguments), *words)


@pytest.mark.parametrize(
    ("name", "code", "word"),
    [
        ("raises", "raise RuntimeError('my fault')", "my fault"),
        ("raises inside", "def task():\n    raise RuntimeError('my fault')", "my fault"),
        ("lacks a function", "x = 1", "task()"),
        ("wrong type", "def task():\n    return 3", "int"),
        ("syntax", "def task(:", "syntax"),
        ("nan", MY_TASK.replace("    y =", "    x[3, 3] = float('nan')\n    y ="), "NaN"),
        ("empty split", MY_TASK.replace("split = (x, y)", "split = (x[:0], y[:0])"), "empty"),
        (
            "no score",
            MY_TASK.replace("score = lambda out, target: (out.argmax(-1) == target).float()", "score = 1"),
            "score",
        ),
    ],
)
def test_bad_task_file(say: Callable[..., Said], tmp_path: Path, name: str, code: str, word: str) -> None:
    path = tmp_path / "my_task.py"
    path.write_text(code)
    bad(say("measure", str(path), "--cost", "params"), word)
    bad(say("fit", str(path), "--out", str(tmp_path / "out")), word)


@pytest.mark.parametrize(
    ("content", "word"),
    [(b"\x80\x04\x95malice.", "pickle"), (b"PK\x03\x04zip", "pickle"), (b"garbage", "damaged"), (b"", "damaged")],
)
@pytest.mark.parametrize("command", ["apply", "measure"])
def test_damaged_or_pickled_weights(
    say: Callable[..., Said], recipe: Path, task_file: Path, content: bytes, word: str, command: str
) -> None:
    (recipe.parent / "model.safetensors").write_bytes(content)
    bad(say(command, str(recipe), "--task", str(task_file)), word)


def test_weights_of_another_model(say: Callable[..., Said], recipe: Path, task_file: Path) -> None:
    path = recipe.parent / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    bad(say("apply", str(recipe), "--task", str(task_file)), "checksum")


@pytest.mark.parametrize(
    "content", ["", "- 1", "a: [", "!!python/object/apply:os.system ['echo hacked']", "colour: red"]
)
def test_damaged_recipe(say: Callable[..., Said], tmp_path: Path, content: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(content)
    said = say("apply", str(path))
    bad(said)
    assert "hacked" not in said.out


def test_task_file_of_a_recipe_is_not_run_unless_named(say: Callable[..., Said], recipe: Path) -> None:
    bad(say("apply", str(recipe)), "--task")


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(words=st.lists(st.text(max_size=12).filter(lambda word: not word.startswith("--help")), max_size=4))
@pytest.mark.parametrize("command", ["list", "show", "cite", "check", "reproduce"])
def test_any_arguments_end_well(say: Callable[..., Said], command: str, words: list[str]) -> None:
    said = say(command, *words)
    assert said.code in (0, 2)
    if said.code == 2:
        bad(said)


def _seconds(*arguments: str) -> float:
    """Return the processor time of the program, which is the wall-clock time of a machine that does nothing else."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "torchgraft.cli", *arguments], check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def test_list_answers_at_once() -> None:
    assert min(_seconds("list") for _ in range(3)) < 0.5


def test_list_imports_no_torch() -> None:
    code = "import sys; from torchgraft.cli.app import run; run(['list']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, capture_output=True).returncode == 0


def test_program_leaves_with_the_code() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "torchgraft.cli", "show", "nothing"], check=False, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: unknown method 'nothing'")
    assert "Traceback" not in done.stderr
