"""Work that requests share, and the number of requests to Docker."""

import socket
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
    Client,
    ClientGone,
    Credentials,
    Deadline,
    Engine,
    EngineHost,
    Jobs,
    Mirror,
    ProgressLog,
    Reference,
    RegistryError,
    Store,
)


class TestDeadline(unittest.TestCase):
    def test_deadline_passes(self):
        with mock.patch("time.monotonic", lambda: now):
            now = 100.0
            deadline = Deadline(18)
            self.assertEqual(5, deadline.within(5).left())
            self.assertEqual(18, deadline.within(30).left())
            now = 110.0
            self.assertEqual((8, float("inf")), (deadline.left(), deadline.unlimited().left()))
            waits = []
            self.assertFalse(Deadline(0).wait(lambda seconds: waits.append(seconds)))
            self.assertEqual([0], waits, "a condition that is already true must be seen")
            now = 119.0
            self.assertEqual(0, deadline.left())

    def test_wait(self):
        self.assertEqual("here", Deadline().wait(lambda _: "here"))
        answers = iter([None, None, "here"])
        self.assertEqual("here", Deadline().wait(lambda _: next(answers)))

    def test_client_disconnects(self):
        ours, theirs = socket.socketpair()
        self.addCleanup(ours.close)
        deadline = Deadline(1000, ours)
        calls = []
        theirs.send(b"the next request")
        self.assertTrue(deadline.wait(lambda _: calls.append(1) or len(calls) == 3), "a client may send more data")
        theirs.close()
        for one in (deadline, deadline.within(500), deadline.unlimited()):
            with self.assertRaises(ClientGone):
                one.wait(lambda _: False)
        ours.close()
        with self.assertRaises(ClientGone):
            deadline.wait(lambda _: False)

    def test_cancel(self):
        deadline = Deadline()
        deadline.cancel()
        with self.assertRaises(ClientGone):
            deadline.wait(lambda _: False)


class TestJobs(unittest.TestCase):
    def setUp(self):
        self.jobs, self.go_on, self.runs = Jobs(), threading.Event(), []

    def work(self, outcome):
        def run():
            self.runs.append(outcome)
            self.go_on.wait(30)
            if isinstance(outcome, Exception):
                raise outcome
            return outcome
        return run

    def start_together(self, *keyed_outcomes):
        """Start these jobs so that all of them run at the same time; return their outcomes."""
        jobs = [self.jobs.start(key, self.work(outcome), "at it") for key, outcome in keyed_outcomes]
        self.assertEqual({key for key, _ in keyed_outcomes}, set(self.jobs._jobs))
        with self.assertRaises(RegistryError) as caught:
            jobs[0].outcome(Deadline(0))
        self.assertEqual("STILL_PULLING", caught.exception.code)
        self.go_on.set()
        results = []
        for job in jobs:
            try:
                results.append(job.outcome(Deadline(30)))
            except Exception as e:
                results.append(e)
        return results

    def test_jobs_with_one_key_run_once(self):
        self.assertEqual([0] * 5, self.start_together(*[("key", i) for i in range(5)]), "all share one outcome")
        self.assertEqual([0], self.runs)

    def test_jobs_with_other_keys_run_concurrently(self):
        self.assertEqual([1, 2, 3], self.start_together(("a", 1), ("b", 2), ("c", 3)))

    def test_error_is_shared(self):
        error = RegistryError("ENGINE_FAILED", "no")
        self.assertEqual({error}, set(self.start_together(*[("key", error)] * 3)))

    def test_finished_jobs_are_forgotten(self):
        self.go_on.set()
        outcomes = [self.jobs.start("key", self.work(i), "at it").outcome(Deadline(30)) for i in (1, 2)]
        self.assertEqual(([1, 2], {}), (outcomes, self.jobs._jobs))

    def test_thread_cannot_be_started(self):
        with mock.patch.object(threading.Thread, "start", side_effect=RuntimeError("no")), \
                self.assertRaises(RegistryError) as caught:
            self.jobs.start("key", self.work(1), "at it")
        self.assertEqual(("UNAVAILABLE", {}), (caught.exception.code, self.jobs._jobs))


class MirrorCase(unittest.TestCase):
    def start(self, store):
        self.daemon = FakeDaemon(store)
        self.daemon.__enter__()
        self.addCleanup(self.daemon.__exit__)
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.mirror = Mirror(Engine(EngineHost(path=self.daemon.path)), Store(Path(folder.name) / "store"))
        self.addCleanup(self.mirror.close)
        self.image = Image()

    def asked(self, text):
        return sum(text in line for line in self.daemon.requests)


class TestSharedWork(MirrorCase):
    def test_concurrent_requests_share_one_export(self):
        """The daemon is slow. All requests during the export share it, and its failure."""
        self.start("classic")
        self.daemon.add("app:1", self.image)
        go_on, joined, failures = threading.Event(), [], []
        self.addCleanup(go_on.set)
        self.daemon.faults["/get "] = lambda _: go_on.wait(30) and http_answer(500, {"message": "it broke"})
        jobs = self.mirror._exports._jobs
        start = jobs.start

        def join(*arguments):
            job = start(*arguments)
            joined.append(job)
            return job

        def ask():
            try:
                self.mirror.manifest(Reference.parse("library/app", "1", "docker.io"), Client())
            except RegistryError as e:
                failures.append(e)

        with mock.patch.object(jobs, "start", join), self.assertLogs("k3d-registry-dockerd"):
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

    def test_export_that_has_just_ended(self):
        """A thread found no export, and started the job when another one had just ended."""
        self.start("classic")
        self.daemon.add("app:1", self.image)
        image = self.mirror.engine.image("app:1")
        with self.assertLogs("k3d-registry-dockerd"):
            found = [str(self.mirror._exports._run(image)) for _ in range(2)]
        self.assertEqual([self.image.digest] * 2, found)
        self.assertEqual(1, self.asked("/get "))

    def test_pull_that_has_just_ended(self):
        self.start("containerd")
        reference = Reference.parse("team/app", "1", "registry.example")
        self.daemon.pulls[str(reference)] = lambda: self.daemon.add(str(reference), self.image) and chunked(b"{}")
        with self.assertLogs("k3d-registry-dockerd"):
            for _ in range(2):
                self.mirror._pulls._run(reference, None, None)
        self.assertEqual(1, self.asked("/images/create"))

    def test_credentials_are_part_of_the_key(self):
        """An anonymous request never uses the pull of an authenticated one, nor one user the pull of another."""
        self.start("containerd")
        keys = []

        def remember(key, *_):
            keys.append(key)
            raise RegistryError("MANIFEST_UNKNOWN", "")

        reference = Reference.parse("team/app", "1", "registry.example")
        self.mirror.images.current()
        with mock.patch.object(self.mirror._pulls._jobs, "start", remember):
            for credentials in (None, Credentials("a", "x"), Credentials("b", "x"), Credentials("a", "y")):
                with self.assertRaises(RegistryError):
                    self.mirror.manifest(reference, Client(credentials=credentials))
        self.assertEqual(4, len(set(keys)))

    def test_content_connection_is_reused(self):
        self.start("containerd")
        self.daemon.add("app:1", self.image)
        with self.assertLogs("k3d-registry-dockerd"):
            for _ in range(5):
                self.mirror.manifest(Reference.parse("library/app", "1", "docker.io"), Client())
        self.assertEqual(1, self.asked("/grpc"))

    def test_connections_are_closed(self):
        """A body that is closed before its end closes its connection as well."""
        self.start("containerd")
        self.daemon.add("app:1", self.image)
        for digest in self.image.blobs:
            if digest == self.image.digest:
                continue
            with self.assertLogs("k3d-registry-dockerd"):
                self.mirror.images._chosen = None
                blob = self.mirror.blob(Reference.parse_digest("library/app", digest, "docker.io"), Client())
            body = blob.open(0, blob.size, Deadline())
            next(iter(body))
            body.close()
        self.assertLessEqual(len(self.mirror.images._service._idle), 1)


class TestProgressLog(unittest.TestCase):
    def test_line_every_few_seconds(self):
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
