"""Content that Docker has lost, for images under any name; and unusual names and digests that must be found.

Docker is never told to build anything, because a build from an image runs that image's triggers.
"""

import json
import os
import re
import unittest
import uuid

import lab
from fake_daemon import FakeDaemon, Image, http_answer
from program import Program
from test_engines import EngineCase, basic, sha256
from test_repairs import LostBlobs

OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
NO_SUCH_POD = basic("pod", "a-secret-of-the-pod")


def setUpModule():
    lab.require()


class TestTriggers(LostBlobs):
    """An image with ONBUILD triggers, whose manifest lists content that exists nowhere."""

    engine = lab.ENGINES["containerd"]

    def put(self, tag, origin="open"):
        """Push the image to a registry, as one manifest without an index."""
        origin, name = lab.ORIGINS[origin], f"lab/{self.name}"
        layers = [lab.tar_of({"small": os.urandom(1000)}), lab.tar_of({"large": os.urandom(100_000)})]
        config = json.dumps({
            "architecture": "amd64", "os": "linux", "config": {"OnBuild": ["RUN touch /marker", "RUN id"]},
            "rootfs": {"type": "layers", "diff_ids": [sha256(layer) for layer in layers]}}).encode()
        self.nowhere = sha256(uuid.uuid4().bytes)
        self.manifest = {
            "schemaVersion": 2, "mediaType": OCI_MANIFEST,
            "config": {"mediaType": "application/vnd.oci.image.config.v1+json", **lab.push_blob(origin, name, config)},
            "layers": [{"mediaType": "application/vnd.oci.image.layer.v1.tar", **lab.push_blob(origin, name, layer)}
                       for layer in layers],
            "blobs": [{"mediaType": "application/octet-stream", "digest": self.nowhere, "size": 16}]}
        self.index = self.child = lab.push_document(origin, name, tag, self.manifest)["digest"]
        self.large = self.manifest["layers"][-1]["digest"]

    def images_and_containers(self):
        """Return the images and the containers that Docker has."""
        return [set(self.engine.docker(what, "-aq", "--no-trunc").split()) for what in ("images", "ps")]

    def posts(self, heard):
        """Return the paths of the program's POST requests to Docker, except those for pulls and for content."""
        return [path for path in re.findall(rb"POST (/\S*) HTTP/1\.1\r\n", b"".join(heard))
                if not re.search(rb"/(grpc|images/create)\b", path)]

    def serve(self):
        """Get the image from the program, and check that Docker was only asked for content."""
        host, heard = lab.ORIGINS["open"].host, []
        before = self.images_and_containers()
        with lab.filtered(self.engine, hear=heard.append) as socket, Program(f"unix://{socket}") as program:
            answer = program.get(self.path("manifests", "1", host))
            self.assertEqual((200, self.index), (answer.status, sha256(answer.body)), answer.body)
            for blob in (self.manifest["config"], *self.manifest["layers"]):
                self.assertEqual(blob["digest"], sha256(program.get(self.path("blobs", blob["digest"], host)).body))
            self.assertIn(program.get(self.path("blobs", self.nowhere, host)).status, (401, 404))
            self.assertEqual([], program.lines("a bug in this program"))
        self.assertIn(b"/images/", b"".join(heard))
        self.assertEqual([], self.posts(heard))
        self.assertEqual(before, self.images_and_containers())

    def test_content_that_exists_nowhere(self):
        """Everything that Docker pulled is present, so the image is served as it is."""
        self.engine.docker("pull", "-q", self.on(lab.ORIGINS["open"].host))
        self.serve()

    def test_lost_layer(self):
        """It is fetched from the image's registry."""
        self.lose(self.on(lab.ORIGINS["open"].host))
        self.serve()

    def test_node_pulls_it(self):
        reference = self.on(lab.ORIGINS["open"].host)
        self.lose(reference)
        heard = []
        with lab.filtered(self.engine, hear=heard.append) as socket, Program(f"unix://{socket}") as program:
            self.assert_served(program, reference)
        self.assertEqual([], self.posts(heard))


class TestOtherNames(LostBlobs):
    """Images that share a lost layer with an image in a registry, but have names that no registry knows.

    Docker 26.1 does not list images that have lost content, so one name does not lead to the other there.
    """

    engine = lab.ENGINES["containerd"]

    def other_names(self, base):
        """Pull the base, lose its layer, create images with other names that use the layer; return these names."""
        self.lose(base)
        names = [f"{self.name}:{tag}" for tag in ("tagged", "built", "committed")]
        self.images += names
        self.engine.docker("tag", base, names[0])
        context = lab.tar_of({"Dockerfile": f"FROM {base}\nCOPY file /file\n".encode(), "file": os.urandom(1000)})
        self.engine.docker("build", "-q", "-t", names[1], "-", input=context, text=False, env={"DOCKER_BUILDKIT": "0"})
        self.addCleanup(self.engine.docker, "rm", self.name, check=False)
        self.engine.docker("create", "--name", self.name, base, "/small")
        self.engine.docker("commit", self.name, names[2])
        self.assertNotEqual(0, lab.chroot(
            "ctr", "-a", f"/lab/{self.engine.name}/exec/containerd/containerd.sock", "-n", "moby", "content", "get",
            self.large, root=self.engine.root, check=False, text=False).returncode, "the layer must still be lost")
        return names

    def check_manifest(self, program, name, **headers):
        """Send a node's requests for such a name, over plain HTTP."""
        _, _, tag = name.partition(":")
        answer = program.get(self.manifest_path(tag), **headers)
        self.assertEqual(200, answer.status, answer.body)
        blob = program.get(f"/v2/library/{self.name}/blobs/{self.large}?ns=docker.io", **headers)
        self.assertEqual((200, self.large), (blob.status, sha256(blob.body)))

    def test_node_pulls_them(self):
        for name in self.other_names(self.on(lab.ORIGINS["open"].host)):
            with self.subTest(name):
                lab.NODE.forget()
                reference = f"docker.io/library/{name}"
                self.pull(self.program(), reference)
                self.assertEqual(self.engine.inspect(name)["Id"], lab.NODE.digest(reference))
                self.assertEqual(self.large, sha256(lab.NODE.content(self.large)))

    def test_stored_credentials_of_the_origin(self):
        """The credentials in the request are for another registry."""
        with lab.TokenOrigin(lab.ORIGINS["open"], private=True) as origin:
            self.engine.docker("login", "-u", lab.USER, "--password-stdin", origin.host, input=lab.PASSWORD)
            self.addCleanup(self.engine.docker, "logout", origin.host)
            names = self.other_names(self.on(origin.host))
            for name in names:
                for headers in ({}, {"Authorization": NO_SUCH_POD}):
                    with self.subTest(name=name, headers=headers):
                        program = self.program(env={"DOCKER_CONFIG": self.login(origin.host)})
                        origin.requests.clear()
                        self.check_manifest(program, name, **headers)
                        self.assertTrue(origin.requests)
                        self.assertNotIn(NO_SUCH_POD, [authorization for _, authorization in origin.requests])
                        self.assertEqual([], [line for line in program.log if lab.PASSWORD in line])

    def test_other_credentials_are_not_used(self):
        """Without credentials for the registry itself, the layer is not available."""
        with lab.TokenOrigin(lab.ORIGINS["open"], private=True) as origin:
            self.engine.docker("login", "-u", lab.USER, "--password-stdin", origin.host, input=lab.PASSWORD)
            self.addCleanup(self.engine.docker, "logout", origin.host)
            self.other_names(self.on(origin.host))
            right = basic(lab.USER, lab.PASSWORD)
            for what, folder, headers in (("of the request", "/nowhere", {"Authorization": right}),
                                          ("of another registry", self.login("quay.io"), {}), ("none", "/nowhere", {})):
                with self.subTest(what):
                    program = self.program(env={"DOCKER_CONFIG": folder})
                    origin.requests.clear()
                    answer = program.get(self.manifest_path("tagged"), **headers)
                    self.assertIn(answer.status, (401, 404), answer.body)
                    self.assertEqual(set(), {authorization for _, authorization in origin.requests
                                             if (authorization or "").startswith("Basic ")})

    def test_disallowed_registry_is_not_asked(self):
        with lab.TokenOrigin(lab.ORIGINS["open"]) as origin:
            names = self.other_names(self.on(origin.host))
            allowed = ["-allow", "docker.io"]
            for arguments in (["-pull", "never"], allowed, [*allowed, "-allow", "*.corp.example"]):
                for name in names:
                    with self.subTest(arguments=arguments, name=name):
                        program = self.program(*arguments)
                        origin.requests.clear()
                        answer = program.get(self.manifest_path(name.partition(":")[2]))
                        self.assertIn(answer.status, (403, 404), answer.body)
                        self.assertEqual([], origin.requests)


class TestOwnNames(LostBlobs):
    """Names that lead to the program itself, which must not wait for its own answer."""

    engine = lab.ENGINES["containerd"]
    host = lab.ORIGINS["open"].host

    def setUp(self):
        super().setUp()
        self.running = self.program()
        self.own = f"{self.running.address}/{self.name}:1"
        self.images += [self.own, f"{self.name}:1"]
        self.base = self.on(self.host)
        self.engine.docker("pull", "-q", self.base)
        self.engine.docker("tag", self.base, self.own)

    def forget_the_origin(self):
        """Lose a layer, and every name that leads to the registry that has it."""
        self.engine.containerd("content", "rm", self.large)
        self.engine.remove(self.base, f"{self.base[:-2]}@{self.index}")
        blobs = (self.manifest["config"], *self.manifest["layers"][:-1])
        for digest in (self.index, self.child, *(blob["digest"] for blob in blobs)):
            self.engine.containerd("content", "label", digest, f"containerd.io/distribution.source.{self.host}=")

    def test_nobody_has_the_layer(self):
        self.forget_the_origin()
        answer = self.running.get(f"/v2/{self.name}/manifests/1")
        self.assertEqual((404, "MANIFEST_UNKNOWN"), (answer.status, answer.code), answer.body)

    def test_layer_that_was_pushed_here(self):
        self.engine.docker("push", "-q", self.own)
        self.engine.docker("tag", self.own, f"{self.name}:1")
        self.forget_the_origin()
        self.pull(self.running, f"docker.io/library/{self.name}:1")
        self.assertEqual(self.large, sha256(lab.NODE.content(self.large)))


class DigestsOfBuiltImages:
    """The classic store has no manifests, so a digest that was served once must be found again."""

    def test_digest_from_an_earlier_program(self):
        image = self.build("1", {"data": os.urandom(300_000)})
        self.build("other")
        with self.program() as program:
            first = program.get(self.manifest_path("1"))
            digest = first.headers["Docker-Content-Digest"]
            self.assertEqual(image, first.json["config"]["digest"])
        for ns in ("?ns=docker.io", ""):
            with self.subTest(ns), self.program() as program:  # with a new store
                path = f"/v2/library/{self.name}/manifests/{digest}{ns}"
                answer = program.get(path, Authorization=basic("a", "b"))
                self.assertEqual((200, digest), (answer.status, sha256(answer.body)), answer.body)
                for blob in (answer.json["config"], *answer.json["layers"]):
                    found = program.get(f"/v2/library/{self.name}/blobs/{blob['digest']}{ns}")
                    self.assertEqual(blob["digest"], sha256(found.body))

    def test_unknown_digest(self):
        self.build()
        answer = self.program().get(self.manifest_path(sha256(b"nothing")), Authorization=basic("a", "b"))
        self.assertEqual((404, "MANIFEST_UNKNOWN"), (answer.status, answer.code))


class TestDigestsOfBuiltImagesClassic(DigestsOfBuiltImages, EngineCase):
    engine = lab.ENGINES["classic"]


class TestDigestsOfBuiltImagesClassic20(DigestsOfBuiltImages, EngineCase):
    engine = lab.ENGINES["classic-20"]


class UnusualNames:
    """Image names that Docker accepts."""

    def test_unusual_names(self):
        self.build()
        long_path = f"{self.name}/{'a' * 200}"
        long_path += "b" * (244 - len(long_path))
        for what, host, path in (("a word in capitals is a host", f"MYHOST{self.name.upper()}", "app"),
                                 ("the same, nested", f"MYHOST{self.name.upper()}", f"team/{self.name}"),
                                 ("capitals and a port", "MyHost:5000", self.name),
                                 ("capitals in a domain", "Registry.Example.COM", self.name),
                                 ("an IPv6 address", "[2001:db8::1]:5000", f"team/{self.name}"),
                                 ("a long path under a short host", "r.io", long_path),
                                 ("a long path under a long host", "registry.long-name.example.com:5000", long_path)):
            with self.subTest(what):
                image = f"{host}/{path}:1"
                self.engine.docker("tag", f"{self.name}:1", image)
                self.images.append(image)
                program = self.program("-pull", "never")
                target = f"/v2/{path}/manifests/1?ns={host}"
                answer = program.get(target)
                self.assertEqual(200, answer.status, answer.body)
                digest = answer.headers["Docker-Content-Digest"]
                self.assertEqual((digest, host), (sha256(answer.body), answer.headers["OCI-Namespace"]))
                self.assertEqual(digest, program.head(target).headers["Docker-Content-Digest"])
                self.assertEqual(200, program.get(f"/v2/{path}/manifests/{digest}?ns={host}").status)
                answer = self.program("-pull", "never").get(f"/v2/{path}/manifests/{digest}", Host=host)
                self.assertEqual(200, answer.status, answer.body)


    def test_names_of_docker_hub(self):
        """Manifests and lists agree on which names are the same."""
        self.build()
        program = self.program("-pull", "never")
        for path in (self.name, f"library/{self.name}"):
            for host, ns in (("", ""), ("docker.io/", ""), ("index.docker.io/", ""), ("", "?ns=docker.io"),
                             ("", "?ns=index.docker.io"), ("docker.io/", "?ns=docker.io")):
                with self.subTest(path=f"{host}{path}{ns}"):
                    answer = program.get(f"/v2/{host}{path}/tags/list{ns}")
                    self.assertEqual((200, ["1"]), (answer.status, answer.json.get("tags")), answer.body)
                    manifest = program.get(f"/v2/{host}{path}/manifests/1{ns}")
                    self.assertEqual(200, manifest.status, manifest.body)
                    digest = manifest.headers["Docker-Content-Digest"]
                    self.assertEqual(200, program.get(f"/v2/{host}{path}/manifests/{digest}{ns}").status)


class TestUnusualNamesContainerd(UnusualNames, EngineCase):
    engine = lab.ENGINES["containerd"]


class TestUnusualNamesClassic(UnusualNames, EngineCase):
    engine = lab.ENGINES["classic"]


class RefusedNames:
    """Names that this engine does not accept. It has no images of such names."""

    HOSTS = ("[::1]:5000", "MYHOST", "a-long-name.example.com:5000")

    def setUp(self):
        super().setUp()
        self.path = f"{self.name}/{'a' * 200}"
        self.path += "b" * (240 - len(self.path))

    def test_absent(self):
        program = self.program("-pull", "never")
        for host in self.HOSTS:
            for method in ("GET", "HEAD"):
                with self.subTest(host=host, method=method):
                    answer = program.request(method, f"/v2/{self.path}/manifests/1?ns={host}")
                    self.assertEqual(404, answer.status, answer.body)

    def test_pull(self):
        program = self.program()
        for host in self.HOSTS:
            with self.subTest(host):
                answer = program.get(f"/v2/{self.path}/manifests/1?ns={host}")
                self.assertEqual((400, "NAME_INVALID"), (answer.status, answer.code), answer.body)

    def test_other_names_are_looked_for(self):
        """The Host header is a part of the name that Docker is asked for first."""
        image = f"{self.path}:1"
        self.engine.docker("tag", "base:1", image)
        self.images.append(image)
        program = self.program("-pull", "never")
        for host in self.HOSTS:
            with self.subTest(host):
                answer = program.get(f"/v2/{self.path}/manifests/1", Host=host)
                self.assertEqual(200, answer.status, answer.body)
                digest = answer.headers["Docker-Content-Digest"]
                self.assertEqual(200, program.get(f"/v2/{self.path}/manifests/{digest}", Host=host).status)


class TestRefusedNamesClassic20(RefusedNames, EngineCase):
    engine = lab.ENGINES["classic-20"]


class TestRefusedNamesPodman(RefusedNames, EngineCase):
    engine = lab.ENGINES["podman"]


class TestHostsInPaths(EngineCase):
    """Clients that send no `ns` and put the registry's name at the start of the path.

    Names in a path have no port, so the origin has an address of its own, with Docker's default port.
    (With the containerd store that is always 443, so a fake daemon is used for that.)
    """

    engine = lab.ENGINES["classic"]

    def setUp(self):
        super().setUp()
        self.host = "127.{}.{}.{}".format(*(1 + byte % 250 for byte in os.urandom(3)))
        gate = lab.Gate(lab.ORIGINS["open"], (self.host, 80))
        gate.open()
        self.addCleanup(gate.__exit__)
        self.index, (self.child,) = lab.push_platforms(lab.ORIGINS["open"], f"lab/{self.name}", "1", ["amd64"])
        self.reference = f"{self.host}/lab/{self.name}:1"
        self.images.append(self.reference)
        self.path = f"/v2/{self.host}/lab/{self.name}/manifests/1"

    def check(self, program, path):
        """Check that the image is pulled once, and that its manifests and blobs are served under the same path."""
        answer = program.get(path)
        self.assertEqual(200, answer.status, answer.body)
        self.assertEqual(1, len(program.lines(f"pull {self.reference}: started")), program.log)
        self.assertEqual(1, len(program.jobs("pull")))
        repository, _, query = path.partition("/manifests/1")
        document = answer.json
        if "manifests" in document:
            self.assertEqual(self.index, answer.headers["Docker-Content-Digest"])
            document = program.get(f"{repository}/manifests/{self.child}{query}").json
        for blob in (document["config"], *document["layers"]):
            self.assertEqual(blob["digest"], sha256(program.get(f"{repository}/blobs/{blob['digest']}{query}").body))

    def test_get_pulls_and_head_does_not(self):
        program = self.program()
        for agent in ("curl/8", "crane/0.20", "oras/1.3"):
            self.assertEqual(404, program.head(self.path, User_Agent=agent, Accept="*/*").status)
        self.assertEqual([], program.jobs("pull"))
        self.check(program, self.path)

    def test_path_and_namespace(self):
        self.check(self.program(), f"{self.path}?ns={self.host}")

    def test_client_without_namespace(self):
        program = self.program()
        out = lab.chroot("skopeo", "inspect", "--raw", "--tls-verify=false",
                         f"docker://{program.address}/{self.host}/lab/{self.name}:1").stdout
        self.assertTrue(json.loads(out))
        self.assertEqual(1, len(program.lines(f"pull {self.reference}: started")))

    def test_hosted_content_under_the_whole_path_comes_first(self):
        program = self.program()
        repository = self.path.partition("/manifests/")[0]
        blob = uuid.uuid4().bytes
        created = program.request("POST", f"{repository}/blobs/uploads/?digest={sha256(blob)}",
                                  {"Content-Type": "application/octet-stream"}, blob)
        self.assertEqual(201, created.status, created.body)
        described = {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": sha256(blob), "size": len(blob)}
        manifest = json.dumps({"schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": described,
                               "layers": []}).encode()
        created = program.request("PUT", self.path, {"Content-Type": OCI_MANIFEST}, manifest)
        self.assertEqual(201, created.status, created.body)
        self.assertEqual(manifest, program.get(self.path).body)
        self.assertEqual([], program.jobs("pull"))

    def test_pull_never(self):
        program = self.program("-pull", "never")
        answer = program.get(self.path)
        self.assertEqual((404, "MANIFEST_UNKNOWN"), (answer.status, answer.code))
        self.assertEqual([], program.jobs("pull"))


class TestHostsInPathsOfAFakeDaemon(unittest.TestCase):
    """Which image Docker is told to pull."""

    def setUp(self):
        self.daemon = FakeDaemon()
        self.daemon.__enter__()
        self.addCleanup(self.daemon.__exit__)
        self.program = Program(self.daemon.host)
        self.addCleanup(self.program.__exit__)
        self.image = Image(uuid.uuid4().hex)
        self.daemon.pulls["quay.io/a/b:1"] = self.pull

    def pull(self):
        self.daemon.add("quay.io/a/b:1", self.image)
        return http_answer(200, {"status": "Status: Downloaded newer image for quay.io/a/b:1"})

    def pulls(self):
        return [line for line in self.daemon.requests if "images/create" in line]

    def test_get(self):
        for path in ("/v2/quay.io/a/b/manifests/1", "/v2/quay.io/a/b/manifests/1?ns=quay.io",
                     "/v2/a/b/manifests/1?ns=quay.io"):
            with self.subTest(path):
                self.daemon.images.clear()
                self.daemon.requests.clear()
                answer = self.program.get(path)
                self.assertEqual((200, self.image.manifest), (answer.status, answer.body))
                (line,) = self.pulls()
                self.assertRegex(line, r"^POST \S*/images/create\?fromImage=quay\.io(%2F|/)a(%2F|/)b&tag=1 ")
                self.assertEqual([], [line for line in self.daemon.requests if "quay.io/quay.io" in line
                                      or "quay.io%2Fquay.io" in line])

    def test_head(self):
        """Without `ns`, HEAD never makes Docker pull."""
        for path in ("/v2/quay.io/a/b/manifests/1", "/v2/a/b/manifests/1"):
            for agent in ("curl/8", "crane/0.20", "oras/1.3"):
                with self.subTest(path=path, agent=agent):
                    self.assertEqual(404, self.program.head(path, User_Agent=agent, Accept="*/*").status)
        self.assertEqual([], self.pulls())

    def test_path_without_a_registry(self):
        for path in ("/v2/quay/a/b/manifests/1", "/v2/a/quay.io/b/manifests/1", "/v2/b/manifests/1"):
            with self.subTest(path):
                self.assertEqual(404, self.program.get(path).status)
        self.assertEqual([], self.pulls())


if __name__ == "__main__":
    unittest.main()
