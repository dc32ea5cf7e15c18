"""What kind of sparsity a method has, in six words that are checked against each other."""

from __future__ import annotations

from dataclasses import dataclass

from torchgraft.errors import BadInput, nearest

__all__ = ["SparsityTags"]

_STAGES = ("before", "during", "after")
_TRAJECTORIES = ("dense-to-sparse", "sparse-to-sparse")
_MASKS = ("static", "dynamic")
_PATTERNS = ("unstructured", "N:M", "block", "channel")
_SCOPES = ("weights", "activations", "gradients")
_BUDGETS = ("train-flops", "infer-flops", "memory", "communication")
_MOVES = ("drop", "grow")


def _known(field: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise BadInput(f"{field} must be one of {', '.join(choices)}, got {value!r}{nearest(value, list(choices))}")


@dataclass(frozen=True, kw_only=True)
class SparsityTags:
    """The distinctions of the sparsity handbook (arXiv 2302.02596), refused where they contradict each other.

    Args:
        stage: when the last mask is decided: ``"before"``, ``"during"`` or ``"after"`` training.
        trajectory: ``"dense-to-sparse"`` where dense weights are trained at some time, else ``"sparse-to-sparse"``.
        mask: ``"static"`` where one mask is chosen once, ``"dynamic"`` where masks change.
        moves: what a changing mask does: ``"drop"``, ``"grow"`` or both.
        pattern: ``"unstructured"``, ``"N:M"``, ``"block"`` or ``"channel"`` (channels and heads).
        scope: what is sparse: ``"weights"``, ``"activations"`` or ``"gradients"``.
        budget: what is saved, any of ``"train-flops"``, ``"infer-flops"``, ``"memory"``, ``"communication"``.

    Raises:
        BadInput: a word is unknown, or two of them contradict each other.

    Example:
        >>> SparsityTags(stage="before", trajectory="sparse-to-sparse", mask="static", moves=("grow",))
        Traceback (most recent call last):
        ...
        torchgraft.errors.BadInput: a static mask neither drops nor grows, got moves ('grow',)
    """

    stage: str
    trajectory: str
    mask: str
    moves: tuple[str, ...] = ()
    pattern: str = "unstructured"
    scope: str = "weights"
    budget: tuple[str, ...] = ("infer-flops", "memory")

    def __post_init__(self) -> None:
        _known("stage", self.stage, _STAGES)
        _known("trajectory", self.trajectory, _TRAJECTORIES)
        _known("mask", self.mask, _MASKS)
        _known("pattern", self.pattern, _PATTERNS)
        _known("scope", self.scope, _SCOPES)
        for word in self.budget:
            _known("budget", word, _BUDGETS)
        for word in self.moves:
            _known("moves", word, _MOVES)
        if not self.budget:
            raise BadInput("a method must save something, got an empty budget")
        if self.mask == "static" and self.moves:
            raise BadInput(f"a static mask neither drops nor grows, got moves {self.moves}")
        if self.mask == "dynamic" and not self.moves:
            raise BadInput("a dynamic mask drops or grows, got no moves")
        sparse = self.trajectory == "sparse-to-sparse"
        if sparse and self.mask == "dynamic" and set(self.moves) != set(_MOVES):
            raise BadInput(f"sparse-to-sparse training drops as many as it grows, got moves {self.moves}")
        if sparse and self.stage == "after":
            raise BadInput("sparse-to-sparse training has its masks before or during training, got stage 'after'")
        if not sparse and self.stage == "before":
            raise BadInput("a mask that is set before training leaves no dense phase, got 'dense-to-sparse'")
        if not sparse and self.mask == "dynamic" and "drop" not in self.moves:
            raise BadInput(f"dense-to-sparse training must drop weights, got moves {self.moves}")
        if self.stage == "before" and self.mask == "dynamic":
            raise BadInput("masks that change do so during or after training, got stage 'before'")
        if self.stage == "during" and self.mask == "static":
            raise BadInput("a static mask is set before or after training, got stage 'during'")
        if self.stage == "after" and "train-flops" in self.budget:
            raise BadInput("a mask that comes after training saves no training FLOPs, got budget 'train-flops'")
        if self.scope == "gradients" and set(self.budget) & {"infer-flops"}:
            raise BadInput("sparse gradients save nothing at inference, got budget 'infer-flops'")
