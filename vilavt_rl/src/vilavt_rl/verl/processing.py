"""ViLaVT's processor as verl calls it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, BatchFeature

from vilavt_hf import VilavtProcessor
from vilavt_hf.call_settings import check_known
from vilavt_hf.positions import mrope_positions

from ..run_settings import noted_settings


class VerlVilavtProcessor(VilavtProcessor):
    """Turns an episode's images and queries into model inputs, and computes positions as the model does.

    verl asks its processor twice: with the images of a trajectory (and the queries, through ``mm_processor_kwargs``),
    and for M-RoPE positions. The text it passes along has lost its image placeholders, so it is not looked at.
    """

    config: Any = None
    """The model's; verl puts it there, too."""

    @property
    def video_token_id(self) -> int | None:
        """verl looks for it beside ``image_token_id`` in every prompt, where it never is."""
        return self.tokenizer.convert_tokens_to_ids("<|video_pad|>")

    def __call__(  # type: ignore[override]  # videos, paddings and the rest travel in kwargs
        self,
        images: Any = None,
        text: Any = None,
        queries: Sequence[str] | None = None,
        images_per_query: Sequence[int] | None = None,
        query_prefix: str | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """The parent's; with `queries` only the images are encoded, at the size they have.

        Returns:
            pixel_values (N, 1176), image_grid_thw (n, 3), query_ids and query_attention_mask (Q, T) with T the same
            for every trajectory, images_per_query (Q,): all of them can be concatenated over samples.

        Raises:
            ProcessorError: an argument that has no effect beside `queries`.
        """
        if queries is None:
            return super().__call__(images=images, text=text, **kwargs)
        given = {name for name, value in kwargs.items() if value is not None}
        check_known(given, {"return_tensors"}, "with queries: ")
        encoded = self.image_processor(images=list(images), return_tensors="pt", do_resize=False)
        ids, mask = self.tokenize_queries(queries, query_prefix)
        return BatchFeature(
            {
                "pixel_values": encoded["pixel_values"],
                "image_grid_thw": encoded["image_grid_thw"],
                "query_ids": ids,
                "query_attention_mask": mask,
                "images_per_query": torch.tensor(list(images_per_query or [])),
            }
        )

    def get_rope_index(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        image_grid_thw: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """M-RoPE positions (3, 1, L) of one trajectory (1, L), padded on either side; padding gets 1."""
        real = attention_mask[0].bool()
        merge = self.image_processor.merge_size
        grids = [] if image_grid_thw is None else (image_grid_thw[:, 1:] // merge).tolist()
        positions = torch.ones(3, *input_ids.shape, dtype=torch.long)
        positions[:, 0, real] = mrope_positions(input_ids[0, real].tolist(), grids, self.config.image_token_id)
        return positions, None

    def to_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Checkpoints that verl saves name the public class."""
        return {**super().to_dict(*args, **kwargs), "processor_class": VilavtProcessor.__name__}

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """The parent's; in the folder of a run with how its episodes ran, see `vilavt_rl.run_settings`."""
        written = super().save_pretrained(save_directory, *args, **kwargs)
        if (noted := noted_settings(Path(save_directory))) is not None:
            noted.save(save_directory)
        return written


def load_processor(path: str, **kwargs: Any) -> VerlVilavtProcessor | None:
    """The processor of a ViLaVT checkpoint, or None if the checkpoint is another model's."""
    config = AutoConfig.from_pretrained(path, **{"trust_remote_code": False, **kwargs})
    if config.model_type != "vilavt":
        return None
    processor = VerlVilavtProcessor.from_pretrained(path)
    processor.config = config
    return processor
