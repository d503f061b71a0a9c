"""Does adapting always help, on how many documents, and where in a document? (C4)"""

from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from experiments import pictures, protocol, results
from experiments.grid import Scale

EVERY = 500  # tokens that a row of the results is of


def measure(settings: dict[str, Any], scale: Scale) -> pd.DataFrame:
    """As the protocol does, by position in the document."""
    return protocol.measure("gain", settings, scale, every=EVERY)


BY = ["data.data_files"]


def figure(rows: pd.DataFrame) -> Figure:
    """Gain by document in each domain, and by position in the document."""
    picture, (left, right) = pictures.axes(2, height=4.2)
    domains = list(rows.groupby(BY[0], sort=False))
    for place, (_, own) in enumerate(reversed(domains)):
        gains = by_document(own)
        left.plot(gains.percent, [place] * len(gains), "o", color=pictures.ADAPTED, alpha=0.5, markersize=4)
        left.annotate(domain_of(own), (0, place), (-6, 0), textcoords="offset points", ha="right", va="center",
                      fontsize=8, xycoords=("axes fraction", "data"))  # fmt: skip
    left.set_yticks([])
    left.axvline(0, color=pictures.STATIC, linewidth=0.8)
    pictures.label(left, "gain over static in each document, %", "")
    for color, (_, own) in zip(pictures.OTHER, [domains[0], *most_gained(domains)], strict=False):
        nats = own.pivot_table(index="position", columns="role", values="nats", aggfunc="sum")
        middle = nats.index + EVERY / 2
        right.plot(
            middle, 100 * (1 - nats.adapted / nats.static), "o-", color=color, label=domain_of(own), markersize=3
        )
    right.axhline(0, color=pictures.STATIC, linewidth=0.8)
    pictures.label(right, "tokens read", "gain over static, %")
    return picture


def domain_of(rows: pd.DataFrame) -> str:
    """The domain whose documents these are."""
    return results.short(rows[BY[0]].iloc[0])


def most_gained(domains: list[tuple[str, pd.DataFrame]], count: int = 3) -> list[tuple[str, pd.DataFrame]]:
    """The domains with the largest gain."""
    return sorted(domains[1:], key=lambda domain: -total_gain(domain[1])[0])[:count]


def total_gain(rows: pd.DataFrame) -> results.Margin:
    """Gain over static with its interval."""
    return results.margin(rows[rows.role == "static"], rows[rows.role == "adapted"])


def by_document(rows: pd.DataFrame) -> pd.DataFrame:
    """Of each document its gain over static in percent."""
    nats = rows.pivot_table(index="document", columns="role", values="nats", aggfunc="sum")
    return pd.DataFrame({"percent": 100 * (1 - nats.adapted / nats.static)})


def table(rows: pd.DataFrame) -> pd.DataFrame:
    """Each domain beside its controls, with how many of its documents gained."""
    found = results.beside_controls(rows, BY)
    gains = [by_document(own).percent for _, own in rows.groupby(BY[0], sort=False)]
    found["documents improved"] = [f"{(each > 0).sum()} of {len(each)}" for each in gains]
    return found.rename(columns={BY[0]: "domain"})


def verdict(rows: pd.DataFrame) -> str:
    """The share of documents that gained."""
    gains = pd.concat([by_document(own).percent for _, own in rows.groupby(BY[0], sort=False)])
    first = next(own for _, own in rows.groupby(BY[0], sort=False))
    books = by_document(first).percent
    word = "holds" if (gains > 0).all() else "holds in part" if (gains > 0).mean() > 0.5 else "does not hold"
    return (
        f"{word}: {(gains > 0).sum()} of {len(gains)} documents improved at one rate for all, {(books > 0).sum()} of "
        f"{len(books)} books, by {results.said(total_gain(first))} bits per byte; the least gain of a document is "
        f"{gains.min():+.1f}%, the largest {gains.max():+.1f}%"
    )
