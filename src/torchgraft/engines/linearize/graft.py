"""Attentions of models that somebody else wrote: how they are recognised, read, and given another kernel.

A graft keeps the projections of the attention that it stands for, under their own names, and is called as that one was.
Only what lies between the projections is new. Dropout of attention weights is gone, since there are no weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torchgraft.bench.models import Attention as PlainAttention
from torchgraft.engines.attention.mixer import AttentionMixer
from torchgraft.engines.linearize.kernel import Heads, Kernel, Watch, softmax_attention
from torchgraft.engines.recurrence.heads import merge_heads, split_heads
from torchgraft.engines.recurrence.mixer import Mixer
from torchgraft.engines.surgery.convert import Attention as OpenAttention
from torchgraft.errors import BadInput

__all__ = ["GRAFTS", "Form", "Graft", "form_of", "projections"]


@dataclass(frozen=True)
class Form:
    """What an attention is like.

    Args:
        graft: which class stands in for it, or ``None`` where it is a mixer of our own.
        num_heads: H, of the queries.
        key_size: K.
        value_size: V.
        causal: whether a token sees itself and those before it only; ``None`` where the caller's mask decides.
        d_model: the width D.
    """

    graft: type[Graft] | None
    num_heads: int
    key_size: int
    value_size: int
    causal: bool | None
    d_model: int


class Graft(nn.Module):
    """An attention of which only the projections are left, around a kernel.

    Args:
        old: the attention that it stands for; its children are taken over, not copied.
        kernel: what mixes.

    Attributes:
        watch: where set, called instead of the kernel; for training by what the kernel should do.
    """

    watch: Watch | None = None

    def __init__(self, old: nn.Module, kernel: Kernel) -> None:
        super().__init__()
        form = form_of(old)
        if form is None:
            raise BadInput(f"{type(old).__name__} is no attention that is known")
        for name, child in old.named_children():
            self.add_module(name, child)
        self.num_heads, self.head_dim, self.causal = form.num_heads, form.key_size, form.causal
        self.scale = float(getattr(old, "scaling", form.key_size**-0.5))
        self.kernel = kernel
        self.train(old.training)

    def mixed(self, q: Tensor, k: Tensor, v: Tensor, raw: tuple[Tensor, Tensor] | None, **rest: Any) -> Tensor:
        """Return what the kernel mixes, heads joined: (B, T, H, K), (B, T, G, K), (B, T, G, V) -> (B, T, H V)."""
        raw_q, raw_k = (q, k) if raw is None else raw
        repeat = q.shape[2] // k.shape[2]
        if repeat > 1:  # groups of queries share a key
            k, v, raw_k = (x.repeat_interleave(repeat, dim=2) for x in (k, v, raw_k))
        seen = _seen(rest.get("mask"), q.shape[1])
        heads = Heads(q, k, v, raw_q, raw_k, self.scale, seen)
        causal = bool(rest.get("causal", self.causal))
        mixed = self.kernel.run(heads, causal) if self.watch is None else self.watch(self.kernel, heads, causal)
        return merge_heads(mixed)


def _seen(mask: Tensor | None, tokens: int) -> Tensor | None:
    """Return which tokens are no padding, (B, T), from a mask (B, T), (B, 1, 1, T) or (B, 1, T, T)."""
    if mask is None:
        return None
    if mask.ndim == 4:  # a token that is there may look at itself
        mask = mask[:, 0, 0] if mask.shape[2] == 1 else mask[:, 0].diagonal(dim1=-2, dim2=-1)
    if mask.ndim != 2 or mask.shape[-1] != tokens:
        raise BadInput(f"a linear attention needs a mask of padding for {tokens} tokens, got {tuple(mask.shape)}")
    if mask.is_floating_point():
        return mask > -1.0
    return mask.bool()


def _refuse_cache(cache: object) -> None:
    if cache is not None:
        raise BadInput("a linear attention has no cache of keys; call the model with use_cache=False")


class PlainGraft(Graft):
    """Stands for the attention of ``torchgraft.bench.models``."""

    query: nn.Module
    key: nn.Module
    value: nn.Module
    out: nn.Module

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Mix tokens; ``mask`` (B, 1, 1, T) is True where a key may be seen."""
        q, k, v = (split_heads(part(x), self.num_heads) for part in (self.query, self.key, self.value))
        y: Tensor = self.out(self.mixed(q, k, v, None, mask=mask))
        return y


class FusedGraft(Graft):
    """Stands for an attention with one projection ``qkv`` and another, ``proj``, as vision models have."""

    qkv: nn.Module
    proj: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """Mix tokens."""
        q, k, v = (split_heads(part, self.num_heads) for part in self.qkv(x).chunk(3, dim=-1))
        y: Tensor = self.proj(self.mixed(q, k, v, None))
        return y


class OpenGraft(Graft):
    """Stands for ``nn.MultiheadAttention`` that attends to its own input; called and answering as that one is."""

    # Read by nn.TransformerEncoderLayer and nn.TransformerEncoder, which take their slower, general path on None.
    in_proj_bias: None = None
    in_proj_weight: None = None
    _qkv_same_embed_dim = False
    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    out_proj: nn.Module

    def __init__(self, old: nn.MultiheadAttention | OpenAttention, kernel: Kernel) -> None:
        super().__init__(old if isinstance(old, OpenAttention) else OpenAttention(old), kernel)
        self.batch_first = old.batch_first

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, None]:
        """Attend; arguments as those of ``nn.MultiheadAttention``; no weights are returned."""
        if key is not query or value is not query:
            raise BadInput("a linear attention stands for self-attention; query, key and value must be one tensor")
        x = query if query.ndim == 3 else query[None]
        x = x if self.batch_first or query.ndim == 2 else x.transpose(0, 1)
        causal = attn_mask is not None or is_causal
        if attn_mask is not None:
            _check_causal(attn_mask)
        seen = None
        if key_padding_mask is not None:
            hidden = key_padding_mask if key_padding_mask.ndim == 2 else key_padding_mask[None]
            seen = ~hidden if hidden.dtype == torch.bool else hidden > -1.0
        q, k, v = (split_heads(part(x), self.num_heads) for part in (self.q_proj, self.k_proj, self.v_proj))
        y: Tensor = self.out_proj(self.mixed(q, k, v, None, mask=seen, causal=causal))
        if query.ndim == 2:
            return y[0], None
        return (y if self.batch_first else y.transpose(0, 1)), None


def _check_causal(mask: Tensor) -> None:
    hidden = mask if mask.dtype == torch.bool else mask < -1.0
    expected = torch.ones(mask.shape[-2:], dtype=torch.bool, device=mask.device).triu(1)
    if not torch.equal(hidden, expected.expand_as(hidden)):
        raise BadInput("a linear attention is causal or sees all tokens; attn_mask is neither")


class BertGraft(Graft):
    """Stands for the self-attention of BERT-shaped models; the output projection lies outside."""

    query: nn.Module
    key: nn.Module
    value: nn.Module

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, past_key_values: object = None, **rest: Any
    ) -> tuple[Tensor, None]:
        """Mix tokens."""
        _refuse_cache(past_key_values)
        q, k, v = (split_heads(part(hidden_states), self.num_heads) for part in (self.query, self.key, self.value))
        return self.mixed(q, k, v, None, mask=attention_mask), None


class ProjectedGraft(Graft):
    """Stands for the attention of ViT- and Llama-shaped models: four projections, groups of keys, rotation."""

    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    o_proj: nn.Module

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: object = None,
        **rest: Any,
    ) -> tuple[Tensor, None]:
        """Mix tokens."""
        _refuse_cache(past_key_values)
        parts = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (torch.unflatten(part(hidden_states), -1, (-1, self.head_dim)) for part in parts)
        raw = (q, k)
        if position_embeddings is not None:
            cos, sin = (x[:, :, None] for x in position_embeddings)  # (B, T, 1, K)
            q, k = (x * cos + _half_turned(x) * sin for x in (q, k))
        y: Tensor = self.o_proj(self.mixed(q, k, v, raw, mask=attention_mask))
        return y, None


def _half_turned(x: Tensor) -> Tensor:
    left, right = x.chunk(2, dim=-1)
    return torch.cat([-right, left], dim=-1)


class Gpt2Graft(Graft):
    """Stands for the self-attention of GPT-2-shaped models, whose projections are fused and transposed."""

    c_attn: nn.Module
    c_proj: nn.Module
    resid_dropout: nn.Module

    def forward(
        self,
        hidden_states: Tensor,
        past_key_values: object = None,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        **rest: Any,
    ) -> tuple[Tensor, None]:
        """Mix tokens."""
        _refuse_cache(past_key_values)
        q, k, v = (split_heads(part, self.num_heads) for part in self.c_attn(hidden_states).chunk(3, dim=-1))
        y: Tensor = self.resid_dropout(self.c_proj(self.mixed(q, k, v, None, mask=attention_mask)))
        return y, None


#: Class of an attention in transformers -> what stands in for it, and the children that it must have and no others.
GRAFTS: dict[str, tuple[type[Graft], frozenset[str]]] = {
    "BertSelfAttention": (BertGraft, frozenset({"query", "key", "value", "dropout"})),
    "GPT2Attention": (Gpt2Graft, frozenset({"c_attn", "c_proj", "attn_dropout", "resid_dropout"})),
    "ViTAttention": (ProjectedGraft, frozenset({"q_proj", "k_proj", "v_proj", "o_proj"})),
    "LlamaAttention": (ProjectedGraft, frozenset({"q_proj", "k_proj", "v_proj", "o_proj"})),
}


def form_of(module: nn.Module) -> Form | None:
    """Return what softmax attention ``module`` is, or ``None`` where it is none that is known.

    Example:
        >>> form_of(nn.MultiheadAttention(8, 2)).num_heads
        2
        >>> form_of(nn.Linear(8, 8)) is None
        True
    """
    if isinstance(module, AttentionMixer):
        if not module.softmax or not module.causal or module.num_kv_heads != module.num_heads:
            return None
        return Form(None, module.num_heads, module.key_size, module.key_size, True, module.d_model)
    if isinstance(module, Mixer):
        return None
    if type(module) is PlainAttention:
        value_size = module.value.out_features // module.num_heads
        width = module.query.in_features
        return Form(PlainGraft, module.num_heads, module.head_dim, value_size, module.causal, width)
    if isinstance(module, nn.MultiheadAttention | OpenAttention):
        plain = module.bias_k is None and not module.add_zero_attn
        same = module._qkv_same_embed_dim if isinstance(module, nn.MultiheadAttention) else True
        if not plain or not same or module.num_heads * module.head_dim != module.out_proj.in_features:
            return None
        size = module.head_dim
        return Form(OpenGraft, module.num_heads, size, size, None, module.out_proj.out_features)
    name = type(module).__name__
    if name in GRAFTS and type(module).__module__.startswith("transformers."):
        return _hugging_face(module, *GRAFTS[name])
    return _fused(module)


def _hugging_face(module: Any, graft: type[Graft], children: frozenset[str]) -> Form | None:
    if {name for name, _ in module.named_children()} != children or getattr(module, "is_cross_attention", False):
        return None
    config = module.config
    heads, width = int(config.num_attention_heads), int(config.hidden_size)
    size = int(getattr(module, "head_dim", 0) or getattr(module, "attention_head_size", 0))
    causal = bool(module.is_causal) or bool(getattr(module, "is_decoder", False))
    return Form(graft, heads, size, size, causal, width)


def _fused(module: Any) -> Form | None:
    """Return the form of an attention with ``qkv`` and ``proj``, where it answers as such a one does."""
    children = dict(module.named_children())
    if not {"qkv", "proj"} <= children.keys():
        return None
    others = [child for name, child in children.items() if name not in ("qkv", "proj")]
    if not all(isinstance(child, nn.Identity | nn.Dropout) for child in others):
        return None
    qkv, proj, heads = children["qkv"], children["proj"], getattr(module, "num_heads", getattr(module, "heads", None))
    if not (isinstance(qkv, nn.Linear) and isinstance(proj, nn.Linear) and isinstance(heads, int) and heads > 0):
        return None
    width = qkv.in_features
    if qkv.out_features != 3 * width or proj.in_features != width or width % heads:
        return None
    form = Form(FusedGraft, heads, width // heads, width // heads, False, width)
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(1, 5, width, generator=draw).to(qkv.weight)
    q, k, v = (split_heads(part, heads) for part in qkv(x).chunk(3, dim=-1))
    expected = proj(merge_heads(softmax_attention(Heads(q, k, v, q, k, form.key_size**-0.5), causal=False)))
    try:
        with torch.no_grad():
            found = module(x)
    except Exception:
        return None
    same = isinstance(found, Tensor) and found.shape == expected.shape
    return form if same and torch.allclose(found, expected, rtol=1e-3, atol=1e-4) else None


def projections(graft: nn.Module) -> list[nn.Module]:
    """Return the projections to queries, keys and values of a linear attention, fused or not."""
    names = ("qkv", "query", "key", "value", "q_proj", "k_proj", "v_proj", "c_attn")
    return [child for name, child in graft.named_children() if name in names]
