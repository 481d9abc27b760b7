"""A registry that was started as k3d does it, and nodes that pull from it by CRI, on an engine of the lab."""

import concurrent.futures
import unittest

import cluster
import lab
from cluster import NAME, PORT, KindNode, grpc
from program import MODULE


@unittest.skipUnless(grpc, "the package grpcio is not installed")
class ClusterCase(cluster.StageCase):
    """Tests with nodes, all of the same cluster."""

    nodes_count = 1

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.enter_class(cluster.network(cls.engine))
        cls.nodes = [cls.enter_class(cluster.Node(cls.engine, f"node{number}"))
                     for number in range(cls.nodes_count)]
        cls.node = cls.nodes[0]

    def lines(self, *texts):
        """Return the lines of the registry's log that have all of these texts."""
        return [line for line in self.registry.log().splitlines() if all(text in line for text in texts)]

    def pull_when_ready(self, image):
        """Pull as soon as node and registry are there, as the kubelet does by trying again."""
        pulled = []

        def works():
            pulled.append(self.node.pull(image))
            return True

        try:
            lab.wait_for(f"a pull of {image}", works)
        except RuntimeError as e:
            raise AssertionError(f"{e}\n{self.registry.log()[-3000:]}") from None
        return pulled[0]


class Pulls(ClusterCase):
    nodes_count = 3

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.registry = cls.enter_class(cluster.registry(cls.engine))
        cls.origin = cls.enter_class(cluster.Origin(cls.engine))

    def test_image_that_only_docker_has(self):
        config = self.build(f"{self.name}:1")
        self.assertEqual(config, self.node.pull(f"{self.name}:1"))
        self.assertTrue(self.lines(f"HEAD /v2/library/{self.name}/manifests/1?ns=docker.io 200"))

    def test_image_under_the_published_port(self):
        """Docker has it as localhost:PORT/…; nothing is pushed. All three names are this registry's."""
        config = self.build(f"localhost:{PORT}/{self.name}:1")
        for host in (f"localhost:{PORT}", f"{NAME}:5000", f"{NAME}:{PORT}"):
            with self.subTest(host):
                self.assertEqual(config, self.node.pull(f"{host}/{self.name}:1"))
                self.node.forget(config)

    def test_pushed_image(self):
        config = self.build(f"localhost:{PORT}/{self.name}:1")
        self.engine.docker("push", "-q", f"localhost:{PORT}/{self.name}:1")
        self.engine.remove(f"localhost:{PORT}/{self.name}:1")
        for host in (f"localhost:{PORT}", f"{NAME}:5000", f"{NAME}:{PORT}"):
            with self.subTest(host):
                self.assertEqual(config, self.node.pull(f"{host}/{self.name}:1"))
                self.node.forget(config)
        with self.assertRaises(grpc.RpcError):
            self.node.pull(f"{NAME}:5000/{self.name}:2")

    def test_built_again(self):
        """The same tag, which the node pulls each time, as with `imagePullPolicy: Always`."""
        for names in ((f"{self.name}:1",), (f"localhost:{PORT}/{self.name}:1",)):
            with self.subTest(names):
                first = self.build(*names)
                self.assertEqual(first, self.node.pull(*names))
                second = self.build(*names)
                self.assertNotEqual(first, second)
                self.assertEqual(second, self.node.pull(*names))

    def test_three_nodes_at_once(self):
        """What none of them has, nor Docker: it is pulled once."""
        config = self.build(f"{self.name}:1")
        image = self.origin.take(f"{self.name}:1", f"lab/{self.name}:1")
        self.addCleanup(self.engine.remove, image)
        with concurrent.futures.ThreadPoolExecutor(len(self.nodes)) as pool:
            pulled = list(pool.map(lambda node: node.pull(image, lab.USER, lab.PASSWORD), self.nodes))
        self.assertEqual([config] * len(self.nodes), pulled)
        self.assertEqual(1, len(self.lines(f"pull {image} as '{lab.USER}': started")))

    def test_credentials(self):
        config = self.build(f"{self.name}:1")
        image = self.origin.take(f"{self.name}:1", f"lab/{self.name}:1")
        self.addCleanup(self.engine.remove, image)
        for what, credentials in (("none", ()), ("wrong", (lab.USER, "wr0ng"))):
            with self.subTest(what):
                with self.assertRaises(grpc.RpcError) as raised:
                    self.node.pull(image, *credentials)
                self.assertRegex(raised.exception.details(), "authorization failed|401 Unauthorized")
        self.assertEqual(config, self.node.pull(image, lab.USER, lab.PASSWORD))
        self.assertEqual([], self.lines("wr0ng") + self.lines(lab.PASSWORD))

    def test_docker_is_restarted(self):
        """All containers are, too: they are found again under their names, and what was pushed is still there."""
        pushed = self.build(f"localhost:{PORT}/{self.name}:1")
        self.engine.docker("push", "-q", f"localhost:{PORT}/{self.name}:1")
        only_docker = self.build(f"{self.name}:1")
        self.engine.restart()
        self.assertEqual(only_docker, self.pull_when_ready(f"{self.name}:1"))
        self.assertEqual(pushed, self.node.pull(f"{NAME}:5000/{self.name}:1"))


class LiveRestore(ClusterCase):
    """Docker is restarted under containers that go on. It makes its socket anew then."""

    @classmethod
    def start_engine(cls):
        super().start_engine()
        cls.addClassCleanup(cls.restart_with)  # once the containers are gone: otherwise they would stay stopped
        cls.restart_with("--live-restore")

    @classmethod
    def restart_with(cls, *options):
        cls.engine.options = options
        cls.engine.restart()

    def restart_under(self, *options):
        """Start a registry, build an image, restart Docker. Returns the digest of the image's config."""
        self.registry = self.enter(cluster.registry(self.engine, *options))
        self.pull_when_ready("base:1")
        config = self.build(f"{self.name}:1")
        started = self.registry.state("StartedAt")
        self.engine.restart()
        self.assertEqual(started, self.registry.state("StartedAt"))
        return config

    def test_socket_is_mounted(self):
        """The container keeps the old socket, and says so, until it is restarted."""
        config = self.restart_under()
        with self.assertRaises(grpc.RpcError):
            self.node.pull(f"{self.name}:1")
        (line,) = self.lines(f"HEAD /v2/library/{self.name}/manifests/1", " 503 ")
        self.assertIn("Docker was started again since: restart this container, or mount the socket's folder", line)
        self.engine.docker("restart", NAME)
        self.assertEqual(config, self.pull_when_ready(f"{self.name}:1"))

    def test_folder_of_the_socket_is_mounted(self):
        (self.engine.folder / "settings.env").write_text("DOCKER_HOST=unix:///docker/docker.sock\n")
        config = self.restart_under([".:/docker:ro", cluster.SETTINGS])
        self.assertEqual(config, self.node.pull(f"{self.name}:1"))


@unittest.skipUnless(grpc, "the package grpcio is not installed")
class Kind(cluster.StageCase):
    """The command kind with a cluster of its own, but for Kubernetes."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.enter_class(cluster.network(cls.engine, KindNode.network))
        cls.registry = cls.enter_class(cluster.Container(cls.engine, NAME, *cluster.as_k3d(cls.engine, PORT)))
        cls.nodes = [cls.enter_class(KindNode(cls.engine, f"{KindNode.CLUSTER}-{role}"))
                     for role in ("control-plane", "worker")]

    def run_on_stage(self, *command, **options):
        return self.engine.stage.run("env", f"DOCKER_HOST={self.engine.host}", *command, check=False, **options)

    def load(self, image):
        return self.run_on_stage("kind", "load", "docker-image", image, "--name", KindNode.CLUSTER)

    def configure_nodes(self):
        """Run what `config kind` prints. There is no Kubernetes, so kubectl writes down what it is told to apply."""
        script = self.engine.docker("exec", NAME, "python3", f"/{MODULE.name}", "config", "kind")
        kubectl = 'kubectl() { echo "$*"; cat; }\n'
        done = self.run_on_stage("sh", "-s", KindNode.CLUSTER, input=kubectl + script)
        self.assertEqual(0, done.returncode, done.stderr)
        return done.stdout

    def test_configured_nodes_pull(self):
        said = self.configure_nodes()
        self.assertIn(f"--context kind-{KindNode.CLUSTER} apply -f -\n", said)
        self.assertIn(f'hostFromContainerRuntime: "{NAME}:5000"\n', said)
        config = self.build(f"{self.name}:1")
        for node in self.nodes:
            self.assertEqual(config, node.pull(f"{self.name}:1"))
        self.configure_nodes()  # again

    def test_one_platform_of_several(self):
        """Docker has one platform of an image. `kind load` of it fails, and a pull works."""
        pushed = f"localhost:{PORT}/{self.name}:1"
        self.engine.build(pushed, {"file": b"content"}, "scratch", "--platform=linux/amd64,linux/arm64", "--push")
        self.engine.remove(pushed)
        self.engine.docker("pull", "-q", pushed)
        self.engine.docker("tag", pushed, f"{self.name}:1")
        self.addCleanup(self.engine.remove, pushed, f"{self.name}:1")
        loaded = self.load(f"{self.name}:1")
        self.assertNotEqual(0, loaded.returncode)
        self.assertRegex(loaded.stderr, "content digest sha256:[0-9a-f]{64}: not found")
        self.configure_nodes()
        config = self.config_of(f"{self.name}:1")
        self.assertEqual(config, self.nodes[0].pull(f"{self.name}:1"))

    def test_one_platform(self):
        """Docker has all of an image: `kind load` works, too."""
        self.build(f"{self.name}:1")
        loaded = self.load(f"{self.name}:1")
        self.assertEqual(0, loaded.returncode, loaded.stderr)


class TestKind(Kind):
    engine = lab.STAGES["stage"]


class TestPulls(Pulls):
    engine = lab.STAGES["stage"]


class TestPullsClassic(Pulls):
    engine = lab.STAGES["stage-classic"]


class TestLiveRestore(LiveRestore):
    engine = lab.STAGES["stage"]


del ClusterCase, Pulls, LiveRestore, Kind


if __name__ == "__main__":
    unittest.main()
