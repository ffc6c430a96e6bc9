"""What an NDIF server has, and whether it fits a recipe.

Everything here is asked before the first job: whether the model is up, whether it has the layers
and the width that its config says here and the precision that the recipe asks for, and whether
client and server run versions that understand each other. `load_hosted` gives a model that runs
there, to be used as one from `load_model`.

    >>> server = read_server(open_host("http://localhost:8001"))
    >>> [model.reference for model in server.models]
    ['meta-llama/Llama-3.1-8B']
"""

import json
import os
import re
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from typing import NamedTuple, cast

from probe.checkpoints import HubName, fetch_checkpoint, local_folder
from probe.errors import ProbeError
from probe.models import (
    Model,
    architecture_of,
    check_dtype,
    read_config,
    read_settings,
    read_tokenizer,
)
from probe.remote import GO_ON, Deployment, Host, check_address, check_key
from probe.tracing import describe
from probe.vocabulary import HOSTED, JOBS, KEY_VARIABLE, TIMEOUT

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

    revision: str | None = None
    """Its branch, tag or commit; None for the main branch."""


class Server(NamedTuple):
    """What a server says of itself."""

    python: str
    """Its Python."""

    versions: dict[str, str]
    """Its version of each of `PACKAGES`."""

    models: tuple[HostedModel, ...]
    """What is up."""


def open_host(
    remote: str,
    jobs: int = JOBS,
    timeout: float = TIMEOUT,
    say: Callable[[str], None] | None = None,
) -> Host:
    """A server by its address; nothing is sent yet.

    Args:
        remote: `ndif` for the hosted NDIF, or `http://host:port` for a server of one's own.
        jobs: How many jobs may be under way at once.
        timeout: See `Host.timeout`.
        say: See `Host.say`.

    Raises:
        ProbeError: No such address, or a key that is missing or damaged.
    """
    from nnsight.schema.config import CONFIG

    # From the variable alone, for one's own server; nnsight's stored key is for the hosted one.
    key = os.environ.get(KEY_VARIABLE, "").strip()
    url = remote
    if remote == HOSTED:
        url, key = CONFIG.API.HOST, key or (CONFIG.API.APIKEY or "").strip()
        if not key:
            raise ProbeError(
                f"the hosted NDIF asks for a key: set {KEY_VARIABLE}; see docs/remote.md"
            )
    parts = check_address(url, f"remote is {remote!r}; give {HOSTED} or an address", KEY_VARIABLE)
    check_key(key, KEY_VARIABLE)
    say = say or (lambda line: None)
    # Letters of `HTTP://` too, as others read them.
    return Host(parts.geturl().rstrip("/"), key, jobs, remote != HOSTED, timeout, say)


def read_server(host: Host, patience: float = 5.0, hint: str = "") -> Server:
    """Ask a server what it runs and what is up.

    Args:
        host: The server.
        patience: For how many seconds faults are tried again.
        hint: What to say behind the last of them.

    Raises:
        ProbeError: It cannot be reached, or is no NDIF server.
    """
    try:
        environment = cast(dict[str, object], host.ask("/env", patience, hint))
        status = cast(dict[str, object], host.ask("/status", patience, hint))
        packages = cast(dict[str, str], environment["packages"])
        versions = {name: packages[name] for name in PACKAGES if name in packages}
        if not all(isinstance(found, str) for found in versions.values()):
            raise TypeError("a version that is no text")
        deployments = cast(dict[str, dict[str, object]], status["deployments"])
        python = str(environment["python_version"]).split()[0]
        models = [_hosted(table) for table in deployments.values() if _is_up(table)]
    except (
        *(KeyError, TypeError, ValueError, AttributeError, IndexError, RecursionError),
    ) as error:
        raise ProbeError(f"{host.url} answers, but not as an NDIF server does") from error
    return Server(
        python,
        versions,
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


def name_there(reference: str) -> tuple[str, str | None]:
    """What a server calls a model: its hub id, or its folder, which is the same there.

    Returns:
        This, and its revision.

    Raises:
        ProbeError: It is a folder inside a repository, which servers do not take.
    """
    folder = local_folder(reference)
    if folder:
        return str(folder), None
    name = HubName.parse(reference)
    if name.folder:
        raise ProbeError(
            f"{reference} is a folder inside a repository, which an NDIF server does not load; run "
            "it here, or give a repository of its own"
        )
    return name.repository, name.revision


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


def load_hosted(reference: str, host: Host, dtype: str = "float32") -> Model:
    """A model whose weights stay on a server; what is here are the names of its modules.

    Args:
        reference: As for `probe.models.load_model`; the server has it under the same name.
        host: The server, from `open_host`.
        dtype: The precision that it is served in.

    Raises:
        ProbeError: Its config or tokenizer cannot be read here, its architecture is not in the
            table, or the server does not have it, or not like this.
    """
    import torch
    from nnsight.modeling.transformers import TransformersModel

    check_dtype(dtype)
    config = read_config(reference)
    architecture = architecture_of(config.model_type)
    tokenizer = read_tokenizer(reference)
    checkpoint = fetch_checkpoint(reference, weights=False)
    if checkpoint.adapter:
        raise ProbeError(
            f"{reference} is a PEFT adapter, which runs here only; merge it into its base first"
        )
    folder = str(checkpoint.folder)
    network = TransformersModel(folder, task="text-generation", tokenizer=tokenizer, dtype=dtype)
    here, precision = torch.device("cpu"), getattr(torch, dtype)
    model = Model(reference, network, tokenizer, config, architecture, here, precision)
    model = replace(model, settings=read_settings(checkpoint.folder))
    return replace(model, deployment=deploy(model, host))


def deploy(model: Model, host: Host) -> Deployment:
    """Find a model on a server, or have it brought up, and check that it is the same model.

    Args:
        model: The model, without weights.
        host: The server.

    Raises:
        ProbeError: It is not there, or not with these layers, this width or this precision.
    """
    server = read_server(host, host.timeout, GO_ON)
    name, revision = name_there(model.reference)
    env = model.network._remoteable_get_env()
    for found in server.models:
        if (found.reference.lower(), found.revision) == (name.lower(), revision):
            deployment = Deployment(host, found.key, env)
            _check_same(model, host, found.n_layers, found.d_model, found.dtype)
            return deployment
    if not host.deploys:
        up = ", ".join(found.reference for found in server.models) or "nothing"
        raise ProbeError(f"{host.url} does not have {model.reference} up now; up are: {up}")
    host.say(f"{host.url}: {model.reference} is not up yet; asking for it")
    key = json.dumps({"repo_id": name, "revision": revision, "task": "text-generation"})
    deployment = Deployment(host, f"{_WRAPPER}:{key}", env)
    found_there = describe(replace(model, deployment=deployment))
    dtype = str(found_there.dtype).removeprefix("torch.")
    _check_same(model, host, found_there.shape[0], found_there.shape[1], dtype)
    return deployment


def _check_same(
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
        _revision(str(table["model_key"])),
    )


def _revision(key: str) -> str | None:
    """The revision in a model's name in requests; None for the main branch."""
    found = re.search(r'"revision": *"([^"]+)"', key)
    return None if found is None or found[1] == "main" else found[1]
