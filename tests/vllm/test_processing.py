"""The multimodal processor alone: items, identities, places, caches. No engine."""

import pytest
import torch

from vilavt_core.conversation import Inquiry
from vilavt_core.errors import ImageError
from vilavt_hf.pixels import PixelScale
from vilavt_vllm import InquiryItem, compat
from vilavt_vllm.errors import LimitError, PlaceholderError, UnsupportedError


def build(path, **options):
    from vllm.config import ModelConfig
    from vllm.multimodal import MULTIMODAL_REGISTRY
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    options.setdefault("limit_mm_per_prompt", {"image": 16})
    config = ModelConfig(model=str(path), tokenizer=str(path), dtype="float32", seed=0, max_model_len=4096, **options)
    return MULTIMODAL_REGISTRY.create_processor(config), config


@pytest.fixture(scope="module")
def processor(tiny):
    return build(tiny.path)[0]


@pytest.fixture(scope="module")
def process(processor):
    from vllm.multimodal.processing import ProcessorInputs, TimingContext

    def run(prompt, images, *, using=processor, cache=None, uuids=None, **kwargs):
        ids = using.info.get_tokenizer().encode(prompt, add_special_tokens=False) if isinstance(prompt, str) else prompt
        items = using.info.parse_mm_data({"image": images})
        inputs = ProcessorInputs(ids, items, {"image": uuids} if uuids else None, hf_processor_mm_kwargs=kwargs)
        if hasattr(inputs, "cache"):
            inputs.cache = cache
        else:  # before 0.31 it is the processor's
            using.cache = cache
        return using.apply(inputs, TimingContext(enabled=False))

    return run


@pytest.fixture
def two_regions(tools, pictures):
    return tools.conversation(("red", 2)), pictures[:3]


def hashes(result):
    return result["mm_hashes"]["image"]


def test_one_item_is_one_inquiry_and_carries_all_its_regions(process, two_regions):
    result = process(*two_regions)
    original, group = result["mm_kwargs"]["image"]
    assert original["image_grid_thw"].data.shape == (1, 3)
    assert group["image_grid_thw"].data.shape == (2, 3)
    assert group["pixels"].data.shape == (int(group["image_grid_thw"].data.prod(-1).sum()), 3 * 14 * 14)
    assert group["pixels"].data.dtype == torch.uint8
    assert int(original["query_attention_mask"].data.sum()) == 0
    assert int(group["query_attention_mask"].data.sum()) == len("red") + 1  # byte tokens and the end token


def test_encoder_inputs_equal_those_of_the_transformers_processor(process, tiny, two_regions):
    prompt, images = two_regions
    expected = tiny.processor(text=prompt, images=images, return_tensors="pt")
    result = process(prompt, images)
    items = result["mm_kwargs"]["image"]
    assert result["prompt_token_ids"] == expected["input_ids"][0].tolist()
    assert torch.equal(torch.cat([item["image_grid_thw"].data for item in items]), expected["image_grid_thw"])
    pixels = torch.cat([item["pixels"].data for item in items])
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        scaled = PixelScale(tiny.processor.image_processor, dtype)(pixels)
        assert torch.equal(scaled, expected["pixel_values"].to(dtype))
    for name in ("query_ids", "query_attention_mask", "images_per_query"):
        assert torch.equal(torch.stack([item[name].data for item in items]), expected[name])


def test_the_place_of_an_inquiry_spans_its_regions_and_only_placeholders_take_features(process, processor, two_regions):
    result = process(*two_regions)
    pad = processor.info.get_hf_config().image_token_id
    ids = torch.tensor(result["prompt_token_ids"])
    places = result["mm_placeholders"]["image"]
    grids = [item["image_grid_thw"].data for item in result["mm_kwargs"]["image"]]
    assert len(places) == 2
    for place, grid in zip(places, grids, strict=True):
        inside = ids[place.offset : place.offset + place.length]
        assert torch.equal(place.is_embed, inside == pad)
        assert inside[0] == pad == inside[-1]
        assert place.get_num_embeds() == int(grid.prod(-1).sum()) // 4
    assert (~places[1].is_embed).any()  # the text between the regions


def test_cached_and_fresh_processing_agree(process, tiny, two_regions):
    from vllm.multimodal.cache import MultiModalProcessorOnlyCache

    processor, config = build(tiny.path)
    cache = MultiModalProcessorOnlyCache(config)
    fresh, first, second = (process(*two_regions, using=processor, cache=c) for c in (None, cache, cache))
    for name in ("prompt_token_ids", "mm_hashes", "mm_placeholders", "mm_kwargs"):
        assert fresh[name] == first[name] == second[name], name


def test_a_turn_processes_only_its_new_inquiry(process, tiny, tools, pictures, monkeypatch):
    from vllm.multimodal.cache import MultiModalProcessorOnlyCache

    processor, config = build(tiny.path)
    cache = MultiModalProcessorOnlyCache(config)
    seen = []
    original = processor._encode
    monkeypatch.setattr(
        processor,
        "_encode",
        lambda inquiries, settings: (seen.append([i.query for i in inquiries]), original(inquiries, settings))[1],
    )
    turns = [("a", 1), ("b", 2), ("c", 1)]
    for n in range(4):
        process(
            tools.conversation(*turns[:n]), pictures[: 1 + sum(k for _, k in turns[:n])], using=processor, cache=cache
        )
    assert seen == [[""], ["a"], ["b"], ["c"]]


def test_identity_of_an_inquiry_is_its_query_and_its_regions_in_order(process, tools, pictures):
    first, a, b, c = pictures[:4]
    ours = hashes(process(tools.conversation(("red", 2)), [first, a, b]))
    other_query = hashes(process(tools.conversation(("blue", 2)), [first, a, b]))
    other_order = hashes(process(tools.conversation(("red", 2)), [first, b, a]))
    other_region = hashes(process(tools.conversation(("red", 2)), [first, a, c]))
    again = hashes(process(tools.conversation(("red", 2)), [first.copy(), a.copy(), b.copy()]))
    assert again == ours
    assert {ours[0]} == {h[0] for h in (other_query, other_order, other_region)}
    assert len({ours[1], other_query[1], other_order[1], other_region[1]}) == 4


def test_an_image_of_an_episode_that_would_be_resized_is_refused_with_both_sizes(process, processor, pictures):
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    large = pictures[0].resize((28 * 20, 28 * 20))
    with pytest.raises(PlaceholderError, match=r"an image of 560x560 pixels would become .* here, where images have"):
        process(image, [Inquiry((large,), "", (0,))])  # an episode's
    assert hashes(process(image, [InquiryItem((large,))]))  # nobody has counted its tokens


def test_one_group_and_the_same_regions_alone_are_different(process, tools, pictures):
    prompt, (first, a, b) = tools.conversation(("red", 2)), pictures[:3]
    together = hashes(process(prompt, [InquiryItem((first,)), InquiryItem((a, b), "red")]))
    apart = hashes(process(prompt, [InquiryItem((first,)), InquiryItem((a,), "red"), InquiryItem((b,), "red")]))
    assert len({*together, *apart}) == 4  # the original is the same in both


def test_a_uuid_does_not_hide_the_query(process, tools, pictures):
    images, uuids = pictures[:2], ["first", "crop"]
    red, blue = (hashes(process(tools.conversation((q, 1)), images, uuids=uuids)) for q in ("red", "blue"))
    assert red[0] == blue[0]
    assert red[1] != blue[1]


def test_a_uuid_of_an_explicit_inquiry_does_not_hide_the_query(process, tools, pictures):
    prompt = tools.conversation(("red", 1))
    red, blue = (
        hashes(process(prompt, [InquiryItem((pictures[0],)), InquiryItem((pictures[1],), q)], uuids=["first", "crop"]))
        for q in ("red", "blue")
    )
    assert red[0] == blue[0]
    assert red[1] != blue[1]


def test_the_query_prefix_is_part_of_the_query(process, processor, tools, pictures):
    prompt = tools.conversation(("red", 1))
    inquiries = [(None, "red"), ("", "red"), ("Query: ", "red"), ("", "Query: red")]
    results = [process(prompt, [InquiryItem((pictures[0],)), InquiryItem((pictures[1],), q, p)]) for p, q in inquiries]
    assert hashes(results[0]) == hashes(results[1])  # the checkpoint's prefix is empty
    assert hashes(results[2]) == hashes(results[3]) != hashes(results[0])
    mask = results[2]["mm_kwargs"]["image"][1]["query_attention_mask"].data
    assert int(mask.sum()) == len("Query: red") + 1


def test_placeholders_and_images_must_agree(process, tools, pictures):
    with pytest.raises(PlaceholderError, match=r"3 <\|image_pad\|> tokens in 3 places, 2 images came with it"):
        process(tools.conversation(("red", 2)), pictures[:2])
    with pytest.raises(PlaceholderError, match="1 images came with it"):
        process(tools.conversation(question="What is <|image_pad|>?"), pictures[:1])


def test_runs_of_another_length_than_the_image_are_refused_by_number(process, processor, tools, pictures):
    good = process(tools.conversation(("red", 1)), pictures[:2])["prompt_token_ids"]
    pad = processor.info.get_hf_config().image_token_id
    last = len(good) - 1 - good[::-1].index(pad)
    with pytest.raises(
        PlaceholderError, match=r"image 1 has 5 placeholder tokens in the prompt but encodes to 6.*max_pixels"
    ):
        process(good[:last] + good[last + 1 :], pictures[:2])


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"hf_overrides": {"vilavt_max_regions": 2}},
            r"inquiry 1 \('red'\) has 3 regions, at most 2.*vilavt_max_regions\": 3",
        ),
        (
            {"hf_overrides": {"vilavt_max_group_pixels": 28 * 28 * 12}},
            r"inquiry 1 .* pixels in 3 regions.*vilavt_max_group_pixels",
        ),
        ({"limit_mm_per_prompt": {"image": 3}}, r"has 4 images, at most 3 .*--limit-mm-per-prompt"),
    ],
    ids=["regions", "pixels", "images"],
)
def test_caps_are_enforced_before_anything_is_encoded(tiny, process, tools, pictures, options, message):
    processor, _ = build(tiny.path, **options)
    processor._encode = None
    with pytest.raises(ValueError, match=message):
        process(tools.conversation(("red", 3)), pictures[:4], using=processor)


def test_the_images_of_inquiries_are_counted_one_by_one(tiny, process, tools, pictures):
    processor, _ = build(tiny.path, limit_mm_per_prompt={"image": 3})
    items = [InquiryItem((pictures[0],)), InquiryItem(tuple(pictures[1:4]), "red")]
    with pytest.raises(
        LimitError, match=r"has 4 images, at most 3 are allowed.*--limit-mm-per-prompt '\{\"image\": 4\}'"
    ):
        process(tools.conversation(("red", 3)), items, using=processor)


def test_the_dummy_for_profiling_is_the_announced_size_and_fills_its_query(tiny):
    for options in ({}, {"hf_overrides": {"vilavt_max_regions": 3, "vilavt_max_group_pixels": 28 * 28 * 100}}):
        processor, config = build(tiny.path, **options)
        result = compat.dummy_inputs(processor, config)
        tokens = result["mm_placeholders"]["image"][0].get_num_embeds()
        announced = processor.info.get_mm_max_tokens_per_item(4096, {"image": 1})["image"]
        assert announced - 16 <= tokens <= announced
        assert int(result["mm_kwargs"]["image"][0]["query_attention_mask"].data.sum()) == 50


def test_pixel_settings_follow_the_server_then_the_request(tiny, process, tools, pictures):
    processor, _ = build(tiny.path, mm_processor_kwargs={"max_pixels": 28 * 28 * 9})
    prompt, images = tools.conversation(), [pictures[3]]
    server = process(prompt, images, using=processor)
    request = process(prompt, images, using=processor, max_pixels=28 * 28 * 5)
    sizes = [int(r["mm_kwargs"]["image"][0]["image_grid_thw"].data.prod()) // 4 for r in (server, request)]
    assert sizes[0] <= 9
    assert sizes[1] <= 5
    assert hashes(server) != hashes(request)
    with pytest.raises(UnsupportedError, match=r"\['fps'\] are not settings of ViLaVT"):
        process(prompt, images, using=processor, fps=2)
    with pytest.raises(UnsupportedError, match="it has shortest_edge and longest_edge"):
        process(prompt, images, using=processor, size={"height": 28, "width": 28})


def test_the_pixels_of_an_episodes_images_are_looked_at_once(processor, process, tools, pictures, monkeypatch):
    prompt, (first, a, b) = tools.conversation(("red", 2)), pictures[:3]
    episode = [Inquiry((first,), "", (0,)), Inquiry((a, b), "red", (1, 2))]
    before = hashes(process(prompt, episode))

    def looks(*_):
        raise AssertionError("the pixels of an image were read again")

    with monkeypatch.context() as patch:
        patch.setattr(type(first), "tobytes", looks)
        items = processor.info.parse_mm_data({"image": episode})["image"]
        told = [items.get_item_for_hash(index) for index in range(2)]
    assert told[1] == {"pixels": list(episode[1].identities), "query": "red"}
    assert hashes(process(prompt, episode)) == before
    # Equal pictures share what is encoded; others, other queries and a caller's own words do not.
    equal = [Inquiry((first.copy(),), "", (0,)), Inquiry((a.copy(), b.copy()), "red", (1, 2))]
    assert hashes(process(prompt, equal)) == before
    swapped = [episode[0], Inquiry((b, a), "red", (1, 2))]
    assert hashes(process(prompt, swapped))[1] != before[1]
    assert (
        hashes(process(tools.conversation(("blue", 2)), [episode[0], Inquiry((a, b), "blue", (1, 2))]))[1] != before[1]
    )
    forged = [episode[0], InquiryItem((b, a), "red", uuids=episode[1].identities)]
    assert hashes(process(prompt, forged))[1] != before[1]


def test_embeddings_in_place_of_images_are_refused(tiny, process, tools):
    processor, _ = build(tiny.path, enable_mm_embeds=True)
    with pytest.raises(UnsupportedError, match="depends on the query"):
        process(tools.conversation(), torch.zeros(1, 12, 128), using=processor)


def test_arrays_are_images_too(process, tools, pictures):
    import numpy as np

    prompt, image = tools.conversation(), pictures[0]
    expected = process(prompt, [image])["mm_kwargs"]["image"][0]["pixels"].data
    pixels = np.asarray(image)
    for array in (pixels, pixels.transpose(2, 0, 1), torch.tensor(pixels), pixels / 255):
        assert torch.equal(process(prompt, [array])["mm_kwargs"]["image"][0]["pixels"].data, expected)
    with pytest.raises(ImageError, match="values from -1 to -1; pixels are 0 to 255"):
        process(prompt, [np.full(pixels.shape, -1.0)])


def test_a_query_tokenizer_that_is_missing_is_named_with_its_remedy(tiny, tmp_path, process, tools, pictures):
    import shutil

    folder = tmp_path / "incomplete"
    shutil.copytree(tiny.path, folder, ignore=shutil.ignore_patterns("query_tokenizer"))
    processor, _ = build(folder)
    with pytest.raises(ValueError, match=r"no query_tokenizer/.*vilavt convert"):
        process(tools.conversation(("red", 1)), pictures[:2], using=processor)


def test_an_inquiry_is_hashed_by_what_it_holds_and_not_by_pickle(process, tools, pictures, monkeypatch):
    """Before 0.31 vLLM pickles an item whose modality has no list of uuids: slow, and another identity every time."""
    from dataclasses import dataclass

    from vllm.multimodal import hasher

    @dataclass
    class Other:  # as a trainer's own class would be
        images: tuple
        query: str

    warned = []
    monkeypatch.setattr(hasher.logger, "warning", lambda *args, **_: warned.append(args))
    prompt, (first, a, b) = tools.conversation(("red", 2)), pictures[:3]
    plain = hashes(process(prompt, [first, a, b]))
    for item in (InquiryItem, Other):
        given = [item((first.copy(),), ""), item((a.copy(), b.copy()), "red")]
        assert hashes(process(prompt, given)) == plain
    assert not warned
