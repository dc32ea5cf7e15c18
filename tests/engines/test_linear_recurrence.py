"""The linear recurrence: the loop against numbers by hand, every form against the loop, and what must never break."""

from __future__ import annotations

import itertools
import sys
import types
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from torchgraft.bench.meters import macs
from torchgraft.engines.recurrence import fla_backend
from torchgraft.engines.recurrence.chunk import BLOCK_BYTES, chunk_form
from torchgraft.engines.recurrence.gates import RANGE, GentleGates, SteepGates, gates_of
from torchgraft.engines.recurrence.linear import (
    additive_recurrence,
    householder_recurrence,
    linear_recurrence,
    with_state,
)
from torchgraft.errors import BadInput, MissingExtra

KINDS = ("none", "head", "token", "channel", "steep", "off")


def inputs(
    kind: str, delta: bool, tokens: int, seed: int = 0, *, batch: int = 2, heads: int = 3, key: int = 5, value: int = 4
) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=draw, dtype=torch.float64)

    made = {
        "q": normal(batch, tokens, heads, key),
        "k": F.normalize(normal(batch, tokens, heads, key), dim=-1),
        "v": normal(batch, tokens, heads, value),
        "state": normal(batch, heads, key, value),
    }
    decays = {
        "head": lambda: -uniform(heads),
        "token": lambda: -uniform(batch, tokens, heads),
        "channel": lambda: -0.3 * uniform(batch, tokens, heads, key),
        "steep": lambda: -30 * uniform(batch, tokens, heads, key) ** 6,
        "off": lambda: -2e3 * uniform(batch, tokens, heads, key).round(),
    }
    if kind in decays:
        made["log_decay"] = decays[kind]()
    if delta:
        made["beta"] = 2 * uniform(batch, tokens, heads)
    return made


def everything(given: dict[str, Tensor], **options: Any) -> list[Tensor]:
    """Return the output, the last state and the gradients of a random sum of both in all inputs."""
    leaves = {name: x.clone().requires_grad_() for name, x in given.items()}
    output, last = with_state(**leaves, scale=0.7, **options)
    draw = torch.Generator().manual_seed(99)
    weights = [torch.randn(x.shape, generator=draw, dtype=torch.float64).to(x.dtype) for x in (output, last)]
    total = (output * weights[0]).sum() + (last * weights[1]).sum()
    return [output, last, *torch.autograd.grad(total, list(leaves.values()), materialize_grads=True)]


def assert_same(found: list[Tensor], wanted: list[Tensor], tolerance: float) -> None:
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_two_tokens_by_hand() -> None:
    # One head, K = 2, V = 1. S_1 = diag(1/2, 1) S_0 + k_1 v_1, S_2 = diag(1, 1/4) S_1 + k_2 v_2.
    state = torch.tensor([[[[2.0], [4.0]]]], dtype=torch.float64)
    k = torch.tensor([[[[1.0, 0.0]], [[1.0, 2.0]]]], dtype=torch.float64)
    v = torch.tensor([[[[3.0]], [[-1.0]]]], dtype=torch.float64)
    q = torch.tensor([[[[1.0, 1.0]], [[1.0, -1.0]]]], dtype=torch.float64)
    decay = torch.tensor([[[[0.5, 1.0]], [[1.0, 0.25]]]], dtype=torch.float64)
    # S_1 = (1 + 3, 4) = (4, 4), o_1 = 8; S_2 = (4 - 1, 1 - 2) = (3, -1), o_2 = 4.
    output, last = with_state(q, k, v, log_decay=decay.log(), state=state, form="step")
    assert output.flatten().tolist() == [8.0, 4.0]
    assert last.flatten().tolist() == [3.0, -1.0]


def test_delta_rule_by_hand() -> None:
    # K = V = 1 and k = 1: S_t = (1 - beta) a S_{t-1} + beta v, from S_0 = 8 with a = 1/2.
    ones = torch.ones(1, 2, 1, 1, dtype=torch.float64)
    v = torch.tensor([4.0, 1.0], dtype=torch.float64).view(1, 2, 1, 1)
    beta = torch.tensor([0.25, 2.0], dtype=torch.float64).view(1, 2, 1)
    decay = torch.full((1, 2, 1), 0.5, dtype=torch.float64).log()
    output = linear_recurrence(
        ones, ones, v, log_decay=decay, beta=beta, state=torch.full((1, 1, 1, 1), 8.0, dtype=torch.float64), form="step"
    )
    # 0.75 * 4 + 1 = 4; -1 * 2 + 2 = 0.
    torch.testing.assert_close(output.flatten(), torch.tensor([4.0, 0.0], dtype=torch.float64))


def test_beta_one_overwrites_what_the_key_held() -> None:
    draw = torch.Generator().manual_seed(0)
    key = F.normalize(torch.randn(1, 1, 1, 6, generator=draw, dtype=torch.float64), dim=-1)
    values = torch.randn(1, 9, 1, 3, generator=draw, dtype=torch.float64)
    keys = key.expand(1, 9, 1, 6)
    _, last = with_state(keys, keys, values, beta=torch.ones(1, 9, 1, dtype=torch.float64))
    torch.testing.assert_close(torch.einsum("bhkv,bhk->bhv", last, key[:, 0]), values[:, -1])


def test_orthogonal_keys_make_the_delta_rule_additive() -> None:
    draw = torch.Generator().manual_seed(1)
    keys = torch.linalg.qr(torch.randn(8, 8, generator=draw, dtype=torch.float64))[0].view(1, 8, 1, 8)
    values = torch.randn(1, 8, 1, 3, generator=draw, dtype=torch.float64)
    beta = torch.rand(1, 8, 1, generator=draw, dtype=torch.float64)
    with_delta, _ = with_state(keys, keys, values, beta=beta)
    torch.testing.assert_close(with_delta, with_state(keys, keys, values * beta[..., None])[0])


@pytest.mark.parametrize("delta", [False, True], ids=["add", "delta"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [1, 2, 7, 64, 65, 130, 300])
def test_chunk_and_parallel_equal_the_loop(kind: str, delta: bool, tokens: int) -> None:
    made = inputs(kind, delta, tokens, seed=tokens)
    wanted = everything(made, form="step")
    assert_same(everything(made, form="chunk"), wanted, 1e-9)
    if tokens <= 130:
        assert_same(everything(made, form="parallel"), wanted, 1e-9)


@settings(deadline=None, max_examples=25)
@given(
    tokens=st.integers(1, 300),
    kind=st.sampled_from(KINDS),
    delta=st.booleans(),
    chunk=st.sampled_from([1, 2, 8, 16, 32, 128]),
    seed=st.integers(0, 10**6),
)
def test_any_length_and_chunk(tokens: int, kind: str, delta: bool, chunk: int, seed: int) -> None:
    made = inputs(kind, delta, tokens, seed, batch=1, heads=2, key=3, value=2)
    assert_same(everything(made, form="chunk", chunk=chunk), everything(made, form="step"), 1e-9)


@pytest.mark.parametrize("delta", [False, True], ids=["add", "delta"])
def test_many_blocks_and_groups_of_rows(delta: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchgraft.engines.recurrence.chunk.BLOCK_BYTES", 3 * 3 * 16 * 5 * 4)
    made = inputs("channel", delta, 200, batch=5)
    assert_same(everything(made, form="chunk", chunk=16), everything(made, form="step"), 1e-9)


@pytest.mark.parametrize("delta", [False, True], ids=["add", "delta"])
@pytest.mark.parametrize("kind", ["token", "channel", "steep"])
def test_gradients_against_finite_differences(kind: str, delta: bool) -> None:
    made = inputs(kind, delta, 9, batch=1, heads=1, key=3, value=2)
    leaves = {name: x.requires_grad_() for name, x in made.items()}
    names = list(leaves)

    def run(*values: Tensor) -> tuple[Tensor, Tensor]:
        return with_state(**dict(zip(names, values, strict=True)), form="chunk", chunk=4)

    assert torch.autograd.gradcheck(run, tuple(leaves.values()))


def test_operator_is_registered_soundly() -> None:
    made = inputs("channel", True, 20)
    arguments = (
        *(made[name].clone().requires_grad_() for name in ("q", "k", "v", "log_decay", "beta")),
        0.5,
        made["state"],
        16,
    )
    torch.library.opcheck(
        chunk_form, arguments, test_utils=("test_schema", "test_faketensor", "test_autograd_registration")
    )


def test_going_on_from_a_state_is_one_run() -> None:
    made = inputs("channel", True, 150)
    whole, last = with_state(**made)
    state = made.pop("state")
    pieces = []
    for part in (slice(0, 37), slice(37, 38), slice(38, 150)):
        output, state = with_state(**{name: x[:, part] for name, x in made.items()}, state=state)
        pieces.append(output)
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole)
    torch.testing.assert_close(state, last)


@pytest.mark.parametrize("kind", ["none", "head", "token", "channel"])
def test_packed_sequences_do_not_see_each_other(kind: str) -> None:
    lengths = [5, 1, 33, 70, 2]
    made = inputs(kind, True, sum(lengths), batch=1)
    starts = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    made["state"] = torch.randn(len(lengths), 3, 5, 4, dtype=torch.float64)
    output, last = linear_recurrence(**made, cu_seqlens=torch.tensor(starts), return_state=True)
    for index, (begin, end) in enumerate(itertools.pairwise(starts)):
        alone = {name: x[:, begin:end] for name, x in made.items() if name != "state" and x.ndim > 1}
        if kind == "head":
            alone["log_decay"] = made["log_decay"]
        wanted, state = with_state(**alone, state=made["state"][index : index + 1])
        torch.testing.assert_close(output[:, begin:end], wanted)
        torch.testing.assert_close(last[index : index + 1], state)


@pytest.mark.parametrize("delta", [False, True], ids=["add", "delta"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("decay", [1e-6, 1e-3, 0.5, 0.999999])
def test_a_hundred_thousand_tokens_stay_finite(dtype: torch.dtype, delta: bool, decay: float) -> None:
    tokens, key = 100_000, 8
    draw = torch.Generator().manual_seed(0)
    q, v = (torch.randn(1, tokens, 1, key, generator=draw).to(dtype) for _ in range(2))
    k = F.normalize(torch.randn(1, tokens, 1, key, generator=draw), dim=-1).to(dtype)
    spread = torch.rand(1, tokens, 1, key, generator=draw)
    log_decay = torch.tensor(decay).log() * spread
    leaves = [x.requires_grad_() for x in (q, k, v, log_decay)]
    beta = 2 * torch.rand(1, tokens, 1, generator=draw) if delta else None
    output, last = with_state(q, k, v, log_decay=log_decay, beta=beta)
    assert output.dtype == dtype
    assert bool(output.isfinite().all())
    assert bool(last.isfinite().all())
    for gradient in torch.autograd.grad(output.float().square().mean(), leaves):
        assert bool(gradient.isfinite().all())


@pytest.mark.parametrize("kind", ["channel", "steep", "off"])
def test_float32_is_near_float64(kind: str) -> None:
    made = inputs(kind, True, 257, key=16, value=16)
    wanted = everything(made, form="step")
    narrow = everything({name: x.float() for name, x in made.items()}, form="chunk")
    for a, b in zip(narrow, wanted, strict=True):
        assert float((a.detach().double() - b.detach()).norm() / b.detach().norm()) < 2e-5


def test_a_gate_of_zero_forgets_everything() -> None:
    made = inputs("channel", False, 70)
    made["log_decay"][:, 40] = -torch.inf
    found = everything(made, form="chunk")
    after = {name: x[:, 41:] if x.ndim == 4 and name != "state" else x for name, x in made.items()}
    assert all(bool(x.isfinite().all()) for x in found[:2])
    start = made["k"][:, 40, :, :, None] * made["v"][:, 40, :, None, :]
    torch.testing.assert_close(found[0][:, 41:], with_state(**{**after, "state": start}, scale=0.7)[0])


def test_gates_choose_the_cheapest_sound_way() -> None:
    limit = RANGE[torch.float32]
    assert isinstance(gates_of(torch.full((2, 64, 3), -limit / 65)), GentleGates)
    assert isinstance(gates_of(torch.full((2, 64, 3), -limit / 8)), SteepGates)


def test_bfloat16_output_is_the_rounded_float32_one() -> None:
    made = {name: x.bfloat16() for name, x in inputs("channel", True, 100).items()}
    found, last = with_state(**made)
    wide, wide_last = with_state(**{name: x.float() for name, x in made.items()})
    assert found.dtype == torch.bfloat16
    assert last.dtype == torch.float32
    torch.testing.assert_close(found, wide.bfloat16())
    torch.testing.assert_close(last, wide_last)


def test_under_autocast_sums_stay_in_float32() -> None:
    made = {name: x.float() for name, x in inputs("channel", True, 100).items()}
    wanted, _ = with_state(**made)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, _ = with_state(**made)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wanted)


def test_compiles_into_one_graph() -> None:
    made = inputs("channel", True, 70)

    def run(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor) -> Tensor:
        return 2 * with_state(q, k, v, log_decay=log_decay, beta=beta)[0]

    arguments = [made[name].requires_grad_() for name in ("q", "k", "v", "log_decay", "beta")]
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*arguments), run(*arguments))
    found = torch.autograd.grad(compiled(*arguments).sum(), arguments)
    wanted = torch.autograd.grad(run(*arguments).sum(), arguments)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_backward_keeps_states_of_blocks_only() -> None:
    tokens, heads, key = 4096, 2, 32
    q, k, v, g = (torch.randn(1, tokens, heads, key).requires_grad_() for _ in range(4))
    output = linear_recurrence(q, k, v, log_decay=-g.square())
    kept = [x for x in output.grad_fn.saved_tensors if x is not None]  # type: ignore[union-attr]
    own = sum(x.numel() for x in kept if all(x.data_ptr() != y.data_ptr() for y in (q, k, v)))
    blocks = -(-tokens // (64 * (BLOCK_BYTES // (heads * 64 * key * 4))))
    assert own == tokens * heads * key + blocks * heads * key * key  # the decays, and one state a block


def test_no_tokens_and_no_rows() -> None:
    empty = torch.zeros(2, 0, 3, 4)
    state = torch.randn(2, 3, 4, 4)
    output, last = with_state(empty, empty, empty, state=state)
    assert output.shape == (2, 0, 3, 4)
    torch.testing.assert_close(last, state)
    assert linear_recurrence(torch.zeros(0, 5, 3, 4), torch.zeros(0, 5, 3, 4), torch.zeros(0, 5, 3, 2)).shape == (
        0,
        5,
        3,
        2,
    )


def test_householder_steps_are_their_product() -> None:
    draw = torch.Generator().manual_seed(3)
    tokens, steps, key = 12, 3, 4
    q = torch.randn(1, tokens, 1, key, generator=draw, dtype=torch.float64)
    k = F.normalize(torch.randn(1, tokens, steps, 1, key, generator=draw, dtype=torch.float64), dim=-1)
    v = torch.randn(1, tokens, steps, 1, 2, generator=draw, dtype=torch.float64)
    beta = 2 * torch.rand(1, tokens, steps, 1, generator=draw, dtype=torch.float64)
    decay = -torch.rand(1, tokens, 1, generator=draw, dtype=torch.float64)
    state = torch.zeros(key, 2, dtype=torch.float64)
    wanted = []
    for t in range(tokens):
        state = decay[0, t, 0].exp() * state
        for n in range(steps):
            unit, weight = k[0, t, n, 0], beta[0, t, n, 0]
            state = state - weight * torch.outer(unit, unit @ state) + weight * torch.outer(unit, v[0, t, n, 0])
        wanted.append(q[0, t, 0] @ state)
    found, last = householder_recurrence(q, k, v, beta, log_decay=decay, chunk=8)
    torch.testing.assert_close(found[0, :, 0], torch.stack(wanted))
    torch.testing.assert_close(last[0, 0], state)


def test_two_reflections_are_a_rotation_and_count_modulo_three() -> None:
    angle = 2 * torch.pi / 3
    normals = torch.tensor([[1.0, 0.0], [torch.cos(torch.tensor(angle / 2)), torch.sin(torch.tensor(angle / 2))]])
    tokens = 30
    k = normals.double().view(1, 1, 2, 1, 2).expand(1, tokens, 2, 1, 2)
    k = F.normalize(k, dim=-1)
    zeros = torch.zeros(1, tokens, 2, 1, 1, dtype=torch.float64)
    start = torch.tensor([1.0, 0.0], dtype=torch.float64).view(1, 1, 2, 1)
    q = torch.tensor([1.0, 0.0], dtype=torch.float64).view(1, 1, 1, 2).expand(1, tokens, 1, 2)
    found, _ = householder_recurrence(q, k, zeros, torch.full((1, tokens, 2, 1), 2.0, dtype=torch.float64), state=start)
    wanted = torch.cos(angle * torch.arange(1, tokens + 1, dtype=torch.float64))
    torch.testing.assert_close(found.flatten(), wanted, atol=1e-6, rtol=0)


def test_additive_recurrence_is_the_running_softmax_mean() -> None:
    draw = torch.Generator().manual_seed(4)
    q, logits = (3 * torch.randn(2, 90, 2, 5, generator=draw, dtype=torch.float64) for _ in range(2))
    v = torch.randn(2, 90, 2, 4, generator=draw, dtype=torch.float64)
    found, last, log_sum = additive_recurrence(q, logits, v, chunk=16)
    weights = torch.stack([F.pad(logits[:, : t + 1].softmax(1), (0, 0, 0, 0, 0, 89 - t)) for t in range(90)], dim=1)
    means = torch.einsum("btshk,bshv->bthkv", weights, v)
    torch.testing.assert_close(found, torch.einsum("bthk,bthkv->bthv", q, means))
    torch.testing.assert_close(last, means[:, -1])
    torch.testing.assert_close(log_sum, logits.logsumexp(1))
    shifted, _, _ = additive_recurrence(q, logits + 5.0, v)
    torch.testing.assert_close(shifted, found)
    first = additive_recurrence(q[:, :31], logits[:, :31], v[:, :31])
    second = additive_recurrence(q[:, 31:], logits[:, 31:], v[:, 31:], state=first[1], log_sum=first[2])
    torch.testing.assert_close(torch.cat([first[0], second[0]], dim=1), found)


WRONG: dict[str, dict[str, Any]] = {
    "q and k must have one shape": {"k": torch.zeros(1, 4, 2, 4)},
    "v must have shape": {"v": torch.zeros(1, 5, 2, 3)},
    "floating point": {"v": torch.zeros(1, 4, 2, 3, dtype=torch.long)},
    "log_decay must have shape": {"log_decay": torch.zeros(4, 2)},
    "beta must have shape": {"beta": torch.zeros(1, 4)},
    "state must have shape": {"state": torch.zeros(1, 2, 3, 4)},
    "form must be one of": {"form": "fast"},
    "backend must be one of": {"backend": "cuda"},
    "chunk must be a power of two": {"chunk": 48},
    "cu_seqlens must rise": {"cu_seqlens": torch.tensor([0, 3, 2, 4])},
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments_are_named(message: str) -> None:
    good: dict[str, Any] = {"q": torch.zeros(1, 4, 2, 3), "k": torch.zeros(1, 4, 2, 3), "v": torch.zeros(1, 4, 2, 3)}
    with pytest.raises(BadInput, match=message):
        linear_recurrence(**{**good, **WRONG[message]})


def test_fla_backend_says_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(1, 4, 2, 3)
    monkeypatch.setattr(fla_backend, "installed", lambda: False)
    with pytest.raises(MissingExtra, match="torchgraft\\[gpu\\]"):
        linear_recurrence(x, x, x, backend="fla")
    monkeypatch.setattr(fla_backend, "installed", lambda: True)
    with pytest.raises(BadInput, match="need CUDA"):
        linear_recurrence(x, x, x, backend="fla")
    with pytest.raises(BadInput, match="forms 'auto' and 'chunk'"):
        linear_recurrence(x, x, x, backend="fla", form="step")
    assert linear_recurrence(x, x, x).shape == x.shape  # "auto" on the processor takes torch


@pytest.mark.parametrize(
    ("kind", "delta", "path", "name"),
    [
        ("none", False, "fla.ops.simple_gla", "chunk_simple_gla"),
        ("head", False, "fla.ops.simple_gla", "chunk_simple_gla"),
        ("channel", False, "fla.ops.gla", "chunk_gla"),
        ("none", True, "fla.ops.delta_rule", "chunk_delta_rule"),
        ("token", True, "fla.ops.gated_delta_rule", "chunk_gated_delta_rule"),
    ],
)
def test_fla_backend_calls_the_kernel_of_the_transition(
    kind: str, delta: bool, path: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in with the package's signatures computes by our loop: the arguments must mean the same."""
    made = inputs(kind, delta, 20)

    def kernel(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor | None = None,
        beta: Tensor | None = None,
        scale: float | None = None,
        initial_state: Tensor | None = None,
        output_final_state: bool = False,
    ) -> tuple[Tensor, Tensor]:
        assert output_final_state
        return with_state(
            q, k, v, log_decay=g, beta=beta, scale=scale, state=initial_state, form="step", backend="torch"
        )

    module = types.ModuleType(path)
    setattr(module, name, kernel)
    monkeypatch.setitem(sys.modules, path, module)
    monkeypatch.setattr(fla_backend, "chosen", lambda backend, *_: backend != "torch")
    found = with_state(**made, scale=0.3)
    wanted = with_state(**made, scale=0.3, backend="torch", form="step")
    torch.testing.assert_close(found, wanted)


def test_multiply_accumulates_of_the_operator_are_counted() -> None:
    class Recurrence(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            output, _ = with_state(x, x, x, chunk=16)
            return output

    tokens, heads, key = 40, 2, 8
    # Three chunks of 16: scores and their use, 16 * (8 + 8) a token; reading and writing the state, 2 * 8 * 8.
    assert macs(Recurrence(), torch.randn(1, tokens, heads, key)) == 48 * heads * (16 * 16 + 2 * 64)
