#!/usr/bin/env python3
"""Fuzzing: every reader of bytes from outside returns, or raises only the errors that it documents.

    python tests/fuzz.py [target ...] [--seconds 10] [--seed 1]

Each target gets mutations of recorded inputs, and those that reach new lines of the program (Python 3.12 and newer)
are mutated further. A finding is any other exception, an input that takes more than SLOW seconds of the processor, or
one that needs more memory than MEMORY. It is printed as Python code, and the exit status is 1.
"""

import argparse
import contextlib
import gzip
import http.client
import io
import json
import logging
import os
import random
import resource
import sys
import tempfile
import time
import traceback
from pathlib import Path
from types import SimpleNamespace

from fake_daemon import (
    DATA,
    END_HEADERS,
    END_STREAM,
    GOAWAY,
    HEADERS,
    PING,
    RESET,
    RESPONSE_HEADERS,
    SETTINGS,
    TRAILERS_NOT_FOUND,
    TRAILERS_OK,
    Image,
    Index,
    frame,
    message,
    varint,
)
from program import MODULE

sys.path.insert(0, str(MODULE.parent))
import k3d_registry_dockerd as module
from k3d_registry_dockerd import Digest, Engine, EngineHost, RegistryError

SLOW = 5                        # seconds of the processor for one input
MEMORY = 1024 * 1024 * 1024     # bytes of address space
INPUT_LIMIT = 1024 * 1024       # bytes of an input
CORPUS_LIMIT = 500              # inputs that reached new lines

IMAGE = Image()
DIGEST = Digest.parse(IMAGE.digest)


# ---- inputs


class Mutator:
    """Makes new inputs out of old ones."""

    NUMBERS = (0, 1, 0x7F, 0x80, 0xFF)
    TOKENS = (b"", b"\0", b"\xff" * 9 + b"\x01", b"\r\n", b"\n", b"{}", b"[]", b"null", b"-1", b"1e999", b'""',
              b"1" * 5000, b"[" * 5000, b'{"a":' * 500, b"\xff\xfe", b"=", b",", b"-", b"/", b"..", b":", b"@", b" ",
              b"\\ud800", b"%00", b"Infinity", b"NaN", b"9223372036854775808", b"true")

    def __init__(self, seed, corpus):
        self.random, self.corpus = random.Random(seed), list(corpus)

    def next(self):
        data = bytearray(self.random.choice(self.corpus))
        for _ in range(self.random.choice((0, 1, 1, 1, 2, 3, 5, 10))):
            self.random.choice((self.flip, self.set, self.drop, self.repeat, self.insert, self.splice, self.cut))(data)
        return bytes(data[:INPUT_LIMIT])

    def span(self, data):
        """Return the start and end of some part of the data, mostly a short one."""
        start = self.random.randint(0, len(data))
        return start, min(len(data), start + self.random.choice((1, 2, 4, 8, 64, len(data))))

    def flip(self, data):
        if data:
            data[self.random.randrange(len(data))] ^= 1 << self.random.randrange(8)

    def set(self, data):
        if data:
            data[self.random.randrange(len(data))] = self.random.choice((*self.NUMBERS, self.random.randrange(256)))

    def drop(self, data):
        start, end = self.span(data)
        del data[start:end]

    def repeat(self, data):
        start, end = self.span(data)
        data[start:start] = data[start:end] * self.random.choice((1, 2, 10, 200))
        del data[INPUT_LIMIT:]

    def insert(self, data):
        start, end = self.span(data)
        data[start:self.random.choice((start, end))] = self.random.choice(self.TOKENS)

    def splice(self, data):
        other = self.random.choice(self.corpus)
        start, end = self.span(other)
        at = self.random.randint(0, len(data))
        data[at:self.random.choice((at, len(data)))] = other[start:end]

    def cut(self, data):
        del data[self.random.randint(0, len(data)):]


class Coverage:
    """Tells when an input reaches lines of the program that none has reached before."""

    TOOL = 4

    def __init__(self):
        self.count = 0
        if hasattr(sys, "monitoring"):
            sys.monitoring.use_tool_id(self.TOOL, "fuzz")
            sys.monitoring.register_callback(self.TOOL, sys.monitoring.events.LINE, self.line)
            sys.monitoring.set_events(self.TOOL, sys.monitoring.events.LINE)

    def line(self, code, number):
        self.count += code.co_filename == module.__file__
        return sys.monitoring.DISABLE


# ---- targets


TARGETS = {}


def target(*seeds, errors=()):
    """Register a function of bytes as a target, with recorded inputs and the errors that it may raise."""
    def register(function):
        TARGETS[function.__name__.replace("_", "-")] = SimpleNamespace(
            run=function, seeds=[seed if isinstance(seed, bytes) else seed.encode() for seed in seeds], errors=errors)
        return function

    return register


class Connection:
    """A socket whose peer has sent some bytes, and takes all that it gets."""

    def __init__(self, data):
        self.recv = io.BytesIO(data).read

    def sendall(self, data):
        pass

    def close(self):
        pass


def field(number, value):
    return varint(number << 3 | 2) + varint(len(value)) + value


START = frame(SETTINGS, 0, 0) + frame(HEADERS, END_HEADERS, 1, RESPONSE_HEADERS)
END = frame(HEADERS, END_HEADERS | END_STREAM, 1, TRAILERS_OK)
DESCRIPTION = message(field(1, field(1, IMAGE.digest.encode()) + b"\x10\x05" + field(
    5, field(1, b"containerd.io/distribution.source.docker.io") + field(2, b"library/app,team/app"))))


@target(START + frame(DATA, 0, 1, DESCRIPTION) + END,
        START + frame(DATA, 0, 1, message(b"\x08\0" + field(2, b"conte"))) + END,
        START + frame(DATA, 8, 1, b"\x02" + message(field(2, b"con")) + b"\0\0")
        + frame(DATA, 0, 1, message(field(2, b"te"))) + END,
        START + frame(HEADERS, END_HEADERS | END_STREAM, 1, TRAILERS_NOT_FOUND),
        START + frame(PING, 0, 0, bytes(8)) + frame(GOAWAY, 0, 0, bytes(8)), START + frame(RESET, 0, 1, bytes(4)),
        START + frame(HEADERS, 0x28, 1, b"\0" + bytes(5)) + frame(9, END_HEADERS, 1, b"abc"),
        errors=(RegistryError,))
def content_service(data):
    """HTTP/2, gRPC and protobuf of Docker's content service."""
    engine = Engine(EngineHost(path="/nowhere"))
    engine.open_grpc = lambda: Connection(data)
    service = module.ContentService(engine, Path("/nowhere"))
    for call in (service.find, service.origins, lambda digest: list(service.read(digest, 0, 5))):
        with contextlib.suppress(RegistryError):
            call(DIGEST)
    call = module.GrpcCall(Connection(data))
    with contextlib.suppress(module.Http2Error, module.GrpcError):
        for answer in call.answers("/", b""):
            module.decode_fields(answer)


class Response:
    """An answer of the engine: a status and a body."""

    def __init__(self, data, status=200):
        file = io.BytesIO(data)
        self.status, self.read1, self.readinto = status, file.read1, file.readinto


@target(IMAGE.export(), IMAGE.docker_archive(), Index({"amd64": IMAGE}).export(),
        Index({"amd64": IMAGE, "arm64": Image("other")}, ["arm64"]).export(),
        IMAGE.export()[:3000] + b'{"message":"it broke"}', errors=(RegistryError,))
def export(data):
    """The tar of docker save."""
    engine = SimpleNamespace(export=lambda _: contextlib.nullcontext(Response(data)))
    with tempfile.TemporaryDirectory() as folder:
        store = module.Store(Path(folder) / "store")
        for image in (DIGEST, Digest.parse(IMAGE.config_digest)):
            with contextlib.suppress(RegistryError):
                module.Exports(engine, store, module.Activity(), int)._export(image, id)
        left = [path.name for path in (store.root / "blobs").rglob(".*")] if store.root.exists() else []
        assert not left, f"temporary files remain: {left}"


@target('{"type":2,"payload":"aGVsbG8="}\n{"type":1,"name":"dir/file","size":5,"payload":"AAAAAAAAAAA="}\n',
        '{"type":1,"name_raw":"ZGlyL2ZpbGU=","size":5,"payload":null}\n{"type":1,"name":"dir"}\n' * 3,
        '{"type":1,"name":"dir/../file","size":5}', '{"type":1,"name":"link","size":5}', '{"type":2,"payload":""}',
        gzip.compress(b'{"type":2,"payload":"aGVsbG8="}\n' * 10, mtime=0), errors=(RegistryError,))
def layer(data):
    """The metadata of a layer of the classic store, compressed or not."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "dir").mkdir()
        (folder / "dir/file").write_bytes(b"hello")
        (folder / "link").symlink_to("/etc/hostname")
        (folder / "tar-split.json.gz").write_bytes(data if data[:2] == b"\x1f\x8b" else gzip.compress(data))
        found = module.Layer(IMAGE.digest, folder, folder)
        with contextlib.closing(found.open(0, found.size, module.Deadline())) as body:
            length = sum(map(len, body))
        assert length == found.size or found.failure, f"{length} bytes instead of {found.size}"


@target(b"5\r\nhello\r\n0\r\n\r\n", b"5;a=b\r\nhello\r\n1 \r\n!\r\n0\r\nX: y\r\n\r\n", b"FFFFFFFFFFFFFFF\r\n",
        errors=(RegistryError,))
def body(data):
    """The chunked body of a request."""
    for name, value in (("Transfer-Encoding", "chunked"), ("Content-Length", str(len(data) + 1))):
        headers = http.client.HTTPMessage()
        headers[name] = value
        with contextlib.suppress(RegistryError):
            read = b"".join(module.RequestBody(headers, io.BufferedReader(io.BytesIO(data)), int))
            assert len(read) < len(data)
    length = http.client.HTTPMessage()
    length["Content-Length"] = data.decode("latin-1")
    module.RequestBody(length, io.BytesIO(), int)


@target("bytes=0-4", "bytes=5-", "bytes=-5", "bytes=0-1,3-4, 6-", "BYTES = 1-2", "bytes=99999999999999999999-",
        errors=(RegistryError,))
def ranges(data):
    """The header Range."""
    for start, length in module.parse_ranges(data.decode("latin-1"), 100) or ():
        assert 0 <= start < start + length <= 100


@target(f"library/app\n{IMAGE.digest}\ndocker.io", "a/b\n1.0\nlocalhost:5000", "quay.io/a\nlatest\n[::1]:1",
        errors=(RegistryError,))
def reference(data):
    """The parts of a reference, a line for each."""
    repository, tag, namespace = (data.decode(errors="replace").split("\n", 2) + ["", ""])[:3]
    found = module.Reference.parse(repository, tag, namespace or None)
    names = repository, "k3d-x:5000"
    assert all(str(one).isprintable() and " " not in str(one) for one in (found, *found.aliases(names)))


@target(IMAGE.digest, "sha512:" + "0" * 128, "md5:abc", errors=(ValueError,))
def digest(data):
    """A digest."""
    assert str(Digest.parse(data.decode(errors="replace"))).encode() == data


@target(IMAGE.manifest, Index({"amd64": IMAGE}).manifest, json.dumps({
    "schemaVersion": 2, "artifactType": "a/b", "annotations": {"a": "b"},
    "subject": json.loads(IMAGE.manifest)["config"],
    "blobs": json.loads(IMAGE.manifest)["layers"], "config": None, "manifests": [{
        "digest": IMAGE.digest, "size": 1, "urls": ["x"], "platform": {"os": "unknown"}}]}),
    json.dumps({"schemaVersion": 1}), errors=(RegistryError,))
def manifest(data):
    """A manifest that is pushed, and one of Docker's, which is not checked."""
    for make in (lambda: module.Manifest.accept(data, None, "sha256"), lambda: module.Manifest(DIGEST, "a/b", data)):
        found = make()
        names = ("config", "layers", "blobs", "manifests")
        found.sizes(*names), found.listed(*names), found.sizes(*names, foreign=True), found.platforms()
        json.dumps(found.referrer())


@target("unix:///var/run/docker.sock", "tcp://127.0.0.1:2375", "tcp://[::1]:1/", "unix://", "127.0.0.1:1",
        errors=(ValueError,))
def engine_host(data):
    """DOCKER_HOST."""
    host = EngineHost.from_environment({"DOCKER_HOST": data.decode(errors="surrogateescape")})
    assert str(host) and 0 <= host.port < 65536


@target('{"auths":{"https://index.docker.io/v1/":{"auth":"dTpw"},"r:1":{"username":"u","password":"p"}}}',
        '{"auths":{"docker.io":{"identitytoken":"t"}},"credsStore":"x","credHelpers":{"r:1":"y"}}', "{}")
def docker_config(data):
    """Docker's config.json. Whatever is in it, there are credentials or there are none."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_bytes(data)
        for registry in ("docker.io", "r:1"):
            found = module.DockerConfig(Path(folder)).credentials(registry)
            assert found is None or (found.for_http().isascii() and found.for_docker(registry).isascii())


@target('{"status":"Downloading","id":"a","progressDetail":{"current":1,"total":2}}\r\n'
        '{"status":"Pull complete","id":"a"}\n',
        '{"status":"x"}\n\n{"errorDetail":{"message":"toomanyrequests"},"error":"y"}\n', '{"message":"not found"}',
        errors=(RegistryError, module.PullFailed))
def pull(data):
    """The messages of a pull."""
    engine = Engine(EngineHost(path="/nowhere"))
    for status in (404, 200):
        progress = module.PullProgress()
        with contextlib.suppress(RegistryError, module.PullFailed):
            for one in engine._messages(Response(data, status), "docker.io/library/app"):
                progress.update(one)
                assert progress.status is not None


# ---- the loop


def fuzz(name, seconds, seed, coverage):
    """Run a target for some seconds. Returns the number of inputs, and those that are findings."""
    one, inputs, findings = TARGETS[name], 0, {}
    mutator, end = Mutator(seed, one.seeds), time.monotonic() + seconds
    while time.monotonic() < end:
        data = one.seeds[inputs] if inputs < len(one.seeds) else mutator.next()
        known, started = coverage.count, time.process_time()
        problem = run(one, data)
        inputs += 1
        if problem is None and time.process_time() - started > SLOW:
            problem = f"took {time.process_time() - started:.1f} s"
        if problem and problem.splitlines()[-1] not in findings:
            findings[problem.splitlines()[-1]] = (problem, data)
        if coverage.count > known and len(mutator.corpus) < CORPUS_LIMIT:
            mutator.corpus.append(data)
    return inputs, findings.values()


def run(one, data):
    """Run a target with an input. Returns what is wrong, or None."""
    try:
        one.run(data)
    except one.errors:
        return None
    except Exception:
        return traceback.format_exc()
    return None


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("targets", nargs="*", metavar="target", help=", ".join(TARGETS))
    parser.add_argument("--seconds", type=float, default=10, help="for each target")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    unknown = set(arguments.targets) - set(TARGETS)
    if unknown:
        parser.error(f"no such target: {', '.join(sorted(unknown))}")
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    os.environ["PATH"] = ""  # no credential helper is run
    logging.disable()
    coverage, failed = Coverage(), False
    for name in arguments.targets or TARGETS:
        inputs, findings = fuzz(name, arguments.seconds, arguments.seed, coverage)
        print(f"{name}: {inputs} inputs, {len(findings)} findings", flush=True)
        for problem, data in findings:
            failed = True
            print(f"{problem}\n{name}({data[:2000]!r}){' # shortened' if len(data) > 2000 else ''}\n", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
