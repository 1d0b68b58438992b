"""A data set in tar shards, read map-style: any sample by its number, in an order that follows from (seed, number).

    python -m scale.shards pack pictures/ tars/                # a folder of pictures -> tar shards, to try it
    python -m scale.shards report tars/ --workers 16           # index them; counts, sizes, buckets, what is skipped
    python -m scale.cache tars/ cache256/ --side 256 --fake    # encode them once, with the frozen encoders

    source = shards.Shards("tars/", side=256, batch_size=1024)          # pictures, decoded as they are asked for
    source = shards.Mixed([shards.Shards("tars/", 256, 768), shards.Shards("tars/", 512, 768)])     # S.2, second stage
    sample = source.sample(g, seed)                                     # g = 0, 1, 2, ...: the global sample index

A shard is a .tar in the layout of WebDataset and img2dataset: the files of a sample share their name up to the first
dot, `000000000.jpg` (or .jpeg, .png, .webp) with its caption in `000000000.txt`, or in `000000000.json` under "caption"
or "text". WebDataset streams shards through a shuffle buffer, whose content is part of a run's state. Here each tar is
read once for an index (name.tar.index, beside it or in a folder of your choice), and afterwards a sample is two reads
at known offsets. So a run's place in its data is one integer, and any number of processes sees one sequence.

A batch is one tensor, so its pictures have one size: each aligned block of batch_size consecutive g has one bucket.

    buckets     (height, width), multiples of 16 (`multiple`; 4 for laptop), areas near side^2, 1:2 to 2:1 (S.2: varying
                aspect-ratio)
    a picture   goes to the bucket of nearest log aspect ratio, is resized to cover it (Lanczos) and cropped centrally
    an epoch    takes from a bucket of n pictures as many blocks as n fills, and shuffles the blocks of all buckets
    the rest    of a bucket is neither dropped nor doubled: it opens that bucket's first block of the next epoch

What cannot be read is an error that names the tar (truncated, empty, without captions); a single sample that cannot be
used is skipped, counted and named. Every failure that a user can fix is a data.DataError.
"""

import contextlib
import functools
import hashlib
import io
import json
import math
import os
import shlex
import shutil
import sys
import tarfile
import warnings
import zipfile
import zlib
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

import data
from data import DataError
from engine import errors, limits
from engine.checkpoint import in_one_piece
from engine.randomness import rng

SUFFIXES = ("jpg", "jpeg", "png", "webp")
FORMATS = ("JPEG", "PNG", "WEBP")  # the only decoders of Pillow's that data from the web may reach
HEAD = 2**16  # bytes of a picture that nearly always hold its header
LONGEST_NAME = 1000  # letters: the index gives every key the room of the longest


# ============================================================================================================
# The index of a tar
# ============================================================================================================
# One row per usable sample: where the picture and its caption lie in the tar, what bucketing needs to know, and a
# checksum of the caption and the picture's first bytes, by which other content of the same length is noticed.
ROW = np.dtype(
    [
        ("offset", "<i8"),
        ("size", "<i8"),
        ("width", "<i4"),
        ("height", "<i4"),
        ("text_offset", "<i8"),
        ("text_size", "<i4"),
        ("is_json", "?"),
        ("letters", "<i4"),
        ("check", "<u4"),
    ]
)


class Unusable(Exception):
    """A sample that has to be skipped; the message says why."""


def read_at(file, offset: int, size: int) -> bytes:
    file.seek(offset)
    return file.read(size)


def parse_caption(content: bytes, is_json: bool) -> str:
    """The caption in a .txt or .json member. Raises Unusable when there is none or it cannot be read."""
    try:
        if b"\0" in content:  # UTF-16 without a mark would pass
            raise Unusable("its caption is not UTF-8")
        text = content.decode("utf-8-sig")  # with or without a byte-order mark
        if is_json:
            entry = json.loads(text)
            if not isinstance(entry, dict):
                raise Unusable("its .json is not an object")
            text = next(
                (
                    entry[name]
                    for name in ("caption", "text")
                    if isinstance(entry.get(name), str) and entry[name].strip()
                ),
                "",
            )
    except UnicodeDecodeError as error:
        raise Unusable("its caption is not UTF-8") from error
    except (ValueError, RecursionError) as error:  # also an integer of thousands of digits
        raise Unusable("its .json is not valid JSON") from error
    if not text.strip():
        raise Unusable("no caption")
    return data.whole(text).strip()


def picture_size(content: bytes) -> tuple[int, int]:
    """(width, height) of an upright picture from its header; nothing is decoded. Raises Unusable or one of BROKEN."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            width, height = image.size
            if image.mode.startswith(("I", "F")):  # Pillow would cut these to 8 bits as all white
                raise Unusable("16-bit or floating-point grey")
            if data.orientation(image) >= 5:  # lies on its side
                width, height = height, width
    if width * height > data.MAX_PIXELS:
        raise Unusable("more than 67 million pixels")
    if not width * height:
        raise Unusable("broken picture")
    return width, height


def read_member(file, members: dict[str, tuple[int, int]]) -> tuple:
    """The index row of one sample: members maps the suffixes under its key to (offset, size). Raises Unusable."""
    suffix = next(s for s in SUFFIXES if s in members)
    offset, size = members[suffix]
    reason = Unusable("no caption")
    for text in ("txt", "json"):  # img2dataset writes both, the .txt from the .json
        if text in members:
            try:
                caption = parse_caption(read_at(file, *members[text]), text == "json")
                break
            except Unusable as error:
                reason = error
    else:
        raise reason
    head = read_at(file, offset, min(size, HEAD))
    try:
        try:
            width, height = picture_size(head)
        except data.BROKEN:
            if size <= HEAD:
                raise
            width, height = picture_size(read_at(file, offset, size))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise Unusable("more than 67 million pixels") from error
    except data.BROKEN as error:
        raise Unusable("broken picture") from error
    return (
        offset,
        size,
        width,
        height,
        *members[text],
        text == "json",
        len(caption),
        zlib.crc32(caption.encode(), zlib.crc32(head)),
    )


def scan(tar: Path) -> tuple[np.ndarray, list[str], dict[str, str]]:
    """Read a tar's headers: (index rows, their keys, skipped key -> reason). Raises DataError naming the tar."""
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    dotted: list[tuple[str, str]] = []  # (key, name) of pictures by their last suffix only, such as masks
    skipped: dict[str, str] = {}
    with open(tar, "rb") as file:
        try:
            with tarfile.open(fileobj=file, mode="r:") as archive:
                for member in archive:
                    if member.size < 0:  # or tarfile would read the same header for ever
                        raise tarfile.TarError(f"a member of {member.size} bytes")
                    folder, slash, name = member.name.rpartition("/")
                    stem, _, suffix = name.partition(".")
                    suffix = suffix.lower()
                    if member.isreg() and stem and suffix.rpartition(".")[2] in SUFFIXES and "." in suffix:
                        dotted.append((folder + slash + stem, member.name))
                    if not member.isreg() or not stem or suffix not in (*SUFFIXES, "txt", "json"):
                        continue
                    if (
                        member.issparse() or len(member.name) > LONGEST_NAME
                    ):  # not one piece of the tar; see there
                        why = "sparse" if member.issparse() else f"a name of more than {LONGEST_NAME} letters"
                        skipped[f"{tar.stem}/{(folder + slash + stem)[:LONGEST_NAME]}"] = why
                        continue
                    own = samples.setdefault(folder + slash + stem, {})
                    if suffix in own or (suffix in SUFFIXES and own.keys() & set(SUFFIXES)):
                        skipped[f"{tar.stem}/{member.name} at byte {member.offset}"] = (
                            "a second file for its key"
                        )
                    else:
                        own[suffix] = member.offset_data, member.size
                end = archive.offset
        except (
            tarfile.TarError,
            ValueError,
            OverflowError,
            OSError,
        ) as error:  # not all of them are tarfile's own
            raise DataError(f"{tar} is truncated or not a tar ({error}): fetch or make it again") from error
        if read_at(file, end, 512) != bytes(
            512
        ):  # tarfile takes a tar cut between two members for a whole one
            raise DataError(
                f"{tar} is truncated or damaged at byte {end}, it has no end mark: fetch or make it again"
            )
        for key, name in dotted:
            if not samples.get(key, {}).keys() & set(SUFFIXES):  # else it only lies beside a picture
                skipped[f"{tar.stem}/{name}"] = "a dot in its name: a key ends at the first one"
        for key in [key for key, own in samples.items() if not own.keys() & set(SUFFIXES)]:
            skipped[f"{tar.stem}/{key}"] = "no .jpg, .png or .webp"
            del samples[key]
        if not samples:
            raise DataError(f"{tar} is empty: it holds no .jpg, .png or .webp; remove it")
        rows, keys = [], []
        for key, own in samples.items():
            name = f"{tar.stem}/{key}"
            try:
                rows.append(read_member(file, own))
                keys.append(name)
            except Unusable as error:
                skipped[name] = str(error)
    if not rows:
        raise DataError(
            f"{tar}: none of its {len(samples)} pictures can be used ({summary(skipped)}); a caption goes "
            'in a .txt or, as "caption" or "text", in a .json of the same name'
        )
    return np.array(rows, ROW), keys, skipped


def summary(skipped: dict[str, str]) -> str:
    return ", ".join(f"{n} {reason}" for reason, n in Counter(skipped.values()).most_common())


def index_of(tar: Path, index_folder: Path) -> tuple[np.ndarray, np.ndarray, dict[str, str]]:
    """The index of a tar (rows, keys as UTF-8, skipped), read from index_folder or made and written there.

    An index holds while the tar's size and modification time stay what they were.
    """
    path, stat = index_folder / f"{tar.name}.index", errors.regular(tar, DataError).stat()
    if tar.is_dir():
        raise DataError(f"{tar} is a folder, not a tar: give it another name")
    stamp = [4, data.MAX_PIXELS, stat.st_size, stat.st_mtime_ns]  # the 4 counts the versions of this format
    if errors.regular(path, DataError).exists():
        try:
            with np.load(path, allow_pickle=False) as stored:
                if stored["stamp"].tolist() == stamp:
                    found = stored["rows"], stored["keys"], json.loads(stored["skipped"].tobytes())
                    check_index(*found, stat.st_size)
                    return found
        except (
            ValueError,
            EOFError,
            KeyError,
            TypeError,
            AttributeError,
            MemoryError,
            zipfile.BadZipFile,
        ) as error:
            print(f"{path} is damaged ({error}); reading {tar} again", file=sys.stderr)
    rows, keys, skipped = scan(tar)
    packed = np.array([key.encode("utf-8", "surrogateescape") for key in keys])
    try:
        with in_one_piece(path, shared=True) as partial, open(partial, "wb") as file:
            np.savez(
                file,
                stamp=np.array(stamp),
                rows=rows,
                keys=packed,
                skipped=np.frombuffer(json.dumps(skipped).encode(), np.uint8),
            )
    except OSError as error:  # no permission, or a file system that can only be read
        raise DataError(
            f"cannot write {path} ({error.strerror}): name a folder for the index that can be written "
            "(--index)"
        ) from error
    return rows, packed, skipped


def check_index(rows: np.ndarray, keys: np.ndarray, skipped: dict[str, str], size: int) -> None:
    """Raise ValueError unless an index could be that of a tar of `size` bytes."""
    if (
        rows.dtype != ROW
        or rows.shape != keys.shape
        or rows.ndim != 1
        or not len(rows)
        or keys.dtype.kind != "S"
    ):
        raise ValueError("not one key for each of its rows")
    for offset, length in (("offset", "size"), ("text_offset", "text_size")):
        begin, end = rows[offset], rows[offset] + rows[length]
        if begin.min() < 0 or end.max() > size or (end < begin).any():
            raise ValueError("places outside the tar")
    if min(rows["width"].min(), rows["height"].min()) < 1:
        raise ValueError("pictures of no size")
    if not all(isinstance(reason, str) for reason in skipped.values()):
        raise ValueError("no reasons")


class Index(NamedTuple):
    """The samples of a folder: sample n lies in tars[shard[n]], as rows[n] says."""

    tars: list[Path]
    shard: np.ndarray  # [N]
    rows: np.ndarray  # [N] of ROW
    keys: np.ndarray  # [N] of UTF-8
    skipped: dict[str, str]  # key -> reason


def read_index(folder: str | Path, index_folder: str | Path | None = None, workers: int = 1) -> Index:
    """The index of all tars of a folder, in the order of their names; kept in index_folder, by default beside the tars.

    Raises DataError for a missing folder, one without tars, and for the first tar that cannot be used. Processes that
    start together on tars without an index each read them all, so run the report command before a long run.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"no such folder: {folder}")
    tars = sorted(folder.glob("*.tar"))
    if not tars:
        raise DataError(
            f"{folder} holds no .tar: python -m scale.shards pack makes some of a folder of pictures"
        )
    for tar in tars:
        errors.regular(tar, DataError)
    index_folder = folder if index_folder is None else Path(index_folder)
    index_folder.mkdir(parents=True, exist_ok=True)
    one = functools.partial(index_of, index_folder=index_folder)
    with contextlib.ExitStack() as stack:
        parts = map(one, tars)
        if workers > 1:
            pool = stack.enter_context(ProcessPoolExecutor(workers, mp_context=get_context("spawn")))
            stack.callback(pool.shutdown, cancel_futures=True)
            parts = pool.map(one, tars)
        parts = list(
            tqdm(parts, total=len(tars), desc=f"indexing {folder}", unit=" tars", leave=False, disable=None)
        )
    shard = np.repeat(np.arange(len(tars), dtype=np.int32), [len(rows) for rows, _, _ in parts])
    skipped = {key: reason for _, _, some in parts for key, reason in some.items()}
    return Index(
        tars, shard, np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts]), skipped
    )


def fingerprint(index: Index, buckets: list[tuple[int, int, int]]) -> str:
    """Changes with the tars' names, with what is in them, as far as the index knows (captions whole, pictures by their
    first bytes), and with the buckets (height, width, pictures), so with all that the order of samples follows from;
    not with where the tars lie."""
    state = hashlib.sha256(json.dumps(["order 2", [tar.name for tar in index.tars], buckets]).encode())
    for part in (index.shard, index.rows, index.keys):
        state.update(part.tobytes())
    return state.hexdigest()


def log_skipped(name: str, skipped: dict[str, str], total: int, first: int = 10) -> None:
    """Name what is skipped on stderr, the first few by key; one process of a run speaks for all."""
    if not skipped or os.environ.get("RANK", "0") != "0":
        return
    for key, reason in list(skipped.items())[:first]:
        print(f"skipped {key}: {reason}", file=sys.stderr)
    more = f"; python -m scale.shards report {name} --skipped names all" if len(skipped) > first else ""
    print(f"{name}: skipped {len(skipped)} of {total} ({summary(skipped)}){more}", file=sys.stderr)


# ============================================================================================================
# Aspect-ratio buckets
# ============================================================================================================


def bucket_sides(side: int, multiple: int = 16, widest: float = 2.0) -> list[tuple[int, int]]:
    """The buckets of a stage, (height, width) from tallest to widest: multiples of `multiple`, areas near side^2.

    For each width from the square's to sqrt(widest) times it, the height that comes nearest to the area; and each of
    them turned. side 256 has 13, side 512 has 27.
    """
    n = side // multiple
    if n < 1 or side % multiple:
        raise DataError(f"the side of the pictures must be a multiple of {multiple}, not {side}")
    wide = [(round(n * n / w), w) for w in range(n, int(n * math.sqrt(widest)) + 1)]
    wide = [(h, w) for h, w in wide if w <= widest * h]
    sides = {(h * multiple, w * multiple) for h, w in wide} | {(w * multiple, h * multiple) for h, w in wide}
    return sorted(sides, key=lambda bucket: bucket[1] / bucket[0])


def choose_buckets(
    rows: np.ndarray, buckets: list, smallest: int
) -> tuple[list[tuple[int, int]], np.ndarray]:
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
        bucket = rng(seed, "blocks", self.side, epoch).permutation(
            np.repeat(np.arange(len(first)), end - first)
        )
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
# Sources
# ============================================================================================================


class Shards:
    """The captioned pictures of a folder of tars, or of an Index, in blocks of batch_size pictures of one size (the
    text on top).

    side        of the square bucket, in pixels; all buckets have about its area
    batch_size  the global one, over all processes and micro-batches: batch i is g = i * batch_size and what follows
    multiple    of which all sides are multiples: the auto-encoder's factor times the patch, 16 for FLUX
    widest      the largest ratio of two sides; what is wider is cropped to it
    enlarge     leaves out pictures that would have to be enlarged more than so many times; None leaves out none
    index       the folder of the index, by default beside the tars

    buckets     [(height, width)] those in use; `skipped` key -> reason, and len(source) pictures are not
    """

    def __init__(
        self,
        folder: str | Path | Index,
        side: int,
        batch_size: int,
        *,
        multiple: int = 16,
        widest: float = 2.0,
        enlarge: float | None = None,
        index: str | Path | None = None,
    ):
        read = isinstance(folder, Index)
        self.name, self.side, self.batch_size = "an index" if read else str(folder), side, batch_size
        buckets = bucket_sides(side, multiple, widest)
        self.tars, self.shard, self.rows, self.keys, skipped = folder if read else read_index(folder, index)
        self.skipped = dict(skipped)
        keep = np.arange(len(self.rows))
        if enlarge is not None:
            sides = np.array(buckets)[choose_buckets(self.rows, buckets, 0)[1]]
            factor = np.maximum(sides[:, 0] / self.rows["height"], sides[:, 1] / self.rows["width"])
            keep = np.flatnonzero(factor <= enlarge)
        log_skipped(self.name, self.skipped, len(self.rows) + len(self.skipped))
        if len(keep) < batch_size:
            raise DataError(
                f"{self.name} has {len(keep)} usable pictures, fewer than one batch of {batch_size}: "
                "lower the batch size or add shards"
            )
        self.buckets, bucket = choose_buckets(self.rows[keep], buckets, batch_size)
        self.members = [keep[bucket == k] for k in range(len(self.buckets))]
        counts = [(height, width, len(m)) for (height, width), m in zip(self.buckets, self.members)]
        self.fingerprint = fingerprint(
            Index(self.tars, self.shard, self.rows, self.keys, self.skipped), counts
        )
        self.blocks = Blocks([len(m) for m in self.members], batch_size, side)
        self.numbers = len(self.rows)

    def __len__(self) -> int:
        return int(self.blocks.counts.sum())

    def key(self, n: int) -> str:
        return self.keys[n].decode("utf-8", "surrogateescape")

    def bucket(self, g: int, seed: int = 0) -> tuple[int, int]:
        """(height, width) of sample g, and of its whole block; nothing is read."""
        return self.buckets[self.blocks.block(g, seed)[0]]

    def read(self, n: int, height: int, width: int) -> data.Sample | None:
        """Sample n of the index at the size of its bucket; None, once named on stderr, if it cannot be decoded.

        The tar is opened for each sample: no file position is shared between threads or forked processes, and no
        number of tars exhausts the file descriptors.
        """
        if (key := self.key(n)) in self.skipped:
            return None
        tar, row = self.tars[self.shard[n]], self.rows[n]
        with open(tar, "rb") as file:
            content = read_at(file, row["offset"], row["size"])
            text = read_at(file, row["text_offset"], row["text_size"])
        if len(content) != row["size"] or len(text) != row["text_size"]:
            raise DataError(f"{tar} has become shorter since it was indexed: fetch or make it again")
        try:
            caption = parse_caption(text, bool(row["is_json"]))
            with Image.open(io.BytesIO(content), formats=FORMATS) as image:
                return data.Sample(data.cover(image, height, width), caption, key)
        except (Unusable, *data.BROKEN) as error:
            reason = f"cannot be decoded ({type(error).__name__}: {error})"
            if self.skipped.setdefault(key, reason) is reason:  # not named by another thread
                print(f"skipped {key}: {reason}", file=sys.stderr)
            return None

    def sample(self, g: int, seed: int = 0) -> data.Sample:
        """Sample g of the sequence that belongs to `seed`."""
        return self.picture(*self.blocks.locate(g, seed))

    def number(self, g: int, seed: int = 0) -> int:
        """Which picture sample g is, as an index of the data set's; where that
        one is found broken, of what stands for it."""
        k, i = self.blocks.locate(g, seed)
        for j in range(i, i + len(self.members[k])):
            n = int(self.members[k][j % len(self.members[k])])
            if self.key(n) not in self.skipped:
                break
        return n

    def caption(self, number: int, seed: int = 0) -> str:
        """The caption of a picture, whatever the state of its pixels."""
        tar, row = self.tars[self.shard[number]], self.rows[number]
        with open(tar, "rb") as file:
            return parse_caption(read_at(file, row["text_offset"], row["text_size"]), bool(row["is_json"]))

    def picture(self, k: int, i: int) -> data.Sample:
        """Picture i of bucket k.

        One whose damage shows only in decoding is replaced by the next one of its bucket, in the order of the tars: a
        function of the data alone, so every process replaces it by the same.
        """
        for j in range(i, i + len(self.members[k])):
            if found := self.read(self.members[k][j % len(self.members[k])], *self.buckets[k]):
                return found
        raise DataError(f"{self.name}: no picture of bucket {self.buckets[k]} can be decoded")


class Mixed:
    """Several sources in equal parts, by whole batches (S.2: 256^2 and 512^2, 1:1).

    Of n sources, block b is block b div n of source b mod n; a block is batch_size samples. Raises DataError when a
    source is arranged in blocks of another size.
    """

    def __init__(self, sources: list, batch_size: int):
        for source in sources:
            if getattr(source, "batch_size", batch_size) != batch_size:
                raise DataError(
                    f"{source.name} comes in batches of {source.batch_size}; it cannot be mixed in batches "
                    f"of {batch_size}"
                )
        self.sources, self.batch_size = sources, batch_size
        self.name = " + ".join(source.name for source in sources)
        self.fingerprint = " ".join(source.fingerprint for source in sources)
        self.buckets = list(dict.fromkeys(bucket for source in sources for bucket in source.buckets))

    def __len__(self) -> int:
        return sum(map(len, self.sources))

    @property
    def skipped(self) -> dict[str, str]:
        # Copies, because threads that read may be adding to them.
        return {key: reason for source in self.sources for key, reason in dict(source.skipped).items()}

    def locate(self, g: int):
        """(the source of g, g's index in it)"""
        b, place = divmod(g, self.batch_size)
        turn, which = divmod(b, len(self.sources))
        return self.sources[which], turn * self.batch_size + place

    def bucket(self, g: int, seed: int = 0) -> tuple[int, int]:
        source, own = self.locate(g)
        return source.bucket(own, seed)

    def sample(self, g: int, seed: int = 0):
        source, own = self.locate(g)
        return source.sample(own, seed)


# ============================================================================================================
# What a data set holds; making one
# ============================================================================================================


def spread(values: np.ndarray) -> dict[str, float]:
    median, mean = float(np.median(values)), float(values.mean())
    return {"min": int(values.min()), "median": median, "mean": mean, "max": int(values.max())}


def report(index: Index, sides: list[int], multiple: int = 16) -> dict:
    """What a data set holds, as numbers: see print_report."""
    rows = index.rows
    result = {
        "shards": len(index.tars),
        "pictures": len(rows),
        "picture_bytes": int(rows["size"].sum()),
        "tar_bytes": sum(tar.stat().st_size for tar in index.tars),
        "skipped": dict(Counter(index.skipped.values())),
        "width": spread(rows["width"]),
        "height": spread(rows["height"]),
        "caption_letters": spread(rows["letters"]),
        "sides": {},
    }
    for side in sides:
        buckets, which = choose_buckets(rows, bucket_sides(side, multiple), 0)
        sizes = np.array(buckets)[which]
        small = (rows["height"] < sizes[:, 0]) | (rows["width"] < sizes[:, 1])
        counts = np.bincount(which, minlength=len(buckets))
        result["sides"][side] = {
            "enlarged": int(small.sum()),
            "buckets": {f"{h}x{w}": int(n) for (h, w), n in zip(buckets, counts)},
        }
    return result


def print_report(folder: str, result: dict) -> None:
    pictures = result["pictures"]
    print(
        f"{folder}: {pictures} captioned pictures in {result['shards']} shards, "
        f"{result['picture_bytes'] / 1e6:.1f} MB of pictures in {result['tar_bytes'] / 1e6:.1f} MB of tars"
    )
    for name in ("width", "height", "caption_letters"):
        row = result[name]
        print(f"  {name.replace('_', ' '):16}" + ", ".join(f"{k} {v:.6g}" for k, v in row.items()))
    reasons = ", ".join(f"{n} {reason}" for reason, n in result["skipped"].items())
    print(f"  skipped         {sum(result['skipped'].values())}" + (f": {reasons}" if reasons else ""))
    for side, row in result["sides"].items():
        print(f"  side {side}: buckets height x width, {row['enlarged']} pictures have to be enlarged")
        for name, n in row["buckets"].items():
            if n:
                print(f"    {name:>10} {n:10d} {100 * n / pictures:6.2f}%")


def pack(folder: str | Path, out: str | Path, per_shard: int = 1000) -> tuple[int, dict[str, str]]:
    """Put the pictures of a folder (data.read_captions) in tars, unchanged: (how many, skipped name -> reason).

    Sample 000120007 is number 7 of 00012.tar: the picture, and a .json with its caption and its old file name. `out`
    appears in one piece, when all is written. Raises DataError when it exists.
    """
    folder, out = Path(folder), Path(out)
    if out.exists():
        raise DataError(f"{out} exists: choose a new folder for the shards")
    captions = data.read_captions(folder)
    skipped, usable = {}, []

    def why_not(name: str) -> str:
        if not captions[name]:
            return "no caption"
        try:
            picture_size((folder / name).read_bytes())
        except (Unusable, *data.BROKEN) as error:
            return str(error) if isinstance(error, Unusable) else "broken picture"
        return ""

    for name in sorted(captions):
        if Path(name).suffix.lower().removeprefix(".") not in SUFFIXES:
            skipped[name] = "not a .jpg, .png or .webp"
        elif not os.path.isfile(folder / name):  # unlike Path's it takes any text for a name
            skipped[name] = "no such file"
        elif reason := why_not(name):
            skipped[name] = reason
        else:
            usable.append(name)
    if not usable:
        raise DataError(
            f"{folder}: none of its {len(captions)} captioned pictures can be packed ({summary(skipped)})"
        )
    partial = out.with_name(out.name + ".partial")
    if partial.is_dir() and any(path.suffix != ".tar" for path in partial.iterdir()):
        raise DataError(
            f"{partial} would be overwritten: move it away, or choose another folder for the shards"
        )
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
    partial.mkdir(parents=True)
    try:
        for shard, first in enumerate(range(0, len(usable), per_shard)):
            with tarfile.open(partial / f"{shard:05d}.tar", "w", format=tarfile.USTAR_FORMAT) as archive:
                for i, name in enumerate(usable[first : first + per_shard]):
                    entry = json.dumps({"caption": captions[name], "file_name": name})
                    suffix = Path(name).suffix.lower().removeprefix(".")
                    for ending, content in (
                        (suffix, (folder / name).read_bytes()),
                        ("json", entry.encode("utf-8")),
                    ):
                        member = tarfile.TarInfo(f"{shard:05d}{i:04d}.{ending}")
                        member.size = len(content)
                        archive.addfile(member, io.BytesIO(content))
        os.replace(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return len(usable), skipped


# ------------------------------------------------------------------------------------------------------------
# The commands
# ------------------------------------------------------------------------------------------------------------
def positive(text: str) -> int:
    if (value := errors.whole_number(text)) < 1:
        raise ValueError(text)
    return value


def pack_command(argv: list[str]) -> None:
    parser = errors.Parser(
        "-m scale.shards pack FOLDER OUT", "Put a folder of captioned pictures in tar shards."
    )
    a = parser.add_argument
    a(
        "folder",
        metavar="FOLDER",
        type=errors.name,
        help="pictures with metadata.jsonl, or a .txt beside each",
    )
    a("out", metavar="OUT", type=errors.name, help="a new folder for the tars")
    a(
        "--per-shard",
        metavar="N",
        type=positive,
        default=1000,
        help="pictures a tar, at most 10000 (default: 1000)",
    )
    args = parser.parse_args(argv)
    if args.per_shard > 10000:
        parser.error("--per-shard must be at most 10000: a key has four digits for the place in its tar")
    count, skipped = pack(args.folder, args.out, args.per_shard)
    log_skipped(args.folder, skipped, count + len(skipped), first=len(skipped))
    print(
        f"packed {count} pictures; to look at them:\n  python -m scale.shards report {shlex.quote(str(args.out))}"
    )


def report_command(argv: list[str]) -> None:
    parser = errors.Parser("-m scale.shards report FOLDER", "Index tar shards and say what they hold.")
    a = parser.add_argument
    a("folder", metavar="FOLDER", type=errors.name, help="a folder of .tar")
    a(
        "--sides",
        metavar="N",
        type=positive,
        nargs="+",
        default=[256, 512],
        help="stages to show (default: 256 512)",
    )
    a(
        "--multiple",
        metavar="N",
        type=positive,
        default=16,
        help="of which all sides are multiples (default: 16)",
    )
    a("--index", metavar="DIR", type=errors.name, help="folder of the index (default: FOLDER)")
    a("--workers", metavar="N", type=positive, default=1, help="processes that read the tars (default: 1)")
    a("--skipped", action="store_true", help="name every skipped sample with its reason (default: off)")
    a("--json", action="store_true", help="print JSON (default: off)")
    args = parser.parse_args(argv)
    parser.check_ranges(args, sides=limits.RANGES["side"], workers=limits.RANGES["workers"])
    for side in args.sides:
        bucket_sides(side, args.multiple)  # refused before the tars are read
    index = read_index(args.folder, args.index, args.workers)
    result = report(index, args.sides, args.multiple)
    if args.json:
        print(json.dumps(result | {"skipped_keys": index.skipped} if args.skipped else result, indent=1))
        return
    print_report(args.folder, result)
    if args.skipped:
        for key, reason in index.skipped.items():
            print(f"  skipped {key.encode('utf-8', 'backslashreplace').decode()}: {reason}")


COMMANDS = {"pack": pack_command, "report": report_command}


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name in ("-h", "--help"):
        print(__doc__)
    elif name in COMMANDS:
        COMMANDS[name](sys.argv[2:])
    else:
        raise errors.UserError(
            f"say what to do: python -m scale.shards {', '.join(COMMANDS)} (--help after each says more)"
        )


if __name__ == "__main__":
    errors.run(main, "stopped; nothing is half-written, the same command begins again")
