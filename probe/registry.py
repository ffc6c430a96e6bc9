"""Registries: tables of records by name, to which a user's own package can add.

    >>> @probe.METRICS.register("strongest", label="Strongest")
    ... def strongest(edges):
    ...     return edges.strengths.max(1)

A package that is installed can do so too: it names a module as an entry point of the group
`probe.plugins`, and that module is imported before anything is looked up.
"""

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any, ClassVar, Generic, TypeVar, overload
from weakref import ref

from probe.errors import ProbeError, UnknownNameError, not_known, reason

GROUP = "probe.plugins"
"""The entry points whose modules add to registries."""

Record = TypeVar("Record")
Function = TypeVar("Function", bound=Callable[..., object])


class Registry(MutableMapping[str, Record], Generic[Record]):
    """Records of one kind by name, those of plugins included."""

    _all: ClassVar[list["ref[Registry[Any]]"]] = []  # of records of any kind
    """Every registry of this process."""

    def __init__(
        self,
        kind: str,
        record: type[Record],
        rows: Mapping[str, Record],
        takes: str | None = None,
    ) -> None:
        """Begin with the records that ship.

        Args:
            kind: What a record is, for messages.
            record: Its class.
            rows: Those that ship.
            takes: The field that holds a function, if `register` may be used as a decorator.
        """
        self._kind, self._record, self._takes = kind, record, takes
        self._rows, self._shipped = dict(rows), dict(rows)
        Registry._all.append(ref(self))

    @overload
    def register(self, name: str, record: Record, /) -> Record: ...

    @overload
    def register(self, name: str, /, **fields: object) -> Callable[[Function], Function]: ...

    def register(self, name: str, record: Record | None = None, /, **fields: object) -> object:
        """Add a record, or make one of the decorated function and its other fields.

        Raises:
            ProbeError: There is one of this name already, or this is none.
        """
        if record is not None:
            return self._add(name, record)
        if self._takes is None:
            raise ProbeError(f"{self._kind} {name!r} needs its record: register({name!r}, record)")

        def decorate(function: Function) -> Function:
            self._add(name, self._record(**{str(self._takes): function}, **fields))
            return function

        return decorate

    def _add(self, name: str, record: Record) -> Record:
        if not isinstance(name, str) or not name.strip():
            raise ProbeError(f"a {self._kind} needs a name; it is {name!r}")
        if not isinstance(record, self._record):
            raise ProbeError(f"{self._kind} {name!r} is no {self._record.__name__}: {record!r}")
        if name in self._rows:
            raise ProbeError(f"there is a {self._kind} {name!r} already; give another name")
        self._rows[name] = record
        return record

    def __getitem__(self, name: str) -> Record:
        """The record of a name.

        Raises:
            UnknownNameError: There is none; it is a `KeyError` too.
        """
        PLUGINS.load()
        try:
            return self._rows[name]
        except KeyError:
            raise UnknownNameError(not_known(self._kind, name, self._rows)) from None

    def __setitem__(self, name: str, record: Record) -> None:
        """Put a record in the place of another."""
        self._rows[name] = record

    def __delitem__(self, name: str) -> None:
        """Take a record out."""
        del self._rows[name]

    def __iter__(self) -> Iterator[str]:
        """Every name, those that ship first."""
        PLUGINS.load()
        return iter(self._rows)

    def __len__(self) -> int:
        """How many there are."""
        PLUGINS.load()
        return len(self._rows)

    @staticmethod
    def as_shipped() -> bool:
        """Whether every registry of this process holds what ships, and no more."""
        PLUGINS.load()
        tables = (found for each in Registry._all if (found := each()) is not None)
        return all(
            table._rows.keys() == table._shipped.keys()
            and all(table._rows[name] is record for name, record in table._shipped.items())
            for table in tables
        )

    def __or__(self, other: Mapping[str, Record]) -> dict[str, Record]:
        """Both tables as one."""
        return {**self, **other}

    def __repr__(self) -> str:
        """The names."""
        return f"<{self._kind}: {', '.join(self)}>"


class Plugins:
    """The modules of other packages that add to registries, imported once."""

    def __init__(self) -> None:
        """Nothing is imported yet."""
        self._begun = False
        self._failed = ""

    def load(self) -> None:
        """Import every plugin, if that was not done before.

        Raises:
            ProbeError: One cannot be imported; the message names it.
        """
        if not self._begun:
            self._begun = True  # what a plugin looks up itself is found among what is there
            self._failed = self._import()
        if self._failed:
            raise ProbeError(self._failed)

    def _import(self) -> str:
        from importlib.metadata import entry_points

        for point in sorted(entry_points(group=GROUP)):
            try:
                point.load()
            except Exception as error:
                package = f", of {point.dist.name}" if point.dist else ""
                return (
                    f"plugin {point.name!r} ({point.value}{package}) cannot be imported: "
                    f"{type(error).__name__}: {reason(error)}; mend it, or uninstall it"
                )
        return ""


PLUGINS = Plugins()
"""Those of this process."""
