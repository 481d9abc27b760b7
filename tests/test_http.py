"""Tests of the server chapter: responses to requests of every kind, good and bad."""

import base64
import contextlib
import email
import email.policy
import http.client
import json
import os
import socket
import ssl
import sys
import tempfile
import unittest
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

from fake_daemon import FakeDaemon, Image, sha256
from program import MODULE, Program

try:
    import trustme
except ImportError:
    trustme = None

sys.path.insert(0, str(MODULE.parent))
import k3d_registry_dockerd as module

A, B = "sha256:" + "a" * 64, "sha512:" + "b" * 128


class HttpCase(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.daemon = FakeDaemon()
        cls.daemon.__enter__()
        cls.addClassCleanup(cls.daemon.__exit__)
        cls.image = cls.daemon.add("app:1", Image())
        cls.program = Program(cls.daemon.host)
        cls.addClassCleanup(cls.program.__exit__)
        cls.manifest = "/v2/library/app/manifests/1?ns=docker.io"
        cls.layer = f"/v2/library/app/blobs/{sha256(cls.image.layer)}?ns=docker.io"

    def tearDown(self):
        self.assertEqual([], self.program.lines("a bug in this program"))

    def raw(self, data, keep_sending=b""):
        """Send some bytes; return everything that the server sends until it closes the connection."""
        with socket.create_connection(("127.0.0.1", self.program.port), timeout=30) as connection:
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            return connection.makefile("rb").read()

    def assert_error(self, answer, status, code):
        self.assertEqual((status, code), (answer.status, answer.code), answer.body)
        self.assertEqual("application/json", answer.headers["Content-Type"])
        self.assertEqual(str(len(answer.body)), answer.headers["Content-Length"])
        self.assertEqual({"code", "message", "detail"}, set(answer.json["errors"][0]))


class TestRoutes(HttpCase):
    def test_good_routes(self):
        for path, content_type in (("/", "text/plain; charset=utf-8"), ("/v2", "application/json"),
                                   ("/v2/", "application/json"), (self.manifest, module.OCI_MANIFEST),
                                   (self.layer, "application/octet-stream")):
            with self.subTest(path):
                get, head = self.program.get(path), self.program.head(path)
                self.assertEqual((200, content_type), (get.status, get.headers["Content-Type"]))
                self.assertEqual("registry/2.0", get.headers["Docker-Distribution-API-Version"])
                self.assertEqual(b"", head.body)
                for header in ("Content-Type", "Content-Length", "Docker-Content-Digest", "OCI-Namespace"):
                    self.assertEqual(get.headers[header], head.headers[header], header)

    def test_bad_routes(self):
        long_name = "a/" * 130 + "a"
        for path, status, code in (
                ("/x", 404, "NOT_FOUND"), ("/v1/", 404, "NOT_FOUND"), ("//x/v2/", 404, "NOT_FOUND"),
                ("//v2/", 404, "NOT_FOUND"), ("///v2/_catalog", 404, "NOT_FOUND"), ("/v2/app", 404, "NOT_FOUND"),
                ("/v2/app/manifests/", 404, "NOT_FOUND"),
                ("/v2/App/manifests/1", 400, "NAME_INVALID"), ("/v2/a//b/manifests/1", 400, "NAME_INVALID"),
                ("/v2/../../etc/manifests/1", 400, "NAME_INVALID"), ("/v2/a%2f..%2fb/manifests/1", 400, "NAME_INVALID"),
                ("/v2/a%00/manifests/1", 400, "NAME_INVALID"), ("/v2/a%0a/manifests/1", 400, "NAME_INVALID"),
                ("/v2/caf%C3%A9/manifests/1", 400, "NAME_INVALID"),
                (f"/v2/{long_name}/manifests/1", 400, "NAME_INVALID"),
                ("/v2/app/manifests/1?ns=docker", 400, "NAME_INVALID"),
                ("/v2/app/manifests/1?ns=a/b.c", 400, "NAME_INVALID"),
                ("/v2/app/manifests/1?ns=x.y%0d%0aX:1", 400, "NAME_INVALID"),
                ("/v2/app/manifests/.1", 404, "MANIFEST_UNKNOWN"),
                ("/v2/app/manifests/" + "a" * 129, 404, "MANIFEST_UNKNOWN"),
                ("/v2/app/manifests/sha256:1", 400, "DIGEST_INVALID"),
                ("/v2/app/manifests/md5:" + "a" * 32, 400, "DIGEST_INVALID"),
                ("/v2/app/blobs/1", 400, "DIGEST_INVALID"), ("/v2/app/blobs/sha256:..%2f..%2fx", 404, "NOT_FOUND"),
                ("/v2/app/blobs/" + A.upper(), 400, "DIGEST_INVALID"),
                (f"/v2/app/blobs/{A}", 404, "BLOB_UNKNOWN"), (f"/v2/app/blobs/{B}", 404, "BLOB_UNKNOWN"),
                (f"/v2/app/blobs/{self.image.digest}", 404, "BLOB_UNKNOWN"),
                (f"/v2/app/manifests/{A}", 404, "MANIFEST_UNKNOWN"),
                (f"/v2/library/app/manifests/{sha256(self.image.config)}", 404, "MANIFEST_UNKNOWN"),
                ("/v2/nope/manifests/1", 404, "MANIFEST_UNKNOWN")):
            with self.subTest(path):
                self.assert_error(self.program.get(path), status, code)
                self.assertEqual((status, b""), ((head := self.program.head(path)).status, head.body))

    def test_names_of_writes(self):
        """A name cannot lead out of the store, whatever is asked."""
        session, digest = "0" * 32, f"?digest={A}"
        for name in ("../../x", "App", "a//b", "a%00", "_uploads"):
            for method, path in (
                    ("POST", "blobs/uploads/"), ("POST", f"blobs/uploads/{digest}"),
                    ("POST", f"blobs/uploads/?mount={A}"), ("GET", f"blobs/uploads/{session}"),
                    ("PATCH", f"blobs/uploads/{session}"), ("PUT", f"blobs/uploads/{session}{digest}"),
                    ("DELETE", f"blobs/uploads/{session}"), ("PUT", "manifests/1"),
                    ("DELETE", "manifests/1"), ("DELETE", f"blobs/{A}")):
                with self.subTest(method=method, name=name, path=path):
                    self.assert_error(self.program.request(method, f"/v2/{name}/{path}"), 400, "NAME_INVALID")

    def test_methods(self):
        for method in ("POST", "PATCH", "OPTIONS"):
            with self.subTest(method):
                answer = self.program.request(method, self.manifest, body=b"{}")
                self.assert_error(answer, 405, "UNSUPPORTED")
                self.assertEqual("DELETE, GET, HEAD, PUT", answer.headers["Allow"])

    def test_writes_to_another_registry_are_405(self):
        for method, path in (("PUT", self.manifest), ("DELETE", self.manifest), ("DELETE", self.layer),
                             ("POST", "/v2/library/app/blobs/uploads/?ns=docker.io")):
            with self.subTest(method=method, path=path):
                answer = self.program.request(method, path, body=b"{}")
                self.assert_error(answer, 405, "UNSUPPORTED")
                self.assertIn("docker.io", answer.detail)

    def test_ranges(self):
        size = len(self.image.layer)
        for header, status, start, end in (
                ("bytes=0-0", 206, 0, 1), ("bytes=5-", 206, 5, size), ("bytes=-5", 206, size - 5, size),
                (f"bytes={size - 1}-", 206, size - 1, size), (f"bytes=0-{10**30}", 206, 0, size),
                ("bytes=-0", 416, 0, 0), (f"bytes={size}-", 416, 0, 0), ("bytes=5-1", 416, 0, 0),
                ("bytes=a-b", 200, 0, size), ("bytes=0-1,x", 200, 0, size), ("octets=0-1", 200, 0, size),
                (f"bytes=0-1,{size}-", 206, 0, 2), (f"bytes={size}-,{size + 9}-", 416, 0, 0),
                ("bytes=0-9,9-0", 200, 0, size), ("bytes=-", 200, 0, size),
                ("bytes=0-,0-0", 200, 0, size), ("bytes=" + ",".join(["0-0"] * 101), 200, 0, size)):
            with self.subTest(header):
                answer = self.program.get(self.layer, Range=header)
                self.assertEqual(status, answer.status)
                if status == 416:
                    self.assert_error(answer, 416, "RANGE_INVALID")
                    self.assertEqual(f"bytes */{size}", answer.headers["Content-Range"])
                else:
                    self.assertEqual(self.image.layer[start:end], answer.body)
        self.assertEqual(200, self.program.get(self.layer, Range="bytes=0-0", If_Range='"x"').status)

    def test_several_ranges(self):
        """RFC 9110, 14.6. The response is parsed by Python's MIME parser."""
        size = len(self.image.layer)
        for header, expected in (("bytes=0-99,1000-1099", [(0, 100), (1000, 1100)]),
                                 ("bytes=5-9, -7", [(5, 10), (size - 7, size)]),
                                 ("Bytes=0-9,,20-29,", [(0, 10), (20, 30)]),
                                 (f"bytes=0-0,{size}-,2-2,1-3", [(0, 1), (2, 3), (1, 4)])):
            with self.subTest(header):
                answer = self.program.get(self.layer, Range=header)
                self.assertEqual((206, str(len(answer.body))), (answer.status, answer.headers["Content-Length"]))
                self.assertIsNone(answer.headers["Content-Range"])
                head = f"Content-Type: {answer.headers['Content-Type']}\r\n\r\n".encode()
                message = email.message_from_bytes(head + answer.body, policy=email.policy.HTTP)
                parts = [(part["Content-Range"], part.get_payload(decode=True)) for part in message.get_payload()]
                self.assertEqual([(f"bytes {start}-{end - 1}/{size}", self.image.layer[start:end])
                                  for start, end in expected], parts)

    def test_no_content_encoding(self):
        answer = self.program.get(self.layer, Accept_Encoding="zstd,gzip")
        self.assertEqual((None, self.image.layer), (answer.headers["Content-Encoding"], answer.body))


class TestCredentials(HttpCase):
    def basic(self, text):
        return "Basic " + base64.b64encode(text.encode()).decode()

    def test_credentials_are_passed_to_docker(self):
        path = "/v2/team/app/manifests/1?ns=registry.example:5000"
        self.daemon.heads.clear()
        answer = self.program.get(path, Authorization=self.basic("joe:hunter2:x"))
        self.assert_error(answer, 404, "MANIFEST_UNKNOWN")
        with_auth = [head for head in self.daemon.heads if "x-registry-auth" in head.lower()]
        self.assertEqual(1, len(with_auth))
        self.assertIn("POST /v1.51/images/create?fromImage=registry.example%3A5000%2Fteam%2Fapp&tag=1", with_auth[0])
        value = next(line.split(": ")[1] for line in with_auth[0].splitlines() if line.lower().startswith("x-registry"))
        self.assertEqual({"username": "joe", "password": "hunter2:x", "serveraddress": "registry.example:5000"},
                         json.loads(base64.urlsafe_b64decode(value)))
        self.assertEqual([], [line for line in self.program.log if "hunter2" in line or value in line])

    def test_challenges(self):
        path = "/v2/team/none/manifests/1?ns=registry.example"
        for header, status, challenge in (
                (None, 401, 'Basic realm="registry.example"'), ("Bearer abc", 401, 'Basic realm="registry.example"'),
                (self.basic("a:b"), 404, None), (self.basic("a:"), 404, None), (self.basic("nocolon"), 400, None),
                ("Basic ???", 400, None), ("Basic", 400, None), ("basic " + self.basic("a:b")[6:], 404, None)):
            with self.subTest(header):
                answer = self.program.get(path, **({"Authorization": header} if header else {}))
                self.assertEqual((status, challenge), (answer.status, answer.headers["WWW-Authenticate"]), answer.body)


class TestConnections(HttpCase):
    def test_keep_alive_and_pipelining(self):
        one = b"GET /v2/ HTTP/1.1\r\nHost: x\r\n\r\n"
        self.assertEqual(3, self.raw(one * 3).count(b"HTTP/1.1 200"))

    def test_body_is_not_parsed_as_request(self):
        inner = b"GET /smuggled HTTP/1.1\r\nHost: x\r\n\r\n"
        after = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
        chunked_body = b"%x\r\n%s\r\n0\r\n\r\n" % (len(inner), inner)
        for what, headers, body, answers in (
                ("small", b"Content-Length: %d\r\n" % len(inner), inner, 2),
                ("cut off", b"Content-Length: 1000000\r\n", inner, 1),
                ("large", b"Content-Length: 100000000\r\n", inner, 1),
                ("chunked", b"Transfer-Encoding: chunked\r\n", chunked_body, 2),
                ("no chunks", b"Transfer-Encoding: chunked\r\n", b"0\r\n\r\n", 2),
                ("odd length", b"Content-Length: -1\r\n", inner, 1)):
            with self.subTest(what):
                answer = self.raw(b"PUT /v2/ HTTP/1.1\r\nHost: x\r\n" + headers + b"\r\n" + body + after)
                self.assertEqual(answers, answer.count(b"HTTP/1.1 "), answer)
                self.assertEqual([], self.program.lines("/smuggled"))

    def test_malformed_requests(self):
        hello = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(256)) + b"\n"
        for what, data, status in (
                ("TLS", hello, b"400"), ("words", b"hello there\r\n\r\n", b"400"),
                ("an unknown method", b"BREW / HTTP/1.1\r\nHost: x\r\n\r\n", b"501"),
                ("a long target", b"GET /" + b"a" * 70000 + b" HTTP/1.1\r\n\r\n", b"414"),
                ("a long header", b"GET / HTTP/1.1\r\nX: " + b"a" * 70000 + b"\r\n\r\n", b"431"),
                ("many headers", b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 200 + b"\r\n", b"431"),
                ("HTTP/2", b"GET / HTTP/2.0\r\n\r\n", b"505"),
                *((f"a target with {target!r}", b"GET %s HTTP/1.1\r\nHost: x\r\n\r\n" % target, b"400") for target in (
                    b"", b"/v2/\t", b"/v2\r/", b"/\0v2/", b"\x01/v2/", b"/v2/\x7f", b"/v2/ x")),
                ("a bad target", b"GET http://[x HTTP/1.1\r\nHost: x\r\n\r\n", b"400")):
            with self.subTest(what):
                answer = self.raw(data)
                self.assertTrue(answer.startswith(b"HTTP/1.1 " + status), answer[:100])
                self.assertIn("errors", json.loads(answer.split(b"\r\n\r\n", 1)[1]))
        self.assertEqual([], [line for line in self.program.lines("\\x16\\x03") if "DEBUG" not in line])

    def test_chunked_bodies(self):
        """Each row: chunked framing -> the status of the upload, and its size afterwards."""
        for what, body, status, size in (
                ("plain", b"5\r\nhello\r\n0\r\n\r\n", 202, 5),
                ("extensions", b'5;a=b;c="d"\r\nhello\r\n1 \r\n!\r\n0;x\r\n\r\n', 202, 6),
                ("upper case and zeros", b"000A\r\n0123456789\r\n000\r\n\r\n", 202, 10),
                ("trailers", b"5\r\nhello\r\n0\r\nX-One: 1\r\nX-Two: 2\r\n\r\n", 202, 5),
                ("nothing", b"0\r\n\r\n", 202, 0),
                ("not a size", b"5\r\nhello\r\nxyz\r\n", 400, 5),
                ("a negative size", b"-5\r\nhello\r\n0\r\n\r\n", 400, 0),
                ("a prefix", b"0x5\r\nhello\r\n0\r\n\r\n", 400, 0),
                ("a bare line feed", b"5\nhello\n0\n\n", 400, 0),
                ("too short a chunk", b"9\r\nhello\r\n0\r\n\r\n", 400, 9),
                ("too long a chunk", b"2\r\nhello\r\n0\r\n\r\n", 400, 2),
                ("a size without an end", b"1" * 5000, 400, 0),
                ("a long extension", b"5;" + b"x" * 5000 + b"\r\nhello\r\n0\r\n\r\n", 400, 0),
                ("a huge size", b"f" * 16 + b"\r\nhello", 400, 0),
                ("many trailers", b"0\r\n" + b"X: y\r\n" * 200 + b"\r\n", 400, 0),
                ("no end", b"5\r\nhello\r\n", 400, 5)):
            with self.subTest(what):
                location = self.program.request("POST", "/v2/app/blobs/uploads/").headers["Location"]
                answer = self.raw(f"PATCH {location} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
                                  + body)
                self.assertTrue(answer.startswith(b"HTTP/1.1 %d " % status), answer)
                self.assertEqual(f"0-{max(size - 1, 0)}", self.program.get(location).headers["Range"])

    def test_ambiguous_framing(self):
        """The start of the next request is not known, so the connection is closed."""
        for what, headers in (
                ("both", b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n"),
                ("two lengths", b"Content-Length: 5\r\nContent-Length: 6\r\n"),
                ("another coding", b"Transfer-Encoding: gzip, chunked\r\n"),
                ("twice chunked", b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n"),
                ("a sign", b"Content-Length: +5\r\n"), ("a huge length", b"Content-Length: " + b"9" * 30 + b"\r\n")):
            with self.subTest(what):
                answer = self.raw(b"POST /v2/app/blobs/uploads/ HTTP/1.1\r\nHost: x\r\n" + headers + b"\r\n0\r\n\r\n"
                                  b"GET /smuggled HTTP/1.1\r\nHost: x\r\n\r\n")
                self.assertTrue(answer.startswith(b"HTTP/1.1 400 "), answer)
                self.assertIn(b"Connection: close", answer)
                self.assertEqual(1, answer.count(b"HTTP/1.1 "))

    def test_malformed_header_lines(self):
        """They must not hide the length of a body, which would then be parsed as a request."""
        body = b"GET /v2/smuggled/tags/list HTTP/1.1\r\nHost: x\r\n\r\n"
        for lines in (b"Foo\r\nContent-Length: %d", b"Content-Length : %d", b"X y: 1\r\nContent-Length: %d",
                      b": x\r\nContent-Length: %d", b"X\x00: 1\r\nContent-Length: %d"):
            with self.subTest(lines):
                head = b"PUT /v2/a/manifests/t HTTP/1.1\r\nHost: x\r\n" + lines % len(body)
                answer = self.raw(head + b"\r\n\r\n" + body)
                self.assertTrue(answer.startswith(b"HTTP/1.1 400 "), answer)
                self.assertEqual(1, answer.count(b"HTTP/1.1 "))
        self.assertEqual([], self.program.lines("/v2/smuggled"))

    def test_namespace_cannot_inject_headers(self):
        for path in ("/", "/v2/", "/v2/_catalog"):
            for namespace in ("a%0d%0aX-Evil:%201", "a%E2%82%AC", "x"):
                with self.subTest(path=path, namespace=namespace):
                    answer = self.program.get(f"{path}?ns={namespace}")
                    self.assert_error(answer, 400, "NAME_INVALID")
                    self.assertIsNone(answer.headers["X-Evil"])
        self.assertEqual(200, self.program.get("/v2/?ns=").status)

    def test_expect_100_continue(self):
        """The client waits for the status 100. If the response is an error, the server sends that instead."""
        location = self.program.request("POST", "/v2/app/blobs/uploads/").headers["Location"]
        ask = "PATCH {} HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n"
        with socket.create_connection(("127.0.0.1", self.program.port), timeout=30) as connection:
            connection.sendall(ask.format(location).encode())
            self.assertEqual(b"HTTP/1.1 100 Continue\r\n\r\n", connection.recv(1000))
            connection.sendall(b"hello")
            self.assertTrue(connection.recv(1000).startswith(b"HTTP/1.1 202 "))
            connection.sendall(ask.format("/v2/app/blobs/uploads/nothing").encode())
            self.assertTrue(connection.recv(1000).startswith(b"HTTP/1.1 404 "))
            self.assertEqual(b"", connection.recv(1000), "closed, because the body may still follow")

    def test_interrupted_upload_can_be_continued(self):
        location = self.program.request("POST", "/v2/app/blobs/uploads/").headers["Location"]
        head = f"PATCH {location} HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n".encode()
        self.assertTrue(self.raw(head + b"x" * 300).startswith(b"HTTP/1.1 400 "))
        self.assertEqual("0-299", self.program.get(location).headers["Range"])
        data = b"x" * 300 + b"y" * 700
        done = self.program.request("PUT", f"{location}?digest={sha256(data)}", body=data[300:])
        self.assertEqual(201, done.status, done.body)

    def test_busy_upload_is_409(self):
        location = self.program.request("POST", "/v2/app/blobs/uploads/").headers["Location"]
        with socket.create_connection(("127.0.0.1", self.program.port), timeout=30) as connection:
            connection.sendall(f"PATCH {location} HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\n"
                               "Content-Length: 5\r\n\r\n".encode())
            connection.recv(1000)  # from now on the upload is busy
            self.assert_error(self.program.request("PATCH", location, body=b"other"), 409, "UPLOAD_BUSY")
            self.assertEqual(204, self.program.get(location).status, "its status is available meanwhile")
            connection.sendall(b"hello")
            self.assertIn(b" 202 ", connection.recv(1000))
        self.assertEqual("0-4", self.program.get(location).headers["Range"])

    def test_log_has_received_bytes(self):
        location = self.program.request("POST", "/v2/app/blobs/uploads/").headers["Location"]
        self.program.request("PATCH", location, body=bytes(10_000))
        self.assertIn("received 10.0 kB", self.program.wait_for_line(f"PATCH {location} 202"))

    def test_control_characters_are_escaped_in_the_log(self):
        """A client cannot add lines of its own to the log."""
        self.raw(b"GET /v2/\x1b[31m\x85%0aINFO HTTP/1.1\r\nHost: x\r\n\r\n")
        line = self.program.wait_for_line("[31m")
        self.assertNotIn("\x1b", line)
        self.assertNotIn("\x85", line)

    def test_no_password_in_the_log(self):
        """A target may be a whole URL, also one with a password."""
        self.raw(b"GET http://joe:hunter2@x/v2/?a=b@c HTTP/1.1\r\nHost: x\r\n\r\n")
        self.assertIn(" GET http://x/v2/?a=b@c 200 ", self.program.wait_for_line("a=b@c"))
        self.assertEqual([], self.program.lines("hunter2"))

    def test_log_line_for_each_request(self):
        self.program.get(self.layer)
        self.assertRegex(self.program.wait_for_line(f"GET {self.layer} 200"),
                         r"INFO .* 200 10\.2 kB [\d.]+ m?s 127\.0\.0\.1$")
        self.program.get("/v2/app/blobs/1")
        self.assertRegex(self.program.wait_for_line("GET /v2/app/blobs/1 400"), "WARNING.* - DIGEST_INVALID: ")

    def test_http_1_0(self):
        answer = self.raw(b"GET /v2/ HTTP/1.0\r\n\r\n")
        self.assertIn(b"\r\nConnection: close\r\n", answer)
        self.assertTrue(answer.endswith(b"\r\n\r\n{}"))

    def test_concurrent_requests(self):
        with ThreadPoolExecutor(100) as pool:
            bodies = list(pool.map(lambda _: self.program.get(self.layer).body, range(200)))
        self.assertEqual({self.image.layer}, set(bodies))

    def test_client_disconnect(self):
        """The log has one line, and no traceback."""
        big = bytes(12_000_000)
        self.daemon.content[sha256(big)] = big
        path = f"/v2/app/blobs/{sha256(big)}"
        with socket.create_connection(("127.0.0.1", self.program.port)) as connection:
            connection.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            connection.recv(1000)
        line = self.program.wait_for_line(f"GET {path} 200")
        self.assertIn("the client went away", line)
        self.assertEqual([], self.program.lines("Traceback"))
        self.assertEqual(200, self.program.get(self.manifest).status)


class TestPolicy(HttpCase):
    WRITES = (("POST", "/v2/app/blobs/uploads/"), ("PATCH", "/v2/app/blobs/uploads/x"),
              ("PUT", "/v2/app/blobs/uploads/x"), ("PUT", "/v2/app/manifests/1"))
    DELETES = (("DELETE", "/v2/app/blobs/uploads/x"), ("DELETE", "/v2/app/manifests/1"),
               ("DELETE", f"/v2/app/blobs/{A}"))

    def start(self, *arguments, **env):
        program = Program(self.daemon.host, *arguments, env=env)
        self.addCleanup(program.__exit__)
        return program

    def test_read_only(self):
        for program in (self.start("-read-only"), self.start(REGISTRY_STORAGE_MAINTENANCE_READONLY_ENABLED="true")):
            for method, path in (*self.WRITES, *self.DELETES):
                with self.subTest(method=method, path=path):
                    answer = program.request(method, path, body=b"{}")
                    self.assert_error(answer, 405, "UNSUPPORTED")
                    self.assertIn("read-only", answer.detail)
            self.assertEqual(200, program.get(self.layer).status)
            self.assertFalse(program.store.exists())

    def test_deletes_disabled(self):
        program = self.start(REGISTRY_STORAGE_DELETE_ENABLED="false")
        for method, path in self.DELETES:
            self.assert_error(program.request(method, path), 405, "UNSUPPORTED")
        self.assertEqual(202, program.request("POST", "/v2/app/blobs/uploads/").status)


    def test_allowed_registries(self):
        """Each row: a namespace and the status. Images that Docker has are served from any namespace."""
        program = self.start("-allow", "docker.io", "--allow", "*.corp.example", "-allow", "localhost:*")
        for namespace, status in (("docker.io", 401), ("a.corp.example", 401), ("localhost:7", 401),
                                  ("corp.example", 403), ("evil.example", 403), ("a.corp.example:5000", 403)):
            with self.subTest(namespace):
                answer = program.get(f"/v2/team/nothing/manifests/1?ns={namespace}")
                self.assertEqual(status, answer.status, answer.body)
                self.assertEqual(status != 403, bool(program.lines(f"pull {namespace}/team/nothing:1: started")))
        self.assert_error(answer, 403, "DENIED")
        self.assertIn("*.corp.example", answer.detail)
        self.assertEqual(200, program.get(self.manifest).status)


class TestTlsSwitchedOff(unittest.TestCase):
    def test_while_a_connection_is_accepted(self):
        """The connection has TLS or not, and the thread that accepts connections goes on."""
        server = module.Server(module.Address("127.0.0.1", 0), mock.Mock(names=()))
        self.addCleanup(server.server_close)
        context = mock.Mock()
        with socket.create_connection(server.server_address, timeout=30), mock.patch.object(
                module.Server, "_tls", mock.PropertyMock(side_effect=[context, None]), create=True):
            connection, _ = server.get_request()
            self.assertIs(context.wrap_socket.return_value, connection)
            context.wrap_socket.call_args.args[0].close()


@unittest.skipUnless(trustme, "needs the package trustme")
class TestTls(unittest.TestCase):
    def setUp(self):
        authority = trustme.CA()
        self.daemon = FakeDaemon()
        self.daemon.__enter__()
        self.addCleanup(self.daemon.__exit__)
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.certificate, self.key = f"{folder.name}/cert.pem", f"{folder.name}/key.pem"
        leaf = authority.issue_cert("localhost", "127.0.0.1")
        leaf.private_key_pem.write_to_path(self.key)
        for i, blob in enumerate(leaf.cert_chain_pems):
            blob.write_to_path(self.certificate, append=i > 0)
        self.context = ssl.create_default_context()
        authority.configure_trust(self.context)
        self.flags = ["-tls-certificate", self.certificate, "-tls-key", self.key]

    def connect(self, program):
        return http.client.HTTPSConnection("127.0.0.1", program.port, context=self.context, timeout=30)

    def test_certificate_and_key(self):
        """Set by flags and by the variables of the official image. Plain HTTP is refused without a traceback."""
        variables = {"REGISTRY_HTTP_TLS_CERTIFICATE": self.certificate, "REGISTRY_HTTP_TLS_KEY": self.key}
        for arguments, env in ((self.flags, {}), ([], variables)):
            with Program(self.daemon.host, *arguments, env=env) as program:
                connection = self.connect(program)
                data = os.urandom(3_000_000)
                for method, path, body, status, expected in (
                        ("GET", "/v2/", None, 200, b"{}"),
                        ("POST", f"/v2/a/blobs/uploads/?digest={sha256(data)}", data, 201, b""),
                        ("GET", f"/v2/a/blobs/{sha256(data)}", None, 200, data)):
                    connection.request(method, path, body)
                    response = connection.getresponse()
                    self.assertEqual((status, expected), (response.status, response.read()))
                connection.close()
                with socket.create_connection(("127.0.0.1", program.port), timeout=30) as plain:
                    plain.sendall(b"GET /v2/ HTTP/1.1\r\nHost: x\r\n\r\n")
                    with contextlib.suppress(ConnectionResetError):
                        self.assertNotIn(b"HTTP", plain.recv(1000))
                self.assertEqual([], program.lines("Traceback"))

    def test_idle_connections_make_room(self):
        """Also in the middle of a handshake, and after a request. Their ends are no errors."""
        with Program(self.daemon.host, *self.flags, "-max-connections", "4") as program:
            connections = [self.connect(program) for _ in range(8)]
            for connection in connections:
                plain = socket.create_connection(("127.0.0.1", program.port), timeout=30)
                self.addCleanup(plain.close)
                self.addCleanup(connection.close)
                connection.request("GET", "/v2/")
                self.assertEqual((200, b"{}"), ((response := connection.getresponse()).status, response.read()))
            program.wait_for_line("new connections have to wait")
            self.assertEqual([], program.lines("Traceback"))

    def test_concurrent_readers_of_one_file(self):
        """Clients that share a read of Docker's content follow one file, each at its own position."""
        data = os.urandom(12_000_000)
        self.daemon.content[sha256(data)] = data
        with Program(self.daemon.host, *self.flags) as program:
            connections = [self.connect(program) for _ in range(6)]
            responses = []
            for connection in connections:
                connection.request("GET", f"/v2/app/blobs/{sha256(data)}?ns=docker.io")
                responses.append(connection.getresponse())
            with ThreadPoolExecutor(6) as pool:
                got = pool.map(lambda response: sha256(response.read()), responses)
                self.assertEqual([sha256(data)] * 6, list(got))
            for connection in connections:
                connection.close()


if __name__ == "__main__":
    unittest.main()
