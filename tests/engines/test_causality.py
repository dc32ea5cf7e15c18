"""Whether a model looks ahead: seen where one later token is enough, not seen where none counts, and when not told."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from torchgraft.bench.models import ByteTransformer
from torchgraft.engines.causality import looks_ahead
from torchgraft.errors import BadInput


class Net(nn.Module):
    """Two linear layers with a mixing of tokens between them; takes a second tensor, which may be named."""

    def __init__(self, mix: str, pooled: bool = False) -> None:
        super().__init__()
        self.mix, self.pooled = mix, pooled
        self.embed, self.first, self.second = nn.Embedding(8, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, tokens: Tensor, weight: Tensor) -> Any:
        x = self.first(self.embed(tokens) * weight[:, :, None])
        if self.mix == "before":
            x = x + x.cumsum(1)
        elif self.mix == "last":
            x = torch.cat([x[:, :-1] + 0.01 * x[:, -1:], x[:, -1:]], 1)
        elif self.mix == "pairs":
            x = x + x.unflatten(1, (-1, 2)).sum(2).repeat_interleave(2, 1)
        elif self.mix == "next":
            x = x + x.roll(-1, 1)
        x = self.second(x)
        return {"said": x.mean(1) if self.pooled else x}


def inputs() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    return torch.randint(8, (3, 9), generator=draw), torch.rand(3, 9, generator=draw)


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize(
    ("mix", "pooled", "ahead"),
    [
        ("before", False, []),
        ("before", True, []),
        ("last", False, ["second", ""]),
        ("next", False, ["second", ""]),
        ("next", True, ["second"]),
    ],
)
def test_where_later_tokens_are_seen(mix: str, pooled: bool, ahead: list[str], named: bool) -> None:
    torch.manual_seed(0)
    model, (tokens, weight) = Net(mix, pooled), inputs()
    example: Any = {"tokens": tokens, "weight": weight} if named else (tokens, weight)
    found = looks_ahead(model, example, ["first", "second"], tokens=9)
    assert found == ahead
    assert model.training, "its mode is what it was"


def test_tokens_that_see_each_other_in_pairs_are_found_out() -> None:
    tokens, weight = inputs()
    for length in (2, 4, 8):
        example = (tokens[:, :length], weight[:, :length])
        assert looks_ahead(Net("pairs"), example, ["second"], tokens=length) == ["second", ""]


def test_one_sample_tells_by_its_own_beginning() -> None:
    tokens, weight = inputs()
    assert looks_ahead(Net("last"), (tokens[:1], weight[:1]), ["second"], tokens=9) == ["second", ""]


def test_a_causal_transformer_looks_not_ahead_in_any_precision() -> None:
    torch.manual_seed(0)
    x = inputs()[0]
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        model = ByteTransformer(8, 9, d_model=16, depth=2, num_heads=2, spread=1.0).to(dtype)
        assert looks_ahead(model, x, ["blocks.0.mlp", "blocks.1.mlp"], tokens=9) == []


def test_what_cannot_be_told_is_refused() -> None:
    tokens, weight = inputs()
    with pytest.raises(BadInput, match="the 7 tokens are not those of the inputs"):
        looks_ahead(Net("before"), (tokens, weight), ["second"], tokens=7)
    with pytest.raises(BadInput, match="all samples end alike"):
        looks_ahead(Net("before"), (tokens[:, :1], weight[:, :1]), ["second"], tokens=1)
    with pytest.raises(BadInput, match="all samples end alike"):
        looks_ahead(Net("before"), (torch.zeros_like(tokens), torch.ones_like(weight)), ["second"], tokens=9)
