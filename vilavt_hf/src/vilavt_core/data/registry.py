"""Which data sets there are: the nine published ones under one root, and those of a YAML file."""

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..errors import DataError
from ..spelling import did_you_mean
from ..validation import problems
from ..yaml_config import read_keys

PUBLISHED = MappingProxyType(
    {
        "sr_91k_v2": "SR_91K_COT",
        "spar7m_v2": "SPAR7M_COT",
        "vgr_v2": "VGR_COT",
        "thyme_2turn_v2": "THYME_COT",
        "sr_91k_text": "SR_91K_TEXT",
        "spar7m_text": "SPAR7M_TEXT",
        "thyme_text_v2": "THYME_TEXT",
        "vica_cot": "VICA_COT",
        "vica_text": "VICA_TEXT",
    }
)
"""Names that the published training script uses -> folders of the published data."""

Crops = Literal["files", "cut"]


class DataSource(BaseModel):
    """One data set."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(description="name, for `data.use` and in reports", pattern=r"^[\w.\-]+$")
    annotations: Path = Field(description="the .jsonl or .json file; relative to the YAML file")
    images: Path | None = Field(default=None, description="image root; default: the folder of the annotations")
    rate: float = Field(
        default=1.0, gt=0, le=1, description="share of the records that is used, drawn with the run's seed"
    )
    crops: Crops = Field(
        default="files",
        description="of published records: take crops from files, or cut them from the boxes of the tool calls",
    )

    @property
    def image_root(self) -> Path:
        """Where relative image paths start."""
        return self.images if self.images is not None else self.annotations.parent


class Registry(BaseModel):
    """A YAML file of data sets."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    data_root: Path | None = Field(
        default=None, description="folder of the published sets (ViLaVT-data/sft); relative to the YAML file"
    )
    datasets: tuple[DataSource, ...] = Field(default=(), description="further data sets")

    @classmethod
    def load(cls, path: str | Path) -> "Registry":
        """Read a YAML file; relative paths in it start at its folder.

        Raises:
            DataError: it cannot be read, has unknown keys, or names a data set twice.
        """
        path = Path(path)
        try:
            registry = cls.model_validate(read_keys(path, partial(DataError, kind="registry")))
        except ValidationError as error:
            raise DataError(
                f"{path}: {problems(error, known=[*cls.model_fields, *DataSource.model_fields])}", "registry"
            ) from None
        names = [source.name for source in registry.datasets]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise DataError(f"{path}: data sets named twice: {', '.join(twice)}", "registry")
        home = path.parent
        located = [
            source.model_copy(
                update={
                    "annotations": home / source.annotations,
                    "images": None if source.images is None else home / source.images,
                }
            )
            for source in registry.datasets
        ]
        root = None if registry.data_root is None else home / registry.data_root
        return registry.model_copy(update={"datasets": tuple(located), "data_root": root})

    def find(self, wanted: str) -> DataSource:
        """The data set of a name; ``name%25`` takes a quarter of it.

        Raises:
            DataError: unknown name, or the published set is not under the root.
        """
        name, rate = _split_rate(wanted)
        known: Mapping[str, DataSource] = {source.name: source for source in self.datasets}
        if name in known:
            source = known[name]
        elif name in PUBLISHED:
            source = self._published(name)
        else:
            choices = ", ".join([*known, *PUBLISHED])
            raise DataError(
                f"there is no data set {name!r}; known are {choices}{did_you_mean(name, [*known, *PUBLISHED])}",
                "registry",
            )
        return source if rate is None else source.model_copy(update={"rate": rate})

    def _published(self, name: str) -> DataSource:
        folder = PUBLISHED[name]
        if self.data_root is None:
            raise DataError(f"{name} is a published data set: say where they are (data.root, --root)", "registry")
        places = [
            self.data_root / f"{stem}{suffix}"
            for stem in (folder, f"{folder}/{folder}")
            for suffix in (".json", ".jsonl")
        ]
        found = next((path for path in places if path.is_file()), None)
        if found is None:
            looked = ", ".join(str(path.relative_to(self.data_root)) for path in places)
            raise DataError(f"{name}: no annotations under {self.data_root}; looked for {looked}", "registry")
        return DataSource(name=name, annotations=found, images=self.data_root / folder)


def _split_rate(wanted: str) -> tuple[str, float | None]:
    match = re.fullmatch(r"(.*)%(\d+(?:\.\d+)?)", wanted.strip())
    if match is None:
        return wanted.strip(), None
    rate = float(match.group(2)) / 100
    if not 0 < rate <= 1:
        raise DataError(f"{wanted!r}: the percentage must be above 0 and at most 100", "registry")
    return match.group(1), rate
