"""ViLaVT's RL data as a verl dataset (``data.custom_cls``)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml
from torch.utils.data import Dataset

from vilavt_core.driver import ConversationSettings

from ..data import read_rows
from ..errors import RowError
from ..rollout import cached_settings, fitting_rows

LOOP = "vilavt"
"""Name of our agent loop in its configuration."""


class VilavtDataset(Dataset):
    """Rows for `vilavt_rl.verl.agent_loop.VilavtAgentLoop`; images stay on disk until an episode needs them.

    Args:
        data_files: see `vilavt_rl.data.read_rows`.
        tokenizer: verl's; tells where the checkpoint is.
        processor: verl's, not used.
        config: verl's ``data`` section. With ``filter_overlong_prompts`` rows whose first turn exceeds
            ``max_prompt_length`` are left out; only the headers of their images are read. ``agent_loop_config_path``,
            a key of ours, names the agent loop's configuration: its preset and limits decide how long a turn is.
        max_samples: keep that many, the first; -1: all.

    Raises:
        DataError: a row is broken, none is left, or the agent loop's configuration has no ``vilavt``.
        ImageError: with the filter, an image is none, or has a refused shape.
    """

    def __init__(
        self, data_files: Any, tokenizer: Any, config: Any, processor: Any = None, max_samples: int = -1
    ) -> None:
        rows = read_rows(data_files if isinstance(data_files, str) else list(data_files))
        if max_samples > 0:
            rows = rows[:max_samples]
        if config.get("filter_overlong_prompts", False):
            settings = _settings(tokenizer, config.get("agent_loop_config_path"))
            rows = fitting_rows(rows, settings, config.max_prompt_length)
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
            "extra_info": {
                "index": index,
                "question_type": row.question_type,
                "data_type": row.data_type,
                "options": list(row.options),
            },
            "row": row.to_json(),
        }


def _settings(tokenizer: Any, loop_config: str | None) -> ConversationSettings:
    """What the agent loop runs episodes with, read from the file that configures it; None: the checkpoint's own."""
    if loop_config is None:
        return cached_settings(tokenizer.name_or_path, None, ())
    from verl.utils.import_utils import resolve_config_path

    path = Path(resolve_config_path(loop_config))
    loops = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    loop = next((loop for loop in loops if loop["name"] == LOOP), None)
    if loop is None:
        raise RowError(f"{path}: no agent loop is called {LOOP!r}, there are {[loop['name'] for loop in loops]}")
    return cached_settings(
        tokenizer.name_or_path, loop.get("preset"), tuple(sorted((loop.get("limits") or {}).items()))
    )
