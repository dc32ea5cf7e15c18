"""CoreInfer as a lever of fit: one pass against a loop over sequences, what depends on what, what budgets cost."""

from __future__ import annotations

import copy
import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import torchgraft
from torchgraft.bench.meters import macs
from torchgraft.bench.models import ByteTransformer, VisionTransformer
from torchgraft.bench.task import Task
from torchgraft.elastic.coreinfer import CoreNeurons, core_sets
from torchgraft.engines import recipe
from torchgraft.engines.nesting import core_neurons
from torchgraft.engines.nesting.core_neurons import CoreModel, KeepCores, batched_cores
from torchgraft.engines.surgery.edits import history
from torchgraft.engines.taps import intervene, record
from torchgraft.errors import BadInput
from torchgraft.fit.elastic import STEPS, paced
from torchgraft.parts.blocks.sequence_model import SequenceModel
from torchgraft.parts.mixers.softmax_attention import SoftmaxAttention


def plain() -> nn.Module:
    torch.manual_seed(0)
    return ByteTransformer(16, 12, d_model=8, depth=3, num_heads=2, spread=1.0).double().eval()


def gated() -> nn.Module:
    torch.manual_seed(0)
    return SequenceModel(8, 3, SoftmaxAttention, vocab_size=16, hidden=32).double().eval()


def tokens(rows: int = 1, length: int = 8) -> Tensor:
    return torch.randint(16, (rows, length), generator=torch.Generator().manual_seed(1))


class Rectified(nn.Module):
    """A causal model of sparse ReLU layers, two of whose neurons never fire."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.first, self.second = (
            nn.Sequential(nn.Linear(8, 30, bias=bias), nn.ReLU(), nn.Linear(30, 8, bias=bias)) for bias in (True, False)
        )
        self.head = nn.Linear(8, 16)
        with torch.no_grad():
            self.first[0].bias[:2] = -100.0
            self.first[0].bias[2:] -= 0.5

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.embed(x)
        for layer in (self.first, self.second):
            places = torch.arange(1, x.shape[1] + 1, dtype=hidden.dtype)[:, None]
            hidden = hidden + layer(hidden.cumsum(1) / places)
        out: Tensor = self.head(hidden)
        return out


def rectified() -> nn.Module:
    torch.manual_seed(0)
    return Rectified().double().eval()


class Bidirectional(nn.Module):
    """A transformer layer whose tokens all see each other; ``late`` keeps the feed-forward layer before that."""

    def __init__(self, late: bool, pooled: bool = False) -> None:
        super().__init__()
        self.embed, self.pooled, self.late = nn.Embedding(16, 8), pooled, late
        self.mlp = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.embed(x)
        mixed = (self.mlp(hidden) if self.late else hidden) + hidden.mean(1, keepdim=True)
        out: Tensor = mixed if self.late else self.mlp(mixed)
        return out.mean(1) if self.pooled else out


#: Model, the linear layer after the activation in each feed-forward layer, and the one before it.
MODELS = {
    "gelu": (plain, {f"blocks.{i}.mlp": ("fc1", "fc2") for i in range(3)}),
    "gated": (gated, {f"blocks.{i}.channels": ("gate", "down") for i in range(3)}),
    "relu": (rectified, {"first": ("0", "2"), "second": ("0", "2")}),
}
ACTS = {"gelu": F.gelu, "gated": F.silu, "relu": F.relu}


def task_of(model: nn.Module, x: Tensor | None = None) -> Task:
    inputs = tokens(6, 12) if x is None else x
    target = torch.zeros(len(inputs), dtype=torch.long)

    def loss(out: Tensor, _target: Tensor) -> Tensor:
        return out.square().mean()

    return Task(model, (inputs, target), (inputs, target), (inputs, target), loss, lambda o, t: -o.flatten(1).mean(1))


def lever(model: nn.Module, **settings: Any) -> CoreModel:
    made = CoreNeurons(**settings).build(model, task_of(model))
    assert isinstance(made, CoreModel)
    return made


def cores_by_hand(activations: Tensor, token_keep: float, keep: float) -> list[int]:
    """Return the core neurons of one sequence, by loops; (T, N) -> K numbers."""
    rows = activations.tolist()
    count = math.floor(token_keep * sum(value > 0 for row in rows for value in row) / len(rows) + 1e-9)
    width = activations.shape[1]
    counts = [0] * width
    for token in activations:
        for neuron in token.topk(min(count, width)).indices.tolist():
            counts[neuron] += 1
    sums = [sum(max(row[neuron], 0.0) for row in rows) for neuron in range(width)]
    order = sorted(range(width), key=lambda neuron: (-counts[neuron], -sums[neuron], neuron))
    return sorted(order[: math.floor(keep * width + 1e-9)])


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("prompt", "first"), [(0.25, 3), (0.3, 4), (0.5, 6)])
@pytest.mark.parametrize("rows", [1, 4])
def test_a_pass_is_the_dense_one_with_all_but_the_core_at_zero_after_the_prompt(
    name: str, prompt: float, first: int, rows: int
) -> None:
    model, places = MODELS[name][0](), MODELS[name][1]
    x = tokens(rows, 12)
    elastic = lever(model, prompt=prompt, wanted=(0.2, 0.5), token_keep=0.6)
    with record(model, [f"{layer}.{before}" for layer, (before, _) in places.items()]) as seen:
        dense = model(x)  # what a causal model makes of the prompt is the same at all budgets
    for level, keep in enumerate((0.2, 0.5)):
        masks = {}
        for layer, (before, after) in places.items():
            active = ACTS[name](seen[f"{layer}.{before}"])
            mask = torch.ones_like(active)
            for row in range(rows):
                mask[row, first:] = 0.0
                mask[row, first:, cores_by_hand(active[row, :first], 0.6, keep)] = 1.0
            masks[f"{layer}.{after}"] = lambda hidden, mask=mask: hidden * mask
        with intervene(model, masks, "input"):
            wanted = model(x)
        found = elastic.set_budget(elastic.budgets[level])(x)
        assert torch.allclose(found, wanted, atol=1e-12, rtol=0)
        assert torch.allclose(found[:, :first], dense[:, :first], atol=1e-12, rtol=0)
        assert not torch.allclose(found[:, first:], dense[:, first:], atol=1e-3)


@given(
    st.integers(1, 4),
    st.integers(1, 6),
    st.integers(1, 24),
    st.floats(0.05, 1.0),
    st.floats(0.05, 1.0),
    st.floats(0.0, 1.0),
    st.integers(0, 99),
)
def test_the_sets_of_a_batch_are_those_of_loops(
    rows: int, length: int, width: int, alpha: float, beta: float, active: float, seed: int
) -> None:
    draw = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, length, width, generator=draw, dtype=torch.float64)
    # Many zeros, and equal values beside them: where tokens have fewer positive neurons than count, zeros tie.
    sparse = torch.where(torch.rand(values.shape, generator=draw) < active, values, 0.0)
    sparse[:, :, ::3] = sparse[:, :, ::3].round()
    found = batched_cores(sparse, token_keep=alpha, keep=beta).tolist()
    assert found == [cores_by_hand(one, alpha, beta) for one in sparse]
    assert found == [core_sets(one, token_keep=alpha, keep=beta).tolist() for one in sparse]


@pytest.mark.parametrize("name", MODELS)
def test_what_a_token_says_depends_on_none_after_it(name: str) -> None:
    elastic = lever(MODELS[name][0]())
    x = tokens(3, 12)
    for budget in elastic.budgets:
        before = elastic.set_budget(budget)(x)
        for start in (1, 2, 3, 7, 11):
            other = x.clone()
            other[:, start:] = (other[:, start:] + 5) % 16
            after = elastic(other)
            assert torch.allclose(after[:, :start], before[:, :start], atol=1e-12, rtol=0)
            assert not torch.allclose(after[:, start:], before[:, start:], atol=1e-3)


@pytest.mark.parametrize("name", MODELS)
def test_a_sequence_alone_and_in_chunks_is_what_it_is_in_a_batch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    elastic = lever(MODELS[name][0]())
    x = tokens(5, 12)
    for budget in elastic.budgets:
        batch = elastic.set_budget(budget)(x)
        alone = torch.cat([elastic(x[row : row + 1]) for row in range(5)])
        assert torch.allclose(alone, batch, atol=1e-12, rtol=0)
        with monkeypatch.context() as patch:
            patch.setattr(core_neurons, "_GATHERED", 2 * 8 * 12)
            assert torch.allclose(elastic(x), batch, atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", MODELS)
def test_the_full_budget_is_the_original_bit_for_bit(name: str) -> None:
    model = MODELS[name][0]()
    elastic, x = lever(model), tokens(4, 12)
    assert elastic.budget == 1.0
    assert torch.equal(elastic(x), model(x))
    elastic.set_budget(elastic.budgets[0])(x)
    assert torch.equal(elastic.set_budget(1.0)(x), model(x))
    names = {key.removeprefix("model.").replace(".dense.", ".") for key in elastic.state_dict()}
    assert names == {"shares", *model.state_dict()}


@pytest.mark.parametrize("name", MODELS)
def test_budgets_are_what_is_counted_and_work_falls_by_what_is_left_out(name: str) -> None:
    model, count = MODELS[name][0](), 3 if name == "gated" else 2
    elastic, x = lever(model, wanted=(0.1, 0.3, 0.9)), tokens(5, 12)
    width = {"gelu": 32, "gated": 32, "relu": 30}[name]
    full = macs(model, x)
    for keep, budget in zip((0.1, 0.3, 0.9), elastic.budgets, strict=False):
        found = macs(elastic.set_budget(budget), x)
        left_out = width - math.floor(keep * width)
        assert full - found == len(MODELS[name][1]) * 5 * 9 * count * 8 * left_out
        assert found / full == pytest.approx(budget, rel=1e-6)
    assert macs(elastic.set_budget(1.0), x) == full


def test_gradients_are_those_of_the_neurons_that_run() -> None:
    model = rectified()
    elastic, x = lever(model, wanted=(0.2,), layers=slice(1, 2)), tokens(3, 12)
    with record(model, "second.0") as seen:
        model(x)
    mask = torch.ones(3, 12, 30, dtype=torch.float64)
    for row, active in enumerate(F.relu(seen["second.0"])):
        mask[row, 3:] = 0.0
        mask[row, 3:, cores_by_hand(active[:3], 0.4, 0.2)] = 1.0
    with intervene(model, {"second.2": lambda hidden: hidden * mask}, "input"):
        model(x).square().sum().backward()
    elastic.set_budget(elastic.budgets[0])(x).square().sum().backward()
    inner = {name.replace("second.dense", "second"): value for name, value in elastic.model.named_parameters()}
    for name, value in model.named_parameters():
        assert value.grad is not None
        assert inner[name].grad is not None
        assert torch.allclose(inner[name].grad, value.grad, atol=1e-10), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_types_and_odd_batches(dtype: torch.dtype) -> None:
    model = plain()
    elastic = lever(model, wanted=(0.2,)).to(dtype)
    elastic.set_budget(elastic.budgets[0])
    with torch.no_grad():
        out = elastic(tokens(3, 12))
        assert (out.dtype, out.shape) == (dtype, (3, 12, 16))
        assert bool(torch.isfinite(out).all())
        wanted = model(tokens(3, 12))[:, :3]
        assert torch.allclose(out[:, :3].double(), wanted, atol={torch.float32: 1e-5}.get(dtype, 0.1))
        assert elastic(tokens(0, 12)).shape == (0, 12, 16)
        whole = copy.deepcopy(elastic).set_budget(1.0)(tokens(2, 1))
        assert torch.equal(elastic(tokens(2, 1)), whole), "a token alone is all prompt"


def test_a_recipe_rebuilds_it_with_its_settings(tmp_path: Path) -> None:
    model, x = rectified(), tokens(4, 12)
    task = task_of(model)
    elastic = CoreNeurons(wanted=(0.3, 0.7), prompt=0.5, token_keep=0.9, layers=slice(1, None)).build(model, task)
    recipe.save(elastic.set_budget(elastic.budgets[1]), tmp_path, task="", budget=elastic.budget)
    again = recipe.apply(tmp_path, task=task)
    assert isinstance(again, CoreModel)
    assert (list(again.layers), again.budget, again.budgets) == (["second"], elastic.budget, elastic.budgets)
    for budget in elastic.budgets:
        assert torch.equal(again.set_budget(budget)(x), elastic.set_budget(budget)(x))
    assert elastic.budgets != lever(model, wanted=(0.3, 0.7), layers=slice(1, None)).budgets


def test_layers_are_all_unless_said_and_ignored_ones_stay() -> None:
    model = plain()
    task = task_of(model)
    assert [site.name for site in CoreNeurons().applies_to(model, task)] == [f"blocks.{i}.mlp" for i in range(3)]
    assert [site.name for site in CoreNeurons(layers=slice(1, -1)).applies_to(model, task)] == ["blocks.1.mlp"]
    left = CoreNeurons().applies_to(model, task, ignore=["blocks.0"])
    assert [(site.name, site.size) for site in left] == [("blocks.1.mlp", 32), ("blocks.2.mlp", 32)]
    assert list(lever(model).layers) == [f"blocks.{i}.mlp" for i in range(3)]


class ByRow(nn.Module):
    """A feed-forward layer on vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.mlp(x)
        return out


@pytest.mark.parametrize(
    ("model", "x", "settings", "reason"),
    [
        (ByteTransformer(16, 12, d_model=8, depth=1, num_heads=2), tokens(4, 7), {}, "at least 8 tokens"),
        (ByRow(), torch.randn(4, 8), {}, "at least 8 tokens"),
        (Bidirectional(late=False), tokens(4, 12), {}, "not causal"),
        (Bidirectional(late=False, pooled=True), tokens(4, 12), {}, "not causal"),
        (Bidirectional(late=True), tokens(4, 12), {}, "not causal"),
        (VisionTransformer(d_model=8, depth=1, num_heads=2), torch.randn(4, 1, 8, 8), {}, "not those of the inputs"),
        (rectified(), tokens(4, 12), {"wanted": (0.01, 0.5)}, "30 neurons are too few"),
        (rectified(), tokens(4, 12), {"wanted": (0.5, 0.51)}, "30 neurons are too few"),
        (rectified(), torch.full((4, 12), 3), {}, "end alike"),
    ],
)
def test_where_it_cannot_act_it_says_why(model: nn.Module, x: Tensor, settings: dict[str, Any], reason: str) -> None:
    procedure, task = CoreNeurons(**settings), task_of(model.eval(), x)
    assert procedure.applies_to(model, task) == []
    refused = procedure.refusals(model, task)
    assert refused
    assert all(reason in each.reason for each in refused), refused
    with pytest.raises(BadInput, match="coreinfer finds nothing"):
        procedure.build(model, task)


def test_a_model_that_only_answers_once_is_causal_where_its_layers_are() -> None:
    model = Bidirectional(late=True, pooled=True).eval()
    assert [site.name for site in CoreNeurons().applies_to(model, task_of(model))] == ["mlp"]


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"wanted": ()}, r"wanted .* \(\)"),
        ({"wanted": (0.5, 0.4)}, "wanted"),
        ({"wanted": (0.5, 1.0)}, "wanted"),
        ({"prompt": 0.0}, "prompt .* 0.0"),
        ({"prompt": 1.0}, "prompt .* 1.0"),
        ({"token_keep": 1.5}, "token_keep .* 1.5"),
        ({"layers": (0, 1)}, r"layers .* \(0, 1\)"),
    ],
)
def test_settings_that_make_no_sense_are_refused(bad: dict[str, Any], said: str) -> None:
    with pytest.raises(BadInput, match=said):
        CoreNeurons(**bad)


def test_an_edit_for_another_model_is_refused() -> None:
    edit = history(lever(plain()))[0]
    assert isinstance(edit, KeepCores)
    with pytest.raises(BadInput, match=r"no linear layer 'blocks.0.mlp.fc1'"):
        edit.rewrite(rectified())
    with pytest.raises(BadInput, match=r"activation .* 'sine'"):
        edit.model_copy(update={"activations": ("sine",) * 3}).rewrite(plain())


def test_fit_waits_for_no_training(tmp_path: Path) -> None:
    model = plain().float()
    task = task_of(model)
    elastic = lever(model)
    begun = time.monotonic()
    assert paced(CoreNeurons(), elastic, task, seconds=600.0) == STEPS
    found = torchgraft.fit(
        task, elastic=True, procedures=["coreinfer"], costs=["macs"], time="600s", max_drop=None, out=tmp_path
    )
    assert time.monotonic() - begun < 60
    assert [trial.state for trial in found.record.trials] == ["complete"]
    assert isinstance(found.model, CoreModel)
    assert [c.costs["macs"].ratio for c in found.front[1:]] == pytest.approx(found.model.budgets, rel=1e-6)
