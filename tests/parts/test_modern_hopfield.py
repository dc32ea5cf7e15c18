"""Modern Hopfield networks: the update by hand, the energy, the theory's bound, and what the three layers compute."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from torchgraft.contracts import modules
from torchgraft.contracts.check import Check, Subject
from torchgraft.contracts.run import run_check
from torchgraft.engines.association import (
    energy,
    hopfield_retrieve,
    metastable_size,
    retrieval_bound,
    separation,
)
from torchgraft.errors import BadInput
from torchgraft.parts.memories import modern_hopfield
from torchgraft.parts.memories.modern_hopfield import CARD, Hopfield, HopfieldLayer, HopfieldPooling


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sphere(count: int, size: int, radius: float, *, seed: int = 0) -> Tensor:
    return radius * F.normalize(draw(count, size, seed=seed), dim=-1)


def build(**options: object) -> Hopfield:
    torch.manual_seed(0)
    return Hopfield(8, **{"num_heads": 2, **options}).double()  # type: ignore[arg-type]


@pytest.mark.parametrize("masked", [False, True])
def test_update_at_the_softmax_limit_is_attention(masked: bool) -> None:
    state, stored = draw(2, 3, 5, 8), draw(2, 3, 7, 8, seed=1)
    mask = (torch.arange(7) < torch.tensor([4, 7])[:, None])[:, None].expand(2, 3, 7) if masked else None
    found = hopfield_retrieve(state, stored, beta=8**-0.5, mask=mask)
    pairs = None if mask is None else mask[..., None, :]
    expected = F.scaled_dot_product_attention(state, stored, stored, pairs)  # its own scale is K ** -0.5
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_update_by_hand() -> None:
    stored, state = torch.tensor([[1.0, 0.0], [0.0, 2.0]]).double(), torch.tensor([[math.log(3.0), 0.0]]).double()
    # The weights are 3 : 1.
    torch.testing.assert_close(hopfield_retrieve(state, stored, beta=1.0), torch.tensor([[0.75, 0.5]]).double())


@given(st.integers(0, 10_000), st.floats(0.05, 20.0))
@settings(max_examples=30, deadline=None)
def test_energy_never_rises_and_stays_within_its_bounds(seed: int, beta: float) -> None:
    stored, state = draw(9, 4, seed=seed), draw(6, 4, seed=seed + 1)
    state = state.softmax(-1) @ stored[:4]  # within the hull of the patterns
    largest = stored.norm(dim=-1).max().item()
    energies = [energy(state, stored, beta=beta)]
    for _ in range(8):
        state = hopfield_retrieve(state, stored, beta=beta)
        energies.append(energy(state, stored, beta=beta))
    path = torch.stack(energies)
    assert bool((path.diff(dim=0) <= 1e-12).all())
    assert bool((path >= -1e-12).all())
    assert bool((path <= 2 * largest**2 + 1e-12).all())


def test_energy_gradient_is_the_step_of_the_update() -> None:
    stored, state = draw(9, 4), draw(6, 4, seed=1).requires_grad_()
    (grad,) = torch.autograd.grad(energy(state, stored, beta=1.3).sum(), state)
    step = hopfield_retrieve(state, stored, beta=1.3) - state
    torch.testing.assert_close(-grad, step, rtol=0, atol=1e-12)


def test_energy_ignores_what_is_masked() -> None:
    stored, state = draw(2, 6, 4), draw(2, 3, 4, seed=1)
    mask = torch.tensor([[True] * 4 + [False] * 2, [True] * 6])
    stored[0, 4:] *= 50
    found = energy(state, stored, beta=0.7, mask=mask)
    torch.testing.assert_close(found[:1], energy(state[:1], stored[:1, :4], beta=0.7))
    torch.testing.assert_close(found[1:], energy(state[1:], stored[1:], beta=0.7))


def test_updates_reach_a_fixed_point() -> None:
    stored = draw(9, 4)
    fixed = hopfield_retrieve(draw(6, 4, seed=1), stored, beta=1.0, steps=2000, eps=0.0)
    again = (fixed @ stored.T).softmax(-1) @ stored
    assert (again - fixed).norm(dim=-1).max() < 1e-10


def test_limits_of_beta() -> None:
    stored, state = draw(9, 4), draw(6, 4, seed=1)
    cold = hopfield_retrieve(state, stored, beta=1e-9)
    torch.testing.assert_close(cold, stored.mean(0).expand(6, -1), rtol=0, atol=1e-7)
    hot = hopfield_retrieve(state, stored, beta=1e6)
    torch.testing.assert_close(hot, stored[(state @ stored.T).argmax(-1)], rtol=0, atol=1e-9)


@pytest.mark.parametrize("noise", [0.0, 0.5, 1.0])
def test_stores_two_to_the_quarter_of_k_patterns_within_the_bound(noise: float) -> None:
    size, count, radius, beta = 32, 2**8, 3 * math.sqrt(31), 1.0
    stored = sphere(count, size, radius)
    cue = stored + noise * F.normalize(draw(count, size, seed=1), dim=-1)
    bound = retrieval_bound(stored, beta=beta, distance=noise)
    error = (hopfield_retrieve(cue, stored, beta=beta) - stored).norm(dim=-1)
    assert bool((error <= bound + 1e-12).all())
    # The bound says something: patterns are as well separated as the theorem asks, errors below a thousandth of M.
    needed = 2 / (beta * count) + math.log(2 * (count - 1) * count * beta * radius**2) / beta
    assert separation(stored).min().item() > needed
    assert bound.max().item() < 1e-3 * radius
    # At a lower beta the same patterns are not stored, and the bound knows it.
    lost = (hopfield_retrieve(cue, stored, beta=1e-3) - stored).norm(dim=-1)
    assert lost.min().item() > 0.5 * radius
    assert retrieval_bound(stored, beta=1e-3).min().item() > radius


@given(st.integers(0, 10_000), st.floats(0.1, 4.0), st.floats(0.0, 0.5))
@settings(max_examples=40, deadline=None)
def test_bound_holds_for_any_patterns(seed: int, beta: float, noise: float) -> None:
    stored = 2 * draw(6, 5, seed=seed)
    cue = stored + noise * F.normalize(draw(6, 5, seed=seed + 1), dim=-1)
    error = (hopfield_retrieve(cue, stored, beta=beta) - stored).norm(dim=-1)
    assert bool((error <= retrieval_bound(stored, beta=beta, distance=noise) + 1e-12).all())


def test_separation_by_hand() -> None:
    stored = torch.tensor([[2.0, 0.0], [1.0, 1.0], [0.0, 3.0]]).double()
    assert separation(stored).tolist() == [2.0, -1.0, 6.0]
    assert separation(stored[:1]).item() == math.inf
    assert retrieval_bound(stored[:1], beta=1.0).item() == 0.0


def test_metastable_sizes_by_hand() -> None:
    stored = torch.eye(5).double()
    state = torch.stack([50 * stored[0], 50 * (stored[0] + stored[1]), torch.zeros(5).double()])
    assert metastable_size(state, stored, beta=1.0).tolist() == [1, 2, 5]
    assert metastable_size(state, stored, beta=1.0, mass=0.5).tolist() == [1, 2, 3]
    mask = torch.tensor([True, True, True, False, False])
    assert metastable_size(state, stored, beta=1.0, mask=mask).tolist() == [1, 2, 3]


def test_converged_state_rests_whatever_the_others_do() -> None:
    stored = sphere(6, 8, 4.0)
    settled, moving = stored[:1] + 1e-3, draw(1, 8, seed=3) * 0.01
    alone = hopfield_retrieve(settled, stored, beta=2.0, steps=50, eps=0.1)
    together = hopfield_retrieve(torch.cat([settled, moving]), stored, beta=2.0, steps=50, eps=0.1)
    torch.testing.assert_close(together[:1], alone, rtol=0, atol=1e-14)
    # Its first update moves less than eps, so it is the last.
    torch.testing.assert_close(alone, hopfield_retrieve(settled, stored, beta=2.0, steps=1), rtol=0, atol=1e-14)
    assert not torch.allclose(together[1:], hopfield_retrieve(moving, stored, beta=2.0, steps=1))


def test_gradient_flows_through_all_updates() -> None:
    state, stored = draw(3, 4).requires_grad_(), draw(5, 4, seed=1).requires_grad_()
    torch.autograd.gradcheck(lambda a, b: hopfield_retrieve(a, b, beta=0.8, steps=3, eps=0.0), (state, stored))


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("free_values", [False, True])
def test_layer_equals_the_equation_written_out(steps: int, normalize: bool, free_values: bool) -> None:
    layer = build(
        update_steps=steps,
        normalize_state=normalize,
        normalize_stored=normalize,
        normalize_patterns=normalize,
        free_values=free_values,
        d_stored=6,
    )
    layer.eps = 0.0
    state, stored = draw(2, 3, 8), draw(2, 5, 6, seed=1)
    r, y = (F.layer_norm(x, x.shape[-1:]) if normalize else x for x in (state, stored))
    heads = []
    for head in range(2):
        own = slice(4 * head, 4 * head + 4)
        xi, k = r @ layer.q.weight.T[:, own], y @ layer.k.weight.T[:, own]
        if normalize:
            xi, k = F.layer_norm(xi, (4,)), F.layer_norm(k, (4,))
        v = k if layer.v is None else y @ layer.v.weight.T[:, own]
        for step in range(steps):
            xi = (0.5 * xi @ k.mT).softmax(-1) @ (v if step == steps - 1 else k)
        heads.append(xi)
    expected = torch.cat(heads, -1) @ layer.out.weight.T
    torch.testing.assert_close(layer(state, stored), expected, rtol=0, atol=1e-12)


def test_layer_with_identity_projections_is_attention() -> None:
    layer = build(num_heads=1, normalize_state=False, normalize_stored=False, normalize_patterns=False, beta=0.3)
    for linear in (layer.q, layer.k, layer.out):
        torch.nn.init.eye_(linear.weight)
    state, stored = draw(2, 3, 8), draw(2, 5, 8, seed=1)
    expected = F.scaled_dot_product_attention(state, stored, stored, scale=0.3)
    torch.testing.assert_close(layer(state, stored), expected, rtol=0, atol=1e-12)


def test_pooling_equals_the_equation_and_starts_near_the_mean() -> None:
    torch.manual_seed(0)
    pooling = HopfieldPooling(8, num_heads=2, num_states=3, normalize_patterns=False).double()
    bag = draw(2, 5, 8)
    keys = F.layer_norm(bag, (8,)) @ pooling.k.weight.T
    summaries = [
        torch.cat(
            [
                (0.5 * pooling.states[i, own] @ keys[..., own].mT).softmax(-1)[..., None, :] @ keys[..., own]
                for own in (slice(0, 4), slice(4, 8))
            ],
            -1,
        )[:, 0]
        @ pooling.out.weight.T
        for i in range(3)
    ]
    torch.testing.assert_close(pooling(bag), torch.cat(summaries, -1), rtol=0, atol=1e-12)
    mean = (keys.mean(1) @ pooling.out.weight.T).repeat(1, 3)
    assert (pooling(bag) - mean).norm() < 0.1 * mean.norm()


def test_learned_patterns_equal_the_equation() -> None:
    torch.manual_seed(0)
    layer = HopfieldLayer(
        8, num_heads=2, num_stored=5, beta=0.9, normalize_state=False, normalize_patterns=False
    ).double()
    state = draw(2, 3, 8)
    expected = torch.cat(
        [
            (0.9 * state[..., own] @ layer.stored[:, own].T).softmax(-1) @ layer.targets[:, own]
            for own in (slice(0, 4), slice(4, 8))
        ],
        -1,
    )
    torch.testing.assert_close(layer(state), expected, rtol=0, atol=1e-12)


def test_prototypes_from_data_classify() -> None:
    stored, labels = sphere(8, 8, 1.0), torch.arange(8) % 4
    layer = HopfieldLayer(8, num_stored=8, beta=200.0, normalize_state=False, normalize_patterns=False).double()
    with torch.no_grad():
        layer.stored.copy_(stored)
        layer.targets.copy_(F.one_hot(labels, 8))
    assert torch.equal(layer((stored + 0.02 * draw(8, 8, seed=1))[None])[0].argmax(-1), labels)


@pytest.mark.parametrize("steps", [1, 3])
def test_padding_is_not_read(steps: int) -> None:
    layer, pooling = build(update_steps=steps), HopfieldPooling(8, num_heads=2, update_steps=steps).double()
    state, stored = draw(2, 3, 8), draw(2, 5, 8, seed=1)
    mask = torch.tensor([[True, True, True, False, False], [True] * 5])
    found, pooled = layer(state, stored, mask=mask), pooling(stored, mask=mask)
    torch.testing.assert_close(found[:1], layer(state[:1], stored[:1, :3]))
    torch.testing.assert_close(pooled[:1], pooling(stored[:1, :3]))
    by_pair = mask[:, None, None].expand(2, 2, 3, 5)
    torch.testing.assert_close(layer(state, stored, mask=by_pair), found)
    assert not torch.allclose(found, layer(state, stored))


@pytest.mark.parametrize("steps", [1, 3])
def test_empty_memory_reads_zero(steps: int) -> None:
    layer = build(update_steps=steps)
    state, stored = draw(2, 3, 8), draw(2, 5, 8, seed=1)
    out = layer(state, stored, mask=torch.zeros(2, 5, dtype=torch.bool))
    assert torch.equal(out, torch.zeros_like(out))
    assert torch.equal(layer(state, stored[:, :0]), torch.zeros_like(state))
    assert torch.equal(hopfield_retrieve(state, stored[:, :0], beta=1.0), torch.zeros_like(state))


def test_sizes_tell_single_retrieval_from_the_average() -> None:
    state = draw(1, 12, 8)
    sharp, flat = build(beta=100.0), build(beta=1e-6)
    assert sharp.metastable_sizes(state).float().mean() < 1.5
    assert flat.metastable_sizes(state).tolist() == [[[11] * 12] * 2]  # 10 of 12 hold 83 percent, 11 hold 92


def test_bfloat16_mixes_many_patterns_in_float32() -> None:
    stored = torch.cat([torch.zeros(3000, 2), torch.ones(3000, 2)]).bfloat16()
    found = hopfield_retrieve(torch.zeros(1, 2).bfloat16(), stored, beta=1.0)
    assert found.dtype == torch.bfloat16
    assert found.tolist() == [[0.5, 0.5]]


@pytest.mark.parametrize(
    "check",
    [check for check in modules.CHECKS if check.applies(CARD.model_copy(update={"capabilities": frozenset()}))],
    ids=lambda check: check.name,
)
@pytest.mark.parametrize(
    ("entry", "example", "parameters"),
    [
        (HopfieldPooling, {"num_states": 3}, "2 * d_model**2 + (num_states + 2) * d_model"),
        (HopfieldLayer, {"num_stored": 5}, "2 * (num_stored + 1) * d_model"),
    ],
)
def test_other_layers_keep_the_contract_of_modules(
    check: Check, entry: type, example: dict[str, int], parameters: str
) -> None:
    facts = {
        "entry": entry.__name__,
        "example": {"d_model": 16, "num_heads": 2, **example},
        "declared": {"parameters": parameters},
    }
    result = run_check(check, Subject(CARD.model_copy(update=facts), entry, modern_hopfield))
    assert result.outcome == "passed", result.reason


@pytest.mark.parametrize(
    "call",
    [
        lambda: Hopfield(8, num_heads=3),
        lambda: Hopfield(8, beta=0.0),
        lambda: Hopfield(8, update_steps=0),
        lambda: HopfieldPooling(8, num_states=0),
        lambda: HopfieldLayer(8, num_stored=0),
        lambda: Hopfield(8)(torch.zeros(2, 3, 8), torch.zeros(3, 3, 8)),
        lambda: Hopfield(8)(torch.zeros(2, 3, 8), torch.zeros(2, 3, 6)),
        lambda: Hopfield(8)(torch.zeros(2, 3, 8), mask=torch.zeros(2, 4, dtype=torch.bool)),
        lambda: Hopfield(8)(torch.zeros(2, 3, 8), mask=torch.zeros(2, 3)),
        lambda: hopfield_retrieve(torch.zeros(1, 2), torch.zeros(3, 2), beta=-1.0),
        lambda: hopfield_retrieve(torch.zeros(1, 2), torch.zeros(3, 2), beta=1.0, steps=0),
        lambda: metastable_size(torch.zeros(1, 2), torch.zeros(3, 2), beta=1.0, mass=1.0),
    ],
)
def test_bad_input_is_refused(call: object) -> None:
    assert callable(call)
    with pytest.raises(BadInput):
        call()
