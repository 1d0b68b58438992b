"""The layouts that people bring, each as a folder and as a tar; damaged pictures; and what is said of what is left out."""

import contextlib
import io
import json
import os
import random
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps
from test_shards import write_tar

import data
import files
from scale import shards


def encoded(image: Image.Image, kind="PNG", **options) -> bytes:
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


def png(number: int, size=(20, 20), kind="PNG") -> bytes:
    """A picture whose colour tells its number: 10 times that."""
    return encoded(
        Image.new("RGB", size, (10 * number,) * 3), kind, **({"quality": 100} if kind == "JPEG" else {})
    )


def table(*captions, name="text", **more) -> bytes:
    """A metadata.jsonl of 1.png, 2.png, ..."""
    entries = [{"file_name": f"{i}.png", name: caption} | more for i, caption in enumerate(captions, 1)]
    return "\n".join(map(json.dumps, entries)).encode()


def pngs(*numbers: int) -> dict[str, bytes]:
    return {f"{i}.png": png(i) for i in numbers}


ONE, TWO = pngs(1), pngs(1, 2)
# name: (files; what training sees: number -> captions; what is left out -> why, if anything). Text is its UTF-8.
LAYOUTS = {
    "a text beside each": (
        pngs(1, 2, 3, 4) | {"1.txt": " one\n", "2.TXT": "two", "3.caption": "three", "4.png.txt": "four"},
        {1: ["one"], 2: ["two"], 3: ["three"], 4: ["four"]},
    ),
    "a json beside each": (
        pngs(1, 2, 3, 4)
        | {"1.json": '{"text": "one", "width": 20}', "2.json": '{"caption": "two"}'}
        | {"3.json": '{"prompt": ["three", "drei"]}', "4.json": '{"text": "", "caption": "four"}'},
        {1: ["one"], 2: ["two"], 3: ["three", "drei"], 4: ["four"]},
    ),
    "txt before json": (
        pngs(1, 2, 3)
        | {"1.txt": "one", "2.txt": " \n", "3.txt": b"\xff"}
        | {f"{i}.json": json.dumps({"text": str(i)}) for i in (1, 2, 3)},
        {1: ["one"], 2: ["2"], 3: ["3"]},
    ),
    "odd texts": (
        pngs(1, 2, 3, 4)
        | {"1.txt": "one\r\n\neins\n", "2.txt": "\n", "3.txt": b"\xef\xbb\xbfcaf\xc3\xa9"}
        | {"4.json": '{"text": "a \\ud83d half\\u2028line"}'},
        {1: ["one", "eins"], 2: [""], 3: ["café"], 4: ["a \ufffd half\u2028line"]},
    ),
    "no captions": (
        pngs(1, 2, 3, 4, 5, 6, 7)
        | {"1.txt": "one", "2.txt": b"caf\xe9", "3.txt": "drei".encode("utf-16-le"), "alone.txt": "?"}
        | {"4.json": '{"text": null}', "5.json": '{"text": 5}', "6.json": "{"},
        {1: ["one"]},
        dict.fromkeys(("2.png", "3.png"), "not UTF-8 text")
        | dict.fromkeys(("4.png", "7.png"), "no caption")
        | {"5.png": "its caption is no text", "6.png": "not valid JSON", "alone.txt": "without a picture"},
    ),
    "dots": (
        {"a.b.png": png(1), "a.c.png": png(2), "a.b.txt": "one", "a.c.txt": "two"}
        | {"d.image.png": png(3), "d.caption.txt": "three", "f.g/4.png": png(4), "f.g/4.txt": "four"},
        {1: ["one"], 2: ["two"], 3: ["three"], 4: ["four"]},
    ),
    "two pictures of a name": (
        {"1.jpg": png(1, kind="JPEG"), "1.txt": "one", "1.png": png(2), "1.mask.png": png(3)},
        {1: ["one"]},
        {"1.png": "second picture for one caption", "1.mask.png": "no caption"},
    ),
    "train": (
        {"train/1.png": png(1), "train/1.txt": "one", "test/2.png": png(2), "test/2.txt": "two"},
        {1: ["one"]},
        {"test/2.png": "not for training", "test/2.txt": "not for training"},
    ),
    "a part by itself": ({"test/1.png": png(1), "test/1.txt": "one"}, {1: ["one"]}),
    "hidden": (
        ONE | {"1.txt": "one", "._1.txt": b"\0\5", "._1.png": b"\0", ".git/x.txt": "no", ".DS_Store": b""},
        {1: ["one"]},
        {"._1.txt": "hidden", "._1.png": "hidden", ".git/x.txt": "hidden"},
    ),
    "jsonl": (TWO | {"metadata.jsonl": table("one", ["two", "zwei"])}, {1: ["one"], 2: ["two", "zwei"]}),
    "jsonl of captions": (ONE | {"metadata.jsonl": table("one", name="caption")}, {1: ["one"]}),
    "jsonl with paths and several lines a picture": (
        ONE
        | {"a/2.png": png(2)}
        | {
            "metadata.jsonl": '{"file_name": "./1.png", "text": "one"}\n\n{"file_name": "1.png", "text": "eins"}'
        }
        | {"a/metadata.jsonl": '{"file_name": "..\\\\a/2.png", "text": "two"}'},
        {1: ["one", "eins"], 2: ["two"]},
    ),
    "jsonl of a few": (
        TWO | {"metadata.jsonl": table("one"), "2.txt": "two"},
        {1: ["one"]},
        {"2.png": "in no line of the table"},
    ),
    "jsonl with odd lines": (
        TWO | {"metadata.jsonl": b'{\n[1]\n{"text": "x"}\n' + table("one", None, "three")},
        {1: ["one"]},
        {"metadata.jsonl, entry 1": "not valid JSON", "2.png": "no caption", "3.png": "no such file"}
        | {"metadata.jsonl, entry 2": "not an object with file_name and text"}
        | {"metadata.jsonl, entry 3": "no file_name, but text"},
    ),
    "csv": (
        TWO | {"metadata.csv": b'\xef\xbb\xbffile_name,prompt\r\n1.png,"one, two"\r\n2.png,a cat, black\r\n'},
        {1: ["one, two"]},
        {"2.png": "more columns than its header: a caption with a comma stands in quotes"},
    ),
    "letters put together otherwise": (
        {"cafe\u0301 1.png": png(1), "metadata.csv": "file_name,text\ncaf\u00e9 1.png,one"},
        {1: ["one"]},
    ),
    "json, a list": (ONE | {"metadata.json": '[{"file_name": "1.png", "text": "one"}]'}, {1: ["one"]}),
    "json, an object": (ONE | {"metadata.json": '{"file_name": "1.png", "text": "one"}'}, {1: ["one"]}),
    "json by name": (
        TWO | {"metadata.json": '{"1.png": "one", "2.png": {"caption": "two"}}'},
        {1: ["one"], 2: ["two"]},
    ),
    "two tables": (
        ONE | {"metadata.jsonl": table("one"), "metadata.csv": "file_name,text\n1.png,eins"},
        {1: ["one"]},
        {"metadata.csv": "beside metadata.jsonl"},
    ),
    "kinds": (
        {f"{i}.{kind.lower()}": png(i, kind=kind) for i, kind in enumerate(files.FORMATS)}
        | {f"{i}.txt": str(i) for i in range(5)},
        {i: [str(i)] for i in range(5)},
    ),
    "damaged": (
        ONE
        | {f"{i}.txt": str(i) for i in range(1, 6)}
        | {"2.png": png(2)[:60], "3.png": b"text", "4.jpg": b""}
        | {"5.png": encoded(Image.fromarray(np.full((9, 9), 30000, np.uint16)))},
        {1: ["1"]},
        dict.fromkeys(("2.png", "3.png", "4.jpg"), "broken picture") | {"5.png": "grey of more than 8 bits"},
    ),
}


def write(folder: Path, layout: dict, kind: str) -> Path:
    """The layout as a folder, or as a tar in a folder of its own."""
    layout = {name: text.encode() if isinstance(text, str) else text for name, text in layout.items()}
    if kind == "tar":
        return write_tar(
            folder / "t.tar", {random.choice(["", "./"]) + name: layout[name] for name in layout}
        )
    for name, content in layout.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def seen(place: Path, kind: str, key=None) -> tuple[dict, dict]:
    """(number -> captions, left out -> why) of what training sees."""
    if kind == "folder":
        source = data.ImageFolder(place, 16, key)
        found = {picture.max() // 10: texts for picture, texts in zip(source.pictures, source.captions)}
        return found, source.skipped
    source = shards.Shards(place, 16, 1, caption_key=key)
    samples = [source.picture(0, i) for i in range(source.numbers)]
    skipped = {name.removeprefix("t/"): why for name, why in source.skipped.items()}
    if "2" in skipped:  # what is found in decoding is called by its key
        skipped["2.png"] = skipped.pop("2")
    return {picture.max() // 10: texts for picture, texts, _ in samples}, skipped


@pytest.mark.parametrize("kind", ["folder", "tar"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(name, kind, tmp_path):
    layout, captions, *left_out = LAYOUTS[name]
    assert seen(write(tmp_path, layout, kind), kind) == (captions, *(left_out or [{}]))


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_captions_under_another_name(kind, tmp_path):
    lines = b'{"file_name": "1.png", "text": "no", "de": "eins"}\n' + table("one", "two")
    place = write(tmp_path, TWO | {"metadata.jsonl": lines}, kind)
    assert seen(place, kind, "de") == ({1: ["eins"]}, {"1.png": 'no "de"', "2.png": 'no "de"'})
    assert seen(place, kind) == ({1: ["no", "one"], 2: ["two"]}, {})  # and the index of a tar is made again


def parquet(**columns) -> bytes:
    content = io.BytesIO()
    pytest.importorskip("pyarrow.parquet").write_table(pytest.importorskip("pyarrow").table(columns), content)
    return content.getvalue()


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_a_table_in_parquet(kind, tmp_path):
    content = parquet(file_name=["1.png", "2.png"], caption=["one", None], n=[1, 2])
    place = write(tmp_path, TWO | {"metadata.parquet": content}, kind)
    assert seen(place, kind) == ({1: ["one"]}, {"2.png": "no caption"})


def test_pictures_in_parquet(tmp_path, monkeypatch):
    """As image sets on the hub are, whose test part is not for training."""
    for part, numbers in (("train-00000", (1, 2)), ("train-00001", (3,)), ("test-00000", (4,))):
        images = [{"bytes": png(i), "path": f"{i}.png"} for i in numbers] + [{"bytes": None, "path": "lost"}]
        content = parquet(image=images, text=[*([str(i), "a number"] for i in numbers), ["lost"]])
        write(tmp_path, {f"data/{part}-of-2.parquet": content}, "folder")
    found, left_out = seen(tmp_path, "folder")
    assert found == {i: [str(i), "a number"] for i in (1, 2, 3)}
    assert sorted(left_out.values()) == ["broken picture", "broken picture", "not for training"]
    assert list(seen(tmp_path / "data/train-00000-of-2.parquet", "folder")[0]) == [1, 2]
    for name, content, said in (
        ("other", parquet(url=["x"], text=["x"]), "other.parquet has no column image"),
        ("cut", b"PAR1", "cut.parquet is not a whole .parquet"),
        ("good", content, "pip install pyarrow"),
    ):
        if name == "good":
            monkeypatch.setitem(sys.modules, "pyarrow", None)
        write(tmp_path, {f"{name}.parquet": content}, "folder")
        with pytest.raises(data.DataError, match=said):
            data.ImageFolder(tmp_path / f"{name}.parquet", 16)


@pytest.mark.parametrize(
    "layout, said",
    [
        ({}, "holds no pictures"),
        ({"a.zip": b"PK"}, r"holds no pictures .*\(a.zip: unpack it\)"),
        (TWO, r"holds no captions: .*metadata.jsonl; left out: 2 no caption \(1.png, 2.png\)"),
        (ONE | {"captions.csv": "file,text\n1.png,one"}, r"\(captions.csv: call it metadata.csv\)"),
        (ONE | {"1.txt": b"\xff"}, "1 not UTF-8 text"),
        (ONE | {"metadata.csv": "image;text\n1.png;one"}, "1 no file_name, but image;text"),
        ({"metadata.jsonl": table("one")}, "none of its pictures can be used; left out: 1 no such file"),
        ({"1.png": b"", "1.txt": "one", "\33[2J.txt": "?"}, r"\(\?\[2J.txt\), 1 broken picture \(1.png\)"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_folders_that_are_refused_with_the_reason(layout, said, tmp_path):
    with pytest.raises(data.DataError, match=said):
        data.ImageFolder(write(tmp_path, layout, "folder"), 16)


def test_ways_to_name_a_folder(tmp_path):
    """By its table; pictures may be called by their whole paths. What is no folder is refused."""
    write(tmp_path, TWO | {"metadata.csv": f"file_name,text\n{tmp_path / '1.png'},one\n2.png,two"}, "folder")
    for place in (tmp_path, tmp_path / "metadata.csv"):
        assert seen(place, "folder") == ({1: ["one"], 2: ["two"]}, {})
    for name, said in (("absent", "no such folder"), ("1.png", "is a file: name the folder")):
        with pytest.raises(data.DataError, match=said):
            data.ImageFolder(tmp_path / name, 16)


def test_links_are_followed_and_those_that_lead_back_end(tmp_path):
    write(tmp_path, {"a/1.png": png(1), "a/1.txt": "one", "there/2.png": png(2)}, "folder")
    (tmp_path / "a/back").symlink_to(tmp_path)
    (tmp_path / "there/a").symlink_to(tmp_path / "a")
    assert seen(tmp_path / "there", "folder")[0] == {1: ["one"]}


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_a_folder_that_cannot_be_read_is_told(kind, tmp_path, monkeypatch):
    write(tmp_path, ONE | {"1.txt": "one"}, kind)
    (tmp_path / "closed").mkdir()
    scandir = os.scandir

    def refusing(place):
        if Path(place).name == "closed":
            raise PermissionError(13, "Permission denied", str(place))
        return scandir(place)

    monkeypatch.setattr(os, "scandir", refusing)
    assert seen(tmp_path, kind) == ({1: ["one"]}, {"closed": "cannot be read (Permission denied)"})


# --- Pixels -------------------------------------------------------------------------------------------------
def lanczos(line: np.ndarray, n: int) -> np.ndarray:
    """Values [N, ...] along a line -> [n, ...], n < N, by the formula: weights sinc(x) sinc(x / 3) for |x| < 3, where x
    is the distance in pixels of the result; what lies beyond an end has no weight."""
    x = (np.arange(len(line)) + 0.5)[None, :] * n / len(line) - (np.arange(n) + 0.5)[:, None]
    weights = np.where(np.abs(x) < 3, np.sinc(x) * np.sinc(x / 3), 0.0)
    return np.tensordot(weights / weights.sum(1, keepdims=True), line, 1)


def test_pictures_are_made_smaller_by_lanczos():
    """Against the formula, on noise that no overshoot takes out of 0 to 255. Pillow rounds twice, once an axis."""
    picture = np.random.default_rng(0).integers(60, 196, (60, 40, 3)).astype(np.uint8)
    expected = lanczos(lanczos(picture, 24).swapaxes(0, 1), 16).swapaxes(0, 1)
    assert np.abs(files.cover(Image.fromarray(picture), 24, 16) - expected).max() <= 1.5


@pytest.mark.parametrize(
    "mode, ink", [("RGBA", (9, 9, 9, 255)), ("LA", (9, 255)), ("RGB", (9, 9, 9)), ("L", 9), ("P", 9)]
)
def test_what_is_transparent_lies_over_white(mode, ink):
    """By an alpha channel, or by a colour that a PNG calls transparent (tRNS); the rest keeps its own colour."""
    image = Image.new(mode, (20, 20))
    if mode == "P":
        image.putpalette([level for level in range(256) for _ in "RGB"])
    image.paste(ink, (0, 0, 20, 10))
    options = {} if "A" in mode else {"transparency": (0, 0, 0) if mode == "RGB" else 0}
    picture = files.cover(files.opened(encoded(image, **options)), 20, 20)
    assert (picture[12:] == 255).all() and (picture[:8] == 9).all()


def test_crops_are_centred():
    halves = Image.new("RGB", (60, 20), (255, 0, 0))
    halves.paste((0, 0, 255), (30, 0, 60, 20))
    middle = files.cover(halves, 20, 20)
    assert (middle[:, :8, 0] > 250).all() and (middle[:, 12:, 2] > 250).all()


@pytest.mark.parametrize("number", range(1, 9))
def test_every_way_to_hold_a_camera(number):
    """Against Pillow's own turning."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 24, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = number
    turned = encoded(picture, exif=exif)
    expected = ImageOps.exif_transpose(files.opened(turned))
    assert files.upright_size(turned) == expected.size
    assert np.array_equal(files.cover(files.opened(turned), expected.height, expected.width), expected)


def test_odd_exif_is_no_damage():
    """The camera's make as a fraction: Pillow reads it and cannot write it again."""
    tags = [(0x010F, 5, 1, 38), (0x0112, 3, 1, 6)]  # make: a rational at byte 38; orientation 6
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    exif = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", 2) + entries + bytes(4) + struct.pack("<II", 1, 1)
    content = encoded(Image.new("RGB", (48, 32)), "JPEG", exif=exif)
    assert files.upright_size(content) == (32, 48)
    assert files.cover(files.opened(content), 16, 16).shape == (16, 16, 3)


@pytest.mark.parametrize("kind", files.FORMATS)
def test_damage_is_the_files_fault_and_a_full_memory_is_not(kind, monkeypatch):
    """Every byte after another changed, and every cut: a picture, or Unusable. Nothing else, and no warning."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (12, 9, 3), dtype=np.uint8))
    content = encoded(noise.convert("P") if kind == "GIF" else noise, kind)
    chance = random.Random(0)
    for _ in range(600):
        damaged = bytearray(content)
        for _ in range(chance.randint(1, 4)):
            damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        damaged = bytes(damaged[: chance.choice([len(damaged), chance.randrange(len(damaged))])])
        with contextlib.suppress(files.Unusable):
            assert files.cover(files.opened(damaged), 8, 8).shape == (8, 8, 3)
    monkeypatch.setattr(Image.Image, "load", lambda self: (_ for _ in ()).throw(MemoryError))
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: (_ for _ in ()).throw(MemoryError))
    with pytest.raises(MemoryError):
        files.opened(content)


@pytest.mark.parametrize("kind", ["DDS", "TIFF", "PPM", "ICO", "TGA", "PCX"])
def test_other_formats_are_not_opened_whatever_their_name(kind):
    with pytest.raises(files.Unusable, match="broken picture"):
        files.opened(encoded(Image.new("RGB", (16, 16)), kind))


def test_a_bomb_is_refused_without_decoding(monkeypatch, recwarn):
    """A small file whose header promises more pixels than are allowed."""
    content = encoded(Image.new("1", (8193, 8192)))
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded"))
    with pytest.raises(files.Unusable, match="67 million"):
        files.opened(content)
    assert not recwarn.list and len(content) < 2**17
