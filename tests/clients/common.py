"""What the client tests share: the server's address, a picture, a runner, a proxy that fails on purpose."""

import base64
import http.client
import http.server
import os
import threading
import traceback
import urllib.parse

URL = os.environ["IDEFICS_URL"]
KEY = os.environ["IDEFICS_KEY"]


def picture():
    with open(os.environ["IDEFICS_PICTURE"], "rb") as file:
        return "data:image/jpeg;base64," + base64.b64encode(file.read()).decode()


def run(tests):
    """Runs all tests, says how each went, ends with a status."""
    failed = 0
    for test in tests:
        try:
            test()
            print(f"ok   {test.__name__}")
        except Exception:
            failed += 1
            print(f"FAIL {test.__name__}")
            traceback.print_exc()
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
