"""The command behind the tables, in its quick form: trains, searches, scores, resumes, reports."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def command(folder: Path, *arguments):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "experiments/tables.py", "--quick", "--out", str(folder / "results"),
                           "--runs", str(folder / "runs"),
                           "--device", "cpu", "--rows", "flow_matching", "self_e", *arguments],
                          cwd=ROOT, env=environment, capture_output=True, text=True)  # fmt: skip


@pytest.mark.slow
def test_the_quick_form_makes_every_file_and_goes_on_where_it_stopped(tmp_path):
    first = command(tmp_path, "--seeds", "0")
    assert first.returncode == 0, first.stderr
    out = tmp_path / "results-quick"
    row = json.loads((out / "rows/self_e-0.json").read_text())
    assert {"command", "commit", "hardware", "seconds", "seed"} <= set(row) and row["training"]["steps"] == 4
    assert set(row["splits"]) == {"test", "pairs"} and set(row["splits"]["test"]) == {"1", "2"}
    flow = json.loads((out / "rows/flow_matching-0.json").read_text())
    assert {s["settings"]["s_rule"] for s in flow["splits"]["test"].values()} == {1.0}
    assert {"guidance", "eta", "s_rule"} == set(row["splits"]["test"]["2"]["settings"])
    points = json.loads((out / "rows/self_e-progress-0.json").read_text())["points"]
    assert [p["step"] for p in points] == [2, 4]
    assert all((out / name).exists() for name in ("table2.md", "scores.png", "progress.png"))
    table = (out / "table2.md").read_text()
    assert "Flow Matching" in table and "| 0.610 |" in table
    before = (out / "rows/self_e-0.json").read_bytes()
    second = command(tmp_path, "--seeds", "0", "1")
    assert second.returncode == 0, second.stderr
    assert (out / "rows/self_e-0.json").read_bytes() == before and (out / "rows/self_e-1.json").exists()
    assert "minus" in (out / "table2.md").read_text()
