"""The command behind the tables, in its quick form: trains, searches, scores, resumes, reports."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def command(folder: Path, *arguments):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [
            sys.executable,
            "experiments/tables.py",
            "--quick",
            "--out",
            str(folder / "results"),
            "--runs",
            str(folder / "runs"),
            "--device",
            "cpu",
            "--rows",
            "flow_matching",
            "self_e",
            *arguments,
        ],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )


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


@pytest.mark.slow
def test_sigterm_stops_the_training_too(tmp_path):
    """Sent to tables.py alone, as `kill` does: train.py saves and ends with it, and the same command goes on."""
    runs = tmp_path / "runs"
    arguments = [
        sys.executable,
        "experiments/tables.py",
        "--out",
        str(tmp_path / "results"),
        "--runs",
        str(runs),
        "--device",
        "cpu",
        "--rows",
        "self_e",
        "--seeds",
        "0",
        "--milestones",
        "0",
        "--budget",
        "--steps 100000 --batch-size 8 --grid-every 0 --no-compile --log-every 1",
    ]
    process = subprocess.Popen(
        arguments, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    log = runs / "self_e-0/metrics.jsonl"
    try:
        while not log.exists() or not log.read_text():
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.1)
        process.terminate()
        complaints = process.communicate(timeout=60)[1]
        with pytest.raises(ProcessLookupError):  # nobody is left in the group
            os.killpg(process.pid, 0)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 130 and "the same command goes on" in complaints
    assert (
        len(list((runs / "self_e-0/state").glob("step_*"))) == 1
        and not (runs / "self_e-0/done.json").exists()
    )
