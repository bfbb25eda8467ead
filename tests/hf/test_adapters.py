"""An adapter is asked like the checkpoint that would be merged from it."""

import json
import shutil

import peft
import pytest
import torch
from family import noise
from typer.testing import CliRunner

from vilavt_core.checkpoint import adapter_base
from vilavt_core.cli import app
from vilavt_core.errors import CheckpointError, EngineError
from vilavt_core.presets import Limits
from vilavt_core.settings import save_chat_settings
from vilavt_hf import VilavtForConditionalGeneration, VilavtProcessor
from vilavt_hf.chat import VilavtChat
from vilavt_hf.train.lora import merge_adapter

LIMITS = Limits(max_turns=1, max_new_tokens_per_turn=12, max_pixels=84 * 84)


@pytest.fixture(scope="module")
def adapter(tiny_checkpoint, tmp_path_factory):
    """Weights large enough to be seen in every answer; no processor."""
    folder = tmp_path_factory.mktemp("adapter") / "final"
    model = VilavtForConditionalGeneration.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    targets = r".*\blanguage_model\.layers\.\d+\.\w+\.(q_proj|v_proj|up_proj)"
    config = peft.LoraConfig(r=4, target_modules=targets, base_model_name_or_path=str(tiny_checkpoint))
    adapted = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(0)
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            weight.data = torch.randn(weight.shape, generator=generator)
    adapted.peft_config["default"].base_model_name_or_path = str(tiny_checkpoint)
    adapted.save_pretrained(folder)
    return folder


def said(chat):
    results = chat.ask_many([([noise(i)], f"What is {i}?") for i in range(2)])
    assert [result.error for result in results] == [None, None]
    return [result.turns[0].text for result in results]


def load(folder, **settings):
    return VilavtChat.from_pretrained(folder, dtype=torch.float32, device="cpu", limits=LIMITS, **settings)


def test_an_adapters_folder_answers_as_what_is_merged_from_it(adapter, tiny_checkpoint, tmp_path):
    merged = load(merge_adapter(adapter, tmp_path / "merged", dtype="fp32"))
    chat, base = load(adapter), load(tiny_checkpoint)
    assert said(chat) == said(merged) != said(base)
    assert len({c.provenance(0).fingerprint for c in (chat, merged, base)}) == 3
    assert chat.provenance(0).checkpoint == str(adapter)


def test_a_model_of_peft_is_asked_with_its_adapter(adapter, tiny_checkpoint):
    model = VilavtForConditionalGeneration.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(model, str(adapter)).eval()
    processor = VilavtProcessor.from_pretrained(tiny_checkpoint)
    assert said(VilavtChat(model, processor, limits=LIMITS)) == said(load(adapter))


def test_the_base_may_be_another_folder_than_the_one_it_was_trained_on(adapter, tiny_checkpoint, tmp_path):
    moved = shutil.copytree(adapter, tmp_path / "moved")
    settings = json.loads((moved / "adapter_config.json").read_text())
    (moved / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": None}))
    with pytest.raises(CheckpointError, match="pass --base"):
        load(moved)
    assert said(load(moved, base=str(tiny_checkpoint))) == said(load(adapter))


def test_it_runs_as_the_adapter_asks_else_as_its_base_does(adapter, tiny_checkpoint, tmp_path):
    base = shutil.copytree(tiny_checkpoint, tmp_path / "base")
    save_chat_settings(base, limits={"max_turns": 3})
    own = shutil.copytree(adapter, tmp_path / "own")

    def turns():
        return VilavtChat.from_pretrained(own, device="cpu", base=str(base)).settings.limits.max_turns

    assert turns() == 3
    save_chat_settings(own, limits={"max_turns": 2})
    assert turns() == 2


def test_a_base_for_what_is_no_adapter_is_refused(tiny_checkpoint, tmp_path):
    with pytest.raises(CheckpointError, match="is no adapter"):
        load(tiny_checkpoint, base=str(tiny_checkpoint))
    assert adapter_base(tiny_checkpoint) is None


def test_a_learned_prompt_is_refused(tiny_model, processor):
    class Prompt:
        is_prompt_learning, peft_type = True, "PROMPT_TUNING"

    class Model:
        peft_config = {"default": Prompt()}  # noqa: RUF012

        def get_base_model(self):
            raise AssertionError("its prompt would be lost")

    with pytest.raises(EngineError, match="PROMPT_TUNING"):
        VilavtChat(Model(), processor)


def test_the_command_takes_an_adapter(adapter, tiny_checkpoint, tmp_path):
    noise(0).save(tmp_path / "p.png")
    arguments = ["ask", "--model", str(adapter), "--image", str(tmp_path / "p.png"), "what?", "--json"]
    arguments += ["--max-turns", "1", "--max-new-tokens", "4", "--dtype", "float32", "--device", "cpu"]
    for more in ([], ["--base", str(tiny_checkpoint)]):
        result = CliRunner().invoke(app, [*arguments, *more])
        assert json.loads(result.stdout)["provenance"]["checkpoint"] == str(adapter), result.output


@pytest.fixture
def on_hub(adapter, hub_cache):
    """The adapter under a hub id, in a cache that is out of reach of the hub; it names a folder as its base."""
    return hub_cache(adapter)


def test_an_adapter_named_by_a_hub_id_answers_as_its_folder(adapter, on_hub):
    chat = load("someone/vilavt", model_kwargs={"cache_dir": str(on_hub)})
    assert said(chat) == said(load(adapter))
    assert chat.provenance(0).checkpoint == "someone/vilavt"
    assert chat.settings.fingerprint == load(adapter).settings.fingerprint


def test_the_revision_is_the_adapters(on_hub):
    options = {"cache_dir": str(on_hub), "revision": "elsewhere"}
    with pytest.raises(CheckpointError, match="someone/vilavt"):
        load("someone/vilavt", model_kwargs=options)


def test_what_says_how_an_adapter_runs_is_found_in_the_cache_too(adapter, hub_cache, tmp_path):
    asks = shutil.copytree(adapter, tmp_path / "asks")
    save_chat_settings(asks, preset="vlmevalkit")
    chat = load("someone/vilavt", model_kwargs={"cache_dir": str(hub_cache(asks))})
    assert chat.settings.preset.name == "vlmevalkit"


def test_a_hub_id_is_merged_too(adapter, on_hub, tmp_path):
    one = merge_adapter("someone/vilavt", tmp_path / "one", dtype="fp32")
    two = merge_adapter(adapter, tmp_path / "two", dtype="fp32")
    assert (one / "model.safetensors").read_bytes() == (two / "model.safetensors").read_bytes()


def test_a_hub_id_that_is_not_to_be_had_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="nobody/nothing"):
        load("nobody/nothing", model_kwargs={"cache_dir": str(tmp_path)})
    with pytest.raises(CheckpointError, match=r"nobody/nothing is no adapter"):
        load("nobody/nothing", base="some/base", model_kwargs={"cache_dir": str(tmp_path)})
