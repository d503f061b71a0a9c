"""What the figures share: their look, and how they are saved."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.results import Margin

ADAPTED, STATIC, OTHER = "#0b6e4f", "#8a8a8a", ["#0b6e4f", "#c1440e", "#2b5c9e", "#8e6bbf", "#b8860b", "#444444"]


def axes(columns: int = 1, width: float = 5.2, height: float = 3.8, **options: Any) -> tuple[Figure, Any]:
    """Axes beside one another, without frames that say nothing."""
    plt.rcParams.update(
        {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "dynlight"}
    )
    return plt.subplots(1, columns, figsize=(width * columns, height), layout="constrained", **options)


def label(axis: Axes, x: str, y: str = "bits per byte", title: str = "") -> None:
    """Names of the axes, a quiet grid, a legend where there is something to tell apart."""
    axis.set(xlabel=x, ylabel=y, title=title)
    axis.grid(alpha=0.25, linewidth=0.6)
    if axis.get_legend_handles_labels()[1]:
        axis.legend(frameon=False, fontsize=8)


def margins(axis: Axes, named: Mapping[str, Margin]) -> None:
    """Of each a margin with its interval, from the top down, named at the left."""
    for place, (name, (middle, low, high)) in enumerate(reversed(named.items())):
        low, high = (middle if end is None else end for end in (low, high))
        axis.errorbar(middle, place, xerr=[[middle - low], [high - middle]], fmt="o", color=ADAPTED, capsize=3)
        axis.annotate(name, (0, place), (-6, 0), textcoords="offset points", ha="right", va="center", fontsize=8,
                      xycoords=("axes fraction", "data"))  # fmt: skip
    axis.set_yticks([])
    axis.axvline(0, color=STATIC, linewidth=0.8)


def save(figure: Figure, folder: Path) -> None:
    """As figure.png and figure.svg, the same bytes for the same figure."""
    figure.savefig(folder / "figure.png", dpi=150, metadata={"Software": None})
    figure.savefig(folder / "figure.svg", metadata={"Date": None})
    plt.close(figure)
