"""A data set in tar shards, read map-style: any sample by its number, in an order that follows from (seed, number).

    python -m scale.shards pictures/ tars/                      # a folder of pictures -> tar shards, to try it
    python -m engine.feed --data tars/ --side 256 --workers 16  # index them; counts, buckets, what is left out
    python -m scale.cache tars/ cache256/ --side 256 --fake     # encode them once, with the frozen encoders

    source = shards.Shards("tars/", side=256, batch_size=1024)  # pictures, decoded as they are asked for
    sample = source.sample(g, seed)                             # g = 0, 1, 2, ...: the global sample index

A shard is a .tar in the layout of WebDataset and img2dataset: `000000000.jpg` with its caption in `000000000.txt` or
`000000000.json`, or in any other form that a folder may have (files.py). Each tar is read once for an index
(name.tar.index and name.tar.captions, beside it or in a folder of your choice), and afterwards a sample is two reads at
known offsets. So a run's place in its data is one integer, not the content of a shuffle buffer, and any number of
processes sees one sequence.

A batch is one tensor, so its pictures have one size: each aligned block of batch_size consecutive g has one bucket.

    buckets     (height, width), multiples of 16 (`multiple`; 4 for laptop), areas near side^2, 1:2 to 2:1; S.2 says
                only "varying aspect-ratio"
    a picture   goes to the bucket of nearest log aspect ratio, is resized to cover it (Lanczos) and cropped centrally
    an epoch    takes from a bucket of n pictures as many blocks as n fills, and shuffles the blocks of all buckets
    the rest    of a bucket is neither dropped nor doubled: it opens that bucket's first block of the next epoch

A tar that cannot be read (truncated, compressed, without captions) is a DataError that names it; a single sample that
cannot be used is left out, counted and named.
"""

import functools
import hashlib
import io
import json
import math
import os
import re
import shlex
import sys
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

import numpy as np
from tqdm import tqdm

import data
import files
from engine import errors
from engine.checkpoint import CheckpointError, in_one_piece
from files import DataError, Unusable
from rng import rng

VERSION = 5  # of what an index holds
HEAD = 2**16  # bytes of a picture that nearly always hold its header
WIDEST = 2.0  # the largest ratio of two sides; what is wider is cropped to it
PACKED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # how gzip, bzip2, xz and zstd begin


# ============================================================================================================
# The index of a tar
# ============================================================================================================
# One row per usable sample: where the picture lies in the tar, and its key and captions in the .captions file; what
# bucketing needs to know; and a checksum of these texts and of the picture's first bytes, by which other content of the
# same length is noticed.
ROW = np.dtype(
    [("offset", "<i8"), ("size", "<i8"), ("width", "<i4"), ("height", "<i4")]
    + [("text_offset", "<i8"), ("text_size", "<i4"), ("check", "<u4")]
)


class Index(NamedTuple):
    """The samples of several tars: sample n lies in tars[shard[n]], as rows[n] says."""

    tars: list[Path]
    texts: list[Path]  # of each tar, [key, caption, ...] of its samples
    shard: np.ndarray  # [N]
    rows: np.ndarray  # [N] of ROW
    captions: int
    skipped: dict[str, str]  # key -> reason


def read_at(file, offset: int, size: int) -> bytes:
    file.seek(offset)
    return file.read(size)


def members(tar: Path, file) -> tuple[dict[str, tuple[int, int]], dict[str, str]]:
    """(name -> (offset, size) of the files in a tar, left out -> reason). Raises DataError naming the tar."""
    found, left_out = {}, {}
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            for member in filter(tarfile.TarInfo.isreg, archive):
                place = member.offset_data, member.size
                if found.setdefault(member.name.removeprefix("./"), place) != place:
                    left_out[f"{member.name} at byte {member.offset}"] = "second file of its name"
            end = archive.offset
    except (tarfile.TarError, ValueError, OverflowError, OSError) as error:
        if read_at(file, 0, 8).startswith(PACKED):
            raise DataError(f"{tar} is compressed, so no sample can be read by itself: gunzip it") from error
        raise DataError(f"{tar} is truncated or not a tar ({error}): fetch or make it again") from error
    if read_at(file, end, 512) != bytes(512):  # tarfile takes a tar cut between two members for a whole one
        raise DataError(f"{tar} is truncated or damaged at byte {end}: fetch or make it again")
    if any(chunk.strip(b"\0") for chunk in iter(functools.partial(file.read, 2**20), b"")):
        left_out[f"{tar.name} from byte {end} on"] = "behind a tar's end mark, such as a second tar"
    return found, left_out


def scan(tar: Path, caption_key: str | None = None) -> tuple[np.ndarray, list[bytes], int, dict[str, str]]:
    """Read a tar: (index rows, their texts, how many captions, left out name -> reason). Raises DataError."""
    with open(tar, "rb") as file:
        places, left_out = members(tar, file)

        def read(name: str, most: int = sys.maxsize) -> bytes:
            if name not in places:
                raise Unusable("no such file")
            offset, size = places[name]
            return read_at(file, offset, min(size, most))

        found, unpaired = files.pair(list(places), read, caption_key)
        left_out |= unpaired
        rows, texts, at, count = [], [], 0, 0
        for name, captions in found.items():
            try:
                head = read(name, HEAD)
                try:
                    size = files.upright_size(head)
                except Unusable:
                    size = files.upright_size(read(name))
            except Unusable as error:
                left_out[name] = str(error)
                continue
            texts.append(json.dumps([f"{tar.stem}/{name.rpartition('.')[0]}", *captions]).encode())
            rows.append((*places[name], *size, at, len(texts[-1]), zlib.crc32(texts[-1], zlib.crc32(head))))
            at, count = at + len(texts[-1]), count + len(captions)
    if not rows:
        raise DataError(f"{tar} holds no picture with a caption that can be used{files.summary(left_out)}")
    return np.array(rows, ROW), texts, count, left_out


def index_of(tar: Path, place: Path, caption_key: str | None) -> tuple[np.ndarray, int, dict[str, str]]:
    """The index of a tar (rows, captions, left out), read from PLACE.index or made and written there, with the texts in
    PLACE.captions.

    An index holds while the tar's size and modification time stay what they were.
    """
    index, texts = (place.with_name(f"{place.name}.{kind}") for kind in ("index", "captions"))
    if not tar.is_file():
        raise DataError(f"no such tar: {tar}")
    stamp = f"{VERSION} {tar.stat().st_size} {tar.stat().st_mtime_ns}"
    if index.exists() and texts.exists():
        with np.load(index, allow_pickle=False) as stored:
            if str(stored["stamp"]) == stamp:
                return stored["rows"], int(stored["captions"]), json.loads(str(stored["left_out"]))
    rows, lines, captions, left_out = scan(tar, caption_key)
    try:
        with in_one_piece(texts, shared=True) as partial:
            partial.write_bytes(b"".join(lines))
        with in_one_piece(index, shared=True) as partial, open(partial, "wb") as file:
            np.savez(file, stamp=stamp, rows=rows, captions=captions, left_out=json.dumps(left_out))
    except CheckpointError as error:  # no permission, or a file system that can only be read
        raise DataError(f"{error}: --index names a folder") from error
    return rows, captions, left_out


# ------------------------------------------------------------------------------------------------------------
# The index of several
# ------------------------------------------------------------------------------------------------------------
TAR = re.compile(r"\.(tar|tgz|tar\.(gz|bz2|xz|zst))$")  # a compressed one is refused with the reason
RANGE = re.compile(r"(.*)\{(\d+)\.\.(\d+)\}(.*)")  # {00000..00012}.tar


def find_tars(name: str) -> tuple[dict[str, Path], dict[str, str]]:
    """(label -> tar of those that --data NAME means, what lies beside them in its folder -> why it is left out).

    NAME is a tar, a range of them, or a folder with tars in it or below; of anything else there are none.
    """
    tars, beside = {}, {}
    if Path(name).is_dir():
        for below in files.walk(Path(name), beside):
            if below.endswith(".tar") and not below.rpartition("/")[2].startswith("."):
                tars[below.replace("/", "-")] = Path(name, below)
            elif TAR.search(below):
                beside[below] = "compressed"
            elif files.ending(below) in files.PICTURES:
                beside[below] = "beside the tars"
    elif match := RANGE.fullmatch(name):
        before, first, last, after = match.groups()
        names = [f"{before}{n:0{len(first)}}{after}" for n in range(int(first), int(last) + 1)]
        tars = {Path(n).name: Path(n) for n in names if TAR.search(n)}
    elif TAR.search(name):
        tars = {Path(name).name: Path(name)}
    return tars, beside


def read_index(names, folder: str | None = None, caption_key: str | None = None, workers: int = 1) -> Index:
    """The index of all tars that `names` mean, kept in a folder of its own, or (None) beside the tars.

    Raises DataError for the first tar that cannot be used. Commands that start together on tars without an index, such as
    parts of a cache, each read them all: look at them (engine/feed.py) first.
    """
    tars, skipped = {}, {}
    for name in map(str, [names] if isinstance(names, (str, Path)) else names):
        found, beside = find_tars(name)
        if again := tars.keys() & found.keys():
            raise DataError(f"two tars are called {min(again)}: give one of them another name")
        if not found:
            raise DataError(f"{name} holds no .tar" if Path(name).exists() else f"no such folder: {name}")
        tars |= found
        skipped |= beside
    if folder is not None:
        Path(folder).mkdir(parents=True, exist_ok=True)
    places = [tar if folder is None else Path(folder, label) for label, tar in tars.items()]
    if caption_key:  # an index of its own, as another run may be reading the other one
        places = [place.with_name(f"{place.name}.{quote(caption_key, safe='')}") for place in places]
    one = functools.partial(index_of, caption_key=caption_key)
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn")) if workers > 1 else nullcontext()
    with pool:
        parts = (pool.map if workers > 1 else map)(one, tars.values(), places)
        parts = list(tqdm(parts, total=len(tars), desc="indexing", unit=" tars", leave=False, disable=None))
    for label, (_, _, left_out) in zip(tars, parts):
        skipped |= {f"{label.removesuffix('.tar')}/{name}": why for name, why in left_out.items()}
    shard = np.repeat(np.arange(len(tars), dtype=np.int32), [len(rows) for rows, _, _ in parts])
    rows, captions = np.concatenate([part[0] for part in parts]), sum(part[1] for part in parts)
    texts = [place.with_name(f"{place.name}.captions") for place in places]
    return Index(list(tars.values()), texts, shard, rows, captions, skipped)


# ============================================================================================================
# Aspect-ratio buckets
# ============================================================================================================


def check_sides(sides: tuple[int, ...], multiple: int) -> None:
    """Raise DataError for a side that is no multiple of the auto-encoder's factor times the patch."""
    for side in sides:
        if side % multiple:
            raise DataError(f"the side of the pictures must be a multiple of {multiple}, not {side}")


def bucket_sides(side: int, multiple: int = 16) -> list[tuple[int, int]]:
    """The buckets of a stage, (height, width) from tallest to widest: multiples of `multiple`, areas near side^2.

    For each width from the square's to sqrt(WIDEST) times it, the height that comes nearest to the area; and each of
    them turned. side 256 has 13, side 512 has 27. Raises DataError for a side that is no multiple.
    """
    check_sides((side,), multiple)
    n = side // multiple
    wide = [(round(n * n / w), w) for w in range(n, int(n * math.sqrt(WIDEST)) + 1)]
    wide = [(h, w) for h, w in wide if w <= WIDEST * h]
    sides = {(h * multiple, w * multiple) for h, w in wide} | {(w * multiple, h * multiple) for h, w in wide}
    return sorted(sides, key=lambda bucket: bucket[1] / bucket[0])


def choose_buckets(rows: np.ndarray, buckets: list, smallest: int) -> tuple[list, np.ndarray]:
    """(the buckets in use, [N] which of them each picture belongs to), by the nearest log aspect ratio.

    A bucket with fewer than `smallest` pictures is given up, the emptiest first, and its pictures go to their next
    nearest one: a block of 64 made of the three panoramas that there are would be three pictures, not 64.
    """
    ratio = np.log(rows["width"] / rows["height"])
    ordered, used = np.sort(ratio), list(buckets)
    while True:
        logs = np.log([w / h for h, w in used])
        edges = (logs[1:] + logs[:-1]) / 2
        counts = np.diff(np.concatenate([[0], np.searchsorted(ordered, edges), [len(rows)]]))
        if counts.min() >= smallest or len(used) == 1:
            return used, np.searchsorted(edges, ratio, side="right")
        del used[min(range(len(used)), key=lambda k: (counts[k], -abs(logs[k])))]


class Blocks:
    """Which picture stands at global index g, for buckets of counts[k] pictures: blocks of batch_size, one bucket each.

    Each bucket is an endless stream: its pictures in an order shuffled by (seed, pass), then again in another order,
    and so on. A block is the next batch_size pictures of one stream. By the end of epoch e = 0, 1, ... a bucket of n
    pictures has given floor((e + 1) n / batch_size) blocks; those that epoch e adds, over all buckets, stand in an
    order shuffled by (seed, e). So after e epochs each picture has been shown e or e - 1 times (if no bucket is smaller
    than a block), and at every moment the showings of two pictures of one bucket differ by at most 1.
    """

    def __init__(self, counts: list[int], batch_size: int, side: int = 0):
        self.counts, self.batch_size, self.side = np.array(counts, np.int64), batch_size, side

    def before(self, epoch: int) -> np.ndarray:
        """[buckets] the blocks that each bucket has given before an epoch."""
        return epoch * self.counts // self.batch_size

    @functools.lru_cache(maxsize=4)
    def order(self, seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The blocks of an epoch: ([blocks] their bucket, [blocks] their number in that bucket's stream)."""
        first, end = self.before(epoch), self.before(epoch + 1)
        bucket = np.repeat(np.arange(len(first)), end - first)
        bucket = rng(seed, "blocks", self.side, epoch).permutation(bucket)
        number = np.empty_like(bucket)
        for k in range(len(first)):
            number[bucket == k] = np.arange(first[k], end[k])
        return bucket, number

    @functools.lru_cache(maxsize=128)
    def shuffled(self, seed: int, bucket: int, turn: int) -> np.ndarray:
        """One pass over a bucket's pictures."""
        return rng(seed, "bucket", self.side, bucket, turn).permutation(self.counts[bucket]).astype(np.uint32)

    def block(self, g: int, seed: int) -> tuple[int, int]:
        """(bucket, number in its stream) of the block that g belongs to."""
        b = g // self.batch_size
        epoch = b * self.batch_size // int(self.counts.sum())  # at most the true one, and near it
        while self.before(epoch + 1).sum() <= b:
            epoch += 1
        bucket, number = self.order(seed, epoch)
        place = b - int(self.before(epoch).sum())
        return int(bucket[place]), int(number[place])

    def locate(self, g: int, seed: int) -> tuple[int, int]:
        """(bucket, which of its pictures) of global index g."""
        bucket, number = self.block(g, seed)
        turn, i = divmod(number * self.batch_size + g % self.batch_size, int(self.counts[bucket]))
        return bucket, int(self.shuffled(seed, bucket, turn)[i])


# ============================================================================================================
# The source
# ============================================================================================================


class Shards:
    """The captioned pictures of tars, in blocks of batch_size pictures of one size (the text on top).

    names       what --data has: a folder, tars, ranges of tars
    side        of the square bucket, in pixels; all buckets have about its area
    batch_size  the global one, over all processes and micro-batches: batch i is g = i * batch_size and what follows
    multiple    of which all sides are multiples: the auto-encoder's factor times the patch, 16 for FLUX
    index       the folder of the index, by default beside the tars
    caption_key of captions in tables and .json, if not one of files.KEYS
    """

    def __init__(self, names, side: int, batch_size: int, *, multiple=16, index=None, caption_key=None):
        self.name = str(names) if isinstance(names, (str, Path)) else " ".join(map(str, names))
        self.index = read_index(names, index, caption_key)
        rows, tars, captions = self.index.rows, self.index.tars, self.index.captions
        self.numbers, self.skipped, self.broken = len(rows), self.index.skipped, set()
        self.summary = f"{self.name}: {len(rows):,} pictures in {len(tars):,} tars, {captions:,} captions"
        self.summary += files.summary(self.skipped)
        if self.numbers < batch_size:
            raise DataError(f"{self.summary}; one batch has {batch_size}: lower the batch size or add shards")
        self.sides, bucket = choose_buckets(rows, bucket_sides(side, multiple), batch_size)
        self.members = [np.flatnonzero(bucket == k) for k in range(len(self.sides))]
        counts = [len(members) for members in self.members]
        self.buckets = {sides: count / len(rows) for sides, count in zip(self.sides, counts)}
        self.blocks = Blocks(counts, batch_size, side)
        order = ["order 3", [tar.name for tar in tars], [*zip(self.sides, counts)]]
        state = hashlib.sha256(json.dumps(order).encode())  # all that the order of samples follows from
        for part in (self.index.shard, rows):
            state.update(part.tobytes())
        self.fingerprint = state.hexdigest()

    def bucket(self, g: int, seed: int = 0) -> tuple[int, int]:
        """(height, width) of sample g, and of its whole block; nothing is read."""
        return self.sides[self.blocks.block(g, seed)[0]]

    def text(self, n: int) -> list[str]:
        """[key, caption, ...] of sample n of the index."""
        row = self.index.rows[n]
        with open(self.index.texts[self.index.shard[n]], "rb") as file:
            return json.loads(read_at(file, row["text_offset"], row["text_size"]))

    def content(self, n: int) -> bytes:
        """The file of picture n. Raises DataError where its tar has become shorter.

        The tar is opened for each: threads and forked processes share no position, and no number of tars exhausts the
        file descriptors.
        """
        tar, row = self.index.tars[self.index.shard[n]], self.index.rows[n]
        with open(tar, "rb") as file:
            content = read_at(file, row["offset"], row["size"])
        if len(content) != row["size"]:
            raise DataError(f"{tar} has become shorter since it was indexed: fetch or make it again")
        return content

    def from_here(self, k: int, i: int) -> Iterator[int]:
        """Picture i of bucket k, and the next ones in the order of the tars, which stand for it where it is broken: a
        function of the data alone, so every process replaces it by the same."""
        members = self.members[k]
        return (int(members[j % len(members)]) for j in range(i, i + len(members)))

    def picture(self, k: int, i: int) -> tuple[np.ndarray, list[str], str]:
        """(uint8 [H, W, 3], its captions, its key) of picture i of bucket k, or of what stands for it."""
        for n in self.from_here(k, i):
            key, *captions = self.text(n)
            try:
                return files.cover(files.opened(self.content(n)), *self.sides[k]), captions, key
            except Unusable as error:
                self.broken.add(n)
                self.skipped[key] = str(error)
        raise DataError(f"{self.name}: no picture of bucket {self.sides[k]} can be decoded")

    def sample(self, g: int, seed: int = 0) -> data.Sample:
        """Sample g of the sequence that belongs to `seed`."""
        picture, captions, key = self.picture(*self.blocks.locate(g, seed))
        return data.Sample(picture, data.draw_caption(captions, g, seed), key)

    def number(self, g: int, seed: int = 0) -> int:
        """Which picture sample g is, as its number in the index; where it is found broken, what stands for it."""
        return next(n for n in self.from_here(*self.blocks.locate(g, seed)) if n not in self.broken)

    def caption(self, number: int, seed: int = 0) -> str:
        """The first caption of a picture, whatever the state of its pixels."""
        return self.text(number)[1]


# ============================================================================================================
# Making tars
# ============================================================================================================


def pack(folder: str, out: str | Path, per_shard: int = 1000, caption_key: str | None = None) -> str:
    """Put the pictures of a folder (files.find) in tars, unchanged; returns what to say of it.

    Sample 000120007 is number 7 of 00012.tar: the picture, and a .json with its captions and its old name. `out`
    appears in one piece, when all is written. Raises DataError when it exists.
    """
    folder, out = Path(folder), Path(out)
    if out.exists():
        raise DataError(f"{out} exists: choose a new folder for the shards")
    found, kinds = files.find(folder, caption_key), {}
    for name in sorted(found.captions):
        try:
            kinds[name] = files.opened(found.read(name), decode=False).format.lower()
        except Unusable as error:
            found.left_out[name] = str(error)
    if not kinds:
        raise DataError(f"{folder}: none of its pictures can be packed{files.summary(found.left_out)}")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f"{out.name}-") as place:
        partial = Path(place, "tars")
        partial.mkdir()
        for shard, first in enumerate(range(0, len(kinds), per_shard)):
            with tarfile.open(partial / f"{shard:05d}.tar", "w", format=tarfile.USTAR_FORMAT) as archive:
                for i, name in enumerate(list(kinds)[first : first + per_shard]):
                    entry = json.dumps({"caption": found.captions[name], "file_name": name})
                    for kind, content in ((kinds[name], found.read(name)), ("json", entry.encode())):
                        member = tarfile.TarInfo(f"{shard:05d}{i:04d}.{kind}")
                        member.size = len(content)
                        archive.addfile(member, io.BytesIO(content))
        os.replace(partial, out)
    return f"packed {len(kinds):,} pictures of {folder}{files.summary(found.left_out)}"


def main() -> None:
    parser = errors.Parser("-m scale.shards FOLDER OUT", "Put a folder of captioned pictures in tar shards.")
    a = parser.add_argument
    a("folder", metavar="FOLDER", type=errors.name, help="pictures with captions, see files.py")
    a("out", metavar="OUT", type=errors.name, help="a new folder for the tars")
    a("--per-shard", metavar="N", type=int, default=1000, help="pictures a tar")
    a("--caption-key", metavar="NAME", help=files.KEY_HELP)
    args = parser.parse_args()
    parser.check_ranges(args, per_shard=(1, 10**4))  # a key has four digits for the place in its tar
    print(pack(args.folder, args.out, args.per_shard, args.caption_key))
    print(f"to look at them:\n  python -m engine.feed --data {shlex.quote(args.out)} --side 256")


if __name__ == "__main__":
    errors.run(main, "stopped; nothing is half-written, the same command begins again")
