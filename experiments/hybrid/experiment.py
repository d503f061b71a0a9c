"""Weights or activations: what do counts, a cache of hidden states and a bias of the output gain, alone and beside learned weights?"""

import json
from typing import Any

import pandas as pd
import yaml
from matplotlib.figure import Figure

from experiments import grid, pictures, protocol, results
from experiments.grid import Scale

BY = ["data.data_files", "update", "memories"]
NOTHING = "[]"


def is_wanted(settings: dict[str, Any]) -> bool:
    """Whether a point remembers anything: what does not is the static model."""
    return (str(settings["update"]), str(settings["memories"])) != ("null", NOTHING)


def measure(settings: dict[str, Any], scale: Scale) -> pd.DataFrame:
    """Memories over the static model, and where weights learn over these too, at the rate that is best for weights alone."""
    test = grid.run_of("hybrid", {name: settings[name] for name in BY if name != "memories"}, scale)
    memories = yaml.safe_load(settings["memories"])
    if str(settings["update"]) in ("null", "None"):
        rate, learned = None, [*test, "--rates=null", f"--memories={json.dumps(memories)}"]
    else:
        rate, _ = protocol.choose_rate(test, scale)
        over_static = [{**each, "init_args": {**each["init_args"], "over": "static"}} for each in memories]
        learned = [*test, f"--rates=[{rate}]", f"--memories={json.dumps([*memories, *over_static])}"]
        if not memories:
            learned = [*test, "--rates=null", f"--update.lr={rate}"]
    adapted = protocol.Reading(learned).sums()
    found = {"adapted": adapted, "static": protocol.static(test)}
    return protocol.labelled({**found, "static_equal_flops": protocol.equal_flops(test, adapted, None)}, rate)


def points_of(rows: pd.DataFrame) -> dict[tuple[str, str], pd.DataFrame]:
    """The rows of each point, by what is read and what remembers."""
    found = {}
    for (files, update, memories), own in rows.groupby(BY, sort=False, dropna=False):
        names = [each["class_path"] for each in yaml.safe_load(memories)]
        learned = [] if str(update) in ("null", "nan") else ["weights"]
        found["books" if "books" in files else "other text", " + ".join([*learned, *names])] = own
    return found


def figure(rows: pd.DataFrame) -> Figure:
    """Gain over static of each way to remember, on books and on other text."""
    found = points_of(rows)
    texts = list(dict.fromkeys(text for text, _ in found))
    picture, axes = pictures.axes(len(texts), width=6, height=3.4, squeeze=False)
    for axis, text in zip(axes[0], texts, strict=True):
        pictures.margins(axis, {name: results.gain(own) for (on, name), own in found.items() if on == text})
        pictures.label(axis, "bits per byte below static", "", text)
    return picture


def table(rows: pd.DataFrame) -> pd.DataFrame:
    """Each point beside its controls."""
    found = results.beside_controls(rows, BY)
    found[["text", "what remembers"]] = list(points_of(rows))
    return found[["text", "what remembers", *(name for name in found.columns[len(BY) : -2])]]


def verdict(rows: pd.DataFrame) -> str:
    """For each kind of text what each way to remember gains over static, and all memories beside learned weights."""
    found, told = points_of(rows), []
    for text in dict.fromkeys(text for text, _ in found):
        own = {name: points for (on, name), points in found.items() if on == text}
        gains = {name: results.gain(points) for name, points in own.items()}
        ordered = sorted(gains, key=lambda name: -gains[name][0])
        adapted = {name: points[points.role == "adapted"] for name, points in own.items()}
        weights, both = adapted["weights"], max(adapted, key=len)
        memories = both.removeprefix("weights + ")
        told.append(
            f"{text}: {', '.join(f'{name} {results.said(gains[name])}' for name in ordered)}; all memories without learning against "
            f"weights alone {results.said(results.margin(weights, adapted[memories]))}, both against memories alone "
            f"{results.said(results.margin(adapted[memories], adapted[both]))}"
        )
    return f"bits per byte gained over static, the best first: {'. '.join(told)}"
