"""The flags of train.py, the recipe they make, and what config.json keeps of both.

args = arguments.parse()                # with --resume, flags that are not given come from the run that goes on
plan = arguments.plan_of(args)          # recipe.py's, with what the flags change
"""

import argparse
import sys
from pathlib import Path

import torch

import encoders
import files
import recipe
from engine import checkpoint, errors, limits, machine, optimizers
from model import SIZES
from objectives import OBJECTIVES, VARIANTS
from peers import imm, meanflow

# Flags that belong to some objectives only (objectives.Objective.flags), and their "off".
OWN = {
    "target": "renorm",
    "k": 0.9,
    "delta_scale": 1.0,
    "null_branch": "online",
    "aux_from": None,
    "imm_k": imm.K,
    "train_guidance": 1.0,
    "derivative": "difference",
    "loss_power": 1.0,
}
# What a run keeps for its whole life, and what changes the recipe.
FIXED = (
    "size",
    "objective",
    *OWN,
    "text",
    "txt_len",
    "autoencoder",
    "wrong_captions",
    "optimizer",
    "init",
    "caption_key",
)
RECIPE = (
    "steps",
    "batch_size",
    "lr",
    "side",
    "text",
    "txt_len",
    "autoencoder",
    "micro_batch",
    "wrong_captions",
    "optimizer",
)


# ------------------------------------------------------------------------------------------------------------
# The flags
# ------------------------------------------------------------------------------------------------------------
def what_is_trained(parser: argparse.ArgumentParser) -> None:
    a = parser.add_argument_group("the run").add_argument
    a("--size", default="laptop", choices=list(SIZES), help="model and recipe (default: laptop)")
    a(
        "--data",
        metavar="DIR",
        type=errors.name,
        nargs="+",
        help="one-shape, scenes, shapes, emoji, emoji-all, a folder of pictures or of tars, or caches",
    )
    a(
        "--wrong-captions",
        metavar="X",
        type=float,
        default=0.0,
        help="share of samples with the caption of another; 0 is off (default: 0)",
    )
    a(
        "--out",
        metavar="DIR",
        type=errors.name,
        default="runs/laptop",
        help="folder of the run (default: runs/laptop)",
    )
    a(
        "--init",
        metavar="DIR",
        type=errors.name,
        help="begin with the weights of another run or checkpoint (default: random ones)",
    )
    a("--resume", action="store_true", help="go on from the last state in --out, with its flags")
    a("--dry-run", action="store_true", help="print the plan, memory and price of the run and end")
    a(
        "--index",
        metavar="DIR",
        type=errors.name,
        help="folder of the index of tar shards (default: beside the tars)",
    )
    a("--caption-key", metavar="NAME", help=files.KEY_HELP)
    a("--seed", metavar="N", type=int, default=0, help="of everything random (default: 0)")
    a = parser.add_argument_group("the recipe").add_argument
    a("--steps", metavar="N", type=int, help="iterations")
    a(
        "--batch-size",
        metavar="N",
        type=int,
        help="pictures an iteration, over all processes and in all stages",
    )
    a("--lr", metavar="X", type=float, help="peak learning rate")
    a(
        "--optimizer",
        default="adam",
        choices=optimizers.OPTIMIZERS,
        help="adam (default, S.2), or muon for the blocks' matrices",
    )
    a("--side", metavar="N", type=int, help="side of the pictures in pixels, in all stages")
    a("--text", metavar="SPEC", help="frozen text encoder, see encoders.py")
    a("--txt-len", metavar="N", type=int, help="tokens that a caption is cut or padded to")
    a("--autoencoder", metavar="SPEC", help="frozen auto-encoder, see encoders.py")
    a = parser.add_argument_group("the objective (Sec. 3.3, Table 2)").add_argument
    a(
        "--objective",
        metavar="NAME",
        default="self_e",
        choices=list(OBJECTIVES),
        help=f"{', '.join(name for name in OBJECTIVES if name not in VARIANTS)} (default: self_e)",
    )
    a(
        "--target",
        default="renorm",
        choices=("renorm", "tar", "sum"),
        help="Eq. 20, Eq. 18 or Eq. 16 (default: renorm)",
    )
    a(
        "--delta-scale",
        metavar="X",
        type=float,
        default=1.0,
        help="times the self-evaluation; 0 is the control (default: 1)",
    )
    a(
        "--null-branch",
        default="online",
        choices=("online", "ema"),
        help="which network sees the null prompt: the trained one (default, S.2) or ema",
    )
    a(
        "--aux-from",
        metavar="X",
        type=float,
        help="share of the run after which the auxiliary term joins; 1 is never",
    )
    a(
        "--imm-k",
        metavar="N",
        type=int,
        default=imm.K,
        help="IMM's steps of the range of times, as a power of two (default: 12)",
    )
    a(
        "--k",
        metavar="X",
        type=float,
        default=0.9,
        help="share of the classifier term in Delta beside the auxiliary term; 0 is none (default: 0.9)",
    )
    a(
        "--train-guidance",
        metavar="W",
        type=float,
        default=1.0,
        help="scale of the guidance in the targets of peers/; 1 is off (default: 1)",
    )
    a(
        "--derivative",
        default="difference",
        choices=list(meanflow.DERIVATIVES),
        help="in MeanFlow's target: a finite difference (default) or exact, which does not compile",
    )
    a(
        "--loss-power",
        metavar="P",
        type=float,
        default=1.0,
        help="MeanFlow and TiM divide each error by its own power P; 0 is off (default: 1)",
    )


def how_it_runs(parser: argparse.ArgumentParser) -> None:
    a = parser.add_argument_group("the machine").add_argument
    a("--device", metavar="NAME", default="auto", help="cuda, mps, cpu (default: the best there is)")
    a(
        "--precision",
        default="auto",
        choices=("auto", "fp32", "bf16"),
        help="inside the network (default: the faster; fp32 where an objective takes finite differences)",
    )
    a(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="torch.compile each block (default: where it works and pays)",
    )
    a(
        "--micro-batch",
        metavar="N",
        type=int,
        help="pictures a process computes at once, at the first stage's side",
    )
    a(
        "--recompute",
        metavar="N",
        type=int,
        default=0,
        help="blocks that recompute their activations, to save memory (default: 0)",
    )
    a(
        "--zero",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="spread Adam's moments over the processes (ZeRO-1)",
    )
    a("--workers", metavar="N", type=int, default=1, help="threads that read data ahead (default: 1)")
    a = parser.add_argument_group("what is written").add_argument
    a(
        "--log-every",
        metavar="N",
        type=int,
        default=20,
        help="iterations between lines of metrics.jsonl (default: 20)",
    )
    a(
        "--grid-every",
        metavar="N",
        type=int,
        help="iterations between picture grids; 0 is off (default: ten a run, and an early one)",
    )
    a(
        "--save-every",
        metavar="N",
        type=int,
        help="iterations between states; 0 is only at the end (default: five a run, every half hour)",
    )
    a("--keep", metavar="N", type=int, default=2, help="newest states to keep (default: 2)")
    a(
        "--milestone-every",
        metavar="N",
        type=int,
        default=0,
        help="keep states at multiples of N for good; 0 is off (default: 0)",
    )


def parse(argv=None) -> argparse.Namespace:
    """The flags; with --resume, those not given are taken from the run that goes on. Raises UserError."""
    parser = errors.Parser(
        "train.py", "Train Self-E. What has no default here has it in recipe.py, by --size."
    )
    what_is_trained(parser)
    how_it_runs(parser)
    args = parser.parse_args(argv)
    if args.resume:
        path = Path(args.out) / "config.json"
        saved = limits.config(path.parent).get("arguments")
        if not isinstance(saved, dict):
            raise checkpoint.CheckpointError(f"{path} is not that of a run that train.py began")
        limits.flags(path, saved, parser)
        parser.set_defaults(**saved)
        args = parser.parse_args(argv)
        begun = parser.parse_args(["--resume"])  # the run's own flags
        try:
            check_numbers(parser, begun)
            check_choices(parser, begun)
        except errors.UserError as error:
            raise checkpoint.CheckpointError(f"{path}: {error}") from error
        for name in FIXED:
            now, then = (getattr(plan_of(a) if name in RECIPE else a, name) for a in (args, begun))
            if now != then:
                flag = name.replace("_", "-")
                parser.error(f"{args.out} was begun with --{flag} {then}; for another begin a new run")
    check_numbers(parser, args)
    check_choices(parser, args)
    return args


def refuse(flags: list[str], own: tuple[str, ...]) -> None:
    """Raise UserError for one of `own` among flags that are meant for train.py, in full or cut short."""
    for word in flags:
        name = word.partition("=")[0]
        if found := [flag for flag in own if name.startswith("-") and flag.startswith(name)]:
            raise errors.UserError(f"{found[0]} is this program's to choose: leave out {word}")


def check_numbers(parser: errors.Parser, args: argparse.Namespace) -> None:
    """Raise UserError for a whole number out of its range."""
    parser.check_ranges(args, **limits.RANGES)
    for name in ("batch_size", "micro_batch"):
        if getattr(args, name) is not None and getattr(args, name) % 2:
            parser.error(f"--{name.replace('_', '-')} must be even: every second sample has s < t (s.13)")


def check_choices(parser: errors.Parser, args: argparse.Namespace) -> None:
    """Raise UserError for a number out of its range, or for flags that do not go together."""
    if args.lr is not None and not 0 < args.lr < 1:
        parser.error("--lr must lie between 0 and 1")
    if args.zero and args.optimizer == "muon":
        parser.error("--zero spreads the moments of Adam; it does not go with --optimizer muon")
    if not 0 <= args.wrong_captions <= 1:
        parser.error("--wrong-captions is a share of the samples, between 0 and 1")
    if not 0 <= args.delta_scale < float("inf"):
        parser.error("--delta-scale must be a number from 0 up")
    if not 0 <= args.k <= 1:
        parser.error("--k is a share of Delta, between 0 and 1")
    if not 0 < args.train_guidance <= 100:
        parser.error("--train-guidance must be a number above 0, at most 100")
    if args.derivative == "forward":
        if args.compile:
            parser.error(
                "--derivative forward does not go with --compile: compiled blocks have no forward derivative"
            )
        args.compile = False
    if not 0 <= args.loss_power <= 1:
        parser.error("--loss-power must lie between 0 and 1")
    if args.aux_from is not None and not 0 <= args.aux_from <= 1:
        parser.error("--aux-from is a share of the run, between 0 and 1")
    foreign = [
        name
        for name, off in OWN.items()
        if name not in OBJECTIVES[args.objective].flags
        and getattr(args, name) != off
        and (name, args.aux_from) != ("aux_from", 1)
    ]
    if foreign:
        owners = [name for name, objective in OBJECTIVES.items() if foreign[0] in objective.flags]
        parser.error(
            f"--{foreign[0].replace('_', '-')} is a choice of {' and '.join(owners)}; "
            f"{args.objective} has none of it"
        )


# ------------------------------------------------------------------------------------------------------------
# What follows from them
# ------------------------------------------------------------------------------------------------------------
def plan_of(args: argparse.Namespace) -> recipe.Recipe:
    """The recipe of --size with what the flags change."""
    objective = OBJECTIVES[args.objective]
    changes = {name: getattr(args, name) for name in RECIPE} | {"group": objective.group}
    if args.train_guidance != 1:  # guidance is in the target: none at sampling
        changes |= {"guided": objective.guided, "guidance": 1.0}
    aux_from = args.aux_from if "aux_from" in objective.flags else 1.0  # the others have no auxiliary term
    return recipe.make(args.size, data=args.data and tuple(args.data), aux_from=aux_from, **changes)


def sizes_of(args: argparse.Namespace) -> dict:
    """The entries of model.SIZES of a run, and the time features that its objective needs."""
    factor = OBJECTIVES[args.objective].time_factor
    return SIZES[args.size] | ({"time_factor": factor} if factor != 1000 else {})  # FLUX's is Denoiser's own


def config_of(
    args: argparse.Namespace, plan: recipe.Recipe, sizes: dict, precision: torch.dtype, device: torch.device
) -> dict:
    """What config.json says of a run, but for the size of its pictures."""
    return {
        "format": 1,
        "size": args.size,
        "model": sizes,
        "objective": args.objective,
        "target": args.target,
        "delta_scale": args.delta_scale,
        "null_branch": args.null_branch,
        "aux_from": plan.aux_from,
        "imm_k": args.imm_k,
        "k": args.k,
        "train_guidance": args.train_guidance,
        "derivative": args.derivative,
        "loss_power": args.loss_power,
        "text_encoder": encoders.canonical(plan.text),
        "txt_len": plan.txt_len,
        "autoencoder": encoders.canonical(plan.autoencoder),
        "data": list(plan.data),
        "wrong_captions": plan.wrong_captions,
        "s_rule": OBJECTIVES[args.objective].s_rules[0],
        "eta": 1.0,  # S.3.1
        "guidance": plan.guidance,
        "guidance_space": "v",
        "steps": plan.steps,
        "batch_size": plan.stages[0].batch_size,
        "lr": plan.lr,
        "seed": args.seed,
        "optimizer": plan.optimizer,
        "precision": str(precision).removeprefix("torch."),
        "machine": machine.describe(device),
        "command": " ".join(["python train.py", *sys.argv[1:]]),
        "arguments": {k: v for k, v in vars(args).items() if k not in ("out", "resume", "device", "dry_run")},
    }
