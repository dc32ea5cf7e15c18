"""Recurrent networks with nonlinear state updates, several small ones side by side as heads.

`FlashRNN: Optimizing Traditional RNNs on Modern Hardware <https://arxiv.org/abs/2412.07752>`_ (Pöppel, Beck and
Hochreiter, 2024): g_t = W x_t + R y_{t-1} + b with R block-diagonal, one (K, K) block a head and gate, and
s_t = P(s_{t-1}, g_t) the pointwise update of an Elman network, GRU, LSTM or sLSTM.

Departures:
- CPU code on torch's own matrix products; the speed of the paper's CUDA and Triton kernels is not claimed.
- the sLSTM's normaliser is not clamped to 1 from below, because from a state that the cell can reach it never is below.
- the solver IntCSP is in :mod:`torchgraft.engines.recurrence.tiling`; it sizes blocks of tokens, not GPU tiles.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from torchgraft.catalogue.card import Card, Claim
from torchgraft.engines.recurrence.cells import GATES, Cell, cell_state, run_cell
from torchgraft.engines.recurrence.heads import head_size, merge_heads
from torchgraft.engines.recurrence.mixer import State, StatefulMixer
from torchgraft.errors import BadInput, nearest

__all__ = ["CARD", "HeadwiseRNN"]

CARD = Card(
    key="flashrnn",
    title="FlashRNN: head-wise recurrent networks",
    seed_id=131,
    authors="Pöppel, Beck and Hochreiter, 2024",
    reference="https://arxiv.org/abs/2412.07752",
    family="parts/mixers",
    kind="part",
    engine=("recurrence",),
    equation="g_t = W x_t + R y_{t-1} + b, R block-diagonal over heads;  s_t = P(s_{t-1}, g_t)",
    entry="HeadwiseRNN",
    capabilities=frozenset({"causal", "stateful", "linear-time", "compilable"}),
    declared={"parameters": "4*d_model**2 + 4*d_model + 4*d_model**2//num_heads + d_model**2"},
    example={"d_model": 16, "num_heads": 2, "cell": "lstm"},
    shapes=((2, 12, 16),),
    oracles=(
        "one head of elman, gru or lstm gives outputs and gradients of torch.nn.RNN, GRU and LSTM to 1e-11 (float64)",
        "H heads equal one cell whose recurrent matrices are block-diagonal",
        "the backward pass written by hand passes gradcheck in float64, returned states included",
        "IntCSP never drops a solution that brute force finds, and its optimum is brute force's",
    ),
    claim=Claim(
        text="Parity and counting modulo 3, trained on 40 tokens and tested on 200: LSTM and sLSTM beside softmax "
        "attention and gated linear recurrence of equal width; forward and backward of the fused head-wise LSTM beside "
        "a loop of single steps under autograd. CPU figures only.",
        figure="accuracy at 200 tokens >= 0.99 for lstm and slstm, <= 0.70 for attention and the linear recurrence; "
        "fused >= 2x faster than the step loop",
    ),
    choose_when="The state must be a nonlinear function of itself: counting, parity, automata.",
    choose_instead="negative-eigenvalue-rnn to track states with parallel training, gated-linear-attention for recall.",
    bibtex="""@inproceedings{poppel2025flashrnn,
  title={{FlashRNN}: {I/O}-Aware Optimization of Traditional {RNN}s on Modern Hardware},
  author={P{\\"o}ppel, Korbinian and Beck, Maximilian and Hochreiter, Sepp},
  booktitle={International Conference on Learning Representations},
  year={2025}
}""",
)


class HeadwiseRNN(StatefulMixer):
    """An input projection, a recurrent cell over heads, an output projection.

    Args:
        d_model: the width D.
        cell: ``"lstm"``, ``"slstm"``, ``"gru"`` or ``"elman"``.
        num_heads: H; divides ``d_model``. One head is the ordinary, dense cell.
        forget_bias: what the forget gates of ``lstm`` and ``slstm`` start from.

    Shapes:
        (B, T, D) -> (B, T, D)

    Example:
        >>> mixer = HeadwiseRNN(8, cell="gru", num_heads=2)
        >>> y, state = mixer.prefill(torch.randn(1, 3, 8))
        >>> y.shape, state["y"].shape
        (torch.Size([1, 3, 8]), torch.Size([1, 2, 4]))

    Raises:
        BadInput: ``num_heads`` does not divide ``d_model``, or ``cell`` is not known.
    """

    def __init__(self, d_model: int, *, cell: Cell = "lstm", num_heads: int = 4, forget_bias: float = 1.0) -> None:
        super().__init__(d_model)
        if cell not in GATES:
            raise BadInput(f"cell must be one of {', '.join(GATES)}, got {cell!r}{nearest(cell, list(GATES))}")
        size, gates = head_size(d_model, num_heads), GATES[cell]
        self.cell, self.num_heads = cell, num_heads
        self.inward = nn.Linear(d_model, len(gates) * d_model)  # rows by head, gate, unit
        self.recurrent = nn.Parameter(torch.empty(num_heads, len(gates), size, size))
        self.recurrent_bias = nn.Parameter(torch.zeros(num_heads, size)) if cell == "gru" else None
        self.outward = nn.Linear(d_model, d_model, bias=False)
        nn.init.uniform_(self.recurrent, -(size**-0.5), size**-0.5)
        with torch.no_grad():
            nn.init.zeros_(self.inward.bias)
            if "f" in gates:
                self.inward.bias.view(num_heads, len(gates), size)[:, gates.index("f")] = forget_bias

    def init_state(self, batch_size: int) -> State:
        """Return zeros, in float32 at least."""
        exact = torch.promote_types(self.recurrent.dtype, torch.float32)
        like = torch.empty(0, dtype=exact, device=self.recurrent.device)
        return cell_state(self.cell, like, batch_size, self.num_heads, self.d_model // self.num_heads)

    def prefill(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Run over ``x``, (B, T, D), after ``state``; return the output and the state after the last token."""
        self.checked(x)
        weight, bias = self.inward.weight, self.inward.bias
        y, state = run_cell(
            x, weight, bias, self.recurrent, cell=self.cell, recurrent_bias=self.recurrent_bias, state=state
        )
        mixed: Tensor = self.outward(merge_heads(y))
        return mixed, state
