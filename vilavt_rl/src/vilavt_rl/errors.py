"""Every error this package raises on purpose. All are ``ValueError``."""

from vilavt_core.errors import VilavtError


class RowError(VilavtError):
    """A row of the training data cannot be used; the message names file and line."""


class RewardError(VilavtError):
    """A reward is set up in a way that cannot be computed."""


class RolloutError(VilavtError):
    """A rollout engine broke its contract, or a trajectory does not fit the configured lengths."""


class HostError(VilavtError):
    """The installed trainer is another one, or another version, than this command needs."""
