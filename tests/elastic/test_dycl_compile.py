"""DyCL: the compiled program takes every path as the original does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn

from torchgraft.bench.task import Task
from torchgraft.contracts.subjects import Case, case
from torchgraft.elastic.dycl_compile import CompiledDynamic, CompiledPasses, compile_dynamic, load_host
from torchgraft.engines.control_flow import passes
from torchgraft.engines.control_flow.compiled import difference
from torchgraft.engines.control_flow.execution import RunCompiled
from torchgraft.engines.surgery.edits import history
from torchgraft.errors import BadInput


class EarlyExit(nn.Module):
    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(depth))
        self.heads = nn.ModuleList(nn.Linear(4, 3) for _ in range(depth))
        self.threshold = 0.5

    def forward(self, x: Tensor) -> tuple[Tensor, int]:
        for i, (block, head) in enumerate(zip(self.blocks, self.heads, strict=True)):
            x = block(x)
            logits = head(x)
            if i < len(self.blocks) - 1 and logits.softmax(-1).max() > self.threshold:
                break
        return logits, i


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.body = nn.Linear(4, 1), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        if not self.gate(x) > 0:
            return x
        return torch.relu(x + self.body(x))


class Skipping(nn.Module):
    """Dynamic sub-modules inside a Sequential, which is gone into by its own source."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Gated() for _ in range(3)))
        self.register_buffer("shift", torch.tensor([0.1, 0.2, -0.3, 0.0]))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.shift
        return x + self.blocks(x)


class Ponder(nn.Module):
    """Two loops, a counter that becomes a tensor, numbers by item(), a result that is a number."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.halt, self.most = nn.GRUCell(4, 5), nn.Linear(5, 1), 3

    def step(self, row: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        h = self.cell(row, h)
        return h, torch.sigmoid(self.halt(h))

    def forward(self, x: Tensor) -> tuple[Tensor, int]:
        h, steps = torch.zeros(1, 5), 0
        for t in range(x.shape[1]):
            total, k = 0.0, 0
            mixed = torch.zeros(1, 5)
            while k < self.most:
                h, p = self.step(x[:, t], h)
                k += 1
                if total + p.item() > 0.95 or k == self.most:
                    mixed += (1.0 - total) * h
                    break
                mixed += p * h
                total += p.item()
            h = mixed
            steps += k
        return h, steps


def _scaled(x: Tensor, by: float) -> Tensor:
    if x.mean() > 0:
        return x * by
    return x / by


class Mixed(nn.Module):
    """The rest of the language: swaps, conditional expressions, continue, lists, comprehensions, dictionaries."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 4, batch_first=True)
        self.names = ["p", "q"]

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Any]:
        a, b = x, y
        turns = 0
        while (a - b).abs().sum() > 1.0 and turns < 3:
            a, b = b, a * 0.5
            turns += 1
            if turns == 2:
                continue
            b = b + 0.25
        kept: list[Tensor] = []
        for part in torch.chunk(a, 2, dim=-1):
            if part.sum() > 0:
                kept.append(part)
            else:
                kept.append(-part)
        best, where = torch.stack(kept).max(0)
        out, (h, _) = self.lstm(a[None])
        sign = 1.0 if out.sum() > 0 or h.sum() > 0 else -1.0
        flag = bool(best.sum() > 0.5)
        scaled = _scaled(b, by=2.0) if flag else b
        squares = sum(each.square() for each in kept if each.ndim == 2)
        assert x.ndim == 2
        return {
            "out": sign * scaled,
            "parts": [squares, where, best.T],
            "turns": turns,
            "name": self.names[0],
            "none": None,
        }


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[tuple[int, ...], ...], int]] = {
    "exit": (EarlyExit, ((1, 4),), 64),
    "skip": (Skipping, ((1, 4),), 64),
    "ponder": (Ponder, ((1, 2, 4),), 64),
    "ponder with tensors for counters": (Ponder, ((1, 2, 4),), 4),
    "mixed": (Mixed, ((2, 4), (2, 4)), 64),
}


def _net(name: str) -> tuple[nn.Module, list[tuple[Tensor, ...]], int]:
    build, shapes, limit = NETS[name]
    torch.manual_seed(3)
    model = build().eval()
    with torch.no_grad():
        for value in model.parameters():
            value.mul_(1.5)
        for part, module in model.named_modules():
            if part.endswith(("gate", "halt")):  # decisions that fall either way
                module.weight.mul_(8.0)  # type: ignore[operator,union-attr]
                module.bias.zero_()  # type: ignore[operator,union-attr]
    draw = torch.Generator().manual_seed(1)
    scales = [0.1, 1.0, 3.0]
    return (
        model,
        [tuple(scales[row % 3] * torch.randn(shape, generator=draw) for shape in shapes) for row in range(120)],
        limit,
    )


@pytest.mark.parametrize("optimised", [True, False])
@pytest.mark.parametrize("name", NETS)
def test_every_path_is_the_originals_bit_for_bit(name: str, optimised: bool) -> None:
    model, inputs, limit = _net(name)
    compiled = compile_dynamic(model, inputs[0], "eager", optimised=optimised, limit=limit)
    found = compiled.verify(inputs, tolerance=0.0 if name != "ponder with tensors for counters" else 1e-6)
    assert found == {"calls": 120, "mismatches": 0, "decisions": 0, "largest": found["largest"]}
    cover = compiled.coverage()
    if optimised and name in ("exit", "skip"):
        assert cover["taken"] == cover["edges"], cover
    if optimised and name == "ponder":  # a sum of probabilities that passes 0.95 only at some of its steps
        assert cover["taken"] >= 0.85 * cover["edges"], cover
    assert len({tuple(compiled.run(*each)[1].path) for each in inputs}) > 2


@pytest.mark.parametrize("name", NETS)
def test_subgraphs_are_straight_lines_between_live_variables(name: str) -> None:
    model, inputs, limit = _net(name)
    compiled = compile_dynamic(model, inputs[0], "eager", limit=limit)
    plain = compile_dynamic(model, inputs[0], "eager", optimised=False, limit=limit)
    assert len(compiled.flow.nodes) < len(plain.flow.nodes) / 2
    for module in compiled.subgraphs:
        again = fx.symbolic_trace(module)
        assert [node.op for node in again.graph.nodes].count("output") == 1
    live_in, live_out = compiled.flow.live()
    for place, node in enumerate(compiled.flow.nodes):
        given = set(node.inputs)
        assert given == {
            str(each) for each in given if any(node.inputs[each].users) or node.inputs[each] in node.outputs.values()
        }
        assert live_in[place] == given | (live_out[place] - set(node.outputs))
        read = _variables(node.result)
        assert set(node.outputs) - {"?"} <= live_out[place] | read
        assert node.test == ("?" in node.outputs)
    assert live_in[compiled.flow.entry] <= set(compiled.flow.arguments)


def _variables(result: Any) -> set[str]:
    if not isinstance(result, dict):
        return set().union(*map(_variables, result)) if isinstance(result, list) else set()
    return {result["var"]} if "var" in result else set().union(set(), *map(_variables, result.values()))


def test_blocks_that_are_alike_are_one_subgraph() -> None:
    model, inputs, _ = _net("ponder")
    compiled = compile_dynamic(model, inputs[0], "eager", limit=4)
    nets = [node.net for node in compiled.program.nodes if node.net is not None]
    assert len(compiled.subgraphs) == len(set(nets)) <= len(nets)


@pytest.mark.parametrize("backend", ["trace", "export", "fused"])
def test_other_compilers_agree(backend: Any) -> None:
    model, inputs, _ = _net("skip")
    model.blocks = model.blocks[:2]  # type: ignore[index]
    compiled = compile_dynamic(model, inputs[0], backend)
    found = compiled.verify(inputs[:40])
    assert (found["mismatches"], found["decisions"]) == (0, 0)


def test_a_trace_of_one_path_is_wrong_on_the_others() -> None:
    model, inputs, _ = _net("exit")
    flat = compile_dynamic(model, inputs[0], "eager")
    flat.flow.nodes[flat.flow.entry].following.reverse()
    wrong = CompiledDynamic(model, inputs[0], flat.flow, "eager")
    assert wrong.verify(inputs)["mismatches"] > 20  # verify does see a wrong decision
    assert wrong.verify(inputs)["decisions"] > 0


def test_onnx_runs_from_its_files_alone(tmp_path: Path) -> None:
    _, inputs, _ = _net("exit")
    model = EarlyExit(2).eval()
    model.threshold = 0.4
    compiled = compile_dynamic(model, inputs[0], "onnx")
    found = compiled.verify(inputs)
    assert (found["mismatches"], found["decisions"]) == (0, 0)
    compiled.save(tmp_path)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", *[".onnx"] * len(compiled.subgraphs)]
    host = load_host(tmp_path)
    for each in inputs[:20]:
        expected, place = model(*each)
        logits, number = host(each[0].numpy())
        assert number == place
        np.testing.assert_allclose(logits, expected.detach().numpy(), rtol=1e-5, atol=1e-6)
    exported = compile_dynamic(model, inputs[0], "export")
    exported._onnx = compiled._onnx
    exported.save(tmp_path / "more")
    (again,) = torch.export.load(tmp_path / "more" / "net_0.pt2").module()(*exported.examples[0])[:1]
    torch.testing.assert_close(again, exported.subgraphs[0](*exported.examples[0])[0])
    (tmp_path / "net_0.onnx").unlink()
    with pytest.raises(BadInput, match="cannot read"):
        load_host(tmp_path)


def test_bad_input() -> None:
    model, inputs, _ = _net("exit")
    compiled = compile_dynamic(model, inputs[0], "eager")
    with pytest.raises(BadInput, match="sizes"):
        compiled(torch.zeros(2, 4))
    with pytest.raises(BadInput, match="must be"):
        compiled(torch.zeros(1, 4, dtype=torch.float64))
    with pytest.raises(BadInput, match="backend"):
        compile_dynamic(model, inputs[0], "tvm")  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="eval mode"):
        compile_dynamic(model.train(), inputs[0])
    with pytest.raises(BadInput, match="limit"):
        compile_dynamic(model.eval(), inputs[0], limit=1)
    with pytest.raises(BadInput, match="tuple of tensors"):
        compile_dynamic(model, (1,))  # type: ignore[arg-type]


# As a lever of fit


def _task(model: nn.Module, x: Tensor) -> Task:
    data = x, torch.zeros(len(x), dtype=torch.long)
    return Task(model, data, data, data, nn.functional.cross_entropy, lambda out, target: out[:, 0])


@pytest.mark.parametrize("name", ["cnn", "transformer"])
def test_the_program_of_a_check_model_gives_pythons_outputs(name: str) -> None:
    tiny: Case = case(name)
    procedure = CompiledPasses()
    (site,) = procedure.applies_to(tiny.model, tiny.task)
    assert (site.name, site.kind) == ("(model)", "operators")
    made = procedure.apply(tiny.model, tiny.task, 0.3)
    assert history(made) == (RunCompiled.on(tiny.task.example),)
    with torch.no_grad():
        for _ in range(3):
            x = torch.randn_like(tiny.task.example)  # type: ignore[arg-type]
            assert difference(tiny.model(x), made(x)) < 1e-5
    assert made.__dict__["forward"].compiled(tiny.task.example)
    assert procedure.applies_to(made, tiny.task) == []  # once is enough


def test_it_does_nothing_where_latency_does_not_count() -> None:
    tiny = case("cnn")
    procedure = CompiledPasses().for_costs(("size", "macs"))
    assert procedure.applies_to(tiny.model, tiny.task) == []
    (refusal,) = procedure.refusals(tiny.model, tiny.task)
    assert "latency" in refusal.reason


@pytest.mark.parametrize(("ratio", "sites"), [(0.98, 1), (1.02, 0)])
def test_in_fit_it_is_timed_once_and_left_where_python_is_quicker(
    ratio: float, sites: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny, asked = case("cnn"), []

    def told(models: Any, example: Any, *, rounds: int) -> np.ndarray:
        asked.append(rounds)
        assert models[1].__dict__["forward"].compiled(example)
        return np.tile([1.0, ratio], (rounds, 1))

    monkeypatch.setattr(passes, "interleaved", told)
    procedure = CompiledPasses().for_costs(("latency", "size"))
    for _ in range(2):
        assert len(procedure.applies_to(tiny.model, tiny.task)) == sites
    assert len(asked) == 1
    assert [f"{ratio:.2f} of the time" in r.reason for r in procedure.refusals(tiny.model, tiny.task)] == [True] * (
        1 - sites
    )


class _Draws(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return (self.inner(x) + torch.rand(4)).relu() * 2


class _Indexes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.parts[int(x.sum() > 0)](x).relu() * 2


def test_what_cannot_be_compiled_is_refused_with_the_reason_and_the_line() -> None:
    x = torch.randn(6, 4)
    for model, why, has_line in ((_Draws(), "random", False), (_Indexes(), "picks from", True)):
        procedure = CompiledPasses()
        assert procedure.applies_to(model.eval(), _task(model, x)) == []
        (refusal,) = procedure.refusals(model, _task(model, x))
        assert why in refusal.reason
        assert (refusal.line is not None) == has_line
        with pytest.raises(BadInput, match="dycl-compile finds nothing"):
            procedure.apply(model, _task(model, x), 1.0)


def test_a_failing_program_is_no_site_in_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = case("cnn")
    monkeypatch.setattr("torchgraft.engines.control_flow.execution.TOLERANCE", -1.0)
    procedure = CompiledPasses(timed=True)
    assert procedure.applies_to(tiny.model, tiny.task) == []
    assert "cannot be compiled" in procedure.refusals(tiny.model, tiny.task)[0].reason


def test_an_early_exit_network_is_a_site_and_keeps_its_decisions() -> None:
    model, inputs, _ = _net("exit")
    task = _task(model, torch.cat([each[0] for each in inputs[:8]]))
    task.batch_size = 1
    assert isinstance(task.example, Tensor)
    assert task.example.shape == inputs[0][0].shape
    procedure = CompiledPasses()
    assert len(procedure.applies_to(model, task)) == 1
    made, places = procedure.apply(model, task, 1.0), set()
    with torch.no_grad():
        for (x,) in inputs[:60]:
            expected, place = model(x)
            found, number = made(x)
            places.add(place)
            assert number == place
            assert difference(expected, found) < 1e-5
    assert len(places) > 1
    assert made.__dict__["forward"].compiled(task.example)
