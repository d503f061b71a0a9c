"""dynlight: dynamic evaluation of language models. A document is a training stream."""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dynlight.choices.context import Overlapping, TransformerXL
    from dynlight.choices.gradient import Clip, Compressed, Gradient, Sparse
    from dynlight.choices.memories import DocumentMemory, NeuralCache, NGrams, OutputBias
    from dynlight.choices.mixture import Mixture
    from dynlight.choices.objective import Anchored, Distilled, NextToken, Objective, Replayed, Surprising
    from dynlight.choices.parameters import All, LoRA, Matching, Parameters, Pruned
    from dynlight.choices.reset import ResetWeights
    from dynlight.choices.schedule import UpdateFrequency
    from dynlight.choices.update import GradientStatistics, RMSDynamic
    from dynlight.documents.document import Document
    from dynlight.documents.segments import Context
    from dynlight.errors import SettingError
    from dynlight.learning.module import DynamicEvaluation
    from dynlight.learning.processes.compression import CompressedGradients, compressed_hook
    from dynlight.learning.processes.gradients import PowerSGD
    from dynlight.learning.stream import DocumentStream
    from dynlight.recording.progress import DocumentProgress
    from dynlight.recording.records import Records
    from dynlight.recording.series import FlopsLogger
    from dynlight.running.pretrained import Pretrained
    from dynlight.using.reader import Reader

# Each public name and its module; imported when asked for, so that what needs no torch (the report) starts at once.
_MODULES = {
    "All": "choices.parameters",
    "Anchored": "choices.objective",
    "Clip": "choices.gradient",
    "Compressed": "choices.gradient",
    "CompressedGradients": "learning.processes.compression",
    "Context": "documents.segments",
    "Distilled": "choices.objective",
    "Document": "documents.document",
    "DocumentMemory": "choices.memories",
    "DocumentProgress": "recording.progress",
    "DocumentStream": "learning.stream",
    "DynamicEvaluation": "learning.module",
    "FlopsLogger": "recording.series",
    "Gradient": "choices.gradient",
    "GradientStatistics": "choices.update",
    "LoRA": "choices.parameters",
    "Matching": "choices.parameters",
    "Mixture": "choices.mixture",
    "NGrams": "choices.memories",
    "NeuralCache": "choices.memories",
    "NextToken": "choices.objective",
    "Objective": "choices.objective",
    "OutputBias": "choices.memories",
    "Overlapping": "choices.context",
    "Parameters": "choices.parameters",
    "PowerSGD": "learning.processes.gradients",
    "Pretrained": "running.pretrained",
    "Pruned": "choices.parameters",
    "RMSDynamic": "choices.update",
    "Reader": "using.reader",
    "Records": "recording.records",
    "Replayed": "choices.objective",
    "ResetWeights": "choices.reset",
    "SettingError": "errors",
    "Sparse": "choices.gradient",
    "Surprising": "choices.objective",
    "TransformerXL": "choices.context",
    "UpdateFrequency": "choices.schedule",
    "compressed_hook": "learning.processes.compression",
}
# Modules of version 0.1.0, by which a configuration of its runs may name a class: `dynlight.strategies.PowerSGD`.
_EARLIER = ("context", "flops", "mixture", "parameters", "progress", "records", "schedule", "strategies", "updates")
__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name in _EARLIER:
        return sys.modules[__name__]
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"dynlight.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULES])
