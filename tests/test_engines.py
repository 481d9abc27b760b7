"""Real engines, real origins, and a real containerd as the node. lab.py says how to start them."""

import base64
import concurrent.futures
import hashlib
import json
import os
import shutil
import socket
import tempfile
import unittest
import uuid
from pathlib import Path

import lab
from program import MODULE, Program

OCI_INDEX = "application/vnd.oci.image.index.v1+json"
MIB = 1024 * 1024


def sha256(data):
    return "sha256:" + hashlib.sha256(data).hexdigest()


def basic(user, password):
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


def together(count, call):
    """Call a function from several threads at once; return the results."""
    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        return [future.result() for future in [pool.submit(call, i) for i in range(count)]]


class EngineCase(unittest.TestCase):
    """Tests against one engine. Each test has a new program and a new repository name."""

    engine: lab.Engine

    @classmethod
    def setUpClass(cls):
        lab.require()

    def setUp(self):
        self.name = f"t{uuid.uuid4().hex[:10]}"
        self.images = []
        lab.NODE.forget()
        self.addCleanup(lambda: self.engine.remove(*self.images))

    def program(self, *arguments, **options):
        program = Program(f"unix://{self.engine.socket}", *arguments, **options)
        self.addCleanup(program.__exit__)
        return program

    def build(self, tag="1", files=None, *options, name=None):
        image = f"{name or self.name}:{tag}"
        self.images.append(image)
        return self.engine.build(image, files or {"hello": uuid.uuid4().bytes}, "base:1", *options)

    def pull(self, program, reference, **options):
        return lab.NODE.pull(reference, program.address, **options)

    def manifest_path(self, target, ns="docker.io", name=None):
        return f"/v2/library/{name or self.name}/manifests/{target}?ns={ns}"

    def on_origin(self, origin="open", files=None):
        """Make an image that only an origin has. Returns (reference, its digest there)."""
        self.build("origin", files)
        digest = lab.ORIGINS[origin].push(self.engine, f"{self.name}:origin", f"lab/{self.name}:1")
        self.engine.remove(f"{self.name}:origin")
        reference = f"{lab.ORIGINS[origin].host}/lab/{self.name}"
        self.images += [f"{reference}:1", f"{reference}@{digest}"]
        return f"{reference}:1", digest

    def origin_path(self, target, origin="open"):
        return f"/v2/lab/{self.name}/manifests/{target}?ns={lab.ORIGINS[origin].host}"


class EveryEngine:
    """Tests that hold for every engine, with either image store."""

    def test_pull_by_tag(self):
        image_id = self.build("1", {"one": b"1" * 100_000, "two": b"2"})
        program = self.program()
        reference = f"docker.io/library/{self.name}:1"
        self.pull(program, reference)
        digest = lab.NODE.digest(reference)
        manifest = lab.NODE.content(digest)
        self.assertEqual(digest, sha256(manifest))
        self.check_identity(image_id, digest, json.loads(manifest))

    def test_lists_for_many_clients(self):
        """200 clients ask at the same time: the answers are complete, and Docker is asked much less often."""
        tags, heard = ["1", "2", "3"], []
        for tag in tags:
            self.build(tag)
        with lab.filtered(self.engine, hear=heard.append) as socket_path, Program(f"unix://{socket_path}") as program:
            del heard[:]
            answers = together(200, lambda i: program.get(
                "/v2/_catalog" if i % 2 else f"/v2/{self.name}/tags/list"))
        self.assertEqual({200}, {answer.status for answer in answers})
        self.assertEqual({tuple(tags)}, {tuple(answer.json["tags"]) for answer in answers[::2]})
        self.assertTrue(all(self.name in answer.json["repositories"] for answer in answers[1::2]))
        self.assertLess(sum(b"/images/json" in data for data in heard), 100)

    def test_head_and_get_agree(self):
        self.build()
        program = self.program()
        path = self.manifest_path("1")
        head, get = program.head(path), program.get(path)
        self.assertEqual(200, head.status)
        self.assertEqual(b"", head.body)
        self.assertEqual(json.loads(get.body)["mediaType"], get.headers["Content-Type"])
        self.assertEqual(sha256(get.body), get.headers["Docker-Content-Digest"])
        self.assertEqual("docker.io", get.headers["OCI-Namespace"])
        self.assertEqual(str(len(get.body)), get.headers["Content-Length"])
        self.assertIsNone(get.headers["Content-Encoding"])
        for header in ("Content-Type", "Content-Length", "Docker-Content-Digest", "OCI-Namespace"):
            self.assertEqual(get.headers[header], head.headers[header], header)
        by_digest = program.get(self.manifest_path(get.headers["Docker-Content-Digest"]))
        self.assertEqual((200, get.body), (by_digest.status, by_digest.body))

    def test_names_without_host_and_with_own_host(self):
        self.build()
        program = self.program()
        nested = f"nested/{self.name}/deep"
        own = f"{program.address}/{self.name}-own"
        for image in (nested, own):
            self.engine.docker("tag", f"{self.name}:1", f"{image}:1")
            self.images.append(f"{image}:1")
        expected = program.get(self.manifest_path("1")).headers["Docker-Content-Digest"]
        for path in (f"/v2/{self.name}/manifests/1", f"/v2/library/{self.name}/manifests/1",
                     f"/v2/{nested}/manifests/1", f"/v2/{nested}/manifests/1?ns=docker.io",
                     f"/v2/{self.name}-own/manifests/1", f"/v2/{self.name}-own/manifests/1?ns={program.address}"):
            with self.subTest(path):
                self.assertEqual(expected, program.get(path).headers["Docker-Content-Digest"])
        self.assertEqual(404, program.get(f"/v2/{self.name}/manifests/2").status)
        self.assertEqual([], program.jobs("pull"), "nothing is pulled without ns")

    def test_blobs_and_ranges(self):
        content = os.urandom(300_000)
        self.build("1", {"data": content})
        program = self.program()
        manifest = self.image_manifest(program)
        layer = manifest["layers"][-1]
        path = f"/v2/library/{self.name}/blobs/{layer['digest']}?ns=docker.io"
        head, whole = program.head(path), program.get(path)
        self.assertEqual((200, str(layer["size"]), layer["digest"]),
                         (head.status, head.headers["Content-Length"], head.headers["Docker-Content-Digest"]))
        self.assertEqual(layer["digest"], sha256(whole.body))
        size = layer["size"]
        for wanted, status, start, end in (
                ("bytes=0-99", 206, 0, 100), ("bytes=100-", 206, 100, size), ("bytes=-50", 206, size - 50, size),
                (f"bytes=5-{size + 9}", 206, 5, size), (f"bytes=-{size + 9}", 206, 0, size),
                ("lines=1-2", 200, 0, size)):
            with self.subTest(wanted):
                part = program.get(path, Range=wanted)
                self.assertEqual(status, part.status)
                self.assertEqual(whole.body[start:end], part.body)
                expected = f"bytes {start}-{end - 1}/{size}" if status == 206 else None
                self.assertEqual(expected, part.headers["Content-Range"])
        beyond = program.get(path, Range=f"bytes={size}-")
        self.assertEqual((416, f"bytes */{size}"), (beyond.status, beyond.headers["Content-Range"]))

    def test_manifest_is_not_a_blob(self):
        self.build()
        program = self.program()
        digest = program.head(self.manifest_path("1")).headers["Docker-Content-Digest"]
        for method in ("GET", "HEAD"):
            answer = program.request(method, f"/v2/library/{self.name}/blobs/{digest}?ns=docker.io")
            self.assertEqual(404, answer.status)
        self.assertEqual("BLOB_UNKNOWN", program.get(f"/v2/library/{self.name}/blobs/{digest}").code)

    def test_moved_tag_is_served_at_once(self):
        self.build("1", {"a": b"first"})
        self.build("2", {"a": b"second"})
        program = self.program()
        first, second = (program.head(self.manifest_path(tag)).headers["Docker-Content-Digest"] for tag in "12")
        self.assertNotEqual(first, second)
        self.engine.docker("tag", f"{self.name}:2", f"{self.name}:1")
        self.assertEqual(second, program.head(self.manifest_path("1")).headers["Docker-Content-Digest"])
        rebuilt = self.build("1", {"a": b"third"})
        reference = f"docker.io/library/{self.name}:1"
        self.pull(program, reference)
        digest = lab.NODE.digest(reference)
        self.check_identity(rebuilt, digest, json.loads(lab.NODE.content(digest)))

    def test_concurrent_requests_share_one_pull(self):
        reference, _ = self.on_origin(files={"data": os.urandom(3_000_000)})
        program = self.program()
        answers = together(8, lambda i: program.request("GET" if i % 2 else "HEAD", self.origin_path("1")))
        self.assertEqual([200] * 8, [answer.status for answer in answers])
        self.assertEqual(1, len({answer.headers["Docker-Content-Digest"] for answer in answers}))
        self.assertEqual(1, len(program.lines(f"pull {reference}: started")))
        self.assertEqual(1, len(program.lines(f"pull {reference}: done")))
        self.pull(program, reference)

    def test_client_disconnect_does_not_cancel_the_pull(self):
        reference, _ = self.on_origin(files={"data": os.urandom(3_000_000)})
        program = self.program()
        with socket.create_connection(("127.0.0.1", program.port)) as client:
            client.sendall(f"GET {self.origin_path('1')} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            program.wait_for_line(f"pull {reference}: started")
        program.wait_for_line(f"pull {reference}: done")
        self.engine.inspect(reference)

    def test_credentials(self):
        reference, _ = self.on_origin("private")
        host = lab.ORIGINS["private"].host
        missing = f"/v2/lab/nothing-{self.name}/manifests/1?ns={host}"
        program = self.program()
        right, wrong = basic(lab.USER, lab.PASSWORD), basic(lab.USER, "wr0ng")
        challenge = f'Basic realm="{host}"'
        for what, path, authorization, status, expected in (
                ("none", self.origin_path("1", "private"), None, 401, challenge),
                ("wrong", self.origin_path("1", "private"), wrong, 401, None),
                ("none, missing image", missing, None, 401, challenge),
                ("right, missing image", missing, right, 404, None),
                ("malformed", missing, "Basic ===", 400, None),
                ("right", self.origin_path("1", "private"), right, 200, None)):
            with self.subTest(what):
                answer = program.get(path, **({"Authorization": authorization} if authorization else {}))
                self.assertEqual((status, expected), (answer.status, answer.headers["WWW-Authenticate"]), answer.body)
        self.engine.remove(reference)
        self.pull(program, reference, user=f"{lab.USER}:{lab.PASSWORD}")
        self.engine.remove(reference)
        lab.NODE.forget()
        self.assertNotEqual(0, self.pull(program, reference, user=f"{lab.USER}:wr0ng", check=False).returncode)
        log = "\n".join(program.log)
        for secret in (lab.PASSWORD, "wr0ng", right.split()[1], wrong.split()[1]):
            self.assertNotIn(secret, log)

    def test_credentials_from_config_json(self):
        """config.json is used if the request has no credentials. Those in the request take precedence."""
        self.on_origin("private")
        path = self.origin_path("1", "private")
        for what, config, authorization, status in (
                ("those of the host", f"{lab.USER}:{lab.PASSWORD}", None, 200),
                ("wrong ones of the pod take precedence", f"{lab.USER}:{lab.PASSWORD}", basic(lab.USER, "wr0ng"), 401),
                ("right ones of the pod take precedence", "somebody:else", basic(lab.USER, lab.PASSWORD), 200),
                ("wrong ones of the host", "somebody:else", None, 401)):
            with self.subTest(what), tempfile.TemporaryDirectory() as folder:
                auths = {lab.ORIGINS["private"].host: {"auth": basic(*config.split(":")).split()[1]}}
                (Path(folder) / "config.json").write_text(json.dumps({"auths": auths}))
                self.engine.remove(*self.images[1:])
                with self.program(env={"DOCKER_CONFIG": folder}) as program:
                    answer = program.get(path, **({"Authorization": authorization} if authorization else {}))
                    self.assertEqual(status, answer.status, answer.body)
                    self.assertEqual(status == 401 and not authorization, "WWW-Authenticate" in answer.headers)
                    self.assertNotIn(lab.PASSWORD, "\n".join(program.log))

    def test_pull_failures(self):
        program = self.program()
        unreachable = f"127.0.0.1:1/lab/{self.name}:1"
        for what, path, authorization, status in (
                ("no such repository", f"/v2/lab/no-{self.name}/manifests/1?ns={lab.ORIGINS['open'].host}", None, 401),
                ("the same, logged in", f"/v2/lab/no-{self.name}/manifests/1?ns={lab.ORIGINS['open'].host}",
                 basic("a", "b"), 404),
                ("registry down", f"/v2/lab/{self.name}/manifests/1?ns=127.0.0.1:1", None, 502)):
            with self.subTest(what):
                answer = program.get(path, **({"Authorization": authorization} if authorization else {}))
                self.assertEqual(status, answer.status, answer.body)
        self.assertIn("connection refused", program.get(f"/v2/lab/{self.name}/manifests/1?ns=127.0.0.1:1").detail)
        program.wait_for_line(f"pull {unreachable}: failed")

    def test_origin_error_statuses(self):
        program = self.program()
        for what, status, body, expected, code in (
                ("rate limit", 429, "TOOMANYREQUESTS", 429, "TOOMANYREQUESTS"),
                ("denied", 403, "DENIED", 401, "UNAUTHORIZED"),
                ("broken", 500, "UNKNOWN", 502, "ORIGIN_UNAVAILABLE")):
            with self.subTest(what), lab.refusing_origin(status, body) as host:
                answer = program.get(f"/v2/lab/{self.name}/manifests/1?ns={host}")
                self.assertEqual((expected, code), (answer.status, answer.code), answer.body)

    def test_origin_with_token_authentication(self):
        self.build("origin")
        lab.ORIGINS["open"].push(self.engine, f"{self.name}:origin", f"lab/{self.name}:1")
        with lab.TokenOrigin(lab.ORIGINS["open"], private=True) as origin:
            program = self.program()
            reference, path = f"{origin.host}/lab/{self.name}:1", f"/v2/lab/{self.name}/manifests/1?ns={origin.host}"
            self.images.append(reference)
            answer = program.get(path)
            self.assertEqual((401, "UNAUTHORIZED"), (answer.status, answer.code))
            self.assertEqual(f'Basic realm="{origin.host}"', answer.headers["WWW-Authenticate"])
            wrong = program.get(path, Authorization=basic(lab.USER, "wrong"))
            self.assertEqual((401, None), (wrong.status, wrong.headers["WWW-Authenticate"]))
            self.pull(program, reference, user=f"{lab.USER}:{lab.PASSWORD}")
            self.assertFalse(program.lines(lab.PASSWORD))

    def test_malformed_manifest_from_origin(self):
        with lab.TokenOrigin(lab.ORIGINS["open"]) as origin:
            origin.answers = {"/manifests/": (200, b"<html>garbage")}
            answer = self.program().get(f"/v2/lab/{self.name}/manifests/1?ns={origin.host}")
            self.assertEqual(502, answer.status, answer.body)

    def test_ten_concurrent_nodes(self):
        self.build("1", {f"file{i}": os.urandom(2_000_000) for i in range(3)})
        program = self.program()
        layers = [layer["digest"] for layer in self.image_manifest(program)["layers"]][-3:]
        path = f"/v2/library/{self.name}/blobs/{{}}?ns=docker.io"
        answers = together(30, lambda i: program.get(path.format(layers[i % 3])))
        self.assertEqual([layers[i % 3] for i in range(30)], [sha256(answer.body) for answer in answers])

    def test_memory_with_ten_concurrent_nodes(self):
        self.build("1", {f"file{i}": os.urandom(MIB) * 24 for i in range(3)})
        program = self.program()
        layers = [layer["digest"] for layer in self.image_manifest(program)["layers"]][-3:]
        path = f"/v2/library/{self.name}/blobs/{{}}?ns=docker.io"

        def read(i):
            response = program.begin_get(path.format(layers[i % 3]))
            found = hashlib.sha256()
            while data := response.read(MIB):
                found.update(data)
            return "sha256:" + found.hexdigest()

        self.assertEqual([layers[i % 3] for i in range(30)], together(30, read))
        self.assertLess(program.peak_memory(), 64 * MIB)

    def test_memory_does_not_depend_on_layer_size(self):
        self.build("1", {"data": os.urandom(MIB) * 96})
        program = self.program()
        self.pull(program, f"docker.io/library/{self.name}:1")
        self.assertLess(program.peak_memory(), 64 * MIB)

    def test_daemon_restart(self):
        self.build()
        program = self.program()
        path = self.manifest_path("1")
        self.assertEqual(200, program.head(path).status)
        self.engine.stop()
        try:
            down = program.get(self.manifest_path("other"))
            self.assertEqual((503, "UNAVAILABLE"), (down.status, down.code))
            self.assertRegex(down.detail, "is Docker running|Docker is not running")
        finally:
            self.engine.start()
        self.assertEqual(200, program.head(path).status)
        self.pull(program, f"docker.io/library/{self.name}:1")

    def test_other_clients(self):
        self.build()
        program = self.program()
        reference = f"{program.address}/library/{self.name}:1"
        digest = program.head(self.manifest_path("1")).headers["Docker-Content-Digest"]
        self.assertEqual(digest, lab.chroot("crane", "digest", "--insecure", reference).stdout.strip())
        lab.chroot("crane", "pull", "--insecure", "--platform", "linux/amd64", reference, "/dev/null")
        manifest = lab.chroot("oras", "manifest", "fetch", "--plain-http", reference, text=False).stdout
        self.assertEqual(digest, sha256(manifest))
        folder = f"/lab/{self.name}"
        self.addCleanup(shutil.rmtree, lab.SHARE / self.name, ignore_errors=True)
        lab.chroot("skopeo", "copy", "--src-tls-verify=false", f"docker://{reference}", f"dir:{folder}")
        self.assertTrue((lab.SHARE / self.name / "manifest.json").exists())

    def image_manifest(self, program):
        """Return the image manifest of this platform behind tag 1."""
        manifest = program.get(self.manifest_path("1")).json
        if "manifests" in manifest:
            manifest = program.get(self.manifest_path(manifest["manifests"][0]["digest"])).json
        return manifest


class ContainerdStore(EveryEngine):
    """Tests for the containerd image store: the node gets exactly the manifests that Docker has."""

    def check_identity(self, image_id, digest, manifest):
        self.assertEqual(image_id, digest)

    def test_pull_by_digest(self):
        origin = lab.ORIGINS["open"]
        digest, _ = lab.push_platforms(origin, f"lab/{self.name}", "1", ["amd64"])
        by_digest = f"{origin.host}/lab/{self.name}@{digest}"
        self.images.append(by_digest)
        program = self.program()
        self.pull(program, by_digest)
        self.assertEqual(digest, lab.NODE.digest(by_digest))
        lab.NODE.forget()
        self.pull(program, by_digest)  # Docker has it by now
        self.assertEqual(1, len(program.jobs("pull")))

    def test_store_stays_empty(self):
        self.build()
        program = self.program()
        self.pull(program, f"docker.io/library/{self.name}:1")
        self.assertFalse(program.store.exists())

    def test_ten_nodes_cause_two_reads_from_docker(self):
        """One read is for the first node, the other one is shared by all others."""
        size = 48 * MIB
        self.build("1", {"data": os.urandom(MIB) * 48})
        sent = []
        with lab.filtered(self.engine, tell=sent.append) as socket_path:
            program = Program(f"unix://{socket_path}")
            self.addCleanup(program.__exit__)
            layer = self.image_manifest(program)["layers"][-1]
            sent.clear()
            responses = [program.begin_get(f"/v2/library/{self.name}/blobs/{layer['digest']}?ns=docker.io")
                         for _ in range(10)]
            answers = together(10, lambda i: sha256(responses[i].read()))
        self.assertEqual({layer["digest"]}, set(answers))
        self.assertLess(sum(sent), 2.5 * min(size, layer["size"]))
        self.assertEqual([], list(program.store.iterdir()), "the store must be empty")

    def test_index_with_attestation(self):
        image_id = self.build("1", None, "--provenance=mode=max")
        program = self.program()
        answer = program.get(self.manifest_path("1"))
        self.assertEqual(OCI_INDEX, answer.headers["Content-Type"])
        self.assertEqual(image_id, answer.headers["Docker-Content-Digest"])
        kinds = [m.get("annotations", {}).get("vnd.docker.reference.type") for m in answer.json["manifests"]]
        self.assertEqual([None, "attestation-manifest"], kinds)
        for child in answer.json["manifests"]:
            manifest = program.get(self.manifest_path(child["digest"]))
            self.assertEqual((child["digest"], child["mediaType"]),
                             (sha256(manifest.body), manifest.headers["Content-Type"]))
        reference = f"docker.io/library/{self.name}:1"
        self.pull(program, reference)
        self.assertEqual(image_id, lab.NODE.digest(reference))

    def test_an_id_is_no_tag(self):
        image_id = self.build("1")
        answer = self.program().get(f"/v2/sha256/manifests/{image_id.removeprefix('sha256:')}")
        self.assertEqual((404, "MANIFEST_UNKNOWN"), (answer.status, answer.code))

    def test_platform_missing_in_docker(self):
        """Docker has one platform of an index. The other one is 404, and no pull is started for it."""
        origin = lab.ORIGINS["open"]
        index, (mine, foreign) = lab.push_platforms(origin, f"lab/{self.name}", "1", ["amd64", "arm64"])
        program = self.program()
        self.images.append(f"{origin.host}/lab/{self.name}:1")
        answer = program.get(self.origin_path("1"))
        self.assertEqual((200, index), (answer.status, answer.headers["Docker-Content-Digest"]))
        self.assertEqual(200, program.get(self.origin_path(mine)).status)
        other = program.get(self.origin_path(foreign))
        self.assertEqual((404, "MANIFEST_UNKNOWN"), (other.status, other.code))
        self.assertIn("--platform", other.detail)
        self.assertEqual(1, len(program.jobs("pull")))

    def test_one_platform_of_several_cannot_be_imported_but_pulled(self):
        """Docker has one platform of an index. What `k3d image import` and `kind load` do with it fails at the
        manifest of another platform. A node gets the image from here, with the digest that its registry gave it."""
        origin = lab.ORIGINS["open"]
        index, (mine, foreign) = lab.push_platforms(origin, f"lab/{self.name}", "1", ["amd64", "arm64"])
        reference = f"{origin.host}/lab/{self.name}:1"
        self.images.append(reference)
        self.engine.docker("pull", "-q", reference)
        archive = self.engine.docker("save", reference, text=False)
        imported = lab.NODE.ctr("images", "import", "--all-platforms", "-", input=archive, text=False, check=False)
        self.assertNotEqual(0, imported.returncode)
        self.assertIn(f"content digest {foreign}: not found", imported.stderr.decode())
        lab.NODE.forget()

        program = self.program()
        self.pull(program, reference, platform="linux/amd64")
        self.assertEqual(index, lab.NODE.digest(reference))
        manifest = json.loads(lab.NODE.content(mine))
        for blob in (manifest["config"], *manifest["layers"]):
            self.assertEqual(blob["digest"], sha256(lab.NODE.content(blob["digest"])))
        self.assertEqual([], program.jobs("pull"), "it comes out of Docker")

    def test_engine_without_content_service(self):
        """The image is exported instead, and the digests stay the same."""
        image_id = self.build("1", None, "--provenance=mode=max")
        with lab.filtered(self.engine, refuse=b"/grpc") as socket_path:
            program = Program(f"unix://{socket_path}")
            self.addCleanup(program.__exit__)
            program.wait_for_line("content from: store, export")
            program.wait_for_line("images are exported one by one")
            reference = f"docker.io/library/{self.name}:1"
            self.pull(program, reference)
            self.assertEqual(image_id, lab.NODE.digest(reference))
            self.assertEqual(1, len(program.jobs("export")))

    def test_content_directory(self):
        """Run the program where Docker's data folder can be read: inside the lab's root, with that root's Python."""
        image_id = self.build()
        copy = lab.SHARE / f"{self.name}.py"
        shutil.copy(MODULE, copy)
        self.addCleanup(copy.unlink)
        program = Program(self.engine.host, command=["chroot", str(lab.CLIENT_ROOT), "python3", f"/lab/{copy.name}"],
                          store="/tmp/unused")
        self.addCleanup(program.__exit__)
        program.wait_for_line("content from: store, content directory /lab/")
        reference = f"docker.io/library/{self.name}:1"
        self.pull(program, reference)
        self.assertEqual(image_id, lab.NODE.digest(reference))


class ClassicStore(EveryEngine):
    """Tests for the classic image store: the node gets Docker's image, with a manifest made from the export."""

    def check_identity(self, image_id, digest, manifest):
        self.assertEqual(image_id, manifest["config"]["digest"])

    def test_concurrent_requests_share_one_export(self):
        image_id = self.build("1", {"data": os.urandom(3_000_000)})
        program = self.program()
        answers = together(8, lambda _: program.get(self.manifest_path("1")))
        self.assertEqual({200}, {answer.status for answer in answers})
        self.engine.docker("tag", f"{self.name}:1", f"{self.name}:2")
        self.images.append(f"{self.name}:2")
        self.assertEqual(answers[0].body, program.get(self.manifest_path("2")).body)
        self.assertEqual(1, len(program.jobs(f"export {self.name}:1, {image_id}")))

    def test_layers_are_stored_once(self):
        data = os.urandom(1_000_000)
        self.build("1", {"data": data})
        self.build("2", {"data": data, "more": b"more"})
        program = self.program()
        program.get(self.manifest_path("1"))
        before = {path.name for path in program.store.glob("blobs/*/*")}
        program.get(self.manifest_path("2"))
        after = {path.name for path in program.store.glob("blobs/*/*")}
        self.assertTrue(before <= after)
        self.assertEqual(3, len(after - before), "a manifest, a config, a layer")
        for path in program.store.glob("blobs/*/*"):
            self.assertEqual(path.name, hashlib.sha256(path.read_bytes()).hexdigest())

    def test_restart_with_and_without_the_store(self):
        self.build()
        with self.program() as program:
            manifest = program.get(self.manifest_path("1")).json
            kept = Path(shutil.copytree(program.store, f"{program.store}-kept"))
            again = self.program(store=kept)
            self.assertEqual(200, again.head(self.manifest_path("1")).status)
            self.assertEqual([], again.jobs("export"))
            again.stop()
        fresh = self.program()
        for blob in (manifest["config"], manifest["layers"][-1]):
            path = f"/v2/library/{self.name}/blobs/{blob['digest']}?ns=docker.io"
            self.assertEqual(blob["digest"], sha256(fresh.get(path).body), "a node may still have the manifest")

    def test_export_with_error_at_the_end(self):
        """A file is missing in Docker's own data, so the response starts well and ends with an error."""
        image_id = self.build("1", {"data": os.urandom(100_000), "gone": b"gone"})
        folder = Path(self.engine.inspect(f"{self.name}:1")["GraphDriver"]["Data"]["UpperDir"])
        victim = lab.SHARE / folder.relative_to("/lab") / "gone"
        data = victim.read_bytes()
        victim.unlink()
        program = self.program()
        answer = program.get(self.manifest_path("1"))
        self.assertEqual((502, "ENGINE_FAILED"), (answer.status, answer.code), answer.body)
        self.assertIn("no such file or directory", answer.detail)
        self.assertEqual([], list(program.store.glob("*/*/*")))
        victim.write_bytes(data)
        victim.chmod(0o755)
        os.utime(victim, (0, 0))
        answer = program.get(self.manifest_path("1"))
        self.assertEqual((200, image_id), (answer.status, answer.json["config"]["digest"]), answer.body)


class TestContainerd(ContainerdStore, EngineCase):
    engine = lab.ENGINES["containerd"]


class TestContainerd26(ContainerdStore, EngineCase):
    engine = lab.ENGINES["containerd-26"]


class TestClassic(ClassicStore, EngineCase):
    engine = lab.ENGINES["classic"]


class TestClassic20(ClassicStore, EngineCase):
    engine = lab.ENGINES["classic-20"]


if __name__ == "__main__":
    unittest.main()
