"""Start and end: the program listens before it does anything else, and it ends at any moment."""

import contextlib
import os
import signal
import threading
import unittest
import unittest.mock

from fake_daemon import FakeDaemon, Image
from program import COMMAND, Program
from test_behaviour import BehaviourCase
from test_hosted import module

# Only the end of the program ends a wait that is under way: neither Docker does, nor a deadline.
ENDLESS = {"ENGINE_TIMEOUT": 1000, "LAST_ANSWER": 1000, "PULL_TIMEOUT": 1000, "STOP_GRACE": 0.2, "ENGINE_FRESH": 0}


class TestStart(BehaviourCase):
    def test_docker_does_not_answer(self):
        self.daemon = self.enter(FakeDaemon())
        self.daemon.slow = "hung"
        self.start(constants=ENDLESS)
        self.ask("GET", "/v2/", 200)
        self.push("app", "1")

    def test_order_of_the_log(self):
        self.start()
        self.program.wait_for_line("store: tidied up")
        lines = [next(number for number, line in enumerate(self.program.log) if text in line) for text in (
            "listening on", "content from:", "store: tidied up")]
        self.assertEqual(sorted(lines), lines)

    def test_use_and_limit_are_logged(self):
        self.start("-store-limit", "2GB")
        image = self.push("app", "1")
        size = len(image.manifest) + len(image.layer) + len(image.config)
        self.program.stop()
        with Program(self.daemon.host, store=self.program.store) as program:
            self.assertRegex(program.wait_for_line("store: tidied up"), rf"tidied up, {size / 1000:.1f} kB used$")
        with Program(self.daemon.host, "-store-limit", "2GB", store=self.program.store) as program:
            self.assertIn("kB of the limit of 2.0 GB used", program.wait_for_line("store: tidied up"))


class TestEnd(BehaviourCase):
    def start(self, *arguments, **more):
        """Start the program in an interpreter of its own, whose end is part of the program's."""
        return super().start(*arguments, command=COMMAND, **more)

    def end(self, number=signal.SIGTERM):
        self.program.process.send_signal(number)
        self.assertEqual(0, self.program.process.wait(60))

    def test_while_it_starts(self):
        self.daemon = self.enter(FakeDaemon())
        self.daemon.slow = "hung"
        for number in (signal.SIGTERM, signal.SIGINT):
            self.start(constants=ENDLESS)
            self.end(number)

    def test_while_docker_hangs(self):
        self.start(constants=ENDLESS)
        self.daemon.add("app:1", Image())
        self.daemon.slow = "hung"
        paths = ("/v2/library/app/manifests/1?ns=docker.io", "/v2/_catalog", "/v2/missing/manifests/1?ns=quay.io")
        failed = []

        def ask(path):
            try:
                self.program.get(path)
            except OSError:
                failed.append(path)

        threads = [threading.Thread(target=ask, args=(path,)) for path in paths]
        before = len(self.daemon.requests)
        for thread in threads:
            thread.start()
        while len(self.daemon.requests) == before:
            pass
        self.end()
        for thread in threads:
            thread.join()
        self.assertEqual(set(paths), set(failed))

    def test_while_an_upload_arrives(self):
        """Nothing half-written stays, and the upload can be continued."""
        self.start(constants=ENDLESS)
        location = self.ask("POST", "/v2/app/blobs/uploads/", 202).headers["Location"]
        go_on, waited = self.event(), []

        def pieces():
            yield b"x" * module.PIECE
            waited.append(not go_on.wait(60))
            yield b"y"

        def send():
            with contextlib.suppress(OSError):
                self.program.request("PATCH", location, body=pieces())

        thread = threading.Thread(target=send)
        thread.start()
        upload = self.program.store / "repositories/app/_uploads" / location.rpartition("/")[2]
        while not upload.stat().st_size:
            pass
        self.end()
        go_on.set()
        thread.join()
        self.assertEqual([False], waited, "the program has to end before the upload does")
        self.assertEqual([upload], [path for path in self.program.store.rglob("*") if path.is_file()])
        size = upload.stat().st_size
        self.start(store=self.program.store)
        self.assertEqual(f"0-{size - 1}", self.ask("GET", location, 204).headers["Range"])


class TestManyFiles(unittest.TestCase):
    """Stores with much in them. What is counted is what the disk is asked."""

    TAGS = 5000

    @classmethod
    def setUpClass(cls):
        from test_damage import MANIFEST
        from test_hosted import HostedProgram
        cls.program = HostedProgram(durable=False)
        cls.addClassCleanup(cls.program.__exit__)
        cls.manifest = b'{"schemaVersion": 2, "layers": [], "mediaType": "%s"}' % MANIFEST.encode()
        cls.headers = {"Content-Type": MANIFEST}
        answer = cls.program.request("PUT", "/v2/app/manifests/t0000", cls.headers, cls.manifest)
        assert answer.status == 201, answer.body
        cls.digest = answer.headers["Docker-Content-Digest"]
        tags = cls.program.store / "repositories/app/_tags"
        for number in range(1, cls.TAGS):
            (tags / f"t{number:04}").write_text(cls.digest)

    def reads_of(self, work):
        """Do some work, and return how many tags were read meanwhile."""
        count, real = [0], os.open

        def counting(path, *arguments, **more):
            count[0] += "/_tags/" in str(path)
            return real(path, *arguments, **more)

        with unittest.mock.patch.object(os, "open", counting):
            work()
        return count[0]

    def test_1_pages(self):
        found = []

        def walk():
            path = "/v2/app/tags/list?n=100"
            while path:
                answer = self.program.get(path)
                found.extend(answer.json["tags"])
                link = answer.headers["Link"]
                path = link and link.partition("<")[2].partition(">")[0]

        # One more for each page: whether there is another one.
        self.assertLessEqual(self.reads_of(walk), self.TAGS + self.TAGS // 100)
        self.assertEqual([f"t{number:04}" for number in range(self.TAGS)], found)

    def test_2_catalog(self):
        self.assertEqual(1, self.reads_of(lambda: self.assertEqual(
            ["app"], self.program.get("/v2/_catalog").json["repositories"])))

    def test_3_delete_by_digest(self):
        path = f"/v2/app/manifests/{self.digest}"
        self.assertEqual(0, self.reads_of(lambda: self.assertEqual(202, self.program.request("DELETE", path).status)))
        self.assertEqual([], self.program.get("/v2/app/tags/list").json["tags"])
        self.assertEqual(404, self.program.head("/v2/app/manifests/t0001").status)
        answer = self.program.request("PUT", path, self.headers, self.manifest)
        self.assertEqual(201, answer.status, answer.body)
        self.assertEqual([], self.program.get("/v2/app/tags/list").json["tags"], "deleted tags must not come back")
        self.assertEqual([], list((self.program.store / "repositories/app/_tags").iterdir()))


if __name__ == "__main__":
    unittest.main()
