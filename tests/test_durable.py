"""What was acknowledged is there after the machine has lost power.

No file system is shut down here. Instead, each fsync() is recorded, and a store is made of what is on the disk for
sure: files with the bytes that they had at their last fsync(), in folders with the names that they had at theirs.
"""

import os
import stat
import tempfile
import unittest
from pathlib import Path
from unittest import mock

from test_damage import APP, CONFIG, LAYER, MANIFEST, WHOLE, digest_of, hex_of, push, state
from test_hosted import HostedProgram, module


class Recorder:
    """What is on the disk for sure below a folder."""

    def __init__(self, root):
        self.root = root
        self.names = {}     # inode of a folder -> {name: inode}
        self.contents = {}  # inode of a file -> bytes
        self.count = 0
        self._real = os.fsync

    def fsync(self, descriptor):
        self._real(descriptor)
        self.count += 1
        status, path = os.fstat(descriptor), Path(f"/proc/self/fd/{descriptor}")
        if stat.S_ISDIR(status.st_mode):
            self.names[status.st_ino] = {entry.name: entry.inode() for entry in os.scandir(descriptor)}
        else:
            self.contents[status.st_ino] = path.read_bytes()

    def rebuild(self, target):
        """Make a folder with what would be there after a loss of power."""
        self._rebuild(self.root.stat().st_ino, target, {})
        return target / "store"

    def _rebuild(self, inode, target, made):
        target.mkdir()
        for name, child in self.names.get(inode, {}).items():
            path = target / name
            if child in made:
                os.link(made[child], path)
            elif child in self.contents:
                path.write_bytes(self.contents[child])
                made[child] = path
            elif child in self.folders:
                self._rebuild(child, path, made)
            else:
                path.touch()

    @property
    def folders(self):
        return {path.stat().st_ino for path in self.root.rglob("*") if path.is_dir()}


class TestPowerLoss(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)
        (self.folder / "disk").mkdir()
        self.recorder = Recorder(self.folder / "disk")
        patch = mock.patch.object(os, "fsync", self.recorder.fsync)
        patch.start()
        self.addCleanup(patch.stop)

    def start(self, **limits):
        program = HostedProgram(self.folder / "disk" / "store", **limits)
        self.addCleanup(program.__exit__)
        return program

    def after_power_loss(self):
        """A program on what is left."""
        with tempfile.TemporaryDirectory(dir=self.folder) as target:
            pass
        program = HostedProgram(self.recorder.rebuild(Path(target)))
        self.addCleanup(program.__exit__)
        return program

    def test_push(self):
        program = self.start()
        self.assertEqual({201}, push(program, "a/app"))
        self.assertEqual(WHOLE, state(self.after_power_loss(), "a/app"))

    def test_each_answer(self):
        """Whatever was acknowledged at the moment, in the order of a client's requests."""
        program = self.start()
        for data in (CONFIG, LAYER):
            location = program.request("POST", "/v2/a/app/blobs/uploads/").headers["Location"]
            self.assertEqual(202, program.request("PATCH", location, body=data[:5]).status)
            self.assertEqual(201, program.request("PUT", f"{location}?digest={digest_of(data)}", body=data[5:]).status)
            answer = self.after_power_loss().get(f"/v2/a/app/blobs/{digest_of(data)}")
            self.assertEqual((200, data), (answer.status, answer.body))
        steps = (
            ("PUT", "1", {"1"}), ("PUT", "2", {"1", "2"}), ("DELETE", "1", {"2"}), ("PUT", "1", {"1", "2"}),
            ("DELETE", digest_of(APP), set()), ("PUT", "3", {"3"}))
        for method, target, tags in steps:
            with self.subTest(method, target=target):
                answer = program.request(method, f"/v2/a/app/manifests/{target}", {"Content-Type": MANIFEST},
                                         APP if method == "PUT" else None)
                self.assertEqual(201 if method == "PUT" else 202, answer.status)
                left = self.after_power_loss()
                for tag in ("1", "2", "3"):
                    answer = left.get(f"/v2/a/app/manifests/{tag}")
                    self.assertEqual(200 if tag in tags else 404, answer.status, tag)
        mounted = program.request("POST", f"/v2/b/blobs/uploads/?mount={digest_of(LAYER)}&from=a/app")
        self.assertEqual(201, mounted.status)
        self.assertEqual(LAYER, self.after_power_loss().get(f"/v2/b/blobs/{digest_of(LAYER)}").body)
        location = program.request("POST", f"/v2/c/blobs/uploads/?digest={digest_of(CONFIG)}", body=CONFIG)
        self.assertEqual(201, location.status)
        self.assertEqual(CONFIG, self.after_power_loss().get(f"/v2/c/blobs/{digest_of(CONFIG)}").body)
        self.assertEqual(202, program.request("DELETE", f"/v2/c/blobs/{digest_of(CONFIG)}").status)
        self.assertEqual(404, self.after_power_loss().get(f"/v2/c/blobs/{digest_of(CONFIG)}").status)

    def test_healed_content(self):
        program = self.start()
        for repository in ("a/app", "b"):
            push(program, repository)
        with open(program.store / f"blobs/sha256/{hex_of(LAYER)}", "r+b") as file:
            file.write(b"X")
        self.assertEqual({201}, push(program, "a/app", ask_first=False))
        left = self.after_power_loss()
        self.assertEqual((WHOLE, WHOLE), (state(left, "a/app"), state(left, "b")))

    def test_adopted_content(self):
        """What came from Docker is not synced, for it can be had again; but it is when it is adopted."""
        program = self.start()
        store = program.hosted._store
        with module.BlobWriter(store) as writer:
            writer.write(LAYER)
            digest = writer.keep(store.docker)
        before = self.recorder.count
        self.assertEqual(404, self.after_power_loss().get(f"/v2/a/app/blobs/{digest}").status)
        self.assertTrue(program.hosted.repository("a/app").blobs.adopt(digest))
        self.assertGreater(self.recorder.count, before)
        self.assertEqual(LAYER, self.after_power_loss().get(f"/v2/a/app/blobs/{digest}").body)

    def test_large_uploads_are_flushed_while_they_arrive(self):
        """So that the last sync, before the answer, has little to write."""
        program, flushed = self.start(), []
        with mock.patch.object(module.Writer, "STEP", 1000), mock.patch.object(
                os, "posix_fadvise", lambda _, start, count, advice: flushed.append((start, count, advice))):
            location = program.request("POST", "/v2/a/app/blobs/uploads/").headers["Location"]
            for data in (LAYER[:999], LAYER[999:1500], LAYER[1500:]):
                program.request("PATCH", location, body=data)
        dont_need = os.POSIX_FADV_DONTNEED
        self.assertEqual([(0, 1500, dont_need), (1000, len(LAYER) - 1000, dont_need)], flushed)

    def test_no_sync(self):
        program = self.start(durable=False)
        self.assertEqual({201}, push(program, "a/app"))
        self.assertEqual(0, self.recorder.count)


if __name__ == "__main__":
    unittest.main()
