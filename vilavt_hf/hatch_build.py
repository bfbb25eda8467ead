"""Put the shipped tiny checkpoint and the demo images into the wheel, so that `vilavt demo` runs from anywhere."""

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class ExamplesHook(BuildHookInterface):
    """Maps ``examples/`` (beside the package in a checkout, inside it in an sdist) to ``vilavt_core/_examples``."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called by hatchling before it collects files."""
        root = Path(self.root)
        examples = next((p for p in (root / "examples", root.parent / "examples") if p.is_dir()), None)
        if examples is None or version == "editable":
            return
        target = "examples" if self.target_name == "sdist" else "vilavt_core/_examples"
        build_data["force_include"][str(examples)] = target
