"""Every error this package raises on purpose.

All are ``ValueError``, so that hosts which map bad input to a client error do so.
"""


class VilavtError(ValueError):
    """Base class; the message names the thing, both numbers that disagree, and the remedy."""


class GroupError(VilavtError):
    """Images and queries of a batch do not form valid groups."""


class ProcessorError(VilavtError):
    """A call of the processor cannot be carried out as it was asked for; names the argument."""


class ImageError(VilavtError):
    """An image cannot be loaded, or breaks a pixel or byte limit."""


class RegionError(VilavtError):
    """A region of a tool call cannot be cropped; ``region`` is its place in the call, counted from 0."""

    def __init__(self, message: str, region: int = 0) -> None:
        super().__init__(message)
        self.region = region


class PromptError(VilavtError):
    """A prompt set is missing, incomplete, or cannot be imported."""


class EpisodeError(VilavtError):
    """An episode was driven against its contract."""


class StateError(VilavtError):
    """A conversation cannot be continued from a state that a client sent back; names what disagrees."""


class CheckpointError(VilavtError):
    """A checkpoint is incomplete, inconsistent, or cannot be written."""


class PlanError(VilavtError):
    """A machine or a conversation that cannot be planned with."""


class EngineError(VilavtError):
    """The local engine was set up or driven against its contract."""


class AttentionError(VilavtError):
    """An attention map was asked for that this model, these images or these queries do not have."""


class DataError(VilavtError):
    """A training record, or a collection of them, cannot be used; ``kind`` is a short name to count by."""

    def __init__(self, message: str, kind: str = "record") -> None:
        super().__init__(message)
        self.kind = kind


class TrainingError(VilavtError):
    """A training run was set up against its contract, or cannot go on."""


class LogError(VilavtError):
    """What a training run has logged cannot be read, or cannot be drawn."""


class ScoringError(VilavtError):
    """A question cannot be scored: its type is unknown, its target does not fit the type, or a package is missing."""


class EvaluationError(VilavtError):
    """An evaluation was set up against its contract, or does not continue the results that are there."""


class BenchmarkError(VilavtError):
    """A benchmark's definition, its questions, or a file of results cannot be used."""
