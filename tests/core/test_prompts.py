import copy
import pickle
import textwrap
from pathlib import Path

import pytest
from typer.testing import CliRunner

from vilavt_core.cli import app
from vilavt_core.errors import PromptError
from vilavt_core.prompts import TEMPLATES, PromptSet, builtin_names
from vilavt_core.prompts.importer import import_prompts


def changed(**templates) -> dict[str, str]:
    return {**PromptSet.load("default").templates, **templates}


@pytest.mark.parametrize("name", builtin_names())
def test_a_saved_set_loads_as_it_was(name, tmp_path):
    prompts = PromptSet.load(name)
    prompts.save(tmp_path / "prompts")
    again = PromptSet.load(tmp_path / "prompts")
    assert again == prompts
    assert again.sha256 == prompts.sha256


def test_both_built_in_sets_are_there():
    assert builtin_names() == ["default", "tiny"]


def test_the_hash_changes_with_any_letter():
    base = PromptSet("x", changed())
    assert PromptSet("x", changed()).sha256 == base.sha256
    assert PromptSet("x", changed(final="Answer.")).sha256 != base.sha256
    assert PromptSet("x", changed(), version="2").sha256 != base.sha256


def test_templates_are_kept_byte_for_byte(tmp_path):
    text = "a\r\nb\n\n é\t{{x}} \n"
    PromptSet("x", changed(final=text)).save(tmp_path)
    assert PromptSet.load(tmp_path).text("final") == text


def test_values_are_never_scanned_again():
    prompts = PromptSet("x", changed(user="${images}|$question|$$"))
    assert prompts.text("user", images="$question", question="$images ${x} $$ {y}") == "$question|$images ${x} $$ {y}|$"


def test_an_image_is_a_piece_of_its_own():
    prompts = PromptSet("x", changed(original="index=$index $image\n"))
    assert prompts.render("original", image=3, index=3) == ("index=3 ", 3, "\n")
    assert prompts.render("user_raw", question=("a ", 0, " b"))[:2] == ("a ", 0)


def test_a_template_that_is_left_out_falls_back():
    prompts = PromptSet.load("tiny")
    assert "original_sized" not in prompts.templates
    line = prompts.render("original_sized", image=0, index=0, width=28, height=28)
    assert line == prompts.render("original", image=0, index=0)


def test_a_set_without_a_block_for_one_turn_offers_no_zoom_in_it_all_the_same():
    templates = {name: text for name, text in PromptSet.load("default").templates.items() if name != "user_no_zoom"}
    text = PromptSet("x", templates).text("user_no_zoom", images="One image.", question="Which?")
    assert "Which?" in text
    assert "<tool>" not in text


@pytest.mark.parametrize(
    ("templates", "message"),
    [
        ({"final": "$question"}, r"'final': unknown placeholders \['question'\]"),
        ({"user": "no question"}, r"'user': placeholders \['question'\] are missing"),
        ({"crop": "$image $image"}, r"\$image occurs 2 times"),
        ({"final": "costs $ 5"}, r"bare \$ at character 6"),
        ({"finale": "x"}, r"unknown templates \['finale'\]"),
    ],
)
def test_a_wrong_template_is_refused_by_name(templates, message):
    with pytest.raises(PromptError, match=message):
        PromptSet("x", changed(**templates))


def test_a_missing_template_is_refused_by_name(tmp_path):
    PromptSet.load("default").save(tmp_path)
    (tmp_path / "final.txt").unlink()
    with pytest.raises(PromptError, match=r"lacks the templates \['final'\]; add final\.txt"):
        PromptSet.load(tmp_path)


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        ("{", "cannot be read"),
        ("[]", "not an object"),
        ('{"format": 2}', "format 2, this version reads 1"),
        (None, "no prompts.json there"),
    ],
)
def test_a_broken_folder_is_refused(manifest, message, tmp_path):
    if manifest is not None:
        (tmp_path / "prompts.json").write_text(manifest)
    with pytest.raises(PromptError, match=message):
        PromptSet.load(tmp_path)


def test_the_tiny_set_tells_nothing_of_the_turn_limit():
    prompts = PromptSet.load("tiny")
    assert all(not any(word in text for word in ("turn", "limit", "$limit")) for text in prompts.templates.values())


CHECKOUT = {
    "verl/utils/vilavt_utils.py": '''
        REASONING_SYSTEM_PROMPT = """Look well. {"region": 1} <tool>{}</tool> costs $5\\n"""
        IMAGE_INDEX_PROMPT = "Picture {index}\\n"
        IMAGE_INDEX_PROMPT_V2 = ("Detail {current_image_idx}: " "{width} by {height}\\n")
        IMAGE_QUESTION_PROMPT = "One picture, {width}/{height}."
        VIDEO_QUESTION_PROMPT = "{n_frames} pictures up to {n_frames_1}, {width}/{height}."
        MULTI_IMAGE_QUESTION_PROMPT = "{n_frames} pictures up to {n_frames_1}."
        USER_PROMPT = """{image_instruction} Asked: {question} <tool>{{"a": 1}}</tool> <answer></answer>"""
        RESPONSE_PROMPT = """More: <tool>{{"index": }}</tool> or <answer></answer>"""
        RESPONSE_PROMPT_FINAL = "Done: <answer></answer>"
        raise SystemExit("this file must never run")
        ''',
    "eval/utils.py": '''
        import os
        os.mkdir("EVIDENCE")
        SIMPLE_SYS_PROMPT = "Be brief."
        IMAGE_INDEX_PROMPT_V1 = "Picture {current_image_idx}, {width} by {height}\\n"
        def generate_prompt_simple_qa(user_question):
            prompt = f"""Say: "{user_question}" for $1 <answer>"""
            return prompt
        def use(q):
            return USER_PROMPT.format(image_instruction="", question=q)
        ''',
    "eval/vilavt_rl.py": '''
        def _prepare_content_multi_image(self):
            """A <tool> and an <answer> in a docstring."""
            return ["<tool>{{}}</tool> then <answer>"]
        ''',
    "VLMEvalKit/vlmeval/vlm/vilavt/utils.py": """
        USER_PROMPT = "{image_instruction} Short: {question} <tool> <answer>"
        """,
}


def write(root: Path, **replaced: str) -> Path:
    for name, text in {**CHECKOUT, **replaced}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(textwrap.dedent(text))
    return root


def test_a_checkout_is_read_without_running_it(tmp_path):
    report = import_prompts(write(tmp_path))
    prompts = report.prompts
    assert not Path("EVIDENCE").exists()
    assert prompts.text("system") == 'Look well. {"region": 1} <tool>{}</tool> costs $5\n'
    assert prompts.render("original", image=2, index=2) == (2, "Picture 2\n")
    assert prompts.render("original_sized", image=2, index=2, width=5, height=6) == (2, "Picture 2, 5 by 6\n")
    assert prompts.render("crop", image=2, index=2, width=5, height=6) == (2, "Detail 2: 5 by 6\n")
    assert prompts.text("images_one", width=5, height=6) == "One picture, 5/6."
    assert prompts.text("images_many", count=3, last=2, width=5, height=6) == "3 pictures up to 2, 5/6."
    assert prompts.text("images_many_unsized", count=3, last=2) == "3 pictures up to 2."
    assert prompts.text("user", images="I", question="Q") == 'I Asked: Q <tool>{"a": 1}</tool> <answer></answer>'
    assert prompts.text("user_reduced", images="I", question="Q") == "I Short: Q <tool> <answer>"
    assert prompts.text("final") == "Done: <answer></answer>"
    assert prompts.text("fallback_system") == "Be brief."
    assert prompts.text("fallback_user", question="Q") == 'Say: "Q" for $1 <answer>'
    assert set(report.from_default) == {"bad_call", "no_action", "images_full", "follow_up", "user_no_zoom"}
    assert "IMAGE_INDEX_PROMPT_V2 (verl/utils/vilavt_utils.py:" in "\n".join(report.lines())


def test_a_text_that_is_never_formatted_keeps_its_doubled_braces(tmp_path):
    prompts = import_prompts(write(tmp_path)).prompts
    assert prompts.text("continue") == 'More: <tool>{{"index": }}</tool> or <answer></answer>'
    assert prompts.text("user_raw", question="Q") == "Q<tool>{{}}</tool> then <answer>"


def test_unknown_names_are_recognised_by_what_they_must_contain(tmp_path):
    text = (
        CHECKOUT["verl/utils/vilavt_utils.py"]
        .replace("RESPONSE_PROMPT_FINAL", "THE_LAST")
        .replace("REASONING_SYSTEM_PROMPT", "SYS")
    )
    report = import_prompts(write(tmp_path, **{"verl/utils/vilavt_utils.py": text}))
    assert report.prompts.text("final") == "Done: <answer></answer>"
    assert set(report.guessed) == {"final", "system"}


def test_two_different_texts_of_one_name_are_refused_with_both_places(tmp_path):
    other = CHECKOUT["eval/utils.py"].rstrip(" ") + '        RESPONSE_PROMPT_FINAL = "Other: <answer></answer>"\n'
    with pytest.raises(PromptError, match=r"final: 2 different texts.*vilavt_utils\.py:\d+.*eval/utils\.py:\d+"):
        import_prompts(write(tmp_path, **{"eval/utils.py": other}))


def test_a_missing_text_is_refused_with_the_candidates(tmp_path):
    text = CHECKOUT["verl/utils/vilavt_utils.py"].replace("IMAGE_INDEX_PROMPT_V2", "LINE")
    with pytest.raises(PromptError, match=r"crop \(as IMAGE_INDEX_PROMPT_V2\); texts found: .*LINE \("):
        import_prompts(write(tmp_path, **{"verl/utils/vilavt_utils.py": text}))


def test_files_that_cannot_be_parsed_are_reported(tmp_path):
    broken = {"vllm_eval/utils.py": "def (", "vllm_eval/infer_vilavt_vllm.py": "x = " + "(" * 5000}
    report = import_prompts(write(tmp_path, **broken))
    assert [name.split(":")[0] for name in report.skipped_files] == [
        "vllm_eval/infer_vilavt_vllm.py",
        "vllm_eval/utils.py",
    ]


def test_what_is_no_checkout_is_refused(tmp_path):
    with pytest.raises(PromptError, match="no such folder"):
        import_prompts(tmp_path / "none")
    with pytest.raises(PromptError, match="no prompt texts in 0 Python files"):
        import_prompts(tmp_path)


def test_the_command_imports_shows_and_does_not_overwrite(tmp_path):
    run = CliRunner().invoke
    out = tmp_path / "checkpoint" / "prompts"
    done = run(app, ["prompts", "import", str(write(tmp_path / "up")), "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert "19 templates" in done.output
    assert isinstance(run(app, ["prompts", "import", str(tmp_path / "up"), "--out", str(out)]).exception, PromptError)
    assert run(app, ["prompts", "import", str(tmp_path / "up"), "--out", str(out), "--force"]).exit_code == 0
    assert "Done: <answer>" in run(app, ["prompts", "show", str(out.parent)]).output
    assert run(app, ["prompts", "show", "tiny", "--template", "final"]).output == PromptSet.load("tiny").text("final")


def test_every_template_has_a_purpose():
    assert all(info.purpose for info in TEMPLATES.values())


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda prompts: pickle.loads(pickle.dumps(prompts))])
def test_a_set_can_be_copied_and_sent_to_another_process(again):
    prompts = PromptSet.load("default")
    twin = again(prompts)
    assert twin == prompts
    assert twin.sha256 == prompts.sha256
    with pytest.raises(TypeError):
        twin.templates["system"] = "another"
