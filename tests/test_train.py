"""train.py as a user meets it: files, resuming, one line for what is wrong. Signals and processes: test_processes.py."""

import contextlib
import os
import re
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import ranks
import torch
from PIL import Image
from programs import QUICK, TINY, last, records, refused, run
from safetensors.torch import load_file

import bench
import model
import objectives
import sample
import train
from engine import arguments, checkpoint, errors, feed, machine, watch
from engine.processes import Ranks
from experiments import evaluate, export, tables
from peers import meanflow
from scale import cache, shards
from toy import any_step, identities


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A tiny Self-E run of six iterations that ends inside the auxiliary stage."""
    out = tmp_path_factory.mktemp("runs") / "self_e"
    flags = [*QUICK[:-1], 6, "--log-every", 1, "--aux-from", "0.775", "--save-every", 2]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(model.SIZES, "laptop", TINY)
        run(patch, train, "--steps", 6, "--out", out, *flags)
    return out


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    monkeypatch.setitem(model.SIZES, "laptop", TINY)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def copy(trained, tiny):
    """A copy of the run, `r` in the folder that we are in."""
    return Path(shutil.copytree(trained, "r"))


def test_a_run_leaves_what_it_promises(trained):
    assert len({path.stat().st_mode for path in trained.glob("*.*")}) == 1  # whom the umask lets can read all
    rows = records(trained)
    assert [r["step"] for r in rows] == [1, 2, 3, 4, 5, 6] and all(np.isfinite(r["loss"]) for r in rows)
    assert [r["aux"] for r in rows] == [False] * 5 + [True] and rows[-1]["fake_loss"] > 0
    assert [round(r["tau"], 3) for r in rows] == [0, 0.394, 0.789, 1, 1, 1]  # linear until 300/710 of the run
    columns = "share_jump grad_norm lr images_per_s mfu data_wait skipped nonfinite elapsed".split()
    assert all(name in r for r in rows for name in columns)
    assert [p.name for p in (trained / "grids").iterdir()] == ["step_000006.png"]
    assert sorted(p.name for p in (trained / "state").iterdir()) == ["step_00000004", "step_00000006"]


def test_a_run_is_never_overwritten(copy, monkeypatch, capsys):
    assert "--resume" in refused(monkeypatch, capsys, train, "--steps", 6, "--out", "r", *QUICK)
    shutil.rmtree("r/state")  # a model without states is a place to begin from
    line = refused(monkeypatch, capsys, train, "--steps", 6, "--out", "r", *QUICK)
    assert "--init" in line and "--resume" not in line


@pytest.mark.parametrize(
    "flags, complaint",
    [
        ("--objective flow_matching", "was begun with --objective self_e"),
        ("--steps 3", "past --steps 3"),
        ("--side 24", "begun with --side 16, not 24"),
        ("--init r", "--init"),
        ("--seed 3", "begun with --seed 0"),
        ("--batch-size 8", "begun with --batch-size 4, not 8"),
        ("--data scenes", "other data"),
        ("--wrong-captions 0.3", "begun with --wrong-captions 0"),
    ],
)
def test_a_run_goes_on_as_what_it_was(copy, flags, complaint, monkeypatch, capsys):
    metrics, words = (copy / "metrics.jsonl").read_bytes(), ["--resume", "--out", "r", "--device", "cpu"]
    line = refused(monkeypatch, capsys, train, *words, *flags.split())
    assert complaint in line and "delete" not in line
    assert (copy / "metrics.jsonl").read_bytes() == metrics


def test_a_run_goes_on_as_the_network_that_it_was(copy, monkeypatch, capsys):
    """Weights of other axes have the same shapes; no older state would help."""
    monkeypatch.setitem(model.SIZES, "laptop", model.SIZES["laptop"] | {"axes": (4, 2, 2)})
    line = refused(monkeypatch, capsys, train, "--resume", "--out", "r", "--steps", 8, "--device", "cpu")
    assert "another model (axes [2, 2, 4], not [4, 2, 2])" in line and "delete" not in line


def test_a_state_of_another_objective_is_refused(copy, monkeypatch, capsys):
    """What the state says of itself decides, whatever the folder's config.json says."""
    state = last(copy) / "state.json"
    checkpoint.write_json(state, checkpoint.read_json(state) | {"objective": "flow_matching"})
    line = refused(monkeypatch, capsys, train, "--resume", "--out", "r", "--steps", 8, "--device", "cpu")
    assert "--objective flow_matching" in line


def test_a_run_whose_loss_has_grown_is_no_success(tiny, monkeypatch, capsys):
    """Far above its first record, also one of before a stop: the state is saved, and the last line says so."""
    monkeypatch.setattr(watch, "DIVERGED", 0.1)
    line = refused(monkeypatch, capsys, train, "--steps", 2, "--out", "d", *QUICK)
    assert "diverged" in line and "--lr" in line and last(Path("d")).name == "step_00000002"
    monkeypatch.setattr(watch, "DIVERGED", 10)
    state = last(Path("d")) / "state.json"
    saved = checkpoint.read_json(state)
    checkpoint.write_json(state, saved | {"first_loss": saved["first_loss"] / 1e6})
    assert "diverged" in refused(monkeypatch, capsys, train, "--resume", "--out", "d", "--steps", 3)


def test_relative_data_is_found_from_another_folder(tiny, monkeypatch, capsys):
    Path("pictures").mkdir()
    for i in range(4):
        Image.new("RGB", (20, 20), (60 * i, 0, 0)).save(f"pictures/{i}.png")
        Path(f"pictures/{i}.txt").write_text(f"red {i}")
    run(monkeypatch, train, "--data", "pictures", "--steps", 1, "--out", "r", *QUICK)
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    run(monkeypatch, train, "--resume", "--steps", 2, "--out", "../r", "--device", "cpu")
    named = ["--data", "../pictures"]  # in the place of the run's own, not beside it
    run(monkeypatch, train, "--resume", "--steps", 3, "--out", "../r", "--device", "cpu", *named)
    assert last(Path("../r")).name == "step_00000003"


def test_a_precision_that_was_measured_is_kept(copy, monkeypatch):
    monkeypatch.setattr(machine, "pick_precision", lambda device: torch.float32)
    config = checkpoint.read_json(copy / "config.json")
    checkpoint.write_json(copy / "config.json", config | {"precision": "bfloat16"})
    args = arguments.parse(["--resume", "--out", "r", "--precision", "auto"])
    assert arguments.precision_of(args, torch.device("cpu"), Ranks()) is torch.bfloat16


def test_a_model_file_that_a_kill_left_behind_the_state_is_made_anew(trained, copy, monkeypatch):
    """Also what was reported of iterations after the state is forgotten, with the half line of a killed process."""
    (copy / "model.safetensors").unlink()
    metrics = (copy / "metrics.jsonl").read_bytes()
    (copy / "metrics.jsonl").write_bytes(metrics + b'{"step": 7, "loss": 1}\n{}\n5\n{"step": 8, "lo')
    named = ["--text", "words", "--autoencoder", "pixels"]  # what it was
    run(monkeypatch, train, "--resume", "--out", copy, "--device", "cpu", *named)
    assert (copy / "model.safetensors").read_bytes() == (trained / "model.safetensors").read_bytes()
    assert (copy / "metrics.jsonl").read_bytes() == metrics


@pytest.mark.skipif(sys.platform == "win32", reason="has no such locks")
def test_two_processes_do_not_train_in_one_folder(copy, monkeypatch, capsys):
    words = ["--resume", "--out", copy, "--steps", "7", "--device", "cpu"]
    with checkpoint.taken(copy, True, checkpoint.complete_states(copy)):
        assert "another process" in refused(monkeypatch, capsys, train, *words)
    run(monkeypatch, train, *words)


def test_two_runs_that_begin_in_one_folder(tiny, monkeypatch):
    """The slower one found the folder empty before it read its data, and nobody in it when it had."""
    real = train.Feed

    def feed(*arguments):
        monkeypatch.setattr(train, "Feed", real)
        run(monkeypatch, train, "--steps", 1, "--out", "r", *QUICK)  # the other one, meanwhile
        return real(*arguments)

    monkeypatch.setattr(train, "Feed", feed)
    with pytest.raises(errors.UserError, match="already holds a run"):
        run(monkeypatch, train, "--steps", 2, "--out", "r", *QUICK)
    assert last(Path("r")).name == "step_00000001"
    assert len(records(Path("r"))) == 1


def test_a_folder_in_which_no_state_can_lie(tiny, monkeypatch, capsys):
    Path("r").mkdir()
    Path("r/state").write_text("theirs")
    refused(monkeypatch, capsys, train, "--steps", 4, "--out", "r", *QUICK)
    assert [path.read_text() for path in Path("r").iterdir()] == ["theirs"]


def test_a_run_outlives_its_grids_and_its_terminal(tiny, monkeypatch):
    """Nobody reads the progress line any more, and no grid can be written: the run ends well."""
    reader, writer = os.pipe()
    os.close(reader)

    def draw_grid(*arguments):
        shutil.rmtree("r/grids")
        Path("r/grids").write_text("in the way")
        return Image.new("RGB", (4, 4))

    monkeypatch.setattr(watch, "draw_grid", draw_grid)
    words = ["--steps", 1, "--out", "r", *QUICK[:-1], 1]
    with contextlib.suppress(BrokenPipeError), open(writer, "w", buffering=1) as closed:
        monkeypatch.setattr(sys, "stderr", closed)
        monkeypatch.setattr(sys, "argv", ["train.py", *map(str, words)])
        errors.run(train.main)
        monkeypatch.undo()
    assert last(tiny / "r").name == "step_00000001" and (tiny / "r/grids").is_file()


def test_a_run_begins_with_anothers_average(trained, copy, tmp_path, monkeypatch):
    """With a learning rate of nearly nothing the new run stays where it began; it never reads the other one again."""
    other = ["--txt-len", 9, "--seed", 5, "--objective", "flow_matching"]
    begin = ["--init", "r/model.safetensors", "--lr", 1e-12]
    run(monkeypatch, train, "--steps", 2, "--out", "n", *begin, *QUICK, *other)
    first, second = load_file("r/model.safetensors"), load_file(last(Path("n")) / "network.safetensors")
    assert all(torch.allclose(first[key], second[key], atol=1e-4) for key in first)
    shutil.rmtree("r")
    run(monkeypatch, train, "--resume", "--steps", 3, "--out", "n", "--device", "cpu")
    assert checkpoint.read_json(Path("n/config.json"))["s_rule"] == 1.0


@pytest.mark.parametrize(
    "flags, complaint",
    [
        ("--objective meanflow", "another model (time_factor None, not 1.0)"),
        ("--autoencoder pixels", "was trained with the autoencoder kl:elsewhere"),
    ],
)
def test_weights_for_other_times_or_another_autoencoder_are_refused(
    flags, complaint, copy, monkeypatch, capsys
):
    config = checkpoint.read_json(copy / "config.json")
    if "pixels" in flags:
        checkpoint.write_json(copy / "config.json", config | {"autoencoder": "kl:elsewhere"})
    words = ["--steps", 1, "--out", "n", "--init", "r", *QUICK, *flags.split()]
    assert complaint in refused(monkeypatch, capsys, train, *words)
    assert not Path("n").exists()


def test_a_folder_of_pictures_trains_and_its_commands_can_be_pasted(tiny, monkeypatch, capsys):
    folder = tiny / "my pictures"
    folder.mkdir()
    Image.new("RGB", (50, 40), "red").save(folder / "a.png")
    (folder / "a.txt").write_text('a "red" $HOME `id` \33[1mcircle' + "!" * 1000)
    run(monkeypatch, train, "--steps", 1, "--data", folder, "--out", "a run", *QUICK)
    words = shlex.split(capsys.readouterr().out.strip().splitlines()[-1])
    assert words[words.index("--checkpoint") + 1] == "a run"
    assert words[words.index("--prompt") + 1 :] == ['a "red" $HOME `id` ?[1mcircle' + "!" * 171]


def test_flow_matching_is_sampled_at_s_equal_t(tiny, monkeypatch):
    run(monkeypatch, train, "--steps", 1, "--out", "fm", "--objective", "flow_matching", *QUICK)
    loaded, seen = sample.load(Path("fm"), torch.device("cpu")), []
    loaded.network.register_forward_pre_hook(lambda m, inputs: seen.append(inputs[1:3]))
    sample.generate(loaded, ["x"], [(0,)], steps=3)
    assert len(seen) == 3 and all(torch.equal(t, s) for t, s in seen)
    with pytest.raises(errors.UserError, match="--s-rule same"):
        sample.generate(loaded, ["x"], [(0,)], steps=3, s_rule=0.0)


def test_the_flags_of_an_objective_reach_it():
    network, ema = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    others = "--target tar --delta-scale 0 --aux-from 0 --k 0 --null-branch ema".split()
    for flags, expected in (([], ("renorm", 1, 0.9)), (others, ("tar", 0, 0))):
        built = objectives.OBJECTIVES["self_e"].build(network, ema, arguments.parse(flags))
        assert (built.target, built.delta_scale, built.k) == expected and built.ema is ema
        assert built.unconditional is (ema if "ema" in flags else network)
    args = arguments.parse(
        "--objective meanflow --train-guidance 3 --loss-power 0.75 --derivative forward".split()
    )
    built = objectives.OBJECTIVES["meanflow"].build(network, ema, args)
    assert (built.guidance, built.power, built.improved) == (3, 0.75, False) and args.compile is False
    assert built.derivative is meanflow.path_derivative


# --- Bad input: one line, exit code 2, nothing half-written -------------------------------------------------
BAD = {
    train: """--data absent; --size 2b; --size 7b; --txt-len 3; --steps 0; --batch-size 3; --micro-batch 6; --k 1.5;
        --aux-from 2; --device abacus; --resume --out absent; --out /dev/null/run; --side 30; --dry-run --side 6; --init absent;
        --text telepathy; --autoencoder kl:./absent; --lr nan; --seed 99999999999999999999999; --micro-batch 3 --batch-size 36;
        --objective telepathy; --objective flow_matching --target tar; --objective imm --aux-from 0; --k 0.5;
        --objective imm --micro-batch 2; --objective tim --derivative forward; --zero --optimizer muon;
        --wrong-captions -0.1; --wrong-captions nan; --objective meanflow --derivative forward --compile; --objective meanflow --precision bf16""",
    sample: """--checkpoint absent --prompt x; --prompt x --scale 200000; --prompt x --steps 0; --prompt x --guidance nan;
        --prompt x --eta 1.5; --prompt x --s-rule before; --prompt x --out /dev/null/x.png; --prompt x --out x.txt;
        --prompts absent.txt""",
    feed: "--data absent",
    shards: "absent new; absent new --per-shard 10001",
    cache: """absent new --side 32 --text words --autoencoder pixels; absent new --side 64 --part 2/2;
        new x --side 0""",
    bench: "--batch 12; --side 18; --side 1099511627776; --objectives telepathy; --out /dev/null/a.json",
    evaluate: "--per-tag 0; --checkpoint absent; --steps 0; --out absent/a.json",
    export: "--prompts absent.jsonl --checkpoint c --out out",
    tables: "--seeds -1",
    any_step: "--steps 0; --study telepathy; --seed -1; --layout x; --out /dev/null/a",
    identities: "--seed x",
}
LINES = [(program, words.strip()) for program, lines in BAD.items() for words in lines.split(";")]


@pytest.mark.parametrize("program, words", LINES, ids=str)
def test_bad_arguments(program, words, tmp_path, monkeypatch, capsys):
    """The line names a flag or a value that was given."""
    monkeypatch.chdir(tmp_path)
    line = refused(monkeypatch, capsys, program, *words.split())
    assert any(word.strip("-") in line for word in re.split("[ :]", words))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [None, b"", b"{", b"garbage"])
@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_damaged_checkpoint_is_named(name, content, copy, monkeypatch, capsys):
    replace(copy / name, content)
    words = ["--checkpoint", "r", "--prompt", "x", "--out", "x.png"]
    assert f"r/{name}" in refused(monkeypatch, capsys, sample, *words) and not Path("x.png").exists()


@pytest.mark.parametrize("content", [None, b"garbage"])
@pytest.mark.parametrize("name", ["network.safetensors", "adam.pt", "state.json"])
def test_a_damaged_state_says_what_to_delete(name, content, copy, monkeypatch, capsys):
    replace(copy / "state/step_00000006" / name, content)
    words = ["--resume", "--out", "r", "--steps", 8, "--device", "cpu"]
    line = refused(monkeypatch, capsys, train, *words)
    assert "delete r/state/step_00000006 to go on from step_00000004" in line


def replace(path: Path, content: bytes | None) -> None:
    """Leave another content at the path, or nothing; a link to it elsewhere keeps the right one."""
    path.unlink()
    if content is not None:
        path.write_bytes(content)


@pytest.mark.parametrize("config", ["{}", '{"arguments": 3}'])
def test_resuming_what_train_did_not_begin(tiny, monkeypatch, capsys, config):
    Path("r").mkdir()
    Path("r/config.json").write_text(config)
    assert "config.json" in refused(monkeypatch, capsys, train, "--resume", "--out", "r")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="has no full device")
def test_a_full_disk_behind_stdout_is_one_line(tmp_path):
    script, complaints = "from engine import errors, feed\nerrors.run(feed.main)\n", tmp_path / "stderr.txt"
    complaints.touch()
    what = script, ["--out", str(tmp_path / "x.png")], {}, ["/dev/full", str(complaints)]
    process = ranks.context.Process(target=ranks.child, args=what)
    process.start()
    process.join()
    assert process.exitcode == 2 and len(complaints.read_text().strip().splitlines()) == 1


def test_ctrl_c_is_one_line(capsys):
    def main():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as ended:
        errors.run(main, "gone")
    assert ended.value.code == 130 and capsys.readouterr().err.strip() == "gone"
