"""Where the norms of a transformer stand: find its blocks, read its residual stream, and move norms around a sublayer.

A block is recognised by the names of its parts (:data:`FORMS`: torch's own layers, the blocks of this library and of
timm, Hugging Face's GPT-2, Llama and its kin, ViT, BERT, Gemma-2 and OLMo-2). Sublayers keep their parameters and
names; a norm that is added stands as a new child of the sublayer that it normalises.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from torchgraft.engines.normalize.attach import (
    NormedInput,
    NormedOutput,
    add_norm,
    attached,
    first_of,
    on_first,
    take_norm,
)
from torchgraft.engines.surgery.swap import replace_module
from torchgraft.errors import BadInput

__all__ = [
    "FORMS",
    "Block",
    "Form",
    "Placement",
    "Sublayer",
    "find_blocks",
    "fresh_norm",
    "gain_offset",
    "is_norm",
    "leave_fast_path",
    "place_norms",
]

#: pre: x + M(N(x)); post: N(x + M(x)); peri: x + N'(M(N(x))); output: x + N'(M(x)).
Placement: TypeAlias = Literal["pre", "post", "peri", "output"]


@dataclass(frozen=True)
class Form:
    """How the parts of one kind of block are called.

    Args:
        parts: for each sublayer the norm, the module that takes its input, the module that gives its output, and the
            norm of its output, as names within the block; empty where there is none.
        placement: where the norms stand; ``None`` where the block has a flag ``norm_first``.
        without: names that such a block does not have.
    """

    parts: tuple[tuple[str, str, str, str], ...]
    placement: Placement | None = "pre"
    without: tuple[str, ...] = ()


#: The first form whose parts are all there counts.
FORMS = (
    Form(
        (
            ("norm1", "self_attn", "self_attn", ""),
            ("norm2", "multihead_attn", "multihead_attn", ""),
            ("norm3", "linear1", "linear2", ""),
        ),
        None,
    ),
    Form((("norm1", "self_attn", "self_attn", ""), ("norm2", "linear1", "linear2", "")), None),
    Form(
        (
            ("input_layernorm", "self_attn", "self_attn", "post_attention_layernorm"),
            ("pre_feedforward_layernorm", "mlp", "mlp", "post_feedforward_layernorm"),
        ),
        "peri",
    ),
    Form(
        (
            ("", "self_attn", "self_attn", "post_attention_layernorm"),
            ("", "mlp", "mlp", "post_feedforward_layernorm"),
        ),
        "output",
        ("input_layernorm",),
    ),
    Form((("input_layernorm", "self_attn", "self_attn", ""), ("post_attention_layernorm", "mlp", "mlp", ""))),
    Form(
        (
            ("ln_1", "attn", "attn", ""),
            ("ln_cross_attn", "crossattention", "crossattention", ""),
            ("ln_2", "mlp", "mlp", ""),
        )
    ),
    Form((("ln_1", "attn", "attn", ""), ("ln_2", "mlp", "mlp", "")), without=("crossattention",)),
    Form((("layernorm_before", "attention", "attention", ""), ("layernorm_after", "mlp", "mlp", ""))),
    Form(
        (
            ("attention.output.LayerNorm", "attention.self", "attention.output.dense", ""),
            ("output.LayerNorm", "intermediate", "output.dense", ""),
        ),
        "post",
        ("crossattention",),
    ),
    Form((("norm1", "attn", "attn", ""), ("norm2", "mlp", "mlp", ""))),
    Form((("norm1", "attn", "attn", ""), ("norm2", "fc1", "fc2", ""))),
    Form((("norm", "mixer", "mixer", ""), ("channel_norm", "channels", "channels", ""))),
    Form((("norm", "mixer", "mixer", ""),)),
)


@dataclass(frozen=True)
class Sublayer:
    """One branch of a block, by dotted names within the model.

    Args:
        norm: its norm, before the sublayer, or after the addition in a post-norm block; empty where there is none.
        entry: the module that takes the branch's input.
        exit: the module that gives the branch's output.
        output_norm: the norm of its output; empty where there is none.
    """

    norm: str
    entry: str
    exit: str
    output_norm: str


@dataclass(frozen=True)
class Block:
    """One block of a stack.

    Args:
        name: dotted name within the model.
        stack: name of what holds the stack.
        index: place in the stack, from 1.
        placement: where its norms stand now.
        sublayers: its branches, in order.
    """

    name: str
    stack: str
    index: int
    placement: Placement
    sublayers: tuple[Sublayer, ...]


class _PostNorm(nn.Module):
    """On a branch M: gives N(x + M(x)) - x, to which the block adds x again."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        x, norm = first_of(args, kwargs), self.post_norm
        return on_first(super().forward(*args, **kwargs), lambda y: norm(x + y) - x)  # type: ignore[operator]


class _NormedMixed(nn.Module):
    """On a block with ``after(x, mixed)``: normalises what the mixer gave, in a full pass and in single steps."""

    def after(self, x: Tensor, mixed: Tensor) -> Tensor:
        y: Tensor = super().after(x, self.mixer_norm(mixed))  # type: ignore[misc,operator]
        return y


class _PostMixed(nn.Module):
    """On a block with ``after(x, mixed)``: normalises the sum of both."""

    def after(self, x: Tensor, mixed: Tensor) -> Tensor:
        y: Tensor = super().after(x, self.mixer_norm(x + mixed) - x)  # type: ignore[misc,operator]
        return y


def is_norm(module: nn.Module) -> bool:
    """Say whether ``module`` is a layer norm or an RMS norm of anybody's make, by the name of its class."""
    kind = type(module).__name__
    return isinstance(module, nn.LayerNorm | nn.RMSNorm) or (kind.endswith("Norm") and "Batch" not in kind)


def _at(block: nn.Module, path: str) -> nn.Module | None:
    found: Any = block
    for part in path.split("."):
        found = getattr(found, part, None)
    return found if isinstance(found, nn.Module) else None


def _form_of(module: nn.Module) -> Form | None:
    for form in FORMS:
        paths = [path for part in form.parts for path in part if path]
        if all(_at(module, path) is not None for path in paths) and not any(_at(module, p) for p in form.without):
            norms = [_at(module, path) for part in form.parts for path in (part[0], part[3]) if path]
            flagged = form.placement is not None or hasattr(module, "norm_first")
            if flagged and all(is_norm(norm) or isinstance(norm, nn.Identity) for norm in norms if norm is not None):
                return form
    return None


def find_blocks(model: nn.Module) -> list[Block]:
    """Return the transformer blocks of ``model``, in the order in which they are registered.

    Args:
        model: any model, or a stack of blocks.

    Raises:
        BadInput: none is recognised.
    """
    found: list[Block] = []
    counts: dict[str, int] = {}
    for name, module in model.named_modules():
        if any(name.startswith(f"{block.name}.") for block in found) or (form := _form_of(module)) is None:
            continue
        stack = name.rpartition(".")[0]
        counts[stack] = counts.get(stack, 0) + 1
        start = f"{name}." if name else ""
        layers = [Sublayer(*(start + path if path else "" for path in part)) for part in form.parts]
        found.append(Block(name, stack, counts[stack], _placement(model, module, form, layers), tuple(layers)))
    if not found:
        raise BadInput(
            f"{type(model).__name__} has no transformer block whose parts have known names, such as norm1, attn, "
            "norm2, mlp; known are torch's, timm's, and Hugging Face's GPT-2, Llama, ViT, BERT, Gemma-2, OLMo-2"
        )
    return found


def _placement(model: nn.Module, module: nn.Module, form: Form, layers: list[Sublayer]) -> Placement:
    last = [model.get_submodule(layer.exit) for layer in layers]
    if attached(module, _NormedMixed) or any(attached(each, NormedOutput) for each in last):
        return "peri"
    if attached(module, _PostMixed) or any(attached(each, _PostNorm) for each in last):
        return "post"
    if any(attached(model.get_submodule(layer.entry), NormedInput) for layer in layers):
        return "pre"
    if form.placement is None:
        return "pre" if module.norm_first else "post"
    if form.placement == "peri" and all(isinstance(model.get_submodule(s.output_norm), nn.Identity) for s in layers):
        return "pre"
    return form.placement


def gain_offset(norm: nn.Module) -> float:
    """Return what a norm adds to its weight before it multiplies by it: 1 in Gemma's, else 0."""
    weight = getattr(norm, "weight", None)
    if not isinstance(weight, Tensor):
        return 0.0
    twin = copy.deepcopy(norm).float()
    with torch.no_grad():
        twin.weight.fill_(1.0)  # type: ignore[operator]
        if isinstance(getattr(twin, "bias", None), Tensor):
            twin.bias.zero_()  # type: ignore[operator]
        probe = torch.tensor([1.0, -1.0], device=weight.device).repeat(len(weight))[: len(weight)]
        return 1.0 if float(twin(probe[None]).abs().max()) > 1.5 else 0.0


def fresh_norm(norm: nn.Module) -> nn.Module:
    """Return a norm of the kind of ``norm`` with gain 1 and shift 0, trained as that one is."""
    twin = copy.deepcopy(norm)
    with torch.no_grad():
        if isinstance(getattr(twin, "weight", None), Tensor):
            twin.weight.fill_(1.0 - gain_offset(norm))  # type: ignore[operator]
        if isinstance(getattr(twin, "bias", None), Tensor):
            twin.bias.zero_()  # type: ignore[operator]
    return twin


def leave_fast_path(block: nn.Module) -> None:
    """Let a layer of torch's always run its modules; its fused inference kernel would pass over what was changed."""
    if hasattr(block, "activation_relu_or_gelu"):
        block.__dict__["activation_relu_or_gelu"] = 0


def _to_pre(model: nn.Module, block: Block) -> None:
    module = model.get_submodule(block.name)
    flagged = _flagged(module)
    for layer in block.sublayers:
        entry, last = model.get_submodule(layer.entry), model.get_submodule(layer.exit)
        mixes = _mixes(module, layer)
        if mixes and attached(module, _NormedMixed):
            take_norm(module, _NormedMixed, "mixer_norm")
        elif mixes and attached(module, _PostMixed):
            replace_module(model, layer.norm, take_norm(module, _PostMixed, "mixer_norm"))
        elif attached(last, NormedOutput):
            take_norm(last, NormedOutput, "output_norm")
        elif attached(last, _PostNorm):
            replace_module(model, layer.norm, take_norm(last, _PostNorm, "post_norm"))
        elif block.placement == "peri" and layer.output_norm:
            replace_module(model, layer.output_norm, nn.Identity())
        elif block.placement == "post" and not flagged:
            norm = model.get_submodule(layer.norm)
            replace_module(model, layer.norm, nn.Identity())
            add_norm(entry, NormedInput, "input_norm", norm)
    if flagged and block.placement == "post":
        module.norm_first = True  # type: ignore[assignment]  # torch's flag


def _flagged(module: nn.Module) -> bool:
    return isinstance(getattr(module, "norm_first", None), bool)


def _mixes(module: nn.Module, layer: Sublayer) -> bool:
    return hasattr(module, "after") and layer.exit.rpartition(".")[2] == "mixer"


def _norm_of(model: nn.Module, layer: Sublayer) -> nn.Module:
    entry = model.get_submodule(layer.entry)
    return entry.get_submodule("input_norm") if attached(entry, NormedInput) else model.get_submodule(layer.norm)


def place_norms(model: nn.Module, placement: Literal["pre", "post", "peri"]) -> list[Block]:
    """Move the norms of every block of ``model``, in place, and return the blocks as they were.

    A norm that is moved keeps its weights, one that is added starts with gain 1. Nothing else changes.

    Args:
        model: holds transformer blocks.
        placement: where they shall stand.

    Raises:
        BadInput: no block is recognised, the placement is another, or a block's sublayers cannot be normalised so.
    """
    if placement not in ("pre", "post", "peri"):
        raise BadInput(f"placement must be 'pre', 'post' or 'peri', got {placement!r}")
    blocks = find_blocks(model)
    for block in blocks:
        _check(model, block, placement)
    for block in blocks:
        if block.placement == placement:
            continue
        module = model.get_submodule(block.name)
        _to_pre(model, block)
        if placement == "post" and _flagged(module):
            module.norm_first = False  # type: ignore[assignment]  # torch's flag
        elif placement != "pre":
            for layer in block.sublayers:
                (_to_peri if placement == "peri" else _to_post)(model, module, layer)
    return blocks


def _check(model: nn.Module, block: Block, placement: Placement) -> None:
    module = model.get_submodule(block.name)
    if block.placement == "output":
        raise BadInput(f"{block.name!r} normalises outputs only (OLMo-2), there is no input norm to keep or move")
    if placement != "post" or block.placement == "post" or _flagged(module):
        return
    for layer in block.sublayers:
        if layer.entry != layer.exit and not attached(model.get_submodule(layer.entry), NormedInput):
            raise BadInput(
                f"the branch from {layer.entry!r} to {layer.exit!r} is no single module; post-norm needs one"
            )


def _to_peri(model: nn.Module, module: nn.Module, layer: Sublayer) -> None:
    norm = fresh_norm(_norm_of(model, layer))
    if layer.output_norm:
        replace_module(model, layer.output_norm, norm)
    elif _mixes(module, layer):
        add_norm(module, _NormedMixed, "mixer_norm", norm)
    else:
        add_norm(model.get_submodule(layer.exit), NormedOutput, "output_norm", norm)
    leave_fast_path(module)


def _to_post(model: nn.Module, module: nn.Module, layer: Sublayer) -> None:
    entry = model.get_submodule(layer.entry)
    if attached(entry, NormedInput):  # it stood after the addition once
        replace_module(model, layer.norm, take_norm(entry, NormedInput, "input_norm"))
        return
    norm = model.get_submodule(layer.norm)
    replace_module(model, layer.norm, nn.Identity())
    if _mixes(module, layer):
        add_norm(module, _PostMixed, "mixer_norm", norm)
    else:
        add_norm(entry, _PostNorm, "post_norm", norm)
