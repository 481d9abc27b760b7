"""The hosted registry is complete without Docker: the tests of the specification, run on it alone."""

import logging
import sys
import tempfile
import threading
from pathlib import Path

import test_spec
from program import IN_MEMORY, MODULE, Program

sys.path.insert(0, str(MODULE.parent))
import k3d_registry_dockerd as module


class Alone:
    """Only Hosted behind the endpoints, without a mirror."""

    names = ()

    def __init__(self, hosted):
        self.hosted = hosted

    def manifest(self, reference, client, head=False):
        return self.hosted.manifest(reference)

    def blob(self, reference, client, head=False):
        return self.hosted.blob(reference)

    def put_manifest(self, reference, manifest, tags, client):
        self.hosted.put_manifest(reference, manifest, tags)

    def delete_manifest(self, reference, client):
        self.hosted.delete_manifest(reference)

    def delete_blob(self, reference, client):
        self.hosted.delete_blob(reference)

    def tags(self, reference, client, after=""):
        return self.hosted.tags(reference, after)

    def catalog(self, client):
        return self.hosted.catalog()

    def referrers(self, reference, client, after=""):
        return self.hosted.referrers(reference, after)


class HostedProgram(Program):
    """Like Program, but runs in this process. hosted is the registry that answers."""

    def __init__(self, store=None, untagged=None, **limits):
        self._folder = tempfile.TemporaryDirectory(dir=IN_MEMORY)
        self.store = store or Path(self._folder.name) / "store"
        self.hosted = module.Hosted(module.Store(self.store, **limits), untagged)
        self._server = module.Server(module.Address("127.0.0.1", 0), Alone(self.hosted))
        self.port = self._server.address.port
        self.log = []
        self._changed = threading.Condition()
        self._handler = logging.Handler()
        self._handler.emit = lambda record: self.log.append(record.getMessage())
        module.log.addHandler(self._handler)
        module.log.propagate = False
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._server.shutdown()
        self._server.server_close()
        module.log.removeHandler(self._handler)
        module.log.propagate = True
        self._folder.cleanup()


def set_up(cls):
    cls.program = HostedProgram()
    cls.addClassCleanup(cls.program.__exit__)


# One class for each class of test_spec that does not involve Docker.
globals().update({f"{name}OfHosted": type(f"{name}OfHosted", (case,), {"setUpClass": classmethod(set_up)})
                  for name, case in vars(test_spec).items()
                  if name.startswith("Test") and case is not test_spec.TestRepositoriesAndDocker})
