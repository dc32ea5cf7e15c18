"""Find the function that a docstring describes, among 64, in the Python standard library.

A sample is a pair: the first paragraph of a docstring, and the source of its function without the docstring. The
model sees a batch of pairs and returns every query's similarity with every function of the batch; the right one
for query i is function i. A sample scores 1 when its function ranks first, else 0. The held-out splits hold a multiple
of 64 pairs in a fixed, shuffled order and are scored in batches of 64, so every sample has the same 63 distractors
each time and none is left out. Files are split before pairs are drawn: no file is in two splits.
"""

from __future__ import annotations

import ast
import hashlib
import re
import sys
import warnings
import zlib
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from torchgraft.bench.files import read_tensors, write_tensors
from torchgraft.bench.models import TwoTower
from torchgraft.bench.task import Split, Task
from torchgraft.bench.tasks.baseline import Settings, cache_folder, cached_weights, seeded
from torchgraft.bench.tasks.stdlib import source_files
from torchgraft.bench.training import supervised
from torchgraft.errors import BadInput

__all__ = ["contrast", "first_rank", "pairs", "stdlib_search", "tokens"]

_VOCABULARY, _QUERY, _CODE = 2048, 24, 48
_BATCH = 64
_TRAIN, _HELD_OUT = 4096, 512
_SETTINGS = Settings(
    steps=400,
    batch_size=_BATCH,
    lr=1e-3,
    weight_decay=0.1,
    model=(("d_model", 96), ("depth", 2), ("num_heads", 4)),
    data=(("v", 1),),
)
_PIECE = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")


def tokens(text: str, length: int) -> list[int]:
    """Return ``length`` token identities of ``text``: hashed lower-case words and pieces of identifiers, 0 after them.

    Example:
        >>> tokens("readLine", 4) == tokens("read_line", 4)
        True
        >>> tokens("x", 3)[1:]
        [0, 0]
    """
    pieces = _PIECE.findall(text)[:length]
    # crc32 is the same in every process, which Python's own hash is not.
    found = [1 + zlib.crc32(piece.lower().encode()) % (_VOCABULARY - 1) for piece in pieces]
    return found + [0] * (length - len(found))


def pairs(source: str) -> list[tuple[str, str]]:
    """Return (first paragraph of the docstring, code without the docstring) for every documented function.

    Example:
        >>> pairs('def add(a, b):\\n    "Return the sum of both."\\n    return a + b')
        [('Return the sum of both.', 'def add(a, b):\\n    return a + b')]
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old escapes in somebody else's strings
        tree = ast.parse(source)
    lines = source.splitlines()
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) or len(node.body) < 2:
            continue
        words = (ast.get_docstring(node) or "").split("\n\n")[0]
        if len(words.split()) < 4:
            continue
        text = node.body[0]
        code = lines[node.lineno - 1 : text.lineno - 1] + lines[text.end_lineno or text.lineno : node.end_lineno]
        found.append((" ".join(words.split()), "\n".join(code)))
    return found


def contrast(output: Tensor, target: Tensor) -> Tensor:
    """Return the cross-entropy of the diagonal, by rows and by columns; (B, B) -> scalar."""
    right = torch.arange(output.shape[0], device=output.device)
    return 0.5 * (F.cross_entropy(output, right) + F.cross_entropy(output.transpose(0, 1), right))


def first_rank(output: Tensor, target: Tensor) -> Tensor:
    """Return 1 where the right function is the most similar one of the batch; (B, B) -> (B,)."""
    return (output.argmax(dim=-1) == torch.arange(output.shape[0], device=output.device)).float()


def _split(files: list[Path], most: int) -> Split:
    """Return at most ``most`` distinct pairs in a fixed random order; the target is the place in the split."""
    found: dict[str, str] = {}
    for path in files:
        try:
            source = path.read_text(encoding="utf-8")
            found.update({query: code for query, code in pairs(source) if query not in found})
        except (SyntaxError, UnicodeDecodeError):
            continue  # a few files of the library are deliberately written in another encoding
    chosen = sorted(found.items(), key=lambda pair: hashlib.sha256(pair[0].encode()).digest())[:most]
    count = len(chosen) // _BATCH * _BATCH
    if not count:
        raise BadInput("the standard library's sources hold too few docstrings; use another built-in task")
    query = torch.tensor([tokens(words, _QUERY) for words, _ in chosen[:count]])
    code = torch.tensor([tokens(body, _CODE) for _, body in chosen[:count]])
    return Split((query, code), torch.arange(count))


def _splits() -> tuple[Split, Split, Split]:
    """Return the three splits, from the cache where an earlier process extracted them (it takes some seconds)."""
    files = source_files(packages=True)
    sizes = (_VOCABULARY, _QUERY, _CODE, _BATCH, _TRAIN, _HELD_OUT)
    listing = f"{sys.version} {_SETTINGS.data} {sizes} {[(str(path), path.stat().st_size) for path in files]}"
    path = cache_folder() / f"stdlib-search-pairs-{hashlib.sha256(listing.encode()).hexdigest()[:12]}.safetensors"
    names = ("train", "val", "test")
    if path.exists():
        try:
            kept, _ = read_tensors(path)
            first, second, third = (
                Split((kept[f"{name}/query"], kept[f"{name}/code"]), kept[f"{name}/target"]) for name in names
            )
            return first, second, third
        except (BadInput, KeyError):
            pass  # a damaged cache is written anew below
    parts: tuple[list[Path], list[Path], list[Path]] = ([], [], [])
    for index, file in enumerate(files):
        parts[{3: 1, 7: 2}.get(index % 10, 0)].append(file)
    first, second, third = _split(parts[0], _TRAIN), _split(parts[1], _HELD_OUT), _split(parts[2], _HELD_OUT)
    tensors: dict[str, Tensor] = {}
    for name, split in zip(names, (first, second, third), strict=True):
        tensors |= {f"{name}/{part}": value for part, value in zip(("query", "code"), split.inputs, strict=True)}
        tensors[f"{name}/target"] = split.target
    write_tensors(path, tensors)
    return first, second, third


def stdlib_search(seed: int = 0) -> Task:
    """Return two transformer encoders, width 96 and two blocks each, that place docstrings near their functions."""
    train, val, test = _splits()
    digest = hashlib.sha256(
        b"".join(part.numpy().tobytes() for part in (*train.inputs,) if isinstance(part, Tensor))
    ).hexdigest()[:12]
    settings = Settings(**{**_SETTINGS.__dict__, "data": (("text", digest),)})
    architecture = seeded(lambda: TwoTower(_VOCABULARY, _QUERY, _CODE, d_model=96, depth=2, num_heads=4), seed)
    return Task(
        model=architecture,
        train=train,
        val=val,
        test=test,
        loss=contrast,
        score=first_rank,
        name="stdlib-search",
        batch_size=_BATCH,
        learning_rate=settings.lr,
        reference=0.4,
        source="stdlib-search",
        weights=cached_weights(
            "stdlib-search", seed, settings, build=architecture, split=train, objective=supervised(contrast)
        ),
    )
