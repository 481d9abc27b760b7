"""Every wait has an end: what clients get when Docker does not answer, and that nothing is left behind then."""

import contextlib
import json
import socket
import threading
import time
import unittest
from pathlib import Path

from fake_daemon import OCI_MANIFEST, Image, chunked, sha256, varint
from program import takes_long
from test_behaviour import BehaviourCase, wait_until

LIMITS = {
    # Each answer comes before Docker's, and none of the waits for Docker ends by itself: so this is their only limit.
    "the deadline of the request": {"LAST_ANSWER": 0.2, "ENGINE_TIMEOUT": 1000},
    "the timeout of each wait": {"LAST_ANSWER": 1000, "ENGINE_TIMEOUT": 0.5},
}


class TestDockerDoesNotAnswer(BehaviourCase):
    """The program starts with a good daemon, which then ceases to answer."""

    def begin(self, constants, slow):
        self.start(constants={"ENGINE_FRESH": 0, "PRESENCE_FRESH": 0, **constants})
        self.image = self.daemon.add("app:1", Image("Docker's"))
        self.hosted, self.index = self.push("hosted", "1"), Image("another")
        self.push("hosted", "2", "to be deleted")
        self.ask("GET", "/v2/app/manifests/1", 200)
        if slow == "refused":
            self.daemon.stop()
        self.daemon.slow = slow

    def with_docker(self):
        """Return the requests that cannot be answered without Docker."""
        unknown = json.loads(Image("unknown").manifest)
        unknown["layers"] = [{**unknown["layers"][0], "digest": sha256(b"%d" % i)} for i in range(5)]
        layer = sha256(self.image.layer)
        return [(method, path, None) for method in ("GET", "HEAD") for path in (
            "/v2/library/app/manifests/1?ns=docker.io", "/v2/team/missing/manifests/1?ns=quay.io",
            f"/v2/library/app/manifests/{self.image.digest}?ns=docker.io",
            f"/v2/library/app/blobs/{layer}?ns=docker.io", "/v2/_catalog", "/v2/hosted/tags/list", "/v2/app/tags/list",
            "/v2/app/tags/list?ns=docker.io")] + [
            ("GET", "/v2/app/manifests/1", None), ("GET", f"/v2/app/manifests/{self.image.digest}", None),
            ("GET", f"/v2/app/blobs/{layer}", None),
            ("DELETE", "/v2/app/manifests/1", None), ("DELETE", f"/v2/app/manifests/{self.image.digest}", None),
            ("DELETE", f"/v2/app/blobs/{layer}", None),
            ("PUT", "/v2/app/manifests/2", json.dumps(unknown).encode()),
            ("PUT", "/v2/app/manifests/2", self.image.manifest)]

    def without_docker(self):
        """Return the requests that have nothing to do with Docker, with their statuses."""
        layer, blob = sha256(self.hosted.layer), b"a blob"
        return (("GET", "/v2/", 200, None), ("GET", "/v2/hosted/manifests/1", 200, None),
                ("GET", f"/v2/hosted/blobs/{layer}", 200, None), ("HEAD", f"/v2/hosted/blobs/{layer}", 200, None),
                ("HEAD", "/v2/app/manifests/1", 404, None),
                ("HEAD", f"/v2/app/blobs/{sha256(self.image.layer)}", 404, None),
                ("GET", f"/v2/hosted/referrers/{layer}", 200, None), ("POST", "/v2/hosted/blobs/uploads/", 202, None),
                ("POST", f"/v2/hosted/blobs/uploads/?digest={sha256(blob)}", 201, blob),
                ("PUT", "/v2/hosted/manifests/3", 201, self.hosted.manifest),
                ("DELETE", "/v2/hosted/manifests/2", 202, None),
                ("DELETE", f"/v2/hosted/manifests/{self.hosted.digest}", 202, None),
                ("DELETE", f"/v2/hosted/blobs/{layer}", 202, None))

    def check(self, constants, slow):
        self.begin(constants, slow)
        answers = []

        def ask(method, path, body):
            answers.append((method, path, self.program.request(method, path, {"Content-Type": OCI_MANIFEST}, body)))

        threads = [threading.Thread(target=ask, args=row) for row in self.with_docker()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual(len(threads), len(answers))
        for method, path, answer in answers:
            # A Docker that does not run has no images, so the lists are complete without it.
            complete = slow == "refused" and path in ("/v2/_catalog", "/v2/hosted/tags/list")
            with self.subTest(slow=slow, method=method, path=path):
                self.assertEqual(200 if complete else 503, answer.status, answer.body)
                if method != "HEAD" and not complete:
                    self.assertEqual("UNAVAILABLE", answer.code)
        for method, path, status, body in self.without_docker():
            with self.subTest(slow=slow, method=method, path=path):
                self.ask(method, path, status, body, Content_Type=OCI_MANIFEST)
        self.assertFalse(self.daemon.released.is_set())
        self.tearDown()
        self.doCleanups()
        del self.daemon

    def test_every_endpoint(self):
        for slow in ("hung", "cut", "trickle", "refused"):
            self.check(LIMITS["the deadline of the request"], slow)

    @takes_long
    def test_every_wait(self):
        for slow in ("hung", "cut"):
            self.check(LIMITS["the timeout of each wait"], slow)

    def test_content_that_is_found_but_not_read(self):
        """Docker describes a blob that is too large for a manifest, and does not begin to send it."""
        self.start(constants=LIMITS["the deadline of the request"])
        image, go_on = self.daemon.add("app:1", Image("x" * 5_000_000)), self.event()
        self.daemon.reading = lambda *_: go_on.wait()
        path = f"/v2/library/app/blobs/{sha256(image.layer)}?ns=docker.io"
        for headers in ({}, {"Range": "bytes=3-5"}):
            with self.subTest(headers):
                self.assertEqual("UNAVAILABLE", self.ask("GET", path, 503, **headers).code)
        self.assertEqual(200, self.program.head(path).status)

    def test_ranges_that_are_read_after_the_deadline(self):
        """The deadline is for the answer, and not for its body."""
        self.start(constants=LIMITS["the deadline of the request"])
        image, go_on = self.daemon.add("app:1", Image("x" * 5_000_000)), self.event()

        def read(sock, stream, digest, part):
            go_on.wait()
            self.daemon.answer_call(sock, stream, b"\x12" + varint(len(part)) + part)

        self.daemon.reading = read
        path = f"/v2/library/app/blobs/{sha256(image.layer)}?ns=docker.io"
        response = self.program.begin_get(path, Range="bytes=0-1,1000-1001")
        self.assertEqual(206, response.status)
        time.sleep(2 * LIMITS["the deadline of the request"]["LAST_ANSWER"])
        go_on.set()
        self.assertIn(b"\r\n\r\nxx\r\n", response.read())


class TestClientsThatHangUp(BehaviourCase):
    """50 clients close their connections while they wait. They leave neither threads nor open files behind."""

    CLIENTS = 50

    def usage(self):
        """Return the number of threads, and of open files, of the program, which has begun to serve."""
        self.ask("GET", "/v2/", 200)
        process = Path(f"/proc/{self.program.process.pid}")
        return [len(list((process / kind).iterdir())) for kind in ("task", "fd")]

    def wait_for_usage(self, before, more=0):
        """Wait until the program uses no more than before, apart from some, and from what serves usage() itself."""
        wait_until(lambda: all(now <= count + more + 2 for now, count in zip(self.usage(), before, strict=True)))

    def check(self, path, allowed):
        """Let clients ask for a path and hang up; allowed is what the work that goes on may take."""
        before = self.usage()
        with contextlib.ExitStack() as clients:
            for i in range(self.CLIENTS):
                client = clients.enter_context(socket.create_connection(("127.0.0.1", self.program.port)))
                client.sendall(f"GET {path.format(i)} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            wait_until(lambda: self.usage()[0] >= before[0] + 2 * self.CLIENTS - 5)
        wait_until(lambda: len(self.program.lines(" 499 ")) == self.CLIENTS)
        self.wait_for_usage(before, allowed)

    def test_during_a_pull(self):
        """The pull goes on, and the next client gets its result."""
        go_on, image, name = self.event(), Image(), "registry.example/team/app:1"
        self.start(constants={"EARLY_ANSWER": 0.2, "LAST_ANSWER": 1000})

        def pull(sock):
            go_on.wait()
            self.daemon.add(name, image)
            sock.sendall(chunked(b'{"status":"done"}\n'))

        self.daemon.pulls[name] = lambda: pull
        path = "/v2/team/app/manifests/1?ns=registry.example"
        self.check(path, allowed=2)
        self.assertEqual([], self.program.lines("pull registry.example/team/app:1: done"))
        go_on.set()
        self.program.wait_for_line("pull registry.example/team/app:1: done")
        self.assertEqual(image.manifest, self.ask("GET", path, 200).body)
        self.assertEqual(1, len(self.pulls("registry.example/team/app")))

    @takes_long
    def test_while_docker_hangs(self):
        """What asks Docker ends with Docker's answer, or with its timeout."""
        self.start(constants={"ENGINE_TIMEOUT": 1000, "LAST_ANSWER": 1000})
        self.program.wait_for_line("store: tidied up")  # the threads of the start have ended, or soon will have
        for path in ("/v2/_catalog", "/v2/library/app-{}/manifests/1?ns=docker.io"):
            with self.subTest(path):
                before = self.usage()
                self.daemon.slow = "hung"
                self.check(path, allowed=self.CLIENTS)
                self.daemon.slow = None
                self.daemon.released.set()
                self.wait_for_usage(before)
                self.daemon.released.clear()
                self.program.log.clear()

    def test_too_many_pulls(self):
        """Each pull takes a thread, so their number is limited."""
        go_on = self.event()
        self.start(constants={"PULLS_LIMIT": 2, "EARLY_ANSWER": 0.1, "LAST_ANSWER": 0.3})
        for i in range(3):
            self.daemon.pulls[f"registry.example/app-{i}:1"] = lambda: lambda sock: go_on.wait() and b""
        for i, status in ((0, 408), (1, 408), (2, 429), (1, 408)):
            with self.subTest(i):
                answer = self.ask("GET", f"/v2/app-{i}/manifests/1?ns=registry.example", status)
        self.assertEqual("STILL_PULLING", answer.code)
        go_on.set()
        self.program.wait_for_line("pull registry.example/app-0:1: failed")
        self.program.wait_for_line("pull registry.example/app-1:1: failed")
        self.daemon.pulls.clear()
        self.ask("GET", "/v2/app-2/manifests/1?ns=registry.example", 401)


if __name__ == "__main__":
    unittest.main()
