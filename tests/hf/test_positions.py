"""M-RoPE positions that need no model, against the method of transformers' model."""

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vilavt_hf import compat
from vilavt_hf.positions import mrope_positions


def test_positions_of_text_after_an_image_continue_from_its_longer_side():
    positions = mrope_positions([5, 9, 9, 9, 9, 9, 9, 5], [(2, 3)], image_token_id=9)
    assert positions.tolist() == [
        [0, 1, 1, 1, 1, 1, 1, 4],
        [0, 1, 1, 1, 2, 2, 2, 4],
        [0, 1, 2, 3, 1, 2, 3, 4],
    ]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(1, 5), st.integers(1, 5)), max_size=4), st.integers(0, 3))
def test_positions_without_a_model_are_those_of_the_model_s_own_method(tiny_model, images, text_after):
    """`images`: tokens of text before each, its height and width in merged tokens."""
    config = tiny_model.config
    image, merge = config.image_token_id, config.vision_config.spatial_merge_size
    start, end = config.vision_start_token_id, config.vision_end_token_id  # older versions count images by the first
    ids = [token for before, h, w in images for token in [5] * before + [start] + [image] * (h * w) + [end]]
    ids += [5] * text_after
    grids = [(h, w) for _, h, w in images]
    if not ids:
        return
    grid = torch.tensor([(1, h * merge, w * merge) for h, w in grids]) if grids else None
    expected = compat.rope_index(tiny_model.model, torch.tensor(ids), grid)
    assert torch.equal(mrope_positions(ids, grids, image), expected)
