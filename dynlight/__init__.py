"""dynlight: dynamic evaluation of language models."""

from dynlight.context import Context, Overlapping, TransformerXL
from dynlight.documents import Document, DocumentStream
from dynlight.flops import FlopsLogger
from dynlight.module import DynamicEvaluation
from dynlight.parameters import All, LoRA, Matching, Parameters
from dynlight.pretrained import Pretrained
from dynlight.progress import DocumentProgress
from dynlight.records import Records
from dynlight.reset import ResetWeights
from dynlight.schedule import UpdateFrequency
from dynlight.updates import GradientStatistics, RMSDynamic

__all__ = [
    "All",
    "Context",
    "Document",
    "DocumentProgress",
    "DocumentStream",
    "DynamicEvaluation",
    "FlopsLogger",
    "GradientStatistics",
    "LoRA",
    "Matching",
    "Overlapping",
    "Parameters",
    "Pretrained",
    "RMSDynamic",
    "Records",
    "ResetWeights",
    "TransformerXL",
    "UpdateFrequency",
]
