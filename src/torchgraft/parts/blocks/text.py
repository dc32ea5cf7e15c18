"""Text from a sequence model over bytes, piece by piece as it is drawn."""

from __future__ import annotations

import codecs
from collections.abc import Iterator

import torch

from torchgraft.errors import BadInput
from torchgraft.parts.blocks.sequence_model import SequenceModel

__all__ = ["continue_text"]


def continue_text(
    model: SequenceModel,
    prompt: str,
    *,
    max_new_tokens: int = 200,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
) -> Iterator[str]:
    """Yield what ``model`` writes after ``prompt``; a letter of several bytes comes once it is whole.

    Args:
        model: a model over bytes.
        prompt: what to continue, at least one letter.
        max_new_tokens: how many bytes to add.
        temperature: divides the logits; 0 takes the likeliest byte.
        top_k: draw from the likeliest ``top_k`` bytes only.
        top_p: draw from the fewest likeliest bytes whose probabilities reach ``top_p``.
        seed: makes the draws repeatable.

    Raises:
        BadInput: the model is not over bytes, the prompt is empty, or an argument is out of range.

    Example:
        >>> from torchgraft.parts.mixers.softmax_attention import SoftmaxAttention
        >>> pieces = continue_text(SequenceModel(8, 1, SoftmaxAttention), "a", max_new_tokens=4, seed=0)
        >>> 1 <= len("".join(pieces)) <= 4
        True
    """
    if model.vocab_size != 256 or model.in_features is not None:
        raise BadInput(f"text needs a model over 256 bytes, got one over {model.vocab_size} symbols")
    if not prompt:
        raise BadInput("prompt must hold at least one letter")
    tokens = torch.tensor([list(prompt.encode("utf-8", "surrogateescape"))], device=model.head.weight.device)
    drawn = model.stream(
        tokens, max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed
    )
    return _decoded(drawn)


def _decoded(drawn: Iterator[torch.Tensor]) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for token in drawn:
        if piece := decoder.decode(bytes([int(token)])):
            yield piece
    if rest := decoder.decode(b"", final=True):
        yield rest
