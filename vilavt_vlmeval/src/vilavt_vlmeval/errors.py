"""Every error this package raises on purpose. All are ``ValueError``."""

from vilavt_core.errors import VilavtError


class VlmevalMissing(VilavtError):
    """VLMEvalKit, or its runner, is not in this environment."""


class SettingsError(VilavtError):
    """A setting is unknown, or its value cannot be used."""


class MessageError(VilavtError):
    """A message of a benchmark holds something that the model cannot be asked."""
