"""Several runs of VLMEvalKit's runner in one process, as importing it takes longer than running it.

Takes a JSON list of [arguments, environment variables of that run].
"""

import json
import os
import runpy
import sys

for arguments, settings in json.loads(sys.argv[1]):
    os.environ.update(settings)
    sys.argv = ["run.py", *arguments]
    runpy.run_module("vlmeval.run", run_name="__main__")
    for name in settings:
        del os.environ[name]
