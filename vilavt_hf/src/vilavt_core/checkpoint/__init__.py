"""Read, convert, check and create checkpoints, streaming: no tensor is loaded to move it."""

from .adapter import adapter_base, settings_source
from .build_info import BuildInfo, collect_build_info, fingerprint, write_build_info
from .companions import Missing
from .convert import ConversionReport, Weights, convert_checkpoint, verify_same_tensors
from .initialise import InitialisationReport, initialise_checkpoint
from .inspection import Flavour, Inspection, inspect_checkpoint
from .layout import Checkpoint
from .verdict import Verdict, judge_checkpoint, require_vilavt

__all__ = [
    "BuildInfo",
    "Checkpoint",
    "ConversionReport",
    "Flavour",
    "InitialisationReport",
    "Inspection",
    "Missing",
    "Verdict",
    "Weights",
    "adapter_base",
    "collect_build_info",
    "convert_checkpoint",
    "fingerprint",
    "initialise_checkpoint",
    "inspect_checkpoint",
    "judge_checkpoint",
    "require_vilavt",
    "settings_source",
    "verify_same_tensors",
    "write_build_info",
]
