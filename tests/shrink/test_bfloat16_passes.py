"""Passes in bfloat16: rounding by hand, every size and state, and float32 wherever bfloat16 would be wrong."""

from __future__ import annotations

import copy
import logging
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.flop_counter import FlopCounterMode

from torchgraft.bench.meters import macs, params, size
from torchgraft.bench.models import ResidualNet, VisionTransformer
from torchgraft.bench.task import Task
from torchgraft.bench.training import evaluate
from torchgraft.contracts.subjects import case
from torchgraft.elastic.dycl_compile import CompiledPasses
from torchgraft.engines.control_flow import execution as execution_module
from torchgraft.engines.control_flow import passes
from torchgraft.engines.control_flow.compiled import difference
from torchgraft.engines.control_flow.execution import Execution, RunCompiled
from torchgraft.engines.control_flow.narrow import Narrow, narrowed
from torchgraft.engines.quantize.fewbit import FewBit
from torchgraft.engines.surgery.edits import apply_edits, edit_from_record, edit_to_record, history
from torchgraft.errors import BadInput
from torchgraft.fit.export import export_model
from torchgraft.shrink.quantize.bfloat16_passes import Bfloat16Passes

#: The unit roundoff of 8 significant bits.
U = 2.0**-8


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def _mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.LayerNorm(16), nn.Linear(16, 3)).eval()


def _in_bfloat16(model: nn.Module, example: Tensor) -> tuple[Any, Execution]:
    made = apply_edits(model, [RunCompiled.on(example, "bfloat16")])
    found = made.__dict__["forward"]
    assert isinstance(found, Execution)
    return made, found


def _rounded(model: nn.Module, x: Tensor) -> Tensor:
    """Return what the rounded model says, without any program."""
    with torch.no_grad():
        out: Tensor = narrowed(model)(x.bfloat16())
    return out.float()


# Rounding


def test_a_linear_layer_errs_by_no_more_than_rounding_may() -> None:
    layer, x = nn.Linear(64, 32).eval(), torch.randn(16, 64)
    with torch.no_grad():
        narrow = Narrow.of(layer, layer.forward, (x,), {})(x).double()
        weight, bias = layer.weight.double(), layer.bias.double()
        exact = x.double() @ weight.T + bias
        inside = (2 * U + U * U) * (x.double().abs() @ weight.abs().T) + U * bias.abs()
        bound = inside + U * (exact.abs() + inside) + 64 * 2.0**-23 * (x.double().abs() @ weight.abs().T)
    gap = (narrow - exact).abs()
    assert bool((gap <= bound).all())
    assert float(gap.max()) > 0.1 * U * float(exact.abs().max())  # it does round


def test_by_hand() -> None:
    layer = nn.Linear(2, 1, bias=False).eval()
    layer.weight.data = torch.tensor([[1.00390625, 3.0]])  # 1 + 2^-8 lies halfway and goes to the even one, 1
    found = Narrow.of(layer, layer.forward, (torch.ones(1, 2),), {})(torch.tensor([[1.0, 1.01]]))
    assert narrowed(layer).weight.tolist() == [[1.0, 3.0]]
    # 1.01 is 1 + 1.28 x 2^-7 and becomes 1 + 2^-7; 1 + 3 (1 + 2^-7) = 4.0234375 becomes 4.03125, in steps of 2^-5.
    assert found.item() == 4.03125


def test_codes_are_put_together_in_float32_and_rounded_once() -> None:
    model = apply_edits(_mlp(), [FewBit(bits={"0": 4, "3": 3}, exponents={"0": 0.7}, scales="float16")])
    made = narrowed(model)
    for place in (0, 3):
        assert torch.equal(made[place].weight, model[place].weight.bfloat16())  # type: ignore[index]
        assert made[place].weight.dtype == torch.bfloat16  # type: ignore[index]
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).eval()
    tied[1].weight = tied[0].weight
    coded = narrowed(apply_edits(tied, [FewBit(bits={"0": 4})]))
    assert torch.equal(coded[0].weight, coded[1].weight)  # type: ignore[index]


def test_norms_keep_what_they_scale_by_and_what_is_stored_in_half_too() -> None:
    model = ResidualNet(widths=(16, 16), depth=1)
    norms = nn.Sequential(nn.LayerNorm(16), nn.GroupNorm(2, 16), nn.BatchNorm1d(16), nn.RMSNorm(16))
    for each in (model, norms):
        narrow = narrowed(each.eval())
        pairs = list(zip(each.modules(), narrow.modules(), strict=True))
        kept = [
            new for old, new in pairs if isinstance(old, nn.LayerNorm | nn.GroupNorm | nn.modules.batchnorm._BatchNorm)
        ]
        assert len(kept) >= 3
        for module in kept:
            held = [*module.parameters(), *module.buffers()]
            assert all(value.dtype in (torch.float32, torch.int64) for value in held)
        others = [new for old, new in pairs if new not in kept]
        assert all(value.dtype == torch.bfloat16 for module in others for value in module.parameters(recurse=False))
    mlp = _mlp()
    with torch.no_grad():
        mlp[2].weight.copy_(torch.linspace(0.5, 1.5, 16))
    stored = apply_edits(mlp, [FewBit(bits={"0": 4, "2.weight": 16})])
    gains = narrowed(stored)[2].weight  # type: ignore[index]
    assert gains.dtype == torch.float32
    assert torch.equal(gains, stored[2].weight)  # type: ignore[index]


def test_parametrised_weights_are_read_out_and_the_original_keeps_its_own() -> None:
    model = _mlp()
    parametrize.register_parametrization(model[0], "weight", nn.Tanh())
    made = narrowed(model.eval())
    assert torch.equal(made[0].weight, model[0].weight.bfloat16())  # type: ignore[index]
    with torch.no_grad():
        model[0].parametrizations.weight.original.mul_(2.0)
    assert torch.equal(model[0].weight, torch.tanh(model[0].parametrizations.weight.original))
    x = torch.randn(5, 6)
    run, execution = _in_bfloat16(model, x)
    with torch.no_grad():
        assert difference(model(x), run(x)) < 0.03
    assert execution.compiled(x)


# Execution


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (_mlp(), (5, 6)),
        (ResidualNet(widths=(4, 8), depth=1).eval(), (3, 1, 8, 8)),
        (VisionTransformer(d_model=8, depth=1, num_heads=2).eval(), (3, 1, 8, 8)),
    ],
    ids=["mlp", "cnn", "transformer"],
)
def test_programs_and_other_sizes_are_bfloat16s(model: nn.Module, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    made, execution = _in_bfloat16(model, x)
    with torch.no_grad():
        plain, found = model(x), made(x)
        assert execution.compiled(x)
        assert found.dtype == torch.float32
        assert 1e-4 < difference(plain, found) < 0.05  # rounded, and not too much
        assert difference(_rounded(model, x), found) < 2**-5
        other = torch.randn(shape[0] + 2, *shape[1:])
        assert torch.equal(made(other), _rounded(model, other))
        assert not execution.compiled(other)
        with torch.inference_mode():
            assert torch.equal(made(x), found)
    for cost in (params, size):
        assert cost(made) == cost(model)
    assert macs(made, x) == macs(model, x)
    assert all(value.dtype == torch.float32 for value in made.state_dict().values() if value.is_floating_point())


def test_float32_answers_in_training_under_hooks_and_modes_and_with_gradients() -> None:
    model, x = _mlp(), torch.randn(5, 6)
    made, _ = _in_bfloat16(model, x)
    with torch.no_grad():
        plain, narrow = model(x), made(x)
        assert not torch.equal(plain, narrow)
        with FlopCounterMode(display=False):
            assert torch.equal(made(x), plain)
        handle = made[0].register_forward_hook(lambda module, args, out: out * 2)
        assert torch.equal(made(x), model[3](model[2](model[1](model[0](x) * 2))))
        handle.remove()
        made.train()
        assert torch.equal(made(x), plain)
        made.eval()
        assert torch.equal(made(x), narrow)
    out = made(x)
    assert torch.equal(out, plain)
    out.sum().backward()
    expected = torch.autograd.grad(model(x).sum(), model[0].weight)[0]
    assert torch.equal(made[0].weight.grad, expected)
    with torch.no_grad():
        assert torch.equal(made.double()(x.double()), model.double()(x.double()))


def test_changed_weights_are_rounded_anew_and_compiled_only_once_they_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    made, execution = _in_bfloat16(_mlp(), torch.randn(5, 6))
    x, times = torch.randn(5, 6), [0]
    real = execution_module.compiled_pass

    def counted(*given: Any) -> Any:
        times[0] += 1
        return real(*given)

    monkeypatch.setattr(execution_module, "compiled_pass", counted)
    with torch.no_grad():
        made(x)
        for _ in range(3):
            made[0].weight.mul_(1.5)
            assert torch.equal(made(x), _rounded(made, x))  # no float32 in between
        assert times[0] == 1
        made(x)
        assert times[0] == 2
        assert execution.compiled(x)


def test_copies_and_pickles_compute_alike() -> None:
    made, _ = _in_bfloat16(_mlp(), torch.randn(5, 6))
    x = torch.randn(5, 6)
    with torch.no_grad():
        out = made(x)
        for twin in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
            assert twin.__dict__["forward"].arithmetic == "bfloat16"
            assert torch.equal(twin(x), out)


def test_the_edit_comes_back_and_takes_no_other_numbers_beside_it() -> None:
    x = torch.randn(5, 6)
    edit = RunCompiled.on(x, "bfloat16")
    assert edit_from_record(edit_to_record(edit)) == edit
    assert edit.describe() == {"(model)": "one compiled program in bfloat16 for inputs of 5x6"}
    both = apply_edits(_mlp(), [edit, RunCompiled.on(torch.randn(2, 6), "bfloat16")])
    assert len(both.__dict__["forward"].forms) == 2
    with pytest.raises(BadInput, match="compute in bfloat16 already"):
        apply_edits(_mlp(), [edit, RunCompiled.on(torch.randn(2, 6))])
    with pytest.raises(BadInput, match="compute in its own numbers already"):
        apply_edits(_mlp(), [RunCompiled.on(x), edit])


def test_what_is_first_called_in_inference_mode_serves_elsewhere_too() -> None:
    model = apply_edits(_mlp(), [FewBit(bits={"0": 4})])
    with torch.inference_mode():
        made = narrowed(model)
    assert not any(value.is_inference() for value in (*made.parameters(), *made.buffers(), made[0].weight))  # type: ignore[index]
    x = torch.randn(5, 6)
    run, _ = _in_bfloat16(model, x)
    with torch.inference_mode():
        found = run(x)
    with torch.no_grad():
        assert torch.equal(run(x), found)


# What does not bear it


class _Creates(nn.Module):
    """Multiplies by what it makes in float32, on batches of fewer than ``least`` only."""

    def __init__(self, least: int) -> None:
        super().__init__()
        self.inner, self.least = nn.Linear(4, 4), least

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x).relu()
        return out @ torch.eye(4) if len(x) < self.least else out * 2


class _Cancels(nn.Module):
    """What is left of large numbers is lost in 8 bits."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return (self.inner(x) + 1000.0 - 1000.0).relu() - 1.0


class _Result(dict[str, Tensor]):
    """A result of a type of its own."""


class _Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return _Result(logits=self.inner(x).relu() * 2)


class _Counts(nn.Module):
    """Writes to its own buffer in eval mode, so that a copy would count by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.get_buffer("calls").add_(1)
        return (x * 2).relu() + 1


class _Budgets(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.kept = nn.Linear(4, 4), [4]

    def set_budget(self, kept: int) -> None:
        self.kept[0] = kept

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x).relu()[:, : self.kept[0]] * 2
        return out


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (_Creates(99), "does not run in bfloat16"),
        (_Cancels(), "differ by"),
        (_Named(), "does not return the _Result"),
        (_Counts(), "changes its own buffers"),
        (_Budgets(), "budgets that are switched"),
    ],
)
def test_what_does_not_bear_it_runs_in_float32_and_says_so(
    model: nn.Module, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    x = torch.randn(6, 4)
    made, execution = _in_bfloat16(model.eval(), x)
    with caplog.at_level(logging.INFO, "torchgraft"), torch.no_grad():
        for _ in range(2):
            expected, found = model(x), made(x)
            assert difference(dict(expected) if isinstance(expected, dict) else expected, found) == 0.0
    assert not execution.compiled(x)
    told = [record.getMessage() for record in caplog.records]
    assert sum(why in line for line in told) == 1
    assert "runs as float32" in told[0]


def test_a_model_of_other_numbers_is_left_to_itself() -> None:
    layer, x = nn.Linear(4, 4).eval(), torch.randn(6, 4)
    layer.register_buffer("shift", torch.zeros(4, dtype=torch.float64))
    with pytest.raises(BadInput, match="does not hold float32"):
        Narrow.of(layer, layer.forward, (x,), {})


def test_a_model_that_counts_its_calls_is_not_asked_again_at_every_one() -> None:
    made, _ = _in_bfloat16(_Counts().eval(), torch.randn(6, 4))
    with torch.no_grad():
        for _ in range(10):
            made(torch.randn(6, 4))
    assert made.calls == 11  # one pass told that it counts


def test_what_was_refused_is_tried_again_once_other_weights_stay() -> None:
    class _Offset(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.offset = nn.Linear(4, 4), nn.Parameter(torch.tensor(1000.0))

        def forward(self, x: Tensor) -> Tensor:
            return (self.inner(x) + self.offset - self.offset).relu() - 1.0

    x = torch.randn(6, 4)
    made, execution = _in_bfloat16(_Offset().eval(), x)
    with torch.no_grad():
        assert torch.equal(made(x), execution._plain(x))  # what is left of large numbers is lost
        made.offset.zero_()
        plain = execution._plain(x)
        assert torch.equal(made(x), plain)
        assert not torch.equal(made(x), plain)
        assert execution.compiled(x)


def test_a_size_that_takes_another_path_runs_in_float32_and_the_others_go_on() -> None:
    model = _Creates(4).eval()
    made, execution = _in_bfloat16(model, torch.randn(6, 4))
    x, few = torch.randn(6, 4), torch.randn(3, 4)
    with torch.no_grad():
        found = made(x)
        assert torch.equal(made(few), model(few))
        assert torch.equal(made(x), found)
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            made(torch.randn(6, 5))
        assert torch.equal(made(x), found)
    assert execution.compiled(x)


def test_integer_inputs_and_named_ones_are_left_and_nested_results_are_float32() -> None:
    class _Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.inner = nn.Embedding(1000, 8), nn.Linear(8, 4)

        def forward(self, ids: Tensor, scale: Tensor) -> tuple[Tensor, list[Tensor]]:
            out = self.inner(self.table(ids)) * scale
            return out.softmax(-1), [out.argmax(-1)]

    model = _Two().eval()
    given = {"ids": torch.randint(0, 1000, (3, 5)), "scale": torch.rand(3, 5, 1)}
    made = apply_edits(model, [RunCompiled.on(given, "bfloat16")])
    with torch.no_grad():
        (probabilities, (places,)), (expected, _) = made(**given), model(**given)
    assert made.__dict__["forward"].compiled(given)
    assert (probabilities.dtype, places.dtype) == (torch.float32, torch.int64)
    assert difference(expected, probabilities) < 0.02


# The lever


def _task(model: nn.Module, x: Tensor) -> Task:
    data = x, torch.zeros(len(x), dtype=torch.long)
    return Task(model, data, data, data, nn.functional.cross_entropy, lambda out, target: out[:, 0])


@pytest.mark.parametrize(("ratio", "sites"), [(0.84, 1), (0.86, 0)])
def test_in_fit_it_must_be_well_faster_than_a_float32_program(
    ratio: float, sites: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny, asked = case("cnn"), []
    original = tiny.model

    def told(models: Any, example: Any, *, rounds: int) -> np.ndarray:
        asked.append(rounds)
        assert models[0] is original
        assert [model.__dict__["forward"].arithmetic for model in models[1:]] == [None, "bfloat16"]
        assert all(model.__dict__["forward"].compiled(example) for model in models[1:])
        return np.tile([1.0, 0.7, 0.7 * ratio], (rounds, 1))

    monkeypatch.setattr(passes, "interleaved", told)
    procedure = Bfloat16Passes().for_costs(("latency", "size"))
    for _ in range(2):
        assert len(procedure.applies_to(original, tiny.task)) == sites
    assert len(CompiledPasses().for_costs(["latency"]).applies_to(original, tiny.task)) == 1
    assert len(asked) == 1  # what it takes without rounding was measured beside it
    reasons = [refusal.reason for refusal in procedure.refusals(original, tiny.task)]
    assert ["takes 0.86 of the time" in reason for reason in reasons] == [True] * (1 - sites)
    assert Bfloat16Passes().for_costs(["size"]).applies_to(original, tiny.task) == []


def test_where_float32_has_no_program_it_is_compared_with_python(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = case("cnn")
    original = tiny.model
    monkeypatch.setattr(execution_module, "TOLERANCE", -1.0)
    monkeypatch.setattr(passes, "interleaved", lambda models, example, *, rounds: np.tile([1.0, 0.5], (rounds, 1)))
    assert len(Bfloat16Passes(timed=True).applies_to(original, tiny.task)) == 1
    plain = CompiledPasses(timed=True)
    assert plain.applies_to(original, tiny.task) == []
    assert "cannot be compiled" in plain.refusals(original, tiny.task)[0].reason


def test_one_of_the_two_runs_a_model() -> None:
    tiny = case("cnn")
    made = Bfloat16Passes().apply(tiny.model, tiny.task, 0.3)
    assert history(made) == (RunCompiled.on(tiny.task.example, "bfloat16"),)
    for other in (Bfloat16Passes(), CompiledPasses()):
        assert other.applies_to(made, tiny.task) == []


def test_scores_are_those_of_the_rounded_model_in_every_batch() -> None:
    x = torch.randn(11, 6)  # a batch of 8, which has a program, and one of 3, which has none
    model = _mlp()
    task = _task(model, x)
    task.batch_size = 8
    made = Bfloat16Passes().apply(model, task, 1.0)
    scores = evaluate(made, task, task.val)
    assert made.__dict__["forward"].compiled(x[:8])
    assert torch.equal(scores, scores.bfloat16().float())  # all of them are numbers of 8 bits
    assert not torch.equal(evaluate(model, task, task.val), scores)
    assert difference(_rounded(model, x)[:, 0], scores) < 2**-5


@pytest.mark.parametrize("form", ["torch", "onnx"])
def test_what_is_exported_computes_in_float32_and_says_so(form: str, tmp_path: Path) -> None:
    tiny = case("cnn")
    made = Bfloat16Passes().apply(tiny.model, tiny.task, 1.0)
    line = export_model(made, tiny.task.example, tmp_path, form)
    assert "in float32, which it computes in; the model's own passes are bfloat16's" in line
    assert float(line.rpartition("largest difference ")[2].split()[0]) < 1e-5
    plain = export_model(CompiledPasses().apply(tiny.model, tiny.task, 1.0), tiny.task.example, tmp_path, form)
    assert "bfloat16" not in plain
