"""Our network beside two other implementations of FLUX, and the sampler beside bare forward passes, in one run.

    python engine/peer_speed.py --reference flux                                      # the laptop model
    python engine/peer_speed.py --size 0.5b --blocks 1 1 --batch 4 --reference flux   # two blocks of the 0.5B model

The others are diffusers' FluxTransformer2DModel and the reference code, black-forest-labs/flux. The reference code is
read from --reference, a checkout of that repository; nothing of it is kept here, and without the flag its column is
left out. All have the same widths, heads, blocks, tokens, text and vector sizes, and no guidance embedding. Ours has
one embedder more, `gap_in`. Whether the rest is the same network is checked before anything is timed: parameters are
counted, and the reference code's weights, put into ours, must give its output.

Timed, in turns: forward + backward of each, as it is and with torch.compile on each block. Then, without --blocks, the
sampler: a step with guidance evaluates prompt and null prompt in one batch, so N steps for half the batch are set
against N bare forward passes of the whole batch. Prints and, with --out, writes as JSON.
"""

import functools
import importlib
import sys
import types
from pathlib import Path

if (
    __name__ == "__main__"
):  # started as a file: modules are found from the project's folder, not from this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from einops import rearrange
from torch import nn

import losses
import model
import sampler
from engine import benchmark, checkpoint, errors, limits, machine
from engine.benchmark import Setting

GUIDANCE = 5.0  # the paper's
STEPS = (4, 8)


# ------------------------------------------------------------------------------------------------------------
# The networks
# ------------------------------------------------------------------------------------------------------------
def reference_module(folder: Path):
    """The module flux.model of a checkout of black-forest-labs/flux. Raises UserError when it is not to be had."""
    package = folder / "src" / "flux"
    if not (package / "model.py").is_file():
        raise errors.UserError(f"--reference: no src/flux/model.py in {folder}")
    flux = types.ModuleType("flux")
    flux.__path__ = [str(package)]  # where Python looks for flux.model, flux.math and flux.modules
    sys.modules["flux"] = flux
    try:
        return importlib.import_module("flux.model")
    except ImportError as error:
        raise errors.UserError(f"--reference: {error}") from error


def reference_flux(setting: Setting, folder: Path):
    """The reference network of the same size, and how to call it with our inputs."""
    size, device = setting.size, setting.device
    values = size["channels"] * size["patch"] ** 2
    code = reference_module(folder)
    flux = code.Flux(
        code.FluxParams(
            in_channels=values,
            out_channels=values,
            vec_in_dim=size["vec_dim"],
            context_in_dim=size["txt_dim"],
            hidden_size=size["width"],
            mlp_ratio=4.0,
            num_heads=size["heads"],
            depth=size["double"],
            depth_single_blocks=size["single"],
            axes_dim=list(size["axes"]),
            theta=10_000,
            qkv_bias=True,
            guidance_embed=False,
        )
    ).to(device)
    img_ids = benchmark.positions(setting).repeat(setting.batch, 1, 1)
    txt_ids = torch.zeros(setting.batch, setting.text_tokens, 3, device=device)

    def call(tokens, t, txt, vec):
        with torch.autocast(device.type, setting.precision, enabled=setting.precision != torch.float32):
            return flux(img=tokens, img_ids=img_ids, txt=txt, txt_ids=txt_ids, timesteps=t, y=vec)

    return flux, call


def made_up_inputs(setting: Setting) -> tuple:
    """x_t and t for our network, the same x_t as tokens for the others, and the condition (txt, vec)."""
    x, c, *_ = benchmark.made_up_batch(setting)
    p = setting.size["patch"]
    tokens = rearrange(x, "b c (h ph) (w pw) -> b (h w) (c ph pw)", ph=p, pw=p).contiguous()
    return x, torch.rand(setting.batch, device=setting.device), tokens, c


def contestants(setting: Setting, reference: Path | None, inputs: tuple) -> dict:
    """name -> (network, a function without arguments that makes its forward pass on the inputs).

    Raises UserError when there is neither diffusers nor reference code.
    """
    x, t, tokens, c = inputs
    network = model.Denoiser(**setting.size, precision=setting.precision).to(setting.device)
    found = {"ours": (network, functools.partial(network, x, t, t, *c))}
    builders = {
        "diffusers": benchmark.diffusers_flux(setting),
        "reference": reference_flux(setting, reference) if reference else None,
    }
    for name, built in builders.items():
        if built is not None:
            flux, call = built
            found[name] = flux, functools.partial(call, tokens, t, *c)
    if len(found) == 1:
        raise errors.UserError("nothing to compare with: install diffusers, or name --reference")
    return found


def count(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def check(setting: Setting, reference: Path | None) -> dict[str, int]:
    """The parameters of each network, and those of our `gap_in`; in fp32, whatever is timed.

    Raises UserError when one is not our network without `gap_in`, by the count, or (reference code) by its output.
    """
    setting = setting._replace(precision=torch.float32)
    found = contestants(setting, reference, made_up_inputs(setting))
    ours, forward = found["ours"]
    counts = {name: count(network) for name, (network, _) in found.items()}
    gap = count(ours.gap_in)
    for name in counts.keys() - {"ours"}:
        if counts[name] != counts["ours"] - gap:
            raise errors.UserError(
                f"{name} has {counts[name]:,} parameters, ours without gap_in "
                f"{counts['ours'] - gap:,}: not the same network"
            )
    if "reference" in found:
        theirs, their_forward = found["reference"]
        different = ours.load_state_dict(theirs.state_dict(), strict=False)
        if different.unexpected_keys or any(
            not name.startswith("gap_in.") for name in different.missing_keys
        ):
            raise errors.UserError("the reference code's parameters have other names than ours")
        nn.init.zeros_(ours.gap_in.out_layer.weight)  # its bias is zero already
        with torch.no_grad():
            p = ours.patch
            expected, out = (
                their_forward(),
                rearrange(forward(), "b c (h ph) (w pw) -> b (h w) (c ph pw)", ph=p, pw=p),
            )
        error = ((out - expected).norm() / expected.norm()).item()
        if not error < 1e-4:
            raise errors.UserError(
                f"with the reference code's weights our output is {error:.1e} away from its own"
            )
    return counts | {"gap_in": gap}


# ------------------------------------------------------------------------------------------------------------
# What is timed
# ------------------------------------------------------------------------------------------------------------
def forward_backward(network: nn.Module, forward) -> None:
    forward().float().square().mean().backward()
    network.zero_grad(set_to_none=True)


def compile_blocks(network: nn.Module) -> None:
    """torch.compile each block; the blocks are what all three networks keep in lists."""
    for blocks in network.children():
        for block in blocks if isinstance(blocks, nn.ModuleList) else ():
            block.compile(dynamic=False)


def against_peers(setting: Setting, reference: Path | None, modes: tuple, repeats: int) -> dict:
    """Seconds of forward + backward by mode ("eager", "compiled") and network, all in turns, and what ours takes of
    the others' time, by mode."""
    inputs, works = made_up_inputs(setting), {}
    for mode in modes:
        for name, (network, forward) in contestants(setting, reference, inputs).items():
            if mode == "compiled":
                compile_blocks(network)
            works[mode, name] = functools.partial(forward_backward, network, forward)
    medians = benchmark.in_turns(works, setting.device, repeats)
    peers = {mode: {name: t for (m, name), t in medians.items() if m == mode} for mode in modes}
    to_faster = {mode: t["ours"] / min(t[name] for name in t if name != "ours") for mode, t in peers.items()}
    to_diffusers = {mode: t["ours"] / t["diffusers"] for mode, t in peers.items() if "diffusers" in t}
    return peers | {"ratio to diffusers": to_diffusers, "ratio to the faster": to_faster}


def against_forwards(setting: Setting, repeats: int) -> dict:
    """Seconds of N steps with guidance for half the batch, and of N bare forward passes of the whole batch."""
    network = model.Denoiser(**setting.size, precision=setting.precision).to(setting.device)
    x, c, null, *_ = benchmark.made_up_batch(setting)
    half, t = setting.batch // 2, torch.rand(setting.batch, device=setting.device)
    noise, c_half, null_half = x[:half], tuple(a[:half] for a in c), tuple(a[:half] for a in null)
    mu = losses.mu_of_length(setting.image_tokens)

    def steps(n: int) -> None:
        for _ in sampler.trajectory(network, noise, c_half, null_half, steps=n, mu=mu, guidance=GUIDANCE):
            pass

    @torch.no_grad()
    def forwards(n: int) -> None:
        for _ in range(n):
            network(x, t, t, *c)

    works = {(n, work.__name__): functools.partial(work, n) for n in STEPS for work in (steps, forwards)}
    medians = benchmark.in_turns(works, setting.device, repeats)
    rows = {
        str(n): {
            "steps": medians[n, "steps"],
            "forwards": medians[n, "forwards"],
            "ratio": medians[n, "steps"] / medians[n, "forwards"],
        }
        for n in STEPS
    }
    return {"batch": half, "guidance": GUIDANCE} | rows


# ------------------------------------------------------------------------------------------------------------
# The command
# ------------------------------------------------------------------------------------------------------------
def parse_arguments():
    parser = errors.Parser(
        "engine/peer_speed.py", "Measure our network beside other implementations of FLUX."
    )
    parser.set_defaults(
        side=None, txt_len=None, compile=False, recompute=0
    )  # what benchmark.setting_of reads, too
    a = parser.add_argument
    a(
        "--reference",
        metavar="DIR",
        type=Path,
        help="a checkout of black-forest-labs/flux (default: left out)",
    )
    a("--size", default="laptop", choices=list(model.SIZES), help="which model (default: laptop)")
    a("--blocks", metavar="N", type=int, nargs=2, help="double and single blocks instead of the size's own")
    a("--batch", metavar="N", type=int, default=32, help="pictures a step, even (default: 32)")
    a(
        "--precision",
        default="auto",
        choices=("auto", "fp32", "bf16"),
        help="inside the networks (default: the faster)",
    )
    a("--repeats", metavar="N", type=int, default=15, help="measured rounds (default: 15)")
    a("--device", metavar="NAME", default="auto", help="cuda, mps, cpu (default: the best there is)")
    a("--out", metavar="FILE", type=errors.file_to_write, help="write the figures as JSON")
    args = parser.parse_args()
    parser.check_ranges(
        args, batch=limits.RANGES["batch_size"], blocks=limits.MODEL["double"], repeats=(1, 10**6)
    )
    if args.batch % 2 or sum(args.blocks or [1]) < 1:
        parser.error("--batch must be even, and there must be a block")
    return args


def print_report(report: dict) -> None:
    double, single = report["blocks"]
    print(
        f"{report['size']} ({double} + {single} blocks), batch {report['batch']}, {report['image_tokens']} + "
        f"{report['text_tokens']} tokens, {report['precision']}, on {report['hardware']}"
    )
    counts, peers = report["parameters"], report["peers"]
    modes = [mode for mode in peers if not mode.startswith("ratio")]
    print(f"{'forward + backward, ms':24}" + "".join(f"{mode:>10}" for mode in modes) + f"{'parameters':>14}")
    for name in peers["eager"]:
        print(
            f"{name:24}"
            + "".join(f"{peers[mode][name] * 1e3:10.1f}" for mode in modes)
            + f"{counts[name]:14,}"
            + (f"  ({counts['gap_in']:,} of them gap_in)" if name == "ours" else "")
        )
    for ratio, label in (
        ("ratio to diffusers", "ours / diffusers"),
        ("ratio to the faster", "ours / the faster"),
    ):
        if peers[ratio]:
            print(f"{label:24}" + "".join(f"{peers[ratio][mode]:10.2f}" for mode in modes))
    for n in STEPS if "sampling" in report else ():
        row = report["sampling"][str(n)]
        print(
            f"{n} steps with guidance, batch {report['sampling']['batch']}: {row['steps'] * 1e3:.1f} ms; {n} forward "
            f"passes of twice the batch: {row['forwards'] * 1e3:.1f} ms (ratio {row['ratio']:.3f})"
        )


def main() -> None:
    args = parse_arguments()
    machine.keep_freed_memory()
    setting = benchmark.setting_of(args)
    torch.manual_seed(0)
    counts = check(setting, args.reference)
    compiles, why = machine.compile_works(setting.device)
    if not compiles:
        print(f"not compiled: {why}")
    machine.allow_shapes(64)
    report = machine.provenance(setting.device) | {
        "size": args.size,
        "blocks": [setting.size["double"], setting.size["single"]],
        "batch": setting.batch,
        "image_tokens": setting.image_tokens,
        "text_tokens": setting.text_tokens,
        "precision": str(setting.precision).removeprefix("torch."),
        "repeats": args.repeats,
        "parameters": counts,
        "peers": against_peers(
            setting, args.reference, ("eager", "compiled") if compiles else ("eager",), args.repeats
        ),
    }
    if not args.blocks:  # a whole model
        report["sampling"] = against_forwards(setting, args.repeats)
    print_report(report)
    if args.out:
        checkpoint.write_json(args.out, report)


if __name__ == "__main__":
    errors.run(main)
