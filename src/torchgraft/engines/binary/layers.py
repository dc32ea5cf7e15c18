"""Linear layers and 2-d convolutions whose weights, and activations if wanted, are signs while they train.

A layer trains float latents z and computes with scale * sign(z); where inputs are signs too, products are exact
integers. In eval mode a layer that packs gives its state dict the bits of its signs, eight to a byte; in training mode
it gives the latents, so that a checkpoint resumes exactly. Either kind of state loads. It is stored in bits and
executed in floating point; :mod:`packed` executes bits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft.engines.binary.bits import Estimator, Straight, pack_signs, unpack_signs
from torchgraft.engines.sites import ignored
from torchgraft.engines.surgery.swap import replace_module
from torchgraft.errors import BadInput, nearest

__all__ = [
    "BinaryConv2d",
    "BinaryLayer",
    "BinaryLinear",
    "Scale",
    "binary_layers",
    "hidden_layers",
    "rebuild",
    "to_binary",
]

#: What signs are multiplied with: a learned number a row, mean |z| of the whole tensor (no gradient), or 1.
Scale: TypeAlias = Literal["learned", "mean", "one"]
Activation: TypeAlias = "Callable[[Tensor], Tensor]"


class BinaryLayer(nn.Module):
    """What binary layers share; see :class:`BinaryLinear` and :class:`BinaryConv2d`."""

    weight: nn.Parameter
    bias: nn.Parameter | None
    scale: nn.Parameter | None

    def __init__(
        self,
        shape: tuple[int, ...],
        *,
        bias: bool,
        estimator: Estimator | None,
        activation: Activation | None,
        scale: Scale,
        packs: bool,
    ) -> None:
        super().__init__()
        if min(shape) < 1:
            raise BadInput(f"a binary layer needs sizes of at least 1, got a weight of shape {shape}")
        if scale not in ("learned", "mean", "one"):
            raise BadInput(f"scale must be 'learned', 'mean' or 'one', got {scale!r}")
        if packs and scale == "mean":
            raise BadInput("packed bits have no mean; a layer that packs needs scale 'learned' or 'one', got 'mean'")
        self.estimator = Straight() if estimator is None else estimator
        self.activation = activation
        self.packs = packs
        self.scale_kind = scale
        fan_in = 1
        for size in shape[1:]:
            fan_in *= size
        dense = torch.empty(shape).uniform_(-1, 1) * fan_in**-0.5
        self.weight = nn.Parameter(self.estimator.start(dense))
        self.scale = nn.Parameter(dense.abs().flatten(1).mean(1)) if scale == "learned" else None
        self.bias = nn.Parameter(torch.zeros(shape[0])) if bias else None
        self._kept: tuple[Any, ...] | None = None

    def signs(self) -> Tensor:
        """Return the binary weight, +1 and -1, without its scale; gradients reach the latents."""
        return self.estimator(self.weight)

    def row_scale(self) -> Tensor:
        """Return what each row of signs is multiplied with, (rows,)."""
        if self.scale is not None:
            return self.scale
        if self.scale_kind == "mean":
            return self.weight.detach().abs().mean().expand(len(self.weight))
        return self.weight.new_ones(len(self.weight))

    def effective(self) -> Tensor:
        """Return scale * signs, the weight that the layer stands for."""
        return self.signs() * self.row_scale().reshape(-1, *[1] * (self.weight.ndim - 1))

    def operand(self) -> Tensor:
        """Return what inputs are multiplied with; made once where nothing trains.

        These are the signs alone where inputs are signs too, so that products are exact integers, on which
        :meth:`finish` puts scale and bias; else scale * signs.
        """
        make = self.effective if self.activation is None else self.signs
        if self.training or torch.is_grad_enabled() or torch.compiler.is_compiling() or self.weight.is_inference():
            return make()
        scale = self.weight if self.scale is None else self.scale
        key = (self.weight, self.weight._version, scale, scale._version)
        if self._kept is None or any(a is not b and a != b for a, b in zip(self._kept[1], key, strict=True)):
            self._kept = (make(), key)
        kept: Tensor = self._kept[0]
        return kept

    def finish(self, products: Tensor, axis: int) -> Tensor:
        """Return scale * products + bias, the rows of the weight lying along ``axis``."""
        shape = [-1] + [1] * (products.ndim - 1 - axis % products.ndim)
        out = products * self.row_scale().reshape(shape)
        return out if self.bias is None else out + self.bias.reshape(shape)

    def train(self, mode: bool = True) -> BinaryLayer:
        """Set the mode; what was made in the other one is forgotten."""
        self._kept = None
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> BinaryLayer:
        self._kept = None
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.packs and not self.training:
            destination[f"{prefix}weight"] = pack_signs(self.estimator.binary(self.weight.detach()).flatten(1))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        name = f"{prefix}weight"
        given = state_dict.get(name)
        self._kept = None
        if given is not None and given.dtype == torch.uint8:
            columns = self.weight[0].numel()
            try:
                signs = unpack_signs(given, columns, dtype=self.weight.dtype)
            except BadInput as error:
                rest[-1].append(f"{name}: {error}")
                return
            if len(signs) != len(self.weight):
                rest[-1].append(f"{name}: {len(self.weight)} rows of signs are needed, got {len(signs)}")
                return
            state_dict[name] = self.estimator.latent(signs).reshape(self.weight.shape)
        super()._load_from_state_dict(state_dict, prefix, *rest)
        if given is not None:
            state_dict[name] = given

    def extra_repr(self) -> str:
        """Return what the module's line in a printed model says."""
        bits = "signs" if self.activation is not None else "numbers"
        return f"{tuple(self.weight.shape)}, {self.estimator!r}, inputs={bits}, scale={self.scale_kind!r}"


def _floating(x: Tensor, ndim: int, axis: int, size: int, words: str) -> None:
    wrong = x.ndim < 2 if ndim == 0 else x.ndim != ndim
    if wrong or x.shape[axis] != size or not x.is_floating_point():
        raise BadInput(f"input must be floating-point {words}, got {x.dtype} {tuple(x.shape)}")


class BinaryLinear(BinaryLayer):
    """A linear layer with binary weights: y = scale * (a sign(z)^T) + bias, a being x or its signs.

    Args:
        in_features: width of the input.
        out_features: width of the output; by default that of the input.
        bias: whether a bias is added.
        estimator: the sign of the weights and its gradient; by default straight-through.
        activation: makes signs of the input; ``None`` leaves it as it is.
        scale: ``"learned"``, ``"mean"`` or ``"one"``.
        packs: whether the state dict in eval mode holds bits.

    Shapes:
        (..., in_features) -> (..., out_features)

    Example:
        >>> layer = BinaryLinear(4, out_features=2, scale="one", bias=False)
        >>> sorted(set(layer.signs().flatten().tolist()) | {-1.0, 1.0})
        [-1.0, 1.0]

    Raises:
        BadInput: a size or the scale is wrong.
    """

    def __init__(
        self,
        in_features: int,
        *,
        out_features: int | None = None,
        bias: bool = True,
        estimator: Estimator | None = None,
        activation: Activation | None = None,
        scale: Scale = "learned",
        packs: bool = False,
    ) -> None:
        shape = (in_features if out_features is None else out_features, in_features)
        super().__init__(shape, bias=bias, estimator=estimator, activation=activation, scale=scale, packs=packs)

    def forward(self, x: Tensor) -> Tensor:
        """Return the output; see the class."""
        _floating(x, 0, -1, self.weight.shape[1], f"(..., {self.weight.shape[1]})")
        if self.activation is None:
            return F.linear(x, self.operand(), self.bias)
        return self.finish(F.linear(self.activation(x), self.operand()), -1)


class BinaryConv2d(BinaryLayer):
    """A 2-d convolution with binary weights.

    Where inputs become signs, the border is padded with +1, since a zero is no sign; else with zeros.

    Args:
        channels: channels of the input.
        out_channels: channels of the output; by default those of the input.
        kernel_size, stride, padding, dilation, groups: as in ``nn.Conv2d``.
        bias, estimator, activation, scale, packs: as in :class:`BinaryLinear`.

    Shapes:
        (B, channels, h, w) -> (B, out_channels, h', w')

    Example:
        >>> BinaryConv2d(3, out_channels=5)(torch.zeros(2, 3, 4, 4)).shape
        torch.Size([2, 5, 4, 4])

    Raises:
        BadInput: a size or the scale is wrong.
    """

    def __init__(
        self,
        channels: int,
        *,
        out_channels: int | None = None,
        kernel_size: int | tuple[int, int] = 3,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 1,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        estimator: Estimator | None = None,
        activation: Activation | None = None,
        scale: Scale = "learned",
        packs: bool = False,
    ) -> None:
        outputs = channels if out_channels is None else out_channels
        if groups < 1 or channels < 1 or channels % groups or outputs % groups:
            raise BadInput(f"groups must divide {channels} and {outputs} channels, both above 0, got {groups}")
        size = _pair(kernel_size)
        shape = (outputs, channels // groups, *size)
        super().__init__(shape, bias=bias, estimator=estimator, activation=activation, scale=scale, packs=packs)
        self.channels = channels
        self.stride, self.padding, self.dilation = _pair(stride), _pair(padding), _pair(dilation)
        self.groups = groups

    def padded(self, x: Tensor) -> Tensor:
        """Return the signs of ``x`` with a border of +1."""
        rows, columns = self.padding
        signs = x if self.activation is None else self.activation(x)
        return F.pad(signs, (columns, columns, rows, rows), value=1.0) if rows or columns else signs

    def forward(self, x: Tensor) -> Tensor:
        """Return the output; see the class."""
        _floating(x, 4, 1, self.channels, f"(B, {self.channels}, h, w)")
        if self.activation is None:
            bias, padding = self.bias, self.padding
            return F.conv2d(x, self.operand(), bias, self.stride, padding, self.dilation, self.groups)
        products = F.conv2d(self.padded(x), self.operand(), None, self.stride, 0, self.dilation, self.groups)
        return self.finish(products, 1)


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))


def binary_layers(model: nn.Module) -> dict[str, BinaryLayer]:
    """Return the binary layers of ``model`` by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, BinaryLayer)}


def _is_plain(module: nn.Module) -> bool:
    if type(module) is nn.Conv2d:
        return module.padding_mode == "zeros" and not isinstance(module.padding, str)
    return type(module) is nn.Linear


def hidden_layers(model: nn.Module, *, ignore: Sequence[str] = ()) -> dict[str, nn.Module]:
    """Return the plain linear layers and 2-d convolutions that may become binary, by name.

    The first and the last of all stay as they are, for what enters and what is answered need more than signs; so do
    layers whose weights are shared, and what ``ignore`` names.

    Args:
        model: any module.
        ignore: globs of module names.

    Example:
        >>> list(hidden_layers(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))))
        ['1']
    """
    owners = Counter(
        id(value) for module in model.modules() for value in module._parameters.values() if value is not None
    )
    plain = [(name, module) for name, module in model.named_modules() if name and _is_plain(module)]
    return {
        name: module
        for name, module in plain[1:-1]
        if not ignored(name, ignore) and all(owners[id(value)] == 1 for value in module.parameters())
    }


def to_binary(
    old: nn.Module,
    *,
    estimator: Estimator | None = None,
    activation: Activation | None = None,
    scale: Scale = "learned",
    packs: bool = False,
) -> BinaryLayer:
    """Return a plain linear layer or 2-d convolution as a binary one of the same signs, scales and mode.

    The learned scales start at mean |w| of each row, which is nearest to the weights in the squared sense.

    Args:
        old: the layer; left as it was.
        estimator, activation, scale, packs: as in :class:`BinaryLinear`.

    Raises:
        BadInput: the layer is of another kind.
    """
    if not _is_plain(old) or not isinstance(old, nn.Linear | nn.Conv2d):
        raise BadInput(f"only plain Linear and Conv2d layers become binary, got {type(old).__name__}")
    new: BinaryLayer
    with torch.random.fork_rng(devices=[]):
        if isinstance(old, nn.Linear):
            new = BinaryLinear(
                old.in_features,
                out_features=old.out_features,
                bias=old.bias is not None,
                estimator=estimator,
                activation=activation,
                scale=scale,
                packs=packs,
            )
        else:
            new = BinaryConv2d(
                old.in_channels,
                out_channels=old.out_channels,
                kernel_size=_pair(old.kernel_size),  # type: ignore[arg-type]  # torch types it as of any length
                stride=_pair(old.stride),  # type: ignore[arg-type]  # as above
                padding=_pair(old.padding),  # type: ignore[arg-type]  # as above
                dilation=_pair(old.dilation),  # type: ignore[arg-type]  # as above
                groups=old.groups,
                bias=old.bias is not None,
                estimator=estimator,
                activation=activation,
                scale=scale,
                packs=packs,
            )
    new.to(device=old.weight.device, dtype=old.weight.dtype)
    dense = old.weight.detach()
    with torch.no_grad():
        new.weight.copy_(new.estimator.start(dense))
        if new.scale is not None:
            new.scale.copy_(dense.abs().flatten(1).mean(1))
        if new.bias is not None and old.bias is not None:
            new.bias.copy_(old.bias)
    new.weight.requires_grad_(old.weight.requires_grad)
    if new.scale is not None:
        new.scale.requires_grad_(old.weight.requires_grad)
    if new.bias is not None and old.bias is not None:
        new.bias.requires_grad_(old.bias.requires_grad)
    return new.train(old.training)


def rebuild(model: nn.Module, names: Sequence[str], build: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """Replace the modules ``names`` of ``model`` in place by what ``build`` makes of them, and return the model.

    Raises:
        BadInput: there is no such module.
    """
    named = dict(model.named_modules(remove_duplicate=False))
    for name in names:
        if name not in named or not name:
            raise BadInput(f"the model has no module {name!r}{nearest(name, [each for each in named if each])}")
        replace_module(model, name, build(named[name]))
    for module in model.modules():
        # torch's fused encoder layer reads the weights of its linear layers and would compute with the latents.
        if isinstance(module, nn.TransformerEncoderLayer) and any(
            isinstance(child, BinaryLayer) for child in module.children()
        ):
            module.activation_relu_or_gelu = 0
    return model
