"""What is not supported is refused with the reason, and listed."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from vilavt_vllm import compat
from vilavt_vllm.errors import UnsupportedError

README = Path(__file__).parents[2] / "vilavt_vllm" / "README.md"


def settings(graphs=False, tower_lora=None):
    lora = None if tower_lora is None else SimpleNamespace(enable_tower_connector_lora=tower_lora)
    return SimpleNamespace(compilation_config=SimpleNamespace(cudagraph_mm_encoder=graphs), lora_config=lora)


def test_ordinary_settings_are_accepted():
    compat.refuse_unsupported(settings())
    compat.refuse_unsupported(settings(tower_lora=False))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"graphs": True}, "cudagraph_mm_encoder.*several images and a query"),
        ({"tower_lora": True}, "enable-tower-connector-lora.*query tokens"),
    ],
)
def test_features_that_would_take_inquiries_apart_are_refused_with_the_reason(options, message):
    with pytest.raises(UnsupportedError, match=message):
        compat.refuse_unsupported(settings(**options))


def test_the_rust_frontend_is_refused(monkeypatch):
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "1")
    with pytest.raises(UnsupportedError, match=r"VLLM_USE_RUST_FRONTEND=1.*Python processors"):
        compat.refuse_unsupported(settings())


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
    assert not Model.supports_tower_connector_lora


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


def test_an_untested_vllm_is_warned_about(monkeypatch, caplog):
    import vllm

    compat.check_version()
    assert not caplog.records
    monkeypatch.setattr(vllm, "__version__", "0.99.1")
    compat.check_version()
    assert "from 0.20 and below 0.34, this is 0.99.1" in caplog.text


def test_the_readme_lists_every_unsupported_feature():
    text = " ".join(README.read_text().split())
    for feature, reason in compat.UNSUPPORTED.items():
        assert f"| {feature} | {reason} |" in text
