"""Quantised weights: which modules keep theirs, what is refused, and that nothing moves them afterwards."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from family import noise, tiny_config
from typer.testing import CliRunner

from vilavt_core.backends import BackendOptions, open_backend
from vilavt_core.cli import app
from vilavt_core.errors import EngineError
from vilavt_core.presets import Limits
from vilavt_core.shipped import read_demo_questions
from vilavt_hf import VilavtConfig, VilavtForConditionalGeneration, quantization
from vilavt_hf.chat import VilavtChat
from vilavt_hf.quantization import PACKAGES, quantization_config, unquantised

EXAMPLES = Path(__file__).parents[2] / "examples"
TINY, PICTURES = EXAMPLES / "vilavt-tiny", EXAMPLES / "pictures"
CPU = torch.device("cpu")


def needs(package: str):
    return pytest.mark.skipif(find_spec(package) is None, reason=f"{package} is not installed")


@pytest.mark.parametrize("point", ["late", "all", "early"])
def test_what_keeps_its_weights_is_every_new_projection_and_the_head(build_model, point):
    model = build_model(integration_point=point)
    new = {name for name, module in model.named_modules() if "instruct_" in name or name.endswith("text_proj")}
    assert new
    assert set(unquantised(model.config)) == new | {"lm_head"}


@pytest.mark.parametrize("method", PACKAGES)
def test_a_missing_package_is_named(monkeypatch, method):
    monkeypatch.setattr(quantization, "find_spec", lambda name: None if name == PACKAGES[method] else object())
    with pytest.raises(EngineError, match=f"quantize={method} needs the package {PACKAGES[method]}: pip install"):
        VilavtChat.from_pretrained(TINY, device="cpu", quantize=method)


def test_an_unknown_method_is_refused_with_those_there_are():
    with pytest.raises(EngineError, match=r"'int6'; choose int8, fp8, int4"):
        VilavtChat.from_pretrained(TINY, device="cpu", quantize="int6")


def test_two_ways_to_say_it_are_refused():
    with pytest.raises(EngineError, match="quantize=int8 and quantization_config"):
        VilavtChat.from_pretrained(TINY, device="cpu", quantize="int8", model_kwargs={"quantization_config": {}})


def test_sizes_that_4_bits_cannot_have_on_a_cpu_are_refused(monkeypatch):
    monkeypatch.setattr(quantization, "find_spec", lambda name: object())
    with pytest.raises(EngineError, match=r"multiples of 64, and text_config.intermediate_size is 528; use int8"):
        quantization_config("int4", VilavtConfig.from_pretrained(TINY), CPU)


def test_a_quantised_model_is_not_moved(monkeypatch, tiny_checkpoint):
    load = VilavtForConditionalGeneration.from_pretrained

    def quantised(*args, **kwargs):
        model = load(*args, **kwargs)
        model.is_quantized = True  # as a quantizer of transformers leaves it
        return model

    def move(self, *args):
        raise AssertionError("it was moved")

    monkeypatch.setattr(VilavtForConditionalGeneration, "from_pretrained", quantised)
    monkeypatch.setattr(VilavtForConditionalGeneration, "to", move)
    assert VilavtChat.from_pretrained(tiny_checkpoint, device="cpu").model.is_quantized


@needs("torchao")
@pytest.mark.parametrize("method", ["int8", "fp8"])
def test_the_example_keeps_its_answers(method):
    chat = VilavtChat.from_pretrained(TINY, dtype=torch.float32, device="cpu", quantize=method)
    kinds = {name: type(module.weight.data) for name, module in chat.model.named_modules() if hasattr(module, "weight")}
    kept = set(unquantised(chat.model.config))
    assert all((kinds[name] is torch.Tensor) == (name in kept) for name in kinds if name.endswith("_proj"))
    for question in read_demo_questions(PICTURES / "questions.json"):
        assert chat.ask(question.sources, question.question).answer == question.answer
    assert chat.provenance(0).dtype == f"float32, {method} weights"


@needs("bitsandbytes")
def test_4_bits_leave_the_tower_and_the_projections_alone(tokenizer, processor, tmp_path):
    config = tiny_config(tokenizer, hidden=128)
    config.text_encoder_config.hidden_size = config.text_encoder_config.intermediate_size = 64
    config.text_encoder_config.head_dim = 32
    model = VilavtForConditionalGeneration(config)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    chat = VilavtChat.from_pretrained(
        tmp_path, dtype=torch.float32, device="cpu", quantize="int4", limits=Limits(max_new_tokens_per_turn=4)
    )
    four = {n for n, module in chat.model.named_modules() if getattr(getattr(module, "weight", None), "ndim", 0) == 2}
    four = {n for n in four if chat.model.get_submodule(n).weight.dtype == torch.uint8}
    assert {name.split(".")[1] for name in four} == {"language_model", "text_encoder"}
    assert len(four) == 7 * (2 + 2)
    assert chat.ask_many([([noise(0)], "what?")])[0].error is None


@pytest.mark.parametrize("option", ["--device-map", "--quantize"])
@pytest.mark.parametrize("command", ["ask", "chat", "web"])
def test_a_server_is_not_told_where_weights_go(command, option, monkeypatch):
    monkeypatch.setattr("vilavt_core.cli.web.find_spec", lambda name: object())
    picture = ["what?", "--image", str(PICTURES / "scene-1.png")] if command == "ask" else []
    result = CliRunner().invoke(app, [command, "--model", "http://127.0.0.1:9/v1", option, "auto", *picture])
    assert isinstance(result.exception, EngineError)
    assert f"{option} auto: a server's engine" in str(result.exception)


@pytest.mark.parametrize("backend", ["vllm", "server"])
def test_only_the_local_backend_of_an_evaluation_takes_them(backend, tmp_path):
    model = "http://127.0.0.1:9/v1" if backend == "server" else str(TINY)
    arguments = ["eval", "ERQA", "--model", model, "--backend", backend, "--out", str(tmp_path)]
    result = CliRunner().invoke(app, [*arguments, "--quantize", "int8"])
    assert result.exit_code == 2
    assert "options of its own" in result.output


def test_the_local_backend_hands_them_on(monkeypatch):
    asked = {}

    def load(path, **kwargs):
        asked.update(kwargs)
        raise EngineError("enough")

    monkeypatch.setattr(VilavtChat, "from_pretrained", load)
    with pytest.raises(EngineError, match="enough"):
        open_backend(str(TINY), options=BackendOptions(engine={"quantize": "int8", "device_map": "auto"}))
    assert (asked["quantize"], asked["model_kwargs"]) == ("int8", {"device_map": "auto"})
