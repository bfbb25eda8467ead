"""The model as its users drive it: inputs, batches, gradients, freezing, precision, generation."""

import inspect
import itertools
import sys

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as qwen

from vilavt_core.errors import GroupError, ProcessorError
from vilavt_hf import VilavtConfig, VilavtForConditionalGeneration, VilavtVisionConfig, compat
from vilavt_hf.modeling_vilavt import apply_frozen, group_sizes

GRIDS = {0: [(1, 4, 6)], 1: [(1, 6, 4), (1, 4, 4), (1, 4, 8)], 2: []}  # images of three samples
COUNTS = {0: [1], 1: [1, 2], 2: []}


def sample(model, index, length=12):
    """Ids of one sample (its images spread over the text) and the tensors of its images and queries."""
    generator = torch.Generator().manual_seed(index)
    config = model.config
    ids = []
    for _, h, w in GRIDS[index]:
        ids += [*torch.randint(0, 200, (3,), generator=generator).tolist(), config.vision_start_token_id]
        ids += [config.image_token_id] * (h * w // 4) + [config.vision_end_token_id]
    ids += torch.randint(0, 200, (length,), generator=generator).tolist()
    patches = sum(h * w for _, h, w in GRIDS[index])
    n_query = len(COUNTS[index])
    mask = torch.tensor([[0, 0, 0, 0], [1, 1, 1, 0]][:n_query], dtype=torch.long).view(n_query, 4)
    return {
        "ids": ids,
        "pixel_values": torch.randn(patches, 1176, generator=generator),
        "image_grid_thw": torch.tensor(GRIDS[index], dtype=torch.long).view(-1, 3),
        "query_ids": torch.randint(0, 200, (n_query, 4), generator=generator),
        "query_attention_mask": mask,
        "images_per_query": torch.tensor(COUNTS[index], dtype=torch.long),
    }


def batch(model, indices, side="right", **changes):
    samples = [sample(model, index) for index in indices]
    longest = max(len(s["ids"]) for s in samples)
    rows, masks = [], []
    for s in samples:
        pad = [model.config.text_config.pad_token_id or 0] * (longest - len(s["ids"]))
        ones, zeros = [1] * len(s["ids"]), [0] * len(pad)
        rows.append(s["ids"] + pad if side == "right" else pad + s["ids"])
        masks.append(ones + zeros if side == "right" else zeros + ones)
    inputs = {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(masks)}
    for name in ("pixel_values", "image_grid_thw", "query_ids", "query_attention_mask", "images_per_query"):
        inputs[name] = torch.cat([s[name] for s in samples])
    if not len(inputs["pixel_values"]):
        inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    return inputs | changes


@torch.no_grad()
def test_counts_and_mapping_describe_the_same_groups(tiny_model):
    inputs = batch(tiny_model, [1])
    counts = tiny_model(**inputs).logits
    del inputs["images_per_query"]
    mapping = tiny_model(**inputs, image_to_query_mapping=torch.tensor([0, 1, 1])).logits
    torch.testing.assert_close(counts, mapping, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "given, says",
    [
        ({"images_per_query": [1, 1]}, "sums to 2"),
        ({"images_per_query": [1, 3]}, "sums to 4"),
        ({"images_per_query": [3]}, "each of 2 queries"),
        ({"images_per_query": [4, -1]}, "one count"),
        ({"images_per_query": [[1, 2]]}, "shape (1, 2)"),
        ({"image_to_query_mapping": [0, 1]}, "each of 3 images"),
        ({"image_to_query_mapping": [0, 1, 2]}, "below 2"),
        ({"image_to_query_mapping": [-1, 0, 1]}, "below 2"),
        ({"image_to_query_mapping": [1, 0, 1]}, "non-decreasing"),
        ({"image_to_query_mapping": [1, 1, 0]}, "non-decreasing"),
        ({"image_to_query_mapping": [0, 0, 1], "images_per_query": [1, 2]}, "disagree"),
        ({}, "needs images_per_query"),
    ],
)
def test_groups_that_do_not_add_up_are_refused_with_both_numbers(tiny_model, given, says):
    inputs = batch(tiny_model, [1])
    del inputs["images_per_query"]
    inputs |= {name: torch.tensor(value) for name, value in given.items()}
    with pytest.raises(GroupError) as error:
        tiny_model(**inputs)
    assert says in str(error.value)


def test_groups_without_queries_are_refused(tiny_model):
    inputs = batch(tiny_model, [1])
    del inputs["query_ids"], inputs["query_attention_mask"]
    with pytest.raises(GroupError, match="need query_ids"):
        tiny_model(**inputs)


def test_pixels_that_do_not_match_the_grid_are_refused(tiny_model):
    inputs = batch(tiny_model, [1])
    inputs["pixel_values"] = inputs["pixel_values"][:-4]
    with pytest.raises(GroupError, match="72 patches in 3 images, pixel_values holds 68"):
        tiny_model(**inputs)


def test_more_placeholders_than_features_are_refused(tiny_model):
    inputs = batch(tiny_model, [0])
    inputs["input_ids"][0, 0] = tiny_model.config.image_token_id
    with pytest.raises(ValueError):
        tiny_model(**inputs)


def test_video_pixels_are_refused_with_the_remedy(tiny_model):
    with pytest.raises(GroupError, match="frames as images"):
        tiny_model.model(**batch(tiny_model, [2]), pixel_values_videos=torch.zeros(4, 1176))


def test_a_query_without_images_conditions_nothing():
    counts = group_sizes(2, torch.zeros(3, 4), torch.tensor([1, 0, 1]))
    assert counts.tolist() == [1, 0, 1]


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("indices", [[0, 1], [1, 0, 2], [2, 1]])
def test_a_padded_batch_equals_its_samples_alone(tiny_model, side, indices):
    together = batch(tiny_model, indices, side)
    logits = tiny_model(**together).logits
    for row, index in enumerate(indices):
        alone = tiny_model(**batch(tiny_model, [index])).logits[0]
        attended = logits[row][together["attention_mask"][row].bool()]
        torch.testing.assert_close(attended, alone, rtol=0, atol=1e-4)


@torch.no_grad()
def test_text_only_input_is_the_language_model_alone(tiny_model):
    logits = tiny_model(**batch(tiny_model, [2])).logits
    assert logits.shape[1] == 12
    assert torch.isfinite(logits).all()


@torch.no_grad()
def test_mm_token_type_ids_are_optional_and_change_nothing(tiny_model):
    inputs = batch(tiny_model, [0, 1], "left")
    types = (inputs["input_ids"] == tiny_model.config.image_token_id).int()
    given = tiny_model(**inputs, mm_token_type_ids=types).logits
    torch.testing.assert_close(given, tiny_model(**inputs).logits, rtol=0, atol=1e-6)


def gradients(model, checkpointing=None):
    model.train()
    if checkpointing is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": checkpointing})
        model.enable_input_require_grads()
    inputs = batch(model, [0, 1])
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    model(**inputs, labels=labels).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_the_loss_reaches_every_part(build_model):
    grads = gradients(build_model())
    for part in ("instruct_key_proj", "instruct_value_proj", "text_proj", "visual.patch_embed", "language_model"):
        found = [grad for name, grad in grads.items() if part in name]
        assert found, part
        assert all(grad.abs().sum() > 0 for name, grad in grads.items() if part in name and name.endswith("weight"))
    assert any(grad.abs().sum() > 0 for name, grad in grads.items() if "text_encoder" in name)


def test_a_frozen_tower_still_passes_the_gradient_on_to_text_proj(build_model):
    model = build_model()
    model.config.frozen = ["vision_tower"]
    apply_frozen(model)
    grads = gradients(model)
    assert not any(".visual." in name for name in grads)
    assert grads["model.text_proj.weight"].abs().sum() > 0


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_no_gradient(build_model, reentrant):
    plain, checkpointed = gradients(build_model()), gradients(build_model(), checkpointing=reentrant)
    assert plain.keys() == checkpointed.keys()
    for name in plain:
        torch.testing.assert_close(checkpointed[name], plain[name], rtol=1e-3, atol=1e-4, msg=name)


PARTS = {
    "vision_tower": "model.visual.",
    "text_encoder": "model.text_encoder.",
    "text_proj": "model.text_proj.",
    "language_model": ("model.language_model.", "lm_head."),
}


@pytest.mark.parametrize("frozen", [list(c) for n in (1, 2) for c in itertools.combinations(sorted(PARTS), n)])
def test_freezing_survives_from_pretrained_and_from_config(tiny_checkpoint, frozen):
    prefixes = tuple(
        prefix for part in frozen for prefix in ([PARTS[part]] if part != "language_model" else PARTS[part])
    )

    def frozen_exactly(model):
        for name, parameter in model.named_parameters():
            assert parameter.requires_grad != name.startswith(prefixes), name

    frozen_exactly(VilavtForConditionalGeneration.from_pretrained(tiny_checkpoint, frozen=frozen))
    config = AutoConfig.from_pretrained(tiny_checkpoint, frozen=frozen)
    frozen_exactly(VilavtForConditionalGeneration.from_pretrained(tiny_checkpoint, config=config))
    frozen_exactly(VilavtForConditionalGeneration._from_config(config))


def test_freezing_is_remembered_by_a_saved_checkpoint(tiny_checkpoint, tmp_path):
    model = VilavtForConditionalGeneration.from_pretrained(tiny_checkpoint, frozen=["text_encoder"])
    model.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert not any(p.requires_grad for p in again.model.text_encoder.parameters())
    assert all(p.requires_grad for p in again.model.visual.parameters())


@pytest.mark.parametrize("frozen", [["tower"], "vision_tower"])
def test_an_unknown_part_cannot_be_frozen(tiny_checkpoint, frozen):
    with pytest.raises(ValueError, match="frozen"):
        VilavtForConditionalGeneration.from_pretrained(tiny_checkpoint, frozen=frozen)
    with pytest.raises(ValueError, match="frozen"):
        VilavtConfig(frozen=frozen)


def test_an_unknown_integration_point_is_refused():
    with pytest.raises(ValueError, match="integration_point='middle'"):
        VilavtVisionConfig(integration_point="middle").query_aware_blocks()


@torch.no_grad()
def test_eager_attention_equals_sdpa(tiny_checkpoint, tiny_model):
    eager = VilavtForConditionalGeneration.from_pretrained(tiny_checkpoint, attn_implementation="eager").eval()
    assert eager.model.visual.config._attn_implementation == "eager"
    inputs = batch(tiny_model, [0, 1])
    attended = inputs["attention_mask"].bool()
    torch.testing.assert_close(
        eager(**inputs).logits[attended], tiny_model(**inputs).logits[attended], rtol=0, atol=1e-4
    )


def varlen_reference(q, k, v, cu_q, cu_k, scale):
    """What a variable-length flash kernel computes: (n, H, D) packed, segment by segment."""
    out = []
    for s in range(len(cu_q) - 1):
        a, b = q[cu_q[s] : cu_q[s + 1]], k[cu_k[s] : cu_k[s + 1]]
        weights = torch.softmax(torch.einsum("qhd,khd->hqk", a, b) * scale, -1)
        out.append(torch.einsum("hqk,khd->qhd", weights, v[cu_k[s] : cu_k[s + 1]]))
    return torch.cat(out)


@torch.no_grad()
def test_the_flash_attention_interface_gets_the_right_segments(build_model, monkeypatch):
    from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as qwen

    model = build_model()
    inputs = batch(model, [0, 1])
    expected = model(**inputs).logits

    def flash(module, q, k, v, attention_mask, *, cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k, **kwargs):
        assert max_length_q == cu_seq_lens_q.diff().max()
        assert max_length_k == cu_seq_lens_k.diff().max()
        q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
        return varlen_reference(q, k, v, cu_seq_lens_q, cu_seq_lens_k, kwargs["scaling"])[None], None

    monkeypatch.setitem(qwen.ALL_ATTENTION_FUNCTIONS._local_mapping, "flash_attention_2", flash)
    model.model.visual.config._attn_implementation = "flash_attention_2"
    torch.testing.assert_close(model(**inputs).logits, expected, rtol=0, atol=1e-4)


@torch.no_grad()
def test_torch_varlen_gets_the_right_segments(build_model, monkeypatch):
    from vilavt_hf import vision_layout

    model = build_model()
    inputs = batch(model, [0, 1])
    expected = model(**inputs).logits
    monkeypatch.setattr(
        vision_layout.Segments,
        "_torch_varlen",
        lambda self, q, k, v, scale: varlen_reference(q, k, v, self.cu_q, self.cu_k, scale).flatten(1),
    )
    model.model.visual.config._attn_implementation = "torch_varlen"
    torch.testing.assert_close(model(**inputs).logits, expected, rtol=0, atol=1e-4)


@torch.no_grad()
def test_torch_varlen_can_be_selected_and_says_what_it_needs(tiny_checkpoint, tiny_model):
    model = AutoModelForImageTextToText.from_pretrained(tiny_checkpoint, attn_implementation="torch_varlen")
    assert torch.isfinite(model(**batch(tiny_model, [2])).logits).all()  # the language model falls back to SDPA
    with pytest.raises(ValueError, match="needs CUDA and float16 or bfloat16"):
        model(**batch(tiny_model, [0]))


@torch.no_grad()
def test_torch_varlen_on_a_torch_without_it_is_refused_with_the_remedy(build_model, monkeypatch):
    model = build_model()
    model.model.visual.config._attn_implementation = "torch_varlen"
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", None)
    with pytest.raises(ValueError, match="install a newer torch, or use 'sdpa'"):
        model(**batch(model, [0]))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_runs_and_stays_near(tiny_checkpoint, tiny_model, dtype):
    model = AutoModelForImageTextToText.from_pretrained(tiny_checkpoint, dtype=dtype).eval()
    assert {p.dtype for p in model.parameters()} == {dtype}
    inputs = batch(tiny_model, [0, 1])
    attended = inputs["attention_mask"].bool()
    half, full = model(**inputs).logits[attended].float(), tiny_model(**inputs).logits[attended]
    # bf16 keeps 8 bits: with peaked random weights a quarter of the logits' spread is the scale of rounding
    assert (half - full).abs().mean() < 0.25 * full.std()


def generate(model, inputs, **kwargs):
    return model.generate(**inputs, max_new_tokens=6, min_new_tokens=6, **kwargs)


@torch.no_grad()
def greedy_by_hand(model, inputs, steps=6):
    """Without cache or position handling of `generate`: the whole sequence again for every token."""
    ids = inputs["input_ids"]
    for _ in range(steps):
        logits = model(**(inputs | {"input_ids": ids, "attention_mask": torch.ones_like(ids)})).logits[:, -1]
        logits[:, model.generation_config.eos_token_id or model.config.text_config.eos_token_id] = -torch.inf
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
    return ids[:, -steps:]


@torch.no_grad()
@pytest.mark.parametrize("index", [0, 1, 2])
def test_greedy_generation_equals_full_forwards(tiny_model, index):
    inputs = batch(tiny_model, [index])
    assert generate(tiny_model, inputs, do_sample=False)[:, -6:].tolist() == greedy_by_hand(tiny_model, inputs).tolist()


@torch.no_grad()
def test_a_left_padded_batch_generates_what_its_samples_do(tiny_model):
    together = generate(tiny_model, batch(tiny_model, [0, 1], "left"), do_sample=False)
    for row, index in enumerate([0, 1]):
        alone = generate(tiny_model, batch(tiny_model, [index]), do_sample=False)
        assert together[row, -6:].tolist() == alone[0, -6:].tolist()


@torch.no_grad()
def test_beams_of_a_batch_equal_beams_alone(tiny_model):
    together = generate(tiny_model, batch(tiny_model, [1, 0], "left"), num_beams=3, do_sample=False)
    for row, index in enumerate([1, 0]):
        alone = generate(tiny_model, batch(tiny_model, [index]), num_beams=3, do_sample=False)
        assert together[row, -6:].tolist() == alone[0, -6:].tolist()


@torch.no_grad()
def test_num_return_sequences_repeats_whole_samples(tiny_model):
    inputs = batch(tiny_model, [1, 0], "left")
    greedy = generate(tiny_model, inputs, do_sample=False)
    # top_k=1 sampling is greedy, so every returned sequence must repeat its own sample
    returned = generate(tiny_model, inputs, do_sample=True, top_k=1, num_return_sequences=3)
    assert returned[:, -6:].tolist() == greedy[:, -6:].repeat_interleave(3, 0).tolist()


CACHE_NAMES = ("past_key_values", "cache")


def logits_in_steps(model, inputs, name):
    """Logits of one prompt computed in three steps, the cache passed as `name`, and the cache."""
    from transformers import DynamicCache

    seen = {}
    hook = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True
    )
    model(**inputs)
    hook.remove()
    positions = seen["position_ids"][-3:]
    features = compat.pooled(
        model.model.get_image_features(
            *(inputs[n] for n in ("pixel_values", "image_grid_thw", "query_ids", "query_attention_mask")),
            images_per_query=inputs["images_per_query"],
        )
    )
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    embeds[inputs["input_ids"] == model.config.image_token_id] = torch.cat(tuple(features))
    cache, out = DynamicCache(), []
    for start, stop in ((0, 11), (11, 20), (20, embeds.shape[1])):
        step = model(
            inputs_embeds=embeds[:, start:stop],
            position_ids=positions[:, :, start:stop],
            use_cache=True,
            attention_mask=torch.ones(1, stop, dtype=torch.long),
            **{name: cache},
        )
        out.append(step.logits)
    return torch.cat(out, 1), cache


@torch.no_grad()
@pytest.mark.parametrize("name", CACHE_NAMES)
def test_a_kv_cache_with_explicit_positions_equals_one_prefill(tiny_model, name):
    inputs = batch(tiny_model, [1])
    logits, cache = logits_in_steps(tiny_model, inputs, name)
    torch.testing.assert_close(logits, tiny_model(**inputs).logits, rtol=0, atol=1e-4)
    assert cache.get_seq_length() == inputs["input_ids"].shape[1]


def test_two_caches_are_refused(tiny_model):
    from transformers import DynamicCache

    inputs = batch(tiny_model, [1])
    for model in (tiny_model, tiny_model.model):
        with pytest.raises(ProcessorError, match="two caches"):
            model(**inputs, past_key_values=DynamicCache(), cache=DynamicCache())


def test_the_cache_has_the_name_that_the_installed_forward_has():
    names = inspect.signature(qwen.Qwen2_5_VLForConditionalGeneration.forward).parameters
    assert [name for name in CACHE_NAMES if name in names] == [compat.CACHE]


@torch.no_grad()
@pytest.mark.parametrize("name", CACHE_NAMES)
def test_either_name_of_the_cache_is_heeded_once_the_old_one_is_gone(only_new_name, tiny_model, name):
    inputs = batch(tiny_model, [1])
    logits, cache = logits_in_steps(tiny_model, inputs, name)
    torch.testing.assert_close(logits, tiny_model(**inputs).logits, rtol=0, atol=1e-4)
    assert cache.get_seq_length() == inputs["input_ids"].shape[1]


def test_nothing_deprecated_is_used_with_a_cache(tiny_model, deprecations):
    inputs = batch(tiny_model, [0, 1], side="left")
    generate(tiny_model, inputs)
    with torch.no_grad():
        for name in CACHE_NAMES:
            logits_in_steps(tiny_model, batch(tiny_model, [1]), name)
    assert deprecations() == []


@torch.no_grad()
@pytest.mark.parametrize("states", [None, True])
def test_the_output_has_what_the_encoder_gave(tiny_model, states):
    """As far as the installed transformers has a place for it."""
    inputs = batch(tiny_model, [0, 1])
    conditioning = {name: inputs[name] for name in inputs if name.startswith(("pixel", "image", "quer"))}
    expected = compat.pooled(tiny_model.model.get_image_features(**conditioning))
    for model in (tiny_model, tiny_model.model):
        output = model(**inputs, output_hidden_states=states)
        assert (output.hidden_states is not None) is bool(states)
        if not hasattr(output, "image_outputs"):
            continue
        assert all(map(torch.equal, output.image_outputs.pooler_output, expected))
        assert (output.image_outputs.hidden_states is not None) is bool(states)
        assert model(input_ids=torch.tensor([[1, 2]])).image_outputs is None


@torch.no_grad()
def test_image_features_come_with_what_was_asked_for(tiny_model, processor):
    inputs = {
        "pixel_values": torch.randn(4 * 4 + 4 * 6, 1176),
        "image_grid_thw": torch.tensor([[1, 4, 4], [1, 4, 6]]),
    }
    plain = tiny_model.model.get_image_features(**inputs)
    for again in (tiny_model.model, tiny_model) if compat.VISION_OUTPUT_HAS_STATES else (tiny_model.model,):
        with pytest.raises(ProcessorError, match="output_attentions"):
            again.get_image_features(**inputs, output_attentions=True)
        if not compat.VISION_OUTPUT_HAS_STATES:
            with pytest.raises(ProcessorError, match="output_hidden_states"):
                again.get_image_features(**inputs, output_hidden_states=True)
            continue
        output = again.get_image_features(**inputs, output_hidden_states=True)
        assert [len(states) for states in output.hidden_states] == [40] * (tiny_model.config.vision_config.depth + 1)
        assert torch.equal(output.hidden_states[-1], output.last_hidden_state)
        assert plain.hidden_states is None
        last, features = again.get_image_features(**inputs, return_dict=False)
        assert torch.equal(last, plain.last_hidden_state)
        assert all(map(torch.equal, features, plain.pooler_output))


@torch.no_grad()
def test_image_features_come_as_the_configuration_says(build_model):
    model = build_model()
    inputs = {"pixel_values": torch.randn(4 * 4, 1176), "image_grid_thw": torch.tensor([[1, 4, 4]])}
    expected = compat.pooled(model.model.get_image_features(**inputs))[0]
    model.config.return_dict = False
    model.config.vision_config.output_hidden_states = True
    for again in (model.model, model) if compat.VISION_OUTPUT_HAS_STATES else (model.model,):
        output = again.get_image_features(**inputs)
        if compat.VISION_OUTPUT_HAS_STATES:
            _, features, states = output
            assert len(states) == model.config.vision_config.depth + 1
            assert (
                again.get_image_features(**inputs, return_dict=True, output_hidden_states=False).hidden_states is None
            )
        else:
            features = output
        assert torch.equal(features[0], expected)
