"""What a file of code imports."""

import ast
from collections.abc import Iterator
from pathlib import Path

from tests.support.places import ROOT


def imported(path: Path) -> set[str]:
    """Return what a file imports, at any depth of its code: `package.module`, and `package.module.name` of `from`.

    Relative imports are resolved. What stands under `if TYPE_CHECKING` is not imported when the code runs.
    """
    names = set()
    for node in walk_imports(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        else:
            package = path.relative_to(ROOT).parts[: -node.level] if node.level else ()
            names |= {".".join((*package, *filter(None, [node.module]), alias.name)) for alias in node.names}
    return names


def walk_imports(node: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """Yield the imports below a node, without those that only a type checker makes."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child
        elif not (isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"):
            yield from walk_imports(child)
