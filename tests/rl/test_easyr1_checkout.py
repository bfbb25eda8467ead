"""Our parts in a real EasyR1: `EASYR1_HOME=path/to/checkout nox -s easyr1`. It is on no index, so CI has none.

transformers 4.57 and a stub in place of vLLM, which needs a GPU there: imports, configuration, reward by file path,
the colocated worker, and the actor's log-probabilities and update on the shipped tiny checkpoint.
"""

import importlib.util
import os
import socket
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

HOME = os.environ.get("EASYR1_HOME")
pytestmark = pytest.mark.skipif(HOME is None, reason="EASYR1_HOME names no EasyR1 checkout")

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "vilavt_7b_grpo_easyr1.yaml"
STUBS = {
    "vllm": ("LLM", "RequestOutput", "SamplingParams"),
    "vllm.distributed": ("parallel_state",),
    "vllm.distributed.parallel_state": (),
    "vllm.lora": (),
    "vllm.lora.models": ("LoRAModel",),
    "vllm.lora.request": ("LoRARequest",),
    "vllm.lora.utils": ("get_adapter_absolute_path",),
    "vllm.lora.worker_manager": ("LRUCacheWorkerLoRAManager",),
}


@pytest.fixture(scope="module", autouse=True)
def easyr1():
    """The checkout in front of everything else, and a vLLM that consists of names."""
    sys.path.insert(0, str(HOME))
    for name, attributes in STUBS.items():
        module = types.ModuleType(name)
        module.__spec__ = importlib.util.spec_from_loader(name, None)
        module.__path__ = []
        for attribute in attributes:
            setattr(module, attribute, type(attribute, (), {}))
        sys.modules[name] = module
    yield
    sys.path.remove(str(HOME))


def test_the_checkout_is_recognised_and_has_every_name_that_we_use() -> None:
    from vilavt_rl.compat import flavour, require_easyr1, require_verl
    from vilavt_rl.easyr1.seams import check
    from vilavt_rl.errors import HostError

    assert flavour() == "easyr1"
    require_easyr1()
    check()
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


def test_the_actor_computes_our_log_probabilities_and_learns(tiny: Path, processor) -> None:
    import torch.distributed as dist
    import verl.workers.actor.dp_actor as dp_actor
    from verl.protocol import DataProto
    from verl.workers.actor.config import ActorConfig

    from vilavt_rl.easyr1.batch import model_inputs, pack
    from vilavt_rl.policy import VilavtPolicy
    from vilavt_rl.replay import model_logprobs

    episodes = _episodes(tiny, processor)
    model = VilavtPolicy.from_pretrained(tiny, dtype=torch.float32, attn_implementation="sdpa")
    model.model.visual.requires_grad_(False)
    expected = [model_logprobs(model.eval(), processor, episode) for episode in episodes]
    tokenizer = processor.tokenizer
    tensors, objects = pack(
        episodes,
        prompt_length=128,
        response_length=256,
        pad_token_id=tokenizer.pad_token_id,
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
    )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    try:
        dp_actor.tqdm = lambda iterable, **kwargs: iterable
        config = ActorConfig(
            padding_free=False,
            dynamic_batching=False,
            use_torch_compile=False,
            global_batch_size=2,
            micro_batch_size_per_device_for_update=2,
            micro_batch_size_per_device_for_experience=2,
        )
        config.global_batch_size_per_device = 2
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        actor = dp_actor.DataParallelPPOActor(config, model, optimizer)
        data = DataProto.from_dict(
            tensors={k: v for k, v in tensors.items() if k != "prompts"},
            non_tensors={"multi_modal_inputs": model_inputs(objects["multi_modal_data"], processor)},
            meta_info={"temperature": 1.0},
        )
        found = actor.compute_log_prob(data)
        mask = tensors["response_mask"].bool()
        wanted = torch.tensor([value for row in expected for value in row if value is not None])
        assert float((found[mask] - wanted).abs().max()) <= 1e-4
        before = model.lm_head.weight.detach().clone(), model.model.visual.patch_embed.proj.weight.detach().clone()
        data.batch["old_log_probs"] = found
        data.batch["ref_log_probs"] = found.clone()
        data.batch["advantages"] = mask.float() * torch.tensor([[1.0], [-0.5]])
        actor.update_policy(data)
        assert not torch.equal(before[0], model.lm_head.weight)
        assert torch.equal(before[1], model.model.visual.patch_embed.proj.weight)
    finally:
        dist.destroy_process_group()


def _episodes(tiny: Path, processor):
    """Two conversations of the shipped pictures, as the model itself had them."""
    import json

    from vilavt_hf.chat import VilavtChat
    from vilavt_hf.episode import Episode

    chat = VilavtChat.from_pretrained(tiny, dtype=torch.float32)
    pictures = ROOT / "examples" / "pictures"
    out = []
    for asked in json.loads((pictures / "questions.json").read_text(encoding="utf-8"))[:2]:
        image = Image.open(pictures / asked["image"]).convert("RGB")
        result = chat.ask([image], asked["question"])
        episode = Episode.start(
            [image],
            asked["question"],
            tokenizer=processor.tokenizer,
            prompts=chat.prompts,
            preset=chat.preset,
            limits=chat.limits,
        )
        sampled = result.record
        at = 0
        while (request := episode.next_request()) is not None:
            start = len(request.all_token_ids)
            end = start
            while end < len(sampled.token_ids) and sampled.loss_mask[end]:
                end += 1
            episode.feed(sampled.token_ids[start:end])
            at = end
        assert at == len(sampled.token_ids)
        out.append(episode)
    return out
