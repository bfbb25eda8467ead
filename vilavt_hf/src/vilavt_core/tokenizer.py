"""A checkpoint's tokenizer without transformers: its ``tokenizer.json``, read by the library `tokenizers`; and one that
several threads share."""

from __future__ import annotations

from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from .errors import CheckpointError

if TYPE_CHECKING:
    from .conversation import Tokenizer

FILE = "tokenizer.json"


class FileTokenizer:
    """What an `Episode` and the renderer of training data need of a tokenizer; gives the ids that transformers gives.

    Args:
        folder: a checkpoint.

    Raises:
        CheckpointError: it has no readable ``tokenizer.json``.
    """

    def __init__(self, folder: str | Path) -> None:
        from tokenizers import Tokenizer

        path = Path(folder) / FILE
        if not path.is_file():
            raise CheckpointError(
                f"{folder}: no {FILE}; AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r}) "
                "writes it from the tokenizer's other files"
            )
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise CheckpointError(f"{path}: not a tokenizer: {error}") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    def encode(self, text: str, *, add_special_tokens: bool = False, split_special_tokens: bool = False) -> list[int]:
        """Text to ids.

        Args:
            text: what to encode.
            add_special_tokens: add what the tokenizer's template adds.
            split_special_tokens: encode special tokens in the text as ordinary text.
        """
        self._tokenizer.encode_special_tokens = split_special_tokens
        return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(
        self, token_ids: Any, *, skip_special_tokens: bool = False, clean_up_tokenization_spaces: bool = False
    ) -> str:
        """Ids to text.

        Raises:
            ValueError: `clean_up_tokenization_spaces`: decoded text has its spaces as they are.
        """
        if clean_up_tokenization_spaces:
            raise ValueError("FileTokenizer does not support clean_up_tokenization_spaces=True")
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens))

    def convert_tokens_to_ids(self, tokens: str) -> int | None:
        """Id of one token; None if there is no such token."""
        found = self._tokenizer.token_to_id(tokens)
        return None if found is None else int(found)

    def get_vocab(self) -> dict[str, int]:
        """Ids of all tokens, added ones included."""
        return dict(self._tokenizer.get_vocab(with_added_tokens=True))

    def __len__(self) -> int:
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))


class SharedTokenizer:
    """A tokenizer that several threads use, one at a time: whether special tokens in a text count is a state of the
    library's object, so that two threads could get each other's ids.

    Args:
        tokenizer: not used by anybody else meanwhile.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer, self._lock = tokenizer, Lock()
        self.unk_token_id = getattr(tokenizer, "unk_token_id", None)

    def __reduce__(self) -> tuple[type[SharedTokenizer], tuple[Tokenizer]]:
        return SharedTokenizer, (self._tokenizer,)  # a lock stays in its process

    def encode(self, text: str, *, add_special_tokens: bool = False, split_special_tokens: bool = False) -> list[int]:
        """Text to ids."""
        with self._lock:
            return self._tokenizer.encode(
                text, add_special_tokens=add_special_tokens, split_special_tokens=split_special_tokens
            )

    def decode(
        self, token_ids: Any, *, skip_special_tokens: bool = False, clean_up_tokenization_spaces: bool = False
    ) -> str:
        """Ids to text."""
        with self._lock:
            return self._tokenizer.decode(
                token_ids,
                skip_special_tokens=skip_special_tokens,
                clean_up_tokenization_spaces=clean_up_tokenization_spaces,
            )

    def convert_tokens_to_ids(self, tokens: str) -> int | None:
        """Id of one token."""
        with self._lock:
            return self._tokenizer.convert_tokens_to_ids(tokens)

    def get_vocab(self) -> dict[str, int]:
        """Ids of all tokens."""
        with self._lock:
            return self._tokenizer.get_vocab()
