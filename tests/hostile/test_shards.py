"""Shards of a training run that no trainer wrote: each is refused as what it is, and nothing else happens."""

import json
import os
import pickle
from collections import OrderedDict
from types import SimpleNamespace

import pytest
import torch
from measuring import measured

from vilavt_core.errors import CheckpointError
from vilavt_rl.merge import _plan_dtensor, merge_shards

ONE = torch.ones(2, 3)


class Runs:
    """Runs when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("ran",)


STATES = {
    "a list": [ONE],
    "a tensor": ONE,
    "nothing": {},
    "none": None,
    "numbers as names": {1: ONE},
    "an escape as a name": {"\x1b[2J": ONE, "module.\x1b[2J": ONE},
    "a long name": {"x" * 1_000_000: ONE},
    "a model that is none": {"model": {1: ONE}},
    "sparse": {"a": ONE.to_sparse()},
    "complex": {"a": ONE.to(torch.complex64)},
    "on no device": {"a": torch.empty(10**9, device="meta")},
    "terabytes out of one number": {"a": torch.ones(1).expand(10**6, 10**6)},
    "ordered": OrderedDict(a=ONE),
    "code": {"a": Runs()},
}


def folder_of(tmp_path, *states):
    folder = tmp_path / "in"
    (folder / "huggingface").mkdir(parents=True)
    (folder / "huggingface" / "config.json").write_text(json.dumps({"model_type": "vilavt"}))
    for rank, state in enumerate(states):
        torch.save(state, folder / f"model_world_size_{len(states)}_rank_{rank}.pt")
    return folder


def refused(folder, out) -> str:
    found, seconds, grown = measured(lambda: merge_shards(folder, out))
    assert isinstance(found, CheckpointError), found
    assert not out.exists()
    assert len(str(found)) < 1000
    assert str(found).isprintable()
    assert seconds < 60
    assert grown < 200 * 2**20
    return str(found)


@pytest.mark.parametrize("name", STATES)
@pytest.mark.parametrize("world", [1, 2])
def test_a_state_that_no_trainer_wrote_is_refused(tmp_path, name, world, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(folder_of(tmp_path, *[STATES[name]] * world), tmp_path / "out")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("data", [b"", b"PK", b"PK\3\4" * 1000, pickle.dumps(Runs()), b"\x80\x02" + b"(" * 100_000])
def test_a_file_that_torch_did_not_write_is_refused(tmp_path, data, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = folder_of(tmp_path)
    (folder / "model_world_size_1_rank_0.pt").write_bytes(data)
    assert "cannot be read" in refused(folder, tmp_path / "out")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "names, words",
    [
        (["model_world_size_1000000000_rank_0.pt"], "has 1 of 1000000000 shards; missing rank 1, 2"),
        ([f"model_world_size_{'9' * 200}_rank_0.pt"], "missing rank 1, 2"),
        (["model_world_size_0_rank_0.pt"], "has shards of world size 0"),
        (["model_world_size_1_rank_0.pt", "model_world_size_1_rank_00.pt"], "are the same rank"),
        (["model_world_size_1_rank_0.pt", "model_world_size_1_rank_7.pt"], "has rank 7 of world size 1"),
        (["model_world_size_1_rank_0.pt", "model_world_size_2_rank_0.pt"], "holds shards of world sizes [1, 2]"),
        (["model_world_size_-1_rank_0.pt", "xmodel_world_size_1_rank_0.pt"], "has no model_world_size_W_rank_R.pt"),
    ],
    ids=str,
)
def test_names_of_shards_that_no_trainer_gave_are_refused(tmp_path, names, words):
    folder = folder_of(tmp_path)
    for name in names:
        torch.save({"a": ONE}, folder / name)
    assert words in refused(folder, tmp_path / "out")


def test_parts_that_make_up_no_tensor_are_refused(tmp_path):
    parts = ({"a": torch.ones(2, 3)}, {"a": torch.ones(2, 4)})
    assert "has parts of shapes [[2, 3], [2, 4]]" in refused(folder_of(tmp_path, *parts), tmp_path / "out")


def test_sharded_parts_that_make_up_no_tensor_are_refused(tmp_path):
    mesh = SimpleNamespace(mesh=torch.arange(2), mesh_dim_names=("fsdp",))
    shard = torch.distributed.tensor.Shard(0)

    def value(*shape):
        spec = SimpleNamespace(mesh=mesh, placements=(shard,), tensor_meta=SimpleNamespace(shape=torch.Size([4, 3])))
        return SimpleNamespace(_spec=spec, _local_tensor=torch.ones(*shape))

    files = [tmp_path / "0", tmp_path / "1"]
    plan, _ = _plan_dtensor("a", [value(1, 3), value(3, 3)], files)
    assert plan.shape == (4, 3)
    for odd in ((3, 4), (3,), (3, 3, 1)):
        with pytest.raises(CheckpointError, match="cannot make up"):
            _plan_dtensor("a", [value(1, 3), value(*odd)], files)
