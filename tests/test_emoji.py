"""The emoji: what is made of the packages, what is drawn from it, and how a broken part is told."""

import io
import json
from collections import Counter

import numpy as np
import pytest
from PIL import Image
from test_shards import write_tar

import data
import emoji
from engine import feed
from recipe import Stage

MAKERS = list(emoji.MAKERS)


def concepts(n: int) -> list[emoji.Concept]:
    """Half animals, half foods. All carry "common", only the animals "animal"; each has a tag of its own."""
    kinds = ((["common", "animal"], "birds", "animals-nature"), (["common"], "fruit", "food-drink"))
    made = []
    for i in range(n):
        tags, *groups = kinds[i % 2]
        made.append(emoji.Concept(f"{i:x}", f"thing{i}", [f"own{i}", *tags], *groups))
    return made + [emoji.Concept("alone", "loner", ["own"], "fruit", "food-drink")]


@pytest.fixture
def source(tmp_path, monkeypatch):
    """Ten concepts and a loner, each of whose pictures has a colour of its own."""
    monkeypatch.setattr(emoji, "TILES", tmp_path / "tiles.npz")
    colors = np.arange(11 * 3, dtype=np.uint8).reshape(11, 3, 1, 1, 1) * 7
    tiles = np.broadcast_to(colors, (11, 3, emoji.TILE, emoji.TILE, 3))
    emoji.write(emoji.TILES, tiles, concepts(10))
    return emoji.Emoji(16)


def test_a_sample_is_a_function_of_seed_and_index(source):
    other = emoji.Emoji(16)
    other.sample(3), other.sample(7)
    for g in (0, 5, 10**9):
        a, b = source.sample(g, 1), other.sample(g, 1)
        assert np.array_equal(a.picture, b.picture) and (a.caption, a.key) == (b.caption, b.key)
        assert a.picture.shape == (*source.bucket(g, 1), 3) and a.picture.dtype == np.uint8
    assert [source.sample(g, 1).key for g in range(9)] != [source.sample(g, 2).key for g in range(9)]


def test_captions_come_in_their_shares_and_are_true(source):
    """Read back, from many samples, what each caption was seen with."""
    seen = [source.sample(g) for g in range(6000)]
    share = Counter(s.caption for s in seen)
    for s in seen:
        code, maker = s.key.split("-")
        concept = next(c for c in source.concepts if c.code == code)
        words = s.caption.removeprefix("an ").removeprefix("a ")
        assert words in (concept.label, f"{maker} {concept.label}", *concept.tags, concept.subgroup)
        assert not words.startswith("own")  # too few share it
    labels = sum(n for text, n in share.items() if text in {f"a {c.label}" for c in source.concepts})
    exact = sum(n for text, n in share.items() if text.split()[1:2] and text.split()[1] in MAKERS)
    assert exact / len(seen) == pytest.approx(0.4, abs=0.03)
    assert labels / len(seen) == pytest.approx(0.2, abs=0.03)
    assert share["an animal"] / len(seen) == pytest.approx(5 / 11 * 0.15, abs=0.02)  # one of two tags
    loner = Counter(s.caption for s in seen if s.key.startswith("alone"))  # its only tag is nobody else's
    assert loner["fruit"] / loner.total() == pytest.approx(0.4, abs=0.07)


def test_two_captions_of_three_name_the_maker(source):
    captions = [emoji.Emoji(16, "emoji-named").sample(g).caption for g in range(3000)]
    words = [caption.removeprefix("a ").split()[0] for caption in captions]
    assert np.mean([word in MAKERS for word in words]) == pytest.approx(2 / 3, abs=0.03)
    assert {"a soft common", "flat fruit"} <= set(captions)


def test_a_tenth_of_the_pairs_is_held_out_and_never_drawn(source):
    lots = Counter(emoji.held_out(f"{i:x}") for i in range(5000))
    assert sum(lots[m] for m in range(3)) / (5000 * 3) == pytest.approx(0.1, abs=0.01)
    assert source.held_out_pairs and len(source.held_out_pairs) + len(source.pairs) == 11 * 3
    drawn = {source.sample(g).key for g in range(3000)}
    assert drawn == {f"{source.concepts[i].code}-{MAKERS[m]}" for i, m in source.pairs}


def test_pictures_are_moved_by_a_pixel_over_white():
    picture = np.random.default_rng(0).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    for down in (-1, 0, 1):
        for right in (-1, 0, 1):
            expected = np.roll(picture, (down, right), (0, 1))
            if down:
                expected[0 if down > 0 else -1] = 255
            if right:
                expected[:, 0 if right > 0 else -1] = 255
            assert np.array_equal(emoji.shifted(picture, down, right), expected)


def test_the_fingerprint_follows_side_set_and_words(source):
    prints = {source.fingerprint, emoji.Emoji(8).fingerprint, emoji.Emoji(16, "emoji-all").fingerprint}
    tiles, words = emoji.read(emoji.TILES)
    emoji.write(emoji.TILES, tiles, words[:-1])
    assert emoji.Emoji(16).fingerprint not in prints and len(prints) == 3


ARTICLES = ["a fox", "an octopus", "a unicorn", "an hourglass", "grapes", "a compass"]


@pytest.mark.parametrize("words", ARTICLES)
def test_articles(words):
    assert emoji.with_article(words.split()[-1]) == words


def picture(color: tuple, form: str, side: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGBA", (side, side), color).save(file, form, lossless=True)
    return file.getvalue()


@pytest.fixture
def archives(tmp_path):
    """Three concepts, of which all makers drew the first, whose codes differ in the mark for pictures."""
    red, clear = (255, 0, 0, 255), (255, 0, 0, 0)
    entry = {"label": "chipmunk", "tags": ["animal"], "subgroup": 34, "group": 3}
    words = {
        "en/data": [
            entry | {"hexcode": "1F43F"},
            entry | {"hexcode": "1F98A", "label": "fox"},
            {"hexcode": "1F1E6", "label": "regional indicator"},
        ],
        "en/messages": {"subgroups": [{"key": "animal-mammal", "message": "mammals"}]},
        "meta/groups": {"groups": {"3": "animals-nature"}, "subgroups": {"34": "animal-mammal"}},
    }
    large, small = picture(red, "webp", 256), picture(red, "png", 64)
    contents = {
        "3.tgz": {"assets/1f43f-fe0f.webp": large},
        "g.tgz": {"img/google/64/1f43f.png": picture(clear, "png", 64)},
        "t.tgz": {f"img/twitter/64/{code}.png": small for code in ("1f43f-fe0f", "1f98a")},
        "w.tgz": {f"{name}.json": json.dumps(value).encode() for name, value in words.items()},
    }
    return [
        write_tar(tmp_path / name, {f"package/{file}": content for file, content in some.items()}, "w:gz")
        for name, some in contents.items()
    ]


def test_tiles_of_what_all_makers_drew_lie_over_white(archives, tmp_path, monkeypatch):
    monkeypatch.setattr(emoji, "fetch", lambda folder: archives)
    tiles, words = emoji.read(tmp_path / "new" / "tiles.npz")  # fetched, because it is missing
    assert words == [emoji.Concept("1f43f", "chipmunk", ["animal"], "mammals", "animals-nature")]
    assert tiles.shape == (1, 3, emoji.TILE, emoji.TILE, 3)
    assert [tuple(t[5, 5]) for t in tiles[0]] == [(255, 0, 0), (255, 255, 255), (255, 0, 0)]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["tiles.npz"]


def test_what_is_missing_or_broken_is_one_clear_line(source, tmp_path, monkeypatch):
    missing = tmp_path / "new" / "tiles.npz"
    monkeypatch.setattr(emoji.shutil, "which", lambda name: None)
    with pytest.raises(data.DataError, match="install Node.js"):
        emoji.read(missing)
    failing = tmp_path / "npm"
    failing.write_text("#!/bin/sh\necho npm error code ENOTFOUND >&2\necho more >&2\nexit 1\n")
    failing.chmod(0o755)
    monkeypatch.setattr(emoji.shutil, "which", lambda name: str(failing))
    with pytest.raises(data.DataError, match=r"\(npm error code ENOTFOUND\)"):
        emoji.read(missing)
    assert not list(missing.parent.iterdir())
    with pytest.raises(data.DataError, match="at most 64"):
        emoji.Emoji(65)
    monkeypatch.setattr(emoji, "PACKAGES", ["other@2"])
    with pytest.raises(data.DataError, match="remove it"):
        emoji.read(emoji.TILES)
    emoji.TILES.write_bytes(emoji.TILES.read_bytes()[:100])
    with pytest.raises(data.DataError, match="damaged"):
        emoji.read(emoji.TILES)


@pytest.mark.parametrize("name", emoji.SETS)
def test_the_loop_opens_it_by_name(source, name):
    opened = feed.open_source((name,), Stage(0, (16,), 32), 4)
    assert isinstance(opened, emoji.Emoji) and opened.name == name
    wrong = feed.open_source((name,), Stage(0, (16,), 32), 4, wrong_captions=0.5)
    pairs = [(opened.sample(g), wrong.sample(g)) for g in range(400)]
    assert all(np.array_equal(a.picture, b.picture) for a, b in pairs)
    assert 0.35 < np.mean([a.caption != b.caption for a, b in pairs]) <= 0.5
