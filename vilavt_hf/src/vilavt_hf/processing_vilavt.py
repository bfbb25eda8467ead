"""The processor: text, images and queries in, tensors out.

Shapes: N patches, n images, Q queries, T query columns, B samples, L tokens.
"""

import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from huggingface_hub import snapshot_download
from PIL import Image
from transformers import AutoTokenizer, BatchFeature, PreTrainedTokenizerBase, ProcessorMixin

from vilavt_core.checkpoint.companions import make_portable
from vilavt_core.errors import GroupError, PromptError
from vilavt_core.prompts import PromptSet
from vilavt_core.protocol import ToolCall, parse_turn
from vilavt_core.settings import ChatSettings, read_chat_settings

from . import compat

logger = logging.getLogger(__name__)

QUERY_TOKENIZER_FOLDER = "query_tokenizer"
PROMPTS_FOLDER = "prompts"
QUERY_END_TOKEN = "<|endoftext|>"
"""Appended to every query; also the padding of query rows (the published query encoder's convention)."""

_HUB_KWARGS = ("cache_dir", "force_download", "local_files_only", "token", "revision")


class InquiryLike(Protocol):
    """Regions encoded together under one query; `vilavt_core.episode.Inquiry` is one."""

    @property
    def images(self) -> Sequence[Image.Image]:
        """The images of the group, in prompt order."""
        ...

    @property
    def query(self) -> str:
        """The bare query; "" encodes the images without one."""
        ...


class VilavtProcessor(ProcessorMixin):
    """Qwen2.5-VL's processor with a second tokenizer, for queries, and the checkpoint's own prompt set.

    Args:
        image_processor: a Qwen2-VL image processor (PIL backend).
        tokenizer: the language model's tokenizer.
        query_tokenizer: the query encoder's tokenizer, saved in ``query_tokenizer/``.
        prompts: the prompt set the checkpoint was trained with, saved in ``prompts/``.
        chat_settings: how the checkpoint wants to be run, saved in ``vilavt_chat.json``; the processor itself does
            nothing with it.
        chat_template: Jinja template, by default the tokenizer's.
        query_prefix: put before every non-blank query.
        max_query_length: tokens of a query row, its end token included.
    """

    attributes = ["image_processor", "tokenizer"]  # noqa: RUF012 (4.57 reads these three)
    image_processor_class = "AutoImageProcessor"
    tokenizer_class = "AutoTokenizer"

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        query_tokenizer: PreTrainedTokenizerBase | None = None,
        prompts: PromptSet | None = None,
        chat_template: str | None = None,
        query_prefix: str = "",
        max_query_length: int = 50,
        chat_settings: ChatSettings | None = None,
    ):
        if tokenizer is None or image_processor is None:
            raise ValueError("VilavtProcessor needs an image_processor and a tokenizer")
        super().__init__(image_processor, tokenizer, chat_template=chat_template or tokenizer.chat_template)
        self.query_tokenizer = query_tokenizer
        self.prompts = prompts
        self.chat_settings = chat_settings
        self.query_prefix = query_prefix
        self.max_query_length = max_query_length
        self.image_token = getattr(tokenizer, "image_token", None) or "<|image_pad|>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)

    @classmethod
    def get_attributes(cls) -> list[str]:
        """5.x would infer a third attribute from the signature; the query tokenizer is ours to load and save."""
        return list(cls.attributes)

    @classmethod
    def _get_arguments_from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> list[Any]:
        kwargs.pop("processor_dict", None)
        kwargs.pop("use_fast", None)
        return [
            compat.load_image_processor(pretrained_model_name_or_path, **kwargs),
            AutoTokenizer.from_pretrained(pretrained_model_name_or_path, **kwargs),
        ]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Any:
        """Load the processor, its query tokenizer, prompts and chat settings from a checkpoint folder or a hub id."""
        hub = {name: kwargs[name] for name in _HUB_KWARGS if name in kwargs}
        query_tokenizer = kwargs.pop("query_tokenizer", None)
        prompts = kwargs.pop("prompts", None)
        chat_settings = kwargs.pop("chat_settings", None)
        processor = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        processor.query_tokenizer = query_tokenizer or _load_query_tokenizer(pretrained_model_name_or_path, hub)
        processor.prompts = prompts or _load_prompts(pretrained_model_name_or_path, hub)
        processor.chat_settings = chat_settings or read_chat_settings(os.fspath(pretrained_model_name_or_path), hub=hub)
        return processor

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
        """Write everything `from_pretrained` reads, in the layout that 4.57 and 5.x both understand."""
        written = super().save_pretrained(save_directory, *args, **kwargs)
        self.image_processor.save_pretrained(save_directory)  # 5.x alone would nest it where 4.57 cannot read it
        if self.query_tokenizer is not None:
            self.query_tokenizer.save_pretrained(Path(save_directory) / QUERY_TOKENIZER_FOLDER)
        if self.prompts is not None:
            self.prompts.save(Path(save_directory) / PROMPTS_FOLDER)
        if self.chat_settings is not None:
            self.chat_settings.save(Path(save_directory))
        make_portable(Path(save_directory))
        return written

    def to_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """What ``processor_config.json`` holds: our settings only, sub-processors have their own files."""
        return {
            "processor_class": type(self).__name__,
            "query_prefix": self.query_prefix,
            "max_query_length": self.max_query_length,
        }

    @property
    def model_input_names(self) -> list[str]:
        """Names of everything `__call__` can return."""
        return [
            "input_ids",
            "attention_mask",
            "pixel_values",
            "image_grid_thw",
            "query_ids",
            "query_attention_mask",
            "images_per_query",
        ]

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        queries: Sequence[str] | Sequence[Sequence[str]] | None = None,
        images_per_query: Sequence[int] | Sequence[Sequence[int]] | None = None,
        query_prefix: str | None = None,
        return_tensors: str = "pt",
        padding: bool | str = True,
        videos: None = None,
        audio: None = None,
        images_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Tensors for `VilavtForConditionalGeneration.forward` and `generate`.

        Args:
            images: PIL images in prompt order: one, a list (one sample), or a list per sample.
            text: rendered prompt or prompts, one ``<|image_pad|>`` per image.
            queries: query strings of the sample (or one list per sample). Left out, groups are read off the prompt:
                the images of a tool response form one group under the query of the call before it, every other image
                is its own group without a query.
            images_per_query: images of each query, same nesting.
            query_prefix: overrides the processor's.
            padding: as in tokenizers; the side is the tokenizer's.
            images_kwargs: passed to the image processor.
            kwargs: passed to the tokenizer.

        Returns:
            input_ids, attention_mask (B, L); with images pixel_values (N, 1176), image_grid_thw (n, 3),
            query_ids, query_attention_mask (Q, T), images_per_query (Q,).

        Raises:
            GroupError: placeholders, images and queries do not add up; names the sample.
        """
        if videos is not None or audio is not None:
            raise GroupError("ViLaVT takes video frames as images, and no audio: pass images=[frame, …]")
        if return_tensors != "pt":
            raise ValueError(f"return_tensors={return_tensors!r}: only 'pt' is supported")
        texts = [text] if isinstance(text, str) else list(text or [])
        per_sample = _per_sample(images, max(1, len(texts)))
        flat = [image for sample in per_sample for image in sample]
        data: dict[str, Any] = {}
        if flat:
            encoded = self.image_processor(images=flat, return_tensors="pt", **(images_kwargs or {}))
            data["pixel_values"], data["image_grid_thw"] = encoded["pixel_values"], encoded["image_grid_thw"]
        if texts:
            sizes = iter(self._tokens_per_image(data.get("image_grid_thw")))
            expanded = [self._expand(i, t, len(per_sample[i]), sizes) for i, t in enumerate(texts)]
            kwargs = {name: value for name, value in kwargs.items() if name not in ("return_dict", "do_rescale")}
            data |= dict(self.tokenizer(expanded, padding=padding, return_tensors="pt", **kwargs))
            data.pop("token_type_ids", None)
        if flat:
            groups = self._groups(texts, per_sample, queries, images_per_query)
            data["query_ids"], data["query_attention_mask"] = self.tokenize_queries(
                [query for query, _ in groups], query_prefix
            )
            data["images_per_query"] = torch.tensor([count for _, count in groups])
        elif queries:
            raise GroupError(f"{len(queries)} queries but no images: a query conditions the images encoded with it")
        return BatchFeature(data)

    def encode_inquiries(self, inquiries: Sequence[InquiryLike]) -> dict[str, torch.Tensor]:
        """Inputs of `VilavtModel.get_image_features` for inquiries whose images have their final size.

        Args:
            inquiries: regions with sides that are multiples of 28 pixels, as `vilavt_core.regions` makes them. One with
                a ``query_prefix`` (an `Inquiry` of an episode whose preset has one) overrides the processor's.

        Returns:
            pixel_values (N, 1176), image_grid_thw (n, 3), query_ids and query_attention_mask (Q, T) padded to the
            longest, images_per_query (Q,).

        Raises:
            GroupError: an image has sides the encoder would have to resize.
        """
        factor = self.image_processor.patch_size * self.image_processor.merge_size
        for i, inquiry in enumerate(inquiries):
            for j, image in enumerate(inquiry.images):
                if image.width % factor or image.height % factor:
                    raise GroupError(
                        f"inquiry {i}, image {j}: {image.width}x{image.height} pixels, both sides must be multiples of "
                        f"{factor}; resize it with vilavt_core.regions.smart_resize"
                    )
        images = [image for inquiry in inquiries for image in inquiry.images]
        encoded = self.image_processor(images=images, return_tensors="pt", do_resize=False)
        ids, mask = self.tokenize_queries(
            [inquiry.query for inquiry in inquiries],
            [getattr(inquiry, "query_prefix", None) for inquiry in inquiries],
            padding="longest",
        )
        return {
            "pixel_values": encoded["pixel_values"],
            "image_grid_thw": encoded["image_grid_thw"],
            "query_ids": ids,
            "query_attention_mask": mask,
            "images_per_query": torch.tensor([len(inquiry.images) for inquiry in inquiries]),
        }

    def tokenize_queries(
        self,
        queries: Sequence[str],
        prefix: str | Sequence[str | None] | None = None,
        padding: Literal["max_length", "longest"] = "max_length",
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Query rows: at most ``max_query_length`` tokens including the end token, right padded, special tokens inert.

        An empty query is a row of padding whose mask is all zero. Right padding makes the row length irrelevant to
        the features: the position of a query token is its column.

        Args:
            queries: bare.
            prefix: put before every query that is not blank, or one for each query; None is the processor's.
            padding: to ``max_query_length`` columns, or to the longest row.

        Returns:
            ids and mask, both (Q, T) int64.
        """
        if self.query_tokenizer is None:
            raise PromptError(
                "this checkpoint has no query_tokenizer/ folder, queries cannot be tokenised; "
                "add it with `vilavt convert SRC DST --query-encoder ENCODER`"
            )
        prefixes = [prefix] * len(queries) if prefix is None or isinstance(prefix, str) else prefix
        end = self.query_tokenizer.convert_tokens_to_ids(QUERY_END_TOKEN)
        if end is None or end == self.query_tokenizer.unk_token_id:
            raise PromptError(f"the query tokenizer does not know {QUERY_END_TOKEN!r}, the end token of a query")
        rows = []
        for query, own in zip(queries, prefixes, strict=True):
            text = (self.query_prefix if own is None else own) + query if query.strip() else query
            ids = self.query_tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True) if text else []
            rows.append([*ids[: self.max_query_length - 1], end] if text else [])
        width = self.max_query_length if padding == "max_length" else max(1, *map(len, rows), 1)
        ids = torch.full((len(rows), width), end)
        mask = torch.zeros(len(rows), width, dtype=torch.long)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row, dtype=torch.long)
            mask[i, : len(row)] = 1
        return ids, mask

    def _tokens_per_image(self, grid: torch.Tensor | None) -> list[int]:
        return [] if grid is None else (grid.prod(-1) // self.image_processor.merge_size**2).tolist()

    def _expand(self, sample: int, text: str, n_images: int, sizes: Any) -> str:
        """Repeat every image placeholder of one prompt once per token of its image."""
        parts = text.split(self.image_token)
        if len(parts) - 1 != n_images:
            raise GroupError(
                f"sample {sample}: {len(parts) - 1} {self.image_token} placeholders in the text, {n_images} images; "
                "give one placeholder per image (and escape the token in user text)"
            )
        return parts[0] + "".join(self.image_token * next(sizes) + part for part in parts[1:])

    def _groups(
        self, texts: list[str], images: list[list[Any]], queries: Any, images_per_query: Any
    ) -> list[tuple[str, int]]:
        n_samples = len(images)
        if queries is None:
            if images_per_query is not None:
                raise GroupError("images_per_query needs queries")
            if not texts:
                return [("", 1)] * sum(map(len, images))
            return [group for text in texts for group in groups_of_prompt(text, self.image_token)]
        nested_queries = _nested(queries, n_samples, str)
        nested_counts = _nested(images_per_query, n_samples, int) if images_per_query is not None else None
        groups = []
        for i, sample_queries in enumerate(nested_queries):
            counts = nested_counts[i] if nested_counts is not None else [1] * len(images[i])
            if len(counts) != len(sample_queries) or sum(counts) != len(images[i]):
                raise GroupError(
                    f"sample {i}: {len(sample_queries)} queries, images_per_query={list(counts)} (sum {sum(counts)}), "
                    f"{len(images[i])} images; give one count per query, summing to the images"
                )
            groups += list(zip(sample_queries, counts, strict=True))
        return groups


def groups_of_prompt(text: str, image_token: str = "<|image_pad|>") -> list[tuple[str, int]]:
    """Groups (query, number of images) of a rendered ChatML conversation.

    The images of the turn that follows a tool call form one group under the call's query; every other image is its own
    group with the query "". `image_token` stands once per image.
    """
    groups: list[tuple[str, int]] = []
    query: str | None = None
    for turn in re.split(r"<\|im_start\|>", text):
        count = turn.count(image_token)
        if count:
            groups += [(query, count)] if query is not None else [("", 1)] * count
        action = parse_turn(turn.removeprefix("assistant")) if turn.startswith("assistant\n") else None
        query = action.query if isinstance(action, ToolCall) else None
    return groups


def _per_sample(images: Any, n_samples: int) -> list[list[Any]]:
    if images is None:
        return [[] for _ in range(n_samples)]
    if not isinstance(images, (list, tuple)):
        images = [images]
    if images and all(isinstance(sample, (list, tuple)) for sample in images):
        if len(images) != n_samples:
            raise GroupError(f"{len(images)} lists of images for {n_samples} prompts; give one list per prompt")
        return [list(sample) for sample in images]
    if n_samples > 1:
        raise GroupError(f"one flat list of {len(images)} images for {n_samples} prompts; give one list per prompt")
    return [list(images)]


def _nested(values: Any, n_samples: int, kind: type) -> list[list[Any]]:
    values = list(values)
    flat = all(isinstance(value, kind) for value in values)
    nested = [values] if flat and n_samples == 1 else [list(value) for value in values] if not flat else None
    if nested is None or len(nested) != n_samples:
        raise GroupError(f"{len(values)} lists of queries or counts for {n_samples} prompts; give one list per prompt")
    return nested


def _load_query_tokenizer(path: str | os.PathLike, hub: dict[str, Any]) -> PreTrainedTokenizerBase | None:
    folder = _part(path, QUERY_TOKENIZER_FOLDER, hub)
    if not (folder / "tokenizer_config.json").is_file():
        logger.warning("%s has no %s/: queries cannot be tokenised", path, QUERY_TOKENIZER_FOLDER)
        return None
    return AutoTokenizer.from_pretrained(folder)


def _load_prompts(path: str | os.PathLike, hub: dict[str, Any]) -> PromptSet | None:
    folder = _part(path, PROMPTS_FOLDER, hub)
    return PromptSet.load(folder) if folder.is_dir() else None


def _part(path: str | os.PathLike, name: str, hub: dict[str, Any]) -> Path:
    """A folder within a checkpoint; that of a hub id is fetched, or found in the cache. It need not exist."""
    if not os.path.isdir(path):
        # transformers' `subfolder` would look for a configuration there, and end if the hub has none.
        path = snapshot_download(str(path), allow_patterns=f"{name}/*", **hub)
    return Path(path) / name
