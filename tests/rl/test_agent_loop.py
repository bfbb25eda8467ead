"""One trajectory through verl's own agent loop worker, against a server that plays a script."""

import asyncio
import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

pytest.importorskip("verl", reason="verl has an environment of its own")

from vilavt_core.errors import VilavtError
from vilavt_rl import equal_rewards
from vilavt_rl.data import read_rows

CALL = (
    '<think>red row 0 column 0</think><tool>{"region": [{"index": 0, "bbox_2d": [0, 0, 28, 28]}, '
    '{"index": 0, "bbox_2d": [28, 0, 84, 56]}], "query": "digit on the red card"}</tool>'
)
ANSWER = "<think>7</think><answer>7</answer>"


class Script:
    """Stands for verl's server client; says the given turns, the longest prompt the latest."""

    def __init__(self, tokenizer, turns) -> None:
        self.tokenizer, self.turns, self.calls = tokenizer, turns, []

    async def generate(self, request_id, *, prompt_ids, sampling_params, image_data=None, **more):
        from verl.workers.rollout.replica import TokenOutput

        turn = sum(call["request_id"] == request_id for call in self.calls)
        self.calls.append(
            {
                "request_id": request_id,
                "prompt": list(prompt_ids),
                "params": dict(sampling_params),
                "images": list(image_data or []),
                "more": more,
            }
        )
        allowed = sampling_params["max_tokens"]
        sampling_params.clear()  # servers take keys out
        text = self.turns[turn]
        ids = [
            *self.tokenizer.encode(text, add_special_tokens=False),
            self.tokenizer.convert_tokens_to_ids("<|im_end|>"),
        ]
        ids = ids[:allowed]
        return TokenOutput(
            token_ids=ids,
            log_probs=[-0.25 - turn] * len(ids),
            stop_reason="completed",
            extra_fields={"min_global_steps": turn, "max_global_steps": turn},
        )


@pytest.fixture(scope="module")
def worker(tiny: Path, recipe_config, tmp_path_factory: pytest.TempPathFactory):
    from verl.experimental.agent_loop.agent_loop import AgentLoopWorker

    run = f"trainer.default_local_dir={tmp_path_factory.mktemp('run')}"
    config = recipe_config("tiny_cpu", f"actor_rollout_ref.model.path={tiny}", run)
    return AgentLoopWorker(config, None)


def run(worker, rows, turns, **fields):
    from verl.protocol import DataProto

    worker.llm_client = Script(worker.tokenizer, turns)
    columns = {
        "row": [row.to_json() for row in rows],
        "raw_prompt": [[{"role": "user", "content": row.question}] for row in rows],
        **{name: [value] * len(rows) for name, value in fields.items()},
    }
    arrays = {}
    for name, values in columns.items():
        arrays[name] = np.empty(len(values), dtype=object)
        arrays[name][:] = values
    batch = DataProto.from_dict(tensors={"dummy": torch.zeros(len(rows), 1)}, non_tensors=arrays)
    return asyncio.run(worker.generate_sequences(batch)), worker.llm_client.calls


@pytest.fixture(scope="module")
def played(worker, rows_file: Path):
    return run(worker, read_rows(rows_file)[:2], [CALL, ANSWER])


def test_the_trained_tokens_are_the_sampled_ones_the_end_of_turn_included(played, worker) -> None:
    out, _ = played
    end = worker.tokenizer.convert_tokens_to_ids("<|im_end|>")
    expected = [t for text in (CALL, ANSWER) for t in [*worker.tokenizer.encode(text, add_special_tokens=False), end]]
    for row in range(2):
        mask = out.batch["response_mask"][row].bool()
        assert out.batch["responses"][row][mask].tolist() == expected
        assert int(mask.sum()) == len(expected)
        assert out.batch["responses"][row][mask].tolist().count(end) == 2


def test_every_token_after_the_prompt_came_from_the_episode_or_the_engine(played) -> None:
    out, calls = played
    trained = [out.batch["input_ids"][i][out.batch["attention_mask"][i].bool()].tolist() for i in range(2)]
    for call in calls:
        assert sum(ids[: len(call["prompt"])] == call["prompt"] for ids in trained) == 1


def test_a_session_keeps_its_id_and_its_sampling_parameters(played) -> None:
    _, calls = played
    assert len({call["request_id"] for call in calls}) == 2
    assert len(calls) == 4
    for call in calls:
        assert call["params"]["max_tokens"] == 96
        assert len(call["params"]["logit_bias"]) == 4
        assert set(call["params"]["logit_bias"].values()) == {-100.0}
        assert len(call["params"]["stop_token_ids"]) == 2


def test_groups_travel_as_counts_and_can_be_concatenated(played) -> None:
    out, calls = played
    assert [(inquiry.query, len(inquiry.images)) for inquiry in calls[-1]["images"]] == [
        ("", 1),
        ("digit on the red card", 2),
    ]
    assert calls[-1]["more"] == {}
    from verl.utils.model import extract_multi_modal_inputs

    inputs = extract_multi_modal_inputs(out.non_tensor_batch["multi_modal_inputs"])
    assert inputs["images_per_query"].tolist() == [1, 2, 1, 2]
    assert inputs["query_ids"].shape == inputs["query_attention_mask"].shape == (4, 50)
    assert inputs["image_grid_thw"].shape == (6, 3)


def test_positions_are_the_models_own(played, tiny) -> None:
    from vilavt_hf import VilavtConfig, VilavtModel
    from vilavt_hf.compat import rope_index

    out, _ = played
    with torch.device("meta"):
        model = VilavtModel._from_config(VilavtConfig.from_pretrained(tiny))
    real = out.batch["attention_mask"][0].bool()
    grid = out.non_tensor_batch["multi_modal_inputs"][0]["image_grid_thw"]
    expected = rope_index(model, out.batch["input_ids"][0][real], grid)
    assert torch.equal(out.batch["position_ids"][0, 1:, real], expected)
    assert torch.equal(out.batch["position_ids"][0, 0, real], torch.arange(int(real.sum())))


def test_logprobs_weight_versions_and_rewards_come_along(played, rows_file: Path) -> None:
    out, _ = played
    mask = out.batch["response_mask"][0].bool()
    assert set(out.batch["rollout_log_probs"][0][mask].tolist()) == {-0.25, -1.25}
    assert out.batch["rollout_log_probs"][0][~mask].abs().max() == pytest.approx(0.0)
    assert out.non_tensor_batch["min_global_steps"].tolist() == [0, 0]
    assert out.non_tensor_batch["max_global_steps"].tolist() == [1, 1]
    rows = read_rows(rows_file)[:2]
    expected = [1.0 if row.answer == "7" else 0.0 for row in rows]
    assert out.batch["rm_scores"].sum(-1).tolist() == pytest.approx(expected)
    assert out.non_tensor_batch["zooms"].tolist() == [1.0, 1.0]


def test_a_trajectory_never_outgrows_the_response_length(worker, rows_file: Path) -> None:
    out, calls = run(worker, read_rows(rows_file)[:1], [CALL, CALL, CALL, CALL, ANSWER])
    lengths = out.batch["attention_mask"].sum(-1)
    assert int(lengths.max()) <= 256 + 320
    assert out.non_tensor_batch["finish"][0] in ("turn_limit", "context_limit")
    assert calls[-1]["params"]["max_tokens"] <= 256 + 320 - len(calls[-1]["prompt"])


def test_a_row_that_cannot_be_answered_ends_its_own_trajectory_with_an_error_that_names_it(
    worker, rows_file: Path, tmp_path: Path
) -> None:
    # verl then trains on the others: test_grpo_vllm.py, nightly, because it takes one more start of Ray and vLLM.
    row = read_rows(rows_file)[0]
    broken = tmp_path / "broken.png"
    whole = Path(str(row.images[0])).read_bytes()
    broken.write_bytes(whole[: len(whole) // 2])
    for faulty, says in (
        (replace(row, id="cut-short", images=(str(broken),)), r"broken\.png: .*damaged"),
        (replace(row, id="too-long", question="What is on it? " * 600), r"sample too-long: its first turn has \d+ "),
    ):
        with pytest.raises(VilavtError, match=says):
            run(worker, [faulty], [CALL, ANSWER])


def rebuilt(worker, **changes):
    """A worker whose rollout settings and agent loop differ: `rollout` by key, the rest as fields of the loop."""
    from verl.experimental.agent_loop.agent_loop import AgentLoopWorker

    config = worker.config.copy()
    rollout = config.actor_rollout_ref.rollout
    for key, value in changes.pop("rollout", {}).items():
        rollout[key] = value
    file = Path(config.trainer.default_local_dir) / f"loop-{len(changes)}-{'-'.join(map(str, changes.values()))}.yaml"
    loops = yaml.safe_load(Path(rollout.agent.agent_loop_config_path).read_text(encoding="utf-8"))
    file.write_text(yaml.safe_dump([{**loops[0], **changes}]), encoding="utf-8")
    rollout.agent.agent_loop_config_path = str(file)
    return AgentLoopWorker(config, None)


SHORT = '<tool>{"region": [{"index": 0, "bbox_2d": [0, 0, 28, 28]}], "query": "red"}</tool>'


@pytest.mark.parametrize("turn", [SHORT + SHORT, SHORT.replace('"query"', '"query": "blue", "query"')])
def test_vllm_gets_the_inquiries_of_the_episode_also_where_the_presets_rules_read_a_turn_differently(
    worker, rows_file: Path, turn: str
) -> None:
    # Two calls in a turn, or a key twice: strict rules, by which a foreign client's prompt is read, see no call here.
    other = rebuilt(worker, preset="rl", rollout={"name": "vllm"})
    out, calls = run(other, read_rows(rows_file)[:1], [turn, ANSWER])
    given = [(inquiry.query, len(inquiry.images)) for inquiry in calls[-1]["images"]]
    inputs = out.non_tensor_batch["multi_modal_inputs"][0]
    assert [count for _, count in given] == inputs["images_per_query"].tolist() == [1, 1]
    assert [bool(query) for query, _ in given] == [False, True]
    ids, mask = worker.processor.tokenize_queries([query for query, _ in given])
    assert torch.equal(inputs["query_ids"], ids)
    assert torch.equal(inputs["query_attention_mask"], mask)
    assert calls[-1]["more"] == {}


@pytest.mark.parametrize("name", ["vllm", "vilavt_hf"])
def test_the_presets_query_prefix_reaches_the_engine_and_the_trainer(worker, rows_file: Path, name: str) -> None:
    other = rebuilt(worker, preset="eval-hf", rollout={"name": name})
    out, calls = run(other, read_rows(rows_file)[:1], [CALL, ANSWER])
    inquiries = calls[-1]["images"]
    assert {inquiry.query_prefix for inquiry in inquiries} == {"Query: "}
    expected = worker.processor.encode_inquiries(inquiries)
    asked = int(expected["query_attention_mask"].sum())
    assert asked > int(worker.processor.tokenize_queries(["digit on the red card"])[1].sum())
    assert int(out.non_tensor_batch["multi_modal_inputs"][0]["query_attention_mask"].sum()) == asked


def test_a_rollout_engine_without_a_vilavt_is_refused_by_name(worker, rows_file: Path) -> None:
    from hydra.errors import InstantiationException

    other = rebuilt(worker, rollout={"name": "sglang"})
    with pytest.raises(InstantiationException, match=r"rollout\.name is 'sglang': ViLaVT runs in vllm and vilavt_hf"):
        run(other, read_rows(rows_file)[:1], [CALL, ANSWER])


def test_rollouts_are_written_and_play_again(worker, rows_file: Path, tiny: Path, tmp_path: Path) -> None:
    from vilavt_rl.replay import play, read_rollouts, write_page
    from vilavt_rl.rollout import settings_of_checkpoint

    rows = [replace(row, answer=answer) for row, answer in zip(read_rows(rows_file), ("7", "8"), strict=False)]
    before, worker.config = worker.config, worker.config.copy()
    worker.config.trainer.default_local_dir = str(tmp_path)
    try:
        out, _ = run(worker, rows, [CALL, ANSWER], global_steps=20, uid="g")
        run(worker, rows[:1], [CALL, ANSWER], global_steps=21, uid="h")
    finally:
        worker.config = before
    rollouts = list(read_rollouts(tmp_path))
    assert [rollout.step for rollout in rollouts] == [20, 20]
    assert [rollout.temperature for rollout in rollouts] == pytest.approx([1.0, 1.0])
    settings = settings_of_checkpoint(tiny)
    record = play(rollouts[0], settings).record
    trained = [out.batch["input_ids"][i][out.batch["attention_mask"][i].bool()].tolist() for i in range(2)]
    assert record.token_ids in trained
    page = write_page(rollouts, settings, tmp_path / "page.html").read_text(encoding="utf-8")
    assert "digit on the red card" in page
    assert "overall 1, accuracy 1, format 1, zooms 1" in page
    assert "overall 0, accuracy 0, format 1, zooms 1" in page


def test_verls_reward_workers_get_the_same_reward(played, rows_file: Path) -> None:
    from vilavt_rl.rewards import Message, Trajectory
    from vilavt_rl.verl.reward import compute_score

    messages = Trajectory(
        (Message("assistant", CALL), Message("user", "<tool_response>…</tool_response>"), Message("assistant", ANSWER))
    ).to_json()
    info = {"question_type": "numerical", "messages": messages, "sampled_tokens": 80}
    assert compute_score("tiny-one", "", "7", info) == pytest.approx(
        {"score": 1, "acc": 1, "format": 1, "zooms": 1, "zoomed": 1, "turns": 2}
    )
    assert compute_score("tiny-one", "", "8", info)["score"] == pytest.approx(0)
    assert compute_score("x", ANSWER, "7", {"question_type": "numerical"}, version="published")[
        "score"
    ] == pytest.approx(1)


class RewardWorker:
    """Stands for the handle of verl's reward workers: the same reward manager, without Ray."""

    def __init__(self, worker) -> None:
        from verl.experimental.reward_loop.reward_manager.naive import NaiveRewardManager
        from verl.utils import hf_tokenizer

        from vilavt_rl.verl.reward import compute_score

        tokenizer = hf_tokenizer(worker.tokenizer.name_or_path)
        self.make = partial(NaiveRewardManager, worker.config, tokenizer, compute_score)
        self.compute_score = self

    async def remote(self, data):
        return await self.make().run_single(data)


@pytest.mark.parametrize("who", ["the agent loop", "verl's reward workers"])
@pytest.mark.parametrize("answers, warnings", [(["8", "9"], 1), (["7", "9"], 0)])
def test_a_run_whose_rewards_are_all_equal_says_so_whoever_computes_them(
    worker, rows_file: Path, monkeypatch, caplog, who: str, answers: list[str], warnings: int
) -> None:
    monkeypatch.setattr(equal_rewards, "seen", equal_rewards.EqualRewards())
    other = rebuilt(worker, reward=None) if who != "the agent loop" else worker
    if other is not worker:
        other.reward_loop_worker_handles = [RewardWorker(worker)]
    rows = [replace(row, answer=answer) for row, answer in zip(read_rows(rows_file), answers * 2, strict=False)]
    for step in range(equal_rewards.BATCHES):
        run(other, rows, [ANSWER], global_steps=step, reward_model={"ground_truth": answers[step % 2]},
            data_source="x", extra_info={"question_type": "numerical"})  # fmt: skip
    told = [record.getMessage() for record in caplog.records if record.name == "vilavt_rl.equal_rewards"]
    assert len(told) == warnings
    if told:
        assert f"rewards of the last {equal_rewards.BATCHES} batches are 0;" in told[0]


def test_a_run_that_saves_notes_how_its_checkpoints_are_run(worker, rows_file: Path, tmp_path: Path) -> None:
    from verl.utils import hf_processor

    before = worker.config
    worker.config = before.copy()
    inference = {"preset": "default", "limits": {"max_pixels": 50176}}
    try:
        for save_freq in (-1, 2):
            worker.config.trainer.save_freq = save_freq
            other = rebuilt(worker, preset="rl", limits={"max_turns": 3}, inference=inference)
            note = Path(other.config.trainer.default_local_dir) / "vilavt_chat.json"
            run(other, read_rows(rows_file)[:1], [CALL, ANSWER])
            assert note.is_file() == (save_freq > 0)
        asked = json.loads(note.read_text(encoding="utf-8"))
        assert asked["preset"] == "default"  # the tiny model's own limits, the run's, and what it names for later
        assert asked["limits"] == {"max_new_tokens_per_turn": 96, "max_pixels": 50176, "max_turns": 3}
        saved = note.parent / "global_step_2" / "actor" / "huggingface"
        hf_processor(worker.tokenizer.name_or_path).save_pretrained(saved)
        assert json.loads((saved / "vilavt_chat.json").read_text(encoding="utf-8")) == asked
    finally:
        note.unlink(missing_ok=True)
        worker.config = before
