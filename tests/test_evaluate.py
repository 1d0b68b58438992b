"""evaluate.py judged against renderings whose content is known, true ones and ones with a single fault."""

import dataclasses

import numpy as np
import pytest
from PIL import Image, ImageFilter

import data
import evaluate
from data import Object, Scene
from randomness import rng

SIZES = (24, 28, 32, 40, 48, 64)


def scenes(size, n, purpose="scenes", tags=data.TAGS):
    """n scenes of data.py, every tag in turn, that no training run draws."""
    for i in range(n):
        yield i, data.draw_scene(rng(2, purpose, size, i), size, tags[i % len(tags)])


def worn(picture, random, grain=6.0, blur=True):
    """The picture under a box blur half a pixel wide to each side, and grain."""
    if blur:
        picture = np.asarray(Image.fromarray(picture).filter(ImageFilter.BoxBlur(0.5)))
    return np.clip(picture + random.normal(0, grain, picture.shape), 0, 255).round().astype(np.uint8)


def accepted(size, n, alter=lambda picture, random: picture):
    wrong = []
    for i, scene in scenes(size, n):
        ok, why = evaluate.judge(alter(data.render(scene, size), rng(3, "alter", i)), scene.metadata)
        if not ok:
            wrong.append((scene.metadata["prompt"], why))
    return 1 - len(wrong) / n, wrong


# ---------------------------------------------------------------------------------------------------------------------
# True renderings
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("size", SIZES)
def test_true_renderings_are_accepted(size):
    share, wrong = accepted(size, 120 if size == 32 else 36)
    assert share == 1, wrong


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_thousands_of_true_renderings_are_accepted(size):
    share, wrong = accepted(size, 3000)
    assert share >= 0.999, wrong


@pytest.mark.parametrize("grain, blur", [(6.0, False), (0.0, True)])
def test_grain_and_slight_blur_are_tolerated(grain, blur):
    share, wrong = accepted(32, 120, lambda picture, random: worn(picture, random, grain, blur))
    assert share >= 0.99, wrong


@pytest.mark.slow
@pytest.mark.parametrize("size", [32, 40, 48, 64])
def test_grain_and_slight_blur_are_tolerated_thousands_of_times(size):
    share, wrong = accepted(size, 2000, worn)
    assert share >= 0.99, wrong


@pytest.mark.parametrize("size", [24, 32, 64])
def test_objects_are_found_where_they_are(size):
    for _, scene in scenes(size, 24, "places"):
        found = evaluate.find_objects(data.render(scene, size))
        assert len(found) == len(scene.objects)
        for true in scene.objects:
            near = min(found, key=lambda o: abs(o.x - true.x) + abs(o.y - true.y))
            assert (near.shape, near.color) == (true.shape, true.color)
            measured, expected = ((o.x, o.y, o.diameter) for o in (near, true))
            assert np.allclose(measured, expected, atol=0.5 * size / 32)


def test_pictures_of_another_kind_are_refused():
    for picture in (np.zeros((32, 32, 3)), np.zeros((32, 40, 3), np.uint8), np.zeros((128, 128, 3), np.uint8)):
        with pytest.raises(ValueError, match="picture"):
            evaluate.explain(picture)


# ---------------------------------------------------------------------------------------------------------------------
# Near misses: one fault each, made from a scene whose true rendering is accepted
# ---------------------------------------------------------------------------------------------------------------------
def changed(scene, i=0, **fields):
    objects = list(scene.objects)
    objects[i] = dataclasses.replace(objects[i], **fields)
    return dataclasses.replace(scene, objects=tuple(objects))


def other(random, names, but):
    return str(random.choice([n for n in names if n not in but]))


def mean_of(a, b):
    return ((a.astype(float) + b) / 2).round().astype(np.uint8)


def wrong_color(scene, size, random):
    if not any("color" in item for item in scene.metadata["include"]):
        return None
    i = next(i for i, o in enumerate(scene.objects)
             if any(item["class"] == o.shape and "color" in item for item in scene.metadata["include"]))  # fmt: skip
    return data.render(changed(scene, i, color=other(random, data.COLORS, {scene.objects[i].color})), size)


def wrong_shape(scene, size, random):
    shapes = {o.shape for o in scene.objects}
    return data.render(changed(scene, shape=other(random, data.SHAPES, shapes)), size)


def swapped_colors(scene, size, random):
    if scene.metadata["tag"] != "color_attr":
        return None
    a, b = scene.objects
    return data.render(changed(changed(scene, 0, color=b.color), 1, color=a.color), size)


def swapped_relation(scene, size, random):
    if scene.metadata["tag"] != "position":
        return None
    a, b = scene.objects
    return data.render(changed(changed(scene, 0, shape=b.shape, color=b.color), 1, shape=a.shape, color=a.color), size)


def missing(scene, size, random):
    return data.render(dataclasses.replace(scene, objects=scene.objects[1:]), size)


def additional(scene, size, random):
    """One more, of a kind that is there already, where there is room."""
    kind = scene.objects[int(random.integers(len(scene.objects)))]
    unit = size / 32
    for _ in range(200):
        d = random.uniform(8, 10) * unit
        x, y = random.uniform(d / 2 + unit, size - d / 2 - unit, size=2)
        if all(max(abs(x - o.x), abs(y - o.y)) > (d + o.diameter) / 2 + unit for o in scene.objects):
            more = Object(kind.shape, kind.color, x, y, d)
            return data.render(dataclasses.replace(scene, objects=(*scene.objects, more)), size)
    return None


def faded(scene, size, random):
    """An object at half its coverage."""
    without = data.render(dataclasses.replace(scene, objects=scene.objects[1:]), size)
    return ((data.render(scene, size) + without) / 2).round().astype(np.uint8)


def ghost(scene, size, random):
    """One more object, at half its coverage."""
    more = additional(scene, size, random)
    return None if more is None else mean_of(data.render(scene, size), more)


def merged(scene, size, random):
    """An object drawn twice, overlapping by a third to a half."""
    o = scene.objects[0]
    angle, far = random.uniform(0, 2 * np.pi), random.uniform(0.5, 0.65) * o.diameter
    again = dataclasses.replace(o, x=o.x + far * np.cos(angle), y=o.y + far * np.sin(angle))
    return data.render(dataclasses.replace(scene, objects=(*scene.objects, again)), size)


def overlapping(scene, size, random):
    """The second object over the first, hiding a fifth to a half of it."""
    if len(scene.objects) != 2:
        return None
    a, b = scene.objects
    for _ in range(200):
        angle, far = random.uniform(0, np.pi), random.uniform(0.2, 0.5) * (a.diameter + b.diameter)
        if a.shape == "triangle":
            angle = np.pi * random.integers(2)  # from the side: hiding the base leaves a smaller triangle
        over = changed(scene, 1, x=a.x + far * np.cos(angle), y=a.y + far * np.sin(angle))
        of_a, of_b = (data.coverage(o, size) for o in over.objects)
        if 0.2 < np.minimum(of_a, of_b).sum() / of_a.sum() < 0.5:
            return data.render(over, size)
    return None


def over_the_border(scene, size, random):
    """An object moved over the border, by a third of its diameter."""
    o = scene.objects[0]
    at = random.choice([-1, 1])
    inside = (0.17 * o.diameter) if at < 0 else size - 0.17 * o.diameter
    return data.render(changed(dataclasses.replace(scene, objects=(o,) + scene.objects[1:]), x=inside), size)


def sliced(scene, size, random):
    """The ground painted over a third of an object's diameter, from a random side.

    From the left or right of a triangle: below a slice off the base there is a smaller triangle.
    """
    o = scene.objects[0]
    picture = data.render(scene, size).copy()
    centre = np.arange(size) + 0.5
    x, y = np.meshgrid(centre - o.x, centre - o.y)
    side = (x, -x, y, -y)[int(random.integers(2 if o.shape == "triangle" else 4))]
    r = o.diameter / 2
    picture[(side > r / 3) & (np.hypot(x, y) < 1.3 * r)] = scene.ground
    return picture


def averaged(scene, size, random):
    """The average with a picture of other objects elsewhere: what a posterior mean looks like."""
    while True:
        second = data.draw_scene(random, size, scene.metadata["tag"])
        far = max(abs(a.x - b.x) + abs(a.y - b.y) for a, b in zip(scene.objects, second.objects))
        if far > size / 4:
            return mean_of(data.render(scene, size), data.render(second, size))


def smeared(scene, size, random):
    """A blur over a shape's radius."""
    return np.asarray(Image.fromarray(data.render(scene, size)).filter(ImageFilter.GaussianBlur(3 * size / 32)))


def off_palette(scene, size, random):
    """A colour half-way between two of the palette."""
    o = scene.objects[0]
    second = other(random, data.COLORS, {o.color, "black", "white"} if o.color not in ("black", "white") else {o.color})
    return mean_of(data.render(scene, size), data.render(changed(scene, color=second), size))


FAULTS = [wrong_color, wrong_shape, swapped_colors, swapped_relation, missing, additional, faded, ghost, merged,
          overlapping, over_the_border, sliced, averaged, smeared, off_palette]  # fmt: skip


def fooled(fault, size, n):
    """(how many near misses were made, those that were accepted)."""
    made, wrong = 0, []
    for i, scene in scenes(size, n, fault.__name__):
        picture = fault(scene, size, rng(4, fault.__name__, i))
        if picture is not None:
            made += 1
            if evaluate.score(picture, scene.metadata):
                wrong.append((i, scene.metadata["prompt"], evaluate.explain(picture).objects))
    return made, wrong


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.__name__)
def test_near_misses_are_rejected(fault):
    made, wrong = fooled(fault, 32, 48)
    assert made >= 8 and not wrong, wrong


@pytest.mark.slow
@pytest.mark.parametrize("size", [24, 32, 64])
@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.__name__)
def test_hundreds_of_near_misses_are_rejected(fault, size):
    made, wrong = fooled(fault, size, 600)
    assert made >= 100 and not wrong, wrong
