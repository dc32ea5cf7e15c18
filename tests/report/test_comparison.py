"""The table and the figure of a comparison."""

from __future__ import annotations

from pathlib import Path

import pytest

from torchgraft.compare import Cell, Comparison
from torchgraft.compare.record import Settings
from torchgraft.report.comparison import comparison_figure, comparison_rows, write_figure


def _found(lengths: bool = False, seeds: int = 2) -> Comparison:
    settings = Settings(task="parity", steps=5, seconds=None, d_model=8, layers=1, batch_size=4, lr=0.1)
    cells = [
        Cell(
            key=key,
            seed=seed,
            score=base + 0.01 * seed,
            scores_by_length={32: 1.0, 64: base} if lengths else {},
            steps=5,
            seconds_per_step=0.0123,
            parameters=12_300,
            state_bytes=state,
            state_bytes_later=later,
        )
        for key, base, state, later in (("a", 0.5, 100, 200), ("b", 0.9, 64, 64), ("c", 0.7, None, None))
        for seed in range(2)
    ]
    return Comparison(settings=settings, keys=["a", "b", "c"], seeds=list(range(seeds)), reference=1.0, cells=cells)


def test_table() -> None:
    columns, rows = comparison_rows(_found())
    assert columns[0] == "mixer"
    assert rows == [
        ["a", "0.505", "0.007", "", "5", "12.3 k", "12.3 ms", "100 B, grows"],
        ["b", "0.905", "0.007", "+0.400 better", "5", "12.3 k", "12.3 ms", "64 B"],
        ["c", "0.705", "0.007", "+0.200 better", "5", "12.3 k", "12.3 ms", "none kept"],
    ]


def test_figure_names_what_it_shows() -> None:
    plain, by_length = comparison_figure(_found()), comparison_figure(_found(lengths=True))
    assert len(plain.axes) == 1
    left, right = by_length.axes
    assert [label.get_text() for label in left.get_yticklabels()] == ["a", "b", "c"]
    assert "parity" in left.get_xlabel()
    lines = [line for line in right.lines if line.get_marker() == "o"]
    assert [list(map(float, line.get_xdata())) for line in lines] == [[32.0, 64.0]] * 3
    assert [float(line.get_ydata()[1]) for line in lines] == pytest.approx([0.5, 0.9, 0.7])


def test_files(tmp_path: Path) -> None:
    paths = write_figure(_found(), tmp_path)
    assert [path.name for path in paths] == ["try.png", "try.svg"]
    assert paths[0].read_bytes().startswith(b"\x89PNG")
    again = write_figure(_found(), tmp_path / "again")
    assert [path.read_bytes() for path in paths] == [path.read_bytes() for path in again]
    with pytest.raises(ValueError, match="finished"):
        comparison_figure(_found(seeds=3))
