"""Our parts in a real EasyR1 with a real vLLM: `EASYR1_HOME=path/to/checkout nox -s easyr1`. It is on no index, so CI
has none.

vLLM 0.22.1 and transformers 4.57.6 on the CPU. One worker of EasyR1, unmodified, in this process: FSDP, its vLLM
engine, its sharding manager; see `easyr1_on_cpu` for what stands in for a GPU. Then `main` itself, with Ray.
"""

import importlib.util
import json
import os
import socket
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

HOME = os.environ.get("EASYR1_HOME")
pytestmark = pytest.mark.skipif(HOME is None, reason="EASYR1_HOME names no EasyR1 checkout")

RECIPE = "vilavt_7b_grpo_easyr1"
ON_CPU = Path(__file__).with_name("easyr1_on_cpu.py")
SIZES = (
    "data.max_prompt_length=256",
    "data.max_response_length=512",
    "data.rollout_batch_size=4",
    "data.val_batch_size=6",
    "worker.actor.global_batch_size=4",
    "worker.rollout.max_model_len=768",
    "worker.rollout.max_num_batched_tokens=2048",
    "trainer.nnodes=1",
    "trainer.n_gpus_per_node=1",
)
HOT = 1.7
"""Temperature of the rollouts. At 1 the shipped model is so sure of itself that no step would change it."""


@pytest.fixture(scope="module")
def on_cpu():
    """The module of what stands in for a GPU."""
    spec = importlib.util.spec_from_file_location("easyr1_on_cpu", ON_CPU)
    module = importlib.util.module_from_spec(spec)
    sys.modules["easyr1_on_cpu"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module", autouse=True)
def easyr1(on_cpu):
    """The checkout in front of everything else."""
    sys.path.insert(0, str(HOME))
    os.environ.update(on_cpu.ENVIRONMENT)
    on_cpu.stand_in()
    yield
    sys.path.remove(str(HOME))


@pytest.fixture(scope="module")
def learner(on_cpu, tiny: Path, tmp_path_factory):
    """EasyR1's worker of the 7B recipe, with the tiny model: actor and rollout engine in this process."""
    from vilavt_rl.easyr1.main import read_config, worker_class

    config, settings = read_config(
        [
            f"config={RECIPE}",
            *on_cpu.OVERRIDES,
            *SIZES,
            f"worker.actor.model.model_path={tiny}",
            f"worker.rollout.temperature={HOT}",
            "worker.actor.optim.lr=1e-3",
        ]
    )
    config.worker.actor.optim.training_steps = 2
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    place = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({**place, **settings.to_environment()})
    made = worker_class()
    import verl.workers.actor.dp_actor as dp_actor
    import verl.workers.rollout.vllm_rollout_spmd as rollout_module

    dp_actor.tqdm = lambda iterable, **kwargs: iterable  # it talks to Ray
    engine = rollout_module.LLM
    # After bans and temperature, as the actor computes them.
    rollout_module.LLM = lambda **asked: engine(**asked, logprobs_mode="processed_logprobs")
    worker = made(config.worker, "actor_rollout_ref")
    worker.init_model()
    yield Learner(worker, config)
    for name in place:
        del os.environ[name]
    torch.distributed.destroy_process_group()


class Learner:
    """A worker, driven as EasyR1's trainer does, and every log-probability that its vLLM reported."""

    def __init__(self, worker, config) -> None:
        self.worker, self.config, self.said, self.calls = worker, config, {}, []
        generate = worker.rollout.inference_engine.generate

        def recorded(prompts, sampling_params, **kwargs):
            for params in sampling_params:
                params.logprobs = 0
            outputs = generate(prompts=prompts, sampling_params=sampling_params, **kwargs)
            for prompt, output in zip(prompts, outputs, strict=True):
                ids = output.outputs[0].token_ids
                chosen = [step[token].logprob for step, token in zip(output.outputs[0].logprobs, ids, strict=True)]
                self.said[(*prompt["prompt_token_ids"], *ids)] = chosen
            self.calls.append(len(prompts))
            return outputs

        worker.rollout.inference_engine.generate = recorded

    def roll_out(self, rows_file: Path):
        """A batch of EasyR1's as its trainer gets it."""
        from verl.protocol import DataProto

        from vilavt_rl.data import read_rows

        rows = np.array([{"row": row.to_json()} for row in read_rows(rows_file)[:4]], dtype=object)
        nothing = torch.zeros(len(rows), 1, dtype=torch.long)
        prompts = DataProto.from_dict(
            tensors=dict.fromkeys(("input_ids", "attention_mask", "position_ids"), nothing),
            non_tensors={"multi_modal_data": rows},
            meta_info={"min_pixels": 1, "max_pixels": 1, "video_fps": 2.0},
        )
        self.calls.clear()
        self.worker.prepare_rollout_engine()
        out = self.worker.generate_sequences(prompts)
        self.worker.release_rollout_engine()
        return out

    def engines_values(self, out) -> torch.Tensor:
        """Log-probability of every sampled token as vLLM reported it, (tokens,)."""
        values = []
        for row in range(len(out)):
            for end, tokens in turns(out, row):
                real = out.batch["input_ids"][row][out.batch["attention_mask"][row].bool()].tolist()
                values += self.said[tuple(real[:end])][-tokens:]
        return torch.tensor(values)

    def actors_values(self, out) -> torch.Tensor:
        """The same from the actor, as EasyR1 computes them, (tokens,)."""
        found = self.worker.compute_log_probs(out).batch["old_log_probs"]
        return found[out.batch["response_mask"].bool()]


def turns(out, row: int) -> list[tuple[int, int]]:
    """(end in the stream without padding, sampled tokens) of every turn."""
    real = out.batch["attention_mask"][row].bool()
    mask = torch.cat([torch.zeros_like(out.batch["prompts"][row]), out.batch["response_mask"][row]])[real].tolist()
    ends = [i + 1 for i, on in enumerate(mask) if on and (i + 1 == len(mask) or not mask[i + 1])]
    starts = [i for i, on in enumerate(mask) if on and not mask[i - 1]]
    return [(end, end - start) for start, end in zip(starts, ends, strict=True)]


def test_the_checkout_is_recognised_and_has_every_name_that_we_use() -> None:
    from vilavt_rl.compat import flavour, require_easyr1, require_verl
    from vilavt_rl.easyr1.seams import check_seams
    from vilavt_rl.errors import HostError

    assert flavour() == "easyr1"
    require_easyr1()
    check_seams()
    with pytest.raises(HostError, match="the module verl is EasyR1"):
        require_verl()


def test_the_recipe_fits_its_configuration(tiny: Path, tmp_path: Path) -> None:
    from vilavt_rl.easyr1.main import read_config

    config, settings = read_config(
        [f"config={RECIPE}", f"worker.actor.model.model_path={tiny}", "vilavt.limits.max_turns=3"]
    )
    assert config.worker.rollout.n == 4
    assert config.worker.actor.clip_ratio_high == pytest.approx(0.3)
    assert config.algorithm.disable_kl
    assert settings.limits == {"max_turns": 3}


def test_lora_is_refused(tiny: Path) -> None:
    from vilavt_rl.easyr1.main import read_config
    from vilavt_rl.errors import HostError

    with pytest.raises(HostError, match=r"lora\.rank is 8, it must be 0"):
        read_config([f"config={RECIPE}", f"worker.actor.model.model_path={tiny}", "worker.actor.model.lora.rank=8"])


def test_what_differs_in_this_vllm_is_bridged() -> None:
    from vilavt_rl.easyr1 import engine

    assert engine.missing() == []
    assert engine.bridged() == [
        "module vllm.lora.lora_model under its old name",
        "get_tp_group as get_tensor_model_parallel_group",
        "mm_processor_cache_gb=0 for disable_mm_preprocessor_cache",
        "eos_token_id left out of the sampling parameters",
    ]
    engine.require_engine("inquiries")


def test_doctor_says_that_rollouts_will_work() -> None:
    from vilavt_rl.easyr1.engine import checks

    found = {check.name: check for check in checks()}
    assert str(found.pop("EasyR1 flash-attn").status) == "note"  # there is no GPU
    assert {str(check.status) for check in found.values()} == {"ok"}, found
    assert "vilavt.queries=inquiries" in found["EasyR1 vLLM"].detail
    assert found["EasyR1 rollouts"].detail.startswith("will work, vLLM's plug-in vilavt")


def test_an_unknown_key_is_refused_by_easyr1_itself(tiny: Path) -> None:
    from omegaconf.errors import ConfigKeyError

    from vilavt_rl.easyr1.main import read_config

    with pytest.raises(ConfigKeyError):
        read_config([f"config={RECIPE}", f"worker.actor.model.model_path={tiny}", "worker.actor.surprise=1"])


def test_the_reward_file_works_by_its_path() -> None:
    from verl.protocol import DataProto
    from verl.workers.reward.config import RewardConfig
    from verl.workers.reward.function import AutoRewardManager

    from vilavt_rl.easyr1 import reward

    config = RewardConfig(reward_function=f"{reward.__file__}:compute_score", skip_special_tokens=False)
    config.post_init()

    class Characters:
        def decode(self, ids, skip_special_tokens):
            return "".join(map(chr, ids.tolist()))

    text = "<think>x</think><answer>red</answer>"
    ids = torch.tensor([[ord(c) for c in text]])
    truth = np.empty(1, dtype=object)
    truth[:] = ["red"]
    data = DataProto.from_dict(
        tensors={"responses": ids, "response_mask": torch.ones_like(ids)}, non_tensors={"ground_truth": truth}
    )
    values, metrics = AutoRewardManager(config, Characters()).compute_reward(data)
    assert float(values.sum()) == pytest.approx(1.0)
    assert metrics["accuracy"] == pytest.approx([1.0])


def test_the_worker_has_the_base_that_colocation_needs() -> None:
    from verl.single_controller.base import Worker

    from vilavt_rl.easyr1.main import worker_class

    made = worker_class()
    assert made.__base__.__base__ is Worker
    assert made.__name__ == "VilavtWorker"
    for name in ("update_actor", "compute_log_probs", "generate_sequences", "init_model", "save_checkpoint"):
        assert callable(getattr(made, name))


def test_two_roles_share_a_ray_process_with_our_worker(tmp_path: Path) -> None:
    import ray
    from verl.single_controller.base import Worker
    from verl.single_controller.base.decorator import Dispatch, register
    from verl.single_controller.ray import RayClassWithInitArgs, RayResourcePool, RayWorkerGroup
    from verl.single_controller.ray.base import create_colocated_worker_cls

    from vilavt_rl.easyr1.worker import make_worker

    class Host(Worker):  # stands for FSDPWorker, whose constructor wants NCCL
        def __init__(self, config, role):
            super().__init__()
            self.config, self.role = config, role

        def _build_rollout(self):
            self.rollout = namespace.vLLMRollout

        @register(dispatch_mode=Dispatch.ONE_TO_ALL)
        def built(self):
            self._build_rollout()
            return f"{self.role}: {self.rollout}"

    namespace = types.SimpleNamespace(vLLMRollout="theirs")

    def no_gpu():
        import torch

        torch.cuda.set_device = lambda *args: None
        torch.cuda.get_device_name = lambda *args: "cpu"

    made = make_worker(Worker, Host, namespace, types.SimpleNamespace(SUPPORTED_MODEL_TYPE=()), "ours")
    ray.init(
        address="local",
        num_cpus=8,  # a pool reserves five places per process
        include_dashboard=False,
        object_store_memory=200_000_000,
        runtime_env={"worker_process_setup_hook": no_gpu, "env_vars": {"PYTHONPATH": str(HOME)}},
    )
    try:
        pool = RayResourcePool([1], use_gpu=False)
        classes = {"actor": RayClassWithInitArgs(ray.remote(made), config={}, role="actor")}
        group = RayWorkerGroup(pool, create_colocated_worker_cls(classes))
        assert group.spawn(prefix_set=classes.keys())["actor"].built() == ["actor: ours"]
    finally:
        ray.shutdown()


def test_every_ray_process_finds_what_vllm_moved() -> None:
    import ray

    from vilavt_rl.easyr1.engine import PREPARE

    def finders():
        import sys

        return [type(finder).__name__ for finder in sys.meta_path if not isinstance(finder, type)]

    ray.init(
        address="local",
        num_cpus=1,
        include_dashboard=False,
        object_store_memory=100_000_000,
        runtime_env={"worker_process_setup_hook": PREPARE},
    )
    try:
        assert ray.get(ray.remote(finders).remote()).count("_MovedModules") == 1
    finally:
        ray.shutdown()


def test_the_second_rollout_samples_from_what_the_first_update_made(
    learner: Learner, rows_file: Path, tiny: Path, processor
) -> None:
    from vilavt_rl.policy import VilavtPolicy

    model = learner.worker.fsdp_module._fsdp_wrapped_module
    first = learner.roll_out(rows_file)
    shapes(first, learner)
    said, found = learner.engines_values(first), learner.actors_values(first)
    print("rollout and actor before the update:", float((said - found).abs().max()))
    assert float((said - found).abs().max()) <= 1e-3

    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    mask = first.batch["response_mask"]
    first.batch["old_log_probs"] = torch.zeros(mask.shape).masked_scatter(mask.bool(), found)
    first.batch["advantages"] = mask.float() * torch.tensor([1.0, -0.5] * (len(first) // 2))[:, None]
    first.meta_info |= {"temperature": HOT, "global_token_num": first.batch["attention_mask"].sum(-1).tolist()}
    metrics = learner.worker.update_actor(first).non_tensor_batch
    assert float(metrics["actor/grad_norm"][0]) > 0
    for name, weight in model.named_parameters():
        frozen = ".visual." in name or ".text_encoder." in name
        assert torch.equal(before[name], weight) == frozen, name

    second = learner.roll_out(rows_file)
    said, found = learner.engines_values(second), learner.actors_values(second)
    old = start_values(second, VilavtPolicy.from_pretrained(tiny, dtype=torch.float32).eval(), processor)
    print("after it:", float((said - found).abs().max()), "to the start:", float((said - old).abs().max()))
    assert float((said - found).abs().max()) <= 1e-3
    assert float((said - old).abs().max()) > 1e-2
    assert not torch.equal(first.batch["responses"], second.batch["responses"])


def test_the_presets_query_prefix_reaches_vllm_and_the_actor(
    learner: Learner, rows_file: Path, tiny: Path, processor
) -> None:
    from vilavt_rl.easyr1.block import Settings

    rollout = learner.worker.rollout
    own, rollout.episodes = rollout.episodes, Settings(preset="eval-hf").episodes(str(tiny), processor)
    try:
        out = learner.roll_out(rows_file)
    finally:
        rollout.episodes = own
    rows = out.non_tensor_batch["multi_modal_data"]
    assert {prefix for row in rows for prefix in row["query_prefixes"]} == {"Query: "}
    assert any(query for row in rows for query in row["queries"])
    said, found = learner.engines_values(out), learner.actors_values(out)
    for row in rows:
        row["query_prefixes"] = [None] * len(row["queries"])
    without = learner.actors_values(out)
    print("with the prefix:", float((said - found).abs().max()), "without:", float((said - without).abs().max()))
    assert float((said - found).abs().max()) <= 1e-3
    assert float((said - without).abs().max()) > 1e-3


def shapes(out, learner: Learner) -> None:
    """Several turns, several crops in one call, four different trajectories of a question, one call per turn."""
    n = learner.config.worker.rollout.n
    counts = [len(turns(out, row)) for row in range(len(out))]
    crops = [row["images_per_query"] for row in out.non_tensor_batch["multi_modal_data"]]
    print("turns", counts, "images per inquiry", crops)
    assert len(out) == 4 * n
    assert max(counts) >= 3
    assert any(max(one) >= 2 for one in crops)
    assert learner.calls == [sum(count > turn for count in counts) for turn in range(max(counts))]
    for row in range(0, len(out), n):
        group = {tuple(ids) for ids in out.batch["responses"][row : row + n].tolist()}
        assert len(group) > 1, "all trajectories of a question are the same"


def start_values(out, model, processor) -> torch.Tensor:
    """Log-probabilities of what was sampled under a model, in one forward per trajectory, (tokens,)."""
    from vilavt_hf import compat
    from vilavt_rl.easyr1.batch import model_inputs

    values = []
    for row, inputs in enumerate(model_inputs(out.non_tensor_batch["multi_modal_data"], processor)):
        real = out.batch["attention_mask"][row].bool()
        ids = out.batch["input_ids"][row][real]
        positions = compat.rope_index(model.model, ids, inputs.get("image_grid_thw"))
        with torch.inference_mode():
            logits = model(
                input_ids=ids[None],
                attention_mask=torch.ones_like(ids[None]),
                position_ids=positions[:, None],
                **inputs,
            ).logits[0, :-1]
        of_ids = (logits / HOT).log_softmax(-1).gather(-1, ids[1:, None])[:, 0]
        mask = torch.cat([torch.zeros_like(out.batch["prompts"][row]), out.batch["response_mask"][row]])[real].bool()
        values.append(of_ids[mask[1:]])
    return torch.cat(values)


@pytest.mark.slow
@pytest.mark.timeout(1100)
def test_main_trains_for_two_steps_with_the_7b_recipe(on_cpu, tiny: Path, tmp_path: Path) -> None:
    from vilavt_rl.replay import read_rollouts
    from vilavt_rl.tiny import write_data

    train = write_data(tmp_path, count=12, split="train", seed=5, name="train")
    val = write_data(tmp_path, count=6, split="dev", seed=6, name="val")
    run = tmp_path / "run"
    command = [
        sys.executable,
        str(ON_CPU),
        f"config={RECIPE}",
        *on_cpu.OVERRIDES,
        *SIZES,
        f"worker.actor.model.model_path={tiny}",
        f"data.train_files={train}",
        f"data.val_files={val}",
        f"worker.rollout.temperature={HOT}",
        "worker.actor.optim.lr=1e-3",
        "trainer.logger=[console,file]",
        f"trainer.save_checkpoint_path={run}",
        "trainer.max_steps=2",
        "trainer.save_freq=1",
        "vilavt.trace_every=1",
    ]
    path = os.pathsep.join([str(HOME), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=1000)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    steps = [json.loads(line) for line in (run / "experiment_log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [step["step"] for step in steps if "actor" in step] == [1, 2]
    assert all(step["actor"]["grad_norm"] > 0 for step in steps if "actor" in step)
    assert "reward_score" in steps[-1]["val"]
    for step in (1, 2):
        folder = run / f"global_step_{step}" / "actor"
        assert (folder / "model_world_size_1_rank_0.pt").is_file()
        assert (folder / "huggingface" / "config.json").is_file()
    rollouts = list(read_rollouts(run))
    assert [sum(one.step == step for one in rollouts) for step in (1, 2)] == [16, 16]
