"""Models that come with the package, and the names by which they are called.

Each is a model folder `builtin_models/NAME/` with a LICENSE of its own; nothing is ever downloaded.
"""

from __future__ import annotations

from pathlib import Path

from tokenseg.errors import ModelError

MODELS_FOLDER = Path(__file__).with_name("builtin_models")


def builtin_names() -> tuple[str, ...]:
    """Names of the built-in models, sorted; empty where the package was made without them."""
    return tuple(sorted(path.parent.name for path in MODELS_FOLDER.glob("*/model.json")))


def find_model(path: Path | str) -> Path:
    """Give the folder that a path or the name of a built-in model stands for.

    Args:
        path: What the user wrote. A path that exists is meant, also where a built-in model has the same name.

    Raises:
        ModelError: There is no such path and no such built-in model; the message lists the names.
    """
    path = Path(path)
    if path.exists():
        return path
    if len(path.parts) > 1:
        raise ModelError(f"model {path} does not exist; check the path")
    names = builtin_names()
    if path.name in names:
        return MODELS_FOLDER / path.name
    raise ModelError(
        f"model {path} does not exist here, and is no built-in model (there is {', '.join(names) or 'none'}); "
        "name a built-in model, a run folder of `tokenseg train`, or a model folder"
    )
