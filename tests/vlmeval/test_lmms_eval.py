"""lmms-eval finds the model through its entry points, and scores what ``vilavt tiny eval`` scores."""

import ast
import csv
import json

TASK = """
task: vilavt_tiny
dataset_path: json
dataset_kwargs: {data_files: {test: QUESTIONS}}
test_split: test
output_type: generate_until
doc_to_visual: !function pictures.load
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
LOAD = """
from PIL import Image

def load(row):
    return [Image.open(path).convert("RGB") for path in row["images"]]
"""


def files(cell):
    """A path, or VLMEvalKit's list of them."""
    return ast.literal_eval(cell) if cell.startswith("[") else [cell]


def test_the_score_is_that_of_vilavt_tiny_eval(toolkit, reference, tmp_path):
    table = csv.DictReader((toolkit.data / "VilavtTinyHeldout.tsv").open(), delimiter="\t")
    rows = [{"images": files(r["image_path"]), "question": r["question"], "answer": r[r["answer"]]} for r in table]
    (tmp_path / "questions.json").write_text(json.dumps(rows))
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "vilavt_tiny.yaml").write_text(TASK.replace("QUESTIONS", str(tmp_path / "questions.json")))
    (tasks / "pictures.py").write_text(LOAD)
    arguments = ("--tasks", "vilavt_tiny", "--include_path", "tasks", "--output_path", "out", "--batch_size", "1")
    model = ("--model", "vilavt", "--model_args", "checkpoint=tiny,name=tiny")
    toolkit.run(tmp_path, "-m", "lmms_eval", "eval", *model, *arguments, HF_HOME=str(tmp_path / "home"))
    results = next((tmp_path / "out").rglob("*_results.json"), None)
    assert results, toolkit.log(tmp_path)  # its exit code says nothing
    score = json.loads(results.read_text())["results"]["vilavt_tiny"]["exact_match,none"]
    assert score == sum(right for _, right in reference) / len(reference)
    traces = toolkit.rows(tmp_path, "tiny", "vilavt_tiny")
    assert sorted(int(row["sample_id"]) for row in traces) == list(range(len(reference)))
    assert {row["error"] for row in traces} == {None}
