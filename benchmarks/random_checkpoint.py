"""Checkpoints of any size with random weights, written tensor by tensor with a few megabytes of memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vilavt_core.architecture import expected_tensors, is_tied, module_name
from vilavt_core.checkpoint.writing import (
    TensorSource,
    plan_shards,
    shard_names,
    write_index,
    write_json,
    write_safetensors,
)

CHUNK = 8 << 20
"""Numbers made at a time."""
SCALE = 0.02
"""Standard deviation of weights."""


def write_random(
    folder: Path, config: dict[str, Any], *, encoder: Mapping[str, Any], shard_bytes: int, nested: bool
) -> int:
    """Write a checkpoint in bf16: matrices normal, norms one, biases zero.

    Args:
        folder: new.
        config: ``config.json``.
        encoder: configuration of the query encoder, in `config` or not.
        shard_bytes: of a shard, about.
        nested: tensors have the names of the module, instead of the published ones.

    Returns:
        Size of the largest shard in bytes.
    """
    folder.mkdir()
    generator = np.random.default_rng(0)
    table = _as_bf16(np.quantile(generator.normal(0, SCALE, 100_000), (np.arange(256) + 0.5) / 256))
    sources = []
    for name, shape in expected_tensors(config | {"text_encoder_config": encoder}).items():
        if name.startswith("lm_head.") and is_tied(config):
            continue
        count = int(np.prod(shape))
        sources.append(
            TensorSource(
                module_name(name) if nested else name,
                "BF16",
                shape,
                2 * count,
                lambda name=name, count=count: _numbers(name, count, table, generator),
            )
        )
    shards = plan_shards(sources, shard_bytes)
    files = shard_names(len(shards))
    for file, shard in zip(files, shards, strict=True):
        write_safetensors(folder / file, shard)
    total = sum(source.nbytes for source in sources)
    write_index(folder, {s.name: f for f, shard in zip(files, shards, strict=True) for s in shard}, total, total // 2)
    write_json(folder / "config.json", config)
    return max((folder / file).stat().st_size for file in files)


def _numbers(name: str, count: int, table: np.ndarray, generator: np.random.Generator) -> Iterator[bytes]:
    for start in range(0, count, CHUNK):
        size = min(CHUNK, count - start)
        if name.endswith(".bias"):
            yield bytes(2 * size)
        elif "norm" in name or name.endswith("ln_q.weight"):
            yield _as_bf16(np.ones(1)).tobytes() * size
        else:
            yield table[np.frombuffer(generator.bytes(size), np.uint8)].tobytes()


def _as_bf16(values: np.ndarray) -> np.ndarray:
    """The upper halves of fp32, as they are stored."""
    return (values.astype("<f4").view("<u4") >> 16).astype("<u2")
