"""The built-in shapes against their own rules, judged from the pictures and the captions; and folders of pictures."""

import re

import numpy as np
import pytest
from PIL import Image

import data

NUMBER = {"two": 2, "three": 3, "four": 4}
OBJECT = r"a(?: (\w+))? (circle|square|triangle|cross|ring)"


@pytest.fixture(scope="module")
def scenes():
    source = data.Shapes(32)
    return [source.scene(g) for g in range(600)]


def test_a_sample_is_a_function_of_seed_and_index():
    one, other = data.Shapes(32), data.Shapes(32)
    for g in (7, 0, 10**9):
        a, b = one.sample(g, 1), other.sample(g, 1)
        assert np.array_equal(a.picture, b.picture) and a.caption == b.caption and a.key == b.key
        assert not np.array_equal(a.picture, one.sample(g, 2).picture)


def test_held_out_pairs_and_prompts_never_occur(scenes):
    for scene in scenes:
        assert not {(o.color, o.shape) for o in scene.objects} & data.HELD_OUT_PAIRS
        assert data.split_of(scene.metadata["prompt"]) == "train"
    assert {s.metadata["tag"] for s in scenes} == set(data.TAGS)
    single = [data.Shapes(16, "one-shape").scene(g) for g in range(200)]
    assert {s.metadata["tag"] for s in single} == {"single_object", "colors"}
    assert all(len(s.objects) == 1 for s in single)


def test_prompts_say_what_is_drawn(scenes):
    """Read each prompt with a grammar of its own and compare with the scene's objects."""
    for scene in scenes:
        prompt, drawn = scene.metadata["prompt"], scene.objects
        if match := re.fullmatch(r"a photo of (two|three|four) (\w+?)(?:es|s)", prompt):
            shape = match[2] if match[2] in data.SHAPES else match[2] + "e"
            assert [o.shape for o in drawn] == [shape] * NUMBER[match[1]]
            assert scene.metadata["exclude"] == [{"class": shape, "count": NUMBER[match[1]] + 1}]
            continue
        match = re.fullmatch(rf"a photo of {OBJECT}(?: (and|left of|right of|above|below) {OBJECT})?", prompt)
        assert match, prompt
        asked = [(match[1], match[2])] + ([(match[4], match[5])] if match[3] else [])
        for (color, shape), item in zip(asked, drawn, strict=True):
            assert shape == item.shape and color in (None, item.color)
        if match[3] and match[3] != "and":
            a, b = drawn
            right, down = b.x - a.x, b.y - a.y
            difference = {"left of": right, "right of": -right, "above": down, "below": -down}
            assert difference[match[3]] > (a.diameter + b.diameter) / 2


def test_metadata_has_genevals_fields():
    metadata = data.prompt_metadata("position", ["ring", "cross"], ["red", None], relation="above")
    assert metadata == {
        "tag": "position",
        "prompt": "a photo of a red ring above a cross",
        "include": [
            {"class": "cross", "count": 1},
            {"class": "ring", "count": 1, "color": "red", "position": ["above", 0]},
        ],
    }
    three = data.prompt_metadata("counting", ["cross"], [None], count=3)
    assert three["prompt"] == "a photo of three crosses"


def test_objects_keep_apart_and_inside(scenes):
    for scene in scenes:
        total = sum(data.coverage(o, 32) for o in scene.objects)
        assert total.max() <= 1 + 1e-9  # no pixel belongs to two objects
        assert total[0].max() == total[-1].max() == total[:, 0].max() == total[:, -1].max() == 0
        for i, a in enumerate(scene.objects):
            r = a.diameter / 2
            assert min(a.x, a.y, 32 - a.x, 32 - a.y) - r >= data.GAP - 1e-9
            for b in scene.objects[:i]:
                assert max(abs(a.x - b.x), abs(a.y - b.y)) - r - b.diameter / 2 >= data.GAP - 1e-9


def test_scenes_leave_much_open(scenes):
    """Shapes of one number stand in every layout, in many orders, each moved by all that it may be."""
    for n, layouts in data.LAYOUTS.items():
        drawn = [s.objects for s in scenes if len(s.objects) == n and s.metadata["tag"] != "position"]
        places = sorted({place for layout in layouts for place in layout})
        orders, moves = set(), []
        for objects in drawn:
            order = [min(places, key=lambda p: np.hypot(o.x - p[0], o.y - p[1])) for o in objects]
            moves += [(o.x - x, o.y - y) for o, (x, y) in zip(objects, order)]
            orders.add(tuple(order))
        assert {tuple(sorted(order)) for order in orders} == {tuple(sorted(layout)) for layout in layouts}
        assert len(orders) >= {1: 1, 2: 4, 3: 12, 4: 12}[n]
        assert 0.9 * data.MOVES[n] < np.abs(moves).max() <= data.MOVES[n]


@pytest.mark.parametrize("shape", data.SHAPES)
def test_anti_aliased_area_is_the_true_area(shape):
    """The sum of the coverage against the share of random points inside: Monte Carlo, 200,000 points."""
    item = data.Object(shape, "red", 16.3, 15.8, 13.0)
    points = np.random.default_rng(0).uniform(0, 32, size=(2, 200_000))
    inside = data.signed_distance(shape, points[0] - item.x, points[1] - item.y, item.diameter / 2) <= 0
    assert data.coverage(item, 32).sum() == pytest.approx(inside.mean() * 32**2, rel=0.06)


def test_the_norm_varies(scenes):
    """Eq. 19 keeps the norm of x0; if all pictures had one norm, it would hand over part of the answer."""
    norms = [np.linalg.norm(data.render(s, 32) / 127.5 - 1) for s in scenes[:200]]
    assert np.std(norms) / np.mean(norms) > 0.15


def test_values_are_rounded_to_the_nearest(scenes):
    """Objects keep apart, so a picture is its ground and a sum over the objects, to half a level of the 255."""
    for scene in scenes[:60]:
        exact = np.full((32, 32, 3), float(scene.ground))
        for item in scene.objects:
            exact += data.coverage(item, 32)[..., None] * (np.array(data.COLORS[item.color]) - scene.ground)
        assert np.abs(data.render(scene, 32) - exact).max() <= 0.5 + 1e-9


def test_pictures_and_tensors_are_inverse():
    pictures = [np.random.default_rng(i).integers(0, 256, size=(8, 6, 3)).astype(np.uint8) for i in range(3)]
    x = data.to_tensor(pictures)
    assert x.shape == (3, 3, 8, 6) and x.min() >= -1 and x.max() <= 1
    assert x[1, 2, 5, 4] == pictures[1][5, 4, 2] / 127.5 - 1
    assert all(np.array_equal(a, b) for a, b in zip(data.to_pictures(x), pictures))


# --- Folders (what they may look like: test_files.py) -------------------------------------------------------
@pytest.fixture
def folder(tmp_path):
    """Seven pictures whose colour is in their caption; the third has three captions more."""
    for i in range(7):
        Image.new("RGB", (40, 30), (20 * i, 0, 0)).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(f"{20 * i} zero" + "\n40 one\n40 two\n40 three" * (i == 2))
    return tmp_path


def test_every_epoch_shows_every_picture_once_in_another_order(folder):
    source = data.ImageFolder(folder, 8)
    epochs = [[source.sample(g, s).key for g in range(7 * e, 7 * e + 7)] for e, s in ((0, 5), (1, 5), (0, 6))]
    assert all(sorted(epoch) == sorted(source.keys) for epoch in epochs) and len(set(map(tuple, epochs))) == 3
    assert [source.sample(g, 5).key for g in range(7)] == epochs[0]
    for sample in map(source.sample, range(21)):
        assert sample.picture.shape == (8, 8, 3) and sample.picture.max() == int(sample.caption.split()[0])


def test_of_several_captions_each_sample_draws_one(folder):
    """A function of (seed, g); over many samples each as often as another."""
    source, again = data.ImageFolder(folder, 8), data.ImageFolder(folder, 8)
    drawn = [source.sample(g, 1) for g in range(7 * 400)]
    assert [again.sample(g, 1).caption for g in range(100)] == [s.caption for s in drawn[:100]]
    one, other = ([data.draw_caption(source.captions[2], g, seed) for g in range(100)] for seed in (1, 2))
    assert one != other
    counts = np.unique([s.caption for s in drawn if s.key == "2.png"], return_counts=True)[1]
    assert len(counts) == 4 and abs(counts - 100).max() < 5 * (400 * 3 / 16) ** 0.5


# --- Sheets -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("caption", ["x" * 200_000, "two\nlines\tand more", "\u202e\U0001f600", ""])
def test_any_caption_fits_on_a_sheet_of_pictures_of_any_shape(caption):
    wide, tall = np.zeros((16, 32, 3), np.uint8), np.zeros((24, 16, 3), np.uint8)
    sheet = np.asarray(data.label_grid([[wide] * 2, [tall] * 2], ["a", "b"], ["", caption], 4))
    assert sheet.shape[1] < 300 and sheet.shape[0] < 4 * (16 + 24) + 80
    pixels = 2 * 16 * (16 * 32 + 24 * 16)  # of all pictures
    assert (sheet == 0).all(-1).sum() > pixels  # and letters


def test_letters_beyond_ascii_are_drawn():
    """Each its own picture, and none that of a letter that the font lacks."""
    masks = [data.font_of(c).getmask(c) for c in "eéжΩ\U0010fffe"]
    assert len({mask.getbbox() and bytes(mask) for mask in masks}) == 5
