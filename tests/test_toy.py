"""The folder toy/: every line of the identity table, the commands as a student runs them, and the measures it reports."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from toy import identities  # noqa: E402


def python(*args, cwd=ROOT) -> subprocess.CompletedProcess:
    """Run a command as a user would, on one thread."""
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *map(str, args)], cwd=cwd, env=env, capture_output=True, text=True)


@pytest.mark.parametrize("line", identities.CHECKS, ids=[line[-1].__name__ for line in identities.CHECKS])
def test_identity(line):
    equation, claim, bound, is_above, function = line
    number = function()
    assert number >= bound if is_above else number <= bound, f"{equation}: {claim}: {number:.2e} against {bound:.0e}"


def test_the_table_runs_from_any_folder(tmp_path):
    run = python(ROOT / "toy" / "identities.py", "--only", "Eq. 19", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert "3 of 3 lines hold" in run.stdout and "FAILS" not in run.stdout


def test_a_failing_line_fails_the_command():
    broken = "import losses; losses.lam = lambda t, s: t - s; from toy import identities; import sys; sys.argv = ['x', '--only', 'Eq. 17']; sys.exit(identities.main())"  # fmt: skip
    run = python("-c", broken)
    assert run.returncode == 1 and "FAILS" in run.stdout, run.stderr


def test_an_unknown_equation_is_refused():
    run = python("toy/identities.py", "--only", "Eq. 99")
    assert run.returncode == 2 and "Eq. 99" in run.stderr and "Traceback" not in run.stderr
