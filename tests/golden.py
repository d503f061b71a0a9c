"""Golden values: nats of each segment of a fixed text (the licence) under the packaged model.

`make golden` runs this file and writes them anew; a commit that changes them says by how much and why.
"""

import csv
import tempfile
from functools import partial
from pathlib import Path

import torch
from lightning.pytorch import Trainer
from running import TRAINER

from dynlight import (
    All,
    Context,
    DocumentStream,
    DynamicEvaluation,
    LoRA,
    Matching,
    Overlapping,
    Parameters,
    Pretrained,
    Records,
    TransformerXL,
)

ROOT = Path(__file__).parent.parent
FOLDER = Path(__file__).parent / "golden"

RUNS: dict[str, tuple[Context, Parameters, partial | None]] = {
    "static": (TransformerXL(128, 384), All(), None),
    "all_sgd": (TransformerXL(64, 256), All(), partial(torch.optim.SGD, lr=0.02)),
    "lora_adamw": (TransformerXL(64, 256), LoRA(rank=4), partial(torch.optim.AdamW, lr=1e-3)),
    "last_block_overlapping": (Overlapping(64, 256), Matching(blocks=[-1, -1]), partial(torch.optim.SGD, lr=0.02)),
}


def nats_by_segment(name: str) -> list[float]:
    """Runs one of RUNS."""
    context, parameters, update = RUNS[name]
    model = Pretrained("tiny-books")
    stream = DocumentStream("text", data_files=str(ROOT / "LICENSE"), max_tokens=1500)
    module = DynamicEvaluation(
        model.load(), model.load_tokenizer(), context=context, parameters=parameters, update=update, reference=None
    )
    with tempfile.TemporaryDirectory() as folder:
        records = Records(folder)
        Trainer(callbacks=[records], **TRAINER).fit(module, stream)
        return records.segments.nats.tolist()


def main() -> None:
    """Writes every golden file anew."""
    FOLDER.mkdir(exist_ok=True)
    for name in RUNS:
        with (FOLDER / f"{name}.csv").open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["segment", "nats"])
            writer.writerows((i, repr(nats)) for i, nats in enumerate(nats_by_segment(name)))


if __name__ == "__main__":
    main()
