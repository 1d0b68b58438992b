"""The house rules that a machine can check: lengths of running text, one place for sys.path."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted(
    path for path in ROOT.rglob("*.py") if not {".venv", "runs", ".git"} & set(path.relative_to(ROOT).parts)
)
NAMES = [str(path.relative_to(ROOT)) for path in FILES]
PAGES = [
    ROOT / name
    for name in ("README.md", "EQUATIONS.md", "SILENCES.md", "LONG_RUN.md", "results/clean/README.md")
]
PAGES += [ROOT / folder / "README.md" for folder in ("engine", "experiments", "results", "toy")]


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


def test_the_ground_floor_is_the_paper():
    assert {path.stem for path in ROOT.glob("*.py")} <= {
        "model",
        "losses",
        "sampler",
        "data",
        "files",
        "emoji",
        "train",
        "sample",
        "recipe",
        "encoders",
        "bench",
        "rng",
        "objectives",
    }
