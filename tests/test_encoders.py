"""encoders.py against hand-made word vectors, and against transformers and diffusers on tiny models made on the spot."""

import functools
import hashlib
import json
import os
import shutil
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported

import pytest
import torch
from safetensors.torch import save_file

import encoders

PAIR = ["a photo of a red circle left of a blue square", "a photo of a blue circle left of a red square"]


# --- word vectors -------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def words():
    return encoders.text_encoder("words", 16, "cpu")


def test_words_layout_by_hand(words):
    """Every slot rebuilt from hash bits with plain Python integers."""

    def signs(kind, word):
        number = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=16, person=kind).digest(), "big")
        return [1.0 if number >> (127 - bit) & 1 else -1.0 for bit in range(128)]

    red, circle = signs(b"word", "red"), signs(b"word", "circle")
    end, beyond = signs(b"mark", "end"), signs(b"mark", "beyond")
    places = [signs(b"position", str(i))[:32] for i in range(3)]
    tokens, pooled = words(["Red  circle"])
    assert tokens.dtype == pooled.dtype == torch.float32
    assert tokens.shape == (1, 16, 256) and pooled.shape == (1, 256)
    assert tokens[0, 0].tolist() == red + beyond[:48] + circle[:48] + places[0]
    assert tokens[0, 1].tolist() == circle + red[:48] + end[:48] + places[1]
    assert tokens[0, 2].tolist() == end + circle[:48] + beyond[:48] + places[2]
    assert tokens[0, 3:].eq(0).all()
    assert pooled[0, :128].tolist() == [(a + b + c) / 2 for a, b, c in zip(red, circle, end)]  # sqrt(3) -> 2
    moment = [2 * (c - a) / 4 for a, c in zip(red, end)]  # places -2, 0, 2; sqrt(8) -> 4
    assert pooled[0, 128:].tolist() == moment


def test_words_any_vocabulary(words):
    odd = ["zxqv", "zxqw", "smiling face with 🕶️", "🕶", "красный круг", "红色圆形"]
    odd += ["\ud800 lone", "\x00", "e\u0301"]
    tokens, pooled = words(odd)
    assert tokens[:, 0].abs().eq(1).all()  # every one has a first token, all signs
    for vectors in (tokens, pooled):
        assert len({tuple(v.flatten().tolist()) for v in vectors}) == len(odd)
    assert words(["e\u0301"])[0].equal(words(["É"])[0])  # composed or not, capital or not: one word
    text = "a cat: “two”—3\nｆｕｌｌ❤️👩‍🚀红圆"
    assert encoders.split_words(text) == "a cat : “ two ” — 3 full ❤ 👩 🚀 红 圆".split()


def test_a_letter_has_thirty_marks_at_most(words):
    """Those of all languages fit; a million took hours."""
    marks = "\u0300\u0316"
    many, most, fewer = (encoders.split_words("a" + marks * n + "b c") for n in (500_000, 15, 14))
    assert many == most != fewer


def test_words_null_and_fake_prompt(words):
    tokens, pooled = words(["", "   ", encoders.fake_prompt("")])
    assert tokens[0].equal(tokens[1]) and pooled[0].equal(pooled[1])
    assert tokens[0, 0].abs().eq(1).all() and tokens[0, 1:].eq(0).all() and pooled[0].abs().max() == 1
    assert not tokens[0].equal(tokens[2])
    long = " ".join(f"w{i}" for i in range(100))
    assert encoders.fake_prompt(long) == "fake image " + long
    tokens, _ = words([long, encoders.fake_prompt(long), encoders.fake_prompt("w0")])
    assert tokens[1, 0].equal(tokens[2, 0])  # "fake" at the front, with "image" behind it
    first, last = tokens[:, :, :128], [tokens[0, 15, :128], tokens[1, 15, :128], tokens[2, 3, :128]]
    assert first[1, 2].equal(first[0, 0])  # then the prompt
    assert last[0].equal(last[1]) and last[1].equal(last[2])  # the end
    assert words([long])[0].equal(words([" ".join(long.split()[:15])])[0])  # the end of the prompt is cut


def test_words_are_the_same_in_any_batch_and_rebuilt(words):
    again = encoders.text_encoder(words.name, words.txt_len, "cpu")
    both = again(PAIR)
    for i, prompt in enumerate(PAIR):
        assert all(x[0].equal(y[i]) for x, y in zip(words([prompt]), both))
    both[0].zero_()  # what a caller does to its tensors must not reach the cache
    assert again(PAIR)[0].abs().sum() > 0
    assert (words.d_txt, words.d_vec, encoders.text_encoder("words").txt_len) == (256, 256, 14)


# --- tiny Hugging Face models -------------------------------------------------------------------------------


VOCABULARY = "<pad> </s> <unk> <s> fake image a photo of red blue circle square".split()


def save_tokenizer(folder, template, **special):
    """A WordLevel tokenizer made on the spot; `template` is where the end (and start) tokens go."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    numbers = {word: i for i, word in enumerate(VOCABULARY)}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(numbers, unk_token="<unk>"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    ends = [("</s>", 1), ("<s>", 3)]
    core.post_processor = tokenizers.processors.TemplateProcessing(single=template, special_tokens=ends)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="</s>", **special)
    tokenizer.save_pretrained(folder)


def ids(prompt, length, start=False):
    """The same by hand, padding included."""
    words = [VOCABULARY.index(w) for w in prompt.split()]
    words = [3] * start + words[: length - 1 - start] + [1]
    return torch.tensor([words + [0] * (length - len(words))])


def shake(model):
    """Weights of size 0.3, so that no output is close to constant."""
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    return model.eval()


SMALL = {"vocab_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "pad_token_id": 0}


def saved(tmp_path_factory, name, model, template, **special) -> str:
    """The folder of a model with weights of size 0.3 and with its tokenizer."""
    folder = tmp_path_factory.mktemp(name)
    shake(model).save_pretrained(folder)
    if template:
        save_tokenizer(folder, template, pad_token="<pad>", **special)
    return str(folder)


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    """A whole T5, of which the encoder half is wanted."""
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"vocab_size": 16, "d_model": 24, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    model = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0))
    return saved(tmp_path_factory, "t5", model, "$A </s>"), model.get_encoder()


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """CLIP's text tower with CLIP's habits: start and end tokens, padding with a token of its own."""
    from transformers import CLIPTextConfig, CLIPTextModel

    sizes = SMALL | {"hidden_size": 20, "intermediate_size": 32, "max_position_embeddings": 9}
    model = CLIPTextModel(CLIPTextConfig(**sizes, bos_token_id=3, eos_token_id=1))
    return saved(tmp_path_factory, "clip", model, "<s> $A </s>", bos_token="<s>"), model


def bert_config():
    from transformers import BertConfig

    return BertConfig(**SMALL, hidden_size=12, intermediate_size=16, max_position_embeddings=40)


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    from transformers import BertModel

    model = BertModel(bert_config())
    return saved(tmp_path_factory, "bert", model, "<s> $A </s>"), model


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    from diffusers import AutoencoderKL

    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    sizes = {"block_out_channels": (4, 4, 8, 8), "norm_num_groups": 2, "layers_per_block": 1}
    flux = {"latent_channels": 16, "scaling_factor": 0.3611, "shift_factor": 0.1159}
    flux |= {"use_quant_conv": False, "use_post_quant_conv": False}
    model = AutoencoderKL(**blocks, **sizes, **flux, sample_size=32)
    return saved(tmp_path_factory, "vae", model, None), model


def frozen(network):
    return not network.training and not any(p.requires_grad for p in network.parameters())


def test_t5_alone(t5):
    folder, reference = t5
    text = encoders.text_encoder("hf:" + folder, 10, "cpu")
    prompt = "a photo of a red circle"
    tokens, pooled = text([prompt, ""])
    with torch.no_grad():  # unmasked: the padding is read, as in FLUX
        want = reference(input_ids=ids(prompt, 10)).last_hidden_state[0]
    assert tokens.shape == (2, 10, 24) and pooled.shape == (2, 24) and (text.d_txt, text.d_vec) == (24, 24)
    torch.testing.assert_close(tokens[0], want)
    torch.testing.assert_close(pooled[0], want[:7].mean(dim=0))  # six words and the end token
    torch.testing.assert_close(pooled[1], tokens[1, 0])  # the null prompt: the end token alone
    assert not tokens.requires_grad and frozen(text.of_tokens.model)
    assert not any("decoder" in name for name, _ in text.of_tokens.model.named_parameters())


def test_clip_alone(clip):
    folder, reference = clip
    text = encoders.text_encoder("hf:" + folder, 9, "cpu")
    tokens, pooled = text(["red circle", ""])
    with torch.no_grad():
        want = reference(input_ids=ids("red circle", 9, start=True)).last_hidden_state[0]
    torch.testing.assert_close(tokens[0], want)
    torch.testing.assert_close(pooled[0], want[3])  # CLIP's own pooling: the state of the end token
    torch.testing.assert_close(pooled[1], tokens[1, 1])
    with pytest.raises(ValueError, match="reads at most 9 tokens: txt_len 16 is too long"):
        encoders.text_encoder("hf:" + folder, 16, "cpu")


def test_bert_like_folder_with_its_pooler(bert):
    folder, reference = bert
    text, longer = (encoders.text_encoder("hf:" + folder, n, "cpu") for n in (8, 20))
    tokens, pooled = text(["blue square of a photo", "red"])
    with torch.no_grad():
        want = reference(input_ids=torch.tensor([[3, 9, 1]]))  # the short prompt by itself, without padding
    torch.testing.assert_close(tokens[1, :3], want.last_hidden_state[0])
    torch.testing.assert_close(pooled[1], want.pooler_output[0])
    torch.testing.assert_close(longer(["red"])[0][0, :3], tokens[1, :3])  # masked: padding changes nothing


def test_bert_saved_without_pooler(tmp_path):
    """A masked language model has no pooler; AutoModel would fill one with random numbers, different at each start."""
    from transformers import BertForMaskedLM

    shake(BertForMaskedLM(bert_config())).save_pretrained(tmp_path)
    save_tokenizer(tmp_path, "<s> $A </s>", pad_token="<pad>")
    first, second = (encoders.text_encoder(f"hf:{tmp_path}", 8, "cpu")(["red circle"]) for _ in range(2))
    assert first[1].equal(second[1])
    torch.testing.assert_close(first[1][0], first[0][0, :4].mean(dim=0))


def test_pair_and_rebuilding_from_its_name(t5, clip, monkeypatch):
    monkeypatch.chdir(Path(t5[0]).parent)
    text = encoders.text_encoder(f"hf:{Path(t5[0]).name},{clip[0]}", 12, "cpu")  # a relative folder
    tokens, pooled = text(PAIR)
    assert (text.d_txt, text.d_vec, tokens.shape, pooled.shape) == (24, 20, (2, 12, 24), (2, 20))
    monkeypatch.chdir("/")  # the name must mean the same from elsewhere
    again = encoders.text_encoder(text.name, text.txt_len, "cpu")
    assert again.name == text.name and all(x.equal(y) for x, y in zip(again(PAIR), (tokens, pooled)))
    # tokens come from T5 and the pooled vector from CLIP, at CLIP's own length (9 here, 77 in earnest)
    torch.testing.assert_close(tokens, encoders.text_encoder("hf:" + t5[0], 12, "cpu")(PAIR)[0])
    torch.testing.assert_close(pooled, encoders.text_encoder("hf:" + clip[0], 9, "cpu")(PAIR)[1])


def test_fake_prefix_survives_truncation(tmp_path, t5, clip):
    """Even with a tokenizer that says it cuts and pads at the front."""
    folder = shutil.copytree(t5[0], tmp_path / "left")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"truncation_side": "left", "padding_side": "left"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    long = "a photo of a red circle " * 20
    fake = encoders.fake_prompt(long)
    tokens, pooled = encoders.text_encoder(f"hf:{folder},{clip[0]}", 12, "cpu")([fake, long, "red"])
    assert not pooled[0].equal(pooled[1])
    for row, prompt in ((0, fake), (2, "red")):
        with torch.no_grad():
            want = t5[1](input_ids=ids(prompt, 12)).last_hidden_state[0]
        torch.testing.assert_close(tokens[row], want)
    assert ids(fake, 12)[0, :2].tolist() == [4, 5]


# --- auto-encoders ------------------------------------------------------------------------------------------
def test_pixels():
    ae = encoders.autoencoder("pixels", "cpu")
    images = torch.rand(2, 3, 6, 5) * 2 - 1
    assert (ae.name, ae.channels, ae.factor, ae.encode(images).shape) == ("pixels", 3, 1, (2, 3, 6, 5))
    torch.testing.assert_close(ae.decode(ae.encode(images)), images)
    half = torch.tensor([-0.5, 0.5]).repeat(24).reshape(1, 3, 4, 4)  # a picture of standard deviation 0.5
    assert ae.encode(half).std(correction=0) == 1
    assert ae.decode(100 * images).abs().max() == 1


def test_vae(vae):
    folder, reference = vae
    ae = encoders.autoencoder("kl:" + folder, "cpu")
    assert (ae.channels, ae.factor) == (16, 8) and frozen(ae.vae)
    images = torch.rand(2, 3, 32, 48) * 2 - 1
    latents = ae.encode(images)
    with torch.no_grad():
        mean = reference.encoder(images)[:, :16]  # it gives mean and log-variance; no sample is drawn
        want = reference.decoder(mean)
    torch.testing.assert_close(latents, (mean - 0.1159) * 0.3611)
    assert latents.shape == (2, 16, 4, 6) and latents.equal(ae.encode(images)) and not latents.requires_grad
    decoded = ae.decode(latents)
    assert decoded.shape == images.shape and decoded.dtype == torch.float32 and not decoded.requires_grad
    torch.testing.assert_close(decoded, want.clamp(-1, 1), atol=1e-4, rtol=1e-4)
    assert want.abs().max() > 1 and decoded.std() > 0.1  # so that the clamp and the picture are both seen
    assert encoders.autoencoder(ae.name, "cpu").encode(images).equal(latents)


# --- the default names, from a cache without network --------------------------------------------------------
def test_default_names_load_from_a_hugging_face_cache(tmp_path, monkeypatch, t5, clip, vae):
    """A repository laid out like FLUX.1-schnell's, with tiny weights."""
    cached = functools.partial(encoders.load, cache_dir=str(tmp_path), local_files_only=True)
    monkeypatch.setattr(encoders, "load", cached)
    repository = tmp_path / "models--black-forest-labs--FLUX.1-schnell"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    place = repository / "snapshots" / ("0" * 40)
    no_tokenizer = shutil.ignore_patterns("tokenizer*", "special_tokens*")
    no_model = shutil.ignore_patterns("model*", "config.json", "generation*")
    for source, number in ((clip[0], ""), (t5[0], "_2")):
        shutil.copytree(source, place / f"text_encoder{number}", ignore=no_tokenizer)
        shutil.copytree(source, place / f"tokenizer{number}", ignore=no_model)
    shutil.copytree(vae[0], place / "vae")
    text, ae = encoders.text_encoder("flux", 12, "cpu"), encoders.autoencoder("flux", "cpu")
    assert (text.name, text.d_txt, text.d_vec) == ("flux", 24, 20)
    assert (ae.name, ae.channels, ae.factor) == ("flux", 16, 8)
    here = f"hf:{place}/text_encoder_2,{place}/text_encoder"  # the tokenizers are found beside the models
    for name in (encoders.FLUX_TEXT, f"hf:{t5[0]},{clip[0]}", here):
        torch.testing.assert_close(encoders.text_encoder(name, 12, "cpu")(PAIR), text(PAIR))
    images = torch.full((1, 3, 16, 16), 0.5)
    assert encoders.autoencoder(encoders.FLUX_VAE, "cpu").encode(images).equal(ae.encode(images))
    torch.testing.assert_close(ae.encode(images), encoders.autoencoder("kl:" + vae[0]).encode(images))


def test_half_precision_inside_single_outside(monkeypatch, t5, clip, bert, vae):
    """What runs on CUDA, here on the CPU: bf16 weights, fp32 results close to those of fp32 weights."""
    images, latents, results = torch.rand(1, 3, 16, 16), torch.ones(1, 16, 2, 2), []
    for dtype in (torch.float32, torch.bfloat16):
        monkeypatch.setattr(encoders, "precision", lambda device, dtype=dtype: dtype)
        texts = [encoders.text_encoder(f"hf:{spec}", 8, "cpu") for spec in (f"{t5[0]},{clip[0]}", bert[0])]
        ae = encoders.autoencoder("kl:" + vae[0], "cpu")
        for network in (*(text.of_pooled.model for text in texts), ae.vae):
            assert {p.dtype for p in network.parameters()} == {dtype}
        results.append([*texts[0](PAIR), *texts[1](PAIR), ae.encode(images), ae.decode(latents)])
    for single, half in zip(*results):
        assert single.dtype == half.dtype == torch.float32
        assert 0 < (single - half).abs().max() and (single - half).norm() < 0.05 * single.norm()


# --- what goes wrong ----------------------------------------------------------------------------------------
def refused(call, *arguments):
    """The message of the error: one readable line."""
    with pytest.raises(encoders.EncoderError) as caught:
        call(*arguments)
    message = str(caught.value)
    assert "\n" not in message and 20 < len(message) < 600
    return message


@pytest.mark.parametrize(
    "call, name, said",
    [
        (encoders.text_encoder, "bert", '"words"'),
        (encoders.text_encoder, "hf:a/b,c/d,e/f", "3 encoders"),
        (encoders.text_encoder, "hf:a/b,", "no such folder"),
        (encoders.text_encoder, "hf:not a name!", "not a name!"),
        (encoders.autoencoder, "vae", '"pixels"'),
        (encoders.autoencoder, "kl:/no/such/vae", "/no/such/vae"),
        (encoders.autoencoder, "flux", "pip install diffusers"),
    ],
)
def test_unknown_names(call, name, said, monkeypatch):
    if name == "flux":
        monkeypatch.setitem(sys.modules, "diffusers", None)
    assert said in refused(call, name)


@pytest.mark.parametrize("kind", ["text", "auto-encoder"])
def test_folders_that_are_not_what_they_should_be(kind, tmp_path, bert, vae):
    """Weights cut short, weights that lack one, and a pickle in their place, which is never opened."""
    (source, model), call, prefix, lost = (
        (bert, encoders.text_encoder, "hf:", "encoder.layer.1.output.dense.weight")
        if kind == "text"
        else (vae, encoders.autoencoder, "kl:", "decoder.conv_in.weight")
    )
    folder = shutil.copytree(source, tmp_path / "spoilt")
    (weights,) = folder.glob("*.safetensors")
    state = {name: value for name, value in model.state_dict().items() if name != lost}
    save_file(state, weights, metadata={"format": "pt"})
    assert lost in refused(call, f"{prefix}{folder}")
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "cannot load" in refused(call, f"{prefix}{folder}")
    weights.unlink()
    torch.save(model.state_dict(), folder / (weights.stem.replace("model", "pytorch_model") + ".bin"))
    assert "safetensors" in refused(call, f"{prefix}{folder}")


def test_tokenizers_that_are_not_there(tmp_path, bert):
    without = shutil.copytree(bert[0], tmp_path / "no_tokenizer", ignore=shutil.ignore_patterns("*token*"))
    assert "tokenizer" in refused(encoders.text_encoder, f"hf:{without}", 16)
    save_tokenizer(without, "$A </s>")
    assert "no padding token" in refused(encoders.text_encoder, f"hf:{without}", 16)
