"""Softmax attention made linear as one more choice of ``fit``, attention by attention.

`Transformers are RNNs <https://arxiv.org/abs/2006.16236>`_ (Katharopoulos et al., 2020) made attention linear by
features of queries and keys. The features are those of a method that :func:`torchgraft.linearize` knows.

Equation: ``o_i = sum_j phi(q_i) . phi(k_j) v_j / sum_j phi(q_i) . phi(k_j)`` in a share of the attentions.

Departures: which attentions go first is ours: those whose change moves the model's answers least on training samples.
Where linear attention would not lower the multiplications, because sequences are short, nothing is a site.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from torchgraft.bench.meters import macs
from torchgraft.bench.task import Task, call, take
from torchgraft.catalogue import Card
from torchgraft.engines.linearize import Linearize, attentions
from torchgraft.engines.linearize.convert import SHORT_NAMES
from torchgraft.engines.procedure import Procedure, Refusal, Site
from torchgraft.engines.surgery.edits import Edit, apply_edits
from torchgraft.errors import BadInput

__all__ = ["CARD", "Linearization"]

CARD = Card(
    key="linearization",
    title="Linear attention in place of softmax",
    authors="Katharopoulos, Vyas, Pappas and Fleuret, 2020",
    reference="https://arxiv.org/abs/2006.16236",
    family="elastic",
    kind="procedure",
    engine=("surgery", "recurrence"),
    equation="o_i = sum_j phi(q_i) . phi(k_j) v_j / sum_j phi(q_i) . phi(k_j)",
    entry="Linearization",
    stage="mixer",
    capabilities=frozenset({"needs-data"}),
    example={"always": True},
    oracles=(
        "projections are bit for bit those of the original",
        "nothing is a site where the multiplications of the model would not fall",
        "the attentions that move the answers least go first",
    ),
    choose_when="a transformer works on long sequences and its attention is a good part of the cost",
    choose_instead="structured pruning where sequences are short; torchgraft.linearize for the papers' own recoveries",
    expected_failures={
        "cost-never-rises-with-strength": "feature maps add parameters, and six tokens are too few to gain; without "
        "the setting of this check the check models have no sites",
    },
    bibtex="@inproceedings{katharopoulos2020transformers, title={Transformers are {RNNs}: Fast Autoregressive "
    "Transformers with Linear Attention}, author={Katharopoulos, Angelos and Vyas, Apoorv and Pappas, Nikolaos and "
    "Fleuret, Fran{\\c{c}}ois}, booktitle={ICML}, year={2020}}",
)


class Linearization(Procedure):
    """Linear attention in a share of a model's attentions.

    Args:
        to: whose features, see :func:`torchgraft.linearize`.
        samples: training samples by which the order of the attentions is found.
        always: whether to act where multiplications would not fall, too.

    Example:
        >>> from torchgraft.bench.models import VisionTransformer
        >>> from torchgraft.bench.task import Task
        >>> x, y = torch.randn(4, 1, 16, 16), torch.randint(0, 3, (4,))
        >>> model = VisionTransformer(16, 1, 1, 3, d_model=8, depth=2, num_heads=2)
        >>> task = Task(model, (x, y), (x, y), (x, y), nn.functional.cross_entropy, lambda out, t: out[:, 0])
        >>> [type(block.attn).__name__ for block in Linearization().apply(model, task, 1.0).blocks]
        ['PlainGraft', 'PlainGraft']
    """

    card = CARD
    expense = 1

    def __init__(self, *, to: str = "hedgehog", samples: int = 32, always: bool = False) -> None:
        if samples < 1:
            raise BadInput(f"samples must be at least 1, got {samples}")
        self.to, self.samples, self.always = to, samples, always
        self._why = ""

    def _edit(self, model: nn.Module, names: Sequence[str]) -> Linearize:
        image = any(isinstance(module, nn.Conv2d) for module in model.modules())
        return Linearize(to=SHORT_NAMES.get(self.to, self.to), names=tuple(names), image=image)

    def applies_to(self, model: nn.Module, task: Task, *, ignore: Sequence[str] = ()) -> list[Site]:
        """Return the softmax attentions, if the model multiplies less without them."""
        found = attentions(model, ignore=ignore)
        self._why = ""
        if not found:
            return []
        if not self.always:
            one = take(task.train.inputs, slice(1))  # both grow with the number of samples alike
            before = macs(model, one)
            try:
                after = macs(apply_edits(model, [self._edit(model, list(found))]), one)
            except BadInput as error:
                self._why = str(error)
                return []
            if after >= before:
                self._why = (
                    f"sequences are too short to gain: {before:,} multiplications a sample would become {after:,}"
                )
                return []
        return [
            Site(name, "attention", 1, sum(value.numel() for value in model.get_submodule(name).parameters()))
            for name in found
        ]

    def refusals(self, model: nn.Module, task: Task, *, ignore: Sequence[str] = ()) -> list[Refusal]:
        """Return why nothing is a site, where there are attentions."""
        return [Refusal("every attention", self._why)] if self._why else []

    def plan(
        self, model: nn.Module, task: Task, strength: float, *, ignore: Sequence[str] = (), seed: int = 0
    ) -> list[Edit]:
        """Return one edit that makes the attentions linear whose change is felt least."""
        names = [site.name for site in self.applies_to(model, task, ignore=ignore)]
        count = math.ceil(strength * len(names))
        if count < len(names):
            inputs = take(task.train.inputs, slice(self.samples))
            felt: dict[str, float] = {}
            with torch.no_grad():
                expected = task.output_logits(call(apply_edits(model, []).eval(), inputs))
                for name in names:
                    changed = apply_edits(model, [self._edit(model, [name])]).eval()
                    gap = task.output_logits(call(changed, inputs)) - expected
                    felt[name] = float(gap.square().mean())
            names = sorted(sorted(names, key=lambda name: felt[name])[:count], key=names.index)
        return [self._edit(model, names)]
