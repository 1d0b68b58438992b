"""sample.py: pictures in the shapes that a model was trained on, files that tell how they were made, and what is refused."""

import math

import numpy as np
import programs
import pytest
import torch
from PIL import Image
from test_shards import picture, write_tar

import losses
import recipe
import sample
import sampler
import train
from engine import checkpoint, feed, watch

CPU = torch.device("cpu")
WIDE, SQUARE = (12, 20), (16, 16)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two iterations on a tar of 10 wide and 6 square pictures, with a grid."""
    folder = tmp_path_factory.mktemp("sample")
    pictures = {f"{i}.png": picture((40, 24) if i < 10 else (24, 24), (10 * i, 0, 0)) for i in range(16)}
    write_tar(folder / "0.tar", pictures | {f"{i}.txt": f"number\n{i}".encode() for i in range(16)})
    with pytest.MonkeyPatch.context() as patch:
        words = ["--data", folder / "0.tar", "--out", folder / "r", "--steps", 2, *programs.QUICK[:-2]]
        programs.run(patch, train, *words, "--save-every", 0)
    return folder / "r"


def test_a_run_on_buckets_names_them_and_draws_them(run):
    config = checkpoint.read_json(run / "config.json")
    assert config["buckets"] == [[*WIDE, 10 / 16], [*SQUARE, 6 / 16]] and config["side"] == 16
    source = feed.open_source((str(run.parent / "0.tar"),), recipe.Stage(0, (16,), 4), 4)
    shapes = watch.grid_prompts(source)
    drawn = reversed([source.sample(g, 0) for g in range(64)])
    first = {s.caption: s.picture.shape[:2] for s in drawn}  # of each caption the first
    assert shapes == {caption: first[caption] for caption in shapes} and set(shapes.values()) == {
        WIDE,
        SQUARE,
    }
    scale = 96 // next(iter(shapes.values()))[1]
    # Five columns as wide as the widest, a row as high as its pictures and its caption
    size = 5 * (scale * 20 + 6) + 6, sum(scale * h + 21 for h, _ in shapes.values()) + 24
    for grid in (run / "grids").iterdir():
        assert Image.open(grid).size == size
    loaded = sample.load(run, CPU)
    (drawing,) = sample.generate(loaded, ["number 3"], [(0,)])
    assert loaded.shape == drawing.shape[:2] == WIDE


def test_a_run_without_buckets_is_square(run, tmp_path):
    """As config.json was before it named them; its mu stays."""
    config = checkpoint.read_json(run / "config.json")
    del config["buckets"]
    checkpoint.write_json(tmp_path / "config.json", config | {"mu": 0.25})
    (tmp_path / "model.safetensors").write_bytes((run / "model.safetensors").read_bytes())
    loaded = sample.load(tmp_path, CPU)
    assert loaded.shape == SQUARE and sample.mu_of(loaded, SQUARE) == 0.25
    assert sample.mu_of(loaded, (32, 64)) == losses.mu_of_length(8 * 16)


def test_each_picture_is_the_samplers_own_whatever_stands_beside_it(run):
    """Against sampler.sample called by hand, with the time grid of its shape, and the prompt that guidance leaves."""
    loaded = sample.load(run, CPU)
    shapes, prompts, how = [WIDE, SQUARE, WIDE], ["number", "0", "number"], {"guidance": 3.0, "eta": 0.0}
    found = sample.generate(
        loaded, prompts, [(0,), (1,), (2,)], shapes=shapes, seed=5, steps=3, negative="9", **how
    )
    for i, (h, w) in enumerate(shapes):
        noise = sample.normal(5, "sampling", [(0, i)], (3, h, w))
        choices = {"steps": 3, "mu": losses.mu_of_length(h * w // 16), **how}
        x = sampler.sample(loaded.network, noise, loaded.text([prompts[i]]), loaded.text(["9"]), **choices)
        expected = ((loaded.autoencoder.decode(x)[0] + 1) * 127.5).round().permute(1, 2, 0).numpy()
        assert found[i].shape == (h, w, 3) and np.abs(found[i] - expected).max() <= 1
    other = sample.generate(loaded, prompts[:1], [(0,)], shapes=shapes[:1], seed=5, steps=3, **how)
    assert np.abs(found[0].astype(int) - other[0]).max() > 1


def words(run, *arguments):
    return ["--checkpoint", run, "--prompt", "number 3", *arguments, "--device", "cpu"]


def test_one_file_a_picture_and_what_each_tells(run, tmp_path, monkeypatch, capsys):
    (tmp_path / "prompts.txt").write_text("une tasse de café\n\n")
    asked = ["--prompts", tmp_path / "prompts.txt", "--images", 2, "--steps", 1, 2, "--seed", 7]
    asked += ["--shape", "8x12", "--guidance", 2, "--negative", "grün 緑", "--out-dir", tmp_path / "a/b"]
    programs.run(monkeypatch, sample, *words(run, *asked))
    assert "wrote 8 pictures in" in capsys.readouterr().out
    found = {path.name: Image.open(path) for path in (tmp_path / "a/b").iterdir()}
    assert len(found) == 8 and {image.size for image in found.values()} == {(12, 8)}
    said = found["0003-une-tasse-de-café-2-steps-seed-7.png"].text
    assert float(said["mu"]) == losses.mu_of_length(2 * 3)
    expected = {"prompt": "une tasse de café", "negative": "grün 緑", "image": "1", "steps": "2", "seed": "7"}
    expected |= {"guidance": "2.0", "checkpoint": str(run)}
    assert {name: said[name] for name in expected} == expected


@pytest.mark.parametrize("place", ["", "model.safetensors"])
def test_without_prompts_a_checkpoint_draws_its_own(run, place, tmp_path, monkeypatch, capsys):
    asked = ["--checkpoint", run / place, "--device", "cpu", "--out", tmp_path / "a.png"]
    assert "at least one --prompt" in programs.refused(monkeypatch, capsys, sample, *asked)
    (run / "prompts.txt").write_text("number 1\nnumber 2\n")
    programs.run(monkeypatch, sample, *asked)
    (run / "prompts.txt").unlink()
    text = Image.open(tmp_path / "a.png").text
    assert text["prompt"] == "number 1\nnumber 2" and text["steps"] == "1 2 4 8"


NONSENSE = [{"t_max": 7}, {"t_max": "high"}, {"eta": "ancestral"}, {"s_rule": 2}, {"guidance": math.nan}]


@pytest.mark.parametrize("entry", [*NONSENSE, {"objective": "mine"}], ids=str)
def test_a_config_that_was_edited_into_nonsense_is_refused(run, tmp_path, entry):
    checkpoint.write_json(tmp_path / "config.json", checkpoint.read_json(run / "config.json") | entry)
    with pytest.raises(checkpoint.CheckpointError, match="config.json"):
        sample.load(tmp_path, CPU)


def test_nothing_is_overwritten(run, tmp_path, monkeypatch, capsys):
    for steps in ([2], [2], [1, 2]):
        programs.run(monkeypatch, sample, *words(run, "--out", tmp_path / "a.png", "--steps", *steps))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a-2.png", "a-3.png", "a.png"]
    assert "a-3.png" in capsys.readouterr().out
    with Image.open(tmp_path / "a.png") as one, Image.open(tmp_path / "a-3.png") as sheet:
        assert one.size == (200, 120) and sheet.text["steps"] == "1 2"


@pytest.mark.parametrize(
    "asked, said",
    [
        (["--shape", "13x16"], "multiples of 4, not 13x16"),
        (["--shape", "16"], "HEIGHTxWIDTH"),
        (["--shape", "0x16"], "HEIGHTxWIDTH"),
        (["--negative", "x", "--guidance", 1], "--guidance other than 1"),
        (["--out-dir", "{}/file"], "must name a folder"),
        (["--out", "{}/file"], "must name a .png"),
        (["--images", 20000, "--scale", 64], "or --out-dir"),
        (["--checkpoint", "{}"], "config.json"),
    ],
    ids=str,
)
def test_what_is_refused(run, tmp_path, monkeypatch, capsys, asked, said):
    (tmp_path / "file").touch()
    asked = [str(word).format(tmp_path) for word in asked]
    assert said in programs.refused(monkeypatch, capsys, sample, *words(run, *asked))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_prompts_share_their_noises_and_what_is_not_read_is_said(run, tmp_path, monkeypatch, capsys):
    """Picture i of one prompt starts where picture i of another does, so that rows compare; a prompt that is cut is named."""
    asked, right = [], sample.generate

    def generate(loaded, prompts, keys, **how):
        asked.extend(zip(prompts, keys))
        return right(loaded, prompts, keys, **how)

    monkeypatch.setattr(sample, "generate", generate)
    read = checkpoint.read_json(run / "config.json")["txt_len"] - 1
    full, cut = (" ".join(["red"] * n) for n in (read, read + 1))
    more = ["--prompt", full, "--prompt", cut, "--images", 2, "--steps", 1, "--out", tmp_path / "x.png"]
    programs.run(monkeypatch, sample, *words(run, *more))
    assert {key for prompt, key in asked if prompt == full} == {key for prompt, key in asked if prompt == cut}
    assert len(set(asked)) == len(asked) == 3 * 2
    said = capsys.readouterr().err
    assert said.count("is not read") == 1 and said.strip().endswith(f": {cut}")
