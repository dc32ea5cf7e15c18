"""CLEAR on small transformers: limits that recover the teacher, discs, halos, and a distillation of attention alone."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from torchgraft.bench.models import Attention
from torchgraft.engines.attention import attend
from torchgraft.engines.attention.local import disc_groups, disc_offsets
from torchgraft.errors import BadInput
from torchgraft.generate.clear_local_dit import (
    DiscAttention,
    clear_linearize,
    distill_attention,
    distillation_terms,
)
from torchgraft.generate.flow_transformer import FlowTransformer, draw_images, flow_pair


def _draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _teacher(grid: tuple[int, int] = (4, 4), text: int = 1) -> FlowTransformer:
    torch.manual_seed(0)
    model = FlowTransformer(grid, text=text, d_model=16, depth=2, num_heads=2, hidden=16).double().eval()
    for block in model.blocks:
        nn.init.normal_(block.modulate.weight, std=0.5)  # as it starts, attention has no weight
    return model


def _inputs(model: FlowTransformer, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    tokens = model.grid[0] * model.grid[1]
    return _draw(batch, tokens, 1), _draw(batch, seed=1).sigmoid(), torch.arange(batch)


def test_a_radius_beyond_the_diagonal_is_the_teacher() -> None:
    teacher = _teacher()
    x = _inputs(teacher)
    far = clear_linearize(teacher, grid=(4, 4), radius=4.25, text_len=1)  # 3 sqrt(2) is 4.243
    torch.testing.assert_close(far(*x), teacher(*x), rtol=1e-10, atol=1e-12)
    near = clear_linearize(teacher, grid=(4, 4), radius=4.24, text_len=1)
    assert not torch.allclose(near(*x), teacher(*x), rtol=1e-10, atol=1e-12)


def test_weights_names_and_all_else_stay_the_teachers() -> None:
    teacher = _teacher()
    kept = copy.deepcopy(teacher.state_dict())
    student = clear_linearize(teacher, grid=(4, 4), radius=2, text_len=1)
    found = student.state_dict()
    assert found.keys() == kept.keys()
    assert all(torch.equal(found[name], kept[name]) for name in kept)
    with torch.no_grad():
        for value in student.parameters():
            value.zero_()
    assert all(torch.equal(value, kept[name]) for name, value in teacher.state_dict().items())
    assert type(teacher.blocks[0].attn).__name__ == "JointAttention"
    coarse = clear_linearize(teacher, grid=(4, 4), radius=2, down=2, text_len=1)
    assert coarse.state_dict().keys() - kept.keys() == {f"blocks.{layer}.attn.spatial" for layer in range(2)}


def test_radius_one_leaves_the_token_itself_and_the_text() -> None:
    layer = DiscAttention(8, num_heads=2, grid=(3, 3), radius=1, text_len=2).double()
    x = _draw(1, 11, 8)
    moved = torch.autograd.functional.jacobian(lambda x: layer(x).sum((0, 2)), x)[:, 0].abs().amax(-1) > 0
    seen = torch.eye(11, dtype=torch.bool)
    seen[:2] = seen[:, :2] = True
    assert torch.equal(moved, seen)


def test_an_inner_query_sees_the_disc_of_the_paper() -> None:
    assert len(disc_offsets(8)) == 193
    assert int(disc_groups(17, 17, 8).seen[17 * 8 + 8].sum()) == 193
    layer = DiscAttention(4, num_heads=1, grid=9, radius=4).double()
    x = _draw(1, 81, 4).requires_grad_()
    grad = torch.autograd.grad(layer(x)[0, 40].sum(), x)[0][0].abs().amax(-1).view(9, 9)
    y, z = torch.meshgrid(torch.arange(9) - 4, torch.arange(9) - 4, indexing="ij")
    assert torch.equal(grad > 0, y**2 + z**2 < 16)
    assert int((grad > 0).sum()) == 45


def test_strips_with_halos_give_the_image_of_one_piece() -> None:
    for text in (0, 1):
        layer = DiscAttention(8, num_heads=2, grid=(6, 4), radius=2.5, text_len=text).double()
        x = _draw(2, text + 24, 8)
        whole = layer(x)
        for strips in (2, 3, 6):
            layer.strips = strips
            torch.testing.assert_close(layer(x)[:, text:], whole[:, text:], rtol=1e-10, atol=1e-12)
        layer.strips = 1


def test_coarse_keys_start_as_the_means_of_patches() -> None:
    layer = DiscAttention(8, num_heads=2, grid=(4, 4), radius=1, down=2, text_len=0).double()
    x = _draw(1, 16, 8)
    q, k, v = (torch.unflatten(part(x), -1, (2, 4)) for part in (layer.query, layer.key, layer.value))
    means = []
    for each in (k, v):
        image = each.view(4, 4, 2, 4)
        means.append(torch.stack([image[y : y + 2, z : z + 2].mean((0, 1)) for y in (0, 2) for z in (0, 2)])[None])
    for token in range(16):
        keys, values = (torch.cat([a[:, token : token + 1], b], 1) for a, b in ((k, means[0]), (v, means[1])))
        expected = layer.out(attend(q[:, token : token + 1], keys, values).flatten(-2))
        torch.testing.assert_close(layer(x)[:, token : token + 1], expected, rtol=1e-10, atol=1e-12)


def test_larger_images_scale_their_scores_in_proportion() -> None:
    layer = DiscAttention(8, num_heads=2, grid=(4, 4), radius=9, train_tokens=4).double()
    x = _draw(1, 16, 8)
    q, k, v = (torch.unflatten(part(x), -1, (2, 4)) for part in (layer.query, layer.key, layer.value))
    expected = layer.out(attend(q, k, v, scale=math.sqrt(2 / 4)).flatten(-2))  # log_4 16 = 2, K = 4
    torch.testing.assert_close(layer(x), expected, rtol=1e-10, atol=1e-12)
    layer.train_tokens = 16
    torch.testing.assert_close(layer(x), layer.out(attend(q, k, v).flatten(-2)), rtol=1e-10, atol=1e-12)


def test_an_equal_student_has_nothing_to_learn_from_its_teacher() -> None:
    teacher = _teacher()
    x, target = _inputs(teacher), _draw(2, 16, 1, seed=5)
    same = clear_linearize(teacher, grid=(4, 4), radius=9, text_len=1)
    flow, guide, layers = distillation_terms(same, teacher, x, target)
    torch.testing.assert_close(flow, (teacher(*x) - target).square().mean())
    assert max(float(guide.detach()), float(layers.detach())) < 1e-25
    other = clear_linearize(teacher, grid=(4, 4), radius=1, text_len=1)
    flow, guide, layers = distillation_terms(other, teacher, x, target)
    torch.testing.assert_close(guide, (teacher(*x) - other(*x)).square().mean())
    seen: dict[str, list[Tensor]] = {"teacher": [], "student": []}
    for name, model in (("teacher", teacher), ("student", other)):
        for block in model.blocks:
            block.attn.register_forward_hook(lambda *call, name=name: seen[name].append(call[2]))
        model(*x)
    gaps = [(a - b).square().mean() for a, b in zip(seen["teacher"], seen["student"], strict=True)]
    torch.testing.assert_close(layers, sum(gaps) / 2)


def test_distillation_moves_attention_alone_and_brings_the_student_closer() -> None:
    teacher = _teacher()
    before = copy.deepcopy(teacher.state_dict())
    student = clear_linearize(teacher, grid=(4, 4), radius=1.5, text_len=1)
    student.head.requires_grad_(False)
    started = copy.deepcopy(student.state_dict())

    def data(draw: torch.Generator) -> tuple[tuple[Tensor, ...], Tensor]:
        images = torch.randn(8, 16, 1, generator=draw)
        (x, time, labels), target = flow_pair(images, torch.arange(8), draw)
        return (x.double(), time.double(), labels), target.double()

    test_x, _ = data(torch.Generator().manual_seed(99))
    gap = (student(*test_x) - teacher(*test_x)).square().mean()
    losses = distill_attention(student, teacher, data, steps=40, lr=3e-3, a=20.0)
    assert len(losses) == 40
    assert (student(*test_x) - teacher(*test_x)).square().mean() < 0.8 * gap
    moved = {name for name, value in student.state_dict().items() if not torch.equal(value, started[name])}
    assert moved
    assert all(".attn." in name for name in moved)
    assert {name for name, value in student.named_parameters() if not value.requires_grad} == {
        "head.weight",
        "head.bias",
    }
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    again = clear_linearize(teacher, grid=(4, 4), radius=1.5, text_len=1)
    assert distill_attention(again, teacher, data, steps=5, lr=3e-3, a=20.0) != losses[:5]  # another schedule
    twin = clear_linearize(teacher, grid=(4, 4), radius=1.5, text_len=1)
    assert distill_attention(twin, teacher, data, steps=40, lr=3e-3, a=20.0) == losses


def test_attentions_of_other_models_are_taken_too() -> None:
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(4, 8), Attention(8, 2), nn.Linear(8, 4)).double()
    student = clear_linearize(teacher, grid=3, radius=5)
    x = _draw(2, 9, 4)
    torch.testing.assert_close(student(x), teacher(x), rtol=1e-10, atol=1e-12)


def test_images_are_drawn_along_the_velocity() -> None:
    model = FlowTransformer((2, 2), d_model=8, depth=1, num_heads=2, hidden=8)
    labels = torch.tensor([1, 2, 3])
    found = draw_images(model, labels, steps=2, seed=3)
    x = torch.randn(3, 4, 1, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        x = x - model(x, torch.ones(3), labels) / 2
        x = x - model(x, torch.full((3,), 0.5), labels) / 2
    assert torch.equal(found, x)
    draw = torch.Generator().manual_seed(0)
    images = torch.randn(3, 4, 1)
    (noisy, time, _), velocity = flow_pair(images, labels, draw)
    torch.testing.assert_close(noisy - time[:, None, None] * velocity, images)


def test_what_cannot_be_used_is_refused() -> None:
    teacher = _teacher()
    with pytest.raises(BadInput, match="no module"):
        clear_linearize(nn.Linear(2, 2), grid=2)
    with pytest.raises(BadInput, match="lacks"):
        clear_linearize(teacher, grid=4, where=nn.LayerNorm)
    for options in ({"radius": 0.0}, {"down": 3}, {"train_tokens": 1}, {"strips": 5}, {"text_len": -1}):
        with pytest.raises(BadInput, match=next(iter(options))):
            clear_linearize(teacher, grid=4, **options)  # type: ignore[arg-type]
    with pytest.raises(BadInput, match=r"must have shape \(B, 16, 16\)"):
        clear_linearize(teacher, grid=4)(*_inputs(teacher))  # the text was forgotten
    with pytest.raises(BadInput, match="clear_linearize"):
        distillation_terms(teacher, teacher, _inputs(teacher), torch.zeros(2, 16, 1))
    with pytest.raises(BadInput, match="steps"):
        distill_attention(clear_linearize(teacher, grid=4, text_len=1), teacher, lambda draw: None, steps=0)  # type: ignore[arg-type, return-value]
