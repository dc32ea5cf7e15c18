"""The vision model: one mixer or one a block, a class token that joins where it is told, and claims' digits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from torchgraft.claims.images import accuracy, digits, images_of, train_images
from torchgraft.engines.recurrence.mixer import Mixer
from torchgraft.errors import BadInput
from torchgraft.parts.blocks.vision_model import SelfAttention, VisionModel


class _Counting(Mixer):
    """Returns nothing, and notes how many tokens it was given."""

    causal = False

    def __init__(self, d_model: int) -> None:
        super().__init__(d_model)
        self.lengths: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.lengths.append(x.shape[1])
        return torch.zeros_like(x)


def _heads(d_model: int) -> SelfAttention:
    return SelfAttention(d_model, num_heads=2)


def test_attention_equals_the_formula() -> None:
    torch.manual_seed(0)
    mixer = _heads(8).double()
    x = torch.randn(1, 5, 8, dtype=torch.float64)
    q, k, v = torch.split(mixer.qkv(x[0]), 8, dim=-1)
    heads = []
    for part in (slice(0, 4), slice(4, 8)):
        scores = (q[:, part] @ k[:, part].T / 2).exp()
        heads.append(scores / scores.sum(1, keepdim=True) @ v[:, part])
    torch.testing.assert_close(mixer(x)[0], torch.cat(heads, 1) @ mixer.out.weight.T, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("class_from", "lengths"), [(0, [17, 17, 17]), (2, [16, 16, 17])])
def test_class_token_joins_where_it_is_told(class_from: int, lengths: list[int]) -> None:
    model = VisionModel(8, 3, _Counting, class_from=class_from)
    model(torch.rand(2, 1, 8, 8))
    found = [mixer.lengths for mixer in model.mixers() if isinstance(mixer, _Counting)]
    assert found == [[length] for length in lengths]
    assert [x.shape[1] for x in model.seen_by_mixers(torch.rand(2, 1, 8, 8))] == lengths


def test_patches_stand_row_by_row() -> None:
    """The token of row i, column j of the patches is token 4 i + j: it alone moves when its pixels do."""
    model = VisionModel(8, 1, _Counting, class_token=False)
    image = torch.rand(1, 1, 8, 8)
    other = image.clone()
    other[..., 2:4, 6:8] += 1
    (first,), (second,) = model.seen_by_mixers(image), model.seen_by_mixers(other)
    assert ((first - second).abs().amax(-1)[0] > 0).nonzero().flatten().tolist() == [4 * 1 + 3]


def test_without_positions_patches_may_be_shuffled() -> None:
    torch.manual_seed(0)
    image = torch.rand(1, 1, 8, 8, dtype=torch.float64)
    shifted = image.roll(2, -1)  # by one patch
    for positions, class_token in ((False, True), (False, False), (True, True)):
        model = VisionModel(8, 2, _heads, positions=positions, class_token=class_token).double()
        same = torch.allclose(model(image), model(shifted), rtol=0, atol=1e-9)
        assert same is not positions


def test_one_mixer_a_block() -> None:
    model = VisionModel(8, 2, [_Counting, _heads])
    assert [type(mixer) for mixer in model.mixers()] == [_Counting, SelfAttention]
    linear = VisionModel(8, 1, "linear-attention", mixer_options={"num_heads": 2})
    assert linear(torch.rand(2, 1, 8, 8)).shape == (2, 10)


def test_every_weight_gets_a_gradient() -> None:
    model = VisionModel(8, 2, _heads, class_from=1, hidden=12)
    model(torch.rand(2, 1, 8, 8)).square().sum().backward()
    assert [name for name, value in model.named_parameters() if value.grad is None or not value.grad.any()] == []
    assert model.get_parameter("blocks.0.mlp.fc1.weight").shape == (12, 8)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"patch_size": 3}, "patch_size must divide image_size = 8, got 3"),
        ({"mixer": [_heads]}, "one for each of 2, got 1"),
        ({"class_from": 2}, r"class_from must lie in \[0, 2\), got 2"),
        ({"classes": 0}, "classes must be at least 1, got 0"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, object], words: str) -> None:
    with pytest.raises(BadInput, match=words):
        VisionModel(8, 2, **{"mixer": _heads, **settings})  # type: ignore[arg-type]  # that is the point
    with pytest.raises(BadInput, match="image must have shape"):
        VisionModel(8, 2, _heads)(torch.rand(2, 1, 16, 16))


def test_digits_by_size_and_share() -> None:
    whole, few = digits()[0], digits(size=16, share=0.1, seed=3)[0]
    assert images_of(few).shape[1:] == (1, 16, 16)
    counts = few.target.bincount()
    assert torch.equal(counts, (whole.target.bincount() * 0.1).round().long())
    assert torch.equal(few.target, digits(share=0.1, seed=3)[0].target)
    small = images_of(digits(share=0.1, seed=3)[0])
    torch.testing.assert_close(images_of(few).mean((1, 2, 3)), small.mean((1, 2, 3)), rtol=0.05, atol=0.01)
    assert not torch.equal(images_of(digits(share=0.1, seed=4)[0]), small)
    with pytest.raises(BadInput, match="share"):
        digits(share=0.0)


def test_training_repeats_with_the_seed_and_learns() -> None:
    few = digits()[0][:64]
    runs = [train_images(lambda: VisionModel(16, 1, _heads), few, steps=8, seed=1) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(runs[0].parameters(), runs[1].parameters(), strict=True))
    assert accuracy(runs[0], few) == accuracy(runs[1], few)
    perfect = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    with torch.no_grad():
        found = perfect(images_of(few)).argmax(-1)
    assert accuracy(perfect, few, batch_size=7) == pytest.approx(float((found == few.target).float().mean()))
