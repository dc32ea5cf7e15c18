"""Patterns through bytes and back, and sparse execution by every backend against the dense masked layer."""

from __future__ import annotations

import copy
import logging
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft.bench.files import pack_tensors, unpack_tensors
from torchgraft.bench.meters import macs, params, size
from torchgraft.engines import native, sparse
from torchgraft.engines.sparse import choose, kernel, product
from torchgraft.engines.sparse.pattern import Pattern, best_blocks, block_scores, decode, encode, kept_blocks
from torchgraft.engines.surgery.edits import apply_edits, edit_from_record, edit_to_record, history
from torchgraft.errors import BadInput

BLOCKS = ((1, 1), (2, 1), (4, 1), (2, 2), (4, 4), (1, 3))


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def _masked(weight: Tensor, blocks: Tensor, block: tuple[int, int]) -> Tensor:
    """Return the weight with zeros outside the kept blocks, by a way of its own."""
    across = weight.shape[1] // block[1]
    out = torch.zeros_like(weight)
    for number in blocks.tolist():
        top, left = number // across * block[0], number % across * block[1]
        area = (slice(top, top + block[0]), slice(left, left + block[1]))
        out[area] = weight[area]
    return out


# The pattern ----------------------------------------------------------------------------------------------------------


@given(st.sets(st.integers(0, 1999), max_size=60))
def test_bytes_hold_any_pattern(numbers: set[int]) -> None:
    blocks = torch.tensor(sorted(numbers), dtype=torch.int64)
    written = encode(blocks, 2000)
    assert written.dtype == torch.uint8
    assert len(written) == len(blocks) + 2000 // 255
    assert decode(written).tolist() == blocks.tolist()


@pytest.mark.parametrize("block", BLOCKS)
def test_places_are_those_of_the_kept_blocks(block: tuple[int, int]) -> None:
    pattern = Pattern(8, 12, block)
    blocks = torch.arange(1, pattern.blocks, 3)
    places = pattern.places(*pattern.streams(blocks))
    ones = torch.zeros(96).index_fill_(0, places, 1.0).view(8, 12)
    assert torch.equal(ones, _masked(torch.ones(8, 12), blocks, block))
    assert len(places.unique()) == len(places) == len(blocks) * block[0] * block[1]


def test_best_blocks_by_hand() -> None:
    weight = torch.tensor([[1.0, -5.0, 0.0], [1.0, 1.0, 4.0]])
    assert block_scores(weight, (2, 1)).tolist() == [[2.0, 6.0, 4.0]]
    assert best_blocks(weight, 2, (2, 1)).tolist() == [1, 2]
    assert best_blocks(weight, 2, (1, 1)).tolist() == [1, 5]
    assert best_blocks(torch.ones(2, 2), 2, (1, 1)).tolist() == [0, 1]  # the earlier of equal ones
    with pytest.raises(BadInput, match=r"kept must lie in \[0, 3\]"):
        best_blocks(weight, 4, (2, 1))


def test_sparsity_is_exact_to_one_block() -> None:
    for block in (1, 2, 4):
        for share in (0.0, 0.3, 0.9, 0.99):
            kept = kept_blocks(64, 30, (block, 1), share)
            assert abs(kept / (64 * 30 / block) - (1 - share)) <= 0.5 * block / (64 * 30) + 1e-12
    assert kept_blocks(4, 4, (4, 1), 0.999) == 1
    for share in (1.0, -0.1):
        with pytest.raises(BadInput, match="sparsity"):
            kept_blocks(4, 4, (1, 1), share)


def test_patterns_that_do_not_tile_are_refused() -> None:
    for rows, columns, block in ((6, 4, (4, 1)), (4, 5, (1, 2)), (6, 6, (3, 1)), (4, 4, (4, 0))):
        with pytest.raises(BadInput, match="divide the matrix"):
            Pattern(rows, columns, block)


# The product ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("threads", [1, 3])
def test_every_backend_equals_the_dense_product(block: tuple[int, int], threads: int) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    names = sparse.backends_for(block)
    assert set(names) <= set(sparse.BACKENDS)
    for rows, depth, batch, width in (
        (20, 36, 1, 1),
        (16, 60, 3, 49),
        (52, 24, 5, 7),
        (4, 12, 2, 64),
        (36, 72, 1, 205),
    ):
        pattern = Pattern(rows, depth, block)
        weight, bias = torch.randn(rows, depth), torch.randn(rows)
        blocks = best_blocks(weight, kept_blocks(rows, depth, block, 0.8), block)
        streams = pattern.streams(blocks)
        masked = _masked(weight, blocks, block)
        values = masked.flatten()[pattern.places(*streams)]
        assert torch.equal(product.dense(values, *streams, pattern), masked)
        x = torch.randn(batch, depth, width)
        tokens = x.transpose(1, 2).reshape(-1, depth).contiguous()
        for name in names:
            for added in (bias, None):
                run = product.sparse_product
                found = run(x, values, added, *streams, pattern, tokens=False, backend=name)
                exact = masked.double() @ x.double()
                exact = exact if added is None else exact + added.double()[:, None]
                assert torch.allclose(found.double(), exact, atol=1e-5), (name, rows)
                flat = run(tokens, values, added, *streams, pattern, tokens=True, backend=name)
                assert torch.allclose(flat.double(), exact.transpose(1, 2).reshape(-1, rows), atol=1e-5), (name, rows)
                assert found.is_contiguous()
                assert flat.is_contiguous()


def test_rows_and_patterns_that_are_empty() -> None:
    pattern = Pattern(8, 8, (4, 1))
    for blocks in (torch.arange(0), torch.tensor([11])):
        streams = pattern.streams(blocks)
        values = torch.ones(4 * len(blocks))
        for name in sparse.backends_for((4, 1)):
            x = torch.eye(8)
            found = product.sparse_product(x, values, None, *streams, pattern, tokens=True, backend=name)
            assert torch.equal(found, _masked(torch.ones(8, 8), blocks, (4, 1)).t())


def test_wrong_shapes_never_reach_the_kernel() -> None:
    pattern = Pattern(4, 4, (1, 1))
    streams, values = pattern.streams(torch.arange(16)), torch.ones(16)
    for x, tokens in ((torch.ones(2, 3), True), (torch.ones(4, 2), False), (torch.ones(1, 3, 2), False)):
        with pytest.raises(BadInput, match="K = 4"):
            product.sparse_product(x, values, None, *streams, pattern, tokens=tokens, backend="dense")
    with pytest.raises(BadInput, match=r"unknown sparse backend 'kernl'.*kernel"):
        product.sparse_product(torch.ones(2, 4), values, None, *streams, pattern, tokens=True, backend="kernl")
    if kernel.available():
        for wrong in ({"values": values[:3]}, {"bias": torch.ones(3)}, {"x": torch.ones(2, 4).double()}):
            given = {"x": torch.ones(2, 4), "values": values, "bias": None, **wrong}
            with pytest.raises(BadInput):
                kernel.product(given["x"], given["values"], *streams, given["bias"], rows=4, tokens=True)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 150), st.floats(0.0, 0.98), st.integers(0, 5))
def test_kernel_on_any_shape(rows: int, depth: int, width: int, share: float, seed: int) -> None:
    torch.manual_seed(seed)
    linear = nn.Linear(depth, rows)
    blocks = best_blocks(linear.weight, kept_blocks(rows, depth, (1, 1), share), (1, 1))
    layer = sparse.to_sparse_layer(linear, blocks, backend="kernel").eval()
    x = torch.randn(width, depth)
    with torch.no_grad():
        expected = F.linear(x.double(), _masked(linear.weight, blocks, (1, 1)).double(), linear.bias.double())
        assert torch.allclose(layer(x).double(), expected, atol=1e-5)


# The kernel's way onto the machine ------------------------------------------------------------------------------------


def _fresh(monkeypatch: pytest.MonkeyPatch, **environment: str) -> None:
    """Forget what has been compiled, and set the environment."""
    for name in ("TORCHGRAFT_CACHE", "TORCHGRAFT_NO_COMPILER", "CXX"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(native, "library", native.library.__wrapped__)
    monkeypatch.setattr(kernel, "_function", kernel._function.__wrapped__)


def test_without_a_compiler_layers_run_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    _fresh(monkeypatch, TORCHGRAFT_NO_COMPILER="1")
    monkeypatch.setattr(product, "_works", product._works.__wrapped__)
    assert not kernel.available()
    assert "kernel" not in sparse.backends_for((1, 1))
    linear = nn.Linear(8, 8)
    layer = sparse.to_sparse_layer(linear, torch.arange(0, 64, 5), backend="kernel").eval()
    with torch.no_grad():
        assert torch.allclose(layer(torch.ones(2, 8)), F.linear(torch.ones(2, 8), layer.weight, layer.bias))
    with pytest.raises(BadInput, match="not to be had"):
        kernel.product(torch.ones(2, 8), layer.values, layer.columns, layer.pointers, None, rows=8, tokens=True)


def test_a_compiler_that_fails_is_logged(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho no such flag >&2\nexit 1\n")
    broken.chmod(0o755)
    _fresh(monkeypatch, TORCHGRAFT_CACHE=str(tmp_path / "cache"), CXX=str(broken))
    with caplog.at_level(logging.WARNING, "torchgraft"):
        assert not kernel.available()
    assert "no such flag" in caplog.text
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.skipif(not kernel.available(), reason="there is no compiler")
def test_a_library_that_others_may_write_is_not_opened(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = tmp_path / "cache"

    def build(compiler: str, source: bytes, target: Path) -> None:
        target.parent.mkdir(mode=0o700)
        target.write_bytes(b"")
        target.chmod(0o777)

    monkeypatch.setattr(native, "_build", build)
    _fresh(monkeypatch, TORCHGRAFT_CACHE=str(cache))
    with caplog.at_level(logging.WARNING, "torchgraft"):
        assert not kernel.available()
    assert "written to by others" in caplog.text
    (made,) = cache.iterdir()
    assert stat.S_IMODE(made.stat().st_mode) == 0o777
    assert native.cache_folder() == cache


# The layers -----------------------------------------------------------------------------------------------------------


def _conv(block: tuple[int, int], **options: object) -> tuple[sparse.SparsePointwiseConv, nn.Conv2d]:
    torch.manual_seed(1)
    conv = nn.Conv2d(12, 8, 1, **options)
    blocks = best_blocks(conv.weight.flatten(1), kept_blocks(8, 12, block, 0.7), block)
    made = sparse.to_sparse_layer(conv, blocks, block=block)
    assert isinstance(made, sparse.SparsePointwiseConv)
    conv.weight.data = _masked(conv.weight.detach().flatten(1), blocks, block).view_as(conv.weight)
    return made, conv


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"stride": 2}, {"stride": (1, 3)}])
def test_convolution_equals_the_masked_one(block: tuple[int, int], options: dict[str, object]) -> None:
    made, conv = _conv(block, **options)
    for shape in ((1, 12, 7, 5), (3, 12, 9, 9), (0, 12, 4, 4), (12, 5, 3)):
        x = torch.randn(shape)
        with torch.no_grad():
            expected = conv(x)
            assert torch.allclose(made(x), expected, atol=1e-5)
            if x.ndim == 4:
                last = made(x.to(memory_format=torch.channels_last))
                assert last.shape == expected.shape
                assert torch.allclose(last, expected, atol=1e-5)
        assert torch.allclose(made(x), expected, atol=1e-5)  # the form that trains


def test_convolution_over_one_dimension() -> None:
    conv = nn.Conv1d(6, 4, 1, stride=2)
    layer = sparse.to_sparse_layer(conv, torch.arange(24))
    x = torch.randn(2, 6, 9)
    with torch.no_grad():
        assert torch.allclose(layer(x), conv(x), atol=1e-6)
    assert torch.allclose(layer(x), conv(x), atol=1e-6)
    assert layer.weight.shape == conv.weight.shape


@pytest.mark.parametrize("block", BLOCKS)
def test_gradients_are_those_of_the_masked_layer(block: tuple[int, int]) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(12, 8).double()
    blocks = best_blocks(linear.weight, kept_blocks(8, 12, block, 0.6), block)
    layer = sparse.to_sparse_layer(linear, blocks, block=block)
    assert layer.values.dtype == torch.float64
    weight = _masked(linear.weight.detach(), blocks, block).requires_grad_()
    x = torch.randn(5, 12, dtype=torch.float64)
    (layer(x).sin().sum()).backward()
    (F.linear(x, weight, linear.bias).sin().sum()).backward()
    assert layer.values.grad is not None
    assert weight.grad is not None
    places = layer.pattern.places(layer.columns, layer.pointers)
    assert torch.allclose(layer.values.grad, weight.grad.flatten()[places], atol=1e-12)
    assert layer.bias is not None
    assert torch.allclose(layer.bias.grad, linear.bias.grad, atol=1e-12)


def test_training_moves_the_kept_values_alone_and_execution_follows() -> None:
    torch.manual_seed(0)
    layer = sparse.to_sparse_layer(nn.Linear(16, 8), torch.arange(0, 128, 7))
    x = torch.randn(4, 16)
    with torch.no_grad():
        before = layer(x)
    torch.optim.SGD(layer.parameters(), lr=0.1).zero_grad()
    layer(x).square().sum().backward()
    torch.optim.SGD(layer.parameters(), lr=0.1).step()
    with torch.no_grad():
        after = layer(x)
        assert not torch.allclose(before, after)
        assert torch.allclose(after, F.linear(x, layer.weight, layer.bias), atol=1e-6)
        assert int((layer.weight != 0).sum()) == layer.kept


def test_other_dtypes_autocast_and_odd_shapes() -> None:
    torch.manual_seed(0)
    layer = sparse.to_sparse_layer(nn.Linear(16, 8), torch.arange(0, 128, 7))
    x = torch.randn(2, 3, 16)
    with torch.no_grad():
        for dtype, tolerance in ((torch.float64, 1e-12), (torch.bfloat16, 1e-6)):
            moved = copy.deepcopy(layer).to(dtype)
            expected = F.linear(x.to(dtype), moved.weight, moved.bias)
            assert torch.allclose(moved(x.to(dtype)), expected, atol=tolerance)
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
        assert layer(x[0, 0]).shape == (8,)
        assert layer(x[:0]).shape == (0, 3, 8)
        assert torch.allclose(layer(x.transpose(0, 1)), layer(x).transpose(0, 1), atol=1e-6)
    with torch.inference_mode():
        assert layer(x).shape == (2, 3, 8)
    for wrong in (torch.ones(3, 15), torch.ones(())):
        with pytest.raises(BadInput, match="16"):
            layer(wrong)
    with pytest.raises(BadInput, match=r"\(B, 12, \*, \*\)"):
        _conv((1, 1))[0](torch.ones(1, 3, 4, 4))


def test_meters_count_what_is_kept() -> None:
    made, conv = _conv((2, 1), bias=False)
    x = torch.randn(2, 12, 5, 7)
    assert macs(conv, x) == 2 * 5 * 7 * 96
    assert macs(made.eval(), x) == 2 * 5 * 7 * made.values.numel()
    assert macs(made, x.to(memory_format=torch.channels_last)) == 2 * 5 * 7 * made.values.numel()
    assert params(made) == made.values.numel() == 2 * made.kept
    large = sparse.to_sparse_layer(nn.Linear(256, 256, bias=False), torch.arange(0, 65536, 10))
    dense = nn.Linear(256, 256, bias=False)
    assert size(large) < 0.14 * size(dense)  # five bytes a value where there were four, a tenth of them
    assert macs(large.eval(), torch.ones(3, 256)) == 3 * 6554


def test_copies_files_and_wrong_files() -> None:
    torch.manual_seed(0)
    linear, other = nn.Linear(40, 30), nn.Linear(40, 30)
    layer = sparse.to_sparse_layer(linear, best_blocks(linear.weight, 90, (1, 1))).eval()
    x = torch.randn(3, 40)
    with torch.no_grad():
        expected = layer(x)
        twin = copy.deepcopy(layer)
        twin.values.zero_()
        assert torch.equal(layer(x), expected)
        loaded = sparse.to_sparse_layer(other, best_blocks(other.weight, 90, (1, 1))).eval()
        assert not torch.equal(loaded.columns, layer.columns)
        tensors, _ = unpack_tensors(pack_tensors(layer.state_dict()))
        assert sorted(tensors) == ["bias", "gaps", "values"]
        loaded.load_state_dict(tensors)
        assert torch.equal(loaded(x), expected)
    damaged = {**tensors, "gaps": torch.full_like(tensors["gaps"], 254)}  # runs out of the matrix
    fewer = {**tensors, "gaps": torch.full_like(tensors["gaps"], 255)}  # keeps nothing
    for wrong in (damaged, fewer, {**tensors, "gaps": tensors["gaps"][:5]}, {**tensors, "gaps": tensors["gaps"].int()}):
        with pytest.raises(RuntimeError, match="no pattern of 90 of 1200 blocks"):
            loaded.load_state_dict(wrong)
    with torch.no_grad():
        assert torch.equal(loaded(x), expected)


def test_edit_replays_through_its_record() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    edit = sparse.Sparsify(modules={"0": (10, 4, 1), "2": (9, 1, 1)}, backend="dense")
    changed = apply_edits(model, [edit])
    assert edit_from_record(edit_to_record(edit)) == edit
    assert set(edit.describe()) == {"0", "2"}
    assert "10 blocks of 4x1" in edit.describe()["0"]
    assert isinstance(model[0], nn.Linear)
    layer = changed[0]
    assert isinstance(layer, sparse.SparseLinear)
    assert torch.equal(
        layer.weight, _masked(model[0].weight.detach(), best_blocks(model[0].weight, 10, (4, 1)), (4, 1))
    )
    fresh = apply_edits(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), history(changed)).eval()
    fresh.load_state_dict(changed.state_dict())
    with torch.no_grad():
        assert torch.equal(fresh(torch.ones(2, 8)), changed(torch.ones(2, 8)))
    with pytest.raises(BadInput, match="finds no layer that it can take at '1'"):
        apply_edits(model, [sparse.Sparsify(modules={"1": (1, 1, 1)})])
    alone = apply_edits(nn.Linear(4, 4), [sparse.Sparsify(modules={"": (3, 1, 1)})])
    assert isinstance(alone, sparse.SparseLinear)


def test_fused_encoder_does_not_bypass_the_product() -> None:
    torch.manual_seed(0)
    encoder = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    changed = apply_edits(encoder, [sparse.Sparsify(modules={"linear1": (60, 1, 1), "linear2": (60, 1, 1)})]).eval()
    x = torch.randn(2, 5, 16)
    seen: list[int] = []
    changed.linear1.register_forward_hook(lambda *_: seen.append(1))
    with torch.no_grad():
        encoder.linear1.weight.copy_(changed.linear1.weight)
        encoder.linear2.weight.copy_(changed.linear2.weight)
        assert torch.allclose(changed(x), encoder(x), atol=1e-5)
    assert seen == [1]


def test_export_gives_the_dense_form() -> None:
    model = nn.Sequential(sparse.to_sparse_layer(nn.Linear(8, 4), torch.arange(0, 32, 5)), nn.ReLU()).eval()
    x = torch.randn(3, 8)
    with torch.no_grad():
        program = torch.export.export(model, (x,), strict=False)
        assert torch.allclose(program.module()(x), model(x), atol=1e-6)
    names = [str(node.target) for node in program.graph.nodes]
    assert "aten.linear.default" in names
    assert not [name for name in names if "torchgraft" in name]


def test_only_pointwise_layers_become_sparse() -> None:
    class Own(nn.Linear):
        pass

    for layer in (
        Own(2, 2),
        nn.Conv2d(2, 2, 3),
        nn.Conv2d(2, 2, 1, padding=1),
        nn.Conv2d(2, 2, 1, groups=2),
        nn.ReLU(),
    ):
        assert not sparse.is_pointwise(layer)
        with pytest.raises(BadInput, match="only plain linear layers and 1x1 convolutions"):
            sparse.to_sparse_layer(layer, torch.tensor([0]))
    linear = nn.Linear(2, 2)
    for wrong in (torch.tensor([1, 0]), torch.tensor([4]), torch.tensor([-1]), torch.tensor([1, 1])):
        with pytest.raises(BadInput, match="rising numbers"):
            sparse.to_sparse_layer(linear, wrong)
    with pytest.raises(BadInput, match="unknown sparse backend"):
        sparse.to_sparse_layer(linear, torch.tensor([0]), backend="csx")
    linear.weight.requires_grad_(False)
    frozen = sparse.to_sparse_layer(linear.eval(), torch.tensor([0]))
    assert not frozen.values.requires_grad
    assert not frozen.training


# The choice -----------------------------------------------------------------------------------------------------------


def test_choice_is_made_once_and_is_a_backend_of_the_block() -> None:
    pattern = Pattern(32, 32, (1, 1))
    assert sparse.fastest(pattern, 100, 40, tokens=True) in sparse.backends_for((1, 1))
    before = choose._fastest.cache_info().misses
    sparse.fastest(pattern, 110, 36, tokens=True)  # near enough to be the same
    assert choose._fastest.cache_info().misses == before


def test_a_slow_backend_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    real = product._RUN["dense"]

    def slow(*given: object) -> Tensor:
        for _ in range(300):
            torch.ones(1000).sin()
        return real(*given)

    monkeypatch.setitem(product._RUN, "csr", slow)
    monkeypatch.setattr(product, "backends_for", lambda block: ("csr", "dense"))
    assert choose._fastest.__wrapped__(Pattern(8, 8, (1, 1)), 8, 8, True, 1) == "dense"


def test_crossover_lies_on_the_line() -> None:
    from torchgraft.bench.meters import Ratio

    line = choose.Crossover(((0.05, Ratio.exact(0.28)), (0.25, Ratio.exact(0.98))))  # 0.105 + 3.5 density
    assert line.ratio(0.1) == pytest.approx(0.455)
    assert line.sparsity == pytest.approx(0.75)  # 0.98 is reached at density 0.25
    never = choose.Crossover(((0.05, Ratio.exact(1.5)), (0.25, Ratio.exact(1.5))))
    assert never.sparsity == 1.0
    always = choose.Crossover(((0.05, Ratio.exact(0.1)), (0.25, Ratio.exact(0.1))))
    assert always.sparsity == 0.0


def test_crossover_is_measured_for_both_layouts() -> None:
    for shape, tokens in (((8, 32), True), ((1, 32, 3, 3), False)):
        found = sparse.crossover(16, 32, (4, 1), shape, tokens=tokens)
        assert 0.0 <= found.sparsity <= 1.0
        assert all(ratio.low <= ratio.value <= ratio.high for _, ratio in found.ratios)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.skipif(not kernel.available(), reason="there is no compiler")
def test_a_trace_is_refused_what_it_could_not_hold() -> None:
    values, columns = torch.ones(2), torch.tensor([0, 1], dtype=torch.int32)
    pointers, x = torch.tensor([0, 1, 2], dtype=torch.int32), torch.randn(3, 2)
    assert torch.equal(kernel.product(x, values, columns, pointers, None, rows=2, tokens=True), x)
    with pytest.raises(BadInput, match="no trace"):
        torch.jit.trace(lambda given: kernel.product(given, values, columns, pointers, None, rows=2, tokens=True), (x,))
