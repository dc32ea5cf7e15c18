"""Attention, state space models and gated recurrent networks written as one linear dynamical system.

Paper: `Understanding the Differences in Foundation Models: Attention, State Space Models, and Recurrent Neural Networks
<https://arxiv.org/abs/2405.15731>`_.

Equation: ``h_t = Lambda_t h_{t-1} + B_t u_t``, ``y_t = C_t h_t + D_t u_t``, with Lambda_t diagonal and h_t of N = n * d
entries; what depends on t depends on the inputs.

In these letters, with phi the feature map, eta the normaliser, and a sum over s <= t in the attentions:

- linear attention: ``Lambda_t = eta_{t-1} / eta_t``, ``B_t = phi(k_t) (x) W_V / eta_t``, ``C_t = phi(q_t)^T (x) I``;
- softmax attention: the same with infinitely many features, here the Taylor features up to a degree;
- S6: ``Lambda_t = exp(-Delta_t a)``, ``B_t = Delta_t (x) W_B u_t``, ``C_t = (W_C u_t)^T``, one Delta in both;
- a gated network (qLSTM, RG-LRU): n = 1, gates of their own for what is kept, written and read.

Departures:

- Matrices are compared by what they compute: the order of the Kronecker factors is a convention.
- The Taylor features are the distinct monomials, C(d + P, P) of them, in place of all sum_p d^p powers.
- The logarithm of eta is held between -60 and 60, beyond which float32 overflows.
- 1e-6 is added to the classic normaliser, which is otherwise 0 / 0 where all features vanish.
- The reversed sigmoid of the qLSTM also takes the S6's initial Delta (0.001 to 0.1), which is what lets it keep.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations_with_replacement
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft.catalogue import Card
from torchgraft.catalogue.card import Claim
from torchgraft.engines.recurrence.heads import head_size, merge_heads, split_heads
from torchgraft.engines.recurrence.linear_mixer import LinearMixer, Tokens
from torchgraft.engines.recurrence.mixer import State
from torchgraft.errors import BadInput, nearest

__all__ = [
    "CARD",
    "DynamicalSystem",
    "GatedNetwork",
    "NormalizedAttention",
    "Row",
    "SelectiveStateSpace",
    "compare_dsf",
    "dsf",
    "taylor_features",
]

CARD = Card(
    key="dynamical-systems-framework",
    title="Dynamical systems framework",
    seed_id=56,
    authors="Sieber, Alonso, Didier, Zeilinger and Orvieto, 2024",
    reference="https://arxiv.org/abs/2405.15731",
    family="parts/mixers",
    kind="analysis",
    engine=("recurrence",),
    equation="h_t = Lambda_t h_{t-1} + B_t u_t,  y_t = C_t h_t + D_t u_t",
    entry="dsf",
    oracles=(
        "the system of each member, run step by step, gives the member's own output (float64, 1e-9)",
        "Taylor features of degree P approach softmax attention: the error is below the tail of the exponential and "
        "falls with P",
        "exp(-softplus(z)) = sigmoid(-z), and S6 with one Delta and one decay equals normalised attention with "
        "eta_t = prod exp(Delta_s a)",
        "the state that is reported has n * d entries, counted on the matrices",
    ),
    claim=Claim(
        text="Associative recall of 8 pairs over 64 symbols, two layers of width 64: linear attention with 8, 16, 32 "
        "and 64 features; its normaliser exchanged for exp and softplus of the input; the qLSTM's gate exchanged for "
        "the reversed sigmoid of S6.",
        figure="mean accuracy never falls by more than 2 points as the features double and rises from 8 to 64; "
        "exp and softplus above the classic normaliser at 16 features; reversed sigmoid at least the qLSTM's",
    ),
    choose_when="two sequence mixers are to be compared by what they keep, write and read, or one is to be derived "
    "from another",
    choose_instead="the mixer itself (gated-linear-attention, deltanet) for computing: the matrices here are dense",
    confidence="medium",
    bibtex="@inproceedings{sieber2024dsf, title={Understanding the Differences in Foundation Models: Attention, State "
    "Space Models, and Recurrent Neural Networks}, author={Sieber, Jerome and Alonso, Carmen Amo and Didier, Alexandre "
    "and Zeilinger, Melanie N. and Orvieto, Antonio}, booktitle={NeurIPS}, year={2024}}",
)

Normaliser = Literal["sum", "exp", "softplus", "sigmoid"]
Gate = Literal["sigmoid", "reversed", "rg-lru"]
#: Beyond this, exp overflows float32 once a few factors come together.
_REACH = 60.0
#: Added to a sum of features, which are zero where inputs are far below 0.
_EMPTY = 1e-6


@dataclass(frozen=True)
class DynamicalSystem:
    """A linear system whose matrices change from token to token.

    Args:
        transition: the diagonals of Lambda, (T, N).
        write: B, (T, N, D).
        read: C, (T, D, N).
        direct: D, (T, D, D), or ``None`` for zero.
        expansion: n, the entries of the state for each channel that is stored.
    """

    transition: Tensor
    write: Tensor
    read: Tensor
    direct: Tensor | None
    expansion: int

    @property
    def state_size(self) -> int:
        """Number of entries N of the state."""
        return self.transition.shape[1]

    def run(self, u: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the outputs, (T, D), and the last state, (N,), token by token."""
        h = self.transition.new_zeros(self.state_size) if state is None else state
        outputs = []
        for t, u_t in enumerate(u):
            h = self.transition[t] * h + self.write[t] @ u_t
            outputs.append(self.read[t] @ h + (0 if self.direct is None else self.direct[t] @ u_t))
        return torch.stack(outputs), h


def taylor_features(x: Tensor, *, degree: int) -> Tensor:
    """Return features with ``phi(q) . phi(k) = sum_{p <= degree} (q . k)^p / p!``, (..., K) -> (..., C(K + P, P)).

    Args:
        x: queries or keys, already divided by K^(1/4) for softmax's usual scale.
        degree: P.

    Example:
        >>> q, k = torch.tensor([2.0]), torch.tensor([3.0])
        >>> round(float(taylor_features(q, degree=2) @ taylor_features(k, degree=2)), 4)  # 1 + 6 + 36 / 2
        25.0

    Raises:
        BadInput: ``degree`` is negative.
    """
    if degree < 0:
        raise BadInput(f"degree must be at least 0, got {degree}")
    features = [torch.ones_like(x[..., 0])]
    for power in range(1, degree + 1):
        for chosen in combinations_with_replacement(range(x.shape[-1]), power):
            repeats = math.prod(math.factorial(chosen.count(i)) for i in set(chosen))
            features.append(x[..., list(chosen)].prod(-1) / math.sqrt(repeats))
    return torch.stack(features, -1)


def _log_eta(z: Tensor, eta: str) -> Tensor:
    """Return log eta of the normaliser's input, in float32 at least."""
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    if eta == "sigmoid":
        z = F.logsigmoid(z)
    elif eta == "softplus":
        z = torch.where(z < -20, z, F.softplus(z.clamp(min=-20)).log())  # softplus(z) -> exp(z) far below 0
    return z.clamp(-_REACH, _REACH)


def _choice(name: str, value: str, known: list[str]) -> None:
    if value not in known:
        raise BadInput(f"{name} must be one of {known}, got {value!r}{nearest(value, known)}")


class NormalizedAttention(LinearMixer):
    """Linear attention whose normaliser may be read from the current input alone.

    Args:
        d_model: the width D.
        num_heads: H.
        features: n, the size of queries and keys of a head (before ``degree``).
        eta: ``"sum"`` is the classic normaliser, ``phi(q_t) . sum_s phi(k_s)``; ``"exp"``, ``"softplus"`` and
            ``"sigmoid"`` are those functions of a linear reading of the input, one number a head.
        degree: where above 0, the features are the Taylor features of softmax up to this degree; else elu(x) + 1. At
            odd degrees the classic normaliser may cross zero where queries and keys are large.

    Shapes:
        x: (B, T, D) -> (B, T, D); memory of the state: (B, H, n, V).

    Example:
        >>> NormalizedAttention(8, num_heads=2, features=4, eta="softplus")(torch.randn(1, 5, 8)).shape
        torch.Size([1, 5, 8])

    Raises:
        BadInput: ``num_heads`` does not divide the width, or an option is unknown.
    """

    coupling: ClassVar[str] = "keeping and writing share eta"

    def __init__(
        self, d_model: int, *, num_heads: int = 1, features: int = 16, eta: Normaliser = "exp", degree: int = 0
    ) -> None:
        _choice("eta", eta, ["sum", "exp", "softplus", "sigmoid"])
        if features < 1 or degree < 0:
            raise BadInput(f"features must be at least 1 and degree at least 0, got {features} and {degree}")
        size = head_size(d_model, num_heads)
        super().__init__(
            d_model,
            num_heads=num_heads,
            key_size=math.comb(features + degree, degree) if degree else features,
            value_size=size + (eta == "sum"),  # the sum of the keys is one more value, which is always 1
        )
        self.features, self.eta, self.degree, self.size = features, eta, degree, size
        self.query = nn.Linear(d_model, num_heads * features, bias=False)
        self.key = nn.Linear(d_model, num_heads * features, bias=False)
        self.value = nn.Linear(d_model, d_model, bias=False)
        self.normaliser = None if eta == "sum" else nn.Linear(d_model, num_heads)
        self.out = nn.Linear(d_model, d_model, bias=False)

    def phi(self, x: Tensor) -> Tensor:
        """Return the features of queries or keys, (..., n)."""
        return taylor_features(x * self.features**-0.25, degree=self.degree) if self.degree else F.elu(x) + 1

    def tokens(self, x: Tensor, state: State) -> tuple[Tokens, State]:  # noqa: D102
        q, k = (self.phi(split_heads(project(x), self.num_heads)) for project in (self.query, self.key))
        v = split_heads(self.value(x), self.num_heads)
        return Tokens(q, k, F.pad(v, (0, 1), value=1.0) if self.eta == "sum" else v), {}

    def output(self, o: Tensor, x: Tensor) -> Tensor:  # noqa: D102
        if self.normaliser is None:
            o = o[..., :-1] / (o[..., -1:] + _EMPTY)
        else:
            o = o * _log_eta(self.normaliser(x), self.eta).neg().exp()[..., None].to(o.dtype)
        y: Tensor = self.out(merge_heads(o))
        return y

    def system(self, u: Tensor) -> DynamicalSystem:
        """Return the matrices at the inputs ``u``, (T, D)."""
        x = u[None]
        read, _ = self.tokens(x, {})
        q, k = read.q[0], read.k[0]  # (T, H, n)
        if self.normaliser is None:
            eta = torch.einsum("thn,thn->th", q, k.cumsum(0)) + _EMPTY
            inverse, ratio = 1 / eta, eta[:-1] / eta[1:]
        else:
            log_eta = _log_eta(self.normaliser(u), self.eta)
            inverse, ratio = (-log_eta).exp(), (log_eta[:-1] - log_eta[1:]).exp()
        ratio = torch.cat([torch.ones_like(inverse[:1]), ratio])  # (T, H); there is nothing to keep at first
        heads, size, tokens = self.num_heads, self.size, len(u)
        values = torch.unflatten(self.value.weight, 0, (heads, size))  # (H, V, D)
        write = torch.einsum("thn,hvd,th->thnvd", k, values, inverse)
        back = torch.unflatten(self.out.weight, 1, (heads, size))  # (D, H, V)
        read_out = torch.einsum("dhv,thn->tdhnv", back, q)
        return DynamicalSystem(
            transition=ratio[:, :, None].expand(tokens, heads, self.key_size * size).flatten(1),
            write=write.flatten(1, 3),
            read=read_out.flatten(2),
            direct=None,
            expansion=self.key_size,
        )


class SelectiveStateSpace(LinearMixer):
    """S6, the selective state space of Mamba, without Mamba's convolution and gate around it.

    Args:
        d_model: the width D; every channel has a state of its own.
        state_size: n.
        scalar: whether all channels and entries of the state share one Delta and one decay.

    Shapes:
        x: (B, T, D) -> (B, T, D); memory of the state: (B, D, n, 1).

    Example:
        >>> SelectiveStateSpace(8, state_size=4)(torch.randn(1, 5, 8)).shape
        torch.Size([1, 5, 8])

    Raises:
        BadInput: ``state_size`` is below 1.
    """

    coupling: ClassVar[str] = "keeping and writing share Delta"

    def __init__(self, d_model: int, *, state_size: int = 16, scalar: bool = False) -> None:
        if state_size < 1:
            raise BadInput(f"state_size must be at least 1, got {state_size}")
        super().__init__(d_model, num_heads=d_model, key_size=state_size, value_size=1)
        self.scalar = scalar
        self.delta = nn.Linear(d_model, 1 if scalar else d_model)
        self.write, self.read = (nn.Linear(d_model, state_size, bias=False) for _ in range(2))
        rates = torch.ones(1, 1) if scalar else torch.arange(1.0, state_size + 1).repeat(d_model, 1)
        self.log_rate = nn.Parameter(rates.log())  # (D, n): a = exp(log_rate)
        self.skip = nn.Parameter(torch.ones(d_model))
        _small_delta(self.delta)

    def tokens(self, x: Tensor, state: State) -> tuple[Tokens, State]:  # noqa: D102
        delta = F.softplus(self.delta(x))[..., None]  # (B, T, D or 1, 1)
        shape = (*x.shape, self.key_size)
        log_decay = (-delta * self.log_rate.exp()).expand(shape)
        q = self.read(x)[:, :, None].expand(shape)
        return Tokens(q, (delta * self.write(x)[:, :, None]).expand(shape), x[..., None], log_decay=log_decay), {}

    def output(self, o: Tensor, x: Tensor) -> Tensor:  # noqa: D102
        return merge_heads(o) + self.skip * x

    def system(self, u: Tensor) -> DynamicalSystem:
        """Return the matrices at the inputs ``u``, (T, D)."""
        read = self.tokens(u[None], {})[0]
        each = torch.eye(self.d_model, dtype=u.dtype, device=u.device)
        decay = read.log_decay[0] if read.log_decay is not None else torch.zeros_like(read.k[0])
        return DynamicalSystem(
            transition=decay.exp().flatten(1),
            write=torch.einsum("tdn,de->tdne", read.k[0], each).flatten(1, 2),
            read=torch.einsum("tdn,de->tedn", read.q[0], each).flatten(2),
            direct=(self.skip * each).expand(len(u), -1, -1),
            expansion=self.key_size,
        )

    def as_attention(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return q, k, v, (T, n), (T, n), (T, D), and log eta, (T,), of the normalised attention that this equals.

        ``y_t = (1 / eta_t) sum_{s <= t} (q_t . eta_s k_s) v_s`` beside the skip, with ``eta_t = prod exp(Delta_s a)``.

        Raises:
            BadInput: the transition is no scalar.
        """
        if not self.scalar:
            raise BadInput("only a state space with scalar=True equals a normalised attention, got scalar=False")
        delta = F.softplus(self.delta(u))  # (T, 1)
        return self.read(u), delta * self.write(u), u, (delta * self.log_rate.exp()).cumsum(0)[:, 0]


class GatedNetwork(LinearMixer):
    """A gated network whose gates see the input only, so that its state moves linearly: qLSTM and RG-LRU.

    Args:
        d_model: the width D.
        gate: what is kept: ``"sigmoid"`` of a reading of the input (qLSTM); ``"reversed"``, the S6's
            ``exp(-a softplus(z))``, which is ``sigmoid(-z)`` at a = 1; or ``"rg-lru"``, ``sigmoid(w)^(8 sigmoid(z))``
            with what is written scaled by ``sqrt(1 - kept^2)``.

    Shapes:
        x: (B, T, D) -> (B, T, D); memory of the state: (B, D, 1, 1).

    Example:
        >>> GatedNetwork(8, gate="rg-lru")(torch.randn(1, 5, 8)).shape
        torch.Size([1, 5, 8])

    Raises:
        BadInput: the gate is unknown.
    """

    def __init__(self, d_model: int, *, gate: Gate = "sigmoid") -> None:
        _choice("gate", gate, ["sigmoid", "reversed", "rg-lru"])
        super().__init__(d_model, num_heads=d_model, key_size=1, value_size=1)
        self.gate = gate
        self.forget, self.input, self.read = (nn.Linear(d_model, d_model) for _ in range(3))
        self.update = nn.Linear(d_model, d_model, bias=False)
        if gate == "reversed":
            _small_delta(self.forget)
            self.rate = nn.Parameter(torch.zeros(d_model))
        elif gate == "rg-lru":  # kept at sigmoid(z) = 1 / 2: 0.9 to 0.999, evenly
            kept = torch.linspace(0.9, 0.999, d_model) ** 0.25
            self.rate = nn.Parameter(kept.log() - (-kept).log1p())

    @property
    def coupling(self) -> str:
        """Which gates share what they read."""
        return "writing follows keeping" if self.gate == "rg-lru" else "none"

    def gates(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the log of what is kept, what is written and what is read of each channel, (..., D) each."""
        z = self.forget(x).to(torch.promote_types(x.dtype, torch.float32))
        write = self.input(x).sigmoid()
        if self.gate == "sigmoid":
            log_decay = F.logsigmoid(z)
        elif self.gate == "reversed":
            log_decay = -self.rate.exp() * F.softplus(z)
        else:
            log_decay = 8 * F.logsigmoid(self.rate) * z.sigmoid()
            write = write * (-torch.expm1(2 * log_decay)).clamp(min=1e-12).sqrt().to(write.dtype)
        return log_decay, write, self.read(x).sigmoid()

    def tokens(self, x: Tensor, state: State) -> tuple[Tokens, State]:  # noqa: D102
        log_decay, write, read = (part[..., None] for part in self.gates(x))  # (B, T, D, 1)
        return Tokens(read, write, self.update(x)[..., None], log_decay=log_decay), {}

    def output(self, o: Tensor, x: Tensor) -> Tensor:  # noqa: D102
        return merge_heads(o)

    def system(self, u: Tensor) -> DynamicalSystem:
        """Return the matrices at the inputs ``u``, (T, D)."""
        log_decay, write, read = self.gates(u)
        wide = torch.einsum("td,de->tde", write, self.update.weight)
        return DynamicalSystem(
            transition=log_decay.exp(), write=wide, read=torch.diag_embed(read), direct=None, expansion=1
        )


def _small_delta(layer: nn.Linear) -> None:
    """Set the bias so that softplus of it runs from 0.001 to 0.1 on a logarithmic scale."""
    with torch.no_grad():
        delta = torch.logspace(-3, -1, layer.out_features, dtype=layer.bias.dtype)
        layer.bias.copy_(delta.expm1().log())


#: The members, whose ``system`` gives their matrices.
Member = NormalizedAttention | SelectiveStateSpace | GatedNetwork


def dsf(model: Member, u: Tensor) -> DynamicalSystem:
    """Return ``model`` at the inputs ``u`` as a linear dynamical system.

    Args:
        model: linear or Taylor attention, S6 or a gated network of this module.
        u: one sequence of inputs.

    Shapes:
        u: (T, D).

    Example:
        >>> model, u = SelectiveStateSpace(4, state_size=2), torch.randn(5, 4)
        >>> system = dsf(model, u)
        >>> system.state_size, torch.allclose(system.run(u)[0], model(u[None])[0], atol=1e-5)
        (8, True)

    Raises:
        BadInput: the model is none of these, or ``u`` is no sequence of its width.
    """
    if not isinstance(model, Member):
        raise BadInput(
            "model must be a NormalizedAttention, SelectiveStateSpace or GatedNetwork, whose matrices are known, "
            f"got {type(model).__name__}"
        )
    if u.ndim != 2 or u.shape[1] != model.d_model or not len(u):
        raise BadInput(f"u must have shape (T, {model.d_model}) with T at least 1, got {tuple(u.shape)}")
    return model.system(u)


@dataclass(frozen=True)
class Row:
    """What one model keeps, and how.

    Args:
        model: its name.
        state_size: N, counted on the matrices.
        expansion: n = N / d.
        transition: ``"identity"``, ``"scalar"`` (one number a token), ``"head"`` (one a head) or ``"diagonal"``.
        changes: whether the transition depends on the token.
        coupling: what the gates share.
        direct: whether the input reaches the output past the state.
    """

    model: str
    state_size: int
    expansion: int
    transition: str
    changes: bool
    coupling: str
    direct: bool


def _kind(transition: Tensor, heads: int) -> str:
    """Say what the diagonals (T, N) have in common."""
    rest = transition[1:]  # before the first token there is nothing to keep

    def same(x: Tensor) -> bool:
        return bool((x - x[..., :1]).abs().max() <= 1e-12 + 1e-6 * x.abs().max()) if x.numel() else True

    if bool((rest == 1).all()):
        return "identity"
    if same(rest):
        return "scalar"
    return "head" if heads < rest.shape[1] and same(torch.unflatten(rest, 1, (heads, -1))) else "diagonal"


def compare_dsf(models: Mapping[str, Member], u: Tensor) -> list[Row]:
    """Return one row a model: state size, kind of transition, what the gates share; measured at the inputs ``u``.

    Args:
        models: members by name.
        u: one sequence, (T, D).

    Example:
        >>> models = {"S6": SelectiveStateSpace(4, state_size=2), "qLSTM": GatedNetwork(4)}
        >>> [(row.model, row.state_size, row.transition) for row in compare_dsf(models, torch.randn(5, 4))]
        [('S6', 8, 'diagonal'), ('qLSTM', 4, 'diagonal')]
    """
    rows = []
    for name, model in models.items():
        with torch.no_grad():
            system = dsf(model, u)
        steady = bool((system.transition[1:] == system.transition[1:2]).all())
        rows.append(
            Row(
                model=name,
                state_size=system.state_size,
                expansion=system.expansion,
                transition=_kind(system.transition, model.num_heads),
                changes=not steady,
                coupling=model.coupling,
                direct=system.direct is not None,
            )
        )
    return rows
