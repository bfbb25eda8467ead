"""Conversations that clients keep: with which key their states are signed, and which ones are read."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from typing import Any

from vilavt_core.driver import ConversationSettings, Driver
from vilavt_core.errors import StateError
from vilavt_core.state import VERSION, AskedQuestion, ConversationState, StateKey, check_origin

from .metrics import metrics
from .options import ServerOptions

logger = logging.getLogger(__name__)

KEY_VARIABLE = "VILAVT_STATE_KEY"


class States:
    """Signs and reads the states of one server.

    Args:
        options: name the key's file, and how old a state may be.

    Raises:
        StateError: there is no key where one is named, it is named twice, or no state could be young enough.
    """

    def __init__(self, options: ServerOptions) -> None:
        self.max_age = options.state_max_age
        if self.max_age is not None and not self.max_age > 0:
            raise StateError(f"--state-max-age is {self.max_age:g}, it must be above 0; leave it out for any age")
        file, word = options.state_key_file, os.environ.get(KEY_VARIABLE)
        if file is not None and word is not None:
            raise StateError(f"the key for states is named twice, by --state-key-file and {KEY_VARIABLE}; name it once")
        self.shared = file is not None or word is not None
        if file is not None:
            self.key = StateKey.from_file(file)
        elif word is not None:
            self.key = _key_of_environment(word)
        else:
            self.key = StateKey.fresh()
            logger.warning(
                "vilavt.state of answers is signed with a key of this process alone: no other replica, nor this one "
                "after a restart, continues a conversation from it; give all of them one key (--state-key-file, %s)",
                KEY_VARIABLE,
            )

    def to_json(self) -> dict[str, Any]:
        """By which replicas and clients see whether states of one are read by another."""
        return {"version": VERSION, "key": self.key.name, "shared": self.shared, "max_age": self.max_age}

    def read(self, text: str, settings: ConversationSettings) -> ConversationState:
        """A state out of a request for these settings.

        Raises:
            StateError: it is not one of this server, or of others like it.
        """
        state = self.key.read(text, max_age=self.max_age, now=time.time())
        check_origin(state, settings)
        return state

    def made(
        self, driver: Driver, before: Sequence[AskedQuestion], answer: str | None
    ) -> tuple[ConversationState, str | None]:
        """The state after a finished question, and what its client gets; None: it is too large to be sent.

        Args:
            driver: of the question.
            before: earlier questions of its conversation.
            answer: as its client gets it.
        """
        state = ConversationState.of(driver, [*before, AskedQuestion.of(driver, answer)], int(time.time()))
        try:
            text = self.key.sign(state)
        except StateError as error:
            logger.warning("an answer goes out without vilavt.state: %s", error)
            return state, None
        metrics().states.observe(len(text))
        return state, text


def _key_of_environment(word: str) -> StateKey:
    try:
        return StateKey(word.strip().encode())
    except StateError as error:
        raise StateError(f"{KEY_VARIABLE}: {error}") from None
