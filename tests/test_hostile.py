"""Clients that want too much: too many connections, too large or too slow requests."""

import contextlib
import errno
import itertools
import json
import os
import re
import socket
import sys
import threading
import unittest
from unittest import mock

from fake_daemon import FakeDaemon, sha256
from program import MODULE, Program, takes_long

sys.path.insert(0, str(MODULE.parent))
import k3d_registry_dockerd as module


class HostileCase(unittest.TestCase):
    def start(self, *arguments, docker_host="unix:///nowhere", **options):
        program = Program(docker_host, *arguments, **options)
        self.addCleanup(program.__exit__)
        self.addCleanup(lambda: self.assertEqual([], program.lines("a bug in this program")))
        return program

    def serve(self):
        """Start a server in this process, whose answers are the test's own."""
        server = module.Server(module.Address("127.0.0.1", 0), mock.Mock(names=()))
        self.addCleanup(server.server_close)
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        self.addCleanup(server.shutdown)
        return server

    def connect(self, program):
        connection = socket.create_connection(("127.0.0.1", program.port), timeout=30)
        self.addCleanup(connection.close)
        return connection

    def push_blob(self, program, data):
        path = f"/v2/a/blobs/uploads/?digest={sha256(data)}"
        self.assertEqual(201, program.request("POST", path, body=data).status)
        return f"/v2/a/blobs/{sha256(data)}"

    def begin_body(self, program):
        """Begin to append five bytes to an upload, and return the connection on which they may follow."""
        location = program.request("POST", "/v2/a/blobs/uploads/").headers["Location"]
        connection = self.connect(program)
        connection.sendall(f"PATCH {location} HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\n"
                           "Content-Length: 5\r\n\r\n".encode())
        self.assertIn(b" 100 ", connection.recv(1000))
        return connection


class TestManyConnections(HostileCase):
    WAITING = "new connections have to wait"

    def with_descriptors(self, count, each=3):
        """Options for a program that may have so many descriptors, and takes it that a connection needs `each`."""
        code = f"import sys, k3d_registry_dockerd as m; m.DESCRIPTORS_EACH = {each}; sys.exit(m.main())"
        return {"command": ["sh", "-c", f'ulimit -n {count}; exec "$0" "$@"', sys.executable, "-c", code],
                "env": {"PYTHONPATH": str(MODULE.parent)}}

    def test_idle_connections_keep_nobody_out(self):
        """They are closed for new ones: at the limit that is set, and when descriptors run out before."""
        for what, arguments, options in (
                ("the limit", ["-max-connections", "20"], {}),
                ("the default limit", [], self.with_descriptors(90)),
                ("a limit above the descriptors", ["-max-connections", "1000"], self.with_descriptors(90))):
            with self.subTest(what):
                program = self.start(*arguments, **options)
                path = self.push_blob(program, b"content")
                idle = [self.connect(program) for _ in range(100)]
                self.assertEqual([(200, b"content")] * 50,
                                 [(answer.status, answer.body) for answer in (program.get(path) for _ in range(50))])
                self.assertEqual(1, len(program.lines(self.WAITING)), "one line, not one for each connection")
                self.assertEqual("1000" in arguments, bool(program.lines("-max-connections is 30 and not")))
                self.assertEqual(b"", idle[0].recv(1), "the oldest one was closed")

    def test_connections_with_a_request_are_not_closed(self):
        program = self.start("-max-connections", "3")
        busy = [self.begin_body(program) for _ in range(3)]
        waiting = self.connect(program)
        waiting.sendall(b"GET /v2/ HTTP/1.1\r\nHost: x\r\n\r\n")
        program.wait_for_line(self.WAITING)
        busy[0].sendall(b"hello")
        self.assertIn(b" 202 ", busy[0].recv(1000))
        self.assertIn(b" 200 ", waiting.recv(1000), "it takes the place of one that is idle now")
        for connection in busy[1:]:
            connection.sendall(b"hello")
            self.assertIn(b" 202 ", connection.recv(1000))

    def test_what_is_there_is_not_unknown_without_descriptors(self):
        """Requests at the limit of descriptors: an answer, an error of the server, or no answer at all."""
        program = self.start(**self.with_descriptors(50, each=1))
        paths = [self.push_blob(program, bytes([i]) * 1000) for i in range(5)]
        statuses = set()
        for _ in range(4):
            connections = [self.connect(program) for _ in range(60)]
            for i, connection in enumerate(connections):
                with contextlib.suppress(OSError):
                    connection.sendall(f"GET {paths[i % 5]} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            for connection in connections:
                with contextlib.suppress(OSError):
                    statuses.add(connection.recv(100)[9:12])
                connection.close()
        self.assertLessEqual(statuses, {b"200", b"500", b"503", b""})
        self.assertIn(b"200", statuses)
        self.assertEqual(200, program.get(paths[0]).status, "it recovers")

    def test_descriptor_limit_is_raised(self):
        program = self.start(command=["sh", "-c", 'ulimit -Sn 100; exec "$0" "$@"', sys.executable, str(MODULE)])
        soft = module.resource.prlimit(program.process.pid, module.resource.RLIMIT_NOFILE)[0]
        hard = module.resource.getrlimit(module.resource.RLIMIT_NOFILE)[1]
        most = module.DESCRIPTORS_LIMIT
        self.assertEqual(most if hard == module.resource.RLIM_INFINITY else min(hard, most), soft)


class TestAccepting(unittest.TestCase):
    """The loop that accepts connections survives every failure of the system, and waits before it tries again."""

    def serve(self, method, errors):
        """Answer a request while a method of the inherited server fails with these errors first."""
        inherited, failures = getattr(module.ThreadingHTTPServer, method), list(errors)

        def fail_first(*arguments):
            if failures:
                raise failures.pop()
            return inherited(*arguments)

        server = module.Server(module.Address("127.0.0.1", 0), mock.Mock(names=()))
        server.connections.PAUSE = 0.01
        server.connections.make_room = mock.Mock(side_effect=server.connections.make_room)
        with mock.patch.object(module.ThreadingHTTPServer, method, fail_first):
            thread = threading.Thread(target=server.serve_forever, args=(0.01,))
            thread.start()
            try:
                while not self.is_answered(server.server_address) or failures:
                    pass
            finally:
                server.shutdown()
                thread.join()
                server.server_close()
        return server.connections.make_room.call_count

    @staticmethod
    def is_answered(address):
        with socket.create_connection(address, timeout=30) as connection, contextlib.suppress(ConnectionResetError):
            connection.sendall(b"GET /v2/ HTTP/1.1\r\nHost: x\r\n\r\n")
            return b" 200 " in connection.recv(1000)
        return False

    def test_failures(self):
        for method, errors in (("get_request", [OSError(errno.EMFILE, "too many files")] * 5),
                               ("get_request", [OSError(errno.ENFILE, "too many files")] * 5),
                               ("get_request", [OSError(errno.ENOBUFS, "no buffers")] * 5),
                               ("get_request", [OSError(errno.ENOMEM, "no memory")] * 5),
                               ("process_request", [RuntimeError("can't start new thread")] * 5)):
            with self.subTest(errors[0]), self.assertLogs(module.log, "WARNING") as lines:
                self.assertEqual(5, self.serve(method, errors), "a pause after each failure")
                self.assertEqual(1, len([line for line in lines.output if "have to wait" in line]), lines.output)


class TestHeads(HostileCase):
    """The first line and the headers of a request: RFC 9112, 2 to 5. Whatever is ambiguous is refused."""

    def exchange(self, program, data):
        """Send bytes; return everything that the server sends until it closes the connection."""
        with self.connect(program) as connection:
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            with contextlib.suppress(ConnectionResetError):
                return connection.makefile("rb").read()

    def test_heads(self):
        program = self.start()
        host = b"Host: x\r\n"
        for what, head, status in (
                ("plain", b"GET /v2/ HTTP/1.1\r\n" + host, 200),
                ("empty lines before", b"\r\n\r\n\nGET /v2/ HTTP/1.1\r\n" + host, 200),
                ("bare line feeds", b"GET /v2/ HTTP/1.1\nHost: x\n", 200),
                ("no host", b"GET /v2/ HTTP/1.1\r\n", 400),
                ("two hosts", b"GET /v2/ HTTP/1.1\r\n" + host * 2, 400),
                ("two hosts of any case", b"GET /v2/ HTTP/1.1\r\nHOST: y\r\n" + host, 400),
                ("an empty host", b"GET /v2/ HTTP/1.1\r\nHost:\r\n", 200),
                ("no host in HTTP/1.0", b"GET /v2/ HTTP/1.0\r\n", 200),
                ("two hosts in HTTP/1.0", b"GET /v2/ HTTP/1.0\r\n" + host * 2, 400),
                ("a host with a path", b"GET /v2/ HTTP/1.1\r\nHost: x/y\r\n", 400),
                ("a host with a user", b"GET /v2/ HTTP/1.1\r\nHost: me@x\r\n", 400),
                ("a host that is IPv6", b"GET /v2/ HTTP/1.1\r\nHost: [::1]:5000\r\n", 200),
                ("a bare CR", b"GET /v2/ HTTP/1.1\r\nX: a\rContent-Length: 5\r\n" + host, 400),
                ("a bare CR at the end", b"GET /v2/ HTTP/1.1\r\n" + host + b"X: a\r\r\n", 400),
                ("a bare CR in the first line", b"GET /v2/\rX HTTP/1.1\r\n" + host, 400),
                ("a NUL", b"GET /v2/ HTTP/1.1\r\nX: a\0b\r\n" + host, 400),
                ("a folded line", b"GET /v2/ HTTP/1.1\r\nX: a\r\n b\r\n" + host, 400),
                ("a space before the colon", b"GET /v2/ HTTP/1.1\r\nX : a\r\n" + host, 400),
                ("no colon", b"GET /v2/ HTTP/1.1\r\nX\r\n" + host, 400),
                ("no version", b"GET /v2/\r\n" + host, 400),
                ("another version", b"GET /v2/ HTTP/1.2\r\n" + host, 200),
                ("an old version", b"GET /v2/ HTTP/0.9\r\n" + host, 505),
                ("a long version", b"GET /v2/ HTTP/1.10\r\n" + host, 400),
                ("HTTP/2", b"PRI * HTTP/2.0\r\n", 505),
                ("two spaces", b"GET  /v2/ HTTP/1.1\r\n" + host, 400),
                ("a tab", b"GET\t/v2/ HTTP/1.1\r\n" + host, 400),
                ("a method in small letters", b"get /v2/ HTTP/1.1\r\n" + host, 501),
                ("an unknown method", b"TRACE /v2/ HTTP/1.1\r\n" + host, 501),
                ("space around a length", b"GET /v2/ HTTP/1.1\r\nContent-Length: \t0 \t\r\n" + host, 200),
                ("a length in other digits", b"GET /v2/ HTTP/1.1\r\nContent-Length: \xb2\r\n" + host, 400),
                ("a coding of HTTP/1.0", b"GET /v2/ HTTP/1.0\r\nTransfer-Encoding: chunked\r\n", 400),
                ("100 headers", b"GET /v2/ HTTP/1.1\r\n" + b"X: y\r\n" * 99 + host, 200),
                ("101 headers", b"GET /v2/ HTTP/1.1\r\n" + b"X: y\r\n" * 100 + host, 431),
                ("60 KiB", b"GET /v2/ HTTP/1.1\r\nX: " + b"y" * 60 * 1024 + b"\r\n" + host, 200),
                ("64 KiB in one", b"GET /v2/ HTTP/1.1\r\nX: " + b"y" * 64 * 1024 + b"\r\n" + host, 431),
                ("64 KiB in many", b"GET /v2/ HTTP/1.1\r\n" + (b"X: " + b"y" * 995 + b"\r\n") * 66 + host, 431),
                ("a long target", b"GET /" + b"y" * 64 * 1024 + b" HTTP/1.1\r\n" + host, 414)):
            with self.subTest(what):
                answer = self.exchange(program, head + b"\r\n")
                self.assertEqual(b"HTTP/1.1 %d " % status, answer[:13], answer)
                self.assertEqual(1, answer.count(b"\r\nServer: "))
                self.assertEqual(status in (400, 414, 431, 501, 505) or b"HTTP/1.0" in head,
                                 b"\r\nConnection: close\r\n" in answer)

    def test_connection_header(self):
        program = self.start()
        for line, answers in ((b"Connection: close", 1), (b"connection: Keep-Alive , CLOSE", 1),
                              (b"Connection: keep-alive\r\nConnection: close", 1), (b"Connection: closed", 2)):
            with self.subTest(line):
                request = b"GET /v2/ HTTP/1.1\r\nHost: x\r\n" + line + b"\r\n\r\n"
                self.assertEqual(answers, self.exchange(program, request * 2).count(b"HTTP/1.1 200"))

    def test_an_answer_before_the_end_of_what_is_not_http(self):
        """Docker tries TLS first, and falls back only if the answer is HTTP. A handshake may hold no line feed."""
        connection = self.connect(self.start())
        connection.sendall(b"\x16\x03\x01\x02\x00\x01\x00")
        self.assertIn(b"HTTP/1.1 400 ", connection.recv(1000))

    def test_large_heads_take_no_memory(self):
        """Nothing of a request is kept but its head, whatever comes."""
        program = self.start()
        before = program.peak_memory()
        for _ in range(60):
            connection = self.connect(program)
            with contextlib.suppress(OSError):
                connection.sendall(b"GET / HTTP/1.1\r\n" + b"".join(
                    b"X: " + b"y" * 60000 + b"\r\n" for _ in range(90)))
        self.assertEqual(200, program.get("/v2/").status)
        self.assertLess(program.peak_memory() - before, 40_000_000)

    def test_http_1_0(self):
        """It has no chunks and no 100 Continue: the connection's end is the end of a body of unknown length."""
        def answer(endpoints, request):
            request.body.read(100)
            return module.Response(200, {}, module.Body(iter([b"abc", b"def"]), None))

        server = self.serve()
        for version, chunked in ((b"1.0", False), (b"1.1", True)):
            with self.subTest(version), mock.patch.object(module, "find_route", lambda *request: (answer, ())), \
                    socket.create_connection(server.server_address, timeout=30) as connection:
                connection.sendall(b"PUT / HTTP/%s\r\nHost: x\r\nExpect: 100-continue\r\nConnection: close\r\n"
                                   b"Content-Length: 1\r\n\r\nx" % version)
                answered = connection.makefile("rb").read()
                self.assertEqual(chunked, b"100 Continue" in answered)
                self.assertEqual(chunked, b"Transfer-Encoding" in answered)
                body = answered.rpartition(b"\r\n\r\n")[2] if not chunked else answered[-21:]
                self.assertEqual(b"3\r\nabc\r\n3\r\ndef\r\n0\r\n\r\n" if chunked else b"abcdef", body)


    def test_content_that_cannot_be_read(self):
        """The log says that it is the disk's fault, and not the client's."""

        def parts():
            yield b"abc"
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        server = self.serve()
        with mock.patch.object(module, "find_route", lambda *request: (
                lambda endpoints, request: module.Response(200, {}, module.Body(parts(), 6)), ())), \
                self.assertLogs("k3d-registry-dockerd") as logs, \
                socket.create_connection(server.server_address, timeout=30) as connection:
            connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            self.assertTrue(connection.makefile("rb").read().endswith(b"\r\n\r\nabc"))
            with server.connections._change:
                server.connections._change.wait_for(lambda: not server.connections._open, 30)
        self.assertRegex(logs.output[-1], "closed early: .*Input/output error")


class TestSlowClients(HostileCase):
    """A client may be slow, but not as slow as it likes: limits are shortened here."""

    def test_client_that_reads_nothing(self):
        """It is waited for once. What is still to be written then is not waited for again, at the connection's end."""
        ended, errors, finish = threading.Event(), [], module.Handler.finish

        def answer(endpoints, request):
            return module.Response(200, {}, module.Body(itertools.repeat(bytes(8 * module.KIB)), 1 << 40, ended.set))

        def record(handler):
            try:
                handler.wfile.flush()
            except OSError as e:
                errors.append(type(e))
            finish(handler)

        server = self.serve()
        with mock.patch.object(module, "find_route", lambda *request: (answer, ())), \
                mock.patch.object(module, "STALL_TIMEOUT", 0.2), mock.patch.object(module.Handler, "finish", record), \
                socket.create_connection(server.server_address, timeout=30) as connection:
            connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            self.assertTrue(ended.wait(30))
            with server.connections._change:
                self.assertTrue(server.connections._change.wait_for(lambda: not server.connections._open, 30))
        self.assertNotIn(TimeoutError, errors)

    def start_impatient(self):
        return self.start(constants={"HEAD_TIMEOUT": 0.3, "BODY_PATIENCE": 0.3})

    def trickle(self, connection, data):
        """Send a byte at a time until there is an answer, and return its status."""
        connection.settimeout(0.05)
        for byte in itertools.cycle(data):
            with contextlib.suppress(TimeoutError):
                return connection.recv(1000)[9:12]
            connection.sendall(bytes([byte]))
        return None

    @takes_long
    def test_slow_requests(self):
        program = self.start_impatient()
        location = program.request("POST", "/v2/a/blobs/uploads/").headers["Location"].encode()
        start = b"PATCH %s HTTP/1.1\r\nHost: x\r\n" % location
        for what, data, rest in (
                ("a target", b"GET /", b"a"), ("a header", b"GET / HTTP/1.1\r\nX: ", b"y"),
                ("headers", b"GET / HTTP/1.1\r\n", b"X: y\r\n"), ("empty lines", b"\r\n", b"\r\n"),
                ("a body", start + b"Content-Length: 100000\r\n\r\n", b"x"),
                ("chunks", start + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n"),
                ("a chunk's extension", start + b"Transfer-Encoding: chunked\r\n\r\n1;", b"x"),
                ("trailers", start + b"Transfer-Encoding: chunked\r\n\r\n0\r\n", b"X: y\r\n")):
            with self.subTest(what):
                connection = self.connect(program)
                connection.sendall(data)
                self.assertEqual(b"408", self.trickle(connection, rest))

    def test_unused_bodies(self):
        """The rest of a body is read before the answer, but not for ever."""
        program = self.start_impatient()
        connection = self.connect(program)
        connection.sendall(b"PUT /v2/none HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n")
        self.assertEqual(b"404", self.trickle(connection, b"x"))

    def test_what_arrived_is_kept(self):
        program = self.start_impatient()
        location = program.request("POST", "/v2/a/blobs/uploads/").headers["Location"]
        connection = self.connect(program)
        connection.sendall(b"PATCH %s HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n" % location.encode()
                           + bytes(10000))
        self.assertEqual(b"408", self.trickle(connection, b"x"))
        size = int(program.get(location).headers["Range"].partition("-")[2]) + 1
        self.assertGreaterEqual(size, 10000)
        data = bytes(10000) + b"x" * (size - 10000)
        self.assertEqual(201, program.request("PUT", f"{location}?digest={sha256(data)}", body=b"").status)


class TestManifests(HostileCase):
    def setUp(self):
        daemon = FakeDaemon()
        daemon.__enter__()
        self.addCleanup(daemon.__exit__)
        self.program = self.start(docker_host=daemon.host)
        self.push_blob(self.program, b"{}")

    def descriptor(self, data=b"{}", **more):
        return {"mediaType": "application/vnd.x", "size": len(data), "digest": sha256(data), **more}

    def put(self, data, media_type=module.OCI_MANIFEST, reference="1"):
        return self.program.request("PUT", f"/v2/a/manifests/{reference}", {"Content-Type": media_type}, data)

    def test_what_is_not_json(self):
        good = json.dumps({"schemaVersion": 2, "mediaType": module.OCI_MANIFEST, "config": self.descriptor(),
                           "layers": []})
        for what, data, status in (
                ("plain", good.encode(), 201), ("a byte order mark", b"\xef\xbb\xbf" + good.encode(), 400),
                ("UTF-16", good.encode("utf-16"), 400), ("UTF-16 without a mark", good.encode("utf-16-le"), 400),
                ("UTF-32", good.encode("utf-32"), 400), ("Latin-1", good.encode()[:-1] + b', "x": "\xe9"}', 400),
                ("NaN", good.encode()[:-1] + b', "x": NaN}', 400),
                ("infinity", good.encode()[:-1] + b', "x": [-Infinity]}', 400),
                ("a deep list", good.encode()[:-1] + b', "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", 400),
                ("deep objects", b'{"a":' * 500_000, 400),
                ("a long number", good.encode()[:-1] + b', "x": ' + b"9" * 1_000_000 + b"}", 400),
                ("nothing", b"", 400), ("a list", b"[]", 400)):
            for media_type in (module.OCI_MANIFEST, "application/vnd.x+json"):
                with self.subTest(what, media_type=media_type):
                    self.assertEqual(400 if "vnd.x" in media_type else status, self.put(data, media_type).status)

    def test_many_descriptors(self):
        """The number is limited before anything is looked up, and an error names a few of them."""
        for name, count, status, words in (
                ("layers", 4001, 400, "4001 descriptors"), ("blobs", 30_000, 400, "30000 descriptors"),
                ("manifests", 4001, 400, "4001 descriptors"), ("layers", 4000, 404, "and 3995 more"),
                ("manifests", 4000, 201, None)):
            with self.subTest(name, count=count):
                data = json.dumps({"schemaVersion": 2, "config": self.descriptor(), name: [
                    self.descriptor(b"%d" % i) for i in range(count)]}).encode()
                answer = self.put(data)
                self.assertEqual(status, answer.status, answer.body[:500])
                self.assertLess(len(answer.body), 2000)
                if words:
                    self.assertIn(words, answer.detail)
        self.assertLess(max(map(len, self.program.log)), 2500)

    def attach(self, subject, **more):
        data = json.dumps({"schemaVersion": 2, "mediaType": module.OCI_MANIFEST, "config": self.descriptor(),
                           "layers": [], "subject": self.descriptor(subject), **more}, ensure_ascii=False).encode()
        answer = self.put(data, reference=sha256(data))
        self.assertEqual(201, answer.status, answer.body[:500])
        return sha256(data)

    def pages(self, subject, query=""):
        """Follow the links of a list of referrers: the entries of each page. HEAD says the same of each."""
        path = f"/v2/a/referrers/{sha256(subject)}{query}"
        while path:
            get, head = self.program.get(path), self.program.head(path)
            self.assertEqual(200, get.status)
            self.assertLessEqual(len(get.body), 4 * 1024 * 1024, "what clients read of an index")
            for name in ("Content-Length", "Content-Type", "Link", "OCI-Filters-Applied"):
                self.assertEqual(get.headers[name], head.headers[name])
            yield get.json["manifests"]
            link = get.headers["Link"]
            path = link and re.fullmatch(r'<(/v2/.*)>; rel="next"', link)[1]

    def test_pages_of_referrers(self):
        subject = b"an image"
        pushed = {self.attach(subject, annotations={"n": str(i), "text": "x" * 700_000},
                              artifactType=f"application/vnd.{i % 2}") for i in range(12)}
        for query, expected in (("", 12), ("?artifactType=application/vnd.1", 6), ("?artifactType=none", 0)):
            with self.subTest(query):
                pages = list(self.pages(subject, query))
                digests = [entry["digest"] for entries in pages for entry in entries]
                self.assertEqual(sorted(digests), digests)
                self.assertEqual(expected, len(set(digests) & pushed))
                self.assertEqual(expected, len(digests))
                self.assertEqual({0: 1, 6: 2, 12: 3}[expected], len(pages))
                self.assertTrue(all(len(entry["annotations"]["text"]) == 700_000 for page in pages for entry in page))

    def test_what_fits_no_page(self):
        """Annotations that are longer in the list than in the manifest; a type that is none."""
        subject = b"another image"
        large = self.attach(subject, annotations={"a": "\N{EURO SIGN}" * 1_000_000})
        small = [self.attach(subject, annotations={"n": str(i)}) for i in range(5)]
        found = {entry["digest"]: entry for entries in self.pages(subject) for entry in entries}
        self.assertEqual({large, *small}, set(found))
        self.assertEqual({digest: digest != large for digest in found},
                         {digest: "annotations" in entry for digest, entry in found.items()})
        for artifact_type in ("x" * 256, "x" * 3_000_000):
            data = json.dumps({"schemaVersion": 2, "config": self.descriptor(), "artifactType": artifact_type})
            self.assertEqual(400, self.put(data.encode()).status)

    @takes_long
    def test_many_large_referrers_take_no_memory(self):
        subject = b"a third image"
        for i in range(20):
            self.attach(subject, annotations={"n": str(i), "text": "x" * 4_000_000})
        before = self.program.peak_memory()
        self.assertEqual(20, sum(map(len, self.pages(subject))))
        self.assertLess(self.program.peak_memory() - before, 60_000_000)

    def test_pages_end_in_time(self):
        """Each page has something of the list, however long reading takes."""
        listed = [{"digest": sha256(b"%d" % i), "artifactType": f"a/{i % 2}"} for i in range(4)]
        deadline = mock.Mock(within=lambda seconds: mock.Mock(left=lambda: 0))
        for wanted, entries in ((None, listed[:1]), ("a/0", listed[:1]), ("a/1", [])):
            request = mock.Mock(parameter={"artifactType": wanted}.get, client=mock.Mock(deadline=deadline),
                                namespace=None, path="/x")
            page, headers = module.page_of_referrers(request, iter(listed))
            self.assertEqual(entries, page)
            self.assertIn(f"last={sha256(b'0').replace(':', '%3A')}", headers["Link"])


if __name__ == "__main__":
    unittest.main()
