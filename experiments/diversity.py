"""What right pictures choose where their prompt leaves colours and places open, and what the training data would.

    found = evaluate.measure(loaded, asked, images=8, steps=2)            # the objects of every right picture
    diversity.measure(asked, found, side, world)["two_object"]["colors"]  # {"effective": 3.9, "data": 4.0, ...}

"A photo of a square" leaves a colour open. The effective number of colours is exp(H), H the entropy of the colours that
its right pictures have: 4 where four colours are equally frequent, 1 where there is one only. Few pictures cannot show
many colours, so a small sample looks less diverse than it is. Therefore each number stands beside the data's own, from
samples of the training distribution that are exactly as large, question by question.
"""

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

import data
from rng import rng

REPEATS = 200  # samples of the model's size from the data's frequencies
KINDS = ("colors", "places")


def choices(metadata: dict, objects: Sequence, side: float) -> Iterator[tuple[str, str, str]]:
    """What a right picture chose where its prompt is open: (kind, of what, the choice).

    objects: data.Object. side: of the picture, in the unit of their centres. Of several objects of a
    class the first counts for the colour.
    """
    items = metadata["include"]
    for item in items:
        if "color" not in item:
            yield "colors", item["class"], next(o.color for o in objects if o.shape == item["class"])
    if len(objects) > 1 and not any("position" in item for item in items):
        yield "places", "", arrangement([item["class"] for item in items], objects, side)


def arrangement(classes: list[str], objects: Sequence, side: float) -> str:
    """Two objects: whether they stand side by side or one above the other, and which comes first where they differ.
    More: the quarters of the picture that they occupy."""
    if len(objects) > 2:
        return " ".join(sorted(f"{int(2 * o.x > side)}{int(2 * o.y > side)}" for o in objects))
    a, b = sorted(objects, key=lambda o: classes.index(o.shape))
    across, down = b.x - a.x, b.y - a.y
    axis, first = ("beside", across > 0) if abs(across) > abs(down) else ("above", down > 0)
    return f"{axis} {first}" if len(classes) > 1 else axis


def frequencies(metadata: dict, kind: str, what: str, world: data.World) -> np.ndarray:
    """How often the training data makes each choice, given the prompt: [k], exact."""
    if kind == "colors":
        allowed = sum((color, what) not in data.HELD_OUT_PAIRS for color in world.colors)
        return np.full(allowed, 1 / allowed)
    classes = [item["class"] for item in metadata["include"]]
    shapes = [item["class"] for item in metadata["include"] for _ in range(item["count"])]
    counts: Counter = Counter()
    for layout in data.LAYOUTS[len(shapes)]:
        for places in itertools.permutations(layout):
            objects = [data.Object(shape, "", *place, 1) for shape, place in zip(shapes, places)]
            counts[arrangement(classes, objects, 32)] += 1
    return np.array(list(counts.values())) / counts.total()


def entropy(counts: np.ndarray) -> np.ndarray:
    """Of the observed frequencies [..., k], in nats."""
    p = counts / counts.sum(-1, keepdims=True)
    return -(p * np.log(np.where(p > 0, p, 1))).sum(-1)


def measure(asked: list[dict], found: list[list[list]], side: int, world: data.World) -> dict[str, dict]:
    """tag -> kind -> {"effective", "data", "pictures"}, and the same for all tags together under "overall".

    found: of each prompt the objects of its right pictures. The entropies of single questions are averaged, each with
    the weight of its pictures, and effective = exp of that mean. A question on which the data never varies is not open.
    A kind that a tag leaves open nowhere, or of which no picture is right, is missing.
    """
    prompts = {m["prompt"]: m for m, pictures in zip(asked, found) if pictures}
    answers: dict[tuple, Counter] = {}  # (tag, kind, prompt, of what) -> how often each choice was made
    for metadata, pictures in zip(asked, found):
        for objects in pictures:
            for kind, what, choice in choices(metadata, objects, side):
                question = metadata["tag"], kind, metadata["prompt"], what
                answers.setdefault(question, Counter())[choice] += 1

    sums: dict[tuple, np.ndarray] = {}  # of pictures, and of both entropies times pictures
    for (tag, kind, prompt, what), counter in answers.items():
        p = frequencies(prompts[prompt], kind, what, world)
        if len(p) == 1:
            continue
        n = counter.total()
        seen = entropy(np.array(list(counter.values())))
        samples = rng(0, f"diversity of {kind} {what} {prompt}", n).multinomial(n, p, REPEATS)
        for key in ((tag, kind), ("overall", kind)):
            sums[key] = sums.get(key, 0) + n * np.array([1, seen, entropy(samples).mean()])

    result: dict[str, dict] = {}
    for (tag, kind), (n, *entropies) in sums.items():
        effective, of_data = np.exp(np.array(entropies) / n).tolist()
        result.setdefault(tag, {})[kind] = {"effective": effective, "data": of_data, "pictures": int(n)}
    return result
