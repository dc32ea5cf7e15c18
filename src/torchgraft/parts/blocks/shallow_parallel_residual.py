"""A residual stack as one broad layer: every branch reads the same input, and their outputs are added.

`Make Deep Networks Shallow Again <https://arxiv.org/abs/2309.08414>`_ (Bermeitinger et al., 2023) expands a stack of
linear residual layers, z_h = prod_i (I + F_i) x, by the number of branches that are composed and keeps the first order.

Equation: ``prod_i (I + F_i) = I + sum_i F_i + sum_{i > j} F_i F_j + ... ~ I + sum_i F_i``

Departures: for branches that are not linear the expansion is the recursion z_j^(m) = z_{j-1}^(m) + F_j(z_{j-1}^(m-1)),
which is the paper's sum where they are linear, the parallel layer at m = 1 and the stack itself at m = h. The paper
trains both layouts from scratch; that a trained stack can be turned is only as true as its branches are small.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from torchgraft.bench.task import Inputs
from torchgraft.catalogue import Card
from torchgraft.catalogue.card import Claim
from torchgraft.engines.residual import branch, expansion, flatten
from torchgraft.errors import BadInput, nearest

__all__ = ["CARD", "ParallelResidual", "WideBranches", "flatten_residual_stack", "residual_expansion"]

CARD = Card(
    key="shallow-parallel-residual",
    title="Shallow parallel residual layer",
    seed_id=244,
    authors="Bermeitinger, Hrycej and Handschuh, 2023",
    reference="https://arxiv.org/abs/2309.08414",
    family="parts/blocks",
    kind="part",
    engine=("surgery",),
    equation="y = x + s sum_i F_i(x), F_i(x) = relu(W_i x + b_i)",
    entry="ParallelResidual",
    capabilities=frozenset({"permutation-equivariant", "compilable"}),
    declared={"parameters": "branches * d_model * (d_model + 1)"},
    example={"branches": 3, "d_model": 16},
    shapes=((2, 12, 16),),
    oracles=(
        "for linear branches the expansion of order h equals the sequential stack to 1e-12, and order 1 does where "
        "F_i F_j = 0",
        "for tanh branches of size eps the parallel layer is off by O(eps^2): the slope of the log error is 2 +- 0.05",
        "flattening and unflattening a stack keeps its state dict bit for bit, and the number of parameters",
        "one wide convolution or linear layer gives what the branches give one by one, to 1e-12",
    ),
    claim=Claim(
        text="digits 8x8, 16 filters, h in {2, 4, 8} residual 3x3 convolutions with ReLU and a linear head, Adam for "
        "40 epochs: the parallel layout, as one wide convolution, beside the sequential one of equal parameters; at "
        "h = 4 also both without skips.",
        figure="mean |validation loss difference| < 0.05 and accuracy gap <= 1.5 points at every h, and the parallel "
        "layout faster per training step at every h",
    ),
    choose_when="A stack of small layers of one width is trained from scratch and its depth costs more than its work.",
    choose_instead="the sequential stack where features must build on features; parallel-residual to turn a trained "
    "transformer",
    confidence="medium",
    bibtex="@article{bermeitinger2023shallow, title={Make Deep Networks Shallow Again}, author={Bermeitinger, Bernhard "
    "and Hrycej, Tomas and Handschuh, Siegfried}, journal={arXiv preprint arXiv:2309.08414}, year={2023}}",
)

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": torch.relu, "tanh": torch.tanh, "none": lambda x: x}


class WideBranches(nn.Module):
    """The sum of h branches act(W_i x + b_i) as one wide layer: one product, then a sum of groups.

    Args:
        wide: the layer whose outputs are those of the branches, one branch after the other.
        branches: h, which divides its outputs.
        activation: ``"relu"``, ``"tanh"`` or ``"none"``.

    Shapes:
        (..., D) -> (..., D') for a linear layer, (B, C, ...) -> (B, C', ...) for a convolution

    Example:
        >>> layers = [nn.Conv2d(4, 4, 3, padding=1) for _ in range(3)]
        >>> WideBranches.of(layers)(torch.zeros(1, 4, 8, 8)).shape
        torch.Size([1, 4, 8, 8])

    Raises:
        BadInput: the outputs cannot be shared out, or there is no such activation.
    """

    def __init__(self, wide: nn.Module, *, branches: int, activation: str = "relu") -> None:
        super().__init__()
        outputs = len(wide.get_parameter("weight"))
        if branches < 1 or outputs % branches:
            raise BadInput(f"branches must be at least 1 and divide the {outputs} outputs, got {branches}")
        if activation not in ACTIVATIONS:
            known = list(ACTIVATIONS)
            raise BadInput(f"activation must be one of {known}, got {activation!r}{nearest(activation, known)}")
        self.wide, self.branches, self.activation = wide, branches, activation

    @classmethod
    def of(cls, layers: Sequence[nn.Module], *, activation: str = "relu") -> WideBranches:
        """Return the branches ``layers`` as one.

        Args:
            layers: ``nn.Linear`` or ``nn.Conv1d`` to ``nn.Conv3d`` layers that differ in nothing but their values.
            activation: as for the class.

        Raises:
            BadInput: there are none, or they differ.
        """
        if not layers:
            raise BadInput("branches must hold at least one layer")
        first = layers[0]
        kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
        settings = {repr(layer) for layer in layers}
        if not isinstance(first, kinds) or len(settings) > 1 or getattr(first, "groups", 1) != 1:
            raise BadInput(f"branches must be equal linear layers or ungrouped convolutions, got {sorted(settings)}")
        bias = first.bias is not None
        if isinstance(first, nn.Linear):
            wide: nn.Module = nn.Linear(first.in_features, len(layers) * first.out_features, bias=bias)
        else:
            options = {name: getattr(first, name) for name in ("stride", "padding", "dilation", "padding_mode")}
            kind: type[nn.Module] = type(first)
            sizes = (first.in_channels, len(layers) * first.out_channels, first.kernel_size)
            wide = kind(*sizes, bias=bias, **options)
        wide.to(first.weight.device, first.weight.dtype)
        joined = {name: torch.cat([layer.get_parameter(name) for layer in layers]) for name in first.state_dict()}
        wide.load_state_dict(joined)
        return cls(wide, branches=len(layers), activation=activation)

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum of the branches."""
        dim = -1 if isinstance(self.wide, nn.Linear) else 1
        y = ACTIVATIONS[self.activation](self.wide(x))
        size = y.shape[dim] // self.branches
        # (..., h D) -> (..., h, D), summed over h; the sizes are read here so that a cut layer still runs
        return torch.unflatten(y, dim, (self.branches, size)).sum(dim if dim == 1 else -2)


class ParallelResidual(nn.Module):
    """y = x + scale * sum_i F_i(x): branches side by side on one input.

    Args:
        branches: the branches F_i as modules, each of which keeps the shape; or how many branches
            act(W_i x + b_i) to make, which then are one wide linear layer.
        d_model: the width D of branches that are made here.
        activation: theirs; ``"relu"``, ``"tanh"`` or ``"none"``.
        scale: what the sum is multiplied with; the sum grows with h, and 1 / sqrt(h) keeps it in check.

    Shapes:
        (B, T, D) -> (B, T, D); whatever given branches take

    Example:
        >>> ParallelResidual(4, d_model=8)(torch.zeros(2, 3, 8)).shape
        torch.Size([2, 3, 8])
        >>> ParallelResidual([nn.Identity(), nn.Identity()])(torch.ones(1)).item()
        3.0

    Raises:
        BadInput: there are no branches, a size is below 1, or a branch changes the shape.
    """

    def __init__(
        self,
        branches: int | Sequence[nn.Module] = 4,
        *,
        d_model: int = 64,
        activation: str = "relu",
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        if d_model < 1:
            raise BadInput(f"d_model must be at least 1, got {d_model}")
        self.d_model, self.scale = d_model, scale
        self.branches: nn.ModuleList | None = None
        self.wide: WideBranches | None = None
        if not isinstance(branches, int):
            if not branches:
                raise BadInput("branches must hold at least one module, or be their number")
            self.branches = nn.ModuleList(branches)
        elif branches < 1:
            raise BadInput(f"branches must be at least 1, got {branches}")
        else:
            layer = nn.Linear(d_model, branches * d_model)
            self.wide = WideBranches(layer, branches=branches, activation=activation)

    def forward(self, x: Tensor) -> Tensor:
        """Add the branches to their input."""
        if self.wide is not None:
            if x.ndim != 3 or x.shape[-1] != self.d_model or not x.is_floating_point():
                raise BadInput(
                    f"x must be floating point of shape (B, T, {self.d_model}), got {x.dtype} {tuple(x.shape)}"
                )
            broad: Tensor = x + self.scale * self.wide(x)
            return broad
        total = torch.zeros_like(x)
        for each in self.branches or ():
            y: Tensor = each(x)
            if y.shape != x.shape:
                raise BadInput(f"a branch must keep the shape {tuple(x.shape)}, got {tuple(y.shape)}")
            total = total + y
        return x + self.scale * total


def residual_expansion(stack: Sequence[Callable[[Tensor], Tensor]], x: Tensor, order: int) -> Tensor:
    """Return what ``stack`` makes of ``x`` when compositions of more than ``order`` branches are left out.

    Args:
        stack: residual blocks in order, x -> x + F_i(x).
        x: the input.
        order: 0 is x, 1 the parallel layer, the number of blocks the stack itself.

    Example:
        >>> stack = [lambda x: x + 2 * x, lambda x: x + 5 * x]
        >>> [residual_expansion(stack, torch.tensor(1.0), m).item() for m in (0, 1, 2)]
        [1.0, 8.0, 18.0]
    """
    return expansion([branch(block) for block in stack], x, order)


def flatten_residual_stack(
    model: nn.Module,
    span: tuple[int, int] | None = None,
    *,
    example: Inputs,
    name: str | None = None,
    order: int = 1,
    scale: float = 1.0,
) -> nn.Module:
    """Return a copy of ``model`` whose sequential residual stack is one broad layer, with the same parameters.

    Args:
        model: any model with a stack of blocks in an ``nn.ModuleList`` or ``nn.Sequential``.
        span: (first, length) within the stack; default all of it.
        example: inputs for the model, by which the stack is found.
        name: which container; default that of the longest stack.
        order: up to how many branches are composed; 1 is the parallel layer.
        scale: what the sum of the branches is multiplied with.

    Example:
        >>> from torchgraft.bench.models import VisionTransformer
        >>> model = VisionTransformer(d_model=8, depth=4, num_heads=2)
        >>> flat = flatten_residual_stack(model, (1, 3), example=torch.zeros(1, 1, 8, 8))
        >>> len(flat.blocks), len(flat.blocks[1].branches)
        (2, 3)
    """
    return flatten(model, span, example=example, name=name, scale=scale, order=order)
