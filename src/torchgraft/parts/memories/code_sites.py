"""Where codebooks can stand in a transformer: behind its MLPs, and behind its attention heads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from torchgraft.errors import BadInput

__all__ = ["CodeSite", "code_sites", "width_at"]


@dataclass(frozen=True)
class CodeSite:
    """A place for a codebook.

    Args:
        name: dotted name of a module.
        what: whether its ``"output"`` passes through the codebook, or its ``"input"``.
        heads: number of codebooks beside each other.
        d_model: the width there; default that of the module's last linear layer, or of the linear layer it is.
    """

    name: str
    what: Literal["output", "input"] = "output"
    heads: int = 1
    d_model: int | None = None


_MLP_NAMES = ("mlp", "ffn", "feed_forward", "channels")
_OUT_NAMES = ("out", "out_proj", "o_proj", "c_proj", "dense")


def _linear_sizes(module: object) -> tuple[int, int] | None:
    """Return the sizes of a linear layer, torch's or Hugging Face's transposed one."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    weight = getattr(module, "weight", None)
    if type(module).__name__ == "Conv1D" and isinstance(weight, Tensor) and weight.ndim == 2:
        return int(weight.shape[0]), int(weight.shape[1])
    return None


def _mlp_site(name: str, module: nn.Module) -> CodeSite | None:
    if isinstance(module, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):
        return CodeSite(f"{name}.linear2".lstrip("."))
    children = dict(module.named_children())
    if {"intermediate", "output"} <= children.keys() and _linear_sizes(getattr(children["output"], "dense", None)):
        return CodeSite(f"{name}.output.dense".lstrip("."))  # BERT adds the residual behind it
    held = any(_linear_sizes(each) for each in module.modules())
    return CodeSite(name) if name.rpartition(".")[2] in _MLP_NAMES and held else None


def _attention_site(name: str, module: nn.Module, per_head: bool) -> CodeSite | None:
    if isinstance(module, nn.MultiheadAttention):
        if per_head:
            raise BadInput(f"the heads of {name!r} (nn.MultiheadAttention) are out of reach; give per_head=False")
        return CodeSite(name, d_model=module.embed_dim)
    inner = getattr(module, "self", None)  # BERT's heads
    holder = inner if isinstance(inner, nn.Module) else module
    counts = [getattr(holder, key, None) for key in ("num_heads", "num_attention_heads", "n_head")]
    if "attention" in type(module).__name__.lower():
        counts.append(getattr(getattr(module, "config", None), "num_attention_heads", None))
    count = next((value for value in counts if isinstance(value, int)), None)
    place, child = name, module
    if holder is not module and isinstance(getattr(module, "output", None), nn.Module):
        place, child = f"{name}.output", module.get_submodule("output")
    for out in _OUT_NAMES:
        if count is not None and _linear_sizes(getattr(child, out, None)):
            return CodeSite(f"{place}.{out}".lstrip("."), "input", count if per_head else 1)
    return None


def code_sites(model: nn.Module, at: Sequence[str] = ("mlp", "attention"), *, per_head: bool = True) -> list[CodeSite]:
    """Return where codebooks can stand: behind MLPs, and behind attention heads, before the output projection.

    Known are the models of torchgraft, torch's transformer layers, and Hugging Face models built like GPT-2, Llama or
    BERT.

    Args:
        model: a transformer.
        at: ``"mlp"``, ``"attention"`` or both.
        per_head: whether each head has a codebook; with False one holds all heads, and for torch's own attention, whose
            heads cannot be reached, the output of the layer.

    Example:
        >>> from torchgraft.bench.models import ByteTransformer
        >>> [site.name for site in code_sites(ByteTransformer(depth=1))]
        ['blocks.0.attn.out', 'blocks.0.mlp']

    Raises:
        BadInput: there is none, or heads are out of reach.
    """
    found: list[CodeSite] = []
    for name, module in model.named_modules():
        sites = (
            _attention_site(name, module, per_head) if "attention" in at else None,
            _mlp_site(name, module) if "mlp" in at else None,
        )
        found += [site for site in sites if site is not None]
    if not found:
        raise BadInput(f"{type(model).__name__} has no {' or '.join(at)} known here; name modules as sites")
    return found


def width_at(model: nn.Module, site: CodeSite) -> int:
    """Return the width of the activations at a site.

    Raises:
        BadInput: no linear layer says it, and the site does not either.
    """
    if site.d_model is not None:
        return site.d_model
    module = model.get_submodule(site.name)
    sizes = [found for each in module.modules() if (found := _linear_sizes(each))]
    if not sizes or (site.what == "input" and _linear_sizes(module) is None):
        raise BadInput(f"the width of the {site.what} of {site.name!r} is unknown; give CodeSite(..., d_model=)")
    return sizes[-1][1] if site.what == "output" else sizes[0][0]
