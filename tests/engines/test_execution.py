"""Compiled passes: outputs against Python's, and Python wherever a program would be wrong."""

from __future__ import annotations

import copy
import logging
import pickle
from collections.abc import Callable
from typing import Any, NamedTuple

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from torchgraft.bench.meters import macs, params, size
from torchgraft.bench.models import ResidualNet, VisionTransformer
from torchgraft.engines.control_flow import compiled as compiled_module
from torchgraft.engines.control_flow import execution as execution_module
from torchgraft.engines.control_flow import onnx_bytes, onnx_session
from torchgraft.engines.control_flow.compiled import difference
from torchgraft.engines.control_flow.execution import Execution, RunCompiled, compiled_pass
from torchgraft.engines.control_flow.fused import fused, traits
from torchgraft.engines.surgery.edits import apply_edits, edit_from_record, edit_to_record
from torchgraft.errors import BadInput


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.LayerNorm(16), nn.Linear(16, 3)).eval()


def _compiled(model: nn.Module, example: Any) -> tuple[nn.Module, Execution]:
    made = apply_edits(model, [RunCompiled.on(example)])
    found = made.__dict__["forward"]
    assert isinstance(found, Execution)
    return made, found


def _is_served(execution: Execution, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Return a function that says how many calls Python has answered since."""
    calls = [0]
    plain = execution._plain

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        return plain(*args, **kwargs)

    monkeypatch.setattr(execution, "_plain", counted)

    def told() -> int:
        seen, calls[0] = calls[0], 0
        return seen

    return told


# What a trace must know


class _Branch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if bool(x.sum() > 0) else x - 1


class _Picks(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[x > 0].sum()


class _Reads(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * float(x.max())


class _Noisy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.rand(x.shape) + x * x - x


class _Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.get_buffer("calls").add_(1)
        return x + self.get_buffer("calls") * x - x


@pytest.mark.parametrize("model", [_Branch(), _Picks(), _Reads()])
def test_what_asks_for_values_decides(model: nn.Module) -> None:
    assert traits(model, (torch.ones(2),)).decides


def test_straight_networks_neither_decide_nor_draw_nor_write() -> None:
    x = torch.randn(2, 1, 8, 8)
    for model in (VisionTransformer(d_model=8, depth=1, num_heads=2), ResidualNet(widths=(4, 8), depth=1)):
        found = traits(model.train(), (x,))
        assert (found.decides, found.draws, found.writes) == (False, False, False)
        assert found.operators > 10
        assert all(module.training for module in model.modules())


def test_draws_and_writes_are_seen_and_the_random_state_is_left() -> None:
    state = torch.random.get_rng_state()
    assert traits(_Noisy(), (torch.ones(2),)).draws
    assert torch.equal(state, torch.random.get_rng_state())
    assert traits(_Counts(), (torch.ones(2),)).writes


# Programs


def test_a_program_gives_what_the_model_gives_on_other_inputs() -> None:
    for model, shape in ((_mlp(), (5, 6)), (ResidualNet(widths=(4, 8), depth=1).eval(), (3, 1, 8, 8))):
        program = fused(model, (torch.randn(shape),))
        for _ in range(4):
            x = torch.randn(shape)
            with torch.no_grad():
                assert difference(model(x), program(x)) < 1e-5


def test_a_program_holds_float64_to_twelve_digits() -> None:
    model = _mlp().double()
    program = fused(model, (torch.randn(5, 6, dtype=torch.float64),))
    x = torch.randn(5, 6, dtype=torch.float64)
    with torch.no_grad():
        assert difference(model(x), program(x)) < 1e-12


def test_the_switch_of_the_fusion_is_put_back() -> None:
    before = torch.jit.onednn_fusion_enabled()
    try:
        for mode in (False, True):
            torch.jit.enable_onednn_fusion(mode)
            fused(_mlp(), (torch.randn(2, 6),))
            assert torch.jit.onednn_fusion_enabled() == mode
    finally:
        torch.jit.enable_onednn_fusion(before)


def test_what_cannot_be_traced_is_refused_in_one_line() -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return object()

    with pytest.raises(BadInput, match="Odd cannot be traced") as caught:
        fused(Odd(), (torch.ones(2),))
    assert "\n" not in str(caught.value)
    with pytest.raises(BadInput, match="not both"):
        fused(_mlp(), (torch.ones(2, 6),), {"x": torch.ones(2)})


class _Escapes(nn.Module):
    """Half of its arithmetic happens where no trace sees it."""

    def forward(self, x: Tensor) -> Tensor:
        outside = torch.from_numpy(np.tanh(x.detach().numpy()))
        return (x * 2 + outside).relu() + x


def test_a_program_that_does_not_read_its_inputs_is_found_out() -> None:
    x = torch.randn(3, 4)
    program = fused(_Escapes(), (x,))
    assert difference(_Escapes()(x), program(x)) < 1e-6  # on the input that it was made from it looks right
    with pytest.raises(BadInput, match="differ from the model's"):
        compiled_pass(_Escapes(), (x,), {})


def test_inputs_that_prove_nothing_are_not_compiled_for() -> None:
    with pytest.raises(BadInput, match="same backwards"):
        compiled_pass(_mlp(), (torch.zeros(2, 6),), {})


@pytest.mark.parametrize(("model", "why"), [(_Noisy(), "random"), (_Counts(), "buffers"), (nn.ReLU(), "no operators")])
def test_what_a_program_cannot_do_is_refused(model: nn.Module, why: str) -> None:
    with pytest.raises(BadInput, match=why):
        compiled_pass(model.eval(), (torch.randn(2, 3),), {})


# Execution


def test_the_model_stays_what_it_was() -> None:
    model, x = ResidualNet(widths=(4, 8), depth=1).eval(), torch.randn(4, 1, 8, 8)
    made, _ = _compiled(model, x)
    assert type(made) is type(model)
    assert list(made.state_dict()) == list(model.state_dict())
    assert [name for name, _ in made.named_modules()] == [name for name, _ in model.named_modules()]
    assert "forward" not in model.__dict__
    for cost in (params, size):
        assert cost(made) == cost(model)
    assert macs(made, x) == macs(model, x) > 0


def test_it_serves_eval_without_gradients_and_python_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = _mlp(), torch.randn(5, 6)
    made, execution = _compiled(model, x)
    assert not execution.compiled(x)
    with torch.no_grad():
        first = made(x)
    assert execution.compiled(x)
    assert difference(model(x), first) < 1e-5
    by_python = _is_served(execution, monkeypatch)
    with torch.no_grad():
        assert torch.equal(made(x), first)
    with torch.inference_mode():
        assert torch.equal(made(x), first)
    assert by_python() == 0

    out = made(x)  # gradients
    assert by_python() == 1
    assert out.requires_grad
    with torch.no_grad():
        made(torch.randn(4, 6))  # another size
        made(
            x.double().float()[:, :].clone().requires_grad_()
        )  # what wants a gradient in no_grad is a tensor like others
        assert by_python() == 1
        made.train()(x)
        assert by_python() == 1
        made.eval()
        made[1].train()(x)
        assert by_python() == 0
        made(x)
        assert by_python() == 1
        made.eval()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert made(x).dtype == torch.bfloat16
        assert by_python() == 1
        handle = made[0].register_forward_hook(lambda module, args, out: out + 1)
        assert torch.equal(made(x), model[3](model[2](model[1](model[0](x) + 1))))
        assert by_python() == 1
        handle.remove()
        with FlopCounterMode(display=False) as counted:
            made(x)
        assert by_python() == 1
        assert counted.get_total_flops() == 2 * 5 * (6 * 16 + 16 * 3)
        torch.func.vmap(made)(x[None])
        assert by_python() == 1
        made(x)
        assert by_python() == 0


def test_hooks_of_the_model_itself_run_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made, execution = _compiled(_mlp(), torch.randn(5, 6))
    x = torch.randn(5, 6)
    with torch.no_grad():
        expected = made[3](made[2](made[1](made[0](x)))) * 2
        handle = made.register_forward_hook(lambda module, args, out: out * 2)
        assert torch.equal(made(x), expected)
        handle.remove()
        made(x)
        assert execution.compiled(x)
        by_python = _is_served(execution, monkeypatch)
        made.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
        made(x)
        assert by_python() == 1


def test_float64_of_a_converted_model_is_pythons(monkeypatch: pytest.MonkeyPatch) -> None:
    made, execution = _compiled(_mlp(), torch.randn(5, 6))
    by_python = _is_served(execution, monkeypatch)
    with torch.no_grad():
        assert made.double()(torch.randn(5, 6, dtype=torch.float64)).dtype == torch.float64
    assert by_python() == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model[0].weight.mul_(2.0),
        lambda model: model.load_state_dict({name: value + 0.5 for name, value in model.state_dict().items()}),
        lambda model: setattr(model[0], "weight", nn.Parameter(model[0].weight * 3.0)),
        lambda model: model.__setitem__(1, nn.ReLU().eval()),
        lambda model: model.append(nn.Tanh().eval()),
        lambda model: setattr(model[0], "bias", None),
    ],
    ids=["in place", "loaded", "another parameter", "another module", "one more module", "a bias gone"],
)
def test_changed_weights_and_modules_are_seen(change: Callable[[Any], object]) -> None:
    made, execution = _compiled(_mlp(), torch.randn(5, 6))
    x = torch.randn(5, 6)
    with torch.no_grad():
        old = made(x)
        assert execution.compiled(x)
        change(made)
        expected = execution._plain(x)
        assert difference(old, expected) > 1e-3
        assert torch.equal(made(x), expected)  # Python, at first
        assert difference(expected, made(x)) < 1e-5
        assert execution.compiled(x)  # then a program anew


class _Switched(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.depth, self.scale = nn.Linear(4, 4), 1, 1.0

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.depth):
            x = self.inner(x).relu() * self.scale
        return x


@pytest.mark.parametrize(
    "change",
    [
        lambda model: setattr(model, "depth", 2),
        lambda model: setattr(model, "scale", 3.0),
        lambda model: delattr(model, "scale") or setattr(type(model), "scale", 3.0),
    ],
    ids=["a number", "a factor", "one that is gone"],
)
def test_changed_attributes_are_seen(change: Callable[[Any], object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_Switched, "scale", 3.0, raising=False)
    model, x = _Switched().eval(), torch.randn(2, 4)
    made, execution = _compiled(model, x)
    with torch.no_grad():
        old = made(x)
        assert execution.compiled(x)
        change(made)
        expected = execution._plain(x)
        assert difference(old, expected) > 1e-3
        assert torch.equal(made(x), expected)
        assert difference(expected, made(x)) < 1e-5


def test_a_first_call_on_zeros_does_not_stand_in_the_way() -> None:
    made, execution = _compiled(_mlp(), torch.randn(5, 6))
    x = torch.randn(5, 6)
    with torch.no_grad():
        made(torch.zeros(5, 6))
        assert not execution.compiled(x)
        made(x)
    assert execution.compiled(x)


def test_models_of_several_budgets_run_as_python() -> None:
    model = _mlp()
    model[0].set_budget = lambda budget: None
    with pytest.raises(BadInput, match="budgets"):
        compiled_pass(model, (torch.randn(5, 6),), {})


def test_whatever_a_compiler_raises_python_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*given: Any) -> Any:
        raise KeyError("inside")

    monkeypatch.setattr(execution_module, "compiled_pass", fails)
    made, execution = _compiled(_mlp(), torch.randn(5, 6))
    x = torch.randn(5, 6)
    with torch.no_grad():
        assert torch.equal(made(x), execution._plain(x))
    with torch.no_grad(), pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        apply_edits(_mlp(), [RunCompiled.on(torch.randn(5, 7))])(torch.randn(5, 7))  # the model's own words


def test_batch_norm_statistics_are_seen() -> None:
    model, x = ResidualNet(widths=(4, 8), depth=1).eval(), torch.randn(4, 1, 8, 8)
    made, _ = _compiled(model, x)
    with torch.no_grad():
        old = made(x)
        made.train()(torch.randn(16, 1, 8, 8) * 3)
        made.eval()
        new = made(x)
        assert difference(old, new) > 1e-3
        assert difference(new, made(x)) < 1e-5


def test_weights_that_change_at_every_call_are_not_compiled_at_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    made, _ = _compiled(_mlp(), torch.randn(5, 6))
    x, times = torch.randn(5, 6), [0]
    real = execution_module.compiled_pass

    def counted(*given: Any) -> Any:
        times[0] += 1
        return real(*given)

    monkeypatch.setattr(execution_module, "compiled_pass", counted)
    with torch.no_grad():
        made(x)
        for _ in range(5):
            made[0].weight.mul_(1.1)
            made(x)
    assert times[0] == 1


def test_copies_and_pickles_have_programs_of_their_own() -> None:
    made, execution = _compiled(_mlp(), torch.randn(5, 6))
    x = torch.randn(5, 6)
    with torch.no_grad():
        out = made(x)
        for twin in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
            own = twin.__dict__["forward"]
            assert own is not execution
            assert own.model is twin
            assert torch.equal(twin(x), out)
            twin[0].weight.zero_()
            assert not torch.equal(twin(x), out)
        assert torch.equal(made(x), out)


class _Output(dict[str, Tensor]):
    """A result whose entries are attributes too, as in transformers."""

    @property
    def logits(self) -> Tensor:
        return self["logits"]


class _Pair(NamedTuple):
    logits: Tensor
    other: Tensor


@pytest.mark.parametrize("make", [lambda y: _Output(logits=y), lambda y: _Pair(y, y * 2)], ids=["dict", "tuple"])
def test_results_of_a_models_own_types_stay_what_they_are(make: Callable[[Tensor], Any]) -> None:
    class Wraps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = _mlp()

        def forward(self, x: Tensor) -> Any:
            return make(self.inner(x))

    model, x = Wraps().eval(), torch.randn(5, 6)
    made, _ = _compiled(model, x)
    with torch.no_grad():
        expected, found = model(x), made(x)
    assert type(found) is type(expected)
    assert difference(expected.logits, found.logits) < 1e-5


def test_keyword_and_several_arguments() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(3, 4)

        def forward(self, left: Tensor, right: Tensor) -> dict[str, Tensor]:
            sum_ = self.a(left) + self.b(right)
            return {"sum": sum_, "gate": sum_.sigmoid()}

    left, right = torch.randn(2, 4), torch.randn(2, 3)
    for example in ({"left": left, "right": right}, (left, right)):
        model = Two().eval()
        made, execution = _compiled(model, example)
        with torch.no_grad():
            found = made(**example) if isinstance(example, dict) else made(*example)
            assert execution.compiled(example)
            expected = model(left, right)
        assert found.keys() == expected.keys()
        assert difference(expected, found) < 1e-5
    with torch.no_grad():
        assert difference(expected, made(left, right=right)) < 1e-6  # mixed: Python


def test_a_model_that_decides_runs_as_a_host_over_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    class Exits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = torch.tanh(self.first(x)) + x
            if y.mean() > 0:
                return y
            return torch.tanh(self.second(y)) + y

    model = Exits().eval()
    made, execution = _compiled(model, torch.randn(1, 4))
    inputs = torch.randn(60, 1, 4)
    with torch.no_grad():
        made(inputs[0])
        assert execution.compiled(inputs[0])
        by_python = _is_served(execution, monkeypatch)
        early = 0
        for x in inputs:
            y = torch.tanh(model.first(x)) + x
            early += bool(y.mean() > 0)
            assert difference(model(x), made(x)) < 1e-5
    assert by_python() == 0
    assert 10 < early < 50


def test_a_failed_compilation_is_python_and_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    x = torch.randn(3, 4)
    made, execution = _compiled(_Escapes().eval(), x)
    with torch.no_grad(), caplog.at_level(logging.INFO, "torchgraft"):
        for _ in range(3):
            y = torch.randn(3, 4)
            assert torch.equal(made(y), _Escapes()(y))
    assert not execution.compiled(x)
    assert [record.message for record in caplog.records if "runs as Python" in record.message] == caplog.messages[:1]


def test_programs_follow_the_number_of_threads() -> None:
    made, execution = _compiled(_mlp(), torch.randn(5, 6))
    x, threads = torch.randn(5, 6), torch.get_num_threads()
    with torch.no_grad():
        out = made(x)
        try:
            before = dict(execution._programs)
            torch.set_num_threads(threads + 1)
            assert difference(out, made(x)) < 1e-5
            made(x)
            assert execution.compiled(x)
            assert all(execution._programs[form] is not before[form] for form in before)  # one for that many
        finally:
            torch.set_num_threads(threads)


def test_export_and_torch_compile_see_the_model() -> None:
    model, x = _mlp(), torch.randn(5, 6)
    made, _ = _compiled(model, x)
    with torch.no_grad():
        made(x)
        exported = torch.export.export(made, (x,), strict=False).module()
        assert difference(model(x), exported(x)) < 1e-6
        assert difference(model(x), torch.compile(made, backend="eager")(x)) < 1e-6
        session = onnx_session(onnx_bytes(made, (x,)), 1)
        assert difference(model(x), torch.from_numpy(session([x.numpy()])[0])) < 1e-5
        assert any(node.target == "call_function" or "linear" in str(node.target) for node in exported.graph.nodes)


def test_it_trains_and_then_answers_as_it_has_learned() -> None:
    made, _ = _compiled(_mlp(), torch.randn(5, 6))
    x, y = torch.randn(5, 6), torch.randint(0, 3, (5,))
    with torch.no_grad():
        before = made(x)
    optimiser = torch.optim.SGD(made.parameters(), lr=0.5)
    made.train()
    for _ in range(5):
        optimiser.zero_grad()
        F.cross_entropy(made(x), y).backward()
        optimiser.step()
    made.eval()
    with torch.no_grad():
        first, second = made(x), made(x)
    assert difference(before, first) > 1e-2
    assert difference(first, second) < 1e-5


# The edit


def test_the_edit_goes_through_plain_data_and_adds_sizes() -> None:
    small, large = torch.randn(2, 6), torch.randn(7, 6)
    edit = RunCompiled.on(small)
    assert edit_from_record(edit_to_record(edit)) == edit
    assert edit.describe() == {"(model)": "one compiled program for inputs of 2x6"}
    made = apply_edits(_mlp(), [edit, RunCompiled.on(large)])
    with torch.no_grad():
        made(small), made(large)
    execution = made.__dict__["forward"]
    assert execution.compiled(small)
    assert execution.compiled(large)


@pytest.mark.parametrize(
    "fields",
    [
        {"sizes": [[2]], "kinds": []},
        {"sizes": [[2]], "kinds": ["float33"]},
        {"sizes": [[2]], "kinds": ["nn"]},
        {"sizes": [[2]], "kinds": ["float32"], "names": ["a", "b"]},
    ],
)
def test_a_damaged_edit_is_refused(fields: dict[str, Any]) -> None:
    record = {"op": "run-compiled", "home": RunCompiled.__module__, **fields}
    with pytest.raises(BadInput, match="run-compiled"):
        edit_from_record(record)


def test_a_forward_of_the_users_own_is_not_thrown_away() -> None:
    model = _mlp()
    model.__dict__["forward"] = lambda x: x
    with pytest.raises(BadInput, match="something else"):
        RunCompiled.on(torch.randn(2, 6)).rewrite(model)


@hypothesis.settings(max_examples=15, deadline=None)
@hypothesis.given(
    batch=st.integers(1, 6),
    width=st.integers(1, 9),
    depth=st.integers(1, 3),
    norm=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_small_network_gives_the_same(batch: int, width: int, depth: int, norm: bool, seed: int) -> None:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [nn.Linear(width, width), nn.LayerNorm(width) if norm and width > 1 else nn.SiLU()]
    model = nn.Sequential(*layers, nn.Linear(width, 2)).eval()
    made, _ = _compiled(model, torch.randn(batch, width))
    with torch.no_grad():
        for _ in range(3):
            x = torch.randn(batch, width)
            assert difference(model(x), made(x)) < 1e-4


def test_the_backends_of_dynamic_networks_name_the_new_one() -> None:
    assert "fused" in compiled_module.BACKENDS
