"""Failures: what becomes of a document whose nats or gradients are not finite.

`Stop` leaves it out of all sums; `FinishStatic` lets the initial weights read it to its end. A run has one of them.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from dynlight.documents.segments import Segment
from dynlight.learning.finished import Failure, Finished
from dynlight.learning.forward import Keeps, Reading
from dynlight.learning.weights import Weights


class Stop:
    """A document that fails is read no further."""

    def __init__(self) -> None:
        self.of_documents: dict[int, Failure] = {}  # by the document's index

    def rows(self, segment: Segment) -> list[int]:
        """The rows of a segment whose documents have not stopped."""
        return [row for row, document in enumerate(segment.documents) if not self.has_stopped(document.index)]

    def has_stopped(self, document: int) -> bool:
        """Whether a document is read no further."""
        return document in self.of_documents and self.of_documents[document].stopped

    def all_static(self, segment: Segment) -> bool:
        """Whether the initial weights have taken over every document of a segment."""
        return False

    def by_static(self, segment: Segment) -> frozenset[int]:
        """The rows of a segment whose documents the initial weights have taken over."""
        return frozenset()

    def mend(self, segment: Segment, nats: Tensor, static: Tensor | None, weights: Weights) -> Tensor:
        """The nats [D, S] that count: `nats`, or `static` where the initial weights have taken over."""
        return nats

    def stop(self, segment: Segment, *sums: Sequence[float] | None) -> None:
        """Stops the documents of which one of these sums of nats is not finite."""
        for sums_of_documents in sums:
            for document, nats in zip(segment.documents, sums_of_documents or (), strict=False):
                if not math.isfinite(nats):
                    self._stop(document.index, segment.cut.index, "nats were not finite")

    def mark(self, segment: Segment, finite: Sequence[bool] | None) -> None:
        """Marks the documents whose gradients were not finite; one that has ended needs no more weights and is left."""
        for document, is_finite in zip(segment.documents, finite or (), strict=False):
            if not is_finite and document not in segment.finished:
                self._mark(document.index, segment.cut.index)

    def _mark(self, document: int, segment: int) -> None:
        self._stop(document, segment, "gradients were not finite")

    def _stop(self, document: int, segment: int, reason: str) -> None:
        if not self.has_stopped(document):
            self.of_documents[document] = Failure(segment, reason, stopped=True)

    def recount(self, finished: Sequence[Finished]) -> None:
        """Adds the failures of documents that were read to their end before the run was resumed."""
        self.of_documents |= {done.document.index: done.failure for done in finished if done.failure is not None}

    def progress_state(self) -> dict[int, dict[str, Any]]:
        """All failures: plain data."""
        return {document: asdict(failure) for document, failure in self.of_documents.items()}

    def load_progress_state(self, state: dict[int, dict[str, Any]]) -> None:
        """Puts back what `progress_state` gave."""
        self.of_documents = {document: Failure(**failure) for document, failure in state.items()}


class FinishStatic(Stop):
    """A document that fails is read to its end by the initial weights, from the first token without nats on."""

    def all_static(self, segment: Segment) -> bool:
        return all(self._is_static(document.index) for document in segment.documents)

    def by_static(self, segment: Segment) -> frozenset[int]:
        return frozenset(row for row, document in enumerate(segment.documents) if self._is_static(document.index))

    def mend(self, segment: Segment, nats: Tensor, static: Tensor | None, weights: Weights) -> Tensor:
        if static is None:
            return nats
        missing = nats.isnan().any(dim=1).tolist()
        documents = [document.index for document in segment.documents]
        if not any(missing[row] or self._is_static(documents[row]) for row in range(len(nats))):
            return nats
        nats = nats.clone()
        for row, document in enumerate(documents):
            first_static = 0 if self._is_static(document) else len(nats[row])
            if missing[row] and document not in self.of_documents:
                head = readable(weights, segment, row).nats.cpu()
                first_static = len(head)
                nats[row, :first_static] = head
                self.of_documents[document] = Failure(segment.cut.index, "nats were not finite", stopped=False)
            nats[row, first_static:] = static[row, first_static:]
        return nats

    def _mark(self, document: int, segment: int) -> None:
        if document not in self.of_documents:  # one that has stopped stays so
            self.of_documents[document] = Failure(segment + 1, "gradients were not finite", stopped=False)

    def _is_static(self, document: int) -> bool:
        return document in self.of_documents and not self.of_documents[document].stopped


@torch.no_grad()
def readable(weights: Weights, segment: Segment, row: int, keeps: Keeps = ()) -> Reading:
    """The reading of a row's tokens before the first at which the learned weights give NaN: [S, …], without an axis of rows.

    A NaN at one token can leak to earlier ones (0 · NaN is NaN under a mask). To decide from earlier tokens only, the
    longest head of the segment whose nats are all numbers is found by bisection.
    """
    nothing = torch.empty(0, device=segment.targets.device)
    found, unreadable = Reading(nothing, None, logits=nothing, states=nothing), segment.targets.shape[1]
    while unreadable - len(found.nats) > 1:
        length = (len(found.nats) + unreadable) // 2
        reading = weights.score(segment.head(length), keeps=keeps, plain=True)  # each length would be compiled anew
        if reading.nats[row].isnan().any():
            unreadable = length
        else:
            found = Reading(reading.nats[row], None, **reading.kept_of(row, slice(None)))
    return found
