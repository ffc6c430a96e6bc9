"""Shipped: the recipes that come with the package, found without reading them.

Nothing heavy is imported here, so that a shell can complete their names.

    >>> "tiny-math" in recipe_files()
    True
"""

from pathlib import Path


def recipe_files() -> dict[str, Path]:
    """The recipes that ship with the package, by name."""
    here = Path(__file__).parent.parent
    # In a wheel they lie inside the package; in a checkout, beside it.
    folder = here / "recipes" if (here / "recipes").is_dir() else here.parent / "recipes"
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}
