"""The edit that puts a linear attention in the place of softmax attention, with the projections of the old one."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import nn

from torchgraft.catalogue import registry
from torchgraft.engines.linearize.graft import Form, Graft, form_of
from torchgraft.engines.linearize.kernel import Kernel
from torchgraft.engines.linearize.mixer import KernelMixer
from torchgraft.engines.sites import ignored
from torchgraft.engines.surgery.edits import Edit
from torchgraft.engines.surgery.swap import replace_module
from torchgraft.errors import BadInput

__all__ = ["SHORT_NAMES", "Linearize", "attentions", "linear_attentions", "method_of"]

#: What a person may type -> the key of the method.
SHORT_NAMES = {"lit": "lit-linear-dit"}


def method_of(to: str) -> type[KernelMixer]:
    """Return the mixer whose kernel the method ``to`` brings.

    Raises:
        BadInput: there is no such method, or it replaces no softmax attention.
    """
    card = registry.lookup(SHORT_NAMES.get(to, to))
    found = registry.entry(card)
    if not (isinstance(found, type) and issubclass(found, KernelMixer)):
        raise BadInput(f"{to} takes no weights over from softmax attention; choose hedgehog, liger or lit")
    return found


def attentions(model: nn.Module, *, ignore: Sequence[str] = ()) -> dict[str, Form]:
    """Return the softmax attentions of ``model`` that are known, by dotted name, in the order of the model.

    Example:
        >>> list(attentions(nn.TransformerEncoderLayer(8, 2)))
        ['self_attn']
    """
    found: dict[str, Form] = {}
    for name, module in model.named_modules():
        if not name or ignored(name, ignore) or any(name.startswith(f"{outer}.") for outer in found):
            continue
        form = form_of(module)
        if form is not None:
            found[name] = form
    return found


def linear_attentions(model: nn.Module) -> dict[str, KernelMixer | Graft]:
    """Return the linear attentions of ``model`` that have a kernel, by dotted name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, KernelMixer | Graft)}


class Linearize(Edit):
    """Replace the softmax attentions ``names`` by linear ones of the method ``to``.

    Args:
        to: key of the method.
        names: dotted names of the attentions.
        options: what the method's kernel is built with.
        image: whether the tokens are patches of an image.
    """

    op: ClassVar[str] = "linearize"
    to: str
    names: tuple[str, ...]
    options: dict[str, bool | int | float | str | None] = Field(default={})
    image: bool = False

    def rewrite(self, model: nn.Module) -> nn.Module:
        """Replace them; projections are kept, what is new starts from the same weights every time."""
        method = method_of(self.to)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            for name in self.names:
                old = dict(model.named_modules(remove_duplicate=False)).get(name)
                form = None if old is None else form_of(old)
                if old is None or form is None:
                    raise BadInput(f"{name!r} is no softmax attention, which this edit was made for")
                replace_module(model, name, self._built(method, old, form, name))
        _forget_caches(model)
        self._rename(model, method)
        return model

    def _built(self, method: type[KernelMixer], old: nn.Module, form: Form, name: str) -> nn.Module:
        new: Any
        try:
            if form.graft is None:
                kept: Any = old
                new = method.instead_of_softmax(
                    form.d_model, num_heads=form.num_heads, rotary=kept.rotary, options=self.options
                )
                new.qkv, new.out = kept.qkv, kept.out
                new.train(old.training)
                kernel: Kernel = new.kernel
            else:
                kernel = method.build_kernel(
                    num_heads=form.num_heads,
                    key_size=form.key_size,
                    value_size=form.value_size,
                    options=self.options,
                    image=self.image and form.causal is False,
                )
                new = form.graft(old, kernel)
        except TypeError:
            known = [each for each in inspect.signature(method).parameters if each not in ("d_model", "num_heads")]
            raise BadInput(f"{self.to} has options {', '.join(known)}; got {sorted(self.options)}") from None
        if form.causal is not None and ("causal" if form.causal else "all") not in kernel.sees:
            raise BadInput(
                f"{self.to} mixes {' or '.join(sorted(kernel.sees))}, and {name!r} "
                f"{'is causal' if form.causal else 'sees all tokens'}; choose hedgehog, which does both"
            )
        kernel.settle()
        anchor = next(old.parameters())
        kernel.to(anchor.device, anchor.dtype)
        return new  # type: ignore[no-any-return]  # a mixer or a graft, both modules

    def _rename(self, model: nn.Module, method: type[KernelMixer]) -> None:
        """Tell a sequence model which mixer it now has, so that it can be saved."""
        for module in model.modules():
            if getattr(module, "mixer_key", None) is None or not hasattr(module, "mixers"):
                continue
            owner: Any = module
            mixers = owner.mixers()
            if any(isinstance(mixer, KernelMixer) for mixer in mixers):
                whole = all(type(mixer) is method for mixer in mixers)
                first = mixers[0]
                owner.mixer_key = SHORT_NAMES.get(self.to, self.to) if whole else None
                owner.mixer_options = {
                    **({"num_heads": first.num_heads, "rotary": first.rotary} if whole else {}),
                    **(self.options if whole else {}),
                }

    def describe(self) -> dict[str, str]:
        """Return what was done to which module."""
        return dict.fromkeys(self.names, f"linear attention ({self.to})")


def _forget_caches(model: nn.Module) -> None:
    """Keep models of transformers from asking for a cache of keys, which a linear attention has no use for."""
    for module in model.modules():
        for name in ("config", "generation_config"):
            settings = getattr(module, name, None)
            if settings is not None and hasattr(settings, "use_cache"):
                settings.use_cache = False
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder):
            # Nested tensors are only understood by the fused path, which reads the packed weights.
            module.enable_nested_tensor = False
            module.use_nested_tensor = False
