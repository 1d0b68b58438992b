"""What the pages tell people to type exists: programs, flags, files, names."""

import re
import runpy
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import losses

ROOT = Path(__file__).parent.parent
LISTED = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True).stdout.split()
PAGES = [page for page in LISTED if not page.endswith("table.md")]  # tables are generated
TEXTS = {page: (ROOT / page).read_text("utf-8") for page in PAGES}


@pytest.mark.parametrize("page", PAGES)
def test_running_text_is_short(page):
    """Lines of at most 120 characters, outside tables and code; the targets of links do not count."""
    text = re.sub(r"```.*?```", "", TEXTS[page], flags=re.S)
    text = re.sub(r"\n\n(    .*\n)+", "\n\n", text)
    running = [line for line in text.splitlines() if not re.match(r"\s*(\||!\[|`[^`]*`$)", line)]
    long = [line for line in running if len(re.sub(r"\]\([^)]*\)", "]", line)) > 120]
    assert not long, long


def commands() -> list[tuple[str, str]]:
    """(page, command) of every line that runs a program of ours, in code blocks and in `...`; continued lines are joined.

    `python -m toy.explain` reads as `python toy/explain.py`.
    """
    found = []
    for page, text in TEXTS.items():
        text = text.replace("\\\n", " ")
        lines = [line.strip() for line in text.splitlines() if line.startswith(("    ", "python "))]
        lines += [" ".join(code.split()) for code in re.findall(r"`((?:python|torchrun) [^`]+)`", text)]
        for line in lines:
            line = re.sub(r"python -m (\w+)\.(\w+)", r"python \1/\2.py", line)
            if re.search(r"(?:python|torchrun) .*[a-z]\.py", line):
                found.append((page, line))
    return found


def help_of(program: str, monkeypatch, capsys) -> str:
    monkeypatch.setattr(sys, "argv", [program, "--help"])
    monkeypatch.setattr(sys, "path", ["", *sys.path])  # a program puts its folder in the first place
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / program), run_name="__main__")
    assert end.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("page, command", commands(), ids=lambda x: x if x.endswith(".md") else x[-60:])
def test_the_program_and_its_flags_exist(page, command, monkeypatch, capsys):
    command = command.split("#")[0].split("&&")[-1]
    program = re.search(r"(?:\S*python|torchrun\b.*?) ([\w/]+\.py)", command)[1]
    known = help_of(program, monkeypatch, capsys)  # seen from the repository's folder, in every page
    for flag in re.findall(r"(?<=\s)--[a-z][\w-]*", command.split(program)[1]):
        assert re.search(rf"{flag}(?![\w-])", known), f"{page}: {program} has no {flag}"


def anchors(text: str) -> set[str]:
    """What GitHub calls the headings of a page: small letters, hyphens for spaces, no punctuation."""
    headings = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", list(TEXTS))
def test_links_lead_somewhere(page):
    for target, anchor in re.findall(r"\]\(([^)#]*)#?([^)]*)\)", TEXTS[page]):
        if not target.startswith("http"):
            file = (ROOT / page).parent / target if target else ROOT / page
            assert file.exists(), f"{page}: {target}"
            assert not anchor or anchor in anchors(file.read_text()), f"{page}: {target}#{anchor}"


@pytest.mark.parametrize("page", list(TEXTS))
def test_named_code_exists(page):
    """`module.name` in the text is a name in that module."""
    for module, name in set(re.findall(r"`(\w+)\.([A-Za-z_][\w.]*)`", TEXTS[page])):
        inside = [file for file in ROOT.glob(f"*/{module}.py") if file.parent.name != "tests"]
        file, last = (inside or [ROOT / f"{module}.py"])[0], name.split(".")[-1]
        if file.exists() and name not in ("py", "png", "safetensors"):
            defined = re.search(rf"^\s*((def|class) )?{last}\b", file.read_text(), re.M)
            assert defined, f"{page}: {module}.{name}"


@pytest.mark.parametrize("page", list(TEXTS))
def test_named_files_exist(page):
    """`folder/file.py` in the text is a file, seen from the repository's folder or from the page's own."""
    for name in set(re.findall(r"`([\w/]+\.(?:py|md|sbatch))`", TEXTS[page])):
        assert (ROOT / name).exists() or (ROOT / page).parent.joinpath(name).exists(), f"{page}: {name}"


@pytest.mark.parametrize("folder", ["engine", "experiments", "toy"])
def test_each_program_of_a_folder_has_its_line(folder):
    listed = re.findall(r"^\| `([\w/]+\.py)` \|", TEXTS[f"{folder}/README.md"], re.M)
    there = [str(path.relative_to(ROOT / folder)) for path in (ROOT / folder).rglob("*.py")]
    assert sorted(listed) == sorted(there)


def test_the_readme_is_short_and_its_test_line_is_one_line():
    text = TEXTS["README.md"]
    assert len(text) <= 8_000, len(text)
    line = next(line for line in text.splitlines() if "python -m pytest" in line)  # what .ci/run takes
    assert "venv" in line and "pip install" in line and "requirements.txt" in line


def test_the_readmes_training_step_is_that_of_losses():
    """The block is run as it stands, but for sample_times(...), on samples with s < t alone."""
    block = TEXTS["README.md"].split("## One training step")[1].split("\n\nThese")[0]
    block = textwrap.dedent(block).replace("sample_times(...)", "times")
    g = torch.Generator().manual_seed(0)
    x0, eps, eps_s, shift = (torch.randn(6, 2, generator=g) for _ in range(4))
    z, u = torch.randn(6, generator=g), torch.rand(6, generator=g)
    network = lambda x, t, s, c: torch.sin(x) + (t + 2 * s + c)[:, None]  # noqa: E731
    ema = lambda x, t, s, c: torch.cos(x) * (t + c)[:, None] + shift  # noqa: E731
    c, null, everywhere = (torch.full((6,), 0.3),), (torch.zeros(6),), torch.arange(6)
    names = vars(losses) | dict(
        x0=x0, eps=eps, eps_s=eps_s, network=network, ema=ema, c=c, null=null, mean=torch.mean
    )
    names["times"] = losses.sample_times(z, u, everywhere, mu=0.4, tau=0.8)
    exec(block, names)
    draws = losses.Draws(z, u, eps, eps_s, everywhere)
    objective = losses.SelfE(Function(network), Function(ema))
    total, _ = objective(x0, c, null, None, torch.zeros(6, dtype=torch.bool), draws, tau=0.8, mu=0.4)
    torch.testing.assert_close(names["loss"] / 2, total)


class Function(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.forward = function


def test_the_readme_leads_to_every_page():
    links = re.findall(r"\]\(([^)#]+)\)", TEXTS["README.md"])
    assert {page for page in PAGES if page.count("/") < 2} - {"README.md"} <= set(links)


def test_the_tests_named_in_the_long_run_exist():
    sources = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    for name in re.findall(r"\b(test_\w+[a-z])\b(?!\.py)", TEXTS["LONG_RUN.md"]):
        assert f"def {name}" in sources, name


PROGRAMS = ["train.py", "sample.py", "engine/feed.py", "experiments/evaluate.py", "experiments/tables.py"]
PROGRAMS += ["bench.py", "scale/cache.py", "toy/any_step.py", "toy/explain.py"]


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_fits_a_screen(program, monkeypatch, capsys):
    lines = help_of(program, monkeypatch, capsys).splitlines()
    assert len(lines) <= 64 and max(map(len, lines)) <= 130
