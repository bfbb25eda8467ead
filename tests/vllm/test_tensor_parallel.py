"""Two ranks give what one gives. Own processes: parallel workers are spawned, and find the plug-in by themselves."""

import contextlib
import json
import os
import signal
import subprocess
import sys

import pytest

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.nightly("four processes, each of which imports vLLM")]

SCRIPT = """
import json, sys
from PIL import Image

def main():
    from vllm import LLM, SamplingParams
    request = json.load(open(sys.argv[1]))
    llm = LLM(model=request["path"], dtype="float32", enforce_eager=True, max_model_len=1024, block_size=32,
              max_logprobs=-1, max_num_seqs=2, tensor_parallel_size=2, limit_mm_per_prompt={"image": 8}, seed=0)
    images = [Image.open(path) for path in request["images"]]
    params = SamplingParams(temperature=0, max_tokens=1, logprobs=-1, detokenize=False)
    prompt = {"prompt": request["prompt"], "multi_modal_data": {"image": images}}
    output = llm.generate([prompt], params, use_tqdm=False)[0]
    with open(request["out"], "w") as file:
        json.dump({token: entry.logprob for token, entry in output.outputs[0].logprobs[0].items()}, file)

if __name__ == "__main__":
    main()
"""


def test_two_tensor_parallel_ranks_equal_transformers(tiny, tools, pictures, tmp_path):
    import numpy as np

    prompt, images = tools.conversation(("the red button", 2)), pictures[:3]
    paths = [tmp_path / f"{i}.png" for i in range(len(images))]
    for image, path in zip(images, paths, strict=True):
        image.save(path)
    out, log = tmp_path / "logprobs.json", tmp_path / "log"
    request = {"path": str(tiny.path), "prompt": prompt, "images": [str(path) for path in paths], "out": str(out)}
    (tmp_path / "request.json").write_text(json.dumps(request))
    (tmp_path / "script.py").write_text(SCRIPT)
    env = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    command = [sys.executable, str(tmp_path / "script.py"), str(tmp_path / "request.json")]
    with log.open("wb") as file:  # not a pipe: a worker that outlives its parent would hold it open
        process = subprocess.Popen(command, env=env, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        code = process.wait(timeout=420)
    except subprocess.TimeoutExpired:
        code = "it hangs"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # the engine and both workers, whatever is left of them
    assert out.exists(), f"{code}: {log.read_text()[-6000:]}"
    table = json.loads(out.read_text())
    values = np.full(1 + max(map(int, table)), -np.inf)
    for token, logprob in table.items():
        values[int(token)] = logprob
    assert tools.difference(values, tools.reference(tiny, prompt, images)) <= 1e-3
