"""Continual inference networks: a stream gives what the clip network gives, at a known delay and a known cost."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft.bench.meters import macs
from torchgraft.elastic.continual_inference_networks import RecyclingPositionalEncoding, SPLoRA, to_continual
from torchgraft.errors import BadInput


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(width, width, 3, padding=(0, 1, 1))
        self.norm = nn.BatchNorm3d(width)
        self.norm.running_var.uniform_(0.5, 2.0)  # type: ignore[union-attr]

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x[:, :, 1:-1] + self.norm(self.conv(x)))


class StGcn(nn.Module):
    """A spatio-temporal graph block: convolution, view, einsum over the joints, temporal convolution, residual."""

    def __init__(self, joints: int, stride: int = 1) -> None:
        super().__init__()
        self.graph = nn.Conv2d(3, 2 * 4, 1)
        self.time = nn.Conv2d(4, 4, (5, 1), padding=(2, 0), stride=(stride, 1))
        self.down = nn.Conv2d(3, 4, 1, stride=(stride, 1))
        self.norm = nn.BatchNorm2d(4)
        self.register_buffer("a", torch.rand(2, joints, joints))

    def forward(self, x: Tensor) -> Tensor:
        res = self.down(x)
        x = self.graph(x)
        n, kc, t, v = x.size()
        x = torch.einsum("nkctv,kvw->nctw", (x.view(n, 2, kc // 2, t, v), self.a))
        return F.relu(self.norm(self.time(x)) + res)


class Tokens(nn.Module):
    def __init__(self, depth: int, *, norm_first: bool, last: bool, positions: bool = False) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 8)
        self.positions = RecyclingPositionalEncoding(8, 6) if positions else nn.Identity()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=norm_first)
        self.encoder = nn.TransformerEncoder(layer, depth, norm=nn.LayerNorm(8), enable_nested_tensor=False)
        self.head = nn.Linear(8, 4)
        self.last = last

    def forward(self, x: Tensor) -> Tensor:
        x = self.encoder(self.positions(self.embed(x)))
        return self.head(x[:, -1] if self.last else x.mean(1))


def _video() -> nn.Module:
    return nn.Sequential(
        nn.Conv3d(1, 4, 3, padding=(0, 1, 1)),
        nn.ReLU(),
        Residual(4),
        nn.MaxPool3d((1, 2, 2)),
        nn.Conv3d(4, 4, (3, 1, 1), dilation=(2, 1, 1), groups=2),
        nn.AdaptiveAvgPool3d(1),
        nn.Flatten(1),
        nn.Linear(4, 5),
    )


def _strided() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(3, 4, 3, stride=2), nn.GELU(), nn.AvgPool1d(2, 1), nn.Conv1d(4, 5, 2), nn.AdaptiveMaxPool1d(1)
    )


CLIPS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "video": (_video, (2, 1, 16, 6, 6), 2),
    "strided": (_strided, (2, 3, 17), 2),
    "newest of two layers": (lambda: Tokens(2, norm_first=True, last=True), (2, 6, 3), 1),
    "mean of one layer": (lambda: Tokens(1, norm_first=False, last=False), (2, 6, 3), 1),
    "mean of two layers": (lambda: Tokens(2, norm_first=True, last=False), (2, 6, 3), 1),
    "newest of one layer": (lambda: Tokens(1, norm_first=False, last=True), (2, 6, 3), 1),
}


def _moved(model: nn.Module) -> nn.Module:
    model = model.double().eval()
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.2 * torch.randn_like(value))
    return model


@pytest.mark.parametrize("name", CLIPS)
@pytest.mark.parametrize("size", [1, 3])
@torch.no_grad()
def test_every_valid_step_is_the_clip_network_on_its_window(name: str, size: int) -> None:
    build, shape, time = CLIPS[name]
    model = _moved(build())
    window, frames = shape[time], shape[time] + 12
    stream = to_continual(model, torch.zeros(shape, dtype=torch.float64), time=time)
    x = torch.randn([frames if axis == time else each for axis, each in enumerate(shape)], dtype=torch.float64)
    found: list[Tensor] = []
    steps: list[int] = []
    for start in range(0, frames, size):
        chunk = x.narrow(time, start, min(size, frames - start))
        out = stream.forward_step(chunk.select(time, 0)) if size == 1 else stream.forward_steps(chunk)
        if out is not None:
            found += [out] if size == 1 else list(out.unbind(1))
            steps.append(start)
    starts = list(range(0, frames - window + 1, stream.stride))
    assert len(found) == len(starts)
    for out, start in zip(found, starts, strict=True):
        torch.testing.assert_close(out, model(x.narrow(time, start, window)), rtol=0, atol=1e-10)
    if size == 1:
        assert steps == list(range(stream.delay, frames, stream.stride))
        assert stream.delay == window - 1 - (window - 1) % stream.stride
    torch.testing.assert_close(stream(x.narrow(time, 0, window)), found[0], rtol=0, atol=1e-10)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [1, 4])
@torch.no_grad()
def test_a_padded_graph_block_equals_the_whole_sequence(stride: int, size: int) -> None:
    model = _moved(nn.Sequential(nn.BatchNorm2d(3), StGcn(5, stride), nn.Conv2d(4, 2, (3, 1), padding=(1, 0))))
    stream = to_continual(model, torch.zeros(1, 3, 12, 5, dtype=torch.float64))
    x = torch.randn(1, 3, 21, 5, dtype=torch.float64)
    expected = model(x)
    made, first = [], None
    for start in range(0, 21, size):
        out = stream.forward_steps(x[:, :, start : start + size], last=start + size >= 21)
        if out is not None:
            first = start if first is None else first
            made.append(out)
    torch.testing.assert_close(torch.cat(made, 2), expected, rtol=0, atol=1e-10)
    assert (stream.delay, stream.stride) == (2 + stride, stride)
    if size == 1:
        assert first == stream.delay
    stream.reset()
    single = stream.forward_steps(x, last=True)
    torch.testing.assert_close(single, expected, rtol=0, atol=1e-10)


@torch.no_grad()
def test_recycled_positions_keep_their_place_in_the_circle() -> None:
    model = _moved(Tokens(1, norm_first=True, last=True, positions=True))
    stream = to_continual(model, torch.zeros(1, 6, 3, dtype=torch.float64), time=1)
    x = torch.randn(1, 14, 3, dtype=torch.float64)
    for t in range(14):
        out = stream.forward_step(x[:, t])
        if t >= 5:
            embedded = model.embed(x[:, t - 5 : t + 1])  # type: ignore[operator]
            clip = model.positions(embedded, t - 5)  # type: ignore[operator]
            expected = model.head(model.encoder(clip)[:, -1])  # type: ignore[operator]
            torch.testing.assert_close(out, expected, rtol=0, atol=1e-10)


def test_work_per_frame_is_that_of_the_clip_divided_by_its_length() -> None:
    conv = [nn.Conv3d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv3d(4, 4, (5, 3, 3), padding=(2, 1, 1))]
    model = nn.Sequential(*conv).eval()
    stream = to_continual(model, torch.zeros(1, 1, 16, 6, 6))
    frames = torch.randn(1, 1, 16, 6, 6)
    with torch.no_grad():
        stream.forward_steps(frames)
    assert macs(stream.per_frame(), frames[:, :, 0]) * 16 == macs(model, frames)
    model = _video().eval()
    stream = to_continual(model, frames)
    with torch.no_grad():
        stream.forward_steps(frames)
    assert macs(stream.per_frame(), frames[:, :, 0]) * 8 <= macs(model, frames)


def test_weights_are_shared_and_a_copy_has_its_own() -> None:
    model = _video().eval()
    stream = to_continual(model, torch.zeros(1, 1, 16, 6, 6))
    assert {id(value) for value in stream.parameters()} == {id(value) for value in model.parameters()}
    twin = copy.deepcopy(stream)
    x = torch.randn(1, 1, 16, 6, 6)
    with torch.no_grad():
        expected = stream.forward_steps(x)
        for value in model.parameters():
            value.mul_(1.5)
        stream.reset()
        torch.testing.assert_close(twin.forward_steps(x), expected)
        torch.testing.assert_close(stream.forward_steps(x), model(x)[:, None])


class Whole(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.conv, self.fixed = how, nn.Conv1d(2, 2, 1), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if self.how == "softmax":
            return torch.softmax(x, 2)
        if self.how == "flatten":
            return self.fixed(x.flatten(1))
        if self.how == "flip":
            return x.flip(2)
        if self.how == "maps":
            return x.transpose(1, 2) @ x
        if self.how == "pair":
            return x.chunk(2, 1)[0]
        if self.how == "two":
            return x + x.mean(2, keepdim=True)
        return x[:, :, ::2]


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (Whole("softmax"), "softmax"),
        (Whole("flatten"), "fixed fails"),
        (Whole("flip"), "flip.* mixes frames"),
        (Whole("maps"), "several sizes"),
        (Whole("two"), "add.* puts frames together"),
        (Whole("step"), "getitem.* changes the number"),
        (nn.Sequential(nn.Conv1d(2, 4, 1), nn.GroupNorm(2, 4)), "1 mixes frames"),
        (nn.Sequential(nn.Conv1d(2, 4, 3, padding=1), nn.AdaptiveAvgPool1d(1)), "0 pads each clip"),
        (Whole("pair"), "several tensors"),
    ],
)
def test_what_cannot_be_a_stream_is_refused_by_name(model: nn.Module, words: str) -> None:
    with pytest.raises(BadInput, match=words):
        to_continual(model.eval(), torch.zeros(1, 2, 8))


def test_bad_input() -> None:
    model = nn.Sequential(nn.Conv1d(2, 4, 3))
    with pytest.raises(BadInput, match="eval mode"):
        to_continual(model, torch.zeros(1, 2, 8))
    with pytest.raises(BadInput, match="edges"):
        to_continual(model.eval(), torch.zeros(1, 2, 8), edges="zero")  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="2 frames"):
        to_continual(model, torch.zeros(1, 2, 1))
    with pytest.raises(BadInput, match="floating-point"):
        to_continual(model, torch.zeros(1, 2, 8, dtype=torch.int64))
    stream = to_continual(model, torch.zeros(1, 2, 8))
    stream.forward_step(torch.zeros(1, 2))
    with pytest.raises(BadInput, match="reset"):
        stream.forward_step(torch.zeros(3, 2))
    stream.train()
    with pytest.raises(BadInput, match="eval"):
        stream.forward_step(torch.zeros(1, 2))


def test_edges_of_the_stream_differ_only_where_the_clip_has_zeros() -> None:
    model = nn.Sequential(nn.Conv1d(2, 4, 3, padding=1), nn.AdaptiveAvgPool1d(1)).eval()
    stream = to_continual(model, torch.zeros(1, 2, 8), edges="stream")
    x = torch.randn(1, 2, 12)
    with torch.no_grad():
        found = stream.forward_steps(x)
        conv = model[0](x)
    torch.testing.assert_close(found[:, :, :, 0], conv[:, :, :-1].unfold(2, 8, 1).mean(-1).transpose(1, 2))  # type: ignore[index]


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(6, 4), (5, 6)),
        (nn.Conv2d(3, 4, 3, stride=2, padding=1, bias=False), (2, 3, 7, 7)),
        (nn.Conv1d(3, 4, 3, dilation=2), (2, 3, 9)),
    ],
)
def test_splora_starts_as_the_layer_and_fuses(layer: nn.Module, shape: tuple[int, ...]) -> None:
    layer = layer.double()
    adapter = SPLoRA(layer, rank=2)  # type: ignore[arg-type]
    x = torch.randn(shape, dtype=torch.float64)
    assert torch.equal(adapter(x), layer(x))
    assert [name for name, value in adapter.named_parameters() if value.requires_grad] == ["up", "down"]
    with torch.no_grad():
        adapter.up.normal_()
    assert not torch.allclose(adapter(x), layer(x))
    out = torch.tensor([True, False, True, True])
    inputs = torch.ones(adapter.in_mask.shape, dtype=torch.bool)
    inputs[1] = False
    adapter.prune(out=out, inputs=inputs)
    y = adapter(x)
    torch.testing.assert_close(adapter.fuse()(x), y, rtol=0, atol=1e-12)
    kept = x[:, inputs]
    axis = 1
    torch.testing.assert_close(adapter.fuse(cut=True)(kept), y[:, out], rtol=0, atol=1e-12)
    assert float(y.select(axis, 1).detach().abs().max()) == 0.0
    kernel = adapter.down[0, 0].numel()
    assert adapter.learned == 2 * (3 + int(inputs.sum()) * kernel)


def test_splora_refuses() -> None:
    with pytest.raises(BadInput, match="one group"):
        SPLoRA(nn.Conv1d(4, 4, 1, groups=2))
    with pytest.raises(BadInput, match="rank"):
        SPLoRA(nn.Linear(2, 2), rank=0)
    with pytest.raises(BadInput, match="out must be booleans"):
        SPLoRA(nn.Linear(2, 2)).prune(out=torch.zeros(2, dtype=torch.bool))
