"""Put codebooks into a transformer, search their codes for what they mean, and set codes while the model runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from torchgraft.bench.task import Inputs, call
from torchgraft.engines.codebook import Similarity, Usage, usage
from torchgraft.engines.taps import matching
from torchgraft.errors import BadInput, nearest
from torchgraft.parts.memories.code_sites import CodeSite, code_sites, width_at
from torchgraft.parts.memories.codebook_features import CodebookBottleneck, Codes, Kind, Positions, Reduce, times_active

__all__ = ["CodeHit", "Codebooks", "Seen", "add_codebooks"]

_CHILD = {"output": "output_codebook", "input": "input_codebook"}


def _after(module: nn.Module, args: Any, output: Any) -> Any:
    """Pass what a module returns through its codebook; the first tensor where it returns several."""
    book = module._modules["output_codebook"]
    if isinstance(output, tuple):
        return (book(output[0]), *output[1:])  # type: ignore[misc]  # a module, by construction
    return book(output)  # type: ignore[misc]


def _before(module: nn.Module, args: Any) -> Any:
    """Pass what a module takes through its codebook."""
    return (module._modules["input_codebook"](args[0]), *args[1:])  # type: ignore[misc]


@dataclass(frozen=True)
class CodeHit:
    """How well a code tells whether a predicate holds.

    Args:
        site: the name of the site.
        head: which of its codebooks.
        code: which code.
        precision: share of the tokens at which it is active where the predicate holds.
        recall: share of the tokens where the predicate holds at which it is active.
        active: at how many tokens it is active.
    """

    site: str
    head: int
    code: int
    precision: float
    recall: float
    active: int


@dataclass
class Seen:
    """What passed through the codebooks while :meth:`Codebooks.watch` was open.

    Args:
        codes: site -> active codes of every call, each (H, B * T, k), -1 for none.
        losses: reconstruction and commitment of every call, each weighted.
        activations: site -> activations of every call, each (H, B * T, D / H); only where they were asked for.
    """

    codes: dict[str, list[Tensor]] = field(default_factory=dict)
    losses: list[Tensor] = field(default_factory=list)
    activations: dict[str, list[Tensor]] = field(default_factory=dict)

    @property
    def loss(self) -> Tensor:
        """The sum of the codebooks' own losses, to be added to the task's."""
        return torch.stack(self.losses).sum() if self.losses else torch.zeros(())


class Codebooks:
    """All codebooks of a model; holds nothing itself, so that it can be made again from any model that has some.

    Args:
        model: a model with codebooks.

    Attributes:
        sites: name -> codebook, in the order of the model.

    Raises:
        BadInput: the model has none.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.sites: dict[str, CodebookBottleneck] = {}
        for name, module in model.named_modules():
            for what, child in _CHILD.items():
                book = module._modules.get(child)
                if isinstance(book, CodebookBottleneck):
                    self.sites[f"{name}:input" if what == "input" and name in self.sites else name] = book
        if not self.sites:
            raise BadInput(f"{type(model).__name__} has no codebooks; see add_codebooks")

    def parameters(self) -> list[nn.Parameter]:
        """Return the codes of all sites."""
        return [book.codes for book in self.sites.values()]

    @contextmanager
    def watch(self, *, activations: bool = False) -> Iterator[Seen]:
        """Keep the active codes and the codebooks' losses of what runs in the block.

        Args:
            activations: whether to keep the activations too.

        Example:
            >>> from torchgraft.bench.models import ByteTransformer
            >>> model = ByteTransformer(8, 8, d_model=8, depth=1, num_heads=2)
            >>> books = add_codebooks(model, num_codes=16, k=2)
            >>> with books.watch() as seen:
            ...     logits = model(torch.zeros(1, 4, dtype=torch.long))
            >>> (logits.mean() + seen.loss).backward()
            >>> {name: tuple(codes[0].shape) for name, codes in seen.codes.items()}
            {'blocks.0.attn.out': (2, 4, 2), 'blocks.0.mlp': (1, 4, 2)}
        """
        seen = Seen()

        def watcher(name: str, book: CodebookBottleneck) -> Callable[[Tensor, Tensor, Tensor], None]:
            def look(heads: Tensor, quantized: Tensor, chosen: Tensor) -> None:
                seen.codes.setdefault(name, []).append(chosen)
                if activations:
                    seen.activations.setdefault(name, []).append(heads.detach())
                if heads.shape[1] and not book.bypassed:
                    for weight, left, right in (
                        (book.recon_weight, quantized, heads.detach()),
                        (book.commitment, heads, quantized.detach()),
                    ):
                        if weight:  # mean over tokens of the squared distance, heads together
                            seen.losses.append(weight * (left - right).square().sum((0, 2)).mean())

            return look

        looks = {name: watcher(name, book) for name, book in self.sites.items()}
        for name, book in self.sites.items():
            book.watchers.append(looks[name])
        try:
            yield seen
        finally:
            for name, book in self.sites.items():
                book.watchers.remove(looks[name])

    @contextmanager
    def bypass(self) -> Iterator[None]:
        """Let activations pass unchanged while the block runs."""
        before = {name: book.bypassed for name, book in self.sites.items()}
        try:
            for book in self.sites.values():
                book.bypassed = True
            yield
        finally:
            for name, book in self.sites.items():
                book.bypassed = before[name]

    @torch.no_grad()
    def start_(
        self, batches: Iterable[Inputs], *, rows: int = 8192, steps: int = 10, generator: torch.Generator | None = None
    ) -> None:
        """Set all codes by k-means on the activations of the model without codebooks.

        Args:
            batches: inputs of the model.
            rows: how many activations a site at most, drawn at random.
            steps: rounds of Lloyd's algorithm.
            generator: decides the draw.
        """
        with self.bypass(), self.watch(activations=True) as seen:
            for inputs in batches:
                call(self.model, inputs)
        for name, book in self.sites.items():
            heads = torch.cat(seen.activations[name], 1)
            drawn = torch.randperm(heads.shape[1], generator=generator)[:rows].to(heads.device)
            book.start_(heads[:, drawn], steps=steps, generator=generator)

    @torch.no_grad()
    def usage(self, batches: Iterable[Inputs]) -> dict[str, Usage]:
        """Return how evenly the codes of every site are used on ``batches``, each number by head."""
        with self.watch() as seen:
            for inputs in batches:
                call(self.model, inputs)
        found = {name: torch.cat([codes.clamp(min=0) for codes in seen.codes[name]], 1) for name in self.sites}
        return {name: usage(found[name], book.num_codes, groups=1) for name, book in self.sites.items()}

    @torch.no_grad()
    def code_search(
        self,
        predicate: Callable[[Inputs], Tensor],
        batches: Iterable[Inputs],
        *,
        sites: Sequence[str] | None = None,
        min_recall: float = 0.0,
        top: int = 10,
    ) -> list[CodeHit]:
        """Return the codes that are most often right when they say that ``predicate`` holds, best first.

        Args:
            predicate: says of inputs at which tokens it holds, (B, T) of bool.
            batches: inputs of the model.
            sites: where to search; default everywhere.
            min_recall: the least share of such tokens that a code must be active at.
            top: how many to return.
        """
        names = list(self.sites) if sites is None else [self._named(name) for name in sites]
        fired = {name: torch.zeros(self.sites[name].codes.shape[:2], dtype=torch.float64) for name in names}
        right = {name: torch.zeros(self.sites[name].codes.shape[:2], dtype=torch.float64) for name in names}
        holding = 0
        for inputs in batches:
            with self.watch() as seen:
                call(self.model, inputs)
            holds = predicate(inputs).flatten()
            holding += int(holds.sum())
            for name in names:
                for codes in seen.codes[name]:
                    if codes.shape[1] != len(holds):
                        raise BadInput(f"predicate must give one bool for each of {codes.shape[1]} tokens of {name!r}")
                    n = self.sites[name].num_codes
                    fired[name] += times_active(codes, n).cpu()
                    right[name] += times_active(codes[:, holds], n).cpu()
        hits = []
        for name in names:
            precision, recall = right[name] / fired[name].clamp(min=1), right[name] / max(holding, 1)  # (H, N)
            for head, code in ((fired[name] > 0) & (recall >= min_recall)).nonzero().tolist():
                values = (float(precision[head, code]), float(recall[head, code]), int(fired[name][head, code]))
                hits.append(CodeHit(name, head, code, *values))
        return sorted(hits, key=lambda hit: (-hit.precision, -hit.recall))[:top]

    def activate(self, codes: Mapping[str, Codes], *, positions: Positions = "all", keep_others: bool = False) -> Any:
        """Set the active codes while the block runs, also while the model generates.

        Args:
            codes: site -> codes, or head -> codes where the site has several codebooks.
            positions: which tokens of each call; ``"all"``, or numbers, negative from the end. Cached generation calls
                the model with one token at a time.
            keep_others: whether the codes only join those that the activation chooses, the least similar leaving.

        Example:
            >>> from torchgraft.bench.models import ByteTransformer
            >>> model = ByteTransformer(8, 8, d_model=8, depth=1, num_heads=2)
            >>> books = add_codebooks(model, ["mlp"], num_codes=16, k=2)
            >>> with books.activate({"blocks.0.mlp": [3, 5]}), books.watch() as seen:
            ...     _ = model(torch.zeros(1, 2, dtype=torch.long))
            >>> seen.codes["blocks.0.mlp"][0].tolist()
            [[[3, 5], [3, 5]]]
        """
        return self._changed("force" if keep_others else "activate", codes, positions)

    def ablate(self, codes: Mapping[str, Codes], *, positions: Positions = "all", replace: bool = True) -> Any:
        """Keep codes from being active while the block runs.

        Args:
            codes: as for :meth:`activate`.
            positions: as for :meth:`activate`.
            replace: whether the next similar codes take their places; without, the sum goes on without them.
        """
        return self._changed("ablate" if replace else "silence", codes, positions)

    @contextmanager
    def _changed(self, kind: Kind, codes: Mapping[str, Codes], positions: Positions) -> Iterator[None]:
        changes = [
            (book := self.sites[self._named(name)], book.change(kind, given, positions))
            for name, given in codes.items()
        ]
        with ExitStack() as stack:
            for book, change in changes:
                book.changes.append(change)
                stack.callback(book.changes.remove, change)
            yield

    def _named(self, name: str) -> str:
        if name not in self.sites:
            raise BadInput(f"there is no codebook at {name!r}{nearest(name, list(self.sites))}")
        return name

    def remove(self) -> nn.Module:
        """Take all codebooks out of the model, in place, and return it."""
        for module in list(self.model.modules()):
            for what, child in _CHILD.items():
                if isinstance(module._modules.get(child), CodebookBottleneck):
                    del module._modules[child]
                    hooks: Any = module._forward_hooks if what == "output" else module._forward_pre_hooks
                    for number in [key for key, hook in hooks.items() if hook in (_after, _before)]:
                        del hooks[number]
            if "_nested_before" in vars(module):
                vars(module)["use_nested_tensor"] = vars(module).pop("_nested_before")
        self.sites = {}
        return self.model


def add_codebooks(
    model: nn.Module,
    sites: Sequence[str | CodeSite] = ("mlp", "attention"),
    *,
    num_codes: int = 1024,
    k: int = 8,
    similarity: Similarity = "cosine",
    reduce: Reduce = "sum",
    per_head: bool = True,
    recon_weight: float = 1.0,
    commitment: float = 0.0,
    replace_after: int = 0,
    replace_noise: float = 0.0,
) -> Codebooks:
    """Put codebooks into ``model``, in place; its weights and their names stay as they are.

    The codes are random: start them by :meth:`Codebooks.start_`, then train the model with ``Seen.loss`` added.

    Args:
        model: a transformer of torchgraft, torch or Hugging Face, or any other with sites named.
        sites: ``"mlp"``, ``"attention"``, names or globs of modules whose outputs are meant, or :class:`CodeSite`.
        num_codes: codes in each codebook.
        k: how many are active at a time.
        similarity: ``"cosine"`` or ``"euclid"``.
        reduce: ``"sum"`` or ``"mean"`` of the active codes.
        per_head: whether each attention head has a codebook of its own.
        recon_weight: weight of the loss that draws codes to activations.
        commitment: weight of the loss that draws activations to codes.
        replace_after: training passes without use after which a code is replaced; 0 for never.
        replace_noise: noise on replaced codes.

    Example:
        >>> encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        >>> list(add_codebooks(encoder, ["mlp"], num_codes=32, k=4).sites)
        ['linear2']

    Raises:
        BadInput: there is no such site, it has a codebook already, or a setting is out of range.
    """
    places: list[CodeSite] = []
    for site in [sites] if isinstance(sites, str) else sites:
        if isinstance(site, CodeSite):
            places.append(site)
        elif site in ("mlp", "attention"):
            places += code_sites(model, [site], per_head=per_head)
        else:
            places += [CodeSite(name) for name in matching(model, site)]
    made: list[tuple[nn.Module, CodeSite, CodebookBottleneck]] = []
    for place in places:
        name = place.name
        while isinstance(model.get_submodule(name), nn.Sequential):  # a child of it would become a part of its chain
            name = f"{name}.{len(model.get_submodule(name)) - 1 if place.what == 'output' else 0}".lstrip(".")  # type: ignore[arg-type]
        module = model.get_submodule(name)
        if _CHILD[place.what] in module._modules or any(
            module is other and place.what == p.what for other, p, _ in made
        ):
            raise BadInput(f"{name!r} has a codebook already; remove it first")
        book = CodebookBottleneck(
            width_at(model, CodeSite(name, place.what, place.heads, place.d_model)),
            num_codes=num_codes,
            k=k,
            num_heads=place.heads,
            similarity=similarity,
            reduce=reduce,
            recon_weight=recon_weight,
            commitment=commitment,
            replace_after=replace_after,
            replace_noise=replace_noise,
        )
        like = next((value for value in (*module.parameters(), *model.parameters()) if value.is_floating_point()), None)
        if like is not None:
            book = book.to(like.device, like.dtype)
        made.append((module, place, book.train(module.training)))
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder):  # its nested tensors would reach the codebooks without a width
            vars(module).setdefault("_nested_before", module.use_nested_tensor)
            vars(module)["use_nested_tensor"] = False
    for module, place, book in made:  # nothing is touched where one of them could not be made
        module.add_module(_CHILD[place.what], book)
        if place.what == "output":
            module.register_forward_hook(_after)
        else:
            module.register_forward_pre_hook(_before)
    return Codebooks(model)
