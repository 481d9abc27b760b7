#!/usr/bin/env python3
"""The test lab: real Docker engines, registries and a containerd node, on any Debian machine.

    python tests/lab.py up        start it (90 seconds the first time, a few seconds after that)
    python tests/lab.py status    print what is running
    python tests/lab.py down      stop every daemon and unmount; downloaded files are kept
    python tests/lab.py clean     down, and remove the lab's folder

It needs root and Debian's package mirror, nothing else: the engines are packages of several Debian suites,
which are unpacked into folders and entered with chroot. Every daemon listens on a unix socket or on
127.0.0.1. The folder is /var/tmp/k3d-registry-dockerd-lab, or the value of LAB_DIR.

Tests use the functions of this module: `lab.require()` in setUpModule, then `lab.ENGINES`, `lab.NODE`,
`lab.ORIGINS`. Engines of `lab.STAGES` are not up with the lab: they have namespaces of their own, for tests of
containers with networks, ports and health checks, which begin and end them (see cluster.py). Tests that need
the lab are skipped if it is not up, unless LAB=required is in the environment, as in continuous integration.
"""

import base64
import contextlib
import hashlib
import http.client
import http.server
import io
import json
import os
import shutil
import signal
import socket
import socketserver
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import unittest
import urllib.error
import urllib.request
from pathlib import Path

LAB = Path(os.environ.get("LAB_DIR", "/var/tmp/k3d-registry-dockerd-lab"))
ROOTS = LAB / "roots"
SHARE = LAB / "share"  # the same folder is /lab inside every root

USER, PASSWORD = "developer", "s3cret"
HTPASSWD = "developer:$2b$04$k3dregistrydockerdlab.ThCwkArtkgFA3zXWzBuYJwmAUJIsNlm\n"

ENGINE_PACKAGES = "docker.io,containerd,runc,iptables,ca-certificates"
CLIENT_PACKAGES = ("docker-cli,docker-buildx,crane,oras,skopeo,docker-registry,kind,openssh-server,python3,"
                   "busybox-static")
SUITES = {
    "forky": f"{ENGINE_PACKAGES},{CLIENT_PACKAGES},podman",  # Docker 28, containerd 2.1, Podman 5.8
    "trixie": ENGINE_PACKAGES,  # Docker 26.1: no Descriptor in inspect
    "bookworm": ENGINE_PACKAGES,  # Docker 20.10: exports are docker-archives
}
CLIENT_ROOT = ROOTS / "forky"

OPEN_PORT, PRIVATE_PORT = 15310, 15311  # of the registries to pull from
FIRST_MIRROR = "127.0.0.1:15312"  # the address of the program for the engine that uses it as a mirror

START_TIMEOUT = 60  # seconds until a daemon must respond


# --- processes ---------------------------------------------------------------------------------


def run(*command, input=None, check=True, env=None, text=True):
    """Run a command to its end and return the CompletedProcess. Raises RuntimeError with its output if it fails."""
    result = subprocess.run([str(c) for c in command], input=input, capture_output=True, text=text,
                            env={**os.environ, **(env or {})})
    if check and result.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))} ended with status {result.returncode}:\n"
                           f"{result.stdout[-2000:]}\n{result.stderr[-2000:]}")
    return result


def chroot(*command, root=None, **options):
    """Run a command inside a root, by default the one with the clients."""
    return run("chroot", root or CLIENT_ROOT, *command, **options)


def wait_for(what, condition, timeout=START_TIMEOUT):
    """Poll until condition() is true. A timeout raises RuntimeError with the last exception of condition()."""
    deadline = time.monotonic() + timeout
    error = None
    while time.monotonic() < deadline:
        try:
            if condition():
                return
        except Exception as e:  # reported after the timeout
            error = e
        time.sleep(0.05)
    raise RuntimeError(f"{what} did not come up in {timeout} seconds ({error})")


class Daemon:
    """A process in a root. It has a pid file, so that any process can stop it."""

    def __init__(self, name, root="forky"):
        self.name, self.root, self.folder = name, ROOTS / root, SHARE / name
        self.pidfile, self.log = self.folder / "pid", self.folder / "log"

    def pid(self):
        """Return the pid of the running daemon, or None."""
        try:
            pid = int(self.pidfile.read_text())
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except (OSError, ValueError):
            return None
        return None if state == "Z" else pid

    def entry(self):
        """Return the command that enters the root; the daemon's own command follows it."""
        return ["chroot", str(self.root)]

    def start(self):
        if self.pid():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.log, "ab") as log:
            process = subprocess.Popen([*self.entry(), *self.command()], stdin=subprocess.DEVNULL,
                                       stdout=log, stderr=log, start_new_session=True)
        self.pidfile.write_text(str(process.pid))
        process.returncode = 0  # no ResourceWarning: it is meant to outlive this process
        try:
            wait_for(self.name, self.answers)
        except RuntimeError as e:
            raise RuntimeError(f"{e}\n{self.log.read_text()[-3000:]}") from None

    def stop(self, how=signal.SIGTERM):
        pid = self.pid()
        if pid is None:
            return
        os.kill(pid, how)
        with contextlib.suppress(ChildProcessError):  # when another process started it
            os.waitpid(pid, 0)
        wait_for(f"the end of {self.name}", lambda: not self.pid())
        self.pidfile.unlink(missing_ok=True)

    def restart(self):
        self.stop()
        self.start()


# --- engines -----------------------------------------------------------------------------------


class UnixConnection(http.client.HTTPConnection):
    def __init__(self, path):
        super().__init__("docker")
        self.path = str(path)

    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(self.path)


class Engine(Daemon):
    """A dockerd with its own containerd, and a docker client that uses it.

    mirrors are the URLs of the registries that it tries for images of Docker Hub, in this order, before Docker Hub.
    """

    def __init__(self, name, root, containerd_store, mirrors=()):
        super().__init__(name, root)
        self.containerd_store, self.mirrors = containerd_store, mirrors
        self.socket = self.folder / "docker.sock"
        self.inside = f"/lab/{name}"  # the folder as seen from inside the roots
        self.host = f"unix://{self.inside}/docker.sock"

    def command(self):
        inside = f"/lab/{self.name}"
        config = {"features": {"containerd-snapshotter": True}} if self.containerd_store else {}
        (self.folder / "daemon.json").write_text(json.dumps(config))
        return ["dockerd", f"--config-file={inside}/daemon.json", f"--host={self.host}",
                f"--data-root={inside}/data", f"--exec-root={inside}/exec", f"--pidfile={inside}/dockerd.pid",
                "--iptables=false", "--ip6tables=false", "--bridge=none",
                *[f"--registry-mirror={mirror}" for mirror in self.mirrors]]

    def answers(self):
        return self.api("GET", "/_ping") == b"OK"

    def api(self, method, path, body=None):
        """Send one request to the Engine API; return the body. Raises RuntimeError for an error status."""
        connection = UnixConnection(self.socket)
        with contextlib.closing(connection):
            connection.request(method, path, body)
            response = connection.getresponse()
            data = response.read()
        if response.status >= 300:
            raise RuntimeError(f"{method} {path}: {response.status} {data!r}")
        return data

    def docker(self, *arguments, **options):
        """Run `docker …` with this engine, and its own credentials; return its output, stripped."""
        out = chroot("docker", "--config", f"/root/.docker-{self.name}", "-H", self.host, *arguments, **options).stdout
        return out.strip() if isinstance(out, str) else out

    def inspect(self, name):
        return json.loads(self.api("GET", f"/images/{name}/json"))

    def remove(self, *names):
        """Remove these images if they exist, and everything that only they use."""
        for name in names:
            chroot("docker", "-H", self.host, "rmi", "-f", name, check=False)

    def containerd(self, *arguments, **options):
        """Run `ctr …` with this engine's own containerd, in Docker's namespace; return its output."""
        address = f"/lab/{self.name}/exec/containerd/containerd.sock"
        return chroot("ctr", "-a", address, "-n", "moby", *arguments, root=self.root, **options).stdout

    def content(self, digest):
        """Return the bytes of a blob in Docker's content store."""
        return self.containerd("content", "get", digest, text=False)

    def import_image(self, name, files, changes=()):
        """Make a one-layer image of {path: bytes}."""
        self.docker("import", *[f"--change={c}" for c in changes], "-", name, input=tar_of(files), text=False)

    def build(self, name, files, base="base:1", *options, add=False):
        """Build an image with one layer per file on top of base. With add, the files are tars to be unpacked there."""
        self.docker("build", "-q", "-t", name, *options, "-", input=context_of(files, base, add), text=False)
        return self.inspect(name)["Id"]


class Stage(Daemon):
    """Namespaces for mounts, processes and the network, in which an engine can do all that it does on a machine.

    A dockerd in a chroot runs `docker exec` and health checks in the machine's own root; here `/` is the root itself.
    Bridges, iptables and published ports are here alone. With its first process, all that was started in it ends.
    """

    SCRIPT = """
        mount -t proc proc "$0/proc"
        mount -t sysfs sysfs "$0/sys"
        mount --rbind /sys/fs/cgroup "$0/sys/fs/cgroup"
        mount -t tmpfs tmpfs "$0/run"
        chroot "$0" busybox ip link set lo up
        cd "$0"
        pivot_root . .
        umount -l .
        exec "$@"
    """

    def entry(self):
        return ["unshare", "--mount", "--net", "--pid", "--fork", "--kill-child", "--propagation", "private",
                "sh", "-ec", self.SCRIPT, str(self.root)]

    def command(self):
        return ["docker-init", "sleep", "infinity"]  # tini, which reaps the processes that are left behind

    def enter(self):
        """Return the command that enters the namespaces; another command follows it."""
        pid = self.pid()
        return ["nsenter", f"--target={pid}", "--mount", "--net", f"--pid=/proc/{pid}/ns/pid_for_children"]

    def run(self, *command, **options):
        """Run a command inside, and return the CompletedProcess."""
        return run(*self.enter(), *command, **options)

    def answers(self):
        return self.run("test", "-d", "/lab", check=False).returncode == 0

    def stop(self, how=signal.SIGKILL):  # unshare leaves all others to its child
        super().stop(how)


class StageEngine(Engine):
    """A dockerd on a stage of its own, with bridges. It is not up with the lab: tests begin and end it.

    options are more arguments of dockerd. Registries on its networks need no TLS.
    """

    def __init__(self, name, containerd_store):
        super().__init__(name, "forky", containerd_store)
        self.stage, self.options = Stage(f"{name}-stage"), ()

    def entry(self):
        return self.stage.enter()

    def command(self):
        withheld = ("--iptables", "--ip6tables", "--bridge")
        return [*(word for word in super().command() if not word.startswith(withheld)),
                "--insecure-registry=172.16.0.0/12", *self.options]

    def start(self):
        self.stage.start()
        super().start()

    def stop(self, how=signal.SIGTERM):
        """Stop dockerd. What runs on the stage stays, as far as Docker leaves it."""
        if self.pid():
            self.stage.run("busybox", "kill", f"-{int(how)}", (self.folder / "dockerd.pid").read_text())
            wait_for(f"the end of {self.name}", lambda: not self.pid())

    def begin(self):
        """Start it without any containers and images but `base:1`."""
        self.end()  # what tests that were killed have left
        self.start()
        base_image(self)

    def end(self):
        """End everything on the stage, and remove all data of the engine."""
        self.stage.stop()
        wait_for(f"the end of {self.name}", lambda: not self.pid())
        shutil.rmtree(self.folder, ignore_errors=True)


class Podman(Engine):
    """A Podman service.

    The docker client works with it, except for builds, which it would do in a separate builder. The docker client
    calls NAME:1 docker.io/library/NAME:1. Podman's own client calls an image that it builds as NAME:1
    localhost/NAME:1.
    """

    def __init__(self, name, root):
        super().__init__(name, root, containerd_store=False)

    def command(self):
        inside = f"/lab/{self.name}"
        settings = {
            "CONTAINERS_CONF": "[engine]\ncgroup_manager = 'cgroupfs'\nevents_logger = 'file'\n",
            "CONTAINERS_STORAGE_CONF": f"[storage]\ndriver = 'overlay'\ngraphroot = '{inside}/data'\n"
                                       f"runroot = '{inside}/run'\n",
            "CONTAINERS_REGISTRIES_CONF": "unqualified-search-registries = ['docker.io']\n"
                                          "[[registry]]\nprefix = '127.0.0.1'\nlocation = '127.0.0.1'\n"
                                          "insecure = true\n",
        }
        for variable, text in settings.items():
            (self.folder / variable).write_text(text)
        return ["env", *[f"{variable}={inside}/{variable}" for variable in settings],
                "podman", "system", "service", "--time=0", self.host]

    def podman(self, *arguments, **options):
        """Run `podman …` with this service; return its output, stripped."""
        out = chroot("podman", "--url", self.host, *arguments, **options).stdout
        return out.strip() if isinstance(out, str) else out

    def build(self, name, files, base="base:1", *options, add=False):
        """Build an image as Engine.build does. A name without a host is one under localhost."""
        self.podman("build", "-q", "-t", name, *options, "-", input=context_of(files, base, add), text=False)
        return self.inspect(name if "." in name.split("/")[0] else f"localhost/{name}")["Id"]


def tar_of(files, mode=0o755):
    """Return a tar archive (bytes) of {path: bytes}."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for path, data in files.items():
            member = tarfile.TarInfo(path)
            member.size, member.mode = len(data), mode
            archive.addfile(member, io.BytesIO(data))
    return out.getvalue()


def context_of(files, base, add):
    """Return a build context (bytes): the files, and a Dockerfile with one layer per file on top of base."""
    lines = (f"ADD {path} /" if add else f"COPY {path} /{path}" for path in files)
    dockerfile = "\n".join([f"FROM {base}", *lines, ""])
    return tar_of({"Dockerfile": dockerfile.encode(), **files})


def python_image(engine, name):
    """Make a stand-in for an image of Docker Hub like python:3-slim, from the clients' root.

    It has Python with the libraries that it links to, busybox as a shell, and some folders that Debian has.
    """
    libraries = chroot("sh", "-c", "ldd /usr/bin/python3 $(ls /usr/lib/python3.*/lib-dynload/_*ssl*.so "
                                   "/usr/lib/python3.*/lib-dynload/_hash*.so) | grep -o '/[^ :]*lib[^ :]*'")
    paths = {path.lstrip("/") for path in libraries.stdout.split() if "dynload" not in path}
    paths |= {"usr/bin/python3", *(f"usr/lib/{path.name}" for path in CLIENT_ROOT.glob("usr/lib/python3.*"))}
    archive = io.BytesIO(run("tar", "-C", CLIENT_ROOT, "--dereference", "--exclude=__pycache__",
                             "--exclude=sitecustomize.py", "-c", *sorted(paths), text=False).stdout)
    with tarfile.open(fileobj=archive, mode="a") as added:
        for path, mode in (("run", 0o755), ("tmp", 0o1777), ("var/lib", 0o755)):
            folder = tarfile.TarInfo(path)
            folder.type, folder.mode = tarfile.DIRTYPE, mode
            added.addfile(folder)
        link = tarfile.TarInfo("var/run")
        link.type, link.linkname = tarfile.SYMTYPE, "/run"
        added.addfile(link)
        added.add(CLIENT_ROOT / "bin/busybox", "bin/sh")
        added.add(CLIENT_ROOT / "etc/passwd", "etc/passwd")
    engine.docker("import", "-", name, input=archive.getvalue(), text=False)


# --- registries to pull from -------------------------------------------------------------------


class Origin(Daemon):
    """A docker-registry on 127.0.0.1, open or with Basic authentication."""

    def __init__(self, name, port, private):
        super().__init__(name)
        self.port, self.private, self.host = port, private, f"127.0.0.1:{port}"

    def command(self):
        auth = f"auth: {{htpasswd: {{realm: lab, path: /lab/{self.name}/htpasswd}}}}\n" if self.private else ""
        (self.folder / "htpasswd").write_text(HTPASSWD)
        (self.folder / "config.yml").write_text(
            "version: 0.1\nlog: {level: warn}\n"
            f"storage: {{filesystem: {{rootdirectory: /lab/{self.name}/data}}, delete: {{enabled: true}}}}\n"
            f"http: {{addr: '{self.host}'}}\n{auth}")
        return ["docker-registry", "serve", f"/lab/{self.name}/config.yml"]

    def request(self, method, path, headers=(), body=None):
        """Send one request; return (status, headers, body)."""
        request = urllib.request.Request(f"http://{self.host}{path}", body, dict(headers), method=method)
        if self.private:
            token = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
            request.add_header("Authorization", f"Basic {token}")
        try:
            with urllib.request.urlopen(request) as response:
                return response.status, response.headers, response.read()
        except urllib.error.HTTPError as e:
            return e.code, e.headers, e.read()

    def answers(self):
        return self.request("GET", "/v2/")[0] == 200

    def digest(self, name, reference):
        """Return the digest of a reference at this registry."""
        accept = ("application/vnd.oci.image.index.v1+json, application/vnd.oci.image.manifest.v1+json, "
                  "application/vnd.docker.distribution.manifest.list.v2+json, "
                  "application/vnd.docker.distribution.manifest.v2+json")
        status, headers, body = self.request("HEAD", f"/v2/{name}/manifests/{reference}", {"Accept": accept})
        assert status == 200, (status, body)
        return headers["Docker-Content-Digest"]

    def push(self, engine, image, name):
        """Push an engine's image to this registry as `name` and return its digest there."""
        target = f"{self.host}/{name}"
        engine.docker("tag", image, target)
        if self.private:
            engine.docker("login", "-u", USER, "--password-stdin", self.host, input=PASSWORD)
        engine.docker("push", "-q", target)
        if self.private:
            engine.docker("logout", self.host)
        engine.remove(target)
        return self.digest(*name.rsplit(":", 1))


def push_blob(origin, name, data):
    """Upload a blob to an origin; return its descriptor without a media type."""
    digest = "sha256:" + hashlib.sha256(data).hexdigest()
    _, headers, _ = origin.request("POST", f"/v2/{name}/blobs/uploads/")
    location = headers["Location"].split(origin.host, 1)[-1]
    status, _, body = origin.request("PUT", f"{location}&digest={digest}",
                                     {"Content-Type": "application/octet-stream"}, data)
    assert status == 201, body
    return {"digest": digest, "size": len(data)}


def push_document(origin, name, reference, document):
    """Upload a manifest or an index to an origin; return its descriptor."""
    data = json.dumps(document).encode()
    digest = "sha256:" + hashlib.sha256(data).hexdigest()
    media_type = document["mediaType"]
    status, _, body = origin.request("PUT", f"/v2/{name}/manifests/{reference or digest}",
                                     {"Content-Type": media_type}, data)
    assert status == 201, body
    return {"mediaType": media_type, "digest": digest, "size": len(data)}


def push_platforms(origin, name, tag, architectures, files=()):
    """Put an image for several architectures on an origin. Returns (index digest, manifest digests).

    No engine has seen its layers. files are (path, bytes), one layer each, or complete layers (bytes). There is one
    more layer, with the name of the architecture.
    """
    children = []
    for architecture in architectures:
        layers = [file if isinstance(file, bytes) else tar_of(dict([file]))
                  for file in [(architecture, architecture.encode() + os.urandom(8)), *files]]
        diff_ids = ["sha256:" + hashlib.sha256(layer).hexdigest() for layer in layers]
        config = json.dumps({"architecture": architecture, "os": "linux", "config": {},
                             "rootfs": {"type": "layers", "diff_ids": diff_ids}}).encode()
        child = push_document(origin, name, None, {
            "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": {"mediaType": "application/vnd.oci.image.config.v1+json", **push_blob(origin, name, config)},
            "layers": [{"mediaType": "application/vnd.oci.image.layer.v1.tar", **push_blob(origin, name, layer)}
                       for layer in layers]})
        children.append({**child, "platform": {"architecture": architecture, "os": "linux"}})
    index = push_document(origin, name, tag, {
        "schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": children})
    return index["digest"], [child["digest"] for child in children]


class QuietServer(http.server.ThreadingHTTPServer):
    def handle_error(self, request, client_address):
        """Ignore clients that try TLS first and close the connection."""


class OriginHandler(http.server.BaseHTTPRequestHandler):
    """The base class of registries for one test. A subclass has do_GET, which is used for HEAD as well."""

    default_request_version = "HTTP/1.1"  # or dockerd cannot parse the response to its TLS handshake

    def do_HEAD(self):
        self.do_GET()

    def answer(self, status, body, headers=()):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **dict(headers)}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *arguments):
        pass


@contextlib.contextmanager
def refusing_origin(status, code):
    """Start a registry that sends one error for every manifest request; yield its HOST:PORT."""

    class Refuse(OriginHandler):
        def do_GET(self):
            good = self.path == "/v2/"
            body = b"{}" if good else json.dumps({"errors": [{"code": code, "message": code.lower()}]}).encode()
            self.answer(200 if good else status, body, {"Content-Type": "application/json"})

    with QuietServer(("127.0.0.1", 0), Refuse) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()


class TokenOrigin:
    """An origin like Docker Hub: it requires a Bearer token, and redirects requests for blobs.

    requests   (path, Authorization) of all requests so far, including those to the redirect target, the storage
    answers    text in a path -> (status, body) to send instead
    """

    def __init__(self, origin, private=False, redirect=307):
        self.requests, self.answers, self._tokens = [], {}, set()
        token_origin = self

        class Front(OriginHandler):
            def faulty(self, path):
                """Record the request. If answers has a response for it, send that and return True."""
                token_origin.requests.append((path, self.headers["Authorization"]))
                fault = next((answer for text, answer in token_origin.answers.items() if text in path), None)
                if fault:
                    self.answer(*fault)
                return bool(fault)

            def do_GET(self):
                authorization = self.headers["Authorization"]
                if self.faulty(self.path):
                    return
                if self.path.startswith("/token"):
                    self.token(authorization)
                elif (authorization or "").removeprefix("Bearer ") not in token_origin._tokens:
                    self.answer(401, b"{}", {"WWW-Authenticate": f'Bearer realm="http://{token_origin.host}/token",'
                                                                 'service="lab",scope="repository:all:pull"'})
                elif "/blobs/" in self.path:
                    self.answer(redirect, b"", {"Location": f"http://localhost:{token_origin._storage_port}{self.path}"})
                else:
                    self.forward()

            def do_POST(self):
                self.answer(405, b"")  # clients must fall back from OAuth to GET

            def token(self, authorization):
                expected = "Basic " + base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
                if private and authorization != expected:
                    self.answer(401, b'{"details": "wrong user or password"}')
                    return
                token = os.urandom(16).hex()
                token_origin._tokens.add(token)
                self.answer(200, json.dumps({"token": token}).encode())

            def forward(self):
                headers = {"Accept": ", ".join(self.headers.get_all("Accept", ["*/*"]))}
                status, headers, body = origin.request(self.command, self.path, headers)
                names = ("Content-Type", "Docker-Content-Digest", "Content-Length")
                self.answer(status, body, {name: headers[name] for name in names if headers[name]})

        class Storage(Front):
            def do_GET(self):
                if not self.faulty(f"storage{self.path}"):
                    self.forward()

        self._servers = [QuietServer(("127.0.0.1", 0), handler) for handler in (Front, Storage)]
        self.host = f"127.0.0.1:{self._servers[0].server_port}"
        self._storage_port = self._servers[1].server_port

    def __enter__(self):
        for server in self._servers:
            threading.Thread(target=server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error):
        for server in self._servers:
            server.shutdown()
            server.server_close()


class Gate:
    """A proxy of an origin that holds up every connection after some bytes, until `open` or `cut`."""

    BYTES = 200_000

    def __init__(self, origin, address=("127.0.0.1", 0)):
        self._origin, self._opened, self._sockets = origin, threading.Event(), []
        self._listener = socket.create_server(address)
        self.host = "{}:{}".format(*self._listener.getsockname())
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", self._origin.port))
                self._sockets += [client, server]
                threading.Thread(target=self._copy, args=(client, server, None), daemon=True).start()
                threading.Thread(target=self._copy, args=(server, client, self.BYTES), daemon=True).start()

    def _copy(self, source, target, limit):
        count = 0
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                count += len(data)
                if limit is not None and count > limit:
                    self._opened.wait()
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)

    def open(self):
        """Let all connections continue."""
        self._opened.set()

    def cut(self):
        """Close every connection, and accept no more."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes up accept; close() alone does not
        self._listener.close()
        for sock in self._sockets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        self._opened.set()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.cut()
        for sock in self._sockets:
            sock.close()


NOT_FOUND = b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"
FORBIDDEN = (  # the response of HAProxy, which most proxies for Docker's socket use
    b"HTTP/1.0 403 Forbidden\r\nCache-Control: no-cache\r\nConnection: close\r\nContent-Type: text/html\r\n\r\n"
    b"<html><body><h1>403 Forbidden</h1>\nRequest forbidden by administrative rules.\n</body></html>\n")


@contextlib.contextmanager
def filtered(engine, refuse=b"(nothing)", tell=lambda count: None, answer=NOT_FOUND, hear=lambda data: None):
    """Open a socket that forwards to an engine, but itself answers requests that contain `refuse`.

    answer is the whole response to those, by default a 404. tell is called with the number of bytes each time the
    engine sends any, and hear with the bytes each time a client sends any.
    """

    class Pass(socketserver.BaseRequestHandler):
        def handle(self):
            first = self.request.recv(65536)
            hear(first)
            if refuse in first or first.startswith(b"PRI "):
                self.request.sendall(answer)
                return
            with socket.socket(socket.AF_UNIX) as upstream:
                upstream.connect(str(engine.socket))
                upstream.sendall(first)
                threading.Thread(target=self.copy, args=(self.request, upstream, hear), daemon=True).start()
                self.copy(upstream, self.request, lambda data: tell(len(data)))

        @staticmethod
        def copy(source, target, tell):
            with contextlib.suppress(OSError):
                while data := source.recv(65536):
                    tell(data)
                    target.sendall(data)
                target.shutdown(socket.SHUT_WR)

    class Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
        daemon_threads = True

    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/docker.sock"
        with Server(path, Pass) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            yield path
            server.shutdown()


# --- the node ----------------------------------------------------------------------------------


class Node(Daemon):
    """A containerd that pulls like a Kubernetes node: everything through one mirror.

    Each process of tests has a namespace of its own, which sees nothing of the others: LAB_NAMESPACE.
    """

    def __init__(self, name="node"):
        super().__init__(name)
        self.socket = self.folder / "containerd.sock"
        self.namespace = os.environ.get("LAB_NAMESPACE", "k8s.io")

    def command(self):
        inside = f"/lab/{self.name}"
        (self.folder / "config.toml").write_text(
            f"version = 3\nroot = '{inside}/root'\nstate = '{inside}/state'\n"
            f"[grpc]\n  address = '{inside}/containerd.sock'\n"
            "[plugins.'io.containerd.metadata.v1.bolt']\n  content_sharing_policy = 'isolated'\n"
            "[plugins.'io.containerd.cri.v1.runtime']\n"
            "disabled_plugins = ['io.containerd.grpc.v1.cri']\n")
        return ["containerd", "-c", f"{inside}/config.toml"]

    def answers(self):
        return self.ctr("version", check=False).returncode == 0

    def ctr(self, *arguments, **options):
        return chroot("ctr", "-a", f"/lab/{self.name}/containerd.sock", "-n", self.namespace, *arguments, **options)

    def pull(self, reference, mirror, user=None, platform=None, check=True):
        """Run `ctr images pull` with one mirror (HOST:PORT) for every registry; return the CompletedProcess.

        With a platform it pulls what a node of that platform pulls, else the image for all of its platforms.
        """
        options = ["--user", user] if user else []
        if platform:
            options += ["--local", "--skip-metadata", "--platform", platform]
        return self.ctr("images", "pull", "--hosts-dir", self.hosts(mirror), *options, reference, check=check)

    def fetch(self, reference, mirror):
        """Run `ctr content fetch` with a mirror: a pull without unpacking."""
        return self.ctr("content", "fetch", "--hosts-dir", self.hosts(mirror), reference)

    def hosts(self, mirror):
        """Return the path, inside the root, of a folder that configures a mirror of every registry for containerd."""
        hosts = self.folder / "hosts" / mirror.replace(":", "_")
        (hosts / "_default").mkdir(parents=True, exist_ok=True)
        (hosts / "_default" / "hosts.toml").write_text(
            f'server = "http://{mirror}"\n[host."http://{mirror}"]\n  capabilities = ["pull", "resolve"]\n')
        return "/lab/" + str(hosts.relative_to(SHARE))

    def digest(self, reference):
        """Return the target digest of an image on the node."""
        for line in self.ctr("images", "ls", f"name=={reference}").stdout.splitlines()[1:]:
            return line.split()[2]
        raise RuntimeError(f"{reference} is not on the node")

    def content(self, digest):
        """Return the bytes of a blob on the node."""
        return self.ctr("content", "get", digest, text=False).stdout

    def forget(self):
        """Remove every image and all content, so that the next pull is a cold one."""
        names = self.ctr("images", "ls", "-q").stdout.split()
        if names:
            self.ctr("images", "rm", "--sync", *names)
        self.ctr("content", "prune", "references")


# --- a machine to reach through ssh -------------------------------------------------------------


class SshServer:
    """OpenSSH's server on 127.0.0.1, in the clients' root: it finds a docker command and all engines there.

    config is what a client needs to know: `ssh -F CONFIG lab`. Use it in a `with`.
    """

    def __init__(self):
        self.folder = Path(tempfile.mkdtemp(prefix="ssh-", dir=SHARE))
        self.config, self.known_hosts, self.keys = (self.folder / name for name in (
            "config", "known_hosts", "authorized_keys"))
        inside = f"/lab/{self.folder.name}"
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        for name in ("host", "user"):
            chroot("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", f"{inside}/{name}")
        self.know(self.public("host"))
        self.let_in(self.public("user"))
        self._settings = (
            f"ListenAddress 127.0.0.1:{self.port}\nHostKey {inside}/host\nAuthorizedKeysFile {inside}/authorized_keys\n"
            "StrictModes no\nUsePAM no\nPidFile none\n"
            "PerSourcePenalties no\n")  # or it would let nobody in for a while after some failures
        self.config.write_text(
            f"Host lab\nHostName 127.0.0.1\nPort {self.port}\nUser root\nIdentityFile {self.folder}/user\n"
            f"IdentitiesOnly yes\nUserKnownHostsFile {self.known_hosts}\nGlobalKnownHostsFile none\n")
        self._process = None

    def public(self, name):
        """Return a public key: "host" or "user"."""
        return (self.folder / f"{name}.pub").read_text()

    def know(self, key):
        """Make a key the one that the client expects of the server. An empty one: it expects none."""
        self.known_hosts.write_text(key and f"[127.0.0.1]:{self.port} {key}")

    def let_in(self, line):
        """Write the server's list of the keys that it lets in."""
        self.keys.write_text(line)

    def restart(self, settings=""):
        """Start it again, with more settings in the form of its configuration file."""
        self.stop()
        self.start(settings)

    def start(self, settings=""):
        (self.folder / "sshd_config").write_text(self._settings + settings)
        (CLIENT_ROOT / "run/sshd").mkdir(exist_ok=True)  # where it has nothing, and where nobody may write
        with open(self.folder / "log", "ab") as log:  # with processes of its own, all of which end with the first one
            self._process = subprocess.Popen(
                ["unshare", "--pid", "--fork", "--kill-child", "chroot", CLIENT_ROOT, "/usr/sbin/sshd", "-D", "-e",
                 "-f", f"/lab/{self.folder.name}/sshd_config"], stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        wait_for("the ssh server", self._answers)
        self._namespace = Path(f"/proc/{self._process.pid}/ns/pid_for_children").readlink()

    def _answers(self):
        with socket.create_connection(("127.0.0.1", self.port), 5) as connection:
            return connection.recv(4) == b"SSH-"

    def stop(self):
        """Stop the server, and break off all connections."""
        if self._process:
            self._process.kill()
            self._process.wait()
            wait_for("the end of the ssh server", lambda: not self._processes())
            self._process = None

    def _processes(self):
        """Return the pids of the server and of all that it has started."""
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if (path / "ns/pid").readlink() == self._namespace:
                    found.append(int(path.name))
        return found

    def signal(self, number):
        """Send a signal to all of them."""
        for pid in self._processes():
            os.kill(pid, number)

    def log(self):
        return (self.folder / "log").read_text()

    def connections(self):
        """Return how many connections the server has let in so far."""
        return self.log().count("Accepted publickey")

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *error):
        self.stop()
        shutil.rmtree(self.folder)


# --- the lab as a whole ------------------------------------------------------------------------

ENGINES = {
    "classic": Engine("classic", "forky", containerd_store=False),
    "containerd": Engine("containerd", "forky", containerd_store=True),
    "containerd-26": Engine("containerd-26", "trixie", containerd_store=True),
    "classic-20": Engine("classic-20", "bookworm", containerd_store=False),
    "podman": Podman("podman", "forky"),
    "mirrors": Engine("mirrors", "forky", containerd_store=True,
                      mirrors=[f"http://{FIRST_MIRROR}", f"http://127.0.0.1:{OPEN_PORT}"]),
}
STAGES = {
    "stage": StageEngine("stage", containerd_store=True),
    "stage-classic": StageEngine("stage-classic", containerd_store=False),
}
ORIGINS = {
    "open": Origin("origin-open", OPEN_PORT, private=False),
    "private": Origin("origin-private", PRIVATE_PORT, private=True),
}
NODE = Node()
DAEMONS = [*ENGINES.values(), *ORIGINS.values(), NODE]


def is_up():
    return all(d.pid() for d in DAEMONS)


def require():
    """Call this in setUpModule. It skips the tests if the lab is not up, or fails if LAB=required.

    tests/run.py has looked already, before the first test: some tests stop an engine for a while.
    """
    if not (os.environ.get("LAB_IS_UP") or is_up()):
        lacking("no real engines: run `python tests/lab.py up` as root on a Debian machine")


def lacking(what):
    """Skip the tests, for a reason, or fail if LAB=required."""
    if os.environ.get("LAB") == "required":
        raise RuntimeError(f"LAB=required, but there is {what}")
    raise unittest.SkipTest(what)


def mounted(path):
    return any(line.split()[4] == str(path) for line in Path("/proc/self/mountinfo").read_text().splitlines())


def make_root(suite):
    """Unpack a Debian suite into a folder, once. Packages that were added to its list later are installed there."""
    root, packages = ROOTS / suite, SUITES[suite]
    complete = root / ".complete"  # contains the packages that the root was made with
    if complete.exists():
        if complete.read_text() != packages:
            install_packages(root, packages)
            complete.write_text(packages)
        return
    if not shutil.which("mmdebstrap"):
        run("apt-get", "update")
        run("apt-get", "install", "-y", "--no-upgrade", "--no-install-recommends", "mmdebstrap")
    print(f"lab: unpacking {suite}", flush=True)
    shutil.rmtree(root, ignore_errors=True)
    root.parent.mkdir(parents=True, exist_ok=True)
    run("mmdebstrap", "--variant=minbase", "--skip=check/empty", '--aptopt=Acquire::Check-Valid-Until "false"',
        f"--include={packages}", suite, root)
    complete.write_text(packages)


def install_packages(root, packages):
    """Install the missing packages of a list in a root, while its daemons may be running."""
    print(f"lab: installing packages in {root.name}", flush=True)
    policy = root / "usr/sbin/policy-rc.d"  # what invoke-rc.d asks: no package may start its daemon on this machine
    policy.write_text("#!/bin/sh\nexit 101\n")
    policy.chmod(0o755)
    chroot("apt-get", "update", root=root)
    chroot("apt-get", "install", "-y", "--no-upgrade", "--no-install-recommends", *packages.split(","), root=root,
           env={"DEBIAN_FRONTEND": "noninteractive"})


def mount_root(suite):
    root = ROOTS / suite
    if mounted(root):
        return
    # This must be first: inside a chroot, `/` has to be a mount point, or builds and imports fail.
    run("mount", "--bind", root, root)
    run("mount", "--make-private", root)
    run("mount", "-t", "proc", "proc", root / "proc")
    for tree in ("sys", "dev"):
        run("mount", "--rbind", f"/{tree}", root / tree)
        run("mount", "--make-rslave", root / tree)
    run("mount", "-t", "tmpfs", "tmpfs", root / "run")
    (root / "lab").mkdir(exist_ok=True)
    run("mount", "--bind", SHARE, root / "lab")


def base_image(engine):
    """Make `base:1`, a busybox image, from scratch."""
    busybox = (CLIENT_ROOT / "bin/busybox").read_bytes()
    try:
        engine.inspect("base:1")
    except RuntimeError:
        engine.import_image("base:1", {"bin/busybox": busybox, "bin/sh": busybox}, ['CMD ["/bin/sh"]'])


def up():
    if os.geteuid():
        sys.exit("lab: root is required to mount and to start daemons")
    SHARE.mkdir(parents=True, exist_ok=True)
    for suite in SUITES:
        make_root(suite)
        mount_root(suite)
    for daemon in DAEMONS:
        daemon.start()
    for engine in ENGINES.values():
        base_image(engine)
    status()


def down():
    for stage in STAGES.values():
        stage.end()  # there is none, unless tests were killed
    for daemon in reversed(DAEMONS):
        daemon.stop()
    for suite in SUITES:
        # Lazily, because a daemon's last child processes may still have files open for a moment.
        while mounted(ROOTS / suite):
            run("umount", "-R", "-l", ROOTS / suite)


def clean():
    down()
    if any(mounted(ROOTS / suite) for suite in SUITES):
        sys.exit("lab: something is still mounted, nothing was removed")
    shutil.rmtree(LAB, ignore_errors=True)


def status():
    for daemon in DAEMONS:
        print(f"lab: {daemon.name:16} {f'running, pid {daemon.pid()}' if daemon.pid() else 'stopped'}")


if __name__ == "__main__":
    commands = {"up": up, "down": down, "status": status, "clean": clean}
    if len(sys.argv) != 2 or sys.argv[1] not in commands:
        sys.exit(__doc__)
    commands[sys.argv[1]]()
