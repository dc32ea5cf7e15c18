"""Attention weights that one layer computes and the layers after it take over, in models that exist.

    A = softmax(Q_l K_l^T / sqrt(K)) of the leader l,   y_f = A (X_f W_V,f) W_O,f  of each follower f

A follower has neither queries nor keys, and in a cache it keeps values only. Masks, padding and rotary phases are those
of the leader. Whatever attention :mod:`torchgraft.engines.linearize` knows can lead or follow.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from torchgraft.engines.attention.mixer import AttentionMixer
from torchgraft.engines.linearize.graft import form_of
from torchgraft.engines.linearize.kernel import Heads, Kernel
from torchgraft.engines.recurrence.heads import merge_heads, split_heads
from torchgraft.engines.recurrence.mixer import State, StatefulMixer
from torchgraft.engines.sites import ignored
from torchgraft.engines.surgery.edits import Edit
from torchgraft.engines.surgery.swap import replace_module
from torchgraft.errors import BadInput

__all__ = ["FollowerMixer", "LeaderMixer", "ShareAttention", "Slot", "shareable"]


class Slot:
    """What a leader leaves for its followers in one pass: its weights, let go when the last of them has read.

    Args:
        readers: how many followers there are.
    """

    def __init__(self, readers: int) -> None:
        self.readers = readers
        self._weights: Tensor | None = None
        self._left = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> Slot:
        """Return an empty slot, the same one for a leader and the followers that are copied with it."""
        made = Slot(self.readers)
        memo[id(self)] = made
        return made

    def __getstate__(self) -> dict[str, Any]:
        return {"readers": self.readers, "_weights": None, "_left": 0}

    def put(self, weights: Tensor) -> None:
        """Leave ``weights``, (B, H, T, S)."""
        self._weights, self._left = weights, self.readers

    def take(self) -> Tensor:
        """Return the weights that were left.

        Raises:
            BadInput: the leader has not run in this pass.
        """
        weights = self._weights
        if weights is None:
            raise BadInput("a layer with shared attention runs after its leader, once a pass; its leader has not run")
        self._left -= 1
        if self._left <= 0:
            self._weights = None
        return weights


def _mixed(weights: Tensor, v: Tensor) -> Tensor:
    """Return (B, H, T, S) times (B, S, H, V) as (B, T, H, V)."""
    return (weights.to(v.dtype) @ v.transpose(1, 2)).transpose(1, 2)


def _weights(q: Tensor, k: Tensor, scale: float, hidden: Tensor | None) -> Tensor:
    """Return softmax weights (B, H, T, S), in float32 at least, of (B, T, H, K) and (B, S, H, K).

    Args:
        q: queries.
        k: keys.
        scale: factor on the products.
        hidden: True where a key may not be seen, broadcast to (B, H, T, S).
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = (q.to(wide) * scale).transpose(1, 2) @ k.to(wide).permute(0, 2, 3, 1)
    if hidden is not None:
        low = torch.finfo(wide).min
        scores = scores.masked_fill(hidden, low) if torch.is_grad_enabled() else scores.masked_fill_(hidden, low)
    return scores.softmax(-1)


class _Kernel(Kernel):
    """What stands between the projections of a leader or follower in a model that somebody else wrote."""

    slot: Slot

    def __init__(self, slot: Slot, *, leads: bool, num_heads: int, key_size: int, value_size: int) -> None:
        super().__init__(num_heads=num_heads, key_size=key_size, value_size=value_size)
        self.slot, self.leads = slot, leads

    def run(self, heads: Heads, causal: bool) -> Tensor:
        """Return the mixed values, (B, T, H, V)."""
        if not self.leads:
            return _mixed(self.slot.take(), heads.v)
        tokens = heads.q.shape[1]
        hidden = None if heads.seen is None else ~heads.seen[:, None, None, :]
        if causal:
            later = torch.ones(tokens, tokens, dtype=torch.bool, device=heads.q.device).triu(1)
            hidden = later if hidden is None else hidden | later
        weights = _weights(heads.q, heads.k, heads.scale, hidden)
        self.slot.put(weights)
        return _mixed(weights, heads.v)

    def init_state(self, batch_size: int, like: Tensor) -> State:
        """Refuse."""
        raise BadInput("shared attention in a model of another library keeps no state")

    def advance(self, heads: Heads, state: State) -> tuple[Tensor, State]:
        """Refuse."""
        raise BadInput("shared attention in a model of another library keeps no state")

    def extra_repr(self) -> str:
        """Say which part it plays."""
        return "leads" if self.leads else "follows"


class _Absent(nn.Module):
    """A projection that is gone: as many zeros as it gave, which take no memory."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.features = features

    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(()).expand(*x.shape[:-1], self.features)


class _ValuesOnly(nn.Module):
    """A fused projection of which only the values are left."""

    def __init__(self, weight: Tensor, bias: Tensor | None, *, transposed: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach().clone())
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())
        self.transposed = transposed

    def forward(self, x: Tensor) -> Tensor:
        v = nn.functional.linear(x, self.weight.T if self.transposed else self.weight, self.bias)
        nothing = v.new_zeros(()).expand_as(v)
        return torch.cat([nothing, nothing, v], dim=-1)


_SEPARATE = (("query", "key"), ("q_proj", "k_proj"))
_FUSED = ("qkv", "c_attn")


def _without_queries(graft: nn.Module) -> None:
    """Take the projections to queries and keys out of ``graft``."""
    children = dict(graft.named_children())
    for names in _SEPARATE:
        if children.keys() >= set(names):
            for name in names:
                old: Any = children[name]
                features = old.weight.shape[0]
                setattr(graft, name, _Absent(features))
            return
    for name in _FUSED:
        if name in children:
            fused: Any = children[name]
            transposed = type(fused).__name__ == "Conv1D"
            size = fused.weight.shape[1 if transposed else 0] // 3
            weight = fused.weight[:, 2 * size :] if transposed else fused.weight[2 * size :]
            made = _ValuesOnly(weight, None if fused.bias is None else fused.bias[2 * size :], transposed=transposed)
            made.weight.requires_grad_(fused.weight.requires_grad)
            setattr(graft, name, made)
            return
    raise BadInput(f"{type(graft).__name__} has no projections that are known")


class LeaderMixer(AttentionMixer):
    """Softmax attention whose weights others take over.

    Args:
        old: the attention that it stands for; its projections are taken over, not copied.
        slot: where the weights are left.
    """

    def __init__(self, old: AttentionMixer, slot: Slot) -> None:
        options: dict[str, Any] = {"rotary": old.rotary, "causal": old.causal}
        super().__init__(old.d_model, num_heads=old.num_heads, num_kv_heads=old.num_kv_heads, **options)
        self.qkv, self.out, self.slot = old.qkv, old.out, slot
        self.train(old.training)

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return what softmax weights mix, and leave the weights."""
        repeat = q.shape[2] // k.shape[2]
        k, v = (x.repeat_interleave(repeat, dim=2) if repeat > 1 else x for x in (k, v))
        hidden = None
        if self.causal:  # the queries are the last of the tokens
            hidden = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool, device=q.device)
            hidden = hidden.triu(1 + k.shape[1] - q.shape[1])
        weights = _weights(q, k, 1.0 / math.sqrt(self.key_size), hidden)
        self.slot.put(weights)
        return _mixed(weights, v)


class FollowerMixer(StatefulMixer):
    """Mixes its values by the weights of its leader; its state holds values only.

    Args:
        old: the attention that it stands for; its output projection is taken over, and of the fused projection a copy
            of the rows of the values.
        slot: where the leader leaves its weights.
    """

    causal: bool  # type: ignore[misc]  # a choice of the instance here

    def __init__(self, old: AttentionMixer, slot: Slot) -> None:
        super().__init__(old.d_model)
        self.num_heads, self.num_kv_heads, self.key_size = old.num_heads, old.num_kv_heads, old.key_size
        self.causal, self.slot, self.out = old.causal, slot, old.out
        size = old.num_kv_heads * old.key_size
        self.value = nn.Linear(old.d_model, size, bias=old.qkv.bias is not None).to(old.qkv.weight)
        self.value.requires_grad_(old.qkv.weight.requires_grad)
        with torch.no_grad():
            self.value.weight.copy_(old.qkv.weight[-size:])
            if old.qkv.bias is not None:
                self.value.bias.copy_(old.qkv.bias[-size:])
        self.train(old.training)

    def init_state(self, batch_size: int) -> State:
        """Return a cache of no values."""
        return {"v": self.out.weight.new_zeros(batch_size, 0, self.num_kv_heads, self.key_size)}

    def prefill(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Mix the values of ``x``, (B, T, D), and of what is cached by the leader's weights of the same pass."""
        v = split_heads(self.value(self.checked(x)), self.num_kv_heads)
        if state is not None:
            v = torch.cat([state["v"].to(v.dtype), v], dim=1)
        repeat = self.num_heads // self.num_kv_heads
        all_v = v.repeat_interleave(repeat, dim=2) if repeat > 1 else v
        y: Tensor = self.out(merge_heads(_mixed(self.slot.take(), all_v)))
        return y, {"v": v}

    def extra_repr(self) -> str:
        """Return the settings."""
        return f"d_model={self.d_model}, num_heads={self.num_heads}, follows"


def _shares(module: nn.Module) -> bool:
    if isinstance(module, AttentionMixer):
        return module.softmax
    form = form_of(module)
    return form is not None and form.graft is not None


def shareable(model: nn.Module, *, ignore: Sequence[str] = ()) -> list[str]:
    """Return the attentions of ``model`` that can lead or follow, by dotted name, in the order of the model.

    Example:
        >>> from torchgraft.bench.models import Attention
        >>> shareable(nn.Sequential(Attention(8, 2), nn.Linear(8, 8), Attention(8, 2)), ignore=["0"])
        ['2']
    """
    found: list[str] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if name and not inside and not ignored(name, ignore) and _shares(module):
            found.append(name)
    return found


class ShareAttention(Edit):
    """Let the attentions of a group use the weights of the group's first.

    Args:
        groups: dotted names of attentions, in the order in which they run; the first of each leads.
    """

    op: ClassVar[str] = "share-attention"
    groups: tuple[tuple[str, ...], ...]

    def rewrite(self, model: nn.Module) -> nn.Module:
        """Replace them; a group of one is left as it is."""
        for group in self.groups:
            if len(group) < 2:
                continue
            slot = Slot(len(group) - 1)
            for place, name in enumerate(group):
                old = dict(model.named_modules(remove_duplicate=False)).get(name)
                if old is None or not _shares(old):
                    raise BadInput(f"{name!r} is no softmax attention, which this edit was made for")
                form = form_of(old)
                if isinstance(old, AttentionMixer):
                    new: nn.Module = LeaderMixer(old, slot) if place == 0 else FollowerMixer(old, slot)
                elif form is not None and form.graft is not None:
                    sizes = {"num_heads": form.num_heads, "key_size": form.key_size, "value_size": form.value_size}
                    new = form.graft(old, _Kernel(slot, leads=place == 0, **sizes))
                    if place:
                        _without_queries(new)
                    new.train(old.training)
                else:
                    raise BadInput(f"{name!r} is a {type(old).__name__}, whose attention cannot be shared")
                replace_module(model, name, new)
        for module in model.modules():
            settings = getattr(module, "config", None)
            if settings is not None and hasattr(settings, "use_cache"):
                settings.use_cache = False  # the cache of transformers holds the keys of every layer
            if getattr(module, "mixer_key", None) is not None and hasattr(module, "mixers"):
                owner: Any = module
                if any(isinstance(mixer, LeaderMixer) for mixer in owner.mixers()):
                    owner.mixer_key, owner.mixer_options = None, {}
        return model

    def describe(self) -> dict[str, str]:
        """Return which layer takes its weights from which."""
        words: dict[str, str] = {}
        for group in self.groups:
            if len(group) > 1:
                words[group[0]] = f"leads the attention of {len(group) - 1} more"
                words |= dict.fromkeys(group[1:], f"attention weights of {group[0]}")
        return words
