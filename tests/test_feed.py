"""What the loop is fed with: one sequence whatever the number of processes, threads or stops, from any source."""

import functools
import itertools
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from programs import run

import data
import encoders
import losses
import recipe
from engine import feed
from engine.processes import Ranks
from rng import rng
from scale import cache, shards

DEVICE = torch.device("cpu")
TEXT, PIXELS = encoders.text_encoder("words", 12, "cpu"), encoders.autoencoder("pixels", "cpu")
DRAW = functools.partial(losses.draw, p_equal=0.5)


def plan_of(*stages, steps=6, **changes):
    stages = tuple(recipe.Stage(*stage) for stage in stages)
    return recipe.replace(recipe.RECIPES["laptop"], steps=steps, stages=stages, txt_len=12, **changes)


def feed_of(plan, codec=None, world=1, rank=0, start=0, **reading):
    codec = codec or feed.Codec(TEXT, PIXELS, DEVICE, patch=4)
    return feed.Feed(plan, DRAW, 3, codec, Ranks(world, rank), start, feed.Reading(**reading))


NO_ENCODERS = feed.Codec(None, None, DEVICE, patch=4)  # as with caches


def open_source(name, side=16, batch_size=4, multiple=4):
    return feed.open_source((str(name),), recipe.Stage(0, (side,), batch_size), multiple)


def make_cache(tars, name, side=16, **settings):
    settings = cache.Settings(**{"batch_size": 4, "tokens": "fp32", "multiple": 4} | settings)
    cache.make(tars / "tars", tars / name, side, (TEXT, PIXELS), settings)


@pytest.fixture(scope="module")
def tars(tmp_path_factory):
    """Sixteen pictures, ten of them wide, as pictures/, tars/, cache16/ and cache32/."""
    folder = tmp_path_factory.mktemp("feed")
    (folder / "pictures").mkdir()
    random = np.random.default_rng(0)
    for i in range(16):
        picture = random.integers(0, 255, (32, 64, 3) if i < 10 else (40, 40, 3), dtype=np.uint8)
        Image.fromarray(picture).save(folder / "pictures" / f"{i}.png")
        (folder / "pictures" / f"{i}.txt").write_text(f"picture number {i}")
    shards.pack(folder / "pictures", folder / "tars", per_shard=5)
    for side in (16, 32):
        make_cache(folder, f"cache{side}", side, fake=True, per_shard=4)
    return folder


def equal(a, b) -> bool:
    """Whether two tuples of tensors are the same, or both None."""
    if a is None or b is None:
        return a is b
    return all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_the_sequence_is_the_same_on_any_number_of_processes_and_threads():
    plan = plan_of((0, (24,), 8), (0.5, (24,), 16), micro_batch=2)
    alone = [key for batch in feed_of(plan, workers=1).stream(0) for key in batch.keys]
    assert len(set(alone)) == len(alone) == 3 * 8 + 3 * 16
    for world in (2, 4):
        parts = [feed_of(plan, world=world, rank=rank, workers=3) for rank in range(world)]
        streams, together = [part.stream(0) for part in parts], []
        for step in range(plan.steps):
            for stream, part in zip(streams, parts):
                for _ in part.indices(step):
                    together += next(stream).keys
        assert together == alone
    assert [key for batch in feed_of(plan, start=4).stream(4) for key in batch.keys] == alone[3 * 8 + 16 :]


def test_a_batch_holds_what_the_indices_say():
    plan = plan_of((0, (24,), 4), micro_batch=2, steps=3, aux_from=0.5, dropout=0.5)
    source, batches = data.Shapes(24, plan.data[0]), list(feed_of(plan).stream(0))
    assert len(batches) == 6
    for number, batch in enumerate(batches):
        step, index = number // 2, [2 * number, 2 * number + 1]
        samples = [source.sample(g, 3) for g in index]
        prompts = ["" if rng(3, "dropout", g).random() < 0.5 else s.caption for g, s in zip(index, samples)]
        assert torch.equal(batch.x0, PIXELS.encode(data.to_tensor([s.picture for s in samples])))
        assert equal(batch.c, TEXT(prompts)) and equal(batch.null, TEXT(["", ""]))
        assert batch.is_null.tolist() == [p == "" for p in prompts]
        assert equal(batch.draws, DRAW(3, step, index, (3, 24, 24)))
        assert equal(batch.fake, TEXT([encoders.fake_prompt(p) for p in prompts]) if step == 2 else None)


def test_an_empty_caption_is_a_null_prompt(tmp_path):
    """Also where no prompt is dropped: it has no classifier score, so it learns as a dropped one does."""
    captions = {"0.png": "a ring", "1.png": "", "2.png": "a cross", "3.png": " \n"}
    for i, (name, caption) in enumerate(captions.items()):
        Image.new("RGB", (24, 24), (60 * i, 0, 0)).save(tmp_path / name)
        (tmp_path / name).with_suffix(".txt").write_text(caption)
    (batch,) = feed_of(plan_of((0, (24,), 4), data=(str(tmp_path),), steps=1, dropout=0.0)).stream(0)
    assert sorted(batch.keys) == sorted(captions)
    assert batch.is_null.tolist() == [key in ("1.png", "3.png") for key in batch.keys]
    for c, null in zip(batch.c, batch.null):
        assert [torch.equal(a, b) for a, b in zip(c, null)] == batch.is_null.tolist()


def test_larger_pictures_come_in_smaller_micro_batches():
    """A micro-batch of 8 at side 16 has the pixels of 2 at side 32."""
    plan = plan_of((0, (16, 32), 16), micro_batch=8, steps=2)
    shapes = [tuple(batch.x0.shape) for batch in feed_of(plan).stream(0)]
    assert shapes == 2 * [(8, 3, 16, 16)] + 8 * [(2, 3, 32, 32)]


def test_the_side_that_the_plan_tells_is_that_of_the_pictures():
    """Sides take turns by the number of the batch in the data. Here the second stage begins at iteration 2 with its
    batch 3 = 24 / 8, one odd, the other even."""
    plan = plan_of((0, (16,), 12), (0.5, (16, 32), 8), steps=4)
    sides = [batch.x0.shape[-1] for batch in feed_of(plan).stream(0)]
    assert sides == [plan.side(step) for step in range(4)] == [16, 16, 32, 16]


def test_shards_come_in_buckets_and_their_draws_have_the_pictures_shape(tars, tmp_path):
    plan = plan_of((0, (16,), 4), (0.5, (16, 32), 4), data=(str(tars / "tars"),), micro_batch=2, steps=12)
    shapes = {}
    for number, batch in enumerate(feed_of(plan, index=str(tmp_path)).stream(0)):
        assert batch.draws.eps.shape == batch.x0.shape
        shapes.setdefault(number // 2, set()).add(tuple(batch.x0.shape[2:]))
    assert all(len(some) == 1 for some in shapes.values())  # one bucket an iteration
    assert len(list(tmp_path.iterdir())) == 8  # the index of four tars
    first, second = ({next(iter(shapes[step])) for step in steps} for steps in (range(6), range(6, 12)))
    assert all(100 < h * w < 300 for h, w in first) and len(first) == 2
    assert any(h * w > 700 for h, w in second) and any(h * w < 300 for h, w in second)


def test_caches_feed_what_their_tars_feed(tars):
    changes = {"steps": 8, "aux_from": 0.5, "dropout": 0.3, "micro_batch": 4}
    tar, cached = (
        list(feed_of(plan_of((0, (16, 32), 4), data=names, **changes), codec).stream(0))
        for names, codec in (
            ((str(tars / "tars"),), None),
            ((str(tars / "cache32"), str(tars / "cache16")), NO_ENCODERS),
        )
    )
    for a, b in zip(tar, cached, strict=True):
        assert a.keys == b.keys and equal((a.x0, a.is_null), (b.x0, b.is_null)) and equal(a.draws, b.draws)
        assert equal(a.c, b.c) and equal(a.null, b.null) and equal(a.fake, b.fake)


@pytest.mark.parametrize(
    "names, sides, said",
    [
        (("shapes",), (26,), "multiple of 4"),
        (("absent",), (24,), "no such folder"),
        (("{}/cache16",), (32,), "--side 32"),
        (("{}/cache16", "{}/tars"), (16,), "beside others"),
        (("{}/tars", "{}/pictures"), (16,), "pictures beside others"),
        (("{}/tars",), (18,), "multiple of 4"),
        (("scenes", "emoji"), (24,), "a built-in set alone, not scenes"),
        (("{}/tars", "scenes"), (24,), "a built-in set alone, not scenes"),
    ],
)
def test_what_cannot_be_opened(tars, names, sides, said):
    with pytest.raises(data.DataError, match=said):
        feed.open_source(tuple(name.format(tars) for name in names), recipe.Stage(0, sides, 4), 4)


def test_the_shapes_that_a_model_will_draw(tars):
    """Those of the stage's largest side with their shares, the most frequent first; of a folder its square."""
    plan = plan_of((0, (16,), 4), (0.5, (32, 16), 4), data=(str(tars / "tars"),), steps=12)
    first, second = (feed_of(plan).buckets(step) for step in (5, 6))
    assert list(first.values()) == list(second.values()) == [10 / 16, 6 / 16]
    assert list(first) == [(12, 20), (16, 16)] and list(second) == [(24, 44), (32, 32)]
    assert feed_of(plan_of((0, (24,), 4))).buckets(0) == {(24, 24): 1.0}


def test_each_source_is_told_in_a_line(tars, tmp_path):
    """Once for all its sides and stages; captions that --txt-len cuts are counted."""
    shutil.copytree(tars / "pictures", tmp_path / "pictures")
    (tmp_path / "pictures/7.txt").write_text("one two three four five six seven eight nine ten eleven twelve")
    plans = [
        plan_of((0, (16,), 4), (0.5, (16, 32), 4), data=(str(place),), wrong_captions=share)
        for place, share in ((tars / "tars", 0.0), (tmp_path / "pictures", 0.5))
    ]
    assert [feed_of(plan).tell() for plan in plans] == [
        [f"{tars / 'tars'}: 16 pictures in 4 tars, 16 captions"],
        [f"{tmp_path / 'pictures'}: 16 pictures, 16 captions; captions longer than --txt-len 12 reads: 1"],
    ]
    assert feed_of(plan_of((0, (24,), 4))).tell() == []


def test_a_look_at_data(tars, tmp_path, monkeypatch, capsys):
    (tmp_path / "lost.png").write_bytes(b"")
    for name in ("lost", "found"):
        (tmp_path / f"{name}.txt").write_text(name)
    Image.new("RGB", (20, 20)).save(tmp_path / "found.png")
    for place, said in ((tmp_path, "lost.png: broken picture"), (tars / "tars", "16 pictures in 4 tars")):
        run(monkeypatch, feed, "--data", place, "--out", tmp_path / "sheet.png")
        assert said in capsys.readouterr().out and Image.open(tmp_path / "sheet.png").width > 1000


@pytest.mark.parametrize("changes", [{"txt_len": 11}, {"text": "flux"}, {"autoencoder": "flux"}], ids=str)
def test_a_cache_of_other_encoders_is_refused_at_the_start(tars, changes):
    plan = recipe.replace(plan_of((0, (16,), 4), data=(str(tars / "cache16"),)), **changes)
    with pytest.raises(data.DataError, match=f"was encoded with {next(iter(changes))}"):
        feed_of(plan, NO_ENCODERS)


def test_a_cache_without_fake_prompts_is_refused_at_the_start(tars):
    """Where the auxiliary term will join, however late; where it never does, such a cache is enough."""
    make_cache(tars, "plain")
    plan = plan_of((0, (16,), 4), data=(str(tars / "plain"),), aux_from=0.9)
    with pytest.raises(data.DataError, match="without --fake"):
        feed_of(plan, NO_ENCODERS)
    assert len(list(feed_of(recipe.replace(plan, aux_from=1.0), NO_ENCODERS).stream(0))) == plan.steps


def test_only_the_caches_of_a_stages_sides_are_opened(tars):
    """A cache for the larger pictures of a later stage may be made for that stage's smaller batch."""
    make_cache(tars, "cache16whole", batch_size=12)
    plan = plan_of((0, (16,), 12), data=(str(tars / "cache16whole"), str(tars / "cache32")))
    assert len(next(feed_of(plan, NO_ENCODERS).stream(0)).keys) == 12
    with pytest.raises(data.DataError, match="fewer than a batch of 12"):
        open_source(tars / "cache32", 32, 12)


def test_a_cache_whose_sides_do_not_fit_the_patch_is_refused(tars):
    make_cache(tars, "odd", multiple=1)
    with pytest.raises(data.DataError, match="--multiple 8"):
        open_source(tars / "odd", multiple=8)


def test_what_the_order_follows_from_is_in_the_fingerprint(tars):
    """Another side, batch or multiple is another sequence; the cache made with the same three is the same one."""
    same = {open_source(tars / name).fingerprint for name in ("tars", "cache16")}
    others = {open_source(tars / "tars", *how).fingerprint for how in ((32, 4, 4), (16, 12, 4), (16, 4, 8))}
    assert len(same) == 1 and len(others | same) == 4
    assert data.Shapes(16).fingerprint != data.Shapes(24).fingerprint


def test_another_batch_is_another_sequence_of_iterations():
    """Shapes come in the same order whatever the batch, but other ones meet in an iteration: each stage says which."""
    one, other = (feed_of(plan_of((0, (24,), 8), (0.5, (24,), batch))).fingerprints() for batch in (12, 16))
    assert set(one) == set(other) == {"0", "1"} and one["0"] == other["0"] and one["1"] != other["1"]
    late = feed_of(plan_of((0, (24,), 8), (0.5, (24,), 12)), start=3)
    assert late.fingerprints() == {"1": one["1"]}  # what is behind is not opened again


def test_other_content_under_the_same_names_is_noticed(tars, tmp_path):
    """Resuming would go on with other samples, a cache would keep the old ones."""
    found = {open_source(tars / "tars").fingerprint}
    for i, where in enumerate((b"picture number 7", b"IDAT")):  # in a caption, in a picture
        folder = shutil.copytree(
            tars / "tars", tmp_path / f"tars{i}", ignore=shutil.ignore_patterns("*.index")
        )
        content = {tar: bytearray(tar.read_bytes()) for tar in folder.glob("*.tar")}
        tar = next(tar for tar in content if where in content[tar])
        content[tar][content[tar].index(where) + 10] ^= 1
        tar.write_bytes(content[tar])
        found.add(open_source(folder).fingerprint)
    pictures = shutil.copytree(tars / "pictures", tmp_path / "pictures")
    found |= {data.ImageFolder(pictures, side).fingerprint for side in (16, 16, 24)}
    (pictures / "7.txt").write_text("picture number 8")
    found.add(data.ImageFolder(pictures, 16).fingerprint)
    Image.new("RGB", (40, 40)).save(pictures / "3.png")
    found.add(data.ImageFolder(pictures, 16).fingerprint)
    assert len(found) == 3 + 4


def test_an_error_on_a_thread_reaches_the_loop(monkeypatch):
    plan = plan_of((0, (24,), 4), micro_batch=2)
    stream = feed_of(plan).stream(0)
    next(stream)

    def broken(self, g, seed):
        raise data.DataError("the disk is gone")

    monkeypatch.setattr(data.Shapes, "sample", broken)
    with pytest.raises(data.DataError, match="the disk is gone"):
        list(itertools.islice(stream, 20))
