"""Shared attention: exact where it must be, the counts of what is saved, caches, similarity, distillation."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from torchgraft.bench.models import Attention, VisionTransformer
from torchgraft.bench.task import Task
from torchgraft.engines.attention_maps import attention_maps
from torchgraft.engines.recurrence.mixer import StatefulMixer
from torchgraft.engines.shared_attention import FollowerMixer, LeaderMixer, Slot
from torchgraft.errors import BadInput
from torchgraft.parts.mixers.softmax_attention import SoftmaxAttention
from torchgraft.shrink.distill.echoatt import EchoAtt, attention_similarity, distill, share_attention


class Residual(nn.Module):
    """Layers x + a(x)."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


def _plain(depth: int = 4, width: int = 8, heads: int = 2, **options: Any) -> Residual:
    torch.manual_seed(0)
    return Residual([Attention(width, heads, **options) for _ in range(depth)]).double().eval()


def _mixers(depth: int = 4, **options: Any) -> Residual:
    torch.manual_seed(0)
    return Residual([SoftmaxAttention(8, num_heads=2, **options) for _ in range(depth)]).double().eval()


def _names(model: nn.Module) -> list[str]:
    return [f"layers.{place}" for place in range(len(model.layers))]  # type: ignore[arg-type]


X = torch.randn(2, 7, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("build", [_plain, _mixers])
def test_groups_of_one_change_nothing(build: Any) -> None:
    model = build()
    assert torch.equal(share_attention(model, k=1)(X), model(X))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("build", [_plain, _mixers])
def test_equal_queries_keys_and_inputs_make_sharing_exact(build: Any, causal: bool) -> None:
    model = build(2, causal=causal)
    first, second = model.layers
    with torch.no_grad():
        for name, value in first.named_parameters():
            if not name.startswith(("value", "out")):
                second.get_parameter(name).copy_(value)
    apart = copy.deepcopy(model)
    model.forward = lambda x: model.layers[0](x) + model.layers[1](x)
    shared = share_attention(apart, groups=[_names(model)])
    found = shared.layers[0](X) + shared.layers[1](X)  # type: ignore[index, operator]
    if build is _mixers:  # the rows of the values in the fused projection are those of the first layer, too
        assert torch.equal(first.qkv.weight, second.qkv.weight)
    torch.testing.assert_close(found, model.forward(X), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("build", [_plain, _mixers])
def test_a_follower_mixes_its_values_by_the_leaders_weights(build: Any) -> None:
    model = build(3, causal=True)
    shared = share_attention(model, groups=[_names(model)[1:]])
    with attention_maps(model) as seen:
        model(X)
    # By hand: the third layer with the weights of the second, on the input that the second has made.
    h = X + model.layers[0](X)
    h = h + model.layers[1](h)
    last = model.layers[2]
    v = (last.value(h) if build is _plain else last.qkv(h)[..., 16:]).view(2, 7, 2, 4)
    mixed = torch.einsum("bhts,bshv->bthv", seen[1].weights, v).reshape(2, 7, 8)
    torch.testing.assert_close(shared(X), h + last.out(mixed), rtol=1e-10, atol=1e-10)


def test_a_follower_reads_the_very_tensor_of_its_leader(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _plain()
    shared = share_attention(model, groups=[_names(model)[1:]])
    given: list[int] = []
    taken: list[int] = []
    put, take = Slot.put, Slot.take
    monkeypatch.setattr(Slot, "put", lambda self, weights: (given.append(id(weights)), put(self, weights))[1])

    def watched(self: Slot) -> Tensor:
        weights = take(self)
        taken.append(id(weights))
        return weights

    monkeypatch.setattr(Slot, "take", watched)
    shared(X)
    assert len(given) == 1
    assert taken == given * 2


@pytest.mark.parametrize(("build", "saved"), [(_plain, 2 * 8 * 8 + 2 * 8), (_mixers, 2 * 8 * 8)])
def test_a_follower_has_neither_queries_nor_keys(build: Any, saved: int) -> None:
    model = build()
    before = sum(value.numel() for value in model.parameters())
    shared = share_attention(model, groups=[_names(model)])
    assert before - sum(value.numel() for value in shared.parameters()) == 3 * saved
    assert {name for name, _ in shared.layers[0].named_parameters()} == {  # type: ignore[index, union-attr]
        name for name, _ in model.layers[0].named_parameters()
    }


@pytest.mark.parametrize("groups", [2, 1])
def test_cached_decoding_equals_the_full_pass_and_caches_values_only(groups: int) -> None:
    model = _mixers(num_kv_heads=groups)
    shared: Any = share_attention(model, groups=[_names(model)[:3]])
    assert [type(layer) for layer in shared.layers] == [LeaderMixer, FollowerMixer, FollowerMixer, SoftmaxAttention]
    states = [layer.init_state(2) for layer in shared.layers]
    rows = []
    for place in range(X.shape[1]):
        h = X[:, place]
        for number, layer in enumerate(shared.layers):
            assert isinstance(layer, StatefulMixer)
            y, states[number] = layer.step(h, states[number])
            h = h + y
        rows.append(h)
    torch.testing.assert_close(torch.stack(rows, 1), shared(X), rtol=1e-10, atol=1e-10)
    assert [sorted(state) for state in states] == [["k", "v"], ["v"], ["v"], ["k", "v"]]


def test_the_similarity_is_symmetric_with_a_diagonal_of_ones() -> None:
    found = attention_similarity(_plain(causal=True), X)
    assert torch.equal(found, found.T)
    assert torch.equal(found.diagonal(), torch.ones(4, dtype=torch.float64))
    assert bool((found >= 0).all())
    assert bool((found <= 1).all())
    twins = _plain(2)
    twins.layers[1].load_state_dict(twins.layers[0].state_dict())
    close, apart = attention_similarity(twins, X)[0, 1], attention_similarity(_plain(2), X)[0, 1]
    assert apart < close < 1.0  # the second sees another input


def test_outer_layers_stay_and_blocks_are_of_k() -> None:
    shared: Any = share_attention(_plain(8), k=3)
    kinds = [hasattr(layer, "kernel") and ("leads" if layer.kernel.leads else "follows") for layer in shared.layers]
    assert kinds == [False, "leads", "follows", "follows", "leads", "follows", "follows", False]
    assert share_attention(_plain(8), k=2, keep_first=0, keep_last=0)(X).shape == X.shape


def test_gradients_reach_the_leader_through_its_followers() -> None:
    model = _plain(2)
    shared: Any = share_attention(model, groups=[_names(model)])
    shared.layers[0].out.weight.data.zero_()  # what the leader itself mixes counts for nothing
    shared(X).square().sum().backward()
    assert float(shared.layers[0].query.weight.grad.abs().max()) > 0


def test_a_copy_shares_within_itself() -> None:
    model = _plain()
    shared: Any = share_attention(model, groups=[_names(model)])
    twin: Any = copy.deepcopy(shared)
    assert twin.layers[1].kernel.slot is twin.layers[0].kernel.slot
    assert twin.layers[1].kernel.slot is not shared.layers[1].kernel.slot
    assert torch.equal(twin(X), shared(X))


def test_a_follower_without_its_leader_says_so() -> None:
    model = _plain(2)
    shared: Any = share_attention(model, groups=[_names(model)])
    with pytest.raises(BadInput, match="its leader has not run"):
        shared.layers[1](X)
    shared(X)
    with pytest.raises(BadInput, match="its leader has not run"):  # the weights were let go
        shared.layers[1](X)


def _task() -> Task:
    torch.manual_seed(0)
    model = VisionTransformer(16, 4, 1, 3, d_model=16, depth=5, num_heads=2)
    x = torch.randn(48, 1, 16, 16)
    split = (x, torch.arange(48) % 3)
    loss = nn.functional.cross_entropy
    return Task(model, split, split, split, loss, lambda out, t: (out.argmax(-1) == t).float(), batch_size=16)


def test_the_most_similar_neighbours_are_joined_first() -> None:
    task = _task()
    model = task.trained()
    with torch.no_grad():  # the third block attends as the second does, whatever it is given
        for name in ("query", "key"):
            model.blocks[2].attn.get_submodule(name).weight.zero_()
            model.blocks[1].attn.get_submodule(name).weight.zero_()
            model.blocks[2].attn.get_submodule(name).bias.zero_()
            model.blocks[1].attn.get_submodule(name).bias.zero_()
    procedure = EchoAtt()
    (edit,) = procedure.plan(model, task, 0.3)
    assert edit.groups == (("blocks.1.attn", "blocks.2.attn"),)  # type: ignore[attr-defined]
    (whole,) = procedure.plan(model, task, 1.0)
    assert whole.groups == (("blocks.1.attn", "blocks.2.attn", "blocks.3.attn"),)  # type: ignore[attr-defined]
    inputs = task.val.inputs
    with torch.no_grad():
        before, after = model(inputs), procedure.apply(model, task, 0.3)(inputs)
    torch.testing.assert_close(before, after, rtol=1e-5, atol=1e-6)


def test_distillation_moves_the_student_towards_its_teacher_and_leaves_the_teacher() -> None:
    task = _task()
    teacher = task.trained()
    student = share_attention(teacher, k=3)
    kept = copy.deepcopy(teacher.state_dict())

    def gap() -> float:
        with torch.no_grad():
            return float((student(task.train.inputs) - teacher(task.train.inputs)).square().mean())

    before = gap()
    assert distill(student, teacher, task, stage1=12, stage2=0, weights=(0.0, 1.0, 1.0)) == 12
    assert gap() < before
    assert distill(student, teacher, task, stage1=0, stage2=2) == 2
    assert all(torch.equal(kept[name], value) for name, value in teacher.state_dict().items())
    assert distill(student, teacher, task, stage1=5, stage2=5, deadline=0.0) == 0


class Block(nn.Module):
    """A layer x + a(x) that returns something beside its hidden states, as blocks of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = Attention(8, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return x + self.attn(x), None


class Labels(nn.Module):
    """Tokens to logits through layers that return tensors or tuples; (B, T, 8) -> (B, T, 5)."""

    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList([kind() for _ in range(4)])
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            out = layer(x)
            x = out[0] if isinstance(out, tuple) else x + out
        y: Tensor = self.head(x)
        return y


@pytest.mark.parametrize("kind", [Block, lambda: Attention(8, 2)])
def test_distillation_of_hidden_states_alone_reaches_blocks_of_every_form(kind: Any) -> None:
    torch.manual_seed(0)
    model = Labels(kind).double().eval()
    x, y = X.repeat(4, 1, 1), torch.zeros(8, 7, dtype=torch.long)
    task = Task(model, (x, y), (x, y), (x, y), _token_loss, lambda out, t: -out.flatten(1).sum(1), batch_size=4)
    student = share_attention(model, k=2)
    started = student.layers[2].attn.value.weight if kind is Block else student.layers[2].value.weight
    before = started.detach().clone()
    assert distill(student, model, task, stage1=2, stage2=0, weights=(0.0, 0.0, 1.0), lr=1e-3) == 2
    assert not torch.equal(before, started)


def _token_loss(output: Tensor, target: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(output.flatten(0, -2), target.flatten())


def test_pseudo_labels_are_not_learned_where_no_loss_looks() -> None:
    torch.manual_seed(0)
    model = Labels(lambda: Attention(8, 2)).double().eval()
    x, y = X[:1].repeat(4, 1, 1), torch.full((4, 7), -100)
    y[:, 0] = 1
    task = Task(model, (x, y), (x, y), (x, y), _token_loss, lambda out, t: -out.flatten(1).sum(1), batch_size=4)
    with torch.no_grad():  # the teacher is sure of class 1 at the first token and of class 3 elsewhere
        for layer in model.layers:
            layer.out.weight.zero_()
            layer.out.bias.zero_()
        first, other = X[0, 0], X[0, 1]
        model.head.weight[1], model.head.weight[3] = 40 * first, 40 * other
    student = share_attention(model, k=2)
    with torch.no_grad():
        student.head.weight.zero_()
        student.head.bias.zero_()
    distill(student, model, task, stage1=1, stage2=0, weights=(1.0, 0.0, 0.0), lr=1e-2)
    moved = student.head.bias.detach()
    assert moved[1] > 0
    assert (moved[[0, 2, 3, 4]] <= 0).all()


@pytest.mark.parametrize(
    "options", [{"k": 0}, {"keep_first": -1}, {"groups": [["layers.0", "layers.9"]]}, {"groups": [["", "layers.1"]]}]
)
def test_what_cannot_be_shared_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(BadInput):
        share_attention(_plain(), **options)


def test_layers_of_other_shapes_cannot_be_compared() -> None:
    model = Residual([Attention(8, 2), Attention(8, 4)]).eval()
    with pytest.raises(BadInput, match="one shape"):
        attention_similarity(model, torch.randn(1, 3, 8))
