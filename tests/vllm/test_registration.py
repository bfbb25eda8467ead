"""The entry point in fresh interpreters: cheap, re-entrant, and obedient to VLLM_PLUGINS."""

import json
import os
import subprocess
import sys
from importlib.metadata import entry_points


def fresh(code: str, **environment: str) -> dict:
    """What a new interpreter prints as JSON in its last line."""
    env = {**{k: v for k, v in os.environ.items() if k != "VLLM_PLUGINS"}, **environment}
    result = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_the_entry_point_names_register():
    found = [point for point in entry_points(group="vllm.general_plugins") if point.name == "vilavt"]
    assert [point.value for point in found] == ["vilavt_vllm:register"]


def test_importing_the_package_imports_no_torch_no_vllm_and_no_transformers():
    code = """
import json, sys
import vilavt_vllm
print(json.dumps([name for name in ("torch", "vllm", "transformers", "vilavt_hf", "numpy") if name in sys.modules]))
"""
    assert fresh(code) == []


def test_register_imports_nothing_of_weight():
    code = """
import json, sys
import vllm
from vllm import ModelRegistry
from transformers import CONFIG_MAPPING
before = set(sys.modules)
heavy = ("torch", "vilavt_hf", "transformers", "vllm")
from vilavt_vllm import register
for _ in range(3):
    register()
import torch
print(json.dumps({
    "imported": sorted(name for name in set(sys.modules) - before if name.split(".")[0] in heavy),
    "cuda": torch.cuda.is_initialized(),
    "architectures": [a for a in ModelRegistry.get_supported_archs() if "ilavt" in a],
    "config": CONFIG_MAPPING["vilavt"].__name__,
}))
"""
    result = fresh(code)
    assert result["imported"] == []
    assert not result["cuda"]
    assert sorted(result["architectures"]) == [
        "Qwen2_5_VLForConditionalGeneration_Vilavt",
        "VilavtForConditionalGeneration",
    ]
    assert result["config"] == "ConfigOnFirstUse"


def test_vllm_plugins_decides_whether_the_model_is_known(tiny):
    """Each setting in a process of its own that is forked after vLLM was imported, which takes long, and before any
    plug-in was loaded.
    """
    code = f"""
import json, multiprocessing, os
import vllm
from vllm import ModelRegistry
from vllm.config import ModelConfig
from vllm.plugins import load_general_plugins

def known(plugins):
    if plugins:
        os.environ["VLLM_PLUGINS"] = plugins
    assert "VilavtForConditionalGeneration" not in ModelRegistry.get_supported_archs()
    load_general_plugins()
    if "VilavtForConditionalGeneration" not in ModelRegistry.get_supported_archs():
        return None
    model = ModelConfig(model={str(tiny.path)!r}, dtype="float32")
    return [type(model.hf_config).__name__, model.architecture, model.is_multimodal_model, model.uses_mrope]

with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:
    print(json.dumps(pool.map(known, [None, "vilavt", "another"], chunksize=1)))
"""
    served = ["VilavtConfig", "VilavtForConditionalGeneration", True, True]
    assert fresh(code) == [served, served, None]
