"""What a training run saves is served as it is: checkpoints without a conversion, adapters beside their model."""

import json

import pytest

from vilavt_core.sft_config import SftConfig
from vilavt_hf import VilavtForConditionalGeneration, VilavtProcessor
from vilavt_hf.train.run import Run

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def train(tiny, pictures, tmp_path_factory):
    """`train(**sections)` -> folder of a run of two steps over the checkpoint most tests share."""
    data = tmp_path_factory.mktemp("data")
    pictures[0].save(data / "a.png")
    records = [
        {
            "images": ["a.png"],
            "conversations": [
                {"from": "human", "value": f"<image>What is it? {i}"},
                {"from": "gpt", "value": "<answer>B</answer>" * i},
            ],
        }
        for i in range(1, 5)
    ]
    (data / "set.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (data / "sets.yaml").write_text("datasets: [{name: set, annotations: set.jsonl}]")

    def run(**sections):
        folder = tmp_path_factory.mktemp("run")
        values = {
            "model": {"path": str(tiny.path), "precision": "fp32", "frozen": []},
            "data": {"registry": str(data / "sets.yaml"), "use": ["set"], "max_length": 512, "workers": 0},
            "batch": {"accumulation": 1},
            "optimizer": {"learning_rate": 3e-2, "max_steps": 2, "warmup": 0},
            "parallel": {"cpu": True},
            "output": {"folder": str(folder), "save_steps": 1, "final_dtype": "fp32"},
        }
        Run(SftConfig.model_validate({**values, **sections})).train()
        return folder

    return run


def reference(tools, tiny, folder, prompt, images):
    model = VilavtForConditionalGeneration.from_pretrained(folder).eval()
    return tools.reference(type(tiny)(model=model, processor=tiny.processor), prompt, images)


def test_a_checkpoint_of_a_run_is_served_without_a_conversion(train, start, tiny, tools, pictures):
    checkpoint = train() / "checkpoint-1"
    prompt, images = tools.conversation(("the red button", 2)), pictures[:3]
    expected = reference(tools, tiny, checkpoint, prompt, images)
    engine = start(checkpoint)
    found = engine.next_logprobs(prompt, images)
    assert tools.difference(found, expected) <= 1e-3
    assert tools.difference(found, tools.reference(tiny, prompt, images)) > 1e-2
    assert VilavtProcessor.from_pretrained(checkpoint).query_tokenizer is not None


def test_an_adapter_of_a_run_is_served_beside_its_model_and_equals_the_merged_one(train, start, tiny, tools, pictures):
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    folder = train(lora={"rank": 8, "alpha": 16})
    prompt, images = tools.conversation(("the red button", 2)), pictures[:3]
    merged = reference(tools, tiny, folder / "merged", prompt, images)
    engine = start(tiny.path, enable_lora=True, max_lora_rank=8)
    params = SamplingParams(temperature=0, max_tokens=1, logprobs=-1, detokenize=False)
    request = {"prompt": prompt, "multi_modal_data": {"image": images}}
    adapter = LoRARequest("sft", 1, str(folder / "final"))
    adapted = tools.vocabulary(engine.llm.generate([request], params, use_tqdm=False, lora_request=adapter)[0])
    assert tools.difference(adapted, merged) <= 1e-3
    assert tools.difference(adapted, tools.reference(tiny, prompt, images)) > 1e-2
