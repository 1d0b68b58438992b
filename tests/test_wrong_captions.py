"""Wrong captions as a property of data: how many, whose, always the same ones, in every kind of source."""

import numpy as np
import pytest
from PIL import Image
from test_shards import half_a_picture, write_tar
from test_shards import picture as png

import encoders
import recipe
from engine import errors, feed
from scale import cache, shards

N = 60  # pictures in the folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """N pictures of one size, each with a caption of its own that its first pixel knows; also as tars."""
    folder = tmp_path_factory.mktemp("wrong")
    (folder / "pictures").mkdir()
    for i in range(N):
        (folder / "pictures" / f"{i:02}.png").write_bytes(png((16, 16), (4 * i,) * 3))
        (folder / "pictures" / f"{i:02}.txt").write_text(f"number {i}")
    shards.pack(folder / "pictures", folder / "tars", per_shard=25)
    return folder


def open_source(name, share, side=16, batch_size=4):
    return feed.open_source((str(name),), recipe.Stage(0, (side,), batch_size), 4, wrong_captions=share)


def captions_and_pictures(source, count, seed=0):
    """(the number in the caption, the number of the picture) of the samples g = 0 .. count - 1."""
    samples = [source.sample(g, seed) for g in range(count)]
    return [(int(s.caption.split()[1]), int(s.picture[0, 0, 0]) // 4) for s in samples]


@pytest.mark.parametrize("kind", ["pictures", "tars"])
def test_a_share_of_captions_is_swapped_the_same_in_every_epoch_and_nothing_else(folder, kind):
    plain, wrong = open_source(folder / kind, 0.0), open_source(folder / kind, 0.4)
    found = {}
    for caption, picture in captions_and_pictures(wrong, 5 * N):
        assert found.setdefault(picture, caption) == caption
    swapped = [picture for picture, caption in found.items() if picture != caption]
    assert len(found) == N and 0.15 * N < len(swapped) < 0.65 * N  # five standard deviations of a binomial
    assert {picture: caption for caption, picture in captions_and_pictures(wrong, N, seed=1)} != found
    every = captions_and_pictures(open_source(folder / kind, 1.0), N)
    assert all(caption != picture for caption, picture in every)
    for a, b in ((plain.sample(g, 3), wrong.sample(g, 3)) for g in range(N)):
        assert np.array_equal(a.picture, b.picture) and a.key == b.key
    assert plain.bucket(7, 3) == wrong.bucket(7, 3) and plain.numbers == N and plain.skipped == wrong.skipped
    assert len({open_source(folder / kind, share).fingerprint for share in (0.0, 0.4, 0.41)}) == 3


def captions_by_key(source, count):
    """The caption of each key, which must be one, in the samples g = 0 .. count - 1."""
    found = {}
    for sample in map(source.sample, range(count)):
        assert found.setdefault(sample.key, sample.caption) == sample.caption
    return found


def test_two_resolutions_of_one_data_set_agree(folder):
    stage = recipe.Stage(0, (16, 32), 4)
    source = feed.open_source((str(folder / "pictures"),), stage, 4, wrong_captions=0.5)
    assert len(captions_by_key(source, 8 * N)) == N


def test_a_broken_picture_is_replaced_with_its_substitutes_own_caption(tmp_path):
    """One picture of the tars is damaged after its header: what stands for it has the caption that it has elsewhere."""
    members = {f"{i}.png": half_a_picture((64, 64)) if i == 3 else png((64, 64), (i, 0, 0)) for i in range(8)}
    write_tar(tmp_path / "tars/0.tar", members | {f"{i}.txt": f"number {i}".encode() for i in range(8)})
    source = open_source(tmp_path / "tars", 0.5)
    assert len(captions_by_key(source, 32)) == 7 and len(source.skipped) == 1


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
