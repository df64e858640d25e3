"""Adapted layers whose parent never calls them.

An adapter acts where its layer is called. Some parents read `layer.weight` and compute with it themselves: Mamba's
convolution, the TDNN layers of speech models, nn.MultiheadAttention's out_proj. Others, such as T5's `shared`, only
hold a weight that another embedding looks up. In such layers the factors get no gradient and keep their initial values,
so merging them would add a random dW that no forward has used.

How a parent uses a child is read from its source code when the adapter is attached. What this does not show, such as a
weight read by a helper function or by the parent's parent, is seen in the first forward (`watch_uses`). Many readers
of a layer that is called as well only ask for the dtype or the shape; what they do with the weight, their source says.
"""

import ast
import functools
import inspect
import textwrap
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import CodeType, FrameType
from typing import NamedTuple

from torch import nn

# What code asks of a weight without computing with it.
METADATA = {
    "data_ptr", "device", "dim", "dtype", "element_size", "is_meta", "ndim", "numel", "quant_state", "requires_grad",
    "requires_grad_", "shape", "size", "stride",
}  # fmt: skip
QUESTIONS = {"getattr", "hasattr", "id", "isinstance", "len", "type"}
# Base classes that mention no child by name, and whose long sources would take seconds to parse.
INFRASTRUCTURE = ("transformers.modeling_", "transformers.generation", "transformers.integrations")
# Methods that set a model up rather than run it.
SETUP = ("__init__", "_init", "get_", "init_", "reset_", "_reset", "resize_", "set_", "tie_", "_tie")


class Use(NamedTuple):
    """What a parent's methods do with a child.

    reads: they compute with the child's weight themselves. calls: they call the child or hand it on.
    """

    reads: bool
    calls: bool


@contextmanager
def watch_uses(layers: Iterable[nn.Module]) -> Iterator[list[nn.Module]]:
    """Let adapted layers note in `uses` whether they are called and what is done with their weight. The list that this
    gives holds, in the end, those that are called and whose weight others compute with."""
    layers, both = list(layers), []
    for layer in layers:
        layer.uses = set()
    try:
        yield both
    finally:
        for layer in layers:
            if "reads" in layer.uses and "calls" not in layer.uses:
                layer.bypassed = True
            elif layer.uses >= {"calls", "computes"}:
                both.append(layer)
            layer.uses = None


def list_uses(reader: FrameType) -> set[str]:
    """Return "reads" and, if the line that reads a weight also computes with it, "computes". Torch's own modules only
    ask whether they may take a fast path."""
    computes = not reader.f_globals.get("__name__", "").startswith("torch.")
    return {"reads", "computes"} if computes and _computes_at(reader.f_code, reader.f_lineno) else {"reads"}


@functools.cache
def _computes_at(code: CodeType, line: int) -> bool:
    """Return whether this line of a function computes with a `.weight`, as far as its source tells."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(code)))
    except (OSError, SyntaxError, ValueError):
        return False
    parent_of = _find_parents(ast.increment_lineno(tree, code.co_firstlineno - 1))
    return any(
        isinstance(node, ast.Attribute)
        and node.attr == "weight"
        and node.lineno <= line <= node.end_lineno
        and _is_computed_with(node, parent_of)
        for node in parent_of
    )


def find_use(parent: nn.Module, child: str) -> Use:
    """Return what the parent's class does with its child of this name, as far as its source tells."""
    uses = _read_class(type(parent))
    return Use(reads=(child, "reads") in uses, calls=(child, "calls") in uses)


def mentions_in_forward(cls: type, text: str) -> bool:
    """Return whether the source of a class's forward contains a text; False where there is no source."""
    try:
        return text in inspect.getsource(cls.forward)
    except (OSError, TypeError):
        return False


@functools.cache
def _read_class(cls: type) -> frozenset[tuple[str, str]]:
    """Return (child, "reads" or "calls") for every use of a `self.child` in the methods of the class and its bases."""
    uses: set[tuple[str, str]] = set()
    overridden: set[str] = set()
    for base in inspect.getmro(cls):
        if base in (nn.Module, object) or base.__module__.startswith(INFRASTRUCTURE):
            continue
        for method in _parse_methods(base):
            if method.name not in overridden and not method.name.startswith(SETUP):
                uses |= _read_method(method)
            overridden.add(method.name)
    return frozenset(uses)


def _parse_methods(cls: type) -> list[ast.FunctionDef]:
    try:
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    except (OSError, TypeError, SyntaxError, ValueError):  # classes without a source file, or made on the fly
        return []
    return [node for node in getattr(definition, "body", ()) if isinstance(node, ast.FunctionDef)]


def _find_parents(tree: ast.AST) -> dict[ast.AST, ast.AST]:
    return {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}


def _read_method(method: ast.FunctionDef) -> set[tuple[str, str]]:
    parent_of = _find_parents(method)
    uses = set()
    for node in ast.walk(method):
        if not (isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"):
            continue
        if not isinstance(node.ctx, ast.Load):
            continue
        user = parent_of[node]
        if isinstance(user, ast.Attribute):
            if user.attr == "weight" and _is_computed_with(user, parent_of):
                uses.add((node.attr, "reads"))
        elif not _is_question(user, node):
            uses.add((node.attr, "calls"))
    return uses


def _is_computed_with(weight: ast.Attribute, parent_of: dict) -> bool:
    user = parent_of[weight]
    if isinstance(user, ast.Attribute):
        return user.attr not in METADATA
    return isinstance(weight.ctx, ast.Load) and not _is_question(user, weight)


def _is_question(user: ast.AST, argument: ast.AST) -> bool:
    """Return whether the user is a call such as isinstance(argument, ...)."""
    named = isinstance(user, ast.Call) and isinstance(user.func, ast.Name)
    return named and argument is not user.func and user.func.id in QUESTIONS
