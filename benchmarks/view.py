"""How long `vilavt view` takes over a large run, and how large its index is.

    python benchmarks/view.py [--small] [--keep FOLDER] [--json FILE]

2,000 questions about 400 images of 1280 x 960, each with a zoom into two regions. Seconds are of the wall clock.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from vilavt_core.protocol import Answer, Region, ToolCall, format_turn
from vilavt_eval.browser import BrowsedRun, write_browser
from vilavt_eval.recordings import read_recordings

BOXES = ((100.0, 100.0, 400.0, 300.0), (600.0, 400.0, 900.0, 800.0))
WIDTH, HEIGHT = 1288, 952


def write_run(folder: Path, questions: int, pictures: int) -> Path:
    """A result file and its images."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for number in range(pictures):
        noise = Image.fromarray(rng.integers(0, 255, (24, 32, 3), dtype=np.uint8))
        noise.resize((1280, 960), Image.Resampling.BICUBIC).save(folder / f"{number}.jpg", quality=90)
    call = ToolCall(tuple(Region(0, box) for box in BOXES), "the two of them", "I look at both.")
    crops = [
        {
            "turn": 0,
            "index": index,
            "kind": "crop",
            "width": 616,
            "height": 420,
            "source": 0,
            "region": [box[0] / WIDTH, box[1] / HEIGHT, box[2] / WIDTH, box[3] / HEIGHT],
            "parent": 0,
            "box": box,
            "query": call.query,
        }
        for index, box in enumerate(BOXES, 1)
    ]
    path = folder / "results.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for number in range(questions):
            answer = "AB"[number % 3 == 0]
            row = {
                "question_id": number,
                "response": answer,
                "answer": "A",
                "problem_type": "multiple choice",
                "question": f"Which of the two is larger in scene {number}?",
                "images": [f"{number % pictures}.jpg"],
                "finish": "answer",
                "turns": [format_turn(call), format_turn(Answer(answer, "The first one."))],
                "turn_seconds": [0.5, 0.2],
                "shown": {"originals": [[WIDTH, HEIGHT]], "crops": crops},
            }
            file.write(json.dumps(row) + "\n")
    return path


def main() -> None:
    """Write, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="20 questions about 4 images")
    parser.add_argument("--keep", type=Path, help="write the pages here and keep them")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        path = write_run(folder / "run", *((20, 4) if options.small else (2000, 400)))
        begun = time.perf_counter()
        recordings = read_recordings(path)
        written = write_browser(folder / "pages", [BrowsedRun("run", [(recordings, [path.parent])])], title="", date="")
        figures = {
            "pages": written.pages,
            "seconds": time.perf_counter() - begun,
            "index_bytes": written.index.stat().st_size,
            "page_bytes": sum(page.stat().st_size for page in (folder / "pages" / "pages").iterdir()) / written.pages,
            "missing": len(written.missing),
        }
    print(json.dumps(figures, indent=1))
    if options.json is not None:
        options.json.write_text(json.dumps(figures), encoding="utf-8")


if __name__ == "__main__":
    main()
