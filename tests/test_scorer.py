"""The scorer against renderings whose content is known: true ones, and ones with a single fault."""

import dataclasses

import numpy as np
import pytest

import data
from data import Object, Scene
from experiments import scorer
from rng import rng

SIZES = (24, 28, 32, 40, 48, 64)
# Diameters, by the number of objects
LARGEST = {1: (14.0, 22.0), 2: (10.0, 14.0), 3: (8.5, 11.0), 4: (8.0, 10.5)}
slow = pytest.mark.slow


def anywhere(random, scene, size):
    """The scene with larger objects anywhere in the picture: a model need not keep to data.LAYOUTS."""
    unit, (low, high) = size / 32, LARGEST[len(scene.objects)]
    relation = next((item["position"][0] for item in scene.metadata["include"] if "position" in item), "")
    while True:
        placed = []
        for o in scene.objects:
            d = random.uniform(low, high) * unit
            x, y = random.uniform(d / 2 + 1.5 * unit, size - d / 2 - 1.5 * unit, size=2)
            if all(max(abs(x - p.x), abs(y - p.y)) > (d + p.diameter) / 2 + 1.5 * unit for p in placed):
                placed.append(dataclasses.replace(o, x=x, y=y, diameter=d))
        if len(placed) == len(scene.objects):
            if not relation or data.stands(relation, *placed):
                return dataclasses.replace(scene, objects=tuple(placed))


def scenes(size, n, purpose="scenes", tags=data.TAGS):
    """n scenes, every tag in turn, that no training run draws: as data.py places them, and anywhere."""
    for i in range(n):
        random = rng(2, purpose, size, i)
        scene = data.draw_scene(random, size, tags[i % len(tags)], data.SETS["shapes"])
        yield anywhere(random, scene, size) if i // len(tags) % 2 else scene


def picture_of(*objects, ground=120, size=32):
    return data.render(Scene(tuple(Object(*o) for o in objects), ground, {}), size)


def mean_of(*pictures):
    return np.mean([picture.astype(float) for picture in pictures], axis=0).round().astype(np.uint8)


# --- True renderings ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("grain", [0, 6])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("n", [36, pytest.param(2000, marks=slow)])
def test_true_renderings_are_accepted(size, n, grain):
    wrong = []
    for i, scene in enumerate(scenes(size, n)):
        noise = rng(3, "grain", i).normal(0, grain, (size, size, 3))
        picture = np.clip(data.render(scene, size) + noise, 0, 255).round().astype(np.uint8)
        objects, why = scorer.judge(picture, scene.metadata)
        if not objects:
            wrong.append((scene.metadata["prompt"], why))
    assert len(wrong) <= (0.01 if grain else 0.001) * n, wrong


def test_single_shapes_of_sixteen_pixels_are_judged_too():
    """True renderings pass; with another shape or another colour they do not."""
    for scene in scenes(16, 100, "small", data.SETS["one-shape"].tags):
        item, truth = scene.objects[0], scene.metadata
        wrong = [changed(scene, shape=shape) for shape in data.SHAPES if shape != item.shape]
        if "color" in truth["include"][0]:
            wrong += [changed(scene, color=color) for color in data.COLORS if color != item.color]
        assert scorer.score(data.render(scene, 16), truth), truth["prompt"]
        assert not any(scorer.score(data.render(other, 16), truth) for other in wrong)


@pytest.mark.parametrize("size", [24, 32, 64])
def test_objects_are_found_where_they_are(size):
    for scene in scenes(size, 24, "places"):
        found, _ = scorer.explain(data.render(scene, size))
        assert len(found) == len(scene.objects)
        for true in scene.objects:
            near = min(found, key=lambda o: abs(o.x - true.x) + abs(o.y - true.y))
            assert (near.shape, near.color) == (true.shape, true.color)
            measured, expected = ((o.x, o.y, o.diameter) for o in (near, true))
            assert np.allclose(measured, expected, atol=0.5 * size / 32)


# ------------------------------------------------------------------------------------------------------------
# Near misses: one fault each, made from a scene whose true rendering is accepted. A fault gives a scene or several, whose
# mean is the picture; a picture; or None where a scene has no room for it.
# ------------------------------------------------------------------------------------------------------------
def changed(scene, i=0, **fields):
    objects = list(scene.objects)
    objects[i] = dataclasses.replace(objects[i], **fields)
    return dataclasses.replace(scene, objects=tuple(objects))


def with_objects(scene, *objects):
    return dataclasses.replace(scene, objects=objects)


def other(random, names, but):
    return str(random.choice([n for n in names if n not in but]))


def wrong_color(scene, size, random):
    named = {item["class"] for item in scene.metadata["include"] if "color" in item}
    found = [i for i, o in enumerate(scene.objects) if o.shape in named]
    if found:
        return changed(scene, found[0], color=other(random, data.COLORS, {scene.objects[found[0]].color}))


def wrong_shape(scene, size, random):
    return changed(scene, shape=other(random, data.SHAPES, {o.shape for o in scene.objects}))


def swapped(scene, size, random):
    """The colours of two objects, or what stands left and right."""
    names = {"color_attr": ["color"], "position": ["color", "shape"]}.get(scene.metadata["tag"])
    if names:
        of_a, of_b = ({name: getattr(o, name) for name in names} for o in scene.objects)
        return changed(changed(scene, 0, **of_b), 1, **of_a)


def missing(scene, size, random):
    return with_objects(scene, *scene.objects[1:])


def additional(scene, size, random):
    """One more, of a kind that is there already, where there is room."""
    kind, unit = scene.objects[int(random.integers(len(scene.objects)))], size / 32
    for _ in range(200):
        d = random.uniform(8, 10) * unit
        x, y = random.uniform(d / 2 + unit, size - d / 2 - unit, size=2)
        if all(max(abs(x - o.x), abs(y - o.y)) > (d + o.diameter) / 2 + unit for o in scene.objects):
            return with_objects(scene, *scene.objects, Object(kind.shape, kind.color, x, y, d))


def faded(scene, size, random):
    """An object at half its coverage."""
    return scene, missing(scene, size, random)


def ghost(scene, size, random):
    """One more object, at half its coverage."""
    more = additional(scene, size, random)
    return more and (scene, more)


def merged(scene, size, random):
    """An object drawn twice, the second 0.55 to 0.7 of its diameter away."""
    o = scene.objects[0]
    angle, far = random.uniform(0, 2 * np.pi), random.uniform(0.55, 0.7) * o.diameter
    again = dataclasses.replace(o, x=o.x + far * np.cos(angle), y=o.y + far * np.sin(angle))
    return with_objects(scene, *scene.objects, again)


def over_the_border(scene, size, random):
    """An object moved over the border, by a third of its diameter."""
    inside = 0.17 * scene.objects[0].diameter
    return changed(scene, x=random.choice([inside, size - inside]))


def sliced(scene, size, random):
    """The ground painted over a third of an object's diameter, from a random side.

    From the left or right of a triangle: below a slice off the base there is a smaller triangle.
    """
    o, picture = scene.objects[0], data.render(scene, size).copy()
    x, y = np.meshgrid(np.arange(size) + 0.5 - o.x, np.arange(size) + 0.5 - o.y)
    side = (x, -x, y, -y)[int(random.integers(2 if o.shape == "triangle" else 4))]
    picture[(side > o.diameter / 6) & (np.hypot(x, y) < 0.65 * o.diameter)] = scene.ground
    return picture


def softened(scene, size, random):
    """The mean of eight pictures that differ in the sizes of their objects only: edges fade, centres stay.

    Not of objects under 8 pixels, whose sizes differ by too little: 2 of 600 such pictures passed at 24 pixels a side.
    """
    if min(o.diameter for o in scene.objects) >= 8:
        grow = lambda o, by: dataclasses.replace(o, diameter=by * o.diameter)  # noqa: E731
        sizes = np.linspace(0.6, 1.4, 8)
        return tuple(with_objects(scene, *(grow(o, by) for o in scene.objects)) for by in sizes)


def off_palette(scene, size, random):
    """A colour half-way between two of the palette, and not near a third (red and blue do make a purple)."""
    o, palette = scene.objects[0], np.array(list(data.COLORS.values()))
    for second in random.permutation(list(data.COLORS)):
        middle = (np.array(data.COLORS[o.color]) + data.COLORS[second]) / 2
        if np.linalg.norm(palette - middle, axis=1).min() > 60 and np.ptp(middle) > 60:
            return scene, changed(scene, color=str(second))


def picture_with(fault, scene, size, random):
    made = fault(scene, size, random)
    if made is None or isinstance(made, np.ndarray):
        return made
    return mean_of(*(data.render(one, size) for one in (made if isinstance(made, tuple) else (made,))))


FAULTS = (wrong_color, wrong_shape, swapped, missing, additional, faded, ghost, merged)
FAULTS += (over_the_border, sliced, softened, off_palette)
AMOUNTS = [(32, 48), *(pytest.param(size, 600, marks=slow) for size in (24, 32, 64))]


@pytest.mark.parametrize("size, n", AMOUNTS)
@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.__name__)
def test_near_misses_are_rejected(fault, size, n):
    made, wrong = 0, []
    for i, scene in enumerate(scenes(size, n, fault.__name__)):
        picture = picture_with(fault, scene, size, rng(4, fault.__name__, i))
        if picture is not None:
            made += 1
            wrong += [(i, scene.metadata["prompt"])] * scorer.score(picture, scene.metadata)
    assert made >= n // 6 and not wrong, wrong


# The last two are limits that scorer.py and results/README.md name: small shapes differ in size by two or three
# pixels, and their means are hardly soft.
MEANS = [(16, "single_object", 0), (24, "single_object", 0), (24, "two_object", 0), (24, "counting", 0)]
MEANS += [(24, "position", 0), (32, "colors", 0), (64, "colors", 0), (16, "colors", 0.6), (24, "colors", 0.2)]


@pytest.mark.parametrize("size, tag, most", MEANS)
def test_the_mean_of_eight_pictures_of_a_prompt_is_rejected(size, tag, most):
    random, by_prompt = rng(5, "means", size), {}
    for _ in range(4000 if tag == "position" else 600):
        scene = data.draw_scene(random, size, tag, data.SETS["shapes"])
        by_prompt.setdefault(scene.metadata["prompt"], []).append(scene)
    asked = [same[:8] for same in by_prompt.values() if len(same) >= 8]
    means = [mean_of(*(data.render(scene, size) for scene in same)) for same in asked]
    passed = [scorer.score(mean, same[0].metadata) for mean, same in zip(means, asked)]
    assert len(asked) >= 5 and np.mean(passed) <= most


# --- Metadata is judged by its fields -----------------------------------------------------------------------
def item(shape, count=1, **fields):
    return {"class": shape, "count": count} | fields


MIXED = [
    ([item("circle", 2, color="red"), item("square")], [], True),
    ([item("square", color="blue"), item("circle", 2, position=["left of", 0])], [], True),
    ([item("square", color="blue"), item("circle", 2, position=["right of", 0])], [], False),
    ([item("square"), item("circle", 2, position=["above", 0])], [], False),
    ([item("circle"), item("circle", position=["below", 0]), item("square")], [], True),
    ([item("circle", 2)], [], False),
    ([item("circle"), item("square")], [], False),
    ([item("circle", 2, color="pink"), item("square")], [], False),
    ([item("circle", 2), item("square")], [item("circle", 3)], True),
    ([item("circle", 2), item("square")], [item("circle", color="red")], False),
]


@pytest.mark.parametrize("include, exclude, right", MIXED)
def test_mixed_prompts_are_judged_by_include_and_exclude(include, exclude, right):
    """Two red circles, one above the other, left of a blue square."""
    circles = ("circle", "red", 6, 7, 9), ("circle", "red", 6, 24, 9)
    picture = picture_of(*circles, ("square", "blue", 24, 16, 10))
    objects, why = scorer.judge(picture, {"include": include, "exclude": exclude})
    assert len(objects) == (3 if right else 0), why


@pytest.mark.parametrize("relation", data.RELATIONS)
@pytest.mark.parametrize("dx, dy", [(14, -2), (2, -14), (-13, -13), (13, 13), (-13, 4), (5, 13)])
def test_a_relation_holds_only_along_its_axis(relation, dx, dy):
    ring = ("ring", "red", 16 + dx / 2, 16 + dy / 2, 9)
    cross = ("cross", "blue", 16 - dx / 2, 16 - dy / 2, 9)
    metadata = data.prompt_metadata("position", ["ring", "cross"], [None, None], relation=relation)
    distance = {"left of": -dx, "right of": dx, "above": -dy, "below": dy}[relation]
    assert scorer.score(picture_of(ring, cross), metadata) == (distance > 9)


def circle(diameter=12):
    return picture_of(("circle", "red", 16, 16, diameter)).astype(int)


PLAIN, ROW, COLUMN = circle(), np.arange(32)[:, None, None], np.arange(32)[None, :, None]
GROUND = (PLAIN == 120).all(2, keepdims=True)
SPOT = (abs(ROW - 16) < 2) & (abs(COLUMN - 16) < 2)
DIAGONAL = ROW + COLUMN
SPECIMENS = {
    "as in training": (PLAIN, "shows red circle"),
    "too small": (circle(4.5), "pixels wide"),
    "too large": (circle(24.5), "pixels wide"),
    "empty": (picture_of(), "shows nothing"),
    "blue ground": (np.where(GROUND, [120, 120, 160], PLAIN), "not grey"),
    "light ground": (np.where(GROUND, [220, 220, 220], PLAIN), "not grey"),
    "pattern": (PLAIN + 50 * (DIAGONAL % 3 - 1), "too little ground"),
    "checkers": (PLAIN * 0 + 60 + 120 * (DIAGONAL % 2), "too little ground"),
    "band": (np.where(ROW < 3, PLAIN + 40, PLAIN), "unexplained on the ground"),
    "pale spot": (np.where(SPOT, (PLAIN + 120) // 2, PLAIN), "unexplained within"),
}


@pytest.mark.parametrize("name", SPECIMENS)
def test_one_circle_on_plain_ground(name):
    picture, why = SPECIMENS[name]
    picture = picture.clip(0, 255).astype(np.uint8)
    objects, reason = scorer.judge(picture, {"include": [item("circle")]})
    assert why in reason and bool(objects) == (why == "shows red circle")


@pytest.mark.parametrize("size", [24, 32])
def test_a_thin_ring_of_another_colour_is_no_object(size):
    """Orange, nearest to yellow; a ring this thin has no pixel further than one from its outline."""
    ring = picture_of(("ring", "yellow", size / 2, size / 2, size / 4), size=size).astype(float)
    share = (120 - ring[..., 2]) / (120 - 40)
    orange = 120 + share[..., None] * (np.array([255, 150, 30]) - 120)
    metadata = {"include": [item("ring")]}
    assert scorer.score(ring.astype(np.uint8), metadata)
    assert not scorer.score(orange.round().astype(np.uint8), metadata)


@pytest.mark.parametrize("apart, right", [(11.5, True), (10.0, False)])
def test_two_whole_circles_must_not_share_ground(apart, right):
    """So little of one is hidden that it still is a circle; both are 11 wide."""
    metadata = data.prompt_metadata("color_attr", ["circle"] * 2, ["red", "blue"])
    picture = picture_of(("circle", "red", 11.0, 16.0, 11.0), ("circle", "blue", 11.0 + apart, 16.0, 11.0))
    assert scorer.score(picture, metadata) == right
