"""Gated positional attention against convolutions, plain attention, and positions by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from torchgraft.errors import BadInput
from torchgraft.parts.blocks.vision_model import SelfAttention
from torchgraft.parts.mixers.gated_positional_self_attention import (
    GatedPositionalSelfAttention,
    convit,
    head_offsets,
)

DOUBLE = torch.float64


def _conv(channels: int, size: int, dilation: int = 1, *, bias: bool = True, zeros: bool = False) -> nn.Conv2d:
    torch.manual_seed(0)
    conv = nn.Conv2d(
        channels,
        channels,
        size,
        padding=dilation * (size // 2),
        dilation=dilation,
        bias=bias,
        padding_mode="zeros" if zeros else "replicate",
    )
    return conv.double()


def _tokens(image: Tensor) -> Tensor:
    return image.flatten(2).transpose(1, 2)


@pytest.mark.parametrize(
    ("size", "dilation", "bias"), [(1, 1, True), (3, 1, True), (3, 1, False), (3, 2, True), (5, 1, True)]
)
@pytest.mark.parametrize(("rows", "width"), [(6, 6), (3, 7)])
def test_from_conv_is_the_convolution(size: int, dilation: int, bias: bool, rows: int, width: int) -> None:
    conv = _conv(4, size, dilation, bias=bias)
    mixer = GatedPositionalSelfAttention.from_conv(conv, width=width)
    image = torch.randn(2, 4, rows, width, dtype=DOUBLE)
    torch.testing.assert_close(mixer(_tokens(image)), _tokens(conv(image)), rtol=1e-12, atol=1e-12)


def test_from_conv_without_gradients_and_in_float32() -> None:
    """400 tokens: several blocks of queries, and squares of positions that float32 must not lose."""
    conv = _conv(3, 3)
    mixer, image = GatedPositionalSelfAttention.from_conv(conv), torch.randn(1, 3, 20, 20, dtype=DOUBLE)
    with torch.no_grad():
        torch.testing.assert_close(mixer(_tokens(image)), _tokens(conv(image)), rtol=1e-11, atol=1e-11)
        found = mixer.float()(_tokens(image.float()))
    torch.testing.assert_close(found.double(), _tokens(conv(image)), rtol=1e-5, atol=1e-5)


def test_a_weak_start_is_not_the_convolution() -> None:
    conv = _conv(4, 3)
    image = torch.randn(1, 4, 5, 5, dtype=DOUBLE)
    soft = GatedPositionalSelfAttention.from_conv(conv, locality=1.0, gate=1.0)
    assert (soft(_tokens(image)) - _tokens(conv(image))).abs().max() > 0.05
    zeros = _conv(4, 3, zeros=True)
    gap = (GatedPositionalSelfAttention.from_conv(zeros)(_tokens(image)) - _tokens(zeros(image))).abs()[0].amax(-1)
    assert gap.view(5, 5)[1:-1, 1:-1].max() < 1e-12 < 1e-3 < gap.view(5, 5)[0].min()  # borders are repeated


def test_gate_closed_is_self_attention() -> None:
    torch.manual_seed(0)
    mixer = GatedPositionalSelfAttention(8, num_heads=4, local=False).double()
    plain = SelfAttention(8, num_heads=4).double()
    with torch.no_grad():
        mixer.gate.fill_(-60.0)
        mixer.out.bias.zero_()
        plain.qkv.weight.copy_(torch.cat([mixer.qk.weight, mixer.v.weight]))
        plain.out.weight.copy_(mixer.out.weight)
    x = torch.randn(2, 11, 8, dtype=DOUBLE)
    torch.testing.assert_close(mixer(x), plain(x), rtol=1e-12, atol=1e-12)


@settings(deadline=None, max_examples=25)
@given(
    tokens=st.integers(1, 40),
    width=st.one_of(st.none(), st.integers(1, 9)),
    gate=st.floats(-5, 5),
    seed=st.integers(0, 99),
)
def test_rows_are_shares_and_mix_both_softmaxes(tokens: int, width: int | None, gate: float, seed: int) -> None:
    torch.manual_seed(seed)
    mixer = GatedPositionalSelfAttention(8, num_heads=4, width=width, local=bool(seed % 2)).double()
    with torch.no_grad():
        mixer.gate.fill_(gate)
    x = torch.randn(2, tokens, 8, dtype=DOUBLE)
    found = mixer.attention(x)
    assert bool((found >= 0).all())
    torch.testing.assert_close(found.sum(-1), torch.ones(2, 4, tokens, dtype=DOUBLE), rtol=1e-12, atol=1e-12)
    v = torch.unflatten(mixer.v(x), -1, (4, -1))
    mixed = torch.einsum("bhts,bshv->bthv", found, v).flatten(2)
    torch.testing.assert_close(mixer(x), mixer.out(mixed), rtol=1e-10, atol=1e-10)
    side = math.ceil(math.sqrt(tokens)) if width is None else width
    share = 1 / (1 + math.exp(-gate))
    q, k = torch.split(mixer.qk(x[0]), 8, dim=-1)
    for head in range(4):
        part = slice(2 * head, 2 * head + 2)
        content = (q[:, part] @ k[:, part].T / math.sqrt(2)).softmax(-1)
        row = tokens // 2
        scores = [
            float(mixer.position[head].detach() @ torch.tensor([dx, dy, dx * dx + dy * dy], dtype=DOUBLE))
            for dx, dy in ((j % side - row % side, j // side - row // side) for j in range(tokens))
        ]
        wanted = (1 - share) * content[row] + share * torch.tensor(scores, dtype=DOUBLE).softmax(-1)
        torch.testing.assert_close(found[0, head, row], wanted, rtol=1e-10, atol=1e-10)


def test_position_weights_are_translates() -> None:
    """Far enough from the border, the weights of a patch are those of its neighbour, moved by one patch."""
    mixer = GatedPositionalSelfAttention(8, num_heads=4, locality=2.0).double()
    with torch.no_grad():
        mixer.gate.fill_(40.0)
    found = mixer.attention(torch.randn(1, 17 * 17, 8, dtype=DOUBLE))[0].view(4, 17, 17, 17, 17)
    for y, x in ((8, 9), (9, 8), (7, 6)):
        moved = found[:, 8, 8].roll((y - 8, x - 8), dims=(1, 2))
        torch.testing.assert_close(found[:, y, x], moved, rtol=1e-10, atol=1e-10)
    assert (found[:, 0, 0] - found[:, 8, 8].roll((-8, -8), dims=(1, 2))).abs().max() > 0.01
    peak = found[:, 8, 8].flatten(1).amax(1, keepdim=True)  # four heads look between patches: four peaks each
    assert ((found[:, 8, 8].flatten(1) - peak).abs() < 1e-12).sum(1).tolist() == [4, 4, 4, 4]


def test_heads_look_at_a_square() -> None:
    assert head_offsets(4).tolist() == [[-0.5, -0.5], [0.5, -0.5], [-0.5, 0.5], [0.5, 0.5]]
    assert head_offsets(1).tolist() == [[0.0, 0.0]]
    mixer = GatedPositionalSelfAttention(9, num_heads=9, locality=3.0).double()
    with torch.no_grad():
        mixer.gate.fill_(40.0)
    centre = mixer.attention(torch.randn(1, 25, 9, dtype=DOUBLE))[0, :, 12]
    assert centre.argmax(-1).tolist() == [6, 7, 8, 11, 12, 13, 16, 17, 18]
    assert torch.equal(mixer.v.weight, torch.eye(9, dtype=DOUBLE))


def test_gates_and_distance_by_hand() -> None:
    """Three patches in a row, uniform content: shares 1/3 over distances 0 1 2, 1 0 1, 2 1 0; a mean of 8/9."""
    mixer = GatedPositionalSelfAttention(4, num_heads=1, width=3).double()
    with torch.no_grad():
        mixer.gate.fill_(-60.0)
        mixer.qk.weight.zero_()
    x = torch.randn(2, 3, 4, dtype=DOUBLE)
    assert mixer.attention_distance(x).item() == pytest.approx(8 / 9, rel=1e-12)
    with torch.no_grad():
        mixer.gate.fill_(math.log(3))  # 3/4 on position, which looks at the patch itself only
        mixer.look_at(torch.zeros(1, 2), 60.0)
    assert mixer.gates().item() == pytest.approx(0.75, rel=1e-12)
    assert mixer.attention_distance(x).item() == pytest.approx(8 / 36, rel=1e-12)


def test_convit_joins_the_class_token_late() -> None:
    torch.manual_seed(0)
    model = convit(8, 3, gpsa_layers=2, image_size=8, patch_size=2, channels=1, classes=5)
    kinds = [type(mixer).__name__ for mixer in model.mixers()]
    assert kinds == ["GatedPositionalSelfAttention"] * 2 + ["SelfAttention"]
    seen = model.seen_by_mixers(torch.rand(2, 1, 8, 8))
    assert [x.shape[1] for x in seen] == [16, 16, 17]
    assert model(torch.rand(2, 1, 8, 8)).shape == (2, 5)


def test_bad_settings_are_refused() -> None:
    with pytest.raises(BadInput, match="num_heads must be a square"):
        GatedPositionalSelfAttention(8, num_heads=2)
    assert GatedPositionalSelfAttention(8, num_heads=2, local=False)(torch.randn(1, 5, 8)).shape == (1, 5, 8)
    with pytest.raises(BadInput, match="width must be at least 1, got 0"):
        GatedPositionalSelfAttention(8, width=0)
    with pytest.raises(BadInput, match="locality must be finite"):
        GatedPositionalSelfAttention(8, locality=math.inf)
    with pytest.raises(BadInput, match=r"gpsa_layers must lie in \[0, 3\), got 3"):
        convit(8, 3, gpsa_layers=3)
    for conv in (
        nn.Conv2d(4, 8, 3),
        nn.Conv2d(4, 4, 2),
        nn.Conv2d(4, 4, 3, stride=2),
        nn.Conv2d(4, 4, 3, groups=2),
        nn.Conv2d(4, 4, (3, 1)),
        nn.Conv2d(4, 4, 3, dilation=(1, 2)),
    ):
        with pytest.raises(BadInput, match="conv must have an odd square kernel"):
            GatedPositionalSelfAttention.from_conv(conv)
