"""The pictures of toy/explore.html: its JavaScript, in Node and in a browser, against the Python that it ports."""

import contextlib
import copy
import functools
import hashlib
import http.server
import json
import shutil
import subprocess
import threading
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import encoders
import model
import sample
import sampler
from engine.randomness import normal

ROOT = Path(__file__).parent.parent
EXPLORE, PAGE, LAPTOP = (
    ROOT / "toy" / "explore",
    ROOT / "toy" / "explore.html",
    ROOT / "checkpoints" / "laptop",
)
SOURCES = ("random.js", "words.js", "network.js", "pictures.js")
CPU = torch.device("cpu")


# --- Node ------------------------------------------------------------------------------------------------------------
def node(program: str, given=None):
    """What `program`, which runs after the page's sources, hands to answer(); typed arrays come back as lists."""
    if shutil.which("node") is None:
        pytest.skip("Node.js is not installed; it runs the page's JavaScript here")
    tools = """
        const fs = require("fs"), given = JSON.parse(fs.readFileSync(0, "utf8"));
        const bytes = (path) => new Uint8Array(fs.readFileSync(path)).buffer;
        const read = (folder) =>
          picture_model(fs.readFileSync(`${folder}/config.json`, "utf8"), bytes(`${folder}/model.safetensors`));
        const answer = (value) => console.log(
          JSON.stringify(value, (_, part) => (ArrayBuffer.isView(part) ? Array.from(part) : part)));
        """
    sources = "".join((EXPLORE / name).read_text(encoding="utf-8") for name in SOURCES)
    script = f"{sources}\n{tools}\n(async () => {{ {program} }})();"
    run = subprocess.run(["node", "-e", script], input=json.dumps(given), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_lines_are_short_and_the_sources_can_be_inlined():
    for path in [*(EXPLORE / name for name in SOURCES), EXPLORE / "pictures.css"]:
        text = path.read_text(encoding="utf-8")
        assert not [line for line in text.splitlines() if len(line) > 120], path
        assert "</script" not in text and "<!--" not in text


# --- random.js -------------------------------------------------------------------------------------------------------
def test_the_word_of_the_purpose_is_its_sha256():
    for purpose, (low, high) in node("answer(picture_random.PURPOSES)").items():
        assert low + (high << 32) == int.from_bytes(hashlib.sha256(purpose.encode()).digest()[:8], "little")


def test_noise_is_numpys_bit_for_bit():
    """Seeds of one and of two words; enough values for every branch of the ziggurat. Beyond 3.65 a library's log1p
    decides the last bit."""
    keys = [
        (seed, (k, i))
        for seed in (0, 1, 2**32 - 1, 2**32, 2**53 - 1)
        for k, i in ((0, 0), (8, 0), (3, 2**33))
    ]
    ours = node(
        "answer(given.map(([seed, key]) => picture_random.normal(seed, 'sampling', key, 4000)))", keys
    )
    ours = np.array(ours, np.float32)
    numpys = np.stack([normal(seed, "sampling", [key], (4000,))[0].numpy() for seed, key in keys])
    tail = np.abs(numpys) > 3.654
    assert 3 < tail.sum() < 60  # 15.5 expected
    assert np.array_equal(ours[~tail], numpys[~tail])
    np.testing.assert_array_max_ulp(ours[tail], numpys[tail], maxulp=2)


# --- words.js --------------------------------------------------------------------------------------------------------
PROMPTS = [
    "",
    "   ",
    "a photo of a red circle",
    "A red-hot café!",
    "cafe\u0301 ＦＵＬＬ　width",
    "猫と犬 ½ ① ﬁ",
    "tab\tnew\nline",
    "emoji 👩‍👩‍👧 ❤️ x",
    "İstanbul ΣΑΣ ẞ",
    "a\x1cb\x85c\ufeffd\u2028e\u200bf",
    "[`{|}~]^_\\",
    "\ud800 lone",
    "x" * 127,
    "x" * 128,
    "x" * 129,
    "é" * 300,
    " ".join(f"w{i}" for i in range(40)),
    "fake image a photo of a circle",
]


def random_prompts(n: int) -> list[str]:
    """Of characters that Unicode has had since 3.2, on whose lower case every program agrees."""
    random = np.random.default_rng(0)
    letters = [
        chr(c) for c in range(0x20000) if unicodedata.ucd_3_2_0.category(chr(c)) not in ("Cn", "Cs", "Co")
    ]
    return ["".join(random.choice(letters, random.integers(1, 20))) for _ in range(n)]


def test_prompts_become_pythons_words_and_vectors():
    prompts = PROMPTS + random_prompts(50)
    assert node("answer(given.map(picture_words.split_words))", prompts) == [
        *map(encoders.split_words, prompts)
    ]
    for txt_len in (4, 12):
        vectors = node(f"answer(given.map(picture_words.encoder({txt_len})))", prompts)
        tokens, pooled = encoders.text_encoder("words", txt_len)(prompts)
        assert torch.equal(torch.tensor([v["tokens"] for v in vectors]), tokens.flatten(1))
        assert torch.equal(torch.tensor([v["pooled"] for v in vectors]), pooled)


# --- network.js ------------------------------------------------------------------------------------------------------
# Other sizes than the shipped one: tokens that are no multiple of 4, an odd number of text tokens, several patches.
SMALL = dict(
    width=48, heads=2, double=1, single=2, axes=[8, 4, 12], channels=3, patch=2, txt_dim=256, vec_dim=256
)
DEEP = dict(
    width=32, heads=4, double=3, single=1, axes=[2, 2, 4], channels=3, patch=1, txt_dim=256, vec_dim=256
)


def save_model(folder: Path, size: dict, dtype=torch.float32, **changes) -> Path:
    """A checkpoint of that size in which no gate, bias or scale is at its initial zero or one."""
    network, generator = model.Denoiser(**size), torch.Generator().manual_seed(0)
    state = {}
    for name, p in network.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        state[name] = noise / p.shape[1] ** 0.5 if p.dim() == 2 else 0.3 * noise + name.endswith("norm.scale")
    folder.mkdir(parents=True)
    save_file(
        {name: value.to(dtype).contiguous() for name, value in state.items()}, folder / "model.safetensors"
    )
    config = json.loads((LAPTOP / "config.json").read_text()) | dict(model=size, side=6, txt_len=5) | changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    "size, dtype",
    [(SMALL, torch.float32), (SMALL, torch.float16), (DEEP, torch.bfloat16), (None, None)],
    ids=["fp32", "fp16", "bf16", "shipped"],
)
def test_the_network_answers_as_pytorchs(size, dtype, tmp_path):
    folder = save_model(tmp_path / "run", size, dtype) if size else LAPTOP
    loaded = sample.load(folder, CPU)
    side, prompts = (
        loaded.config["side"],
        ["a photo of a red circle", "", "two squares left of a ring and a cross"],
    )
    x_t = torch.randn(3, 3, side, side, generator=torch.Generator().manual_seed(1))
    t, s = torch.tensor([[1.0, 0.61, 0.02], [0.4, 0.61, 0.0]])
    with torch.no_grad():
        expected = loaded.network(x_t, t, s, *loaded.text(prompts))
    given = [str(folder), x_t.flatten(1).tolist(), t.tolist(), s.tolist(), prompts]
    ours = node(
        """const [folder, x_t, t, s, prompts] = given, { V, text } = read(folder), out = [];
           for (let i = 0; i < t.length; i++) {
             out.push(await picture_network.velocity(V, Float32Array.from(x_t[i]), t[i], s[i], text(prompts[i])));
           }
           answer(out);""",
        given,
    )
    difference = (torch.tensor(ours).view_as(expected) - expected).abs().amax((1, 2, 3))
    assert (difference < 1e-4 * expected.abs().amax((1, 2, 3))).all()


# --- pictures.js: the sampler ----------------------------------------------------------------------------------------
STEPWISE = [
    dict(steps=1, guidance=1, eta=1, s_rule=0),
    dict(steps=4, guidance=1.5, eta=1, s_rule=0),
    dict(steps=3, guidance=3, eta=0, s_rule=0.5),
    dict(steps=3, guidance=0, eta="renoise", s_rule=1),
    dict(steps=2, guidance=2, eta=0.5, s_rule=0),
]
DRAW = """const { folder, prompt, seed, runs } = given, drawn = read(folder), out = [];
  for (const choices of runs) {
    const frames = [];
    for await (const frame of picture_trajectory(drawn, prompt, { seed, ...choices })) frames.push(frame);
    out.push({ frames, bytes: picture_bytes(frames.at(-1).x0_hat) });
  }
  answer(out);"""


@pytest.mark.parametrize("space", ["v", "x0"])
def test_every_step_is_the_samplers(space, tmp_path):
    folder = save_model(tmp_path / "run", SMALL, guidance_space=space, mu=0.7)
    loaded, prompt, seed = sample.load(folder, CPU), "a photo of a blue ring", 11
    cond, null = loaded.text([prompt]), loaded.text([""])
    given = dict(folder=str(folder), prompt=prompt, seed=seed, runs=STEPWISE)
    for choices, ours in zip(STEPWISE, node(DRAW, given), strict=True):
        noise = lambda k: normal(seed, "sampling", [(k + 1, 0)], (3, 6, 6))  # noqa: E731
        path = [
            *sampler.trajectory(
                loaded.network, noise(-1), cond, null, draw_noise=noise, mu=0.7, space=space, **choices
            )
        ]
        seen = [noise(-1), *(x for _, x, _ in path[:-1])]
        times = sampler.time_grid(choices["steps"], 0.7)
        for k, frame in enumerate(ours["frames"]):
            told = times[k + 1] + choices["s_rule"] * (times[k] - times[k + 1])
            assert [frame["t"], frame["s"]] == pytest.approx([times[k], told], abs=1e-12)
            for name, expected in (("x_t", seen[k]), ("x0_hat", path[k][2])):
                value = torch.tensor(frame[name]).view_as(expected)
                assert (value - expected).abs().max() < 1e-4 * expected.abs().max(), (choices, k, name)
        assert len(ours["frames"]) == choices["steps"]


def alike(ours, expected: np.ndarray) -> None:
    """RGBA bytes of the page and a uint8 picture: equal but for rounding."""
    ours = np.array(ours).reshape(*expected.shape[:2], 4)
    assert (ours[..., 3] == 255).all()
    difference = np.abs(ours[..., :3] - expected.astype(int))
    assert difference.max() <= 1 and (difference == 0).mean() > 0.99, np.bincount(difference.ravel())


def test_the_shipped_model_draws_what_sample_py_draws():
    loaded, prompt, seed = sample.load(LAPTOP, CPU), "a photo of a red circle left of a blue square", 3
    runs = [
        dict(steps=n, **{name: loaded.config[name] for name in ("guidance", "eta", "s_rule")}) for n in (1, 4)
    ]
    for choices, ours in zip(runs, node(DRAW, dict(folder=str(LAPTOP), prompt=prompt, seed=seed, runs=runs))):
        alike(ours["bytes"], sample.generate(loaded, [prompt], [(0,)], seed=seed, steps=choices["steps"])[0])


# --- Files that do not fit -------------------------------------------------------------------------------------------
def test_files_that_do_not_fit_are_refused_in_one_line(tmp_path):
    folder = save_model(tmp_path / "run", SMALL)
    config, weights = (
        json.loads((folder / "config.json").read_text()),
        (folder / "model.safetensors").read_bytes(),
    )
    save_file({"x": torch.zeros(2, dtype=torch.float64)}, tmp_path / "double")
    save_file({"x": torch.zeros(2)}, tmp_path / "other")
    save_file(sample.load(folder, CPU).network.state_dict() | {"x": torch.zeros(2)}, tmp_path / "more")
    without = {name: value for name, value in config.items() if name != "mu"}
    wider = copy.deepcopy(config)
    wider["model"]["txt_dim"] = 300
    cases = {
        "not valid JSON": ("{", weights),
        "config.json: model": ("3", weights),
        "mu must be": (without, weights),
        "objective must be self_e": (config | {"objective": "imm"}, weights),
        "text_encoder must be words": (config | {"text_encoder": "flux"}, weights),
        "autoencoder must be pixels": (config | {"autoencoder": "flux"}, weights),
        "multiple of patch": (config | {"side": 7}, weights),
        "txt_in.weight is not [48,300]": (wider, weights),
        "truncated or not a safetensors file": (config, b"hello, this is text and no model"),
        "truncated at": (config, weights[:-100]),
        "or not a": (config, weights[:50]),
        "holds F64": (config, "double"),
        "is not the model of this config.json": (config, "other"),
        "x is unknown": (config, "more"),
    }
    given = []
    for i, (text, content) in enumerate(cases.values()):
        path = tmp_path / (content if isinstance(content, str) else f"case{i}")
        if isinstance(content, bytes):
            path.write_bytes(content)
        given.append([text if isinstance(text, str) else json.dumps(text), str(path)])
    said = node(
        """answer(given.map(([text, path]) => {
             try { picture_model(text, bytes(path)); return "nothing"; }
             catch (error) { return error instanceof PictureError ? error.message : `a defect: ${error}`; }
           }));""",
        given,
    )
    for expected, message in zip(cases, said, strict=True):
        assert expected in message and "\n" not in message, (expected, message)


def test_broken_numbers_do_not_become_a_picture(tmp_path):
    folder = save_model(tmp_path / "run", SMALL)
    loaded = sample.load(folder, CPU).network.state_dict()
    loaded["img_in.bias"][0] = torch.inf
    save_file({name: value.half() for name, value in loaded.items()}, folder / "model.safetensors")
    said = node(
        """try { for await (const _ of picture_trajectory(read(given), "x", { seed: 0, steps: 1, guidance: 1, eta: 1,
             s_rule: 0 })) answer("a picture"); } catch (error) { answer(error.message); }""",
        str(folder),
    )
    assert "no number" in said


# --- The browser -----------------------------------------------------------------------------------------------------
ARGUMENTS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
CANVAS = """(canvas) =>
    Array.from(canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data)"""


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed; it drives the browser"
    )
    if (chromium := shutil.which("chromium")) is None:
        pytest.skip("chromium is not installed")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=list(ARGUMENTS))
        yield browser
        browser.close()


def build_page(file: Path) -> None:
    """toy/explore.html; as long as it does not exist, the least page that mounts the pictures."""
    file.parent.mkdir(parents=True)
    if PAGE.exists():
        shutil.copy(PAGE, file)
        return
    scripts = "".join(
        f"<script>\n{(EXPLORE / name).read_text(encoding='utf-8')}</script>\n" for name in SOURCES
    )
    file.write_text(
        f"""<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>Pictures</title>
        <meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">
        <style>* {{ box-sizing: border-box }} [hidden] {{ display: none !important }}
        {(EXPLORE / "pictures.css").read_text(encoding="utf-8")}</style></head>
        <body><button onclick="mountPictures(document.querySelector('#pictures'))">Pictures</button>
        <section id="pictures"></section>{scripts}</body></html>""",
        encoding="utf-8",
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder like the repository's: the page and the shipped model."""
    root = tmp_path_factory.mktemp("served")
    build_page(root / "toy" / "explore.html")
    shutil.copytree(LAPTOP, root / "checkpoints" / "laptop")
    return root


@contextlib.contextmanager
def served(folder: Path):
    """The address at which a folder is served, by what `python -m http.server` is."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Quiet, directory=folder)
    ) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


@contextlib.contextmanager
def opened(browser, address: str, **settings):
    """(page, what went wrong, what was asked for) of a page that is open on its first view."""
    context = browser.new_context(**settings)
    page, errors, requests = context.new_page(), [], []
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(address)
    try:
        yield page, errors, requests
    finally:
        context.close()


def wait_until_drawn(page, prompt: str, seed: int) -> None:
    page.wait_for_function(
        "(text) => document.querySelector('.picture-state').textContent === text",
        timeout=120_000,
        arg=f'Drawn: "{prompt}", seed {seed}.',
    )


def compare(page, loaded, prompt: str, seed: int, **choices) -> None:
    """The four columns of the page are sample.py's pictures."""
    for steps in (1, 2, 4, 8):
        expected = sample.generate(loaded, [prompt], [(0,)], seed=seed, steps=steps, **choices)[0]
        canvas = page.locator(f"canvas[data-steps='{steps}']")
        alike(canvas.evaluate(CANVAS), expected)
        assert canvas.get_attribute("aria-label") == f"{prompt}, {steps} step{'s' if steps > 1 else ''}"


@pytest.mark.slow
def test_a_prompt_gives_the_picture_of_sample_py(browser, folder):
    loaded = sample.load(LAPTOP, CPU)
    with (
        served(folder) as address,
        opened(browser, f"{address}/toy/explore.html") as (page, errors, requests),
    ):
        view = page.locator("#pictures")
        assert not [url for url in requests if "checkpoints" in url]  # nothing before the view is opened
        page.get_by_text("Pictures", exact=True).click()
        wait_until_drawn(page, "a photo of a red circle", 0)
        compare(page, loaded, "a photo of a red circle", 0)
        view.get_by_label("Prompt", exact=True).fill("Three pink rings; a zebra?")
        view.get_by_label("Seed", exact=True).fill("12345678901")
        view.get_by_label("Guidance w").fill("3")
        view.get_by_label("Second time s").select_option("0.5")
        view.get_by_label("Fresh noise eta").select_option("renoise")
        view.get_by_role("button", name="Draw").click()
        wait_until_drawn(page, "Three pink rings; a zebra?", 12345678901)
        compare(
            page, loaded, "Three pink rings; a zebra?", 12345678901, guidance=3, s_rule=0.5, eta="renoise"
        )
        assert not errors


@pytest.mark.slow
def test_keys_are_enough_and_the_film_shows_every_step(browser, folder):
    with served(folder) as address, opened(browser, f"{address}/toy/explore.html") as (page, errors, _):
        view = page.locator("#pictures")
        page.get_by_text("Pictures", exact=True).focus()
        page.keyboard.press("Enter")
        wait_until_drawn(page, "a photo of a red circle", 0)
        assert page.locator(".picture-film li").count() == 4
        view.get_by_label("Prompt", exact=True).focus()
        page.keyboard.press("Tab")  # to Draw, then to the first of the prompts, then to the second
        page.keyboard.press("Tab")
        page.keyboard.press("Tab")
        page.keyboard.press("Enter")
        wait_until_drawn(page, "a photo of a yellow ring", 0)
        while "8 steps" not in page.evaluate("document.activeElement.textContent"):
            page.keyboard.press("Tab")
        page.keyboard.press(" ")
        assert page.locator(".picture-columns [aria-pressed=true]").inner_text().split("\n")[0] == "8 steps"
        film = page.locator(".picture-film li")
        assert (
            film.count() == 8
            and "t\xa0=\xa01.00" in film.first.inner_text()
            and "0.00" in film.last.inner_text()
        )
        last = film.last.locator("canvas").last.evaluate(CANVAS)
        assert last == page.locator("canvas[data-steps='8']").evaluate(
            CANVAS
        )  # the last x0_hat is the picture
        assert not errors


@pytest.mark.slow
def test_the_page_stays_alive_and_a_newer_drawing_stops_an_older_one(browser, folder):
    with served(folder) as address, opened(browser, f"{address}/toy/explore.html") as (page, errors, _):
        view = page.locator("#pictures")
        page.get_by_text("Pictures", exact=True).click()
        wait_until_drawn(page, "a photo of a red circle", 0)
        page.evaluate("window.turns = 0; (function turn() { turns += 1; requestAnimationFrame(turn); })();")
        view.get_by_role("button", name="Next seed").click()
        wait_until_drawn(page, "a photo of a red circle", 1)
        assert page.evaluate("turns") > 30  # more frames than evaluations of the network
        page.evaluate("""window.said = []; new MutationObserver(() =>
            said.push(document.querySelector(".picture-state").textContent)).observe(
            document.querySelector(".picture-state"), { childList: true });""")
        view.get_by_role("button", name="a green dog").click()
        view.get_by_role("button", name="a yellow ring").click()
        wait_until_drawn(page, "a photo of a yellow ring", 1)
        said = page.evaluate("said")
        assert any("Drawing" in text and "dog" in text for text in said)
        assert not any("Drawn" in text and "dog" in text for text in said)
        labels = page.locator(".picture-columns canvas").evaluate_all("all => all.map((c) => c.ariaLabel)")
        assert all(label.startswith("a photo of a yellow ring") for label in labels)
        assert not errors


@pytest.mark.slow
def test_a_page_opened_as_a_file_says_what_to_do_and_takes_the_files(browser, folder, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"this is no model")
    files = [folder / "checkpoints" / "laptop" / name for name in ("config.json", "model.safetensors")]
    with opened(browser, (folder / "toy" / "explore.html").as_uri()) as (page, errors, requests):
        view = page.locator("#pictures")
        page.get_by_text("Pictures", exact=True).click()
        assert "python -m http.server" in page.locator(".picture-state").inner_text()
        picker, alert = view.get_by_label("model.safetensors and config.json"), page.locator(".picture-error")
        picker.set_input_files(files[:1])
        alert.get_by_text("choose both files at once").wait_for()
        picker.set_input_files([files[0], tmp_path / "model.safetensors"])
        alert.get_by_text("not a safetensors file").wait_for()
        assert "python -m http.server" in page.locator(".picture-state").inner_text()
        picker.set_input_files(files)
        wait_until_drawn(page, "a photo of a red circle", 0)
        assert alert.is_hidden()
        compare(page, sample.load(LAPTOP, CPU), "a photo of a red circle", 0)
        assert not errors and len(requests) == 1


@pytest.mark.slow
def test_a_missing_model_is_one_clear_line(browser, folder, tmp_path):
    shutil.copytree(folder / "toy", tmp_path / "toy")
    with served(tmp_path) as address, opened(browser, f"{address}/toy/explore.html") as (page, _, _):
        view = page.locator("#pictures")
        page.get_by_text("Pictures", exact=True).click()
        alert = page.locator(".picture-error")
        alert.get_by_text("checkpoints/laptop").wait_for()
        assert "404" in alert.inner_text() and "\n" not in alert.inner_text().strip()
        assert "choose both files" in page.locator(".picture-state").inner_text()
        assert view.get_by_label("model.safetensors and config.json").is_visible()


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_reads_on_a_phone(scheme, browser, folder):
    settings = dict(viewport={"width": 360, "height": 740}, color_scheme=scheme)
    with (
        served(folder) as address,
        opened(browser, f"{address}/toy/explore.html", **settings) as (page, errors, _),
    ):
        page.get_by_text("Pictures", exact=True).click()
        wait_until_drawn(page, "a photo of a red circle", 0)
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        for canvas in page.locator("#pictures canvas").all():
            assert canvas.bounding_box()["width"] > 60
        assert not errors
