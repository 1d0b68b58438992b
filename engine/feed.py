"""The way of the data: from global sample indices to the tensors that the loss takes, read ahead on threads (S.2).

    codec = feed.Codec(text, autoencoder, device, patch=4)
    feed = feed.Feed(plan, draw, seed, codec, Ranks(world=8, rank=0))
    for batch in feed.stream(start=1200):      # this process's micro-batches, from iteration 1200 on, in order
        loss(batch.x0, batch.c, batch.null, batch.fake, batch.is_null, batch.draws, tau, aux)

What a batch holds is a function of (seed, iteration, global index): which thread reads it, when, and on which of how
many processes changes nothing. Threads do what needs no device (files, pictures, random numbers); the frozen encoders
run where the network runs, when the batch is due.
"""

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import data
import emoji
import encoders
from engine import checkpoint
from engine.processes import Ranks
from engine.randomness import rng
from recipe import Recipe, Stage
from scale import cache, shards


# ------------------------------------------------------------------------------------------------------------
# Which source a name means
# ------------------------------------------------------------------------------------------------------------
def check_sides(sides: tuple[int, ...], multiple: int) -> None:
    """Raise DataError for a side that is no multiple of the auto-encoder's factor times the patch."""
    for side in sides:
        if side % multiple:
            raise data.DataError(f"the side of the pictures must be a multiple of {multiple}, not {side}")


def open_source(
    names: tuple[str, ...], stage: Stage, multiple: int, index: str | None = None, wrong_captions: float = 0.0
):
    """The samples of a stage: a built-in set by its name, a folder of pictures, a folder of tar shards, or caches of
    encoded shards.

    Sources of several sides take turns, batch by batch. A cache has one side, so a stage of two sides needs two caches;
    all else serves every side. `multiple` is what the sides of a picture must be multiples of: the auto-encoder's
    factor times the patch; `index` the folder of the tars' index, if not their own; `wrong_captions` the share of
    samples with the caption of another (data.WrongCaptions). Raises DataError with what is wrong and what to do.
    """
    sides, batch_size = stage.sides, stage.batch_size
    caches = {
        checkpoint.read_json(Path(name) / "cache.json")["side"]: name
        for name in names
        if cache.is_cache(name)
    }
    if len(caches) < len(names) and len(names) > 1:
        raise data.DataError(
            f"--data takes one folder, or several caches; of {', '.join(names)} only {len(caches)} are caches"
        )
    check_sides(sides, multiple)
    if caches and wrong_captions:
        raise data.DataError(
            f"{names[0]} is a cache, whose captions are encoded already: --wrong-captions needs its tars"
        )
    parts = []
    for side in sides:
        if names[0] in data.SETS:
            parts.append(data.Shapes(side, names[0]))
        elif names[0] in emoji.SETS:
            parts.append(emoji.Emoji(side, names[0]))
        elif caches:
            if side not in caches:
                raise data.DataError(f"none of {', '.join(names)} was cached with --side {side}")
            source = cache.CachedShards(
                caches[side], batch_size
            )  # only this one: others may be for other batches
            wrong = [f"{h}x{w}" for h, w in source.buckets if h % multiple or w % multiple]
            if wrong:
                raise data.DataError(
                    f"{source.name} holds pictures of {', '.join(wrong)}, and sides must be multiples "
                    f"of {multiple}: cache again "
                    f"with --multiple {multiple}"
                )
            parts.append(source)
        elif any(Path(names[0]).glob("*.tar")):
            parts.append(shards.Shards(names[0], side, batch_size, multiple=multiple, index=index))
        else:
            parts.append(data.ImageFolder(names[0], side))
    if wrong_captions:
        parts = [data.WrongCaptions(part, wrong_captions) for part in parts]
    return parts[0] if len(parts) == 1 else shards.Mixed(parts, batch_size)


def parts_of(source) -> list:
    """A source, or the several that take turns in it."""
    return getattr(source, "sources", [source])


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
    draws: tuple  # the random numbers: losses.Draws or baselines.Draws
    keys: list[str]  # what the samples are called in logs


class Fetched(NamedTuple):
    """What the threads hand over: everything of a micro-batch that needs no device."""

    aux: bool
    samples: list
    pictures: Tensor | None  # [B, 3, H, W] in [-1, 1]; None when the samples are encoded already
    dropped: list[bool]
    draws: tuple


class Codec(NamedTuple):
    """How samples become the tensors of a batch, and where these live."""

    text: object  # the frozen encoders; both may be None when all sources are caches
    autoencoder: object
    device: torch.device
    patch: int = 1  # of the network
    channels: int = 3  # of a latent, or of a picture where there is no auto-encoder
    factor: int = 1  # what the auto-encoder shrinks sides by


class Reading(NamedTuple):
    """How sources are read."""

    workers: int = 2  # threads that read ahead
    index: str | None = None  # folder of the tars' index, if not their own


class Feed:
    """The micro-batches of one process.

    plan    recipe.Recipe
    draw    losses.draw or another objective's: the random numbers of a micro-batch
    start   the first iteration that is asked for; stages before it are not opened
    waited  seconds that `stream` has kept its caller waiting for the threads

    Raises DataError when a stage's source cannot be opened: at the start, for all stages to come.
    """

    def __init__(
        self,
        plan: Recipe,
        draw: Callable,
        seed: int,
        codec: Codec,
        ranks: Ranks = Ranks(),
        start: int = 0,
        reading: Reading = Reading(),
    ):
        self.plan, self.draw, self.seed, self.codec, self.ranks, self.reading = (
            plan,
            draw,
            seed,
            codec,
            ranks,
            reading,
        )
        self.waited, multiple = 0.0, codec.factor * codec.patch
        self.sources = {
            number: open_source(plan.data, stage, multiple, reading.index, plan.wrong_captions)
            for number, stage in enumerate(plan.stages)
            if number >= plan.stage_number(start)
        }
        self.null = None
        self.check_caches()

    def fingerprints(self) -> dict[str, str]:
        """What the samples of each stage to come follow from, besides the seed:
        a resumed run must find it unchanged."""
        return {
            str(number): f"{source.fingerprint} in batches of {self.plan.stages[number].batch_size}"
            for number, source in self.sources.items()
        }

    def source(self, step: int):
        """The source of iteration `step`."""
        return self.sources[self.plan.stage_number(step)]

    def check_caches(self) -> None:
        """Raise DataError now, not at the iteration that needs it, for a cache
        of other encoders or without fake prompts."""
        for source in self.sources.values():
            for part in parts_of(source):
                if isinstance(part, cache.CachedShards):
                    part.check(self.plan.text, self.plan.txt_len, self.plan.autoencoder)
                    if self.plan.aux_from < 1 and not part.fake:
                        raise data.DataError(
                            f"{part.name} was cached without --fake, which the auxiliary term needs: "
                            "cache again, "
                            "or train with --aux-from 1"
                        )

    def skipped(self) -> set[str]:
        """The keys of the samples that could not be read so far: those that an
        index knows, and those found by this process."""
        return {key for source in self.sources.values() for key in dict(source.skipped)}

    def indices(self, step: int) -> list[list[int]]:
        """The global indices of this process's micro-batches of an iteration: a run of consecutive integers each."""
        stage: Stage = self.plan.stage(step)
        own = stage.batch_size // self.ranks.world
        micro = self.plan.micro_batch_of(stage, self.plan.side(step), self.ranks.world)
        first = self.plan.first(step) + self.ranks.rank * own
        return [list(range(first + m, first + m + micro)) for m in range(0, own, micro)]

    def fetch(self, step: int, index: list[int]) -> Fetched:
        """Read one micro-batch; runs on a thread."""
        source = self.source(step)
        samples = [source.sample(g, self.seed) for g in index]
        dropped = [bool(rng(self.seed, "dropout", g).random() < self.plan.dropout) for g in index]
        height, width = source.bucket(index[0], self.seed)
        shape = (self.codec.channels, height // self.codec.factor, width // self.codec.factor)
        pictures = None
        if not isinstance(samples[0], cache.CachedSample):
            pictures = data.to_tensor([s.picture for s in samples])
            if self.codec.device.type == "cuda":
                pictures = pictures.pin_memory()
        return Fetched(
            self.plan.aux(step), samples, pictures, dropped, self.draw(self.seed, step, index, shape)
        )

    def encode(self, f: Fetched, source) -> Batch:
        """Put a fetched micro-batch on the device and through the frozen encoders."""

        # Not on MPS, where a copy may still read its source after that is gone (pytorch issue 139550).
        non_blocking = self.codec.device.type == "cuda"

        def put(
            x,
        ):  # tokens of a cache travel in bf16; all that comes out of here is fp32, or the places of s < t
            if isinstance(x, tuple):
                return tuple(map(put, x))
            x = x.to(self.codec.device, non_blocking=non_blocking)
            return x.float() if x.is_floating_point() else x

        fake = None
        if f.pictures is None:
            cached = parts_of(source)[0]
            if self.null is None:
                self.null = put(cached.null)
            x0, c, fake = cache.collate(f.samples, f.dropped, cached.null, cached.null_fake, f.aux)
            x0, c, fake = put(x0), put(c), put(fake) if fake else None
        else:
            x0 = self.codec.autoencoder.encode(put(f.pictures))
            prompts = ["" if drop else s.caption for s, drop in zip(f.samples, f.dropped)]
            c = self.codec.text(prompts)
            if f.aux:
                fake = self.codec.text([encoders.fake_prompt(p) for p in prompts])
            if self.null is None:
                self.null = self.codec.text([""])
        null = tuple(a.expand(len(x0), *a.shape[1:]) for a in self.null)
        is_null = torch.tensor(
            [drop or s.caption == "" for s, drop in zip(f.samples, f.dropped)], device=self.codec.device
        )
        return Batch(
            x0, c, null, fake, is_null, type(f.draws)(*put(tuple(f.draws))), [s.key for s in f.samples]
        )

    def stream(self, start: int) -> Iterator[Batch]:
        """Every micro-batch from iteration `start` to the end of the run, read ahead by `workers` threads."""
        jobs = ((step, index) for step in range(start, self.plan.steps) for index in self.indices(step))
        with ThreadPoolExecutor(self.reading.workers) as pool:
            ahead = deque(
                (step, pool.submit(self.fetch, step, index))
                for step, index in itertools.islice(jobs, 2 * self.reading.workers)
            )
            try:
                while ahead:
                    step, future = ahead.popleft()
                    began = time.perf_counter()
                    fetched = future.result()
                    self.waited += time.perf_counter() - began
                    for next_step, index in itertools.islice(jobs, 1):
                        ahead.append((next_step, pool.submit(self.fetch, next_step, index)))
                    yield self.encode(fetched, self.source(step))
            finally:
                for _, future in ahead:
                    future.cancel()
