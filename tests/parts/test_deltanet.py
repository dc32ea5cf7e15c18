"""DeltaNet: what a delta step does to a memory, in float64, against closed forms and the written definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from torchgraft.engines.recurrence.delta import HeadDecay, shares, unit_keys
from torchgraft.engines.recurrence.linear import linear_recurrence, with_state
from torchgraft.errors import BadInput
from torchgraft.parts.mixers.deltanet import DeltaNet, hybrid
from torchgraft.parts.mixers.softmax_attention import SoftmaxAttention

F64 = torch.float64


def _unit(*shape: int) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(*shape, dtype=F64), dim=-1)


def test_forward_is_the_definition_token_by_token() -> None:
    torch.manual_seed(0)
    mixer = DeltaNet(6, num_heads=2, expand_v=4 / 3, conv=3).double()
    torch.nn.init.normal_(next(mixer.norm.parameters()))
    x = torch.randn(1, 7, 6, dtype=F64)
    raw = torch.cat([x @ layer.weight.T for layer in (mixer.query, mixer.key, mixer.value)], -1)[0]  # (T, 6 + 6 + 8)
    assert mixer.conv is not None
    parts = torch.zeros_like(raw)
    for t in range(7):
        for tap in range(3):
            if t - 2 + tap >= 0:
                parts[t] += mixer.conv.weight[:, tap] * raw[t - 2 + tap]
    parts = parts * parts.sigmoid()
    memory = torch.zeros(2, 3, 4, dtype=F64)
    for t in range(7):
        read = []
        for head in range(2):
            q, k = parts[t, 3 * head : 3 * head + 3], parts[t, 6 + 3 * head : 9 + 3 * head]
            v = parts[t, 12 + 4 * head : 16 + 4 * head]
            q, k = q / q.norm(), k / k.norm()
            beta = torch.sigmoid(mixer.beta.weight[head] @ x[0, t])
            memory[head] = memory[head] + beta * torch.outer(k, v - memory[head].T @ k)
            o = memory[head].T @ q
            read.append(o / (o.square().mean() + 1e-5).sqrt() * mixer.norm.weight)
        torch.testing.assert_close(mixer.out.weight @ torch.cat(read), mixer(x)[0, t], rtol=0, atol=1e-12)


@pytest.mark.parametrize("chunk", [1, 2, 8, 64])
def test_chunks_of_every_size_equal_steps_from_a_state(chunk: int) -> None:
    torch.manual_seed(1)
    q, k, v = _unit(2, 77, 2, 5), _unit(2, 77, 2, 5), torch.randn(2, 77, 2, 3, dtype=F64)
    beta, state = 2 * torch.rand(2, 77, 2, dtype=F64), torch.randn(2, 2, 5, 3, dtype=F64)
    found = with_state(q, k, v, beta=beta, state=state, form="chunk", chunk=chunk)
    wanted = with_state(q, k, v, beta=beta, state=state, form="step")
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)


def test_the_same_key_twice_holds_the_last_value() -> None:
    torch.manual_seed(2)
    key = _unit(1, 1, 1, 4).expand(1, 2, 1, 4)
    values = torch.randn(1, 2, 1, 3, dtype=F64)
    out = linear_recurrence(key, key, values, beta=torch.ones(1, 2, 1, dtype=F64))
    assert isinstance(out, Tensor)
    torch.testing.assert_close(out[:, 1], values[:, 1], rtol=0, atol=1e-14)


def test_orthonormal_keys_store_as_many_values_as_they_are() -> None:
    torch.manual_seed(3)
    keys = torch.linalg.qr(torch.randn(5, 5, dtype=F64))[0].view(1, 5, 1, 5)
    values = torch.randn(1, 5, 1, 3, dtype=F64)
    ones = torch.ones(1, 5, 1, dtype=F64)
    _, memory = with_state(keys, keys, values, beta=ones)
    torch.testing.assert_close(memory[0, 0].T @ keys[0, :, 0].T, values[0, :, 0].T, rtol=0, atol=1e-14)
    over, _ = with_state(keys, keys, values * 2, beta=ones, state=memory)  # and give way to new ones
    torch.testing.assert_close(over, values * 2, rtol=0, atol=1e-13)


def test_orthogonal_keys_make_it_additive() -> None:
    torch.manual_seed(4)
    keys = torch.linalg.qr(torch.randn(6, 6, dtype=F64))[0].view(1, 6, 1, 6)
    q, v, beta = _unit(1, 6, 1, 6), torch.randn(1, 6, 1, 3, dtype=F64), torch.rand(1, 6, 1, dtype=F64)
    found = linear_recurrence(q, keys, v, beta=beta)
    torch.testing.assert_close(found, linear_recurrence(q, keys, v * beta[..., None]), rtol=0, atol=1e-14)


def test_gated_without_decay_and_gate_is_the_plain_form() -> None:
    torch.manual_seed(5)
    gated, plain = DeltaNet(8, num_heads=2, gated=True).double(), DeltaNet(8, num_heads=2).double()
    plain.load_state_dict({name: value for name, value in gated.state_dict().items() if name in plain.state_dict()})
    x = torch.randn(2, 9, 8, dtype=F64)
    assert gated.decay is not None
    assert gated.swish is not None
    with torch.no_grad():
        gated.decay.rate.fill_(-torch.inf)  # decay exp(0)
        gated.swish.weight.copy_(torch.zeros(8, 8))
        tokens, _ = gated.tokens(x, gated.init_state(2))
        wanted, _ = plain.tokens(x, plain.init_state(2))
        assert tokens.log_decay is not None
        assert bool((tokens.log_decay == 0).all())
        assert tokens.beta is not None
        assert wanted.beta is not None
        assert torch.equal(tokens.k, wanted.k)
        assert torch.equal(tokens.beta, wanted.beta)
        found = linear_recurrence(tokens.q, tokens.k, tokens.v, log_decay=tokens.log_decay, beta=tokens.beta)
        same = linear_recurrence(wanted.q, wanted.k, wanted.v, beta=wanted.beta)
    torch.testing.assert_close(found, same, rtol=0, atol=1e-14)


def test_decays_start_between_a_fifth_and_one_and_follow_their_formula() -> None:
    torch.manual_seed(6)
    decay = HeadDecay(4, 64).double()
    start = decay(torch.zeros(1, 1, 4, dtype=F64)).detach().exp()
    assert 0.15 < float(start.min()) < float(start.max()) < 1.0
    x = torch.randn(4, dtype=F64)
    wanted = -decay.rate.exp() * torch.log1p((decay.project.weight @ x + decay.offset).exp())
    torch.testing.assert_close(decay(x[None, None])[0, 0], wanted, rtol=0, atol=1e-12)


def test_keys_and_shares_stay_exact_in_bfloat16() -> None:
    k = unit_keys(torch.randn(3, 50, dtype=torch.bfloat16))
    assert k.dtype == torch.float32
    torch.testing.assert_close(k.norm(dim=-1), torch.ones(3), rtol=0, atol=1e-6)
    assert bool((unit_keys(torch.zeros(1, 4)) == 0).all())
    assert shares(torch.tensor([-1e4, 0.0, 1e4]), 2.0).tolist() == [0.0, 1.0, 2.0]


def test_beta_reaches_two_only_where_allowed() -> None:
    x = 1e4 * torch.randn(1, 50, 8)
    for allowed, most in ((False, 1.0), (True, 2.0)):
        mixer = DeltaNet(8, num_heads=2, allow_neg_eigval=allowed)
        with torch.no_grad():
            beta = mixer.tokens(x, mixer.init_state(1))[0].beta
        assert beta is not None
        assert float(beta.max()) == most
        assert float(beta.min()) == 0.0


def test_hybrid_stacks_put_attention_where_the_paper_does() -> None:
    def names(layers: int, pattern: str) -> str:
        stack = hybrid(layers, pattern, SoftmaxAttention)  # type: ignore[arg-type]  # a wrong one is tried below
        return "".join("a" if build is SoftmaxAttention else "d" for build in stack)

    assert names(5, "sliding") == "dadad"
    assert names(8, "global2") == "daddaddd"
    assert names(2, "global2") == "da"
    with pytest.raises(BadInput, match="sliding"):
        names(4, "global")
    with pytest.raises(BadInput, match="layers"):
        names(1, "sliding")


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(BadInput, match="num_heads"):
        DeltaNet(10, num_heads=4)
    with pytest.raises(BadInput, match="conv"):
        DeltaNet(8, conv=-1)
