"""Cells and attentions of a stream against the same operation on the whole clip, in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from torchgraft.engines.streaming import (
    Cell,
    LastCell,
    MeanCell,
    RecyclingPositionalEncoding,
    RetroactiveAttention,
    SingleOutputAttention,
    SkipCell,
)
from torchgraft.engines.streaming.cells import window_cell
from torchgraft.errors import BadInput


def _fed(cell: Cell, x: Tensor, sizes: list[int], axis: int, *, last: bool) -> tuple[Tensor | None, int | None]:
    """Return all outputs of a cell fed in chunks, and the step at which the first one came."""
    made, start, first = [], 0, None
    while start < x.shape[axis]:
        size = min(sizes[len(made) % len(sizes)], x.shape[axis] - start)
        end = last and start + size == x.shape[axis]
        out = cell.push(x.narrow(axis, start, size), end)
        if out is not None and first is None:
            first = start
        made.append(out)
        start += size
    found = [each for each in made if each is not None]
    return (torch.cat(found, axis) if found else None), first


@settings(max_examples=60, deadline=None)
@given(
    kernel=st.integers(1, 4),
    dilation=st.integers(1, 3),
    stride=st.integers(1, 4),
    padding=st.integers(0, 3),
    groups=st.sampled_from([1, 2]),
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    length=st.integers(1, 17),
)
def test_a_convolution_in_chunks_is_the_convolution_of_the_clip(
    kernel: int, dilation: int, stride: int, padding: int, groups: int, sizes: list[int], length: int
) -> None:
    span = dilation * (kernel - 1) + 1
    conv = nn.Conv1d(2, 4, kernel, stride, padding, dilation, groups, dtype=torch.float64)
    if padding > span - 1:
        with pytest.raises(BadInput, match="pads more frames"):
            window_cell(conv, 2, "conv")
        return
    cell = window_cell(conv, 2, "conv")
    assert cell is not None
    x = torch.randn(1, 2, length, dtype=torch.float64)
    with torch.no_grad():
        found, _ = _fed(cell, x, sizes, 2, last=True)
        if length + 2 * padding < span:
            assert found is None
        else:
            torch.testing.assert_close(found, conv(x), rtol=0, atol=1e-12)
        cell.reset()
        steps, first = _fed(cell, x, [1], 2, last=False)
        assert first == (cell.wait if cell.wait < length else None)
        if steps is not None:
            torch.testing.assert_close(steps, conv(x)[:, :, : steps.shape[2]], rtol=0, atol=1e-12)
            assert steps.shape[2] == (length - 1 - cell.wait) // stride + 1


@pytest.mark.parametrize(
    ("pool", "shape", "axis"),
    [
        (nn.MaxPool3d((3, 2, 2), stride=(2, 2, 2), padding=(1, 0, 1)), (1, 2, 13, 4, 4), 2),
        (nn.AvgPool3d((2, 2, 2), stride=(1, 2, 2), padding=(1, 1, 0)), (1, 2, 9, 4, 4), 2),
        (nn.MaxPool2d((3, 1), stride=1, dilation=(2, 1)), (2, 2, 9, 3), 2),
        (nn.AvgPool2d((1, 3)), (2, 2, 9, 7), 3),
        (nn.AvgPool1d(3), (2, 2, 10), 2),
    ],
)
def test_pools(pool: nn.Module, shape: tuple[int, ...], axis: int) -> None:
    cell = window_cell(pool, axis, "pool")
    assert cell is not None
    x = torch.randn(shape, dtype=torch.float64)
    found, _ = _fed(cell, x, [1, 2, 4], axis, last=True)
    torch.testing.assert_close(found, pool(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("module", "axis", "words"),
    [
        (nn.Conv1d(1, 1, 3, padding=1, padding_mode="circular"), 2, "circular"),
        (nn.Conv1d(1, 1, 2, padding="same"), 2, "unevenly"),
        (nn.MaxPool1d(2, ceil_mode=True), 2, "ceil_mode"),
        (nn.AvgPool1d(3, padding=1, count_include_pad=False), 2, "count the padding"),
        (nn.Conv1d(1, 1, 3), 1, "channel"),
    ],
)
def test_layers_that_a_stream_cannot_run_are_refused(module: nn.Module, axis: int, words: str) -> None:
    with pytest.raises(BadInput, match=words):
        window_cell(module, axis, "here")
    assert window_cell(nn.Linear(2, 2), 2, "here") is None


def test_running_mean_does_not_drift() -> None:
    cell = MeanCell(1, window=5)
    x = torch.randn(1, 3000) + 1000.0
    x[:, 100] = 1e8  # swamps a float32 sum: without a fresh start its error would stay for good
    found = torch.cat([out for frame in x.split(1, 1) if (out := cell.push(frame)) is not None], 1)
    assert found.shape[1] == 3000 - 4
    expected = x.unfold(1, 5, 1).mean(-1)
    torch.testing.assert_close(found[:, 200:], expected[:, 200:], rtol=1e-6, atol=0)


def test_skipped_and_last_frames() -> None:
    x = torch.arange(7.0)[None]
    assert _fed(SkipCell(1, count=3), x, [1, 2], 1, last=False)[0].tolist() == [[3, 4, 5, 6]]  # type: ignore[union-attr]
    assert _fed(LastCell(1, window=3), x, [2, 1], 1, last=False)[0].tolist() == [[2, 3, 4, 5, 6]]  # type: ignore[union-attr]


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("bias", [True, False])
def test_attentions_equal_attention_over_each_window(bias: bool, seed: int) -> None:
    torch.manual_seed(seed)
    attention = nn.MultiheadAttention(8, 2, bias=bias, batch_first=True, dtype=torch.float64).eval()
    with torch.no_grad():
        for value in attention.parameters():
            value.add_(torch.randn_like(value))
        x = torch.randn(2, 20, 8, dtype=torch.float64)
        every, newest = RetroactiveAttention(attention, 5, renew=4), SingleOutputAttention(attention, 5)
        for t in range(20):
            found, last = every.forward_step(x[:, t]), newest.forward_step(x[:, t])
            if t < 4:
                assert found is last is None
                continue
            clip = x[:, t - 4 : t + 1]
            expected = attention(clip, clip, clip, need_weights=False)[0]
            # Sums that lose a millionth of themselves at most: 1e-16 / 1e-6.
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(last, expected[:, -1], rtol=0, atol=1e-10)
            torch.testing.assert_close(every(clip), expected, rtol=0, atol=1e-12)
            torch.testing.assert_close(newest(clip), expected[:, -1], rtol=0, atol=1e-12)
        every.reset()
        assert every.forward_steps(x[:, :3]) is None
        assert every.forward_steps(x[:, :4]).shape == (2, 3, 5, 8)  # type: ignore[union-attr]


def test_retroactive_sums_survive_long_streams_and_huge_scores() -> None:
    attention = nn.MultiheadAttention(4, 1, batch_first=True).eval()
    stream = RetroactiveAttention(attention, 6)
    x = torch.randn(1, 2000, 4)
    x[:, ::50] *= 100.0  # scores of hundreds: exponentials without a shift would overflow
    worst = 0.0
    with torch.no_grad():
        for t in range(2000):
            found = stream.forward_step(x[:, t])
            if found is not None and t % 7 == 0:
                clip = x[:, t - 5 : t + 1]
                expected = attention(clip, clip, clip, need_weights=False)[0]
                worst = max(worst, float((found - expected).abs().max() / expected.abs().max().clamp_min(1)))
    assert worst < 1e-5


def test_attention_refuses_what_it_does_not_know() -> None:
    with pytest.raises(BadInput, match="batch_first"):
        SingleOutputAttention(nn.MultiheadAttention(4, 1), 3)
    with pytest.raises(BadInput, match="window must be at least 1"):
        RetroactiveAttention(nn.MultiheadAttention(4, 1, batch_first=True), 0)
    with pytest.raises(BadInput, match="must be an nn"):
        RetroactiveAttention(nn.Linear(4, 4), 3)  # type: ignore[arg-type]


def test_positions_go_round() -> None:
    positions = RecyclingPositionalEncoding(3, 4)
    x = torch.zeros(1, 6, 3)
    torch.testing.assert_close(positions(x)[0, 4:], positions.table[:2])
    torch.testing.assert_close(positions(x[:, :2], 3)[0], positions.table[[3, 0]])
