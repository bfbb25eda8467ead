"""Which process this is, among those that torchrun started."""

from typing import TypeVar

import torch

Value = TypeVar("Value")


def rank_and_world() -> tuple[int, int]:
    """This process's number and how many there are; (0, 1) outside of a distributed run."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def gathered(mine: Value) -> list[Value]:
    """What every process has, by rank; each has to ask."""
    _, world = rank_and_world()
    if world == 1:
        return [mine]
    everyone: list[Value] = [mine] * world
    torch.distributed.all_gather_object(everyone, mine)
    return everyone


def all_agree(mine: bool) -> bool:
    """Whether all processes say so; each has to ask. A file, say, need not be visible everywhere at the same time."""
    return all(gathered(mine))
