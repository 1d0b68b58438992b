"""Calling our programs in the test's own process, as from the command line, and reading what a run leaves."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from engine import checkpoint, errors

QUICK = "--batch-size 4 --device cpu --precision fp32 --no-compile --grid-every 0".split()
TINY = dict(
    width=16, heads=2, double=1, single=1, axes=(2, 2, 4), channels=3, patch=4, txt_dim=256, vec_dim=256
)


def run(monkeypatch, program, *words) -> None:
    monkeypatch.setattr(sys, "argv", [f"{program.__name__}.py", *map(str, words)])
    program.main()


def refused(monkeypatch, capsys, program, *words) -> str:
    """The one line with which a program refuses its arguments; it must end with exit code 2."""
    monkeypatch.setattr(sys, "argv", [f"{program.__name__}.py", *map(str, words)])
    capsys.readouterr()  # what a run before has said
    with pytest.raises(SystemExit) as stopped:
        errors.run(program.main)
    bars = ("it/s", "s/it")  # of tqdm, on fast and on slow machines
    said = capsys.readouterr().err.strip().splitlines()
    lines = [line for line in said if not any(bar in line for bar in bars)]
    assert stopped.value.code == 2 and len(lines) == 1, lines
    return lines[0]


def last(run: Path) -> Path:
    """The last state of a run."""
    return checkpoint.complete_states(run)[-1]


def steps_of(run: Path) -> list[int]:
    """The iterations of its complete states."""
    return [checkpoint.step_of(state) for state in checkpoint.complete_states(run)]


def records(run: Path) -> list[dict]:
    """What metrics.jsonl says."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def tensors(state: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a training state, named."""
    weights = {name: load_file(state / f"{name}.safetensors") for name in ("network", "model")}
    kept = torch.load(state / "adam.pt", weights_only=True)
    for i, part in enumerate(kept.get("parts", [kept])):
        weights |= {f"adam {i} {number}": moments for number, moments in part["state"].items()}
    return {f"{name}/{key}": value for name, named in weights.items() for key, value in named.items()}


def same(a: Path, b: Path) -> bool:
    """Whether two runs ended alike bit for bit: weights, average, the optimizer's moments."""
    first, second = tensors(last(a)), tensors(last(b))
    assert last(a).name == last(b).name and first.keys() == second.keys()
    return all(torch.equal(first[key], second[key]) for key in first)
