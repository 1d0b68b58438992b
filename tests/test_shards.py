"""Tar shards: their index, the buckets, the order of samples, damage. (What lies in a tar: test_files.py.)"""

import collections
import gzip
import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from programs import refused

import data
import files
from scale import shards

ROOT = Path(__file__).parent.parent


def picture(size=(40, 30), color=(200, 0, 0), kind="PNG", image=None) -> bytes:
    file = io.BytesIO()
    (image or Image.new("RGB", size, color)).save(file, kind)
    return file.getvalue()


def half_a_picture(size) -> bytes:
    """A PNG whose header is whole, and whose pixels end too early."""
    noise = np.random.default_rng(0).integers(0, 255, (*size[::-1], 3)).astype(np.uint8)
    content = picture(image=Image.fromarray(noise))
    return content[: len(content) // 2]


def write_tar(path, members: dict[str, bytes], mode="w") -> Path:
    path.parent.mkdir(exist_ok=True, parents=True)
    with tarfile.open(path, mode) as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def write_shards(folder, sizes, per_tar=10):
    """One captioned picture of each size; its red channel tells its number."""
    for t in range(0, len(sizes), per_tar):
        some = range(t, min(t + per_tar, len(sizes)))
        members = {f"{i:09d}.png": picture(sizes[i], (i, 0, 0)) for i in some}
        members |= {f"{i:09d}.txt": f"picture {i}".encode() for i in some}
        write_tar(folder / f"{t // per_tar:05d}.tar", members)
    return folder


SIZES = [(40, 40)] * 17 + [(60, 40)] * 11 + [(40, 64)] * 9  # three aspect ratios: 1, 3:2 and 5:8


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("data") / "tars", SIZES)


# --- The index ----------------------------------------------------------------------------------------------
def test_the_index_is_made_once_and_again_for_a_tar_that_changed(tmp_path, monkeypatch):
    write_shards(tmp_path / "t", SIZES[:30])
    scanned, scan = [], shards.scan
    monkeypatch.setattr(shards, "scan", lambda tar, key: scanned.append(tar.name) or scan(tar, key))
    first, again = shards.read_index(tmp_path / "t"), shards.read_index(tmp_path / "t")
    assert scanned == ["00000.tar", "00001.tar", "00002.tar"] and np.array_equal(first.rows, again.rows)
    tar = tmp_path / "t" / "00001.tar"
    os.utime(tar, ns=(0, tar.stat().st_mtime_ns + 1))  # another time of the same content
    shards.read_index(tmp_path / "t")
    stat = tar.stat()
    write_tar(tar, {"x.png": picture((50, 20)), "x.txt": b"new"})
    os.utime(tar, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # another size at the same time
    source = shards.Shards(tmp_path / "t", 32, 1)
    assert scanned[3:] == ["00001.tar"] * 2 and source.numbers == 21 and source.text(10) == ["00001/x", "new"]
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])  # each imports torch first
def test_the_index_can_lie_elsewhere_and_be_made_by_many_processes(tmp_path, workers):
    write_shards(tmp_path / "t/a", SIZES[:20])
    apart = shards.read_index(tmp_path / "t", str(tmp_path / "index"), workers=workers)
    assert not list((tmp_path / "t").rglob("*.index")) and len(list((tmp_path / "index").iterdir())) == 4
    beside = shards.read_index(tmp_path / "t")
    assert np.array_equal(apart.rows, beside.rows) and apart.tars == beside.tars


@pytest.mark.parametrize("names", [[""], ["a/1.tar", "a/2.tar"], ["a/{1..2}.tar"]], ids=str)
def test_ways_to_name_tars(names, tmp_path):
    """A folder of folders, tars, a range: tars 1 and 2 of three."""
    for i in (1, 2):
        write_tar(tmp_path / f"a/{i}.tar", {"0.png": picture((32, 32), (i, 0, 0)), "0.txt": str(i).encode()})
    (tmp_path / "b").mkdir()
    (tmp_path / "b/loose.png").write_bytes(picture())
    (tmp_path / "b/3.tar.gz").write_bytes(gzip.compress(b""))
    source = shards.Shards([f"{tmp_path}/{name}" for name in names], 32, 1)
    found = sorted((s.caption, s.key, s.picture.max()) for s in map(source.sample, range(2)))
    assert found == [("1", "1/0", 1), ("2", "2/0", 2)]
    left_out = {"b/3.tar.gz": "compressed", "b/loose.png": "beside the tars"} if names == [""] else {}
    assert source.skipped == left_out
    assert source.summary.endswith("2 pictures in 2 tars, 2 captions" + files.summary(left_out))


# --- Buckets ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("side, multiple, count", [(256, 16, 13), (512, 16, 27), (512, 32, 13), (32, 16, 1)])
def test_bucket_sides(side, multiple, count):
    buckets = shards.bucket_sides(side, multiple)
    assert len(buckets) == count and (side, side) in buckets
    assert {(w, h) for h, w in buckets} == set(buckets)  # turning a picture turns its bucket
    for h, w in buckets:
        assert h % multiple == w % multiple == 0 and 0.5 <= w / h <= 2
        # The height is off by at most half a multiple, so the area by at most half a multiple times the width.
        assert abs(h * w - side**2) <= multiple / 2 * max(h, w)


def test_pictures_go_to_the_bucket_of_nearest_log_ratio():
    random = np.random.default_rng(0)
    rows, buckets = np.zeros(500, shards.ROW), shards.bucket_sides(256)
    rows["width"], rows["height"] = random.integers(50, 2000, (2, 500))
    used, which = shards.choose_buckets(rows, buckets, 0)
    distances = np.abs(np.log(rows["width"] / rows["height"])[:, None] - np.log([w / h for h, w in buckets]))
    assert used == buckets
    np.testing.assert_allclose(distances[np.arange(500), which], distances.min(1))


def test_small_buckets_join_their_neighbours():
    rows = np.zeros(60, shards.ROW)
    rows["height"], rows["width"] = 100, [100] * 30 + [200] * 27 + [110] * 2 + [55]
    used, which = shards.choose_buckets(rows, shards.bucket_sides(256), 10)
    # The 110 and the 55 are now cropped as squares
    assert len(used) == 2 and np.bincount(which).tolist() == [33, 27]


# --- The order ----------------------------------------------------------------------------------------------
def test_every_block_has_one_bucket_and_shows_what_it_says(folder):
    source = shards.Shards(folder, 64, 4)
    used = set()
    for b in range(12):
        block = [source.sample(g, 3) for g in range(4 * b, 4 * b + 4)]
        assert {s.picture.shape[:2] for s in block} == {source.bucket(4 * b, 3)}
        used.add(source.bucket(4 * b, 3))
        for s in block:
            assert s.caption == f"picture {int(s.key[-9:])}" and s.picture[..., 0].max() == int(s.key[-9:])
    assert source.buckets == {(80, 48): 9 / 37, (64, 64): 17 / 37, (48, 80): 11 / 37}
    assert used == set(source.buckets)


@pytest.mark.parametrize(
    "counts, batch", [([17, 11, 9], 4), ([5, 64, 7], 5), ([8], 8), ([1000, 333], 7), ([9, 9], 9)]
)
def test_each_picture_is_shown_as_often_as_every_other(counts, batch):
    """Counted sample by sample: within a bucket at any moment, over all buckets after each epoch."""
    blocks, shown, g = shards.Blocks(counts, batch), [collections.Counter() for _ in counts], 0
    for epoch in range(1, 8):
        end = batch * sum(epoch * n // batch for n in counts)  # counted here by another route than `before`
        assert end == batch * int(blocks.before(epoch).sum())
        for g in range(g, end):
            k, i = blocks.locate(g, 1)
            if g % batch == 0:
                first = k
            assert k == first and 0 <= i < counts[k]
            shown[k][i] += 1
            if len(shown[k]) == counts[k] or max(shown[k].values()) > 1:  # nobody twice before everybody once
                assert len(shown[k]) == counts[k] and max(shown[k].values()) - min(shown[k].values()) <= 1
        g = end
        for n, counter in zip(counts, shown):
            assert all(counter[i] in (epoch - 1, epoch) for i in range(n))


def test_the_order_changes_with_the_seed_the_side_and_the_epoch():
    even = shards.Blocks([20, 20], 4)  # every epoch has five blocks of each bucket
    one, other = shards.Blocks([50], 10), shards.Blocks([50], 10, side=32)
    places = ((0, 0), (1, 0), (0, 1))  # epoch, seed
    buckets = [[even.block(40 * e + i, s)[0] for i in range(0, 40, 4)] for e, s in places]
    passes = [one.shuffled(seed, 0, turn).tolist() for seed in (0, 1) for turn in range(3)]
    sides = [[blocks.locate(g, 0)[1] for g in range(50)] for blocks in (one, other)]
    for orders in (buckets, passes, sides):
        assert len(set(map(tuple, orders))) == len(orders)
    assert all(sorted(some) == list(range(50)) for some in passes + sides)
    groups = [{frozenset(some[i : i + 10]) for i in range(0, 50, 10)} for some in passes[:2]]
    assert not groups[0] & groups[1]  # other blocks, not only another order of the same


# --- Damage -------------------------------------------------------------------------------------------------
def test_a_truncated_tar_is_named_wherever_it_was_cut(tmp_path):
    """Cut in a header, in a picture, in padding, between two members, and just before the end mark; overwritten."""
    tar = write_shards(tmp_path, SIZES[:20]) / "00001.tar"
    with tarfile.open(tar) as archive:
        (*_, third, fourth), end = archive.getmembers()[:4], archive.offset
    content = tar.read_bytes()
    cuts = (third.offset + 100, third.offset_data + 10, third.offset, fourth.offset - 1, end, end + 100, 0)
    overwritten = content[: third.offset] + b"\x07" * 512 + content[third.offset + 512 :]
    for damaged in [*(content[:cut] for cut in cuts), overwritten]:
        tar.write_bytes(damaged)
        with pytest.raises(data.DataError, match=r"00001\.tar is truncated"):
            shards.read_index(tmp_path)
        assert not (tmp_path / "00001.tar.index").exists()


@pytest.mark.parametrize(
    "content, said",
    [
        ({}, "holds no picture with a caption"),
        ({"0.png": picture(), "1.png": picture(), "1.json": b"{}"}, r"2 no caption \(0.png, 1.png\)"),
        ({"a.b.tif": b"", "a.b.txt": b"x"}, r"left out: 1 without a picture \(a.b.txt\)"),
        (gzip.compress(b"x" * 2000), "is compressed, so .*gunzip"),
    ],
    ids=["empty", "no captions", "no pictures", "gzip"],
)
def test_an_unusable_shard_is_an_error_that_names_it(tmp_path, content, said):
    write_shards(tmp_path, SIZES[:3])
    write_tar(tmp_path / "00007.tar", content if isinstance(content, dict) else {})
    if isinstance(content, bytes):
        (tmp_path / "00007.tar").write_bytes(content)
    with pytest.raises(data.DataError, match=rf"00007\.tar.*{said}") as caught:
        shards.Shards(tmp_path, 32, 1)
    assert "delete" not in str(caught.value)  # data


@pytest.mark.parametrize(
    "names, said",
    [
        (["absent"], "no such folder: absent"),
        (["absent.tar"], "no such tar: absent.tar"),
        (["{}/{0..2}.tar"], "no such tar: .*/0.tar"),
        ([str(ROOT / "peers")], "holds no .tar"),
        (["{}", "{}"], "two tars are called 00000.tar"),
        (["{}"], "37 pictures in 4 tars.*; one batch has 64"),
    ],
)
def test_what_cannot_be_opened(folder, names, said):
    with pytest.raises(data.DataError, match=said):
        shards.Shards([name.replace("{}", str(folder)) for name in names], 32, 64)


def test_what_a_tar_holds_twice_or_behind_its_end_is_counted(tmp_path):
    write_shards(tmp_path, SIZES[:20])
    first, second = (tmp_path / name for name in ("00000.tar", "00001.tar"))
    first.write_bytes(first.read_bytes() + second.read_bytes())
    (left_out,) = shards.read_index(first).skipped.items()
    assert left_out[0].startswith("00000/00000.tar from byte") and "a second tar" in left_out[1]
    with tarfile.open(tmp_path / "twice.tar", "w") as tar:
        for content in (picture((32, 32)), b"a ring", picture((64, 32))):
            member = tarfile.TarInfo("a.txt" if content == b"a ring" else "a.png")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    index = shards.read_index(tmp_path / "twice.tar")
    assert index.rows["width"] == 32 and list(index.skipped.values()) == ["second file of its name"]


def test_a_picture_that_breaks_in_decoding_is_replaced_by_the_next_of_its_bucket(tmp_path):
    """The replacement is the same whoever asks, in whatever order."""
    sizes = [(64, 64) if i % 2 else (96, 64) for i in range(8)]
    members = {
        f"{i}.png": half_a_picture(size) if i in (3, 6) else picture(size) for i, size in enumerate(sizes)
    }
    write_tar(tmp_path / "a.tar", members | {f"{i}.txt": b"x" for i in range(8)})
    source, other = shards.Shards(tmp_path, 64, 4), shards.Shards(tmp_path, 64, 4)
    assert source.numbers == 8 and not source.skipped
    once = [source.sample(g).key for g in range(16)]
    assert once == list(reversed([other.sample(g).key for g in range(15, -1, -1)]))
    # Two epochs: 3 is replaced by 5, and 6 by the first of its bucket, 0
    assert collections.Counter(once) == {"a/1": 2, "a/5": 4, "a/7": 2, "a/0": 4, "a/2": 2, "a/4": 2}
    assert source.skipped == {"a/3": "broken picture", "a/6": "broken picture"}


def test_a_bucket_without_a_readable_picture_and_a_tar_that_shrank(tmp_path):
    path = write_tar(tmp_path / "a.tar", {"0.png": half_a_picture((64, 64)), "0.txt": b"x"})
    with pytest.raises(data.DataError, match="no picture of bucket .64, 64. can be decoded"):
        shards.Shards(tmp_path, 64, 1).sample(0)
    source = shards.Shards(tmp_path, 64, 1)
    path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(data.DataError, match="a.tar has become shorter"):
        source.sample(0)


# --- The command --------------------------------------------------------------------------------------------
def test_pack_as_a_user_would(tmp_path, monkeypatch, capsys):
    """What a folder holds, whatever its layout, is in the tars unchanged; what training cannot use is named."""
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    lines = ["file_name,text", "absent.jpg,x", "7.png,x", "0.png,zero"]
    for i, kind in enumerate(["PNG", "JPEG", "BMP", "PNG", "JPEG", "BMP", "PNG"]):
        (pictures / f"{i}.{kind.lower()}").write_bytes(picture((50, 40), (i, 0, 0), kind))
        lines += [f"{i}.{kind.lower()},number {i}"]
    (pictures / "7.png").write_bytes(b"broken")
    (pictures / "metadata.csv").write_text("\n".join(lines))
    command = [sys.executable, "-m", "scale.shards", pictures, tmp_path / "tars", "--per-shard", "3"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "packed 7 pictures" in done.stdout, done.stderr
    assert "1 no such file (absent.jpg)" in done.stdout and "1 broken picture (7.png)" in done.stdout
    source = shards.Shards(tmp_path / "tars", 32, 1)
    captions, keys = zip(*[source.picture(0, i)[1:] for i in range(7)])
    assert list(captions) == [["zero", "number 0"], *([f"number {i}"] for i in range(1, 7))]
    assert keys[2:4] == ("00000/000000002", "00001/000010000")
    assert source.content(1) == (pictures / "1.jpeg").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pictures", "tars"]
    assert "exists" in refused(monkeypatch, capsys, shards, pictures, tmp_path / "tars")
