"""The house rules that a machine can check: what may import what, how long running text is."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TRACKED = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True).stdout.split()
PROGRAMS = [name for name in TRACKED if not name.startswith("tests/") and (ROOT / name).exists()]
OURS = {name.removesuffix(".py").replace("/", "."): (ROOT / name).read_text("utf-8") for name in PROGRAMS}
PAGES = ["README.md", "EQUATIONS.md", "SILENCES.md", "EXERCISES.md", "DATA.md", "LONG_RUN.md"]
PAGES += [f"{folder}/README.md" for folder in ("engine", "experiments", "peers", "results", "toy")]


@pytest.mark.parametrize("page", PAGES)
def test_running_text_is_short(page):
    """Lines of at most 120 characters, outside tables and code; the targets of links do not count."""
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.S)
    text = re.sub(r"\n\n(    .*\n)+", "\n\n", text)
    running = [line for line in text.splitlines() if not re.match(r"\s*(\||!\[|`[^`]*`$)", line)]
    long = [line for line in running if len(re.sub(r"\]\([^)]*\)", "]", line)) > 120]
    assert not long, long


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
