"""Linear attention as a choice of ``fit``: only where it saves work, the least harmful attentions first."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

import torchgraft
from torchgraft.bench.files import read_tensors
from torchgraft.bench.meters import macs
from torchgraft.bench.models import VisionTransformer
from torchgraft.bench.task import Split, Task
from torchgraft.elastic.linearization import Linearization
from torchgraft.engines.linearize import linear_attentions


def _task(size: int) -> Task:
    torch.manual_seed(0)
    model = VisionTransformer(size, 1, 1, 3, d_model=16, depth=3, num_heads=2)
    x, y = torch.randn(24, 1, size, size), torch.randint(0, 3, (24,))
    data = Split(x, y)
    hit = lambda out, target: (out.argmax(-1) == target).float()  # noqa: E731
    return Task(model.eval(), data, data, data, nn.functional.cross_entropy, hit, batch_size=8)


def test_short_sequences_are_left_alone_with_the_reason() -> None:
    task = _task(2)
    procedure = Linearization()
    assert procedure.applies_to(task.architecture(), task) == []
    (refusal,) = procedure.refusals(task.architecture(), task)
    assert "too short" in refusal.reason


def test_strength_counts_attentions_and_work_falls() -> None:
    task = _task(12)
    procedure, model = Linearization(), task.architecture()
    assert [site.name for site in procedure.applies_to(model, task)] == [f"blocks.{i}.attn" for i in range(3)]
    work = [macs(procedure.apply(model, task, strength), task.example) for strength in (0.0, 0.3, 0.6, 1.0)]
    assert work == sorted(work, reverse=True)
    assert len(set(work)) == 4


def test_the_least_harmful_attention_goes_first() -> None:
    task = _task(12)
    model = task.architecture()
    assert isinstance(model, VisionTransformer)
    with torch.no_grad():
        model.blocks[1].attn.out.weight.zero_()  # type: ignore[union-attr, operator]  # nothing of it is heard
    assert list(linear_attentions(Linearization().apply(model, task, 0.3))) == ["blocks.1.attn"]


def test_fit_takes_it_as_one_more_choice(tmp_path: Path) -> None:
    task = _task(8)
    result = torchgraft.fit(
        task,
        budget="macs=0.95x",
        costs=["macs"],
        procedures=["linearization", "magnitude-pruning"],
        trials=2,
        training=False,
        max_drop=None,
        out=tmp_path / "run",
    )
    assert result.best is not None
    assert not [trial for trial in result.record.trials if trial.state == "failed"]
    assert {key for trial in result.record.trials for key in trial.procedures} == {"linearization", "magnitude-pruning"}
    again = torchgraft.apply(tmp_path / "run" / "recipe.yaml", task=task)
    kept, _ = read_tensors(tmp_path / "run" / "model.safetensors")
    assert all(torch.equal(value, kept[name]) for name, value in again.state_dict().items())
