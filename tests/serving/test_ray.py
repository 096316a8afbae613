"""`continual-transformers serve --ray`: servers on a Ray cluster of several nodes on loopback."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner
from guards import access, guards
from load_on_cluster import LoadOnCluster

from continual_transformers_tf import cli
from continual_transformers_tf.serving import program, ray_command
from continual_transformers_tf.serving.operator_api import OperatorApi

PORTS = ("--grpc-port", "0", "--http-port", "0")
# So that a lost node and a lost head are noticed within seconds.
SYSTEM = {
    "gcs_rpc_server_reconnect_timeout_s": 3,
    "health_check_failure_threshold": 3,
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 500,
}
TLS = ("--tls-certificate", "x", "--tls-key", "x")
NODE = {"num_cpus": 1, "object_store_memory": 80 << 20}


def test_files_have_the_same_path_on_every_node(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    arguments = ["--token-file", "token", "--tls-key=a/key.pem", "--tls-certificate", "/c.pem"]
    options, models = ray_command.split_arguments([*arguments, "m.safetensors"])
    files = [f"{tmp_path}/token", f"--tls-key={tmp_path}/a/key.pem", "/c.pem"]
    assert options == ["--token-file", files[0], files[1], "--tls-certificate", files[2]]
    assert models == {"m": Path("m.safetensors")}


def test_arguments_are_options_of_the_program_and_models():
    options, models = ray_command.split_arguments(
        ["--journal", "redis://h:1", "--strict-start", "a/b.c.safetensors", "--threads=2", "x=d=e"]
    )
    assert options == ["--journal", "redis://h:1", "--strict-start", "--threads=2"]
    assert models == {"b.c": Path("a/b.c.safetensors"), "x": Path("d=e")}


def test_which_options_have_no_value():
    said = subprocess.run([program.PATH, "--help"], check=True, capture_output=True, text=True)
    # An option's type is in capitals.
    flags = set(re.findall(r"^ +(--[\w-]+) +(?![A-Z]{3})", said.stdout, re.MULTILINE))
    assert flags - set(ray_command.REFUSED) == set(ray_command.FLAGS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--state-dir", "x", "m"], "--state-dir is not for servers on Ray: .*--journal"),
        ([*TLS, "m"], "--tls-certificate needs --ca FILE too"),
        ([*TLS, "--ca=missing.pem", "m"], "No such file.*missing.pem"),
        ([*TLS, "--ca", __file__, "m"], "test_ray.py, expected PEM files"),
        ([*TLS, "--tls-client-ca", "x", "--ca", "x", "m"], "--tls-client-ca needs --certificate"),
        ([*TLS, "--ca", "x", "--key", "x", "m"], "--certificate and --key need each other"),
        ([*TLS, "--ca", "x", "--proxy-port", "9", "m"], "--proxy-port is not for servers with TLS"),
        (["--ca", "x", "m"], "--ca is for servers with TLS: --tls-certificate is missing"),
        (["a/m.safetensors", "b/m.safetensors"], "two models named m"),
        ([], "expected models, or one of --drain"),
        (["--drain", "127.0.0.2", "m"], "expected models, or one of --drain"),
        (["--min-servers", "3", "--max-servers", "2", "m"], "--min-servers 3 is above"),
        (["missing.safetensors"], "No such file.*missing.safetensors"),
        ([__file__], "there is no Ray cluster at 127.0.0.1:1 .*refused"),
    ],
)
def test_arguments_that_do_not_fit(arguments, message):
    pytest.importorskip("ray")
    result = CliRunner().invoke(cli.main, ["serve", "--ray", "127.0.0.1:1", *arguments])
    assert result.exit_code in (1, 2)
    assert re.search(message, result.output, re.DOTALL), result.output


def test_without_the_package_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    result = CliRunner().invoke(cli.main, ["serve", "--ray", "auto", "m.safetensors"])
    assert result.exit_code == 1
    assert "pip install 'continual-transformers-tf[ray]'" in result.output


def test_how_many_servers_there_should_be():
    pytest.importorskip("ray")
    from continual_transformers_tf.serving.ray_controller import Service

    def wanted(nodes, servers, streams, **options):
        service = Service("s", {}, (), False, "/", **options)
        return service.servers_wanted(nodes, servers, streams)

    assert wanted(5, 0, 0) == 5
    assert wanted(5, 5, 0, max_servers=3) == 3
    assert wanted(5, 0, 0, min_servers=2) == 2
    assert wanted(1, 0, 0, min_servers=2) == 1
    by_streams = {"streams_per_server": 100}
    assert wanted(5, 0, 0, **by_streams) == 1
    assert wanted(5, 1, 100, **by_streams) == 1
    assert wanted(5, 1, 101, **by_streams) == 2
    assert wanted(5, 2, 80, **by_streams) == 2  # Not as soon as one would do.
    assert wanted(5, 2, 75, **by_streams) == 1
    assert wanted(5, 2, 1000, **by_streams) == 5
    assert wanted(5, 2, 1000, max_servers=4, **by_streams) == 4
    assert wanted(5, 3, 0, min_servers=2, **by_streams) == 2


def test_a_servers_name_is_of_its_node():
    pytest.importorskip("ray")
    from continual_transformers_tf.serving.ray_controller import server_name

    node_id = "0123456789abcdef" * 3
    assert server_name(None, node_id, [None, "n1"]) == "n01234567"
    assert server_name("n7", node_id, [None]) == "n7"  # As in the table, and in the journal.
    assert server_name("n7", node_id, ["n7"]) == "n01234567"
    assert server_name(None, node_id, ["n01234567"]) == "n012345678"


class RayNodes:
    """A Ray cluster on loopback. Each node has an address of its own."""

    def __init__(self, addresses):
        from ray.cluster_utils import Cluster

        head = {"node_ip_address": addresses[0], "include_dashboard": False, **NODE}
        self.cluster = Cluster(True, head_node_args={"_system_config": SYSTEM, **head})
        self.nodes = {addresses[0]: self.cluster.head_node}
        for address in addresses[1:]:
            self.add(address)
        self.address = self.cluster.address

    def add(self, address):
        self.nodes[address] = self.cluster.add_node(node_ip_address=address, **NODE)

    def kill(self, address):
        """Kill everything of Ray on a node, at once."""
        processes = [p.process for ps in self.nodes[address].all_processes.values() for p in ps]
        raylet = self.nodes[address].all_processes["raylet"][0].process.pid
        for pid in [raylet, *children_of(raylet)]:
            os.kill(pid, signal.SIGKILL)
        for process in processes:
            process.kill()
            process.wait(10)

    def end(self):
        import ray

        ray.shutdown()
        for node in self.nodes.values():
            for processes in node.all_processes.values():
                for process in processes:
                    process.process.kill()
                    process.process.wait(10)
        self.cluster.shutdown()


def children_of(pid):
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            found.append(int(stat.parent.name))
    return found


@pytest.fixture
def start_nodes(monkeypatch):
    """Return a function that starts a Ray cluster with nodes of these addresses."""
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    # Else a node takes the machine's address, not loopback's.
    monkeypatch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    pytest.importorskip("ray")
    made = []

    def start(*addresses):
        made.append(RayNodes(addresses))
        return made[-1]

    yield start
    for nodes in made:
        nodes.end()


@pytest.fixture
def servers_that_run_on(tmp_path):
    """Kill the servers that a test has left."""
    yield
    for pid in [*tmp_path.glob("nodes/*/*/pid"), *tmp_path.glob("nodes/*/*/haproxy/haproxy.pid")]:
        try:
            os.kill(int(pid.read_text()), signal.SIGKILL)
        except (OSError, ValueError):
            continue


def wait_for(service, condition, seconds=60):
    """Wait until a condition on the nodes, by address, holds. Return them."""
    end = time.monotonic() + seconds
    while True:
        nodes = {node["node"]: node for node in service.status()["nodes"]}
        if condition(nodes):
            return nodes
        assert time.monotonic() < end, (nodes, list(service.events(follow=False))[-20:])
        time.sleep(0.1)


def serve(address, *arguments):
    """Run the command. Return what it says."""
    command = [sys.executable, "-m", "continual_transformers_tf.cli", "serve", "--ray", address]
    done = subprocess.run(
        [*command, *map(str, arguments)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def serving(*addresses):
    def condition(nodes):
        have = {a for a, node in nodes.items() if node["state"] == "serving" and node["shards"]}
        return have == set(addresses)

    return condition


def runs(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.usefixtures("servers_that_run_on")
def test_streams_outlive_whatever_happens_to_a_ray_cluster(
    start_nodes, redis, model_file, tmp_path
):
    a, b, c, d, e = (f"127.0.0.{i}" for i in range(1, 6))
    nodes = start_nodes(a, b, c, d)
    command = ("--node-dir", tmp_path / "nodes", "--journal", redis, *PORTS, model_file)
    said = serve(nodes.address, "--detach", *command)
    urls = json.loads(said[said.index("Client(") + 7 : said.index("])") + 1])
    assert len(urls) == 4

    import ray

    from continual_transformers_tf.serving import on_ray

    on_ray.connect(nodes.address)
    service = on_ray.RayService("streams")
    before = wait_for(service, serving(a, b, c, d))
    assert sorted(node["shards"] for node in before.values()) == [64, 64, 64, 64]
    load = LoadOnCluster(urls, model_file)
    try:
        load.wait_for(7)

        # Another node joins.
        nodes.add(e)
        wait_for(service, serving(a, b, c, d, e))
        load.wait_for(3)

        # A node is drained, and gets a server again.
        assert service.drain(c)
        wait_for(service, serving(a, b, d, e))
        assert not runs(before[c]["pid"])
        load.wait_for(3)
        service.resume(c)
        wait_for(service, serving(a, b, c, d, e))

        # A node is lost, with its server.
        nodes.kill(d)
        os.kill(before[d]["pid"], signal.SIGKILL)
        load.wait_for(3)
        wait_for(service, serving(a, b, c, e))

        # A server hangs: it is killed, and started again.
        os.kill(before[b]["pid"], signal.SIGSTOP)
        load.wait_for(3)
        now = wait_for(
            service,
            lambda ns: serving(a, b, c, e)(ns) and ns[b]["pid"] not in (None, before[b]["pid"]),
        )
        assert not runs(before[b]["pid"])
        load.wait_for(3)

        # A server dies: it is started again at once.
        os.kill(now[e]["pid"], signal.SIGKILL)
        load.wait_for(3)
        now = wait_for(
            service,
            lambda ns: serving(a, b, c, e)(ns) and ns[e]["pid"] not in (None, now[e]["pid"]),
        )

        # The controller dies, and a new one goes on.
        epoch = service.status()["epoch"]
        ray.kill(ray.get_actor("streams"), no_restart=False)
        load.wait_for(3)
        again = wait_for(service, serving(a, b, c, e))
        assert {x: again[x]["pid"] for x in again} == {x: now[x]["pid"] for x in again}
        assert service.status()["epoch"] >= epoch

        # The head is lost, and then all of Ray: by itself, the rest would end after a minute or
        # more. The servers go on.
        ray.shutdown()
        for node in (a, b, c, e):
            nodes.kill(node)
            load.wait_for(3)
        assert all(runs(node["pid"]) for node in again.values())

        # Another Ray cluster on the same machines adopts them.
        nodes.end()
        nodes = start_nodes(a, b, c, e)
        serve(nodes.address, "--detach", *command)
        on_ray.connect(nodes.address)
        service = on_ray.RayService("streams")
        adopted = wait_for(service, serving(a, b, c, e))
        assert {x: adopted[x]["pid"] for x in again} == {x: again[x]["pid"] for x in again}
        load.wait_for(3)
        assert service.drain(b)
        load.wait_for(3)
    finally:
        load.stop()
    assert "ended" not in serve(nodes.address, "--status")
    serve(nodes.address, "--end")
    assert not any(runs(node["pid"]) for node in adopted.values())
    with pytest.raises(LookupError, match="no service streams runs"):
        on_ray.RayService("streams")


@pytest.mark.slow
@pytest.mark.usefixtures("servers_that_run_on")
def test_servers_follow_the_open_streams_and_end_with_the_command(
    start_nodes, model_file, tmp_path, samples
):
    import continual_transformers_tf as ct

    a, b = "127.0.0.1", "127.0.0.2"
    nodes = start_nodes(a, b)
    command = [sys.executable, "-m", "continual_transformers_tf.cli", "serve"]
    command += ["--ray", nodes.address, "--node-dir", tmp_path / "nodes", *PORTS]
    command += ["--streams-per-server", "20", model_file]
    running = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        events = iter(running.stderr)
        assert any("To connect" in line for line in events)

        from continual_transformers_tf.serving import on_ray

        on_ray.connect(nodes.address)
        service = on_ray.RayService("streams")
        first = wait_for(service, serving(b))  # The head's turn is the last.
        names = [f"s{i}" for i in range(30)]
        with ct.serving.Client(first[b]["grpc"]) as client:
            client.step(samples(30, 6), names, [0] * 30, start=True)
            both = wait_for(service, serving(a, b))
            client.step(samples(30, 6), names, [1] * 30)
            client.step(samples(30, 6), names, [2] * 30, end=True)
            wait_for(service, lambda ns: {ns[a]["state"], ns[b]["state"]} == {"serving", "spare"})
            assert client.open("one more").step(samples(6)).shape == (3,)
        # The command prints it.
        assert any('"event": "server_stopped"' in line for line in events)
        running.terminate()
        assert any("ending the servers" in line for line in events)
        assert running.wait(60) == 0
        assert not any(runs(node["pid"]) for node in both.values())
    finally:
        running.kill()
        running.wait()


@pytest.mark.slow
@pytest.mark.usefixtures("servers_that_run_on")
def test_servers_with_certificates_and_a_token(
    monkeypatch, start_nodes, model_file, certificates, tmp_path
):
    monkeypatch.chdir(certificates)
    a, b, c = (f"127.0.0.{i}" for i in range(1, 4))
    nodes = start_nodes(a, b)
    options = [*guards(Path()), "--ca", "ca.pem", "--certificate", "client.pem"]
    options += ["--key", "client.key", "--node-dir", tmp_path / "nodes", *PORTS]
    said = serve(nodes.address, "--detach", *options, model_file)
    urls = json.loads(said[said.index("Client(") + 7 : said.index("])") + 1])

    from continual_transformers_tf.serving import on_ray

    on_ray.connect(nodes.address)
    service = on_ray.RayService("streams")
    wait_for(service, serving(a, b))
    load = LoadOnCluster(urls, model_file, **access(certificates))
    try:
        load.wait_for(7)
        nodes.add(c)
        now = wait_for(service, serving(a, b, c))
        load.wait_for(3)
        assert service.drain(a)
        load.wait_for(3)
    finally:
        load.stop()
    serve(nodes.address, "--end")
    assert not any(runs(node["pid"]) for node in now.values())


def test_an_operators_token_is_of_its_server_only(start_sharded):
    server = start_sharded()
    for token, ok in (("an operator's secret", True), ("another", False), (None, False)):
        api = OperatorApi(f"127.0.0.1:{server.http_port}", token, 10)
        try:
            api.foreign_streams("small")
            got = True
        except RuntimeError:
            got = False
        assert got == ok
