"""What a training record may be: the published annotation, or an episode record of ours.

A published record (``conversations``) spells out every turn, prompts included, and usually lists the crops as files. An
episode record (``turns``) holds what the model said; prompts come from the checkpoint and crops are cut from the
boxes, so that it trains on exactly the tokens that chat, serving and RL produce. `docs/data.md` shows both.
"""

import difflib
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ..errors import DataError
from ..sources import Video
from ..validation import problems

ROLES = {"human": "user", "gpt": "assistant"}
"""Names of roles in published records -> names in the chat format; others stay."""


_UNHEEDED = {
    "min_pixels": "set data.min_pixels of the run",
    "resized_height": "give max_pixels",
    "resized_width": "give max_pixels",
    "system": "make it the first of conversations, from system",
    "tools": "write them into the system turn",
    "max_turns": "it is a key of episode records, which have turns",
    "train": "mask_history says which turns are not trained, or turns of an episode record do",
    "loss": "mask_history says which turns are not trained, or turns of an episode record do",
    "weight": "mask_history says which turns are not trained, or turns of an episode record do",
}
"""Keys of other tools that would change how a record is trained, and what says the same here."""


def _refuse_unused(value: dict[str, Any], known: Iterable[str]) -> None:
    """Stop at keys of a published record that are meant to change something and do not; other data beside it may stay.

    Raises:
        ValueError: names them and the remedy.
    """
    names = sorted(known)
    for key in sorted(set(map(str, value)) - set(names)):
        if key in _UNHEEDED and value[key] is not None:
            raise ValueError(f"{key} has no effect here: {_UNHEEDED[key]}")
        if meant := difflib.get_close_matches(key, names, 1, cutoff=0.85):
            raise ValueError(f"the key {key} is unknown; did you mean {meant[0]}?")


def _checked_video(entry: Any) -> Any:
    Video.of(entry)
    return entry


VideoEntries = list[Annotated[str | dict[str, Any], AfterValidator(_checked_video)]]
"""Entries that `Video.of` takes."""


class PublishedTurn(BaseModel):
    """One turn of a published record, as ``{from, value}`` or ``{role, content}``."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    role: str = Field(description="system, user (or human), assistant (or gpt)")
    content: str = Field(description="text; <image> in a user turn stands for the next image")

    @model_validator(mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        if isinstance(value, dict):
            _refuse_unused(value, ("from", "value", "role", "content"))
        if isinstance(value, dict) and "from" in value:
            return {"role": value["from"], "content": value.get("value")}
        return value

    @field_validator("role")
    @classmethod
    def _role(cls, value: str) -> str:
        role = ROLES.get(value, value)
        if role not in ("system", "user", "assistant"):
            raise ValueError(f"unknown role {value!r}; use system, user (human) or assistant (gpt)")
        return role


class PublishedRecord(BaseModel):
    """A record of the published training sets. Other data may stand beside it; a key that is meant to change how the
    record is trained, and does not, is refused, as are misspelt ones."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    id: str | int | None = Field(default=None, description="name in reports")
    images: list[str] = Field(
        default=[],
        description="files of originals and crops, in the order of the <image> marks; relative to the image root",
    )
    videos: VideoEntries = Field(
        default=[],
        description="video files, in the order of the <video> marks, relative to the image root: paths, or {path, "
        "frames, fps, rule}; or one under the key video",
    )
    conversations: list[PublishedTurn] = Field(min_length=1, description="the turns")
    queries: list[str] | None = Field(
        default=None, description='distinct queries; "" for none; default: one "" per image'
    )
    image_to_query_mapping: list[int] | None = Field(
        default=None, description="for every image the index of its query; default: 0, 1, 2, …"
    )
    max_pixels: float | None = Field(default=None, gt=0, description="most pixels of each image of this record")
    mask_history: int = Field(default=0, ge=0, description="entries of conversations below this index are not trained")

    @model_validator(mode="before")
    @classmethod
    def _media(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        _refuse_unused(value, (*cls.model_fields, "image", "video"))
        if (video := value.get("video")) and value.get("videos"):
            raise ValueError("it has both video and videos; keep the one that lists the files")
        if video:
            value = {**value, "videos": video if isinstance(video, list) else [video]}
        if value.get("image") and not value.get("images"):
            raise ValueError("the key is images (a list), not image")
        return {**value, "images": [value["images"]]} if isinstance(value.get("images"), str) else value


class EpisodeTurn(BaseModel):
    """What the model says in one turn."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    text: str = Field(description="<think>…</think> and a <tool>…</tool> call or an <answer>…</answer>")
    train: bool = Field(default=True, description="whether the turn is trained")


class EpisodeRecord(BaseModel):
    """A conversation as the model sees it: images, a question, and what it should say."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str | int | None = Field(default=None, description="name in reports")
    images: list[str] = Field(
        default=[], description="source images, relative to the image root; frames of a video are images"
    )
    videos: VideoEntries = Field(
        default=[],
        description="video files, relative to the image root, shown after the images: paths, or {path, frames, fps, "
        "rule}",
    )
    question: str = Field(description="the user's text")
    turns: list[EpisodeTurn] = Field(
        min_length=1, description="assistant turns, as text or as {text, train}; the last answers"
    )
    max_pixels: float | None = Field(
        default=None, gt=0, description="overrides the limit of the run, for originals and crops"
    )
    max_turns: int | None = Field(default=None, ge=1, description="overrides the limit of the run; 1 offers no zoom")

    @field_validator("turns", mode="before")
    @classmethod
    def _texts(cls, value: Any) -> Any:
        return (
            [{"text": turn} if isinstance(turn, str) else turn for turn in value] if isinstance(value, list) else value
        )


TrainingRecord = PublishedRecord | EpisodeRecord
RecordKind = Literal["published", "episode"]


def read_record(data: Any, sample: str) -> TrainingRecord:
    """Validate one record.

    Args:
        data: parsed JSON.
        sample: names it in errors.

    Raises:
        DataError: neither schema fits; names the sample and every field that is wrong.
    """
    if not isinstance(data, dict):
        raise DataError(f"{sample}: a record is a JSON object, this is a {type(data).__name__}", "schema")
    if "conversations" in data:
        schema: type[PublishedRecord] | type[EpisodeRecord] = PublishedRecord
    elif "turns" in data:
        schema = EpisodeRecord
    else:
        raise DataError(
            f"{sample}: neither conversations (published) nor turns (episode) among {sorted(data)}", "schema"
        )
    try:
        return schema.model_validate(data)
    except ValidationError as error:
        raise DataError(f"{sample}: {problems(error)}", "schema") from None
