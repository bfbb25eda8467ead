"""One rank of the runs in a job file. Not a test: `test_sft_ranks.py` starts it and reads what it writes."""

import json
import os
import shutil
import sys
from pathlib import Path

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor

from vilavt_core.errors import TrainingError
from vilavt_core.sft_config import SftConfig
from vilavt_hf.train import run as training
from vilavt_hf.train.ranks import gathered
from vilavt_hf.train.trainer import VilavtTrainer


class AnywhereTrainer(VilavtTrainer):
    """Shards here too: FSDP2 works over gloo, but accelerate offers it for accelerators only."""

    def create_accelerator_and_postprocess(self) -> None:
        if self.args.fsdp:
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU  # accelerate makes it FSDP
        super().create_accelerator_and_postprocess()


def join_deepspeed() -> None:
    """On accelerators accelerate does this; ZeRO-3 needs it before the model is made."""
    import deepspeed

    torch.distributed.init_process_group("gloo")
    deepspeed.init_distributed(dist_backend="gloo")


def main(job: Path) -> None:
    """Train every run of the job; rank 0 writes ``seen.json`` into each run's folder.

    A run with ``broken_off`` begins in a copy of that run's folder, as if it had ended before its last checkpoint.
    """
    runs = json.loads(job.read_text())
    if any(values["parallel"].get("strategy", "").startswith("zero") for values in runs):
        join_deepspeed()
    training.VilavtTrainer = AnywhereTrainer
    for values in runs:
        if before := values.pop("broken_off", None):
            if torch.distributed.get_rank() == 0:
                last = max(Path(before).glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2])).name
                shutil.copytree(before, values["output"]["folder"], ignore=shutil.ignore_patterns("final", last))
            torch.distributed.barrier()
        config = SftConfig.model_validate(values)
        run = training.Run(config)
        trainer = run.trainer
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
            plugin = trainer.accelerator.state.fsdp_plugin if trainer.is_fsdp_enabled else None
            seen = {
                "ranks": everyone,
                "ended": ends,
                "sharded": sharded,
                "parameters": sum(1 for _ in trainer.model.parameters()),
                "precision": str(plugin and plugin.mixed_precision_policy),
            }
            (config.output.folder / "seen.json").write_text(json.dumps(seen))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    # Everything is on the disk. A thread of torch's that outlives the interpreter has ended a rank with SIGABRT here.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
