"""Put the shipped tiny checkpoint, pictures and recipes into the wheel, so that they work from anywhere."""

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class ExamplesHook(BuildHookInterface):
    """Maps ``examples`` and ``recipes`` (beside the package in a checkout, inside it in an sdist) into the package."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called by hatchling before it collects files."""
        if version == "editable":
            return
        root = Path(self.root)
        for name in ("examples", "recipes"):
            found = next((p for p in (root / name, root.parent / name) if p.is_dir()), None)
            if found is not None:
                target = name if self.target_name == "sdist" else f"vilavt_hf/_{name}"
                build_data["force_include"][str(found)] = target
