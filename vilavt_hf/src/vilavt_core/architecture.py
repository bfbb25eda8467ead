"""What the model is made of: the parts that can be frozen, trained or have a learning rate of their own."""

from typing import Literal, get_args

Part = Literal["vision_tower", "merger", "text_encoder", "text_proj", "language_model", "lm_head", "auxiliary"]
PARTS: tuple[Part, ...] = get_args(Part)

_MARKS: tuple[tuple[str, Part], ...] = (
    ("auxiliary.", "auxiliary"),
    ("visual.merger.", "merger"),
    ("visual.", "vision_tower"),
    ("text_encoder.", "text_encoder"),
    ("text_proj.", "text_proj"),
    ("lm_head.", "lm_head"),
    ("language_model.", "language_model"),
)


def part_of(parameter: str) -> Part:
    """The part that a parameter belongs to, by its name in the model or in any wrapper of it.

    ``vision_tower`` is the tower without its merger, query projections included.
    """
    for mark, part in _MARKS:
        if parameter.startswith(mark) or f".{mark}" in parameter:
            return part
    raise ValueError(f"{parameter} belongs to none of {PARTS}")
