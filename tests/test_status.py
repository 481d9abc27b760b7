"""What people and monitoring see: the page, /status, /metrics, health; in a real browser, during a real pull."""

import contextlib
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import unittest
from pathlib import Path
from unittest import mock

import lab
from browser import CHROMIUM, Browser
from fake_daemon import FakeDaemon, Image
from program import COMMAND, MODULE, Program, environment, run
from test_behaviour import wait_until
from test_engines import EngineCase
from test_promise import FOUR_TYPES

sys.path.insert(0, str(MODULE.parent))
import k3d_registry_dockerd as module

try:
    from prometheus_client.parser import text_string_to_metric_families
except ImportError:
    text_string_to_metric_families = None

HTML = {"Accept": "text/html,application/xhtml+xml"}
NODE = {"User_Agent": "containerd/2.1.4", "Accept": FOUR_TYPES}


class TestActivity(unittest.TestCase):
    def setUp(self):
        self.activity = module.Activity()

    def visit(self, repository="a", status=200, **options):
        client, method = options.pop("client", "c"), options.pop("method", "GET")
        visit = module.Visit(0, client, method, repository=repository, **options)
        self.activity.begin(visit)
        visit.status = status
        self.activity.end(visit)
        return visit

    def test_memory_is_bounded(self):
        """Whatever clients send, only so much is remembered, and what is newest."""
        for number in range(2000):
            self.visit(f"a{number}", 404, client=f"c{number}", is_node=True, note=f"n{number}", digest=f"d{number}")
            self.visit(f"a{number}", 200, client=f"c{number}", digest=f"d{number}")
        kept = module.Activity
        for memory, limit, newest in (
                (self.activity.past(), kept.REPOSITORIES, "a1999"),
                ([visit.client for visit in self.activity.nodes()], kept.CLIENTS, "c1999"),
                ([visit.note for _, visit in self.activity.errors()], kept.ENDED, "n1999")):
            self.assertEqual((limit, newest), (len(memory), next(iter(memory))))
        self.assertEqual([None, "c1000", "c1999"], [
            visit and visit.client for visit in map(self.activity.served, ("d999", "d1000", "d1999"))])
        for _ in range(100):
            self.visit("one")
        self.assertEqual(kept.VISITS, len(self.activity.past()["one"]))

    def test_errors_are_counted_by_their_reason(self):
        for client in ("x", "y"):
            self.visit(status=502, note="Docker failed", client=client)
        self.visit(status=404, note="not here", method="HEAD")  # normal: clients ask before each push
        ((count, visit),) = self.activity.errors()
        self.assertEqual((2, "y", "Docker failed"), (count, visit.client, visit.note))

    def test_who_waits(self):
        visit = module.Visit(0, "10.0.0.3", "GET", repository="docker.io/library/app")
        self.activity.begin(visit)
        self.assertEqual(["10.0.0.3"], self.activity.waiting_for("docker.io/library/app"))
        self.assertEqual([], self.activity.waiting_for("docker.io/library/other"))
        self.activity.end(visit)
        self.assertEqual([], self.activity.waiting_for("docker.io/library/app"))

    def test_tasks(self):
        with mock.patch("time.monotonic", lambda: 100.0), self.activity.task("pull", "app:1") as task:
            task.report({"one": (5, 10), "two": (5, 20)}, "downloading")
            self.assertEqual([task], self.activity.tasks())
            self.assertEqual(((10, 30), 1.0), (task.progress(), task.rate(110.0)))
            task.done()
        self.assertEqual(([], task), (self.activity.tasks(), self.activity.ended_tasks()[0][1]))
        with self.assertRaises(ValueError), self.activity.task("pull", "app:2"):
            raise ValueError("no")
        self.assertEqual("no", self.activity.ended_tasks()[0][1].error)

    def test_what_fails_again_and_again_is_shown_once(self):
        """An image of -warm that its registry does not have, for example."""
        with self.activity.task("pull", "app:1") as task:
            task.done()
        with self.assertLogs("k3d-registry-dockerd"):
            for number in range(2 * module.Activity.ENDED):
                with contextlib.suppress(ValueError), self.activity.task("pull", "app:2"):
                    raise ValueError(number)
        ((_, failed), (_, done)) = self.activity.ended_tasks()
        self.assertEqual((str(2 * module.Activity.ENDED - 1), task), (failed.error, done))


class StatusCase(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        daemon = FakeDaemon()
        daemon.__enter__()
        cls.addClassCleanup(daemon.__exit__)
        daemon.add("app:1", Image())
        cls.program = Program(daemon.host)
        cls.addClassCleanup(cls.program.__exit__)


class TestEndpoints(StatusCase):
    def test_health(self):
        for path in ("/livez", "/healthz", "/readyz"):
            self.assertEqual((200, b"ok\n"), (self.program.get(path).status, self.program.get(path).body), path)
        with Program("unix:///nowhere") as without:
            self.assertEqual(200, without.get("/livez").status)
            answer = without.get("/readyz")
            self.assertEqual((503, "UNAVAILABLE"), (answer.status, answer.code))
            engine = without.get("/status").json["engine"]
            self.assertIs(False, engine["reachable"])
            self.assertIn("/nowhere", engine["problem"])
            for accept in ({}, HTML):
                self.assertIn(b"Docker cannot be reached", without.get("/", **accept).body)
            self.assertIn("k3d_registry_dockerd_engine_up 0", without.get("/metrics").body.decode())

    def test_last_served(self):
        """On both image stores. The classic one has no manifests: an image's ID is the digest of its config."""
        for store in ("containerd", "classic"):
            with self.subTest(store), FakeDaemon(store) as daemon, Program(daemon.host) as program:
                daemon.add("app:1", Image())
                wait_until(lambda: program.get("/status").json["images"])  # it may be shown before Docker has answered
                for expected in (None, "127.0.0.1"):
                    (image,) = program.get("/status").json["images"]
                    self.assertEqual(expected, (image["last_served"] or {}).get("to"))
                    self.assertEqual(200, program.get("/v2/library/app/manifests/1?ns=docker.io").status)

    def test_more_images_than_are_shown(self):
        """There are 2 that were pushed, and 201 of Docker's."""
        data = json.dumps({"schemaVersion": 2, "mediaType": module.OCI_MANIFEST, "layers": []}).encode()
        with FakeDaemon() as daemon, Program(daemon.host) as program:
            for number in range(201):
                if number == 200:
                    wait_until(lambda: len(program.get("/status").json["images"]) == 200)
                    self.assertIs(False, program.get("/status").json["more_images"])
                    self.assertIn(b"<h2>Images (200)</h2>", program.get("/", **HTML).body)
                daemon.add(f"app:{number}", Image())
            for tag in "12":
                program.request("PUT", f"/v2/mine/manifests/{tag}", {"Content-Type": module.OCI_MANIFEST}, data)
            wait_until(lambda: program.get("/status").json["more_images"])
            self.assertEqual(202, len(program.get("/status").json["images"]))
            self.assertIn(b"<h2>Images (the first 202)</h2>", program.get("/", **HTML).body)
            self.assertIn(b"IMAGES (the first 202)\n", program.get("/").body)

    def test_docker_has_a_folder_of_which_nothing_is_known_here(self):
        """Not even whether it is there: the name is too long here. To others than root, some folders are the same."""
        folder = "/" + 300 * "x"
        with FakeDaemon() as daemon:
            daemon.info = {"DockerRootDir": folder}
            with Program(daemon.host) as program:
                for path in ("/", "/status", "/metrics"):
                    self.assertEqual(200, program.get(path).status, path)
                self.assertIn(f"-v {folder}:{folder}:ro", program.get("/status").json["engine"]["advice"])

    def push(self, kind, repository, target, document, media_type=module.OCI_MANIFEST):
        """Push a blob or a manifest of JSON, and return its descriptor."""
        data = json.dumps(document).encode()
        digest = str(module.Digest.of(data))
        path = f"/v2/{repository}/" + (f"blobs/uploads/?digest={digest}" if kind == "blob" else f"manifests/{target}")
        answer = self.program.request("POST" if kind == "blob" else "PUT", path, {"Content-Type": media_type}, data)
        self.assertEqual(201, answer.status, answer.body)
        return {"mediaType": media_type, "digest": digest, "size": len(data)}

    def test_pushed_images(self):
        """Size and platform are those of the image, or of all images of an index."""
        images = []
        for tag, config in (("arm", {"os": "linux", "architecture": "arm64", "variant": "v8"}),
                            ("amd", {"os": "linux", "architecture": "amd64"}), ("other", ["no config"])):
            blob = self.push("blob", "team/app", "", config, module.OCI_CONFIG)
            document = {"schemaVersion": 2, "config": blob, "layers": []}
            images.append((blob["size"], self.push("manifest", "team/app", tag, document)))
        self.push("manifest", "team/app", "all", {"schemaVersion": 2, "manifests": [image for _, image in images]},
                  module.OCI_INDEX)
        shown = {image["tag"]: (image["size_bytes"], image["platforms"], image["source"])
                 for image in self.program.get("/status").json["images"] if image["repository"] == "team/app"}
        arm, amd, other = (size for size, _ in images)
        self.assertEqual({"arm": (arm, ["linux/arm64/v8"], "pushed"), "amd": (amd, ["linux/amd64"], "pushed"),
                          "other": (other, [], "pushed"),
                          "all": (arm + amd + other, ["linux/arm64/v8", "linux/amd64"], "pushed")}, shown)

    def test_somebody_takes_it_for_docker(self):
        for method, path in (("GET", "/_ping"), ("HEAD", "/_ping"), ("GET", "/v1.45/version"), ("GET", "/info"),
                             ("GET", "/v1.45/images/json"), ("POST", "/v1.51/images/create"),
                             ("POST", "/v1.45/containers/create")):
            answer = self.program.request(method, path)
            self.assertEqual(404, answer.status, path)
            if method != "HEAD":
                self.assertIn("this is a registry, not Docker", answer.detail)

    @unittest.skipUnless(text_string_to_metric_families, "needs prometheus_client, whose parser is the reference")
    def test_metrics(self):
        self.program.get("/v2/nothing/manifests/1")
        self.program.get("/v2/app/manifests/1")
        families = {family.name: family for family in text_string_to_metric_families(
            self.program.get("/metrics").body.decode())}
        prefix = "k3d_registry_dockerd_"
        self.assertEqual({prefix + name: kind for name, kind in (
            ("info", "gauge"), ("engine_up", "gauge"), ("http_requests", "counter"), ("response_bytes", "counter"),
            ("http_request_duration_seconds", "histogram"), ("pulls", "counter"), ("pulls_in_progress", "gauge"),
            ("pull_duration_seconds", "histogram"), ("store_bytes", "gauge"))},
            {name: family.type for name, family in families.items()})
        counts = {(sample.labels["method"], sample.labels["code"]): sample.value
                  for sample in families[prefix + "http_requests"].samples}
        self.assertGreaterEqual(counts["GET", "404"], 1)
        self.assertGreaterEqual(counts["GET", "200"], 1)
        samples = families[prefix + "http_request_duration_seconds"].samples
        buckets = [sample.value for sample in samples if sample.name.endswith("_bucket")]
        (count,) = [sample.value for sample in samples if sample.name.endswith("_count")]
        self.assertEqual((sorted(buckets), count), (buckets, buckets[-1]))
        self.assertGreaterEqual(count, sum(counts.values()))
        (info,) = families[prefix + "info"].samples
        self.assertEqual({"version", "engine", "store"}, set(info.labels))
        self.assertNotIn("nothing", self.program.get("/metrics").body.decode())

    @unittest.skipUnless(shutil.which("promtool"), "needs promtool, of the package prometheus")
    def test_prometheus_own_checks(self):
        for path in ("nothing/manifests/1", "app/manifests/1", "BAD/manifests/1", "a/manifests/1?ns=b.c"):
            self.program.get(f"/v2/{path}")
        self.program.request("BREW", "/v2/")
        metrics = self.program.get("/metrics").body
        config = subprocess.run([*COMMAND, "config", "prometheus"], check=True, capture_output=True,
                                env=environment()).stdout
        for kind, document in (("metrics", metrics), ("config", config)):
            with self.subTest(kind), tempfile.NamedTemporaryFile() as file:
                file.write(document)
                file.seek(0)
                checked = subprocess.run(["promtool", "check", kind, *([file.name] if kind == "config" else [])],
                                         stdin=file, check=False, capture_output=True, text=True)
                self.assertEqual((0, ""), (checked.returncode, checked.stderr), checked.stdout)

    def test_labels(self):
        """Prometheus knows three escapes: for a quote, a backslash and a new line."""
        for value, expected in (("28.5", '"28.5"'), ('a"b', r'"a\"b"'), ("a\\b", r'"a\\b"'), ("a\nb", r'"a\\nb"'),
                                ("a\t\x07", r'"a\\t\\x07"'), ("é\ud800", r'"é\\ud800"')):
            with self.subTest(value=ascii(value)):
                self.assertEqual(f"{{name={expected}}}", module.labelled(name=value))

    def test_text_from_outside_is_escaped(self):
        evil = "<script>alert(1)</script>"
        self.program.get("/v2/app/manifests/1", ns="docker.io", Accept=FOUR_TYPES, User_Agent=f"containerd/{evil}")
        self.program.get(f"/v2/x/manifests/{evil}?ns=docker.io".replace("<", "%3C").replace(">", "%3E"))
        page = self.program.get("/", **HTML).body.decode()
        self.assertNotIn(evil, page)
        self.assertNotIn("alert(1)</script", page)
        self.assertIn("k3d_registry", self.program.get("/metrics").body.decode())
        json.loads(self.program.get("/status").body)

    def test_text_of_docker_and_of_the_system_is_escaped(self):
        """Line breaks, escape codes, text that runs backwards, halves of characters, and names that are not UTF-8."""
        evil, go_on = "\ud800\u202e\x1b[1m\t\n\r\"\\<b>", threading.Event()

        def pulling(sock):
            message = {"status": f"Downloading{evil}", "id": evil, "progressDetail": {"current": 1, "total": 2}}
            lines = "\n".join(json.dumps(message | {"status": status}) for status in ("Downloading", message["status"]))
            sock.sendall(b"HTTP/1.1 200 OK\r\n\r\n" + lines.encode() + b"\n")
            go_on.wait(60)

        with FakeDaemon() as daemon, tempfile.TemporaryDirectory() as folder:
            daemon.version, daemon.images = {"Version": f"28{evil}"}, {f"app{evil}:1": Image()}
            daemon.pulls["docker.io/library/new:1"] = lambda: pulling
            with Program(daemon.host, store=os.path.join(folder, os.fsdecode(b"\xff\xfe"))) as program:
                node = threading.Thread(target=program.get, args=("/v2/library/new/manifests/1?ns=docker.io",))
                node.start()
                wait_until(lambda: any(task["parts"] for task in program.get("/status").json["under_way"]))
                for path, headers in (("/", HTML), ("/", {}), ("/metrics", {})):
                    answer = program.get(path, **headers)
                    self.assertEqual(200, answer.status, path)
                    text = answer.body.decode()
                    self.assertIn(r"28\ud800\u202e\x1b[1m" if path == "/" else r"28\\ud800\\u202e\\x1b[1m", text)
                    self.assertFalse(set(text.replace("\n", "")) & set(evil.replace('"\\<b>', "")[:3] + "\t\r"), path)
                    self.assertNotIn("\udcff", text)
                if text_string_to_metric_families:
                    list(text_string_to_metric_families(text))
                go_on.set()
                node.join()
                self.assertEqual([], program.lines("a bug in this program"))

    def test_the_page_may_use_nothing_but_itself(self):
        answer = self.program.get("/", **HTML)
        self.assertEqual("text/html; charset=utf-8", answer.headers["Content-Type"])
        (policy,) = answer.headers.get_all("Content-Security-Policy")
        self.assertTrue(policy.startswith("default-src 'none'; style-src 'sha256-"))
        self.assertNotIn("unsafe", policy)
        self.assertEqual([], re.findall(r"""(?:src|href)="?(?!/status|data:,)[^ >"]+""", answer.body.decode()))
        answer = self.program.get("/")
        self.assertEqual("text/plain; charset=utf-8", answer.headers["Content-Type"])
        self.assertEqual("sandbox; default-src 'none'", answer.headers["Content-Security-Policy"])


class TestCommand(StatusCase):
    def test_once(self):
        for arguments in ((), ("-watch",)):  # not on a terminal: once
            done = run("status", "-addr", self.program.address, *arguments)
            self.assertEqual((0, ""), (done.returncode, done.stderr))
            self.assertIn("Docker 28", done.stdout)
            self.assertIn("IMAGES (1)\napp:1", done.stdout)

    def test_no_answer(self):
        done = run("status", "-addr", "127.0.0.1:1")
        self.assertEqual(1, done.returncode)
        self.assertIn("no answer from 127.0.0.1:1", done.stdout)

    def test_watched_on_a_terminal(self):
        ours, terminal = os.openpty()
        self.addCleanup(os.close, ours)
        process = subprocess.Popen([*COMMAND, "status", "-addr", self.program.address, "-watch"], stdout=terminal,
                                   env=environment(CONSTANTS=json.dumps({"WATCH_INTERVAL": 0.1})))
        self.addCleanup(process.wait)
        self.addCleanup(process.kill)
        os.close(terminal)
        shown = b""
        while shown.count(b"\x1b[H\x1b[J") < 2:
            shown += os.read(ours, 65536)
        self.assertIn(b"k3d-registry-dockerd", shown.split(b"\x1b[J")[1])


class SlowOrigin(lab.Gate):
    """Docker reports the progress of a layer from its first megabyte on."""

    BYTES = 2_500_000


class TestTotal(EngineCase):
    engine = lab.ENGINES["containerd"]

    def test_layers_that_docker_has_not_begun(self):
        """Docker gets three layers at a time. All of them count once a node has the manifest."""
        _, (manifest,) = lab.push_platforms(lab.ORIGINS["open"], f"lab/{self.name}", "1", ["amd64"],
                                            [(str(number), os.urandom(3_000_000)) for number in range(6)])
        with SlowOrigin(lab.ORIGINS["open"]) as gate:
            self.images.append(f"{gate.host}/lab/{self.name}:1")
            program = self.program()
            for target in ("1", manifest):
                answer = program.get(f"/v2/lab/{self.name}/manifests/{target}?ns={gate.host}", **NODE)
                self.assertEqual(200, answer.status, answer.body)
            (task,) = program.get("/status").json["under_way"]
            self.assertGreater(task["total_bytes"], 18_000_000)
            self.assertLess(task["done_bytes"], 18_000_000)
            gate.open()
            program.wait_for_line(": done in ")


@unittest.skipUnless(CHROMIUM, "needs Chromium: apt-get install chromium")
class TestPage(EngineCase):
    """The names are those of a picture for people: Docker gets images of Docker Hub from mirrors here."""

    engine = lab.ENGINES["mirrors"]
    PULLED = "docker.io/library/postgres:17"

    def setUp(self):
        super().setUp()
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.pictures = Path(os.environ.get("PICTURES") or folder.name)

    def test_during_a_pull(self):
        """The page is opened while a node waits for a slow pull: it shows that, and then that it has ended."""
        self.images += [self.PULLED, "backend:dev", "frontend:dev"]
        self.engine.remove(*self.images)
        lab.push_platforms(lab.ORIGINS["open"], "library/postgres", "17", ["amd64"],
                           [(f"layer{i}", os.urandom(i * 1_000_000)) for i in (6, 4, 9)])
        with SlowOrigin(lab.ORIGINS["open"], ("127.0.0.1", int(lab.FIRST_MIRROR.rpartition(":")[2]))) as gate:
            program = self.program()
            self.assertIn(b"No node has asked yet", program.get("/", **HTML).body)
            self.have_images(program)
            path = "/v2/library/postgres/manifests/17?ns=docker.io"
            node = threading.Thread(target=program.get, args=(path,), kwargs=NODE)
            node.start()
            program.wait_for_line("pull ")
            wait_until(lambda: program.get("/status").json["under_way"][0]["total_bytes"])
            (task,) = program.get("/status").json["under_way"]
            self.assertEqual(("pull", self.PULLED, ["127.0.0.1"]), (task["kind"], task["what"], task["waiting"]))
            self.assertLess(task["done_bytes"], task["total_bytes"])
            self.assertIn(f"pull {self.PULLED}\n  [", program.get("/").body.decode())
            with Browser(f"http://localhost:{program.port}/") as browser:
                self.see_a_pull(browser, self.PULLED, gate, node)
            self.assertEqual({f"http://localhost:{program.port}/"}, browser.requested())
        self.assertEqual([], browser.complaints())
        (image,) = [image for image in program.get("/status").json["images"] if "postgres" in image["repository"]]
        self.assertEqual(("17", "docker", "127.0.0.1"), (image["tag"], image["source"], image["last_served"]["to"]))

    def have_images(self, program):
        """Make two images, push one of them, and have a node pull both."""
        for name in ("backend:dev", "frontend:dev"):
            self.engine.import_image(name, {"app": os.urandom(2_000_000)})
            lab.NODE.fetch(f"docker.io/library/{name}", program.address)
        pushed = f"{program.address}/shop/web:1.4"
        self.images.append(pushed)
        self.engine.docker("tag", "frontend:dev", pushed)
        self.engine.docker("push", "-q", pushed)

    def see_a_pull(self, browser, name, gate, node):
        """The bar of a pull moves, and then it is gone, without a reload; what a person has opened stays open."""
        text, bar = "document.body.innerText", "document.querySelector('#under-way progress')"
        wait_until(lambda: browser.evaluate(f"{bar} !== null"))
        self.assertIn(f"pull {name}", browser.evaluate(text))
        self.assertIn("Waiting: 127.0.0.1", browser.evaluate(text))
        browser.evaluate("document.body.dataset.loaded = 'once'")
        before = browser.evaluate(f"{bar}.value / {bar}.max")
        self.assertTrue(0 < before < 1, before)
        for name_of_size, scheme in itertools.product(("desktop", "phone"), ("light", "dark")):
            width, height = {"desktop": (1280, 780), "phone": (390, 844)}[name_of_size]
            path = self.pictures / f"{name_of_size}-{scheme}.png"
            browser.picture(path, width, height, scheme, name_of_size == "phone")
            self.assertGreater(path.stat().st_size, 10_000)
            self.assertLessEqual(browser.evaluate("document.documentElement.scrollWidth"), width, "it fits the screen")
        browser.evaluate("document.querySelector('#requests details')?.setAttribute('open', '')")
        gate.open()
        node.join()
        wait_until(lambda: "Nothing is being pulled" in browser.evaluate(text))
        self.assertIn("postgres:17", browser.evaluate("document.querySelector('#images').innerText"))
        self.assertIn("done", browser.evaluate("document.querySelector('#under-way details').textContent"))
        self.assertEqual("once", browser.evaluate("document.body.dataset.loaded"))


if __name__ == "__main__":
    unittest.main()
