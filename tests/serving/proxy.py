"""A server between a client and a server, which loses what the tests want to be lost."""

import time
from concurrent import futures

import grpc


class Proxy:
    """A server that passes requests on to another one, and loses some of them or their answers.

    Attributes:
        target: The address of the other server.
        faults: What happens to the next requests: None, "lose request", "lose answer", "busy",
            "unsaved", or a number of seconds by which the answer is late.
    """

    def __init__(self, target):
        self.target, self.faults, self.requests = target, [], []
        self._server = grpc.server(futures.ThreadPoolExecutor(4))
        self._server.add_generic_rpc_handlers([self])
        self.url = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def service(self, call):
        return grpc.unary_unary_rpc_method_handler(
            lambda request, context: self._pass_on(call.method, request, context)
        )

    def _pass_on(self, method, request, context):
        fault = None
        if method.endswith("/ModelInfer"):
            self.requests.append(request)
            fault = self.faults.pop(0) if self.faults else None
        if fault == "lose request":
            context.abort(grpc.StatusCode.UNAVAILABLE, "the request is lost")
        if fault == "busy":
            context.set_trailing_metadata([("reason", "queue_full")])
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "1000 requests wait already")
        with grpc.insecure_channel(self.target) as channel:
            # It ends when the client's call does. A call that watches the server's health would
            # keep this thread for ever.
            call = channel.unary_unary(method).future(request)
            if not context.add_callback(call.cancel):
                call.cancel()
            try:
                answer = call.result()
            except grpc.FutureCancelledError:
                context.abort(grpc.StatusCode.CANCELLED, "the client has gone")
            except grpc.RpcError as error:
                context.set_trailing_metadata(error.trailing_metadata())
                context.abort(error.code(), error.details())
        if fault == "unsaved":  # The steps were taken, but a journal or snapshot cannot be written.
            context.set_trailing_metadata([("reason", "unavailable")])
            context.abort(grpc.StatusCode.UNAVAILABLE, "the steps could be lost")
        if fault == "lose answer":
            context.abort(grpc.StatusCode.UNAVAILABLE, "the answer is lost")
        if fault:
            time.sleep(fault)
        return answer

    def stop(self):
        self._server.stop(None).wait()
