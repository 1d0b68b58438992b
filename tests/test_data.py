"""The built-in shapes against their own rules, judged from the pictures and the captions; and folders of pictures."""

import json
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
    other.sample(3), other.sample(7)
    for g in (0, 5, 10**9):
        a, b = one.sample(g, 1), other.sample(g, 1)
        assert np.array_equal(a.picture, b.picture) and a.caption == b.caption and a.key == b.key
    assert any(not np.array_equal(one.sample(g, 1).picture, one.sample(g, 2).picture) for g in range(3))


def test_held_out_pairs_and_prompts_never_occur(scenes):
    for scene in scenes:
        assert not {(o.color, o.shape) for o in scene.objects} & data.HELD_OUT_PAIRS
        assert data.split_of(scene.metadata["prompt"]) == "train"
    assert {s.metadata["tag"] for s in scenes} == set(data.TAGS)


def test_the_set_of_single_shapes_has_nothing_else():
    scenes = [data.Shapes(16, "one-shape").scene(g) for g in range(200)]
    assert {s.metadata["tag"] for s in scenes} == {"single_object", "colors"} and all(
        len(s.objects) == 1 for s in scenes
    )


def test_every_tag_that_can_spare_prompts_has_some_held_out():
    held = {"counting": [], "two_object": [], "position": []}
    for a in data.SHAPES:
        held["counting"] += [data.prompt_metadata("counting", [a], [None], n) for n in data.COUNTS]
        for b in set(data.SHAPES) - {a}:
            held["two_object"].append(data.prompt_metadata("two_object", [a, b], [None, None]))
            held["position"] += [
                data.prompt_metadata("position", [a, b], [None] * 2, relation=r) for r in data.RELATIONS
            ]
    for tag, prompts in held.items():
        lots = [data.split_of(m["prompt"]) for m in prompts]
        assert (
            lots.count("validation") >= 2 and lots.count("test") >= 3 and lots.count("train") > len(lots) / 2
        ), tag


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
        told = [(match[1], match[2])] + ([(match[4], match[5])] if match[3] else [])
        assert len(told) == len(drawn)
        for (color, shape), item in zip(told, drawn):
            assert shape == item.shape and color in (None, item.color)
        if match[3] and match[3] != "and":
            a, b = drawn
            difference = {
                "left of": b.x - a.x,
                "right of": a.x - b.x,
                "above": b.y - a.y,
                "below": a.y - b.y,
            }[match[3]]
            assert difference > (a.diameter + b.diameter) / 2


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
    assert (
        data.prompt_metadata("counting", ["cross"], [None], count=3)["prompt"] == "a photo of three crosses"
    )


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
    """Shapes of one number stand in every layout, in many orders, each moved by
    all that it may be: no prompt tells it all."""
    for n, layouts in data.LAYOUTS.items():
        drawn = [s.objects for s in scenes if len(s.objects) == n and s.metadata["tag"] != "position"]
        places = sorted({place for layout in layouts for place in layout})
        orders = set()
        moves = []
        for objects in drawn:
            order = [min(places, key=lambda p: np.hypot(o.x - p[0], o.y - p[1])) for o in objects]
            assert sorted(order) in [sorted(layout) for layout in layouts]
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


# ------------------------------------------------------------------------------------------------------------
# Folders
# ------------------------------------------------------------------------------------------------------------
def write_pictures(folder, names, size=(40, 30)):
    folder.mkdir(exist_ok=True)
    for i, name in enumerate(names):
        Image.new("RGB", size, (20 * i, 0, 0)).save(folder / name)
    return folder


def metadata(folder, lines):
    (folder / "metadata.jsonl").write_text(
        "\n".join(json.dumps(x) if isinstance(x, dict) else x for x in lines)
    )
    return folder


def test_both_caption_conventions(tmp_path):
    names = ["a.png", "b.jpg", "c.webp"]
    jsonl = metadata(
        write_pictures(tmp_path / "j", names), [{"file_name": n, "text": n.upper()} for n in names]
    )
    txt = write_pictures(tmp_path / "t", names)
    for name in names:
        (txt / name).with_suffix(".txt").write_text(name.upper() + "\n")
    for folder in (jsonl, txt):
        source = data.ImageFolder(folder, 16)
        assert sorted(source.captions) == ["A.PNG", "B.JPG", "C.WEBP"] and source.pictures[0].shape == (
            16,
            16,
            3,
        )


def test_every_epoch_shows_every_picture_once_in_another_order(tmp_path):
    names = [f"{i}.png" for i in range(7)]
    folder = metadata(write_pictures(tmp_path / "f", names), [{"file_name": n, "text": n} for n in names])
    source = data.ImageFolder(folder, 8)
    epochs = [[source.sample(g, 5).key for g in range(7 * e, 7 * e + 7)] for e in range(3)]
    assert all(sorted(epoch) == names for epoch in epochs) and len(set(map(tuple, epochs))) > 1
    assert (
        [source.sample(g, 5).key for g in range(7)]
        == epochs[0]
        != [source.sample(g, 6).key for g in range(7)]
    )


def lanczos(line: np.ndarray, n: int) -> np.ndarray:
    """Values [N, ...] along a line -> [n, ...], n < N, by the formula: weights sinc(x) sinc(x / 3) for |x| < 3, where x
    is the distance in pixels of the result; what lies beyond an end has no weight."""
    x = (np.arange(len(line)) + 0.5)[None, :] * n / len(line) - (np.arange(n) + 0.5)[:, None]
    weights = np.where(np.abs(x) < 3, np.sinc(x) * np.sinc(x / 3), 0.0)
    return np.tensordot(weights / weights.sum(1, keepdims=True), line, 1)


def test_pictures_are_made_smaller_by_lanczos():
    """Against the formula, on noise that no overshoot takes out of 0 to 255. Pillow rounds twice, once an axis."""
    picture = np.random.default_rng(0).integers(60, 196, (60, 40, 3)).astype(np.uint8)
    expected = lanczos(lanczos(picture, 24).swapaxes(0, 1), 16).swapaxes(0, 1)
    assert np.abs(data.cover(Image.fromarray(picture), 24, 16) - expected).max() <= 1.5


def test_transparency_lies_over_white_and_crops_are_centred(tmp_path):
    image = Image.new("RGBA", (30, 10), (255, 0, 0, 255))
    image.paste((0, 0, 255, 0), (10, 0, 20, 10))  # the middle third is transparent
    image.save(tmp_path / "x.png")
    metadata(tmp_path, [{"file_name": "x.png", "text": "x"}])
    picture = data.ImageFolder(tmp_path, 10).pictures[0]
    assert (picture[:, 2:8] > 250).all()


def test_cameras_are_held_upright_and_deep_grey_is_refused(tmp_path):
    image = Image.new("RGB", (20, 10), (255, 0, 0))
    image.paste((0, 0, 255), (10, 0, 20, 10))  # red left of blue, to be turned by a quarter: red above blue
    tag = Image.Exif()
    tag[0x0112] = 6
    image.save(tmp_path / "x.png", exif=tag)
    Image.fromarray(np.full((9, 9), 30000, np.uint16)).save(tmp_path / "deep.png")
    source = data.ImageFolder(
        metadata(tmp_path, [{"file_name": n, "text": n} for n in ("x.png", "deep.png")]), 10
    )
    assert source.keys == ["x.png"] and "not of 8 bits" in source.skipped["deep.png"]
    assert (source.pictures[0][:4, :, 0] > 200).all() and (source.pictures[0][6:, :, 2] > 200).all()


def test_broken_pictures_are_skipped_counted_and_named(tmp_path, capsys):
    folder = write_pictures(tmp_path / "f", ["cut.png", "good.png", "well.png"])
    whole = (folder / "cut.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "text.png").write_text("not a picture")
    names = ("good.png", "cut.png", "text.png", "absent.png", "well.png")
    metadata(folder, [{"file_name": n, "text": f"caption of {n}"} for n in names])
    source = data.ImageFolder(folder, 8)
    assert source.keys == ["good.png", "well.png"]
    assert sorted(source.skipped) == ["absent.png", "cut.png", "text.png"]
    error = capsys.readouterr().err
    assert all(name in error for name in source.skipped) and "skipped 3 of 5" in error
    # What is left keeps its own caption
    samples = {s.key: (s.picture[0, 0, 0], s.caption) for s in map(source.sample, range(2))}
    assert samples == {"good.png": (20, "caption of good.png"), "well.png": (40, "caption of well.png")}


@pytest.mark.parametrize(
    "lines, complaint",
    [
        (["{not json"], "line 1"),
        ([{"file_name": "good.png"}], "KeyError"),
        ([{"file_name": "good.png", "text": 3}], "line 1"),
        ([{"file_name": 3, "text": "x"}], "line 1"),
        (["[1, 2]"], "line 1"),
        ([""], "empty"),
        ([{"file_name": "absent.png", "text": "x"}], "none of its 1 pictures"),
    ],
)
def test_unusable_metadata_is_one_clear_error(tmp_path, lines, complaint):
    folder = metadata(write_pictures(tmp_path / "f", ["good.png"]), lines)
    with pytest.raises(data.DataError, match=complaint):
        data.ImageFolder(folder, 8)


def test_decompression_bombs_are_refused_before_decoding(tmp_path, monkeypatch):
    for name, side in (("a", 9), ("b", 8)):
        Image.new("RGB", (side, 8)).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text("a picture")
    monkeypatch.setattr(data, "MAX_PIXELS", 64)
    folder = data.ImageFolder(tmp_path, 8)
    assert folder.keys == ["b.png"] and "67 million" in folder.skipped["a.png"]


def test_captions_are_utf8_with_or_without_a_mark(tmp_path):
    folder = write_pictures(tmp_path / "f", ["a.png", "b.png"])
    for name, mark in (("a", b""), ("b", b"\xef\xbb\xbf")):
        (folder / f"{name}.txt").write_bytes(mark + "café".encode())
    assert data.ImageFolder(folder, 8).captions == ["café", "café"]
    (folder / "b.txt").write_bytes("café".encode("latin-1"))
    with pytest.raises(data.DataError, match="b.txt is not UTF-8"):
        data.ImageFolder(folder, 8)


def test_missing_folder_or_captions(tmp_path):
    with pytest.raises(data.DataError, match="no such folder"):
        data.ImageFolder(tmp_path / "absent", 8)
    with pytest.raises(data.DataError, match="metadata.jsonl"):
        data.ImageFolder(write_pictures(tmp_path / "f", ["a.png"]), 8)
