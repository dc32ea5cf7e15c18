"""Compile a network whose path depends on its data: straight-line networks, and a host that decides between them.

`DyCL: Dynamic Neural Network Compilation Via Program Rewriting and Graph Optimization
<https://arxiv.org/abs/2307.04963>`_ (Chen et al., 2023). A trace records one path. Here the source of ``forward`` is
rewritten into simple statements, these make a control-flow graph of blocks and predicates, and what each block must
take and give is the least solution of

    in(B) = use(B) | (out(B) - def(B)),   out(B) = union of in(S) over the successors S of B.

Departures:
- The abstract fixes the design; how it is done here is ours: statements are specialised to what is known (sizes,
  attributes, loop counters), so that loops over known lists unroll, sub-methods and dynamic sub-modules are inlined,
  and states that agree share a node. Numbers that change in more than ``limit`` copies of a loop become tensors.
- A predicate is an output of the block before it; a small one where paths meet is repeated at the end of each path.
- Sizes are those of the example. A decision is one number, so samples of a batch cannot part. ``x += y`` makes a new
  tensor, so that other names of the old one keep their value.
- As a lever of ``fit`` (:class:`CompiledPasses`) it serves straight networks too: a graph of one node, whose operators
  oneDNN joins. The model stays a module; Python runs wherever the program would be wrong.
- Refused with file and line: state in attributes, elements and in-place changes, picking a module by a tensor's value,
  shapes that depend on values, random numbers, ``with``, ``try``, lambdas.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from torchgraft.catalogue import Card, Claim
from torchgraft.engines.control_flow import BACKENDS, Backend, CompiledDynamic, load_host, optimise, specialise
from torchgraft.engines.control_flow.passes import Passes
from torchgraft.errors import BadInput

__all__ = ["CARD", "CompiledDynamic", "CompiledPasses", "compile_dynamic", "load_host"]

CARD = Card(
    key="dycl-compile",
    title="DyCL: compiling dynamic networks",
    seed_id=285,
    authors="Chen et al., 2023",
    reference="https://arxiv.org/abs/2307.04963",
    family="elastic",
    kind="procedure",
    engine=("surgery",),
    equation="in(B) = use(B) | (out(B) - def(B)), out(B) = union of in(S) over the successors S of B",
    entry="CompiledPasses",
    stage="execution",
    oracles=(
        "inputs that cover every edge of the graph: outputs equal the original's bit for bit (eager) or to 1e-5"
        " (ONNX Runtime, torch.export, torch.jit.trace), and the decisions are the same, in the same order",
        "every sub-network traces with torch.fx, takes what is live there and is read, and gives what is live after",
        "live variables equal brute force over all paths on random graphs; the least solution, not only a solution",
        "the optimised and the plain program agree on every path, and the optimised one has fewer nodes",
        "a saved program runs on numpy arrays from JSON and ONNX files alone; a wrong file is refused",
        "each unsupported construct is refused with its file and line",
        "as a lever of fit: outputs equal Python's to 1e-5 on inputs that the program was not made from, and Python"
        " runs wherever a program would be wrong: other sizes, gradients, hooks, modes, changed weights or modules",
    ),
    claim=Claim(
        text="early-exit CNN, layer-skip residual net and a recurrent net that reads until it is sure, on digits; 1,000"
        " inputs each, at batch 1, one thread: torch.jit.trace of one path, the program in ONNX Runtime, and eager",
        figure="the trace mispredicts >= 20 % of the inputs that take another path, the program differs in no"
        " prediction, decision or output (1e-4) on 1,000 inputs, and is >= 1.1x faster than eager on each net; 3 seeds",
    ),
    choose_when="a network exits early, skips layers or loops as its input demands; or any network answers small"
    " batches of one size on a CPU, where what surrounds its products takes as long as they do",
    choose_instead="torch.compile where a minute of compiling is no matter, or on a GPU; torch.cond where you can"
    " rewrite the model",
    confidence="medium",
    bibtex="""@inproceedings{chen2023dycl,
  title={{DyCL}: Dynamic Neural Network Compilation Via Program Rewriting and Graph Optimization},
  author={Chen, Simin and Wei, Shiyi and Liu, Cong and Yang, Wei},
  booktitle={ACM SIGSOFT International Symposium on Software Testing and Analysis},
  year={2023}
}""",
)


def compile_dynamic(
    model: nn.Module,
    example_inputs: Tensor | tuple[Tensor, ...],
    backend: Backend = "onnx",
    *,
    optimised: bool = True,
    limit: int = 64,
) -> CompiledDynamic:
    """Return ``model`` as a host program over straight-line networks.

    Args:
        model: a network in eval mode whose ``forward`` is Python source; its weights are shared, except by ``"onnx"``.
        example_inputs: its argument, or arguments; sizes are fixed by them, values do not matter.
        backend: ``"onnx"`` (ONNX Runtime), ``"export"`` (torch.export), ``"trace"`` (torch.jit.trace), ``"fused"`` (the
            trace with constant weights, its operators joined by oneDNN), or ``"eager"``.
        optimised: whether nodes are merged; without, there is one a statement.
        limit: how many copies of one statement loops may make before numbers become tensors.

    Example:
        >>> import torch
        >>> compiled = compile_dynamic(_Halving(), torch.tensor([8.0]), backend="eager")
        >>> found, done = compiled.run(torch.tensor([5.0]))
        >>> found, [holds for _, holds in done.decisions]
        (tensor([0.6250]), [True, True, True, False])
        >>> compiled.coverage()["subgraphs"]
        2

    Raises:
        BadInput: the model is in training mode, or the example is no tuple of tensors.
        Untraceable: something in the source is not supported; file and line are named.
    """
    example = (example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs)
    if not all(isinstance(each, Tensor) for each in example):
        raise BadInput("example_inputs must be a tensor or a tuple of tensors")
    if backend not in BACKENDS:
        raise BadInput(f"backend must be one of {', '.join(map(repr, BACKENDS))}, got {backend!r}")
    if model.training:
        raise BadInput("model must be in eval mode")
    if limit < 2:
        raise BadInput(f"limit must be at least 2, got {limit}")
    flow = specialise(model, example, limit=limit)
    return CompiledDynamic(model, example, optimise(flow) if optimised else flow, backend)


class _Halving(nn.Module):
    """The dynamic network of the example above."""

    def __init__(self) -> None:
        super().__init__()
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """Halve until all is below 1."""
        while x.max() >= 1.0:
            x = x / 2
        return x


class CompiledPasses(Passes):
    """Run the model's passes on inputs like the task's example as compiled programs, at any strength above 0.

    Args:
        timed: whether to act only where the program is faster on the task's example, measured once on the first model
            that is asked about; ``fit`` asks for it.
        latency: whether latency counts at all; where it does not, nothing is a site.

    Example:
        >>> import torch
        >>> from torchgraft.bench.task import Task
        >>> x, y = torch.randn(8, 4), torch.randint(0, 2, (8,))
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 2)).eval()
        >>> task = Task(net, (x, y), (x, y), (x, y), nn.functional.cross_entropy, lambda out, t: out[:, 0])
        >>> model = CompiledPasses().apply(net, task, 1.0)
        >>> with torch.no_grad():
        ...     bool((model(task.example) - net(task.example)).abs().max() < 1e-5), model.forward.compiled(task.example)
        (True, True)
    """

    card: ClassVar[Card] = CARD
    exact = True
