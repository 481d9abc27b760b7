"""The store and the hosted registry, on our own disk."""

import errno
import json
import os
import shutil
import sys
import tempfile
import threading
import time
import unittest
from pathlib import Path
from unittest import mock

from program import IN_MEMORY, MODULE

sys.path.insert(0, str(MODULE.parent))
import k3d_registry_dockerd as module
from k3d_registry_dockerd import (
    EVICTION_AGE,
    FETCHED_AGE,
    UPLOAD_AGE,
    BlobWriter,
    Digest,
    Hosted,
    Links,
    Manifest,
    Reference,
    RegistryError,
    Store,
)

IMAGE, OTHER = Digest.of(b"image"), Digest.of(b"other image")
NOW = 2_000_000_000.0


class StoreCase(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory(dir=IN_MEMORY)
        self.addCleanup(folder.cleanup)
        self.root = Path(folder.name) / "store"
        self.store = Store(self.root)
        self.hosted = Hosted(self.store)

    def tidy_up(self, in_docker, now):
        """Tidy up as the program does; return the number of bytes that are freed."""
        def size():
            return sum(path.stat().st_size for path in self.root.glob("blobs/*/[0-9a-f]*"))
        before = size()
        self.hosted.tidy_up(now)
        self.store.tidy_up(in_docker, now)
        return before - size()

    def put(self, data):
        writer = BlobWriter(self.store)
        writer.write(data)
        return writer.keep(self.store.docker)

    def files(self):
        return {str(path.relative_to(self.root)) for path in self.root.rglob("*") if path.is_file()}

    def age(self, seconds):
        """Set the age of all files, relative to NOW."""
        for path in self.root.rglob("*"):
            os.utime(path, (NOW - seconds, NOW - seconds))


class TestBlobs(StoreCase):
    def test_no_files_before_the_first_write(self):
        self.assertIsNone(self.store.docker.size(IMAGE))
        self.assertIsNone(self.store.exported(IMAGE))
        self.assertFalse(self.root.exists())

    def test_keep(self):
        digest = self.put(b"content")
        self.assertEqual(Digest.of(b"content"), digest)
        self.assertEqual(b"content", self.store.blobs.path(digest).read_bytes())
        self.assertEqual({f"blobs/sha256/{digest.hex}", f"docker/sha256/{digest.hex}"}, self.files())

    def test_store_in_the_current_folder(self):
        self.root.mkdir()
        self.addCleanup(os.chdir, Path.cwd())
        os.chdir(self.root)
        self.store = Store(Path())
        self.assertEqual(7, self.store.docker.size(self.put(b"content")))

    def test_discard(self):
        writer = BlobWriter(self.store)
        writer.write(b"content")
        self.assertEqual(1, len(self.files()))
        self.assertIsNone(self.store.docker.size(Digest.of(b"content")), "named before it is complete")
        writer.discard()
        self.assertEqual(set(), self.files())

    def test_discard_after_keep_does_nothing(self):
        writer = BlobWriter(self.store)
        digest = writer.keep(self.store.docker)
        writer.discard()
        self.assertEqual(0, self.store.docker.size(digest))

    def test_close_removes_unfinished_blobs(self):
        writer = BlobWriter(self.store)
        self.addCleanup(writer.discard)
        writer.write(b"half")
        kept = self.put(b"whole")
        self.store.close()
        self.assertEqual({f"blobs/sha256/{kept.hex}", f"docker/sha256/{kept.hex}"}, self.files())

    def test_concurrent_writers_of_the_same_blob(self):
        threads = [threading.Thread(target=self.put, args=(b"x" * 100_000,)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        name = f"sha256/{Digest.of(b'x' * 100_000).hex}"
        self.assertEqual({f"blobs/{name}", f"docker/{name}"}, self.files())

    def test_unwritable_store(self):
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

    def test_record(self):
        target, *_ = self.export(IMAGE, b"manifest", b"config", b"layer")
        self.assertEqual(target, self.store.exported(IMAGE))
        self.assertIsNone(self.store.exported(OTHER))
        self.assertEqual(target, Store(self.root).exported(IMAGE), "another process must find it")

    def test_incomplete_export_is_ignored(self):
        _, layer = self.export(IMAGE, b"manifest", b"layer")
        path = self.store.blobs.path(layer)
        for what, damage in (("shorter", lambda: path.write_bytes(b"lay")), ("gone", path.unlink)):
            with self.subTest(what):
                damage()
                self.assertIsNone(self.store.exported(IMAGE))

    def test_malformed_records(self):
        self.export(IMAGE, b"manifest")
        (path,) = self.root.glob("exports/*/*")
        for text in (b"", b"{", b"[]", b"{}", b'{"target": 1, "content": {}}', b'{"target": "sha256:x", "content": {}}',
                     b'{"target": "%s", "content": {"x": 1}}' % str(IMAGE).encode(), b"\xff"):
            with self.subTest(text):
                path.write_bytes(text)
                store = Store(self.root)
                with self.assertLogs("k3d-registry-dockerd", "WARNING") as logs:
                    self.assertIsNone(store.exported(IMAGE))
                self.assertIn(f"{path} is damaged", logs.output[0])
                store.tidy_up(lambda _: True, NOW)

    def test_eviction(self):
        """Each row: is the image in Docker, the seconds since its last use, is the export kept."""
        for in_docker, age, kept in ((True, 10 * EVICTION_AGE, True), (False, EVICTION_AGE - 1, True),
                                     (False, EVICTION_AGE + 1, False)):
            with self.subTest(in_docker=in_docker, age=age):
                self.export(IMAGE, b"manifest", b"layer")
                self.age(age)
                freed = self.tidy_up(lambda _, answer=in_docker: answer, NOW)
                self.assertEqual(0 if kept else len(b"manifestlayer"), freed)
                self.assertEqual(5 if kept else 0, len(self.files()))

    def test_content_of_another_export_is_kept(self):
        self.export(IMAGE, b"manifest", b"shared")
        other = self.export(OTHER, b"other manifest", b"shared")
        self.age(10 * EVICTION_AGE)
        asked = []
        self.tidy_up(lambda image_id: asked.append(image_id) or image_id == OTHER, NOW)
        self.assertEqual({IMAGE, OTHER}, set(asked))
        self.assertEqual(other[0], self.store.exported(OTHER))
        self.assertIsNone(self.store.docker.size(Digest.of(b"manifest")))

    def test_unfinished_blob_is_kept(self):
        """It is kept however long the writing takes. What a killed process left behind is removed."""
        writer = BlobWriter(self.store)
        (self.root / "blobs/sha256/.left-behind").touch()
        self.age(10 * EVICTION_AGE)
        self.tidy_up(lambda _: True, NOW)
        self.assertEqual({str(writer.path.relative_to(self.root))}, self.files())
        writer.discard()

    def test_recently_adopted_content_is_kept(self):
        digest = self.put(b"content")
        self.age(10 * EVICTION_AGE)
        self.assertTrue(self.store.docker.adopt(digest))
        self.tidy_up(lambda _: False, self.store.blobs.path(digest).stat().st_mtime)
        self.assertEqual(7, self.store.docker.size(digest))
        self.assertFalse(self.store.docker.adopt(IMAGE))


class TestFetched(StoreCase):
    """What was fetched because Docker lacks it: no record of an export names it."""

    def test_content_in_use_is_kept(self):
        kept, gone = self.put(b"layer"), self.put(b"another")
        now = time.time()
        self.age(FETCHED_AGE + 60 + NOW - now)
        for digest in (kept, Digest.of(b"never fetched")):
            self.store.docker.touch(digest)
        self.assertEqual(len(b"another"), self.tidy_up(lambda _: False, now))
        self.assertEqual((5, None), (self.store.docker.size(kept), self.store.docker.size(gone)))

    def test_kept_longer_than_exports(self):
        digest = self.put(b"layer")
        self.age(FETCHED_AGE - 60)
        self.assertEqual(0, self.tidy_up(lambda _: False, NOW))
        self.assertEqual(5, self.store.docker.size(digest))


class TestLinks(StoreCase):
    def test_content_is_stored_once(self):
        digest = self.put(b"content")
        one, two = self.hosted.repository("one").blobs, self.hosted.repository("two").blobs
        self.assertTrue(one.adopt(digest))
        self.assertTrue(two.adopt(digest))
        self.assertTrue(two.adopt(digest), "adopting twice must succeed")
        inodes = {(self.root / name).stat().st_ino for name in self.files()}
        self.assertEqual((4, 1), (len(self.files()), len(inodes)))

    def test_freed_with_the_last_owner(self):
        digest = self.put(b"content")
        one = self.hosted.repository("one").blobs
        one.adopt(digest)
        self.assertTrue(self.store.docker.drop(digest))
        self.assertTrue(self.store.blobs.path(digest).exists())
        self.assertTrue(one.drop(digest))
        self.assertFalse(one.drop(digest))
        self.assertEqual(set(), self.files())
        self.assertFalse(one.adopt(digest))

    def test_truncated_blob_is_replaced(self):
        digest = self.put(b"content")
        self.store.blobs.path(digest).write_bytes(b"con")
        self.assertFalse(self.store.docker.adopt(digest, 7))
        self.put(b"content")
        self.assertEqual(b"content", self.store.docker.path(digest).read_bytes())
        self.assertEqual(b"content", self.store.blobs.path(digest).read_bytes())

    def test_concurrent_pushes_and_deletes(self):
        """A blob that was just pushed is readable, whatever other repositories do."""
        failures = []

        def work(name):
            links = self.hosted.repository(name).blobs
            for _ in range(50):
                with BlobWriter(self.store) as writer:
                    writer.write(b"shared by all")
                    digest = writer.keep(links)
                if links.path(digest).read_bytes() != b"shared by all":
                    failures.append(name)
                links.drop(digest)

        threads = [threading.Thread(target=work, args=(f"r{i}",)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual(([], set()), (failures, self.files()))

    def test_the_same_push_twice_at_once(self):
        """It is stored and counted once."""
        real, both = Links.adopt, threading.Barrier(2, timeout=60)

        def adopt(links, *arguments):
            found = real(links, *arguments)
            both.wait()
            return found

        def push(name):
            with BlobWriter(self.store) as writer:
                writer.write(b"shared")
                writer.keep(self.hosted.repository(name).blobs)

        threads = [threading.Thread(target=push, args=(name,)) for name in ("one", "two")]
        with mock.patch.object(Links, "adopt", adopt):
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        self.assertEqual(1, len({(self.root / name).stat().st_ino for name in self.files()}))
        self.assertEqual(6, self.store.space.used)

    def test_content_that_is_adopted_while_it_is_freed(self):
        """It is freed, or it belongs to its new owner and to the store."""
        digest = self.put(b"content")
        one, two = (self.hosted.repository(name).blobs for name in ("one", "two"))
        one.adopt(digest)
        self.store.docker.drop(digest)
        real, results = self.store.disk.remove, []
        thread = threading.Thread(target=lambda: results.append(two.adopt(digest)))

        def remove(path, *arguments):
            if path == self.store.blobs.path(digest):
                thread.start()
                thread.join(0.3)
            return real(path, *arguments)

        with mock.patch.object(self.store.disk, "remove", remove):
            one.drop(digest)
        thread.join()
        self.assertEqual(two.size(digest), self.store.blobs.size(digest))
        self.assertEqual((two.size(digest) or 0, two.size(digest) is not None), (self.store.space.used, results[0]))


def slow_reads(go_on, reads):
    """Hold up each read of a file during the `with`, until go_on is set, and note it in reads."""
    real = module.hash_file

    def slow(*arguments):
        reads.append(arguments)
        go_on.wait(60)
        return real(*arguments)

    return mock.patch.object(module, "hash_file", slow)


class TestVerified(StoreCase):
    """What was found to be in a file is remembered, so that it is read once."""

    def setUp(self):
        super().setUp()
        self.digest = self.put(b"content")
        self.links = self.hosted.repository("one").blobs
        self.assertTrue(self.links.adopt(self.digest))
        self.store._verified.clear()

    def replace(self):
        """Put good content in the place of the damaged one, as the push of another repository does."""
        with BlobWriter(self.store) as writer:
            writer.write(b"content")
            writer.keep(self.hosted.repository("two").blobs)

    def test_file_that_is_replaced_while_it_is_read(self):
        with open(self.store.blobs.path(self.digest), "r+b") as file:
            file.write(b"X")
        real = module.hash_file

        def slow(path, algorithm):
            found = real(path, algorithm)
            with mock.patch.object(module, "hash_file", real):
                self.store.add(self.new_file(), self.digest)
            return found

        with mock.patch.object(module, "hash_file", slow):
            self.links.find(self.digest)
        self.assertEqual(7, self.links.find(self.digest).size)
        self.assertTrue(self.hosted.repository("three").blobs.adopt(self.digest))

    def new_file(self):
        path = self.root / "blobs/sha256/.new"
        path.write_bytes(b"content")
        return path

    def test_use_is_no_change(self):
        reads, real = [], module.hash_file
        with mock.patch.object(module, "hash_file", lambda *arguments: reads.append(arguments) or real(*arguments)):
            for _ in range(100):
                self.links.touch(self.digest)
                self.assertEqual(7, self.links.find(self.digest).size)
        self.assertEqual((1, 1), (len(reads), len(self.store._verified)))

    def test_change_and_use_while_it_is_read(self):
        """What was read is not what is there now."""
        path, real = self.links.path(self.digest), module.hash_file
        os.utime(path, (1, 1))

        def slow(*arguments):
            found = real(*arguments)
            with open(path, "r+b") as file:
                file.write(b"X")
            self.links.touch(self.digest)
            return found

        with mock.patch.object(module, "hash_file", slow):
            self.links.find(self.digest)
        with self.assertLogs("k3d-registry-dockerd"):
            self.assertIsNone(self.links.find(self.digest))

    def test_use_by_another_request(self):
        """At any moment, it makes nobody read the content again."""
        self.assertEqual(7, self.links.find(self.digest).size)
        real, threads = module.Identity.of, []

        def of(path):
            found = real(path)
            if not threads:
                threads.append(threading.Thread(target=self.links.touch, args=(self.digest,)))
                threads[0].start()
                threads[0].join(0.3)
            return found

        with mock.patch.object(module.Identity, "of", of), mock.patch.object(module, "hash_file") as hash_file:
            self.links.find(self.digest)
            threads[0].join()
        hash_file.assert_not_called()

    def test_one_read_for_all_that_wait(self):
        """And none of them waits for longer than its deadline."""
        data = os.urandom(module.MANIFEST_LIMIT + 1)
        digest, go_on, reads = self.put(data), threading.Event(), []
        self.store._verified.clear()
        with slow_reads(go_on, reads):
            for _ in range(3):
                with self.assertRaises(RegistryError) as caught:
                    self.store.docker.find(digest, module.Deadline(0.1))
                self.assertEqual("UNAVAILABLE", caught.exception.code)
            go_on.set()
            self.assertEqual(len(data), self.store.docker.find(digest).size)
        self.assertEqual(1, len(reads))

    def test_use_while_it_is_read(self):
        """A client that comes again finds what has been read so far, and not a new beginning."""
        digest, go_on, reads = self.put(bytes(module.MANIFEST_LIMIT + 1)), threading.Event(), []
        self.links.adopt(digest)
        self.store._verified.clear()
        reference = Reference("one", digest)
        with slow_reads(go_on, reads):
            for _ in range(3):
                with self.assertRaises(RegistryError) as caught:
                    self.hosted.blob(reference, module.Deadline(0.1))
                self.assertEqual("UNAVAILABLE", caught.exception.code)
            with self.assertRaises(RegistryError) as caught:
                self.hosted.mount(Reference("two", digest), "one", module.Deadline(0.1))
            self.assertEqual("UNAVAILABLE", caught.exception.code)
            go_on.set()
            for _ in range(3):
                self.assertEqual(module.MANIFEST_LIMIT + 1, self.hosted.blob(reference).size)
        self.assertEqual(1, len(reads))


class TestRepository(StoreCase):
    def setUp(self):
        super().setUp()
        self.repository = self.hosted.repository("some/app")

    def push(self, *blobs, tags=("1",), **more):
        """Push a manifest with these blobs, some of which may exist already."""
        layers = []
        for data in blobs:
            with BlobWriter(self.store) as writer:
                writer.write(data)
                layers.append({"digest": str(writer.keep(self.repository.blobs)), "size": len(data)})
        data = json.dumps({"schemaVersion": 2, "layers": layers, **more}).encode()
        manifest = Manifest.accept(data, "application/vnd.oci.image.manifest.v1+json", "sha256")
        self.repository.put_manifest(manifest, tags)
        return manifest

    def test_repositories_are_separate(self):
        self.push()
        for name in ("some", "some/app/below", "some/application"):
            self.assertIsNone(self.hosted.repository(name).manifest("1"))
        self.hosted.repository("some").begin_upload()
        self.assertEqual(["some", "some/app"], self.hosted.names())

    def test_tag_without_manifest_is_ignored(self):
        manifest = self.push()
        self.assertEqual(manifest, self.repository.manifest("1"))
        self.repository.manifests.path(manifest.digest).unlink()
        self.assertEqual((None, None, []), (self.repository.manifest("1"), self.repository.tag("1"),
                                            list(self.repository.tags())))

    def test_push_and_delete_of_one_manifest_are_serialized(self):
        """The second operation starts in the middle of the first one. It waits, so the result is the second one's."""
        subject = {"mediaType": "application/json", "digest": str(OTHER), "size": 1}
        document = json.dumps({"schemaVersion": 2, "subject": subject})
        manifest = Manifest.accept(document.encode(), "application/x", "sha256")
        push = lambda: self.repository.put_manifest(manifest, ["1"])  # noqa: E731
        delete = lambda: self.repository.delete_manifest(manifest.digest)  # noqa: E731
        for first, second, owner, step, stays in ((push, delete, self.store.disk, "write", False),
                                                  (delete, push, Links, "drop", True)):
            with self.subTest(stays=stays):
                push()
                thread = threading.Thread(target=second)
                real = getattr(owner, step)

                def interrupted(*arguments, thread=thread, real=real):
                    if thread.ident is None:
                        thread.start()
                        thread.join(0.3)
                    return real(*arguments)

                with mock.patch.object(owner, step, interrupted):
                    first()
                thread.join()
                self.assertEqual(stays, self.repository.manifest("1") is not None)
                self.assertEqual(stays, bool(list(self.repository.referrers(OTHER))))
                self.assertEqual(["1"] if stays else [], list(self.repository.tags()))

    def test_interrupted_deletion(self):
        """The process is killed before the manifest is gone: its tags stay as well."""
        manifest = self.push(tags=("1", "2"))
        with mock.patch.object(Links, "drop", side_effect=RegistryError("STORE_FAILED", "killed")), \
                self.assertRaises(RegistryError):
            self.repository.delete_manifest(manifest.digest)
        self.tidy_up(lambda _: True, NOW)
        self.assertEqual(["1", "2"], list(self.repository.tags()))
        self.push(tags=("3",))
        self.assertEqual(["1", "2", "3"], list(self.repository.tags()))

    def test_foreign_files_are_left_alone(self):
        """The store may be a folder that holds other things, too."""
        self.push(b"content")
        for name in (".profile", "project/.git/config", ".cache/file"):
            path = self.root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        before = self.files()
        self.age(10 * FETCHED_AGE)
        self.tidy_up(lambda _: False, NOW)
        self.assertEqual(before, self.files())

    def test_malformed_tags_are_ignored(self):
        self.push()
        for text in ("", "nonsense", "sha256:..", str(IMAGE)):
            (self.repository.folder / "_tags/1").write_text(text)
            self.assertEqual([], list(self.repository.tags()))

    def test_nothing_is_freed_while_a_manifest_cannot_be_read(self):
        """Its blobs are not known then: a damaged file, or no descriptor left."""
        for what, damage in (("a folder", lambda path: (path.unlink(), path.mkdir())),
                             ("not JSON", lambda path: path.write_bytes(b"{")),
                             ("in no folder", lambda path: (shutil.rmtree(path.parent), path.parent.touch()))):
            with self.subTest(what), self.assertLogs("k3d-registry-dockerd", "WARNING"):
                damage(self.repository.manifests.path(self.push(b"needed").digest))
                self.age(UPLOAD_AGE + 1)
                self.tidy_up(lambda _: True, NOW)
            self.assertEqual(6, self.repository.blobs.size(Digest.of(b"needed")))
        with mock.patch.object(os, "scandir", side_effect=OSError(24, "Too many open files")), \
                self.assertRaises(RegistryError) as caught:
            list(self.repository.manifests.digests())
        self.assertEqual("STORE_FAILED", caught.exception.code)

    def test_unreferenced_blobs_are_removed(self):
        """They are kept for a while, because a push sends them before the manifest."""
        manifest = self.push(b"needed")
        with BlobWriter(self.store) as writer:
            writer.write(b"of no manifest")
            orphan = writer.keep(self.repository.blobs)
        self.age(UPLOAD_AGE - 1)
        self.assertEqual(0, self.tidy_up(lambda _: True, NOW))
        self.age(UPLOAD_AGE + 1)
        self.assertEqual(len(b"of no manifest"), self.tidy_up(lambda _: True, NOW))
        self.assertIsNone(self.repository.blobs.size(orphan))
        self.assertEqual(6, self.repository.blobs.size(Digest.of(b"needed")))
        self.repository.delete_manifest(manifest.digest)
        self.age(UPLOAD_AGE + 1)
        self.assertEqual(len(b"needed"), self.tidy_up(lambda _: True, NOW))
        self.assertEqual(set(), self.files())

    def test_layers_that_an_index_lists_are_kept(self):
        """BuildKit's cache is an index of layers, which are blobs."""
        image = self.push(b"one", b"two")
        cache = self.push(tags=["cache"], manifests=image.document["layers"])
        self.repository.delete_manifest(image.digest)
        self.age(UPLOAD_AGE + 1)
        self.tidy_up(lambda _: True, NOW)
        for layer in cache.listed("manifests"):
            self.assertEqual(3, self.repository.blobs.size(layer))

    def test_content_that_is_pushed_and_exported(self):
        self.push(b"shared")
        self.store.docker.adopt(Digest.of(b"shared"))
        self.age(10 * EVICTION_AGE)
        self.assertEqual(0, self.tidy_up(lambda _: False, NOW))
        self.assertIsNone(self.store.docker.size(Digest.of(b"shared")))
        self.assertEqual(6, self.repository.blobs.size(Digest.of(b"shared")))

    def test_abandoned_uploads_are_removed(self):
        session = self.repository.begin_upload()
        with self.repository.upload(session) as upload:
            upload.write(b"half")
        self.age(UPLOAD_AGE - 1)
        self.tidy_up(lambda _: True, NOW)
        with self.repository.upload(session) as upload:
            self.assertEqual(4, upload.size)
            self.age(UPLOAD_AGE + 1)
            self.tidy_up(lambda _: True, NOW)
            self.assertEqual(1, len(self.files()), "an upload in use is kept")
        self.tidy_up(lambda _: True, NOW)
        self.assertEqual((set(), {}), (self.files(), self.store.hashes))

    def test_push_for_which_no_descriptor_is_left(self):
        error = OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        with mock.patch("k3d_registry_dockerd.open", side_effect=error, create=True), \
                self.assertRaises(RegistryError) as caught:
            Hosted(self.store).push_blob(Reference("some/app", Digest.of(b"new")), 3, [b"new"])
        self.assertEqual(("STORE_FAILED", set()), (caught.exception.code, self.files()))

    def test_upload_continues_in_another_process(self):
        session = self.repository.begin_upload()
        store = self.store
        for piece in (b"one ", b"two ", b"three"):
            with Hosted(store).repository("some/app").upload(session) as upload:
                upload.write(piece)
            store = Store(self.root)  # which does not have the hash
        for algorithm in ("sha512", "sha256"):
            expected = Digest.of(b"one two three", algorithm)
            with Hosted(store).repository("some/app").upload(session) as upload:
                upload.keep(self.repository.blobs, expected)
            self.assertEqual(13, self.repository.blobs.size(expected))
            session = self.repository.begin_upload()
            with Hosted(store).repository("some/app").upload(session) as upload:
                upload.write(b"one two three")

    def test_upload_cannot_be_reused_after_kill(self):
        """The process was killed before it removed the upload. The session must not write to the finished blob."""
        session = self.repository.begin_upload()
        with self.repository.upload(session) as upload, mock.patch.object(self.store.disk, "end"):
            upload.write(b"content")
            upload.keep(self.repository.blobs)
        store = Store(self.root)
        with self.assertRaises(RegistryError) as caught, Hosted(store).repository("some/app").upload(session) as upload:
            upload.write(b"more")
        self.assertEqual("BLOB_UPLOAD_UNKNOWN", caught.exception.code)
        self.assertEqual(b"content", self.repository.blobs.path(Digest.of(b"content")).read_bytes())

    def test_one_writer_at_a_time(self):
        session = self.repository.begin_upload()
        with self.repository.upload(session), self.assertRaises(RegistryError) as caught, \
                self.repository.upload(session):
            pass
        self.assertEqual("UPLOAD_BUSY", caught.exception.code)
        with self.repository.upload(session):
            pass


if __name__ == "__main__":
    unittest.main()
