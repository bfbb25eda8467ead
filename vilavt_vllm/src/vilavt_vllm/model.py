"""ViLaVT as a vLLM model: vLLM's Qwen2 language model, our vision tower, a replicated query encoder.

Composed rather than derived from vLLM's Qwen2.5-VL: that class also promises encoder CUDA graphs, video pruning and a
data-parallel tower, each of which works image by image and would take inquiries apart.
"""

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.models.interfaces import (
    MultiModalEmbeddings,
    SupportsLoRA,
    SupportsMRoPE,
    SupportsMultiModal,
    SupportsPP,
    SupportsQuant,
)
from vllm.model_executor.models.module_mapping import MultiModelKeys
from vllm.model_executor.models.utils import (
    AutoWeightsLoader,
    WeightsMapper,
    init_vllm_registered_model,
    is_pp_missing_parameter,
    maybe_prefix,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalFeatureSpec
from vllm.sequence import IntermediateTensors

from vilavt_core.architecture import VLLM_FUSED, VLLM_PREFIXES, names_of_vllm, published_name, vllm_name
from vilavt_hf.pixels import PixelScale

from . import compat
from .errors import WeightsError
from .processing import (
    PLACEHOLDER,
    VilavtDummyInputsBuilder,
    VilavtMultiModalProcessor,
    VilavtProcessingInfo,
    image_processor_of,
    largest_inquiry,
)
from .query_encoder import QueryEncoder
from .vision import VisionTower

logger = logging.getLogger(__name__)


@dataclass
class EncoderCounts:
    """What the encoder did since the model was loaded (or since `reset`); a cache hit counts nothing."""

    calls: int = 0
    inquiries: int = 0
    images: int = 0
    patches: int = 0
    query_tokens: int = 0

    def reset(self) -> None:
        """Start at zero again."""
        self.__init__()  # type: ignore[misc]


def take_counts(model: "VilavtForConditionalGeneration") -> EncoderCounts:
    """What the encoder did since the last call, for `LLM.apply_model`; its counts start at zero again."""
    counts, model.counts = model.counts, EncoderCounts()
    return counts


@MULTIMODAL_REGISTRY.register_processor(
    VilavtMultiModalProcessor, info=VilavtProcessingInfo, dummy_inputs=VilavtDummyInputsBuilder
)
class VilavtForConditionalGeneration(
    nn.Module, SupportsMultiModal, SupportsLoRA, SupportsPP, SupportsQuant, SupportsMRoPE
):
    """Serves checkpoints of `vilavt_hf.VilavtForConditionalGeneration` and published ones."""

    packed_modules_mapping = {  # noqa: RUF012 (the parents' type)
        **{fused: list(layers) for fused, layers in VLLM_FUSED.items()},
        "qkv": ["qkv"],
    }
    # from tensor names in checkpoint files, and from the transformers model's, which RL trainers send
    hf_to_vllm_mapper = WeightsMapper(orig_to_new_prefix=VLLM_PREFIXES)

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        compat.check_version()
        compat.refuse_unsupported(vllm_config, lambda: largest_inquiry(vllm_config.model_config))
        self.config = compat.config_of(vllm_config.model_config)
        self.counts = EncoderCounts()
        self._strict = vllm_config.load_config.load_format != "dummy"
        encoder: Any = self.config.text_encoder_config
        parts: Any = self  # without vLLM's types the mixins' methods look like submodules
        with parts._mark_tower_model(vllm_config, {"image"}):
            self.visual = VisionTower(
                self.config.vision_config, quant_config=self.quant_config, prefix=maybe_prefix(prefix, "visual")
            )
            self.text_encoder = QueryEncoder(encoder)
            self.text_proj = ReplicatedLinear(
                encoder.hidden_size,
                self.config.vision_config.hidden_size,
                prefix=maybe_prefix(prefix, "text_proj"),
            )
        self.pixel_scale = PixelScale(image_processor_of(vllm_config.model_config), self.visual.dtype)
        with parts._mark_language_model(vllm_config):
            self.language_model = init_vllm_registered_model(
                vllm_config=vllm_config,
                prefix=maybe_prefix(prefix, "language_model"),
                architectures=["Qwen2ForCausalLM"],
            )
        self.make_empty_intermediate_tensors = self.language_model.make_empty_intermediate_tensors
        self.n_tokens = compat.n_tokens(vllm_config.model_config)
        self._keeps_weights = compat.expects_updates(vllm_config)
        if self._keeps_weights:
            compat.keep_weights(self)

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        """What stands for an image in a prompt."""
        if modality == "image":
            return PLACEHOLDER
        raise ValueError(f"ViLaVT takes images; send the frames of a {modality} as images")

    def get_mm_mapping(self) -> MultiModelKeys:
        """Which module is what, for LoRA."""
        return MultiModelKeys.from_string_field(
            language_model="language_model", connector="visual.merger.", tower_model="visual."
        )

    def embed_multimodal(
        self,
        pixels: torch.Tensor | None = None,
        image_grid_thw: torch.Tensor | None = None,
        images_per_query: torch.Tensor | None = None,
        query_ids: torch.Tensor | None = None,
        query_attention_mask: torch.Tensor | None = None,
        **kwargs: object,
    ) -> MultiModalEmbeddings:
        """Features of inquiries, possibly of several requests, one (tokens, hidden) tensor each.

        Args:
            pixels: (N, 588) uint8, patches as `VilavtMultiModalProcessor` sends them.
            image_grid_thw: (n_images, 3).
            images_per_query: (Q,).
            query_ids, query_attention_mask: (Q, T), right padded.
        """
        if pixels is None:
            return []
        assert image_grid_thw is not None
        assert images_per_query is not None
        assert query_ids is not None
        assert query_attention_mask is not None
        grid, per_query = image_grid_thw.view(-1, 3).cpu(), images_per_query.flatten().cpu()
        mask = query_attention_mask.view(len(per_query), -1).cpu()
        features = self.text_encoder.features(query_ids.view(len(per_query), -1), mask)
        projected = self.text_proj(features.to(self.visual.dtype))[0]
        merged = self.visual(self.pixel_scale(pixels), grid, per_query, projected, mask)
        self._count(grid, mask)
        tokens = grid.prod(-1) // self.config.vision_config.spatial_merge_size**2
        return merged.split([int(t.sum()) for t in tokens.split(per_query.tolist())])

    def _count(self, grid: torch.Tensor, mask: torch.Tensor) -> None:
        counts = self.counts
        counts.calls += 1
        counts.inquiries += len(mask)
        counts.images += len(grid)
        counts.patches += int(grid.prod(-1).sum())
        counts.query_tokens += int(mask.sum())

    def get_mrope_input_positions(
        self, input_tokens: list[int], mm_features: list[MultiModalFeatureSpec]
    ) -> tuple[torch.Tensor, int]:
        """Qwen2.5-VL's positions (3, L) of a prompt, and what to add to a token's place after it.

        An image's tokens take a grid that starts one after the largest position before it; text counts on from the
        largest position so far (transformers: ``get_rope_index``). Regions of one inquiry may have text between them.
        """
        merge = self.config.vision_config.spatial_merge_size
        parts: list[np.ndarray] = []
        done = 0  # tokens that have positions
        position = 0  # of the next token
        for start, grid in self._image_starts(mm_features):
            t, h, w = grid[0], grid[1] // merge, grid[2] // merge
            parts.append(np.broadcast_to(np.arange(start - done) + position, (3, start - done)))
            position += start - done
            parts.append(np.indices((t, h, w)).reshape(3, -1) + position)
            position += max(t, h, w)
            done = start + t * h * w
        rest = len(input_tokens) - done
        parts.append(np.broadcast_to(np.arange(rest) + position, (3, rest)))
        positions = np.concatenate(parts, axis=1)
        return torch.from_numpy(positions), int(positions.max(initial=-1)) + 1 - len(input_tokens)

    def _image_starts(self, mm_features: list[MultiModalFeatureSpec]) -> Iterable[tuple[int, list[int]]]:
        """(place of the first token, [t, h, w] in patches) of every image in the prompt."""
        unit = self.config.vision_config.spatial_merge_size**2
        for feature in sorted(mm_features, key=lambda f: f.mm_position.offset):
            place = feature.mm_position
            inside = torch.arange(place.length) if place.is_embed is None else place.is_embed.nonzero().flatten()
            assert feature.data is not None
            grids: Any = feature.data["image_grid_thw"].data
            first = 0
            for grid in grids.view(-1, 3).tolist():
                yield place.offset + int(inside[first]), grid
                first += grid[0] * grid[1] * grid[2] // unit

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: object,
    ) -> torch.Tensor | IntermediateTensors:
        """Hidden states of a flattened batch; `positions` is (3, L)."""
        if intermediate_tensors is not None:  # a later pipeline stage
            inputs_embeds = None
        return self.language_model.model(input_ids, positions, intermediate_tensors, inputs_embeds=inputs_embeds)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """Logits over the vocabulary; those of ids without a token are -inf.

        A Qwen2.5-VL has hundreds of such rows. They would be sampled now and then at a high temperature, as text that
        is nothing; trainers leave them out of the softmax.
        """
        logits = self.language_model.compute_logits(hidden_states)
        if logits is not None and self.n_tokens is not None:
            logits[..., self.n_tokens :] = -torch.inf
        return logits

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load a checkpoint, or afterwards any part of one.

        The first load must bring every tensor; of a quantised checkpoint, whose tensors have names of its method, see
        `bare_layers`. Later calls are weight updates (RL): they may bring any subset, under
        checkpoint names or parameter names of the transformers model; clear vLLM's prefix and encoder caches
        afterwards. Under ``load_format="dummy"`` every call is treated as an update.

        Raises:
            WeightsError: tensors are missing on the first load, a tensor belongs to no parameter, or (on a CPU) the
                engine was not started for updates and has packed its weights.
        """
        brought: set[str] = set()

        def watched() -> Iterable[tuple[str, torch.Tensor]]:
            for given, tensor in weights:
                name = published_name(given)
                if self._is_foreign(name):
                    raise WeightsError(
                        f"the tensor {given} belongs to no parameter of this model "
                        f"(integration_point={self.config.vision_config.integration_point!r}, "
                        f"{self.config.text_config.num_hidden_layers} layers): it comes from another model"
                    )
                brought.add(name)
                yield given, tensor

        try:
            loaded = AutoWeightsLoader(self).load_weights(watched(), mapper=self.hf_to_vllm_mapper)
        except WeightsError:
            raise
        except (ValueError, AssertionError, AttributeError, KeyError) as error:
            last = sorted(brought)[-1:] if len(brought) == 1 else []
            packed = "weight_loader" in str(error) and not self._keeps_weights
            raise WeightsError(
                "vLLM has packed this CPU engine's weights and cannot load others; start it with "
                "load_format='dummy' and send every tensor"
                if packed
                else f"a tensor does not fit this model{f' ({last[0]})' if last else ''} "
                f"(integration_point={self.config.vision_config.integration_point!r}): {error}{self._hint}"
            ) from error
        if self._strict:
            missing = sorted(self._names - brought if self.quant_config is None else bare_layers(self._names, brought))
            if missing:
                raise WeightsError(
                    f"the checkpoint lacks {len(missing)} tensors, they would stay at random: {missing[:8]}; "
                    "`vilavt inspect` lists what it holds, `vilavt init` makes a ViLaVT from a plain Qwen2.5-VL"
                    f"{self._hint}"
                )
            self._strict = False
        return loaded

    def _is_foreign(self, name: str) -> bool:
        """Whether a tensor of this name in a checkpoint has no place here; vLLM's language model before 0.25 skips such
        a one in silence. Quantised checkpoints have tensors of their own, and other pipeline stages other layers.
        """
        known = self.quant_config is not None or name in self._names or name.endswith("rotary_emb.inv_freq")
        if known or (name == "lm_head.weight" and self.config.tie_word_embeddings):
            return False
        return not is_pp_missing_parameter(vllm_name(name), self)

    @property
    def _hint(self) -> str:
        """What else may be wrong with a quantised checkpoint that does not fit."""
        if self.quant_config is None:
            return ""
        return (
            "; layers that are stored whole must be in the list of those to ignore in its quantization_config, in the "
            "words of its method, and no others"
        )

    @cached_property
    def _names(self) -> frozenset[str]:
        return frozenset(self.checkpoint_names())

    def checkpoint_names(self) -> set[str]:
        """Names in a checkpoint of all tensors that this rank's stage needs."""
        names: set[str] = set()
        for name, _ in self.named_parameters():
            # vLLM's LoRA layers hold the layer that they extend
            names |= names_of_vllm(name.replace(".base_layer.", "."))
        return names


PLAIN = {"weight", "bias"}
"""Tensors of a layer that is not quantised."""


def bare_layers(needed: Iterable[str], brought: Iterable[str]) -> set[str]:
    """Tensors that would stay at random: of layers of which a checkpoint brought nothing, or which it stores quantised
    and the model does not have so, or the other way round. What a quantisation calls its tensors does not matter.

    Args:
        needed: tensors of the model.
        brought: tensors of the checkpoint.
    """
    have, out = _kinds(brought), set()
    for layer, wanted in _kinds(needed).items():
        found = have.get(layer, set())
        if not found:
            lacking = {kind for kind in wanted if "weight" in kind}
        elif wanted <= PLAIN or found <= PLAIN:
            lacking = wanted - found
        else:
            lacking = set()
        out |= {f"{layer}.{kind}" for kind in lacking}
    return out


def _kinds(names: Iterable[str]) -> dict[str, set[str]]:
    """Layer -> the last parts of its tensors' names."""
    out: dict[str, set[str]] = {}
    for name in names:
        layer, _, kind = name.rpartition(".")
        out.setdefault(layer, set()).add(kind)
    return out


__all__ = ["EncoderCounts", "VilavtForConditionalGeneration"]
