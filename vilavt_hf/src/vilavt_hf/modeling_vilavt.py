"""ViLaVT: Qwen2.5-VL whose vision blocks can attend jointly over a group of images and a text query.

Only three things differ from the parent: the vision attention (`VilavtVisionAttention`), the packing of patches into
attention segments (`vision_layout`) and the query encoder, which lives in the base model so that any head put on
`VilavtModel` keeps the conditioning. Language model, positions, loss and sampling are the parent's.

Shapes: N patches, M query tokens kept, Q queries, T query columns, H heads, D head size, C vision hidden size,
B samples, L tokens.
"""

import logging
import os
from typing import Any

import torch
from torch import nn
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as qwen
from transformers.models.qwen3.modeling_qwen3 import Qwen3Model

from vilavt_core.architecture import FREEZABLE, MODULE_NAMES, find_part, is_query_projection
from vilavt_core.errors import CheckpointError, GroupError, ProcessorError

from . import compat
from .configuration_vilavt import VilavtConfig, VilavtVisionConfig
from .vision_layout import VisionLayout, rotate

logger = logging.getLogger(__name__)

QUERY_INPUTS = ("query_ids", "query_attention_mask", "images_per_query", "image_to_query_mapping")
"""Names of the conditioning inputs of `forward`."""

compat.register_key_names("VilavtForConditionalGeneration", MODULE_NAMES)


class VilavtVisionAttention(qwen.Qwen2_5_VLVisionAttention):
    """Vision attention whose keys and values can be extended by projected query tokens."""

    def __init__(self, config: VilavtVisionConfig, query_aware: bool):
        super().__init__(config)
        self.query_aware = query_aware
        if query_aware:
            self.instruct_key_proj = nn.Linear(self.dim, self.dim)
            self.instruct_value_proj = nn.Linear(self.dim, self.dim)

    def project(
        self, hidden_states: torch.Tensor, text: torch.Tensor, layout: VisionLayout
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(N, C) patches and (M, C) query tokens -> queries (N, H, D), keys and values (N + M, H, D), rotated.

        Without query tokens, or in a block that is not query-aware, keys and values are those of the N patches.
        """
        n = len(hidden_states)
        q, k, v = self.qkv(hidden_states).view(n, 3, self.num_heads, -1).unbind(1)
        if self.query_aware and len(text):
            k = torch.cat([k, self.instruct_key_proj(text).unflatten(1, (self.num_heads, -1))])
            v = torch.cat([v, self.instruct_value_proj(text).unflatten(1, (self.num_heads, -1))])
        return rotate(q, layout.cos[:n], layout.sin[:n]), rotate(k, layout.cos[: len(k)], layout.sin[: len(k)]), v

    def forward(self, hidden_states: torch.Tensor, text: torch.Tensor, layout: VisionLayout, kind: str) -> torch.Tensor:
        """(N, C) patches and (M, C) query tokens -> (N, C)."""
        return self.proj(layout.segments[kind].attend(self, *self.project(hidden_states, text, layout)))


class VilavtVisionBlock(qwen.Qwen2_5_VLVisionBlock):
    """A vision block of one kind: "group" (query-aware, joint), "frame" (full per frame) or "window"."""

    def __init__(self, config: VilavtVisionConfig, kind: str):
        super().__init__(config)
        self.kind = kind
        self.attn = VilavtVisionAttention(config, query_aware=kind == "group")

    def forward(self, hidden_states: torch.Tensor, text: torch.Tensor, layout: VisionLayout) -> torch.Tensor:
        """(N, C) -> (N, C). `text` is positional: re-entrant checkpointing only tracks positional tensors."""
        layout = layout.on(hidden_states.device)
        hidden_states = hidden_states + self.attn(self.norm1(hidden_states), text, layout, self.kind)
        return hidden_states + self.mlp(self.norm2(hidden_states))


class VilavtVisionModel(qwen.Qwen2_5_VisionTransformerPretrainedModel):
    """Qwen2.5-VL's tower with query-aware blocks where ``config.integration_point`` puts them."""

    config_class = VilavtVisionConfig
    _no_split_modules = ["VilavtVisionBlock"]  # noqa: RUF012 (the parent's type)

    def __init__(self, config: VilavtVisionConfig, *inputs: Any, **kwargs: Any):
        super().__init__(config, *inputs, **kwargs)
        joint, full = config.query_aware_blocks(), set(config.fullatt_block_indexes)
        kinds = ["group" if i in joint else "frame" if i in full else "window" for i in range(config.depth)]
        self.blocks = nn.ModuleList(VilavtVisionBlock(config, kind) for kind in kinds)
        self.post_init()

    def forward(
        self,
        hidden_states: torch.Tensor,
        grid_thw: torch.Tensor,
        images_per_query: torch.Tensor | None = None,
        query_features: torch.Tensor | None = None,
        query_attention_mask: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Encode images, group by group.

        Args:
            hidden_states: (N, 1176) normalised pixels, one row per patch.
            grid_thw: (n_images, 3) frames, height and width in patches.
            images_per_query: (Q,) images of each group.
            query_features: (Q, T, C) projected query tokens; None makes every image its own group without a query.
            query_attention_mask: (Q, T).
            output_hidden_states: also give what goes into every block and comes out of the last, (N, C) in the order
                of the blocks' windows, where the container has room for it; None: as the configuration says.

        Returns:
            (N / merge_size², out_hidden) merged features in prompt order, in the container of the installed
            transformers (see `compat.vision_output`).
        """
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        hidden_states = self.patch_embed(hidden_states)
        if query_features is None:
            images_per_query = torch.ones(len(grid_thw), dtype=torch.long)
            query_features = hidden_states.new_zeros(len(grid_thw), 0, self.config.hidden_size)
            query_attention_mask = torch.zeros(len(grid_thw), 0)
        assert images_per_query is not None
        assert query_attention_mask is not None
        layout = VisionLayout(grid_thw, images_per_query, query_attention_mask, self.config, hidden_states.device)
        text = query_features.to(hidden_states.device).flatten(0, 1)[layout.text_index]
        hidden_states = hidden_states.unflatten(0, (-1, self.spatial_merge_unit))[layout.order].flatten(0, 1)
        states = [hidden_states]
        for block in self.blocks:
            hidden_states = block(hidden_states, text, layout)
            if output_hidden_states:
                states.append(hidden_states)
        merged = self.merger(hidden_states)
        merged = merged[torch.argsort(layout.order).to(merged.device)]
        return compat.vision_output(hidden_states, merged, tuple(states) if output_hidden_states else None)


def group_sizes(
    n_images: int,
    query_ids: torch.Tensor,
    images_per_query: torch.Tensor | None = None,
    image_to_query_mapping: torch.Tensor | None = None,
) -> torch.Tensor:
    """Validated number of images of each query row, (Q,) on the CPU.

    Raises:
        GroupError: counts or mapping do not describe contiguous groups in prompt order that cover all images.
    """
    n_query = len(query_ids)
    counts = images_per_query.cpu().long() if images_per_query is not None else None
    if image_to_query_mapping is not None:
        mapping = image_to_query_mapping.cpu().long()
        in_range = n_images == 0 or bool((mapping >= 0).all() and (mapping < n_query).all())
        if len(mapping) != n_images or not in_range or bool((mapping.diff() < 0).any()):
            raise GroupError(
                f"image_to_query_mapping={mapping.tolist()} must give each of {n_images} images a query row below "
                f"{n_query}, non-decreasing: images of one query are contiguous and in prompt order"
            )
        from_mapping = torch.bincount(mapping, minlength=n_query)
        if counts is not None and not torch.equal(counts, from_mapping):
            raise GroupError(
                f"images_per_query={counts.tolist()} and image_to_query_mapping={mapping.tolist()} disagree; "
                "pass one of them"
            )
        counts = from_mapping
    if counts is None:
        raise GroupError("query_ids needs images_per_query (or image_to_query_mapping): which images does a query ask?")
    if counts.dim() != 1 or len(counts) != n_query or int(counts.sum()) != n_images or bool((counts < 0).any()):
        raise GroupError(
            f"images_per_query={counts.tolist()} must have one count for each of {n_query} queries and sum to "
            f"{n_images} images, but has shape {tuple(counts.shape)} and sums to {int(counts.sum())}"
        )
    return counts


class _CompleteCheckpoint:
    """`from_pretrained` that never leaves a tensor at random, and that honours ``frozen``."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
        """The parent's, but strict.

        Args:
            pretrained_model_name_or_path: a checkpoint folder (published RL or SFT flavour, or ours) or a hub id.
            kwargs: the parent's, and ``frozen``: parts without gradient (see `VilavtConfig`).

        Raises:
            CheckpointError: a tensor is missing or has another shape, or query projections in the file belong to
                blocks that ``integration_point`` does not make query-aware.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        frozen = kwargs.pop("frozen", None)
        config = kwargs.pop("config", None)
        if config is not None and not isinstance(config, VilavtConfig) and not isinstance(config, (str, os.PathLike)):
            logger.warning(
                "the given %s is not a VilavtConfig (AutoConfig reads the published SFT flavour as stock Qwen2.5-VL); "
                "reading %s again; `vilavt convert` writes a checkpoint that AutoConfig recognises",
                type(config).__name__,
                pretrained_model_name_or_path,
            )
            config = VilavtConfig.from_pretrained(pretrained_model_name_or_path)
        if config is not None:
            kwargs["config"] = config
        model, info = super().from_pretrained(  # type: ignore[misc]
            pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
        )
        unused = sorted(key for key in info["unexpected_keys"] if is_query_projection(key))
        missing, mismatched = sorted(info["missing_keys"]), sorted(map(str, info["mismatched_keys"]))
        if missing or mismatched or unused:
            raise CheckpointError(
                f"checkpoint {pretrained_model_name_or_path} does not fit its configuration "
                f"(integration_point={model.config.vision_config.integration_point!r}): "
                f"{len(missing)} tensors missing {missing[:6]}, {len(mismatched)} of another shape {mismatched[:6]}, "
                f"{len(unused)} query projections of blocks that are not query-aware {unused[:6]}; "
                "`vilavt inspect` lists what it holds, `vilavt init` makes a ViLaVT from a plain Qwen2.5-VL"
            )
        if frozen is not None:
            model.config.frozen = list(frozen)
        apply_frozen(model)
        return (model, info) if wants_info else model


def apply_frozen(model: Any) -> None:
    """Switch off the gradients of what ``model.config.frozen`` lists.

    Raises:
        ValueError: a name is not one of `FREEZABLE`.
    """
    frozen = model.config.frozen
    if unknown := [name for name in frozen if name not in FREEZABLE]:
        raise ValueError(f"frozen={frozen!r}: {unknown[0]!r} is not one of {list(FREEZABLE)}")
    parts = {part for name in frozen for part in FREEZABLE[name]}
    for name, parameter in model.named_parameters() if parts else ():
        if find_part(name) in parts:
            parameter.requires_grad_(False)


class VilavtModel(_CompleteCheckpoint, qwen.Qwen2_5_VLModel):
    """The base model: language model, vision tower, query encoder and its projection."""

    config_class = VilavtConfig
    _no_split_modules = ["Qwen2_5_VLDecoderLayer", "VilavtVisionBlock", "Qwen3DecoderLayer"]  # noqa: RUF012

    def __init__(self, config: VilavtConfig):
        super(qwen.Qwen2_5_VLModel, self).__init__(config)  # the parent's would build a second tower
        self.visual = VilavtVisionModel._from_config(config.vision_config)
        self.language_model = qwen.Qwen2_5_VLTextModel._from_config(config.text_config)
        self.text_encoder = Qwen3Model._from_config(config.text_encoder_config)
        encoder: Any = config.text_encoder_config
        self.text_proj = nn.Linear(encoder.hidden_size, config.vision_config.hidden_size)
        self.rope_deltas = None
        self.post_init()
        apply_frozen(self)

    def encode_queries(self, query_ids: torch.Tensor, query_attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """(Q, T) ids -> (Q, T, C) projected token features, no pooling. Features of masked tokens are never used."""
        mask = torch.ones_like(query_ids) if query_attention_mask is None else query_attention_mask
        mask = mask.masked_fill(~mask.bool().any(1, keepdim=True), 1)  # flash attention must not unpad to zero tokens
        features = self.text_encoder(query_ids, attention_mask=mask, use_cache=False).last_hidden_state
        return self.text_proj(features)

    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        image_grid_thw: torch.Tensor | None = None,
        query_ids: torch.Tensor | None = None,
        query_attention_mask: torch.Tensor | None = None,
        images_per_query: torch.Tensor | None = None,
        image_to_query_mapping: torch.Tensor | None = None,
        return_dict: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Features of every image, conditioned on its query.

        Args:
            pixel_values: (N, 1176).
            image_grid_thw: (n_images, 3).
            query_ids, query_attention_mask: (Q, T); none at all makes every image its own empty query.
            images_per_query: (Q,); or image_to_query_mapping: (n_images,), non-decreasing.
            return_dict: False gives a tuple, from 5.x on; 4.57 gives the features alone. None: as the configuration
                says.
            output_hidden_states: from 5.x on also those of the tower. None: as the tower's configuration says.
            output_attentions: not available: no kernel of the tower keeps them.

        Returns:
            One (t * h * w / merge_size², out_hidden) tensor per image, in the container of the installed transformers.

        Raises:
            GroupError: the query inputs do not describe valid groups.
            ProcessorError: an output that cannot be had was asked for.
        """
        if output_attentions:
            raise ProcessorError("output_attentions: the vision tower does not keep attention weights; leave it out")
        if output_hidden_states and not compat.VISION_OUTPUT_HAS_STATES:
            raise ProcessorError("output_hidden_states: this version of transformers gives the image features alone")
        if image_grid_thw is None:
            raise GroupError("pixel_values need image_grid_thw (n_images, 3)")
        patches = int(image_grid_thw.prod(-1).sum())
        if patches != len(pixel_values):
            raise GroupError(
                f"image_grid_thw describes {patches} patches in {len(image_grid_thw)} images, pixel_values holds "
                f"{len(pixel_values)}; both must come from the same processor call"
            )
        conditioning = {}
        if query_ids is not None:
            conditioning = {
                "images_per_query": group_sizes(
                    len(image_grid_thw), query_ids, images_per_query, image_to_query_mapping
                ),
                "query_attention_mask": torch.ones_like(query_ids)
                if query_attention_mask is None
                else query_attention_mask,
                "query_features": self.encode_queries(query_ids, query_attention_mask),
            }
        elif images_per_query is not None or image_to_query_mapping is not None:
            raise GroupError("images_per_query / image_to_query_mapping need query_ids (and query_attention_mask)")
        output = self.visual(
            pixel_values.type(self.visual.dtype),
            grid_thw=image_grid_thw,
            output_hidden_states=output_hidden_states,
            **conditioning,
        )
        sizes = (image_grid_thw.prod(-1) // self.visual.spatial_merge_unit).tolist()
        last_hidden_state = getattr(output, "last_hidden_state", None)
        states = getattr(output, "hidden_states", None)
        found = compat.vision_output(last_hidden_state, torch.split(compat.pooled(output), sizes), states)
        wants_tuple = not (self.config.return_dict if return_dict is None else return_dict)
        return found.to_tuple() if wants_tuple and hasattr(found, "to_tuple") else found

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_grid_thw: torch.Tensor | None = None,
        query_ids: torch.Tensor | None = None,
        query_attention_mask: torch.Tensor | None = None,
        images_per_query: torch.Tensor | None = None,
        image_to_query_mapping: torch.Tensor | None = None,
        mm_token_type_ids: torch.Tensor | None = None,
        mm_encoder_outputs: Any = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> Any:
        """The parent's forward on embeddings in which the (conditioned) image features are already in place.

        Args:
            input_ids: (B, L); images appear as runs of ``config.image_token_id``.
            position_ids: (3, B, L), or None to derive them. Needed when new images come with a KV cache.
            pixel_values, image_grid_thw and the query inputs: see `get_image_features`; images of all samples
                concatenated, in prompt order.
            mm_token_type_ids: optional everywhere, derived from ``input_ids``.
            mm_encoder_outputs: ``{"image": features}`` already encoded, as newer `generate` passes them.
            past_key_values, cache: two names of one argument, the cache of keys and values; both are taken whatever
                the installed transformers calls it.
        """
        if kwargs.pop("pixel_values_videos", None) is not None:
            raise GroupError("ViLaVT takes video frames as images (pixel_values), not pixel_values_videos")
        images = (mm_encoder_outputs or {}).get("image")
        if pixel_values is not None:
            images = self.get_image_features(
                pixel_values,
                image_grid_thw,
                query_ids,
                query_attention_mask,
                images_per_query,
                image_to_query_mapping,
                return_dict=True,
                output_hidden_states=compat.VISION_OUTPUT_HAS_STATES and kwargs.get("output_hidden_states"),
            )
        if images is not None:
            if inputs_embeds is None:
                inputs_embeds = self.get_input_embeddings()(input_ids)
            features = torch.cat(tuple(compat.pooled(images))).to(inputs_embeds.device, inputs_embeds.dtype)
            mask, _ = self.get_placeholder_mask(input_ids, inputs_embeds=inputs_embeds, image_features=features)
            inputs_embeds = inputs_embeds.masked_scatter(mask, features)
        if compat.TAKES_MM_TOKEN_TYPE_IDS:
            kwargs["mm_token_type_ids"] = image_token_types(self.config, input_ids, mm_token_type_ids)
        output = super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **compat.cache_argument(past_key_values, cache),
            inputs_embeds=inputs_embeds,
            image_grid_thw=image_grid_thw,
            **kwargs,
        )
        if hasattr(output, "image_outputs"):  # newer 5.x; the parent saw embeddings alone
            output.image_outputs = images
        return output


def image_token_types(
    config: VilavtConfig, input_ids: torch.Tensor | None, given: torch.Tensor | None = None
) -> torch.Tensor | None:
    """`mm_token_type_ids` (B, L) of the parent: 1 at image placeholders, 0 elsewhere; `given` wins."""
    return given if given is not None or input_ids is None else (input_ids == config.image_token_id).int()


class VilavtForConditionalGeneration(_CompleteCheckpoint, qwen.Qwen2_5_VLForConditionalGeneration):
    """ViLaVT with its LM head; loads and saves the published (flat) tensor names."""

    config_class = VilavtConfig
    _no_split_modules = VilavtModel._no_split_modules
    _checkpoint_conversion_mapping = MODULE_NAMES  # read by 4.57 only

    def __init__(self, config: VilavtConfig):
        super(qwen.Qwen2_5_VLForConditionalGeneration, self).__init__(config)
        self.model = VilavtModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()
        apply_frozen(self)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        pixel_values: torch.Tensor | None = None,
        image_grid_thw: torch.Tensor | None = None,
        query_ids: torch.Tensor | None = None,
        query_attention_mask: torch.Tensor | None = None,
        images_per_query: torch.Tensor | None = None,
        image_to_query_mapping: torch.Tensor | None = None,
        mm_token_type_ids: torch.Tensor | None = None,
        mm_encoder_outputs: Any = None,
        logits_to_keep: int | torch.Tensor = 0,
        cache: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Logits (B, L, vocab) and, given `labels` (B, L; -100 ignored), the loss. Inputs: `VilavtModel.forward`."""
        # Names are spelled out because `generate` and `Trainer` read this signature.
        conditioning = {
            "image_grid_thw": image_grid_thw,
            "query_ids": query_ids,
            "query_attention_mask": query_attention_mask,
            "images_per_query": images_per_query,
            "image_to_query_mapping": image_to_query_mapping,
            "mm_token_type_ids": mm_token_type_ids,
            "mm_encoder_outputs": mm_encoder_outputs,
        }
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **compat.cache_argument(past_key_values, cache),
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            pixel_values=pixel_values,
            logits_to_keep=logits_to_keep,
            **{name: value for name, value in conditioning.items() if value is not None},
            **kwargs,
        )

    def _prepare_position_ids_for_generation(self, inputs_tensor: torch.Tensor, model_kwargs: dict) -> torch.Tensor:
        # 5.x only: M-RoPE needs the token types; without them generation is silently wrong.
        ids = model_kwargs.get("input_ids")
        ids = inputs_tensor if ids is None or ids.shape[1] == 0 else ids
        if not ids.is_floating_point():
            types = image_token_types(self.config, ids, model_kwargs.get("mm_token_type_ids"))
            model_kwargs = {**model_kwargs, "mm_token_type_ids": types}
        return super()._prepare_position_ids_for_generation(inputs_tensor, model_kwargs)

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """Repeat whole samples: the query rows of one sample stay together, like its images."""
        query = {name: kwargs.pop(name) for name in QUERY_INPUTS if kwargs.get(name) is not None}
        if expand_size > 1 and query and not compat.GENERATE_ENCODES_FIRST:
            counts = group_sizes(
                len(kwargs["image_grid_thw"]),
                query["query_ids"],
                query.get("images_per_query"),
                query.pop("image_to_query_mapping", None),
            )
            images = self._get_image_nums_and_video_nums(input_ids)[0].cpu()
            sample = torch.searchsorted(images.cumsum(0), counts.cumsum(0))  # sample of each query row
            rows = torch.cat([(sample == s).nonzero()[:, 0].repeat(expand_size) for s in range(len(images))])
            query = {name: v[rows.to(v.device)] for name, v in {**query, "images_per_query": counts}.items()}
        input_ids, kwargs = super()._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **kwargs)
        return input_ids, {**kwargs, **query}
