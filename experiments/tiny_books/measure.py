"""How well does tiny-books read books it has not seen? Prints the table of its card.

python experiments/tiny_books/measure.py 'books/test/*.txt' [model]
"""

import csv
import glob
import logging
import sys
import warnings
from pathlib import Path

from lightning.pytorch import Trainer

from dynlight import DocumentStream, DynamicEvaluation, Pretrained, Records, TransformerXL
from dynlight.recording.report.ratios import bits_per_byte

BYTES = 64 * 1024  # of each book, from its first


def titles(folder: Path) -> dict[str, str]:
    """Titles by the end of a file's path, where a list of them (MANIFEST.tsv) stands above the books."""
    for manifest in (above / "MANIFEST.tsv" for above in folder.absolute().parents):
        if manifest.is_file():
            with manifest.open(newline="") as file:
                return {Path(row["file"]).name: row["title"] for row in csv.DictReader(file, delimiter="\t")}
    return {}


def main(pattern: str, model: str = "tiny-books") -> None:
    """Scores the beginning of each book, with nothing learned while reading."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    files = sorted(Path(name) for name in glob.glob(pattern))
    texts = [file.read_bytes()[:BYTES].decode("utf-8", "ignore") for file in files]
    known = titles(files[0])
    source, records = Pretrained(model), Records()
    stream = DocumentStream.from_texts(texts, [known.get(file.name, file.name) for file in files])
    module = DynamicEvaluation(source.load(), source.load_tokenizer(), context=TransformerXL(128, 384))
    Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[records],
    ).fit(module, stream)
    table = records.documents
    nats, tokens, size = table.nats.sum(), table.tokens.sum(), table.bytes.sum()
    print(
        f"**{bits_per_byte(nats, size):.4f} bits per byte** ({nats / tokens:.4f} nats per token, {size:,} bytes, ",
        end="",
    )
    print(f"{tokens:,} tokens)\n\n| book | tokens | nats per token | bits per byte |\n|---|---:|---:|---:|")
    for row in table.itertuples():
        bits = bits_per_byte(row.nats, row.bytes)
        print(f"| {row.name} | {row.tokens:,} | {row.nats / row.tokens:.3f} | {bits:.3f} |")


if __name__ == "__main__":
    main(*sys.argv[1:])
