"""Save results as JSON files and load them again."""

from __future__ import annotations

import dataclasses
import json
import os
from typing import TYPE_CHECKING, Any, ClassVar, cast

from ..reading import read_json
from ..writing import write_whole


if TYPE_CHECKING:
    from typing import Self

    from _typeshed import DataclassInstance


class SavedAsJSON:
    """Mixin for dataclasses of plain values, saved as a JSON object of their fields and `kind`, the class name.

    Attributes:
        RECORDS: field that holds a list of records -> keys that each record must have.
    """

    RECORDS: ClassVar[dict[str, tuple[str, ...]]] = {}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a JSON file, from which `load` restores an equal object.

        Args:
            path: the file; an existing file is replaced.

        Raises:
            FileNotFoundError: the folder of the file does not exist.
        """
        fields = dataclasses.asdict(cast("DataclassInstance", self))
        content = {"kind": type(self).__name__, **fields}
        write_whole(path, json.dumps(content, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: the file does not exist.
            ValueError: the file was not written by `save` of this class, or is damaged.
        """
        wanted = f"'{os.fspath(path)}' was not written by {cls.__name__}.save"
        content = read_json(path)
        if not isinstance(content, dict) or "kind" not in content:
            raise ValueError(f"{wanted}: the content is not a JSON object with a `kind`.")
        if (kind := content.pop("kind")) != cls.__name__:
            raise ValueError(f"{wanted}: its kind is {kind!r}.")
        fields = {field.name for field in dataclasses.fields(cast("type[DataclassInstance]", cls))}
        if content.keys() != fields:
            raise ValueError(f"{wanted}: its fields are {sorted(content)}, not {sorted(fields)}.")
        for name, required in cls.RECORDS.items():
            _check_records(content[name], name, required, wanted)
        return cls(**content)


def _check_records(records: Any, name: str, required: tuple[str, ...], wanted: str) -> None:
    if not isinstance(records, list):
        raise ValueError(f"{wanted}: {name} is not a list of records.")
    for i, record in enumerate(records):
        if not isinstance(record, dict):
            raise ValueError(f"{wanted}: {name}[{i}]={record!r} is not a record.")
        if missing := [field for field in required if field not in record]:
            raise ValueError(f"{wanted}: {name}[{i}] lacks {', '.join(missing)}.")
