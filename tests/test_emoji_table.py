"""The table of emoji: what a perfect and a stubborn model score, and prediction beside measurement."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from emoji_tiles import coarse_source

import sample
from experiments import emoji_judge, emoji_table


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Sixteen animals, coarse random pictures; half share a second tag."""
    path = tmp_path_factory.mktemp("tiles") / "tiles.npz"
    return coarse_source(path, [["one"], ["one", "two"]] * 8, 4, 16, groups=8)


def test_validation_and_test_share_no_prompt_and_are_all_there(source):
    for kind in ("exact", "label", "group"):
        validation, test = (emoji_judge.asked(source, kind, split, 999) for split in ("validation", "test"))
        assert sorted(validation + test) == source.prompts(kind)
        assert emoji_judge.asked(source, kind, "test", 3) == test[:3]
    held = {t for split in ("validation", "test") for t in emoji_judge.asked(source, "held-out", split, 999)}
    assert len(held) == len(source.held_out_pairs) and not held & set(source.prompts("exact"))


def test_scores_of_a_model_that_knows_all_and_of_one_that_repeats_itself(source, monkeypatch):
    every, used, g = source.carriers(source.pairs), [], np.random.default_rng(0)

    def knows(loaded, prompts, keys, **choices):
        used.extend(keys)
        return [source.pictures[list(every[p])[g.integers(len(every[p]))]] for p in prompts]

    def repeats(loaded, prompts, keys, **choices):
        return [source.pictures[0, 0]] * len(prompts)

    scores = emoji_table.Scores(source, 35)
    monkeypatch.setattr(sample, "generate", knows)
    first = scores(None, "label", "test", 60)
    assert first["right"] == first["concept"] == 1.0 and first["variety"] == pytest.approx(1, abs=0.15)
    scores(None, "group", "test", 60), scores(None, "label", "validation", 60)
    assert len(set(used)) == len(used)  # no noise is used twice

    monkeypatch.setattr(sample, "generate", repeats)
    again = scores(None, "label", "test", 60)
    assert again["right"] in (0.0, 1 / len(emoji_judge.asked(source, "label", "test", 35)))
    assert again["variety"] is None or again["variety"] < 0.6
    tag = scores(None, "tag", "test", 60)
    assert tag["score"] == pytest.approx(tag["right"] * (tag["variety"] or 0))


def test_the_page_sets_the_prediction_below_what_was_measured(tmp_path, monkeypatch):
    record = {"objective": "classifier only", "steps": 2, "variety": None}
    records = [record | {"right": 0.25}, record | {"right": 0.75, "variety": 0.5}]
    world = {"kinds": {"tag": {"records": records}}}
    monkeypatch.setattr(emoji_judge, "predicted_in", lambda name: tmp_path / f"{name}.json")
    (tmp_path / "emoji.json").write_text(json.dumps(world))
    for row, seed, right in (("self_e", 0, 0.5), ("self_e", 1, 0.7), ("control", 1, 0.4)):
        cell = {"right": right, "variety": 0.8, "settings": {"guidance": 1.5, "space": "x0", "s_rule": 0.5}}
        kinds = {kind: {"2": cell} for kind in emoji_judge.KINDS}
        result = json.dumps({"row": row, "seed": seed, "kinds": kinds, "training": {"data": ["emoji"]}})
        (tmp_path / f"{row}-{seed}.json").write_text(result)
    (tmp_path / "self_e-search.json").write_text("{}")
    emoji_table.write_page(tmp_path)
    page = (tmp_path / "table.md").read_text()
    assert (
        "| self_e | tag | w 1.5, x0, s 0.5 |" in page
        and "| self_e minus control | 2 |" in page
        and "| tag | +0.300 |" in page
    )
    lines = page.split("## tag")[1].split("##")[0].splitlines()
    measured = next(i for i, line in enumerate(lines) if line.startswith("| self_e | 2 | 0.600 ± "))
    assert lines[measured].endswith("; 0.800 ± 0.000 |")
    assert lines[measured + 1] == "| predicted |  | 0.500; 0.500 |"


def test_settings_are_chosen_for_each_kind_by_their_score(source, tmp_path, monkeypatch):
    """A model that is right at guidance 3 alone, and for labels at eta 0 alone."""

    def judged(loaded, kind, split, pictures, **choices):
        assert split == "validation" and pictures == 70
        good = choices["guidance"] == 3 and (kind != "label" or choices["eta"] == 0)
        return {"score": float(good) + 0.1 * (choices["eta"] == 0)}

    args = emoji_table.parse_arguments(["--steps", "50", "2"])
    loaded = SimpleNamespace(config={"objective": "self_e", "command": "python train.py"})
    monkeypatch.setattr(emoji_table.machine, "provenance", lambda device: {})
    chosen = emoji_table.search(loaded, judged, 1.0, tmp_path / "search.json", args, None)
    assert chosen["tag"][2]["guidance"] == 3 and chosen["tag"][2]["eta"] == 0.0
    assert chosen["tag"][50]["guidance"] == 3 and chosen["tag"][50]["eta"] == 0.0  # those of two steps
    again = emoji_table.search(
        loaded, None, 1.0, tmp_path / "search.json", args, None
    )  # nothing is tried twice
    assert again == chosen
