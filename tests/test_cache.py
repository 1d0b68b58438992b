"""Caches of encoded shards: whole or absent, the same sequence as their tars, refused where they do not fit."""

import pytest
import torch
from programs import run
from test_shards import SIZES, half_a_picture, picture, write_shards, write_tar

import data
import encoders
from scale import cache, shards


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("data") / "tars", SIZES)


def encode(source_folder, out, part=(0, 1), txt_len=8, **options):
    options = {"batch_size": 4, "per_shard": 4, "encode_batch": 3, "fake": True, "tokens": "fp32"} | options
    both = encoders.text_encoder("words", txt_len), encoders.autoencoder("pixels")
    cache.make(source_folder, out, 64, both, cache.Settings(**options), part)


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
    assert contents(tmp_path / "whole") == contents(tmp_path / "pieces") and len(done) > 4
    assert all((tmp_path / "pieces" / name).stat().st_mtime_ns == t for name, t in done.items())
    for part in (2, 0, 1):  # three processes share the work
        encode(folder, tmp_path / "parts", part=(part, 3))
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


def test_bf16_tokens_and_no_fake_prompts(tmp_path, folder):
    encode(folder, tmp_path / "c", tokens="bf16", fake=False)
    sample = cache.CachedShards(tmp_path / "c", 4).sample(0)
    tokens, pooled = encoders.text_encoder("words", 8)([sample.caption])
    assert torch.equal(sample.tokens, tokens[0].bfloat16()) and torch.equal(sample.pooled, pooled[0])
    assert sample.fake is None


def test_a_broken_picture_is_replaced_in_the_cache_as_without_it(tmp_path):
    """Also when its replacement lies in another shard of the cache, and whichever part meets it first."""
    pictures = {f"{i}.png": picture((64, 64)) for i in range(6)}
    pictures |= {f"{i}.png": half_a_picture((64, 64)) for i in (1, 4, 5)}
    write_tar(tmp_path / "t" / "a.tar", pictures | {f"{i}.txt": b"x\ny" for i in range(6)})
    encode(tmp_path / "t", tmp_path / "c", batch_size=3, per_shard=2)
    for part in (2, 1, 0):
        encode(tmp_path / "t", tmp_path / "parts", batch_size=3, per_shard=2, part=(part, 3))
    assert contents(tmp_path / "c") == contents(tmp_path / "parts")
    source, cached = shards.Shards(tmp_path / "t", 64, 3), cache.CachedShards(tmp_path / "c", 3)
    assert [cached.sample(g).key for g in range(18)] == [source.sample(g).key for g in range(18)]
    assert cached.skipped == source.skipped and sorted(cached.skipped) == ["a/1", "a/4", "a/5"]
    assert "6 encoded pictures" in cached.summary and "3 broken picture (a/1, a/4, a/5)" in cached.summary
    samples, (tokens, _) = [cached.sample(g) for g in range(18)], encoders.text_encoder("words", 8)(["x"])
    assert all(s.caption == "x" and torch.equal(s.tokens, tokens[0]) for s in samples)  # the first of several
    with pytest.raises(data.DataError, match="has 6 pictures of 64x64, fewer than a batch of 8"):
        cache.CachedShards(tmp_path / "c", 8)


def test_a_cache_refuses_other_settings_other_tars_and_damage(tmp_path):
    write_shards(tmp_path / "t", SIZES[:12])
    encode(tmp_path / "t", tmp_path / "c")
    before = contents(tmp_path / "c")

    def refuses(said, **options):
        with pytest.raises(data.DataError, match=said):
            encode(tmp_path / "t", tmp_path / "c", **options)
        assert contents(tmp_path / "c") == before

    refuses("txt_len 8, not 9", txt_len=9)
    refuses("fake True, not False", fake=False)
    refuses("per_shard 4, not 5", per_shard=5)
    write_shards(tmp_path / "t", SIZES[:13])
    refuses("made with other tars")
    write_shards(tmp_path / "t", SIZES[:12])
    (tmp_path / "t" / "00001.tar").rename(tmp_path / "t" / "1.tar")  # the same counts
    refuses("made with other tars")
    (tmp_path / "c" / "64x64_00001.safetensors").write_bytes(before["64x64_00001.safetensors"][:-9])
    with pytest.raises(data.DataError, match="64x64_00001.safetensors is damaged"):
        cache.CachedShards(tmp_path / "c", 4)
    with pytest.raises(data.DataError, match="no cache.json"):
        cache.CachedShards(tmp_path / "t", 4)


def test_another_program_s_cache_json_is_left_alone(tmp_path, folder):
    (tmp_path / "cache.json").write_text('{"theirs": 1}')
    assert not cache.spec_of(tmp_path)
    with pytest.raises(data.DataError, match="choose another folder"):
        encode(folder, tmp_path)
    assert (tmp_path / "cache.json").read_text() == '{"theirs": 1}'


QUICK = ["--side", 32, "--text", "words", "--device", "cpu", "--autoencoder", "pixels", "--per-shard", 32]


def test_parts_as_a_user_would(tmp_path, folder, monkeypatch, capsys):
    words = [folder / "{00000..00002}.tar", tmp_path / "cache", *QUICK, "--batch-size", 2]
    run(monkeypatch, cache, *words, "--part", "1/2")
    assert "cache: 1 shards are left to the other parts" in capsys.readouterr().out
    run(monkeypatch, cache, *words)
    assert "cache: complete" in capsys.readouterr().out
    assert cache.CachedShards(tmp_path / "cache", 2).sample(0).latent.shape == (3, 32, 32)
