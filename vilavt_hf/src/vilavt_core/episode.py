"""One conversation as a state machine without input or output: requests out, sampled tokens in.

The same object drives chat, serving, evaluation and RL. It never decodes and re-encodes what the model sampled: the
stream of token ids only grows. An engine asks `Episode.next_request`, samples, and gives the ids back with
`Episode.feed`, until the request is None; then `Episode.result` and `Episode.record` are there.
An episode is used once.

What an engine must keep: the ids it feeds include the stop token it ended on; ids of vision placeholders are never
sampled (they are in ``Request.banned_token_ids``); at most ``Request.max_new_tokens`` ids come back.

Loss mask: 1 for exactly the fed tokens, the ``<|im_end|>`` the model sampled included; 0 for prompts, images, tool
responses, and for an ``<|im_end|>`` that the episode had to add.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from PIL import Image

from .conversation import (
    Chunk,
    FedTurn,
    ImageSpan,
    Inquiry,
    Mark,
    Record,
    Request,
    Result,
    ShownImage,
    SpecialTokens,
    Tokenizer,
    TokenStream,
    Turn,
    Usage,
    compose,
    text_problem,
)
from .errors import EpisodeError, ImageError, RegionError
from .images import to_rgb
from .presets import Limits, Preset, get_preset
from .prompts import PromptPart, PromptSet
from .protocol import (
    RESPONSE_CLOSE,
    RESPONSE_OPEN,
    Answer,
    FinishReason,
    Malformed,
    ToolCall,
    parse_turn,
)
from .published_rules import rules_of
from .regions import CropPlan, Gallery, Picture, View, smart_resize
from .versions import running_version


class Episode:
    """One conversation, single use; made by `start`, `follow_up` or `fallback`."""

    def __init__(
        self,
        *,
        tokenizer: Tokenizer,
        prompts: PromptSet,
        preset: Preset,
        limits: Limits,
        sample_id: str | None,
        gallery: Gallery,
        stream: TokenStream,
    ) -> None:
        self.preset = preset
        self.limits = limits
        self.prompts = prompts
        self._rules = rules_of(preset, prompts)
        self.sample_id = sample_id
        self.tokenizer = tokenizer
        self.special = SpecialTokens.of(tokenizer)
        self._gallery = gallery
        self._stream = stream
        self._turns: list[Turn] = []
        self._fed: list[FedTurn] = []
        self._pending: Request | None = None
        self._finish: FinishReason | None = None
        self._answer: str | None = None
        self._detail = ""
        self._asked_to_finish = False
        self._whole_text_answers = False
        self._question = ""
        self._originals: tuple[Picture, ...] = ()

    @classmethod
    def start(
        cls,
        images: Sequence[Image.Image | Picture],
        question: str,
        *,
        tokenizer: Tokenizer,
        prompts: PromptSet | None = None,
        preset: str | Preset = "default",
        limits: Limits | None = None,
        sample_id: str | None = None,
        gallery: Gallery | None = None,
    ) -> Episode:
        """Begin a conversation.

        Args:
            images: source images, RGB, at full resolution (`vilavt_core.images.load_image` makes them), alone
                or with their names, times, and bounds on their pixels within the limits.
            question: the user's text; special tokens in it stay text.
            tokenizer: has Qwen's special tokens.
            prompts: wording; None: the built-in ``default``.
            preset: name or value.
            limits: budgets; None: the preset's.
            sample_id: named in errors and in the result.
            gallery: empty; cuts and keeps the images. None: an ordinary one.

        Returns:
            An episode. If the first turn already breaks a budget it is finished (``image_limit`` or
            ``context_limit``) with an empty stream.

        Raises:
            ImageError: an image has a refused shape.
            EpisodeError: not an image, an unknown preset, or a tokenizer without the special tokens.
        """
        preset = get_preset(preset)
        limits = limits or preset.limits
        episode = cls(
            tokenizer=tokenizer,
            prompts=prompts or PromptSet.load("default"),
            preset=preset,
            limits=limits,
            sample_id=sample_id,
            gallery=Gallery(min_pixels=limits.min_pixels) if gallery is None else gallery,
            stream=TokenStream(),
        )
        special = episode.special
        episode._open(
            images,
            question,
            [Mark(special.im_start), "system\n", *episode.prompts.render("system"), Mark(special.im_end), "\n"],
            "start",
        )
        return episode

    def follow_up(
        self, question: str, images: Sequence[Image.Image | Picture] = (), *, limits: Limits | None = None
    ) -> Episode:
        """A new episode that continues this finished one's stream and images, with a fresh turn count.

        Its first request's ``new_token_ids`` hold only what the engine has not seen, so an engine that kept its
        cache goes on from there.

        Raises:
            EpisodeError: this episode is still running, or never had a turn.
        """
        if self._finish is None:
            raise EpisodeError(
                f"{self._name}: still running at turn {len(self._turns)}; feed it until next_request() is None"
            )
        if not self._stream.tokens:
            raise EpisodeError(f"{self._name}: it ended before its first turn ({self._detail}); start a new episode")
        limits = limits or self.limits
        episode = Episode(
            tokenizer=self.tokenizer,
            prompts=self.prompts,
            preset=self.preset,
            limits=limits,
            sample_id=self.sample_id,
            gallery=self._gallery.fork(),
            stream=self._stream.fork(),
        )
        episode._open(images, question, episode._turn_end(), "follow_up")
        return episode

    def fallback(self) -> Episode | None:
        """The forced-answer conversation of presets that have one: the original images, a plain question, one turn.

        Returns:
            None if the preset has none, an answer was found, or no token of ``max_answer_tokens`` is left. An answer
            tag is not needed in it: without one the whole text counts.
        """
        left = self._tokens_left()
        if self._finish is None or self._answer is not None or not self.preset.forced_answer or left == 0:
            return None
        preset = replace(self.preset, budget_split="per_image", sizes="first", interleave=False, forced_answer=False)
        limits = replace(self.limits, max_turns=1, max_answer_tokens=left)
        episode = Episode(
            tokenizer=self.tokenizer,
            prompts=self.prompts,
            preset=preset,
            limits=limits,
            sample_id=self.sample_id,
            gallery=Gallery(min_pixels=limits.min_pixels),
            stream=TokenStream(),
        )
        episode._whole_text_answers = True
        special = self.special
        system = [
            Mark(special.im_start),
            "system\n",
            *self.prompts.render("fallback_system"),
            Mark(special.im_end),
            "\n",
        ]
        episode._open(self._originals, self._question, system, "fallback")
        return episode

    @property
    def finished(self) -> bool:
        """Whether no request is left."""
        return self._finish is not None

    @property
    def finish(self) -> FinishReason | None:
        """Why it ended; None while it runs."""
        return self._finish

    @property
    def turns(self) -> tuple[Turn, ...]:
        """Assistant turns of this episode so far."""
        return tuple(self._turns)

    @property
    def fed(self) -> tuple[FedTurn, ...]:
        """What `feed` was given for each of these turns: with it the episode can be gone through again."""
        return tuple(self._fed)

    @property
    def views(self) -> tuple[View, ...]:
        """All images shown so far, in conversation order."""
        return tuple(self._gallery.views)

    @property
    def gallery(self) -> Gallery:
        """The images with their sources and lineage."""
        return self._gallery

    @property
    def inquiries(self) -> tuple[Inquiry, ...]:
        """All inquiries so far, in stream order."""
        return tuple(self._stream.inquiries)

    @property
    def transcript(self) -> str:
        """The conversation as text, special tokens spelled out, an image as ``<image WxH>``."""
        return "".join(self._stream.transcript)

    @property
    def record(self) -> Record:
        """The stream with its loss mask; may be read at any time."""
        stream = self._stream
        return Record(
            list(stream.tokens), list(stream.mask), list(stream.logprobs), tuple(stream.spans), tuple(stream.inquiries)
        )

    @property
    def result(self) -> Result:
        """The outcome.

        Raises:
            EpisodeError: the episode is still running.
        """
        if self._finish is None:
            raise EpisodeError(
                f"{self._name}: still running at turn {len(self._turns)}; feed it until next_request() is None"
            )
        stream = self._stream
        sampled = sum(stream.mask)
        usage = Usage(
            prompt_tokens=len(stream.tokens) - sampled,
            sampled_tokens=sampled,
            image_tokens=sum(span.length for span in stream.spans),
            images=len(self._gallery),
            turns=len(self._turns),
        )
        return Result(
            answer=self._answer,
            finish=self._finish,
            detail=self._detail,
            turns=tuple(self._turns),
            images=self._shown_images(),
            inquiries=tuple(stream.inquiries),
            views=tuple(self._gallery.views),
            usage=usage,
            preset=self.preset.name,
            limits=self.limits,
            prompts=self.prompts.name,
            prompts_sha256=self.prompts.sha256,
            versions={"vilavt_hf": running_version("vilavt-hf") or "unknown"},
            sample_id=self.sample_id,
        )

    def _shown_images(self) -> tuple[ShownImage, ...]:
        query_of = {index: one.query for one in self._stream.inquiries for index in one.image_indices}
        return tuple(ShownImage.of(i, view, query_of[i]) for i, view in enumerate(self._gallery.views))

    def next_request(self) -> Request | None:
        """What to sample next, or None when the episode is over. Asking again without feeding gives the same
        request."""
        if self._finish is not None:
            return None
        if self._pending is None:
            stream = self._stream
            bounds = (self.limits.max_new_tokens_per_turn, self._room(), self._tokens_left())
            self._pending = Request(
                new_token_ids=stream.tokens[stream.sent :],
                all_token_ids=list(stream.tokens),
                new_inquiries=tuple(stream.inquiries[stream.sent_inquiries :]),
                inquiries=tuple(stream.inquiries),
                max_new_tokens=min(bound for bound in bounds if bound is not None),
                stop_token_ids=self.special.stops,
                banned_token_ids=self.special.banned,
                turn=len(self._turns),
            )
        return self._pending

    def feed(
        self,
        token_ids: Sequence[int],
        *,
        logprobs: Sequence[float] | None = None,
        finish: Literal["stop", "length"] = "stop",
        seconds: float | None = None,
        computed: bool = True,
    ) -> Turn:
        """Take one sampled turn, act on it, and append the reply or end the episode.

        Args:
            token_ids: what was sampled, its stop token included. If ``finish`` is ``stop`` and none is there,
                ``<|im_end|>`` is appended without loss.
            logprobs: one per token.
            finish: why sampling ended; a stop token at the end counts as ``stop`` whatever is said here.
            seconds: time it took, for the record.
            computed: whether the engine has the request's tokens and these in its cache. False (a turn that is known
                without the engine): the next request's ``new_token_ids`` and ``new_inquiries`` hold them too.

        Returns:
            The finished turn.

        Raises:
            EpisodeError: no request is open, or the tokens break the engine's side of the contract; nothing is
                appended then.
        """
        request = self._pending
        where = f"{self._name}, turn {len(self._turns)}"
        if request is None:
            raise EpisodeError(
                f"{where}: feed() without an open request; call next_request() first, it must not be None"
            )
        ids = [int(token) for token in token_ids]
        self._check_fed(ids, logprobs, finish, request, where)
        stream = self._stream
        stopped = bool(ids) and ids[-1] in self.special.stops
        stream.tokens += ids
        stream.mask += [1] * len(ids)
        stream.logprobs += [float(value) for value in logprobs] if logprobs is not None else [None] * len(ids)
        if computed:
            stream.sent = len(stream.tokens)
            stream.sent_inquiries = len(stream.inquiries)
        self._pending = None
        text = self._decode(ids[:-1] if stopped else ids)
        stream.transcript.append(text + (self._decode(ids[-1:]) if stopped else ""))
        if finish == "stop" and not stopped:
            self._append(self._compose([Mark(self.special.im_end)], {}))
        action = parse_turn(text, self.preset.rules)
        turn = Turn(len(self._turns), text, action, len(ids), seconds=seconds)
        if isinstance(action, Answer):
            self._end(FinishReason.ANSWER, "", self._rules.answer(action.text))
        elif self._whole_text_answers:
            self._end(FinishReason.ANSWER, "", self._rules.answer(text.strip()))
        elif finish == "length" and not stopped:
            self._end_cut_off(request)
        elif (problem := self._rules.ending_problem(text)) is not None:
            self._end(FinishReason.MALFORMED, problem)
        else:
            turn = self._act(turn)
        self._turns.append(turn)
        self._fed.append(FedTurn(tuple(ids), finish))
        return turn

    @property
    def _name(self) -> str:
        return "episode" if self.sample_id is None else f"sample {self.sample_id}"

    def _check_fed(
        self, ids: list[int], logprobs: Sequence[float] | None, finish: str, request: Request, where: str
    ) -> None:
        if finish not in ("stop", "length"):
            raise EpisodeError(f"{where}: finish is {finish!r}, it must be 'stop' or 'length'")
        if len(ids) > request.max_new_tokens:
            raise EpisodeError(
                f"{where}: {len(ids)} tokens were fed, the request allows {request.max_new_tokens}; pass "
                "max_new_tokens on"
            )
        if logprobs is not None and len(logprobs) != len(ids):
            raise EpisodeError(
                f"{where}: {len(ids)} tokens but {len(logprobs)} logprobs were fed; give one per token, or none"
            )
        banned = set(request.banned_token_ids)
        for at, token in enumerate(ids):
            if token in banned:
                raise EpisodeError(
                    f"{where}: sampled token {at} is the placeholder id {token}; ban request.banned_token_ids "
                    "when sampling"
                )
            if token in request.stop_token_ids and at != len(ids) - 1:
                raise EpisodeError(
                    f"{where}: stop id {token} is sampled token {at} of {len(ids)}; stop sampling at "
                    "request.stop_token_ids"
                )

    def _open(self, images: Sequence[Image.Image | Picture], question: str, head: list[Any], kind: str) -> None:
        """Check the budgets of the first user turn, then append it."""
        limits, gallery = self.limits, self._gallery
        for i, image in enumerate(images):
            if not isinstance(image, Image.Image | Picture):
                raise EpisodeError(
                    f"{self._name}: image {i} is a {type(image).__name__}; load it with vilavt_core.images.load_image"
                )
        pictures = tuple(replace(picture, image=to_rgb(picture.image)) for picture in map(Picture.of, images))
        self._question, self._originals = question, pictures
        bounded = limits.max_context is not None
        if bounded and self._room() < 1:
            self._end(
                FinishReason.CONTEXT_LIMIT,
                f"the conversation so far has {len(self._stream.tokens)} tokens, at most {limits.max_context} are "
                "allowed; begin a new one, or raise Limits.max_context",
            )
            return
        if bounded and (problem := text_problem(len(question), self._room(), self.tokenizer)):
            self._end(FinishReason.CONTEXT_LIMIT, f"{problem}; ask for less, or raise Limits.max_context")
            return
        cap = self._rules.image_budget(limits.max_pixels, len(pictures))
        if limits.max_inquiry_pixels is not None:  # an original is an inquiry of its own
            cap = min(cap, limits.max_inquiry_pixels)
        areas = [picture.bounds.within(limits.min_pixels, cap) for picture in pictures]
        first = len(gallery)
        self._rules.times = {first + i: one.time for i, one in enumerate(pictures) if one.time is not None}
        sizes = {i: view.image.size for i, view in enumerate(gallery.views)}
        for i, (picture, (low, high)) in enumerate(zip(pictures, areas, strict=True)):
            image = picture.image
            try:
                height, width = smart_resize(image.height, image.width, min_pixels=low, max_pixels=high)
            except ImageError as error:
                raise ImageError(f"{self._name}, image {i}: {error}") from None
            sizes[first + i] = (width, height)
        if first + len(pictures) > limits.max_images:
            held = f" beside the {first} already shown" if first else ""
            self._end(
                FinishReason.IMAGE_LIMIT,
                f"{len(pictures)} images{held}, at most {limits.max_images} are allowed; raise Limits.max_images",
            )
            return
        if problem := self._pixel_problem(list(sizes.values())):
            self._end(FinishReason.IMAGE_LIMIT, problem)
            return
        indices = list(range(first, first + len(pictures)))
        parts = [*head, Mark(self.special.im_start), "user\n", *self._first_user(kind, indices, question, sizes)]
        chunk = self._compose([*parts, *self._assistant_start()], sizes)
        if problem := self._context_problem(chunk):
            self._end(FinishReason.CONTEXT_LIMIT, problem)
            return
        pairs = zip(pictures, areas, strict=True)
        views = [gallery.add_original(picture, high, low) for picture, (low, high) in pairs]
        gallery.min_pixels = limits.min_pixels
        numbers = {}
        for index, view in zip(indices, views, strict=True):
            numbers[index] = len(self._stream.inquiries)
            self._stream.inquiries.append(self._inquiry([view], "", [index]))
        self._append(chunk, numbers)

    def _first_user(
        self, kind: str, indices: list[int], question: str, sizes: Mapping[int, tuple[int, int]]
    ) -> list[PromptPart]:
        if kind == "follow_up":
            return self._rules.follow_up_turn(indices, question, sizes)
        if kind == "fallback":
            return self._rules.fallback_turn(indices, question)
        return self._rules.first_turn(indices, question, sizes, no_zoom=self.limits.max_turns == 1)

    def _act(self, turn: Turn) -> Turn:
        """Carry out a turn that stopped in the ordinary way and is no answer."""
        limits, action = self.limits, turn.action
        last = turn.index + 1 >= limits.max_turns
        if self._tokens_left(turn.token_count) == 0:
            problem = (
                f"turn {turn.index + 1} needs another one, and the {limits.max_answer_tokens} tokens that are allowed "
                "for all of them are sampled; raise Limits.max_answer_tokens"
            )
            self._end(FinishReason.LENGTH, problem)
            return replace(turn, problem=problem)
        if isinstance(action, ToolCall):
            if last:
                problem = f"turn {turn.index + 1} of {limits.max_turns} asked for another zoom; raise Limits.max_turns"
                self._end(FinishReason.TURN_LIMIT, problem)
                return replace(turn, problem=problem)
            try:
                plans = self._plan(action)
            except RegionError as error:
                return self._refuse(turn, FinishReason.BAD_REGION, str(error), "bad_call", last)
            return self._zoom(turn, action, plans)
        if isinstance(action, Malformed):
            return self._refuse(turn, FinishReason.MALFORMED, action.detail, "bad_call", last)
        return self._refuse(
            turn, FinishReason.NO_ACTION, "the turn holds neither a zoom request nor an answer", "no_action", last
        )

    def _plan(self, call: ToolCall) -> list[CropPlan]:
        """The crops of a call, of sizes that can be encoded together.

        Raises:
            RegionError: a region cannot be shown, or all of them cannot be encoded together.
        """
        limits = self.limits
        most, pixels = limits.max_inquiry_images, limits.max_inquiry_pixels
        if most is not None and len(call.regions) > most:
            raise RegionError(
                f"the call names {len(call.regions)} regions, at most {most} are encoded together; name fewer", most
            )
        plans = self._gallery.plan(call.regions, limits.crop_max_pixels or limits.max_pixels)
        if pixels is None:
            return plans
        total = sum(width * height for width, height in (plan.size for plan in plans))
        if total > pixels and self.preset.inquiry_overflow == "refuse":
            raise RegionError(
                f"the {len(plans)} regions have {total} pixels together, at most {math.floor(pixels)} are encoded "
                "together; name fewer or smaller regions",
                len(plans) - 1,
            )
        return self._gallery.fit_together(plans, pixels)

    def _zoom(self, turn: Turn, call: ToolCall, plans: list[CropPlan]) -> Turn:
        limits = self.limits
        shown = len(self._gallery)
        problem = None
        if shown + len(plans) > limits.max_images:
            problem = (
                f"{len(plans)} crops beside {shown} images, at most {limits.max_images} are allowed; raise "
                "Limits.max_images"
            )
        else:
            problem = self._pixel_problem(
                [view.image.size for view in self._gallery.views] + [plan.size for plan in plans]
            )
        opening: list[PromptPart] = []
        if problem is not None:
            policy = self._rules.on_overflow(asked_to_finish=self._asked_to_finish)
            if policy == "end":
                self._end(FinishReason.IMAGE_LIMIT, problem)
                return replace(turn, problem=problem)
            plans = self._that_fit(plans) if policy == "truncate" else []
            if not plans and policy == "final":
                opening = list(self.prompts.render("images_full", limit=limits.max_images))
        return self._respond(turn, opening, plans, call.query, problem, ask_to_finish=problem is not None)

    def _that_fit(self, plans: list[CropPlan]) -> list[CropPlan]:
        free = self.limits.max_images - len(self._gallery)
        kept = plans[: max(0, free)]
        shown = [view.image.size for view in self._gallery.views]
        while kept and self._pixel_problem(shown + [plan.size for plan in kept]):
            kept = kept[:-1]
        return kept

    def _refuse(self, turn: Turn, reason: FinishReason, problem: str, template: str, last: bool) -> Turn:
        if last or self._rules.on_bad_call == "end":
            self._end(reason, problem)
            return replace(turn, problem=problem)
        # A problem quotes the model's own words; they must not close the response they stand in.
        values: dict[str, str] = {"problem": problem.replace("</", "< /")} if template == "bad_call" else {}
        opening = list(self.prompts.render(template, **values))
        return self._respond(turn, opening, [], "", problem, ask_to_finish=self._rules.on_bad_call == "final")

    def _respond(
        self,
        turn: Turn,
        opening: list[PromptPart],
        plans: list[CropPlan],
        query: str,
        problem: str | None,
        *,
        ask_to_finish: bool,
    ) -> Turn:
        """Append a tool response, if it fits."""
        limits, gallery, prompts = self.limits, self._gallery, self.prompts
        first = len(gallery)
        sizes = {first + i: plan.size for i, plan in enumerate(plans)}
        body: list[PromptPart] = [RESPONSE_OPEN, *opening]
        for index, (width, height) in sizes.items():
            body += prompts.render("crop", image=index, index=index, width=width, height=height)
        ask_to_finish = ask_to_finish or turn.index + 2 >= limits.max_turns or first + len(plans) >= limits.max_images
        body += [*prompts.render("final" if ask_to_finish else "continue"), RESPONSE_CLOSE]
        chunk = self._compose(
            [*self._turn_end(), Mark(self.special.im_start), "user\n", *body, *self._assistant_start()], sizes
        )
        if too_long := self._context_problem(chunk):
            self._end(FinishReason.CONTEXT_LIMIT, too_long)
            return replace(turn, problem=too_long)
        views = gallery.add_crops(plans)
        numbers = dict.fromkeys(sizes, len(self._stream.inquiries))
        if views:
            self._stream.inquiries.append(self._inquiry(views, query, sizes))
        self._append(chunk, numbers)
        self._asked_to_finish = self._asked_to_finish or ask_to_finish
        feedback = "".join(part if isinstance(part, str) else "<image {}x{}>".format(*sizes[part]) for part in body)
        return replace(turn, views=tuple(views), image_indices=tuple(sizes), feedback=feedback, problem=problem)

    def _inquiry(self, views: Sequence[View], query: str, indices: Iterable[int]) -> Inquiry:
        images = tuple(view.image for view in views)
        return Inquiry(images, query, tuple(indices), self.preset.query_prefix or None)

    def _end(self, reason: FinishReason, detail: str, answer: str | None = None) -> None:
        self._finish, self._detail, self._answer = reason, detail, answer

    def _end_cut_off(self, request: Request) -> None:
        limits = self.limits
        if request.max_new_tokens == self._tokens_left():
            detail = (
                f"turn {len(self._turns) + 1} was cut off, {limits.max_answer_tokens} tokens are allowed for all turns "
                "of an answer; raise Limits.max_answer_tokens"
            )
            self._end(FinishReason.LENGTH, detail)
        elif request.max_new_tokens < limits.max_new_tokens_per_turn:
            detail = (
                f"the turn was cut off at token {len(self._stream.tokens)} of {limits.max_context}; raise "
                "Limits.max_context"
            )
            self._end(FinishReason.CONTEXT_LIMIT, detail)
        else:
            allowed = limits.max_new_tokens_per_turn
            detail = f"the turn was cut off, {allowed} tokens are allowed; raise Limits.max_new_tokens_per_turn"
            self._end(FinishReason.LENGTH, detail)

    def _tokens_left(self, *more: int) -> int | None:
        """Tokens that may still be sampled for the answer, once turns of `more` tokens are; None: any number."""
        most = self.limits.max_answer_tokens
        return None if most is None else max(0, most - sum(more) - sum(turn.token_count for turn in self._turns))

    def _room(self) -> int:
        """Tokens that still fit."""
        limit = self.limits.max_context
        return self.limits.max_new_tokens_per_turn if limit is None else limit - len(self._stream.tokens)

    def _context_problem(self, chunk: Chunk) -> str | None:
        """A turn fits if at least one sampled token fits after it."""
        limit = self.limits.max_context
        needed = len(self._stream.tokens) + len(chunk.tokens) + 1
        if limit is None or needed <= limit:
            return None
        images = sum(length for _, length, _ in chunk.spans)
        return (
            f"the next turn needs a context of {needed} tokens ({images} of them for its images), at most {limit} "
            "are allowed; "
            "raise Limits.max_context or lower max_pixels"
        )

    def _pixel_problem(self, sizes: list[tuple[int, int]]) -> str | None:
        limit, total = self.limits.max_total_pixels, sum(width * height for width, height in sizes)
        if limit is None or total <= limit:
            return None
        return (
            f"{len(sizes)} images have {total} pixels, at most {math.floor(limit)} are allowed; "
            "raise Limits.max_total_pixels"
        )

    def _turn_end(self) -> list[Any]:
        """What stands between a sampled turn and the next one; a turn that did not end in ``<|im_end|>`` is closed
        without loss."""
        closed = self._stream.tokens[-1:] == [self.special.im_end]
        return ["\n"] if closed else [Mark(self.special.im_end), "\n"]

    def _assistant_start(self) -> list[Any]:
        return [Mark(self.special.im_end), "\n", Mark(self.special.im_start), "assistant\n"]

    def _compose(self, parts: Sequence[PromptPart | Mark], sizes: Mapping[int, tuple[int, int]]) -> Chunk:
        return compose(parts, sizes, self.tokenizer, self.special)

    def _append(self, chunk: Chunk, inquiry_of: Mapping[int, int] | None = None) -> None:
        stream = self._stream
        start = len(stream.tokens)
        stream.tokens += chunk.tokens
        stream.mask += [0] * len(chunk.tokens)
        stream.logprobs += [None] * len(chunk.tokens)
        stream.spans += [
            ImageSpan(start + at, length, index, (inquiry_of or {})[index]) for at, length, index in chunk.spans
        ]
        stream.transcript.append(chunk.text)

    def _decode(self, ids: list[int]) -> str:
        return (
            str(self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
            if ids
            else ""
        )


__all__ = [
    "Episode",
    "ImageSpan",
    "Inquiry",
    "Limits",
    "Record",
    "Request",
    "Result",
    "SpecialTokens",
    "Tokenizer",
    "Turn",
    "Usage",
]
