"""Which rule learns best, how wide is the range of rates at which it does, and does a mixture need none?"""

from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from experiments import grid, pictures, protocol, results
from experiments.grid import Scale

MIXTURE = "null"  # in place of a rule: SGD and Adam at the rates that the mixture chooses


def measure(settings: dict[str, Any], scale: Scale) -> pd.DataFrame:
    """As the protocol does, with the lowest and highest rate that keep half of the best gain on the books of choice."""
    if str(settings["update"]) in (MIXTURE, "None"):
        return protocol.measure("rules", {"update": MIXTURE, "mixture": "{}"}, scale)
    settings = dict(settings)
    if "RMSDynamic" in settings["update"]:
        settings["update.statistics"] = protocol.statistics("rules", settings, scale)
    rows = protocol.measure("rules", settings, scale)
    if not scale.quick:
        rows["lowest_rate"], rows["highest_rate"] = good_range(grid.run_of("rules", settings, scale), scale)
    return rows


def good_range(test: list[str], scale: Scale) -> tuple[float, float]:
    """The lowest and the highest of the rates, half a decade apart, at which at least half of the best gain is left."""
    found = protocol.static([*test, *grid.arguments(scale.choice)])
    static = found.nats.sum() / found.tokens.sum()
    best, tried = protocol.choose_rate(test, scale)
    half = (static + tried[best]) / 2
    ends = []
    for step in (1 / protocol.WIDER, protocol.WIDER):
        end = best
        while True:
            rate = protocol.rounded(end * step)
            if rate not in tried:
                tried |= protocol.try_rates(test, [rate], scale)
            if tried[rate] > half:
                break
            end = rate
        ends.append(end)
    return ends[0], ends[1]


def name_of(update: Any) -> str:
    """`SGD(momentum 0.9)`; the mixture where there is no rule."""
    name = results.short(update)
    return "mixture" if name == "null" else name


def figure(rows: pd.DataFrame) -> Figure:
    """Gain over static of each rule, and the range of its rates that keep half of the best gain."""
    picture, (left, right) = pictures.axes(2, height=3.6, sharey=True)
    by_rule = {name_of(update): own for update, own in rows.groupby("update", sort=False, dropna=False)}
    pictures.margins(left, {name: results.gain(own) for name, own in by_rule.items()})
    for place, own in enumerate(reversed(by_rule.values())):
        if own.lowest_rate.notna().any():
            right.plot([own.lowest_rate.max(), own.highest_rate.max()], [place, place], "|-", color=pictures.ADAPTED)
            right.plot(own.rate.max(), place, "o", color=pictures.ADAPTED)
    right.set_yticks([])
    right.set_xscale("log")
    pictures.label(left, "bits per byte below static", "")
    pictures.label(right, "rates that keep half of the best gain (dot: the best)", "")
    return picture


def table(rows: pd.DataFrame) -> pd.DataFrame:
    """Each rule beside its controls, with how many times its good range's highest rate is its lowest."""
    found = results.beside_controls(rows, ["update"])
    ends = rows.groupby("update", sort=False, dropna=False)[["lowest_rate", "highest_rate"]].max()
    found["update"] = [name_of(update) for update in rows["update"].drop_duplicates()]
    found["good rates"] = [
        f"{low:g} to {high:g}" if low == low else "needs none"
        for low, high in zip(ends.lowest_rate, ends.highest_rate, strict=True)
    ]
    return found


def verdict(rows: pd.DataFrame) -> str:
    """The rules from the best on, by how much each but the first is behind, and the mixture beside the best."""
    adapted = {
        name_of(update): own[own.role == "adapted"] for update, own in rows.groupby("update", sort=False, dropna=False)
    }
    best, *others = sorted((name for name in adapted if name != "mixture"), key=lambda name: adapted[name].nats.sum())

    def behind(better: str, worse: str) -> str:
        return results.said(results.margin(adapted[worse], adapted[better]))

    bits = results.totals(adapted[best], ["role"]).bits_per_byte.iloc[0]
    told = "; ".join(f"{name} {behind(best, name)}" for name in others)
    return (
        f"best rule with its own rate: {best}, {bits:.3f} bits per byte; the mixture, with no rate chosen: "
        f"{behind('mixture', best)} below it; above it: {told}"
    )
