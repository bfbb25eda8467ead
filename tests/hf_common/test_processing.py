"""transformers' own tests of a processor on ours: `nox -s hf_common`."""

import unittest

from family import byte_tokenizer
from transformers_tests.test_processing_common import ProcessorTesterMixin

from vilavt_hf import VilavtProcessor, compat


class VilavtProcessorTest(ProcessorTesterMixin, unittest.TestCase):
    processor_class = VilavtProcessor

    @classmethod
    def _setup_image_processor(cls):
        return compat.PilImageProcessor(min_pixels=28 * 28, max_pixels=56 * 56)

    @classmethod
    def _setup_tokenizer(cls):
        return byte_tokenizer()

    @classmethod
    def prepare_processor_dict(cls):
        return {"query_tokenizer": byte_tokenizer()}

    @unittest.skip("it downloads pictures")
    def test_processor_text_has_no_visual(self):
        pass
