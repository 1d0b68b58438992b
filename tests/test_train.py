"""The loop and the sampling command as a user meets them: files, resuming, stopping, bad input."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import objectives
import sample
import train
from engine import arguments, checkpoint, errors

ROOT = Path(__file__).parent.parent
QUICK = ["--batch-size", "4", "--device", "cpu", "--precision", "fp32", "--no-compile", "--grid-every", "0"]


def run(monkeypatch, program, *arguments):
    """Run a program's main in this process, as from the command line."""
    monkeypatch.setattr(sys, "argv", [f"{program.__name__}.py", *map(str, arguments)])
    program.main()


def command(*arguments, **options):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=environment,
        **options,
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A Self-E run of six iterations that ends inside the auxiliary stage, made by the command itself."""
    out = tmp_path_factory.mktemp("runs") / "self_e"
    result = command(
        "train.py", "--steps", 6, "--out", out, *QUICK[:-1], 6, "--log-every", 1, "--aux-from", "0.775"
    )
    assert result.returncode == 0, result.stderr
    return out, result.stdout


def test_a_run_leaves_what_it_promises(trained):
    out, printed = trained
    config = json.loads((out / "config.json").read_text())
    assert (
        len({path.stat().st_mode for path in out.glob("*.*")}) == 1
    )  # all can be read by whom the umask lets
    assert config["objective"] == "self_e" and config["size"] == "laptop" and config["seed"] == 0
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == [1, 2, 3, 4, 5, 6]
    assert all(np.isfinite(r["loss"]) for r in records)
    assert [r["aux"] for r in records] == [False] * 5 + [True] and records[-1]["fake_loss"] > 0
    assert [round(r["tau"], 3) for r in records] == [
        0,
        0.394,
        0.789,
        1,
        1,
        1,
    ]  # linear until 300/710 of the run
    assert [p.name for p in (out / "grids").iterdir()] == ["step_000006.png"]
    assert Image.open(out / "grids" / "step_000006.png").width > 5 * 32
    assert re.search(rf"python sample.py --checkpoint {out} .*--prompt", printed)


def test_two_and_two_iterations_equal_four(tmp_path, monkeypatch):
    """Stopped after two of four iterations and resumed: parameters, average and
    Adam's moments are bit for bit the same."""
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    run(monkeypatch, train, "--steps", 4, "--out", whole, "--aux-from", "0.5", *QUICK)
    step = torch.optim.Adam.step

    def stop_in_the_second(self, *a, **k):
        result = step(self, *a, **k)
        stop_in_the_second.calls += 1
        if stop_in_the_second.calls == 2:
            signal.raise_signal(signal.SIGINT)
        return result

    stop_in_the_second.calls = 0
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.Adam, "step", stop_in_the_second)
        with pytest.raises(SystemExit):
            run(patch, train, "--steps", 4, "--out", halves, "--aux-from", "0.5", *QUICK)
    assert checkpoint.complete_states(halves)[-1].name == "step_00000002"
    run(
        monkeypatch, train, "--resume", "--out", halves, "--device", "cpu"
    )  # all other flags come from the run itself
    a, b = (checkpoint.complete_states(folder)[-1] for folder in (whole, halves))
    assert a.name == b.name == "step_00000004"
    for name in ("network.safetensors", "model.safetensors"):
        first, second = load_file(a / name), load_file(b / name)
        assert all(torch.equal(first[key], second[key]) for key in first)
    first, second = (torch.load(folder / "adam.pt", weights_only=True)["state"] for folder in (a, b))
    assert all(torch.equal(first[i][key], second[i][key]) for i in first for key in ("exp_avg", "exp_avg_sq"))


def test_micro_batches_make_the_same_iteration(tmp_path, monkeypatch):
    for name, micro in (("one", 8), ("four", 2)):
        run(
            monkeypatch,
            train,
            "--steps",
            3,
            "--out",
            tmp_path / name,
            "--aux-from",
            "0.3",
            "--micro-batch",
            micro,
            *QUICK[2:],
            "--batch-size",
            8,
        )
    a, b = (
        load_file(checkpoint.complete_states(tmp_path / n)[-1] / "network.safetensors")
        for n in ("one", "four")
    )
    # Adam's first updates are the signs of gradients, so a weight whose gradient is rounding noise goes either way:
    # count them.
    flips = sum(((a[key] - b[key]).abs() > 1e-4).sum().item() for key in a)
    assert flips < 1e-4 * sum(value.numel() for value in a.values())


def test_ctrl_c_leaves_a_usable_checkpoint(tmp_path):
    out = tmp_path / "run"
    arguments = [
        sys.executable,
        "train.py",
        "--steps",
        "100000",
        "--out",
        str(out),
        "--log-every",
        "1",
        *QUICK,
    ]
    process = subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        while not (out / "metrics.jsonl").exists() or not (out / "metrics.jsonl").read_text():
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        printed, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130 and f"python train.py --resume --out {out}" in printed
    assert len(checkpoint.complete_states(out)) == 1
    sample.load(out, torch.device("cpu"))


@pytest.mark.slow
def test_ctrl_c_while_compiling_waits_for_the_compiler(tmp_path):
    """A terminal sends Ctrl-C to every process of the command, compilers too; here all of them are built anew."""
    arguments = [
        sys.executable,
        "train.py",
        "--steps",
        "1000",
        "--out",
        str(tmp_path / "run"),
        *QUICK,
        "--compile",
    ]
    arguments.remove("--no-compile")
    process = subprocess.Popen(
        arguments,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")},
    )
    try:
        while not list(tmp_path.glob("cache/**/*.cpp")):
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGINT)
        printed, complaints = process.communicate(timeout=600)
    finally:
        process.kill()
    assert process.returncode == 0 and "stopped by SIGINT after iteration" in printed, complaints[-3000:]


def test_a_run_is_never_overwritten(trained, monkeypatch):
    with pytest.raises(errors.UserError, match="--resume"):
        run(monkeypatch, train, "--steps", 6, "--out", trained[0], *QUICK)


def test_a_run_goes_on_as_what_it_was(trained, tmp_path, monkeypatch):
    """Another objective or a shorter run is refused; a model file that a kill left behind the state is made anew."""
    out = tmp_path / "run"
    shutil.copytree(trained[0], out)
    for flags, complaint in (
        (["--objective", "flow_matching"], "was begun with --objective self_e"),
        (["--steps", "3"], "past --steps 3"),
        (["--side", "24"], "another --side"),
    ):
        with pytest.raises(errors.UserError, match=complaint):
            run(monkeypatch, train, "--resume", "--out", out, "--device", "cpu", *flags)
    (out / "model.safetensors").unlink()
    own = [
        "--text",
        "words",
        "--autoencoder",
        "pixels",
        "--txt-len",
        str(json.loads((out / "config.json").read_text())["txt_len"]),
    ]
    run(monkeypatch, train, "--resume", "--out", out, "--device", "cpu", *own)  # what it was, named
    assert (out / "model.safetensors").read_bytes() == (trained[0] / "model.safetensors").read_bytes()


@pytest.mark.skipif(sys.platform == "win32", reason="has no such locks")
@pytest.mark.slow
def test_two_processes_do_not_train_in_one_folder(trained, tmp_path, monkeypatch):
    shutil.copytree(trained[0], tmp_path / "run")
    with checkpoint.locked(tmp_path / "run"), pytest.raises(errors.UserError, match="another process"):
        run(monkeypatch, train, "--resume", "--out", tmp_path / "run", "--steps", "7", "--device", "cpu")
    run(monkeypatch, train, "--resume", "--out", tmp_path / "run", "--steps", "7", "--device", "cpu")


def test_an_export_spares_runs(trained, tmp_path):
    before = (trained[0] / "model.safetensors").read_bytes()
    with pytest.raises(errors.UserError, match="choose another folder"):
        checkpoint.export(trained[0], trained[0], torch.float16)
    checkpoint.export(trained[0], tmp_path / "small", torch.float16)
    assert (trained[0] / "model.safetensors").read_bytes() == before
    assert len(before) > 1.9 * (tmp_path / "small" / "model.safetensors").stat().st_size


def test_old_states_go_and_the_newest_stay(tmp_path, monkeypatch):
    run(monkeypatch, train, "--steps", 5, "--out", tmp_path / "r", "--save-every", 1, *QUICK)
    assert [p.name for p in sorted((tmp_path / "r" / "state").iterdir())] == [
        "step_00000004",
        "step_00000005",
    ]


def test_a_folder_of_pictures_trains(tmp_path, monkeypatch):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i, name in enumerate(("sun", "moon", "sea")):
        Image.new("RGB", (50, 40), (90 * i, 40, 200)).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"the {name}")
    run(
        monkeypatch,
        train,
        "--data",
        folder,
        "--steps",
        2,
        "--out",
        tmp_path / "r",
        "--objective",
        "flow_matching",
        *QUICK,
    )
    assert json.loads((tmp_path / "r" / "config.json").read_text())["s_rule"] == 1.0


def test_a_model_can_be_given_away(trained, tmp_path, monkeypatch):
    run(monkeypatch, checkpoint, trained[0], tmp_path / "given", "--dtype", "fp16")
    assert sorted(p.name for p in (tmp_path / "given").iterdir()) == [
        "config.json",
        "metrics.jsonl",
        "model.safetensors",
    ]
    whole, half = (
        sample.load(folder, torch.device("cpu")).network.state_dict()
        for folder in (trained[0], tmp_path / "given")
    )
    assert all(
        half[k].dtype == torch.float32 and torch.allclose(whole[k], half[k], rtol=2**-11, atol=1e-7)
        for k in whole
    )
    given, own = (folder / "model.safetensors" for folder in (tmp_path / "given", trained[0]))
    assert given.stat().st_size < 0.52 * own.stat().st_size
    with pytest.raises(errors.UserError, match="is missing"):
        run(monkeypatch, checkpoint, tmp_path, tmp_path / "x")


# ------------------------------------------------------------------------------------------------------------
# sample.py
# ------------------------------------------------------------------------------------------------------------
def test_same_seed_same_picture_whatever_stands_beside_it(trained, tmp_path, monkeypatch):
    loaded = sample.load(trained[0], torch.device("cpu"))
    prompts = ["a photo of a ring", "a photo of a red circle", "a photo of two squares"]
    together = sample.generate(loaded, prompts, [(0,), (1,), (2,)], seed=3, steps=2)
    alone = sample.generate(loaded, prompts[1:2], [(1,)], seed=3, steps=2)[0]
    # The same noise; a batch of another size may round otherwise
    assert np.abs(together[1].astype(int) - alone).max() <= 1
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        run(
            monkeypatch,
            sample,
            "--checkpoint",
            trained[0],
            "--prompt",
            prompts[0],
            "--seed",
            seed,
            "--steps",
            3,
            "--device",
            "cpu",
            "--out",
            tmp_path / f"{name}.png",
        )
    pictures = [np.asarray(Image.open(tmp_path / f"{name}.png")) for name in "abc"]
    assert np.array_equal(pictures[0], pictures[1]) and not np.array_equal(pictures[0], pictures[2])


def test_prompts_share_their_noises(trained, tmp_path, monkeypatch):
    """Picture i of one prompt starts where picture i of another does, so that rows compare."""
    asked, right = [], sample.generate
    monkeypatch.setattr(
        sample,
        "generate",
        lambda loaded, prompts, keys, **how: (
            asked.append((prompts, keys)) or right(loaded, prompts, keys, **how)
        ),
    )
    run(
        monkeypatch,
        sample,
        "--checkpoint",
        trained[0],
        "--prompt",
        "a",
        "--prompt",
        "b",
        "--images",
        2,
        "--steps",
        1,
        "--device",
        "cpu",
        "--out",
        tmp_path / "x.png",
    )
    ((prompts, keys),) = asked
    assert prompts == ["a", "a", "b", "b"] and keys[:2] == keys[2:] and keys[0] != keys[1]


def test_several_step_counts_make_a_sheet(trained, tmp_path):
    (tmp_path / "prompts.txt").write_text("a photo of a ring\n\na photo of a cross\n")
    result = command(
        "sample.py",
        "--checkpoint",
        trained[0],
        "--prompts",
        tmp_path / "prompts.txt",
        "--steps",
        1,
        2,
        4,
        "--eta",
        "renoise",
        "--s-rule",
        "0.5",
        "--guidance",
        "3",
        "--out",
        tmp_path / "x.png",
    )
    assert result.returncode == 0, result.stderr
    sheet = Image.open(tmp_path / "x.png")
    assert sheet.width >= 3 * 128 and sheet.height >= 2 * 128


def test_flow_matching_is_sampled_at_s_equal_t(tmp_path, monkeypatch):
    run(monkeypatch, train, "--steps", 1, "--out", tmp_path / "fm", "--objective", "flow_matching", *QUICK)
    loaded, seen = sample.load(tmp_path / "fm", torch.device("cpu")), []
    network = loaded.network
    loaded.network = lambda x, t, s, *c: seen.append((t, s)) or network(x, t, s, *c)
    loaded.network.parameters = network.parameters
    sample.generate(loaded, ["x"], [(0,)], steps=3)
    assert len(seen) == 3 and all(torch.equal(t, s) for t, s in seen)
    with pytest.raises(errors.UserError, match="--s-rule same"):
        sample.generate(loaded, ["x"], [(0,)], steps=3, s_rule=0.0)


def test_imm_trains_and_samples_in_its_own_way(tmp_path, monkeypatch):
    run(monkeypatch, train, "--steps", 2, "--out", tmp_path / "imm", "--objective", "imm", *QUICK)
    loaded, seen = sample.load(tmp_path / "imm", torch.device("cpu")), []
    loaded.network.register_forward_pre_hook(
        lambda m, inputs: seen.append((inputs[1][0].item(), inputs[2][0].item()))
    )
    sample.generate(loaded, ["x"], [(0,)], steps=2)
    # The time and where the jump leads, both told to the network
    assert np.allclose(seen, [(0.994, 0.497), (0.497, 0)])
    with pytest.raises(errors.UserError, match="--eta"):
        sample.generate(loaded, ["x"], [(0,)], steps=2, eta=0.5)


def test_the_flags_of_the_objective_reach_it():
    network, ema = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    for flags, expected in (
        ([], ("renorm", 1, network)),
        (["--target", "tar", "--delta-scale", "0", "--null-branch", "ema"], ("tar", 0, ema)),
    ):
        built = objectives.OBJECTIVES["self_e"].build(network, ema, arguments.parse(flags))
        assert (
            (built.target, built.delta_scale) == expected[:2]
            and built.unconditional is expected[2]
            and built.ema is ema
        )


# ------------------------------------------------------------------------------------------------------------
# Bad input: one line, exit code 2, nothing half-written
# ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "program, arguments",
    [
        (train, ["--data", "absent"]),
        (train, ["--size", "2b"]),
        (train, ["--txt-len", "3"]),
        (train, ["--size", "7b"]),
        (train, ["--steps", "0"]),
        (train, ["--batch-size", "3"]),
        (train, ["--micro-batch", "6"]),
        (train, ["--aux-from", "2"]),
        (train, ["--device", "abacus"]),
        (train, ["--resume"]),
        (train, ["--out", "/dev/null/run"]),
        (train, ["--side", "30"]),
        (train, ["--text", "telepathy"]),
        (train, ["--objective", "imm", "--micro-batch", "2"]),
        (train, ["--autoencoder", "kl:./absent"]),
        (train, ["--seed", "-1"]),
        (train, ["--lr", "nan"]),
        (train, ["--seed", "99999999999999999999999"]),
        (train, ["--save-every", "-1"]),
        (train, ["--workers", "0"]),
        (train, ["--objective", "flow_matching", "--target", "tar"]),
        (train, ["--objective", "imm", "--aux-from", "0"]),
        (train, ["--objective", "flow_matching", "--null-branch", "ema"]),
        (train, ["--out", ""]),
        (train, ["--device", "meta"]),
        (sample, ["--prompt", "x", "--scale", "200000"]),
        (sample, ["--checkpoint", "absent", "--prompt", "x"]),
        (sample, []),
        (sample, ["--prompt", "x", "--steps", "0"]),
        (sample, ["--prompt", "x", "--guidance", "-1"]),
        (sample, ["--prompt", "x", "--guidance", "nan"]),
        (sample, ["--prompt", "x", "--eta", "1.5"]),
        (sample, ["--prompt", "x", "--s-rule", "before"]),
        (sample, ["--prompt", "x", "--out", "/dev/null/x.png"]),
        (sample, ["--prompt", "x", "--out", "x.txt"]),
        (sample, ["--prompts", "absent.txt"]),
        (sample, ["--prompt", "x", "--out", ".png"]),
    ],
)
def test_bad_arguments(program, arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"{program.__name__}.py", *arguments])
    with pytest.raises(SystemExit) as stopped:
        errors.run(program.main)
    lines = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2 and len(lines) == 1 and lines[0].startswith(f"{program.__name__}.py: ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "damage", ["missing weights", "missing config", "truncated", "another shape", "not json", "no model"]
)
def test_damaged_checkpoints(trained, tmp_path, monkeypatch, capsys, damage):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((trained[0] / name).read_bytes())
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    if damage.startswith("missing"):
        (weights if "weights" in damage else config).unlink()
    elif damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif damage == "another shape":
        save_file({k: v[:1].clone() for k, v in load_file(weights).items()}, weights)
    else:
        config.write_text("{" if damage == "not json" else "{}")
    monkeypatch.setattr(
        sys,
        "argv",
        ["sample.py", "--checkpoint", str(tmp_path), "--prompt", "x", "--out", str(tmp_path / "x.png")],
    )
    with pytest.raises(SystemExit) as stopped:
        errors.run(sample.main)
    lines = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2 and len(lines) == 1 and str(tmp_path) in lines[0]
    assert not (tmp_path / "x.png").exists()


@pytest.mark.parametrize(
    "name, value",
    [
        ("side", "24"),
        ("side", None),
        ("side", 23),
        ("side", 24.0),
        ("mu", "x"),
        ("guidance", None),
        ("s_rule", "next"),
        ("guidance_space", "q"),
        ("text_encoder", 5),
        ("txt_len", 14.5),
        ("txt_len", 3),
        ("autoencoder", None),
        ("objective", "gan"),
        ("precision", "int8"),
        ("model", [1]),
    ],
)
def test_a_config_with_a_wrong_value_is_named(trained, tmp_path, name, value):
    (tmp_path / "model.safetensors").write_bytes((trained[0] / "model.safetensors").read_bytes())
    config = checkpoint.read_json(trained[0] / "config.json")
    checkpoint.write_json(tmp_path / "config.json", config | {name: value})
    with pytest.raises(errors.UserError, match=name):
        sample.load(tmp_path, torch.device("cpu"))


@pytest.mark.parametrize(
    "change", [{"heads": 0}, {"axes": [7, 13, 12]}, {"width": -8}, {"patch": "x"}, {"colour": 1}]
)
def test_a_config_that_describes_no_model(trained, tmp_path, change):
    (tmp_path / "model.safetensors").write_bytes((trained[0] / "model.safetensors").read_bytes())
    config = checkpoint.read_json(trained[0] / "config.json")
    checkpoint.write_json(tmp_path / "config.json", config | {"model": config["model"] | change})
    with pytest.raises(errors.UserError, match="config.json"):
        sample.load(tmp_path, torch.device("cpu"))


@pytest.mark.parametrize(
    "name, content", [("adam.pt", b"hi\n"), ("adam.pt", None), ("state.json", b"{}"), ("state.json", b"[]")]
)
def test_a_damaged_state_is_named(trained, tmp_path, monkeypatch, capsys, name, content):
    shutil.copytree(trained[0], tmp_path / "run")
    damaged = checkpoint.complete_states(tmp_path / "run")[-1] / name
    torch.save({"other": torch.zeros(2)}, damaged) if content is None else damaged.write_bytes(content)
    monkeypatch.setattr(
        sys, "argv", ["train.py", "--resume", "--steps", "10", "--out", str(tmp_path / "run")]
    )
    with pytest.raises(SystemExit) as stopped:
        errors.run(train.main)
    lines = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2 and len(lines) == 1 and str(damaged) in lines[0]


def test_the_printed_commands_can_be_pasted(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "my pictures"
    folder.mkdir()
    Image.new("RGB", (16, 16), "red").save(folder / "a.png")
    (folder / "a.txt").write_text('a "red" $HOME `id` circle')
    run(monkeypatch, train, "--steps", 1, "--data", folder, "--out", tmp_path / "a run", *QUICK)
    words = shlex.split(capsys.readouterr().out.strip().splitlines()[-1])
    assert words[words.index("--checkpoint") + 1] == str(tmp_path / "a run")
    assert words[words.index("--prompt") + 1 :] == ['a "red" $HOME `id` circle']


@pytest.mark.parametrize("config", ["{}", "[]", '{"arguments": 3}'])
def test_resuming_what_train_did_not_begin(tmp_path, monkeypatch, capsys, config):
    (tmp_path / "config.json").write_text(config)
    (tmp_path / "state" / "step_00000002_bak").mkdir(parents=True)
    assert checkpoint.complete_states(tmp_path) == []
    monkeypatch.setattr(sys, "argv", ["train.py", "--resume", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as stopped:
        errors.run(train.main)
    lines = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2 and len(lines) == 1 and "config.json" in lines[0]


def test_the_exit_code_is_that_of_the_process():
    result = command("train.py", "--size", "7b")
    assert result.returncode == 2 and len(result.stderr.strip().splitlines()) == 1
