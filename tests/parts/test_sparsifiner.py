"""Sparsifiner against dense attention, masks by loops, and what its predictor learns from."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchgraft.engines.attention import attend, attention_weights
from torchgraft.errors import BadInput
from torchgraft.parts.blocks.vision_model import SelfAttention
from torchgraft.parts.mixers.sparsifiner import SparsifinerAttention, gathered_attention, kept_keys

DOUBLE = torch.float64
_PREDICTOR = {
    "query_down.weight",
    "query_down.bias",
    "key_down.weight",
    "key_down.bias",
    "token_down",
    "token_up",
}


def _made(seed: int = 0, *, spread: float = 1.0, **options: float) -> SparsifinerAttention:
    """Return a mixer whose predictor tells tokens apart, as it does when trained."""
    torch.manual_seed(seed)
    mixer = SparsifinerAttention(12, num_heads=2, **{"tokens": 30, "n_down": 10, **options}).double()  # type: ignore[arg-type]
    with torch.no_grad():
        mixer.token_down.normal_(std=spread)
        mixer.token_up.normal_(std=0.1)
    return mixer


@pytest.mark.parametrize("gather", [False, True])
def test_keeping_all_is_dense_attention(gather: bool) -> None:
    mixer, plain = _made(keep=1.0, gather=gather), SelfAttention(12, num_heads=2).double()
    plain.load_state_dict({name: value for name, value in mixer.state_dict().items() if name not in _PREDICTOR})
    x = torch.randn(2, 23, 12, dtype=DOUBLE)
    torch.testing.assert_close(mixer(x), plain(x), rtol=1e-12, atol=1e-12)
    mixer.keep = 0.3
    assert (mixer(x) - plain(x)).abs().max() > 1e-2
    mixer.sparse = False
    torch.testing.assert_close(mixer(x), plain(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("tokens", "class_token"), [(30, True), (17, False), (1, True)])
def test_mask_is_that_of_the_formula(tokens: int, class_token: bool) -> None:
    """Loops over heads and rows; the eight largest of ten coefficients, the basis folded and cut off at its edge."""
    mixer = _made(class_token=class_token, basis_eps=0.05)
    x = torch.randn(1, tokens, 12, dtype=DOUBLE)
    q, k, _ = (part[0] for part in mixer.heads(x, 0))
    found = mixer.connectivity(x)[0]
    kept = math.ceil(0.25 * tokens)
    for head in range(2):
        small_q, small_k = mixer.query_down(q[:, head]), mixer.key_down(k[:, head])
        summary = small_k.T @ mixer.token_down[:tokens]
        for row in range(tokens):
            share = (small_q[row] @ summary / math.sqrt(3)).softmax(-1)
            largest = set(share.topk(8).indices.tolist())
            guess = torch.zeros(tokens, dtype=DOUBLE)
            for column in range(tokens):
                for each in largest:
                    size = abs(float(mixer.token_up[column, each].detach()))
                    guess[column] += float(share[each].detach()) * (size if size > 0.05 else 0.0)
            wanted = set(range(tokens)) if class_token and row == 0 else set(guess.topk(kept).indices.tolist())
            assert set(found[head, row].nonzero().flatten().tolist()) == wanted


@settings(deadline=None, max_examples=30)
@given(
    tokens=st.integers(1, 30),
    keep=st.floats(0.01, 1.0),
    class_token=st.booleans(),
    eps=st.sampled_from([0.0, 0.02, 0.15, 9.0]),
    seed=st.integers(0, 99),
)
def test_rows_keep_exactly_k_keys(tokens: int, keep: float, class_token: bool, eps: float, seed: int) -> None:
    """With eps 9 the whole basis is zero and all keys tie: there are k of them still. Gathered equals masked."""
    mixer = _made(seed, keep=keep, class_token=class_token, basis_eps=eps)
    x = torch.randn(2, tokens, 12, dtype=DOUBLE)
    counts = mixer.connectivity(x).sum(-1)
    wanted = torch.full((2, 2, tokens), kept_keys(tokens, keep))
    if class_token:
        wanted[:, :, 0] = tokens
    assert torch.equal(counts, wanted)
    masked = mixer(x)
    mixer.gather = True
    torch.testing.assert_close(mixer(x), masked, rtol=1e-10, atol=1e-10)


def test_gathered_pairs_equal_the_masked_matrix_with_gradients() -> None:
    """At 150 tokens, in three blocks of queries: outputs and gradients, also of the blocked dense form."""
    mixer = _made(tokens=150)
    x = torch.randn(2, 150, 12, dtype=DOUBLE)
    grads = []
    for form in ("gathered", "sdpa", "blocks", "dense"):
        leaf = x.clone().requires_grad_()
        q, k, v = mixer.heads(leaf, 0)
        mask = mixer.mask(q, k)
        if form == "gathered":
            mixed = gathered_attention(q, k, v, mask)
        else:
            mixed = attend(q, k, v, mask=mask, form=form, rows=64)  # type: ignore[arg-type]
        weight = torch.linspace(-1, 1, mixed.numel(), dtype=DOUBLE).view_as(mixed)
        grads.append((mixed.detach(), *torch.autograd.grad((mixed * weight).sum(), leaf)))
    for other in grads[1:]:
        for ours, theirs in zip(grads[0], other, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_masks_follow_the_input() -> None:
    mixer = _made()
    first, second = (mixer.connectivity(torch.randn(1, 30, 12, dtype=DOUBLE)) for _ in range(2))
    assert not torch.equal(first, second)
    assert not torch.equal(first[:, 0], first[:, 1])  # nor are heads alike


def test_predictor_learns_from_recon_loss_alone() -> None:
    mixer = _made()
    x = torch.randn(2, 20, 12, dtype=DOUBLE)
    teacher = torch.rand(2, 2, 20, 20, dtype=DOUBLE).softmax(-1)
    for gather in (False, True):
        mixer.gather = gather
        mixer.zero_grad()
        mixer(x).square().sum().backward()
        assert {name for name, value in mixer.named_parameters() if value.grad is None} == _PREDICTOR
    mixer.zero_grad()
    torch.autograd.backward(mixer.recon_loss(x, teacher))
    moved = {name for name, value in mixer.named_parameters() if value.grad is not None and value.grad.any()}
    assert moved == _PREDICTOR | {"qkv.weight"}


def test_recon_loss_by_hand() -> None:
    mixer = _made()
    x = torch.randn(3, 20, 12, dtype=DOUBLE)
    q, k, _ = mixer.heads(x, 0)
    guess = (mixer.coefficients(q, k) @ mixer.token_up[:20].T).detach()
    assert mixer.recon_loss(x, guess).item() == 0
    other = guess.clone()
    other[:, :, 0] = 7.0  # the class token's row does not count
    assert mixer.recon_loss(x, other).item() == 0
    other[1, 0, 4, 5] += 3.0
    assert mixer.recon_loss(x, other).item() == pytest.approx(9 / 3, rel=1e-12)
    with pytest.raises(BadInput, match=r"teacher must have shape \(3, 2, 20, 20\)"):
        mixer.recon_loss(x, guess[:, :1])


def test_recon_loss_finds_the_keys_of_a_teacher() -> None:
    """The teacher looks at one of three blocks of keys, by content: after some steps so does the mask."""
    torch.manual_seed(0)
    mixer = SparsifinerAttention(16, num_heads=1, tokens=12, n_down=8, keep=1 / 3, class_token=False).double()
    kind = torch.randint(3, (64, 12))
    place = torch.eye(12, dtype=torch.long).expand(64, -1, -1)  # keys alike would be told apart by nothing
    x = 3 * torch.cat([torch.nn.functional.one_hot(kind, 4), place], dim=-1).to(DOUBLE)
    block = torch.arange(12) // 4
    teacher = ((kind[:, :, None] == block[None, None]).to(DOUBLE) / 4)[:, None]
    optimizer = torch.optim.Adam(mixer.parameters(), 1e-2)
    right = []
    for _ in range(100):
        right.append(float((mixer.connectivity(x) & (teacher > 0)).sum() / (teacher > 0).sum()))
        optimizer.zero_grad()
        torch.autograd.backward(mixer.recon_loss(x, teacher))
        optimizer.step()
    assert right[0] < 0.5 < 0.99 < right[-1]


def test_dense_weights_of_a_teacher_fit() -> None:
    """The weights that a dense teacher of the same projections gives have the shape that recon_loss wants."""
    mixer, plain = _made(), SelfAttention(12, num_heads=2).double()
    x = torch.randn(1, 9, 12, dtype=DOUBLE)
    q, k, _ = plain.heads(x, 0)
    assert mixer.recon_loss(x, attention_weights(q, k)).item() > 0


def test_bad_settings_are_refused() -> None:
    with pytest.raises(BadInput, match=r"keep must lie in \(0, 1\], got 0"):
        SparsifinerAttention(8, keep=0.0)
    with pytest.raises(BadInput, match="n_down must be at least 1, got 0"):
        SparsifinerAttention(8, n_down=0)
    with pytest.raises(BadInput, match="basis_eps must be at least 0"):
        SparsifinerAttention(8, basis_eps=-1.0)
    with pytest.raises(BadInput, match="at most tokens = 30 tokens, got 31"):
        _made()(torch.randn(1, 31, 12, dtype=DOUBLE))
