"""Latents and encoded captions of tar shards, made once, so that training need not run the frozen encoders (S.2 a, c).

    python -m scale.cache tars/ cache256/ --side 256 --fake     # encode; begun again, it goes on with the rest

    source = cache.CachedShards("cache256/", batch_size=1024)       # a source like shards.Shards, of encoded samples
    x0, c, fake = cache.collate(samples, dropped, source.null, source.null_fake, with_fake=True)

    OUT/cache.json                    what it was made from and with: encoders, side, the source's fingerprint, counts
    OUT/null.safetensors              the encoded prompts "" and "fake image ": what a dropped prompt is replaced by
    OUT/192x336_00002.safetensors     shard 2 of bucket (192, 336): latent [n, C, h, w], pooled [n, d] in fp32, tokens
                                      [n, L, d] in bf16 or fp32, the same of the fake prompts, captions and keys

A cache yields the sequence of samples that its tars yield with the same side, `multiple` and batch size. Of a picture
with several captions it holds the first.
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
import files
from engine import checkpoint, errors, machine
from files import DataError
from scale import shards


class CachedSample(NamedTuple):
    """One encoded sample: latent [C, h, w], (tokens [L, d_txt], pooled [d_vec]) of its caption and of its fake prompt.

    Tensors are as they are stored: fp32, and tokens perhaps bf16. `fake` is None where the cache was made without it.
    """

    latent: Tensor
    caption: str
    tokens: Tensor
    pooled: Tensor
    key: str
    fake: tuple[Tensor, Tensor] | None


class Settings(NamedTuple):
    """How a cache is made."""

    batch_size: int = 1024  # the one it is meant for: as in Shards, smaller buckets are merged
    fake: bool = False  # whether the fake prompts are encoded too
    tokens: str = "bf16"  # precision of the stored tokens, or fp32
    multiple: int = 16  # of which all sides are multiples
    per_shard: int = 256  # samples of a cached shard
    encode_batch: int = 16  # pictures encoded at once
    index: str | None = None  # folder of the tars' index, by default beside them
    caption_key: str | None = None  # where captions stand in tables and .json


# ------------------------------------------------------------------------------------------------------------
# Making one
# ------------------------------------------------------------------------------------------------------------
def make(names, out: Path, side: int, frozen: tuple, settings: Settings = Settings(), part=(0, 1)) -> None:
    """Encode the pictures and captions of tars into the folder `out`; what is complete there is left as it is.

    frozen are the text encoder and the auto-encoder. part (i, n) makes every n-th shard from the i-th on, so that n
    processes can share the work. A picture that cannot be decoded is replaced as in Shards, and its shard remembers it.
    Raises DataError when `out` holds a cache made from other tars or with other settings.
    """
    text, autoencoder = frozen
    if settings.multiple % autoencoder.factor:
        raise DataError(f"--multiple must be one of {autoencoder.factor}, not {settings.multiple}")
    where = {"multiple": settings.multiple, "index": settings.index, "caption_key": settings.caption_key}
    source = shards.Shards(names, side, settings.batch_size, **where)
    print(source.summary)
    spec = {key: getattr(settings, key) for key in ("multiple", "batch_size", "tokens", "fake", "per_shard")}
    spec |= {"text": text.name, "txt_len": text.txt_len, "autoencoder": autoencoder.name, "format": 1}
    spec |= {"side": side, "source": source.fingerprint}
    spec["buckets"] = [[h, w, len(members)] for (h, w), members in zip(source.sides, source.members)]
    begin(out, spec)
    dtype = checkpoint.DTYPES[settings.tokens]
    if not (out / "null.safetensors").exists():
        save_shard(out / "null.safetensors", encode_text(text, [""], 1, dtype, fake=True))
    plan = list(shard_plan(out, spec))[part[0] :: part[1]]
    missing = [entry for entry in plan if not entry[0].exists()]
    total, left = (sum(len(rows) for _, _, rows in some) for some in (plan, missing))
    with (
        tqdm(total=total, initial=total - left, desc="encoding", unit=" pictures", disable=None) as bar,
        ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool,
    ):
        for path, k, rows in missing:
            latents, captions, texts = [], [], []
            for first in range(0, len(rows), settings.encode_batch):
                some = rows[first : first + settings.encode_batch]
                pictures, of_each, keys = zip(*pool.map(functools.partial(source.picture, k), some))
                latents.append(autoencoder.encode(data.to_tensor(pictures)).cpu())
                captions += [caption for caption, *_ in of_each]
                texts += [json.dumps([caption, key]).encode() for (caption, *_), key in zip(of_each, keys)]
                bar.update(len(some))
            tensors = encode_text(text, captions, settings.encode_batch, dtype, settings.fake)
            tensors["latent"] = torch.cat(latents)
            tensors["text_end"] = torch.tensor(np.cumsum([0, *map(len, texts)]))
            tensors["text"] = torch.frombuffer(bytearray(b"".join(texts)), dtype=torch.uint8)
            broken = source.broken.intersection(source.members[k][rows.start : rows.stop].tolist())
            broken = [source.text(n)[0] for n in sorted(broken)]
            save_shard(path, tensors, {"skipped": json.dumps({key: source.skipped[key] for key in broken})})


def begin(out: Path, spec: dict) -> None:
    """Write the cache.json of a cache, or find the same. Raises DataError for a cache of another kind."""
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "cache.json").exists():
        return checkpoint.write_json(out / "cache.json", spec, shared=True)  # all parts write it
    stored = spec_of(out)
    for name in spec:
        if stored.get(name) != spec[name]:
            other = f"{name} {stored.get(name)!r}, not {spec[name]!r}"
            other = "other tars" if name in ("source", "buckets") else other
            raise DataError(f"{out} was made with {other}: choose another folder, or the same settings")


def shard_plan(out: Path, spec: dict) -> Iterator[tuple[Path, int, range]]:
    """The shards of a cache: (path, bucket k, which of the bucket's pictures it holds)."""
    for k, (height, width, count) in enumerate(spec["buckets"]):
        for number, first in enumerate(range(0, count, spec["per_shard"])):
            path = out / f"{height}x{width}_{number:05d}.safetensors"
            yield path, k, range(first, min(count, first + spec["per_shard"]))


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
    with checkpoint.in_one_piece(path, shared=True) as partial:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, metadata)


# ------------------------------------------------------------------------------------------------------------
# The source
# ------------------------------------------------------------------------------------------------------------
class CachedShards:
    """What `make` wrote, as a source of CachedSample in the order of shards.Blocks: the interface of shards.Shards.

    spec        what is in cache.json
    null        (tokens [1, L, d_txt], pooled [1, d_vec]) of "", and null_fake of "fake image ": for dropped prompts

    Raises DataError for an incomplete cache and for a batch larger than its smallest bucket.
    """

    def __init__(self, folder: str | Path, batch_size: int):
        self.name, folder = str(folder), Path(folder)
        self.spec = spec_of(folder)
        if not self.spec:
            raise DataError(f"{folder} holds no cache.json of a cache: python -m scale.cache makes one")
        self.fake, self.fingerprint = self.spec["fake"], self.spec["source"]
        plan = list(shard_plan(folder, self.spec))
        if missing := [path.name for path, _, _ in plan if not path.exists()]:
            lacks = f"lacks {len(missing)} of {len(plan)} shards, first {missing[0]}"
            raise DataError(f"{folder} {lacks}: run its python -m scale.cache command again")
        self.sides = [(height, width) for height, width, _ in self.spec["buckets"]]
        counts = [count for *_, count in self.spec["buckets"]]
        if min(counts) < batch_size:
            height, width = self.sides[counts.index(min(counts))]
            smallest = f"has {min(counts)} pictures of {height}x{width}, fewer than a batch of {batch_size}"
            raise DataError(f"{folder} {smallest}: lower it, or cache with --batch-size {batch_size}")
        self.buckets = {side: count / sum(counts) for side, count in zip(self.sides, counts)}
        self.blocks = shards.Blocks(counts, batch_size, self.spec["side"])
        self.skipped, self.paths = {}, [[] for _ in counts]
        for path, k, _ in plan:
            self.paths[k].append(path)
            with opened(path) as file:
                self.skipped |= json.loads(file.metadata()["skipped"])
        with opened(folder / "null.safetensors") as file:
            self.null = file.get_tensor("tokens"), file.get_tensor("pooled")
            self.null_fake = file.get_tensor("fake_tokens"), file.get_tensor("fake_pooled")
        self.summary = (
            f"{folder}: {sum(counts):,} encoded pictures with captions{files.summary(self.skipped)}"
        )

    def check(self, text: str, txt_len: int, autoencoder: str) -> None:
        """Raise DataError unless the encoders of these names are those that the cache was made with."""
        text, autoencoder = encoders.canonical(text), encoders.canonical(autoencoder)
        for name, value in (("text", text), ("txt_len", txt_len), ("autoencoder", autoencoder)):
            if self.spec[name] != value:
                raise DataError(f"{self.name} was encoded with {name} {self.spec[name]!r}, not {value!r}")

    def bucket(self, g: int, seed: int = 0) -> tuple[int, int]:
        """(height, width) in pixels of sample g, and of its whole block; nothing is read."""
        return self.sides[self.blocks.block(g, seed)[0]]

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


@contextlib.contextmanager
def opened(path: Path):
    """A safetensors file, mapped and not read. Raises DataError naming one that is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path} is damaged or missing ({error}): remove it and cache again") from error


def spec_of(folder: str | Path) -> dict:
    """What cache.json says of a cache; {} where there is none, or another program's."""
    path = Path(folder) / "cache.json"
    spec = checkpoint.read_json(path) if path.is_file() else {}
    return spec if isinstance(spec, dict) and "buckets" in spec else {}


def cached_sizes(folder: Path) -> tuple[dict, int]:
    """What a cache says of the encoders without loading them: ({channels, txt_dim, vec_dim} for model.SIZES, factor)."""
    spec = spec_of(folder)
    with opened(next(shard_plan(folder, spec))[0]) as file:
        latent, tokens, pooled = (file.get_slice(name).get_shape() for name in ("latent", "tokens", "pooled"))
    sizes = {"channels": latent[1], "txt_dim": tokens[-1], "vec_dim": pooled[-1]}
    return sizes, spec["buckets"][0][0] // latent[2]


def collate(samples: list[CachedSample], dropped: list[bool], null: tuple, null_fake: tuple, with_fake: bool):
    """(x0 [B, C, h, w], c, fake): what the loss takes, with the prompts of `dropped` samples replaced by "".

    c and fake are (tokens [B, L, d_txt], pooled [B, d_vec]), as they are stored; fake is None unless asked for.
    """

    def stacked(rows: list[tuple], instead: tuple) -> tuple:
        rows = [[a[0] for a in instead] if drop else row for row, drop in zip(rows, dropped)]
        return tuple(map(torch.stack, zip(*rows)))

    x0, c = torch.stack([s.latent for s in samples]), stacked([(s.tokens, s.pooled) for s in samples], null)
    return x0, c, stacked([s.fake for s in samples], null_fake) if with_fake else None


# ------------------------------------------------------------------------------------------------------------
# The command
# ------------------------------------------------------------------------------------------------------------
def share(text: str) -> tuple[int, int]:
    """An argparse type: "0/8" -> (0, 8)."""
    i, n = map(int, text.split("/"))
    if not 0 <= i < n:
        raise ValueError(text)
    return i, n


def main() -> None:
    parser = errors.Parser("-m scale.cache TARS OUT", "Encode tar shards once: pictures and captions.")
    parser.set_defaults(**Settings()._asdict())
    a = parser.add_argument
    a("tars", metavar="TARS", type=errors.name, nargs="+", help="a folder of tars, tars, or ranges of them")
    a("out", metavar="OUT", type=Path, help="the folder of the cache; one that was begun is gone on with")
    a("--side", metavar="N", type=int, required=True, help="side of the square bucket in pixels")
    a("--text", metavar="SPEC", default="flux", help="frozen text encoder, see encoders.py")
    a("--txt-len", metavar="N", type=int, help="tokens a caption (default: the encoder's)")
    a("--autoencoder", metavar="SPEC", default="flux", help="frozen auto-encoder")
    a("--fake", action="store_true", help="encode what the auxiliary term needs too (default: off)")
    a("--tokens", choices=("bf16", "fp32"), help="precision of the stored tokens (default: bf16)")
    a("--batch-size", metavar="N", type=int, help="the largest to train with (default: 1024)")
    a("--multiple", metavar="N", type=int, help="of which all sides are multiples (default: 16)")
    a("--per-shard", metavar="N", type=int, help="samples a cached shard (default: 256)")
    a("--encode-batch", metavar="N", type=int, help="pictures encoded at once (default: 16)")
    a("--part", metavar="I/N", type=share, default=(0, 1), help="every N-th shard from the I-th (0/1)")
    a("--index", metavar="DIR", type=errors.name, help="folder of the index (default: beside the tars)")
    a("--caption-key", metavar="NAME", help=files.KEY_HELP)
    a("--device", metavar="NAME", default="auto", help="cuda, mps, cpu (default: the best there is)")
    args = parser.parse_args()
    some = (1, 2**20)
    parser.check_ranges(args, side=(1, 2**13), txt_len=(1, 2**12), batch_size=some, multiple=(1, 2**13))
    parser.check_ranges(args, per_shard=some, encode_batch=some)
    device = machine.pick_device(args.device)
    text = encoders.text_encoder(args.text, args.txt_len, device)
    autoencoder = encoders.autoencoder(args.autoencoder, device)
    settings = Settings(**{name: getattr(args, name) for name in Settings._fields})
    make(args.tars, args.out, args.side, (text, autoencoder), settings, args.part)
    missing = [path for path, *_ in shard_plan(args.out, spec_of(args.out)) if not path.exists()]
    print(f"{args.out}: " + (f"{len(missing)} shards are left to the other parts" if missing else "complete"))


if __name__ == "__main__":
    errors.run(main, "stopped; the same command goes on with what is missing")
