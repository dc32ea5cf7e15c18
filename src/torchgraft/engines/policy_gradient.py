"""The policy gradient: actions are drawn, their log-probabilities added up, and rewards say which to make likelier.

`Simple statistical gradient-following algorithms for connectionist reinforcement learning
<https://doi.org/10.1007/BF00992696>`_ (Williams, 1992): grad E[R] = E[(R - b) grad log pi(a)], for any baseline b that
does not depend on the actions; a good one makes the estimate less noisy and leaves its mean. Where the actions can be
enumerated, :func:`exact_objective` is E[R] itself, against which estimates are tested.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from torchgraft.errors import BadInput

__all__ = [
    "ConstantBaseline",
    "EmaBaseline",
    "Episode",
    "bernoulli_log_prob",
    "categorical_log_prob",
    "enumerate_actions",
    "exact_objective",
    "reinforce_loss",
]


def bernoulli_log_prob(logits: Tensor, actions: Tensor) -> Tensor:
    """Return the log-probability of independent yes-or-no ``actions`` with P(1) = sigmoid(logits).

    Shapes:
        logits (..., L), actions of zeros and ones (..., L) -> (...)

    Example:
        >>> bernoulli_log_prob(torch.zeros(2), torch.tensor([1.0, 0.0])).exp()
        tensor(0.2500)
    """
    sign = 2.0 * actions.to(logits.dtype) - 1.0
    return F.logsigmoid(sign * logits).sum(-1)


def categorical_log_prob(logits: Tensor, actions: Tensor) -> Tensor:
    """Return the log-probability of independent choices with P(k) = softmax(logits)_k.

    Shapes:
        logits (..., L, K), actions (..., L) of indices -> (...)

    Example:
        >>> categorical_log_prob(torch.zeros(1, 4), torch.tensor([2])).exp()
        tensor(0.2500)
    """
    chosen = torch.log_softmax(logits, -1).gather(-1, actions.long().unsqueeze(-1))  # (..., L, 1)
    return chosen.squeeze(-1).sum(-1)


class Episode:
    """One rollout of a policy: draws actions, one after another or many at once, and adds up their log-probabilities.

    Args:
        generator: where randomness comes from; default: torch's own.
        forced: actions to take in place of drawn ones, in order; for enumerating and for replaying.

    Example:
        >>> episode = Episode(forced=[torch.tensor([1, 0]), torch.tensor([2])])
        >>> _ = episode.decide(torch.zeros(2)), episode.choose(torch.zeros(1, 3))
        >>> [action.tolist() for action in episode.actions], round(float(episode.log_prob.exp()), 4)
        ([[1, 0], [2]], 0.0833)
    """

    def __init__(self, *, generator: torch.Generator | None = None, forced: Sequence[Tensor] | None = None) -> None:
        self._generator = generator
        self._forced = None if forced is None else list(forced)
        self._log_probs: list[Tensor] = []
        self._entropies: list[Tensor] = []
        #: What was done, in order.
        self.actions: list[Tensor] = []

    @property
    def log_prob(self) -> Tensor:
        """The log-probability of all actions together, a scalar that carries gradients."""
        if not self._log_probs:
            raise BadInput("an episode without actions has no log-probability")
        return torch.stack(self._log_probs).sum()

    @property
    def entropy(self) -> Tensor:
        """The entropy of the distributions that were drawn from, summed."""
        if not self._entropies:
            raise BadInput("an episode without actions has no entropy")
        return torch.stack(self._entropies).sum()

    def decide(self, logits: Tensor) -> Tensor:
        """Draw a yes (1) or no (0) for every one of ``logits`` (L,), P(1) = sigmoid(logits)."""
        chances = torch.sigmoid(logits)
        drawn = (torch.rand(logits.shape, generator=self._generator, dtype=logits.dtype) < chances.detach()).long()
        action = self._taken(drawn)
        self._log_probs.append(bernoulli_log_prob(logits, action))
        self._entropies.append(-(chances * F.logsigmoid(logits) + (1 - chances) * F.logsigmoid(-logits)).sum())
        return action

    def choose(self, logits: Tensor) -> Tensor:
        """Draw an index below K for every row of ``logits`` (L, K), P(k) = softmax(logits)_k."""
        log_p = torch.log_softmax(logits, -1)
        drawn = torch.multinomial(log_p.detach().exp(), 1, generator=self._generator).squeeze(-1)  # (L,)
        action = self._taken(drawn)
        self._log_probs.append(categorical_log_prob(logits, action))
        self._entropies.append(-(log_p.exp() * log_p).sum())
        return action

    def _taken(self, drawn: Tensor) -> Tensor:
        place = len(self.actions)
        if self._forced is not None:
            if place >= len(self._forced) or self._forced[place].shape != drawn.shape:
                raise BadInput(f"forced actions do not fit: action {place} needs shape {tuple(drawn.shape)}")
            drawn = self._forced[place].long()
        self.actions.append(drawn)
        return drawn


class ConstantBaseline:
    """A baseline that stays what it is.

    Args:
        value: the baseline; 0 is none.
    """

    def __init__(self, value: float = 0.0) -> None:
        self.value = value

    def advantages(self, rewards: Tensor) -> Tensor:
        """Return how far ``rewards`` lie above the baseline."""
        return rewards - self.value


class EmaBaseline:
    """An exponential moving average of the rewards of earlier batches.

    A batch is held against what was known before it, so that the estimate stays unbiased; only then it is learned from.

    Args:
        decay: the share of the old average that stays at each batch, in [0, 1).
        value: the average before the first batch; ``None``: 0, and the first batch's mean takes its place outright.

    Example:
        >>> baseline = EmaBaseline(decay=0.5)
        >>> baseline.advantages(torch.tensor([2.0, 4.0])), baseline.value
        (tensor([2., 4.]), 3.0)
        >>> baseline.advantages(torch.tensor([5.0])), baseline.value
        (tensor([2.]), 4.0)
    """

    def __init__(self, *, decay: float = 0.9, value: float | None = None) -> None:
        if not 0.0 <= decay < 1.0:
            raise BadInput(f"decay must lie in [0, 1), got {decay}")
        self.decay = decay
        self._fresh = value is None
        self.value = 0.0 if value is None else value

    def advantages(self, rewards: Tensor) -> Tensor:
        """Return how far ``rewards`` (m,) lie above the average so far, then learn from them."""
        found = rewards - self.value
        mean = float(rewards.mean())
        self.value = mean if self._fresh else self.decay * self.value + (1 - self.decay) * mean
        self._fresh = False
        return found


def reinforce_loss(log_probs: Tensor, advantages: Tensor) -> Tensor:
    """Return -(1/m) sum_k log pi(a_k) (R_k - b): its gradient is minus the estimate of grad E[R].

    Args:
        log_probs: of the actions of each rollout.
        advantages: rewards less the baseline; no gradient flows into them.

    Shapes:
        (m,), (m,) -> ()

    Raises:
        BadInput: the two do not hold the same number of rollouts, or none.
    """
    if log_probs.shape != advantages.shape or log_probs.ndim != 1 or len(log_probs) == 0:
        raise BadInput(
            "reinforce needs log_probs and advantages of one shape (m,), m >= 1;"
            f" got {tuple(log_probs.shape)} and {tuple(advantages.shape)}"
        )
    return -(log_probs * advantages.detach().to(log_probs)).mean()


def enumerate_actions(sizes: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Yield every string of actions, where the i-th has ``sizes[i]`` values.

    Example:
        >>> list(enumerate_actions((2, 2)))
        [(0, 0), (0, 1), (1, 0), (1, 1)]
    """
    yield from itertools.product(*(range(size) for size in sizes))


def exact_objective(log_probs: Tensor, rewards: Tensor) -> Tensor:
    """Return E[R] = sum_a pi(a) R(a) over all action strings a; its gradient is the exact policy gradient.

    Args:
        log_probs: log pi(a) of every string, with gradients.
        rewards: R(a).

    Shapes:
        (A,), (A,) -> ()

    Raises:
        BadInput: the probabilities do not sum to one, so strings are missing or doubled.
    """
    total = float(log_probs.detach().exp().sum())
    if not abs(total - 1.0) < 1e-4:
        raise BadInput(f"the probabilities of all action strings must sum to 1, got {total:.6g}")
    return (log_probs.exp() * rewards.detach().to(log_probs)).sum()
