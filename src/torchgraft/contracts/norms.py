"""The contract of normalisation: what the statistics are of, when running ones move, and what a layer stands in for.

The row "norms" of the design. A card says ``declared={"replaces": "BatchNorm2d"}`` for the torch layer whose place it
takes, ``equals-replaced`` where it computes the same, and by further capabilities what holds in training:
``batch-independent``, ``train-eval-equal``, ``running-statistics``, ``scale-invariant``, ``shift-invariant``,
``foldable``, ``padding-mask``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from torchgraft.catalogue import Card
from torchgraft.contracts.check import Check, CheckFailure, Subject, require
from torchgraft.contracts.modules import EXACT, compare_gradients, gradients
from torchgraft.contracts.sameness import close, equal, same_output
from torchgraft.contracts.subjects import build_part, draw_like, output
from torchgraft.errors import BadInput

__all__ = ["CHECKS", "replaced"]

_DOUBLE = torch.float64
#: Roundoff of bfloat16 output, as a share of its norm; statistics summed in bfloat16 are off by more than twice that.
_ROUNDING = 0.01
#: Small enough that the eps in a denominator cannot be seen in float64.
_NO_EPS = 1e-24
#: Of central differences: truncation is its square, roundoff 1e-16 over it.
_STEP = 1e-5
_NORMS: dict[str, Callable[[int], nn.Module]] = {
    "LayerNorm": nn.LayerNorm,
    "RMSNorm": nn.RMSNorm,
    "BatchNorm1d": nn.BatchNorm1d,
    "BatchNorm2d": nn.BatchNorm2d,
    "InstanceNorm2d": lambda width: nn.InstanceNorm2d(width, affine=True),
    "GroupNorm": lambda width: nn.GroupNorm(1, width),
}


def _width(subject: Subject) -> int:
    shape = subject.card.shapes[0]
    last = subject.card.declared["replaces"] in ("LayerNorm", "RMSNorm") or len(shape) == 2
    # A batch norm of tokens (B, T, D) keeps the channels last, where torch's wants them second.
    return shape[-1] if last or len(shape) == 3 else shape[1]


def replaced(subject: Subject) -> nn.Module:
    """Return the torch layer that the card says is replaced, in float64, with the width of the tiny configuration."""
    name = str(subject.card.declared["replaces"])
    require(name in _NORMS, f"the card replaces {name!r}; known are {', '.join(_NORMS)}")
    layer = _NORMS[name](_width(subject)).to(_DOUBLE)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(5)
        for value in layer.parameters():
            value.add_(0.3 * torch.randn_like(value))
    return layer


def _draw(subject: Subject, batch: int = 4, *, seed: int = 0, dtype: torch.dtype = _DOUBLE) -> Tensor:
    """Return an input whose mean is not zero and whose samples have different sizes."""
    x = draw_like(subject, batch, seed=seed, dtype=_DOUBLE)
    size = torch.linspace(0.5, 2.0, batch, dtype=_DOUBLE).reshape(-1, *[1] * (x.ndim - 1))
    return (x * size + 0.5).to(dtype)


def _training(subject: Subject, dtype: torch.dtype = _DOUBLE) -> nn.Module:
    return build_part(subject, dtype=dtype).train()


def _set(module: nn.Module, name: str, value: float) -> nn.Module:
    for child in module.modules():
        if isinstance(getattr(child, name, None), float):
            setattr(child, name, value)
    return module


def _running(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.named_buffers() if value.is_floating_point()}


def check_norm_keeps_the_shape(subject: Subject) -> None:
    """In training and in evaluation the output has shape and dtype of the input, and channels-last memory is taken."""
    for training in (True, False):
        for batch in (2, 3, 5):
            module = build_part(subject).train(training)
            x = _draw(subject, batch, dtype=torch.float32)
            layouts = [x] if x.ndim != 4 else [x, x.contiguous(memory_format=torch.channels_last)]
            outs = [copy.deepcopy(module)(value) for value in layouts]
            for out in outs:
                require(out.shape == x.shape and out.dtype == x.dtype, f"{tuple(x.shape)} becomes {tuple(out.shape)}")
                require(bool(out.isfinite().all()), f"not finite at batch {batch}, training {training}")
                close(out, outs[0], 1e-5, "channels-last beside contiguous")


def check_drop_in_for_the_torch_layer(subject: Subject) -> None:
    """Built from the width alone; gain and offset carry the names and shapes of the torch layer's, and load from it."""
    torchs = replaced(subject)
    try:
        ours = subject.entry(_width(subject)).to(_DOUBLE)
    except (TypeError, BadInput) as error:
        require(False, f"{subject.card.entry}({_width(subject)}) is refused: {error}")
        return
    own = dict(ours.named_parameters())
    kept = {name: value for name, value in torchs.named_parameters() if name in own}
    require("weight" in kept, f"{subject.card.entry} has parameters {list(own)}, no gain 'weight' as the torch layer")
    for name, value in kept.items():
        found = own[name]
        require(found.shape == value.shape, f"{name} is {tuple(found.shape)}, torch's {tuple(value.shape)}")
        require(bool((found == found.flatten()[0]).all()), f"{name} does not start from one number")
    unexpected = ours.load_state_dict({name: value.detach() for name, value in kept.items()}, strict=False)[1]
    require(not unexpected, f"cannot load {unexpected} of the torch layer")
    same_output(own["weight"].detach(), kept["weight"].detach(), "the loaded gain")


def check_equals_the_torch_layer(subject: Subject) -> None:
    """State dict, outputs, all gradients and running statistics are those of the torch layer, in training and after."""
    torchs, ours = replaced(subject), build_part(subject, dtype=_DOUBLE)
    require(ours.state_dict().keys() == torchs.state_dict().keys(), "the state dict has other names than torch's")
    ours.load_state_dict(torchs.state_dict(), strict=True)
    for training in (True, True, False):
        x = _draw(subject).requires_grad_()
        out, expected = ours.train(training)(x), torchs.train(training)(x)
        close(out, expected, EXACT, f"beside torch's, training {training}")
        compare_gradients(gradients(ours, out, x), gradients(torchs, expected, x), EXACT, "beside torch's")
        for name, value in torchs.named_buffers():
            close(ours.get_buffer(name), value, EXACT, f"buffer {name}")


def check_samples_are_apart_in_evaluation(subject: Subject) -> None:
    """In evaluation no sample sees another: each alone gives what it gives in a batch."""
    module, x = build_part(subject, dtype=_DOUBLE), _draw(subject)
    whole = output(module, x)
    for row in range(len(x)):
        close(output(module, x[row : row + 1]), whole[row : row + 1], EXACT, f"sample {row} alone")


def check_batch_size_does_not_matter(subject: Subject) -> None:
    """In training too no sample sees another, in its output or its gradient, and a batch of one is as good as any."""
    module, x = _training(subject), _draw(subject).requires_grad_()
    whole = module(x)
    for row in range(len(x)):
        close(module(x[row : row + 1]), whole[row : row + 1], EXACT, f"sample {row} alone")
    (grad,) = torch.autograd.grad(whole[0].square().sum() + whole[0].sum(), x)
    require(not bool(grad[1:].any()), "the output of a sample has a gradient to other samples")


def check_training_is_evaluation(subject: Subject) -> None:
    """Training and evaluation mode give the same output, bit for bit, whatever was seen before."""
    module = _training(subject)
    for seed in (1, 2):
        module(_draw(subject, seed=seed) * 3)
    x = _draw(subject)
    same_output(module.train()(x).detach(), output(module.eval(), x), "training beside evaluation")


def check_statistics_move_once_a_pass(subject: Subject) -> None:
    """Running statistics move once a training pass, in proportion to the momentum, and in nothing else."""
    x = _draw(subject).requires_grad_()
    moved = {}
    for momentum in (0.1, 0.2):
        module = _set(_training(subject), "momentum", momentum)
        before = _running(module)
        out = module(x)
        after = _running(module)
        moved[momentum] = {name: after[name] - before[name] for name in before}
        out.sum().backward()
        module.eval()(x)
        rest = [name for name, value in _running(module).items() if not equal(value, after[name])]
        require(not rest, f"{rest[:4]} move in the backward pass or in evaluation")
    require(any(bool(value.any()) for value in moved[0.1].values()), "no running statistic moves in training")
    for name, value in moved[0.1].items():
        close(moved[0.2][name], 2 * value, EXACT, f"what {name} moves by at twice the momentum")


def check_evaluation_is_training_that_settled(subject: Subject) -> None:
    """With the running statistics of a batch, evaluation gives what training gave on it, up to n / (n - 1)."""
    module, x = _set(_training(subject), "momentum", 1.0), _draw(subject, 16)
    for _ in range(3):
        out = module(x).detach()
    values = x.numel() // max(value.numel() for value in _running(module).values())
    close(output(module.eval(), x), out, 2 / values, "evaluation beside training")


def check_batch_of_none_leaves_statistics(subject: Subject) -> None:
    """A training pass over no samples gives none, and running statistics stay; one lone value is used or refused."""
    module, x = _training(subject), _draw(subject)
    before = _running(module)
    out = module(x[:0])
    require(out.shape == x[:0].shape, f"no samples give {tuple(out.shape)}")
    moved = [name for name, value in _running(module).items() if not equal(value, before[name])]
    require(not moved, f"no samples move {moved[:4]}")
    lone = x[:1, :, :1, :1] if x.ndim == 4 else x[:1, :1] if x.ndim == 3 else x[:1]
    try:
        out = module(lone)
    except BadInput:
        return
    require(bool(out.isfinite().all()), "one value a channel gives an output that is not finite")
    require(all(bool(value.isfinite().all()) for value in _running(module).values()), "one value ruins the statistics")


def check_statistics_are_in_single_precision(subject: Subject) -> None:
    """In training on bfloat16 far from zero the output is within 1 % of that in float64 on the same numbers."""
    module = build_part(subject).train()
    x = (_draw(subject) + 16).bfloat16()
    exact = copy.deepcopy(module).to(_DOUBLE)(x.double())
    out = module(x)
    require(out.dtype == torch.bfloat16, f"the output of a bfloat16 input is {out.dtype}")
    gap = (out.double() - exact).norm().item() / exact.norm().item()
    require(gap <= _ROUNDING, f"differs by {gap:.3g} of the output's norm, {_ROUNDING} is allowed")


def _factors(subject: Subject, low: float, high: float) -> Iterator[Tensor]:
    """Yield factors (or offsets): one for all samples, and one a sample where the card says they are apart."""
    shape = [-1, *[1] * (len(subject.card.shapes[0]) - 1)]
    yield torch.full((1,), high, dtype=_DOUBLE).reshape(shape)
    yield torch.full((1,), low, dtype=_DOUBLE).reshape(shape)
    if "batch-independent" in subject.card.capabilities:
        yield torch.linspace(low, high, 4, dtype=_DOUBLE).reshape(shape)


def check_scale_does_not_matter(subject: Subject) -> None:
    """In training, without eps, an input times a positive number gives the same output."""
    module, x = _set(_training(subject), "eps", _NO_EPS), _draw(subject)
    expected = copy.deepcopy(module)(x)
    for factor in _factors(subject, 0.05, 30.0):
        close(copy.deepcopy(module)(factor * x), expected, 1e-7, "the scaled input")


def check_shift_does_not_matter(subject: Subject) -> None:
    """In training an input plus a constant gives the same output."""
    module, x = _training(subject), _draw(subject)
    expected = copy.deepcopy(module)(x)
    for offset in _factors(subject, -3.0, 20.0):
        close(copy.deepcopy(module)(x + offset), expected, 1e-7, "the shifted input")


def check_training_gradients_are_the_derivatives(subject: Subject) -> None:
    """In training, statistics included, input and parameter gradients equal central differences along a direction."""
    module = _training(subject)
    leaves = {"x": _draw(subject, 3).requires_grad_(), **dict(module.named_parameters())}
    start = {name: value.detach().clone() for name, value in module.named_buffers()}
    draw = torch.Generator().manual_seed(4)
    weight = torch.randn(leaves["x"].shape, generator=draw, dtype=_DOUBLE)

    def value(moved: str = "", by: Tensor | float = 0.0) -> Tensor:
        given = {name: leaf + by if name == moved else leaf for name, leaf in leaves.items()}
        input_, fresh = given.pop("x"), {name: buffer.clone() for name, buffer in start.items()}
        out: Tensor = torch.func.functional_call(module, {**given, **fresh}, (input_,))
        return torch.sum(out * weight)

    grads = torch.autograd.grad(value(), list(leaves.values()))
    for (name, leaf), grad in zip(leaves.items(), grads, strict=True):
        direction = torch.randn(leaf.shape, generator=draw, dtype=_DOUBLE)
        with torch.no_grad():
            slope = (value(name, _STEP * direction) - value(name, -_STEP * direction)).item() / (2 * _STEP)
        found, size = (grad * direction).sum().item(), grad.norm().item() + 1e-3
        require(
            abs(found - slope) <= 1e-5 * size,
            f"along a direction of {name} the gradient says {found:.6g}, the difference {slope:.6g}",
        )


def check_training_compiles(subject: Subject) -> None:
    """torch.compile(fullgraph=True) of a training pass gives the same output and moves the statistics alike."""
    module, x = _training(subject), _draw(subject)
    twin = copy.deepcopy(module)
    expected = module(x)
    torch._dynamo.reset()
    try:
        out = torch.compile(twin, fullgraph=True, backend="aot_eager")(x)
    except torch._dynamo.exc.TorchDynamoException as error:
        require(False, " ".join(str(error).split())[:300])
        return
    finally:
        torch._dynamo.reset()
    close(out, expected, EXACT, "compiled beside eager")
    for name, value in _running(module).items():
        close(_running(twin)[name], value, EXACT, f"compiled beside eager, {name}")


def check_folded_equals_unfolded(subject: Subject) -> None:
    """In evaluation ``norm.fold_into(linear)`` gives one linear layer that computes linear(norm(x))."""
    module, x = _training(subject), _draw(subject)
    module(x)
    module.eval()
    with torch.random.fork_rng():
        torch.manual_seed(2)
        linear = nn.Linear(x.shape[-1], 3).to(_DOUBLE)
    expected = output(linear, output(module, x))
    folded = getattr(module, "fold_into", None)
    require(folded is not None, f"{subject.card.entry} has no fold_into, though the card says foldable")
    if folded is not None:
        layer = folded(copy.deepcopy(linear))
        require(type(layer) is nn.Linear, f"fold_into gives a {type(layer).__name__}, no plain nn.Linear")
        close(output(layer, x), expected, EXACT, "folded beside unfolded")


def check_padding_is_left_out(subject: Subject) -> None:
    """With ``mask`` (B, T), what stands in padding changes no other output and no running statistic, in training."""
    x = _draw(subject)
    if x.ndim != 3:
        raise CheckFailure(f"the card says padding-mask; its shape {tuple(x.shape)} is not (B, T, D)")
    lengths = torch.tensor([x.shape[1] - row % 3 for row in range(len(x))])
    mask = torch.arange(x.shape[1]) < lengths[:, None]
    module = _training(subject)
    twin = copy.deepcopy(module)
    outs = [one(torch.where(mask[..., None], x, fill), mask=mask) for one, fill in ((module, 0.0), (twin, 1e3))]
    close(outs[1][mask], outs[0][mask], EXACT, "another padding")
    left = _running(module)
    for name, value in _running(twin).items():
        close(value, left[name], EXACT, f"another padding, {name}")


def _is_norm(card: Card) -> bool:
    return card.kind == "part" and card.family == "parts/norms"


def _replaces(card: Card) -> bool:
    return _is_norm(card) and "replaces" in card.declared


def _declares(*capabilities: str) -> Callable[[Card], bool]:
    return lambda card: _is_norm(card) and card.capabilities >= set(capabilities)


CHECKS = (
    Check(check_norm_keeps_the_shape, _replaces),
    Check(check_drop_in_for_the_torch_layer, _replaces),
    Check(check_statistics_are_in_single_precision, _replaces),
    Check(check_training_gradients_are_the_derivatives, _replaces),
    Check(check_equals_the_torch_layer, _declares("equals-replaced")),
    Check(check_samples_are_apart_in_evaluation, _is_norm),
    Check(check_batch_size_does_not_matter, _declares("batch-independent")),
    Check(check_training_is_evaluation, _declares("train-eval-equal")),
    Check(check_statistics_move_once_a_pass, _declares("running-statistics")),
    Check(check_evaluation_is_training_that_settled, _declares("running-statistics")),
    Check(check_batch_of_none_leaves_statistics, _declares("running-statistics")),
    Check(check_scale_does_not_matter, _declares("scale-invariant")),
    Check(check_shift_does_not_matter, _declares("shift-invariant")),
    Check(check_training_compiles, _declares("running-statistics", "compilable")),
    Check(check_folded_equals_unfolded, _declares("foldable")),
    Check(check_padding_is_left_out, _declares("padding-mask")),
)
