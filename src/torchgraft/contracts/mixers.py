"""The contract of sequence mixers: who sees whom, one result in every form, and cost that grows as declared.

The row "mixers" of the design. Sameness is checked in float64 to 1e-9, outputs and all gradients, at lengths from 1 to
300 that are drawn anew for every method (from its key, so that they stay the same from run to run).
"""

from __future__ import annotations

import copy
import itertools
import math
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from torchgraft.bench.files import pack_tensors, unpack_tensors
from torchgraft.catalogue import Card
from torchgraft.catalogue.registry import entry
from torchgraft.contracts.check import Check, CheckFailure, Subject, require
from torchgraft.contracts.modules import EXACT, HALF, compare_gradients, gradients, refused
from torchgraft.contracts.sameness import close, equal, same_output
from torchgraft.contracts.subjects import build_part, draw_like, output
from torchgraft.engines.recurrence.mixer import Mixer, State, StatefulMixer

__all__ = ["CHECKS", "Meter", "draw_lengths"]

_DOUBLE = torch.float64
#: Roundoff of an FFT, which spreads over all tokens; anything else that leaks is far larger.
_LEAK = 1e-11
#: T log T stays below this exponent between the two lengths, T to the power of 1.5 does not.
_LINEAR = 1.2
_SHORT, _FAR = 512, 4096
#: Tokens of the longest input, and where there is a form that need not go token by token.
_LONG, _LONGEST = 20_000, 100_000


def draw_lengths(key: str) -> tuple[int, int, int]:
    """Return three lengths for the method ``key``: 1, an odd one up to 63, and one from 65 to 300.

    Example:
        >>> draw_lengths("gla") == draw_lengths("gla")
        True
    """
    draw = torch.Generator().manual_seed(zlib.crc32(key.encode()))
    odd, long = torch.randint(1, 32, (), generator=draw), torch.randint(65, 301, (), generator=draw)
    return 1, 2 * int(odd) + 1, int(long)


class Meter(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's __init_subclass__
    """Counts what a computation does: multiplications of matrix products, and every element that it writes.

    Views write nothing. Counts do not depend on the machine, and repeat exactly.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self.work = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if not func.is_view:
            self.work += sum(value.numel() for value in tree_leaves(out) if isinstance(value, Tensor))
        if func._overloadpacket in flop_registry:
            self.work += flop_registry[func._overloadpacket](*args, **kwargs, out_val=out)
        return out


@contextmanager
def _saved() -> Iterator[dict[int, int]]:
    """Collect the memory that is kept for the backward pass, address -> bytes, while the graph is alive."""
    found: dict[int, int] = {}

    def pack(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        yield found


def _mixer(subject: Subject, **options: Any) -> Mixer:
    found = build_part(subject, **options)
    if not isinstance(found, Mixer):
        raise CheckFailure(f"{subject.card.entry} is no Mixer")
    return found


def _stateful(subject: Subject, **options: Any) -> StatefulMixer:
    found = build_part(subject, **options)
    if not isinstance(found, StatefulMixer):
        raise CheckFailure(f"{subject.card.entry} is no StatefulMixer, though the card says stateful")
    return found


def _draw(subject: Subject, batch: int, tokens: int, *, seed: int = 0, dtype: torch.dtype = _DOUBLE) -> Tensor:
    return draw_like(subject, batch, tokens, seed=seed, dtype=dtype)


def _lengths(subject: Subject) -> tuple[int, int, int]:
    return draw_lengths(subject.card.key)


def check_mixer_keeps_the_shape(subject: Subject) -> None:
    """The output has the shape of the input at any length, one token included, and is finite."""
    mixer = _mixer(subject, dtype=torch.float32)
    for tokens in (1, 2, 3, 16, 31, 64, 65):
        x = _draw(subject, 2, tokens, dtype=torch.float32)
        out = output(mixer, x)
        require(out.shape == x.shape, f"{tuple(x.shape)} becomes {tuple(out.shape)}")
        require(bool(out.isfinite().all()), f"not finite at {tokens} tokens")


def check_rows_do_not_see_each_other(subject: Subject) -> None:
    """Each sequence of a batch, mixed alone, gives what it gives in the batch (1e-9)."""
    mixer = _mixer(subject, dtype=_DOUBLE)
    x = _draw(subject, 3, 21)
    whole = output(mixer, x)
    for row in range(3):
        close(output(mixer, x[row : row + 1]), whole[row : row + 1], EXACT, f"row {row} alone")


def check_tokens_see_each_other(subject: Subject) -> None:
    """The output of the second token depends on the first, and that of each token on itself."""
    mixer = _mixer(subject, dtype=_DOUBLE)
    x = _draw(subject, 1, 8)
    base = output(mixer, x)
    for place, seen in ((0, 1), (0, 0), (5, 5)):
        other = x.clone()
        other[:, place] = -x[:, place] + 0.5
        gap = (output(mixer, other) - base)[:, seen].abs().max().item()
        require(gap > 1e-9, f"the output of token {seen} moves by {gap:.3g} when token {place} is another")


def check_packed_equals_each_alone(subject: Subject) -> None:
    """Sequences that stand one after another in one tensor give what each gives alone (1e-9)."""
    mixer = _mixer(subject, dtype=_DOUBLE)
    lengths = [5, 1, *_lengths(subject)[1:2], 70]
    ends = torch.tensor([0, *itertools.accumulate(lengths)])
    x = _draw(subject, 1, sum(lengths))
    with torch.no_grad():
        found = mixer.packed(x, ends)
    require(found.shape == x.shape, f"packed {tuple(x.shape)} becomes {tuple(found.shape)}")
    for piece, alone in zip(torch.split(found, lengths, 1), torch.split(x, lengths, 1), strict=True):
        close(piece, output(mixer, alone), EXACT, f"a sequence of {alone.shape[1]} tokens in a pack of {lengths}")
    refused(lambda: mixer.packed(x, ends[:-1]), "cu_seqlens that end too early")


def check_future_is_not_seen(subject: Subject) -> None:
    """Other tokens after t leave the outputs up to t as they were (float64, up to the roundoff of an FFT)."""
    mixer = _mixer(subject, dtype=_DOUBLE)
    require(mixer.causal, "the card says causal, the mixer's attribute does not")
    x = _draw(subject, 1, 70)
    base = output(mixer, x)
    for place in (1, 16, 37, 69):
        other = x.clone()
        other[:, place:] = 3.0 * _draw(subject, 1, 70 - place, seed=place)
        gap = (output(mixer, other) - base)[:, :place].abs().max().item()
        require(gap <= _LEAK, f"other tokens from {place} on move the outputs before them by {gap:.3g}")


def check_future_gets_no_gradient(subject: Subject) -> None:
    """The derivative of the output at t by the inputs after t is zero, and by the input at t is not."""
    mixer = _mixer(subject, dtype=_DOUBLE)
    for tokens, place in ((12, 0), (12, 7), (66, 33)):
        x = _draw(subject, 1, tokens).requires_grad_()
        out = mixer(x)[:, place]
        grad = torch.autograd.grad((out * _draw(subject, 1, 1, seed=9)[:, 0]).sum(), x)[0][0].abs().amax(-1)
        leak = grad[place + 1 :].max().item()
        require(leak <= _LEAK, f"the output of token {place} has a derivative of {leak:.3g} by a later one")
        require(grad[place].item() > 0, f"the output of token {place} has no derivative by that token")


def check_padding_does_not_matter(subject: Subject) -> None:
    """Tokens of padding after the end, however many, leave the outputs of the sequence as they were (1e-9)."""
    mixer = _mixer(subject, dtype=_DOUBLE)
    for tokens in _lengths(subject)[:2]:
        x = _draw(subject, 2, tokens)
        for tail in (1, 40, 64):
            padded = torch.cat([x, x.new_zeros(2, tail, x.shape[-1])], 1)
            close(output(mixer, padded)[:, :tokens], output(mixer, x), EXACT, f"{tokens} tokens and {tail} of padding")


def check_future_is_seen_where_not_causal(subject: Subject) -> None:
    """A mixer that is not declared causal does look ahead: a later token moves an earlier output."""
    mixer = _mixer(subject, dtype=_DOUBLE)
    require(not mixer.causal, "the mixer's attribute says causal, the card does not")
    x = _draw(subject, 1, 12)
    other = torch.cat([x[:, :8], _draw(subject, 1, 4, seed=9)], 1)
    gap = (output(mixer, other) - output(mixer, x))[:, :8].abs().max().item()
    require(gap > 1e-9, f"outputs move by {gap:.3g} when later tokens change; declare the mixer causal")


def check_order_does_not_matter(subject: Subject) -> None:
    """Tokens in another order give the same outputs in that order (1e-9)."""
    mixer = _mixer(subject, dtype=_DOUBLE)
    for tokens in (2, 33, 70):
        x = _draw(subject, 2, tokens)
        order = torch.randperm(tokens, generator=torch.Generator().manual_seed(tokens))
        close(output(mixer, x[:, order]), output(mixer, x)[:, order], EXACT, f"{tokens} tokens in another order")


def check_prefill_is_forward(subject: Subject) -> None:
    """A prefill without a state and one from init_state both give the full pass, and the same state (1e-9)."""
    mixer = _stateful(subject, dtype=_DOUBLE)
    for tokens in _lengths(subject):
        x = _draw(subject, 2, tokens)
        with torch.no_grad():
            (bare, first), (begun, second) = mixer.prefill(x), mixer.prefill(x, mixer.init_state(2))
        close(bare, output(mixer, x), EXACT, f"prefill of {tokens} tokens")
        close(begun, bare, EXACT, f"prefill of {tokens} tokens from init_state")
        _same_state(second, first, f"{tokens} tokens from init_state")


def _same_state(left: State, right: State, what: str) -> None:
    require(left.keys() == right.keys(), f"{what}: states hold {sorted(left)} and {sorted(right)}")
    for name in right:
        close(left[name], right[name], EXACT, f"{what}, state {name!r}")


def _in_pieces(mixer: StatefulMixer, x: Tensor, cuts: Sequence[int]) -> tuple[Tensor, State]:
    """Mix ``x`` piece by piece, carrying the state."""
    state = mixer.init_state(len(x))
    pieces = []
    for begin, end in itertools.pairwise((0, *cuts, x.shape[1])):
        y, state = mixer.prefill(x[:, begin:end], state)
        pieces.append(y)
    return torch.cat(pieces, 1), state


def _total(out: Tensor, state: State) -> Tensor:
    """Return a number to which every output and every state contributes, each in its own way."""
    draw = torch.Generator().manual_seed(5)
    total = (out * torch.randn(out.shape, generator=draw, dtype=out.dtype)).sum()
    for name in sorted(state):
        if state[name].requires_grad:
            total = total + state[name].square().sum()
    return total


def _compare(mixer: StatefulMixer, x: Tensor, found: Tensor, state: State, what: str) -> None:
    """Compare an output, the state after it, and the gradients of both with those of one whole prefill."""
    expected, last = mixer.prefill(x)
    close(found, expected, EXACT, what)
    _same_state(state, last, what)
    ours, theirs = (gradients(mixer, _total(*pair), x) for pair in ((found, state), (expected, last)))
    compare_gradients(ours, theirs, EXACT, what)


def check_split_anywhere_equals_whole(subject: Subject) -> None:
    """Prefills of pieces cut anywhere, the state carried over, give the whole: outputs, states, gradients (1e-9)."""
    mixer = _stateful(subject, dtype=_DOUBLE)
    _, odd, long = _lengths(subject)
    draw = torch.Generator().manual_seed(odd)
    for tokens, count in ((odd, 1), (odd, 2), (long, 3)):
        x = _draw(subject, 2, tokens).requires_grad_()
        cuts = sorted({int(cut) for cut in torch.randint(1, tokens, (count,), generator=draw)})
        _compare(mixer, x, *_in_pieces(mixer, x, cuts), f"{tokens} tokens cut at {cuts}")


def check_steps_equal_forward(subject: Subject) -> None:
    """One token at a time gives the full pass: outputs, the last state and all gradients (1e-9)."""
    mixer = _stateful(subject, dtype=_DOUBLE)
    for tokens in _lengths(subject):
        x = _draw(subject, 2, tokens).requires_grad_()
        state, outs = mixer.init_state(2), []
        for place in range(tokens):
            y, state = mixer.step(x[:, place], state)
            require(y.shape == (2, x.shape[-1]), f"a step gives {tuple(y.shape)}")
            outs.append(y)
        _compare(mixer, x, torch.stack(outs, 1), state, f"{tokens} steps")


def check_forms_agree(subject: Subject) -> None:
    """form = step, chunk and parallel give the same outputs, states and gradients (1e-9), from a carried state too."""
    mixer: Any = _mixer(subject, dtype=_DOUBLE)
    for tokens in _lengths(subject):
        x = _draw(subject, 2, tokens + 3).requires_grad_()
        expected: tuple[Tensor, State, Any] | None = None
        for form in ("step", "chunk", "parallel", "auto"):
            mixer.form = form
            if isinstance(mixer, StatefulMixer):
                out, state = mixer.prefill(x[:, 3:], mixer.prefill(x[:, :3])[1])
            else:
                out, state = mixer(x), {}
            found = (out, state, gradients(mixer, _total(out, state), x))
            if expected is None:
                expected = found
                continue
            what = f"{form} beside step at {tokens} tokens"
            close(out, expected[0], EXACT, what)
            _same_state(state, expected[1], what)
            compare_gradients(found[2], expected[2], EXACT, what)


def check_state_keeps_its_form(subject: Subject) -> None:
    """States are tensors, batch first, for batches of 0, 1 and 3; names and dtypes stay as init_state gave them."""
    for dtype in (torch.float32, torch.bfloat16):
        mixer = _stateful(subject).to(dtype)
        for size in (0, 1, 3):
            state = mixer.init_state(size)
            forms = {name: value.dtype for name, value in state.items()}
            require(bool(state), "the state is empty")
            with torch.no_grad():
                later = mixer.prefill(_draw(subject, size, 9, dtype=dtype), state)[1]
                latest = mixer.step(_draw(subject, size, 1, dtype=dtype)[:, 0], later)[1]
            for held in (state, later, latest):
                wrong = [name for name, value in held.items() if value.ndim < 1 or len(value) != size]
                require(not wrong, f"the states {wrong} of a batch of {size} do not have the batch first")
                found = {name: value.dtype for name, value in held.items()}
                require(found == forms, f"in {dtype} the state goes from {forms} to {found}")


def check_state_does_not_grow(subject: Subject) -> None:
    """The state has the same shapes before the first token and after 300, and a step costs the same at any place."""
    mixer = _stateful(subject)
    shapes, costs = [], []
    for tokens in (0, 1, 300):
        state = mixer.init_state(2)
        with torch.no_grad():
            if tokens:
                state = mixer.prefill(_draw(subject, 2, tokens, dtype=torch.float32), state)[1]
            shapes.append({name: tuple(value.shape) for name, value in state.items()})
            with Meter() as meter:
                mixer.step(_draw(subject, 2, 1, dtype=torch.float32)[:, 0], state)
        costs.append(meter.work)
    require(shapes[0] == shapes[1] == shapes[2], f"the state has shapes {shapes[0]}, then {shapes[2]} after 300 tokens")
    require(costs[0] == costs[1] == costs[2], f"a step costs {costs} operations after 0, 1 and 300 tokens")


def check_state_is_not_changed(subject: Subject) -> None:
    """Going on from a state leaves it bit for bit as it was, so that one prompt serves many continuations."""
    mixer = _stateful(subject)
    x = _draw(subject, 2, 20, dtype=torch.float32)
    with torch.no_grad():
        state = mixer.prefill(x[:, :9])[1]
        kept = copy.deepcopy(state)
        first = mixer.step(x[:, 9], state)
        ahead = copy.deepcopy(first[1])
        for what in ("a step", "a prefill"):
            if what == "a step":
                mixer.step(x[:, 10], state)
            else:
                mixer.prefill(x, state)
            moved = [name for name in kept if not equal(kept[name], state[name])]
            require(not moved, f"{what} changes the states {moved} that it started from")
            other = [name for name in ahead if not equal(ahead[name], first[1][name])]
            require(not other, f"{what} from the same state changes the states {other} of another continuation")
        same_output(first[0], mixer.step(x[:, 9], state)[0], "the same step, taken again")
        same_output(first[0], mixer.step(x[:, 9], kept)[0], "the same step, from a copy of the state")


def check_state_can_be_kept_and_sorted(subject: Subject) -> None:
    """A state goes through safetensors unharmed, and its rows may be chosen and reordered, as beam search does."""
    mixer = _stateful(subject, dtype=_DOUBLE)
    x, order = _draw(subject, 3, 20), torch.tensor([2, 0, 0])
    with torch.no_grad():
        state = mixer.prefill(x[:, :9])[1]
        expected = mixer.prefill(x[order, 9:], mixer.prefill(x[order, :9])[1])[0]
        back, _ = unpack_tensors(pack_tensors({name: value.contiguous() for name, value in state.items()}))
        found = mixer.prefill(x[order, 9:], {name: value[order] for name, value in back.items()})[0]
    close(found, expected, EXACT, f"rows {order.tolist()} of a state that was kept")


def check_wrong_state_is_refused(subject: Subject) -> None:
    """A state of another batch, or without its entries, and a token of another width raise an error."""
    mixer = _stateful(subject)
    x = _draw(subject, 2, 4, dtype=torch.float32)
    for what, state in {"a state of 3 rows for 2": mixer.init_state(3), "an empty state": {}}.items():
        try:
            with torch.no_grad():
                mixer.prefill(x, state)
        except (ValueError, RuntimeError, KeyError, IndexError):
            continue
        require(False, f"{what} is accepted")
    refused(lambda: mixer.step(x[:, 0, :-1], mixer.init_state(2)), "a token that is too narrow")
    refused(lambda: mixer.step(x[:, :1], mixer.init_state(2)), "a token with a length of its own")


def check_steps_work_in_bfloat16(subject: Subject) -> None:
    """In bfloat16, and under autocast, a prefill and steps after it give the full pass within 5 %."""
    for what, dtype in (("bfloat16", torch.bfloat16), ("autocast", torch.float32)):
        mixer, x = _stateful(subject).to(dtype), _draw(subject, 2, 16, dtype=dtype)
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=what == "autocast"):
            expected = mixer(x).float()
            y, state = mixer.prefill(x[:, :8])
            outs = [y]
            for place in range(8, 16):
                y, state = mixer.step(x[:, place], state)
                outs.append(y[:, None])
        gap = (torch.cat(outs, 1).float() - expected).norm().item() / max(expected.norm().item(), 1e-6)
        require(gap <= HALF, f"{what}: steps differ from the full pass by {gap:.3g} of its norm")


def _growth(subject: Subject) -> tuple[float, float]:
    """Return the exponents of work and of kept memory between the two lengths."""
    if "growth" not in subject.kept:
        found = []
        mixer = _mixer(subject, moved=False)
        for tokens in (_SHORT, _FAR):
            x = _draw(subject, 1, tokens, dtype=torch.float32).requires_grad_()
            with _saved() as kept, Meter() as meter:
                out = mixer(x)
            found.append((meter.work, sum(kept.values())))
            del out
        subject.kept["growth"] = tuple(
            math.log(max(far, 1) / max(near, 1)) / math.log(_FAR / _SHORT) for near, far in zip(*found, strict=True)
        )
    exponents: tuple[float, float] = subject.kept["growth"]
    return exponents


def check_work_grows_linearly(subject: Subject) -> None:
    """From 512 to 4096 tokens, counted operations of the full pass grow with an exponent of at most 1.2."""
    work, _ = _growth(subject)
    require(work <= _LINEAR, f"work grows as T^{work:.2f}")


def check_kept_memory_grows_linearly(subject: Subject) -> None:
    """From 512 to 4096 tokens, the memory kept for the backward pass grows with an exponent of at most 1.2."""
    _, memory = _growth(subject)
    require(memory <= _LINEAR, f"kept memory grows as T^{memory:.2f}")


def check_long_extreme_input_stays_finite(subject: Subject) -> None:
    """20000 tokens (100000 where form may be chunk) a thousand times too large give finite outputs and states."""
    mixer = _mixer(subject, moved=False)
    x = 1e3 * _draw(subject, 1, _LONGEST if hasattr(mixer, "form") else _LONG, dtype=torch.float32)
    found: State = {}
    with torch.no_grad():
        if isinstance(mixer, StatefulMixer):
            out, found = mixer.prefill(x)
        else:
            out = mixer(x)
    for name, value in {"outputs": out, **found}.items():
        bad = int((~value.isfinite()).sum())
        require(bad == 0, f"{bad} of {value.numel()} entries of the {name} are not finite")


def _is_mixer(card: Card) -> bool:
    # What pools tokens, or mixes those of a grid of its own shape, maps no (B, T, D) to (B, T, D).
    return card.kind == "part" and card.family == "parts/mixers" and not card.capabilities & {"pooling", "grid"}


def _declares(*capabilities: str) -> Any:
    return lambda card: _is_mixer(card) and card.capabilities >= set(capabilities)


def _lacks_causality(card: Card) -> bool:
    return _is_mixer(card) and "causal" not in card.capabilities


def _has_forms(card: Card) -> bool:
    return _is_mixer(card) and hasattr(entry(card), "form")


CHECKS = (
    Check(check_mixer_keeps_the_shape, _is_mixer),
    Check(check_rows_do_not_see_each_other, _is_mixer),
    Check(check_tokens_see_each_other, _is_mixer),
    Check(check_packed_equals_each_alone, _is_mixer),
    Check(check_future_is_not_seen, _declares("causal")),
    Check(check_future_gets_no_gradient, _declares("causal")),
    Check(check_padding_does_not_matter, _declares("causal")),
    Check(check_future_is_seen_where_not_causal, _lacks_causality),
    Check(check_order_does_not_matter, _declares("permutation-equivariant")),
    Check(check_forms_agree, _has_forms),
    Check(check_prefill_is_forward, _declares("stateful")),
    Check(check_split_anywhere_equals_whole, _declares("stateful")),
    Check(check_steps_equal_forward, _declares("stateful")),
    Check(check_state_keeps_its_form, _declares("stateful")),
    Check(check_state_is_not_changed, _declares("stateful")),
    Check(check_state_can_be_kept_and_sorted, _declares("stateful")),
    Check(check_wrong_state_is_refused, _declares("stateful")),
    Check(check_steps_work_in_bfloat16, _declares("stateful")),
    Check(check_state_does_not_grow, _declares("stateful", "linear-time")),
    Check(check_work_grows_linearly, _declares("linear-time")),
    Check(check_kept_memory_grows_linearly, _declares("linear-time")),
    Check(check_long_extreme_input_stays_finite, _declares("linear-time")),
)
