"""Files that were edited, damaged or written by another version; numbers that would become memory; pipes in place of
files: one line that says what to do, exit code 2, and what lay on the disk is left as it was."""

import argparse
import json
import os
import pickle
import re
import shutil
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import model
import sample
import train
from engine import arguments, checkpoint, errors, feed, limits, optimizers

ROOT = Path(__file__).parent.parent
TINY = dict(
    width=16, heads=2, double=1, single=1, axes=(2, 2, 4), channels=3, patch=4, txt_dim=256, vec_dim=256
)
QUICK = ["--batch-size", "4", "--device", "cpu", "--precision", "fp32", "--no-compile", "--grid-every", "0"]


def refused(program, words, monkeypatch, capsys) -> str:
    """The one line with which a program refuses its arguments; it must end with exit code 2."""
    monkeypatch.setattr(sys, "argv", [f"{program.__name__}.py", *map(str, words)])
    with pytest.raises(SystemExit) as stopped:
        errors.run(program.main)
    lines = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2 and len(lines) == 1, lines
    return lines[0]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of two iterations of a tiny network."""
    out = tmp_path_factory.mktemp("runs") / "tiny"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(model.SIZES, "laptop", TINY)
        patch.setattr(
            sys, "argv", ["train.py", "--steps", "2", "--out", str(out), "--log-every", "1", *QUICK]
        )
        train.main()
    return out


@pytest.fixture
def run(trained, tmp_path, monkeypatch):
    """A copy of the run, to be spoilt, in a world where the laptop's network is the tiny one."""
    monkeypatch.setitem(model.SIZES, "laptop", TINY)
    return Path(shutil.copytree(trained, tmp_path / "run"))


def edit(path: Path, **changes) -> None:
    """Change entries of a JSON file; "a.b" is entry b of entry a, and ... takes one out."""
    content = json.loads(path.read_text())
    for name, value in changes.items():
        *outer, last = name.split(".")
        place = content
        for part in outer:
            place = place[part]
        if value is ...:
            del place[last]
        else:
            place[last] = value
    path.write_text(json.dumps(content))


def tree(folder: Path) -> dict:
    return {
        path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


RESUME = ["--resume", "--steps", "4", "--device", "cpu"]


# ------------------------------------------------------------------------------------------------------------
# The training state
# ------------------------------------------------------------------------------------------------------------
def smaller(adam):
    adam["state"][0]["exp_avg"] = torch.zeros(1)


def larger(adam):
    adam["state"][3]["exp_avg_sq"] = torch.zeros(1000, 1000)


def turned(adam):
    number = next(
        n
        for n, own in adam["state"].items()
        if own["exp_avg"].dim() == 2 and own["exp_avg"].shape[0] != own["exp_avg"].shape[1]
    )
    adam["state"][number]["exp_avg"] = adam["state"][number]["exp_avg"].T


def one_for_two(adam):
    """Two parameters of one shape share an entry, and the other's is gone."""
    shapes = {number: own["exp_avg"].shape for number, own in adam["state"].items()}
    a, b = next((a, b) for a in shapes for b in shapes if a < b and shapes[a] == shapes[b])
    adam["param_groups"][0]["params"][b] = a
    del adam["state"][b]


SPOILT_ADAM = {
    "a smaller tensor": smaller,
    "a larger tensor": larger,
    "a transposed tensor": turned,
    "another type": lambda adam: adam["state"][0].update(exp_avg=adam["state"][0]["exp_avg"].double()),
    "whole numbers": lambda adam: adam["state"][0].update(exp_avg_sq=adam["state"][0]["exp_avg_sq"].long()),
    "a count with a dimension": lambda adam: adam["state"][0].update(step=torch.ones(3)),
    "a count that is no tensor": lambda adam: adam["state"][0].update(step=2),
    "not a number": lambda adam: adam["state"][0]["exp_avg"].fill_(float("nan")),
    "a parameter too few": lambda adam: adam["state"].pop(5),
    "a parameter too many": lambda adam: adam["state"].update({10**6: adam["state"][0]}),
    "a tensor too few": lambda adam: adam["state"][0].pop("exp_avg_sq"),
    "a tensor too many": lambda adam: adam["state"][0].update(momentum_buffer=adam["state"][0]["exp_avg"]),
    "a group too few": lambda adam: adam["param_groups"].pop(),
    "groups of nothing": lambda adam: adam["param_groups"][0].update(params=[]),
    "one parameter twice": lambda adam: adam["param_groups"][0]["params"].__setitem__(1, 0),
    "one entry for two": one_for_two,
    "another division": lambda adam: adam["param_groups"].append({"params": []}),
    "no groups": lambda adam: adam.pop("param_groups"),
    "groups of text": lambda adam: adam.update(param_groups="abc"),
}


@pytest.mark.parametrize("what", SPOILT_ADAM)
def test_moments_of_another_form_are_refused(what, run, monkeypatch, capsys):
    """Adam's fused update would read past the end of a tensor that is too small."""
    path = checkpoint.complete_states(run)[-1] / "adam.pt"
    adam = torch.load(path, weights_only=True)
    SPOILT_ADAM[what](adam)
    torch.save(adam, path)
    before = tree(run)
    assert str(path) in refused(train, [*RESUME, "--out", run], monkeypatch, capsys)
    assert tree(run) == before


def test_a_pickle_in_place_of_the_moments_is_not_run(run, tmp_path, monkeypatch, capsys):
    class Mean:
        def __reduce__(self):
            return Path.touch, (tmp_path / "was run",)

    path = checkpoint.complete_states(run)[-1] / "adam.pt"
    path.write_bytes(pickle.dumps(Mean()))
    assert str(path) in refused(train, [*RESUME, "--out", run], monkeypatch, capsys)
    torch.save({"state": Mean(), "param_groups": []}, path)  # in torch's own format
    assert str(path) in refused(train, [*RESUME, "--out", run], monkeypatch, capsys)
    assert not (tmp_path / "was run").exists()


def test_the_recipe_sets_adam_not_its_file(trained, tmp_path):
    """Another learning rate, betas or eps in adam.pt change nothing; moments come back bit for bit."""
    state = checkpoint.complete_states(trained)[-1]
    shutil.copytree(state, tmp_path / "state")
    adam = torch.load(state / "adam.pt", weights_only=True)
    adam["param_groups"][0].update(
        lr=7.0, betas=(0.1, 0.2), eps=1.0, weight_decay=3.0, fused=False, amsgrad=True
    )
    torch.save(adam, tmp_path / "state" / "adam.pt")
    network, ema = (model.Denoiser(**TINY) for _ in range(2))
    optimizer = optimizers.build("adam", network, 1e-3, (0.9, 0.99))
    checkpoint.load_state(tmp_path / "state", network, ema, optimizer)
    group = optimizer.param_groups[0]
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (1e-3, (0.9, 0.99), 1e-8, 0)
    assert group["fused"] and not group["amsgrad"]
    for number, p in enumerate(network.parameters()):
        assert all(
            torch.equal(optimizer.state[p][name], adam["state"][number][name])
            for name in ("step", "exp_avg", "exp_avg_sq")
        )


def test_muons_moments_are_checked_too():
    network = model.Denoiser(**TINY)
    both = optimizers.build("muon", network, 1e-3, (0.9, 0.99))
    for p in network.parameters():
        p.grad = torch.ones_like(p)
    both.step()
    saved = both.state_dict()
    again = optimizers.build("muon", network, 1e-3, (0.9, 0.99))
    again.load_state_dict(checkpoint.checked(saved, again))
    assert all(torch.equal(again.state[p][name], own[name]) for p, own in both.state.items() for name in own)
    saved["parts"][0]["state"][0]["momentum_buffer"] = torch.zeros(2)
    with pytest.raises(ValueError, match="momentum_buffer"):
        checkpoint.checked(saved, again)


@pytest.mark.parametrize(
    "changes",
    [
        {"step": 3},
        {"step": 1},
        {"step": "2"},
        {"step": 2.0},
        {"step": None},
        {"step": True},
        {"step": ...},
        {"seed": -1},
        {"seed": "0"},
        {"seed": ...},
        {"elapsed": "long"},
        {"elapsed": -1},
        {"elapsed": float("nan")},
        {"elapsed": None},
        {"steps": "2"},
        {"steps": 0},
        {"data": 3},
        {"data": [1]},
        {"data": {"0": 5}},
        {"nonfinite": "none"},
        {"nonfinite": -1},
    ],
    ids=str,
)
def test_a_state_that_contradicts_itself_is_refused(changes, run, monkeypatch, capsys):
    path = checkpoint.complete_states(run)[-1] / "state.json"
    edit(path, **changes)
    before = tree(run)
    line = refused(train, [*RESUME, "--out", run], monkeypatch, capsys)
    assert str(path) in line and next(iter(changes)).rstrip("s") in line.replace("iteration", "step")
    assert tree(run) == before


def test_an_older_version_s_state_goes_on(run, monkeypatch):
    """One that says nothing of steps, data or updates left out, and arguments that did not exist then."""
    edit(checkpoint.complete_states(run)[-1] / "state.json", steps=..., data=..., nonfinite=...)
    edit(run / "config.json", **{"arguments.loss_power": ..., "arguments.null_branch": ...})
    monkeypatch.setattr(sys, "argv", ["train.py", *RESUME, "--out", str(run)])
    train.main()
    assert checkpoint.step_of(checkpoint.complete_states(run)[-1]) == 4


@pytest.mark.parametrize("name", ["network.safetensors", "model.safetensors"])
@pytest.mark.parametrize("what", ["not finite", "another shape", "whole numbers too many", "a pipe"])
def test_weights_that_cannot_be_used(name, what, run, monkeypatch, capsys):
    path = checkpoint.complete_states(run)[-1] / name
    weights = {key: tensor.clone() for key, tensor in load_file(path).items()}
    if what == "not finite":
        weights["img_in.weight"][0, 0] = float("inf")
    elif what == "another shape":
        weights["img_in.weight"] = weights["img_in.weight"].T.contiguous()
    elif what == "whole numbers too many":
        weights["more"] = torch.zeros(2, dtype=torch.int64)
    path.unlink()
    os.mkfifo(path) if what == "a pipe" else save_file(weights, path)
    assert str(path) in refused(train, [*RESUME, "--out", run], monkeypatch, capsys)


def test_records_that_are_none_are_left_out_and_counted(tmp_path, capsys):
    """A line that a kill cut short goes silently; more than one is damage and is told."""
    path = tmp_path / "metrics.jsonl"
    good = [b'{"step": 1, "loss": 2.0}\n', b'{"step": 2, "loss": 1.5}\n', b'{"step": 3, "loss": 1.0}\n']
    path.write_bytes(b"".join(good) + b'{"step": 4, "lo')
    checkpoint.cut_metrics(path, 2)
    assert path.read_bytes() == b"".join(good[:2]) and capsys.readouterr().err == ""
    path.write_bytes(
        good[0] + b'\xff\xfe{"step": 1}\n' + good[1] + b'{"step": "2"}\n[3]\n' + good[2] + b'{"st'
    )
    checkpoint.cut_metrics(path, 3)
    assert path.read_bytes() == b"".join(good) and "4 lines are no records" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------
# config.json
# ------------------------------------------------------------------------------------------------------------
WRONG_ARGUMENTS = [
    {"seed": None},
    {"seed": [1]},
    {"seed": "0"},
    {"seed": 2**63},
    {"seed": True},
    {"steps": "many"},
    {"steps": 2.5},
    {"steps": [4]},
    {"steps": 10**30},
    {"batch_size": 3},
    {"batch_size": 2**40},
    {"size": "7b"},
    {"size": None},
    {"size": ["laptop"]},
    {"target": "both"},
    {"precision": "int8"},
    {"precision": 16},
    {"objective": {}},
    {"data": []},
    {"data": "one-shape"},
    {"data": [None]},
    {"zero": "no"},
    {"zero": None},
    {"compile": "yes"},
    {"wrong_captions": "0.1"},
    {"wrong_captions": 2},
    {"aux_from": [0.5]},
    {"text": 5},
    {"txt_len": 2**31},
    {"workers": -1},
    {"k": float("nan")},
    {"colour": "blue"},
    {"optimizer": "sgd"},
    {"init": 1},
    {"lr": "fast"},
    {"lr": 0},
]


@pytest.mark.parametrize("change", WRONG_ARGUMENTS, ids=str)
def test_an_argument_that_no_run_has(change, run, monkeypatch, capsys):
    (name,) = change
    edit(run / "config.json", **{f"arguments.{name}": change[name]})
    before = tree(run)
    line = refused(train, ["--resume", "--out", run, "--device", "cpu"], monkeypatch, capsys)
    assert str(run / "config.json") in line and name.replace("_", "-") in line.replace("_", "-")
    assert tree(run) == before


WRONG_MODELS = [
    {"axes": [2, 2, 2, 2]},
    {"axes": [4, 4]},
    {"axes": [1, 3, 4]},
    {"axes": "abc"},
    {"axes": [2, 2, 4.0]},
    {"axes": [-2, 4, 6]},
    {"patch": 0},
    {"patch": 2**31},
    {"double": 10**9},
    {"single": -1},
    {"width": 2**31},
    {"width": 17},
    {"heads": 3},
    {"channels": True},
    {"txt_dim": None},
    {"vec_dim": [256]},
    {"time_factor": "fast"},
    {"time_factor": float("inf")},
    {"colour": 1},
    {"width": ...},
    {"double": 99, "single": 99},
]


@pytest.mark.parametrize("change", WRONG_MODELS, ids=str)
def test_a_model_that_is_none(change, run, tmp_path, monkeypatch, capsys):
    edit(run / "config.json", **{f"model.{name}": value for name, value in change.items()})
    line = refused(
        sample,
        ["--checkpoint", run, "--prompt", "x", "--out", tmp_path / "x.png", "--device", "cpu"],
        monkeypatch,
        capsys,
    )
    assert str(run) in line and not (tmp_path / "x.png").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"side": 2**31},
        {"side": 2**14},
        {"txt_len": 2**31},
        {"txt_len": 2**13},
        {"precision": ...},
        {"objective": ["self_e"]},
        {"side": True},
    ],
    ids=str,
)
def test_a_number_that_would_become_memory(change, run, tmp_path, monkeypatch, capsys):
    edit(run / "config.json", **change)
    words = ["--checkpoint", run, "--prompt", "x", "--out", tmp_path / "x.png", "--device", "cpu"]
    assert next(iter(change)) in refused(sample, words, monkeypatch, capsys)
    assert next(iter(change)) in refused(train, [*RESUME, "--out", run], monkeypatch, capsys)


@pytest.mark.parametrize("axes", [(2, 2, 2, 2), (4, 4), (1, 3, 4), (2, 2, 2)], ids=str)
def test_a_network_turns_pairs_along_three_axes(axes):
    with pytest.raises(ValueError, match="RoPE axes"):
        model.Denoiser(**TINY | {"axes": axes})


def test_no_memory_is_taken_for_a_model_that_the_weights_are_not(run, monkeypatch):
    """A hundred blocks of width 16,384 would be 300 GB: the header of the weights' file says that it is another."""
    edit(
        run / "config.json",
        **{
            "model.width": 16384,
            "model.heads": 2048 // 2,
            "model.axes": [4, 6, 6],
            "model.double": 50,
            "model.single": 50,
        },
    )
    monkeypatch.setattr(checkpoint, "load_file", None)  # not even called
    with pytest.raises(errors.UserError, match="another shape"):
        sample.load(run, torch.device("cpu"))


def test_what_train_writes_is_what_is_checked(trained):
    """Every entry that a program reads stands in the tables, and the tables hold for a run that was not touched."""
    config = limits.config(trained)
    assert limits.state(checkpoint.complete_states(trained)[-1])["step"] == 2
    assert set(limits.CONFIG) <= set(config) and set(limits.MODEL_CONFIG) == set(config["model"])
    own = set(vars(arguments.parse([]))) - {"out", "resume", "device", "dry_run"}
    assert set(config["arguments"]) == own and set(limits.RANGES) <= own


# ------------------------------------------------------------------------------------------------------------
# Flags
# ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "flag",
    [
        "--steps",
        "--batch-size",
        "--micro-batch",
        "--side",
        "--txt-len",
        "--workers",
        "--seed",
        "--keep",
        "--recompute",
        "--log-every",
    ],
)
@pytest.mark.parametrize(
    "value",
    [str(2**31), "9" * 400, "9" * 5000, "-" + "9" * 5000, "1e3", ""],
    ids=["2^31", "400 digits", "5000 digits", "minus 5000 digits", "1e3", "nothing"],
)
def test_whole_numbers_have_an_end(flag, value, tmp_path, monkeypatch, capsys):
    if flag == "--seed" and value == str(2**31):
        return  # a seed like any other
    monkeypatch.chdir(tmp_path)
    line = refused(train, [f"{flag}={value}", "--dry-run"], monkeypatch, capsys)
    assert len(line) < 400 and flag in line and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "program, words",
    [
        (sample, ["--prompt", "x", "--steps", "9" * 400]),
        (sample, ["--prompt", "x", "--images", "9" * 400]),
        (sample, ["--prompt", "x", "--seed", "9" * 5000]),
        (feed, ["--side", "9" * 400]),
        (feed, ["--side", str(2**31)]),
        (checkpoint, ["a", "b", "--dtype", "z" * 5000]),
    ],
)
def test_other_programs_numbers_too(program, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert len(refused(program, words, monkeypatch, capsys)) < 400 and not list(tmp_path.iterdir())


def test_a_long_word_is_shortened_and_a_path_is_not():
    assert errors.shortened("no " + "9" * 5000) == "no " + "9" * 40 + "..." + "9" * 10
    assert errors.shortened("a" * 80 + " b") == "a" * 80 + " b"
    parser = errors.Parser("x.py", "x")
    parser.add_argument("--n", type=int)
    parser.add_argument("--file", type=Path)
    assert parser.parse_args(["--n", str(2**63 - 1)]).n == 2**63 - 1
    with pytest.raises(errors.UserError, match=re.escape("2^63")):
        parser.parse_args(["--n", str(2**63)])
    with pytest.raises(errors.UserError, match="a/" * 60):
        parser.error("a/" * 60 + "b is missing")


@pytest.mark.parametrize(
    "error, code",
    [
        (MemoryError(), 2),
        (torch.OutOfMemoryError("CUDA out of memory\nlong"), 2),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 2),
        (RuntimeError("a defect"), None),
        (ValueError("a defect"), None),
    ],
    ids=str,
)
def test_a_full_memory_is_one_line_and_a_defect_keeps_its_traceback(error, code, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit if code else type(error)) as raised:
        errors.run(main)
    if code:
        line = capsys.readouterr().err
        assert raised.value.code == code and "out of memory" in line and line.count("\n") == 1


# ------------------------------------------------------------------------------------------------------------
# What is not a regular file
# ------------------------------------------------------------------------------------------------------------
def in_time(work, seconds: float = 20.0):
    """What `work()` returns or raises; fails where it waits, as on a pipe that nobody writes to."""
    result = {}

    def target():
        try:
            result["value"] = work()
        except Exception as error:
            result["error"] = error

    thread = threading.Thread(target=target, daemon=True)
    thread.start()
    thread.join(seconds)
    assert not thread.is_alive(), "it waits"
    if "error" in result:
        raise result["error"]
    return result["value"]


pipes = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="has no named pipes")


@pipes
@pytest.mark.parametrize(
    "name",
    ["config.json", "metrics.jsonl", "lock", "state/step_00000002/adam.pt", "state/step_00000002/state.json"],
)
def test_a_pipe_in_a_run_is_named(name, run, monkeypatch, capsys):
    (run / name).unlink(missing_ok=True)
    os.mkfifo(run / name)
    assert f"{name} is not a regular file" in refused(train, [*RESUME, "--out", run], monkeypatch, capsys)


# ------------------------------------------------------------------------------------------------------------
# The disk and the memory
# ------------------------------------------------------------------------------------------------------------
@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="has no such users")
def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch, capsys):
    """Said at once, before the data is read: a folder that is not this user's, and one below a file."""
    (tmp_path / "file").touch()
    line = refused(train, ["--steps", "1", "--out", tmp_path / "file" / "run"], monkeypatch, capsys)
    assert "choose another --out" in line
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o555)
    before = os.geteuid()
    try:
        if before == 0:
            for folder in (tmp_path, *tmp_path.parents[:-2]):
                folder.chmod(folder.stat().st_mode | 0o055)
            os.seteuid(65534)
        with pytest.raises(errors.UserError, match="choose another --out"):
            checkpoint.check_writable(closed / "runs" / "mine")
        checkpoint.check_writable(Path("/tmp/" + "x" * 20))
    finally:
        os.seteuid(before)


def test_the_flags_table_knows_every_whole_number():
    """Each whole-number flag of train.py has a range."""
    found = []

    class Parser(errors.Parser):
        def parse_args(self, argv=None):
            found.extend(action.dest for action in self._actions if action.type is int)
            return super().parse_args(argv)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(errors, "Parser", Parser)
        assert isinstance(arguments.parse([]), argparse.Namespace)
    assert set(found) == set(limits.RANGES)
