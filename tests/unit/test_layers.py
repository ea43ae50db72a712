"""The structure of the package: imports point down the list of layers, and no modules import each other in a circle."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import weightferry

ROOT = Path(weightferry.__file__).parent
# From top to bottom, as in CONTRIBUTING. A module imports from its own layer and from the layers below it.
LAYERS = (
    ("__main__", "__init__", "cli"),
    ("doctor",),
    ("testing",),
    ("launch",),
    ("pretrainer", "once", "repair_cache"),
    ("collection",),
    ("staging",),
    ("phases",),
    ("loading",),
    ("transfer",),
    ("cache",),
    ("cluster",),
    ("origins",),
    ("report",),
    ("manifest",),
    ("fetching",),
    ("sources", "settings", "hashing"),
    ("errors", "_version"),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def imports_of(path: Path) -> set[str]:
    """The modules of the package that a module imports, also inside functions and for the type checker alone."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            # "from package import module" imports the module.
            below = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [node.module, *(name for name in below if exists(name))]
            if all(exists(name) for name in below):
                names = below
        found.update(name.removeprefix("weightferry.") for name in names if name.startswith("weightferry."))
    return found


def exists(name: str) -> bool:
    path = ROOT.parent.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


MODULES = {module_name(path): imports_of(path) for path in sorted(ROOT.rglob("*.py"))}


def test_every_module_has_a_layer() -> None:
    assert {name.split(".")[0] for name in MODULES} == LEVEL.keys()


def test_no_import_points_up() -> None:
    upward = [
        f"{name} imports {other}"
        for name, imports in MODULES.items()
        for other in imports
        if LEVEL[name.split(".")[0]] > LEVEL[other.split(".")[0]]
    ]
    assert not upward


def test_no_modules_import_each_other_in_a_circle() -> None:
    TopologicalSorter(MODULES).prepare()
