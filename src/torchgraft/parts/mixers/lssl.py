"""A linear state space for every channel: a convolution over many tokens, a recurrence over one.

`Combining Recurrent, Convolutional, and Continuous-time Models with Linear State-Space Layers
<https://arxiv.org/abs/2110.13985>`_ (Gu et al., 2021):
x' = A x + B u, y = C x + D u, discretised as x_t = Abar x_{t-1} + Bbar u_t; Y = W gelu(y).

Departures: A and B are shared by the channels, steps and outputs are each channel's own; the residual and the norm
around the layer belong to the block; a random A is shifted to be stable; the structured A is solved densely, in O(N^3).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft.catalogue import Card, Claim
from torchgraft.engines.longconv import fft_conv
from torchgraft.engines.recurrence.mixer import State, StatefulMixer
from torchgraft.engines.recurrence.state_space import (
    discretise,
    hippo,
    krylov_kernel,
    log_uniform,
    quasiseparable,
    state_output,
    state_scan,
    state_update,
)
from torchgraft.errors import BadInput

__all__ = ["CARD", "LSSL"]

CARD = Card(
    key="lssl",
    title="Linear state-space layer",
    seed_id=252,
    authors="Gu et al., 2021",
    reference="https://arxiv.org/abs/2110.13985",
    family="parts/mixers",
    kind="part",
    engine=("recurrence", "longconv"),
    equation="x_t = Abar x_{t-1} + Bbar u_t,  y_t = C x_t + D u_t,  y = (C Bbar, C Abar Bbar, ...) * u + D u",
    entry="LSSL",
    capabilities=frozenset({"causal", "stateful", "linear-time"}),
    declared={"parameters": "d_model*outputs*(d_state + 1 + d_model) + d_model"},
    example={"d_model": 6, "d_state": 4, "outputs": 2},
    shapes=((2, 12, 6),),
    oracles=(
        "the recurrence and the convolution give the same outputs for every alpha in [0, 1]",
        "backward Euler of x' = -x + u with dt = e^z is the gate with weights 1 - sigmoid(z) and sigmoid(z)",
        "the bilinear rule converges with dt^2, Euler's with dt, to the matrix exponential's solution",
        "the kernel of the legs memory is e^-t times Legendre polynomials of e^-t",
    ),
    claim=Claim(
        text="Sequential digits, one pixel at a time (64 steps), and the frequency of a noisy sine over 1000 steps: "
        "LSSL beside a GRU of equal size; and the sine model at half the sampling rate with dt doubled.",
        figure="accuracy >= GRU + 1 point on digits, >= GRU + 10 points on sines, <= 3 points lost at half rate",
    ),
    choose_when="long signals that are sampled densely and evenly, perhaps at another rate in use than in training",
    choose_instead="a gated recurrence (gla, gated-deltanet) for text, where what to keep depends on the token",
    bibtex="""@inproceedings{gu2021combining,
  title={Combining Recurrent, Convolutional, and Continuous-time Models with Linear State-Space Layers},
  author={Gu, Albert and Johnson, Isys and Goel, Karan and Saab, Khaled and Dao, Tri and Rudra, Atri
    and R{\\'e}, Christopher},
  booktitle={Advances in Neural Information Processing Systems},
  year={2021}
}""",
)

_FORMS = ("auto", "step", "chunk", "parallel")


class LSSL(StatefulMixer):
    """A linear state space a channel, GELU, and a linear layer over the channels.

    Args:
        d_model: width D.
        d_state: size N of a channel's state.
        outputs: outputs M of each channel's state.
        measure: what the states remember, ``"legs"``, ``"legt"`` or ``"random"``; see
            :func:`torchgraft.engines.recurrence.state_space.hippo`.
        method: ``"gbt"`` or ``"zoh"``; see :func:`torchgraft.engines.recurrence.state_space.discretise`.
        alpha: of ``"gbt"``; 1/2 is the bilinear rule.
        learn_A: whether A is learned in the structured form P (D + T^-1) Q, T tridiagonal; and B with it.
        learn_dt: whether each channel's step is learned.
        dt_min, dt_max: the steps are drawn log-uniformly between these.
        seed: of the random measure.

    Attributes:
        form: ``"step"`` goes token by token, ``"chunk"`` by convolutions of 256 tokens with the state carried between
            them, ``"parallel"`` and ``"auto"`` by one convolution. The numbers are the same.

    Shapes:
        (B, T, D) -> (B, T, D); state: {"x": (B, D, N)}.

    Example:
        >>> mixer = LSSL(8, d_state=4)
        >>> y, state = mixer.prefill(torch.randn(2, 5, 8))
        >>> y.shape, state["x"].shape
        (torch.Size([2, 5, 8]), torch.Size([2, 8, 4]))

    Raises:
        BadInput: an argument is out of range.
    """

    form: Literal["auto", "step", "chunk", "parallel"] = "auto"
    log_dt: Tensor

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 64,
        outputs: int = 1,
        measure: Literal["legs", "legt", "random"] = "legs",
        method: Literal["gbt", "zoh"] = "gbt",
        alpha: float = 0.5,
        learn_A: bool = False,
        learn_dt: bool = False,
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        seed: int = 0,
    ) -> None:
        super().__init__(d_model)
        if outputs < 1:
            raise BadInput(f"outputs must be at least 1, got {outputs}")
        if method not in ("gbt", "zoh"):
            raise BadInput(f"method must be 'gbt' or 'zoh', got {method!r}")
        if not 0.0 <= alpha <= 1.0:
            raise BadInput(f"alpha must be in [0, 1], got {alpha}")
        self.d_state, self.outputs, self.measure, self.seed = d_state, outputs, measure, seed
        self.method, self.alpha, self.learn_A = method, alpha, learn_A
        A, B = hippo(measure, d_state, seed=seed)
        self._fixed = (A.numpy(), B.numpy())  # constants in float64, whatever dtype the parameters are moved to
        if learn_A:
            p, d, q, T = quasiseparable(measure, d_state)
            bands = [F.pad(T.diagonal(offset), (0, abs(offset))) for offset in (-1, 0, 1)]
            self.structure = nn.Parameter(torch.stack([p, d, q, B, *bands]).to(torch.get_default_dtype()))  # (7, N)
        log_dt = log_uniform(d_model, dt_min, dt_max)
        if learn_dt:
            self.log_dt = nn.Parameter(log_dt)
        else:
            self.register_buffer("log_dt", log_dt)
        self.C = nn.Parameter(torch.randn(d_model, outputs, d_state))
        self.D = nn.Parameter(torch.randn(d_model, outputs))
        self.out = nn.Linear(d_model * outputs, d_model)

    def continuous(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return A (N, N), B (N,) and the steps (D,), in float64."""
        device = self.C.device
        A, B = (torch.from_numpy(value).to(device) for value in self._fixed)
        if self.learn_A:
            p, d, q, B, low, mid, high = self.structure.double()
            T = torch.diag(mid)
            if self.d_state > 1:
                T = T + torch.diag(low[:-1], -1) + torch.diag(high[:-1], 1)
            A = p[:, None] * (torch.diag(d) + torch.linalg.inv(T)) * q
        return A, B, self.log_dt.double().exp()

    def resample_(self, factor: float) -> LSSL:
        """Fit the layer in place to inputs that are sampled ``factor`` times as far apart, and return it.

        Raises:
            BadInput: the factor is not above 0.
        """
        if not factor > 0:
            raise BadInput(f"factor must be above 0, got {factor}")
        with torch.no_grad():
            self.log_dt += math.log(factor)
        return self

    def init_state(self, batch_size: int) -> State:
        """Return zeros; the state is kept in float32 at least."""
        wide = torch.promote_types(self.C.dtype, torch.float32)
        return {"x": self.C.new_zeros(batch_size, self.d_model, self.d_state, dtype=wide)}

    def _mixed(self, u: Tensor, y: Tensor) -> Tensor:
        """Return the layer's output from the input (B, T, D) and the states' outputs (B, T, D, M)."""
        y = y + self.D * u[..., None]
        out: Tensor = self.out(F.gelu(y.flatten(-2)).to(self.out.weight.dtype))
        return out

    def _convolved(self, u: Tensor, x: Tensor | None, *, last: bool) -> tuple[Tensor, Tensor | None]:
        """Return the outputs of the states (B, T, D, M) and the states after ``u``, by convolution."""
        wide = torch.promote_types(u.dtype, torch.float32)
        u = u.to(wide)
        with torch.autocast(u.device.type, enabled=False):
            A, B, dt = self.continuous()
            Abar, Bbar = discretise(A, B, dt, method=self.method, alpha=self.alpha)
            C = self.C.double()
            kernel = krylov_kernel(Abar, Bbar, C, u.shape[1]).permute(2, 0, 1)  # (T, D, M)
            spread = u.repeat_interleave(self.outputs, dim=-1) if self.outputs > 1 else u
            y = fft_conv(spread, kernel.flatten(1).to(wide)).reshape(*u.shape, self.outputs)
            if x is not None:
                y = y + state_output(Abar, C, x.double(), u.shape[1]).to(wide)
            after = None
            if last:
                before = None if x is None else x.double()
                after = state_scan(Abar, Bbar, u.double(), before).to(wide)
        return y, after

    def _stepped(self, u_t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the states' outputs (B, D, M) and the next states, by the recurrence."""
        with torch.autocast(u_t.device.type, enabled=False):
            A, B, dt = self.continuous()
            x = state_update(A, B, dt, x.double(), u_t.double(), method=self.method, alpha=self.alpha)
            y = torch.einsum("dmn,bdn->bdm", self.C.double(), x)
        wide = torch.promote_types(u_t.dtype, torch.float32)
        return y.to(wide), x.to(wide)

    def _entered(self, state: State, batch: int) -> Tensor:
        if "x" not in state or state["x"].shape != (batch, self.d_model, self.d_state):
            held = {name: tuple(value.shape) for name, value in state.items()}
            raise BadInput(f"state must hold x of shape {(batch, self.d_model, self.d_state)}, got {held}")
        return state["x"]

    def forward(self, x: Tensor) -> Tensor:
        """Mix ``x``, (B, T, D) -> (B, T, D); by convolution the states are not formed at all."""
        if self.form in ("auto", "parallel"):
            self.checked(x)
            return self._mixed(x, self._convolved(x, None, last=False)[0])
        return self.prefill(x)[0]

    def prefill(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Mix ``x`` after ``state``; return the output and the states after the last token."""
        self.checked(x)
        held = None if state is None else self._entered(state, len(x))
        if self.form not in _FORMS:
            raise BadInput(f"form must be one of {_FORMS}, got {self.form!r}")
        if self.form == "step":
            held = self.init_state(len(x))["x"] if held is None else held
            outs = []
            for u_t in x.unbind(1):
                y_t, held = self._stepped(u_t, held)
                outs.append(y_t)
            return self._mixed(x, torch.stack(outs, dim=1)), {"x": held}
        outs = []
        for piece in torch.split(x, 256 if self.form == "chunk" else x.shape[1], dim=1):
            y, held = self._convolved(piece, held, last=True)
            outs.append(y)
        if held is None:
            raise BadInput("x must hold at least one token")
        return self._mixed(x, torch.cat(outs, dim=1)), {"x": held}

    def step(self, x_t: Tensor, state: State) -> tuple[Tensor, State]:
        """Mix one token, (B, D), after ``state``; return its output, (B, D), and the next states."""
        if x_t.ndim != 2 or x_t.shape[-1] != self.d_model:
            raise BadInput(f"x_t must have shape (B, {self.d_model}), got {tuple(x_t.shape)}")
        y, after = self._stepped(x_t, self._entered(state, len(x_t)))
        return self._mixed(x_t, y), {"x": after}
