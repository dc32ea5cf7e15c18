"""InLine attention: weights written out, injectivity beside division, and the 3x3 term on images."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from torchgraft.errors import BadInput
from torchgraft.parts.mixers.inline_attention import (
    InLineAttention,
    dynamic_conv3x3,
    injectivity_probe,
    inline_attention,
)

KERNELS = {"identity": lambda x: x, "relu": torch.relu, "exp": torch.exp}


def draw(tokens: int = 9, size: int = 3, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, tokens, 2, size, generator=g, dtype=torch.float64) for _ in range(3))
    return q, k, v


def weights_of(q: Tensor, k: Tensor, kernel: str) -> Tensor:
    """Return the weights of one head entry by entry; (T, K), (N, K) -> (T, N)."""
    a, b = KERNELS[kernel](q) * q.shape[-1] ** -0.5 / len(k), KERNELS[kernel](k)
    rows = []
    for i in range(len(a)):
        products = torch.stack([a[i] @ b[j] for j in range(len(b))])
        rows.append(products - products.sum() / len(b) + 1 / len(b))
    return torch.stack(rows)


@pytest.mark.parametrize("kernel", list(KERNELS))
@pytest.mark.parametrize("tokens", [1, 2, 9])
def test_linear_form_equals_weights_written_out(kernel: str, tokens: int) -> None:
    q, k, v = draw(tokens)
    found = inline_attention(q, k, v, kernel=kernel)
    for head in range(2):
        weights = weights_of(q[1, :, head], k[1, :, head], kernel)
        torch.testing.assert_close(found[1, :, head], weights @ v[1, :, head], rtol=0, atol=1e-12)


def test_rows_sum_to_one() -> None:
    q, k, v = draw()
    torch.testing.assert_close(inline_attention(q, k, torch.ones_like(v)), torch.ones_like(v), rtol=0, atol=1e-12)


def test_a_constant_added_to_all_keys_changes_nothing() -> None:
    q, k, v = draw()
    shift = torch.randn(3, dtype=torch.float64) * 5
    torch.testing.assert_close(inline_attention(q, k + shift, v), inline_attention(q, k, v), rtol=0, atol=1e-11)


def divided(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    products = torch.einsum("bthk,bnhk->bhtn", q.relu(), k.relu())
    return torch.einsum("bhtn,bnhv->bthv", products / products.sum(-1, keepdim=True), v)


def test_division_confuses_collinear_queries_and_subtraction_does_not() -> None:
    q, k, _ = draw(12)
    q = q.abs() + 0.1
    eye = torch.eye(12, dtype=torch.float64)[None, :, None].expand(2, 12, 2, 12)  # outputs are the weights
    torch.testing.assert_close(divided(2 * q, k, eye), divided(q, k, eye), rtol=0, atol=1e-12)
    apart = (inline_attention(2 * q, k, eye, kernel="relu") - inline_attention(q, k, eye, kernel="relu")).norm(dim=-1)
    centred = k.relu() - k.relu().mean(1, keepdim=True)
    least = torch.linalg.svdvals(centred.transpose(1, 2))[..., -1]  # (B, H)
    assert float(least.min()) > 0.1
    bound = q.norm(dim=-1) * least[:, None] * 3**-0.5 / 12
    assert bool((apart >= bound * (1 - 1e-9)).all())


def test_probe_counts_confused_pairs() -> None:
    q, k, _ = draw(12)
    q = q.abs() + 0.1
    q = torch.cat([q, 2 * q], 1)
    eye = torch.eye(12, dtype=torch.float64)[None, :, None].expand(2, 12, 2, 12)
    pairs = 24 * 23 / 2
    found = injectivity_probe(divided(q, k, eye).transpose(1, 2), cosine=1 - 1e-12)
    assert found >= 12 / pairs - 1e-6
    assert injectivity_probe(inline_attention(q, k, eye, kernel="relu").transpose(1, 2), cosine=1 - 1e-12) == 0.0


def test_a_tap_at_the_centre_adds_v() -> None:
    v, taps = torch.randn(2, 12, 5), torch.zeros(2, 5, 9)
    taps[..., 4] = 1.0
    assert torch.equal(dynamic_conv3x3(v, taps, 4), v)


def test_dynamic_convolution_equals_torch_sample_by_sample() -> None:
    v, taps = torch.randn(3, 20, 5, dtype=torch.float64), torch.randn(3, 5, 9, dtype=torch.float64)
    found = dynamic_conv3x3(v, taps, 4)
    for row in range(3):
        image = v[row].T.reshape(1, 5, 5, 4)
        expected = F.conv2d(image, taps[row].reshape(5, 1, 3, 3), padding=1, groups=5)
        torch.testing.assert_close(found[row], expected.flatten(2)[0].T, rtol=0, atol=1e-12)


def test_dynamic_convolution_moves_with_the_image() -> None:
    image = torch.randn(1, 8, 8, 2, dtype=torch.float64)
    taps = torch.randn(1, 2, 9, dtype=torch.float64)
    still = dynamic_conv3x3(image.flatten(1, 2), taps, 8).unflatten(1, (8, 8))
    moved = dynamic_conv3x3(image.roll((1, 1), (1, 2)).flatten(1, 2), taps, 8).unflatten(1, (8, 8))
    torch.testing.assert_close(moved[:, 2:-1, 2:-1], still[:, 1:-2, 1:-2], rtol=0, atol=1e-12)


def test_a_short_last_row_is_filled_with_zeros() -> None:
    v, taps = torch.randn(1, 10, 3, dtype=torch.float64), torch.randn(1, 3, 9, dtype=torch.float64)
    filled = dynamic_conv3x3(F.pad(v, (0, 0, 0, 2)), taps, 4)[:, :10]
    torch.testing.assert_close(dynamic_conv3x3(v, taps, 4), filled, rtol=0, atol=0)


def test_order_does_not_matter_without_the_local_term_and_does_with_it() -> None:
    torch.manual_seed(0)
    x, order = torch.randn(2, 12, 8, dtype=torch.float64), torch.randperm(12)
    plain = InLineAttention(8, num_heads=2, local=False).double()
    torch.testing.assert_close(plain(x[:, order]), plain(x)[:, order], rtol=0, atol=1e-12)
    local = InLineAttention(8, num_heads=2, width=4).double()
    assert not torch.allclose(local(x[:, order]), local(x)[:, order], atol=1e-3)


def test_settings_and_images_are_checked() -> None:
    with pytest.raises(BadInput, match="kernel"):
        InLineAttention(8, num_heads=2, kernel="softmax")
    with pytest.raises(BadInput, match="width"):
        InLineAttention(8, num_heads=2, width=0)
    with pytest.raises(BadInput, match="12 tokens"):
        InLineAttention(8, num_heads=2, width=4, height=3)(torch.zeros(1, 13, 8))
