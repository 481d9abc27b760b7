"""Tests of the images that Docker is to have from the start: -warm and -warm-file."""

import os
import sys
import tempfile
import threading
import unittest
from pathlib import Path
from unittest import mock

import lab
from fake_daemon import FakeDaemon
from program import MODULE, Program

sys.path.insert(0, str(MODULE.parent))
import k3d_registry_dockerd as module
from k3d_registry_dockerd import RegistryError, Warming

HEX = "0123456789abcdef" * 4


class TestNames(unittest.TestCase):
    def test_good(self):
        """Each row: a name for `docker pull`, and its full form."""
        for text, expected in (
                ("alpine", "docker.io/library/alpine:latest"), ("alpine:3.20", "docker.io/library/alpine:3.20"),
                ("me/app:1", "docker.io/me/app:1"), ("docker.io/alpine", "docker.io/library/alpine:latest"),
                ("index.docker.io/alpine", "docker.io/library/alpine:latest"), ("quay.io/a/b:1", "quay.io/a/b:1"),
                ("localhost:5000/app", "localhost:5000/app:latest"), ("[::1]:5000/app:2", "[::1]:5000/app:2"),
                (f"x@sha256:{HEX}", f"docker.io/library/x@sha256:{HEX}"),
                (f"quay.io/x:1@sha256:{HEX}", f"quay.io/x@sha256:{HEX}")):
            with self.subTest(text):
                self.assertEqual(expected, str(module.docker_reference(text)))

    def test_bad(self):
        for text in ("", ":1", "Alpine", "a b", "x:", "x:ä", "x@1", "x@sha256:1", f"x:/@sha256:{HEX}", "https://x/y",
                     "x@", f"x:ä@sha256:{HEX}"):
            with self.subTest(text), self.assertRaisesRegex(ValueError, "is not the name of an image"):
                module.docker_reference(text)

    def test_file(self):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "images")
            path.write_text("# a list\n\nalpine  # with a comment\r\n  quay.io/a/b:1\n")
            self.assertEqual(["docker.io/library/alpine:latest", "quay.io/a/b:1"],
                             [str(name) for name in module.warm_list(str(path))])
            path.write_text("alpine:\n")
            for bad in (path, Path(folder), Path(folder, "missing")):
                with self.subTest(bad), self.assertRaises(ValueError):
                    module.warm_list(str(bad))


class FakePulls:
    """Pulls that fail as often as `failures` says for an image, and that note how many there are at a time."""

    def __init__(self, failures):
        self.failures, self.most, self._now, self._lock = failures, 0, 0, threading.Lock()
        self.both = threading.Barrier(2)

    def complete(self, reference):
        with self._lock:
            self._now += 1
            self.most = max(self.most, self._now)
        if reference.repository.startswith("pair"):
            self.both.wait(20)  # raises unless two are under way
        with self._lock:
            self._now -= 1
            left = self.failures.get(str(reference), [])
            if left:
                raise left.pop(0)


class TestWarming(unittest.TestCase):
    def warming(self, names, failures=None):
        self.pulls = FakePulls(failures or {})
        return Warming(self.pulls, [module.docker_reference(name) for name in names])

    def test_nothing_wanted(self):
        warming = self.warming([])
        self.assertEqual({}, warming.missing())
        warming.run()

    def test_two_at_a_time(self):
        warming = self.warming(["r.io/pair1", "r.io/pair2", "r.io/pair3", "r.io/pair4", "r.io/pair1"])
        self.assertTrue(warming.missing())
        warming.run()
        self.assertEqual({}, warming.missing())
        self.assertEqual(2, self.pulls.most)

    def test_no_thread_can_be_started(self):
        warming = self.warming(["r.io/a:1", "r.io/b:1", "r.io/c:1"])
        with mock.patch.object(threading.Thread, "start", side_effect=RuntimeError("can't start new thread")):
            warming.run()
        self.assertEqual({}, warming.missing())

    def test_failures_are_tried_again_with_growing_pauses(self):
        warming = self.warming(["r.io/a:1", "r.io/b:1", "r.io/c:1"], {
            "r.io/a:1": [RegistryError("UNAVAILABLE", "Docker is away")] * 2, "r.io/b:1": [ValueError("oops")]})
        seen = []

        def sleep(seconds):
            seen.append((seconds, {str(name): reason for name, reason in warming.missing().items()}))

        with mock.patch.object(module.time, "sleep", sleep), self.assertLogs("k3d-registry-dockerd") as logged:
            warming.run()
        self.assertEqual([(5, {"r.io/a:1": "Docker is away", "r.io/b:1": "ValueError('oops')"}),
                          (10, {"r.io/a:1": "Docker is away"})], seen)
        self.assertIn("lacks 2 of 3 images, which are tried again in 5 s: r.io/a:1 (Docker is away)", logged.output[0])
        self.assertIn("warm: Docker has all images of the list, 3", logged.output[-1])
        self.assertEqual({}, warming.missing())

    def test_pauses_end_at_some_minutes(self):
        self.assertEqual(sorted(module.WARMING_PAUSES), list(module.WARMING_PAUSES))
        warming = self.warming(["r.io/a:1"], {"r.io/a:1": [RegistryError("DENIED", "no")] * 20})
        with mock.patch.object(module.time, "sleep") as sleep, self.assertLogs("k3d-registry-dockerd"):
            warming.run()
        self.assertEqual([*module.WARMING_PAUSES, *[module.WARMING_PAUSES[-1]] * 13],
                         [call.args[0] for call in sleep.call_args_list])


    def test_the_program_ends_during_a_pull(self):
        with FakeDaemon() as daemon:
            _, go_on = daemon.hold("/images/create")
            self.addCleanup(go_on.set)
            with Program(daemon.host, "-warm", "alpine") as program:
                program.wait_for_line("pull docker.io/library/alpine:latest: started")
                self.assertEqual(200, program.get("/v2/").status)
                self.assertEqual(0, program.stop())


class TestEngines(unittest.TestCase):
    engine = lab.ENGINES["containerd"]

    @classmethod
    def setUpClass(cls):
        lab.require()
        cls.origin = lab.ORIGINS["open"]
        cls.names = [f"127.0.0.1:{cls.origin.port}/warm/{os.getpid()}-{number}:1" for number in range(3)]
        for name in cls.names:
            cls.origin.push(cls.engine, "base:1", name.partition("/")[2])

    def test_pulled_at_the_start(self):
        for store in ("containerd", "classic"):
            engine = lab.ENGINES[store]
            with self.subTest(store), tempfile.NamedTemporaryFile("w") as file:
                self.addCleanup(engine.remove, *self.names)
                self.assert_missing(engine)
                file.write("\n".join(self.names[1:]))
                file.flush()
                with Program(f"unix://{engine.socket}", "-warm", self.names[0], "-warm-file", file.name) as program:
                    program.wait_for_line("warm: Docker has all images of the list, 3")
                    self.assertEqual(3, len(program.jobs("pull")), program.log)
                for name in self.names:
                    self.assertTrue(engine.inspect(name))

    def assert_missing(self, engine):
        for name in self.names:
            with self.assertRaises(RuntimeError):
                engine.inspect(name)

    def test_what_fails_is_said(self):
        """Each row: arguments -> the reason. The program ends at once nevertheless."""
        engine = lab.ENGINES["containerd"]
        for arguments, reason in ((["-warm", f"127.0.0.1:{self.origin.port}/warm/none:1"], "could not pull"),
                                  (["-warm", self.names[0], "-pull", "never"], "-pull never"),
                                  (["-warm", self.names[0], "-allow", "quay.io"], "-allow")):
            with self.subTest(arguments), Program(f"unix://{engine.socket}", *arguments) as program:
                line = program.wait_for_line("warm: Docker lacks 1 of 1 images, which are tried again in 5 s")
                self.assertIn(reason, line)
                self.assertEqual(0, program.stop())


if __name__ == "__main__":
    unittest.main()
