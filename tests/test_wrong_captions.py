"""Wrong captions as a property of data: how many, whose, always the same ones, in every kind of source."""

import json
import sys

import numpy as np
import pytest
from PIL import Image
from test_shards import half_a_picture, write_tar
from test_shards import picture as png

import data
import encoders
import recipe
import train
from engine import errors, feed
from scale import cache, shards

QUICK = ["--batch-size", "4", "--device", "cpu", "--precision", "fp32", "--no-compile", "--grid-every", "0"]
N = 60  # pictures in the folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """N pictures of one size, each with a caption of its own that its first pixel knows; also as tars."""
    folder = tmp_path_factory.mktemp("wrong")
    (folder / "pictures").mkdir()
    for i in range(N):
        picture = np.full((16, 16, 3), 4 * i, np.uint8)
        Image.fromarray(picture).save(folder / "pictures" / f"{i:02}.png")
        (folder / "pictures" / f"{i:02}.txt").write_text(f"number {i}")
    shards.pack(folder / "pictures", folder / "tars", per_shard=25)
    return folder


def open_source(name, share, side=16, batch_size=4):
    return feed.open_source((str(name),), recipe.Stage(0, (side,), batch_size), 4, wrong_captions=share)


def told_and_shown(source, count, seed=0):
    """(the number in the caption, the number of the picture) of the samples g = 0 .. count - 1."""
    samples = [source.sample(g, seed) for g in range(count)]
    return [(int(s.caption.split()[1]), int(s.picture[0, 0, 0]) // 4) for s in samples]


@pytest.mark.parametrize("kind", ["pictures", "tars"])
def test_a_share_of_captions_is_swapped_the_same_in_every_epoch_and_nothing_else(folder, kind):
    plain, wrong = open_source(folder / kind, 0.0), open_source(folder / kind, 0.4)
    told = {}
    for caption, picture in told_and_shown(wrong, 5 * N):
        assert told.setdefault(picture, caption) == caption
    swapped = [picture for picture, caption in told.items() if picture != caption]
    assert len(told) == N and 0.15 * N < len(swapped) < 0.65 * N  # five standard deviations of a binomial
    assert {picture: caption for caption, picture in told_and_shown(wrong, N, seed=1)} != told
    assert all(caption != picture for caption, picture in told_and_shown(open_source(folder / kind, 1.0), N))
    for g in range(N):
        assert np.array_equal(plain.sample(g, 3).picture, wrong.sample(g, 3).picture)
        assert plain.sample(g, 3).key == wrong.sample(g, 3).key and plain.bucket(g, 3) == wrong.bucket(g, 3)
    assert plain.numbers == N and plain.skipped == wrong.skipped
    assert len({open_source(folder / kind, share).fingerprint for share in (0.0, 0.4, 0.41)}) == 3


def test_the_share_is_what_was_asked_for_in_the_built_in_shapes():
    """Of 4,000 samples the share whose caption is not that of their scene: X
    times the chance that another's says otherwise."""
    plain, wrong = data.Shapes(16, "one-shape"), open_source("one-shape", 0.3)
    captions = [plain.sample(g, 5).caption for g in range(4000)]
    changed = np.mean([wrong.sample(g, 5).caption != caption for g, caption in enumerate(captions)])
    shares = np.unique(captions, return_counts=True)[1] / 4000
    expected = 0.3 * (1 - np.sum(shares**2))
    assert abs(changed - expected) < 4 * (expected * (1 - expected) / 4000) ** 0.5
    assert {wrong.sample(g, 5).caption for g in range(4000)} == set(captions)  # only captions of the data


def test_two_resolutions_of_one_data_set_agree(folder):
    source = feed.open_source(
        (str(folder / "pictures"),), recipe.Stage(0, (16, 32), 4), 4, wrong_captions=0.5
    )
    told = {}
    for g in range(8 * N):
        sample = source.sample(g, 0)
        assert told.setdefault(sample.key, sample.caption) == sample.caption


def test_a_broken_picture_is_replaced_with_its_substitutes_own_caption(tmp_path):
    """One picture of the tars is damaged after its header: what stands for it has the caption that it has elsewhere."""
    members = {f"{i}.png": half_a_picture((64, 64)) if i == 3 else png((64, 64), (i, 0, 0)) for i in range(8)}
    write_tar(tmp_path / "tars/0.tar", members | {f"{i}.txt": f"number {i}".encode() for i in range(8)})
    source = open_source(tmp_path / "tars", 0.5)
    told = {}
    for g in range(32):
        sample = source.sample(g, 0)
        assert told.setdefault(sample.key, sample.caption) == sample.caption
    assert len(source.skipped) == 1 and len(told) == 7


def test_nothing_to_swap_is_an_error(tmp_path):
    for i in range(3):
        Image.new("RGB", (16, 16)).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text("always the same")
    with pytest.raises(errors.UserError, match="nothing to swap"):
        open_source(tmp_path, 0.1)
    open_source(tmp_path, 0.0)


def test_a_cache_is_refused(folder, tmp_path):
    encode = encoders.text_encoder("words", 6, "cpu"), encoders.autoencoder("pixels", "cpu")
    settings = cache.Settings(batch_size=4, tokens="fp32", multiple=4)
    cache.make(folder / "tars", tmp_path / "cache", 16, encode, settings)
    with pytest.raises(errors.UserError, match="keeps its own"):
        open_source(tmp_path / "cache", 0.1)


def test_a_run_knows_its_share_and_goes_on_with_no_other(tmp_path, monkeypatch):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
        train.main()

    out = tmp_path / "run"
    run("--steps", 2, "--out", out, "--wrong-captions", 0.4, *QUICK)
    assert json.loads((out / "config.json").read_text())["wrong_captions"] == 0.4
    state = next((out / "state").iterdir())
    assert "0.4 of the captions wrong" in (state / "state.json").read_text()
    for other in (0.3, 0):
        with pytest.raises(errors.UserError, match="was begun with --wrong-captions 0.4"):
            run("--resume", "--out", out, "--steps", 3, "--wrong-captions", other)
    run("--resume", "--out", out, "--steps", 3, "--device", "cpu")
    for share in ("-0.1", "1.1", "nan"):
        with pytest.raises(errors.UserError, match="between 0 and 1"):
            run("--wrong-captions", share, "--out", tmp_path / "never")
    assert not (tmp_path / "never").exists()
