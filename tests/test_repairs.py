"""What Docker lacks: lost content, digests that the classic store does not keep, and tags that have moved."""

import base64
import concurrent.futures
import contextlib
import http.client
import json
import os
import tempfile
import unittest
from pathlib import Path

import lab
from program import Program
from test_engines import EngineCase, basic, sha256


def setUpModule():
    lab.require()


class RepairCase(EngineCase):
    """An image of two layers that only an origin has."""

    def on(self, host):
        """Return a name of the image on a host that leads to the origin; the image is removed after the test."""
        name = f"{host}/lab/{self.name}"
        self.images += [f"{name}:1", f"{name}@{self.index}"]
        return f"{name}:1"

    def setUp(self):
        super().setUp()
        self.put("1")

    def put(self, tag, origin="open"):
        self.layers = [os.urandom(10_000), os.urandom(1_000_000)]
        self.index, (self.child,) = lab.push_platforms(lab.ORIGINS[origin], f"lab/{self.name}", tag, ["amd64"], [
            ("small", self.layers[0]), ("large", self.layers[1])])
        _, _, body = lab.ORIGINS[origin].request("GET", f"/v2/lab/{self.name}/manifests/{self.child}", {
            "Accept": "application/vnd.oci.image.manifest.v1+json"})
        self.manifest = json.loads(body)
        self.large = self.manifest["layers"][-1]["digest"]

    def path(self, kind, target, host):
        return f"/v2/lab/{self.name}/{kind}/{target}?ns={host}"

    def stored(self, program):
        """Return the digests of the content in the program's own store."""
        return {f"sha256:{path.name}" for path in Path(program.store).glob("blobs/sha256/*")}

    def login(self, host):
        """Return a folder with a config.json like the one that `docker login` writes."""
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        auth = base64.b64encode(f"{lab.USER}:{lab.PASSWORD}".encode()).decode()
        (Path(folder.name) / "config.json").write_text(json.dumps({"auths": {host: {"auth": auth}}}))
        return folder.name


class LostBlobs(RepairCase):
    """On the containerd store: Docker still has the image, but a blob is missing from its content store."""

    def lose(self, reference, digest=None):
        self.engine.docker("pull", "-q", reference)
        self.engine.containerd("content", "rm", digest or self.large)

    def assert_served(self, program, reference):
        self.pull(program, reference)
        self.assertEqual(self.index, lab.NODE.digest(reference))
        self.assertEqual(self.large, sha256(lab.NODE.content(self.large)))


class TestLostBlobs(LostBlobs):
    engine = lab.ENGINES["containerd"]

    def untagged(self):
        return set(self.engine.docker("images", "-aq", "--filter", "dangling=true").split())

    def test_by_tag_and_by_digest(self):
        for what, reference in (("tag", self.on(lab.ORIGINS["open"].host)),
                                ("digest", f"{lab.ORIGINS['open'].host}/lab/{self.name}@{self.index}")):
            with self.subTest(what):
                lab.NODE.forget()
                untagged = self.untagged()
                self.lose(reference)
                program = self.program()
                self.assert_served(program, reference)
                self.assertIn("done", program.wait_for_line("fetch ", 2))
                self.assertEqual(({self.large}, untagged), (self.stored(program), self.untagged()))
                self.engine.remove(*self.images, reference)

    def test_removed_image_is_pulled_again(self):
        """A node that asks for its digest at once gets all of it, although everything was here a moment ago."""
        host, program = lab.ORIGINS["open"].host, self.program()
        for count in (1, 2):
            for digest in (self.index, self.child):
                for method in ("HEAD", "GET"):
                    self.assertEqual(200, program.request(method, self.path("manifests", digest, host)).status)
            for blob in (self.manifest["config"], *self.manifest["layers"]):
                self.assertEqual(blob["digest"], sha256(program.get(self.path("blobs", blob["digest"], host)).body))
            self.assertEqual(count, len(program.jobs("pull")))
            self.engine.docker("rmi", f"{host}/lab/{self.name}@{self.index}")

    def test_lost_config_and_lost_layer(self):
        reference = self.on(lab.ORIGINS["open"].host)
        for lost in (self.manifest["config"]["digest"], self.manifest["layers"][0]["digest"]):
            with self.subTest(lost):
                lab.NODE.forget()
                self.lose(reference, lost)
                self.assert_served(self.program(), reference)
                self.engine.remove(reference)

    def test_concurrent_requests(self):
        reference = self.on(lab.ORIGINS["open"].host)
        self.lose(reference)
        program = self.program()
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            paths = [self.path("manifests", target, lab.ORIGINS["open"].host) for target in ("1", self.child) * 4]
            self.assertEqual({200}, {answer.status for answer in pool.map(program.get, paths)})
        answer = program.get(self.path("blobs", self.large, lab.ORIGINS["open"].host))
        self.assertEqual(self.large, sha256(answer.body))

    def test_lost_layer_that_no_registry_has(self):
        """The image was built here and is in no registry."""
        self.build("1", {"file": os.urandom(5000)})
        layer = self.built_layer()
        self.engine.containerd("content", "rm", layer)
        program = self.program()
        answer = program.get(self.manifest_path("1"))
        self.assertEqual((404, "MANIFEST_UNKNOWN"), (answer.status, answer.code))
        for text in (layer, "registry-1.docker.io", "pull or build it again"):
            self.assertIn(text, answer.detail)
            program.wait_for_line(text)
        self.assertEqual(404, program.head(self.manifest_path("1")).status)
        for ns in ("", "?ns=docker.io"):
            blob = program.head(f"/v2/library/{self.name}/blobs/{layer}{ns}")
            self.assertEqual(404, blob.status, "a client would not push the blob otherwise")

    def built_layer(self):
        """Return the digest of the last layer of the image that was built here."""
        found = self.engine.inspect(f"{self.name}:1")["Id"]
        document = json.loads(self.engine.content(found))
        if "manifests" in document:
            document = json.loads(self.engine.content(document["manifests"][0]["digest"]))
        return document["layers"][-1]["digest"]

    def test_without_content_service(self):
        """If one blob of a manifest is lost, exports contain none of them."""
        reference = self.on(lab.ORIGINS["open"].host)
        self.lose(reference)
        with lab.filtered(self.engine, b"/grpc HTTP/1.1") as socket, Program(f"unix://{socket}") as program:
            self.assert_served(program, reference)
            self.assertTrue(program.jobs("export"))
            self.assertEqual(1, len(program.jobs(f"fetch {self.large}")))

    def test_pull_never(self):
        reference = self.on(lab.ORIGINS["open"].host)
        self.lose(reference)
        program = self.program("-pull", "never")
        answer = program.get(self.path("manifests", "1", lab.ORIGINS["open"].host))
        self.assertEqual((404, "MANIFEST_UNKNOWN"), (answer.status, answer.code))
        self.assertIn("-pull never", answer.detail)
        self.assertEqual([], program.jobs("fetch"))


class TestRepairByFetch(LostBlobs):
    """Only the blob is fetched from the image's registry, into the store."""

    engine = lab.ENGINES["containerd-26"]

    def test_open_registry(self):
        reference = self.on(lab.ORIGINS["open"].host)
        self.lose(reference)
        program = self.program()
        self.assert_served(program, reference)
        self.assertEqual({self.large}, self.stored(program))
        self.assertEqual(1, len(program.jobs("fetch")))
        path = self.path("blobs", self.large, lab.ORIGINS["open"].host)
        whole = program.get(path)
        self.assertEqual(self.large, sha256(whole.body))
        part = program.get(path, Range="bytes=5000-5999")
        self.assertEqual((206, whole.body[5000:6000]), (part.status, part.body))

    def test_token_and_redirect(self):
        for private, user, status in ((False, None, 307), (True, f"{lab.USER}:{lab.PASSWORD}", 308)):
            with self.subTest(private=private), lab.TokenOrigin(lab.ORIGINS["open"], private, status) as origin:
                lab.NODE.forget()
                reference = self.on(origin.host)
                if private:
                    self.engine.docker("login", "-u", lab.USER, "--password-stdin", origin.host, input=lab.PASSWORD)
                    self.addCleanup(self.engine.docker, "logout", origin.host)
                self.lose(reference)
                program = self.program()
                origin.requests.clear()
                if private:
                    self.assertEqual((401, f'Basic realm="{origin.host}"'), (
                        (answer := program.head(self.path("manifests", "1", origin.host))).status,
                        answer.headers["WWW-Authenticate"]))
                self.pull(program, reference, user=user)
                self.assertEqual(self.large, sha256(lab.NODE.content(self.large)))
                self.assertEqual({None}, {authorization for path, authorization in origin.requests
                                          if path.startswith("storage") and path.endswith(self.large)})
                self.assertFalse([line for line in program.log if lab.PASSWORD in line or "Bearer ey" in line])

    def test_basic_authentication(self):
        """The credentials are those of the request, or those of this machine. Wrong ones are an error."""
        self.put("1", "private")
        host = lab.ORIGINS["private"].host
        reference = self.on(host)
        self.engine.docker("login", "-u", lab.USER, "--password-stdin", host, input=lab.PASSWORD)
        self.addCleanup(self.engine.docker, "logout", host)
        self.lose(reference)
        path = self.path("manifests", "1", host)
        program = self.program()
        self.assertEqual(401, program.get(path).status)
        wrong = program.get(path, Authorization=basic(lab.USER, "wrong"))
        self.assertEqual((401, None), (wrong.status, wrong.headers["WWW-Authenticate"]))
        answer = program.get(path, Authorization=basic(lab.USER, lab.PASSWORD))
        self.assertEqual(200, answer.status, answer.body)
        program = self.program(env={"DOCKER_CONFIG": self.login(host)})
        self.assertEqual(200, program.get(path).status)
        self.assertEqual(self.large, sha256(program.get(self.path("blobs", self.large, host)).body))

    def test_registry_errors(self):
        cases = (("429", "/blobs/", (429, b"slow down"), 429, "TOOMANYREQUESTS"),
                 ("500", "/blobs/", (500, b"no"), 404, "MANIFEST_UNKNOWN"),
                 ("403", "/blobs/", (403, b"no"), 401, "UNAUTHORIZED"),
                 ("404", "storage", (404, b"gone"), 404, "MANIFEST_UNKNOWN"),
                 ("malformed token response", "/token", (200, b"<html>"), 404, "MANIFEST_UNKNOWN"),
                 ("invalid token", "/token", (200, b'{"token": "a\\r\\nb"}'), 404, "MANIFEST_UNKNOWN"),
                 ("no token", "/token", (500, b""), 404, "MANIFEST_UNKNOWN"))
        with lab.TokenOrigin(lab.ORIGINS["open"]) as origin:
            self.lose(self.on(origin.host))
            program = self.program()
            for what, where, answer, status, code in cases:
                with self.subTest(what):
                    origin.answers = {where: answer}
                    found = program.get(self.path("manifests", "1", origin.host))
                    self.assertEqual((status, code), (found.status, found.code), found.body)
            origin.answers = {}
            self.assertEqual(200, program.get(self.path("manifests", "1", origin.host)).status)
            self.assertEqual([], program.lines("a bug in this program"))

    def test_content_with_wrong_digest(self):
        """The response is cut off before its last byte, and nothing is kept.

        If the fetch fails before the manifest is answered, the blob is not promised: 404.
        """
        with lab.TokenOrigin(lab.ORIGINS["open"]) as origin:
            self.lose(self.on(origin.host))
            size = self.manifest["layers"][-1]["size"]
            for what, body in (("wrong", bytes(size)), ("too short", b"abc"), ("too long", bytes(size + 1))):
                with self.subTest(what):
                    origin.answers = {f"storage/v2/lab/{self.name}/blobs/": (200, body)}
                    program = self.program()
                    program.get(self.path("manifests", "1", origin.host))
                    with contextlib.suppress(http.client.IncompleteRead, ConnectionError):
                        answer = program.get(self.path("blobs", self.large, origin.host))
                        self.assertIn(answer.status, (404, 502))
                    self.assertIn("failed", program.wait_for_line(f"fetch {self.large} of", 2))
                    self.assertEqual(set(), self.stored(program))


class DigestsOnClassic:
    """The classic store keeps no manifests of registries, so content requested by digest comes from the registry."""

    def test_node_pulls_by_digest(self):
        for target in (self.index, self.child):
            with self.subTest(target):
                lab.NODE.forget()
                reference = f"{lab.ORIGINS['open'].host}/lab/{self.name}@{target}"
                program = self.program()
                self.pull(program, reference)
                self.assertEqual(target, lab.NODE.digest(reference))
                expected = {self.child, target, self.manifest["config"]["digest"],
                            *(layer["digest"] for layer in self.manifest["layers"])}
                self.assertEqual(expected, self.stored(program))
                self.assertEqual([], program.jobs("pull"))

    def test_offline(self):
        """Content that was fetched earlier is served. The rest is 404, with the reason."""
        with lab.Gate(lab.ORIGINS["open"]) as gate:
            gate.open()
            program = self.program()
            reference = f"{gate.host}/lab/{self.name}@{self.index}"
            self.pull(program, reference)
        lab.NODE.forget()
        self.pull(program, reference)
        answer = self.program().get(self.path("manifests", self.index, gate.host))
        self.assertEqual((404, "MANIFEST_UNKNOWN"), (answer.status, answer.code))
        self.assertIn("refused", answer.detail)

    def test_truncated_blob_is_fetched_again(self):
        store = tempfile.TemporaryDirectory()
        self.addCleanup(store.cleanup)
        for _ in range(2):
            program = self.program(store=store.name)
            path = self.path("manifests", self.child, lab.ORIGINS["open"].host)
            self.assertEqual(200, program.get(path).status)
            blob = program.get(self.path("blobs", self.large, lab.ORIGINS["open"].host))
            self.assertEqual(self.large, sha256(blob.body))
            program.stop()
            os.truncate(Path(store.name, "blobs", self.large.replace(":", "/")), 10)

    def test_unknown_digest(self):
        answer = self.program().get(self.path("manifests", sha256(b"nothing"), lab.ORIGINS["open"].host))
        self.assertEqual(401, answer.status, "registries do not tell anonymous clients what exists")
        answer = self.program().get(self.path("manifests", sha256(b"nothing"), lab.ORIGINS["open"].host),
                                    Authorization=basic("a", "b"))
        self.assertEqual((404, "MANIFEST_UNKNOWN"), (answer.status, answer.code))

    def test_blobs_are_served_while_they_arrive(self):
        """Readers get the first bytes of a blob before the last ones have arrived."""
        with lab.Gate(lab.ORIGINS["open"]) as gate:
            program = self.program()
            self.assertEqual(200, program.get(self.path("manifests", self.child, gate.host)).status)
            small = self.manifest["layers"][1]["digest"]
            self.assertEqual(small, sha256(program.get(self.path("blobs", small, gate.host)).body))
            readers = [program.begin_get(self.path("blobs", self.large, gate.host)) for _ in range(3)]
            first = [reader.read(100_000) for reader in readers]
            gate.open()
            self.assertEqual({self.large}, {sha256(start + reader.read())
                                            for start, reader in zip(first, readers, strict=True)})
            self.assertEqual(1, len([line for line in program.jobs("fetch") if self.large in line]))

    def test_origin_closes_connection(self):
        gate = lab.Gate(lab.ORIGINS["open"])
        with gate:
            program = self.program()
            self.assertEqual(200, program.get(self.path("manifests", self.child, gate.host)).status)
            reader = program.begin_get(self.path("blobs", self.large, gate.host))
            reader.read(100_000)
        with self.assertRaises((http.client.IncompleteRead, ConnectionError)):
            reader.read()
        self.assertIn("closed early", program.wait_for_line(f"blobs/{self.large}"))
        answer = program.get(self.path("manifests", self.child, gate.host))
        self.assertEqual((404, "MANIFEST_UNKNOWN"), (answer.status, answer.code))
        self.assertNotIn(self.large, self.stored(program))

    def test_two_clients_with_different_credentials(self):
        """No client gets content with another client's credentials, not even while it is being fetched."""
        self.put("1", "private")
        with lab.Gate(lab.ORIGINS["private"]) as gate:
            program = self.program()
            path = self.path("manifests", self.child, gate.host)
            good, wrong = basic(lab.USER, lab.PASSWORD), basic(lab.USER, "wrong")
            with concurrent.futures.ThreadPoolExecutor() as pool:
                for expected, answer in [(200, pool.submit(program.get, path, Authorization=good)),
                                         (401, pool.submit(program.get, path, Authorization=wrong)),
                                         (401, pool.submit(program.get, path))]:
                    self.assertEqual(expected, answer.result().status)
            blob = self.path("blobs", self.large, gate.host)
            arriving = program.begin_get(blob, Authorization=good)
            self.assertEqual(404, program.get(blob, Authorization=wrong).status, "it was not promised the blob")
            self.assertEqual(404, program.get(blob).status)
            gate.open()
            self.assertEqual(self.large, sha256(arriving.read()))

    def test_disallowed_registry_is_not_asked(self):
        host = lab.ORIGINS["open"].host
        for arguments, status in ((["-allow", "*.corp.example"], 403), (["-pull", "never"], 404)):
            answer = self.program(*arguments).get(self.path("manifests", self.child, host))
            self.assertEqual(status, answer.status, answer.body)


class TestDigestsOnClassic(DigestsOnClassic, RepairCase):
    engine = lab.ENGINES["classic"]


class TestDigestsOnClassic20(DigestsOnClassic, RepairCase):
    engine = lab.ENGINES["classic-20"]
    test_blobs_are_served_while_they_arrive = test_origin_closes_connection = None  # these do not depend on the engine


class PullPolicy:
    """-pull, with the same meaning as in docker run."""

    def current(self, program, host):
        """Return the program's response for tag 1."""
        answer = program.get(self.path("manifests", "1", host))
        self.assertEqual(200, answer.status, answer.body)
        return answer

    def config_of(self, answer, program, host):
        document = answer.json
        if "manifests" in document:
            document = program.get(self.path("manifests", document["manifests"][0]["digest"], host)).json
        return document["config"]["digest"]

    def test_moved_tag(self):
        """missing and never serve Docker's own image, always serves the registry's."""
        with lab.Gate(lab.ORIGINS["open"]) as gate:
            gate.open()
            reference = self.on(gate.host)
            self.engine.docker("pull", "-q", reference)
            old = self.manifest["config"]["digest"]
            self.put("1")
            self.on(gate.host)
            new = self.manifest["config"]["digest"]
            for policy, expected, pulls in (("missing", old, 0), ("never", old, 0), ("always", new, 1)):
                with self.subTest(policy):
                    program = self.program("-pull", policy)
                    for _ in range(2):
                        self.assertEqual(expected, self.config_of(self.current(program, gate.host), program, gate.host))
                    self.assertEqual(pulls, len(program.jobs("pull")))
        with self.subTest("the registry is not reachable"):
            self.assertEqual(new, self.config_of(self.current(program, gate.host), program, gate.host))
            program.wait_for_line("Docker's own image is served")

    def test_image_that_no_registry_has(self):
        self.build("1")
        program = self.program("-pull", "always")
        self.assertEqual(200, program.get(self.manifest_path("1")).status)
        program.wait_for_line("Docker's own image is served")

    def test_own_images_are_not_requested_from_registries(self):
        program = self.program("-pull", "always")
        self.build("1")
        own = f"{program.address}/{self.name}:1"
        self.engine.docker("tag", f"{self.name}:1", own)
        self.images.append(own)
        self.assertEqual(200, program.get(f"/v2/{self.name}/manifests/1?ns={program.address}").status)
        self.assertEqual([], program.lines("Docker's own image is served"))

    def test_pull_never(self):
        program = self.program("-pull", "never")
        answer = program.get(self.path("manifests", "1", lab.ORIGINS["open"].host))
        self.assertEqual((404, "MANIFEST_UNKNOWN"), (answer.status, answer.code))
        self.assertEqual([], program.jobs("pull"))


class TestPolicyOnContainerd(PullPolicy, RepairCase):
    engine = lab.ENGINES["containerd"]


class TestPolicyOnContainerd26(PullPolicy, RepairCase):
    engine = lab.ENGINES["containerd-26"]


class TestPolicyOnClassic(PullPolicy, RepairCase):
    engine = lab.ENGINES["classic"]


class TestPolicyOnClassic20(PullPolicy, RepairCase):
    engine = lab.ENGINES["classic-20"]


if __name__ == "__main__":
    unittest.main()
