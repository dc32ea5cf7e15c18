"""A mixer of our own around a kernel: the projections of :class:`SoftmaxAttention`, so that its weights load."""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from torchgraft.engines.linearize.kernel import Heads, Kernel, Watch, wide
from torchgraft.engines.recurrence.distance import rotary
from torchgraft.engines.recurrence.heads import head_size, merge_heads, split_heads
from torchgraft.engines.recurrence.mixer import Mixer, State, StatefulMixer
from torchgraft.errors import BadInput

__all__ = ["KernelMixer", "StatefulKernelMixer"]


class KernelMixer(Mixer):
    """Projections of softmax attention around a kernel; a method adds :meth:`build_kernel` and its options.

    Args:
        d_model: the width D.
        num_heads: H; divides ``d_model``.
        rotary: whether queries and keys are turned by their position.
        options: what the kernel is built with.

    Attributes:
        watch: where set, called instead of the kernel; for training by what the kernel should do.
        tune: how a converted model is recovered: ``"all"`` its parameters, or ``"lora"`` on queries, keys and values.
        mimics: whether the kernel first learns to weigh as softmax does.
        distils: whether the recovery follows the softmax model too, not the task's targets alone.
    """

    watch: Watch | None = None
    tune: ClassVar[str] = "all"
    mimics: ClassVar[bool] = False
    distils: ClassVar[bool] = False

    def __init__(
        self, d_model: int, *, num_heads: int, rotary: bool = False, options: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(d_model)
        size = head_size(d_model, num_heads)
        if rotary and size % 2:
            raise BadInput(f"rotary needs an even head size, got d_model / num_heads = {size}")
        self.num_heads, self.rotary = num_heads, rotary
        self.qkv = nn.Linear(d_model, 3 * d_model, bias=False)
        self.out = nn.Linear(d_model, d_model, bias=False)
        self.kernel = self.build_kernel(num_heads=num_heads, key_size=size, value_size=size, options=options or {})

    @classmethod
    @abstractmethod
    def build_kernel(
        cls, *, num_heads: int, key_size: int, value_size: int, options: Mapping[str, Any], image: bool = False
    ) -> Kernel:
        """Return the method's kernel for H heads of K and V channels.

        Args:
            num_heads: H.
            key_size: K.
            value_size: V.
            options: the method's own.
            image: whether the tokens are patches of an image, all of which see each other.
        """

    @classmethod
    @abstractmethod
    def instead_of_softmax(
        cls, d_model: int, *, num_heads: int, rotary: bool, options: Mapping[str, Any]
    ) -> StatefulKernelMixer:
        """Return the mixer that stands for a causal softmax attention of our own."""

    def heads(self, x: Tensor, place: Tensor) -> Heads:
        """Return queries, keys and values of ``x``, (B, T, D), whose tokens stand at ``place``, (B, T)."""
        q, k, v = (split_heads(part, self.num_heads) for part in self.qkv(x).chunk(3, dim=-1))  # (B, T, H, K)
        turned_q, turned_k = (rotary(q, place), rotary(k, place)) if self.rotary else (q, k)
        return Heads(turned_q, turned_k, v, q, k, scale=q.shape[-1] ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Mix ``x``, (B, T, D) -> (B, T, D)."""
        heads = self.heads(self.checked(x), torch.arange(x.shape[1], device=x.device)[None])
        run = self.kernel.run if self.watch is None else functools.partial(self.watch, self.kernel)
        y: Tensor = self.out(merge_heads(run(heads, self.causal)).to(x.dtype))
        return y


class StatefulKernelMixer(KernelMixer, StatefulMixer):
    """A kernel mixer that is causal, or may be."""

    @classmethod
    def instead_of_softmax(
        cls, d_model: int, *, num_heads: int, rotary: bool, options: Mapping[str, Any]
    ) -> StatefulKernelMixer:
        """Return the mixer that stands for a causal softmax attention of our own."""
        return cls(d_model, num_heads=num_heads, rotary=rotary, **options)

    def init_state(self, batch_size: int) -> State:
        """Return the kernel's state before the first token, and the position where the mixer rotates."""
        anchor = self.out.weight
        state = self.kernel.init_state(batch_size, anchor)
        return {"position": wide(anchor).new_zeros(batch_size), **state} if self.rotary else state

    def prefill(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Mix ``x``, (B, T, D), after ``state``; return the output and the state after the last token.

        Raises:
            BadInput: the mixer is not causal.
        """
        self.checked(x)
        if not self.causal:
            raise BadInput(f"{type(self).__name__} with causal=False keeps no state; use the forward pass")
        state = self.init_state(len(x)) if state is None else state
        place = torch.arange(x.shape[1], device=x.device)[None]
        rest, after = dict(state), {}
        if self.rotary:
            position = rest.pop("position")
            if position.shape != (len(x),):
                raise BadInput(f"the state is of a batch of {len(position)}, x of one of {len(x)}")
            place, after = place + position[:, None], {"position": position + x.shape[1]}
        o, rest = self.kernel.advance(self.heads(x, place), rest)
        y: Tensor = self.out(merge_heads(o).to(x.dtype))
        return y, {**after, **rest}

    def forward(self, x: Tensor) -> Tensor:
        """Mix ``x``, (B, T, D) -> (B, T, D)."""
        if self.causal and self.watch is None:
            return self.prefill(x)[0]
        return KernelMixer.forward(self, x)
