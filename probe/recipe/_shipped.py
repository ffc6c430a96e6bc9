"""Shipped: the recipes that come with the package, and their models, found without checks.

Nothing heavy is imported here, so that a shell can complete their names.

    >>> "tiny-math" in recipe_files()
    True
"""

import tomllib
from pathlib import Path


def recipe_files() -> dict[str, Path]:
    """The recipes that ship with the package, by name."""
    here = Path(__file__).parent.parent
    # In a wheel they lie inside the package; in a checkout, beside it.
    folder = here / "recipes" if (here / "recipes").is_dir() else here.parent / "recipes"
    return {path.stem: path for path in sorted(folder.glob("*.toml"), key=lambda path: path.stem)}


def shipped_models() -> list[str]:
    """The models of their pairs, as a command takes them."""
    tables = [tomllib.loads(path.read_text("utf-8")) for path in recipe_files().values()]
    pairs = [pair for table in tables for pair in table.get("pairs", ())]
    return sorted({pair[side] for pair in pairs for side in ("before", "after")})
