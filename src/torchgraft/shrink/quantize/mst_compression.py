"""Compute each channel of a binary convolution from another one, along a minimum spanning tree of their differences.

`MST-compression: Compressing and Accelerating Binary Neural Networks with Minimum Spanning Tree
<https://arxiv.org/abs/2308.13735>`_ (Vo et al., 2023): y_j = y_i + 2 sum_{k in D_ij} w_jk x_k, D_ij being the places
where the signs of channels i and j differ; n + sum of |D| over the tree's edges bit operations a position, not C n.

The integers are those of the direct convolution. Bit operations are counted, not timed: on a CPU the tree is walked in
Python and is slower than ``engines.binary.freeze``; what is saved is saved by hardware that gates single bits. No cost
that ``fit`` measures falls, so it is no lever.

Departures:
- The minimum tree of least depth over all minimum trees is not searched for (that is a hard problem): trees are grown
  from many roots, each tie going to the shallower parent, and the shallowest is taken and hung at its centre.
- How centres are assigned is our reading: ``centers`` random sign vectors a layer, fixed by the seed, each channel
  drawn to the nearest. ``lam`` = 4e-6 suits networks of the paper's size; the term grows with the number of weights.
- The border of an input counts as +1, since a zero is no sign.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from torchgraft.bench.task import Inputs, call
from torchgraft.catalogue import Card, Claim
from torchgraft.engines.binary import BinaryConv2d, PackedConv2d, pack_signs, sign, unpack_signs
from torchgraft.engines.surgery.swap import replace_module
from torchgraft.errors import BadInput

__all__ = ["CARD", "BitOps", "MSTBinaryConv2d", "Tree", "bitops", "compress", "mst_loss", "mst_order"]

CARD = Card(
    key="mst-compression",
    title="Reuse between binary channels along a minimum spanning tree (MST)",
    seed_id=168,
    authors="Vo et al., 2023",
    reference="https://arxiv.org/abs/2308.13735",
    family="shrink/quantize",
    kind="tool",
    engine=("surgery",),
    equation="y_j = y_i + 2 sum_{k in D_ij} w_jk x_k; bit operations n + sum_edges |D|, not C n",
    entry="MSTBinaryConv2d",
    oracles=(
        "outputs in tree order equal the direct binary convolution: all channels, strides, paddings, as integers",
        "the tree's weight equals the least over all trees (Cayley enumeration, up to 6 channels); its depth is the"
        " least over its roots",
        "the counted bit operations equal those of an instrumented pass",
        "mst_loss equals lam times the distances to the nearest centre by hand, and its gradient lowers them",
    ),
    claim=Claim(
        text="digits CNN of three binary convolutions of 32 to 64 channels (1-bit weights and activations), trained"
        " plainly and with mst_loss (one centre; lam chosen on a seed outside the claim): XNORs against direct"
        " convolution, depth of the trees, test accuracy",
        figure="plain reuse removes >= 30 % of XNORs; with mst_loss >= 60 % at <= 1 point of accuracy lost, and smaller"
        " depth; mean of 3 seeds",
    ),
    choose_when="a binary network goes onto hardware whose cost is bit operations, such as an FPGA",
    choose_instead="engines.binary.freeze on CPUs, where integer products of whole rows are faster than reuse",
    confidence="medium",
    bibtex="""@inproceedings{vo2023mst,
  title={MST-compression: Compressing and Accelerating Binary Neural Networks with Minimum Spanning Tree},
  author={Vo, Quang Hieu and Tran, Linh-Tam and Bae, Sung-Ho and Kim, Lok-Won and Hong, Choong Seon},
  booktitle={International Conference on Computer Vision},
  year={2023}
}""",
)

#: From how many roots trees are grown.
_ROOTS = 64


@dataclass(frozen=True)
class Tree:
    """The order in which channels are computed.

    Args:
        root: the channel that is computed in full.
        parents: the channel that each one is computed from; the root's is itself.
        order: all channels, each after its parent.
        distances: at how many places each one differs from its parent; the root's is 0.
        depth: edges between the root and the channel farthest from it.
    """

    root: int
    parents: tuple[int, ...]
    order: tuple[int, ...]
    distances: tuple[int, ...]
    depth: int

    @property
    def weight(self) -> int:
        """Sum of the distances."""
        return sum(self.distances)


def _hung(edges: Iterable[tuple[int, int]], count: int, root: int) -> tuple[list[int], list[int], int]:
    """Return parents, order and depth of the tree of ``edges`` when it hangs at ``root``."""
    near: list[list[int]] = [[] for _ in range(count)]
    for a, b in edges:
        near[a].append(b)
        near[b].append(a)
    parents, depths, order = [-1] * count, [0] * count, [root]
    parents[root] = root
    for channel in order:
        for other in near[channel]:
            if parents[other] < 0:
                parents[other], depths[other] = channel, depths[channel] + 1
                order.append(other)
    return parents, order, max(depths)


def _grown(distances: np.ndarray, root: int) -> tuple[list[tuple[int, int]], int]:
    """Return a minimum spanning tree grown from ``root`` (Prim), ties going to the shallower parent, and its depth."""
    count = len(distances)
    depths = np.zeros(count, dtype=np.int64)
    # A distance and the depth of the parent in one number, so that the least is the shallowest of the nearest.
    keys = distances[root] * (count + 1)
    parents = np.full(count, root)
    outside = np.ones(count, dtype=bool)
    outside[root] = False
    edges = []
    for _ in range(count - 1):
        channel = int(np.where(outside, keys, np.iinfo(np.int64).max).argmin())
        edges.append((int(parents[channel]), channel))
        outside[channel] = False
        depths[channel] = depths[parents[channel]] + 1
        offered = distances[channel] * (count + 1) + depths[channel]
        better = outside & (offered < keys)
        keys[better], parents[better] = offered[better], channel
    return edges, int(depths.max())


def mst_order(binary_weights: Tensor) -> Tree:
    """Return a shallow minimum spanning tree of the channels, two being as far apart as signs differ.

    Args:
        binary_weights: signs, a row a channel; what follows the first dimension is flattened.

    Example:
        >>> tree = mst_order(torch.tensor([[1.0, 1, 1], [1, 1, -1], [1, -1, -1]]))
        >>> tree.root, tree.parents, tree.weight, tree.depth
        (1, (1, 1, 1), 2, 1)

    Raises:
        BadInput: there is no channel, or an entry is neither +1 nor -1.
    """
    rows = binary_weights.detach().flatten(1).double() if binary_weights.ndim > 1 else binary_weights.new_empty(0, 0)
    if rows.numel() == 0 or not bool((rows.abs() == 1).all()):
        raise BadInput(f"binary_weights must be +1 and -1, a row a channel, got {tuple(binary_weights.shape)}")
    distances: np.ndarray = ((rows.shape[1] - rows @ rows.T) / 2).round().long().numpy()
    count = len(distances)
    starts = sorted({index * count // min(count, _ROOTS) for index in range(min(count, _ROOTS))})
    edges, _ = min((_grown(distances, root) for root in starts), key=lambda grown: grown[1])
    root = min(range(count), key=lambda channel: _hung(edges, count, channel)[2])  # the centre
    parents, order, depth = _hung(edges, count, root)
    steps = tuple(int(distances[channel, parent]) for channel, parent in enumerate(parents))
    return Tree(root, tuple(parents), tuple(order), steps, depth)


class MSTBinaryConv2d(PackedConv2d):
    """A binary convolution computed along its tree: the root in full, every other channel by what differs.

    What is kept: the root's bits, and for each other channel its parent and the differing places.

    Args:
        layer: a trained binary convolution whose inputs become signs.

    Shapes:
        (B, channels, h, w) -> (B, out_channels, h', w')

    Example:
        >>> from torchgraft.engines.binary import Polynomial
        >>> conv = BinaryConv2d(2, out_channels=3, activation=Polynomial(), scale="one", bias=False)
        >>> x = torch.randn(1, 2, 4, 4)
        >>> torch.equal(MSTBinaryConv2d.from_conv(conv)(x), conv(x))
        True

    Raises:
        BadInput: the layer's inputs are no signs, or it has several groups.
    """

    #: Buffers that the meters count as parameters.
    parameter_buffers = ("bias",)

    root: Tensor
    places: Tensor

    def __init__(self, layer: BinaryConv2d) -> None:
        super().__init__(layer)
        signs = unpack_signs(self.weight, self.columns)
        self.tree = mst_order(signs)
        del self.weight
        self.register_buffer("root", pack_signs(signs[self.tree.root]))
        places = [(signs[j] != signs[parent]).nonzero().flatten() for j, parent in enumerate(self.tree.parents)]
        self.register_buffer("places", torch.cat(places).to(torch.int32))

    @classmethod
    def from_conv(cls, conv: BinaryConv2d) -> MSTBinaryConv2d:
        """Return ``conv`` in tree order."""
        if not isinstance(conv, BinaryConv2d):
            raise BadInput(f"a tree is made of a BinaryConv2d, got {type(conv).__name__}")
        return cls(conv)

    def agreements(self, rows: Tensor, signs: Tensor) -> Tensor:
        """Return at how many places each row has these signs: one XNOR a place; (M, d), (d,) -> (M,)."""
        return (rows == signs).sum(1, dtype=torch.int32)

    def integers(self, rows: Tensor) -> Tensor:
        """Return the integer products of sign rows with all channels, in tree order; (M, K) -> (M, C) int32."""
        tree = self.tree
        split = torch.split(self.places.long(), list(tree.distances))
        signs = {tree.root: unpack_signs(self.root, self.columns, dtype=rows.dtype)}
        out = torch.zeros(len(rows), len(tree.parents), dtype=torch.int32, device=rows.device)
        out[:, tree.root] = 2 * self.agreements(rows, signs[tree.root]) - self.columns
        for channel in tree.order[1:]:
            parent, places = tree.parents[channel], split[channel]
            own = signs[parent].clone()
            own[places] = -own[places]
            signs[channel] = own
            common = 2 * self.agreements(rows[:, places], own[places]) - len(places)
            out[:, channel] = out[:, parent] + 2 * common
        return out

    def multiply(self, rows: Tensor) -> Tensor:
        """Return scale * integers + bias for rows of signs."""
        out = self.integers(sign(rows)).to(self.scale.dtype) * self.scale
        return out if self.bias is None else out + self.bias


def compress(model: nn.Module) -> nn.Module:
    """Return a copy of ``model`` whose binary convolutions with binary inputs are computed in tree order."""
    made = copy.deepcopy(model)
    for name, layer in _convolutions(made).items():
        if name == "":
            return MSTBinaryConv2d.from_conv(layer)
        replace_module(made, name, MSTBinaryConv2d.from_conv(layer))
    return made


def _convolutions(model: nn.Module) -> dict[str, BinaryConv2d]:
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, BinaryConv2d) and module.activation is not None and module.groups == 1
    }
    if not found:
        raise BadInput(f"{type(model).__name__} has no binary convolution whose inputs are signs")
    return found


def mst_loss(model: nn.Module, centers: int = 1, lam: float = 4e-6, *, seed: int = 0) -> Tensor:
    """Return lam * sum over layers and channels of the distance to the nearest of ``centers`` random sign vectors.

    Add it to the task's loss; gradients pass through the estimators of the layers.

    Args:
        model: a model with binary convolutions.
        centers: sign vectors a layer; more of them give deeper trees and more bit operations.
        lam: weight of the term.
        seed: decides the centres, which stay the same from step to step.

    Raises:
        BadInput: ``centers`` is below 1, ``lam`` is negative, or the model has no binary convolution.
    """
    if centers < 1 or lam < 0:
        raise BadInput(f"centers must be at least 1 and lam not negative, got centers {centers}, lam {lam}")
    draw = torch.Generator().manual_seed(seed)
    terms = []
    for layer in _convolutions(model).values():
        signs = layer.signs().flatten(1)  # (C, n)
        centre = torch.randint(0, 2, (centers, signs.shape[1]), generator=draw).to(signs).mul_(2).sub_(1)
        terms.append(((signs.shape[1] - signs @ centre.T) / 2).min(1).values.sum())
    return lam * torch.stack(terms).sum()


@dataclass(frozen=True)
class BitOps:
    """What one binary convolution costs.

    Args:
        direct: XNORs of the direct convolution.
        tree: XNORs in tree order.
        depth: edges from the root to the farthest channel, the steps that cannot run at once.
        direct_bits: bits of weights that the direct convolution keeps.
        tree_bits: bits that the tree keeps: the root, a place for each difference, a parent for each channel. It may
            be more.
    """

    direct: int
    tree: int
    depth: int
    direct_bits: int
    tree_bits: int

    @property
    def saved(self) -> float:
        """Share of the XNORs that reuse removes."""
        return 1 - self.tree / self.direct


def bitops(model: nn.Module, example: Inputs | None = None) -> dict[str, BitOps]:
    """Return the bit operations of each binary convolution of ``model``, by name.

    Args:
        model: a model with binary convolutions whose inputs are signs.
        example: inputs of the model; with them operations are those of one sample, without them of one output position.

    Example:
        >>> from torchgraft.engines.binary import Polynomial
        >>> model = nn.Sequential(BinaryConv2d(2, out_channels=4, activation=Polynomial()))
        >>> bitops(model)["0"].direct, bitops(model, torch.zeros(1, 2, 5, 5))["0"].direct
        (72, 1800)
    """
    layers = _convolutions(model)
    positions = dict.fromkeys(layers, 1)
    if example is not None:
        handles = [
            layer.register_forward_hook(
                lambda module, args, out, name=name: positions.__setitem__(name, out.shape[2] * out.shape[3])
            )
            for name, layer in layers.items()
        ]
        try:
            with torch.no_grad():
                call(model, example)
        finally:
            for handle in handles:
                handle.remove()
    found = {}
    for name, layer in layers.items():
        signs = layer.estimator.binary(layer.weight.detach()).flatten(1)
        (count, n), tree = signs.shape, mst_order(signs)
        kept = n + tree.weight * math.ceil(math.log2(max(n, 2))) + (count - 1) * math.ceil(math.log2(max(count, 2)))
        times = positions[name]
        found[name] = BitOps(times * count * n, times * (n + tree.weight), tree.depth, count * n, kept)
    return found
