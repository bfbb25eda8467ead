"""What is not supported is refused with the reason, and listed."""

import importlib
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
from vllm import envs

from vilavt_vllm import compat, register, support
from vilavt_vllm.errors import UnsupportedError

README = Path(__file__).parents[2] / "vilavt_vllm" / "README.md"
TINY = Path(__file__).parents[2] / "examples" / "vilavt-tiny"


def settings(graphs=False, tower_lora=None, speculative=None, whole_images=False, stages=1):
    lora = None if tower_lora is None else SimpleNamespace(enable_tower_connector_lora=tower_lora)
    return SimpleNamespace(
        compilation_config=SimpleNamespace(cudagraph_mm_encoder=graphs),
        lora_config=lora,
        speculative_config=speculative,
        parallel_config=SimpleNamespace(pipeline_parallel_size=stages),
        scheduler_config=SimpleNamespace(disable_chunked_mm_input=whole_images, max_num_batched_tokens=8192),
    )


def check(config, tokens=16384, regions=16):
    compat.refuse_unsupported(config, lambda: (tokens, regions))


def test_ordinary_settings_are_accepted():
    check(settings())
    check(settings(tower_lora=False))
    check(settings(whole_images=True), tokens=4096)


def test_whole_images_only_is_refused_where_the_largest_inquiry_would_never_be_scheduled():
    with pytest.raises(UnsupportedError, match=r"disable-chunked-mm-input.*16384 image tokens in 16 regions.*is 8192"):
        check(settings(whole_images=True))
    with pytest.raises(UnsupportedError, match="8192 image tokens in 2 regions, up to 8320"):
        check(settings(whole_images=True), tokens=8192, regions=2)
    check(settings(whole_images=True), tokens=8192, regions=1)


def test_the_largest_inquiry_is_that_of_the_engines_caps():
    from vllm.config import ModelConfig

    from vilavt_vllm.processing import largest_inquiry

    register()  # which an engine does
    overrides = {"vilavt_max_regions": 3, "vilavt_max_group_pixels": 784 * 50}
    assert largest_inquiry(ModelConfig(model=str(TINY), hf_overrides=overrides)) == (50, 3)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"graphs": True}, "cudagraph_mm_encoder.*several images and a query"),
        ({"tower_lora": True}, "enable-tower-connector-lora.*query tokens"),
        ({"speculative": object()}, "speculative-config.*logit_bias"),
        ({"stages": 2}, "pipeline-parallel-size.*tensor and data parallelism work"),
    ],
)
def test_features_that_would_take_inquiries_apart_are_refused_with_the_reason(options, message):
    with pytest.raises(UnsupportedError, match=message):
        check(settings(**options))


@pytest.mark.skipif("VLLM_USE_RUST_FRONTEND" not in envs.environment_variables, reason="this vLLM has no Rust frontend")
def test_the_rust_frontend_is_refused(monkeypatch):
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "1")
    with pytest.raises(UnsupportedError, match=r"VLLM_USE_RUST_FRONTEND=1.*Python processors"):
        check(settings())


def test_the_model_promises_vllm_nothing_it_cannot_keep():
    from vllm.model_executor.models.interfaces import (
        supports_encoder_cudagraph,
        supports_lora,
        supports_mrope,
        supports_multimodal,
        supports_pp,
    )

    from vilavt_vllm.model import VilavtForConditionalGeneration as Model

    assert all(ask(Model) for ask in (supports_multimodal, supports_mrope, supports_lora, supports_pp))
    assert not supports_encoder_cudagraph(Model)
    assert not Model.supports_encoder_tp_data  # vLLM then falls back to weights and warns
    assert not getattr(Model, "supports_tower_connector_lora", False)  # no such promise before 0.29


def test_the_private_seams_of_vllm_have_the_signatures_that_are_overridden():
    import inspect

    from vllm.multimodal.parse import MultiModalDataParser
    from vllm.multimodal.processing import BaseMultiModalProcessor

    from vilavt_vllm.processing import InquiryParser, VilavtMultiModalProcessor

    names = ("apply", "_get_mm_fields_config", "_get_prompt_updates", "_apply_prompt_updates")
    for name in names:
        theirs, ours = (
            inspect.signature(getattr(c, name)) for c in (BaseMultiModalProcessor, VilavtMultiModalProcessor)
        )
        assert list(theirs.parameters) == list(ours.parameters), name
    assert {"mm_items"} < set(inspect.signature(BaseMultiModalProcessor._apply_hf_processor_main).parameters)
    theirs, ours = (inspect.signature(c._parse_image_data) for c in (MultiModalDataParser, InquiryParser))
    assert list(theirs.parameters) == list(ours.parameters)


def test_an_untested_vllm_is_warned_about_and_runs(monkeypatch):
    said = []
    monkeypatch.setattr(compat.logger, "warning", lambda text, *values: said.append(text % values))
    compat.check_version()
    assert not said
    monkeypatch.setattr(compat.vllm, "__version__", "0.99.1")
    compat.check_version()
    (warning,) = said
    assert "from 0.20 and below 0.34, this is 0.99.1" in warning


def test_the_readme_lists_every_unsupported_feature():
    text = " ".join(README.read_text().split())
    for feature, reason in compat.UNSUPPORTED.items():
        assert f"| {feature} | {reason} |" in text


def test_the_readme_holds_the_matrix():
    assert f"\n\n{support.table()}\n\n" in README.read_text(encoding="utf-8")


def test_the_package_asks_for_the_supported_range():
    dependency = tomllib.loads((README.parent / "pyproject.toml").read_text())["project"]["dependencies"]
    assert support.REQUIREMENT in dependency
    low, high = map(support.dotted_version, support.SUPPORTED)
    assert f"vllm>={low},<{high}" == support.REQUIREMENT


def test_every_combination_is_inside_the_range_and_its_session_exists():
    nox = (README.parents[1] / "noxfile.py").read_text()
    for row in support.COMBINATIONS:
        assert support.is_supported(row.vllm), row
        assert bool(row.session) == (row.tested != support.UNTESTED), row
        assert not row.session or f"\ndef {row.session}(session" in nox, row


def test_the_matrix_costs_neither_torch_nor_vllm():
    code = "import sys, vilavt_vllm.support; assert not {'torch', 'vllm', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_server_refuses_an_old_vllm_with_the_reason_before_its_modules_are_imported():
    """Of its own only the flags' are, which know no vLLM: the checkpoint is judged before."""
    version = "0.31.2"
    code = f"""
import sys, vllm
vllm.__version__ = {version!r}
from vilavt_vllm.server.command import main
try:
    main([{str(TINY)!r}])
finally:
    print([name for name in sys.modules if name.startswith("vilavt_vllm.server.") and not name.endswith(".command")])
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert result.returncode == 1
    assert result.stdout.splitlines()[-1] == "['vilavt_vllm.server.options']"
    assert (
        f"vilavt-serve: UnsupportedError: this is vLLM {version}, and vilavt-serve needs 0.32 or newer" in result.stderr
    )
    assert "`vllm serve CHECKPOINT` offers the raw model" in result.stderr
    assert "VilavtLLM" in result.stderr
    assert "Traceback" not in result.stderr


def test_vllms_own_server_is_told_why_the_loop_is_not_in_it(monkeypatch):
    import vllm

    monkeypatch.setattr(vllm, "__version__", "0.31.0")
    monkeypatch.delitem(sys.modules, "vilavt_vllm.server.endpoint", raising=False)
    with pytest.raises(UnsupportedError, match=r"this is vLLM 0\.31\.0, and vilavt-serve needs 0\.32"):
        importlib.import_module("vilavt_vllm.server.endpoint")


def test_the_server_runs_on_the_versions_it_is_said_to(monkeypatch):
    import vllm

    for version, runs in (
        ("0.20.0", False),
        ("0.24.0", False),
        ("0.31.9", False),
        ("0.32.0", True),
        ("0.33.1", True),
        ("0.99.0", True),
    ):
        assert (support.server_problem(version) is None) == runs
    if support.server_problem(vllm.__version__) is None:
        importlib.import_module("vilavt_vllm.server.endpoint")
    else:
        with pytest.raises(UnsupportedError):
            importlib.import_module("vilavt_vllm.server.endpoint")
