"""An upstream checkout, named by ``VLMEVALKIT_HOME``: opt-in, as it is on no package index.

It must be importable with what `noxfile.py` installs and ``rouge_score``.
"""

import os

import pytest

HOME = os.environ.get("VLMEVALKIT_HOME")
pytestmark = pytest.mark.skipif(not HOME, reason="opt-in: set VLMEVALKIT_HOME to a checkout of VLMEvalKit")

BENCHMARK, MODEL = "VilavtTinyHeldout", "ViLaVT-Tiny"


@pytest.mark.parametrize("start", [("run.py",), ("-m", "vilavt_vlmeval")], ids=["run.py", "wrapper"])
def test_a_checkout_scores_what_vilavt_tiny_eval_scores(toolkit, reference, tmp_path, start):
    arguments = (
        "--data",
        BENCHMARK,
        "--model",
        MODEL,
        "--judge",
        "exact_matching",
        "--work-dir",
        str(tmp_path / "out"),
    )
    settings = {"VILAVT_VLMEVAL_AUTOLOAD": "0"} if start[0] == "-m" else {}
    path = os.pathsep.join([HOME, toolkit.environment()["PYTHONPATH"]])
    script = (os.path.join(HOME, "run.py"),) if start[0] == "run.py" else start
    toolkit.run(tmp_path, *script, *arguments, PYTHONPATH=path, **settings)
    (table,) = (tmp_path / "out" / MODEL).glob(f"T*/{MODEL}_{BENCHMARK}_acc.csv")
    names, values = (line.replace('"', "").split(",") for line in table.read_text().splitlines())
    overall = float(dict(zip(names, values, strict=True))["Overall"])
    assert overall == pytest.approx(sum(right for _, right in reference) / len(reference), abs=1e-12)
    assert len(toolkit.rows(tmp_path, MODEL, BENCHMARK)) == len(reference)
