"""The base of all mixers: packing, short convolutions, norms of heads, and what a linear mixer makes of its tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from torchgraft.engines.recurrence.heads import HeadNorm, ShortConvolution, head_size, merge_heads, split_heads
from torchgraft.engines.recurrence.linear_mixer import LinearMixer, Tokens
from torchgraft.engines.recurrence.mixer import Mixer, State
from torchgraft.engines.recurrence.packing import lengths_of
from torchgraft.errors import BadInput


class Sum(LinearMixer):
    """Adds up its own inputs: q = k = 1 and v = x, one head."""

    def __init__(self, d_model: int) -> None:
        super().__init__(d_model, num_heads=1, key_size=1, value_size=d_model)
        self.weight = nn.Parameter(torch.ones(()))

    def tokens(self, x: Tensor, state: State) -> tuple[Tokens, State]:
        ones = torch.ones_like(x[..., None, :1])
        return Tokens(ones, ones, x[..., None, :]), {"seen": state["seen"] + x.shape[1]}

    def output(self, o: Tensor, x: Tensor) -> Tensor:
        return self.weight * merge_heads(o)

    def init_rest(self, batch_size: int) -> State:
        return {"seen": torch.zeros(batch_size, dtype=torch.int64)}


class Mean(Mixer):
    """Every token becomes the mean of all: not causal."""

    causal = False

    def forward(self, x: Tensor) -> Tensor:
        return self.checked(x).mean(1, keepdim=True).expand_as(x)


def test_linear_mixer_carries_the_memory_and_the_rest() -> None:
    x = torch.randn(2, 7, 3)
    y, state = Sum(3).prefill(x[:, :4])
    torch.testing.assert_close(y, x[:, :4].cumsum(1))
    assert state["seen"].tolist() == [4, 4]
    z, state = Sum(3).step(x[:, 4], state)
    torch.testing.assert_close(z, x[:, :5].sum(1))
    assert state["memory"].shape == (2, 1, 1, 3)
    assert state["memory"].dtype == torch.float32
    assert Sum(3).double().init_state(1)["memory"].dtype == torch.float64


@pytest.mark.parametrize("made", [Sum(3), Mean(3)], ids=["causal", "not causal"])
def test_packed_sequences_are_mixed_alone(made: Mixer) -> None:
    pieces = [torch.randn(1, length, 3) for length in (4, 1, 6)]
    packed = made.packed(torch.cat(pieces, dim=1), torch.tensor([0, 4, 5, 11]))
    torch.testing.assert_close(packed, torch.cat([made(piece) for piece in pieces], dim=1))


@pytest.mark.parametrize(
    ("places", "message"),
    [
        ([0, 4, 3, 11], "rise from 0 to 11"),
        ([0, 4, 10], "rise from 0 to 11"),
        ([1, 11], "rise from 0 to 11"),
        ([0, 4, 4, 11], "rise from 0 to 11"),
        ([11], "sequences \\+ 1"),
    ],
)
def test_wrong_starts_are_refused(places: list[int], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        lengths_of(torch.tensor(places), torch.zeros(1, 11, 3))


def test_packing_wants_a_batch_of_one_and_integers() -> None:
    with pytest.raises(BadInput, match="batch of 1, got 2"):
        lengths_of(torch.tensor([0, 3]), torch.zeros(2, 3, 3))
    with pytest.raises(BadInput, match="integers"):
        lengths_of(torch.tensor([0.0, 3.0]), torch.zeros(1, 3, 3))


def test_wrong_inputs_of_a_mixer_are_named() -> None:
    with pytest.raises(BadInput, match=r"\(B, T, 3\), got \(2, 7, 4\)"):
        Sum(3)(torch.zeros(2, 7, 4))
    with pytest.raises(BadInput, match="floating point"):
        Sum(3)(torch.zeros(2, 7, 3, dtype=torch.long))
    with pytest.raises(BadInput, match=r"\(B, 3\), got \(2, 1, 3\)"):
        Sum(3).step(torch.zeros(2, 1, 3), Sum(3).init_state(2))
    with pytest.raises(BadInput, match="d_model must be at least 1"):
        Mean(0)


@pytest.mark.parametrize("kernel", [1, 2, 4])
def test_short_convolution_is_the_direct_sum(kernel: int) -> None:
    made = ShortConvolution(3, kernel, activation=False).double()
    x = torch.randn(2, 9, 3, dtype=torch.float64)
    wanted = torch.zeros_like(x)
    for t in range(9):
        for tap in range(kernel):
            if t - tap >= 0:
                wanted[:, t] += made.weight[:, kernel - 1 - tap] * x[:, t - tap]
    y, state = made(x)
    torch.testing.assert_close(y, wanted)
    assert state.shape == (2, kernel - 1, 3)
    first, held = made(x[:, :4], made.init_state(2))
    second, last = made(x[:, 4:], held)
    torch.testing.assert_close(torch.cat([first, second], 1), wanted)
    torch.testing.assert_close(last, state)


def test_short_convolution_of_fewer_tokens_than_taps() -> None:
    made = ShortConvolution(3, 4)
    x = torch.randn(2, 6, 3)
    whole, _ = made(x)
    state, pieces = made.init_state(2), []
    for t in range(6):
        y, state = made(x[:, t : t + 1], state)
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, 1), whole)


def test_head_norm_has_unit_root_mean_square_for_each_head() -> None:
    x = 7 * torch.randn(2, 5, 3, 8)
    y = HeadNorm(8, affine=False)(x)
    torch.testing.assert_close(y.square().mean(-1), torch.ones(2, 5, 3), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(HeadNorm(8, affine=False)(3 * x), y, rtol=1e-4, atol=1e-5)


def test_heads_split_and_merge() -> None:
    x = torch.randn(2, 5, 12)
    torch.testing.assert_close(split_heads(x, 3)[:, :, 1], x[..., 4:8])
    torch.testing.assert_close(merge_heads(split_heads(x, 3)), x)
    assert head_size(12, 3) == 4
    with pytest.raises(BadInput, match="num_heads must divide d_model = 12, got 5"):
        head_size(12, 5)
