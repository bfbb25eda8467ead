"""Writes tests/golden/saved_by/VERSION with the installed transformers: run once per supported end of the range.

    python tests/golden/make_saved_by.py

Each folder is a complete checkpoint (model and processor) and, in expected/, inputs and the logits they gave.
"""

import sys
from pathlib import Path

import torch
import transformers
from PIL import Image
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parent.parent / "shared"))
from family import build_tiny_model, byte_tokenizer

from vilavt_hf import VilavtProcessor, compat

TEXT = "".join(chr(c) for c in range(32, 127)) + " Größe <|im_end|>"


def main() -> None:
    folder = Path(__file__).parent / "saved_by" / transformers.__version__
    torch.set_num_threads(1)
    tokenizer = byte_tokenizer()
    model = build_tiny_model(tokenizer, seed=3).to(torch.bfloat16)
    image_processor = compat.PilImageProcessor(min_pixels=28 * 28 * 4, max_pixels=28 * 28 * 256)
    processor = VilavtProcessor(image_processor, tokenizer, query_tokenizer=tokenizer)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    model = type(model).from_pretrained(folder, dtype=torch.float32).eval()  # .float() would keep rounded buffers
    images = [
        Image.effect_noise((84, 112), 80).convert("RGB"),
        Image.linear_gradient("L").convert("RGB").resize((56, 84)),
    ]
    marker = "<|vision_start|><|image_pad|><|vision_end|>"
    inputs = processor(
        images=images, text=f"look {marker} and {marker} now", queries=["", "what?"], return_tensors="pt"
    )
    with torch.no_grad():
        logits = model(**inputs).logits
    (folder / "expected").mkdir(exist_ok=True)
    extra = {
        "text_ids": torch.tensor(tokenizer(TEXT)["input_ids"]),
        "query_row": processor.tokenize_queries(["the red card"])[0],
    }
    save_file({**inputs, "logits": logits, **extra}, folder / "expected" / "logits.safetensors")


if __name__ == "__main__":
    main()
