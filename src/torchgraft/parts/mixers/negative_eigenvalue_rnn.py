"""Linear recurrences whose transitions have negative eigenvalues, and so can count modulo 2, or as rotations modulo m.

Paper: `Unlocking State-Tracking in Linear RNNs Through Negative Eigenvalues <https://arxiv.org/abs/2411.12537>`_.

Equation: ``S_t = A_t S_{t-1} + ...`` with ``A_t = prod_n (I - beta_n k_n k_n^T)``, ``beta_n = 2 sigmoid(w_n^T x_t)``,
or ``A_t = diag(2 s_t - 1)``, ``s_t = exp(-Delta_t exp(w))``.

The recurrence engine takes positive decays. Negative ones reach it exactly: let ``a_t`` be the decays of the channels
and ``c_t = sign(a_1) ... sign(a_t)`` the running products of their signs. With ``R_t = diag(c_t) S_t``, and as
``c_t c_t = 1``, ``S_t = diag(a_t) S_{t-1} + k_t v_t^T`` becomes ``R_t = diag(c_t a_t c_{t-1}) R_{t-1} + (c_t k_t)
v_t^T``, where ``c_t a_t c_{t-1} = |a_t|``; and ``o_t = S_t^T q_t = R_t^T (c_t q_t)``. So signs go onto queries and
keys, and the last state is ``diag(c_T) R_T``.

Departures:
    - The diagonal variant is a mixer of its own with one decay a channel and token, without Mamba's short convolution,
      gate and skip. Its ``|2 s - 1|`` is held above 1e-6 (1e-12 in float64), so that its logarithm is finite.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft.catalogue import Card
from torchgraft.catalogue.card import Claim
from torchgraft.engines.recurrence.delta import DeltaMixer, exact, shares
from torchgraft.engines.recurrence.heads import HeadNorm, head_size, merge_heads, split_heads
from torchgraft.engines.recurrence.linear_mixer import LinearMixer, Tokens
from torchgraft.engines.recurrence.mixer import State

__all__ = ["CARD", "DiagonalEigenvalueRNN", "NegativeEigenvalueRNN", "Spectrum", "eig_range"]

CARD = Card(
    key="negative-eigenvalue-rnn",
    title="Linear recurrences with negative eigenvalues",
    seed_id=248,
    authors="Grazzi, Siems, Zela, Franke, Hutter and Pontil, 2025",
    reference="https://arxiv.org/abs/2411.12537",
    family="parts/mixers",
    kind="part",
    engine=("recurrence",),
    equation="A_t = prod_n (I - beta_n k_n k_n^T), beta_n = 2 sigmoid(w_n^T x_t);  or A_t = diag(2 s_t - 1)",
    entry="NegativeEigenvalueRNN",
    capabilities=frozenset({"causal", "stateful", "linear-time", "compilable"}),
    declared={
        "parameters": "(int(expand_k * d_model) * (1 + householders) + int(expand_v * d_model) * householders)"
        " * (d_model + conv) + d_model * num_heads * householders"
        " + int(expand_v * d_model) // num_heads + int(expand_v * d_model) * d_model"
    },
    example={"d_model": 16, "num_heads": 2, "expand_k": 1.0, "expand_v": 1.0, "conv": 4, "householders": 2},
    shapes=((2, 12, 16),),
    oracles=(
        "beta 2 at each one and 0 at each zero give the parity of 1e5 tokens exactly, with one channel",
        "with beta at most 1 the state of one channel never grows and never changes its sign",
        "two Householder steps whose normals stand at an angle of theta / 2 are a rotation by theta (1e-12), and at "
        "theta = 2 pi / 3 they count modulo 3",
        "the norm of the transition is at most 1 for every beta in [0, 2]",
        "signs folded into queries and keys equal a loop over the signed recurrence (1e-9)",
    ),
    claim=Claim(
        text="Running sums modulo 2 and 3, trained on 32 digits and asked at 128, one layer of width 32, equal steps: "
        "beta up to 2 against the same net with beta up to 1, two Householder steps against one, and decays 2 s - 1 "
        "against s.",
        figure="median over seeds of the accuracy at 128 digits, rescaled so that guessing is 0: parity >= 0.95 for "
        "the delta rule and for the diagonal, <= 0.60 for their positive twins; modulo 3 >= 0.90 with two Householder "
        "steps, <= 0.50 with one and for the positive twin of two",
    ),
    choose_when="the model must keep count of a state: parity, brackets, permutations, the lines of a program",
    choose_instead="deltanet where only recall matters; a non-linear cell where the state is small and speed does not",
    bibtex="@inproceedings{grazzi2025unlocking, title={Unlocking State-Tracking in Linear RNNs Through Negative "
    'Eigenvalues}, author={Grazzi, Riccardo and Siems, Julien and Zela, Arber and Franke, J{\\"o}rg K.H. and Hutter, '
    "Frank and Pontil, Massimiliano}, booktitle={ICLR}, year={2025}}",
)


class NegativeEigenvalueRNN(DeltaMixer):
    """The delta rule with shares from 0 to 2 and, where asked for, several Householder steps a token.

    Args:
        d_model: the width D.
        num_heads: number of heads H.
        expand_k: width of all keys together, as a share of D.
        expand_v: width of all values together, as a share of D.
        conv: taps of the short convolution; 0 leaves it out.
        householders: steps N a token: 1 reflects, 2 rotate, N permute what N exchanges of two can. Costs N times one.
        gated: whether the memory decays too; the output then has a SiLU gate.
        positive: whether the shares go up to 1 only: the twin that cannot track a state.

    Shapes:
        x: (B, T, D) -> (B, T, D); memory of the state: (B, H, K, V).

    Example:
        >>> import torch
        >>> mixer = NegativeEigenvalueRNN(16, num_heads=2, householders=2)
        >>> x = torch.randn(1, 5, 16)
        >>> y, state = mixer.prefill(x[:, :4])
        >>> torch.allclose(mixer.step(x[:, 4], state)[0], mixer(x)[:, 4], atol=1e-5)
        True

    Raises:
        BadInput: ``num_heads`` does not divide the widths, or ``conv`` or ``householders`` is out of range.
    """

    def __init__(
        self,
        d_model: int,
        *,
        num_heads: int = 4,
        expand_k: float = 1.0,
        expand_v: float = 1.0,
        conv: int = 4,
        householders: int = 1,
        gated: bool = False,
        positive: bool = False,
    ) -> None:
        super().__init__(
            d_model,
            num_heads=num_heads,
            expand_k=expand_k,
            expand_v=expand_v,
            conv=conv,
            householders=householders,
            beta_max=1.0 if positive else 2.0,
            gated=gated,
        )

    def transitions(self, x: Tensor) -> Tensor:
        """Return every token's transition ``A_t``, (B, T, D) -> (B, T, H, K, K)."""
        tokens, _ = self.tokens(self.checked(x), self.init_state(len(x)))
        steps = (self.householders, self.num_heads)
        keys = torch.unflatten(tokens.k, 2, steps)  # (B, T, N, H, K)
        share = torch.unflatten(shares(self.beta(x), self.beta_max), 2, steps)
        result = torch.eye(self.key_size, dtype=keys.dtype, device=x.device).expand(
            *keys.shape[:2], self.num_heads, -1, -1
        )
        if tokens.log_decay is not None:
            result = result * tokens.log_decay.exp()[..., None, None]
        for step in range(self.householders):
            k = keys[:, :, step]
            result = result - share[:, :, step, :, None, None] * k[..., None] * (k[..., None, :] @ result)
        return result


def signed_decay(rate: Tensor, positive: bool = False) -> tuple[Tensor, Tensor]:
    """Return ``log |a|`` and ``sign(a)`` of ``a = 2 s - 1``, or of ``a = s``, with ``s = exp(-rate)``.

    Example:
        >>> log_size, sign = signed_decay(torch.tensor([0.0, 10.0]))
        >>> [round(float(value), 3) + 0.0 for value in sign * log_size.exp()]
        [1.0, -1.0]
    """
    if positive:
        return -rate, torch.ones_like(rate)
    above = rate < math.log(2.0)  # s > 1/2
    away = torch.where(above, -torch.expm1(-rate), torch.exp(-rate))  # how far s is from 1 or from 0: at most 1/2
    least = 1e-12 if rate.dtype == torch.float64 else 1e-6
    log_size = torch.log1p(-2.0 * away.clamp(max=0.5 - 0.5 * least))
    return log_size, torch.where(above, 1.0, -1.0).to(rate.dtype)


class DiagonalEigenvalueRNN(LinearMixer):
    """A decay a channel that the input decides, between -1 and 1.

    Args:
        d_model: the width D.
        num_heads: number of heads H.
        expand_k: width of all keys together, as a share of D.
        expand_v: width of all values together, as a share of D.
        positive: whether the decays are ``s`` instead of ``2 s - 1``: the twin that cannot track a state.

    Shapes:
        x: (B, T, D) -> (B, T, D); memory of the state: (B, H, K, V).

    Example:
        >>> import torch
        >>> mixer = DiagonalEigenvalueRNN(16, num_heads=2)
        >>> x = torch.randn(1, 5, 16)
        >>> y, state = mixer.prefill(x[:, :4])
        >>> torch.allclose(mixer.step(x[:, 4], state)[0], mixer(x)[:, 4], atol=1e-5)
        True

    Raises:
        BadInput: ``num_heads`` does not divide the widths of keys and values.
    """

    def __init__(
        self,
        d_model: int,
        *,
        num_heads: int = 4,
        expand_k: float = 1.0,
        expand_v: float = 1.0,
        positive: bool = False,
    ) -> None:
        keys, values = int(expand_k * d_model), int(expand_v * d_model)
        super().__init__(
            d_model,
            num_heads=num_heads,
            key_size=head_size(keys, num_heads, "expand_k * d_model"),
            value_size=head_size(values, num_heads, "expand_v * d_model"),
        )
        self.positive = positive
        self.query = nn.Linear(d_model, keys, bias=False)
        self.key = nn.Linear(d_model, keys, bias=False)
        self.value = nn.Linear(d_model, values, bias=False)
        self.delta = nn.Linear(d_model, keys)
        self.rate = nn.Parameter(torch.zeros(keys))
        self.norm = HeadNorm(self.value_size)
        self.out = nn.Linear(values, d_model, bias=False)

    def _decay(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return Delta, log |a| and sign(a), (B, T, H, K) each."""
        delta = split_heads(F.softplus(exact(self.delta(x))), self.num_heads)
        rate = exact(self.rate).exp().view(self.num_heads, self.key_size)
        return delta, *signed_decay(delta * rate, self.positive)

    def tokens(self, x: Tensor, state: State) -> tuple[Tokens, State]:  # noqa: D102
        delta, log_decay, sign = self._decay(x)
        turns = sign.cumprod(dim=1)  # c_t
        q, k, v = (split_heads(project(x), self.num_heads) for project in (self.query, self.key, self.value))
        tokens = Tokens(turns * q, turns * delta * k, v, log_decay=log_decay, scale=self.key_size**-0.5)
        return tokens, {"turns": turns[:, -1]}

    def prefill(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Mix ``x``, (B, T, D), after ``state``; return the output and the state after the last token."""
        y, after = super().prefill(x, state)
        return y, {"memory": after["turns"][..., None] * after["memory"]}

    def output(self, o: Tensor, x: Tensor) -> Tensor:  # noqa: D102
        y: Tensor = self.out(merge_heads(self.norm(o)))
        return y

    def transitions(self, x: Tensor) -> Tensor:
        """Return every token's transition ``A_t``, (B, T, D) -> (B, T, H, K, K)."""
        _, log_decay, sign = self._decay(self.checked(x))
        return (sign * log_decay.exp()).diag_embed()


@dataclass(frozen=True)
class Spectrum:
    """Where the eigenvalues of every token's transition lie, (B, T, H) each.

    Args:
        least: the least real part; below 0, signs can flip, and the layer can compute a parity.
        largest: the largest real part.
        turn: the largest imaginary part; above 0, the transition rotates, and the layer can count further than 2.
        radius: the largest modulus; above 1, the state may grow.
    """

    least: Tensor
    largest: Tensor
    turn: Tensor
    radius: Tensor


@torch.no_grad()
def eig_range(mixer: NegativeEigenvalueRNN | DiagonalEigenvalueRNN, x: Tensor) -> Spectrum:
    """Return where the eigenvalues of the transitions of ``mixer`` on ``x``, (B, T, D), lie.

    It finds the eigenvalues of B T H matrices of K by K: for looking, not for training.

    Example:
        >>> found = eig_range(NegativeEigenvalueRNN(8, num_heads=2), torch.randn(1, 4, 8))
        >>> found.least.shape, bool((found.least >= -1).all()), bool((found.radius <= 1 + 1e-5).all())
        (torch.Size([1, 4, 2]), True, True)
    """
    values = torch.linalg.eigvals(mixer.transitions(x))
    return Spectrum(values.real.amin(-1), values.real.amax(-1), values.imag.amax(-1), values.abs().amax(-1))
