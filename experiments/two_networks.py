"""How much of Delta is the difference of two prompts, and how much that of two networks (S.2, "Implementation
Details").

    python experiments/two_networks.py runs/tables/self_e-0 --out results/two_networks.json

Self-E evaluates a prediction with the EMA under the prompt and with the trained network without it. For every
state that a run has kept, on new pictures of its data, with tau = 1 and s < t for every sample, this is the root mean
square per value of

    Delta          G_null(trained) - G_c(EMA), the paper's
    of_prompts     G_null(EMA) - G_c(EMA), what is left when one network does both
    of_networks    G_null(trained) - G_null(EMA), no prompt in it
"""

import copy
import sys
from pathlib import Path

import torch

if (
    __name__ == "__main__"
):  # started as a file: modules are found from the project's folder, not from this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import data
import losses
import sample
from engine import checkpoint, errors, machine
from model import G

FIRST = 10_000_000  # index of the first picture: no run of ours gets so far


@torch.no_grad()
def measure(state: Path, pictures: int) -> dict[str, float]:
    """The three root mean squares of one state. Raises UserError for one of a run on other data."""
    loaded = sample.load(state, torch.device("cpu"))
    if loaded.config.get("data") not in [[name] for name in data.SETS]:
        raise errors.UserError(
            f"{state} was trained on {loaded.config.get('data')}; new pictures can be made of the "
            f"built-in shapes alone ({', '.join(data.SETS)})"
        )
    ema, network = loaded.network, copy.deepcopy(loaded.network)
    checkpoint.load_weights(state / "network.safetensors", network)
    source = data.Shapes(loaded.config["side"], loaded.config["data"][0])
    samples = [source.sample(FIRST + i) for i in range(pictures)]
    x0 = loaded.autoencoder.encode(data.to_tensor([s.picture for s in samples]))
    c = loaded.text([s.caption for s in samples])
    null = tuple(a.expand(pictures, *a.shape[1:]) for a in loaded.text([""]))
    draws = losses.draw(0, FIRST, list(range(pictures)), x0.shape[1:], p_equal=0.0)
    t, s = losses.sample_times(draws.z, draws.u, draws.below, loaded.config["mu"], tau=1.0)
    x0_hat = G(network, losses.add_noise(x0, t, draws.eps), t, s, c)
    x_s_hat = losses.add_noise(x0_hat, s, draws.eps_s)
    null_trained, null_ema = G(network, x_s_hat, s, s, null), G(ema, x_s_hat, s, s, null)
    c_ema = G(ema, x_s_hat, s, s, c)
    gaps = {
        "Delta": null_trained - c_ema,
        "of_prompts": null_ema - c_ema,
        "of_networks": null_trained - null_ema,
    }
    return {name: round(gap.square().mean().sqrt().item(), 4) for name, gap in gaps.items()}


def main() -> None:
    parser = errors.Parser(
        "experiments/two_networks.py", "How much of Delta is the difference of two networks."
    )
    parser.add_argument("run", metavar="RUN", type=Path, help="a run on the built-in shapes, with milestones")
    parser.add_argument("--pictures", metavar="N", type=int, default=256, help="new pictures (default: 256)")
    parser.add_argument("--out", metavar="FILE", type=errors.file_to_write, help="write the figures as JSON")
    args = parser.parse_args()
    parser.check_ranges(args, pictures=(1, 2**16))
    states = checkpoint.complete_states(args.run)
    if not states:
        raise errors.UserError(f"{args.run} holds no states of a run")
    report = machine.provenance(torch.device("cpu")) | {"pictures": args.pictures, "states": []}
    for state in states:
        report["states"].append({"step": checkpoint.step_of(state)} | measure(state, args.pictures))
        print(*(f"{name} {value}" for name, value in report["states"][-1].items()))
    if args.out:
        checkpoint.write_json(args.out, report)


if __name__ == "__main__":
    errors.run(main)
