"""A checkpoint onto the hub: what would go there, and the upload, as one commit."""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import CheckpointError
from ..failures import one_line
from .card import CARD, Score, card_text
from .layout import ADAPTER_CONFIG, PARTIAL, REPLACED
from .verdict import require_vilavt

PICKLES = ("*.pt", "*.pth", "*.bin", "*.pkl", "*.pickle", "*.ckpt")
"""Files that run code when they are loaded; a trainer leaves its optimiser's states in them."""


@dataclass(frozen=True)
class Upload:
    """What goes to the hub."""

    folder: Path
    files: tuple[tuple[str, int], ...]
    """Name inside the folder and bytes, sorted; the card is among them."""
    left_out: tuple[str, ...]
    """Files of the folder that stay: pickles, hidden and unfinished files."""
    card: str
    """Text of ``README.md``."""

    @property
    def nbytes(self) -> int:
        """Of all files."""
        return sum(size for _, size in self.files)


def plan_upload(checkpoint: str | os.PathLike, scores: Sequence[Score] = ()) -> Upload:
    """What `push_to_hub` would send; nothing is written.

    Args:
        checkpoint: folder of a complete checkpoint or of an adapter.
        scores: for the card.

    Raises:
        CheckpointError: the folder is no checkpoint, lacks something, or has no provenance to make a card of.
    """
    folder = Path(checkpoint)
    if not (folder / ADAPTER_CONFIG).is_file():
        require_vilavt(folder, sft=True)
    card = card_text(folder, scores)
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    stay = [name for name in names if _stays(name)]
    sizes = {name: (folder / name).stat().st_size for name in names if name not in stay}
    sizes[CARD] = len(card.encode())
    return Upload(folder, tuple(sorted(sizes.items())), tuple(stay), card)


def push_to_hub(
    upload: Upload,
    repository: str,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str = "Upload a ViLaVT checkpoint",
) -> str:
    """Send a checkpoint to the hub in one commit, so that it is there whole or not at all.

    The repository is made if there is none. Who you are is what ``hf auth login`` or ``HF_TOKEN`` says.

    Args:
        upload: of `plan_upload`.
        repository: hub id, ``owner/name``.
        private: whether a repository that is made is private; one that is there stays as it is.
        revision: branch; None: the main one.
        message: of the commit.

    Returns:
        The commit's URL.

    Raises:
        CheckpointError: no hub id, or the hub refuses.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    check_repository(repository)
    api = HfApi(library_name="vilavt-hf")
    operations = [
        CommitOperationAdd(name, upload.card.encode() if name == CARD else str((upload.folder / name).resolve()))
        for name, _ in upload.files
    ]
    try:
        api.create_repo(repository, private=private or None, exist_ok=True)
        if revision is not None:
            api.create_branch(repository, branch=revision, exist_ok=True)
        return str(api.create_commit(repository, operations, commit_message=message, revision=revision).commit_url)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{repository}: the hub did not take the checkpoint: {one_line(error)}; log in with `hf auth login` as "
            "somebody who may write there, and check the network"
        ) from None


def check_repository(repository: str) -> None:
    """Refuse what is no hub id of a repository of one's own, ``owner/name``.

    Raises:
        CheckpointError: as said.
    """
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
        owner, _, name = repository.partition("/")
        if not owner or not name:
            raise ValueError("the owner is missing")
    except ValueError as error:
        raise CheckpointError(f"{repository!r} is no hub id: {one_line(error)}; write OWNER/NAME") from None


def _stays(name: str) -> bool:
    parts = name.split("/")
    hidden = any(part.startswith(".") or PARTIAL in part or REPLACED in part for part in parts)
    return hidden or any(fnmatch.fnmatch(parts[-1].lower(), pattern) for pattern in PICKLES)
