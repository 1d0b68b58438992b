"""The page toy/explore.html in Chromium, from a file (slow; requirements-browser.txt and the distribution's Chromium)."""

import contextlib
import shutil
import subprocess

import numpy as np
import pytest
from test_explore import alike, close, included, mixed, step_in_python

import sample
from toy import explore

pytestmark = pytest.mark.slow
CANVAS = "(canvas) => [...canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data]"
PATIENCE = 300_000  # milliseconds, for a busy machine
AXE = "axe-core-4.14.1.tgz"


CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
QUIET = "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking "
QUIET += "disable-component-update disable-sync"


@pytest.fixture(scope="module")
def browser():
    """The distribution's Chromium, headless, driven by Playwright."""
    api = pytest.importorskip("playwright.sync_api", reason="pip install -r requirements-browser.txt")
    path = next(filter(None, map(shutil.which, CHROMIUM)), None)
    if path is None:
        pytest.skip("no Chromium: install the distribution's package `chromium`")
    flags = [f"--{flag}" for flag in QUIET.split()]
    with api.sync_playwright() as playwright:
        with contextlib.closing(playwright.chromium.launch(executable_path=path, args=flags)) as browser:
            yield browser


@pytest.fixture
def tab(browser):
    """The page, open. Afterwards: nothing complained, and nothing but the page itself was asked for."""
    context = browser.new_context(viewport={"width": 1240, "height": 1000}, has_touch=True)
    tab, wrong, url = context.new_page(), [], explore.PAGE.as_uri()
    tab.set_default_timeout(PATIENCE)
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
    read = "Object.fromEntries(QUANTITIES.map(({ key }) => [key, find(`#number-${key}`).textContent]))"
    texts = {key: text for key, text in tab.evaluate(read).items() if text not in ("off", "infinite")}
    shown = {key: np.array(text.strip("()").split(","), dtype=float) for key, text in texts.items()}
    given = tab.evaluate(
        "({ ...step.now, c: step.set.c, answers: model_samples(step.q, step.set.c, step.now.t) })"
    )
    expected = step_in_python(mixed(tab.evaluate("step.set.layout")), given)
    assert expected.keys() == shown.keys()
    for name, value in expected.items():
        close(shown[name], value, 0.6e-4)
    return shown


def drag(tab, key: str, dx: float, dy: float, by: str = "mouse") -> None:
    """Move a point by some pixels, with the mouse, a finger, or from 5 to 5 hundredths with the arrow keys."""
    handle = tab.locator(f"#step .handle[aria-label^='{key} at']")
    box = handle.locator("circle").bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    if by == "mouse":
        tab.mouse.move(x, y)
        tab.mouse.down()
        tab.mouse.move(x + dx, y + dy, steps=5)
        tab.mouse.up()
    elif by == "finger":
        finger = tab.context.new_cdp_session(tab)
        for kind, i in ("touchStart", 0), *(("touchMove", i) for i in range(1, 6)), ("touchEnd", None):
            points = [] if i is None else [{"x": x + dx * i / 5, "y": y + dy * i / 5}]
            finger.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
    else:
        handle.focus()
        for _ in range(12):
            tab.keyboard.press("ArrowRight")
            tab.keyboard.press("ArrowUp")
    settle(tab)


@pytest.mark.parametrize("by", ["mouse", "finger", "keys"])
def test_moving_a_point_gives_the_numbers_of_python(tab, by):
    look_at(tab, "#step .card:nth-child(6)")
    before = check_step(tab)
    drag(tab, "x_t", 65, -65, by)
    after = check_step(tab)
    close(after["x_t"] - before["x_t"], [0.6, 0.6], 0.1)
    assert np.array_equal(after["x0"], before["x0"]) and not np.allclose(after["Delta"], before["Delta"])
    drag(tab, "x_s_hat", 60, -40, by)
    moved = check_step(tab)
    assert np.array_equal(moved["x_t"], after["x_t"]) and not np.allclose(moved["Delta"], after["Delta"])


def test_times_hold_data_and_noise(tab):
    look_at(tab, "#step .card:nth-child(6)")
    before = check_step(tab)
    tab.fill("#t", "0.4")
    tab.fill("#s", "0.9")  # stays below t
    settle(tab)
    after = check_step(tab)
    for name in ("x0", "eps"):
        close(after[name], before[name], 0)
    assert after["mix"] == 0 and "flow matching" in tab.inner_text("#step-remark")
    tab.fill("#t", "0.02")
    drag(tab, "x_t", 40, 40)
    assert "training hardly ever" in tab.inner_text("#step-remark")


def test_the_figure_follows_the_reader_and_a_link_brings_it_back(tab):
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
    look_at(tab, "#step .card:nth-child(8)")
    tab.click("#step button:has-text('One norm for all')")
    settle(tab)
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
    assert tab.inner_text("#follow-round").startswith("round 0: 100% blends, ")
    for act in (lambda: tab.click("#follow-play"), lambda: tab.uncheck("#follow [data-name=judge]")):
        act()
        tab.wait_for_function("following.run.blends.length > 1")
        tab.wait_for_function("finished(following.run)")
        settle(tab)
    rows = tab.locator("#follow-runs tr").all_inner_texts()
    assert len(rows) == 2 and "Δ = 0" in rows[0] and "100%" in rows[0] and "\t4%\t" in rows[1]
    tab.click("#follow button:has-text('Nothing to say')")
    tab.wait_for_function("finished(following.run)")
    settle(tab)
    assert "90% and then 78%" in tab.inner_text("#follow .told")
    tab.uncheck("#follow [data-name=normalise]")
    assert tab.inner_text("#follow .told") == ""


def test_sampling_shows_what_it_found(tab):
    tab.wait_for_function("made.runs.size >= 2")
    look_at(tab, "#sampling .panels")
    tab.check("#sampling [data-name=steps][value='4']")
    tab.select_option("#sampling [data-name=c]", "1")
    tab.check("#sampling [data-name=show][value=energy]")
    tab.wait_for_function("OBJECTIVES.every(({ label }) => run_of(sampling, label))")
    settle(tab)
    found = tab.evaluate("OBJECTIVES.map(({ label }) => average(run_of(sampling, label), 'blends'))")
    said = tab.locator("#sampling figure output").all_inner_texts()
    assert [text.split("%")[0] for text in said] == [f"{100 * blends:.0f}" for blends in found]
    assert tab.inner_text("#results tr:last-child th") == "Fresh data"
    assert "Energy distance" in tab.get_attribute("#chart", "aria-label")
    tab.fill("#sampling .scrub", "0.5")
    settle(tab)
    assert tab.inner_text("#sampling .moment") == "step 0.5 of 4, t = 0.88"
    assert "%" not in tab.inner_text("#sampling figure output >> nth=0")
    tab.click("#sampling .play")
    tab.wait_for_function("sampling.at === sampling.set.steps && !sampling.playing")


def test_pictures_are_those_of_the_rounded_weights(tab):
    prompt = "Three red octopuses; a zebra?"
    tab.evaluate("(settings) => change_pictures(settings)", dict(prompt=prompt, seed=5, flow_guidance=3))
    look_at(tab, "#picture-grid")
    drawn = "(text) => find('#picture-state').textContent.startsWith(`Drawn: “${text}”`)"
    tab.wait_for_function(drawn, arg=prompt)
    for row, choices in ("flow", dict(guidance=3, s_rule=1)), ("self_e", {}):
        loaded = included(row)[0]
        for steps in (1, 8):
            expected = sample.generate(loaded, [prompt], [(0,)], seed=5, steps=steps, **choices)[0]
            alike(tab.locator(f"canvas[data-row={row}][data-steps='{steps}']").evaluate(CANVAS), expected)
    assert "“zebra”" in tab.inner_text("#picture-remark")
    tab.locator("canvas[data-row=flow][data-steps='8']").click()
    assert tab.locator("#film li").count() == 8
    tab.click("#picture-prompts button:first-child")
    tab.click("#picture-prompts button:nth-child(2)")  # stops what the first began
    second = tab.input_value("#picture-prompt")
    tab.wait_for_function(drawn, arg=second)
    assert tab.get_attribute("canvas[data-row=self_e][data-steps='1']", "aria-label").endswith(second)


@pytest.mark.parametrize("width", [320, 390, 820, 1440])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_and_axe_finds_nothing(browser, width, scheme):
    kept = explore.ROOT / "runs" / "axe"
    if not (kept / AXE).exists():
        kept.mkdir(parents=True, exist_ok=True)
        command = ["npm", "pack", "--silent", "axe-core@4.14.1"]
        if shutil.which("npm") is None or subprocess.run(command, cwd=kept).returncode:
            pytest.skip("axe-core cannot be fetched with npm")
    shutil.unpack_archive(kept / AXE, kept)
    settings = dict(color_scheme=scheme, reduced_motion="reduce")
    tab = browser.new_page(viewport={"width": width, "height": 800}, **settings)
    tab.set_default_timeout(PATIENCE)
    tab.goto(explore.PAGE.as_uri())
    tab.wait_for_function("step.n !== null")
    tab.evaluate("find_all('details').forEach((element) => { element.open = true; })")
    settle(tab)
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    small = "find_all('button, select, input, summary').filter((e) => e.offsetParent && e.offsetHeight < 24)"
    assert tab.evaluate(f"{small}.length") == 0
    for name in ("problem", "sampling"):
        boxes = tab.evaluate(f"find_all('#{name} canvas').map((e) => e.getBoundingClientRect().toJSON())")
        assert len({(round(box["y"]), round(box["height"])) for box in boxes}) == 1 and boxes[0]["width"] > 80
    tab.evaluate((kept / "package" / "axe.min.js").read_text())
    found = tab.evaluate("axe.run(document, { resultTypes: ['violations'] })")["violations"]
    assert not found, [(one["id"], one["nodes"][0]["target"]) for one in found]
    tab.close()
