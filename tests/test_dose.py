"""The command behind the dose figure, in its quick form."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from engine import checkpoint
from experiments import report

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_the_quick_form_measures_every_share_and_draws(tmp_path):
    flags = ["--quick", "--out", str(tmp_path / "dose"), "--runs", str(tmp_path / "runs"), "--device", "cpu"]
    result = subprocess.run(
        [sys.executable, "experiments/dose.py", *flags],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr
    for share in (0.0, 0.4):
        rows = report.read_rows(tmp_path / f"dose-quick/{share:g}")
        assert {row: set(seeds) for row, seeds in rows.items()} == dict.fromkeys(
            ("flow_matching", "self_e", "control"), {2, 3}
        )
        assert rows["self_e"][2]["training"]["wrong_captions"] == share
        assert checkpoint.read_json(tmp_path / f"dose-quick/{share:g}/settings.json")["sample_steps"] == [
            1,
            2,
            4,
            8,
        ]
    assert (tmp_path / "dose-quick/dose.png").exists()


def test_paired_differences_against_students_t():
    """Three pairs of scores and two without partner, the interval by hand: mean -+ 4.303 s / sqrt(3)."""

    def result(score):
        return {"splits": {"test": {"2": {"overall": {"score": score}}}}}

    rows = {
        "a": {1: result(0), 2: result(0.5), 3: result(0.7), 4: result(0.9)},
        "b": {2: result(0.4), 3: result(0.4), 4: result(0.4), 5: result(0)},
    }
    mean, half = report.difference(rows, "a", "b", 2)
    assert mean == pytest.approx(0.3) and half == pytest.approx(4.303 * 0.2 / 3**0.5)
