"""The card: everything that is said about a method outside its own code, as validated pure data."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

__all__ = ["CAPABILITIES", "ENGINES", "FAMILIES", "STAGES", "Card", "Claim"]

FAMILIES = (
    *(
        f"parts/{room}"
        for room in ("mixers", "norms", "linears", "memories", "blocks", "graphs", "fields", "operators", "spiking")
    ),
    *(f"train/{room}" for room in ("optim", "rules", "objectives", "large")),
    *(f"shrink/{room}" for room in ("prune", "quantize", "factorize", "distill")),
    "elastic",
    *(f"adapt/{room}" for room in ("peft", "merge", "continual", "testtime", "domain", "prompt")),
    "search",
    *(
        f"analyze/{room}"
        for room in ("attribution", "representation", "landscape", "kernels", "bounds", "incontext", "circuits")
    ),
    "retrieve",
    "generate",
    "solve",
    "recipes",
)
ENGINES = (
    *("recurrence", "attention", "longconv", "parametrize", "normalize", "taps", "surgery", "masks", "nesting"),
    *("rules", "search", "streams", "kernels", "bounds", "solvers", "messages", "none"),
)
CAPABILITIES = (
    *("causal", "stateful", "linear-time", "permutation-equivariant", "invertible", "foldable", "compilable"),
    *("attention-interface", "pooling", "grid", "channels-first"),
    *("needs-data", "needs-labels", "needs-trace", "needs-training"),
    *("batch-independent", "train-eval-equal", "running-statistics", "scale-invariant", "shift-invariant"),
    *("equals-replaced", "padding-mask", "elastic"),
)
#: The order in which procedures may stand on one model; at most one procedure of each stage.
#: "weights" is the form of single weights (sparse, binary, few values) under which the model goes on training.
#: "norms" stands where their number is settled, before the weights take their form; "execution" is how the finished
#: model is run, and changes nothing of what it holds.
STAGES = ("mixer", "depth", "width", "rank", "norms", "weights", "precision", "execution")

_KEY = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Claim(_Frozen):
    """A paper's headline in miniature.

    Args:
        text: what is compared with what, on which data, in words.
        figure: the number that must be reached, set before the first run, such as ``"drop <= 0.02 at 0.6x MACs"``.
    """

    text: str = Field(min_length=10)
    figure: str = Field(min_length=3)


class Card(_Frozen):
    """What the command line, the documentation, the tests and the report know of a method.

    Args:
        key: kebab-case name; the file of the method is the key with underscores.
        title: the method's name in words.
        seed_id: number of the entry in the systems list, or ``None`` for a baseline that is no system of its own.
        authors: authors and year, such as ``"Khaki and Plataniotis, 2024"``.
        reference: address of the paper.
        family: one of :data:`FAMILIES`.
        kind: a ``part`` of a network, a ``procedure`` on a whole model, an ``analysis`` of one, or a ``tool`` that
            makes or trains a model in a way of its own and has no dial that ``fit`` could turn.
        engine: the shared engines that it stands on.
        equation: the paper's equation in the library's letters.
        entry: name of the public class or function in the same module.
        stage: for procedures that ``fit`` may use, the place in :data:`STAGES`.
        conflicts: keys of procedures that may not stand on the same model, with the reason.
        capabilities: what is declared and therefore checked, from :data:`CAPABILITIES`.
        declared: numbers that are measured by the checks, as ``name -> formula or value``.
        example: keyword arguments of a tiny configuration (parts), or the name of the tiny check model (procedures).
        shapes: input shapes of the tiny configuration (parts).
        oracles: the exact properties that the tests assert, in words.
        claim: the paper's headline in miniature, or ``None`` for a baseline that claims nothing.
        choose_when: when to take this method.
        choose_instead: when to take another, and which.
        expected_failures: ``check name -> reason`` for contract checks that do not hold; strict.
        confidence: how well the paper's details are known.
        bibtex: the citation.
    """

    key: str
    title: str = Field(min_length=3)
    seed_id: int | None = None
    authors: str
    reference: str = Field(pattern=r"^https?://")
    family: str
    kind: Literal["part", "procedure", "analysis", "tool"]
    engine: tuple[str, ...] = ("none",)
    equation: str = Field(min_length=3)
    entry: str
    stage: Literal["mixer", "depth", "width", "rank", "norms", "weights", "precision", "execution"] | None = None
    conflicts: dict[str, str] = {}
    capabilities: frozenset[str] = frozenset()
    declared: dict[str, str | float] = {}
    example: dict[str, str | int | float | bool] = {}
    shapes: tuple[tuple[int, ...], ...] = ()
    oracles: tuple[str, ...] = Field(min_length=1)
    claim: Claim | None = None
    choose_when: str = Field(min_length=10)
    choose_instead: str = Field(min_length=10)
    expected_failures: dict[str, str] = {}
    confidence: Literal["high", "medium", "low"] = "high"
    bibtex: str = Field(pattern=r"^@")

    @field_validator("key")
    @classmethod
    def _key_is_kebab(cls, value: str) -> str:
        if not _KEY.fullmatch(value):
            raise ValueError(f"key must be kebab-case, got {value!r}")
        return value

    @field_validator("family")
    @classmethod
    def _family_is_known(cls, value: str) -> str:
        if value not in FAMILIES:
            raise ValueError(f"family must be one of {FAMILIES}, got {value!r}")
        return value

    @field_validator("engine")
    @classmethod
    def _engines_are_known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if unknown := set(value) - set(ENGINES):
            raise ValueError(f"engine must be among {ENGINES}, got {sorted(unknown)}")
        return value

    @field_validator("capabilities")
    @classmethod
    def _capabilities_are_known(cls, value: frozenset[str]) -> frozenset[str]:
        if unknown := value - set(CAPABILITIES):
            raise ValueError(f"capabilities must be among {CAPABILITIES}, got {sorted(unknown)}")
        return value

    @model_validator(mode="after")
    def _reasons_are_given(self) -> Card:
        for check, reason in self.expected_failures.items():
            if len(reason) < 10:
                raise ValueError(f"expected failure {check!r} of {self.key!r} needs its reason, got {reason!r}")
        if self.seed_id is not None and self.claim is None:
            raise ValueError(f"{self.key!r} is a system (seed_id {self.seed_id}) and needs a claim")
        return self

    @property
    def module_name(self) -> str:
        """Dotted name of the module that holds the method."""
        return f"torchgraft.{self.family.replace('/', '.')}.{self.key.replace('-', '_')}"
