"""Structured magnitude pruning: scores by hand, and what every width procedure promises about strength and cost."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchgraft.bench.models import ResidualNet, VisionTransformer
from torchgraft.bench.task import Task
from torchgraft.engines.surgery.edits import edit_from_record, edit_to_record, history
from torchgraft.engines.width import Study, WidthProcedure, prepare, study, uses_per_entry
from torchgraft.errors import BadInput
from torchgraft.shrink.prune.magnitude_pruning import MagnitudePruning, magnitude_scores
from torchgraft.shrink.prune.random_pruning import RandomPruning


def _correct(output: Tensor, target: Tensor) -> Tensor:
    return (output.argmax(-1) == target).float()


def _task(model: nn.Module, shape: tuple[int, ...] = (1, 8, 8), classes: int = 10, samples: int = 48) -> Task:
    generator = torch.Generator().manual_seed(0)
    dtype = next(model.parameters()).dtype
    x = torch.randn(samples, *shape, generator=generator, dtype=dtype)
    y = torch.randint(0, classes, (samples,), generator=generator)
    return Task(model, (x, y), (x, y), (x, y), F.cross_entropy, _correct, batch_size=16)


def _mlp() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)).double()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[3.0, 0.0], [0.0, 1.0], [2.0, 2.0]]))
        model[0].bias.copy_(torch.tensor([4.0, 0.0, 1.0]))
        model[2].weight.copy_(torch.tensor([[0.0, 2.0, 0.0], [0.0, 2.0, 4.0]]))
    return model.eval()


def test_score_is_the_norm_of_what_goes_with_a_unit() -> None:
    found = prepare(_mlp(), torch.zeros(2, 2, dtype=torch.float64))
    scores = magnitude_scores(found)
    assert list(scores) == ["0"]
    # Incoming weights, bias and outgoing weights of each hidden unit.
    expected = torch.tensor([9.0 + 16.0, 1.0 + 4.0 + 4.0, 4.0 + 4.0 + 1.0 + 16.0], dtype=torch.float64).sqrt()
    torch.testing.assert_close(scores["0"], expected, rtol=0, atol=1e-15)


def test_the_weakest_unit_goes_and_the_rest_is_untouched() -> None:
    model = _mlp()
    cut = MagnitudePruning().apply(model, _task(model, (2,), 2), 0.4)
    assert torch.equal(cut[0].weight, model[0].weight[[0, 2]])
    assert torch.equal(cut[2].weight, model[2].weight[:, [0, 2]])


def test_cost_of_a_cut_is_exact_where_cuts_overlap() -> None:
    model = nn.Sequential(
        nn.Linear(4, 5, bias=False), nn.ReLU(), nn.Linear(5, 6, bias=False), nn.ReLU(), nn.Linear(6, 3)
    )
    found = prepare(model, torch.zeros(2, 4))
    samples = 2
    assert found.cost({}) == samples * (4 * 5 + 5 * 6 + 6 * 3)
    keep = {"0": [0, 2], "2": [1, 2, 3]}
    assert found.cost(keep) == samples * (4 * 2 + 2 * 3 + 3 * 3)
    assert found.unit_costs()["0"].tolist() == [samples * (4 + 6)] * 5


def test_uses_count_positions_of_convolutions() -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3, stride=2, padding=1), nn.ConvTranspose2d(2, 3, 2, stride=2), nn.Linear(8, 5)
    )
    uses = uses_per_entry(model, torch.zeros(2, 1, 8, 8))
    assert uses["0.weight"] == 2 * 4 * 4
    assert uses["1.weight"] == 2 * 4 * 4  # every input position meets every weight once
    assert uses["2.weight"] == 2 * 3 * 8
    assert uses["0.bias"] == 0


_MODELS = {
    "vit": lambda: VisionTransformer(d_model=32, depth=2, num_heads=4),
    "cnn": lambda: ResidualNet(widths=(8, 16), depth=1),
}


@pytest.fixture(scope="module", params=list(_MODELS))
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, Task]:
    torch.manual_seed(0)
    model = _MODELS[request.param]().eval()
    return model, _task(model)


@pytest.mark.parametrize("procedure", [MagnitudePruning(), MagnitudePruning(spread="uniform"), RandomPruning()])
def test_cuts_are_nested_and_remove_what_the_strength_says(
    case: tuple[nn.Module, Task], procedure: WidthProcedure
) -> None:
    model, task = case
    found = study(model, task)
    whole = found.cost({})
    strengths = [0.1, 0.3, 0.5, 0.7, 0.9, 1.0]
    kept = [procedure.keep(model, task, strength) for strength in strengths]
    most = whole - found.cost(kept[-1])
    for strength, keep in zip(strengths, kept, strict=True):
        share = (whole - found.cost(keep)) / most
        assert strength - 1e-9 <= share <= strength + 0.25  # small models are cut in coarse steps
    for before, after in itertools.pairwise(kept):
        for name, group in found.groups.items():
            everything = list(range(group.size))
            assert set(after.get(name, everything)) <= set(before.get(name, everything))
    for name, group in found.groups.items():
        assert len(kept[-1][name]) == procedure.ladders(found)[name][-1] < group.size


def test_the_cut_replays_from_its_record(case: tuple[nn.Module, Task]) -> None:
    model, task = case
    before = copy.deepcopy(model.state_dict())
    cut = MagnitudePruning().apply(model, task, 0.6)
    again = copy.deepcopy(model)
    for edit in history(cut):
        again = edit_from_record(edit_to_record(edit)).rewrite(again)
    assert {n: v.shape for n, v in again.state_dict().items()} == {n: v.shape for n, v in cut.state_dict().items()}
    again.load_state_dict(cut.state_dict())
    with torch.no_grad():
        assert torch.equal(again.eval()(task.train.inputs), cut.eval()(task.train.inputs))
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_exact_cut_equals_mask_and_masking_ends(case: tuple[nn.Module, Task]) -> None:
    model, task = case
    procedure = MagnitudePruning(exact_only=True)
    keep = procedure.keep(model, task, 0.5)
    cut = procedure.apply(model, task, 0.5).eval()
    found = study(model, task, exact_only=True)
    assert all(group.exact for group in found.groups.values())
    with torch.no_grad():
        whole = found.model(task.train.inputs)
        with found.cut(keep) as masked:
            torch.testing.assert_close(cut(task.train.inputs), masked(task.train.inputs), rtol=1e-5, atol=1e-5)
            assert not torch.equal(masked(task.train.inputs), whole)
        assert torch.equal(found.model(task.train.inputs), whole)


def test_kept_counts_of_wide_groups_are_multiples() -> None:
    model = VisionTransformer(d_model=32, depth=1, num_heads=4).eval()
    task = _task(model)
    for strength in (0.3, 0.8):
        for name, units in MagnitudePruning(multiple=8).keep(model, task, strength).items():
            size = study(model, task).groups[name].size
            assert size < 32 or len(units) % 8 == 0


def test_ignored_modules_keep_their_size() -> None:
    model = VisionTransformer(d_model=32, depth=2, num_heads=4).eval()
    task = _task(model)
    cut = MagnitudePruning().apply(model, task, 0.9, ignore=("blocks.0",))
    assert cut.blocks[0].mlp.fc1.weight.shape == model.blocks[0].mlp.fc1.weight.shape
    assert cut.blocks[1].mlp.fc1.weight.shape != model.blocks[1].mlp.fc1.weight.shape


def test_multihead_attention_is_converted_and_its_heads_are_cut() -> None:
    model = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, dropout=0.0).eval()
    task = _task(nn.Sequential(model, nn.Flatten(), nn.Linear(16 * 3, 10)), (3, 16))
    cut = MagnitudePruning(exact_only=True).apply(task.trained(), task, 0.7)
    assert type(cut[0].self_attn) is not nn.MultiheadAttention
    assert [edit.op for edit in history(cut)] == ["convert", "slice"]
    assert cut(task.train.inputs).shape == (48, 10)


def test_a_study_is_remembered_until_the_model_changes() -> None:
    model = _mlp()
    task = _task(model, (2,), 2)
    first = study(model, task)
    assert study(model, task) is first
    with torch.no_grad():
        model[0].weight.mul_(2.0)
    second = study(model, task)
    assert second is not first
    assert isinstance(second, Study)
    assert torch.equal(second.model[0].weight, model[0].weight)


def test_a_study_with_other_settings_does_not_look_for_what_is_coupled_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = VisionTransformer(d_model=16, depth=1, num_heads=2).eval()
    task = _task(model)
    fresh = study(copy.deepcopy(model), task, exact_only=True, cost="parameters")
    first = study(model, task)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("traced again")

    monkeypatch.setattr("torchgraft.engines.width.structure", refuse)
    other = study(model, task, exact_only=True, cost="parameters")
    assert other is not first
    assert other.structure is first.structure
    assert set(other.groups) == set(fresh.groups)
    assert {name: float(use) for name, use in other.uses.items()} == {n: float(u) for n, u in fresh.uses.items()}
    assert study(model, task, exact_only=True, cost="parameters") is other
    with torch.no_grad():
        next(model.parameters()).add_(1.0)
    with pytest.raises(AssertionError, match="traced again"):
        study(model, task, exact_only=True)


def test_random_depends_on_the_seed_alone() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 30), nn.ReLU(), nn.Linear(30, 3)).eval()
    task = _task(model, (4,), 3)
    kept = [RandomPruning().keep(model, task, 0.5, seed=seed)["0"] for seed in (0, 0, 1)]
    assert kept[0] == kept[1] != kept[2]


def test_bad_settings_are_refused() -> None:
    with pytest.raises(BadInput, match="spread"):
        MagnitudePruning(spread="everywhere")  # type: ignore[arg-type]  # the point of the test
    with pytest.raises(BadInput, match="floor"):
        MagnitudePruning(floor=1.0)
    model = nn.Sequential(nn.Linear(4, 2)).eval()
    with pytest.raises(BadInput, match="nothing to act on"):
        MagnitudePruning().apply(model, _task(model, (4,), 2), 0.5)
