"""Merged blocks as a procedure: what goes first, what is refused, and when it is not offered at all."""

from __future__ import annotations

import torch
from torch import nn

from torchgraft.bench.models import RecurrentNet, VisionTransformer
from torchgraft.bench.task import Task
from torchgraft.contracts.subjects import case, output
from torchgraft.elastic import parallel_residual
from torchgraft.elastic.parallel_residual import ParallelBlocks
from torchgraft.engines.residual import Widen
from torchgraft.engines.surgery.edits import history


def spans(model: nn.Module) -> tuple[tuple[int, int], ...]:
    return tuple(span for edit in history(model) if isinstance(edit, Widen) for span in edit.spans)


def vit() -> tuple[VisionTransformer, Task]:
    torch.manual_seed(0)
    model = VisionTransformer(d_model=8, depth=5, num_heads=2).eval()
    x, y = torch.randn(16, 1, 8, 8), torch.randint(0, 10, (16,))
    task = Task(model, (x, y), (x, y), (x, y), nn.functional.cross_entropy, lambda out, t: out[:, 0])
    return model, task


def silence(block: nn.Module) -> None:
    with torch.no_grad():
        for name, value in block.named_parameters():
            if name.startswith(("attn.out", "mlp.fc2")):
                value.zero_()


def test_a_block_that_adds_nothing_goes_first_and_is_not_missed() -> None:
    model, task = vit()
    silence(model.blocks[1])
    merged = ParallelBlocks(samples=8).apply(model, task, 0.25)
    assert len(merged.blocks) == 4  # type: ignore[arg-type]
    assert spans(merged) in (((1, 2),), ((0, 2),))
    x = task.val.inputs
    assert torch.allclose(output(merged, x), output(model, x), atol=1e-5)


def test_later_blocks_go_first_where_nothing_else_decides() -> None:
    model, task = vit()
    for block in model.blocks:
        silence(block)
    assert spans(ParallelBlocks().apply(model, task, 0.25)) == ((3, 2),)


def test_merges_are_nested_and_strength_1_leaves_one_block() -> None:
    model, task = vit()
    seen: set[int] = set()
    for count in range(1, 5):
        merged = ParallelBlocks(samples=8).apply(model, task, count / 4)
        joints = {first + i for first, length in spans(merged) for i in range(length - 1)}
        assert seen < joints
        assert len(joints) == count
        seen = joints
    assert len(merged.blocks) == 1  # type: ignore[arg-type]


def test_an_ignored_block_parts_the_stack() -> None:
    model, task = vit()
    procedure = ParallelBlocks()
    assert [site.size for site in procedure.applies_to(model, task)] == [5]
    merged = procedure.apply(model, task, 1.0, ignore=["blocks.2.mlp"])
    assert spans(merged) == ((0, 2), (3, 2))


def test_two_stacks_share_one_strength() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = vit()[0], vit()[0]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.a(x) + self.b(x)
            return out

    _, task = vit()
    merged = ParallelBlocks(samples=4).apply(Two().eval(), task, 3 / 8)
    assert len(merged.a.blocks) + len(merged.b.blocks) == 7  # type: ignore[union-attr, arg-type]


def test_what_cannot_be_merged_is_refused_with_the_reason() -> None:
    for name, words in {"mlp": "no skip connection", "cnn": "no pre-norm transformer block"}.items():
        tiny = case(name)
        procedure = ParallelBlocks()
        assert procedure.applies_to(tiny.model, tiny.task) == []
        assert [words in refusal.reason for refusal in procedure.refusals(tiny.model, tiny.task)] == [True]
    _, task = vit()
    x, y = torch.zeros(4, 5, dtype=torch.long), torch.zeros(4, 5, dtype=torch.long)
    model = RecurrentNet(3, 2, d_model=8)
    task = Task(model, (x, y), (x, y), (x, y), nn.functional.cross_entropy, lambda out, t: out[:, 0, 0])
    assert ParallelBlocks().applies_to(model, task) == []


def test_fit_is_offered_it_only_where_latency_counts_and_falls(monkeypatch: object) -> None:
    model, task = vit()
    blind = ParallelBlocks().for_costs(("params", "macs"))
    assert blind.applies_to(model, task) == []
    assert "latency" in blind.refusals(model, task)[0].reason
    assert "latency" not in str(ParallelBlocks().refusals(model, task))
    asked: list[object] = []
    original = parallel_residual._why_slow
    try:
        for why in ("slower", ""):
            parallel_residual._why_slow = lambda *given, why=why: asked.append(1) or why  # type: ignore[assignment, misc]
            timed = ParallelBlocks().for_costs(("latency",))
            for _ in range(2):  # measured once: a verdict may not change between two looks at one model
                assert bool(timed.applies_to(model, task)) == (why == "")
            assert [refusal.reason for refusal in timed.refusals(model, task)] == ([why] if why else [])
        assert len(asked) == 2
    finally:
        parallel_residual._why_slow = original
    found = ParallelBlocks()._joints(model, task, ())
    assert isinstance(parallel_residual._why_slow(model, task, found), str)
