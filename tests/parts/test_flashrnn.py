"""FlashRNN: the mixer is its cell between two projections, and the solver for tiles loses no solution."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from torchgraft.engines.recurrence.cells import Cell, from_torch
from torchgraft.engines.recurrence.tiling import Expression, IntCSP, block_of_tokens
from torchgraft.errors import BadInput
from torchgraft.parts.mixers.flashrnn import HeadwiseRNN


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
def test_one_head_is_torchs_layer(kind: type[nn.RNN | nn.GRU | nn.LSTM]) -> None:
    torch.manual_seed(0)
    rnn = kind(6, 6, batch_first=True).double()
    cell, weight, bias, recurrent, side = from_torch(rnn)
    mixer = HeadwiseRNN(6, cell=cell, num_heads=1).double()
    with torch.no_grad():
        mixer.inward.weight.copy_(weight)
        mixer.inward.bias.copy_(bias)
        mixer.recurrent.copy_(recurrent)
        mixer.outward.weight.copy_(torch.eye(6))
        if side is not None and mixer.recurrent_bias is not None:
            mixer.recurrent_bias.copy_(side)
    x = torch.randn(2, 17, 6, dtype=torch.float64)
    torch.testing.assert_close(mixer(x), rnn(x)[0], atol=1e-12, rtol=0)


@pytest.mark.parametrize("cell", ["elman", "gru", "lstm", "slstm"])
def test_heads_do_not_see_each_other(cell: Cell) -> None:
    """Without the projections, the second head's input moves the second head's output only."""
    torch.manual_seed(0)
    mixer = HeadwiseRNN(8, cell=cell, num_heads=2).double()
    gates = mixer.inward.out_features // 8
    with torch.no_grad():
        mixer.outward.weight.copy_(torch.eye(8))
        blocks = mixer.inward.weight.view(2, gates * 4, 2, 4)
        blocks[0, :, 1], blocks[1, :, 0] = 0, 0
    x = torch.randn(1, 9, 8, dtype=torch.float64)
    other = x.clone()
    other[..., 4:] += 1
    moved = (mixer(x) - mixer(other)).detach().abs().amax(dim=(0, 1))
    assert float(moved[:4].max()) == 0
    assert float(moved[4:].min()) > 0


def test_forget_gate_starts_open() -> None:
    bias = HeadwiseRNN(8, cell="lstm", num_heads=2).inward.bias.detach().view(2, 4, 4)  # gates o, i, f, z
    assert torch.equal(bias[:, 2], torch.ones(2, 4))
    assert float(bias[:, [0, 1, 3]].abs().max()) == 0
    with pytest.raises(BadInput, match="did you mean 'slstm'"):
        HeadwiseRNN(8, cell="slstms")  # type: ignore[arg-type]


_DOMAIN = st.sets(st.integers(0, 12), min_size=1, max_size=6)
_TERM = st.tuples(st.integers(0, 5), st.integers(0, 2), st.integers(0, 2), st.integers(0, 2))


@settings(max_examples=150, deadline=None)
@given(
    domains=st.tuples(_DOMAIN, _DOMAIN, _DOMAIN),
    sides=st.lists(st.tuples(st.sampled_from(["equal", "at_most", "divides"]), _TERM, _TERM), min_size=1, max_size=3),
    goal=_TERM,
)
def test_solver_agrees_with_brute_force(
    domains: tuple[set[int], set[int], set[int]],
    sides: list[tuple[str, tuple[int, ...], tuple[int, ...]]],
    goal: tuple[int, ...],
) -> None:
    csp = IntCSP()
    names = "abc"
    variables = [csp.variable(name, domain) for name, domain in zip(names, domains, strict=True)]

    def built(term: tuple[int, ...]) -> Expression:  # constant * a^p + b^q * c^r
        return variables[0] ** term[1] * term[0] + variables[1] ** term[2] * variables[2] ** term[3]

    def value(term: tuple[int, ...], at: dict[str, int]) -> int:
        return int(term[0] * at["a"] ** term[1] + at["b"] ** term[2] * at["c"] ** term[3])

    def right(kind: str, a: int, b: int) -> bool:
        return a == b if kind == "equal" else a <= b if kind == "at_most" else a != 0 and b % a == 0

    for kind, a, b in sides:
        getattr(csp, kind)(built(a), built(b))
    everything = [dict(zip(names, values, strict=True)) for values in product(*map(sorted, domains))]
    solutions = [at for at in everything if all(right(kind, value(a, at), value(b, at)) for kind, a, b in sides)]
    narrow = csp.propagate()
    assert all(at[name] in narrow[name] for at in solutions for name in names)
    found = csp.solve(maximize=built(goal))
    if not solutions:
        assert found is None
    else:
        assert found in solutions
        assert value(goal, found) == max(value(goal, at) for at in solutions)


def test_large_domains_are_narrowed_by_their_ranges() -> None:
    csp = IntCSP()
    a, b = csp.variable("a", range(1, 2001)), csp.variable("b", range(1, 2001))
    csp.at_most(a * b, 50)
    csp.divides(16, a)
    narrow = csp.propagate()
    assert narrow["a"] == {16, 32, 48}
    assert max(narrow["b"]) == 3
    assert csp.solve(maximize=a * b + b) == {"a": 16, "b": 3}


def test_block_of_tokens_fits() -> None:
    assert [block_of_tokens(1000, row, 4096) for row in (1, 64, 65, 4096, 9999)] == [512, 64, 32, 1, 1]
    assert block_of_tokens(3, 1, 4096) == 4
    with pytest.raises(BadInput, match="variable\\(\\)"):
        IntCSP().at_most(Expression("variable", name="x"), 3)
