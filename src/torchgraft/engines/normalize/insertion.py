"""Where norms go in a model: beside the activations of its sequences, or after layers that are named."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

from torch import nn

from torchgraft.engines.surgery.swap import Where, find
from torchgraft.errors import BadInput

__all__ = ["ACTIVATIONS", "LAYERS", "insert_norms", "neighbours"]

#: Layers whose outputs are summed inputs.
LAYERS: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
#: Activations that act on every entry by itself.
ACTIVATIONS: tuple[type[nn.Module], ...] = tuple(
    kind
    for name, kind in vars(nn.modules.activation).items()
    if isinstance(kind, type)
    and issubclass(kind, nn.Module)
    and kind.__module__ == nn.modules.activation.__name__
    and not name.startswith(("Softmax", "LogSoftmax", "Softmin", "MultiheadAttention", "GLU"))
)


def neighbours(
    model: nn.Module, first: tuple[type[nn.Module], ...], second: tuple[type[nn.Module], ...]
) -> Iterator[tuple[nn.Sequential, str, str, str]]:
    """Yield (sequence, its name, key of the first, key of the second) of all neighbours of these kinds.

    Only in an ``nn.Sequential`` does the type of a model say who is fed by whom.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
        >>> [(one, other) for _, _, one, other in neighbours(model, LAYERS, ACTIVATIONS)]
        [('0', '1')]
    """
    for name, sequence in list(model.named_modules()):
        if isinstance(sequence, nn.Sequential):
            for (one, left), (other, right) in itertools.pairwise(list(sequence._modules.items())):
                if isinstance(left, first) and isinstance(right, second):
                    yield sequence, name, one, other


def insert_norms(
    model: nn.Module,
    build: Callable[[nn.Module, str], nn.Module],
    *,
    before_activation: bool = True,
    where: Where | None = None,
) -> tuple[str, ...]:
    """Put norms into ``model``, in place, and return their names.

    Without ``where``, every activation module that follows a linear layer or a convolution in an ``nn.Sequential``
    becomes (norm, activation), so that no other name changes. With ``where``, each layer that it selects becomes
    (layer, norm), whatever follows it.

    Args:
        model: any module.
        build: takes a layer and its name, and returns the norm for what it puts out.
        before_activation: whether the norm stands before the activation or after it.
        where: which layers, as in :func:`torchgraft.swap`; for models whose activations are functions.

    Raises:
        BadInput: there is no place for a norm.
    """
    added: list[str] = []
    if where is not None:
        if not before_activation:
            raise BadInput("before_activation=False needs activation modules; leave out where")
        for name, layer in find(model, where).items():
            holder, _, leaf = name.rpartition(".")
            model.get_submodule(holder)._modules[leaf] = nn.Sequential(layer, build(layer, name)).train(layer.training)
            added.append(f"{name}.1")
    else:
        for sequence, name, one, other in neighbours(model, LAYERS, ACTIVATIONS):
            act = sequence.get_submodule(other)
            norm = build(sequence.get_submodule(one), f"{name}.{one}".lstrip("."))
            pair = (norm, act) if before_activation else (act, norm)
            sequence._modules[other] = nn.Sequential(*pair).train(act.training)
            added.append(f"{name}.{other}.{pair.index(norm)}".lstrip("."))
    if not added:
        raise BadInput(f"{type(model).__name__} has no layer followed by an activation module; say where")
    return tuple(added)
