"""What one transformers writes and another does not read, put where every supported version finds it."""

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image
from transformers import AutoConfig

from vilavt_core.checkpoint.companions import bring_companions, make_portable
from vilavt_hf import VilavtConfig, VilavtForConditionalGeneration, VilavtProcessor, compat

TINY = Path(__file__).parents[2] / "examples" / "vilavt-tiny"
BOUNDS = {"shortest_edge": 3136, "longest_edge": 28224}
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def change(path: Path, drop: tuple[str, ...] = (), **values) -> None:
    value = {name: old for name, old in read(path).items() if name not in drop} if path.is_file() else {}
    path.write_text(json.dumps(value | values))


def tokens_of_a_picture(folder: Path) -> int:
    """Of 672 x 672 pixels; the bounds of vilavt-tiny allow 36, the defaults of every version many more."""
    processor = VilavtProcessor.from_pretrained(folder)
    return int(processor(text=IMAGE, images=[Image.new("RGB", (672, 672))])["image_grid_thw"].prod()) // 4


@pytest.fixture
def copy(tmp_path):
    """A writable vilavt-tiny without its weights."""
    folder = tmp_path / "copy"
    shutil.copytree(TINY, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


def as_stock_5x_writes(folder: Path, **size: int) -> None:
    """Move the image processor's settings into processor_config.json, as a stock processor of 5.x saves them."""
    own = folder / "preprocessor_config.json"
    nested = {k: v for k, v in read(own).items() if k not in ("min_pixels", "max_pixels")}
    own.unlink()
    change(
        folder / "processor_config.json",
        processor_class="Qwen2_5_VLProcessor",
        image_processor={**nested, "size": {**BOUNDS, **size}},
    )


def test_pixel_bounds_that_only_size_gives_are_read_by_every_version(copy):
    assert tokens_of_a_picture(copy) == 36
    change(copy / "preprocessor_config.json", drop=("min_pixels", "max_pixels"), size=BOUNDS)
    assert tokens_of_a_picture(copy) == 36
    assert compat.load_image_processor(copy).size["longest_edge"] == 28224


def test_pixel_bounds_that_only_the_old_names_give_are_read_by_every_version(copy):
    change(copy / "preprocessor_config.json", drop=("size",), min_pixels=3136, max_pixels=28224)
    assert tokens_of_a_picture(copy) == 36


def test_pixel_bounds_are_saved_under_both_names(copy, tmp_path):
    VilavtProcessor.from_pretrained(copy).save_pretrained(tmp_path / "again")
    saved = read(tmp_path / "again" / "preprocessor_config.json")
    assert (saved["min_pixels"], saved["max_pixels"]) == (3136, 28224)
    assert tokens_of_a_picture(tmp_path / "again") == 36


def test_nested_settings_of_an_image_processor_get_a_file_of_their_own_and_both_names(copy):
    as_stock_5x_writes(copy)
    make_portable(copy)
    own = read(copy / "preprocessor_config.json")
    assert own["size"] == BOUNDS
    assert (own["min_pixels"], own["max_pixels"]) == (3136, 28224)
    assert "image_processor" not in read(copy / "processor_config.json")
    assert tokens_of_a_picture(copy) == 36


def test_of_two_places_the_one_that_5x_prefers_is_left(copy):
    change(copy / "preprocessor_config.json", min_pixels=784, max_pixels=784)  # of an older save into this folder
    nested = {**read(TINY / "preprocessor_config.json"), "size": BOUNDS}
    change(copy / "processor_config.json", image_processor=nested)
    make_portable(copy)
    assert tokens_of_a_picture(copy) == 36
    assert "image_processor" not in read(copy / "processor_config.json")


@pytest.mark.parametrize("nested", ["first", "second", "both", "neither"])
def test_an_image_processor_comes_whole_from_the_first_folder_that_has_one(tmp_path, nested):
    """Else 5.x would take the nested settings of one folder and 4.57 the file of the other."""
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder, wide in zip(folders, (28224, 784 * 81), strict=True):
        shutil.copytree(TINY, folder, ignore=shutil.ignore_patterns("*.safetensors"))
        if nested in (folder.name, "both"):
            as_stock_5x_writes(folder, longest_edge=wide)
        else:
            change(folder / "preprocessor_config.json", size={**BOUNDS, "longest_edge": wide}, max_pixels=wide)
            (folder / "processor_config.json").unlink()
    target = tmp_path / "target"
    target.mkdir()
    assert not bring_companions(target, folders).missing
    assert tokens_of_a_picture(target) == 36
    assert read(target / "preprocessor_config.json")["max_pixels"] == 28224
    assert "image_processor" not in (
        read(target / "processor_config.json") if (target / "processor_config.json").is_file() else {}
    )


def test_nested_settings_reach_a_checkpoint_that_has_a_processor_but_no_image_processor(copy, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(copy, base)
    as_stock_5x_writes(base)
    (copy / "preprocessor_config.json").unlink()
    change(copy / "processor_config.json", query_prefix="Query: ")
    target = tmp_path / "target"
    target.mkdir()
    assert not bring_companions(target, [copy, base]).missing
    assert tokens_of_a_picture(target) == 36
    assert VilavtProcessor.from_pretrained(target).query_prefix == "Query: "


def test_a_tokenizer_comes_whole_from_one_folder(copy, tmp_path):
    """5.x writes no special_tokens_map.json, and 4.57 would read the base model's beside the checkpoint's tokenizer."""
    base = tmp_path / "base"
    shutil.copytree(copy, base)
    (base / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    change(base / "tokenizer_config.json", eos_token="<|endoftext|>")
    (base / "chat_template.jinja").write_text("another")
    target = tmp_path / "target"
    target.mkdir()
    bring_companions(target, [copy, base])
    assert VilavtProcessor.from_pretrained(target).tokenizer.eos_token == "<|im_end|>"
    assert not (target / "special_tokens_map.json").exists()
    assert "another" not in (target / "chat_template.jinja").read_text(encoding="utf-8")


def test_a_chat_template_inside_the_tokenizers_settings_is_not_replaced(copy, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(copy, base)
    (base / "chat_template.jinja").write_text("another")
    template = (copy / "chat_template.jinja").read_text(encoding="utf-8")
    (copy / "chat_template.jinja").unlink()
    change(copy / "tokenizer_config.json", chat_template=template)
    target = tmp_path / "target"
    target.mkdir()
    assert not bring_companions(target, [copy, base]).missing
    assert VilavtProcessor.from_pretrained(target).tokenizer.chat_template == template


def test_a_chat_template_is_brought_from_the_folder_that_has_one(copy, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(copy, base)
    (copy / "chat_template.jinja").unlink()
    target = tmp_path / "target"
    target.mkdir()
    assert not bring_companions(target, [copy, base]).missing
    assert (target / "chat_template.jinja").is_file()


def test_the_architecture_is_read_from_the_file_by_every_version():
    for config in (VilavtConfig.from_pretrained(TINY), AutoConfig.from_pretrained(TINY)):
        assert config.architectures == ["VilavtForConditionalGeneration"]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("inner", [None, False, True])
def test_tied_embeddings_are_what_the_top_level_says(copy, tied, inner):
    config = read(copy / "config.json")
    config["tie_word_embeddings"] = tied
    config["text_config"].pop("tie_word_embeddings", None)
    if inner is not None:
        config["text_config"]["tie_word_embeddings"] = inner
    (copy / "config.json").write_text(json.dumps(config))
    for found in (VilavtConfig.from_pretrained(copy), AutoConfig.from_pretrained(copy)):
        assert found.tie_word_embeddings is tied
        again = VilavtConfig.from_dict(found.to_dict())
        assert again.tie_word_embeddings is tied
        assert again.architectures == ["VilavtForConditionalGeneration"]
    model = VilavtForConditionalGeneration(VilavtConfig.from_pretrained(copy))
    assert (model.lm_head.weight is model.get_input_embeddings().weight) is tied
