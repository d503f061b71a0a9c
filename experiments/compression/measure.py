"""How small does a text get beside xz, zstd, bzip2 and brotli? Prints a table; each file is compressed by itself.

    python experiments/compression/measure.py configs/quickstart.yaml 6144                # the files that the quickstart reads
    python experiments/compression/measure.py configs/mixture.yaml 60000 book.txt …       # the first 60,000 tokens of files

Needs the packages zstandard and brotli besides.
"""

import bz2
import lzma
import sys
import time
from pathlib import Path

import brotli
import zstandard

from dynlight.running.run import Run
from dynlight.running.trainer import quiet
from dynlight.using.packed import pack, unpack

OTHERS = {
    "zstd -19": (lambda data: zstandard.compress(data, 19), zstandard.decompress),
    "brotli -11": (lambda data: brotli.compress(data, quality=11), brotli.decompress),
    "bzip2 -9": (bz2.compress, bz2.decompress),
    "xz -9e": (lambda data: lzma.compress(data, preset=9 | lzma.PRESET_EXTREME), lzma.decompress),
}


def main(config: str, tokens: str, *files: str) -> None:
    quiet()
    data = ["--data.path", "text", "--data.data_files", str(list(files))] if files else []
    data += ["--data.documents", str(len(files) or 12)]
    run = Run.of(["--config", config, *data, "--data.max_tokens", tokens])
    texts = [document.text.encode() for document in run.documents]
    size = sum(map(len, texts))
    print(f"{len(texts)} files, {size:,} bytes, {sum(map(len, run.documents)):,} tokens, {config}")
    print("| | bytes | bits per byte | bytes a second, there | and back |\n|---|---|---|---|---|")
    for name, (there, back) in OTHERS.items():
        row(name, size, *timed(there, back, texts))
    row(f"dynlight, `{Path(config).name}`", size, *timed(lambda data: pack(data, run).bytes, unpack, texts))


def timed(there, back, texts):
    """The bytes that all texts come to, and the seconds there and back."""
    began = time.perf_counter()
    packed = [there(text) for text in texts]
    between = time.perf_counter()
    assert [back(each) for each in packed] == texts, "every file comes back as it was"
    return sum(map(len, packed)), between - began, time.perf_counter() - between


def row(name, size, small, there, back):
    print(f"| {name} | {small:,} | {8 * small / size:.3f} | {size / there:,.0f} | {size / back:,.0f} |", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
