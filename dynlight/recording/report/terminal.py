"""The table of a run for a terminal of 80 columns."""

import os
import sys
import textwrap
from pathlib import Path
from typing import Any

from dynlight.recording.report.rates import best_rate_sentence
from dynlight.recording.report.ratios import ratio
from dynlight.recording.report.summary import summarise
from dynlight.recording.report.tables import documents_table, scores
from dynlight.recording.report.text import number, one_line, pad_or_cut, si, terminal_width

WIDTH = 80
PRINTED = 40  # documents: a terminal's worth; all are in documents.csv


def show(text: str) -> None:
    """Print for a person who may be gone (`| head -1`): the results are in files."""
    try:
        print(text, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def printed_table(folder: str | Path) -> str:
    """Return the table for a terminal: each document, all of them, and what else they come to."""
    table = scores(documents_table(folder))
    summary = summarise(folder, table)
    head, *body, last = _aligned(_cells(table.head(PRINTED).to_dict("records"), summary))
    if len(table) > PRINTED:
        body.append(f"… and {len(table) - PRINTED:,} more in documents.csv")
    rule = "─" * len(head)
    lines = [head, rule, *body, rule, last, "", *_totals_lines(summary)]
    if summary["experts"]:
        lines += ["", *_experts_lines(summary)]
    return "\n".join(lines + _failed_lines(summary))


def _cells(rows: list[dict[str, Any]], summary: dict[str, Any]) -> list[list[str]]:
    """The cells of the head, of each document, and of the line of all documents."""
    static = summary["static"]
    names = ["static", "adapted", "gain", "%"] if static else ["bits/byte"]
    lines = [["document", "tokens", *names, "FLOPs"]]
    total = {
        "name": f"all {summary['documents']:,}",
        "tokens": summary["tokens"],
        "static": static and static["bits_per_byte"],
        "adapted": summary["bits_per_byte"],
        "gain": summary["gain_bits_per_byte"],
        "percent": summary["gain_percent"],
        "flops": summary["flops"],
        "failed": "",
    }
    for row in [*rows, total]:
        line = [number(row[name]) for name in (("static", "adapted", "gain") if static else ("adapted",))]
        line += [number(row["percent"], 1)] if static else []
        line[-1] = "failed" if row["failed"] else line[-1]
        lines.append([one_line(row["name"]), number(row["tokens"], 0), *line, si(row["flops"], "FLOP")])
    return lines


def _aligned(lines: list[list[str]]) -> list[str]:
    """Lines of cells with the first column flush left, in the room that the others leave it, and the others flush right."""
    widths = [max(map(len, column)) for column in list(zip(*lines, strict=True))[1:]]
    room = WIDTH - sum(widths) - 2 * len(widths)
    first = max(8, min(room, max(terminal_width(line[0]) for line in lines)))
    return [
        pad_or_cut(line[0], first) + "".join(f"  {cell:>{width}}" for cell, width in zip(line[1:], widths, strict=True))
        for line in lines
    ]


def _totals_lines(summary: dict[str, Any]) -> list[str]:
    """What all documents come to in other units, and what learning cost beside static."""
    static = summary["static"]
    before = {name: f"{number(static[name], 3)} → " if static else "" for name in ("nats_per_token", "word_perplexity")}
    lines = [
        f"nats per token {before['nats_per_token']}{number(summary['nats_per_token'])}, "
        f"word perplexity {before['word_perplexity']}{number(summary['word_perplexity'])}"
    ]
    if static:
        times = ratio(summary["flops"], static["flops"])  # None where nothing is learned: the run is its own reference
        cost = "" if times is None else f"; {number(times, 2)}× the FLOPs of static"
        lines.append(f"scores in bits per byte, over the same windows{cost}")
    if teacher := summary["teacher"]:
        times = ratio(teacher["flops"], static["flops"] if static else None)
        cost = "" if times is None else f", {number(times, 2)}× the FLOPs of static"
        lines.append(f"teacher {number(teacher['bits_per_byte'])} bits per byte{cost}")
    return lines


def _experts_lines(summary: dict[str, Any]) -> list[str]:
    """What each expert of a mixture scored alone, and which rate was best."""
    rows = [("expert", "bits/byte", "weight, %")]
    for expert in summary["experts"]:
        alone = f"failed on {expert['failed']:,}" if expert["failed"] else number(expert["bits_per_byte"])
        rows.append((expert["name"], alone, number(100 * expert["share"], 1)))
    rows.append(("mixture", number(summary["bits_per_byte"]), ""))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        f"{name:<{widths[0]}}  {alone:>{widths[1]}}  {weight:>{widths[2]}}".rstrip() for name, alone, weight in rows
    ]
    return [*lines, *textwrap.wrap(best_rate_sentence(summary["best_rate"]), WIDTH)]


def _failed_lines(summary: dict[str, Any]) -> list[str]:
    """Which documents failed, where and why; no more of them than documents are printed."""
    lines = []
    for failure in summary["failed"][:PRINTED]:
        where = "" if failure["segment"] is None else f" in segment {failure['segment']}"
        reason = f"not in the sums: {one_line(failure['name'])} failed{where}: {one_line(failure['reason'])}"
        lines += textwrap.wrap(reason, WIDTH, subsequent_indent="  ")
    return lines
