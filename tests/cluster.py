"""A cluster like one of k3d: the registry's container, and nodes that pull by CRI, on an engine of the lab.

A node is a container with containerd, configured as k3s does it, without a kubelet. Its programs are those of the
lab's root, which is mounted into it, so that no image has to be made. Pulls need the package grpcio.
"""

import contextlib
import json
import os
import re
import shutil
import socket
import unittest
import uuid
from pathlib import PurePosixPath

import lab
from program import MODULE

try:
    import grpc
except ImportError:
    grpc = None

IMAGE = "k3d-registry-dockerd"
NAME, PORT = "k3d-dockerd", 5001
NETWORK, SUBNET = "k3d-demo", "172.30.0.0/24"
DOCKERFILE = MODULE.parent / "Dockerfile"
MACHINE = ("-v", "/usr:/usr:ro", "-v", "/lib:/lib:ro", "-v", "/lib64:/lib64:ro")  # of the lab's root


def base_of_image():
    """Return the name of the image that the Dockerfile begins with."""
    return re.search(r"(?m)^FROM (\S+)", DOCKERFILE.read_text())[1]


def build_image(engine):
    """Build the image as a user does, from a stand-in for its base."""
    lab.python_image(engine, base_of_image())
    context = lab.tar_of({"Dockerfile": DOCKERFILE.read_bytes(), MODULE.name: MODULE.read_bytes()}, 0o644)
    engine.docker("build", "-q", "-t", IMAGE, "-", input=context, text=False)


class Container:
    """A container. It is there as long as the `with`, and so are its anonymous volumes."""

    def __init__(self, engine, name, *arguments):
        """arguments are those of `docker run`, without the name."""
        self.engine, self.name = engine, name
        engine.docker("run", "-d", "--name", name, *arguments)

    def state(self, what):
        """Return a field of its state: Running, ExitCode, Health.Status."""
        return self.engine.docker("inspect", "-f", f"{{{{.State.{what}}}}}", self.name)

    def log(self):
        """Return all that it has written."""
        result = lab.chroot("docker", "-H", self.engine.host, "logs", self.name)
        return result.stdout + result.stderr

    def wait_for_line(self, text):
        try:
            lab.wait_for(f"{text!r} in the log of {self.name}", lambda: text in self.log())
        except RuntimeError as e:
            raise AssertionError(f"{e}\n{self.log()}") from None

    def python(self, code):
        """Run Python code inside, and return what it prints."""
        return self.engine.docker("exec", self.name, "python3", "-c", code)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.engine.docker("rm", "-f", "-v", self.name, check=False)


SOCKET = "docker.sock:/var/run/docker.sock"
SETTINGS = "settings.env:/etc/k3d-registry-dockerd.env:ro"


def as_k3d(engine, port, volumes=(SOCKET,), host="0.0.0.0", inside=5000):
    """Return the arguments of `docker run` for what k3d 5.9 does in `k3d registry create --port HOST:PORT --volume …
    --proxy-remote-url "*" --delete-enabled`; with another port inside also with `--enforce-port-match`.

    The source of a volume is a path in the engine's folder, or begins with a slash.
    """
    return ("--hostname", NAME, "--privileged", "--init", "--restart", "unless-stopped",
            "--tmpfs", "/run", "--tmpfs", "/var/run", "--network", "bridge", "-p", f"{host}:{port}:{inside}",
            "-e", "REGISTRY_PROXY_REMOTEURL=*", "-e", "REGISTRY_STORAGE_DELETE_ENABLED=true",
            *(["-e", f"REGISTRY_HTTP_ADDR=:{inside}"] if inside != 5000 else []),
            *[f"--volume={PurePosixPath(engine.inside, volume)}" for volume in volumes], IMAGE)


@contextlib.contextmanager
def network(engine, name=NETWORK):
    """Make the network of a cluster."""
    engine.docker("network", "create", "--subnet", SUBNET, name)
    try:
        yield
    finally:
        engine.docker("network", "rm", name)


@contextlib.contextmanager
def registry(engine, volumes=(SOCKET,)):
    """Start the registry as k3d does, and connect it to the network of the cluster. Yields the Container."""
    with Container(engine, NAME, *as_k3d(engine, PORT, volumes, "127.0.0.1")) as container:
        engine.docker("network", "connect", NETWORK, NAME)
        container.wait_for_line("listening on")
        yield container


class Origin(Container):
    """A registry that wants credentials, on the network of the cluster."""

    HOST = "172.30.0.100:5000"

    def __init__(self, engine):
        folder = engine.folder / "origin"
        folder.mkdir(exist_ok=True)
        (folder / "htpasswd").write_text(lab.HTPASSWD)
        (folder / "config.yml").write_text(
            "version: 0.1\nlog: {level: warn}\nstorage: {filesystem: {rootdirectory: /origin/data}}\n"
            "http: {addr: ':5000'}\nauth: {htpasswd: {realm: lab, path: /origin/htpasswd}}\n")
        super().__init__(engine, "origin", "--restart", "unless-stopped", "--network", NETWORK,
                         "--ip", self.HOST.partition(":")[0], *MACHINE, "-v", f"{engine.inside}/origin:/origin",
                         "base:1", "/usr/bin/docker-registry", "serve", "/origin/config.yml")
        lab.wait_for("origin", lambda: engine.docker("login", "-u", lab.USER, "--password-stdin", self.HOST,
                                                     input=lab.PASSWORD))
        engine.docker("logout", self.HOST)

    def take(self, image, name):
        """Move an image from the engine to this registry. Returns its name there."""
        target = f"{self.HOST}/{name}"
        self.engine.docker("login", "-u", lab.USER, "--password-stdin", self.HOST, input=lab.PASSWORD)
        self.engine.docker("tag", image, target)
        self.engine.docker("push", "-q", target)
        self.engine.docker("logout", self.HOST)
        self.engine.remove(image, target)
        return target


HOSTS = """\
# File generated by k3s. DO NOT EDIT.

server = "{server}"
capabilities = ["pull", "resolve", "push"]

[host."http://{name}:5000/v2"]
  capabilities = ["pull", "resolve"]
"""


class Node(Container):
    """A container with containerd, whose CRI socket can be used from outside."""

    network, options, certs = NETWORK, (), "/node/certs.d"

    def __init__(self, engine, name):
        folder = engine.folder / name
        # `mirrors: "*"`, and the registry's two names, which k3d adds.
        for host, server in (("_default", ""), (f"{NAME}_5000_", f"https://{NAME}:5000/v2"),
                             (f"{NAME}_{PORT}_", f"https://{NAME}:{PORT}/v2")):
            hosts = folder / "certs.d" / host
            hosts.mkdir(parents=True)
            (hosts / "hosts.toml").write_text(HOSTS.format(server=server, name=NAME))
        (folder / "config.toml").write_text(
            "version = 3\nroot = '/var/lib/containerd'\nstate = '/run/containerd'\n"
            "[grpc]\n  address = '/node/containerd.sock'\n"
            f"[plugins.'io.containerd.cri.v1.images'.registry]\n  config_path = '{self.certs}'\n")
        self.folder, self.socket = folder, folder / "containerd.sock"
        super().__init__(engine, name, "--hostname", name, "--privileged", "--init", "--restart", "unless-stopped",
                         "--tmpfs", "/run", "--network", self.network, *self.options, *MACHINE,
                         "-v", "/var/lib/containerd", "-v", f"{engine.inside}/{name}:/node",
                         "base:1", "/usr/bin/containerd", "-c", "/node/config.toml")

    def __exit__(self, *error):
        super().__exit__(*error)
        shutil.rmtree(self.folder, ignore_errors=True)

    def listens(self):
        with socket.socket(socket.AF_UNIX) as sock:
            return sock.connect_ex(str(self.socket)) == 0

    def call(self, method, request):
        """Send a request of CRI, encoded; return the answer, encoded. Raises grpc.RpcError."""
        lab.wait_for(f"containerd of {self.name}", self.listens)  # gRPC itself tries again after a second
        with grpc.insecure_channel(f"unix://{self.socket}") as channel:
            return channel.unary_unary(f"/runtime.v1.{method}")(request, timeout=120, wait_for_ready=True)

    def pull(self, image, user=None, password=None):
        """Have it pull an image, like the kubelet for a pod. Returns the image's ID. Raises grpc.RpcError."""
        auth = message({1: user, 2: password}) if user else None
        answer = self.call("ImageService/PullImage", message({1: message({1: image}), 2: auth}))
        return first_field(answer)

    def forget(self, image):
        """Remove an image, by name or ID."""
        self.call("ImageService/RemoveImage", message({1: message({1: image})}))


class KindNode(Node):
    """A node of a cluster that `kind` takes for one of its own."""

    CLUSTER = "demo"

    network, certs = "kind", "/etc/containerd/certs.d"  # nothing is there yet
    options = ("--label", f"io.x-k8s.kind.cluster={CLUSTER}", "--label", "io.x-k8s.kind.role=control-plane",
               "-e", "CONTAINERD_ADDRESS=/node/containerd.sock")  # for ctr


def message(fields):
    """Encode a message of Protocol Buffers, whose fields are texts, messages (bytes), or None to leave them out."""
    encoded = b""
    for number, value in fields.items():
        if value is not None:
            data = value.encode() if isinstance(value, str) else value
            encoded += bytes([number << 3 | 2]) + varint(len(data)) + data
    return encoded


def varint(number):
    return bytes([number]) if number < 128 else bytes([number & 127 | 128]) + varint(number >> 7)


def first_field(data):
    """Return the text of a message's first field, which must be shorter than 128 bytes."""
    assert data[0] == 1 << 3 | 2, data
    assert data[1] < 128, data
    return data[2:2 + data[1]].decode()


STARTED = set()  # engines that this process has started


class StageCase(unittest.TestCase):
    """Tests on a stage. The first class of a module begins it and builds the image; the end of the module ends it."""

    engine: lab.StageEngine

    @classmethod
    def setUpClass(cls):
        lab.require()
        cls.start_engine()

    @classmethod
    def start_engine(cls):
        if cls.engine not in STARTED:
            STARTED.add(cls.engine)
            unittest.addModuleCleanup(STARTED.remove, cls.engine)
            unittest.addModuleCleanup(cls.engine.end)
            cls.engine.begin()
            build_image(cls.engine)

    @classmethod
    def enter_class(cls, context):
        """Enter a context for all tests of the class; return its value."""
        value = context.__enter__()
        cls.addClassCleanup(context.__exit__, None, None, None)
        return value

    def enter(self, context):
        """Enter a context for this test; return its value."""
        value = context.__enter__()
        self.addCleanup(context.__exit__, None, None, None)
        return value

    def setUp(self):
        self.name = f"t{uuid.uuid4().hex[:10]}"

    def build(self, *names):
        """Build an image with content of its own under some names. Returns the digest of its config."""
        self.engine.build(names[0], {"file": os.urandom(1000)})
        for name in names[1:]:
            self.engine.docker("tag", names[0], name)
        self.addCleanup(self.engine.remove, *names)
        return self.config_of(names[0])

    def config_of(self, image):
        """Return the digest of an image's config, which nodes take for its ID."""
        image_id = self.engine.inspect(image)["Id"]
        if not self.engine.containerd_store:
            return image_id
        document = json.loads(self.engine.content(image_id))
        if "manifests" in document:
            document = json.loads(self.engine.content(document["manifests"][0]["digest"]))
        return document["config"]["digest"]
