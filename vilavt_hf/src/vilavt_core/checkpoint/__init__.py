"""Read, convert, check and create checkpoints, streaming: no tensor is loaded to move it."""

from .companions import Missing
from .convert import ConversionReport, Weights, convert_checkpoint, verify_same_tensors
from .initialise import InitialisationReport, initialise_checkpoint
from .inspection import Flavour, Inspection, inspect_checkpoint
from .layout import Checkpoint, published_name
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
    "published_name",
    "verify_same_tensors",
    "write_provenance",
]
