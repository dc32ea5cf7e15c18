"""Keep few weights of linear layers and 1x1 convolutions, and run only those where that is measured to be faster.

`Fast Sparse ConvNets <https://arxiv.org/abs/1911.09723>`_ (Elsen et al., 2020): Y = W X over contiguous pixels or
tokens, W sparse in blocks of 1, 2 or 4 output channels that share a pattern, score sum |w|;
s_t = s_f + (s_i - s_f) (1 - (t - t_0) / (t_1 - t_0))^3.

Departures:
- A linear layer over tokens is a 1x1 convolution over pixels, and is treated as one.
- :class:`FastSparseConv` prunes at one stroke and leaves the rest to recovery, which trains the kept weights only; the
  paper prunes gradually over a long training (:func:`sparsify_pointwise`).
- A layer becomes sparse only above the sparsity from which this machine is measured to run it faster.
- Blocks of 4 by default, where they fit: the paper finds them to cost little and to run faster.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from torchgraft.catalogue import Card, Claim
from torchgraft.engines.masks import make_permanent, prunable
from torchgraft.engines.sites import ignored
from torchgraft.engines.sparse import SparsePointwiseConv, Sparsify, block_scores, is_pointwise
from torchgraft.engines.sparse.gradual import GradualSparsity, Schedule, fitting_rows
from torchgraft.engines.sparse.procedure import SparseProcedure
from torchgraft.engines.sparse.timing import Timing, benchmark
from torchgraft.engines.surgery.edits import apply_edits
from torchgraft.errors import BadInput

__all__ = [
    "CARD",
    "FastSparseConv",
    "GradualSparsity",
    "Schedule",
    "SparsePointwiseConv",
    "Timing",
    "benchmark",
    "sparsify_pointwise",
    "to_sparse",
]

CARD = Card(
    key="fast-sparse-conv",
    title="Fast Sparse ConvNets",
    seed_id=145,
    authors="Elsen et al., 2020",
    reference="https://arxiv.org/abs/1911.09723",
    family="shrink/prune",
    kind="procedure",
    engine=("masks", "surgery"),
    equation="Y = W X, W sparse in blocks of 1, 2 or 4 rows kept by sum |w|; s_t cubic from s_i to s_f",
    entry="FastSparseConv",
    stage="weights",
    example={"timed": False},
    oracles=(
        "sparse execution equals the dense masked layer to 1e-5 for every block size, layout and odd spatial sizes",
        "masks are constant inside blocks, and the final sparsity is exact to one block",
        "s_t is s_i at the start and s_f at the end, and never falls",
        "the counted multiply-accumulates are the kept weights times the pixels or tokens",
        "gradients of the kept values are those of the dense masked layer",
    ),
    claim=Claim(
        text="depthwise-separable CNN on digits of 16x16, shifted and noisy: pointwise layers 90 % sparse, the network"
        " wider by what equal counted multiply-accumulates allow, against the dense network; blocks of 4 against single"
        " weights; beside it the sparsity from which a 512x512 layer over 196 pixels runs faster here (not asserted)",
        figure="sparse and wide >= dense + 0.7 point of test accuracy; block 4 loses <= 0.5 point against block 1; mean"
        " of 3 seeds",
    ),
    choose_when="linear layers or 1x1 convolutions of a few hundred channels or more carry the cost, and 80 to 97 % of"
    " their weights can go",
    choose_instead="magnitude-pruning or svd where layers are small or must run on a machine without a C++ compiler:"
    " there a sparse product is slower than the dense one",
    bibtex="""@inproceedings{elsen2020fast,
  title={Fast Sparse ConvNets},
  author={Elsen, Erich and Dukhan, Marat and Gale, Trevor and Simonyan, Karen},
  booktitle={IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year={2020}
}""",
)

_WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def sparsify_pointwise(
    model: nn.Module,
    sparsity: float = 0.9,
    *,
    block: int = 1,
    schedule: Schedule | None = None,
    linear: bool = False,
    ignore: Sequence[str] = (),
) -> GradualSparsity:
    """Put block masks on the 1x1 convolutions of ``model``, in place, at once or along a schedule.

    Args:
        model: the model; :func:`to_sparse` ends the pruning.
        sparsity: the share of each layer's blocks that goes.
        block: consecutive output channels that share a pattern: 1, 2 or 4, halved where it does not divide.
        schedule: when; ``None`` prunes at once. Call ``update(step)`` of the result after every step.
        linear: whether linear layers are pruned too, the last layer excepted.
        ignore: globs of module names that stay dense.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 8, 1), nn.Flatten(), nn.LazyLinear(2))
        >>> sparsify_pointwise(model, 0.75, block=4).names
        ('1',)
        >>> int((model[1].weight != 0).sum())
        8

    Raises:
        BadInput: a setting is out of range, or there is no such layer.
    """
    if block not in (1, 2, 4) or not 0.0 <= sparsity < 1.0:
        raise BadInput(f"block must be 1, 2 or 4 and sparsity in [0, 1), got block {block}, sparsity {sparsity}")
    weighted = [name for name, module in model.named_modules() if isinstance(module, _WEIGHTED)]
    free = {name.rpartition(".")[0] for name in prunable(model)}
    names = [
        name
        for name, module in model.named_modules()
        if is_pointwise(module)
        and name in free
        and (linear or not isinstance(module, nn.Linear))
        and name not in (weighted[0], weighted[-1])
        and not ignored(name, ignore)
    ]
    if not names:
        raise BadInput(f"{type(model).__name__} has no 1x1 convolution between its first and its last layer")
    return GradualSparsity(model, names, sparsity=sparsity, block=block, schedule=schedule)


def to_sparse(model: nn.Module, *, block: int = 1, least: float = 0.5, backend: str = "auto") -> nn.Module:
    """Return a copy of ``model`` in which layers with many zeros are held and executed sparse.

    Args:
        model: a model with masks or with zeros.
        block: output channels that share a pattern; a block with one nonzero weight is kept whole.
        least: the share of zero blocks from which on a layer becomes sparse.
        backend: a name in :data:`torchgraft.engines.sparse.BACKENDS`, or ``"auto"``.

    Example:
        >>> to_sparse(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), least=0.5)[0]
        Linear(in_features=2, out_features=2, bias=True)
    """
    plain = make_permanent(apply_edits(model, []))
    modules: dict[str, tuple[int, int, int]] = {}
    for name in (each.rpartition(".")[0] for each in prunable(plain)):
        layer = plain.get_submodule(name)
        if is_pointwise(layer):
            weight = layer.get_parameter("weight").detach().flatten(1)
            r = fitting_rows(len(weight), block)
            scores = block_scores(weight, (r, 1))
            kept = int((scores > 0).sum())
            if kept <= (1.0 - least) * scores.numel():
                modules[name] = (kept, r, 1)
    return apply_edits(plain, [Sparsify(modules=modules, backend=backend)] if modules else [])


class FastSparseConv(SparseProcedure):
    """Sparse linear layers and 1x1 convolutions; strength is how few weights stay, as (1 - most) ** strength.

    The first and the last layer stay dense. Layers become sparse where that pays: in time, as measured on this machine
    at the number of tokens or pixels that the task's example brings, or, where latency does not count, in bytes.

    Args:
        block: consecutive output channels that share a pattern: 1, 2 or 4, halved where it does not divide.
        most: the sparsity at strength 1.
        timed: whether only layers that are measured to be faster become sparse.

    Example:
        >>> import torch
        >>> from torchgraft.bench.task import Task
        >>> x, y = torch.randn(32, 6), torch.randint(0, 3, (32,))
        >>> model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))
        >>> loss = nn.functional.cross_entropy
        >>> task = Task(model, (x, y), (x, y), (x, y), loss, lambda out, target: (out.argmax(1) == target).float())
        >>> FastSparseConv(timed=False).apply(model, task, 1.0)[2]
        SparseLinear(16, 16, bias=True, sparsity=0.969, block=4x1, backend='kernel')

    Raises:
        BadInput: a setting is out of range.
    """

    card = CARD
    expense = 0

    def __init__(self, *, block: int = 4, most: float = 0.97, timed: bool = True) -> None:
        super().__init__(block=block, most=most, timed=timed)
