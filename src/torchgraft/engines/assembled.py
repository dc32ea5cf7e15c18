"""A weight that is put together from other tensors when it is read, once, and kept until one of them changes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import is_

import torch
from torch import Tensor, nn

__all__ = ["Assembled"]


class Assembled:
    """The value that was last made of some buffers or parameters.

    A layer reads its weight at every call, so that asking must cost no more than a parameter's look-up: the parts
    must be the same objects at the same versions. Parts without versions (inference tensors), and those that tracing
    and functional calls put in their place, are put together each time and nothing is kept.

    Example:
        >>> twice, part = Assembled(), torch.ones(1)
        >>> twice.value([part], lambda: 2 * part), twice.value([part], lambda: 3 * part)
        (tensor([2.]), tensor([2.]))
        >>> twice.value([part.add_(1)], lambda: 3 * part)
        tensor([6.])
    """

    __slots__ = ("_parts", "_value", "_versions")

    def __init__(self) -> None:
        self._parts: tuple[Tensor, ...] = ()
        self._versions: list[int] = []
        self._value: Tensor | None = None

    def value(self, parts: Sequence[Tensor], make: Callable[[], Tensor]) -> Tensor:
        """Return what ``make`` makes of ``parts``, without a gradient."""
        kept = self._value
        if (
            kept is not None
            and len(parts) == len(self._parts)
            and all(map(is_, parts, self._parts))
            and [part._version for part in parts] == self._versions
        ):
            return kept
        with torch.inference_mode(False), torch.no_grad():  # what is made in inference mode could not be kept
            value = make()
        if type(value) is Tensor and not value.is_inference() and all(map(_has_version, parts)):
            self._parts, self._value = tuple(parts), value
            self._versions = [part._version for part in parts]
        return value

    def __deepcopy__(self, memo: dict[int, object]) -> Assembled:
        return Assembled()  # the copy's buffers are other tensors

    def __reduce__(self) -> tuple[type[Assembled], tuple[()]]:
        return Assembled, ()


def _has_version(part: Tensor) -> bool:
    return type(part) in (Tensor, nn.Parameter) and not part.is_inference()
