"""A `vilavt-serve` over two data-parallel engines with a LoRA adapter: asked by the adapter's name, it answers as the
merged model does in transformers, whichever engine a turn goes to, and goes on where the same adapter stopped.
"""

import base64
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import torch
import vllm
from safetensors.torch import load_file, save_file
from serving import serving

from vilavt_hf.chat import VilavtChat
from vilavt_vllm import support

pytestmark = [pytest.mark.engine, pytest.mark.nightly("two engines and an adapter: a minute")]
if problem := support.server_problem(vllm.__version__):
    pytest.skip(problem, allow_module_level=True)

ROOT = Path(__file__).parents[2]
CHECKPOINT, PICTURES = ROOT / "examples" / "vilavt-tiny", ROOT / "examples" / "pictures"
ASKED = json.loads((PICTURES / "questions.json").read_text())
RANK, ALPHA = 8, 16
TARGETS = ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    """(folder of an adapter, folder of the checkpoint with its update merged in)."""
    generator, name_end = torch.Generator().manual_seed(5), ".weight"
    tensors, update = load_file(CHECKPOINT / "model.safetensors"), {}
    for name, tensor in list(tensors.items()):
        layer = name.removesuffix(name_end)
        if "visual." in name or "text_encoder." in name or not layer.endswith(TARGETS):
            continue
        a = torch.randn(RANK, tensor.shape[1], generator=generator) * 0.05
        b = torch.randn(tensor.shape[0], RANK, generator=generator) * 0.05
        tensors[name] = tensor.float() + ALPHA / RANK * b @ a
        inner = layer.removeprefix("model.").removeprefix("language_model.")
        update[f"base_model.model.model.language_model.{inner}.lora_A.weight"] = a
        update[f"base_model.model.model.language_model.{inner}.lora_B.weight"] = b
    assert update
    folder, merged = tmp_path_factory.mktemp("adapter"), tmp_path_factory.mktemp("merged") / "checkpoint"
    save_file(update, folder / "adapter_model.safetensors")
    targets = [target.rsplit(".", 1)[-1] for target in TARGETS]
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": targets, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    shutil.copytree(CHECKPOINT, merged)
    save_file({name: one.float() for name, one in tensors.items()}, merged / "model.safetensors", {"format": "pt"})
    return folder, merged


def messages(number: int) -> list[dict]:
    asked = ASKED[number]
    data = base64.b64encode((PICTURES / asked["image"]).read_bytes()).decode()
    image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}
    return [{"role": "user", "content": [image, {"type": "text", "text": asked["question"]}]}]


def said(turns) -> list[str]:
    return [turn["text"] if isinstance(turn, dict) else turn.text for turn in turns]


def test_an_adapter_is_asked_by_name_and_two_engines_answer_as_one(adapted, tmp_path):
    folder, merged = adapted
    expected = {}
    for name, path in (("alone", CHECKPOINT), ("polite", merged)):
        chat = VilavtChat.from_pretrained(path, dtype="float32")
        expected[name] = [chat.ask([PICTURES / one["image"]], one["question"]) for one in ASKED]
    flags = ["--dtype", "float32", "--enforce-eager", "--block-size", "32", "--num-gpu-blocks-override", "512"]
    flags += ["--data-parallel-size", "2", "--served-model-name", "alone", "--enable-prompt-tokens-details"]
    flags += ["--enable-lora", "--max-lora-rank", str(RANK), "--lora-modules", f"polite={folder}"]
    with serving(tmp_path / "log", *flags) as server:

        def ask(name: str, conversation: list[dict]) -> dict:
            body = {"model": name, "messages": conversation}
            response = httpx.post(f"{server.url}/chat/completions", json=body, timeout=300)
            assert response.status_code == 200, response.text
            return response.json()

        listed = [one["id"] for one in httpx.get(f"{server.url}/models", timeout=60).json()["data"]]
        assert listed == ["alone", "polite"]
        jobs = [(name, number) for number in range(len(ASKED)) for name in listed]
        with ThreadPoolExecutor(len(jobs)) as pool:
            replies = list(pool.map(lambda job: ask(job[0], messages(job[1])), jobs))
        prints = set()
        for (name, number), reply in zip(jobs, replies, strict=True):
            assert reply["model"] == name
            assert said(reply["vilavt"]["conversation"]["turns"]) == said(expected[name][number].turns), (name, number)
            prints.add((name, reply["vilavt"]["provenance"]["fingerprint"]))
        assert len({print for _, print in prints}) == len(prints) == 2
        assert any(said(a.turns) != said(b.turns) for a, b in zip(*expected.values(), strict=True))

        # A follow-up goes on with what the same adapter wrote, and not with what the model alone did.
        answered = [
            (job, reply) for job, reply in zip(jobs, replies, strict=True) if reply["vilavt"]["finish"] == "answer"
        ]
        assert {name for (name, _), _ in answered} >= {"alone"}
        for (name, number), reply in answered:
            answer = {"role": "assistant", "content": reply["choices"][0]["message"]["content"]}
            ask(name, [*messages(number), answer, {"role": "user", "content": "And the next one?"}])
        kept = 'vilavt_follow_ups_total{history="kept"}'
        assert server.metric(kept) == len(answered)
        # Both engines have worked.
        finished = [
            line
            for line in httpx.get(f"{server.base}/metrics", timeout=60).text.splitlines()
            if line.startswith("vllm:request_success_total") and float(line.rsplit(" ", 1)[1]) > 0
        ]
        assert {engine for engine in "01" if any(f'engine="{engine}"' in line for line in finished)} == {"0", "1"}
        assert httpx.get(f"{server.base}/load", timeout=60).json() == {"server_load": 0, "running": 0, "waiting": 0}
