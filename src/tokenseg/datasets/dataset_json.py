"""Reader of the `dataset.json` of a dataset: JSON, checked as a whole, all faults in one message."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from tokenseg.errors import DataError


class Manifest(BaseModel):
    """Base of the `dataset.json` models: immutable; keys that we do not use are left alone."""

    model_config = ConfigDict(frozen=True, extra="ignore")


ManifestT = TypeVar("ManifestT", bound=Manifest)


def read_json(path: Path) -> object:
    """Parse a JSON file.

    Raises:
        DataError: The file cannot be read or is not JSON; the message names file and line.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}; check the file") from error
    except (ValueError, RecursionError) as error:  # also of numbers with thousands of digits
        raise DataError(f"{path} is not valid JSON: {error}; mend it, or export the dataset again") from error


def parse_manifest(kind: type[ManifestT], values: object, path: Path) -> ManifestT:
    """Validate the content of a `dataset.json`.

    Raises:
        DataError: Keys are missing or of the wrong type; the message lists all of them with their dotted name.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        faults = [f"{'.'.join(str(part) for part in fault['loc'])}: {fault['msg']}" for fault in error.errors()]
        raise DataError(f"{path} has {len(faults)} fault(s): {'; '.join(faults)}") from error
