"""How fast is dynlight beside what one would write by hand? Every line is a ratio of two times measured in turn.

    make benchmark        or: python experiments/speed/benchmark.py [--rounds 7] [--only adapt]

Both sides of a comparison run in turns in one process, A B A B …, after a first turn that isn't counted; the median of
the turns' ratios is printed, with the least and the largest. The clock starts after the first ten segments: what a run
costs once (loading, and measuring the FLOPs of each shape) is printed apart. Peak memory is that of processes of their own.
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
from pathlib import Path

import torch
from lightning.pytorch import Callback, Trainer
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, PreTrainedModel

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
from dynlight.choices.parameters import AdaptedLinear
from dynlight.recording.checkpoint import Checkpoint, CheckpointPeriod
from dynlight.recording.origin import Origin
from dynlight.recording.receipt import Receipt
from dynlight.recording.signals import Signals

MEMORY = 256
RATE = 0.01
WARM_UP = 10  # segments before the clock starts
Result = tuple[float, float]  # nats, seconds after the warm-up


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


def tokens(model: PreTrainedModel, count: int) -> torch.Tensor:
    """Tokens with something to learn: a random walk through the vocabulary."""
    steps = torch.randint(0, 9, (count,), generator=torch.Generator().manual_seed(1))
    return steps.cumsum(0) % model.config.vocab_size


def document(index: int, ids: torch.Tensor) -> Document:
    """A document of these tokens, each of which stands for one letter."""
    return Document(index, f"document {index}", "x" * len(ids), ids, torch.arange(1, len(ids) + 1), prefix=0)


class Clock(Callback):
    """Notes when the warm-up and the run end."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == WARM_UP - 1:
            self.began = time.perf_counter()
        self.ended = time.perf_counter()


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
) -> Result:
    """Documents of `count` tokens (times `lengths`), as `dynlight.fit` adapts them, without loggers."""
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
    )
    clock = Clock()
    Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=any(isinstance(meter, Checkpoint) for meter in meters),
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[*meters, clock],
    ).fit(module, DocumentStream.of(documents, together))
    return module.totals.read.nats, clock.ended - clock.began


def bare(make: Callable[[], PreTrainedModel], count: int, segment: int, two_forwards: bool = False) -> Result:
    """The loop that one would write by hand, with torch's fused update; or with a forward each to score and to learn."""
    model = make()
    sequence = torch.cat([torch.zeros(1, dtype=torch.int64), tokens(model, count)])
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, fused=True)
    memory, total = None, 0.0
    for number, start in enumerate(range(0, count, segment)):
        if number == WARM_UP:
            began = time.perf_counter()
        stop = min(start + segment, count)
        inputs, targets = sequence[None, start:stop], sequence[start + 1 : stop + 1]
        positions = torch.arange(start, stop)[None]

        def forward(inputs=inputs, targets=targets, positions=positions, memory=memory):
            cache = DynamicCache(memory)
            logits = model(input_ids=inputs, position_ids=positions, past_key_values=cache, use_cache=True).logits[0]
            return cross_entropy(logits.float(), targets, reduction="none"), cache

        if two_forwards:
            with torch.no_grad():
                scored, _ = forward()
        nats, cache = forward()
        total += (scored if two_forwards else nats.detach()).sum(dtype=torch.float64).item()
        optimizer.zero_grad()
        nats.mean().backward()
        optimizer.step()
        memory = [(x.keys[:, :, -MEMORY:].detach(), x.values[:, :, -MEMORY:].detach()) for x in cache.layers]
    return total, time.perf_counter() - began


class BatchedLoRA(nn.Module):
    """A linear map with a low-rank adapter of its own for each document, as two batched matrix products."""

    def __init__(self, base: nn.Linear, a: torch.Tensor, documents: int, scale: float) -> None:
        super().__init__()
        self.base = base
        self.a = nn.Parameter(a.detach().repeat(documents, 1, 1))
        self.b = nn.Parameter(torch.zeros(documents, base.out_features, a.shape[0]))
        self.scale = scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + torch.bmm(torch.bmm(x, self.a.mT), self.b.mT) * self.scale


def batched_lora(make: Callable[[], PreTrainedModel], count: int, segment: int, documents: int) -> Result:
    """Equal documents with a LoRA each, written by hand for this one model: what waves are to keep up with."""
    model = make()
    LoRA(rank=8).prepare(model)
    for name, adapted in [(n, m) for n, m in model.named_modules() if isinstance(m, AdaptedLinear)]:
        parent, _, last = name.rpartition(".")
        batched = BatchedLoRA(adapted.base_layer, adapted.lora_A["default"].weight, documents, adapted.scale)
        setattr(model.get_submodule(parent), last, batched)
    learned = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.SGD(learned, lr=RATE, fused=True)
    sequence = torch.cat([torch.zeros(1, dtype=torch.int64), tokens(model, count)]).expand(documents, -1)
    memory, total = None, 0.0
    for number, start in enumerate(range(0, count, segment)):
        if number == WARM_UP:
            began = time.perf_counter()
        stop = min(start + segment, count)
        cache = DynamicCache(memory)
        positions = torch.arange(start, stop)[None]
        logits = model(
            input_ids=sequence[:, start:stop], position_ids=positions, past_key_values=cache, use_cache=True
        ).logits
        targets = sequence[:, start + 1 : stop + 1]
        nats = cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none").view_as(targets)
        total += nats.detach().sum(dtype=torch.float64).item()
        nats.mean(dim=1).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        memory = [(x.keys[:, :, -MEMORY:].detach(), x.values[:, :, -MEMORY:].detach()) for x in cache.layers]
    return total, time.perf_counter() - began


def comparisons() -> Iterator[Comparison]:
    """What is compared, in the order of the table."""
    for name, make in (("test model", llama), ("tiny-books", tiny_books)):
        for segment, count, bound in ((16, 4_160, 1.15), (128, 12_800, 1.05)):
            yield Comparison(
                f"adapt: {name}, segment {segment}: dynlight / bare loop",
                partial(adapt, make, count, segment),
                partial(bare, make, count, segment),
                at_most=bound,
            )
    for segment, count in ((16, 4_160), (128, 12_800)):
        yield Comparison(
            f"two forwards: tiny-books, segment {segment}: score-then-learn recipe / dynlight",
            partial(adapt, tiny_books, count, segment),
            partial(bare, tiny_books, count, segment, two_forwards=True),
            at_least=1.25,
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
        at_most=0.95,
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
            ("LoRA", LoRA(rank=8), 32, 16, 640, 3.0),
            ("LoRA", LoRA(rank=8), 128, 8, 2_560, 1.4),
            ("All", All(), 32, 16, 640, 1.6),
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
        yield Comparison(
            f"waves: {model}, LoRA, segment 32, 16 documents: batched products by hand / dynlight",
            partial(together, lengths=(1.0,) * 16),
            partial(batched_lora, make, 640, 32, 16),
            at_least=0.95,
            tolerance=1e-5,
        )
        # 48 documents, the longest twenty times the shortest, with as many tokens in all as 48 equal ones.
        yield Comparison(
            f"waves: {model}, LoRA, segment 32, 16 together: equal lengths / lengths of 20:1",
            partial(together, lengths=tuple(2 / 21 * (1 + 19 * i / 47) for i in range(48))),
            partial(together, lengths=(1.0,) * 48),
            at_least=0.85,
            tolerance=None,
        )


def measure(comparison: Comparison, rounds: int) -> tuple[float, float, float]:
    """Median, least and largest ratio of the two times over `rounds` turns."""
    ratios = []
    for turn in range(rounds + 1):
        (ours, our_seconds), (other, other_seconds) = comparison.ours(), comparison.other()
        if comparison.tolerance is not None:
            apart = abs(ours - other) / other
            assert apart <= comparison.tolerance, f"{comparison.name}: {ours} and {other} nats"
        if turn > 0:
            faster = other_seconds / our_seconds
            ratios.append(1 / faster if comparison.at_most else faster)
    return statistics.median(ratios), min(ratios), max(ratios)


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
