"""Train with layer norm, end with a batch norm that folds away; and a linear attention that needs nothing but ReLU.

`SLAB: Efficient Transformers with Simplified Linear Attention and Progressive Re-parameterized Batch Normalization
<https://arxiv.org/abs/2405.11582>`_ (Guo et al., 2024): y = lam_t LN(x) + (1 - lam_t) RepBN(x) with
RepBN(x) = BN(x) + eta x and lam_t = max(0, 1 - t / T);
o_i = relu(q_i) sum_j relu(k_j)^T v_j / (relu(q_i) . sum_j relu(k_j)) + DWC(v)_i.

Departures: steps are counted by the layer itself, one a training pass. Batch statistics are over all tokens, so in a
causal model they see later tokens; use it in encoders. Evaluation uses RepBN from the first step on, so validation
looks bad until lam is small.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft.catalogue import Card
from torchgraft.catalogue.card import Claim
from torchgraft.engines.normalize import native
from torchgraft.engines.normalize.fold import fold_affine
from torchgraft.engines.normalize.norm import Norm, RunningNorm
from torchgraft.engines.normalize.placement import leave_fast_path
from torchgraft.engines.normalize.statistics import wide
from torchgraft.engines.recurrence.heads import head_size, merge_heads, split_heads
from torchgraft.engines.recurrence.mixer import Mixer
from torchgraft.engines.surgery.swap import swap
from torchgraft.errors import BadInput

__all__ = [
    "CARD",
    "PRepBN",
    "RepBN",
    "SimplifiedLinearAttention",
    "convert_ln",
    "from_layer_norm",
    "relu_attention",
]

CARD = Card(
    key="slab-prepbn",
    title="SLAB: PRepBN and simplified linear attention",
    seed_id=157,
    authors="Guo, Chen, Tang and Wang, 2024",
    reference="https://arxiv.org/abs/2405.11582",
    family="parts/norms",
    kind="part",
    engine=("normalize", "attention"),
    equation="y = lam_t LN(x) + (1 - lam_t) (BN(x) + eta x),  lam_t = max(0, 1 - t / T)",
    entry="PRepBN",
    capabilities=frozenset({"foldable"}),
    declared={"parameters": "4*d_model + 1", "replaces": "LayerNorm"},
    example={"d_model": 16, "steps": 4},
    shapes=((3, 5, 16),),
    oracles=(
        "at step 0 training gives layer norm, from step T on RepBN, and evaluation always RepBN, exactly",
        "RepBN and its gradients, in training and evaluation, equal BatchNorm1d(x) + eta x",
        "RepBN folded into the linear layer behind it gives the same outputs, 1e-12 in float64",
        "both orders of the attention's products agree, and rows without DWC are convex combinations of v",
    ),
    claim=Claim(
        text="A vision transformer on digits (16 patches, width 64, 4 blocks): layer norm, batch norm in its place, "
        "RepBN and PRepBN, then folded; and softmax against simplified linear attention.",
        figure="PRepBN's accuracy at most 0.7 points below layer norm's and at least batch norm's; the folded model "
        "predicts the same; latency of the folded model at most layer norm's (batch 64, median of 50)",
    ),
    choose_when="an encoder for images shall have no norms left at inference",
    choose_instead="layer-norm in causal models and for small batches, where batch statistics leak or are poor",
    expected_failures={
        "every-parameter-gets-a-gradient": "at step 0 the batch norm counts for nothing, that is what progressive means"
    },
    bibtex="@inproceedings{guo2024slab, title={{SLAB}: Efficient Transformers with Simplified Linear Attention and "
    "Progressive Re-parameterized Batch Normalization}, author={Guo, Jialong and Chen, Xinghao and Tang, Yehui and "
    "Wang, Yunhe}, booktitle={ICML}, year={2024}}",
)


class _Shortcut(torch.autograd.Function):
    """BN(x) + eta x of rows (N, C) by the batch's statistics; eta's gradient comes out of those of gain and offset."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gain: Tensor, offset: Tensor, eta: Tensor, mean: Tensor, var: Tensor, eps: float
    ) -> Tensor:
        deviation = torch.sqrt(var + eps)
        ctx.save_for_backward(x, gain, eta, mean, deviation)
        ctx.eps = eps
        factor = gain / deviation + eta
        return torch.addcmul(offset - mean * gain / deviation, x, factor)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, gain, eta, mean, deviation = ctx.saved_tensors
        (grad,) = grads
        dx, to_gain, to_offset = torch.ops.aten.native_batch_norm_backward(
            grad.contiguous(), x, gain, None, None, mean, 1.0 / deviation, True, ctx.eps, [True, True, True]
        )
        to_eta = (to_gain * deviation + to_offset * mean).sum()  # sum of grad * x, from what is known of it
        return dx.addcmul_(grad, eta), to_gain, to_offset, to_eta, None, None, None


class _Blend(torch.autograd.Function):
    """lam LN(x) + (1 - lam)(BN(x) + eta x) of rows (N, C) in four compiled passes, with the batch's moments, (C,)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        gain: Tensor,
        offset: Tensor,
        eta: Tensor,
        eps: tuple[float, float],
        lam: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        token = None if weight is None or bias is None else (weight, bias)
        y, tokens, columns = native.blend_forward(x, token, (gain, offset, eta), lam=lam, eps=eps)
        ctx.save_for_backward(x, weight, gain, eta, *tokens, *columns)
        ctx.lam, ctx.eps = lam, eps[1]
        ctx.mark_non_differentiable(*columns)
        return y, *columns

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, gain, eta, *moments = ctx.saved_tensors
        tokens, columns = (moments[0], moments[1]), (moments[2], moments[3])
        given = (grads[0].contiguous(), x, weight, gain, eta, tokens, columns)
        return *native.blend_backward(*given, lam=ctx.lam, eps=ctx.eps), None, None


class RepBN(RunningNorm):
    """BN(x) + eta x over batch and tokens, a channel each.

    Args:
        d_model: the width D.
        momentum: share of a new batch in the running statistics.
        eps: added to variances.

    Shapes:
        (B, T, D) or (N, D) -> the same

    Example:
        >>> norm, layer = RepBN(4).eval(), nn.Linear(4, 2)
        >>> x = torch.randn(3, 5, 4)
        >>> expected = layer(norm(x))
        >>> torch.allclose(norm.fold_into(layer)(x), expected, atol=1e-6)
        True
    """

    def __init__(self, d_model: int, *, momentum: float = 0.1, eps: float = 1e-5) -> None:
        super().__init__(d_model, momentum=momentum, eps=eps, ndim=(2, 3))
        self.eta = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise and add."""
        self.checked(x)
        if not self.training:
            scale, shift = self.channel_affine()
            return torch.addcmul(shift.to(wide(x).dtype), wide(x), scale.to(wide(x).dtype)).to(x.dtype)
        if x.numel() == 0 or torch.compiler.is_compiling():
            return self.standardized(x) + self.eta.to(x.dtype) * x
        flat = wide(x).reshape(-1, self.channels).contiguous()
        if len(flat) < 2:
            raise BadInput(f"batch statistics need more than one value a channel, got an input of {tuple(x.shape)}")
        gain, offset = cast(Tensor, self.weight).to(flat.dtype), cast(Tensor, self.bias).to(flat.dtype)
        if native.usable(flat.detach(), *self.parameters()):
            return self.blended(flat).view(x.shape).to(x.dtype)
        mean, var = torch.batch_norm_update_stats(flat.detach(), None, None, 0.0)
        self.note(mean, var, len(flat))
        y: Tensor = _Shortcut.apply(flat, gain, offset, self.eta.to(flat.dtype), mean, var, self.eps)  # type: ignore[no-untyped-call]
        return y.view(x.shape).to(x.dtype)

    def blended(self, flat: Tensor, token: nn.Module | None = None, *, lam: float = 0.0) -> Tensor:
        """Return lam LN(x) + (1 - lam)(BN(x) + eta x) of rows (N, C) by the compiled passes; ``token`` is the LN."""
        weight, bias, eps = (None, None, self.eps) if token is None else (token.weight, token.bias, token.eps)
        given = (flat, weight, bias, self.weight, self.bias, self.eta, (eps, self.eps), lam)
        y, mean, var = _Blend.apply(*given)  # type: ignore[no-untyped-call]
        self.note(mean, var, len(flat))
        return cast(Tensor, y)

    @torch.no_grad()
    def note(self, mean: Tensor, var: Tensor, count: int) -> None:
        """Move the running statistics towards mean and biased variance of ``count`` values a channel."""
        self.num_batches_tracked.add_(1)
        share = cast(float, self.momentum)
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
        self.running_var.lerp_((var * (count / (count - 1))).to(self.running_var.dtype), share)

    def channel_affine(self) -> tuple[Tensor, Tensor]:
        """Return a and c, (C,) each, of y = a x + c in eval mode."""
        plain = cast(Tensor, self.weight) * torch.rsqrt(self.running_var + self.eps)
        return plain + self.eta, cast(Tensor, self.bias) - plain * self.running_mean

    def fold_into(self, linear: nn.Linear) -> nn.Linear:
        """Let ``linear``, which reads this norm, do its work of eval mode too, in place; return it.

        Raises:
            BadInput: the layer reads another width.
        """
        return cast(nn.Linear, fold_affine(linear, *(value.detach() for value in self.channel_affine())))


class PRepBN(Norm):
    """From layer norm to :class:`RepBN` over ``steps`` training passes.

    Args:
        d_model: the width D.
        steps: T, about the number of training steps.
        momentum: share of a new batch in the running statistics.
        eps: added to variances.

    Attributes:
        step: training passes so far.

    Shapes:
        (B, T, D) -> (B, T, D)

    Example:
        >>> norm = PRepBN(4, steps=10)
        >>> x = torch.randn(2, 3, 4)
        >>> torch.equal(norm(x), nn.functional.layer_norm(x, (4,))), norm.lam
        (True, 0.9)

    Raises:
        BadInput: a setting is out of range.
    """

    step: Tensor

    def __init__(self, d_model: int, *, steps: int = 1000, momentum: float = 0.1, eps: float = 1e-5) -> None:
        super().__init__(d_model, eps=eps, ndim=(3,))
        if steps < 0:
            raise BadInput(f"steps must be at least 0, got {steps}")
        self.d_model, self.steps = d_model, steps
        self.rep = RepBN(d_model, momentum=momentum, eps=eps)
        self.register_buffer("step", torch.tensor(0, dtype=torch.long))

    @property
    def lam(self) -> float:
        """The share of layer norm in the next training pass."""
        return max(0.0, 1.0 - int(self.step) / self.steps) if self.steps else 0.0

    def forward(self, x: Tensor) -> Tensor:
        """Normalise; in training one step further."""
        self.checked(x)
        if not self.training:
            return cast(Tensor, self.rep(x))
        lam = self.lam
        if x.numel():
            self.step.add_(1)
        both = 0.0 < lam < 1.0 and x.numel() > self.d_model
        if both and native.usable(x.detach(), *self.parameters()):
            return self.rep.blended(x.reshape(-1, self.d_model).contiguous(), self, lam=lam).view(x.shape)
        rep: Tensor = self.rep(x)  # also where it counts for nothing: its statistics must be ripe when it does
        if lam == 0.0:
            return rep
        token = F.layer_norm(x, (self.d_model,), self.weight, self.bias, self.eps)
        return lam * token + (1.0 - lam) * rep

    def folded(self) -> nn.Module:
        """Return what evaluation uses."""
        return self.rep

    def fold_into(self, linear: nn.Linear) -> nn.Linear:
        """Let ``linear``, which reads this norm, do its work of eval mode too, in place; return it."""
        return self.rep.fold_into(linear)


def from_layer_norm(old: nn.Module, *, steps: int, momentum: float = 0.1) -> PRepBN:
    """Return a :class:`PRepBN` with gain and shift of a layer norm over one axis, in its mode, dtype and place.

    Args:
        old: the layer norm.
        steps: T, about the number of training steps.
        momentum: share of a new batch in the running statistics.

    Raises:
        BadInput: it is no layer norm over one axis.
    """
    if not isinstance(old, nn.LayerNorm) or len(old.normalized_shape) != 1:
        raise BadInput(f"a layer norm over one axis is expected, got {old}")
    new = PRepBN(old.normalized_shape[0], steps=steps, momentum=momentum, eps=old.eps).train(old.training)
    new.ndim = (2, 3)  # a model's last norm is often on one token a sample
    anchor = next(old.parameters(), None)
    if anchor is not None:
        new.to(anchor.device, anchor.dtype)
    with torch.no_grad():
        for name, value in old.named_parameters(recurse=False):
            new.get_parameter(name).copy_(value)
            new.rep.get_parameter(name).copy_(value)
    return new


def convert_ln(model: nn.Module, *, steps: int, momentum: float = 0.1) -> nn.Module:
    """Replace every layer norm over one axis by a :class:`PRepBN` with its gain and shift, in place; return the model.

    Args:
        model: holds layer norms on (B, T, D).
        steps: T, about the number of training steps.
        momentum: share of a new batch in the running statistics.

    Example:
        >>> convert_ln(nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8)), steps=10)[1].lam
        1.0

    Raises:
        BadInput: there is none.
    """

    def build(old: nn.Module, _: str) -> nn.Module:
        return from_layer_norm(old, steps=steps, momentum=momentum)

    for block in model.modules():
        leave_fast_path(block)
    swap(model, lambda _, old: isinstance(old, nn.LayerNorm) and len(old.normalized_shape) == 1, build)
    return model


def relu_attention(q: Tensor, k: Tensor, v: Tensor, *, tokens_first: bool | None = None) -> Tensor:
    """Return relu(q_i) sum_j relu(k_j)^T v_j over relu(q_i) . sum_j relu(k_j), (B, T, H, V).

    Args:
        q, k: queries and keys, (B, T, H, K).
        v: values, (B, T, H, V).
        tokens_first: whether (T, T) is made first; by default whatever is cheaper.
    """
    q, k, wide_v = F.relu(wide(q)), F.relu(wide(k)), wide(v)
    below = torch.einsum("bthk,bhk->bth", q, k.sum(1)) + 1e-6
    if tokens_first if tokens_first is not None else q.shape[1] < q.shape[3]:
        mixed = torch.einsum("btsh,bshv->bthv", torch.einsum("bthk,bshk->btsh", q, k), wide_v)
    else:
        mixed = torch.einsum("bthk,bhkv->bthv", q, torch.einsum("bshk,bshv->bhkv", k, wide_v))
    return (mixed / below[..., None]).to(v.dtype)


class SimplifiedLinearAttention(Mixer):
    """Linear attention with ReLU as its kernel, and a depthwise convolution of the values on the token grid.

    Args:
        d_model: the width D.
        num_heads: H.
        dwc: edge of the convolution's kernel, odd; it is shared by the heads.
        grid: rows and columns of tokens.

    Shapes:
        (B, T, D) -> (B, T, D), T tokens row by row

    Example:
        >>> SimplifiedLinearAttention(8, num_heads=2, grid=(2, 3))(torch.randn(1, 6, 8)).shape
        torch.Size([1, 6, 8])

    Raises:
        BadInput: a setting is out of range.
    """

    causal = False

    def __init__(self, d_model: int, *, num_heads: int = 8, dwc: int = 5, grid: tuple[int, int] = (4, 4)) -> None:
        super().__init__(d_model)
        size = head_size(d_model, num_heads)
        if dwc < 1 or dwc % 2 == 0:
            raise BadInput(f"dwc must be odd and at least 1, got {dwc}")
        if min(grid) < 1:
            raise BadInput(f"grid must be rows and columns of at least 1, got {grid}")
        self.num_heads, self.grid = num_heads, grid
        self.query, self.key, self.value, self.out = (nn.Linear(d_model, d_model, bias=False) for _ in range(4))
        self.position = nn.Parameter(torch.zeros(grid[0] * grid[1], d_model))
        self.dwc = nn.Conv2d(size, size, dwc, padding=dwc // 2, groups=size)

    def forward(self, x: Tensor) -> Tensor:
        """Mix ``x``, (B, T, D) -> (B, T, D)."""
        self.checked(x)
        if x.shape[1] != len(self.position):
            raise BadInput(f"x must have {len(self.position)} tokens, those of the grid {self.grid}, got {x.shape[1]}")
        q, k, v = self.query(x), self.key(x) + self.position, self.value(x)
        q, k, v = (split_heads(each, self.num_heads) for each in (q, k, v))  # (B, T, H, K)
        images = torch.unflatten(v.permute(0, 2, 3, 1).flatten(0, 1), 2, self.grid)  # (B H, V, h, w)
        near = torch.unflatten(self.dwc(images).flatten(2), 0, (len(x), self.num_heads)).permute(0, 3, 1, 2)
        y: Tensor = self.out(merge_heads(relu_attention(q, k, v) + near))
        return y
