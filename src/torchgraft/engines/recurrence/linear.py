"""Linear recurrences over tokens: ``S_t = A_t S_{t-1} + k_t v_t^T``, ``o_t = S_t^T q_t``, in every form.

The only place where sequences are cut into chunks. Transitions: none, a decay a head, a decay a channel, the delta rule
(identity minus rank one), the delta rule after a decay, products of several Householder steps a token, and the additive
recurrence, which is a decay a channel in disguise.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from torchgraft.engines.recurrence import fla_backend
from torchgraft.engines.recurrence.chunk import chunk_form
from torchgraft.engines.recurrence.packing import lengths_of
from torchgraft.engines.recurrence.parallel import parallel_form
from torchgraft.engines.recurrence.step import step_form
from torchgraft.errors import BadInput

__all__ = ["FORMS", "Form", "additive_recurrence", "householder_recurrence", "linear_recurrence", "with_state"]

Form = Literal["auto", "step", "chunk", "parallel"]
Backend = Literal["auto", "torch", "fla"]
FORMS: tuple[Form, ...] = ("auto", "step", "chunk", "parallel")
BACKENDS: tuple[Backend, ...] = ("auto", "torch", "fla")


def linear_recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_decay: Tensor | None = None,
    beta: Tensor | None = None,
    scale: float | None = None,
    state: Tensor | None = None,
    return_state: bool = False,
    form: Form = "auto",
    chunk: int = 64,
    backend: Backend = "auto",
    cu_seqlens: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return ``o_t = scale * S_t^T q_t`` with ``S_t = (I - beta_t k_t k_t^T) diag(exp(log_decay_t)) S_{t-1} + ...``.

    What is added is ``k_t v_t^T`` without ``beta`` and ``beta_t k_t v_t^T`` with it: first the decay, then the
    correction on the decayed state. Without ``beta`` there is no correction. Sums and states are float32 (float64 for
    float64 inputs) whatever the dtype of the inputs.

    Args:
        q: queries.
        k: keys. With ``beta``, of norm at most 1 (``beta`` times their square at most 2), or the state may grow.
        v: values; the output has their dtype.
        log_decay: logarithms of the decays, at most 0: one a head, one a head and token, or one a channel and token.
        beta: how far each value replaces what the state holds for its key, from 0 to 2; above 1, the eigenvalue along
            the key is negative.
        scale: a factor on the output, by default 1.
        state: the state before the first token, by default zero.
        return_state: whether to return the state after the last token too.
        form: ``"step"`` (a loop over tokens, the definition), ``"chunk"``, ``"parallel"`` (all pairs of tokens), or
            ``"auto"``: a step for one token, else chunks.
        chunk: tokens a chunk, a power of two; fewer where there are fewer tokens or the state is tiny.
        backend: ``"torch"``, ``"fla"`` (Triton kernels of flash-linear-attention), or ``"auto"``: fla on CUDA where it
            is installed and has the form.
        cu_seqlens: where sequences begin that are packed into one row; each has a state of its own.

    Shapes:
        q, k: (B, T, H, K); v: (B, T, H, V); log_decay: (H,), (B, T, H) or (B, T, H, K); beta: (B, T, H);
        state: (B, H, K, V) -> (B, T, H, V), and (B, H, K, V). With cu_seqlens, B is 1 for the tokens and the number of
        sequences for the states.

    Example:
        >>> q = k = v = torch.ones(1, 3, 1, 1)
        >>> linear_recurrence(q, k, v, log_decay=torch.tensor([0.5]).log()).flatten().tolist()
        [1.0, 1.5, 1.75]

    Raises:
        BadInput: a shape, a dtype, a device or an option is wrong, or ``log_decay`` is positive for certain.
        MissingExtra: ``backend="fla"`` without the package.

    Reference:
        Yang et al., `Gated Linear Attention <https://arxiv.org/abs/2312.06635>`_ and `DeltaNet
        <https://arxiv.org/abs/2406.06484>`_, 2024, for the chunk forms.
    """
    _check(q, k, v, log_decay, beta, form, chunk, backend)
    factor = 1.0 if scale is None else float(scale)
    if cu_seqlens is not None:
        output, last = _packed(q, k, v, log_decay, beta, state, cu_seqlens, factor, form, chunk, backend)
        return (output, last) if return_state else output
    dtype = torch.float64 if v.dtype == torch.float64 else torch.float32
    shape = (q.shape[0], q.shape[2], q.shape[3], v.shape[3])
    if state is None:
        start = q.new_zeros(shape, dtype=dtype)
    elif state.shape != shape:
        raise BadInput(f"state must have shape (B, H, K, V) = {tuple(shape)}, got {tuple(state.shape)}")
    else:
        start = state.to(dtype)
    if fla_backend.chosen(backend, q, log_decay, beta, form):
        output, last = fla_backend.run(q, k, v, log_decay, beta, factor, start)
        return (output, last) if return_state else output
    decay = log_decay
    if decay is not None:
        if decay.ndim == 1:
            decay = decay.expand(*q.shape[:3])
        if decay.ndim == 3:
            decay = decay[..., None]
        decay = decay.to(dtype)
    if form == "auto":
        form = "step" if q.shape[1] == 1 else "chunk"
    if form == "chunk" and q.numel() and v.numel():
        # Between chunks a token costs K V, inside one C (K + V): small states want short chunks.
        most = 4 * _power_of_two(max(q.shape[-1], v.shape[-1]))
        output, last, _ = chunk_form(q, k, v, decay, beta, factor, start, min(chunk, _power_of_two(q.shape[1]), most))
    else:
        rule = parallel_form if form == "parallel" else step_form
        weight = None if beta is None else beta.to(dtype)
        with torch.autocast(q.device.type, enabled=False):
            output, last = rule(q.to(dtype), k.to(dtype), v.to(dtype), decay, weight, factor, start)
        output = output.to(v.dtype)
    return (output, last) if return_state else output


def _power_of_two(tokens: int) -> int:
    return 1 << max(tokens - 1, 0).bit_length()


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor | None,
    form: str,
    chunk: int,
    backend: str,
) -> None:
    if q.ndim != 4 or k.shape != q.shape:
        raise BadInput(f"q and k must have one shape (B, T, H, K), got {tuple(q.shape)} and {tuple(k.shape)}")
    if v.ndim != 4 or v.shape[:3] != q.shape[:3]:
        raise BadInput(f"v must have shape (B, T, H, V) with {tuple(q.shape[:3])}, got {tuple(v.shape)}")
    if not (q.is_floating_point() and k.is_floating_point() and v.is_floating_point()):
        raise BadInput(f"q, k and v must be floating point, got {q.dtype}, {k.dtype}, {v.dtype}")
    if log_decay is not None and tuple(log_decay.shape) not in {
        (q.shape[2],),
        tuple(q.shape[:3]),
        tuple(q.shape),
    }:
        raise BadInput(f"log_decay must have shape (H,), (B, T, H) or (B, T, H, K), got {tuple(log_decay.shape)}")
    if beta is not None and beta.shape != q.shape[:3]:
        raise BadInput(f"beta must have shape (B, T, H) = {tuple(q.shape[:3])}, got {tuple(beta.shape)}")
    if form not in FORMS:
        raise BadInput(f"form must be one of {FORMS}, got {form!r}")
    if backend not in BACKENDS:
        raise BadInput(f"backend must be one of {BACKENDS}, got {backend!r}")
    if chunk < 1 or chunk & (chunk - 1):
        raise BadInput(f"chunk must be a power of two, got {chunk}")


def _packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor,
    scale: float,
    form: Form,
    chunk: int,
    backend: Backend,
) -> tuple[Tensor, Tensor]:
    """Run packed sequences: those of nearly one length together, padded with tokens that change no state."""
    lengths = lengths_of(cu_seqlens, q)
    starts = [int(place) for place in cu_seqlens.tolist()]
    groups: dict[int, list[int]] = {}
    for index, length in enumerate(lengths):
        groups.setdefault(_power_of_two(length), []).append(index)
    outputs: list[Tensor | None] = [None] * len(lengths)
    states: list[Tensor | None] = [None] * len(lengths)
    for members in groups.values():

        def padded(x: Tensor, members: list[int] = members) -> Tensor:
            rows = [x[0, starts[index] : starts[index] + lengths[index]] for index in members]
            return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)

        decay = log_decay
        if decay is not None:
            decay = padded(decay.expand(q.shape[:3]) if decay.ndim == 1 else decay)
        output, last = with_state(
            padded(q),
            padded(k),
            padded(v),
            log_decay=decay,
            beta=None if beta is None else padded(beta),
            scale=scale,
            state=None if state is None else state[members],
            form=form,
            chunk=chunk,
            backend=backend,
        )
        for place, index in enumerate(members):
            outputs[index] = output[place, : lengths[index]]
            states[index] = last[place]
    return torch.cat([x for x in outputs if x is not None])[None], torch.stack([x for x in states if x is not None])


def with_state(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_decay: Tensor | None = None,
    beta: Tensor | None = None,
    scale: float | None = None,
    state: Tensor | None = None,
    form: Form = "auto",
    chunk: int = 64,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Return the output and the last state of :func:`linear_recurrence`, which see for everything."""
    output, last = linear_recurrence(
        q,
        k,
        v,
        log_decay=log_decay,
        beta=beta,
        scale=scale,
        state=state,
        return_state=True,
        form=form,
        chunk=chunk,
        backend=backend,
    )
    return output, last


def householder_recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    *,
    log_decay: Tensor | None = None,
    scale: float | None = None,
    state: Tensor | None = None,
    form: Form = "auto",
    chunk: int = 64,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Return the output and the last state where each token takes several delta steps, one after another.

    The transition of a token is ``(I - beta_n k_n k_n^T) ... (I - beta_1 k_1 k_1^T) diag(exp(log_decay))``: with two
    steps and ``beta = 2`` a rotation, which no single step can be.

    Args:
        q, log_decay, scale, state, form, chunk, backend: as in :func:`linear_recurrence`.
        k: the keys of each step, of norm at most 1.
        v: the values of each step.
        beta: from 0 to 2.

    Shapes:
        q: (B, T, H, K); k: (B, T, N, H, K); v: (B, T, N, H, V); beta: (B, T, N, H); log_decay: (B, T, H) or
        (B, T, H, K) -> (B, T, H, V), (B, H, K, V).

    Raises:
        BadInput: a shape or an option is wrong.

    Reference:
        Grazzi et al., `Unlocking State-Tracking in Linear RNNs <https://arxiv.org/abs/2411.12537>`_, 2025.
    """
    if k.ndim != 5 or v.ndim != 5 or beta.shape != k.shape[:4] or v.shape[:4] != k.shape[:4]:
        raise BadInput(
            "k, v and beta must have shapes (B, T, N, H, K), (B, T, N, H, V) and (B, T, N, H), "
            f"got {tuple(k.shape)}, {tuple(v.shape)} and {tuple(beta.shape)}"
        )
    steps = k.shape[2]
    if steps < 1:
        raise BadInput("k must hold at least one step a token, got none")

    def only(x: Tensor, place: int) -> Tensor:
        """Return x at one step of each token and zero at the others."""
        spread = x.new_zeros(x.shape[0], x.shape[1], steps, *x.shape[2:])
        index = torch.tensor([place], device=x.device)
        return spread.index_copy(2, index, x[:, :, None]).flatten(1, 2)

    output, last = with_state(
        only(q, steps - 1),
        k.flatten(1, 2),
        v.flatten(1, 2),
        log_decay=None if log_decay is None else only(log_decay, 0),
        beta=beta.flatten(1, 2),
        scale=scale,
        state=state,
        form=form,
        chunk=chunk,
        backend=backend,
    )
    return output[:, steps - 1 :: steps], last


def additive_recurrence(
    q: Tensor,
    logits: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    state: Tensor | None = None,
    log_sum: Tensor | None = None,
    form: Form = "auto",
    chunk: int = 64,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the output where each channel of the state is the softmax-weighted mean of the values so far.

    ``s_t = s_{t-1} + exp(logits_t)``, ``S_t = diag(s_{t-1} / s_t) S_{t-1} + diag(exp(logits_t) / s_t) v_t^T``: a decay
    a channel that sums of exponentials decide. ``s`` is held as its logarithm, so any finite logits do.

    Args:
        q, v, scale, state, form, chunk, backend: as in :func:`linear_recurrence`.
        logits: in the place of the keys.
        log_sum: logarithm of ``s`` before the first token, by default that of 0; needed where ``state`` is given.

    Shapes:
        q, logits: (B, T, H, K); v: (B, T, H, V); state: (B, H, K, V); log_sum: (B, H, K) -> (B, T, H, V),
        (B, H, K, V), (B, H, K).

    Raises:
        BadInput: a shape or an option is wrong, or there is a state without its sum.

    Reference:
        Qin et al., `You Only Scan Once <https://arxiv.org/abs/2405.21022>`_, 2024.
    """
    if state is not None and log_sum is None:
        raise BadInput("a state needs the log_sum that goes with it, got None")
    z = logits.to(torch.float64 if logits.dtype == torch.float64 else torch.float32)
    if log_sum is None:
        sums = z.logcumsumexp(1)
        before = torch.cat([sums[:, :1], sums[:, :-1]], dim=1)  # nothing is kept of an empty state: any decay does
    else:
        all_sums = torch.cat([log_sum[:, None].to(z.dtype), z], dim=1).logcumsumexp(1)
        before, sums = all_sums[:, :-1], all_sums[:, 1:]
    keys = (z - sums).exp()
    output, last = with_state(
        q,
        keys.to(q.dtype),
        v,
        log_decay=before - sums,
        scale=scale,
        state=state,
        form=form,
        chunk=chunk,
        backend=backend,
    )
    end = (
        sums[:, -1]
        if z.shape[1]
        else (z.new_full(z.shape[:1] + z.shape[2:], -torch.inf) if log_sum is None else log_sum)
    )
    return output, last, end
