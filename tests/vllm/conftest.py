"""A tiny ViLaVT in the sizes vLLM's CPU attention supports, pictures, prompts, and engines in the test process."""

import os

os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_NO_USAGE_STATS="1",
    VLLM_LOGGING_LEVEL="WARNING",
    HF_HUB_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
)
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # vLLM 0.20.0 knows only numbers of cores

import gc
import sys
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from family import build_tiny_model, picture, tiny_config
from PIL import Image

from vilavt_core.protocol import Region, ToolCall, format_tool_call
from vilavt_hf import VilavtProcessor, compat

IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
HIDDEN = 128
"""Heads of 32: what vLLM's CPU attention supports."""
MIN_PIXELS, MAX_PIXELS = 28 * 28 * 4, 28 * 28 * 64


@pytest.fixture(autouse=True)
def _a_download_belongs_to_one_event_loop(monkeypatch):
    """vLLM keeps one HTTP client in a process, which belongs to the event loop that used it first; here every request
    has a loop of its own.
    """
    if connections := sys.modules.get("vllm.connections"):
        monkeypatch.setattr(connections.global_http_connection, "reuse_client", False)


@pytest.fixture(scope="session")
def build_checkpoint(tokenizer, tmp_path_factory):
    """`build_checkpoint(seed=0, **vision_config)` -> (folder, the transformers model)."""
    processor = VilavtProcessor(
        compat.PilImageProcessor(min_pixels=MIN_PIXELS, max_pixels=MAX_PIXELS),
        tokenizer,
        query_tokenizer=tokenizer,
        chat_template=Path(chat_template_file()).read_text(),
    )

    def build(seed: int = 0, **vision):
        model = build_tiny_model(tokenizer, seed, hidden=HIDDEN, **vision)
        folder = tmp_path_factory.mktemp("tiny") / "checkpoint"
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        return folder, model

    return build


def chat_template_file() -> str:
    from vilavt_vllm import CHAT_TEMPLATE

    return str(CHAT_TEMPLATE)


@pytest.fixture(scope="session")
def tiny(build_checkpoint):
    """The checkpoint most tests share: `.path`, `.model` (transformers), `.processor`."""
    path, model = build_checkpoint()
    return SimpleNamespace(path=path, model=model, processor=VilavtProcessor.from_pretrained(path))


def call(query: str, *indices: int) -> str:
    """Assistant text that asks for regions of the given images."""
    regions = tuple(Region(i, (4.0, 4.0, 40.0, 40.0)) for i in indices or (0,))
    return "<think>Look closer.</think>" + format_tool_call(ToolCall(regions, query))


def conversation(*turns: tuple[str, int], question: str = "What is it?", originals: int = 1) -> str:
    """ChatML of a conversation up to the next assistant turn; each turn is (query, number of regions)."""
    text = "<|im_start|>system\nZoom in, then answer.<|im_end|>\n<|im_start|>user\n"
    text += "".join(f"index={i} {IMAGE}\n" for i in range(originals)) + f"{question}<|im_end|>\n<|im_start|>assistant\n"
    shown = originals
    for query, count in turns:
        crops = "".join(f"{IMAGE}index={shown + i}\n" for i in range(count))
        text += f"{call(query)}<|im_end|>\n<|im_start|>user\n<tool_response>{crops}Go on.</tool_response><|im_end|>\n"
        text += "<|im_start|>assistant\n"
        shown += count
    return text


@pytest.fixture(scope="session")
def pictures() -> list[Image.Image]:
    """Of different sizes and shapes, small to keep runs short."""
    sizes = [(84, 112), (56, 84), (112, 56), (140, 84), (84, 84), (56, 140), (112, 112), (84, 56), (56, 56), (168, 56)]
    return [picture(seed, *size) for seed, size in enumerate(sizes)]


@cache
def in_this_process(path: str) -> dict:
    """What keeps a model's worker in the test process, so that tests reach it: before 0.24 vLLM on a CPU starts one."""
    from vllm import EngineArgs
    from vllm.v1.executor.uniproc_executor import UniProcExecutor

    parallel = EngineArgs(model=path, max_model_len=64).create_engine_config().parallel_config
    return {} if parallel.distributed_executor_backend == "uni" else {"distributed_executor_backend": UniProcExecutor}


class Engine:
    """An in-process vLLM with the calls the tests need."""

    def __init__(self, path, **options):
        from vllm import LLM

        defaults = {
            "dtype": "float32",
            "enforce_eager": True,
            "max_model_len": 4096,
            "max_num_seqs": 8,
            "block_size": 32,
            "max_logprobs": -1,
            "enable_prefix_caching": True,
            "limit_mm_per_prompt": {"image": 32},
            "seed": 0,
            "disable_log_stats": True,
            **in_this_process(str(path)),
        }
        gc.freeze()  # vLLM collects several times, which takes 0.6 s each with all that is imported
        self.llm = LLM(model=str(path), **{**defaults, **options})

    def generate(self, prompts: list[tuple], max_tokens: int = 1, logprobs: int | None = -1, **options):
        """Greedy; each prompt is (text or token ids, images)."""
        from vllm import SamplingParams

        params = SamplingParams(
            temperature=0, max_tokens=max_tokens, logprobs=logprobs, ignore_eos=True, detokenize=False
        )
        requests = []
        for prompt, images in prompts:
            key = "prompt" if isinstance(prompt, str) else "prompt_token_ids"
            requests.append({key: prompt, **({"multi_modal_data": {"image": images}} if images else {}), **options})
        return self.llm.generate(requests, params, use_tqdm=False)

    def next_logprobs(self, prompt, images, **options) -> np.ndarray:
        """Log-probabilities of the next token over the whole vocabulary."""
        return vocabulary(self.generate([(prompt, images)], **options)[0])

    @property
    def model(self):
        return self.llm.apply_model(lambda model: model)[0]

    @property
    def counts(self):
        return self.model.counts

    def forget(self, *, encoder: bool = True, processor: bool = True) -> None:
        """Empty the caches."""
        self.llm.reset_prefix_cache()
        if encoder:
            self.llm.llm_engine.reset_encoder_cache()
        if processor:
            self.llm.llm_engine.reset_mm_cache()

    def stop(self) -> None:
        from vllm.distributed import cleanup_dist_env_and_memory

        try:
            self.llm.llm_engine.engine_core.shutdown()
        except RuntimeError as error:  # vLLM 0.20's last step asks a CUDA build of torch for its driver, on a CPU too
            if "NVIDIA driver" not in str(error):
                raise
        del self.llm
        cleanup_dist_env_and_memory()  # collects


def vocabulary(output, position: int = 0) -> np.ndarray:
    """Log-probabilities over the vocabulary of one sampled position."""
    table = output.outputs[0].logprobs[position]
    values = np.full(max(table) + 1, -np.inf)
    for token, entry in table.items():
        values[token] = entry.logprob
    return values


@pytest.fixture(scope="module")
def start():
    """Starts engines that stop with the module: `start(path, **engine_arguments)`."""
    running = []

    def begin(path, **options) -> Engine:
        while running:  # one at a time: vLLM's parallel state is global
            running.pop().stop()
        running.append(Engine(path, **options))
        return running[-1]

    yield begin
    while running:
        running.pop().stop()


@pytest.fixture(scope="module")
def vllm_world(tmp_path_factory):
    """What vLLM's layers need to be built outside an engine: a configuration and a world of one."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import (
        cleanup_dist_env_and_memory,
        init_distributed_environment,
        initialize_model_parallel,
    )

    cleanup_dist_env_and_memory()  # of an engine that was refused while it started
    with set_current_vllm_config(VllmConfig()):
        where = f"file://{tmp_path_factory.mktemp('world') / 'init'}"
        init_distributed_environment(world_size=1, rank=0, distributed_init_method=where, local_rank=0, backend="gloo")
        initialize_model_parallel(1, 1)
        yield
    cleanup_dist_env_and_memory()


@pytest.fixture(scope="session")
def tools():
    """Functions of this file for test modules (pytest's importlib mode has no imports between test files)."""
    return SimpleNamespace(
        call=call,
        conversation=conversation,
        picture=picture,
        vocabulary=vocabulary,
        reference=reference_logprobs,
        greedy=reference_greedy,
        difference=lambda a, b: float(np.abs(a[: len(b)] - b[: len(a)]).max()),
        image=IMAGE,
        engine=Engine,
        config=partial(tiny_config, hidden=HIDDEN),
    )


@torch.no_grad()
def reference_logprobs(tiny, prompt: str, images, **kwargs) -> np.ndarray:
    """The transformers model's answer to `Engine.next_logprobs`."""
    inputs = tiny.processor(text=prompt, images=images, return_tensors="pt", **kwargs)
    return tiny.model(**inputs).logits[0, -1].float().log_softmax(-1).numpy()


@torch.no_grad()
def reference_greedy(tiny, prompt: str, images, max_tokens: int) -> list[int]:
    """Greedy tokens of the transformers model; its stop token does not stop it."""
    inputs = tiny.processor(text=prompt, images=images, return_tensors="pt")
    out = tiny.model.generate(**inputs, max_new_tokens=max_tokens, min_new_tokens=max_tokens, do_sample=False)
    return out[0, inputs["input_ids"].shape[1] :].tolist()
