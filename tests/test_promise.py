"""The promise of a registry: content that it reports remains available. Real clients, real engines, pushes and reads.

A client does not push what HEAD reports. So HEAD without `ns` reports only hosted content, and a pushed manifest
brings what only Docker has. After each test everything that was pushed is fetched without Docker.
"""

import email.parser
import email.policy
import http.client
import itertools
import json
import os
import re
import threading
import unittest
import uuid

import lab
from program import Program
from test_engines import MIB, OCI_INDEX, sha256, together
from test_push_engines import PushCase

OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
OCI_LAYER = "application/vnd.oci.image.layer.v1.tar"
FOREIGN_LAYER = "application/vnd.oci.image.layer.nondistributable.v1.tar"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_LIST = "application/vnd.docker.distribution.manifest.list.v2+json"
FOUR_TYPES = ", ".join((DOCKER_MANIFEST, DOCKER_LIST, OCI_MANIFEST, OCI_INDEX))
SIX_TYPES = ", ".join(("application/vnd.docker.distribution.manifest.v1+json",
                       "application/vnd.docker.distribution.manifest.v1+prettyjws", FOUR_TYPES))
OCTETS = "application/octet-stream"


def setUpModule():
    lab.require()


def described(data, media_type, **more):
    return {"mediaType": media_type, "digest": sha256(data), "size": len(data), **more}


class MemoryOrigin:
    """An in-memory registry with one image, for manifests that the lab's registries refuse."""

    def __init__(self):
        self.content = {}  # tag or digest -> (media type, bytes)
        origin = self

        class Handler(lab.OriginHandler):
            def do_GET(self):
                if self.path == "/v2/":
                    self.answer(200, b"{}")
                    return
                media_type, data = origin.content.get(self.path.rpartition("/")[2], (None, None))
                if data is None:
                    self.answer(404, b"{}")
                    return
                self.answer(200, data, {"Content-Type": media_type, "Docker-Content-Digest": sha256(data)})

        self._server = lab.QuietServer(("127.0.0.1", 0), Handler)
        self.host = f"127.0.0.1:{self._server.server_port}"

    def add(self, data, media_type, tag=None, **more):
        """Add content and return its descriptor."""
        for reference in filter(None, (tag, sha256(data))):
            self.content[reference] = (media_type, data)
        return described(data, media_type, **more)

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error):
        self._server.shutdown()
        self._server.server_close()


class PromiseCase(PushCase):
    """Images that only Docker has, under the program's own name, and what clients do with them."""

    engine = lab.ENGINES["mirrors"]  # which is idle otherwise, and like "containerd" except for Docker Hub

    def path(self, kind, reference, repository=None):
        return f"/v2/{repository or self.name}/{kind}/{reference}"

    def put(self, data, media_type, reference, repository=None):
        return self.program.request("PUT", self.path("manifests", reference, repository),
                                    {"Content-Type": media_type}, data)

    def push_blob(self, data, repository=None):
        answer = self.program.request("POST", f"{self.path('blobs', 'uploads/', repository)}?digest={sha256(data)}",
                                      {"Content-Type": OCTETS}, data)
        self.assertEqual(201, answer.status, answer.body)
        return sha256(data)

    def restart(self, docker_host, *arguments):
        """Replace the running program with another one on the same store."""
        self.program.stop()
        self.program = Program(docker_host, *arguments, store=self.program.store)
        self.addCleanup(self.program.__exit__)
        self.target = f"{self.program.address}/{self.name}"

    def image_of(self, document):
        """Return the image manifest that document, a manifest or an index of Docker, leads to."""
        if "manifests" in document:
            digest = document["manifests"][0]["digest"]
            return self.program.get(self.path("manifests", digest)).json
        return document

    def assert_whole(self, *tags, repository=None):
        """Check that everything below these tags is available without Docker; return their digests."""
        walked = self.check_without_docker()
        for tag in tags:
            self.assertIn(f"{repository or self.name}:{tag}", walked)
        return [walked[f"{repository or self.name}:{tag}"] for tag in tags]

    def crane(self, command, *arguments):
        return self.run_client("crane", *command.split(), "--insecure", *arguments)


class Adoption:
    """A pushed manifest brings what only Docker has, with either image store."""

    def test_crane_tag(self):
        image = self.build("src", *(["--provenance=mode=max"] if self.engine.containerd_store else []))
        digest = self.crane("digest", image)
        self.crane("tag", image, "second")
        self.assertEqual([digest], self.assert_whole("second"))

    def test_crane_index_append(self):
        image = self.build("src")
        out = self.crane("index append", "-m", image, "-t", f"{self.target}:app")
        self.assertEqual([out.rpartition("@")[2]], self.assert_whole("app"))

    def test_get_then_put_with_another_tag(self):
        self.build("src")
        read = self.program.get(self.path("manifests", "src"))
        self.assertEqual(200, read.status, read.body)
        digest = read.headers["Docker-Content-Digest"]
        answer = self.put(read.body, read.headers["Content-Type"], "app")
        self.assertEqual((201, digest), (answer.status, answer.headers["Docker-Content-Digest"]), answer.body)
        self.assertEqual([digest], self.assert_whole("app"))

    def test_crane_copy_to_a_name_that_docker_has(self):
        origin = lab.ORIGINS["open"]
        index, _ = lab.push_platforms(origin, f"lab/{self.name}", "1", ["amd64"])
        source = f"{origin.host}/lab/{self.name}:1"
        self.images += [source, f"{self.target}:1"]
        self.engine.docker("pull", "-q", source)
        self.engine.docker("tag", source, f"{self.target}:1")
        self.crane("cp", source, f"{self.target}:1")
        self.assertEqual([index], self.assert_whole("1"))

    def test_clients_that_copy_an_image_of_docker(self):
        """Each client sends HEAD first, and must get 404."""
        source = self.build("src")
        archive = f"/lab/{self.name}/image"
        layout = f"oci:{archive}:1"
        self.run_client("skopeo", "copy", "--src-tls-verify=false", f"docker://{source}", layout)
        digest = json.loads((self.folder / "image/index.json").read_text())["manifests"][0]["digest"]
        for client, command in (
                ("crane", ["crane", "push", "--insecure", archive]),
                ("oras", ["oras", "cp", "--from-oci-layout", "--to-plain-http", f"{archive}:1"]),
                ("skopeo", ["skopeo", "copy", "--dest-tls-verify=false", layout])):
            target = f"{self.program.address}/{client}/{self.name}:1"
            self.run_client(*command, f"docker://{target}" if client == "skopeo" else target)
        walked = self.check_without_docker()
        for client in ("crane", "oras", "skopeo"):
            self.assertEqual(digest, walked[f"{client}/{self.name}:1"], client)


class TestAdoptionClassic(Adoption, PromiseCase):
    engine = lab.ENGINES["classic"]


class TestAdoptionContainerd(Adoption, PromiseCase):
    def docker_client(self, *command):
        """Run a docker command that talks to registries itself. Its files stay in the test's folder."""
        return self.run_client("docker", *command, env={"DOCKER_HOST": self.engine.host,
                                                        "DOCKER_CONFIG": f"/lab/{self.name}"})

    def test_clients_that_push_only_a_manifest(self):
        """Each uses its own image, either a plain one or an index with an attestation."""
        clients = {
            "tag": lambda source, tag: self.run_client("oras", "tag", "--plain-http", f"{self.target}:{source}", tag),
            "index": lambda source, tag: self.run_client(
                "oras", "manifest", "index", "create", "--plain-http", f"{self.target}:{tag}", source),
            "imagetools": lambda source, tag: self.docker_client(
                "buildx", "imagetools", "create", "-t", f"{self.target}:{tag}", f"{self.target}:{source}"),
            "list": lambda source, tag: (
                self.docker_client("manifest", "create", "--insecure",
                                   f"{self.target}:{tag}", f"{self.target}:{source}"),
                self.docker_client("manifest", "push", "--insecure", f"{self.target}:{tag}"))}
        tags = []
        for kind, options in (("plain", ["--provenance=false"]), ("attested", ["--provenance=mode=max"])):
            for client, push in clients.items():
                if (kind, client) != ("attested", "list"):  # it does not accept an index
                    self.build(f"{kind}-{client}", *options)
                    tags.append(f"{kind}-{client}-pushed")
                    push(f"{kind}-{client}", tags[-1])
        self.assert_whole(*tags)

    def test_imagetools_copies_to_another_repository(self):
        image = self.build("src", "--provenance=mode=max")
        other = f"other/{self.name}"
        self.docker_client("buildx", "imagetools", "create", "-t", f"{self.program.address}/{other}:1", image)
        self.assert_whole("1", repository=other)

    def test_oras_copy_of_index_with_one_platform_in_docker(self):
        origin = lab.ORIGINS["open"]
        index, (mine, foreign) = lab.push_platforms(origin, f"lab/{self.name}", "all", ["amd64", "arm64"])
        source = f"{origin.host}/lab/{self.name}:all"
        self.images.append(source)
        self.engine.docker("pull", "-q", source)
        self.run_client("oras", "cp", "--from-plain-http", "--to-plain-http", source, f"{self.target}:1")
        walked = self.check_without_docker({f"{self.name}:1": index})
        for digest in (mine, foreign):
            self.assertIn(f"{self.name}@{digest}", walked)

    def test_index_with_one_platform_in_docker(self):
        """The other manifest is not available, so it may be missing. What is hosted is complete."""
        origin = lab.ORIGINS["open"]
        index, (mine, foreign) = lab.push_platforms(origin, f"lab/{self.name}", "all", ["amd64", "arm64"])
        source, name = f"{origin.host}/lab/{self.name}:all", f"{self.target}:src"
        self.images += [source, name]
        self.engine.docker("pull", "-q", source)
        self.engine.docker("tag", source, name)
        read = self.program.get(self.path("manifests", "src"))
        self.assertEqual(201, self.put(read.body, read.headers["Content-Type"], "app").status)
        self.sparse = (foreign,)
        walked = self.check_without_docker({f"{self.name}:app": index})
        self.assertIn(f"{self.name}@{mine}", walked)

    def foreign_image(self, origin):
        """Make an image with a layer that has urls and a non-distributable one. Returns (descriptors, manifest)."""
        files = [lab.tar_of({name: os.urandom(10_000)}) for name in ("plain", "url", "foreign")]
        layers = [origin.add(files[0], OCI_LAYER),
                  origin.add(files[1], OCI_LAYER,
                             urls=[f"http://{origin.host}/v2/lab/{self.name}/blobs/{sha256(files[1])}"]),
                  origin.add(files[2], FOREIGN_LAYER)]
        config = json.dumps({"architecture": "amd64", "os": "linux", "config": {}, "rootfs": {
            "type": "layers", "diff_ids": [layer["digest"] for layer in layers]}}).encode()
        manifest = json.dumps({"schemaVersion": 2, "mediaType": OCI_MANIFEST,
                               "config": origin.add(config, OCI_CONFIG), "layers": layers}).encode()
        origin.add(manifest, OCI_MANIFEST, "1")
        return layers, manifest

    def test_nondistributable_layers_of_docker_are_kept(self):
        with MemoryOrigin() as origin:
            layers, manifest = self.foreign_image(origin)
            source = f"{origin.host}/lab/{self.name}:1"
            self.images.append(source)
            self.engine.docker("pull", "-q", source)
        for layer in layers:
            self.assertEqual(layer["digest"], sha256(self.engine.content(layer["digest"])), "the engine has the layer")
        answer = self.put(manifest, OCI_MANIFEST, "1")
        self.assertEqual(201, answer.status, answer.body)
        self.assertEqual([sha256(manifest)], self.assert_whole("1"))

    def test_missing_foreign_layers_are_optional(self):
        config, layer, nowhere = (os.urandom(100) for _ in range(3))
        foreign = described(nowhere, FOREIGN_LAYER, urls=[f"http://127.0.0.1:1/{self.name}"])
        manifest = json.dumps({"schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": described(config, OCI_CONFIG),
                               "layers": [described(layer, OCI_LAYER), foreign]}).encode()
        for blob in (config, layer):
            self.push_blob(blob)
        answer = self.put(manifest, OCI_MANIFEST, "1")
        self.assertEqual(201, answer.status, answer.body)
        self.sparse = (foreign["digest"],)
        self.assert_whole("1")

    def test_concurrent_pushes_share_one_copy(self):
        """Push five manifests at the same time, to three repositories. Docker is read once."""
        size = 40 * MIB
        sent = []
        with lab.filtered(self.engine, tell=sent.append) as socket_path:
            self.restart(f"unix://{socket_path}")
            self.build("src", files={"data": os.urandom(MIB) * 40})
            read = self.program.get(self.path("manifests", "src"))
            sent.clear()
            others = f"{self.name}/a", f"b/{self.name}"
            places = [(self.name, "1"), (self.name, "2"), (self.name, "3"), *((other, "1") for other in others)]
            listed = [(repository, child) for child in read.json.get("manifests", ()) for repository, _ in places]
            media_type = read.headers["Content-Type"]
            answers = together(5, lambda i: self.put(read.body, media_type, places[i][1], places[i][0]))
            self.assertEqual([201] * 5, [answer.status for answer in answers], [answer.body for answer in answers])
            image = self.image_of(read.json)
            self.assertLess(sum(sent), 2 * min(size, image["layers"][-1]["size"]))
        walked = self.check_without_docker()
        for repository, tag in places:
            self.assertIn(f"{repository}:{tag}", walked)
        for repository, child in listed:
            self.assertIn(f"{repository}@{child['digest']}", walked)

    def test_docker_pushes_a_large_layer(self):
        image = self.build("1", files={"data": os.urandom(100 * MIB)})
        out = self.engine.docker("push", image)
        (digest,) = self.assert_whole("1")
        self.assertIn(digest, out)


class TestHeads(PromiseCase):
    """Which clients get Docker's images in response to HEAD."""

    LIBRARY = ("containerd/2.1.4", "containerd/1.6.20+unknown", "buildkit/v0.0-dev",
               "docker/28.5.2 go/go1.24.9 git-commit/3ef3c07 kernel/6.6 os/linux arch/amd64 containerd-client/2.1.9 "
               r"storage-driver/overlayfs UpstreamClient(Docker-Client/28.5.2 \(linux\))")
    ACCEPTS = ("the only type", "the only type, */*", SIX_TYPES, FOUR_TYPES + ", */*", "*/*", None)

    def headers(self, accept, media_type, **more):
        """Return request headers. "the only type" in accept stands for media_type."""
        return {**more, **({"Accept": accept.replace("the only type", media_type)} if accept else {})}

    def test_head_with_namespace_agrees_with_get(self):
        image = self.build("1")
        hub = f"{self.name}:hub"
        self.engine.docker("tag", image, hub)
        self.images.append(hub)
        names = ("Content-Type", "Content-Length", "Docker-Content-Digest")
        for path in (f"/v2/library/{self.name}/manifests/hub?ns=docker.io",
                     f"/v2/{self.name}/manifests/1?ns={self.program.address}"):
            media_type = self.program.get(path).headers["Content-Type"]
            for accept in self.ACCEPTS:
                with self.subTest(path=path, accept=accept):
                    get, head = (self.program.request(method, path, self.headers(accept, media_type))
                                 for method in ("GET", "HEAD"))
                    self.assertEqual((200, 200), (get.status, head.status))
                    self.assertEqual([get.headers[name] for name in names], [head.headers[name] for name in names])
                    self.assertEqual((str(len(get.body)), sha256(get.body), media_type), tuple(
                        head.headers[name] for name in ("Content-Length", "Docker-Content-Digest", "Content-Type")))

    def test_head_without_namespace_reports_only_hosted_content(self):
        self.build("1")
        get = self.program.get(self.path("manifests", "1"))
        media_type, digest = get.headers["Content-Type"], get.headers["Docker-Content-Digest"]
        self.assertEqual(200, get.status)
        for agent, accept, reference in itertools.product(
                ("curl/8", "crane/0.20", "go-containerregistry", "oras/1.3.3", None), self.ACCEPTS, ("1", digest)):
            with self.subTest(agent=agent, accept=accept, reference=reference):
                headers = self.headers(accept, media_type, **({"User-Agent": agent} if agent else {}))
                answer = self.program.request("HEAD", self.path("manifests", reference), headers)
                self.assertEqual((404, b""), (answer.status, answer.body))

    def test_head_by_containerd_library(self):
        """It accepts four types for a pull, and one for a push. Docker and BuildKit use it under their own names."""
        self.build("1")
        get = self.program.get(self.path("manifests", "1"))
        media_type, digest = get.headers["Content-Type"], get.headers["Docker-Content-Digest"]
        for agent, reference in itertools.product(self.LIBRARY, ("1", digest)):
            for accept, status in ((FOUR_TYPES + ", */*", 200), ("the only type, */*", 404), ("the only type", 404),
                                   ("*/*", 404), (None, 404)):
                with self.subTest(agent=agent, reference=reference, accept=accept):
                    headers = self.headers(accept, media_type, **{"User-Agent": agent})
                    answer = self.program.request("HEAD", self.path("manifests", reference), headers)
                    self.assertEqual(status, answer.status)
                    if status == 200:
                        names = "Content-Type", "Content-Length", "Docker-Content-Digest"
                        self.assertEqual((media_type, str(len(get.body)), digest),
                                         tuple(answer.headers[name] for name in names))

    def test_blobs(self):
        self.build("1")
        image = self.image_of(self.program.get(self.path("manifests", "1")).json)
        for blob in (image["config"], image["layers"][-1]):
            path = self.path("blobs", blob["digest"])
            for agent in ("curl/8", "crane/0.20", "containerd/2.1.4"):
                headers = {"User-Agent": agent, "Accept": f"{blob['mediaType']}, */*"}
                self.assertEqual(404, self.program.request("HEAD", path, headers).status, agent)
            self.assertEqual(blob["digest"], sha256(self.program.get(path).body))
            named = self.program.head(f"{path}?ns={self.program.address}")
            self.assertEqual((200, str(blob["size"])), (named.status, named.headers["Content-Length"]))

    def test_node_pulls_image_of_docker(self):
        image = self.build("1")
        lab.NODE.pull(image, self.program.address)  # the mirror is the own host of the image, so no ns
        self.assertEqual(self.engine.inspect(image)["Id"], lab.NODE.digest(image))
        self.assertEqual([], self.program.lines("?ns="))

    def test_another_docker_pulls_image_of_docker(self):
        """Docker sends HEAD first."""
        image = self.build("1")
        for other in ("classic", "classic-20", "containerd-26"):
            with self.subTest(other):
                engine = lab.ENGINES[other]
                self.addCleanup(engine.remove, image)
                engine.docker("pull", "-q", image)
                self.assertEqual("linux", engine.inspect(image)["Os"])

    def test_another_docker_builds_on_image_of_docker(self):
        """BuildKit sends HEAD first."""
        image = self.build("1")
        for other in ("classic", "containerd-26"):
            with self.subTest(other):
                engine = lab.ENGINES[other]
                self.addCleanup(engine.remove, f"{self.name}:built")
                engine.build(f"{self.name}:built", {"more": b"more"}, image)

    def test_read_only_clients(self):
        """They send GET, or send GET after HEAD returns 404."""
        image = self.build("1")
        digest = self.engine.inspect(image)["Id"]
        self.assertEqual(digest, self.crane("digest", image))
        for command in (["crane", "manifest", "--insecure", image],
                        ["oras", "manifest", "fetch", "--plain-http", image],
                        ["skopeo", "inspect", "--raw", "--tls-verify=false", f"docker://{image}"],
                        ["docker", "buildx", "imagetools", "inspect", "--raw", image]):
            with self.subTest(command[0]):
                out = lab.chroot(*command, text=False, env={"DOCKER_HOST": self.engine.host}).stdout
                self.assertIn(digest, (sha256(out), sha256(out.rstrip(b"\n"))))


class TestMounts(PromiseCase):
    def test_failed_mounts_start_an_upload(self):
        data = os.urandom(1000)
        digest = sha256(data)
        self.push_blob(data, f"{self.name}/other")
        for query in ("mount=sha256:abc", f"mount={digest}&from=", f"mount={digest}&from=app:1", "mount=",
                      f"mount={digest}&from=no/such", f"mount={digest}&from=UPPER"):
            with self.subTest(query):
                repository = f"{self.name}/{uuid.uuid4().hex[:6]}"
                answer = self.program.request("POST", f"/v2/{repository}/blobs/uploads/?{query}")
                self.assertEqual(202, answer.status, answer.body)
                location = answer.headers["Location"]
                self.assertRegex(location, rf"/v2/{repository}/blobs/uploads/[^/]+")
                location += f"{'&' if '?' in location else '?'}digest={digest}"
                done = self.program.request("PUT", location, {}, data)
                self.assertEqual(201, done.status, done.body)
                self.assertEqual(data, self.program.get(self.path("blobs", digest, repository)).body)

    def test_content_of_docker_is_not_mounted(self):
        self.build("1")
        image = self.image_of(self.program.get(self.path("manifests", "1")).json)
        digest = image["layers"][-1]["digest"]
        for repository in (self.name, f"{self.name}/other"):
            answer = self.program.request("POST", f"/v2/{repository}/blobs/uploads/?mount={digest}&from={self.name}")
            self.assertEqual(202, answer.status, answer.body)


class TestDockerIsDown(PromiseCase):
    def setUp(self):
        super().setUp()
        self.source = self.build("source")
        self.run_client("skopeo", "copy", "--src-tls-verify=false", f"docker://{self.source}",
                        f"oci:/lab/{self.name}/image:1")
        self.restart("unix:///nowhere")

    def manifest(self, *blobs):
        config, layer = blobs
        return json.dumps({"schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": described(config, OCI_CONFIG),
                           "layers": [described(layer, OCI_LAYER)]}).encode()

    def test_complete_push_does_not_need_docker(self):
        blobs = os.urandom(100), os.urandom(1000)
        manifest = self.manifest(*blobs)
        for blob in blobs:
            self.assertEqual(404, self.program.head(self.path("blobs", sha256(blob))).status)
            self.push_blob(blob)
            self.assertEqual(200, self.program.head(self.path("blobs", sha256(blob))).status)
        for reference in ("1", sha256(manifest)):
            self.assertEqual(404, self.program.head(self.path("manifests", reference)).status)
        self.assertEqual(201, self.put(manifest, OCI_MANIFEST, "1").status)
        for reference in ("1", sha256(manifest)):
            self.assertEqual(200, self.program.head(self.path("manifests", reference)).status)
        self.assertEqual([sha256(manifest)], self.assert_whole("1"))

    def test_clients(self):
        self.crane("push", f"/lab/{self.name}/image", f"{self.target}:crane")
        self.run_client("skopeo", "copy", "--dest-tls-verify=false", f"oci:/lab/{self.name}/image:1",
                        f"docker://{self.target}:skopeo")
        self.run_client("oras", "cp", "--from-oci-layout", "--to-plain-http", f"/lab/{self.name}/image:1",
                        f"{self.target}:oras")
        self.crane("tag", f"{self.target}:crane", "tagged")
        digests = self.assert_whole("crane", "skopeo", "oras", "tagged")
        self.assertEqual(1, len(set(digests)))

    def test_push_with_missing_blob_fails(self):
        blobs = os.urandom(100), os.urandom(1000)
        manifest = self.manifest(*blobs)
        self.push_blob(blobs[0])
        answer = self.put(manifest, OCI_MANIFEST, "1")
        self.assertIn((answer.status, answer.code), ((404, "MANIFEST_BLOB_UNKNOWN"), (503, "UNAVAILABLE")))
        for reference in ("1", sha256(manifest)):
            self.assertEqual(404, self.program.head(self.path("manifests", reference)).status)
        self.assertEqual({}, self.check_without_docker(), "nothing is kept")


class Ranges:
    """Several ranges in one request (RFC 9110, section 14), of a blob at self.blob with the content self.data."""

    def parts(self, answer):
        """Return the parts of a 206 response: [(first, last, bytes)]."""
        self.assertEqual(206, answer.status)
        self.assertEqual(str(len(answer.body)), answer.headers["Content-Length"])
        content_type = answer.headers["Content-Type"]
        if not content_type.startswith("multipart/"):
            return [self.part(answer.headers["Content-Range"], answer.body)]
        self.assertIsNone(answer.headers["Content-Range"])
        message = email.parser.BytesParser(policy=email.policy.HTTP).parsebytes(
            f"Content-Type: {content_type}\r\n\r\n".encode() + answer.body)
        self.assertEqual("multipart/byteranges", message.get_content_type())
        self.assertEqual([], message.defects)
        self.assertTrue(answer.body.rstrip(b"\r\n").endswith(f"--{message.get_boundary()}--".encode()))
        # The email package parses payloads as text, so the bytes are cut out of the body by the length in each part.
        found, rest = [], answer.body
        for part in message.iter_parts():
            self.assertEqual(OCTETS, part.get_content_type())
            head, separator, rest = rest.partition(b"\r\n\r\n")
            self.assertTrue(separator)
            first, last = map(int, re.match(r"bytes (\d+)-(\d+)/", part["Content-Range"]).groups())
            self.assertIn(f"--{message.get_boundary()}\r\n".encode(), head + b"\r\n")
            data, rest = rest[:last - first + 1], rest[last - first + 1:]
            self.assertTrue(rest.startswith(f"\r\n--{message.get_boundary()}".encode()))
            found.append(self.part(part["Content-Range"], data))
        return found

    def part(self, content_range, data):
        match = re.fullmatch(rf"bytes (\d+)-(\d+)/{len(self.data)}", content_range or "")
        self.assertIsNotNone(match, content_range)
        first, last = map(int, match.groups())
        self.assertEqual(last - first + 1, len(data))
        self.assertEqual(sha256(self.data[first:last + 1]), sha256(data), content_range)
        return first, last, data

    def get_ranges(self, ranges):
        return self.program.request("GET", self.blob, {"Range": ranges})

    def test_several_ranges(self):
        size = len(self.data)
        for ranges, expected in (
                ("bytes=0-99,1000-1099", [(0, 99), (1000, 1099)]),
                ("bytes=0-99, 1000-1099", [(0, 99), (1000, 1099)]),
                ("bytes=1000-1099,0-99", [(1000, 1099), (0, 99)]),
                ("bytes=0-0,-1", [(0, 0), (size - 1, size - 1)]),
                ("bytes=10-19,-50", [(10, 19), (size - 50, size - 1)]),
                (f"bytes=10-19,{size - 7}-", [(10, 19), (size - 7, size - 1)]),
                (f"bytes=10-19,{size - 7}-{size + 9}", [(10, 19), (size - 7, size - 1)]),
                ("bytes=" + ",".join(f"{i}-{i + 9}" for i in range(0, 400, 100)),
                 [(i, i + 9) for i in range(0, 400, 100)])):
            with self.subTest(ranges):
                answer = self.get_ranges(ranges)
                self.assertTrue((answer.headers["Content-Type"] or "").startswith("multipart/byteranges"))
                self.assertEqual(expected, [(first, last) for first, last, _ in self.parts(answer)])

    def test_unsatisfiable_ranges_are_left_out(self):
        """A single part may be sent as it is, or as a multipart with one part."""
        size = len(self.data)
        for ranges in (f"bytes=0-99,{size}-", f"bytes={size + 5}-{size + 9},0-99", "bytes=-0,0-99"):
            with self.subTest(ranges):
                self.assertEqual([(0, 99)], [(first, last) for first, last, _ in self.parts(self.get_ranges(ranges))])

    def test_overlapping_ranges(self):
        """They may be sent as they are, or merged."""
        for ranges, first, last in (("bytes=0-99,50-149", 0, 149), ("bytes=0-99,0-99", 0, 99),
                                    ("bytes=100-199,0-99", 0, 199), ("bytes=0-199,50-99", 0, 199)):
            with self.subTest(ranges):
                found = self.parts(self.get_ranges(ranges))
                covered = {position for start, end, _ in found for position in range(start, end + 1)}
                self.assertEqual(set(range(first, last + 1)), covered)

    def test_no_satisfiable_range_is_416(self):
        size = len(self.data)
        for ranges in (f"bytes={size}-,{size + 10}-{size + 20}", "bytes=-0,-0", f"bytes={size}-{size}"):
            with self.subTest(ranges):
                answer = self.get_ranges(ranges)
                self.assertEqual((416, f"bytes */{size}"), (answer.status, answer.headers["Content-Range"]))

    def test_thousand_ranges(self):
        for ranges in (",".join(f"{i * 3}-{i * 3}" for i in range(1000)), ",".join(["0-"] * 1000)):
            answer = self.get_ranges(f"bytes={ranges}")
            if answer.status == 200:
                self.assertEqual(sha256(self.data), sha256(answer.body))
            else:
                self.assertEqual(416, answer.status)

    def test_malformed_ranges(self):
        for ranges in ("bytes=a-b,0-9", "bytes=0-9,9-0", "bytes=0-9;20-29", "bytes=0-9,-", "bytes=0-9,--5",
                       "bytes=0-9 20-29", "bytes=0x1-9,20-29", "lines=0-9,20-29", "bytes 0-9,20-29", "bytes="):
            with self.subTest(ranges):
                answer = self.get_ranges(ranges)
                self.assertEqual((200, None), (answer.status, answer.headers["Content-Range"]))
                self.assertEqual(sha256(self.data), sha256(answer.body))

    def test_connection_stays_usable(self):
        """The Content-Length is exact, so the next request on the connection gets its own response."""
        connection = http.client.HTTPConnection("127.0.0.1", self.program.port, timeout=60)
        self.addCleanup(connection.close)
        for ranges in ("bytes=0-99,1000-1099", "bytes=5-9,-5") * 2:
            connection.request("GET", self.blob, headers={"Range": ranges})
            response = connection.getresponse()
            self.assertEqual(206, response.status)
            self.assertEqual(response.headers["Content-Length"], str(len(response.read())))


class TestRangesOfHostedBlobs(Ranges, PromiseCase):
    def setUp(self):
        super().setUp()
        self.data = os.urandom(50_000)
        self.blob = self.path("blobs", self.push_blob(self.data))


class TestRangesOfBlobsOfDocker(Ranges, PromiseCase):
    def setUp(self):
        super().setUp()
        self.build("1")
        image = self.image_of(self.program.get(self.path("manifests", "1")).json)
        layer = image["layers"][0]
        self.blob = f"{self.path('blobs', layer['digest'])}?ns={self.program.address}"
        self.data = self.engine.content(layer["digest"])


class TestRangesOfBlobsOfClassicDocker(Ranges, PromiseCase):
    engine = lab.ENGINES["classic"]

    def setUp(self):
        super().setUp()
        self.build("1")
        layer = self.image_of(self.program.get(self.path("manifests", "1")).json)["layers"][-2]
        self.blob = f"{self.path('blobs', layer['digest'])}?ns={self.program.address}"
        self.data = self.program.get(self.blob).body
        self.assertEqual(layer["digest"], sha256(self.data))


class TestHostedAndDocker(PromiseCase):
    """Hosted images and Docker's images under the same names."""

    def test_pushed_tag_that_hides_another_image_is_logged_once(self):
        image = self.build("1")
        self.engine.docker("push", image)
        pushed = self.digest()
        for _ in range(2):
            self.build("1")
            rebuilt = self.engine.inspect(image)["Id"]
            self.assertNotEqual(pushed, rebuilt)
            for count in range(3):
                answer = self.program.get(self.path("manifests", "1"), Accept=FOUR_TYPES, User_Agent="containerd/2.1.4")
                self.assertEqual((200, pushed), (answer.status, answer.headers["Docker-Content-Digest"]))
                self.program.wait_for_line(rebuilt)
                lines = [line for line in self.program.lines(rebuilt) if pushed in line and self.name in line]
                self.assertEqual(1, len(lines), (count, self.program.log))
                self.assertRegex(lines[0], " (WARNING|INFO) ")

    def test_pushed_tag_that_hides_nothing_is_not_logged(self):
        image = self.build("1")
        self.engine.docker("push", image)
        pushed = self.digest()
        before = len(self.program.lines(pushed))
        for _ in range(3):
            self.assertEqual(200, self.program.get(self.path("manifests", "1")).status)
        self.assertEqual([], [line for line in self.program.lines(pushed)[before:] if " WARNING " in line])

    def test_manifest_by_digest_only_in_its_repository(self):
        self.build("1", "--provenance=mode=max")
        index = self.program.get(self.path("manifests", "1"))
        digests = [index.headers["Docker-Content-Digest"], *(child["digest"] for child in index.json["manifests"])]
        self.assertEqual(3, len(digests))
        for digest in digests:
            with self.subTest(digest):
                answer = self.program.get(self.path("manifests", digest))
                self.assertEqual((200, digest), (answer.status, sha256(answer.body)))
                for other in (f"{self.name}/other", f"other/{self.name}", "base"):
                    answer = self.program.get(self.path("manifests", digest, other))
                    self.assertEqual(404, answer.status, other)
                    self.assertEqual("MANIFEST_UNKNOWN", answer.code)

    def test_deleting_docker_images_is_405(self):
        image = self.build("1")
        digest = self.program.get(self.path("manifests", "1")).headers["Docker-Content-Digest"]
        for reference in ("1", digest):
            answer = self.program.request("DELETE", self.path("manifests", reference))
            self.assertEqual((405, "UNSUPPORTED"), (answer.status, answer.code))
        self.assertEqual(digest, self.engine.inspect(image)["Id"])

    def test_delete_removes_only_hosted_content(self):
        """After the deletion GET returns Docker's image of that name again."""
        image = self.build("1")
        self.engine.docker("push", image)
        digest = self.digest()
        self.assertEqual(202, self.program.request("DELETE", self.path("manifests", digest)).status)
        self.assertEqual(404, self.program.head(self.path("manifests", "1")).status)
        self.assertEqual(digest, self.program.get(self.path("manifests", "1")).headers["Docker-Content-Digest"])
        self.assertEqual(405, self.program.request("DELETE", self.path("manifests", digest)).status)


if __name__ == "__main__":
    unittest.main()
