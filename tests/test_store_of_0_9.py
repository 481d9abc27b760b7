"""A store that version 0.9 wrote: all of its content is still served.

The store is recorded in data/store-0.9.tar.gz. Version 0.9 itself wrote it, by running this file:

    python tests/test_store_of_0_9.py record

record() lists its content. Do not record it again with a later version: the tests would no longer prove anything.
"""

import contextlib
import hashlib
import json
import os
import sys
import tarfile
import tempfile
import unittest
from pathlib import Path

from fake_daemon import OCI_INDEX, OCI_MANIFEST, FakeDaemon, Image, sha256
from fake_origin import INSECURE, Origin
from program import IN_MEMORY, Program

RECORDED = Path(__file__).resolve().parent / "data" / "store-0.9.tar.gz"
FOLDER = "store"

ONE, TWO, NESTED = Image("one"), Image("two"), Image("nested")
EXPORTED, FETCHED = Image("exported"), Image("fetched")
UPLOAD = bytes(range(256)) * 20
UPLOADED = 3000  # bytes of UPLOAD that had arrived

ODD_TYPE = "application/vnd.example.odd+json"
ODD = json.dumps({"entries": [1, 2, 3]}).encode()

LONG_LAYER, LONG_CONFIG = b"a layer with a sha512 digest", b"{}"


def sha512(data):
    return "sha512:" + hashlib.sha512(data).hexdigest()


def descriptor(data, media_type, digest=sha256):
    return {"mediaType": media_type, "digest": digest(data), "size": len(data)}


LONG = json.dumps({
    "schemaVersion": 2, "mediaType": OCI_MANIFEST,
    "config": descriptor(LONG_CONFIG, "application/vnd.oci.empty.v1+json"),
    "layers": [descriptor(LONG_LAYER, "application/octet-stream", sha512)]}).encode()

REFERRER = json.dumps({
    "schemaVersion": 2, "mediaType": OCI_MANIFEST, "artifactType": "application/vnd.example.signature",
    "config": descriptor(LONG_CONFIG, "application/vnd.oci.empty.v1+json"), "layers": [],
    "subject": descriptor(ONE.manifest, OCI_MANIFEST), "annotations": {"by": "somebody"}}).encode()

# Repository -> reference -> bytes and type of a manifest.
MANIFESTS = {
    "app": {"1": (ONE.manifest, OCI_MANIFEST), "2": (TWO.manifest, OCI_MANIFEST),
            "latest": (TWO.manifest, OCI_MANIFEST), ONE.digest: (ONE.manifest, OCI_MANIFEST),
            TWO.digest: (TWO.manifest, OCI_MANIFEST), sha256(REFERRER): (REFERRER, OCI_MANIFEST)},
    "app/nested/deeply": {"v1.0": (NESTED.manifest, OCI_MANIFEST), NESTED.digest: (NESTED.manifest, OCI_MANIFEST)},
    "artifacts/odd": {"odd": (ODD, ODD_TYPE), sha256(ODD): (ODD, ODD_TYPE)},
    "long/digests": {sha512(LONG): (LONG, OCI_MANIFEST)},
}
TAGS = {"app": ["1", "2", "latest"], "app/nested/deeply": ["v1.0"], "artifacts/odd": ["odd"], "long/digests": []}
# Repository -> digest -> bytes of a blob.
BLOBS = {
    "app": {sha256(blob): blob for image in (ONE, TWO) for blob in (image.layer, image.config)},
    "app/nested/deeply": {sha256(blob): blob for blob in (NESTED.layer, NESTED.config)},
    "long/digests": {sha256(LONG_CONFIG): LONG_CONFIG, sha512(LONG_LAYER): LONG_LAYER},
}


def record():
    """Let the program write the store, and pack it."""
    def must(status, answer):
        assert answer.status == status, (answer.status, answer.body)
        return answer

    def push(repository, reference, data, media_type, blobs=()):
        for digest, blob in blobs:
            must(201, program.request("POST", f"/v2/{repository}/blobs/uploads/?digest={digest}", {}, blob))
        must(201, program.request("PUT", f"/v2/{repository}/manifests/{reference}", {"Content-Type": media_type}, data))

    with tempfile.TemporaryDirectory(dir=IN_MEMORY) as folder, FakeDaemon("classic") as daemon, \
            Origin(FETCHED) as origin:
        daemon.info = INSECURE
        daemon.add("exported:1", EXPORTED)
        store = Path(folder) / FOLDER
        with Program(daemon.host, store=store, env={"NO_PROXY": "127.0.0.2"}) as program:
            program.wait_for_line("k3d-registry-dockerd 0.9,")
            push("app", "1", *MANIFESTS["app"]["1"], [(sha256(blob), blob) for blob in (ONE.layer, ONE.config)])
            push("app", "2", *MANIFESTS["app"]["2"], [(sha256(blob), blob) for blob in (TWO.layer, TWO.config)])
            push("app", "latest", *MANIFESTS["app"]["latest"])
            push("app", sha256(REFERRER), REFERRER, OCI_MANIFEST, [(sha256(LONG_CONFIG), LONG_CONFIG)])
            push("app/nested/deeply", "v1.0", *MANIFESTS["app/nested/deeply"]["v1.0"],
                 BLOBS["app/nested/deeply"].items())
            push("artifacts/odd", "odd", ODD, ODD_TYPE)
            push("long/digests", sha512(LONG), LONG, OCI_MANIFEST, BLOBS["long/digests"].items())
            location = must(202, program.request("POST", "/v2/unfinished/blobs/uploads/")).headers["Location"]
            must(202, program.request("PATCH", location, {}, UPLOAD[:UPLOADED]))
            must(200, program.get("/v2/library/exported/manifests/1?ns=docker.io"))
            must(200, program.get(f"/v2/fetched/manifests/{FETCHED.digest}?ns={origin.host}"))
            for blob in (FETCHED.layer, FETCHED.config):
                must(200, program.get(f"/v2/fetched/blobs/{sha256(blob)}?ns={origin.host}"))

        def anonymous(member):
            member.uid = member.gid = 0
            member.uname = member.gname = ""
            return member

        RECORDED.parent.mkdir(exist_ok=True)
        with tarfile.open(RECORDED, "w:gz") as archive:
            archive.add(store, FOLDER, filter=anonymous)


class TestStore(unittest.TestCase):
    def setUp(self):
        self.stack = contextlib.ExitStack()
        self.addCleanup(self.stack.close)
        folder = self.stack.enter_context(tempfile.TemporaryDirectory(dir=IN_MEMORY))
        with tarfile.open(RECORDED) as archive:
            archive.extractall(folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
        self.store = Path(folder) / FOLDER
        for path in self.store.rglob("*"):
            os.utime(path)  # the program would remove old content

    def start(self, docker_host):
        """Start the program on the store."""
        self.program = self.stack.enter_context(Program(docker_host, store=self.store))

    def start_with_docker(self):
        """Start the program on the store, with a Docker that has the exported image."""
        self.daemon = self.stack.enter_context(FakeDaemon("classic"))
        self.daemon.add("exported:1", EXPORTED)
        self.start(self.daemon.host)

    def tearDown(self):
        self.assertEqual([], self.program.lines("a bug in this program"))

    def ask(self, method, path, status, body=None):
        """Send one request and check its status."""
        answer = self.program.request(method, path, {}, body)
        self.assertEqual(status, answer.status, (method, path, answer.body))
        return answer

    def check_manifest(self, path, data, media_type, digest):
        """Check the exact bytes, the media type and the digest of a manifest, with GET and with HEAD."""
        for method in ("GET", "HEAD"):
            answer = self.ask(method, path, 200)
            self.assertEqual((data if method == "GET" else b"", media_type, digest, str(len(data))), (
                answer.body, *(answer.headers[name] for name in (
                    "Content-Type", "Docker-Content-Digest", "Content-Length"))))

    def check_not_hosted(self, path):
        """Check that this content is not hosted. Without Docker, the status may be 503."""
        self.assertIn(self.program.head(path).status, (404, 503))

    def check_pushed(self):
        """Check that everything pushed is served, and only in its own repository."""
        for repository, manifests in MANIFESTS.items():
            for reference, (data, media_type) in manifests.items():
                with self.subTest(repository=repository, reference=reference):
                    digest = reference if ":" in reference else sha256(data)
                    self.check_manifest(f"/v2/{repository}/manifests/{reference}", data, media_type, digest)
                    self.check_not_hosted(f"/v2/another/{repository}/manifests/{reference}")
        for repository, blobs in BLOBS.items():
            for digest, data in blobs.items():
                with self.subTest(repository=repository, blob=digest):
                    self.assertEqual(data, self.ask("GET", f"/v2/{repository}/blobs/{digest}", 200).body)
                    self.ask("HEAD", f"/v2/{repository}/blobs/{digest}", 200)
                    self.check_not_hosted(f"/v2/another/{repository}/blobs/{digest}")
        for repository, tags in TAGS.items():
            with self.subTest(repository=repository):
                self.assertEqual(tags, self.ask("GET", f"/v2/{repository}/tags/list", 200).json["tags"])
        with self.subTest("referrers"):
            found = self.ask("GET", f"/v2/app/referrers/{ONE.digest}", 200)
            self.assertEqual(OCI_INDEX, found.headers["Content-Type"])
            self.assertEqual([{**descriptor(REFERRER, OCI_MANIFEST), "annotations": {"by": "somebody"},
                               "artifactType": "application/vnd.example.signature"}], found.json["manifests"])

    def check_fetched(self, image, name):
        """Check that an image that was exported from Docker, or fetched from its registry, is served by digest."""
        self.check_manifest(f"/v2/{name}/manifests/{image.digest}?ns=registry.example", image.manifest, OCI_MANIFEST,
                            image.digest)
        for blob in (image.layer, image.config):
            self.assertEqual(blob, self.ask("GET", f"/v2/{name}/blobs/{sha256(blob)}?ns=registry.example", 200).body)

    def test_recorded_content(self):
        """The recording must have content of every kind, or the other tests prove nothing."""
        self.start("unix:///nowhere")
        for folder in ("blobs/sha512", "docker/sha256", "exports/sha256", "fetched/sha256", "repositories/app/_tags",
                       "repositories/app/nested/deeply/_manifests/sha256", "repositories/app/_referrers/sha256",
                       "repositories/artifacts/odd/_types/sha256", "repositories/unfinished/_uploads"):
            self.assertTrue(any((self.store / folder).iterdir()), folder)
        layer = self.store / "blobs" / sha256(ONE.layer).replace(":", "/")
        self.assertTrue(layer.samefile(self.store / "repositories/app/_blobs" / sha256(ONE.layer).replace(":", "/")))

    def test_without_docker(self):
        self.start("unix:///nowhere")
        self.check_pushed()
        self.check_fetched(EXPORTED, "exported")
        self.check_fetched(FETCHED, "fetched")

    def test_with_docker(self):
        self.start_with_docker()
        self.check_pushed()
        self.check_manifest("/v2/library/exported/manifests/1?ns=docker.io", EXPORTED.manifest, OCI_MANIFEST,
                            EXPORTED.digest)
        self.check_fetched(EXPORTED, "exported")
        self.check_fetched(FETCHED, "fetched")
        for request in ("/get ", "/images/create"):
            self.assertEqual([], [line for line in self.daemon.requests if request in line])

    def test_upload_continues(self):
        (path,) = (self.store / "repositories/unfinished/_uploads").iterdir()
        location = f"/v2/unfinished/blobs/uploads/{path.name}"
        for docker in (False, True):
            if docker:
                self.program.stop()
                self.start_with_docker()
            else:
                self.start("unix:///nowhere")
            answer = self.ask("GET", location, 204)
            self.assertEqual(f"0-{UPLOADED - 1}", answer.headers["Range"])
        digest = sha256(UPLOAD)
        self.ask("PATCH", location, 202, UPLOAD[UPLOADED:UPLOADED + 1000])
        self.ask("PUT", f"{location}?digest={digest}", 201, UPLOAD[UPLOADED + 1000:])
        self.assertEqual(UPLOAD, self.ask("GET", f"/v2/unfinished/blobs/{digest}", 200).body)

    def test_changes(self):
        """Tags can be moved. Deleted content is gone, and its file too unless another repository uses it."""
        self.start("unix:///nowhere")
        self.ask("PUT", "/v2/app/manifests/latest", 201, ONE.manifest)
        self.check_manifest("/v2/app/manifests/latest", ONE.manifest, OCI_MANIFEST, ONE.digest)
        self.ask("DELETE", f"/v2/app/manifests/{sha256(REFERRER)}", 202)
        self.assertEqual([], self.ask("GET", f"/v2/app/referrers/{ONE.digest}", 200).json["manifests"])
        self.ask("DELETE", "/v2/app/manifests/2", 202)
        self.assertEqual(["1", "latest"], self.ask("GET", "/v2/app/tags/list", 200).json["tags"])
        for digest, needed in ((sha256(TWO.layer), False), (sha256(LONG_CONFIG), True)):
            self.ask("DELETE", f"/v2/app/blobs/{digest}", 202)
            self.check_not_hosted(f"/v2/app/blobs/{digest}")
            self.assertEqual(needed, (self.store / "blobs" / digest.replace(":", "/")).exists())
        self.ask("GET", f"/v2/long/digests/blobs/{sha256(LONG_CONFIG)}", 200)

    def age(self, hours):
        """Make everything in the store older."""
        for path in {path.stat().st_ino: path for path in self.store.rglob("*")}.values():  # a file has several names
            old = path.stat().st_mtime - hours * 3600
            os.utime(path, (old, old))

    def test_use_extends_the_lifetime_of_fetched_content(self):
        """It is kept for a week after its last use."""
        for kept in (True, True, False):
            with self.subTest(kept=kept):
                self.age(hours=6 * 24 if kept else 8 * 24)
                self.start_with_docker()
                self.program.wait_for_line("store: tidied up")
                if kept:
                    self.check_fetched(FETCHED, "fetched")
                else:
                    self.ask("GET", f"/v2/fetched/blobs/{sha256(FETCHED.layer)}?ns=registry.example", 404)
                self.check_fetched(EXPORTED, "exported")
                self.program.stop()

    def test_old_content_is_removed(self):
        """Exported content that Docker no longer has is removed. Fetched content is kept longer."""
        self.age(hours=2)
        with FakeDaemon("classic") as daemon:  # without the exported image
            self.start(daemon.host)
            self.program.wait_for_line("store: tidied up")
            self.check_pushed()
            self.check_fetched(FETCHED, "fetched")
            self.ask("GET", f"/v2/exported/blobs/{sha256(EXPORTED.layer)}?ns=docker.io", 404)
            self.assertFalse((self.store / "blobs" / sha256(EXPORTED.layer).replace(":", "/")).exists())


if __name__ == "__main__":
    if sys.argv[1:] == ["record"]:
        record()
    else:
        unittest.main()
