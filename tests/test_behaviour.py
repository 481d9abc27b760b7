"""Behaviour that clients rely on, checked on the running program: its responses, and its requests to Docker."""

import base64
import contextlib
import hashlib
import http.client
import json
import os
import signal
import socket
import ssl
import tempfile
import threading
import time
import unittest
import urllib.parse
from pathlib import Path
from unittest import mock

from fake_daemon import OCI_MANIFEST, FakeDaemon, Image, Index, chunked, http_answer, sha256, varint
from fake_origin import INSECURE, Origin
from program import Program

OCTETS = "application/octet-stream"
SECOND_REGISTRY = "localhost:5999"


def basic(username, password):
    return "Basic " + base64.b64encode(f"{username}:{password}".encode()).decode()


def descriptor(data, media_type=OCTETS):
    return {"mediaType": media_type, "digest": sha256(data), "size": len(data)}


def encode(document):
    return json.dumps(document).encode()


def wait_until(condition):
    """Wait until condition() is true. Raises AssertionError after a minute."""
    for _ in range(6000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it did not happen")


class BehaviourCase(unittest.TestCase):
    """A test with a fake daemon and a program."""

    def enter(self, manager):
        value = manager.__enter__()
        self.addCleanup(manager.__exit__, None, None, None)
        return value

    def folder(self):
        return Path(self.enter(tempfile.TemporaryDirectory()))

    def event(self):
        """Return an event that is set at the end of the test, so that no thread waits for it any longer."""
        event = threading.Event()
        self.addCleanup(event.set)
        return event

    def start(self, *arguments, **more):
        """Start the program, and a daemon unless there is one."""
        if not hasattr(self, "daemon"):
            self.daemon = self.enter(FakeDaemon())
        self.program = self.enter(Program(self.daemon.host, *arguments, **more))
        return self.program

    def tearDown(self):
        self.assertEqual([], self.program.lines("a bug in this program"))

    def asked(self, *texts):
        """Return the request lines that Docker received so far and that contain all these texts."""
        return [line for line in self.daemon.requests if all(text in line for text in texts)]

    def pulls(self, name):
        """Return the requests to Docker so far to pull an image of a repository."""
        return self.asked("POST ", "/images/create?", urllib.parse.urlencode({"fromImage": name}))

    def ask(self, method, path, status, body=None, **headers):
        """Send one request and check its status."""
        answer = self.program.request(method, path, {k.replace("_", "-"): v for k, v in headers.items()}, body)
        self.assertEqual(status, answer.status, (method, path, answer.body))
        return answer

    def push_blob(self, repository, data):
        self.ask("POST", f"/v2/{repository}/blobs/uploads/?digest={sha256(data)}", 201, data, Content_Type=OCTETS)
        return sha256(data)

    def push(self, repository, target, text="pushed"):
        """Push an image and return it."""
        image = Image(text)
        for blob in (image.layer, image.config):
            self.push_blob(repository, blob)
        self.ask("PUT", f"/v2/{repository}/manifests/{target}", 201, image.manifest, Content_Type=OCI_MANIFEST)
        return image


class TestPullFailures(BehaviourCase):
    """A registry does not tell anonymous clients what exists, so a node must retry with the pod's credentials."""

    def test_not_found_and_denied_are_challenged(self):
        denied = http_answer(404, {"message": "pull access denied for team/secret, repository does not exist"})
        table = (("app", None, 401, True), ("app", basic("user", "password"), 404, False),
                 ("secret", None, 401, True), ("secret", basic("user", "wrong"), 401, False))
        for store in ("containerd", "classic"):
            self.daemon = self.enter(FakeDaemon(store))
            for host in ("registry.example", "docker.io"):
                self.daemon.pulls[f"{host}/team/secret:1"] = denied
            self.start()
            for host in ("registry.example", "docker.io"):
                for name, authorization, status, challenge in table:
                    for method in ("GET", "HEAD"):
                        with self.subTest(store=store, host=host, name=name, method=method, by=authorization):
                            headers = {"Authorization": authorization} if authorization else {}
                            answer = self.ask(method, f"/v2/team/{name}/manifests/1?ns={host}", status, **headers)
                            self.assertEqual(f'Basic realm="{host}"' if challenge else None,
                                             answer.headers["WWW-Authenticate"])
                            self.assertTrue(self.pulls(f"{host}/team/{name}"))


class TestPullAlways(BehaviourCase):
    NAME = "registry.example/team/app:1"
    PATH = "/v2/team/app/manifests/1?ns=registry.example"

    def test_registry_does_not_respond_in_time(self):
        """Docker's own image is served, and the log says so."""
        for store in ("containerd", "classic"):
            with self.subTest(store):
                self.daemon = self.enter(FakeDaemon(store))
                image, go_on = self.daemon.add(self.NAME, Image()), self.event()
                self.daemon.faults["/distribution/"] = lambda _, go_on=go_on: go_on.wait(60) and None
                # Without an early answer, the first response would be the last answer, an error.
                self.start("-pull", "always", constants={"EARLY_ANSWER": 0.3, "LAST_ANSWER": 10})
                self.assertEqual(image.manifest, self.ask("GET", self.PATH, 200).body)
                self.assertIn("WARNING", self.program.wait_for_line("Docker's own image is served"))
                self.assertTrue(self.asked(f"/distribution/{self.NAME}/json"))
                self.assertEqual([], self.asked("/images/create"))

    def test_moved_tag(self):
        self.daemon = self.enter(FakeDaemon())
        new = Image("new")
        for moved in (False, True):
            with self.subTest(moved=moved):
                old = self.daemon.add(self.NAME, Image("old"))
                self.daemon.origins[self.NAME] = (new if moved else old).digest
                self.daemon.pulls[self.NAME] = lambda: self.daemon.add(self.NAME, new) and chunked(b"{}")
                self.start("-pull", "always")
                self.assertEqual((new if moved else old).manifest, self.ask("GET", self.PATH, 200).body)
                self.assertEqual(int(moved), len(self.asked("/images/create")))
                self.assertEqual([], self.program.lines("Docker's own image is served"))


class TestBlobsWithoutManifest(BehaviourCase):
    def test_head_extends_the_lifetime_of_a_blob(self):
        """A client does not send a blob that HEAD reports, so the blob must remain for a while."""
        self.start()
        digest = self.push_blob("team/app", b"some layer")
        path = self.program.store / "repositories/team/app/_blobs" / digest.replace(":", "/")
        old = time.time() - 23 * 3600
        for method in ("HEAD", "GET"):
            with self.subTest(method):
                os.utime(path, (old, old))
                self.ask(method, f"/v2/team/app/blobs/{digest}", 200)
                self.assertLess(old + 3600, path.stat().st_mtime)
        with self.subTest("in another repository"):
            os.utime(path, (old, old))
            self.ask("HEAD", f"/v2/other/app/blobs/{digest}", 404)
            self.assertGreater(old + 3600, path.stat().st_mtime)

    def test_unreferenced_blob_is_kept_for_a_day(self):
        """The program removes old blobs when it starts."""
        self.start()
        digests = [self.push_blob("team/app", data) for data in (b"young", b"old", b"asked for")]
        folder = self.program.store / "repositories/team/app/_blobs/sha256"
        for digest, hours in zip(digests, (23, 25, 25), strict=True):
            path = folder / digest.partition(":")[2]
            os.utime(path, (time.time() - hours * 3600,) * 2)
        self.ask("HEAD", f"/v2/team/app/blobs/{digests[2]}", 200)
        store = self.program.store
        self.program.stop()
        self.start(store=store)
        self.program.wait_for_line("store: tidied up")
        for digest, status in zip(digests, (200, 404, 200), strict=True):
            self.ask("HEAD", f"/v2/team/app/blobs/{digest}", status)


class TestBrowsersCauseNoWork(BehaviourCase):
    """A page may hide where it comes from. It cannot have Docker pull, nor have an image exported."""

    def test_no_pull(self):
        self.start()
        self.daemon.add("app:1", Image())
        for path, status in (("library/app/manifests/1?ns=docker.io", 200), ("library/new/manifests/1?ns=quay.io", 404),
                             (f"library/new/manifests/{sha256(b'x')}?ns=quay.io", 404), ("quay.io/a/manifests/1", 404),
                             (f"library/app/blobs/{sha256(b'x')}?ns=docker.io", 404)):
            self.ask("GET", f"/v2/{path}", status, User_Agent="Mozilla/5.0")
        self.assertEqual([], self.asked("/images/create"))

    def test_no_export_to_find_a_digest(self):
        self.daemon = self.enter(FakeDaemon("classic"))
        self.start()
        self.daemon.add("app:1", Image())
        path = f"/v2/library/app/manifests/{sha256(b'x')}?ns=docker.io"
        self.ask("GET", path, 404, User_Agent="Mozilla/5.0")
        self.assertEqual([], self.asked("/get "))


class TestMissingPlatform(BehaviourCase):
    def test_missing_platform_is_not_pulled(self):
        """The user decides which platforms Docker pulls. A node must get the others from another registry."""
        self.start()
        images = {name: Image(name) for name in ("amd64", "arm64")}
        index = self.daemon.add("app:1", Index(images, left_out=["arm64"]))
        path = "/v2/library/app/manifests/{}?ns=docker.io"
        self.assertEqual(index.manifest, self.ask("GET", path.format("1"), 200).body)
        self.assertEqual(images["amd64"].manifest, self.ask("GET", path.format(images["amd64"].digest), 200).body)
        for authorization in ({}, {"Authorization": basic("user", "password")}):
            answer = self.ask("GET", path.format(images["arm64"].digest), 404, **authorization)
            self.assertEqual("MANIFEST_UNKNOWN", answer.code)
            self.assertIn("linux/arm64", answer.detail)
        self.assertEqual([], self.asked("/images/create"))
        with self.subTest("a manifest that no index lists is pulled"):
            self.ask("GET", path.format(sha256(b"another")), 401)
            self.assertEqual(1, len(self.pulls("docker.io/library/app")))


class TestSecondLocalRegistry(BehaviourCase):
    """A namespace on localhost with another port: an alias of this registry, or another registry."""

    def test_pushed_then_docker_then_pulled(self):
        for store in ("containerd", "classic"):
            with self.subTest(store):
                self.daemon = self.enter(FakeDaemon(store))
                name = f"{SECOND_REGISTRY}/team/app:1"
                pulled, of_docker = Image("pulled"), Image("of Docker")
                self.daemon.pulls[name] = lambda name=name, pulled=pulled: (
                    self.daemon.add(name, pulled) and chunked(b"{}"))
                self.start()
                path = f"/v2/team/app/manifests/1?ns={SECOND_REGISTRY}"
                self.assertEqual(pulled.manifest, self.ask("GET", path, 200).body)
                self.assertEqual(1, len(self.pulls(f"{SECOND_REGISTRY}/team/app")))
                self.daemon.add(name, of_docker)
                self.assertEqual(of_docker.manifest, self.ask("GET", path, 200).body)
                pushed = self.push("team/app", "1")
                self.assertEqual(pushed.manifest, self.ask("GET", path, 200).body)
                self.assertEqual(1, len(self.asked("/images/create")))
                for blob in (pushed.layer, pushed.config):
                    self.assertEqual(blob, self.ask(
                        "GET", f"/v2/team/app/blobs/{sha256(blob)}?ns={SECOND_REGISTRY}", 200).body)


class TestChangedEngine(BehaviourCase):
    def test_docker_restart_with_another_image_store(self):
        for before, after, source in (("containerd", "classic", "content from: store, export"),
                                      ("classic", "containerd", "content from: store, content service")):
            with self.subTest(f"{before} to {after}"):
                self.daemon = self.enter(FakeDaemon(before))
                self.start(constants={"ENGINE_FRESH": 0})
                for store in (before, after):
                    if store == after:
                        self.daemon.restart(after)
                    image = self.daemon.add("app:1", Image(store))
                    for kind, target, data in (("manifests", "1", image.manifest),
                                               ("blobs", sha256(image.layer), image.layer)):
                        path = f"/v2/library/app/{kind}/{target}?ns=docker.io"
                        self.assertEqual(data, self.ask("GET", path, 200).body)
                self.assertIn(source, self.program.wait_for_line("content from", 2))
                self.assertEqual(1, len(self.asked("/get ")), "only the image of the classic store is exported")

    def test_data_folder_of_another_docker(self):
        """The folder is not used, and the log says why."""
        image = Image()
        for store, folder in (("containerd", "containerd/daemon/io.containerd.content.v1.content/blobs/sha256"),
                              ("classic", "image/overlay2/layerdb/sha256")):
            for identity, used in ((b"another", False), (b"\xff", False), (b"5c9fd3f1", store == "containerd")):
                with self.subTest(store=store, identity=identity):
                    self.daemon = self.enter(FakeDaemon(store))
                    self.daemon.add("app:1", image)
                    root = self.folder()
                    (root / folder).mkdir(parents=True)
                    (root / "engine-id").write_bytes(identity + b"\n")
                    for digest, data in image.blobs.items() if store == "containerd" else ():
                        (root / folder / digest.partition(":")[2]).write_bytes(data)
                    self.start("-docker-root", str(root))
                    layer = sha256(image.layer)
                    self.assertEqual(image.manifest, self.ask(
                        "GET", "/v2/library/app/manifests/1?ns=docker.io", 200).body)
                    self.assertEqual(image.layer, self.ask(
                        "GET", f"/v2/library/app/blobs/{layer}?ns=docker.io", 200).body)
                    if identity != b"5c9fd3f1":
                        self.program.wait_for_line("the data folder of another Docker")
                    lines = self.program.lines("the data folder of another Docker")
                    self.assertEqual(identity != b"5c9fd3f1", bool(lines))
                    self.assertTrue(all("WARNING" in line and str(root) in line for line in lines))
                    asked = layer in self.daemon.read if store == "containerd" else bool(self.asked("/get "))
                    self.assertEqual(not used, asked, "content must come from the API only without the folder")


class TestSharedReads(BehaviourCase):
    """The containerd store, read through Docker's API."""

    def test_small_content_is_not_shared(self):
        """Below 1 MiB a file costs more than it saves: each reader reads from Docker, and no file is written."""
        self.start()
        image = self.daemon.add("app:1", Image("x" * 1_000_000))
        digest, both, reads, bodies = sha256(image.layer), self.event(), [], []

        def reading(sock, stream, asked, part):
            if asked == digest and len(part) == len(image.layer):
                reads.append(asked)
                if len(reads) == 2:
                    both.set()
                both.wait(30)  # the first read does not end before the second one starts
            self.daemon.answer_call(sock, stream, b"\x12" + varint(len(part)) + part)

        self.daemon.reading = reading
        path = f"/v2/library/app/blobs/{digest}?ns=docker.io"
        clients = [threading.Thread(target=lambda: bodies.append(self.program.get(path).body)) for _ in range(2)]
        for client in clients:
            client.start()
        for client in clients:
            client.join(60)
        self.assertEqual([digest] * 2, [sha256(body) for body in bodies])
        self.assertEqual(2, len(reads))
        self.assertLessEqual(2, self.daemon.read.count(digest))
        self.assertFalse(self.program.store.exists())


class TestHandshake(BehaviourCase):
    def test_tls_on_the_plain_port(self):
        """A client that tries TLS first recognizes the HTTP response and retries without TLS. This is not logged."""
        self.start()
        for line in ("content from: ", "could be better: ", "tidied up"):  # the last that a start logs, in any order
            self.program.wait_for_line(line)
        outgoing = ssl.MemoryBIO()
        client = ssl.create_default_context().wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname="registry")
        with self.assertRaises(ssl.SSLWantReadError):
            client.do_handshake()
        hello, answer = outgoing.read(), b""
        self.assertTrue(hello.startswith(b"\x16\x03"))
        before = len(self.program.log)
        with socket.create_connection(("127.0.0.1", self.program.port), timeout=60) as sock:
            sock.sendall(hello)
            sock.shutdown(socket.SHUT_WR)
            with contextlib.suppress(ConnectionResetError):
                while data := sock.recv(4096):
                    answer += data
        self.assertTrue(answer.startswith(b"HTTP/1.1 400 "), answer)
        self.ask("GET", "/v2/?the-next-one", 200)
        self.program.wait_for_line("the-next-one")
        self.assertEqual([], [line for line in self.program.log[before:] if "the-next-one" not in line])


class TestRequests(BehaviourCase):
    def test_if_range(self):
        """Responses have no validator, so a range that depends on one is ignored and everything is sent."""
        self.start()
        data = os.urandom(5000)
        of_docker = self.daemon.add("app:1", Image()).layer
        digest = self.push_blob("team/app", data)
        for path, content in ((f"/v2/team/app/blobs/{digest}", data),
                              (f"/v2/library/app/blobs/{sha256(of_docker)}?ns=docker.io", of_docker)):
            self.assertEqual(content[100:200], self.ask("GET", path, 206, Range="bytes=100-199").body)
            for condition in ('"etag"', 'W/"etag"', "Sat, 01 Jan 2022 00:00:00 GMT"):
                with self.subTest(path=path, condition=condition):
                    answer = self.ask("GET", path, 200, Range="bytes=100-199", If_Range=condition)
                    self.assertEqual((content, None), (answer.body, answer.headers["Content-Range"]))

    def test_response_has_oci_namespace(self):
        self.start()
        image = self.daemon.add("app:1", Image())
        for path in ("manifests/1", f"manifests/{image.digest}", f"blobs/{sha256(image.layer)}", "tags/list"):
            for method in ("GET", "HEAD"):
                with self.subTest(path=path, method=method):
                    answer = self.ask(method, f"/v2/library/app/{path}?ns=docker.io", 200)
                    self.assertEqual("docker.io", answer.headers["OCI-Namespace"])
        self.push("library/app", "1")
        self.assertIsNone(self.ask("GET", "/v2/library/app/manifests/1", 200).headers["OCI-Namespace"])

    def test_range_of_an_upload(self):
        """An empty upload has the range 0-0, as clients of the first registries expect, and so has one byte."""
        self.start()
        upload = self.ask("POST", "/v2/team/app/blobs/uploads/", 202)
        location = upload.headers["Location"]
        self.assertEqual("0-0", upload.headers["Range"])
        self.assertEqual("0-0", self.ask("GET", location, 204).headers["Range"])
        for count, expected in ((1, "0-0"), (1, "0-1"), (8, "0-9")):
            self.assertEqual(expected, self.ask("PATCH", location, 202, b"x" * count).headers["Range"])
            self.assertEqual(expected, self.ask("GET", location, 204).headers["Range"])

    def test_many_tag_parameters(self):
        self.start()
        for count, status in ((100, 201), (101, 414)):
            with self.subTest(count):
                repository, image = f"tags/{count}", Image(str(count))
                for blob in (image.layer, image.config):
                    self.push_blob(repository, blob)
                tags = [f"t{number:03}" for number in range(count)]
                query = urllib.parse.urlencode([("tag", tag) for tag in tags])
                with mock.patch("http.client._MAXHEADERS", 200):  # each tag is a header of the answer
                    answer = self.ask("PUT", f"/v2/{repository}/manifests/{image.digest}?{query}", status,
                                      image.manifest, Content_Type=OCI_MANIFEST)
                if status == 201:
                    self.assertEqual(tags, answer.headers.get_all("OCI-Tag"))
                    self.assertEqual(tags, self.ask("GET", f"/v2/{repository}/tags/list", 200).json["tags"])
                    self.assertEqual(image.manifest, self.ask("GET", f"/v2/{repository}/manifests/t099", 200).body)
                else:
                    self.assertEqual("TOO_MANY_TAGS", answer.code)
                    self.ask("GET", f"/v2/{repository}/manifests/{image.digest}", 404)
                    self.ask("GET", f"/v2/{repository}/manifests/t000", 404)
                    self.ask("GET", f"/v2/{repository}/tags/list", 404)

    def test_artifacts_of_any_type(self):
        """They are served with the type that they were pushed with, also after a restart."""
        self.start()
        config, layer = b"not even JSON", b"a layer"
        odd = "application/vnd.example.Odd-1.x+yaml"
        image = {"schemaVersion": 2, "config": descriptor(config, odd), "layers": [descriptor(layer, "text/x-y")]}
        table = {"own-type": (encode({**image, "mediaType": odd}), odd),
                 "header-only": (encode({"entries": [1, 2]}), odd),
                 "image-without-type": (encode(image), odd),
                 "docker-type": (encode(image), "application/vnd.docker.distribution.manifest.v2+json"),
                 "artifact": (encode({**image, "mediaType": OCI_MANIFEST, "artifactType": odd}), OCI_MANIFEST)}
        pushed = {}
        for tag, (data, media_type) in table.items():
            for blob in (config, layer):
                self.push_blob(f"artifacts/{tag}", blob)
            self.ask("PUT", f"/v2/artifacts/{tag}/manifests/{tag}", 201, data, Content_Type=media_type)
            pushed[tag] = sha256(data)
        for restarted in (False, True):
            if restarted:
                store = self.program.store
                self.program.stop()
                self.start(store=store)
            for tag, (data, media_type) in table.items():
                for reference in (tag, pushed[tag]):
                    with self.subTest(tag=tag, reference=reference, restarted=restarted):
                        answer = self.ask("GET", f"/v2/artifacts/{tag}/manifests/{reference}", 200)
                        self.assertEqual((data, media_type), (answer.body, answer.headers["Content-Type"]))


class TestUploads(BehaviourCase):
    DATA = bytes(range(256)) * 40
    LOCATION = "/v2/team/app/blobs/uploads/"

    def begin(self):
        return self.ask("POST", self.LOCATION, 202).headers["Location"]

    def restart(self, how=signal.SIGTERM):
        self.program.stop(how)
        self.start(store=self.program.store)

    def test_upload_continues_after_restart(self):
        """The hash of the bytes from before the restart is computed again."""
        self.start(store=self.folder() / "store")
        for how in (signal.SIGTERM, signal.SIGKILL):
            for algorithm in ("sha256", "sha512"):
                with self.subTest(how=how, algorithm=algorithm):
                    location = self.begin()
                    self.ask("PATCH", location, 202, self.DATA[:1000])
                    self.ask("PATCH", location, 202, self.DATA[1000:3000])
                    self.restart(how)
                    self.assertEqual("0-2999", self.ask("GET", location, 204).headers["Range"])
                    self.ask("PATCH", location, 416, self.DATA[:1000], Content_Range="0-999")
                    self.ask("PATCH", location, 202, self.DATA[3000:9000], Content_Range="3000-8999")
                    digest = f"{algorithm}:{hashlib.new(algorithm, self.DATA).hexdigest()}"
                    self.ask("PUT", f"{location}?digest={digest}", 201, self.DATA[9000:])
                    self.assertEqual(self.DATA, self.ask("GET", f"/v2/team/app/blobs/{digest}", 200).body)

    def test_wrong_digest_after_restart(self):
        """The result is the same as without a restart."""
        self.start(store=self.folder() / "store")
        location = self.begin()
        self.ask("PATCH", location, 202, b"x" + self.DATA[1:1000])
        self.restart()
        answer = self.ask("PUT", f"{location}?digest={sha256(self.DATA)}", 400, self.DATA[1000:])
        self.assertEqual("DIGEST_INVALID", answer.code)
        self.ask("GET", f"/v2/team/app/blobs/{sha256(self.DATA)}", 404)

    def test_busy_upload_is_409(self):
        self.start()
        location = self.begin()
        with socket.create_connection(("127.0.0.1", self.program.port), timeout=60) as sock:
            sock.sendall(f"PATCH {location} HTTP/1.1\r\nHost: x\r\nContent-Length: 4000\r\n\r\n".encode()
                         + self.DATA[:2000])
            wait_until(lambda: self.ask("GET", location, 204).headers["Range"] == "0-1999")
            for method, path in (("PATCH", location), ("PUT", f"{location}?digest={sha256(b'x')}"),
                                 ("DELETE", location)):
                with self.subTest(method):
                    self.assertEqual("UPLOAD_BUSY", self.ask(method, path, 409, b"x").code)
            sock.sendall(self.DATA[2000:4000])
            self.assertTrue(sock.recv(4096).startswith(b"HTTP/1.1 202 "))
        self.ask("PUT", f"{location}?digest={sha256(self.DATA)}", 201, self.DATA[4000:])
        self.assertEqual(self.DATA, self.ask("GET", f"/v2/team/app/blobs/{sha256(self.DATA)}", 200).body)

    def test_finished_upload_left_by_a_kill(self):
        """A kill at the end of an upload may leave both the upload and the blob. The blob must not change any more."""
        self.start(store=self.folder() / "store")
        digest = sha256(self.DATA)
        for method in ("PATCH", "PUT", "DELETE"):
            with self.subTest(method):
                location = self.begin()
                self.ask("PATCH", location, 202, self.DATA)
                self.program.stop(signal.SIGKILL)
                repository = self.program.store / "repositories/team/app"
                upload = repository / "_uploads" / location.rpartition("/")[2]
                for folder in (repository / "_blobs", self.program.store / "blobs"):
                    name = folder / digest.replace(":", "/")
                    name.parent.mkdir(parents=True, exist_ok=True)
                    name.unlink(missing_ok=True)
                    os.link(upload, name)
                self.start(store=self.program.store)
                query = f"?digest={sha256(self.DATA + b'x')}" if method == "PUT" else ""
                self.assertEqual("BLOB_UPLOAD_UNKNOWN", self.ask(method, location + query, 404, b"x").code)
                self.assertEqual(self.DATA, self.ask("GET", f"/v2/team/app/blobs/{digest}", 200).body)


class TestArriving(BehaviourCase):
    """Arriving content has been promised, but may still fail. Then it must not be served as existing content."""

    def start_fetching(self, image):
        """Start with the classic store, for which the program fetches content from the image's registry."""
        self.daemon = self.enter(FakeDaemon("classic"))
        self.daemon.info = INSECURE
        self.origin = self.enter(Origin(image))
        self.start(env={"NO_PROXY": "127.0.0.2", "no_proxy": "127.0.0.2"})
        self.manifest = f"/v2/team/app/manifests/{image.digest}?ns={self.origin.host}"
        self.layer = f"/v2/team/app/blobs/{sha256(image.layer)}?ns={self.origin.host}"

    def check_read_fails(self, response):
        with self.assertRaises((http.client.IncompleteRead, ConnectionError)):
            response.read()

    def test_failed_pull(self):
        """The containerd store. Docker gets the manifest and the config, and then its connection is closed."""
        image, go_on, host = Image("x" * 5000), self.event(), "127.0.0.2:1"
        name = f"{host}/team/app:1"
        failure = encode({"errorDetail": {}, "error": "failed to copy: read tcp: connection reset by peer"})
        layer = f"/v2/team/app/blobs/{sha256(image.layer)}?ns={host}"
        by_tag, by_digest = (f"/v2/team/app/manifests/{target}?ns={host}" for target in ("1", image.digest))

        def pull(sock):
            sock.sendall(chunked(b'{"status":"Pulling from team/app"}\n')[:-len(b"0\r\n\r\n")])
            self.daemon.content.update({digest: data for digest, data in image.blobs.items() if data != image.layer})
            go_on.wait(60)
            sock.sendall(b"%x\r\n%s\r\n0\r\n\r\n" % (len(failure), failure))

        self.start(constants={"EARLY_ANSWER": 0.2})
        self.daemon.origins[name] = image.digest
        self.daemon.pulls[name] = lambda: pull
        self.assertEqual(image.manifest, self.ask("GET", by_tag, 200).body)
        self.assertEqual(image.config, self.ask(
            "GET", f"/v2/team/app/blobs/{image.config_digest}?ns={host}", 200).body)
        reader = self.program.begin_get(layer)
        self.assertEqual((200, str(len(image.layer))), (reader.status, reader.headers["Content-Length"]))
        go_on.set()
        self.check_read_fails(reader)
        self.assertIn("closed early", self.program.wait_for_line(f"blobs/{sha256(image.layer)}"))
        for _ in range(2):
            self.ask("GET", by_digest, 404)
            self.ask("GET", layer, 404)
            self.ask("GET", by_tag, 502)
        self.daemon.pulls[name] = lambda: self.daemon.add(name, image) and chunked(b"{}")
        self.assertEqual(image.manifest, self.ask("GET", by_tag, 200).body)
        self.assertEqual(image.layer, self.ask("GET", layer, 200).body)

    def test_failed_fetch(self):
        """The fetch fails in the middle of a blob: responses are cut off, and nothing is kept or promised again."""
        for what, rest in (("cut off", lambda rest: rest[:100]), ("wrong bytes", lambda rest: b"y" * len(rest))):
            with self.subTest(what):
                image, go_on = Image("x" * 5000), self.event()
                self.start_fetching(image)
                self.origin.hold(image.layer, go_on, rest)
                self.assertEqual(image.manifest, self.ask("GET", self.manifest, 200).body)
                reader = self.program.begin_get(self.layer)
                self.assertEqual((200, str(len(image.layer))), (reader.status, reader.headers["Content-Length"]))
                go_on.set()
                self.check_read_fails(reader)
                del self.origin.content[sha256(image.layer)]
                for _ in range(2):
                    self.assertEqual("MANIFEST_UNKNOWN", self.ask("GET", self.manifest, 404).code)
                    self.ask("GET", self.layer, 404)
                hexadecimal = sha256(image.layer).partition(":")[2]
                self.assertEqual([], list(self.program.store.rglob(hexadecimal)))
                self.origin.content.update(image.blobs)
                self.origin.answers.clear()
                self.assertEqual(image.manifest, self.ask("GET", self.manifest, 200).body)
                self.assertEqual(image.layer, self.ask("GET", self.layer, 200).body)

    def test_content_of_another_size(self):
        """A registry, or something before it, gives something else. The registry of another name is asked then."""
        image = Image("x" * 5000)
        layer = sha256(image.layer)
        self.daemon = self.enter(FakeDaemon())
        self.daemon.info = INSECURE
        first, second = (self.enter(Origin(image)) for _ in range(2))
        first.content[layer] = b"<html>please log in"
        for origin in (first, second):
            self.daemon.add(f"{origin.host}/team/app:1", image)
        del self.daemon.content[layer]
        self.start(env={"NO_PROXY": "127.0.0.2", "no_proxy": "127.0.0.2"})
        self.assertEqual(image.manifest, self.ask("GET", f"/v2/team/app/manifests/1?ns={first.host}", 200).body)
        self.assertEqual(image.layer, self.ask("GET", f"/v2/team/app/blobs/{layer}?ns={first.host}", 200).body)
        self.assertIn(f"blobs/{layer}", first.requests)

    def test_credentials_of_another_client(self):
        """Content that is fetched with the credentials of one client is not served to others while it arrives."""
        image, go_on = Image("x" * 5000), self.event()
        good, wrong = basic("user", "password"), basic("user", "wrong")
        self.start_fetching(image)
        self.origin.authorization = good
        self.origin.hold(image.layer, go_on)
        other_clients = ({}, {"Authorization": wrong})
        for headers, challenge in zip(other_clients, (f'Basic realm="{self.origin.host}"', None), strict=True):
            answer = self.ask("GET", self.manifest, 401, **headers)
            self.assertEqual(challenge, answer.headers["WWW-Authenticate"])
        self.assertEqual(image.manifest, self.ask("GET", self.manifest, 200, Authorization=good).body)
        reader = self.program.begin_get(self.layer, Authorization=good)
        self.assertEqual(200, reader.status)
        self.assertTrue(reader.read(1000))
        for headers in other_clients:
            for method in ("GET", "HEAD"):
                with self.subTest(headers=headers, method=method):
                    self.ask(method, self.layer, 404, **headers)
        go_on.set()
        self.assertEqual(image.layer[1000:], reader.read())
        self.assertEqual(2, self.origin.requests.count(f"blobs/{sha256(image.layer)}"), "one is the 401")
        self.assertEqual([], self.program.lines("password"))


if __name__ == "__main__":
    unittest.main()
