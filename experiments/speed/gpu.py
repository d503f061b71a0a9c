"""How much of a GPU does learning use? Tokens per second, and the share of the chip's bf16 peak, by documents together.

    python experiments/speed/gpu.py                  # a Llama of 134M random weights on the first GPU
    python experiments/speed/gpu.py --shape 350m --out results.csv
    python experiments/speed/gpu.py --shape tiny --accelerator cpu --peak 0.1    # tries the script itself

FLOPs are those that dynlight counts, of what ran. LoRA (rank 8) has frozen weights in bf16; where all weights learn they are
fp32 under bf16 autocast. Each document has memory for 512 positions. Times are of the segments after the first ten.
"""

import argparse
import csv
import sys
import time
from functools import partial
from pathlib import Path

import torch
from benchmark import WARM_UP, document, quiet, tokens
from lightning.pytorch import Callback, Trainer
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from dynlight import All, DocumentStream, DynamicEvaluation, LoRA, TransformerXL

MEMORY = 512
SHAPES = {  # hidden width, blocks, heads, width of the MLP, vocabulary
    "tiny": (64, 2, 2, 128, 512),
    "134m": (768, 12, 12, 2048, 32_000),
    "350m": (1024, 24, 16, 2816, 32_000),
}
# Dense bf16 TFLOP/s in the makers' data sheets, by a part of the name that torch gives.
PEAKS = {"H200": 989, "H100 PCIe": 756, "H100": 989, "A100": 312, "L40S": 362, "4090": 165}


def llama(shape: str, dtype: torch.dtype, compiles: bool) -> PreTrainedModel:
    """A model of random weights."""
    width, blocks, heads, inner, vocabulary = SHAPES[shape]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    if compiles:
        model.compile()
    return model


class Clock(Callback):
    """Adds up tokens and FLOPs of the segments after the warm-up, and the time that the device took for them."""

    def on_train_start(self, trainer, pl_module):
        self.tokens, self.flops, self.began = 0, 0, time.perf_counter()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        score = pl_module.score
        if batch_idx >= WARM_UP:
            self.tokens += sum(score.segment.tokens)
            self.flops += sum(pl_module.flop_counter.count(score, row).total for row in score.rows)
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize()
        if batch_idx == WARM_UP - 1:
            self.began = time.perf_counter()
        self.seconds = time.perf_counter() - self.began


def measure(
    shape: str, learns: str, segment: int, together: int, compiles: bool, segments: int, accelerator: str
) -> Clock:
    """Reads `together` documents of so many segments after the warm-up."""
    model = llama(shape, torch.bfloat16 if learns == "LoRA" else torch.float32, compiles)
    ids = tokens(model, segment * (WARM_UP + segments))
    documents = [document(index, ids) for index in range(together)]
    clock = Clock()
    module = DynamicEvaluation(
        model,
        None,
        context=TransformerXL(segment, MEMORY),
        parameters=LoRA(rank=8) if learns == "LoRA" else All(),
        update=partial(torch.optim.SGD, lr=0.01),
        reference=None,
    )
    Trainer(
        max_epochs=1,
        accelerator=accelerator,
        devices=1,
        precision="bf16-mixed",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[clock],
    ).fit(module, DocumentStream.of(documents, together))
    return clock


def main() -> None:
    """Prints a row for each combination, and writes them as CSV where asked to."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--shape", choices=SHAPES, default="134m")
    options.add_argument("--segments", type=int, default=30, help="timed, after the warm-up")
    options.add_argument("--together", type=int, nargs="+", default=[1, 4, 16, 64])
    options.add_argument("--accelerator", default="cuda")
    options.add_argument("--peak", type=float, help="TFLOP/s in bf16, where the chip's is not known here")
    options.add_argument("--compile", action="store_true", help="documents alone are measured with torch.compile too")
    options.add_argument("--out", type=Path, help="a CSV file for the rows")
    chosen = options.parse_args()
    if chosen.accelerator == "cuda" and not torch.cuda.is_available():
        sys.exit("error: --accelerator must be one that is here, got cuda, and there is no GPU")
    name = torch.cuda.get_device_name() if chosen.accelerator == "cuda" else "CPU"
    peak = chosen.peak or next((each for part, each in PEAKS.items() if part in name), None)
    if peak is None:
        sys.exit(f"error: --peak must be given for {name}, whose peak is not known here")
    quiet()
    print(f"{name}, peak {peak} TFLOP/s, {chosen.shape}\n")
    print("| learns | segment | together | compiled | tokens per second | share of peak |\n|---|---|---|---|---|---|")
    rows = []
    for learns in ("LoRA", "All"):
        for segment in (128, 512):
            for together in chosen.together:
                # Documents together are mapped by vmap, which torch.compile does not go into.
                for compiles in (False, True) if chosen.compile and together == 1 else (False,):
                    rows.append(row(chosen, learns, segment, together, compiles, peak))
                    print("| " + " | ".join(map(str, rows[-1])) + " |", flush=True)
    if chosen.out:
        with chosen.out.open("w", newline="") as file:
            table = csv.writer(file, lineterminator="\n")
            table.writerow(["learns", "segment", "together", "compiled", "tokens_per_second", "share_of_peak"])
            table.writerows(rows)


def row(
    chosen: argparse.Namespace, learns: str, segment: int, together: int, compiles: bool, peak: float
) -> tuple[object, ...]:
    """One line of the table."""
    try:
        clock = measure(chosen.shape, learns, segment, together, compiles, chosen.segments, chosen.accelerator)
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return learns, segment, together, compiles, "out of memory", ""
    share = clock.flops / clock.seconds / (peak * 1e12)
    return learns, segment, together, compiles, round(clock.tokens / clock.seconds), f"{share:.1%}"


if __name__ == "__main__":
    main()
