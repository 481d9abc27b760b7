"""The README: its commands are run in their order, on a stage with a real Docker, by a reader who has k3d.

k3d and kubectl are stood in for: what k3d would do with its configuration is done to the same Docker, and `kubectl run`
has a node pull the image.
"""

import contextlib
import os
import re
import shutil
import threading
import unittest
from pathlib import Path

import cluster
import lab
from cluster import StageCase
from program import MODULE
from test_settings import module

try:
    import yaml
except ImportError:
    yaml = None

README = (MODULE.parent / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)

# What k3d's schema for v1alpha5 has of the keys that are used here.
SCHEMA = {"apiVersion": str, "kind": str, "metadata": {"name": str}, "registries": {
    "create": {"name": str, "host": str, "hostPort": str, "image": str, "volumes": [str],
               "proxy": {"remoteURL": str, "username": str, "password": str}},
    "use": [str], "config": str}}

STUB = """#!/bin/sh
echo "${0##*/} $*" > @/call && read status < @/answer && exit "$status"
"""


def check_schema(value, schema, path="k3d.yaml"):
    """Raise AssertionError if a document has a key that is not in the schema, or a value of another type."""
    if isinstance(schema, dict):
        for key, entry in value.items():
            assert key in schema, f"{path}: there is no {key}"
            check_schema(entry, schema[key], f"{path}.{key}")
    elif isinstance(schema, list):
        for entry in value:
            check_schema(entry, schema[0], path)
    else:
        assert isinstance(value, schema), f"{path}: {value!r}"


class TestText(unittest.TestCase):
    def test_every_block_says_what_it_is(self):
        self.assertEqual({"sh", "env", "text", "yaml", "toml"}, {language for language, _ in BLOCKS})

    def test_configurations(self):
        engine = module.EngineHost(path="/var/run/docker.sock")
        place = module.Place("localhost:5000", (), engine, Path("/var/lib/docker"))
        printed = {kind: module.configuration_for(kind, place) for kind in module.CONFIGURATIONS}
        for language, block in BLOCKS:
            if language in ("yaml", "toml"):
                self.assertIn(block, printed.values())

    def test_settings_file(self):
        for language, block in BLOCKS:
            if language == "env":
                names = {line.partition("=")[0] for line in block.splitlines()}
                self.assertLessEqual(names, {setting.variable for setting in module.SETTINGS})

    def test_links_to_files(self):
        for target in re.findall(r"\]\(([^)#]+)\)|`(tests/[\w./]+|\.ci/run)`", README):
            path = next(filter(None, target))
            if "://" not in path:
                self.assertTrue((MODULE.parent / path).exists(), path)

    def test_anchors(self):
        headings = {re.sub(r"[^\w -]", "", line.lstrip("# ")).lower().replace(" ", "-")
                    for line in README.splitlines() if line.startswith("#")}
        for anchor in re.findall(r"\]\(#([^)]+)\)", README):
            self.assertIn(anchor, headings)

    def test_folds(self):
        """GitHub takes what follows <summary> for Markdown only after an empty line."""
        self.assertEqual(README.count("<details>"), README.count("</details>"))
        self.assertEqual(README.count("<details>"), len(re.findall(r"^<details><summary>.*</summary>\n\n", README,
                                                                   re.MULTILINE)))

    def test_inline_script_metadata(self):
        """The header that `uv run` and `pipx run` read (PEP 723, with its regular expression)."""
        header = r"(?m)^# /// (?P<type>[a-zA-Z0-9-]+)$\s(?P<content>(^#(| .*)$\s)+)^# ///$"
        (found,) = re.finditer(header, MODULE.read_text())
        self.assertEqual("script", found["type"])
        self.assertIn('# requires-python = ">=3.10"\n# dependencies = []\n', found["content"])


class Reader:
    """Runs blocks of commands in a folder of the stage that holds a clone. Use it in a `with`."""

    def __init__(self, engine, test):
        self.engine, self.test = engine, test
        self.folder = engine.folder / "reader"
        self.inside = f"{engine.inside}/reader"
        self.node = None
        self._stack = contextlib.ExitStack()

    def __enter__(self):
        self._stack.callback(shutil.rmtree, self.folder, ignore_errors=True)
        (self.folder / "bin").mkdir(parents=True)
        for file in (MODULE, cluster.DOCKERFILE):
            shutil.copy(file, self.folder)
        for command in ("k3d", "kubectl"):
            stub = self.folder / "bin" / command
            stub.write_text(STUB.replace("@", f"{self.inside}/bin"))
            stub.chmod(0o755)
        for name in ("call", "answer"):
            os.mkfifo(self.folder / "bin" / name)
        self._stack.enter_context(cluster.network(self.engine))
        self._stack.callback(self.remove_containers)
        self.node = self._stack.enter_context(cluster.Node(self.engine, "k3d-demo-server-0"))
        thread = threading.Thread(target=self._answer_calls)
        thread.start()
        self._stack.callback(thread.join)
        self._stack.callback(lambda: (self.folder / "bin/call").write_text("end\n"))
        return self

    def __exit__(self, *error):
        self._stack.close()

    def run(self, script):
        """Run a block and return what it prints."""
        # Docker's socket and folder are elsewhere in the lab.
        script = re.sub(r"(?<!:)/var/run/docker\.sock", f"{self.engine.inside}/docker.sock", script)
        script = script.replace("/var/lib/docker:/var/lib/docker", ":".join([f"{self.engine.inside}/data"] * 2))
        result = self.engine.stage.run(
            "env", "-C", self.inside, f"PATH={self.inside}/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root",
            f"DOCKER_HOST={self.engine.host}", "REGISTRY=127.0.0.1:5003", "sh", "-ec", script, check=False)
        self.test.assertEqual(0, result.returncode, f"{script}\n{result.stdout}\n{result.stderr}")
        return result.stdout + result.stderr

    # ---- what k3d and kubectl do

    def _answer_calls(self):
        while (line := (self.folder / "bin/call").read_text()) != "end\n":
            try:
                self.call(*line.split())
                status = 0
            except Exception as e:
                print(f"{line}: {e}")
                status = 1
            (self.folder / "bin/answer").write_text(f"{status}\n")

    def call(self, *words):
        if words[:2] == ("kubectl", "run"):
            name, flag, image = words[2:]
            assert flag == "--image", name
            self.node.pull(image)
        elif words[:3] == ("k3d", "registry", "create"):
            name, *flags = words[3:]
            options = dict(zip(flags[::2], flags[1::2], strict=True))
            host, port = options.pop("--port").split(":")
            self.start_registry(f"k3d-{name}", host, port, options.pop("--image"), [options.pop("--volume")])
            assert not options, options
        elif words[:3] == ("k3d", "cluster", "create"):
            document = yaml.safe_load((self.folder / words[-1]).read_text())
            check_schema(document, SCHEMA)
            assert (document["apiVersion"], document["kind"], words[-2]) == ("k3d.io/v1alpha5", "Simple", "--config")
            self.create_cluster(document["registries"])
        else:
            raise ValueError("not known here")

    def create_cluster(self, registries):
        create = registries.get("create")
        if create:
            self.start_registry(create["name"], create["host"], create["hostPort"], create["image"], create["volumes"])
            mirrors = create["proxy"]["remoteURL"]
        else:
            (name,) = registries["use"]
            mirrors = yaml.safe_load(registries["config"])["mirrors"]
            assert mirrors == {"*": {"endpoint": [f"http://{name}"]}}, mirrors
            mirrors = "*"
        assert mirrors == "*", "the node of this test has a mirror for all registries"

    def start_registry(self, name, host, port, image, volumes):
        assert (name, image) == (cluster.NAME, cluster.IMAGE), "that is what the node of this test is configured for"
        self.make_room(name)
        self.engine.docker("run", "-d", "--name", name, *cluster.as_k3d(self.engine, port, volumes, host))
        self.engine.docker("network", "connect", cluster.NETWORK, name)
        self.wait_for_registry(name)

    # ---- what a reader has at a time

    def wait_for_registry(self, container):
        lab.wait_for("the registry", lambda: self.engine.docker("exec", container, "python3", f"/{MODULE.name}",
                                                                "check", check=False) == "healthy")

    def have_cluster(self):
        """Make the cluster of the first screen, unless its registry runs."""
        if not self.engine.docker("ps", "-q", "-f", f"name=^{cluster.NAME}$"):
            self.call("k3d", "cluster", "create", "--config", "k3d.yaml")

    def make_room(self, name=""):
        """Free port 5000, which the examples share, and the name of a container."""
        for other in self.engine.docker("ps", "-q", "-f", "publish=5000").split():
            self.engine.docker("stop", other)
        self.engine.docker("rm", "-f", "-v", name, check=False)

    def remove_registries(self):
        for container in self.engine.docker("ps", "-aq", "-f", f"ancestor={cluster.IMAGE}").split():
            self.engine.docker("rm", "-f", "-v", container)

    def remove_containers(self):
        for container in self.engine.docker("ps", "-aq").split():
            self.engine.docker("rm", "-f", "-v", container)


@unittest.skipUnless(yaml and cluster.grpc, "needs PyYAML and grpcio")
class TestCommands(StageCase):
    engine = lab.STAGES["stage"]

    def test_in_order(self):
        seen = []
        with Reader(self.engine, self) as reader:
            for script in (block for language, block in BLOCKS if language == "sh"):
                with self.subTest(script):
                    seen.append(self.run_block(reader, script))
        self.assertNotIn(None, seen)
        self.assertEqual({"first screen", "proof", "server", "unittest", "doctor", "other"}, set(seen))

    def run_block(self, reader, script):
        """Run a block as its reader would; return what it was."""
        if script.startswith("python3 k3d_registry_dockerd.py -addr 127.0.0.1:5000"):
            reader.make_room()
            reader.run(script.rstrip() + """ & pid=$!
                until python3 -c "import urllib.request as r; r.urlopen('http://127.0.0.1:5000/v2/')" 2> /dev/null
                do kill -0 $pid; sleep 0.1; done; kill $pid; wait $pid""")
            return "server"
        if script.startswith("python3 -m unittest"):  # that is this
            return "unittest"
        if "docker run" in script and ":5000:5000" in script:
            reader.make_room("registry")
        elif re.search(r"(k3d-dockerd|localhost:5000)\b", script) and "k3d.yaml" not in script:
            reader.have_cluster()
        if "crane" in script:
            other = self.engine.docker("run", "-d", "-p", "127.0.0.1:5003:5000", "-v",
                                       f"{self.engine.inside}/docker.sock:/var/run/docker.sock", cluster.IMAGE)
            reader.wait_for_registry(other)
        if " doctor" in script:  # nothing can be pulled from Docker Hub here
            out = reader.run(script.replace(" doctor", " doctor || true"))
            self.assertEqual([], [line for line in out.splitlines() if line[:2] == "!!" and "docker.io" not in line])
            return "doctor"
        if "docker rmi" in script:  # its text says that k3d removes the registry first
            reader.remove_registries()
        out = reader.run(script)
        if ".py config k3d\n" in script:
            self.assertIn("\n          - http://k3d-dockerd:5000\n", out)
        if ".py config compose\n" in script:
            self.assertIn('"127.0.0.1:5000:5000"', out)
        if "grep" in script:
            self.assertRegex(out, r"INFO +GET /v2/library/hello/manifests/sha256:\w{64}\?ns=docker.io 200 ")
            return "proof"
        return "first screen" if script.startswith("docker build") else "other"


if __name__ == "__main__":
    unittest.main()
