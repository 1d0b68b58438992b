"""The table of EQUATIONS.md cannot rot: every number, name and banner is there, and every proof can fail."""

import functools
import importlib
import inspect
import itertools
import re
from pathlib import Path

import pytest
import torch

from toy.identities import CHECKS

ROOT = Path(__file__).parent.parent
ROWS = re.findall(
    r"^\| ([s\d.]+) \| (.+?) \| `(\w+)\.([\w.]+)` \| (.+?) \|$", (ROOT / "EQUATIONS.md").read_text(), re.M
)
EQUATIONS = [str(n) for n in range(1, 23)] + [f"s.{n}" for n in range(1, 14)]


def function_of(module: str, name: str):
    value = importlib.import_module(module)
    for part in filter(None, name.split(".")):
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


def holds(proof: str) -> bool:
    """Whether an identity or a test, by its name in the table, passes now."""
    file, _, test = proof.strip("`").partition("::")
    try:
        if not test:
            line = next(line for line in CHECKS if line.function.__name__ == file)
            return line.holds(line.function())
        function = function_of(Path(file).stem, test)
        (cases,) = function.pytestmark  # of one argument each
        for value in cases.args[1]:
            function(value)
    except AssertionError:
        return False
    return True


def spoilt(value):
    """Everything floating point that a function returns, a tenth too large and a little more."""
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return 1.1 * value + 0.01
    if isinstance(value, tuple) and not hasattr(value, "_fields"):
        return tuple(map(spoilt, value))
    return value


@pytest.mark.parametrize(
    "number, module, name, proof", [(r[0], *r[2:]) for r in ROWS], ids=[r[0] for r in ROWS]
)
def test_a_wrong_function_fails_its_proof(number, module, name, proof, monkeypatch):
    *path, last = name.split(".")
    owner, right = function_of(module, ".".join(path)), function_of(module, name)

    @functools.wraps(right)
    def wrong(*a, **k):
        return spoilt(right(*a, **k))

    if name == "Denoiser.forward":  # Eq. s.10 says what the second time input is: t - s, not s
        wrong = lambda self, x_t, t, s, *c: right(self, x_t, t, t - s, *c)  # noqa: E731

    assert holds(proof), f"{proof} fails by itself"
    monkeypatch.setattr(owner, last, wrong)
    assert not holds(proof), f"{proof} does not notice a wrong {module}.{name}"
