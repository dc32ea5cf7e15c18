"""Encoders whose first layers and first coordinates are encoders too: running, comparing and scoring them.

Any encoder with a stack of layers (``engines.depth``) can be read after each layer: what follows the stack, such as a
final norm and a pooling, is the same for all. Training needs several layers of one pass; encoding runs as many layers
as it needs and no more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft.bench.task import Inputs, call
from torchgraft.engines.depth import Stack, stacks
from torchgraft.engines.nesting.stitch import blocks_of, standing
from torchgraft.errors import BadInput

__all__ = [
    "ElasticEmbedder",
    "Stored",
    "Views",
    "coordinate_divergence",
    "cut",
    "grid_eval",
    "in_batch_contrast",
    "reciprocal_rank",
]

#: By layer, the embeddings (B, D) of one side of the pairs.
Views = Mapping[int, Tensor]


class Stored(nn.Module):
    """A block that makes of its input a hidden state that was kept."""

    def __init__(self, hidden: Any) -> None:
        super().__init__()
        self.hidden = hidden

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what was kept."""
        del args, kwargs
        return self.hidden


class ElasticEmbedder(nn.Module):
    """An encoder that can stop after any layer and keep any number of coordinates.

    Args:
        encoder: a module with a stack of layers that returns one vector a sample; taken over, not copied.
        example: inputs by which the stack is found.

    Example:
        >>> from torchgraft.bench.models import TextEncoder
        >>> encoder = TextEncoder(nn.Embedding(9, 8), 4, depth=3, num_heads=2)
        >>> tokens = torch.randint(1, 9, (2, 4))
        >>> embedder = ElasticEmbedder(encoder, tokens)
        >>> embedder.layers, embedder.encode(tokens, layer=2, dim=4).shape
        (3, torch.Size([2, 4]))

    Raises:
        BadInput: the encoder has no stack of layers.
    """

    def __init__(self, encoder: nn.Module, example: Inputs) -> None:
        super().__init__()
        found = stacks(encoder, example)
        if not found:
            raise BadInput(f"{type(encoder).__name__} has no stack of layers that it could stop in")
        self.encoder = encoder
        self.stack: Stack = max(found, key=lambda stack: stack.length)

    @property
    def layers(self) -> int:
        """Number of layers of the stack."""
        return self.stack.length

    def check_layer(self, layer: int) -> int:
        """Return ``layer`` where the encoder has it."""
        if not 1 <= layer <= self.layers:
            raise BadInput(f"layer must lie in [1, {self.layers}], got {layer}")
        return layer

    def forward(self, inputs: Inputs, layers: Sequence[int] | None = None) -> dict[int, Tensor]:
        """Return the embeddings (B, D) of ``layers`` (default: all), from one pass through the deepest of them."""
        wanted = sorted({self.check_layer(layer) for layer in layers or range(1, self.layers + 1)})
        blocks = blocks_of(self.encoder, self.stack)[: wanted[-1]]
        hidden: dict[int, Any] = {}
        handles = [
            blocks[layer - 1].register_forward_hook(lambda module, args, output, at=layer: hidden.update({at: output}))
            for layer in wanted[:-1]
        ]
        try:
            found = {wanted[-1]: self._run(blocks, inputs)}
        finally:
            for handle in handles:
                handle.remove()
        for layer in wanted[:-1]:
            found[layer] = self._run([Stored(hidden[layer])], inputs)
        return {layer: found[layer] for layer in wanted}

    def _run(self, blocks: Sequence[nn.Module], inputs: Inputs) -> Tensor:
        with standing(self.encoder, self.stack, blocks, rest=True):
            out: Tensor = call(self.encoder, inputs)
        return out

    def encode(
        self, inputs: Inputs, *, layer: int | None = None, dim: int | None = None, renormalise: bool = True
    ) -> Tensor:
        """Return the first ``dim`` coordinates after ``layer`` layers, of length 1 where ``renormalise``.

        Args:
            inputs: what the encoder takes.
            layer: layers that run; default: all.
            dim: coordinates kept; default: all.
            renormalise: whether the kept coordinates are brought to length 1.

        Shapes:
            -> (B, dim)
        """
        count = self.check_layer(self.layers if layer is None else layer)
        out = self._run(blocks_of(self.encoder, self.stack)[:count], inputs)
        out = cut(out, out.shape[-1] if dim is None else dim)
        return F.normalize(out, dim=-1) if renormalise else out


def cut(embedding: Tensor, dim: int) -> Tensor:
    """Return the first ``dim`` coordinates.

    Raises:
        BadInput: there are not as many, or ``dim`` is below 1.
    """
    if not 1 <= dim <= embedding.shape[-1]:
        raise BadInput(f"dim must lie in [1, {embedding.shape[-1]}], got {dim}")
    return embedding[..., :dim]


def coordinate_divergence(teacher: Tensor, student: Tensor, *, detach: bool = False) -> Tensor:
    """Return KL(softmax(teacher) || softmax(student)) over the coordinates, averaged over the samples.

    Args:
        teacher: (B, D).
        student: (B, D).
        detach: whether the teacher's gradient is stopped.
    """
    log_p = torch.log_softmax(teacher.detach() if detach else teacher, -1)
    log_q = torch.log_softmax(student, -1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


def in_batch_contrast(left: Tensor, right: Tensor, *, scale: float = 20.0) -> Tensor:
    """Return the cross-entropy by which row i of ``left`` finds row i of ``right`` among all rows, by cosine.

    Args:
        left: (B, D).
        right: (B, D).
        scale: what cosines are multiplied by, the inverse of a temperature.
    """
    similarity = scale * F.normalize(left, dim=-1) @ F.normalize(right, dim=-1).T  # (B, B)
    return F.cross_entropy(similarity, torch.arange(len(left), device=left.device))


def reciprocal_rank(left: Tensor, right: Tensor, *, at: int = 10) -> Tensor:
    """Return for each row of ``left`` 1 / the rank of the same row of ``right`` by cosine, 0 beyond ``at``; (B,).

    Ties count against it.

    Example:
        >>> reciprocal_rank(torch.eye(2), torch.eye(2).flip(0))
        tensor([0.5000, 0.5000])
    """
    similarity = F.normalize(left, dim=-1) @ F.normalize(right, dim=-1).T
    right_one = similarity.diagonal()[:, None]
    rank = (similarity >= right_one).sum(-1)
    return torch.where(rank <= at, 1.0 / rank, torch.zeros(()))


def grid_eval(
    embedders: tuple[ElasticEmbedder, ElasticEmbedder],
    inputs: tuple[Inputs, Inputs],
    *,
    layers: Sequence[int],
    dims: Sequence[int],
    metric: Callable[[Tensor, Tensor], Tensor] = reciprocal_rank,
) -> Tensor:
    """Return the mean of ``metric`` for every number of layers and coordinates: a heat map (len(layers), len(dims)).

    Args:
        embedders: of the queries and of the documents; one and the same for symmetric tasks.
        inputs: queries and documents, row i of one belonging to row i of the other.
        layers: numbers of layers.
        dims: numbers of coordinates.
        metric: of embeddings of length 1, (B, d) and (B, d), one number a row.
    """
    modes = [(embedder, embedder.training) for embedder in embedders]
    try:
        for embedder in embedders:
            embedder.eval()
        with torch.no_grad():
            views = [embedder(each, layers) for embedder, each in zip(embedders, inputs, strict=True)]
            return torch.tensor(
                [
                    [
                        float(metric(*(F.normalize(cut(view[layer], dim), dim=-1) for view in views)).mean())
                        for dim in dims
                    ]
                    for layer in layers
                ]
            )
    finally:
        for embedder, training in modes:
            embedder.train(training)
