"""The page toy/explore.html: its mathematics against the Python, what it is made of, and itself in a real browser.

The first part runs the page's scripts in Node.js and is skipped where `node` is missing. The last part (slow) needs
Chromium from the distribution and Playwright (requirements-browser.txt), and is skipped without them.
"""

import base64
import contextlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import losses
import sampler
from engine import errors
from toy import explore, ideal, measures
from toy.mixture import LAYOUTS, Mixture
from toy.training import Net

PAGE = explore.PAGE.read_text(encoding="utf-8")
SCRIPTS = dict(re.findall(r'<script data-source="([\w.]+)">\n(.*?)\n</script>', PAGE, re.S))
LIBRARIES = dict(re.findall(r'<script data-library="([\w. -]+)">\n(.*?)\n</script>', PAGE, re.S))
MATHEMATICS = ("mixture.js", "method.js", "toynet.js")
WORLD = explore.embedded(explore.PAGE)
DOUBLE = {"dtype": torch.float64}


def node(expression: str, **given):
    """The value of a JavaScript expression that sees the page's mathematics, WORLD and the names of `given`."""
    if shutil.which("node") is None:
        pytest.skip("Node.js is not installed: the page's mathematics is not run")
    program = [(explore.FOLDER / name).read_text() for name in MATHEMATICS]
    given |= {"WORLD": WORLD} if "WORLD" in expression else {}
    program += [f"const {name} = {json.dumps(value)};" for name, value in given.items()]
    program.append(f"process.stdout.write(JSON.stringify({expression}));")
    done = subprocess.run(["node", "-"], input="\n".join(program), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def close(found, expected, bound=1e-6):
    assert np.abs(np.asarray(found, dtype=float) - np.asarray(expected)).max() <= bound


def draw(q: Mixture, n: int = 60, seed: int = 0):
    """Random x [n, 2], t [n], c [n] with the ends of [0, 1] and the null prompt among them."""
    g = np.random.default_rng(seed)
    t = g.random(n)
    t[:4] = 0, 1, 1e-3, 1 - 1e-3
    return tuple(torch.from_numpy(a) for a in (2 * g.standard_normal((n, 2)), t, g.integers(0, q.C + 1, n)))


# ------------------------------------------------------------------------------------------------------------
# The mathematics, in Node.js
# ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_closed_form_is_that_of_the_mixture(layout):
    q = Mixture(**LAYOUTS[layout], **DOUBLE)
    x, t, c = draw(q)
    found = node(
        "x.map((point, n) => [posterior_mean(q, point, t[n], c[n]), log_density(q, point, t[n], c[n])])".replace(
            "q,", f"mixture(WORLD.layouts.{layout}),"
        ),
        x=x.tolist(),
        t=t.tolist(),
        c=c.tolist(),
    )
    close([mean for mean, _ in found], q.posterior_mean(x, t, c))
    close([log for _, log in found], q.log_density(x, t, c), 1e-5)  # of the size of 1000, where t is near 0


def test_what_is_said_of_samples_is_what_measures_say():
    q = Mixture(**LAYOUTS["between"], **DOUBLE)
    g = np.random.default_rng(1)
    x, y = q.sample(torch.ones(80, dtype=torch.int64), g), q.sample(torch.full((90,), 3), g)
    near = node(
        "[energy_distance(x, y), y.map((p) => off_by(mixture(WORLD.layouts.between), p, 1)),"
        " y.map((p) => nearest_mode(mixture(WORLD.layouts.between), p, 1))]",
        x=x.tolist(),
        y=y.tolist(),
    )
    distance = torch.cdist(y, q.means[1]) / 0.12
    close(near[0], measures.energy_distance(x, y))
    close(near[1], distance.min(1).values)
    assert near[2] == distance.argmin(1).tolist()
    assert "OFF_MODES = 4;" in SCRIPTS["paths.js"]
    assert "distance.min(1).values > 4" in Path(measures.__file__).read_text()


def step_in_python(q: Mixture, given: dict) -> dict:
    """The quantities of one training step by the functions of losses.py; given as for training_step of method.js."""
    row = lambda value: torch.tensor([value], **DOUBLE)  # noqa: E731
    x0, x_t, eps_s, t, s = (row(given[name]) for name in ("x0", "x_t", "eps_s", "t", "s"))
    c = torch.tensor([given["c"]])
    x0_hat = losses.one_step_estimate(x_t, t, q.V(x_t, t, s, c))
    x_s_hat = losses.add_noise(x0_hat, s, eps_s)
    G_c, G_null = (q.posterior_mean(x_s_hat, s, prompt) for prompt in (c, q.null(c)))
    answers = torch.cat([x0_hat, torch.tensor(given["answers"], **DOUBLE)])
    G_fake = ideal.mean_of_answers(x_s_hat[None], given["s"], answers[None])[0] if given["k"] < 1 else None
    Delta = losses.self_evaluation(G_null, G_c, G_fake, given["k"])
    x_self, mix = losses.pseudo_target(x0_hat, Delta), losses.mix_weight(t, s)
    x_tar = losses.implicit_target(x0, x_self, mix)
    x_renorm = losses.renormalise(x_tar, x0)
    loss = losses.time_weight(t) * losses.target_loss(x0_hat, x_renorm)
    eps = (x_t - (1 - t) * x0) / t
    made = dict(
        x0=x0,
        eps=eps,
        x_t=x_t,
        x0_hat=x0_hat,
        x_s_hat=x_s_hat,
        G_c=G_c,
        G_null=G_null,
        Delta=Delta,
        x_self=x_self,
        mix=mix,
        x_tar=x_tar,
        x_renorm=x_renorm,
        loss=loss,
    )
    made |= {"G_fake": G_fake} if G_fake is not None else {}
    made |= {"lambda": losses.lam(t, s)} if given["t"] < 1 else {}
    return {name: value[0].numpy() for name, value in made.items()}


def test_a_training_step_is_that_of_losses():
    q, g, steps = Mixture(**LAYOUTS["between"], **DOUBLE), np.random.default_rng(2), []
    times = (
        (0.8, 0.3, 1.0),
        (0.8, 0.3, 0.9),
        (0.5, 0.5, 0.0),
        (1.0, 0.4, 0.5),
        (0.9, 0.0, 1.0),
        (0.3, 0.1, 0.2),
    )
    for t, s, k in times:
        points = {name: g.standard_normal(2).tolist() for name in ("x0", "x_t", "eps_s")}
        answers = g.standard_normal((7, 2)).tolist()
        steps.append({**points, "t": t, "s": s, "k": k, "c": int(g.integers(3)), "answers": answers})
    found = node("steps.map((given) => training_step(mixture(WORLD.layouts.between), given))", steps=steps)
    for given, numbers in zip(steps, found):
        for name, value in step_in_python(q, given).items():
            close(numbers[name], value)
    silent = found[4]
    assert silent["Delta"] == pytest.approx([0, 0], abs=1e-12) and silent["G_fake"] is None


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0, "renoise"])
def test_a_trajectory_is_that_of_the_sampler(eta):
    """With a network that listens to t, s and the prompt, in guided and unguided steps."""
    g, steps, n = np.random.default_rng(3), 5, 6
    x, noise = g.standard_normal((n, 2)), g.standard_normal((steps, n, 2))

    def V(x, t, s, c):
        return x * (1 + c[:, None]) + torch.stack([(t - 2 * s), t * s * (c - 1.5)], dim=1)

    network = "(x, t, s, c) => x.map(([u, w]) => [u * (1 + c) + t - 2 * s, w * (1 + c) + t * s * (c - 1.5)])"
    for choices in (dict(s_rule=0.0, guidance=1.0, mu=0.0), dict(s_rule=0.3, guidance=2.5, mu=0.4)):
        told = json.dumps({"steps": steps, "eta": eta, **choices})
        found = node(
            f"[...trajectory({network}, x, 1, 3, {{...{told}, draw_noise: (k) => noise[k]}})]",
            x=x.tolist(),
            noise=noise.tolist(),
        )
        cond, null = (torch.full((n,), c) for c in (1, 3))
        expected = sampler.trajectory(
            V,
            torch.from_numpy(x),
            (cond,),
            (null,),
            steps=steps,
            eta=eta,
            draw_noise=lambda k: torch.from_numpy(noise[k]),
            **choices,
        )
        for step, (t, x_t, x0_hat) in zip(found, expected, strict=True):
            close(step["t"], t)
            close(step["x"], x_t)
            close(step["x0_hat"], x0_hat)


def toy_net(layout: str, label: str) -> Net:
    """The network of the page in PyTorch, from the weights that the page holds."""
    numbers = np.frombuffer(base64.b64decode(WORLD["networks"]["weights"][layout][label]), dtype="<f2")
    net, at, state = Net([0], 3), 0, {}
    for name, (rows, columns) in WORLD["networks"]["shapes"].items():
        values = torch.from_numpy(numbers[at : at + rows * columns].astype(np.float32))
        state[name] = values.view(net.state_dict()[name].shape)
        at += rows * columns
    assert at == len(numbers)
    net.load_state_dict(state)
    return net.requires_grad_(False)


def test_the_networks_are_those_of_pytorch():
    x = np.random.default_rng(4).standard_normal((20, 2)).astype(np.float32)
    asked = [(t, s, c) for t, s in ((1.0, 0.0), (0.7, 0.7), (0.31, 0.02)) for c in range(4)]
    which = [(layout, label) for layout in LAYOUTS for label in explore.OBJECTIVES]
    found = node(
        "which.map(([layout, label]) => { const { weights, shapes } = WORLD.networks;"
        " const V = toy_network(unpack(weights[layout][label], shapes));"
        " return asked.map(([t, s, c]) => V(x, t, s, c)); })",
        x=x.tolist(),
        asked=asked,
        which=which,
    )
    for (layout, label), answers in zip(which, found, strict=True):
        net = toy_net(layout, label)
        for (t, s, c), velocities in zip(asked, answers, strict=True):
            times = [torch.full((20,), value) for value in (t, s)]
            close(velocities, net(torch.from_numpy(x), *times, torch.full((20,), c)), 1e-5)


def test_half_precision_is_read_right():
    bits = [0, 1, 0x3FF, 0x400, 0x3C00, 0xBC01, 0x7BFF, 0x8001]
    close(
        node("bits.map(half)", bits=bits), np.array(bits, dtype=np.uint16).view(np.float16).astype(float), 0
    )


# ------------------------------------------------------------------------------------------------------------
# What the page is made of
# ------------------------------------------------------------------------------------------------------------
def test_the_page_holds_the_present_sources():
    """If this fails: python toy/explore.py --no-open"""
    assert tuple(SCRIPTS) == explore.SOURCES
    for name, text in SCRIPTS.items():
        assert text == (explore.FOLDER / name).read_text().rstrip(), (
            f"{name} changed: run python toy/explore.py"
        )
    assert all((explore.FOLDER / name).read_text().rstrip() in PAGE for name in explore.STYLES)
    for part in re.split(r"\{\{\w+\}\}", (explore.FOLDER / "template.html").read_text()):
        assert part in PAGE


def test_the_page_holds_the_layouts_and_says_where_its_networks_come_from():
    for name, layout in LAYOUTS.items():
        q, kept = Mixture(**layout, **DOUBLE), WORLD["layouts"][name]
        close(kept["means"], q.means, 0)
        close(kept["weights"], q.weights, 0)
        close(kept["std"], q.std, 1e-8)
    made_by = WORLD["networks"]["provenance"]
    assert made_by["command"] == "python toy/explore.py" and made_by["seed"] == explore.SEED
    assert made_by["commit"] and made_by["hardware"] and made_by["date"]


def test_the_page_is_small_and_asks_the_network_for_nothing():
    assert len(PAGE.encode()) < 1_500_000
    page = re.sub(r"<script.*?</script>", "", PAGE, flags=re.S)
    assert all(
        value.startswith("data:") for value in re.findall(r"""(?:src|href)\s*=\s*["']?([^\s"'>]+)""", page)
    )
    assert not re.search(r"<script[^>]*\bsrc\b", PAGE)
    code = "".join(SCRIPTS.values())
    assert not re.search(r"XMLHttpRequest|WebSocket|import\(|@import|url\((?!#)|https:", code)
    # The pictures' model, from beside the page and only once its tab is shown (tests/test_explore_pictures.py).
    assert re.findall(r"fetch\((.*)\);", code) == ["FOLDER + name"] and 'FOLDER = "../checkpoints/' in code
    addresses = set(re.findall(r"https?://[\w.]+", PAGE)) - {
        "http://localhost"
    }  # the last is named to the reader
    assert addresses <= {"https://d3js.org", "http://www.w3.org"}, (
        addresses
    )  # comments and names of XML, not requests


def test_libraries_are_pinned_and_keep_their_licences():
    assert list(LIBRARIES) == [f"{name} {version}" for name, version in explore.LIBRARIES.items()]
    for name, text in LIBRARIES.items():
        version = name.split()[1]
        assert "Permission to use, copy, modify" in text and "Copyright" in text and f"v{version} " in text, (
            name
        )


def test_the_same_sources_and_networks_give_the_same_page(tmp_path, monkeypatch):
    """Built again from the parts that the page itself holds, byte for byte; so nothing else goes in."""

    def library(name: str, text: str) -> tuple[str, str]:
        licence, code = re.fullmatch(rf"/\*\n{name} [\d.]+\n\n(.*?)\n\*/\n(.*)", text, re.S).groups()
        return licence, code

    parts = {title.split()[0]: library(title.split()[0], text) for title, text in LIBRARIES.items()}
    monkeypatch.setattr(explore, "libraries", lambda: parts)
    monkeypatch.setattr(explore, "recipe", lambda: WORLD["networks"]["recipe"])
    page = tmp_path / "page.html"
    page.write_text(PAGE, encoding="utf-8")
    explore.build(page)
    assert page.read_bytes() == explore.PAGE.read_bytes()


def test_without_npm_it_is_one_line_and_exit_2(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(explore, "ROOT", tmp_path)  # nothing kept in runs/explore
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["explore.py", "--out", str(tmp_path / "page.html")])
    with pytest.raises(SystemExit) as end:
        errors.run(explore.main)
    said = capsys.readouterr().err.strip()
    assert end.value.code == 2 and "npm" in said and len(said.splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("bad", [".", "no/such/folder/page.html"])
def test_a_place_that_cannot_be_written_is_refused_before_the_work(bad, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(explore, "build", lambda page: pytest.fail("it began to work"))
    monkeypatch.setattr(sys, "argv", ["explore.py", "--out", bad])
    with pytest.raises(SystemExit) as end:
        errors.run(explore.main)
    said = capsys.readouterr().err.strip()
    assert end.value.code == 2 and "--out" in said and len(said.splitlines()) == 1


def test_a_script_that_would_end_its_element_is_refused():
    with pytest.raises(ValueError, match="would end"):
        explore.script("const text = '</script>';", source="a.js")


# ------------------------------------------------------------------------------------------------------------
# The page in a real browser
# ------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def browser():
    pytest.importorskip("playwright", reason="pip install -r requirements-browser.txt")
    if not any(map(shutil.which, explore.CHROMIUM)):
        pytest.skip("no Chromium: install the distribution's package `chromium`")
    with explore.chromium() as browser:
        yield browser


@pytest.fixture
def tab(browser):
    """The page, open. Afterwards: nothing complained, and nothing but the page itself was asked for."""
    tab, wrong = browser.new_page(viewport={"width": 1240, "height": 1000}), []
    tab.on(
        "console",
        lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None,
    )
    tab.on("pageerror", lambda error: wrong.append(str(error)))
    tab.on(
        "request",
        lambda request: wrong.append(request.url) if not request.url.startswith(("data:", url)) else None,
    )
    url = explore.PAGE.as_uri()
    tab.goto(url)
    tab.wait_for_function("plane.n !== null")
    yield tab
    tab.close()
    assert not wrong


def settle(tab) -> None:
    """Wait until what was asked for is drawn."""
    tab.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")


def numbers(tab) -> dict:
    """The table of numbers as it is shown."""
    read = {}
    for key in tab.evaluate("QUANTITIES.map(({key}) => key)"):
        text = tab.inner_text(f"#number-{key}")
        if text not in ("off", "infinite"):
            read[key] = np.array([float(part) for part in text.strip("()").split(",")])
    return read


def check_against_python(tab) -> dict:
    """The numbers that are shown are those of losses.py for the points that are shown."""
    shown = numbers(tab)
    given = tab.evaluate("(({t, s, k, c, eps_s, answers}) => ({t, s, k, c, eps_s, answers}))(plane)")
    layout = tab.input_value("#layout")
    assert given["t"] == float(tab.input_value("#t")) and given["c"] == int(tab.input_value("#prompt"))
    given |= {name: shown[name].tolist() for name in ("x0", "x_t")}
    expected = step_in_python(Mixture(**LAYOUTS[layout], **DOUBLE), given)
    assert expected.keys() == shown.keys()
    for name, value in expected.items():
        close(shown[name], value, 0.6e-4)
    return shown


def drag(tab, key: str, dx: float, dy: float) -> None:
    box = tab.locator(f"#handle-{key} circle").bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    tab.mouse.move(x, y)
    tab.mouse.down()
    tab.mouse.move(x + dx, y + dy, steps=5)
    tab.mouse.up()
    settle(tab)


@pytest.mark.slow
def test_dragging_gives_the_numbers_of_python(tab):
    before = check_against_python(tab)
    drag(tab, "x_t", 90, -60)
    after = check_against_python(tab)
    assert after["x_t"][0] > before["x_t"][0] + 0.3 and after["x_t"][1] > before["x_t"][1] + 0.2
    assert not np.allclose(after["x0_hat"], before["x0_hat"]) and np.array_equal(after["x0"], before["x0"])
    drag(tab, "x0", 40, 30)
    assert not np.allclose(check_against_python(tab)["x0"], after["x0"])
    tab.click("#parts button:nth-child(6)")
    drag(tab, "x_s_hat", 60, -40)
    moved = check_against_python(tab)
    assert not np.allclose(moved["Delta"], after["Delta"]) and np.array_equal(moved["x_t"], after["x_t"])


@pytest.mark.slow
@pytest.mark.parametrize("example", range(6))
def test_each_example_gives_the_numbers_of_python(tab, example):
    tab.click(f"#tries button:nth-child({example + 1})")
    settle(tab)
    shown = check_against_python(tab)
    assert tab.inner_text("#hint")
    title = tab.inner_text(f"#tries button:nth-child({example + 1})")
    if title in ("Nothing to say", "Silent at s = 0"):
        assert np.abs(shown["Delta"]).max() < 1e-2
    else:
        assert np.abs(shown["Delta"]).max() > 0.05, title


@pytest.mark.slow
def test_s_never_exceeds_t(tab):
    tab.fill("#s", "0.7")
    tab.fill("#t", "0.4")
    settle(tab)
    assert float(tab.input_value("#s")) == 0.4 and tab.inner_text("#s-value") == "0.40"
    check_against_python(tab)
    tab.fill("#s", "0.9")
    settle(tab)
    assert float(tab.input_value("#s")) == 0.4 and numbers(tab)["mix"] == 0


@pytest.mark.slow
def test_next_and_back_go_through_the_step_and_every_quantity_has_its_part(tab):
    parts, sentences = len(tab.query_selector_all("#parts button")), []
    assert tab.is_disabled("#back")
    for part in range(1, parts + 1):
        settle(tab)
        assert tab.inner_text("#part-title").startswith(f"{part}. ")
        sentences.append(tab.inner_text("#say"))
        assert tab.locator("#numbers tr.now").count() >= 1
        if part < parts:
            tab.click("#next")
    assert (
        len(set(sentences)) == parts
        and tab.is_disabled("#next")
        and not tab.locator("#numbers tr.later").count()
    )
    for part in range(parts - 1, 0, -1):
        tab.click("#back")
        settle(tab)
        assert (
            tab.inner_text("#part-title").startswith(f"{part}. ")
            and tab.inner_text("#say") == sentences[part - 1]
        )


@pytest.mark.slow
def test_everything_can_be_done_with_the_keyboard(tab):
    before = numbers(tab)["x_t"]
    tab.focus("#handle-x_t")
    for key in ("ArrowRight", "ArrowRight", "ArrowUp", "Shift+ArrowDown"):
        tab.keyboard.press(key)
    settle(tab)
    close(check_against_python(tab)["x_t"] - before, [0.1, 0.04], 1e-9)
    tab.focus("#t")
    tab.keyboard.press("ArrowLeft")
    tab.focus("#next")
    tab.keyboard.press("Enter")
    settle(tab)
    assert tab.inner_text("#t-value") == "0.89" and tab.inner_text("#part-title").startswith("2.")
    tab.focus("#tab-step")
    tab.keyboard.press("ArrowRight")
    assert tab.is_visible("#sampling") and not tab.is_visible("#step")
    assert tab.evaluate("document.activeElement.id") == "tab-sampling"
    missing = "[...document.querySelectorAll('input, select')].filter((e) => !e.labels.length && !e.ariaLabel).length"
    assert tab.evaluate(missing) == 0


@pytest.mark.slow
@pytest.mark.parametrize("width", [360, 400])
def test_it_fits_a_phone(tab, width):
    tab.set_viewport_size({"width": width, "height": 740})
    for name in ("step", "sampling"):
        tab.click(f"#tab-{name}")
        settle(tab)
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        sizes = (
            "[...document.querySelectorAll('main *')].filter((e) => e.offsetParent && !e.childElementCount &&"
            " e.textContent.trim()).map((e) => parseFloat(getComputedStyle(e).fontSize))"
        )
        assert min(tab.evaluate(sizes)) > 11


@pytest.mark.slow
def test_a_finger_drags_too(browser):
    context = browser.new_context(viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True)
    tab = context.new_page()
    tab.goto(explore.PAGE.as_uri())
    tab.wait_for_function("plane.n !== null")
    before, box = numbers(tab)["x_t"], tab.locator("#handle-x_t circle").bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    finger = context.new_cdp_session(tab)
    for kind, i in (("touchStart", 0), *(("touchMove", i) for i in range(1, 6)), ("touchEnd", None)):
        points = [] if i is None else [{"x": x + 12 * i, "y": y - 8 * i}]
        finger.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
    settle(tab)
    after = check_against_python(tab)["x_t"]
    context.close()
    assert after[0] > before[0] + 0.3 and after[1] > before[1] + 0.2


@pytest.mark.slow
def test_nothing_is_told_by_colour_alone(tab):
    dashes = tab.evaluate("CONDITIONS.map(({dash}) => JSON.stringify(dash))")
    assert len(set(dashes)) == len(dashes) == 3
    shapes = tab.evaluate(
        "QUANTITIES.filter(({symbol}) => symbol).map(({symbol}) => d3.symbol(symbol, 100)())"
    )
    assert len(set(shapes)) == len(shapes)
    lines = tab.evaluate("OBJECTIVES.map(({symbol, dash}) => `${d3.symbol(symbol, 100)()} ${dash}`)")
    assert len(set(lines)) == 3


@pytest.mark.slow
@pytest.mark.parametrize("steps", [1, 4])
def test_sampling_gives_the_samples_of_python(tab, steps):
    """The page's own noise through PyTorch and sampler.py: the same points, and the share of blends that is shown."""
    tab.click("#tab-sampling")
    tab.click(f"#budgets button:has-text('{steps}')")
    tab.select_option("#s-layout", "far")
    tab.select_option("#s-prompt", "1")
    tab.select_option("#eta", "0.5")
    tab.select_option("#s-rule", "0.25")
    tab.fill("#guidance", "2")
    run = "paths.runs.get(name_of(paths, label, paths.steps))"
    tab.wait_for_function(f"OBJECTIVES.every(({{label}}) => {run})", timeout=120_000)
    settle(tab)
    noise = tab.evaluate(
        'd3.range(-1, paths.steps).map((k) => normal_points(SAMPLES, "sampling", paths.seed, 1, k))'
    )
    noise = torch.tensor(noise, dtype=torch.float32)
    c, null = (torch.full((noise.shape[1],), k) for k in (1, 3))
    q = Mixture(**LAYOUTS["far"])
    for label in explore.OBJECTIVES:
        s_rule = 1.0 if label == "flow matching" else 0.25
        x = sampler.sample(
            toy_net("far", label),
            noise[0],
            (c,),
            (null,),
            steps=steps,
            eta=0.5,
            s_rule=s_rule,
            guidance=2.0,
            draw_noise=lambda k: noise[k + 1],
        )
        found = tab.evaluate(f"(label) => {run}.frames.at(-1)", label)
        close(found, x, 2e-3)
        blends = float((torch.cdist(x, q.means[1]).min(1).values > 4 * 0.12).float().mean())
        text = tab.inner_text(f'#panels figure[data-label="{label}"] output')
        assert abs(int(text.split("%")[0]) / 100 - blends) <= 0.01, label


@pytest.mark.slow
def test_the_paths_can_be_played_and_scrubbed(tab):
    tab.click("#tab-sampling")
    ready = "OBJECTIVES.every(({label}) => paths.runs.has(name_of(paths, label, paths.steps)))"
    tab.wait_for_function(ready, timeout=120_000)
    tab.fill("#scrub", "0.5")
    settle(tab)
    assert tab.inner_text("#moment") == "step 0.5 of 2, t = 0.75"
    tab.click("#play")
    tab.wait_for_function("paths.at > 0.6 && paths.playing")
    tab.wait_for_function("paths.at === paths.steps && !paths.playing")
    settle(tab)
    assert tab.inner_text("#moment") == "step 2.0 of 2, t = 0.00" and tab.inner_text("#play") == "Play"


@pytest.mark.slow
def test_the_measure_writes_what_it_found(tmp_path, monkeypatch, browser):
    (tmp_path / "results").mkdir()
    monkeypatch.setattr(explore, "ROOT", tmp_path)
    monkeypatch.setattr(explore, "chromium", lambda: contextlib.nullcontext(browser))
    explore.measure(explore.PAGE, frames=20)
    record = json.loads((tmp_path / "results" / "explore.json").read_text())
    assert {"command", "commit", "hardware", "browser", "load", "times"} <= record.keys()
    assert all(row.keys() == {"draw_ms", "frame_ms"} for row in record["times"].values())
    assert (tmp_path / "results" / "explore.png").stat().st_size < 150_000
