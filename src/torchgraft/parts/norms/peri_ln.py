"""Normalise what a sublayer takes and what it gives: the residual stream then grows linearly with depth.

`Peri-LN: Revisiting Layer Normalization in the Transformer Architecture <https://arxiv.org/abs/2502.02732>`_
(Kim et al., 2025): x_{l+1} = x_l + Norm_out(M(Norm_in(x_l))), with a norm on x_0 and one before the head.

Departures: where a sublayer has its own dropout inside, the output norm stands after it; a post-norm block that was
written as pre-norm computes Norm(x + M(x)) as x + (Norm(x + M(x)) - x), equal up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor, nn

from torchgraft.catalogue import Card
from torchgraft.catalogue.card import Claim
from torchgraft.engines.normalize.attach import NormedInput, NormedOutput, add_norm, attached, take_norm
from torchgraft.engines.normalize.depth import Depth, variance_profile
from torchgraft.engines.normalize.norm import Norm, token_norm
from torchgraft.engines.normalize.placement import (
    Block,
    find_blocks,
    fresh_norm,
    is_norm,
    leave_fast_path,
    place_norms,
)
from torchgraft.errors import BadInput

__all__ = ["CARD", "Depth", "PeriLNBlock", "set_norm_placement", "variance_profile"]

CARD = Card(
    key="peri-ln",
    title="Peri-LN",
    seed_id=179,
    authors="Kim, Lee, Park, Oh, Kim, Yoo, Shin, Han, Shin and Yoo, 2025",
    reference="https://arxiv.org/abs/2502.02732",
    family="parts/norms",
    kind="part",
    engine=("normalize", "surgery"),
    equation="x_{l+1} = x_l + Norm_out(M(Norm_in(x_l)))",
    entry="PeriLNBlock",
    capabilities=frozenset({"compilable"}),
    declared={"parameters": "d_model**2 + 3*d_model"},
    example={"d_model": 16},
    shapes=((3, 5, 16),),
    oracles=(
        "with RMS norms the mean square of the branch is the mean of g^2 for every token",
        "scaling the last weight of M by s leaves the output as it is and divides that weight's gradient by s",
        "at the start Var(x_2L) = Var(x_0) + 2L within 15 % at width 256",
        "without the output norm it is the pre-norm block; pre -> peri -> pre gives back the same model",
        "torch's layers, this library's, GPT-2, Llama, ViT, BERT and Gemma-2 equal blocks written out by hand",
    ),
    claim=Claim(
        text="A byte transformer of 12 layers on the standard library's source, pre, post and peri, at learning rates "
        "1e-3, 3e-3 and 1e-2: loss, variance of the last hidden state, rises of the loss.",
        figure="variance of peri within 2x of Var(x_0) + sum of mean(g^2), and below that of pre; post above 2.8 nats "
        "at a rate where peri is below; peri's best loss at most pre's + 0.02 with no more rises above 1.3x",
    ),
    choose_when="a deep transformer is trained from scratch and activations or losses spike, or in low precision",
    choose_instead="pre-norm for fine-tuning a pre-norm checkpoint: an added output norm changes its function",
    bibtex="@inproceedings{kim2025periln, title={Peri-{LN}: Revisiting Layer Normalization in the Transformer "
    "Architecture}, author={Kim, Jeonghoon and Lee, Byeongchan and Park, Cheonbok and Oh, Yeontaek and Kim, Beomjun "
    "and Yoo, Taehwan and Shin, Seongjin and Han, Dongyoon and Shin, Jinwoo and Yoo, Kang Min}, booktitle={ICML}, "
    "year={2025}}",
)


class _RMSNorm(Norm):
    """x / rms(x) * g over the last axis."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return token_norm(x, (self.channels,), weight=self.weight, eps=self.eps, centred=False)


#: Kinds of norm by name.
NORMS: dict[str, Callable[[int], nn.Module]] = {"rms": _RMSNorm, "layer": nn.LayerNorm}


class PeriLNBlock(nn.Module):
    """x + Norm_out(M(Norm_in(x))).

    Output gains should not be decayed to zero: leave parameters of one dimension out of the weight decay.

    Args:
        d_model: the width D.
        sublayer: M, any module (B, T, D) -> (B, T, D); by default one linear layer.
        norm: ``"rms"`` or ``"layer"``.

    Shapes:
        (B, T, D) -> (B, T, D)

    Example:
        >>> import torch
        >>> branch = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))
        >>> PeriLNBlock(8, sublayer=branch)(torch.ones(1, 2, 8)).shape
        torch.Size([1, 2, 8])

    Raises:
        BadInput: ``d_model`` is below 1, or ``norm`` is another.
    """

    def __init__(
        self, d_model: int, *, sublayer: nn.Module | None = None, norm: Literal["rms", "layer"] = "rms"
    ) -> None:
        super().__init__()
        if d_model < 1:
            raise BadInput(f"d_model must be at least 1, got {d_model}")
        if norm not in NORMS:
            raise BadInput(f"norm must be one of {', '.join(NORMS)}, got {norm!r}")
        self.d_model = d_model
        self.input_norm, self.output_norm = NORMS[norm](d_model), NORMS[norm](d_model)
        self.sublayer = nn.Linear(d_model, d_model) if sublayer is None else sublayer

    def forward(self, x: Tensor) -> Tensor:
        """Add the normalised branch."""
        if x.ndim != 3 or x.shape[-1] != self.d_model:
            raise BadInput(f"x must have shape (B, T, {self.d_model}), got {tuple(x.shape)}")
        if not x.is_floating_point():
            raise BadInput(f"x must be floating point, got {x.dtype}")
        y: Tensor = self.output_norm(self.sublayer(self.input_norm(x)))
        return x + y.to(x.dtype)


def _around(model: nn.Module, stack: str) -> tuple[list[str], list[str]]:
    """Return the norms of the embedding, and the final norms, of what holds a stack, directly or further up."""
    parts = stack.split(".")
    above = {".".join(parts[:count]) for count in range(len(parts) + 1)}
    embedding: list[str] = []
    final: list[str] = []
    for name, module in model.named_modules():
        if not is_norm(module) or name.startswith(f"{stack}."):
            continue
        place = name.lower().split(".")
        at = next((index for index, part in enumerate(place) if "embed" in part), len(place) - 1)
        if ".".join(name.split(".")[:at]) in above:
            (embedding if "embed" in place[at] else final).append(name)
    return embedding, final


def set_norm_placement(
    model: nn.Module,
    placement: Literal["pre", "post", "peri"],
    *,
    embed_norm: bool = True,
    final_norm: bool = True,
) -> nn.Module:
    """Move the norms of every transformer block, in place, and return the model.

    From pre-norm, ``peri`` adds a norm to every sublayer's output; back again takes it off. A norm that is moved keeps
    its weights; the function of the model changes, so train it afterwards.

    Args:
        model: holds blocks of a known kind, see :data:`torchgraft.engines.normalize.placement.FORMS`.
        placement: ``"pre"``, ``"post"`` or ``"peri"``.
        embed_norm: whether ``peri`` adds a norm before the first block, where the embedding has none.
        final_norm: whether ``pre`` and ``peri`` add a norm after the last block, where none follows it.

    Example:
        >>> import torch
        >>> layer = nn.TransformerEncoderLayer(8, 2, batch_first=True, norm_first=True)
        >>> stack = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        >>> set_norm_placement(stack, "peri")(torch.randn(1, 3, 8)).shape
        torch.Size([1, 3, 8])

    Raises:
        BadInput: no block is recognised, or its sublayers cannot be normalised so.
    """
    place_norms(model, placement)
    blocks = find_blocks(model)
    for stack in dict.fromkeys(block.stack for block in blocks):
        members = [block for block in blocks if block.stack == stack]
        first, last = model.get_submodule(members[0].name), model.get_submodule(members[-1].name)
        for module, mixin, name in ((first, NormedInput, "input_norm"), (last, NormedOutput, "output_norm")):
            if attached(module, mixin):
                take_norm(module, mixin, name)
        before, after = _around(model, stack)
        kind = next(_norms(model, members[0]))
        if placement == "peri" and embed_norm and not before:
            add_norm(first, NormedInput, "input_norm", fresh_norm(kind))
            leave_fast_path(first)
        if placement != "post" and final_norm and not after:
            add_norm(last, NormedOutput, "output_norm", fresh_norm(kind))
            leave_fast_path(last)
    return model


def _norms(model: nn.Module, block: Block) -> Any:
    for name, module in model.get_submodule(block.name).named_modules():
        if name and is_norm(module):
            yield module
