"""The recurrent cells of the classical literature behind one interface, with what is said about their gradients.

`A Critical Review of Recurrent Neural Networks for Sequence Learning <https://arxiv.org/abs/1506.00019>`_ (Lipton,
Berkowitz and Elkan, 2015): h_t = s(W x_t + R h_{t-1} + b), and d h_T / d h_t = prod_{k=t+1}^T diag(s'(a_k)) R, whose
norm is at most (max s' * sigma_max(R))^(T-t): it vanishes where that is below 1, and may or may not explode above.

Departures:
- the LSTM of 1997 is trained by the full gradient, not by the truncated one of its authors.
- Jordan's network feeds its output back without a softmax, since a mixer's output is not a distribution.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias, cast

import torch
from torch import Tensor, nn

from torchgraft.catalogue.card import Card, Claim
from torchgraft.engines.recurrence.cells import project_gates, scan_cell
from torchgraft.engines.recurrence.mixer import Mixer, State, StatefulMixer
from torchgraft.errors import BadInput, nearest

__all__ = [
    "CARD",
    "TAXONOMY",
    "Bidirectional",
    "ClassicRNN",
    "Tags",
    "gradient_bound",
    "gradient_norm_profile",
    "tbptt",
]

CARD = Card(
    key="rnn-critical-review",
    title="The classical recurrent cells and their gradients",
    seed_id=39,
    authors="Lipton, Berkowitz and Elkan, 2015",
    reference="https://arxiv.org/abs/1506.00019",
    family="parts/mixers",
    kind="part",
    engine=("recurrence",),
    equation="h_t = s(W x_t + R h_{t-1} + b);  d h_T / d h_t = prod_k diag(s'(a_k)) R",
    entry="ClassicRNN",
    capabilities=frozenset({"causal", "stateful", "linear-time", "compilable"}),
    declared={"parameters": "9*d_model**2 + 4*d_model + d_model"},
    example={"d_model": 16, "cell": "lstm"},
    shapes=((2, 12, 16),),
    oracles=(
        "LSTM and Elman equal torch.nn.LSTM and RNN after copying the weights",
        "tbptt with k >= T gives the gradient of full backpropagation; with k = 1 that of a state detached every step",
        "a linear network with R = rho * orthogonal has gradients of norm exactly rho^(T-t)",
        "reversing the input swaps the states of the two directions",
    ),
    claim=Claim(
        text="Adding problem and first-symbol recall at lags 10, 50 and 100, hidden 64: Elman beside LSTM with a "
        "forget gate; naming the next symbol, which needs right context: bidirectional beside one direction.",
        figure="Elman's MSE >= 0.12 (guessing: 0.167) at lags 50 and 100, LSTM's MSE <= 0.02 at lag 50, "
        "bidirectional >= 10 points more accurate",
    ),
    choose_when="A known reference cell is wanted, or how far gradients reach through one is the question.",
    choose_instead="flashrnn for a recurrent cell with heads in a model of one's own.",
    bibtex="""@article{lipton2015critical,
  title={A Critical Review of Recurrent Neural Networks for Sequence Learning},
  author={Lipton, Zachary C. and Berkowitz, John and Elkan, Charles},
  journal={arXiv preprint arXiv:1506.00019},
  year={2015}
}""",
)

Classic: TypeAlias = Literal["linear", "elman", "jordan", "lstm-1997", "lstm", "lstm-peephole"]


@dataclass(frozen=True)
class Tags:
    """Where the review places a cell.

    Args:
        gates: gates and candidates of the cell, in the order of the rows of its weights.
        states: what it carries from token to token.
        feedback: what is fed back into the network.
        training: how its authors trained it.
        application: a task for which the review names it.
    """

    gates: tuple[str, ...]
    states: tuple[str, ...]
    feedback: str
    training: str
    application: str


TAXONOMY: dict[str, Tags] = {
    "linear": Tags(("n",), ("y",), "hidden state", "backpropagation through time", "analysis of gradients"),
    "elman": Tags(("n",), ("y",), "hidden state", "backpropagation", "finding structure in sentences"),
    "jordan": Tags(("n",), ("y",), "output", "backpropagation", "sequences of actions"),
    "lstm-1997": Tags(
        ("o", "i", "z"), ("y", "c"), "hidden state and cell", "truncated backpropagation", "long-lag toy tasks"
    ),
    "lstm": Tags(
        ("o", "i", "f", "z"),
        ("y", "c"),
        "hidden state and cell",
        "backpropagation through time",
        "translation and captioning",
    ),
    "lstm-peephole": Tags(
        ("o", "i", "f", "z"),
        ("y", "c"),
        "hidden state, cell and gates that see the cell",
        "backpropagation through time",
        "counting and timing",
    ),
}
#: sigmoid of this is exactly 1, in every dtype that the scan runs in.
_OPEN = 100.0


class ClassicRNN(StatefulMixer):
    """One cell of :data:`TAXONOMY`, dense, between its input weights and an output layer.

    Args:
        d_model: the width D, also of the hidden state.
        cell: which cell. ``"linear"`` is Elman's without its nonlinearity.
        forget_bias: what the forget gate starts from, where there is one.

    Shapes:
        (B, T, D) -> (B, T, D)

    Example:
        >>> mixer = ClassicRNN(8, cell="lstm-peephole")
        >>> y, state = mixer.prefill(torch.randn(1, 3, 8))
        >>> y.shape, sorted(state)
        (torch.Size([1, 3, 8]), ['c', 'y'])

    Raises:
        BadInput: ``cell`` is not known.
    """

    def __init__(self, d_model: int, *, cell: Classic = "lstm", forget_bias: float = 1.0) -> None:
        super().__init__(d_model)
        if cell not in TAXONOMY:
            raise BadInput(f"cell must be one of {', '.join(TAXONOMY)}, got {cell!r}{nearest(cell, list(TAXONOMY))}")
        gates = TAXONOMY[cell].gates
        self.cell = cell
        self.inward = nn.Linear(d_model, len(gates) * d_model)
        self.recurrent = nn.Parameter(torch.empty(len(gates), d_model, d_model))
        self.peephole = nn.Parameter(torch.zeros(3, d_model)) if cell == "lstm-peephole" else None  # o, i, f
        self.outward = nn.Linear(d_model, d_model)
        nn.init.uniform_(self.recurrent, -(d_model**-0.5), d_model**-0.5)
        if "f" in gates:
            with torch.no_grad():
                self.inward.bias.view(len(gates), d_model)[gates.index("f")] += forget_bias

    def init_state(self, batch_size: int) -> State:
        """Return zeros, in float32 at least."""
        exact = torch.promote_types(self.recurrent.dtype, torch.float32)
        empty = torch.zeros(batch_size, self.d_model, dtype=exact, device=self.recurrent.device)
        return {name: empty.clone() for name in TAXONOMY[self.cell].states}

    def hidden(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Return the hidden states, (B, T, D), that the output layer sees, and the state after the last token."""
        self.checked(x)
        state = self.init_state(len(x)) if state is None else state
        rows = len(TAXONOMY[self.cell].gates)
        gates = project_gates(x, self.inward.weight, self.inward.bias, num_heads=1, gates=rows)  # (B, T, 1, G, D)
        if self.cell in ("linear", "jordan", "lstm-peephole"):
            return self._stepped(gates[:, :, 0], state)
        recurrent = self.recurrent[None]
        if self.cell == "lstm-1997":  # a forget gate that nothing can close
            gates = torch.cat([gates[..., :2, :], torch.full_like(gates[..., :1, :], _OPEN), gates[..., 2:, :]], dim=-2)
            recurrent = torch.cat([recurrent[:, :2], torch.zeros_like(recurrent[:, :1]), recurrent[:, 2:]], dim=1)
        one_head = {name: value[:, None] for name, value in state.items()}
        h, last = scan_cell(gates, recurrent, cell="elman" if self.cell == "elman" else "lstm", state=one_head)
        return h[:, :, 0], {name: value[:, 0] for name, value in last.items()}

    def _stepped(self, gates: Tensor, state: State) -> tuple[Tensor, State]:
        """Run the cells that the engine does not know, token by token; (B, T, G, D)."""
        wide = next(iter(state.values())).dtype
        matrix, seen = self.recurrent.to(wide), []
        device = gates.device.type
        with torch.autocast(device if torch.amp.is_autocast_available(device) else "cpu", enabled=False):
            for gate in gates.to(wide).unbind(1):
                pre = gate + torch.einsum("gij,bj->bgi", matrix, state["y"])
                if self.peephole is None:
                    h = pre[:, 0] if self.cell == "linear" else pre[:, 0].tanh()
                    back = h
                    if self.cell == "jordan":
                        back = nn.functional.linear(h, self.outward.weight.to(wide), self.outward.bias.to(wide))
                    state = {"y": back}
                else:
                    at_o, at_i, at_f = self.peephole.to(wide).unbind(0)
                    o, i, f, z = pre.unbind(1)
                    c = torch.sigmoid(f + at_f * state["c"]) * state["c"]
                    c = c + torch.sigmoid(i + at_i * state["c"]) * z.tanh()
                    h = torch.sigmoid(o + at_o * c) * c.tanh()
                    state = {"y": h, "c": c}
                seen.append(h)
        return torch.stack(seen, dim=1).to(gates.dtype), state

    def prefill(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Run over ``x``, (B, T, D), after ``state``; return the output and the state after the last token."""
        h, state = self.hidden(x, state)
        y: Tensor = self.outward(h)
        return y, state


class Bidirectional(Mixer):
    """The sum of one mixer's reading from the left and another's from the right.

    Args:
        forwards: reads from the first token to the last.
        backwards: reads from the last token to the first; of the same width.

    Shapes:
        (B, T, D) -> (B, T, D)

    Example:
        >>> both = Bidirectional(ClassicRNN(8), ClassicRNN(8))
        >>> both(torch.randn(1, 3, 8)).shape
        torch.Size([1, 3, 8])

    Raises:
        BadInput: the widths differ.
    """

    causal = False

    def __init__(self, forwards: Mixer, backwards: Mixer) -> None:
        if forwards.d_model != backwards.d_model:
            raise BadInput(f"both directions need one width, got {forwards.d_model} and {backwards.d_model}")
        super().__init__(forwards.d_model)
        self.forwards, self.backwards = forwards, backwards

    def forward(self, x: Tensor) -> Tensor:
        """Mix ``x``, (B, T, D) -> (B, T, D)."""
        self.checked(x)
        y: Tensor = self.forwards(x) + self.backwards(x.flip(1)).flip(1)
        return y


def tbptt(mixer: StatefulMixer, x: Tensor, loss: Callable[[Tensor, slice], Tensor], *, k: int) -> tuple[Tensor, State]:
    """Backpropagate through at most ``k`` tokens at a time, adding to the gradients of the parameters.

    Args:
        mixer: what is trained.
        x: the input.
        loss: of the outputs of a piece, (B, up to k, D), which stand at the tokens of the slice.
        k: tokens a piece; the state goes on from piece to piece, its gradient does not.

    Shapes:
        x (B, T, D) -> the sum of the losses, and the last state

    Example:
        >>> mixer, x = ClassicRNN(4, cell="elman"), torch.randn(1, 6, 4)
        >>> total, state = tbptt(mixer, x, lambda y, tokens: (y - x[:, tokens]).square().sum(), k=2)
        >>> mixer.recurrent.grad is not None
        True

    Raises:
        BadInput: ``k`` is below 1.
    """
    if k < 1:
        raise BadInput(f"k must be at least 1, got {k}")
    state, total = mixer.init_state(len(x)), x.new_zeros(())
    for start in range(0, x.shape[1], k):
        tokens = slice(start, min(start + k, x.shape[1]))
        y, state = mixer.prefill(x[:, tokens], state)
        piece = loss(y, tokens)
        piece.backward()  # type: ignore[no-untyped-call]  # untyped in torch
        state = {name: value.detach() for name, value in state.items()}
        total = total + piece.detach()
    return total, state


def gradient_norm_profile(mixer: StatefulMixer, x: Tensor, direction: Tensor | None = None) -> Tensor:
    """Return how large the gradient of the last state y, along ``direction``, is in the state after each token.

    Args:
        mixer: with a state named y, such as :class:`ClassicRNN`.
        x: the input.
        direction: a vector on the last y; by default its components are all equal, its norm 1 a sample.

    Shapes:
        x (B, T, D), direction like y -> (T,): norms over the whole state, entry t for T - 1 - t steps back

    Example:
        >>> gradient_norm_profile(ClassicRNN(4, cell="elman"), torch.randn(1, 6, 4)).shape
        torch.Size([6])

    Raises:
        BadInput: the mixer keeps no state y.
    """
    mixer.checked(x)
    state = mixer.init_state(len(x))
    seen: list[State] = []
    if "y" not in state:
        raise BadInput(f"mixer must keep a state 'y', got {sorted(state)}")
    with torch.enable_grad():
        for x_t in x.unbind(1):
            _, state = mixer.step(x_t, state)
            if not seen and not state["y"].requires_grad:
                state = {name: value.requires_grad_() for name, value in state.items()}
            seen.append(state)
        y = state["y"]
        along = torch.full_like(y, (y[0].numel() if len(y) else 1) ** -0.5) if direction is None else direction
        names = sorted(state)
        flat = [each[name] for each in seen for name in names]
        grads = torch.autograd.grad((y * along).sum(), flat, allow_unused=True)
    squares = [grad.square().sum() if grad is not None else y.new_zeros(()) for grad in grads]
    return torch.stack(squares).view(len(seen), len(names)).sum(dim=1).sqrt().detach()


def gradient_bound(recurrent: Tensor, steps: int, *, slope: float = 1.0) -> Tensor:
    """Return the upper bound (slope * sigma_max(R))^s for s = ``steps`` - 1 .. 0; it bounds, and promises no growth.

    Args:
        recurrent: R.
        steps: T.
        slope: the largest derivative of the nonlinearity; 1 for tanh, 1/4 for the sigmoid.

    Shapes:
        recurrent (D, D) -> (T,)

    Example:
        >>> gradient_bound(0.5 * torch.eye(3), 3)
        tensor([0.2500, 0.5000, 1.0000])
    """
    largest = slope * torch.linalg.matrix_norm(recurrent.detach(), ord=2)
    return cast(Tensor, largest ** torch.arange(steps - 1, -1, -1, device=recurrent.device))
