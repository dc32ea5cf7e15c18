"""UGround's policy and prompt: exact expected gradients, frequencies, invariances."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from torch import Tensor

from torchgraft.elastic.policy_prompted_masking import (
    LayerPolicy,
    blurred,
    mask_loss,
    reinforce_loss,
    similarity_prompt,
)
from torchgraft.errors import BadInput


def policy(**changes: object) -> LayerPolicy:
    torch.manual_seed(0)
    made = LayerPolicy(6, num_layers=4, **changes).double()  # type: ignore[arg-type]
    with torch.no_grad():
        made.weight.normal_()
    return made


def states(batch: int = 1) -> Tensor:
    return torch.randn(batch, 1, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("baseline", [0.0, 3.7])
def test_the_expected_gradient_is_that_of_the_expected_reward(baseline: float) -> None:
    made, x = policy(), states()
    rewards = torch.tensor([0.3, -1.0, 2.0, 0.7], dtype=torch.float64)
    chances = made(x)[0, 0].softmax(0)
    (wanted,) = torch.autograd.grad(-(chances * rewards).sum(), [made.weight])
    found = torch.zeros_like(wanted)
    for layer in range(4):
        loss = reinforce_loss(made(x)[0], torch.tensor([layer]), rewards[layer : layer + 1] - baseline)
        found += float(chances[layer].detach()) * torch.autograd.grad(loss, [made.weight])[0]
    assert torch.allclose(found, wanted, atol=1e-10)
    assert bool(wanted.any())


def test_the_logits_by_hand() -> None:
    made, x = policy(), states(2)
    wanted = torch.stack([x[:, 0, layer] @ made.weight[layer] for layer in range(4)], 1)
    assert torch.allclose(made(x)[:, 0], wanted, atol=1e-12)
    with torch.no_grad():
        fresh = LayerPolicy(6, num_layers=4).double()
        assert torch.allclose(fresh(x), x.mean(-1), atol=1e-12)


@pytest.mark.parametrize("baseline", ["ema", "critic"])
def test_the_loss_by_hand(baseline: str) -> None:
    made, x = policy(baseline=baseline), states(3)
    layer, reward = torch.tensor([[0], [2], [3]]), torch.tensor([[0.5], [-1.0], [2.0]], dtype=torch.float64)
    log_pi = made(x)[:, 0].log_softmax(-1)[torch.arange(3), layer[:, 0]].detach()
    guess, squares = torch.zeros(3, dtype=torch.float64), 0.0
    if made.critic is not None:
        guess = made.critic(made(x)[:, 0].softmax(-1))[:, 0].detach()
        squares = float((guess - reward[:, 0]).square().mean())
    found = made.loss(x, layer, reward)
    wanted = squares - float(((reward[:, 0] - guess) * log_pi).mean())
    assert float(found.detach()) == pytest.approx(wanted, abs=1e-12)
    if baseline == "ema":  # the first batch's mean is the baseline of the second one
        again = -float(((reward[:, 0] - 0.5) * log_pi).mean())
        assert float(made.loss(x, layer, reward).detach()) == pytest.approx(again, abs=1e-12)


def test_layers_come_as_often_as_the_policy_says() -> None:
    made = policy()
    x = states().expand(20_000, -1, -1, -1)
    drawn = made.sample(x, generator=torch.Generator().manual_seed(0)).flatten()
    expected = 20_000 * made(states())[0, 0].softmax(0)
    counts = torch.bincount(drawn, minlength=4)
    assert chisquare(counts.numpy(), expected.detach().numpy()).pvalue > 0.01
    assert chisquare(counts.numpy(), expected.detach().flip(0).numpy()).pvalue < 1e-6
    assert int(made.best(states())) == int(expected.argmax())


@pytest.mark.parametrize("baseline", ["ema", "critic"])
def test_no_gradient_reaches_the_states(baseline: str) -> None:
    made, x = policy(baseline=baseline), states(5).requires_grad_()
    layer = made.sample(x, generator=torch.Generator().manual_seed(0))
    made.loss(x, layer, torch.arange(5.0, dtype=torch.float64)[:, None]).backward()
    assert x.grad is None
    assert all(value.grad is not None and bool(value.grad.any()) for value in made.parameters())


def test_a_fresh_policy_learns_at_the_rate_of_the_weights_beside_it() -> None:
    """Each step of Adam moves every weight by about its rate, so that logits move by the rate times the states' sum."""
    torch.manual_seed(0)
    made = LayerPolicy(32, num_layers=5)
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(1)).expand(24, 1, 5, 32)
    draw = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(made.parameters(), lr=3e-3)
    for _ in range(100):
        layer = made.sample(x, generator=draw)
        loss = made.loss(x, layer, (layer == 2).float())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(made(x)[0, 0].detach().softmax(-1)[2]) > 0.9


def test_the_policy_finds_the_rewarded_layer() -> None:
    made, x = policy(), states(32).abs()  # there is no bias: only states of one sign can say which layer
    draw = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(made.parameters(), lr=0.05)
    for _ in range(120):
        layer = made.sample(x, generator=draw)
        loss = made.loss(x, layer, (layer == 2).double())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float((made.best(x) == 2).double().mean()) > 0.9


@settings(deadline=None)
@given(st.integers(0, 1000), st.floats(0.1, 50), st.floats(-20, 20))
def test_the_map_does_not_see_positive_affine_changes(seed: int, scale: float, shift: float) -> None:
    draw = torch.Generator().manual_seed(seed)
    query = torch.zeros(2, 4, dtype=torch.float64)
    query[:, 0] = 1.0
    patches = torch.randn(2, 6, 4, dtype=torch.float64, generator=draw)
    changed = patches.clone()
    changed[..., 0] = scale * patches[..., 0] + shift
    first = similarity_prompt(query, patches, (4, 6), grid=(2, 3))
    assert torch.allclose(first, similarity_prompt(query, changed, (4, 6), grid=(2, 3)), atol=1e-9)
    assert float(first.min()) >= 0
    assert float(first.max()) <= 1 + 1e-9


def test_the_map_by_hand_and_where_it_is_flat() -> None:
    patches = torch.tensor([[[1.0], [2.0], [3.0], [5.0]]])
    found = similarity_prompt(torch.tensor([[2.0]]), patches, (2, 2), grid=(2, 2))
    assert found.flatten().tolist() == pytest.approx([0.0, 0.25, 0.5, 1.0])
    flat = torch.ones(1, 4, 1, requires_grad=True)
    made = similarity_prompt(torch.ones(1, 1), flat, (2, 2), grid=(2, 2))
    made.sum().backward()
    assert not bool(made.any())
    assert flat.grad is not None
    assert bool(flat.grad.isfinite().all())


def test_blurred_masks_peak_at_one_and_the_loss_knows_right_from_wrong() -> None:
    mask = torch.zeros(1, 1, 9, 9)
    mask[0, 0, 4, 4] = 1.0
    soft = blurred(mask, kernel=5, sigma=1.0)
    assert float(soft.max()) == 1.0
    assert float(soft[0, 0, 4, 5]) == pytest.approx(0.6065, abs=1e-3)
    assert float(soft[0, 0, 4, 7]) == 0.0
    assert float(mask_loss(mask, mask)) < 0.01 < float(mask_loss(1 - mask, mask))


def test_bad_input_is_refused() -> None:
    with pytest.raises(BadInput, match="baseline"):
        LayerPolicy(4, baseline="none")  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="grid"):
        similarity_prompt(torch.ones(1, 2), torch.ones(1, 5, 2), (4, 4), grid=(2, 2))
    with pytest.raises(BadInput, match="kernel"):
        blurred(torch.zeros(1, 1, 4, 4), kernel=4)
