"""The scorer against renderings whose content is known: true ones, and ones with a single fault."""

import dataclasses

import numpy as np
import pytest
from PIL import Image, ImageFilter

import data
from data import Object, Scene
from experiments import scorer
from rng import rng

SIZES = (24, 28, 32, 40, 48, 64)
LARGEST = {
    1: (14.0, 22.0),
    2: (10.0, 14.0),
    3: (8.5, 11.0),
    4: (8.0, 10.5),
}  # diameters, by the number of objects
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
            if not relation or data.holds(relation, *((o.x, o.y, o.diameter) for o in placed)):
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


# ------------------------------------------------------------------------------------------------------------
# True renderings
# ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("grain", [0, 6])
@pytest.mark.parametrize(
    "size, n", [(s, 36) for s in SIZES] + [pytest.param(s, 2000, marks=slow) for s in SIZES]
)
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
    """True renderings pass; with another shape, another colour or only half of the shape they do not."""
    for scene in scenes(16, 100, "small", data.SETS["one-shape"].tags):
        item, truth = scene.objects[0], scene.metadata
        assert scorer.score(data.render(scene, 16), truth), truth["prompt"]
        wrong = [changed(scene, shape=shape) for shape in data.SHAPES if shape != item.shape]
        if "color" in truth["include"][0]:
            wrong += [changed(scene, color=color) for color in data.COLORS if color != item.color]
        assert not any(scorer.score(data.render(other, 16), truth) for other in wrong)
        half = data.render(scene, 16).copy()
        half[:, int(item.x) :] = scene.ground
        assert not scorer.score(half, truth)


@pytest.mark.parametrize("size", [24, 32, 64])
def test_objects_are_found_where_they_are(size):
    for scene in scenes(size, 24, "places"):
        found = scorer.explain(data.render(scene, size)).objects
        assert len(found) == len(scene.objects)
        for true in scene.objects:
            near = min(found, key=lambda o: abs(o.x - true.x) + abs(o.y - true.y))
            assert (near.shape, near.color) == (true.shape, true.color)
            measured, expected = ((o.x, o.y, o.diameter) for o in (near, true))
            assert np.allclose(measured, expected, atol=0.5 * size / 32)


@pytest.mark.parametrize(
    "shape, kind", [((32, 32, 3), float), ((32, 40, 3), np.uint8), ((128, 128, 3), np.uint8)]
)
def test_pictures_of_another_kind_are_refused(shape, kind):
    with pytest.raises(ValueError, match="picture"):
        scorer.explain(np.zeros(shape, kind))


# ------------------------------------------------------------------------------------------------------------
# Near misses: one fault each, made from a scene whose true rendering is accepted; None where a scene has no room for it
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
    told = {item["class"] for item in scene.metadata["include"] if "color" in item}
    found = [i for i, o in enumerate(scene.objects) if o.shape in told]
    if found:
        color = other(random, data.COLORS, {scene.objects[found[0]].color})
        return data.render(changed(scene, found[0], color=color), size)


def wrong_shape(scene, size, random):
    shape = other(random, data.SHAPES, {o.shape for o in scene.objects})
    return data.render(changed(scene, shape=shape), size)


def swapped(scene, size, random):
    """The colours of two objects, or what stands left and right."""
    if scene.metadata["tag"] in ("color_attr", "position"):
        a, b = scene.objects
        fields = ("color",) if scene.metadata["tag"] == "color_attr" else ("color", "shape")
        of_a, of_b = ({name: getattr(o, name) for name in fields} for o in (a, b))
        return data.render(
            with_objects(scene, dataclasses.replace(a, **of_b), dataclasses.replace(b, **of_a)), size
        )


def missing(scene, size, random):
    return data.render(with_objects(scene, *scene.objects[1:]), size)


def additional(scene, size, random):
    """One more, of a kind that is there already, where there is room."""
    kind, unit = scene.objects[int(random.integers(len(scene.objects)))], size / 32
    for _ in range(200):
        d = random.uniform(8, 10) * unit
        x, y = random.uniform(d / 2 + unit, size - d / 2 - unit, size=2)
        if all(max(abs(x - o.x), abs(y - o.y)) > (d + o.diameter) / 2 + unit for o in scene.objects):
            return data.render(
                with_objects(scene, *scene.objects, Object(kind.shape, kind.color, x, y, d)), size
            )


def faded(scene, size, random):
    """An object at half its coverage."""
    return mean_of(data.render(scene, size), missing(scene, size, random))


def ghost(scene, size, random):
    """One more object, at half its coverage."""
    more = additional(scene, size, random)
    return None if more is None else mean_of(data.render(scene, size), more)


def merged(scene, size, random):
    """An object drawn twice, the second 0.55 to 0.7 of its diameter away."""
    o = scene.objects[0]
    angle, far = random.uniform(0, 2 * np.pi), random.uniform(0.55, 0.7) * o.diameter
    again = dataclasses.replace(o, x=o.x + far * np.cos(angle), y=o.y + far * np.sin(angle))
    return data.render(with_objects(scene, *scene.objects, again), size)


def overlapping(scene, size, random):
    """The second object over the first, hiding a seventh to a half of it."""
    if len(scene.objects) != 2:
        return None
    a, b = scene.objects
    for _ in range(200):
        angle, far = random.uniform(0, np.pi), random.uniform(0.2, 0.5) * (a.diameter + b.diameter)
        if a.shape == "triangle":
            angle = np.pi * random.integers(2)  # from the side: hiding the base leaves a smaller triangle
        over = changed(scene, 1, x=a.x + far * np.cos(angle), y=a.y + far * np.sin(angle))
        of_a, of_b = (data.coverage(o, size) for o in over.objects)
        if 0.15 < np.minimum(of_a, of_b).sum() / of_a.sum() < 0.5:
            return data.render(over, size)


def over_the_border(scene, size, random):
    """An object moved over the border, by a third of its diameter."""
    inside = 0.17 * scene.objects[0].diameter
    return data.render(changed(scene, x=random.choice([inside, size - inside])), size)


def sliced(scene, size, random):
    """The ground painted over a third of an object's diameter, from a random side.

    From the left or right of a triangle: below a slice off the base there is a smaller triangle.
    """
    o, picture = scene.objects[0], data.render(scene, size).copy()
    x, y = np.meshgrid(np.arange(size) + 0.5 - o.x, np.arange(size) + 0.5 - o.y)
    side = (x, -x, y, -y)[int(random.integers(2 if o.shape == "triangle" else 4))]
    picture[(side > o.diameter / 6) & (np.hypot(x, y) < 0.65 * o.diameter)] = scene.ground
    return picture


def averaged(scene, size, random):
    """The average with a picture of other objects elsewhere: what a posterior mean looks like."""
    while True:
        drawn = data.draw_scene(random, size, scene.metadata["tag"], data.SETS["shapes"])
        second = anywhere(random, drawn, size)
        if max(abs(a.x - b.x) + abs(a.y - b.y) for a, b in zip(scene.objects, second.objects)) > size / 8:
            return mean_of(data.render(scene, size), data.render(second, size))


def smeared(scene, size, random):
    """A blur over a shape's radius."""
    blur = ImageFilter.GaussianBlur(3 * size / 32)
    return np.asarray(Image.fromarray(data.render(scene, size)).filter(blur))


def softened(scene, size, random):
    """The mean of eight pictures that differ in the sizes of their objects only: edges fade, centres stay.

    Not of objects under 8 pixels, whose sizes differ by too little: 2 of 600 such pictures passed at 24 pixels a side.
    """
    if min(o.diameter for o in scene.objects) >= 8:
        sizes = [
            [dataclasses.replace(o, diameter=factor * o.diameter) for o in scene.objects]
            for factor in np.linspace(0.6, 1.4, 8)
        ]
        return mean_of(*(data.render(with_objects(scene, *objects), size) for objects in sizes))


def off_palette(scene, size, random):
    """A colour half-way between two of the palette, and not near a third (red and blue do make a purple)."""
    o, palette = scene.objects[0], np.array(list(data.COLORS.values()))
    for second in random.permutation(list(data.COLORS)):
        middle = (np.array(data.COLORS[o.color]) + data.COLORS[second]) / 2
        if np.linalg.norm(palette - middle, axis=1).min() > 60 and np.ptp(middle) > 60:
            return mean_of(data.render(scene, size), data.render(changed(scene, color=str(second)), size))


FAULTS = (wrong_color, wrong_shape, swapped, missing, additional, faded, ghost, merged, overlapping)
FAULTS += (over_the_border, sliced, averaged, smeared, softened, off_palette)


@pytest.mark.parametrize(
    "size, n", [(32, 48), *(pytest.param(size, 600, marks=slow) for size in (24, 32, 64))]
)
@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.__name__)
def test_near_misses_are_rejected(fault, size, n):
    made, wrong = 0, []
    for i, scene in enumerate(scenes(size, n, fault.__name__)):
        picture = fault(scene, size, rng(4, fault.__name__, i))
        if picture is not None:
            made += 1
            wrong += [(i, scene.metadata["prompt"])] * scorer.score(picture, scene.metadata)
    assert made >= n // 6 and not wrong, wrong


# The limits that scorer.py and results/README.md name: small shapes differ in size by two or three pixels, and their means are hardly soft.
@pytest.mark.parametrize(
    "size, tag, most",
    [(16, "single_object", 0), (24, "single_object", 0), (24, "two_object", 0), (24, "counting", 0)]
    + [(24, "position", 0), (32, "colors", 0), (64, "colors", 0), (16, "colors", 0.6), (24, "colors", 0.2)],
)
def test_the_mean_of_eight_pictures_of_a_prompt_is_rejected(size, tag, most):
    random, by_prompt = rng(5, "means", size), {}
    for _ in range(4000 if tag == "position" else 600):
        scene = data.draw_scene(random, size, tag, data.SETS["shapes"])
        by_prompt.setdefault(scene.metadata["prompt"], []).append(scene)
    asked = [same[:8] for same in by_prompt.values() if len(same) >= 8]
    passed = [
        scorer.score(mean_of(*(data.render(s, size) for s in same)), same[0].metadata) for same in asked
    ]
    assert len(asked) >= 5 and np.mean(passed) <= most


@pytest.mark.parametrize("wide", [1.0, 2.0, 4.0])
@pytest.mark.parametrize("shape", data.SHAPES)
def test_softness_is_how_much_wider_an_outline_is_than_a_pixel(shape, wide):
    """Coverage that falls linearly over `wide` pixels; a rendering's falls over one. GRAIN cuts a share off both ends."""
    pixel, measured = np.arange(64) + 0.5, []
    for x, y in rng(7, "softness").uniform(31.5, 32.5, (100, 2)):
        distance = data.signed_distance(shape, pixel[None] - x, pixel[:, None] - y, 21.0)
        measured.append(scorer.softness(np.clip(0.5 - distance / wide, 0.0, 1.0), shape, x, y, 21.0))
    assert np.mean(measured) == pytest.approx((1 - 2 * scorer.GRAIN) * (wide - 1), abs=0.12)


# ------------------------------------------------------------------------------------------------------------
# Metadata is judged by its fields
# ------------------------------------------------------------------------------------------------------------
def item(shape, count=1, **fields):
    return {"class": shape, "count": count} | fields


@pytest.mark.parametrize(
    "include, exclude, right",
    [
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
    ],
)
def test_mixed_prompts_are_judged_by_include_and_exclude(include, exclude, right):
    """Two red circles, one above the other, left of a blue square."""
    picture = picture_of(
        ("circle", "red", 6, 7, 9), ("circle", "red", 6, 24, 9), ("square", "blue", 24, 16, 10)
    )
    objects, why = scorer.judge(picture, {"include": include, "exclude": exclude})
    assert len(objects) == (3 if right else 0), why


@pytest.mark.parametrize("relation", data.RELATIONS)
@pytest.mark.parametrize(
    "dx, dy", [(-14, 2), (14, -2), (2, -14), (-2, 14), (-13, -13), (13, 13), (-13, 4), (5, 13)]
)
def test_a_relation_holds_only_along_its_axis(relation, dx, dy):
    ring = ("ring", "red", 16 + dx / 2, 16 + dy / 2, 9)
    cross = ("cross", "blue", 16 - dx / 2, 16 - dy / 2, 9)
    metadata = data.prompt_metadata("position", ["ring", "cross"], [None, None], relation=relation)
    distance = {"left of": -dx, "right of": dx, "above": -dy, "below": dy}[relation]
    assert scorer.score(picture_of(ring, cross), metadata) == (distance > 9)


CIRCLE = {"include": [item("circle")]}
ROWS = np.arange(32)[:, None, None]
DIAGONALS = np.indices((32, 32)).sum(0)[..., None]


@pytest.mark.parametrize(
    "change, why",
    [
        (lambda p: np.where((p == 120).all(2, keepdims=True), [120, 120, 160], p), "not grey"),
        (lambda p: np.where((p == 120).all(2, keepdims=True), [220, 220, 220], p), "not grey"),
        (lambda p: p + 50 * (DIAGONALS % 3 - 1), "too little ground"),
        (lambda p: p * 0 + 60 + 120 * (DIAGONALS % 2), "too little ground"),
        (lambda p: np.where(ROWS < 3, p + 40, p), "unexplained on the ground"),
        (
            lambda p: np.where((abs(ROWS - 16) < 2) & (abs(ROWS[:, 0] - 16) < 2)[None], (p + 120) // 2, p),
            "within",
        ),
    ],
    ids=["blue", "light", "pattern", "checkers", "band", "pale spot"],
)
def test_ground_and_objects_are_plain(change, why):
    picture = picture_of(("circle", "red", 16, 16, 12)).astype(int)
    assert scorer.score(picture.astype(np.uint8), CIRCLE)
    objects, reason = scorer.judge(change(picture).clip(0, 255).astype(np.uint8), CIRCLE)
    assert not objects and why in reason


@pytest.mark.parametrize("size", [24, 32])
def test_a_thin_ring_of_another_colour_is_no_object(size):
    """Orange, nearest to yellow; a ring this thin has no pixel further than one from its outline."""
    ring = picture_of(("ring", "yellow", size / 2, size / 2, size / 4), size=size).astype(float)
    share = (120 - ring[..., 2]) / (120 - 40)
    orange = 120 + share[..., None] * (np.array([255, 150, 30]) - 120)
    metadata = {"include": [item("ring")]}
    assert scorer.score(ring.astype(np.uint8), metadata)
    assert not scorer.score(orange.round().astype(np.uint8), metadata)


@pytest.mark.parametrize("diameter, right", [(4.5, False), (8, True), (20, True), (27, False)])
def test_objects_have_about_the_sizes_of_training(diameter, right):
    assert scorer.score(picture_of(("circle", "red", 16, 16, diameter)), CIRCLE) == right


@pytest.mark.parametrize("apart, right", [(11.5, True), (10.0, False)])
def test_two_whole_circles_must_not_share_ground(apart, right):
    """So little of one is hidden that it still is a circle; both are 11 wide."""
    metadata = data.prompt_metadata("color_attr", ["circle"] * 2, ["red", "blue"])
    picture = picture_of(("circle", "red", 11.0, 16.0, 11.0), ("circle", "blue", 11.0 + apart, 16.0, 11.0))
    assert scorer.score(picture, metadata) == right


def test_an_empty_picture_shows_nothing():
    assert scorer.judge(picture_of(), CIRCLE) == ([], "shows nothing")
