"""A Docker daemon that fails on demand: a real server on a unix socket, with recorded responses of a real daemon.

All its responses in the absence of faults were recorded from Docker 28.5; test_engines.py checks the same behaviour
on real engines. The tests add the faults.
"""

import contextlib
import hashlib
import io
import json
import re
import socketserver
import struct
import tarfile
import tempfile
import threading
import urllib.parse
from pathlib import Path

OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX = "application/vnd.oci.image.index.v1+json"

# Blocks of HTTP/2 headers as Docker 28.5.2 sends them: those of a response, and its trailers with status 0 and 5.
RESPONSE_HEADERS = bytes.fromhex(
    "20880f108b1d75d0620d263d4c4d656400854d833505b388c565645b72469b5100854d833505b389c565645b415081cc5f00854d833505b3"
    "91c565645b72469b50b5f2a466a10b5d355f")
TRAILERS_OK = bytes.fromhex("00889acac8b21234da8f0130")
TRAILERS_NOT_FOUND = bytes.fromhex(
    "00899acac8b5254207317fd8b2b2285b2c3d971421e42a9029a4e9c27b6a91490a822902843d492d4952434c5425444e3136e5c000000000"
    "00000000000000000000000000000000000000000000000000000000000000000000000000000b8a5474a929edaa4f00889acac8b21234da"
    "8f0135")
# The response to the HTTP/2 preface of an engine that does not support HTTP/2 by prior knowledge.
NO_HTTP2 = (b"HTTP/1.1 301 Moved Permanently\r\nLocation: /%2A\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")

DATA, HEADERS, RESET, SETTINGS, PING, GOAWAY = 0, 1, 3, 4, 6, 7
END_STREAM, END_HEADERS = 1, 4
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


def sha256(data):
    return "sha256:" + hashlib.sha256(data).hexdigest()


def frame(kind, flags, stream, payload=b""):
    """An HTTP/2 frame."""
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def message(data):
    """Return a gRPC message with this payload."""
    return struct.pack(">BI", 0, len(data)) + data


def varint(number):
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes((*out, number))


def fields_of(data):
    """Return the fields of a protobuf message of short strings and integers."""
    fields, at = {}, 0

    def number():
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            value, at, shift = value | (byte & 127) << shift, at + 1, shift + 7
            if byte < 128:
                return value

    while at < len(data):
        key = number()
        if key & 7 == 0:
            fields[key >> 3] = number()
        else:
            length = number()
            fields[key >> 3] = data[at:at + length].decode()
            at += length
    return fields


class Image:
    """An image in all forms that an engine keeps or exports. It has one layer of its own on top of those in below."""

    def __init__(self, text="hello", below=()):
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w") as archive:
            member = tarfile.TarInfo("file")
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text.encode()))
        self.layer = out.getvalue()
        layers = [*below, self.layer]
        root = {"type": "layers", "diff_ids": [sha256(layer) for layer in layers]}
        self.config = json.dumps({"architecture": "amd64", "os": "linux", "config": {}, "rootfs": root}).encode()
        self.manifest = json.dumps({
            "schemaVersion": 2, "mediaType": OCI_MANIFEST,
            "config": {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": sha256(self.config),
                       "size": len(self.config)},
            "layers": [{"mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": sha256(layer),
                        "size": len(layer)} for layer in layers]}).encode()
        self.digest, self.config_digest = sha256(self.manifest), sha256(self.config)
        self.blobs = {sha256(data): data for data in (*layers, self.config, self.manifest)}

    def export(self, leave_out=(), replace=()):
        """Return the tar of `docker save`: an OCI layout, in the order of the classic store."""
        blobs = {digest: data for digest, data in sorted(self.blobs.items()) if digest not in leave_out}
        blobs.update(replace)
        index = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [
            {"mediaType": OCI_MANIFEST, "digest": self.digest, "size": len(self.manifest)}]}
        return tar_of({**{f"blobs/{digest.replace(':', '/')}": data for digest, data in blobs.items()},
                       "index.json": json.dumps(index).encode(), "oci-layout": b'{"imageLayoutVersion":"1.0.0"}'})

    def docker_archive(self):
        """Return the tar of `docker save` before Docker 25: a config and layers under other names, and no manifest."""
        config = self.config_digest.split(":")[1] + ".json"
        listing = [{"Config": config, "RepoTags": None, "Layers": ["aa/layer.tar"]}]
        return tar_of({"aa/layer.tar": self.layer, "aa/json": b"{}", "aa/VERSION": b"1.0", config: self.config,
                       "manifest.json": json.dumps(listing).encode()})


class Index:
    """An image of several platforms in the containerd store: all its blobs, except those of missing platforms."""

    def __init__(self, images, left_out=()):
        """images are the images by architecture; left_out are the architectures that are missing."""
        self.layer = next(iter(images.values())).layer
        self.manifest = json.dumps({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [
            {"mediaType": OCI_MANIFEST, "digest": image.digest, "size": len(image.manifest),
             "platform": {"os": "linux", "architecture": name}} for name, image in images.items()]}).encode()
        self.digest = sha256(self.manifest)
        self.blobs = {self.digest: self.manifest}
        for name, image in images.items():
            self.blobs.update({} if name in left_out else image.blobs)

    def export(self):
        """Return the tar of `docker save`: an OCI layout."""
        index = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [
            {"mediaType": OCI_INDEX, "digest": self.digest, "size": len(self.manifest)}]}
        return tar_of({**{f"blobs/{digest.replace(':', '/')}": data for digest, data in sorted(self.blobs.items())},
                       "index.json": json.dumps(index).encode(), "oci-layout": b'{"imageLayoutVersion":"1.0.0"}'})


def tar_of(files):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return out.getvalue()


def http_answer(status, body, content_type="application/json"):
    if not isinstance(body, bytes):
        body = json.dumps(body).encode()
    return (f"HTTP/1.1 {status} X\r\nApi-Version: 1.51\r\nContent-Type: {content_type}\r\n"
            f"Content-Length: {len(body)}\r\n\r\n").encode() + body


def chunked(body, status=200):
    """Return a response as Docker streams it: without a length, in chunks of 32 KiB."""
    chunks = [body[i:i + 32768] for i in range(0, len(body), 32768)]
    return (f"HTTP/1.1 {status} OK\r\nContent-Type: application/x-tar\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
            + b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks) + b"0\r\n\r\n")


class Slow:
    """A connection to a client that sends what its daemon's `slow` says, as long as that is set.

    "hung" sends nothing, "cut" the first half of each answer, and "trickle" a byte from time to time; all of them until
    the daemon's event `released` is set, and nothing of the rest.
    """

    PAUSE = 0.05  # seconds between two bytes

    def __init__(self, sock, daemon):
        self._sock, self._daemon = sock, daemon

    def __getattr__(self, name):
        return getattr(self._sock, name)

    def sendall(self, data):
        if self._daemon.slow is None:
            return self._sock.sendall(data)
        if self._daemon.slow == "cut":
            self._sock.sendall(data[:len(data) // 2])
        for byte in data[:-1] if self._daemon.slow == "trickle" else b"":
            self._sock.sendall(bytes([byte]))
            if self._daemon.released.wait(self.PAUSE):
                break
        self._daemon.released.wait()
        raise ConnectionResetError("released")


class FakeDaemon:
    """The daemon. Use it in a `with`. Its attributes can be changed at any time.

    images    name, as in requests to Docker -> Image
    content   digest -> bytes, served by the content service
    store     "containerd" or "classic"
    grpc      how clients reach the content service: "upgrade", "prior" knowledge, or None
    pulls     reference -> the response to its pull: raw bytes of HTTP, or a callable that returns them
    origins   reference -> the digest that its registry has for it now, as Docker would find it
    info      more fields of /info
    faults    text in the request line -> raw bytes to send, or a callable that gets the socket
    reading   a callable that gets (socket, stream, digest, requested part) and handles Read instead of the daemon
    slow      how it answers from now on: see Slow
    requests  the request lines so far; `read`: the digests of Read requests; `heads`: the complete heads
    """

    def __init__(self, store="containerd", grpc="upgrade"):
        self.store, self.grpc = store, grpc
        self.images, self.content, self.pulls, self.faults = {}, {}, {}, {}
        self.exports, self.origins, self.info, self.held = {}, {}, {}, {}
        self.reading = self.slow = None
        self.released = threading.Event()
        self.version = {}
        self.requests, self.heads, self.read = [], [], []
        self.connections = 0
        self._lock = threading.Lock()  # guards the counter and the lists

    def add(self, name, image, export=None):
        """Add an image under a name, and its content."""
        self.images[name] = image
        if self.store == "containerd":
            self.content.update(image.blobs)
        self.exports[self.id_of(image)] = export or image.export()
        return image

    def hold(self, text):
        """Hold the answers to requests that contain a text. Returns two events: the first request has come; go on."""
        asked, go_on = threading.Event(), threading.Event()

        def answer(sock, line, head):
            asked.set()
            go_on.wait(60)
            answer = self._answer(line, head)
            return answer(sock) if callable(answer) else answer

        self.held[text] = answer
        return asked, go_on

    def id_of(self, image):
        return image.digest if self.store == "containerd" else image.config_digest

    def __enter__(self):
        self._stack = contextlib.ExitStack()
        folder = self._stack.enter_context(tempfile.TemporaryDirectory())
        self.path = f"{folder}/docker.sock"
        self.start()
        return self

    def start(self):
        fake = self

        class Connection(socketserver.BaseRequestHandler):
            def handle(self):
                with contextlib.suppress(OSError):
                    fake._serve(self.request)

        class Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
            daemon_threads = True
            request_queue_size = 128

        self.server = Server(self.path, Connection)
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def stop(self):
        self.server.shutdown()
        self.server.server_close()
        Path(self.path).unlink()

    def restart(self, store):
        """Start again at the same socket with another image store, which is empty."""
        self.stop()
        self.store, self.images, self.content = store, {}, {}
        self.start()

    def __exit__(self, *error):
        self.released.set()
        if Path(self.path).exists():
            self.stop()
        self._stack.close()

    @property
    def host(self):
        return f"unix://{self.path}"

    # --- HTTP/1.1

    def _serve(self, sock):
        sock = Slow(sock, self)
        with self._lock:
            self.connections += 1
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            byte = sock.recv(1)
            if not byte:
                return
            head += byte
        line = head.split(b"\r\n", 1)[0].decode()
        with self._lock:
            self.requests.append(line)
            self.heads.append(head.decode())
        held = next((held for text, held in self.held.items() if text in line), None)
        answer = next((fault for text, fault in self.faults.items() if text in line), None)
        if held and answer is None:
            answer = held(sock, line, head)
        if answer is None:
            answer = self._answer(line, head)
        if callable(answer):
            answer = answer(sock)
        if answer:
            sock.sendall(answer)

    def _answer(self, line, head):
        method, target, _ = line.split(" ")
        if method == "PRI":
            return self._grpc if self.grpc == "prior" else NO_HTTP2
        url = urllib.parse.urlsplit(target)
        path = url.path.split("/", 2)[2] if url.path.startswith("/v1.") else url.path[1:]
        query = dict(urllib.parse.parse_qsl(url.query))
        if path == "version":
            return http_answer(200, {"Version": "28.5.2", "ApiVersion": "1.51", "MinAPIVersion": "1.24",
                                     **self.version})
        if path == "info":
            status = [["driver-type", "io.containerd.snapshotter.v1"]] if self.store == "containerd" else [
                ["Backing Filesystem", "extfs"], ["Supports d_type", "true"]]
            known = {"ID": "5c9fd3f1", "DriverStatus": status, "DockerRootDir": "/nowhere"}
            return http_answer(200, {**known, **self.info})
        if path == "grpc":
            if self.grpc == "upgrade":
                sock_answer = b"HTTP/1.1 101 UPGRADED\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n"
                return lambda sock: (sock.sendall(sock_answer), self._preface(sock), self._grpc(sock))[2]
            return http_answer(404, {"message": "page not found"})
        if path == "images/json":
            wanted = json.loads(query.get("filters", "{}")).get("reference")
            return http_answer(200, [{"Id": self.id_of(image), "RepoTags": [name], "RepoDigests": []}
                                     for name, image in self.images.items()
                                     if wanted is None or re.sub("[:@][^/]*$", "", name) in wanted])
        if path == "images/create":
            return self._pull(query)
        if path.startswith("distribution/"):
            digest = self.origins.get(path.removeprefix("distribution/").removesuffix("/json"))
            if digest:
                return http_answer(200, {"Descriptor": {"mediaType": OCI_MANIFEST, "digest": digest, "size": 1}})
        name = path.removeprefix("images/")
        if name.endswith("/json"):
            return self._inspect(name.removesuffix("/json"))
        if name.endswith("/get"):
            export = self.exports.get(name.removesuffix("/get"))
            return http_answer(404, {"message": f"No such image: {name}"}) if export is None else chunked(export)
        return http_answer(404, {"message": "page not found"})

    def _inspect(self, name):
        short = name.removeprefix("docker.io/").removeprefix("library/")
        for known, image in self.images.items():
            if known in (name, short) or name == self.id_of(image):
                return http_answer(200, {"Id": self.id_of(image), "Size": len(image.layer), "RepoTags": [known],
                                         "RootFS": {"Type": "layers", "Layers": [sha256(image.layer)]}})
        return http_answer(404, {"message": f"No such image: {name}"})

    def _pull(self, query):
        separator = "@" if ":" in query["tag"] else ":"
        reference = f"{query['fromImage']}{separator}{query['tag']}"
        answer = self.pulls.get(reference) or http_answer(
            404, {"message": f'failed to resolve reference "{reference}": {reference}: not found'})
        return answer() if callable(answer) else answer

    # --- HTTP/2 and gRPC, as far as the content service needs them

    @staticmethod
    def _preface(sock):
        receive(sock, len(PREFACE))

    def _grpc(self, sock):
        if self.grpc == "prior":
            receive(sock, len(PREFACE) - len(b"PRI * HTTP/2.0\r\n\r\n"))
        sock.sendall(frame(SETTINGS, 0, 0))
        method = ""
        while True:
            head = receive(sock, 9)
            kind, flags, stream = struct.unpack(">BBI", head[3:])
            payload = receive(sock, int.from_bytes(head[:3], "big"))
            if kind == SETTINGS and not flags & 1:
                sock.sendall(frame(SETTINGS, 1, 0))
            elif kind == HEADERS:
                method = payload.split(b".Content/")[1].split(b"\x00")[0].decode()
            elif kind == DATA:
                self._call(sock, stream, method, fields_of(payload[5:]))

    def _call(self, sock, stream, method, request):
        data = self.content.get(request[1])
        if data is None:
            sock.sendall(frame(HEADERS, END_HEADERS, stream, RESPONSE_HEADERS)
                         + frame(HEADERS, END_HEADERS | END_STREAM, stream, TRAILERS_NOT_FOUND))
            return
        if method == "Info":
            info = b"\x0a" + varint(len(request[1])) + request[1].encode() + b"\x10" + varint(len(data))
            self.answer_call(sock, stream, b"\x0a" + varint(len(info)) + info)
            return
        with self._lock:
            self.read.append(request[1])
        start = request.get(2, 0)
        part = data[start:start + request.get(3, len(data))]
        if self.reading:
            self.reading(sock, stream, request[1], part)
        else:
            self.answer_call(sock, stream, b"\x12" + varint(len(part)) + part)

    @staticmethod
    def answer_call(sock, stream, data):
        """Send the response of a successful call, in frames of 16 KiB."""
        data = message(data)
        frames = [frame(DATA, 0, stream, data[i:i + 16384]) for i in range(0, len(data), 16384)]
        sock.sendall(frame(HEADERS, END_HEADERS, stream, RESPONSE_HEADERS) + b"".join(frames)
                     + frame(HEADERS, END_HEADERS | END_STREAM, stream, TRAILERS_OK))


def receive(sock, count):
    """Read exactly count bytes. Raises ConnectionResetError at the end of the stream."""
    data = b""
    while len(data) < count:
        part = sock.recv(count - len(data))
        if not part:
            raise ConnectionResetError("closed")
        data += part
    return data
