"""The processor: text, images and queries in, tensors out.

Shapes: N patches, n images, Q queries, T query columns, B samples, L tokens.
"""

import difflib
import inspect
import logging
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from huggingface_hub import snapshot_download
from PIL import Image
from transformers import AutoTokenizer, BatchFeature, PreTrainedTokenizerBase, ProcessorMixin

from vilavt_core.checkpoint.companions import make_portable
from vilavt_core.conversation import longest_token
from vilavt_core.errors import GroupError, ProcessorError, PromptError
from vilavt_core.images import UrlPolicy, load_image
from vilavt_core.prompts import PromptSet
from vilavt_core.protocol import ToolCall, parse_turn
from vilavt_core.settings import ChatSettings, read_chat_settings
from vilavt_core.sources import image_list, is_array

from . import compat
from .call_settings import FLAT, GROUPS, OF_IMAGES, bounds_within, check_known, sort_settings
from .pixels import pixel_values

logger = logging.getLogger(__name__)

QUERY_TOKENIZER_FOLDER = "query_tokenizer"
PROMPTS_FOLDER = "prompts"
QUERY_END_TOKEN = "<|endoftext|>"
"""Appended to every query; also the padding of query rows (the published query encoder's convention)."""

_CALL = FLAT | GROUPS | {"queries", "images_per_query", "query_prefix"}
"""What `VilavtProcessor.__call__` takes beside text and images."""
_USED_BY_TEMPLATES = ("tools", "documents", "add_generation_prompt")

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
        changes = {name: kwargs.pop(name) for name in OF_IMAGES if name in kwargs}
        return [
            compat.load_image_processor(pretrained_model_name_or_path, changes, **kwargs),
            AutoTokenizer.from_pretrained(pretrained_model_name_or_path, **kwargs),
        ]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Any:
        """Load the processor, its query tokenizer, prompts and chat settings from a checkpoint folder or a hub id.

        Args:
            pretrained_model_name_or_path: the folder or id.
            kwargs: ``min_pixels``, ``max_pixels``, ``size`` and other settings of the image processor, as its defaults;
                arguments of the constructor; those of the tokenizer's `from_pretrained`.

        Raises:
            ProcessorError: an argument that is nearly, but not quite, one of ours: a tokenizer would swallow it.
        """
        known = {*OF_IMAGES, *inspect.signature(cls.__init__).parameters, *_HUB_KWARGS}
        for name in set(kwargs) - known:
            if meant := difflib.get_close_matches(name, known, 1, cutoff=0.85):
                raise ProcessorError(f"from_pretrained does not know {name}; did you mean {meant[0]}?")
        hub = {name: kwargs[name] for name in _HUB_KWARGS if name in kwargs}
        query_tokenizer = kwargs.pop("query_tokenizer", None)
        prompts = kwargs.pop("prompts", None)
        chat_settings = kwargs.pop("chat_settings", None)
        kwargs.setdefault("trust_remote_code", False)  # told nothing, transformers asks on the terminal
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
        videos: None = None,
        audio: None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Inputs of `VilavtForConditionalGeneration.forward` and `generate`.

        Takes the keyword arguments of the stock Qwen2.5-VL processor, with its defaults: without ``padding`` prompts
        keep their lengths, without ``return_tensors`` ids are lists and pixels arrays. The model finds the token types
        of 5.x by itself; ``return_mm_token_type_ids=True`` returns them.

        Args:
            images: images in prompt order: one, a list, or a list per sample; a flat list for several prompts is
                shared out by their placeholders. PIL images are taken as stock processors take them, everything else is
                loaded as by `vilavt_core.images.load_image`, http(s) URLs included. An array of floats from 0 to 1 is
                scaled, unless ``do_rescale=False`` says that it is ready.
            text: rendered prompt or prompts, one ``<|image_pad|>`` per image.
            queries: query strings of the sample (or one list per sample). Left out, groups are read off the prompt:
                the images of a tool response form one group under the query of the call before it, every other image
                is its own group without a query.
            images_per_query: images of each query, same nesting.
            query_prefix: overrides the processor's.
            kwargs: for the tokenizer (``padding``, ``truncation``, ``max_length``, …) and for the image processor
                (``size``, ``min_pixels``, ``max_pixels``, ``do_resize``, …), flat or in ``text_kwargs``,
                ``images_kwargs`` and ``common_kwargs``; see `vilavt_hf.call_settings`.

        Returns:
            input_ids, attention_mask (B, L); with images pixel_values (N, 1176), image_grid_thw (n, 3),
            query_ids, query_attention_mask (Q, T), images_per_query (Q,).

        Raises:
            GroupError: placeholders, images and queries do not add up; names the sample.
            ProcessorError: an argument that nobody uses, one that was passed two times, or a prompt that truncation
                would cut inside an image.
            ImageError: an image cannot be loaded.
        """
        if videos is not None or audio is not None:
            raise GroupError("ViLaVT takes video frames as images, and no audio: pass images=[frame, …]")
        if images is None and text is None:
            raise ProcessorError("there is neither text nor images; pass text=…, images=…, or both")
        of_text, of_images = sort_settings(kwargs, self.tokenizer)
        tensors = of_text.pop("return_tensors", of_images.pop("return_tensors", None))
        if text is not None and not isinstance(text, str | list | tuple):
            raise ProcessorError(f"the text is a {type(text).__name__}; pass a str or a list of them")
        texts = [text] if isinstance(text, str) else list(text or ())
        for i, prompt in enumerate(texts):
            if not isinstance(prompt, str):
                raise ProcessorError(f"sample {i}: the text is a {type(prompt).__name__}; pass a str or a list of them")
        per_sample = self._per_sample(images, texts)
        flat = [image for sample in per_sample for image in sample]
        data: dict[str, Any] = {}
        lengths: list[int] = []
        if flat:
            data = self._encode_images(flat, of_images)
            merge = of_images.get("merge_size", self.image_processor.merge_size)
            lengths = (np.asarray(data["image_grid_thw"]).prod(-1) // merge**2).tolist()
        offsets: list[list[dict[str, Any]]] = []
        if texts:
            sizes = iter(lengths)
            expanded = [self._expand(i, t, len(per_sample[i]), sizes) for i, t in enumerate(texts)]
            if of_text.pop("return_text_replacement_offsets", False):
                offsets = [replaced for _, replaced in expanded]
            data |= self._tokenize([prompt for prompt, _ in expanded], of_text, tensors)
        if flat:
            groups = self._groups(texts, per_sample, queries, images_per_query)
            ids, mask = self.tokenize_queries([query for query, _ in groups], query_prefix)
            data["query_ids"], data["query_attention_mask"] = ids.numpy(), mask.numpy()
            data["images_per_query"] = np.array([count for _, count in groups])
        elif queries:
            raise GroupError(f"{len(queries)} queries but no images: a query conditions the images encoded with it")
        features = BatchFeature(data, tensor_type=tensors)
        if offsets:
            features["text_replacement_offsets"] = offsets
        return features

    def apply_chat_template(
        self,
        conversation: Any,
        chat_template: str | None = None,
        *,
        processor_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Render a conversation, and with ``tokenize=True`` encode it; the parent's, on every version alike.

        Args:
            conversation: messages, or a list of conversations.
            chat_template: a template or the name of one; None: the processor's.
            processor_kwargs: settings of `__call__`; they may also be given flat, as 4.57 takes them.
            kwargs: ``add_generation_prompt``, ``tokenize``, ``return_dict``, ``tools``, …, variables of the template,
                settings of `__call__`.

        Raises:
            ProcessorError: an argument that neither the template nor the processor uses, or that this transformers
                carries out wrongly.
        """
        variables = _variables(chat_template, self.chat_template)
        of_call = dict(processor_kwargs or {})
        of_template: dict[str, Any] = {}
        for name, value in kwargs.items():
            if name in compat.CHAT_SETTINGS or (name in variables and name not in _CALL):
                of_template[name] = value
            elif name in of_call:
                raise ProcessorError(f"{name} was passed two times: in processor_kwargs and as a keyword argument")
            else:
                of_call[name] = value
        check_known(of_call, _CALL | compat.CHAT_SETTINGS | variables, "apply_chat_template: ")
        unheard = [name for name in _USED_BY_TEMPLATES if of_template.get(name) and name not in variables]
        unheard += [name for name in ("load_audio_from_video",) if of_template.get(name)]
        if unheard:
            raise ProcessorError(f"apply_chat_template: the chat template does not use {', '.join(unheard)}")
        if of_call and not of_template.get("tokenize"):
            raise ProcessorError(
                f"apply_chat_template: {', '.join(of_call)} is for the processor's call, which tokenize=False leaves "
                "out; pass tokenize=True, or the argument to the call"
            )
        if of_template.get("return_assistant_tokens_mask") and not compat.MASKS_COUNT_IMAGES:
            several = [conversation] if conversation and isinstance(conversation[0], Mapping) else conversation
            if any(map(_pictures_of, several)):
                raise ProcessorError(
                    "apply_chat_template: return_assistant_tokens_mask with images needs a newer transformers: "
                    f"{compat.transformers.__version__} does not count the tokens of images"
                )
        if compat.TEMPLATE_KEEPS_SETTINGS_APART:
            of_template |= {name: of_call.pop(name) for name in ("return_tensors",) if name in of_call}
            return super().apply_chat_template(conversation, chat_template, processor_kwargs=of_call, **of_template)
        if not of_template.get("tokenize") or of_template.get("return_assistant_tokens_mask"):
            return super().apply_chat_template(conversation, chat_template, **of_template, **of_call)
        of_template.pop("tokenize")
        return_dict = of_template.pop("return_dict", False)
        prompts = super().apply_chat_template(conversation, chat_template, **of_template)
        found = [_pictures_of(one) for one in ([conversation] if isinstance(prompts, str) else conversation)]
        out = self(text=prompts, images=found if any(found) else None, **of_call)
        return out if return_dict else out["input_ids"]

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
        pixels, grids = pixel_values(images, self.image_processor)
        ids, mask = self.tokenize_queries(
            [inquiry.query for inquiry in inquiries],
            [getattr(inquiry, "query_prefix", None) for inquiry in inquiries],
            padding="longest",
        )
        return {
            "pixel_values": pixels,
            "image_grid_thw": grids,
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
        if padding not in ("max_length", "longest"):
            raise ProcessorError(f"padding={padding!r} of query rows must be 'max_length' or 'longest'")
        if self.query_tokenizer is None:
            raise PromptError(
                "this checkpoint has no query_tokenizer/ folder, queries cannot be tokenised; "
                "add it with `vilavt convert SRC DST --query-encoder ENCODER`"
            )
        prefixes = [prefix] * len(queries) if prefix is None or isinstance(prefix, str) else prefix
        end = self.query_tokenizer.convert_tokens_to_ids(QUERY_END_TOKEN)
        if end is None or end == self.query_tokenizer.unk_token_id:
            raise PromptError(f"the query tokenizer does not know {QUERY_END_TOKEN!r}, the end token of a query")
        # No longer text can matter: what is cut off below would take its time and memory first.
        most = 2 * self.max_query_length * longest_token(self.query_tokenizer)
        rows = []
        for query, own in zip(queries, prefixes, strict=True):
            text = ((self.query_prefix if own is None else own) + query if query.strip() else query)[:most]
            ids = self.query_tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True) if text else []
            rows.append([*ids[: self.max_query_length - 1], end] if text else [])
        width = self.max_query_length if padding == "max_length" else max(1, *map(len, rows), 1)
        ids = torch.full((len(rows), width), end)
        mask = torch.zeros(len(rows), width, dtype=torch.long)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row, dtype=torch.long)
            mask[i, : len(row)] = 1
        return ids, mask

    def _encode_images(self, images: list[Any], settings: dict[str, Any]) -> dict[str, Any]:
        """``pixel_values`` and ``image_grid_thw``, as arrays."""
        settings = bounds_within(settings, self.image_processor.size)
        for name in ("patch_size", "temporal_patch_size", "merge_size"):
            own = getattr(self.image_processor, name)
            if settings.get(name, own) != own:
                raise ProcessorError(f"{name}={settings[name]!r}: the model's is {own}, and no other; leave it out")
        as_it_is = settings.get("do_rescale") is False or "input_data_format" in settings
        loaded = [_picture(image, as_it_is, f"image {i}") for i, image in enumerate(images)]
        if settings.get("do_resize") is False:
            self._check_sides(loaded)
        encoded = self.image_processor(images=loaded, **settings)
        return {name: encoded[name] for name in ("pixel_values", "image_grid_thw")}

    def _check_sides(self, images: list[Any]) -> None:
        factor = self.image_processor.patch_size * self.image_processor.merge_size
        for i, image in enumerate(images):
            if isinstance(image, Image.Image) and (image.width % factor or image.height % factor):
                raise ProcessorError(
                    f"image {i}: {image.width}x{image.height} pixels, with do_resize=False both sides must be "
                    f"multiples of {factor}; resize it with vilavt_core.regions.smart_resize"
                )

    def _tokenize(self, prompts: list[str], settings: dict[str, Any], tensors: Any) -> dict[str, Any]:
        """Token ids of expanded prompts as lists.

        Raises:
            ProcessorError: an image would lose tokens, or prompts of several lengths cannot be one tensor.
        """
        types = settings.pop("return_mm_token_type_ids", False)
        data = dict(self.tokenizer(prompts, **{"return_token_type_ids": False, **settings}))
        for i, (prompt, ids) in enumerate(zip(prompts, data["input_ids"], strict=False)):
            asked, left = len(re.findall(self._placeholder, prompt)), list(ids).count(self.image_token_id)
            if asked != left:
                raise ProcessorError(
                    f"sample {i}: its images take {asked} tokens, {left} are left of them (truncation, max_length="
                    f"{settings.get('max_length', self.tokenizer.model_max_length)}); an image cannot be cut: raise "
                    "max_length, do not truncate, or lower max_pixels"
                )
        lengths = {len(ids) for ids in data["input_ids"]}
        if tensors is not None and len(lengths) > 1:
            raise ProcessorError(
                f"prompts of {min(lengths)} to {max(lengths)} tokens are no tensor; pass padding=True, or no "
                "return_tensors"
            )
        if types:
            data["mm_token_type_ids"] = [[int(t == self.image_token_id) for t in ids] for ids in data["input_ids"]]
        return data

    @property
    def _placeholder(self) -> str:
        """A regular expression of an image's place in a prompt."""
        return compat.UNMARKED + re.escape(self.image_token)

    def _expand(self, sample: int, text: str, n_images: int, sizes: Any) -> tuple[str, list[dict[str, Any]]]:
        """Repeat every image placeholder of one prompt once per token of its image; and where that was, as 5.x says."""
        places = list(re.finditer(self._placeholder, text))
        if len(places) != n_images:
            raise GroupError(
                f"sample {sample}: {len(places)} {self.image_token} placeholders in the text, {n_images} images; "
                "give one placeholder per image (and escape the token in user text)"
            )
        pieces, replaced, done, gained = [], [], 0, 0
        for place in places:
            run = self.image_token * next(sizes)
            start = place.start() + gained
            replaced.append(
                {
                    "type": "image",
                    "span": place.span(),
                    "new_span": (start, start + len(run)),
                    "text": place.group(),
                    "replacement": run,
                }
            )
            pieces += [text[done : place.start()], run]
            done, gained = place.end(), gained + len(run) - len(place.group())
        return "".join([*pieces, text[done:]]), replaced

    def _per_sample(self, images: Any, texts: list[str]) -> list[list[Any]]:
        """The images of every prompt; without prompts all of them are one sample's."""
        n_samples = max(1, len(texts))
        if images is None:
            return [[] for _ in range(n_samples)]
        listed = image_list(images)
        if listed and all(isinstance(sample, (list, tuple)) for sample in listed):
            if len(listed) != n_samples:
                raise GroupError(f"{len(listed)} lists of images for {n_samples} prompts; give one list per prompt")
            return [image_list(sample) for sample in listed]
        if n_samples == 1:
            return [listed]
        places = [len(re.findall(self._placeholder, text)) for text in texts]
        if sum(places) != len(listed):
            raise GroupError(
                f"one flat list of {len(listed)} images for {n_samples} prompts with {sum(places)} {self.image_token} "
                f"placeholders ({', '.join(map(str, places))}); give one image per placeholder"
            )
        ends = np.cumsum(places)
        return [listed[end - count : end] for end, count in zip(ends, places, strict=True)]

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
    placeholder = compat.UNMARKED + re.escape(image_token)
    groups: list[tuple[str, int]] = []
    query: str | None = None
    for turn in re.split(r"<\|im_start\|>", text):
        count = len(re.findall(placeholder, turn))
        if count:
            groups += [(query, count)] if query is not None else [("", 1)] * count
        action = parse_turn(turn.removeprefix("assistant")) if turn.startswith("assistant\n") else None
        query = action.query if isinstance(action, ToolCall) else None
    return groups


def _variables(chat_template: str | None, own: str | dict[str, str] | None) -> frozenset[str]:
    """Names that a chat template looks up; `own` is the processor's, or its templates by name."""
    named = own if isinstance(own, dict) else {}
    source = named.get(chat_template or "default", chat_template) or (own if isinstance(own, str) else None)
    if source is None:
        return frozenset()  # the parent says that there is no template
    return compat.template_variables(source)


def _picture(source: Any, as_it_is: bool, label: str) -> Any:
    """An image as the image processor takes it; `as_it_is`: arrays are in the state that the caller says."""
    if isinstance(source, Image.Image) or (as_it_is and is_array(source)):
        return source
    if isinstance(source, str) and len(source) > 255 and re.fullmatch(r"[A-Za-z0-9+/\s]+=*\s*", source):
        source = f"data:image/*;base64,{source}"  # what stock processors take for an image as well
    policy = UrlPolicy(private_hosts=True)  # the caller's own text, as in stock processors
    return load_image(source, allow_urls=True, url_policy=policy, name=None if isinstance(source, str) else label)


def _pictures_of(conversation: Any) -> list[Any]:
    """The images of a conversation, in order."""
    return [
        part[key]
        for message in conversation
        for part in (message["content"] if isinstance(message.get("content"), (list, tuple)) else ())
        if part.get("type") == "image"
        for key in ("image", "url", "path", "base64")
        if key in part
    ]


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
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def _load_prompts(path: str | os.PathLike, hub: dict[str, Any]) -> PromptSet | None:
    folder = _part(path, PROMPTS_FOLDER, hub)
    return PromptSet.load(folder) if folder.is_dir() else None


def _part(path: str | os.PathLike, name: str, hub: dict[str, Any]) -> Path:
    """A folder within a checkpoint; that of a hub id is fetched, or found in the cache. It need not exist."""
    if not os.path.isdir(path):
        # transformers' `subfolder` would look for a configuration there, and end if the hub has none.
        path = snapshot_download(str(path), allow_patterns=f"{name}/*", **hub)
    return Path(path) / name
