"""What the client tests share: addresses, pictures, a runner, a proxy that fails on purpose, a server that is full."""

import base64
import contextlib
import faulthandler
import http.client
import http.server
import os
import socket
import threading
import traceback
import urllib.parse

URL = os.environ["IDEFICS_URL"]
KEY = os.environ["IDEFICS_KEY"]
# A server that takes one request at a time.
NARROW_URL = os.environ["IDEFICS_NARROW_URL"]
# Nothing here takes long; what hangs is a failure that says where.
SECONDS = 240


def picture(part=1.0):
    """A picture as an address; less than all of it is a broken one."""
    with open(os.environ["IDEFICS_PICTURE"], "rb") as file:
        data = file.read()
    return "data:image/jpeg;base64," + base64.b64encode(data[: int(len(data) * part)]).decode()


def raises(kind, work):
    """The error that a call must end in."""
    try:
        result = work()
    except kind as error:
        return error
    raise AssertionError(f"expected {kind.__name__}, got {result}")


def run(tests):
    """Runs all tests, says how each went, ends with a status."""
    faulthandler.dump_traceback_later(SECONDS, exit=True)
    failed = 0
    for test in tests:
        try:
            test()
            print(f"ok   {test.__name__}")
        except Exception:
            failed += 1
            print(f"FAIL {test.__name__}")
            traceback.print_exc()
    faulthandler.cancel_dump_traceback_later()
    raise SystemExit(1 if failed else 0)


class Flaky:
    """Stands before the server; answers the first `failures` requests with 503, passes the others on."""

    def __init__(self, failures):
        self.requests = 0
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["content-length"]))
                outer.requests += 1
                if outer.requests <= failures:
                    self.send_response(503)
                    self.send_header("retry-after", "0")
                    self.send_header("content-length", "0")
                    self.end_headers()
                    return
                target = urllib.parse.urlsplit(URL)
                connection = http.client.HTTPConnection(target.hostname, target.port)
                headers = {name: self.headers[name] for name in ("authorization", "content-type")}
                connection.request("POST", self.path, body, headers)
                reply = connection.getresponse()
                content = reply.read()
                self.send_response(reply.status)
                self.send_header("content-type", reply.headers["content-type"])
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"


@contextlib.contextmanager
def full_server():
    """Takes the one place of the narrow server: a request whose body never comes. Yields what gives it back."""
    target = urllib.parse.urlsplit(NARROW_URL)
    with socket.create_connection((target.hostname, target.port), timeout=20) as connection:
        head = f"POST /generate HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {KEY}\r\n"
        connection.sendall(f"{head}content-type: application/json\r\ncontent-length: 10\r\nexpect: 100-continue\r\n\r\n".encode())
        # The server asks for the body once the request has its place.
        assert connection.recv(100).startswith(b"HTTP/1.1 100"), "the place was not taken"
        yield connection.close
