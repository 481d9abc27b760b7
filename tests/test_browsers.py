"""What web pages may do here: nothing, unless they are allowed to. The rule, and a real browser that keeps to it."""

import http.server
import json
import re
import sys
import threading
import unittest
from email.message import Message

from browser import CHROMIUM, Browser
from fake_daemon import FakeDaemon, sha256
from program import MODULE, Program
from test_behaviour import wait_until

sys.path.insert(0, str(MODULE.parent))
import k3d_registry_dockerd as module


def headers(**values):
    message = Message()
    for name, value in values.items():
        message[name.replace("_", "-")] = value
    return message


class TestRule(unittest.TestCase):
    UI = "http://ui.example:8080"

    def is_refused(self, rule, given):
        try:
            rule.check(given)
        except module.RegistryError as e:
            self.assertEqual("DENIED", e.code)
            return True
        return False

    def test_browsers_are_known_by_any_header_of_theirs(self):
        for name, value, is_browser in (
                ("Origin", "null", True), ("Referer", "", True), ("Accept-Language", "en", True),
                ("Sec-Fetch-Site", "none", True), ("Sec-Fetch-Mode", "cors", True), ("sec-fetch-dest", "image", True),
                ("User-Agent", "Mozilla/5.0 (X11; Linux x86_64)", True), ("User-Agent", "docker/28.5.1", False),
                ("User-Agent", "containerd/2.1", False), ("User-Agent", "curl/8", False), ("Accept", "*/*", False)):
            with self.subTest(name, value=value):
                self.assertEqual(is_browser, module.Browsers.is_browser(headers(**{name: value})))

    def test_other_clients_are_not_concerned(self):
        for host in ("registry.example", "evil.example:5000", "localhost:5000", "", "??"):
            self.assertFalse(self.is_refused(module.Browsers(), headers(Host=host, User_Agent="docker/28")), host)

    def test_hosts(self):
        """A page under a public name may be one whose name was made to resolve to this machine."""
        for host, refused in (
                ("localhost", False), ("localhost:5000", False), ("LOCALHOST:5000", False),
                ("k3d-registry.localhost:5000", False), ("a.b.localhost", False), ("127.0.0.1:5000", False),
                ("192.168.1.5", False), ("[::1]:5000", False), ("k3d-registry:5000", False), ("registry", False),
                ("evil.example:5000", True), ("evil.example", True), ("localhost.evil.example", True),
                ("127.0.0.1.evil.example:5000", True), ("localhost.", True), ("xlocalhost.example", True),
                ("", True), ("x:y", True), ("[::1", True), ("evil.example:99999", True)):
            for more in ({"Accept_Language": "en"}, {"User_Agent": "Mozilla/5.0"}, {"Sec_Fetch_Site": "none"},
                         {"Sec_Fetch_Site": "same-origin"}):
                with self.subTest(host, **more):
                    self.assertEqual(refused, self.is_refused(module.Browsers(), headers(Host=host, **more)))

    def test_origins(self):
        host = "localhost:5000"
        for given, refused, refused_with_ui in (
                ({"Origin": "http://localhost:5000"}, False, False),
                ({"Origin": "http://LOCALHOST:5000"}, False, False),
                ({"Referer": "http://localhost:5000/v2/"}, False, False),
                ({"Sec_Fetch_Site": "same-origin"}, False, False), ({"Sec_Fetch_Site": "none"}, False, False),
                ({"Origin": "http://localhost:5001"}, True, True), ({"Origin": "https://localhost:5000"}, True, True),
                ({"Origin": "http://127.0.0.1:5000"}, True, True), ({"Origin": "null"}, True, True),
                ({"Origin": ""}, True, True), ({"Origin": "file://"}, True, True),
                ({"Origin": "chrome-extension://x"}, True, True), ({"Origin": "http://[x"}, True, True),
                ({"Origin": "http://localhost:5000@evil.example"}, True, True),
                ({"Origin": self.UI}, True, False), ({"Referer": self.UI + "/page"}, True, False),
                ({"Origin": self.UI, "Sec_Fetch_Site": "cross-site"}, True, False),
                ({"Origin": "https://ui.example:8080"}, True, True), ({"Origin": "http://ui.example"}, True, True),
                ({"Referer": "http://evil.example/"}, True, True), ({"Referer": "??"}, True, True),
                ({"Origin": "http://localhost:5000", "Referer": "http://evil.example/"}, True, True),
                ({"Origin": self.UI, "Referer": "http://evil.example/"}, True, True),
                ({"Sec_Fetch_Site": "cross-site"}, True, True), ({"Sec_Fetch_Site": "same-site"}, True, True),
                ({"Sec_Fetch_Site": "what"}, True, True)):
            with self.subTest(**given):
                self.assertEqual(refused, self.is_refused(module.Browsers(), headers(Host=host, **given)))
                allowing = module.Browsers("http", frozenset([self.UI]))
                self.assertEqual(refused_with_ui, self.is_refused(allowing, headers(Host=host, **given)))

    def test_own_public_name(self):
        """A registry under a name of its own can be opened in a browser if that is allowed, with its scheme."""
        rule = module.Browsers("https", frozenset(["https://registry.example"]))
        for host, refused in (("registry.example", False), ("registry.example:443", False),
                              ("registry.example:80", True), ("other.example", True)):
            self.assertEqual(refused, self.is_refused(rule, headers(Host=host, Sec_Fetch_Site="none")), host)


class TestHeaders(unittest.TestCase):
    UI = "http://ui.example:8080"
    PATHS = ("/", "/v2/", "/v2/a/tags/list", "/v2/a/manifests/1", "/nothing", "/v2/a/blobs/x")

    def start(self, *arguments):
        daemon = FakeDaemon()
        daemon.__enter__()
        self.addCleanup(daemon.__exit__)
        program = Program(daemon.host, *arguments)
        self.addCleanup(program.__exit__)
        return program

    def test_refused_before_anything_is_done(self):
        program = self.start()
        for method, path in (*(("GET", path) for path in self.PATHS), ("POST", "/v2/a/blobs/uploads/"),
                             ("PUT", "/v2/a/manifests/1"), ("DELETE", "/v2/a/manifests/1"), ("OPTIONS", "/v2/"),
                             ("POST", f"/v2/a/blobs/uploads/?digest={sha256(b'x')}")):
            for given in ({"Origin": "http://evil.example"}, {"Host": "evil.example", "Accept-Language": "en"}):
                with self.subTest(method=method, path=path, **given):
                    answer = program.request(method, path, given, b"x" if method == "POST" else None)
                    self.assertEqual((403, "DENIED"), (answer.status, answer.code))
                    self.assertIsNone(answer.headers["Access-Control-Allow-Origin"])
        self.assertFalse(program.store.exists())

    def test_every_response_is_inert(self):
        program = self.start()
        for path in self.PATHS:
            answer = program.get(path)
            self.assertEqual(("nosniff", "sandbox; default-src 'none'"), (
                answer.headers["X-Content-Type-Options"], answer.headers["Content-Security-Policy"]), path)
            self.assertEqual((None, None), (answer.headers["Access-Control-Allow-Origin"], answer.headers["Vary"]))

    def test_types_that_browsers_show_are_not_accepted(self):
        program = self.start()
        for media_type, status in (("text/html", 400), ("Text/HTML", 400), ("image/svg+xml", 400), ("text/plain", 400),
                                   ("application/vnd.any+json", 201), ("application/json", 201)):
            data = json.dumps({"schemaVersion": 2, "layers": [], "x": "<script>alert(1)</script>"}).encode()
            answer = program.request("PUT", "/v2/a/manifests/1", {"Content-Type": media_type}, data)
            self.assertEqual(status, answer.status, media_type)

    def test_allowed_origin(self):
        program = self.start("-allow-origin", self.UI.upper(), "-allow-origin", "https://other.example")
        for path in self.PATHS:
            answer = program.get(path, Origin=self.UI, Sec_Fetch_Site="cross-site")
            self.assertNotEqual(403, answer.status)
            self.assertEqual((self.UI, "Origin"), (answer.headers["Access-Control-Allow-Origin"],
                                                   answer.headers["Vary"]), path)
            self.assertIn("Docker-Content-Digest", answer.headers["Access-Control-Expose-Headers"])
            self.assertEqual("Origin", program.get(path).headers["Vary"])
        answer = program.get("/v2/", Origin="http://evil.example")
        self.assertEqual((403, None), (answer.status, answer.headers["Access-Control-Allow-Origin"]))

    def test_preflight(self):
        program = self.start("-allow-origin", self.UI)
        ask = {"Access-Control-Request-Method": "PUT", "Access-Control-Request-Headers": "content-type"}
        answer = program.request("OPTIONS", "/v2/a/manifests/1", {**ask, "Origin": self.UI})
        self.assertEqual((204, b"", self.UI), (answer.status, answer.body,
                                               answer.headers["Access-Control-Allow-Origin"]))
        self.assertIn("PUT", answer.headers["Access-Control-Allow-Methods"])
        self.assertIn("Authorization", answer.headers["Access-Control-Allow-Headers"])
        self.assertEqual(403, program.request("OPTIONS", "/v2/", {**ask, "Origin": "http://evil.example"}).status)
        self.assertEqual(405, program.request("OPTIONS", "/v2/", {"Origin": self.UI}).status)


class Pages(http.server.BaseHTTPRequestHandler):
    """Serves one page, which tries everything and writes down what came of it."""

    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(self.server.page.encode())

    def log_message(self, *arguments):
        pass


@unittest.skipUnless(CHROMIUM, "needs Chromium: apt-get install chromium")
class TestChromium(unittest.TestCase):
    """A real browser, in which evil.example and its like are names of this machine."""

    TRIES = """<pre id="result"></pre><script>
        (async () => {
            const found = {};
            for (const [name, path, options] of TRIES) {
                try {
                    const response = await fetch(path, options);
                    found[name] = response.type === "opaque" ? "opaque" : response.status;
                } catch (error) { found[name] = "failed"; }
            }
            document.getElementById("result").textContent = "RESULT" + JSON.stringify(found) + "END";
        })();</script>"""

    @classmethod
    def setUpClass(cls):
        cls.browser = Browser("about:blank", "--host-resolver-rules=MAP *.example 127.0.0.1")
        cls.addClassCleanup(cls.browser.__exit__)

    def setUp(self):
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Pages)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.addCleanup(self.server.server_close)
        self.addCleanup(self.server.shutdown)
        self.port = self.server.server_address[1]

    def start(self, *arguments):
        program = Program("unix:///nowhere", *arguments)
        self.addCleanup(program.__exit__)
        return program

    def browse(self, url, end="</html>"):
        """Open a page and return its document, when that is complete and contains `end`."""
        self.browser.open(url)
        script = """document.readyState === "complete" && location.href === URL && document.documentElement.outerHTML"""
        script = script.replace("URL", json.dumps(url))
        wait_until(lambda: end in (self.browser.evaluate(script) or ""))
        return self.browser.evaluate(script)

    def results(self, host, program):
        """Open a page of a host that sends requests to a registry, and return what they gave."""
        base = f"http://localhost:{program.port}"
        upload = f"{base}/v2/evil/blobs/uploads/?digest={sha256(b'x')}"
        tries = [["get", f"{base}/v2/", {}], ["post", upload, {"method": "POST", "body": "x"}],
                 ["put", f"{base}/v2/evil/manifests/1", {"method": "PUT", "body": "{}"}],
                 ["simple get", f"{base}/v2/_catalog", {"mode": "no-cors"}],
                 ["simple post", upload, {"method": "POST", "body": "x", "mode": "no-cors"}]]
        self.server.page = self.TRIES.replace("TRIES", json.dumps(tries), 1)
        document = self.browse(f"http://{host}:{self.port}/", "RESULT{")
        return json.loads(re.search("RESULT(.*)END", document)[1].replace("&quot;", '"'))

    def test_pages_of_others(self):
        program = self.start()
        for host in ("evil.example", "localhost", "127.0.0.1"):
            with self.subTest(host):
                found = self.results(host, program)
                self.assertEqual({"get": "failed", "post": "failed", "put": "failed"},
                                 {name: found[name] for name in ("get", "post", "put")})
        self.assertTrue(program.lines("POST /v2/evil/blobs/uploads/"), "the browser did send something")
        self.assertEqual([], [line for line in program.lines("/v2/") if " 403 " not in line])
        self.assertFalse(program.store.exists(), "nothing was pushed")

    def test_a_name_that_resolves_to_this_machine(self):
        program = self.start()
        self.assertIn("DENIED", self.browse(f"http://evil.example:{program.port}/v2/_catalog"))
        program.wait_for_line("GET /v2/_catalog 403")

    def test_opened_by_hand(self):
        program = self.start()
        for host in ("localhost", "127.0.0.1", "k3d-registry.localhost"):
            self.assertIn("OCI registry", self.browse(f"http://{host}:{program.port}/"), host)

    def test_allowed_page(self):
        program = self.start("-allow-origin", f"http://ui.example:{self.port}")
        found = self.results("ui.example", program)
        self.assertEqual({"get": 200, "post": 201, "put": 400}, {name: found[name] for name in ("get", "post", "put")})


if __name__ == "__main__":
    unittest.main()
