"""Everything that reads what strangers write, for any input: the right kind of answer, or the right kind of error."""

import base64
import hashlib
import hmac
import io
import json
import math
import struct
import tempfile
import zlib
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

import yaml
from family import byte_tokenizer
from fuzzing import fuzzed
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError

from vilavt_core.checkpoint import Checkpoint, inspect_checkpoint
from vilavt_core.conversation import Result, SpecialTokens, encode_text
from vilavt_core.data.schema import read_record
from vilavt_core.driver import ConversationSettings
from vilavt_core.episode import Episode
from vilavt_core.errors import (
    BenchmarkError,
    CheckpointError,
    DataError,
    EpisodeError,
    EvaluationError,
    ImageError,
    RegionError,
    StateError,
)
from vilavt_core.images import ImageLimits, load_image
from vilavt_core.json_text import parse_json
from vilavt_core.presets import PRESETS, Limits, Preset
from vilavt_core.prompts import PromptSet
from vilavt_core.protocol import (
    TAGS,
    Answer,
    FinishReason,
    Malformed,
    NoAction,
    Region,
    ToolCall,
    format_tool_call,
    format_turn,
    parse_turn,
    without_tags,
)
from vilavt_core.regions import Gallery
from vilavt_core.settings import SETTINGS as SETTINGS_FILE
from vilavt_core.settings import preset_of
from vilavt_core.state import (
    Origin,
    SaidQuestion,
    StateKey,
    check_count,
    check_origin,
    check_replayed,
    check_said,
    replay,
)
from vilavt_core.yaml_config import parse_change, read_keys
from vilavt_eval.recordings import read_recordings
from vilavt_eval.scores import score_file
from vilavt_vllm.errors import LimitError, PlaceholderError, RequestError
from vilavt_vllm.grouping import ChatTokens, groups_of_tokens, one_placeholder_each
from vilavt_vllm.server.dialects import CHAT, MESSAGES, RESPONSES
from vilavt_vllm.server.requests import exchanges

TOKENIZER = byte_tokenizer()
TINY = PromptSet.load("tiny")
_MADE = tempfile.TemporaryDirectory(prefix="vilavt-fuzz-")
FOLDER = Path(_MADE.name)

numbers = st.one_of(
    st.integers(-3, 2000), st.integers(), st.floats(), st.sampled_from([10**40, -(10**400), 2**63, 0.1])
)
leaves = st.one_of(st.none(), st.booleans(), numbers, st.text(max_size=8), st.sampled_from(["\x1b[2J", "\ud800", "A"]))


def values_of(*keys: str) -> st.SearchStrategy:
    """JSON values whose objects have some of these keys."""
    names = st.one_of(st.sampled_from(keys), st.text(max_size=4)) if keys else st.text(max_size=4)
    return st.recursive(leaves, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(names, inner, max_size=6))


def some_of(**fields: st.SearchStrategy) -> st.SearchStrategy:
    """Objects with some of these fields, each mostly of its own kind."""
    return st.fixed_dictionaries({}, optional={name: one | values_of() for name, one in fields.items()})


def said_shortly(error: Exception) -> None:
    """An error says what is wrong in a line or two, whatever it quotes."""
    assert 0 < len(str(error)) < 5000


def dumped(value) -> bytes:
    return json.dumps(value).encode()


# ---------------------------------------------------------------------- what a model says

boxes = st.lists(numbers, max_size=5)
tool = values_of("region", "query", "index", "bbox_2d") | some_of(
    region=st.lists(some_of(index=st.integers(-1, 3), bbox_2d=boxes), max_size=3), query=st.text(max_size=5)
)
pieces = st.one_of(
    st.sampled_from([*TAGS, "<ans", "wer>", "{", "}", "[", '"region":', "\\", "\ud800", "NaN", "1e999", "<|im_end|>"]),
    st.text(max_size=6),
    tool.map(json.dumps),
    tool.map(lambda value: f"<tool>{json.dumps(value)}</tool>"),
)
said = st.lists(pieces, max_size=8).map("".join)


@fuzzed(said, st.sampled_from(["strict", "published"]), examples=100)
def test_any_text_is_a_turn(text, rules):
    action = parse_turn(text, rules)
    assert isinstance(action, ToolCall | Answer | Malformed | NoAction)
    if isinstance(action, ToolCall):
        assert action.regions
        assert all(math.isfinite(value) for region in action.regions for value in region.box)
        again = parse_turn(format_tool_call(action), rules)
        assert isinstance(again, ToolCall)
        assert again.regions == action.regions
    if isinstance(action, Answer) and rules == "strict":
        assert not any(tag in action.text for tag in TAGS)
    plain = without_tags(text)
    assert not any(tag in plain for tag in TAGS)
    assert isinstance(parse_turn(format_turn(Answer(plain))), Answer)


coordinate = st.one_of(st.integers(-10, 500), st.floats(-10, 500), numbers)
regions = st.builds(Region, st.integers(-2, 6), st.tuples(*[coordinate] * 4))


@fuzzed(
    st.tuples(st.integers(1, 500), st.integers(1, 500)),
    st.lists(st.lists(regions, min_size=1, max_size=3), max_size=3),
    st.sampled_from([784, 3136, 20_000]),
    st.integers(784, 200_000),
    kept=(((1, 1), [[Region(0, (0, 0, 0, 10**400))]], 784, 784),),
)
def test_any_region_is_cut_or_refused(size, calls, least, most):
    gallery = Gallery(min_pixels=least)
    try:
        gallery.add_original(Image.new("RGB", size), max(least, most))
        for call in calls:
            count = len(gallery)
            with suppress(RegionError):
                views = gallery.crop(ToolCall(tuple(call), "?"), max(least, most))
                assert len(gallery) == count + len(views) == count + len(call)
                for view in views:
                    assert view.image.width % 28 == view.image.height % 28 == 0
                    x1, y1, x2, y2 = view.region
                    assert -1e-9 <= x1 < x2 <= 1 + 1e-9
                    assert -1e-9 <= y1 < y2 <= 1 + 1e-9
                continue
            assert len(gallery) == count
    except ImageError:
        assert len(gallery) == 0


limits = st.builds(
    Limits,
    max_turns=st.integers(1, 4),
    max_images=st.integers(1, 6),
    max_new_tokens_per_turn=st.integers(1, 300),
    max_context=st.none() | st.integers(1, 1500),
    max_pixels=st.integers(16 * 784, 64 * 784),
    max_total_pixels=st.none() | st.integers(784, 200 * 784),
    max_inquiry_images=st.none() | st.integers(1, 2),
    max_inquiry_pixels=st.none() | st.integers(6 * 784, 70 * 784),
)
zooms = st.builds(
    lambda i, x, y, w, h: format_turn(ToolCall((Region(i, (x, y, x + w, y + h)),), "a")),
    *[st.integers(0, most) for most in (3, 200, 150, 120, 120)],
)
ids = st.integers(0, TOKENIZER.vocab_size + 30)


@fuzzed(
    st.lists(st.one_of(said, zooms, st.lists(ids, max_size=20)), max_size=6),
    limits,
    st.sampled_from(list(PRESETS)),
    st.integers(0, 2),
    st.text(max_size=10),
    st.sampled_from(["stop", "length"]),
)
def test_any_turns_make_an_episode(turns, limits, preset, count, question, finish):
    images = [Image.new("RGB", (160 + 20 * i, 120)) for i in range(count)]
    episode = Episode.start(images, question, tokenizer=TOKENIZER, prompts=TINY, preset=preset, limits=limits)
    for turn in turns:
        request = episode.next_request()
        if request is None:
            break
        before = episode.record.token_ids
        assert request.all_token_ids == before
        tokens = TOKENIZER.encode(turn, split_special_tokens=True) if isinstance(turn, str) and turn.isascii() else turn
        tokens = [] if isinstance(tokens, str) else tokens[: request.max_new_tokens]
        try:
            episode.feed(tokens, finish=finish)
        except EpisodeError:
            assert episode.record.token_ids == before
            tokens = [one for one in tokens if one not in (*request.banned_token_ids, *request.stop_token_ids)]
            episode.feed(tokens, finish=finish)
        record = episode.record
        assert record.token_ids[: len(before) + len(tokens)] == [*before, *tokens]
        assert len(record.token_ids) == len(record.loss_mask) == len(record.logprobs)
        assert len(episode.views) <= max(limits.max_images, 0)
    if episode.finished:
        result = episode.result
        told = json.loads(json.dumps(result.to_json()))
        again = Result.from_json(told).to_json()
        for image in (*told["images"], *again["images"]):
            image.pop("inquiry")  # of which a result that was told knows none
        assert again == told
        assert (result.answer is not None) == (result.finish is FinishReason.ANSWER)


TOKENS = ChatTokens(im_start=256, im_end=257, image_pad=258)
stream = st.lists(
    st.one_of(
        st.sampled_from([[256], [257], [258], [258] * 3, [*b"assistant\n"], [*b"user\n"], [*b"\n"]]),
        st.one_of(zooms, said).map(lambda text: [*text.encode("utf-8", "replace")]),
    ),
    max_size=12,
).map(lambda parts: [one for part in parts for one in part])


@fuzzed(stream, st.integers(0, 8))
def test_any_tokens_are_grouped(token_ids, images):
    groups = groups_of_tokens(
        token_ids, TOKENS, lambda ids: bytes(one for one in ids if one < 256).decode("utf-8", "replace")
    )
    assert sum(count for _, count in groups) == token_ids.count(258)
    assert all(count >= 1 for _, count in groups)
    try:
        out, lengths = one_placeholder_each(token_ids, 258, images)
    except PlaceholderError:
        return
    assert out.count(258) == images
    if lengths is not None:
        assert sum(lengths) == token_ids.count(258)
    assert [one for one in out if one != 258] == [one for one in token_ids if one != 258]


# ---------------------------------------------------------------------- files

sizes = st.integers(-1, 64) | numbers
config = some_of(
    model_type=st.sampled_from(["vilavt", "qwen2_5_vl", "qwen3"]),
    architectures=st.lists(st.sampled_from(["VilavtForConditionalGeneration", "Qwen3Model"]), max_size=2),
    vision_config=some_of(depth=sizes, hidden_size=sizes, num_heads=sizes, out_hidden_size=sizes,
                          fullatt_block_indexes=st.lists(sizes, max_size=3), integration_point=st.just("late")),
    text_config=some_of(hidden_size=sizes, num_hidden_layers=sizes, vocab_size=sizes, num_attention_heads=sizes,
                        num_key_value_heads=sizes, intermediate_size=sizes),
    text_encoder_config=some_of(hidden_size=sizes, num_hidden_layers=sizes, vocab_size=sizes),
    tie_word_embeddings=st.booleans(),
)  # fmt: skip
tensor = some_of(
    dtype=st.sampled_from(["F32", "BF16", "I8"]),
    shape=st.lists(sizes, max_size=4),
    data_offsets=st.lists(sizes, max_size=3),
)
names = st.sampled_from(["lm_head.weight", "model.visual.blocks.0.norm1.weight", "text_encoder.norm.weight", "\x1b[2J"])
header = st.dictionaries(names | st.just("__metadata__") | st.text(max_size=4), tensor, max_size=4).map(dumped)
shard = st.one_of(
    st.binary(max_size=60),
    st.builds(lambda raw, data: struct.pack("<Q", len(raw)) + raw + data, header, st.binary(max_size=40)),
    st.builds(
        lambda raw, length, data: struct.pack("<Q", length) + raw + data, header, st.integers(0, 2**64 - 1), st.binary()
    ),
)


@fuzzed(
    config.map(dumped) | st.binary(max_size=30),
    shard,
    st.none() | values_of("weight_map", "metadata").map(dumped),
    kept=((b"{}", b"", b'{"weight_map": {"weight_map": []}}'),),
)
def test_any_folder_is_a_checkpoint_or_told_what_it_is(config, weights, index):
    for name, data in {
        "config.json": config,
        "model.safetensors": weights,
        "model.safetensors.index.json": index,
    }.items():
        (FOLDER / name).unlink(missing_ok=True)
        if data is not None:
            (FOLDER / name).write_bytes(data)
    try:
        assert isinstance(Checkpoint.open(FOLDER), Checkpoint)
        json.dumps(inspect_checkpoint(FOLDER).to_json())
    except CheckpointError as error:
        said_shortly(error)


settings_file = some_of(
    preset=st.sampled_from([*PRESETS, "no"]),
    limits=st.dictionaries(
        st.sampled_from([*Limits.__dataclass_fields__, "max_turn"]), numbers | st.none(), max_size=4
    ),
    note=st.text(),
    other=st.none(),
)


@fuzzed(st.one_of(settings_file.map(dumped), values_of("preset", "limits").map(dumped), st.binary()))
def test_any_settings_file_is_a_preset_or_refused(data):
    (FOLDER / SETTINGS_FILE).write_bytes(data)
    try:
        assert isinstance(preset_of(FOLDER), Preset)
    except CheckpointError as error:
        said_shortly(error)


lines = st.sampled_from(
    ["a: &a ", "*a", "- ", "  ", "\n", "{", "}", "[", "]", ": ", "<<: *a", "!!python/name:os.system ", "?", "'", "1e3"]
)


@fuzzed(st.one_of(st.lists(lines, max_size=30).map("".join), values_of().map(yaml.safe_dump), st.text()))
def test_any_configuration_is_read_or_refused(text):
    path = FOLDER / "a.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    for read in (lambda: read_keys(path, DataError), lambda: parse_change(text, DataError), lambda: parse_json(text)):
        with suppress(DataError, ValueError):
            read()


turn = some_of(
    **{"from": st.sampled_from(["human", "gpt"]), "value": st.just("<image>") | said, "train": st.booleans()}
)
record = some_of(
    id=st.text(max_size=4),
    images=st.lists(st.sampled_from(["a.png", "/a", "../a", "a\0"]), max_size=3),
    conversations=st.lists(turn, max_size=4),
    question=st.text(max_size=5),
    turns=st.lists(some_of(text=said, train=st.booleans()), max_size=3),
    mask_history=sizes,
    problem_type=st.text(max_size=3),
)


@fuzzed(record | values_of("images", "conversations", "turns", "question"))
def test_any_record_is_read_or_refused(data):
    with suppress(DataError):
        read_record(json.loads(json.dumps(data)), "record 0")


row = some_of(
    question_id=st.text(max_size=3) | st.integers(0, 3),
    response=said,
    answer=st.sampled_from(["A", "4", "[1, 2, 3, 4]"]),
    problem_type=st.sampled_from(["multiple choice", "numerical", "free-form", "OCR", "os:system"]),
    turns=st.lists(st.text(max_size=4), max_size=2),
    category=st.text(max_size=3),
    error=st.none(),
    options=st.lists(st.text(max_size=3), max_size=3),
)
run = some_of(format=st.just(1), benchmark=st.sampled_from(["ERQA", "../x.yaml"]), model=st.text(max_size=3))


@fuzzed(st.one_of(st.none(), run.map(lambda one: {"run": one})), st.lists(row, max_size=4), st.binary(max_size=10))
def test_any_result_file_is_scored_and_shown_or_refused(run, rows, tail):
    path = FOLDER / "r.jsonl"
    path.write_bytes(b"".join(dumped(one) + b"\n" for one in ([] if run is None else [run]) + rows) + tail)
    with suppress(BenchmarkError):
        file = score_file(path)
        assert all(0 <= score <= 1 for rules in ("strict", "published") for score in file.scores(rules))
    with suppress(BenchmarkError, EvaluationError):
        list(read_recordings(path, None).entries)


def picture(kind: str) -> bytes:
    file = io.BytesIO()
    Image.linear_gradient("L").resize((24, 20)).convert("RGB").save(file, kind)
    return file.getvalue()


PICTURES = [picture(kind) for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")]
changes = st.lists(st.tuples(st.integers(0, 10**6), st.binary(max_size=4), st.booleans()), max_size=6)


@fuzzed(st.sampled_from(PICTURES), changes, st.none() | st.integers(0, 3000))
def test_any_picture_is_decoded_or_refused(data, changes, length):
    data = bytearray(data)
    for at, new, inserted in changes:
        at %= len(data) + 1
        data[at : at + (0 if inserted else len(new))] = new
    try:
        image = load_image(bytes(data[:length]), ImageLimits(max_pixels=10_000))
    except ImageError as error:
        said_shortly(error)
    else:
        assert image.mode == "RGB"
        assert image.width * image.height <= 10_000


# ---------------------------------------------------------------------- requests

URL = st.sampled_from(["data:image/png;base64,AAAA", "http://127.0.0.1/x", "file:///etc/passwd", "data:,", ""])
part = st.one_of(
    st.text(max_size=5),
    some_of(type=st.just("text"), text=st.text(max_size=5), cache_control=st.none()),
    some_of(type=st.just("image_url"), image_url=URL | some_of(url=URL, min_pixels=numbers, max_pixels=numbers)),
    some_of(type=st.just("video_url"), video_url=URL | some_of(url=URL, fps=numbers), video=st.lists(URL, max_size=3),
            num_frames=sizes, nframes=sizes),
    some_of(type=st.sampled_from(["file", "refusal", "input_audio"]), refusal=st.text(max_size=3)),
)  # fmt: skip
message = some_of(
    role=st.sampled_from(["system", "user", "user", "assistant", "tool"]),
    content=st.text(max_size=5) | st.lists(part, max_size=3),
    tool_calls=st.just([]),
    name=st.text(max_size=3),
)
request = some_of(
    model=st.text(max_size=3),
    messages=st.lists(message, max_size=4),
    temperature=numbers,
    top_p=numbers,
    top_k=numbers,
    seed=numbers,
    max_tokens=numbers,
    stream=st.booleans(),
    stream_options=some_of(include_usage=st.booleans()),
    n=st.just(1),
    stop=st.lists(st.text(max_size=2), max_size=2),
    mm_processor_kwargs=some_of(num_frames=sizes, fps=numbers),
    media_io_kwargs=some_of(video=some_of(num_frames=sizes)),
    vilavt=st.dictionaries(st.sampled_from([*Limits.per_request(), "max_turn"]), numbers | st.none(), max_size=3),
)

item = st.one_of(
    message,
    some_of(type=st.sampled_from(["message", "reasoning", "function_call"]), role=st.just("assistant"),
            content=st.lists(some_of(type=st.just("output_text"), text=st.text(max_size=3)), max_size=2)),
)  # fmt: skip
of_responses = some_of(
    input=st.text(max_size=3) | st.lists(item, max_size=4),
    instructions=st.text(max_size=3),
    max_output_tokens=numbers,
    metadata=st.dictionaries(st.text(max_size=2), st.text(max_size=2), max_size=1),
    text=some_of(format=some_of(type=st.just("text")), verbosity=st.just("low")),
    store=st.booleans(),
)
block = st.one_of(
    some_of(type=st.sampled_from(["text", "thinking", "tool_use"]), text=st.text(max_size=3), cache_control=st.none()),
    some_of(type=st.just("image"), max_pixels=numbers, source=some_of(
        type=st.sampled_from(["url", "base64", "file"]), url=URL, data=st.text(max_size=3),
        media_type=st.just("image/png"),
    )),
)  # fmt: skip
of_messages = some_of(
    messages=st.lists(
        some_of(role=st.sampled_from(["user", "assistant"]), content=st.lists(block, max_size=3)), max_size=3
    ),
    system=st.text(max_size=3) | st.lists(block, max_size=2),
    max_tokens=numbers,
    output_config=some_of(effort=st.just("low")),
)
anything = st.one_of(
    values_of("messages", "input", "system", "role", "content", "type", "source").map(dumped), st.binary()
)
asked_for = st.one_of(
    st.tuples(st.just(CHAT), request.map(dumped)),
    st.tuples(st.just(RESPONSES), of_responses.map(dumped)),
    st.tuples(st.just(MESSAGES), of_messages.map(dumped)),
    st.tuples(st.sampled_from([CHAT, RESPONSES, MESSAGES]), anything),
)


@fuzzed(asked_for)
def test_any_request_is_carried_out_or_the_clients_fault(given):
    dialect, body = given
    try:
        asked = dialect.request.model_validate_json(body)
        ignored = asked.ignored()
        allowed = asked.limits(replace(PRESETS["default"].limits, max_context=1000))
        asked.check_bounds(allowed)
        assert allowed.max_turns <= PRESETS["default"].limits.max_turns
        asked.sampling(PRESETS["default"].sampling)
        talk = exchanges(asked.placed(), asked.frames)
    except ValidationError:
        return
    except (RequestError, LimitError) as error:
        said_shortly(error)
        return
    assert len(ignored) <= 101
    assert [one.answer is None for one in talk] == [False] * (len(talk) - 1) + [True]


# ---------------------------------------------------------------------- states

KEY = StateKey(b"k" * 32)
SETTINGS = ConversationSettings(
    tokenizer=TOKENIZER, prompts=TINY, preset=PRESETS["default"], limits=Limits(max_context=2000, max_pixels=64 * 784),
    sampling=PRESETS["default"].sampling, fingerprint="f",
)  # fmt: skip
SPECIAL = SpecialTokens.of(TOKENIZER)
ORIGIN = asdict(Origin.of(SETTINGS))
hashes = st.sampled_from(["0" * 64, hashlib.sha256(b"").hexdigest(), hashlib.sha256(b"What?").hexdigest()])


def mostly(usual: st.SearchStrategy, other: st.SearchStrategy) -> st.SearchStrategy:
    """What gets through to the next check, and now and then what does not."""
    return st.sampled_from([usual] * 9 + [other]).flatmap(lambda one: one)


fed = st.builds(
    lambda text, more, finish: {"token_ids": [*encode_text(text, TOKENIZER, SPECIAL), *more], "finish": finish},
    st.one_of(zooms, said, st.just(format_turn(Answer("A")))),
    mostly(st.just([SPECIAL.im_end]), st.lists(ids | numbers, max_size=3)),
    mostly(st.just("stop"), st.sampled_from(["length", ""])),
)
question_said = st.fixed_dictionaries(
    {
        "pictures": st.just([]) | st.lists(hashes, max_size=2),
        "question": hashes,
        "answer": hashes,
        "limits": mostly(
            st.just(asdict(SETTINGS.limits)),
            some_of(**dict.fromkeys(Limits.__dataclass_fields__, numbers | st.none())),
        ),
        "turns": st.lists(fed, min_size=1, max_size=3),
        "told": st.booleans(),
    }
)
state_said = st.fixed_dictionaries(
    {
        "origin": mostly(st.just(ORIGIN), some_of(**dict.fromkeys(ORIGIN, hashes))),
        "questions": st.lists(question_said, min_size=1, max_size=2),
        "images": mostly(st.just([]), st.lists(some_of(start=numbers, box=boxes | st.none()), max_size=1)),
        "pixels": hashes,
        "tokens": st.integers(0, 999),
        "stream": hashes,
        "issued": mostly(st.just(10**6), numbers),
    }
)
payload = mostly(
    mostly(state_said, values_of("origin", "questions")).map(lambda one: zlib.compress(dumped(one))),
    st.binary(max_size=60),
)


def signed(payload: bytes) -> str:
    """As somebody with the key would: what is behind the signature is read with as much care."""
    head = bytes([1]) + bytes.fromhex(KEY.name)
    mac = hmac.digest(b"k" * 32, b"vilavt.state\0" + head + payload, "sha256")
    return base64.urlsafe_b64encode(head + mac + payload).rstrip(b"=").decode()


TURN = {"token_ids": [SPECIAL.im_end], "finish": "stop"}
LATE = {
    "origin": ORIGIN,
    "questions": [
        {"pictures": [], "question": "0" * 64, "answer": "0" * 64, "limits": asdict(SETTINGS.limits)}
        | {"turns": [TURN], "told": False}
    ],
    "images": [],
    "pixels": "0" * 64,
    "tokens": 0,
    "stream": "0" * 64,
    "issued": 10**400,
}


@fuzzed(
    mostly(payload.map(signed), st.text() | st.binary().map(lambda one: base64.urlsafe_b64encode(one).decode())),
    st.lists(st.builds(SaidQuestion, st.just(()), st.sampled_from(["What?", ""]), st.just("")), min_size=2, max_size=2),
    mostly(st.just(True), st.just(False)),
    examples=60,
    kept=((signed(zlib.compress(dumped(LATE))), [SaidQuestion((), "What?", "")] * 2, True),),
)
def test_any_state_is_gone_through_or_refused(text, said, as_many):
    try:
        state = KEY.read(text, max_age=1e9, now=1e6)
        check_origin(state, SETTINGS)
        said = said[: len(state.questions)] if as_many else said
        check_count(state, len(said))
        driver = None
        for one, told in zip(state.questions, said, strict=True):
            driver = replay(driver, SETTINGS, one, told)
        if driver is not None:
            check_replayed(state, driver)
        check_said(state, said)
    except StateError as error:
        said_shortly(error)
