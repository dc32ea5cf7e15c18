"""Sparse subspace inference: the set's size, moments against Monte Carlo, what is inactive, and density 1."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from torchgraft.bench.task import Task
from torchgraft.engines.masks import keep_best, prunable
from torchgraft.engines.sparse import SparseLinear
from torchgraft.errors import BadInput
from torchgraft.shrink.prune.ssvi import CRITERIA, SSVI, SparseSubspace, folded_moments


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3)).double()


def _data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(20, 6, generator=generator, dtype=torch.float64), torch.randint(0, 3, (20,), generator=generator)


def _prior() -> Normal:
    return Normal(torch.zeros((), dtype=torch.float64), torch.tensor(0.2, dtype=torch.float64))


def _train(ssvi: SSVI, steps: int, optimizer: torch.optim.Optimizer | None = None) -> list[int]:
    optimizer = optimizer or torch.optim.Adam(ssvi.parameters(), lr=0.02)
    x, y = _data()
    changed = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(ssvi(x), y) + 0.01 / len(y) * ssvi.kl()
        loss.backward()
        optimizer.step()
        changed.append(ssvi.step(optimizer))
    return changed


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_the_number_of_active_weights_never_changes_and_the_set_does(scope: Any) -> None:
    ssvi = SSVI(_model(), density=0.25, update_every=5, steps=60, scope=scope, gradient_steps=2)
    s = round(0.25 * 108)
    first = ssvi.active.clone()
    optimizer = torch.optim.Adam(ssvi.parameters(), lr=0.02)
    by_layer = int((ssvi.active < 72).sum())
    changed = []
    for _ in range(60):
        changed += _train(ssvi, 1, optimizer)
        assert len(ssvi.active.unique()) == len(ssvi.mu) == len(ssvi.rho) == s
        assert ssvi.active.min() >= 0
        assert ssvi.active.max() < 108
        if scope == "layer":
            assert int((ssvi.active < 72).sum()) == by_layer
    assert not torch.equal(first, ssvi.active)
    moves = [step + 1 for step, count in enumerate(changed) if count]
    assert moves
    assert all(step % 5 == 0 and step < 45 for step in moves)  # the last quarter is left alone
    assert max(changed) == changed[4] or scope == "layer"


@pytest.mark.parametrize(("mu", "sigma"), [(0.0, 1.0), (0.3, 0.5), (-1.0, 0.4), (2.0, 0.1)])
def test_moments_are_those_of_monte_carlo(mu: float, sigma: float) -> None:
    generator = torch.Generator().manual_seed(0)
    draws = (mu + sigma * torch.randn(400_000, generator=generator, dtype=torch.float64)).abs()
    at, spread = torch.tensor([mu]), torch.tensor([sigma])
    mean, variance = folded_moments(at, spread)
    assert float(mean) == pytest.approx(float(draws.mean()), rel=0.01)
    assert float(variance) == pytest.approx(float(draws.var()), rel=0.01)
    if mu == 0:
        assert float(mean) == pytest.approx(sigma * math.sqrt(2 / math.pi), rel=1e-12)
    expected = {
        "abs_mean": abs(mu),
        "snr": abs(mu) / sigma,
        "mean_abs": float(draws.mean()),
        "snr_abs": float(draws.mean() / draws.std()),
        "exp_abs": float(draws.exp().mean()),
        "snr_exp": float(draws.exp().mean() / draws.exp().std()),
    }
    assert set(expected) == set(CRITERIA)
    for name, value in expected.items():
        assert float(CRITERIA[name](at, spread)) == pytest.approx(value, rel=0.01, abs=1e-7), name


@settings(max_examples=60, deadline=None)
@given(mu=st.floats(-5, 5), sigma=st.floats(1e-3, 5))
def test_the_score_is_least_where_the_mean_is_zero(mu: float, sigma: float) -> None:
    score = float(CRITERIA["snr_abs"](torch.tensor([mu]), torch.tensor([sigma])))
    least = math.sqrt(2 / math.pi) / math.sqrt(1 - 2 / math.pi)
    assert score >= least * (1 - 1e-6)
    assert least == pytest.approx(1.3236, abs=1e-4)
    assert math.isfinite(float(CRITERIA["snr_exp"](torch.tensor([mu]), torch.tensor([sigma]))))


def test_inactive_weights_add_nothing() -> None:
    ssvi = SSVI(_model(), density=0.2)
    x, _ = _data()
    torch.manual_seed(3)
    out = ssvi(x)
    torch.manual_seed(3)
    values = ssvi.mu + ssvi.sigma * torch.randn_like(ssvi.mu)
    flat = torch.zeros(108, dtype=torch.float64)
    flat[ssvi.active] = values.detach()
    plain = _model()
    with torch.no_grad():
        plain[0].weight.copy_(flat[:72].reshape(12, 6))
        plain[2].weight.copy_(flat[72:].reshape(3, 12))
    assert torch.allclose(out, plain(x), atol=1e-12)
    assert int((flat != 0).sum()) == 22
    whole = kl_divergence(Normal(ssvi.mu, ssvi.sigma), _prior()).sum()
    assert float(ssvi.kl().detach()) == pytest.approx(float(whole.detach()), rel=1e-12)
    kept = sum(value.numel() for name, value in ssvi.state_dict().items() if "bias" not in name)
    assert kept == 3 * 22 + 1  # mu, rho, places, and the count of steps: no dense weight anywhere


def test_density_one_is_mean_field_inference() -> None:
    ssvi = SSVI(_model(), density=1.0, update_every=2, steps=100, gradient_steps=1)
    plain = _model()
    rho = {n: torch.full_like(w, math.log(math.expm1(0.02))).requires_grad_() for n, w in prunable(plain).items()}
    x, y = _data()
    torch.manual_seed(1)
    loss = F.cross_entropy(ssvi(x), y) + 0.1 * ssvi.kl()
    loss.backward()
    torch.manual_seed(1)
    noise = torch.randn(108, dtype=torch.float64)
    parts = {"0.weight": noise[:72].reshape(12, 6), "2.weight": noise[72:].reshape(3, 12)}
    drawn = {n: w + F.softplus(rho[n]) * parts[n] for n, w in prunable(plain).items()}
    other = F.cross_entropy(torch.func.functional_call(plain, drawn, (x,)), y) + 0.1 * sum(
        kl_divergence(Normal(w, F.softplus(rho[n])), _prior()).sum() for n, w in prunable(plain).items()
    )
    other.backward()  # type: ignore[no-untyped-call]
    assert float(loss.detach()) == pytest.approx(float(other.detach()), rel=1e-12)
    mu_slopes = torch.cat([w.grad.flatten() for w in prunable(plain).values() if w.grad is not None])
    rho_slopes = torch.cat([r.grad.flatten() for r in rho.values() if r.grad is not None])
    for parameter, slopes in ((ssvi.mu, mu_slopes), (ssvi.rho, rho_slopes)):
        assert parameter.grad is not None
        assert torch.allclose(parameter.grad, slopes, atol=1e-12)
    before = ssvi.active.clone()
    assert _train(ssvi, 6) == [0] * 6
    assert torch.equal(before, ssvi.active)


def test_the_least_go_and_the_steepest_come_without_a_past() -> None:
    ssvi = SSVI(_model(), density=0.25, update_every=4, steps=1000, replace_rate=0.5, scope="global", gradient_steps=2)
    optimizer = torch.optim.Adam(ssvi.parameters(), lr=0.02)
    _train(ssvi, 2, optimizer)
    assert ssvi._slope is None
    x, y = _data()
    slopes = torch.zeros(108, dtype=torch.float64)
    for _ in range(2):  # the steps whose gradients call
        optimizer.zero_grad()
        state = torch.get_rng_state()
        loss = F.cross_entropy(ssvi(x), y)
        torch.set_rng_state(state)
        values = ssvi.mu.detach() + ssvi.sigma.detach() * torch.randn_like(ssvi.mu)
        flat = torch.zeros(108, dtype=torch.float64)
        flat[ssvi.active] = values
        flat.requires_grad_()
        weights = {"0.weight": flat[:72].reshape(12, 6), "2.weight": flat[72:].reshape(3, 12)}
        direct = F.cross_entropy(torch.func.functional_call(ssvi.network, weights, (x,)), y)
        slopes += torch.autograd.grad(direct, flat)[0]
        loss.backward()
        optimizer.step()
        held, mu, sigma = ssvi.active.clone(), ssvi.mu.detach().clone(), ssvi.sigma.detach().clone()
        moved = ssvi.step(optimizer)
    share = 0.5 / 2 * (1 + math.cos(math.pi * 4 / 750))
    assert moved == int(share * 27)
    changed = held != ssvi.active
    assert int(changed.sum()) == moved
    score = CRITERIA["snr_abs"](mu, sigma)
    assert score[changed].max() <= score[~changed].min()
    free = torch.ones(108, dtype=torch.bool)
    free[held] = False
    came = ssvi.active[changed]
    assert free[came].all()
    free[came] = False
    assert slopes.abs()[came].min() >= slopes.abs()[free].max()
    assert (ssvi.mu[changed] == 0).all()
    assert torch.allclose(ssvi.sigma[changed], sigma[~changed].mean(), rtol=1e-9)
    assert torch.equal(ssvi.mu[~changed], mu[~changed])
    for parameter in (ssvi.mu, ssvi.rho):
        assert (optimizer.state[parameter]["exp_avg"][changed] == 0).all()
        assert (optimizer.state[parameter]["exp_avg"][~changed] != 0).any()


def test_ties_at_zero_fall_to_the_smaller_spread() -> None:
    ssvi = SSVI(_model(), density=0.25, scope="global")
    with torch.no_grad():
        ssvi.mu.zero_()
        ssvi.rho.copy_(torch.linspace(-1.0, 1.0, 27))
    ssvi._replace(torch.rand(108, dtype=torch.float64), 0.2, None)
    assert (ssvi.mu == 0).all()
    assert (ssvi.rho[:5] > ssvi.rho[5]).all()  # the five narrowest were replaced by wider ones
    assert torch.equal(ssvi.rho[5:], torch.linspace(-1.0, 1.0, 27, dtype=torch.float32)[5:].double())


def test_predictions_scores_and_the_plain_model() -> None:
    ssvi = SSVI(_model(), density=0.5).train()
    x, _ = _data()
    torch.manual_seed(0)
    found = ssvi.predict(x, samples=7)
    assert ssvi.training
    assert torch.allclose(found.mean.sum(-1), torch.ones(20, dtype=torch.float64))
    assert (found.std > 0).any()
    torch.manual_seed(0)
    with torch.no_grad():
        draws = torch.stack([ssvi(x) for _ in range(7)])
    torch.manual_seed(0)
    raw = ssvi.predict(x, samples=7, transform=lambda out: out)
    assert torch.allclose(raw.mean, draws.mean(0))
    assert torch.allclose(raw.std, draws.std(0, correction=0))
    scores = ssvi.scores("abs_mean")
    mask = keep_best(scores, {"0.weight": 3})["0.weight"]
    plain = ssvi.mean_model()
    weight = prunable(plain)["0.weight"]
    assert weight.abs()[mask].min() >= weight.abs()[~mask].max()
    assert sum(int((w != 0).sum()) for w in prunable(plain).values()) == 54
    with torch.no_grad():
        ssvi.rho.fill_(-60.0)  # no spread: every draw is the mean
    assert torch.allclose(ssvi(x), plain(x), atol=1e-9)


def test_a_model_saved_half_way_says_the_same() -> None:
    ssvi = SSVI(_model(), density=0.25, update_every=3, steps=40, gradient_steps=1)
    _train(ssvi, 10)
    twin = SSVI(_model(), density=0.25, update_every=3, steps=40, gradient_steps=1, seed=9)
    assert not torch.equal(twin.active, ssvi.active)
    twin.load_state_dict(ssvi.state_dict())
    x, _ = _data()
    torch.manual_seed(2)
    first = ssvi(x)
    torch.manual_seed(2)
    assert torch.equal(first, twin(x))


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"density": 0.0}, "density must lie"),
        ({"density": 1.5}, "density must lie"),
        ({"replace_rate": 2.0}, "replace_rate in"),
        ({"prior_std": 0.0}, "must be positive"),
        ({"start_std": -1.0}, "must be positive"),
        ({"criterion": "snr_ab"}, "unknown criterion 'snr_ab'.*snr_abs"),
        ({"scope": "channel"}, "scope must be"),
        ({"update_every": 0}, "at least 1"),
    ],
)
def test_bad_settings_are_refused(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(BadInput, match=words):
        SSVI(_model(), **wrong)


def test_bad_calls_are_refused() -> None:
    with pytest.raises(BadInput, match="no linear or convolution"):
        SSVI(nn.Sequential(nn.ReLU()))
    ssvi = SSVI(_model())
    with pytest.raises(BadInput, match="samples must be"):
        ssvi.predict(torch.zeros(1, 6), samples=0)
    with pytest.raises(BadInput, match="unknown criterion"):
        ssvi.scores("size")


def test_begun_at_masks_only_the_named_weights_are_drawn() -> None:
    model = _model()
    mask = keep_best({"2.weight": model[2].weight.detach().abs()}, {"2.weight": 10})
    ssvi = SSVI(model, active=mask, start_std=1e-9, update_every=3, steps=1000, gradient_steps=2)
    assert ssvi.active.tolist() == mask["2.weight"].flatten().nonzero().flatten().tolist()
    assert torch.equal(ssvi.mu.detach(), model[2].weight.detach()[mask["2.weight"]])
    x, _ = _data()
    masked = _model()
    with torch.no_grad():
        masked[2].weight.mul_(mask["2.weight"])
    assert torch.allclose(ssvi(x), masked(x), atol=1e-6)
    assert torch.equal(ssvi(x).argmax(1), ssvi(input=x).argmax(1))  # by keyword too
    assert torch.equal(ssvi.mean_model()(x), masked(x))  # type: ignore[operator]
    ssvi.rho.data.fill_(-3.0)
    first, changed = ssvi.active.clone(), _train(ssvi, 6)
    assert changed[2] == changed[5] == 2  # int of just under 0.3 of 10
    assert len(ssvi.active.unique()) == 10
    assert not torch.equal(first, ssvi.active)
    assert not torch.equal(ssvi.network[0].weight, model[0].weight)  # a point estimate, which is trained
    two = {name: weight.detach() > 0.1 for name, weight in prunable(model).items()}
    both, whole = SSVI(model, active=two), SSVI(model, active=two, scope="global")
    assert both.counts == [int(mask.sum()) for mask in two.values()]
    assert whole.counts == [sum(both.counts)]
    for one in (both, whole):
        assert torch.equal(one.mu.detach(), torch.cat([prunable(model)[n][m] for n, m in two.items()]).detach())
    with pytest.raises(BadInput, match="no weight '9"):
        SSVI(model, active={"9.weight": two["0.weight"]})


def _task() -> Task:
    torch.manual_seed(0)
    layers = [nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.Linear(16, 3)]
    score = lambda out, target: (out.argmax(1) == target).float()  # noqa: E731
    data = _data()
    return Task(nn.Sequential(*layers).double(), data, data, data, F.cross_entropy, score, learning_rate=0.01)


def test_one_step_of_the_lever_by_hand() -> None:
    task = _task()
    model: Any = task.trained()
    made: Any = SparseSubspace(steps=1, lr=0.02, beta=0.02, timed=False, most=0.9).apply(model, task, 1.0, ignore=["4"])
    mask = keep_best({"w": model[2].weight.detach().abs()}, {"w": 26})["w"]
    torch.manual_seed(0)
    mu = model[2].weight.detach()[mask].requires_grad_()
    sigma = torch.full_like(mu, 0.02)
    drawn = torch.zeros(16, 16, dtype=torch.float64)
    drawn[mask] = mu + sigma * torch.randn(26, dtype=torch.float64)
    x, y = _data()
    loss = F.cross_entropy(torch.func.functional_call(model, {"2.weight": drawn}, (x,)), y)
    loss = loss + 0.02 / 20 * kl_divergence(Normal(mu, sigma), _prior()).sum()
    slopes = torch.autograd.grad(loss, [mu, model[0].bias, model[4].bias])
    wanted = mu.detach() - 0.02 * slopes[0] / (slopes[0].abs() + 1e-8)
    assert isinstance(made[2], SparseLinear)
    assert type(made[4]) is nn.Linear
    assert torch.equal(made[2].weight.detach() != 0, mask)
    assert torch.allclose(made[2].weight.detach()[mask], wanted, atol=1e-9)
    assert torch.allclose(made[0].bias, model[0].bias - 0.02 * slopes[1].sign(), atol=1e-6)
    assert torch.equal(made[4].bias, model[4].bias)
    assert not made.training
    assert made[0].bias.requires_grad


def test_the_lever_changes_the_set_and_keeps_the_counts() -> None:
    task = _task()
    model: Any = task.trained().train()
    model[4].weight.requires_grad_(False)
    lever = SparseSubspace(steps=12, update_every=2, timed=False, most=0.9)
    made: Any = lever.apply(model, task, 1.0)
    still: Any = SparseSubspace(steps=12, update_every=2, replace_rate=0.0, timed=False, most=0.9).apply(
        model, task, 1.0
    )
    large = keep_best({"w": model[2].weight.detach().abs()}, {"w": 26})["w"]
    assert torch.equal(still[2].weight != 0, large)
    assert not torch.equal(made[2].weight != 0, large)
    assert int((made[2].weight != 0).sum()) == made[2].kept == 26
    frozen = keep_best({"w": model[4].weight.detach().abs()}, {"w": 26})["w"]
    assert torch.equal(made[4].weight.detach(), torch.where(frozen, model[4].weight.detach(), 0.0))
    assert not made[4].values.requires_grad
    assert made.training
    for wrong in ({"steps": 0}, {"beta": -1.0}, {"criterion": "snr_ab"}, {"most": 1.0}, {"update_every": 0}):
        with pytest.raises(BadInput):
            SparseSubspace(**wrong)  # type: ignore[arg-type]
    state = torch.get_rng_state()
    SparseSubspace()
    assert torch.equal(state, torch.get_rng_state())
