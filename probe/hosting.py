"""What an NDIF server has, and whether it fits a recipe.

Everything here is asked before the first job: whether the model is up, whether it has the layers
and the width that its config says here and the precision that the recipe asks for, and whether
client and server run versions that understand each other.

    >>> server = read_server(open_host("http://localhost:8001"))
    >>> [model.reference for model in server.models]
    ['meta-llama/Llama-3.1-8B']
"""

import json
import platform
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import version
from typing import NamedTuple, cast

from rich.console import RenderableType
from rich.table import Table

from probe.checkpoints import local_folder
from probe.errors import ProbeError
from probe.models import Model
from probe.recipe import Recipe, read_recipe, recipe_files
from probe.remote import Deployment, Host
from probe.tracing import describe

PACKAGES = ("nnsight", "torch", "transformers")
_WRAPPER = "nnsight.modeling.transformers.TransformersModel"


class HostedModel(NamedTuple):
    """A model that is up on a server, as far as the server tells."""

    reference: str
    """Its hub id, or its folder there."""

    key: str
    """Its name in requests."""

    dtype: str | None
    """The precision it is served in."""

    model_type: str | None
    """Its architecture."""

    n_layers: int | None
    """Number of decoder layers."""

    d_model: int | None
    """Width of the residual stream."""


class Server(NamedTuple):
    """What a server says of itself."""

    python: str
    """Its Python."""

    versions: dict[str, str]
    """Its version of each of `PACKAGES`."""

    models: tuple[HostedModel, ...]
    """What is up."""


def read_server(host: Host, patience: float = 5.0) -> Server:
    """Ask a server what it runs and what is up.

    Args:
        host: The server.
        patience: For how many seconds faults are tried again.

    Raises:
        ProbeError: It cannot be reached, or is no NDIF server.
    """
    try:
        environment = cast(dict[str, object], host.ask("/env", patience))
        status = cast(dict[str, object], host.ask("/status", patience))
        packages = cast(dict[str, str], environment["packages"])
        deployments = cast(dict[str, dict[str, object]], status["deployments"])
        python = str(environment["python_version"]).split()[0]
        models = [_hosted(table) for table in deployments.values() if _is_up(table)]
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise ProbeError(f"{host.url} answers, but not as an NDIF server does") from error
    return Server(
        python,
        {name: packages[name] for name in PACKAGES if name in packages},
        tuple({model.key: model for model in models}.values()),
    )


def check_host(host: Host, patience: float = 15.0) -> list[str]:
    """Check that a server can be used at all.

    Args:
        host: The server.
        patience: For how many seconds faults are tried again.

    Returns:
        A line for each difference of versions that may move numbers.

    Raises:
        ProbeError: It cannot be reached, does not take the key, or runs an nnsight of its own.
    """
    host.knock(patience)
    return check_versions(host, read_server(host, patience))


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
    up = {model.reference.lower(): model.dtype for model in server.models}
    obstacles = []
    for reference in recipe.models():
        name = _name_there(reference).lower()
        if name not in up:
            obstacles.append(f"{reference} is not up")
        elif up[name] not in (None, recipe.compute.dtype):
            obstacles.append(f"{reference} is up in {up[name]}, not {recipe.compute.dtype}")
    return ", ".join(obstacles)


def _name_there(reference: str) -> str:
    """What a server calls a model: its hub id, or its folder, which is the same there."""
    return str(local_folder(reference) or reference)


def _shape(model: HostedModel) -> tuple[object, ...]:
    return model.model_type, model.n_layers, model.d_model, model.dtype


def check_versions(host: Host, server: Server) -> list[str]:
    """Compare the versions of both sides.

    Returns:
        A line for each difference that may move numbers.

    Raises:
        ProbeError: The two cannot understand each other.
    """
    here, there = version("nnsight"), server.versions.get("nnsight", "?")
    if here.split(".")[:2] != there.split(".")[:2]:
        raise ProbeError(
            f"{host.url} runs nnsight {there}, here is {here}: jobs would not be understood; "
            f"pip install nnsight=={there}"
        )
    differences = [
        f"{host.url} runs {name} {server.versions[name]}, here is {version(name)}: numbers may "
        "differ in the last digits"
        for name in PACKAGES
        if name in server.versions
        and server.versions[name].partition("+")[0] != version(name).partition("+")[0]
    ]
    return differences


def deploy(model: Model, host: Host) -> Deployment:
    """Find a model on a server, or have it brought up, and check that it is the same model.

    Args:
        model: The model, without weights.
        host: The server.

    Raises:
        ProbeError: It is not there, or not with these layers, this width or this precision.
    """
    server = read_server(host, host.timeout)
    name = _name_there(model.reference)
    env = model.network._remoteable_get_env()
    for found in server.models:
        if found.reference.lower() == name.lower():
            deployment = Deployment(host, found.key, env)
            _compare(model, host, found.n_layers, found.d_model, found.dtype)
            return deployment
    if not host.deploys:
        up = ", ".join(found.reference for found in server.models) or "nothing"
        raise ProbeError(f"{host.url} does not have {model.reference} up now; up are: {up}")
    host.say(f"{host.url}: {model.reference} is not up yet; asking for it")
    key = json.dumps({"repo_id": name, "revision": None, "task": "text-generation"})
    deployment = Deployment(host, f"{_WRAPPER}:{key}", env)
    found_there = describe(replace(model, deployment=deployment))
    dtype = str(found_there.dtype).removeprefix("torch.")
    _compare(model, host, found_there.shape[0], found_there.shape[1], dtype)
    return deployment


def _compare(
    model: Model, host: Host, n_layers: int | None, d_model: int | None, dtype: str | None
) -> None:
    """Check what a server says of a model against what is known of it here."""
    for what, here, there in (
        ("layers", model.n_layers, n_layers),
        ("a width of", model.d_model, d_model),
    ):
        if there is not None and here != there:
            raise ProbeError(
                f"{host.url}: {model.reference} has {what} {there} there, {here} by its config "
                "here; it is another model"
            )
    wanted = str(model.dtype).removeprefix("torch.")
    if dtype is not None and dtype != wanted:
        raise ProbeError(
            f"{host.url} serves {model.reference} in {dtype}, and {wanted} was asked for; "
            f"use --dtype {dtype}"
        )


def _is_up(table: dict[str, object]) -> bool:
    return (
        table.get("application_state") == "RUNNING"
        and table.get("deployment_level") in ("HOT", "WARM")
        and table.get("task") in (None, "text-generation")
        and bool(table.get("model_key"))
        and bool(table.get("repo_id"))
    )


def _hosted(table: dict[str, object]) -> HostedModel:
    config = json.loads(str(table.get("config") or "{}"))
    dtype = table.get("dtype")
    return HostedModel(
        str(table["repo_id"]),
        str(table["model_key"]),
        str(dtype).removeprefix("torch.") if dtype else None,
        config.get("model_type"),
        config.get("num_hidden_layers"),
        config.get("hidden_size"),
    )
