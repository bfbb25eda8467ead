"""Every error this package raises on purpose. All are ``ValueError``, which vLLM's server answers with status 400."""

from vilavt_core.errors import VilavtError


class PlaceholderError(VilavtError):
    """Image placeholders of a prompt and the images that came with it do not agree."""


class LimitError(VilavtError):
    """A request is larger than the server allows; the message names the limit and the flag that raises it."""


class UnsupportedError(VilavtError):
    """A vLLM feature that ViLaVT's encoder cannot honour; the message says why and what to use."""


class WeightsError(VilavtError):
    """A checkpoint or a weight update does not fit the model; the message names the tensors."""


class EngineFailure(VilavtError):
    """vLLM gave up on a request that it had accepted."""


class EngineDiedError(EngineFailure):
    """vLLM's engine has ended, and answers nothing until it is started again."""


class RequestError(VilavtError):
    """A request to the server is not one it can answer; the message names the field."""


class ModelMissingError(VilavtError):
    """A request to the server names a model that it does not serve."""


class BusyError(VilavtError):
    """The server has as many conversations running as it allows."""


class KeyMissingError(VilavtError):
    """A request to the server came without its key."""


class StoppingError(VilavtError):
    """The server is being stopped: it takes no request any more, or its time for a running one is over."""


class CommandError(VilavtError):
    """The command line of ``vilavt-serve`` cannot be carried out; the message says what to type."""
