"""The policy gradient against E[R] enumerated: unbiased with any baseline, log-probabilities by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from torchgraft.engines.policy_gradient import (
    ConstantBaseline,
    EmaBaseline,
    Episode,
    bernoulli_log_prob,
    categorical_log_prob,
    enumerate_actions,
    exact_objective,
    reinforce_loss,
)
from torchgraft.errors import BadInput

_STRINGS = torch.tensor(list(enumerate_actions((2, 2, 2))))
_REWARDS = torch.tensor([0.3, -1.0, 0.5, 2.0, 0.0, 1.5, -0.5, 0.8], dtype=torch.float64)


def _logits() -> Tensor:
    return torch.tensor([0.4, -0.7, 1.1], dtype=torch.float64, requires_grad=True)


def test_bernoulli_log_prob_by_hand() -> None:
    logits = torch.tensor([math.log(3.0), 0.0], dtype=torch.float64)  # P(1) = 3/4, 1/2
    found = bernoulli_log_prob(logits, torch.tensor([[1, 1], [0, 1]])).exp()
    torch.testing.assert_close(found, torch.tensor([0.375, 0.125], dtype=torch.float64))


def test_categorical_log_prob_by_hand() -> None:
    logits = torch.tensor([[math.log(1.0), math.log(2.0), math.log(5.0)], [0.0, 0.0, 0.0]], dtype=torch.float64)
    assert float(categorical_log_prob(logits, torch.tensor([2, 0])).exp()) == pytest.approx(5 / 8 / 3)


def test_exact_objective_and_its_gradient_by_hand() -> None:
    logit = torch.tensor([0.0], dtype=torch.float64, requires_grad=True)
    log_probs = torch.stack([bernoulli_log_prob(logit, torch.tensor([a])) for a in (0, 1)])
    value = exact_objective(log_probs, torch.tensor([1.0, 3.0], dtype=torch.float64))
    (slope,) = torch.autograd.grad(value, logit)
    assert float(value.detach()) == pytest.approx(2.0)
    assert float(slope) == pytest.approx(0.25 * (3.0 - 1.0))  # sigmoid' (R(1) - R(0))


@settings(max_examples=20, deadline=None)
@given(st.floats(-3, 3))
def test_the_expected_estimate_is_exact_whatever_the_baseline(value: float) -> None:
    """Sum over all strings of pi(a) times the estimate made from a alone: no sampling, so no tolerance for noise."""
    logits = _logits()
    log_probs = torch.stack([bernoulli_log_prob(logits, a) for a in _STRINGS])
    (exact,) = torch.autograd.grad(exact_objective(log_probs, _REWARDS), logits)
    expected = torch.zeros(3, dtype=torch.float64)
    for actions, reward in zip(_STRINGS, _REWARDS, strict=True):
        one = bernoulli_log_prob(logits, actions)
        loss = reinforce_loss(one[None], ConstantBaseline(value).advantages(reward[None]))
        expected -= one.detach().exp() * torch.autograd.grad(loss, logits)[0]
    torch.testing.assert_close(expected, exact, rtol=0, atol=1e-12)


def test_sampled_estimates_average_to_the_exact_gradient() -> None:
    logits, draw = _logits(), torch.Generator().manual_seed(0)
    log_probs = torch.stack([bernoulli_log_prob(logits, a) for a in _STRINGS])
    (exact,) = torch.autograd.grad(exact_objective(log_probs, _REWARDS), logits)
    baseline, estimates = EmaBaseline(), []
    for _ in range(1500):
        episode = Episode(generator=draw)
        actions = episode.decide(logits)
        reward = _REWARDS[int((actions * torch.tensor([4, 2, 1])).sum())]
        loss = reinforce_loss(episode.log_prob[None], baseline.advantages(reward[None]))
        estimates.append(-torch.autograd.grad(loss, logits)[0])
    found = torch.stack(estimates)
    error = found.std(0) / len(found) ** 0.5
    assert bool(((found.mean(0) - exact).abs() <= 3 * error).all())
    assert float(exact.abs().max()) > 6 * float(error.max())  # zeros would not pass


def test_choices_follow_their_probabilities() -> None:
    logits, draw = torch.tensor([[0.0, math.log(3.0)]]), torch.Generator().manual_seed(0)
    drawn = torch.cat([Episode(generator=draw).choose(logits) for _ in range(2000)])
    assert float(drawn.float().mean()) == pytest.approx(0.75, abs=0.03)


def test_entropy_of_an_episode_adds_up() -> None:
    episode = Episode(generator=torch.Generator().manual_seed(0))
    episode.decide(torch.zeros(3))
    episode.choose(torch.zeros(2, 4))
    assert float(episode.entropy) == pytest.approx(3 * math.log(2) + 2 * math.log(4))


def test_the_ema_baseline_looks_only_back() -> None:
    baseline = EmaBaseline(decay=0.9, value=1.0)
    assert baseline.advantages(torch.tensor([5.0])).tolist() == [4.0]
    assert baseline.value == pytest.approx(1.4)


def test_bad_input() -> None:
    with pytest.raises(BadInput, match="decay"):
        EmaBaseline(decay=1.0)
    with pytest.raises(BadInput, match="one shape"):
        reinforce_loss(torch.zeros(2), torch.zeros(3))
    with pytest.raises(BadInput, match="sum to 1"):
        exact_objective(torch.log(torch.tensor([0.5, 0.2])), torch.zeros(2))
    with pytest.raises(BadInput, match="forced"):
        Episode(forced=[]).decide(torch.zeros(2))
    with pytest.raises(BadInput, match="no log-probability"):
        _ = Episode().log_prob
    with pytest.raises(BadInput, match="no entropy"):
        _ = Episode().entropy
