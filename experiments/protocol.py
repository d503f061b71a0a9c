"""What is measured at one point of a grid: the adapted score, beside the controls without which it would mean nothing.

    learning rate       from books that are in no test, from a grid that is widened until its best is not at an edge
    adapted             the test set, read at that rate
    static              the same windows, with nothing learned
    static_equal_flops  nothing learned either, but the FLOPs of learning spent on windows as long as the model can read
    wrong_document      weights that learned from another book, then frozen

An experiment's `run.yaml` is a run of `dynlight.fit` on the test set; its `rates` are where the search begins. A point's
settings override it.
"""

import json
import logging
import math
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch

from dynlight.choices.parameters import merge_adapters
from dynlight.choices.update import usual_rates
from dynlight.documents.document import Document
from dynlight.durable import draft_of
from dynlight.recording.records import Records
from dynlight.recording.report.rates import nats_by_document
from dynlight.running.configuration import parse
from dynlight.running.run import Run
from dynlight.running.trainer import quiet
from experiments import results
from experiments.grid import Scale, arguments, digest, model_of, run_of, weights_of

WIDER = 10**0.5  # one step of the search for a rate
MOST_STEPS = 8
# The longest window that a model was trained to read, where it has room for more positions.
TRAINED_WINDOWS = {"tiny-books": 512, "experiments/ladder": 1024}
SUMS = ["tokens", "bytes", "nats", "flops", "seconds"]


class Reading:
    """One run of `dynlight.fit`'s arguments without files: its tables, and the module that read.

    Args:
        arguments: of `dynlight.fit`.
        model: read by in place of the arguments' own, and not learned from; None: their own.
        documents: read in place of the arguments' own; None: their own.
    """

    def __init__(
        self, arguments: Sequence[str], model: Any = None, documents: Sequence[Document] | None = None
    ) -> None:
        quiet()
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        run = Run.of(arguments)
        documents = run.documents if documents is None else documents
        frozen = {} if model is None else {"update": None, "rates": None, "mixture": None}
        self.records = Records()
        self.module = run.read(run.module(model, **frozen), documents, [self.records])

    @property
    def rates(self) -> list[float]:
        """Of each learning expert its rate."""
        return [rule.defaults["lr"] for rule in self.module.optimizers_of_rules]

    def nats_of_rates(self) -> list[float]:
        """Nats of all documents at each rate, infinite where it failed on one."""
        nats = nats_by_document(pd.read_parquet(self.records.folder / "experts.parquet"))
        sums = [nats[expert].sum(skipna=False) for expert in nats]
        return [total if math.isfinite(total) else math.inf for total in sums[self.module.has_static_expert :]]

    def sums(self, every: int | None = None) -> pd.DataFrame:
        """SUMS for each document, or for each `every` tokens of it; without what a static reference cost."""
        rows = self.records.segments
        timings = pd.read_parquet(self.records.folder / "timings.parquet")
        rows = rows.merge(timings, on=["document", "segment"])
        rows["seconds"] -= rows.static_seconds
        rows["position"] = rows.start // every * every if every else 0
        names = self.records.documents.set_index("document").name
        found = rows.groupby(["document", "position"], as_index=False)[SUMS].sum()
        return found.assign(document=found.document.map(names))


def measure(name: str, point: dict[str, Any], scale: Scale, every: int | None = None) -> pd.DataFrame:
    """Rows of the results: for each role and document the sums, with the rate that was chosen.

    Args:
        name: of the experiment.
        point: settings that override its `run.yaml`.
        scale: of the documents and models.
        every: how many tokens a row is of; None: a document.
    """
    test = run_of(name, point, scale)
    is_mixed = parse(test).mixture is not None
    rate = None if is_mixed else choose_rate(test, scale)[0]
    learned = test if is_mixed else [*test, "--rates=null", f"--update.lr={rate}"]
    found = {"adapted": adapted(learned, every), "static": static(test, every)}
    found["static_equal_flops"] = equal_flops(test, found["adapted"], every)
    if not is_mixed:
        found["wrong_document"] = wrong_document(learned, scale, every)
    return labelled(found, rate)


def choose_rate(test: Sequence[str], scale: Scale) -> tuple[float, dict[float, float]]:
    """The best learning rate on the books of choice, and the nats per token of each rate that was tried.

    The search begins at the configuration's `rates` (else at those that suit its rule) and is widened by half a decade at
    the edge where its best lies, until it lies within.
    """
    rates = sorted(parse(test).rates or _usual(test))
    tried: dict[float, float] = {}
    for _ in range(1 if scale.quick else MOST_STEPS):
        tried |= try_rates(test, rates, scale)
        best = min(tried, key=tried.__getitem__)
        if best == max(tried):
            rates = [rounded(best * WIDER)]
        elif best == min(tried):
            rates = [rounded(best / WIDER)]
        else:
            break
    return best, dict(sorted(tried.items()))


def statistics(name: str, point: dict[str, Any], scale: Scale) -> str:
    """What `RMSDynamic` knows of the gradients, as its setting: taken once from other books, then read from a file."""
    described = {"data": scale.statistics, "segments": 8 if scale.quick else 200}
    taken = {**described, "run": run_of(name, {}, scale), "weights": weights_of(model_of(name, point, scale))}
    file = results.RUNS / "statistics" / f"{digest(taken)}.safetensors"
    return json.dumps({**described, "file": str(file)})


def _usual(test: Sequence[str]) -> list[float]:
    choices = Run.of(test).choices
    width = choices.model.config().get_text_config().hidden_size
    return usual_rates(choices["update"], width, choices.parameters.are_adapters)


def try_rates(test: Sequence[str], rates: Sequence[float], scale: Scale) -> dict[float, float]:
    """Nats per token of each rate on the books of choice, of each as many tokens as of those of the test."""
    found = kept(_try_rates, [*test, *arguments(scale.choice), f"--rates={list(rates)}"])
    return dict(zip(found.rate, found.nats_per_token, strict=True))


def _try_rates(arguments: Sequence[str]) -> pd.DataFrame:
    reading = Reading(arguments)
    nats = np.array(reading.nats_of_rates()) / reading.records.segments.tokens.sum()
    return pd.DataFrame({"rate": reading.rates, "nats_per_token": nats})


def rounded(rate: float) -> float:
    """A rate in two digits."""
    return float(f"{rate:.2g}")


def adapted(learned: Sequence[str], every: int | None = None) -> pd.DataFrame:
    """The test set, learned from; if learning fails on a document, the initial weights read the rest of it."""
    reading = Reading([*learned, "--reference=null", "--on_failure=stop"])
    if reading.module.failures.of_documents:
        reading = Reading([*learned, "--reference=static", "--on_failure=static"])
    return reading.sums(every)


def static(test: Sequence[str], every: int | None = None, context: dict[str, Any] | None = None) -> pd.DataFrame:
    """The test set with nothing learned, in the same windows or in another context."""
    dropped = (
        "--update",
        "--rate",
        "--mixture",
        "--parameters",
        "--schedule",
        "--objective",
        "--gradient",
        "--memories",
        "--teacher",
        "--context.refresh",
        *(["--context"] if context else []),
    )
    settings = [argument for argument in test if not argument.startswith(dropped)]
    settings += [f"--context={json.dumps(context)}"] if context else []
    plain = [
        "--update=null",
        "--rates=null",
        "--mixture=null",
        "--memories=null",
        "--parameters=All",
        "--schedule.every=1",
    ]
    return kept(partial(_static, every=every), [*settings, *plain])


def _static(arguments: Sequence[str], every: int | None) -> pd.DataFrame:
    return Reading(arguments).sums(every)


def equal_flops(test: Sequence[str], adapted: pd.DataFrame, every: int | None) -> pd.DataFrame:
    """The static model over windows as long as it can read, overlapping so much that it costs as many FLOPs as learning.

    How many tokens each window adds is rounded down to half a power of two, so in favour of the static model.
    """
    window = _trained_window(test)
    budget = adapted.flops.sum() / adapted.tokens.sum()
    disjoint = static(test, every, _overlapping(window, window))  # costs what a forward costs for each token it reads
    share = disjoint.flops.sum() / disjoint.tokens.sum() / budget
    halves = math.floor(2 * math.log2(max(1, min(window, window * share))))
    return static(test, every, _overlapping(int(2 ** (halves / 2)), window))


def _trained_window(test: Sequence[str]) -> int:
    model = Run.of(test).choices.model
    known = [window for start, window in TRAINED_WINDOWS.items() if model.pretrained.startswith(start)]
    return known[0] if known else int(model.config().get_text_config().max_position_embeddings)


def _overlapping(segment: int, window: int) -> dict[str, Any]:
    return {"class_path": "Overlapping", "init_args": {"segment": segment, "window": window}}


def wrong_document(learned: Sequence[str], scale: Scale, every: int | None = None) -> pd.DataFrame:
    """The test set, read by frozen weights that have learned from another book."""
    settings = [*learned, "--reference=null", "--on_failure=stop"]
    model = Reading([*settings, *arguments(scale.wrong), "--data.together=1"]).module.model.requires_grad_(False)
    merge_adapters(model)
    return Reading(settings, model).sums(every)


def kept(read: Callable[[Sequence[str]], pd.DataFrame], arguments: Sequence[str]) -> pd.DataFrame:
    """What `read` finds, read once for each configuration: points of a grid share the static model and their rates."""
    config = parse(arguments).as_dict()
    described = {key: str(_without_nothing(value)) for key, value in config.items() if key not in ("config", "out")}
    described["reads"] = str(getattr(read, "func", read).__name__) + str(getattr(read, "keywords", ""))
    described["weights"] = weights_of(config["model"]["pretrained"])
    path = results.RUNS / "kept" / f"{digest(described)}.csv"
    if not path.exists():
        found = read(arguments)
        path.parent.mkdir(parents=True, exist_ok=True)
        with draft_of(path, sync=False, is_shared=True) as draft:  # another process may be reading the same
            found.to_csv(draft, index=False)
    return pd.read_csv(path)


def _without_nothing(section: Any) -> Any:
    """A section without an empty `init_args`, which is there or not by what the class in it has taken the place of."""
    if not isinstance(section, dict):
        return section
    return {name: value for name, value in section.items() if value or name != "init_args"}


def alone(arguments: Sequence[str]) -> dict[str, Any]:
    """What `run.json` says of a run in a process of its own, whose peak memory is then of nothing else."""
    code = (
        "import json, sys; from experiments.protocol import Reading, threads; from dynlight.recording.report.tables import read_run; "
        "threads(); print(json.dumps(read_run(Reading(sys.argv[1:]).records.folder)))"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def labelled(found: dict[str, pd.DataFrame], rate: float | None) -> pd.DataFrame:
    """The rows of all roles, one below the other, with the rate."""
    rows = pd.concat([table.assign(role=role) for role, table in found.items()], ignore_index=True)
    rows["rate"] = np.nan if rate is None else rate
    rows["nats"], rows["seconds"] = rows.nats.round(6), rows.seconds.round(3)
    return rows[["role", "rate", "document", "position", *SUMS]]


def threads() -> None:
    """One thread, unless OMP_NUM_THREADS says otherwise: the models are so small that more would wait for each other."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
