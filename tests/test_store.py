"""Section 4: our own disk."""

import os
import sys
import tempfile
import threading
import unittest
from pathlib import Path

from program import MODULE

sys.path.insert(0, str(MODULE.parent))
from k3d_registry_dockerd import EVICTION_AGE, BlobWriter, Digest, RegistryError, Store

IMAGE, OTHER = Digest.of(b"image"), Digest.of(b"other image")
NOW = 2_000_000_000.0


class StoreCase(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.root = Path(folder.name) / "store"
        self.store = Store(self.root)

    def put(self, data):
        writer = BlobWriter(self.store)
        writer.write(data)
        return writer.keep(self.store.docker)

    def files(self):
        return {str(path.relative_to(self.root)) for path in self.root.rglob("*") if path.is_file()}

    def age(self, seconds):
        """Make everything so old, seen from NOW."""
        for path in self.root.rglob("*"):
            os.utime(path, (NOW - seconds, NOW - seconds))


class TestBlobs(StoreCase):
    def test_nothing_is_made_before_the_first_write(self):
        self.assertIsNone(self.store.docker.size(IMAGE))
        self.assertIsNone(self.store.exported(IMAGE))
        self.assertFalse(self.root.exists())

    def test_kept(self):
        digest = self.put(b"content")
        self.assertEqual(Digest.of(b"content"), digest)
        self.assertEqual(b"content", self.store.blob_path(digest).read_bytes())
        self.assertEqual({f"blobs/sha256/{digest.hex}", f"docker/sha256/{digest.hex}"}, self.files())

    def test_discarded(self):
        writer = BlobWriter(self.store)
        writer.write(b"content")
        self.assertEqual(1, len(self.files()))
        self.assertIsNone(self.store.docker.size(Digest.of(b"content")), "not under its name before it is whole")
        writer.discard()
        self.assertEqual(set(), self.files())

    def test_discarding_what_was_kept_changes_nothing(self):
        writer = BlobWriter(self.store)
        digest = writer.keep(self.store.docker)
        writer.discard()
        self.assertEqual(0, self.store.docker.size(digest))

    def test_the_end_of_the_process(self):
        writer = BlobWriter(self.store)
        self.addCleanup(writer.discard)
        writer.write(b"half")
        kept = self.put(b"whole")
        self.store.close()
        self.assertEqual({f"blobs/sha256/{kept.hex}", f"docker/sha256/{kept.hex}"}, self.files())

    def test_the_same_blob_from_two_sides(self):
        threads = [threading.Thread(target=self.put, args=(b"x" * 100_000,)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        name = f"sha256/{Digest.of(b'x' * 100_000).hex}"
        self.assertEqual({f"blobs/{name}", f"docker/{name}"}, self.files())

    def test_a_place_that_cannot_be_written_to(self):
        self.root.write_bytes(b"a file")
        with self.assertRaises(RegistryError) as caught:
            BlobWriter(self.store)
        self.assertEqual("STORE_FAILED", caught.exception.code)
        self.assertIn(str(self.root), caught.exception.detail)


class TestExports(StoreCase):
    def export(self, image_id, *contents):
        digests = [self.put(data) for data in contents]
        self.store.record_export(image_id, digests[0], digests)
        return digests

    def test_recorded(self):
        target, *_ = self.export(IMAGE, b"manifest", b"config", b"layer")
        self.assertEqual(target, self.store.exported(IMAGE))
        self.assertIsNone(self.store.exported(OTHER))
        self.assertEqual(target, Store(self.root).exported(IMAGE), "in another process")

    def test_it_counts_only_while_it_is_whole(self):
        _, layer = self.export(IMAGE, b"manifest", b"layer")
        path = self.store.blob_path(layer)
        for what, damage in (("shorter", lambda: path.write_bytes(b"lay")), ("gone", path.unlink)):
            with self.subTest(what):
                damage()
                self.assertIsNone(self.store.exported(IMAGE))

    def test_broken_records(self):
        self.export(IMAGE, b"manifest")
        (path,) = self.root.glob("exports/*/*")
        for text in (b"", b"{", b"[]", b"{}", b'{"target": 1, "content": {}}', b'{"target": "sha256:x", "content": {}}',
                     b'{"target": "%s", "content": {"x": 1}}' % str(IMAGE).encode(), b"\xff"):
            with self.subTest(text):
                path.write_bytes(text)
                self.assertIsNone(self.store.exported(IMAGE))
                with self.assertLogs("k3d-registry-dockerd", "WARNING"):
                    self.store.evict(lambda _: True, NOW)

    def test_eviction(self):
        """Image in Docker?, seconds since the last use -> is it kept?"""
        for in_docker, age, kept in ((True, 10 * EVICTION_AGE, True), (False, EVICTION_AGE - 1, True),
                                     (False, EVICTION_AGE + 1, False)):
            with self.subTest(in_docker=in_docker, age=age):
                self.export(IMAGE, b"manifest", b"layer")
                self.age(age)
                freed = self.store.evict(lambda _, answer=in_docker: answer, NOW)
                self.assertEqual(0 if kept else len(b"manifestlayer"), freed)
                self.assertEqual(5 if kept else 0, len(self.files()))

    def test_what_another_export_needs_stays(self):
        self.export(IMAGE, b"manifest", b"shared")
        other = self.export(OTHER, b"other manifest", b"shared")
        self.age(10 * EVICTION_AGE)
        asked = []
        self.store.evict(lambda image_id: asked.append(image_id) or image_id == OTHER, NOW)
        self.assertEqual({IMAGE, OTHER}, set(asked))
        self.assertEqual(other[0], self.store.exported(OTHER))
        self.assertIsNone(self.store.docker.size(Digest.of(b"manifest")))

    def test_what_is_being_written_stays(self):
        """However long the writing takes; but not what a killed process left behind."""
        writer = BlobWriter(self.store)
        (self.root / "blobs/sha256/.left-behind").touch()
        self.age(10 * EVICTION_AGE)
        self.store.evict(lambda _: True, NOW)
        self.assertEqual({str(writer.path.relative_to(self.root))}, self.files())
        writer.discard()

    def test_what_was_adopted_a_moment_ago_stays(self):
        digest = self.put(b"content")
        self.age(10 * EVICTION_AGE)
        self.assertTrue(self.store.docker.adopt(digest))
        self.store.evict(lambda _: False, self.store.blob_path(digest).stat().st_mtime)
        self.assertEqual(7, self.store.docker.size(digest))
        self.assertFalse(self.store.docker.adopt(IMAGE))


if __name__ == "__main__":
    unittest.main()
