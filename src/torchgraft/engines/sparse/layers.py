"""Linear layers and 1x1 convolutions whose parameter is the vector of kept weights, and the edit that makes them.

Where gradients are asked for, the values are filled into a dense weight and torch's dense operators do the rest; where
not, the fastest backend for the number of columns at hand runs (:mod:`torchgraft.engines.sparse.choose`). A file holds
the values, the pattern (one byte a kept block) and the bias.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft.engines.sparse.choose import fastest
from torchgraft.engines.sparse.pattern import Pattern, best_blocks, decode, encode
from torchgraft.engines.sparse.product import BACKENDS, backends_for, dense, sparse_product
from torchgraft.engines.surgery.edits import Edit
from torchgraft.engines.surgery.swap import replace_module
from torchgraft.errors import BadInput, nearest

__all__ = ["SparseLinear", "SparsePointwiseConv", "Sparsify", "is_pointwise", "matrix", "to_sparse_layer"]

Pointwise: TypeAlias = "nn.Linear | nn.Conv1d | nn.Conv2d"


def is_pointwise(module: nn.Module) -> bool:
    """Say whether ``module`` is a plain linear layer, or a 1x1 convolution without groups and padding.

    Example:
        >>> is_pointwise(nn.Conv2d(3, 4, 1)), is_pointwise(nn.Conv2d(3, 4, 3))
        (True, False)
    """
    if type(module) is nn.Linear:
        return True
    if type(module) is not nn.Conv1d and type(module) is not nn.Conv2d:
        return False
    ones, zeros = (1,) * len(module.kernel_size), (0,) * len(module.kernel_size)
    return module.kernel_size == ones and module.padding in (zeros, "valid", "same") and module.groups == 1


def matrix(layer: Pointwise) -> Tensor:
    """Return the weight of a linear layer or 1x1 convolution as a matrix (M, K)."""
    return layer.weight.detach().flatten(1)


class _Sparse(nn.Module):
    """What both layers share: values, pattern, bias, and how they are kept."""

    values: nn.Parameter
    bias: nn.Parameter | None
    gaps: Tensor
    columns: Tensor
    pointers: Tensor

    def __init__(
        self, weight: Tensor, bias: Tensor | None, blocks: Tensor, *, block: tuple[int, int], backend: str
    ) -> None:
        super().__init__()
        if backend not in ("auto", *BACKENDS):
            raise BadInput(f"unknown sparse backend {backend!r}{nearest(backend, ['auto', *BACKENDS])}")
        if weight.ndim != 2:
            raise BadInput(f"weight must be a matrix, got shape {tuple(weight.shape)}")
        self.pattern = Pattern(weight.shape[0], weight.shape[1], block)
        blocks = blocks.to(weight.device)
        if blocks.ndim != 1 or not self.pattern.sound(blocks):
            raise BadInput(
                f"blocks must be rising numbers within [0, {self.pattern.blocks}), got {blocks[:4].tolist()}"
            )
        self.backend = backend
        self.kept = len(blocks)
        #: Columns of a call, layout and threads -> the backend that was chosen for them.
        self._chosen: dict[tuple[int, bool, int], str] = {}
        self.register_buffer("gaps", encode(blocks, self.pattern.blocks))
        self.register_buffer("columns", None, persistent=False)
        self.register_buffer("pointers", None, persistent=False)
        self._walk(blocks)
        places = self.pattern.places(self.columns, self.pointers)
        self.values = nn.Parameter(weight.detach().flatten()[places])
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())

    def _walk(self, blocks: Tensor) -> None:
        self.columns, self.pointers = self.pattern.streams(blocks)

    @property
    def sparsity(self) -> float:
        """The share of weights that are not kept."""
        return 1.0 - self.kept / self.pattern.blocks

    def matrix(self) -> Tensor:
        """Return the dense weight (M, K); gradients reach the values."""
        return dense(self.values, self.columns, self.pointers, self.pattern)

    def _plainly(self, x: Tensor) -> bool:
        """Say whether the dense form must run: for gradients, under autocast, and while the model is traced."""
        wants = x.requires_grad or self.values.requires_grad or (self.bias is not None and self.bias.requires_grad)
        return (
            (wants and torch.is_grad_enabled())
            or torch.compiler.is_compiling()
            or torch.is_autocast_enabled(x.device.type)
        )

    def _product(self, x: Tensor, *, tokens: bool) -> Tensor:
        count = x.shape[0] if tokens else x.shape[0] * x.shape[2]
        key = (count, tokens, torch.get_num_threads())
        backend = self._chosen.get(key) if x.is_cpu else "dense"
        if backend is None:
            if self.backend == "auto":
                backend = fastest(self.pattern, self.kept, count, tokens=tokens)
            else:
                backend = self.backend if self.backend in backends_for(self.pattern.block) else "dense"
            self._chosen[key] = backend
        return sparse_product(
            x, self.values, self.bias, self.columns, self.pointers, self.pattern, tokens=tokens, backend=backend
        )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        given = state_dict.get(f"{prefix}gaps")
        fits = isinstance(given, Tensor) and given.dtype == torch.uint8 and given.shape == self.gaps.shape
        blocks = decode(given) if fits and given is not None else None
        if given is not None and (blocks is None or len(blocks) != self.kept or not self.pattern.sound(blocks)):
            rest[-1].append(f"{prefix}gaps is no pattern of {self.kept} of {self.pattern.blocks} blocks")
            return
        super()._load_from_state_dict(state_dict, prefix, *rest)
        if blocks is not None:
            self._walk(blocks.to(self.gaps.device))

    def extra_repr(self) -> str:
        """Return what the module's line in a printed model says."""
        r, c = self.pattern.block
        return (
            f"{self.pattern.columns}, {self.pattern.rows}, bias={self.bias is not None}, "
            f"sparsity={self.sparsity:.3f}, block={r}x{c}, backend={self.backend!r}"
        )


class SparseLinear(_Sparse):
    """A linear layer that holds and executes only the kept blocks of its weight.

    Args:
        weight: the dense weight that the values are taken from.
        bias: or ``None``.
        blocks: the numbers of the kept blocks, rising (:func:`torchgraft.engines.sparse.best_blocks`).
        block: rows and columns of a block; the rows are 1, 2 or 4.
        backend: a name in :data:`torchgraft.engines.sparse.BACKENDS`, or ``"auto"`` for the fastest here.

    Shapes:
        weight: (M, K); input: (..., K); output: (..., M).

    Example:
        >>> layer = SparseLinear(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), None, torch.tensor([1, 2]), backend="dense")
        >>> layer(torch.ones(1, 2)).tolist(), layer.values.tolist()
        ([[2.0, 3.0]], [2.0, 3.0])

    Raises:
        BadInput: the backend is unknown, or blocks do not fit the weight.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        blocks: Tensor,
        *,
        block: tuple[int, int] = (1, 1),
        backend: str = "auto",
    ) -> None:
        super().__init__(weight, bias, blocks, block=block, backend=backend)
        self.out_features, self.in_features = weight.shape

    @property
    def weight(self) -> Tensor:
        """The dense weight (M, K), made anew; code that reads the weight of a linear layer finds it here."""
        return self.matrix()

    def forward(self, x: Tensor) -> Tensor:
        """Return x W^T + b."""
        if x.shape[-1:] != (self.in_features,):
            raise BadInput(f"input must be (..., {self.in_features}), got {tuple(x.shape)}")
        if self._plainly(x):
            return F.linear(x, self.matrix(), self.bias)
        out = self._product(x.reshape(-1, self.in_features), tokens=True)
        return out.view(*x.shape[:-1], self.out_features)


class SparsePointwiseConv(_Sparse):
    """A 1x1 convolution that holds and executes only the kept blocks of its weight.

    Args:
        weight: the dense weight as a matrix, that the values are taken from.
        bias: or ``None``.
        blocks: the numbers of the kept blocks, rising.
        block: rows (output channels) and columns of a block; the rows are 1, 2 or 4.
        backend: a name in :data:`torchgraft.engines.sparse.BACKENDS`, or ``"auto"`` for the fastest here.
        stride: in each dimension of space; its length is their number, 1 or 2.

    Shapes:
        weight: (M, K); input: (B, K, *space); output: (B, M, *space / stride). In memory, channels may come last.

    Example:
        >>> layer = SparsePointwiseConv(torch.tensor([[1.0, 2.0]]), None, torch.tensor([1]), backend="dense")
        >>> layer(torch.ones(1, 2, 3, 3)).shape
        torch.Size([1, 1, 3, 3])

    Raises:
        BadInput: the backend is unknown, or blocks do not fit the weight.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        blocks: Tensor,
        *,
        block: tuple[int, int] = (1, 1),
        backend: str = "auto",
        stride: tuple[int, ...] = (1, 1),
    ) -> None:
        super().__init__(weight, bias, blocks, block=block, backend=backend)
        if len(stride) not in (1, 2) or any(step < 1 for step in stride):
            raise BadInput(f"stride must be one or two positive numbers, got {stride}")
        self.out_channels, self.in_channels = weight.shape
        self.stride = tuple(stride)

    @property
    def weight(self) -> Tensor:
        """The dense weight (M, K, 1, ...), made anew."""
        return self.matrix().view(self.out_channels, self.in_channels, *(1 for _ in self.stride))

    def forward(self, x: Tensor) -> Tensor:
        """Return the convolution of ``x``."""
        space = len(self.stride)
        if x.ndim == space + 1 and x.shape[0] == self.in_channels:
            return self.forward(x[None])[0]
        if x.ndim != space + 2 or x.shape[1] != self.in_channels:
            raise BadInput(f"input must be (B, {self.in_channels}{', *' * space}), got {tuple(x.shape)}")
        if self._plainly(x):
            convolve = F.conv2d if space == 2 else F.conv1d
            return convolve(x, self.weight, self.bias, self.stride)
        for dim, step in enumerate(self.stride, start=2):
            if step > 1:
                x = x[(slice(None),) * dim + (slice(None, None, step),)]
        last = x.movedim(1, -1)
        if last.is_contiguous() and not x.is_contiguous():
            out = self._product(last.reshape(-1, self.in_channels), tokens=True)
            return out.view(*last.shape[:-1], self.out_channels).movedim(-1, 1)
        out = self._product(x.flatten(2), tokens=False)
        return out.view(x.shape[0], self.out_channels, *x.shape[2:])


def to_sparse_layer(
    layer: nn.Module, blocks: Tensor, *, block: tuple[int, int] = (1, 1), backend: str = "auto"
) -> SparseLinear | SparsePointwiseConv:
    """Return ``layer`` with only the kept blocks of its weight.

    Args:
        layer: a plain ``nn.Linear``, or a 1x1 ``nn.Conv1d`` or ``nn.Conv2d``.
        blocks: the numbers of the kept blocks, rising.
        block: rows and columns of a block.
        backend: a name in :data:`torchgraft.engines.sparse.BACKENDS`, or ``"auto"``.

    Example:
        >>> to_sparse_layer(nn.Linear(4, 2), torch.tensor([0, 5]))
        SparseLinear(4, 2, bias=True, sparsity=0.750, block=1x1, backend='auto')

    Raises:
        BadInput: it is another kind of layer.
    """
    if not is_pointwise(layer):
        raise BadInput(f"only plain linear layers and 1x1 convolutions become sparse, got {type(layer).__name__}")
    made: SparseLinear | SparsePointwiseConv
    if isinstance(layer, nn.Conv1d | nn.Conv2d):
        made = SparsePointwiseConv(
            matrix(layer), layer.bias, blocks, block=block, backend=backend, stride=tuple(layer.stride)
        )
    elif isinstance(layer, nn.Linear):
        made = SparseLinear(matrix(layer), layer.bias, blocks, block=block, backend=backend)
    else:
        raise BadInput(f"only plain linear layers and 1x1 convolutions become sparse, got {type(layer).__name__}")
    made.values.requires_grad_(layer.weight.requires_grad)
    if made.bias is not None and layer.bias is not None:
        made.bias.requires_grad_(layer.bias.requires_grad)
    return made.train(layer.training)


class Sparsify(Edit):
    """Linear layers and 1x1 convolutions that keep the blocks of largest magnitude.

    Args:
        modules: dotted module name -> how many blocks are kept, and the rows and columns of a block.
        backend: how the layers are executed; ``"auto"`` leaves the choice to the machine that runs them.
    """

    op = "sparsify"
    modules: dict[str, tuple[int, int, int]]
    backend: str = "auto"

    def rewrite(self, model: nn.Module) -> nn.Module:
        """Replace the layers."""
        named = dict(model.named_modules(remove_duplicate=False))
        for name, (kept, *block) in self.modules.items():
            old, size = named.get(name), (block[0], block[1])
            if old is None or not is_pointwise(old):
                raise BadInput(f"sparsify finds no layer that it can take at {name!r}{nearest(name, list(named))}")
            blocks = best_blocks(old.get_parameter("weight").detach().flatten(1), kept, size)
            new = to_sparse_layer(old, blocks, block=size, backend=self.backend)
            if name == "":
                return new
            replace_module(model, name, new)
        for module in model.modules():
            # torch's fused encoder layer reads the weights of its linear layers and would bypass the product.
            if isinstance(module, nn.TransformerEncoderLayer) and any(
                isinstance(child, SparseLinear) for child in module.children()
            ):
                module.activation_relu_or_gelu = 0
        return model

    def describe(self) -> dict[str, str]:
        """Say how many blocks each layer keeps."""
        return {
            name: f"held and executed sparse, {kept:,} {'weights' if r * c == 1 else f'blocks of {r}x{c}'} kept"
            for name, (kept, r, c) in self.modules.items()
        }
