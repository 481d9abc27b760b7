"""Faults that a real engine does not produce on demand: closed connections, wrong content, no response."""

import http.client
import json
import os
import resource
import struct
import sys
import tarfile
import threading
import unittest
from pathlib import Path
from unittest import mock

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
    FakeDaemon,
    Image,
    chunked,
    frame,
    http_answer,
    message,
    receive,
    sha256,
    tar_of,
    varint,
)
from program import MODULE, Program

sys.path.insert(0, str(MODULE.parent))
import k3d_registry_dockerd as module

MANIFEST = "/v2/library/app/manifests/1?ns=docker.io"
SETTINGS_ACKNOWLEDGED = frame(SETTINGS, 1, 0)
HTTP_OK = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"


class FaultCase(unittest.TestCase):
    def start(self, store="containerd", grpc="upgrade", add=True):
        """Start a daemon with one image, app:1, and a registry on it."""
        self.daemon = self.enterContext(FakeDaemon(store, grpc))
        self.image = Image()
        if add:
            self.daemon.add("app:1", self.image)
        self.program = self.enterContext(Program(self.daemon.host))
        return self.program

    if not hasattr(unittest.TestCase, "enterContext"):  # Python 3.10

        def enterContext(self, manager):
            value = manager.__enter__()
            self.addCleanup(manager.__exit__, None, None, None)
            return value

    def layer_path(self):
        return f"/v2/library/app/blobs/{sha256(self.image.layer)}?ns=docker.io"

    def assert_serves(self):
        """Check that the program still runs and serves complete images."""
        manifest = self.program.get(MANIFEST)
        self.assertEqual((200, self.image.manifest), (manifest.status, manifest.body))
        layer = self.program.get(self.layer_path())
        self.assertEqual((200, self.image.layer), (layer.status, layer.body))
        self.assertEqual([], self.program.lines("a bug in this program"))


class TestExports(FaultCase):
    """The classic store: only a complete export is used."""

    def check_broken(self, export, *expected):
        """Check that this export is one error with these texts and leaves no files, and that a good one works then."""
        self.start("classic")
        image_id, good = self.image.config_digest, self.daemon.exports[self.image.config_digest]
        self.daemon.exports[image_id] = export
        answer = self.program.get(MANIFEST)
        self.assertEqual((502, "ENGINE_FAILED"), (answer.status, answer.code))
        for text in expected:
            self.assertIn(text, answer.detail)
            self.program.wait_for_line(text)
        self.assertEqual([], [path for path in self.program.store.rglob("*") if path.is_file()])
        self.daemon.exports[image_id] = good
        self.assert_serves()

    def test_truncated_in_a_blob(self):
        self.check_broken(Image().export()[:700], "not complete")

    def test_truncated_between_members(self):
        self.check_broken(Image().export()[:3072], "not complete")

    def test_empty(self):
        self.check_broken(b"", "not complete after 0 B")

    def test_json_error_at_the_end_of_a_good_response(self):
        complaint = b'{"message":"open /var/lib/docker/overlay2/x: no such file or directory"}\n'
        self.check_broken(Image().export()[:2048] + complaint, "open /var/lib/docker/overlay2/x: no such file")

    def test_not_a_tar(self):
        self.check_broken(b"<html>it works</html>" * 100, "not complete")

    def test_missing_blob(self):
        image = Image()
        self.check_broken(image.export(leave_out={sha256(image.layer)}), "lacks 1 of 2 blobs", sha256(image.layer))

    def test_all_blobs_missing(self):
        """A bug of Docker's containerd store: the export contains only the manifest."""
        image = Image()
        self.check_broken(image.export(leave_out={sha256(image.layer), sha256(image.config)}), "lacks 2 of 2 blobs")

    def test_blob_with_wrong_bytes(self):
        image = Image()
        self.check_broken(image.export(replace={sha256(image.layer): b"x" * len(image.layer)}),
                          f"exported {sha256(image.layer)} with the bytes of")

    def test_export_of_another_image(self):
        self.check_broken(Image("other").export(), "no manifest for this image")

    def test_malformed_index(self):
        for index in (b"[]", b"{", b'{"manifests": 1}', b'{"manifests": [{"digest": "../../etc/passwd"}]}'):
            with self.subTest(index):
                export = Image().export().replace(b"index.json", b"index.jsox")
                with self.subTest("as a separate member"):
                                self.check_broken(tar_of({"index.json": index}) or export, "not complete")
                self.doCleanups()

    def test_connection_closed(self):
        self.start("classic")
        whole = chunked(self.daemon.exports[self.image.config_digest])
        self.daemon.faults["/get "] = whole[:5000]
        answer = self.program.get(MANIFEST)
        self.assertEqual((503, "UNAVAILABLE"), (answer.status, answer.code), answer.body)
        self.assertIn("the connection", answer.detail)
        self.daemon.faults.clear()
        self.assert_serves()

    def test_export_error_status(self):
        self.start("classic")
        self.daemon.faults["/get "] = http_answer(500, {"message": "write /tmp/x: no space left on device"})
        answer = self.program.get(MANIFEST)
        self.assertEqual((502, "ENGINE_FAILED"), (answer.status, answer.code))
        self.assertIn("no space left on device", answer.detail)

    def test_docker_archive(self):
        self.start("classic")
        self.daemon.exports[self.image.config_digest] = self.image.docker_archive()
        manifest = self.program.get(MANIFEST)
        self.assertEqual(200, manifest.status, manifest.body)
        self.assertEqual([sha256(self.image.layer)], [layer["digest"] for layer in manifest.json["layers"]])
        self.assertEqual(self.image.config_digest, manifest.json["config"]["digest"])
        self.assertEqual(self.image.layer, self.program.get(self.layer_path()).body)

    def test_hostile_members(self):
        """Names that lead out of the store: nothing is written outside, and the rest of the export is used."""
        self.start("classic")
        hostile = tar_of({"../../evil.tar": b"x", "/abs.json": b"{}", "blobs/../../../evil": b"x"})[:-10240]
        self.daemon.exports[self.image.config_digest] = hostile + self.image.export()
        self.assert_serves()
        names = {path.name for path in self.program.store.parent.rglob("*") if path.is_file()}
        self.assertEqual({digest.split(":")[1] for digest in (*self.image.blobs, self.image.config_digest)}, names)

    def test_unwritable_store(self):
        """A file is in the place of the store. The error says that the fault is the registry's own."""
        self.start("classic")
        self.program.store.parent.mkdir(exist_ok=True)
        self.program.store.write_bytes(b"")
        answer = self.program.get(MANIFEST)
        self.assertEqual((500, "STORE_FAILED"), (answer.status, answer.code))
        self.program.store.unlink()
        self.assert_serves()


class TestSharedExports(FaultCase):
    """The classic store: exports with common layers, and exports that fail while several clients wait."""

    def test_layer_arrives_with_another_export(self):
        """Two images with the same base are exported at the same time."""
        base = Image("x" * 1_000_000).layer
        self.start("classic", add=False)
        self.image = self.daemon.add("app:1", Image("one", [base]))
        whole, go_on = self.daemon.exports[self.image.config_digest], threading.Event()
        self.addCleanup(go_on.set)
        start = whole.index(base) - tarfile.BLOCKSIZE

        def send(sock):  # up to the base layer; the rest follows later
            sock.sendall(chunked(whole[:start])[:-5])
            go_on.wait(30)
            sock.sendall(chunked(whole[start:]).split(b"\r\n\r\n", 1)[1])

        self.daemon.faults[f"{self.image.config_digest}/get "] = send
        waiting = threading.Thread(target=self.program.get, args=(MANIFEST,))
        waiting.start()
        self.program.wait_for_line(f"export app:1, {self.image.config_digest}")
        (task,) = self.program.get("/status").json["under_way"]
        self.assertEqual(("export", "app:1", ["127.0.0.1"]), (task["kind"], task["what"], task["waiting"]))
        other = self.daemon.add("other:1", Image("two", [base]))
        path = "/v2/library/other/manifests/1?ns=docker.io"
        self.assertEqual(other.manifest, self.program.get(path).body)
        go_on.set()
        waiting.join(30)
        layer = self.program.get(f"/v2/library/app/blobs/{sha256(base)}?ns=docker.io")
        self.assertEqual(sha256(base), sha256(layer.body))
        self.assert_serves()
        self.assertEqual(2, len(self.program.jobs("export")))

    def test_truncated_content_is_exported_again(self):
        """A crash may leave truncated content."""
        self.start("classic")
        self.assert_serves()
        for path in self.program.store.glob("docker/*/*"):
            os.truncate(path, 0)
        self.assert_serves()
        self.assertEqual(2, len(self.program.jobs("export")))

    def test_number_of_open_files(self):
        """It does not depend on the number of blobs: up to 127 layers, and another blob for each in its export."""
        self.start("classic", add=False)
        self.image = self.daemon.add("app:1", Image("top", [Image(f"layer {i}").layer for i in range(120)]))
        whole, asked, go_on = self.daemon.exports[self.image.config_digest], threading.Event(), threading.Event()
        self.addCleanup(go_on.set)

        def send(sock):
            sock.sendall(chunked(whole[:-10240])[:-5])
            asked.set()
            go_on.wait(30)
            sock.sendall(chunked(whole[-10240:]).split(b"\r\n\r\n", 1)[1])

        self.daemon.faults["/get "] = send
        waiting = threading.Thread(target=self.program.get, args=(MANIFEST,))
        waiting.start()
        asked.wait(30)
        files = len(list(Path(f"/proc/{self.program.process.pid}/fd").iterdir()))
        go_on.set()
        waiting.join(30)
        self.assertLess(files, 30)
        self.assert_serves()

    def test_disk_full(self):
        """Simulated by a limit on the size of files."""
        self.start("classic", add=False)
        self.image = self.daemon.add("app:1", Image("x" * 1_000_000))
        resource.prlimit(self.program.process.pid, resource.RLIMIT_FSIZE, (500_000, resource.RLIM_INFINITY))
        answer = self.program.get(MANIFEST)
        self.assertEqual((500, "STORE_FAILED"), (answer.status, answer.code))
        self.assertEqual([], [path for path in self.program.store.rglob("*") if path.is_file()])
        files = [str(path.resolve()) for path in Path(f"/proc/{self.program.process.pid}/fd").iterdir()]
        self.assertEqual([], [path for path in files if str(self.program.store) in path], "no file may stay open")
        resource.prlimit(self.program.process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        self.assert_serves()


class TestContentService(FaultCase):
    """The containerd store: faults on the HTTP/2 connection through the socket."""

    def check_reading(self, reading, status, code, text):
        """A fault before the first byte leads to an error status. The next request succeeds."""
        self.start()
        self.daemon.reading = reading
        answer = self.program.get(self.layer_path())
        self.assertEqual((status, code), (answer.status, answer.code), answer.body)
        self.assertIn(text, answer.detail)
        self.daemon.reading = None
        self.assert_serves()

    def check_broken_in_the_middle(self, ending, text):
        """After half of the content it is too late for a status: the connection is closed, and the log says why."""
        self.start()

        def half(sock, stream, _, data):
            if len(data) < 4000:
                return self.daemon.answer_call(sock, stream, b"\x12" + varint(len(data)) + data)
            part = data[:4000]
            sock.sendall(frame(HEADERS, END_HEADERS, stream, RESPONSE_HEADERS)
                         + frame(DATA, 0, stream, message(b"\x12" + varint(len(part)) + part)))
            return ending(sock, stream)

        self.daemon.reading = half
        with self.assertRaises((http.client.IncompleteRead, ConnectionError)) as caught:
            self.program.get(self.layer_path())
        if isinstance(caught.exception, http.client.IncompleteRead):
            self.assertEqual(self.image.layer[:4000], caught.exception.partial)
        self.assertIn("closed early", self.program.wait_for_line(text))
        self.daemon.reading = None
        self.assert_serves()

    def test_goaway_in_the_middle(self):
        self.check_broken_in_the_middle(
            lambda sock, stream: sock.sendall(frame(GOAWAY, 0, 0, struct.pack(">II", stream, 0))), "closing")

    def test_reset_in_the_middle(self):
        self.check_broken_in_the_middle(
            lambda sock, stream: sock.sendall(frame(RESET, 0, stream, struct.pack(">I", 2))),
            "reset the stream, code 2")

    def test_connection_closed_in_the_middle(self):
        def close(sock, stream):
            receive(sock, len(SETTINGS_ACKNOWLEDGED))  # without a reader for it, the request would fail at once
            sock.shutdown(2)

        self.check_broken_in_the_middle(close, "connection ended too early")

    def test_content_that_ends_early(self):
        self.check_broken_in_the_middle(
            lambda sock, stream: sock.sendall(frame(HEADERS, END_HEADERS | END_STREAM, stream, TRAILERS_OK)),
            "bytes too few")

    def test_error_status_after_half_the_content(self):
        self.check_broken_in_the_middle(
            lambda sock, stream: sock.sendall(frame(HEADERS, END_HEADERS | END_STREAM, stream, TRAILERS_NOT_FOUND)),
            "gRPC status 5")

    def test_goaway_at_once(self):
        self.check_reading(lambda sock, stream, *_: sock.sendall(frame(GOAWAY, 0, 0, bytes(8))),
                           502, "ENGINE_FAILED", "closing the connection")

    def test_reset_at_once(self):
        self.check_reading(lambda sock, stream, *_: sock.sendall(frame(RESET, 0, stream, bytes(4))),
                           502, "ENGINE_FAILED", "reset the stream")

    def test_deleted_between_info_and_read(self):
        self.check_reading(
            lambda sock, stream, *_: sock.sendall(
                frame(HEADERS, END_HEADERS | END_STREAM, stream, TRAILERS_NOT_FOUND)),
            404, "BLOB_UNKNOWN", "gRPC status 5")

    def test_trailers_without_readable_status(self):
        self.check_reading(lambda sock, stream, *_: sock.sendall(frame(
            HEADERS, END_HEADERS | END_STREAM, stream, b"\xbe\xbf")), 502, "ENGINE_FAILED", "no readable grpc-status")

    def test_not_http2(self):
        self.check_reading(lambda sock, stream, *_: sock.sendall(b"HTTP/1.1 500 Oops\r\n\r\n" * 10),
                           502, "ENGINE_FAILED", "does not speak HTTP/2")

    def test_huge_message(self):
        self.check_reading(lambda sock, stream, *_: sock.sendall(
            frame(DATA, 0, stream, struct.pack(">BI", 0, 2**31))), 502, "ENGINE_FAILED", "gRPC message: ")

    def test_broken_protobuf(self):
        self.check_reading(lambda sock, stream, *_: sock.sendall(
            frame(DATA, 0, stream, message(b"\x12\xff"))), 502, "ENGINE_FAILED", "protobuf")

    def test_ping_padding_continuation_and_unknown_frames(self):
        """Everything that HTTP/2 allows around the data: PING is answered, the rest is parsed or skipped."""
        self.start()
        answers = []

        def fancy(sock, stream, digest, data):
            payload = message(b"\x12" + varint(len(data)) + data)
            sock.sendall(frame(PING, 0, 0, b"12345678") + frame(0x63, 0, 0, b"?") + frame(0x63, 0, stream, b"?")
                         + frame(HEADERS, 0, stream, RESPONSE_HEADERS[:9])
                         + frame(9, END_HEADERS, stream, RESPONSE_HEADERS[9:])
                         + frame(DATA, 8, stream, b"\x03" + payload[:100] + bytes(3))
                         + frame(DATA, 0, stream, b"") + frame(DATA, 0, stream, payload[100:])
                         + frame(HEADERS, END_STREAM, stream, TRAILERS_OK[:4])
                         + frame(9, END_HEADERS, stream, TRAILERS_OK[4:]))
            answers.append(receive(sock, len(SETTINGS_ACKNOWLEDGED) + 17))

        self.daemon.reading = fancy
        answer = self.program.get(self.layer_path())
        self.assertEqual((200, self.image.layer), (answer.status, answer.body))
        self.assertIn(SETTINGS_ACKNOWLEDGED + frame(PING, 1, 0, b"12345678"), answers)

    def test_faults_while_connecting(self):
        """The engine sends a malformed response for /grpc: the registry logs it, and exports images."""
        for what, fault in (
                ("no response", lambda sock: b""), ("half of a response", b"HTTP/1.1 10"),
                ("no HTTP/2 after the 101", b"HTTP/1.1 101 UPGRADED\r\n\r\n" + b"\x00" * 20 + b"hello")):
            with self.subTest(what):
                self.start()
                self.daemon.faults["/grpc "] = fault
                fresh = self.enterContext(Program(self.daemon.host))
                fresh.wait_for_line("images are exported one by one")
                self.assertEqual(200, fresh.get(MANIFEST).status)
                self.assertEqual(1, len(fresh.jobs("export")))
                self.daemon.faults.clear()
                self.assertEqual(self.image.layer, fresh.get(self.layer_path()).body)
                self.doCleanups()

    def test_prior_knowledge(self):
        """An engine without /grpc, whose socket speaks HTTP/2 at once."""
        self.start(grpc="prior")
        self.program.wait_for_line("content from: store, content service")
        self.assert_serves()
        self.assertEqual([], self.program.jobs("export"))

    def test_without_content_service(self):
        """Neither way to it works: images are exported, and the log says so."""
        self.start(grpc=None)
        self.program.wait_for_line("images are exported one by one")
        self.assert_serves()
        self.assertEqual(1, len(self.program.jobs("export")))

    def test_flow_control(self):
        """Read more than a window. A real server stops sending to a client that does not extend the window."""
        self.start()
        big = os.urandom(40 * 1024 * 1024)
        self.daemon.content[sha256(big)] = big
        given = []

        def counted(sock, stream, digest, data):
            sock.sendall(frame(HEADERS, END_HEADERS, stream, RESPONSE_HEADERS))
            for start in range(0, len(data), 2**20):
                part = data[start:start + 2**20]
                whole = message(b"\x12" + varint(len(part)) + part)
                for at in range(0, len(whole), 2**16):
                    sock.sendall(frame(DATA, 0, stream, whole[at:at + 2**16]))
            sock.sendall(frame(HEADERS, END_HEADERS | END_STREAM, stream, TRAILERS_OK))
            received = sock.recv(65536)
            while received:
                length, kind = int.from_bytes(received[:3], "big"), received[3]
                if kind == 8:
                    given.append((int.from_bytes(received[5:9], "big"), int.from_bytes(received[9:13], "big")))
                received = received[9 + length:]

        self.daemon.reading = counted
        answer = self.program.get(f"/v2/library/app/blobs/{sha256(big)}?ns=docker.io")
        self.assertEqual(sha256(big), sha256(answer.body))
        for concerns, what in ((lambda s: s == 0, "the connection"), (lambda s: s > 0, "the stream")):
            self.assertGreater(sum(count for stream, count in given if concerns(stream)), len(big) // 2, what)


class TestInspect(FaultCase):
    """An engine with other responses to an inspect request."""

    def test_inspect_responses(self):
        for what, fault, status, code, text in (
                ("500", http_answer(500, {"message": "database is locked"}), 502, "ENGINE_FAILED",
                 "database is locked"),
                ("500 in HTML", http_answer(500, b"<h1>Oops</h1>"), 502, "ENGINE_FAILED", "Oops"),
                ("garbage", b"\x00\x01\x02\x03\r\n\r\n", 502, "ENGINE_FAILED", "malformed"),
                ("malformed JSON", http_answer(200, b"{{{{"), 502, "ENGINE_FAILED", "not JSON"),
                ("other JSON", http_answer(200, [1, 2]), 502, "ENGINE_FAILED", "lacks Id"),
                ("a bad Id", http_answer(200, {"Id": "sha256:../../x"}), 502, "ENGINE_FAILED", "malformed"),
                ("malformed layers", http_answer(200, {"Id": "sha256:" + "a" * 64, "RootFS": [], "Size": "x"}),
                 502, "ENGINE_FAILED", "malformed"),
                ("no response", lambda sock: b"", 503, "UNAVAILABLE", "the connection"),
                ("half a response", HTTP_OK + b"Content-Length: 100\r\n\r\n{", 503, "UNAVAILABLE", "the connection")):
            with self.subTest(what):
                if not hasattr(self, "program"):
                    self.start()
                self.daemon.faults = {"images/": fault}
                answer = self.program.get(MANIFEST)
                self.assertEqual((status, code), (answer.status, answer.code), answer.body)
                self.assertIn(text, answer.detail)
                self.daemon.faults = {}
                self.assert_serves()

    def test_engine_does_not_respond(self):
        """The timeout of 15 seconds is reduced for this test."""
        daemon = self.enterContext(FakeDaemon())
        silence = threading.Event()
        self.addCleanup(silence.set)
        daemon.faults["GET"] = lambda sock: silence.wait() and b""
        self.addCleanup(setattr, module, "ENGINE_TIMEOUT", module.ENGINE_TIMEOUT)
        engine = module.Engine(module.EngineHost(path=daemon.path))
        with self.assertRaises(module.RegistryError) as caught, mock.patch.object(
                module.EngineHost, "connect", lambda host, timeout, connect=module.EngineHost.connect:
                connect(host, 0.2)):
            engine.info()
        self.assertEqual("UNAVAILABLE", caught.exception.code)
        self.assertIn("no answer", caught.exception.detail)


class TestPulls(FaultCase):
    """Docker's progress stream and the ways in which it can end."""

    REFERENCE = "registry.example/team/app:1"
    PATH = "/v2/team/app/manifests/1?ns=registry.example"

    def lines(self, *documents):
        return chunked(b"".join(json.dumps(document).encode() + b"\r\n" for document in documents))

    def test_pull_outcomes(self):
        self.start(add=False)
        progress = {"status": "Downloading", "id": "da835663b8b3", "progressDetail": {"current": 5, "total": 10}}
        for what, pulled, status, code, text in (
                ("rate limit within the stream", self.lines(progress, {
                    "errorDetail": {"message": "toomanyrequests: You have reached your pull rate limit"},
                    "error": "toomanyrequests: You have reached your pull rate limit"}),
                 429, "TOOMANYREQUESTS", "log in"),
                ("network error within the stream", self.lines(progress, {
                    "error": "read tcp 10.0.0.1:443: connection reset by peer"}), 502, "ORIGIN_UNAVAILABLE", "reset"),
                ("disk full within the stream", self.lines(progress, {
                    "error": "write /var/lib/docker/tmp/x: no space left on device"}),
                 502, "ENGINE_FAILED", "no space"),
                ("malformed line in the stream", chunked(b'{"status":"x"}\n<html>'), 502, "ENGINE_FAILED", "not JSON"),
                ("cut off", self.lines(progress)[:-5], 503, "UNAVAILABLE", "the connection"),
                ("status 429", http_answer(429, {"message": "slow down"}), 429, "TOOMANYREQUESTS", "slow down"),
                ("status 500 without a reason", http_answer(500, b""), 502, "ENGINE_FAILED", "status 500"),
                ("success, but no image", self.lines(progress, {"status": "Status: Downloaded newer image"}),
                 404, "MANIFEST_UNKNOWN", "does not have it now")):
            with self.subTest(what):
                self.daemon.pulls[self.REFERENCE] = pulled
                answer = self.program.get(self.PATH)
                self.assertEqual((status, code), (answer.status, answer.code), answer.body)
                self.assertIn(text, answer.detail)
                self.assertEqual([], self.program.lines("a bug in this program"))

    def test_hostile_texts_are_escaped_in_the_log(self):
        """Texts of registries and of Docker that have line breaks and escape codes."""
        forged = "no\n2026-01-01 00:00:00,000 INFO    forged\x1b[31m"
        message = http_answer(500, {"message": forged})
        self.daemon = self.enterContext(FakeDaemon())
        self.daemon.version = {"Version": f"28{forged}", "Os": forged}
        self.daemon.add("app:1", Image())
        self.daemon.faults["/distribution/"] = message
        self.daemon.pulls[self.REFERENCE] = self.lines({"status": forged}, {"error": forged})
        self.program = self.enterContext(Program(self.daemon.host, "-pull", "always"))
        self.assertEqual(200, self.program.get(MANIFEST).status)
        self.program.wait_for_line("whether or not the tag has moved: no")
        self.assertEqual(502, self.program.get(self.PATH).status)
        self.daemon.faults["images/json"] = message
        self.assertEqual(502, self.program.get("/v2/_catalog").status)
        self.assertEqual(400, self.program.get("/v2/a%0aforged%1b/manifests/1").status)
        self.program.stop()
        self.assertIn("forged", "".join(self.program.log))
        for line in self.program.log[:-1]:
            self.assertNotRegex(line, "^2026-01-01")
            self.assertRegex(line, r"^\d{4}-\S+ \S+ +[A-Z]+ ")
            self.assertTrue(line.isprintable(), repr(line))

    def test_successful_pull(self):
        self.start(add=False)
        self.daemon.pulls[self.REFERENCE] = lambda: self.daemon.add(self.REFERENCE, self.image) and self.lines(
            {"status": "Pulling from team/app", "id": "1"},
            {"status": "Downloading", "id": "da835663b8b3", "progressDetail": {"current": 5, "total": 10}},
            {"status": "Download complete", "id": "da835663b8b3", "progressDetail": {}},
            {"status": "Status: Downloaded newer image for team/app:1"})
        answer = self.program.get(self.PATH)
        self.assertEqual((200, self.image.manifest), (answer.status, answer.body))
        self.assertRegex(self.program.wait_for_line(f"pull {self.REFERENCE}: done"), "100%, 10 B of 10 B")
        self.assertEqual(200, self.program.get(self.PATH).status)
        self.assertEqual(1, sum("images/create" in line for line in self.daemon.requests))


if __name__ == "__main__":
    unittest.main()
