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
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

import data

SIDES = (16, 64)  # of the pictures that can be judged, in pixels
# The ground may be this much darker or lighter than any in training, and this much off grey.
GROUND_SLACK = 15
GROUND_SHARE = 0.4  # of the picture, at least; the fullest scenes leave 63%
LINE = 45.0  # a pixel further than this from every line from the ground to a colour belongs to no object
GRAIN = 0.12  # of coverage that is overlooked
AGREEMENT = 0.885  # overlap of an object with its best-fitting shape, at least
# An outline may be this many units wider than a rendering's, and this many pixels in small pictures.
SOFT = 0.5
DIAMETER = (7.0, 24.0)  # of an object, in units; training has 8 to 22
# A pixel at the picture's border that is covered more than this: the object goes on beyond it.
AT_BORDER = 0.75
SHARED = 1.5  # square units that two objects may both claim; a hidden part of an object is a missing part
SMALLEST = 4.0  # square units; less is a speck, which the test of what is left over judges
OUTSIDE, INSIDE = 25.0, 50.0  # unexplained colour, the mean of 3 x 3 units, away from and within objects
# "left of": the centres lie further apart along the axis than this times the sum of the diameters.
CLEARLY = 0.4

PALETTE = np.array(list(data.COLORS.values()), dtype=float)
COLOR_NAMES = list(data.COLORS)


class Found(NamedTuple):
    """One object of a picture, explained: centre and diameter in pixels."""

    shape: str
    color: str
    x: float
    y: float
    diameter: float
    blur: bool  # whether the rendering agrees better when slightly blurred
    agreement: float  # soft intersection over union with the rendering, in [0, 1]


class Explanation(NamedTuple):
    """What a picture shows. `complaint` is empty when the objects explain all of it, else says what they do not."""

    ground: np.ndarray  # RGB
    objects: list[Found]
    complaint: str


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
    height, width = label.shape
    stride = width + 1  # one column of -1 on the right ends every row, one row above and below the picture
    flat = np.full((height + 2, stride), -1, dtype=np.int64)
    flat[1:-1, :-1] = label
    flat = flat.ravel().tolist()
    flat.append(-1)
    steps = (-stride - 1, -stride, -stride + 1, -1, 1, stride - 1, stride, stride + 1)
    regions = []
    for start in range(stride, stride * (height + 1)):
        k = flat[start]
        if k < 0:
            continue
        flat[start], region, i = -1, [start], 0
        while i < len(region):
            for step in steps:
                j = region[i] + step
                if flat[j] == k:
                    flat[j] = -1
                    region.append(j)
            i += 1
        rows, columns = np.divmod(np.array(region), stride)
        regions.append((k, rows - 1, columns))
    return regions


def dilate(mask: np.ndarray) -> np.ndarray:
    """A [H, W] mask and its 8-neighbours."""
    wide = mask.copy()
    wide[:, 1:] |= mask[:, :-1]
    wide[:, :-1] |= mask[:, 1:]
    tall = wide.copy()
    tall[1:] |= wide[:-1]
    tall[:-1] |= wide[1:]
    return tall


def coverage(shape: str, x, y, r, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """[n, h, w]: data.coverage on a window, for n candidates at once (x, y, r of shape [n] or scalars)."""
    x, y, r = (np.asarray(a, dtype=float).reshape(-1, 1, 1) for a in (x, y, r))
    distance = data.signed_distance(shape, columns[None, None, :] + 0.5 - x, rows[None, :, None] + 0.5 - y, r)
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


def fit(
    seen: np.ndarray, rows: np.ndarray, columns: np.ndarray, unit: float
) -> tuple[str, np.ndarray, bool, float]:
    """The shape that agrees best with an observed coverage: (shape, (x, y, r), whether blurred, agreement).

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
        sharp = coverage(shape, *at, rows, columns)
        agreement = overlap(seen, np.concatenate([sharp, blurred(sharp)]))
        guesses.append((agreement.max(), shape, at, bool(agreement.argmax())))
    best_guess = max(g[0] for g in guesses)
    best = ("", np.zeros(3), False, -1.0)
    for agreement, shape, at, blur in guesses:
        if agreement < best_guess - 0.12:
            continue
        for step in (0.5, 0.25, 0.12):
            tries = at + step * unit * NEIGHBOURS
            candidates = coverage(shape, *tries.T, rows, columns)
            agreements = overlap(seen, blurred(candidates) if blur else candidates)
            at, agreement = tries[agreements.argmax()], agreements.max()
        if agreement > best[3]:
            best = (shape, at, blur, float(agreement))
    return best


def softness(seen: np.ndarray, shape: str, x: float, y: float, r: float) -> float:
    """How much wider the outline of a shape is in seen [H, W], the coverage of a whole picture, than in a rendering:
    pixels.

    Where coverage a falls from 1 to 0 over w pixels, the sum of a (1 - a) is w / 6 for each pixel of the outline's
    length. The mean of pictures that differ in size or place falls over as many pixels as they differ, whatever its
    best fit.
    """
    pixel = np.arange(len(seen))
    distance = data.signed_distance(shape, pixel[None] + 0.5 - x, pixel[:, None] + 0.5 - y, r)
    seen, rendered = without_grain(seen), without_grain(np.clip(0.5 - distance, 0.0, 1.0))
    excess = (seen * (1 - seen) - rendered * (1 - rendered))[np.abs(distance) < 2 * max(1.0, len(seen) / 32)]
    return float(6 * excess.sum() / (outline(shape).length * r))


def box_mean(x: np.ndarray, side: int) -> np.ndarray:
    """Mean over side x side windows (zeros beyond the border) of [H, W, C]; side is odd."""
    half = side // 2
    padded = np.pad(x, ((half + 1, half), (half + 1, half), (0, 0))).cumsum(0).cumsum(1)
    return (
        padded[side:, side:] - padded[:-side, side:] - padded[side:, :-side] + padded[:-side, :-side]
    ) / side**2


def explain(picture: np.ndarray) -> Explanation:
    """The objects that a picture shows, and the first thing in it that they do not explain.

    picture: uint8 [H, W, 3], square, 16 to 64 pixels a side; below 24, crowded scenes have objects of too few pixels to
    be told apart and true ones are refused now and then. Raises ValueError for anything else.
    """
    size, unit, (least, most) = len(picture), len(picture) / 32, SIDES
    if picture.dtype != np.uint8 or picture.shape != (size, size, 3) or not least <= size <= most:
        said = f"not {picture.dtype} {picture.shape}"
        raise ValueError(f"expected a square uint8 picture of {least} to {most} pixels a side, {said}")
    p = picture.astype(float)
    ground = ground_color(p)
    low, high = data.GREYS[0] - GROUND_SLACK, data.GREYS[1] + GROUND_SLACK
    if np.ptp(ground) > GROUND_SLACK or not low <= ground.mean() <= high:
        return Explanation(ground, [], "the ground is not grey")
    if (np.abs(p - ground).max(2) < 30).mean() < GROUND_SHARE:
        return Explanation(ground, [], "too little ground")

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
        shape, (x, y, r), blur, agreement = fit(seen, at_rows, at_columns, unit)
        color = COLOR_NAMES[k]
        found = Found(shape, color, float(x), float(y), float(2 * r), blur, agreement)
        objects.append(found)

        box = np.array([x, x, y, y]) + r * np.array(outline(shape).box)
        at_border = (np.minimum(rows, columns) == 0) | (np.maximum(rows, columns) == size - 1)
        what = f"the {color} {shape} at ({x:.0f}, {y:.0f})"
        if complaint:
            continue
        if agreement < AGREEMENT:
            complaint = f"a {color} region at ({x:.0f}, {y:.0f}) has no known shape; {shape} agrees to {agreement:.2f}"
        elif softness(np.where(nearest == k, a, 0.0), shape, x, y, r) > SOFT * max(1.0, unit):
            complaint = f"{what} has a soft outline"
        elif not DIAMETER[0] * unit <= 2 * r <= DIAMETER[1] * unit:
            complaint = f"{what} is {2 * r:.1f} pixels wide"
        elif (
            box.min() < -0.5 * unit
            or box.max() > size + 0.5 * unit
            or (share[rows, columns, k][at_border] > AT_BORDER).any()
        ):
            complaint = f"{what} is cut off by the border"
    return Explanation(ground, objects, complaint or left_over(p, ground, objects))


def left_over(p: np.ndarray, ground: np.ndarray, objects: list[Found]) -> str:
    """What a rendering of the objects leaves unexplained in a picture [H, W, 3], or "".

    Compared are averages over about 3 x 3 units, in which grain cancels and an object does not, away from outlines by
    more than a unit: how well those fit has been judged already.
    """
    size, unit = len(p), len(p) / 32
    pixel = np.arange(size)
    outside, inside = np.ones((size, size), dtype=bool), np.zeros((size, size), dtype=bool)
    expected, covered, shared = np.broadcast_to(ground, p.shape), np.zeros((size, size, 1)), 0.0
    for o in objects:
        cover = coverage(o.shape, o.x, o.y, o.diameter / 2, pixel, pixel)[0][..., None]
        expected = (1 - cover) * expected + cover * PALETTE[COLOR_NAMES.index(o.color)]
        shared += np.minimum(covered, cover).sum()
        covered = np.maximum(covered, cover)
        distance = data.signed_distance(
            o.shape, pixel[None] + 0.5 - o.x, pixel[:, None] + 0.5 - o.y, o.diameter / 2
        )
        edge = max(1.0, unit)
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


# ------------------------------------------------------------------------------------------------------------
# The picture against its prompt
# ------------------------------------------------------------------------------------------------------------
def stands(relation: str, a: Found, b: Found) -> bool:
    """Whether a is clearly "left of" (or ...) b.

    GenEval subtracts a tenth of the sizes from the offset of the centres and then wants an angle below 60 degrees to
    the axis. Here the extents must not overlap along the axis, at any angle, with a tenth of the sizes as slack; the
    scenes of data.py keep to it without any.
    """
    axis, sign = {"left of": ("x", 1), "right of": ("x", -1), "above": ("y", 1), "below": ("y", -1)}[relation]
    return sign * (getattr(b, axis) - getattr(a, axis)) > CLEARLY * (a.diameter + b.diameter)


def matches(item: dict, o: Found) -> bool:
    """Whether an object is of the class, and of the colour if one is told, of an entry of the metadata."""
    return o.shape == item["class"] and item.get("color", o.color) == o.color


def assignments(items: list[dict], objects: list[Found]) -> Iterator[list[list[Found]]]:
    """Every way to give each object to an entry that it matches, so that each entry gets exactly its count."""

    def rest(i: int, groups: list[list[Found]]) -> Iterator[list[list[Found]]]:
        if i == len(objects):
            yield [list(group) for group in groups]
            return
        for item, group in zip(items, groups):
            if len(group) < item["count"] and matches(item, objects[i]):
                group.append(objects[i])
                yield from rest(i + 1, groups)
                group.pop()

    if len(objects) == sum(item["count"] for item in items):
        yield from rest(0, [[] for _ in items])


def judge(picture: np.ndarray, metadata: dict) -> tuple[list[Found], str]:
    """The objects of a picture that shows exactly what its prompt asks for, none of any other picture; and the reason.

    picture: uint8 [H, W, 3]. metadata: GenEval's `include` (class, count, color, position: [relation, index of the
    entry it refers to]) and `exclude` (class, count, color), whatever the tag, so a prompt may mix all of them.
    Stricter than GenEval: the objects of `include` must be there in exactly their numbers, and nothing else.
    """
    _, objects, complaint = explain(picture)
    if complaint:
        return [], complaint
    shown = ", ".join(sorted(f"{o.color} {o.shape}" for o in objects)) or "nothing"
    for item in metadata.get("exclude", []):
        if sum(matches(item, o) for o in objects) >= item["count"]:
            return [], f"too many: {shown}"
    items = metadata["include"]
    matched = False
    for groups in assignments(items, objects):
        matched = True
        if all(
            stands(item["position"][0], a, b)
            for item, group in zip(items, groups)
            if "position" in item
            for a in group
            for b in groups[item["position"][1]]
        ):
            return objects, f"shows {shown}"
    return [], f"out of place: {shown}" if matched else f"shows {shown}"


def score(picture: np.ndarray, metadata: dict) -> bool:
    """Whether a picture shows exactly what its prompt asks for."""
    return bool(judge(picture, metadata)[0])
