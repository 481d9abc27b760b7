"""The image of the Dockerfile, on an engine that can do what Docker does on a machine."""

import base64
import json
import os
import sys
import unittest

import cluster
import lab
from cluster import Container, StageCase, as_k3d
from program import MODULE

sys.path.insert(0, str(MODULE.parent))
import k3d_registry_dockerd as module


class TestDockerfile(unittest.TestCase):
    def test_version(self):
        self.assertIn(f'org.opencontainers.image.version="{module.__version__}"', cluster.DOCKERFILE.read_text())

    def test_base(self):
        """A new minor version of Python comes with a commit here, not by itself."""
        self.assertRegex(cluster.base_of_image(), r"^python:3\.\d+-slim$")


class Image(StageCase):
    """Containers of the image, on both image stores."""

    def test_as_k3d_starts_it(self):
        """With another port than 5000, as the check has to find it; without any settings that k3d does not make."""
        with Container(self.engine, self.name, *as_k3d(self.engine, 5102, inside=5102)) as container:
            lab.wait_for("a good health check", lambda: container.state("Health.Status") == "healthy")
            config = self.build(f"localhost:5102/{self.name}:1")
            self.engine.docker("push", "-q", f"localhost:5102/{self.name}:1")
            self.engine.remove(f"localhost:5102/{self.name}:1")
            self.engine.docker("pull", "-q", f"localhost:5102/{self.name}:1")
            self.assertEqual(config, self.config_of(f"localhost:5102/{self.name}:1"))
            self.engine.docker("stop", self.name)
            self.assertEqual("0", container.state("ExitCode"), container.log())

    def test_read_only_without_privileges(self):
        """Every restriction at once. What was pushed is still there in another container on the same volume."""
        socket = self.engine.folder / "docker.sock"
        os.chown(socket, 0, 4711)
        socket.chmod(0o660)
        volume, image = f"{self.name}-volume", f"localhost:5104/{self.name}:1"
        self.addCleanup(self.engine.docker, "volume", "rm", volume)
        arguments = ("--read-only", "--user", "12345:12345", "--group-add", "4711", "--cap-drop", "ALL",
                     "--security-opt", "no-new-privileges", "-p", "5104:5000", "-v", f"{volume}:/var/lib/registry",
                     "-v", f"{self.engine.inside}/docker.sock:/var/run/docker.sock", cluster.IMAGE)
        with Container(self.engine, self.name, *arguments) as container:
            container.wait_for_line(f"image store; content from: store, {self.provider}")
            self.assertEqual("healthy", self.check_health())
            config = self.build(image)
            self.engine.docker("push", "-q", image)
        self.engine.remove(image)
        with Container(self.engine, self.name, *arguments) as container:
            container.wait_for_line("listening on")
            self.engine.docker("pull", "-q", image)
            self.assertEqual(config, self.config_of(image))

    def check_health(self):
        """Run the health check now, as Docker does from time to time, and return what it prints."""
        kind, *command = self.engine.inspect(cluster.IMAGE)["Config"]["Healthcheck"]["Test"]
        self.assertEqual("CMD", kind)
        return self.engine.docker("exec", self.name, *command, check=False)


class TestImage(Image):
    engine = lab.STAGES["stage"]
    provider = "content service"

    def test_settings_file(self):
        (self.engine.folder / "settings.env").write_text(
            "K3D_REGISTRY_DOCKERD_PULL=never\nREGISTRY_HTTP_ADDR=:5103\nREGISTRY_LOG_FORMATTER=json\n")
        container = self.enter(Container(self.engine, self.name, *as_k3d(
            self.engine, 5103, [cluster.SOCKET, cluster.SETTINGS])))
        container.wait_for_line("listening on [::]:5103 (from REGISTRY_HTTP_ADDR")
        self.assertEqual("healthy", self.check_health())
        for line in container.log().splitlines():
            self.assertIn("message", json.loads(line))

    def test_credentials_of_docker_login(self):
        """A config.json at its usual place is used for requests without credentials."""
        self.enter(cluster.network(self.engine))
        origin = self.enter(cluster.Origin(self.engine))
        self.build(f"{self.name}:1")
        image = origin.take(f"{self.name}:1", f"lab/{self.name}:1")
        self.addCleanup(self.engine.remove, image)
        token = base64.b64encode(f"{lab.USER}:{lab.PASSWORD}".encode()).decode()
        (self.engine.folder / "config.json").write_text(json.dumps({"auths": {origin.HOST: {"auth": token}}}))
        ask = ("import urllib.request\ntry: print(urllib.request.urlopen("
               f"'http://localhost:5000/v2/lab/{self.name}/manifests/1?ns={origin.HOST}').status)\n"
               "except urllib.error.HTTPError as e: print(e.code)")
        for volumes, expected in (([cluster.SOCKET], "401"),
                                  ([cluster.SOCKET, "config.json:/root/.docker/config.json:ro"], "200")):
            with self.subTest(volumes), Container(self.engine, self.name, *as_k3d(self.engine, 5105, volumes)) as ours:
                ours.wait_for_line("listening on")
                self.assertEqual(expected, ours.python(ask))

    def test_stop_during_an_upload(self):
        """The upload goes on, but the program, which is the first process, ends by itself."""
        container = self.enter(Container(self.engine, self.name, cluster.IMAGE))
        container.wait_for_line("listening on")
        upload = ("import http.client, time; c = http.client.HTTPConnection('localhost', 5000);"
                  "c.request('POST', '/v2/app/blobs/uploads/'); r = c.getresponse(); r.read();"
                  "c.putrequest('PATCH', r.headers['Location']); c.putheader('Content-Length', '100');"
                  "c.endheaders(b'the first bytes'); print('sent', flush=True); time.sleep(100)")
        self.engine.docker("exec", "-d", self.name, "sh", "-c", f'python3 -c "{upload}" > /tmp/client')
        lab.wait_for("the upload", lambda: self.engine.docker(
            "exec", self.name, "sh", "-c", "read line < /tmp/client && echo $line", check=False) == "sent")
        self.engine.docker("stop", self.name)
        self.assertEqual("0", container.state("ExitCode"), container.log())


class TestImageClassic(Image):
    engine = lab.STAGES["stage-classic"]
    provider = "export"


del Image


if __name__ == "__main__":
    unittest.main()
