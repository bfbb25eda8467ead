"""Read, convert, check and create checkpoints, streaming: no tensor is loaded to move it."""

from .companions import Missing
from .convert import ConversionReport, Weights, convert_checkpoint, verify_same_tensors
from .initialise import InitialisationReport, initialise_checkpoint
from .inspection import Flavour, Inspection, inspect_checkpoint
from .layout import Checkpoint, published_name
from .lineage import Lineage, collect_lineage, fingerprint, write_lineage

__all__ = [
    "Checkpoint",
    "ConversionReport",
    "Flavour",
    "InitialisationReport",
    "Inspection",
    "Lineage",
    "Missing",
    "Weights",
    "collect_lineage",
    "convert_checkpoint",
    "fingerprint",
    "initialise_checkpoint",
    "inspect_checkpoint",
    "published_name",
    "verify_same_tensors",
    "write_lineage",
]
