"""First pulls that take long: clients get an early response. The timeouts are reduced to keep the tests fast."""

import concurrent.futures
import contextlib
import http.client
import json
import os
import unittest
import uuid

import lab
from program import Program
from test_engines import sha256


def setUpModule():
    lab.require()


class SlowCase(unittest.TestCase):
    """An image with a small and a large layer, on an origin that holds back the large one."""

    engine: lab.Engine
    LAST_ANSWER = 18

    def setUp(self):
        lab.NODE.forget()
        self.name = f"s{uuid.uuid4().hex[:10]}"
        origin = lab.ORIGINS["open"]
        digest, _ = lab.push_platforms(origin, f"lab/{self.name}", "1", ["amd64"], [
            ("small", os.urandom(10_000)), ("large", os.urandom(3_000_000))])
        self.gate = lab.Gate(origin)
        self.addCleanup(self.gate.__exit__)
        self.reference = f"{self.gate.host}/lab/{self.name}:1"
        self.addCleanup(self.engine.remove, self.reference, self.reference.replace(":1", f"@{digest}"))
        # A pull counts as long after 0.3 seconds instead of 5.
        self.program = Program(f"unix://{self.engine.socket}",
                               constants={"EARLY_ANSWER": 0.3, "LAST_ANSWER": self.LAST_ANSWER})
        self.addCleanup(self.program.__exit__)

    def tearDown(self):
        self.assertEqual([], self.program.lines("a bug in this program"))

    def path(self, kind, target):
        return f"/v2/lab/{self.name}/{kind}/{target}?ns={self.gate.host}"

    def pull_is_over(self):
        return bool(self.program.lines(f"pull {self.reference}: done"))

    def image_manifest(self):
        """Return the manifest of this machine's platform, through the index if there is one."""
        manifest = self.program.get(self.path("manifests", "1"))
        self.assertEqual(200, manifest.status, manifest.body)
        document = manifest.json
        if "manifests" in document:
            child = document["manifests"][0]["digest"]
            document = self.program.get(self.path("manifests", child)).json
        return document


class ContainerdStore:
    def test_blobs_are_served_while_docker_downloads(self):
        manifest = self.image_manifest()
        *_, small, large = manifest["layers"]
        for blob in (manifest["config"], small):
            self.assertEqual(blob["digest"], sha256(self.program.get(self.path("blobs", blob["digest"])).body))
        response = self.program.begin_get(self.path("blobs", large["digest"]))
        self.assertEqual((200, str(large["size"])), (response.status, response.headers["Content-Length"]))
        self.assertFalse(self.pull_is_over())
        self.gate.open()
        self.assertEqual(large["digest"], sha256(response.read()))
        self.program.wait_for_line(f"pull {self.reference}: done")
        self.assertEqual(1, len(self.program.jobs("pull")))

    def test_node_pulls_at_first_attempt(self):
        with concurrent.futures.ThreadPoolExecutor() as pool:
            node = pool.submit(lab.NODE.pull, self.reference, self.program.address)
            self.program.wait_for_line("answered with the manifest")
            self.gate.open()
            node.result()
        self.assertEqual(self.engine.inspect(self.reference)["Id"], lab.NODE.digest(self.reference))

    def test_by_digest(self):
        self.gate.open()
        digest = self.program.head(self.path("manifests", "1")).headers["Docker-Content-Digest"]
        self.engine.remove(self.reference)
        with lab.Gate(lab.ORIGINS["open"]) as gate:
            path = f"/v2/lab/{self.name}/manifests/{digest}?ns={gate.host}"
            answer = self.program.get(path)
            self.assertEqual((200, digest), (answer.status, sha256(answer.body)), answer.body)
            gate.open()
            by_digest = f"{gate.host}/lab/{self.name}@{digest}"
            self.addCleanup(self.engine.remove, by_digest)
            self.program.wait_for_line(f"pull {by_digest}: ")
            self.program.wait_for_line(": done", 2)

    def test_origin_closes_connection(self):
        """The client's connection is closed, the reason is logged, and the next request gets an error status."""
        large = self.image_manifest()["layers"][-1]
        response = self.program.begin_get(self.path("blobs", large["digest"]))
        self.assertEqual(200, response.status)
        self.gate.cut()
        with self.assertRaises(http.client.IncompleteRead):
            response.read()
        self.program.wait_for_line(f"pull {self.reference}: failed")
        line = self.program.wait_for_line(f"blobs/{large['digest']}")
        self.assertIn("closed early: ORIGIN_UNAVAILABLE", line)
        answer = self.program.get(self.path("manifests", "1"))
        self.assertEqual(502, answer.status, answer.body)

    def test_pull_continues_after_client_disconnect(self):
        large = self.image_manifest()["layers"][-1]
        with contextlib.closing(self.program.begin_get(self.path("blobs", large["digest"]))):
            pass
        self.gate.open()
        self.program.wait_for_line(f"pull {self.reference}: done")
        self.assertEqual(1, len(self.program.jobs("pull")))


class ClassicStore:
    """Docker's own manifest has no digest before the export. HEAD and GET send the headers that are known."""

    LAST_ANSWER = 0.5

    def test_headers_are_sent_during_the_pull(self):
        path = self.path("manifests", "1")
        head, get = self.program.head(path), self.program.begin_get(path)
        for answer in (head, get):
            self.assertEqual((200, "application/vnd.oci.image.manifest.v1+json"),
                             (answer.status, answer.headers["Content-Type"]))
            for header in ("Docker-Content-Digest", "Content-Length"):
                self.assertIsNone(answer.headers[header])
        self.assertFalse(self.pull_is_over())
        self.gate.open()
        body = get.read()
        self.assertTrue(self.pull_is_over())
        exact = self.program.get(path)
        self.assertEqual((body, sha256(body)), (exact.body, exact.headers["Docker-Content-Digest"]))

    def test_node_pulls_at_first_attempt(self):
        with concurrent.futures.ThreadPoolExecutor() as pool:
            node = pool.submit(lab.NODE.pull, self.reference, self.program.address)
            self.program.wait_for_line("answered while Docker is still getting it", 2)
            self.gate.open()
            node.result()
        manifest = json.loads(lab.NODE.content(lab.NODE.digest(self.reference)))
        self.assertEqual(self.engine.inspect(self.reference)["Id"], manifest["config"]["digest"])
        self.assertEqual(1, len(self.program.jobs("pull")))

    def test_origin_closes_connection(self):
        response = self.program.begin_get(self.path("manifests", "1"))
        self.assertEqual(200, response.status)
        self.gate.cut()
        with self.assertRaises((http.client.IncompleteRead, ConnectionError)):
            response.read()
        self.assertIn("closed early", self.program.wait_for_line("GET "))
        self.assertEqual(502, self.program.get(self.path("manifests", "1")).status)


class TestContainerd(ContainerdStore, SlowCase):
    engine = lab.ENGINES["containerd"]


class TestContainerd26(ContainerdStore, SlowCase):
    engine = lab.ENGINES["containerd-26"]
    test_origin_closes_connection = None  # Docker retries for 30 seconds: one test per store is enough


class TestClassic(ClassicStore, SlowCase):
    engine = lab.ENGINES["classic"]


class TestClassic20(ClassicStore, SlowCase):
    engine = lab.ENGINES["classic-20"]
    test_origin_closes_connection = None  # Docker retries for 30 seconds: one test per store is enough


if __name__ == "__main__":
    unittest.main()
