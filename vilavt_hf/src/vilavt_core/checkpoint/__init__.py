"""Read, convert, check and create checkpoints, streaming: no tensor is loaded to move it."""

from .companions import Missing
from .convert import ConversionReport, Weights, convert_checkpoint, verify_same_tensors
from .initialise import InitialisationReport, initialise_checkpoint
from .inspection import Flavour, Inspection, inspect_checkpoint
from .layout import Checkpoint
from .provenance import Provenance, collect_provenance, fingerprint, write_provenance

__all__ = [
    "Checkpoint",
    "ConversionReport",
    "Flavour",
    "InitialisationReport",
    "Inspection",
    "Missing",
    "Provenance",
    "Weights",
    "collect_provenance",
    "convert_checkpoint",
    "fingerprint",
    "initialise_checkpoint",
    "inspect_checkpoint",
    "verify_same_tensors",
    "write_provenance",
]
