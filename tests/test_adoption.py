"""Adoption: a pushed manifest brings what it refers to from Docker, so that it is complete without Docker."""

import json
import os
import threading
import unittest

import walk
from fake_daemon import OCI_INDEX, OCI_MANIFEST, FakeDaemon, Image, sha256, varint
from program import Program


def index_of(*manifests):
    """Return the bytes of an index of these manifests or indexes (bytes)."""
    return json.dumps({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [
        {"mediaType": json.loads(data)["mediaType"], "digest": sha256(data), "size": len(data)}
        for data in manifests]}).encode()


class AdoptionCase(unittest.TestCase):
    def setUp(self):
        self.daemon = FakeDaemon()
        self.daemon.__enter__()
        self.addCleanup(self.daemon.__exit__)
        self.program = Program(self.daemon.host)
        self.addCleanup(self.program.__exit__)

    def put(self, data, path="/v2/kept/manifests/1", status=201):
        answer = self.program.request("PUT", path, {"Content-Type": json.loads(data)["mediaType"]}, data)
        self.assertEqual(status, answer.status, answer.body)
        return answer

    def give(self, *contents):
        """Add content to Docker's content store."""
        self.daemon.content.update((sha256(data), data) for data in contents)

    def give_image(self, image):
        self.give(image.manifest, image.config, image.layer)

    def check_whole(self, sparse=()):
        """Check that everything hosted is complete without Docker."""
        self.assertEqual([], self.program.lines("a bug in this program"))
        self.program.stop()
        return walk.walk_without_docker(self.program.store, sparse=sparse)


class TestAdoption(AdoptionCase):
    def test_image(self):
        image = Image()
        self.give_image(image)
        self.put(image.manifest)
        self.assertEqual({"kept:1": image.digest}, {name: digest for name, digest in self.check_whole().items()
                                                    if name == "kept:1"})

    def test_nested_indexes(self):
        one, two = Image("one"), Image("two")
        for image in (one, two):
            self.give_image(image)
        inner = index_of(one.manifest, two.manifest)
        outer = index_of(inner, two.manifest)
        self.give(inner)
        self.put(outer)
        self.assertIn(f"kept@{one.digest}", self.check_whole())

    def test_second_push_adopts_missing_manifest(self):
        """A second push brings a manifest that was not available at the first one."""
        here, later = Image("here"), Image("later")
        self.give_image(here)
        inner = index_of(here.manifest, later.manifest)
        outer = index_of(inner)
        self.give(inner)
        self.put(outer)
        self.assertEqual(404, self.program.head(f"/v2/kept/manifests/{later.digest}").status)
        self.give_image(later)
        self.put(outer)
        self.assertIn(f"kept@{later.digest}", self.check_whole())

    def test_second_push_adopts_deleted_blob(self):
        image = Image()
        self.give_image(image)
        index = index_of(image.manifest)
        self.put(index)
        path = f"/v2/kept/blobs/{sha256(image.layer)}"
        self.assertEqual(202, self.program.request("DELETE", path).status)
        self.put(index)
        self.assertEqual(200, self.program.head(path).status)
        self.check_whole()

    def test_platform_with_missing_layers_is_not_kept(self):
        """Its manifest is not kept either, so every hosted image is complete."""
        whole, part = Image("whole"), Image("part")
        self.give_image(whole)
        self.give(part.manifest, part.config)
        self.put(index_of(whole.manifest, part.manifest))
        self.assertEqual(404, self.program.head(f"/v2/kept/manifests/{part.digest}").status)
        self.check_whole({part.digest})

    def test_missing_blob_is_404_and_keeps_nothing(self):
        image = Image()
        self.give(image.config)
        answer = self.put(image.manifest, status=404)
        self.assertEqual("MANIFEST_BLOB_UNKNOWN", answer.code)
        self.assertIn(sha256(image.layer), answer.detail)
        self.assertEqual([], [path for path in self.program.store.rglob("*") if path.is_file()])

    def test_content_of_other_repositories_is_not_adopted(self):
        """A client has to mount it."""
        image = Image()
        for blob in (image.config, image.layer):
            self.program.request("POST", f"/v2/other/blobs/uploads/?digest={sha256(blob)}", body=blob)
        self.assertEqual("MANIFEST_BLOB_UNKNOWN", self.put(image.manifest, status=404).code)

    def test_wrong_bytes_from_docker_are_502(self):
        image = Image()
        self.give(image.manifest, image.config)
        self.daemon.content[sha256(image.layer)] = os.urandom(len(image.layer))
        self.assertEqual("ENGINE_FAILED", self.put(image.manifest, status=502).code)
        self.assertEqual(404, self.program.head("/v2/kept/manifests/1").status)

    def test_config_with_urls_is_kept(self):
        image = Image()
        self.give_image(image)
        document = json.loads(image.manifest)
        document["config"]["urls"] = ["https://example.com/config"]
        self.put(json.dumps(document).encode())
        self.assertEqual(200, self.program.head(f"/v2/kept/blobs/{sha256(image.config)}").status)
        self.check_whole()

    def test_nondistributable_layers(self):
        """They are kept if Docker has them. Otherwise they may be missing."""
        image = Image()
        document = json.loads(image.manifest)
        for number, more in enumerate(({"urls": ["https://example.com/layer"]}, {
                "mediaType": "application/vnd.oci.image.layer.nondistributable.v1.tar"})):
            foreign = os.urandom(1000)
            layer = {"mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": sha256(foreign),
                     "size": len(foreign), **more}
            data = json.dumps({**document, "layers": [*document["layers"], layer]}).encode()
            self.give(image.config, image.layer)
            with self.subTest(more):
                self.put(data, f"/v2/without{number}/manifests/1")
                self.assertEqual(404, self.program.head(f"/v2/without{number}/blobs/{sha256(foreign)}").status)
                self.give(foreign)
                self.put(data, f"/v2/with{number}/manifests/1")
                self.assertEqual(200, self.program.head(f"/v2/with{number}/blobs/{sha256(foreign)}").status)
                del self.daemon.content[sha256(foreign)]

    def test_complete_push_does_not_need_docker(self):
        """A push whose content is all hosted works while Docker is down."""
        image = Image()
        for blob in (image.config, image.layer):
            self.program.request("POST", f"/v2/kept/blobs/uploads/?digest={sha256(blob)}", body=blob)
        self.daemon.faults[""] = lambda sock: b""
        self.put(image.manifest)
        self.check_whole()

    def test_index_of_hosted_layers_does_not_need_docker(self):
        """BuildKit's cache (--cache-to type=registry,image-manifest=false) is an index of layers."""
        layers = [b"one", b"two"]
        for layer in layers:
            self.program.request("POST", f"/v2/kept/blobs/uploads/?digest={sha256(layer)}", body=layer)
        self.daemon.faults[""] = lambda sock: b""
        self.put(json.dumps({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [
            {"mediaType": "application/vnd.oci.image.layer.v1.tar+gzip", "digest": sha256(layer), "size": len(layer)}
            for layer in layers]}).encode())

    def test_concurrent_pushes_share_one_copy(self):
        """Count the reads from Docker while the first one is held up."""
        image, go_on, asked = Image("x" * 100_000), threading.Event(), threading.Event()
        self.addCleanup(go_on.set)
        self.give_image(image)

        def hold(sock, stream, digest, part):
            if digest == sha256(image.layer):
                asked.set()
                go_on.wait(30)
            self.daemon.answer_call(sock, stream, b"\x12" + varint(len(part)) + part)

        self.daemon.reading = hold
        threads = [threading.Thread(target=self.put, args=(image.manifest, f"/v2/kept{i}/manifests/1"))
                   for i in range(5)]
        for thread in threads:
            thread.start()
        asked.wait(30)
        go_on.set()
        for thread in threads:
            thread.join(30)
        self.assertEqual(1, len(self.program.jobs("copy")) - 1, "the layer and the config, once each")
        self.check_whole()

    def test_failed_delete_exports_nothing(self):
        with FakeDaemon("classic") as daemon, Program(daemon.host) as program:
            image = daemon.add("app:1", Image())
            for path in (f"blobs/{sha256(image.layer)}", f"blobs/{sha256(b'nowhere')}", f"manifests/{image.digest}"):
                self.assertIn(program.request("DELETE", f"/v2/app/{path}").status, (404, 405))
            self.assertEqual([], program.jobs("export"))


class TestClassicDigests(unittest.TestCase):
    """On the classic store an image is found by its manifest's digest through an export."""

    def test_failed_export_does_not_hide_other_images(self):
        with FakeDaemon("classic") as daemon, Program(daemon.host) as program:
            broken, image = daemon.add("app:broken", Image("broken")), daemon.add("app:1", Image("whole"))
            daemon.exports[broken.config_digest] = b""
            for ns in ("", "?ns=docker.io"):
                with self.subTest(ns):
                    answer = program.get(f"/v2/library/app/manifests/{image.digest}{ns}")
                    self.assertEqual((200, image.manifest), (answer.status, answer.body))
        self.assertEqual(OCI_MANIFEST, json.loads(image.manifest)["mediaType"])


if __name__ == "__main__":
    unittest.main()
