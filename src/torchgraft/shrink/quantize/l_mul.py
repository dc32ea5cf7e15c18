"""Emulate products of floats that are made by one integer addition, and measure what that costs a model.

`Addition is All You Need for Energy-efficient Language Models <https://arxiv.org/abs/2410.00907>`_ (Luo and Sun, 2024).

    x = (1 + u) 2^i, y = (1 + v) 2^j:  L(x, y) = (1 + u + v + c) 2^(i + j), c = 2^-l(k)

in place of (1 + u + v + uv) 2^(i + j), with k bits of mantissa and l(k) = k up to 3, 3 at 4, 4 above. This is an
emulation: it runs slower than the products that it stands for, and says what hardware with such an adder would
compute, not how fast; for that reason it is no lever of ``fit``, whose costs would all stay or rise.

Two modes differ in what a full mantissa does, s = u + v + c >= 1: ``formula`` is the equation; ``integer`` adds the bit
fields, as the paper's code does, and the carry makes 2s of 1 + s.

Departures: the case s >= 2 and the error law of the integer mode are derived here; sums are exact, softmax too.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from torchgraft.catalogue import Card
from torchgraft.catalogue.card import Claim
from torchgraft.engines.quantize.additive import (
    Mode,
    check_settings,
    error_expectation,
    l_mul,
    l_mul_matmul,
    offset,
    round_mantissa,
)
from torchgraft.errors import BadInput

__all__ = [
    "CARD",
    "LMulAttention",
    "LMulLinear",
    "error_expectation",
    "l_mul",
    "l_mul_attention",
    "l_mul_matmul",
    "offset",
    "replace_multiplications",
    "round_mantissa",
]

CARD = Card(
    key="l-mul",
    title="L-Mul: products of floats by one integer addition",
    seed_id=268,
    authors="Luo and Sun, 2024",
    reference="https://arxiv.org/abs/2410.00907",
    family="shrink/quantize",
    kind="part",
    engine=("surgery",),
    equation="L((1 + u) 2^i, (1 + v) 2^j) = (1 + u + v + 2^-l(k)) 2^(i + j); l(k) = k, k <= 3; 3, k = 4; 4, k > 4",
    entry="LMulAttention",
    example={"d_model": 8, "num_heads": 2},
    shapes=((2, 5, 8),),
    declared={"parameters": "4 * d_model**2 + 4 * d_model"},
    oracles=(
        "the integer mode equals the formula bit for bit where the mantissas do not carry, 2s 2^e where they carry "
        "once and 4(s - 1) 2^e where twice, on 10^5 pairs",
        "L(x, 2^j) = (x + 2^(i-l)) 2^j exactly; sign, zero, infinity, commutativity, scaling of both factors by "
        "powers of two",
        "the mean signed error is 1/4 - c by the formula, less c + (1 - c)^3 / 6 + c^3 / 3 in integer mode, for "
        "uniform mantissas and for those of k bits",
        "a matrix product is the sum of elementwise products in both modes; gradients are those of the exact product",
        "where the mode stands around a model, every product of attention, and of linear layers where asked, is "
        "emulated",
    ),
    claim=Claim(
        text="digits transformer (2 blocks, width 64), 3 seeds: attention products by L-Mul (integer mode) with 4 and "
        "3 bits, beside products simulated in float8 (factors and product rounded to e4m3 and e5m2).",
        figure="accuracy drop of k = 4 <= 0.3 points; error of attention logits: k = 4 <= e4m3 and k = 3 <= e5m2 in "
        ">= 80 % of layers; bias-corrected error of a sum of products, relative to the sum of magnitudes, at 64 terms "
        "at most half of that at 4; measured mean error of 10^5 products within 2 % of a product of the law",
    ),
    choose_when="You ask what adders in place of multipliers would do to a model's accuracy, before any hardware "
    "exists.",
    choose_instead="int8-dynamic or nupes-power-quant: this is an emulation and makes nothing faster or smaller here.",
    expected_failures={
        "gradients-are-the-derivatives": "gradients are those of the exact product (straight through): the emulated "
        "one jumps at powers of two and is flat between the values of a short mantissa",
    },
    bibtex="@article{luo2024addition, title={Addition is All You Need for Energy-efficient Language Models}, "
    "author={Luo, Hongyin and Sun, Wei}, journal={arXiv preprint arXiv:2410.00907}, year={2024}}",
)


def l_mul_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    mantissa_bits: int | None = 4,
    mode: Mode = "formula",
) -> Tensor:
    """Return attention whose products Q K^T and A V are emulated; arguments as torch's own attention function.

    Shapes:
        query (..., T, K), key (..., S, K), value (..., S, V) -> (..., T, V)
    """
    logits = l_mul_matmul(query, key.mT, mantissa_bits, mode)
    logits = logits * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        seen = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).tril()
        logits = logits.masked_fill(~seen, -math.inf)
    if attn_mask is not None:
        logits = logits.masked_fill(~attn_mask, -math.inf) if attn_mask.dtype == torch.bool else logits + attn_mask
    weights = F.dropout(logits.softmax(-1), dropout_p) if dropout_p else logits.softmax(-1)
    return l_mul_matmul(weights, value, mantissa_bits, mode)


class LMulLinear(nn.Linear):
    """A linear layer whose products are emulated; the bias is added exactly.

    Args:
        in_features: size of the last axis.
        out_features: size of the result's; by default the same.
        bias: whether there is one.
        mantissa_bits: k, or ``None``.
        mode: ``"formula"`` or ``"integer"``.

    Shapes:
        (B, ..., in_features) -> (B, ..., out_features)

    Example:
        >>> LMulLinear(4, out_features=2)(torch.ones(3, 4)).shape
        torch.Size([3, 2])
    """

    def __init__(
        self,
        in_features: int,
        *,
        out_features: int | None = None,
        bias: bool = True,
        mantissa_bits: int | None = 4,
        mode: Mode = "formula",
    ) -> None:
        check_settings(mantissa_bits, mode)
        out_features = in_features if out_features is None else out_features
        if in_features < 1 or out_features < 1:
            raise BadInput(f"a linear layer needs at least one feature, got {in_features} and {out_features}")
        super().__init__(in_features, out_features, bias)
        self.mantissa_bits, self.mode = mantissa_bits, mode

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, mantissa_bits: int | None = 4, mode: Mode = "formula") -> LMulLinear:
        """Return the layer with the parameters of ``linear``."""
        made = cls(
            linear.in_features,
            out_features=linear.out_features,
            bias=linear.bias is not None,
            mantissa_bits=mantissa_bits,
            mode=mode,
        )
        made.weight, made.bias = linear.weight, linear.bias
        return made.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        """Return the output; see the class."""
        if x.ndim < 1 or x.shape[-1] != self.in_features:
            raise BadInput(f"input must be (..., {self.in_features}), got {tuple(x.shape)}")
        return _linear(x, self.weight, self.bias, mantissa_bits=self.mantissa_bits, mode=self.mode)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, mantissa_bits: int | None, mode: Mode) -> Tensor:
    out = l_mul_matmul(x.reshape(-1, x.shape[-1]), weight.T, mantissa_bits, mode)
    out = out.reshape(*x.shape[:-1], len(weight))
    return out if bias is None else out + bias


class LMulAttention(nn.Module):
    """Multi-head self-attention whose products of queries, keys and values are emulated; projections are exact.

    Args:
        d_model: width.
        num_heads: heads; must divide it.
        causal: whether a token sees only itself and those before.
        mantissa_bits: k, or ``None``.
        mode: ``"formula"`` or ``"integer"``.

    Shapes:
        (B, T, D) -> (B, T, D)

    Example:
        >>> LMulAttention(8, num_heads=2)(torch.ones(1, 3, 8)).shape
        torch.Size([1, 3, 8])
    """

    def __init__(
        self,
        d_model: int,
        *,
        num_heads: int = 1,
        causal: bool = False,
        mantissa_bits: int | None = 4,
        mode: Mode = "formula",
    ) -> None:
        super().__init__()
        check_settings(mantissa_bits, mode)
        if d_model < 1 or num_heads < 1 or d_model % num_heads:
            raise BadInput(f"num_heads must divide d_model, got {num_heads} and {d_model}")
        self.num_heads, self.causal, self.mantissa_bits, self.mode = num_heads, causal, mantissa_bits, mode
        self.qkv = nn.Linear(d_model, 3 * d_model)
        self.out = nn.Linear(d_model, d_model)

    def forward(self, x: Tensor) -> Tensor:
        """Mix tokens."""
        if x.ndim != 3 or x.shape[-1] != self.out.in_features:
            raise BadInput(f"input must be (B, T, {self.out.in_features}), got {tuple(x.shape)}")
        if not x.is_floating_point():
            raise BadInput(f"LMulAttention takes floating-point input, got {x.dtype}")
        split = torch.unflatten(self.qkv(x), -1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k, v = split.unbind(0)  # each (B, H, T, K)
        mixed = l_mul_attention(q, k, v, is_causal=self.causal, mantissa_bits=self.mantissa_bits, mode=self.mode)
        y: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return y


class _Emulation(TorchFunctionMode):
    """While it stands, products of attention (and of linear layers) are emulated."""

    def __init__(self, where: str, mantissa_bits: int | None, mode: Mode) -> None:
        super().__init__()
        self.where = where
        self.settings: dict[str, Any] = {"mantissa_bits": mantissa_bits, "mode": mode}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        if func is F.scaled_dot_product_attention:
            if given.get("enable_gqa"):
                raise BadInput("L-Mul attention needs as many key heads as query heads; enable_gqa is not emulated")
            plain = {name: value for name, value in given.items() if name != "enable_gqa"}
            return l_mul_attention(*args, **{**plain, **self.settings})
        if func in (torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm):
            x, y = args[0], args[1] if len(args) > 1 else next(iter(given.values()))
            made = not any(isinstance(value, nn.Parameter) for value in (x, y))
            if min(x.ndim, y.ndim) >= 2 and (made or self.where == "all"):
                return l_mul_matmul(x, y, **self.settings)
        if func is F.linear and self.where == "all":
            return _linear(*args, **{**given, **self.settings})
        return func(*args, **given)


class _Emulated(nn.Module):
    def __init__(self, model: nn.Module, where: str, mantissa_bits: int | None, mode: Mode) -> None:
        super().__init__()
        self.model = model
        self.where, self.mantissa_bits, self.mode = where, mantissa_bits, mode

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with _Emulation(self.where, self.mantissa_bits, self.mode):
            return self.model(*args, **kwargs)


def replace_multiplications(
    model: nn.Module,
    where: Literal["attention", "all"] = "attention",
    mantissa: int | None = 4,
    *,
    mode: Mode = "integer",
) -> nn.Module:
    """Return a copy of ``model`` whose products are emulated, with gradients straight through.

    Args:
        model: calls torch's attention function, ``matmul`` or ``bmm`` itself; convolutions stay exact.
        where: ``"attention"`` for products of two activations, ``"all"`` for those of linear layers too.
        mantissa: k, or ``None``.
        mode: the paper implements ``"integer"``.

    Example:
        >>> from torchgraft.bench.models import Attention
        >>> replace_multiplications(Attention(8, 2))(torch.ones(1, 3, 8)).shape
        torch.Size([1, 3, 8])

    Raises:
        BadInput: a setting is out of range, or the model holds an ``nn.MultiheadAttention``, whose products are hidden.
    """
    check_settings(mantissa, mode)
    if where not in ("attention", "all"):
        raise BadInput(f"where must be 'attention' or 'all', got {where!r}")
    hidden = [name for name, module in model.named_modules() if isinstance(module, nn.MultiheadAttention)]
    if hidden:
        raise BadInput(f"the products inside nn.MultiheadAttention ({hidden[0] or 'the model'}) cannot be replaced")
    return _Emulated(copy.deepcopy(model), where, mantissa, mode).train(model.training)
