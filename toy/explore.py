"""A page on which any-step generation is understood by moving things: toy/explore.html, one file, works offline.

    python toy/explore.py                # trains the nine networks of the page (minutes, once), writes it and opens it
    python toy/explore.py --no-open      # only writes it
    python toy/explore.py --measure      # also drags a point in headless Chromium: results/explore.json and .png

The page's sources are in toy/explore/ and are inlined as they stand; mixture.js, method.js and toynet.js are its
mathematics, tested against the Python (tests/test_explore.py). Interface and plotting are D3's modules, inlined from
their npm releases with their licences. They are plain scripts, so the page works by double click. Networks that are in
the page already, made by the same code, are kept; otherwise they are trained (and kept in runs/toy). The same sources
and networks give the same bytes.
"""

import base64
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import webbrowser
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]

if (
    __name__ == "__main__"
):  # started as a file: modules are found from the project's folder, not from this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from engine import checkpoint, errors, machine
from toy import studies
from toy.mixture import LAYOUTS, Mixture
from toy.training import STEPS, Member

FOLDER, PAGE, MODEL = ROOT / "toy" / "explore", ROOT / "toy" / "explore.html", ROOT / "checkpoints" / "laptop"
SEED, MOST_BYTES = 0, 1_500_000
OBJECTIVES = ("flow matching", "control Delta = 0", "Self-E")  # of the study `objectives`

# The scripts of the page, in this order. The later ones use the earlier ones; main.js starts all once the page is read.
SOURCES = (
    "mixture.js",
    "method.js",
    "toynet.js",
    "drawing.js",
    "plane.js",
    "paths.js",  # two dimensions
    "random.js",
    "words.js",
    "network.js",
    "pictures.js",  # the included checkpoint
    "main.js",
)
STYLES = ("style.css", "pictures.css")

# D3's modules and their versions. The whole of D3 would be twice as large.
LIBRARIES = {
    "d3-array": "3.2.4",
    "d3-dispatch": "3.0.1",
    "d3-selection": "3.0.0",
    "d3-drag": "3.0.0",
    "d3-path": "3.1.0",
    "d3-shape": "3.2.0",
    "d3-color": "3.1.0",
    "d3-interpolate": "3.0.1",
    "d3-format": "3.1.0",
    "d3-time": "3.1.0",
    "d3-time-format": "4.1.0",
    "d3-scale": "4.0.2",
    "d3-contour": "4.0.2",
    "d3-random": "3.0.1",
}


# ------------------------------------------------------------------------------------------------------------
# What the page is made of
# ------------------------------------------------------------------------------------------------------------
def libraries() -> dict[str, tuple[str, str]]:
    """{module: (its licence, its script)} from the npm releases, kept in runs/explore. UserError without npm."""
    kept = ROOT / "runs" / "explore"
    files = {name: kept / f"{name}-{version}.tgz" for name, version in LIBRARIES.items()}
    missing = [f"{name}@{LIBRARIES[name]}" for name, file in files.items() if not file.exists()]
    if missing:
        npm = shutil.which("npm")
        if npm is None:
            raise errors.UserError("npm is needed to fetch D3's modules: install Node.js and run again")
        kept.mkdir(parents=True, exist_ok=True)
        packed = subprocess.run([npm, "pack", "--silent", *missing], cwd=kept, capture_output=True, text=True)
        if packed.returncode:
            reason = packed.stderr.strip().splitlines() or ["no reason given"]
            raise errors.UserError(
                f"npm could not fetch D3's modules ({reason[0]}); check the network and run again"
            )

    def read(name: str) -> tuple[str, str]:
        with tarfile.open(files[name]) as release:
            texts = (f"package/{part}" for part in ("LICENSE", f"dist/{name}.min.js"))
            return tuple(release.extractfile(text).read().decode("utf-8").strip() for text in texts)

    return {name: read(name) for name in LIBRARIES}


def world(page: Path) -> dict:
    """What the scripts read: the layouts of toy/mixture.py, and the networks; those of `page` if made by this code."""
    layouts = {}
    for name, layout in LAYOUTS.items():
        q = Mixture(**layout, dtype=torch.float64)
        layouts[name] = {
            "means": q.means.tolist(),
            "weights": q.weights.tolist(),
            "std": layout.get("std", 0.12),
        }
    known = embedded(page).get("networks", {}) if page.exists() else {}
    return {"layouts": layouts, "networks": known if known.get("recipe") == recipe() else networks()}


def embedded(page: Path) -> dict:
    """The data block of a page that was written before. Raises UserError for a file that is no such page."""
    text = page.read_text(encoding="utf-8", errors="replace")
    found = re.search(r'<script type="application/json" id="world">(.*?)</script>', text, re.S)
    try:
        block = json.loads(found[1]) if found else None
    except ValueError:
        block = None
    if not isinstance(block, dict):
        raise errors.UserError(f"{page} is not a page of this program: remove it, or choose another --out")
    return block


def settings(label: str) -> tuple[dict, dict]:
    """(departures of the training, choices of the sampler) of an objective."""
    return studies.STUDIES["objectives"].settings[label]


def recipe() -> dict:
    """What names each network, the text of the code that trains it included: {layout: {objective: name}}."""

    def name(layout: str, label: str) -> str:
        return studies.weights_file(Member(layout, SEED), STEPS, settings(label)[0]).stem

    return {layout: {label: name(layout, label) for label in OBJECTIVES} for layout in LAYOUTS}


def networks() -> dict:
    """The networks of the page, from runs/toy or trained now, as base64 of half precision, and where they come from."""
    members = [Member(layout, SEED) for layout in LAYOUTS]
    weights = {layout: {} for layout in LAYOUTS}
    for label in OBJECTIVES:
        print(f"networks of {label} ...", flush=True)
        net = studies.trained(members, STEPS, settings(label)[0])
        for e, layout in enumerate(LAYOUTS):
            own = net.weights_of(e)
            numbers = np.concatenate([value.half().numpy().ravel() for value in own.values()]).astype("<f2")
            weights[layout][label] = base64.b64encode(numbers.tobytes()).decode("ascii")
    shapes = {name: list(value.shape[-2:]) for name, value in own.items()}
    made_by = machine.provenance(torch.device("cpu"))
    made_by |= {"command": "python toy/explore.py", "seed": SEED, "steps": STEPS}
    return {
        "recipe": recipe(),
        "provenance": made_by,
        "sampling": {label: settings(label)[1] for label in OBJECTIVES},
        "shapes": shapes,
        "weights": weights,
    }


# ------------------------------------------------------------------------------------------------------------
# The page
# ------------------------------------------------------------------------------------------------------------
def script(text: str, **marks: str) -> str:
    """A script element. A text that would end it early is refused."""
    if re.search(r"</script|<!--", text, re.I):
        raise ValueError(f"{marks} holds '</script' or '<!--', which would end its element")
    given = "".join(f' data-{name}="{value}"' for name, value in marks.items())
    return f"<script{given}>\n{text}\n</script>"


def build(page: Path) -> None:
    """Write the page: template, style, libraries with their licences, data and scripts in one file."""
    parts = [
        script(f"/*\n{name} {LIBRARIES[name]}\n\n{licence}\n*/\n{code}", library=f"{name} {LIBRARIES[name]}")
        for name, (licence, code) in libraries().items()
    ]
    parts += [script((FOLDER / name).read_text(encoding="utf-8").rstrip(), source=name) for name in SOURCES]
    fill = {
        "style": "\n".join((FOLDER / name).read_text(encoding="utf-8").rstrip() for name in STYLES),
        "libraries": ", ".join(f"{name} {version}" for name, version in LIBRARIES.items()),
        "world": json.dumps(world(page)),
        "scripts": "\n".join(parts),
    }
    text = (FOLDER / "template.html").read_text(encoding="utf-8")
    text = re.sub(r"\{\{(\w+)\}\}", lambda found: fill[found[1]], text)
    size = len(text.encode("utf-8"))
    if size >= MOST_BYTES:
        raise ValueError(f"the page has {size:,} bytes; fewer than {MOST_BYTES:,} were promised")
    with checkpoint.in_one_piece(page) as partial:
        partial.write_text(text, encoding="utf-8", newline="\n")
    print(f"{page}: {size:,} bytes")


def show(page: Path) -> None:
    """Open the page in the browser; without a screen, say where it is."""
    screen = (
        sys.platform in ("darwin", "win32") or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    )
    if not (screen and webbrowser.open(page.resolve().as_uri())):
        print("no browser here; open that file in one")


# ------------------------------------------------------------------------------------------------------------
# The page in a real browser
# ------------------------------------------------------------------------------------------------------------
CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
QUIET = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@contextlib.contextmanager
def chromium():
    """The distribution's Chromium, headless, driven by Playwright. UserError when one of the two is missing."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError as error:
        raise errors.UserError("Playwright is missing: pip install -r requirements-browser.txt") from error
    path = next(filter(None, map(shutil.which, CHROMIUM)), None)
    if path is None:
        raise errors.UserError("no Chromium found: install the distribution's package `chromium`")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=list(QUIET))
        try:
            yield browser
        finally:
            browser.close()


# Move x_t along a circle, and take the time of each drawing and of each frame of the screen.
DRAG = """async ([frames, k]) => {
  change(plane, {layout: "between", c: 0, t: 0.8, s: 0.3, k, part: 9});
  const draws = [], between = [];
  let before = await new Promise(requestAnimationFrame);
  for (let i = 0; i < frames; i++) {
    plane.x_t = [1.5 * Math.cos(i / 20), 1.5 * Math.sin(i / 20)];
    const start = performance.now();
    draw_plane(plane);
    draws.push(performance.now() - start);
    const now = await new Promise(requestAnimationFrame);
    between.push(now - before);
    before = now;
  }
  return {draw_ms: draws, frame_ms: between};
}"""


# Draw the first prompt in four guided steps, and take the time of each picture.
PICTURES = """async ([config, weights, pictures]) => {
  const model = picture_model(config, Uint8Array.from(atob(weights), (c) => c.charCodeAt(0)).buffer), times = [];
  for (let seed = 0; seed < pictures; seed++) {
    const start = performance.now(), choices = {seed, steps: 4, guidance: 1.5, eta: 1, s_rule: 0};
    for await (const frame of picture_trajectory(model, "a photo of a red circle", choices)) frame;
    times.push(performance.now() - start);
  }
  return times;
}"""


def measure(page: Path, frames: int = 300) -> None:
    """Drag x_t for `frames` frames, with the field on; draw pictures; write results/explore.json and explore.png.

    draw_ms is the time of the script that computes and draws one frame, frame_ms the time from frame to frame, with
    the browser's own painting, here by the processor. k = 1 is the classifier term alone, k = 0.9 also asks G_fake.
    """
    with chromium() as browser:
        tab = browser.new_page(viewport={"width": 1240, "height": 945}, color_scheme="light")
        tab.goto(page.resolve().as_uri())
        times = {f"k = {k:g}": tab.evaluate(DRAG, [frames, k]) for k in (1.0, 0.9)}
        arrows = tab.evaluate("GRID * GRID")
        weights = base64.b64encode((MODEL / "model.safetensors").read_bytes()).decode()
        pictures = tab.evaluate(PICTURES, [(MODEL / "config.json").read_text(encoding="utf-8"), weights, 10])
        tab.evaluate("change(plane, {...TRIES[0][1], part: 6})")
        tab.wait_for_timeout(300)  # the drawing of the next frame
        drawn = Image.open(BytesIO(tab.screenshot()))
        version = browser.version
    record = {
        **machine.provenance(torch.device("cpu")),
        "browser": f"Chromium {version}, headless, no GPU",
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "frames": frames,
        "arrows": arrows,
        "times": {name: {key: spread(values) for key, values in row.items()} for name, row in times.items()},
        "four_guided_steps_of_a_picture_ms": spread(pictures),
    }
    checkpoint.write_json(ROOT / "results" / "explore.json", record)
    drawn = drawn.convert("RGB").quantize(256, method=Image.Quantize.MAXCOVERAGE)
    drawn.save(ROOT / "results" / "explore.png", optimize=True)
    for name, row in record["times"].items():
        print(f"{name}: drawing a frame {row['draw_ms']}, from frame to frame {row['frame_ms']}, in ms")
    print(f"four guided steps of a picture: {record['four_guided_steps_of_a_picture_ms']}, in ms")


def spread(times: list[float]) -> dict:
    """The fastest, the median and the 95th percentile of the times."""
    low, median, high = np.percentile(times, (0, 50, 95))
    return {"fastest": round(float(low), 2), "median": round(float(median), 2), "p95": round(float(high), 2)}


def main() -> None:
    parser = errors.Parser("toy/explore.py", __doc__.split("\n")[0])
    parser.add_argument(
        "--out", type=errors.file_to_write, default=PAGE, help="the page to write (toy/explore.html)"
    )
    parser.add_argument("--no-open", action="store_true", help="write the page, do not open it")
    parser.add_argument(
        "--measure",
        action="store_true",
        help="also time the dragging in headless Chromium: results/explore.json and .png",
    )
    args = parser.parse_args()
    if args.out.exists():
        embedded(args.out)  # or it would be lost
    torch.set_num_threads(1)
    build(args.out)
    if args.measure:
        measure(args.out)
    elif not args.no_open:
        show(args.out)


if __name__ == "__main__":
    errors.run(main)
