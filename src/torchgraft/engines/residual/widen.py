"""Consecutive pre-norm transformer blocks merged into one wider block of the same class.

    u = x + sum_i A_i(n1(x)),  y = u + sum_i M_i(n2(u)): heads side by side in one attention, hidden units in one FFN

Multi-head outputs and feed-forward outputs are additive over heads and hidden units, so concatenated projections give
exactly these sums. The norms of the blocks normalise one input once; their gains and offsets go into the projections
that follow. The code of the block runs unchanged: what is not understood is refused, which is found out by a trial.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import FunctionType
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from torchgraft.engines.depth import LayerPath
from torchgraft.engines.linearize.graft import form_of
from torchgraft.engines.residual.parallel import checked_spans, container_of, first_tensor, no_nested_tensors
from torchgraft.engines.surgery.convert import Attention as OpenAttention
from torchgraft.engines.surgery.edits import Edit
from torchgraft.errors import BadInput

__all__ = ["Widen", "obstacle", "widened"]

_NORMS = (
    ("norm1", "norm2"),
    ("layernorm_before", "layernorm_after"),
    ("input_layernorm", "post_attention_layernorm"),
    ("ln_1", "ln_2"),
)
_ATTENTIONS = ("attn", "self_attn", "attention")
#: Projections of an attention: (to queries, keys and values; back), the first ones fused where there is only one.
_PROJECTIONS = (
    (("query", "key", "value"), "out"),
    (("q_proj", "k_proj", "v_proj"), "o_proj"),
    (("q_proj", "k_proj", "v_proj"), "out_proj"),
    (("qkv",), "proj"),
    (("c_attn",), "c_proj"),
)
_FEED_FORWARD = (
    (("mlp.fc1",), "mlp.fc2"),
    (("fc1",), "fc2"),
    (("linear1",), "linear2"),
    (("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj"),
    (("mlp.c_fc",), "mlp.c_proj"),
)
#: Numbers that say how wide a module is, or where it stands; blocks that are merged may differ in them.
_SIZES = frozenset(
    (
        *("num_heads", "heads", "num_attention_heads", "head_dim", "value_dim", "embed_dim", "hidden_size"),
        *("intermediate_size", "inner_dim", "split_size", "in_features", "out_features", "nx", "nf"),
        *("layer_idx", "training"),
    )
)


@dataclass(frozen=True)
class _Anatomy:
    """Where in a block its parts are, by dotted name."""

    norms: tuple[str, str]
    attention: str
    into: tuple[str, ...]
    back: str
    up: tuple[str, ...]
    down: str

    @property
    def parts(self) -> tuple[str, ...]:
        return (*self.norms, *self.into, self.back, *self.up, self.down)


class _Unreadable(Exception):
    """A block is not one whose parts are known; the message says why."""


def _opened(block: nn.Module) -> nn.Module:
    """Return a copy of ``block`` with the same tensors, packed projections of ``nn.MultiheadAttention`` apart."""
    kept = {id(value): value for value in (*block.parameters(), *block.buffers())}
    twin = copy.deepcopy(block, kept)
    for name, child in twin.named_children():
        if type(child) is nn.MultiheadAttention and form_of(child) is not None:
            setattr(twin, name, OpenAttention(child))
    return twin


def _read(block: nn.Module) -> _Anatomy:
    named = dict(block.named_modules())
    norms = next((pair for pair in _NORMS if set(pair) <= named.keys()), None)
    attention = next((name for name in _ATTENTIONS if name in named), None)
    if norms is None or attention is None:
        raise _Unreadable(f"a {type(block).__name__} is no pre-norm transformer block whose parts are known")
    if form_of(named[attention]) is None:
        raise _Unreadable(f"its attention, a {type(named[attention]).__name__}, is no softmax attention that is known")
    found = (
        _Anatomy(norms, attention, tuple(f"{attention}.{name}" for name in into), f"{attention}.{back}", up, down)
        for into, back in _PROJECTIONS
        for up, down in _FEED_FORWARD
    )
    anatomy = next((each for each in found if set(each.parts) <= named.keys()), None)
    if anatomy is None:
        raise _Unreadable(f"the projections of a {type(block).__name__} have names that are not known")
    held = {id(value) for name in anatomy.parts for value in named[name].parameters()}
    other = [name for name, value in block.named_parameters() if id(value) not in held]
    if other:
        raise _Unreadable(f"it also holds {other[0]}, which no merged block has a place for")
    return anatomy


def _fingerprint(block: nn.Module) -> dict[str, Any]:
    """Return what must be equal in blocks that become one: classes, and settings that are no sizes."""
    found: dict[str, Any] = {}
    for name, module in block.named_modules():
        found[name] = type(module)
        for key, value in vars(module).items():
            plain = value is None or isinstance(value, bool | int | float | str | FunctionType) or callable(value)
            if not key.startswith("_") and key not in _SIZES and plain:
                found[f"{name}.{key}"] = value
    return found


def _matrix(layer: nn.Module) -> Tensor:
    """Return the weight of a projection, (out, in); GPT-2 keeps it transposed."""
    weight = layer.get_parameter("weight").detach()
    return weight if isinstance(layer, nn.Linear) else weight.t()


def _offset(layer: nn.Module) -> Tensor | None:
    bias = getattr(layer, "bias", None)
    return bias.detach() if isinstance(bias, Tensor) else None


def _linear(weight: Tensor, bias: Tensor | None, like: nn.Module) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta", dtype=weight.dtype)
    wanted = like.get_parameter("weight").requires_grad
    made.weight = nn.Parameter(weight.detach().clone(), requires_grad=wanted)
    if bias is not None:
        made.bias = nn.Parameter(bias.detach().clone(), requires_grad=wanted)
    return made.train(like.training)


def _plain(norm: nn.Module) -> nn.Module:
    """Return the norm without gain and offset."""
    weight = norm.get_parameter("weight")
    eps = getattr(norm, "eps", None)
    eps = getattr(norm, "variance_epsilon", None) if eps is None else eps
    if isinstance(norm, nn.LayerNorm):
        if len(norm.normalized_shape) != 1:
            raise _Unreadable("it normalises over more than the width")
        return nn.LayerNorm(norm.normalized_shape, eps=norm.eps, elementwise_affine=False).train(norm.training)
    if isinstance(norm, nn.RMSNorm) or type(norm).__name__.endswith("RMSNorm"):
        return nn.RMSNorm(weight.shape[0], eps=eps, elementwise_affine=False).train(norm.training)
    raise _Unreadable(f"its norm, a {type(norm).__name__}, is neither a LayerNorm nor an RMSNorm")


def _folded(norm: nn.Module, layer: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Return weight and bias of ``layer`` after the norm's gain and offset: W(g n + b) + c = (W g) n + (W b + c)."""
    weight, bias = _matrix(layer), _offset(layer)
    gain, offset = norm.get_parameter("weight").detach(), _offset(norm)
    if offset is not None:
        moved = weight.double() @ offset.double()
        bias = (moved if bias is None else moved + bias.double()).to(weight.dtype)
    return weight * gain, bias


def _joined(norms: Sequence[nn.Module], layers: Sequence[nn.Module], groups: int = 1) -> nn.Linear:
    """Return the projections of several blocks, which share an input, as one; ``groups`` fused parts stay together."""
    folded = [_folded(norm, layer) for norm, layer in zip(norms, layers, strict=True)]
    weight = torch.cat([part for each in zip(*(w.chunk(groups) for w, _ in folded), strict=True) for part in each])
    bias = None
    if any(b is not None for _, b in folded):
        filled = [w.new_zeros(len(w)) if b is None else b for w, b in folded]
        bias = torch.cat([part for each in zip(*(b.chunk(groups) for b in filled), strict=True) for part in each])
    return _linear(weight, bias, layers[0])


def _summed(layers: Sequence[nn.Module]) -> nn.Linear:
    """Return the projections of several blocks, whose outputs are added, as one."""
    biases = [bias for layer in layers if (bias := _offset(layer)) is not None]
    total = torch.stack(biases).sum(0) if biases else None
    return _linear(torch.cat([_matrix(layer) for layer in layers], dim=1), total, layers[0])


def _put(block: nn.Module, name: str, new: nn.Module) -> None:
    path, _, leaf = name.rpartition(".")
    block.get_submodule(path)._modules[leaf] = new


def widened(blocks: Sequence[nn.Module]) -> nn.Module:
    """Return one block of the class of ``blocks`` with all their heads and hidden units; the blocks stay as they are.

    Args:
        blocks: pre-norm transformer blocks that differ in nothing but weights and widths.

    Example:
        >>> from torchgraft.bench.models import TransformerBlock
        >>> wide = widened([TransformerBlock(8, 2), TransformerBlock(8, 2)])
        >>> wide.attn.num_heads, wide.mlp.fc1.out_features
        (4, 64)

    Raises:
        BadInput: their parts are not known, or they differ in a setting.
    """
    try:
        return _widened(blocks)
    except _Unreadable as error:
        raise BadInput(f"these blocks cannot be merged: {error}") from None


def _widened(blocks: Sequence[nn.Module]) -> nn.Module:
    opened = [_opened(block) for block in blocks]
    anatomy = _read(opened[0])
    first = _fingerprint(opened[0])
    for other in opened[1:]:
        found = _fingerprint(other)
        odd = [name for name in first.keys() | found.keys() if first.get(name, 0) != found.get(name, 0)]
        if odd:
            raise _Unreadable(f"they differ in {sorted(odd)[0].lstrip('.') or 'their class'}")
        _read(other)
    sizes = {
        size for block in opened if (form := form_of(block.get_submodule(anatomy.attention))) for size in _sizes(form)
    }
    if len(sizes) > 2:
        raise _Unreadable("their heads are of different sizes")

    def parts(name: str) -> list[nn.Module]:
        return [block.get_submodule(name) for block in opened]

    new = opened[0]
    norm1, norm2 = parts(anatomy.norms[0]), parts(anatomy.norms[1])
    made: dict[str, nn.Module] = {name: _plain(new.get_submodule(name)) for name in anatomy.norms}
    for name in anatomy.into:
        made[name] = _joined(norm1, parts(name), groups=3 if len(anatomy.into) == 1 else 1)
    made |= {name: _joined(norm2, parts(name)) for name in anatomy.up}
    made |= {name: _summed(parts(name)) for name in (anatomy.back, anatomy.down)}
    attentions = parts(anatomy.attention)
    for attribute in ("num_heads", "heads", "num_attention_heads", "split_size"):
        values = [getattr(attention, attribute, None) for attention in attentions]
        if all(isinstance(value, int) for value in values):
            setattr(attentions[0], attribute, sum(values))
    for name, module in made.items():
        _put(new, name, module)
    return new


def _sizes(form: Any) -> tuple[tuple[str, int], tuple[str, int]]:
    return ("key", form.key_size), ("value", form.value_size)


def _trial(block: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Return two copies of ``block``: its norms' gains and offsets moved; one that adds nothing."""
    anatomy = _read(_opened(block))
    moved, silent = copy.deepcopy(block), copy.deepcopy(block)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name in anatomy.norms:
            for value in moved.get_submodule(name).parameters():
                value.add_((torch.rand(value.shape, generator=draw) - 0.5).to(value))
        for name in (anatomy.back, anatomy.down):
            for value in silent.get_submodule(name).parameters():
                value.zero_()
    return moved, silent


def obstacle(block: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str | None:
    """Return why ``block`` cannot be merged with others of its kind, or ``None`` where it can.

    It is tried: together with a block that adds nothing, before it and after it, it must answer as it does alone,
    whatever the gains and offsets of its norms.

    Args:
        block: the block.
        args: what it is called with.
        kwargs: what it is called with by keyword.
    """
    try:
        moved, silent = _trial(block)
        with torch.no_grad():
            expected = first_tensor(moved(*args, **kwargs)).double()
            for pair in ([moved, silent], [silent, moved]):
                made = first_tensor(_widened(pair)(*args, **kwargs)).double()
                if made.shape != expected.shape or not _agree(made, expected):
                    return f"a merged {type(block).__name__} does not compute the sum of its parts"
    except _Unreadable as error:
        return str(error)
    except Exception as error:  # whatever the block's own code says of sizes that it did not expect
        return f"the code of {type(block).__name__} does not run with other widths: {str(error).splitlines()[0][:120]}"
    return None


def _agree(made: Tensor, expected: Tensor) -> bool:
    # Rounding of the data type through one block: 1e-3 of the size is far above it in float32, far below any mistake.
    size = float(expected.abs().max()) if expected.numel() else 0.0
    return bool(((made - expected).abs() <= 1e-3 * max(size, 1.0)).all())


class Widen(Edit):
    """Merge spans of consecutive transformer blocks into one wider block each.

    Args:
        name: dotted name of the ``nn.ModuleList`` or ``nn.Sequential``.
        size: how many children it has.
        spans: (first, length) of each span, in order, at least two blocks long.
    """

    op: ClassVar[str] = "widen-blocks"
    name: str
    size: int = Field(ge=1)
    spans: tuple[tuple[int, int], ...] = Field(min_length=1)

    def rewrite(self, model: nn.Module) -> nn.Module:
        """Put a wider block in the place of every span; what counts layers is told how many are left."""
        container = container_of(model, self.name)
        if len(container) != self.size:
            raise BadInput(f"{self.name!r} should have {self.size} blocks, it has {len(container)}")
        checked_spans(self.spans, self.size, self.name)
        gone: set[int] = set()
        for first, length in self.spans:
            container[first] = widened(list(container)[first : first + length])
            gone.update(range(first + 1, first + length))
        path = tuple(place for place in range(self.size) if place not in gone)
        model = LayerPath(name=self.name, size=self.size, path=path).rewrite(model)
        no_nested_tensors(model)
        return model

    def describe(self) -> dict[str, str]:
        """Return which blocks became one."""
        return {self.name: "; ".join(f"blocks {a} to {a + n - 1} merged into one" for a, n in self.spans)}
