"""Captioned pictures: the built-in shapes, and a folder of your own (S.2: text-to-image data).

    source = data.Shapes(32, "shapes")               # endless, seeded: GenEval in miniature
    source = data.ImageFolder("pictures/", size=32)  # images with metadata.jsonl, or a .txt beside each
    picture, caption, key = source.sample(g, seed)   # g = 0, 1, 2, ...: the global index of the sample in training

    python data.py --out shapes.png                  # looks at the built-in data: a sheet of pictures with captions

A source is a function from the global sample index g to a sample. It has no position of its own. So one integer, which
train.py counts, is the position of a run in its data, and any number of processes can share the work.
"""

import functools
import hashlib
import io
import itertools
import json
import struct
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor
from tqdm import tqdm

from engine import checkpoint, errors, machine
from engine.randomness import rng


class Sample(NamedTuple):
    """One captioned picture: uint8 [H, W, 3], its caption, and a key that names it in logs."""

    picture: np.ndarray
    caption: str
    key: str


class Source(Protocol):
    """What the loop asks of a data set; Shapes and ImageFolder below, and the sources of scale/shards.py, are such; those of
    scale/cache.py give samples that are encoded already.

    `sample` must be safe to call from several threads. All samples of one iteration must have one size.
    """

    name: str
    buckets: list[tuple[int, int]]  # every (height, width) that occurs
    skipped: dict[str, str]  # key -> reason, of samples that cannot be used
    fingerprint: str  # changes when the sequence of samples does

    def sample(self, g: int, seed: int = 0) -> Sample: ...

    def bucket(self, g: int, seed: int = 0) -> tuple[int, int]: ...

    # What WrongCaptions asks besides: its samples have the numbers 0 .. numbers - 1, in whatever order g meets them.
    numbers: int

    def number(self, g: int, seed: int = 0) -> int: ...

    def caption(self, number: int, seed: int = 0) -> str: ...


class DataError(errors.UserError):
    """The data cannot be used; the message says which file and what to do."""


def read_text(path: Path) -> str:
    """A UTF-8 text file, with or without a byte-order mark. Raises DataError for one that is something else."""
    try:
        text = errors.regular(path, DataError).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start}): save it as UTF-8"
        ) from error
    if "\0" in text:  # UTF-16 without a mark would pass
        raise DataError(f"{path} is not UTF-8 text (it holds zero bytes): save it as UTF-8")
    return text


def whole(text: str) -> str:
    """Text without halves of surrogate pairs, which JSON can carry and no tokenizer takes; each becomes one U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


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
# flat shapes on a grey background, so that a program can judge every picture exactly (scorer.py). The shade of the
# background and the sizes vary on purpose. If all pictures had one norm, the normalisation of Eq. 19 alone would give
# away part of the answer.

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
    counted_colors: bool = False  # half of the prompts that tell a number tell a colour as well


# What --data calls them. The first can be learned in minutes. In the second, the numbers are told with a colour at
# times, so that they can be learned apart from the shapes; and there are few enough words to learn all of it.
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
GAP = 1.5  # what the three leave at least between two shapes, and to the border (a test checks it)


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
    distance = signed_distance(
        item.shape, centre[None, :] - item.x, centre[:, None] - item.y, item.diameter / 2
    )
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


def holds(relation: str, a: tuple, b: tuple) -> bool:
    """Whether a = (x, y, diameter) is clearly "left of" (or ...) b: their extents do not overlap along that axis."""
    axis, sign = {"left of": (0, 1), "right of": (0, -1), "above": (1, 1), "below": (1, -1)}[relation]
    return sign * (b[axis] - a[axis]) > (a[2] + b[2]) / 2


def with_article(shape: str, color: str | None) -> str:
    return f"a {color} {shape}" if color else f"a {shape}"


def prompt_metadata(
    tag: str, shapes: list[str], colors: list[str | None], count: int = 1, relation: str = ""
) -> dict:
    """The prompt and its metadata, fields and wording as in GenEval's evaluation_metadata.jsonl."""
    items = [{"class": s, "count": count} | ({"color": c} if c else {}) for s, c in zip(shapes, colors)]
    if tag == "counting":
        many = shapes[0] + ("es" if shapes[0] == "cross" else "s")
        prompt = "a photo of " + " ".join([COUNTS[count], *filter(None, colors), many])
        exclude = {"exclude": [{"class": shapes[0], "count": count + 1}]}
        return {"tag": tag, "include": items, **exclude, "prompt": prompt}
    first = with_article(shapes[0], colors[0])
    if tag in ("single_object", "colors"):
        return {"tag": tag, "include": items, "prompt": f"a photo of {first}"}
    second = with_article(shapes[1], colors[1])
    if (
        tag == "position"
    ):  # GenEval lists the reference first: "a dog right of a cat" is [cat, dog right of object 0]
        items = [items[1], items[0] | {"position": [relation, 0]}]
        return {"tag": tag, "include": items, "prompt": f"a photo of {first} {relation} {second}"}
    return {"tag": tag, "include": items, "prompt": f"a photo of {first} and {second}"}


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


def draw_prompt(
    random: np.random.Generator, tag: str, world: World
) -> tuple[dict, list[str], list[str], str]:
    """A random prompt of a tag and what to draw for it: (metadata, shapes, colours, relation)."""
    n = 1 if tag in ("single_object", "colors") else 2
    shapes = [world.shapes[i] for i in random.permutation(len(world.shapes))[:n]]
    colors = [world.colors[i] for i in random.integers(len(world.colors), size=n)]
    if tag == "color_attr":  # two different colours, so that a swap shows
        colors = [world.colors[i] for i in random.permutation(len(world.colors))[:2]]
    if tag == "counting":
        count = 2 + int(random.integers(len(COUNTS)))
        told = colors[:1] if world.counted_colors and random.random() < 0.5 else [None]
        return prompt_metadata(tag, shapes[:1], told, count), shapes[:1] * count, colors[:1] * count, ""
    relation = RELATIONS[random.integers(len(RELATIONS))] if tag == "position" else ""
    told = list(colors)  # which colours the prompt tells
    if tag in ("single_object", "two_object"):
        told = [None] * n
    if (
        tag == "position"
    ):  # GenEval tells none here; training also tells one or both, so that the prompts can be mixed
        told = [c if random.random() < 0.5 else None for c in colors]
    return prompt_metadata(tag, shapes, told, relation=relation), shapes, colors, relation


def draw_scene(random: np.random.Generator, size: int, tag: str, world: World) -> Scene:
    """A random scene of the training distribution: no held-out pair, no held-out prompt."""
    while True:
        metadata, shapes, colors, relation = draw_prompt(random, tag, world)
        if set(zip(colors, shapes)) & HELD_OUT_PAIRS or split_of(metadata["prompt"]) != "train":
            continue
        places = place(random, len(shapes), size)
        if relation and not holds(relation, *places):
            continue
        objects = tuple(Object(s, c, *p) for s, c, p in zip(shapes, colors, places))
        return Scene(objects, int(random.integers(*GREYS)), metadata)


class Shapes:
    """Endless captioned pictures of shapes, size x size pixels; sample g is a function of (seed, g) alone.

    name is a key of SETS.
    """

    def __init__(self, size: int = 32, name: str = "shapes"):
        self.size, self.world, self.name = size, SETS[name], name
        self.buckets, self.skipped, self.fingerprint = [(size, size)], {}, f"{name} {size} {VERSION}"
        self.numbers = 2**62  # no end

    def __len__(self) -> int:
        raise TypeError("the built-in shapes are endless")

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
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")

# What Pillow raises for a broken picture.
BROKEN = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    AttributeError,
    ArithmeticError,
    MemoryError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)
MAX_PIXELS = 2**26  # 8192 x 8192: a larger picture is refused from its header, before memory is taken for it
TURNS = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}


def orientation(image: Image.Image) -> int:
    """How the camera was held, EXIF's 1 .. 8; 1 where nothing usable is said."""
    told = image.getexif().get(0x0112, 1) if "exif" in image.info else 1
    return told if told in TURNS else 1


def upright(image: Image.Image) -> Image.Image:
    """As the camera was held. (ImageOps.exif_transpose writes all of the EXIF
    data again, and fails where it is odd.)"""
    turn = TURNS.get(orientation(image))
    return image.transpose(Image.Transpose[turn]) if turn else image


def over_white(image: Image.Image) -> Image.Image:
    """A PIL image of any mode -> RGB, what is transparent over white."""
    if "A" in image.mode or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def cover(image: Image.Image, height: int, width: int) -> np.ndarray:
    """A PIL image -> uint8 [height, width, 3]: upright, over white, resized to cover (Lanczos), cropped centrally."""
    return np.asarray(ImageOps.fit(over_white(upright(image)), (width, height), Image.Resampling.LANCZOS))


def square_crop(image: Image.Image, size: int) -> np.ndarray:
    """A PIL image -> uint8 [size, size, 3], by `cover`.

    Raises ValueError for 16-bit and floating-point grey, which Pillow would clip to white, and for more than
    MAX_PIXELS.
    """
    if image.width * image.height > MAX_PIXELS:
        raise ValueError("more than 67 million pixels")
    if image.mode[0] in "IF":
        raise ValueError(f"grey of mode {image.mode}, not of 8 bits")
    return cover(image, size, size)


def read_captions(folder: Path) -> dict[str, str]:
    """File name -> caption, from metadata.jsonl (`file_name`, `text`) or from a .txt beside each picture.

    Raises DataError when the folder is missing, has no captions, or a caption line is not what it should be.
    """
    if not folder.is_dir():
        raise DataError(f"no such folder: {folder}")
    metadata = folder / "metadata.jsonl"
    if not metadata.exists():
        pictures = sorted(p for p in folder.iterdir() if p.suffix.lower() in PICTURE_SUFFIXES)
        texts = {p.name: p.with_suffix(".txt") for p in pictures}
        captions = {name: read_text(text).strip() for name, text in texts.items() if text.exists()}
        if not captions:
            raise DataError(
                f"{folder} has no captions: give it a metadata.jsonl with one line "
                '{"file_name": ..., "text": ...} per picture, or a .txt beside each picture; '
                "for tar shards, name the folder that holds the .tar files themselves"
            )
        if len(captions) < len(pictures):
            print(
                f"{folder}: {len(pictures) - len(captions)} of {len(pictures)} pictures have no .txt and are left "
                "out",
                file=sys.stderr,
            )
        lonely = {p.name for p in folder.glob("*.txt")} - {text.name for text in texts.values()}
        if lonely:
            print(
                f"{folder}: {len(lonely)} .txt, such as {min(lonely)}, have no picture of a known kind "
                f"({', '.join(PICTURE_SUFFIXES)}) and are left out",
                file=sys.stderr,
            )
        return captions
    captions = {}
    several = 0
    # JSON may hold the other characters that end lines
    for number, line in enumerate(read_text(metadata).split("\n"), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            if not isinstance(entry["file_name"], str):
                raise TypeError
            several += entry["file_name"] in captions
            captions[entry["file_name"]] = whole(entry["text"]).strip()
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise DataError(
                f'{metadata}, line {number}: expected {{"file_name": "...", "text": "..."}}, '
                f"found {line.strip()[:60]!r} ({type(error).__name__})"
            ) from error
    if not captions:
        raise DataError(f"{metadata} is empty: it needs one line per picture")
    if several:
        print(
            f"{metadata}: {several} lines name a picture once more; the last line of each picture counts",
            file=sys.stderr,
        )
    named = {folder / name for name in captions}  # paths, to which ./a.png is a.png
    unnamed = sum(p.suffix.lower() in PICTURE_SUFFIXES and p not in named for p in folder.iterdir())
    if unnamed:
        print(f"{metadata}: {unnamed} pictures beside it have no line and are left out", file=sys.stderr)
    return captions


class ImageFolder:
    """The captioned pictures of a folder, cropped square to size x size and held in memory (3 size^2 bytes each).

    Sample g is picture number g mod n of epoch g div n, in an order shuffled by (seed, epoch). A picture that cannot be
    read is skipped, counted in `skipped` and named on stderr; DataError when none is left, or when they do not fit into
    the machine's memory.
    """

    def __init__(self, folder: str | Path, size: int):
        self.folder, self.size, self.name = Path(folder), size, str(folder)
        self.buckets = [(size, size)]
        self.skipped: dict[str, str] = {}  # file name -> reason
        self.pictures: list[np.ndarray] = []
        self.captions: list[str] = []
        self.keys: list[str] = []
        captions, state = read_captions(self.folder), hashlib.sha256()
        if (needed := 3 * size**2 * len(captions)) > machine.memory():
            raise DataError(
                f"{folder}: {len(captions)} pictures of {size} x {size} take {needed / 2**30:.0f} GiB, "
                "more memory than there is: put them in tar shards, which are read as they are needed "
                f"(python -m scale.shards pack {folder} TARS)"
            )
        for name in tqdm(
            sorted(captions), desc=f"reading {folder}", unit=" pictures", leave=False, disable=None
        ):
            try:
                content = errors.regular(self.folder / name).read_bytes()
                with Image.open(io.BytesIO(content)) as image:
                    self.pictures.append(square_crop(image, size))
            except BROKEN as error:
                self.skipped[name] = f"{type(error).__name__}: {error}"
                print(f"skipped {self.folder / name}: {self.skipped[name]}", file=sys.stderr)
                continue
            self.captions.append(captions[name])
            self.keys.append(name)
            state.update(content)
        if self.skipped:
            print(f"{self.folder}: skipped {len(self.skipped)} of {len(captions)} pictures", file=sys.stderr)
        state.update(json.dumps([self.keys, self.captions, size, "order 2"]).encode())
        self.fingerprint, self.numbers = state.hexdigest(), len(self.pictures)
        if not self.pictures:
            raise DataError(f"{self.folder}: none of its {len(captions)} pictures can be read")

    def __len__(self) -> int:
        return len(self.pictures)

    def bucket(self, g: int, seed: int = 0) -> tuple[int, int]:
        """(height, width) of sample g."""
        return self.size, self.size

    @functools.lru_cache(maxsize=4)
    def order(self, seed: int, epoch: int) -> np.ndarray:
        """The shuffled order of one epoch."""
        # At another size in another order (recipe.Stage.sides)
        return rng(seed, "epoch", self.size, epoch).permutation(len(self))

    def number(self, g: int, seed: int = 0) -> int:
        """Which picture sample g is."""
        return int(self.order(seed, g // len(self))[g % len(self)])

    def caption(self, number: int, seed: int = 0) -> str:
        return self.captions[number]

    def sample(self, g: int, seed: int = 0) -> Sample:
        i = self.number(g, seed)
        return Sample(self.pictures[i], self.captions[i], self.keys[i])


# ============================================================================================================
# (c) Wrong captions
# ============================================================================================================
# The built-in captions are always right, those of the web are not, and that is what guidance is for: where captions
# are wrong now and then, q(x0 | c) is a mixture of what c means and of everything else. The classifier score, grad log
# q(c | x), points out of everything else, to what c means. So the share of wrong captions is a property of data that
# can be set.


class WrongCaptions:
    """A source whose samples carry, each with probability `share`, the caption of another sample.

    Which ones do, and whose caption they carry, is a function of (seed, the sample's number): the same in every epoch.
    (Another sample's caption may say the same.) Raises DataError when all captions of the source are alike.
    """

    def __init__(self, source: Source, share: float):
        self.source, self.share, self.name = source, share, source.name
        self.buckets, self.skipped, self.numbers = source.buckets, source.skipped, source.numbers
        self.fingerprint = f"{source.fingerprint}, {share:g} of the captions wrong"
        first = source.caption(0)
        if all(source.caption(number) == first for number in range(1, source.numbers)):
            raise DataError(
                f"{self.name}: all captions are alike, so --wrong-captions has nothing to swap: leave it out"
            )

    def __len__(self) -> int:
        return len(self.source)

    def bucket(self, g: int, seed: int = 0) -> tuple[int, int]:
        return self.source.bucket(g, seed)

    def number(self, g: int, seed: int = 0) -> int:
        return self.source.number(g, seed)

    def caption(self, number: int, seed: int = 0) -> str:
        random = rng(seed, "wrong captions", number)
        if random.random() < self.share:
            other = int(random.integers(self.numbers - 1))
            number = other + (other >= number)  # any sample but this one
        return self.source.caption(number, seed)

    def sample(self, g: int, seed: int = 0) -> Sample:
        sample = self.source.sample(g, seed)
        return sample._replace(caption=self.caption(self.source.number(g, seed), seed))


# ============================================================================================================
# Picture grids
# ============================================================================================================


def label_grid(
    rows: list[list[np.ndarray]], columns: list[str], captions: list[str], scale: int = 1
) -> Image.Image:
    """A sheet: one row per caption, one column per label; rows[r][c] is a uint8 picture, enlarged `scale` times.

    A caption is one line, of no more letters than the sheet has pixels.
    """
    h, w = (side * scale for side in rows[0][0].shape[:2])
    pad, top, line = 6, 18, 13
    width, height = len(columns) * (w + pad) + pad, top + len(rows) * (h + line + pad) + pad
    sheet = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(sheet)
    for c, label in enumerate(columns):
        pen.text((pad + c * (w + pad), 4), label, fill="black")
    for r, (pictures, caption) in enumerate(zip(rows, captions)):
        y = top + r * (h + line + pad)
        for c, picture in enumerate(pictures):
            enlarged = Image.fromarray(picture).resize((w, h), Image.Resampling.NEAREST)
            sheet.paste(enlarged, (pad + c * (w + pad), y))
        pen.text((pad, y + h), " ".join(caption.split())[:width], fill="black")
    return sheet


def main() -> None:
    import emoji  # here, because it imports this module

    parser = errors.Parser("data.py", "Draw a sheet of training pictures with their captions.")
    parser.add_argument(
        "--data",
        metavar="DIR",
        type=errors.name,
        default="one-shape",
        help=f"{', '.join((*SETS, *emoji.SETS))} or a folder of captioned pictures (default: one-shape)",
    )
    parser.add_argument(
        "--side", metavar="N", type=int, default=16, help="of the pictures, in pixels (default: 16)"
    )
    parser.add_argument("--seed", type=int, default=0, help="which pictures (default: 0)")
    parser.add_argument(
        "--out",
        type=errors.file_to_write,
        default="data.png",
        help="where to write the sheet (default: data.png)",
    )
    args = parser.parse_args()
    parser.check_ranges(args, side=(1, 1024), seed=(0, 2**63 - 1))
    if args.out.suffix.lower() != ".png":
        parser.error(f"--out must name a .png file, not {args.out}")
    known = dict.fromkeys(SETS, Shapes) | dict.fromkeys(emoji.SETS, emoji.Emoji)
    source = (
        known[args.data](args.side, args.data) if args.data in known else ImageFolder(args.data, args.side)
    )
    samples = [source.sample(g, args.seed) for g in range(24)]
    columns = [samples[i : i + 6] for i in range(0, 24, 6)]
    sheets = [
        label_grid([[s.picture] for s in column], [""], [s.caption for s in column], max(1, 256 // args.side))
        for column in columns
    ]
    whole = Image.new("RGB", (sum(sheet.width for sheet in sheets), sheets[0].height), "white")
    for i, sheet in enumerate(sheets):
        whole.paste(sheet, (i * sheet.width, 0))
    with checkpoint.in_one_piece(args.out) as partial:
        whole.save(partial, format="PNG")
    print(f"wrote {args.out}")


if __name__ == "__main__":
    errors.run(main)
