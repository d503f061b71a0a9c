"""How much of a GPU does learning use, and how far is it from the loop that one would write by hand?

    python experiments/speed/gpu.py                             # two Llama shapes on the first GPU, at most 8 minutes
    python experiments/speed/gpu.py --shape 134m --together 16 --segment 128 --learns LoRA
    python experiments/speed/gpu.py --shape tiny --accelerator cpu --peak 0.1 --segment 32 --together 4   # tries the script

Each row is a run on random weights and tokens: tokens per second, the share of the chip's bf16
peak (FLOPs as dynlight counts them), kernels launched and waits for the device in a segment, and peak memory. Beside it, in
the same process, is the loop by hand (`by_hand.py`): one model, adapters by `bmm`, compiled alike, the same rule, no tables
and no receipt.
Their nats must agree. LoRA (rank 8) has frozen weights in bf16; where all weights learn they are fp32 under bf16 autocast,
and the loop by hand reads one document. Each document has memory for 512 positions; times are of segments at full memory.
What the time does not suffice for is said at the end; the middle of the grid comes first.
"""

import argparse
import csv
import gc
import sys
import time
from collections.abc import Iterator
from dataclasses import astuple, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from benchmark import document, quiet
from by_hand import adapt_by_hand, now, tokens
from lightning.pytorch import Callback, Trainer
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from dynlight import All, DocumentStream, DynamicEvaluation, LoRA, Records, TransformerXL
from dynlight.recording.memory import peak_memory
from dynlight.recording.receipt import Receipt

MEMORY = 512
TIMED = 10  # segments
PROFILED = 2  # segments after these
SHAPES: dict[str, tuple[int, int, int, int, int, bool]] = {  # width, blocks, heads, width of the MLP, vocabulary, tied
    "tiny": (64, 2, 2, 128, 512, True),
    "134m": (768, 12, 12, 2048, 32_000, False),
    "350m": (1024, 24, 16, 2816, 32_000, True),
}
# Dense bf16 TFLOP/s in the makers' data sheets, by a part of the name that torch gives.
PEAKS = {"H200": 989, "H100 PCIe": 756, "H100": 989, "A100": 312, "L40S": 362, "4090": 165}
HOW: dict[str, bool | str] = {"eager": False, "compiled": True, "graphed": "reduce-overhead"}
# Nats of a document may be so far apart, as a share: in bf16 adapters are rounded at other places by hand.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
WAITS = {"cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize"}
Rule = partial(torch.optim.Adam, lr=1e-3, fused=True)


@dataclass
class Row:
    """What is measured, and what was found; None where it was not measured."""

    shape: str
    learns: str
    segment: int
    together: int
    how: str
    tokens_per_second: int | None = None
    by_hand: int | None = None  # tokens per second
    share_of_peak: float | None = None
    launches: int | None = None  # a segment
    waits: int | None = None  # a segment
    peak_gb: float | None = None
    note: str = ""


class Clock(Callback):
    """Times the segments after the warm-up, and looks into some after these."""

    def __init__(self, warm_up: int) -> None:
        self.warm_up = warm_up
        self.launches: int | None = None
        self.waits: int | None = None

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        done = batch_idx + 1 - self.warm_up
        if done == 0:
            self.began = now(pl_module.device)
        elif done == TIMED:
            self.seconds = now(pl_module.device) - self.began
            # Only now, as it reads the model on torch's meta device.
            self.flops = sum(pl_module.flop_counter.count(pl_module.score, row).total for row in pl_module.score.rows)
            if pl_module.device.type == "cuda":
                self._profile = profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU])
                self._profile.start()
        elif done == TIMED + PROFILED and pl_module.device.type == "cuda":
            self._profile.stop()
            counts = {event.key: event.count for event in self._profile.key_averages()}
            self.launches = sum(count for key, count in counts.items() if "Launch" in key) // PROFILED
            self.waits = sum(count for key, count in counts.items() if key in WAITS) // PROFILED


def llama(shape: str, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """A model of random weights."""
    width, blocks, heads, inner, vocabulary, is_tied = SHAPES[shape]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        max_position_embeddings=16_384,
        tie_word_embeddings=is_tied,
    )
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval().to(device)


def rows_of(chosen: argparse.Namespace) -> Iterator[Row]:
    """What is to be measured: of each shape the middle of the grid first."""
    for shape in chosen.shape:
        for segment in sorted(chosen.segment, key=lambda length: abs(length - 128)):
            for learns in chosen.learns:
                for together in sorted(chosen.together, key=lambda count: abs(count - 16)):
                    yield from (Row(shape, learns, segment, together, how) for how in chosen.how)


def measure(row: Row, device: torch.device, peak: float) -> None:
    """Fills in one row of the table."""
    on_gpu = device.type == "cuda"
    dtype = torch.bfloat16 if on_gpu and row.learns == "LoRA" else torch.float32
    make = partial(llama, row.shape, dtype, device)
    warm_up = -(-MEMORY // row.segment) + 4  # until memory is full, and its shapes are compiled
    count = row.segment * (warm_up + TIMED)
    scored = row.together * row.segment * TIMED
    gc.collect()  # what a row before it has left, also one that ran out of memory
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        torch.compiler.reset()
        model, clock = make(), Clock(warm_up)
        ids = tokens(model, count + row.segment * PROFILED)
        module = DynamicEvaluation(
            model,
            None,
            context=TransformerXL(row.segment, MEMORY),
            parameters=LoRA(rank=8) if row.learns == "LoRA" else All(),
            update=Rule,
            reference=None,
            digests=True,
            compile=HOW[row.how],
        )
        records, receipt = Records(), Receipt()
        trainer = Trainer(
            max_epochs=1,
            accelerator=device.type,
            devices=1,
            precision="bf16-mixed" if on_gpu else "32-true",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[records, receipt, clock],
        )
        documents = [document(index, ids) for index in range(row.together)]
        trainer.fit(module, DocumentStream.of(documents, row.together))
        row.tokens_per_second = round(scored / clock.seconds)
        row.share_of_peak = round(clock.flops * TIMED / clock.seconds / (peak * 1e12), 4)
        row.launches, row.waits = clock.launches, clock.waits
        row.peak_gb = round(peak_memory(device) / 1e9, 2)
        rows = records.segments
        nats = rows.nats[rows.segment < warm_up + TIMED].sum()
        del model, module, trainer
        if row.learns == "LoRA" or row.together == 1:
            torch.compiler.reset()
            by_hand, seconds_a_token = adapt_by_hand(
                make, count, row.segment, row.together, row.learns == "LoRA", Rule, HOW[row.how],
                memory=MEMORY, warm_up=warm_up, autocast=on_gpu,
            )  # fmt: skip
            row.by_hand = round(1 / seconds_a_token)
            apart = abs(nats - by_hand) / by_hand
            assert apart <= TOLERANCE[torch.bfloat16 if on_gpu else torch.float32], f"{row}: {nats}, {by_hand} nats"
    except torch.OutOfMemoryError:
        row.note = "out of memory" if row.tokens_per_second is None else "by hand: out of memory"


def main() -> None:
    """Measures until all is done or the time is up; prints the table last, and writes it as CSV."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--shape", choices=SHAPES, nargs="+", default=["134m", "350m"])
    options.add_argument("--learns", choices=["LoRA", "All"], nargs="+", default=["LoRA", "All"])
    options.add_argument("--segment", type=int, nargs="+", default=[32, 128, 512])
    options.add_argument("--together", type=int, nargs="+", default=[1, 4, 16, 64])
    options.add_argument("--how", choices=HOW, nargs="+", default=list(HOW))
    options.add_argument("--minutes", type=float, default=8, help="no row is begun that would end later")
    options.add_argument("--accelerator", choices=["cuda", "cpu"], default="cuda")
    options.add_argument("--peak", type=float, help="TFLOP/s in bf16, where the chip's is not known here")
    options.add_argument("--out", type=Path, default=Path("gpu.csv"), help="a CSV file for the rows")
    chosen = options.parse_args()
    if chosen.accelerator == "cuda" and not torch.cuda.is_available():
        sys.exit("error: --accelerator must be one that is here, got cuda, and there is no GPU")
    device = torch.device(chosen.accelerator, 0)
    name = torch.cuda.get_device_name() if chosen.accelerator == "cuda" else "CPU"
    peak = chosen.peak or next((each for part, each in PEAKS.items() if part in name), None)
    if peak is None:
        sys.exit(f"error: --peak must be given for {name}, whose peak is not known here")
    quiet()
    began, longest, rows = time.perf_counter(), 0.0, []
    left = list(rows_of(chosen))
    with chosen.out.open("w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(field.name for field in fields(Row))
        while left and time.perf_counter() - began + longest < chosen.minutes * 60:
            start = time.perf_counter()
            rows.append(left.pop(0))
            measure(rows[-1], device, peak)
            longest = max(longest, time.perf_counter() - start)
            table.writerow(astuple(rows[-1]))
            file.flush()
            print(*astuple(rows[-1]), flush=True)
    print(
        f"\n{name}, peak {peak} TFLOP/s, torch {torch.__version__}; {len(left)} of {len(left) + len(rows)} rows not begun"
    )
    names = [field.name.replace("_", " ") for field in fields(Row)]
    print(f"| {' | '.join(names)} |\n|{'---|' * len(names)}")
    for row in rows:
        print("| " + " | ".join("" if value is None else str(value) for value in astuple(row)) + " |")


if __name__ == "__main__":
    main()
