"""Results: the rows of each point, kept apart in `runs/experiments/NAME/` until all are joined in `results.csv`."""

import math
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from filelock import FileLock, Timeout

from dynlight.durable import draft_of, write_text
from dynlight.recording.report.rates import paired_margin
from dynlight.recording.report.ratios import bits_per_byte
from experiments.grid import FOLDER, Scale, folder_of, key_of, points

RUNS = Path("runs/experiments")
COMMITTED = "books"  # the scale of results.csv
Margin = tuple[float, float | None, float | None]  # with the ends of its interval, which a single document has none of
FOUND, END = "<!-- what was found: python -m experiments figure -->", "<!-- end -->"


def path_of(name: str, point: dict[str, Any], scale: Scale) -> Path:
    """Where the rows of a point are kept."""
    folder = name if scale.name == COMMITTED else f"{name}-{scale.name}"
    return RUNS / folder / f"{key_of(name, point, scale)}.csv"


def is_done(name: str, point: dict[str, Any], scale: Scale, since: float | None = None) -> bool:
    """Whether the rows of a point are kept, or among the committed results; or kept since then, in seconds of `time.time`."""
    path = path_of(name, point, scale)
    if since is not None:
        return path.exists() and path.stat().st_mtime >= since
    return path.exists() or path.stem in set(_before(name, scale).key)


@contextmanager
def claim(name: str, point: dict[str, Any], scale: Scale) -> Iterator[bool]:
    """Whether the point is this process's to measure: if no other one is at it. A process that dies gives up its claims."""
    lock = FileLock(path_of(name, point, scale).with_suffix(".lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def keep(name: str, point: dict[str, Any], rows: pd.DataFrame, scale: Scale, took: float) -> None:
    """Writes the rows of a point, all of them or, if it is cut short, none.

    In front stand its settings, behind its key, the commit that measured it and how many seconds that took.
    """
    path = path_of(name, point, scale)
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {setting: [str(value)] * len(rows) for setting, value in point.items()}
    rows = rows.assign(key=path.stem, commit=commit(), took=round(took))
    with draft_of(path) as draft:
        pd.concat([pd.DataFrame(columns, index=rows.index), rows], axis=1).to_csv(draft, index=False)


def join(name: str, scale: Scale) -> pd.DataFrame:
    """Joins the rows of all points that are done, in the order of the grid; those of the committed scale are `results.csv`."""
    with FileLock(RUNS / f"{name}.lock"):  # several processes may be at it
        before, found = _before(name, scale), []
        for point in points(name):
            path = path_of(name, point, scale)
            found.append(_read(path) if path.exists() else before[before.key == path.stem])
        found = [rows for rows in found if len(rows)]
        if not found:
            return pd.DataFrame()
        rows = pd.concat(found, ignore_index=True).drop_duplicates()  # at some scales two points may be one
        if scale.name == COMMITTED:
            with draft_of(folder_of(name) / "results.csv") as draft:
                rows.to_csv(draft, index=False)
        return rows


def _before(name: str, scale: Scale) -> pd.DataFrame:
    """The committed results, where the scale has any."""
    there = scale.name == COMMITTED and (folder_of(name) / "results.csv").exists()
    return load(name) if there else pd.DataFrame({"key": []})


def load(name: str) -> pd.DataFrame:
    """The committed results."""
    return _read(folder_of(name) / "results.csv")


def _read(path: Path) -> pd.DataFrame:
    return pd.read_csv(path, dtype={"key": str, "commit": str})  # they may be all digits


def commit() -> str:
    """The commit of the code that runs; with a + if the code isn't quite that."""
    head = subprocess.run(["git", "rev-parse", "--short=7", "HEAD"], capture_output=True, text=True, cwd=FOLDER)
    code = [":/dynlight", ":/experiments/**/*.py", ":/experiments/**/*.yaml"]
    changed = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", *code], capture_output=True, cwd=FOLDER)
    return head.stdout.strip() + ("+" if changed.returncode == 1 else "")


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


def margin(worse: pd.DataFrame, better: pd.DataFrame) -> Margin:
    """By how many bits per byte `better` is below `worse`, with its 95% interval, paired by document."""
    worse, better = (rows.groupby("document")[["nats", "bytes"]].sum() for rows in (worse, better))
    both = worse.index.intersection(better.index)
    bits = (worse.nats[both] - better.nats[both]).to_numpy() / math.log(2)
    return paired_margin(bits, better.bytes[both].to_numpy())


def gain(rows: pd.DataFrame, over: str = "static") -> Margin:
    """By how many bits per byte adapting is better than another role."""
    return margin(rows[rows.role == over], rows[rows.role == "adapted"])


def is_above(margin: Margin, bound: float = 0.0) -> bool | None:
    """Whether a margin is above a bound; None if its interval holds the bound, so that the documents leave it open."""
    middle, low, high = margin
    if low is None or high is None:  # of a single document
        return middle > bound
    return True if low > bound else False if high < bound else None


def word(parts: Sequence[bool | None]) -> str:
    """What the parts of a claim come to, of which each holds, does not, or (None) is left open."""
    if all(parts):
        return "holds"
    return "holds in part" if any(parts) else "left open" if None in parts else "does not hold"


def said(margin: Margin) -> str:
    """A margin in words: `0.123 [0.100, 0.146]`."""
    middle, low, high = margin
    return f"{middle:+.3f}" if low is None else f"{middle:+.3f} [{low:+.3f}, {high:+.3f}]"


def short(value: Any) -> str:
    """A setting as it reads best: `TransformerXL(segment 64, memory 192)`, of a list of files the folder, of a path its name."""
    found = yaml.safe_load(value) if isinstance(value, str) else value
    if isinstance(found, dict):
        settings = found.get("init_args", {}).items()
        chosen = {key: each for key, each in settings if not isinstance(each, dict) or "class_path" in each}
        told = ", ".join(f"{key} {_listed(each)}" for key, each in chosen.items())
        return f"{found['class_path']}({told})" if told else str(found["class_path"])
    if isinstance(found, list) and not all(isinstance(each, str) for each in found):
        return ", ".join(map(short, found))
    if isinstance(found, list):
        return "nothing" if not found else Path(found[0]).parent.name
    if isinstance(found, str) and "/" in found:
        return Path(found).name if "*" not in found else Path(found).parent.parent.name
    if found is None or found != found:
        return "null"
    return f"{found:g}" if isinstance(found, float) else str(found)


def _listed(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else short(value)


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
