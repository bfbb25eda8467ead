"""Training records: schemas, registry, token streams and label masks, lengths, what is left out and why."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from vilavt_core.data.annotations import Annotations
from vilavt_core.data.dataset import Lengths, SftDataset
from vilavt_core.data.example import IGNORE, Dropped
from vilavt_core.data.registry import PUBLISHED, DataSource, Registry
from vilavt_core.data.rendering import Renderer, RenderSettings
from vilavt_core.data.schema import read_record
from vilavt_core.errors import DataError, ImageError
from vilavt_core.presets import get_preset
from vilavt_core.prompts import PromptSet
from vilavt_core.protocol import Answer, Region, ToolCall, format_turn
from vilavt_core.regions import Gallery
from vilavt_hf.train.measuring import measure_all

PIXELS = 28 * 28 * 64
CALL = (
    '<think>look</think><tool>{"region":[{"index":0,"bbox_2d":[0,0,112,112]},{"index":0,"bbox_2d":[56,0,224,56]}],'
    '"query":"the sign"}</tool>'
)
ANSWER = "<think>seen</think><answer>B</answer>"


@pytest.fixture
def render(tokenizer, tmp_path):
    """`render(record, crops="files", **settings)` -> Rendered; pictures lie in tmp_path."""
    Image.linear_gradient("L").resize((448, 224)).convert("RGB").save(tmp_path / "a.png")
    Image.radial_gradient("L").convert("RGB").resize((56, 84)).save(tmp_path / "b.png")

    def run(record, crops="files", **settings):
        renderer = Renderer(
            tokenizer,
            PromptSet.load("default"),
            RenderSettings(**{"max_pixels": PIXELS, **settings}),
            get_preset("default"),
        )
        return renderer.render(read_record(record, "s[0]"), "s[0]", tmp_path, crops)

    return run


def spelled(tokenizer, ids):
    """Text of ids, runs of placeholders as one."""
    text = tokenizer.decode(ids)
    while "<|image_pad|><|image_pad|>" in text:
        text = text.replace("<|image_pad|><|image_pad|>", "<|image_pad|>")
    return text


def trained_text(tokenizer, example):
    """The trained stretches."""
    out, run = [], []
    for token, label in zip([*example.input_ids, 0], [*example.labels, IGNORE], strict=True):
        if label != IGNORE:
            assert label == token
            run.append(token)
        elif run:
            out.append(tokenizer.decode(run))
            run = []
    return out


def turns(*pairs):
    return [{"from": role, "value": text} for role, text in pairs]


TWO_TURNS = {
    "images": ["a.png", "b.png", "b.png"],
    "conversations": turns(
        ("human", "<image>what?"), ("gpt", CALL), ("human", "<tool_response><image> and <image>go on</tool_response>"),
        ("gpt", ANSWER),
    ),
    "queries": ["", "the sign"],
    "image_to_query_mapping": [0, 1, 1],
}  # fmt: skip


# ------------------------------------------------------------------------------------------- label mask


def test_the_published_mask_trains_assistant_turns_with_their_end_and_the_newline_after_it(render, tokenizer):
    example = render(TWO_TURNS, labels="turn_and_newline").example
    assert trained_text(tokenizer, example) == [f"{CALL}<|im_end|>\n", f"{ANSWER}<|im_end|>\n"]


def test_our_mask_trains_what_is_sampled_and_nothing_of_tool_turns(render, tokenizer):
    example = render(TWO_TURNS).example
    assert trained_text(tokenizer, example) == [f"{CALL}<|im_end|>", f"{ANSWER}<|im_end|>"]


def test_the_stream_is_chatml_with_the_stock_system_turn_first(render, tokenizer):
    example = render(TWO_TURNS).example
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    assert spelled(tokenizer, example.input_ids) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        f"<|im_start|>user\n{image}what?<|im_end|>\n"
        f"<|im_start|>assistant\n{CALL}<|im_end|>\n"
        f"<|im_start|>user\n<tool_response>{image} and {image}go on</tool_response><|im_end|>\n"
        f"<|im_start|>assistant\n{ANSWER}<|im_end|>\n"
    )


def test_a_system_turn_of_the_record_replaces_the_stock_one(render, tokenizer):
    record = {"conversations": turns(("system", "Zoom."), ("human", "q"), ("gpt", "a"))}
    text = spelled(tokenizer, render(record).example.input_ids)
    assert text.startswith("<|im_start|>system\nZoom.<|im_end|>\n<|im_start|>user\nq")
    without = {"conversations": turns(("human", "q"), ("gpt", "a"))}
    assert spelled(tokenizer, render(without, system=None).example.input_ids).startswith("<|im_start|>user")


@pytest.mark.parametrize("system", [True, False])
def test_masked_history_counts_every_entry_of_the_record(render, tokenizer, system):
    pairs = [("human", "q"), ("gpt", "one"), ("human", "r"), ("gpt", "two")]
    record = {"conversations": turns(*([("system", "s")] if system else []), *pairs), "mask_history": 2}
    trained = trained_text(tokenizer, render(record).example)
    assert trained == (["one<|im_end|>", "two<|im_end|>"] if system else ["two<|im_end|>"])


def test_roles_and_content_are_read_like_from_and_value(render):
    record = {"conversations": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    same = {"conversations": turns(("human", "q"), ("gpt", "a"))}
    assert render(record).example == render(same).example


def test_structural_tokens_in_a_text_stay_text(render, tokenizer):
    tricky = "<|im_end|>\n<|im_start|>assistant\n<|image_pad|>"
    record = {"conversations": turns(("human", tricky), ("gpt", tricky))}
    example = render(record).example
    start, end, pad = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>", "<|image_pad|>"])
    ids = list(example.input_ids)
    assert (ids.count(start), ids.count(end), ids.count(pad)) == (3, 3, 0)


def test_an_image_mark_of_an_assistant_turn_stays_text(render, tokenizer):
    record = {"images": ["a.png"], "conversations": turns(("human", "<image>q"), ("gpt", "an <image>"))}
    assert trained_text(tokenizer, render(record).example) == ["an <image><|im_end|>"]


def test_an_episode_record_gives_the_stream_of_the_episode(render, tokenizer):
    record = {"images": ["a.png"], "question": "what?", "turns": [CALL, ANSWER]}
    rendered = render(record)
    assert trained_text(tokenizer, rendered.example) == [f"{CALL}<|im_end|>", f"{ANSWER}<|im_end|>"]
    assert [(g.query, len(g.images)) for g in rendered.example.groups] == [("", 1), ("the sign", 2)]
    assert [cut.groups for cut in rendered.cuts] == [1, 2]
    silent = {**record, "turns": [{"text": CALL, "train": False}, ANSWER]}
    assert trained_text(tokenizer, render(silent).example) == [f"{ANSWER}<|im_end|>"]


# ------------------------------------------------------------------------------------------- images and groups


def test_groups_follow_the_query_mapping(render):
    groups = render(TWO_TURNS).example.groups
    assert [(g.query, [i.size for i in g.images]) for g in groups] == [
        ("", [(308, 140)]),
        ("the sign", [(56, 84), (56, 84)]),
    ]


def test_without_queries_every_image_is_its_own_group(render):
    record = {key: value for key, value in TWO_TURNS.items() if "quer" not in key}
    assert [(g.query, len(g.images)) for g in render(record).example.groups] == [("", 1)] * 3


def test_frames_of_a_video_are_images(render):
    record = {"images": ["b.png"] * 8, "conversations": turns(("human", "<image>" * 8 + "q"), ("gpt", "a"))}
    rendered = render(record)
    assert len(rendered.example.groups) == 8


def test_a_record_s_own_pixel_limit_wins(render):
    (group,) = render(
        {"images": ["a.png"], "conversations": turns(("human", "<image>"), ("gpt", "a")), "max_pixels": 28 * 28 * 8}
    ).example.groups
    assert group.images[0].size == (112, 56)


def test_groups_of_an_episode_record_keep_the_presets_query_prefix(tokenizer, tmp_path):
    Image.new("RGB", (168, 168), "white").save(tmp_path / "a.png")
    call = format_turn(ToolCall((Region(0, (0, 0, 84, 84)),), "the sign"))
    record = {"images": ["a.png"], "question": "What?", "turns": [call, format_turn(Answer("7"))]}
    preset = replace(get_preset("default"), query_prefix="Query: ")
    renderer = Renderer(tokenizer, PromptSet.load("default"), RenderSettings(max_pixels=PIXELS), preset)
    groups = renderer.render(read_record(record, "s[0]"), "s[0]", tmp_path).example.groups
    assert [(group.query, group.query_prefix) for group in groups] == [("", "Query: "), ("the sign", "Query: ")]


def test_crops_cut_from_boxes_are_those_of_files_and_of_the_episode(render, tmp_path):
    gallery = Gallery()
    gallery.add_original(Image.open(tmp_path / "a.png"), PIXELS)
    call = ToolCall((Region(0, (0, 0, 112, 112)), Region(0, (56, 0, 224, 56))), "the sign")
    for i, view in enumerate(gallery.crop(call, PIXELS)):
        view.image.save(tmp_path / f"crop{i}.png")
    filed = render({**TWO_TURNS, "images": ["a.png", "crop0.png", "crop1.png"]}).example
    cut = render({**TWO_TURNS, "images": ["a.png"], "queries": None, "image_to_query_mapping": None}, "cut").example
    episode = render({"images": ["a.png"], "question": "what?", "turns": [CALL, ANSWER]}).example
    assert cut.input_ids == filed.input_ids
    for other in (cut, episode):
        assert [g.query for g in other.groups] == [g.query for g in filed.groups]
        pixels = [[i.tobytes() for i in g.images] for g in other.groups]
        assert pixels == [[i.tobytes() for i in g.images] for g in filed.groups]


@pytest.mark.parametrize(
    "change, kind, text",
    [
        ({"images": ["a.png", "b.png"]}, "image marks", "3 <image> in user turns, 2 images"),
        ({"image_to_query_mapping": [0, 1]}, "query mapping", "2 entries, there are 3 images"),
        ({"image_to_query_mapping": [1, 0, 0]}, "query mapping", "must not decrease"),
        ({"image_to_query_mapping": [0, 1, 2]}, "query mapping", "queries has 2 entries; it must have 3"),
        ({"image_to_query_mapping": [0, -1, 1]}, "query mapping", "queries -1 to 1"),
        ({"images": ["a.png", "b.png", "gone.png"]}, "missing file", "there is no such file"),
        ({"mask_history": 4}, "nothing to train", "no token"),
        ({"conversations": []}, "schema", "conversations"),
        ({"conversations": turns(("cat", "x"))}, "schema", "unknown role 'cat'"),
        ({"image": "a.png", "images": []}, "schema", "the key is images"),
    ],
)
def test_a_record_that_cannot_be_used_says_why(render, change, kind, text):
    with pytest.raises(DataError, match=rf"s\[0\].*{text}") as caught:
        render({**TWO_TURNS, **change})
    assert caught.value.kind == kind


@pytest.mark.parametrize(
    "turns, text",
    [
        ([CALL.replace("[0,0,112,112]", "[0,0,999,112]"), ANSWER], "turn 0: .*leaves image 0"),
        (["<tool>{}</tool>", ANSWER], 'turn 0: .*no "region"'),
        ([CALL], "the last of 1 turns gives no answer"),
        ([ANSWER, ANSWER], "2 turns, but the episode ended before turn 1"),
    ],
)
def test_an_episode_record_must_play(render, turns, text):
    with pytest.raises(DataError, match=text):
        render({"images": ["a.png"], "question": "q", "turns": turns})


def test_unknown_keys_of_an_episode_record_are_refused(render):
    with pytest.raises(DataError, match="anwser: Extra inputs are not permitted"):
        render({"question": "q", "turns": [ANSWER], "anwser": "B"})


def test_a_tool_call_that_cannot_be_read_cannot_be_cut(render):
    broken = {**TWO_TURNS, "images": ["a.png"]}
    broken["conversations"] = [*TWO_TURNS["conversations"]]
    broken["conversations"][1] = {"from": "gpt", "value": "<tool>{</tool>"}
    with pytest.raises(DataError, match="its crops cannot be cut"):
        render(broken, "cut")


# ------------------------------------------------------------------------------------------- length


def test_a_long_sample_is_cut_behind_an_assistant_turn(render, tokenizer):
    rendered = render(TWO_TURNS)
    whole = len(rendered.example.input_ids)
    assert rendered.within(whole).example == rendered.example
    shorter = rendered.within(whole - 1)
    text = spelled(tokenizer, shorter.example.input_ids)
    assert text.endswith(f"{CALL}<|im_end|>\n")
    assert text.count("<|vision_start|>") == text.count("<|vision_end|>") == 1
    assert [g.query for g in shorter.example.groups] == [""]
    assert rendered.within(len(shorter.example.input_ids) - 1) is None


def test_a_cut_never_splits_a_joint_group(render):
    together = {**TWO_TURNS, "image_to_query_mapping": [0, 0, 0], "queries": ["all"]}
    rendered = render(together)
    assert [cut.groups for cut in rendered.cuts] == [1]  # behind the second turn only
    assert rendered.within(len(rendered.example.input_ids) - 1) is None


@pytest.fixture
def dataset(render, tokenizer, tmp_path):
    """`dataset(records, **options)` over a JSONL file of these records."""

    def make(records, rate=1.0, **options):
        path = tmp_path / "records.jsonl"
        path.write_text("".join(json.dumps(r) + "\n" for r in records))
        renderer = Renderer(
            tokenizer, PromptSet.load("default"), RenderSettings(max_pixels=PIXELS), get_preset("default")
        )
        source = DataSource(name="records", annotations=path, rate=rate)
        return SftDataset([source], renderer, **{"max_length": 4096, **options})

    return make


TEXT_ONLY = {"conversations": turns(("human", "q"), ("gpt", "a"))}


def test_measures_are_those_of_the_decoded_samples(dataset):
    episode = {"images": ["a.png"], "question": "what?", "turns": [CALL, ANSWER]}
    data = dataset([TWO_TURNS, TEXT_ONLY, episode])
    lengths = measure_all(data, workers=2)
    for i in range(3):
        example = data[i]
        assert lengths.tokens[i] == len(example.input_ids)
        assert lengths.trained[i] == sum(label != IGNORE for label in example.labels)
        assert lengths.images[i] == sum(len(g.images) for g in example.groups)
        assert lengths.image_tokens[i] == sum(i.width * i.height // 784 for g in example.groups for i in g.images)
    assert lengths.turns.tolist() == [2, 1, 2]


def test_long_samples_are_dropped_with_a_count_or_cut(dataset):
    length = dataset([TWO_TURNS]).measure(0).tokens
    dropping = Lengths.of([dataset([TWO_TURNS], max_length=length - 1).measure(0)])
    assert dropping.dropped == {"too long": 1}
    assert f"{length} tokens, at most {length - 1}" in dropping.problems[0][1]
    cutting = dataset([TWO_TURNS], max_length=length - 1, over_long="cut")
    measure = cutting.measure(0)
    assert (measure.cut_from, measure.kind) == (length, "")
    assert len(cutting[0].input_ids) == measure.tokens < length


def test_damaged_pictures_are_named_and_never_replaced(dataset, tmp_path):
    (tmp_path / "nothing.png").write_bytes(b"no picture")
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "half.png").write_bytes(whole[: len(whole) // 2])
    ask = turns(("human", "<image>"), ("gpt", "a"))
    data = dataset(
        [
            TEXT_ONLY,
            {"images": ["nothing.png"], "conversations": ask, "id": "odd"},
            {"images": ["half.png"], "conversations": ask},
        ]
    )
    lengths = measure_all(data)
    assert lengths.kept.tolist() == [0, 2]
    assert lengths.problems[1][0] == "image"
    assert "records[1] (odd)" in lengths.problems[1][1]
    late = data[2]  # the header is sound
    assert isinstance(late, Dropped)
    assert (late.sample, late.kind) == ("records[2]", "image")
    assert "damaged or cut short" in late.reason


def test_the_orientation_of_a_photo_counts_when_it_is_measured(dataset, tmp_path):
    photo = Image.new("RGB", (168, 56))
    exif = Image.Exif()
    exif[0x0112] = 6
    photo.save(tmp_path / "turned.jpg", exif=exif)
    data = dataset([{"images": ["turned.jpg"], "conversations": turns(("human", "<image>"), ("gpt", "a"))}])
    (group,) = data[0].groups
    assert group.images[0].size == (56, 168)
    assert data.measure(0).image_tokens == 12


def test_measures_are_kept_until_anything_changes(dataset, tmp_path):
    data = dataset([TEXT_ONLY])
    first = measure_all(data, cache=tmp_path / "cache")
    (file,) = (tmp_path / "cache").iterdir()
    again = Lengths.load(file)
    assert again.tokens.tolist() == first.tokens.tolist()
    assert dataset([TEXT_ONLY]).fingerprint != dataset([TEXT_ONLY], max_length=99).fingerprint
    assert dataset([TEXT_ONLY]).fingerprint != dataset([TEXT_ONLY, TEXT_ONLY]).fingerprint


@pytest.fixture
def measure_again(tmp_path, monkeypatch):
    """`measure_again(data)` -> measures out of the cache of earlier calls, and the samples that were measured."""

    def run(data):
        measured = []
        with monkeypatch.context() as patch:
            original = SftDataset.measure
            patch.setattr(SftDataset, "measure", lambda self, i: measured.append(i) or original(self, i))
            return measure_all(data, cache=tmp_path / "cache"), measured

    return run


ASK = turns(("human", "<image>"), ("gpt", "a"))


def test_a_sample_whose_picture_was_missing_is_in_once_the_picture_is_there(dataset, tmp_path, measure_again):
    data = dataset([TEXT_ONLY, {"images": ["late.png"], "conversations": ASK}, {"x": 1}])
    lengths, measured = measure_again(data)
    assert (lengths.dropped, measured) == ({"missing file": 1, "schema": 1}, [0, 1, 2])
    assert measure_again(data)[1] == [1]  # it may be sound at any time; the others need no second look
    shutil.copy(tmp_path / "b.png", tmp_path / "late.png")
    lengths, measured = measure_again(data)
    assert (lengths.kept.tolist(), lengths.dropped, measured) == ([0, 1], {"schema": 1}, [1])
    assert lengths.images.tolist() == [0, 1, 0]
    again, measured = measure_again(data)
    assert (again.tokens.tolist(), measured) == (lengths.tokens.tolist(), [])


def test_a_file_that_could_not_be_read_is_tried_again(dataset, tmp_path, measure_again, monkeypatch):
    data = dataset([{"images": ["b.png"], "conversations": ASK}])
    with monkeypatch.context() as patch:
        patch.setattr("vilavt_core.data.rendering.image_size", failing)
        assert measure_again(data)[0].dropped == {"image": 1}
    assert measure_again(data)[0].kept.tolist() == [0]  # the same bytes, the same time


def failing(path, **kwargs):
    raise ImageError(f"{path}: cannot be read: Stale file handle")


def test_a_changed_picture_is_measured_again_and_its_neighbours_are_not(dataset, tmp_path, measure_again):
    data = dataset([{"images": [name], "conversations": ASK} for name in ("a.png", "b.png")])
    before, _ = measure_again(data)
    Image.new("RGB", (280, 28)).save(tmp_path / "b.png")
    after, measured = measure_again(data)
    assert measured == [1]
    assert (before.image_tokens.tolist(), after.image_tokens.tolist()) == ([55, 6], [55, 10])
    (tmp_path / "b.png").unlink()
    assert measure_again(data)[0].dropped == {"missing file": 1}


def test_a_share_of_a_set_is_drawn_with_the_seed(dataset):
    records = [{**TEXT_ONLY, "id": i} for i in range(40)]
    drawn = [dataset(records, rate=0.25, seed=seed).records[0].tolist() for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(set(drawn[0])) == 10


# ------------------------------------------------------------------------------------------- files


def test_annotations_are_json_lines_or_a_json_list(tmp_path):
    records = [{"a": 1}, {"b": "ü"}, {}]
    (tmp_path / "x.jsonl").write_text("\n" + "\n\n".join(json.dumps(r) for r in records))
    (tmp_path / "x.json").write_text(json.dumps(records))
    assert list(Annotations(tmp_path / "x.jsonl")) == list(Annotations(tmp_path / "x.json")) == records
    (tmp_path / "bad.jsonl").write_text('{"a": 1}\n{"a":\n')
    with pytest.raises(DataError, match=r"bad\.jsonl, record 1: not JSON"):
        Annotations(tmp_path / "bad.jsonl")[1]
    (tmp_path / "dict.json").write_text("{}")
    with pytest.raises(DataError, match="not a JSON list: it holds a dict"):
        Annotations(tmp_path / "dict.json")
    with pytest.raises(DataError, match="cannot be read: No such file"):
        Annotations(tmp_path / "gone.jsonl")
    (tmp_path / "deep.json").write_text("[" * 100_000 + "]" * 100_000)
    with pytest.raises(DataError, match=r"deep\.json: .*nested too deeply"):
        Annotations(tmp_path / "deep.json")


def test_the_nine_published_sets_are_found_under_one_root(tmp_path):
    published = {
        "sr_91k_v2": "SR_91K_COT",
        "spar7m_v2": "SPAR7M_COT",
        "vgr_v2": "VGR_COT",
        "thyme_2turn_v2": "THYME_COT",
        "sr_91k_text": "SR_91K_TEXT",
        "spar7m_text": "SPAR7M_TEXT",
        "thyme_text_v2": "THYME_TEXT",
        "vica_cot": "VICA_COT",
        "vica_text": "VICA_TEXT",
    }
    assert published == PUBLISHED
    for i, (name, folder) in enumerate(published.items()):
        place = tmp_path if i % 2 else tmp_path / folder
        place.mkdir(exist_ok=True)
        (place / f"{folder}.json").write_text("[]")
        source = Registry(data_root=tmp_path).find(name)
        assert source.annotations == place / f"{folder}.json"
        assert source.image_root == tmp_path / folder
    with pytest.raises(DataError, match="say where they are"):
        Registry().find("vgr_v2")
    with pytest.raises(DataError, match=r"no annotations under .*; looked for VGR_COT\.json"):
        Registry(data_root=tmp_path / "elsewhere").find("vgr_v2")


def test_a_registry_file_adds_sets_and_rates(tmp_path):
    (tmp_path / "sets.yaml").write_text(
        "datasets:\n  - {name: mine, annotations: sub/mine.jsonl, images: pictures, rate: 0.5, crops: cut}\n"
    )
    registry = Registry.load(tmp_path / "sets.yaml")
    mine = registry.find("mine")
    assert (mine.annotations, mine.image_root) == (tmp_path / "sub/mine.jsonl", tmp_path / "pictures")
    assert (mine.rate, mine.crops) == (0.5, "cut")
    assert registry.find(" mine%25").rate == 0.25
    with pytest.raises(DataError, match="there is no data set 'ours'; known are mine, sr_91k_v2"):
        registry.find("ours")
    with pytest.raises(DataError, match="above 0 and at most 100"):
        registry.find("mine%101")


@pytest.mark.parametrize(
    "text, problem",
    [
        ("datasets: [{name: a, annotation: x}]", "datasets.0.annotation: Extra inputs"),
        ("datasets: [{name: a, annotations: x, rate: 2}]", "datasets.0.rate"),
        ("datasets: [{name: a, annotations: x}, {name: a, annotations: y}]", "named twice: a"),
        ("datasets: [", "not YAML"),
    ],
)
def test_a_wrong_registry_file_says_what_is_wrong(tmp_path, text, problem):
    (tmp_path / "sets.yaml").write_text(text)
    with pytest.raises(DataError, match=problem):
        Registry.load(tmp_path / "sets.yaml")


def test_samples_of_several_sets_keep_their_names(dataset, tmp_path):
    one = dataset([TEXT_ONLY, TEXT_ONLY])
    (tmp_path / "more.json").write_text(json.dumps([TEXT_ONLY]))
    both = SftDataset(
        [*one.sources, DataSource(name="more", annotations=tmp_path / "more.json")], one.renderer, max_length=99
    )
    assert [both.name(i) for i in range(len(both))] == ["records[0]", "records[1]", "more[0]"]
    assert np.all(measure_all(both).tokens == measure_all(one).tokens[0])


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"min_pixels": 784}, "min_pixels has no effect here: set data.min_pixels of the run"),
        ({"tools": []}, "tools has no effect here"),
        ({"max_pixel": 784}, "the key max_pixel is unknown; did you mean max_pixels?"),
        ({"mask_histoy": 1}, "did you mean mask_history?"),
        (
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a", "train": False}]},
            "train has",
        ),
    ],
)
def test_a_key_that_is_meant_to_change_a_record_and_does_not_is_named(changes, says):
    record = {"conversations": turns(("human", "q"), ("gpt", "a")), **changes}
    with pytest.raises(DataError) as error:
        read_record(record, "set[3]")
    assert says in str(error.value)
    assert str(error.value).startswith("set[3]")


def test_other_data_may_stand_beside_a_published_record():
    record = {"conversations": turns(("human", "q"), ("gpt", "a")), "source": "x", "answer": "a", "dataset_name": "d"}
    assert read_record(record, "set[3]").max_pixels is None
