"""L-Mul on a digits transformer: attention by additions of 3 and 4 mantissa bits beside simulated float8 products."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from torchgraft.bench.models import VisionTransformer
from torchgraft.claims.images import accuracy, digits, images_of, train_images
from torchgraft.claims.record import ClaimRecord, judge
from torchgraft.engines.quantize.additive import Mode
from torchgraft.shrink.quantize.l_mul import CARD, error_expectation, l_mul, l_mul_matmul, replace_multiplications

__all__ = ["run"]

_STEPS = 400
_PLACES: tuple[Literal["attention", "all"], ...] = ("attention", "all")
_MODES: tuple[Mode, ...] = ("formula", "integer")
_FLOAT8 = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


def _float8_matmul(x: Tensor, y: Tensor, kind: torch.dtype) -> Tensor:
    """Return the product whose factors and single products are rounded to float8 and whose sums are exact."""
    a, b = x.to(kind).float(), y.to(kind).float()
    return (a[..., None] * b[..., None, :, :]).to(kind).float().sum(-2)


class _Attention(TorchFunctionMode):
    """Hands queries, keys and values to a function that stands in for torch's attention."""

    def __init__(self, function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return self.function(*args[:3])
        return func(*args, **(kwargs or {}))


class _Under(nn.Module):
    def __init__(self, model: nn.Module, function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.model, self.function = model, function

    def forward(self, x: Tensor) -> Tensor:
        with _Attention(self.function):
            out: Tensor = self.model(x)
        return out


def _gap(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


def _sum_error(terms: int, seed: int) -> float:
    """Return the spread of the error of a sum of products over the sum of magnitudes, its mean taken off."""
    x, y = torch.randn(2, 20_000, terms, generator=torch.Generator().manual_seed(seed))
    error = (l_mul(x, y, 4, "integer") - x * y).sum(1) / (x * y).abs().sum(1)
    # the same of magnitudes is the bias, which a factor would take off
    bias = (l_mul(x.abs(), y.abs(), 4, "integer") - (x * y).abs()).sum(1).mean() / (x * y).abs().sum(1).mean()
    corrected = error - bias * (x * y).sum(1) / (x * y).abs().sum(1)
    return float(corrected.square().mean().sqrt())


def measure(seed: int) -> dict[str, float]:
    """Return what is measured with one seed, by name."""
    found: dict[str, float] = {}

    def note(name: str, value: float) -> None:
        found[name] = round(value, 6)

    training, _, test = digits()
    model = train_images(lambda: VisionTransformer(d_model=64, depth=2, num_heads=4), training, steps=_STEPS, seed=seed)
    note("float", accuracy(model, test))
    for k in (4, 3):
        note(f"L-Mul, k = {k}, attention", accuracy(replace_multiplications(model, "attention", k), test))
        for where in _PLACES:
            by_formula = replace_multiplications(model, where, k, mode="formula")
            note(f"L-Mul, k = {k}, {where}, formula", accuracy(by_formula, test))
    for name, kind in _FLOAT8.items():

        def attention(q: Tensor, k: Tensor, v: Tensor, kind: torch.dtype = kind) -> Tensor:
            weights = (_float8_matmul(q, k.mT, kind) * q.shape[-1] ** -0.5).softmax(-1)
            return _float8_matmul(weights, v, kind)

        note(f"{name}, attention", accuracy(_Under(model, attention), test))
    seen: list[tuple[Tensor, Tensor]] = []

    def watch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen.append((q, k))
        return F.scaled_dot_product_attention(q, k, v)

    with torch.no_grad():
        _Under(model, watch)(images_of(test)[:128])
    for layer, (queries, keys) in enumerate(seen):
        exact = queries @ keys.mT
        errors = {f"k = {bits}": _gap(l_mul_matmul(queries, keys.mT, bits, "integer"), exact) for bits in (4, 3)}
        errors |= {name: _gap(_float8_matmul(queries, keys.mT, kind), exact) for name, kind in _FLOAT8.items()}
        for name, value in errors.items():
            note(f"layer {layer}, logit error, {name}", value)
    for terms in (4, 64):
        note(f"bias-corrected error of a sum of {terms}", _sum_error(terms, seed))
    x, y = 1 + torch.rand(2, 100_000, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for mode in _MODES:
        measured = float((x * y - l_mul(x, y, None, mode)).mean())
        note(f"mean error, {mode}", measured)
        note(f"mean error, {mode}, by the law", error_expectation(mode=mode))
    return found


def run(seeds: Sequence[int] = (0, 1, 2)) -> ClaimRecord:
    """Run the claim: 2 blocks of width 64, 400 steps of AdamW (2e-3); the mode is the paper's integer addition.

    Logit errors are relative Euclidean distances from the exact logits, on the queries and keys of the float model for
    the test images. Nothing was tuned.

    Args:
        seeds: initial weights and order of the data.
    """
    figure = CARD.claim.figure if CARD.claim is not None else ""
    begun = time.perf_counter()
    measured = [measure(seed) for seed in seeds]
    metrics = {name: [found[name] for found in measured] for name in measured[0]}
    mean = {name: fmean(values) for name, values in metrics.items()}
    shares = {
        f"{ours} against {theirs}": fmean(
            mine <= other
            for layer in range(2)
            for mine, other in zip(
                metrics[f"layer {layer}, logit error, {ours}"],
                metrics[f"layer {layer}, logit error, {theirs}"],
                strict=True,
            )
        )
        for ours, theirs in (("k = 4", "e4m3"), ("k = 3", "e5m2"))
    }
    effects = {
        "accuracy drop of k = 4, points": 100 * (mean["float"] - mean["L-Mul, k = 4, attention"]),
        "share of layers, k = 4 <= e4m3": shares["k = 4 against e4m3"],
        "share of layers, k = 3 <= e5m2": shares["k = 3 against e5m2"],
        "error of a sum of 64 over that of 4": mean["bias-corrected error of a sum of 64"]
        / mean["bias-corrected error of a sum of 4"],
        "mean error off its law": max(
            abs(mean[f"mean error, {mode}"] - mean[f"mean error, {mode}, by the law"]) for mode in _MODES
        ),
    }
    values = list(effects.values())
    record = judge(
        CARD.key,
        figure,
        metrics=metrics,
        effects={name: round(value, 5) for name, value in effects.items()},
        parts={
            "accuracy drop of k = 4 <= 0.3 points": values[0] <= 0.3,
            "error of attention logits: k = 4 <= e4m3 in >= 80 % of layers": values[1] >= 0.8,
            "error of attention logits: k = 3 <= e5m2 in >= 80 % of layers": values[2] >= 0.8,
            "bias-corrected error of a sum at 64 terms at most half of that at 4": values[3] <= 0.5,
            "measured mean error within 2 % of a product of the law": values[4] <= 0.02,
        },
        seeds=seeds,
        seconds=time.perf_counter() - begun,
    )
    words = (
        "Accuracy does not tell any of these products apart. The logits do: by the law, the carry of the integer mode "
        "makes a product at l = 3 too large by 0.11 of 2.25 on average, 5 %, as the logits show at k = 4 and 3; two "
        "factors rounded to e4m3 and their rounded product err by 2.5 %, those of e5m2 by 5 %. So in this distance 4 "
        "bits cannot reach e4m3, and 3 bits lie beside e5m2, above or below it. Most of that error is a common "
        "factor, which a softmax hardly feels."
    )
    return record.model_copy(update={"notes": words})
