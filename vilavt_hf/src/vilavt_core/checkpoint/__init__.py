"""Read, convert, check and create checkpoints, streaming: no tensor is loaded to move it."""

from .adapter import adapter_base, adapter_folder, settings_source
from .build_info import BuildInfo, collect_build_info, command_line, fingerprint, write_build_info
from .card import Score, card_text, scores_of_report, write_card
from .companions import Missing
from .convert import ConversionReport, Weights, convert_checkpoint, verify_same_tensors
from .initialise import InitialisationReport, initialise_checkpoint
from .inspection import Flavour, Inspection, inspect_checkpoint
from .layout import Checkpoint
from .push import Upload, plan_upload, push_to_hub
from .verdict import Verdict, judge_checkpoint, require_vilavt

__all__ = [
    "BuildInfo",
    "Checkpoint",
    "ConversionReport",
    "Flavour",
    "InitialisationReport",
    "Inspection",
    "Missing",
    "Score",
    "Upload",
    "Verdict",
    "Weights",
    "adapter_base",
    "adapter_folder",
    "card_text",
    "collect_build_info",
    "command_line",
    "convert_checkpoint",
    "fingerprint",
    "initialise_checkpoint",
    "inspect_checkpoint",
    "judge_checkpoint",
    "plan_upload",
    "push_to_hub",
    "require_vilavt",
    "scores_of_report",
    "settings_source",
    "verify_same_tensors",
    "write_build_info",
    "write_card",
]
