"""A kill at any moment of a push leaves all of the image or nothing, and the push can be repeated."""

import hashlib
import http.client
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import unittest
from pathlib import Path

import walk
from fake_daemon import FakeDaemon, Image
from program import MODULE, Program, takes_long

# Runs the program, and kills it just before its n-th change to the store. What it does at its start, beside requests,
# does not count: that would make it another change each time.
KILLER = """
import os, signal, sys, threading
sys.path.insert(0, os.path.dirname(sys.argv.pop(1)))
import k3d_registry_dockerd
store, left = sys.argv[sys.argv.index("-store") + 1], int(os.environ["KILL_AT"])
def hook(event, arguments):
    global left
    if event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR):
        return
    if event in ("open", "os.link", "os.rename", "os.remove", "os.mkdir", "os.utime"):
        if str(arguments[0]).startswith(store) and "work_in_background" not in threading.current_thread().name:
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(hook)
sys.exit(k3d_registry_dockerd.main(sys.argv[1:]))
"""
MANIFEST = "application/vnd.oci.image.manifest.v1+json"
STEP = 3  # one run in so many kills at a given change: each has its turn, and one run does not take too long


def digest_of(data):
    return "sha256:" + hashlib.sha256(data).hexdigest()


class TestKill(unittest.TestCase):
    def setUp(self):
        self.daemon = FakeDaemon()
        self.daemon.__enter__()
        self.addCleanup(self.daemon.__exit__)
        self.layers = [os.urandom(5000) for _ in range(2)]
        subject = {"mediaType": MANIFEST, "digest": digest_of(b"subject"), "size": 7}
        self.manifest = json.dumps({
            "schemaVersion": 2, "config": self.descriptor(self.layers[0]), "subject": subject,
            "layers": [self.descriptor(layer) for layer in self.layers]}).encode()

    def descriptor(self, data):
        return {"mediaType": "application/octet-stream", "digest": digest_of(data), "size": len(data)}

    def push(self, program):
        """Push an image with one blob in pieces, one blob in a single request, and the manifest."""
        one, two = self.layers
        location = program.request("POST", "/v2/app/blobs/uploads/").headers["Location"]
        program.request("PATCH", location, body=one[:2000])
        program.request("PATCH", location, body=one[2000:])
        answers = [program.request("PUT", f"{location}?digest={digest_of(one)}"),
                   program.request("POST", f"/v2/app/blobs/uploads/?digest={digest_of(two)}", body=two),
                   program.request("PUT", "/v2/app/manifests/1", {"Content-Type": MANIFEST}, self.manifest)]
        self.assertEqual([201] * 3, [answer.status for answer in answers])

    def check_consistent(self, program):
        """Check that every file matches its digest, and that a tag has its manifest and blobs.

        Return True if the tag exists.
        """
        for path in program.store.glob("**/sha256/[0-9a-f]*"):
            if path.is_file() and path.parent.parent.name != "_types":
                self.assertEqual(path.name, hashlib.sha256(path.read_bytes()).hexdigest(), path)
        answer = program.get("/v2/app/manifests/1")
        if answer.status == 404:
            self.assertNotIn("1", program.get("/v2/app/tags/list").json.get("tags", []))
            return False
        self.assertEqual((200, self.manifest), (answer.status, answer.body))
        for layer in self.layers:
            self.assertEqual(layer, program.get(f"/v2/app/blobs/{digest_of(layer)}").body)
        referrers = program.get(f"/v2/app/referrers/{digest_of(b'subject')}").json["manifests"]
        self.assertEqual([digest_of(self.manifest)], [found["digest"] for found in referrers])
        return True

    def program(self, store, kill_at=0):
        """Start a program that kills itself before a change, or never if kill_at is 0.

        It imports the module, so the module is compiled only once.
        """
        return Program(self.daemon.host, store=store, command=[sys.executable, "-c", KILLER, str(MODULE)],
                       env={"KILL_AT": str(kill_at)})

    def run_killed(self, at, store, push):
        """Push to a program that kills itself before its at-th change. Return True if the push was completed."""
        program = self.program(store, at)
        try:
            push(program)
            return True
        except (OSError, http.client.HTTPException):
            self.assertEqual(-signal.SIGKILL, program.process.wait(30))
            return False
        finally:
            program.stop()

    @takes_long
    def test_kill_during_push(self):
        at, done, were_there = random.randrange(STEP), False, []
        while not done:
            at += STEP
            with self.subTest(at=at), tempfile.TemporaryDirectory() as folder:
                store = Path(folder) / "store"
                done = self.run_killed(at, store, self.push)
                with self.program(store) as program:
                    were_there.append(self.check_consistent(program))
                    self.push(program)
                    self.assertTrue(self.check_consistent(program))
                    self.assertEqual([], program.lines("a bug in this program"))
        self.assertGreater(at, 20)
        self.assertFalse(were_there[0])
        self.assertTrue(were_there[-1])
        self.assertEqual(sorted(were_there), were_there, "once the image is present, it must stay")

    @takes_long
    def test_kill_during_deletion(self):
        """The manifest and its tags are there, all of them, or none; also after the same manifest is pushed again."""
        digest = digest_of(self.manifest)
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        pristine = Path(folder.name) / "store"
        with self.program(pristine) as program:
            self.push(program)

        def delete(program):
            self.assertEqual(202, program.request("DELETE", f"/v2/app/manifests/{digest}").status)

        at, done, were_there = 0, False, []
        while not done:
            at += 1
            store = Path(folder.name) / str(at)
            shutil.copytree(pristine, store)
            done = self.run_killed(at, store, delete)
            with self.subTest(at=at), self.program(store) as program:
                program.wait_for_line("store: tidied up")
                manifest, tag = (program.head(f"/v2/app/manifests/{target}").status for target in (digest, "1"))
                self.assertEqual(manifest, tag)
                answer = program.request("PUT", "/v2/app/manifests/2", {"Content-Type": MANIFEST}, self.manifest)
                self.assertEqual(201, answer.status)
                self.assertEqual(tag, program.head("/v2/app/manifests/1").status)
                were_there.append(tag == 200)
        self.assertTrue(were_there[0])
        self.assertFalse(were_there[-1])
        self.assertEqual(sorted(were_there, reverse=True), were_there, "once the image is deleted, it must stay so")

    @takes_long
    def test_kill_during_adoption(self):
        """Push the manifest of an image that only Docker has. Then all of the image is hosted, or nothing."""
        image = self.daemon.add("app:1", Image())

        def tag(program):
            answer = program.request("PUT", "/v2/kept/manifests/1", {"Content-Type": MANIFEST}, image.manifest)
            self.assertEqual(201, answer.status, answer.body)

        def is_there(program):
            """Return True if the tag is hosted. Everything that it needs must be hosted as well."""
            if program.head("/v2/kept/manifests/1").status == 404:
                return False
            for blob in (image.config, image.layer):
                self.assertEqual(200, program.head(f"/v2/kept/blobs/{digest_of(blob)}").status)
            return True

        at, done, were_there = random.randrange(STEP), False, []
        while not done:
            at += STEP
            with self.subTest(at=at), tempfile.TemporaryDirectory() as folder:
                store = Path(folder) / "store"
                done = self.run_killed(at, store, tag)
                with self.program(store) as program:
                    were_there.append(is_there(program))
                    tag(program)
                    self.assertTrue(is_there(program))
                if done:
                    walk.walk_without_docker(store, {"kept:1": image.digest})
        self.assertGreater(at, 10)
        self.assertEqual(sorted(were_there), were_there, "once the image is present, it must stay")


if __name__ == "__main__":
    unittest.main()
