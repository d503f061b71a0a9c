"""What do weights remember that activations don't, for how long, and what do they forget for it?"""

from typing import Any

import numpy as np
import pandas as pd
import yaml
from matplotlib.figure import Figure

from dynlight.recording.report.rates import paired_margin
from dynlight.running.run import Run
from experiments import grid, pictures, protocol
from experiments.grid import Scale
from experiments.memory.planted import PLACES, SMALL_PLACES, Pair
from experiments.results import Margin, said

RATES = {"SGD": [0.03, 0.1], "RMSDynamic": [1e-4]}
STATISTICS = ["--update.statistics.segments=50"]
STATISTICS += [
    "--update.statistics.data={path: text, data_files: ../shared/data/books/train/114*.txt, max_tokens: 2048}"
]
SMALL_STATISTICS = ["--update.statistics.segments=8"]
SMALL_STATISTICS += ["--update.statistics.data={path: text, data_files: dynlight/choices/*.py, max_tokens: 256}"]
SMALL = ["--data.max_tokens=2560"]  # as many as the plants of a quick look need
NEVER = 10**9  # segments: longer than any document
ROLES = {"static": "memory only", "without_memory": "weights only", "adapted": "both"}


def measure(settings: dict[str, Any], scale: Scale) -> pd.DataFrame:
    """Reads two copies of each book, at all rates at once; nothing is learned where the other book begins.

    Weights alone, with a memory of 0, are read with SGD only. Neither memory nor learning needs no reading: a plant is in
    another segment than its question, so nothing at all is known of it.
    """
    (rule,) = (name for name in RATES if name in settings["update"])
    base = [*grid.run_of("memory", settings, scale), f"--rates={RATES[rule]}", *(SMALL if scale.quick else [])]
    if rule == "RMSDynamic":
        base += SMALL_STATISTICS if scale.quick else STATISTICS
    pairs = pairs_of(base, scale)
    base += [f"--schedule.every={{0: 1, {pairs[0].length}: {NEVER}}}"]
    rows = rows_of(base, pairs)
    if rule == "SGD":
        alone = rows_of([*base, "--context.memory=0", "--reference=null"], pairs)
        rows = pd.concat([rows, alone.assign(role="without_memory")], ignore_index=True)
    return rows


def pairs_of(base: list[str], scale: Scale) -> list[Pair]:
    """The books in two copies each, with what is planted in them."""
    run = Run.of(base)
    books, (places, others) = run.documents, (SMALL_PLACES, 5) if scale.quick else (PLACES, 16)
    return [Pair(book, books[number - 1], number, run.tokenizer, places, others) for number, book in enumerate(books)]


def again(rows: pd.DataFrame) -> tuple[float, float]:
    """Nats of the first book at the first rate, now and in the results: a fact has too few tokens to come out alike.

    On a CPU that adds in another order, learning at a high rate made 0.4% of 80 tokens' nats of the last bits.
    """
    scale = Scale.read()
    base = [*grid.run_of("memory", {}, scale), "--rates=[0.03]", "--data.documents=1"]
    pairs = pairs_of(base, scale)
    found = rows_of([*base, f"--schedule.every={{0: 1, {pairs[0].length}: {NEVER}}}"], pairs)
    known = rows[(rows["update"] == "{class_path: SGD}") & (rows.document == pairs[0].name) & (rows.rate == 0.03)]
    book = [own[(own.role == "adapted") & (own.kind == "book")].nats.sum() for own in (found, known)]
    return book[0], book[1]


def rows_of(arguments: list[str], pairs: list[Pair]) -> pd.DataFrame:
    """The sums of what was asked: of each expert, book, kind and lag, where it was planted and where it was not.

    All experts read together, so FLOPs and seconds are those of all, in proportion to tokens.
    """
    # As they were put together: of their text alone, a plant's first token might become another.
    documents = [document for number, pair in enumerate(pairs) for document in pair.documents(2 * number)]
    reading = protocol.Reading(arguments, documents=documents)
    nats = {document: np.stack(group) for document, group in reading.records.tokens.groupby("document").expert_nats}
    learners = len(reading.rates)
    costs = reading.sums()[["tokens", "flops", "seconds"]].sum()
    bytes_of = {document.index: np.diff(document.byte_ends) for document in documents}
    rows = []
    for number, pair in enumerate(pairs):
        for kind, lag in dict.fromkeys((asked.kind, asked.lag) for asked in pair.asked):
            for planted in (True, False):
                places = [
                    (2 * number + copy, asked.tokens)
                    for asked in pair.asked
                    for copy in range(2)
                    if (asked.kind, asked.lag) == (kind, lag) and (copy == asked.copy) == planted
                ]
                found = np.concatenate([nats[document][place] for document, place in places]).astype(np.float64)
                row = {"document": pair.name, "position": lag, "kind": kind, "planted": planted, "tokens": len(found)}
                row["bytes"] = sum(int(bytes_of[document][place].sum()) for document, place in places)
                row |= {cost: len(found) * costs[cost] / costs.tokens for cost in ("flops", "seconds")}
                for expert in range(found.shape[1]):
                    learner = expert - (found.shape[1] - learners)  # the static model, if it is there, comes first
                    role, rate = ("static", np.nan) if learner < 0 else ("adapted", reading.rates[learner])
                    rows.append({"role": role, "rate": rate, **row, "nats": round(found[:, expert].sum(), 6)})
    return pd.DataFrame(rows)


def remembered(rows: pd.DataFrame) -> Margin:
    """By how many nats a token what was planted is more likely than where it was not, with its 95% interval."""
    sums = rows.groupby(["planted", "document"])[["nats", "tokens"]].sum()
    planted, unplanted = sums.loc[True], sums.loc[False]
    return paired_margin((unplanted.nats - planted.nats).to_numpy(), planted.tokens.to_numpy())


def learned(rows: pd.DataFrame, kind: str) -> Margin:
    """By how many nats a token learning makes text of a kind more likely than it is to the static model."""
    sums = rows[rows.kind == kind].groupby(["role", "document"])[["nats", "tokens"]].sum()
    static, adapted = sums.loc["static"], sums.loc["adapted"]
    return paired_margin((static.nats - adapted.nats).to_numpy(), adapted.tokens.to_numpy())


def settings_of(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The rows of each rule and rate, with the static model's, by a short name."""
    found = {}
    for (update, rate), group in rows[rows.role != "static"].groupby(["update", "rate"], sort=False):
        choice = yaml.safe_load(update)
        decay = choice.get("init_args", {}).get("decay")
        name = f"{choice['class_path']} {rate:g}" + ("" if decay is None else f", decay {decay:g}")
        found[name] = pd.concat([group, rows[(rows["update"] == update) & (rows.role == "static")]])
    return found


def table(rows: pd.DataFrame) -> pd.DataFrame:
    """Nats per token remembered of each kind at each lag, then nats per token gained on the book and on another."""
    everything, lines = settings_of(rows), []
    for kind in ("fact", "words", "style"):
        for number, (name, group) in enumerate(everything.items()):
            for role, meaning in ROLES.items():
                own = group[(group.role == role) & (group.kind == kind)]
                if len(own) and (role != "static" or number == 0):  # static is the same beside each rule
                    lags = {f"{lag} later": said(remembered(part)) for lag, part in own.groupby("position")}
                    lines.append({"": kind, "known by": meaning, "rule": "" if role == "static" else name, **lags})
    for kind, what in (("book", "gain on the book"), ("other", "gain on another book, frozen")):
        for name, group in everything.items():
            lines.append({"": what, "known by": ROLES["adapted"], "rule": name, "in all": said(learned(group, kind))})
    return pd.DataFrame(lines).fillna("")


def figure(rows: pd.DataFrame) -> Figure:
    """What is remembered against lag, and what is forgotten against what is learned."""
    drawing, (facts, styles, forgetting) = pictures.axes(3, width=4.2)
    everything = settings_of(rows)
    for axis, kind in ((facts, "fact"), (styles, "style")):
        for number, (name, group) in enumerate(everything.items()):
            for role, line in (("static", ":"), ("without_memory", "--"), ("adapted", "-")):
                own = group[(group.role == role) & (group.kind == kind)]
                if len(own) and (role != "static" or number == 0):
                    lags = sorted(own.position.unique())
                    middle, low, high = np.array([remembered(own[own.position == lag]) for lag in lags]).T
                    axis.errorbar(
                        np.array(lags) * 1.06 ** (number - 1),
                        middle,
                        [middle - low, high - middle],
                        color=pictures.STATIC if role == "static" else pictures.OTHER[number],
                        linestyle=line,
                        marker="o",
                        markersize=3,
                        capsize=2,
                        linewidth=1.2,
                        label=(ROLES[role] if role == "static" else f"{ROLES[role]}, {name}")
                        if kind == "style"
                        else None,
                    )
        axis.axhline(0, color="black", linewidth=0.6)
        axis.set_xscale("log")
        axis.set_xticks(lags, [str(lag) for lag in lags])
        title = "a fact" if kind == "fact" else "a style"
        pictures.label(axis, "segments later", "nats per token remembered", f"{title}, planted once")
    for number, group in enumerate(everything.values()):  # in the colors of the other panels
        (x, x_low, x_high), (y, y_low, y_high) = (learned(group, kind) for kind in ("book", "other"))
        errors = {"xerr": [[x - x_low], [x_high - x]], "yerr": [[y - y_low], [y_high - y]]}
        forgetting.errorbar(x, y, **errors, color=pictures.OTHER[number], marker="o", capsize=2)
    forgetting.axhline(0, color="black", linewidth=0.6)
    pictures.label(forgetting, "nats per token gained on the book", "nats per token gained on another", "forgetting")
    return drawing


def verdict(rows: pd.DataFrame) -> str:
    """What each kind of memory still knows at the longest lag, and what that costs on other text."""
    everything = settings_of(rows)
    in_all_ways = {name: group for name, group in everything.items() if set(group.role) == set(ROLES)}
    best, group = max(in_all_ways.items(), key=lambda item: learned(item[1], "book")[0])
    longest = rows.position.max()
    last = group[group.position == longest]
    found = []
    for kind, what in (("fact", "a fact"), ("words", "its words asked for elsewhere"), ("style", "a style")):
        parts = {role: last[(last.kind == kind) & (last.role == role)] for role in ROLES}
        found.append(f"{what}: " + ", ".join(f"{ROLES[role]} {said(remembered(part))}" for role, part in parts.items()))
    forgotten = [f"{name} {said(learned(group, 'other'))}" for name, group in everything.items()]
    return (
        f"nats per token remembered {longest} segments later at {best}: {'; '.join(found)}. Nats per token gained on "
        f"another book, frozen: {', '.join(forgotten)}."
    )
