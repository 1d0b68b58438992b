"""The way of the data: from global sample indices to the tensors that the loss takes, read ahead on threads (S.2).

    python -m engine.feed --data tars/ --side 32    # looks at data: what is used and why not, and a sheet of samples

    codec = feed.Codec(text, autoencoder, device, patch=4)
    feed = feed.Feed(plan, draw, seed, codec, Ranks(world=8, rank=0))
    for batch in feed.stream(start=1200):      # this process's micro-batches, from iteration 1200 on, in order
        loss(batch.x0, batch.c, batch.null, batch.fake, batch.is_null, batch.draws, tau, mu, aux)

What a batch holds is a function of (seed, iteration, global index): which thread reads it, when, and on which of how
many processes changes nothing. Threads do what needs no device (files, pictures, random numbers); the frozen encoders
run where the network runs, when the batch is due.
"""

import itertools
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

import data
import emoji
import encoders
import files
from engine import checkpoint, errors
from engine.processes import Ranks
from files import DataError
from recipe import Recipe, Stage
from rng import rng
from scale import cache, shards
from scale.shards import check_sides


# ------------------------------------------------------------------------------------------------------------
# Which source a name means
# ------------------------------------------------------------------------------------------------------------
class Reading(NamedTuple):
    """How sources are read."""

    workers: int = 2  # threads that read ahead
    index: str | None = None  # folder of the tars' index, if not their own
    caption_key: str | None = None  # where captions stand in tables and .json


def open_source(names: tuple[str, ...], stage: Stage, multiple: int, reading=Reading(), wrong_captions=0.0):
    """The samples of a stage, whose sides take turns, batch by batch. Raises DataError.

    multiple        what the sides of a picture must be multiples of: the auto-encoder's factor times the patch
    wrong_captions  the share of samples with the caption of another (data.WrongCaptions)
    """
    check_sides(stage.sides, multiple)
    parts = [open_side(names, side, stage.batch_size, multiple, reading) for side in stage.sides]
    if wrong_captions:
        if isinstance(parts[0], cache.CachedShards):
            raise DataError(f"{parts[0].name} keeps its own captions: --wrong-captions is for pictures")
        parts = [data.WrongCaptions(part, wrong_captions) for part in parts]
    return parts[0] if len(parts) == 1 else Mixed(parts, stage.batch_size)


def open_side(names: tuple[str, ...], side: int, batch_size: int, multiple: int, reading: Reading):
    """What --data means, at one side: a built-in set, caches (one for each side), tars, or a folder of pictures."""
    if built_in := [name for name in names if name in (*data.SETS, *emoji.SETS)]:
        if len(names) > 1:
            raise DataError(f"--data takes a built-in set alone, not {built_in[0]} beside others")
        return data.Shapes(side, names[0]) if names[0] in data.SETS else emoji.Emoji(side, names[0])
    specs = {name: spec for name in names if (spec := cache.spec_of(name))}
    tars = [name for name in names if name not in specs and shards.find_tars(name)[0]]
    if len(names) > 1 and len(names) not in (len(specs), len(tars)):
        odd = next(name for name in names if name not in (tars or specs))
        raise DataError(f"--data takes one folder, several tars or several caches, not {odd} beside others")
    if tars:
        where = {"index": reading.index, "caption_key": reading.caption_key}
        return shards.Shards(names, side, batch_size, multiple=multiple, **where)
    if not specs:
        return data.ImageFolder(names[0], side, reading.caption_key)
    fitting = [name for name in specs if specs[name]["side"] == side]  # others may be for other batches
    if not fitting:
        raise DataError(f"none of {', '.join(names)} was cached with --side {side}")
    source = cache.CachedShards(fitting[-1], batch_size)
    for h, w in source.buckets:
        if h % multiple or w % multiple:
            raise DataError(f"{source.name} has pictures of {h}x{w}: cache again with --multiple {multiple}")
    return source


class Mixed:
    """Several sources in equal parts, by whole batches (S.2: 256^2 and 512^2, 1:1).

    Of n sources, block b is block b div n of source b mod n; a block is batch_size samples.
    """

    def __init__(self, sources: list, batch_size: int):
        self.sources, self.batch_size = sources, batch_size
        self.fingerprint = " ".join(source.fingerprint for source in sources)

    def locate(self, g: int):
        """(the source of g, g's index in it)"""
        b, place = divmod(g, self.batch_size)
        turn, which = divmod(b, len(self.sources))
        return self.sources[which], turn * self.batch_size + place

    def bucket(self, g: int, seed: int = 0) -> tuple[int, int]:
        source, index = self.locate(g)
        return source.bucket(index, seed)

    def sample(self, g: int, seed: int = 0):
        source, index = self.locate(g)
        return source.sample(index, seed)


def parts_of(source) -> list:
    """The sources of files and pictures in a source: several may take turns, and WrongCaptions holds another."""
    return [getattr(part, "source", part) for part in getattr(source, "sources", [source])]


# ------------------------------------------------------------------------------------------------------------
# Batches
# ------------------------------------------------------------------------------------------------------------
class Batch(NamedTuple):
    """One micro-batch as the loss takes it."""

    x0: Tensor  # [B, C, h, w] fp32
    c: tuple  # (tokens [B, L, d_txt], pooled [B, d_vec])
    null: tuple  # the same of ""
    fake: tuple | None  # the same of the fake prompts, with the auxiliary term
    is_null: Tensor  # [B] bool, where the prompt was dropped or is empty
    draws: tuple  # the random numbers: losses.Draws or imm.Draws
    keys: list[str]  # what the samples are called in logs


class Codec(NamedTuple):
    """How samples become the tensors of a batch, and where these live."""

    text: encoders.TextEncoder | None  # the frozen encoders; None where all sources are caches
    autoencoder: encoders.Pixels | encoders.KLAutoencoder | None
    device: torch.device
    patch: int = 1  # of the network
    channels: int = 3  # of a latent, or of a picture where there is no auto-encoder
    factor: int = 1  # what the auto-encoder shrinks sides by


def open_codec(plan: Recipe, size: dict, device: torch.device, draws: bool) -> tuple[Codec, dict]:
    """The frozen encoders, and the entries of model.SIZES as they settle them.

    Where caches serve, the encoders are None unless this process draws pictures.
    """
    cached = all(map(cache.spec_of, plan.data))
    text = autoencoder = None
    if not cached or draws:
        text = encoders.text_encoder(plan.text, plan.txt_len, device)
        autoencoder = encoders.autoencoder(plan.autoencoder, device)
    if cached:
        sizes, factor = cache.cached_sizes(Path(plan.data[0]))
    else:
        sizes = {"channels": autoencoder.channels, "txt_dim": text.d_txt, "vec_dim": text.d_vec}
        factor = autoencoder.factor
    sizes = size | sizes
    return Codec(text, autoencoder, device, sizes["patch"], sizes["channels"], factor), sizes


class Feed:
    """The micro-batches of one process.

    plan    recipe.Recipe
    draw    losses.draw or another objective's: the random numbers of a micro-batch
    start   the first iteration that is asked for; stages before it are not opened
    waited  seconds that `stream` has kept its caller waiting for the threads

    Raises DataError when a stage's source cannot be opened: at the start, for all stages to come.
    """

    def __init__(
        self, plan: Recipe, draw, seed: int, codec: Codec, ranks=Ranks(), start=0, reading=Reading()
    ):
        self.plan, self.draw, self.seed, self.codec = plan, draw, seed, codec
        self.ranks, self.reading, self.null, self.waited = ranks, reading, None, 0.0
        self.sources = {
            number: open_source(plan.data, stage, codec.factor * codec.patch, reading, plan.wrong_captions)
            for number, stage in enumerate(plan.stages)
            if number >= plan.stage_number(start)
        }
        for part in self.parts():
            if isinstance(part, cache.CachedShards):  # now, not at the iteration that needs it
                part.check(plan.text, plan.txt_len, plan.autoencoder)
                if plan.aux_from < 1 and not part.fake:
                    raise DataError(f"{part.name} was cached without --fake: cache again, or --aux-from 1")

    def parts(self) -> list:
        """Every source of a single side, of all stages to come."""
        return [part for source in self.sources.values() for part in parts_of(source)]

    def tell(self) -> list[str]:
        """A line on each source of files: its pictures and captions, what is left out and why, what is cut."""
        lines, text = [], self.codec.text
        for part in self.parts():
            line = getattr(part, "summary", "")
            if isinstance(part, data.ImageFolder) and text:
                cut = sum(map(text.cuts, itertools.chain.from_iterable(part.captions)))
                line += f"; captions longer than --txt-len {text.txt_len} reads: {cut:,}" if cut else ""
            lines.append(line)
        return list(dict.fromkeys(filter(None, lines)))

    def buckets(self, step: int) -> dict[tuple[int, int], float]:
        """(height, width) -> share of the pictures that a model is to draw after iteration `step`: those of the stage's
        largest side, the most frequent first."""
        largest = max(parts_of(self.source(step)), key=lambda part: max(h * w for h, w in part.buckets))
        return dict(sorted(largest.buckets.items(), key=lambda item: -item[1]))

    def fingerprints(self) -> dict[str, str]:
        """What the samples of each stage to come follow from but the seed: a resumed run must find it unchanged."""
        return {
            str(number): f"{source.fingerprint} in batches of {self.plan.stages[number].batch_size}"
            for number, source in self.sources.items()
        }

    def source(self, step: int):
        """The source of iteration `step`."""
        return self.sources[self.plan.stage_number(step)]

    def skipped(self) -> dict[str, str]:
        """Key -> reason of what is left out so far: what was known at the start, and what this process has found."""
        return {key: reason for part in self.parts() for key, reason in dict(part.skipped).items()}

    def indices(self, step: int) -> list[list[int]]:
        """The global indices of this process's micro-batches of an iteration: a run of consecutive integers each."""
        stage: Stage = self.plan.stage(step)
        share = stage.batch_size // self.ranks.world
        micro = self.plan.micro_batch_of(stage, self.plan.side(step), self.ranks.world)
        first = self.plan.first(step) + self.ranks.rank * share
        return [list(range(first + m, first + m + micro)) for m in range(0, share, micro)]

    def fetch(self, step: int, index: list[int]) -> tuple:
        """What of a micro-batch needs no device; runs on a thread: (samples, their pictures [B, 3, H, W] in [-1, 1] or
        None where they are encoded already, which prompts are dropped, the random numbers)."""
        source = self.source(step)
        samples = [source.sample(g, self.seed) for g in index]
        dropped = [bool(rng(self.seed, "dropout", g).random() < self.plan.dropout) for g in index]
        height, width = source.bucket(index[0], self.seed)
        shape = (self.codec.channels, height // self.codec.factor, width // self.codec.factor)
        draws, pictures = self.draw(self.seed, step, index, shape), None
        if not isinstance(samples[0], cache.CachedSample):
            pictures = data.to_tensor([s.picture for s in samples])
            if self.codec.device.type == "cuda":
                pictures = pictures.pin_memory()
        return samples, pictures, dropped, draws

    def put(self, x):
        """A tensor on the device, in fp32 (tokens of a cache travel in bf16) unless it holds places; tuples of them."""
        if x is None or isinstance(x, tuple):
            return x and tuple(map(self.put, x))
        # Not on MPS, where a copy may still read its source after that is gone (pytorch issue 139550).
        x = x.to(self.codec.device, non_blocking=self.codec.device.type == "cuda")
        return x.float() if x.is_floating_point() else x

    def encode(self, step: int, samples: list, pictures: Tensor | None, dropped: list[bool], draws) -> Batch:
        """Put a fetched micro-batch on the device and through the frozen encoders."""
        text, aux = self.codec.text, self.plan.aux(step)
        if pictures is None:
            (cached, *_) = parts_of(self.source(step))
            self.null = self.null or self.put(cached.null)
            x0, c, fake = self.put(cache.collate(samples, dropped, cached.null, cached.null_fake, aux))
        else:
            self.null = self.null or text([""])
            prompts = ["" if drop else s.caption for s, drop in zip(samples, dropped)]
            x0, c = self.codec.autoencoder.encode(self.put(pictures)), text(prompts)
            fake = text([encoders.fake_prompt(p) for p in prompts]) if aux else None
        null = tuple(a.expand(len(x0), *a.shape[1:]) for a in self.null)
        is_null = [drop or s.caption == "" for s, drop in zip(samples, dropped)]
        is_null = torch.tensor(is_null, device=self.codec.device)
        draws = type(draws)(*self.put(tuple(draws)))
        return Batch(x0, c, null, fake, is_null, draws, [s.key for s in samples])

    def stream(self, start: int) -> Iterator[Batch]:
        """Every micro-batch from iteration `start` to the end of the run, read ahead by `workers` threads."""
        jobs = ((step, index) for step in range(start, self.plan.steps) for index in self.indices(step))
        with ThreadPoolExecutor(self.reading.workers) as pool:
            submitted = ((step, pool.submit(self.fetch, step, index)) for step, index in jobs)
            ahead = deque(itertools.islice(submitted, 2 * self.reading.workers))
            try:
                while ahead:
                    step, future = ahead.popleft()
                    began = time.perf_counter()
                    fetched = future.result()
                    self.waited += time.perf_counter() - began
                    ahead.extend(itertools.islice(submitted, 1))
                    yield self.encode(step, *fetched)
            finally:
                for _, future in ahead:
                    future.cancel()


# ------------------------------------------------------------------------------------------------------------
# A look at data
# ------------------------------------------------------------------------------------------------------------
def main() -> None:
    parser = errors.Parser("-m engine.feed", "Say what data hold, and draw a sheet of samples.")
    a = parser.add_argument
    a("--data", metavar="DIR", nargs="+", type=errors.name, default=["one-shape"], help="as for train.py")
    a("--caption-key", metavar="NAME", help=files.KEY_HELP)
    a("--index", metavar="DIR", type=errors.name, help="folder of the index of tars (default: beside them)")
    a("--workers", metavar="N", type=int, default=1, help="processes that index tars")
    a("--side", metavar="N", type=int, default=16, help="of the pictures, in pixels")
    a("--multiple", metavar="N", type=int, default=4, help="that sides are of; 16 for 2b")
    a("--seed", metavar="N", type=int, default=0, help="which pictures")
    a("--out", type=errors.file_to_write, default="data.png", help="the sheet to write")
    args = parser.parse_args()
    parser.check_ranges(args, side=(1, 2**13), multiple=(1, 2**13), seed=(0, 2**63 - 1), workers=(1, 1024))
    if args.workers > 1 and any(shards.find_tars(name)[0] for name in args.data):
        shards.read_index(args.data, args.index, args.caption_key, args.workers)
    reading = Reading(1, args.index, args.caption_key)
    source = open_source(tuple(args.data), Stage(0, (args.side,), 1), args.multiple, reading)
    if isinstance(source, cache.CachedShards):
        parser.error(f"{source.name} is a cache of latents: look at its tars")
    print(getattr(source, "summary", f"{source.name}: without end"))
    for name, why in source.skipped.items():
        print(f"  {files.printable(name)}: {why}")
    for (height, width), share in source.buckets.items():
        print(f"  {height:4} x {width:<4} {100 * share:6.2f}%")
    samples, scale = [source.sample(g, args.seed) for g in range(24)], max(1, 256 // args.side)
    columns = [samples[i : i + 6] for i in range(0, 24, 6)]
    sheets = [data.label_grid([[s.picture] for s in c], [""], [s.caption for s in c], scale) for c in columns]
    sheet = Image.new("RGB", (sum(s.width for s in sheets), max(s.height for s in sheets)), "white")
    for i, column in enumerate(sheets):
        sheet.paste(column, (sum(s.width for s in sheets[:i]), 0))
    with checkpoint.in_one_piece(args.out) as partial:
        sheet.save(partial, format="PNG")
    print(f"wrote {args.out}")


if __name__ == "__main__":
    errors.run(main)
