"""`Haproxy`: a proxy for clients that do not know the table of shards.

A client sends the metadata key `shard`, 0 to 255, or `stream-id`, the stream's name, with each
call. HAProxy sends the call to the server that has the shard. It runs on when the process that
started it ends, and another one adopts it.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

from continual_transformers_tf.serving import private_files, processes
from continual_transformers_tf.serving.shards import SHARDS, ServerAddress, ShardTable

SLOTS = 64  # Servers that it can have.
START_SECONDS, STOP_SECONDS = 10.0, 15.0
NO_SERVER = "none"  # In the map, for a shard that no server has.

CONFIGURATION = """\
# Written by continual-transformers. Servers and shards are set at run time.
global
    pidfile {folder}/haproxy.pid
    stats socket {folder}/admin.sock mode 600 level admin
    stats timeout 1h
    # Room for a server's table of shards in its trailing metadata.
    tune.bufsize 32768
    tune.h2.max-concurrent-streams 1000
    # A process that is replaced does not wait for streams without end.
    hard-stop-after 10s

defaults
    mode http
    timeout connect 1s
    timeout client 1h
    timeout server 1h
    timeout check 1s
    # A call that could not be sent may be sent to another server.
    retries 1
    option redispatch 1
    retry-on conn-failure
    http-reuse always

frontend clients
    bind {host}:{port} proto h2
    acl names_stream req.fhdr(stream-id) -m found
    http-request set-header shard %[req.fhdr(stream-id),crc32,mod({shards})] if names_stream
    default_backend servers

backend servers
    balance roundrobin
    acl names_shard req.hdr(shard) -m found
    use-server %[req.hdr(shard),map_str({folder}/shards.map,{no_server})] if names_shard
    # gRPC's health says nothing that HAProxy understands: ask on the HTTP port.
    option httpchk
    http-check connect proto h1
    http-check send meth GET uri /v2/health/ready
    http-check expect status 200
    default-server check inter 500ms fall 2 rise 1
    default-server observe layer4 error-limit 1 on-error mark-down
    default-server on-marked-down shutdown-sessions
    server-template s 1-{slots} 127.0.0.1:1 port 1 proto h2 disabled
"""


class Haproxy:
    """A running HAProxy.

    Args:
        folder: Its own folder, for the configuration, the map of shards and the admin socket. If a
            HAProxy of this folder runs, it is adopted.
        host: The address to listen on.
        port: The port to listen on.

    Raises:
        FileNotFoundError: If HAProxy is not installed.
        PermissionError: If another user may have written to the folder.
        OSError: If it does not start. The sentence has what it said.
    """

    def __init__(self, folder: Path, host: str, port: int) -> None:
        self.url = f"{host}:{port}"
        self._folder = folder
        self._slots: dict[str, str] = {}  # Servers' slots, by name.
        self._addresses: dict[str, ServerAddress] = {}
        self._shards: list[str] = [NO_SERVER] * SHARDS
        program = self.program()
        if program is None:
            raise FileNotFoundError("there is no haproxy on PATH: `apt install haproxy`")
        private_files.make_folder(folder)
        text = CONFIGURATION.format(
            folder=folder,
            host=host,
            port=port,
            shards=SHARDS,
            slots=SLOTS,
            no_server=NO_SERVER,
        )
        configuration = folder / "haproxy.cfg"
        if self._runs() and configuration.exists() and configuration.read_text() == text:
            self._reset()
            return
        self.stop()
        configuration.write_text(text)
        entries = "".join(f"{shard} {NO_SERVER}\n" for shard in range(SHARDS))
        (folder / "shards.map").write_text(entries)
        done = subprocess.run(
            [program, "-D", "-f", configuration], capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            said = done.stderr.strip().splitlines() or ["no reason"]
            reason = next((line for line in said if "[ALERT]" in line), said[-1])
            raise OSError(f"HAProxy did not start: {reason}")
        end = time.monotonic() + START_SECONDS
        while not self._runs():
            if time.monotonic() > end:
                raise OSError(f"HAProxy did not start within {START_SECONDS:g} seconds")
            time.sleep(0.02)

    @staticmethod
    def program() -> str | None:
        """Return the path of the program; None: it is not installed."""
        # Debian has it where only the superuser's PATH looks.
        return shutil.which("haproxy", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")

    def set_table(self, table: ShardTable) -> None:
        """Send the calls of each shard to its server.

        Raises:
            OSError: If HAProxy does not answer, or there are more than 64 servers.
        """
        commands = []
        for name, address in sorted(table.servers.items()):
            if name not in self._slots:
                free = [s for s in map("s{}".format, range(1, SLOTS + 1)) if self._is_free(s)]
                if not free:
                    raise OSError(f"got more than {SLOTS} servers, which HAProxy is set up for")
                self._slots[name] = free[0]
            if self._addresses.get(name) != address:
                commands += _set_server(self._slots[name], address)
                self._addresses[name] = address
        shards = [NO_SERVER if owner is None else self._slots[owner] for owner in table.shards]
        commands += [
            f"set map {self._folder}/shards.map {shard} {slot}"
            for shard, slot in enumerate(shards)
            if slot != self._shards[shard]
        ]
        for name in sorted(set(self._slots) - set(table.servers)):
            commands.append(f"set server servers/{self._slots.pop(name)} state maint")
            self._addresses.pop(name, None)
        self._command(commands)
        self._shards = shards

    def stop(self) -> None:
        """End HAProxy, and the calls in progress."""
        pid = self._pid()
        if pid is None:
            return
        processes.end(pid, STOP_SECONDS)
        (self._folder / "haproxy.pid").unlink(missing_ok=True)

    def _is_free(self, slot: str) -> bool:
        return slot not in self._slots.values()

    def _reset(self) -> None:
        """Take all servers and shards away from a HAProxy that was adopted."""
        self._command([f"set server servers/s{i} state maint" for i in range(1, SLOTS + 1)])
        self._command([f"set map {self._folder}/shards.map {i} {NO_SERVER}" for i in range(SHARDS)])

    def _pid(self) -> int | None:
        """Return the process of this folder's HAProxy, if it is one."""
        try:
            pid = int((self._folder / "haproxy.pid").read_text())
        except (OSError, ValueError):
            return None
        return pid if processes.runs_with(pid, self._folder / "haproxy.cfg") else None

    def _runs(self) -> bool:
        try:
            return self._pid() is not None and "Pid:" in self._say(["show info"])
        except OSError:
            return False

    def _command(self, commands: list[str]) -> None:
        """Change what HAProxy does."""
        for begin in range(0, len(commands), 50):  # The answer to a line is one buffer.
            for line in self._say(commands[begin : begin + 50]).splitlines():
                if line and not line.startswith(("IP changed", "port changed", "no need")):
                    raise OSError(f"HAProxy refused a command: {line}")

    def _say(self, commands: list[str]) -> str:
        """Write commands to the admin socket. Return what it answers."""
        said = ""
        with socket.socket(socket.AF_UNIX) as admin:
            admin.settimeout(5)
            admin.connect(str(self._folder / "admin.sock"))
            admin.sendall(("; ".join(commands) + "\n").encode())
            while part := admin.recv(65536):
                said += part.decode(errors="replace")
        return said


def _set_server(slot: str, address: ServerAddress) -> list[str]:
    host, port = address.grpc.rsplit(":", 1)
    http_host, http_port = address.http.rsplit(":", 1)
    return [
        # Calls in progress to the address before end with it.
        f"set server servers/{slot} state maint",
        f"set server servers/{slot} addr {host.strip('[]')} port {port}",
        f"set server servers/{slot} check-addr {http_host.strip('[]')} port {http_port}",
        f"set server servers/{slot} state ready",
    ]
