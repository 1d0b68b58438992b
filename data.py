"""Captioned pictures: the built-in shapes, and a folder of your own (S.2: text-to-image data).

    source = data.Shapes(32, "shapes")               # endless, seeded: GenEval in miniature
    source = data.ImageFolder("pictures/", size=32)  # pictures with captions, in one of the forms of files.py
    picture, caption, key = source.sample(g, seed)   # g = 0, 1, 2, ...: the global index of the sample in training

    python -m engine.feed --data shapes              # looks at data: a sheet of pictures with captions

A source is a function from the global sample index g to a sample. It has no position of its own. So one integer, which
train.py counts, is the position of a run in its data, and any number of processes can share the work.
"""

import functools
import hashlib
import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor
from tqdm import tqdm

import files
from files import DataError
from rng import rng


class Sample(NamedTuple):
    """One captioned picture: uint8 [H, W, 3], its caption, and a key that names it in logs."""

    picture: np.ndarray
    caption: str
    key: str


class Source(Protocol):
    """What the loop asks of a data set, such as Shapes and ImageFolder below, emoji.Emoji and scale/'s.

    `sample` must be safe to call from several threads. All samples of one iteration must have one size.
    WrongCaptions asks for more: samples have the numbers 0 .. numbers - 1, in some order of g; number(g,
    seed) is that of sample g, caption(number, seed) a caption of it.
    """

    name: str
    buckets: dict[tuple[int, int], float]  # every (height, width) that occurs -> share of the samples
    skipped: dict[str, str]  # key -> reason, of samples that cannot be used
    fingerprint: str  # changes when the sequence of samples does

    def sample(self, g: int, seed: int = 0) -> Sample: ...

    def bucket(self, g: int, seed: int = 0) -> tuple[int, int]: ...


def to_tensor(pictures: list[np.ndarray]) -> Tensor:
    """uint8 pictures [H, W, 3] of one size -> fp32 [B, 3, H, W] in [-1, 1]."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_pictures(x: Tensor) -> list[np.ndarray]:
    """The way back: [B, 3, H, W] -> uint8 pictures [H, W, 3]; values outside [-1, 1] are cut off."""
    x = ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return list(x.permute(0, 2, 3, 1).cpu().numpy())


# ============================================================================================================
# (a) Built-in shapes: GenEval in miniature
# ============================================================================================================
# GenEval (Ghosh et al. 2023) asks for objects, colours, counts and places in six kinds of prompt. Here the objects are
# flat shapes on a grey background, so that a program can judge every picture exactly (experiments/scorer.py). The shade
# of the background and the sizes vary on purpose. If all pictures had one norm, the normalisation of Eq. 19 alone would
# give away part of the answer.

SHAPES = ("circle", "square", "triangle", "cross", "ring")
COLORS = {
    "red": (220, 40, 40),
    "yellow": (245, 220, 40),
    "green": (40, 160, 60),
    "blue": (40, 80, 220),
    "purple": (130, 40, 170),
    "pink": (255, 140, 200),
    "black": (10, 10, 10),
    "white": (250, 250, 250),
}
TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
VERSION = 2  # of what the shapes' pictures look like; goes up when the same sample becomes another picture
COUNTS = {2: "two", 3: "three", 4: "four"}
RELATIONS = ("left of", "right of", "above", "below")


class World(NamedTuple):
    """Which of the built-in pictures there are: the kinds of prompt and the words that they use."""

    tags: tuple[str, ...] = TAGS
    shapes: tuple[str, ...] = SHAPES
    colors: tuple[str, ...] = tuple(COLORS)
    counted_colors: bool = False  # half of the prompts with a number name a colour as well


# What --data calls them. The first can be learned in minutes. In the second, half of the numbers come with a colour,
# so that they can be learned apart from the shapes; and there are few enough words to learn all of it.
SETS = {
    "one-shape": World(tags=("single_object", "colors")),
    "scenes": World(shapes=SHAPES[:4], colors=tuple(COLORS)[:5], counted_colors=True),
    "shapes": World(),
}

# Never rendered for training, neither alone nor beside another shape: what a model draws for them, it has composed.
HELD_OUT_PAIRS = {("red", "triangle"), ("blue", "ring"), ("yellow", "square"), ("green", "cross")}

GREYS = (80, 170)  # the range of the background's shade; black and white shapes stay visible on all of it
# By the number of shapes, in 32nds of the picture's side: where they stand, one of several layouts (x, y); how far each
# may be moved from there; and their diameters. As in photographs, what stands alone is in the middle and fills more of
# the picture.
QUARTERS = ((8, 8), (24, 8), (8, 24), (24, 24))
LAYOUTS = {
    1: (((16, 16),),),
    2: (((8.5, 16), (23.5, 16)), ((16, 8.5), (16, 23.5))),
    3: tuple(itertools.combinations(QUARTERS, 3)),
    4: (QUARTERS,),
}
MOVES = {1: 1.0, 2: 0.75, 3: 1.0, 4: 1.0}
DIAMETERS = {1: (14.0, 22.0), 2: (9.5, 12.0), 3: (8.0, 10.5), 4: (8.0, 10.5)}
GAP = 1.5  # the least distance that these leave between two shapes, and to the border (a test checks it)


@dataclass(frozen=True)
class Object:
    """One shape: kind, colour name, centre and diameter in pixels (x to the right, y downwards)."""

    shape: str
    color: str
    x: float
    y: float
    diameter: float


@dataclass(frozen=True)
class Scene:
    """What a picture shows, and the prompt for it in GenEval's metadata format."""

    objects: tuple[Object, ...]
    ground: int
    metadata: dict


def signed_distance(shape: str, x: np.ndarray, y: np.ndarray, r: float) -> np.ndarray:
    """How far a point lies outside a shape of radius r at the origin (negative inside), in pixels."""
    if shape == "circle":
        return np.hypot(x, y) - r
    if shape == "ring":
        return np.abs(np.hypot(x, y) - 0.75 * r) - 0.25 * r
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - 0.88 * r
    if shape == "triangle":  # isosceles, tip up: base at y = +0.88 r, sides of slope 2
        return np.maximum(y - 0.88 * r, (2 * np.abs(x) - y - 0.88 * r) / np.sqrt(5.0))
    if shape == "cross":
        long, short = r, 0.34 * r
        bar1 = np.maximum(np.abs(x) - long, np.abs(y) - short)
        bar2 = np.maximum(np.abs(x) - short, np.abs(y) - long)
        return np.minimum(bar1, bar2)
    raise ValueError(f"unknown shape {shape!r}; known are {', '.join(SHAPES)}")


def coverage(item: Object, size: int) -> np.ndarray:
    """[size, size] in [0, 1]: how much of each pixel the object covers (anti-aliased by its signed distance)."""
    centre = np.arange(size) + 0.5
    x, y = centre[None, :] - item.x, centre[:, None] - item.y
    distance = signed_distance(item.shape, x, y, item.diameter / 2)
    return np.clip(0.5 - distance, 0.0, 1.0)


def render(scene: Scene, size: int) -> np.ndarray:
    """The picture of a scene, uint8 [size, size, 3]."""
    picture = np.full((size, size, 3), float(scene.ground))
    for item in scene.objects:
        a = coverage(item, size)[..., None]
        picture = (1 - a) * picture + a * np.array(COLORS[item.color], dtype=float)
    return picture.round().astype(np.uint8)


def place(random: np.random.Generator, n: int, size: int) -> list[tuple[float, float, float]]:
    """n random (x, y, diameter) in pixels: one of the layouts, each place moved a little."""
    layouts, (low, high) = LAYOUTS[n], DIAMETERS[n]
    layout = random.permutation(layouts[random.integers(len(layouts))])
    centres = layout + MOVES[n] * (2 * random.random((n, 2)) - 1)
    d = low + (high - low) * random.random((n, 1))
    return [tuple(map(float, row)) for row in np.hstack([centres, d]) * (size / 32)]


def stands(relation: str, a: Object, b: Object, share: float = 0.5) -> bool:
    """Whether a is "left of" (or ...) b: their centres lie further apart along that axis than `share` of both diameters.

    At a half, which training scenes keep to, their extents do not overlap along the axis.
    """
    axis, sign = {"left of": ("x", 1), "right of": ("x", -1), "above": ("y", 1), "below": ("y", -1)}[relation]
    return sign * (getattr(b, axis) - getattr(a, axis)) > share * (a.diameter + b.diameter)


def prompt_metadata(tag: str, shapes: list, colors: list, count: int = 1, relation: str = "") -> dict:
    """The prompt and its metadata, fields and wording as in GenEval's evaluation_metadata.jsonl."""
    items = [{"class": s, "count": count} | ({"color": c} if c else {}) for s, c in zip(shapes, colors)]
    if tag == "counting":
        many = shapes[0] + ("es" if shapes[0] == "cross" else "s")
        prompt = "a photo of " + " ".join([COUNTS[count], *filter(None, colors), many])
        exclude = {"exclude": [{"class": shapes[0], "count": count + 1}]}
        return {"tag": tag, "include": items, **exclude, "prompt": prompt}
    if tag == "position":  # the reference first: "a dog right of a cat" is [cat, dog right of object 0]
        items = [items[1], items[0] | {"position": [relation, 0]}]
    named = [f"a {color} {shape}" if color else f"a {shape}" for shape, color in zip(shapes, colors)]
    return {"tag": tag, "include": items, "prompt": "a photo of " + f" {relation or 'and'} ".join(named)}


SPLIT = 1009  # a number for which also the tags with few prompts (counting 15, two_object 20) have some in each lot


def split_of(prompt: str) -> str:
    """ "train", "validation" or "test": a fixed lot by the prompt's hash, about 1/10 and 2/10 of the prompts held out.

    Prompts with one object belong to training whatever their lot: there are too few of them to spare any, and the
    held-out colour-shape pairs already ask that question.
    """
    words = prompt.split()
    if " and " not in prompt and not any(r in prompt for r in RELATIONS) and words[3] not in COUNTS.values():
        return "train"
    lot = int.from_bytes(hashlib.sha256(f"{SPLIT} {prompt}".encode()).digest()[:4], "little") % 10
    return "validation" if lot == 0 else "test" if lot in (1, 2) else "train"


def draw_prompt(random: np.random.Generator, tag: str, world: World) -> tuple[dict, list, list, str]:
    """A random prompt of a tag and what to draw for it: (metadata, shapes, colours, relation)."""
    n = 1 if tag in ("single_object", "colors") else 2
    shapes = [world.shapes[i] for i in random.permutation(len(world.shapes))[:n]]
    colors = [world.colors[i] for i in random.integers(len(world.colors), size=n)]
    if tag == "color_attr":  # two different colours, so that a swap shows
        colors = [world.colors[i] for i in random.permutation(len(world.colors))[:2]]
    if tag == "counting":
        count = 2 + int(random.integers(len(COUNTS)))
        named = colors[:1] if world.counted_colors and random.random() < 0.5 else [None]
        return prompt_metadata(tag, shapes[:1], named, count), shapes[:1] * count, colors[:1] * count, ""
    relation = RELATIONS[random.integers(len(RELATIONS))] if tag == "position" else ""
    named = [None] * n if tag in ("single_object", "two_object") else colors  # which colours the prompt tells
    if tag == "position":  # GenEval tells none; training also tells one or both, so that prompts can be mixed
        named = [c if random.random() < 0.5 else None for c in colors]
    return prompt_metadata(tag, shapes, named, relation=relation), shapes, colors, relation


def draw_scene(random: np.random.Generator, size: int, tag: str, world: World) -> Scene:
    """A random scene of the training distribution: no held-out pair, no held-out prompt."""
    while True:
        metadata, shapes, colors, relation = draw_prompt(random, tag, world)
        if set(zip(colors, shapes)) & HELD_OUT_PAIRS or split_of(metadata["prompt"]) != "train":
            continue
        places = place(random, len(shapes), size)
        objects = tuple(Object(s, c, *p) for s, c, p in zip(shapes, colors, places))
        if relation and not stands(relation, *objects):
            continue
        return Scene(objects, int(random.integers(*GREYS)), metadata)


class Shapes:
    """Endless captioned pictures of shapes, size x size pixels; sample g is a function of (seed, g) alone.

    name is a key of SETS.
    """

    def __init__(self, size: int = 32, name: str = "shapes"):
        self.size, self.world, self.name = size, SETS[name], name
        self.buckets, self.skipped, self.fingerprint = {(size, size): 1.0}, {}, f"{name} {size} {VERSION}"
        self.numbers = 2**62  # no end

    def bucket(self, g: int, seed: int = 0) -> tuple[int, int]:
        """(height, width) of sample g."""
        return self.size, self.size

    def scene(self, g: int, seed: int = 0) -> Scene:
        random = rng(seed, "shapes", g)
        tag = self.world.tags[random.integers(len(self.world.tags))]
        return draw_scene(random, self.size, tag, self.world)

    def number(self, g: int, seed: int = 0) -> int:
        return g

    def caption(self, number: int, seed: int = 0) -> str:
        return self.scene(number, seed).metadata["prompt"]

    def sample(self, g: int, seed: int = 0) -> Sample:
        scene = self.scene(g, seed)
        return Sample(render(scene, self.size), scene.metadata["prompt"], f"shapes-{seed}-{g}")


# ============================================================================================================
# (b) A folder of pictures
# ============================================================================================================


class ImageFolder:
    """The captioned pictures of a folder (files.py), cropped square to size x size and held in memory.

    Sample g is picture number g mod n of epoch g div n, in an order shuffled by (seed, epoch); of several captions it
    draws one. A picture that cannot be read is left out, counted and named. Raises DataError when none is left.
    """

    def __init__(self, folder: str | Path, size: int, caption_key: str | None = None):
        self.name, self.size, self.buckets = str(folder), size, {(size, size): 1.0}
        found = files.find(Path(folder), caption_key)
        self.skipped, self.captions, self.keys = found.left_out, [], []
        self.pictures = np.empty((len(found.captions), size, size, 3), np.uint8)
        state = hashlib.sha256()
        bar = {"desc": f"reading {folder}", "unit": " pictures", "leave": False, "disable": None}
        for name in tqdm(sorted(found.captions), **bar):
            try:
                content = found.read(name)
                self.pictures[len(self.keys)] = files.cover(files.opened(content), size, size)
            except files.Unusable as error:
                self.skipped[name] = str(error)
                continue
            self.captions.append(found.captions[name])
            self.keys.append(name)
            state.update(content)
        if not self.keys:
            raise DataError(f"{folder}: none of its pictures can be used{files.summary(self.skipped)}")
        state.update(json.dumps([self.keys, self.captions, size, "order 3"]).encode())
        self.fingerprint, self.numbers = state.hexdigest(), len(self.keys)
        count = sum(map(len, self.captions))
        self.summary = f"{folder}: {self.numbers:,} pictures, {count:,} captions{files.summary(self.skipped)}"

    def bucket(self, g: int, seed: int = 0) -> tuple[int, int]:
        """(height, width) of sample g."""
        return self.size, self.size

    @functools.lru_cache(maxsize=4)
    def order(self, seed: int, epoch: int) -> np.ndarray:
        """The shuffled order of one epoch."""
        # At another size in another order (recipe.Stage.sides)
        return rng(seed, "epoch", self.size, epoch).permutation(self.numbers)

    def number(self, g: int, seed: int = 0) -> int:
        """Which picture sample g is."""
        return int(self.order(seed, g // self.numbers)[g % self.numbers])

    def caption(self, number: int, seed: int = 0) -> str:
        return self.captions[number][0]

    def sample(self, g: int, seed: int = 0) -> Sample:
        i = self.number(g, seed)
        return Sample(self.pictures[i], draw_caption(self.captions[i], g, seed), self.keys[i])


def draw_caption(captions: list[str], g: int, seed: int) -> str:
    """The caption of sample g: one of its picture's, as (seed, g) has it."""
    number = rng(seed, "caption", g).integers(len(captions)) if len(captions) > 1 else 0
    return captions[int(number)]


# ============================================================================================================
# (c) Wrong captions
# ============================================================================================================
# The built-in captions are always right, those of the web are not, which is one thing that guidance helps with: where
# captions are wrong now and then, q(x0 | c) is a mixture of what c means and of everything else. The classifier score,
# grad log q(c | x), points out of everything else, to what c means. So the share of wrong captions is a property of
# data that can be set.


class WrongCaptions:
    """A source whose samples carry, each with probability `share`, the caption of another sample.

    Which ones do, and whose caption they carry, is a function of (seed, the sample's number): the same in every epoch.
    (Another sample's caption may say the same.) Raises DataError when all captions of the source are alike.
    """

    def __init__(self, source: Source, share: float):
        self.source, self.share, self.name = source, share, source.name
        self.buckets, self.skipped = source.buckets, source.skipped
        self.fingerprint = f"{source.fingerprint}, {share:g} of the captions wrong"
        first = source.caption(0)
        if all(source.caption(number) == first for number in range(1, source.numbers)):
            raise DataError(f"{self.name}: all captions are alike: --wrong-captions has nothing to swap")

    def bucket(self, g: int, seed: int = 0) -> tuple[int, int]:
        return self.source.bucket(g, seed)

    def sample(self, g: int, seed: int = 0) -> Sample:
        sample = self.source.sample(g, seed)
        number, numbers = self.source.number(g, seed), self.source.numbers
        random = rng(seed, "wrong captions", number)
        if random.random() >= self.share:
            return sample
        other = int(random.integers(numbers - 1))
        other += other >= number  # any sample but this one
        return sample._replace(caption=self.source.caption(other, seed))


# ============================================================================================================
# Picture grids
# ============================================================================================================


def enlarged(picture: np.ndarray, scale: int) -> Image.Image:
    """A uint8 picture [H, W, 3], each pixel as `scale` x `scale`."""
    return ImageOps.scale(Image.fromarray(picture), scale, Image.Resampling.NEAREST)


def label_grid(rows: list[list[np.ndarray]], columns: list[str], captions: list[str], scale=1) -> Image.Image:
    """A sheet: one row per caption, one column per label; rows[r][c] is a uint8 picture, enlarged `scale` times.

    Pictures may differ in size. A caption is one line, of no more letters than the sheet has pixels.
    """
    pad, top, line = 6, 18, 15
    w = scale * max(picture.shape[1] for row in rows for picture in row)
    heights = [scale * max(picture.shape[0] for picture in row) for row in rows]
    width, y = len(columns) * (w + pad) + pad, top
    sheet = Image.new("RGB", (width, top + sum(heights) + len(rows) * (line + pad) + pad), "white")
    pen = ImageDraw.Draw(sheet)
    for c, label in enumerate(columns):
        pen.text((pad + c * (w + pad), 3), label, fill="black", font=font_of(label))
    for pictures, caption, height in zip(rows, captions, heights):
        for c, picture in enumerate(pictures):
            sheet.paste(enlarged(picture, scale), (pad + c * (w + pad), y))
        text = " ".join(caption.split())[:width]
        pen.text((pad, y + height), text, fill="black", font=font_of(text))
        y += height + line + pad
    return sheet


def font_of(text: str) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes with matplotlib, or the font of this machine that has more of the letters of a text."""
    from matplotlib import font_manager  # takes a second, and only sheets need it

    dejavu, wanted = font_manager.findfont("DejaVu Sans"), {ord(c) for c in text}
    others = () if wanted <= letters(dejavu) else {font.fname for font in font_manager.fontManager.ttflist}
    others = sorted(name for name in others if "LastResort" not in name)  # which has a box for every letter
    return ImageFont.truetype(max((dejavu, *others), key=lambda name: len(wanted & letters(name))), 11)


@functools.lru_cache(maxsize=None)
def letters(font: str) -> frozenset[int]:
    """The characters that a font file has; none where it cannot be drawn with, as fonts of bitmaps."""
    from matplotlib import ft2font

    try:
        ImageFont.truetype(font, 11)
        return frozenset(ft2font.FT2Font(font).get_charmap())
    except (OSError, RuntimeError):
        return frozenset()
