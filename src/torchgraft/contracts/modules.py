"""The contract of parts: what an ``nn.Module`` promises by itself, in the tiny configuration that its card gives.

The row "all modules" of the design: dtypes, gradients, weights that can be kept and copied, repeatable outputs,
declared numbers, compilation where declared, batches of none and one, and a clear refusal of what cannot be used.
"""

from __future__ import annotations

import ast
import copy
import inspect
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from torchgraft.bench.files import pack_tensors, unpack_tensors
from torchgraft.catalogue import Card
from torchgraft.contracts.check import Check, Subject, require
from torchgraft.contracts.sameness import close, fittings, same_output, same_state, surroundings
from torchgraft.contracts.subjects import build_part, draw_like, output, settings
from torchgraft.errors import BadInput

__all__ = ["CHECKS", "compare_gradients", "evaluate", "gradients", "refused"]

#: Rounding of float64 through a few hundred operations, relative to the largest entry.
EXACT = 1e-9
#: Rounding of float32 through a tiny module.
SINGLE = 1e-3
#: Rounding of bfloat16 (8 bits) through a tiny module, as a share of the output's norm.
HALF = 0.05
#: What the checks know how to measure of ``card.declared``; ``replaces`` is measured by the contract of norms.
MEASURED = ("parameters", "replaces")
#: Arguments that say how large a part is, and cannot be 0.
_SIZES = (
    *("d_model", "num_heads", "channels", "out_channels", "normalized_shape", "num_codes", "pairs", "hidden", "groups"),
    *("landmarks", "branches", "tokens", "k1"),
)

_OPERATORS: dict[type[ast.AST], Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    ast.USub: operator.neg,
    ast.Not: operator.not_,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
_FUNCTIONS: dict[str, Callable[..., Any]] = {"min": min, "max": max, "int": int, "round": round}


def evaluate(formula: str | float, names: Mapping[str, Any]) -> float:
    """Return the value of a declared formula: arithmetic, comparisons, ``a if b else c``, min, max, int and round only.

    Args:
        formula: the formula in Python's notation, or its value.
        names: the values of its names.

    Raises:
        BadInput: it holds anything else.

    Example:
        >>> evaluate("4 * d_model**2 + 2 * num_heads", {"d_model": 3, "num_heads": 2})
        40
        >>> evaluate("__import__('os')", {})
        Traceback (most recent call last):
        torchgraft.errors.BadInput: a declared formula may use only arithmetic on arguments, got "__import__('os')"
    """

    def value(node: ast.AST) -> Any:
        match node:
            case ast.Expression(body=body):
                return value(body)
            case ast.Constant(value=int() | float() | str() as constant):
                return constant
            case ast.Name(id=name) if name in names:
                return names[name]
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
                return _OPERATORS[type(op)](value(left), value(right))
            case ast.UnaryOp(op=op, operand=operand) if type(op) in _OPERATORS:
                return _OPERATORS[type(op)](value(operand))
            case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in _OPERATORS:
                return _OPERATORS[type(op)](value(left), value(right))
            case ast.IfExp(test=test, body=body, orelse=other):
                return value(body) if value(test) else value(other)
            case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in _FUNCTIONS:
                return _FUNCTIONS[name](*(value(arg) for arg in args))
        raise BadInput(f"a declared formula may use only arithmetic on arguments, got {ast.unparse(node)!r}")

    try:
        found: float = value(ast.parse(str(formula), mode="eval"))
    except SyntaxError as error:
        raise BadInput(f"a declared formula must be one expression, got {formula!r}") from error
    return found


def gradients(module: nn.Module, out: Tensor, x: Tensor, *, seed: int = 0) -> dict[str, Tensor | None]:
    """Return the gradients of a random projection of ``out``, by name: ``"x"`` and every parameter."""
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(out.shape, generator=draw, dtype=torch.float64).to(out.dtype)
    named = {"x": x, **{name: value for name, value in module.named_parameters() if value.requires_grad}}
    return dict(
        zip(named, torch.autograd.grad((out * weight).sum(), list(named.values()), allow_unused=True), strict=True)
    )


def compare_gradients(
    left: Mapping[str, Tensor | None], right: Mapping[str, Tensor | None], tolerance: float, what: str
) -> None:
    """Require that two sets of gradients agree; a missing gradient counts as zero."""
    for name, expected in right.items():
        found = left[name]
        if found is None and expected is None:
            continue
        zero = torch.zeros_like(found if expected is None else expected)  # type: ignore[arg-type]  # one is a tensor
        close(zero if found is None else found, zero if expected is None else expected, tolerance, f"{what}, d{name}")


def refused(call: Callable[[], object], what: str) -> None:
    """Require that ``call`` raises a one-line BadInput."""
    try:
        call()
    except BadInput as error:
        require("\n" not in str(error) and len(str(error)) > 10, f"{what}: the refusal is unclear: {error}")
    except Exception as error:  # whatever torch happened to raise is not a clear refusal
        require(False, f"{what}: {type(error).__name__}, not BadInput: {str(error)[:120]}")
    else:
        require(False, f"{what} is accepted")


def _input(subject: Subject, dtype: torch.dtype = torch.float32, *, grad: bool = False) -> Tensor:
    return draw_like(subject, dtype=dtype).requires_grad_(grad)


def check_part_is_what_the_card_says(subject: Subject) -> None:
    """The entry is an nn.Module class, keyword-only after its width, that the card's example builds in float32."""
    card, entry = subject.card, subject.entry
    require(isinstance(entry, type) and issubclass(entry, nn.Module), f"{card.entry} is no class of nn.Module")
    places = list(inspect.signature(entry).parameters.values())
    loose = [place.name for place in places[1:] if place.kind is not inspect.Parameter.KEYWORD_ONLY]
    require(not loose, f"{card.entry} takes {loose} by position; only the first argument may be")
    needed = [place.name for place in places if place.default is place.empty]
    require(needed in ([], [places[0].name]), f"{card.entry} needs {needed}; give all but the first a default")
    strange = sorted(card.example.keys() - {place.name for place in places})
    require(not strange, f"the example gives {strange}, which {card.entry} does not take")
    require(bool(card.example) and bool(card.shapes), "the card gives no example or no input shape")
    part = build_part(subject)
    require(hasattr(entry, "form") or not hasattr(part, "form"), f"give {card.entry} its 'form' as a class attribute")
    kinds = {value.dtype for value in part.parameters()}
    require(kinds <= {torch.float32}, f"{card.entry} makes parameters of {kinds}; the default dtype is float32")


def check_shapes_are_documented(subject: Subject) -> None:
    """The docstring of the class gives the shapes, in the letters of the library, and an example."""
    text = subject.entry.__doc__ or ""
    require("Shapes:" in text, f"the docstring of {subject.card.entry} has no 'Shapes:'")
    require("(B" in text.split("Shapes:")[1], f"'Shapes:' of {subject.card.entry} names no shape that begins with (B")
    require(">>>" in text, f"the docstring of {subject.card.entry} has no example")


def check_double_precision_agrees(subject: Subject) -> None:
    """Output and input gradient are finite, of the input's dtype, in float32 and in float64, and agree to 1e-3."""
    found = {}
    for dtype in (torch.float64, torch.float32):
        module, x = build_part(subject).to(dtype), _input(subject, dtype, grad=True)
        out = module(x)
        require(out.dtype == dtype, f"the output of a {dtype} input is {out.dtype}")
        require(bool(out.isfinite().all()), f"the output in {dtype} is not finite")
        grad = gradients(module, out, x)["x"]
        require(grad is not None and bool(grad.isfinite().all()), f"the input's gradient in {dtype} is not finite")
        found[dtype] = out
    close(found[torch.float32], found[torch.float64], SINGLE, "float32 beside float64")


def check_bfloat16_is_near_float32(subject: Subject) -> None:
    """In bfloat16 output and gradients are finite bfloat16, the output within 5 % of float32 on the same numbers."""
    module, x = build_part(subject).to(torch.bfloat16), _input(subject, torch.bfloat16, grad=True)
    out = module(x)
    require(out.dtype == torch.bfloat16, f"the output of a bfloat16 input is {out.dtype}")
    _finite(gradients(module, out, x), "bfloat16")
    _near(out, output(copy.deepcopy(module).float(), x.detach().float()), "bfloat16 beside float32")


def check_autocast_is_near_float32(subject: Subject) -> None:
    """Under autocast to bfloat16 the output is within 5 % of float32, and parameters get finite float32 gradients."""
    module, x = build_part(subject), _input(subject, grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = module(x)
    _near(out, output(module, x.detach()), "autocast beside float32")
    grads = gradients(module, out.float(), x)
    _finite(grads, "autocast")
    kinds = {value.dtype for value in grads.values() if value is not None}
    require(kinds == {torch.float32}, f"gradients under autocast are {kinds}")


def _near(out: Tensor, expected: Tensor, what: str) -> None:
    gap = (out.float() - expected).norm().item() / max(expected.norm().item(), 1e-6)
    require(gap <= HALF, f"{what}: differs by {gap:.3g} of the output's norm, {HALF} is allowed")


def _finite(grads: Mapping[str, Tensor | None], what: str) -> None:
    bad = [name for name, grad in grads.items() if grad is not None and not bool(grad.isfinite().all())]
    require(not bad, f"{what}: no finite gradient for {bad[:4]}")


def check_every_parameter_gets_a_gradient(subject: Subject) -> None:
    """Every parameter gets a gradient that is finite and not zero everywhere."""
    module, x = build_part(subject, dtype=torch.float64), _input(subject, torch.float64, grad=True)
    grads = gradients(module, module.train()(x), x)
    _finite(grads, "float64")
    idle = [name for name, grad in grads.items() if grad is None or not bool(grad.any())]
    require(not idle, f"no gradient reaches {idle[:4]}")


def check_gradients_are_the_derivatives(subject: Subject) -> None:
    """In float64 the gradients of input and parameters equal finite differences (torch's gradcheck)."""
    module = build_part(subject, dtype=torch.float64)
    sizes = (1, 5) if len(subject.card.shapes[0]) == 3 else (1,)
    x = draw_like(subject, *sizes, dtype=torch.float64).requires_grad_()
    names = [name for name, value in module.named_parameters() if value.requires_grad]
    values = [module.get_parameter(name) for name in names]

    def function(x: Tensor, *parameters: Tensor) -> Tensor:
        out: Tensor = torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), (x,))
        return out

    try:
        torch.autograd.gradcheck(function, (x, *values), fast_mode=True, atol=1e-6, rtol=1e-4)
    except RuntimeError as error:
        if not type(error).__name__.startswith("Gradcheck"):
            raise
        require(False, " ".join(str(error).split())[:300])


def check_weights_load_into_another(subject: Subject) -> None:
    """The state dict loads strictly into a part that started otherwise; outputs are then the same, bit for bit."""
    module, other, x = build_part(subject), build_part(subject, seed=7), _input(subject)
    other.load_state_dict(module.state_dict(), strict=True)
    same_state(module, other, "after loading")
    same_output(output(module, x), output(other, x), "after loading")


def check_weights_pass_through_safetensors(subject: Subject) -> None:
    """The state dict survives safetensors: names, dtypes and values, no tensor shared or left out."""
    module = build_part(subject)
    found, _ = unpack_tensors(pack_tensors(module.state_dict()))
    require(found.keys() == module.state_dict().keys(), f"lost {sorted(module.state_dict().keys() ^ found.keys())[:4]}")
    other = build_part(subject, seed=7)
    other.load_state_dict(found)
    same_state(module, other, "through safetensors")


def check_deepcopy_is_equal_and_apart(subject: Subject) -> None:
    """A deep copy gives the same outputs bit for bit, and zeroing the copy leaves the first alone."""
    module, x = build_part(subject), _input(subject)
    expected = output(module, x)
    twin = copy.deepcopy(module)
    same_output(expected, output(twin, x), "deep copy")
    with torch.no_grad():
        for value in (*twin.parameters(), *twin.buffers()):
            value.zero_()
    same_output(expected, output(module, x), "after its copy was zeroed")


def check_same_input_gives_the_same_output(subject: Subject) -> None:
    """In eval mode the output is bit for bit the same whenever and in whatever gradient mode it is called."""
    module, x = build_part(subject), _input(subject)
    first = output(module, x)
    same_output(first, output(module, x), "called again")
    with torch.inference_mode():
        same_output(first, module(x), "in inference mode")
    close(module(x.requires_grad_()), first, 1e-5, "while gradients are recorded")


def check_training_repeats_with_the_seed(subject: Subject) -> None:
    """In training mode one seed gives one output and one set of gradients, bit for bit."""
    module, x = build_part(subject).train(), _input(subject, grad=True)
    runs = []
    for _ in range(2):
        with torch.random.fork_rng():
            torch.manual_seed(3)
            twin = copy.deepcopy(module)
            out = twin(x)
            runs.append((out.detach(), gradients(twin, out, x)))
    same_output(runs[0][0], runs[1][0], "training with one seed")
    compare_gradients(runs[0][1], runs[1][1], 0.0, "training with one seed")


def check_surroundings_stay(subject: Subject) -> None:
    """A pass in eval mode changes nothing else: input, weights, buffers, hooks, modes, random state, default dtype."""
    module, x = build_part(subject), _input(subject)
    kept, before, parts, around = x.clone(), copy.deepcopy(module), fittings(module), surroundings()
    output(module, x)
    same_output(kept, x, "the input after the pass")
    same_state(before, module, "the part after the pass")
    for found, expected in ((fittings(module), parts), (surroundings(), around)):
        moved = [name for name in expected if found[name] != expected[name]]
        require(not moved, f"a pass changes {', '.join(moved)}")


def check_frozen_parameters_stay_out(subject: Subject) -> None:
    """With all parameters frozen the gradient of the input is what it was, and no parameter gets one."""
    module, x = build_part(subject, dtype=torch.float64), _input(subject, torch.float64, grad=True)
    expected = gradients(module, module(x), x)["x"]
    module.requires_grad_(False)
    out = module(x)
    require(out.requires_grad, "with frozen parameters no gradient reaches the input")
    compare_gradients(gradients(module, out, x), {"x": expected}, EXACT, "frozen")
    require(all(value.grad is None for value in module.parameters()), "a frozen parameter has a gradient")


def check_declared_numbers_are_true(subject: Subject) -> None:
    """The declared parameter formula, evaluated with the example's numbers, is the count of the built module."""
    card = subject.card
    strange = sorted(card.declared.keys() - set(MEASURED))
    require(not strange, f"declared {strange} is measured by no check; the checks measure {', '.join(MEASURED)}")
    require("parameters" in card.declared, "the card declares no parameter formula")
    defaults = {
        name: place.default
        for name, place in inspect.signature(subject.entry).parameters.items()
        if isinstance(place.default, (int, float, str))
    }
    expected = evaluate(card.declared["parameters"], {**defaults, **settings(card)})
    found = sum(value.numel() for value in build_part(subject).parameters())
    require(found == expected, f"{found} parameters, {card.declared['parameters']!r} says {expected:g}")


def check_compiles_without_breaks(subject: Subject) -> None:
    """torch.compile(fullgraph=True) gives the same output and gradients (backend aot_eager)."""
    module, x = build_part(subject, dtype=torch.float64), _input(subject, torch.float64, grad=True)
    expected = module(x)
    torch._dynamo.reset()
    try:
        out = torch.compile(module, fullgraph=True, backend="aot_eager")(x)
        close(out, expected, EXACT, "compiled beside eager")
        compare_gradients(gradients(module, out, x), gradients(module, expected, x), EXACT, "compiled beside eager")
    except torch._dynamo.exc.TorchDynamoException as error:
        require(False, " ".join(str(error).split())[:300])
    finally:
        torch._dynamo.reset()


def check_exports_to_a_graph(subject: Subject) -> None:
    """torch.export gives one graph without Python control flow, with the same output and the same weights."""
    module, x = build_part(subject, dtype=torch.float64), _input(subject, torch.float64)
    try:
        program = torch.export.export(module, (x,), strict=False)
    except (RuntimeError, torch._dynamo.exc.TorchDynamoException) as error:
        require(False, f"torch.export: {' '.join(str(error).split())[:300]}")
        return
    close(output(program.module(), x), output(module, x), EXACT, "exported beside eager")
    require(program.state_dict.keys() == module.state_dict().keys(), "the exported weights have other names")


def check_runs_on_another_device(subject: Subject) -> None:
    """Moved to the meta device it runs there: every tensor that it makes stands where its input does."""
    module, x = build_part(subject).to("meta"), _input(subject).to("meta")
    expected = output(build_part(subject), _input(subject)).shape
    try:
        out = module(x)
    except RuntimeError as error:
        require(False, f"on the meta device: {' '.join(str(error).split())[:200]}")
        return
    require(out.is_meta and out.shape == expected, f"on the meta device: {out.device}, shape {tuple(out.shape)}")


def check_tensors_are_registered(subject: Subject) -> None:
    """Every tensor that the part holds is a parameter or a buffer, so that .to() moves all floating ones."""
    module = build_part(subject)
    module(_input(subject))
    hidden = [
        f"{name or 'self'}.{attribute}"
        for name, child in module.named_modules()
        for attribute, value in vars(child).items()
        if isinstance(value, Tensor)
    ]
    require(not hidden, f"{hidden[:4]} hold tensors that .to() and state_dict() do not see")
    module.to(torch.float64)
    named = (*module.named_parameters(), *module.named_buffers())
    left = [name for name, value in named if value.is_floating_point() and value.dtype != torch.float64]
    require(not left, f"{left[:4]} stay behind when the part moves to float64")


def check_batch_of_none_and_one(subject: Subject) -> None:
    """A batch of none gives an output of none and zero gradients; a batch of one gives one."""
    module = build_part(subject)
    whole = output(module, _input(subject))
    for size in (0, 1):
        x = _input(subject)[:size].requires_grad_()
        out = module(x)
        require(out.shape == (size, *whole.shape[1:]), f"a batch of {size} gives {tuple(out.shape)}")
        grads = gradients(module, out, x)
        _finite(grads, f"a batch of {size}")
        some = [name for name, grad in grads.items() if grad is not None and size == 0 and bool(grad.any())]
        require(not some, f"a batch of none gives a gradient to {some[:4]}")


def check_memory_layout_does_not_matter(subject: Subject) -> None:
    """Inputs that are not contiguous in memory (transposed, strided, expanded) give the outputs of their copies."""
    module, x = build_part(subject, dtype=torch.float64), _input(subject, torch.float64)
    layouts = {
        "transposed": x.transpose(0, 1).contiguous().transpose(0, 1),
        "strided": x.repeat_interleave(2, dim=-1)[..., ::2],
        "expanded": x[:1].expand_as(x),
    }
    for name, value in layouts.items():
        close(output(module, value), output(module, value.clone(memory_format=torch.contiguous_format)), EXACT, name)


def check_wrong_shape_is_refused(subject: Subject) -> None:
    """An input of another width or number of dimensions is refused by a one-line BadInput."""
    module, x = build_part(subject), _input(subject)
    axis = 1 if "channels-first" in subject.card.capabilities else x.ndim - 1
    one, rest = x.narrow(axis, 0, 1), x.narrow(axis, 1, x.shape[axis] - 1)
    wrong = {"too wide": torch.cat([x, one], axis), "too narrow": rest, "no batch": x[0], "deeper": x[None]}
    for name, value in wrong.items():
        refused(lambda value=value: module(value), f"an input {name}, {tuple(value.shape)},")  # type: ignore[misc]


def check_integers_are_refused(subject: Subject) -> None:
    """An input of integers is refused by a one-line BadInput."""
    module, x = build_part(subject), _input(subject)
    refused(lambda: module(x.long()), "an input of int64")


def check_bad_settings_are_refused(subject: Subject) -> None:
    """Each size of the example set to 0 or -1 is refused by a one-line BadInput when the part is built."""
    example = settings(subject.card)
    sizes = [name for name in _SIZES if name in example]
    require(bool(sizes), f"the example gives no size: none of {', '.join(_SIZES)}")
    for name in sizes:
        for value in (0, -1):
            refused(lambda name=name, value=value: subject.entry(**{**example, name: value}), f"{name}={value}")  # type: ignore[misc]


def check_extremes_stay_finite(subject: Subject) -> None:
    """Inputs of zeros, of ones and a thousand times too large give finite outputs and gradients in float32."""
    module, x = build_part(subject, moved=False), _input(subject)
    for name, value in {"zeros": 0 * x, "ones": x.new_ones(x.shape), "1000 x": 1e3 * x}.items():
        value.requires_grad_()
        out = module(value)
        require(bool(out.isfinite().all()), f"{name}: the output is not finite")
        _finite(gradients(module, out, value), name)


def _is_part(card: Card) -> bool:
    return card.kind == "part"


def _is_compilable(card: Card) -> bool:
    return _is_part(card) and "compilable" in card.capabilities


CHECKS = (
    *(
        Check(function, _is_part)
        for function in (
            check_part_is_what_the_card_says,
            check_shapes_are_documented,
            check_declared_numbers_are_true,
            check_double_precision_agrees,
            check_bfloat16_is_near_float32,
            check_autocast_is_near_float32,
            check_every_parameter_gets_a_gradient,
            check_gradients_are_the_derivatives,
            check_frozen_parameters_stay_out,
            check_weights_load_into_another,
            check_weights_pass_through_safetensors,
            check_deepcopy_is_equal_and_apart,
            check_tensors_are_registered,
            check_same_input_gives_the_same_output,
            check_training_repeats_with_the_seed,
            check_surroundings_stay,
            check_batch_of_none_and_one,
            check_memory_layout_does_not_matter,
            check_wrong_shape_is_refused,
            check_integers_are_refused,
            check_bad_settings_are_refused,
            check_extremes_stay_finite,
        )
    ),
    Check(check_compiles_without_breaks, _is_compilable),
    Check(check_exports_to_a_graph, _is_compilable),
    Check(check_runs_on_another_device, _is_compilable),
)
