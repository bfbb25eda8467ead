"""A ``vilavt-serve`` for vilavt-tiny, in its own processes."""

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
SMALL = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}
"""Environment of a vLLM on a small machine."""
KEY = "secret"
FOR_MOST_TESTS = (
    *("--dtype", "float32", "--enforce-eager", "--block-size", "32", "--api-key", KEY),
    *("--enable-prompt-tokens-details", "--allowed-local-media-path", str(EXAMPLES / "pictures")),
    # Caches small enough for the load test's first round to fill: what grows after it is no cache.
    *("--num-gpu-blocks-override", "1024", "--mm-processor-cache-gb", "0.05"),
)


@contextlib.contextmanager
def serving(log: Path, *flags: str, key: str = "none") -> Iterator[SimpleNamespace]:
    """A server with these flags that stops with the block: `.url`, `.base`, `.key`, `.process`, `.metric(…)`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vilavt_vllm.server.command", str(EXAMPLES / "vilavt-tiny"), *flags]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    settings = {k: v for k, v in os.environ.items() if k not in ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_PLUGINS")}
    with log.open("wb") as file:
        process = subprocess.Popen(command, env=settings | SMALL, stdout=file, stderr=subprocess.STDOUT)
    base = f"http://127.0.0.1:{port}"

    def metric(name: str) -> float:
        """Sum over the series of a metric, or the one series that is named with its labels."""
        series = [line.rsplit(" ", 1) for line in httpx.get(f"{base}/metrics", timeout=30).text.splitlines()]
        return sum(float(row[1]) for row in series if name in (row[0], row[0].split("{")[0]))

    try:
        for _ in range(1200):  # ten minutes: starting takes long beside other work
            if process.poll() is not None:
                pytest.fail(f"the server ended with {process.returncode}:\n{log.read_text()[-4000:]}")
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{base}/health", timeout=2).status_code == 200:
                    break
            time.sleep(0.5)
        else:
            pytest.fail(f"the server did not start within ten minutes:\n{log.read_text()[-4000:]}")
        yield SimpleNamespace(
            url=f"{base}/v1", base=base, key=key, pid=process.pid, process=process, log=log, metric=metric
        )
        process.terminate()
        assert process.wait(60) == 0, "a SIGTERM did not end the server in the ordinary way"
    finally:
        if process.poll() is None:
            process.kill()
            process.wait(30)
