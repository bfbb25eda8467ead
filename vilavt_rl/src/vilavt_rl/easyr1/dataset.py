"""ViLaVT's RL data for EasyR1's loader: rows that become episodes where they are rolled out."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import Dataset

from ..data import read_rows


class VilavtDataset(Dataset):
    """One item per row of the data files, see :func:`vilavt_rl.data.read_rows`.

    The prompt tensors that EasyR1 expects are empty: the rollout makes them, from the episode.
    """

    def __init__(self, data_files: str | list[str]) -> None:
        self.rows = read_rows(data_files)

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
