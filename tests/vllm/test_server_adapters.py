"""A `vilavt-serve` with a LoRA adapter, over one engine and over two data-parallel ones: asked by the adapter's name it
answers as the merged model does in transformers, whichever engine a conversation goes to.
"""

import base64
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import vllm
from adapters import RANK, write_adapter
from serving import serving

from vilavt_core.shipped import DemoQuestion, read_demo_questions
from vilavt_hf.chat import VilavtChat
from vilavt_vllm import support

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(1800)]
if problem := support.server_problem(vllm.__version__):
    pytest.skip(problem, allow_module_level=True)

EXAMPLES = Path(__file__).parents[2] / "examples"
CHECKPOINT = EXAMPLES / "vilavt-tiny"
NAMES = ("alone", "adapted")
FLAGS = (
    *("--dtype", "float32", "--enforce-eager", "--block-size", "32", "--num-gpu-blocks-override", "512"),
    *("--served-model-name", "alone", "--enable-lora", "--max-loras", "2", "--max-lora-rank", str(RANK)),
)


@pytest.fixture(scope="module")
def asked() -> list[DemoQuestion]:
    return [one for one in read_demo_questions(EXAMPLES / "pictures" / "questions.json") if len(one.sources) == 1][:4]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("adapter")


@pytest.fixture(scope="module")
def expected(adapter, asked, tmp_path_factory) -> dict[str, list[list[str]]]:
    """What transformers says turn by turn, with the checkpoint and with the adapter merged into it."""
    chat = VilavtChat.from_pretrained(CHECKPOINT, dtype="float32")
    folder = tmp_path_factory.mktemp("merged") / "checkpoint"
    shutil.copytree(CHECKPOINT, folder)
    write_adapter(chat.model, adapter, seed=5, spread=0.09).save_pretrained(folder)
    chats = {"alone": chat, "adapted": VilavtChat.from_pretrained(folder, dtype="float32")}
    return {
        name: [[turn.text for turn in one.ask(list(q.sources), q.question).turns] for q in asked]
        for name, one in chats.items()
    }


def messages(question: DemoQuestion) -> list[dict]:
    (picture,) = question.sources
    data = base64.b64encode(Path(picture).read_bytes()).decode()
    image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}
    return [{"role": "user", "content": [image, {"type": "text", "text": question.question}]}]


@pytest.mark.nightly("a server with one engine, and one with two")
@pytest.mark.parametrize("engines", [1, 2])
def test_an_adapter_is_asked_by_name_and_every_engine_answers_as_the_merged_model(
    engines: int, adapter: Path, asked: list[DemoQuestion], expected, tmp_path: Path
) -> None:
    more = ("--lora-modules", f"adapted={adapter}", "--data-parallel-size", str(engines))
    with serving(tmp_path / "log", *FLAGS, *more) as server:

        def ask(name: str, conversation: list[dict]) -> dict:
            body = {"model": name, "messages": conversation}
            response = httpx.post(f"{server.url}/chat/completions", json=body, timeout=300)
            assert response.status_code == 200, response.text
            return response.json()

        assert [one["id"] for one in httpx.get(f"{server.url}/models", timeout=60).json()["data"]] == list(NAMES)
        jobs = [(name, number) for number in range(len(asked)) for name in NAMES]
        with ThreadPoolExecutor(len(jobs)) as pool:
            replies = list(pool.map(lambda job: ask(job[0], messages(asked[job[1]])), jobs))
        prints = set()
        for (name, number), reply in zip(jobs, replies, strict=True):
            assert reply["model"] == name
            turns = [turn["text"] for turn in reply["vilavt"]["conversation"]["turns"]]
            assert turns == expected[name][number], (name, number)
            prints.add((name, reply["vilavt"]["provenance"]["fingerprint"]))
        assert len({fingerprint for _, fingerprint in prints}) == len(prints) == 2
        assert expected["alone"] != expected["adapted"]

        # A follow-up goes on with what the same model wrote.
        answered = [
            (job, reply) for job, reply in zip(jobs, replies, strict=True) if reply["vilavt"]["finish"] == "answer"
        ]
        assert "alone" in {name for (name, _), _ in answered}
        for (name, number), reply in answered:
            answer = {"role": "assistant", "content": reply["choices"][0]["message"]["content"]}
            ask(name, [*messages(asked[number]), answer, {"role": "user", "content": "And the next one?"}])
        assert server.metric('vilavt_follow_ups_total{history="kept"}') == len(answered)
        pages = httpx.get(f"{server.base}/metrics", timeout=60).text.splitlines()
        finished = [one for one in pages if one.startswith("vllm:request_success_total") and not one.endswith(" 0.0")]
        worked = {engine for engine in ("0", "1") if any(f'engine="{engine}"' in one for one in finished)}
        assert worked == {str(engine) for engine in range(engines)}
