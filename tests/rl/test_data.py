"""Rows of RL data: the published jsonl as it is, JSON, Parquet, and what is refused."""

import base64
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from vilavt_core.errors import ImageError
from vilavt_core.images import load_image
from vilavt_rl.data import Row, read_rows
from vilavt_rl.errors import RowError
from vilavt_rl.rewards import Message, Trajectory, reward
from vilavt_rl.rollout import settings_of_checkpoint, start_row

RECORD = {
    "question": "Which sign is red?",
    "answer": "A",
    "image_path": ["street.png"],
    "question_type": "multiple choice",
    "data_type": "vsi",
    "max_num_steps": 3,
    "max_pixels": 200704,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    Image.new("RGB", (56, 56)).save(tmp_path / "street.png")
    return tmp_path


def write(folder: Path, *records: object) -> Path:
    path = folder / "rl_data.jsonl"
    path.write_text("\n".join(json.dumps(record) for record in records) + "\n", encoding="utf-8")
    return path


def test_the_published_format_is_read_as_it_is(folder: Path) -> None:
    (row,) = read_rows(write(folder, RECORD))
    assert row == Row(
        "Which sign is red?",
        "A",
        (str(folder / "street.png"),),
        "multiple choice",
        "vsi",
        max_turns=3,
        max_pixels=200704,
        id="rl_data-1",
    )
    assert Row.from_json(json.loads(json.dumps(row.to_json()))) == row


def test_a_step_count_of_0_is_not_set(folder: Path) -> None:
    (row,) = read_rows(write(folder, RECORD | {"max_num_steps": 0, "max_pixels": None}))
    assert row.max_turns is None
    assert row.max_pixels is None


def test_parquet_and_json_hold_the_same_rows(folder: Path) -> None:
    pytest.importorskip("pyarrow", reason="only verl brings it")
    import pyarrow
    import pyarrow.parquet

    expected = read_rows(write(folder, RECORD, RECORD))
    (folder / "rl_data.json").write_text(json.dumps([RECORD, RECORD]), encoding="utf-8")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([RECORD, RECORD]), folder / "rl_data.parquet")
    assert read_rows(folder / "rl_data.json") == expected
    assert read_rows([folder / "rl_data.parquet"]) == expected


@pytest.mark.parametrize("name", ["rl_data.jsonl", "rl_data.json"])
def test_a_byte_order_mark_does_not_matter(folder: Path, name: str) -> None:
    text = json.dumps(RECORD) if name.endswith("l") else json.dumps([RECORD])
    (folder / name).write_text(text, encoding="utf-8")
    expected = read_rows(folder / name)
    (folder / name).write_text(text, encoding="utf-8-sig")
    assert read_rows(folder / name) == expected


def test_a_file_of_a_byte_order_mark_alone_has_no_rows(folder: Path) -> None:
    (folder / "empty.jsonl").write_text("\n", encoding="utf-8-sig")
    with pytest.raises(RowError, match="there are no rows"):
        read_rows(folder / "empty.jsonl")


def embedded(folder: Path) -> tuple[bytes, str]:
    data = (folder / "street.png").read_bytes()
    return data, f"data:image/png;base64,{base64.b64encode(data).decode()}"


def test_a_row_may_hold_its_pictures(folder: Path) -> None:
    """As data URLs, or in Parquet as bytes, or as `datasets` writes a picture; under both names of the column."""
    pytest.importorskip("pyarrow", reason="only verl brings it")
    import pyarrow
    import pyarrow.parquet

    data, url = embedded(folder)
    other = {key: value for key, value in RECORD.items() if key != "image_path"}
    (row,) = read_rows(write(folder, RECORD | {"image_path": [url, "street.png"]}))
    assert row.images == (url, str(folder / "street.png"))
    assert Row.from_json(json.loads(json.dumps(row.to_json()))) == row
    for images in ([data, data], [{"bytes": data, "path": None}, {"bytes": data, "path": "gone.png"}]):
        table = pyarrow.Table.from_pylist([other | {"images": images}])
        pyarrow.parquet.write_table(table, folder / "rl_data.parquet")
        (row,) = read_rows(folder / "rl_data.parquet")
        assert [load_image(image).size for image in row.images] == [(56, 56)] * 2
    table = pyarrow.Table.from_pylist([other | {"images": [{"bytes": None, "path": "street.png"}]}])
    pyarrow.parquet.write_table(table, folder / "rl_data.parquet")
    assert read_rows(folder / "rl_data.parquet")[0].images == (str(folder / "street.png"),)


@pytest.mark.parametrize("name", ["verl", "easyr1"])
def test_the_trainers_datasets_hand_out_rows_that_hold_their_pictures(folder: Path, name: str) -> None:
    pytest.importorskip("torch")
    _, url = embedded(folder)
    path = write(folder, RECORD | {"image_path": [url], "max_pixels": None})
    checkpoint = Path(__file__).parents[2] / "examples" / "vilavt-tiny"
    if name == "verl":
        from vilavt_rl.verl.dataset import VilavtDataset

        config = {"filter_overlong_prompts": True, "max_prompt_length": 2000}
        config = type("Config", (dict,), {"max_prompt_length": 2000})(config)
        data = VilavtDataset(str(path), SimpleNamespace(name_or_path=str(checkpoint)), config)
    else:
        from vilavt_rl.easyr1.dataset import EasyR1Dataset

        config = SimpleNamespace(filter_overlong_prompts=True, max_prompt_length=2000)
        data = EasyR1Dataset(str(path), config, settings_of_checkpoint(checkpoint))
    row = Row.from_json(data[0]["row"])
    assert row.images == (url,)
    driver = start_row(row, settings_of_checkpoint(checkpoint), max_prompt=2000, max_response=100)
    assert [view.image.size for view in driver.conversation.views] == [(56, 56)]


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (
            ["data:image/png;base64,AAAA"],
            "image 0: the image in it: not an image",
        ),
        (
            ["data:image/png;base64,!"],
            "image 0: the image in it: its base64 data cannot be read",
        ),
        (["street.png", "x" * 400_000], "image 1: no image 'xxx"),
        (["street.png", "a\0b"], "image 1: no image"),
        (
            [{"bytes": None, "path": None}],
            "image 0: it is NoneType, it must be a file, a data URL, or bytes",
        ),
        ([{"url": "x"}], "image 0: it has the keys url"),
        ([5], "image 0: it is int"),
    ],
)
def test_a_picture_of_a_row_that_is_none_is_named_in_a_short_message(folder: Path, images: list, message: str) -> None:
    with pytest.raises(RowError) as raised:
        read_rows(write(folder, RECORD | {"image_path": images}))
    assert f"row 1 (sample rl_data-1), {message}" in str(raised.value)
    assert len(str(raised.value)) < 600


def test_a_damaged_picture_of_a_row_is_named_by_its_sample(folder: Path) -> None:
    data, _ = embedded(folder)
    cut = base64.b64encode(data[: len(data) // 2]).decode()
    (row,) = read_rows(write(folder, RECORD | {"image_path": [f"data:image/png;base64,{cut}"]}))
    checkpoint = Path(__file__).parents[2] / "examples" / "vilavt-tiny"
    with pytest.raises(ImageError, match=r"sample rl_data-1: the data URL: .*damaged"):
        start_row(row, settings_of_checkpoint(checkpoint), max_prompt=2000, max_response=100)


def test_two_columns_of_pictures_are_refused(folder: Path) -> None:
    with pytest.raises(RowError, match="it has both 'image_path' and 'images'"):
        read_rows(write(folder, RECORD | {"images": ["street.png"]}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": " "}, "row 2 .*: 'answer' is missing or blank"),
        ({"question": None}, "row 2 .*: 'question'"),
        ({"question_type": "essay"}, "row 2 .*: no question type 'essay'"),
        ({"question_type": "multi-choice"}, "no question type 'multi-choice'.*did you mean 'multiple choice'"),
        ({"question_type": "numerical", "answer": "three"}, "row 2 .*: .*'three'"),
        ({"id": "seven", "answer": "AB"}, r"row 2 \(sample seven\): .*'AB'"),
        ({"answer": "2"}, r"row 2 \(sample rl_data-2\): .*'2'"),
        ({"answer": "<answer>D"}, "row 2 .*'<answer>D'"),
        ({"answer": "E", "options": ["left", "right"]}, "row 2 .*'E' is none of the options 'A. left', 'B. right'"),
        ({"options": "left"}, "row 2 .*options are a str"),
        ({"options": ["left"]}, "row 2 .*one option only"),
        ({"question_type": "regression", "answer": "about half"}, "row 2 .*: .*'about half'"),
        ({"question_type": "judgment", "answer": "maybe"}, "row 2 .*: .*'maybe'"),
        ({"question_type": "box", "answer": "oops"}, "row 2 .*: .*'oops'"),
        ({"question_type": "free-form", "answer": "the"}, "row 2 .*: .*'the'"),
        ({"image_path": "street.png"}, "must be a list of files"),
        ({"image_path": ["gone.png"]}, "no image 'gone.png'"),
        ({"max_pixels": "many"}, "'max_pixels' must be a whole number"),
    ],
)
def test_a_broken_row_is_named(folder: Path, change: dict, message: str) -> None:
    with pytest.raises(RowError, match=message):
        read_rows(write(folder, RECORD, RECORD | change))


def test_a_row_with_a_fitting_answer_of_each_type_is_read(folder: Path) -> None:
    answers = {
        "multiple choice": "B",
        "numerical": 0,
        "regression": "2.5 m",
        "judgment": "No",
        "math": "\\frac{1}{2}",
        "free-form": "a red sign",
        "box": "[1, 2, 3, 4]",
    }
    records = [RECORD | {"question_type": kind, "answer": answer} for kind, answer in answers.items()]
    assert [row.answer for row in read_rows(write(folder, *records))] == [str(answer) for answer in answers.values()]


def test_an_answer_is_kept_without_tag_and_box(folder: Path) -> None:
    wrapped = [
        ("multiple choice", "<answer>D</answer>", "D"),
        ("multiple choice", "\\boxed{D}", "D"),
        ("multiple choice", "$\\boxed{\\text{D}}$", "\\text{D}"),
        ("free-form", "<answer>a red bicycle</answer>", "a red bicycle"),
        ("math", "<answer>\\boxed{\\frac{1}{2}}</answer>", "\\frac{1}{2}"),
    ]
    records = [RECORD | {"question_type": kind, "answer": answer} for kind, answer, _ in wrapped]
    assert [row.answer for row in read_rows(write(folder, *records))] == [bare for *_, bare in wrapped]


def test_every_row_that_is_read_can_earn_the_whole_reward(folder: Path) -> None:
    depth = ["A is closer", "B is closer"]
    records = [
        RECORD | {"answer": "<answer>D</answer>"},
        RECORD | {"answer": "B", "options": depth},
        RECORD | {"answer": "B is closer", "options": {"A": depth[0], "B": depth[1]}},
        RECORD | {"answer": "2", "question": "How many?\nA. 1\nB. 2"},
        RECORD | {"answer": "是", "question_type": "judgment"},
        RECORD | {"answer": "约3米", "question_type": "numerical"},
    ]
    rows = read_rows(write(folder, *records))
    assert [row.options for row in rows[:4]] == [(), *[("A. A is closer", "B. B is closer")] * 2, ("A. 1", "B. 2")]
    assert [Row.from_json(json.loads(json.dumps(row.to_json()))) for row in rows] == rows
    answered = [("D",), *[("B", "(B) B is closer", "B is closer")] * 2, ("B", "2"), ("yes",), ("3 m",)]
    for row, answers in zip(rows, answered, strict=True):
        for answer in answers:
            turn = Message("assistant", f"<think>so</think><answer>{answer}</answer>")
            assert reward(Trajectory((turn,)), row.task).overall == 1, (row.answer, answer)


def test_a_file_that_is_not_there_or_empty_or_not_json_is_named(folder: Path) -> None:
    with pytest.raises(RowError, match="no such file"):
        read_rows(folder / "gone.jsonl")
    (folder / "empty.jsonl").write_text("\n", encoding="utf-8")
    with pytest.raises(RowError, match=r"empty\.jsonl: there are no rows"):
        read_rows(folder / "empty.jsonl")
    (folder / "bad.jsonl").write_text("{", encoding="utf-8")
    with pytest.raises(RowError, match=r"bad\.jsonl, record 0: not JSON"):
        read_rows(folder / "bad.jsonl")
