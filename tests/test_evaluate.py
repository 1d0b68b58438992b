"""The prompts, the intervals and the scores of evaluate.py, and the pictures that export.py writes for GenEval."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from programs import TINY, refused, run
from test_tables import draw_objects

import data
import losses
import model
from engine import checkpoint, errors
from experiments import evaluate, export
from rng import rng

SHAPES = data.SETS["shapes"]


@pytest.mark.parametrize("name", ["shapes", "scenes"])
def test_unseen_prompts_and_pairs_never_occur_in_training(name):
    source, world = data.Shapes(32, name), data.SETS[name]
    drawn = {source.scene(g).metadata["prompt"] for g in range(3000)}
    known = {m["prompt"]: evaluate.split_of(m) for m in evaluate.all_prompts(world)}
    assert len(drawn & set(known)) > 200  # the same wording, so that no overlap means something
    assert not [prompt for prompt in drawn if known.get(prompt, "train") != "train"]
    for split in ("validation", "test", "pairs"):
        assert any(known[m["prompt"]] == split for m in evaluate.prompts(split, None, world))


def test_splits_are_balanced_disjoint_and_fixed():
    listed = {split: evaluate.prompts(split) for split in ("train", "validation", "test", "pairs")}
    owned = {k: {m["prompt"] for m in asked if evaluate.split_of(m) == k} for k, asked in listed.items()}
    for split, asked in listed.items():
        assert len({m["prompt"] for m in asked}) == len(asked)
        assert not any(owned[split] & owned[other] for other in owned if other != split)
        tags = [m["tag"] for m in evaluate.prompts(split, 30)]
        assert {tags.count(tag) for tag in set(tags)} == {30}
        assert set(tags) == ({"colors", "position", "color_attr"} if split == "pairs" else set(data.TAGS))
    for m in listed["pairs"]:
        assert any((item.get("color"), item["class"]) in data.HELD_OUT_PAIRS for item in m["include"])
    # The order is part of what a seed means.
    first = [m["prompt"] for m in evaluate.prompts("test", 2)[:2]]
    assert first == ["a photo of a square", "a photo of a cross"]


def test_the_64_fixed_prompts_are_of_one_object_seen_in_training():
    fixed = evaluate.prompts("fixed", 24)
    assert len(fixed) == 64 and len({m["prompt"] for m in fixed}) == 5 + 5 * 8 - 4
    assert {m["tag"] for m in fixed} == {"single_object", "colors"}
    assert all(evaluate.split_of(m) == "train" for m in fixed)


@pytest.mark.parametrize("right, total", [(0, 12), (1, 12), (37, 100), (96, 96)])
def test_wilson_limits_solve_their_equation(right, total):
    """A limit L is a share at which the observed one lies exactly 1.96 standard errors of L away."""
    for limit in evaluate.wilson(right, total):
        distance = abs(right / total - limit)
        assert distance == pytest.approx(1.959964 * (limit * (1 - limit) / total) ** 0.5, abs=1e-6)


def test_the_interval_of_the_mean_covers_the_truth_19_times_in_20():
    random, truth = np.random.default_rng(0), np.array([0.98, 0.9, 0.7, 0.5, 0.2, 0.05])
    covered = 0
    for _ in range(1000):
        _, low, high = evaluate.mean_interval([(int(r), 96) for r in random.binomial(96, truth)])
        covered += low <= truth.mean() <= high
    assert 0.93 <= covered / 1000 <= 0.98
    assert evaluate.mean_interval([(3, 10)]) == pytest.approx((0.3, *evaluate.wilson(3, 10)))


def test_measure_finds_the_objects_of_the_right_pictures_of_each_prompt(monkeypatch):
    """Where sample.generate paints what is asked three times in four, and nothing for counting."""
    asked, keys_seen = evaluate.prompts("test", 6), []

    def paint(loaded, texts, keys, **choices):
        keys_seen.extend(keys)
        return [picture(key) for key in keys]

    def picture(key):
        _, i, j = key
        empty = j == 3 or asked[i]["tag"] == "counting"
        objects = () if empty else draw_objects(rng(0, "painter", i, j), asked[i], SHAPES)
        return data.render(data.Scene(tuple(objects), 120, {}), 32)

    monkeypatch.setattr(evaluate.sample, "generate", paint)
    found = evaluate.measure(None, asked, 4, 2, seed=5, stream=2)
    assert list(map(len, found)) == [0 if m["tag"] == "counting" else 3 for m in asked]
    assert keys_seen == [(2, i, j) for i in range(36) for j in range(4)]
    for metadata, pictures in zip(asked, found):
        classes = [item["class"] for item in metadata["include"]]
        assert all(sorted(o.shape for o in objects) == sorted(classes) for objects in pictures)

    scores = evaluate.summary(asked, found, 4)
    assert scores["overall"]["score"] == pytest.approx(0.75 * 5 / 6)  # unweighted mean of the six tags
    low, high = evaluate.wilson(18, 24)
    expected = {"score": 0.75, "right": 18, "total": 24, "low": low, "high": high}
    assert scores["tags"]["position"] == expected
    assert set(scores["unseen"]["tags"]) == {"two_object", "position", "color_attr", "counting"}
    text = evaluate.table({2: scores})
    assert "Attribute Binding" in text and "0.625 [" in text and "90 of 144 pictures right" in text


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The folder of an untrained run with a network of a few thousand weights."""
    folder = tmp_path_factory.mktemp("tiny")
    sizes = TINY | {"width": 32, "axes": (4, 6, 6), "patch": 8}
    torch.manual_seed(0)
    checkpoint.save_weights(folder / "model.safetensors", model.Denoiser(**sizes))
    config = {"format": 1, "model": sizes, "objective": "flow_matching"}
    config |= {"data": ["shapes"], "side": 32, "mu": 0.0}
    config |= {"text_encoder": "words", "txt_len": 16, "autoencoder": "pixels", "precision": "float32"}
    config |= {"s_rule": 0.0, "eta": 1.0, "guidance": 1.0, "guidance_space": "v"}
    checkpoint.write_json(folder / "config.json", config)
    return folder


def test_the_command_prints_the_table_and_writes_json(tiny, tmp_path, monkeypatch, capsys):
    numbers = ("--steps", 1, 2, "--per-tag", 2, "--images", 2, "--seed", 3, "--out", tmp_path / "a.json")
    run(monkeypatch, evaluate, "--device", "cpu", "--checkpoint", tiny, *numbers)
    printed = capsys.readouterr().out
    for word in ("Steps", "Overall", "Attribute Binding", "test prompts, 24 pictures a row", "pairs prompts"):
        assert word in printed
    results = checkpoint.read_json(tmp_path / "a.json")
    assert results["choices"]["s_rule"] == 1.0  # flow matching's, whatever its config says
    assert results["seed"] == 3 and results["hardware"] and results["commit"] and "seconds" in results
    assert "--per-tag 2" in results["command"] and set(results["splits"]["test"]) == {"1", "2"}
    assert results["splits"]["test"]["2"]["tags"]["counting"]["total"] == 4
    assert set(results["splits"]["pairs"]["1"]["tags"]) == {"colors", "position", "color_attr"}


def test_the_file_of_weights_stands_for_its_folder(tiny, monkeypatch):
    few = ("--split", "pairs", "--steps", 1, "--per-tag", 1, "--images", 1)
    run(monkeypatch, evaluate, "--device", "cpu", "--checkpoint", tiny / "model.safetensors", *few)
    (tiny / "evaluation.json").unlink()


BAD_FILES = [("", "is empty"), ('{"tag": 1}\n', 'with a "prompt"'), ("{\n", "line 1")]


@pytest.mark.parametrize("text, complaint", BAD_FILES)
def test_a_bad_prompt_file_is_refused(text, complaint, tmp_path):
    (tmp_path / "p.jsonl").write_text(text)
    with pytest.raises(errors.UserError, match=complaint):
        export.read_prompts(tmp_path / "p.jsonl")


def read_like_geneval(folder):
    """{number: (metadata, names of samples)}, by the rules by which GenEval's evaluate_images.py walks a folder."""
    found = {}
    for path in sorted(folder.iterdir()):
        if path.is_dir() and path.name.isdigit():
            samples = [s.name for s in sorted((path / "samples").iterdir()) if re.match(r"\d+\.png", s.name)]
            found[int(path.name)] = (json.loads((path / "metadata.jsonl").read_text()), samples)
    return found


def test_an_export_is_what_geneval_reads_and_goes_on_where_it_stopped(tiny, tmp_path, monkeypatch, capsys):
    asked, prompts, out = evaluate.prompts("test", 1)[:3], tmp_path / "prompts.jsonl", tmp_path / "out"
    prompts.write_text("".join(json.dumps(m) + "\n" for m in asked))
    words = ("--device", "cpu", "--checkpoint", tiny / "model.safetensors", "--steps", 2, "--images", 2)
    words += ("--shape", "16x24", "--prompts", prompts, "--out", out)
    run(monkeypatch, export, *words)
    assert checkpoint.read_json(out / "settings.json")["mu"] == losses.mu_of_length(2 * 3)
    assert read_like_geneval(out) == {i: (m, ["0000.png", "0001.png"]) for i, m in enumerate(asked)}
    before = {f: f.read_bytes() for f in sorted(out.rglob("*.png"))}
    assert len(set(before.values())) == 6  # every picture has its own noise

    for file in list(before)[3:5]:
        file.unlink()  # a run that was stopped here
    kept = {f: f.stat().st_mtime_ns for f in before if f.exists()}
    run(monkeypatch, export, *words, "--batch-size", 1)
    assert "2 new pictures, 6 in all" in capsys.readouterr().out
    assert {f: f.read_bytes() for f in before} == before  # the same pictures, in batches of another size
    assert {f: f.stat().st_mtime_ns for f in kept} == kept

    assert "other settings" in refused(monkeypatch, capsys, export, *words, "--seed", 1)
    assert {f: f.read_bytes() for f in before} == before


def test_a_stopped_export_leaves_no_file_that_geneval_would_read(tmp_path, monkeypatch):
    class Torn(Exception):
        pass

    def save(image, path, format):
        Path(path).write_bytes(b"half a picture")
        raise Torn

    asked, picture = evaluate.prompts("test", 1)[:2], np.zeros((8, 8, 3), np.uint8)
    with monkeypatch.context() as patch, pytest.raises(Torn):
        patch.setattr("PIL.Image.Image.save", save)
        export.export(tmp_path, asked, 2, 2, lambda jobs: [picture] * len(jobs))
    assert read_like_geneval(tmp_path)[0][1] == []
    assert export.export(tmp_path, asked, 2, 2, lambda jobs: [picture] * len(jobs)) == 4
    assert [samples for _, samples in read_like_geneval(tmp_path).values()] == [["0000.png", "0001.png"]] * 2
