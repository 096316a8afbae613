"""The table of shards: which server has which streams."""

from __future__ import annotations

import dataclasses
import json
import time
import zlib
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple, Self

SHARDS = 256  # As cc/server/shards.h.


def shard_of(name: str | bytes) -> int:
    """Return the shard of a stream, 0 to 255. Servers and HAProxy compute the same."""
    return zlib.crc32(name.encode() if isinstance(name, str) else name) % SHARDS


def epoch_after(last: int, now: float | None = None) -> int:
    """Return the epoch of the table that comes after one of epoch `last`.

    Args:
        last: The epoch.
        now: The time in seconds since 1970; None: the clock's.
    """
    # The time, so that a service's epochs are above those of a service that ended. Its epochs are
    # still in the journal, where a lower one can append nothing, and in clients, which would take
    # no table of a lower epoch. For this, clocks have to agree within the time between the two.
    # In milliseconds, since moves make several tables a second: epochs in seconds would run ahead
    # of the clock, and a service that starts soon after would be below them.
    return max(last + 1, int(1000 * (time.time() if now is None else now)))


class ServerAddress(NamedTuple):
    """Where a server listens: "host:port" of each port."""

    grpc: str
    http: str


@dataclasses.dataclass(frozen=True)
class ShardTable:
    """A version of the table.

    Attributes:
        epoch: The version, as `epoch_after` makes it. 0 is the table of a server that was given
            none yet.
        servers: The servers' addresses, by name.
        shards: The name of the server of each shard; None: nobody's.
        since: The epoch in which each shard got its server. A server that had the shard before, and
            has it again, learns from it that another one had it meanwhile.
    """

    epoch: int
    servers: Mapping[str, ServerAddress]
    shards: tuple[str | None, ...]
    since: tuple[int, ...]

    @classmethod
    def empty(cls) -> Self:
        """Return the table of a server that was given none yet."""
        return cls(0, {}, (None,) * SHARDS, (0,) * SHARDS)

    @classmethod
    def of_json(cls, value: bytes | str | Mapping[str, Any]) -> Self:
        """Return the table that a server sent. Other entries, such as "self", are left out.

        Raises:
            ValueError: If it is not a table.
        """
        try:
            given = value if isinstance(value, Mapping) else json.loads(value)
            servers = {
                name: ServerAddress(address["grpc"], address["http"])
                for name, address in given["servers"].items()
            }
            shards, since = tuple(given["shards"]), tuple(map(int, given["since"]))
            table = cls(int(given["epoch"]), servers, shards, since)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"got a table of shards that cannot be read ({error!r}), expected the entries "
                "epoch, servers, shards and since"
            ) from error
        if {len(shards), len(since)} != {SHARDS}:
            raise ValueError(f"got a table of {len(shards)} shards, expected {SHARDS}")
        unknown = {name for name in table.shards if name is not None} - set(servers)
        if unknown:
            raise ValueError(
                f"got a table with shards of {', '.join(sorted(map(str, unknown)))}, expected only "
                "names of its servers"
            )
        return table

    def to_json(self) -> dict[str, Any]:
        """Return the table as servers take it."""
        servers = {name: address._asdict() for name, address in self.servers.items()}
        return {
            "epoch": self.epoch,
            "servers": servers,
            "shards": list(self.shards),
            "since": list(self.since),
        }

    def owner(self, name: str | bytes) -> str | None:
        """Return the name of the server of a stream; None: nobody's."""
        return self.shards[shard_of(name)]

    def shards_of(self, server: str) -> set[int]:
        """Return the shards of a server."""
        return {shard for shard, owner in enumerate(self.shards) if owner == server}

    def next(
        self,
        servers: Mapping[str, ServerAddress],
        owners: Collection[str] | None = None,
        most: int = SHARDS,
        now: float | None = None,
    ) -> Self:
        """Return the next table for a new set of servers.

        Each owner gets as many shards as any other, within one, and as few shards as possible move.
        A shard whose server is not in `servers` any more gets an owner at once.

        Args:
            servers: All servers, by name.
            owners: Those that may have shards; None: all. A server that is drained is none.
            most: At most so many shards move from one server to another. If more have to, the next
                tables go on.
            now: As of `epoch_after`.
        """
        names = sorted(servers if owners is None else set(owners) & set(servers))
        shards = [owner if owner in servers else None for owner in self.shards]
        if names:
            targets = _balanced(shards, names)
            for shard, target in enumerate(targets):
                if shards[shard] is None:
                    shards[shard] = target
                elif shards[shard] != target and most > 0:
                    shards[shard] = target
                    most -= 1
        epoch = epoch_after(self.epoch, now)
        since = [
            before if old == new else epoch
            for before, old, new in zip(self.since, self.shards, shards, strict=True)
        ]
        return dataclasses.replace(
            self, epoch=epoch, servers=dict(servers), shards=tuple(shards), since=tuple(since)
        )

    def same_but_for_epoch(self, other: ShardTable) -> bool:
        """Return whether two tables send every stream to the same place."""
        return self.shards == other.shards and dict(self.servers) == dict(other.servers)


def _balanced(shards: Iterable[str | None], names: list[str]) -> list[str]:
    """Return an owner for each shard: as before, where balance within one allows it."""
    shards = list(shards)
    counts = Counter(shards)
    least, larger = divmod(len(shards), len(names))
    # Those with the most shards may keep one more.
    by_count = sorted(names, key=lambda name: (-counts[name], name))
    room = {name: least + (i < larger) for i, name in enumerate(by_count)}
    targets: list[str | None] = []
    for owner in shards:
        kept = owner in room and room[owner] > 0
        targets.append(owner if kept else None)
        if kept and owner is not None:
            room[owner] -= 1
    free = iter([name for name in names for _ in range(room[name])])
    return [next(free) if target is None else target for target in targets]
