"""What `look` measures against all attention of a second, slow tower; its cost; pictures; `vilavt attention`."""

import base64
import io
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from slow_tower import patch_places, slow_tower
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from typer.testing import CliRunner

from vilavt_core.attention import AttentionPicture, Heat, QueryDifference
from vilavt_core.attention_figure import TINTS, draw_attention, overlay, tint
from vilavt_core.cli import app, main
from vilavt_core.cli.talk import Prompt
from vilavt_core.conversation import Inquiry
from vilavt_core.dialogue import Dialogue, Wishes
from vilavt_core.errors import AttentionError
from vilavt_core.protocol import Region
from vilavt_core.results import ChatResult
from vilavt_core.shipped import read_demo_questions
from vilavt_core.trace import write_html
from vilavt_core.watching import require_watched, with_attention, zooms
from vilavt_core.web.desk import Desk
from vilavt_hf import attention_maps, compat
from vilavt_hf.attention_maps import Patch, attention_of, compare_queries, look, picture_of, words_of, zoom
from vilavt_hf.chat import VilavtChat

EXAMPLES = Path(__file__).parents[2] / "examples"
ASKED = read_demo_questions(EXAMPLES / "pictures" / "questions.json")
ATOL = 2e-5  # fp32 softmax, two summation orders, four blocks of peaked attention
GRIDS = [(1, 6, 8), (1, 4, 4), (2, 6, 4), (1, 4, 8), (1, 2, 6)]
COUNTS = [1, 3, 0, 1]
CHOSEN = [Patch(3, 1, 5), Patch(2, 5, 0, 1), Patch(0, 2, 2)]
runner = CliRunner()


@pytest.fixture(scope="module")
def inputs():
    """Four query rows: empty, right padded, without images, left padded."""
    generator = torch.Generator().manual_seed(7)
    mask = torch.tensor([[0, 0, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 0, 0, 0], [0, 1, 1, 1, 1]])
    return {
        "pixel_values": torch.randn(sum(t * h * w for t, h, w in GRIDS), 1176, generator=generator),
        "image_grid_thw": torch.tensor(GRIDS),
        "query_ids": torch.randint(0, 200, mask.shape, generator=generator),
        "query_attention_mask": mask,
        "images_per_query": torch.tensor(COUNTS),
    }


@torch.no_grad()
def all_attention(model, inputs):
    """For every block (heads, N, N + Q * T) with the patches image by image, row by row."""
    tower, mask, seen = model.model.visual, inputs["query_attention_mask"], []
    text = model.model.encode_queries(inputs["query_ids"], mask)
    slow_tower(tower, inputs["pixel_values"], GRIDS, COUNTS, text, mask, seen)
    places = patch_places(GRIDS, tower.config.spatial_merge_size, 1)
    order = sorted(range(len(places)), key=lambda p: (*places[p][:2], places[p][4], places[p][5]))
    columns = [*order, *range(len(places), len(places) + mask.numel())]
    return [block[:, order][:, :, columns] for block in seen]


def check(model, inputs, **options):
    expected = all_attention(model, inputs)
    mask = inputs["query_attention_mask"]
    sizes = [t * h * w for t, h, w in GRIDS]
    starts = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
    found = look(model, inputs, heads="all", patches=CHOSEN, **options)
    assert [group.query for group in found] == [0, 1, 3]
    for group in found:
        first = sum(COUNTS[: group.query])
        images = range(first, first + COUNTS[group.query])
        here = range(starts[images[0]], starts[images[-1] + 1])
        tokens = [starts[-1] + group.query * mask.shape[1] + int(c) for c in mask[group.query].nonzero()[:, 0]]
        chosen = [
            starts[p.image] + (p.frame * GRIDS[p.image][1] + p.row) * GRIDS[p.image][2] + p.column
            for p in CHOSEN
            if p.image in images
        ]
        assert group.token_ids == tuple(inputs["query_ids"][group.query][mask[group.query].bool()].tolist())
        for block in group.blocks:
            everything = expected[block.block]
            weights = torch.cat([everything.mean(0, keepdim=True), everything])
            keys = [*here, *tokens]
            looks = torch.stack([weights[:, starts[i] : starts[i + 1]][:, :, keys].mean(1) for i in images], 1)
            of_images = [weights[:, here, starts[i] : starts[i + 1]].sum(2, keepdim=True) for i in images]
            shares = torch.cat([*of_images, weights[:, here][:, :, tokens]], 2)
            torch.testing.assert_close(block.looks, looks, rtol=0, atol=ATOL)
            torch.testing.assert_close(block.shares, shares, rtol=0, atol=ATOL)
            torch.testing.assert_close(block.chosen, weights[:, chosen][:, :, keys], rtol=0, atol=ATOL)
            for rows in (block.looks, block.shares, block.chosen):
                assert (rows.sum(-1) - 1).abs().max() < 1e-5 if rows.numel() else rows.shape[1] == 0
            assert block.heads == (None, 0, 1)
    return found


@pytest.mark.parametrize("point", ["all", "early", "late", "late2", "late3", "sparse"])
def test_every_integration_point_equals_the_slow_implementation(build_model, inputs, point):
    model = build_model(integration_point=point, fullatt_block_indexes=[0, 3])
    found = check(model, inputs)
    aware = sorted(model.config.vision_config.query_aware_blocks())
    assert [block.block for block in found[0].blocks] == aware
    assert all(block.kind == "group" for block in found[0].blocks)
    assert found[1].blocks[-1].shares[:, :, 3:].min() > 0  # the query is seen by every patch


@pytest.mark.parametrize("window_size", [28, 56, 112])
def test_blocks_of_windows_and_frames_look_no_further_and_at_no_word(build_model, inputs, window_size):
    model = build_model(integration_point="late2", fullatt_block_indexes=[1], window_size=window_size)
    found = check(model, inputs, blocks="all")
    assert [block.kind for block in found[0].blocks] == ["window", "frame", "window", "group"]
    for block in found[1].blocks[:3]:
        assert block.shares[:, :, 3:].abs().max() == 0
        assert block.shares[:, :16, 0].sub(1).abs().max() < 1e-5  # the first image looks at itself only


def test_small_pieces_give_the_same(build_model, inputs, monkeypatch):
    model = build_model()
    whole = look(model, inputs, heads=[1], patches=CHOSEN)
    monkeypatch.setattr(attention_maps, "MAX_SCORES", 500)
    pieces = look(model, inputs, heads=[1], patches=CHOSEN)
    for a, b in zip(whole, pieces, strict=True):
        for x, y in zip(a.blocks, b.blocks, strict=True):
            for name in ("looks", "shares", "chosen"):
                torch.testing.assert_close(getattr(x, name), getattr(y, name), rtol=0, atol=1e-6)


def test_without_query_inputs_every_image_is_its_own_group_without_words(tiny_model, inputs):
    found = look(tiny_model, {name: inputs[name] for name in ("pixel_values", "image_grid_thw")})
    assert [group.grids for group in found] == [(grid,) for grid in GRIDS]
    assert all(group.token_ids == () for group in found)
    assert all(block.shares.shape[2] == 1 for group in found for block in group.blocks)


def test_features_are_those_of_the_model_and_no_hook_stays(tiny_model, inputs):
    found = look(tiny_model, inputs)
    with torch.no_grad():
        plain = compat.pooled(tiny_model.model.get_image_features(**inputs))
    assert [torch.equal(a, b) for a, b in zip((f for g in found for f in g.features), plain, strict=True)] == [True] * 5
    with pytest.raises(RuntimeError):
        look(tiny_model, {**inputs, "pixel_values": inputs["pixel_values"][:, :5]} | {"heads": torch.zeros(1)})
    assert not any(block.attn._forward_pre_hooks for block in tiny_model.model.visual.blocks)


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that an operation gives."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        self.elements = max(self.elements, *made, 0)
        return out


def test_attention_of_all_pairs_of_patches_never_exists(tiny_model, monkeypatch):
    """1,600 patches in one group: all pairs of all heads would be 5 million numbers."""
    monkeypatch.setattr(attention_maps, "MAX_SCORES", 40_000)
    grids, heads = torch.tensor([(1, 40, 20), (1, 40, 20)]), 2
    patches = int(grids.prod(1).sum())
    inputs = {
        "pixel_values": torch.randn(patches, 1176, generator=torch.Generator().manual_seed(1)),
        "image_grid_thw": grids,
        "query_ids": torch.tensor([[5, 6, 7]]),
        "images_per_query": torch.tensor([2]),
    }
    with Largest() as plain, torch.no_grad():
        tiny_model.model.get_image_features(**inputs)
    with Largest() as watched:
        look(tiny_model, inputs, heads="all", patches=[Patch(0, 0, 0)])
    assert watched.elements <= max(plain.elements, 40_000 + (heads + 1) * patches) < heads * patches**2 / 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blocks": [4]}, "block 4: the vision encoder has 4 blocks, numbered 0 to 3"),
        ({"blocks": [-1]}, "block -1: the vision encoder has 4 blocks, numbered 0 to 3"),
        ({"heads": [2]}, "head 2: the vision encoder has 2 heads, numbered 0 to 1"),
        ({"heads": "mean"}, "heads='mean': give numbers from 0 to 1, or 'all'"),
        ({"patches": [Patch(5, 0, 0)]}, "there are 5 images, numbered 0 to 4"),
        ({"patches": [Patch(1, 4, 0)]}, "image 1 has 4 rows of patches, numbered 0 to 3"),
        ({"patches": [Patch(1, 0, 4)]}, "image 1 has 4 columns of patches, numbered 0 to 3"),
        ({"patches": [Patch(1, 0, 0, 1)]}, "image 1 has 1 frames of patches, numbered 0 to 0"),
        ({"patches": [Patch(1, 0, 0)] * 2}, "one is named twice"),
    ],
)
def test_what_is_not_there_is_refused_with_both_numbers(tiny_model, inputs, options, message):
    with pytest.raises(AttentionError, match="^.*" + message.replace("(", r"\(")):
        look(tiny_model, inputs, **options)


def test_a_tower_without_query_aware_blocks_says_so_and_can_be_watched_by_number(build_model, inputs):
    model = build_model(integration_point=None)
    with pytest.raises(AttentionError, match="none of the 4 vision blocks is query-aware"):
        look(model, inputs)
    assert [block.kind for block in look(model, inputs, blocks=[1, 2])[0].blocks] == ["frame", "window"]


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ("the sign behind", ["the", "sign", "behind", "<|endoftext|>"]),
        ("路牌 a", ["路", "牌", "a", "<|endoftext|>"]),
        ("one", ["one", "<|endoftext|>"]),
    ],
)
def test_words_are_made_of_whole_tokens_each_in_one(processor, query, words):
    ids, _ = processor.tokenize_queries([query], padding="longest")
    found = words_of(processor.query_tokenizer, ids[0].tolist())
    assert [word for word, _ in found] == words
    assert [place for _, places in found for place in places] == list(range(ids.shape[1]))


# ---------------------------------------------------------------------- pictures


@pytest.fixture(scope="module")
def inquiry():
    images = tuple(Image.effect_noise(size, 60).convert("RGB") for size in ((84, 56), (56, 56)))
    return Inquiry(images, "blue card", (1, 2))


def test_a_picture_holds_the_numbers_to_8_bits(tiny_model, processor, inquiry):
    maps = look(tiny_model, processor.encode_inquiries([inquiry]), patches=[Patch(1, 2, 3)])[0]
    picture = picture_of(maps, inquiry, processor)
    assert [layer.title for layer in picture.layers] == ["mean of blocks", "block 2", "block 3"]
    layer, block = picture.layers[1], maps.blocks[0]
    keys = 24 + 16 + len(maps.token_ids)
    query = layer.heat("query")
    expected = block.shares[0, 24:, 2:].sum(1).view(4, 4).numpy().clip(max=query.scale)
    assert abs(query.values(1) - expected).max() <= query.scale / 255
    chosen = layer.heat("patch 0")
    expected = (block.chosen[0, 0, :24] * keys).view(4, 6).numpy().clip(max=chosen.scale)
    assert abs(chosen.values(0) - expected).max() <= chosen.scale / 255
    assert [len(row) for row in layer.mass] == [3, 3]
    assert all(sum(row) == pytest.approx(1, abs=1e-5) for row in layer.mass)
    assert sum(layer.words) == pytest.approx(float(block.shares[0, :, 2:].sum(1).mean()), abs=1e-6)
    assert picture.words == ("blue", "card", "<|endoftext|>")
    with pytest.raises(AttentionError, match="mean of blocks has no heat 'region 7'"):
        draw_attention(picture, show="region 7")
    with pytest.raises(AttentionError, match="both must come from the same images"):
        picture_of(maps, replace(inquiry, images=inquiry.images[::-1]), processor)


def test_the_same_query_changes_nothing_and_another_one_features_and_attention(tiny_model, processor, inquiry):
    same = attention_of(tiny_model, processor, inquiry, inquiry.query)
    assert same.feature_change == (0, 0)
    assert same.moved == (0, 0, 0)
    assert same.features.highest < 1e-6
    other = attention_of(tiny_model, processor, inquiry, "")
    assert min(other.feature_change) > 1e-3
    assert min(other.moved) > 1e-3
    assert other.after.words == ()
    layer = other.layers[1]
    assert all(abs(sum(row)) < 1e-5 for row in layer.mass)
    assert layer.heat("query").values(0).max() <= 0  # without a query nothing looks at it any more
    a, b = (look(tiny_model, processor.encode_inquiries([replace(inquiry, query=q)]))[0] for q in ("blue card", ""))
    cosine = torch.nn.functional.cosine_similarity(a.features[0], b.features[0], dim=-1)
    expected = (1 - cosine).view(2, 3).numpy().clip(max=other.features.scale)
    assert abs(other.features.values(0) - expected).max() <= other.features.scale / 255
    one = look(tiny_model, processor.encode_inquiries([inquiry]), blocks=[3])[0]
    with pytest.raises(AttentionError, match="change the query only"):
        compare_queries(one, b, (other.before, other.after))


def test_json_gives_the_same_figure(tiny_model, processor, inquiry):
    for other, kind in ((None, AttentionPicture), ("red", QueryDifference)):
        drawn = attention_of(tiny_model, processor, inquiry, other, heads=[1])
        again = kind.from_json(json.loads(json.dumps(drawn.to_json(include_images=True))))
        assert draw_attention(again, scale=0.5).tobytes() == draw_attention(drawn, scale=0.5).tobytes()
        with pytest.raises(AttentionError, match="the images were left out"):
            draw_attention(kind.from_json(drawn.to_json()))


def test_a_hot_patch_is_bright_and_a_cold_one_dark_where_it_lies():
    heat = Heat.of("received", "times even", [np.array([[0.0, 0.0], [0.0, 8.0]])])
    drawn = overlay(Image.new("RGB", (56, 56), "grey"), heat, 0).convert("L")
    assert drawn.getpixel((45, 45)) > 2 * drawn.getpixel((10, 10))
    signed = Heat.of("received", "times even", [np.array([[-1.0, 0.0], [0.0, 1.0]])], signed=True)
    pixels = overlay(Image.new("RGB", (56, 56), "grey"), signed, 0)
    (red, _, blue), (more, _, less) = pixels.getpixel((10, 10)), pixels.getpixel((45, 45))
    assert blue > red
    assert more > less


# ---------------------------------------------------------------------- without a conversation, and the command


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.png"
    Image.linear_gradient("L").resize((168, 112)).convert("RGB").save(path)
    return path


def test_zoom_makes_the_inquiry_of_a_conversation(tiny_model, processor, photo):
    chat = VilavtChat(tiny_model, processor)
    chat.settings = replace(chat.settings, limits=replace(chat.settings.limits, max_turns=1))
    found = zoom(chat.settings, [photo], [Region(0, (0, 0, 56, 56)), Region(0, (56, 28, 112, 84))])
    assert found.image_indices == (1, 2)
    assert [image.size for image in found.images] == [(112, 112)] * 2
    with pytest.raises(AttentionError, match="leaves image 0, which is 168 x 112 px"):
        zoom(chat.settings, [photo], [Region(0, (0, 0, 56, 560))])


def run(checkpoint, photo, *arguments):
    return runner.invoke(
        app, ["attention", "--model", str(checkpoint), "--image", str(photo), "--device", "cpu", *arguments]
    )


REGION = ("--region", "0,0,56,56", "--region", "0:56,28,112,84")


def test_the_command_draws_regions_and_says_what_it_drew(tiny_checkpoint, photo, tmp_path):
    out = tmp_path / "one.png"
    chosen = ("--query", "blue", "--patch", "1:0,1", "--head", "1")
    result = run(tiny_checkpoint, photo, *REGION, *chosen, "--out", str(out), "--json")
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert f": {out}" in result.stderr
    assert data["query_aware_blocks"] == [2, 3]
    picture = AttentionPicture.from_json(data["calls"][0])
    assert picture.captions[1] == "region 1: [56, 28, 112, 84] of image 0"
    assert picture.patches == ((1, 0, 1),)
    assert [layer.head for layer in picture.layers] == [None, None, 1, None, 1]
    with Image.open(out) as drawn:
        assert json.loads(drawn.text["vilavt"])["fingerprint"] == data["fingerprint"]


def test_the_command_compares_two_queries(tiny_checkpoint, photo, tmp_path):
    out = tmp_path / "folder"
    queries = ("--query", "blue", "--query", "", "--block", "3")
    result = run(tiny_checkpoint, photo, *REGION, *queries, "--out", str(out), "--json")
    assert result.exit_code == 0, result.output
    change = QueryDifference.from_json(json.loads(result.stdout)["calls"][0])
    assert (change.before.query, change.after.query) == ("blue", "")
    assert [layer.block for layer in change.layers] == [3]
    assert Image.open(out / "zoom-1.png").width > 300


def test_the_command_draws_the_zoom_calls_of_a_conversation(tiny_checkpoint, photo, tmp_path, monkeypatch):
    from vilavt_core.protocol import ToolCall, format_turn
    from vilavt_core.results import Intervention, Sample

    forced = format_turn(ToolCall((Region(0, (0, 0, 56, 56)),), "the box"))

    def ask(chat, images, question):
        chat.settings = replace(chat.settings, limits=replace(chat.settings.limits, max_new_tokens_per_turn=80))
        hook = Intervention(forced_turns=lambda sample, turn: forced if turn == 0 else None)
        return chat.ask_many([Sample(images, question)], intervention=hook)[0]

    plain = run(tiny_checkpoint, photo, "--question", "what?", "--out", str(tmp_path / "none.png"))
    assert plain.exit_code == 3
    assert "without a zoom call" in plain.output
    monkeypatch.setattr(VilavtChat, "ask", ask)
    result = run(tiny_checkpoint, photo, "--question", "what?", "--out", str(tmp_path / "calls"), "--json")
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert [AttentionPicture.from_json(call).query for call in data["calls"]] == ["the box"]
    assert data["conversation"]["question"] == "what?"
    assert (tmp_path / "calls" / "zoom-1.png").is_file()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "--question"),
        (["--question", "x", *REGION], 2, "--question"),
        ([*REGION], 2, "--query"),
        ([*REGION, "--query", "a", "--query", "b", "--query", "c"], 2, "3 given"),
        (["--region", "1,2,3", "--query", "a"], 2, "write"),
        ([*REGION, "--query", "a", "--patch", "1"], 2, "write"),
        ([*REGION, "--query", "a", "--block", "x"], 2, "numbers"),
        ([*REGION, "--query", "a", "--out", "a.jpg"], 2, ".png"),
        ([*REGION, "--query", "a", "--query", "b", "--show", "region 0"], 2, "received"),
        ([*REGION, "--query", "a", "--block", "7"], 1, "block 7: the vision encoder has 4 blocks, numbered 0 to 3"),
        ([*REGION, "--query", "a", "--head", "7"], 1, "head 7: the vision encoder has 2 heads, numbered 0 to 1"),
        ([*REGION, "--query", "a", "--show", "region 2"], 1, "has no heat 'region 2'"),
        (["--region", "0,0,999,56", "--query", "a"], 1, "leaves image 0, which is 168 x 112 px"),
        ([*REGION, "--query", "a", "--model", "/no/such"], 1, "CheckpointError: /no/such: no such folder"),
    ],
)
def test_mistakes_are_named_and_nothing_is_written(
    tiny_checkpoint, photo, tmp_path, monkeypatch, capsys, arguments, code, message
):
    monkeypatch.chdir(tmp_path)
    given = ["--model", str(tiny_checkpoint), "--image", str(photo), "--device", "cpu"]
    monkeypatch.setattr("sys.argv", ["vilavt", "attention", *given, *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == code
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("vilavt-attention*"))


# ---------------------------------------------------------------------- in results, traces and the web app


@pytest.fixture(scope="module")
def chat():
    return VilavtChat.from_pretrained(EXAMPLES / "vilavt-tiny", device="cpu", dtype="float32")


def asked(chat, number: int) -> ChatResult:
    return chat.ask(ASKED[number].sources, ASKED[number].question)


@pytest.fixture(scope="module")
def watched(chat):
    """Two zooms, one into the crop of the other; and one zoom of two regions."""
    return [with_attention(chat, asked(chat, number)) for number in (0, 2)]


def maps_of(picture: AttentionPicture) -> list:
    return [layer.to_json() for layer in picture.layers]


def test_the_attention_of_a_result_is_that_of_each_of_its_zooms_and_json_carries_it(chat, watched):
    assert [[one.image_indices for one in result.attention] for result in watched] == [[(1,), (2,)], [(1, 2)]]
    for result in watched:
        calls = [turn.action.query for turn in result.turns[:-1]]
        assert [one.query for one in result.attention] == calls
        for picture, inquiry in zip(result.attention, zooms(result), strict=True):
            assert maps_of(picture) == maps_of(attention_of(chat.model, chat.processor, inquiry))
        told = json.loads(json.dumps(result.to_json()))
        again = ChatResult.from_json(told)
        assert again.to_json()["attention"] == told["attention"]
        assert [one.captions for one in again.attention] == [one.captions for one in result.attention]
        assert with_attention(chat, again) is again  # what has it is not measured again
    assert "attention" not in asked(chat, 0).to_json()


def test_of_a_follow_up_only_its_own_zooms_are_measured(chat):
    talk = chat.conversation(ASKED[0].files[0])
    first = talk.ask(ASKED[0].question)
    second = talk.ask("Which digit is on the purple card?")
    talk.close()
    for result in (first, second):
        shown = [index for turn in result.turns for index in turn.image_indices]
        assert [index for one in with_attention(chat, result).attention for index in one.image_indices] == shown
    assert set(first.turns[0].image_indices).isdisjoint(second.turns[0].image_indices)


def test_what_gives_no_attention_says_so(chat, build_model, processor):
    class Server:
        pass

    with pytest.raises(AttentionError, match="a server gives no attention; load the checkpoint here"):
        with_attention(Server(), asked(chat, 0))
    with pytest.raises(AttentionError, match="its images are not here"):
        with_attention(chat, replace(asked(chat, 0), record=None))
    blind = VilavtChat(build_model(integration_point=None), processor)
    with pytest.raises(AttentionError, match="no vision block of this checkpoint is query-aware"):
        require_watched(blind)


def over(page: str) -> list[tuple[int, Image.Image]]:
    """The maps that a page can lay over its crops, with their numbers."""
    found = re.findall(r'<img class="heat" data-heat="(\d+)"[^>]*? src="data:image/png;base64,([^"]+)"', page)
    return [(int(number), Image.open(io.BytesIO(base64.b64decode(data)))) for number, data in found]


def test_a_page_has_every_map_over_its_crop_in_16_steps_and_a_name_for_each(watched, tmp_path):
    for result in watched:
        page = write_html(result, tmp_path / "page.html").read_text(encoding="utf-8")
        expected = [
            heat.maps[place]
            for picture in result.attention
            for place in range(len(picture.sizes))
            for layer in picture.layers
            for heat in layer.heats
        ]
        drawn = over(page)
        assert len(drawn) == len(expected)
        for (_, image), heat in zip(drawn, expected, strict=True):
            levels = np.asarray(image, dtype=np.float64) / (TINTS - 1)
            assert levels.shape == heat.shape
            assert abs(levels - heat / 255).max() <= 0.5 / (TINTS - 1) + 1e-9
        options = {int(number) for number in re.findall(r'<option value="(\d+)">', page)}
        assert options == {number for number, _ in drawn}
        assert page.count('<div class="attention">') == len(result.attention)
        assert 'optgroup label="mean of blocks"' in page
        assert "looks at the query (up to" in page
    plain = write_html(replace(watched[0], attention=()), tmp_path / "plain.html").read_text(encoding="utf-8")
    assert 'class="heat"' not in plain
    assert '<div class="attention">' not in plain


def test_a_page_as_read_from_json_has_the_same_maps(watched, tmp_path):
    again = ChatResult.from_json(json.loads(json.dumps(watched[1].to_json())))
    pages = [write_html(one, tmp_path / "page.html").read_text(encoding="utf-8") for one in (watched[1], again)]
    first, second = ([(n, image.tobytes()) for n, image in over(page)] for page in pages)
    assert first == second != []


def test_a_map_over_a_picture_in_grey_is_the_overlay_and_takes_half_a_byte_per_patch():
    levels = np.random.default_rng(0).integers(TINTS, size=(48, 64)).astype(np.uint8)
    heat = Heat("received", "times even", 1.0, 1.0, (levels * (255 // (TINTS - 1)),))
    image = Image.effect_noise((64 * 14, 48 * 14), 60).convert("RGB")
    laid = image.convert("L").convert("RGBA")
    laid.alpha_composite(tint(heat, 0).convert("RGBA").resize(image.size, Image.Resampling.NEAREST))
    apart = np.abs(np.asarray(laid.convert("RGB"), dtype=float) - np.asarray(overlay(image, heat, 0), dtype=float))
    assert apart.max() <= 2  # each of them rounds
    buffer = io.BytesIO()
    tint(heat, 0).save(buffer, "PNG")
    assert len(buffer.getvalue()) <= 64 * 48 / 2 + 300


@pytest.mark.parametrize(
    "broken",
    [
        {"captions": ["one", "too", "many"]},
        {"sizes": [[56, 56]] * 5},
        {"words": ["a"] * 40},
        {"image_indices": ["x"]},
        {"image_indices": 3},
        {"layers": [{"block": "<b>", "head": None, "mass": [], "words": [], "heats": []}]},
    ],
)
def test_attention_that_no_measuring_gives_is_refused(watched, broken):
    told = watched[1].attention[0].to_json()
    with pytest.raises((ValueError, TypeError)):
        AttentionPicture.from_json(told | broken)


@pytest.mark.parametrize("size", [(1024, 1024), None])
def test_a_map_that_is_too_large_or_no_picture_is_refused(size):
    buffer = io.BytesIO(b"no picture")
    if size:
        Image.new("L", size).save(buffer, "PNG")
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    heat = {"name": "received", "unit": "share", "scale": 1.0, "highest": 1.0, "signed": False}
    with pytest.raises(ValueError, match=r"at most 262144 pixels|cannot be read"):
        Heat.from_json({**heat, "maps": [url]})


def test_ask_and_demo_record_attention_when_they_are_told_to(chat, tmp_path):
    (picture,), question = ASKED[0].files, ASKED[0].question
    base = ["ask", question, "--model", str(EXAMPLES / "vilavt-tiny"), "--image", str(picture), "--device", "cpu"]
    trace = tmp_path / "t.html"
    done = runner.invoke(app, [*base, "--trace", str(trace), "--json", "--attention-maps"])
    assert done.exit_code == 0, done.output
    result = ChatResult.from_json(json.loads(done.stdout))
    assert [one.image_indices for one in result.attention] == [(1,), (2,)]
    assert len(over(trace.read_text(encoding="utf-8"))) == sum(
        len(layer.heats) for one in result.attention for layer in one.layers
    )
    done = runner.invoke(app, ["demo", "--out", str(trace), "--device", "cpu", "--attention-maps"])
    assert done.exit_code == 0, done.output
    assert trace.read_text(encoding="utf-8").count('<div class="attention">') == sum(
        len(zooms(asked(chat, number))) for number in range(len(ASKED))
    )


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["ask", "what?", "--image", "p.png", "--model", "CKPT"], 2, "pass --trace or"),
        (["ask", "what?", "--image", "p.png", "--model", "http://127.0.0.1:9/v1", "--json"], 1, "gives no attention"),
        (["chat", "--model", "http://127.0.0.1:9/v1"], 1, "gives no attention"),
    ],
)
def test_attention_that_nothing_shows_or_nothing_gives_is_refused_before_anything_is_asked(
    monkeypatch, capsys, arguments, code, message
):
    monkeypatch.setattr("sys.argv", ["vilavt", *arguments, "--attention-maps"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == code
    assert message in capsys.readouterr().err


def test_the_chat_writes_traces_with_attention_when_it_is_told_to(chat, tmp_path):
    page, data = tmp_path / "t.html", tmp_path / "t.json"
    for wanted in (False, True):
        prompt = Prompt(Console(quiet=True), Dialogue(chat), None, None, None, wanted)
        prompt.image(str(ASKED[0].files[0]))
        prompt.ask(ASKED[0].question)
        prompt.trace(str(page))
        prompt.trace(str(data))
        assert bool(over(page.read_text(encoding="utf-8"))) == wanted
        assert ("attention" in json.loads(data.read_text())[0]) == wanted


def test_a_dialogue_is_watched_afterwards_and_the_desk_lays_the_maps_over_the_crops_it_shows(chat):
    desk = Desk(chat)
    for number in (0, 2):  # the second question begins anew, its crops have the numbers of the first one's
        desk.put(ASKED[number].question, [ASKED[number].files[0]], Wishes(seed=number))
        for _ in desk.answer():
            pass
    assert desk.watchable
    assert "vv-heat" not in desk.thread
    desk.watch()
    assert not desk.watchable
    pictures = [one for result in desk.dialogue.results for one in result.attention]
    zoomed = [html for html in desk.shown if 'class="vv-zoom"' in html]
    assert len(zoomed) == len(pictures) == 3
    for html, picture in zip(zoomed, pictures, strict=True):
        shown = re.findall(r'<img class="vv-heat" data-heat="\d+" alt="" src="data:image/png;base64,([^"]+)"', html)
        heats = picture.layers[0].heats
        drawn = [Image.open(io.BytesIO(base64.b64decode(data))).tobytes() for data in shown]
        assert drawn == [tint(heat, place).tobytes() for place in range(len(picture.sizes)) for heat in heats]
    assert len({re.search(r'id="(vv-zoom-\d+)"', html)[1] for html in zoomed}) == 3
    assert [len(result["attention"]) for result in json.loads(desk.trace("json"))] == [2, 1]


def test_the_zooms_of_a_question_that_was_stopped_are_not_taken_for_those_of_the_next(chat):
    desk = Desk(chat)
    picture = ASKED[0].files[0]
    desk.put(ASKED[0].question, [picture], Wishes())
    for _ in desk.answer():
        if any("vv-zoom" in html for html in desk.shown):
            desk.dialogue.stop()
    assert not desk.watchable
    desk.put(ASKED[0].question, [], Wishes())
    for _ in desk.answer():
        pass
    desk.watch()
    assert ["vv-heat" in html for html in desk.shown if 'class="vv-zoom"' in html] == [False, True, True]


def test_a_backend_without_attention_is_told_on_the_page(chat):
    class Blind:
        provenance = chat.provenance

    desk = Desk(Blind())
    desk.watch()
    assert "gives no attention" in desk.shown[-1]
    with pytest.raises(AttentionError):
        Dialogue(Blind()).watch()
