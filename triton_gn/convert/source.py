"""Find activations that directly follow norms in the source of a forward that cannot be traced."""

import ast
import functools
import inspect
import textwrap
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise

from torch import nn


def activations(parent: nn.Module) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield norms of a module and the activation that follows each of their calls, and no other.

    All are names of the module's children. No other code of its class calls the activation.
    """
    norms = [name for name, child in parent.named_children() if isinstance(child, nn.GroupNorm)]
    source, others = _source(type(parent))
    for name in parent._modules:
        if f"self.{name}" in others:
            continue
        before = tuple(norm for norm in norms if norm in _norms_before(source, name))
        if before and follows(source, before, name):
            yield before, name


def _source(kind: type[nn.Module]) -> tuple[str, frozenset[str]]:
    """Return the source of a class's forward, and the attributes that its other methods use."""
    others: set[str] = set()
    forward = ""
    for base in kind.__mro__[: kind.__mro__.index(nn.Module)]:
        for name, function in vars(base).items():
            if not inspect.isfunction(function) or name == "__init__":
                continue
            try:
                text = textwrap.dedent(inspect.getsource(function))
            except (OSError, TypeError):
                return "", frozenset()
            if function is kind.forward:
                forward = text
            else:
                nodes = ast.walk(ast.parse(text))
                others |= {ast.unparse(node) for node in nodes if isinstance(node, ast.Attribute)}
    return forward, frozenset(others)


@functools.cache
def _norms_before(source: str, activation: str) -> frozenset[str]:
    """Return the names of what a forward calls right before the activation, once or more."""
    callees = {callee for callee, after in _calls(source) if after == f"self.{activation}"}
    return frozenset(callee.removeprefix("self.") for callee in callees)


@functools.cache
def follows(source: str, norms: tuple[str, ...], activation: str) -> bool:
    """Return whether a forward calls the activation after each call of a norm, and only there."""
    nodes = list(ast.walk(ast.parse(source)))
    tests = {id(n) for node in nodes if isinstance(node, ast.If) for n in ast.walk(node.test)}
    uses = Counter(
        ast.unparse(node)
        for node in nodes
        if isinstance(node, ast.Attribute) and id(node) not in tests
    )
    norm_names, activation_name = {f"self.{norm}" for norm in norms}, f"self.{activation}"
    calls: Counter[str] = Counter()
    for body in _bodies(source):
        for before, after in pairwise(body):
            callees = list(_callees(before, after))
            if _function(after) == activation_name and norm_names.issuperset(callees):
                calls.update([*callees, activation_name])
    names = *norm_names, activation_name
    return uses[activation_name] > 0 and all(calls[name] == uses[name] for name in names)


def _calls(source: str) -> Iterator[tuple[str, str]]:
    """Yield a function and the one that is called with its result in the next statement."""
    for body in _bodies(source):
        for before, after in pairwise(body):
            for callee in _callees(before, after):
                yield callee, _function(after)


def _bodies(source: str) -> Iterator[list[ast.stmt]]:
    for node in ast.walk(ast.parse(source)):
        for part in ("body", "orelse"):
            body = getattr(node, part, None)
            if isinstance(body, list):
                yield body


def _function(statement: ast.stmt) -> str:
    """Return the function of a statement ``name = function(name)``, "" for any other."""
    if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Call):
        name, function = ast.unparse(statement.targets[0]), ast.unparse(statement.value.func)
        if ast.unparse(statement) == f"{name} = {function}({name})":
            return function
    return ""


def _callees(before: ast.stmt, after: ast.stmt) -> Iterator[str]:
    """Yield the function whose result ``before`` assigns to the same name as ``after``.

    An if statement yields a function for each branch. Any other statement yields "".
    """
    if isinstance(before, ast.If) and before.orelse:
        yield from _callees(before.body[-1], after)
        yield from _callees(before.orelse[-1], after)
    elif (
        isinstance(before, ast.Assign)
        and isinstance(after, ast.Assign)
        and isinstance(before.value, ast.Call)
        and ast.unparse(before.targets[0]) == ast.unparse(after.targets[0])
    ):
        yield ast.unparse(before.value.func)
    else:
        yield ""
