"""Every error this package raises on purpose.

They are not `vilavt_core.errors.VilavtError`: the runner must choose a rank's GPU before anything imports torch, and
vilavt_hf imports it.
"""


class VlmevalError(ValueError):
    """Base class; the message names the thing and the remedy."""


class VlmevalMissing(VlmevalError):
    """VLMEvalKit, or its runner, is not in this environment."""


class SettingsError(VlmevalError):
    """A setting is unknown, or its value cannot be used."""


class MessageError(VlmevalError):
    """A message of a benchmark holds something that the model cannot be asked."""
