"""A bounded disk: the limit of the store, the space that stays free, and what is freed when there is no room."""

import contextlib
import errno
import http.client
import os
import tempfile
import threading
import time
import unittest
from pathlib import Path
from unittest import mock

from program import IN_MEMORY, takes_long
from test_damage import APP, CONFIG, LAYER, MANIFEST, ODD_TYPE, WHOLE, digest_of, push, state
from test_hosted import HostedProgram, module

KB = 1000


@contextlib.contextmanager
def failing(name, count, number):
    """Let the count-th call of a function of os fail during the `with`. Yields [how many calls are left until then]."""
    real, left = getattr(os, name), [count]

    def fail(*arguments, **more):
        left[0] -= 1
        if left[0] == 0:
            raise OSError(number, os.strerror(number))
        return real(*arguments, **more)

    with mock.patch.object(os, name, fail):
        yield left


class RoomCase(unittest.TestCase):
    def start(self, limit=None, store=None):
        program = HostedProgram(store, limit=limit)
        self.addCleanup(program.__exit__)
        self.store = program.hosted._store
        return program

    def files(self):
        return {path for path in self.store.root.rglob("*") if path.is_file()}

    def bytes(self):
        """The bytes of all files of the store. Each counts once, however many names it has."""
        return sum({path.stat().st_ino: path.stat().st_size for path in self.files()}.values())

    def put(self, program, data, repository="a/app", **headers):
        location = program.request("POST", f"/v2/{repository}/blobs/uploads/").headers["Location"]
        return program.request("PUT", f"{location}?digest={digest_of(data)}", headers, data)

    def copy_of_docker(self, data, age):
        """Keep something that can be had again, and was last used so many seconds ago."""
        with module.BlobWriter(self.store) as writer:
            writer.write(data)
            digest = writer.keep(self.store.docker)
        self.store.record_export(digest, digest, [digest])
        for folder in ("exports", "docker"):
            path = self.store.root / folder / digest.algorithm / digest.hex
            os.utime(path, (time.time() - age,) * 2)
        return digest


class TestLimit(RoomCase):
    def test_pushes_up_to_the_limit(self):
        program = self.start(limit=50 * KB)
        self.assertEqual({201}, push(program, "a/app"))
        self.assertEqual(201, self.put(program, b"x" * 30 * KB).status)
        before = self.files()
        for what, send in (
                ("in one request", lambda: self.put(program, b"y" * 20 * KB)),
                ("in one POST", lambda: program.request(
                    "POST", f"/v2/a/app/blobs/uploads/?digest={digest_of(b'y' * 20 * KB)}", body=b"y" * 20 * KB)),
                ("of unknown size", lambda: self.put_chunked(program, b"y" * 20 * KB)),
                ("a manifest", lambda: program.request("PUT", "/v2/a/app/manifests/large", {"Content-Type": ODD_TYPE},
                                                       b"{%s}" % (b" " * 20 * KB)))):
            with self.subTest(what):
                answer = send()
                self.assertEqual((507, "STORE_FULL"), (answer.status, answer.code), answer.body)
                self.assertIn("the limit of 50.0 kB", answer.detail)
                self.assertEqual([], [path for path in self.files() - before if path.stat().st_size])
        self.assertEqual(WHOLE, state(program, "a/app"))
        self.assertEqual(201, self.put(program, b"z" * KB).status)
        self.assertLessEqual(self.bytes(), 50 * KB)

    def test_limit_of_nothing(self):
        program = self.start(limit=0)
        answer = self.put(program, b"x")
        self.assertEqual((507, "STORE_FULL"), (answer.status, answer.code), answer.body)
        self.assertIn("the limit of 0 B", answer.detail)

    @staticmethod
    def put_chunked(program, data):
        location = program.request("POST", "/v2/a/app/blobs/uploads/").headers["Location"]
        return program.request("PUT", f"{location}?digest={digest_of(data)}", body=iter([data[:KB], data[KB:]]))

    def test_refused_before_the_bytes_are_sent(self):
        program = self.start(limit=50 * KB)
        location = program.request("POST", "/v2/a/app/blobs/uploads/").headers["Location"]
        for method in ("PATCH", "PUT"):
            with contextlib.closing(http.client.HTTPConnection("127.0.0.1", program.port, timeout=60)) as connection:
                connection.putrequest(method, f"{location}?digest={digest_of(b'')}")
                connection.putheader("Content-Length", str(10**9))
                connection.endheaders()
                self.assertEqual(507, connection.getresponse().status)

    def test_what_is_used_is_counted(self):
        """By a new process as well, and what is deleted, sent twice or given up does not count."""
        program = self.start(limit=130 * KB)
        for _ in range(5):
            self.assertEqual(201, self.put(program, b"x" * 60 * KB).status)
            self.assertEqual(201, self.put(program, b"x" * 60 * KB, "another").status)
            for repository in ("a/app", "another"):
                program.request("DELETE", f"/v2/{repository}/blobs/{digest_of(b'x' * 60 * KB)}")
            location = program.request("POST", "/v2/a/app/blobs/uploads/").headers["Location"]
            self.assertEqual(202, program.request("PATCH", location, body=b"y" * 60 * KB).status)
            self.assertEqual(204, program.request("DELETE", location).status)
            self.assertEqual(400, program.request("POST", f"/v2/a/app/blobs/uploads/?digest={digest_of(b'')}",
                                                  body=b"z" * 60 * KB).status)
            self.assertEqual(0, self.store.space.used)
        self.put(program, b"x" * 60 * KB)
        location = program.request("POST", "/v2/a/app/blobs/uploads/").headers["Location"]
        self.assertEqual(202, program.request("PATCH", location, body=b"y" * 30 * KB).status)
        self.assertEqual(90 * KB, self.store.space.used)
        again = self.start(limit=100 * KB, store=program.store)
        self.assertFalse(self.store.space.measured)
        self.assertEqual(507, self.put(again, b"z" * 20 * KB).status)
        self.assertEqual(90 * KB, self.store.space.used)
        self.assertEqual(201, self.put(again, b"z" * 5 * KB).status)

    def test_what_a_killed_process_left_does_not_count_any_more(self):
        program = self.start(limit=10 * KB)
        for folder, size in (("blobs/sha256", 8 * KB), ("blobs", 1 * KB), ("docker/sha256", 7 * KB)):
            path = self.store.root / folder / ".left"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(os.urandom(size))
            os.utime(path, (1, 1))
        self.store.measure()
        self.assertEqual(507, self.put(program, os.urandom(5 * KB)).status)
        self.store.tidy_up(lambda image_id: True, time.time())
        self.assertEqual(201, self.put(program, os.urandom(5 * KB)).status)
        self.assertEqual((5 * KB, 5 * KB), (self.store.space.used, self.bytes()))

    def test_what_can_be_had_again_goes_first(self):
        program = self.start(limit=100 * KB)
        old, older, recent = (self.copy_of_docker(data * 20 * KB, age) for data, age in (
            (b"o", 2 * module.SERVED_AGE), (b"r", 3 * module.SERVED_AGE), (b"n", 0)))
        pushed = self.copy_of_docker(b"p" * 20 * KB, 4 * module.SERVED_AGE)  # and it is pushed as well
        self.assertEqual(201, self.put(program, b"p" * 20 * KB).status)
        self.assertEqual(201, self.put(program, b"x" * 30 * KB).status)
        self.assertEqual([None] + 3 * [20 * KB], [self.store.docker.size(digest) for digest in (
            older, old, recent, pushed)])
        self.assertEqual(507, self.put(program, b"y" * 40 * KB).status)  # more than all that can go
        self.assertEqual(20 * KB, self.store.docker.size(old))
        self.assertEqual(201, self.put(program, b"y" * 30 * KB).status)
        self.assertEqual([None, 20 * KB], [self.store.docker.size(digest) for digest in (old, recent)])
        for data in (b"p" * 20 * KB, b"x" * 30 * KB):
            self.assertEqual(data, program.get(f"/v2/a/app/blobs/{digest_of(data)}").body)

    def test_content_of_several_images(self):
        """Content stays for as long as one image needs it that stays."""
        self.start(limit=100 * KB)
        shared = self.copy_of_docker(b"s" * 20 * KB, 3 * module.SERVED_AGE)
        image = module.Digest.of(b"another image")
        self.store.record_export(image, shared, [shared])
        self.assertEqual(shared, self.store.exported(image))
        self.store.check_room(100 * KB - 20 * KB)
        with self.assertRaises(module.RegistryError) as caught:
            self.store.check_room(90 * KB)
        self.assertEqual("STORE_FULL", caught.exception.code)
        self.assertEqual(20 * KB, self.store.docker.size(shared))

    def test_nothing_goes_for_what_never_fits(self):
        program = self.start(limit=100 * KB)
        copy = self.copy_of_docker(b"c" * 20 * KB, 2 * module.SERVED_AGE)
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", program.port, timeout=60)) as connection:
            connection.putrequest("POST", f"/v2/a/app/blobs/uploads/?digest={digest_of(b'')}")
            connection.putheader("Content-Length", str(10**15))
            connection.endheaders()
            self.assertEqual(507, connection.getresponse().status)
        self.assertEqual(20 * KB, self.store.docker.size(copy))

    def test_several_pushes_at_once(self):
        """What each of them has reserved counts, also while the store is measured."""
        self.start(limit=100 * KB)
        self.store.reserve(60 * KB)
        self.store.measure()
        with self.assertRaises(module.RegistryError):
            self.store.reserve(60 * KB)
        self.store.space.count(reserved=-60 * KB)
        self.store.reserve(60 * KB)
        free = self.store.space.available() - module.MINIMUM_FREE
        with mock.patch.object(self.store.space, "limit", None), self.assertRaises(module.RegistryError):
            self.store.reserve(free - 30 * KB)

    def test_what_never_fits_refuses_nothing_else(self):
        """A push that fits is taken while it is found out that another does not."""
        self.start(limit=100 * KB)
        real, others = self.store.docker.digests, []

        def digests():
            if not others:
                others.append(10 * KB)
                self.store.reserve(others[0])
            return real()

        with mock.patch.object(self.store.docker, "digests", digests), self.assertRaises(module.RegistryError):
            self.store.reserve(200 * KB)
        self.store.reserve(90 * KB)
        with self.assertRaises(module.RegistryError) as caught:
            self.store.reserve(1)
        self.assertIn("no room for 1 B", caught.exception.detail)

    def test_writes_while_the_store_is_measured_first(self):
        self.start(limit=100 * KB)
        real, threads = self.store.disk.files, []

        def files(*folders):
            yield from real(*folders)
            if not threads:
                threads.append(threading.Thread(target=self.copy_of_docker, args=(b"x" * KB, 0)))
                threads[0].start()
                threads[0].join(0.3)

        with mock.patch.object(self.store.disk, "files", files):
            self.store.measure()
        threads[0].join()
        self.assertEqual(KB, self.store.space.used)

    def test_what_fails_at_the_end_counts_as_long_as_it_is_there(self):
        self.start(limit=100 * KB)
        for name in ("link", "rename", "fsync"):
            for count in range(1, 10):
                with failing(name, count, errno.EIO), contextlib.suppress(module.RegistryError):
                    module.keep_content(self.store, name.encode() * count,
                                        module.Repository(self.store, "app").blobs)
                used = self.store.space.used
                self.store.measure()
                self.assertEqual(self.store.space.used, used, (name, count))

    def test_copies_are_refused_too(self):
        self.start(limit=10 * KB)
        with self.assertRaises(module.RegistryError) as caught:
            self.copy_of_docker(b"x" * 20 * KB, 0)
        self.assertEqual("STORE_FULL", caught.exception.code)
        self.assertEqual((set(), 0), (self.files(), self.store.space.used))


class TestFullDisk(RoomCase):
    def test_space_that_stays_free(self):
        program = self.start()
        self.assertEqual({201}, push(program, "a/app"))
        with mock.patch.object(module, "MINIMUM_FREE", 10**18):
            answer = self.put(program, b"x")
            self.assertEqual((507, "STORE_FULL"), (answer.status, answer.code))
            self.assertEqual(WHOLE, state(program, "a/app"))
        self.assertEqual(201, self.put(program, b"x").status)

    @takes_long
    def test_nothing_half_written_stays(self):
        """The disk is full at any call that writes."""
        for name in ("link", "rename", "mkdir", "fsync"):
            for count in range(1, 30):
                with self.subTest(name, count=count):
                    program = self.start()
                    with failing(name, count, errno.ENOSPC) as left:
                        push(program, "a/app")
                    if left[0] > 0:
                        break  # there were not so many calls
                    self.assertEqual([], [path for path in self.files() if path.name.startswith(".")])
                    self.assertEqual(set(), self.store.disk._unfinished)
                    self.assertEqual([], program.lines("a bug in this program"))
                    self.assertEqual({201}, push(program, "a/app"))
                    self.assertEqual(WHOLE, state(program, "a/app"))
                    program.hosted._store.measure()
                    self.assertEqual(len(APP) + len(CONFIG) + len(LAYER), self.store.space.used - sum(
                        path.stat().st_size for path in (self.store.root / "blobs/sha256").iterdir()
                        if path.stat().st_size < 500 and path.name not in map(self.hex, (APP, CONFIG, LAYER))))

    @staticmethod
    def hex(data):
        return digest_of(data).partition(":")[2]


class TestFailingDisk(RoomCase):
    def test_error_of_a_sync(self):
        """The system tells of it once. The push is not acknowledged then, and nothing of it is kept."""
        program = self.start()
        real, failed = os.fsync, []

        def fsync(descriptor):
            if not failed and os.fstat(descriptor).st_size == len(LAYER):
                failed.append(descriptor)
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return real(descriptor)

        with mock.patch.object(os, "fsync", fsync):
            location = program.request("POST", "/v2/a/app/blobs/uploads/").headers["Location"]
            statuses = [program.request("PATCH", location, body=LAYER).status,
                        program.request("PUT", f"{location}?digest={digest_of(LAYER)}").status]
        self.assertEqual([202, 500], statuses)
        self.assertEqual(404, program.head(f"/v2/a/app/blobs/{digest_of(LAYER)}").status)
        self.assertEqual({201}, push(program, "a/app"))


class TestUntagged(unittest.TestCase):
    """Manifests without a tag are freed by age, if that is wanted."""

    def test_use_and_loss_of_a_tag_begin_the_time(self):
        """Each row: what happens to a manifest a moment before the tidying, and whether it stays."""
        data = [module.json.dumps({"schemaVersion": 2, "mediaType": MANIFEST, "layers": [], "annotations": {
            "name": name}}).encode() for name in ("first", "second")]
        for what, stays in (("nothing", False), ("GET", True), ("moved", True), ("untagged", True)):
            with self.subTest(what), tempfile.TemporaryDirectory(dir=IN_MEMORY) as folder:
                program = HostedProgram(Path(folder) / "store", untagged=7 * 24 * 3600.0)
                self.addCleanup(program.__exit__)
                digest = module.Digest.parse(digest_of(data[0]))
                tag = "1" if what in ("moved", "untagged") else str(digest)
                path = f"/v2/app/manifests/{tag}"
                self.assertEqual(201, program.request("PUT", path, {"Content-Type": MANIFEST}, data[0]).status)
                for file in program.store.rglob("*"):
                    os.utime(file, (time.time() - 8 * 24 * 3600,) * 2)
                if what == "GET":
                    program.get(path)
                elif what == "moved":
                    program.request("PUT", path, {"Content-Type": MANIFEST}, data[1])
                elif what == "untagged":
                    program.request("DELETE", path)
                program.hosted.tidy_up(time.time())
                repository = program.hosted.repository("app")
                self.assertEqual(stays, repository.manifests.size(digest) is not None)

    def test_push_while_it_is_removed(self):
        """The push marks the manifest as used, and the removal looks again when the push is done."""
        with tempfile.TemporaryDirectory(dir=IN_MEMORY) as folder:
            store = module.Store(Path(folder) / "store")
            hosted = module.Hosted(store, 7 * 24 * 3600.0)
            repository = hosted.repository("app")
            manifest = module.Manifest.accept(b'{"schemaVersion": 2, "layers": []}', MANIFEST, "sha256")
            repository.put_manifest(manifest, ())
            for path in (Path(folder) / "store").rglob("*"):
                os.utime(path, (time.time() - 8 * 24 * 3600,) * 2)
            real = module.Repository._tagged_with

            def pushed_meanwhile(self, related):
                found = real(self, related)
                repository.put_manifest(manifest, ["1"])
                return found

            with mock.patch.object(module.Repository, "_tagged_with", pushed_meanwhile):
                hosted.tidy_up(time.time())
            self.assertEqual(manifest.digest, repository.tag("1"))

    def test_table(self):
        day = 24 * 3600.0
        with tempfile.TemporaryDirectory(dir=IN_MEMORY) as folder:
            with HostedProgram(Path(folder) / "store") as program:
                manifests = {}

                def put(name, target=None, **document):
                    data = module.json.dumps({"schemaVersion": 2, "mediaType": MANIFEST, "layers": [],
                                              "annotations": {"name": name}, **document}).encode()
                    manifests[name] = digest_of(data)
                    self.assertEqual(201, program.request("PUT", f"/v2/app/manifests/{target or manifests[name]}",
                                                          {"Content-Type": MANIFEST}, data).status)
                    return {"mediaType": MANIFEST, "digest": manifests[name], "size": len(data)}

                child, orphan, young = put("child"), put("orphan"), put("young")
                put("index", "1", manifests=[child])
                put("retagged", "2")
                put("tagged", "2")
                put("signature", subject=child)
                put("signature of a signature", subject=put("another signature", subject=child))
                put("signature of nothing", subject=orphan)
                put("index without a tag", manifests=[young])
            for path in (Path(folder) / "store").rglob("*"):
                os.utime(path, (time.time() - 8 * day,) * 2)
            kept = {"child", "index", "tagged", "signature", "another signature", "signature of a signature", "young"}
            store = module.Store(Path(folder) / "store")
            repository = module.Hosted(store).repository("app")
            repository.manifests.touch(module.Digest.parse(manifests["young"]))
            for age, expected in ((None, set(manifests)), (9 * day, set(manifests)), (7 * day, kept)):
                module.Hosted(store, age).tidy_up(time.time())
                self.assertEqual(expected, {name for name, digest in manifests.items() if repository.manifest(
                    module.Digest.parse(digest))}, age)


if __name__ == "__main__":
    unittest.main()
