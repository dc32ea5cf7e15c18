"""Each check of attentions in foreign models can fail: a sound one passes all, and each catches a broken one."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from torchgraft.catalogue import Card
from torchgraft.contracts import Check, Subject, attention
from torchgraft.contracts.run import run_check
from torchgraft.engines.attention import attend
from torchgraft.parts.mixers import relu_attention

pytest.importorskip("transformers")
CARD = Card(
    key="toy-attention",
    title="A toy",
    authors="Nobody, 2026",
    reference="https://example.org/toy",
    family="parts/mixers",
    kind="part",
    equation="y = softmax(x x^T) x",
    entry="attention",
    oracles=("none",),
    capabilities=frozenset({"attention-interface"}),
    choose_when="never, it is a toy",
    choose_instead="anything else at all",
    bibtex="@misc{toy, title={A {T}oy}, author={Nobody}, year={2026}}",
)
CHECKS: dict[str, Check] = {check.name: check for check in attention.CHECKS}


def written_out(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, **rest: Any) -> Tensor:
    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for x in (k, v))
    scores = torch.einsum("bthk,bshk->bhts", q, k)
    return torch.einsum("bhts,bshv->bthv", scores.softmax(-1), v)


def blind(q: Tensor, k: Tensor, v: Tensor, *, mask: Any = None, **rest: Any) -> Tensor:
    return relu_attention.attention(q, k, v, **rest)


def unlike_alone(q: Tensor, k: Tensor, v: Tensor, **rest: Any) -> Tensor:
    return relu_attention.attention(q, k, v, **rest) * (1.0 if q.shape[1] > 1 else -3.0)


def counting_padding(q: Tensor, k: Tensor, v: Tensor, **rest: Any) -> Tensor:
    return relu_attention.attention(q, k, v, **rest) * (40.0 / k.shape[1] ** 2)


def softmax(q: Tensor, k: Tensor, v: Tensor, *, training: bool = False, **rest: Any) -> Tensor:
    return attend(q, k, v, **rest)


def forgetful(q: Tensor, k: Tensor, v: Tensor, **rest: Any) -> Tensor:
    return relu_attention.attention(q, k, v, **rest).detach()


BROKEN: dict[str, Callable[..., Tensor]] = {
    "no-matrix-of-pairs-is-made": written_out,
    "attention-sees-what-the-mask-says": blind,
    "generation-needs-no-cache": unlike_alone,
    "left-padding-does-not-matter": counting_padding,
    "encoders-take-it": softmax,
    "a-model-learns-through-it": forgetful,
}


def subject(function: Callable[..., Tensor]) -> Subject:
    module = types.ModuleType("toy")
    module.attention = function  # type: ignore[attr-defined]  # a module made by hand
    return Subject(card=CARD, entry=function, module=module)


@pytest.mark.parametrize("name", list(CHECKS))
def test_a_sound_attention_passes(name: str) -> None:
    result = run_check(CHECKS[name], subject(relu_attention.attention))
    assert result.outcome == "passed", result.reason


@pytest.mark.parametrize("name", list(CHECKS))
def test_a_broken_one_is_caught(name: str) -> None:
    result = run_check(CHECKS[name], subject(BROKEN[name]))
    assert result.outcome == "failed"
    assert "(at " not in result.reason, "the check crashed instead of failing"
