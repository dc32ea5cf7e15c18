"""Store weights in a few bits on a grid that a power bends towards zero, its exponent searched without data.

`NUPES: Non-Uniform Post-Training Quantization via Power Exponent Search <https://arxiv.org/abs/2308.05600>`_, after
`PowerQuant <https://arxiv.org/abs/2301.09858>`_.

    Q_a(W) = round(n sign(W) |W / m|^a), W^ = m sign(Q) |Q / n|^(1/a), n = 2^(b-1) - 1, a* = argmin sum ||W - W^||

x -> x^a are the continuous maps of the positive numbers that keep products, so codes multiply to the code of the
product. Sums do not survive: the weights are stored in b bits and executed as floats, and nothing gets faster.

Departures: weights only, activations stay float. The paper's relaxation of the integer weights could not be read: here
a real code travels over the whole grid through a staircase that is annealed from the identity to rounding, ever more
drawn to whole numbers, and a layer that does not gain on the calibration samples keeps its rounded codes. Exponents lie
in [0.1, 1]. Scales and what takes no codes (biases, norms) are stored in half precision, a third of a small file.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from scipy.optimize import minimize
from torch import Tensor, nn
from torch.func import functional_call

from torchgraft.bench.task import Inputs, Task, call, take
from torchgraft.catalogue import Card
from torchgraft.catalogue.card import Claim
from torchgraft.engines.procedure import Procedure, Site, check_strength
from torchgraft.engines.quantize.fewbit import (
    HALF,
    LEAST_EXPONENT,
    FewBit,
    Granularity,
    PowerQuantizer,
    bend,
    channel_axis,
    check_exponent,
    holds_as_half,
    largest_code,
    magnitudes,
    power_codes,
    power_values,
    set_codes,
    soft_round,
    storable_halves,
    storable_layers,
    storable_values,
    value_axis,
)
from torchgraft.engines.surgery.edits import Edit, apply_edits
from torchgraft.engines.taps import record
from torchgraft.errors import BadInput

__all__ = ["CARD", "Nupes", "PowerQuantizer", "nupes_refine", "search_exponent", "soft_round"]

CARD = Card(
    key="nupes-power-quant",
    title="NUPES: Non-Uniform Post-Training Quantization via Power Exponent Search",
    seed_id=288,
    authors="Yvinec, Dapogny and Bailly, 2023",
    reference="https://arxiv.org/abs/2308.05600",
    family="shrink/quantize",
    kind="procedure",
    engine=("parametrize", "surgery"),
    equation="Q_a(W) = round(n sign(W) |W / m|^a); W^ = m sign(Q) |Q / n|^(1/a); a* = argmin_a sum ||W - W^||",
    entry="Nupes",
    stage="precision",
    oracles=(
        "a = 1 is symmetric uniform quantisation code for code; codes are odd and monotone; Q(Q^-1(i)) = i for every i",
        "products of decoded codes are the decoded product of codes, to 1e-12",
        "at 4 bits a* is about 0.66 on Gaussian weights with >= 20% less squared error than a = 1, about 0.5 with >= "
        "50% less on Laplace weights, 1 within 0.05 on uniform ones",
        "the gradient in a of the smooth map equals finite differences and is finite at 0",
        "refinement does not raise the error of any layer on its calibration samples, and leaves the rounding "
        "neighbours only where it may",
    ),
    claim=Claim(
        text="A small vision transformer on digits, 5 seeds, all layers, weights only, one scale a tensor: uniform "
        "rounding and PowerQuant (data-free exponent) at 3 and 4 bits; AdaRound-style (uniform grid, up or down) and "
        "NUPES (whole grid and exponents) with 128 samples at 4 bits.",
        figure="PowerQuant >= uniform + 3 points at 3 bits data-free; NUPES > uniform at 4 bits in mean and in >= 4 of "
        "5 seeds; NUPES >= AdaRound-style at 4 bits; NUPES within 1 point of float at 4 bits",
    ),
    choose_when="The file must be small, there is no data (or little), and 3 or 4 bits a weight are wanted.",
    choose_instead="int8-dynamic where latency counts: these codes are executed as floats; quantized-distillation "
    "where there is time to train.",
    confidence="medium",
    bibtex="@article{yvinec2023nupes, title={NUPES: Non-Uniform Post-Training Quantization via Power Exponent Search}, "
    "author={Yvinec, Edouard and Dapogny, Arnaud and Bailly, Kevin}, journal={arXiv preprint arXiv:2308.05600}, "
    "year={2023}}",
)


def search_exponent(
    model: nn.Module | Sequence[Tensor],
    bits: int,
    *,
    p: float = 2.0,
    granularity: Granularity = "channel",
    ignore: Sequence[str] = (),
) -> float:
    """Return the one exponent in [0.1, 1] that reconstructs all weights best, by Nelder-Mead; no data is used.

    Args:
        model: the model, or the weights themselves.
        bits: of a code.
        p: of the norm of the error.
        granularity: which weights share a scale.
        ignore: globs of modules that do not count.

    Example:
        >>> bell = torch.randn(4, 4096, generator=torch.Generator().manual_seed(0))
        >>> 0.55 < search_exponent([bell], 4) < 0.75
        True

    Raises:
        BadInput: the model has no layer that can be quantised.
    """
    if isinstance(model, nn.Module):
        layers = [model.get_submodule(name) for name in storable_layers(model, ignore=ignore)]
        weights = [(layer.get_parameter("weight").detach(), channel_axis(layer)) for layer in layers]
        values = [model.get_parameter(name).detach() for name in storable_values(model, ignore=ignore)]
        weights += [(value, value_axis(value)) for value in values]
    else:
        weights = [(weight.detach(), 0) for weight in model]
    if not weights:
        raise BadInput("search_exponent finds no weight that can be stored in a few bits")
    scaled = [(weight, magnitudes(weight, granularity, axis=axis)) for weight, axis in weights]

    def error(point: Sequence[float]) -> float:
        a = min(1.0, max(LEAST_EXPONENT, float(point[0])))
        total = 0.0
        for weight, scale in scaled:
            codes = power_codes(weight, scale, bits=bits, exponent=a)
            total += float((weight - power_values(codes, scale, bits=bits, exponent=a)).norm(p=p))
        return total

    # Rounding makes the valley bumpy at a fine scale: start on its floor.
    first = min((0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0), key=lambda a: error([a]))
    simplex = [[first], [first - 0.04 if first > 0.95 else first + 0.04]]
    found = minimize(error, [first], method="Nelder-Mead", options={"initial_simplex": simplex, "xatol": 1e-3})
    return min(1.0, max(LEAST_EXPONENT, float(found.x[0])))


def with_halves(edit: FewBit, model: nn.Module, *, ignore: Sequence[str] = ()) -> FewBit:
    """Return ``edit`` with scales, and what takes no codes, in half precision where that holds them."""
    rest = [name for name in storable_halves(model, ignore=ignore) if holds_as_half(model.get_parameter(name))]
    scales = [
        magnitudes(value, edit.granularity, axis=axis)
        for value, axis in (_coded(model, name) for name, bits in edit.bits.items() if bits != HALF)
    ]
    half = all(holds_as_half(scale, relative=True) for scale in scales)
    bits = {**edit.bits, **dict.fromkeys(rest, HALF)}
    return edit.model_copy(update={"bits": bits, "scales": "float16" if half else "float32"})


def _coded(model: nn.Module, name: str) -> tuple[Tensor, int]:
    """Return the parameter that a name in an edit means, and the axis of its channels."""
    parts = dict(model.named_parameters(remove_duplicate=False))
    if name in parts:
        return parts[name], value_axis(parts[name])
    layer = model.get_submodule(name)
    return layer.get_parameter("weight"), channel_axis(layer)


def _halfness(codes: Tensor, power: float) -> Tensor:
    """Return how far codes are from whole numbers: 0 there, 1 half-way; at a high power only the nearest are drawn."""
    return 1 - (2 * (codes - codes.floor()) - 1).abs().pow(power).mean()


def nupes_refine(
    model: nn.Module,
    calib: Inputs,
    *,
    bits: int = 4,
    exponent: float | None = None,
    learn_exponent: bool = True,
    whole_grid: bool = True,
    steps: int = 150,
    lr: float = 0.03,
    batch_size: int = 32,
    granularity: Granularity = "channel",
    halves: bool = False,
    ignore: Sequence[str] = (),
    seed: int = 0,
) -> nn.Module:
    """Return a copy of ``model`` with few-bit layers whose codes and exponents reconstruct each layer's outputs.

    Layers are taken in the order in which they run, each fed by the quantised layers before it.

    Args:
        model: the model, left as it was.
        calib: inputs; a hundred samples are plenty.
        bits: of a code.
        exponent: where each layer's exponent starts; by default it is searched.
        learn_exponent: whether it moves.
        whole_grid: whether a code may go anywhere, or only up or down from its weight (as in AdaRound).
        steps: of Adam, a layer; 0 leaves the rounded codes.
        lr: in units of a code; exponents have a tenth of it.
        batch_size: samples a step.
        granularity: which weights share a scale.
        halves: whether scales and what takes no codes are stored in half precision.
        ignore: globs of modules that stay as they are.
        seed: of the order of the samples.

    Raises:
        BadInput: a setting is out of range, or there is nothing to quantise.
    """
    if steps < 0 or batch_size < 1 or not lr > 0:
        raise BadInput(f"refinement needs steps >= 0, batch_size >= 1 and lr > 0, got {steps}, {batch_size} and {lr}")
    names, values = storable_layers(model, ignore=ignore), storable_values(model, ignore=ignore)
    if not names:
        raise BadInput(f"nupes_refine finds no linear layer or convolution in {type(model).__name__}")
    a = search_exponent(model, bits, granularity=granularity, ignore=ignore) if exponent is None else exponent
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        found = _walk(
            model,
            calib,
            FewBit(bits=dict.fromkeys(names, bits), exponents=dict.fromkeys(names, a), granularity=granularity),
            learn_exponent=learn_exponent,
            whole_grid=whole_grid,
            steps=steps,
            lr=lr,
            batch_size=batch_size,
            generator=torch.Generator().manual_seed(seed),
        )
    finally:
        for module, training in modes:
            module.training = training
    exponents = {name: found[name][1] if name in found else a for name in [*names, *values]}
    widths = dict.fromkeys(exponents, bits)
    edit = FewBit(bits=widths, exponents=exponents, granularity=granularity)
    made = apply_edits(model, [with_halves(edit, model, ignore=ignore) if halves else edit])
    for name, (codes, own) in found.items():
        set_codes(made.get_submodule(name), codes, own)
    return made


def _walk(
    model: nn.Module,
    calib: Inputs,
    edit: FewBit,
    *,
    learn_exponent: bool,
    whole_grid: bool,
    steps: int,
    lr: float,
    batch_size: int,
    generator: torch.Generator,
) -> dict[str, tuple[Tensor, float]]:
    """Return codes and exponent of every layer that runs on ``calib``."""
    working = apply_edits(model, [edit])
    with torch.no_grad(), record(model, list(edit.bits)) as met:
        call(model, calib)
    found = {}
    for name in list(met):  # in the order of the calls
        with torch.no_grad(), record(working, name, what="input") as into:
            call(working, calib)
        y, x = torch.cat(met.calls(name)), torch.cat(into.calls(name))
        layer = model.get_submodule(name)
        weight = layer.get_parameter("weight").detach()
        scale = magnitudes(weight, edit.granularity, axis=channel_axis(layer))
        bits, a = edit.bits[name], edit.exponents[name]
        rest = {key: value.detach() for key, value in layer.named_parameters() if key != "weight"}
        n = largest_code(bits)
        unit = weight / torch.where(scale > 0, scale, torch.ones_like(scale))
        real = (bend(unit, a) * n).requires_grad_()
        low, high = real.detach().floor(), real.detach().floor() + 1
        exponent = torch.tensor(a, dtype=weight.dtype).requires_grad_(learn_exponent)
        groups = [{"params": [real], "lr": lr}, {"params": [exponent], "lr": 0.1 * lr}]
        optimizer = torch.optim.Adam(groups[: 1 + learn_exponent])

        def output(value: Tensor, rows: Tensor | slice) -> Tensor:
            made: Tensor = functional_call(layer, {**rest, "weight": value}, (x[rows],))  # noqa: B023
            return made

        rounded = power_codes(weight, scale, bits=bits, exponent=a)
        with torch.no_grad():
            base = nn.functional.mse_loss(
                output(power_values(rounded, scale, bits=bits, exponent=a), slice(None)), y
            ).clamp(min=1e-12)
        for step in range(steps):
            rows = torch.randperm(len(x), generator=generator)[:batch_size]
            held = real.clamp(-n, n) if whole_grid else torch.minimum(torch.maximum(real, low), high).clamp(-n, n)
            share = step / max(1, steps - 1)
            codes = soft_round(held, 1.0 + 11.0 * share)
            value = scale * bend(codes / n, 1.0 / exponent, least=1e-6)
            pull = share * _halfness(codes, 20.0 - 18.0 * share)
            loss = nn.functional.mse_loss(output(value, rows), y[rows]) / base + pull
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            with torch.no_grad():
                exponent.clamp_(LEAST_EXPONENT, 1.0)
        with torch.no_grad():
            held = real if whole_grid else torch.minimum(torch.maximum(real, low), high)
            learned, own = held.round().clamp(-n, n).to(torch.int32), float(exponent)
            error = nn.functional.mse_loss(
                output(power_values(learned, scale, bits=bits, exponent=own), slice(None)), y
            )
        found[name] = (learned, own) if float(error) < float(base) else (rounded, a)
        set_codes(working.get_submodule(name), *found[name])
    return found


class Nupes(Procedure):
    """Store weights, embeddings and positions among them, in 8 to 3 bits of a bent grid (strength 0 to 1).

    Args:
        steps: of refinement by calibration samples, a layer; 0 uses no data at all (PowerQuant).
        samples: training samples of the calibration.
        exponent: a, or ``None`` to search it.
        learn_exponent: whether refinement moves the exponents.
        least_bits: bits at strength 1.
        granularity: which weights share a scale.
        halves: whether scales and what takes no codes are stored in half precision.
    """

    card: ClassVar[Card] = CARD
    expense = 0

    def __init__(
        self,
        *,
        steps: int = 0,
        samples: int = 128,
        exponent: float | None = None,
        learn_exponent: bool = True,
        least_bits: int = 3,
        granularity: Granularity = "channel",
        halves: bool = True,
    ) -> None:
        if steps < 0 or samples < 1:
            raise BadInput(f"steps must not be negative and samples at least 1, got {steps} and {samples}")
        largest_code(least_bits)
        if exponent is not None:
            check_exponent(exponent)
        if granularity not in ("channel", "tensor"):
            raise BadInput(f"granularity must be 'channel' or 'tensor', got {granularity!r}")
        self.steps, self.samples, self.exponent, self.learn_exponent = steps, samples, exponent, learn_exponent
        self.least_bits, self.granularity, self.halves = least_bits, granularity, halves

    def applies_to(self, model: nn.Module, task: Task, *, ignore: Sequence[str] = ()) -> list[Site]:
        """Return the layers and other parameters that can be stored as codes. See :class:`Procedure`."""
        sites = [
            Site(name, "layer", 1, model.get_submodule(name).get_parameter("weight").numel())
            for name in storable_layers(model, ignore=ignore)
        ]
        values = storable_values(model, ignore=ignore)
        return [*sites, *(Site(name, "weight", 1, model.get_parameter(name).numel()) for name in values)]

    def _bits(self, strength: float) -> int:
        return min(8, max(self.least_bits, round(8 - (8 - self.least_bits) * check_strength(strength))))

    def plan(
        self, model: nn.Module, task: Task, strength: float, *, ignore: Sequence[str] = (), seed: int = 0
    ) -> list[Edit]:
        """Return one edit for all weights, with the exponent searched on them. See :class:`Procedure`."""
        names, bits = [site.name for site in self.applies_to(model, task, ignore=ignore)], self._bits(strength)
        a = self.exponent
        if a is None:
            a = search_exponent(model, bits, granularity=self.granularity, ignore=ignore)
        exponents = dict.fromkeys(names, round(a, 6))
        edit = FewBit(bits=dict.fromkeys(names, bits), exponents=exponents, granularity=self.granularity)
        return [with_halves(edit, model, ignore=ignore) if self.halves else edit]

    def apply(
        self, model: nn.Module, task: Task, strength: float, *, ignore: Sequence[str] = (), seed: int = 0
    ) -> nn.Module:
        """Return a copy of ``model`` with few-bit layers, refined where steps are given. See :class:`Procedure`."""
        if self.steps == 0 or check_strength(strength) == 0.0 or not storable_layers(model, ignore=ignore):
            return super().apply(model, task, strength, ignore=ignore, seed=seed)
        return nupes_refine(
            model,
            take(task.train.inputs, slice(self.samples)),
            bits=self._bits(strength),
            exponent=self.exponent,
            learn_exponent=self.learn_exponent,
            steps=self.steps,
            granularity=self.granularity,
            halves=self.halves,
            ignore=ignore,
            seed=seed,
        )
