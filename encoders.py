"""Frozen encoders: prompts to conditions, pictures to latents and back (S.2 a and c). Nothing in this file is trained.

    text = encoders.text_encoder("words", 14, "cpu")
    cond = text(["a photo of a red circle"])            # (tokens [B, txt_len, d_txt], pooled [B, d_vec]), fp32
    null, fake = text([""]), text([encoders.fake_prompt("a photo of a red circle")])
    V(x_t, t, s, *cond)

    ae = encoders.autoencoder("pixels", "cpu")
    x0 = ae.encode(images)                              # [B, 3, H, W] in [-1, 1] -> [B, channels, H/factor, W/factor]
    images = ae.decode(x0)                              # and back, clamped to [-1, 1]

    text encoder        what it is                                                                d_txt   d_vec
    "words"             hashed word vectors, built in: no download, no training, any vocabulary     256     256
    "flux"              T5-XXL tokens and CLIP ViT-L/14 pooled, as in S.2 (c); short for FLUX_TEXT  4096     768
    "hf:A"              one Hugging Face encoder for both tokens and pooled                         its own width
    "hf:A,B"            tokens from A, pooled from B                                                their widths

    auto-encoder        what it is                                                                channels  factor
    "pixels"            the picture itself, scaled                                                      3       1
    "flux"              FLUX's VAE (S.2 a), through diffusers; short for FLUX_VAE                      16       8
    "kl:A"              any AutoencoderKL, through diffusers                                           its own

A and B are a local folder (./folder, ~/folder, /folder or any folder that exists; no comma in the path) or a Hugging
Face name `owner/name`, or `owner/name/folder` for a folder inside the repository.

What a user can fix raises `EncoderError`, a ValueError whose message is one readable line.
"""

import functools
import hashlib
import os
import re
import unicodedata

import numpy as np
import torch
from torch import Tensor

from engine import errors

# FLUX.1-schnell's repository holds all three frozen parts of S.2 as safetensors and under Apache-2.0: the VAE (not
# compared with FLUX.1-dev's), the encoder half of T5 v1.1 XXL in bf16, and CLIP's text tower. It asks for a log-in on
# the hub. google/t5-v1_1-xxl holds the same T5, but as pickled weights with the decoder, which is not loaded here.
FLUX_TEXT = "hf:black-forest-labs/FLUX.1-schnell/text_encoder_2,black-forest-labs/FLUX.1-schnell/text_encoder"
FLUX_VAE = "kl:black-forest-labs/FLUX.1-schnell/vae"

# x0 = scale * picture for "pixels". Flow matching mixes data with noise of variance 1 and expects data of
# about that size. In [-1, 1] the built-in shapes have a standard deviation of 0.35 and emoji on white one of 0.57,
# around a mean that depends on the background; so pictures are doubled and not shifted. Fixed constants, not the
# statistics of a data set: then a checkpoint means the same thing whatever folder it was trained on.
PIXEL_SCALE = 2.0


class EncoderError(errors.UserError):
    """An encoder that cannot be had as asked for; the message is one line for the user."""


# ------------------------------------------------------------------------------------------------------------
# S.1.2      the prompts that are not the user's: the null prompt phi is "", c_fake is the prompt of generated pictures
# ------------------------------------------------------------------------------------------------------------
def fake_prompt(prompt: str) -> str:
    """The condition c_fake: "fake image" joined with the prompt. It stands first, and truncation cuts at the end."""
    return "fake image " + prompt


# ============================================================================================================
# Text
# ============================================================================================================


class TextEncoder:
    """text(prompts) -> (tokens [B, txt_len, d_txt], pooled [B, d_vec]), both fp32 on `device`, without gradient.

    name      rebuilds the encoder: `text_encoder(text.name, text.txt_len, device)`; its folders are absolute paths
    txt_len   tokens a prompt is cut or padded to; the denoiser sees all of them, unmasked, as in FLUX

    A subclass has encode(prompts), and cuts(prompt): whether a prompt is longer than txt_len, so its end is not read.
    """

    name: str
    txt_len: int
    d_txt: int
    d_vec: int

    def __call__(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        assert not isinstance(prompts, str), "a list of prompts: a single one would be read letter by letter"
        with torch.no_grad():
            return self.encode(list(prompts))


def text_encoder(name: str, txt_len: int | None = None, device: torch.device | str = "cpu") -> TextEncoder:
    """The text encoder of that name (the table on top). txt_len None: 14 for "words", 256 for the others.

    Raises EncoderError for an unknown name, a folder or name that cannot be loaded, or a txt_len out of range.
    """
    if txt_len is not None and txt_len < 4:
        raise EncoderError(f'txt_len must be at least 4 for "fake image" and an end token, not {txt_len}')
    if name == "words":
        return WordVectors(txt_len or 14, device)
    if name == "flux" or name.startswith("hf:"):
        return HuggingFaceText(name, txt_len or 256, device)
    raise EncoderError(f'unknown text encoder {name!r}: use "words", "flux", "hf:A" or "hf:TOKENS,POOLED"')


# ------------------------------------------------------------------------------------------------------------
# "words": hashed word vectors
#
# A word's vector is 128 bits of its hash, read as signs. Two words' vectors are nearly orthogonal (cosine 0 +- 0.09),
# which is all that a network needs to tell one from the other; it learns from pictures that "circle" and "circles" are
# related. No table, no file, no random generator: integers and signs come out alike on every machine
# and with every library version, so a checkpoint always gets the vectors that it was trained with.
# (Lower-casing and NFKC are promised not to change for a character once Unicode has it; Python 3.10 has Unicode 13.)
# ------------------------------------------------------------------------------------------------------------

# Code points that are a word each: punctuation and symbols, emoji, and scripts without spaces (Chinese, Japanese).
# Written out, because the classes of Python's `re` follow the Unicode edition of the Python in use.
SINGLE = (
    r"!-/:-@\[-`{-~\u00a1-\u00bf\u00d7\u00f7\u2010-\u2bff\u2e00-\u2e7f\u3001-\u30ff\u3400-\u9fff\uf900-\ufaff"
    r"\U0001f000-\U0001faff\U00020000-\U0003ffff"
)
# What separates words: white space, and the invisible joiners and selectors inside emoji.
GAP = r"\s\u200b-\u200f\ufe0e\ufe0f"
WORD = re.compile(rf"(?![{GAP}])[{SINGLE}]|[^{SINGLE}{GAP}]+")


def split_words(prompt: str) -> list[str]:
    """Lower-cased words and single symbols: "A red-hot café!" -> a, red, -, hot, café, !

    NFKC first, so that composed and decomposed letters, full-width and plain ones are one word. It takes quadratic time
    over the marks of one letter; those beyond 30 (Unicode's annex 15) are not read.
    """
    kept, marks = [], 0
    for letter in prompt:
        marks = marks + 1 if unicodedata.combining(letter) else 0
        kept.append(letter if marks <= 30 else "")
    return WORD.findall(unicodedata.normalize("NFKC", "".join(kept)).lower())


@functools.lru_cache(maxsize=65536)
def hashed_signs(kind: bytes, word: str) -> np.ndarray:
    """[128] of +-1 in fp32, a function of (kind, word). `kind` keeps words apart from positions and marks."""
    digest = hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=16, person=kind).digest()
    signs = 2 * np.unpackbits(np.frombuffer(digest, np.uint8)).astype(np.float32) - 1
    signs.setflags(write=False)  # the cache hands the same array to everyone
    return signs


def near_root(variance: int) -> float:
    """1 / sqrt(variance) to the nearest power of two, so that multiplying by it is exact; 1 for 0."""
    return 2.0 ** -(variance.bit_length() // 2)


class WordVectors(TextEncoder):
    """The built-in encoder of the laptop size: state i describes word i and its place in the sentence.

    A state is four slots side by side, so that a linear layer can read each by itself:

        [0:128]    word i              what it is
        [128:176]  word i - 1          what it belongs to: only neighbours tell "red circle left of blue square" from
        [176:224]  word i + 1          "blue circle left of red square", which has the same words
        [224:256]  the position i      FLUX gives all text tokens one position (ids 0), so attention cannot tell which
                                       word stands first unless the states do

    A prompt ends with an end token, so that "" is one token and not nothing; then zeros. Beyond the first and the last
    token stands one more mark. Over-long prompts lose words before the end token.

    pooled = [bag of the word vectors | their first moment in position]: which words, and roughly where; the moment
    makes the vector depend on their order. Both are sums of +-1 (times small integers), exact in fp32 in any order,
    divided by the power of two nearest to their standard deviation, so entries are O(1) for any number of words.
    """

    d_txt, d_vec = 256, 256

    def __init__(self, txt_len: int, device: torch.device | str):
        self.name, self.txt_len, self.device = "words", txt_len, device
        self.position = np.stack([hashed_signs(b"position", str(i))[:32] for i in range(txt_len)])
        self.end, self.beyond = hashed_signs(b"mark", "end"), hashed_signs(b"mark", "beyond")
        self.states = functools.lru_cache(maxsize=1024)(self.states)  # the same prompts come again and again

    def encode(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        tokens, pooled = (torch.from_numpy(np.stack(rows)) for rows in zip(*map(self.states, prompts)))
        return tokens.to(self.device), pooled.to(self.device)

    def cuts(self, prompt: str) -> bool:
        return len(split_words(prompt)) > self.txt_len - 1

    def states(self, prompt: str) -> tuple[np.ndarray, np.ndarray]:
        """(token states [txt_len, 256], pooled [256]) of one prompt."""
        tokens = np.zeros((self.txt_len, self.d_txt), np.float32)
        words = [hashed_signs(b"word", word) for word in split_words(prompt)[: self.txt_len - 1]]
        v = np.stack([self.beyond, *words, self.end, self.beyond])  # [1 + n + 1, 128]
        n = len(v) - 2  # tokens, the end included
        tokens[:n] = np.concatenate([v[1:-1], v[:-2, :48], v[2:, :48], self.position[:n]], axis=1)
        place = 2 * np.arange(n, dtype=np.float32) - (n - 1)  # -(n-1), -(n-3), .. n-1: centred, integers
        bag = v[1:-1].sum(axis=0) * near_root(n)
        moment = (place[:, None] * v[1:-1]).sum(axis=0) * near_root(n * (n * n - 1) // 3)
        return tokens, np.concatenate([bag, moment])


# ------------------------------------------------------------------------------------------------------------
# Where a frozen network comes from
# ------------------------------------------------------------------------------------------------------------
def locate(place: str) -> tuple[str, str]:
    """A folder or Hugging Face name -> (folder or repository, folder inside the repository, may be empty).

    Raises EncoderError for a folder that is not there.
    """
    place = place.strip()
    folder = os.path.expanduser(place)
    if place and os.path.isdir(folder):
        return os.path.abspath(folder), ""
    if not place or place[0] in "./~" or "\\" in place:
        raise EncoderError(f'no such folder to load an encoder from: "{place}"')
    parts = place.split("/")
    return "/".join(parts[:2]), "/".join(parts[2:])


def canonical(name: str) -> str:
    """One spelling for every way to name the same encoder or auto-encoder: "flux" for FLUX's own, folders absolute.

    Caches and checkpoints compare these. Nothing is loaded. Raises EncoderError for a folder that is not there.
    """
    if name in (FLUX_TEXT, FLUX_VAE):
        return "flux"
    kind, colon, places = name.partition(":")
    if not colon:
        return name
    return kind + ":" + ",".join("/".join(filter(None, locate(place))) for place in places.split(","))


def load(what: str, place: str, from_pretrained, **arguments):
    """from_pretrained(...) for a place as in `locate`, any failure of it as an EncoderError of one line."""
    root, inside = locate(place)
    try:
        return from_pretrained(root, **({"subfolder": inside} if inside else {}), **arguments)
    except Exception as error:  # whatever the libraries raise, tokenizers' is a plain Exception
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        kind = "folder" if os.path.isdir(root) else "Hugging Face name (and there is no such folder here)"
        raise EncoderError(f"cannot load the {what} from the {kind} {place}: {reason}") from error


def load_network(
    what: str, place: str, model_class, device, **arguments
) -> tuple[torch.nn.Module, list[str]]:
    """(a frozen network, the names of weights that its file lacks, which are now random). Raises EncoderError."""
    arguments |= {"use_safetensors": True, "output_loading_info": True}  # .bin can run code
    network, info = load(what, place, model_class.from_pretrained, **arguments)
    return network.eval().requires_grad_(False).to(device), list(info["missing_keys"])


def precision(device: torch.device | str) -> torch.dtype:
    """The dtype that frozen networks run in: bf16 on CUDA, where it halves the memory; fp32 elsewhere."""
    return torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32


# ------------------------------------------------------------------------------------------------------------
# "hf:": any Hugging Face encoder
# ------------------------------------------------------------------------------------------------------------

# The families of which only a part is wanted: T5's encoder half, CLIP's text tower. Others load whole, with AutoModel.
TEXT_PART = {
    "t5": "T5EncoderModel",
    "mt5": "MT5EncoderModel",
    "umt5": "UMT5EncoderModel",
    "clip": "CLIPTextModel",
    "clip_text_model": "CLIPTextModel",
}


class FrozenTransformer:
    """One Hugging Face encoder with its tokenizer: prompts -> (states [B, length, width], pooled [B, width]), fp32.

    pooled is the model's own (CLIP's end token, BERT's pooler) or, without one, the mean of the states of real tokens.
    """

    def __init__(self, place: str, device: torch.device | str):
        import transformers

        config = load("text encoder", place, transformers.AutoConfig.from_pretrained)
        part = TEXT_PART.get(config.model_type)
        if part is None and (hasattr(config, "text_config") or config.is_encoder_decoder):
            raise EncoderError(f"{place} is a {config.model_type} model: use a text encoder (T5, CLIP, BERT)")
        from_pretrained = transformers.AutoTokenizer.from_pretrained
        self.tokenizer = load("tokenizer", tokenizer_place(place), from_pretrained, config=config)
        # Without vocabulary files some versions of transformers make an empty tokenizer, to which all words are alike.
        if self.tokenizer("red circle")["input_ids"] == self.tokenizer("fake image")["input_ids"]:
            raise EncoderError(f"the tokenizer of {place} tells no words apart: its vocabulary is missing")
        if self.tokenizer.pad_token is None:
            raise EncoderError(f"the tokenizer of {place} has no padding token")
        # Cut and pad at the end, whatever the tokenizer's own habit, so that "fake image" survives.
        self.tokenizer.truncation_side = self.tokenizer.padding_side = "right"

        dtype = "dtype" if int(transformers.__version__.split(".")[0]) >= 5 else "torch_dtype"
        model_class, of_device = getattr(transformers, part or "AutoModel"), {dtype: precision(device)}
        self.model, missing = load_network("text encoder", place, model_class, device, **of_device)
        # A pooler may be missing (masked language models are saved without one) and is then not used.
        self.has_pooler = not any("pooler" in key for key in missing)
        if lost := [key for key in missing if not key.endswith("position_ids") and "pooler" not in key]:
            raise EncoderError(f"{place} lacks {len(lost)} weights of its model, such as {lost[0]}")
        self.device, self.width = device, self.model.config.hidden_size
        positions = getattr(self.model.config, "max_position_embeddings", 10**9)
        self.limit = min(self.tokenizer.model_max_length, positions)
        # FLUX lets T5 and CLIP see the padding, and so does this; BERT and its kin read padding only behind a mask.
        self.masked = part is None

    def __call__(self, prompts: list[str], length: int) -> tuple[Tensor, Tensor]:
        one_length = {"padding": "max_length", "truncation": True, "max_length": length}
        batch = self.tokenizer(prompts, **one_length, return_tensors="pt")
        ids, mask = batch["input_ids"].to(self.device), batch["attention_mask"].to(self.device)
        out = self.model(input_ids=ids, attention_mask=mask if self.masked else None)
        states = out.last_hidden_state.float()
        pooled = getattr(out, "pooler_output", None) if self.has_pooler else None
        if pooled is None:
            real = mask[..., None].float()  # never all 0: tokenizers add an end or a start to ""
            pooled = (states * real).sum(dim=1) / real.sum(dim=1).clamp_min(1.0)
        return states, pooled.float()


def tokenizer_place(place: str) -> str:
    """The tokenizer lies with its model or, in a pipeline's repository, beside it: text_encoder_2 -> tokenizer_2."""
    beside = re.sub(r"text_encoder(_\d)?$", r"tokenizer\1", place.strip().rstrip("/"))
    _, inside = locate(place)
    return beside if inside or os.path.isdir(os.path.expanduser(beside)) else place


class HuggingFaceText(TextEncoder):
    """Tokens from one frozen transformer, the pooled vector from a second or from the same one (S.2 c)."""

    def __init__(self, name: str, txt_len: int, device: torch.device | str):
        places = (FLUX_TEXT if name == "flux" else name).removeprefix("hf:").split(",")
        if len(places) > 2:
            raise EncoderError(f'"{name}" names {len(places)} encoders: use "hf:BOTH" or "hf:TOKENS,POOLED"')
        self.name, self.txt_len = canonical(name), txt_len
        self.of_tokens = FrozenTransformer(places[0], device)
        self.of_pooled = FrozenTransformer(places[1], device) if len(places) == 2 else self.of_tokens
        if txt_len > (most := self.of_tokens.limit):
            raise EncoderError(f"{places[0]} reads at most {most} tokens: txt_len {txt_len} is too long")
        self.d_txt, self.d_vec = self.of_tokens.width, self.of_pooled.width

    def encode(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        tokens, pooled = self.of_tokens(prompts, self.txt_len)
        if self.of_pooled is not self.of_tokens:  # CLIP reads 77 tokens
            _, pooled = self.of_pooled(prompts, min(self.txt_len, self.of_pooled.limit))
        return tokens, pooled

    def cuts(self, prompt: str) -> bool:
        return len(self.of_tokens.tokenizer(prompt, verbose=False)["input_ids"]) > self.txt_len


# ============================================================================================================
# Pictures
# ============================================================================================================


class Pixels:
    """The picture itself as latent, at the scale of the noise (PIXEL_SCALE says why)."""

    name, channels, factor = "pixels", 3, 1

    def encode(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] in [-1, 1] -> [B, 3, H, W]"""
        return images * PIXEL_SCALE

    def decode(self, latents: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, 3, H, W] in [-1, 1]"""
        return (latents / PIXEL_SCALE).clamp(-1, 1)


class KLAutoencoder:
    """A frozen VAE through diffusers: latents are (z - shift) * scale, both from its config (FLUX: 0.1159, 0.3611).

    z is the posterior's mean, not a sample, so that a picture has one latent, whatever the seed (the paper is silent).
    """

    def __init__(self, name: str, device: torch.device | str):
        try:
            import diffusers
        except ImportError as error:
            raise EncoderError(f"auto-encoder {name!r} needs diffusers: pip install diffusers") from error
        place = (FLUX_VAE if name == "flux" else name).removeprefix("kl:")
        self.name, self.device, self.dtype = canonical(name), device, precision(device)
        # low_cpu_mem_usage=True needs the accelerate package
        arguments = {"torch_dtype": self.dtype, "low_cpu_mem_usage": False}
        vae, lost = load_network("auto-encoder", place, diffusers.AutoencoderKL, device, **arguments)
        if lost:
            raise EncoderError(f"{place} lacks {len(lost)} weights of an auto-encoder, such as {lost[0]}")
        self.vae = vae
        self.channels = vae.config.latent_channels
        self.factor = 2 ** (len(vae.config.block_out_channels) - 1)  # each level but the last halves the side
        self.shift, self.scale = vae.config.shift_factor or 0.0, vae.config.scaling_factor

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] in [-1, 1] -> [B, channels, H/factor, W/factor] in fp32; H and W multiples of factor."""
        z = self.vae.encode(images.to(self.device, self.dtype)).latent_dist.mode()
        return (z.float() - self.shift) * self.scale

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """[B, channels, h, w] -> [B, 3, h * factor, w * factor] in [-1, 1], fp32."""
        z = latents.float() / self.scale + self.shift
        return self.vae.decode(z.to(self.device, self.dtype)).sample.float().clamp(-1, 1)


def autoencoder(name: str, device: torch.device | str = "cpu") -> Pixels | KLAutoencoder:
    """The auto-encoder of that name (the table on top). Raises EncoderError for one unknown or impossible to load."""
    if name == "pixels":
        return Pixels()
    if name == "flux" or name.startswith("kl:"):
        return KLAutoencoder(name, device)
    raise EncoderError(f'unknown auto-encoder {name!r}: use "pixels", "flux" or "kl:NAME_OR_FOLDER"')
