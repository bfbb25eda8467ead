"""From a prompt and its images to encoder inputs: one multimodal item is one inquiry, a query with all its regions.

vLLM hashes, caches, schedules and encodes per item, so the feature of a region can neither outlive its query nor be
computed without the regions beside it. The seam is `BaseMultiModalProcessor.apply`: it receives token ids whatever the
client sent (chat messages, text, tokens), and there the images are regrouped before vLLM hashes anything.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems
from vllm.multimodal.parse import ImageProcessorItems, MultiModalDataItems, MultiModalDataParser, ProcessorBatchItems
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    ProcessorInputs,
    PromptReplacement,
    PromptUpdate,
    PromptUpdateDetails,
    TimingContext,
)
from vllm.multimodal.processing.processor import PlaceholderFeaturesInfo

from vilavt_core.conversation import Inquiry
from vilavt_core.regions import smart_resize
from vilavt_core.sources import array_image, is_array
from vilavt_hf import VilavtConfig, VilavtProcessor
from vilavt_hf.pixels import patches_of

from . import compat
from .errors import LimitError, PlaceholderError, UnsupportedError
from .grouping import ChatTokens, groups_of_tokens, one_placeholder_each
from .limits import EncoderLimits, pixel_bounds

PLACEHOLDER = "<|vision_start|><|image_pad|><|vision_end|>"
"""What stands for one image in a prompt."""

_IMAGE_SETTINGS = ("min_pixels", "max_pixels", "size")


@dataclass(frozen=True, eq=False)
class InquiryItem:
    """Regions encoded together under one query, as an item of ``multi_modal_data["image"]`` (offline API).

    Anything else with ``images`` and ``query`` (and perhaps ``query_prefix``) is accepted in its place, such as the
    `vilavt_core.conversation.Inquiry` of an episode. With explicit inquiries nothing is read off the prompt; its
    placeholders must add up to the images.
    """

    images: tuple[Any, ...]
    """In prompt order; None for an image that vLLM has cached under its uuid."""
    query: str = ""
    """Bare; "" encodes the images without a query."""
    query_prefix: str | None = None
    """Put before a non-blank query; None takes the checkpoint's."""
    uuids: tuple[str | None, ...] = ()
    """Caller's identity of each image, in place of its pixels' hash; the query is hashed with it in any case."""
    identities: tuple[str, ...] = ()
    """Of each image, made of its pixels: found once, where vLLM would hash them at every turn. Never from a client."""
    final: bool = False
    """Whether the images have the size that the encoder must see: then one that would be resized here is refused. The
    images of an episode's inquiries do, and its token stream counts on it."""


class InquiryItems(ProcessorBatchItems[InquiryItem]):
    """The inquiries of one prompt, of modality ``image`` to everything in vLLM."""

    def __init__(self, inquiries: Sequence[InquiryItem]):
        super().__init__(inquiries, "image")

    def get_item_for_hash(self, index: int) -> object:
        """Identity of an inquiry: its images in order, or their uuids, and the query."""
        inquiry = self.data[index]
        if inquiry.identities and not any(inquiry.uuids):
            return {"pixels": list(inquiry.identities), "query": inquiry.query}
        uuids = inquiry.uuids or (None,) * len(inquiry.images)
        images = [uuid if uuid is not None else image for uuid, image in zip(uuids, inquiry.images, strict=True)]
        return {"images": images, "query": inquiry.query}

    def get(self, index: int) -> Any:
        """The inquiry, or None if an image is known by its uuid only: that is how vLLM asks whether there is data."""
        inquiry = self.data[index]
        return None if any(image is None for image in inquiry.images) else inquiry

    def get_processor_data(self) -> Mapping[str, object]:
        """Nothing: `VilavtMultiModalProcessor` encodes the items themselves."""
        return {}


class InquiryParser(MultiModalDataParser):
    """Accepts inquiries beside everything vLLM accepts as images."""

    def _parse_image_data(self, data: Any) -> Any:
        if _is_inquiry(data):
            data = [data]
        if not isinstance(data, (list, tuple)) or not any(map(_is_inquiry, data)):
            return super()._parse_image_data(data)
        return InquiryItems([self._inquiry(item) for item in data])

    def _inquiry(self, item: Any) -> InquiryItem:
        if not _is_inquiry(item):
            item = InquiryItem((item,))
        elif not isinstance(item, InquiryItem):
            known = item.identities if isinstance(item, Inquiry) else ()
            prefix = getattr(item, "query_prefix", None)
            item = InquiryItem(tuple(item.images), item.query, prefix, identities=known, final=True)
        parsed = super()._parse_image_data(list(item.images))
        if not isinstance(parsed, ImageProcessorItems):
            raise UnsupportedError("an InquiryItem takes images, not embeddings: what is encoded depends on its query")
        return replace(item, images=tuple(parsed.data))


def _is_inquiry(item: Any) -> bool:
    return hasattr(item, "images") and isinstance(getattr(item, "query", None), str)


@lru_cache(maxsize=8)
def _load_processor(model: str, revision: str | None) -> VilavtProcessor:
    return VilavtProcessor.from_pretrained(model, revision=revision or "main")


class VilavtProcessingInfo(BaseProcessingInfo):
    """What vLLM asks about the model before it has any data."""

    def get_hf_config(self) -> VilavtConfig:
        """The configuration, read as a ViLaVT's whatever `AutoConfig` made of it."""
        return self._config

    @cached_property
    def _config(self) -> VilavtConfig:
        return compat.config_of(self.ctx.model_config)

    def get_hf_processor(self, **kwargs: object) -> VilavtProcessor:
        """The checkpoint's processor with its PIL backend; settings of a request are applied per call."""
        return _load_processor(self.ctx.model_config.model, self.ctx.model_config.revision)

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        """Any number of images; videos are sent as frames."""
        return {"image": None}

    def validate_num_items(self, modality: str, num_items: int) -> None:
        """The parent's check, with the number that was given and the flag in the message.

        Raises:
            LimitError: more images in one prompt than ``--limit-mm-per-prompt`` allows.
        """
        if modality != "image":
            super().validate_num_items(modality, num_items)
        limit = self.allowed_mm_limits.get("image", 0)
        if modality == "image" and num_items > limit:
            raise LimitError(
                f"the prompt has {num_items} images, at most {limit} are allowed; raise it with "
                f"--limit-mm-per-prompt '{{\"image\": {num_items}}}'"
            )

    def get_data_parser(self) -> InquiryParser:
        """The parser that knows inquiries."""
        return InquiryParser(expected_hidden_size=self._get_expected_hidden_size())

    def pixel_bounds(self, mm_kwargs: Mapping[str, object]) -> tuple[int, int]:
        """(min, max) pixels of one image: the checkpoint's, ``--mm-processor-kwargs``, then the request's.

        Raises:
            UnsupportedError: a setting that the processor does not have.
        """
        settings = dict(self.ctx.get_merged_mm_kwargs(mm_kwargs))
        settings |= dict(settings.pop("images_kwargs", None) or {})
        unknown = sorted(set(settings) - set(_IMAGE_SETTINGS))
        if unknown:
            raise UnsupportedError(
                f"mm_processor_kwargs {unknown} are not settings of ViLaVT; it takes {list(_IMAGE_SETTINGS)}"
            )
        low, high = pixel_bounds(self.get_hf_processor().image_processor.size)
        size = settings.get("size") or {}
        if not set(size) <= {"shortest_edge", "longest_edge"}:
            raise UnsupportedError(
                f"mm_processor_kwargs size={size}: it has shortest_edge and longest_edge, the least and the most pixels"
            )
        low = settings.get("min_pixels") or size.get("shortest_edge") or low
        high = settings.get("max_pixels") or size.get("longest_edge") or high
        return int(low), int(high)

    @cached_property
    def limits(self) -> EncoderLimits:
        """The caps on one inquiry."""
        return EncoderLimits.of(self.ctx.model_config.hf_config, self.pixel_bounds({})[1])

    def largest_group(self) -> list[tuple[int, int]]:
        """(width, height) of the regions of the most expensive inquiry a request can bring."""
        low, high = self.pixel_bounds({})
        return self.limits.largest_group(high, low, self.ctx.model_config.max_model_len)

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        """Language-model tokens of the largest inquiry that the caps let through."""
        return {"image": min(self.limits.max_group_tokens, self.ctx.model_config.max_model_len)}

    @cached_property
    def chat_tokens(self) -> ChatTokens:
        """Structural token ids, looked up by name."""
        tokenizer = self.get_tokenizer()
        return ChatTokens(
            im_start=tokenizer.convert_tokens_to_ids("<|im_start|>"),
            im_end=tokenizer.convert_tokens_to_ids("<|im_end|>"),
            image_pad=self.get_hf_config().image_token_id,
        )

    def query_text(self, query: str, prefix: str | None = None) -> str:
        """The text the query encoder sees."""
        prefix = self.get_hf_processor().query_prefix if prefix is None else prefix
        return prefix + query if query.strip() else query


def largest_inquiry(model_config: Any) -> tuple[int, int]:
    """Image tokens and regions of the largest inquiry that an engine takes."""
    limits = MULTIMODAL_REGISTRY.create_processor(model_config).info.limits
    return min(limits.max_group_tokens, model_config.max_model_len), limits.max_regions


def image_processor_of(model_config: Any) -> Any:
    """The checkpoint's image processor."""
    return _load_processor(model_config.model, model_config.revision).image_processor


class VilavtDummyInputsBuilder(BaseDummyInputsBuilder[VilavtProcessingInfo]):
    """The most expensive inquiry within the caps, by which vLLM measures memory at start."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        """One placeholder per region of every dummy inquiry."""
        return PLACEHOLDER * (mm_counts.get("image", 0) * len(self.info.largest_group()))

    def get_dummy_mm_data(
        self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Largest inquiries with a query that fills its row."""
        overrides: Any = mm_options.get("image")
        images: list[Any] = []
        for width, height in self.info.largest_group():
            images += self._get_dummy_images(width=width, height=height, num_images=1, overrides=overrides)
        query = "zoom " * self.info.get_hf_processor().max_query_length
        return {"image": [InquiryItem(tuple(images), query) for _ in range(mm_counts.get("image", 0))]}


class RegionTokens(PromptUpdateDetails):
    """Tokens of one inquiry, and how many of them each region has; cached with the item."""

    def __init__(self, image_pad: int, counts: tuple[int, ...]):
        super().__init__(full=[image_pad] * sum(counts))
        self.counts = counts


class VilavtMultiModalProcessor(BaseMultiModalProcessor[VilavtProcessingInfo]):
    """Groups images into inquiries, encodes queries and pixels, and places the features."""

    def apply(self, inputs: ProcessorInputs, timing_ctx: TimingContext) -> Any:
        """The parent's, on inquiries instead of images.

        Raises:
            PlaceholderError: placeholders and images do not agree.
            LimitError: too many images, or an inquiry above the caps.
        """
        items = inputs.mm_data_items.get("image")
        given = compat.token_ids(inputs.prompt, self.info.get_tokenizer())
        if items is None:
            return super().apply(replace(inputs, prompt=given), timing_ctx)
        if not isinstance(items, (ImageProcessorItems, InquiryItems)):
            raise UnsupportedError(
                "image embeddings are not accepted: what is encoded depends on the query; send the images"
            )
        with timing_ctx.record("group_images"):
            uuids = (inputs.mm_uuid_items or {}).get("image")
            n_images = sum(len(i.images) for i in items.data) if isinstance(items, InquiryItems) else len(items)
            self.info.validate_num_items("image", n_images)  # vLLM counted inquiries, here are their images
            tokens = self.info.chat_tokens
            prompt, lengths = one_placeholder_each(given, tokens.image_pad, n_images)
            if isinstance(items, InquiryItems):
                inquiries = _with_uuids(items.data, uuids)
            else:
                groups = groups_of_tokens(prompt, tokens, self.info.get_tokenizer().decode)
                inquiries = _grouped(items.data, uuids, groups)
            inquiries = [
                replace(i, query=self.info.query_text(i.query, i.query_prefix), query_prefix="") for i in inquiries
            ]
            self._check_sizes(inquiries, self.info.pixel_bounds(inputs.hf_processor_mm_kwargs))
        grouped = replace(
            inputs,
            prompt=prompt,
            mm_data_items=MultiModalDataItems({**inputs.mm_data_items, "image": InquiryItems(inquiries)}),
            # They are part of the inquiries' identity now. One None for each: vLLM before 0.31 hashes an item by
            # `get_item_for_hash` only if its modality is listed here, and by pickle otherwise.
            mm_uuid_items={"image": [None] * len(inquiries)},
        )
        result = super().apply(grouped, timing_ctx)
        if lengths is not None and result["prompt_token_ids"] != given:
            self._refuse_runs(result["prompt_token_ids"], lengths)
        return result

    def _check_sizes(self, inquiries: Sequence[InquiryItem], bounds: tuple[int, int]) -> None:
        for number, inquiry in enumerate(inquiries):
            images = [_size(image) for image in inquiry.images if image is not None]
            sizes = [smart_resize(h, w, min_pixels=bounds[0], max_pixels=bounds[1]) for h, w in images]
            if not inquiry.images:
                raise PlaceholderError(f"inquiry {number} has no image; a query conditions the images encoded with it")
            self.info.limits.check(number, sizes, inquiry.query)
            if inquiry.final and (changed := [pair for pair in zip(images, sizes, strict=True) if pair[0] != pair[1]]):
                (height, width), (to_height, to_width) = changed[0]
                raise PlaceholderError(
                    f"inquiry {number} ({inquiry.query[:60]!r}): an image of {width}x{height} pixels would become "
                    f"{to_width}x{to_height} here, where images have between {bounds[0]} and {bounds[1]} pixels, and "
                    "its tokens are counted already; use the same bounds on both sides (--mm-processor-kwargs, or "
                    "Limits of the episode)"
                )

    def _refuse_runs(self, expanded: Sequence[int], given: Sequence[int]) -> None:
        pad = self.info.chat_tokens.image_pad
        rest, wanted = list(expanded), []
        while pad in rest:
            rest = rest[rest.index(pad) :]
            wanted.append(next((i for i, token in enumerate(rest) if token != pad), len(rest)))
            rest = rest[wanted[-1] :]
        number = next(i for i, (a, b) in enumerate(zip(wanted, given, strict=True)) if a != b)
        low, high = self.info.pixel_bounds({})
        raise PlaceholderError(
            f"image {number} has {given[number]} placeholder tokens in the prompt but encodes to {wanted[number]}: it "
            f"is resized to between {low} and {high} pixels here; use the same min_pixels and max_pixels on both sides "
            "(--mm-processor-kwargs, or Limits of the episode)"
        )

    def _apply_hf_processor_main(self, *args: Any, **kwargs: Any) -> Any:
        """In place of the parent's, which would write a text for a transformers processor: the inquiries are all that
        is encoded. Its parameters differ from version to version (`compat.encoder_call`)."""
        items, settings, prompt = compat.encoder_call(args, kwargs)
        inquiries = list(items["image"].data) if items.get_count("image", strict=False) else []
        encoded = self._encode(inquiries, settings) if inquiries else BatchFeature()
        return encoded if prompt is None else (prompt, encoded, False)

    def _encode(self, inquiries: Sequence[InquiryItem], settings: Mapping[str, object]) -> BatchFeature:
        """Encoder inputs, at the pixel bounds that the request's settings ask for.

        Pixels travel as bytes, and once: the model makes of them what it computes with (`PixelScale`). That is an
        eighth of what an image processor returns in fp32, for this process, vLLM's caches and the way to the GPU.
        """
        processor = self.info.get_hf_processor()
        bounds = self.info.pixel_bounds(settings)
        images = [_picture(image) for inquiry in inquiries for image in inquiry.images]
        pixels, grids = zip(*(patches_of(image, processor.image_processor, bounds) for image in images), strict=True)
        ids, mask = processor.tokenize_queries([inquiry.query for inquiry in inquiries], prefix="")
        return BatchFeature(
            {
                "pixels": torch.from_numpy(np.concatenate(pixels)),
                "image_grid_thw": torch.tensor(grids),
                "query_ids": ids,
                "query_attention_mask": mask,
                "images_per_query": torch.tensor([len(inquiry.images) for inquiry in inquiries]),
            }
        )

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        per_query = hf_inputs.get("images_per_query", torch.empty(0, dtype=torch.long))
        grid = hf_inputs.get("image_grid_thw", torch.empty(0, 3, dtype=torch.long))
        patches = (
            torch.stack([g.prod(-1).sum() for g in grid.split(per_query.tolist())]) if len(per_query) else per_query
        )
        return {
            "pixels": MultiModalFieldConfig.flat_from_sizes("image", patches),
            "image_grid_thw": MultiModalFieldConfig.flat_from_sizes("image", per_query, keep_on_cpu=True),
            "images_per_query": MultiModalFieldConfig.batched("image", keep_on_cpu=True),
            "query_ids": MultiModalFieldConfig.batched("image"),
            "query_attention_mask": MultiModalFieldConfig.batched("image", keep_on_cpu=True),
        }

    def _get_prompt_updates(
        self,
        mm_items: MultiModalDataItems,
        hf_processor_mm_kwargs: Mapping[str, object],
        out_mm_kwargs: MultiModalKwargsItems,
    ) -> Sequence[PromptUpdate]:
        pad = self.info.chat_tokens.image_pad
        unit = self.info.get_hf_config().vision_config.spatial_merge_size ** 2

        def tokens_of(index: int) -> RegionTokens:
            grid: Any = out_mm_kwargs["image"][index]["image_grid_thw"].data
            return RegionTokens(pad, tuple((grid.prod(-1) // unit).tolist()))

        return [PromptReplacement(modality="image", target=[pad], replacement=tokens_of)]

    def _apply_prompt_updates(
        self, token_ids: list[int], mm_prompt_updates: Any
    ) -> tuple[list[int], Mapping[str, list[PlaceholderFeaturesInfo]]]:
        """Replace placeholders in order; an inquiry's range spans its first to its last region, text between included.

        The parent matches one target per item, and an inquiry has one per region.
        """
        pad = self.info.chat_tokens.image_pad
        out: list[int] = []
        places: list[PlaceholderFeaturesInfo] = []
        source = 0
        for index, (update,) in enumerate(mm_prompt_updates.get("image", [])):
            begin = None
            for count in update.content.counts:
                at = token_ids.index(pad, source)
                out += token_ids[source:at]
                begin = len(out) if begin is None else begin
                out += [pad] * count
                source = at + 1
            assert begin is not None
            span = out[begin:]
            places.append(PlaceholderFeaturesInfo("image", index, begin, span, torch.tensor(span) == pad))
        return out + token_ids[source:], {"image": places} if places else {}


def _with_uuids(inquiries: Sequence[InquiryItem], uuids: Sequence[str | None] | None) -> list[InquiryItem]:
    """A uuid given for an inquiry as a whole stands for its images; the query stays part of the identity."""
    if uuids is None:
        return list(inquiries)
    out = []
    for inquiry, uuid in zip(inquiries, uuids, strict=True):
        given = tuple(f"{uuid}-{i}" for i in range(len(inquiry.images))) if uuid is not None else inquiry.uuids
        out.append(replace(inquiry, uuids=given))
    return out


def _grouped(
    images: Sequence[Any], uuids: Sequence[str | None] | None, groups: Sequence[tuple[str, int]]
) -> list[InquiryItem]:
    uuids = uuids or [None] * len(images)
    out, start = [], 0
    for query, count in groups:
        end = start + count
        out.append(InquiryItem(tuple(images[start:end]), query, uuids=tuple(uuids[start:end])))
        start = end
    return out


def _unwrapped(image: Any) -> Any:
    return getattr(image, "media", image)


def _size(image: Any) -> tuple[int, int]:
    """(height, width) in pixels."""
    picture = _unwrapped(image)
    if isinstance(picture, Image.Image):
        return picture.height, picture.width
    picture = _picture(image)
    return picture.height, picture.width


def _picture(image: Any) -> Image.Image:
    """An RGB PIL image; what arrays may be, says `vilavt_core.sources.array_image`."""
    picture = _unwrapped(image)
    if is_array(picture):
        picture = array_image(picture, "an image")
    return picture if picture.mode == "RGB" else picture.convert("RGB")
