"""The house rules that a machine can check: lengths, arguments, one place for sys.path, train.py on two screens."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted(path for path in ROOT.rglob("*.py") if not {".venv", "runs", ".git"} & set(path.relative_to(ROOT).parts))
NAMES = [str(path.relative_to(ROOT)) for path in FILES]
PAGES = [ROOT / name for name in ("README.md", "EQUATIONS.md", "SILENCES.md", "LONG_RUN.md", "results/clean/README.md")]
PAGES += [ROOT / folder / "README.md" for folder in ("engine", "experiments", "results", "toy")]
MATHEMATICS = ("losses.py", "sampler.py", "model.py", "baselines.py",  # may have as many arguments as their formulas
               "tim.py", "meanflow.py", "shortcut.py")  # fmt: skip


def functions(path: Path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef):
            yield node


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_lines_and_functions_are_short(path):
    long = [number for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1) if len(line) > 120]
    assert not long, f"lines {long}"
    for node in functions(path):
        assert node.end_lineno - node.lineno < 60, f"{node.name} has more than 60 lines"
        names = [a.arg for a in node.args.posonlyargs + node.args.args + node.args.kwonlyargs]
        if path.name not in MATHEMATICS:
            assert len(names) - (names[:1] in (["self"], ["cls"])) <= 7, f"{node.name} has more than 7 arguments"


@pytest.mark.parametrize("path", PAGES, ids=[str(path.relative_to(ROOT)) for path in PAGES])
def test_running_text_is_short_too(path):
    """Lines of at most 120 characters, outside tables and code; the targets of links do not count."""
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.S)
    text = re.sub(r"\n\n(    .*\n)+", "\n\n", text)
    running = [line for line in text.splitlines() if not re.match(r"\s*(\||!\[|`[^`]*`$)", line)]
    long = [line for line in running if len(re.sub(r"\]\([^)]*\)", "]", line)) > 120]
    assert not long, long


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_a_program_touches_the_module_path_in_one_place_at_most(path):
    most = 2 if path.parent.name == "tests" else 1
    assert path.name == "test_house.py" or path.read_text(encoding="utf-8").count("sys.path") <= most


def test_the_loop_fits_on_two_screens():
    assert len((ROOT / "train.py").read_text(encoding="utf-8").splitlines()) <= 300
    assert {node.name for node in functions(ROOT / "train.py")} == {"gradient", "update", "train", "main"}


def test_the_ground_floor_is_the_paper():
    assert {path.stem for path in ROOT.glob("*.py")} <= {
        "model", "losses", "sampler", "data", "train", "sample", "recipe", "encoders", "baselines",
        "objectives"}  # fmt: skip
