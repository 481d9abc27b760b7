"""The registry that an image comes from, for the program's requests for content: a real HTTP server, without TLS."""

import contextlib
import http.server
import socket
import threading

from fake_daemon import OCI_MANIFEST, sha256

# By default Docker treats registries in this network as insecure, and contacts them without TLS.
INSECURE = {"RegistryConfig": {"IndexConfigs": {}, "InsecureRegistryCIDRs": ["127.0.0.0/8"]}}


class Handler(http.server.BaseHTTPRequestHandler):
    def handle(self):
        if self.connection.recv(1, socket.MSG_PEEK) != b"\x16":  # a TLS handshake
            super().handle()

    def do_GET(self):
        origin = self.server.origin
        kind, digest = self.path.split("/")[-2:]
        with origin.lock:
            origin.requests.append(f"{kind}/{digest}")
        data = origin.content.get(digest)
        if origin.authorization not in (None, self.headers["Authorization"]):
            self.answer(401, [], 0, ("WWW-Authenticate", 'Basic realm="origin"'))
        elif data is None:
            self.answer(404, [], 0)
        else:
            media_type = OCI_MANIFEST if kind == "manifests" else "application/octet-stream"
            self.answer(200, origin.answers.get(digest, lambda data: [data])(data), len(data),
                        ("Content-Type", media_type))

    def answer(self, status, pieces, length, *headers):
        self.send_response(status)
        for name, value in (*headers, ("Content-Length", str(length))):
            self.send_header(name, value)
        self.end_headers()
        with contextlib.suppress(OSError):
            for piece in pieces:
                self.wfile.write(piece)

    def log_message(self, *_):
        pass


class Origin:
    """The registry. Use it in a `with`. Its attributes can be changed at any time.

    content        digest -> bytes
    answers        digest -> a callable that gets the bytes and yields the pieces to send
    authorization  the Authorization header without which the status is 401
    requests       the kinds and digests of the requests so far
    """

    def __init__(self, *images):
        self.content, self.answers, self.authorization = {}, {}, None
        for image in images:
            self.content.update(image.blobs)
        self.requests = []
        self.lock = threading.Lock()  # guards the list

    def hold(self, data, event, rest=lambda rest: rest):
        """Send half of this content, wait for an event, and send rest(the other half)."""
        def pieces(data):
            half = len(data) // 2
            yield data[:half]
            event.wait(60)
            yield rest(data[half:])

        self.answers[sha256(data)] = pieces

    def __enter__(self):
        self.server = http.server.ThreadingHTTPServer(("127.0.0.2", 0), Handler)  # not an alias of localhost
        self.server.origin = self
        self.host = f"127.0.0.2:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.server.shutdown()
        self.server.server_close()
