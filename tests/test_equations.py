"""The table of EQUATIONS.md cannot rot: every number, name and banner is there, and every proof can fail."""

import importlib
import inspect
import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from toy.identities import CHECKS

ROOT = Path(__file__).parent.parent
ROWS = re.findall(
    r"^\| ([s\d.]+) \| (.+?) \| `(\w+)\.([\w.]+)` \| (.+?) \|$", (ROOT / "EQUATIONS.md").read_text(), re.M
)
EQUATIONS = [str(n) for n in range(1, 23)] + [f"s.{n}" for n in range(1, 14)]


def node(proof: str) -> str:
    """What pytest calls a proof of the table."""
    name = proof.strip("`")
    return name if "::" in name else f"tests/test_toy.py::test_identity[{name}]"


def function_of(module: str, name: str):
    value = importlib.import_module(module)
    for part in name.split("."):
        value = getattr(value, part)
    return value


def test_every_equation_is_in_the_table_once():
    assert [row[0] for row in ROWS] == EQUATIONS


@pytest.mark.parametrize("number, module, name", [(r[0], r[2], r[3]) for r in ROWS], ids=[r[0] for r in ROWS])
def test_the_function_stands_under_the_banner(number, module, name):
    """The nearest banner above the function, or its docstring, has the number."""
    function = function_of(module, name)
    above = (ROOT / f"{module}.py").read_text().splitlines()[: inspect.getsourcelines(function)[1] - 1]
    first = max(i for i, line in enumerate(above) if line.startswith("# Eq. "))
    while above[first - 1].startswith("# ") and not above[first - 1].startswith("# ---"):
        first -= 1
    banner = itertools.takewhile(lambda line: line.startswith("#"), above[first:])
    text = "\n".join([*banner, function.__doc__])
    spans = re.findall(r"s\.(\d+)\s*(?:to|-)\s*s\.(\d+)", text)
    numbers = {f"s.{n}" for a, b in spans for n in range(int(a), int(b) + 1)}
    numbers |= set(re.findall(r"(?<![\d.])(?:s\.)?\d+(?!\d|\.\d)", text))
    assert number in numbers, f"no {number} above {module}.{name}"


def test_every_proof_is_there():
    identities = {line.function.__name__ for line in CHECKS}
    for *_, proof in ROWS:
        name = proof.strip("`")
        file, _, test = name.partition("::")
        assert name in identities or f"def {test}(" in (ROOT / file).read_text(), name


# A wrong function: everything floating point that the right one returns, a tenth too large and a little more.
WRONG = """
import functools, sys
import pytest, torch
module, _, name = sys.argv[1].partition('.')
target = owner = __import__(module)
*path, last = name.split('.')
for part in path:
    owner = getattr(owner, part)
right = getattr(owner, last)

def spoil(value):
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return 1.1 * value + 0.01
    if isinstance(value, tuple) and not hasattr(value, '_fields'):
        return tuple(map(spoil, value))
    return value

@functools.wraps(right)
def wrong(*a, **k):
    return spoil(right(*a, **k))

if sys.argv[1] == 'model.Denoiser.forward':  # Eq. s.10 says what the second time input is: t - s, not s
    def wrong(self, x_t, t, s, *c):
        return right(self, x_t, t, t - s, *c)
if '--right' not in sys.argv:
    setattr(owner, last, wrong)
sys.exit(pytest.main(['-q', '-x', '-p', 'no:cacheprovider', '-m', '', sys.argv[2]]))
"""


def outcome(function: str, test: str, *more: str) -> int:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", WRONG, function, test, *more], cwd=ROOT, env=environment, capture_output=True
    ).returncode


@pytest.mark.slow
@pytest.mark.parametrize(
    "number, function, proof", [(r[0], f"{r[2]}.{r[3]}", node(r[4])) for r in ROWS], ids=[r[0] for r in ROWS]
)
def test_a_wrong_function_fails_its_proof(number, function, proof):
    assert outcome(function, proof, "--right") == 0, f"{proof} is not there, or fails by itself"
    assert outcome(function, proof) == 1, f"{proof} does not notice a wrong {function}"
