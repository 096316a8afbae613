"""`OperatorApi` with an HTTP server that says what a test wants."""

import http.server
import json
import threading

import pytest

from continual_transformers_tf.serving.operator_api import OperatorApi
from continual_transformers_tf.serving.shards import ServerAddress, ShardTable

TABLE = ShardTable.empty().next({"n1": ServerAddress("h:1", "h:2")})


@pytest.fixture
def said():
    """What the server answers to GET, by path: (status, JSON)."""
    return {"/v2/health/ready": (200, {})}


@pytest.fixture
def api(said):
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            status, content = said[self.path]
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(content).encode())

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever).start()
        made = OperatorApi(f"127.0.0.1:{server.server_port}", None, 10)
        yield made
        made.close()
        server.shutdown()


@pytest.mark.parametrize(("more", "applied"), [({}, True), ({"applied": False}, False)])
def test_whether_a_server_has_acted_on_its_table(api, said, more, applied):
    said["/v2/shards"] = (200, {**TABLE.to_json(), "self": "n1", **more})
    assert api.view() == (TABLE, "n1", True, applied)
