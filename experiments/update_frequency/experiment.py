"""How does loss trade against compute as updates become rarer, and against a longer static context? (C2)"""

import pandas as pd
from matplotlib.figure import Figure

from experiments import pictures, results

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
    front = static_front(rows)
    axis.plot(
        front.flops_per_token / 1e6,
        front.bits_per_byte,
        "s--",
        color=pictures.STATIC,
        label="static, windows of 256 to 512",
    )
    pictures.label(axis, "MFLOPs per token", title="numbers: updates every … segments")
    return picture


def segment_of(context: str) -> str:
    """What the two contexts differ by."""
    return f"segment {context.partition('segment: ')[2].partition(',')[0]}"


def static_front(rows: pd.DataFrame) -> pd.DataFrame:
    """Static runs by what they cost, each cost once."""
    static = rows[rows.role.isin(["static", "static_equal_flops"])]
    return results.totals(static, [*BY, "role"]).drop_duplicates("flops_per_token").sort_values("flops_per_token")


def table(rows: pd.DataFrame) -> pd.DataFrame:
    """Each point beside its controls."""
    return results.beside_controls(rows, BY)


def verdict(rows: pd.DataFrame) -> str:
    """Whether rarer updates cost less and lose more, step by step, and what is left of the gain."""
    found = results.totals(rows, [*BY, "role"])
    told, smooth = [], True
    for context, own in found.groupby("context", sort=False):
        front = own[own.role == "adapted"].sort_values("schedule.every")
        smooth &= front.bits_per_byte.is_monotonic_increasing and front.flops_per_token.is_monotonic_decreasing
        static = own[own.role == "static"].bits_per_byte.iloc[0]
        kept = (static - front.bits_per_byte) / (static - front.bits_per_byte.iloc[0])
        cost = front.flops_per_token / front.flops_per_token.iloc[0]
        each = ", ".join(
            f"every {every}: {share:.0%} of the gain at {price:.0%} of the FLOPs"
            for every, share, price in zip(front["schedule.every"], kept, cost, strict=True)
        )
        told.append(f"{segment_of(context)}: {each}")
    return f"{'holds' if smooth else 'holds in part'}: {'; '.join(told)}"
