"""The only module that knows vLLM versions (0.20 to 0.33) and flags: what differs, by feature, and what is refused."""

import argparse
import contextlib
import inspect
import io
import logging
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Mapping
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import vllm
import yaml
from torch import nn
from vllm.model_executor.layers.attention import MMEncoderAttention
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod, VocabParallelEmbedding
from vllm.multimodal.processing import BaseMultiModalProcessor
from vllm.platforms import current_platform

from vilavt_core.failures import one_line
from vilavt_hf import VilavtConfig

from . import support
from .errors import CommandError, UnsupportedError

if TYPE_CHECKING:
    from fastapi import FastAPI

logger = logging.getLogger(__name__)


def check_version() -> None:
    """Warn once, when the model is loaded, if this vLLM was never tested."""
    if not support.is_supported(vllm.__version__):
        low, high = map(support.dotted_version, support.SUPPORTED)
        logger.warning("vilavt-vllm is tested with vLLM from %s and below %s, this is %s", low, high, vllm.__version__)


def require_server() -> None:
    """Stop where our server cannot run, before any of its modules is imported.

    Raises:
        UnsupportedError: names the installed vLLM, the one that is needed, and what runs on this one.
    """
    if problem := support.server_problem(vllm.__version__):
        raise UnsupportedError(problem)


def config_of(model_config: Any) -> VilavtConfig:
    """The model's configuration as a ViLaVT's.

    `AutoConfig` takes the published SFT flavour for a stock Qwen2.5-VL; such a checkpoint is served with
    ``--hf-overrides '{"architectures": ["VilavtForConditionalGeneration"]}'`` and completed here from its tensors.
    """
    config = model_config.hf_config
    if isinstance(config, VilavtConfig):
        return config
    return VilavtConfig.from_pretrained(model_config.model, revision=model_config.revision)


def n_tokens(model_config: Any) -> int | None:
    """Number of ids that stand for a token, which is less than the rows of the LM head; None if there is no tokenizer.

    Read from the files in every process that has the model: vLLM's own function for it moves from version to version.
    """
    from transformers import AutoTokenizer

    try:
        name = model_config.tokenizer or model_config.model
        return len(AutoTokenizer.from_pretrained(name, revision=model_config.revision, trust_remote_code=False))
    except (OSError, ValueError) as error:
        logger.warning("%s: no tokenizer (%s); ids without a token may be sampled", model_config.model, error)
        return None


def engines_behind(client: Any) -> int:
    """Data-parallel engines that an `EngineClient` chooses among, as vLLM checks ranks."""
    parallel = client.vllm_config.parallel_config
    return parallel.data_parallel_size_local if parallel.local_engines_only else parallel.data_parallel_size


# ---------------------------------------------------------------- the processor

_MAIN = inspect.signature(BaseMultiModalProcessor._apply_hf_processor_main).parameters


class EncoderCall(NamedTuple):
    """What vLLM asks a multimodal processor to encode."""

    items: Any
    """`MultiModalDataItems`; empty for a text prompt."""
    settings: Mapping[str, object]
    """``mm_processor_kwargs`` of the request."""
    prompt: list[int] | None
    """Before 0.29 the prompt passes through the same call, and must come back with the result."""


def encoder_call(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> EncoderCall:
    """The arguments of `_apply_hf_processor_main`, whatever this version calls them."""
    given = {**dict(zip([name for name in _MAIN if name != "self"], args, strict=False)), **kwargs}
    settings = given.get("hf_processor_mm_kwargs", given.get("hf_kwargs")) or {}
    return EncoderCall(given["mm_items"], settings, list(given["prompt"]) if "prompt" in given else None)


def token_ids(prompt: Any, tokenizer: Any) -> list[int]:
    """A prompt's ids; before 0.29 text reaches the processor as text."""
    return tokenizer.encode(prompt, add_special_tokens=False) if isinstance(prompt, str) else list(prompt)


def dummy_inputs(processor: Any, model_config: Any) -> Any:
    """What `processor` makes of the largest inquiry, as vLLM measures memory with."""
    if hasattr(processor, "get_dummy_mm_inputs"):
        return processor.get_dummy_mm_inputs({"image": 1})
    from vllm.multimodal import MULTIMODAL_REGISTRY  # before 0.31

    registry: Any = MULTIMODAL_REGISTRY
    return registry.get_dummy_mm_inputs(model_config, {"image": 1}, processor=processor)


# ---------------------------------------------------------------- the vision tower


def packed_bounds(
    backend: Any, bounds: Any, hidden_size: int, tp_size: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Segment bounds in the forms that `MMEncoderAttention` takes: (cu_seqlens, sequence lengths).

    Args:
        backend: the attention backend.
        bounds: (segments + 1,) int32 numpy array.
        hidden_size: of the tower.
        tp_size: tensor-parallel ranks.
        device: where the tensors go.
    """
    known = inspect.signature(MMEncoderAttention.maybe_recompute_cu_seqlens).parameters
    # fp8_padded_hidden_size says that q, k and v are separate contiguous tensors, which ours are in every precision.
    more = {"fp8_padded_hidden_size": hidden_size} if "fp8_padded_hidden_size" in known else {}
    lengths = MMEncoderAttention.maybe_compute_seq_lens(backend, bounds, device)
    return MMEncoderAttention.maybe_recompute_cu_seqlens(backend, bounds, hidden_size, tp_size, device, **more), lengths


# ---------------------------------------------------------------- weights

_HALVES = ("gate_proj", "up_proj")
"""Of an MLP's first weight, in their order."""


def stack_halves(
    module: nn.Module, weights: Iterable[tuple[str, torch.Tensor]], loaded: set[str]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Load what belongs to a merged ``gate_up_proj`` of `module`; yield the rest.

    Before 0.27 vLLM's `WeightsMapper` cannot say which half of a parameter a tensor is.

    Args:
        module: has the parameters.
        weights: (name, tensor) by the checkpoint's names.
        loaded: gets the names of the parameters that were written.
    """
    parameters = dict(module.named_parameters())
    for name, tensor in weights:
        half = next((half for half in _HALVES if f".mlp.{half}." in name), None)
        merged = name if half is None else name.replace(half, "gate_up_proj")
        parameter: Any = parameters.get(merged)
        if half is None or parameter is None:
            yield name, tensor
            continue
        parameter.weight_loader(parameter, tensor, _HALVES.index(half))
        loaded.add(merged)


class _KeptLinear(UnquantizedLinearMethod):
    """A linear layer that reads its parameter at every call."""

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Nothing: the parent packs the weight on a CPU and drops the parameter."""

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x W^T + b."""
        return nn.functional.linear(x, layer.weight, bias)


class _KeptEmbedding(UnquantizedEmbeddingMethod):
    """An embedding or LM head that reads its parameter at every call."""

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Nothing: the parent computes with a packed copy on a CPU, which later weights do not reach."""

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x W^T + b."""
        return nn.functional.linear(x, layer.weight, bias)


def expects_updates(vllm_config: Any) -> bool:
    """Whether a trainer will send weights: it starts the engine with dummy weights, or extends its workers."""
    return vllm_config.load_config.load_format == "dummy" or bool(vllm_config.parallel_config.worker_extension_cls)


def keep_weights(model: nn.Module) -> None:
    """On a CPU, let a model whose weights a trainer will send keep its parameters; elsewhere it does anyway.

    vLLM's CPU layers pack a copy of each weight after loading, so that nothing could be loaded later.
    """
    if not current_platform.is_cpu():
        return
    for layer in model.modules():
        method = getattr(layer, "quant_method", None)
        if isinstance(layer, LinearBase) and type(method) is UnquantizedLinearMethod:
            layer.quant_method = _KeptLinear()
        elif isinstance(layer, VocabParallelEmbedding) and type(method) is UnquantizedEmbeddingMethod:
            layer.quant_method = _KeptEmbedding()


# ---------------------------------------------------------------- what is refused

UNSUPPORTED: dict[str, str] = {
    "encoder CUDA graphs (cudagraph_mm_encoder)": "refused: a graph is captured per image, and an inquiry's blocks "
    "attend over several images and a query; the language model's CUDA graphs are not affected",
    "LoRA on the vision tower (--enable-tower-connector-lora)": "refused: query tokens pass through the tower's "
    "projections and have no place in vLLM's per-image row mapping; LoRA on the language model works",
    "LoRA adapters in all slots on a CPU (--max-loras)": "refused by the server: where a batch has questions to an "
    "adapter and to the model alone, vLLM's CPU operators give the latter the adapter of the last slot "
    "(vllm-project/vllm#48421); with --max-loras above the number of adapters that one stays empty",
    "speculative decoding (--speculative-config)": "refused: every turn bans the ids of vision placeholders with "
    "logit_bias, which vLLM does not take beside it; without the ban a placeholder without an image could be sampled",
    "whole images only (--disable-chunked-mm-input)": "refused if the largest inquiry, with the text between its "
    "regions, may be longer than --max-num-batched-tokens: vLLM would never schedule it",
    "the Rust frontend (VLLM_USE_RUST_FRONTEND=1)": "refused: it does not run Python processors, where images are "
    "grouped",
    "image embeddings as input (--enable-mm-embeds)": "refused per request: an embedding depends on its query",
    "data-parallel vision tower (--mm-encoder-tp-mode data)": "falls back to weights, with vLLM's warning: it would "
    "shard image by image and split inquiries",
    "videos on vLLM's own routes and in `llm.generate`": "refused per request (0 videos allowed): the loop's route and "
    "`VilavtLLM` take them, as frames",
    "encoder disaggregation (EC connector)": "not tested",
    "pipeline parallelism (--pipeline-parallel-size)": "refused: no test of it can run: on a CPU vLLM's worker lacks "
    "the tensors that stages exchange and ends at the first request, and nobody has tried it on GPUs; tensor and data "
    "parallelism work",
    "FlashInfer as the vision tower's attention": "not tested; flash-attention, Triton and torch SDPA share one layout",
}
"""Feature of vLLM -> what happens when it is asked for."""


TEXT_OF_A_REGION = 128
"""Tokens that may stand between two regions of an inquiry: the line that says a crop's index and size, and room."""


def refuse_unsupported(vllm_config: Any, largest_inquiry: Callable[[], tuple[int, int]]) -> None:
    """Stop at start, with the reason, instead of computing something else than was asked for.

    Args:
        vllm_config: of the engine.
        largest_inquiry: gives the image tokens and the regions of the largest one; asked only if it matters.

    Raises:
        UnsupportedError: names the feature and the flag.
    """
    import vllm.envs as envs

    asked = {
        "encoder CUDA graphs (cudagraph_mm_encoder)": getattr(
            vllm_config.compilation_config, "cudagraph_mm_encoder", False
        ),
        "LoRA on the vision tower (--enable-tower-connector-lora)": vllm_config.lora_config is not None
        and vllm_config.lora_config.enable_tower_connector_lora,
        "speculative decoding (--speculative-config)": vllm_config.speculative_config is not None,
        "pipeline parallelism (--pipeline-parallel-size)": vllm_config.parallel_config.pipeline_parallel_size > 1,
        "the Rust frontend (VLLM_USE_RUST_FRONTEND=1)": getattr(envs, "VLLM_USE_RUST_FRONTEND", False),
    }
    for feature, wanted in asked.items():
        if wanted:
            raise UnsupportedError(
                f"{feature} is not supported by ViLaVT: {UNSUPPORTED[feature].removeprefix('refused: ')}"
            )
    scheduler = vllm_config.scheduler_config
    if scheduler.disable_chunked_mm_input:
        tokens, regions = largest_inquiry()
        most, longest = scheduler.max_num_batched_tokens, tokens + (regions - 1) * TEXT_OF_A_REGION
        if longest > most:
            raise UnsupportedError(
                f"--disable-chunked-mm-input: an inquiry may have {tokens} image tokens in {regions} regions, up to "
                f"{longest} with the text between them, and --max-num-batched-tokens is {most}, so that it would never "
                "be scheduled; raise that, lower vilavt_max_group_pixels or vilavt_max_regions (--hf-overrides), or "
                "leave the flag out"
            )


def refuse_full_slots(vllm_config: Any, adapters: int) -> None:
    """Stop where the model alone would answer as an adapter does, without a word.

    Args:
        vllm_config: of the engine.
        adapters: that a question may name.

    Raises:
        UnsupportedError: says which flag gives them room.
    """
    lora = getattr(vllm_config, "lora_config", None)
    if lora is None or not current_platform.is_cpu() or not 0 < adapters >= lora.max_loras:
        return
    reason = UNSUPPORTED["LoRA adapters in all slots on a CPU (--max-loras)"].removeprefix("refused by the server: ")
    raise UnsupportedError(
        f"{adapters} LoRA adapters and --max-loras {lora.max_loras}: {reason}; start it with --max-loras {adapters + 1}"
    )


def with_keep_alive(chunks: AsyncGenerator[str, None], interval: float) -> AsyncGenerator[str, None]:
    """Chunks of a stream, with a comment whenever none came for `interval` seconds (0: never), as vLLM's routes do."""
    from vllm.entrypoints.serve.utils.sse_keep_alive import with_sse_keep_alive

    return with_sse_keep_alive(chunks, interval)


def _server_parser() -> Any:
    """vLLM's parser of its API server's command line."""
    try:
        from vllm.entrypoints.common.cli_args import make_arg_parser
    except ModuleNotFoundError:  # vLLM 0.32
        from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    return make_arg_parser(FlexibleArgumentParser(prog="vilavt-serve CHECKPOINT"))


def flags_of_file(file: str) -> list[str]:
    """The flags that a YAML file holds, as they would be typed: a key is a flag's name.

    Raises:
        CommandError: it cannot be read, or holds something else.
    """
    try:
        return list(_server_parser().load_config_file(file))
    except (OSError, ValueError, AttributeError, TypeError, yaml.YAMLError) as error:  # a text has no items, …
        raise CommandError(
            f"{file}: no YAML file of flags ({one_line(error)}); name a .yaml file with one flag a line, such as "
            "port: 8000"
        ) from error


def server_arguments(arguments: list[str], defaults: Mapping[str, Any]) -> argparse.Namespace:
    """The command line of vLLM's API server, read and checked.

    Args:
        arguments: as typed.
        defaults: of its flags, by name, instead of vLLM's.
    """
    try:
        from vllm.entrypoints.common.cli_args import validate_parsed_serve_args
    except ModuleNotFoundError:  # vLLM 0.32
        from vllm.entrypoints.launchers.cli_args import validate_parsed_serve_args

    parser = _server_parser()
    parser.set_defaults(**defaults)
    args = parser.parse_args(arguments)
    validate_parsed_serve_args(args)
    return args


def _set_up_environment() -> None:
    """What vLLM's command line does first."""
    try:
        from vllm.entrypoints.common.startup import cli_env_setup
    except ModuleNotFoundError:  # vLLM 0.32
        from vllm.entrypoints.serve.utils.api_utils import cli_env_setup

    cli_env_setup()


FRONT = (
    *("host", "port", "uds", "root_path", "ssl_keyfile", "ssl_certfile", "ssl_ca_certs", "ssl_ciphers"),
    *("ssl_cert_reqs", "enable_ssl_refresh", "uvicorn_log_level", "disable_uvicorn_access_log", "log_config_file"),
    *("h11_max_incomplete_event_size", "h11_max_header_count", "shutdown_timeout"),
)
"""Flags of vLLM's API server that say how it listens and ends, by name: of no use where something else does that."""


@contextlib.asynccontextmanager
async def application(
    arguments: list[str], options: Any, defaults: Mapping[str, Any]
) -> AsyncGenerator["FastAPI", None]:
    """vLLM's API server, with its engine, for something else to listen in its place; both end with the block.

    Args:
        arguments: its command line.
        options: see `serve`.
        defaults: see `server_arguments`.

    Raises:
        CommandError: the command line cannot be read.
        UnsupportedError: it has a flag about listening.
    """
    from vllm.entrypoints.launchers.api_server.app_state import init_app_state
    from vllm.entrypoints.launchers.api_server.entry import build_async_engine_client
    from vllm.entrypoints.launchers.app import build_app

    _set_up_environment()
    with contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            args, usual = (server_arguments(given, defaults) for given in (arguments, arguments[:2]))
        except SystemExit:
            *_, last = said.getvalue().splitlines() or ["they ask for help"]
            raise CommandError(f"flags of the server: {last}") from None
    if useless := [name for name in FRONT if getattr(args, name, None) != getattr(usual, name, None)]:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in useless)
        raise UnsupportedError(f"{flags}: the server does not listen itself here; say it to what does, or leave it out")
    refuse_other_processes(args)
    args.vilavt = options
    async with build_async_engine_client(args) as engine:
        tasks = await engine.get_supported_tasks()
        app = build_app(args, tasks, engine.model_config)
        await init_app_state(engine, app.state, args, tasks)
        app.state.server = SimpleNamespace()  # vLLM tells it to exit when the engine has died
        yield app


def refuse_other_processes(args: argparse.Namespace) -> None:
    """Stop where vLLM's command would start something else than this process's one API server.

    Args:
        args: of `server_arguments`.

    Raises:
        CommandError: two checkpoints are named.
        UnsupportedError: names the flag, why, and what to do.
    """
    if args.model_tag not in (None, args.model):
        raise CommandError(f"two checkpoints are named, {args.model!r} and {args.model_tag!r}; name one")
    alone = "a conversation is remembered in the process that answered it"
    asked = {
        f"--api-server-count {args.api_server_count}": (
            args.api_server_count not in (None, 1),
            f"{alone}; run several servers behind a proxy that keeps a client on one of them",
        ),
        "--headless": (args.headless, "there is no server in it to run the loop; use `vllm serve --headless`"),
        "--grpc": (getattr(args, "grpc", False), "the loop is in the HTTP server; leave it out"),
        "--data-parallel-multi-port-external-lb": (
            getattr(args, "data_parallel_multi_port_external_lb", False),
            f"it starts a server per rank, and {alone}; start each with --data-parallel-rank, behind a proxy that "
            "keeps a client on one of them, or leave it out",
        ),
    }
    for flag, (wanted, reason) in asked.items():
        if wanted:
            raise UnsupportedError(f"{flag}: {reason}")


def serve(arguments: list[str], options: Any, defaults: Mapping[str, Any]) -> None:
    """Run vLLM's API server in this process until it is told to stop.

    Args:
        arguments: its command line.
        options: put on its namespace as ``vilavt``, where our endpoint plug-in finds them.
        defaults: see `server_arguments`.

    Raises:
        CommandError: two checkpoints are named.
        UnsupportedError: see `refuse_other_processes`.
    """
    import uvloop
    from vllm.entrypoints.launchers.api_server.entry import run_server

    _set_up_environment()
    args = server_arguments(arguments, defaults)
    refuse_other_processes(args)
    args.vilavt = options
    uvloop.run(run_server(args))
