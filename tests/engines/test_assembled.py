"""A weight put together from buffers: kept while they stand, made anew when one of them changes in any way."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from torchgraft.engines.assembled import Assembled


def test_it_is_made_once_and_again_when_a_part_changes() -> None:
    made: list[int] = []
    a, b = torch.ones(2), torch.ones(2)
    whole = Assembled()

    def value() -> Tensor:
        def make() -> Tensor:
            made.append(1)
            return a + b

        return whole.value((a, b), make)

    assert value() is value()
    b.mul_(3)  # in place
    assert torch.equal(value(), a + b)
    assert len(made) == 2
    b = torch.full((2,), 7.0)  # another object
    assert torch.equal(value(), a + b)
    assert len(made) == 3
    assert not value().requires_grad
    # parts may grow in number
    assert torch.equal(whole.value((a,), lambda: a * 5), a * 5)


def test_copies_and_inference_tensors_keep_nothing() -> None:
    a = torch.ones(2)
    whole = Assembled()
    first = whole.value((a,), lambda: a + 1)
    assert copy.deepcopy(whole).value((a,), lambda: a + 2) is not first
    with torch.inference_mode():
        part = torch.ones(2)
        assert whole.value((part,), lambda: part + 1) is not whole.value((part,), lambda: part + 1)
        # made of ordinary buffers in inference mode, it is an ordinary tensor: kept, and of use to autograd later
        other = Assembled()
        early = other.value((a,), lambda: a + 1)
        assert other.value((a,), lambda: a + 2) is early
    assert other.value((a,), lambda: a + 2) is early
    x = torch.ones(2, requires_grad=True)
    (early * x).sum().backward()
    assert torch.equal(x.grad, a + 1)
