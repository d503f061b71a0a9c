"""Variants: an experiment whose points differ by one setting, the first of which is what the others are compared with."""

import pandas as pd
from matplotlib.figure import Figure

from experiments import pictures, results


def points_of(rows: pd.DataFrame, by: str) -> dict[str, pd.DataFrame]:
    """The rows of each point, by what the setting `by` is there."""
    setting = by.rpartition(".")[2]
    named = ((results.short(value), own) for value, own in rows.groupby(by, sort=False, dropna=False))
    return {name if "(" in name else f"{setting} {name}": own for name, own in named}


def figure(rows: pd.DataFrame, by: str) -> Figure:
    """Gain of each point over static."""
    found = points_of(rows, by)
    picture, axis = pictures.axes(height=1 + 0.3 * len(found))
    pictures.margins(axis, {name: results.gain(own) for name, own in found.items()})
    pictures.label(axis, "bits per byte below static", "")
    return picture


def table(rows: pd.DataFrame, by: str) -> pd.DataFrame:
    """Each point beside its controls."""
    return results.beside_controls(rows, [by])


def verdict(rows: pd.DataFrame, by: str) -> str:
    """What the first point gains over static, and each of the others over the first, for how many times its FLOPs."""
    (first, plain), *others = points_of(rows, by).items()
    told = []
    for name, own in others:
        adapted = [points[points.role == "adapted"] for points in (plain, own)]
        flops = [points.flops.sum() / points.tokens.sum() for points in adapted]
        told.append(f"{name} {results.said(results.margin(*adapted))} at {flops[1] / flops[0]:.2f}×")
    return (
        f"{first} gains {results.said(results.gain(plain))} bits per byte over static; more than that, at so many times its "
        f"FLOPs: {'; '.join(told)}"
    )
