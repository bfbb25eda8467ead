"""``vilavt_vllm.ray_serve:app``: replicas of the server on Ray Serve.

    serve run vilavt_vllm.ray_serve:app model=CHECKPOINT max_replicas=4

A replica is what ``vilavt-serve`` runs, without its socket: all its routes, limits and keys. Ray Serve listens, counts
the requests that go on, adds and ends replicas by their number, answers 503 with ``Retry-After`` when all are full, and
sends the requests of one session (the header ``x-session-id``) to one replica, by a hash that moves few sessions when
replicas come and go. Ray's routers by prefix read the arguments of a Python call, which an HTTP request does not have.

Needs ``pip install "vilavt-vllm[ray]"``.
"""

# The builder's annotation is read by Ray, which takes no string for it: no `from __future__ import annotations` here.
import contextlib
import io
import shlex
from contextlib import AsyncExitStack
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator
from ray import serve
from ray.serve.config import AutoscalingConfig, BackpressureConfig, RequestRouterConfig

from .errors import CommandError
from .server.command import CommandLine, read_command_line, ready

NAME = "vilavt"
"""Of the deployment, in a config file."""
ROUTER = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"
RETRY_AFTER = 5.0
"""Seconds after which a request that found all replicas full may be sent again."""
TRIES = 3
"""To start a replica: what keeps one from starting is mostly in its arguments."""


class Arguments(BaseModel):
    """Of the application: ``NAME=VALUE`` after ``serve run``, `args` in a config file. All else that Ray knows of a
    deployment can be said in `deployments` of a config file, and wins.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = Field(description="checkpoint folder, the same on every node, or hub id")
    flags: str = Field("", description="further flags of vilavt-serve, as they are typed")
    gpus: float = Field(1.0, ge=0, description="of a replica; as many as --tensor-parallel-size asks for")
    cpus: float = Field(1.0, ge=0, description="of a replica")
    min_replicas: PositiveInt = Field(1, description="replicas that there are always")
    max_replicas: PositiveInt = Field(1, description="replicas that there are at most")
    target_ongoing_requests: PositiveInt = Field(
        32, description="requests of a replica beyond which one more is started"
    )
    max_ongoing_requests: PositiveInt = Field(64, description="requests that a replica gets at the same time")
    max_queued_requests: PositiveInt = Field(
        64, description="requests that wait in each proxy for a replica; more get 503 with Retry-After"
    )
    shutdown_timeout: float = Field(
        120.0, ge=0, description="seconds that a replica that is to end gets for its running requests"
    )

    @model_validator(mode="after")
    def _fit_together(self) -> "Arguments":
        for less, more in (("min_replicas", "max_replicas"), ("target_ongoing_requests", "max_ongoing_requests")):
            low, high = getattr(self, less), getattr(self, more)
            if low > high:
                raise ValueError(f"{less} is {low} and {more} {high}: it must not be larger")
        _read(self.model, self.flags)
        return self


def app(arguments: Arguments) -> serve.Application:
    """The application, for ``serve run`` and config files."""
    deployment: Any = serve.deployment(
        name=NAME,
        ray_actor_options={"num_gpus": arguments.gpus, "num_cpus": arguments.cpus},
        autoscaling_config=AutoscalingConfig(
            min_replicas=arguments.min_replicas,
            max_replicas=arguments.max_replicas,
            target_ongoing_requests=arguments.target_ongoing_requests,
        ),
        max_ongoing_requests=arguments.max_ongoing_requests,
        max_queued_requests=arguments.max_queued_requests,
        backpressure_config=BackpressureConfig(retry_after_s=RETRY_AFTER),
        request_router_config=RequestRouterConfig(request_router_class=ROUTER),
        graceful_shutdown_timeout_s=arguments.shutdown_timeout,
        max_constructor_retry_count=TRIES,
    )(Replica)
    return deployment.bind(arguments.model, arguments.flags)


@serve.ingress()
class Replica:
    """vLLM's server with the loop inside, in a process of Ray's.

    Args:
        model: see `Arguments`.
        flags: see `Arguments`.
    """

    async def __init__(self, model: str, flags: str) -> None:  # type: ignore[misc]  # Ray awaits it
        command, options = ready(_read(model, flags))

        from . import compat  # imports vLLM, which whoever asks for the application need not have
        from .server.options import VLLM_DEFAULTS

        self._running = AsyncExitStack()
        self._server = await self._running.enter_async_context(compat.application(command, options, VLLM_DEFAULTS))

    def __serve_build_asgi_app__(self) -> Any:
        return self._server

    async def check_health(self) -> None:
        """Raise if the engine has died: Ray then starts another replica."""
        await self._server.state.engine_client.check_health()

    async def __del__(self) -> None:
        if running := getattr(self, "_running", None):
            await running.aclose()


def _read(model: str, flags: str) -> CommandLine:
    """The command line that `Arguments` stand for."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            line = read_command_line([model, *shlex.split(flags)])
        except SystemExit:
            *_, last = said.getvalue().splitlines() or ["they ask for help; give what an answer depends on"]
            raise CommandError(f"flags: {last}: {flags}") from None
        except ValueError as error:  # an open quotation among them
            raise CommandError(f"flags: {error}: {flags}") from None
    if line.checkpoint is None:
        raise CommandError(f"flags: --vllm-help has no place here: {flags}")
    return line
