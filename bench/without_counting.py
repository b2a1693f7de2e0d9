"""Makes processes of the broker count nothing: for `bench.metrics_cost` to compare with.

`install` has every module of the broker compiled without the statements that only count: additions
to counters, observations of histograms, samples for `broker top` and for rates.
`python -m bench.without_counting FOLDER` takes them out of another checkout, for `bench.compare`.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType

PACKAGES = ("broker", "gateway", "shards")
KEPT = {"clients_total", "subscriptions_total"}
"""Counters that also number things."""
COUNTERS = {"received_bytes", "sent_bytes"}
METHODS = {"observe", "count_refused", "count_failure"}
ADDED_TO = {"hot", "closed_total", "failures_total"}
BODIES = {
    ("FanOut", "flush"): "if self._hub.has_events: self._hub.flush()",
    ("Vitals", "_sample"): "self._samples.append((time.monotonic(), self._read()))",
}


class _Strip(ast.NodeTransformer):
    def __init__(self) -> None:
        self.removed = 0
        self._class = ""

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        self._class = node.name
        return self.generic_visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        if (body := BODIES.get((self._class, node.name))) is not None:
            node.body = ast.parse(body).body
            self.removed += 1
            return node
        return self.generic_visit(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> ast.AST:
        target = node.target.value if isinstance(node.target, ast.Subscript) else node.target
        name = target.id if isinstance(target, ast.Name) else _name(target)
        counts = name in COUNTERS or (name.endswith("total") and name not in KEPT)
        return self._gone(node) if counts else node

    def visit_Expr(self, node: ast.Expr) -> ast.AST:
        call = node.value
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute):
            owner = call.func.value
            adds = call.func.attr == "add" and isinstance(owner, ast.Attribute)
            if call.func.attr in METHODS or (adds and _name(owner) in ADDED_TO):
                return self._gone(node)
        return node

    def visit_If(self, node: ast.If) -> ast.AST:
        samples = any(isinstance(n, ast.Attribute) and n.attr == "due" for n in ast.walk(node.test))
        return self._gone(node) if samples else self.generic_visit(node)

    def _gone(self, node: ast.stmt) -> ast.AST:
        self.removed += 1
        return ast.copy_location(ast.Pass(), node)


def _name(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else ""


def stripped(source: str) -> tuple[ast.Module, int]:
    """The module without what only counts, and how many statements that were."""
    strip = _Strip()
    tree = ast.fix_missing_locations(strip.visit(ast.parse(source)))
    return tree, strip.removed


class _Loader(SourceFileLoader):
    def get_code(self, fullname: str) -> CodeType:
        tree, _ = stripped(self.get_data(self.path).decode())
        return compile(tree, self.path, "exec", dont_inherit=True)


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.partition(".")[0] not in PACKAGES:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _Loader(fullname, spec.loader.path)
        return spec


def install() -> None:
    """From now on, in this process."""
    sys.meta_path.insert(0, _Finder())


def main() -> int:
    """Rewrite the modules in the folder that is named."""
    (folder,) = map(Path, sys.argv[1:])
    if folder.resolve() == Path(__file__).resolve().parents[1]:
        print("that is this checkout: name another one", file=sys.stderr)
        return 2
    for package in PACKAGES:
        for path in (folder / package).rglob("*.py"):
            tree, _ = stripped(path.read_text(encoding="utf-8"))
            path.write_text(ast.unparse(tree), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
