"""Properties that hold for any input: every parser returns a value or raises the error that it documents."""

import contextlib
import sys
import unittest

from program import MODULE

try:
    from hypothesis import given
    from hypothesis import strategies as st
except ImportError:
    raise unittest.SkipTest("hypothesis is not installed") from None

sys.path.insert(0, str(MODULE.parent))
import k3d_registry_dockerd as module

NAMES = st.one_of(st.text(max_size=40), st.from_regex(r"[a-z0-9./_:@-]{0,40}", fullmatch=True))
JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(
                        ["id", "status", "progressDetail", "current", "total", "error", "mediaType", "schemaVersion",
                         "config", "manifests"]), inner, max_size=5), max_leaves=12)


def payload(data):
    """Return a Payload that gives the bytes in small pieces, with empty ones in between."""
    return module.Payload((piece for start in range(0, len(data), 3) for piece in (data[start:start + 3], b"")), "it")


class TestProperties(unittest.TestCase):
    @given(NAMES, NAMES, st.none() | NAMES)
    def test_references(self, repository, target, namespace):
        try:
            reference = module.Reference.parse(repository, target, namespace)
        except module.RegistryError as e:
            self.assertIn(e.status, (400, 404))
            return
        text = str(reference)
        self.assertTrue(text.isascii() and text.isprintable() and " " not in text)
        self.assertFalse({"", ".", ".."} & set(reference.repository.split("/")))

    @given(st.binary(max_size=200) | JSON.map(lambda value: module.json.dumps(value).encode()))
    def test_media_types(self, data):
        self.assertRegex(module.manifest_type(data) or "a/b", r"\A[\w.+-]+/[\w.+-]+\Z")

    @given(st.text(max_size=30) | st.from_regex(r"bytes=\d{0,4}-\d{0,4}(, ?\d{0,4}-\d{0,4}){0,3}", fullmatch=True),
           st.integers(0, 2000))
    def test_ranges(self, header, size):
        try:
            parts = module.parse_ranges(header, size)
        except module.RegistryError as e:
            self.assertEqual((416, f"bytes */{size}"), (e.status, e.headers["Content-Range"]))
            return
        for start, length in parts or ():
            self.assertTrue(0 <= start < size and 0 < length <= size - start)
        self.assertLessEqual(sum(length for _, length in parts or ()), size)

    @given(st.text(max_size=40) | st.binary(max_size=30).map(
        lambda data: "Basic " + module.base64.b64encode(data).decode()))
    def test_credentials(self, header):
        try:
            module.parse_credentials(header)
        except module.RegistryError as e:
            self.assertEqual("REQUEST_INVALID", e.code)

    @given(st.text(max_size=30) | st.from_regex(r"\[?[0-9a-f:.]{0,12}\]?:\d{0,6}", fullmatch=True))
    def test_addresses(self, text):
        with contextlib.suppress(ValueError):
            self.assertLess(module.Address.parse(text).port, 65536)

    @given(st.binary(max_size=60))
    def test_malformed_protobuf(self, data):
        with contextlib.suppress(module.Http2Error):
            module.decode_fields(payload(data))

    @given(st.dictionaries(st.integers(1, 500), st.integers(0, 2**63) | st.text(max_size=300), max_size=6))
    def test_protobuf_round_trip(self, fields):
        encoded = module.encode_fields(*fields.items())
        numbers, strings = module.decode_fields(payload(encoded))
        self.assertEqual(({key: value for key, value in fields.items() if isinstance(value, int)},
                          {key: [value.encode()] for key, value in fields.items() if isinstance(value, str)}),
                         (numbers, strings))

    @given(st.lists(JSON.filter(lambda value: isinstance(value, dict)), max_size=6))
    def test_progress(self, messages):
        progress, task = module.PullProgress(), module.Task("pull", "x")
        for message in messages:
            progress.update(message)
            task.report(progress.layers, progress.status)
            self.assertIsInstance(task.line(1.0), str)


if __name__ == "__main__":
    unittest.main()
