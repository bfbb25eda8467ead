"""ViLaVT's RL data as a verl dataset (``data.custom_cls``)."""

from __future__ import annotations

import logging
from typing import Any

import torch
from PIL import Image
from torch.utils.data import Dataset

from vilavt_hf.episode import Episode

from ..data import Row, read_rows
from ..errors import DataError
from ..rollout import settings_of

logger = logging.getLogger(__name__)


class VilavtDataset(Dataset):
    """Rows for :class:`vilavt_rl.verl.agent_loop.VilavtAgentLoop`; images stay on disk until an episode needs them.

    Args:
        data_files: see :func:`vilavt_rl.data.read_rows`.
        tokenizer: verl's; tells where the checkpoint is.
        processor: verl's, not used.
        config: verl's ``data`` section. With ``filter_overlong_prompts`` rows whose first turn exceeds
            ``max_prompt_length`` are left out; only the headers of their images are read.
        max_samples: keep that many, the first; -1: all.

    Raises:
        DataError: a row is broken, or none is left.
    """

    def __init__(
        self, data_files: Any, tokenizer: Any, config: Any, processor: Any = None, max_samples: int = -1
    ) -> None:
        files = [data_files] if isinstance(data_files, str) else list(data_files)
        rows = read_rows(files)
        if max_samples > 0:
            rows = rows[:max_samples]
        if config.get("filter_overlong_prompts", False):
            kept = [row for row in rows if _prompt_length(row, tokenizer) <= config.max_prompt_length]
            if len(kept) < len(rows):
                logger.warning(
                    "%d of %d rows are left out: their first turn has more than max_prompt_length=%d tokens",
                    len(rows) - len(kept),
                    len(rows),
                    config.max_prompt_length,
                )
            rows = kept
        if not rows:
            raise DataError(f"{', '.join(map(str, files))}: no row is left")
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """What verl hands to the agent loop and the reward of a row."""
        row = self.rows[index]
        return {
            "raw_prompt": [{"role": "user", "content": row.question}],
            "dummy_tensor": torch.tensor([0], dtype=torch.uint8),
            "index": index,
            "data_source": row.data_type or "vilavt",
            "reward_model": {"style": "rule", "ground_truth": row.answer},
            "extra_info": {"index": index, "question_type": row.question_type, "data_type": row.data_type},
            "row": row.to_json(),
        }


def _prompt_length(row: Row, tokenizer: Any) -> int:
    """Tokens of the first turn, from the sizes of the images alone."""
    settings = settings_of(tokenizer.name_or_path, None, ())
    limits = settings.preset.with_limits(max_pixels=row.max_pixels or settings.limits.max_pixels).limits
    sizes = []
    for path in row.images:
        with Image.open(path) as image:
            sizes.append(image.size)
    blank = [Image.new("RGB", size) for size in sizes]
    episode = Episode.start(
        blank,
        row.question,
        tokenizer=settings.tokenizer,
        prompts=settings.prompts,
        preset=settings.preset,
        limits=limits,
    )
    return len(episode.record.token_ids)
