"""Run a finished model's passes in bfloat16, where the processor multiplies that faster than float32.

`A Study of BFLOAT16 for Deep Learning Training <https://arxiv.org/abs/1905.12322>`_ (Kalamkar et al., 2019). bfloat16
keeps float32's 8 exponent bits, so that nothing needs a scale, and 8 of its 24 significant ones; sums stay float32:

    y = bf(sum_j bf(W)_ij bf(x)_j),   |bf(v) - v| <= 2^-8 |v|.

Departures:
- The paper trains so. Here training and gradients keep float32 master weights, and what a file holds stays; the forward
  pass alone, in eval mode without gradients, is bfloat16's, for inputs of any size.
- All of the pass is rounded, not the products alone: norms (whose gains and statistics stay float32) and softmax sum in
  float32 inside of torch's kernels, and what lies between two kernels is bfloat16. Products alone, by
  ``torch.autocast``, were slower than this everywhere.
- On inputs of the example's size the pass is one compiled program, as in :mod:`torchgraft.elastic.dycl_compile`.
- Buffers are rounded with the weights: large positions kept as floats lose their last digits, as under ``model.to``.
- A model whose outputs move by more than a tenth of the largest, or that does not run in bfloat16, runs in float32, and
  the log says so.
"""

from __future__ import annotations

from typing import ClassVar

from torchgraft.catalogue import Card
from torchgraft.engines.control_flow.passes import Passes

__all__ = ["CARD", "Bfloat16Passes"]

CARD = Card(
    key="bfloat16-passes",
    title="Forward passes in bfloat16",
    authors="Kalamkar et al., 2019",
    reference="https://arxiv.org/abs/1905.12322",
    family="shrink/quantize",
    kind="procedure",
    engine=("surgery",),
    equation="y = bf(sum_j bf(W)_ij bf(x)_j), |bf(v) - v| <= 2^-8 |v|",
    entry="Bfloat16Passes",
    stage="execution",
    oracles=(
        "a linear layer differs from float64 by at most (2 u + u^2) |W| |x| and the output's own rounding, u = 2^-8",
        "a weight stored in codes is put together in float32 and rounded once",
        "a program and the rounded model agree to 2^-5 of the largest output, and calls of other sizes are answered in"
        " bfloat16 too",
        "float32 answers, bit for bit, in training mode, with gradients, under hooks and modes, and where a model does"
        " not run in bfloat16",
    ),
    choose_when="the processor has bfloat16 units (AMX, AVX512-BF16, recent ARM): wide products and convolutions take a"
    " half to a third of the time, and scores move in the fourth digit",
    choose_instead="dycl-compile on other processors, where results must be float32's, or where layers are so narrow"
    " that rounding their inputs takes what the products save",
    conflicts={
        "int8-dynamic": "both say in which numbers products are made",
    },
    bibtex="""@article{kalamkar2019study,
  title={A Study of {BFLOAT16} for Deep Learning Training},
  author={Kalamkar, Dhiraj and Mudigere, Dheevatsa and Mellempudi, Naveen and Das, Dipankar and Banerjee, Kunal and
          Avancha, Sasikanth and others},
  journal={arXiv preprint arXiv:1905.12322},
  year={2019}
}""",
)


class Bfloat16Passes(Passes):
    """Run the model's passes in bfloat16, at any strength above 0; on inputs like the task's example as one program.

    Args:
        timed: whether to act only where this is faster on the task's example than a float32 program, measured once on
            the first model that is asked about; ``fit`` asks for it.
        latency: whether latency counts at all; where it does not, nothing is a site.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from torchgraft.bench.task import Task
        >>> x, y = torch.randn(8, 4), torch.randint(0, 2, (8,))
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 2)).eval()
        >>> task = Task(net, (x, y), (x, y), (x, y), nn.functional.cross_entropy, lambda out, t: out[:, 0])
        >>> model = Bfloat16Passes().apply(net, task, 1.0)
        >>> with torch.no_grad():
        ...     model(x).dtype, bool((model(x) - net(x)).abs().max() < 0.05), model[0].weight.dtype
        (torch.float32, True, torch.float32)
    """

    card: ClassVar[Card] = CARD
    arithmetic = "bfloat16"
