"""Shortcuts through what takes most of the time of a short run: measuring FLOPs, and drawing the page.

A shape is measured once for all models of one form. A page is drawn where a test asks for it, by `pytest.mark.page`, and
FLOPs are measured anew by `pytest.mark.flops`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from dynlight.learning.flops import EmptyModel, Flops
from dynlight.recording.report import page


class Shortcuts:
    """What is left out; each test may ask for the whole way."""

    def __init__(self) -> None:
        self.draws_pages = False
        self.measures_anew = False
        self._measured: dict[Any, Flops] = {}

    def choose(self, test: pytest.Item) -> None:
        """Leaves out what this test has no mark for."""
        self.draws_pages = test.get_closest_marker("page") is not None
        self.measures_anew = test.get_closest_marker("flops") is not None

    @contextmanager
    def taken(self) -> Iterator[None]:
        """While it lasts, runs in this process take the shortcuts."""
        measure, render = EmptyModel.measure, page.render

        def measured_once(copied: EmptyModel, *shape: Any) -> Flops:
            if self.measures_anew:
                return measure(copied, *shape)
            key = (*_form(copied), *shape)
            if key not in self._measured:
                self._measured[key] = measure(copied, *shape)
            return self._measured[key]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(EmptyModel, "measure", measured_once)
            patch.setattr(page, "render", lambda *run: render(*run) if self.draws_pages else "")
            yield


def _form(copied: EmptyModel) -> tuple[Any, ...]:
    """All that the FLOPs of a shape follow from: the model's code and shapes, what learns of it, and the context."""
    model = copied._model
    modules = tuple((name, type(module)) for name, module in model.named_modules())
    weights = tuple(
        (name, *weight.shape, weight.dtype, weight.requires_grad) for name, weight in model.named_parameters()
    )
    config = model.config.to_json_string(), model.config._attn_implementation
    return *config, modules, weights, str(copied._weights.context), copied._learns, copied._has_reference


shortcuts = Shortcuts()
