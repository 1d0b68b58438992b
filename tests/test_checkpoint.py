"""What lies on the disk when a process is killed while it saves: at every point, complete states and nothing else."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from programs import TINY, refused, run
from safetensors.torch import load_file, save_file
from torch import nn

import model
import sample
from engine import checkpoint, errors

FILES = {"config.json", "model.safetensors", "network.safetensors", "adam.pt", "state.json"}


class Killed(BaseException):
    """The process ends here: nothing of ours may catch it."""


def models(value: float) -> tuple[nn.Module, nn.Module, torch.optim.Adam]:
    """A network and an average whose weights say which iteration they are of, and an optimizer that has moved."""
    network, ema = nn.Linear(3, 2), nn.Linear(3, 2)
    adam = torch.optim.Adam(network.parameters(), fused=True)
    network(torch.ones(1, 3)).sum().backward()
    adam.step()
    for module in (network, ema):
        for p in module.parameters():
            nn.init.constant_(p, value)
    return network, ema, adam


def save(run: Path, step: int, keep: int = 2, milestone_every: int = 0) -> Path:
    args = SimpleNamespace(keep=keep, milestone_every=milestone_every)
    return checkpoint.save_state(run, *models(step), {"of": step}, {"step": step}, args)


def steps_of(run: Path) -> list[int]:
    return [checkpoint.step_of(state) for state in checkpoint.complete_states(run)]


def check_whole(run: Path) -> None:
    """Every state with a final name is complete and of its own iteration, and RUN/model.safetensors is of one."""
    for state in checkpoint.complete_states(run):
        step = checkpoint.step_of(state)
        assert {path.name for path in state.iterdir()} == FILES
        network, ema, adam = models(-1)
        checkpoint.load_weights(state / "network.safetensors", network)
        checkpoint.load_weights(state / "model.safetensors", ema)
        checkpoint.load_optimizer(state / "adam.pt", adam, False)
        assert all((p == step).all() for module in (network, ema) for p in module.parameters())
        assert json.loads((state / "state.json").read_text()) == {"step": step}
        assert json.loads((state / "config.json").read_text()) == {"of": step}
    if (run / "model.safetensors").exists():
        assert len(set(load_file(run / "model.safetensors")["bias"].tolist())) == 1


class Events:
    """Counts what the checkpoint code asks of the disk; the one of number `fatal` is its last, and only half done."""

    def __init__(self, patch, fatal: int | None = None):
        self.fatal, self.seen = fatal, []
        calls = [(os, "replace"), (os, "fsync"), (os, "link"), (shutil, "rmtree"), (torch, "save")]
        calls += [(checkpoint, "save_file"), (Path, "write_text"), (Path, "mkdir"), (Path, "unlink")]
        for owner, name in calls:
            patch.setattr(owner, name, self.watched(name, getattr(owner, name)))

    def watched(self, name, work):
        def call(*arguments, **options):
            self.seen.append(name)
            if self.fatal and len(self.seen) > self.fatal:
                raise Killed  # nothing that stands in a `finally` happens either
            if len(self.seen) == self.fatal:
                if name == "rmtree":  # killed in the middle of it
                    os.remove(next(Path(arguments[0]).iterdir()))
                if name == "write_text":
                    work(arguments[0], arguments[1][: len(arguments[1]) // 2], **options)
                raise Killed
            return work(*arguments, **options)

        return call


def test_killed_at_any_moment_of_saving(tmp_path, monkeypatch):
    """Kill at the first, second, ... thing that saving asks of the disk: the state before stays until the new one is
    whole, and the next save of another process sweeps what is left."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # no power is cut here
    fatal, names = 0, set()
    while True:
        fatal += 1
        run = tmp_path / str(fatal)
        save(run, 10), save(run, 20)
        with pytest.MonkeyPatch.context() as patch:
            events = Events(patch, fatal)
            try:
                save(run, 30)
            except Killed:
                pass
        names |= set(events.seen[fatal - 1 : fatal])
        check_whole(run)
        assert steps_of(run) in ([10, 20], [10, 20, 30], [20, 30])
        if len(events.seen) < fatal:
            break  # it came to its end
        save(run, 40)
        check_whole(run)
        assert steps_of(run)[-1] == 40 and len(steps_of(run)) == 2 and not list(run.rglob("*.partial"))
        assert (load_file(run / "model.safetensors")["bias"] == 40).all()
    assert fatal > 20 and names >= {"replace", "fsync", "rmtree", "save", "save_file", "write_text"}


def test_everything_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """A power cut after a rename finds the files whole: each is synced before, and its folder after."""
    order = []
    to_disk, replace = checkpoint.to_disk, os.replace
    monkeypatch.setattr(
        checkpoint, "to_disk", lambda path: order.append(("sync", Path(path).name)) or to_disk(path)
    )
    monkeypatch.setattr(os, "replace", lambda a, b: order.append(("name", Path(b).name)) or replace(a, b))
    save(tmp_path, 7)
    named = order.index(("name", "step_00000007"))
    synced = {name.removesuffix(".partial") for what, name in order[:named] if what == "sync"}
    assert synced >= FILES | {"step_00000007"} and ("sync", "state") in order[named:]
    for name in FILES - {"adam.pt"}:  # written as NAME.partial
        assert order.index(("sync", f"{name}.partial")) < order.index(("name", name)) < named
    assert order[-2:] == [("sync", "model.safetensors.partial"), ("name", "model.safetensors")]


def test_a_failing_save_leaves_no_partial(tmp_path, monkeypatch):
    """A full disk at any of the files: one error that names the last state, and nothing half-written."""
    save(tmp_path, 1)
    for name, owner, full in (
        ("save", torch, RuntimeError("[enforce fail] unexpected pos 64 vs 0\nmore")),
        ("save_file", checkpoint, OSError(28, "No space left on device")),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, lambda *a, full=full, **k: (_ for _ in ()).throw(full))
            with pytest.raises(errors.UserError, match="step_00000001") as told:
                save(tmp_path, 2)
        assert (
            "\n" not in str(told.value)
            and steps_of(tmp_path) == [1]
            and not list(tmp_path.rglob("*.partial"))
        )
        check_whole(tmp_path)


def test_partials_of_the_dead_are_swept(tmp_path):
    """Those of a state and of a single file; another process's shared partials stay, it may be at work."""
    left = tmp_path / "state" / "step_00000003.partial"
    left.mkdir(parents=True)
    (left / "adam.pt").write_bytes(b"half")
    (tmp_path / "model.safetensors.partial").write_bytes(b"half")
    (tmp_path / "model.safetensors.partial").chmod(0)
    save(tmp_path, 4)
    assert not list(tmp_path.rglob("*.partial"))
    check_whole(tmp_path)
    with pytest.raises(ZeroDivisionError), checkpoint.in_one_piece(tmp_path / "x.json") as partial:
        partial.write_text("half")
        1 / 0
    assert not list(tmp_path.glob("x.json*"))


def test_milestones_stay_and_other_old_states_go(tmp_path):
    for step in range(1, 9):
        save(tmp_path, step, keep=2, milestone_every=3)
    assert steps_of(tmp_path) == [3, 6, 7, 8]
    save(tmp_path, 9, keep=1)
    assert steps_of(tmp_path) == [9]


def test_weights_of_another_model_are_refused(tmp_path):
    """Missing, additional and reshaped tensors; halves become whole numbers of 32 bits."""
    network, _, _ = models(2)
    path = tmp_path / "model.safetensors"
    own = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    for weights in (
        own | {"more": torch.zeros(1)},
        {"weight": own["weight"]},
        own | {"bias": torch.zeros(3)},
    ):
        save_file(weights, path)
        with pytest.raises(errors.UserError, match="another shape"):
            checkpoint.load_weights(path, network)
    save_file({name: (tensor + 0.5).half() for name, tensor in own.items()}, path)
    checkpoint.load_weights(path, network)
    assert network.weight.dtype == torch.float32 and (network.weight == 2.5).all()
    with torch.device("meta"):
        empty = nn.Linear(3, 2)
    checkpoint.load_weights(path, empty)
    assert not empty.weight.is_meta and empty.weight.dtype == torch.float32 and empty.weight.requires_grad
    assert torch.equal(empty.weight, network.weight)
    save_file({name: tensor + 0.5 for name, tensor in own.items()}, path)
    with torch.device("meta"):
        empty = nn.Linear(3, 2)
    checkpoint.load_weights(path, empty)
    with open(path, "r+b") as file:  # written over in place, as by cp
        file.write(bytes(path.stat().st_size))
    assert (empty.weight == 2.5).all() and (empty.bias == 2.5).all()


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    """Neither as a state nor as the run's model: the last good ones stay."""
    save(tmp_path, 1)
    network, ema, adam = models(2)
    nn.init.constant_(ema.bias, float("nan"))
    with pytest.raises(errors.UserError, match="not finite.*step_00000001"):
        checkpoint.save_state(
            tmp_path, network, ema, adam, {}, {"step": 2}, SimpleNamespace(keep=2, milestone_every=0)
        )
    assert steps_of(tmp_path) == [1]
    check_whole(tmp_path)


def change(**entries):
    def changed(adam: dict) -> dict:
        first = next(iter(adam["state"]))
        adam["state"][first] |= entries
        return adam

    return changed


@pytest.mark.parametrize(
    "damage",
    [
        lambda adam: adam | {"state": {}, "param_groups": []},
        lambda adam: {"parts": [adam]},
        change(exp_avg=torch.zeros(1)),  # Adam's fused update would read behind it
        change(exp_avg_sq=torch.zeros(2, 3, dtype=torch.float64)),
        change(exp_avg=torch.full((2, 3), float("inf"))),
        change(more=torch.zeros(2, 3)),
        lambda adam: [1, 2, 3],
    ],
)
def test_an_optimizer_state_of_another_form_is_refused(tmp_path, damage):
    _, _, adam = models(1)
    torch.save(damage(adam.state_dict()), tmp_path / "adam.pt")
    with pytest.raises(errors.UserError, match="adam.pt"):
        checkpoint.load_optimizer(tmp_path / "adam.pt", models(2)[2], False)


GOOD = json.loads((Path(__file__).parent.parent / "checkpoints/laptop/config.json").read_text())


@pytest.mark.parametrize(
    "name, value", [("side", "24"), ("side", None), ("mu", "x"), ("model", 3), ("precision", ...)]
)
def test_a_config_of_another_form_is_refused(tmp_path, name, value):
    changed = GOOD | {name: value} if value is not ... else {k: v for k, v in GOOD.items() if k != name}
    (tmp_path / "config.json").write_text(json.dumps(changed))
    with pytest.raises(errors.UserError, match=name):
        checkpoint.read_config(tmp_path)
    assert checkpoint.read_checked(Path("checkpoints/laptop/config.json"), checkpoint.CONFIG) == GOOD


def test_the_hundred_millionth_iteration_is_newer_than_the_one_before(tmp_path):
    for step in (99_999_999, 100_000_000):
        (tmp_path / "state" / f"step_{step}").mkdir(parents=True)
    (tmp_path / "state" / "step_00000002_bak").mkdir()
    assert steps_of(tmp_path) == [99_999_999, 100_000_000]


# ------------------------------------------------------------------------------------------------------------
# Models to give away
# ------------------------------------------------------------------------------------------------------------
@pytest.fixture
def trained(tmp_path):
    """What a run publishes: a model of the laptop's size with other weights."""
    config = GOOD | {"model": TINY}
    (tmp_path / "r").mkdir()
    network = model.Denoiser(**TINY)
    for p in network.parameters():
        nn.init.normal_(p)
    checkpoint.save_weights(tmp_path / "r/model.safetensors", network)
    checkpoint.write_json(tmp_path / "r/config.json", config)
    (tmp_path / "r/metrics.jsonl").write_text("{}\n")
    return tmp_path / "r"


def test_a_model_can_be_given_away(trained, tmp_path, monkeypatch):
    run(monkeypatch, checkpoint, trained, tmp_path / "given", "--dtype", "fp16")
    whole, half = (
        sample.load(folder, torch.device("cpu")).network.state_dict()
        for folder in (trained, tmp_path / "given")
    )
    assert {value.dtype for value in half.values()} == {torch.float32}
    assert all(torch.allclose(whole[key], half[key], rtol=2**-11, atol=1e-7) for key in whole)
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (trained, tmp_path / "given")]
    assert sizes[1] < 0.6 * sizes[0]


@pytest.mark.parametrize("where", ["onto itself", "to nowhere", "another's config", "too large for fp16"])
def test_an_export_that_would_lose_something(where, trained, tmp_path, monkeypatch, capsys):
    words = [trained, tmp_path / "given", "--dtype", "fp16"]
    if where == "onto itself":
        words[1] = trained
    if where == "to nowhere":
        words[1] = ""
    if where == "another's config":
        (trained / "config.json").write_text('{"a": 1}')
    if where == "too large for fp16":
        weights = load_file(trained / "model.safetensors")
        weights["img_in.weight"][0, 0] = 1e6
        (trained / "model.safetensors").unlink()
        save_file(weights, trained / "model.safetensors")
    before = {path: path.read_bytes() for path in trained.iterdir()}
    refused(monkeypatch, capsys, checkpoint, *words)
    assert {path: path.read_bytes() for path in trained.iterdir()} == before and len(
        list(tmp_path.iterdir())
    ) == 1
