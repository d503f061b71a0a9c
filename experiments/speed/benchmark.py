"""How fast is dynlight beside what one would write by hand? Every line is a ratio of two times measured in turn.

    make benchmark        or: python experiments/speed/benchmark.py [--rounds 7] [--only adapt]

Both sides of a comparison run in turns in one process, A B A B …, after a first turn that isn't counted; the median of
the turns' ratios is printed, with the least and the largest. What is compared is seconds a token, of each document's
segments after its first ten, at which memory is full: what a run costs once (loading, measuring the FLOPs of each shape,
compiling) is left out. Peak memory is that of processes of their own.
"""

import argparse
import csv
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from by_hand import MEMORY, RATE, WARM_UP, Result, adapt_by_hand, tokens
from lightning.pytorch import Callback, Trainer
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from dynlight import (
    All,
    Document,
    DocumentStream,
    DynamicEvaluation,
    LoRA,
    Matching,
    Parameters,
    Pretrained,
    Records,
    TransformerXL,
    UpdateFrequency,
)
from dynlight.recording.checkpoint import Checkpoint, CheckpointPeriod
from dynlight.recording.origin import Origin
from dynlight.recording.receipt import Receipt
from dynlight.recording.signals import Signals


@dataclass(frozen=True)
class Comparison:
    """Two ways to do the same, and the ratio of their times that is wanted."""

    name: str
    ours: Callable[[], Result]
    other: Callable[[], Result]
    at_most: float | None = None
    at_least: float | None = None  # of other / ours: how many times faster ours is
    tolerance: float | None = 0.0  # how far their nats may be apart, as a share; None: they do different things

    @property
    def target(self) -> str:
        return f"≤ {self.at_most:.2f}×" if self.at_most else f"≥ {self.at_least:.2f}× faster"


def llama() -> PreTrainedModel:
    """The test model: 4 blocks, 128 wide."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
    )
    return AutoModelForCausalLM.from_config(config).eval()


def tiny_books() -> PreTrainedModel:
    """The model in this package."""
    return Pretrained("tiny-books").load().eval()


def document(index: int, ids: torch.Tensor) -> Document:
    """A document of these tokens, each of which stands for one letter."""
    return Document(index, f"document {index}", "x" * len(ids), ids, torch.arange(1, len(ids) + 1), prefix=0)


class Clock(Callback):
    """Seconds and tokens of each document's segments after its first ten; or of all but the first ten of the run.

    The first of these counts the same segments whether documents are read one after another or together.
    """

    def __init__(self, of_run: bool) -> None:
        self.of_run = of_run
        self.seconds, self.tokens, self.last = 0.0, 0, 0.0

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        now = time.perf_counter()
        if (batch_idx if self.of_run else batch.cut.index) >= WARM_UP:
            self.seconds += now - self.last
            self.tokens += sum(batch.tokens)
        self.last = now


def adapt(
    make: Callable[[], PreTrainedModel],
    count: int,
    segment: int,
    parameters: Parameters | None = None,
    schedule: UpdateFrequency | None = None,
    lengths: tuple[float, ...] = (1.0,),
    together: int = 1,
    receipt: bool = False,
    meters: list[Callback] | None = None,
    compile: bool = False,
    of_run: bool = False,
) -> Result:
    """Documents of `count` tokens (times `lengths`), as `dynlight.fit` adapts them, without loggers; `of_run`: see Clock."""
    model = make()
    documents = [document(index, tokens(model, int(count * length))) for index, length in enumerate(lengths)]
    meters = [Records(), *([Receipt()] if receipt else [])] if meters is None else meters
    module = DynamicEvaluation(
        model,
        None,
        context=TransformerXL(segment, MEMORY),
        parameters=parameters or All(),
        update=partial(torch.optim.SGD, lr=RATE),
        schedule=schedule,
        reference=None,
        digests=any(isinstance(meter, Receipt) for meter in meters),
        compile=compile,
    )
    clock = Clock(of_run)
    Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=any(isinstance(meter, Checkpoint) for meter in meters),
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[*meters, clock],
    ).fit(module, DocumentStream.of(documents, together))
    return module.totals.read.nats, clock.seconds / clock.tokens


def comparisons() -> Iterator[Comparison]:
    """What is compared, in the order of the table."""
    for name, make in (("test model", llama), ("tiny-books", tiny_books)):
        for segment, count, bound in ((16, 4_160, 1.15), (128, 12_800, 1.05)):
            yield Comparison(
                f"adapt: {name}, segment {segment}: dynlight / bare loop",
                partial(adapt, make, count, segment),
                partial(adapt_by_hand, make, count, segment),
                at_most=bound,
            )
    for segment, count, bound in ((16, 4_160, 1.2), (128, 12_800, 1.25)):
        yield Comparison(
            f"two forwards: tiny-books, segment {segment}: score-then-learn recipe / dynlight",
            partial(adapt, tiny_books, count, segment),
            partial(adapt_by_hand, tiny_books, count, segment, two_forwards=True),
            at_least=bound,
        )
    whole = partial(adapt, tiny_books, 12_800, 128)
    yield Comparison(
        "schedule: tiny-books, segment 128: every 4 / every 1",
        partial(adapt, tiny_books, 12_800, 128, schedule=UpdateFrequency(every=4)),
        whole,
        at_most=0.6,
        tolerance=None,
    )
    yield Comparison(
        "parameters: tiny-books, segment 128: LoRA / All",
        partial(adapt, tiny_books, 12_800, 128, LoRA(rank=8)),
        whole,
        at_most=0.90,
        tolerance=None,
    )
    yield Comparison(
        "parameters: tiny-books, segment 128: last quarter of blocks / All",
        partial(adapt, tiny_books, 12_800, 128, Matching(blocks=[-1, -1])),
        whole,
        at_most=0.7,
        tolerance=None,
    )
    for name, parameters, documents in (("All", All(), 1), ("All", All(), 8), ("LoRA", LoRA(rank=8), 16)):
        plain = partial(adapt, tiny_books, 1_280, 64, parameters, lengths=(1.0,) * documents, together=documents)
        yield Comparison(
            f"receipt: tiny-books, {name}, segment 64, {documents} documents: with / without",
            partial(plain, receipt=True),
            plain,
            at_most=1.03,
        )
    for documents in (1, 12):
        yield Comparison(
            f"records and checkpoints: tiny-books, segment 64, {documents} documents: with / without",
            partial(keep, 38_400 // documents, 64, documents, keeps=True),
            partial(keep, 38_400 // documents, 64, documents, keeps=False),
            at_most=1.02,
        )
    for model, make in (("test model", llama), ("tiny-books", tiny_books)):
        for name, parameters, segment, together, count, bound in (
            ("LoRA", LoRA(rank=8), 32, 16, 640, 6.0),
            ("LoRA", LoRA(rank=8), 128, 16, 2_560, 2.8),
            ("All", All(), 32, 16, 640, 2.5),
        ):
            documents = partial(adapt, make, count, segment, parameters, lengths=(1.0,) * together)
            yield Comparison(
                f"waves: {model}, {name}, segment {segment}: one at a time / {together} together",
                partial(documents, together=together),
                documents,
                at_least=bound,
                tolerance=1e-5,
            )
        together = partial(adapt, make, 640, 32, LoRA(rank=8), together=16)
        equal = partial(together, lengths=(1.0,) * 16)
        by_hand = partial(adapt_by_hand, make, 640, 32, 16, adapters=True)
        yield Comparison(
            f"waves: {model}, LoRA, segment 32, 16 documents: batched products by hand / dynlight",
            equal,
            by_hand,
            at_least=0.97,
            tolerance=1e-5,
        )
        compiled = partial(equal, compile=True)
        yield Comparison(
            f"compile: {model}, LoRA, segment 32, 16 documents: dynlight / dynlight compiled",
            compiled,
            equal,
            at_least=1.4,
            tolerance=1e-5,
        )
        yield Comparison(
            f"compile: {model}, LoRA, segment 32, 16 documents: by hand compiled / dynlight compiled",
            compiled,
            partial(by_hand, compile=True),
            at_least=0.95,
            tolerance=1e-5,
        )
        # 48 documents, the longest twenty times the shortest, with as many tokens in all as 48 equal ones.
        yield Comparison(
            f"waves: {model}, LoRA, segment 32, 16 together: equal lengths / lengths of 20:1",
            partial(together, lengths=tuple(2 / 21 * (1 + 19 * i / 47) for i in range(48)), of_run=True),
            partial(together, lengths=(1.0,) * 48, of_run=True),
            at_least=0.85,
            tolerance=None,
        )


def measure(comparison: Comparison, rounds: int) -> tuple[float, float, float]:
    """Median, least and largest ratio of the two times over `rounds` turns."""
    ratios = []
    for turn in range(rounds + 1):
        torch.compiler.reset()  # each turn compiles its own model
        (ours, our_seconds), (other, other_seconds) = comparison.ours(), comparison.other()
        if comparison.tolerance is not None:
            apart = abs(ours - other) / other
            assert apart <= comparison.tolerance, f"{comparison.name}: {ours} and {other} nats"
        if turn > 0:
            faster = other_seconds / our_seconds
            ratios.append(1 / faster if comparison.at_most else faster)
    return statistics.median(ratios), min(ratios), max(ratios)


def flatness() -> float:
    """Median seconds of the last 2,000 segments of a document of 20,000, over those of the first 2,000 at full memory."""
    ends = []

    class Ends(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            ends.append(time.perf_counter())

    adapt(llama, 16 * 20_000, 16, LoRA(rank=8), meters=[Records(), Ends()])
    taken = [stop - start for start, stop in pairwise(ends)]
    full = MEMORY // 16
    return statistics.median(taken[-2_000:]) / statistics.median(taken[full : full + 2_000])


def peak_memory(count: int) -> int:
    """Peak memory in bytes of a process that adapts tiny-books to a document of `count` tokens."""
    code = (
        "import sys, torch; sys.path.insert(0, sys.argv[1]); import benchmark; from dynlight.recording.memory import peak_memory\n"
        f"benchmark.quiet(); benchmark.adapt(benchmark.tiny_books, {count}, 128)\n"
        "print(peak_memory(torch.device('cpu')))"
    )
    command = [sys.executable, "-c", code, str(Path(__file__).parent)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def seconds_of_processes(count: int, folder: str) -> float:
    """How long `count` processes of one thread each read the same 16 documents, from the first segment to the last."""
    out = Path(folder) / str(count)
    strategy = "document_parallel" if count > 1 else "auto"
    settings = f"""
        model.pretrained=tiny-books data.path=python-stdlib data.documents=16 data.max_tokens=2048 seed=0
        context=TransformerXL context.segment=64 context.memory=256 update=SGD update.lr=0.05
        trainer.accelerator=cpu trainer.devices={count} trainer.strategy={strategy} out={out}
    """
    command = [sys.executable, "-m", "dynlight.fit", *(f"--{setting}" for setting in settings.split())]
    subprocess.run(command, capture_output=True, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    return json.loads((out / "summary.json").read_text())["seconds"]


def keep(count: int, segment: int, together: int, keeps: bool) -> Result:
    """As many documents at once, with rows, receipt and checkpoints as of `dynlight.fit`, or with none of them.

    A run of this size ends before its first checkpoint, so one is written behind its end, and counted for the share of the
    default period that the run took.
    """
    with tempfile.TemporaryDirectory() as folder, Signals() as signals:
        receipt, period = Receipt(Path(folder)), CheckpointPeriod()
        checkpoint = Checkpoint(Path(folder), receipt, period, signals)
        checkpoint.prepare(Origin.of_run(settings={}, documents=[], together=together, ranks=1))
        meters = [Records(folder), receipt, checkpoint] if keeps else []
        written = 0.0

        class Written(Callback):
            def on_train_end(self, trainer, pl_module):
                nonlocal written
                if keeps:
                    began = time.perf_counter()
                    checkpoint.save(pl_module)
                    written = time.perf_counter() - began

        nats, seconds = adapt(
            tiny_books, count, segment, lengths=(1.0,) * together, together=together, meters=[Written(), *meters]
        )
        return nats, seconds * (1 + written / (60 * period.minutes))


def two_processes(rounds: int) -> tuple[float, float, float]:
    """Median, least and largest of how many times faster two processes are than one."""
    ratios = []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            ratios.append(seconds_of_processes(1, folder) / seconds_of_processes(2, folder))
    return statistics.median(ratios), min(ratios), max(ratios)


def quiet() -> None:
    """Leaves out what Lightning says of each of the many runs."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")


def main() -> None:
    """Prints the table and writes it to results.csv."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rounds", type=int, default=5, help="turns counted of each comparison")
    options.add_argument("--only", default="", help="comparisons whose name holds this")
    options.add_argument("--out", default=str(Path(__file__).parent / "results.csv"))
    chosen = options.parse_args()
    quiet()
    rows = []
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, median of {chosen.rounds} (least – largest)")
    for comparison in comparisons():
        if chosen.only in comparison.name:
            middle, least, most = measure(comparison, chosen.rounds)
            holds = middle <= comparison.at_most if comparison.at_most else middle >= comparison.at_least
            rows.append((comparison.name, middle, least, most, comparison.target, holds))
            print_row(*rows[-1])
    if chosen.only in (name := "processes: tiny-books, 16 documents: one process / two, a thread each"):
        found = two_processes(chosen.rounds)
        rows.append((name, *found, "≥ 1.70× faster", found[0] >= 1.7))
        print_row(*rows[-1])
    if chosen.only in (name := "length: seconds of the last 2,000 of 20,000 segments / of the first"):
        found = flatness()
        rows.append((name, *[found] * 3, "≤ 1.02×", found <= 1.02))
        print_row(*rows[-1])
    if chosen.only in (name := "memory: 10 times the tokens"):
        short, long = peak_memory(12_800), peak_memory(128_000)
        rows.append((name, *[long / short] * 3, "≤ 1.02×", long / short <= 1.02))
        print_row(*rows[-1])
    with open(chosen.out, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["comparison", "ratio", "least", "largest", "target", "holds"])
        writer.writerows(
            [(name, *(f"{x:.3f}" for x in ratios), target, holds) for name, *ratios, target, holds in rows]
        )


def print_row(name: str, middle: float, least: float, most: float, target: str, holds: bool) -> None:
    """One line of the table."""
    print(
        f"{name:<72} {middle:6.3f}× ({least:.3f} – {most:.3f})  wanted {target:<13} {'yes' if holds else 'NO'}",
        flush=True,
    )


if __name__ == "__main__":
    main()
