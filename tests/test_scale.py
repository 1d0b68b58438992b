"""Several processes, stops at any moment, numbers that are not finite: nothing
is lost and nothing goes wrong silently."""

import copy
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from ranks import SMALL, finish, start
from ranks import train as run_train
from safetensors.torch import load_file

import encoders
import losses
import model
import recipe
import sample
import train
from engine import checkpoint, errors, feed, machine, monitor, optimizers, processes
from engine.run import rehearse
from scale import cache, shards

ROOT = Path(__file__).parent.parent


def tensors(state: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a training state, named."""
    result = {
        f"{name}/{key}": value
        for name in ("network", "model")
        for key, value in load_file(state / f"{name}.safetensors").items()
    }
    adam = torch.load(state / "adam.pt", weights_only=True)["state"]
    return result | {f"adam/{i}/{key}": value for i, own in adam.items() for key, value in own.items()}


def last(run: Path) -> Path:
    return checkpoint.complete_states(run)[-1]


def alike(a: Path, b: Path) -> bool:
    """Whether two runs ended alike but for rounding: the same iterations, the same losses, all but a few weights equal
    to 1e-4.

    Adam's first updates are the signs of gradients, so a weight whose gradient is rounding noise goes either way.
    """
    first, second = tensors(last(a)), tensors(last(b))
    assert last(a).name == last(b).name and first.keys() == second.keys()
    weights = [key for key in first if not key.startswith("adam")]
    flips = sum(((first[key] - second[key]).abs() > 1e-4).sum().item() for key in weights)
    told = losses_of(a), losses_of(b)
    return flips < 1e-4 * sum(first[key].numel() for key in weights) and told[0] == pytest.approx(
        told[1], rel=1e-4
    )


def same(a: Path, b: Path) -> bool:
    first, second = tensors(last(a)), tensors(last(b))
    return (
        last(a).name == last(b).name
        and first.keys() == second.keys()
        and all(torch.equal(first[k], second[k]) for k in first)
    )


def losses_of(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


# ------------------------------------------------------------------------------------------------------------
# Processes and resuming
# ------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Six iterations with the auxiliary stage from the fourth on: whole and in halves, on one and on two processes."""
    folder = tmp_path_factory.mktemp("runs")
    flags = [*SMALL, "--aux-from", "0.5", "--save-every", "3"]
    run_train(1, "--steps", 6, "--out", folder / "one", *flags, "--micro-batch", 2)
    run_train(2, "--steps", 6, "--out", folder / "two", *flags)
    for name in ("one", "two"):  # what a run leaves that is killed after its third iteration
        for copy_ in ("halves", "other"):
            shutil.copytree(folder / name, folder / f"{name}-{copy_}")
            shutil.rmtree(folder / f"{name}-{copy_}" / "state" / "step_00000006")
    return folder


@pytest.mark.parametrize("world, name", [(1, "one"), (2, "two")])
def test_three_and_three_iterations_equal_six(runs, world, name):
    """Bit for bit: weights, average, Adam's moments; and the loss of every
    iteration, so the batches were the same too."""
    run_train(world, "--resume", "--out", runs / f"{name}-halves", "--device", "cpu")
    assert same(runs / name, runs / f"{name}-halves")
    assert losses_of(runs / name) == losses_of(runs / f"{name}-halves")


def test_two_processes_equal_one_that_accumulates(runs):
    assert alike(runs / "one", runs / "two")


@pytest.mark.slow
def test_shards_and_their_cache_train_alike(tmp_path):
    """The same batches in three shapes from tars and from the cache of them, on
    one process and on two, with a stop between."""
    (tmp_path / "pictures").mkdir()
    random_ = np.random.default_rng(0)
    for i in range(24):
        size = ((16, 32), (32, 16), (20, 20))[i % 3]
        Image.fromarray(random_.integers(0, 255, (*size, 3), dtype=np.uint8)).save(
            tmp_path / "pictures" / f"{i}.png"
        )
        (tmp_path / "pictures" / f"{i}.txt").write_text(f"picture number {i}")
    shards.pack(tmp_path / "pictures", tmp_path / "tars", per_shard=10)
    text, pixels = encoders.text_encoder("words", 14, "cpu"), encoders.autoencoder("pixels", "cpu")
    cache.make(
        tmp_path / "tars",
        tmp_path / "cache",
        16,
        (text, pixels),
        cache.Settings(batch_size=4, tokens="fp32", multiple=4),
    )
    flags = [*SMALL, "--side", "16", "--steps", "6"]
    run_train(1, "--data", tmp_path / "tars", "--out", tmp_path / "one", *flags)
    run_train(2, "--data", tmp_path / "tars", "--out", tmp_path / "two", *flags)
    run_train(1, "--data", tmp_path / "cache", "--out", tmp_path / "cached", *flags, "--save-every", "3")
    assert alike(tmp_path / "one", tmp_path / "two") and alike(tmp_path / "one", tmp_path / "cached")
    shutil.rmtree(last(tmp_path / "cached"))
    run_train(1, "--resume", "--out", tmp_path / "cached", "--device", "cpu")
    assert alike(tmp_path / "one", tmp_path / "cached")


@pytest.mark.slow
def test_what_is_skipped_is_counted_once_on_any_number_of_processes(tmp_path):
    """Pictures that only decoding finds broken: every process that meets one
    leaves it out, the record tells it once."""
    (tmp_path / "pictures").mkdir()
    random_ = np.random.default_rng(0)
    for i in range(12):
        Image.fromarray(random_.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(
            tmp_path / "pictures" / f"{i}.png"
        )
        (tmp_path / "pictures" / f"{i}.txt").write_text(f"picture number {i}")
    for i in range(3):
        content = (tmp_path / "pictures" / f"{i}.png").read_bytes()
        (tmp_path / "pictures" / f"{i}.png").write_bytes(content[:60] + bytes(len(content) - 60))
    shards.pack(tmp_path / "pictures", tmp_path / "tars", per_shard=12)
    for world in (1, 2):
        run_train(
            world, "--steps", 12, "--data", tmp_path / "tars", "--out", tmp_path / f"run{world}", *SMALL
        )
        last_line = (tmp_path / f"run{world}/metrics.jsonl").read_text().splitlines()[-1]
        assert json.loads(last_line)["skipped"] == 3


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes(runs):
    run_train(1, "--resume", "--out", runs / "two-other", "--device", "cpu")
    run_train(2, "--resume", "--out", runs / "one-other", "--device", "cpu")
    assert alike(runs / "one", runs / "two-other") and alike(runs / "one", runs / "one-other")


@pytest.mark.slow
def test_zero_spreads_adam_and_changes_nothing(runs):
    run_train(
        2, "--steps", 6, "--out", runs / "zero", *SMALL, "--aux-from", "0.5", "--save-every", "3", "--zero"
    )
    assert alike(runs / "two", runs / "zero")
    for world in (2, 1):  # two go on with their parts, and one process reads what two had spread
        shutil.rmtree(last(runs / "zero"))
        run_train(world, "--resume", "--out", runs / "zero", "--device", "cpu")
        assert alike(runs / "two", runs / "zero")
    a, b = (torch.load(last(runs / name) / "adam.pt", weights_only=True) for name in ("two", "zero"))
    assert a["state"].keys() == b["state"].keys()


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--seed", "3"], "begun with --seed 0"),
        (["--batch-size", "6"], "another --batch-size"),
        (["--data", "{pictures}"], "other data"),
    ],
)
def test_a_resumed_run_refuses_another_sequence_of_samples(runs, tmp_path, flags, said):
    from PIL import Image

    Image.new("RGB", (30, 30)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("nothing")
    before = (runs / "one/metrics.jsonl").read_bytes()
    (result,) = finish(
        start(1, "--resume", "--out", runs / "one", *(f.format(pictures=tmp_path) for f in flags))
    )
    assert result[0] == 2 and said in result[2] and len(result[2].strip().splitlines()) == 1
    assert (runs / "one/metrics.jsonl").read_bytes() == before


def test_processes_that_do_not_agree_refuse_to_start(tmp_path):
    script = (
        "import os, sys, train\nfrom engine import errors\n"
        "if os.environ['RANK'] == '1': sys.argv += ['--lr', '0.001']\nerrors.run(train.main)\n"
    )
    results = finish(start(2, "--steps", 2, "--out", tmp_path / "r", *SMALL, script=script))
    assert [code for code, _, _ in results] == [2, 2] and all(
        "process 1 has recipe" in error for _, _, error in results
    )
    assert not checkpoint.complete_states(tmp_path / "r")


@pytest.mark.slow
def test_the_compiler_recomputation_bf16_and_zero_under_ddp(tmp_path):
    """Two compiled processes with recomputation, bf16 and ZeRO make the run of one plain one, to bf16's rounding."""
    flags = [
        "--steps",
        3,
        *[f for f in SMALL if f not in ("--no-compile", "--precision", "fp32")],
        "--precision",
        "bf16",
    ]
    run_train(1, "--out", tmp_path / "plain", *flags, "--no-compile")
    script = "import train\nfrom engine import errors\ntrain.EAGER_STEPS = 0\nerrors.run(train.main)\n"
    run_train(2, "--out", tmp_path / "all", *flags, "--compile", "--recompute", 3, "--zero", script=script)
    assert losses_of(tmp_path / "plain") == pytest.approx(losses_of(tmp_path / "all"), rel=0.02)


@pytest.mark.slow
def test_a_milestone_stays_and_can_be_sampled(tmp_path):
    run_train(
        1,
        "--steps",
        7,
        "--out",
        tmp_path / "r",
        *SMALL,
        "--save-every",
        1,
        "--keep",
        1,
        "--milestone-every",
        3,
    )
    assert [p.name for p in sorted((tmp_path / "r/state").iterdir())] == [
        "step_00000003",
        "step_00000006",
        "step_00000007",
    ]
    results = finish(
        start(
            1,
            "--checkpoint",
            tmp_path / "r/state/step_00000003",
            "--prompt",
            "x",
            "--out",
            tmp_path / "x.png",
            program="sample",
        )
    )
    assert results[0][0] == 0 and (tmp_path / "x.png").exists()


@pytest.mark.slow
def test_torchrun_itself(tmp_path):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "train.py",
        "--steps",
        "2",
        "--out",
        str(tmp_path / "r"),
        *SMALL,
    ]
    result = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert last(tmp_path / "r").name == "step_00000002"


# ------------------------------------------------------------------------------------------------------------
# Stopped at any moment
# ------------------------------------------------------------------------------------------------------------
def wait_for_metrics(process, run: Path, lines: int = 1, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if (run / "metrics.jsonl").exists() and (run / "metrics.jsonl").read_text().count("\n") >= lines:
            return
        assert process.poll() is None, process.read()[1]
        time.sleep(0.02)
    raise AssertionError("no metrics")


def killed_and_resumed(out: Path, steps: int, kills: int, seed: int) -> list[str]:
    """Train `steps` iterations, killed `kills` times at random moments and
    resumed; what each kill found on the disk."""
    moments, found = random.Random(seed), []
    flags = [*SMALL, "--save-every", "1", "--keep", "2"]
    for kill in range(kills + 1):
        begun = checkpoint.complete_states(out)
        if not begun and (out / "config.json").exists():
            shutil.rmtree(out)  # killed before its first state: begin again, as the message says
        arguments = (
            ["--resume", "--out", out, "--device", "cpu"]
            if begun
            else ["--steps", steps, "--out", out, *flags]
        )
        (process,) = start(1, *arguments)
        if kill == kills:
            code, _, error = finish([process])[0]
            assert code == 0, error
            return found
        deadline = None
        while process.poll() is None and (deadline is None or time.monotonic() < deadline):
            states = checkpoint.complete_states(out)
            if deadline is None and states and states != begun:  # it works and saves: anything from now on
                deadline = time.monotonic() + moments.uniform(0, 0.3)
            time.sleep(0.001)
        process.kill()
        process.communicate()
        states, partial = checkpoint.complete_states(out), list((out / "state").glob("*.partial"))
        found.append(
            f"{states[-1].name if states else 'no state'}{', in the middle of a save' if partial else ''}"
        )
    return found


@pytest.mark.slow
def test_killed_five_times_it_ends_where_it_would_have(tmp_path):
    run_train(1, "--steps", 24, "--out", tmp_path / "whole", *SMALL)
    found = killed_and_resumed(tmp_path / "killed", 24, 5, seed=1)
    assert len(found) == 5 and same(tmp_path / "whole", tmp_path / "killed")
    lines = [
        json.loads(line)["step"] for line in (tmp_path / "killed/metrics.jsonl").read_text().splitlines()
    ]
    assert lines == list(range(1, 25))  # each iteration told once, although some were done twice


@pytest.mark.parametrize("world", [1, 2])
def test_sigterm_saves_within_one_iteration(tmp_path, world):
    processes = start(world, "--steps", 100000, "--out", tmp_path / "r", *SMALL, "--save-every", 0)
    wait_for_metrics(processes[0], tmp_path / "r", 3)
    before = (tmp_path / "r/metrics.jsonl").read_text().count("\n")
    processes[-1].send_signal(signal.SIGTERM)  # to one process only: all must stop alike
    results = finish(processes)
    assert [code for code, _, _ in results] == [128 + signal.SIGTERM] * world, results[0][2]
    assert "--resume" in results[0][1]
    step = checkpoint.step_of(last(tmp_path / "r"))
    assert (
        before <= step <= before + 2 + int(0.5 / 0.1)
    )  # the file may lag behind by what it takes to read it


def test_sigterm_while_pictures_are_drawn(tmp_path, monkeypatch, capsys):
    """The signal comes between two evaluations of the network: no further one is made, and the state is saved."""
    real, calls = sample.generate, []

    def interrupted(loaded, *a, **k):
        inner = loaded.network.forward

        def forward(*x):
            calls.append(1)
            if len(calls) == 3:
                signal.raise_signal(signal.SIGTERM)
            return inner(*x)

        loaded.network.forward = forward
        try:
            return real(loaded, *a, **k)
        finally:
            del loaded.network.forward

    monkeypatch.setattr(sample, "generate", interrupted)
    monkeypatch.setattr(
        sys,
        "argv",
        ["train.py", "--steps", "50", "--out", str(tmp_path / "r"), *SMALL[:-4], "--grid-every", "2"],
    )
    with pytest.raises(SystemExit):
        train.main()
    assert len(calls) == 3 and "--resume" in capsys.readouterr().out
    assert last(tmp_path / "r").name == "step_00000002" and not list((tmp_path / "r/grids").iterdir())


def test_a_ctrl_c_and_torchruns_sigterm_do_not_cut_the_saving_short():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        stop = processes.StopSignal()
        assert not stop
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert stop
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.parametrize("ignored", [False, True], ids=["closed terminal", "nohup"])
def test_a_closed_terminal_stops_a_run_unless_it_is_to_survive(ignored):
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
        stop = processes.StopSignal()
        signal.raise_signal(signal.SIGHUP)
        assert stop.name == ("" if ignored else "SIGHUP")
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a limit on the size of files")
def test_a_full_disk_leaves_the_last_state_whole(tmp_path, monkeypatch):
    """Files may grow to 20 MB only, then to 1 MB: the second save fails as on a full disk."""
    script = (
        "import resource, sys, train\n"
        "from engine import checkpoint, errors\n"
        "save = checkpoint.save_state\n"
        "def limited(*a):\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, ((10**9 if a[-2]['step'] < 4 else 10**6), 10**9))\n"
        "    return save(*a)\n"
        "checkpoint.save_state = limited\n"
        "errors.run(train.main)\n"
    )
    code, _, error = finish(
        start(1, "--steps", 6, "--out", tmp_path / "r", *SMALL, "--save-every", 2, script=script)
    )[0]
    lines = [line for line in error.splitlines() if "cannot save" in line]
    assert code == 2 and len(lines) == 1 and "step_00000002" in lines[0] and "make room" in lines[0], error
    assert [p.name for p in (tmp_path / "r/state").iterdir()] == ["step_00000002"]
    assert not list((tmp_path / "r").rglob("*.partial"))
    run_train(1, "--resume", "--out", tmp_path / "r", "--device", "cpu")
    run_train(1, "--steps", 6, "--out", tmp_path / "whole", *SMALL)
    assert same(tmp_path / "r", tmp_path / "whole")


# ------------------------------------------------------------------------------------------------------------
# Numbers that are not finite
# ------------------------------------------------------------------------------------------------------------
POISON = (
    "import os, sys, torch, losses, train\n"
    "from engine import errors\n"
    "forward = losses.SelfE.forward\n"
    "calls = [0]\n"
    "def poisoned(self, x0, *a, **k):\n"
    "    calls[0] += 1\n"
    "    bad = calls[0] in {calls} and int(os.environ['RANK']) == int(os.environ['WORLD_SIZE']) - 1\n"
    "    return forward(self, x0 * float('nan') if bad else x0, *a, **k)\n"
    "losses.SelfE.forward = poisoned\n"
    "errors.run(train.main)\n"
)


def test_one_bad_sample_on_one_process_leaves_the_update_out_on_all(tmp_path):
    script = POISON.replace("{calls}", "(3,)")
    results = finish(
        start(2, "--steps", 4, "--out", tmp_path / "r", *SMALL, "--save-every", 1, "--keep", 9, script=script)
    )
    assert [code for code, _, _ in results] == [0, 0], results[0][2]
    two, three, four = (tensors(tmp_path / f"r/state/step_0000000{n}") for n in (2, 3, 4))
    assert all(
        torch.equal(two[key], three[key]) for key in two
    )  # weights, average, moments, Adam's own count
    assert any(not torch.equal(three[key], four[key]) for key in three) and all(
        torch.isfinite(four[key]).all() for key in four
    )
    records = [json.loads(line) for line in (tmp_path / "r/metrics.jsonl").read_text().splitlines()]
    (told,) = [r for r in records if r.get("update_left_out")]
    assert told["step"] == 3 and told["keys"] == ["shapes-0-10", "shapes-0-11"]  # the second process's half
    assert records[-1]["nonfinite"] == 1 and "update is left out" in results[0][2]


def test_five_in_a_row_stop_the_run_and_name_the_samples(tmp_path):
    script = POISON.replace("{calls}", "range(4, 99)")
    flags = ["--steps", 20, "--out", tmp_path / "r", *SMALL, "--save-every", 2, "--keep", 9]
    for code, _, error in finish(start(2, *flags, script=script)):
        assert code == 2
        line = error.strip().splitlines()[-1]
        assert all(said in line for said in ("5 iterations in a row", "shapes-0-30", "--resume"))
        assert "shapes-0-28" not in line
    # 2: the last whole one; 3 is good, 4-8 are not
    before, after = (tensors(tmp_path / f"r/state/step_0000000{n}") for n in (2, 8))
    assert last(tmp_path / "r").name == "step_00000008"
    assert all(torch.isfinite(value).all() for value in after.values())
    assert any(not torch.equal(before[key], after[key]) for key in before)  # iteration 3 is not lost


# ------------------------------------------------------------------------------------------------------------
# Known traps: what autocast, recomputation, the compiler and DDP do to gradients
# ------------------------------------------------------------------------------------------------------------
SIZE = dict(width=32, heads=2, double=2, single=2, axes=(4, 6, 6), channels=3, patch=4, txt_dim=8, vec_dim=8)


def gradients(
    precision=torch.float32, recompute=0, compiled=False, evaluate_first=False, aux=True
) -> torch.Tensor:
    """All gradients of one Self-E step at weights away from zero, as one vector."""
    torch.manual_seed(0)
    network = model.Denoiser(**SIZE, precision=precision)
    for p in network.parameters():
        torch.nn.init.normal_(p, std=0.1)
    network.recompute = recompute
    objective = losses.SelfE(network, copy.deepcopy(network).requires_grad_(False))
    if compiled:
        for block in [*network.double_blocks, *network.single_blocks]:
            block.compile(dynamic=False, backend="aot_eager")
    B, shape = 8, (3, 16, 16)
    x0, c, null, fake = (
        torch.randn(B, *shape),
        *(((torch.randn(B, 5, 8), torch.randn(B, 8))) for _ in range(3)),
    )
    arguments = (
        x0,
        c,
        null,
        fake,
        torch.zeros(B, dtype=torch.bool),
        losses.draw(0, 0, list(range(B)), shape),
        0.7,
        aux,
    )
    if evaluate_first:
        with torch.no_grad():
            network(x0, torch.rand(B), torch.zeros(B), *c)
    loss, _ = objective(*arguments)
    loss.backward()
    return torch.cat([p.grad.flatten() for p in network.parameters()])


@pytest.fixture(scope="module")
def exact():
    return gradients()


@pytest.mark.parametrize(
    "choices, close",
    [
        (dict(recompute=4), 1e-6),
        (dict(evaluate_first=True), 1e-6),
        pytest.param(dict(compiled=True), 1e-5, marks=pytest.mark.slow),
        pytest.param(dict(recompute=3, compiled=True), 1e-5, marks=pytest.mark.slow),
        (dict(precision=torch.bfloat16), 0.05),
        (dict(precision=torch.bfloat16, evaluate_first=True), 0.05),
        (dict(precision=torch.bfloat16, recompute=4), 0.05),
        pytest.param(
            dict(precision=torch.bfloat16, compiled=True, recompute=2), 0.05, marks=pytest.mark.slow
        ),
    ],
)
def test_gradients_are_the_same_by_every_way(exact, choices, close):
    """A pass without gradient before one with it inside one autocast context lost gradients in some torch versions
    (pytorch issue 112583): every parameter must have its gradient, and the right one."""
    other = gradients(**choices)
    assert ((other - exact).norm() / exact.norm()).item() < close
    torch._dynamo.reset()


def test_recomputing_keeps_fewer_activations():
    """Bytes that autograd saves for the backward pass, counted by its own hooks."""
    saved = {}
    for recompute in (0, 4):
        torch.manual_seed(0)
        network = model.Denoiser(**SIZE)
        network.recompute = recompute
        total = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: total.append(x.numel()) or x, lambda x: x):
            network(
                torch.randn(4, 3, 32, 32),
                torch.rand(4),
                torch.zeros(4),
                torch.randn(4, 5, 8),
                torch.randn(4, 8),
            )
        saved[recompute] = sum(total)
    assert saved[4] < 0.3 * saved[0]


@pytest.mark.parametrize(
    "recompute, runs_of",
    [(0, [1, 1, 1, 1]), (1, [2, 1, 1, 1]), (3, [2, 2, 2, 1]), (4, [2, 2, 2, 2]), (9, [2, 2, 2, 2])],
)
def test_as_many_blocks_run_twice_as_are_asked_for(recompute, runs_of):
    """Of two blocks with two streams and two with one, the first so many, once forwards and once in the backward pass;
    without gradient none."""
    network = model.Denoiser(**SIZE)
    network.recompute = recompute
    runs = [0] * 4
    for i, block in enumerate([*network.double_blocks, *network.single_blocks]):
        block.register_forward_pre_hook(lambda *_, i=i: runs.__setitem__(i, runs[i] + 1))
    inputs = torch.randn(2, 3, 8, 8), torch.rand(2), torch.zeros(2), torch.randn(2, 5, 8), torch.randn(2, 8)
    network(*inputs).sum().backward()
    assert runs == runs_of
    with torch.no_grad():
        network(*inputs)
    assert runs == [n + 1 for n in runs_of]


def test_the_rehearsal_meets_every_stage_and_leaves_nothing_behind(monkeypatch):
    plan = recipe.replace(
        recipe.make("laptop", steps=10, aux_from=0.8, micro_batch=4),
        txt_len=5,
        stages=(recipe.Stage(0, (16,), 8), recipe.Stage(0.5, (16, 32), 8)),
    )
    network = model.Denoiser(**SIZE)
    objective, seen = losses.SelfE(network, copy.deepcopy(network).requires_grad_(False)), []
    data_feed = feed.Feed(plan, losses.draw, 0, feed.Codec(None, None, torch.device("cpu"), patch=4))
    adam = optimizers.build("adam", network, plan.lr, plan.betas)
    run = types.SimpleNamespace(
        plan=plan,
        feed=data_feed,
        codec=data_feed.codec,
        ranks=processes.Ranks(),
        args=types.SimpleNamespace(zero=False),
    )
    forward = objective.forward
    monkeypatch.setattr(
        objective, "forward", lambda x0, *a: seen.append((tuple(x0.shape), a[-1])) or forward(x0, *a)
    )
    before = copy.deepcopy(network.state_dict())
    rehearse(run, network, objective, adam)
    assert seen == [((4, 3, 16, 16), False), ((4, 3, 16, 16), True), ((2, 3, 32, 32), True)]
    assert all(p.grad is None for p in network.parameters())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())

    def full(*a):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(objective, "forward", full)
    with pytest.raises(errors.UserError, match="--micro-batch"):
        rehearse(run, network, objective, adam)


@pytest.mark.slow
def test_no_picture_size_is_compiled_twice():
    """Two passes over three sizes, with and without gradient: the second compiles nothing."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    machine.allow_shapes(24)
    network = model.Denoiser(**SIZE)
    for block in [*network.double_blocks, *network.single_blocks]:
        block.compile(dynamic=False, backend="eager")
    counts = []
    for _ in range(3):
        for side in ((16, 16), (8, 24), (24, 8), (32, 16), (16, 32)):
            x = (
                torch.randn(4, 3, *side),
                torch.rand(4),
                torch.zeros(4),
                torch.randn(4, 5, 8),
                torch.randn(4, 8),
            )
            network(*x).square().mean().backward()
            with torch.no_grad():
                network(*(a[:2] for a in x))
        counts.append(counters["stats"]["unique_graphs"])
    torch._dynamo.reset()
    assert counts[0] > 0 and counts[0] == counts[1] == counts[2]


# ------------------------------------------------------------------------------------------------------------
# What is told of a run
# ------------------------------------------------------------------------------------------------------------
def test_the_meter_says_what_the_samples_say():
    torch.manual_seed(1)
    t, u = torch.rand(64), torch.rand(64)
    t[0] = 1.0  # s = t there; pure noise belongs to the last quarter
    s = torch.where(torch.arange(64) % 2 == 0, t, t * u)
    rows = [
        {
            "t": t[i : i + 16],
            "s": s[i : i + 16],
            "loss": t[i : i + 16] ** 2 + 1,
            "lam": torch.full((8,), 1 / 3),
            "delta_norm": torch.full((8,), 3.0),
        }
        for i in range(0, 64, 16)
    ]
    meter = monitor.Meter(torch.device("cpu"))
    for row in rows:
        meter.add(row, 5e9)
        meter.keep(torch.tensor(2.0))
        meter.add({name: value * float("nan") for name, value in row.items()}, 5e9)
        meter.drop()  # an iteration that is not finite leaves no trace
    record = meter.record(1, 1e12, 0.0)
    assert record["loss"] == pytest.approx((t**2 + 1).mean().item()) and record["share_jump"] == 0.5
    assert record["grad_norm"] == 2
    for b in range(4):
        inside = (t >= b / 4) & ((t < (b + 1) / 4) | (b == 3))
        assert record[f"loss_t{b}"] == pytest.approx((t[inside] ** 2 + 1).mean().item())
    assert record["lambda"] == pytest.approx(1 / 3)  # a mix of a quarter
    assert (record["w"], record["delta_norm"]) == (0.25, 3.0) and "fake_loss" not in record
    assert record["mfu"] * 1e12 / record["iterations_per_s"] == pytest.approx(5e9)
    assert meter.sums.sum() == 0 and meter.record(1, 1e12, 0.0) == {}


def test_two_processes_that_see_the_same_tell_what_one_tells(monkeypatch):
    """All means, and the share of the peak: twice the operations on twice the machine."""
    t = torch.rand(8)
    row = {"t": t, "s": t / 2, "loss": t, "lam": t, "delta_norm": t, "fake_loss": t}
    monkeypatch.setattr(monitor.dist, "all_reduce", lambda sums: sums.mul_(2))
    records = []
    for world in (1, 2):
        monkeypatch.setattr(monitor.time, "perf_counter", iter([0.0, 10.0, 10.0]).__next__)
        meter = monitor.Meter(torch.device("cpu"))
        meter.add(row, 5e12)
        meter.keep(torch.tensor(2.0))
        records.append(meter.record(world, 1e12, 4.0))
    assert records[0] == pytest.approx(records[1])
    assert [records[0][name] for name in ("mfu", "data_wait", "iterations_per_s")] == pytest.approx(
        [0.5, 0.4, 0.1]
    )


def test_every_record_has_its_columns(runs):
    records = [json.loads(line) for line in (runs / "two/metrics.jsonl").read_text().splitlines()]
    always = {
        "step",
        "loss",
        "share_jump",
        "grad_norm",
        "lr",
        "tau",
        "aux",
        "images_per_s",
        "mfu",
        "data_wait",
        "skipped",
        "nonfinite",
        "elapsed",
    }
    assert all(always <= set(r) for r in records)
    assert records[0]["share_jump"] == 0 and records[-1]["share_jump"] == 0.5  # tau = 0 at first
    assert [("fake_loss" in r) for r in records] == [False] * 3 + [True] * 3
    pytest.importorskip("tensorboard")
    assert list((runs / "two/tensorboard").glob("events*"))


def test_dry_run_writes_nothing_and_knows_where_a_run_stands(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for arguments in (
        ["--size", "2b", "--dry-run"],
        ["--out", str(runs / "one"), "--resume", "--steps", "100", "--dry-run"],
    ):
        monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
        train.main()
    told = capsys.readouterr().out
    assert list(tmp_path.iterdir()) == [] and "iterations 6 to 100" in told
    for wanted in (
        "2,247",
        "iterations 0 to 500,000",
        "500,000 to 710,000",
        "768 pictures",
        "from iteration 550,000",
        "over 300,000",
        "41.8",
        "64 GPUs",
        "H100-hours",
    ):
        assert wanted in told, wanted


def test_the_size_of_a_state_is_what_the_plan_says(runs, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "--dry-run", "--out", "nowhere"])
    train.main()
    gib = float(re.search(r"each saved state: ([\d.]+) GiB", capsys.readouterr().out)[1])
    written = sum(file.stat().st_size for file in last(runs / "one").iterdir()) / 2**30
    assert written == pytest.approx(gib, rel=0.3)


def test_muons_state_is_smaller_and_called_by_its_name(capsys, monkeypatch):
    """Muon keeps one number of each matrix entry, Adam two; nearly all parameters of the large sizes are such."""
    told = {}
    for name in ("adam", "muon"):
        monkeypatch.setattr(sys, "argv", ["train.py", "--size", "0.5b", "--optimizer", name, "--dry-run"])
        train.main()
        told[name] = capsys.readouterr().out
    state = re.compile(r"each process: ([\d.]+) GiB of state \(weights ([\d.]+)")
    sizes = {name: [float(x) for x in state.search(out).groups()] for name, out in told.items()}
    assert (
        "gradients 2.10, Adam 4.21, EMA" in told["adam"]
        and "gradients 2.10, Muon and Adam 2." in told["muon"]
    )
    assert 0.9 < (sizes["adam"][0] - sizes["muon"][0]) / sizes["adam"][1] < 1


if __name__ == "__main__":  # the long form: python tests/test_scale.py --times 50 --out results/kill.json
    import argparse
    import tempfile

    parser = argparse.ArgumentParser(
        description="Kill a training run at random moments, resume it, and compare its end."
    )
    parser.add_argument("--times", type=int, default=50)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        run_train(1, "--steps", args.steps, "--out", Path(folder) / "whole", *SMALL)
        found = killed_and_resumed(Path(folder) / "killed", args.steps, args.times, args.seed)
        equal = same(Path(folder) / "whole", Path(folder) / "killed")
    report = machine.provenance(torch.device("cpu")) | {
        "seed": args.seed,
        "iterations": args.steps,
        "kills": len(found),
        "in_the_middle_of_a_save": sum("save" in f for f in found),
        "found": found,
        "same_end_bit_for_bit": equal,
        "seconds": round(time.perf_counter() - began, 1),
    }
    print(json.dumps({k: v for k, v in report.items() if k != "found"}, indent=1))
    if args.out:
        checkpoint.write_json(args.out, report)
    sys.exit(0 if equal else 1)
