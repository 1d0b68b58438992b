"""The command behind the table, its settings, its intervals, and the diversity that stands beside its scores."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import pytest

import data
from engine import arguments, checkpoint, errors
from experiments import diversity, emoji_table, evaluate, report, rows, tables
from rng import rng

SCENES = data.SETS["scenes"]


def draw_objects(random: np.random.Generator, metadata: dict, world: data.World) -> list[data.Object]:
    """The objects of a training scene (32 units a side), given its prompt, also where no training run draws it."""
    kinds = []
    for item in metadata["include"]:
        open_to = [c for c in world.colors if (c, item["class"]) not in data.HELD_OUT_PAIRS]
        color = item.get("color") or open_to[random.integers(len(open_to))]
        kinds += [(item["class"], color)] * item["count"]
    relation = next((item["position"][0] for item in metadata["include"] if "position" in item), "")
    while True:
        objects = [
            data.Object(*kind, *place) for kind, place in zip(kinds, data.place(random, len(kinds), 32))
        ]
        # The metadata lists the reference of a relation first.
        if not relation or data.stands(relation, objects[1], objects[0]):
            return objects


def test_what_the_data_would_choose_is_what_training_pictures_show():
    """Exact frequencies beside those of 6,000 training scenes, for the prompts that occur 50 times."""
    source, seen, compared = data.Shapes(24, "scenes"), {}, 0
    for scene in map(source.scene, range(6000)):
        seen.setdefault(scene.metadata["prompt"], []).append(scene)
    for scenes in (scenes for scenes in seen.values() if len(scenes) >= 50):
        counts, metadata = {}, scenes[0].metadata
        for scene in scenes:
            for kind, what, choice in diversity.choices(metadata, scene.objects, 24):
                counts.setdefault((kind, what), Counter())[choice] += 1
        for (kind, what), counter in counts.items():
            expected = len(scenes) * diversity.frequencies(metadata, kind, what, SCENES)
            assert len(counter) == len(expected)
            chi = np.sum((np.sort(list(counter.values())) - np.sort(expected)) ** 2 / expected)
            assert chi < 25  # of at most four degrees of freedom: one in 20,000
            compared += 1
    assert compared > 20


def test_places_are_sides_in_their_order_and_quarters():
    """Of two kinds each of four sides is another choice; of one kind, side by side or above; of three, the empty quarter."""
    sides = [(8, 16), (24, 15), (16, 8), (15, 24)]
    opposite = [((x, y), (32 - x, 32 - y)) for x, y in sides]

    def places(shapes, layouts):
        metadata = {"include": [{"class": k, "count": shapes.count(k)} for k in dict.fromkeys(shapes)]}
        found = set()
        for layout in layouts:
            objects = [data.Object(shape, "red", *place, 9) for shape, place in zip(shapes, layout)]
            found.add(list(diversity.choices(metadata, objects, 32))[-1])
        assert {kind for kind, *_ in found} == {"places"}
        return len(found)

    assert places(["circle", "square"], opposite) == 4 and places(["circle", "circle"], opposite) == 2
    assert places(["circle"] * 3, data.LAYOUTS[3]) == 4


def paint(asked, images, one_color=False):
    """What a model finds that draws like the data, or with the first colour that each class ever had."""
    random, first = rng(1, "painter"), {}
    found = [[draw_objects(random, m, SCENES) for _ in range(images)] for m in asked]
    for objects in (o for pictures in found for o in pictures) if one_color else []:
        for i, o in enumerate(objects):
            objects[i] = data.Object(o.shape, first.setdefault(o.shape, o.color), o.x, o.y, o.diameter)
    return found


@pytest.mark.parametrize("images", [1, 8])
def test_a_model_that_draws_like_the_data_has_its_diversity_at_every_sample_size(images):
    asked = evaluate.prompts("test", 36, SCENES)
    result = diversity.measure(asked, paint(asked, images), 32, SCENES)
    assert set(result) == {"overall", "single_object", "two_object", "counting", "position", "color_attr"}
    for kind in diversity.KINDS:
        found = result["overall"][kind]
        assert found["effective"] == pytest.approx(found["data"], rel=0.06)
    alone = [m for m in asked if m["tag"] == "single_object"]
    many = diversity.measure(alone, paint(alone, 60), 32, SCENES)["single_object"]["colors"]
    allowed = 5 * 4 * 4 * 4  # colours of the four shapes (held-out pairs)
    assert many["effective"] == pytest.approx(allowed**0.25, rel=0.01) and many["pictures"] == 36 * 60


def test_a_model_of_one_color_has_one_and_what_the_prompt_names_is_not_open():
    asked = evaluate.prompts("test", 36, SCENES)
    result = diversity.measure(asked, paint(asked, 4, one_color=True), 32, SCENES)
    assert result["overall"]["colors"]["effective"] == pytest.approx(1)
    assert "colors" not in result["color_attr"]
    red = data.prompt_metadata("colors", ["circle"], ["red"])
    four = data.prompt_metadata("counting", ["circle"], ["red"], 4)  # one layout: nowhere else to stand
    assert diversity.measure([red, four], paint([red, four], 9), 32, SCENES) == {}
    assert diversity.measure([red], [[]], 32, SCENES) == {}


def tried(row: str) -> list[dict]:
    """The settings that are tried for a row, when the first is the best."""
    words, eta = rows.ROWS[row].flags.split(), rows.ROWS[row].eta
    objective = words[words.index("--objective") + 1] if "--objective" in words else "self_e"
    first = rows.guidances(objective, eta)
    tried = first + [x for x in (first[0] | way for way in rows.ways(objective, eta)) if x != first[0]]
    return tried + [first[0] | {"t_max": 0.94}] * ("t_max" in first[0])


def test_every_row_has_equally_many_settings_to_choose_from():
    for row in rows.ROWS:
        assert len(tried(row)) == len({tuple(sorted(map(str, x.items()))) for x in tried(row)}) == 19, row


@pytest.mark.parametrize("program", [tables, emoji_table])
def test_the_quick_form_leaves_what_was_measured_alone(program):
    quick, full = program.parse_arguments(["--quick"]), program.parse_arguments([])
    assert full.out.parts[0] == "results" and full.runs.parts[0] == "runs" and full.runs.name == full.out.name
    assert quick.out.parts[:2] == quick.runs.parts[:2] == ("runs", "quick") and quick.out != quick.runs


@pytest.mark.parametrize("program", [tables, emoji_table])
def test_a_later_seed_waits_for_the_first_to_decide_its_settings(program, tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "train", lambda *_: pytest.fail("trained a run that cannot be scored"))
    words = ["--rows", "imm", "--seeds", "3", "--out", tmp_path / "out", "--runs", tmp_path / "runs"]
    monkeypatch.setattr(sys, "argv", ["program", *map(str, words)])
    with pytest.raises(errors.UserError, match="run seed 2 of imm first"):
        program.main()


@pytest.mark.parametrize("budget", [rows.BUDGET, emoji_table.BUDGET])
def test_train_takes_the_flags_of_every_row(budget):
    for row in rows.ROWS.values():
        arguments.parse([*budget.split(), *row.flags.split()])  # exits where flags do not go together


def test_paired_differences_against_students_t():
    """Three pairs of scores and two without partner, the interval by hand: mean -+ 4.303 s / sqrt(3)."""
    of = {"a": {1: 0, 2: 0.5, 3: 0.7, 4: 0.9}, "b": {2: 0.4, 3: 0.4, 4: 0.4, 5: 0}}
    mean, half = report.interval(report.paired(of, "a", "b", lambda score: score))
    assert mean == pytest.approx(0.3) and half == pytest.approx(4.303 * 0.2 / 3**0.5)
    assert report.interval([0.5])[1] == np.inf
    many = report.interval([0.0, 1.0] * 6)[1]
    assert many == pytest.approx(2.365 * (3 / 11 / 12) ** 0.5)


def command(folder, *arguments):
    folders = ["--out", str(folder / "results"), "--runs", str(folder / "runs")]
    words = [sys.executable, "-m", "experiments.tables", *folders, *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)


@pytest.mark.slow
def test_the_quick_form_makes_every_file_and_goes_on_where_it_stopped(tmp_path):
    def measure(*seeds):
        rows = ["flow_matching", "flow_matching_half", "self_e"]
        wanted = ["--quick", "--steps", 1, 2, "--rows", *rows, "--wrong-captions", 0, 0.3]
        process = command(tmp_path, *wanted, "--seeds", *seeds)
        return process.communicate()[1], process.returncode

    assert "run seed 2" in measure(3)[0]
    complaints, code = measure(2)
    assert code == 0, complaints
    out = tmp_path / "results"
    path = out / "0.3/self_e-2.json"
    row, written = checkpoint.read_json(path), path.read_bytes()
    assert {"command", "commit", "hardware", "seconds", "seed", "train"} <= set(row)
    assert row["wrong_captions"] == 0.3
    assert row["training"]["steps"] == 4 and row["training"]["wrong_captions"] == 0.3
    assert set(row["steps"]) == {"1", "2"} and set(row["steps"]["2"]["tags"]) == set(data.TAGS)
    assert checkpoint.read_json(out / "0/flow_matching_half-2.json")["training"]["steps"] == 2
    flow = checkpoint.read_json(out / "0/flow_matching-2.json")
    assert {s["settings"]["s_rule"] for s in flow["steps"].values()} == {1.0}
    searched = checkpoint.read_json(out / "0/self_e-search.json")["steps"]["2"]
    assert len(searched["tried"]) == 19 and searched["best"] in searched["tried"]
    complaints, code = measure(2, 3)
    assert code == 0, complaints
    assert path.read_bytes() == written and (out / "0/self_e-3.json").exists()
    assert all((out / name).exists() for name in ("scores.png", "samples.png"))
    page = (out / "table.md").read_text()
    assert "self_e minus flow_matching" in page and "## 30% of captions wrong" in page and "| 0.610 |" in page


@pytest.mark.slow
def test_sigterm_stops_the_training_too(tmp_path):
    """Sent to tables alone, as `kill` does: train.py saves and ends with it, and the same command goes on."""
    budget = "--data scenes --side 24 --batch-size 8 --grid-every 0 --no-compile --log-every 1 --steps 100000"
    process = command(tmp_path, "--rows", "self_e", "--seeds", 2, "--budget", budget)
    run = tmp_path / "runs/0/self_e-2"
    try:
        while not (run / "metrics.jsonl").exists() or not (run / "metrics.jsonl").read_text():
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.1)
        process.terminate()
        complaints = process.communicate()[1]
        with pytest.raises(ProcessLookupError):  # nobody is left in the group
            os.killpg(process.pid, 0)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 130 and "the same command goes on" in complaints
    assert len(checkpoint.complete_states(run)) == 1 and not tables.finished(run)
