"""A long run on a very small model: does memory, or the time of a segment, grow? `python tests/long_run.py 20000`.

Other programs share the machine, so after every few segments the same work is done that never changes, and the time of a
segment is told in units of it.
"""

import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import yaml
from conftest import make_byte_tokenizer
from folders import configuration, save_model
from lightning.pytorch import Callback
from models import tiny

from dynlight import fit
from dynlight.running import fitting

EVERY = 50  # segments between two looks


class Watch(Callback):
    """Memory and time of every so many segments."""

    def __init__(self) -> None:
        self.memory: list[int] = []
        self.times: list[float] = []
        self._model, self._inputs = tiny(), torch.arange(16)[None]
        self._count, self._began = 0, time.process_time()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *batch: Any) -> None:
        self._count += 1
        if self._count % EVERY:
            return
        now = time.process_time()
        for _ in range(5):
            self._model(self._inputs, labels=self._inputs).loss.backward()
        end = time.process_time()
        self.times.append((now - self._began) / EVERY / (end - now))
        self.memory.append(int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
        self._began = time.process_time()


def main(segments: int) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="dynlight-") as folder:
        root, watch = Path(folder), Watch()
        (root / "documents").mkdir()
        letters = random.Random(0).choices("the old house by a river ", k=8 * segments)
        (root / "documents/a.txt").write_text("".join(letters))
        config = configuration(
            save_model(root / "model", make_byte_tokenizer(), num_hidden_layers=1), f"{root}/documents/*", root / "out"
        )
        config["context"]["init_args"] = {"segment": 4, "memory": 8}
        config["data"]["max_tokens"] = 4 * segments
        (root / "run.yaml").write_text(yaml.safe_dump(config | {"checkpoint": {"minutes": 0.1}}))
        make_trainer = fitting.make_trainer
        fitting.make_trainer = lambda settings, meters, out: make_trainer(settings, [watch, *meters], out)
        assert fit.main(["--config", str(root / "run.yaml")]) == 0
        first, last = watch.memory[1000 // EVERY - 1], watch.memory[-1]
        print(f"memory after 1,000 segments {first / 2**20:.1f} MiB, after {segments:,} {last / 2**20:.1f} MiB")
        quarter = len(watch.times) // 4
        early, late = (statistics.median(part) for part in (watch.times[5 : 5 + quarter], watch.times[-quarter:]))
        print(f"time of a segment: the last quarter's over the first's {late / early:.4f}")
        print({file.name: file.stat().st_size for file in sorted((root / "out").iterdir())})


if __name__ == "__main__":
    main(int(sys.argv[1]))
