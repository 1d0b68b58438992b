"""Latents and encoded captions of tar shards, made once, so that training need not run the frozen encoders (S.2 a, c).

    python -m scale.cache tars/ cache256/ --side 256 --fake     # encode; begun again, it goes on with the rest

    source = cache.CachedShards("cache256/", batch_size=1024)       # a source like shards.Shards, of encoded samples
    x0, c, fake = cache.collate(samples, dropped, source.null, source.null_fake, with_fake=True)

    OUT/cache.json                    what it was made from and with: encoders, side, the source's fingerprint, counts
    OUT/null.safetensors              the encoded prompts "" and "fake image ": what a dropped prompt is replaced by
    OUT/192x336_00002.safetensors     shard 2 of bucket (192, 336): latent [n, C, h, w], pooled [n, d] in fp32, tokens
                                      [n, L, d] in bf16 or fp32, the same of the fake prompts, captions and keys

A cache yields the sequence of samples that its tars yield with the same side, `multiple` and batch size.
"""

import contextlib
import functools
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

import data
import encoders
from data import DataError
from engine import checkpoint, errors, limits, machine
from engine.checkpoint import in_one_piece
from scale import shards


class CachedSample(NamedTuple):
    """One encoded sample: latent [C, h, w], (tokens [L, d_txt], pooled [d_vec]) of its caption and of its fake prompt.

    Tensors are as they are stored: fp32, and tokens perhaps bf16. `fake` is None where the cache was made without
    --fake.
    """

    latent: Tensor
    caption: str
    tokens: Tensor
    pooled: Tensor
    key: str
    fake: tuple[Tensor, Tensor] | None


def encode_text(text, captions: list[str], batch: int, dtype: torch.dtype, fake: bool) -> dict[str, Tensor]:
    """Encoded captions, and with `fake` their fake prompts (S.1.2), by the names they have in a cached shard."""
    tensors = {}
    for prefix, prompts in [("", captions)] + [("fake_", [encoders.fake_prompt(c) for c in captions])] * fake:
        parts = [text(prompts[i : i + batch]) for i in range(0, len(prompts), batch)]
        tensors[f"{prefix}tokens"] = torch.cat([tokens.to("cpu", dtype) for tokens, _ in parts])
        tensors[f"{prefix}pooled"] = torch.cat([pooled.cpu() for _, pooled in parts])
    return tensors


def save_shard(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Safetensors in one piece; several processes may write the same file."""
    with in_one_piece(path, shared=True) as partial:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, metadata)


class Settings(NamedTuple):
    """What a cache holds; all of it but the last two is part of its cache.json."""

    batch_size: int = (
        1024  # the one it is meant for: as in Shards, smaller buckets are merged, which fixes the sizes
    )
    fake: bool = False  # whether the fake prompts are encoded too
    tokens: str = "bf16"  # precision of the stored tokens, or fp32
    multiple: int = 16  # of which all sides are multiples
    per_shard: int = 256  # samples of a cached shard
    encode_batch: int = 16  # pictures encoded at once
    index: str | Path | None = None  # folder of the tars' index, by default beside them


def make(
    folder: str | Path,
    out: str | Path,
    side: int,
    encoders: tuple,
    settings: Settings = Settings(),
    part: tuple[int, int] = (0, 1),
) -> None:
    """Encode the pictures and captions of a folder of tars into `out`; what is complete there is left as it is.

    encoders are the frozen (text encoder, auto-encoder). part (i, n) makes every n-th shard from the i-th on, so that n
    processes can share the work. A picture that cannot be decoded is replaced as in Shards, and its shard remembers it:
    a cache yields the sequence that its tars yield. Raises DataError when `out` holds a cache made from other tars or
    with other settings.
    """
    text, autoencoder = encoders
    if settings.multiple % autoencoder.factor:
        raise DataError(
            f"auto-encoder {autoencoder.name} needs multiples of {autoencoder.factor}, not "
            f"{settings.multiple}"
        )
    out = Path(out)
    source = shards.Shards(
        folder, side, settings.batch_size, multiple=settings.multiple, index=settings.index
    )
    spec = begin(
        out,
        {
            "format": 1,
            "text": text.name,
            "txt_len": text.txt_len,
            "autoencoder": autoencoder.name,
            "side": side,
            "multiple": settings.multiple,
            "batch_size": settings.batch_size,
            "tokens": settings.tokens,
            "fake": settings.fake,
            "per_shard": settings.per_shard,
            "source": source.fingerprint,
            "buckets": [[h, w, len(m)] for (h, w), m in zip(source.buckets, source.members)],
        },
    )
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[settings.tokens]
    if not (out / "null.safetensors").exists():
        save_shard(out / "null.safetensors", encode_text(text, [""], 1, dtype, fake=True))
    plan = list(shard_plan(out, spec))[part[0] :: part[1]]
    missing = [entry for entry in plan if not entry[0].exists()]
    bar = tqdm(
        total=sum(len(rows) for _, _, rows in plan),
        initial=sum(len(rows) for p, _, rows in plan if p.exists()),
        desc=f"encoding {folder}",
        unit=" pictures",
        disable=None,
    )
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for path, k, rows in missing:
            latents, captions, texts = [], [], []
            for first in range(0, len(rows), settings.encode_batch):
                some = rows[first : first + settings.encode_batch]
                samples = list(pool.map(functools.partial(source.picture, k), some))
                latents.append(autoencoder.encode(data.to_tensor([s.picture for s in samples])).cpu())
                captions += [s.caption for s in samples]
                texts += [json.dumps([s.caption, s.key]).encode() for s in samples]
                bar.update(len(samples))
            tensors = encode_text(text, captions, settings.encode_batch, dtype, settings.fake)
            tensors |= {
                "latent": torch.cat(latents),
                "text_end": torch.tensor(np.cumsum([0, *map(len, texts)])),
                "text": torch.frombuffer(bytearray(b"".join(texts)), dtype=torch.uint8),
            }
            own = [source.key(n) for n in source.members[k][rows.start : rows.stop]]
            failed = {key: source.skipped[key] for key in own if key in source.skipped}
            save_shard(path, tensors, {"skipped": json.dumps(failed)})
    bar.close()


def begin(out: Path, spec: dict) -> dict:
    """The folder of a cache, its cache.json written or found the same. Raises DataError for a cache of another kind."""
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "cache.json").exists():
        checkpoint.write_json(out / "cache.json", spec, shared=True)  # all parts write it
        return spec
    stored = spec_of(out)
    if stored is None:
        raise DataError(f"{out / 'cache.json'} is not that of a cache: choose another folder")
    for name, value in spec.items():
        if stored.get(name) != value:
            said = (
                "other tars"
                if name in ("source", "buckets")
                else f"{name} {stored.get(name)!r}, not {value!r}"
            )
            raise DataError(f"{out} is a cache made with {said}: choose another folder, or the same settings")
    return spec


def shard_plan(out: Path, spec: dict) -> Iterator[tuple[Path, int, range]]:
    """The shards of a cache: (path, bucket k, which of the bucket's pictures it holds)."""
    for k, (height, width, count) in enumerate(spec["buckets"]):
        for number, first in enumerate(range(0, count, spec["per_shard"])):
            path = out / f"{height}x{width}_{number:05d}.safetensors"
            yield path, k, range(first, min(count, first + spec["per_shard"]))


class CachedShards:
    """What `make` wrote, as a source of CachedSample in the order of shards.Blocks: the interface of shards.Shards.

    spec        what is in cache.json
    null        (tokens [1, L, d_txt], pooled [1, d_vec]) of "", and null_fake of "fake image ": for dropped prompts

    Raises DataError for an incomplete cache and for a batch larger than its smallest bucket.
    """

    def __init__(self, folder: str | Path, batch_size: int):
        self.folder, self.name, self.batch_size = Path(folder), str(folder), batch_size
        self.spec = spec_of(folder)
        if self.spec is None:
            raise DataError(f"{folder} holds no cache.json: python -m scale.cache makes a cache")
        plan = list(shard_plan(self.folder, self.spec))
        missing = [path for path, _, _ in plan if not path.exists()]
        if missing:
            raise DataError(
                f"{folder} lacks {len(missing)} of {len(plan)} shards, first {missing[0].name}: "
                "run its python -m scale.cache command again, it goes on where it stopped"
            )
        height, width, smallest = min(self.spec["buckets"], key=lambda bucket: bucket[2])
        if smallest < batch_size:
            raise DataError(
                f"bucket {height}x{width} of {folder} has {smallest} pictures, fewer than a batch of "
                f"{batch_size}: lower it, or cache with --batch-size {batch_size}"
            )
        self.side, self.fake, self.skipped = self.spec["side"], self.spec["fake"], {}
        self.fingerprint = self.spec["source"]  # that of its tars: it yields their sequence
        self.buckets = [(height, width) for height, width, _ in self.spec["buckets"]]
        self.blocks = shards.Blocks(
            [count for _, _, count in self.spec["buckets"]], batch_size, self.spec["side"]
        )
        self.paths: list[list[Path]] = [[] for _ in self.buckets]
        sizes, factor = cached_sizes(self.folder)
        texts = {"tokens": (self.spec["txt_len"], sizes["txt_dim"]), "pooled": (sizes["vec_dim"],)}
        fakes = {f"fake_{name}": shape for name, shape in texts.items()}
        with opened(self.folder / "null.safetensors") as file:
            check_tensors(file, 1, texts | fakes)
            self.null = tuple(file.get_tensor(name) for name in texts)
            self.null_fake = tuple(file.get_tensor(name) for name in fakes)
        for path, k, rows in plan:
            self.paths[k].append(path)
            latent = {"latent": (sizes["channels"], *(side // factor for side in self.buckets[k]))}
            with opened(path) as file:
                check_tensors(file, len(rows), latent | texts | (fakes if self.fake else {}))
                check_texts(file, len(rows))
                self.skipped |= {key: str(why) for key, why in json.loads(file.metadata()["skipped"]).items()}
        shards.log_skipped(self.name, self.skipped, len(self))

    def check(self, text: str, txt_len: int, autoencoder: str) -> None:
        """Raise DataError unless the encoders of these names are those that the cache was made with."""
        asked = (
            ("text", encoders.canonical(text)),
            ("txt_len", txt_len),
            ("autoencoder", encoders.canonical(autoencoder)),
        )
        for name, value in asked:
            if self.spec[name] != value:
                raise DataError(
                    f"{self.name} was encoded with {name} {self.spec[name]!r}, not {value!r}: "
                    "use the same encoders, or cache again"
                )

    def __len__(self) -> int:
        return int(self.blocks.counts.sum())

    def bucket(self, g: int, seed: int = 0) -> tuple[int, int]:
        """(height, width) in pixels of sample g, and of its whole block; nothing is read."""
        return self.buckets[self.blocks.block(g, seed)[0]]

    def sample(self, g: int, seed: int = 0) -> CachedSample:
        """Sample g of the sequence that belongs to `seed`; one row of each tensor is read."""
        k, i = self.blocks.locate(g, seed)
        which, row = divmod(i, self.spec["per_shard"])
        with opened(self.paths[k][which]) as file:
            begin, end = file.get_slice("text_end")[row : row + 2].tolist()
            caption, key = json.loads(file.get_slice("text")[begin:end].numpy().tobytes())
            names = ["latent", "tokens", "pooled"] + ["fake_tokens", "fake_pooled"] * self.fake
            # Copies: a slice is a mapping, and would be read from the disk where it is used, not here on a thread
            latent, tokens, pooled, *fake = (file.get_slice(name)[row].clone() for name in names)
        return CachedSample(latent, caption, tokens, pooled, key, tuple(fake) or None)


def spec_of(folder: str | Path) -> dict | None:
    """What cache.json says of a cache; None where there is none, or that of another program. Raises CheckpointError for
    a damaged one."""
    path = Path(folder) / "cache.json"
    spec = checkpoint.read_json(path) if path.exists() else None
    if not isinstance(spec, dict) or "buckets" not in spec:
        return None
    limits.check(path, spec, limits.CACHE)
    return spec


def is_cache(folder: str | Path) -> bool:
    return spec_of(folder) is not None


def cached_sizes(folder: Path) -> tuple[dict, int]:
    """What a cache says of the encoders without loading them: ({channels,
    txt_dim, vec_dim} for model.SIZES, factor)."""
    spec = spec_of(folder)
    path, k, _ = next(shard_plan(folder, spec))
    with opened(path) as file:
        _, channels, height, _ = file.get_slice("latent").get_shape()
        factor = spec["buckets"][k][0] // height
    with opened(folder / "null.safetensors") as file:
        sizes = {
            "channels": channels,
            "txt_dim": file.get_slice("tokens").get_shape()[-1],
            "vec_dim": file.get_slice("pooled").get_shape()[-1],
        }
    return sizes, factor


def collate(samples: list[CachedSample], dropped: list[bool], null: tuple, null_fake: tuple, with_fake: bool):
    """(x0 [B, C, h, w], c, fake): what the loss takes, with the prompts of `dropped` samples replaced by "".

    c and fake are (tokens [B, L, d_txt], pooled [B, d_vec]), as they are stored: feed.py makes them fp32 where the
    network runs. fake is None unless asked for. Raises DataError when it is asked for and was not cached.
    """
    if with_fake and any(s.fake is None for s in samples):
        raise DataError("the auxiliary term needs the encoded fake prompts: cache with --fake")
    c = [[a[0] for a in null] if drop else [s.tokens, s.pooled] for s, drop in zip(samples, dropped)]
    fake = (
        [[a[0] for a in null_fake] if drop else s.fake for s, drop in zip(samples, dropped)]
        if with_fake
        else None
    )
    stacked = [tuple(map(torch.stack, zip(*rows))) if rows else None for rows in (c, fake)]
    return torch.stack([s.latent for s in samples]), *stacked


@contextlib.contextmanager
def opened(path: Path):
    """A safetensors file, mapped and not read. Raises DataError naming one that is damaged, also where what is read of
    it is not what it should be."""
    try:
        with safe_open(errors.regular(path, DataError), framework="pt") as file:
            yield file
    except (
        SafetensorError,
        OSError,
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
        ArithmeticError,
    ) as error:
        raise DataError(f"{path} is damaged or missing ({error}): remove it and cache again") from error


def check_tensors(file, rows: int, shapes: dict[str, tuple[int, ...]]) -> None:
    """Raise ValueError unless each tensor of an opened file has so many rows of its shape; only its header is read."""
    for name, shape in shapes.items():
        part = file.get_slice(name)
        if part.get_shape() != [rows, *shape] or part.get_dtype() not in ("F32", "BF16"):
            raise ValueError(f"{name} is {part.get_dtype()} {part.get_shape()}, not numbers {[rows, *shape]}")


def check_texts(file, rows: int) -> None:
    """Raise ValueError unless the ends of the texts of an opened shard are in order and within them."""
    ends, letters = file.get_tensor("text_end"), file.get_slice("text")
    told = ends.tolist()
    if (
        (ends.dtype, letters.get_dtype()) != (torch.int64, "U8")
        or len(told) != rows + 1
        or told != sorted(told)
    ):
        raise ValueError("its captions have no order")
    if [told[:1], told[-1:]] != [[0], letters.get_shape()]:
        raise ValueError("its captions are not whole")


# ------------------------------------------------------------------------------------------------------------
# The command
# ------------------------------------------------------------------------------------------------------------
def share(text: str) -> tuple[int, int]:
    """ "0/8" -> (0, 8)"""
    i, _, n = text.partition("/")
    if not (i.isdecimal() and n.isdecimal() and int(i) < int(n)):
        raise ValueError(text)
    return int(i), int(n)


def main() -> None:
    parser = errors.Parser("-m scale.cache FOLDER OUT", "Encode tar shards once: pictures and captions.")
    a = parser.add_argument
    a("folder", metavar="FOLDER", type=errors.name, help="a folder of .tar")
    a(
        "out",
        metavar="OUT",
        type=errors.name,
        help="the folder of the cache; one that was begun with the same settings is gone on with",
    )
    a("--side", metavar="N", type=shards.positive, required=True, help="side of the square bucket in pixels")
    a("--text", metavar="SPEC", default="flux", help="frozen text encoder, see encoders.py (default: flux)")
    a("--txt-len", metavar="N", type=shards.positive, help="tokens a caption (default: the encoder's)")
    a(
        "--autoencoder",
        metavar="SPEC",
        default="flux",
        help="frozen auto-encoder, see encoders.py (default: flux)",
    )
    a(
        "--fake",
        action="store_true",
        help="encode the fake prompts too, which the auxiliary term needs (default: off)",
    )
    a(
        "--tokens",
        default="bf16",
        choices=("bf16", "fp32"),
        help="precision of the stored tokens (default: bf16)",
    )
    a(
        "--batch-size",
        metavar="N",
        type=shards.positive,
        default=1024,
        help="the largest to train with: smaller buckets are merged (default: 1024)",
    )
    a(
        "--multiple",
        metavar="N",
        type=shards.positive,
        default=16,
        help="of which all sides are multiples (default: 16)",
    )
    a(
        "--per-shard",
        metavar="N",
        type=shards.positive,
        default=256,
        help="samples a cached shard (default: 256)",
    )
    a(
        "--encode-batch",
        metavar="N",
        type=shards.positive,
        default=16,
        help="pictures encoded at once (default: 16)",
    )
    a(
        "--part",
        metavar="I/N",
        type=share,
        default=(0, 1),
        help="every N-th shard from the I-th on (default: 0/1, all)",
    )
    a("--index", metavar="DIR", type=errors.name, help="folder of the index (default: FOLDER)")
    a("--device", metavar="NAME", default="auto", help="cuda, mps, cpu (default: the best there is)")
    args = parser.parse_args()
    parser.check_ranges(args, side=limits.RANGES["side"], txt_len=limits.RANGES["txt_len"])
    device = machine.pick_device(args.device)
    text = encoders.text_encoder(args.text, args.txt_len, device)
    autoencoder = encoders.autoencoder(args.autoencoder, device)
    settings = Settings(**{name: getattr(args, name) for name in Settings._fields})
    make(args.folder, args.out, args.side, (text, autoencoder), settings, args.part)
    plan = shard_plan(Path(args.out), checkpoint.read_json(Path(args.out) / "cache.json"))
    missing = [path for path, _, _ in plan if not path.exists()]
    print(f"{args.out}: " + (f"{len(missing)} shards are left to the other parts" if missing else "complete"))


if __name__ == "__main__":
    errors.run(main, "stopped; the same command goes on with what is missing")
