"""The sequence model: one pass equals token by token, generation is what its arguments say, and files hold it all."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from torchgraft.bench.files import read_tensors, write_tensors
from torchgraft.bench.task import Task
from torchgraft.bench.tasks import builtin
from torchgraft.engines.recurrence.mixer import Mixer, State, StatefulMixer
from torchgraft.errors import BadInput, UnsafeFile
from torchgraft.parts.blocks.sequence_model import SequenceModel, build_mixer
from torchgraft.parts.blocks.sequence_training import accuracy, accuracy_by_length, bits_per_byte, train_mixer
from torchgraft.parts.blocks.text import continue_text
from torchgraft.parts.mixers.softmax_attention import SoftmaxAttention


class _Sum(StatefulMixer):
    """The sum of all tokens so far; counts how often it is called, and with how many tokens."""

    calls: list[int]

    def __init__(self, d_model: int) -> None:
        super().__init__(d_model)
        self.scale = torch.nn.Parameter(torch.ones(d_model))
        self.calls = []

    def init_state(self, batch_size: int) -> State:
        return {"sum": self.scale.new_zeros(batch_size, self.d_model)}

    def prefill(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        self.calls.append(x.shape[1])
        sums = x.cumsum(dim=1) + (0 if state is None else state["sum"][:, None])
        return sums * self.scale, {"sum": sums[:, -1]}


class _Stateless(Mixer):
    """The mean of all tokens so far, or of all of them."""

    def __init__(self, d_model: int, *, causal: bool = True) -> None:
        super().__init__(d_model)
        self.causal = causal

    def forward(self, x: Tensor) -> Tensor:
        if not self.causal:
            return x.mean(dim=1, keepdim=True).expand_as(x)
        return x.cumsum(dim=1) / torch.arange(1, x.shape[1] + 1, dtype=x.dtype)[:, None]


def _attention(d_model: int) -> Mixer:
    return SoftmaxAttention(d_model, num_heads=2)


def _made(mixer: Callable[[int], Mixer] = _attention, **more: Any) -> SequenceModel:
    torch.manual_seed(0)
    return SequenceModel(8, 2, mixer, **{"vocab_size": 11, **more}).double().eval()


def _tokens(*shape: int) -> Tensor:
    return torch.randint(11, shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("mixer", [_attention, _Sum])
def test_token_by_token_equals_one_pass(mixer: Callable[[int], Mixer]) -> None:
    model, tokens = _made(mixer), _tokens(2, 9)
    state = model.init_state(2)
    first, state = model.prefill(tokens[:, :4], state)
    second, state = model.prefill(tokens[:, 4:6], state)
    parts = [first, second]
    for t in range(6, 9):
        logits, state = model.step(tokens[:, t], state)
        parts.append(logits[:, None])
    torch.testing.assert_close(torch.cat(parts, dim=1), model(tokens), rtol=1e-10, atol=1e-10)


def test_a_block_is_what_the_formula_says() -> None:
    model = _made(_Sum, hidden=5)
    x = model.embed(_tokens(1, 4))
    block: Any = model.blocks[0]

    def rms(v: Tensor, weight: Tensor) -> Tensor:
        return v / (v.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight

    h = x + block.mixer(rms(x, block.norm.weight))
    n = rms(h, block.channel_norm.weight)
    gate, up, down = (getattr(block.channels, name).weight for name in ("gate", "up", "down"))
    g = n @ gate.T
    wanted = h + (g / (1 + (-g).exp()) * (n @ up.T)) @ down.T
    torch.testing.assert_close(block(x), wanted, rtol=1e-12, atol=1e-12)


def test_sizes_and_pooling() -> None:
    assert _made(outputs=3)(_tokens(2, 5)).shape == (2, 5, 3)
    assert _made(outputs=3, pool="last")(_tokens(2, 5)).shape == (2, 3)
    numbers = torch.randn(2, 5, 4, dtype=torch.float64)
    assert _made(in_features=4, outputs=3, pool="mean")(numbers).shape == (2, 3)
    every, last = _made(outputs=3), _made(outputs=3, pool="last")
    torch.testing.assert_close(every(_tokens(2, 5))[:, -1], last(_tokens(2, 5)))
    assert _made(hidden=0)(_tokens(2, 5)).shape == (2, 5, 11)
    assert len(_made()(_tokens(0, 5))) == 0
    tied = _made(tied=True)
    assert tied.head.weight is tied.embed.weight
    assert not any("channels" in name for name, _ in _made(hidden=0).named_parameters())


def test_generation_reads_each_token_once_and_keeps_a_constant_state() -> None:
    model = _made(_Sum)
    model.generate(_tokens(1, 5), max_new_tokens=4, seed=0)
    for mixer in model.mixers():
        assert isinstance(mixer, _Sum)
        assert mixer.calls == [5, 1, 1, 1]
    assert model.state_bytes(3) == model.state_bytes(30) == 2 * 8 * 8
    grown = _made()
    assert grown.state_bytes(3) == 2 * 2 * 3 * 8 * 8
    assert grown.state_bytes(6) == 2 * 2 * 6 * 8 * 8
    assert _made(_Stateless).state_bytes(3) is None


@pytest.mark.parametrize("mixer", [_attention, _Sum, _Stateless])
def test_greedy_generation_takes_the_likeliest_token(mixer: Callable[[int], Mixer]) -> None:
    model, tokens = _made(mixer), _tokens(2, 3)
    found = model.generate(tokens, max_new_tokens=5, temperature=0)
    assert torch.equal(found[:, :3], tokens)
    for t in range(3, 8):
        assert torch.equal(model(found[:, :t])[:, -1].argmax(-1), found[:, t])
    assert torch.equal(model.generate(tokens, max_new_tokens=5, top_k=1), found)
    assert torch.equal(model.generate(tokens, max_new_tokens=5, top_p=1e-9), found)
    assert torch.equal(model.generate(tokens, max_new_tokens=0), tokens)


class _Fixed(Mixer):
    """Nothing, so that logits depend on the last token only."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


def _fixed(shares: list[float]) -> SequenceModel:
    """Return a model that always gives ``shares`` as probabilities."""
    model = SequenceModel(1, 1, _Fixed, vocab_size=len(shares), hidden=0).eval()
    with torch.no_grad():
        model.embed.weight.fill_(1.0)  # type: ignore[operator]
        model.head.weight.copy_(torch.tensor(shares).log()[:, None])
    return model


def _drawn(model: SequenceModel, **more: Any) -> Tensor:
    tokens = torch.zeros(4000, 1, dtype=torch.long)
    found = model.generate(tokens, max_new_tokens=1, seed=0, **more)[:, 1]
    return torch.bincount(found, minlength=model.outputs) / len(found)


def test_draws_follow_the_probabilities() -> None:
    shares = [0.1, 0.4, 0.2, 0.3]
    model = _fixed(shares)
    torch.testing.assert_close(_drawn(model), torch.tensor(shares), rtol=0, atol=0.03)
    colder = torch.tensor(shares).square() / torch.tensor(shares).square().sum()
    torch.testing.assert_close(_drawn(model, temperature=0.5), colder, rtol=0, atol=0.03)
    torch.testing.assert_close(_drawn(model, top_k=2), torch.tensor([0, 4 / 7, 0, 3 / 7]), rtol=0, atol=0.03)
    torch.testing.assert_close(_drawn(model, top_p=0.65), torch.tensor([0, 4 / 7, 0, 3 / 7]), rtol=0, atol=0.03)
    torch.testing.assert_close(_drawn(model, top_p=0.75), torch.tensor([0, 4, 2, 3]) / 9, rtol=0, atol=0.03)


def test_seeds_and_streams() -> None:
    model, tokens = _made(), _tokens(2, 3)
    seen: list[Tensor] = []
    one = model.generate(tokens, max_new_tokens=6, seed=3, on_token=seen.append)
    assert torch.equal(torch.stack(seen, dim=1), one[:, 3:])
    assert torch.equal(model.generate(tokens, max_new_tokens=6, seed=3), one)
    assert not torch.equal(model.generate(tokens, max_new_tokens=6, seed=4), one)
    stream = model.train().stream(tokens, max_new_tokens=6, seed=3)
    assert torch.equal(next(stream), one[:, 3])
    assert model.training
    assert torch.is_grad_enabled()
    before = torch.get_rng_state()
    next(stream)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"max_new_tokens": -1}, "max_new_tokens must be at least 0, got -1"),
        ({"temperature": -0.5}, "temperature must be at least 0"),
        ({"temperature": math.nan}, "temperature must be at least 0"),
        ({"temperature": math.inf}, "finite"),
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"top_p": 0.0}, "top_p must be above 0"),
        ({"top_p": 1.5}, "at most 1, got 1.5"),
    ],
)
def test_bad_arguments_of_generation(more: dict[str, Any], words: str) -> None:
    with pytest.raises(BadInput, match=words):
        _made().stream(_tokens(1, 2), **{"max_new_tokens": 1, **more})


def test_models_that_cannot_generate() -> None:
    with pytest.raises(BadInput, match="outputs are its input symbols"):
        _made(outputs=3).generate(_tokens(1, 2), max_new_tokens=1)
    with pytest.raises(BadInput, match="causal"):
        _made(lambda d: _Stateless(d, causal=False)).generate(_tokens(1, 2), max_new_tokens=1)
    with pytest.raises(BadInput, match="at least one token"):
        _made().generate(_tokens(1, 0), max_new_tokens=1)
    broken = _made()
    torch.nn.init.constant_(broken.head.weight, math.nan)
    with pytest.raises(BadInput, match="logits are NaN"):
        broken.generate(_tokens(1, 2), max_new_tokens=1)
    with pytest.raises(BadInput, match="answers once"):
        _made(pool="last").init_state(1)
    with pytest.raises(BadInput, match="_Stateless keeps no state"):
        _made(_Stateless).prefill(_tokens(1, 2))


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"vocab_size": 0}, "vocab_size must be at least 1, got 0"),
        ({"outputs": 0}, "outputs"),
        ({"hidden": -1}, "hidden"),
        ({"pool": "first"}, "pool must be None, 'last' or 'mean', got 'first'"),
        ({"tied": True, "outputs": 3}, "tied"),
        ({"mixer_options": {"num_heads": 2}}, "mixer named by key"),
    ],
)
def test_bad_arguments_of_the_model(more: dict[str, Any], words: str) -> None:
    with pytest.raises(BadInput, match=words):
        _made(**more)


def test_mixers_by_key() -> None:
    assert isinstance(build_mixer("softmax-attention", 8, {"num_heads": 2}), SoftmaxAttention)
    with pytest.raises(BadInput, match="did you mean 'softmax-attention'"):
        build_mixer("softmax-attentio", 8)
    with pytest.raises(BadInput, match="no option 'heads'; did you mean 'num_heads'"):
        build_mixer("softmax-attention", 8, {"heads": 2})
    with pytest.raises(BadInput, match="sequence mixer, got 'magnitude-pruning', a procedure"):
        build_mixer("magnitude-pruning", 8)
    with pytest.raises(BadInput, match="Mixer of width 8"):
        build_mixer(lambda d: SoftmaxAttention(2 * d), 8)


def test_wrong_inputs_are_refused() -> None:
    with pytest.raises(BadInput, match="integers of shape"):
        _made()(torch.zeros(1, 2, 8))
    with pytest.raises(BadInput, match="floating point of shape"):
        _made(in_features=3)(_tokens(1, 2))


def _by_key(**more: Any) -> SequenceModel:
    torch.manual_seed(0)
    options = {"vocab_size": 11, "mixer_options": {"num_heads": 2}, **more}
    return SequenceModel(8, 2, "softmax-attention", **options).eval()


@pytest.mark.parametrize("more", [{}, {"tied": True}, {"outputs": 3, "pool": "mean", "hidden": 0}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_saved_and_read_back(tmp_path: Path, more: dict[str, Any], dtype: torch.dtype) -> None:
    model = _by_key(**more).to(dtype)
    model.save_pretrained(tmp_path / "m")
    assert sorted(path.name for path in (tmp_path / "m").iterdir()) == ["config.json", "model.safetensors"]
    before = torch.get_rng_state()
    again = SequenceModel.from_pretrained(tmp_path / "m")
    assert torch.equal(before, torch.get_rng_state())
    assert not again.training
    assert torch.equal(again(_tokens(2, 5)), model(_tokens(2, 5)))
    assert (again.head.weight is again.embed.weight) == bool(more.get("tied"))
    assert again.config() == model.config()


def test_files_that_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="given as a function"):
        _made().save_pretrained(tmp_path)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(BadInput, match="holds no sequence model"):
        SequenceModel.from_pretrained(tmp_path)
    _by_key().save_pretrained(tmp_path)
    config, weights = tmp_path / "config.json", tmp_path / "model.safetensors"
    good, good_weights = json.loads(config.read_text()), weights.read_bytes()
    for change, words in (
        ({"extra": 1}, "extra"),
        ({"format": "torchgraft.sequence-model/9"}, "format"),
        ({"d_model": 0}, "d_model"),
        ({"mixer": "magnitude-pruning"}, "sequence mixer"),
        ({"mixer": "nothing"}, "unknown method"),
    ):
        config.write_text(json.dumps({**good, **change}))
        with pytest.raises(BadInput, match=words):
            SequenceModel.from_pretrained(tmp_path)
    config.write_text("{")
    with pytest.raises(BadInput, match="not understood"):
        SequenceModel.from_pretrained(tmp_path)
    config.write_text(json.dumps({**good, "hidden": 5}))
    with pytest.raises(UnsafeFile, match="does not hold the tensors"):
        SequenceModel.from_pretrained(tmp_path)
    config.write_text(json.dumps(good))
    for damage in (b"\x80\x04pickle", good_weights[:100], b""):
        weights.write_bytes(damage)
        with pytest.raises(UnsafeFile):
            SequenceModel.from_pretrained(tmp_path)
    weights.write_bytes(good_weights)
    tensors, _ = read_tensors(weights)
    write_tensors(weights, {name: value for name, value in tensors.items() if name != "head.weight"})
    with pytest.raises(UnsafeFile, match="does not hold"):
        SequenceModel.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("name", "vocab_size", "outputs", "pool"),
    [
        ("recall", 64, 64, None),
        ("parity", 3, 2, None),
        ("sequential-digits", 1, 10, "last"),
        ("long-bytes", 256, 256, None),
    ],
)
def test_a_model_fits_its_task(name: str, vocab_size: int, outputs: int, pool: str | None) -> None:
    task = builtin(name)
    model = SequenceModel.for_task(task, 8, 1, _attention)
    assert (model.vocab_size, model.outputs, model.pool) == (vocab_size, outputs, pool)
    inputs, target = next(task.test.batches(2))
    assert isinstance(inputs, Tensor)
    assert task.score(model(inputs), target).shape == (2,)


def test_tasks_that_are_not_on_sequences() -> None:
    with pytest.raises(BadInput, match="'wine' is not on sequences"):
        SequenceModel.for_task(builtin("wine"), 8, 1, _attention)


def test_training_is_seeded_and_learns() -> None:
    task = builtin("parity")
    settings: dict[str, Any] = {"steps": 4, "d_model": 8, "layers": 1, "batch_size": 8}
    before = torch.get_rng_state()
    one, two = (train_mixer(task, _Sum, seed=5, **settings) for _ in range(2))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    other = train_mixer(task, _Sum, seed=6, **settings)
    assert any(not torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


class _Answers(torch.nn.Module):
    """Gives the running sums of its digits, but the contrary from place 64 on."""

    def forward(self, digits: Tensor) -> Tensor:
        right = torch.nn.functional.one_hot(digits.cumsum(1) % 2, 2).float()
        return torch.where(torch.arange(digits.shape[1])[:, None] < 64, right, 1 - right)


def test_scores_by_hand() -> None:
    task = builtin("parity")
    assert accuracy_by_length(_Answers(), task) == {32: 1.0, 64: 1.0, 96: 0.0, 128: 0.0}
    assert accuracy(_Answers(), task) == 0.5
    assert accuracy(_Answers(), task, "val") == 1.0
    with pytest.raises(BadInput, match="split"):
        accuracy(_Answers(), task, "all")


def test_bits_by_hand() -> None:
    text = builtin("stdlib-bytes")
    task = Task(text.model, text.val, text.val, text.val, text.loss, text.score)
    flat = torch.nn.Embedding(256, 256)
    torch.nn.init.zeros_(flat.weight)
    assert bits_per_byte(flat, task) == pytest.approx(8.0, abs=1e-5)


def test_text_comes_in_whole_letters() -> None:
    model = _fixed([1e-30] * 256)
    with torch.no_grad():
        model.head.weight[0xC3] = 0.0  # always the first half of a letter of two bytes
    assert "".join(continue_text(model, "é", max_new_tokens=3, temperature=0)) == "\ufffd" * 3
    assert list(continue_text(model, "a", max_new_tokens=0)) == []
    with pytest.raises(BadInput, match="at least one letter"):
        continue_text(model, "")
    with pytest.raises(BadInput, match="256 bytes, got one over 11"):
        continue_text(_made(), "a")
