"""Leaving a model early: where that can be, what it then says, and what it costs; by hand on small models."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft.bench.files import pack_tensors, unpack_tensors
from torchgraft.bench.meters import macs
from torchgraft.bench.models import ByteTransformer, ResidualNet, TransformerBlock, TwoTower, VisionTransformer
from torchgraft.bench.task import Task
from torchgraft.bench.tasks.stdlib_search import contrast, first_rank
from torchgraft.engines.nesting import ElasticModule
from torchgraft.engines.nesting.exit_models import ExitElastic
from torchgraft.engines.nesting.exits import Narrow, Place, exits, read
from torchgraft.engines.surgery.edits import apply_edits, edit_from_record, edit_to_record, history
from torchgraft.errors import BadInput
from torchgraft.retrieve.starbucks import Starbucks
from torchgraft.retrieve.two_d_matryoshka import TwoDMatryoshka

PAIRS = tuple(torch.randint(1, 32, (12, t), generator=torch.Generator().manual_seed(t)) for t in (4, 6))
IMAGES = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(2))
_BLOCK = {"d_model": 16, "num_heads": 2}


def _towers(depth: int = 3, seed: int = 0) -> TwoTower:
    torch.manual_seed(seed)
    return TwoTower(32, 4, 6, depth=depth, **_BLOCK).eval()


def _vit(classes: int = 3) -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(8, 4, 1, classes, depth=3, **_BLOCK).eval()


def _search(depth: int = 3) -> Task:
    pairs = (PAIRS, torch.arange(12))
    return Task(_towers(depth), pairs, pairs, pairs, contrast, first_rank, batch_size=4)


def _vectors(model: TwoTower, layers: int) -> list[Tensor]:
    """Return the vectors of both towers after some layers, written out."""
    found = []
    for tower, tokens in zip((model.query_encoder, model.code_encoder), PAIRS, strict=True):
        x = tower.embed(tokens) + tower.position[:, : tokens.shape[1]]
        for block in list(tower.blocks)[:layers]:
            x = block(x, (tokens != 0)[:, None, None, :])
        found.append(tower.norm(x).mean(1))
    return found


def _similarity(model: TwoTower, layers: int, dim: int) -> Tensor:
    a, b = (F.normalize(each[:, :dim], dim=-1) for each in _vectors(model, layers))
    return a @ b.T * model.log_scale.exp()


class _Projected(nn.Module):
    """A tower whose encoder returns one vector, which a linear layer then maps."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(*(nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(3)))
        self.out = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.out(self.inner(x))
        return y


class _Pair(nn.Module):
    def __init__(self, tower: type[nn.Module], *, joined: bool) -> None:
        super().__init__()
        self.left, self.right = tower(), tower()
        self.head = nn.Linear(16, 2) if joined else None

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        a, b = self.left(a), self.right(b)
        out: Tensor = a @ b.T if self.head is None else self.head(torch.cat([a, b], 1))
        return out


def test_towers_and_classifiers_are_found_where_their_vectors_stand() -> None:
    found = exits(_towers(), PAIRS)
    assert (found.layers, found.width) == (3, 16)
    assert [stack.name for stack in found.stacks] == ["query_encoder.blocks", "code_encoder.blocks"]
    assert found.places == (Place("query_encoder", "output"), Place("code_encoder", "output"))
    assert exits(_vit(), IMAGES).places == (Place("head", "input"),)
    # The wrapped classifier returns (B, classes) from a module around its stack, which is no vector to cut.
    wrapped = nn.Sequential(_vit())
    assert exits(wrapped, IMAGES).places == (Place("0.head", "input"),)
    pair = _Pair(_Projected, joined=False)
    x = torch.randn(2, 16)
    assert exits(pair, (x, x)).places == (Place("left", "output"), Place("right", "output"))
    assert exits(pair, (x, x)).width == 8


def test_models_that_end_otherwise_are_refused() -> None:
    x = torch.randn(2, 16)
    stages = ResidualNet(widths=(4, 8), depth=3)
    last = nn.Sequential(nn.Linear(16, 16), *(nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(3)))
    for model, inputs, reason in (
        (nn.Linear(16, 2), x, "no stack"),
        (stages, IMAGES, "2, 3 layers"),
        (ByteTransformer(9, 4, d_model=8, depth=2, num_heads=2), torch.ones(2, 4, dtype=torch.long), "one vector"),
        (_Pair(_Projected, joined=True), (x, x), "one vector"),
        (last, x, "one vector"),  # the only linear layer outside stands before the stack
    ):
        with pytest.raises(BadInput, match=reason):
            exits(model, inputs)
    for glob in ("head", "blocks.1", "blocks"):
        with pytest.raises(BadInput):
            exits(_vit(), IMAGES, ignore=[glob])


class _Beside(VisionTransformer):
    """A classifier that adds something of its last state to what its head says."""

    def __init__(self) -> None:
        super().__init__(8, 4, 1, 3, depth=3, d_model=16, num_heads=2)
        self.share = nn.Parameter(torch.tensor(0.5))

    def forward(self, image: Tensor) -> Tensor:
        x = self.patch(image).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.head(self.norm(x[:, 0])) + self.share * x[:, 1, :3]
        return out


def test_what_is_not_said_by_the_vector_alone_is_no_exit() -> None:
    torch.manual_seed(0)
    with pytest.raises(BadInput, match="decides"):
        exits(_Beside().eval(), IMAGES)


def test_a_model_of_hugging_face_that_returns_a_record() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32, num_labels=3,
        max_position_embeddings=8,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(config).eval()
    inputs = {"input_ids": PAIRS[0], "attention_mask": torch.ones_like(PAIRS[0])}
    data = (inputs, torch.arange(12) % 3)
    task = Task(
        model, data, data, data, lambda out, t: F.cross_entropy(out.logits, t), lambda out, t: out.logits[:, 0],
        batch_size=4,
    )  # fmt: skip
    assert exits(model, inputs).places == (Place("classifier", "input"),)
    elastic = TwoDMatryoshka().build(model, task)
    assert TwoDMatryoshka().train(elastic, task, steps=2) == 2
    with torch.no_grad():
        assert elastic.set_budget(elastic.budgets[0])(**inputs).logits.shape == (12, 3)
        assert torch.equal(elastic.set_budget(1.0)(**inputs).logits, model(**inputs).logits)


def test_finding_leaves_no_trace() -> None:
    model = _towers()
    before, names = copy.deepcopy(model.state_dict()), [name for name, _ in model.named_modules()]
    seen = read(model, exits(model, PAIRS), PAIRS, [1])
    seen.finish(*(view[1][:, :4] for view in seen.views))
    assert names == [name for name, _ in model.named_modules()]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_vectors_of_all_layers_from_one_pass_by_hand() -> None:
    model = _towers().double()
    found = exits(model, PAIRS)
    calls: list[int] = []
    for block in model.query_encoder.blocks:
        block.register_forward_hook(lambda module, args, out: calls.append(1))
    seen = read(model, found, PAIRS, [1, 2])
    assert len(calls) == 3
    for layers in (1, 2, 3):
        for view, wanted in zip(seen.views, _vectors(model, layers), strict=True):
            assert torch.allclose(view[layers], wanted, atol=1e-12)
        for dim in (5, 16):
            said = seen.finish(*(view[layers][:, :dim] for view in seen.views))
            assert torch.allclose(said, _similarity(model, layers, dim), atol=1e-12)
    assert len(calls) == 3 + 3 * (1 + 2 + 3)  # those of the towers by hand; finish runs none
    for bad in ([0], [4]):
        with pytest.raises(BadInput, match="layers"):
            read(model, found, PAIRS, bad)


def test_a_classifier_reads_the_first_coordinates_by_the_first_columns() -> None:
    model = _vit().double()
    x = IMAGES.double()
    seen = read(model, exits(model, x), x, [2])
    vector = seen.views[0][2][:, :6]
    wanted = vector @ model.head.weight[:, :6].T + model.head.bias
    assert torch.allclose(seen.finish(vector), wanted, atol=1e-12)
    narrow = Narrow(places=(("head", "input"),), dim=6).rewrite(copy.deepcopy(model))
    whole = read(model, exits(model, x), x, [2]).views[0][3]
    assert torch.allclose(narrow(x), whole[:, :6] @ model.head.weight[:, :6].T + model.head.bias, atol=1e-12)
    for name, reason in (("heads", "no module"), ("norm", "linear")):
        with pytest.raises(BadInput, match=reason):
            Narrow(places=((name, "input"),), dim=2).rewrite(copy.deepcopy(model))


def test_every_budget_says_what_the_towers_say_after_its_layers() -> None:
    task = _search()
    elastic = TwoDMatryoshka().build(task.trained(), task)
    assert isinstance(elastic, ExitElastic)
    model = task.trained()
    with torch.no_grad():
        for layers, budget in enumerate(elastic.budgets[:-1], 1):
            elastic.set_budget(budget)
            for dim in (None, 8, 16):
                elastic.keep(dim)
                assert elastic.size == (layers, dim or 16)
                assert torch.allclose(elastic(*PAIRS), _similarity(model, layers, dim or 16), atol=1e-5)
        assert torch.equal(elastic.keep(8).set_budget(1.0)(*PAIRS), model(*PAIRS))
        assert elastic.size == (3, 16)
    with pytest.raises(BadInput, match="dim"):
        elastic.keep(7)
    assert elastic.dim == 8


@pytest.mark.parametrize("procedure", [TwoDMatryoshka(), Starbucks()])
def test_a_budget_costs_what_towers_of_fewer_layers_cost(procedure: TwoDMatryoshka | Starbucks) -> None:
    task = _search()
    elastic = procedure.build(task.trained(), task)
    assert isinstance(elastic, ExitElastic)
    whole = macs(_towers(), PAIRS)
    for budget in elastic.budgets[:-1]:
        layers, dim = elastic.set_budget(budget).size  # type: ignore[attr-defined]
        shallow = macs(_towers(layers), PAIRS) - (16 - dim) * len(PAIRS[0]) ** 2  # the similarities
        assert macs(elastic, PAIRS) == shallow
        assert shallow / whole == pytest.approx(budget, rel=0.02)


@pytest.mark.parametrize("procedure", [TwoDMatryoshka(), Starbucks()])
def test_training_moves_both_towers_and_leaves_the_original(procedure: TwoDMatryoshka | Starbucks) -> None:
    task = _search()
    elastic = procedure.build(task.trained(), task)
    assert isinstance(elastic, ExitElastic)
    assert sum(p.numel() for p in elastic.parameters()) == 2 * sum(p.numel() for p in _towers().parameters())
    before = copy.deepcopy(elastic.nested.net.state_dict())
    assert procedure.train(elastic, task, steps=4) == 4
    moved = {
        name.split(".")[0] for name, v in elastic.nested.net.state_dict().items() if not torch.equal(v, before[name])
    }
    assert moved == {"query_encoder", "code_encoder", "log_scale"}
    assert not elastic.training
    with torch.no_grad():
        assert torch.equal(elastic.set_budget(1.0)(*PAIRS), task.trained()(*PAIRS))
    fresh = apply_edits(
        _towers(seed=7), [edit_from_record(json.loads(json.dumps(edit_to_record(e)))) for e in history(elastic)]
    )
    fresh.load_state_dict(unpack_tensors(pack_tensors(elastic.state_dict()))[0])
    assert isinstance(fresh, ElasticModule)
    with torch.no_grad():
        for budget in elastic.budgets:
            assert torch.equal(fresh.eval().set_budget(budget)(*PAIRS), elastic.set_budget(budget)(*PAIRS))


def test_layers_that_save_nothing_make_no_budget() -> None:
    class Heavy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Sequential(nn.Linear(4, 10_000), nn.Linear(10_000, 16))
            self.blocks = nn.ModuleList([TransformerBlock(16, 2) for _ in range(2)])
            self.head = nn.Linear(16, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)[:, None]
            for block in self.blocks:
                x = block(x)
            out: Tensor = self.head(x[:, 0])
            return out

    torch.manual_seed(0)
    data = (torch.randn(8, 4), torch.randint(2, (8,)))
    task = Task(Heavy(), data, data, data, F.cross_entropy, lambda out, t: out[:, 0])
    with pytest.raises(BadInput, match="saves nothing"):
        TwoDMatryoshka().build(task.trained(), task)
    assert TwoDMatryoshka().refusals(nn.Linear(4, 2), task)[0].reason.startswith("it has no stack")
    with pytest.raises(BadInput, match="lr"):
        TwoDMatryoshka(lr=0.0)
