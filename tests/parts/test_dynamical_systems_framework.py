"""Each member as a linear dynamical system, and the equivalences between members that the paper states."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from torchgraft.contracts.check import Subject
from torchgraft.contracts.run import CHECKS, run_check
from torchgraft.errors import BadInput
from torchgraft.parts.mixers import dynamical_systems_framework as module
from torchgraft.parts.mixers.dynamical_systems_framework import (
    GatedNetwork,
    NormalizedAttention,
    SelectiveStateSpace,
    compare_dsf,
    dsf,
    taylor_features,
)

MEMBERS: dict[str, Callable[[], module.Member]] = {
    "linear attention": lambda: NormalizedAttention(6, num_heads=2, features=4, eta="sum"),
    "Taylor attention": lambda: NormalizedAttention(6, num_heads=2, features=3, eta="sum", degree=4),
    "exp": lambda: NormalizedAttention(6, num_heads=3, features=5, eta="exp"),
    "softplus": lambda: NormalizedAttention(6, features=4, eta="softplus"),
    "sigmoid": lambda: NormalizedAttention(6, num_heads=2, features=4, eta="sigmoid"),
    "S6": lambda: SelectiveStateSpace(6, state_size=4),
    "S6, scalar": lambda: SelectiveStateSpace(6, state_size=4, scalar=True),
    "qLSTM": lambda: GatedNetwork(6),
    "qLSTM, reversed": lambda: GatedNetwork(6, gate="reversed"),
    "RG-LRU": lambda: GatedNetwork(6, gate="rg-lru"),
}
#: n and N, counted by hand: n * heads * (6 / heads) for attention; 6 n for S6; 6 for a gated network.
SIZES = {
    "linear attention": (4, 24),
    "Taylor attention": (math.comb(7, 3), 35 * 6),
    "exp": (5, 30),
    "softplus": (4, 24),
    "sigmoid": (4, 24),
    "S6": (4, 24),
    "S6, scalar": (4, 24),
    "qLSTM": (1, 6),
    "qLSTM, reversed": (1, 6),
    "RG-LRU": (1, 6),
}


def _built(name: str) -> module.Member:
    torch.manual_seed(0)
    model = MEMBERS[name]().double()
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.2 * torch.randn_like(value))
    return model


def _drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", MEMBERS)
def test_the_system_computes_what_the_module_computes(name: str) -> None:
    model, u = _built(name), _drawn(70, 6)
    with torch.no_grad():
        system = dsf(model, u)
        whole, last = system.run(u)
        torch.testing.assert_close(whole, model(u[None])[0], atol=1e-9, rtol=1e-9)
        head = dsf(model, u[:30]).run(u[:30])[1]
    if not (
        isinstance(model, NormalizedAttention) and model.eta == "sum"
    ):  # whose C looks back at all keys through eta
        again = module.DynamicalSystem(
            transition=system.transition[30:],
            write=system.write[30:],
            read=system.read[30:],
            direct=None if system.direct is None else system.direct[30:],
            expansion=system.expansion,
        )
        torch.testing.assert_close(again.run(u[30:], head)[0], whole[30:], atol=1e-9, rtol=1e-9)
        torch.testing.assert_close(again.run(u[30:], head)[1], last, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("name", MEMBERS)
def test_state_is_counted_on_the_matrices(name: str) -> None:
    (row,) = compare_dsf({name: _built(name)}, _drawn(5, 6))
    assert (row.expansion, row.state_size) == SIZES[name]
    assert row.direct == name.startswith("S6")


def test_table_tells_the_kinds_of_transition() -> None:
    rows = {row.model: row for row in compare_dsf({name: _built(name) for name in MEMBERS}, _drawn(9, 6))}
    kinds = {name: row.transition for name, row in rows.items()}
    assert kinds == {
        "linear attention": "head",
        "Taylor attention": "head",
        "exp": "head",
        "softplus": "scalar",
        "sigmoid": "head",
        "S6": "diagonal",
        "S6, scalar": "scalar",
        "qLSTM": "diagonal",
        "qLSTM, reversed": "diagonal",
        "RG-LRU": "diagonal",
    }
    assert all(row.changes for row in rows.values())
    with torch.no_grad():
        steady = NormalizedAttention(6, eta="exp")
        steady.normaliser.weight.zero_()  # type: ignore[union-attr]
    (row,) = compare_dsf({"no gate": steady}, torch.randn(9, 6))
    assert (row.transition, row.changes) == ("identity", False)


def test_linear_attention_is_the_sum_written_out() -> None:
    model, u = _built("exp"), _drawn(11, 6)
    assert isinstance(model, NormalizedAttention)
    with torch.no_grad():
        q, k = (F.elu(project(u).view(11, 3, 5)) + 1 for project in (model.query, model.key))
        v, eta = model.value(u).view(11, 3, 2), model.normaliser(u).exp()  # type: ignore[misc]
        rows = [
            [sum((q[t, h] @ k[s, h]) * v[s, h] for s in range(t + 1)) / eta[t, h] for h in range(3)] for t in range(11)
        ]
        expected = model.out(torch.stack([torch.cat(row) for row in rows]))
        torch.testing.assert_close(model(u[None])[0], expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("eta", ["exp", "softplus", "sigmoid"])
def test_normaliser_does_not_depend_on_the_past(eta: str) -> None:
    torch.manual_seed(0)
    model = NormalizedAttention(4, features=3, eta=eta).double()  # type: ignore[arg-type]
    z = torch.tensor([-50.0, -20.5, -19.5, -3.0, 0.0, 2.0, 30.0], dtype=torch.float64)
    exact = {"exp": z.exp(), "softplus": z.exp().log1p(), "sigmoid": 1 / (1 + (-z).exp())}[eta]
    torch.testing.assert_close(module._log_eta(z, eta), exact.log(), atol=2e-9, rtol=2e-9)
    u = _drawn(7, 4)
    before, after = dsf(model, u), dsf(model, torch.cat([_drawn(3, 4), u[3:]]))
    torch.testing.assert_close(before.write[4:], after.write[4:], atol=0, rtol=0)


@pytest.mark.parametrize("degree", [0, 1, 2, 5])
def test_taylor_features_are_the_truncated_exponential(degree: int) -> None:
    q, k = _drawn(8, 3), _drawn(16, 3)[8:]
    found = taylor_features(q, degree=degree) @ taylor_features(k, degree=degree).T
    s = q @ k.T
    torch.testing.assert_close(found, sum(s**p / math.factorial(p) for p in range(degree + 1)) + 0 * s)
    assert taylor_features(q, degree=degree).shape[-1] == math.comb(3 + degree, degree)


def test_taylor_attention_approaches_softmax_within_the_tail() -> None:
    u = _drawn(12, 6)
    gaps = []
    for degree in (2, 4, 6, 8):
        torch.manual_seed(0)
        model = NormalizedAttention(6, features=3, eta="sum", degree=degree).double()
        with torch.no_grad():
            model.out.weight.copy_(torch.eye(6))
            q, k, v = model.query(u), model.key(u), model.value(u)
            s = (q @ k.T / 3**0.5).masked_fill(torch.ones(12, 12, dtype=torch.bool).triu(1), -math.inf)
            gap = (model(u[None])[0] - s.softmax(-1) @ v).abs().amax().item()
            seen = s[s.isfinite()].abs().amax().item()
        # each weight moves by at most the tail, relative to a sum of weights of at least exp(-seen) a token; twice,
        # for the weight itself and for the sum that it is divided by
        tail = seen ** (degree + 1) / math.factorial(degree + 1) * math.exp(seen)
        assert gap <= 2 * tail * math.exp(seen) * v.abs().amax().item() + 1e-5
        gaps.append(gap)
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[-1] < gaps[0] / 20


def test_reversed_sigmoid() -> None:
    z = torch.linspace(-30, 30, 200, dtype=torch.float64)
    torch.testing.assert_close((-F.softplus(z)).exp(), (-z).sigmoid(), atol=1e-12, rtol=1e-9)
    reverse, plain = GatedNetwork(5, gate="reversed").double(), GatedNetwork(5).double()
    plain.load_state_dict({name: value for name, value in reverse.state_dict().items() if name != "rate"})
    with torch.no_grad():
        plain.forget.weight.neg_()
        plain.forget.bias.neg_()
    u = _drawn(1, 9, 5)
    torch.testing.assert_close(reverse(u), plain(u), atol=1e-10, rtol=1e-10)


def test_scalar_s6_is_a_normalised_attention() -> None:
    model, u = _built("S6, scalar"), _drawn(40, 6)
    assert isinstance(model, SelectiveStateSpace)
    with torch.no_grad():
        q, k, v, log_eta = model.as_attention(u)
        torch.testing.assert_close(  # eta_{t-1} / eta_t is the state space's own transition
            (log_eta[:-1] - log_eta[1:]).exp(), dsf(model, u).transition[1:, 0], atol=1e-12, rtol=1e-12
        )
        weights = ((q @ (k * log_eta.exp()[:, None]).T) / log_eta.exp()[:, None]).tril()
        torch.testing.assert_close(weights @ v + model.skip * u, model(u[None])[0], atol=1e-9, rtol=1e-9)
    with pytest.raises(BadInput, match="scalar=True"):
        SelectiveStateSpace(4).as_attention(u)


def test_s6_by_hand() -> None:
    model = SelectiveStateSpace(1, state_size=2).double()
    with torch.no_grad():
        for value, number in ((model.delta.weight, 1.0), (model.delta.bias, 0.0), (model.skip, 0.5)):
            value.fill_(number)
        model.log_rate.copy_(torch.tensor([[1.0, 2.0]], dtype=torch.float64).log())
        model.write.weight.copy_(torch.tensor([[1.0], [2.0]]))
        model.read.weight.copy_(torch.tensor([[3.0], [-1.0]]))
        found = model(torch.tensor([[[1.0], [2.0]]], dtype=torch.float64)).flatten().tolist()
    one, two = math.log1p(math.e), math.log1p(math.exp(2))
    h = [one * 1, one * 2]  # Delta_1 B_1 u_1, with rates 1 and 2
    first = 3 * h[0] - h[1] + 0.5
    h = [math.exp(-two) * h[0] + two * 2 * 2, math.exp(-2 * two) * h[1] + two * 4 * 2]
    assert found == pytest.approx([first, 6 * h[0] - 2 * h[1] + 1.0], abs=1e-12)


def test_rg_lru_by_hand() -> None:
    model, u = _built("RG-LRU"), _drawn(20, 6)
    assert isinstance(model, GatedNetwork)
    with torch.no_grad():
        a = model.rate.sigmoid() ** (8 * model.forget(u).sigmoid())
        x = (1 - a**2).sqrt() * model.input(u).sigmoid() * model.update(u)
        h, rows = torch.zeros(6, dtype=torch.float64), []
        for t in range(20):
            h = a[t] * h + x[t]
            rows.append(model.read(u[t]).sigmoid() * h)
        torch.testing.assert_close(model(u[None])[0], torch.stack(rows), atol=1e-10, rtol=1e-10)


def test_errors() -> None:
    model = GatedNetwork(4)
    for call, words in (
        (lambda: dsf(torch.nn.Linear(4, 4), torch.ones(3, 4)), "model must be"),  # type: ignore[arg-type]
        (lambda: dsf(model, torch.ones(3, 5)), r"\(T, 4\)"),
        (lambda: dsf(model, torch.ones(0, 4)), r"\(T, 4\)"),
        (lambda: GatedNetwork(4, gate="sigmod"), "sigmoid"),  # type: ignore[arg-type]
        (lambda: NormalizedAttention(4, eta="max"), "eta must be"),  # type: ignore[arg-type]
        (lambda: NormalizedAttention(4, features=0), "features"),
        (lambda: NormalizedAttention(4, num_heads=3), "num_heads"),
        (lambda: SelectiveStateSpace(4, state_size=0), "state_size"),
        (lambda: taylor_features(torch.ones(2), degree=-1), "degree"),
    ):
        with pytest.raises(BadInput, match=words):
            call()


CASES = {
    "NormalizedAttention": {"d_model": 16, "num_heads": 2, "features": 4, "eta": "softplus"},
    "SelectiveStateSpace": {"d_model": 16, "state_size": 4},
    "GatedNetwork": {"d_model": 16, "gate": "rg-lru"},
}
_CHOSEN = (
    "steps-equal-forward",
    "split-anywhere-equals-whole",
    "forms-agree",
    "packed-equals-each-alone",
    "future-is-not-seen",
    "every-parameter-gets-a-gradient",
    "extremes-stay-finite",
    "bfloat16-is-near-float32",
    "state-keeps-its-form",
    "batch-of-none-and-one",
)


@pytest.mark.parametrize("entry", CASES)
@pytest.mark.parametrize("check", [check for check in CHECKS if check.name in _CHOSEN], ids=lambda check: check.name)
def test_members_keep_the_contract_of_mixers(entry: str, check: object) -> None:
    """They have no card of their own, so the family's checks are run on them here."""
    card = module.CARD.model_copy(
        update={
            "kind": "part",
            "entry": entry,
            "example": CASES[entry],
            "shapes": ((2, 12, 16),),
            "capabilities": frozenset({"causal", "stateful", "linear-time"}),
        }
    )
    result = run_check(check, Subject(card=card, entry=getattr(module, entry), module=module))  # type: ignore[arg-type]
    assert result.outcome == "passed", result.reason
    assert check.applies(card)  # type: ignore[attr-defined]
