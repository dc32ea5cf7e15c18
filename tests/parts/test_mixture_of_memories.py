"""Mixture of memories: routing, what each memory holds, and that one memory is the mixer of its rule."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from torchgraft.engines.recurrence.linear import linear_recurrence
from torchgraft.errors import BadInput
from torchgraft.parts.mixers.deltanet import DeltaNet
from torchgraft.parts.mixers.gated_linear_attention import GatedLinearAttention
from torchgraft.parts.mixers.mixture_of_memories import RULES, MixtureOfMemories, Rule, balance

F64 = torch.float64


def _mixer(rule: Rule, *, memories: int = 3, topk: int = 2, shared: bool = True, conv: int = 0) -> MixtureOfMemories:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = MixtureOfMemories(
            8, num_heads=2, num_memories=memories, topk=topk, shared=shared, rule=rule, conv=conv
        ).double()
        torch.nn.init.normal_(made.router.weight)
    return made


def _tokens(length: int = 20, batch: int = 2) -> Tensor:
    return torch.randn(batch, length, 8, generator=torch.Generator().manual_seed(1), dtype=F64)


@pytest.mark.parametrize("rule", ["delta", "gated-delta"])
def test_one_memory_is_deltanet(rule: Rule) -> None:
    mixture = _mixer(rule, memories=1, topk=1, shared=False, conv=4)
    plain = DeltaNet(8, num_heads=2, gated=True).double()
    state = {name: value for name, value in mixture.state_dict().items() if name != "router.weight"}
    if rule == "delta":  # DeltaNet has decay and gate together or neither: here the decays are set to 1
        state = {**state, **{name: value for name, value in plain.state_dict().items() if name.startswith("decay")}}
        state["decay.rate"] = torch.full((2,), -torch.inf, dtype=F64)
    plain.load_state_dict(state)
    torch.testing.assert_close(mixture(_tokens()), plain(_tokens()), rtol=0, atol=1e-12)


def test_one_memory_is_gated_linear_attention() -> None:
    mixture = _mixer("gla", memories=1, topk=1, shared=False)
    plain = GatedLinearAttention(8, num_heads=2, expand_k=1.0, gate_rank=8).double()
    given = mixture.state_dict()
    state = {name: value for name, value in given.items() if name.split(".")[0] not in ("router", "decay")}
    state["decay.0.weight"] = torch.eye(8, dtype=F64)
    state["decay.1.weight"] = given["decay.weight"]
    state["decay.1.bias"] = given["decay.bias"]
    plain.load_state_dict(state)
    torch.testing.assert_close(mixture(_tokens()), plain(_tokens()), rtol=0, atol=1e-12)


def test_one_memory_is_linear_attention() -> None:
    mixture, x = _mixer("linear", memories=1, topk=1, shared=False), _tokens()
    q, k, v = ((x @ layer.weight.T).view(2, 20, 2, 4) for layer in (mixture.query, mixture.key, mixture.value))
    read = linear_recurrence(q, k, v, scale=0.5)
    assert isinstance(read, Tensor)
    torch.testing.assert_close(mixture(x), mixture.output(read, x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("rule", RULES)
def test_equals_a_loop_over_tokens_and_memories(rule: Rule) -> None:
    mixer, x = _mixer(rule), _tokens(9, batch=1)
    parts = torch.cat([mixer.query(x), mixer.key(x), mixer.value(x)], -1)[0]
    parts = F.silu(parts) if "delta" in rule else parts
    memory = torch.zeros(4, 2, 4, 4, dtype=F64)  # the shared one first
    reads = []
    for t in range(9):
        probability = (mixer.router.weight @ x[0, t]).softmax(0)
        best = probability.argsort(descending=True)[:2].tolist()
        weight = {0: torch.ones((), dtype=F64)}
        weight.update({1 + m: probability[m] / probability[best].sum() for m in best})
        read = torch.zeros(2, 4, dtype=F64)
        for m, g in weight.items():
            for head in range(2):
                place = 2 * m + head
                q, k = parts[t, :8].view(2, 4)[head], parts[t, 8:40].view(8, 4)[place]
                v, held = parts[t, 40:].view(8, 4)[place], memory[m, head]
                if rule == "gla":
                    assert isinstance(mixer.decay, torch.nn.Linear)
                    gate = torch.sigmoid(mixer.decay(x[0, t]).view(8, 4)[place]) ** (1 / 16)
                    held = gate[:, None] * held
                if "delta" in rule:
                    q, k = q / q.norm(), k / k.norm()
                    if rule == "gated-delta":
                        assert mixer.decay is not None
                        held = mixer.decay(x[0, t])[place].exp() * held
                    assert mixer.beta is not None
                    held = held + torch.sigmoid(mixer.beta(x[0, t]))[place] * torch.outer(k, v - held.T @ k)
                else:
                    q, held = q / 2, held + torch.outer(k, v)
                memory = memory.index_put((torch.tensor(m), torch.tensor(head)), held)
                read = read.index_add(0, torch.tensor([head]), (g * (held.T @ q))[None])
        reads.append(mixer.norm(read).flatten())
    wanted = mixer.out(F.silu(mixer.swish(x[0])) * torch.stack(reads))
    found, state = mixer.prefill(x)
    torch.testing.assert_close(found[0], wanted, rtol=0, atol=1e-11)
    torch.testing.assert_close(state["memory"][0], memory.flatten(0, 1), rtol=0, atol=1e-11)
    weights = torch.randn(9, 8, generator=torch.Generator().manual_seed(2), dtype=F64)
    parameters = list(mixer.parameters())
    ours, theirs = (torch.autograd.grad((y * weights).sum(), parameters) for y in (found[0], wanted))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)


@pytest.mark.parametrize("rule", RULES)
def test_each_memory_holds_what_its_own_tokens_alone_make(rule: Rule) -> None:
    mixer, x = _mixer(rule, topk=1, shared=False), _tokens(40, batch=1)
    with torch.no_grad():
        chosen = mixer.route(x)[2][0]
        held = mixer.prefill(x)[1]["memory"]
        assert bool((chosen.sum(1) == 1).all())
        assert bool((chosen.sum(0) > 0).all())
        for m in range(3):
            alone = mixer.prefill(x[:, chosen[:, m]])[1]["memory"]
            torch.testing.assert_close(held[:, 2 * m : 2 * m + 2], alone[:, 2 * m : 2 * m + 2], rtol=0, atol=1e-11)


@pytest.mark.parametrize("rule", ["linear", "delta"])
def test_a_token_moves_no_memory_that_it_is_not_for(rule: Rule) -> None:
    mixer, x = _mixer(rule, topk=1, shared=False), _tokens(40, batch=1)
    with torch.no_grad():
        mine = int(mixer.route(x)[2][0, 7].nonzero())
        other = x.clone()
        other[0, 7] = 1.5 * x[0, 7] + 0.01  # its memory stays the same one
        assert int(mixer.route(other)[2][0, 7].nonzero()) == mine
        before, after = (mixer.prefill(z)[1]["memory"].view(3, 2, 4, 4) for z in (x, other))
    for m in range(3):
        assert torch.equal(before[m], after[m]) == (m != mine)


def test_weights_sum_to_one_and_are_the_largest() -> None:
    mixer = _mixer("linear", memories=5)
    probability, weight, chosen = mixer.route(_tokens())
    torch.testing.assert_close(weight.sum(-1), torch.ones(2, 20, dtype=F64), rtol=0, atol=1e-14)
    assert torch.equal(chosen.sum(-1), torch.full((2, 20), 2))
    least, most_left = probability.masked_fill(~chosen, 2).amin(-1), probability.masked_fill(chosen, -1).amax(-1)
    assert bool((least > most_left).all())
    torch.testing.assert_close(mixer.load(_tokens()), chosen.double().mean((0, 1)) / 2, rtol=0, atol=1e-14)


def test_balance_is_one_where_uniform_and_by_hand_elsewhere() -> None:
    uniform = torch.full((1, 4, 4), 0.25, dtype=F64)
    turns = torch.eye(4, dtype=torch.bool)[None]
    assert float(balance(uniform, turns)) == pytest.approx(1.0, abs=1e-14)
    probability = torch.tensor([[[0.7, 0.2, 0.1], [0.5, 0.3, 0.2]]], dtype=F64)
    chosen = torch.tensor([[[True, True, False], [True, False, True]]])
    by_hand = 3 * (0.5 * 0.6 + 0.25 * 0.25 + 0.25 * 0.15)
    assert float(balance(probability, chosen)) == pytest.approx(by_hand, abs=1e-14)
    everything = torch.tensor([[[True, False, False]]]).expand(1, 2, 3)
    assert float(balance(everything.double(), everything)) == pytest.approx(3.0, abs=1e-14)


def test_balance_loss_moves_the_router_only() -> None:
    mixer = _mixer("gated-delta")
    mixer.balance_loss(_tokens()).backward()  # type: ignore[no-untyped-call]
    assert [name for name, p in mixer.named_parameters() if p.grad is not None] == ["router.weight"]
    grad = mixer.router.weight.grad
    assert grad is not None
    assert float(grad.abs().max()) > 0


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(BadInput, match="gated-delta"):
        MixtureOfMemories(8, num_heads=2, rule="gated_delta")  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="topk"):
        MixtureOfMemories(8, num_heads=2, num_memories=2, topk=3)
