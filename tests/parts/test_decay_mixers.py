"""Lightning attention, TransNormerLLM, TransNormer and LightNet against their formulas written out, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from torchgraft.engines.recurrence.heads import HeadNorm
from torchgraft.engines.recurrence.linear import linear_recurrence
from torchgraft.errors import BadInput
from torchgraft.parts.mixers.lightnet import MDLRPE, MDTPE, BidirectionalLightNet, LightNetMixer
from torchgraft.parts.mixers.lightning_attention_2 import LightningAttention, lightning_attention, slopes
from torchgraft.parts.mixers.tnl_lightning import SGLU, TNLAttention, TransNormerLLM, tnl_decay
from torchgraft.parts.mixers.transnormer import (
    BidirectionalDiagAttention,
    BidirectionalNormAttention,
    DiagAttention,
    NormAttention,
    TransNormer,
    feature,
    grad_bound,
)

DOUBLE = torch.float64


def _draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def _gap(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return float((a - b).detach().abs().max())


def _quadratic(q: Tensor, k: Tensor, v: Tensor, rates: Tensor) -> Tensor:
    """Return [(Q K^T) (.) M] V with M_ts = rates^(t-s); (B, T, H, K), decays (H,)."""
    t = torch.arange(q.shape[1])
    apart = t[:, None] - t[None]
    mask = torch.where(apart >= 0, rates[:, None, None] ** apart.clamp(min=0), 0.0)  # (H, T, T)
    return torch.einsum("bthk,bshk,hts,bshv->bthv", q, k, mask, v)


def _drawn(tokens: int, heads: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    return _draw(2, tokens, heads, 3), _draw(2, tokens, heads, 3, seed=1), _draw(2, tokens, heads, 4, seed=2)


# Lightning attention


@pytest.mark.parametrize("block", [1, 2, 8, 64])
@pytest.mark.parametrize("tokens", [1, 16, 37])
@pytest.mark.parametrize("rates", [(1.0, 1.0), (0.999, 0.5), (0.9, 1e-6)])
def test_blocks_equal_the_masked_product(block: int, tokens: int, rates: tuple[float, float]) -> None:
    q, k, v = (x.requires_grad_() for x in _drawn(tokens))
    decay = torch.tensor(rates, dtype=DOUBLE)
    ours, theirs = lightning_attention(q, k, v, decay.log(), block), _quadratic(q, k, v, decay)
    assert isinstance(ours, Tensor)
    assert _gap(ours, theirs) < 1e-10
    weight = _draw(*ours.shape, seed=3)
    for mine, other in zip(
        torch.autograd.grad((ours * weight).sum(), (q, k, v)),
        torch.autograd.grad((theirs * weight).sum(), (q, k, v)),
        strict=True,
    ):
        assert _gap(mine, other) < 1e-10


@pytest.mark.parametrize("rate", [1.0, 0.7])
def test_the_backward_pass_is_the_derivative(rate: float) -> None:
    q, k, v = (x.requires_grad_() for x in _drawn(5))
    decay = torch.full((2,), math.log(rate), dtype=DOUBLE)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = lightning_attention(q, k, v, decay, 2)
        assert isinstance(out, Tensor)
        return out

    assert torch.autograd.gradcheck(run, (q, k, v))


@pytest.mark.parametrize("cut", [64, 128, 41])
def test_two_halves_with_the_state_are_one_run(cut: int) -> None:
    q, k, v = _drawn(192)
    decay = torch.tensor([0.99, 0.8], dtype=DOUBLE).log()
    whole = lightning_attention(q, k, v, decay, 64)
    first, state = lightning_attention(q[:, :cut], k[:, :cut], v[:, :cut], decay, 64, return_state=True)
    second = lightning_attention(q[:, cut:], k[:, cut:], v[:, cut:], decay, 64, state=state)
    assert isinstance(whole, Tensor)
    assert isinstance(second, Tensor)
    joined = torch.cat([first, second], 1)
    assert _gap(joined, whole) < 1e-12
    if cut % 64 == 0:
        assert torch.equal(joined, whole)


def test_rates_are_a_geometric_series() -> None:
    assert slopes(8).tolist() == [2.0**-h for h in range(1, 9)]
    assert slopes(3, like=torch.zeros(1, dtype=DOUBLE)).dtype == DOUBLE
    with pytest.raises(BadInput, match="num_heads"):
        slopes(0)


def test_lightning_mixer_is_its_formula() -> None:
    torch.manual_seed(0)
    mixer = LightningAttention(6, num_heads=2, block=4).double()
    x = _draw(2, 11, 6)
    q, k, v = (p(x).view(2, 11, 2, 3) for p in (mixer.query, mixer.key, mixer.value))
    o = _quadratic(F.silu(q), F.silu(k), v, torch.tensor([2.0**-4, 2.0**-8], dtype=DOUBLE).neg().exp()).flatten(-2)
    o = o / (o.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    assert _gap(mixer(x), mixer.out(o)) < 1e-12


# TransNormerLLM


def test_decay_table() -> None:
    table = torch.stack([tnl_decay(4, layer, 3).exp() for layer in range(4)])  # (L + 1, H)
    assert table[3].tolist() == [1.0] * 4
    assert table[:, 0].tolist() == [1.0] * 4
    assert bool((table[:3].diff(dim=1) < 0).all())
    assert bool((table[:, 1:].diff(dim=0) > 0).all())
    assert table[1, 2].item() == pytest.approx(math.exp(-(8 * 2 / 4) * (1 - 1 / 3)))
    theirs = tnl_decay(4, 2, 3, schedule="alibi")
    assert theirs.tolist() == pytest.approx([-(2.0 ** (-2 * h)) * (1 - 1 / 2 + 1e-5) for h in range(1, 5)])
    with pytest.raises(BadInput, match="layer"):
        tnl_decay(4, 4, 3)
    with pytest.raises(BadInput, match="'paper' or 'alibi'"):
        TNLAttention(8, num_heads=2, decay="x")  # type: ignore[arg-type]


def test_simple_norm_knows_no_scale() -> None:
    norm, x = HeadNorm(7, eps=0.0, affine=False).double(), _draw(5, 7)
    assert _gap(norm(1e3 * x), norm(x)) < 1e-12
    assert _gap(norm(x).norm(dim=-1), torch.full((5,), math.sqrt(7), dtype=DOUBLE)) < 1e-12


@pytest.mark.parametrize("layer", [1, 2, 3])
@pytest.mark.parametrize("decay", ["paper", "alibi"])
def test_tnl_forms_agree_far_out(layer: int, decay: str) -> None:
    torch.manual_seed(0)
    mixer = TNLAttention(4, num_heads=2, layer=layer, layers=3, decay=decay).double()  # type: ignore[arg-type]
    x = _draw(1, 10_000, 4)
    with torch.no_grad():
        whole, last = mixer.prefill(x)
        assert bool(whole.isfinite().all())
        near, state = mixer.prefill(x[:, :9_900])
        for place in range(9_900, 10_000):
            y, state = mixer.step(x[:, place], state)
            assert _gap(y, whole[:, place]) < 1e-10
        assert _gap(near, whole[:, :9_900]) < 1e-10
        assert _gap(state["memory"], last["memory"]) < 1e-9
        short = mixer(x[:, :300])
        mixer.form = "parallel"
        assert _gap(mixer(x[:, :300]), short) < 1e-10


def test_tnl_is_its_formula_and_scores_depend_on_distance() -> None:
    torch.manual_seed(0)
    mixer = TNLAttention(6, num_heads=2, layer=1, layers=4).double()
    x = _draw(2, 9, 6)
    q, k, v = (p(x).view(2, 9, 2, 3) for p in (mixer.query, mixer.key, mixer.value))
    assert mixer.theta is not None
    t = torch.arange(9)
    apart = (t[:, None] - t[None]).double()  # (T, T)
    cosines = (apart[..., None, None] * mixer.theta).cos()  # (T, T, H, K), of t - s and nothing else
    rate = torch.tensor([1.0, math.exp(-(8 / 2) * (1 - 1 / 4))], dtype=DOUBLE)
    mask = torch.where(apart[..., None] >= 0, rate ** apart.clamp(min=0)[..., None], 0.0)  # (T, T, H)
    o = torch.einsum("bthk,bshk,tshk,tsh,bshv->bthv", F.silu(q), F.silu(k), cosines, mask, v).flatten(-2)
    o = o / (o.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    assert _gap(mixer(x), mixer.out(o * mixer.gate(x))) < 1e-12
    later = {**mixer.init_state(2), "place": torch.full((2,), 1000)}
    assert _gap(mixer.prefill(x, later)[0], mixer(x)) < 1e-10


def test_tnl_model_steps_and_is_built_as_said() -> None:
    torch.manual_seed(0)
    model = TransNormerLLM(8, 3, num_heads=2, vocab_size=11).double()
    mixers = [mixer for mixer in model.mixers() if isinstance(mixer, TNLAttention)]
    assert [(mixer.layer, mixer.lrpe) for mixer in mixers] == [(1, True), (2, False), (3, False)]
    assert all(name.split(".")[-1] in ("weight", "theta") for name, _ in model.named_parameters())
    assert sum("norm" in name for name, _ in model.named_parameters()) == 0
    tokens = torch.randint(11, (2, 9), generator=torch.Generator().manual_seed(0))
    whole = model(tokens)
    _, state = model.prefill(tokens[:, :8])
    assert _gap(model.step(tokens[:, 8], state)[0], whole[:, 8]) < 1e-12
    assert model.generate(tokens, max_new_tokens=2, temperature=0).shape == (2, 11)
    unit = SGLU(3, 5).double()
    assert _gap(unit(2 * _draw(4, 3)), 4 * unit(_draw(4, 3))) < 1e-12  # a product of two linear maps


# TransNormer


def _linear(s: Tensor) -> Tensor:
    return s / s.sum()


def test_gradient_of_linear_attention_is_bounded_by_the_score_only() -> None:
    scores = _draw(6, 4).abs() + 1e-3
    found = grad_bound(_linear, scores)
    assert bool((found <= 1 / (4 * scores) + 1e-12).all())
    half = torch.tensor([[0.3, 0.1, 0.2]], dtype=DOUBLE)  # the first weight is 1/2
    assert grad_bound(_linear, half)[0, 0].item() == pytest.approx(1 / (4 * 0.3), rel=1e-12)
    assert _gap(grad_bound(_linear, 1e-3 * scores), 1e3 * found) < 1e-6
    assert bool((grad_bound(lambda s: s.softmax(0), 5 * _draw(6, 4)) <= 0.25 + 1e-12).all())
    with pytest.raises(BadInput, match="scores"):
        grad_bound(_linear, scores[0])


def test_normalised_gradient_is_bounded_however_small_the_scores() -> None:
    values, eps = _draw(4, 5), 1e-5
    bound = 2 * values.abs().max().item() * math.sqrt(5) / math.sqrt(eps)

    def normalised(s: Tensor) -> Tensor:
        return F.rms_norm(s @ values, (5,), None, eps)

    for scale in (1.0, 1e-2, 1e-4, 1e-8):
        assert grad_bound(normalised, scale * _draw(6, 4).abs()).max().item() <= bound
    assert grad_bound(_linear, 1e-8 * _draw(6, 4).abs()).max().item() > 1e3 * bound


def test_scaled_scores_give_the_same_output() -> None:
    torch.manual_seed(0)
    mixer, x = NormAttention(6, num_heads=1, eps=1e-12).double(), _draw(2, 9, 6)
    base = mixer(x)
    with torch.no_grad():
        mixer.heads.value.weight.mul_(1e3)  # scores enter as a factor on sums of values
    assert _gap(mixer(x), base) < 1e-8


@pytest.mark.parametrize("rotary", [True, False])
def test_right_product_is_left_product(rotary: bool) -> None:
    torch.manual_seed(0)
    causal = NormAttention(8, num_heads=2, rotary=rotary).double()
    both = BidirectionalNormAttention(8, num_heads=2, rotary=rotary).double()
    both.load_state_dict(causal.state_dict())
    x = _draw(2, 70, 8)
    q, k, v = (p(x).view(2, 70, 2, 4) for p in (causal.heads.query, causal.heads.key, causal.heads.value))
    q, k = feature(q), feature(k)
    if rotary:  # pairs of channels as complex numbers
        turn = torch.exp(1j * torch.arange(70).double()[:, None, None] * torch.tensor([1.0, 1e-2], dtype=DOUBLE))
        q, k = (torch.complex(y[..., :2], y[..., 2:]) * turn for y in (q, k))
    scores = torch.einsum("bthk,bshk->bhts", q, k.conj()).real
    for mixer, seen in ((causal, scores.tril()), (both, scores)):
        o = torch.einsum("bhts,bshv->bthv", seen, v).flatten(-2)
        o = o / (o.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        assert _gap(mixer(x), causal.heads.out(o)) < 1e-10
    assert _gap(both(x)[:, -1], causal(x)[:, -1]) < 1e-10
    if not rotary:
        order = torch.randperm(70, generator=torch.Generator().manual_seed(0))
        assert _gap(both(x[:, order]), both(x)[:, order]) < 1e-10


def _softmax(mixer: DiagAttention | BidirectionalDiagAttention, x: Tensor, causal: bool) -> Tensor:
    """Return softmax attention over all of ``x`` without positions."""
    heads = mixer.heads
    q, k, v = (p(x).view(*x.shape[:2], 2, -1) for p in (heads.query, heads.key, heads.value))
    scores = torch.einsum("bthk,bshk->bhts", q, k) / math.sqrt(q.shape[-1])
    if causal:
        scores = scores.masked_fill(torch.ones(x.shape[1], x.shape[1]).triu(1).bool(), -math.inf)
    out: Tensor = heads.out(torch.einsum("bhts,bshv->bthv", scores.softmax(-1), v).flatten(-2))
    return out


@pytest.mark.parametrize("kind", [DiagAttention, BidirectionalDiagAttention])
@pytest.mark.parametrize("block", [1, 4, 13, 20])
def test_block_attention_is_softmax_in_each_block(
    kind: type[DiagAttention] | type[BidirectionalDiagAttention], block: int
) -> None:
    torch.manual_seed(0)
    mixer, x = kind(8, num_heads=2, block=block, rotary=False).double(), _draw(2, 13, 8)
    expected = torch.cat([_softmax(mixer, part, mixer.causal) for part in torch.split(x, block, 1)], 1)
    assert _gap(mixer(x), expected) < 1e-12
    assert mixer(x[:0]).shape == (0, 13, 8)


@pytest.mark.parametrize("kind", [DiagAttention, BidirectionalDiagAttention])
def test_block_attention_sees_its_own_block(kind: Callable[..., torch.nn.Module]) -> None:
    torch.manual_seed(0)
    mixer, x = kind(4, num_heads=2, block=3).double(), _draw(1, 8, 4)
    jacobian = (
        torch.autograd.functional.jacobian(  # type: ignore[no-untyped-call]  # torch's
            lambda x: mixer(x).sum((0, 2)), x
        )[:, 0]
        .abs()
        .sum(-1)
    )  # (T, T)
    place = torch.arange(8)
    own = place[:, None] // 3 == place[None] // 3
    if kind is DiagAttention:
        own &= place[None] <= place[:, None]
    assert bool((jacobian[own] > 0).all())
    assert bool((jacobian[~own] == 0).all())


@pytest.mark.parametrize("cuts", [(3, 4, 11), (5,), (1, 2, 3, 16)])
def test_block_attention_goes_on_from_its_state(cuts: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    mixer, x = DiagAttention(8, num_heads=2, block=5).double(), _draw(2, 17, 8)
    state, outs = mixer.init_state(2), []
    for piece in x.tensor_split(cuts, dim=1):
        y, state = mixer.prefill(piece, state)
        outs.append(y)
    assert _gap(torch.cat(outs, 1), mixer(x)) < 1e-12
    assert state["k"].shape == (2, 5, 2, 4)
    assert state["place"].tolist() == [2, 2]


def test_transnormer_places_its_layers() -> None:
    torch.manual_seed(0)
    kinds = [type(m).__name__ for m in TransNormer(8, 5, num_heads=2).mixers()]
    assert kinds == ["DiagAttention"] * 2 + ["NormAttention"] * 3
    kinds = [type(m).__name__ for m in TransNormer(8, 2, num_heads=2, causal=False, pool="mean").mixers()]
    assert kinds == ["BidirectionalDiagAttention", "BidirectionalNormAttention"]
    model = TransNormer(8, 2, num_heads=2, block=3, vocab_size=11).double()
    tokens = torch.randint(11, (2, 8), generator=torch.Generator().manual_seed(0))
    _, state = model.prefill(tokens[:, :7])
    assert _gap(model.step(tokens[:, 7], state)[0], model(tokens)[:, 7]) < 1e-12
    with pytest.raises(BadInput, match="diag_fraction"):
        TransNormer(8, 2, diag_fraction=1.5)


# LightNet


def _light(initial_sum: float = 0.0) -> LightNetMixer:
    torch.manual_seed(0)
    return LightNetMixer(8, num_heads=2, initial_sum=initial_sum).double()


@pytest.mark.parametrize("initial_sum", [0.0, 1.0])
def test_additive_recurrence_is_a_running_softmax(initial_sum: float) -> None:
    mixer, x = _light(initial_sum), _draw(2, 40, 8)
    q, k, v = mixer.heads.read(x)
    weights = k.exp()
    sums = initial_sum + weights.cumsum(1)  # (B, T, H, K)
    memory = (weights[..., None] * v[..., None, :]).cumsum(1) / sums[..., None]  # (B, T, H, K, V)
    o = torch.einsum("bthk,bthkv->bthv", q, memory)
    found, state = mixer.prefill(x)
    assert _gap(found, mixer.heads.write(o, x)) < 1e-12
    assert _gap(state["memory"], memory[:, -1]) < 1e-12
    assert _gap(state["log_sum"], sums[:, -1].log()) < 1e-12
    # the same as gated linear attention with the gates s_{t-1} / s_t and the keys exp(k_t) / s_t
    before = torch.cat([torch.full_like(sums[:, :1], initial_sum), sums[:, :-1]], 1)
    gates = (before / sums).log().clamp(min=-100)
    gated = linear_recurrence(q, weights / sums, v, log_decay=gates, form="step")
    assert isinstance(gated, Tensor)
    assert _gap(gated, o) < 1e-12


def test_constant_in_the_keys_changes_nothing() -> None:
    mixer, x = _light(), _draw(2, 40, 8)
    base = mixer(x)
    shift = 50 * _draw(8, seed=4)
    hook = mixer.heads.key.register_forward_hook(lambda _m, _i, out: out + shift)
    assert _gap(mixer(x), base) < 1e-12
    hook.remove()


def test_gradients_from_an_empty_state_are_finite() -> None:
    mixer, x = _light(), _draw(2, 12, 8).requires_grad_()
    out, _ = mixer.prefill(x, mixer.init_state(2))
    (grad,) = torch.autograd.grad(out.square().sum(), x)
    assert bool(grad.isfinite().all())
    with pytest.raises(BadInput, match="initial_sum"):
        LightNetMixer(8, initial_sum=-1.0)


def test_without_order_lightnet_is_equivariant_and_ends_like_the_causal_one() -> None:
    causal, both, x = _light(), BidirectionalLightNet(8, num_heads=2).double(), _draw(2, 40, 8)
    both.load_state_dict(causal.state_dict())
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    assert _gap(both(x[:, order]), both(x)[:, order]) < 1e-12
    assert _gap(both(x)[:, -1], causal(x)[:, -1]) < 1e-12
    _, k, v = both.heads.read(x)
    memory = torch.einsum("bthk,bthv->bhkv", k.softmax(1), v)
    assert _gap(causal.prefill(x)[1]["memory"], memory) < 1e-12


@pytest.mark.parametrize(("kind", "size"), [("cosine", 5), ("rotation", 8)])
def test_grid_positions_count_by_difference(kind: str, size: int) -> None:
    place = MDLRPE((6, 7), kind=kind)  # type: ignore[arg-type]
    q, k = _draw(size), _draw(size, seed=1)
    left, right = (place(x.expand(1, 42, 1, size))[0, :, 0].view(6, 7, -1) for x in (q, k))
    scores = torch.einsum("abc,dec->abde", left, right)  # of every place with every place
    draw = torch.Generator().manual_seed(0)
    for _ in range(50):
        a, d = torch.randint(5, (2,), generator=draw).tolist()
        b, e = torch.randint(6, (2,), generator=draw).tolist()
        for down, across in ((1, 0), (0, 1), (1, 1)):
            moved = scores[a + down, b + across, d + down, e + across]
            assert abs(float(moved - scores[a, b, d, e])) < 1e-12
    assert abs(float(scores[0, 0, 3, 0] - scores[0, 0, 0, 0])) > 1e-6
    assert abs(float(scores[0, 0, 0, 3] - scores[0, 0, 0, 0])) > 1e-6
    with pytest.raises(BadInput, match="42 tokens"):
        place(q.expand(1, 41, 1, size))


def test_grid_positions_act_in_the_mixer() -> None:
    torch.manual_seed(0)
    mixer = BidirectionalLightNet(8, num_heads=2, shape=(2, 3)).double()
    x = _draw(1, 6, 8)
    q, k, v = mixer.heads.read(x)
    places = torch.cartesian_prod(torch.arange(2), torch.arange(3)).double()  # (T, 2)
    angle = torch.stack([places[:, 0], places[:, 0] / 100, places[:, 1], places[:, 1] / 100], -1)  # (T, K)
    cosines = (angle[:, None] - angle[None]).cos()  # (T, S, K)
    o = torch.einsum("bthk,bshk,tsk,bshv->bthv", q, k.softmax(1), cosines, v)
    assert _gap(mixer(x), mixer.heads.write(o, x)) < 1e-12
    with pytest.raises(BadInput, match="channel"):
        BidirectionalLightNet(4, num_heads=4, shape=(2, 2))


def test_axis_filter_is_linear_and_toeplitz() -> None:
    torch.manual_seed(0)
    filters = MDTPE(4, (3, 5), num_heads=2).double()
    x, y = _draw(2, 15, 4), _draw(2, 15, 4, seed=1)
    for axis in (0, 1):
        assert (
            _gap(filters.filtered(2 * x - 3 * y, axis), 2 * filters.filtered(x, axis) - 3 * filters.filtered(y, axis))
            < 1e-12
        )
        gain = (filters.query[axis] * filters.key[axis]).sum(-1)  # (H,)
        rate = filters.decay[axis].sigmoid()
        length = (3, 5)[axis]
        places = torch.arange(length)
        apart = places[:, None] - places[None]
        toeplitz = torch.where(apart >= 0, gain[:, None, None] * rate[:, None, None] ** apart.clamp(min=0), 0.0)
        grid = x.view(2, 3, 5, 2, 2)  # (B, rows, columns, H, V)
        pattern = "hts,bschv->btchv" if axis == 0 else "hts,brshv->brthv"
        assert _gap(filters.filtered(x, axis), torch.einsum(pattern, toeplitz, grid).reshape(2, 15, 4)) < 1e-12
    total = filters.norm(filters.filtered(x, 0)) + filters.norm(filters.filtered(x, 1))
    assert _gap(filters(x), filters.out(total)) < 1e-12
    assert all(p.grad is not None for p in _backward(filters, x))


def _backward(module: torch.nn.Module, x: Tensor) -> list[torch.nn.Parameter]:
    module(x).square().sum().backward()
    return list(module.parameters())
