"""The survey's comparison: equal sizes, states as large as reported, and a tag for every card."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from torchgraft.bench.task import Task
from torchgraft.bench.tasks import builtin
from torchgraft.catalogue import cards
from torchgraft.catalogue.card import FAMILIES
from torchgraft.claims.parts_mixers.after_transformers_survey import _LstmMixer
from torchgraft.engines.recurrence.mixer import Mixer
from torchgraft.errors import BadInput
from torchgraft.parts.blocks.sequence_model import SequenceModel
from torchgraft.parts.mixers.after_transformers_survey import (
    CARD,
    TAGS,
    compare_mixers,
    matched_hidden,
    tags,
)
from torchgraft.parts.mixers.gated_linear_attention import GatedLinearAttention
from torchgraft.parts.mixers.softmax_attention import SoftmaxAttention

MIXERS: dict[str, Callable[[int], Mixer]] = {
    "softmax": SoftmaxAttention,
    "gated": GatedLinearAttention,
    "lstm": _LstmMixer,
}


def _small(name: str) -> Task:
    task = builtin(name)
    few = {split: getattr(task, split)[slice(64)] for split in ("train", "val", "test")}
    return Task(model=task.model, loss=task.loss, score=task.score, name=task.name, batch_size=16, **few)


def test_every_card_has_a_tag() -> None:
    known = {tag for group in TAGS.values() for tag in group}
    assert len(known) == sum(len(group) for group in TAGS.values())
    for card in cards().values():
        found = tags(card)
        assert found <= known
        assert found & set(TAGS["area"])
    for family in FAMILIES:
        assert tags(CARD.model_copy(update={"family": family})) & set(TAGS["area"])
    with pytest.raises(BadInput, match="has no area"):
        tags(CARD.model_copy(update={"family": "elsewhere"}))


def test_sizes_match_and_states_are_as_large_as_said() -> None:
    tasks = [_small("recall"), _small("parity")]
    found = compare_mixers(tasks, MIXERS, steps=1, d_model=32, layers=2, batch_size=8)
    assert [(each.task, each.mixer) for each in found] == [(t.name, m) for t in tasks for m in MIXERS]
    for task in tasks:
        sizes = [each.parameters for each in found if each.task == task.name]
        assert max(abs(size - sizes[0]) for size in sizes) <= 0.03 * sizes[0]
    for each in found:
        length = {"recall": 24, "parity": 128}[each.task]
        mixer = MIXERS[each.mixer](32)
        for tokens, said in ((length, each.state_bytes), (2 * length, each.state_bytes_later)):
            _, state = mixer.prefill(torch.zeros(1, tokens, 32))  # type: ignore[operator]
            assert said == 2 * sum(value.nbytes for value in state.values())
        assert (each.state_bytes != each.state_bytes_later) == (each.mixer == "softmax")
        assert 0 <= each.score <= 1
        assert each.tokens_per_second > 0
    assert {tuple(each.by_length) for each in found if each.task == "parity"} == {(32, 64, 96, 128)}


@pytest.mark.parametrize("name", MIXERS)
def test_what_is_compared_runs_in_parallel_and_in_steps(name: str) -> None:
    torch.manual_seed(0)
    model = SequenceModel(16, 2, MIXERS[name], vocab_size=7).double()
    tokens = torch.randint(7, (2, 20))
    whole, state = model(tokens), model.init_state(2)
    for t in range(20):
        logits, state = model.step(tokens[:, t], state)
        torch.testing.assert_close(logits, whole[:, t], rtol=1e-9, atol=1e-9)
    changed = tokens.clone()
    changed[:, 12:] = (changed[:, 12:] + 1) % 7
    torch.testing.assert_close(model(changed)[:, :12], whole[:, :12], rtol=1e-9, atol=1e-9)


def test_bytes_are_scored_in_bits() -> None:
    task = _small("stdlib-bytes")
    (found,) = compare_mixers([task], {"lstm": _LstmMixer}, steps=1, d_model=8, layers=1, batch_size=2)
    assert found.score == pytest.approx(found.loss / 0.6931471805599453, rel=1e-5)
    assert found.by_length == {}


def test_what_cannot_be_compared() -> None:
    with pytest.raises(BadInput, match="needs tasks and mixers"):
        compare_mixers([], MIXERS)
    with pytest.raises(BadInput, match="at the least"):
        matched_hidden(_small("parity"), SoftmaxAttention, 100, d_model=32, layers=2)
