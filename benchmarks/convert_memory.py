"""Peak memory of `vilavt convert`, `merge` and `init` on a generated checkpoint of several gigabytes.

    python benchmarks/convert_memory.py --gb 4 --json convert_memory.json

A ViLaVT of real proportions with random weights is written to a temporary folder (``--workdir`` to choose the disk; it
needs about three times ``--gb``). Every operation runs in a fresh process that reports the high-water mark of its
resident memory (Linux: VmHWM). The limit for converting is one shard plus 300 MB; importing the package, torch
included, counts.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from random_checkpoint import write_random

LIMIT_OVER_SHARD_MB = 300

# prints one JSON line: seconds of the operation, peak memory with and without it, and what it puts into `more`
CHILD = """
import json, resource, sys, time
from pathlib import Path
def peak():
    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text().split("VmHWM:")[1].split()[0]) / 1024
    value = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return value / (1 << 20 if sys.platform == "darwin" else 1024)
{imports}
imported, start, cpu, more = peak(), time.perf_counter(), time.process_time(), {{}}
{operation}
spent = {{"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu}}
print(json.dumps(spent | {{"imported_mb": imported, "peak_mb": peak()}} | more))
"""


def measure(imports: str, operation: str, *arguments: str | Path) -> dict[str, Any]:
    """Run an operation in a process of its own; its arguments are ``sys.argv[1:]``."""
    code = CHILD.format(imports=imports, operation=operation)
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def configuration(gigabytes: float) -> dict[str, Any]:
    """Sizes of the 7B model, with as many language layers as give about `gigabytes` in bf16."""
    text = {"vocab_size": 152064, "hidden_size": 2048, "intermediate_size": 11008, "num_attention_heads": 16}
    text |= {
        "num_key_value_heads": 2,
        "rope_theta": 1e6,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    }
    per_layer = 2 * (2 * 2048 * 2048 + 2 * 2048 * 256 + 3 * 2048 * 11008)
    fixed = 2 * 2 * 152064 * 2048
    layers = max(1, round((gigabytes * 1e9 - fixed) / per_layer))
    vision = {"depth": 4, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 2048}
    vision |= {"fullatt_block_indexes": [0, 1], "window_size": 112, "integration_point": "late", "patch_size": 14}
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "text_config": text | {"num_hidden_layers": layers, "max_position_embeddings": 4096},
        "vision_config": vision,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }


ENCODER = {
    "vocab_size": 1000,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 2,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
}


def make_fsdp_shards(folder: Path, gigabytes: float) -> None:
    """Two ranks' halves of the same model as fp32 DTensors, without training: the mesh is all that FSDP adds."""
    code = """
import sys, torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
sys.path.insert(0, sys.argv[3])
from convert_memory import ENCODER, configuration
from vilavt_core.architecture import expected_tensors
out, rank = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{out}/store", rank=rank, world_size=2)
mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("fsdp",))
shapes = expected_tensors(configuration(float(sys.argv[4])) | {"text_encoder_config": ENCODER})
state = {}
for name, shape in shapes.items():
    rows = [len(part) for part in torch.empty(shape[0]).chunk(2)] + [0]
    local = torch.empty(rows[rank], *shape[1:]).uniform_()
    stride = torch.empty(shape, device="meta").stride()
    state[name] = DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=torch.Size(shape), stride=stride)
torch.save(state, f"{out}/model_world_size_2_rank_{rank}.pt")
dist.barrier()
dist.destroy_process_group()
"""
    (folder / "huggingface").mkdir(parents=True)
    config = configuration(gigabytes) | {"text_encoder_config": ENCODER}
    (folder / "huggingface/config.json").write_text(json.dumps(config))
    here = str(Path(__file__).resolve().parent)
    ranks = [
        subprocess.Popen([sys.executable, "-c", code, str(folder), str(rank), here, str(gigabytes)]) for rank in (0, 1)
    ]
    for process in ranks:
        if process.wait() != 0:
            raise SystemExit("a rank failed while writing its shard")
    (folder / "store").unlink(missing_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=4.0, help="size of the generated checkpoint")
    parser.add_argument("--shard-gb", type=float, default=1.0, help="size of its shards")
    parser.add_argument(
        "--merge-gb", type=float, default=None, help="bf16 size of the merged checkpoint; default: half"
    )
    parser.add_argument("--workdir", type=Path, default=None, help="where to generate; default: the temporary folder")
    parser.add_argument("--json", type=Path, default=None, help="write the figures to this file")
    options = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="vilavt-convert-memory-", dir=options.workdir))
    try:
        figures = run(root, options.gb, options.shard_gb, options.merge_gb or options.gb / 2)
    finally:
        shutil.rmtree(root)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")
    if not figures["within_limit"]:
        raise SystemExit("converting took more than one shard + 300 MB")


def run(root: Path, gigabytes: float, shard_gigabytes: float, merge_gigabytes: float) -> dict[str, Any]:
    """Generate, measure, print."""
    imports = "from vilavt_core.checkpoint import convert_checkpoint"
    start = time.perf_counter()
    largest = write_random(
        root / "nested",
        configuration(gigabytes),
        encoder=ENCODER,
        shard_bytes=int(shard_gigabytes * 1e9),
        nested=True,
    )
    total = sum(path.stat().st_size for path in (root / "nested").glob("*.safetensors"))
    print(f"generated {total / 1e9:.2f} GB, largest shard {largest / 1e6:.0f} MB, {time.perf_counter() - start:.0f} s")
    results = {
        "rename and verify": measure(
            imports, "convert_checkpoint(*sys.argv[1:], verify=True)", root / "nested", root / "flat"
        )
    }
    shutil.rmtree(root / "nested")
    results["hard link"] = measure(imports, "convert_checkpoint(*sys.argv[1:])", root / "flat", root / "linked")
    shutil.rmtree(root / "linked")
    results["copy and verify"] = measure(
        imports, "convert_checkpoint(*sys.argv[1:], link=False, verify=True)", root / "flat", root / "copied"
    )
    shutil.rmtree(root / "copied")
    shutil.rmtree(root / "flat")
    limit = largest / (1 << 20) + LIMIT_OVER_SHARD_MB
    make_fsdp_shards(root / "shards", merge_gigabytes)
    results["merge"] = measure(
        "from vilavt_rl.merge import merge_shards",
        "merge_shards(*sys.argv[1:])",
        root / "shards",
        root / "merged",
    )
    print(f"{'operation':<20}{'seconds':>9}{'after import':>14}{'peak':>9}   MB")
    for name, result in results.items():
        print(f"{name:<20}{result['seconds']:>9.1f}{result['imported_mb']:>14.0f}{result['peak_mb']:>9.0f}")
    print(f"limit for converting: largest shard + {LIMIT_OVER_SHARD_MB} MB = {limit:.0f} MB")
    converting = [result["peak_mb"] for name, result in results.items() if name != "merge"]
    return {
        "checkpoint_gb": total / 1e9,
        "largest_shard_mb": largest / (1 << 20),
        "limit_mb": limit,
        "peak_mb": max(converting),
        "merge_peak_mb": results["merge"]["peak_mb"],
        "within_limit": max(converting) <= limit,
        "operations": results,
    }


if __name__ == "__main__":
    main()
