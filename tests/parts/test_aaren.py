"""Aaren: equal to attention with one constant query written out, in every form, and blind to what is asked."""

from __future__ import annotations

import pytest
import torch

from torchgraft.errors import BadInput
from torchgraft.parts.mixers.aaren import Aaren


def build(d_model: int = 8, num_heads: int = 2) -> Aaren:
    torch.manual_seed(0)
    return Aaren(d_model, num_heads=num_heads).double()


@pytest.mark.parametrize("form", ["auto", "step", "chunk", "parallel"])
@pytest.mark.parametrize("tokens", [1, 7, 33, 100])
def test_equals_attention_of_a_constant_query_written_out(form: str, tokens: int) -> None:
    mixer = build()
    mixer.form = form
    x = torch.randn(2, tokens, 8, dtype=torch.float64)
    q = (mixer.q.weight @ mixer.query).view(2, 4)
    k, v = (x @ mixer.kv.weight.T).split(8, -1)
    expected = torch.zeros(2, tokens, 8, dtype=torch.float64)
    for head in range(2):
        own = slice(4 * head, 4 * head + 4)
        for t in range(tokens):
            weights = (k[:, : t + 1, own] @ q[head] / 2.0).softmax(-1)
            expected[:, t, own] = (weights[..., None] * v[:, : t + 1, own]).sum(1)
    torch.testing.assert_close(mixer(x), expected @ mixer.out.weight.T, rtol=0, atol=1e-12)


def test_a_query_of_zero_gives_the_running_mean() -> None:
    mixer = build()
    with torch.no_grad():
        mixer.query.zero_()
    x = torch.randn(1, 20, 8, dtype=torch.float64)
    mean = mixer.kv(x)[..., 8:].cumsum(1) / torch.arange(1, 21, dtype=torch.float64)[:, None]
    torch.testing.assert_close(mixer(x), mixer.out(mean), rtol=0, atol=1e-12)


def test_state_is_three_tensors_of_constant_size() -> None:
    mixer = build()
    shapes = []
    for tokens in (1, 5, 200):
        state = mixer.prefill(torch.randn(3, tokens, 8, dtype=torch.float64))[1]
        shapes.append({name: tuple(value.shape) for name, value in state.items()})
    assert shapes[0] == shapes[1] == shapes[2] == {"maximum": (3, 2), "weight": (3, 2), "value": (3, 2, 4)}


def test_one_layer_cannot_look_up_what_the_current_token_asks_for() -> None:
    """The current token changes the output by its own share only, whatever stood before: no recall by content."""
    mixer = build()
    x = torch.randn(2, 6, 8, dtype=torch.float64)
    x[1, :5] = x[0, :5]
    states = mixer.prefill(x[:, :5])[1]
    y, after = mixer.step(x[:, 5], states)
    back = torch.linalg.solve(mixer.out.weight, y.T).T.view(2, 2, 4)  # o, before the output projection
    share = ((after["maximum"] - states["maximum"]).neg().exp() * states["weight"] / after["weight"])[..., None]
    before = states["value"] / states["weight"][..., None]
    own = mixer.kv(x[:, 5])[..., 8:].view(2, 2, 4)
    torch.testing.assert_close(back, share * before + (1 - share) * own, rtol=0, atol=1e-10)


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(BadInput, match="num_heads"):
        Aaren(8, num_heads=3)
