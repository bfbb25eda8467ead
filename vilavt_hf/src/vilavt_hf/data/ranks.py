"""Which process this is, among those that torchrun started."""

import torch


def rank_and_world() -> tuple[int, int]:
    """This process's number and how many there are; (0, 1) outside of a distributed run."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def all_agree(mine: bool) -> bool:
    """Whether all processes say so; each has to ask. A file, say, need not be visible everywhere at the same time."""
    _, world = rank_and_world()
    if world == 1:
        return mine
    answers = [False] * world
    torch.distributed.all_gather_object(answers, mine)
    return all(answers)
