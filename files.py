"""Pictures and their captions as people keep them: the one reading that folders and tars share.

    captions, left_out = files.pair(names, read)    # names of files, and a way to read the bytes of one
    found = files.find(Path("pictures/"))           # a folder with all below, or a .parquet
    picture = files.cover(files.opened(found.read(name)), 256, 256)     # uint8 [256, 256, 3]

    beside a.png      a.txt, a.caption, a.png.txt (each line is a caption), a.json: {"text": "...", ...}
    in a table        metadata.jsonl, .csv or .parquet, with columns file_name and text; .json, a list or {name: text}
    in a .parquet     columns image {bytes, path} and text, as image sets on the hub are

In tables and .json, "caption" and "prompt" serve as well as "text", and each may be a list. Of several captions each
sample draws one. A picture without a caption, or one of the two that cannot be read, is left out, counted and named.
"""

import csv
import functools
import io
import json
import os
import posixpath
import re
import unicodedata
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from engine import errors

PICTURES = ("png", "jpg", "jpeg", "webp", "bmp", "gif")  # what their names end in
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")  # the only decoders of Pillow's that data may reach
TEXTS = ("txt", "caption", "json")  # beside a picture; the first that says something counts
TABLES = ("metadata.jsonl", "metadata.csv", "metadata.parquet", "metadata.json")
KEYS = ("text", "caption", "prompt")
KEY_HELP = "of captions in tables and .json (default: text, caption or prompt)"
# What people have who have no captions
NEAR = dict.fromkeys(("zip", "gz", "tgz", "7z", "rar"), "unpack it")
NEAR |= {kind: f"call it metadata.{kind}" for kind in ("csv", "jsonl", "json")}
MAX_PIXELS = 2**26  # 8192 x 8192: a larger picture is refused from its header, before memory is taken for it
Image.MAX_IMAGE_PIXELS = None  # Pillow's own limit, a warning
warnings.filterwarnings("ignore", module=r"PIL\.")  # of odd EXIF data and the like, for each picture


class DataError(errors.UserError):
    """The data cannot be used; the message says which file and what to do."""


class Unusable(Exception):
    """A picture or caption that has to be left out; the message says why."""


# ------------------------------------------------------------------------------------------------------------
# A picture
# ------------------------------------------------------------------------------------------------------------
TURNS = "FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_270 TRANSVERSE ROTATE_90"
TURNS = dict(enumerate(TURNS.split(), 2))  # what sets a picture upright, by EXIF's number


def orientation(image: Image.Image) -> int:
    """How the camera was held, EXIF's 1 .. 8; 1 where nothing usable is said."""
    number = image.getexif().get(0x0112, 1) if "exif" in image.info else 1
    return number if number in TURNS else 1


def opened(content: bytes, decode: bool = True) -> Image.Image:
    """The picture in a file, or with decode=False its header alone. Raises Unusable.

    Whatever Pillow raises over one file is that file's fault; a full memory is not.
    """
    try:
        image = Image.open(io.BytesIO(content), formats=FORMATS)
        if image.width * image.height > MAX_PIXELS:
            raise Unusable("more than 67 million pixels")
        if image.mode[0] in "IF":  # Pillow would cut these to 8 bits as all white
            raise Unusable("grey of more than 8 bits")
        if decode:
            image.load()
        orientation(image)
    except (Unusable, MemoryError):
        raise
    except Exception as error:
        raise Unusable("broken picture") from error
    return image


def upright_size(content: bytes) -> tuple[int, int]:
    """(width, height) of an upright picture from its header; nothing is decoded. Raises Unusable."""
    image = opened(content, decode=False)
    return image.size[::-1] if orientation(image) >= 5 else image.size  # 5 and more lie on their side


def cover(image: Image.Image, height: int, width: int) -> np.ndarray:
    """A PIL image -> uint8 [height, width, 3]: upright, over white, resized to cover (Lanczos), cropped centrally."""
    # Not ImageOps.exif_transpose, which writes all EXIF data again, and fails where it is odd
    if turn := TURNS.get(orientation(image)):
        image = image.transpose(Image.Transpose[turn])
    if "A" in image.mode or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.asarray(ImageOps.fit(image.convert("RGB"), (width, height), Image.Resampling.LANCZOS))


# ------------------------------------------------------------------------------------------------------------
# A caption: every form becomes a list of them
# ------------------------------------------------------------------------------------------------------------
def utf8(content: bytes) -> str:
    """UTF-8 text, with or without a byte-order mark. Raises Unusable for anything else."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Unusable("not UTF-8 text") from error
    if "\0" in text:  # UTF-16 without a mark would pass
        raise Unusable("not UTF-8 text")
    return text


def read_text(path: Path) -> str:
    """What a UTF-8 text file says. Raises DataError for one that is something else."""
    try:
        return utf8(path.read_bytes())
    except Unusable as error:
        raise DataError(f"{path} is {error}: save it as UTF-8") from error


def from_json(text: str):
    """What a JSON text says. Raises Unusable."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Unusable("not valid JSON") from error


def well_formed(text: str) -> str:
    """Text without halves of surrogate pairs, which JSON can carry and no tokenizer takes; each becomes one U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def captions_of(value, key: str | None = None) -> list[str]:
    """The captions that a line of a table or a JSON text holds: a text, a list of texts, or one of the two under `key`
    or the first of KEYS that says something; [""] where all are blank. Raises Unusable."""
    if isinstance(value, dict):
        values = [value[name] for name in ([key] if key else KEYS) if value.get(name) is not None]
        if not values:
            raise Unusable(f'no "{key}"' if key else "no caption")
        value = next(filter(None, values), "")
    texts = value if isinstance(value, list) else [value]
    if not all(isinstance(text, str) for text in texts):
        raise Unusable("its caption is no text")
    return [text for text in (well_formed(text).strip() for text in texts) if text] or [""]


def captions_in(names: list[str], read: Callable[[str], bytes], key: str | None) -> list[str]:
    """The captions in the first of some files that says something. Raises Unusable where none can be read."""
    captions, reason = [], Unusable("no caption")
    for name in names:
        try:
            text = utf8(read(name))
            captions = captions_of(from_json(text) if ending(name) == "json" else text.split("\n"), key)
        except Unusable as error:
            reason = error
        if captions and captions != [""]:
            break
    if not captions:
        raise reason
    return captions


# ------------------------------------------------------------------------------------------------------------
# A table of captions
# ------------------------------------------------------------------------------------------------------------
def parquet(name: str | Path, columns: tuple[str, ...], source=None):
    """A table of those of `columns` that a .parquet has, in the file of that name or in `source`. Raises DataError."""
    try:
        import pyarrow.parquet  # optional
    except ImportError as error:
        raise DataError("a .parquet is read with pyarrow: pip install pyarrow") from error
    try:
        file = pyarrow.parquet.ParquetFile(source or name)
        return file.read([name for name in columns if name in file.schema_arrow.names])
    except (ValueError, OSError) as error:
        raise DataError(f"{name} is not a whole .parquet: fetch it again") from error


def entries(name: str, content: bytes, key: str | None) -> list:
    """The lines of a table, those of a .jsonl as text. Raises Unusable."""
    kind = ending(name)
    if kind == "parquet":
        return parquet(name, ("file_name", *([key] if key else KEYS)), io.BytesIO(content)).to_pylist()
    text = utf8(content)
    if kind == "jsonl":
        return [line for line in text.split("\n") if line.strip()]
    if kind == "csv":
        try:
            return list(csv.DictReader(io.StringIO(text, newline="")))
        except csv.Error as error:
            raise Unusable(f"not a .csv ({error})") from error
    table = from_json(text)
    if isinstance(table, dict) and "file_name" not in table:
        return [{"file_name": n} | (v if isinstance(v, dict) else {"text": v}) for n, v in table.items()]
    return table if isinstance(table, list) else [table]


def read_table(name: str, content: bytes, key: str | None, names: list[str]) -> tuple[dict, dict]:
    """({picture: captions}, {picture or line: why it is left out}). A picture may have several lines.

    Of `names` a table may have the letters put together otherwise, as where a Mac has been between.
    """
    captions, left_out = {}, {}
    known = {unicodedata.normalize("NFC", name): name for name in names}
    for number, entry in enumerate(entries(name, content, key), 1):
        what = f"{name}, entry {number}"
        try:
            entry = from_json(entry) if isinstance(entry, str) else entry
            if not isinstance(entry, dict):
                raise Unusable("not an object with file_name and text")
            if not isinstance(entry.get("file_name"), str):
                raise Unusable(f"no file_name, but {', '.join(map(str, entry))}")
            picture = entry["file_name"].replace("\\", "/")
            what = posixpath.normpath(posixpath.join(posixpath.dirname(name), picture))
            what = known.get(unicodedata.normalize("NFC", what), what)
            if None in entry:
                raise Unusable("more columns than its header: a caption with a comma stands in quotes")
            found = captions_of(entry, key)
            captions.setdefault(what, []).extend(found)
        except Unusable as error:
            left_out[what] = str(error)
    return {picture: captions_of(lines) for picture, lines in captions.items()}, left_out


# ------------------------------------------------------------------------------------------------------------
# Which caption belongs to which picture
# ------------------------------------------------------------------------------------------------------------
def ending(name: str) -> str:
    """What follows the last dot of a name, in small letters."""
    return name.rpartition(".")[2].lower()


def table_kind(name: str) -> int | None:
    """The place of a table's name in TABLES, None for other files."""
    name = posixpath.basename(name).lower()
    return TABLES.index(name) if name in TABLES else None


def not_for_training(names: list[str]) -> set[str]:
    """The other parts of a data set that has a part train/, or train-00000-of-00002.parquet."""
    found = {n: re.match(r"(?:data/)?(train|test|val|valid|validation|dev)(?:/|-\d)", n) for n in names}
    part = {name: match[1] for name, match in found.items() if match}
    return {name for name in part if part[name] != "train"} if "train" in part.values() else set()


def pair(names: list[str], read: Callable[[str], bytes], key: str | None = None) -> tuple[dict, dict]:
    """({picture: its captions}, {what is left out: why}) of files, whose names have a "/" below folders.

    read    gives the bytes of a file, or raises Unusable
    key     where captions stand in tables and .json, if not under one of KEYS

    A table speaks for all pictures of its folder and below. Whether there is a picture that only a table names shows
    when it is read.
    """
    captions, left_out, tables, groups = {}, {}, {}, {}
    elsewhere = not_for_training(names)
    for name in names:
        folder, base = posixpath.split(name)
        if ending(name) not in (*PICTURES, *TEXTS, "jsonl", "csv", "parquet"):
            continue
        if any(part.startswith(".") for part in name.split("/")):  # such as macOS's ._a.txt
            left_out[name] = "hidden"
        elif name in elsewhere:
            left_out[name] = "not for training"
        elif table_kind(name) is not None:
            tables.setdefault(folder, []).append(name)
        else:  # as WebDataset cuts names: v1.0/a.mask.png belongs to v1.0/a
            groups.setdefault((folder, base.partition(".")[0]), []).append(name)
    for some in tables.values():
        name, *others = sorted(some, key=table_kind)
        left_out |= {other: f"beside {name}" for other in others}
        try:
            found, wrong = read_table(name, read(name), key, names)
        except Unusable as error:
            found, wrong = {}, {name: str(error)}
        captions |= found
        left_out |= wrong
    for (folder, _), group in groups.items():
        pictures = [name for name in group if ending(name) in PICTURES and name not in captions]
        texts = sorted((n for n in group if ending(n) in TEXTS), key=lambda n: TEXTS.index(ending(n)))
        if any(f"{folder}/".startswith(f"{above}/") or not above for above in tables):
            found, wrong = {}, dict.fromkeys(pictures, "in no line of the table")
        elif pictures:
            found, wrong = pair_beside(pictures, texts, read, key)
        else:
            found, wrong = {}, {text: "without a picture" for text in texts if ending(text) != "json"}
        captions |= found
        left_out |= {name: why for name, why in wrong.items() if name not in left_out}
    return captions, left_out


def pair_beside(pictures: list[str], texts: list[str], read: Callable, key: str | None) -> tuple[dict, dict]:
    """The same as of `pair`, for the pictures and texts of one group: a.b.png has a.b.png.txt or a.b.txt."""
    captions, left_out, taken = {}, {}, set()
    for name in pictures:
        beside = [text for text in texts if text.rpartition(".")[0] in (name, name.rpartition(".")[0])]
        if len(pictures) == 1:
            beside = beside or texts  # WebDataset's a.image.jpg and a.caption.txt
        try:
            if beside and taken.issuperset(beside):
                raise Unusable("second picture for one caption")
            taken.update(beside)
            captions[name] = captions_in(beside, read, key)
        except Unusable as error:
            left_out[name] = str(error)
    return captions, left_out


# ------------------------------------------------------------------------------------------------------------
# A folder
# ------------------------------------------------------------------------------------------------------------
class Found(NamedTuple):
    """The pictures of a folder: the captions of each, the way to its bytes (raises Unusable), and what is left out."""

    captions: dict[str, list[str]]
    read: Callable[[str], bytes]
    left_out: dict[str, str]


def walk(folder: Path, left_out: dict[str, str]) -> list[str]:
    """The files of a folder and of all below, by their names from there, in alphabetical order. Folders that cannot be
    read are added to left_out."""

    def unreadable(error: OSError) -> None:
        left_out[os.path.relpath(error.filename, folder)] = f"cannot be read ({error.strerror})"

    seen, names = set(), []
    for place, folders, some in os.walk(folder, followlinks=True, onerror=unreadable):
        if (real := os.path.realpath(place)) in seen:  # a link that leads back
            folders.clear()
            continue
        seen.add(real)
        names += [Path(place, name).relative_to(folder).as_posix() for name in some]
    return sorted(names)


def find(place: Path, key: str | None = None) -> Found:
    """The pictures of a folder with all below, or of a .parquet. Raises DataError where there are none with captions."""
    if table_kind(place.name) is not None:
        place = place.parent
    if not place.exists():
        raise DataError(f"no such folder: {place}")
    if place.is_file() and ending(place.name) != "parquet":
        raise DataError(f"{place} is a file: name the folder that it lies in, a .tar or a .parquet")
    closed = {}  # folders
    folder, names = (place, walk(place, closed)) if place.is_dir() else (place.parent, [place.name])

    @functools.lru_cache(maxsize=1)
    def column(name: str):
        table = parquet(folder / name, ("image",))
        if not table.num_columns:
            raise DataError(f"{folder / name} has no column image; a table of captions is metadata.parquet")
        return table["image"]

    def read(name: str) -> bytes:
        path, _, row = name.rpartition("/")
        if ending(path) == "parquet":
            value = column(path)[int(row)].as_py()
            return value["bytes"] if isinstance(value, dict) else value
        try:
            if not (folder / name).is_file():  # a pipe would be waited for
                raise Unusable("no such file")
            return (folder / name).read_bytes()
        except OSError as error:
            raise Unusable(f"cannot be read ({error.strerror})") from error

    captions, left_out = pair(names, read, key)
    left_out |= closed
    for name in filter(os.path.isabs, captions):  # as a table may call pictures
        left_out.pop(os.path.relpath(name, folder), None)
    for name in names:
        if ending(name) != "parquet" or table_kind(name) is not None or name in left_out:
            continue
        for row, entry in enumerate(parquet(folder / name, (key,) if key else KEYS).to_pylist()):
            try:
                captions[f"{name}/{row}"] = captions_of(entry, key)
            except Unusable as error:
                left_out[f"{name}/{row}"] = str(error)
    if not captions:
        missing = "captions: give each picture a .txt, or the folder a metadata.jsonl"
        if not any(ending(name) in PICTURES for name in names):
            missing = f"pictures (.{', .'.join(PICTURES)})"
        near = [f" ({n}: {NEAR[ending(n)]})" for n in names if ending(n) in NEAR and table_kind(n) is None]
        raise DataError(f"{place} holds no {missing}{''.join(near[:1])}{summary(left_out)}")
    return Found(captions, read, left_out)


def summary(left_out: dict[str, str]) -> str:
    """ "; left out: 3 no caption (a.png, b.png, c.png), 1 hidden (._a.txt)", or nothing."""
    reasons = {}
    for name, reason in dict(left_out).items():  # a copy, as threads that read may be adding to it
        reasons.setdefault(reason, []).append(printable(name))
    parts = [
        f"{len(names):,} {reason} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for reason, names in sorted(reasons.items(), key=lambda item: -len(item[1]))
    ]
    return "; left out: " + ", ".join(parts) if parts else ""


def printable(name: str) -> str:
    """A name of a file without what a terminal would obey."""
    return "".join(c if c.isprintable() else "?" for c in name)
