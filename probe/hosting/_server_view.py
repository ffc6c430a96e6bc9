"""Server view: what `probe ndif` prints of a server, and which recipes could run there now.

>>> for part in server_view(open_host("http://localhost:8001")):
...     Console().print(part)
"""

import platform
from collections.abc import Iterator
from importlib.metadata import version

from rich.console import RenderableType
from rich.table import Table

from probe.errors import ProbeError
from probe.hosting._loading import PACKAGES, HostedModel, Server, name_there, read_server
from probe.recipe import Recipe, read_recipe, recipe_files
from probe.remote import Host


def server_view(host: Host) -> Iterator[RenderableType]:
    """Lay out what can be said of a server, bit by bit, as it answers.

    Raises:
        ProbeError: It cannot be reached, or is no NDIF server.
    """
    server = read_server(host)
    try:
        host.knock()
        key = "taken" if host.key else "none given, none asked for"
    except ProbeError as error:
        key = str(error).removeprefix(f"{host.url} ")
    facts = Table(title=f"{host.url}: reachable", title_justify="left")
    for title in ("", "here", "there"):
        facts.add_column(title)
    facts.add_row("python", platform.python_version(), server.python)
    for name in PACKAGES:
        facts.add_row(name, version(name), server.versions.get(name, "?"))
    yield facts
    yield f"key: {key}"
    models = Table(title="Models that are up", title_justify="left")
    for title in ("model", "architecture", "layers", "width", "dtype"):
        models.add_column(title)
    for model in server.models:
        models.add_row(model.reference, *(str(value or "?") for value in _shape(model)))
    yield models if server.models else "No model is up."
    recipes = Table(title="Recipes", title_justify="left")
    for title in ("recipe", "could run there now"):
        recipes.add_column(title)
    for name in recipe_files():
        recipes.add_row(name, _obstacles(read_recipe(name), server) or "yes")
    yield recipes
    if host.deploys:
        yield "What is not up is asked for when a recipe needs it."


def _obstacles(recipe: Recipe, server: Server) -> str:
    """Why a recipe cannot run on a server now; empty where it can."""
    up = {(model.reference.lower(), model.revision): model.dtype for model in server.models}
    obstacles = []
    for reference in recipe.models():
        place, revision = name_there(reference)
        name = place.lower(), revision
        if name not in up:
            obstacles.append(f"{reference} is not up")
        elif up[name] not in (None, recipe.compute.dtype):
            obstacles.append(f"{reference} is up in {up[name]}, not {recipe.compute.dtype}")
    return ", ".join(obstacles)


def _shape(model: HostedModel) -> tuple[object, ...]:
    return model.model_type, model.n_layers, model.d_model, model.dtype
