"""Several processes, stops at any moment, a bad sample on one process: nothing is lost and nothing goes wrong silently."""

import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from programs import last, records, run, same, tensors
from ranks import SMALL, TINY, TRAIN, finish, printed, start
from ranks import train as run_train

import sample
import train
from engine import checkpoint, errors, processes
from scale import shards

ROOT = Path(__file__).parent.parent


def losses_of(run: Path) -> list[float]:
    return [record["loss"] for record in records(run)]


def alike(a: Path, b: Path) -> bool:
    """Whether two runs ended alike but for rounding: the same losses, all but a hundredth of the weights equal to 1e-4.

    Adam's first updates are the signs of gradients, so a weight whose gradient is rounding noise goes either way.
    """
    first, second = tensors(last(a)), tensors(last(b))
    assert last(a).name == last(b).name and first.keys() == second.keys()
    weights = [key for key in first if not key.startswith("adam")]
    flips = sum(((first[key] - second[key]).abs() > 1e-4).sum().item() for key in weights)
    few = flips < 1e-2 * sum(first[key].numel() for key in weights)
    return few and losses_of(a) == pytest.approx(losses_of(b), rel=1e-4)


# --- Processes and resuming ---------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Six iterations with the auxiliary stage from the fourth on, whole and cut after the third: one process with all
    eight pictures at once, and two with two micro-batches each."""
    folder = tmp_path_factory.mktemp("runs")
    flags = [*SMALL[2:], "--batch-size", 8, "--steps", 6, "--aux-from", "0.5", "--save-every", "3"]
    run_train(1, "--out", folder / "one", *flags, "--micro-batch", 8)
    run_train(2, "--out", folder / "two", *flags, "--micro-batch", 2)
    for name in ("one", "two"):
        for copy in ("halves", "other"):
            shutil.copytree(folder / name, folder / f"{name}-{copy}")
            shutil.rmtree(folder / f"{name}-{copy}" / "state" / "step_00000006")
    return folder


@pytest.mark.parametrize("world, name", [(1, "one"), (2, "two")])
def test_three_and_three_iterations_equal_six(runs, world, name):
    """Bit for bit, and in the loss of every iteration, so the batches were the same too."""
    run_train(world, "--resume", "--out", runs / f"{name}-halves", "--device", "cpu")
    assert same(runs / name, runs / f"{name}-halves")
    assert losses_of(runs / name) == losses_of(runs / f"{name}-halves")


def test_two_processes_with_two_micro_batches_equal_one(runs):
    """A gradient that is reduced with the first micro-batch, not the last, lets the processes drift apart."""
    assert alike(runs / "one", runs / "two")


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes(runs):
    run_train(1, "--resume", "--out", runs / "two-other", "--device", "cpu")
    run_train(2, "--resume", "--out", runs / "one-other", "--device", "cpu", "--micro-batch", 4)
    assert alike(runs / "one", runs / "two-other") and alike(runs / "one", runs / "one-other")


@pytest.mark.slow
def test_zero_spreads_adam_and_changes_nothing(runs):
    flags = [*SMALL[2:], "--batch-size", 8, "--steps", 6, "--aux-from", "0.5", "--save-every", "3"]
    run_train(2, "--out", runs / "zero", *flags, "--micro-batch", 2, "--zero")
    assert alike(runs / "two", runs / "zero")
    for world in (2, 1):  # two go on with their parts, and one process reads what two had spread
        shutil.rmtree(last(runs / "zero"))
        run_train(world, "--resume", "--out", runs / "zero", "--device", "cpu")
        assert alike(runs / "two", runs / "zero")


@pytest.mark.slow
def test_what_is_skipped_is_counted_once_on_any_number_of_processes(tmp_path):
    """Noise in tars; of the first three pictures only decoding finds that they cannot be read."""
    noise, pictures = np.random.default_rng(0), tmp_path / "pictures"
    pictures.mkdir()
    for i in range(12):
        path = pictures / f"{i}.png"
        Image.fromarray(noise.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(path)
        (pictures / f"{i}.txt").write_text(f"picture number {i}")
        if i < 3:
            path.write_bytes(path.read_bytes()[:60] + bytes(path.stat().st_size - 60))
    shards.pack(pictures, tmp_path / "tars", per_shard=12)
    for world in (1, 2):
        flags = ["--steps", 12, "--data", tmp_path / "tars", "--out", tmp_path / f"run{world}", *SMALL]
        lines = "".join(error for _, _, error in run_train(world, *flags))
        assert lines.count("left out 00000/") == lines.count(": broken picture") == 3
        assert records(tmp_path / f"run{world}")[-1]["skipped"] == 3


def test_processes_that_do_not_agree_refuse_to_start(tmp_path):
    script = "import os, sys\nif os.environ['RANK'] == '1': sys.argv += ['--lr', '0.001']\n" + TINY
    results = finish(start(2, "--steps", 2, "--out", tmp_path / "r", *SMALL, script=script))
    assert all(code == 2 and "process 1 has lr 0.001" in error for code, _, error in results)
    assert not checkpoint.complete_states(tmp_path / "r")


@pytest.mark.parametrize("address", [{}, {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}], ids=str)
def test_processes_that_do_not_meet_say_so_and_give_up(address, monkeypatch, capsys):
    """No address, or nobody there; who waits for whom is said while they wait."""
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in address.items() | {("WORLD_SIZE", "2"), ("RANK", "1")}:
        monkeypatch.setenv(name, value)
    timer = threading.Timer
    monkeypatch.setattr(processes.threading, "Timer", lambda seconds, *a: timer(0, *a))
    with pytest.raises(errors.UserError, match="process 1 did not meet the other 1 of 2 processes"):
        with processes.Ranks.of_environment().connected(torch.device("cpu"), 1):
            pass
    assert "process 1 waits for" in capsys.readouterr().err


@pytest.mark.slow
def test_the_compiler_recomputation_bf16_and_zero_under_ddp(tmp_path):
    """Two compiled processes with recomputation, bf16 and ZeRO make the run of one plain one, to bf16's rounding."""
    flags = "--steps 3 --batch-size 4 --device cpu --precision bf16 --grid-every 0 --log-every 1".split()
    run_train(1, "--out", tmp_path / "plain", *flags, "--no-compile", script=TRAIN)
    script = TRAIN.replace("errors.run", "train.EAGER_STEPS = 0\nerrors.run")
    run_train(2, "--out", tmp_path / "all", *flags, "--compile", "--recompute", 3, "--zero", script=script)
    assert losses_of(tmp_path / "plain") == pytest.approx(losses_of(tmp_path / "all"), rel=0.02)


@pytest.mark.slow
def test_torchrun_itself(tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "train.py", "--steps", "2", "--out", str(tmp_path / "r"), *SMALL]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert last(tmp_path / "r").name == "step_00000002"


# --- Stopped at any moment ----------------------------------------------------------------------------------
def killed_and_resumed(out: Path, steps: int, kills: int, seed: int) -> list[str]:
    """Train, killed `kills` times at random moments and resumed; what each kill found on the disk."""
    moments, found = random.Random(seed), []
    for _ in range(kills):
        begun, kill_at = checkpoint.complete_states(out), None
        if not begun and (out / "config.json").exists():
            shutil.rmtree(out)  # killed before its first state: begin again, as the message says
        (process,) = start(1, *run_flags(out, steps), script=TRAIN)
        while process.exitcode is None and (kill_at is None or time.monotonic() < kill_at):
            states = checkpoint.complete_states(out)
            if kill_at is None and states and states != begun:  # it works and saves: anything from now on
                kill_at = time.monotonic() + moments.uniform(0, 0.3)
            time.sleep(0.001)
        process.kill()
        process.join()
        states = checkpoint.complete_states(out)
        saving = ", in the middle of a save" if list((out / "state").glob("*.partial")) else ""
        found.append((states[-1].name if states else "no state") + saving)
    run_train(1, *run_flags(out, steps), script=TRAIN)
    return found


def run_flags(out: Path, steps: int) -> list:
    if checkpoint.complete_states(out):
        return ["--out", out, "--resume", "--device", "cpu"]
    return ["--out", out, "--steps", steps, *SMALL, "--save-every", "1", "--keep", "2"]


@pytest.mark.slow
def test_killed_five_times_it_ends_where_it_would_have(tmp_path):
    run_train(1, "--steps", 24, "--out", tmp_path / "straight", *SMALL, script=TRAIN)
    found = killed_and_resumed(tmp_path / "killed", 24, 5, seed=1)
    assert len(found) == 5 and same(tmp_path / "straight", tmp_path / "killed")
    steps = [record["step"] for record in records(tmp_path / "killed")]
    assert steps == list(range(1, 25))  # each iteration once, although some were done twice


@pytest.mark.parametrize("world, number", [(1, signal.SIGINT), (2, signal.SIGTERM)])
def test_a_signal_saves_within_one_iteration(tmp_path, world, number):
    out = tmp_path / "r"
    started = start(world, "--steps", 100000, "--out", out, *SMALL, "--save-every", 0)
    while not (out / "metrics.jsonl").exists() or len(records(out)) < 3:
        assert started[0].exitcode is None, printed(started[0])
        time.sleep(0.02)
    before = len(records(out))
    os.kill(started[-1].pid, number)  # to one process only: all must stop alike
    results = finish(started)
    assert [code for code, _, _ in results] == [128 + number] * world, results[0][2]
    assert f"python train.py --resume --out {out}" in results[0][1]
    assert before <= checkpoint.step_of(last(out)) <= before + 7  # the file may be read a little late
    sample.load(out, torch.device("cpu"))


def test_sigterm_while_pictures_are_drawn(tmp_path, monkeypatch, capsys):
    """The signal comes between two evaluations of the network: no further one is made, and the state is saved."""
    generate, calls = sample.generate, []

    def count(*_):
        calls.append(None)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGTERM)

    def interrupted(loaded, *a, **k):
        with loaded.network.register_forward_hook(count):
            return generate(loaded, *a, **k)

    monkeypatch.setattr(sample, "generate", interrupted)
    with pytest.raises(SystemExit):
        run(monkeypatch, train, "--steps", 50, "--out", tmp_path / "r", *SMALL[:-4], "--grid-every", 2)
    assert len(calls) == 3 and "--resume" in capsys.readouterr().out
    assert last(tmp_path / "r").name == "step_00000002" and not list((tmp_path / "r/grids").iterdir())


@pytest.fixture
def handlers():
    """The handlers of signals, put back afterwards."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_ctrl_c_and_torchruns_sigterm_do_not_cut_the_saving_short(handlers):
    stop = processes.StopSignal()
    assert not stop
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGTERM):
        signal.raise_signal(number)
    assert stop
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("ignored", [False, True], ids=["closed terminal", "nohup"])
def test_a_closed_terminal_stops_a_run_unless_it_is_to_survive(ignored, handlers):
    signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
    stop = processes.StopSignal()
    signal.raise_signal(signal.SIGHUP)
    assert stop.name == ("" if ignored else "SIGHUP")


@pytest.mark.slow
def test_ctrl_c_while_compiling_waits_for_the_compiler(tmp_path):
    """A terminal sends Ctrl-C to every process of the command, compilers too; here all of them are built anew."""
    flags = "--steps 1000 --batch-size 4 --device cpu --precision fp32 --grid-every 0 --compile".split()
    command = [sys.executable, "train.py", "--out", str(tmp_path / "run"), *flags]
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    options = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    process = subprocess.Popen(command, cwd=ROOT, env=environment, **options)
    try:
        while not list(tmp_path.glob("cache/**/*.cpp")):
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGINT)
        output, complaints = process.communicate(timeout=600)
    finally:
        process.kill()
    assert process.returncode == 130 and "stopped by SIGINT after iteration" in output, complaints[-3000:]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a limit on the size of files")
def test_a_full_disk_leaves_the_last_state_whole(tmp_path):
    """From the second save on files may grow to 10 kB only: it fails as on a full disk."""
    limited = (
        "import resource\nfrom engine import checkpoint\nsave = checkpoint.save_state\n"
        "def limited(*a):\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, ((10**9 if a[-2]['step'] < 4 else 10**4), 10**9))\n"
        "    return save(*a)\n"
        "checkpoint.save_state = limited\n"
    )
    flags = ["--steps", 6, *SMALL, "--save-every", 2]
    code, _, error = finish(start(1, "--out", tmp_path / "r", *flags, script=limited + TINY))[0]
    (line,) = [line for line in error.splitlines() if "cannot save" in line]
    assert code == 2 and "step_00000002" in line and "make room" in line
    assert [p.name for p in (tmp_path / "r/state").iterdir()] == ["step_00000002"]
    assert not list((tmp_path / "r").rglob("*.partial"))
    run_train(1, "--resume", "--out", tmp_path / "r", "--device", "cpu")
    assert last(tmp_path / "r").name == "step_00000006"


# --- Numbers that are not finite ----------------------------------------------------------------------------
POISON = """
import os, losses
forward, calls = losses.SelfE.forward, [0]
def poisoned(self, x0, *a, **k):
    calls[0] += 1
    bad = calls[0] == 3 and os.environ["RANK"] == "1"
    return forward(self, x0 * float("nan") if bad else x0, *a, **k)
losses.SelfE.forward = poisoned
"""


def test_one_bad_sample_on_one_process_leaves_the_update_out_on_all(tmp_path):
    flags = ["--steps", 4, "--out", tmp_path / "r", *SMALL, "--save-every", 1, "--keep", 9]
    results = finish(start(2, *flags, script=POISON + TINY))
    assert [code for code, _, _ in results] == [0, 0], results[0][2]
    two, three, four = (tensors(tmp_path / f"r/state/step_0000000{n}") for n in (2, 3, 4))
    assert all(torch.equal(two[key], three[key]) for key in two)  # weights, average, moments, Adam's count
    assert any(not torch.equal(three[key], four[key]) for key in three)
    assert all(value.isfinite().all() for value in four.values())
    (left_out,) = [record for record in records(tmp_path / "r") if record.get("update_left_out")]
    assert left_out["step"] == 3 and left_out["keys"] == [
        "shapes-0-10",
        "shapes-0-11",
    ]  # the second process's half
    assert records(tmp_path / "r")[-1]["nonfinite"] == 1 and "update is left out" in results[0][2]
