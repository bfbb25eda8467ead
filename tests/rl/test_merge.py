"""FSDP shards to one checkpoint, on shards that real FSDP processes wrote."""

import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from vilavt_core.checkpoint import Checkpoint, verify_same_tensors, writing
from vilavt_core.errors import CheckpointError
from vilavt_core.settings import save_chat_settings
from vilavt_hf import VilavtChat, VilavtForConditionalGeneration
from vilavt_rl import merge as merge_module
from vilavt_rl.cli import app
from vilavt_rl.merge import merge_shards
from vilavt_rl.run_settings import note_settings

TRAINER = '''
"""Shard a model as trainers do, one process per rank, and save the shard of every rank.

Usage: CHECKPOINT ROOT KIND=WORLD_SIZE...; the shards of a kind go to ROOT/KIND. Processes are forked after the imports.
"""
import multiprocessing, sys
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardedStateDictConfig, StateDictType, fully_shard
from vilavt_hf import VilavtForConditionalGeneration

def train(rank, world, kind, checkpoint, root):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{root}/{kind}.store", rank=rank, world_size=world)
    model = VilavtForConditionalGeneration.from_pretrained(checkpoint)
    if kind == "hsdp":
        mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("ddp", "fsdp"))
    else:
        mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("fsdp",))
    if kind == "fsdp1":
        model = FullyShardedDataParallel(model, device_mesh=mesh, device_id=torch.device("cpu"))
        sharded = (model, StateDictType.SHARDED_STATE_DICT, ShardedStateDictConfig(offload_to_cpu=True))
        with FullyShardedDataParallel.state_dict_type(*sharded):
            state = model.state_dict()
    else:
        for block in [*model.model.language_model.layers, *model.model.visual.blocks]:
            fully_shard(block, mesh=mesh)
        state = fully_shard(model, mesh=mesh).state_dict()
    torch.save(state, f"{root}/{kind}/model_world_size_{world}_rank_{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()

checkpoint, root, *runs = sys.argv[1:]
fork = multiprocessing.get_context("fork")
for run in runs:
    kind, world = run.split("=")
    arguments = (int(world), kind, checkpoint, root)
    ranks = [fork.Process(target=train, args=(rank, *arguments), daemon=True) for rank in range(int(world))]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
        if process.exitcode != 0:
            sys.exit(f"{kind}: a rank ended with {process.exitcode}")  # the others are daemons and end too
'''
RUNS = {"fsdp2": 2, "fsdp1": 2, "hsdp": 4, "uneven": 3}


@pytest.fixture(autouse=True)
def _unsynced(monkeypatch):
    monkeypatch.setattr(writing, "_sync", lambda path: None)


@pytest.fixture(scope="module")
def shards(golden, tmp_path_factory, processor) -> dict[str, Path]:
    """Kind -> folder as EasyR1 and verl lay it out, written by that many FSDP processes."""
    root = tmp_path_factory.mktemp("runs")
    for kind in RUNS:
        (root / kind / "huggingface").mkdir(parents=True)
        for name in ("config.json", "generation_config.json"):
            shutil.copy(golden.checkpoint / name, root / kind / "huggingface")
        processor.save_pretrained(root / kind / "huggingface")
    runs = [f"{kind}={world}" for kind, world in RUNS.items()]
    done = subprocess.run(
        [sys.executable, "-c", TRAINER, str(golden.checkpoint), str(root), *runs],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return {kind: root / kind for kind in RUNS}


@pytest.fixture
def copy_of(shards, tmp_path):
    """A copy of a run's folder that a test may damage."""

    def copy(kind: str = "fsdp2") -> Path:
        return Path(shutil.copytree(shards[kind], tmp_path / "actor"))

    return copy


@pytest.mark.parametrize(
    ("kind", "mesh"), [("fsdp2", "fsdp=2"), ("fsdp1", "fsdp=2"), ("hsdp", "ddp=2 x fsdp=2"), ("uneven", "fsdp=3")]
)
def test_merged_shards_are_the_model_that_was_sharded(golden, shards, tmp_path, kind, mesh):
    report = merge_shards(shards[kind], tmp_path / "out", dtype="keep")
    assert (report.world_size, report.mesh, report.tensors) == (RUNS[kind], mesh, 171)
    assert verify_same_tensors(golden.checkpoint, tmp_path / "out") == 171


def test_dimensions_that_ranks_do_not_divide_really_occur(shards):
    """64 rows on 3 ranks: the case the previous test must have covered."""
    path = shards["uneven"] / "model_world_size_3_rank_2.pt"
    with merge_module._readable_dtensors():
        state = torch.load(path, weights_only=True)
    assert state["model.visual.blocks.0.norm1.weight"]._local_tensor.shape == (20,)


def test_output_is_bf16_by_default_and_the_config_says_so(golden, shards, tmp_path):
    report = merge_shards(shards["fsdp2"], tmp_path / "out")
    assert report.nbytes == 2655680 // 2
    tensors, expected = (
        load_file(tmp_path / "out/model.safetensors"),
        load_file(golden.checkpoint / "model.safetensors"),
    )
    for name, tensor in expected.items():
        assert torch.equal(tensors[name], tensor.to(torch.bfloat16)), name
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["dtype"] == "bfloat16"
    model = VilavtForConditionalGeneration.from_pretrained(tmp_path / "out", dtype="auto")
    assert model.model.text_proj.weight.dtype == torch.bfloat16


def test_large_results_are_sharded_with_an_index_and_load(golden, shards, tmp_path):
    merge_shards(shards["fsdp2"], tmp_path / "out", dtype="fp32", max_shard_bytes=400_000)
    checkpoint = Checkpoint.open(tmp_path / "out").require_sound()
    assert len(checkpoint.shards) > 5
    assert all(shard.size < 450_000 for shard in checkpoint.shards)
    assert checkpoint.index["metadata"] == {"total_size": 2655680, "total_parameters": 663920}
    ours = VilavtForConditionalGeneration.from_pretrained(tmp_path / "out")
    published = VilavtForConditionalGeneration.from_pretrained(golden.checkpoint)
    for (name, a), (_, b) in zip(ours.named_parameters(), published.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_the_step_folder_above_the_shards_is_accepted(shards, tmp_path):
    (tmp_path / "global_step_7").mkdir()
    shutil.copytree(shards["fsdp2"], tmp_path / "global_step_7" / "actor")
    assert merge_shards(tmp_path / "global_step_7", tmp_path / "out").source.name == "actor"


def test_processor_and_query_tokenizer_come_along(shards, tmp_path):
    report = merge_shards(shards["fsdp2"], tmp_path / "out")
    assert report.missing == ()
    assert (tmp_path / "out/query_tokenizer/tokenizer.json").exists()
    assert json.loads((tmp_path / "out/provenance.json").read_text())["details"]["mesh"] == "fsdp=2"


def test_mappings_are_renewed_while_reading_and_the_result_is_the_same(golden, shards, tmp_path, monkeypatch):
    renewals = []
    original = merge_module._Ranks._map
    monkeypatch.setattr(merge_module, "_RENEW_AFTER", 100_000)
    monkeypatch.setattr(merge_module, "_CHUNK_ELEMENTS", 1_000)
    monkeypatch.setattr(merge_module._Ranks, "_map", lambda self: (renewals.append(1), original(self)))
    merge_shards(shards["fsdp2"], tmp_path / "out", dtype="keep")
    assert len(renewals) > 20
    assert verify_same_tensors(golden.checkpoint, tmp_path / "out") == 171


def test_a_config_of_the_sft_flavour_gets_its_query_encoder_from_the_shapes(golden, copy_of, tmp_path):
    source = copy_of()
    config = json.loads((golden.configs / "sft_before_reload.tf4.57.1.json").read_text())
    (source / "huggingface/config.json").write_text(json.dumps(config))
    merge_shards(source, tmp_path / "out", dtype="keep")
    merged = json.loads((tmp_path / "out/config.json").read_text())
    assert (merged["model_type"], merged["text_encoder_config"]["num_key_value_heads"]) == ("vilavt", 2)


def test_command_reports_ranks_and_mesh(shards, tmp_path):
    arguments = ["merge", str(shards["hsdp"]), str(tmp_path / "out"), "--dtype", "fp32", "--max-shard-gb", "0.001"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "171 tensors, 2.66 MB, fp32, from 4 ranks (mesh ddp=2 x fsdp=2)" in result.output
    assert len(Checkpoint.open(tmp_path / "out").shards) == 3


# ---------------------------------------------------------------------- how the result is run


@pytest.fixture
def run(shards, tmp_path):
    """`run(**settings)`: a run with these settings, which has saved a step."""

    def make(**settings) -> Path:
        shutil.copytree(shards["fsdp2"], tmp_path / "run" / "global_step_7" / "actor")
        note_settings(str(tmp_path / "run"), str(tmp_path / "no-such-base"), json.dumps(settings))
        return tmp_path / "run" / "global_step_7" / "actor"

    return make


def asks_for(folder: Path) -> dict:
    return json.loads((folder / "vilavt_chat.json").read_text())


def test_a_merged_checkpoint_is_run_as_the_episodes_of_its_run(run, tmp_path):
    source = run(preset="rl", limits={"max_turns": 3, "max_pixels": 28224})
    (source / "huggingface" / "vilavt_chat.json").write_text('{"preset": "default", "limits": {"max_turns": 9}}')
    report = merge_shards(source, tmp_path / "out")
    assert asks_for(tmp_path / "out") == {"preset": "rl", "limits": {"max_turns": 3, "max_pixels": 28224}}
    assert report.runs_as.startswith("preset rl, 3,136 to 28,224 pixels for an image, at most 3 turns")
    chat = VilavtChat.from_pretrained(tmp_path / "out", device="cpu")
    assert (chat.settings.preset.name, chat.settings.limits.max_turns) == ("rl", 3)


def test_the_card_of_a_merged_checkpoint_names_what_the_run_noted(shards, tmp_path):
    source = tmp_path / "run" / "global_step_7" / "actor"
    shutil.copytree(shards["fsdp2"], source)
    command = "vilavt-rl easyr1 recipe data.train_files=/data/rows.jsonl"
    note_settings(str(tmp_path / "run"), "owner/base", '{"preset": "rl"}', ("/data/rows.jsonl",), command)
    merge_shards(source, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "# ViLaVT checkpoint, after reinforcement learning" in card
    assert "base_model: owner/base\n" in card
    assert "| data | rows.jsonl |" in card
    assert "| preset | rl, " in card
    assert "vilavt-rl easyr1 recipe data.train_files=rows.jsonl\n" in card
    assert "`merge`, " in card


def test_a_run_can_name_how_its_checkpoints_are_run(run, tmp_path):
    source = run(
        preset="rl", limits={"max_pixels": 28224}, inference={"preset": "default", "limits": {"max_pixels": 50000}}
    )
    merge_shards(source.parent, tmp_path / "out")
    assert asks_for(tmp_path / "out") == {"preset": "default", "limits": {"max_pixels": 50000}}


def test_whoever_merges_can_name_how_the_checkpoint_is_run(run, tmp_path):
    source = run(preset="rl", limits={"max_pixels": 28224})
    arguments = ["merge", str(source), str(tmp_path / "out"), "--preset", "eval-hf", "--limit", "max_pixels=50000"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "unless told otherwise it runs with preset eval-hf, 3,136 to 50,000 pixels" in result.output
    assert asks_for(tmp_path / "out") == {"preset": "eval-hf", "limits": {"max_pixels": 50000}}
    refuse(source, tmp_path / "other", "unknown limits max_pixel;", limits={"max_pixel": 1})


def test_settings_beside_the_shards_are_kept_without_a_note_of_the_run(copy_of, tmp_path):
    source = copy_of()
    (source / "huggingface" / "vilavt_chat.json").unlink(missing_ok=True)
    merge_shards(source, tmp_path / "none")
    assert not (tmp_path / "none" / "vilavt_chat.json").exists()
    (source / "huggingface" / "vilavt_chat.json").write_text('{"limits": {"max_turns": 2}}')
    assert "at most 2 turns" in merge_shards(source, tmp_path / "out").runs_as
    assert asks_for(tmp_path / "out") == {"preset": "default", "limits": {"max_turns": 2}}


def test_what_a_run_notes_starts_from_what_its_base_asks_for(tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    save_chat_settings(base, preset="rl", limits={"max_turns": 2, "max_pixels": 9000})
    note_settings(str(tmp_path / "run"), str(base), json.dumps({"preset": None, "limits": {"max_pixels": 7056}}))
    assert asks_for(tmp_path / "run") == {"preset": "rl", "limits": {"max_turns": 2, "max_pixels": 7056}}


# ---------------------------------------------------------------------- other layouts, written by hand


def save_ranks(folder: Path, states: list[dict]) -> None:
    for path in folder.glob("model_world_size_*"):
        path.unlink()
    for rank, state in enumerate(states):
        torch.save(state, folder / f"model_world_size_{len(states)}_rank_{rank}.pt")


def test_plain_tensors_of_one_process_merge(golden, copy_of, tmp_path):
    source = copy_of()
    save_ranks(source, [load_file(golden.checkpoint / "model.safetensors")])
    merge_shards(source, tmp_path / "out", dtype="keep")
    assert verify_same_tensors(golden.checkpoint, tmp_path / "out") == 171


def test_plain_parts_and_replicated_tensors_are_told_apart_by_the_configuration(golden, copy_of, tmp_path):
    source, whole = copy_of(), load_file(golden.checkpoint / "model.safetensors")
    halves = [{}, {}]
    for name, tensor in whole.items():
        parts = [tensor, tensor] if name.endswith("norm.weight") else tensor.chunk(2)
        for half, part in zip(halves, parts, strict=True):
            half[f"_fsdp_wrapped_module.{name}"] = part.clone()
    save_ranks(source, halves)
    merge_shards(source, tmp_path / "out", dtype="keep")
    assert verify_same_tensors(golden.checkpoint, tmp_path / "out") == 171


def test_a_tied_lm_head_is_left_out(golden, copy_of, tmp_path):
    source, state = copy_of(), load_file(golden.checkpoint / "model.safetensors")
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    save_ranks(source, [state])
    config = json.loads((source / "huggingface/config.json").read_text())
    (source / "huggingface/config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    assert merge_shards(source, tmp_path / "out", dtype="keep").tensors == 170
    assert "lm_head.weight" not in load_file(tmp_path / "out/model.safetensors")


def test_shards_along_another_dimension_and_meshes_of_older_torch_merge(golden, copy_of, tmp_path):
    """A mesh pickled by torch 2.6 has its ranks in ``mesh``, which newer ones compute. Rank 1 holds the left half."""
    source, whole = copy_of(), load_file(golden.checkpoint / "model.safetensors")
    with merge_module._readable_dtensors():
        states = [torch.load(source / f"model_world_size_2_rank_{rank}.pt", weights_only=True) for rank in (0, 1)]
    name = "model.visual.blocks.4.attn.instruct_key_proj.weight"
    left, right = whole[name.removeprefix("model.")].chunk(2, 1)
    for state, part in zip(states, (right, left), strict=True):
        value = state[name]
        value._local_tensor = part.clone()
        value._spec = copy.copy(value._spec)  # tensors of one shape share it
        value._spec.placements = (torch.distributed.tensor.Shard(1),)
        vars(value._spec.mesh)["mesh"] = torch.tensor([1, 0], dtype=torch.int32)
    # every other tensor shares the mesh object, so its parts swap ranks too
    for other in states[0]:
        if other != name:
            a, b = states[0][other], states[1][other]
            a._local_tensor, b._local_tensor = b._local_tensor, a._local_tensor
    save_ranks(source, states)
    merge_shards(source, tmp_path / "out", dtype="keep")
    assert verify_same_tensors(golden.checkpoint, tmp_path / "out") == 171


# ---------------------------------------------------------------------- refusals


def refuse(source: Path, destination: Path, message: str, **options) -> None:
    with pytest.raises(CheckpointError, match=message):
        merge_shards(source, destination, **options)
    assert not list(destination.parent.glob(f"{destination.name}*"))


def test_a_missing_rank_is_named(copy_of, tmp_path):
    source = copy_of("uneven")
    (source / "model_world_size_3_rank_1.pt").unlink()
    refuse(source, tmp_path / "out", r"2 of 3 shards; missing rank 1 \(model_world_size_3_rank_1\.pt\)")


def test_shards_of_two_world_sizes_are_refused(copy_of, tmp_path):
    source = copy_of()
    shutil.copy(source / "model_world_size_2_rank_0.pt", source / "model_world_size_8_rank_0.pt")
    refuse(source, tmp_path / "out", r"world sizes \[2, 8\]")


def test_a_folder_without_shards_is_refused(tmp_path):
    refuse(tmp_path, tmp_path / "out", "no model_world_size_W_rank_R.pt files")


def test_a_truncated_shard_is_refused(copy_of, tmp_path):
    source = copy_of()
    path = source / "model_world_size_2_rank_1.pt"
    path.write_bytes(path.read_bytes()[:-5000])
    refuse(source, tmp_path / "out", r"model_world_size_2_rank_1\.pt cannot be read")


def test_code_in_a_pickle_does_not_run(copy_of, tmp_path):
    class Payload:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "ran"),))

    source = copy_of()
    torch.save({"model.norm.weight": Payload()}, source / "model_world_size_2_rank_1.pt")
    refuse(source, tmp_path / "out", r"rank_1\.pt cannot be read")
    assert not (tmp_path / "ran").exists()


def test_ranks_that_disagree_on_names_are_refused(golden, copy_of, tmp_path):
    source, state = copy_of(), load_file(golden.checkpoint / "model.safetensors")
    save_ranks(source, [state, {name: tensor for name, tensor in state.items() if name != "model.norm.weight"}])
    refuse(source, tmp_path / "out", r"disagree on whether there is a tensor model\.norm\.weight")


def test_tensor_parallel_shards_are_refused(copy_of, tmp_path):
    source = copy_of("hsdp")
    states = []
    for rank in range(4):
        with merge_module._readable_dtensors():
            state = torch.load(source / f"model_world_size_4_rank_{rank}.pt", weights_only=True)
        for value in state.values():
            value._spec.placements = (torch.distributed.tensor.Shard(1), torch.distributed.tensor.Shard(0))
        states.append(state)
    save_ranks(source, states)
    refuse(source, tmp_path / "out", "not tensor parallelism")


def test_shards_without_the_query_projections_are_refused(golden, copy_of, tmp_path):
    source, state = copy_of(), load_file(golden.checkpoint / "model.safetensors")
    del state["visual.blocks.7.attn.instruct_value_proj.bias"]
    save_ranks(source, [state])
    refuse(source, tmp_path / "out", r"visual\.blocks\.7\.attn\.instruct_value_proj\.bias")


def test_a_missing_configuration_is_refused_with_the_option_to_give_it(copy_of, tmp_path):
    source = copy_of()
    (source / "huggingface").rename(tmp_path / "elsewhere")
    refuse(source, tmp_path / "out", "--config")
    assert merge_shards(source, tmp_path / "out", config=tmp_path / "elsewhere").tensors == 171
