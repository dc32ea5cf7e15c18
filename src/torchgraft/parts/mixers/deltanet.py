"""Linear attention that writes by correction: a value replaces what the memory held for its key.

Paper: `Parallelizing Linear Transformers with the Delta Rule over Sequence Length
<https://arxiv.org/abs/2406.06484>`_. With ``gated=True``: `Gated Delta Networks <https://arxiv.org/abs/2412.06464>`_.

Equation: ``S_t = S_{t-1} + beta_t k_t (v_t - S_{t-1}^T k_t)^T``, ``o_t = S_t^T q_t``, with ``|q_t| = |k_t| = 1`` and
``beta_t = sigmoid(w^T x_t)``.

Departures: none. The two hybrid stacks come as builders of their layers, since the attention in them is the reader's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torchgraft.catalogue import Card
from torchgraft.catalogue.card import Claim
from torchgraft.engines.recurrence.delta import DeltaMixer
from torchgraft.engines.recurrence.mixer import Mixer
from torchgraft.errors import BadInput

__all__ = ["CARD", "DeltaNet", "hybrid"]

CARD = Card(
    key="deltanet",
    title="DeltaNet",
    seed_id=246,
    authors="Yang, Wang, Zhang, Shen and Kim, 2024",
    reference="https://arxiv.org/abs/2406.06484",
    family="parts/mixers",
    kind="part",
    engine=("recurrence",),
    equation="S_t = (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T,  o_t = S_t^T q_t,  |q_t| = |k_t| = 1",
    entry="DeltaNet",
    capabilities=frozenset({"causal", "stateful", "linear-time", "compilable"}),
    declared={
        "parameters": "(2 * int(expand_k * d_model) + int(expand_v * d_model)) * (d_model + conv)"
        " + d_model * num_heads + int(expand_v * d_model) // num_heads + int(expand_v * d_model) * d_model"
    },
    example={"d_model": 16, "num_heads": 2, "expand_k": 1.0, "expand_v": 1.0, "conv": 4},
    shapes=((2, 12, 16),),
    oracles=(
        "chunk form equals step form at every chunk size and from any state, below 1e-10 in float64",
        "the same key written twice with beta 1 holds the last value; K orthonormal keys hold K values exactly",
        "with orthogonal keys it is additive linear attention on values scaled by beta",
        "with a decay of 1 in every head the gated form is the form without gates",
    ),
    claim=Claim(
        text="Recall of the last value of each key from 16 writes with repeated keys, 64 symbols, 64 tokens, two "
        "layers of width 64 with two heads: against the same mixer with the additive update. And chunks against "
        "the step loop at 2048 tokens, forward.",
        figure="accuracy >= 95 % and additive <= 75 %, means over seeds; chunk forward >= 5x faster than steps",
    ),
    choose_when="facts must be recalled exactly or overwritten, in constant memory a token",
    choose_instead="gated-linear-attention for plain text at less cost; negative-eigenvalue-rnn where state is tracked",
    bibtex="@inproceedings{yang2024deltanet, title={Parallelizing Linear Transformers with the Delta Rule over "
    "Sequence Length}, author={Yang, Songlin and Wang, Bailin and Zhang, Yu and Shen, Yikang and Kim, Yoon}, "
    "booktitle={NeurIPS}, year={2024}}",
)


class DeltaNet(DeltaMixer):
    """The delta rule on unit keys, after a short convolution.

    Args:
        d_model: the width D.
        num_heads: number of heads H.
        expand_k: width of all keys together, as a share of D.
        expand_v: width of all values together, as a share of D.
        conv: taps of the short convolution; 0 leaves it out.
        gated: whether the memory decays too (Gated DeltaNet); the output then has a SiLU gate.
        allow_neg_eigval: whether beta goes up to 2, so that the eigenvalue along a key may be negative.

    Shapes:
        x: (B, T, D) -> (B, T, D); memory of the state: (B, H, K, V).

    Example:
        >>> import torch
        >>> mixer = DeltaNet(16, num_heads=2)
        >>> x = torch.randn(1, 5, 16)
        >>> y, state = mixer.prefill(x[:, :4])
        >>> torch.allclose(mixer.step(x[:, 4], state)[0], mixer(x)[:, 4], atol=1e-5)
        True

    Raises:
        BadInput: ``num_heads`` does not divide the widths of keys and values, or ``conv`` is negative.
    """

    def __init__(
        self,
        d_model: int,
        *,
        num_heads: int = 4,
        expand_k: float = 1.0,
        expand_v: float = 1.0,
        conv: int = 4,
        gated: bool = False,
        allow_neg_eigval: bool = False,
    ) -> None:
        super().__init__(
            d_model,
            num_heads=num_heads,
            expand_k=expand_k,
            expand_v=expand_v,
            conv=conv,
            householders=1,
            beta_max=2.0 if allow_neg_eigval else 1.0,
            gated=gated,
        )


def hybrid(
    layers: int,
    pattern: Literal["sliding", "global2"],
    attention: Callable[[int], Mixer],
    *,
    delta: Callable[[int], Mixer] = DeltaNet,
) -> tuple[Callable[[int], Mixer], ...]:
    """Return a builder of the mixer of every layer of one of the paper's two hybrid stacks.

    Args:
        layers: how many.
        pattern: ``"sliding"`` puts attention in every other layer, the second first: let it be of a sliding window;
            ``"global2"`` puts it in two layers only, the second and the one after the middle (one and the
            same up to three layers): let it be global.
        attention: builds an attention of a given width.
        delta: builds a mixer of the other layers.

    Example:
        >>> from torchgraft.parts.blocks.sequence_model import SequenceModel
        >>> from torchgraft.parts.mixers.softmax_attention import SoftmaxAttention
        >>> stack = iter(hybrid(6, "global2", SoftmaxAttention))
        >>> model = SequenceModel(16, 6, lambda width: next(stack)(width))
        >>> [type(mixer).__name__[:5] for mixer in model.mixers()]
        ['Delta', 'Softm', 'Delta', 'Softm', 'Delta', 'Delta']

    Raises:
        BadInput: the pattern is unknown, or there are fewer than two layers.
    """
    if layers < 2:
        raise BadInput(f"layers must be at least 2, got {layers}")
    if pattern == "sliding":
        chosen = set(range(1, layers, 2))
    elif pattern == "global2":
        chosen = {1, layers // 2}
    else:
        raise BadInput(f"pattern must be 'sliding' or 'global2', got {pattern!r}")
    return tuple(attention if layer in chosen else delta for layer in range(layers))
