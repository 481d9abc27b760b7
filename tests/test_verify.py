"""The subcommand verify: what it finds in a damaged store, and what it repairs."""

import json
import os
import shutil
import sys
import tempfile
import unittest
from pathlib import Path
from unittest import mock

import walk
from fake_daemon import OCI_MANIFEST, FakeDaemon, Image, http_answer, sha256
from fake_origin import INSECURE, Origin
from program import IN_MEMORY, MODULE, Program, run, takes_long
from test_damage import (
    DAMAGES,
    FILES,
    LAYER,
    WHOLE,
    DamageCase,
    HostedProgram,
    digest_of,
    hex_of,
    overwrite,
    push,
    state,
)

sys.path.insert(0, str(MODULE.parent))
import k3d_registry_dockerd as module


def verify(store, *arguments, docker_host="unix:///nowhere", **env):
    """Run the subcommand. Return its status, and what it printed; the log is not looked at."""
    result = run("verify", "-store", store, *arguments, DOCKER_HOST=docker_host, DOCKER_CONFIG="/nowhere", **env)
    assert "Traceback" not in result.stderr, result.stderr
    return result.returncode, result.stdout


class TestVerify(DamageCase):
    def files(self, store):
        return {(str(path), path.lstat().st_ino, path.lstat().st_size) for path in store.rglob("*")}

    def test_whole_store(self):
        for arguments in ((), ("-repair",)):
            store = self.copy()
            before = self.files(store)
            self.assertEqual((0, "the store is complete and undamaged\n"), verify(store, *arguments))
            self.assertEqual(before, self.files(store))

    def test_no_store(self):
        self.assertEqual((0, "the store is complete and undamaged\n"), verify("/tmp/there/is/no/such/store"))

    def test_files_that_are_no_tags(self):
        store = self.copy()
        for name in (b"\xff", b"x\ny", b"-x"):
            (store / "repositories/a/app/_tags" / os.fsdecode(name)).write_text(digest_of(b"nothing"))
        self.assertEqual((0, "the store is complete and undamaged\n"), verify(store))

    def test_text_from_outside_is_escaped(self):
        store = self.copy()
        DAMAGES["other bytes"](store / FILES["content"])
        with FakeDaemon() as daemon:
            daemon.faults = {"/version": http_answer(500, {"message": "boom\n\x1b[1m"})}
            status, output = verify(store, "-repair", docker_host=daemon.host)
        self.assertEqual(1, status)
        self.assertIn(r"boom\n\x1b[1m", output)
        self.assertNotIn("\x1b", output)

    def test_damage_is_named_and_nothing_is_changed(self):
        """Each row: a kind of file, a damage, what the result says."""
        blob, manifest = (f"a/app@{digest_of(data)} lacks {digest_of(LAYER)}" for data in (self.app(), b""))
        for kind, what, expected in (
                ("content", "other bytes", f"{FILES['content']} does not have the content of {digest_of(LAYER)}"),
                ("content", "cut short", f"{FILES['content']} does not have the content"),
                ("blob", "missing", blob), ("blob", "a folder", blob), ("blobs", "missing", blob),
                ("manifest", "other bytes", f"a/app has lost the manifest {digest_of(self.app())}"),
                ("manifest", "missing", f"a/app:1 names {digest_of(self.app())}, which is not there"),
                ("manifests", "missing", "a/app:odd names"), ("manifests", "a loop", "a/app:odd names")):
            with self.subTest(kind=kind, what=what):
                store = self.copy()
                DAMAGES[what](store / FILES[kind])
                before = self.files(store)
                status, output = verify(store)
                self.assertEqual(1, status)
                self.assertIn(expected, output)
                self.assertIn("the store has damaged or missing content", output)
                self.assertNotIn(manifest, output)
                self.assertEqual(before, self.files(store))

    @staticmethod
    def app():
        from test_damage import APP
        return APP

    def test_repair_from_another_copy(self):
        """One repository's link is a file of its own, as after a restore from a backup."""
        for kind in ("content", "manifest"):
            with self.subTest(kind):
                store = self.copy()
                good = store / FILES[kind].replace("blobs/", "repositories/b/_blobs/").replace("a/app", "b")
                shutil.copy(good, store / "copy")
                (store / "copy").replace(good)
                overwrite(b"\xff")(store / FILES[kind])
                self.assertEqual(1, verify(store)[0])
                status, output = verify(store, "-repair")
                self.assertEqual(0, status, output)
                self.assertIn("repaired", output)
                with HostedProgram(store) as program:
                    self.assertEqual((WHOLE, WHOLE), (state(program, "a/app"), state(program, "b")))

    def test_what_cannot_be_repaired_is_pushed_again(self):
        for kind in ("content", "manifest", "blob", "tag"):
            with self.subTest(kind):
                store = self.copy()
                (DAMAGES["missing"] if kind == "blob" else overwrite(b"\xff"))(store / FILES[kind])
                status, output = verify(store, "-repair")
                self.assertEqual(0 if kind == "tag" else 1, status, output)
                with HostedProgram(store) as program:
                    self.assertNotEqual(WHOLE, state(program, "a/app"))
                    push(program, "a/app")
                    push(program, "b")
                self.assertEqual((0, "the store is complete and undamaged\n"), verify(store))

    def test_damage_that_nobody_needs_is_moved_away(self):
        for make in (Path.mkdir, lambda path: path.write_bytes(b"something else")):
            store = self.copy()
            path = store / "blobs/sha256" / hex_of(b"extra")
            make(path)
            self.assertEqual(1, verify(store)[0])
            status, output = verify(store, "-repair")
            self.assertEqual(0, status, output)
            self.assertFalse(path.exists())
            self.assertTrue([*(store / "damaged").rglob(f"{path.name}*")])

    def test_damaged_copy_of_what_docker_has(self):
        """It can be had again, so nothing is lacking without it."""
        store = self.copy()
        paths = [store / owner / "sha256" / hex_of(b"extra") for owner in ("blobs", "docker")]
        paths[0].write_bytes(b"something else")
        paths[1].parent.mkdir(parents=True, exist_ok=True)
        os.link(*paths)
        self.assertEqual(1, verify(store)[0])
        status, output = verify(store, "-repair")
        self.assertEqual(0, status, output)
        self.assertEqual([False, False], [path.exists() for path in paths])

    def test_repair_is_for_verify(self):
        result = run("-repair")
        self.assertEqual(2, result.returncode)
        self.assertIn("unrecognized arguments: -repair", result.stderr)


class TestBesideAServer(unittest.TestCase):
    def test_manifest_that_is_deleted_meanwhile(self):
        folder = tempfile.TemporaryDirectory(dir=IN_MEMORY)
        self.addCleanup(folder.cleanup)
        store = module.Store(Path(folder.name))
        registry = module.Front(module.Hosted(store), module.Mirror(
            module.Engine(module.EngineHost(path="/nowhere")), store), store)
        repository, image, has_content, lines = registry.hosted.repository("app"), Image(), store.has_content, []
        digest = module.Digest.parse(image.digest)
        repository.put_manifest(module.Manifest(digest, OCI_MANIFEST, image.manifest), ["1"])

        def delete(path, *arguments):
            if path == repository.manifests.path(digest):
                self.assertTrue(repository.delete_manifest(digest))
            return has_content(path, *arguments)

        with mock.patch.object(store, "has_content", delete):
            self.assertTrue(module.Verification(store, registry, lines.append).run(repair=False))
        self.assertEqual([], lines)
        self.assertIsNone(repository.manifests.size(digest))


class TestRepairFromDocker(unittest.TestCase):
    def setUp(self):
        self.daemon = FakeDaemon()
        self.daemon.__enter__()
        self.addCleanup(self.daemon.__exit__)
        self.image = Image("x" * 5000)

    def push(self):
        """Let a client push an image that only Docker has."""
        program = Program(self.daemon.host)
        self.addCleanup(program.__exit__)
        answer = program.request("PUT", "/v2/kept/manifests/1", {"Content-Type": json.loads(
            self.image.manifest)["mediaType"]}, self.image.manifest)
        self.assertEqual(201, answer.status, answer.body)
        program.stop()
        return program.store

    def check(self, store, **env):
        self.assertEqual(1, verify(store, docker_host=self.daemon.host)[0])
        status, output = verify(store, "-repair", docker_host=self.daemon.host, **env)
        self.assertEqual(0, status, output)
        self.assertEqual((0, "the store is complete and undamaged\n"), verify(store))
        self.assertIn(f"kept@{self.image.digest}", walk.walk_without_docker(store))

    @takes_long
    def test_what_docker_has(self):
        self.daemon.content.update(self.image.blobs)
        for data in (self.image.layer, self.image.config, self.image.manifest):
            for damage in ("other bytes", "missing") if data != self.image.config else ("cut short",):
                with self.subTest(damage, data=data[:20]):
                    store = self.push()
                    for path in store.rglob(hex_of(data)):
                        if damage == "missing":
                            path.unlink()
                        elif path.parent.parent.name == "blobs":
                            DAMAGES[damage](path)
                    self.check(store)

    def test_what_a_registry_has(self):
        """Docker has the image by the name of its registry, and has lost the layer as well."""
        self.daemon.info = INSECURE
        with Origin(self.image) as origin:
            self.daemon.add(f"{origin.host}/team/app:1", self.image)
            store = self.push()
            layer = sha256(self.image.layer)
            del self.daemon.content[layer]
            DAMAGES["other bytes"](store / "blobs" / layer.replace(":", "/"))
            self.check(store, NO_PROXY="127.0.0.2", no_proxy="127.0.0.2")


if __name__ == "__main__":
    unittest.main()
