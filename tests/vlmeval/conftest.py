"""VLMEvalKit in processes of its own: importing it switches gradients off, so no test does that here."""

import csv
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from serving import SMALL

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
TINY = ROOT / "examples" / "vilavt-tiny"
QUESTIONS = 24
"""Asked for; the benchmark rounds per kind."""


def _own_environment() -> dict[str, str]:
    """This process's, without what other tests or the developer have set for vLLM and for us."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("VILAVT_", "VLLM_"))}
    return kept | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


@pytest.fixture(scope="session")
def vllm_settings() -> dict[str, str]:
    """Environment of an in-process vLLM on a small machine."""
    return SMALL | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}


def _load(name):
    """A module of this folder: pytest's importlib mode has no imports between test files."""
    spec = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def standins():
    """See `standins.py`."""
    return _load("standins")


class Toolkit:
    """Starts VLMEvalKit on data of its own, without a network."""

    def __init__(self, data: Path, hub: Path) -> None:
        self.data, self.hub = data, hub

    def environment(self, **settings: str) -> dict[str, str]:
        return _own_environment() | {
            "LMUData": str(self.data),
            "HF_HUB_CACHE": str(self.hub),
            "PYTHONPATH": str(HERE / "run_env"),
            "VLMEVALKIT_USE_MODELSCOPE": "0",
            **settings,
        }

    def start(self, folder: Path, *command: str, **settings: str) -> subprocess.Popen:
        """A process of this Python in `folder`; its output is ``log``."""
        folder.mkdir(exist_ok=True)
        with (folder / "log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, *command],
                cwd=folder,
                env=self.environment(**settings),
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def run(self, folder: Path, *command: str, **settings: str) -> Path:
        """`start`, and wait. The runner's exit code says nothing; see `status`."""
        process = self.start(folder, *command, **settings)
        assert process.wait(420) == 0, self.log(folder)
        return folder

    def log(self, folder: Path, *, whole: bool = False) -> str:
        return (folder / "log").read_text(errors="replace")[0 if whole else -6000 :]

    def status(self, folder: Path, model: str) -> dict:
        """What the toolkit noted per benchmark."""
        return json.loads((folder / "outputs" / model / "status.json").read_text())["datasets"]

    def table(self, folder: Path, model: str, benchmark: str) -> dict[str, float]:
        """Its table of a multiple-choice benchmark: category -> accuracy."""
        (file,) = (folder / "outputs" / model).glob(f"{model}_{benchmark}_acc.csv")
        names, values = list(csv.reader(file.open()))
        return {name: float(value) for name, value in zip(names, values, strict=True) if name != "split"}

    def rows(self, folder: Path, model: str, benchmark: str) -> list[dict]:
        """Our traces, of all ranks."""
        files = sorted((folder / "vilavt_traces").glob(f"{model}_{benchmark}_rank*.jsonl"))
        return [json.loads(line) for file in files for line in file.read_text().splitlines()]


@pytest.fixture(scope="session")
def toolkit(tmp_path_factory, standins) -> Toolkit:
    from vilavt_vlmeval.tiny_benchmark import write

    root = tmp_path_factory.mktemp("toolkit")
    standins.write(root / "data", root / "hub")
    write(root / "data", QUESTIONS)
    return Toolkit(root / "data", root / "hub")


@pytest.fixture(scope="session")
def reference():
    """What ``vilavt tiny eval`` says about the same questions: kind and whether it was right, in order."""
    import torch

    from vilavt_core.results import Sample
    from vilavt_hf import VilavtChat
    from vilavt_hf.tiny.benchmark import tasks

    torch.set_num_threads(1)
    todo = tasks("heldout", QUESTIONS)
    chat = VilavtChat.from_pretrained(TINY, concurrency=64, dtype="float32")
    results = chat.ask_many([Sample([t.scene.image], t.question.text, id=str(i)) for i, t in enumerate(todo)])
    return [(str(t.question.kind), r.answer == t.question.answer) for t, r in zip(todo, results, strict=True)]
