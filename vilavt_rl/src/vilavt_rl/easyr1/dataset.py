"""ViLaVT's RL data for EasyR1's loader: rows that become episodes where they are rolled out."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import Dataset

from vilavt_core.driver import ConversationSettings

from ..data import read_rows
from ..rollout import fitting_rows


class EasyR1Dataset(Dataset):
    """One item per row of the data files, see `vilavt_rl.data.read_rows`.

    The prompt tensors that EasyR1 expects are empty: the rollout makes them, from the episode.

    Args:
        data_files: see `vilavt_rl.data.read_rows`.
        config: EasyR1's ``data`` section. With ``filter_overlong_prompts`` rows whose first turn exceeds
            ``max_prompt_length`` are left out; the rollout would end the run at the first of them.
        episodes: what the rollout starts episodes with.

    Raises:
        DataError: a row is broken, or none is left.
        ImageError: with the filter, an image is none, or has a refused shape.
    """

    def __init__(self, data_files: str | list[str], config: Any, episodes: ConversationSettings) -> None:
        self.rows = read_rows(data_files)
        if config.filter_overlong_prompts:
            self.rows = fitting_rows(self.rows, episodes, config.max_prompt_length)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """What EasyR1's trainer splits into a generation batch and the rest."""
        row = self.rows[index]
        nothing = torch.zeros(1, dtype=torch.long)
        return {
            "input_ids": nothing,
            "attention_mask": nothing,
            "position_ids": nothing,
            "raw_prompt_ids": [],
            "multi_modal_data": {"row": row.to_json()},
            "ground_truth": row.answer,
            "row": row.to_json(),
        }
