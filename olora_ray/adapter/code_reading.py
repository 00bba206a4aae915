"""What the code of a model's modules does with weights, read from its source.

An adapter sees what passes through a module, so a weight that other code takes and multiplies with itself passes
it by; and a parameter that holds the weights of many experts says nothing of which of its dimensions are inputs.
Neither depends on the family of a model: it stands in the code of the class.
"""

import ast
import inspect
import sys
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from typing import Literal

from torch import nn

Product = Literal["linear", "matmul"]
"""How code multiplies with the weight of an expert: linear(x, W) with W as out x in, or x @ W with W as in x out."""

# What is read of a weight without multiplying with it.
_FACTS = frozenset({"device", "dtype", "shape", "size", "ndim", "dim", "is_cuda", "numel"})
# Methods that run before training.
_BEFORE = frozenset({"__init__", "_init_weights", "init_weights", "reset_parameters", "extra_repr"})


def direct_reads(module: nn.Module) -> set[str]:
    """Submodules ("out_proj", "mlp.down_proj") whose `.weight` the module's code takes for itself.

    Branches that the module's own attributes turn off (`if self.slow_but_exact:`) do not count.
    """
    module_class: type = type(module)
    return {path for path, place in _weight_reads(module_class) if not _turned_off(place, module)}


@cache
def _weight_reads(module_class: type) -> tuple[tuple[str, tuple[ast.AST, ...]], ...]:
    found = []
    for node, parents in _nodes(module_class):
        if isinstance(node, ast.Attribute) and node.attr == "weight" and not _only_a_fact(parents):
            path = _path_from_self(node.value)
            if path:
                found.append((path, (*parents, node)))
    return tuple(found)


def _turned_off(place: tuple[ast.AST, ...], module: nn.Module) -> bool:
    """Whether the last node of `place`, a path through the tree, is in a branch that is never taken."""
    for above, node in pairwise(place):
        if isinstance(above, ast.If) and node is not above.test:
            known = _truth(above.test, module)
            if known is not None and known != (node in above.body):
                return True
    return False


def _truth(test: ast.expr, module: nn.Module) -> bool | None:
    """The truth of a condition, as far as it depends on the module's attributes alone; else None."""
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        inner = _truth(test.operand, module)
        return None if inner is None else not inner
    if isinstance(test, ast.BoolOp):
        decisive = isinstance(test.op, ast.Or)
        parts = [_truth(part, module) for part in test.values]
        return decisive if decisive in parts else None if None in parts else not decisive
    if isinstance(test, ast.Attribute) and (name := _path_from_self(test)):
        # The base stays in evaluation mode, whatever mode it is in now.
        value = False if name == "training" else getattr(module, name, ())
        return bool(value) if value is None or isinstance(value, bool | int) else None
    return None


def product(module_class: type, parameter: str) -> Product | None:
    """How the class multiplies with its parameter, expert by expert or with all at once; None if it is not clear."""
    return _product(module_class, parameter)


@cache
def _product(module_class: type, parameter: str) -> Product | None:
    kinds: set[Product | None] = set()
    for node, parents in _nodes(module_class):
        if isinstance(node, ast.Attribute) and _path_from_self(node) == parameter and not _only_a_fact(parents):
            kinds.add(_product_of(node, parents))
    return kinds.pop() if len(kinds) == 1 else None


def _product_of(node: ast.expr, parents: tuple[ast.AST, ...]) -> Product | None:
    above = list(parents)
    if above and isinstance(above[-1], ast.Subscript) and above[-1].value is node:
        node = above.pop()  # type: ignore[assignment]  # the subscript: one expert's weight
    user = above[-1] if above else None
    if isinstance(user, ast.BinOp) and isinstance(user.op, ast.MatMult) and user.right is node:
        return "matmul"
    if isinstance(user, ast.Call) and len(user.args) > 1 and user.args[1] is node:
        called = user.func.attr if isinstance(user.func, ast.Attribute) else getattr(user.func, "id", None)
        return "linear" if called == "linear" else "matmul" if called in ("matmul", "bmm") else None
    return None


def _only_a_fact(parents: tuple[ast.AST, ...]) -> bool:
    user = parents[-1]
    return isinstance(user, ast.Compare) or (isinstance(user, ast.Attribute) and user.attr in _FACTS)


def _path_from_self(node: ast.expr) -> str | None:
    """ "a.b" of `self.a.b`; "" of `self`; None of anything else."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.insert(0, node.attr)
        node = node.value
    return ".".join(parts) if isinstance(node, ast.Name) and node.id == "self" else None


def _nodes(module_class: type) -> Iterator[tuple[ast.AST, tuple[ast.AST, ...]]]:
    """Every node of the methods that run in training, with the nodes that it is in, outermost first."""
    seen: set[str] = set(_BEFORE)
    for owner in module_class.__mro__[: module_class.__mro__.index(nn.Module)]:
        for method in _methods(owner):
            if method.name not in seen:
                seen.add(method.name)
                yield from _walk(method, ())


@cache
def _methods(owner: type) -> tuple[ast.FunctionDef, ...]:
    definition = _classes(owner.__module__).get(owner.__name__)
    body = definition.body if definition else []
    return tuple(node for node in body if isinstance(node, ast.FunctionDef))


@cache
def _classes(module: str) -> dict[str, ast.ClassDef]:
    try:
        tree = ast.parse(inspect.getsource(sys.modules[module]))
    except (OSError, TypeError, KeyError, SyntaxError):
        return {}  # code that was never in a file
    return {node.name: node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}


def _walk(node: ast.AST, parents: tuple[ast.AST, ...]) -> Iterator[tuple[ast.AST, tuple[ast.AST, ...]]]:
    for child in ast.iter_child_nodes(node):
        yield child, (*parents, node)
        yield from _walk(child, (*parents, node))
