"""Check that modules import downward only, and never in a circle."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Set
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "src" / "ditfastattn"
API = ("ditfastattn", "ditfastattn.backend", "ditfastattn.exporting")

# From the ground up. A room holds the modules of its folder that no more specific room holds.
ROOMS = (
    "core",
    "passes.graph",
    "passes.windows",
    "passes.capture",
    "passes.analysis",
    "passes.plan",
    "passes.rewrites",
    "runtime",
    "export",
    "api",
    "serving",
    "tools",
)

Imports = Mapping[str, frozenset[str]]


def imports_of(package: Path) -> Imports:
    """Return what each module below ``package`` imports of it, anywhere in its code.

    Imports inside functions and under ``TYPE_CHECKING`` count too. Names begin after the package's.
    """
    # Path.rglob does not follow links to folders, and the rooms are links.
    files = sorted(Path(file) for file in _python_files(package))
    modules = {_module_name(package, file): file for file in files}
    return {
        name: frozenset(_imported(ast.parse(file.read_text()), modules, package.name)) - {name}
        for name, file in modules.items()
    }


def _python_files(folder: Path) -> Iterator[Path]:
    for path in folder.iterdir():
        if path.is_dir():
            yield from _python_files(path)
        elif path.suffix == ".py":
            yield path


def _module_name(package: Path, file: Path) -> str:
    parts = file.relative_to(package).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imported(tree: ast.Module, modules: Mapping[str, Path], package: str) -> Iterator[str]:
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):  # of a package, its modules or its own names
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            if name.partition(".")[0] == package:
                inner = name.removeprefix(package).removeprefix(".")
                yield inner if inner in modules else inner.rpartition(".")[0]


def room_of(module: str) -> int:
    """Return how high the room of ``module`` is."""
    if f"ditfastattn.{module}".removesuffix(".") in API:
        return ROOMS.index("api")
    holding = [room for room in ROOMS if f"{module}.".startswith(f"{room}.")]
    if not holding:
        raise LookupError(f"{module} is in no room")
    return ROOMS.index(max(holding, key=len))


def upward(imports: Imports) -> set[tuple[str, str]]:
    """Return the imports of modules of a higher room."""
    return {
        (module, imported)
        for module, targets in imports.items()
        for imported in targets
        if room_of(imported) > room_of(module)
    }


def circles(imports: Imports) -> list[list[str]]:
    """Return the sets of modules that import each other, directly or through others."""
    reached = {module: _reachable(module, imports) for module in imports}
    found = {
        tuple(sorted(other for other in reached[module] if module in reached[other]))
        for module in imports
        if module in reached[module]
    }
    return [list(circle) for circle in sorted(found)]


def _reachable(module: str, imports: Imports) -> set[str]:
    seen: set[str] = set()
    pending = list(imports[module])
    while pending:
        current = pending.pop()
        if current not in seen:
            seen.add(current)
            pending.extend(imports.get(current, ()))
    return seen


@pytest.fixture(scope="module")
def imports() -> Imports:
    found = dict(imports_of(PACKAGE))
    del found["passes"]  # holds the rooms, and imports nothing
    return found


def test_no_module_imports_from_a_higher_room(imports: Imports) -> None:
    assert _lines(upward(imports)) == ""


def test_no_modules_import_each_other(imports: Imports) -> None:
    assert circles(imports) == []


@pytest.mark.parametrize(
    "line",
    [
        "from ditfastattn.export import bundle",
        "from ditfastattn.export.bundle import write",
        "import ditfastattn.export.bundle",
        "def later():\n    from ditfastattn.export.bundle import write",
        "if TYPE_CHECKING:\n    from ditfastattn.export.bundle import Bundle",
    ],
)
def test_an_upward_import_is_found_wherever_it_stands(tmp_path: Path, line: str) -> None:
    found = imports_of(_package(tmp_path, {"runtime/load.py": line, "export/bundle.py": ""}))
    assert upward(found) == {("runtime.load", "export.bundle")}


def test_a_circle_is_found_through_other_modules(tmp_path: Path) -> None:
    files = {
        "runtime/a.py": "from ditfastattn.runtime import b",
        "runtime/b.py": "from ditfastattn.runtime.c import name",
        "runtime/c.py": "from ditfastattn.runtime.a import name",
        "runtime/d.py": "from ditfastattn.runtime.a import name",
    }
    found = imports_of(_package(tmp_path, files))
    assert circles(found) == [["runtime.a", "runtime.b", "runtime.c"]]
    assert upward(found) == set()


def test_a_module_outside_every_room_is_refused(tmp_path: Path) -> None:
    files = {"stray.py": "from ditfastattn.core import errors", "core/errors.py": ""}
    with pytest.raises(LookupError, match="stray is in no room"):
        upward(imports_of(_package(tmp_path, files)))


def _lines(pairs: Set[tuple[str, str]]) -> str:
    return "\n".join(f"{module} imports {imported}" for module, imported in sorted(pairs))


def _package(folder: Path, files: Mapping[str, str]) -> Path:
    package = folder / "ditfastattn"
    for name, text in files.items():
        path = package / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return package
