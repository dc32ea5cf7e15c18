"""The classical cells against torch's and by hand, truncated backpropagation, and gradients through time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from torchgraft.engines.recurrence.cells import from_torch
from torchgraft.errors import BadInput
from torchgraft.parts.mixers.rnn_critical_review import (
    TAXONOMY,
    Bidirectional,
    Classic,
    ClassicRNN,
    gradient_bound,
    gradient_norm_profile,
    tbptt,
)

F64 = torch.float64
CELLS: tuple[Classic, ...] = ("linear", "elman", "jordan", "lstm-1997", "lstm", "lstm-peephole")


def _mixer(cell: Classic, width: int = 5) -> ClassicRNN:
    torch.manual_seed(0)
    return ClassicRNN(width, cell=cell).double()


@pytest.mark.parametrize(("kind", "cell"), [(nn.RNN, "elman"), (nn.LSTM, "lstm")])
def test_cells_are_torchs(kind: type[nn.RNN | nn.LSTM], cell: Classic) -> None:
    mixer, rnn = _mixer(cell), kind(5, 5, batch_first=True).double()
    _, weight, bias, recurrent, _ = from_torch(rnn)
    with torch.no_grad():
        mixer.inward.weight.copy_(weight)
        mixer.inward.bias.copy_(bias)
        mixer.recurrent.copy_(recurrent[0])
    x = torch.randn(2, 8, 5, dtype=F64)
    torch.testing.assert_close(mixer.hidden(x)[0], rnn(x)[0], atol=1e-12, rtol=0)


def test_lstm_1997_never_forgets() -> None:
    """Its cell is the running sum of what the input gates let in."""
    mixer = _mixer("lstm-1997")
    with torch.no_grad():
        mixer.recurrent.zero_()
    x = torch.randn(2, 40, 5, dtype=F64)
    _, i, z = mixer.inward(x).chunk(3, dim=-1)
    _, state = mixer.hidden(x)
    torch.testing.assert_close(state["c"], (i.sigmoid() * z.tanh()).sum(1), atol=1e-12, rtol=0)


def test_jordan_feeds_back_its_output() -> None:
    mixer = _mixer("jordan")
    x = torch.randn(2, 3, 5, dtype=F64)
    y = mixer(x)
    h = (mixer.inward(x[:, 1]) + y[:, 0] @ mixer.recurrent[0].T).tanh()
    torch.testing.assert_close(y[:, 1], mixer.outward(h))


def test_peepholes_see_the_cell() -> None:
    mixer, plain = _mixer("lstm-peephole"), _mixer("lstm")
    plain.load_state_dict(mixer.state_dict(), strict=False)
    x = torch.randn(2, 9, 5, dtype=F64)
    torch.testing.assert_close(mixer(x), plain(x), atol=1e-12, rtol=0)  # at 0, as they start
    assert mixer.peephole is not None
    with torch.no_grad():
        mixer.peephole.copy_(torch.randn(3, 5))
    c_0, c = torch.randn(2, 2, 5, dtype=F64).unbind(0)
    y_0 = torch.randn(2, 5, dtype=F64)
    o, i, f, z = (mixer.inward(x[:, 0]).view(2, 4, 5) + torch.einsum("gij,bj->bgi", mixer.recurrent, y_0)).unbind(1)
    at_o, at_i, at_f = mixer.peephole.unbind(0)
    c = (f + at_f * c_0).sigmoid() * c_0 + (i + at_i * c_0).sigmoid() * z.tanh()
    h, state = mixer.hidden(x[:, :1], {"y": y_0, "c": c_0})
    torch.testing.assert_close(state["c"], c)
    torch.testing.assert_close(h[:, 0], (o + at_o * c).sigmoid() * c.tanh())


@pytest.mark.parametrize("cell", CELLS)
def test_steps_are_the_scan(cell: Classic) -> None:
    mixer, x = _mixer(cell), torch.randn(2, 11, 5, dtype=F64)
    whole, last = mixer.prefill(x)
    state, steps = mixer.init_state(2), []
    for x_t in x.unbind(1):
        y, state = mixer.step(x_t, state)
        steps.append(y)
    torch.testing.assert_close(torch.stack(steps, 1), whole, atol=1e-12, rtol=0)
    assert sorted(state) == sorted(last) == sorted(TAXONOMY[cell].states)


def _gradients(mixer: ClassicRNN, x: Tensor, k: int) -> list[Tensor]:
    mixer.zero_grad()
    tbptt(mixer, x, lambda y, tokens: (y * (x[:, tokens] + 1)).sum(), k=k)
    return [p.grad.clone() for p in mixer.parameters() if p.grad is not None]


@pytest.mark.parametrize("cell", ["elman", "lstm", "lstm-peephole"])
def test_truncation(cell: Classic) -> None:
    mixer, x = _mixer(cell), torch.randn(2, 7, 5, dtype=F64)
    full = torch.autograd.grad((mixer(x) * (x + 1)).sum(), list(mixer.parameters()))
    for k in (7, 50):
        torch.testing.assert_close(_gradients(mixer, x, k), list(full), atol=1e-12, rtol=0)
    state, loss = mixer.init_state(2), torch.zeros((), dtype=F64)
    for x_t in x.unbind(1):
        y, state = mixer.step(x_t, {name: value.detach() for name, value in state.items()})
        loss = loss + (y * (x_t + 1)).sum()
    one = _gradients(mixer, x, 1)
    torch.testing.assert_close(one, list(torch.autograd.grad(loss, list(mixer.parameters()))), atol=1e-12, rtol=0)
    assert float((one[0] - full[0]).abs().max()) > 1e-3  # truncation is felt
    with pytest.raises(BadInput, match="k must be"):
        _gradients(mixer, x, 0)


@pytest.mark.parametrize("rho", [1.0, 0.8, 1.2])
def test_gradients_of_a_scaled_orthogonal_network(rho: float) -> None:
    mixer = _mixer("linear")
    orthogonal = torch.linalg.qr(torch.randn(5, 5, dtype=F64)).Q
    with torch.no_grad():
        mixer.recurrent[0] = rho * orthogonal
    x = torch.randn(1, 20, 5, dtype=F64)
    expected = rho ** torch.arange(19, -1, -1, dtype=F64)
    torch.testing.assert_close(gradient_norm_profile(mixer, x), expected, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(gradient_bound(mixer.recurrent[0], 20), expected, atol=1e-12, rtol=1e-12)


def test_bound_holds_for_tanh_even_where_it_grows() -> None:
    mixer = _mixer("elman")
    with torch.no_grad():
        mixer.recurrent.mul_(3)
    profile = gradient_norm_profile(mixer, torch.randn(1, 30, 5, dtype=F64))
    bound = gradient_bound(mixer.recurrent[0], 30)
    assert float(bound[0]) > 1
    assert bool((profile <= bound * (1 + 1e-12)).all())
    assert float(profile[-1]) == pytest.approx(1)


def test_the_cell_carries_the_error_without_loss() -> None:
    """In the LSTM of 1997 without recurrent weights, d c_T / d c_t is the identity, so norms are equal at all lags."""
    mixer = _mixer("lstm-1997")
    with torch.no_grad():
        mixer.recurrent.zero_()
    profile = gradient_norm_profile(mixer, torch.randn(1, 60, 5, dtype=F64))
    torch.testing.assert_close(profile[:-1], profile[:1].expand(59), atol=1e-12, rtol=0)


def test_reversal_swaps_the_directions() -> None:
    one, other = _mixer("lstm"), ClassicRNN(5).double()
    x = torch.randn(2, 9, 5, dtype=F64)
    torch.testing.assert_close(Bidirectional(one, other)(x.flip(1)), Bidirectional(other, one)(x).flip(1))
    moved = x.clone()
    moved[:, -1] += 1
    assert float((Bidirectional(one, other)(x) - Bidirectional(one, other)(moved))[:, 0].detach().abs().max()) > 0
    with pytest.raises(BadInput, match="one width"):
        Bidirectional(one, ClassicRNN(4))


def test_bidirectional_is_torchs() -> None:
    rnn = nn.LSTM(5, 5, batch_first=True, bidirectional=True).double()
    sides = []
    for end in ("", "_reverse"):
        single = nn.LSTM(5, 5, batch_first=True).double()
        single.load_state_dict(
            {
                name.removesuffix("_reverse"): value
                for name, value in rnn.state_dict().items()
                if name.endswith("_reverse") == bool(end)
            }
        )
        _, weight, bias, recurrent, _ = from_torch(single)
        mixer = ClassicRNN(5).double()
        with torch.no_grad():
            mixer.inward.weight.copy_(weight)
            mixer.inward.bias.copy_(bias)
            mixer.recurrent.copy_(recurrent[0])
            mixer.outward.weight.copy_(torch.eye(5))
            mixer.outward.bias.zero_()
        sides.append(mixer)
    x = torch.randn(2, 6, 5, dtype=F64)
    left, right = rnn(x)[0].chunk(2, dim=-1)
    torch.testing.assert_close(Bidirectional(*sides)(x), left + right, atol=1e-12, rtol=0)


def test_unknown_cell_is_named() -> None:
    with pytest.raises(BadInput, match="did you mean 'lstm-peephole'"):
        ClassicRNN(4, cell="lstm-peepholes")  # type: ignore[arg-type]
