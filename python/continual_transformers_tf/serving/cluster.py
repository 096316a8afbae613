"""`Cluster`: makes servers agree on one table of shards, and moves streams when it changes.

It knows nothing of Ray, and keeps nothing on a disk: the newest table that a server has is the
truth. So a new controller goes on where a lost one was, also in the middle of a move.

A move, from one table to the next:

1. The servers that lose shards get the new table. From then on they refuse steps of them.
2. Without a journal, copies of their streams are put into the new owners, which refuse steps of
   them until they have the new table.
3. The new owners get the table. With a journal they rebuild the streams first. Redis refuses steps
   of an owner before, which may be alive and not know it.
4. The servers that lost shards end the streams that were copied.

The next table is made when all servers that can be reached have acted on this one.

A server may list streams of shards that it does not own. If the new owner still has the old table,
they are being moved. If not, the server was thought dead, and they are ended.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import NamedTuple, Protocol, TypeVar

from continual_transformers_tf.serving.operator_api import (
    ListedStream,
    OperatorApi,
    OperatorError,
    ServerView,
    Tls,
)
from continual_transformers_tf.serving.shards import (
    SHARDS,
    ServerAddress,
    ShardTable,
    epoch_after,
    shard_of,
)

Key = TypeVar("Key")
Result = TypeVar("Result")
THREADS = 16  # Calls at once.


class Member(NamedTuple):
    """A server that the cluster may command."""

    address: ServerAddress
    token: str  # The operator's.


class Log(Protocol):
    """Takes an event."""

    def __call__(self, event: str, **facts: object) -> None: ...


class Cluster:
    """Servers, and the table that they are to have.

    Args:
        journal: Whether the servers have a journal.
        log: Gets the events.
        slice_shards: How many shards move at once from server to server. Their streams are away
            meanwhile.
        timeout: How many seconds a server may take to say that it is alive.
        patience: A server is dead when it was not alive so many times in a row.
        rebuild_timeout: How many seconds a server may take to rebuild streams of shards that it
            gets.
        tls: If the servers have TLS, the files to call them with.

    Attributes:
        table: The newest table.
    """

    def __init__(
        self,
        *,
        journal: bool,
        log: Log,
        slice_shards: int = 16,
        timeout: float = 1.0,
        patience: int = 3,
        rebuild_timeout: float = 300.0,
        tls: Tls | None = None,
    ) -> None:
        self.table = ShardTable.empty()
        self._journal, self._log = journal, log
        self._slice_shards, self._rebuild_timeout = slice_shards, rebuild_timeout
        self._timeout, self._patience = timeout, patience
        self._context = tls.context() if tls else None
        self._apis: dict[str, OperatorApi] = {}  # Of members, and of others that the table names.
        self._members: Mapping[str, Member] = {}
        # What servers answered in this turn, as `_view` returns it, and what members answered.
        self._seen: dict[str, ServerView | bool | None] = {}
        self._views: dict[str, ServerView] = {}
        self._failures: Counter[str] = Counter()
        # Why a member did not answer, or refused to, the last time.
        self._silence: dict[str, str] = {}
        # Servers that may have streams of others. Each one until it was looked at.
        self._unswept: set[str] = set()
        # The server with the newest streams of a shard, if its owner has not begun with them.
        self._sources: dict[int, str] = {}
        self._pool = concurrent.futures.ThreadPoolExecutor(THREADS)

    def close(self) -> None:
        """Close the connections. The servers go on."""
        self._pool.shutdown(wait=False)
        for api in self._apis.values():
            api.close()

    def alive(self) -> set[str]:
        """Return the members that are not dead, as the last turn saw them."""
        return {name for name in self._members if self._failures[name] < self._patience}

    def has_nothing(self, name: str) -> bool:
        """Return whether a server has no shards and no streams, so that it may be ended."""
        view = self._views.get(name)
        return (
            not self.table.shards_of(name)
            and name not in self._unswept
            and (view is None or (view.table.epoch == self.table.epoch and view.applied))
        )

    def open_streams(self) -> dict[str, int]:
        """Return how many streams each member has that can be reached."""

        def ask(name: str) -> int | None:
            try:
                return self._apis[name].open_streams()
            except (OSError, OperatorError):
                return None

        counts = self._for_each(sorted(self._views), ask)
        return {name: count for name, count in counts.items() if count is not None}

    def turn(self, members: Mapping[str, Member], leaving: Collection[str] = ()) -> bool:
        """Look at all servers, and bring them nearer to what they should be.

        Args:
            members: The servers, by name. A server of the table that is no member, but alive, keeps
                its shards: it is one that a controller before has started, and its member is to
                come.
            leaving: Members that shall have no shards.

        Returns:
            Whether there is more to do at once.
        """
        self._look(members)
        self._adopt()
        if not self._finish():
            return False
        return self._plan(leaving) and self._finish()

    def _look(self, members: Mapping[str, Member]) -> None:
        """Ask all servers for their tables."""
        wanted = {name: (member.address.http, member.token) for name, member in members.items()}
        others = {
            name: (address.http, None)
            for name, address in self.table.servers.items()
            if name not in members
        }
        for name, (address, token) in {**wanted, **others}.items():
            api = self._apis.get(name)
            if api is None or (api.address, api.token) != (address, token):
                self._apis[name] = OperatorApi(address, token, self._timeout, self._context)
                if api is not None:
                    api.close()
        for name in set(self._apis) - set(wanted) - set(others):
            self._apis.pop(name).close()
            self._failures.pop(name, None)
            self._silence.pop(name, None)
            self._unswept.discard(name)
        self._members = dict(members)
        refused = {name for name, view in self._seen.items() if view is True}
        self._seen = seen = self._for_each([*wanted, *others], self._view)
        self._views = {name: view for name, view in seen.items() if isinstance(view, ServerView)}
        for name, view in seen.items():
            lost = self._failures[name] >= self._patience
            self._failures[name] = 0 if view is not None else self._failures[name] + 1
            if self._failures[name] == self._patience:
                self._log("server_lost", server=name, reason=self._silence.get(name, ""))
            if view is True and name in members and name not in refused:
                self._log("server_refuses", server=name, reason=self._silence[name])
            if view is not None and lost and name in members:
                self._log("server_back", server=name)
                self._unswept.add(name)

    def _view(self, name: str) -> ServerView | bool | None:
        """Return what a member says, True for a server that is only alive, None for none.

        A member is only alive if it refuses to say more. It has no view then, and is not ready.
        """
        api = self._apis[name]
        if name not in self._members:
            return api.live() or None
        try:
            return api.view()
        except OperatorError as error:
            # Whatever the status is, something answers. For example, all of the server's
            # connections are taken, and it serves the streams of those who have them.
            self._silence[name] = str(error)
            return True
        except (OSError, ValueError) as error:
            self._silence[name] = str(error)
            return None

    def _adopt(self) -> None:
        """Take the newest table that a server has."""
        newest = max((view.table.epoch for view in self._views.values()), default=0)
        if newest < max(self.table.epoch, 1):
            return
        tables = [v.table for _, v in sorted(self._views.items()) if v.table.epoch == newest]
        if newest > self.table.epoch:
            self.table = tables[0]
            self._unswept |= set(self._members)
            self._log("table_adopted", epoch=newest)
        if any(table != self.table for table in tables):
            # Two controllers made this epoch at the same time.
            epoch = epoch_after(newest)
            since = self.table.since
            if self._journal:
                # The owner takes the shards over again: in the journal, another server that had
                # them by the other table may have fenced it off. Without a journal they stay as
                # they are: a server refuses to have lost shards that it has, as its streams of
                # them would be old.
                since = tuple(
                    epoch if differ else before
                    for before, differ in zip(since, self._differences(tables), strict=True)
                )
            self.table = dataclasses.replace(self.table, epoch=epoch, since=since)
            self._unswept |= set(self._members)
            self._log("table_repaired", epoch=epoch)

    def _differences(self, tables: Iterable[ShardTable]) -> list[bool]:
        """Return for each shard whether one of the tables has it otherwise than the newest."""
        own, *others = [
            list(zip(table.shards, table.since, strict=True)) for table in (self.table, *tables)
        ]
        return [any(other[shard] != own[shard] for other in others) for shard in range(SHARDS)]

    def _finish(self) -> bool:
        """Bring the servers of the table up to it. Return whether all that answer are."""
        current = {name: view for name, view in self._views.items() if name in self.table.servers}
        behind = {
            name
            for name, view in current.items()
            # A server publishes a table before it acts on it. If that fails, the same table again
            # lets it go on.
            if view.ready and (view.table.epoch < self.table.epoch or not view.applied)
        }
        losers = {name for name in behind if self._loses(name)}
        self._unswept |= losers
        if not self._put(losers) and not self._journal:
            return False  # Their streams must stand still before they are copied.
        swept, moved = set(self._unswept), list[tuple[str, ListedStream]]()
        try:
            if not self._journal:  # With one, servers end the streams that they lose themselves.
                self._find_sources(current)
                swept, moved = self._sweep(behind - losers)
            if not self._put(behind - losers):
                return False
            self._spread(lambda pair: self._apis[pair[0]].end_moved(pair[1].path), moved)
        except (OSError, OperatorError, ValueError) as error:
            self._log("move_failed", epoch=self.table.epoch, reason=str(error))
            return False
        self._unswept -= swept
        return True

    def _loses(self, name: str) -> bool:
        """Return whether the server's own table gives it shards that are another's now."""
        return bool(self._views[name].table.shards_of(name) - self.table.shards_of(name))

    def _find_sources(self, current: Mapping[str, ServerView]) -> None:
        """Find out whose streams are the newest, of shards whose owner has not begun with them."""
        for name, view in current.items():
            for shard in self.table.shards_of(name):
                before = view.table.shards[shard]
                if view.table.epoch == self.table.epoch:
                    self._sources.pop(shard, None)
                elif before not in (None, name):
                    self._sources.setdefault(shard, str(before))

    def _sweep(self, gainers: Collection[str]) -> tuple[set[str], list[tuple[str, ListedStream]]]:
        """Copy streams to their new owners.

        Returns:
            The servers that were looked through, and (server, stream) of each that is to end there.
        """
        swept, to_end = set(), []
        for name in sorted(self._unswept & set(self._views) & set(self.table.servers)):
            api, whole = self._apis[name], True
            for model in api.models():
                streams = api.foreign_streams(model)
                copy = functools.partial(self._copy, name, gainers)
                states = self._spread(copy, streams)
                to_end += [
                    (name, stream)
                    for stream, state in zip(streams, states, strict=True)
                    if state not in ("own", "waits")
                ]
                whole = whole and "waits" not in states
                if streams:
                    counts = Counter(states)
                    self._log("streams_moved", server=name, model=model, **counts)
            if whole:
                swept.add(name)
        return swept, to_end

    def _copy(self, name: str, gainers: Collection[str], stream: ListedStream) -> str:
        """Copy a stream to its new owner. Return what came of it."""
        shard = shard_of(stream.name)
        owner = self.table.shards[shard]
        source = self._sources.get(shard)
        if owner == name:
            return "own"  # A copy that is here already. The server has not got the table yet.
        if source not in (None, name):
            return "stale"
        if owner is None or owner not in self._views or (source and owner not in gainers):
            return "waits"  # It is not known, or the owner is starting.
        if source is None:
            return "stale"  # The owner has begun without it.
        try:
            copy = self._apis[name].copy_out(stream.path)
            self._apis[owner].copy_in(stream.path, copy)
        except OperatorError as error:
            # It has ended meanwhile, or the owner has no room for it.
            self._log("stream_not_moved", stream=stream.path, reason=str(error))
            return "lost"
        return "moved"

    def _put(self, names: Collection[str]) -> bool:
        """Give servers the table. Return whether all of them have acted on it."""
        futures = {self._pool.submit(self._put_one, name): name for name in sorted(names)}
        silent: Counter[str] = Counter()
        pending = set(futures)
        while pending:
            _, pending = concurrent.futures.wait(pending, self._timeout)
            # One that rebuilds streams for minutes still says that it is alive.
            for name in [futures[future] for future in pending]:
                silent[name] = 0 if self._apis[name].live() else silent[name] + 1
                if silent[name] == self._patience:
                    self._apis[name].abandon()
        taken = {futures[future] for future in futures if future.result()}
        for shard in [s for s in self._sources if self.table.shards[s] in taken]:
            del self._sources[shard]  # The owner has begun with it.
        return taken == set(names)

    def _put_one(self, name: str) -> bool:
        try:
            done = self._apis[name].put_table(self.table, name, self._rebuild_timeout)
        except (OSError, OperatorError, ValueError) as error:
            self._log("table_not_taken", server=name, epoch=self.table.epoch, reason=str(error))
            return False
        if any(done.values()):
            self._log("table_taken", server=name, epoch=self.table.epoch, **done)
        self._views[name] = ServerView(self.table, name, True)
        return True

    def _plan(self, leaving: Collection[str]) -> bool:
        """Make the next table, if servers or shards are not as they should be."""
        alive = self.alive()
        # Started by a controller before, and not handed to this one yet. What answers at a member's
        # address is the member: a machine was replaced, and the server of this name has gone.
        taken = {member.address.http for member in self._members.values()}
        strangers = {
            name: address
            for name, address in self.table.servers.items()
            if name not in self._members
            and self._failures[name] < self._patience
            and address.http not in taken
        }
        ready = {name for name in alive & set(self._views) if self._views[name].ready}
        # A server that has just started and loads its models is not there yet.
        known = {name for name in alive if name in self.table.servers or name in ready}
        servers = {name: self._members[name].address for name in known} | strangers
        owners = ready - set(leaving)
        if not owners:
            return False
        # A server that joins gets the table before it gets shards. Then it knows whose they are,
        # and forgets those that it had before.
        joined = servers.keys() - self.table.servers.keys()
        steady = not strangers and known == ready and not joined
        after = self.table.next(
            servers, owners - joined or owners, self._slice_shards if steady else 0
        )
        if after.same_but_for_epoch(self.table):
            return False
        before, self.table = self.table, after
        for shard, (old, new) in enumerate(zip(before.shards, after.shards, strict=True)):
            if old not in (None, new):
                self._sources.setdefault(shard, str(old))
        self._log(
            "table",
            epoch=after.epoch,
            servers=sorted(servers),
            joined=sorted(joined),
            left=sorted(before.servers.keys() - servers.keys()),
            moved=sum(a != b for a, b in zip(before.shards, after.shards, strict=True)),
        )
        return True

    def _for_each(
        self, keys: Iterable[Key], function: Callable[[Key], Result]
    ) -> dict[Key, Result]:
        keys = list(keys)
        return dict(zip(keys, self._pool.map(function, keys), strict=True))

    def _spread(self, function: Callable[[Key], Result], items: Iterable[Key]) -> list[Result]:
        return list(self._pool.map(function, items))
