"""engine/peer_speed.py: that equal things are compared, and what is timed. Times themselves are not tested."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import model
from engine import benchmark, errors, machine, peer_speed

ROOT = Path(__file__).parent.parent
SMALL = dict(width=32, heads=2, double=1, single=2, axes=(4, 6, 6), channels=3, patch=2, txt_dim=8, vec_dim=6)
SETTING = benchmark.Setting(torch.device("cpu"), torch.float32, SMALL, 4, (3, 4, 6), 6, 5, False, 0)

# Behind the reference code's interface: our blocks, with rotations from the positions that it is given.
STAND_IN = """
from dataclasses import dataclass

import torch

import model


@dataclass
class FluxParams:
    in_channels: int
    out_channels: int
    vec_in_dim: int
    context_in_dim: int
    hidden_size: int
    mlp_ratio: float
    num_heads: int
    depth: int
    depth_single_blocks: int
    axes_dim: list
    theta: int
    qkv_bias: bool
    guidance_embed: bool


class Flux(model.Denoiser):
    def __init__(self, p):
        assert (p.mlp_ratio, p.qkv_bias, p.guidance_embed, p.out_channels) == (4, True, False, p.in_channels)
        super().__init__(p.hidden_size, p.num_heads, p.depth, p.depth_single_blocks, p.axes_dim, p.in_channels, 1,
                         p.context_in_dim, p.vec_in_dim)
        del self.gap_in
        self.theta = float(p.theta)
        for q in self.parameters():
            torch.nn.init.normal_(q, 0, 0.3)

    def forward(self, img, img_ids, txt, txt_ids, timesteps, y, guidance=None):
        assert img_ids.shape == (*img.shape[:2], 3) and txt_ids.shape == (*txt.shape[:2], 3)
        place = torch.cat([txt_ids, img_ids], dim=1)[0].double()
        angles = torch.cat([place[:, i, None] / self.theta ** (torch.arange(0, n, 2) / n)
                            for i, n in enumerate(self.axes)], dim=1)
        rope = torch.stack([angles.cos(), angles.sin()]).float()
        vec = self.time_in(model.sinusoid(timesteps)) + self.vector_in(y)
        img, txt = self.img_in(img), self.txt_in(txt)
        for block in self.double_blocks:
            img, txt = block(img, txt, vec, rope)
        x = torch.cat([txt, img], dim=1)
        for block in self.single_blocks:
            x = block(x, vec, rope)
        return self.final_layer(x[:, txt.shape[1]:], vec)
"""


@pytest.fixture
def reference(tmp_path):
    """A function that writes the stand-in, with some of its text replaced, as a checkout; returns the folder."""

    def write(old: str = "", new: str = "") -> Path:
        assert old in STAND_IN
        (tmp_path / "src" / "flux").mkdir(parents=True)
        (tmp_path / "src" / "flux" / "model.py").write_text(STAND_IN.replace(old, new) if old else STAND_IN)
        return tmp_path

    yield write
    for name in [name for name in sys.modules if name.split(".")[0] == "flux"]:
        del sys.modules[name]


# ------------------------------------------------------------------------------------------------------------
# Equal networks
# ------------------------------------------------------------------------------------------------------------
def test_all_three_have_the_same_parameters_but_for_gap_in(reference):
    torch.manual_seed(0)
    d, gap = 32, 256 * 32 + 32 + 32 * 32 + 32
    blocks = [
        12 * d**2 + 12 * d + 2 * (12 * d**2 + 9 * d + 16 * 2) for _ in range(1)
    ]  # modulation, the two streams
    blocks += [3 * d**2 + 3 * d + 12 * d**2 + 8 * d + 16 * 2 for _ in range(2)]
    ends = (
        (256 * d + d)
        + (6 * d + d)
        + 2 * (d**2 + d)
        + (12 * d + d)
        + (8 * d + d)
        + 2 * (d**2 + d)
        + (12 * d + 12)
    )
    expected = sum(blocks) + ends
    counts = peer_speed.check(SETTING, reference())
    assert counts == {"ours": expected + gap, "diffusers": expected, "reference": expected, "gap_in": gap}


@pytest.mark.parametrize(
    "old, new, complaint",
    [
        ("del self.gap_in", "pass", "not the same network"),
        (
            "super().__init__(p.hidden_size, p.num_heads, p.depth,",
            "super().__init__(p.hidden_size, p.num_heads, 2,",
            "not",
        ),
        (
            "self.theta = float",
            "self.image_in, self.theta = self.__delattr__('img_in') or torch.nn.Linear(12, 32), float",
            "other names",
        ),
        ("dim=1)[0].double()", "dim=1)[0, :, [0, 2, 1]].double()", "away from"),  # rows for columns
        ("model.sinusoid(timesteps)", "model.sinusoid(1 - timesteps)", "away from"),
        ("float(p.theta)", "1000.0", "away from"),
        ("import torch\n", "import torch, no_such_package\n", "no_such_package"),
    ],
)
def test_another_network_is_refused(reference, old, new, complaint):
    torch.manual_seed(0)
    with pytest.raises(errors.UserError, match=complaint):
        peer_speed.check(SETTING, reference(old, new))


def test_a_diffusers_of_another_size_is_refused(monkeypatch):
    real, other = benchmark.diffusers_flux, SETTING._replace(size=SMALL | {"vec_dim": 7})
    monkeypatch.setattr(benchmark, "diffusers_flux", lambda setting: real(other))
    with pytest.raises(errors.UserError, match="diffusers has .* not the same network"):
        peer_speed.check(SETTING, None)


def test_without_a_peer_there_is_nothing_to_compare(monkeypatch):
    monkeypatch.setattr(benchmark, "diffusers_flux", lambda setting: None)
    with pytest.raises(errors.UserError, match="nothing to compare"):
        peer_speed.check(SETTING, None)


# ------------------------------------------------------------------------------------------------------------
# What is timed
# ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("faster", ["diffusers", "reference"])
def test_the_peers_take_turns_in_whole_backward_passes(reference, monkeypatch, faster):
    """Every parameter receives a gradient and keeps none, the compiled networks have compiled blocks, and the ratios
    are those of the seconds."""
    seconds = {"ours": 1.0, "diffusers": 4.0, "reference": 4.0} | {faster: 2.0}
    factor = {"eager": 1.0, "compiled": 0.5}

    def in_turns(works, device, repeats):
        assert list(works) == [(mode, name) for mode in factor for name in seconds] and repeats == 3
        for (mode, name), work in works.items():
            network = work.args[0]
            reached = []
            for parameter in network.parameters():
                parameter.register_post_accumulate_grad_hook(lambda p: reached.append(id(p)))
            blocks = [m for m in network.modules() if m._compiled_call_impl is not None]
            assert len(blocks) == (3 if mode == "compiled" else 0)
            work()
            assert sorted(reached) == sorted(map(id, network.parameters()))
            assert all(p.grad is None for p in network.parameters())
        return {(mode, name): seconds[name] * factor[mode] for mode, name in works}

    monkeypatch.setattr(benchmark, "in_turns", in_turns)
    with torch.compiler.set_stance("force_eager"):  # compiled blocks run, but nothing is built
        peers = peer_speed.against_peers(SETTING, reference(), ("eager", "compiled"), 3)
    assert peers["eager"] == seconds and peers["compiled"] == {name: t / 2 for name, t in seconds.items()}
    assert peers["ratio to the faster"] == {"eager": 0.5, "compiled": 0.5}
    assert peers["ratio to diffusers"] == {mode: 1 / seconds["diffusers"] for mode in factor}


def test_n_steps_are_set_against_as_many_evaluations_of_as_many_rows(monkeypatch):
    def in_turns(works, device, repeats):
        for (n, _), work in works.items():
            rows.clear()
            work()
            assert rows == [(SETTING.batch, False)] * n
        return {key: 10.0 + i for i, key in enumerate(works)}

    rows = []
    hook = torch.nn.modules.module.register_module_forward_pre_hook(
        lambda module, x: (
            rows.append((len(x[0]), torch.is_grad_enabled())) if isinstance(module, model.Denoiser) else None
        )
    )
    monkeypatch.setattr(benchmark, "in_turns", in_turns)
    sampling = peer_speed.against_forwards(SETTING, 1)
    hook.remove()
    assert sampling["batch"] == SETTING.batch // 2 and sampling["guidance"] != 1
    assert [sampling[n]["ratio"] for n in ("4", "8")] == [10 / 11, 12 / 13]


# ------------------------------------------------------------------------------------------------------------
# The command
# ------------------------------------------------------------------------------------------------------------
FLAGS = ["--batch", "2", "--repeats", "1", "--device", "cpu", "--precision", "fp32"]


@pytest.mark.parametrize("blocks", [[], ["--blocks", "1", "0"]])
def test_without_a_reference_or_a_compiler_their_columns_are_left_out(blocks, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(machine, "compile_works", lambda device: (False, "no compiler"))
    monkeypatch.setattr(sys, "argv", ["peer_speed.py", *FLAGS, *blocks, "--out", str(tmp_path / "p.json")])
    peer_speed.main()
    report, printed = json.loads((tmp_path / "p.json").read_text()), capsys.readouterr().out
    assert "not compiled: no compiler" in printed and "reference" not in printed
    assert report["peers"].keys() == {"eager", "ratio to diffusers", "ratio to the faster"}
    assert report["peers"]["eager"].keys() == {"ours", "diffusers"}
    assert (
        ("sampling" in report) == ("steps with guidance" in printed) == (not blocks)
    )  # parts draw no pictures
    assert (report["image_tokens"], report["text_tokens"], report["batch"]) == (16, 14, 2)


@pytest.mark.slow
def test_all_columns_as_a_user_measures_them(tmp_path, reference):
    result = subprocess.run(
        [
            sys.executable,
            "engine/peer_speed.py",
            *FLAGS,
            "--reference",
            str(reference()),
            "--out",
            str(tmp_path / "p.json"),
        ],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "p.json").read_text())
    peers = report["peers"]
    for mode in ("eager", "compiled"):
        assert peers[mode].keys() == {"ours", "diffusers", "reference"} and min(peers[mode].values()) > 0
    for n in (4, 8):
        assert (
            report["sampling"][str(n)]["steps"] > 0 and f"{n} steps with guidance, batch 1:" in result.stdout
        )


@pytest.mark.parametrize(
    "flags",
    [
        ["--batch", "3"],
        ["--out", "/nowhere/at/all.json"],
        ["--blocks", "0", "0"],
        ["--reference", "/nowhere"],
    ],
)
def test_bad_input_is_one_line(flags, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["peer_speed.py", "--device", "cpu", "--precision", "fp32", *flags])
    with pytest.raises(SystemExit) as stopped:
        errors.run(peer_speed.main)
    assert stopped.value.code == 2 and len(capsys.readouterr().err.strip().splitlines()) == 1
