"""dynlight: dynamic evaluation of language models. A document is a training stream."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dynlight.context import Context, Overlapping, TransformerXL
    from dynlight.documents import Document, DocumentStream
    from dynlight.flops import FlopsLogger
    from dynlight.mixture import Mixture
    from dynlight.module import DynamicEvaluation
    from dynlight.parameters import All, LoRA, Matching, Parameters
    from dynlight.pretrained import Pretrained
    from dynlight.progress import DocumentProgress
    from dynlight.records import Records
    from dynlight.reset import ResetWeights
    from dynlight.schedule import UpdateFrequency
    from dynlight.updates import GradientStatistics, RMSDynamic

# Each public name and its module; imported when asked for, so that what needs no torch (the report) starts at once.
_MODULES = {
    "All": "parameters",
    "Context": "context",
    "Document": "documents",
    "DocumentProgress": "progress",
    "DocumentStream": "documents",
    "DynamicEvaluation": "module",
    "FlopsLogger": "flops",
    "GradientStatistics": "updates",
    "LoRA": "parameters",
    "Matching": "parameters",
    "Mixture": "mixture",
    "Overlapping": "context",
    "Parameters": "parameters",
    "Pretrained": "pretrained",
    "RMSDynamic": "updates",
    "Records": "records",
    "ResetWeights": "reset",
    "TransformerXL": "context",
    "UpdateFrequency": "schedule",
}
__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"dynlight.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULES])
