"""What do adapters save, what do they cost in loss, and how does regret grow as a document is read? (C3, C8)"""

from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from experiments import grid, pictures, protocol, results
from experiments.grid import Scale

EVERY = 500  # tokens that a row of the results is of
ONE = ["--data.documents=1", "--data.max_tokens=640", "--data.together=1", "--rates=null", "--reference=null"]


def measure(settings: dict[str, Any], scale: Scale) -> pd.DataFrame:
    """As the protocol does, by position in the document, with learned weights and peak memory of one document alone."""
    rows = protocol.measure("lora", settings, scale, every=EVERY)
    run = protocol.alone([*grid.run_of("lora", settings, scale), *ONE])
    rows["learned_weights"], rows["peak_memory_bytes"] = run["learned_parameters"], run["peak_memory_bytes"]
    return rows


BY = ["parameters"]


def name_of(parameters: str) -> str:
    """`LoRA 16 on MLPs`, `all weights`, `last block's MLP`."""
    return {
        "All": "all weights",
        "Matching(names mlp)": "MLPs",
        "Matching(names mlp, blocks -1 -1)": "last MLP",
    }.get(
        name := results.short(parameters),
        name.replace("LoRA(rank ", "LoRA ")
        .replace(", alpha 16, targets gate_proj up_proj down_proj)", " on MLPs")
        .replace(", alpha 16, targets all-linear)", " on all linear maps"),
    )


def kind_of(parameters: str) -> str:
    """What is drawn in one color."""
    name = name_of(parameters)
    adapter, _, where = name.partition(" on ")
    return f"LoRA on {where}" if where else adapter


def figure(rows: pd.DataFrame) -> Figure:
    """Loss against learned weights, memory and FLOPs; regret against tokens read."""
    picture, panels = pictures.axes(4, width=3.6)
    rows = rows.assign(kind=rows.parameters.map(kind_of))
    adapted = rows[rows.role == "adapted"]
    found = results.totals(adapted, ["kind", "parameters"]).merge(
        rows.groupby("parameters", sort=False)[["learned_weights", "peak_memory_bytes"]].first().reset_index()
    )
    static = results.totals(rows[rows.role == "static"], ["role"]).bits_per_byte.iloc[0]
    quantities = [("learned_weights", 1, "learned weights"), ("peak_memory_bytes", 2**-20, "peak memory of one document, MiB"),
                  ("flops_per_token", 1e-6, "MFLOPs per token")]  # fmt: skip
    for axis, (column, factor, name) in zip(panels, quantities, strict=False):
        for color, (kind, own) in zip(pictures.OTHER, found.groupby("kind", sort=False), strict=False):
            own = own.sort_values("learned_weights")
            axis.plot(factor * own[column], own.bits_per_byte, "o-", color=color, label=kind)
        axis.axhline(static, color=pictures.STATIC, linestyle="--", label="static")
        pictures.label(axis, name)
    panels[0].set_xscale("log")
    for axis in (panels[0], panels[2]):
        axis.get_legend().remove()  # the one between them is of all three
    for color, (name, own) in zip([pictures.STATIC, *pictures.OTHER[1:]], regrets(rows).items(), strict=False):
        panels[3].plot(own.index, own, color=color, label=name)
    pictures.label(panels[3], "tokens read", "nats a document more than all weights")
    return picture


def regrets(rows: pd.DataFrame) -> dict[str, pd.Series]:
    """Nats that static, the best LoRA and the MLPs have cost more than all weights, in the mean document, by tokens read."""
    documents = rows.document.nunique()
    adapted = rows[rows.role == "adapted"]
    nats = {name_of(key): own.groupby("position").nats.sum() for key, own in adapted.groupby("parameters", sort=False)}
    nats["static"] = (
        rows[(rows.role == "static") & (rows.parameters == rows.parameters.iloc[0])].groupby("position").nats.sum()
    )
    best = min((name for name in nats if name.startswith("LoRA")), key=lambda name: nats[name].sum())
    chosen = ["static", best, "MLPs"]
    regret = {name: ((nats[name] - nats["all weights"]).cumsum() / documents) for name in chosen}
    return {name: own.set_axis(own.index + EVERY) for name, own in regret.items()}


def table(rows: pd.DataFrame) -> pd.DataFrame:
    """Each choice beside its controls, with what it learns and takes."""
    found = results.beside_controls(rows, BY)
    of = rows.groupby("parameters", sort=False)[["learned_weights", "peak_memory_bytes"]].first()
    found["parameters"] = [name_of(parameters) for parameters in of.index]
    found["learned weights"] = of.learned_weights.to_list()
    found["peak MiB"] = (of.peak_memory_bytes / 2**20).round().astype(int).to_list()
    kinds = list(dict.fromkeys(map(kind_of, of.index)))
    place = [kinds.index(kind_of(parameters)) for parameters in of.index]
    return found.assign(place=place).sort_values(["place", "learned weights"]).drop(columns="place")


def verdict(rows: pd.DataFrame) -> str:
    """LoRA between static and all weights, in loss, memory and regret; and beside the last MLP, which takes less memory."""
    of = {name_of(key): own for key, own in rows[rows.role == "adapted"].groupby("parameters", sort=False)}
    of["static"] = rows[(rows.role == "static") & (rows.parameters == rows.parameters.iloc[0])]
    best = min((name for name in of if name.startswith("LoRA")), key=lambda name: of[name].nats.sum())

    def ahead(better: str, worse: str) -> results.Margin:
        return results.margin(of[worse], of[better])

    peaks = {name_of(key): peak for key, peak in rows.groupby("parameters").peak_memory_bytes.first().items()}
    takes = {name: peak / peaks["all weights"] for name, peak in peaks.items()}
    claimed = (best, "static"), ("all weights", best), (best, "last MLP")
    word = results.word([*(results.is_above(ahead(*two)) for two in claimed), takes[best] < 1])
    regret = ", ".join(f"{name} {own.iloc[-1]:,.0f}" for name, own in regrets(rows).items())
    return (
        f"{word}: the best adapter ({best}) is {results.said(ahead(best, 'static'))} bits per byte below static, all weights are "
        f"{results.said(ahead('all weights', best))} below it, the last block's MLP alone {results.said(ahead('last MLP', best))}; "
        f"peak memory {takes[best]:.3f}× and {takes['last MLP']:.3f}× that of all weights; regret at the end, nats a document: "
        f"{regret}"
    )
