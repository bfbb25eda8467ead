"""One rank of the runs in a job file. Not a test: `test_sft_ranks.py` starts it and reads what it writes."""

import json
import os
import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.tensor import DTensor

from vilavt_hf.data.ranks import gathered
from vilavt_hf.errors import TrainingError
from vilavt_hf.train.config import SftConfig
from vilavt_hf.train.run import Run
from vilavt_hf.train.trainer import VilavtTrainer


def shard_on_cpu(trainer: VilavtTrainer) -> None:
    """Let accelerate shard here: FSDP2 works over gloo, but accelerate offers it for accelerators only."""
    for state in (PartialState, AcceleratorState):
        state._shared_state["distributed_type"] = DistributedType.FSDP
    plugin = FullyShardedDataParallelPlugin(**trainer.args.fsdp_plugin_args)
    AcceleratorState._shared_state["fsdp_plugin"] = plugin
    trainer.is_fsdp_enabled = True


def join_deepspeed() -> None:
    """On accelerators accelerate does this; ZeRO-3 needs it before the model is made."""
    import deepspeed

    torch.distributed.init_process_group("gloo")
    deepspeed.init_distributed(dist_backend="gloo")


def main(job: Path) -> None:
    """Train every run of the job; rank 0 writes ``seen.json`` into each run's folder."""
    runs = json.loads(job.read_text())
    if any(values["parallel"].get("strategy", "").startswith("zero") for values in runs):
        join_deepspeed()
    for values in runs:
        config = SftConfig.model_validate(values)
        run = Run(config)
        trainer = run.trainer
        if config.parallel.strategy == "fsdp2":
            shard_on_cpu(trainer)
        steps: list[dict] = []
        collate = trainer.data_collator
        dataset = trainer.train_dataset
        asked: list[int] = []

        class Spy(torch.utils.data.Dataset):
            def __len__(self):
                return len(dataset)  # noqa: B023

            def __getitem__(self, i):
                asked.append(i)  # noqa: B023
                return dataset[i]  # noqa: B023

        def spying_collate(samples):
            batch = collate(samples)  # noqa: B023
            steps.append({"samples": list(asked), "images": batch["counts"].images})  # noqa: B023
            asked.clear()  # noqa: B023
            return batch

        trainer.train_dataset, trainer.data_collator = Spy(), spying_collate
        ended = ""
        try:
            run.train()
        except TrainingError as error:
            ended = str(error)
        everyone, ends = gathered(steps), gathered(ended)
        sharded = sum(isinstance(p, DTensor) for p in trainer.model.parameters())
        if trainer.args.process_index == 0:
            seen = {"ranks": everyone, "ended": ends, "sharded": sharded}
            seen["parameters"] = sum(1 for _ in trainer.model.parameters())
            (config.output.folder / "seen.json").write_text(json.dumps(seen))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    # Everything is on the disk. A thread of torch's that outlives the interpreter has ended a rank with SIGABRT here.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
