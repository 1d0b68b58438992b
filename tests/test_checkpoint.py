"""What lies on the disk when a process is killed while it saves: at every point, complete states and nothing else."""

import json
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

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


@pytest.mark.skipif(os.name != "posix", reason="has no such call")
def test_to_disk_asks_the_system(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(os.fstat(handle).st_ino))
    (tmp_path / "a").write_text("a")
    checkpoint.to_disk(tmp_path / "a")
    checkpoint.to_disk(tmp_path)
    assert synced == [(tmp_path / "a").stat().st_ino, tmp_path.stat().st_ino]


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


def test_a_state_is_deleted_under_another_name(tmp_path, monkeypatch):
    """While its files go one by one it must not pass for complete."""
    save(tmp_path, 1), save(tmp_path, 2)
    names, rmtree = [], shutil.rmtree
    monkeypatch.setattr(
        shutil, "rmtree", lambda path, **k: names.append(Path(path).name) or rmtree(path, **k)
    )
    save(tmp_path, 3)
    assert names == ["step_00000001.partial"] and steps_of(tmp_path) == [2, 3]


def test_what_cannot_be_deleted_now_is_swept_later(tmp_path, monkeypatch):
    save(tmp_path, 1), save(tmp_path, 2)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda path, **k: (_ for _ in ()).throw(OSError("busy")))
        save(tmp_path, 3)
    assert steps_of(tmp_path) == [2, 3] and (tmp_path / "state" / "step_00000001.partial").exists()
    save(tmp_path, 4)
    assert not list(tmp_path.rglob("*.partial"))


def test_a_state_that_is_there_is_not_written_again(tmp_path):
    folder = save(tmp_path, 5)
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert save(tmp_path, 5) == folder
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before


@pytest.mark.skipif(sys.platform == "win32", reason="has no such locks")
def test_one_process_at_a_time(tmp_path):
    with checkpoint.locked(tmp_path):
        with pytest.raises(errors.UserError, match="another process"), checkpoint.locked(tmp_path):
            pass
    with checkpoint.locked(tmp_path):
        pass


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


def test_a_file_in_one_piece_has_the_rights_of_any_other(tmp_path):
    before = os.umask(0o027)
    try:
        checkpoint.save_weights(tmp_path / "a.safetensors", nn.Linear(2, 2))
        checkpoint.write_json(tmp_path / "b.json", {})
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o640}


def test_writers_of_one_file_do_not_meet(tmp_path):
    """Two of a shared file, each with a partial of its own: the last rename wins, and no partial stays."""
    path = tmp_path / "x"
    with (
        checkpoint.in_one_piece(path, shared=True) as first,
        checkpoint.in_one_piece(path, shared=True) as second,
    ):
        assert first != second
        first.write_text("first"), second.write_text("second")
    assert path.read_text() == "first" and [p.name for p in tmp_path.iterdir()] == ["x"]


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


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 half", b"no pickle of tensors"])
def test_a_damaged_file_is_refused_in_one_line(tmp_path, content):
    for name in ("adam.pt", "model.safetensors", "config.json"):
        (tmp_path / name).write_bytes(content)
    for read in (
        lambda: checkpoint.load_optimizer(tmp_path / "adam.pt", models(2)[2], False),
        lambda: checkpoint.load_weights(tmp_path / "model.safetensors", models(2)[0]),
        lambda: checkpoint.read_config(tmp_path),
    ):
        with pytest.raises(errors.UserError) as refused:
            read()
        assert "\n" not in str(refused.value) and str(tmp_path) in str(refused.value)


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
