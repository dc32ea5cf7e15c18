"""Elastic embedders: exactly as many blocks as asked for, and scores by hand."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from torchgraft.bench.models import TextEncoder
from torchgraft.engines.nesting.embed import (
    ElasticEmbedder,
    coordinate_divergence,
    cut,
    grid_eval,
    in_batch_contrast,
    reciprocal_rank,
)
from torchgraft.errors import BadInput


def _embedder() -> tuple[ElasticEmbedder, torch.Tensor]:
    torch.manual_seed(0)
    encoder = TextEncoder(nn.Embedding(13, 8), 6, depth=4, num_heads=2).double().eval()
    tokens = torch.randint(1, 13, (5, 6))
    tokens[0, 4:] = 0
    return ElasticEmbedder(encoder, tokens), tokens


def _calls(embedder: ElasticEmbedder) -> list[int]:
    seen: list[int] = []
    for place, block in enumerate(embedder.encoder.blocks):
        block.register_forward_hook(lambda module, args, output, at=place: seen.append(at))
    return seen


def test_the_whole_embedder_is_the_encoder() -> None:
    embedder, tokens = _embedder()
    with torch.no_grad():
        expected = embedder.encoder(tokens)
        assert torch.equal(embedder.encode(tokens, layer=4, dim=8, renormalise=False), expected)
        assert torch.equal(embedder.encode(tokens, renormalise=False), expected)
        unit = embedder.encode(tokens, dim=3)
        assert torch.allclose(unit.norm(dim=-1), torch.ones(5, dtype=torch.float64))
        assert torch.allclose(unit, expected[:, :3] / expected[:, :3].norm(dim=-1, keepdim=True))


@pytest.mark.parametrize("layer", [1, 2, 3, 4])
def test_as_many_blocks_run_as_are_asked_for(layer: int) -> None:
    embedder, tokens = _embedder()
    seen = _calls(embedder)
    with torch.no_grad():
        found = embedder.encode(tokens, layer=layer, renormalise=False)
        assert seen == list(range(layer))
        encoder = embedder.encoder
        x, real = encoder.embed(tokens) + encoder.position, tokens != 0
        for block in encoder.blocks[:layer]:
            x = block(x, real[:, None, None, :])
        weight = real.unsqueeze(-1).double()
        assert torch.allclose(found, (encoder.norm(x) * weight).sum(1) / weight.sum(1), atol=1e-12)


def test_one_pass_gives_the_embeddings_of_many_layers_with_gradients() -> None:
    embedder, tokens = _embedder()
    seen = _calls(embedder)
    views = embedder(tokens, (2, 4, 1))
    assert list(views) == [1, 2, 4]
    assert seen == [0, 1, 2, 3]
    for layer, view in views.items():
        assert torch.allclose(view, embedder.encode(tokens, layer=layer, renormalise=False), atol=1e-12)
    views[2].sum().backward()
    gradients = [block.mlp.fc1.weight.grad is not None for block in embedder.encoder.blocks]
    assert gradients == [True, True, False, False]
    assert sorted(embedder(tokens)) == [1, 2, 3, 4]


def test_the_encoder_is_left_as_it_was() -> None:
    embedder, tokens = _embedder()
    blocks = list(embedder.encoder.blocks)
    state = copy.deepcopy(embedder.state_dict())
    embedder(tokens)
    embedder.encode(tokens, layer=1)
    with pytest.raises(Exception, match="index"):
        embedder.encode(tokens + 100, layer=1)
    assert list(embedder.encoder.blocks) == blocks
    assert all(torch.equal(value, state[name]) for name, value in embedder.state_dict().items())
    assert not any(block._forward_hooks for block in blocks)


def test_divergence_and_contrast_by_hand() -> None:
    a, b = torch.tensor([[0.0, math.log(3.0)]]), torch.tensor([[0.0, 0.0]])
    by_hand = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    assert float(coordinate_divergence(a, b)) == pytest.approx(by_hand, abs=1e-6)
    teacher = a.clone().requires_grad_(True)
    coordinate_divergence(teacher, b.requires_grad_(True), detach=True).backward()
    assert teacher.grad is None
    left = torch.tensor([[2.0, 0.0], [0.0, 3.0]])
    right = torch.tensor([[1.0, 1.0], [0.0, 1.0]])
    half = 2**-0.5
    rows = [math.log(1 + math.exp(0.0 - half)), math.log(1 + math.exp(half - 1.0))]
    assert float(in_batch_contrast(left, right, scale=1.0)) == pytest.approx(sum(rows) / 2, abs=1e-6)


def test_ranks_by_hand() -> None:
    right = torch.eye(4)
    left = torch.tensor([[1.0, 0, 0, 0], [0.9, 0.5, 0, 0], [0.5, 0.4, 0.3, 0], [1.0, 1.0, 1.0, 0.5]])
    assert reciprocal_rank(left, right).tolist() == pytest.approx([1, 1 / 2, 1 / 3, 1 / 4])
    assert reciprocal_rank(left, right, at=2).tolist() == pytest.approx([1, 1 / 2, 0, 0])
    assert reciprocal_rank(torch.ones(3, 2), torch.ones(3, 2)).tolist() == pytest.approx(
        [1 / 3] * 3
    )  # ties are no luck


def test_the_heat_map_is_made_of_single_encodings() -> None:
    embedder, tokens = _embedder()
    other = tokens.flip(1)
    embedder.train()
    found = grid_eval((embedder, embedder), (tokens, other), layers=(1, 3), dims=(2, 8))
    assert embedder.training
    embedder.eval()
    with torch.no_grad():
        for row, layer in enumerate((1, 3)):
            for column, dim in enumerate((2, 8)):
                pair = [embedder.encode(each, layer=layer, dim=dim) for each in (tokens, other)]
                assert float(found[row, column]) == pytest.approx(float(reciprocal_rank(*pair).mean()), abs=1e-6)


def test_layers_and_sizes_that_are_not_there_are_refused() -> None:
    embedder, tokens = _embedder()
    for layer in (0, 5):
        with pytest.raises(BadInput, match="layer"):
            embedder.encode(tokens, layer=layer)
    with pytest.raises(BadInput, match="dim"):
        cut(torch.zeros(2, 3), 4)
    with pytest.raises(BadInput, match="stack"):
        ElasticEmbedder(nn.Linear(2, 2), torch.ones(1, 2))
