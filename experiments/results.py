"""Results: the rows of each point, kept apart in `runs/experiments/NAME/` until all are joined in `results.csv`."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from dynlight.durable import draft_of, write_text
from dynlight.experts import paired_margin
from dynlight.report import bits_per_byte
from experiments.grid import folder_of, key_of, points

RUNS = Path("runs/experiments")
FOUND, END = "<!-- what was found: python -m experiments figure -->", "<!-- end -->"


def path_of(name: str, point: dict[str, Any], small: bool = False) -> Path:
    """Where the rows of a point are kept."""
    return RUNS / (f"{name}-small" if small else name) / f"{key_of(point)}.csv"


def keep(name: str, point: dict[str, Any], rows: pd.DataFrame, small: bool = False) -> None:
    """Writes the rows of a point, with its settings in front: all of them or, if it is cut short, none."""
    path = path_of(name, point, small)
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {setting: [str(value)] * len(rows) for setting, value in point.items()}
    with draft_of(path) as draft:
        pd.concat([pd.DataFrame(columns, index=rows.index), rows], axis=1).to_csv(draft, index=False)


def join(name: str, small: bool = False) -> pd.DataFrame:
    """Joins what is there of all points, in the order of the grid, and writes `results.csv` unless it is small."""
    paths = [path_of(name, point, small) for point in points(name)]
    found = [pd.read_csv(path) for path in paths if path.exists()]
    if not found:
        return pd.DataFrame()
    rows = pd.concat(found, ignore_index=True)
    if not small:
        with draft_of(folder_of(name) / "results.csv") as draft:
            rows.to_csv(draft, index=False)
    return rows


def load(name: str) -> pd.DataFrame:
    """The committed results."""
    return pd.read_csv(folder_of(name) / "results.csv")


def note(name: str, found: str) -> None:
    """Puts what was found into `notes.md`, in place of what was found before."""
    path = folder_of(name) / "notes.md"
    before, _, rest = path.read_text("utf-8").partition(FOUND)
    _, _, after = rest.partition(END)
    write_text(path, f"{before}{FOUND}\n{found}\n{END}{after}")


def totals(rows: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """Bits per byte, FLOPs and seconds per token of each group of rows, in the order in which they come."""
    sums = rows.groupby(list(by), sort=False, dropna=False).agg(
        {"nats": "sum", "bytes": "sum", "tokens": "sum", "flops": "sum", "seconds": "sum", "rate": "first"}
    )
    return pd.DataFrame(
        {
            "bits_per_byte": bits_per_byte(sums.nats.to_numpy(), sums.bytes.to_numpy()),
            "flops_per_token": sums.flops / sums.tokens,
            "seconds_per_token": sums.seconds / sums.tokens,
            "rate": sums.rate,
            "tokens": sums.tokens,
        },
        index=sums.index,
    ).reset_index()


def margin(worse: pd.DataFrame, better: pd.DataFrame) -> tuple[float, float | None, float | None]:
    """By how many bits per byte `better` is below `worse`, with its 95% interval, paired by document."""
    worse, better = (rows.groupby("document")[["nats", "bytes"]].sum() for rows in (worse, better))
    both = worse.index.intersection(better.index)
    bits = (worse.nats[both] - better.nats[both]).to_numpy() / math.log(2)
    return paired_margin(bits, better.bytes[both].to_numpy())


def said(margin: tuple[float, float | None, float | None]) -> str:
    """A margin in words: `0.123 [0.100, 0.146]`."""
    middle, low, high = margin
    return f"{middle:+.3f}" if low is None else f"{middle:+.3f} [{low:+.3f}, {high:+.3f}]"


def short(value: Any) -> str:
    """A setting as it reads best: `TransformerXL(segment 64, memory 192)`, of a list of files the folder, of a path its name."""
    found = yaml.safe_load(value) if isinstance(value, str) else value
    if isinstance(found, dict):
        chosen = {key: each for key, each in found.get("init_args", {}).items() if not isinstance(each, dict)}
        told = ", ".join(f"{key} {_listed(each)}" for key, each in chosen.items())
        return f"{found['class_path']}({told})" if told else str(found["class_path"])
    if isinstance(found, list):
        return Path(found[0]).parent.name
    if isinstance(found, str) and "/" in found:
        return Path(found).name if "*" not in found else Path(found).parent.parent.name
    return "null" if found is None or found != found else str(found)


def _listed(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def beside_controls(rows: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """For each group the score in bits per byte, and how much better it is than each control, with its interval."""
    lines = []
    for key, group in rows.groupby(list(by), sort=False, dropna=False):
        of = dict(iter(group.groupby("role")))
        line: dict[str, Any] = dict(zip(by, map(short, key), strict=True))
        line["rate"] = of["adapted"].rate.iloc[0]
        for role in ("adapted", "static"):
            line[role] = float(totals(of[role], ["role"]).bits_per_byte.iloc[0])
        costs = [of[role].flops.sum() / of[role].tokens.sum() for role in ("adapted", "static")]
        line["FLOPs / static"] = round(costs[0] / costs[1], 2)
        for role in ("static", "static_equal_flops", "wrong_document"):
            line[f"gain over {role.replace('_', ' ')}"] = said(margin(of[role], of["adapted"])) if role in of else ""
        lines.append(line)
    return pd.DataFrame(lines)


def markdown(table: pd.DataFrame) -> str:
    """A table in Markdown, numbers as they are to be read."""
    lines = ["| " + " | ".join(map(str, table.columns)) + " |", "|" + "---|" * len(table.columns)]
    lines += ["| " + " | ".join(map(_cell, row)) + " |" for row in table.itertuples(index=False)]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    if math.isnan(value):
        return ""
    return f"{value:.3f}" if 0.01 <= abs(value) < 1000 else f"{value:.3g}"
