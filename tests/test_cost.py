"""The price of a training step of each objective, as a command."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from engine import errors
from experiments import cost
from objectives import AUX_FORWARDS, OBJECTIVES

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_every_objective_is_counted_and_costs_what_the_plan_says(tmp_path):
    result = subprocess.run(
        [
            sys.executable,
            "experiments/cost.py",
            "--batch",
            "8",
            "--repeats",
            "1",
            "--out",
            str(tmp_path / "cost.json"),
        ],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    rows = json.loads((tmp_path / "cost.json").read_text())["rows"]
    assert list(rows) == list(cost.KINDS) and {kind[0] for kind in cost.KINDS.values()} == set(OBJECTIVES)
    for label, (name, flags, aux) in cost.KINDS.items():
        assert rows[label]["kept_mib"] > 1 and rows[label]["seconds"] > 0
        if not flags:
            assert rows[label]["forward_passes"] == (AUX_FORWARDS if aux else OBJECTIVES[name].forwards)
    kept = [rows[label]["kept_mib"] for label in ("flow matching", "Self-E", "Self-E, auxiliary stage")]
    assert kept[1] == pytest.approx(kept[0], rel=0.01) and kept[2] > 1.3 * kept[0]


@pytest.mark.parametrize(
    "flags", [["--batch", "12"], ["--out", "/nowhere/at/all.json"], ["--objectives", "telepathy"]]
)
def test_bad_input_is_one_line(flags, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["cost.py", *flags])
    with pytest.raises(SystemExit) as stopped:
        errors.run(cost.main)
    assert stopped.value.code == 2 and len(capsys.readouterr().err.strip().splitlines()) == 1
