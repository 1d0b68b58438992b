"""How fast data come here: pictures from tar shards, encoded samples from a cache, and an index of ten million.

    python engine/data_speed.py --out results/data-speed.json
    python engine/data_speed.py --pictures 40 --index-size 100000       # in seconds, to see that it works

Everything is made up, in a temporary folder, and read on one thread: photographs of smooth noise (0.3 to 6 megapixels,
JPEG at quality 90), a stand-in for the encoders that gives tensors of FLUX's sizes, an index without tars behind it.
What is compared takes turns.

    pictures    a second, at 256 pixels: from their tars (shards.Shards: read, decode, resize, crop), beside Pillow
                alone, which decodes and resizes the same bytes from memory
    cache       bytes a second: cache.CachedShards.sample in training's order, beside plain reads of as many bytes at
                the same kind of places; after the files were dropped from the system's cache (cold), and again (warm)
    index       seconds and memory to begin with 10 million samples in 1,000 tars, and to find sample 500 million
"""

import argparse
import io
import os
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

if (
    __name__ == "__main__"
):  # started as a file: modules are found from the project's folder, not from this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from engine import checkpoint, errors, machine
from engine.randomness import rng
from scale import cache, shards

SIDE = 256
SIZES = (
    (640, 480),
    (480, 640),
    (1024, 768),
    (1200, 900),
    (800, 800),
    (2048, 1365),
    (3000, 2000),
    (1500, 1000),
)
FAR = 500_000_000  # a sample in the middle of the paper's run


def photograph(number: int) -> bytes:
    """A JPEG of smooth noise with a little grain; its size is one of SIZES."""
    width, height = SIZES[number % len(SIZES)]
    random = rng(0, "photograph", number)
    smooth = Image.fromarray(random.integers(0, 256, (9, 12, 3), dtype=np.uint8)).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    grain = random.integers(-12, 13, (height, width, 1))
    content = io.BytesIO()
    Image.fromarray((np.asarray(smooth) + grain).clip(0, 255).astype(np.uint8)).save(
        content, "JPEG", quality=90
    )
    return content.getvalue()


def in_turns(works: dict, rounds: int) -> dict[str, float]:
    """The median seconds of each piece of work, in turns, after one round that is not counted."""
    times = {name: [] for name in works}
    for turn in range(rounds + 1):
        for name, work in works.items():
            began = time.perf_counter()
            work()
            if turn:
                times[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in times.items()}


# ------------------------------------------------------------------------------------------------------------
# Pictures
# ------------------------------------------------------------------------------------------------------------
def make_tars(home: Path, pictures: int) -> Path:
    """Tars of so many photographs with captions."""
    (home / "pictures").mkdir()
    for number in range(pictures):
        (home / "pictures" / f"{number:05}.jpg").write_bytes(photograph(number))
        (home / "pictures" / f"{number:05}.txt").write_text(f"photograph number {number}")
    shards.pack(home / "pictures", home / "tars")
    return home / "tars"


def measure_pictures(tars: Path, rounds: int) -> dict[str, float]:
    """Pictures a second: from the tars, by Pillow alone, and the tars' bytes alone; and the first over the second."""
    source = shards.Shards(tars, SIDE, batch_size=2)
    jobs = [(int(n), *source.buckets[k]) for k, members in enumerate(source.members) for n in members]

    def content(n: int) -> bytes:
        row = source.rows[n]
        with open(source.tars[source.shard[n]], "rb") as file:
            return shards.read_at(file, row["offset"], row["size"])

    contents = [content(n) for n, _, _ in jobs]

    def from_tars():
        for job in jobs:
            source.read(*job)

    def by_pillow():
        for (_, height, width), jpeg in zip(jobs, contents):
            ImageOps.fit(Image.open(io.BytesIO(jpeg)), (width, height), Image.Resampling.LANCZOS).load()

    def bytes_alone():
        for n, _, _ in jobs:
            content(n)

    seconds = in_turns({"from tars": from_tars, "pillow": by_pillow, "bytes alone": bytes_alone}, rounds)
    rates = {name: len(jobs) / t for name, t in seconds.items()}
    return rates | {"from tars / pillow": rates["from tars"] / rates["pillow"]}


# ------------------------------------------------------------------------------------------------------------
# The cache
# ------------------------------------------------------------------------------------------------------------
class StandInText:
    """Tensors of the sizes of T5's and CLIP's, without a network."""

    name, txt_len = "stand-in", 256

    def __call__(self, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.rand(len(prompts), 256, 4096), torch.rand(len(prompts), 768)


class StandInAutoencoder:
    """Latents of the sizes of FLUX's."""

    name, factor = "stand-in", 8

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return torch.rand(len(x), 16, x.shape[2] // 8, x.shape[3] // 8)


def forget(paths: list[Path]) -> bool:
    """Drop files from the system's cache; false where it has no way to ask for that."""
    if not hasattr(os, "posix_fadvise"):
        return False
    for path in paths:
        checkpoint.to_disk(path)
        handle = os.open(path, os.O_RDONLY)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)
    return True


def measure_cache(tars: Path, home: Path, rounds: int) -> dict:
    """Bytes a second of cached samples and of plain reads, cold and warm, and the first over the second."""
    cache.make(
        tars,
        home / "cache",
        SIDE,
        (StandInText(), StandInAutoencoder()),
        cache.Settings(batch_size=2, per_shard=64),
    )
    source = cache.CachedShards(home / "cache", 2)
    files = sorted((home / "cache").glob("*x*.safetensors"))
    size = sum(path.stat().st_size for path in files) // len(source)  # of a sample
    places = [(path, offset) for path in files for offset in range(0, path.stat().st_size - size + 1, size)]
    order = rng(0, "places").permutation(len(places))

    def samples():
        for g in range(len(source)):
            source.sample(g)

    def plain():
        for i in order:
            path, offset = places[i]
            with open(path, "rb", buffering=0) as file:
                file.seek(offset)
                file.read(size)

    result = {"samples": len(source), "bytes_of_a_sample": size}
    read = {"samples": size * len(source), "plain": size * len(places)}
    for state in ("cold", "warm"):
        times = {"samples": [], "plain": []}
        for _ in range(rounds):
            for name, work in (("samples", samples), ("plain", plain)):
                if state == "cold" and not forget(files):
                    continue
                began = time.perf_counter()
                work()
                times[name].append(time.perf_counter() - began)
        if times["plain"]:
            rates = {name: read[name] / statistics.median(values) for name, values in times.items()}
            result[state] = rates | {"samples / plain": rates["samples"] / rates["plain"]}
    return result


# ------------------------------------------------------------------------------------------------------------
# A large index
# ------------------------------------------------------------------------------------------------------------
def made_up_index(size: int, tars: int = 1000) -> shards.Index:
    """The index of so many samples, of sizes as on the web, in tars that do not exist."""
    random, rows = rng(0, "index"), np.zeros(size, shards.ROW)
    rows["offset"], rows["size"] = np.arange(size) % 10_000 * 200_000, 150_000
    rows["width"], rows["height"] = random.integers(256, 2049, size), random.integers(256, 2049, size)
    rows["text_offset"], rows["text_size"], rows["letters"] = rows["offset"] + 150_016, 80, 80
    rows["check"] = random.integers(0, 2**32, size)
    keys = np.char.zfill(np.arange(size).astype("S9"), 9)
    shard = (np.arange(size, dtype=np.int64) * tars // size).astype(np.int32)
    return shards.Index([Path(f"{n:05}.tar") for n in range(tars)], shard, rows, keys, {})


def peak_memory() -> int:
    """The most bytes that this process has ever held."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def measure_index(size: int) -> dict:
    """Seconds and bytes to begin with a large index, and seconds to find a sample far into a run."""
    index, before = made_up_index(size), peak_memory()
    held = sum(part.nbytes for part in (index.shard, index.rows, index.keys))
    began = time.perf_counter()
    source = shards.Shards(index, SIDE, batch_size=min(1024, size // 64))
    start = time.perf_counter() - began
    began = time.perf_counter()
    source.blocks.locate(FAR, 0)
    far = time.perf_counter() - began
    began = time.perf_counter()
    source.blocks.locate(FAR + 1, 0)
    return {
        "samples": size,
        "tars": len(index.tars),
        "index_bytes": held,
        "bytes_more": peak_memory() - before,
        "bytes": held + peak_memory() - before,
        "start_seconds": start,
        "far_sample": FAR,
        "far_seconds": far,
        "next_seconds": time.perf_counter() - began,
    }


# ------------------------------------------------------------------------------------------------------------
# The command
# ------------------------------------------------------------------------------------------------------------
def parse_arguments() -> argparse.Namespace:
    parser = errors.Parser("engine/data_speed.py", "Measure how fast data come on this machine.")
    a = parser.add_argument
    a("--pictures", metavar="N", type=int, default=240, help="photographs, and cached samples (default: 240)")
    a(
        "--index-size",
        metavar="N",
        type=int,
        default=10_000_000,
        help="samples of the index (default: 10000000)",
    )
    a("--rounds", metavar="N", type=int, default=5, help="turns of each measurement (default: 5)")
    a("--out", metavar="FILE", type=errors.file_to_write, help="write the figures as JSON")
    args = parser.parse_args()
    if (
        not 16 <= args.pictures <= 10_000
        or not 1000 <= args.index_size <= 10**9
        or not 1 <= args.rounds <= 10**4
    ):
        parser.error("--pictures must lie between 16 and 10000, --index-size from 1000, --rounds from 1")
    return args


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(1)
    report = machine.provenance(torch.device("cpu")) | {"index": measure_index(args.index_size)}
    with tempfile.TemporaryDirectory() as home:
        tars = make_tars(Path(home), args.pictures)
        report["pictures"] = rates = measure_pictures(tars, args.rounds)
        report["cache"] = found = measure_cache(tars, Path(home), args.rounds)
    print(
        f"pictures at {SIDE} pixels, a second on one core: {rates['from tars']:.0f} from tars, "
        f"{rates['pillow']:.0f} by Pillow from memory (ratio {rates['from tars / pillow']:.2f}); reading alone "
        f"{rates['bytes alone']:.0f}"
    )
    for state in ("cold", "warm"):
        if state in found:
            print(
                f"cached samples of {found['bytes_of_a_sample'] / 1e6:.2f} MB, {state}: "
                f"{found[state]['samples'] / 1e6:.0f} MB/s, plain reads {found[state]['plain'] / 1e6:.0f} MB/s "
                f"(ratio {found[state]['samples / plain']:.2f})"
            )
    index = report["index"]
    print(
        f"an index of {index['samples']:,} samples: ready after {index['start_seconds']:.1f} s, "
        f"{index['bytes'] / 2**30:.2f} GiB at most; sample {FAR:,} found in {index['far_seconds']:.2f} s, the next "
        f"in {1e6 * index['next_seconds']:.0f} us"
    )
    if args.out:
        checkpoint.write_json(args.out, report)


if __name__ == "__main__":
    errors.run(main)
