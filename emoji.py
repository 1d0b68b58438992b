"""Pictures of emoji by three makers, with captions from exact to open (S.2: text-to-image data).

    source = emoji.Emoji(32, "emoji")                # 285 animals, plants, foods; others in SETS
    picture, caption, key = source.sample(g, seed)   # a function of (seed, g), like every source of data.py

    python -m engine.feed --data emoji --side 32     # looks at them
    python train.py --data emoji --side 32           # trains on them

The first use fetches four packages by name and version with `npm pack` (160 MB, seconds) and keeps what is
needed in one file, TILES. No art is part of this repository. Its makers, and its licences:

    word    maker                          package                           licence of the art
    3D      Fluent Emoji 3D, Microsoft     @lobehub/fluent-emoji-3d 1.1.0    MIT
    soft    Noto Emoji, Google             emoji-datasource-google 16.0.0    Apache-2.0
    flat    Twemoji, Twitter and others    emoji-datasource-twitter 16.0.0   CC BY 4.0
    (labels, tags, groups: Emojibase, emojibase-data 17.0.0, MIT)

What a caption leaves open is the point of this world:

    kind     share of samples   for example                     pictures that it fits, of 855
    exact    .4                 "a 3D fox"                      1
    label    .2                 "a fox"                         3, one a maker
    tag      .3                 "a bird", "a breakfast"         12 to 333: all whose concept has this tag
    group    .1                 "mammals", "marine life"        all of a subgroup

The words are Emojibase's; ours are the three for the makers, and the articles. Tags are as people gave them:
they overlap ("a bird" is both a label and a tag), and not all name things ("a red").
"""

import hashlib
import io
import json
import re
import shutil
import subprocess
import tarfile
import tempfile
import zipfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

import data
import files
from engine import checkpoint
from rng import rng

TILES = Path(__file__).parent / "emoji-tiles" / "tiles.npz"
TILE = 64  # pixels a side, the size of the smaller originals; pictures of other sides are made from these
VERSION = 1  # of what follows from the tiles; goes up when the same sample becomes another

# The word in captions -> package, version, and where in it the picture of a code lies.
MAKERS = {
    "3D": ("@lobehub/fluent-emoji-3d", "1.1.0", r"package/assets/(.+)\.webp"),
    "soft": ("emoji-datasource-google", "16.0.0", r"package/img/google/64/(.+)\.png"),
    "flat": ("emoji-datasource-twitter", "16.0.0", r"package/img/twitter/64/(.+)\.png"),
}
CREDIT = "Trained on Fluent Emoji 3D by Microsoft (MIT), Noto Emoji by Google (Apache-2.0) and Twemoji by Twitter and "
CREDIT += "others (CC BY 4.0)."
WORDS = ("emojibase-data", "17.0.0")  # labels, tags, groups
PACKAGES = [f"{name}@{version}" for name, version, *_ in (*MAKERS.values(), WORDS)]

# What --data calls them -> groups of Emojibase, or subgroups: 285, 57 and 1,015 concepts. People, symbols and flags are
# left out: many differ in little, or are writing.
SOME = ("animals-nature", "food-drink")
SETS = {
    "emoji": SOME,
    "emoji-few": ("birds", "marine life", "fruit"),
    "emoji-all": ("smileys-emotion", *SOME, "travel-places", "activities", "objects"),
}
SETS["emoji-named"] = SETS["emoji-all"]
NAMED = {"emoji-named": 2 / 3}  # the share of tags and groups that come with the maker, too: "a soft bird"
KINDS = {"exact": 0.4, "label": 0.2, "tag": 0.3, "group": 0.1}  # of caption -> share of samples
FEWEST = 4  # concepts that share a tag, 12 pictures; a tag of fewer is nearly a label, and not used
SHIFT = 1  # pixels, in both directions. No flips: they would leave a side open where the caption is exact.
SPLIT = 1009  # of the held-out pairs


class Concept(NamedTuple):
    """What an emoji means: Unicode's code in small hexadecimal digits, and Emojibase's words for it."""

    code: str
    label: str
    tags: list[str]
    subgroup: str
    group: str


class Caption(NamedTuple):
    """One of the captions that a picture may carry, with its probability there."""

    kind: str
    text: str
    share: float


def plain(code: str) -> str:
    """A code as the makers can be compared by: without the mark for "as a picture", which not all write."""
    return code.lower().replace("-fe0f", "")


def fetch(folder: Path) -> list[Path]:
    """Fetch PACKAGES into a folder; returns the archives in their order.

    Raises DataError where npm is missing or fails.
    """
    npm = shutil.which("npm")
    if npm is None:
        way_out = f"install Node.js, which has it, or copy {TILES.parent.name}/{TILES.name} from where it is"
        raise data.DataError(f"--data emoji fetches its pictures with npm, which is missing: {way_out}")
    print(f"fetching {', '.join(PACKAGES)} (160 MB)", flush=True)
    options = ["--loglevel=error", "--ignore-scripts", f"--pack-destination={folder}"]
    quiet = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True}
    done = subprocess.run([npm, "pack", *options, *PACKAGES], **quiet)
    if done.returncode:
        first = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[0]
        raise data.DataError(f"npm could not fetch the emoji ({first}): try again when the network is there")
    # npm's name of an archive: @a/b 1.0 -> a-b-1.0.tgz
    return [folder / (re.sub("[@/]", "-", package).lstrip("-") + ".tgz") for package in PACKAGES]


def read_pictures(archive: Path, pattern: str) -> dict[str, bytes]:
    """The pictures of a maker's archive, as files: plain code -> content."""
    found = {}
    with tarfile.open(archive) as tar:
        for member in tar:
            if match := re.fullmatch(pattern, member.name):
                found[plain(match[1])] = tar.extractfile(member).read()
    return found


def read_concepts(archive: Path) -> list[Concept]:
    """What Emojibase says of every emoji that has a group, in its order."""
    with tarfile.open(archive) as tar:
        entries, messages, names = (
            json.load(tar.extractfile(f"package/{name}.json"))
            for name in ("en/data", "en/messages", "meta/groups")
        )
    subgroups = {entry["key"]: entry["message"] for entry in messages["subgroups"]}
    concepts = []
    for entry in entries:
        if "group" in entry:
            code, subgroup = plain(entry["hexcode"]), names["subgroups"][str(entry["subgroup"])]
            group = names["groups"][str(entry["group"])]
            concepts.append(Concept(code, entry["label"], entry.get("tags", []), subgroups[subgroup], group))
    return concepts


def tile(content: bytes) -> np.ndarray:
    """A picture file -> uint8 [TILE, TILE, 3], over white."""
    with Image.open(io.BytesIO(content)) as image:
        return files.cover(image, TILE, TILE)


def prepare(path: Path) -> None:
    """Fetch the packages; write tiles and words of the concepts that all makers drew to one file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        *archives, words = fetch(Path(folder))
        drawn = [read_pictures(archive, maker[2]) for archive, maker in zip(archives, MAKERS.values())]
        concepts = [concept for concept in read_concepts(words) if concept.group in SETS["emoji-all"]]
        concepts = [concept for concept in concepts if all(concept.code in maker for maker in drawn)]
        tiles = np.stack([[tile(maker[concept.code]) for maker in drawn] for concept in concepts])
    write(path, tiles, concepts)
    print(f"wrote {path}: {len(concepts):,} concepts by {len(MAKERS)} makers (their licences: emoji.py)")


def write(path: Path, tiles: np.ndarray, concepts: list[Concept]) -> None:
    """Write the one file: tiles uint8 [concepts, makers, TILE, TILE, 3], words and versions as JSON."""
    with checkpoint.in_one_piece(path, shared=True) as partial:  # several processes may be the first
        with open(partial, "wb") as file:
            words = {"concepts": json.dumps(concepts), "packages": json.dumps(PACKAGES)}
            np.savez_compressed(file, tiles=tiles, **words)


def read(path: Path) -> tuple[np.ndarray, list[Concept]]:
    """The tiles and concepts of the one file, fetched first where it is missing."""
    if not path.exists():
        prepare(path)
    try:
        with np.load(path) as file:
            tiles, concepts, packages = (
                file["tiles"],
                str(file["concepts"]),
                json.loads(str(file["packages"])),
            )
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise data.DataError(f"{path} is damaged ({error}): remove it, and it is fetched again") from error
    if packages != PACKAGES:
        others, ours = ", ".join(packages), ", ".join(PACKAGES)
        raise data.DataError(f"{path} is of {others}: remove it, and {ours} are fetched")
    return tiles, [Concept(*entry) for entry in json.loads(concepts)]


def with_article(words: str) -> str:
    """ "a fox", "an octopus"; no article before what ends like a plural."""
    if re.search("[^us]s$", words):
        return words
    return ("an " if re.match("(?!uni|one|eu|ew)[aeiou]|hour|x-", words) else "a ") + words


def held_out(code: str) -> int:
    """The number of the maker whose picture of a concept is never shown in training; 3 to 9 are nobody's.

    So a tenth of the (concept, maker) pairs are held out, and two makers at least show every concept.
    """
    return int.from_bytes(hashlib.sha256(f"{SPLIT} {code}".encode()).digest()[:4], "little") % 10


def shifted(picture: np.ndarray, down: int, right: int) -> np.ndarray:
    """A picture [H, W, 3] moved by at most SHIFT pixels, white where nothing was."""
    height, width = picture.shape[:2]
    wide = np.pad(picture, ((SHIFT, SHIFT), (SHIFT, SHIFT), (0, 0)), constant_values=255)
    return wide[SHIFT - down : SHIFT - down + height, SHIFT - right : SHIFT - right + width]


class Emoji:
    """Endless captioned pictures of emoji, side x side pixels; sample g is a function of (seed, g) alone.

    name is a key of SETS. pictures is uint8 [concepts, makers, side, side, 3], pairs the (concept, maker) of
    training, held_out_pairs the others. Raises DataError for a side above TILE, and as `fetch` does.
    """

    def __init__(self, side: int = 32, name: str = "emoji", path: Path | None = None):
        if side > TILE:
            raise data.DataError(f"the emoji have {TILE} x {TILE} pixels: choose a side of at most {TILE}")
        tiles, concepts = read(path or TILES)
        groups = set(SETS[name])
        chosen = [i for i, concept in enumerate(concepts) if groups & {concept.group, concept.subgroup}]
        self.side, self.name = side, name
        self.concepts = [concepts[i] for i in chosen]
        self.pictures = np.stack([[self.resized(t) for t in tiles[i]] for i in chosen])
        every = [(i, m) for i in range(len(chosen)) for m in range(len(MAKERS))]
        self.held_out_pairs = [(i, m) for i, m in every if held_out(self.concepts[i].code) == m]
        self.pairs = [pair for pair in every if pair not in set(self.held_out_pairs)]
        count = Counter(tag for concept in self.concepts for tag in concept.tags)
        self.tags = {tag for tag in count if count[tag] >= FEWEST}
        self.buckets, self.skipped, self.numbers = {(side, side): 1.0}, {}, 2**62  # no end
        words = hashlib.sha256(json.dumps([self.concepts, PACKAGES]).encode()).hexdigest()
        self.fingerprint = f"{name} {side} {VERSION} {words}"

    def resized(self, picture: np.ndarray) -> np.ndarray:
        """A tile at the source's side."""
        return np.asarray(Image.fromarray(picture).resize((self.side, self.side), Image.Resampling.LANCZOS))

    def captions(self, concept: int, maker: int) -> list[Caption]:
        """Every caption that a picture may carry. Without a shared tag, the group's name takes that share."""
        _, label, tags, subgroup, _ = self.concepts[concept]
        tags = [tag for tag in tags if tag in self.tags]
        share = KINDS if tags else KINDS | {"tag": 0.0, "group": KINDS["tag"] + KINDS["group"]}
        word, named = list(MAKERS)[maker], NAMED.get(self.name, 0.0)
        captions = [
            Caption("exact", with_article(f"{word} {label}"), share["exact"]),
            Caption("label", with_article(label), share["label"]),
        ]
        several = [
            ("tag", with_article(tag), with_article(f"{word} {tag}"), share["tag"] / len(tags))
            for tag in tags
        ]
        several.append(("group", subgroup, f"{word} {subgroup}", share["group"]))
        captions += [Caption(kind, text, part * (1 - named)) for kind, text, _, part in several]
        if named:
            captions += [Caption("named", text, part * named) for _, _, text, part in several]
        return captions

    def carriers(self, pairs: list[tuple[int, int]]) -> dict[str, dict[tuple[int, int], float]]:
        """Every caption -> those of the (concept, maker) pairs that may carry it, and its probability there.

        A caption of several kinds is one caption: "a bird" is a label of one concept, and a tag of others.
        """
        found = {}
        for pair in pairs:
            for caption in self.captions(*pair):
                shares = found.setdefault(caption.text, {})
                shares[pair] = shares.get(pair, 0.0) + caption.share
        return found

    def prompts(self, kind: str) -> list[str]:
        """The captions of a kind that training shows, in alphabetical order."""
        return sorted({c.text for pair in self.pairs for c in self.captions(*pair) if c.kind == kind})

    def bucket(self, g: int, seed: int = 0) -> tuple[int, int]:
        """(height, width) of sample g."""
        return self.side, self.side

    def drawn(self, g: int, seed: int) -> tuple[int, int, str, np.ndarray]:
        """(concept, maker, caption, how far the picture is moved down and right) of sample g."""
        random = rng(seed, "emoji", g)
        concept, maker = self.pairs[random.integers(len(self.pairs))]
        captions = self.captions(concept, maker)
        caption = captions[random.choice(len(captions), p=[c.share for c in captions])]
        return concept, maker, caption.text, random.integers(-SHIFT, SHIFT + 1, 2)

    def sample(self, g: int, seed: int = 0) -> data.Sample:
        concept, maker, caption, move = self.drawn(g, seed)
        key = f"{self.concepts[concept].code}-{list(MAKERS)[maker]}"
        return data.Sample(shifted(self.pictures[concept, maker], *move), caption, key)

    def number(self, g: int, seed: int = 0) -> int:
        return g

    def caption(self, number: int, seed: int = 0) -> str:
        return self.drawn(number, seed)[2]
