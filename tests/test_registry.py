"""Work that requests share, and the number of requests to Docker."""

import contextlib
import errno
import functools
import json
import os
import queue
import socket
import sys
import tempfile
import threading
import unittest
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

from fake_daemon import OCI_MANIFEST, FakeDaemon, Image, chunked, http_answer
from fake_origin import INSECURE, Origin
from program import IN_MEMORY, MODULE

sys.path.insert(0, str(MODULE.parent))
import k3d_registry_dockerd as module
from k3d_registry_dockerd import (
    Client,
    ClientGone,
    Credentials,
    Deadline,
    Digest,
    Engine,
    EngineHost,
    EngineInfo,
    ImageStores,
    Job,
    Jobs,
    Manifest,
    Mirror,
    NextReads,
    Reference,
    RegistryError,
    Store,
    Task,
    ask,
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


class TestAsk(unittest.TestCase):
    """Questions that are asked in a thread of their own, with a deadline for all that they wait for."""

    def error_of(self, *arguments, **options):
        with self.assertRaises(RegistryError) as caught:
            ask(*arguments, **options)
        return caught.exception.code

    def test_outcome(self):
        self.assertEqual(2, ask(Deadline(30), lambda _: 2))
        self.assertEqual("DENIED", self.error_of(Deadline(30), mock.Mock(side_effect=RegistryError("DENIED", ""))))

    def test_late_answer(self):
        """The error says whether the question waits for Docker, or for work of the program, which it ceases to do."""
        go_on, gone, answers = threading.Event(), threading.Event(), queue.Queue()
        self.addCleanup(go_on.set)

        def wait(inner):
            try:
                inner.within(1000).wait(go_on.wait)
            except ClientGone:
                gone.set()
                raise

        self.assertEqual("STILL_PULLING", self.error_of(Deadline(0.1), wait))
        self.assertTrue(gone.wait(30))
        gone.clear()
        self.assertEqual("so far", ask(Deadline(0.1), wait, lambda _: "so far", answers.put))
        self.assertEqual("UNAVAILABLE", self.error_of(
            Deadline(0.1), lambda _: go_on.wait(30), lambda _: "so far", answers.put))
        self.assertFalse(gone.is_set(), "an answer that may still be taken goes on")
        go_on.set()
        self.assertTrue(answers.get(timeout=30), "it was not discarded")
        self.assertTrue(answers.empty(), "an answer that may still be taken was discarded")

    def test_late_answer_when_no_more_threads_can_be_started(self):
        go_on, answers, starts = threading.Event(), queue.Queue(), [module.start_thread]
        self.addCleanup(go_on.set)

        def start(*arguments):
            if not starts:
                raise RegistryError("UNAVAILABLE", "no thread can be started")
            starts.pop()(*arguments)

        with mock.patch.object(module, "start_thread", start):
            self.assertEqual("UNAVAILABLE", self.error_of(
                Deadline(0.1), lambda _: go_on.wait(30), discard=answers.put))
        go_on.set()
        self.assertTrue(answers.get(timeout=30), "it was not discarded")

    def test_client_disconnects(self):
        ours, theirs = socket.socketpair()
        self.addCleanup(ours.close)
        theirs.close()
        gone, waits = threading.Event(), threading.Event()

        def wait(inner):
            try:
                inner.wait(waits.wait)
            finally:
                gone.set()

        with self.assertRaises(ClientGone):
            ask(Deadline(1000, ours), wait)
        self.assertTrue(gone.wait(30))


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
        self.assertEqual({key for key, _ in keyed_outcomes}, set(self.jobs._work))
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
        self.assertEqual(([1, 2], {}), (outcomes, self.jobs._work))

    def test_limit(self):
        """More jobs than the limit are refused, but not those that join one that is under way."""
        self.jobs = Jobs(2)
        jobs = [self.jobs.start(key, self.work(key), "at it") for key in "aabb"]
        with self.assertRaises(RegistryError) as caught:
            self.jobs.start("c", self.work("c"), "at it")
        self.assertEqual(("TOOMANYREQUESTS", 429), (caught.exception.code, caught.exception.status))
        self.go_on.set()
        self.assertEqual([*"aabb"], [job.outcome(Deadline(30)) for job in jobs])
        self.assertEqual("c", self.jobs.start("c", self.work("c"), "at it").outcome(Deadline(30)))

    def test_thread_cannot_be_started(self):
        with mock.patch.object(threading.Thread, "start", side_effect=RuntimeError("no")), \
                self.assertRaises(RegistryError) as caught:
            self.jobs.start("key", self.work(1), "at it")
        self.assertEqual(("UNAVAILABLE", {}), (caught.exception.code, self.jobs._work))


class TestNextReads(unittest.TestCase):
    """Requests that ask the same share a read that begins after the last of them has asked."""

    CLIENTS = 20

    def setUp(self):
        self.waiting = threading.Semaphore(0)  # released for each thread that waits for a read of another
        outcome = Job.outcome

        def count(job, deadline):
            self.waiting.release()
            return outcome(job, deadline)

        patch = mock.patch.object(Job, "outcome", count)
        patch.start()
        self.addCleanup(patch.stop)

    def ask_together(self, ask, begun, go_on):
        """Ask once, and again by many threads while the first read is under way; return all results, the first first.

        begun is set by the first read, which waits for go_on.
        """
        results = [None] * self.CLIENTS

        def run(i):
            try:
                results[i] = ask()
            except Exception as e:
                results[i] = e

        threads = [threading.Thread(target=run, args=(i,)) for i in range(self.CLIENTS)]
        threads[0].start()
        self.assertTrue(begun.wait(30))
        for thread in threads[1:]:
            thread.start()
        for _ in range(self.CLIENTS - 2):  # the other two are about to read
            self.assertTrue(self.waiting.acquire(timeout=30))
        go_on.set()
        for thread in threads:
            thread.join(30)
        return results

    def numbered_reads(self, outcome):
        """Return a function that reads outcome(1), outcome(2) and so on; and the events of ask_together()."""
        begun, go_on, reads = threading.Event(), threading.Event(), []

        def read():
            reads.append(1)
            number = len(reads)
            begun.set()
            self.assertTrue(go_on.wait(30))
            return outcome(number)

        return read, begun, go_on

    def test_two_reads_for_any_number_of_questions(self):
        """Nobody who asks during a read gets its result."""
        shared = NextReads()
        read, begun, go_on = self.numbered_reads(lambda number: number)
        self.assertEqual([1] + [2] * (self.CLIENTS - 1),
                         self.ask_together(lambda: shared.read("key", read), begun, go_on))
        self.assertEqual((3, {}, 0), (shared.read("key", read), shared._next, len(shared._turns)))

    def test_errors_are_shared(self):
        def fail(number):
            raise RegistryError("UNAVAILABLE", f"read {number}")

        shared = NextReads()
        read, begun, go_on = self.numbered_reads(fail)
        details = [error.detail for error in self.ask_together(lambda: shared.read("key", read), begun, go_on)]
        self.assertEqual(["read 1"] + ["read 2"] * (self.CLIENTS - 1), details)
        self.assertEqual({}, shared._next)

    def test_other_keys_do_not_wait(self):
        shared = NextReads()
        self.assertEqual(2, shared.read("a", lambda: 1 + shared.read("b", lambda: 1)))

    def test_calls_of_the_engine(self):
        """What Docker is asked while many ask the same."""
        for what, path, call in (
                ("inspect", "/images/app:1/json", lambda engine: engine.image("app:1").id),
                ("missing", "/images/no:1/json", lambda engine: engine.image("no:1")),
                ("list", "/images/json", lambda engine: engine.listed()),
                ("names", "/images/json", lambda engine: engine.names()),
                ("list of a repository", "/images/json?", lambda engine: engine.images_of(["app"]))):
            with self.subTest(what), FakeDaemon() as daemon:
                daemon.add("app:1", Image())
                engine = Engine(EngineHost(path=daemon.path))
                expected, before = call(engine), len(daemon.requests)
                while self.waiting.acquire(blocking=False):
                    pass
                begun, go_on = daemon.hold(path)
                self.assertEqual([expected] * self.CLIENTS,
                                 self.ask_together(functools.partial(call, engine), begun, go_on))
                self.assertEqual(2, sum(path in line for line in daemon.requests[before:]))


class MirrorCase(unittest.TestCase):
    def start(self, store):
        self.daemon = FakeDaemon(store)
        self.daemon.__enter__()
        self.addCleanup(self.daemon.__exit__)
        folder = tempfile.TemporaryDirectory(dir=IN_MEMORY)
        self.addCleanup(folder.cleanup)
        self.mirror = Mirror(Engine(EngineHost(path=self.daemon.path)), Store(Path(folder.name) / "store"))
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
                self.mirror.manifest(Client(), Reference.parse("library/app", "1", "docker.io"))
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

    def test_concurrent_requests_share_one_fetch_of_a_manifest(self):
        """Those with the same credentials do. The fetch goes on after the deadlines of its clients."""
        self.start("classic")
        self.daemon.info = INSECURE
        go_on = threading.Event()
        self.addCleanup(go_on.set)
        with Origin(self.image) as origin, self.assertLogs("k3d-registry-dockerd"), \
                mock.patch.dict(os.environ, {"NO_PROXY": "127.0.0.2", "no_proxy": "127.0.0.2"}):
            origin.hold(self.image.manifest, go_on)
            reference = Reference.parse("team/app", self.image.digest, origin.host)

            def ask(credentials):
                with self.assertRaises(RegistryError) as caught:
                    self.mirror.manifest(Client(credentials=credentials, deadline=Deadline(0.5)), reference)
                return caught.exception.code

            with ThreadPoolExecutor(5) as pool:
                codes = pool.map(ask, (None, None, None, Credentials("a", "x"), Credentials("a", "x")))
                self.assertEqual(["STILL_PULLING"] * 5, list(codes))
            self.assertEqual(2, origin.requests.count(f"manifests/{self.image.digest}"))
            go_on.set()
            found = self.mirror.manifest(Client(), reference)
            self.assertEqual(self.image.digest, str(found.digest))

    @contextlib.contextmanager
    def origin(self):
        """A registry that has the image, which may be fetched from it."""
        self.start("containerd")
        self.daemon.info = INSECURE
        with Origin(self.image) as origin, self.assertLogs("k3d-registry-dockerd"), \
                mock.patch.dict(os.environ, {"NO_PROXY": "127.0.0.2", "no_proxy": "127.0.0.2"}):
            yield origin

    def test_fetch_that_has_just_ended(self):
        """A thread found a blob missing, and began to fetch it when another fetch had just ended."""
        with self.origin() as origin:
            layer, reference = self.image.layer, Reference.parse("team/app", self.image.digest, origin.host)
            fetch = module.Fetch("key", Digest.of(layer), len(layer), reference, None, None)
            for _ in range(2):
                with contextlib.closing(self.mirror._fetches._start(fetch).open(0, len(layer), Deadline())) as body:
                    self.assertEqual(layer, b"".join(body))
            self.assertEqual([f"blobs/{Digest.of(layer)}"], origin.requests)

    def test_size_that_is_not_that_of_a_copy(self):
        """A manifest cannot have a copy removed that is right."""
        with self.origin() as origin:
            layer, reference = self.image.layer, Reference.parse("team/app", self.image.digest, origin.host)
            store, digest = self.mirror._store, Digest.of(layer)
            module.keep_content(store, layer, store.docker)
            document = json.loads(self.image.manifest)
            document["layers"][0]["size"] += 1
            manifest = Manifest(Digest.parse(self.image.digest), OCI_MANIFEST, json.dumps(document).encode())
            with self.assertRaisesRegex(RegistryError, f"gives {len(layer)} bytes for {digest}"):
                self.mirror._recover(reference, manifest, Client())
            self.assertIsNotNone(store.docker.find(digest))

    def test_content_service_that_could_not_be_asked(self):
        """That is not taken for an engine without one, whose images are exported."""
        self.start("containerd")
        for number in (errno.ENOENT, errno.ECONNREFUSED, errno.EMFILE):
            self.mirror.engine.info()  # known for some seconds
            with mock.patch.object(EngineHost, "http", side_effect=OSError(number, os.strerror(number))), \
                    self.assertRaises(RegistryError) as caught:
                self.mirror.images.current()
            self.assertEqual("UNAVAILABLE", caught.exception.code)
        self.assertEqual(("content service",), self.mirror.images.current().sources)

    def test_export_that_cannot_be_read(self):
        """Trouble with our own disk is not said to be Docker's."""
        self.start("classic")
        self.daemon.add("app:1", self.image)
        image = self.mirror.engine.image("app:1")
        error = OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        with self.assertLogs("k3d-registry-dockerd"), self.assertRaises(RegistryError) as caught, \
                mock.patch.object(module.Unpacking, "_path", side_effect=error):
            self.mirror._exports._run(image)
        self.assertEqual("STORE_FAILED", caught.exception.code)

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
                self.mirror.pulls._run(module.Pull(reference, None))
        self.assertEqual(1, self.asked("/images/create"))

    def test_layers_of_a_pull_are_looked_up_once(self):
        """Docker is not asked for each of them again whenever a node gets the manifest."""
        data = Image().manifest
        manifest = module.Manifest(module.Digest.of(data), module.OCI_MANIFEST, data)
        images = mock.Mock()
        images.content.manifest.return_value, images.content.has.return_value = manifest, False
        pulls = module.Pulls(mock.Mock(), images, module.PullPolicy(), module.Activity())
        pull = module.Pull(Reference.parse("team/app", "1", "registry.example"), None)
        for _ in range(3):
            self.assertIs(manifest, pulls._await_manifest(pull, lambda: manifest.digest, Deadline()))
            self.assertIs(pull, pulls.bringing(manifest.listed("layers")[0]))
        self.assertEqual(len(manifest.listed("layers")), images.content.has.call_count)

    def test_credentials_are_part_of_the_key(self):
        """An anonymous request never uses the pull of an authenticated one, nor one user the pull of another."""
        self.start("containerd")
        keys = []

        def remember(key, *_):
            keys.append(key)
            raise RegistryError("MANIFEST_UNKNOWN", "")

        reference = Reference.parse("team/app", "1", "registry.example")
        self.mirror.images.current()
        with mock.patch.object(self.mirror.pulls._pulls, "join", remember):
            for credentials in (None, Credentials("a", "x"), Credentials("b", "x"), Credentials("a", "y")):
                with self.assertRaises(RegistryError):
                    self.mirror.manifest(Client(credentials=credentials), reference)
        self.assertEqual(4, len(set(keys)))

    def test_connections_are_closed(self):
        """A body that is closed before its end closes its connection as well, and so does every other call."""
        self.start("containerd")
        self.daemon.add("app:1", self.image)
        calls = []

        class Call(module.GrpcCall):
            def __init__(self, sock):
                super().__init__(sock)
                calls.append(self)

        patch = mock.patch.object(module, "GrpcCall", Call)
        patch.start()
        self.addCleanup(patch.stop)
        for digest in self.image.blobs:
            if digest == self.image.digest:
                continue
            with self.assertLogs("k3d-registry-dockerd"):
                self.mirror.images._chosen = None
                blob = self.mirror.blob(Client(), Reference.parse_digest("library/app", digest, "docker.io"))
            body = blob.open(0, blob.size, Deadline())
            next(iter(body))
            body.close()
        self.assertEqual([], [one for one in calls if one._sock.fileno() >= 0])
        self.assertGreater(len(calls), len(self.image.blobs))


class TestImageStores(unittest.TestCase):
    def test_two_requests_at_the_start_use_the_same_store(self):
        """Each image store remembers what manifests it made: the other request would miss them."""
        info = EngineInfo("28.5", (1, 51), "classic", Path("/nowhere"), "x")
        stores = ImageStores(mock.Mock(info=lambda: info), mock.Mock(root=Path("/nowhere")), mock.Mock(), None)
        together, choose = threading.Barrier(2), stores._choose

        def choose_together(given):
            chosen = choose(given)
            together.wait(30)
            return chosen

        with mock.patch.object(stores, "_choose", choose_together), ThreadPoolExecutor() as pool:
            first, second = pool.map(lambda _: stores.current(), range(2))
        self.assertIs(first, second)
        self.assertIs(first, stores.current())


class TestTask(unittest.TestCase):
    def test_line_every_few_seconds(self):
        moments = iter([100.0, *[100.0 + i for i in range(13)], 113.0])
        with mock.patch("time.monotonic", lambda: next(moments)), self.assertLogs("k3d-registry-dockerd") as logs:
            task = Task("pull", "x", ", 12 kB")
            for i in range(13):
                task.report_bytes(1000 * i, 12_000)
            task.done()
        self.assertEqual(["pull x, 12 kB: started", "pull x, 12 kB: 41%, 5.0 kB of 12.0 kB, 1.0 kB/s",
                          "pull x, 12 kB: 83%, 10.0 kB of 12.0 kB, 1.0 kB/s",
                          "pull x, 12 kB: done in 13.0 s, 100%, 12.0 kB of 12.0 kB, 923 B/s"],
                         [record.getMessage() for record in logs.records])

    def test_failure(self):
        with self.assertLogs("k3d-registry-dockerd") as logs, self.assertRaises(ValueError), Task("pull", "x") as task:
            raise ValueError("no\nway")
        self.assertEqual("no\\nway", task.error)
        self.assertRegex(logs.records[-1].getMessage(), r"^pull x: failed after [^:]+: no\\nway$")


if __name__ == "__main__":
    unittest.main()
