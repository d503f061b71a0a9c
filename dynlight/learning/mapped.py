"""Mapped: whether the model runs under vmap over rows, for which attention and linear maps have rules of their own."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_IS_MAPPED = ContextVar("is_mapped", default=False)


def is_mapped() -> bool:
    """Whether a forward runs under `torch.func.vmap` over rows."""
    return _IS_MAPPED.get()


@contextmanager
def mapped() -> Iterator[None]:
    """Makes `is_mapped` true within the block."""
    token = _IS_MAPPED.set(True)
    try:
        yield
    finally:
        _IS_MAPPED.reset(token)
