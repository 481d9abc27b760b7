"""Section 7: shared work, and what is asked of Docker how often."""

import sys
import tempfile
import threading
import unittest
from pathlib import Path
from unittest import mock

from fake_daemon import FakeDaemon, Image, chunked, http_answer
from program import MODULE

sys.path.insert(0, str(MODULE.parent))
from k3d_registry_dockerd import (
    Credentials,
    Digest,
    Engine,
    EngineHost,
    Flight,
    Flights,
    ProgressLog,
    Reference,
    Registry,
    RegistryError,
    Store,
)


class TestFlights(unittest.TestCase):
    def setUp(self):
        self.flights, self.go_on, self.runs = Flights(), threading.Event(), []

    def job(self, outcome):
        def run(flight):
            self.runs.append(outcome)
            self.go_on.wait(30)
            if isinstance(outcome, Exception):
                raise outcome
            return outcome
        return run

    def join_together(self, *keyed_outcomes):
        """Join flights from a thread each, let them all go once they are under way, and return the outcomes."""
        results = []

        def join(key, outcome):
            try:
                results.append(self.flights.join(key, self.job(outcome)))
            except Exception as e:
                results.append(e)

        threads = [threading.Thread(target=join, args=pair) for pair in keyed_outcomes]
        for thread in threads:
            thread.start()
        keys = {key for key, _ in keyed_outcomes}
        while len(self.runs) < len(keys):
            threading.Event().wait(0.001)
        self.assertEqual(keys, set(self.flights._flights))
        self.go_on.set()
        for thread in threads:
            thread.join(30)
        return results

    def test_one_key_one_run(self):
        results = self.join_together(*[("key", i) for i in range(5)])
        self.assertEqual(results, self.runs * len(results), "all have the outcome of one run")

    def test_other_keys_run_beside_it(self):
        self.assertEqual({1, 2, 3}, set(self.join_together(("a", 1), ("b", 2), ("c", 3))))

    def test_an_error_is_shared(self):
        error = RegistryError("ENGINE_FAILED", "no")
        self.assertEqual({error}, set(self.join_together(*[("key", error)] * 3)))

    def test_nothing_is_remembered(self):
        self.go_on.set()
        self.assertEqual([1, 2], [self.flights.join("key", self.job(i)) for i in (1, 2)])
        self.assertEqual({}, self.flights._flights)


class RegistryCase(unittest.TestCase):
    def start(self, store):
        self.daemon = FakeDaemon(store)
        self.daemon.__enter__()
        self.addCleanup(self.daemon.__exit__)
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.registry = Registry(Engine(EngineHost(path=self.daemon.path)), Store(Path(folder.name) / "store"))
        self.addCleanup(self.registry.close)
        self.image = Image()

    def asked(self, text):
        return sum(text in line for line in self.daemon.requests)


class TestSharedWork(RegistryCase):
    def test_only_one_export_however_many_ask(self):
        """A slow daemon: all who ask while the export is under way share it, and its failure."""
        self.start("classic")
        self.daemon.add("app:1", self.image)
        go_on, joined, failures = threading.Event(), [], []
        self.addCleanup(go_on.set)
        self.daemon.faults["/get "] = lambda _: go_on.wait(30) and http_answer(500, {"message": "it broke"})
        flights = self.registry._exports._flights
        start = flights.start

        def join(key, job):
            flight = start(key, job)
            joined.append(flight)
            return flight

        def ask():
            try:
                self.registry.manifest(Reference.parse("library/app", "1", "docker.io"), None, None)
            except RegistryError as e:
                failures.append(e)

        with mock.patch.object(flights, "start", join), self.assertLogs("k3d-registry-dockerd"):
            threads = [threading.Thread(target=ask) for _ in range(5)]
            for thread in threads:
                thread.start()
            while len(joined) < 5:
                threading.Event().wait(0.001)
            go_on.set()
            for thread in threads:
                thread.join(30)
        self.assertEqual([("ENGINE_FAILED", 502)] * 5, [(failure.code, failure.status) for failure in failures])
        self.assertTrue(all("it broke" in failure.detail for failure in failures))
        self.assertEqual(1, self.asked("/get "))

    def test_an_export_that_landed_a_moment_ago(self):
        """A thread that found no export, and came to the flight when it had just landed."""
        self.start("classic")
        self.daemon.add("app:1", self.image)
        image = self.registry.engine.image("app:1")
        with self.assertLogs("k3d-registry-dockerd"):
            found = [str(self.registry._exports._run(image, Flight())) for _ in range(2)]
        self.assertEqual([self.image.digest] * 2, found)
        self.assertEqual(1, self.asked("/get "))

    def test_an_export_that_lands_while_its_content_is_looked_for(self):
        """The store has it not yet, and then it is not arriving any more."""
        self.start("classic")
        self.daemon.add("app:1", self.image)
        image, content = self.registry.engine.image("app:1"), self.registry._content
        with self.assertLogs("k3d-registry-dockerd"):
            content.sources()
            with mock.patch.object(content.exporter, "find", lambda digest: self.registry._exports.manifest(
                    image) and None):
                self.assertIsNotNone(content.find(Digest.parse(self.image.digest)))

    def test_a_pull_that_landed_a_moment_ago(self):
        self.start("containerd")
        reference = Reference.parse("team/app", "1", "registry.example")
        self.daemon.pulls[str(reference)] = lambda: self.daemon.add(str(reference), self.image) and chunked(b"{}")
        with self.assertLogs("k3d-registry-dockerd"):
            for _ in range(2):
                self.registry._pulls._run(reference, None, None)
        self.assertEqual(1, self.asked("/images/create"))

    def test_credentials_are_part_of_the_key(self):
        """An anonymous request never rides on an authenticated one, nor one user on another."""
        self.start("containerd")
        keys = []

        def remember(key, job):
            keys.append(key)
            raise RegistryError("MANIFEST_UNKNOWN", "")

        reference = Reference.parse("team/app", "1", "registry.example")
        with mock.patch.object(self.registry._pulls._flights, "start", remember):
            for credentials in (None, Credentials("a", "x"), Credentials("b", "x"), Credentials("a", "y")):
                with self.assertRaises(RegistryError), self.assertLogs("k3d-registry-dockerd"):
                    self.registry._content._sources = None
                    self.registry.sources()
                    self.registry.manifest(reference, None, credentials)
        self.assertEqual(4, len(set(keys)))

    def test_the_content_connection_is_reused(self):
        self.start("containerd")
        self.daemon.add("app:1", self.image)
        with self.assertLogs("k3d-registry-dockerd"):
            for _ in range(5):
                self.registry.manifest(Reference.parse("library/app", "1", "docker.io"), None, None)
        self.assertEqual(1, self.asked("/grpc"))

    def test_no_connection_is_left_over(self):
        """Bodies that are given up half-read give up their connections as well."""
        self.start("containerd")
        self.daemon.add("app:1", self.image)
        reference = Reference.parse_digest("library/app", str(self.registry.engine.image("app:1").id), "docker.io")
        for digest in self.image.blobs:
            if digest == str(reference.target):
                continue
            with self.assertLogs("k3d-registry-dockerd"):
                self.registry._content._sources = None
                blob = self.registry.blob(Reference.parse_digest("library/app", digest, "docker.io"), None, None)
            body = blob.open(0, blob.size)
            next(iter(body))
            body.close()
        self.assertLessEqual(len(self.registry._content._service._idle), 1)


class TestProgressLog(unittest.TestCase):
    def test_a_line_every_few_seconds(self):
        clock = iter([100.0, 100.0, *[100.0 + i for i in range(13)], 113.0])
        with mock.patch("time.monotonic", lambda: next(clock)), self.assertLogs("k3d-registry-dockerd") as logs:
            lines = ProgressLog("pull x")
            for _ in range(13):
                lines.tell(lambda now: f"at {now:.0f}")
            lines.done("all of it")
        self.assertEqual(["pull x: started", "pull x: at 105", "pull x: at 110", "pull x: done in 13.0 s, all of it"],
                         [record.getMessage() for record in logs.records])


if __name__ == "__main__":
    unittest.main()
