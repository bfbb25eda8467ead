"""`vilavt data`: what check finds, what stats counts, and that unpacking is safe and goes on where it stopped."""

import json
import random
import stat
import zipfile

import pytest
from PIL import Image
from typer.testing import CliRunner

from vilavt_core.cli import app
from vilavt_core.data.check import call_problems, padding_share
from vilavt_core.data.schema import PublishedRecord
from vilavt_core.data.unpack import unpack
from vilavt_core.errors import DataError

CALL = '<tool>{"region":[{"index":0,"bbox_2d":[0,0,28,28]}],"query":"the sign"}</tool>'
GOOD = {
    "images": ["a.png", "a.png"],
    "conversations": [
        {"from": "human", "value": "<image>q"}, {"from": "gpt", "value": CALL},
        {"from": "human", "value": "<image>"}, {"from": "gpt", "value": "<answer>B</answer>"},
    ],
    "queries": ["", "the sign"],
    "image_to_query_mapping": [0, 1],
}  # fmt: skip


def changed(**change):
    return {**GOOD, **change}


def with_call(text):
    turns = [dict(turn) for turn in GOOD["conversations"]]
    turns[1]["value"] = text
    return changed(conversations=turns)


@pytest.fixture
def annotations(tmp_path):
    """`annotations(records)` -> a JSONL file beside a picture."""
    Image.new("RGB", (56, 56)).save(tmp_path / "a.png")

    def write(records):
        path = tmp_path / "set.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return path

    return write


@pytest.fixture
def vilavt(tiny_checkpoint):
    """Runs a `vilavt data` command with the tiny checkpoint's tokenizer."""

    def run(command, *arguments):
        return CliRunner().invoke(app, ["data", command, *map(str, arguments), "--model", str(tiny_checkpoint),
                                        "--workers", "0"])  # fmt: skip

    return run


def test_a_sound_set_passes(annotations, vilavt):
    done = vilavt("check", annotations([GOOD, GOOD]))
    assert done.exit_code == 0, done.output
    assert "2 records, 0 errors, 0 warnings" in done.output


def test_every_kind_of_defect_is_found_and_fails(annotations, vilavt, tmp_path):
    long = {"conversations": [{"from": "human", "value": "q" * 500}, {"from": "gpt", "value": "a"}]}
    records = [
        GOOD,
        changed(images=["a.png", "gone.png"]),
        changed(images=["a.png"]),
        changed(image_to_query_mapping=[1, 0]),
        {"text": "no record"},
        long,
        with_call(CALL.replace("the sign", "the bus")),
    ]
    report_file = tmp_path / "report.json"
    done = vilavt("check", annotations(records), "--max-length", 400, "--json", report_file)
    assert done.exit_code == 1
    report = json.loads(report_file.read_text())
    assert report["kinds"] == {
        "error: missing file": 1, "error: image marks": 1, "error: query mapping": 1, "error: schema": 1,
        "error: too long": 1, "warning: query": 1,
    }  # fmt: skip
    assert [f["sample"] for f in report["findings"]] == [f"set[{i}]" for i in range(1, 7)]
    assert "7 records, 5 errors, 1 warnings" in done.output


def test_records_that_no_loader_expects_are_findings_too(annotations, vilavt, tmp_path):
    embedded = changed(images=["data:image/png;base64," + "A" * 5000, "a.png"])
    endless = changed(images=["a.png", "b" * 5000])
    path = annotations([GOOD, embedded, endless])
    with path.open("a") as file:
        file.write('{"conversations": ' + "[" * 100_000 + "]" * 100_000 + "}\n" + json.dumps(GOOD) + "\n")
    report_file = tmp_path / "report.json"
    done = vilavt("check", path, "--json", report_file)
    assert done.exit_code == 1
    assert "5 records, 3 errors, 0 warnings" in done.output
    first, second, third = json.loads(report_file.read_text())["findings"]
    assert (first["sample"], first["kind"]) == ("set[1]", "schema")
    assert "set[1]: images holds a data URL of 5022 characters" in first["text"]
    assert (second["sample"], second["kind"]) == ("set[2]", "missing file")
    assert len(second["text"]) < 300
    assert (third["sample"], third["kind"]) == ("set[3]", "schema")
    assert "set.jsonl, record 3: not JSON: it is nested too deeply" in third["text"]


def test_warnings_fail_only_when_asked_to(annotations, vilavt):
    path = annotations([with_call("<tool>{</tool>")])
    assert vilavt("check", path).exit_code == 0
    assert vilavt("check", path, "--strict").exit_code == 1


def test_damage_behind_the_header_is_found_by_decoding(annotations, vilavt, tmp_path):
    path = annotations([GOOD])
    picture = Image.effect_noise((280, 280), 80).convert("RGB")
    picture.save(tmp_path / "a.png")
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(whole[: len(whole) // 2])
    assert vilavt("check", path).exit_code == 0
    done = vilavt("check", path, "--decode")
    assert done.exit_code == 1
    assert "damaged or cut short" in done.output


@pytest.mark.parametrize(
    "record, kind, text",
    [
        (with_call("<tool>{</tool>"), "tool call", "turn 1"),
        (with_call(CALL.replace('"index":0', '"index":3')), "tool call", "region 0 names image 3, 1 were shown"),
        (with_call(CALL.replace("the sign", " ")), "tool call", "turn 1"),
        (with_call(CALL.replace("the sign", "the bus")), "query", "['the sign'], the call asks 'the bus'"),
        (changed(conversations=GOOD["conversations"][:2], images=["a.png"], queries=[""], image_to_query_mapping=[0]),
         "crops", "the last tool call has no response"),
        (with_call(CALL.replace("}],", '},{"index":0,"bbox_2d":[0,0,9,9]}],')), "crops", "1 images follow a call of 2"),
    ],
)  # fmt: skip
def test_what_a_tool_call_would_teach_wrongly_is_named(record, kind, text):
    (found,) = call_problems(PublishedRecord.model_validate(record))
    assert found[0] == kind
    assert text in found[1]


def test_stats_count_samples_tokens_and_what_packing_saves(annotations, vilavt, tmp_path):
    texts = [
        {"conversations": [{"from": "human", "value": "q" * n}, {"from": "gpt", "value": "a"}]}
        for n in range(0, 300, 30)
    ]
    report_file = tmp_path / "stats.json"
    done = vilavt("stats", annotations([GOOD, *texts, {"x": 1}]), "--pack", 1000, "--json", report_file)
    assert done.exit_code == 0, done.output
    report = json.loads(report_file.read_text())
    (row,) = report["data_sets"]
    assert (row["samples"], row["images"], row["turns"], row["dropped"]) == (11, 2, 12, {"schema": 1})
    assert row["image_tokens"] == 8
    assert row["length_quantiles"]["max"] == max(row["length_quantiles"].values())
    assert 0 < report["empty"] < 0.5
    assert report["padding"]["8"] > report["padding"]["2"] > 0


def test_equal_samples_need_no_padding():
    assert padding_share([7] * 12, 4) == 0
    assert padding_share([1, 3], 2) == pytest.approx(1 / 3)


def test_a_check_needs_to_know_whose_tokens_count(annotations):
    done = CliRunner().invoke(app, ["data", "check", str(annotations([GOOD]))])
    assert done.exit_code == 2


@pytest.fixture
def run_file(annotations, tiny_checkpoint, tmp_path):
    """Configuration of a run that trains on two sound records and validates on a sound and a broken one."""
    annotations([GOOD, GOOD])
    held_out = [changed(images=["a.png", "gone.png"]), GOOD]
    (tmp_path / "held.jsonl").write_text("".join(json.dumps(record) + "\n" for record in held_out))
    (tmp_path / "sets.yaml").write_text(
        "datasets: [{name: set, annotations: set.jsonl}, {name: held, annotations: held.jsonl}]"
    )
    path = tmp_path / "run.yaml"
    path.write_text(
        f"model: {{path: {tiny_checkpoint}}}\noutput: {{folder: {tmp_path / 'out'}}}\n"
        f"data: {{use: [set], validation: [held], registry: {tmp_path / 'sets.yaml'}}}\n"
    )
    return path


def test_a_check_of_a_run_looks_at_what_it_validates_on_too(run_file, tmp_path):
    report_file = tmp_path / "report.json"
    arguments = ["data", "check", "--config", str(run_file), "--workers", "0", "--json", str(report_file)]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 1
    assert "4 records (2 of them to validate on), 1 errors, 0 warnings" in done.output
    report = json.loads(report_file.read_text())
    assert report["records"] == 4
    assert [(f["sample"], f["kind"]) for f in report["findings"]] == [("held[0]", "missing file")]


def test_stats_of_a_run_count_what_it_validates_on_but_not_among_the_packs(run_file, tmp_path):
    reports = []
    for text in (run_file.read_text(), run_file.read_text().replace("validation: [held], ", "")):
        run_file.write_text(text)
        arguments = ["data", "stats", "--config", str(run_file), "--workers", "0", "--json", str(tmp_path / "s.json")]
        assert CliRunner().invoke(app, arguments).exit_code == 0
        reports.append(json.loads((tmp_path / "s.json").read_text()))
    with_validation, without = reports
    (row,) = with_validation["data_sets"][1:]
    assert (row["name"], row["samples"], row["dropped"]) == ("validation: held", 1, {"missing file": 1})
    assert with_validation | {"data_sets": with_validation["data_sets"][:1]} == without


@pytest.mark.parametrize("command", ["check", "stats"])
@pytest.mark.parametrize(
    "arguments, named",
    [
        (["--config", "{run}", "{set}"], "WHAT"),
        (["--config", "{run}", "--model", "x"], "--model"),
        (["--config", "{run}", "--max-length", "24576"], "--max-length"),
        (["--config", "{run}", "--crops", "cut"], "--crops"),
        (["{set}", "--model", "{tiny}", "--root", "x"], "--root"),
        (["set", "--registry", "{sets}", "--model", "{tiny}", "--images", "x"], "--images"),
    ],
)
def test_an_option_that_would_have_no_effect_is_refused(run_file, tiny_checkpoint, tmp_path, command, arguments, named):
    places = {"run": run_file, "set": tmp_path / "set.jsonl", "sets": tmp_path / "sets.yaml", "tiny": tiny_checkpoint}
    done = CliRunner().invoke(app, ["data", command, *(a.format(**places) for a in arguments)])
    assert done.exit_code == 2
    assert f"{named} has no effect: " in done.stderr


# ------------------------------------------------------------------------------------------- unpack


def archive(path, entries, compression=zipfile.ZIP_DEFLATED):
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, data in entries.items():
            file.writestr(name, data)
    return path


def test_archives_are_unpacked_where_they_lie(tmp_path):
    archive(tmp_path / "sft" / "A_part1.zip", {"images/1.png": b"one", "a.json": b"[]"})
    archive(tmp_path / "sft" / "A_part2.ZIP", {"images/2.png": b"two"})
    archive(tmp_path / "rl" / "b.zip", {"3.png": b"three"})
    report = unpack(tmp_path)
    assert (report.archives, report.written, report.kept, report.failures) == (3, 4, 0, [])
    assert (tmp_path / "sft" / "images" / "2.png").read_bytes() == b"two"
    assert (tmp_path / "rl" / "3.png").read_bytes() == b"three"
    again = unpack(tmp_path)
    assert (again.written, again.kept) == (0, 4)


def test_unpacking_goes_on_where_it_stopped_and_repairs_what_is_wrong(tmp_path):
    path = archive(tmp_path / "a.zip", {f"{i}.bin": bytes([i]) * 1000 for i in range(5)})
    unpack(tmp_path)
    (tmp_path / ".unpacked.json").unlink()
    (tmp_path / "1.bin").unlink()
    (tmp_path / "2.bin").write_bytes(b"short")
    (tmp_path / "3.bin").write_bytes(b"x" * 1000)  # the right size, the wrong bytes
    report = unpack(tmp_path)
    assert (report.written, report.kept) == (3, 2)
    assert (tmp_path / "3.bin").read_bytes() == bytes([3]) * 1000
    (tmp_path / "4.bin").unlink()
    assert unpack(tmp_path).written == 1  # the record of finished archives is checked against the disk
    assert unpack(tmp_path, remove=True).kept == 5
    assert not path.exists()


@pytest.mark.parametrize("name", ["../evil.txt", "/evil.txt", "a/../../evil.txt", "C:/evil.txt", "a//b"])
def test_no_entry_leaves_its_folder(tmp_path, name):
    home = tmp_path / "home"
    archive(home / "a.zip", {"good.txt": b"good", name: b"evil"})
    archive(home / "b.zip", {"fine.txt": b"fine"})
    report = unpack(home)
    (failure,) = report.failures
    assert "would land outside" in failure
    assert "nothing of it is unpacked" in failure
    assert sorted(p.name for p in tmp_path.rglob("*.txt")) == ["fine.txt"]


def test_links_are_refused_and_not_followed(tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    with zipfile.ZipFile(home / "a.zip", "w") as file:
        info = zipfile.ZipInfo("link")
        info.external_attr = (stat.S_IFLNK | 0o777) << 16
        file.writestr(info, str(tmp_path))
    (home / "out").symlink_to(tmp_path)
    archive(home / "b.zip", {"out/evil.txt": b"evil"})
    report = unpack(home)
    assert len(report.failures) == 2
    assert not (tmp_path / "evil.txt").exists()


@pytest.mark.parametrize("compression", ["ZIP_STORED", "ZIP_DEFLATED", "ZIP_BZIP2", "ZIP_LZMA"])
def test_a_damaged_archive_is_reported_and_leaves_no_half_file(tmp_path, compression):
    entries = {"1.bin": b"0" * 100, "2.bin": random.Random(0).randbytes(5000)}
    path = archive(tmp_path / "a.zip", entries, getattr(zipfile, compression))
    raw = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as file:
        begin = file.getinfo("2.bin").header_offset + 60
    raw[begin : begin + 1000] = b"\xff" * 1000
    path.write_bytes(raw)
    archive(tmp_path / "b.zip", {"3.bin": b"fine"})
    report = unpack(tmp_path)
    (failure,) = report.failures
    assert "a.zip" in failure
    assert sorted(p.name for p in tmp_path.glob("*.bin")) == ["1.bin", "3.bin"]
    assert not list(tmp_path.rglob("*.partial"))


def test_unpacking_again_after_the_archives_were_removed_is_no_error(tmp_path):
    archive(tmp_path / "a.zip", {"1.bin": b"one"})
    assert unpack(tmp_path, remove=True).written == 1
    again = CliRunner().invoke(app, ["data", "unpack", str(tmp_path), "--remove"])
    assert again.exit_code == 0, again.output
    assert "0 archives: 0 files written" in again.output
    assert (tmp_path / "1.bin").read_bytes() == b"one"


def test_a_folder_without_archives_is_an_error(tmp_path):
    with pytest.raises(DataError, match="there is no zip archive in it"):
        unpack(tmp_path)
    with pytest.raises(DataError, match="no such folder"):
        unpack(tmp_path / "gone")
    done = CliRunner().invoke(app, ["data", "unpack", str(tmp_path / "gone")])
    assert done.exit_code == 1
