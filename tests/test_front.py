"""Which registry answers a request: the one with hosted content, or Docker's. Each test is a table of requests."""

import json
import re
import time
import unittest

from fake_daemon import FakeDaemon, Image, chunked, http_answer, sha256
from program import Program

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
INDEX = "application/vnd.oci.image.index.v1+json"
NODE = {"User-Agent": "containerd/2.1.4", "Accept": f"{MANIFEST}, {INDEX}, */*"}
CRANE = {"User-Agent": "crane/0.20", "Accept": f"{MANIFEST}, {INDEX}, */*"}
PUSHER = {"User-Agent": "containerd/2.1.4", "Accept": f"{MANIFEST}, */*"}


class FrontCase(unittest.TestCase):
    """both:1 is hosted, and Docker has another image of that name. pushed:1 and docker:1 are in one place only."""

    @classmethod
    def setUpClass(cls):
        cls.daemon = FakeDaemon()
        cls.daemon.__enter__()
        cls.addClassCleanup(cls.daemon.__exit__)
        cls.program = Program(cls.daemon.host)
        cls.addClassCleanup(cls.program.__exit__)
        cls.images = {name: Image(name)
                      for name in ("pushed", "both, pushed", "both, Docker's", "docker", "quay", "far")}
        cls.push("pushed", cls.images["pushed"])
        cls.push("both", cls.images["both, pushed"])
        cls.daemon.add("both:1", cls.images["both, Docker's"])
        cls.daemon.add("docker:1", cls.images["docker"])
        cls.daemon.add("quay.io/team/quay:1", cls.images["quay"])
        cls.names = {image.digest: name for name, image in cls.images.items()}

    @classmethod
    def push(cls, repository, image, tag="1"):
        for blob in (image.config, image.layer):
            cls.program.request("POST", f"/v2/{repository}/blobs/uploads/?digest={sha256(blob)}", body=blob)
        answer = cls.program.request("PUT", f"/v2/{repository}/manifests/{tag}", {"Content-Type": MANIFEST},
                                     image.manifest)
        assert answer.status == 201, answer.body

    def tearDown(self):
        self.assertEqual([], self.program.lines("a bug in this program"))

    def answering_image(self, method, path, headers=None):
        """Return the name of the image in the response, or the status."""
        answer = self.program.request(method, path, headers or {})
        return self.names.get(answer.headers["Docker-Content-Digest"], answer.status)

    def check(self, *rows):
        for method, path, headers, expected in rows:
            with self.subTest(method=method, path=path, agent=(headers or {}).get("User-Agent")):
                self.assertEqual(expected, self.answering_image(method, path, headers))

    def pulls(self):
        return [line for line in self.daemon.requests if "/images/create" in line]


class TestFront(FrontCase):
    def test_namespace_of_another_registry(self):
        """The response is the image that Docker has or pulls, never a hosted one."""
        for method in ("GET", "HEAD"):
            for headers in (None, NODE, CRANE, PUSHER):
                self.check((method, "/v2/library/both/manifests/1?ns=docker.io", headers, "both, Docker's"),
                           (method, "/v2/library/docker/manifests/1?ns=docker.io", headers, "docker"),
                           (method, "/v2/library/pushed/manifests/1?ns=docker.io", headers, 401),
                           (method, "/v2/team/quay/manifests/1?ns=quay.io", headers, "quay"))

    def test_namespace_of_this_registry(self):
        """Hosted content comes first, then Docker's image of that name. HEAD and GET agree."""
        self.daemon.add("k3d-x:5000/own:1", self.images["docker"])
        for method in ("GET", "HEAD"):
            for ns in ("k3d-x:5000", "k3d-x:12345"):
                host = {"Host": "k3d-x:5000"}
                self.check((method, f"/v2/both/manifests/1?ns={ns}", host, "both, pushed"),
                           (method, f"/v2/pushed/manifests/1?ns={ns}", host, "pushed"))
            self.check((method, "/v2/own/manifests/1?ns=k3d-x:5000", host, "docker"))

    def test_namespace_of_another_local_registry(self):
        """It may be an alias of this registry. If not, Docker pulls from it."""
        far = self.images["far"]
        self.daemon.pulls["localhost:7777/far:1"] = lambda: self.daemon.add("localhost:7777/far:1", far) and chunked(
            b'{"status":"done"}')
        self.check(("HEAD", "/v2/both/manifests/1?ns=localhost:7777", NODE, "both, pushed"),
                   ("HEAD", "/v2/far/manifests/1?ns=localhost:7777", NODE, "far"))
        self.assertEqual(1, len([line for line in self.pulls() if "localhost" in line]))

    def test_get_without_namespace(self):
        self.check(("GET", "/v2/both/manifests/1", None, "both, pushed"),
                   ("GET", "/v2/pushed/manifests/1", None, "pushed"),
                   ("GET", "/v2/docker/manifests/1", None, "docker"), ("GET", "/v2/far/manifests/1", None, 404),
                   ("GET", "/v2/library/docker/manifests/1", None, "docker"))
        self.assertEqual([], [line for line in self.pulls() if "fromImage=far" in line])

    def test_manifest_by_digest_without_namespace(self):
        """It is found only if Docker has an image with that digest in this repository."""
        digest = self.images["docker"].digest
        self.check(("GET", f"/v2/docker/manifests/{digest}", None, "docker"),
                   ("GET", f"/v2/other/manifests/{digest}", None, 404),
                   ("GET", f"/v2/other/manifests/{digest}?ns=docker.io", None, "docker"),
                   ("HEAD", f"/v2/docker/manifests/{digest}", CRANE, 404),
                   ("HEAD", f"/v2/docker/manifests/{digest}", NODE, "docker"))

    def test_blobs(self):
        ours, theirs = sha256(self.images["pushed"].layer), sha256(self.images["docker"].layer)
        for method, path, status in (
                ("GET", f"/v2/pushed/blobs/{ours}", 200), ("HEAD", f"/v2/pushed/blobs/{ours}", 200),
                ("GET", f"/v2/other/blobs/{ours}", 404), ("HEAD", f"/v2/other/blobs/{ours}", 404),
                ("GET", f"/v2/other/blobs/{theirs}", 200), ("HEAD", f"/v2/other/blobs/{theirs}", 404),
                ("HEAD", f"/v2/other/blobs/{theirs}?ns=docker.io", 200),
                ("GET", f"/v2/pushed/blobs/{ours}?ns=docker.io", 404)):
            with self.subTest(method=method, path=path):
                self.assertEqual(status, self.program.request(method, path, NODE).status)

    def test_head_without_namespace(self):
        """HEAD is taken as the start of a push, unless a client that uses containerd's library is about to pull."""
        for headers, docker in ((None, 404), (CRANE, 404), (PUSHER, 404), (NODE, "docker")):
            self.check(("HEAD", "/v2/pushed/manifests/1", headers, "pushed"),
                       ("HEAD", "/v2/both/manifests/1", headers, "both, pushed"),
                       ("HEAD", "/v2/docker/manifests/1", headers, docker),
                       ("HEAD", "/v2/nothing/manifests/1", headers, 404))

    def test_mounts(self):
        ours, theirs = sha256(self.images["pushed"].layer), sha256(self.images["docker"].layer)
        for query, status in ((f"mount={ours}&from=pushed", 201), (f"mount={theirs}&from=docker", 202),
                              (f"mount={theirs}&from=library/docker", 202), (f"mount={theirs}", 202)):
            with self.subTest(query):
                self.assertEqual(status, self.program.request("POST", f"/v2/mounted/blobs/uploads/?{query}").status)

    def test_path_starts_with_a_registry(self):
        """CRI-O, Podman and skopeo send such paths. GET makes Docker pull; HEAD never does."""
        self.push("quay.io/team/hosted", self.images["pushed"])
        self.daemon.pulls["quay.io/team/new:1"] = lambda: self.daemon.add(
            "quay.io/team/new:1", self.images["far"]) and chunked(b'{"status":"done"}')
        self.check(("HEAD", "/v2/quay.io/team/new/manifests/1", None, 404),
                   ("HEAD", "/v2/quay.io/team/new/manifests/1", NODE, 404))
        self.assertEqual([], [line for line in self.pulls() if "quay.io" in line])
        self.check(("GET", "/v2/quay.io/team/hosted/manifests/1", None, "pushed"),
                   ("GET", "/v2/quay.io/team/quay/manifests/1", None, "quay"),
                   ("GET", "/v2/quay.io/team/quay/manifests/1?ns=quay.io", None, "quay"),
                   ("HEAD", "/v2/quay.io/team/quay/manifests/1?ns=quay.io", None, "quay"),
                   ("GET", "/v2/quay.io/team/new/manifests/1", None, "far"),
                   ("GET", f"/v2/quay.io/team/new/manifests/{self.images['far'].digest}", None, "far"))
        layer = sha256(self.images["far"].layer)
        self.assertEqual(200, self.program.get(f"/v2/quay.io/team/new/blobs/{layer}").status)
        self.assertEqual(1, len([line for line in self.pulls() if "quay.io" in line]))
        self.assertEqual([], [line for line in self.daemon.requests if re.search("quay.io(/|%2F)quay.io", line)])

    def test_exact_name_precedes_registry_in_path(self):
        """Docker may have an image of this registry whose path starts with a host name."""
        self.daemon.add("k3d-x:5000/quay.io/team/quay:1", self.images["far"])
        host = {"Host": "k3d-x:5000"}
        self.check(("GET", "/v2/quay.io/team/quay/manifests/1", host, "far"),
                   ("GET", "/v2/quay.io/team/quay/manifests/1?ns=quay.io", host, "quay"))

    def test_engine_using_this_registry_as_mirror(self):
        """`docker pull` must see that a tag has moved. Docker may read hosted content, and names without a registry."""
        self.daemon.version = {"GoVersion": "go1.24", "GitCommit": "abc", "KernelVersion": "6.18", "Os": "linux",
                               "Arch": "amd64"}
        with Program(self.daemon.host, store=self.program.store) as program:
            agent = "docker/28.5.2 go/go1.24 git-commit/abc kernel/6.18 os/linux arch/amd64 UpstreamClient(x)"
            layer = sha256(self.images["docker"].layer)
            for path, status in (("library/docker/manifests/1?ns=docker.io", 404), ("docker/manifests/1", 200),
                                 (f"library/docker/blobs/{layer}?ns=docker.io", 404), ("pushed/manifests/1", 200)):
                with self.subTest(path):
                    headers = {"User-Agent": agent, "Accept": NODE["Accept"]}
                    self.assertEqual(status, program.request("GET", f"/v2/{path}", headers).status)
                    self.assertEqual(200, program.request("GET", f"/v2/{path}", NODE).status)

    def test_deletes(self):
        """Only hosted content can be deleted."""
        digest, layer = self.images["docker"].digest, sha256(self.images["docker"].layer)
        for path, status in (("/v2/docker/manifests/1", 405), (f"/v2/docker/manifests/{digest}", 405),
                             (f"/v2/docker/blobs/{layer}", 405), ("/v2/nothing/manifests/1", 404),
                             ("/v2/pushed/manifests/1?ns=docker.io", 405)):
            with self.subTest(path):
                self.assertEqual(status, self.program.request("DELETE", path).status)
        self.push("gone", self.images["pushed"])
        self.assertEqual(202, self.program.request("DELETE", "/v2/gone/manifests/1").status)

    def test_docker_requests_during_own_pull_are_404(self):
        """Docker gets 404 at once for every request: it would wait for itself otherwise."""
        asked = []

        def pull():
            agent = next(line for line in self.daemon.heads[-1].split("\r\n") if line.startswith("User-Agent: "))[12:]
            docker = {"User-Agent": f"docker/28.5.2 go/go1.24 UpstreamClient({agent})", "Accept": NODE["Accept"]}
            digest = self.images["docker"].digest
            asked.extend(self.program.request(method, path, docker).status for method in ("GET", "HEAD") for path in (
                "/v2/team/slow/manifests/1?ns=registry.example", "/v2/docker/manifests/1", "/v2/pushed/manifests/1",
                f"/v2/docker/manifests/{digest}?ns=docker.io", "/v2/library/docker/manifests/1?ns=docker.io",
                f"/v2/docker/blobs/{sha256(self.images['docker'].layer)}?ns=docker.io",
                f"/v2/pushed/blobs/{sha256(self.images['pushed'].layer)}"))
            return http_answer(404, {"message": "not found"})

        self.daemon.pulls["registry.example/team/slow:1"] = pull
        self.assertEqual(401, self.program.get("/v2/team/slow/manifests/1?ns=registry.example").status)
        self.assertEqual([404] * 14, asked)

    def test_each_process_has_its_own_user_agent(self):
        with Program(self.daemon.host) as other:
            other.get("/v2/docker/manifests/1")
        agents = {line for head in self.daemon.heads for line in head.split("\r\n")
                  if line.startswith("User-Agent: k3d")}
        self.assertEqual(2, len(agents))


class TestHiddenImages(FrontCase):
    def test_logged_once_for_each_pair(self):
        """A pushed tag hides another image of Docker."""
        self.push("twice", self.images["both, pushed"])
        for count, image in enumerate((Image("built"), Image("built again")), 1):
            self.daemon.add("twice:1", image)
            while not self.program.lines(image.digest):  # the first one may share a comparison with an earlier request
                self.answering_image("HEAD", "/v2/twice/manifests/1", NODE)
            for _ in range(3):
                self.answering_image("HEAD", "/v2/twice/manifests/1", NODE)
            self.assertEqual(count, len(self.program.lines("twice:1 is served as it was pushed")))

    def test_not_logged_for_the_same_image(self):
        self.daemon.add("same:1", self.images["pushed"])
        self.push("same", self.images["pushed"])
        self.answering_image("GET", "/v2/same/manifests/1")
        self.answering_image("GET", "/v2/both/manifests/1")
        self.program.wait_for_line("both:1 is served")
        self.assertEqual([], self.program.lines("same:1 is served"))

    def test_without_docker(self):
        """Reading hosted content does not depend on Docker, and logs no warning."""
        with FakeDaemon() as daemon, Program(daemon.host) as program:
            image = self.images["pushed"]
            for blob in (image.config, image.layer):
                program.request("POST", f"/v2/app/blobs/uploads/?digest={sha256(blob)}", body=blob)
            program.request("PUT", "/v2/app/manifests/1", {"Content-Type": MANIFEST}, image.manifest)
            program.wait_for_line("content from:")  # the program has asked what there is, at its start
            daemon.faults[""] = lambda sock: b""
            asked = len(daemon.requests)
            self.assertEqual(json.loads(image.manifest), program.get("/v2/app/manifests/1").json)
            while len(daemon.requests) == asked:  # the comparison has failed
                time.sleep(0.01)
            self.assertEqual([], program.lines("WARNING"))


if __name__ == "__main__":
    unittest.main()
