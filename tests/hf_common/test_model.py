"""transformers' own tests of a model, and of generation, on our classes: `nox -s hf_common`."""

import unittest
from typing import Any

import torch
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)
from transformers_tests.generation.test_utils import GenerationTesterMixin
from transformers_tests.test_modeling_common import ModelTesterMixin, floats_tensor, ids_tensor

from vilavt_hf import VilavtConfig, VilavtForConditionalGeneration, VilavtModel

# The tests ask these tables, which `register` does not extend, what kind of model a class is.
MODEL_MAPPING_NAMES["vilavt"] = VilavtModel.__name__
MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES["vilavt"] = VilavtForConditionalGeneration.__name__

EOS, PAD, VISION_START, IMAGE, VIDEO = range(1, 6)


class Tester:
    """A tiny model, and three samples with one image of one patch each; see `ModelTesterMixin`."""

    batch_size, seq_length, vocab_size, is_training = 3, 39, 99, True
    hidden_size, num_hidden_layers, num_attention_heads, image_size = 32, 2, 4, 14

    def __init__(self, parent: Any, queries: bool) -> None:
        self.parent, self.queries = parent, queries

    def get_config(self) -> VilavtConfig:
        return VilavtConfig(
            text_config={
                "vocab_size": self.vocab_size,
                "hidden_size": self.hidden_size,
                "intermediate_size": 37,
                "num_hidden_layers": self.num_hidden_layers,
                "num_attention_heads": self.num_attention_heads,
                "num_key_value_heads": 2,
                "max_position_embeddings": 512,
                "rope_theta": 10000.0,
                "rope_scaling": {"type": "mrope", "rope_type": "default", "mrope_section": [2, 1, 1]},
                "bos_token_id": 0,
                "eos_token_id": EOS,
                "pad_token_id": PAD,
                "tie_word_embeddings": True,
            },
            vision_config={
                "depth": 2,
                "hidden_size": 32,
                "intermediate_size": 32,
                "out_hidden_size": self.hidden_size,
                "num_heads": 4,
                "spatial_merge_size": 1,
                "window_size": 28,
                "fullatt_block_indexes": [0],
                "integration_point": "late",
            },
            text_encoder_config={
                "vocab_size": self.vocab_size,
                "hidden_size": 32,
                "intermediate_size": 37,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "head_dim": 8,
            },
            vision_start_token_id=VISION_START,
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            tie_word_embeddings=True,
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[VilavtConfig, dict[str, torch.Tensor]]:
        config = self.get_config()
        ids = ids_tensor([self.batch_size, self.seq_length], self.vocab_size)
        ids[ids <= VIDEO] = VIDEO + 1
        ids[:, 7], ids[:, 8] = VISION_START, IMAGE
        inputs = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "mm_token_type_ids": (ids == IMAGE).int(),
            "pixel_values": floats_tensor([self.batch_size, 3 * 14 * 14 * 2]),
            "image_grid_thw": torch.tensor([[1, 1, 1]] * self.batch_size),
        }
        if self.queries:
            inputs["query_ids"] = ids_tensor([self.batch_size, 5], self.vocab_size)
            inputs["query_attention_mask"] = torch.ones(self.batch_size, 5, dtype=torch.long)
            inputs["images_per_query"] = torch.ones(self.batch_size, dtype=torch.long)
        return config, inputs


class CommonTests(ModelTesterMixin, GenerationTesterMixin):
    all_model_classes = (VilavtModel, VilavtForConditionalGeneration)
    _is_composite = True
    queries = True

    def setUp(self) -> None:
        self.model_tester = Tester(self, self.queries)

    @unittest.skip("either name of the cache is taken on every version, without a warning: tests/hf/test_model.py")
    def test_bc_cache_name_forward(self) -> None:
        pass

    def _image_features_prepare_config_and_inputs(self):
        """Theirs would leave the queries out, and the counts in."""
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        return config, {
            name: value
            for name, value in inputs.items()
            if name not in ("input_ids", "attention_mask", "mm_token_type_ids")
        }


class WithQueriesTest(CommonTests, unittest.TestCase):
    pass


class WithoutQueriesTest(CommonTests, unittest.TestCase):
    queries = False
    test_all_params_have_gradient = False  # those of the query encoder and its projections do not
