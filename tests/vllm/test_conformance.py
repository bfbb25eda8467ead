"""`VilavtLLM`, `AsyncVilavtLLM` and a server's client have the methods of every backend, and they do what the suite
says.
"""

import asyncio
from pathlib import Path

import pytest
from conformance import Synchronous, conforms, signatures_are_those_of_the_protocol

from vilavt_core.backends import AsyncBackend, BackendOptions
from vilavt_core.client import ServerClient
from vilavt_vllm import AsyncVilavtLLM, VilavtLLM

pytestmark = [pytest.mark.engine]

CHECKPOINT = Path(__file__).parents[2] / "examples" / "vilavt-tiny"


def test_names_arguments_and_defaults_are_those_of_the_protocol():
    signatures_are_those_of_the_protocol(VilavtLLM)
    signatures_are_those_of_the_protocol(AsyncVilavtLLM, AsyncBackend)


def test_the_offline_engine_conforms(start):
    conforms(VilavtLLM(start(CHECKPOINT).llm))


def test_the_async_engine_conforms():
    loop = asyncio.new_event_loop()
    engine = {"dtype": "float32", "enforce_eager": True, "block_size": 32, "gpu_memory_utilization": 0.3}

    async def begin() -> AsyncVilavtLLM:
        return AsyncVilavtLLM.from_checkpoint(str(CHECKPOINT), engine_args=engine)

    llm = loop.run_until_complete(begin())
    try:
        conforms(Synchronous(llm, loop))
    finally:
        llm.shutdown()
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()


def test_the_client_of_a_server_conforms(server):
    options = BackendOptions(engine={"api_key": server.key})
    conforms(ServerClient(server.url, options), pixels=False)
