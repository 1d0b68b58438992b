"""What a picture of the built-in shapes shows, exactly: GenEval's detector in miniature (Sec. 4, Tables 1 and 2).

    scorer.score(picture, metadata)                 # whether a uint8 picture [H, W, 3] is right by its prompt's metadata
    objects, reason = scorer.judge(picture, metadata)   # its objects if it is, none otherwise, and why

GenEval asks a detector what a picture shows. Here the objects are flat shapes of eight colours on a grey background, so
the question has an exact answer. A picture is right when a rendering of known objects explains it, and these are the
objects asked for, all of them, and nothing else. Anti-aliasing and slight grain are part of "explains". A missing,
merged, cut-off, faded or additional object is not. The mean of several pictures has soft outlines, so it is not right
either. (At 16 pixels the scorer is too lenient: of the means of eight pictures of one prompt with a colour up to 60%
pass. At 24 at most one in five does, from 32 on none: tests/test_scorer.py.)

Lengths called "units" are 32nds of the picture's side, colours are distances in RGB of 0 .. 255.
"""

import functools
import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFilter

import data

SIDES = (16, 64)  # of the pictures that can be judged, in pixels
GROUND_SLACK = 15  # how much darker or lighter than any in training the ground may be, and how far off grey
GROUND_SHARE = 0.4  # of the picture, at least; the fullest scenes leave 63%
LINE = 45.0  # a pixel further than this from every line from the ground to a colour belongs to no object
GRAIN = 0.12  # of coverage that is overlooked
AGREEMENT = 0.885  # overlap of an object with its best-fitting shape, at least
SOFT = 0.5  # how many units wider than a rendering's an outline may be, and how many pixels in small pictures
DIAMETER = (7.0, 24.0)  # of an object, in units; training has 8 to 22
AT_BORDER = 0.75  # an object goes on beyond the border where a pixel there is covered more than this
SHARED = 1.5  # square units that two objects may both claim; a hidden part of an object is a missing part
SMALLEST = 4.0  # square units; less is a speck, which the test of what is left over judges
OUTSIDE, INSIDE = 25.0, 50.0  # unexplained colour, the mean of 3 x 3 units, away from and within objects
# "left of": how far apart the centres lie along the axis, as a share of both diameters. GenEval subtracts a tenth of the
# sizes from the offset and then wants an angle below 60 degrees to the axis; here that tenth is slack, at any angle.
CLEARLY = 0.4

PALETTE = np.array(list(data.COLORS.values()), dtype=float)
COLOR_NAMES = list(data.COLORS)


class Outline(NamedTuple):
    """A shape of radius 1: area, length of the outline, how far the centre of mass lies below the centre, and box."""

    area: float
    length: float
    drop: float
    box: tuple[float, float, float, float]  # left, right, top, bottom


@functools.cache
def outline(shape: str) -> Outline:
    """Measured from data.signed_distance, so that a new shape there needs no new line here."""
    u = (np.arange(600) + 0.5) / 250 - 1.2
    distance = data.signed_distance(shape, u[None, :], u[:, None], 1.0)
    inside = distance < 0
    rows, columns = u[inside.any(1)], u[inside.any(0)]
    length = (np.abs(distance) < 0.02).sum() / 250**2 / 0.04  # the area of a strip along it, over its width
    drop = (inside * u[:, None]).sum() / inside.sum()
    return Outline(inside.sum() / 250**2, length, drop, (columns[0], columns[-1], rows[0], rows[-1]))


def ground_color(picture: np.ndarray) -> np.ndarray:
    """RGB of the ground: where more than half is ground the median is a ground pixel; the mean of those near it."""
    pixels = picture.reshape(-1, 3)
    median = np.median(pixels, axis=0)
    near = pixels[np.square(pixels - median).sum(1) < 30.0**2]
    return near.mean(0) if len(near) else median


def components(label: np.ndarray) -> list[tuple[int, np.ndarray, np.ndarray]]:
    """The 8-connected regions of equal label >= 0 of an [H, W] map: (label, rows, columns) each."""
    stride = label.shape[1] + 2
    flat = np.pad(label, 1, constant_values=-1).ravel().tolist()
    steps = (-stride - 1, -stride, -stride + 1, -1, 1, stride - 1, stride, stride + 1)
    regions = []
    for start, k in enumerate(flat):
        if k < 0:
            continue
        flat[start], region = -1, [start]
        for i in region:  # grows on the way
            for step in steps:
                if flat[i + step] == k:
                    flat[i + step] = -1
                    region.append(i + step)
        rows, columns = np.divmod(np.array(region), stride)
        regions.append((k, rows - 1, columns - 1))
    return regions


def dilate(mask: np.ndarray) -> np.ndarray:
    """A [H, W] mask and its 8-neighbours."""
    return np.asarray(Image.fromarray(mask.astype(np.uint8)).filter(ImageFilter.MaxFilter(3))) > 0


def distance_to(shape: str, x, y, r, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """[n, h, w]: from the outline to the pixels of a window, for n shapes at once (x, y, r [n] or numbers)."""
    x, y, r = (np.asarray(a, dtype=float).reshape(-1, 1, 1) for a in (x, y, r))
    return data.signed_distance(shape, columns[None, None, :] + 0.5 - x, rows[None, :, None] + 0.5 - y, r)


def covered(distance: np.ndarray) -> np.ndarray:
    """The coverage of pixels at this distance from an outline, as data.coverage renders it."""
    return np.clip(0.5 - distance, 0.0, 1.0)


def blurred(a: np.ndarray) -> np.ndarray:
    """[n, h, w] under the kernel (1, 2, 1) / 4 in both directions, repeating the border."""
    down, across = np.arange(a.shape[1]), np.arange(a.shape[2])
    a = (2 * a + a[:, np.maximum(down - 1, 0)] + a[:, np.minimum(down + 1, down[-1])]) / 4
    return (2 * a + a[:, :, np.maximum(across - 1, 0)] + a[:, :, np.minimum(across + 1, across[-1])]) / 4


def without_grain(a: np.ndarray) -> np.ndarray:
    """Coverage with values near 0 and 1 taken for 0 and 1, so that grain on a flat area is no disagreement."""
    return np.clip((a - GRAIN) / (1 - 2 * GRAIN), 0.0, 1.0)


def overlap(seen: np.ndarray, candidates: np.ndarray) -> np.ndarray:
    """Soft intersection over union of seen [h, w] with candidates [n, h, w]: [n] in [0, 1]."""
    seen, candidates = without_grain(seen), without_grain(candidates)
    both = np.minimum(seen, candidates).sum((1, 2))
    return both / (seen.sum() + candidates.sum((1, 2)) - both)


NEIGHBOURS = np.concatenate([np.zeros((1, 3)), np.eye(3), -np.eye(3)])  # in (x, y, r)


def fit(seen: np.ndarray, rows: np.ndarray, columns: np.ndarray, unit: float) -> tuple:
    """The shape that agrees best with an observed coverage: (shape, (x, y, r), agreement in [0, 1]).

    Area and centre of mass give the first guess for each shape; the shapes that come near the best of these guesses are
    refined by a pattern search in (x, y, r), sharp and blurred.
    """
    total = seen.sum()
    x = (seen.sum(0) * (columns + 0.5)).sum() / total
    y = (seen.sum(1) * (rows + 0.5)).sum() / total
    guesses = []
    for shape in data.SHAPES:
        r = (total / outline(shape).area) ** 0.5
        at = np.array([x, y - outline(shape).drop * r, r])
        sharp = covered(distance_to(shape, *at, rows, columns))
        agreement = overlap(seen, np.concatenate([sharp, blurred(sharp)]))
        guesses.append((agreement.max(), shape, at, agreement.argmax() == 1))
    best_guess = max(guess[0] for guess in guesses)
    fitted = []
    for agreement, shape, at, blur in guesses:
        if agreement < best_guess - 0.12:
            continue
        for step in (0.5, 0.25, 0.12):
            tries = at + step * unit * NEIGHBOURS
            candidates = covered(distance_to(shape, *tries.T, rows, columns))
            agreements = overlap(seen, blurred(candidates) if blur else candidates)
            at, agreement = tries[agreements.argmax()], agreements.max()
        fitted.append((shape, at, float(agreement)))
    return max(fitted, key=lambda one: one[2])


def softness(seen: np.ndarray, shape: str, x: float, y: float, r: float) -> float:
    """How much wider the outline of a shape is in seen [H, W], the coverage of a picture, than in a rendering: pixels.

    Where coverage a falls from 1 to 0 over w pixels, the sum of a (1 - a) is w / 6 for each pixel of the outline's
    length. The mean of pictures that differ in size or place falls over as many pixels as they differ, whatever its
    best fit.
    """
    pixel = np.arange(len(seen))
    distance = distance_to(shape, x, y, r, pixel, pixel)[0]
    seen, rendered = without_grain(seen), without_grain(covered(distance))
    excess = (seen * (1 - seen) - rendered * (1 - rendered))[np.abs(distance) < 2 * max(1.0, len(seen) / 32)]
    return float(6 * excess.sum() / (outline(shape).length * r))


def box_mean(x: np.ndarray, side: int) -> np.ndarray:
    """Mean over side x side windows (zeros beyond the border) of [H, W, C]; side is odd."""
    half = side // 2
    sums = np.pad(x, ((half + 1, half), (half + 1, half), (0, 0))).cumsum(0).cumsum(1)
    return (sums[side:, side:] - sums[:-side, side:] - sums[side:, :-side] + sums[:-side, :-side]) / side**2


def explain(picture: np.ndarray) -> tuple[list[data.Object], str]:
    """The objects that a picture shows, and the first thing in it that they do not explain; "" where they explain all.

    picture: uint8 [H, W, 3], square, 16 to 64 pixels a side; below 24, crowded scenes have objects of too few pixels to
    be told apart and true ones are refused now and then. Raises ValueError for anything else.
    """
    size, unit, (least, most) = len(picture), len(picture) / 32, SIDES
    if picture.dtype != np.uint8 or picture.shape != (size, size, 3) or not least <= size <= most:
        given = f"not {picture.dtype} {picture.shape}"
        raise ValueError(f"expected a square uint8 picture of {least} to {most} pixels a side, {given}")
    p = picture.astype(float)
    ground = ground_color(p)
    low, high = data.GREYS[0] - GROUND_SLACK, data.GREYS[1] + GROUND_SLACK
    if np.ptp(ground) > GROUND_SLACK or not low <= ground.mean() <= high:
        return [], "the ground is not grey"
    if (np.abs(p - ground).max(2) < 30).mean() < GROUND_SHARE:
        return [], "too little ground"

    # Each pixel on its nearest mixing line: p = ground + a (color - ground). More than half of a colour is that colour.
    toward = PALETTE - ground  # [8, 3]
    share = np.clip((p - ground) @ toward.T / np.square(toward).sum(1), 0.0, 1.0)  # [H, W, 8]
    off_line = np.sqrt(np.square((p - ground)[:, :, None] - share[..., None] * toward).sum(-1))  # [H, W, 8]
    nearest = off_line.argmin(2)
    a = np.take_along_axis(share, nearest[..., None], 2)[..., 0]
    label = np.where((a > 0.5) & (off_line.min(2) < LINE), nearest, -1)

    objects, complaint = [], ""
    for k, rows, columns in components(label):
        if len(rows) < SMALLEST * unit**2:
            continue
        top, left = max(rows.min() - 2, 0), max(columns.min() - 2, 0)
        window = np.s_[top : rows.max() + 3, left : columns.max() + 3]
        mask = np.zeros((size, size), dtype=bool)
        mask[rows, columns] = True
        seen = np.where(dilate(mask[window]), share[window][..., k], 0.0)
        at_rows, at_columns = np.arange(top, top + seen.shape[0]), np.arange(left, left + seen.shape[1])
        shape, (x, y, r), agreement = fit(seen, at_rows, at_columns, unit)
        color = COLOR_NAMES[k]
        objects.append(data.Object(shape, color, float(x), float(y), float(2 * r)))
        if complaint:
            continue

        what = f"the {color} {shape} at ({x:.0f}, {y:.0f})"
        box = np.array([x, x, y, y]) + r * np.array(outline(shape).box)
        outside = box.min() < -0.5 * unit or box.max() > size + 0.5 * unit
        at_border = (np.minimum(rows, columns) == 0) | (np.maximum(rows, columns) == size - 1)
        if agreement < AGREEMENT:
            complaint = f"a {color} region at ({x:.0f}, {y:.0f}) has no known shape; {shape} agrees to {agreement:.2f}"
        elif softness(np.where(nearest == k, a, 0.0), shape, x, y, r) > SOFT * max(1.0, unit):
            complaint = f"{what} has a soft outline"
        elif not DIAMETER[0] * unit <= 2 * r <= DIAMETER[1] * unit:
            complaint = f"{what} is {2 * r:.1f} pixels wide"
        elif outside or (share[rows, columns, k][at_border] > AT_BORDER).any():
            complaint = f"{what} is cut off by the border"
    return objects, complaint or left_over(p, ground, objects)


def left_over(p: np.ndarray, ground: np.ndarray, objects: list[data.Object]) -> str:
    """What a rendering of the objects leaves unexplained in a picture [H, W, 3], or "".

    Compared are averages over about 3 x 3 units, in which grain cancels and an object does not, away from outlines by
    more than a unit: how well those fit has been judged already.
    """
    size, unit = len(p), len(p) / 32
    pixel, edge = np.arange(size), max(1.0, unit)
    outside, inside = np.ones((size, size), dtype=bool), np.zeros((size, size), dtype=bool)
    expected, claimed, shared = np.broadcast_to(ground, p.shape), np.zeros((size, size, 1)), 0.0
    for o in objects:
        distance = distance_to(o.shape, o.x, o.y, o.diameter / 2, pixel, pixel)[0]
        cover = covered(distance)[..., None]
        expected = (1 - cover) * expected + cover * PALETTE[COLOR_NAMES.index(o.color)]
        shared += np.minimum(claimed, cover).sum()
        claimed = np.maximum(claimed, cover)
        outside &= distance > edge
        inside |= distance < -edge
    if shared > SHARED * unit**2:
        return "objects overlap"
    side = 2 * max(1, round(unit)) + 1
    for region, bound, where in ((outside, OUTSIDE, "on the ground"), (inside, INSIDE, "within an object")):
        excess = np.sqrt(np.square(box_mean((p - expected) * region[..., None], side)).sum(2))
        y, x = np.unravel_index(excess.argmax(), excess.shape)
        if excess[y, x] > bound:
            return f"something unexplained {where} at ({x}, {y})"
    return ""


def matches(item: dict, o: data.Object) -> bool:
    """Whether an object is of the class, and of the colour if it names one, of an entry of the metadata."""
    return o.shape == item["class"] and item.get("color", o.color) == o.color


def assignments(items: list[dict], objects: list[data.Object]) -> Iterator[list[list[data.Object]]]:
    """Every way to give each object to an entry that it matches, so that each entry gets exactly its count."""
    if len(objects) != sum(item["count"] for item in items):
        return
    for places in itertools.product(range(len(items)), repeat=len(objects)):
        groups = [[o for o, place in zip(objects, places) if place == i] for i in range(len(items))]
        pairs = list(zip(items, groups))
        if all(len(group) == item["count"] for item, group in pairs):
            if all(matches(item, o) for item, group in pairs for o in group):
                yield groups


def in_place(items: list[dict], groups: list[list[data.Object]]) -> bool:
    """Whether all objects of an entry with a position stand there, seen from all of the entry it refers to."""
    for item, group in zip(items, groups):
        if "position" in item:
            relation, other = item["position"]
            if not all(data.stands(relation, a, b, CLEARLY) for a in group for b in groups[other]):
                return False
    return True


def judge(picture: np.ndarray, metadata: dict) -> tuple[list[data.Object], str]:
    """The objects of a picture that shows exactly what its prompt asks for, none of any other picture; and the reason.

    picture: uint8 [H, W, 3]. metadata: GenEval's `include` (class, count, color, position: [relation, index of the
    entry it refers to]) and `exclude` (class, count, color), whatever the tag, so a prompt may mix all of them.
    Stricter than GenEval: the objects of `include` must be there in exactly their numbers, and nothing else.
    """
    objects, complaint = explain(picture)
    if complaint:
        return [], complaint
    shown = ", ".join(sorted(f"{o.color} {o.shape}" for o in objects)) or "nothing"
    for item in metadata.get("exclude", []):
        if sum(matches(item, o) for o in objects) >= item["count"]:
            return [], f"too many: {shown}"
    items = metadata["include"]
    ways = list(assignments(items, objects))
    if any(in_place(items, groups) for groups in ways):
        return objects, f"shows {shown}"
    return [], f"out of place: {shown}" if ways else f"shows {shown}"


def score(picture: np.ndarray, metadata: dict) -> bool:
    """Whether a picture shows exactly what its prompt asks for."""
    return bool(judge(picture, metadata)[0])
