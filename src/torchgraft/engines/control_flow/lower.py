"""The source of a function as simple statements: one call each, branches and jumps by number.

Calls, conditional expressions and boolean operators inside expressions are lifted into statements of their own, in the
order in which Python evaluates them. What is not known is refused with its file and line.
"""

from __future__ import annotations

import ast
import builtins
import inspect
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torchgraft.engines.control_flow.liveness import live_variables
from torchgraft.errors import Untraceable

__all__ = ["Code", "Statement", "lower"]


@dataclass
class Statement:
    """One simple statement.

    Args:
        kind: what it does; ``then`` and ``other`` say where it goes on.
        line: line in the source file.
        target: what is assigned to.
        value: the expression.
        then: next statement; for a branch, where it holds; for ``next``, the loop's body.
        other: for a branch, where it does not hold; for ``next``, after the loop.
    """

    kind: Literal["assign", "append", "iter", "next", "branch", "return", "raise"]
    line: int
    target: ast.expr | None = None
    value: ast.expr | None = None
    then: int = -1
    other: int = -1

    @property
    def uses(self) -> set[str]:
        """Names that are read."""
        found = {
            node.id
            for part in (self.value,)
            if part is not None
            for node in ast.walk(part)
            if isinstance(node, ast.Name)
        }
        if self.kind == "append" and isinstance(self.target, ast.Name):
            found.add(self.target.id)
        if self.kind == "next":
            found |= {each + "#" for each in found}  # the place in the loop
        return found

    @property
    def defines(self) -> set[str]:
        """Names that are surely written."""
        if self.kind == "next":  # its target keeps its value where the loop is over
            return set()
        parts = () if self.target is None else ast.walk(self.target)
        found = {node.id for node in parts if isinstance(node, ast.Name)}
        if self.kind == "iter" and isinstance(self.target, ast.Name):
            found.add(self.target.id + "#")
        return found


@dataclass
class Code:
    """A function in simple statements.

    Args:
        name: of the function.
        file: where its source stands.
        signature: its parameters.
        statements: the program; it begins at 0.
        outer: the names that it finds outside itself.
        live: the local names that are still to be read where each statement begins.
    """

    name: str
    file: str
    signature: inspect.Signature
    statements: list[Statement]
    outer: Mapping[str, Any]
    live: list[frozenset[str]] = field(default_factory=list)

    def refuse(self, line: int, what: str) -> Untraceable:
        """Return the error that names the place."""
        return Untraceable(f"{self.name} {what}", f"{self.file}:{line}")


def lower(function: Any) -> Code:
    """Return the statements of a Python function.

    Raises:
        Untraceable: it has no source, or uses what is not supported; file and line are named.
    """
    name = getattr(function, "__qualname__", type(function).__name__)
    try:
        lines, start = inspect.getsourcelines(function)
        file = inspect.getsourcefile(function) or "<unknown>"
        tree = ast.parse(textwrap.dedent("".join(lines)))
        signature = inspect.signature(function)
    except (OSError, TypeError, SyntaxError, ValueError):
        raise Untraceable(f"{name} has no source to read; its control flow cannot be known") from None
    body = tree.body[0]
    if not isinstance(body, ast.FunctionDef):
        raise Untraceable(f"{name} is no plain function", f"{file}:{start}")
    outer: dict[str, Any] = {**vars(builtins), **function.__globals__}
    for variable, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        outer[variable] = cell.cell_contents
    code = Code(name, file, signature, [], outer)
    maker = _Lowering(code, start - 1)
    maker.block(body.body)
    maker.emit("return", body.body[-1], value=ast.Constant(None))
    following = []
    for statement in code.statements:
        if statement.kind in ("branch", "next"):
            following.append([statement.then, statement.other])
        else:
            following.append([] if statement.kind in ("return", "raise") else [statement.then])
    uses = [each.uses for each in code.statements]
    code.live, _ = live_variables(following, uses, [each.defines for each in code.statements])
    return code


_LEAVES = (ast.Constant, ast.Name)
_NESTED = (ast.BinOp, ast.UnaryOp, ast.Compare, ast.Subscript, ast.Tuple, ast.List, ast.Dict, ast.Slice, ast.Attribute)


class _Renamed(ast.NodeTransformer):
    def __init__(self, names: Mapping[str, str]) -> None:
        self.names = names

    def visit_Name(self, node: ast.Name) -> ast.AST:
        return ast.copy_location(ast.Name(self.names.get(node.id, node.id), node.ctx), node)


class _Lowering:
    """Statements are appended; those that go on to the next one get its number as it is emitted."""

    def __init__(self, code: Code, offset: int) -> None:
        self.code, self.offset = code, offset
        self.out = code.statements
        self.loops: list[tuple[list[Statement], int]] = []  # (statements that break, where to continue)
        self.temporaries = 0

    def line(self, node: ast.AST) -> int:
        return int(getattr(node, "lineno", 1)) + self.offset

    def refuse(self, node: ast.AST, what: str) -> Untraceable:
        return self.code.refuse(self.line(node), f"uses {what}, which is not supported")

    def fresh(self) -> ast.Name:
        self.temporaries += 1
        return ast.Name(f"%{self.temporaries}", ast.Load())

    def emit(
        self, kind: Any, at: ast.AST, *, target: ast.expr | None = None, value: ast.expr | None = None
    ) -> Statement:
        made = Statement(kind, self.line(at), target, value, then=len(self.out) + 1)
        self.out.append(made)
        return made

    def jump(self, at: ast.AST) -> Statement:
        """Emit a statement that does nothing, whose ``then`` may be set later."""
        return self.emit("assign", at, target=ast.Tuple([], ast.Store()), value=ast.Tuple([], ast.Load()))

    def here(self) -> int:
        return len(self.out)

    # -- statements -------------------------------------------------------------------------------------------------

    def block(self, body: list[ast.stmt]) -> None:
        for statement in body:
            self.statement(statement)

    def statement(self, node: ast.stmt) -> None:
        if isinstance(node, ast.Assign):
            value = self.lift(node.value)
            if len(node.targets) > 1:
                name = self.fresh()
                self.emit("assign", node, target=name, value=value)
                value = name
            for target in node.targets:
                self.emit("assign", node, target=self.target(target), value=value)
        elif isinstance(node, ast.AnnAssign):
            if node.value is not None:
                self.emit("assign", node, target=self.target(node.target), value=self.lift(node.value))
        elif isinstance(node, ast.AugAssign):
            target = self.target(node.target)
            if not isinstance(target, ast.Name):
                raise self.refuse(node, "an augmented assignment to something other than a name")
            value = ast.BinOp(ast.Name(target.id, ast.Load()), node.op, self.lift(node.value))
            self.emit("assign", node, target=target, value=ast.copy_location(value, node))
        elif isinstance(node, ast.Expr):
            self.expression(node)
        elif isinstance(node, ast.If):
            self.branches(node.test, node.body, node.orelse)
        elif isinstance(node, ast.While):
            self.loop(node)
        elif isinstance(node, ast.For):
            self.iteration(node)
        elif isinstance(node, ast.Break | ast.Continue):
            jump = self.jump(node)
            if isinstance(node, ast.Break):
                self.loops[-1][0].append(jump)
            else:
                jump.then = self.loops[-1][1]
        elif isinstance(node, ast.Return):
            value = ast.Constant(None) if node.value is None else self.lift(node.value)
            self.emit("return", node, value=value)
        elif isinstance(node, ast.Raise):
            self.emit("raise", node)
        elif isinstance(node, ast.Assert):
            holds, fails = self.condition(node.test)
            self.land(fails)
            self.emit("raise", node)
            self.land(holds)
        elif not isinstance(node, ast.Pass):
            raise self.refuse(node, f"a {type(node).__name__.lower()} statement")

    def target(self, node: ast.expr) -> ast.expr:
        if isinstance(node, ast.Name):
            return node
        if isinstance(node, ast.Tuple | ast.List):
            return ast.copy_location(ast.Tuple([self.target(each) for each in node.elts], ast.Store()), node)
        what = "an attribute (a state that outlives the call)" if isinstance(node, ast.Attribute) else "an element"
        raise self.refuse(node, f"an assignment to {what}")

    def expression(self, node: ast.Expr) -> None:
        value = node.value
        if isinstance(value, ast.Constant):
            return
        if (
            isinstance(value, ast.Call)
            and isinstance(value.func, ast.Attribute)
            and isinstance(value.func.value, ast.Name)
            and value.func.attr == "append"
            and len(value.args) == 1
        ):
            self.emit("append", node, target=value.func.value, value=self.lift(value.args[0]))
            return
        self.lift(value)

    def branches(self, test: ast.expr, body: list[ast.stmt], orelse: list[ast.stmt]) -> None:
        holds, fails = self.condition(test)
        self.land(holds)
        self.block(body)
        end = self.jump(test)
        self.land(fails)
        self.block(orelse)
        end.then = self.here()
        self.jump(test)

    def loop(self, node: ast.While) -> None:
        if node.orelse:
            raise self.refuse(node, "the else of a while")
        start = self.here()
        holds, fails = self.condition(node.test)
        self.land(holds)
        self.loops.append(([], start))
        self.block(node.body)
        self.jump(node).then = start
        self.land(fails)
        for each in self.loops.pop()[0]:
            each.then = self.here()

    def iteration(self, node: ast.For) -> None:
        if node.orelse:
            raise self.refuse(node, "the else of a for")
        self.each(node, node.target, node.iter, lambda: self.block(node.body))

    def each(self, at: ast.AST, target: ast.expr, items: ast.expr, body: Any) -> None:
        name = self.fresh()
        self.emit("iter", at, target=name, value=self.lift(items))
        start = self.here()
        following = self.emit("next", at, target=self.target(target), value=name)
        self.loops.append(([], start))
        body()
        self.jump(at).then = start
        following.other = self.here()
        for each in self.loops.pop()[0]:
            each.then = self.here()

    def condition(self, test: ast.expr) -> tuple[list[tuple[Statement, str]], list[tuple[Statement, str]]]:
        """Emit the branches of a condition; return the open ends where it holds and where it does not."""
        if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
            holds, fails = self.condition(test.operand)
            return fails, holds
        if isinstance(test, ast.BoolOp):
            both = isinstance(test.op, ast.And)
            settled: list[tuple[Statement, str]] = []
            for place, value in enumerate(test.values):
                holds, fails = self.condition(value)
                if place == len(test.values) - 1:
                    return (holds, [*settled, *fails]) if both else ([*settled, *holds], fails)
                settled += fails if both else holds
                self.land(holds if both else fails)
        made = self.emit("branch", test, value=self.lift(test))
        return [(made, "then")], [(made, "other")]

    def land(self, ends: list[tuple[Statement, str]]) -> None:
        for statement, side in ends:
            setattr(statement, side, self.here())

    # -- expressions ------------------------------------------------------------------------------------------------

    def lift(self, node: ast.expr) -> ast.expr:
        """Return ``node`` without calls and branches inside, which are emitted before."""
        if isinstance(node, _LEAVES):
            return node
        if isinstance(node, ast.Call):
            function: ast.expr
            if isinstance(node.func, ast.Attribute):
                function = ast.Attribute(self.lift(node.func.value), node.func.attr, ast.Load())
            else:
                function = self.lift(node.func)
            args = [self.lift(each) for each in node.args]
            if any(each.arg is None for each in node.keywords):
                raise self.refuse(node, "** in a call")
            keywords = [ast.keyword(each.arg, self.lift(each.value)) for each in node.keywords]
            name = self.fresh()
            self.emit("assign", node, target=name, value=ast.copy_location(ast.Call(function, args, keywords), node))
            return name
        if isinstance(node, ast.IfExp):
            name = self.fresh()
            holds, fails = self.condition(node.test)
            self.land(holds)
            self.emit("assign", node, target=name, value=self.lift(node.body))
            end = self.jump(node)
            self.land(fails)
            self.emit("assign", node, target=name, value=self.lift(node.orelse))
            end.then = self.here()
            return name
        if isinstance(node, ast.BoolOp):
            name = self.fresh()
            ends = []
            for place, value in enumerate(node.values):
                self.emit("assign", node, target=name, value=self.lift(value))
                if place < len(node.values) - 1:
                    made = self.emit("branch", node, value=name)
                    ends.append((made, "other" if isinstance(node.op, ast.And) else "then"))
                    if isinstance(node.op, ast.Or):
                        made.other = self.here()
            self.land(ends)
            self.jump(node)
            return name
        if isinstance(node, ast.NamedExpr):
            self.emit("assign", node, target=node.target, value=self.lift(node.value))
            return ast.copy_location(ast.Name(node.target.id, ast.Load()), node)
        if isinstance(node, ast.ListComp | ast.GeneratorExp):
            return self.comprehension(node)
        if isinstance(node, ast.Starred):
            return ast.copy_location(ast.Starred(self.lift(node.value), ast.Load()), node)
        if not isinstance(node, _NESTED):
            raise self.refuse(node, f"a {type(node).__name__}")
        fields: dict[str, Any] = {}
        for name_, value in ast.iter_fields(node):
            if isinstance(value, ast.expr):
                fields[name_] = self.lift(value)
            elif isinstance(value, list):
                fields[name_] = [self.lift(each) if isinstance(each, ast.expr) else each for each in value]
            else:
                fields[name_] = value
        return ast.copy_location(type(node)(**fields), node)

    def comprehension(self, node: ast.ListComp | ast.GeneratorExp) -> ast.expr:
        if len(node.generators) != 1 or node.generators[0].is_async:
            raise self.refuse(node, "a comprehension with several loops")
        generator, made = node.generators[0], self.fresh()
        own = {each.id: f"{made.id}.{each.id}" for each in ast.walk(generator.target) if isinstance(each, ast.Name)}
        rename = _Renamed(own)
        target, element = rename.visit(generator.target), rename.visit(node.elt)
        tests = [rename.visit(each) for each in generator.ifs]
        self.emit("assign", node, target=made, value=ast.List([], ast.Load()))

        def body() -> None:
            skipped = []
            for test in tests:
                holds, fails = self.condition(test)
                self.land(holds)
                skipped += fails
            self.emit("append", node, target=made, value=self.lift(element))
            self.land(skipped)

        self.each(node, target, generator.iter, body)
        return made
