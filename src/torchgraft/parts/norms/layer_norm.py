"""Normalise the summed inputs of a layer over its units, one sample at a time: layers, recurrent cells, insertion.

`Layer Normalization <https://arxiv.org/abs/1607.06450>`_ (Ba et al., 2016): y = g * (a - mu) / sigma + b with
mu = mean_D a and sigma^2 = mean_D (a - mu)^2, before the non-linearity, the same in training and in evaluation.

Departures: eps stands inside the square root (the paper has none). The LSTM and the GRU keep one offset where the paper
adds up several. On a convolution the statistics are over channels and positions, with one gain a channel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from torchgraft.catalogue import Card
from torchgraft.catalogue.card import Claim
from torchgraft.engines.normalize import Norm, token_norm
from torchgraft.engines.normalize.insertion import insert_norms
from torchgraft.engines.surgery.swap import Where
from torchgraft.errors import BadInput

__all__ = ["CARD", "LNGRUCell", "LNLSTMCell", "LNRNNCell", "LayerNorm", "add_layernorm"]

CARD = Card(
    key="layer-norm",
    title="Layer normalisation",
    seed_id=167,
    authors="Ba, Kiros and Hinton, 2016",
    reference="https://arxiv.org/abs/1607.06450",
    family="parts/norms",
    kind="part",
    engine=("normalize", "surgery"),
    equation="y = g * (a - mean_D a) / sqrt(var_D a) + b",
    entry="LayerNorm",
    capabilities=frozenset(
        {"batch-independent", "train-eval-equal", "shift-invariant", "scale-invariant", "equals-replaced", "compilable"}
    ),
    declared={"parameters": "2*normalized_shape", "replaces": "LayerNorm"},
    example={"normalized_shape": 16},
    shapes=((2, 12, 16),),
    oracles=(
        "output and all gradients equal the formula in float64 and torch.nn.LayerNorm",
        "y does not change under W -> d W + 1 gamma^T nor under a rescaled sample, but does where one row is rescaled",
        "the output of a sample does not depend on another sample, nor on the mode",
        "with g = 1 the gradient of a is orthogonal to ones and to a - mu",
        "the LSTM, GRU and RNN cells equal the paper's equations written out, and a sequence equals its steps",
        "add_layernorm normalises exactly what the layers before activations put out",
    ),
    claim=Claim(
        text="LSTM of width 96 with and without layer norm, on digits read row by row and on bytes of the standard "
        "library's source (validation loss); learning rate of each chosen from 1e-3, 3e-3, 1e-2 on another seed.",
        figure="layer norm reaches the baseline's best validation loss in at most 70 % of its steps on both tasks, and "
        "trained with batches of one its loss is at most 5 % above that with batches of 32 at equal samples",
    ),
    choose_when="batches are small or uneven, sequences differ in length, or a recurrent network trains unsteadily",
    choose_instead="a batch norm (or evonorm) for convolutions with large batches, whose cost can be folded away",
    expected_failures={
        "wrong-shape-is-refused": "like nn.LayerNorm it takes any number of leading axes, so x[0] is one sample"
    },
    bibtex="""@article{ba2016layer,
  title={Layer Normalization},
  author={Ba, Jimmy Lei and Kiros, Jamie Ryan and Hinton, Geoffrey E.},
  journal={arXiv preprint arXiv:1607.06450},
  year={2016}
}""",
)


class LayerNorm(Norm):
    """Zero mean and unit variance over the last axes of every sample, then a gain and an offset an entry.

    Args:
        normalized_shape: size of the last axis, or sizes of the last axes.
        eps: added to the variance; a sample whose variance is not far above it is not scale-invariant.
        elementwise_affine: whether there is a gain, and with ``bias`` an offset.
        bias: whether there is an offset.

    Shapes:
        (B, ..., D) -> (B, ..., D), any number of leading axes

    Example:
        >>> LayerNorm(2, eps=1e-12)(torch.tensor([[1.0, 3.0]]))
        tensor([[-1.,  1.]], grad_fn=<NativeLayerNormBackward0>)

    Raises:
        BadInput: a size is below 1.
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        *,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
    ) -> None:
        shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
        if not shape or min(shape) < 1:
            raise BadInput(f"normalized_shape must be sizes of at least 1, got {normalized_shape}")
        super().__init__(math.prod(shape), eps=eps, affine=elementwise_affine, bias=bias)
        self.normalized_shape = shape
        for name in ("weight", "bias"):
            if getattr(self, name) is not None:
                setattr(self, name, nn.Parameter(getattr(self, name).detach().reshape(shape)))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise every sample by itself."""
        if x.shape[-len(self.normalized_shape) :] != self.normalized_shape or not x.is_floating_point():
            raise BadInput(
                f"LayerNorm takes floating-point input whose last sizes are {self.normalized_shape}, "
                f"got {x.dtype} {tuple(x.shape)}"
            )
        return token_norm(x, self.normalized_shape, weight=self.weight, bias=self.bias, eps=self.eps)

    def extra_repr(self) -> str:
        """Return the settings."""
        return f"{self.normalized_shape}, eps={self.eps}"


class _Cell(nn.Module):
    """A recurrent cell: input and recurrent weights, and a loop over tokens around :meth:`advance`."""

    gates: int
    states: int = 1

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__()
        if input_size < 1 or hidden_size < 1:
            raise BadInput(f"a cell needs sizes of at least 1, got {input_size} and {hidden_size}")
        self.input_size, self.hidden_size = input_size, hidden_size
        rows, bound = self.gates * hidden_size, hidden_size**-0.5
        self.weight_ih = nn.Parameter(torch.empty(rows, input_size).uniform_(-bound, bound))
        self.weight_hh = nn.Parameter(torch.empty(rows, hidden_size).uniform_(-bound, bound))

    def project(self, x: Tensor) -> Tensor:
        """Return what the input gives to the gates, for any number of tokens at once; (..., D) -> (..., G K)."""
        return x @ self.weight_ih.T

    def advance(self, gates: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return the next state, its first entry the output."""
        raise NotImplementedError

    def init_state(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return the state before the first token: zeros (B, K)."""
        return tuple(x.new_zeros(len(x), self.hidden_size) for _ in range(self.states))

    def forward(self, x: Tensor, state: tuple[Tensor, ...] | None = None) -> tuple[Tensor, ...]:
        """Take one token; (B, D) and the state -> the next state, its first entry the output (B, K).

        Raises:
            BadInput: the input is not (B, ``input_size``).
        """
        if x.ndim != 2 or x.shape[1] != self.input_size:
            raise BadInput(f"{type(self).__name__} takes (B, {self.input_size}), got {tuple(x.shape)}")
        return self.advance(self.project(x), self.init_state(x) if state is None else state)

    def sequence(self, x: Tensor, state: tuple[Tensor, ...] | None = None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Take all tokens; (B, T, D) and the state -> outputs (B, T, K) and the last state."""
        state = self.init_state(x) if state is None else state
        outputs = []
        for gates in self.project(x).unbind(1):
            state = self.advance(gates, state)
            outputs.append(state[0])
        return torch.stack(outputs, 1), state


def _norm(size: int, gain: float, *, bias: bool) -> LayerNorm:
    norm = LayerNorm(size, bias=bias)
    nn.init.constant_(norm.weight, gain)  # type: ignore[arg-type]  # it has one
    return norm


class LNRNNCell(_Cell):
    """h_t = tanh(LN(W_hh h_{t-1} + W_xh x_t)); arguments as for :class:`LNLSTMCell`.

    Shapes:
        (B, D), (B, K) -> (B, K)

    Example:
        >>> LNRNNCell(3, 4)(torch.zeros(2, 3))[0].shape
        torch.Size([2, 4])
    """

    gates = 1

    def __init__(self, input_size: int, hidden_size: int, *, gain: float = 1.0) -> None:
        super().__init__(input_size, hidden_size)
        self.norm = _norm(hidden_size, gain, bias=True)

    def advance(self, gates: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return the next state."""
        return (torch.tanh(self.norm(gates + state[0] @ self.weight_hh.T)),)


class LNLSTMCell(_Cell):
    """An LSTM cell with layer norm on what the input and the state give to the gates, and on the memory cell.

    (f, i, o, u) = LN(W_h h) + LN(W_x x) + b; c_t = sig(f) c_{t-1} + sig(i) tanh(u); h_t = sig(o) tanh(LN(c_t)).

    Args:
        input_size: D.
        hidden_size: K.
        gain: what the gains start from.

    Shapes:
        (B, D), two of (B, K) -> two of (B, K)

    Example:
        >>> h, c = LNLSTMCell(3, 4)(torch.zeros(2, 3))
        >>> h.shape
        torch.Size([2, 4])
    """

    gates, states = 4, 2

    def __init__(self, input_size: int, hidden_size: int, *, gain: float = 1.0) -> None:
        super().__init__(input_size, hidden_size)
        self.norm_ih = _norm(4 * hidden_size, gain, bias=False)
        self.norm_hh = _norm(4 * hidden_size, gain, bias=True)
        self.norm_c = _norm(hidden_size, gain, bias=True)

    def project(self, x: Tensor) -> Tensor:
        """Return the normalised gates of the input."""
        gates: Tensor = self.norm_ih(super().project(x))
        return gates

    def advance(self, gates: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return the next output and memory cell."""
        h, c = state
        f, i, o, u = (gates + self.norm_hh(h @ self.weight_hh.T)).chunk(4, -1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(u)
        return torch.sigmoid(o) * torch.tanh(self.norm_c(c)), c


class LNGRUCell(_Cell):
    """A GRU cell with layer norm on what the input and the state give to the gates and to the candidate.

    (z, r) = LN(W_h h) + LN(W_x x) + b; u = tanh(LN(V_x x) + sig(r) LN(V_h h)); h_t = (1 - sig(z)) h_{t-1} + sig(z) u.

    Arguments as for :class:`LNLSTMCell`.

    Shapes:
        (B, D), (B, K) -> (B, K)

    Example:
        >>> LNGRUCell(3, 4)(torch.zeros(2, 3))[0].shape
        torch.Size([2, 4])
    """

    gates = 3

    def __init__(self, input_size: int, hidden_size: int, *, gain: float = 1.0) -> None:
        super().__init__(input_size, hidden_size)
        self.norm_ih = _norm(2 * hidden_size, gain, bias=False)
        self.norm_hh = _norm(2 * hidden_size, gain, bias=True)
        self.norm_iu = _norm(hidden_size, gain, bias=True)
        self.norm_hu = _norm(hidden_size, gain, bias=True)

    def project(self, x: Tensor) -> Tensor:
        """Return the normalised gates and candidate of the input."""
        gates, candidate = torch.split(super().project(x), [2 * self.hidden_size, self.hidden_size], -1)
        return torch.cat([self.norm_ih(gates), self.norm_iu(candidate)], -1)

    def advance(self, gates: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return the next state."""
        sizes = [2 * self.hidden_size, self.hidden_size]
        (h,) = state
        from_x, candidate = torch.split(gates, sizes, -1)
        from_h, recurrent = torch.split(h @ self.weight_hh.T, sizes, -1)
        z, r = torch.sigmoid(from_x + self.norm_hh(from_h)).chunk(2, -1)
        u = torch.tanh(candidate + r * self.norm_hu(recurrent))
        return (h + z * (u - h),)


def _norm_after(layer: nn.Module, name: str) -> nn.Module:
    weight = next(layer.parameters(), torch.zeros(()))
    if isinstance(layer, nn.Linear):
        return LayerNorm(layer.out_features).to(weight)
    if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return nn.GroupNorm(1, layer.out_channels).to(weight)  # over channels and positions, one gain a channel
    raise BadInput(f"layer norm goes after linear layers and convolutions, {name!r} is a {type(layer).__name__}")


def add_layernorm(model: nn.Module, *, before_activation: bool = True, where: Where | None = None) -> tuple[str, ...]:
    """Normalise the summed inputs of hidden layers, in place, and return the names of the norms.

    Args:
        model: any module.
        before_activation: the paper's place; otherwise what the activation puts out is normalised.
        where: which layers, as in :func:`torchgraft.swap`; for models whose activations are functions.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> add_layernorm(model)
        ('1.0',)
    """
    return insert_norms(model, _norm_after, before_activation=before_activation, where=where)
