"""What an attack found: odd flags, caches, indices, tars, captions, weights, results and variables of the environment.

Each case once ended in a traceback, a wait, a silent wrong result or more than one line. Now it is one line and exit
code 2 with the disk as it was, or a sample that is skipped and counted.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import model
import sample
import train
from engine import checkpoint, errors, feed, watch
from engine.processes import Ranks
from experiments import evaluate, tables
from scale import cache
from toy import any_step, explore, identities

ROOT = Path(__file__).parent.parent
TINY = dict(
    width=16, heads=2, double=1, single=1, axes=(2, 2, 4), channels=3, patch=4, txt_dim=256, vec_dim=256
)
CPU = ["--device", "cpu", "--precision", "fp32"]
QUICK = ["--batch-size", "4", *CPU, "--no-compile", "--grid-every", "0"]


def refused(program, words, monkeypatch, capsys) -> str:
    """The one line with which a program refuses its arguments; it must end with exit code 2."""
    monkeypatch.setattr(sys, "argv", [f"{program.__name__}.py", *map(str, words)])
    with pytest.raises(SystemExit) as stopped:
        errors.run(program.main)
    lines = [line for line in capsys.readouterr().err.strip().splitlines() if "it/s" not in line]
    assert stopped.value.code == 2 and len(lines) == 1, lines
    return lines[0]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of two iterations of a tiny network, with a state of each."""
    out = tmp_path_factory.mktemp("runs") / "tiny"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(model.SIZES, "laptop", TINY)
        patch.setattr(
            sys, "argv", ["train.py", "--steps", "2", "--save-every", "1", "--out", str(out), *QUICK]
        )
        train.main()
    return out


@pytest.fixture
def run(trained, tmp_path, monkeypatch):
    """A copy of the run, in a folder of its own that we are in."""
    monkeypatch.setitem(model.SIZES, "laptop", TINY)
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(trained, "r"))


def edit(path: Path, **changes) -> None:
    """Change entries of a JSON file; ... takes one out."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not ...}))


def tree(folder: Path) -> dict:
    return {path: path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


# ------------------------------------------------------------------------------------------------------------
# Flags
# ------------------------------------------------------------------------------------------------------------
HUGE = 2**62
FLAGS = [
    (train, ["--data", ""]),
    (train, ["--init", ""]),
    (train, ["--index", "", "--data", "one-shape"]),
    (train, ["--out", "a" * 300]),
    (sample, ["--checkpoint", "", "--prompt", "x"]),
    (sample, ["--prompt", "x", "--images", 20000, "--scale", 64]),
    (feed, ["--out", ""]),
    (feed, ["--data", ""]),
    (cache, ["", "c", "--side", 32]),
    (cache, ["t", "", "--side", 32]),
    (evaluate, ["--images", 10**18, "--per-tag", 1]),
    (tables, ["--steps", 10**18]),
    (tables, ["--seeds", -1]),
    (any_step, ["--steps", 10**30]),
    (explore, ["--out", ""]),
    (identities, ["--seed", "x"]),
    (identities, ["--seed", 10**30]),
    (identities, ["--out", "."]),
    (train, ["--dry-run", "--side", 6]),
    (train, ["--dry-run", "--size", "2b", "--side", 104]),
]


def called(x) -> str:
    return getattr(x, "__name__", None) or " ".join(map(str, x))[:40]


@pytest.mark.parametrize("program, words", FLAGS, ids=called)
def test_odd_flags(program, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    refused(program, words, monkeypatch, capsys)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "variables",
    [
        {"WORLD_SIZE": "two"},
        {"WORLD_SIZE": ""},
        {"WORLD_SIZE": "0"},
        {"WORLD_SIZE": "-1"},
        {"RANK": "1"},
        {"RANK": "x"},
        {"WORLD_SIZE": "2", "RANK": "5"},
        {"WORLD_SIZE": "2", "RANK": "-1"},
        {"WORLD_SIZE": "1", "RANK": "3"},
    ],
    ids=str,
)
def test_an_environment_that_torchrun_did_not_make(variables, monkeypatch):
    for name in ("WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)
    assert Ranks.of_environment() == Ranks(1, 0)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(errors.UserError, match="torchrun"):
        Ranks.of_environment()


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "x"},
        {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "99999"},
    ],
    ids=str,
)
def test_processes_without_a_place_to_meet(variables, monkeypatch):
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items() | {("WORLD_SIZE", "2"), ("RANK", "0")}:
        monkeypatch.setenv(name, value)
    with pytest.raises(errors.UserError, match="did not meet"), Ranks(2, 0).connected(torch.device("cpu"), 1):
        pass


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="has no full device")
def test_a_full_disk_behind_stdout_is_one_line(tmp_path):
    with open("/dev/full", "w") as full:
        result = subprocess.run(
            [sys.executable, "-m", "engine.feed", "--out", str(tmp_path / "x.png")],
            cwd=ROOT,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert result.returncode == 2 and len(result.stderr.strip().splitlines()) == 1


# ------------------------------------------------------------------------------------------------------------
# Runs and their weights
# ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.int8, torch.complex64], ids=str)
def test_weights_are_numbers_with_a_point(dtype, run, monkeypatch, capsys):
    path = run / "model.safetensors"
    weights = {name: tensor.to(dtype) for name, tensor in load_file(path).items()}
    path.unlink()
    save_file(weights, path)
    for program, words in (
        (sample, ["--checkpoint", "r", "--prompt", "x", "--device", "cpu", "--out", "x.png"]),
        (checkpoint, ["r", "m"]),
        (train, ["--init", "r", "--out", "n", *QUICK]),
    ):
        assert "model.safetensors" in refused(program, words, monkeypatch, capsys)
    assert sorted(path.name for path in Path(".").iterdir()) == ["r"]


@pytest.mark.parametrize(
    "spoil, words",
    [
        (lambda run: None, ["r", "r/state/step_00000001"]),
        (lambda run: None, ["r", ""]),
        (lambda run: (run / "config.json").write_text("null"), ["r", "m"]),
        (lambda run: (run / "config.json").write_text('{"a": 1}'), ["r", "m"]),
        (lambda run: [(run / "metrics.jsonl").unlink(), (run / "metrics.jsonl").mkdir()], ["r", "m"]),
    ],
    ids=["onto its own state", "to nowhere", "no config", "another's config", "metrics a folder"],
)
def test_exports_that_would_lose_something(spoil, words, run, monkeypatch, capsys):
    spoil(run)
    before = tree(Path("."))
    refused(checkpoint, words, monkeypatch, capsys)
    assert tree(Path(".")) == before


def test_a_weight_too_large_for_fp16_is_not_given_away_as_infinity(run, monkeypatch, capsys):
    path = run / "model.safetensors"
    weights = {name: tensor.clone() for name, tensor in load_file(path).items()}
    weights["img_in.weight"][0, 0] = 1e6
    path.unlink()
    save_file(weights, path)
    assert "too large for torch.float16" in refused(
        checkpoint, ["r", "m", "--dtype", "fp16"], monkeypatch, capsys
    )


@pytest.mark.parametrize(
    "words", [["--objective", "meanflow"], ["--init", "r", "--resume", "--out", "r"]], ids=str
)
def test_weights_that_mean_something_else_in_this_run(words, run, monkeypatch, capsys):
    """Shapes agree where the scale of times does not; and a run that goes on has begun already."""
    refused(train, ["--init", "r", "--steps", 3, "--out", "n", *QUICK, *words], monkeypatch, capsys)


@pytest.mark.parametrize("name", ["network.safetensors", "model.safetensors", "adam.pt", "state.json"])
@pytest.mark.parametrize("how", ["missing", "garbage", "a folder"])
def test_a_damaged_state_says_what_to_delete(name, how, run, monkeypatch, capsys):
    path = run / "state/step_00000002" / name
    path.unlink()
    if how == "garbage":
        path.write_bytes(b"garbage")
    elif how == "a folder":
        path.mkdir()
    words = ["--resume", "--out", "r", "--steps", 4, "--device", "cpu"]
    line = refused(train, words, monkeypatch, capsys)
    assert "delete r/state/step_00000002 to go on from step_00000001" in line
    shutil.rmtree(run / "state/step_00000001")
    assert "no older" in refused(train, words, monkeypatch, capsys)


def test_the_hundred_millionth_iteration_is_newer_than_the_one_before(tmp_path):
    for step in (99_999_999, 100_000_000):
        (tmp_path / "state" / f"step_{step}").mkdir(parents=True)
    assert [checkpoint.step_of(state) for state in checkpoint.complete_states(tmp_path)] == [
        99_999_999,
        100_000_000,
    ]


@pytest.mark.parametrize("name, kind", [("state", "file"), ("grids", "file")])
def test_a_folder_in_which_no_run_can_lie(name, kind, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(model.SIZES, "laptop", TINY)
    place = tmp_path / "r" / name
    place.parent.mkdir()
    place.mkdir() if kind == "folder" else place.write_text('{"theirs": 1}')
    before = tree(tmp_path)
    refused(train, ["--steps", 4, "--out", tmp_path / "r", *QUICK], monkeypatch, capsys)
    assert tree(tmp_path) == before


def test_two_runs_that_begin_in_one_folder(tmp_path, monkeypatch, capsys):
    """The slower one found the folder empty before it read its data, and nobody in it when it had."""
    monkeypatch.setitem(model.SIZES, "laptop", TINY)
    out, real = tmp_path / "r", train.Feed

    def feed(*arguments):
        monkeypatch.setattr(train, "Feed", real)
        monkeypatch.setattr(sys, "argv", ["train.py", "--steps", "1", "--out", str(out), *QUICK])
        train.main()  # the other one, meanwhile
        return real(*arguments)

    monkeypatch.setattr(train, "Feed", feed)
    monkeypatch.setattr(sys, "argv", ["train.py", "--steps", "2", "--out", str(out), *QUICK])
    with pytest.raises(errors.UserError, match="already holds a run"):
        train.main()
    assert [checkpoint.step_of(state) for state in checkpoint.complete_states(out)] == [1]
    assert [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()] == [1]


def test_a_model_without_states_is_not_to_be_resumed(run, monkeypatch, capsys):
    shutil.rmtree(run / "state")
    line = refused(train, ["--steps", 4, "--out", run, *QUICK], monkeypatch, capsys)
    assert "--init" in line and "--resume" not in line


def test_a_run_outlives_its_grids_and_its_terminal(tmp_path, monkeypatch):
    """Nobody reads the progress line any more, the folder of grids is gone, then it cannot be made: the run ends
    well."""
    monkeypatch.setitem(model.SIZES, "laptop", TINY)
    reader, writer = os.pipe()
    os.close(reader)
    drawn, out = [], tmp_path / "r"

    def draw_grid(*arguments):
        grids = out / "grids"
        shutil.rmtree(grids, ignore_errors=True)
        if len(drawn) == 1:
            grids.write_text("in the way")
        drawn.append(None)
        return Image.new("RGB", (4, 4))

    monkeypatch.setattr(watch, "draw_grid", draw_grid)
    monkeypatch.setattr(
        sys, "argv", ["train.py", "--steps", "2", "--out", str(out), *QUICK, "--grid-every", "1"]
    )
    with open(writer, "w", buffering=1) as closed:
        monkeypatch.setattr(sys, "stderr", closed)
        train.main()
        monkeypatch.undo()
        with contextlib.suppress(BrokenPipeError):
            closed.close()
    assert len(drawn) == 2 and checkpoint.step_of(checkpoint.complete_states(out)[-1]) == 2


@pytest.mark.parametrize("said, expected", [({}, "stopped"), ({"stopped": "gone"}, "gone")])
def test_ctrl_c_is_one_line(said, expected, capsys):
    def main():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as ended:
        errors.run(main, **said)
    assert ended.value.code == 130 and capsys.readouterr().err.strip() == expected


def test_commands_for_a_folder_with_a_dash(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(model.SIZES, "laptop", TINY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", "--steps", "1", "--out=-dash", *QUICK])
    train.main()
    assert "--checkpoint ./-dash " in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------------
# What is not read is said
# ------------------------------------------------------------------------------------------------------------
def test_a_prompt_that_is_cut_is_named(run, tmp_path, monkeypatch, capsys):
    read = json.loads((run / "config.json").read_text())["txt_len"] - 1
    words = [" ".join(["red"] * n) for n in (read, read + 1)]
    out = tmp_path / "a.png"
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "sample.py",
            "--checkpoint",
            str(run),
            "--prompt",
            words[0],
            "--prompt",
            words[1],
            "--images",
            "3",
            "--out",
            str(out),
            "--device",
            "cpu",
        ],
    )
    sample.main()
    printed = capsys.readouterr()
    assert printed.err.count("is not read") == 1 and printed.err.strip().endswith(f": {words[1]}")
    assert "2 prompts, 3 pictures each, at 2 steps" in printed.out


# ------------------------------------------------------------------------------------------------------------
# Results of other programs
# ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("content", ["null", "{", '{"records": [{"label": 1}]}', "{}"])
def test_records_of_another_study(content, tmp_path, monkeypatch, capsys):
    (tmp_path / "s_rule.json").write_text(content)
    line = refused(any_step, ["--study", "s_rule", "--out", tmp_path, "--steps", 1], monkeypatch, capsys)
    assert "s_rule.json" in line and (tmp_path / "s_rule.json").read_text() == content


@pytest.mark.parametrize(
    "content", [b"\x89PNG\xff\xfe", b"my notes", b'<script type="application/json" id="world">{</script>']
)
def test_a_file_that_is_no_page_is_not_written_over(content, tmp_path, monkeypatch, capsys):
    path = tmp_path / "x.html"
    path.write_bytes(content)
    refused(explore, ["--out", path], monkeypatch, capsys)
    assert path.read_bytes() == content
