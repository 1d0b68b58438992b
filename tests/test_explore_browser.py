"""The page toy/explore.html in Chromium, from a file (slow; requirements-browser.txt and the distribution's Chromium)."""

import contextlib
import shutil
import subprocess

import numpy as np
import pytest
import torch
from test_explore import alike, close, included, mixed, step_in_python, toy_net

import sample
import sampler
from toy import explore

pytestmark = pytest.mark.slow
CANVAS = "(canvas) => [...canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data]"
AXE = "4.14.1"


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
    context = browser.new_context(viewport={"width": 1240, "height": 1000}, has_touch=True)
    tab, wrong, url = context.new_page(), [], explore.PAGE.as_uri()
    tab.on("console", lambda said: wrong.append(said.text) if said.type in ("error", "warning") else None)
    tab.on("pageerror", lambda error: wrong.append(str(error)))
    tab.on("request", lambda asked: asked.url.startswith(("data:", url)) or wrong.append(asked.url))
    tab.goto(url)
    tab.wait_for_function("step.n !== null")
    yield tab
    context.close()
    assert not wrong


def settle(tab) -> None:
    """Wait until what was asked for is drawn, motion included."""
    tab.wait_for_timeout(450)
    tab.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")


def look_at(tab, selector: str) -> None:
    tab.evaluate("(selector) => find(selector).scrollIntoView({ block: 'center' })", selector)
    settle(tab)


def check_step(tab) -> dict:
    """The numbers of the table, which are those of losses.py for the points that are shown."""
    shown = tab.evaluate(
        "Object.fromEntries(QUANTITIES.map(({ key }) => [key, find(`#number-${key}`).textContent]))"
    )
    shown = {
        key: text.strip("()").split(",") for key, text in shown.items() if text not in ("off", "infinite")
    }
    shown = {key: np.array([float(part) for part in parts]) for key, parts in shown.items()}
    given = tab.evaluate(
        "({ ...step.now, c: step.set.c, answers: model_samples(step.q, step.set.c, step.now.t) })"
    )
    expected = step_in_python(mixed(tab.evaluate("step.set.layout")), given)
    assert expected.keys() == shown.keys()
    for name, value in expected.items():
        close(shown[name], value, 0.6e-4)
    return shown


def drag(tab, key: str, dx: float, dy: float) -> None:
    box = tab.locator(f"#step .handle[aria-label^='{key} at'] circle").bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    tab.mouse.move(x, y)
    tab.mouse.down()
    tab.mouse.move(x + dx, y + dy, steps=5)
    tab.mouse.up()
    settle(tab)


def test_dragging_and_sliding_give_the_numbers_of_python(tab):
    look_at(tab, "#step .card:nth-child(6)")
    before = check_step(tab)
    drag(tab, "x_t", 60, -40)
    dragged = check_step(tab)
    assert dragged["x_t"][0] > before["x_t"][0] + 0.3 and dragged["x_t"][1] > before["x_t"][1] + 0.2
    assert np.array_equal(dragged["x0"], before["x0"])
    drag(tab, "x_s_hat", 60, -40)
    assert not np.allclose(check_step(tab)["Delta"], dragged["Delta"])
    tab.fill("#t", "0.4")  # holds x0 and eps, and moves x_t by Eq. 1; s stays below t
    tab.fill("#s", "0.9")
    settle(tab)
    slid = check_step(tab)
    close(slid["x0"], dragged["x0"], 0)
    close(slid["eps"], dragged["eps"], 1e-4)
    close(slid["x_t"], 0.6 * slid["x0"] + 0.4 * slid["eps"], 1e-3)
    assert slid["mix"] == 0 and "flow matching" in tab.inner_text("#step-remark")
    tab.fill("#t", "0.02")
    drag(tab, "x_t", 40, 40)
    assert "training hardly ever" in tab.inner_text("#step-remark")


def test_keys_move_points_and_the_focus_is_seen(tab):
    look_at(tab, "#step .card")
    before = check_step(tab)["x_t"]
    tab.focus("#step .handle[aria-label^='x_t at']")
    for key in ("ArrowRight", "ArrowRight", "ArrowUp", "Shift+ArrowDown"):
        tab.keyboard.press(key)
    settle(tab)
    close(check_step(tab)["x_t"] - before, [0.1, 0.04], 2e-4)


def test_a_finger_drags_too(tab):
    look_at(tab, "#step .card")
    before, box = (
        check_step(tab)["x_t"],
        tab.locator("#step .handle[aria-label^='x_t at'] circle").bounding_box(),
    )
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    finger = tab.context.new_cdp_session(tab)
    for kind, i in (("touchStart", 0), *(("touchMove", i) for i in range(1, 6)), ("touchEnd", None)):
        points = [] if i is None else [{"x": x + 12 * i, "y": y - 8 * i}]
        finger.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
    settle(tab)
    after = check_step(tab)["x_t"]
    assert after[0] > before[0] + 0.3 and after[1] > before[1] + 0.2


def test_each_example_of_the_step_shows_what_it_says(tab):
    for button in tab.locator("#step button[data-set]").all():
        look_at(tab, "#step .card:nth-child(5)")
        button.click()
        settle(tab)
        shown, off = check_step(tab), tab.evaluate("Object.fromEntries(['x0_hat', 'x_self', 'x_renorm'].map((key) =>"
                                                   " [key, off_by(step.q, step.n[key], step.set.c)]))")  # fmt: skip
        size = np.linalg.norm(shown["Delta"])
        assert off["x0_hat"] > 4, button.inner_text()  # a blend
        match button.inner_text():
            case "Nothing to say" | "Silent at s = 0":
                assert size < 1e-3
            case "The auxiliary term" | "Back to the blend":
                assert size > 0.3 and off["x_self"] < 4
            case "Too much to say":
                assert off["x_self"] > 1.5 * off["x0_hat"] and off["x_renorm"] < 4
            case "One norm for all":
                assert off["x_renorm"] < 4 < off["x_self"]


def test_the_step_follows_the_reader(tab):
    parts = []
    for n in range(1, 10):
        look_at(tab, f"#step .card:nth-child({n}) h3")
        parts.append(tab.evaluate("step.set.part"))
        box = tab.locator("#step .plane").bounding_box()
        assert n == 1 or -5 < box["y"] < box["y"] + box["height"] < 1000
    assert parts == [*range(1, 10)]
    tab.click("#step summary")
    tab.hover("#number-x0_hat")
    settle(tab)
    assert tab.locator("#step .halo circle").count() == 1


def test_a_link_brings_the_figure_and_its_settings(tab):
    look_at(tab, "#step .card:nth-child(8)")
    tab.click("#step button:has-text('One norm for all')")
    drag(tab, "x0", 20, 10)
    kept, link = check_step(tab), tab.get_attribute("#step .link", "href")
    tab.goto(explore.PAGE.as_uri() + link)
    tab.reload()
    tab.wait_for_function("step.n !== null")
    settle(tab)
    for name, value in check_step(tab).items():
        close(value, kept[name], 1e-3)
    assert tab.locator("#step .card:nth-child(8)").bounding_box()["y"] < 600


def test_following_plays_restarts_and_keeps_what_was_seen(tab):
    look_at(tab, "#follow .plane")
    assert tab.inner_text("#follow-round") == "round 0: 100% blends"
    tab.click("#follow-play")
    tab.wait_for_function("finished(following.run)", timeout=60_000)
    settle(tab)
    assert tab.inner_text("#follow-round") == "round 300: 4% blends"
    tab.uncheck("#follow [data-name=judge]")
    tab.wait_for_function("finished(following.run)", timeout=60_000)
    settle(tab)
    rows = tab.locator("#follow-runs tr").all_inner_texts()
    assert len(rows) == 2 and "Δ = 0" in rows[0] and "100%" in rows[0] and "4%" in rows[1]


@pytest.mark.parametrize("steps", [1, 4])
def test_sampling_gives_the_samples_of_python(tab, steps):
    """The page's own noise through PyTorch and sampler.py: the same points, and the share of blends that is shown."""
    settings = dict(layout="far", c=1, eta=0.5, s_rule=0.25, guidance=2)
    look_at(tab, "#sampling .panels")
    tab.evaluate("(settings) => change_sampling(settings)", {**settings, "steps": steps})
    tab.wait_for_function("OBJECTIVES.every(({ label }) => run_of(sampling, label))", timeout=120_000)
    settle(tab)
    noise = tab.evaluate(
        "range(sampling.set.steps + 1).map((k) => normal_points(SAMPLES, 12, sampling.set.seed, 1, k))"
    )
    noise = torch.tensor(noise, dtype=torch.float32)
    c, null = (torch.full((noise.shape[1],), k) for k in (1, 3))
    for label in explore.OBJECTIVES:
        choices = dict(eta=0.5, guidance=2.0, s_rule=1.0 if label == "flow matching" else 0.25)
        told = dict(steps=steps, draw_noise=lambda k: noise[k + 1], **choices)
        x = sampler.sample(toy_net("far", label), noise[0], (c,), (null,), **told)
        close(tab.evaluate("(label) => run_of(sampling, label).x.at(-1)", label), x, 2e-3)
        blends = float(
            (torch.cdist(x, mixed("far").means[1].float()).min(1).values > 4 * 0.12).float().mean()
        )
        text = tab.inner_text(f'#sampling figure[data-label="{label}"] output')
        assert abs(int(text.split("%")[0]) / 100 - blends) <= 0.01, label
    assert tab.inner_text("#results tr:last-child th") == "Fresh data"
    tab.fill("#sampling .scrub", "0.5")
    tab.click("#sampling .play")
    tab.wait_for_function("sampling.at === sampling.set.steps && !sampling.playing", timeout=30_000)


def test_what_is_said_of_the_first_figure_and_of_sampling_is_so(tab):
    tab.wait_for_function("made.runs.size >= 2", timeout=60_000)
    settle(tab)
    flow, self_e = (int(text.split("%")[0]) for text in tab.locator("#problem output").all_inner_texts())
    assert 42 <= flow <= 58 and 15 <= self_e <= 25
    look_at(tab, "#sampling .panels")
    for button in tab.locator("#sampling button[data-set]").all():
        button.click()
        tab.wait_for_function("OBJECTIVES.every(({ label }) => run_of(sampling, label))", timeout=120_000)
        read = "OBJECTIVES.map(({ label }) => average(run_of(sampling, label), '%s'))"
        (flow, control, self_e), (far_flow, _, far) = (
            tab.evaluate(read % key) for key in ("blends", "energy")
        )
        match button.inner_text():
            case "Two steps":
                assert self_e < control < flow and far > far_flow
                plain = self_e
            case "One step, s half-way":
                assert self_e < 0.6
            case "The control keeps up" | "Nothing to gain":
                assert abs(control - self_e) < 0.06
            case "Fresh noise":
                assert plain + 0.1 < self_e < flow
            case "Guidance":
                assert far_flow < 0.65  # Self-E without guidance: 0.62
            case "Fifty steps":
                assert max(flow, control, self_e) < 0.05


def test_pictures_are_those_of_the_rounded_weights(tab):
    loaded, prompt = included()[0], "Three red circles; a zebra?"
    tab.evaluate(
        "(settings) => change_pictures(settings)",
        dict(prompt=prompt, seed=5, guidance=3, flow_guidance=3, eta="renoise"),
    )
    look_at(tab, "#picture-grid")
    drawn = "(text) => find('#picture-state').textContent.startsWith(`Drawn: “${text}”`)"
    tab.wait_for_function(drawn, arg=prompt, timeout=120_000)
    for row, s_rule in (("flow", 1), ("self_e", loaded.config["s_rule"])):
        for steps in (1, 8):
            choices = dict(seed=5, steps=steps, guidance=3, eta="renoise", s_rule=s_rule)
            expected = sample.generate(loaded, [prompt], [(0,)], **choices)[0]
            alike(tab.locator(f"canvas[data-row={row}][data-steps='{steps}']").evaluate(CANVAS), expected)
    assert "“zebra”" in tab.inner_text("#picture-remark")
    tab.locator("canvas[data-row=flow][data-steps='8']").click()
    assert tab.locator("#film li").count() == 8
    tab.click("#picture-prompts button:first-child")
    tab.click("#picture-prompts button:nth-child(2)")  # stops what the first began
    tab.wait_for_function(drawn, arg=tab.input_value("#picture-prompt"), timeout=120_000)
    label = tab.get_attribute("canvas[data-row=self_e][data-steps='1']", "aria-label")
    assert label.endswith(tab.input_value("#picture-prompt"))


@pytest.mark.parametrize("width", [320, 390, 820, 1440])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_and_axe_finds_nothing(browser, width, scheme):
    package = explore.ROOT / "runs" / "axe" / f"axe-core-{AXE}.tgz"
    if not package.exists():
        package.parent.mkdir(parents=True, exist_ok=True)
        command = ["npm", "pack", "--silent", f"axe-core@{AXE}"]
        if shutil.which("npm") is None or subprocess.run(command, cwd=package.parent).returncode:
            pytest.skip("axe-core cannot be fetched with npm")
    shutil.unpack_archive(package, package.parent)
    tab = browser.new_page(
        viewport={"width": width, "height": 800}, color_scheme=scheme, reduced_motion="reduce"
    )
    tab.goto(explore.PAGE.as_uri())
    tab.wait_for_function("step.n !== null")
    tab.evaluate("find_all('details').forEach((element) => { element.open = true; })")
    settle(tab)
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    small = "find_all('button, select, input, summary').filter((e) => e.offsetParent && e.offsetHeight < 24).length"
    assert tab.evaluate(small) == 0
    for name in ("problem", "sampling"):
        heights = tab.evaluate(
            f"find_all('#{name} canvas').map((e) => [e.offsetTop, e.offsetHeight, e.offsetWidth])"
        )
        assert len(set(map(tuple, heights))) == 1 and heights[0][1] == heights[0][2] > 80
    tab.evaluate((package.parent / "package" / "axe.min.js").read_text())
    found = tab.evaluate("axe.run(document, { resultTypes: ['violations'] })")
    assert [(one["id"], one["nodes"][0]["target"]) for one in found["violations"]] == []
    tab.close()


def test_the_measure_writes_what_it_found(browser, tmp_path, monkeypatch):
    monkeypatch.setattr(explore, "chromium", lambda: contextlib.nullcontext(browser))
    explore.measure(explore.PAGE, tmp_path, frames=10)
    record = (tmp_path / "explore.json").read_text()
    assert all(word in record for word in ("commit", "hardware", "load", "x_t dragged", "four guided steps"))
    assert (tmp_path / "explore.png").stat().st_size < 150_000
