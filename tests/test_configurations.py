"""What `config KIND` prints: it is parsed as its reader would, and used by a real node."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

import lab
from program import MODULE, run
from test_engines import EngineCase

sys.path.insert(0, str(MODULE.parent))
import k3d_registry_dockerd as module

try:
    import tomllib
except ImportError:  # before Python 3.11
    tomllib = None
try:
    import yaml
except ImportError:
    yaml = None

ENGINE = module.EngineHost(path="/var/run/docker.sock")
ROOT = Path("/var/lib/docker")
ON_THE_HOST = module.Place("localhost:5000", (), ENGINE, ROOT)
ON_ONE_ADDRESS = module.Place("172.17.0.1:5000", (), ENGINE, ROOT)
IN_A_CONTAINER = module.Place(
    "localhost:5000", ("localhost:57840", "127.0.0.1:57840", "k3d-dockerd:5000"), ENGINE, ROOT)
PLACES = (ON_THE_HOST, ON_ONE_ADDRESS, IN_A_CONTAINER)


def text(kind, place):
    return module.configuration_for(kind, place)


class TestPlace(unittest.TestCase):
    def test_names(self):
        """Each row: the address that it listens on, its names -> from this machine, from nodes, the container's."""
        outside = "localhost:57840", "127.0.0.1:57840"
        for address, names, expected in (
                ("localhost:5000", (), ("localhost:5000", "host.k3d.internal:5000", None)),
                ("127.0.0.1:5000", (), ("localhost:5000", "host.k3d.internal:5000", None)),
                ("[::1]:5000", (), ("localhost:5000", "host.k3d.internal:5000", None)),
                ("172.17.0.1:5000", (), ("172.17.0.1:5000", "172.17.0.1:5000", None)),
                ("[fd00::1]:5000", (), ("[fd00::1]:5000", "[fd00::1]:5000", None)),
                ("localhost:5000", (*outside, "k3d-x:5000"), ("localhost:57840", "k3d-x:5000", "k3d-x")),
                ("localhost:5000", outside, ("localhost:57840", "host.k3d.internal:57840", None)),
                ("localhost:5000", ("10.0.0.1:57840", "k3d-x:5000"), ("10.0.0.1:57840", "k3d-x:5000", "k3d-x")),
                ("localhost:5000", ("[fd00::1]:57840", "k3d-x:5000"), ("[fd00::1]:57840", "k3d-x:5000", "k3d-x")),
                ("localhost:5000", ("k3d-x:5000",), ("localhost:5000", "k3d-x:5000", "k3d-x"))):
            with self.subTest(address=address, names=names):
                place = module.Place(address, names, ENGINE, ROOT)
                self.assertEqual(expected, (place.local, place.nodes, place.container))


class TestForms(unittest.TestCase):
    def test_every_kind_has_a_purpose_and_no_placeholder(self):
        for kind in module.CONFIGURATIONS:
            for place in PLACES:
                with self.subTest(kind, place=place):
                    self.assertTrue(text(kind, place).startswith("#"))
                    self.assertNotRegex(text(kind, place), r"[^{]\{\w+\}[^}]|None")

    @unittest.skipUnless(yaml, "needs PyYAML")
    def test_yaml(self):
        for place in PLACES:
            mirrors = {"mirrors": {"*": {"endpoint": [f"http://{place.nodes}"]}}}
            k3d = yaml.safe_load(text("k3d", place))
            self.assertEqual({"apiVersion": "k3d.io/v1alpha5", "kind": "Simple"},
                             {key: k3d[key] for key in ("apiVersion", "kind")})
            self.assertEqual([place.nodes] if place.container else None, k3d["registries"].get("use"))
            self.assertEqual(mirrors, yaml.safe_load(k3d["registries"]["config"]))
            (endpoint,) = yaml.safe_load(text("k3s", place))["mirrors"]["*"]["endpoint"]
            self.assertEqual("http://" + (place.nodes if place.container else place.local), endpoint)
            service = yaml.safe_load(text("compose", place))["services"]["registry"]
            self.assertEqual(["127.0.0.1:5000:5000"], service["ports"])
            self.assertIn("/var/run/docker.sock:/var/run/docker.sock", service["volumes"])
            (job,) = yaml.safe_load(text("prometheus", place))["scrape_configs"]
            self.assertEqual(("http", [{"targets": [place.local]}]), (job["scheme"], job["static_configs"]))

    @unittest.skipUnless(yaml, "needs PyYAML")
    def test_compose_with_docker_on_another_machine(self):
        place = module.Place("localhost:5000", (), module.EngineHost(host="10.0.0.1", port=2375), ROOT)
        service = yaml.safe_load(text("compose", place))["services"]["registry"]
        self.assertEqual((["DOCKER_HOST=tcp://10.0.0.1:2375"], ["registry:/var/lib/registry"]),
                         (service["environment"], service["volumes"]))

    def test_tls(self):
        for kind in ("k3d", "k3s", "kind", "minikube", "containerd", "prometheus"):
            with self.subTest(kind):
                found = text(kind, module.Place("localhost:5000", (), ENGINE, ROOT, "https"))
                self.assertIn("scheme: https" if kind == "prometheus" else "https://", found)
                self.assertNotIn("http://", found)

    @unittest.skipUnless(tomllib, "needs tomllib")
    def test_toml(self):
        for place in PLACES:
            address = place.nodes if place.container else place.local
            self.assertEqual({"host": {f"http://{address}": {"capabilities": ["pull", "resolve"],
                                                             "dial_timeout": "1s"}}},
                             tomllib.loads(text("containerd", place)))
            (registry,) = tomllib.loads(text("podman", place))["registry"]
            self.assertEqual([{"location": f"{place.local}/docker.io", "insecure": True}], registry["mirror"])

    def test_scripts(self):
        """They are run, with commands that write down what they are asked for."""
        for kind in ("kind", "minikube"):
            for place in PLACES:
                with self.subTest(kind, place=place):
                    self.run_script(kind, place)

    def run_script(self, kind, place):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        home = Path(folder.name)
        commands = {"kind": 'echo node-1', "docker": f'case "$*" in *inspect*) echo "fc00::1 172.19.0.1 ";; '
                    f'*exec\\ -i*) cat > {home}/hosts.toml;; esac', "kubectl": f"cat > {home}/applied", "minikube": ":"}
        for name, script in commands.items():
            path = home / name
            path.write_text(f"#!/bin/sh\necho {name} \"$@\" >> {home}/calls\n{script}\n")
            path.chmod(0o755)
        subprocess.run(["sh", "-s"], input=text(kind, place), text=True, check=True,
                       env={"PATH": f"{home}:{os.environ['PATH']}", "HOME": str(home)})
        calls = (home / "calls").read_text()
        if kind == "minikube":
            address = place.nodes.replace("k3d.internal", "minikube.internal")
            self.assertIn("minikube start", calls)
            found = [path.read_text() for path in home.glob(".minikube/files/etc/containerd/certs.d/*/hosts.toml")]
            self.assertEqual(2, len(found))
        else:
            address = "172.19.0.1:5000" if place is ON_THE_HOST else place.nodes
            self.assertEqual(bool(place.container), "docker network connect kind k3d-dockerd" in calls)
            found = [(home / "hosts.toml").read_text()]
            applied = (home / "applied").read_text()
            self.assertIn(f'hostFromContainerRuntime: "{address}"', applied)
            self.assertIn(f'host: "{place.local}"', applied)
        for each in found:
            self.assertIn(f'[host."http://{address}"]', each)


class TestNode(EngineCase):
    engine = lab.ENGINES["containerd"]

    def folder(self, kind):
        """Start a program, and make a folder with the configuration that it prints. Returns (folder, text)."""
        self.build("1")
        program = self.program()
        done = run("config", kind, "-addr", program.address, DOCKER_HOST=f"unix://{self.engine.socket}")
        done.check_returncode()
        folder = lab.SHARE / self.name
        self.addCleanup(shutil.rmtree, folder)
        folder.mkdir()
        return folder, done.stdout

    def test_node_uses_it(self):
        """The output of the command is the configuration of a real node, which pulls what only Docker has."""
        folder, text = self.folder("containerd")
        (folder / "hosts/_default").mkdir(parents=True)
        (folder / "hosts/_default/hosts.toml").write_text(text)
        reference = f"docker.io/library/{self.name}:1"
        lab.NODE.ctr("images", "pull", "--hosts-dir", f"/lab/{self.name}/hosts", reference)
        self.assertEqual(self.engine.inspect(f"{self.name}:1")["Id"], lab.NODE.digest(reference))

    def test_podman_uses_it(self):
        folder, text = self.folder("podman")
        (folder / "registries.conf").write_text(text)
        inside = f"/lab/{self.name}"

        def podman(*arguments):
            storage = ("--root", f"{inside}/root", "--runroot", f"{inside}/run", "--storage-driver", "vfs")
            return lab.chroot("env", f"CONTAINERS_REGISTRIES_CONF={inside}/registries.conf", "podman", *storage,
                              *arguments).stdout

        reference = f"docker.io/library/{self.name}:1"
        podman("pull", "-q", reference)
        index = json.loads(self.engine.content(self.engine.inspect(f"{self.name}:1")["Id"]))
        self.assertEqual(index["manifests"][0]["digest"],
                         podman("image", "inspect", "-f", "{{.Digest}}", reference).strip())


if __name__ == "__main__":
    unittest.main()
