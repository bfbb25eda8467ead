"""Text, images and queries in, tensors out."""

import base64
import copy
import io
import pickle

import numpy as np
import pytest
import torch
from family import noise
from transformers import AutoProcessor

from vilavt_core.episode import Inquiry
from vilavt_core.errors import GroupError, ImageError, ProcessorError, PromptError
from vilavt_core.prompts import PromptSet
from vilavt_hf import VilavtProcessor, compat
from vilavt_hf.pixels import PixelScale, patches_of
from vilavt_hf.processing_vilavt import groups_of_prompt

MARKER = "<|vision_start|><|image_pad|><|vision_end|>"


def test_one_placeholder_becomes_one_token_per_merged_patch(processor):
    out = processor(images=noise(0, 112, 84), text=f"look {MARKER} now", queries=["what?"], return_tensors="pt")
    assert (out["input_ids"] == processor.image_token_id).sum() == 4 * 3
    assert out["image_grid_thw"].tolist() == [[1, 6, 8]]
    assert out["pixel_values"].shape == (48, 1176)
    assert out["images_per_query"].tolist() == [1]


def test_images_are_normalised_patch_by_patch_in_merge_order(processor):
    image = noise(0, 56, 84)
    rows = processor(images=image, text=MARKER, return_tensors="pt")["pixel_values"]
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
        padding=True,
        return_tensors="pt",
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
        (
            {"text": [MARKER, MARKER * 2]},
            "flat list of 2 images for 2 prompts with 3 <|image_pad|> placeholders (1, 2)",
        ),
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


SCALINGS = [
    {},
    {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.9, 0.5, 0.7]},
    {"do_normalize": False},
    {"do_rescale": False, "do_normalize": False},
    {"rescale_factor": 1 / 127.5, "resample": 2},
]
"""Settings of an image processor that change what it makes of a byte."""


def image_processor_with(processor, settings):
    settings = {**processor.image_processor.to_dict(), **settings}
    return type(processor.image_processor)(**{k: v for k, v in settings.items() if v is not None})


@pytest.mark.parametrize("settings", SCALINGS)
def test_pixels_are_those_of_the_image_processor_to_the_bit_whatever_its_settings(processor, settings):
    image_processor = image_processor_with(processor, settings)
    bounds = 28 * 28 * 4, 28 * 28 * 64
    if compat.TAKES_MM_TOKEN_TYPE_IDS:
        image_processor.size = {"shortest_edge": bounds[0], "longest_edge": bounds[1]}
    else:
        image_processor.min_pixels, image_processor.max_pixels = bounds
    for image in (noise(1, 84, 112), noise(2, 29, 30), noise(3, 700, 300)):
        expected = image_processor(images=[image], return_tensors="pt")
        pixels, grid = patches_of(image, image_processor, bounds)
        assert [list(grid)] == expected["image_grid_thw"].tolist()
        scaled = PixelScale(image_processor, torch.float32)(torch.from_numpy(pixels))
        assert torch.equal(scaled, expected["pixel_values"])


@pytest.mark.parametrize("settings", SCALINGS)
def test_inquiries_are_encoded_as_the_image_processor_would_to_the_bit(processor, settings):
    processor = copy.copy(processor)
    processor.image_processor = image_processor_with(processor, settings)
    images = [noise(0, 56, 84), noise(1, 84, 56).convert("L"), noise(2, 112, 112)]
    inquiries = [Inquiry(tuple(images[:1]), "", (0,)), Inquiry(tuple(images[1:]), "same?", (1, 2))]
    expected = processor.image_processor(
        images=[image.convert("RGB") for image in images], return_tensors="pt", do_resize=False
    )
    inputs = processor.encode_inquiries(inquiries)
    assert torch.equal(inputs["pixel_values"], expected["pixel_values"].float())  # 4.57 gives bytes if nothing scales
    assert torch.equal(inputs["image_grid_thw"], expected["image_grid_thw"])


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
    explicit = processor(images=images, text=text, queries=["", "which?"], images_per_query=[1, 2], return_tensors="pt")
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


@pytest.fixture(scope="module")
def stock(processor, tokenizer):
    """The stock image processor and tokenizer of `processor`, as a stock processor would call them."""
    return processor.image_processor, tokenizer


@pytest.mark.parametrize(
    "given",
    [
        {"max_pixels": 28 * 28 * 9},
        {"min_pixels": 28 * 28 * 200},
        {"min_pixels": 28 * 28 * 8, "max_pixels": 28 * 28 * 12},
        {"size": {"shortest_edge": 28 * 28 * 4, "longest_edge": 28 * 28 * 9}},
        {"do_resize": False},
        {"do_rescale": False},
        {"do_normalize": False, "rescale_factor": 0.5},
        {"image_mean": [0.0] * 3, "image_std": [2.0] * 3},
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_settings_of_images_reach_the_image_processor(processor, stock, given, nested):
    image = noise(0, 112, 280)
    size = dict(stock[0].size) | {
        edge: given[name]
        for name, edge in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge"))
        if name in given
    }
    bounds = {} if "size" in given else {"size": size}
    others = {name: value for name, value in given.items() if name not in ("min_pixels", "max_pixels")}
    expected = stock[0](images=[image], return_tensors="pt", **bounds, **others)
    settings = {"images_kwargs": given} if nested else given
    out = processor(images=image, text=MARKER, return_tensors="pt", **settings)
    assert torch.equal(out["image_grid_thw"], expected["image_grid_thw"])
    assert torch.equal(out["pixel_values"], expected["pixel_values"])
    assert (out["input_ids"] == processor.image_token_id).sum() == out["image_grid_thw"].prod() // 4


@pytest.mark.parametrize(
    "given",
    [
        {"padding": True},
        {"padding": "max_length", "max_length": 60},
        {"padding": True, "padding_side": "left", "pad_to_multiple_of": 16},
        {"truncation": True, "max_length": 4},
        {"add_special_tokens": False},
        {"return_attention_mask": False},
        {"return_token_type_ids": True},
        {"return_special_tokens_mask": True, "return_length": True},
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_settings_of_text_reach_the_tokenizer(processor, stock, given, nested):
    texts = ["short", "a longer prompt"]
    settings = {"text_kwargs": given} if nested else given
    expected = stock[1](texts, **{"return_token_type_ids": False, **given})
    assert dict(processor(text=texts, **settings)) == dict(expected)


def test_without_settings_nothing_is_padded_and_no_tensor_is_made(processor, stock):
    out = processor(text=["short", "a longer prompt"])
    assert [len(ids) for ids in out["input_ids"]] == [5, 15]
    out = processor(images=noise(0, 56, 56), text=MARKER)
    assert isinstance(out["input_ids"], list)
    assert all(isinstance(out[name], np.ndarray) for name in ("pixel_values", "image_grid_thw", "query_ids"))
    for kind, container in (("np", np.ndarray), ("pt", torch.Tensor)):
        for settings in (
            {"return_tensors": kind},
            {"common_kwargs": {"return_tensors": kind}},
            {"text_kwargs": {"return_tensors": kind}},
        ):
            found = processor(images=noise(0, 56, 56), text=MARKER, **settings)
            assert all(isinstance(value, container) for value in found.values()), settings


def test_what_the_tokenizer_was_made_with_is_its_default(processor, tokenizer):
    own = copy.deepcopy(tokenizer)
    own.init_kwargs |= {"padding": "max_length", "max_length": 60}
    ours = VilavtProcessor(processor.image_processor, own, query_tokenizer=tokenizer)
    assert len(ours(text="short")["input_ids"][0]) == 60
    assert len(ours(text="short", max_length=70)["input_ids"][0]) == 70


@pytest.mark.parametrize(
    "given, says",
    [
        ({"max_pixel": 784}, "does not support max_pixel; did you mean max_pixels?"),
        ({"images_kwargs": {"do_resise": False}}, "images_kwargs: the processor does not support do_resise"),
        ({"text_kwargs": {"max_pixels": 784}}, "text_kwargs: the processor does not support max_pixels"),
        ({"common_kwargs": {"colour": "red"}}, "common_kwargs: the processor does not support colour"),
        ({"crop_size": {"height": 9}}, "does not support crop_size"),
        ({"fps": 2}, "does not support fps"),
        ({"videos_kwargs": {"fps": 2}}, "videos_kwargs: ViLaVT takes neither videos nor audio"),
        ({"audio_kwargs": {"sampling_rate": 1}}, "audio_kwargs: ViLaVT takes neither"),
        ({"text_kwargs": True}, "text_kwargs is a bool"),
        ({"padding": True, "text_kwargs": {"padding": False}}, "padding was passed two times: in text_kwargs and as"),
        ({"do_resize": True, "images_kwargs": {"do_resize": True}}, "do_resize was passed two times"),
        ({"max_pixels": 784, "size": {"shortest_edge": 1, "longest_edge": 2}}, "in two ways; leave one out"),
        ({"size": {"height": 28, "width": 28}}, "size={'height': 28, 'width': 28} must be {'shortest_edge'"),
        ({"min_pixels": 7840000}, "at least 7840000 and at most 200704 pixels"),
        ({"max_pixels": 0}, "max_pixels=0 must be a number of pixels"),
        ({"merge_size": 4}, "merge_size=4: the model's is 2, and no other"),
        ({"images_kwargs": {"patch_size": 16}}, "patch_size=16: the model's is 14"),
        ({"temporal_patch_size": 1}, "temporal_patch_size=1: the model's is 2"),
        ({"images": noise(0, 57, 56), "do_resize": False}, "image 0: 57x56 pixels, with do_resize=False"),
        ({"text": [MARKER, "a longer prompt"], "return_tensors": "pt"}, "are no tensor; pass padding=True"),
        ({"text": None, "images": None}, "there is neither text nor images"),
        ({"text": 3}, "the text is a int"),
        ({"text": [MARKER, 3]}, "sample 1: the text is a int"),
    ],
)
def test_what_would_have_no_effect_is_refused_by_name(processor, given, says):
    with pytest.raises(ProcessorError) as error:
        processor(**{"images": noise(0, 56, 56), "text": MARKER, **given})
    assert says in str(error.value)


@pytest.mark.parametrize("settings", [{"truncation": True, "max_length": 10}, {"truncation": "longest_first"}])
def test_truncation_that_would_cut_an_image_is_refused(processor, tokenizer, monkeypatch, settings):
    monkeypatch.setattr(tokenizer, "model_max_length", 12)
    image = noise(0, 112, 112)
    with pytest.raises(ProcessorError, match=r"sample 1: its images take 16 tokens, [0-9]+ are left"):
        processor(images=[image], text=["no image", f"look {MARKER}"], padding=True, **settings)
    kept = processor(images=[image], text=f"{MARKER} a long tail of words", truncation=True, max_length=20)
    assert len(kept["input_ids"][0]) == 20


def test_one_flat_list_is_shared_out_by_the_placeholders(processor):
    images = [noise(i, 56, 28 * (2 + i)) for i in range(3)]
    texts = [f"a {MARKER}", "none", MARKER * 2]
    flat = processor(images=images, text=texts, padding=True, return_tensors="pt")
    nested = processor(images=[images[:1], [], images[1:]], text=texts, padding=True, return_tensors="pt")
    assert all(torch.equal(flat[name], nested[name]) for name in nested)


@pytest.mark.parametrize("form", ["path", "text", "bytes", "row", "file", "array", "tensor", "tensor 0-1", "data URL"])
def test_pictures_in_every_form_give_the_same_pixels(processor, tmp_path, form):
    image = noise(0, 56, 84)
    path = tmp_path / "a.png"
    image.save(path)
    tensor = torch.from_numpy(np.array(image))
    data = path.read_bytes()
    source = {
        "path": path,
        "text": str(path),
        "bytes": data,
        "row": {"bytes": data, "path": None},
        "file": io.BytesIO(data),
        "array": np.array(image),
        "tensor": tensor.permute(2, 0, 1),
        "tensor 0-1": tensor.permute(2, 0, 1) / 255,
        "data URL": "data:image/png;base64," + base64.b64encode(data).decode(),
    }[form]
    expected = processor(images=image, text=MARKER)["pixel_values"]
    for images in (source, [source], [[source]]):
        assert np.array_equal(processor(images=images, text=MARKER)["pixel_values"], expected)


def test_a_picture_that_cannot_be_used_is_named(processor):
    with pytest.raises(ImageError, match="image 1: cannot load a int"):
        processor(images=[noise(0, 56, 56), 3], text=MARKER * 2)


def test_pixels_that_are_ready_are_taken_as_they_are(processor):
    ready = np.array(noise(0, 56, 56)) / 255
    out = processor(images=ready, text=MARKER, do_rescale=False)["pixel_values"]
    expected = processor(images=noise(0, 56, 56), text=MARKER)["pixel_values"]
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-5)


def test_token_types_and_places_of_images_are_given_when_asked_for(processor):
    images = [noise(0, 56, 56), noise(1, 56, 84)]
    text = f"a{MARKER}b{MARKER}"
    out = processor(
        images=images,
        text=text,
        return_mm_token_type_ids=True,
        return_text_replacement_offsets=True,
        return_tensors="pt",
    )
    assert torch.equal(out["mm_token_type_ids"], (out["input_ids"] == processor.image_token_id).long())
    pad = processor.image_token
    expanded = text.replace(pad, pad * 4, 1)[::-1].replace(pad[::-1], (pad * 6)[::-1], 1)[::-1]
    assert [expanded[slice(*place["new_span"])] for place in out["text_replacement_offsets"][0]] == [pad * 4, pad * 6]
    assert [text[slice(*place["span"])] for place in out["text_replacement_offsets"][0]] == [pad, pad]


def messages_about(image):
    return [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "what?"}]}]


@pytest.mark.parametrize("nested", [False, True])
def test_a_chat_template_hands_settings_to_the_processor(processor, nested):
    settings = {"max_pixels": 28 * 28 * 9, "padding": "max_length", "max_length": 60, "return_tensors": "pt"}
    chat = {"processor_kwargs": settings} if nested else settings
    for image in (noise(0, 280, 280), np.array(noise(0, 280, 280))):
        out = processor.apply_chat_template(messages_about(image), tokenize=True, return_dict=True, **chat)
        text = processor.apply_chat_template(messages_about(image), tokenize=False)
        expected = processor(images=noise(0, 280, 280), text=text, **settings)
        assert set(out) == set(expected)
        assert all(torch.equal(out[name], expected[name]) for name in expected)


def test_a_chat_template_encodes_a_batch(processor):
    batch = [messages_about(noise(0, 56, 56)), messages_about(noise(1, 84, 56))]
    out = processor.apply_chat_template(batch, tokenize=True, return_dict=True, padding=True, return_tensors="pt")
    assert out["image_grid_thw"].tolist() == [[1, 4, 4], [1, 4, 6]]
    assert (
        processor.apply_chat_template(batch, tokenize=True)[0]
        == processor.apply_chat_template(batch[0], tokenize=True)[0]
    )


def test_variables_of_a_chat_template_reach_it(processor):
    template = "{% for m in messages %}{{ tone }}<|image_pad|>{% endfor %}"
    out = processor.apply_chat_template(messages_about(noise(0, 56, 56)), template, tone="calm", tokenize=True)
    assert processor.tokenizer.decode(out[0]).startswith("calm")


@pytest.mark.parametrize(
    "given, says",
    [
        ({"add_generation_promt": True}, "does not support add_generation_promt"),
        ({"max_pixels": 784}, "max_pixels is for the processor's call, which tokenize=False leaves out"),
        ({"processor_kwargs": {"padding": True}}, "padding is for the processor's call"),
        ({"tokenize": True, "max_pixel": 784}, "did you mean max_pixels?"),
        ({"tokenize": True, "padding": True, "processor_kwargs": {"padding": True}}, "padding was passed two times"),
        ({"documents": [{"title": "t", "text": "x"}]}, "the chat template does not use documents"),
        ({"tokenize": True, "load_audio_from_video": True}, "does not use load_audio_from_video"),
    ],
)
def test_a_chat_template_refuses_what_nobody_heeds(processor, given, says):
    with pytest.raises(ProcessorError) as error:
        processor.apply_chat_template(messages_about(noise(0, 56, 56)), **given)
    assert says in str(error.value)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_a_processor_can_be_copied_and_sent_to_another_process(processor, tokenizer, again):
    original = VilavtProcessor(
        processor.image_processor, tokenizer, query_tokenizer=tokenizer, prompts=PromptSet.load("default")
    )
    twin = again(original)
    assert twin.prompts.sha256 == original.prompts.sha256
    given = {"images": noise(0, 56, 56), "text": MARKER, "queries": ["what?"], "return_tensors": "pt"}
    expected, found = original(**given), twin(**given)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    "given", [{"max_pixels": 28 * 28 * 9}, {"size": {"shortest_edge": 28 * 28 * 4, "longest_edge": 28 * 28 * 9}}]
)
def test_a_processor_is_loaded_with_other_bounds(tiny_checkpoint, given):
    for kind in (VilavtProcessor, AutoProcessor):
        loaded = kind.from_pretrained(tiny_checkpoint, **given)
        assert loaded.image_processor.size["longest_edge"] == 28 * 28 * 9
        assert loaded.image_processor.size["shortest_edge"] == 28 * 28 * 4
        assert loaded(images=noise(0, 280, 280), text=MARKER)["image_grid_thw"].prod() == 36
        assert loaded.tokenizer.init_kwargs.get("max_pixels") is None


def test_a_misspelt_argument_of_from_pretrained_is_named(tiny_checkpoint):
    with pytest.raises(ProcessorError, match=r"does not know max_pixel; did you mean max_pixels\?"):
        VilavtProcessor.from_pretrained(tiny_checkpoint, max_pixel=784)


def test_parts_given_to_from_pretrained_replace_the_checkpoint_s(tiny_checkpoint, processor, tokenizer):
    image_processor = copy.deepcopy(processor.image_processor)
    loaded = VilavtProcessor.from_pretrained(tiny_checkpoint, image_processor=image_processor, tokenizer=tokenizer)
    assert loaded.image_processor is image_processor
    assert loaded.tokenizer is tokenizer


def test_what_the_assistant_said_is_masked_when_asked_for(processor):
    template = (
        "{% for m in messages %}{% for part in m.content %}{% if part.type == 'image' %}<|image_pad|>"
        "{% elif m.role == 'assistant' %}{% generation %}{{ part.text }}{% endgeneration %}"
        "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endfor %}"
    )
    said = {"role": "assistant", "content": [{"type": "text", "text": "red"}]}
    for asked in ([{"role": "user", "content": [{"type": "text", "text": "what?"}]}], messages_about(noise(0, 56, 56))):
        if asked[0]["content"][0]["type"] == "image" and not compat.MASKS_COUNT_IMAGES:
            with pytest.raises(ProcessorError, match="does not count the tokens of images"):
                processor.apply_chat_template(
                    [*asked, said], template, tokenize=True, return_assistant_tokens_mask=True
                )
            continue
        out = processor.apply_chat_template(
            [*asked, said], template, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        ids, mask = out["input_ids"][0], out["assistant_masks"][0]
        assert processor.tokenizer.decode([t for t, m in zip(ids, mask, strict=True) if m]) == "red"
