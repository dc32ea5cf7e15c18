"""Classifier head on a frozen encoder that learns from a stream by changing only the values that the batch fetched.

`Discrete Key-Value Bottleneck <https://arxiv.org/abs/2207.11240>`_ (Träuble et al., 2023), C codebooks of N pairs:
y = 1/C sum_c v_{c,i_c}, i_c = argmin_i |R_c z - k_{c,i}|, z the encoder's output, R_c fixed and random, k_c the running
means of unlabelled projections; only v is trained, by the cross-entropy of softmax(y).

Departures: values start from zero; they are trained by plain stochastic gradient descent on the fetched rows, for
momentum and weight decay would move the others too; keys start from k-means++ instead of random draws. The encoder is
frozen and gets no gradient: the choice of a key is piecewise constant, and autograd is told its derivative, zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft.catalogue import Card
from torchgraft.catalogue.card import Claim
from torchgraft.engines.codebook import Codebook, kmeans_plus_plus, lookup
from torchgraft.errors import BadInput, nearest

__all__ = ["CARD", "BottleneckClassifier", "Decoder", "DiscreteKeyValueBottleneck"]

Decoder = Literal["mean-softmax", "none"]

CARD = Card(
    key="discrete-key-value-bottleneck",
    title="Discrete Key-Value Bottleneck",
    seed_id=8,
    authors="Träuble et al., 2023",
    reference="https://arxiv.org/abs/2207.11240",
    family="parts/memories",
    kind="part",
    engine=("none",),
    equation="y = 1/C sum_c v_{c,i_c}; i_c = argmin_i |R_c z - k_{c,i}|",
    entry="DiscreteKeyValueBottleneck",
    capabilities=frozenset({"compilable"}),
    declared={"parameters": "codebooks * pairs * dim_value"},
    example={"d_model": 16, "codebooks": 3, "pairs": 4, "dim_key": 2, "dim_value": 5},
    shapes=((32, 16),),
    oracles=(
        "after a step on a batch every value that it did not fetch is the same bit for bit, and so is each prediction "
        "that fetches none of the batch's",
        "batches whose keys are disjoint train to the same values one after the other, swapped, and as one",
        "one codebook with a key on every point and its label as value is the nearest neighbour classifier",
        "the update of a value is -lr / C times softmax minus one-hot, summed over the samples that fetched it",
        "keys without memory of earlier batches are the means of the batch, and labels are never looked at",
    ),
    claim=Claim(
        text="Digits in five stages of two classes each, no boundaries told, fifty epochs a stage, on random frozen "
        "convolution features; keys from unlabelled images outside the stream. Against a linear and an MLP head on the "
        "same features and stream: accuracy on all ten classes, and how far each stage's falls after it was learnt.",
        figure="accuracy at least 0.70 where the linear and the MLP head end at 0.50 or less; forgets at least 3x less "
        "than the linear head",
    ),
    choose_when="a good frozen encoder meets a stream whose classes come one after the other and nothing is replayed",
    choose_instead="a linear head where the data come shuffled; modern-hopfield where lookups are to be differentiable",
    expected_failures={
        "every-parameter-gets-a-gradient": "the input's derivative is zero, as that of every choice is; values that no "
        "input fetches have none either",
    },
    bibtex="""@inproceedings{trauble2023discrete,
  title={Discrete Key-Value Bottleneck},
  author={Tr{\\"a}uble, Frederik and Goyal, Anirudh and Rahaman, Nasim and Mozer, Michael and Kawaguchi, Kenji and
    Bengio, Yoshua and Sch{\\"o}lkopf, Bernhard},
  booktitle={International Conference on Machine Learning},
  year={2023}
}""",
)


class DiscreteKeyValueBottleneck(nn.Module):
    """Codebooks of frozen keys and learned values between a frozen encoder and the classes.

    Call :meth:`init_keys` once with unlabelled data that cover what will come, then :meth:`fit_values` whenever
    labelled data come. Another optimiser may train ``values`` too if it has neither momentum nor weight decay.

    Args:
        d_model: the size of the encoder's output z.
        codebooks: C.
        pairs: N, how many keys and values a codebook has.
        dim_key: the size that z is projected to for each codebook.
        dim_value: the size of the values; the number of classes where the decoder is ``"mean-softmax"``.
        decoder: ``"mean-softmax"`` returns the mean of the fetched values, the logits of a softmax; ``"none"`` the
            fetched values of all codebooks, for a decoder of one's own.
        decay: how much of the running counts and sums of a key an update keeps.

    Attributes:
        projection: R, (C, dim_key, d_model).
        keys: the :class:`torchgraft.engines.codebook.Codebook` of the keys, C x (N, dim_key).
        values: (C, N, dim_value), the only parameter.

    Shapes:
        (B, d_model) -> (B, dim_value), or (B, C, dim_value) without a decoder

    Example:
        >>> head = DiscreteKeyValueBottleneck(8, codebooks=4, pairs=16, dim_value=3)
        >>> z = torch.randn(64, 8)
        >>> head.init_keys([z])
        >>> head.fit_values([(z, z[:, :3].argmax(-1))])
        1
        >>> head(z).shape
        torch.Size([64, 3])
    """

    projection: Tensor

    def __init__(
        self,
        d_model: int,
        *,
        codebooks: int = 64,
        pairs: int = 256,
        dim_key: int = 8,
        dim_value: int = 10,
        decoder: Decoder = "mean-softmax",
        decay: float = 0.95,
    ) -> None:
        super().__init__()
        sizes = {"d_model": d_model, "codebooks": codebooks, "pairs": pairs, "dim_key": dim_key, "dim_value": dim_value}
        for name, value in sizes.items():
            if value < 1:
                raise BadInput(f"{name} must be at least 1, got {value}")
        if decoder not in get_args(Decoder):
            raise BadInput(f"decoder got {decoder!r}{nearest(str(decoder), list(get_args(Decoder)))}")
        self.d_model, self.decoder = d_model, decoder
        self.register_buffer("projection", torch.randn(codebooks, dim_key, d_model) * d_model**-0.5)
        self.keys = Codebook(pairs, dim_key, groups=codebooks, decay=decay)
        self.values = nn.Parameter(torch.zeros(codebooks, pairs, dim_value))

    def project(self, z: Tensor) -> Tensor:
        """Return R_c z in float64, so that rounding chooses no key; (B, d_model) -> (C, B, dim_key)."""
        if z.ndim != 2 or z.shape[-1] != self.d_model or not z.is_floating_point():
            raise BadInput(f"z must be floating (B, {self.d_model}), got {z.dtype} of shape {tuple(z.shape)}")
        wide = torch.float32 if z.device.type == "mps" else torch.float64
        return z.detach().to(wide) @ self.projection.to(wide).mT

    def fetch(self, z: Tensor) -> Tensor:
        """Return the number of the key that z is nearest to in each codebook, (B, d_model) -> (C, B)."""
        return self.keys.encode(self.project(z))

    def decode(self, fetched: Tensor) -> Tensor:
        """Return what the decoder makes of the fetched values, (C, B, V) -> (B, V) or (B, C, V)."""
        wide = fetched.to(torch.promote_types(fetched.dtype, torch.float32))
        return (wide.mean(0) if self.decoder == "mean-softmax" else wide.transpose(0, 1)).to(fetched.dtype)

    def forward(self, z: Tensor) -> Tensor:
        """Return the logits, or the fetched values where there is no decoder."""
        decoded = self.decode(lookup(self.values, self.fetch(z)).to(z.dtype))
        choice = 0 * (z - z.detach()).sum(-1)  # what autograd is to know of the choice: its derivative is zero
        return decoded + choice.reshape(-1, *(1,) * (decoded.ndim - 1))

    @torch.no_grad()
    def init_keys(
        self,
        batches: Iterable[Tensor | tuple[Tensor, ...]],
        *,
        epochs: int = 1,
        dead_after: int = 10,
        generator: torch.Generator | None = None,
    ) -> None:
        """Set the keys from unlabelled encoder outputs and forget the values.

        Keys start on vectors of the first batch, which had best be no smaller than ``pairs``, and then follow the
        running mean of those that are nearest to them.

        Args:
            batches: encoder outputs (B, d_model); of a tuple only the first is looked at, so that labels may be there.
            epochs: how often all batches are gone through (for more than one give a list or loader, not an iterator).
            dead_after: a key that this many batches did not choose is moved onto a vector of the last one.
            generator: draws the start and the vectors that dead keys are moved to.
        """
        started = False
        for _ in range(epochs):
            for batch in batches:
                z = self.project(batch if isinstance(batch, Tensor) else batch[0]).to(self.projection.dtype)
                if not started:
                    pairs = self.keys.codes.shape[-2]
                    codes = torch.stack([kmeans_plus_plus(part, pairs, generator=generator) for part in z])
                    self.keys.codes.copy_(codes)
                    for state in (self.keys.counts, self.keys.sums, self.keys.idle):
                        state.zero_()
                    started = True
                self.keys.update_(z)
                self.keys.reseed_(z, after=dead_after, generator=generator)
        if not started:
            raise BadInput("init_keys needs at least one batch of encoder outputs, got none")
        self.values.zero_()

    def fit_values(
        self,
        stream: Iterable[tuple[Tensor, Tensor]],
        *,
        lr: float = 10.0,
        loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    ) -> int:
        """Go once through a stream of encoder outputs and targets, one step of plain descent a batch.

        Only the fetched rows are written; every other row stays the same bit for bit. Nothing need be known of where
        one task ends and the next begins.

        Args:
            stream: batches of encoder outputs (B, d_model) and targets.
            lr: the step size; the mean over codebooks divides what reaches one value by C, so it is well above 1.
            loss: ``loss(output, target)`` -> scalar.

        Returns:
            How many batches came.
        """
        if not lr > 0:
            raise BadInput(f"lr must be above 0, got {lr}")
        steps = 0
        for z, target in stream:
            with torch.enable_grad():
                indices = self.fetch(z)  # (C, B)
                fetched = lookup(self.values.detach(), indices).requires_grad_()
                (grad,) = torch.autograd.grad(loss(self.decode(fetched), target), fetched)
            with torch.no_grad():
                books = torch.arange(len(indices), device=indices.device)[:, None].expand_as(indices)
                self.values.index_put_((books, indices), -lr * grad.to(self.values.dtype), accumulate=True)
            steps += 1
        return steps


class BottleneckClassifier(nn.Module):
    """A frozen encoder with a bottleneck as its head; the encoder stays in eval mode and gets no gradient.

    Args:
        encoder: maps inputs to (B, d_model); frozen here.
        bottleneck: the head.

    Shapes:
        inputs of the encoder -> (B, dim_value)

    Example:
        >>> encoder = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU())
        >>> model = BottleneckClassifier(encoder, DiscreteKeyValueBottleneck(8, codebooks=4, pairs=16))
        >>> images, classes = torch.rand(64, 1, 8, 8), torch.randint(10, (64,))
        >>> model.init_keys([images])
        >>> model.fit_values([(images, classes)])
        1
        >>> model(images).shape
        torch.Size([64, 10])
    """

    def __init__(self, encoder: nn.Module, bottleneck: DiscreteKeyValueBottleneck) -> None:
        super().__init__()
        self.encoder, self.bottleneck = encoder.requires_grad_(False).eval(), bottleneck

    def train(self, mode: bool = True) -> BottleneckClassifier:
        """Set the mode of the head alone."""
        super().train(mode)
        self.encoder.eval()
        return self

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """Return the encoder's output."""
        z: Tensor = self.encoder(x)
        return z

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of the classes."""
        out: Tensor = self.bottleneck(self.encode(x))
        return out

    def init_keys(
        self,
        batches: Iterable[Tensor | tuple[Tensor, ...]],
        *,
        dead_after: int = 10,
        generator: torch.Generator | None = None,
    ) -> None:
        """Set the keys from unlabelled inputs, see :meth:`DiscreteKeyValueBottleneck.init_keys`."""
        encoded = (self.encode(batch if isinstance(batch, Tensor) else batch[0]) for batch in batches)
        self.bottleneck.init_keys(encoded, dead_after=dead_after, generator=generator)

    def fit_values(self, stream: Iterable[tuple[Tensor, Tensor]], *, lr: float = 10.0) -> int:
        """Learn from a stream of inputs and classes, see :meth:`DiscreteKeyValueBottleneck.fit_values`."""
        return self.bottleneck.fit_values(((self.encode(x), y) for x, y in stream), lr=lr)
