"""The commands try and generate: what they print, write and refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from torchgraft import compare
from torchgraft.cli.app import run
from torchgraft.parts.blocks.sequence_model import SequenceModel

KEYS = ("softmax-attention", "gated-linear-attention")
SMALL = ("--steps", "2", "--d-model", "8", "--layers", "1", "--batch-size", "4")


def test_try_prints_a_table_and_writes_all(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["try", *KEYS, "--task", "recall", "--seeds", "2", *SMALL, "--save", "models"]) == 0
    said = capsys.readouterr()
    lines = said.out.splitlines()
    assert lines[0].split()[:3] == ["mixer", "score", "spread"]
    assert [line.split()[0] for line in lines[1:3]] == list(KEYS)
    assert "grows" in lines[1]
    assert "grows" not in lines[2]
    assert len(said.err.splitlines()) == 4
    folder = tmp_path / "runs" / "try-recall"
    assert sorted(path.name for path in folder.iterdir()) == ["try.json", "try.png", "try.svg"]
    for key in KEYS:
        assert SequenceModel.from_pretrained(tmp_path / "models" / key).vocab_size == 64
    assert run(["try", *KEYS, "--task", "recall", "--seeds", "2", *SMALL, "--json"]) == 0
    said = capsys.readouterr()
    assert said.err == "", "finished runs are made again"
    assert json.loads(said.out) == json.loads((folder / "try.json").read_text())


def test_try_says_how_to_go_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def stopped(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(compare, "try_", stopped)
    assert run(["try", KEYS[0], "--task", "recall", "--out", str(tmp_path)]) == 130
    assert "the same command goes on" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nothing", "--task", "recall"], "unknown method 'nothing'"),
        (["magnitude-pruning", "--task", "recall"], "sequence mixer"),
        ([KEYS[0], "--task", "recal"], "did you mean 'recall'"),
        ([KEYS[0], "--task", "wine"], "not on sequences"),
        ([KEYS[0]], "--task"),
        ([KEYS[0], "--task", "recall", "--time", "soon"], "soon"),
        ([KEYS[0], "--task", "recall", "--time", "5s", "--steps", "3"], "not both"),
        ([KEYS[0], "--task", "recall", "--seeds", "0"], "seeds"),
    ],
)
def test_try_refuses(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    arguments: list[str],
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["try", *arguments]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: ")
    assert said.err.count("\n") == 1
    assert words in said.err


@pytest.fixture
def model(tmp_path: Path) -> Path:
    SequenceModel(8, 1, "softmax-attention").save_pretrained(tmp_path / "m")
    return tmp_path / "m"


def test_generate_types_what_is_drawn(capsys: pytest.CaptureFixture[str], model: Path) -> None:
    command = ["generate", str(model), "--prompt", "def ", "--max-new-tokens", "5", "--seed", "1", "--top-k", "3"]
    assert run(command) == 0
    one = capsys.readouterr().out
    assert one.startswith("def ")
    assert 5 < len(one) <= 4 + 5 + 1
    assert run([*command, "--temperature", "0.9", "--top-p", "0.9"]) == 0
    capsys.readouterr()
    assert run(command) == 0
    assert capsys.readouterr().out == one


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--prompt", ""], "at least one letter"),
        (["--prompt", "a", "--temperature", "-1"], "temperature"),
        (["--prompt", "a", "--top-k", "0"], "top_k"),
        (["--prompt", "a", "--top-p", "2"], "top_p"),
        (["--prompt", "a", "--max-new-tokens", "-1"], "max_new_tokens"),
    ],
)
def test_generate_refuses(capsys: pytest.CaptureFixture[str], model: Path, more: list[str], words: str) -> None:
    assert run(["generate", str(model), *more]) == 2
    assert words in capsys.readouterr().err


def test_generate_needs_a_model(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run(["generate", str(tmp_path), "--prompt", "a"]) == 2
    assert "holds no sequence model" in capsys.readouterr().err
