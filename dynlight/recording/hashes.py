"""Hashes: SHA-256 of what goes into a run: the model's weights, its tokenizer and its documents."""

import hashlib
import json
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from dynlight.documents.document import Document
from dynlight.learning.digests import hash_of
from dynlight.learning.sharded import whole


def hash_of_weights(weights: dict[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes of all weights, in the order of their names.

    Where weights are sharded every process must call this, as the shards are gathered.
    """
    hashing = hashlib.sha256()
    for name, weight in sorted(weights.items()):
        hashing.update(f"{name} {weight.dtype} {list(weight.shape)}\n".encode())
        hashing.update(whole(weight).detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return hashing.hexdigest()


def hash_of_tokenizer(tokenizer: Any) -> str | None:
    """SHA-256 over the tokenizer's definition; over its vocabulary where it is none of the fast ones."""
    if tokenizer is None:
        return None
    if getattr(tokenizer, "is_fast", False):
        return hash_of(tokenizer.backend_tokenizer.to_str().encode())
    return hash_of(json.dumps(sorted(tokenizer.get_vocab().items())).encode())


def hash_of_documents(documents: Iterable[Document]) -> str:
    """SHA-256 over prefix, ids and text of all documents, in order."""
    hashing = hashlib.sha256()
    for document in documents:
        text = document.text.encode()
        hashing.update(f"{document.index} {document.prefix} {len(document)} {len(text)}\n".encode())
        hashing.update(document.tokens.numpy().data)
        hashing.update(text)
    return hashing.hexdigest()
