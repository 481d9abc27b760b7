"""Pushes by real clients, and pulls of the pushed images by a real node. lab.py says how to start the lab."""

import json
import os
import shutil
import signal
import unittest
import uuid

import lab
from program import Program
from test_engines import OCI_INDEX, sha256
from walk import walk_without_docker


def setUpModule():
    lab.require()


class PushCase(unittest.TestCase):
    """Each test has a new program in front of one engine, and a new repository name.

    After each test the program is stopped, and everything that was pushed must be available without Docker.
    """

    engine = lab.ENGINES["containerd"]
    sparse = ()  # digests that may be missing after a test
    checked = False

    def setUp(self):
        self.name = f"p{uuid.uuid4().hex[:10]}"
        self.images = []
        self.addCleanup(lambda: self.engine.remove(*self.images))
        lab.NODE.forget()
        self.program = Program(f"unix://{self.engine.socket}")
        self.addCleanup(self.program.__exit__)
        self.target = f"{self.program.address}/{self.name}"
        self.folder = lab.SHARE / self.name
        self.folder.mkdir()
        self.addCleanup(shutil.rmtree, self.folder, ignore_errors=True)

    def tearDown(self):
        self.assertEqual([], self.program.lines("a bug in this program"))
        if not self.checked:
            self.check_without_docker()

    def check_without_docker(self, expected=None, how=signal.SIGTERM):
        """Stop the program, and fetch everything in its store from another program that has no Docker."""
        self.checked = True
        self.program.stop(how)
        return walk_without_docker(self.program.store, expected, self.sparse)

    def build(self, tag, *options, files=None):
        image = f"{self.target}:{tag}"
        self.images.append(image)
        files = files or {"data": os.urandom(300_000), "hello": uuid.uuid4().bytes}
        self.engine.build(image, files, "base:1", *options)
        return image

    def digest(self, reference="1"):
        return self.program.head(f"/v2/{self.name}/manifests/{reference}").headers["Docker-Content-Digest"]

    def pull_everywhere(self, tag="1"):
        """Pull the image on a node by each name that it may use for this registry; check that the digests are equal."""
        digest = self.digest(tag)
        port = self.program.port
        for host in (self.program.address, f"localhost:{port}", "localhost:12345", "127.0.0.1:12345"):
            with self.subTest(host):
                lab.NODE.forget()
                reference = f"{host}/{self.name}:{tag}"
                lab.NODE.pull(reference, self.program.address)
                self.assertEqual(digest, lab.NODE.digest(reference))
        return digest

    def run_client(self, *command, **options):
        return lab.chroot(*command, **options).stdout.strip()


class DockerPush:
    """`docker push`, with either image store."""

    def test_push_and_pull(self):
        image = self.build("1")
        out = self.engine.docker("push", image)
        self.assertIn(self.digest(), out)
        self.engine.remove(image)
        self.pull_everywhere()
        self.program.wait_for_line("PUT /v2/")
        self.assertEqual([], self.program.lines(" ERROR "))

    def test_push_again_and_second_tag(self):
        image = self.build("1")
        self.engine.docker("push", image)
        first = self.digest()
        self.engine.docker("push", image)
        self.assertEqual(first, self.digest())
        second = f"{self.target}:2"
        self.images.append(second)
        self.engine.docker("tag", image, second)
        self.engine.docker("push", second)
        self.assertEqual(first, self.digest("2"))
        self.engine.docker("push", self.build("1"))
        self.assertNotEqual(first, self.digest())
        self.assertEqual(["1", "2"], self.program.get(f"/v2/{self.name}/tags/list").json["tags"])

    def test_tls_probe_logs_no_warning(self):
        self.engine.docker("push", self.build("1"))
        self.assertEqual([], [line for line in self.program.log if "TLS" in line or "x16" in line])

    def test_docker_pulls_pushed_image(self):
        image = self.build("1")
        self.engine.docker("push", image)
        identity = self.engine.inspect(image)["Id"]
        self.engine.remove(image)
        self.engine.docker("pull", image)
        self.assertEqual(identity, self.engine.inspect(image)["Id"])

    def test_images_remain_after_restart_without_docker(self):
        image = self.build("1")
        self.engine.docker("push", image)
        digest = self.digest()
        self.engine.remove(image)
        self.program.stop()
        self.program = Program("unix:///nowhere", store=self.program.store)
        self.addCleanup(self.program.__exit__)
        reference = f"{self.program.address}/{self.name}:1"
        lab.NODE.pull(reference, self.program.address)
        self.assertEqual(digest, lab.NODE.digest(reference))

    def test_images_remain_after_kill(self):
        """The program is killed as soon as the client reports success."""
        image = self.build("1")
        self.engine.docker("tag", image, f"{self.target}:2")
        self.images.append(f"{self.target}:2")
        out = self.engine.docker("push", "--all-tags", self.target)
        walked = self.check_without_docker(how=signal.SIGKILL)
        for tag in "12":
            self.assertIn(walked[f"{self.name}:{tag}"], out)


class TestDockerPushContainerd(DockerPush, PushCase):
    engine = lab.ENGINES["containerd"]

    def test_buildx(self):
        """buildx pushes an index with an attestation, without using the image store."""
        context = lab.tar_of({"Dockerfile": b"FROM base:1\nCOPY data /data\n", "data": os.urandom(100_000)})
        self.engine.docker("buildx", "build", "--push", "--provenance=mode=max", "-t", f"{self.target}:1", "-",
                           input=context, text=False)
        self.engine.remove(f"{self.target}:1")
        answer = self.program.get(f"/v2/{self.name}/manifests/1")
        self.assertEqual(OCI_INDEX, answer.headers["Content-Type"])
        for child in answer.json["manifests"]:
            self.assertEqual(child["digest"], self.digest(child["digest"]))
        self.pull_everywhere()


class TestDockerPushContainerd26(DockerPush, PushCase):
    engine = lab.ENGINES["containerd-26"]


class TestDockerPushClassic(DockerPush, PushCase):
    engine = lab.ENGINES["classic"]


class TestDockerPushClassic20(DockerPush, PushCase):
    engine = lab.ENGINES["classic-20"]


class TestCrane(PushCase):
    engine = lab.ENGINES["containerd-26"]

    def crane(self, command, *arguments):
        return self.run_client("crane", *command.split(), "--insecure", *arguments)

    def source(self):
        """Return the name of an image on another registry."""
        self.engine.docker("tag", self.build("source"), f"{self.name}:source")
        self.images.append(f"{self.name}:source")
        lab.ORIGINS["open"].push(self.engine, f"{self.name}:source", f"lab/{self.name}:1")
        return f"{lab.ORIGINS['open'].host}/lab/{self.name}:1"

    def test_copy_validate_digest_ls_catalog(self):
        source = self.source()
        self.crane("copy", source, f"{self.target}:1")
        self.assertEqual(self.crane("digest", source), self.crane("digest", f"{self.target}:1"))
        self.crane("validate --platform linux/amd64 --fast", "--remote", f"{self.target}:1")
        self.assertIn("1", self.crane("ls", self.target).split())
        self.assertIn(self.name, self.crane("catalog", self.program.address).split())
        self.pull_everywhere()

    def test_push_mutate_append_delete(self):
        source = self.source()
        layout = f"/lab/{self.name}/image.tar"
        self.crane("pull", source, layout)
        self.crane("push", layout, f"{self.target}:1")
        mutated = self.crane("mutate --label a=b", "-t", f"{self.target}:2", f"{self.target}:1")
        self.assertEqual(mutated.rpartition("@")[2], self.digest("2"))
        index = self.crane("index append", "-t", f"{self.target}:both", "-m", f"{self.target}:1",
                           "-m", f"{self.target}:2")
        self.assertEqual(index.rpartition("@")[2], self.digest("both"))
        manifest = self.program.get(f"/v2/{self.name}/manifests/both").json
        self.assertEqual({self.digest("1"), self.digest("2")}, {child["digest"] for child in manifest["manifests"]})
        self.pull_everywhere("2")
        self.sparse = (self.digest("2"),)  # the index lists it, but does not prevent its deletion
        self.crane("delete", f"{self.target}@{self.digest('2')}")
        self.assertEqual(404, self.program.head(f"/v2/{self.name}/manifests/2").status)
        self.assertEqual({"1", "both"}, set(self.crane("ls", self.target).split()) - {"source"})

    def test_copy_between_repositories_mounts(self):
        self.crane("copy", self.source(), f"{self.target}:1")
        patches = len(self.program.lines("PATCH "))
        self.crane("copy", f"{self.target}:1", f"{self.program.address}/other/{self.name}:1")
        self.assertEqual(patches, len(self.program.lines("PATCH ")), "no blob is uploaded again")
        self.assertEqual(self.digest(), self.program.head(f"/v2/other/{self.name}/manifests/1").headers[
            "Docker-Content-Digest"])


class TestSkopeo(PushCase):
    engine = lab.ENGINES["containerd-26"]

    def skopeo(self, *arguments):
        return self.run_client("skopeo", *arguments)

    def test_copy_both_ways_list_and_delete(self):
        image = self.build("local")
        self.engine.docker("save", "-o", f"/lab/{self.name}/image.tar", image)
        self.skopeo("copy", "--dest-tls-verify=false", f"docker-archive:/lab/{self.name}/image.tar",
                    f"docker://{self.target}:1")
        self.pull_everywhere()
        self.skopeo("copy", "--src-tls-verify=false", f"docker://{self.target}:1", f"oci:/lab/{self.name}/layout:1")
        index = json.loads((self.folder / "layout/index.json").read_text())
        self.assertTrue(index["manifests"])
        self.skopeo("copy", "--dest-tls-verify=false", f"oci:/lab/{self.name}/layout:1", f"docker://{self.target}:2")
        self.assertEqual(self.digest("2"), index["manifests"][0]["digest"])
        listed = json.loads(self.skopeo("list-tags", "--tls-verify=false", f"docker://{self.target}"))
        self.assertEqual(["1", "2", "local"], listed["Tags"], "hosted tags, and Docker's")
        self.skopeo("delete", "--tls-verify=false", f"docker://{self.target}:2")
        self.assertEqual(404, self.program.head(f"/v2/{self.name}/manifests/2").status)


class TestOras(PushCase):
    engine = lab.ENGINES["mirrors"]

    def oras(self, command, *arguments):
        return self.run_client("oras", *command.split(), "--plain-http", *arguments)

    def setUp(self):
        super().setUp()
        self.data = os.urandom(2_000_000)
        (self.folder / "data.bin").write_bytes(self.data)
        (self.folder / "note.txt").write_text("a note")

    def in_folder(self, command):
        return self.run_client("sh", "-c", f"cd /lab/{self.name} && {command}")

    def test_push_attach_discover_pull(self):
        self.in_folder(f"oras push --plain-http {self.target}:1 --artifact-type application/vnd.lab.thing data.bin")
        self.in_folder(f"oras attach --plain-http {self.target}:1 --artifact-type application/vnd.lab.note note.txt")
        found = json.loads(self.oras("discover", "--format", "json", f"{self.target}:1"))
        referrers = found.get("referrers") or found["manifests"]
        self.assertEqual(["application/vnd.lab.note"], [referrer["artifactType"] for referrer in referrers])
        none = self.oras("discover --format json --artifact-type application/vnd.lab.other", f"{self.target}:1")
        self.assertNotIn("vnd.lab.note", none)
        self.in_folder(f"mkdir back && cd back && oras pull --plain-http {self.target}:1")
        self.assertEqual(self.data, (self.folder / "back/data.bin").read_bytes())
        self.oras("manifest delete --force", f"{self.target}@{referrers[0]['digest']}")
        self.assertNotIn("vnd.lab.note", self.oras("discover --format json", f"{self.target}:1"))

    def test_interrupted_push_is_resumed(self):
        """The program is killed in the middle of a blob. After a restart the same session continues."""
        upload = self.program.request("POST", f"/v2/{self.name}/blobs/uploads/")
        location = upload.headers["Location"]
        half = len(self.data) // 2
        self.program.request("PATCH", location, body=self.data[:half])
        self.program.stop(how=9)
        self.program = Program(f"unix://{self.engine.socket}", store=self.program.store)
        self.addCleanup(self.program.__exit__)
        status = self.program.get(location)
        self.assertEqual((204, f"0-{half - 1}"), (status.status, status.headers["Range"]))
        last = self.program.request("PUT", f"{location}?digest={sha256(self.data)}", body=self.data[half:])
        self.assertEqual(201, last.status)
        target = f"{self.program.address}/{self.name}"
        self.in_folder(f"oras push --plain-http {target}:1 data.bin")
        self.program.wait_for_line(f"HEAD /v2/{self.name}/blobs/{sha256(self.data)} 200")


if __name__ == "__main__":
    unittest.main()
