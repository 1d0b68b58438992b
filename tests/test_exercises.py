"""EXERCISES.md runs as it stands, and its answers are what its blocks print; so are the numbers of DATA and LONG_RUN.

Of an exercise a `diff` edits modules, for this test alone; `python` runs, and again after an edit, or becomes the module
that its first line names; `sh` calls our programs, training for two iterations; `text` is what was printed. "Fails:"
names every identity that the edit breaks.
"""

import contextlib
import importlib
import io
import json
import re
import sys
import types
from pathlib import Path

import pytest
from programs import QUICK, run
from test_mutations import ORIGINAL, first_failure, modules_of

import model
from engine import price
from scale import shards

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "EXERCISES.md").read_text()
EXERCISES = dict(re.findall(r"^## (\d+)\. (.+?)(?=^## |\Z)", PAGE, re.M | re.S))
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```|^Fails: (.+?)\.$", re.M | re.S)
FILE = re.compile(r"# (\w+)/(\w+)\.py\n")


class Reader:
    """Does what an exercise says, in an empty folder that has the included checkpoint."""

    def __init__(self, monkeypatch, folder):
        self.monkeypatch, self.sources, self.code, self.printed = monkeypatch, dict(ORIGINAL), "", ""
        monkeypatch.setenv("MPLBACKEND", "Agg")
        monkeypatch.chdir(folder)
        (folder / "checkpoints").symlink_to(ROOT / "checkpoints")

    def diff(self, text):
        for name, hunk in re.findall(r"--- (\w+)\.py\n(.*?)(?=^--- |\Z)", text, re.M | re.S):
            source = self.sources.get(name) or (ROOT / f"{name}.py").read_text()
            lines = hunk.splitlines(keepends=True)
            old, new = ("".join(line[1:] for line in lines if line[0] in kinds) for kinds in (" -", " +"))
            assert source.count(old) == 1, old
            self.sources[name] = source.replace(old, new)
        for name in self.sources.keys() - ORIGINAL.keys():
            self.add_entries(name)
        if self.code:
            self.python(self.code)

    def add_entries(self, name):
        """What an edit adds to the tables of a module."""
        fresh, real = types.ModuleType(name), importlib.import_module(name)
        exec(self.sources[name], fresh.__dict__)
        for table in {"SIZES", "RECIPES", "OBJECTIVES"} & vars(real).keys():
            for key in vars(fresh)[table].keys() - vars(real)[table].keys():
                self.monkeypatch.setitem(vars(real)[table], key, vars(fresh)[table][key])

    def python(self, text):
        if file := FILE.match(text):
            module = types.ModuleType(".".join(file.groups()))
            exec(text, module.__dict__)
            self.monkeypatch.setitem(sys.modules, module.__name__, module)
            self.monkeypatch.setattr(sys.modules[file[1]], file[2], module, raising=False)
            return
        self.code = text
        with self.edited(), self.printing():
            exec(text, {})

    def sh(self, text):
        for line in text.splitlines():
            name, *words = [word.strip('"') for word in re.findall(r'"[^"]*"|\S+', line)][1:]
            if name == "-m":
                name = words.pop(0)
            if name == "train.py" and "--dry-run" not in words:
                words += [*QUICK, "--steps", "2"]
            if "--per-tag" in words and "runs/row" in words:
                words += ["--per-tag", "1", "--images", "1"]
            with self.printing():
                run(self.monkeypatch, importlib.import_module(name.removesuffix(".py")), *words)

    def text(self, text):
        for line in text.splitlines():
            assert line in self.printed
            self.printed = self.printed[self.printed.index(line) + len(line) :]

    def fails(self, names):
        with self.edited() as fresh:
            stage = fresh["toy.checks.stage"]
            checks = [line.function.__name__ for line in stage.CHECKS if "Eq" in line.equation]
            assert {name for name in checks if first_failure(stage, [name])} == set(re.findall(r"\w+", names))

    def edited(self):
        return modules_of({name: self.sources[name] for name in ORIGINAL})

    @contextlib.contextmanager
    def printing(self):
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            yield
        self.printed += printed.getvalue()


@pytest.mark.parametrize("number", EXERCISES)
def test_the_exercise_and_its_answer(number, monkeypatch, tmp_path):
    reader = Reader(monkeypatch, tmp_path)
    blocks = BLOCK.findall(EXERCISES[number])
    for kind, text, names in sorted(blocks, key=lambda block: not FILE.match(block[1])):  # modules first
        reader.fails(names) if names else getattr(reader, kind)(text)


def test_there_are_fifteen_with_solutions():
    assert list(EXERCISES) == [str(n) for n in range(1, 16)]
    assert all(text.count("<details><summary>Solution</summary>") == 1 for text in EXERCISES.values())


def score(name: str) -> str:
    found = json.loads((ROOT / "results" / "single" / f"{name}.json").read_text())
    return f"{found['splits']['test']['2']['overall']['score']:.3f}"


def test_scores_that_exercises_name():
    first, *others, last = (score(f"self_e-{seed}") for seed in (2, 3, 4, 5))
    text = " ".join(PAGE.split())
    for words in (
        f"{score('eq18-2')} instead of {first}",
        f"has {first}",
        f"{', '.join([first, *others])} and {last}",
    ):
        assert words in text


def test_numbers_of_the_data_page():
    page = (ROOT / "DATA.md").read_text()
    cost = {
        side: price.forward_flops(model.SIZES["laptop"], (side // 4) ** 2, 24) for side in (16, 24, 32, 64)
    }
    ratios = [f"{cost[side] / cost[16]:.1f}" for side in (24, 32, 64)]
    assert f"{ratios[0]}, {ratios[1]} or {ratios[2]} times" in page
    assert ", ".join(f"{h}x{w}" for h, w in shards.bucket_sides(32, 4)) in page
    *big, last = shards.bucket_sides(256)
    assert f"{len(big) + 1}, from {big[0][0]}x{big[0][1]} to {last[0]}x{last[1]}" in page


def test_numbers_of_the_long_run():
    """The table of an H200 is that of the four files."""
    page = (ROOT / "LONG_RUN.md").read_text()
    files = [
        json.loads((ROOT / f"results/benchmark-{n}.json").read_text())
        for n in ("2b", "2b-512", "2b-eager", "0.5b")
    ]
    steps = [file["steps"] for file in files]
    rows = [
        ("pictures a step", "{:d}", [file["batch"] for file in files]),
        ("Self-E, pictures a second", "{:.1f}", [s["Self-E"]["images_per_s"] for s in steps]),
        ("TFLOP/s", "{:.0f}", [s["Self-E"]["tflops"] for s in steps]),
        ("% of the measured rate of matrix products", "{:.1f}", [100 * s["Self-E"]["mfu"] for s in steps]),
        ("time over flow matching", "{:.2f}", [s["Self-E"]["ratio"] for s in steps]),
        ("... with the auxiliary term", "{:.2f}", [s["Self-E + aux"]["ratio"] for s in steps]),
        ("peak memory, GiB", "{:.0f}", [file["peak_memory_gib"] for file in files]),
    ]
    for name, form, values in rows:
        assert f"| {name} | {' | '.join(map(form.format, values))} |" in page
