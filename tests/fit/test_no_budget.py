"""``fit`` without a budget: a whole front over every cost, with precision procedures alone among what is tried."""

from __future__ import annotations

from pathlib import Path

import torchgraft


def test_precision_alone_is_tried_and_stands_on_the_front(task_file: Path, tmp_path: Path) -> None:
    result = torchgraft.fit(
        str(task_file),
        costs=["macs", "size"],
        trials=4,
        procedures=["magnitude-pruning", "int8-dynamic"],
        max_drop=0.2,
        out=tmp_path,
    )
    states = {tuple(trial.procedures): trial.state for trial in result.record.trials}
    assert states[("int8-dynamic",)] == "complete"
    assert "failed" not in states.values()
    # Strengths are those that were chosen, since there is nothing to aim at.
    alone = next(trial for trial in result.record.trials if list(trial.procedures) == ["magnitude-pruning"])
    assert alone.procedures["magnitude-pruning"] == 0.5
    small = [c for c in result.front[1:] if c.costs["size"].ratio < 0.5]
    assert small
    assert {row.key for row in result.record.contributions} <= {"magnitude-pruning", "int8-dynamic"}
    assert all(0.0 <= row.lost_without <= 1.0 for row in result.record.contributions)
