"""Mapped: whether the model is being mapped over rows, so that attention and linear maps go to their rules for it."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_IS_MAPPED = ContextVar("is_mapped", default=False)


def is_mapped() -> bool:
    """Whether a forward runs under `torch.func.vmap` over rows."""
    return _IS_MAPPED.get()


@contextmanager
def mapped() -> Iterator[None]:
    """Inside, forwards run under `torch.func.vmap` over rows."""
    token = _IS_MAPPED.set(True)
    try:
        yield
    finally:
        _IS_MAPPED.reset(token)
