"""Real engines in other setups: with mirrors, Podman, behind a socket proxy, with images that are hard to export."""

import hashlib
import json
import unittest
import uuid

import lab
from program import Program
from test_engines import EngineCase, sha256

PULL_TIMEOUT = 60  # seconds; a pull of these images takes less than a second


def setUpModule():
    lab.require()


class OtherEngineCase(EngineCase):
    """Common to the tests of this module."""

    def check_image(self, program, path):
        """Get an image of one platform with all its blobs from the program. Returns its manifest and its config."""
        answer = program.get(path)
        self.assertEqual(200, answer.status, answer.body)
        self.assertEqual(answer.headers["Docker-Content-Digest"], sha256(answer.body))
        manifest = answer.json
        base, query = path.split("/manifests/")[0], path.partition("?")[2]
        blobs = {}
        for descriptor in [manifest["config"], *manifest["layers"]]:
            blob = program.get(f"{base}/blobs/{descriptor['digest']}?{query}")
            self.assertEqual(200, blob.status, blob.body)
            self.assertEqual((descriptor["digest"], descriptor["size"]), (sha256(blob.body), len(blob.body)))
            blobs[descriptor["digest"]] = blob.body
        return manifest, json.loads(blobs[manifest["config"]["digest"]])


class Mirrors(OtherEngineCase):
    """An engine that uses this program as its first mirror of Docker Hub, and another registry as its second.

    The program must not make Docker pull what Docker is requesting from it: each would wait for the other.
    """

    engine = lab.ENGINES["mirrors"]

    def setUp(self):
        super().setUp()
        self.digest = self.put_on_origin()
        self.images += [f"{self.name}:1", f"{self.name}@{self.digest}"]
        self.mirror = self.program(address=lab.FIRST_MIRROR)

    def put_on_origin(self):
        """Put another image under tag 1 on the second mirror; return its digest."""
        files = [("id", uuid.uuid4().bytes)]
        digest, _ = lab.push_platforms(lab.ORIGINS["open"], f"library/{self.name}", "1", ["amd64"], files)
        return digest

    def docker_pull(self, reference):
        """Run `docker pull`. The status is 124 if it does not end in time."""
        return lab.chroot("timeout", PULL_TIMEOUT, "docker", "-H", self.engine.host, "pull", reference, check=False)

    def check_mirror(self, hops):
        """Check that the program answered Docker's own requests with 404, and no request with 408.

        hops is the number of requests that did not come from Docker; they may have been answered with 200.
        """
        lines = self.mirror.lines(f"/v2/library/{self.name}/")
        self.assertEqual([], [line for line in lines if " 408 " in line])
        others = [line for line in lines if " 404 " not in line]
        self.assertLessEqual(len(others), hops, "\n".join(self.mirror.log))

    def test_docker_pull_by_tag(self):
        result = self.docker_pull(f"{self.name}:1")
        self.assertEqual(0, result.returncode, (result.stderr, self.mirror.log))
        self.assertEqual(self.digest, self.engine.inspect(f"{self.name}:1")["Id"])
        self.check_mirror(0)
        self.assertEqual([], self.mirror.jobs("pull"))

    def test_docker_pull_by_digest(self):
        result = self.docker_pull(f"{self.name}@{self.digest}")
        self.assertEqual(0, result.returncode, (result.stderr, self.mirror.log))
        self.assertEqual(self.digest, self.engine.inspect(f"{self.name}@{self.digest}")["Id"])
        self.check_mirror(0)
        self.assertEqual([], self.mirror.jobs("pull"))

    def test_program_pulls_by_tag(self):
        answer = self.mirror.get(self.manifest_path("1"))
        self.assertEqual((200, self.digest), (answer.status, answer.headers["Docker-Content-Digest"]), self.mirror.log)
        self.check_mirror(1)

    def test_program_pulls_by_digest(self):
        answer = self.mirror.get(self.manifest_path(self.digest))
        self.assertEqual((200, self.digest), (answer.status, sha256(answer.body)), self.mirror.log)
        self.check_mirror(1)

    def test_missing_image(self):
        name = f"{self.name}-missing"
        result = self.docker_pull(f"{name}:1")
        self.assertNotIn(result.returncode, (0, 124), "the pull must fail without a timeout")
        lines = self.mirror.lines(f"/v2/library/{name}/")
        self.assertTrue(lines)
        self.assertEqual([], [line for line in lines if " 404 " not in line])

    def test_node_pull(self):
        reference = f"docker.io/library/{self.name}:1"
        self.pull(self.mirror, reference)
        self.assertEqual(self.digest, lab.NODE.digest(reference))
        self.assertEqual([], self.mirror.lines(" 408 "))

    def test_docker_pull_of_moved_tag(self):
        """The program must not tell Docker that Docker's own image is the latest one."""
        self.assertEqual(0, self.docker_pull(f"{self.name}:1").returncode, self.mirror.log)
        moved = self.put_on_origin()
        self.assertEqual(0, self.docker_pull(f"{self.name}:1").returncode, self.mirror.log)
        self.assertEqual(moved, self.engine.inspect(f"{self.name}:1")["Id"])


class Podman(OtherEngineCase):
    """Podman's service. Its exports are docker-archives, and an image built as NAME is called localhost/NAME."""

    engine = lab.ENGINES["podman"]

    def build(self, *arguments, **options):
        image_id = super().build(*arguments, **options)
        self.images = [f"localhost/{image}" if "/" not in image else image for image in self.images]
        return image_id

    def check_on_node(self, reference, image_id):
        """Check that the image on the node is the one that Podman has."""
        manifest = json.loads(lab.NODE.content(lab.NODE.digest(reference)))
        self.assertEqual(image_id.removeprefix("sha256:"), manifest["config"]["digest"].removeprefix("sha256:"))
        for descriptor in [manifest["config"], *manifest["layers"]]:
            self.assertEqual(descriptor["digest"], sha256(lab.NODE.content(descriptor["digest"])))

    def test_image_without_host(self):
        image_id = self.build()
        self.assertEqual([f"localhost/{self.name}:1"], self.engine.inspect(f"localhost/{self.name}:1")["RepoTags"])
        program = self.program()
        reference = f"docker.io/library/{self.name}:1"
        self.pull(program, reference)
        self.check_on_node(reference, image_id)
        self.check_image(program, self.manifest_path("1"))
        self.assertEqual([], program.jobs("pull"))

    def test_image_without_host_by_path_and_by_localhost(self):
        self.build()
        program = self.program()
        expected = program.get(f"/v2/{self.name}/manifests/1?ns=localhost").headers["Docker-Content-Digest"]
        self.assertIsNotNone(expected)
        for path in (f"/v2/{self.name}/manifests/1", f"/v2/library/{self.name}/manifests/1", self.manifest_path("1")):
            with self.subTest(path):
                self.assertEqual(expected, program.get(path).headers["Docker-Content-Digest"])

    def test_imported_image_without_host(self):
        self.engine.podman("import", "-", f"{self.name}:1", input=lab.tar_of({"id": uuid.uuid4().bytes}), text=False)
        self.images.append(f"localhost/{self.name}:1")
        program = self.program()
        reference = f"docker.io/library/{self.name}:1"
        self.pull(program, reference)
        self.check_on_node(reference, self.engine.inspect(f"localhost/{self.name}:1")["Id"])
        self.assertIn("Podman ", program.get(f"/v2/{self.name}/manifests/2?ns=localhost").detail)

    def test_docker_hub_image_precedes_localhost_image(self):
        self.build()
        hub = f"docker.io/library/{self.name}:1"
        self.engine.import_image(hub, {"id": uuid.uuid4().bytes})
        self.images.append(hub)
        program = self.program()
        self.pull(program, hub)
        self.check_on_node(hub, self.engine.inspect(hub)["Id"])

    def test_image_with_full_name(self):
        image = f"registry.example.com/team/{self.name}"
        image_id = self.build(name=image, files={"one": b"1" * 100_000, "two": uuid.uuid4().bytes})
        program = self.program()
        self.pull(program, f"{image}:1")
        self.check_on_node(f"{image}:1", image_id)
        path = f"/v2/team/{self.name}/manifests/1?ns=registry.example.com"
        manifest, config = self.check_image(program, path)
        self.assertEqual(3, len(manifest["layers"]))
        self.assertEqual(3, len(config["rootfs"]["diff_ids"]))

    def test_pull_from_an_origin(self):
        origin = lab.ORIGINS["open"]
        lab.push_platforms(origin, f"lab/{self.name}", "1", ["amd64"], [("id", uuid.uuid4().bytes)])
        reference = f"{origin.host}/lab/{self.name}:1"
        self.images.append(reference)
        program = self.program()
        self.pull(program, reference)
        program.wait_for_line(f"pull {reference}: done")
        self.check_on_node(reference, self.engine.inspect(reference)["Id"])
        self.check_image(program, self.origin_path("1"))


class UnqualifiedName:
    """An image of the containerd store whose name is NAME:1 there, and not docker.io/library/NAME:1.

    Docker lists it and cannot inspect it by that name.
    """

    def load(self):
        """Load an image under an unqualified name; return its layer's digest."""
        layer = lab.tar_of({"id": uuid.uuid4().bytes})
        config = json.dumps({"architecture": "amd64", "os": "linux", "config": {},
                             "rootfs": {"type": "layers", "diff_ids": [sha256(layer)]}}).encode()
        kind = "application/vnd.oci.image"
        manifest = json.dumps({
            "schemaVersion": 2, "mediaType": f"{kind}.manifest.v1+json",
            "config": {"mediaType": f"{kind}.config.v1+json", "digest": sha256(config), "size": len(config)},
            "layers": [{"mediaType": f"{kind}.layer.v1.tar", "digest": sha256(layer), "size": len(layer)}]}).encode()
        index = json.dumps({"schemaVersion": 2, "mediaType": f"{kind}.index.v1+json", "manifests": [{
            "mediaType": f"{kind}.manifest.v1+json", "digest": sha256(manifest), "size": len(manifest),
            "annotations": {"io.containerd.image.name": f"{self.name}:1"}}]}).encode()
        self.engine.docker("load", text=False, input=lab.tar_of({
            "oci-layout": b'{"imageLayoutVersion":"1.0.0"}', "index.json": index,
            **{f"blobs/sha256/{hashlib.sha256(blob).hexdigest()}": blob for blob in (layer, config, manifest)}}))
        # Docker cannot remove it by that name either.
        self.addCleanup(self.engine.containerd, "images", "rm", "--sync", f"{self.name}:1")
        return sha256(layer)

    def test_listed_image_is_served(self):
        layer = self.load()
        with self.assertRaisesRegex(RuntimeError, "No such image"):
            self.engine.inspect(f"{self.name}:1")
        program = self.program()
        self.assertEqual(["1"], program.get(f"/v2/{self.name}/tags/list").json["tags"])
        self.assertIn(f'"{self.name}"', program.get("/v2/_catalog?n=10000").body.decode())
        manifest, _ = self.check_image(program, f"/v2/{self.name}/manifests/1")
        self.assertEqual([layer], [descriptor["digest"] for descriptor in manifest["layers"]])
        self.check_image(program, self.manifest_path("1"))

    def test_node_pulls_it(self):
        layer = self.load()
        program = self.program()
        reference = f"docker.io/library/{self.name}:1"
        self.pull(program, reference)
        manifest = json.loads(lab.NODE.content(lab.NODE.digest(reference)))
        self.assertEqual([layer], [descriptor["digest"] for descriptor in manifest["layers"]])
        self.assertEqual([], program.jobs("pull"))


class UnqualifiedNameContainerd(UnqualifiedName, OtherEngineCase):
    engine = lab.ENGINES["containerd"]


class UnqualifiedNameContainerd26(UnqualifiedName, OtherEngineCase):
    engine = lab.ENGINES["containerd-26"]


class GraphDriver:
    """Images of the classic store that cannot be exported as they are needed."""

    def test_image_without_layers(self):
        """Docker cannot export it: "empty export - not implemented". The config is all that it needs."""
        for builder in ("0", "1"):
            with self.subTest(DOCKER_BUILDKIT=builder):
                image = f"{self.name}-{builder}:1"
                dockerfile = f'FROM scratch\nLABEL id="{self.name}"\n'.encode()
                self.engine.docker("build", "-q", "-t", image, "-", text=False, env={"DOCKER_BUILDKIT": builder},
                                   input=lab.tar_of({"Dockerfile": dockerfile}))
                self.images.append(image)
                program = self.program()
                reference = f"docker.io/library/{image}"
                self.pull(program, reference)
                digest = lab.NODE.digest(reference)
                manifest = json.loads(lab.NODE.content(digest))
                self.assertEqual([], manifest["layers"])
                path = self.manifest_path("1", name=f"{self.name}-{builder}")
                _, config = self.check_image(program, path)
                self.assertEqual({"id": self.name}, config["config"]["Labels"])
                self.assertEqual(("amd64", "linux"), (config["architecture"], config["os"]))
                self.assertEqual(digest, program.head(path).headers["Docker-Content-Digest"], "digest has changed")

    def test_image_of_another_platform_is_served_with_warning(self):
        """A tag that was pulled for another platform is served, but the log warns: a pod would not start."""
        origin = lab.ORIGINS["open"]
        lab.push_platforms(origin, f"lab/{self.name}", "1", ["amd64", "arm64"], [("id", uuid.uuid4().bytes)])
        reference = f"{origin.host}/lab/{self.name}:1"
        self.images.append(reference)
        self.engine.docker("pull", "-q", "--platform", "linux/arm64", reference)
        self.assertEqual("arm64", self.engine.inspect(reference)["Architecture"])
        program = self.program()
        _, config = self.check_image(program, self.origin_path("1"))
        self.assertEqual("arm64", config["architecture"])
        warnings = [line for line in program.lines("WARNING") if "linux/arm64" in line and "linux/amd64" in line]
        self.assertEqual(1, len(warnings), program.log)


class GraphDriver28(GraphDriver, OtherEngineCase):
    engine = lab.ENGINES["classic"]


class GraphDriver20(GraphDriver, OtherEngineCase):
    engine = lab.ENGINES["classic-20"]


class SocketProxy:
    """A proxy in front of Docker's socket that allows only some calls, and answers others with an HTML page."""

    def behind_proxy(self, refuse):
        """Start the program behind a proxy that refuses requests containing that text."""
        proxy = lab.filtered(self.engine, refuse, answer=lab.FORBIDDEN)
        program = Program(f"unix://{proxy.__enter__()}")
        self.addCleanup(proxy.__exit__, None, None, None)
        self.addCleanup(program.__exit__)
        return program

    def test_refused_pull_is_explained(self):
        self.on_origin()
        program = self.behind_proxy(b"POST ")
        answer = program.get(self.origin_path("1"))
        self.assertGreaterEqual(answer.status, 400)
        self.assertIn("POST /images/create", str(answer.detail))
        self.assertIn("403", str(answer.detail))
        self.assertNotIn("<html", answer.body.decode())
        self.assertFalse(program.lines("<html"))

    def test_image_of_docker_is_served(self):
        self.build()
        program = self.behind_proxy(b"POST ")
        self.pull(program, f"docker.io/library/{self.name}:1")
        self.assertFalse(program.lines("<html"))

    def test_pull_without_grpc(self):
        reference, _ = self.on_origin()
        program = self.behind_proxy(b"/grpc HTTP/1.1")
        self.pull(program, reference)
        program.wait_for_line(f"pull {reference}: done")
        self.assertFalse(program.lines("<html"))


class SocketProxyContainerd(SocketProxy, OtherEngineCase):
    engine = lab.ENGINES["containerd"]

    def test_refused_grpc_is_logged(self):
        """Images are exported instead. The log says why, and which call to allow."""
        self.build()
        program = self.behind_proxy(b"/grpc HTTP/1.1")
        self.assertEqual(200, program.get(self.manifest_path("1")).status)
        lines = program.lines("POST /grpc")
        self.assertTrue(lines, program.log)
        self.assertIn("403", lines[0])


class SocketProxyClassic(SocketProxy, OtherEngineCase):
    engine = lab.ENGINES["classic"]


if __name__ == "__main__":
    unittest.main()
