"""The house rules that a machine can check: what may import what."""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
TRACKED = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True).stdout.split()
PROGRAMS = [name for name in TRACKED if not name.startswith("tests/") and (ROOT / name).exists()]
OURS = {name.removesuffix(".py").replace("/", "."): (ROOT / name).read_text("utf-8") for name in PROGRAMS}


def imports(source: str) -> set[str]:
    """The modules that a source imports, anywhere in it: "engine.errors" for `from engine import errors`."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def of_ours(source: str) -> set[str]:
    return imports(source) & OURS.keys()


def test_the_ground_floor_stands_on_its_own():
    libraries = {name.partition(".")[0] for name in imports(OURS["losses"])} - sys.stdlib_module_names
    assert libraries == {"torch", "numpy", "rng"}
    assert not of_ours(OURS["model"])
    for name in ("data", "files", "recipe", "encoders"):
        of_engine = {other for other in of_ours(OURS[name]) if other.startswith("engine.")}
        assert of_engine <= {"engine.errors"}, name


def test_imports_make_no_circle():
    left = {name: of_ours(source) for name, source in OURS.items()}
    while free := [name for name, needs in left.items() if not needs & left.keys()]:
        for name in free:
            del left[name]
    assert not left, f"in a circle, or above one: {left}"
