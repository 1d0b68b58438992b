"""Errors that a user can fix: one clear line that says what to do."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from engine import arguments, errors


@pytest.mark.parametrize(
    "wrong, right", [("--stepps", "--steps"), ("--dataset", "--data"), ("--nul-branch", "--null-branch")]
)
def test_a_wrong_flag_names_the_nearest_right_one(wrong, right):
    with pytest.raises(errors.UserError, match=f"there is no {wrong}; did you mean {right}"):
        arguments.parse([wrong, "3"])


def test_data_given_twice_is_all_of_it():
    assert arguments.parse(["--data", "a.tar", "--data", "b.tar"]).data == ["a.tar", "b.tar"]


@pytest.mark.skipif(os.name != "posix", reason="closes streams as a shell does")
@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_a_program_without_streams_does_its_work(closed, tmp_path):
    draw = (
        f"{sys.executable} sample.py --prompt ring --steps 1 --device cpu --out {tmp_path / 'x.png'} {closed}"
    )
    run = subprocess.run(["sh", "-c", draw], cwd=Path(__file__).parent.parent, capture_output=True, text=True)
    assert run.returncode == 0 and (tmp_path / "x.png").stat().st_size and "Traceback" not in run.stderr
