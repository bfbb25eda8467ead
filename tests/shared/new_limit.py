"""What the package is with one more limit: its source with one line more, in an interpreter of its own."""

import json
import subprocess
import sys

_PRELUDE = """
import importlib.util, json, sys

spec = importlib.util.find_spec("vilavt_core.presets")
source = open(spec.origin, encoding="utf-8").read()
line = '    max_zooms: int | None = described(None, "zooms of a conversation", ge=1, per_request=True)\\n'
place = "    max_total_pixels: "
assert source.count(place) == 1
module = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = module
exec(compile(source.replace(place, line + place), spec.origin, "exec"), module.__dict__)
import vilavt_core
vilavt_core.presets = module
"""


def with_a_new_limit(code: str) -> dict:
    """What `code` leaves in its variable ``found``, where `Limits` has a field ``max_zooms`` more."""
    text = f"{_PRELUDE}\n{code}\nprint('found', json.dumps(found))"
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.rsplit("found ", 1)[1])
