"""Tar shards as a user meets them: tars made here byte by byte, in both caption conventions, whole and damaged."""

import collections
import io
import json
import multiprocessing
import os
import struct
import subprocess
import sys
import tarfile
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
import encoders
from engine import errors
from scale import cache, shards

ROOT = Path(__file__).parent.parent


def picture(size=(40, 30), color=(200, 0, 0), kind="PNG", **options) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, color).save(file, kind, **options)
    return file.getvalue()


def bomb(width, height) -> bytes:
    """A PNG of a few bytes whose header promises width x height pixels."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def write_tar(path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(exist_ok=True, parents=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def write_shards(folder, sizes, per_tar=10):
    """One captioned picture of each size; its red channel tells its number. Captions: txt and json in turn."""
    for t in range(0, len(sizes), per_tar):
        members = {}
        for i in range(t, min(t + per_tar, len(sizes))):
            members[f"{i:09d}.png"] = picture(sizes[i], (i, 0, 0))
            members[f"{i:09d}.txt" if i % 2 else f"{i:09d}.json"] = (
                f"picture {i}".encode() if i % 2 else json.dumps({"caption": f"picture {i}"}).encode()
            )
        write_tar(folder / f"{t // per_tar:05d}.tar", members)
    return folder


SIZES = [(40, 40)] * 17 + [(60, 40)] * 11 + [(40, 64)] * 9  # three aspect ratios: 1, 3:2 and 5:8


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("data") / "tars", SIZES)


# ------------------------------------------------------------------------------------------------------------
# Reading
# ------------------------------------------------------------------------------------------------------------
def test_both_caption_conventions_and_every_kind_of_picture(tmp_path):
    """The .txt, "caption" and "text"; the .txt wins; folders inside the tar; names of over 100 letters; suffixes."""
    long = "folder/" + "x" * 150
    write_tar(
        tmp_path / "a.tar",
        {
            "0.jpg": picture(kind="JPEG"),
            "0.txt": b"  zero\n",
            "1.png": picture(),
            "1.json": b'{"caption": "one", "key": "1"}',
            "2.webp": picture(kind="WEBP"),
            "2.json": '{"text": "zw\u00f6lf"}'.encode(),
            "3.json": b'{"caption": "not this"}',
            "3.txt": b"three",
            "3.jpeg": picture(kind="JPEG"),
            f"{long}.PNG": picture(),
            f"{long}.txt": b"long",
            "4.png": picture(),
            "4.txt": b"",
            "4.json": b'{"caption": "four"}',
            "4.mask.png": b"not ours",
        },
    )
    source = shards.Shards(tmp_path, 32, 1)
    found = {s.key: s.caption for s in map(source.sample, range(6))}
    assert found == {
        "a/0": "zero",
        "a/1": "one",
        "a/2": "zw\u00f6lf",
        "a/3": "three",
        "a/4": "four",
        f"a/{long}": "long",
    }
    assert len(source) == 6 and not source.skipped and source.name == str(tmp_path)


def test_the_index_says_what_tarfile_and_pillow_say(folder):
    index = shards.read_index(folder)
    for n in (0, 9, 10, 36):
        with tarfile.open(index.tars[index.shard[n]]) as archive:
            content = archive.extractfile(f"{n:09d}.png").read()
        row = index.rows[n]
        whole = index.tars[index.shard[n]].read_bytes()
        assert whole[row["offset"] : row["offset"] + row["size"]] == content
        assert Image.open(io.BytesIO(content)).size == (row["width"], row["height"]) == SIZES[n]
        assert row["letters"] == len(f"picture {n}")


def test_pixels_are_covered_and_cropped_at_the_centre(tmp_path):
    """A ramp along each axis: after the cut, the centre keeps its value and both ends lost the same."""
    x = np.linspace(0, 250, 300)[None, :, None].repeat(100, 0).repeat(3, 2).round().astype(np.uint8)
    for name, array in (("wide", x), ("tall", x.transpose(1, 0, 2))):
        file = io.BytesIO()
        Image.fromarray(array).save(file, "PNG")
        write_tar(tmp_path / name / "0.tar", {"0.png": file.getvalue(), "0.txt": b"ramp"})
        source = shards.Shards(tmp_path / name, 64, 1)
        ramp = source.sample(0).picture if name == "wide" else source.sample(0).picture.transpose(1, 0, 2)
        height, width = ramp.shape[:2]
        assert (height, width) == (48, 80)  # 3 x 16 by 5 x 16, the widest bucket of side 64
        scale = 48 / 100  # the shorter side covers; 300 x 0.48 = 144 columns, of which the middle 80 stay
        column = ((np.arange(80) + 0.5 - 40) / scale + 150 - 0.5) * 250 / 299
        assert np.abs(ramp[24, 2:-2, 0] - column[2:-2]).max() < 1.5


def test_transparency_lies_over_white_and_cameras_are_held_upright(tmp_path):
    clear = io.BytesIO()
    Image.new("RGBA", (32, 32), (0, 0, 255, 0)).save(clear, "PNG")
    exif = Image.Exif()
    exif[0x0112] = 6  # stored on its side: to be turned by 90 degrees clockwise
    halves = Image.new("RGB", (64, 40), "red")
    halves.paste("blue", (32, 0, 64, 40))
    turned = io.BytesIO()
    halves.save(turned, "JPEG", exif=exif, quality=95)
    write_tar(
        tmp_path / "0.tar",
        {"0.png": clear.getvalue(), "0.txt": b"clear", "1.jpg": turned.getvalue(), "1.txt": b"turned"},
    )
    source = shards.Shards(tmp_path, 64, 1)
    found = {s.caption: s.picture for s in map(source.sample, range(2))}
    assert (found["clear"] == 255).all()
    height, width = found["turned"].shape[:2]
    assert (
        height > width
        and found["turned"][4, width // 2, 0] > 200
        and found["turned"][-4, width // 2, 2] > 200
    )


# ------------------------------------------------------------------------------------------------------------
# Buckets
# ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("side, multiple, count", [(256, 16, 13), (512, 16, 27), (512, 32, 13), (32, 16, 1)])
def test_bucket_sides(side, multiple, count):
    buckets = shards.bucket_sides(side, multiple)
    assert len(buckets) == count and (side, side) in buckets
    assert {(w, h) for h, w in buckets} == set(buckets)  # turning a picture turns its bucket
    for h, w in buckets:
        assert h % multiple == w % multiple == 0 and 0.5 <= w / h <= 2
        # The height is off by at most half a multiple, so the area by at most half a multiple times the width.
        assert abs(h * w - side**2) <= multiple / 2 * max(h, w)


def test_a_side_that_does_not_divide(folder):
    with pytest.raises(data.DataError, match="multiple of 16, not 250"):
        shards.Shards(folder, 250, 4)


def test_pictures_go_to_the_bucket_of_nearest_log_ratio():
    random = np.random.default_rng(0)
    rows = np.zeros(500, shards.ROW)
    rows["width"], rows["height"] = random.integers(50, 2000, (2, 500))
    buckets = shards.bucket_sides(256)
    used, which = shards.choose_buckets(rows, buckets, 0)
    assert used == buckets
    for row, k in zip(rows, which):
        distances = [abs(np.log(row["width"] / row["height"] * h / w)) for h, w in buckets]
        assert distances[k] == pytest.approx(min(distances))


def test_small_buckets_join_their_neighbours():
    rows = np.zeros(60, shards.ROW)
    rows["height"] = 100
    rows["width"] = [100] * 30 + [200] * 27 + [110] * 2 + [55]
    used, which = shards.choose_buckets(rows, shards.bucket_sides(256), 10)
    assert len(used) == 2 and np.bincount(which).tolist() == [
        33,
        27,
    ]  # the 110 and the 55 are now cropped as squares


# ------------------------------------------------------------------------------------------------------------
# The order
# ------------------------------------------------------------------------------------------------------------
def test_every_block_has_one_bucket_and_shows_what_it_says(folder):
    source = shards.Shards(folder, 64, 4)
    used = set()
    for b in range(12):
        block = [source.sample(g, 3) for g in range(4 * b, 4 * b + 4)]
        assert {s.picture.shape[:2] for s in block} == {source.bucket(4 * b, 3)}
        used.add(source.bucket(4 * b, 3))
        for s in block:
            assert s.caption == f"picture {int(s.key[-9:])}" and s.picture[..., 0].max() == int(s.key[-9:])
    assert used == set(source.buckets) == {(64, 64), (48, 80), (80, 48)}


@pytest.mark.parametrize(
    "counts, batch", [([17, 11, 9], 4), ([5, 64, 7], 5), ([8], 8), ([1000, 333], 7), ([9, 9], 9)]
)
def test_each_picture_is_shown_as_often_as_every_other(counts, batch):
    """Counted sample by sample: within a bucket at any moment, over all buckets after each epoch."""
    blocks, shown = shards.Blocks(counts, batch), [collections.Counter() for _ in counts]
    g = 0
    for epoch in range(1, 8):
        end = batch * sum(epoch * n // batch for n in counts)  # counted here by another route than `before`
        assert end == batch * int(blocks.before(epoch).sum())
        while g < end:
            k, i = blocks.locate(g, 1)
            if g % batch == 0:
                first = k
            assert k == first and 0 <= i < counts[k]
            shown[k][i] += 1
            g += 1
            if len(shown[k]) == counts[k] or max(shown[k].values()) > 1:  # nobody twice before everybody once
                assert len(shown[k]) == counts[k] and max(shown[k].values()) - min(shown[k].values()) <= 1
        for n, counter in zip(counts, shown):
            assert all(counter[i] in (epoch - 1, epoch) for i in range(n))


def test_the_order_changes_with_the_seed_and_with_the_epoch(folder):
    source = shards.Shards(folder, 64, 4)

    def keys(start, seed):
        return [source.sample(g, seed).key for g in range(start, start + 36)]

    assert keys(0, 0) == keys(0, 0)
    assert len({tuple(keys(0, 0)), tuple(keys(0, 1)), tuple(keys(36, 0))}) == 3
    blocks = [tuple(source.bucket(g, seed) for g in range(0, 36, 4)) for seed in range(4)]
    assert len(set(blocks)) > 1
    even = shards.Blocks([20, 20], 4)  # every epoch has five blocks of each bucket
    assert len({tuple(even.block(g, 0)[0] for g in range(40 * e, 40 * e + 40, 4)) for e in range(4)}) > 1
    one = shards.Blocks(
        [50], 10
    )  # one bucket whose blocks come in order: each pass is another order of the same 50
    passes = [sorted(one.order(0, e)[1].tolist()) for e in range(3)]
    assert passes == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [10, 11, 12, 13, 14]]
    turns = [tuple(one.shuffled(seed, 0, turn).tolist()) for seed in (0, 1) for turn in range(3)]
    assert len(set(turns)) == 6 and all(sorted(t) == list(range(50)) for t in turns)
    first = [one.locate(g, 0)[1] for g in range(50)]
    second = [one.locate(g, 0)[1] for g in range(50, 100)]
    assert set(first) == set(second) == set(range(50))
    groups = [{frozenset(keys[i : i + 10]) for i in range(0, 50, 10)} for keys in (first, second)]
    assert not groups[0] & groups[1]  # and other blocks, not only another order of the same


def test_any_cut_into_ranks_and_micro_batches_sees_one_sequence(folder):
    """Fresh sources, each asked out of order, as 1, 2 or 4 processes and one resumed at a step would."""
    batch = 8
    alone = shards.Shards(folder, 64, batch)
    expected = [alone.sample(g, 5).key for g in range(10 * batch)]
    for world in (2, 4):
        ranks = [shards.Shards(folder, 64, batch) for _ in range(world)]
        share = batch // world
        for step in (7, 0, 9, 3):
            found = []
            for rank, source in enumerate(ranks):
                start = step * batch + rank * share
                found += [source.sample(g, 5).key for g in range(start, start + share)]
            assert found == expected[step * batch : (step + 1) * batch]


def test_threads_and_forked_processes_read_the_same(folder):
    source = shards.Shards(folder, 64, 4)

    def fingerprint(g):
        s = source.sample(g)
        return s.key, s.caption, zlib.crc32(s.picture.tobytes())

    expected = [fingerprint(g) for g in range(40)]
    found = [None] * 40

    def work(start):
        for _ in range(5):
            for g in range(start, 40, 4):
                found[g] = fingerprint(g)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    [t.start() for t in threads], [t.join() for t in threads]
    assert found == expected
    if "fork" in multiprocessing.get_all_start_methods():
        context = multiprocessing.get_context("fork")
        queue = context.Queue()
        jobs = [lambda r=r: queue.put([(g, fingerprint(g)) for g in range(r, 40, 2)]) for r in range(2)]
        workers = [context.Process(target=job) for job in jobs]
        [w.start() for w in workers]
        forked = dict(queue.get(timeout=60) + queue.get(timeout=60))
        [w.join() for w in workers]
        assert [forked[g] for g in range(40)] == expected


def test_mixed_sources_take_turns(folder):
    small, large = shards.Shards(folder, 32, 4), shards.Shards(folder, 64, 4)
    mixed = shards.Mixed([small, large], 4)
    for g in range(48):
        block, place = divmod(g, 4)
        turn, which = divmod(block, 2)
        own = (small, large)[which].sample(4 * turn + place, 2)
        assert mixed.sample(g, 2).key == own.key and mixed.sample(g, 2).picture.shape == own.picture.shape
        assert mixed.bucket(g, 2) == own.picture.shape[:2]
    assert len(mixed) == 2 * len(SIZES) and set(mixed.buckets) == {(32, 32), (64, 64), (48, 80), (80, 48)}
    with pytest.raises(data.DataError, match="comes in batches of 8"):
        shards.Mixed([small, shards.Shards(folder, 64, 8)], 4)


# ------------------------------------------------------------------------------------------------------------
# Damage
# ------------------------------------------------------------------------------------------------------------
def test_a_truncated_tar_is_named_wherever_it_was_cut(tmp_path):
    """Cut in a header, in a picture, in padding, between two members, and just before the end mark."""
    whole = write_shards(tmp_path / "whole", SIZES[:4]) / "00000.tar"
    with tarfile.open(whole) as archive:
        members = archive.getmembers()
        end = archive.offset
    content = whole.read_bytes()
    write_shards(tmp_path / "cut", SIZES[:20])
    third, fourth = members[2:4]
    for cut in (third.offset + 100, third.offset_data + 10, third.offset, fourth.offset - 1, end, end + 100):
        (tmp_path / "cut" / "00001.tar").write_bytes(content[:cut])
        with pytest.raises(data.DataError, match=r"00001\.tar is truncated"):
            shards.read_index(tmp_path / "cut")
        assert not (tmp_path / "cut" / "00001.tar.index").exists()
    overwritten = content[: third.offset] + b"\x07" * 512 + content[third.offset + 512 :]
    (tmp_path / "cut" / "00001.tar").write_bytes(overwritten)
    with pytest.raises(data.DataError, match=r"00001\.tar is truncated or damaged at byte"):
        shards.read_index(tmp_path / "cut")


@pytest.mark.parametrize(
    "members, complaint",
    [
        ({}, "is empty"),
        ({"0.txt": b"no picture"}, "is empty"),
        (
            {"0.png": picture(), "1.png": picture(), "1.txt": b" \n"},
            r"none of its 2 pictures can be used \(2 no caption\)",
        ),
        ({"0.png": b"broken", "0.txt": b"x"}, r"1 broken picture"),
    ],
)
def test_an_unusable_shard_is_an_error_that_names_it(tmp_path, members, complaint):
    write_shards(tmp_path, SIZES[:3])
    write_tar(tmp_path / "00007.tar", members)
    with pytest.raises(data.DataError, match=rf"00007\.tar.*{complaint}"):
        shards.Shards(tmp_path, 32, 1)


def test_zero_bytes_missing_folder_no_tars_too_few(tmp_path, folder):
    (tmp_path / "0.tar").write_bytes(b"")
    with pytest.raises(data.DataError, match=r"0\.tar is truncated"):
        shards.read_index(tmp_path)
    with pytest.raises(data.DataError, match="no such folder"):
        shards.read_index(tmp_path / "absent")
    with pytest.raises(data.DataError, match="holds no .tar"):
        shards.read_index(ROOT)
    with pytest.raises(data.DataError, match="has 37 usable pictures, fewer than one batch of 64"):
        shards.Shards(folder, 32, 64)


def damaged_members():
    """Good: 0 and 9. The others: key -> why it is skipped."""
    grey16 = io.BytesIO()
    Image.fromarray(np.full((20, 20), 40000, np.uint16)).save(grey16, "PNG")
    caption = b"x"
    members = {
        "0.png": picture(),
        "0.txt": caption,
        "1.png": picture(),
        "1.json": b"{not json",
        "2.png": picture(),
        "2.json": b'["a list"]',
        "3.png": picture(),
        "3.json": b'{"caption": null}',
        "4.png": picture(),
        "4.txt": b"\xff\xfe",
        "5.png": bomb(60000, 60000),
        "5.txt": caption,  # beyond Pillow's own limit, an error
        "6.png": bomb(10000, 10000),
        "6.txt": caption,  # where Pillow only warns
        "7.png": b"not a picture",
        "7.txt": caption,
        "8.png": grey16.getvalue(),
        "8.txt": caption,
        "9.png": picture(),
        "9.txt": caption,
        "9.jpg": picture(kind="JPEG"),
        "10.gif": b"GIF89a",
        "10.txt": caption,
        "11.png": bomb(8192, 8193),
        "11.txt": caption,  # just beyond our limit, below Pillow's
    }
    reasons = {
        "1": "its .json is not valid JSON",
        "2": "its .json is not an object",
        "3": "no caption",
        "4": "its caption is not UTF-8",
        "5": "more than 67 million pixels",
        "6": "more than 67 million pixels",
        "7": "broken picture",
        "8": "16-bit or floating-point grey",
        "10": "no .jpg, .png or .webp",
        "11": "more than 67 million pixels",
    }
    return members, reasons


def test_unusable_samples_are_skipped_counted_and_named(tmp_path, capsys, recwarn):
    members, reasons = damaged_members()
    write_tar(tmp_path / "a.tar", members)
    source = shards.Shards(tmp_path, 32, 2)
    skipped = {key.removeprefix("a/"): reason for key, reason in source.skipped.items()}
    second = [key for key in skipped if key.startswith("9.jpg")]
    assert skipped.pop(second[0]) == "a second file for its key" and skipped == reasons
    assert {source.sample(g).key for g in range(4)} == {"a/0", "a/9"} and len(source) == 2
    error = capsys.readouterr().err
    assert (
        "skipped a/1: its .json is not valid JSON" in error
        and "skipped 11 of 13 (3 more than 67 million" in error
    )
    assert not recwarn.list


def test_a_bomb_is_refused_without_decoding(tmp_path, monkeypatch):
    members, _ = damaged_members()
    write_tar(tmp_path / "a.tar", members)

    def decoded(*arguments, **options):
        raise AssertionError("a picture was decoded while indexing")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", decoded)
    assert len(shards.read_index(tmp_path).rows) == 2


def test_a_picture_that_breaks_in_decoding_is_replaced_by_the_next_of_its_bucket(tmp_path, capsys):
    """Half of a PNG: its header is whole. The replacement is the same whoever asks, in whatever order."""
    members = {}
    for i in range(8):
        whole = picture((64, 64) if i % 2 else (96, 64), (i, 0, 0))
        if i in (3, 6):
            noise = io.BytesIO()
            pixels = np.random.default_rng(i).integers(0, 255, (64, 64 if i % 2 else 96, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(noise, "PNG")
            whole = noise.getvalue()[: len(noise.getvalue()) // 2]
        members |= {f"{i}.png": whole, f"{i}.txt": b"x"}
    write_tar(tmp_path / "a.tar", members)
    source, other = shards.Shards(tmp_path, 64, 4), shards.Shards(tmp_path, 64, 4)
    assert len(source) == 8 and not source.skipped
    once = [source.sample(g).key for g in range(16)]
    assert once == list(reversed([other.sample(g).key for g in range(15, -1, -1)]))
    showings = collections.Counter(
        once
    )  # two epochs: 3 is replaced by 5, and 6 by the first of its bucket, 0
    assert showings == {"a/1": 2, "a/5": 4, "a/7": 2, "a/0": 4, "a/2": 2, "a/4": 2}
    assert sorted(source.skipped) == ["a/3", "a/6"]
    error = capsys.readouterr().err
    assert (
        error.count("skipped a/3: cannot be decoded") == 2 and error.count("a/6") == 2
    )  # once for each source


def test_a_bucket_without_a_readable_picture_and_a_tar_that_shrank(tmp_path):
    broken = bomb(64, 64)
    path = write_tar(tmp_path / "a.tar", {"0.png": broken, "0.txt": b"x"})
    source = shards.Shards(tmp_path, 64, 1)
    with pytest.raises(data.DataError, match="no picture of bucket .64, 64. can be decoded"):
        source.sample(0)
    source = shards.Shards(tmp_path, 64, 1)
    path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(data.DataError, match="a.tar has become shorter"):
        source.sample(0)


def odd_exif() -> bytes:
    """A JPEG on its side whose EXIF says the camera's make as a fraction:
    Pillow reads it and cannot write it again."""
    tags = [(0x010F, 5, 1, 38), (0x0112, 3, 1, 6)]  # make: a rational at byte 38; orientation 6
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    exif = (
        b"Exif\0\0II*\0\x08\0\0\0"
        + struct.pack("<H", len(tags))
        + entries
        + bytes(4)
        + struct.pack("<II", 1, 1)
    )
    return picture((48, 32), kind="JPEG", exif=exif)


def test_odd_exif_text_with_a_mark_and_halves_of_characters(tmp_path):
    members = {
        "0.jpg": odd_exif(),
        "0.txt": "\ufeffwith a mark".encode(),
        "2.png": picture(),
        "2.json": b'\xef\xbb\xbf{"caption": " ", "text": "a \\ud83d half"}',
    }
    rows, keys, skipped = shards.scan(write_tar(tmp_path / "0.tar", members))
    assert keys == ["0/0", "0/2"] and not skipped
    assert (rows[0]["width"], rows[0]["height"]) == (32, 48)
    source = shards.Shards(tmp_path, 16, 2, multiple=16)
    assert {source.sample(g).caption for g in range(2)} == {"with a mark", "a \ufffd half"}
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/a.jpg").write_bytes(odd_exif())
    (tmp_path / "folder/metadata.jsonl").write_text(
        json.dumps({"file_name": "a.jpg", "text": "a \ud83d half\u2028line"}) + "\n"
    )
    whole = data.ImageFolder(tmp_path / "folder", 16)
    assert whole.captions == ["a \ufffd half\u2028line"] and not whole.skipped


def test_a_picture_with_a_dot_in_its_name_is_named(tmp_path):
    members = {
        "a.png": picture(),
        "a.txt": b"one",
        "a.mask.png": picture(),
        "b.v1.jpg": picture(kind="JPEG"),
        "b.v1.txt": b"two",
    }
    _, keys, skipped = shards.scan(write_tar(tmp_path / "0.tar", members))
    assert keys == ["0/a"] and list(skipped) == ["0/b.v1.jpg"] and "dot" in skipped["0/b.v1.jpg"]


def test_another_program_s_cache_json_is_left_alone(tmp_path, folder):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/cache.json").write_text('{"theirs": 1}')
    assert not cache.is_cache(tmp_path / "out")
    with pytest.raises(errors.UserError, match="choose another folder"):
        encode(folder, tmp_path / "out")
    assert (tmp_path / "out/cache.json").read_text() == '{"theirs": 1}'


def test_two_sides_do_not_show_the_same_pictures_in_turn(tmp_path):
    write_shards(tmp_path, [(64, 64)] * 40)
    small, large = (shards.Shards(tmp_path, side, 4) for side in (16, 32))
    same = sum(
        {small.sample(g + i).key for i in range(4)} == {large.sample(g + i).key for i in range(4)}
        for g in range(0, 40, 4)
    )
    assert same <= 1


def test_pack_leaves_out_what_training_could_not_use(tmp_path):
    (tmp_path / "in").mkdir()
    for name, content, text in (
        ("a.png", picture(), "one"),
        ("b.png", b"nothing", "two"),
        ("c.png", picture(), ""),
    ):
        (tmp_path / "in" / name).write_bytes(content)
        (tmp_path / "in" / name).with_suffix(".txt").write_text(text)
    assert shards.pack(tmp_path / "in", tmp_path / "out") == (
        1,
        {"b.png": "broken picture", "c.png": "no caption"},
    )


def test_small_pictures_can_be_left_out(folder):
    assert len(shards.Shards(folder, 64, 4)) == 37
    assert len(shards.Shards(folder, 64, 4, enlarge=1.5)) == 20  # 40 x 40 to 64 x 64 is 1.6 times
    with pytest.raises(data.DataError, match="has 0 usable"):
        shards.Shards(folder, 64, 4, enlarge=1.0)


# ------------------------------------------------------------------------------------------------------------
# The index
# ------------------------------------------------------------------------------------------------------------
def test_the_index_is_made_once_and_again_for_a_tar_that_changed(tmp_path, monkeypatch):
    write_shards(tmp_path / "t", SIZES[:30])
    scanned = []
    scan = shards.scan
    monkeypatch.setattr(shards, "scan", lambda tar: scanned.append(tar.name) or scan(tar))
    first = shards.read_index(tmp_path / "t")
    again = shards.read_index(tmp_path / "t")
    assert scanned == ["00000.tar", "00001.tar", "00002.tar"]
    assert np.array_equal(first.rows, again.rows) and np.array_equal(first.keys, again.keys)
    tar = tmp_path / "t" / "00001.tar"
    os.utime(tar, ns=(0, tar.stat().st_mtime_ns + 1))  # another time of the same content
    shards.read_index(tmp_path / "t")
    stat = tar.stat()
    write_tar(tar, {"x.png": picture((50, 20)), "x.txt": b"new"})
    os.utime(tar, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # another size at the same time
    changed = shards.read_index(tmp_path / "t")
    assert (
        scanned[3:] == ["00001.tar", "00001.tar"] and len(changed.rows) == 21 and b"00001/x" in changed.keys
    )
    (tmp_path / "t" / "00002.tar.index").write_bytes(b"damaged")
    assert np.array_equal(shards.read_index(tmp_path / "t").rows, changed.rows) and scanned[5:] == [
        "00002.tar"
    ]
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize(
    "workers", [1, pytest.param(2, marks=pytest.mark.slow)]
)  # each process imports torch first
def test_the_index_can_lie_elsewhere_and_be_made_by_many_processes(tmp_path, workers):
    write_shards(tmp_path / "t", SIZES[:20])
    apart = shards.read_index(tmp_path / "t", tmp_path / "index", workers=workers)
    assert not list((tmp_path / "t").glob("*.index")) and len(list((tmp_path / "index").glob("*.index"))) == 2
    beside = shards.read_index(tmp_path / "t")
    assert np.array_equal(apart.rows, beside.rows) and apart.tars == beside.tars


# ------------------------------------------------------------------------------------------------------------
# The cache
# ------------------------------------------------------------------------------------------------------------
def encode(source_folder, out, **options):
    options = {"batch_size": 4, "per_shard": 4, "encode_batch": 3, "fake": True, "tokens": "fp32"} | options
    text, pixels = encoders.text_encoder("words", options.pop("txt_len", 8)), encoders.autoencoder("pixels")
    part = options.pop("part", (0, 1))
    cache.make(source_folder, out, 64, (text, pixels), cache.Settings(**options), part)


def contents(out):
    return {p.name: p.read_bytes() for p in sorted(out.iterdir())}


def test_a_cache_resumed_equals_one_made_in_one_go(tmp_path, folder, monkeypatch):
    encode(folder, tmp_path / "whole")
    whole, calls = encoders.Pixels.encode, []

    def interrupted(self, images):
        calls.append(1)
        if len(calls) in (6, 13):
            raise KeyboardInterrupt
        return whole(self, images)

    monkeypatch.setattr(encoders.Pixels, "encode", interrupted)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            encode(folder, tmp_path / "pieces")
        with pytest.raises(data.DataError, match=r"lacks \d+ of 11 shards.*again"):
            cache.CachedShards(tmp_path / "pieces", 4)
    done = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "pieces").iterdir()}
    encode(folder, tmp_path / "pieces")
    assert contents(tmp_path / "whole") == contents(tmp_path / "pieces")
    assert len(done) > 4 and all(
        (tmp_path / "pieces" / name).stat().st_mtime_ns == t for name, t in done.items()
    )
    for part in (2, 0, 1):  # three processes share the work
        encode(folder, tmp_path / "parts", part=(part, 3))
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


def test_bf16_tokens_and_no_fake_prompts(tmp_path, folder):
    encode(folder, tmp_path / "c", tokens="bf16", fake=False)
    cached = cache.CachedShards(tmp_path / "c", 4)
    sample = cached.sample(0)
    tokens, pooled = encoders.text_encoder("words", 8)([sample.caption])
    assert torch.equal(sample.tokens, tokens[0].bfloat16().float()) and torch.equal(sample.pooled, pooled[0])
    assert sample.fake is None
    with pytest.raises(data.DataError, match="--fake"):
        cache.collate([sample], [False], cached.null, cached.null_fake, with_fake=True)


def test_a_broken_picture_is_replaced_in_the_cache_as_without_it(tmp_path):
    """Also when its replacement lies in another shard of the cache, and whichever part meets it first."""
    members = {f"{i}.png": picture((64, 64), (i, 0, 0)) for i in range(6)} | {
        f"{i}.txt": b"x" for i in range(6)
    }
    write_tar(tmp_path / "t" / "a.tar", members | {f"{i}.png": bomb(64, 64) for i in (1, 4, 5)})
    encode(tmp_path / "t", tmp_path / "c", batch_size=3, per_shard=2)
    for part in (2, 1, 0):
        encode(tmp_path / "t", tmp_path / "parts", batch_size=3, per_shard=2, part=(part, 3))
    assert contents(tmp_path / "c") == contents(tmp_path / "parts")
    source, cached = shards.Shards(tmp_path / "t", 64, 3), cache.CachedShards(tmp_path / "c", 3)
    assert [cached.sample(g).key for g in range(18)] == [source.sample(g).key for g in range(18)]
    assert cached.skipped == source.skipped and sorted(cached.skipped) == ["a/1", "a/4", "a/5"]
    with pytest.raises(data.DataError, match="64x64 of .* has 6 pictures, fewer than a batch of 8"):
        cache.CachedShards(tmp_path / "c", 8)


def test_a_cache_refuses_other_settings_other_tars_and_damage(tmp_path):
    write_shards(tmp_path / "t", SIZES[:12])
    encode(tmp_path / "t", tmp_path / "c")
    before = contents(tmp_path / "c")
    for options, complaint in (
        ({"txt_len": 9}, "txt_len 8, not 9"),
        ({"fake": False}, "fake True, not False"),
        ({"per_shard": 5}, "per_shard 4, not 5"),
    ):
        with pytest.raises(data.DataError, match=complaint):
            encode(tmp_path / "t", tmp_path / "c", **options)
    write_shards(tmp_path / "t", SIZES[:13])
    with pytest.raises(data.DataError, match="made with other tars"):
        encode(tmp_path / "t", tmp_path / "c")
    write_shards(tmp_path / "t", SIZES[:12])
    (tmp_path / "t" / "00001.tar").rename(tmp_path / "t" / "1.tar")  # the same counts
    with pytest.raises(data.DataError, match="made with other tars"):
        encode(tmp_path / "t", tmp_path / "c")
    assert contents(tmp_path / "c") == before
    with pytest.raises(data.DataError, match="txt_len 8, not 16"):
        cache.CachedShards(tmp_path / "c", 4).check("words", 16, "pixels")
    (tmp_path / "c" / "64x64_00001.safetensors").write_bytes(before["64x64_00001.safetensors"][:-9])
    with pytest.raises(data.DataError, match="64x64_00001.safetensors is damaged"):
        cache.CachedShards(tmp_path / "c", 4)
    with pytest.raises(data.DataError, match="no cache.json"):
        cache.CachedShards(tmp_path / "t", 4)


# ------------------------------------------------------------------------------------------------------------
# The commands
# ------------------------------------------------------------------------------------------------------------
def run(monkeypatch, *arguments, program=shards):
    monkeypatch.setattr(sys, "argv", [f"{program.__name__}.py", *map(str, arguments)])
    program.main()


def test_report_against_hand_counts(tmp_path, monkeypatch, capsys):
    members, reasons = damaged_members()
    write_tar(tmp_path / "b.tar", members)
    wide = picture((300, 150))
    write_tar(
        tmp_path / "a.tar",
        {"0.png": wide, "0.txt": b"four", "1.png": picture((600, 600)), "1.json": b'{"text": "a"}'},
    )
    run(monkeypatch, "report", tmp_path, "--json", "--skipped")
    result = json.loads(capsys.readouterr().out)
    assert result["shards"] == 2 and result["pictures"] == 4
    assert result["picture_bytes"] == len(wide) + len(picture((600, 600))) + 2 * len(picture())
    assert result["tar_bytes"] == sum(p.stat().st_size for p in tmp_path.glob("*.tar"))
    assert result["width"] == {"min": 40, "median": 170.0, "mean": 245.0, "max": 600}
    assert result["height"] == {"min": 30, "median": 90.0, "mean": 202.5, "max": 600}
    assert result["caption_letters"] == {"min": 1, "median": 1.0, "mean": 1.75, "max": 4}
    assert result["skipped"] == dict(collections.Counter([*reasons.values(), "a second file for its key"]))
    assert len(result["skipped_keys"]) == 11 and result["skipped_keys"]["b/3"] == "no caption"
    held = {
        side: {name: n for name, n in row["buckets"].items() if n} for side, row in result["sides"].items()
    }
    # 2:1 is beyond the widest bucket of both sides; 4:3 lies nearest to 288 : 224 at side 256 and to 592 : 448 at 512.
    assert held == {
        "256": {"192x352": 1, "256x256": 1, "224x288": 2},
        "512": {"368x720": 1, "512x512": 1, "448x592": 2},
    }
    assert result["sides"]["256"]["enlarged"] == 3 and result["sides"]["512"]["enlarged"] == 3
    run(monkeypatch, "report", tmp_path, "--sides", "256")
    text = capsys.readouterr().out
    assert (
        "4 captioned pictures in 2 shards" in text
        and "224x288          2  50.00%" in text
        and "512x512" not in text
    )


def test_pack_and_cache_as_a_user_would(tmp_path, monkeypatch, capsys):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    lines = []
    for i in range(7):
        (pictures / f"{i}.png").write_bytes(picture((50, 40), (i, 0, 0)))
        lines.append(json.dumps({"file_name": f"{i}.png", "text": f"number {i}"}))
    (pictures / "8.bmp").write_bytes(picture(kind="BMP"))
    lines += [json.dumps({"file_name": name, "text": "x"}) for name in ("8.bmp", "absent.jpg")]
    (pictures / "metadata.jsonl").write_text("\n".join(lines))

    done = subprocess.run(
        [sys.executable, "-m", "scale.shards", "pack", pictures, tmp_path / "tars", "--per-shard", "3"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "packed 7 pictures" in done.stdout, done.stderr
    assert "8.bmp: not a .jpg" in done.stderr and "absent.jpg: no such file" in done.stderr
    source = shards.Shards(tmp_path / "tars", 32, 1)
    assert sorted((s.caption, s.key) for s in map(source.sample, range(7)))[3] == (
        "number 3",
        "00001/000010000",
    )
    arguments = [
        tmp_path / "tars",
        tmp_path / "cache",
        "--side",
        32,
        "--text",
        "words",
        "--device",
        "cpu",
        "--autoencoder",
        "pixels",
        "--batch-size",
        2,
        "--per-shard",
        4,
    ]
    run(monkeypatch, *arguments, "--part", "1/2", program=cache)
    assert "cache: 1 shards are left to the other parts" in capsys.readouterr().out
    run(monkeypatch, *arguments, program=cache)
    assert "cache: complete" in capsys.readouterr().out
    assert cache.CachedShards(tmp_path / "cache", 2).sample(0).latent.shape == (3, 32, 32)


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        ([], "pack, report"),
        (["unpack"], "pack, report"),
        (["report", "absent"], "no such folder: absent"),
        (["pack", "{folder}", "{folder}"], "exists"),
        (["pack", "{folder}", "{new}"], "no captions"),
        (["cache", "{folder}", "{new}"], "--side"),
        (["report", "{folder}", "--sides", "0"], "--sides"),
        (["cache", "{folder}", "{new}", "--side", "64", "--part", "2/2"], "--part"),
        (["pack", "{folder}", "{new}", "--per-shard", "10001"], "10000"),
        (
            ["cache", "{folder}", "{new}", "--side", "64", "--text", "words", "--autoencoder", "pixels"],
            "lower the batch",
        ),
    ],
)
def test_what_the_user_can_mend_is_one_line(tmp_path, folder, monkeypatch, capsys, arguments, complaint):
    arguments = [a.format(folder=folder, new=tmp_path / "new") for a in arguments]
    program = cache if arguments[:1] == ["cache"] else shards
    monkeypatch.setattr(sys, "argv", [f"{program.__name__}.py", *arguments[program is cache :]])
    with pytest.raises(SystemExit) as stopped:
        errors.run(program.main)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.startswith(f"{program.__name__}.py: ")
    assert error.count("\n") == 1 and complaint in error
    assert not list(tmp_path.iterdir())
