"""Results that last: a JSON file for each program, with all that made it; and the tables that programs print.

out = kept.folder(args.out, usual=args.seed == 0)            # where pages look, or runs/toy-results
results = kept.opened(out / "name.json", seed=0, scale=2.0)  # what an earlier call has measured, or nothing yet
"""

import json
from pathlib import Path

import numpy as np

from engine import checkpoint, errors

ROOT = Path(__file__).resolve().parents[1]


def folder(out: Path | None, usual: bool = True) -> Path:
    """Where results go: `out`; else toy/results, or runs/toy-results where the settings are not those that pages show.

    Raises UserError for a file.
    """
    out = out or ROOT / ("toy/results" if usual else "runs/toy-results")
    if out.exists() and not out.is_dir():
        raise errors.UserError(f"--out must be a folder; {out} is a file")
    out.mkdir(parents=True, exist_ok=True)
    return out


def opened(path: Path, **settings) -> dict:
    """What PATH holds of an earlier call with the same settings, which then goes on; else the settings alone.

    Raises UserError where PATH has other settings, or is another program's.
    """
    settings = json.loads(json.dumps(settings))  # tuples become lists
    kept = checkpoint.read_json(path) if path.exists() else settings
    if not isinstance(kept, dict) or not settings.items() <= kept.items():
        raise errors.UserError(f"{path} holds results of other settings: choose another --out")
    return kept


def table(title: str, columns: list[str], rows: dict[str, list]) -> str:
    """Mean and standard deviation over seeds; rows: label -> for each column its values [seeds]."""
    lines = [f"\n{title:34s}" + "".join(f"{column:>17s}" for column in columns)]
    for label, cells in rows.items():
        bars = [f" ±{np.std(values, ddof=1):6.4f}" if len(values) > 1 else "" for values in cells]
        lines.append(f"{label:34s}" + "".join(f"{np.mean(v):9.4f}{bar:8s}" for v, bar in zip(cells, bars)))
    return "\n".join(lines)
