"""How does loss trade against compute as updates become rarer, and against a longer static context? (C2)"""

import pandas as pd
from matplotlib.figure import Figure

from experiments import grid, pictures, results

BY = ["context", "schedule.every"]


def figure(rows: pd.DataFrame) -> Figure:
    """The front of adapted runs, and that of static ones with windows from short to long."""
    picture, axis = pictures.axes()
    found = results.totals(rows, [*BY, "role"])
    for color, (context, own) in zip(pictures.OTHER, found.groupby("context", sort=False), strict=False):
        front = own[own.role == "adapted"]
        axis.plot(
            front.flops_per_token / 1e6, front.bits_per_byte, "o-", color=color, label=f"adapted, {segment_of(context)}"
        )
        for x, y, every in zip(front.flops_per_token / 1e6, front.bits_per_byte, front["schedule.every"], strict=True):
            axis.annotate(f"{every}", (x, y), (3, 4), textcoords="offset points", fontsize=7)
    for line, (name, front) in zip(("s--", "^:"), static_fronts(rows).items(), strict=False):
        axis.plot(front.flops_per_token / 1e6, front.bits_per_byte, line, color=pictures.STATIC, label=name)
    pictures.label(axis, "MFLOPs per token", title="numbers: updates every … segments")
    return picture


def segment_of(context: str) -> str:
    """What the two contexts differ by."""
    return f"segment {context.partition('segment: ')[2].partition(',')[0]}"


def static_fronts(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Static runs by what they cost: memories from short to long, as `shift` has measured them with the same model, and overlap."""
    overlapping = results.totals(rows[rows.role == "static_equal_flops"], BY).drop_duplicates("flops_per_token")
    found = {"static, windows of 1,024, overlapping": overlapping.sort_values("flops_per_token")}
    if (grid.folder_of("shift") / "results.csv").exists():
        model = grid.model_of("update_frequency", {}, grid.Scale.read())
        windows = results.load("shift")
        windows = windows[(windows["model.pretrained"] == model) & (windows.role == "static")]
        found["static, windows of 64 to 1,024"] = results.totals(windows, ["context"]).sort_values("flops_per_token")
    return found


def table(rows: pd.DataFrame) -> pd.DataFrame:
    """Each point beside its controls."""
    return results.beside_controls(rows, BY)


def margins(rows: pd.DataFrame, control: str) -> list[results.Margin]:
    """Of each period, from the shortest, by how much adapting is better than the control."""
    each = [own for _, own in rows.groupby("schedule.every")]
    return [results.margin(own[own.role == control], own[own.role == "adapted"]) for own in each]


def verdict(rows: pd.DataFrame) -> str:
    """Whether rarer updates cost less and lose more, step by step, and what is left of the gain."""
    told, smooth, longer = [], True, []
    for context, own in rows.groupby("context", sort=False):
        front = results.totals(own[own.role == "adapted"].sort_values("schedule.every"), ["schedule.every"])
        smooth &= front.bits_per_byte.is_monotonic_increasing and front.flops_per_token.is_monotonic_decreasing
        gains = margins(own, "static")
        longer += margins(own, "static_equal_flops")
        cost = front.flops_per_token / front.flops_per_token.iloc[0]
        each = ", ".join(
            f"every {every} keeps {gain[0] / gains[0][0]:.0%} of it at {price:.0%} of the FLOPs"
            for every, gain, price in zip(front["schedule.every"], gains, cost, strict=True)
            if every > 1
        )
        told.append(f"{segment_of(context)}: every 1 gains {results.said(gains[0])} bits per byte, {each}")
    word = "holds" if smooth else "holds in part"
    least = results.said(min(longer, key=lambda margin: margin[0]))
    return f"{word}: {'; '.join(told)}; the least gain over static windows that cost as many FLOPs or more is {least}"
