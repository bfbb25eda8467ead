"""A ViLaVT of real size with random weights, from headers to answers: seconds and memory of every step.

    python benchmarks/real_size.py --shape 3b [--steps inspect,convert,doctor,load,encode,prefill,decode] [--json FILE]

Writes a sharded checkpoint in bf16 shard by shard (3b: 8.8 GB, 7b: 17.9 GB; as much again while it is converted), then
does each step in a process of its own: `vilavt inspect`, `convert`, `doctor --plan`; loading; and a conversation about
an image of 1036 x 756 with two crops, whose words are forced. Peaks are the high-water mark of resident memory, and
stand beside what the plan says plus what the imports took before.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from convert_memory import measure
from PIL import Image
from random_checkpoint import write_random
from rich.console import Console
from rich.table import Table

from vilavt_core.checkpoint.companions import IMAGE_PROCESSOR, bring_companions
from vilavt_core.checkpoint.writing import write_json
from vilavt_core.conversation import Inquiry
from vilavt_core.memory import SHAPES
from vilavt_core.protocol import Answer, Region, ToolCall, format_turn

TINY = Path(__file__).parents[1] / "examples" / "vilavt-tiny"
STEPS = ("inspect", "convert", "doctor", "load", "encode", "prefill", "decode")
PICTURE, CROPS = (1036, 756), 2
SMALL_PICTURE = (168, 112)
TEXT_TOKENS = 700
"""Of the conversation, that are planned with."""
MB = 1 << 20
HERE = Path(__file__).resolve().parent
COLUMNS = {"cpu_seconds": 1, "peak_mb": 0, "planned_mb": 0, "measured / planned": 2}
"""Figures of a step, and their decimals."""


def small(shape: dict[str, Any]) -> dict[str, Any]:
    """The same configuration with the widths and depths of the tiny model."""
    return shape | {key: _tiny()[key] for key in ("text_config", "vision_config", "text_encoder_config")}


def _tiny() -> dict[str, Any]:
    return json.loads((TINY / "config.json").read_text(encoding="utf-8"))


def generate(folder: Path, shape: dict[str, Any], picture: tuple[int, int], shard_bytes: int) -> None:
    """Write the checkpoint, tensors named as the module's, with the tiny model's tokenizer."""
    config = {
        **{key: _tiny()[key] for key in _tiny() if key.endswith("_token_id")},
        **shape,
        "architectures": ["VilavtForConditionalGeneration"],
        "dtype": "bfloat16",
    }
    write_random(folder, config, encoder=config["text_encoder_config"], shard_bytes=shard_bytes, nested=True)
    bring_companions(folder, [TINY])
    pixels = picture[0] * picture[1]
    images = json.loads((folder / IMAGE_PROCESSOR).read_text(encoding="utf-8"))
    images |= {"max_pixels": pixels, "size": {"longest_edge": pixels, "shortest_edge": 3136}}
    write_json(folder / IMAGE_PROCESSOR, images)
    write_json(folder / "vilavt_chat.json", {"preset": "default", "limits": {"max_pixels": pixels}})


def converse(
    folder: str, picture: tuple[int, int], crops: int, until: str, loaded: Callable[[], float]
) -> dict[str, Any]:
    """One conversation in this process: an image, crops of it, an answer; all words are forced.

    Args:
        folder: checkpoint.
        picture: width and height.
        crops: of one call.
        until: ``load``: nothing of it; ``encode``: its image alone; ``prefill``: up to the first token; ``decode``:
            all of it.
        loaded: called when the weights are there.

    Returns:
        CPU seconds by phase, and how much was computed.
    """
    import torch

    from vilavt_hf.chat import VilavtChat

    torch.set_num_threads(1)
    began = time.process_time()
    chat = VilavtChat.from_pretrained(folder, device="cpu")
    found = {"load_seconds": time.process_time() - began, "loaded_mb": loaded()}
    if until == "load":
        return found
    width, height = picture
    shown = Image.effect_noise(picture, 60).convert("RGB")
    if until == "encode":
        began = time.process_time()
        with torch.inference_mode():
            inputs = chat.processor.encode_inquiries([Inquiry((shown,), "", (0,))])
            chat.model.model.get_image_features(**inputs)
        return found | {"encode": time.process_time() - began, "patches": len(inputs["pixel_values"])}
    region = Region(0, (0, 0, width // 2, height // 2))
    says = [format_turn(ToolCall((region,) * crops, "what is here?")), format_turn(Answer("nothing"))]
    tokenizer = chat.processor.tokenizer
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    words = [token for text in says for token in [*tokenizer(text, add_special_tokens=False)["input_ids"], stop]]
    forced = iter(words if until == "decode" else [stop])
    chat.choose = lambda rows, logits: torch.tensor([next(forced)])
    chat.clock = time.process_time
    result = chat.ask_many([([shown], "What is in the image?")])[0]
    if result.error is not None:
        raise result.error
    if until == "decode" and result.answer != "nothing":
        raise SystemExit(f"the forced conversation ended with {result.finish}: {result.answer!r}")
    spent, work = chat.timings, result.work
    return found | {
        "encode": spent.encode,
        "prefill": spent.prefill,
        "decode": spent.decode,
        "patches": work.patches_encoded,
        "prefilled": work.tokens_prefilled,
        "decoded": work.tokens_decoded,
    }


def run(root: Path, name: str, steps: Sequence[str], tiny: bool, written: Path | None = None) -> dict[str, Any]:
    """Generate, unless it was `written` before, and do the steps in order.

    Returns:
        ``steps``: CPU and wall seconds, peak and planned MB by step.
    """
    shape, picture = (small(SHAPES[name]), SMALL_PICTURE) if tiny else (SHAPES[name], PICTURE)
    source, checkpoint = written or root / "written", root / "converted"
    if written is None:
        began = time.perf_counter()
        generate(source, shape, picture, shard_bytes=4 << 20 if tiny else 2 << 30)
        print(f"wrote it in {time.perf_counter() - began:.0f} s")
    size = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    figures: dict[str, Any] = {"shape": name, "small": tiny, "bytes": size, "steps": {}}
    rows = figures["steps"]
    command = "from typer.testing import CliRunner; from vilavt_core.cli import app"
    talk = ["--picture", f"{picture[0]}x{picture[1]}", "--crops", str(CROPS), "--text-tokens", str(TEXT_TOKENS)]
    if "inspect" in steps:
        rows["inspect"] = _command(command, ["inspect", str(source)])
    if "convert" in steps:
        rows["convert"] = _command(command, ["convert", str(source), str(checkpoint)])
        if written is None:
            shutil.rmtree(source)
    else:
        checkpoint = source
    planned: dict[str, Any] = {}
    if wants := [step for step in steps if step in ("doctor", "load", "encode", "prefill", "decode")]:
        rows["doctor"] = _command(command, ["doctor", "--plan", "--model", str(checkpoint), *talk, "--json"])
        planned = json.loads(rows["doctor"].pop("output"))["memory"]["asked"]
        figures["planned"] = planned
    if until := [step for step in wants if step != "doctor"]:
        code = f"more = real_size.converse(sys.argv[1], {picture}, {CROPS}, {until[-1]!r}, peak)"
        imports = f"sys.path.insert(0, {str(HERE)!r}); import real_size, vilavt_hf.chat"
        found = measure(imports, code, checkpoint)
        before = found["imported_mb"]
        rows["load"] = {
            "cpu_seconds": found["load_seconds"],
            "peak_mb": found["loaded_mb"],
            "planned_mb": before + planned["weights"] / MB,
        }
        for step in until:
            if step != "load":
                rows[step] = {"cpu_seconds": found[step]}
        if until[-1] != "load":
            rows[until[-1]] |= {"peak_mb": found["peak_mb"], "planned_mb": before + sum(planned.values()) / MB}
        figures["conversation"] = found
    for row in rows.values():
        if "planned_mb" in row:
            row["measured / planned"] = row["peak_mb"] / row["planned_mb"]
    return figures


def _command(imports: str, arguments: list[str]) -> dict[str, Any]:
    code = (
        f"done = CliRunner().invoke(app, {arguments!r}, catch_exceptions=False)\n"
        "assert done.exit_code == 0, done.output\n"
        "more = {'output': done.stdout}"
    )
    found = measure(imports, code)
    if arguments[0] != "doctor":
        del found["output"]
    return found


def show(figures: dict[str, Any]) -> None:
    """Print the table."""
    table = Table(title=f"{figures['shape']}: {figures['bytes'] / 1e9:.2f} GB of weights, one thread")
    for column in ("step", "CPU seconds", "peak MB", "planned MB", "measured / planned"):
        table.add_column(column, justify="left" if column == "step" else "right")
    for step, row in figures["steps"].items():
        cells = [f"{row[key]:,.{digits}f}" if key in row else "" for key, digits in COLUMNS.items()]
        table.add_row(step, *cells)
    Console().print(table)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=("3b", "7b"), required=True)
    parser.add_argument("--steps", default=",".join(STEPS), help=f"default: {','.join(STEPS)}")
    parser.add_argument("--checkpoint", type=Path, metavar="FOLDER", help="of that shape, instead of writing one")
    parser.add_argument("--small", action="store_true", help="widths and depths of the tiny model, for CI")
    parser.add_argument("--workdir", type=Path, help="where to write; default: the temporary folder")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    options = parser.parse_args()
    asked = options.steps.split(",")
    if unknown := set(asked) - set(STEPS):
        parser.error(f"--steps {','.join(sorted(unknown))}: choose from {', '.join(STEPS)}")
    root = Path(tempfile.mkdtemp(prefix="vilavt-real-size-", dir=options.workdir))
    try:
        steps = [step for step in STEPS if step in asked]
        figures = run(root, options.shape, steps, options.small, options.checkpoint)
    finally:
        shutil.rmtree(root)
    show(figures)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
