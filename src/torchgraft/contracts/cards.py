"""Checks that every card promises: the card is true of its module, and the module can be read, run and cited."""

from __future__ import annotations

import ast
import doctest
import inspect
import re
import sys
from pathlib import Path
from urllib.parse import urlparse

from torchgraft.catalogue import Card
from torchgraft.catalogue.registry import cards as indexed
from torchgraft.contracts.check import Check, Subject, require

__all__ = ["CHECKS"]


def check_card_is_indexed(subject: Subject) -> None:
    """The card equals its record in the index, from which the command line lists it."""
    key = subject.card.key
    records = indexed()
    require(key in records, f"{key} is not in the index; run: python -m torchgraft.contracts.index")
    stale = [name for name in Card.model_fields if getattr(records[key], name) != getattr(subject.card, name)]
    require(not stale, f"the index of {key} is stale in {', '.join(stale)}; run: python -m torchgraft.contracts.index")


def check_reference_is_an_address(subject: Subject) -> None:
    """The reference is a full web address, and the module's docstring links to it with a title."""
    parts = urlparse(subject.card.reference)
    require("." in parts.netloc and len(parts.path) > 1, f"reference {subject.card.reference!r} has no host or path")
    text = inspect.getdoc(subject.module) or ""
    links = re.findall(r"`([^`<]{4,}?)\s*<(https?://[^>\s]+)>`_|\[([^\]]{4,})\]\((https?://[^)\s]+)\)", text)
    found = [link[1] or link[3] for link in links]
    require(subject.card.reference in found, f"the docstring links {found or 'nothing'}, not {subject.card.reference}")


def check_bibtex_is_whole(subject: Subject) -> None:
    """The citation is one BibTeX entry with a key, a title, an author and a year, braces closed."""
    text = subject.card.bibtex.strip()
    require(bool(re.match(r"@\w+\{[^,\s{}]+,", text)), f"no entry type and key at the start of {text[:40]!r}")
    depth = 0
    for place, letter in enumerate(text):
        depth += {"{": 1, "}": -1}.get(letter, 0)
        require(depth > 0 or place < text.index("{") or place == len(text) - 1, f"braces close early at {place}")
    require(depth == 0, f"{depth} braces are left open")
    fields = {name.lower() for name in re.findall(r"[,\s](\w+)\s*=", text)}
    require({"title", "author", "year"} <= fields, f"fields {sorted(fields)} lack title, author or year")


def check_docstring_has_its_parts(subject: Subject) -> None:
    """The module's docstring opens with a sentence, gives an equation and names its departures from the paper."""
    text = inspect.getdoc(subject.module) or ""
    first = text.split("\n\n")[0]
    require(first.rstrip().endswith("."), f"the docstring opens with {first[:60]!r}, which is no sentence")
    require(bool(re.search(r"[\w)\]}|'*`]\s*(=|~|<-|:=|\\in|∈|≈|<=|>=)\s*\S", text)), "the docstring has no equation")
    require("Departures:" in text, "the docstring has no line 'Departures:' (write 'Departures: none' if so)")


def check_entry_is_documented(subject: Subject) -> None:
    """The public entry has a docstring with its arguments, named and keyword-only after the obvious first."""
    signature = inspect.signature(subject.entry)
    names = [name for name in signature.parameters if name != "self"]
    require(bool(inspect.getdoc(subject.entry)), f"{subject.card.entry} has no docstring")
    # A method that only names its score inherits its settings, documented where its constructor stands.
    text = "\n".join(inspect.getdoc(place) or "" for place in getattr(subject.entry, "__mro__", (subject.entry,)))
    require(not names or "Args:" in text, f"{subject.card.entry} takes {names} and its docstring has no 'Args:'")
    loose = [name for name, value in signature.parameters.items() if value.kind is value.VAR_KEYWORD]
    require(not loose, f"{subject.card.entry} takes **{loose}; name the arguments")
    missing = [name for name in names if not re.search(rf"^\s*{name}(, \w+)*:|, {name}(,|:)", text, re.MULTILINE)]
    require(not missing, f"{subject.card.entry} does not document {missing}")


def check_examples_run(subject: Subject) -> None:
    """The examples in the module's docstrings run and print what they say; there is at least one."""
    said: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    for test in doctest.DocTestFinder(exclude_empty=True).find(subject.module):
        runner.run(test, out=said.append)
    require(runner.tries > 0, f"{subject.module.__name__} has no example for doctest")
    words = " ".join("".join(said).replace("*" * 70, "").split())[:400]
    require(runner.failures == 0, f"{runner.failures} of {runner.tries} examples fail: {words}")


def check_module_stands_alone(subject: Subject) -> None:
    """The method imports no sibling method; what two share is an engine's (parts of another room may be used)."""
    source = Path(inspect.getfile(subject.module))
    names: set[str] = set()
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    found = {name: getattr(sys.modules.get(name), "CARD", None) for name in names - {subject.module.__name__}}
    siblings = sorted(
        name
        for name, card in found.items()
        if card is not None and (card.kind != "part" or card.family == subject.card.family)
    )
    require(not siblings, f"{subject.card.key} imports {', '.join(siblings)}")


def _every(card: Card) -> bool:
    return True


CHECKS = tuple(
    Check(function, _every)
    for function in (
        check_card_is_indexed,
        check_reference_is_an_address,
        check_bibtex_is_whole,
        check_docstring_has_its_parts,
        check_entry_is_documented,
        check_examples_run,
        check_module_stands_alone,
    )
)
