"""What lies on the disk when a process is killed while it saves: at every point, complete states and nothing else."""

import itertools
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from programs import TINY, refused, run, steps_of
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


def save(run: Path, step: int, value=None, keep: int = 2, milestone_every: int = 0) -> Path:
    args = SimpleNamespace(keep=keep, milestone_every=milestone_every)
    return checkpoint.save_state(run, *models(value or step), {"of": step}, {"step": step}, args)


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
    names = set()
    for fatal in itertools.count(1):
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
    order, to_disk, replace = [], checkpoint.to_disk, os.replace

    def synced(path):
        order.append(("sync", Path(path).name))
        to_disk(path)

    def named(partial, path):
        order.append(("name", Path(path).name))
        replace(partial, path)

    monkeypatch.setattr(checkpoint, "to_disk", synced)
    monkeypatch.setattr(os, "replace", named)
    save(tmp_path, 7)
    there = order.index(("name", "step_00000007"))
    before = {
        name.removeprefix(".").removesuffix(".partial") for what, name in order[:there] if what == "sync"
    }
    assert before >= FILES | {"step_00000007"} and ("sync", "state") in order[there:]
    for name in FILES - {"adam.pt"}:  # written as .NAME.partial
        assert order.index(("sync", f".{name}.partial")) < order.index(("name", name)) < there
    assert order[-2:] == [("sync", ".model.safetensors.partial"), ("name", "model.safetensors")]


def test_a_failing_save_leaves_no_partial(tmp_path, monkeypatch):
    """What torch says of a full disk: one error that names the last state. (Safetensors': test_processes.py.)"""
    save(tmp_path, 1)

    def fails(*a, **k):
        raise RuntimeError("[enforce fail] unexpected pos 64 vs 0\nmore")

    with monkeypatch.context() as patch, pytest.raises(errors.UserError, match="step_00000001") as raised:
        patch.setattr(torch, "save", fails)
        save(tmp_path, 2)
    assert "\n" not in str(raised.value) and steps_of(tmp_path) == [1]
    assert not list(tmp_path.rglob("*.partial"))
    check_whole(tmp_path)


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path):
    with pytest.raises(errors.UserError, match="x.json cannot be written"):
        with checkpoint.in_one_piece(tmp_path / "x.json") as partial:
            partial.write_text("half")
            raise OSError
    assert not list(tmp_path.iterdir())


def test_milestones_stay_and_other_old_states_go(tmp_path):
    for step in range(1, 9):
        save(tmp_path, step, keep=2, milestone_every=3)
    assert steps_of(tmp_path) == [3, 6, 7, 8]
    backup = tmp_path / "state" / "step_00000002_bak"
    backup.mkdir()  # somebody's own
    save(tmp_path, 9, keep=1)
    assert steps_of(tmp_path) == [9] and backup.exists()


@pytest.mark.parametrize(
    "change, complaint",
    [
        ({"more": torch.zeros(1)}, "another model"),
        ({"bias": None}, "another model"),
        ({"bias": torch.zeros(3)}, "another model"),
        ({"bias": torch.zeros(2, dtype=torch.int64)}, "no finite number"),
        ({"bias": torch.tensor([0, float("nan")])}, "no finite number"),
    ],
    ids=str,
)
def test_weights_of_another_model_are_refused(change, complaint, tmp_path):
    network, _, _ = models(2)
    weights = network.state_dict() | change
    save_file({name: x for name, x in weights.items() if x is not None}, tmp_path / "model.safetensors")
    with pytest.raises(errors.UserError, match=complaint):
        checkpoint.load_weights(tmp_path / "model.safetensors", network)


@pytest.mark.parametrize("where, stored", [("cpu", torch.float16), ("meta", torch.float32)])
def test_weights_are_read_as_fp32_and_stay_when_the_file_is_written_over(where, stored, tmp_path):
    path, (network, _, _) = tmp_path / "model.safetensors", models(2.5)
    save_file({name: tensor.to(stored) for name, tensor in network.state_dict().items()}, path)
    with torch.device(where):
        loaded = nn.Linear(3, 2)
    checkpoint.load_weights(path, loaded)
    with open(path, "r+b") as file:  # in place, as by cp
        file.write(bytes(path.stat().st_size))
    for p in loaded.parameters():
        assert p.dtype == torch.float32 and p.requires_grad and (p == 2.5).all()


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    """Neither as a state nor as the run's model: the last good ones stay."""
    save(tmp_path, 1)
    with pytest.raises(errors.UserError, match="not finite.*step_00000001"):
        save(tmp_path, 2, value=float("nan"))
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
        lambda adam: [1, 2, 3],
    ],
)
def test_an_optimizer_state_of_another_form_is_refused(tmp_path, damage):
    _, _, adam = models(1)
    torch.save(damage(adam.state_dict()), tmp_path / "adam.pt")
    with pytest.raises(errors.UserError, match="adam.pt"):
        checkpoint.load_optimizer(tmp_path / "adam.pt", models(2)[2], False)


def test_the_settings_of_the_optimizer_are_the_recipes(tmp_path):
    """Not those of its file: a resumed run may have another learning rate."""
    kept = models(1)[2].state_dict()
    kept["param_groups"][0] |= {"lr": 7.0, "betas": (0.0, 0.0), "maximize": True}
    torch.save(kept, tmp_path / "adam.pt")
    adam = models(2)[2]
    checkpoint.load_optimizer(tmp_path / "adam.pt", adam, False)
    (group,) = adam.param_groups
    assert (group["lr"], group["betas"], group["maximize"]) == (1e-3, (0.9, 0.999), False)


GOOD = json.loads((Path(__file__).parent.parent / "checkpoints/scenes/config.json").read_text())


@pytest.mark.parametrize(
    "name, value", [("side", "24"), ("side", None), ("mu", "x"), ("model", 3), ("precision", ...)]
)
def test_a_config_of_another_form_is_refused(tmp_path, name, value):
    changed = GOOD | {name: value} if value is not ... else {k: v for k, v in GOOD.items() if k != name}
    (tmp_path / "config.json").write_text(json.dumps(changed))
    with pytest.raises(errors.UserError, match=name):
        checkpoint.read_config(tmp_path)
    assert checkpoint.read_checked(Path("checkpoints/scenes/config.json"), checkpoint.CONFIG) == GOOD


# --- Models to give away ------------------------------------------------------------------------------------
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
    return tmp_path / "r"


def test_a_model_can_be_given_away(trained, tmp_path, monkeypatch):
    run(monkeypatch, checkpoint, trained, tmp_path / "given", "--dtype", "fp16")
    folders = trained, tmp_path / "given"
    full, half = (sample.load(folder, torch.device("cpu")).network.state_dict() for folder in folders)
    assert all(torch.allclose(full[key], half[key], rtol=2**-11, atol=1e-7) for key in full)
    sizes = [(folder / "model.safetensors").stat().st_size for folder in folders]
    assert sizes[1] < 0.6 * sizes[0]


@pytest.mark.parametrize("where", ["onto itself", "another's config", "too large for fp16"])
def test_an_export_that_would_lose_something(where, trained, tmp_path, monkeypatch, capsys):
    out = trained if where == "onto itself" else tmp_path / "given"
    if where == "another's config":
        (trained / "config.json").write_text('{"a": 1}')
    if where == "too large for fp16":
        weights = load_file(trained / "model.safetensors")
        weights["img_in.weight"][0, 0] = 1e6
        checkpoint.save_weights(trained / "model.safetensors", SimpleNamespace(state_dict=lambda: weights))
    before = {path: path.read_bytes() for path in trained.iterdir()}
    refused(monkeypatch, capsys, checkpoint, trained, out, "--dtype", "fp16")
    assert {path: path.read_bytes() for path in trained.iterdir()} == before
    assert list(tmp_path.iterdir()) == [trained]
