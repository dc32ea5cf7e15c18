"""The built-in tasks: cheap to create, the same splits for every seed, trained once and read from the cache after."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from torchgraft.bench.files import read_tensors
from torchgraft.bench.models import ByteTransformer, RecurrentNet, TwoTower, VisionTransformer
from torchgraft.bench.task import Split, Task, call
from torchgraft.bench.tasks import BUILTIN, builtin, stdlib_bytes, stdlib_search
from torchgraft.bench.tasks.baseline import Settings, cached_weights, seeded
from torchgraft.bench.tasks.copying import copies, selective_copies
from torchgraft.bench.tasks.induction import inductions
from torchgraft.bench.tasks.recall import answered, recall_loss, sequences
from torchgraft.bench.tasks.running_sums import running_sums
from torchgraft.bench.tasks.tabular import explained
from torchgraft.bench.training import evaluate, supervised
from torchgraft.errors import BadInput

# Reading the whole library for stdlib-search takes seconds, so it is tested on files of its own below.
_QUICK = tuple(name for name in BUILTIN if name != "stdlib-search")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHGRAFT_CACHE", str(tmp_path / "cache"))


def _check_protocol(task: Task) -> None:
    model = task.architecture()
    with torch.no_grad():
        call(model, task.example)
        inputs, target = next(task.val.batches(task.batch_size))
        output = call(model, inputs)
        assert task.loss(output, target).shape == ()
        assert task.score(output, target).shape == (len(target),)
        assert task.output_logits(output).shape[0] == len(target)
    again = task.architecture().state_dict()
    assert all(torch.equal(value, again[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("name", _QUICK)
def test_protocol(name: str, tmp_path: Path) -> None:
    task = builtin(name)
    _check_protocol(task)
    assert task.name == task.source == name
    assert task.reference is not None
    assert not (tmp_path / "cache").exists(), "creating a task trained something"


@pytest.mark.parametrize("name", ["digits-vit", "recall", "wine", "diabetes", "parity", "copying", "induction"])
def test_the_seed_moves_the_weights_and_not_the_split(name: str) -> None:
    one, two = builtin(name, 0), builtin(name, 1)
    for split in ("train", "val", "test"):
        left, right = getattr(one, split), getattr(two, split)
        assert torch.equal(left.inputs, right.inputs)
        assert torch.equal(left.target, right.target)
    states = [task.architecture().state_dict() for task in (one, two)]
    assert any(not torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_digits_splits_are_stratified_and_disjoint() -> None:
    task = builtin("digits-mlp")
    images = [split.inputs for split in (task.train, task.val, task.test)]
    rows = [image.numpy().tobytes() for part in images if isinstance(part, Tensor) for image in part]
    assert len(rows) == len(set(rows)) == 1797
    assert (len(task.train), len(task.val), len(task.test)) == (1078, 359, 360)
    for split in (task.train, task.val, task.test):
        shares = torch.bincount(split.target, minlength=10) / len(split)
        assert float((shares - 0.1).abs().max()) < 0.01


def test_unknown_names_and_seeds() -> None:
    with pytest.raises(BadInput, match="did you mean 'digits-cnn'"):
        builtin("digits-cn")
    with pytest.raises(BadInput, match="seed"):
        builtin("wine", -1)


def _tiny(steps: int = 30) -> Task:
    """A wine model with its own short training, through the same cache."""
    task = builtin("wine")
    settings = Settings(steps=steps, batch_size=32, lr=3e-3)
    assert callable(task.model)
    task.weights = cached_weights(
        "tiny", 0, settings, build=task.model, split=task.train, objective=supervised(F.cross_entropy)
    )
    return task


def test_a_baseline_is_trained_once_then_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = _tiny().trained()
    (path,) = (tmp_path / "cache").iterdir()
    assert path.name.startswith("tiny-s0-torch")
    trained = evaluate(first, _tiny(), "val").mean()
    assert trained > evaluate(_tiny().architecture(), _tiny(), "val").mean() + 0.2

    def no_training(*_: object, **__: object) -> None:
        raise AssertionError("trained although the cache holds the model")

    monkeypatch.setattr("torchgraft.bench.tasks.baseline.train", no_training)
    second = _tiny().trained().state_dict()
    assert all(torch.equal(value, second[name]) for name, value in first.state_dict().items())
    with pytest.raises(AssertionError, match="trained although"):
        _tiny(31).trained()  # other settings, another file


def test_a_damaged_cache_is_replaced(tmp_path: Path) -> None:
    first = _tiny().trained().state_dict()
    (path,) = (tmp_path / "cache").iterdir()
    for damage in (b"", path.read_bytes()[:100], b"\x80\x04pickle"):
        path.write_bytes(damage)
        second = _tiny().trained().state_dict()
        assert all(torch.equal(value, second[name]) for name, value in first.items())
        assert read_tensors(path)[1]["task"] == "tiny"


def test_an_unwritable_cache_still_gives_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("TORCHGRAFT_CACHE", str(tmp_path / "file" / "cache"))
    assert not _tiny().trained().training


def test_trained_models_are_copies() -> None:
    task = _tiny()
    one = task.trained()
    next(one.parameters()).data.zero_()
    assert bool(next(task.trained().parameters()).abs().sum() > 0)


def test_diabetes_scores_average_to_r_squared() -> None:
    from sklearn.metrics import r2_score

    task = builtin("diabetes")
    output = torch.linspace(-1, 1, len(task.test)).unsqueeze(1)
    wanted = r2_score(task.test.target[:, 0].double().numpy(), output[:, 0].double().numpy())
    assert float(explained(output, task.test.target).double().mean()) == pytest.approx(wanted, abs=1e-5)


def test_recall_answers_are_in_the_sequence() -> None:
    split = sequences(50, 0)
    tokens, target = split.inputs, split.target
    assert isinstance(tokens, Tensor)
    for row, wanted in zip(tokens.tolist(), target.tolist(), strict=True):
        shown = dict(zip(row[0:16:2], row[1:16:2], strict=True))
        assert len(shown) == 8
        assert wanted[:16] == [-100] * 16
        assert wanted[16:] == [shown[key] for key in row[16:]]
    perfect = F.one_hot(target.clamp(min=0), 64).float() * 50
    assert answered(perfect, target).eq(1).all()
    assert float(recall_loss(perfect, target)) < 1e-6
    half = perfect.clone()
    half[:, 16:20] = 0.0  # the first four answers become symbol 0, a key
    assert answered(half, target).eq(0.5).all()


@pytest.mark.parametrize(("name", "modulus"), [("parity", 2), ("modular-arithmetic", 3)])
def test_running_sums_are_asked_for_at_the_end_of_longer_sequences(name: str, modulus: int) -> None:
    task = builtin(name)
    for split in (task.train, task.val):
        assert isinstance(split.inputs, Tensor)
        assert split.inputs.shape[1] == 32
        assert torch.equal(split.target, split.inputs.cumsum(1) % modulus)
    assert isinstance(task.test.inputs, Tensor)
    counts = dict.fromkeys((32, 64, 96, 128), 0)
    for digits, target in zip(task.test.inputs.tolist(), task.test.target.tolist(), strict=True):
        length = next((place for place, digit in enumerate(digits) if digit == modulus), 128)
        counts[length] += 1
        assert digits[length:] == [modulus] * (128 - length)
        total = 0
        for place, digit in enumerate(digits[:length]):
            total = (total + digit) % modulus
            assert target[place] == (total if place >= length - 32 else -100)
        assert target[length:] == [-100] * (128 - length)
    assert set(counts.values()) == {128}


def test_training_and_held_out_samples_differ() -> None:
    """Of the splits of the synthetic tasks, no test sequence was seen in training."""
    for train, test in (
        (running_sums(4096, 1, 2), running_sums(512, 3, 2)),
        (copies(4096, 1), copies(512, 3)),
        (selective_copies(4096, 1), selective_copies(512, 3)),
        (inductions(4096, 1), inductions(512, 3)),
    ):
        seen = {tuple(row) for row in train.inputs.tolist()}  # type: ignore[union-attr]
        assert not seen & {tuple(row) for row in test.inputs.tolist()}  # type: ignore[union-attr]


def test_copies_and_inductions_ask_for_what_was_shown() -> None:
    split = copies(20, 0)
    for row, wanted in zip(split.inputs.tolist(), split.target.tolist(), strict=True):  # type: ignore[union-attr]
        assert row[24] == 26
        assert row[25:] == row[:23]
        assert wanted == [-100] * 24 + row[:24]
    split = selective_copies(20, 0)
    for row, wanted in zip(split.inputs.tolist(), split.target.tolist(), strict=True):  # type: ignore[union-attr]
        assert row[48:] == [17] * 8
        assert wanted == [-100] * 48 + [token for token in row[:48] if token < 16]
        assert row[:48].count(16) == 40
    split = inductions(50, 0)
    for row, wanted in zip(split.inputs.tolist(), split.target.tolist(), strict=True):  # type: ignore[union-attr]
        first = row.index(16)
        assert row.count(16) == 2
        assert row[-1] == 16
        assert wanted == [-100] * 31 + [row[first + 1]]


def test_long_bytes_hold_the_same_text_in_longer_windows() -> None:
    task = builtin("long-bytes")
    for split in (task.train, task.val, task.test):
        assert isinstance(split.inputs, Tensor)
        assert split.inputs.shape[1] == 512
        assert torch.equal(split.inputs[:, 1:], split.target[:, :-1])


def test_sequential_digits_are_the_images_row_by_row() -> None:
    images, pixels = builtin("digits-vit").test, builtin("sequential-digits").test
    assert isinstance(images.inputs, Tensor)
    assert isinstance(pixels.inputs, Tensor)
    assert torch.equal(pixels.inputs[:, 8:16, 0], images.inputs[:, 0, 1])
    assert torch.equal(pixels.target, images.target)


def test_the_recurrent_baseline_is_causal() -> None:
    torch.manual_seed(0)
    model = RecurrentNet(5, 3, d_model=8, depth=2).double().eval()
    one = torch.randint(0, 5, (2, 8))
    two = one.clone()
    two[:, 5:] = (two[:, 5:] + 1) % 5
    assert torch.equal(model(one)[:, :5], model(two)[:, :5])
    assert not torch.allclose(model(one)[:, 5:], model(two)[:, 5:])
    pooled = RecurrentNet(5, 3, d_model=8, depth=2, pooled=True).double().eval()
    pooled.load_state_dict(model.state_dict())
    states: list[torch.Tensor] = []
    for net in (pooled, model):  # the head alone may round otherwise on another number of rows
        hook = net.head.register_forward_pre_hook(lambda _, given: states.append(given[0]))
        net(one)
        hook.remove()
    assert torch.equal(states[0], states[1][:, -1])
    assert torch.equal(pooled(one), model.head(states[1][:, -1]))


def test_bytes_scores_are_minus_bits() -> None:
    """A uniform guess over 256 bytes needs 8 bits; a certain one, none."""
    target = torch.randint(0, 256, (3, 5))
    assert torch.allclose(stdlib_bytes.minus_bits(torch.zeros(3, 5, 256), target), torch.full((3,), -8.0))
    certain = F.one_hot(target, 256).float() * 100
    assert torch.allclose(stdlib_bytes.minus_bits(certain, target), torch.zeros(3), atol=1e-5)
    even = Split(torch.zeros(1, 256), torch.arange(256).unsqueeze(0))
    assert stdlib_bytes.unigram_bits(even, even) == pytest.approx(8.0)


def test_bytes_windows_predict_the_next_byte_and_share_no_file() -> None:
    task = builtin("stdlib-bytes")
    for split in (task.train, task.val, task.test):
        assert isinstance(split.inputs, Tensor)
        assert torch.equal(split.inputs[:, 1:], split.target[:, :-1])
    assert len(task.val) == len(task.test) == 512
    assert stdlib_bytes.unigram_bits(task.train, task.test) > 4


def test_search_extracts_documented_functions_without_their_docstring() -> None:
    source = '''
class A:
    def first(self):
        """Return the first of them.

        Not this paragraph.
        """
        return 1

    async def second(self, x: int) -> int:
        "Wait a while and then say two."
        y = 2
        return y

def undocumented():
    return 3

def only_words():
    """There is nothing but words here."""
'''
    found = stdlib_search.pairs(source)
    assert found == [
        ("Return the first of them.", "    def first(self):\n        return 1"),
        (
            "Wait a while and then say two.",
            "    async def second(self, x: int) -> int:\n        y = 2\n        return y",
        ),
    ]


def test_search_end_to_end_on_files_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [f"{a}{b}" for a in ("read", "write", "open", "close", "find", "sort") for b in ("File", "Line", "Key")]
    for index in range(40):
        functions = [
            f'def {word}_{index}(x):\n    """Please {word} the thing number {index}."""\n    return x\n'
            for word in words
        ]
        (tmp_path / f"m{index:02}.py").write_text("\n".join(functions))
    monkeypatch.setattr(stdlib_search, "source_files", lambda packages: sorted(tmp_path.glob("m*.py")))
    task = builtin("stdlib-search")
    _check_protocol(task)
    assert [len(split) % 64 for split in (task.train, task.val, task.test)] == [0, 0, 0]
    assert len(task.val) > 0
    monkeypatch.setattr(stdlib_search, "pairs", lambda source: pytest.fail("the extracted pairs are cached"))
    again = builtin("stdlib-search")
    assert all(torch.equal(a, b) for a, b in zip(task.val.inputs, again.val.inputs, strict=True))


def test_search_scores_the_diagonal() -> None:
    similarity = torch.tensor([[3.0, 1.0, 0.0], [5.0, 2.0, 0.0], [0.0, 0.0, 1.0]])
    assert stdlib_search.first_rank(similarity, torch.arange(3)).tolist() == [1.0, 0.0, 1.0]
    uniform = stdlib_search.contrast(torch.zeros(4, 4), torch.arange(4))
    assert float(uniform) == pytest.approx(math.log(4))


def test_padding_does_not_move_a_text() -> None:
    torch.manual_seed(0)
    model = TwoTower(32, 6, 8, d_model=8, depth=2, num_heads=2).double().eval()
    query, code = torch.randint(1, 32, (3, 4)), torch.randint(1, 32, (3, 5))
    short = model(query, code)
    assert torch.allclose(short, model(F.pad(query, (0, 2)), F.pad(code, (0, 3))), atol=1e-12)


def test_the_language_model_is_causal() -> None:
    torch.manual_seed(0)
    model = ByteTransformer(32, 8, d_model=8, depth=2, num_heads=2).double().eval()
    one = torch.randint(0, 32, (2, 8))
    two = one.clone()
    two[:, 5:] = (two[:, 5:] + 1) % 32
    assert torch.equal(model(one)[:, :5], model(two)[:, :5])
    assert not torch.allclose(model(one)[:, 5:], model(two)[:, 5:])


def test_attention_reads_its_shapes_so_heads_can_be_cut() -> None:
    """Cutting a head equals zeroing what it says."""
    torch.manual_seed(0)
    model = VisionTransformer(d_model=8, depth=1, num_heads=2).double().eval()
    image = torch.randn(2, 1, 8, 8, dtype=torch.float64)
    attn: Any = model.blocks[0].attn
    attn.out.weight.data[:, 4:] = 0
    masked = model(image)
    for name in ("query", "key", "value"):
        layer = getattr(attn, name)
        layer.weight = torch.nn.Parameter(layer.weight[:4])
        layer.bias = torch.nn.Parameter(layer.bias[:4])
    attn.out.weight = torch.nn.Parameter(attn.out.weight[:, :4])
    attn.num_heads = 1
    assert torch.allclose(model(image), masked, atol=1e-12)


def test_builds_leave_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    seeded(lambda: VisionTransformer(d_model=8, depth=1, num_heads=2), 0)()
    assert torch.equal(before, torch.get_rng_state())
