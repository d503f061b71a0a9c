"""Does dynlight say what Krause's GPT-2 script and parameter-golf's first LoRA record say, written out by hand?"""

import copy
import json
import time
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from safetensors.torch import save_file

from dynlight.documents.document import prefix_token
from dynlight.learning.stream import DocumentStream
from dynlight.running.run import Run
from experiments import grid, pictures, protocol, results
from experiments.grid import Scale
from experiments.oracle import loop

METHODS = {
    "gpt2_script": "Krause's GPT-2 script",
    "gpt2_paper": "the same by the paper's statistics",
    "gpt2_sgd": "the same without statistics",
    "golf_lora": "parameter-golf's first LoRA record",
}
# The script's settings, and the record's, but for lengths: tiny-books was trained on windows of 512, they read 1,024.
WINDOW, SMALL_WINDOW = 512, 64
LR, EPSILON, BLOCKS, SMALL_BLOCKS = 2e-5, 1e-3, 30, 4
FIXED = "model.embed_tokens.weight"
CORPUS = {"path": "text", "data_files": "../shared/data/books/train/114*.txt", "max_tokens": 10_240}
SMALL_CORPUS = {"path": "text", "data_files": "dynlight/choices/*.py", "max_tokens": 256}
ADAM = {"lr": 0.01, "betas": [0.9, 0.95], "eps": 1e-10}
LORA = {"rank": 8, "alpha": 8, "targets": ["q_proj", "v_proj", "lm_head"]}


def measure(settings: dict[str, Any], scale: Scale, documents_read: int | None = None) -> pd.DataFrame:
    """Nats of each document, by hand and by dynlight, which scores the static model beside it."""
    method = settings["method"]
    window = SMALL_WINDOW if scale.quick else WINDOW
    base = grid.run_of("oracle", {}, scale)
    base += [f"--data.documents={documents_read}"] if documents_read else []
    run = Run.of(base)
    tokenizer, model = run.tokenizer, run.choices.model.load()
    documents = [document.tokens.tolist() for document in run.documents]
    began = time.perf_counter()
    if method == "golf_lora":
        by_hand, arguments = golf_lora(model, documents, prefix_token(tokenizer), window, base)
    else:
        by_hand, arguments = gpt2(method, model, documents, tokenizer, window, scale.quick)
    seconds = time.perf_counter() - began
    rows = both(protocol.Reading([*base, *arguments, "--reference=static"]))
    uncounted = rows[rows.role == "adapted"].assign(flops=np.nan)
    uncounted["seconds"] = seconds * uncounted.tokens / uncounted.tokens.sum() / len(by_hand)
    hand = [uncounted.assign(role=role, nats=nats) for role, nats in by_hand.items()]
    rows = pd.concat([rows, *hand], ignore_index=True)
    rows["nats"], rows["seconds"] = rows.nats.round(6), rows.seconds.round(3)
    rows["rate"] = ADAM["lr"] if method == "golf_lora" else LR
    return rows[["role", "rate", "document", "position", *protocol.SUMS]]


def again(rows: pd.DataFrame) -> tuple[float, float]:
    """Nats of the first document without statistics, now and in the results."""
    method = "gpt2_sgd"
    found = measure({"method": method}, Scale.read(), documents_read=1)
    (name,) = found.document.unique()
    known = rows[(rows.method == method) & (rows.document == name)]
    first, second = (own[own.role == "adapted"].nats.sum() for own in (found, known))
    return first, second


def gpt2(
    method: str, model: Any, documents: list[list[int]], tokenizer: Any, window: int, quick: bool
) -> tuple[dict[str, list[float]], list[str]]:
    """Nats by hand, and the arguments for the same: gradients in units of their usual size, all but the embedding."""
    corpus, blocks = (SMALL_CORPUS, SMALL_BLOCKS) if quick else (CORPUS, BLOCKS)
    texts = [document.tokens.tolist() for document in DocumentStream(**corpus).load(tokenizer)]
    prefix = prefix_token(tokenizer)
    learned = {name: weight for name, weight in model.named_parameters() if name != FIXED}
    weights = list(learned.values())
    statistics: dict[str, Any] = {"data": corpus, "segments": blocks}
    if method == "gpt2_sgd":
        sizes = [torch.zeros_like(weight) for weight in weights]
    else:
        sizes, count = loop.gradient_squares(model, weights, texts, prefix, window, blocks)
        if method == "gpt2_paper":
            sizes = [(size / count).sqrt() for size in sizes]
    if method != "gpt2_paper":  # whose statistics dynlight collects by itself
        file = results.RUNS / "oracle" / f"{method}.safetensors"
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(dict(zip(learned, sizes, strict=True)), file)
        statistics = {"file": str(file)}
    nats = loop.scaled_gradients(model, weights, sizes, documents, prefix, block=window, lr=LR, epsilon=EPSILON)
    update = {"lr": LR, "decay": 0.0, "epsilon": EPSILON, "statistics": statistics}
    return {"by_hand": nats}, [
        setting("context", "Overlapping", {"segment": window, "window": window}),
        setting("parameters", "Matching", {"names": "^(?!model.embed_tokens)"}),
        setting("update", "RMSDynamic", update),
        "--reset.every=never",
    ]


def golf_lora(
    model: Any, documents: list[list[int]], prefix: int, window: int, base: list[str]
) -> tuple[dict[str, list[float]], list[str]]:
    """Nats by hand, and the arguments for the same: adapters of its own for each document, which read together.

    By hand twice, in single and in double precision: with an epsilon of 1e-10 Adam's first step is ± the rate even where a
    gradient is nothing but rounding, and how far that carries should not be taken for a difference of method.
    """
    segment = window // 4
    arguments = [
        setting("context", "Overlapping", {"segment": segment, "window": window}),
        setting("parameters", "LoRA", LORA),
        setting("update", "Adam", ADAM),
        f"--data.together={len(documents)}",
    ]
    choices = Run.of([*base, *arguments]).choices
    ours = choices.model.load()
    choices.parameters.prepare(ours)
    end = ".lora_A.default.weight"  # A is random, so the loop begins with the values that dynlight begins with
    initial = {name.removesuffix(end): w.detach().clone() for name, w in ours.named_parameters() if name.endswith(end)}
    adam = {"lr": ADAM["lr"], "betas": tuple(ADAM["betas"]), "epsilon": ADAM["eps"]}
    settings = {"segment": segment, "window": window, **adam}
    double = {name: a.double() for name, a in initial.items()}
    by_hand = {
        "by_hand_double": loop.document_lora(copy.deepcopy(model).double(), double, documents, prefix, **settings),
        "by_hand": loop.document_lora(model, initial, documents, prefix, **settings),
    }
    return by_hand, arguments


def setting(name: str, class_path: str, init_args: dict[str, Any]) -> str:
    """A choice as on the command line."""
    return f"--{name}={json.dumps({'class_path': class_path, 'init_args': init_args})}"


def both(reading: protocol.Reading) -> pd.DataFrame:
    """The sums of each document, adapted and static."""
    adapted = reading.sums()
    segments = reading.records.segments
    timings = pd.read_parquet(reading.records.folder / "timings.parquet")
    costs = segments.groupby("document")[["static_nats", "static_flops"]].sum()
    static = adapted.assign(
        nats=costs.static_nats.to_numpy(),
        flops=costs.static_flops.to_numpy(),
        seconds=timings.groupby("document").static_seconds.sum().to_numpy(),
    )
    return pd.concat([adapted.assign(role="adapted"), static.assign(role="static")], ignore_index=True)


def differences(rows: pd.DataFrame, method: str, other: str = "adapted") -> pd.Series:
    """The relative difference in nats between the loop and dynlight, or the loop in double precision, of each document."""
    own = rows[rows.method == method].set_index("document")
    found, by_hand = (own[own.role == role].nats for role in (other, "by_hand"))
    return (found / by_hand - 1).abs()


def gain(rows: pd.DataFrame, method: str, role: str = "adapted") -> results.Margin:
    """By how many bits per byte the method is below static."""
    own = rows[rows.method == method]
    return results.margin(own[own.role == "static"], own[own.role == role])


def table(rows: pd.DataFrame) -> pd.DataFrame:
    """Of each method: bits per byte by hand and by dynlight, how far apart they are on a document at most, and the gain."""
    totals = results.totals(rows, ["method", "role"]).set_index(["method", "role"]).bits_per_byte
    lines = [
        {
            "method": name,
            "static": f"{totals[method, 'static']:.4f}",
            "by hand": f"{totals[method, 'by_hand']:.4f}",
            "dynlight": f"{totals[method, 'adapted']:.4f}",
            "largest relative difference": f"{differences(rows, method).max():.1e}",
            "of the loop in double": _largest(differences(rows, method, "by_hand_double")),
            "gain over static": results.said(gain(rows, method)),
        }
        for method, name in METHODS.items()
    ]
    return pd.DataFrame(lines)


def _largest(differences: pd.Series) -> str:
    return f"{differences.max():.1e}" if differences.notna().any() else ""


def figure(rows: pd.DataFrame) -> Figure:
    """What each method gains, by dynlight and by hand, and how far apart the two are on each document."""
    drawing, (gains, apart) = pictures.axes(2)
    for place, method in enumerate(METHODS):
        for role, color, shift in (("adapted", pictures.ADAPTED, -0.1), ("by_hand", pictures.OTHER[1], 0.1)):
            middle, low, high = gain(rows, method, role)
            name = "dynlight" if role == "adapted" else "by hand"
            gains.errorbar(
                place + shift,
                middle,
                [[middle - low], [high - middle]],
                color=color,
                marker="o",
                capsize=3,
                linestyle="",
                label=name if place == 0 else None,
            )
        for role, color, shift in (("adapted", pictures.ADAPTED, -0.1), ("by_hand_double", pictures.STATIC, 0.1)):
            found = differences(rows, method, role).clip(lower=1e-10)
            name = "dynlight" if role == "adapted" else "the loop in double precision"
            apart.scatter([place + shift] * len(found), found, color=color, s=14, label=name if place == 0 else None)
    gains.axhline(0, color="black", linewidth=0.6)
    for axis in (gains, apart):
        axis.set_xticks(range(len(METHODS)), list(METHODS))
        axis.set_xlim(-0.5, len(METHODS) - 0.5)
    apart.set_yscale("log")
    pictures.label(gains, "", "bits per byte below static", "gain")
    pictures.label(apart, "", "relative difference of a document's nats", "difference from the loop by hand")
    return drawing


def verdict(rows: pd.DataFrame) -> str:
    """How far dynlight and the loops are apart at most, and what the methods gain here."""
    largest = max(METHODS, key=lambda method: differences(rows, method).max())
    gains = "; ".join(f"{method} {results.said(gain(rows, method))}" for method in METHODS)
    return (
        f"dynlight and the loops by hand differ by at most {differences(rows, largest).max():.1e} of a document's nats "
        f"({largest}), the loop of golf_lora in single and in double precision by "
        f"{differences(rows, 'golf_lora', 'by_hand_double').max():.1e}; bits per byte gained over static: {gains}."
    )
