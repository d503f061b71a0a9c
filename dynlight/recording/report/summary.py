"""Turn the rows of a run into its summary and tables: `python -m dynlight.report runs/x`.

The rows are the only source: summary.json, documents.csv and report.html can be deleted and made again.
"""

import argparse
import json
import math
import os
import sys
import textwrap
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dynlight.recording.report import rates as experts

FLOPS = ["flops", "forward_flops", "activation_flops", "weight_flops", "update_flops", "static_flops"]
SECONDS = ["seconds", "scoring_seconds", "learning_seconds", "static_seconds"]
PRINTED = 40  # documents: a terminal's worth; all are in documents.csv


def ratio(above: Any, below: Any) -> Any:
    """Return `above / below`; with nothing to divide by (or a sum that is not finite) None, in arrays NaN."""
    if np.ndim(below):
        return np.divide(above, below, out=np.full(np.shape(below), np.nan), where=np.asarray(below) > 0)
    return float(above) / float(below) if below and above is not None and math.isfinite(above) else None


def nats_per_token(nats: Any, tokens: Any) -> Any:
    """Return `nats / tokens`, or None without tokens; of arrays elementwise, with NaN for None."""
    return ratio(nats, tokens)


def bits_per_byte(nats: Any, bytes: Any) -> Any:
    """Return `nats / (ln 2 · bytes)`, or None without bytes; of arrays elementwise, with NaN for None."""
    return ratio(nats, math.log(2) * bytes)


def word_perplexity(nats: float, words: int) -> float | None:
    """Return `exp(nats / words)`, or None without words and where a float cannot hold it (above e⁷⁰⁹)."""
    nats_per_word = ratio(nats, words)
    return None if nats_per_word is None or nats_per_word > 709 else math.exp(nats_per_word)


class Rows:
    """Rows of a parquet file sorted by document and segment, with one column in memory at a time.

    `documents` are those that have rows, `starts` their first rows' places, `owner` each row's place in `documents`.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._order = np.lexsort((self._read("segment"), self._read("document")))
        self._index()

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, name: str) -> np.ndarray:
        return self._read(name)[self._order]

    def _read(self, name: str) -> np.ndarray:
        if name not in pq.read_schema(self._path).names:
            raise ValueError(f"{self._path} has no column {name}")
        column = pq.read_table(self._path, columns=[name])[name]
        if name.endswith(("nats", "seconds")):
            return column.cast(pa.float64()).to_numpy()  # null becomes NaN
        return pc.fill_null(column.cast(pa.int64()), 0).to_numpy()

    def _index(self) -> None:
        unique = np.unique(self["document"], return_index=True, return_inverse=True)
        self.documents, self.starts, self.owner = unique

    def keep(self, documents: Any) -> "Rows":
        """Leave out the rows of all other documents."""
        self._order = self._order[np.isin(self["document"], documents)]
        self._index()
        return self

    def sums(self, name: str) -> pd.Series:
        """Sum a column for each document, exactly: int64, or fsum, which gives NaN if a value is not finite."""
        values = self[name]
        if not len(values):
            return pd.Series([], self.documents, values.dtype)
        if values.dtype == np.int64:
            return pd.Series(np.add.reduceat(values, self.starts), self.documents)
        parts = np.split(values, self.starts[1:])
        sums = [math.fsum(part.tolist()) if np.isfinite(part).all() else math.nan for part in parts]
        return pd.Series(sums, self.documents)

    def not_finite(self, name: str) -> dict[int, int]:
        """Map each document that has a value that is not finite to the first segment that has one."""
        bad = ~np.isfinite(self[name])
        documents, first = np.unique(self["document"][bad], return_index=True)
        return dict(zip(documents.tolist(), self["segment"][bad][first].tolist(), strict=True))


def read_run(folder: Path) -> dict[str, Any]:
    """Read run.json; SettingError where the folder holds no run."""
    for name in ("run.json", "segments.parquet", "timings.parquet"):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} is not the folder of a run: it has no {name}")
    try:
        run = json.loads((folder / "run.json").read_text("utf-8"))
        # A file's name need not be valid Unicode; what is written must be.
        run = json.loads(json.dumps(run, ensure_ascii=False).encode("utf-8", "replace"))
        len(run["documents"])
    except (ValueError, TypeError, LookupError) as error:
        raise ValueError(f"{folder}/run.json should be an object with a list of documents: {error!r}") from error
    return run


def documents_table(folder: str | Path) -> pd.DataFrame:
    """Return one row a document: the sums of documents.csv, FLOPs by kind, failures, seconds.

    A document counts if it was read whole. Where it failed, was not finished or has nats that are not finite, `failed`
    holds the reason (else ""), `failed_segment` the segment if one is to blame; its nats are NaN, its FLOPs and seconds
    what it cost up to there. `static_from` is the segment from which on the unlearned weights read it, as the learned ones
    had failed. Without a static reference `static_nats` is NaN.
    """
    folder = Path(folder)
    entries = read_run(folder)["documents"]
    rows, timings = Rows(folder / "segments.parquet"), Rows(folder / "timings.parquet")
    table = pd.DataFrame(entries, columns=["document", "name", "tokens", "bytes", "words"])
    table = table.astype(dict.fromkeys(("document", "tokens", "bytes", "words"), "int64") | {"name": "str"})
    if unnamed := set(rows.documents.tolist()) - set(table.document):
        raise ValueError(f"{folder}/segments.parquet has documents that run.json does not: {sorted(unnamed)[:5]}")

    def sums(source: Rows, name: str) -> np.ndarray:
        return source.sums(name).reindex(table.document, fill_value=0).to_numpy()

    for name in ("nats", "static_nats", "updates", *FLOPS):
        table[name] = sums(rows, name)
    has_static = np.isfinite(rows["static_nats"]).any()
    not_finite = (rows.not_finite("static_nats") if has_static else {}) | rows.not_finite("nats")
    failures: list[tuple[str, int | None]] = []
    for entry, scored in zip(entries, sums(rows, "tokens").tolist(), strict=True):
        if failed := entry.get("failed"):
            failures.append((failed["reason"], failed["segment"]))
        elif entry["document"] in not_finite:
            failures.append(("nats are not finite", not_finite[entry["document"]]))
        elif scored != entry["tokens"]:
            failures.append((f"{scored:,} of {entry['tokens']:,} tokens were scored", None))
        else:
            failures.append(("", None))
    table["failed"] = pd.Series([reason for reason, _ in failures], dtype="str")
    table["failed_segment"] = pd.array([segment for _, segment in failures], dtype="Int64")
    static_from = [(entry.get("finished_static") or {}).get("segment") for entry in entries]
    table["static_from"] = pd.array(static_from, dtype="Int64")
    read_whole = table.failed == ""
    table["bytes"] = np.where(read_whole, sums(rows, "bytes"), table.bytes)
    table["nats"] = table.nats.where(read_whole)
    table["static_nats"] = table.static_nats.where(read_whole & has_static)
    for name in SECONDS:
        table[name] = sums(timings, name)
    return table


def _totals(table: pd.DataFrame, nats: str) -> dict[str, Any]:
    """Sum over documents, then divide: a ratio of sums, never a mean of ratios."""
    tokens, size, words = (sum(table[name].tolist()) for name in ("tokens", "bytes", "words"))
    total = math.fsum(table[nats])
    return {
        "tokens": tokens,
        "bytes": size,
        "words": words,
        "nats": total,
        "nats_per_token": nats_per_token(total, tokens),
        "bits_per_byte": bits_per_byte(total, size),
        "word_perplexity": word_perplexity(total, words),
    }


def summarise(folder: str | Path, table: pd.DataFrame | None = None) -> dict[str, Any]:
    """Return what summary.json holds: sums over the documents that were read whole, their ratios, and which failed.

    `documents` counts those in the sums. `seconds` is the wall time of the whole run; those of scoring and learning are
    sums over documents. The gain is static − adapted: positive where learning helped. Without a reference `static` is
    None. `experts` and `best_rate` are those of a mixture (see `experts.py`), else None.

    Args:
        table: `documents_table(folder)`, where it is at hand already.
    """
    folder = Path(folder)
    run = read_run(folder)
    table = documents_table(folder) if table is None else table
    kept, failed = table[table.failed == ""], table[table.failed != ""]
    flops = {name: sum(kept[name].tolist()) for name in FLOPS}
    seconds = {name: math.fsum(kept[name]) for name in SECONDS}
    adapted = _totals(kept, "nats")
    static: dict[str, Any] | None = None
    gain = gain_percent = None
    if len(kept) and kept.static_nats.notna().all():
        cost = {"flops": flops.pop("static_flops"), "seconds": seconds["static_seconds"]}
        static = _totals(kept, "static_nats") | cost
        if adapted["bits_per_byte"] is not None:
            gain = static["bits_per_byte"] - adapted["bits_per_byte"]
            gain_percent = ratio(100 * gain, static["bits_per_byte"])
    flops.pop("static_flops", None)
    compared, best = experts.compare(folder, kept, run["experts"]) if run.get("experts") else (None, None)
    failures = zip(*(failed[name].tolist() for name in ("document", "name", "failed_segment", "failed")), strict=True)
    return {
        "name": run.get("name"),
        "documents": len(kept),
        **adapted,
        "updates": sum(kept.updates.tolist()),
        **flops,
        "seconds": run.get("seconds"),
        "scoring_seconds": seconds["scoring_seconds"],
        "learning_seconds": seconds["learning_seconds"],
        "tokens_per_second": ratio(adapted["tokens"], run.get("seconds")),
        "peak_memory_bytes": run.get("peak_memory_bytes"),
        "learned_parameters": run.get("learned_parameters"),
        "parameters": run.get("parameters"),
        "protocol": run.get("protocol"),
        "gain_bits_per_byte": gain,
        "gain_percent": gain_percent,
        "static": static,
        "experts": compared,
        "best_rate": best,
        "failed": [
            {"document": document, "name": name, "segment": None if pd.isna(segment) else segment, "reason": reason}
            for document, name, segment, reason in failures
        ],
        "finished_static": [
            {"document": entry["document"], "name": entry["name"]} | entry["finished_static"]
            for entry in run["documents"]
            if entry.get("finished_static")
        ],
    }


# Control characters, halves of surrogate pairs, and what turns the direction of the text around it are shown as signs.
_SIGNS = {code: 0x2400 + code for code in range(32) if code not in b"\t\n"}
for _first, _last in ((0x7F, 0x9F), (0x202A, 0x202E), (0x2066, 0x2069), (0xD800, 0xDFFF)):
    _SIGNS |= dict.fromkeys(range(_first, _last + 1), 0xFFFD)


def visible(text: str) -> str:
    """Replace the characters that would change how a page or a terminal shows what stands beside them."""
    return text.translate(_SIGNS)


def one_line(text: str) -> str:
    """Make a name fit for a table."""
    return " ".join(visible(text).split())


def number(value: Any, digits: int = 3) -> str:
    """Write a number with its thousands apart, a huge one in three figures, or a dash for None and NaN."""
    if value is None or pd.isna(value):
        return "–"
    return f"{value:.3g}" if abs(value) >= 1e7 else f"{value:,.{digits}f}".replace("-", "−")


def si(value: Any, unit: str = "", form: str = "#.3g") -> str:
    """Write three figures and an SI prefix: `si(3.14159e12, "FLOP")` is `3.14 TFLOP`; a dash for None and NaN."""
    if value is None or pd.isna(value):
        return "–"
    value = float(f"{value:.3g}")
    power = min(max(int(math.log10(abs(value)) // 3), 0), 6) if value else 0
    figures = f"{value / 1000**power:{form if power else 'g'}}".rstrip(".")
    return f"{figures} {' kMGTPE'[power].strip()}{unit}".strip()


def scores(table: pd.DataFrame) -> pd.DataFrame:
    """Add to each document its bits per byte, adapted and static, and its gain, in bits per byte and in percent."""
    adapted, static = (bits_per_byte(table[name], table.bytes) for name in ("nats", "static_nats"))
    gain = static - adapted
    return table.assign(adapted=adapted, static=static, gain=gain, percent=ratio(100 * gain, static))


def printed_table(folder: str | Path) -> str:
    """Return the table for a terminal of 80 columns: each document, all of them, and what else they come to."""
    table = scores(documents_table(folder))
    summary = summarise(folder, table)
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
    for row in [*table.head(PRINTED).to_dict("records"), total]:
        line = [number(row[name]) for name in (("static", "adapted", "gain") if static else ("adapted",))]
        line += [number(row["percent"], 1)] if static else []
        line[-1] = "failed" if row["failed"] else line[-1]
        lines.append([one_line(row["name"]), number(row["tokens"], 0), *line, si(row["flops"], "FLOP")])
    widths = [max(map(len, column)) for column in list(zip(*lines, strict=True))[1:]]
    room = 80 - sum(widths) - 2 * len(widths)
    first = max(8, min(room, max(_width(line[0]) for line in lines)))
    head, *body, last = [
        _fit(line[0], first) + "".join(f"  {cell:>{width}}" for cell, width in zip(line[1:], widths, strict=True))
        for line in lines
    ]
    rule = "─" * len(head)
    if len(table) > PRINTED:
        body.append(f"… and {len(table) - PRINTED:,} more in documents.csv")
    before = {name: f"{number(static[name], 3)} → " if static else "" for name in ("nats_per_token", "word_perplexity")}
    ending = [
        f"nats per token {before['nats_per_token']}{number(summary['nats_per_token'])}, "
        f"word perplexity {before['word_perplexity']}{number(summary['word_perplexity'])}"
    ]
    if static:
        times = number(ratio(summary["flops"], static["flops"]), 2)
        ending.append(f"scores in bits per byte, over the same windows; {times}× the FLOPs of static")
    if summary["experts"]:
        ending += ["", *_experts_lines(summary)]
    for failure in summary["failed"][:PRINTED]:
        where = "" if failure["segment"] is None else f" in segment {failure['segment']}"
        reason = f"not in the sums: {one_line(failure['name'])} failed{where}: {one_line(failure['reason'])}"
        ending += textwrap.wrap(reason, 80, subsequent_indent="  ")
    return "\n".join([head, rule, *body, rule, last, "", *ending])


def _experts_lines(summary: dict[str, Any]) -> list[str]:
    """What each expert of a mixture came to alone, and which rate was best."""
    rows = [("expert", "bits/byte", "weight, %")]
    for expert in summary["experts"]:
        alone = f"failed on {expert['failed']:,}" if expert["failed"] else number(expert["bits_per_byte"])
        rows.append((expert["name"], alone, number(100 * expert["share"], 1)))
    rows.append(("mixture", number(summary["bits_per_byte"]), ""))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [f"{name:<{widths[0]}}  {alone:>{widths[1]}}  {share:>{widths[2]}}".rstrip() for name, alone, share in rows]
    return [*lines, *textwrap.wrap(best_rate_sentence(summary["best_rate"]), 80)]


def best_rate_sentence(best: dict[str, Any] | None) -> str:
    """Say which rate was best, by how much, and how sure that is."""
    if best is None:
        return "no rate read all documents to their end"
    if best["runner_up"] is None:
        return f"{best['name']} is the only rate that read all documents to their end"
    margin = (
        f"{best['name']} was best, by {number(best['margin_bits_per_byte'])} bits per byte over {best['runner_up']}"
    )
    if best["margin_low"] is None:
        return f"{margin}; one document says nothing of how sure that is"
    return (
        f"{margin} (95%: {number(best['margin_low'])} to {number(best['margin_high'])}), on {best['documents_better']:,} "
        f"of {best['documents']:,} documents"
    )


def _width(text: str) -> int:
    return sum(0 if unicodedata.combining(sign) else 1 + (unicodedata.east_asian_width(sign) in "WF") for sign in text)


def _fit(text: str, width: int) -> str:
    if _width(text) > width:
        while _width(text) >= width:
            text = text[:-1]
        text += "…"
    return text + " " * (width - _width(text))


def write(folder: str | Path) -> dict[str, Any]:
    """Write documents.csv, summary.json and report.html from the rows of a run, each whole or not at all.

    documents.csv holds no timings, so that it can be compared byte for byte between runs.

    Returns:
        What summary.json holds.
    """
    from dynlight.recording.report.page import render  # matplotlib takes a second to load, and only the page needs it

    folder = Path(folder)
    table = documents_table(folder)
    summary = summarise(folder, table)
    files = {
        "documents.csv": table.drop(columns=SECONDS).to_csv(index=False, lineterminator="\n"),
        "summary.json": json.dumps(summary, indent=2, ensure_ascii=False, allow_nan=False) + "\n",
        "report.html": render(folder, scores(table), summary),
    }
    for name, text in files.items():
        draft = folder / f".{name}.draft"
        draft.write_text(text, "utf-8", newline="\n")
        os.replace(draft, folder / name)
    return summary


def main(arguments: list[str] | None = None) -> int:
    """Write a run's summary, table and report again from its rows, and print the table."""
    parser = argparse.ArgumentParser("python -m dynlight.report", description=main.__doc__, allow_abbrev=False)
    parser.add_argument("folder", type=Path, help="the folder of a run, such as runs/quickstart")
    folder = parser.parse_args(arguments).folder
    try:
        write(folder)
        print(printed_table(folder), "", folder / "report.html", sep="\n")
    except (OSError, ValueError) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
