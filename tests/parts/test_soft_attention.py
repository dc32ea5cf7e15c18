"""SOFT: the full kernel where all tokens are landmarks, Newton's iteration, and symmetry."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from torchgraft.engines.recurrence.heads import merge_heads, split_heads
from torchgraft.errors import BadInput
from torchgraft.parts.mixers.soft_attention import SoftAttention, newton_inverse

DOUBLE = torch.float64


def spd(size: int = 5) -> Tensor:
    draw = torch.Generator().manual_seed(0)
    root = torch.randn(2, size, size, generator=draw, dtype=DOUBLE)
    return root @ root.mT / size + 0.5 * torch.eye(size, dtype=DOUBLE)


def gaussian(q: Tensor, k: Tensor) -> Tensor:
    return (-(torch.cdist(q, k) ** 2) / (2 * q.shape[-1] ** 0.5)).exp()


def test_with_all_tokens_as_landmarks_the_kernel_is_whole() -> None:
    torch.manual_seed(0)
    mixer = SoftAttention(
        8, num_heads=2, landmarks=7, symmetric=False, project=False, ridge=0.0, kernel=0, iterations=60
    ).to(DOUBLE)
    x = 3 * torch.randn(2, 7, 8, dtype=DOUBLE)
    q, v = (split_heads(project(x), 2).transpose(1, 2) for project in (mixer.q, mixer.v))
    expected = mixer.out(merge_heads((gaussian(q, q) @ v).transpose(1, 2)))
    assert torch.allclose(mixer(x), expected, atol=1e-10)
    fewer = SoftAttention(8, num_heads=2, landmarks=3, symmetric=False, project=False, ridge=0.0, kernel=0).to(DOUBLE)
    fewer.load_state_dict(mixer.state_dict())
    assert not torch.allclose(fewer(x), expected, atol=1e-2)


@pytest.mark.parametrize("symmetric", [False, True])
def test_the_mixer_equals_its_equation_written_out(symmetric: bool) -> None:
    torch.manual_seed(0)
    mixer = SoftAttention(8, num_heads=2, landmarks=4, symmetric=symmetric, iterations=60).double()
    x = torch.randn(2, 9, 8, dtype=DOUBLE, requires_grad=True)
    q, v = mixer.q(x).view(2, 9, 2, 4), mixer.v(x).view(2, 9, 2, 4)
    means = F.adaptive_avg_pool1d(q.flatten(2).mT, 4).mT.reshape(2, 4, 2, 4)
    marks = F.gelu(F.layer_norm(means, (4,)))

    def kernel(one: Tensor, other: Tensor) -> Tensor:  # exp(-|a - b|^2 / (2 sqrt(K))), (B, H, ., .)
        return (-(one[:, :, None] - other[:, None]).square().sum(-1) / (2 * 4**0.5)).exp().permute(0, 3, 1, 2)

    a, p = kernel(marks, marks), kernel(marks, q)
    middle = torch.linalg.inv(a + 0.01 * torch.eye(4, dtype=DOUBLE))
    if symmetric:
        half = torch.diag_embed(a.sum(-1) ** -0.5)
        middle = half @ middle @ half
    mixed = (p.mT @ middle @ p @ v.transpose(1, 2)).transpose(1, 2).flatten(2)
    assert mixer.local is not None
    expected = mixer.out(mixed + mixer.local(v.flatten(2).mT).mT)
    found = mixer(x)
    assert torch.allclose(found, expected, atol=1e-10)
    upstream = torch.randn_like(expected)
    pairs = [torch.autograd.grad(y, (x, mixer.q.weight), upstream, retain_graph=True) for y in (found, expected)]
    assert all(torch.allclose(one, other, atol=1e-9) for one, other in zip(*pairs, strict=True))


def test_newton_squares_the_residual_and_ends_at_the_inverse() -> None:
    a = spd()
    eye = torch.eye(5, dtype=DOUBLE)
    for steps in (1, 2, 3, 4):
        before, after = eye - a @ newton_inverse(a, steps), eye - a @ newton_inverse(a, steps + 1)
        assert torch.allclose(after, before @ before, atol=1e-12)
    assert np.allclose(newton_inverse(a, 30).numpy(), np.linalg.pinv(a.numpy()), atol=1e-10)


def test_the_gradient_is_that_of_the_inverse() -> None:
    a = spd().requires_grad_()
    weight = torch.randn(2, 5, 5, dtype=DOUBLE)
    found = torch.autograd.grad((newton_inverse(a, 30) * weight).sum(), a)[0]
    expected = torch.autograd.grad((torch.linalg.inv(a) * weight).sum(), a)[0]
    assert torch.allclose(found, expected, atol=1e-9)
    assert torch.autograd.gradcheck(lambda x: newton_inverse(x, 40), (spd(3).requires_grad_(),))


@pytest.mark.parametrize("symmetric", [False, True])
def test_the_low_rank_kernel_is_symmetric_and_has_no_negative_eigenvalue(symmetric: bool) -> None:
    torch.manual_seed(0)
    mixer = SoftAttention(8, num_heads=2, landmarks=4, symmetric=symmetric, iterations=60).to(DOUBLE)
    q = split_heads(mixer.q(torch.randn(1, 11, 8, dtype=DOUBLE)), 2)
    marks, middle = mixer.kernels(q)
    p = gaussian(marks.transpose(1, 2), q.transpose(1, 2))  # (B, H, m, T)
    kernel = (p.mT @ middle @ p).detach()
    assert torch.allclose(kernel, kernel.mT, atol=1e-10)
    assert float(torch.linalg.eigvalsh(kernel).min()) > -1e-10


def test_normalisation_bounds_the_kernel_among_landmarks() -> None:
    torch.manual_seed(0)
    mixer = SoftAttention(8, num_heads=2, landmarks=6).to(DOUBLE)
    marks = mixer.pooled(split_heads(mixer.q(torch.randn(1, 30, 8, dtype=DOUBLE)), 2)).transpose(1, 2)
    a = gaussian(marks, marks).detach()
    root = a.sum(-1).rsqrt()
    normed = root[..., None] * a * root[..., None, :]
    assert float(torch.linalg.matrix_norm(normed, ord=2).max()) <= 1 + 1e-12
    assert float(torch.linalg.matrix_norm(a, ord=2).max()) > 1.5  # it is no small matter


def test_a_grid_pools_and_convolves_in_two_dimensions() -> None:
    torch.manual_seed(0)
    mixer = SoftAttention(8, num_heads=2, landmarks=4, grid=(4, 6))
    x = torch.randn(2, 24, 8)
    assert mixer(x).shape == x.shape
    turned = SoftAttention(8, num_heads=2, landmarks=4, grid=(6, 4))
    turned.load_state_dict(mixer.state_dict())
    assert mixer.local is not None
    turned.local.weight.data = mixer.local.weight.data.mT.clone()  # type: ignore[union-attr]  # it has one
    flipped = x.view(2, 4, 6, 8).transpose(1, 2).reshape(2, 24, 8)
    assert torch.allclose(turned(flipped).view(2, 6, 4, 8).transpose(1, 2).reshape(2, 24, 8), mixer(x), atol=1e-5)
    with pytest.raises(BadInput, match="24 tokens"):
        mixer(x[:, :20])


def test_bad_settings_are_refused() -> None:
    for options in ({"landmarks": 0}, {"iterations": 0}, {"ridge": -1.0}, {"kernel": 2}, {"num_heads": 3}):
        with pytest.raises(BadInput):
            SoftAttention(8, **options)  # type: ignore[arg-type]  # that is the point
    with pytest.raises(BadInput, match="square"):
        newton_inverse(torch.ones(2, 3))
