"""Comparisons: equal budgets, what the rows say, and that a finished run is never made twice."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from torchgraft.bench.training import evaluate
from torchgraft.compare import Cell, Comparison, Moment, run, try_
from torchgraft.compare.record import Settings, read
from torchgraft.errors import BadInput
from torchgraft.parts.blocks.sequence_model import SequenceModel

SMALL: dict[str, Any] = {"steps": 2, "d_model": 8, "layers": 1, "batch_size": 4}
KEY, OTHER = "softmax-attention", "gated-linear-attention"


def _cell(key: str, seed: int, score: float, **more: Any) -> Cell:
    fields = {"steps": 5, "seconds_per_step": 0.1, "parameters": 7, "state_bytes": 8, "state_bytes_later": 8, **more}
    return Cell(key=key, seed=seed, score=score, **fields)


def _found(scores: dict[str, list[float]], seeds: int) -> Comparison:
    settings = Settings(task="t", steps=5, seconds=None, d_model=8, layers=1, batch_size=4, lr=0.1)
    cells = [_cell(key, seed, value) for key, values in scores.items() for seed, value in enumerate(values)]
    return Comparison(settings=settings, keys=list(scores), seeds=list(range(seeds)), cells=cells)


def test_rows_by_hand() -> None:
    """With three seeds the 95 % interval of a mean difference is 4.303 standard errors to each side."""
    found = _found({"a": [0.1, 0.2, 0.3], "b": [0.3, 0.4, 0.5], "c": [0.2, 0.5, 0.2], "d": [0.0, 0.1, 0.1]}, 3)
    a, b, c, d = found.rows()
    assert (a.verdict, b.verdict, c.verdict, d.verdict) == ("first", "better", "cannot tell", "cannot tell")
    assert a.mean == pytest.approx(0.2)
    assert a.spread == pytest.approx(0.1)
    assert b.difference == pytest.approx(0.2)
    assert b.spread == pytest.approx(0.1)
    # d - a is -0.1, -0.1, -0.2: mean -0.133, standard error 0.033, half an interval 0.143
    worse = _found({"a": [0.1, 0.2, 0.3], "d": [0.0, 0.1, 0.19]}, 3).rows()[1]
    assert worse.verdict == "worse"


def test_one_seed_tells_nothing() -> None:
    row = _found({"a": [0.1], "b": [0.9]}, 1).rows()[1]
    assert row.verdict == "cannot tell"
    assert math.isnan(row.spread)


def test_unfinished_mixers_have_no_row() -> None:
    found = _found({"a": [0.1, 0.2], "b": [0.5]}, 2)
    assert [row.key for row in found.rows()] == ["a"]


def test_a_comparison_measures_what_it_says(tmp_path: Path) -> None:
    moments: list[Moment] = []
    found = try_([KEY, OTHER], "parity", seeds=2, out=tmp_path, save=tmp_path / "m", progress=moments.append, **SMALL)
    assert [(cell.key, cell.seed) for cell in found.cells] == [(KEY, 0), (KEY, 1), (OTHER, 0), (OTHER, 1)]
    assert {cell.steps for cell in found.cells} == {2}
    assert [moment.cell for moment in moments if moment.done] == [0, 1, 2, 3]
    assert [moment.step for moment in moments[:3]] == [1, 2, 2]
    assert read(tmp_path / "try.json") == found
    from torchgraft.bench.tasks import builtin

    task = builtin("parity")
    for cell in (found.cells[0], found.cells[2]):
        model = SequenceModel.from_pretrained(tmp_path / "m" / cell.key)
        assert float(evaluate(model, task, "test").mean()) == pytest.approx(cell.score)
        assert cell.parameters == sum(value.numel() for value in model.parameters())
        assert cell.state_bytes == model.state_bytes(128)
        assert list(cell.scores_by_length) == [32, 64, 96, 128]
    softmax, gated = found.rows()
    assert softmax.state_grows
    assert not gated.state_grows
    assert found.reference == 1.0


class _Killed(Exception):
    pass


def test_an_interrupted_comparison_goes_on_with_the_next_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = try_([KEY, OTHER], "parity", seeds=2, **SMALL)
    real, made = run.train_mixer, []

    def counted(*arguments: Any, **more: Any) -> SequenceModel:
        if len(made) == 3:
            raise _Killed
        made.append((arguments[1], more["seed"]))
        return real(*arguments, **more)

    monkeypatch.setattr(run, "train_mixer", counted)
    with pytest.raises(_Killed):
        try_([KEY, OTHER], "parity", seeds=2, out=tmp_path, **SMALL)
    assert len(read(tmp_path / "try.json").cells) == 3
    made.clear()
    found = try_([KEY, OTHER], "parity", seeds=2, out=tmp_path, **SMALL)
    assert made == [(OTHER, 1)]
    timeless = [[cell.model_copy(update={"seconds_per_step": 0.0}) for cell in each.cells] for each in (whole, found)]
    assert timeless[0] == timeless[1]
    assert try_([KEY, OTHER], "parity", seeds=2, out=tmp_path, **SMALL) == found
    assert made == [(OTHER, 1)], "a finished run was made again"
    try_([KEY], "parity", seeds=2, out=tmp_path, save=tmp_path / "m", **SMALL)
    assert made == [(OTHER, 1), (KEY, 0)], "a model that was not kept is trained for it"
    assert (tmp_path / "m" / KEY / "config.json").exists()


def test_time_decides_the_steps_once_for_all_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    now, calls = 0.0, 0

    def tick() -> float:
        """Half a second a step for seven steps of estimating and ten of training, and a second a step from then on."""
        nonlocal now, calls
        calls += 1
        now += 0.5 if calls <= 8 + 11 else 1.0
        return now

    monkeypatch.setattr(run.clock, "perf_counter", tick)
    found = try_([KEY], "parity", seeds=2, seconds=5.0, d_model=8, layers=1, batch_size=4)
    assert [cell.steps for cell in found.cells] == [10, 10]
    assert [cell.seconds_per_step for cell in found.cells] == [0.5, 1.0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"keys": []}, "at least one"),
        ({"keys": [KEY, KEY]}, "different mixers"),
        ({"keys": [KEY, "magnitude-pruning"]}, "sequence mixer"),
        ({"keys": [KEY, "nothing"]}, "unknown method"),
        ({"seeds": 0}, "seeds"),
        ({"seeds": [1, 1]}, "different numbers"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"seconds": 3.0}, "not both"),
        ({"steps": None, "seconds": -1.0}, "seconds must be above 0"),
        ({"task": "wine"}, "not on sequences"),
        ({"task": "pairity"}, "did you mean 'parity'"),
    ],
)
def test_bad_arguments_cost_no_run(
    arguments: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("torchgraft.parts.blocks.sequence_training.train", lambda *_, **__: pytest.fail("trained"))
    chosen = {"keys": [KEY], "task": "parity", **SMALL, **arguments}
    with pytest.raises(BadInput, match=words):
        try_(chosen.pop("keys"), chosen.pop("task"), out=tmp_path / "out", **chosen)
    assert not (tmp_path / "out").exists()


def test_other_settings_and_damage_are_refused(tmp_path: Path) -> None:
    try_([KEY], "parity", seeds=1, out=tmp_path, **SMALL)
    with pytest.raises(BadInput, match="d_model 8, not 16"):
        try_([KEY], "parity", seeds=1, out=tmp_path, **{**SMALL, "d_model": 16})
    more = try_([KEY], "parity", seeds=2, out=tmp_path, **SMALL)
    assert len(more.cells) == 2
    path = tmp_path / "try.json"
    kept = json.loads(path.read_text())
    for damage in ("{", "", json.dumps({**kept, "format": "torchgraft.try/9"}), json.dumps({**kept, "more": 1})):
        path.write_text(damage)
        with pytest.raises(BadInput, match="no comparison of this version"):
            try_([KEY], "parity", seeds=1, out=tmp_path, **SMALL)


def test_the_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    try_([KEY], "parity", seeds=1, **SMALL)
    assert torch.equal(before, torch.get_rng_state())
