"""Tests of the origin chapter: requests to an image's own registry, and content that is read while it arrives."""

import concurrent.futures
import contextlib
import hashlib
import http.server
import os
import socket
import ssl
import sys
import tempfile
import threading
import time
import unittest
from pathlib import Path
from unittest import mock

from program import IN_MEMORY, MODULE

sys.path.insert(0, str(MODULE.parent))
import k3d_registry_dockerd as module
from k3d_registry_dockerd import (
    IDENTITY_TOKEN,
    Body,
    ClientGone,
    Credentials,
    Deadline,
    Digest,
    Engine,
    EngineHost,
    EngineInfo,
    FileSlice,
    Origin,
    PullFailed,
    Reference,
    RegistryError,
    SharedReads,
    Transfer,
)

try:
    import trustme
except ImportError:
    trustme = None

CONTENT = b"some content"
DIGEST = Digest.of(CONTENT)
USER = Credentials("user", "pass")


class OriginCase(unittest.TestCase):
    """A server with a table of responses: path -> (status, headers, body), or a callable that gets the handler."""

    def setUp(self):
        self.answers, self.requests = {}, []
        self.host = self.start()

    def start(self, tls=None, address="127.0.0.1"):
        case = self

        class Handler(http.server.BaseHTTPRequestHandler):
            default_request_version = "HTTP/1.1"

            def do_GET(self):
                length = int(self.headers.get("Content-Length") or 0)
                self.body = self.rfile.read(length)
                case.requests.append((self.command, self.path, self.headers["Authorization"]))
                answer = case.answers.get(self.path.partition("?")[0], (404, {}, b"no such page"))
                status, headers, body = answer(self) if callable(answer) else answer
                self.send_response(status)
                for name, value in {"Content-Length": str(len(body)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            do_POST = do_CONNECT = do_GET

            def log_message(self, *arguments):
                pass

        class Server(http.server.ThreadingHTTPServer):
            def handle_error(self, request, client_address):
                pass

        server = Server((address, 0), Handler)
        if tls:
            server.socket = tls.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        self.addCleanup(server.server_close)
        self.addCleanup(server.shutdown)
        return f"{address}:{server.server_port}"

    PATH = f"/v2/team/app/blobs/{DIGEST}"

    def fetch(self, credentials=None, host=None, insecure=True):
        trusted = None if insecure else ssl.create_default_context()
        origin = Origin(Reference("team/app", DIGEST, host or self.host), credentials, trusted)
        with origin.open("blobs", DIGEST) as response:
            return response.read()

    def failure(self, *arguments, **options):
        with self.assertRaises(PullFailed) as caught:
            self.fetch(*arguments, **options)
        return caught.exception


class TestOrigin(OriginCase):
    def test_plain_http_only_where_allowed(self):
        self.answers[self.PATH] = (200, {}, CONTENT)
        self.assertEqual(CONTENT, self.fetch())
        self.assertEqual("ORIGIN_UNAVAILABLE", self.failure(insecure=False).code)

    def test_error_statuses(self):
        for status, code in ((401, "DENIED"), (403, "DENIED"), (404, "BLOB_UNKNOWN"), (429, "TOOMANYREQUESTS"),
                             (500, "ORIGIN_UNAVAILABLE"), (302, "ORIGIN_UNAVAILABLE")):
            with self.subTest(status):
                self.answers[self.PATH] = (status, {}, b"because\n\x1b[0m")
                failure = self.failure()
                self.assertEqual(code, failure.code)
                self.assertIn(r"because\n\x1b[0m" if status != 302 else "302", str(failure))

    def test_basic_authentication(self):
        def answer(handler):
            good = handler.headers["Authorization"] == USER.for_http()
            return (200, {}, CONTENT) if good else (401, {"WWW-Authenticate": 'Basic realm="x"'}, b"")

        self.answers[self.PATH] = answer
        self.assertEqual(CONTENT, self.fetch(USER))
        for credentials in (None, Credentials("user", "wrong")):
            failure = self.failure(credentials)
            self.assertEqual("DENIED", failure.code)
            self.assertNotIn("wrong", str(failure))

    def want_token(self, challenge=None, token=b'{"token": "abc"}'):
        challenge = challenge or f'Bearer realm="http://{self.host}/token?a=b",service="s",scope="repository:x:pull"'

        def answer(handler):
            good = handler.headers["Authorization"] == "Bearer abc"
            return (200, {}, CONTENT) if good else (401, {"WWW-Authenticate": challenge}, b"")

        self.answers[self.PATH], self.answers["/token"] = answer, (200, {}, token)

    def test_token(self):
        for token in (b'{"token": "abc"}', b'{"access_token": "abc", "expires_in": 60}'):
            self.want_token(token=token)
            self.requests.clear()
            self.assertEqual(CONTENT, self.fetch(USER))
            self.assertEqual([("GET", self.PATH, None),
                              ("GET", "/token?a=b&service=s&scope=repository%3Ax%3Apull", USER.for_http()),
                              ("GET", self.PATH, "Bearer abc")], self.requests)

    def test_identity_token_is_sent_by_oauth(self):
        bodies = []
        self.want_token()
        self.answers["/token"] = lambda handler: bodies.append(handler.body) or (200, {}, b'{"access_token": "abc"}')
        self.assertEqual(CONTENT, self.fetch(Credentials(IDENTITY_TOKEN, "secret")))
        self.assertEqual("POST", self.requests[1][0])
        self.assertEqual([b"grant_type=refresh_token&client_id=k3d-registry-dockerd&refresh_token=secret&service=s"
                          b"&scope=repository%3Ax%3Apull"], bodies)

    def test_malformed_challenges_and_tokens(self):
        for challenge, token in (("Bearer", b""), ("Bearer realm", b""), ('Bearer realm="nonsense"', b""),
                                 ('Bearer realm="file:///etc/passwd"', b""), ('Bearer realm="http://[/"', b""),
                                 (None, b"[]"), (None, b"{}"), (None, b'{"token": 1}'), (None, b'{"token": "a b"}'),
                                 (None, b'{"token": "a\\r\\nX: y"}'), (None, b"\xff")):
            with self.subTest(challenge, token=token):
                self.want_token(challenge, token)
                self.assertEqual("ORIGIN_UNAVAILABLE", self.failure(USER).code)
        self.want_token("Digest x")
        self.assertEqual("DENIED", self.failure(USER).code)
        self.want_token(token=b'{"token": "another"}')
        self.assertEqual("DENIED", self.failure(USER).code)

    def test_redirects_send_credentials_only_to_the_same_server(self):
        other = self.start()
        for status in (301, 302, 303, 307, 308):
            for host, expected in ((self.host, "Bearer abc"), (other, None)):
                with self.subTest(status, host=host):
                    self.want_token()
                    first = self.answers[self.PATH]
                    self.answers["/elsewhere"] = (200, {}, CONTENT)
                    self.answers[self.PATH] = lambda handler, first=first, status=status, host=host: (
                        found if (found := first(handler))[0] == 401
                        else (status, {"Location": f"http://{host}/elsewhere"}, b""))
                    self.requests.clear()
                    self.assertEqual(CONTENT, self.fetch(USER))
                    self.assertEqual(("GET", "/elsewhere", expected), self.requests[-1])

    def test_challenge_of_redirect_target_is_not_answered(self):
        other = self.start()
        self.want_token()
        first = self.answers[self.PATH]
        challenge = {"WWW-Authenticate": f'Bearer realm="http://{other}/evil"'}
        self.answers["/evil"] = (200, {}, b'{"token": "x"}')
        for where in ("/elsewhere", self.PATH.replace("app", "other")):
            self.answers[where] = (401, challenge, b"")
            self.answers[self.PATH] = lambda handler, where=where: (
                found if (found := first(handler))[0] == 401 else (307, {"Location": f"http://{other}{where}"}, b""))
            for credentials in (USER, Credentials(IDENTITY_TOKEN, "secret")):
                self.requests.clear()
                self.assertEqual("DENIED", self.failure(credentials).code)
                self.assertEqual([], [path for _, path, _ in self.requests if "evil" in path])

    def test_redirect_body_is_not_read(self):
        def endless(handler):
            handler.send_response(307)
            handler.send_header("Location", "/elsewhere")
            handler.end_headers()
            with contextlib.suppress(OSError):
                while True:
                    handler.wfile.write(bytes(100_000))
            self.gave_up.set()
            raise ConnectionError

        self.gave_up = threading.Event()
        self.answers[self.PATH], self.answers["/elsewhere"] = endless, (200, {}, CONTENT)
        self.assertEqual(CONTENT, self.fetch())
        self.assertTrue(self.gave_up.wait(30))

    def test_proxy_credentials_are_sent_only_to_the_proxy(self):
        """A registry behind a proxy redirects to a server that is reached directly."""
        seen = []
        self.answers[f"http://registry.example{self.PATH}"] = (307, {"Location": f"http://{self.start()}/there"}, b"")
        self.answers["/there"] = lambda handler: (
            seen.append(handler.headers["Proxy-Authorization"]) or (200, {}, CONTENT))
        proxy = f"http://user:pass@{self.host}"
        with mock.patch.dict(os.environ, {"http_proxy": proxy, "https_proxy": proxy, "no_proxy": "127.0.0.1"}), \
                mock.patch.object(module, "is_internal", lambda _: False):
            self.assertEqual(CONTENT, self.fetch(host="registry.example"))
        self.assertEqual([None], seen)

    def test_malformed_and_unreachable_redirects(self):
        for location in (self.PATH, "file:///etc/passwd", "ftp://127.0.0.1/", "http://[", "http://127.0.0.1:1/", "x:y"):
            with self.subTest(location):
                self.answers[self.PATH] = (307, {"Location": location}, b"")
                self.assertEqual("ORIGIN_UNAVAILABLE", self.failure().code)

    def test_malformed_http(self):
        """The floods would go on. Here the connection is closed at their end, which would be another error, or none."""
        chunks = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
        for what, data, reason in (
                ("interim responses", b"HTTP/1.1 100 Continue\r\n\r\n" * 1000, "HTTPException"),
                ("trailers", chunks + b"0\r\n" + b"X: y\r\n" * 1000, "HTTPException"),
                ("headers", b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 1000, "HTTPException"),
                ("a chunk of less than nothing", chunks + b"-5\r\nabcde", "ValueError"),
                ("not a chunk", chunks + b"x\r\n", "IncompleteRead")):
            with self.subTest(what):
                def answer(handler):
                    handler.wfile.write(data)  # noqa: B023
                    raise ConnectionAbortedError

                self.answers[self.PATH] = answer
                failure = self.failure()
                self.assertEqual(("ORIGIN_UNAVAILABLE", f"{self.host}: malformed HTTP ({reason})"),
                                 (failure.code, str(failure)))

    def test_failures_show_nothing_that_is_secret(self):
        """What another service says, to which a registry leads, is not for clients; nor is a password in a URL."""
        service = socket.create_server(("127.0.0.1", 0))
        self.addCleanup(service.close)

        def greet():
            with contextlib.suppress(OSError):  # closed at the end
                while True:
                    connection, _ = service.accept()
                    with connection:
                        connection.recv(1000)
                        connection.sendall(b"SSH-2.0-secret\r\n")

        threading.Thread(target=greet, daemon=True).start()
        other = f"127.0.0.1:{service.getsockname()[1]}"
        for url in (f"http://{other}/", f"http://me:secret@{self.host}/", f"https://me:secret@{self.host}/",
                    "http://me:secret@token.example/", "http://me:secret@token.example:x/", "//me:secret@[/"):
            for headers, status in (({"Location": url}, 307), ({"WWW-Authenticate": f'Bearer realm="{url}"'}, 401)):
                with self.subTest(url, status=status):
                    self.answers[self.PATH] = (status, headers, b"")
                    failure = self.failure()
                    self.assertEqual("ORIGIN_UNAVAILABLE", failure.code)
                    self.assertNotIn("secret", str(failure))

    def test_proxy_is_not_used_for_local_addresses(self):
        """Only the proxy knows the registry's name."""
        self.answers[f"http://registry.example{self.PATH}"] = (200, {}, CONTENT)
        self.answers[self.PATH] = (200, {}, b"directly")
        proxy = {"http_proxy": f"http://{self.host}", "https_proxy": f"http://{self.host}", "no_proxy": ""}
        with mock.patch.dict(os.environ, proxy):
            self.assertEqual(CONTENT, self.fetch(host="registry.example"))
            self.assertEqual("CONNECT", self.requests[0][0], "TLS must be tried first")
            self.assertEqual(b"directly", self.fetch())
        with mock.patch.dict(os.environ, {**proxy, "no_proxy": "registry.example"}):
            self.assertEqual("ORIGIN_UNAVAILABLE", self.failure(host="registry.example").code)

    def test_docker_hub(self):
        origin = Origin(Reference("library/app", DIGEST, "docker.io"), None, ssl.create_default_context())
        with mock.patch.object(origin, "_send", side_effect=OSError("no")) as send, self.assertRaises(PullFailed), \
                origin.open("manifests", DIGEST):
            pass
        self.assertEqual(f"https://registry-1.docker.io/v2/library/app/manifests/{DIGEST}",
                         send.call_args.args[0].full_url)


@unittest.skipUnless(trustme, "needs the package trustme")
class TestTls(OriginCase):
    def setUp(self):
        super().setUp()
        self.authority = trustme.CA()
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.authority.issue_cert("127.0.0.1").configure_cert(context)
        self.secure = self.start(context)
        self.answers[self.PATH] = (200, {}, CONTENT)

    def test_certificates(self):
        self.assertIn("certificate verify failed", str(self.failure(host=self.secure, insecure=False)))
        self.assertEqual(CONTENT, self.fetch(host=self.secure, insecure=True))
        with self.authority.cert_pem.tempfile() as path, mock.patch.dict(os.environ, {"SSL_CERT_FILE": path}):
            self.assertEqual(CONTENT, self.fetch(host=self.secure, insecure=False))

    def test_credentials_do_not_leave_tls(self):
        """A registry with TLS that sends clients to a token server without TLS."""
        self.answers[self.PATH] = (401, {"WWW-Authenticate": f'Bearer realm="http://{self.host}/token"'}, b"")
        failure = self.failure(USER, host=self.secure)
        self.assertIn("without TLS", str(failure))
        self.assertNotIn("/token", [path for _, path, _ in self.requests])


class TestInternalAddresses(OriginCase):
    """A registry, here at 127.0.0.2, may not send us to services of this machine."""

    def setUp(self):
        super().setUp()
        self.local, self.host = self.host, self.start(address="127.0.0.2")
        self.port = self.local.rpartition(":")[2]
        self.answers["/there"] = (200, {}, CONTENT)

    def redirect(self, location):
        self.answers[self.PATH] = (307, {"Location": location}, b"")

    def test_internal_addresses(self):
        for address, expected in (
                ("127.0.0.1", True), ("127.255.255.254", True), ("169.254.169.254", True), ("169.254.0.1", True),
                ("0.0.0.0", True), ("224.0.0.1", True), ("100.100.100.200", True), ("168.63.129.16", True),
                ("192.0.0.192", True), ("::1", True), ("::", True), ("fe80::1", True), ("fe80::1%eth0", True),
                ("::ffff:127.0.0.1", True), ("::ffff:169.254.169.254", True), ("fd00:ec2::254", True),
                ("fd20:ce::254", True), ("fd00:c1::a9fe:a9fe", True), ("fd00:42::42", True),
                ("10.0.0.1", False), ("172.17.0.1", False), ("192.168.1.1", False), ("8.8.8.8", False),
                ("2001:db8::1", False), ("fd00::1", False), ("::ffff:8.8.8.8", False)):
            with self.subTest(address):
                self.assertEqual(expected, module.is_internal(address))

    def test_redirects_to_internal_addresses_are_not_followed(self):
        for host in ("127.0.0.1", "localhost", "127.1", "2130706433", "0x7f000001", "0.0.0.0", "127.0.0.3",
                     "[::ffff:127.0.0.1]", "[::1]", "169.254.169.254", "100.100.100.200"):
            for scheme in ("http", "https"):
                with self.subTest(host, scheme=scheme):
                    self.redirect(f"{scheme}://{host}:{self.port}/there")
                    self.requests.clear()
                    failure = self.failure()
                    self.assertEqual("ORIGIN_UNAVAILABLE", failure.code)
                    self.assertRegex(str(failure), "internal address|not known|unreachable|family not supported")
                    self.assertEqual([self.PATH], [path for _, path, _ in self.requests])

    def test_redirects_to_the_registry_itself_are_followed(self):
        for location in ("/there", f"http://{self.host}/there", f"http://{self.start(address='127.0.0.2')}/there"):
            with self.subTest(location):
                self.redirect(location)
                self.assertEqual(CONTENT, self.fetch())

    def test_second_redirect_is_checked_like_the_first(self):
        self.redirect("/again")
        self.answers["/again"] = (302, {"Location": f"http://{self.local}/there"}, b"")
        self.assertIn("internal address", str(self.failure()))

    def test_name_with_changing_addresses(self):
        """The registry's name has one address at first, and that of another service when a redirect repeats it."""
        resolve, found = socket.getaddrinfo, []

        def changing(host, *arguments, **options):
            if host != "registry.test":
                return resolve(host, *arguments, **options)
            found.append(host)
            return resolve("127.0.0.2" if len(found) <= 2 else "127.0.0.1", *arguments, **options)

        port = self.host.rpartition(":")[2]
        for target in (f"registry.test:{port}", f"registry.test:{self.port}"):
            with self.subTest(target), mock.patch("socket.getaddrinfo", changing), \
                    mock.patch.dict(os.environ, {"no_proxy": "*"}):
                found.clear()
                self.redirect(f"http://{target}/there")
                self.assertIn("internal address", str(self.failure(host=f"registry.test:{port}")))
                self.assertEqual(3, len(found), "TLS, without TLS, and the redirect")

    def test_next_address_of_a_name_is_tried(self):
        def several(host, port, *arguments, **options):
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (ip, port))
                    for ip in (("127.0.0.1", "127.0.0.4", "127.0.0.2") if host == "several.test" else (host,))]

        self.redirect(f"http://several.test:{self.host.rpartition(':')[2]}/there")
        with mock.patch("socket.getaddrinfo", several), mock.patch.dict(os.environ, {"no_proxy": "*"}), \
                mock.patch.object(module, "is_internal", lambda ip: ip == "127.0.0.1"):
            self.assertEqual(CONTENT, self.fetch())

    def test_proxy_decides(self):
        self.answers[f"http://registry.example{self.PATH}"] = (307, {"Location": "http://169.254.169.254/there"}, b"")
        self.answers["http://169.254.169.254/there"] = (200, {}, CONTENT)
        proxy = f"http://{self.local}"
        with mock.patch.dict(os.environ, {"http_proxy": proxy, "https_proxy": proxy, "no_proxy": ""}):
            self.assertEqual(CONTENT, self.fetch(host="registry.example"))

    def challenge(self, realm):
        self.answers[self.PATH] = lambda handler: (200, {}, CONTENT) if handler.headers["Authorization"] == (
            "Bearer abc") else (401, {"WWW-Authenticate": f'Bearer realm="{realm}"'}, b"")
        self.answers["/token"] = (200, {}, b'{"token": "abc"}')

    def test_tokens(self):
        """Which servers may a registry without TLS name for its tokens?"""
        sibling = self.start(address="127.0.0.2")
        for realm, expected in (
                (f"http://{self.host}/token", None), (f"http://{sibling}/token", None),
                (f"http://{self.local}/token", "without TLS"), ("http://token.example/token", "without TLS"),
                (f"https://{self.local}/token", "internal address"),
                ("https://169.254.169.254/token", "internal address"),
                (f"ftp://{self.host}/token", "without TLS"), (f"//{self.host}/token", "without TLS"),
                (f"http://127.0.0.2@{self.local}/token", "without TLS")):
            for credentials in (USER, Credentials(IDENTITY_TOKEN, "secret"), None):
                with self.subTest(realm, credentials=credentials):
                    self.challenge(realm)
                    self.requests.clear()
                    if expected:
                        self.assertIn(expected, str(self.failure(credentials)))
                        self.assertEqual([self.PATH], [path for _, path, _ in self.requests])
                    else:
                        self.assertEqual(CONTENT, self.fetch(credentials))

    def test_redirected_token_request(self):
        self.challenge(f"http://{self.host}/token")
        self.answers["/token"] = (302, {"Location": f"http://{self.local}/there"}, b"")
        self.assertIn("internal address", str(self.failure(USER)))

    @unittest.skipUnless(trustme, "needs the package trustme")
    def test_registry_with_tls_sends_no_credentials_without_it(self):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        trustme.CA().issue_cert("127.0.0.2").configure_cert(context)
        secure = self.start(context, "127.0.0.2")
        self.challenge(f"http://{self.host}/token")  # the same host
        self.assertIn("without TLS", str(self.failure(USER, host=secure)))
        self.assertNotIn("/token", str(self.requests))


class TestInsecure(unittest.TestCase):
    """Docker's own rule for which registries may be contacted without TLS."""

    def test_insecure_hosts(self):
        engine = Engine(EngineHost(path="/nowhere"))
        info = EngineInfo("28", (1, 51), "classic", Path("/"), "x", details={"RegistryConfig": {
            "IndexConfigs": {"docker.io": {"Secure": True}, "plain.example:5000": {"Secure": False},
                             "127.0.0.9:1": {"Secure": True}},
            "InsecureRegistryCIDRs": ["127.0.0.0/8", "::1/128", "10.0.0.0/8"]}})
        with mock.patch.object(engine, "info", lambda: info):
            for registry, expected in (
                    ("docker.io", False), ("plain.example:5000", True), ("plain.example", False),
                    ("127.0.0.1:5000", True), ("127.0.0.9:1", False), ("localhost:5000", True), ("[::1]:5000", True),
                    ("10.1.2.3", True), ("11.1.2.3:80", False), ("no.such.host.invalid:1", False),
                    ("a" * 64 + ".example", False), ("[:::]:5000", False), ("[1]:5000", False)):
                with self.subTest(registry):
                    self.assertEqual(expected, engine.is_insecure(registry))


class TestTransfer(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory(dir=IN_MEMORY)
        self.addCleanup(folder.cleanup)
        self.path = Path(folder.name) / "file"
        self.data = os.urandom(1_000_000)
        self.transfer = Transfer(len(self.data))

    def write(self, data):
        with open(self.path, "ab") as file:
            file.write(data)
        self.transfer.advance(len(data))

    def begin(self):
        self.path.touch()
        self.transfer.begin(open(self.path, "rb"))  # noqa: SIM115 - the transfer closes it

    def test_concurrent_readers_of_growing_file(self):
        self.begin()
        ranges = [(0, len(self.data)), (0, 1), (500_000, 10), (999_999, 1), (300_000, 700_000)] * 3
        with concurrent.futures.ThreadPoolExecutor(len(ranges)) as pool:
            readers = [pool.submit(lambda part: b"".join(self.transfer.open(*part, Deadline())), part)
                       for part in ranges]
            for start in range(0, len(self.data), 70_000):
                self.write(self.data[start:start + 70_000])
            self.path.unlink()  # like when the content gets its final name
            self.transfer.end()
            for (start, length), reader in zip(ranges, readers, strict=True):
                self.assertEqual(hashlib.sha256(self.data[start:start + length]).hexdigest(),
                                 hashlib.sha256(reader.result(30)).hexdigest())

    def test_last_byte_is_held_until_the_digest_is_checked(self):
        self.begin()
        self.write(self.data)
        pieces = iter(self.transfer.open(0, len(self.data), Deadline()))
        got = b""
        while len(got) < len(self.data) - 1:
            got += next(pieces)
        self.transfer.end(RegistryError("ORIGIN_UNAVAILABLE", "other bytes"))
        with self.assertRaises(RegistryError):
            next(pieces)

    def test_end_before_start(self):
        self.transfer.end(RegistryError("ORIGIN_UNAVAILABLE", "no"))
        for wait in (lambda: self.transfer.wait_for_start(Deadline(1)),
                     lambda: list(self.transfer.open(0, 1, Deadline()))):
            with self.assertRaisesRegex(RegistryError, "no"):
                wait()

    def test_wait_for_start_times_out(self):
        with self.assertRaises(RegistryError) as caught:
            self.transfer.wait_for_start(Deadline(0.01))
        self.assertEqual("STILL_PULLING", caught.exception.code)

    def test_empty_content(self):
        transfer = Transfer(0)
        self.path.touch()
        transfer.begin(open(self.path, "rb"))  # noqa: SIM115
        transfer.end()
        self.assertEqual([], list(transfer.open(0, 0, Deadline())))

    def test_file_is_closed_with_the_last_reader(self):
        def held():
            return sum(str(fd.resolve()).startswith(str(self.path)) for fd in Path("/proc/self/fd").iterdir())

        self.begin()
        self.write(self.data)
        self.transfer.end()
        body = self.transfer.open(0, 10, Deadline())
        del self.transfer
        self.assertEqual(1, held())
        self.assertEqual(self.data[:10], b"".join(body))
        body.close()
        del body
        self.assertEqual(0, held())


class TestSharedReads(unittest.TestCase):
    """Ten nodes read the same layer at the same time."""

    PIECE = 300_000

    def setUp(self):
        folder = tempfile.TemporaryDirectory(dir=IN_MEMORY)
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name) / "store"
        self.sharing = SharedReads(self.folder)
        self.data = os.urandom(3_000_000)
        self.digest = Digest.of(self.data)
        self.go_on = threading.Event()
        self.go_on.set()
        self.reads, self.closed, self.failing = [], [], None

    def read(self, start, length):
        """The source. It records its reads and which of them are closed. It waits for go_on in the middle."""
        number = len(self.reads)
        self.reads.append((start, length))

        def pieces():
            for position in range(start, start + length, self.PIECE):
                if position >= 1_500_000:
                    self.go_on.wait(30)
                    if self.failing:
                        raise self.failing
                yield memoryview(self.data)[position:min(position + self.PIECE, start + length)]

        return Body(pieces(), length, lambda: self.closed.append(number))

    def open(self):
        return self.sharing.open(self.digest, len(self.data), self.read, Deadline())

    def send(self, body):
        """Return the bytes that a client gets, sent with sendfile where the server would use it."""
        ours, theirs = socket.socketpair()
        got = []
        reader = threading.Thread(target=lambda: got.append(theirs.makefile("rb").read()))
        reader.start()
        for part in body.parts:
            if isinstance(part, FileSlice):
                ours.sendfile(part.file, part.start, part.length)
            else:
                ours.sendall(part)
        ours.close()
        reader.join()
        theirs.close()
        body.close()
        return got[0]

    def assert_sent(self, *bodies):
        with concurrent.futures.ThreadPoolExecutor(len(bodies)) as pool:
            self.assertEqual({self.digest}, set(pool.map(lambda body: Digest.of(self.send(body)), bodies)))

    def assert_nothing_left(self):
        """Check that every source is closed, and that no read and no file is left."""
        deadline = time.monotonic() + 30
        while len(set(self.closed)) < len(self.reads) and time.monotonic() < deadline:
            time.sleep(0.01)
        self.assertEqual(list(range(len(self.reads))), sorted(set(self.closed)))
        self.assertEqual({}, self.sharing._reads)
        self.assertEqual([], list(self.folder.iterdir()) if self.folder.is_dir() else [])

    def test_ten_readers_cause_two_reads(self):
        self.assert_sent(*[self.open() for _ in range(10)])
        self.assertEqual([(0, 3_000_000)] * 2, self.reads)
        self.assert_nothing_left()

    def test_later_readers_share_one_more_read(self):
        first = self.open()
        parts = first.parts
        got = bytes(next(parts)) + bytes(next(parts))
        self.assert_sent(self.open(), self.open())
        got += b"".join(os.pread(part.file.fileno(), part.length, part.start) if isinstance(part, FileSlice) else part
                        for part in parts)
        first.close()
        self.assertEqual(self.digest, Digest.of(got))
        self.assertEqual([(0, 3_000_000)] * 2, self.reads)
        self.assertIn(0, self.closed, "the first reader follows the file as well")
        self.assert_nothing_left()

    def test_sequential_readers(self):
        for _ in range(3):
            self.assert_sent(self.open())
        self.assertEqual([(0, 3_000_000)] * 3, self.reads)
        self.assertFalse(self.folder.exists(), "no file is written for a single reader")
        self.assert_nothing_left()

    def test_slow_reader_does_not_block_others(self):
        slow, second, third = self.open(), self.open(), self.open()
        next(slow.parts), next(second.parts)
        self.assert_sent(third)
        self.assert_sent(self.open())  # a later reader follows the same file
        self.assertEqual([(0, 3_000_000)] * 2, self.reads)
        slow.close(), second.close()
        self.assert_nothing_left()

    def test_first_reader_closes(self):
        first, second, third = self.open(), self.open(), self.open()
        next(first.parts)
        first.close()
        self.assert_sent(second, third)
        self.assert_nothing_left()

    def test_source_fails(self):
        """Each reader then reads for itself, and gets the reason. The next reader starts a new read."""
        self.failing = RegistryError("ENGINE_FAILED", "broken")
        bodies = [self.open() for _ in range(3)]
        with self.assertLogs("k3d-registry-dockerd"):
            for body in bodies:
                with self.assertRaisesRegex(RegistryError, "broken"):
                    list(body)
                body.close()
        self.assert_nothing_left()
        self.failing = None
        self.assert_sent(self.open())

    def test_source_ends_early(self):
        """No reader waits for the missing bytes."""
        short = self.data[:2_000_000]

        def read(start, length):
            number = len(self.reads)
            self.reads.append((start, length))
            return Body(iter([short[start:start + length]]), length, lambda: self.closed.append(number))

        bodies = [self.sharing.open(self.digest, len(self.data), read, Deadline()) for _ in range(2)]
        with self.assertLogs("k3d-registry-dockerd"):
            self.assertEqual([short, short], [b"".join(body) for body in bodies])
        for body in bodies:
            body.close()
        self.assert_nothing_left()

    def test_reader_joins_after_a_failure(self):
        """The shared read has failed, but the first reader is still open: the new reader starts another read."""
        self.go_on.clear()
        first, second = self.open(), self.open()
        self.failing = RegistryError("ENGINE_FAILED", "broken")
        self.go_on.set()
        with self.assertLogs("k3d-registry-dockerd"), self.assertRaisesRegex(RegistryError, "broken"):
            list(second)
        self.failing = None
        self.assert_sent(self.open())
        first.close(), second.close()
        self.assert_nothing_left()

    def test_client_disconnects(self):
        """The client's thread stops waiting for the source when the client disconnects."""
        self.go_on.clear()
        ours, theirs = socket.socketpair()
        first = self.open()
        body = self.sharing.open(self.digest, len(self.data), self.read, Deadline(18, ours))
        parts = body.parts
        next(parts)
        theirs.close()
        with self.assertRaises(ClientGone):
            list(parts)
        ours.close(), body.close(), first.close()
        self.go_on.set()
        self.assert_nothing_left()

    def test_thread_cannot_be_started(self):
        """Each reader continues by itself, and nothing is left open."""
        first = self.open()
        parts = first.parts
        got = bytes(next(parts))
        with mock.patch.object(threading.Thread, "start", side_effect=RuntimeError("no")), self.assertLogs(
                "k3d-registry-dockerd"):
            second = self.open()
            self.assertEqual(self.data, b"".join(second))
            got += b"".join(parts)
        self.assertEqual(self.data, got)
        first.close(), second.close()
        self.assert_nothing_left()

    def test_source_cannot_be_opened(self):
        def refuse(start, length):
            raise RegistryError("BLOB_UNKNOWN", "gone")

        with self.assertRaisesRegex(RegistryError, "gone"):
            self.sharing.open(self.digest, len(self.data), refuse, Deadline())
        self.assert_nothing_left()

    def test_all_readers_close(self):
        """The copy that was made for them is abandoned."""
        self.go_on.clear()
        for body in [self.open(), self.open()]:
            next(iter(body))
            body.close()
        self.go_on.set()
        self.assert_nothing_left()

    def test_unwritable_folder(self):
        """Each reader continues by itself."""
        self.folder.write_bytes(b"a file")
        with self.assertLogs("k3d-registry-dockerd"):
            self.assert_sent(self.open(), self.open())
        self.assert_nothing_left()


if __name__ == "__main__":
    unittest.main()
