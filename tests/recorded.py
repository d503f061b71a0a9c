"""Folders as runs leave them, made up of numbers."""

import json

import pandas as pd

SECONDS = ["scoring_seconds", "learning_seconds", "static_seconds"]
FLOPS = {"forward_flops": 5.2e6, "activation_flops": 5.1e6, "weight_flops": 4.9e6}


def make_rows(folder, documents, names=None):
    """Write a run from lists of (nats, static_nats, tokens, bytes), one tuple a segment."""
    folder.mkdir(parents=True, exist_ok=True)
    rows, entries = [], []
    for document, segments in enumerate(documents):
        start = 0
        for segment, (nats, static_nats, tokens, size) in enumerate(segments):
            rows.append((document, segment, start, tokens, size, nats, static_nats, True, 1, 30, 10, 11, 9, 2, 10))
            start += tokens
        name = names[document] if names else f"document {document}"
        size = sum(segment[3] for segment in segments)
        entries.append({"document": document, "name": name, "tokens": start, "bytes": size, "words": start // 2})
    columns = "document segment start tokens bytes nats static_nats learned updates flops".split()
    columns += [*FLOPS, "update_flops", "static_flops"]
    frame = pd.DataFrame(rows, columns=columns).astype({"nats": "float64", "static_nats": "float64"})
    frame.to_parquet(folder / "segments.parquet")
    frame[["document", "segment"]].assign(seconds=0.5, **dict.fromkeys(SECONDS, 0.125)).to_parquet(
        folder / "timings.parquet"
    )
    run = {"name": "small", "documents": entries, "protocol": "five choices", "seconds": 2.0}
    (folder / "run.json").write_text(json.dumps(run))
    return folder


def change_run(folder, change):
    run = json.loads((folder / "run.json").read_text())
    change(run)
    (folder / "run.json").write_text(json.dumps(run))
