"""Does adapting help a model that has read two trillion tokens, on which text, beside how much memory? (C1, C2, C4, C5)"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from matplotlib.figure import Figure

from experiments import grid, pictures, protocol, results
from experiments.grid import Scale

EVERY = 1024  # tokens that a row of the results is of
SEGMENT = 128
MEMORY = 1024  # tokens of memory beside which the methods learn; the static model is read beside others, too
LITTLE = 128  # and beside which adapters learn, to see what learning is worth where less is in view
# Static contexts from which the one that costs as much as learning is taken.
MEMORIES = (0, 128, 384, 1024, 1920, 3968, 8064)
# What the model has surely seen: the longest module of Python's library.
CONTROL = ["--data.path=python-stdlib", "--data.data_files=null", "--data.documents=1"]
# Rates are chosen on the beginnings of other texts.
CHOICE = [
    "--data.data_files=[../shared/data/books/train/11421.txt, ../shared/data/shift/code_c/stb_truetype_h.txt, "
    "../shared/data/shift/law_german/urhg.txt, ../shared/data/shift/math_latex/hardy_pure_mathematics_1.txt, "
    "../shared/data/shift/french/nd0046.txt, ../shared/data/shift/poetry/10216.txt]",
    "--data.max_tokens=2048",
]
TITLES = {
    "lora": "LoRA 8",
    "mlps": "MLPs of the last 8 blocks",
    "sgd": "all weights, SGD",
    "mixture": "LoRA 8, mixture",
}
FILES = map(Path, yaml.safe_load((Path(__file__).parent / "run.yaml").read_text("utf-8"))["data"]["data_files"])
KINDS = {file.name: file.parent.name if file.parent.name != "test" else "books" for file in FILES}


def is_wanted(settings: dict[str, Any]) -> bool:
    """Whether a point is of the grid: each method beside one size of memory, adapters and nothing learned beside others."""
    method, memory = Path(str(settings["config"])).stem, int(settings["context.memory"])
    if method == "static":
        return memory != MEMORY
    return memory == MEMORY or (method == "lora" and memory == LITTLE)


def measure(settings: dict[str, Any], scale: Scale) -> pd.DataFrame:
    """As the protocol does, with long static contexts in place of overlapping windows, by position in the document."""
    test = [*grid.run_of("real", settings, scale), *beside(settings["context.memory"])]
    parts = [test] if scale.quick else [test, [*test, *CONTROL]]
    if "static" in settings["config"]:
        return protocol.labelled({"static": concatenated(protocol.static(part, EVERY) for part in parts)}, None)
    rate = None
    if "mixture" not in settings["config"]:
        choice = scale if scale.quick else replace(scale, choice=grid.point_of(CHOICE))
        rate, _ = protocol.choose_rate(test, choice)
        parts = [[*part, "--rates=null", f"--update.lr={rate}"] for part in parts]
    adapted = [protocol.adapted(part, EVERY) for part in parts]
    # What learns nothing is read faster so, to the same scores.
    parts = [[*part, "--data.together=8"] for part in parts]
    found = {
        "adapted": concatenated(adapted),
        "static": concatenated(protocol.static(part, EVERY) for part in parts),
        "static_equal_flops": concatenated(map(equal_flops, parts, adapted)),
    }
    if rate is not None:
        wrong = replace(scale, wrong={"data.path": "text", **scale.wrong})
        found["wrong_document"] = concatenated(protocol.wrong_document(part, wrong, EVERY) for part in parts)
    return protocol.labelled(found, rate)


def equal_flops(test: Sequence[str], adapted: pd.DataFrame) -> pd.DataFrame:
    """The static model with so much memory that it costs as many FLOPs as learning or more; with all that it has, if less."""
    budget = adapted.flops.sum() / adapted.tokens.sum()
    for memory in MEMORIES:
        found = protocol.static([*test, *beside(memory)], EVERY)
        if found.flops.sum() / found.tokens.sum() >= budget:
            break
    return found


def beside(memory: int | str) -> list[str]:
    """Settings of a memory, which has no room for sinks if it is 0."""
    return [f"--context.memory={memory}", *(["--context.sinks=0"] if int(memory) == 0 else [])]


def concatenated(tables: Iterable[pd.DataFrame]) -> pd.DataFrame:
    """One below the other."""
    return pd.concat(tables, ignore_index=True)


def points_of(rows: pd.DataFrame) -> list[tuple[str, int, pd.DataFrame]]:
    """Of each point its method, memory and rows."""
    found = rows.groupby(["config", "context.memory"], sort=False)
    return [(Path(config).stem, int(memory), own) for (config, memory), own in found]


def role(rows: pd.DataFrame, name: str) -> pd.DataFrame:
    """The rows of one role."""
    return rows[rows.role == name]


def kind_of(document: str) -> str:
    """Of what kind a text is: `books`, as its folder says; modules of the library have none."""
    return KINDS.get(Path(document).name, "Python's library")


def statics(rows: pd.DataFrame) -> dict[int, pd.DataFrame]:
    """What the model scores with nothing learned, by the tokens in view, of the points that read the texts as far as any."""
    found = {SEGMENT + memory: role(own, "static") for _, memory, own in points_of(rows) if reads_all(rows, own)}
    return dict(sorted(found.items()))


def reads_all(rows: pd.DataFrame, point: pd.DataFrame) -> bool:
    """Whether a point reads the texts as far as any of the points does."""
    return bool(point.position.max() == rows.position.max())


def figure(rows: pd.DataFrame) -> Figure:
    """Loss against the context, gain by kind of text, and gain by position."""
    picture, (left, middle, right) = pictures.axes(3, width=4.6, height=4)
    static = {window: results.totals(own, ["role"]).bits_per_byte.iloc[0] for window, own in statics(rows).items()}
    left.plot(list(static), list(static.values()), "o-", color=pictures.STATIC, label="static")
    learned = [(method, memory, own) for method, memory, own in points_of(rows) if method != "static"]
    colors = dict(zip(dict.fromkeys(method for method, _, _ in learned), pictures.OTHER, strict=False))
    for method, color in colors.items():
        points = {memory: of for name, memory, of in learned if name == method and reads_all(rows, of)}
        scores = {
            SEGMENT + memory: results.totals(role(of, "adapted"), ["role"]).bits_per_byte.iloc[0]
            for memory, of in sorted(points.items())
        }
        if scores:
            left.plot(list(scores), list(scores.values()), "o-", color=color, label=TITLES[method])
    left.set_xscale("log", base=2)
    pictures.label(left, "tokens in view")
    method, memory, own = best(rows)
    kinds = by_kind(own)
    pictures.margins(middle, kinds)
    pictures.label(middle, "bits per byte gained", "", f"{TITLES[method]}, memory {memory:,}")
    for method, _, own in learned:
        nats = own.pivot_table(index="position", columns="role", values="nats", aggfunc="sum")
        gain = 100 * (1 - nats.adapted / nats.static)
        right.plot(nats.index + EVERY / 2, gain, "o-", color=colors[method], markersize=3, label=TITLES[method])
    right.axhline(0, color=pictures.STATIC, linewidth=0.8)
    pictures.label(right, "tokens read", "gain over static, %")
    return picture


def by_kind(rows: pd.DataFrame) -> dict[str, results.Margin]:
    """The gain of a point over static on each kind of text, with its interval."""
    kinds = rows.document.map(kind_of)
    return {kind: results.gain(rows[kinds == kind]) for kind in dict.fromkeys(kinds)}


def best(rows: pd.DataFrame) -> tuple[str, int, pd.DataFrame]:
    """The point that scores best of those that learn from all of the texts beside the same memory, at a rate that was chosen."""
    learned = [
        (method, memory, own)
        for method, memory, own in points_of(rows)
        if method not in ("static", "mixture") and memory == MEMORY and reads_all(rows, own)
    ]
    return min(learned, key=lambda point: role(point[2], "adapted").nats.sum())


def table(rows: pd.DataFrame) -> pd.DataFrame:
    """Each point beside its controls."""
    found = results.beside_controls(rows[~rows.config.str.contains("static")], ["config", "context.memory"])
    found["config"] = [TITLES[Path(name).stem] for name in found.config]
    return found.rename(columns={"config": "method", "context.memory": "memory"})


def verdict(rows: pd.DataFrame) -> str:
    """The best method beside its controls, kind by kind, and how its gain grows."""
    method, memory, own = best(rows)
    kinds = {kind: results.said(each) for kind, each in by_kind(own).items()}
    positions = sorted(own.position.unique())
    first, last = (results.gain(own[own.position == position]) for position in (positions[0], positions[-1]))
    documents = own.pivot_table(index="document", columns="role", values="nats", aggfunc="sum")
    improved = (documents.adapted < documents.static).sum()
    long = statics(rows)
    window = min(long, key=lambda each: long[each].nats.sum())
    word = results.word(
        [results.is_above(results.gain(own)), results.is_above(results.gain(own, "static_equal_flops"))]
    )
    return (
        f"{word}: {TITLES[method]} beside {memory:,} tokens of memory gains {results.said(results.gain(own))} bits per byte over static in "
        f"the same context, on {improved} of {len(documents)} texts; over static at equal FLOPs "
        f"{results.said(results.gain(own, 'static_equal_flops'))}, over weights of the wrong document "
        f"{results.said(results.gain(own, 'wrong_document'))}, over static in the best window, {window:,}: "
        f"{results.said(results.margin(long[window], role(own, 'adapted')))}; in the first {EVERY:,} tokens {results.said(first)}, in "
        f"the last {results.said(last)}; {', '.join(f'{kind} {each}' for kind, each in kinds.items())}"
    )
