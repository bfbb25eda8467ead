"""Text, images and queries in, tensors out."""

import numpy as np
import pytest
import torch
from family import noise
from transformers import AutoProcessor

from vilavt_core.episode import Inquiry
from vilavt_core.errors import GroupError, PromptError
from vilavt_core.prompts import PromptSet
from vilavt_hf import VilavtProcessor
from vilavt_hf.processing_vilavt import groups_of_prompt

MARKER = "<|vision_start|><|image_pad|><|vision_end|>"


def test_one_placeholder_becomes_one_token_per_merged_patch(processor):
    out = processor(images=noise(0, 112, 84), text=f"look {MARKER} now", queries=["what?"])
    assert (out["input_ids"] == processor.image_token_id).sum() == 4 * 3
    assert out["image_grid_thw"].tolist() == [[1, 6, 8]]
    assert out["pixel_values"].shape == (48, 1176)
    assert out["images_per_query"].tolist() == [1]


def test_images_are_normalised_patch_by_patch_in_merge_order(processor):
    image = noise(0, 56, 84)
    rows = processor(images=image, text=MARKER)["pixel_values"]
    mean, std = (
        torch.tensor(x)[:, None, None]
        for x in ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
    )
    raw = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
    pixels = (raw - mean) / std
    patch = pixels[:, 14:28, 0:14]  # second row, first column: third in merge order (0,0) (0,1) (1,0) (1,1)
    expected = patch[:, None].expand(3, 2, 14, 14).flatten()
    torch.testing.assert_close(rows[2], expected, rtol=0, atol=1e-5)


def test_a_batch_concatenates_images_and_queries_sample_by_sample(processor):
    out = processor(
        images=[[noise(0, 56, 56)], [noise(0, 56, 84), noise(0, 84, 56), noise(0, 56, 56)]],
        text=[f"a {MARKER}", f"{MARKER} b {MARKER}{MARKER}"],
        queries=[[""], ["", "both"]],
        images_per_query=[[1], [1, 2]],
    )
    assert out["images_per_query"].tolist() == [1, 1, 2]
    assert out["query_attention_mask"].sum(1).tolist() == [0, 0, 5]
    assert out["image_grid_thw"].tolist() == [[1, 4, 4], [1, 6, 4], [1, 4, 6], [1, 4, 4]]
    assert out["input_ids"].shape == out["attention_mask"].shape


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"text": "no marker"}, "sample 0: 0 <|image_pad|> placeholders in the text, 2 images"),
        ({"text": MARKER * 3}, "3 <|image_pad|> placeholders"),
        ({"queries": ["a"], "images_per_query": [1]}, "sample 0: 1 queries, images_per_query=[1] (sum 1), 2 images"),
        ({"queries": ["a", "b", "c"]}, "3 queries"),
        ({"queries": None, "images_per_query": [2]}, "needs queries"),
        ({"text": [MARKER, MARKER]}, "one flat list of 2 images for 2 prompts"),
        ({"videos": [1]}, "frames as images"),
        ({"images": None, "text": "t"}, "no images"),
    ],
)
def test_what_does_not_add_up_is_refused_with_both_numbers(processor, changes, says):
    given = {"images": [noise(0, 56, 56), noise(0, 56, 84)], "text": MARKER * 2, "queries": ["a", "b"]} | changes
    with pytest.raises(GroupError) as error:
        processor(**given)
    assert says in str(error.value)


def test_text_only_input_needs_no_images(processor):
    out = processor(text=["a", "longer"])
    assert set(out) == {"input_ids", "attention_mask"}


def test_a_query_row_ends_with_the_end_token_and_is_right_padded(processor, tokenizer):
    ids, mask = processor.tokenize_queries(["red card"])
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    assert ids.shape == (1, 50)
    assert ids[0, :9].tolist() == [*tokenizer.encode("red card", add_special_tokens=False), end]
    assert mask[0].tolist() == [1] * 9 + [0] * 41
    assert (ids[0, 9:] == end).all()


def test_a_long_query_is_cut_to_fifty_tokens_with_its_end(processor, tokenizer):
    ids, mask = processor.tokenize_queries(["x" * 200])
    assert mask.sum() == 50
    assert ids[0, -1] == tokenizer.convert_tokens_to_ids("<|endoftext|>")


def test_an_empty_query_is_masked_and_a_blank_one_is_not(processor):
    _, mask = processor.tokenize_queries(["", " "])
    assert mask.sum(1).tolist() == [0, 2]


def test_the_prefix_goes_before_non_blank_queries_only(processor):
    plain, _ = processor.tokenize_queries(["", "cat"], padding="longest")
    prefixed, mask = processor.tokenize_queries(["", "cat"], prefix="Query: ", padding="longest")
    assert plain.shape[1] == 4
    assert mask.sum(1).tolist() == [0, len("Query: cat") + 1]
    assert prefixed.shape[1] == len("Query: cat") + 1


def test_special_tokens_in_a_query_stay_text(processor):
    ids, mask = processor.tokenize_queries(["<|image_pad|>"])
    assert processor.image_token_id not in ids[0][mask[0].bool()][:-1]
    assert mask.sum() == len("<|image_pad|>") + 1


def test_without_a_query_tokenizer_the_remedy_is_named(processor, tokenizer):
    bare = VilavtProcessor(processor.image_processor, tokenizer)
    with pytest.raises(PromptError, match="vilavt convert"):
        bare.tokenize_queries(["a"])


def test_inquiries_become_the_inputs_of_the_encoder(processor, tiny_model):
    inquiries = [
        Inquiry(images=(noise(0, 56, 84),), query="", image_indices=(0,)),
        Inquiry(images=(noise(0, 56, 56), noise(0, 84, 56)), query="same?", image_indices=(1, 2)),
    ]
    inputs = processor.encode_inquiries(inquiries)
    assert inputs["images_per_query"].tolist() == [1, 2]
    assert inputs["query_ids"].shape == (2, 6)
    with torch.no_grad():
        tiny_model.model.get_image_features(**inputs)


def test_an_image_the_encoder_would_have_to_resize_is_refused(processor):
    with pytest.raises(GroupError, match=r"inquiry 0, image 0: 57x56 pixels"):
        processor.encode_inquiries([Inquiry(images=(noise(0, 57, 56),), query="", image_indices=(0,))])


def test_groups_are_read_off_a_rendered_conversation():
    call = '<think>t</think><tool>{"region":[{"index":0,"bbox_2d":[0,0,28,28]}],"query":"which?"}</tool>'
    text = (
        f"<|im_start|>system\nzoom<|im_end|>\n<|im_start|>user\n{MARKER}{MARKER}q<|im_end|>\n"
        f"<|im_start|>assistant\n{call}<|im_end|>\n<|im_start|>user\n<tool_response>{MARKER}x{MARKER}</tool_response>"
        f"<|im_end|>\n<|im_start|>assistant\n<answer>1</answer><|im_end|>\n<|im_start|>user\n{MARKER}<|im_end|>\n"
    )
    assert groups_of_prompt(text) == [("", 1), ("", 1), ("which?", 2), ("", 1)]


@torch.no_grad()
def test_a_chat_template_call_encodes_what_an_explicit_call_does(processor, tiny_model):
    call = '<think>t</think><tool>{"region":[{"index":0,"bbox_2d":[0,0,28,28]}],"query":"which?"}</tool>'
    images = [noise(0, 84, 84), noise(1, 56, 56), noise(2, 56, 84)]
    messages = [
        {"role": "user", "content": [{"type": "image", "image": images[0]}, {"type": "text", "text": "what?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": call}]},
        {"role": "user", "content": [{"type": "image", "image": image} for image in images[1:]]},
    ]
    implicit = processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    explicit = processor(images=images, text=text, queries=["", "which?"], images_per_query=[1, 2])
    assert implicit["images_per_query"].tolist() == [1, 2]
    assert implicit["query_ids"].tolist() == explicit["query_ids"].tolist()
    torch.testing.assert_close(tiny_model(**implicit).logits, tiny_model(**explicit).logits, rtol=0, atol=1e-5)


def test_a_processor_round_trip_keeps_tokenizers_prompts_and_settings(processor, tokenizer, tmp_path):
    prompts = PromptSet.load("default")
    original = VilavtProcessor(
        processor.image_processor,
        tokenizer,
        query_tokenizer=tokenizer,
        prompts=prompts,
        query_prefix="Query: ",
        max_query_length=20,
    )
    original.save_pretrained(tmp_path)
    for again in (VilavtProcessor.from_pretrained(tmp_path), VilavtProcessor.from_pretrained(str(tmp_path))):
        assert again.prompts.sha256 == prompts.sha256
        assert again.query_prefix == "Query: "
        assert again.max_query_length == 20
        assert again.chat_template == tokenizer.chat_template
        assert again.query_tokenizer.encode("abc") == tokenizer.encode("abc")
        assert again.image_processor.to_dict()["size"] == processor.image_processor.to_dict()["size"]


def test_the_auto_class_finds_the_processor(tiny_checkpoint):
    processor = AutoProcessor.from_pretrained(tiny_checkpoint)
    assert isinstance(processor, VilavtProcessor)
    assert processor.prompts is None
