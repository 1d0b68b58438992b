"""The page toy/explore.html without a browser: its JavaScript, in Node.js, against the Python; and what it is made of."""

import base64
import gzip
import hashlib
import json
import re
import shutil
import subprocess
import sys
import unicodedata

import numpy as np
import pytest
import torch

import encoders
import losses
import model
import sample
import sampler
from engine import errors
from rng import normal, rng
from toy import explore, ideal, measures
from toy.mixture import LAYOUTS, Mixture
from toy.training import Net

PAGE = explore.PAGE.read_text(encoding="utf-8")
WORLD = explore.embedded(explore.PAGE)
SCRIPTS = re.findall(r"\{\{(\w+\.js)\}\}", (explore.FOLDER / "template.html").read_text())
DOUBLE = {"dtype": torch.float64}


def node(program: str, **given):
    """What `program` hands to answer(). It sees the page's scripts, its data as `world`, and the names of `given`."""
    if shutil.which("node") is None:
        pytest.skip("Node.js is not installed: the page's JavaScript is not run")
    sources = "".join((explore.FOLDER / name).read_text() for name in SCRIPTS if name != "main.js")
    script = f"""{sources}
        const given = JSON.parse(require("fs").readFileSync(0, "utf8")), {{ world }} = given;
        const answer = (value) => console.log(
          JSON.stringify(value, (_, part) => (ArrayBuffer.isView(part) ? Array.from(part) : part)));
        (async () => {{ const {{ {", ".join(given)} }} = given; {program} }})();"""
    told = json.dumps({"world": WORLD, **given})
    run = subprocess.run(["node", "-e", script], input=told, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def close(found, expected, bound=1e-6):
    assert np.abs(np.asarray(found, dtype=float) - np.asarray(expected)).max() <= bound


def mixed(layout: str, wrong: float = 0.0) -> Mixture:
    """A layout in double precision; `wrong` is the share of labels that are drawn anew."""
    q = Mixture(**LAYOUTS[layout], **DOUBLE)
    q.table[: q.C] = (1 - wrong) * q.table[: q.C] + wrong * q.table[q.C]
    return q


# ------------------------------------------------------------------------------------------------------------
# The plane
# ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("layout, wrong", [("ring", 0), ("between", 0.4), ("far", 0)])
def test_the_closed_form_is_that_of_the_mixture(layout, wrong):
    q, g, n = mixed(layout, wrong), np.random.default_rng(0), 60
    t = torch.from_numpy(np.concatenate([[0, 1, 1e-3, 1 - 1e-3], g.random(n - 4)]))
    x, c = torch.from_numpy(2 * g.standard_normal((n, 2))), torch.from_numpy(g.integers(0, q.C + 1, n))
    found = node(
        """const q = mixture(world.layouts[layout], wrong);
           const u = random.uniform(0, "page", [1], 20000), z = normal_points(20000, 2);
           answer([x.map((point, n) => posterior_mean(q, point, t[n], c[n])),
                   x.map((point, n) => posterior(q, point, t[n], c[n]).shares),
                   range(20000).map((n) => draw_posterior(q, x[9], t[9], c[9], u[n], z[n]))]);""",
        **dict(layout=layout, wrong=wrong, x=x.tolist(), t=t.tolist(), c=c.tolist()),
    )
    shares, means, var = q.posterior(x, t, c)
    close(found[0], q.posterior_mean(x, t, c))
    close(found[1], shares)
    draws, mean = np.array(found[2]), q.posterior_mean(x, t, c)[9].numpy()
    second = (shares[9, :, None] * (means[9] ** 2 + var[9, :, None])).sum(0).numpy()
    close(draws.mean(0), mean, 5 * draws.std(0).max() / 20000**0.5)
    close((draws**2).mean(0), second, 5 * (draws**2).std(0).max() / 20000**0.5)


def test_what_is_said_of_samples_is_what_measures_say():
    q, g = mixed("between"), np.random.default_rng(1)
    x, y = q.sample(torch.ones(80, dtype=torch.int64), g), q.sample(torch.full((90,), 3), g)
    found = node(
        """const q = mixture(world.layouts.between);
           answer([energy_distance(x, y), y.map((p) => is_blend(q, p, 1)), mass_of(q, y, 1)]);""",
        x=x.tolist(),
        y=y.tolist(),
    )
    distance = torch.cdist(y, q.means[1]) / 0.12
    close(found[0], measures.energy_distance(x, y))
    assert found[1] == (distance.min(1).values > 4).tolist()
    close(found[2], torch.bincount(distance.argmin(1), minlength=3) / 90)


def step_in_python(q: Mixture, given: dict) -> dict:
    """The quantities of a training step by the functions of losses.py; given as for training_step of method.js."""
    row = lambda value: torch.tensor([value], **DOUBLE)  # noqa: E731
    x0, eps, eps_s, t, s = (row(given[name]) for name in ("x0", "eps", "eps_s", "t", "s"))
    c = torch.tensor([given["c"]])
    x_t = losses.add_noise(x0, t, eps)
    x0_hat = losses.one_step_estimate(x_t, t, q.V(x_t, t, s, c))
    x_s_hat = losses.add_noise(x0_hat, s, eps_s)
    G_c, G_null = (q.posterior_mean(x_s_hat, s, prompt) for prompt in (c, q.null(c)))
    made = dict(x0=x0, eps=eps, x_t=x_t, x0_hat=x0_hat, x_s_hat=x_s_hat, G_c=G_c, G_null=G_null)
    if given["k"] < 1:
        answers = torch.cat([x0_hat, torch.tensor(given["answers"], **DOUBLE)])
        made["G_fake"] = ideal.mean_of_answers(x_s_hat[None], given["s"], answers[None])[0]
    Delta = made["Delta"] = losses.self_evaluation(G_null, G_c, made.get("G_fake"), given["k"])
    x_self = made["x_self"] = losses.pseudo_target(x0_hat, Delta)
    lam = losses.lam(t, s)
    made["mix"] = lam / (1 + lam)
    x_tar = made["x_tar"] = losses.implicit_target(x0, x_self, lam)
    x_renorm = made["x_renorm"] = losses.renormalise(x_tar, x0)
    made["loss"] = losses.time_weight(t) * losses.target_loss(x0_hat, x_renorm)
    made |= {"lambda": lam} if given["t"] < 1 else {}  # "infinite" in the table
    return {name: value[0].numpy() for name, value in made.items()}


def test_a_training_step_is_that_of_losses():
    q, g, steps = mixed("between"), np.random.default_rng(2), []
    times = (0.8, 0.3, 1), (0.8, 0.3, 0.9), (0.5, 0.5, 0), (1, 0.4, 0.5), (0.9, 0, 1), (0.3, 0.1, 0.2)
    for t, s, k in times:
        points = {name: g.standard_normal(2).tolist() for name in ("x0", "eps", "eps_s")}
        answers = g.standard_normal((7, 2)).tolist()
        steps.append({**points, "t": t, "s": s, "k": k, "c": int(g.integers(3)), "answers": answers})
    found = node(
        "answer(steps.map((one) => training_step(mixture(world.layouts.between), one)))", steps=steps
    )
    for given, numbers in zip(steps, found):
        for name, value in step_in_python(q, given).items():
            close(numbers[name], value)


def test_a_target_that_is_zero_but_for_rounding_has_no_direction():
    """The ring at t = 1, s = 0: the mean of all modes is 0, and so is the target."""
    given = dict(x0=[1.5, 0], eps=[0.3, -0.2], eps_s=[0, 0], t=1, s=0, c=0, k=1, answers=[])
    found = node("answer(training_step(mixture(world.layouts.ring), one))", one=given)
    assert 0 < np.abs(found["x_tar"]).max() < 1e-12 and found["x_renorm"] == [0, 0]


@pytest.mark.parametrize("label", ["Eq. 19, Delta = 0", "Eq. 19, classifier only", "Eq. 18, k = 0"])
def test_following_the_target_is_ideal_pys(label):
    """Six rounds with the same draws, for one condition."""
    k, normalise, scale = goal = ideal.GOALS[label]
    q, g, rounds, n = mixed("far"), np.random.default_rng(3), 6, 9
    t, s, c = torch.full((n,), 0.9, **DOUBLE), torch.full((n,), 0.3, **DOUBLE), torch.zeros(n, dtype=int)
    x_t = losses.add_noise(q.sample(c, g), t, torch.from_numpy(g.standard_normal((n, 2))))
    x0 = [q.posterior_sample(x_t, t, c, g) for _ in range(rounds)]
    eps_s = [torch.from_numpy(g.standard_normal((n, 2))) for _ in range(rounds)]
    start = q.posterior_mean(x_t, t, c)

    def evaluate(x_s, x0_hat):
        fake = ideal.mean_of_answers(x_s[None], 0.3, x0_hat[None])[0]
        return q.posterior_mean(x_s, s, q.null(c)), q.posterior_mean(x_s, s, c), fake

    draws = iter(x0).__next__, iter(eps_s).__next__
    expected = ideal.follow(start, t, s, goal, rounds, *draws, evaluate)
    found = node(
        """const q = mixture(world.layouts.far);
           let x = start;
           x0.forEach((data, i) => { x = follow(q, x, { x0: data, eps_s: eps_s[i], rate: 0.3 * (1 - i / x0.length),
             t: 0.9, s: 0.3, c: 0, k, judge, normalise }); });
           answer(x);""",
        start=start.tolist(),
        x0=torch.stack(x0).tolist(),
        eps_s=torch.stack(eps_s).tolist(),
        **dict(k=k, judge=bool(scale), normalise=normalise),
    )
    close(found, expected)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0, "renoise"])
def test_a_trajectory_is_that_of_the_sampler(eta):
    """With a network that listens to t, s and the prompt, in guided and unguided steps, in both spaces of guidance."""
    g, steps, n = np.random.default_rng(3), 5, 6
    x, noise = g.standard_normal((n, 2)), g.standard_normal((steps, n, 2))

    def V(x, t, s, c):
        return x * (1 + c[:, None]) + torch.stack([(t - 2 * s), t * s * (c - 1.5)], dim=1)

    for choices in (
        dict(s_rule=0.0, guidance=1.0, mu=0.0, space="v"),
        dict(s_rule=0.3, guidance=2.5, mu=0.4, space="v"),
        dict(s_rule=1.0, guidance=2.0, mu=0.4, space="x0", t_max=0.9),
    ):
        found = node(
            """const V = (x, t, s, c) => x.map(([u, w]) => [u * (1 + c) + t - 2 * s, w * (1 + c) + t * s * (c - 1.5)]);
               const path = [], draw_noise = (k) => noise[k];
               for await (const one of trajectory(V, x, 1, 3, { ...choices, draw_noise })) path.push(one);
               answer(path);""",
            x=x.tolist(),
            noise=noise.tolist(),
            choices=dict(steps=steps, eta=eta, **choices),
        )
        cond, null = ((torch.full((n,), c),) for c in (1, 3))
        draw_noise = lambda k: torch.from_numpy(noise[k])  # noqa: E731
        told = dict(steps=steps, eta=eta, draw_noise=draw_noise, **choices)
        expected = sampler.trajectory(V, torch.from_numpy(x), cond, null, **told)
        for step, (t, x_t, x0_hat) in zip(found, expected, strict=True):
            close(step["t_next"], t)
            close(step["x"], x_t)
            close(step["x0_hat"], x0_hat)


def unpacked(weights: dict) -> dict[str, torch.Tensor]:
    """What explore.pack wrote: for each tensor the rows' scales, fp16, then their numbers in units of them."""
    content, at, state = gzip.decompress(base64.b64decode(weights["numbers"])), 0, {}
    for name, (rows, columns) in weights["shapes"].items():
        scale = np.frombuffer(content, "<f2", rows, at)[:, None].astype(np.float32)
        units = np.frombuffer(content, np.int8, rows * columns, at + 2 * rows).reshape(rows, columns)
        state[name], at = torch.from_numpy(scale * units), at + rows * (2 + columns)
    assert at == len(content)
    return state


def test_packed_weights_are_near_and_read_alike():
    state = dict(a=torch.randn(5, 7), b=torch.randn(6), c=torch.zeros(2, 3), d=1e-6 * torch.randn(2, 3))
    packed, rounded = explore.pack(state, finest=20)
    found = node("answer(await unpack(packed))", packed=packed)
    for name, value in state.items():
        close(found[name], rounded[name].flatten(), 0)
        close(unpacked(packed)[name].flatten(), rounded[name].flatten(), 0)
    close(rounded["a"], state["a"], state["a"].abs().max() / 40 * 1.01)
    close(rounded["b"], state["b"].half(), 0)


def toy_net(layout: str, label: str) -> Net:
    """The network of the page in PyTorch, from the weights that the page holds."""
    net = Net(0, 3)
    state = unpacked(WORLD["networks"]["weights"][layout][label])
    net.load_state_dict({name: state[name].view_as(value) for name, value in net.state_dict().items()})
    return net.requires_grad_(False)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_samples_are_those_of_python(layout):
    """Of the page's networks, with the page's noise, by PyTorch and sampler.py. Flow matching is told s = t."""
    steps, choices = 3, dict(eta=0.5, guidance=2)
    found, noise = node(
        """const out = [], settings = { layout, c: 1, seed: 3, s_rule: 0.25, ...choices };
           for (const { label } of OBJECTIVES) out.push(await sample_run(world, settings, label, steps, () => {}));
           answer([out.map(({ x }) => x.at(-1)), range(steps).map((k) => normal_points(SAMPLES, 12, 3, 1, k))]);""",
        **dict(layout=layout, steps=steps, choices=choices),
    )
    noise = torch.tensor(noise, dtype=torch.float32)
    c, null = (torch.full((noise.shape[1],), k) for k in (1, 3))
    for label, points in zip(explore.OBJECTIVES, found, strict=True):
        told = dict(steps=steps, s_rule=1.0 if label == "flow matching" else 0.25, **choices)
        V, draw_noise = toy_net(layout, label), lambda k: noise[k + 1]
        close(points, sampler.sample(V, noise[0], (c,), (null,), draw_noise=draw_noise, **told), 1e-3)


# ------------------------------------------------------------------------------------------------------------
# Noise, prompts, pictures
# ------------------------------------------------------------------------------------------------------------
def test_noise_is_numpys_bit_for_bit():
    """Seeds of one and of two words; enough values for every branch of the ziggurat. Beyond 3.65 a library's log1p
    decides the last bit."""
    keys = [(seed, (k, i)) for seed in (0, 2**32 - 1, 2**32, 2**53 - 1) for k, i in ((0, 0), (3, 2**33))]
    program = """answer([random.PURPOSES, keys.map(([seed, key]) => random.normal(seed, "sampling", key, 8000)),
                 random.uniform(7, "page", [2, 3], 50)])"""
    purposes, ours, uniform = node(program, keys=keys)
    for purpose, (low, high) in purposes.items():
        assert low + (high << 32) == int.from_bytes(hashlib.sha256(purpose.encode()).digest()[:8], "little")
    assert uniform == rng(7, "page", 2, 3).random(50).tolist()
    ours = np.array(ours, np.float32)
    numpys = np.stack([normal(seed, "sampling", [key], (8000,))[0].numpy() for seed, key in keys])
    tail = np.abs(numpys) > 3.654
    assert 3 < tail.sum() < 60  # 16.5 expected
    assert np.array_equal(ours[~tail], numpys[~tail])
    np.testing.assert_array_max_ulp(ours[tail], numpys[tail], maxulp=2)


TEXTS = [
    "",
    "   ",
    "A red-hot café!",
    "cafe\u0301 ＦＵＬＬ　width",
    "猫と犬 ½ ① ﬁ",
    "emoji 👩‍👩‍👧 ❤️ x",
    "İstanbul ΣΑΣ ẞ",
]
TEXTS += ["tab\tnew\nline", "a\x1cb\x85c\ufeffd\u2028e\u200bf", "[`{|}~]^_\\", "\ud800 lone", "é" * 300]
TEXTS += ["x" * 127, "x" * 128, "x" * 129, " ".join(f"w{i}" for i in range(40))]


def test_prompts_become_pythons_words_and_vectors():
    """With 50 random ones, of characters that Unicode has had since 3.2, on whose lower case every program agrees."""
    g, old = np.random.default_rng(0), unicodedata.ucd_3_2_0
    letters = [chr(c) for c in range(0x20000) if old.category(chr(c)) not in ("Cn", "Cs", "Co")]
    prompts = TEXTS + ["".join(g.choice(letters, g.integers(1, 20))) for _ in range(50)]
    program = "answer([prompts.map(prompt_words.split_words), [4, 12].map((n) => prompts.map(prompt_words.encoder(n)))])"
    split, vectors = node(program, prompts=prompts)
    assert split == [*map(encoders.split_words, prompts)]
    for txt_len, found in zip((4, 12), vectors):
        tokens, pooled = encoders.text_encoder("words", txt_len)(prompts)
        assert torch.equal(torch.tensor([v["tokens"] for v in found]), tokens.flatten(1))
        assert torch.equal(torch.tensor([v["pooled"] for v in found]), pooled)


def test_words_that_are_not_read_or_not_known_are_named():
    config, vocabulary = {"txt_len": 6}, ["a", "photo", "of", "red"]
    prompts = ["a photo of a red", "a photo of a dog", "a red a red a zebra", ""]
    said = node("answer(prompts.map((p) => remark_on(p, config, vocabulary)))", **locals())
    assert said[0] == said[3] == ""
    assert "“dog”" in said[1] and "Not read" not in said[1] and "photo" not in said[1]
    assert "Not read: “zebra”" in said[2] and "Not known" not in said[2]
    known = WORLD["pictures"]["vocabulary"]
    assert {"a", "3d", "octopus"} <= set(known) and "zebra" not in known


def test_emoji_have_prompts_of_their_own_and_other_data_their_first_captions():
    assert explore.offered("emoji-few", ["a kite"]) == explore.offered("emoji", [])
    offered = explore.offered("a-folder", [f"number {i % 20}" for i in range(40)])
    assert [one["prompt"] for one in offered] == [f"number {i}" for i in range(8)]


# Other sizes than the included one: tokens that are no multiple of 4, an odd number of text tokens, several patches.
SIZE = dict(channels=3, txt_dim=256, vec_dim=256)
SMALL = dict(width=48, heads=2, double=1, single=2, axes=[8, 4, 12], patch=2, **SIZE)
DEEP = dict(width=32, heads=4, double=3, single=1, axes=[2, 2, 4], patch=1, **SIZE)


def small_model(size: dict, **config) -> tuple[sample.Loaded, dict]:
    """A model in which no gate, bias or scale is at its initial zero or one, and how the page holds it."""
    network, generator = model.Denoiser(**size), torch.Generator().manual_seed(0)
    for name, p in network.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        p.data = noise / p.shape[1] ** 0.5 if p.dim() == 2 else 0.3 * noise + name.endswith("norm.scale")
    weights, rounded = explore.pack(network.state_dict())
    network.load_state_dict(rounded)
    config = {
        **WORLD["pictures"]["models"]["self_e"]["config"],
        "model": size,
        "side": 6,
        "txt_len": 5,
        "t_max": 0.9,
        **config,
    }
    text = encoders.text_encoder("words", config["txt_len"])
    full = {**config, "objective": "self_e"}
    loaded = sample.Loaded(network.eval().requires_grad_(False), full, text, encoders.autoencoder("pixels"))
    return loaded, {"config": config, "weights": weights}


def included(name: str = "self_e") -> tuple[sample.Loaded, dict]:
    """The included model with the page's weights, or (flow) one of its shape with flow matching's."""
    held = WORLD["pictures"]["models"][name]
    loaded = sample.load(explore.ROOT / WORLD["pictures"]["folder"], torch.device("cpu"))
    state, own = unpacked(held["weights"]), loaded.network.state_dict()
    loaded.network.load_state_dict({name: state[name].view_as(value) for name, value in own.items()})
    return loaded, held


@pytest.mark.parametrize("size", [SMALL, DEEP, None], ids=["small", "deep", "included"])
def test_the_network_answers_as_pytorchs(size):
    loaded, held = small_model(size) if size else included()
    side, prompts = loaded.config["side"], ["a photo of a red circle", "", "two squares left of a ring"]
    x_t = torch.randn(3, 3, side, side, generator=torch.Generator().manual_seed(1))
    t, s = torch.tensor([[1.0, 0.61, 0.02], [0.4, 0.61, 0.0]])
    with torch.no_grad():
        expected = loaded.network(x_t, t, s, *loaded.text(prompts))
    ours = node(
        """const { network, text } = await picture_model(held), out = [];
           for (let i = 0; i < t.length; i++) {
             out.push(await denoiser.velocity(network, Float32Array.from(x_t[i]), t[i], s[i], text(prompts[i])));
           }
           answer(out);""",
        **dict(held=held, x_t=x_t.flatten(1).tolist(), t=t.tolist(), s=s.tolist(), prompts=prompts),
    )
    difference = (torch.tensor(ours).view_as(expected) - expected).abs().amax((1, 2, 3))
    assert (difference < 1e-4 * expected.abs().amax((1, 2, 3))).all()


def alike(ours, expected: np.ndarray) -> None:
    """RGBA bytes of the page and a uint8 picture: equal but for rounding."""
    ours = np.array(ours).reshape(*expected.shape[:2], 4)
    assert (ours[..., 3] == 255).all()
    difference = np.abs(ours[..., :3] - expected.astype(int))
    assert difference.max() <= 1 and (difference == 0).mean() > 0.99, np.bincount(difference.ravel())


@pytest.mark.parametrize("space", ["v", "x0", None], ids=["v", "x0", "included"])
def test_pictures_are_those_of_sample_py(space):
    """Every choice of the sampler, and the noise of (seed, step)."""
    loaded, held = small_model(SMALL, guidance_space=space, mu=0.7) if space else included()
    runs = [
        dict(seed=11, steps=1, guidance=1, eta=1, s_rule=0),
        dict(seed=2**40, steps=3, guidance=3, eta=0, s_rule=0.5),
        dict(seed=0, steps=3, guidance=1.5, eta="renoise", s_rule=1),
    ]
    found = node(
        """const drawn = await picture_model(held), out = [];
           for (const choices of runs) {
             let last;
             for await (const frame of draw_picture(drawn, "a photo of a blue ring", choices)) last = frame;
             out.push(picture_bytes(last.x0_hat));
           }
           answer(out);""",
        **dict(held=held, runs=runs),
    )
    for choices, ours in zip(runs, found, strict=True):
        alike(ours, sample.generate(loaded, ["a photo of a blue ring"], [(0,)], **choices)[0])


# ------------------------------------------------------------------------------------------------------------
# What the page says and is made of
# ------------------------------------------------------------------------------------------------------------
def buttons(figure: str) -> dict[str, str]:
    """Of a section: the title of each button that sets something, and what it sets."""
    section = re.search(rf'<section id="{figure}".*?</section>', PAGE, re.S)[0]
    found = re.findall(r'<button type="button" data-set="([^"]*)"[^>]*>(.*?)</button>', section, re.S)
    return {title: text for text, title in found}


def promises(figure: str) -> dict[str, dict[str, str]]:
    """Of the buttons that promise numbers: what is promised, in the data attributes, and the text of the paragraph."""
    section = re.search(rf'<section id="{figure}".*?</section>', PAGE, re.S)[0]
    found = {}
    for button, title, text in re.findall(
        r"<p><button ([^>]*data-expect[^>]*)>(.*?)</button>(.*?)</p>", section, re.S
    ):
        told = dict(re.findall(r'data-(\w+)="([^"]*)"', button))
        found[title] = {"unlike": ""} | told | {"text": " ".join(text.split())}
    return found


def test_the_numbers_that_buttons_promise_stand_beside_them():
    for title, told in promises("follow").items():
        first, last, modes = told["expect"].split()
        numbers = [first, last, *(one.split()[-1] for one in told["unlike"].split(",") if one)]
        assert all(f"{number}%" in told["text"] for number in numbers), title
        if title in ("The blend dissolves", "The auxiliary term alone", "Labels wrong"):
            assert modes.replace("/", " / ") in told["text"], title
    ((title, told),) = promises("sampling").items()
    assert all(number in told["text"] for number in told["expect"].split())


def test_one_mode_is_left_only_where_one_is_likely():
    said = node(
        "answer(given.cases.map(([off, shares]) => verdict(off, shares)))",
        cases=[[5, [1, 0, 0]], [1, [0.995, 0.005, 0]], [1, [0.47, 0.32, 0.21]], [1, [0.9, 0.1, 0]]],
    )
    assert ["blend" in text for text in said] == [True, False, False, False]
    assert ["One mode" in text for text in said] == [False, True, False, False]
    assert "3 modes" in said[2] and "2 modes" in said[3]


SET = """const set = (name, allowed, text) => {
  figures[name] = { allowed };
  const start = Object.fromEntries(Object.entries(allowed).map(([key, [value]]) => [key, value]));
  return { ...start, ...parse_settings(name, text.replaceAll(" ", "&")) }; };"""


def test_what_the_page_says_of_a_step_is_so():
    found = node(
        f"""{SET} answer(texts.map((text) => {{
          const v = {{ set: set("step", STEP_SETTINGS, text), world }}, {{ c, k, t }} = v.set, state = state_of(v);
          const q = mixture(state.data), n = training_step(q, {{ ...state, c, answers: k < 1 ? model_samples(q, c, t) : [] }});
          return [norm(n.Delta), ...["x0_hat", "x_self", "x_renorm"].map((key) => off_by(q, n[key], c))]; }}));""",
        texts=list(buttons("step").values()),
    )
    for title, (Delta, x0_hat, x_self, x_renorm) in zip(buttons("step"), found, strict=True):
        assert x0_hat > 4, title  # a blend
        match title:
            case "Nothing to say" | "Silent at s = 0":
                assert Delta < 1e-3
            case "The auxiliary term" | "Back to the blend":
                assert Delta > 0.3 and x_self < 4
            case "Too much to say":
                assert x_self > 1.5 * x0_hat and x_renorm < 4
            case "One norm for all":
                assert x_renorm < 4 < x_self


@pytest.mark.slow
def test_what_the_page_says_of_following_the_target_is_so():
    """In percent: blends at the start and in the end, points per mode; and blends in the end with other settings."""
    told, texts, expected = promises("follow"), [], []
    assert told.keys() == buttons("follow").keys()
    for one in told.values():
        first, last, modes = one["expect"].split()
        texts.append(one["set"])
        expected.append([first, last, *modes.split("/")])
        for unlike in filter(None, one["unlike"].split(",")):
            *settings, last = unlike.split()
            texts.append(" ".join([one["set"], *settings]))
            expected.append([first, last])
    found = node(
        f"""{SET} answer(texts.map((text) => {{
          const run = start_run({{ set: set("follow", FOLLOW_SETTINGS, text), world }});
          const far = energy_distance(run.x0_hat, run.fresh);
          while (!finished(run)) one_round(run);
          const modes = mass_of(run.clean, run.x0_hat, run.set.c), end = energy_distance(run.x0_hat, run.fresh);
          return [[run.blends[0], run.blends.at(-1), ...modes].map((share) => 100 * share), end / far]; }}));""",
        texts=texts,
    )
    for text, numbers, (shares, farther) in zip(texts, expected, found, strict=True):
        close(shares[: len(numbers)], [*map(int, numbers)], 1)
        assert text != told["Without Eq. 19"]["set"] or farther > 4


@pytest.mark.slow
def test_what_the_page_says_of_sampling_is_so():
    texts = {"The problem": "steps=2 eta=0 c=3", "One step": "steps=1 eta=0 c=3"} | buttons("sampling")
    found = node(
        f"""{SET} const out = [], objectives = OBJECTIVES.map(({{ label }}) => label);
          for (const text of texts) {{
            const settings = set("sampling", SAMPLING_SETTINGS, text), runs = [];
            for (const label of objectives) runs.push(await sample_run(world, settings, label, settings.steps, () => {{}}));
            out.push(["blends", "energy", "mass_error"].map((key) => runs.map((run) => average(run, key))));
          }}
          answer(out);""",
        texts=list(texts.values()),
    )
    measured = dict(zip(texts, found, strict=True))
    (flow, _, self_e), *_ = measured["The problem"]
    assert 0.42 < flow < 0.58 and 0.15 < self_e < 0.25
    blends, distance, mass_error = measured["Two steps"]
    assert blends[2] < blends[1] < blends[0] and distance[2] > distance[0] and mass_error[2] > mass_error[0]
    assert (
        measured["Fresh noise"][0][2] > blends[2] + 0.1
        and measured["Fresh noise"][0][2] < measured["Fresh noise"][0][0]
    )
    for title in ("The control keeps up", "Nothing to gain"):
        assert abs(measured[title][0][1] - measured[title][0][2]) < 0.06
    assert measured["One step, s half-way"][0][2] < 0.6  # 0.73 at s = 0
    (flow, _, self_e), (guided, _, guided_self_e) = measured["One step"][1], measured["Guidance"][1]
    promised = promises("sampling")["Guidance"]["expect"].split()
    close([flow, guided, self_e, guided_self_e], [*map(float, promised)], 0.6e-3)
    assert max(measured["Fifty steps"][0]) < 0.05


def test_settings_of_an_address_are_read_and_foreign_ones_left_out():
    program = """figures.step = { allowed: STEP_SETTINGS };
        answer(texts.map((text) => parse_settings("step", text)));"""
    texts = [
        "layout=far&t=0.5&c=2&field=false&eps=1,-2",
        "layout=near&t=nine&c=7&other=1&eps=1&s=",
        "t=9&seed=2.6",
    ]
    found = node(program, texts=texts)
    assert found[0] == {"layout": "far", "t": 0.5, "c": 2, "field": False, "eps": [1, -2]}
    assert found[1:] == [{}, {"t": 1, "seed": 3}]


def test_the_same_sources_give_the_same_page(tmp_path):
    """If this fails: python -m toy.explore"""
    page = tmp_path / "page.html"
    shutil.copy(explore.PAGE, page)
    explore.build(page)
    assert page.read_bytes() == explore.PAGE.read_bytes()


def test_the_page_is_one_small_file_that_asks_for_nothing():
    assert len(PAGE.encode()) <= 5_000_000
    code = "".join((explore.FOLDER / name).read_text() for name in SCRIPTS)
    assert not re.search(r"</script|<!--|\bfetch\(|XMLHttpRequest|WebSocket|import\(|https:", code)
    links = re.findall(r"""(?:src|href)\s*=\s*["']?([^\s"'>$`]+)""", PAGE)
    assert {link for link in links if link[0] not in "#{"} == {"data:,", "https://arxiv.org/abs/2512.22374"}
    assert "@import" not in PAGE and "url(" not in PAGE


def test_what_is_told_by_colour_is_told_apart_without_red_green_vision():
    """CIE distances after the deuteranope's matrix of Machado et al. (2009), of the colours that stand together."""
    style = (explore.FOLDER / "style.css").read_text()
    deuteranope = np.array([[0.3673, 0.8606, -0.228], [0.2801, 0.6725, 0.0474], [-0.0118, 0.0429, 0.9689]])
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])

    def lab(colour: str) -> np.ndarray:
        rgb = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
        linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
        x, y, z = np.cbrt(xyz @ np.clip(deuteranope @ linear, 1e-4, 1) / [0.9505, 1, 1.089])
        return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])

    for scheme in re.findall(r":root \{(.*?)\}", style, re.S):
        colours = {name: lab(colour) for name, colour in re.findall(r"--([\w-]+): (#\w{6})", scheme)}
        for together in ("prompt-0 prompt-1 prompt-2 ink predict", "given predict judge target"):
            names = together.split()
            apart = [np.linalg.norm(colours[a] - colours[b]) for a in names for b in names if a < b]
            assert min(apart) > 15, together


@pytest.mark.parametrize(
    "flags, said",
    [(["--out", "README.md"], "not a page"), (["--pictures", "a", "b", "c"], "one folder or two")],
)
def test_what_cannot_be_done_is_refused_before_the_work(flags, said, monkeypatch, capsys):
    monkeypatch.chdir(explore.ROOT)
    monkeypatch.setattr(explore, "build", lambda *_, **__: pytest.fail("it began to work"))
    monkeypatch.setattr(sys, "argv", ["explore", *flags])
    with pytest.raises(SystemExit) as end:
        errors.run(explore.main)
    message = capsys.readouterr().err.strip()
    assert end.value.code == 2 and said in message and "\n" not in message
