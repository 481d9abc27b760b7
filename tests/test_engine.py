"""Tests of the engine chapter: the Docker Engine API, its messages, and connections to it."""

import base64
import contextlib
import errno
import http.client
import json
import re
import socket
import ssl
import sys
import tempfile
import threading
import unittest
import urllib.parse
from pathlib import Path
from unittest import mock

import fake_daemon
from fake_daemon import FakeDaemon, Image, chunked, http_answer
from program import MODULE

try:
    import trustme
except ImportError:
    trustme = None

sys.path.insert(0, str(MODULE.parent))
import k3d_registry_dockerd as module
from k3d_registry_dockerd import Credentials, Digest, Engine, EngineHost, PullFailed, Reference, RegistryError

NAME = "r.example/team/app"
REFERENCE = Reference.parse("team/app", "1", "r.example")
HTTP_OK = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"


class TestPullFailure(unittest.TestCase):
    """X is the reference, H the registry's host. All of these messages were recorded from Docker."""

    MESSAGES = (
        # no such tag or repository: classic, containerd
        ("MANIFEST_UNKNOWN", 404, "manifest for X not found: manifest unknown: manifest unknown"),
        ("MANIFEST_UNKNOWN", 404, 'failed to resolve reference "X": X: not found'),
        # denied: classic, containerd
        ("DENIED", 404, "pull access denied for X, repository does not exist or may require 'docker login': "
                        "denied: requested access to the resource is denied"),
        ("DENIED", 404, "pull access denied for X, repository does not exist or may require 'docker login'"),
        # Basic registry, no credentials: classic, containerd
        ("DENIED", 500, 'Head "http://H/v2/team/app/manifests/1": no basic auth credentials'),
        ("DENIED", 500, 'failed to resolve reference "X": pull access denied, repository does not exist or may '
                        "require authorization: authorization failed: no basic auth credentials"),
        # wrong password: classic, containerd
        ("DENIED", 401, "unauthorized: authentication required"),
        ("DENIED", 500, 'failed to resolve reference "X": unexpected status from HEAD request to '
                        "http://H/v2/team/app/manifests/1: 401 Unauthorized"),
        ("DENIED", 500, 'failed to resolve reference "X": unexpected status from HEAD request to '
                        "http://H/v2/team/app/manifests/1: 403 Forbidden"),
        # ghcr.io, anonymous or with an expired token
        ("DENIED", 500, 'Head "https://H/v2/team/app/manifests/1": denied'),
        ("DENIED", 500, 'Head "https://H/v2/team/app/manifests/1": denied: denied'),
        # rate limit: classic with either status, containerd
        ("TOOMANYREQUESTS", 500, "toomanyrequests: You have reached your pull rate limit. You may increase the "
                                 "limit by authenticating and upgrading"),
        ("TOOMANYREQUESTS", 429, "toomanyrequests: You have reached your pull rate limit."),
        ("TOOMANYREQUESTS", 429, "whatever"),
        ("TOOMANYREQUESTS", 500, 'failed to resolve reference "X": unexpected status from HEAD request to '
                                 "https://H/v2/team/app/manifests/1: 429 Too Many Requests"),
        ("TOOMANYREQUESTS", 200, "unauthorized: rate limit of anonymous users"),
        # registry down or broken: classic, containerd
        ("ORIGIN_UNAVAILABLE", 500, 'Get "http://H/v2/": dial tcp 127.0.0.1:1: connect: connection refused'),
        ("ORIGIN_UNAVAILABLE", 500, 'failed to resolve reference "X": failed to do request: Head '
                                    '"https://H/v2/team/app/manifests/1": dial tcp: lookup H: no such host'),
        ("ORIGIN_UNAVAILABLE", 500, 'Get "https://H/v2/": http: server gave HTTP response to HTTPS client'),
        ("ORIGIN_UNAVAILABLE", 500, 'Get "https://H/v2/": tls: failed to verify certificate: x509: certificate '
                                    "signed by unknown authority"),
        ("ORIGIN_UNAVAILABLE", 500, 'Get "https://H/v2/": net/http: request canceled while waiting for connection '
                                    "(Client.Timeout exceeded while awaiting headers)"),
        ("ORIGIN_UNAVAILABLE", 500, 'Head "https://H/v2/team/app/manifests/1": EOF'),
        ("ORIGIN_UNAVAILABLE", 500, 'failed to resolve reference "X": unexpected status from HEAD request to '
                                    "https://H/v2/team/app/manifests/1: 503 Service Unavailable"),
        ("ORIGIN_UNAVAILABLE", 200, "read tcp 10.0.0.1:1->10.0.0.2:443: read: connection reset by peer"),
        # other platforms only: classic, containerd
        ("MANIFEST_UNKNOWN", 404, "no matching manifest for linux/amd64 in the manifest list entries"),
        ("MANIFEST_UNKNOWN", 404, 'failed to unpack image: no match for platform in manifest: not found'),
        # bad name, on both
        ("NAME_INVALID", 400, "invalid reference format"),
        ("NAME_INVALID", 400, "invalid reference format: repository name (team/App) must be lowercase"),
        # anything else
        ("ENGINE_FAILED", 500, "write /var/lib/docker/tmp/GetImageBlob1: no space left on device"),
        ("ENGINE_FAILED", 500, "open /var/lib/docker/tmp/GetImageBlob1: permission denied"),
        ("ENGINE_FAILED", 200, ""),
    )

    def test_messages(self):
        for expected, status, text in self.MESSAGES:
            with self.subTest(text, status=status):
                message = text.replace("X", f"{NAME}:1").replace("H/", "r.example/").replace("H:", "r.example:")
                self.assertEqual(expected, module.pull_failure(message, status, NAME))

    def test_phrases_in_names(self):
        """Repository names may contain any phrase. X is the requested name. S is what the classic store prints, which
        is short for images of Docker Hub. P is the repository in the registry."""
        for name, short in (("r.example/unauthorized", None), ("r.example/team/not-found", None),
                            ("r.example/team/eof", None), ("r.example/rate-limit/timeout", None),
                            ("r.example/e", None), ("r.example/found", None), ("r.example/denied", None),
                            ("r.example/unknown", None), ("r.example/tcp/dial", None),
                            ("docker.io/library/eof", "eof"), ("docker.io/library/unauthorized", "unauthorized"),
                            ("docker.io/library/timeout", "timeout")):
            for expected, text in (
                    ("MANIFEST_UNKNOWN", "manifest for S:1 not found: manifest unknown: manifest unknown"),
                    ("MANIFEST_UNKNOWN", 'failed to resolve reference "X:1": X:1: not found'),
                    ("DENIED", "pull access denied for S, repository does not exist or may require 'docker login'"),
                    ("ORIGIN_UNAVAILABLE", 'failed to do request: Head "https://r.example/v2/P/manifests/1": dial tcp '
                                           "127.0.0.1:1: connect: connection refused"),
                    ("DENIED", 'Head "https://r.example/v2/P/manifests/1": no basic auth credentials'),
                    ("ENGINE_FAILED", 'open "/var/lib/docker/tmp/P": no space left on device')):
                with self.subTest(text, name=name):
                    words = {"X": name, "S": short or name, "P": name.split("/", 1)[1]}
                    message = "".join(words.get(word, word) for word in re.split(r"\b", text))
                    self.assertEqual(expected, module.pull_failure(message, 500, name))


class TestPullProgress(unittest.TestCase):
    @staticmethod
    def downloading(layer, current, total, status="Downloading"):
        return {"status": status, "id": layer, "progressDetail": {"current": current, "total": total}}

    @staticmethod
    def line(progress):
        """Return the line of a pull that has taken 10 seconds so far."""
        with mock.patch("time.monotonic", lambda: 100.0), module.Task("pull", "x") as task:
            task.report(progress.layers, progress.status)
        return task.line(110.0)

    def test_lines(self):
        down = self.downloading
        for expected, messages in (
                ("waiting for Docker", []),
                ("pulling from library/alpine", [{"status": "Pulling from library/alpine", "id": "3.20"}]),
                ("45%, 4.5 MB of 10.0 MB, 450.0 kB/s, downloading", [down("a", 4_500_000, 10_000_000)]),
                ("45%, 9.0 MB of 20.0 MB, 900.0 kB/s, downloading",
                 [down("a", 4_500_000, 10_000_000), down("b", 4_500_000, 10_000_000)]),
                ("60%, 6.0 MB of 10.0 MB, 600.0 kB/s, downloading",
                 [down("a", 4_500_000, 10_000_000), down("a", 6_000_000, 10_000_000)]),
                ("100%, 10.0 MB of 10.0 MB, 1.0 MB/s, download complete",
                 [down("a", 1, 10_000_000), {"status": "Download complete", "id": "a", "progressDetail": {}}]),
                ("100%, 10.0 MB of 10.0 MB, 1.0 MB/s, extracting",
                 [down("a", 10_000_000, 10_000_000), down("a", 1, 30_000_000, "Extracting")]),
                ("10%, 1.0 MB of 10.0 MB, 100.0 kB/s, retrying in 5 seconds",
                 [down("a", 1_000_000, 10_000_000), down("a", 5, 0, "Retrying in 5 seconds")]),
                # ignored
                ("extracting", [down("a", 1, 30_000_000, "Extracting")]),
                ("already exists", [{"status": "Already exists", "id": "a"}]),
                ("downloading", [{"status": "Downloading", "id": "a", "progressDetail": {"current": 1}}]),
                ("downloading", [down("a", 1, 0)]),
                ("downloading", [down("a", "1", None)]),
                *(("downloading", [down("a", current, total)]) for current, total in (
                    (-1, 2), (1, -2), (1, 2**63), (2**63, 1), (10**400, 10**400), (1.5, 2.5), (1, float("inf")))),
                ("downloading", [{"status": "Downloading", "id": ["a"], "progressDetail": 5}]),
                ("waiting for Docker", [{"status": 5}, {"status": None}, {}, {"aux": {"Digest": "x"}}])):
            with self.subTest(expected, messages=messages):
                progress = module.PullProgress()
                for message in messages:
                    progress.update(message)
                self.assertEqual(expected, self.line(progress))

    def test_layers_that_are_known_before_docker_reports_them(self):
        """They count from then on, as what Docker says when it reports them."""
        digests = [module.Digest.of(bytes([number])) for number in range(3)]
        progress = module.PullProgress()
        progress.update(self.downloading(digests[0].hex[:12], 1_000_000, 4_000_000))
        progress.expect(dict.fromkeys(digests, 4_000_000))
        self.assertEqual("8%, 1.0 MB of 12.0 MB, 100.0 kB/s, downloading", self.line(progress))
        progress.update(self.downloading(digests[1].hex[:12], 2_000_000, 4_000_000))
        progress.update({"status": "Already exists", "id": digests[2].hex[:12], "progressDetail": {}})
        self.assertEqual("58%, 7.0 MB of 12.0 MB, 700.0 kB/s, already exists", self.line(progress))

    def test_more_layers_than_any_image_has(self):
        progress = module.PullProgress()
        for number in range(5000):
            progress.update(self.downloading(str(number), 1000, 2000))
            progress.update(self.downloading("x" * 1000 + str(number), 1000, 2000))
        progress.update(self.downloading("0", 2000, 2000))
        self.assertEqual("50%, 1.0 MB of 2.0 MB, 100.1 kB/s, downloading", self.line(progress))


class EngineCase(unittest.TestCase):
    def setUp(self):
        self.stack = contextlib.ExitStack()
        self.addCleanup(self.stack.close)
        self.daemon = self.stack.enter_context(FakeDaemon())
        self.image = self.daemon.add("app:1", Image())
        self.engine = self.fresh_engine()

    def fresh_engine(self):
        return Engine(EngineHost(path=self.daemon.path))

    def asked(self, text):
        return [line for line in self.daemon.requests if text in line]

    def error_of(self, call):
        with self.assertRaises(RegistryError) as caught:
            call()
        return caught.exception

    def pull(self, engine=None, reference=REFERENCE, credentials=None):
        """Pull, and return the progress messages."""
        messages = []
        (engine or self.engine).pull(reference, credentials, messages.append)
        return messages


class TestInfo(EngineCase):
    def test_info_of_both_stores(self):
        for store in ("containerd", "classic"):
            with self.subTest(store):
                self.daemon.store = store
                info = self.fresh_engine().info()
                self.assertEqual(("28.5.2", (1, 51), store, Path("/nowhere"), "5c9fd3f1"),
                                 (info.version, info.api, info.store, info.root, info.identity))
                self.assertEqual(f"Docker 28.5.2, API 1.51, {store} image store", str(info))

    def test_info_is_cached_for_ten_seconds(self):
        now = [1000.0]
        with mock.patch("time.monotonic", lambda: now[0]):
            for seconds, store, expected, requests in (
                    (0, "containerd", "containerd", 1), (0, "classic", "containerd", 1),
                    (10, "classic", "containerd", 1), (10.1, "classic", "classic", 2),
                    (20, "containerd", "classic", 2), (20.2, "containerd", "containerd", 3)):
                with self.subTest(seconds=seconds):
                    now[0] = 1000.0 + seconds
                    self.daemon.store = store
                    self.assertEqual(expected, self.engine.info().store)
                    self.assertEqual(requests, len(self.asked("/info")))

    def test_info_is_forgotten_when_the_connection_closes(self):
        self.engine.info()
        self.daemon.store = "classic"
        self.daemon.faults["/images/"] = b""
        self.assertEqual("UNAVAILABLE", self.error_of(lambda: self.engine.image("app:1")).code)
        self.assertEqual("classic", self.engine.info().store)

    def test_api_version_that_both_support(self):
        for api, expected in (("1.24", "v1.24"), ("1.44", "v1.44"), ("1.51", "v1.51"), ("1.55", "v1.51"),
                              ("2.0", "v1.51"), ("1.9", "v1.9")):
            with self.subTest(api):
                self.daemon.requests.clear()
                self.daemon.faults["/version "] = http_answer(200, {"Version": "x", "ApiVersion": api})
                self.fresh_engine().image("app:1")
                self.assertEqual([f"GET /{expected}/images/app:1/json HTTP/1.1"], self.asked("app:1"))

    def test_incomplete_info(self):
        """Podman and old engines omit some fields."""
        for info, store, root in (
                ({"ID": "x"}, "classic", "/var/lib/docker"),
                ({"ID": "x", "DriverStatus": None, "DockerRootDir": ""}, "classic", "/var/lib/docker"),
                ({"ID": "x", "DriverStatus": [["a", "b", "c"], []], "DockerRootDir": "/data"}, "classic", "/data")):
            with self.subTest(info):
                self.daemon.faults["/info "] = http_answer(200, info)
                found = self.fresh_engine().info()
                self.assertEqual((store, Path(root)), (found.store, found.root))


class TestImages(EngineCase):
    def test_image(self):
        for store, identity in (("containerd", self.image.digest), ("classic", self.image.config_digest)):
            for name in ("app:1", "docker.io/library/app:1", identity):
                with self.subTest(name, store=store):
                    self.daemon.store = store
                    found = self.fresh_engine().image(name)
                    self.assertEqual((identity, len(self.image.layer)), (str(found.id), found.size))
                    self.assertEqual(json.loads(self.image.config)["rootfs"]["diff_ids"], list(found.layers))

    def test_answer_that_comes_byte_by_byte(self):
        """The timeout is for the whole answer, and not for each byte of it."""
        self.engine.info()
        self.daemon.slow = "trickle"
        with mock.patch.object(module, "ENGINE_TIMEOUT", 0.3), mock.patch.object(fake_daemon.Slow, "PAUSE", 0.003):
            for call in (lambda: self.engine.image("app:1"), self.engine.listed):
                self.assertEqual("UNAVAILABLE", self.error_of(call).code)
        self.assertFalse(self.daemon.released.is_set())

    def test_missing_image(self):
        self.assertIsNone(self.engine.image("nope:1"))

    def test_image_without_layers(self):
        for document in ({"Id": self.image.digest}, {"Id": self.image.digest, "RootFS": None, "Size": None},
                         {"Id": self.image.digest, "RootFS": {"Type": "layers", "Layers": None}, "Size": 0}):
            with self.subTest(document):
                self.daemon.faults["/images/"] = http_answer(200, document)
                found = self.engine.image("app:1")
                self.assertEqual((self.image.digest, 0, ()), (str(found.id), found.size, found.layers))

    def test_images_of(self):
        other = self.daemon.add("app:2", Image("other"))
        self.assertEqual([Digest.parse(self.image.digest), Digest.parse(other.digest)],
                         self.engine.images_of(["docker.io/library/app"]))
        self.daemon.images.clear()
        self.assertEqual([], self.engine.images_of(["docker.io/library/app"]))

    def test_list_while_an_image_is_removed(self):
        """Docker fails then, though it has the other images: it is asked again, but not without end."""
        removed = http_answer(404, {"message": "NotFound: content digest sha256:59ee: not found"})
        broken = http_answer(500, {"message": "no space left on device"})
        for failures, asked in (([removed] * 2, 3), ([removed] * 99, module.LIST_ATTEMPTS), ([broken] * 99, 1)):
            with self.subTest(failures[0], asked=asked):
                del self.daemon.requests[:]
                left = iter(failures)
                self.daemon.held["/images/json"] = lambda sock, line, head, left=left: next(
                    left, None) or self.daemon._answer(line, head)
                with contextlib.nullcontext() if asked == 3 else self.assertRaises(RegistryError) as caught:
                    self.assertEqual(["app"], [name for _, name, _ in self.engine.names()])
                if caught:
                    self.assertEqual("ENGINE_FAILED", caught.exception.code)
                self.assertEqual(asked, sum("/images/json" in line for line in self.daemon.requests))

    def test_images_of_requests_every_name(self):
        for repository, names in (
                ("docker.io/library/app", {"docker.io/library/app", "library/app", "app"}),
                ("docker.io/team/app", {"docker.io/team/app", "team/app"}),
                ("r.example:5000/app", {"r.example:5000/app"})):
            with self.subTest(repository):
                self.daemon.requests.clear()
                self.engine.images_of([repository])
                (line,) = self.asked("/images/json")
                query = urllib.parse.parse_qs(urllib.parse.urlsplit(line.split(" ")[1]).query)
                self.assertEqual(names, set(json.loads(query["filters"][0])["reference"]))

    def test_export(self):
        with self.engine.export(Digest.parse(self.image.digest)) as response:
            self.assertEqual(self.image.export(), response.read())
        self.daemon.faults["/get "] = http_answer(404, {"message": "No such image: x"})

        def export():
            with self.engine.export(Digest.parse(self.image.digest)):
                self.fail("export() must raise an error")

        error = self.error_of(export)
        self.assertEqual("ENGINE_FAILED", error.code)
        self.assertIn("No such image: x", error.detail)


class TestPull(EngineCase):
    def stream(self, *lines, end=b"\r\n"):
        self.daemon.pulls[str(REFERENCE)] = chunked(b"".join(json.dumps(line).encode() + end for line in lines))

    def test_pull_request(self):
        digest = f"sha256:{'ab' * 32}"
        for target, namespace, expected in (("1", "r.example", ("r.example/team/app", "1")),
                                            ("1", "docker.io", ("docker.io/team/app", "1")),
                                            (digest, "r.example:5000", ("r.example:5000/team/app", digest))):
            for credentials in (None, Credentials("user", "päss:word")):
                with self.subTest(target, namespace=namespace, credentials=credentials):
                    reference = Reference.parse("team/app", target, namespace)
                    self.daemon.pulls[str(reference)] = chunked(b"{}")
                    self.daemon.heads.clear()
                    self.pull(reference=reference, credentials=credentials)
                    head = self.daemon.heads[-1].split("\r\n")
                    method, url, _ = head[0].split(" ")
                    query = dict(urllib.parse.parse_qsl(urllib.parse.urlsplit(url).query))
                    self.assertEqual(("POST", *expected), (method, query["fromImage"], query["tag"]))
                    auth = [line.split(": ")[1] for line in head if line.startswith("X-Registry-Auth: ")]
                    self.assertEqual(
                        [{"username": "user", "password": "päss:word", "serveraddress": namespace}]
                        if credentials else [], [json.loads(base64.urlsafe_b64decode(value)) for value in auth])
                    self.assertIn("Content-Length: 0", head)

    def test_progress_messages(self):
        lines = [{"status": "Pulling from team/app", "id": "1"}, {"status": "Status: Downloaded newer image"}]
        for end in (b"\r\n", b"\n", b"\n\n"):
            with self.subTest(end):
                self.stream(*lines, end=end)
                self.assertEqual(lines, self.pull())

    def test_errors_in_the_stream(self):
        for code, error in (("TOOMANYREQUESTS", "toomanyrequests: slow down"), ("DENIED", "unauthorized: no"),
                            ("ORIGIN_UNAVAILABLE", "unexpected EOF"), ("ENGINE_FAILED", "no space left on device")):
            for what, line in (("both fields", {"errorDetail": {"message": error}, "error": error}),
                               # "error" is deprecated, "and will be omitted in a future API version"
                               ("only errorDetail", {"errorDetail": {"code": 1, "message": error}}),
                               ("only error", {"error": error})):
                with self.subTest(error, line=what):
                    self.stream({"status": "Downloading"}, line, {"status": "never read"})
                    messages = []
                    with self.assertRaises(PullFailed) as caught:
                        self.engine.pull(REFERENCE, None, messages.append)
                    self.assertEqual((code, error), (caught.exception.code, str(caught.exception)))
                    self.assertEqual([{"status": "Downloading"}], messages)

    def test_errors_with_a_status(self):
        for status, message, code in ((404, f"manifest for {REFERENCE} not found", "MANIFEST_UNKNOWN"),
                                      (401, "unauthorized: authentication required", "DENIED"),
                                      (429, "slow down", "TOOMANYREQUESTS"),
                                      (400, "invalid reference format", "NAME_INVALID"),
                                      (500, "no space left on device", "ENGINE_FAILED")):
            with self.subTest(status, message=message):
                self.daemon.pulls[str(REFERENCE)] = http_answer(status, {"message": message})
                with self.assertRaises(PullFailed) as caught:
                    self.pull()
                self.assertEqual((code, message), (caught.exception.code, str(caught.exception)))

    def test_status_without_a_message(self):
        for status, body in ((500, b""), (500, {}), (503, {"message": ""}), (500, {"message": 5})):
            with self.subTest(status, body=body):
                self.daemon.pulls[str(REFERENCE)] = http_answer(status, body)
                with self.assertRaises(PullFailed) as caught:
                    self.pull()
                self.assertEqual(("ENGINE_FAILED", f"status {status}"), (caught.exception.code, str(caught.exception)))

    def test_phrases_in_the_tag(self):
        for tag in ("eof", "timeout", "unauthorized", "rate-limit.x509"):
            with self.subTest(tag):
                with self.assertRaises(PullFailed) as caught:
                    self.pull(reference=Reference.parse("team/app", tag, "r.example"))
                self.assertEqual("MANIFEST_UNKNOWN", caught.exception.code, caught.exception)

    def test_messages_split_between_chunks(self):
        lines = [{"status": "Grüße ✓", "id": "a"}, {"status": "Downloading", "progressDetail": {"current": 1}}]
        data = "\r\n".join(json.dumps(line, ensure_ascii=False) for line in lines).encode()
        for size in (1, 2, 3, 7, len(data) - 1):
            with self.subTest(size):
                pieces = [data[i:i + size] for i in range(0, len(data), size)]
                self.daemon.pulls[str(REFERENCE)] = (
                    HTTP_OK + b"Transfer-Encoding: chunked\r\n\r\n"
                    + b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n")
                self.assertEqual(lines, self.pull())

    def test_malformed_messages(self):
        for what, body, expected in (
                ("not JSON", b'{"status":"a"}\nhello there\n', "hello there"),
                ("not an object", b'[1,2]\n', "[1,2]"),
                ("a number", b"5", "5"),
                ("no UTF-8", b"\xff\xfe\n", "xff"),
                ("very deep", b"[" * 200_000 + b"\n", "[[[["),
                ("half a line at the end", b'{"status":"a"}\n{"stat', '{"stat'),
                ("an endless line", b"x" * (module.MANIFEST_LIMIT + module.MIB), "not JSON")):
            with self.subTest(what):
                self.daemon.pulls[str(REFERENCE)] = chunked(body)
                error = self.error_of(self.pull)
                self.assertEqual("ENGINE_FAILED", error.code)
                self.assertIn(expected, error.detail)
                self.assertLess(len(error.detail), 1000)

    def test_connection_closed(self):
        whole = chunked(b'{"status":"a"}\n' * 10)
        for what, answer in (("in a chunk", whole[:-20]), ("before the last chunk", whole[:-5])):
            with self.subTest(what):
                self.daemon.pulls[str(REFERENCE)] = answer
                error = self.error_of(self.pull)
                self.assertEqual("UNAVAILABLE", error.code)
                self.assertIn("Docker is restarting", error.detail)


class TestMalformedResponses(EngineCase):
    """Each malformed response leads to a RegistryError. A pull may raise PullFailed for an error status."""

    CALLS = (
        ("/version ", lambda engine: engine.info()),
        ("/info ", lambda engine: engine.info()),
        ("/images/app:1/json", lambda engine: engine.image("app:1")),
        ("/images/json", lambda engine: engine.images_of(["app"])),
        ("/images/create", lambda engine: engine.pull(REFERENCE, None, lambda message: None)),
    )
    ANSWERS = (
        ("500 with a message", http_answer(500, {"message": "disk on fire"}), "ENGINE_FAILED", "disk on fire"),
        ("500 with HTML", http_answer(500, b"<html>nginx</html>", "text/html"), "ENGINE_FAILED", "<html>nginx</html>"),
        *((f"{status} with HTML", http_answer(status, b"<html>nginx</html>", "text/html"), "ENGINE_FAILED",
           f"was answered with status {status}, not by Docker") for status in (302, 400, 401, 403, 404, 405, 503)),
        ("403 with JSON", http_answer(403, {"message": "policy"}), "ENGINE_FAILED", "allow that call"),
        ("200 with garbage", http_answer(200, b"\0\1\2garbage"), "ENGINE_FAILED", "garbage"),
        ("200 with deep JSON", http_answer(200, b"[" * 200_000), "ENGINE_FAILED", "not JSON"),
        ("no response", b"", "UNAVAILABLE", "Docker is restarting"),
        ("not HTTP", b"SSH-2.0-OpenSSH_9.6\r\n", "ENGINE_FAILED", "SSH-2.0-OpenSSH_9.6"),
        ("an endless header", b"HTTP/1.1 200 OK\r\nX: " + b"x" * 70_000, "ENGINE_FAILED", "header line"),
        ("endless interim responses", b"HTTP/1.1 100 Continue\r\n\r\n" * 1000, "ENGINE_FAILED", "interim responses"),
        ("endless trailers", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n" + b"X: y\r\n" * 1000,
         "ENGINE_FAILED", "trailers"),
        ("half of a chunk", chunked(b'{"status": "hello"}')[:-20], "UNAVAILABLE", "Docker is restarting"),
    )

    def check(self, path, call, answer, code, text):
        self.daemon.faults = {path: answer}
        with self.assertRaises((RegistryError, PullFailed)) as caught:
            call(self.fresh_engine())
        self.assertEqual(code, caught.exception.code)
        self.assertIn(text, str(caught.exception))

    def test_every_call(self):
        for path, call in self.CALLS:
            for what, answer, code, text in self.ANSWERS:
                with self.subTest(what, path=path):
                    self.check(path, call, answer, code, text)

    def test_incomplete_response(self):
        for path, call in self.CALLS[:-1]:
            with self.subTest(path):
                self.check(path, call, http_answer(200, {"Id": "x" * 100})[:-50], "UNAVAILABLE", "Docker is restarting")

    def test_unexpected_json(self):
        version, info, image = {"Version": "1", "ApiVersion": "1.51"}, {"ID": "x"}, {"Id": self.image.digest}
        calls = dict(self.CALLS)
        for path, text, documents in (
                ("/version ", "/version", (
                    [], 5, None, "text", {}, {"Version": "28"}, version | {"Version": ""},
                    version | {"ApiVersion": 1.51}, version | {"ApiVersion": "1"}, version | {"ApiVersion": "x.y"},
                    version | {"ApiVersion": ["1.51"]})),
                ("/info ", "/info", (
                    [], 5, None, {}, info | {"DriverStatus": 5}, info | {"DriverStatus": "text"},
                    info | {"DockerRootDir": 5}, info | {"DockerRootDir": ["/"]}, info | {"DockerRootDir": "/a\0b"},
                    info | {"DockerRootDir": "/\ud800"})),
                ("/images/app:1/json", "/images/app:1/json", (
                    [], 5, None, {}, {"Id": 5}, {"Id": "nope"}, {"Id": ["x"]}, image | {"RootFS": "text"},
                    image | {"RootFS": {"Layers": 5}}, image | {"Size": "large"}, image | {"Size": [1]},
                    image | {"Size": float("inf")}, image | {"Size": 10**400}, image | {"Size": -1},
                    image | {"RepoTags": 5}, image | {"Config": ["x"]})),
                ("/images/json", "images", (
                    {}, 5, None, "text", [5], [None], [{}], [{"Id": 5}], [{"Id": "nope"}]))):
            for document in documents:
                with self.subTest(path, document=document):
                    self.check(path, calls[path], http_answer(200, document), "ENGINE_FAILED", text)

    def test_engine_recovers(self):
        for what, answer, _, _ in self.ANSWERS:
            with self.subTest(what):
                self.daemon.faults = {"/images/": answer}
                with self.assertRaises(RegistryError):
                    self.engine.image("app:1")
                self.daemon.faults.clear()
                self.assertEqual(self.image.digest, str(self.engine.image("app:1").id))


class TestGrpc(EngineCase):
    def test_upgrade(self):
        for answer, requests in (
                (b"HTTP/1.1 101 UPGRADED\r\nUpgrade: h2c\r\n\r\nbehind", ["POST"]),
                (http_answer(404, {"message": "page not found"}), ["POST", "GET"]),
                (b"HTTP/1.1 400 Bad Request\r\n\r\n", ["POST", "GET"])):
            with self.subTest(answer):
                self.daemon.requests.clear()
                self.daemon.faults = {"/grpc": answer, "/second": b"behind"}
                engine = self.fresh_engine()
                engine.info()
                self.daemon.requests.clear()
                with engine.open_grpc() as sock:
                    if len(requests) > 1:  # it is a new connection, which must be usable
                        sock.sendall(b"GET /second HTTP/1.1\r\n\r\n")
                    self.assertEqual(b"behind", sock.recv(100, socket.MSG_WAITALL))
                self.assertEqual(requests, [line.split(" ")[0] for line in self.daemon.requests])

    def test_broken(self):
        self.daemon.faults = {"/grpc": b""}
        error = self.error_of(self.engine.open_grpc)
        self.assertEqual("UNAVAILABLE", error.code)
        self.assertIn("Docker is restarting", error.detail)
        self.daemon.faults = {"/grpc": b"HTTP/1.1 101 UPGRADED\r\nX: " + b"x" * 70_000}
        self.assertEqual("ENGINE_FAILED", self.error_of(self.engine.open_grpc).code)


class TestAdvice(unittest.TestCase):
    def test_advice(self):
        unix, tcp = EngineHost(path="/run/d.sock"), EngineHost(host="10.0.0.1", port=2375)
        for host, error, *expected in (
                (unix, FileNotFoundError(), "/run/d.sock does not exist", "is Docker running",
                 "-v /var/run/docker.sock:/run/d.sock"),
                (EngineHost(path="/"), ConnectionRefusedError(), "/ is a folder", "on the host, and mount the socket"),
                (unix, PermissionError(), "permission denied on /run/d.sock", "group"),
                (unix, ConnectionRefusedError(), "refused at unix:///run/d.sock", "not running"),
                (tcp, ConnectionRefusedError(), "refused at tcp://10.0.0.1:2375", "not running"),
                (tcp, TimeoutError(), "no answer from tcp://10.0.0.1:2375 in time"),
                (tcp, ConnectionResetError(), "tcp://10.0.0.1:2375 was lost", "restarting"),
                (unix, BrokenPipeError(), "unix:///run/d.sock was lost", "restarting"),
                (unix, http.client.RemoteDisconnected("x"), "unix:///run/d.sock was lost", "restarting"),
                (unix, http.client.IncompleteRead(b"", 5), "unix:///run/d.sock was lost", "restarting"),
                (tcp, socket.gaierror(-2, "Name or service not known"), "tcp://10.0.0.1:2375", "not known"),
                (tcp, OSError(errno.EHOSTUNREACH, "No route to host"), "tcp://10.0.0.1:2375", "No route to host")):
            for text in expected:
                with self.subTest(repr(error), text=text):
                    self.assertIn(text, host.advice(error))

    def test_unreachable_daemon(self):
        with tempfile.TemporaryDirectory() as folder, socket.create_server(("127.0.0.1", 0)) as server:
            folder = Path(folder)
            (folder / "file").write_bytes(b"")
            with socket.socket(socket.AF_UNIX) as dead:
                dead.bind(str(folder / "dead"))
            port = server.getsockname()[1]
            server.close()
            for host, expected in (
                    (EngineHost(path=str(folder / "missing")), "does not exist: is Docker running"),
                    (EngineHost(path=str(folder / "dead")), "connection refused"),
                    (EngineHost(path=str(folder / "file")), "connection refused"),
                    (EngineHost(path=str(folder / "file/sub")), "Not a directory"),
                    (EngineHost(path=str(folder / ("x" * 200))), "too long"),
                    (EngineHost(host="127.0.0.1", port=port), "connection refused")):
                with self.subTest(expected, host=str(host)):
                    with self.assertRaises(RegistryError) as caught:
                        Engine(host).info()
                    self.assertEqual("UNAVAILABLE", caught.exception.code)
                    self.assertIn("Docker cannot be reached", caught.exception.detail)
                    self.assertIn(expected, caught.exception.detail)


class Proxy:
    """Docker on a TCP port, with or without TLS: forwards each connection to a unix socket. Use it in a `with`."""

    def __init__(self, path, tls=None):
        self.path, self.tls = path, tls

    def __enter__(self):
        self.server = socket.create_server(("127.0.0.1", 0))
        self.port = self.server.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.server.shutdown(socket.SHUT_RDWR)  # close() alone does not wake up accept()
        self.server.close()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=self._serve, args=self.server.accept()[:1], daemon=True).start()

    def _serve(self, client):
        with contextlib.suppress(OSError), client, socket.socket(socket.AF_UNIX) as docker:
            if self.tls:
                client = self.tls.wrap_socket(client, server_side=True)
            with client:
                docker.connect(self.path)
                docker.sendall(client.recv(65536))  # a request to Docker fits into one packet
                while data := docker.recv(65536):
                    client.sendall(data)


class TestTcp(EngineCase):
    def test_without_tls(self):
        with Proxy(self.daemon.path) as proxy:
            engine = Engine(EngineHost.from_environment({"DOCKER_HOST": f"tcp://127.0.0.1:{proxy.port}"}))
            self.assertEqual(self.image.digest, str(engine.image("app:1").id))
            self.assertIsNone(engine.image("nope:1"))
            with engine.export(Digest.parse(self.image.digest)) as response:
                self.assertEqual(self.image.export(), response.read())


@unittest.skipUnless(trustme, "needs the package trustme")
class TestTls(EngineCase):
    """A daemon that has a certificate and requires one, both signed by the same authority."""

    def setUp(self):
        super().setUp()
        self.folder = Path(self.stack.enter_context(tempfile.TemporaryDirectory()))
        self.authority, self.other = trustme.CA(), trustme.CA()
        tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        self.authority.issue_cert("127.0.0.1").configure_cert(tls)
        self.authority.configure_trust(tls)
        tls.verify_mode = ssl.CERT_REQUIRED
        self.proxy = self.stack.enter_context(Proxy(self.daemon.path, tls))

    def host(self, trusted, issuer):
        """Return the EngineHost of a client that trusts one authority and has a certificate signed by another."""
        certificate = issuer.issue_cert("client@example.org")
        trusted.cert_pem.write_to_path(str(self.folder / "ca.pem"))
        certificate.private_key_pem.write_to_path(str(self.folder / "key.pem"))
        certificate.cert_chain_pems[0].write_to_path(str(self.folder / "cert.pem"))
        return EngineHost.from_environment({"DOCKER_HOST": f"tcp://127.0.0.1:{self.proxy.port}",
                                            "DOCKER_TLS_VERIFY": "1", "DOCKER_CERT_PATH": str(self.folder)})

    def test_good_certificates(self):
        engine = Engine(self.host(self.authority, self.authority))
        self.assertEqual(self.image.digest, str(engine.image("app:1").id))
        with engine.export(Digest.parse(self.image.digest)) as response:
            self.assertEqual(self.image.export(), response.read())

    def test_bad_certificates(self):
        for what, host, reason in (
                ("unknown issuer of Docker's", self.host(self.other, self.authority), "certificate verify failed"),
                ("unknown issuer of ours", self.host(self.authority, self.other), "UNKNOWN_CA|unknown ca|was lost"),
                ("the client uses no TLS", EngineHost(host="127.0.0.1", port=self.proxy.port), "was lost")):
            with self.subTest(what):
                error = self.error_of(Engine(host).info)
                self.assertEqual("UNAVAILABLE", error.code)
                self.assertRegex(error.detail, reason)

    def test_host_name_must_match(self):
        host = self.host(self.authority, self.authority)
        host = EngineHost(host="localhost", port=host.port, tls=host.tls)
        error = self.error_of(Engine(host).info)
        self.assertEqual("UNAVAILABLE", error.code)
        self.assertIn("certificate is not valid for 'localhost'", error.detail)

    def test_missing_and_malformed_files(self):
        for name in ("ca.pem", "cert.pem", "key.pem"):
            for what, spoil in (("missing", Path.unlink), ("empty", lambda path: path.write_bytes(b"")),
                                ("malformed", lambda path: path.write_bytes(b"hello"))):
                with self.subTest(name, what=what):
                    self.host(self.authority, self.authority)
                    spoil(self.folder / name)
                    with self.assertRaisesRegex(ValueError, f"cannot be read from {self.folder}"):
                        EngineHost.from_environment({"DOCKER_HOST": "tcp://127.0.0.1:1", "DOCKER_TLS_VERIFY": "1",
                                                     "DOCKER_CERT_PATH": str(self.folder)})


if __name__ == "__main__":
    unittest.main()
