"""The OCI Distribution Specification, v1.1 and the settled parts of its development version, sentence by sentence.

Each test is named after what it checks, and contains a table of requests and responses where there are several. Docker
plays no part here: the fake daemon has no images unless a test adds one.
"""

import hashlib
import json
import os
import unittest
import uuid

from fake_daemon import FakeDaemon, Image
from program import Program

INDEX = "application/vnd.oci.image.index.v1+json"
MANIFEST = "application/vnd.oci.image.manifest.v1+json"
CONFIG = "application/vnd.oci.image.config.v1+json"
LAYER = "application/vnd.oci.image.layer.v1.tar"
EMPTY = "application/vnd.oci.empty.v1+json"
OCTETS = "application/octet-stream"


def digest_of(data, algorithm="sha256"):
    return f"{algorithm}:{hashlib.new(algorithm, data).hexdigest()}"


def descriptor(data, media_type, **more):
    return {"mediaType": media_type, "digest": digest_of(data), "size": len(data), **more}


def encode(document):
    return json.dumps(document).encode()


class SpecCase(unittest.TestCase):
    """Each test uses a new repository name; all share one program."""

    @classmethod
    def setUpClass(cls):
        cls.daemon = FakeDaemon()
        cls.daemon.__enter__()
        cls.addClassCleanup(cls.daemon.__exit__)
        cls.program = Program(cls.daemon.host)
        cls.addClassCleanup(cls.program.__exit__)

    def setUp(self):
        self.repo = f"r{uuid.uuid4().hex[:8]}/nested"
        self.base = f"/v2/{self.repo}"

    def tearDown(self):
        self.assertEqual([], self.program.lines("a bug in this program"))

    def ask(self, method, path, status, body=None, **headers):
        """Send one request and check its status. Error responses must have the form that the spec requires."""
        path = path if path.startswith("/v2") else self.base + path
        answer = self.program.request(method, path, {k.replace("_", "-"): v for k, v in headers.items()}, body)
        self.assertEqual(status, answer.status, (method, path, answer.body))
        if status >= 400 and method != "HEAD":
            self.assertEqual("application/json", answer.headers["Content-Type"])
            for error in answer.json["errors"]:
                self.assertRegex(error["code"], r"\A[A-Z_]+\Z")
        return answer

    def push_blob(self, data, algorithm="sha256", base=None):
        digest = digest_of(data, algorithm)
        self.ask("POST", f"{base or self.base}/blobs/uploads/?digest={digest}", 201, data, Content_Type=OCTETS)
        return digest

    def image(self, push_blobs=True, **more):
        """Push the blobs of an image; return the bytes of its manifest, and the blobs."""
        config, layer = encode({"unique": uuid.uuid4().hex}), os.urandom(100)
        if push_blobs:
            for blob in (config, layer):
                self.push_blob(blob)
        return encode({"schemaVersion": 2, "mediaType": MANIFEST, "config": descriptor(config, CONFIG),
                       "layers": [descriptor(layer, LAYER)], **more}), [config, layer]

    def push(self, reference=None, data=None, media_type=MANIFEST, base=None, **more):
        """Push a manifest and return its bytes."""
        self.base = base or self.base
        data = data or self.image(**more)[0]
        self.ask("PUT", f"/manifests/{reference or digest_of(data)}", 201, data, Content_Type=media_type)
        return data

    def begin(self):
        return self.ask("POST", "/blobs/uploads/", 202).headers["Location"]


class TestPull(SpecCase):
    def test_end_1_get_v2_is_200(self):
        for method in ("GET", "HEAD"):
            self.ask(method, "/v2/", 200)

    def test_end_3_get_manifest_by_tag_and_by_digest(self):
        data = self.push("1")
        for reference in ("1", digest_of(data)):
            for method in ("GET", "HEAD"):
                with self.subTest(reference=reference, method=method):
                    answer = self.ask(method, f"/manifests/{reference}", 200)
                    self.assertEqual(data if method == "GET" else b"", answer.body)
                    self.assertEqual((digest_of(data), MANIFEST, str(len(data))), tuple(
                        answer.headers[name] for name in ("Docker-Content-Digest", "Content-Type", "Content-Length")))

    def test_end_2_get_blob_and_ranges(self):
        data = os.urandom(2048)
        digest = self.push_blob(data)
        for method in ("GET", "HEAD"):
            answer = self.ask(method, f"/blobs/{digest}", 200)
            self.assertEqual((digest, "2048"), (answer.headers["Docker-Content-Digest"],
                                                answer.headers["Content-Length"]))
        for wanted, start, end in (("500-1499", 500, 1500), ("500-", 500, 2048), ("-500", 1548, 2048),
                                   ("2000-9999", 2000, 2048)):
            with self.subTest(wanted):
                answer = self.ask("GET", f"/blobs/{digest}", 206, Range=f"bytes={wanted}")
                self.assertEqual(data[start:end], answer.body)
                self.assertEqual(f"bytes {start}-{end - 1}/2048", answer.headers["Content-Range"])
        self.ask("GET", f"/blobs/{digest}", 416, Range="bytes=2048-")

    def test_missing_content_is_404(self):
        self.push("1")
        nowhere = digest_of(b"nowhere")
        for path, code in ((f"/blobs/{nowhere}", "BLOB_UNKNOWN"), (f"/manifests/{nowhere}", "MANIFEST_UNKNOWN"),
                           ("/manifests/other", "MANIFEST_UNKNOWN"),
                           (f"/v2/{self.repo.partition('/')[0]}/tags/list", "NAME_UNKNOWN"),
                           ("/v2/no/such/tags/list", "NAME_UNKNOWN")):
            with self.subTest(path):
                self.assertEqual(code, self.ask("GET", path, 404).code)
                self.assertEqual(b"", self.ask("HEAD", path, 404).body)

    def test_response_has_oci_namespace(self):
        self.push("1")
        for path in ("/manifests/1", "/tags/list"):
            answer = self.ask("GET", f"{path}?ns=localhost:5000", 200)
            self.assertEqual("localhost:5000", answer.headers["OCI-Namespace"])


class TestBlobUpload(SpecCase):
    ALGORITHMS = ("sha256", "sha512")

    def check_pushed(self, answer, data, digest):
        """Check for status 201, the digest, and a Location from which the blob can be pulled."""
        self.assertEqual(201, answer.status, answer.body)
        self.assertEqual(digest, answer.headers["Docker-Content-Digest"])
        self.assertEqual(data, self.ask("GET", answer.headers["Location"], 200).body)

    def test_end_4a_and_6_post_then_put(self):
        for algorithm in self.ALGORITHMS:
            with self.subTest(algorithm):
                data = os.urandom(5000)
                upload = self.ask("POST", "/blobs/uploads/", 202)
                self.assertTrue(upload.headers["Location"].startswith("/v2/"), "proxies need a relative Location")
                self.assertTrue(upload.headers["Docker-Upload-UUID"])
                digest = digest_of(data, algorithm)
                location = upload.headers["Location"]
                self.check_pushed(self.ask("PUT", f"{location}?digest={digest}", 201, data), data, digest)

    def test_end_4b_single_post(self):
        for algorithm in self.ALGORITHMS:
            with self.subTest(algorithm):
                data = os.urandom(5000)
                digest = digest_of(data, algorithm)
                self.check_pushed(self.ask("POST", f"/blobs/uploads/?digest={digest}", 201, data), data, digest)

    def test_end_5_chunks_in_order(self):
        """The last chunk may be in the PUT or in a PATCH."""
        data = os.urandom(3000)
        for last_in_put in (True, False):
            for algorithm in self.ALGORITHMS:
                with self.subTest(last_in_put=last_in_put, algorithm=algorithm):
                    location, digest = self.begin(), digest_of(data, algorithm)
                    for start in range(0, 2000 if last_in_put else 3000, 1000):
                        answer = self.ask("PATCH", location, 202, data[start:start + 1000],
                                          Content_Range=f"{start}-{start + 999}")
                        self.assertEqual(f"0-{start + 999}", answer.headers["Range"])
                        location = answer.headers["Location"]
                    if last_in_put:
                        done = self.ask("PUT", f"{location}?digest={digest}", 201, data[2000:],
                                        Content_Range="2000-2999")
                    else:
                        done = self.ask("PUT", f"{location}?digest={digest}", 201)
                    self.check_pushed(done, data, digest)

    def test_patch_without_content_range(self):
        data = [os.urandom(700) for _ in range(5)]
        location = self.begin()
        answer = self.ask("PATCH", location, 202, iter(data))
        self.assertEqual("0-3499", answer.headers["Range"])
        digest = digest_of(b"".join(data))
        self.check_pushed(self.ask("PUT", f"{answer.headers['Location']}?digest={digest}", 201), b"".join(data), digest)

    def test_chunk_out_of_order_is_416_with_current_range(self):
        location = self.begin()
        self.ask("PATCH", location, 202, b"0123456789", Content_Range="0-9")
        for method, content_range in (("PATCH", "20-29"), ("PATCH", "0-9"), ("PUT", "11-20")):
            with self.subTest(method=method, content_range=content_range):
                path = f"{location}?digest={digest_of(b'x')}" if method == "PUT" else location
                answer = self.ask(method, path, 416, b"0123456789", Content_Range=content_range)
                self.assertEqual(("0-9", location), (answer.headers["Range"], answer.headers["Location"]))
        self.check_pushed(self.ask("PUT", f"{location}?digest={digest_of(b'0123456789')}", 201), b"0123456789",
                          digest_of(b"0123456789"))

    def test_malformed_content_range_is_400(self):
        for content_range, code in (("a-b", "BLOB_UPLOAD_INVALID"), ("9-0", "BLOB_UPLOAD_INVALID"),
                                    ("0-5", "SIZE_INVALID"), ("0", "BLOB_UPLOAD_INVALID")):
            with self.subTest(content_range):
                location = self.begin()
                answer = self.ask("PATCH", location, 400, b"0123456789", Content_Range=content_range)
                self.assertEqual(code, answer.code)
                self.assertEqual("0-0", self.ask("GET", location, 204).headers["Range"])

    def test_end_13_upload_status(self):
        location = self.begin()
        self.ask("PATCH", location, 202, b"x" * 1000)
        answer = self.ask("GET", location, 204)
        self.assertEqual((location, "0-999", None), tuple(answer.headers[name] for name in (
            "Location", "Range", "Content-Length")))

    def test_end_14_cancel_upload(self):
        location = self.begin()
        self.ask("PATCH", location, 202, b"x")
        self.ask("DELETE", location, 204)
        for method in ("GET", "PATCH", "DELETE", "PUT"):
            path = f"{location}?digest={digest_of(b'x')}" if method == "PUT" else location
            self.assertEqual("BLOB_UPLOAD_UNKNOWN", self.ask(method, path, 404).code)

    def test_unknown_upload_session_is_404(self):
        location = self.begin()
        session = location.rpartition("/")[2]
        for path in ("/blobs/uploads/" + "0" * 32, "/blobs/uploads/x", "/blobs/uploads/..%2e",
                     f"/v2/another/repository/blobs/uploads/{session}"):
            self.assertEqual("BLOB_UPLOAD_UNKNOWN", self.ask("GET", path, 404).code)
        self.assertEqual(2, len({self.begin(), self.begin()}))

    def test_digest_mismatch_is_400_and_keeps_nothing(self):
        for algorithm in self.ALGORITHMS:
            data, wrong = os.urandom(50), digest_of(b"something else", algorithm)
            streamed = self.begin()
            self.ask("PATCH", streamed, 202, data)
            for what, method, path, body in (("single post", "POST", f"/blobs/uploads/?digest={wrong}", data),
                                             ("put", "PUT", f"{self.begin()}?digest={wrong}", data),
                                             ("after a patch", "PUT", f"{streamed}?digest={wrong}", None)):
                with self.subTest(what, algorithm=algorithm):
                    self.assertEqual("DIGEST_INVALID", self.ask(method, path, 400, body).code)
                    self.ask("HEAD", f"/blobs/{wrong}", 404)
                    self.ask("HEAD", f"/blobs/{digest_of(data)}", 404)
            self.ask("GET", streamed, 404)

    def test_malformed_digest_is_400(self):
        for text in ("", "sha256:short", "md5:" + "0" * 32, "sha256:" + "G" * 64):
            with self.subTest(text):
                self.assertEqual("DIGEST_INVALID", self.ask("PUT", f"{self.begin()}?digest={text}", 400, b"x").code)
                self.ask("POST", f"/blobs/uploads/?digest={text}", 400, b"x")

    def test_end_11_mount_blob(self):
        data, other = os.urandom(100), f"other/{uuid.uuid4().hex}"
        digest = self.push_blob(data)
        to = f"/v2/{other}/blobs"
        self.ask("HEAD", f"{to}/{digest}", 404)
        answer = self.ask("POST", f"{to}/uploads/?mount={digest}&from={self.repo}", 201)
        self.check_pushed(answer, data, digest)
        self.assertTrue(answer.headers["Location"].startswith(to))

    def test_mount_without_from(self):
        data = os.urandom(100)
        digest = self.push_blob(data)
        answer = self.ask("POST", f"/v2/anonymous/{uuid.uuid4().hex}/blobs/uploads/?mount={digest}", 201)
        self.check_pushed(answer, data, digest)

    def test_failed_mount_starts_an_upload(self):
        data = os.urandom(100)
        digest = digest_of(data)
        self.push_blob(data, base="/v2/third")
        for query in (f"mount={digest_of(b'nowhere')}&from=third", f"mount={digest}&from=fourth",
                      f"mount={digest_of(b'nowhere')}", f"mount={digest}&from=Bad", f"mount={digest}&from=app:1",
                      f"mount={digest}&from=", "mount=sha256:abc&from=third", "mount=", "mount=md5:0123",
                      f"mount=sha256:abc&digest={digest}"):
            with self.subTest(query):
                self.ask("GET", self.ask("POST", f"/blobs/uploads/?{query}", 202).headers["Location"], 204)

    def test_empty_blob(self):
        digest = self.push_blob(b"")
        self.assertEqual(b"", self.ask("GET", f"/blobs/{digest}", 200).body)
        self.ask("PUT", f"{self.begin()}?digest={digest}", 201)


class TestManifestPush(SpecCase):
    def test_blob_of_another_size_than_the_manifest_says(self):
        data, blobs = self.image()
        document = json.loads(data)
        document["layers"][0]["size"] += 1
        answer = self.ask("PUT", "/manifests/1", 404, encode(document), Content_Type=MANIFEST)
        self.assertEqual("MANIFEST_BLOB_UNKNOWN", answer.code)
        self.assertIn(digest_of(blobs[1]), answer.detail)
        self.ask("HEAD", "/manifests/1", 404)

    def test_manifest_of_another_size_than_the_index_says(self):
        child = self.push(data=self.image()[0])
        wrong = {**descriptor(child, MANIFEST), "size": len(child) + 1}
        index = encode({"schemaVersion": 2, "mediaType": INDEX, "manifests": [wrong]})
        answer = self.ask("PUT", "/manifests/index", 400, index, Content_Type=INDEX)
        self.assertEqual("MANIFEST_INVALID", answer.code)
        self.ask("HEAD", "/manifests/index", 404)

    def test_end_7_exact_bytes_location_and_digest(self):
        odd = self.image()[0].replace(b": ", b" :  ") + b"\n\n"
        for reference in ("1", digest_of(odd), digest_of(odd, "sha512")):
            with self.subTest(reference):
                answer = self.ask("PUT", f"/manifests/{reference}", 201, odd, Content_Type=MANIFEST)
                digest = reference if ":" in reference else digest_of(odd)
                self.assertEqual(digest, answer.headers["Docker-Content-Digest"])
                pulled = self.ask("GET", answer.headers["Location"], 200)
                self.assertEqual((odd, MANIFEST, digest), (pulled.body, pulled.headers["Content-Type"],
                                                           pulled.headers["Docker-Content-Digest"]))

    def test_tag_parameters_of_manifest_by_digest(self):
        for algorithm in ("sha256", "sha512"):
            data, _ = self.image()
            digest = digest_of(data, algorithm)
            answer = self.ask("PUT", f"/manifests/{digest}?tag=a&tag=b&tag=c", 201, data, Content_Type=MANIFEST)
            self.assertEqual(["a", "b", "c"], answer.headers.get_all("OCI-Tag"))
            for tag in "abc":
                self.assertEqual(digest, self.ask("HEAD", f"/manifests/{tag}", 200).headers["Docker-Content-Digest"])
        path = f"/manifests/{digest}?" + "&".join(f"tag={i}" for i in range(1000))
        self.ask("PUT", path, 414, data, Content_Type=MANIFEST)
        self.ask("PUT", f"/manifests/{digest}?tag=good&tag=.bad", 400, data, Content_Type=MANIFEST)
        self.ask("PUT", f"/manifests/{digest}?tag={digest_of(b'x')}", 400, data, Content_Type=MANIFEST)
        self.ask("HEAD", "/manifests/good", 404)

    def test_manifest_size_limit_is_4_mib(self):
        data, _ = self.image(annotations={"filler": ""})
        full = data.replace(b'"filler": ""', b'"filler": "' + b"A" * (4 * 1024 * 1024 - len(data)) + b'"')
        self.assertEqual(4 * 1024 * 1024, len(full))
        self.push("full", full)
        self.assertEqual(full, self.ask("GET", "/manifests/full", 200).body)
        self.assertEqual("MANIFEST_TOO_LARGE", self.ask("PUT", "/manifests/more", 413, full + b" ",
                                                        Content_Type=MANIFEST).code)
        self.ask("PUT", "/manifests/more", 413, iter([full, b" "]), Content_Type=MANIFEST)

    def test_invalid_manifests_are_400(self):
        config = descriptor(b"{}", EMPTY)
        for what, data, media_type in (
                ("not JSON", b"{", MANIFEST), ("a list", b"[]", MANIFEST), ("nothing", b"", MANIFEST),
                ("deep", b'{"a":' + b"[" * 100_000, MANIFEST),
                ("another media type", encode({"schemaVersion": 2, "mediaType": INDEX, "manifests": []}), MANIFEST),
                ("a bad media type", encode({"schemaVersion": 2}), "what is this"),
                ("no media type", encode({"a": 1}), ""),
                ("no list", encode({"schemaVersion": 2, "config": config, "layers": {}}), MANIFEST),
                ("a list", encode({"schemaVersion": 2, "config": [config], "layers": []}), MANIFEST),
                ("no digest", encode({"schemaVersion": 2, "config": {"size": 1}, "layers": []}), MANIFEST),
                ("a bad digest", encode({"schemaVersion": 2, "config": {**config, "digest": "sha256:x"}}), MANIFEST),
                ("a path", encode({"schemaVersion": 2, "config": {**config, "digest": "../../x"}}), MANIFEST),
                ("a bad size", encode({"schemaVersion": 2, "config": {**config, "size": "1"}}), MANIFEST),
                ("no descriptor", encode({"schemaVersion": 2, "config": config, "layers": [1]}), MANIFEST),
                ("a bad subject", encode({"schemaVersion": 2, "subject": {"digest": "x", "size": 1}}), MANIFEST),
                ("schema 1", encode({"schemaVersion": 1, "fsLayers": []}), MANIFEST),
                ("a bad artifactType", encode({"schemaVersion": 2, "artifactType": {}, "layers": []}), MANIFEST),
                ("a bad annotation", encode({"schemaVersion": 2, "annotations": {"a": 1}, "layers": []}), MANIFEST),
                ("bad annotations", encode({"schemaVersion": 2, "annotations": ["a"], "layers": []}), MANIFEST),
                ("a bad child", encode({"schemaVersion": 2, "manifests": ["x"]}), INDEX)):
            with self.subTest(what, data=data[:80]):
                self.assertEqual("MANIFEST_INVALID", self.ask("PUT", "/manifests/1", 400, data,
                                                              Content_Type=media_type).code)
        self.ask("HEAD", "/manifests/1", 404)

    def test_malformed_references(self):
        data, _ = self.image()
        for reference, code in (("sha256:baddigeststring", "DIGEST_INVALID"), (digest_of(b"other"), "DIGEST_INVALID"),
                                (".tag", "MANIFEST_INVALID"), ("a" * 129, "MANIFEST_INVALID")):
            with self.subTest(reference):
                answer = self.ask("PUT", f"/manifests/{reference}", 400, data, Content_Type=MANIFEST)
                self.assertEqual(code, answer.code)
        self.ask("PUT", "/v2/Bad/manifests/1", 400, data, Content_Type=MANIFEST)
        self.ask("HEAD", f"/manifests/{digest_of(data)}", 404)

    def test_unknown_media_types_are_accepted(self):
        for what, document, media_type in (
                ("own type", {"schemaVersion": 2, "mediaType": "application/vnd.example+json"},
                 "application/vnd.example+json"),
                ("type of the request only", {"anything": "else"}, "application/vnd.example.other+json"),
                ("without mediaType", {"schemaVersion": 2, "manifests": []}, INDEX),
                ("upper case", {"schemaVersion": 2, "mediaType": "application/x.A+json"}, "application/x.A+json"),
                ("unknown fields", {"schemaVersion": 2, "mediaType": INDEX, "manifests": [], "x": {"y": []}}, INDEX)):
            with self.subTest(what):
                self.push("unknown", encode(document), media_type)
                self.assertEqual(media_type, self.ask("GET", "/manifests/unknown", 200).headers["Content-Type"])
        empty = encode({"schemaVersion": 2, "mediaType": INDEX, "manifests": []})
        self.push("case", empty, INDEX.replace("oci", "OCI"))
        self.assertEqual(INDEX, self.ask("GET", "/manifests/case", 200).headers["Content-Type"])
        same = encode({"schemaVersion": 2, "layers": [], "config": descriptor(b"", EMPTY)})
        self.push_blob(b"")
        for media_type in ("application/vnd.docker.distribution.manifest.v2+json", MANIFEST):
            self.push("same", same, media_type)
            self.assertEqual(media_type, self.ask("GET", "/manifests/same", 200).headers["Content-Type"])

    def test_manifest_with_missing_blobs_is_404(self):
        data, blobs = self.image(push_blobs=False)
        missing = self.ask("PUT", "/manifests/1", 404, data, Content_Type=MANIFEST)
        self.assertEqual("MANIFEST_BLOB_UNKNOWN", missing.code)
        for blob in blobs:
            self.assertIn(digest_of(blob), missing.detail)
            self.push_blob(blob)
        self.push("1", data)

    def test_content_that_may_be_missing(self):
        layer = {"digest": digest_of(b"far away"), "size": 123}
        config = encode({})
        self.push_blob(config)
        for what, document in (
                ("a layer with urls", {"layers": [{**layer, "mediaType": LAYER, "urls": ["https://example.com/x"]}]}),
                ("a non-distributable layer", {"layers": [
                    {**layer, "mediaType": "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip"}]}),
                ("a foreign layer", {"layers": [
                    {**layer, "mediaType": "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"}]}),
                ("a subject", {"layers": [], "subject": {**layer, "mediaType": MANIFEST}})):
            with self.subTest(what):
                self.push(what.replace(" ", "-"), encode({
                    "schemaVersion": 2, "mediaType": MANIFEST, "config": descriptor(config, EMPTY), **document}))
        self.push("sparse", encode({"schemaVersion": 2, "mediaType": INDEX,
                                    "manifests": [{**layer, "mediaType": MANIFEST}]}), INDEX)

    def test_embedded_data_and_nested_indexes(self):
        child = self.push(data=self.image()[0])
        index = encode({"schemaVersion": 2, "mediaType": INDEX,
                        "manifests": [{**descriptor(child, MANIFEST), "data": "e30="}]})
        self.push(None, index, INDEX)
        outer = {"schemaVersion": 2, "mediaType": INDEX, "manifests": [descriptor(index, INDEX)]}
        self.push("outer", encode(outer), INDEX)
        for digest in (digest_of(child), digest_of(index)):
            self.ask("GET", f"/manifests/{digest}", 200)


class TestReferrers(SpecCase):
    def attach(self, subject, reference=None, **more):
        config = encode({})
        self.push_blob(config)
        data = encode({"schemaVersion": 2, "mediaType": MANIFEST, "config": descriptor(config, EMPTY), "layers": [],
                       "subject": descriptor(subject, MANIFEST), "unique": uuid.uuid4().hex, **more})
        answer = self.ask("PUT", f"/manifests/{reference or digest_of(data)}", 201, data, Content_Type=MANIFEST)
        self.assertEqual(digest_of(subject), answer.headers["OCI-Subject"])
        return data

    def referrers(self, subject, query=""):
        answer = self.ask("GET", f"/referrers/{digest_of(subject)}{query}", 200)
        self.assertEqual(INDEX, answer.headers["Content-Type"])
        self.assertEqual((2, INDEX), (answer.json["schemaVersion"], answer.json["mediaType"]))
        return answer

    def test_end_12_descriptors_with_type_and_annotations(self):
        subject = self.push("1")
        one = self.attach(subject, artifactType="application/vnd.one", annotations={"a": "b"})
        two = self.attach(subject, "tagged", artifactType="application/vnd.two")
        image, _ = self.image(subject=descriptor(subject, MANIFEST))
        self.push(None, image)
        index = encode({"schemaVersion": 2, "mediaType": INDEX, "manifests": [],
                        "subject": descriptor(subject, MANIFEST), "artifactType": "application/vnd.three"})
        self.push(None, index, INDEX)
        expected = [descriptor(one, MANIFEST, artifactType="application/vnd.one", annotations={"a": "b"}),
                    descriptor(two, MANIFEST, artifactType="application/vnd.two"),
                    descriptor(image, MANIFEST, artifactType=CONFIG),
                    descriptor(index, INDEX, artifactType="application/vnd.three")]
        self.assertCountEqual(expected, self.referrers(subject).json["manifests"])

    def test_filter_by_artifact_type(self):
        subject = self.push("1")
        one = self.attach(subject, artifactType="application/vnd.one")
        self.attach(subject, artifactType="application/vnd.two")
        answer = self.referrers(subject, "?artifactType=application/vnd.one")
        self.assertEqual("artifactType", answer.headers["OCI-Filters-Applied"])
        self.assertEqual([digest_of(one)], [found["digest"] for found in answer.json["manifests"]])
        self.assertIsNone(self.referrers(subject).headers["OCI-Filters-Applied"])
        self.assertEqual([], self.referrers(subject, "?artifactType=none").json["manifests"])

    def test_no_referrers_is_an_empty_list(self):
        self.assertEqual([], self.referrers(b"no such subject").json["manifests"])
        self.assertEqual("DIGEST_INVALID", self.ask("GET", "/referrers/sha256:bad", 400).code)

    def test_referrers_pushed_before_the_subject(self):
        subject, _ = self.image()
        one = self.attach(subject)
        self.assertEqual(digest_of(one), self.referrers(subject).json["manifests"][0]["digest"])
        self.push("late", subject)
        self.assertEqual(1, len(self.referrers(subject).json["manifests"]))

    def test_deleted_referrers_are_not_listed(self):
        subject = self.push("1")
        one = self.attach(subject)
        self.ask("DELETE", f"/manifests/{digest_of(one)}", 202)
        self.assertEqual([], self.referrers(subject).json["manifests"])


class TestLists(SpecCase):
    TAGS = ["1", "10", "2", "Z", "_x", "a", "b.c"]

    def setUp(self):
        super().setUp()
        data, _ = self.image()
        for tag in reversed(self.TAGS):
            self.push(tag, data)

    def test_end_8_sorted_with_n_and_last(self):
        for query, expected, link in (
                ("", self.TAGS, None), ("?n=3", self.TAGS[:3], "n=3&last=2"),
                ("?n=3&last=2", self.TAGS[3:6], "n=3&last=a"), ("?n=3&last=a", self.TAGS[6:], None),
                ("?last=Z", self.TAGS[4:], None), ("?last=15", self.TAGS[2:], None), ("?last=zzz", [], None),
                ("?n=7", self.TAGS, None), ("?n=100", self.TAGS, None), ("?n=0", [], None)):
            with self.subTest(query):
                answer = self.ask("GET", f"/tags/list{query}", 200)
                self.assertEqual({"name": self.repo, "tags": expected}, answer.json)
                expected_link = link and f'<{self.base}/tags/list?{link}>; rel="next"'
                self.assertEqual(expected_link, answer.headers["Link"])
        for bad in ("-1", "x", "", "1e3"):
            self.ask("GET", f"/tags/list?n={bad}", 400)

    def test_pages_add_up_to_the_whole_list(self):
        path, found = "/tags/list?n=2", []
        while path:
            answer = self.ask("GET", path, 200)
            found += answer.json["tags"]
            link = answer.headers["Link"]
            path = link and link.partition(">")[0][1:]
        self.assertEqual(self.TAGS, found)

    def test_catalog(self):
        names = [f"c{uuid.uuid4().hex[:6]}/{i}" for i in range(3)]
        for name in names:
            self.base = f"/v2/{name}"
            self.push("1")
        everything = self.ask("GET", "/v2/_catalog", 200).json["repositories"]
        self.assertEqual(sorted(everything), everything)
        self.assertTrue({*names, self.repo} <= set(everything))
        path, found = "/v2/_catalog?n=2", []
        while path:
            answer = self.ask("GET", path, 200)
            found += answer.json["repositories"]
            link = answer.headers["Link"]
            path = link and link.partition(">")[0][1:]
        self.assertEqual(everything, found)


class TestDelete(SpecCase):
    def test_end_9_delete_only_a_tag(self):
        data = self.push("1")
        self.push("2", data)
        self.ask("DELETE", "/manifests/1", 202)
        self.ask("HEAD", "/manifests/1", 404)
        for reference in ("2", digest_of(data)):
            self.ask("HEAD", f"/manifests/{reference}", 200)
        self.assertEqual("MANIFEST_UNKNOWN", self.ask("DELETE", "/manifests/1", 404).code)

    def test_end_9_delete_a_manifest_with_its_tags(self):
        data = self.push("1")
        self.push("2", data)
        other = self.push("3")
        self.ask("DELETE", f"/manifests/{digest_of(data)}", 202)
        for reference in ("1", "2", digest_of(data)):
            self.ask("HEAD", f"/manifests/{reference}", 404)
        self.assertEqual(["3"], self.ask("GET", "/tags/list", 200).json["tags"])
        self.ask("HEAD", f"/manifests/{digest_of(other)}", 200)
        self.ask("DELETE", f"/manifests/{digest_of(data)}", 404)
        self.push(None, data)
        self.ask("HEAD", "/manifests/1", 404)

    def test_end_10_delete_a_blob(self):
        digest = self.push_blob(b"to be deleted")
        self.ask("DELETE", f"/blobs/{digest}", 202)
        self.ask("HEAD", f"/blobs/{digest}", 404)
        self.assertEqual("BLOB_UNKNOWN", self.ask("DELETE", f"/blobs/{digest}", 404).code)

    def test_deleted_blob_remains_in_other_repositories(self):
        data = os.urandom(100)
        digest = self.push_blob(data)
        other = f"/v2/keeps/{uuid.uuid4().hex}/blobs"
        self.ask("POST", f"{other}/uploads/?mount={digest}&from={self.repo}", 201)
        self.ask("DELETE", f"/blobs/{digest}", 202)
        self.assertEqual(data, self.ask("GET", f"{other}/{digest}", 200).body)
        pool = self.program.store / "blobs" / digest.replace(":", "/")
        self.assertTrue(pool.exists())
        self.ask("DELETE", f"{other}/{digest}", 202)
        self.assertFalse(pool.exists(), "no repository uses it any more")


class TestRepositoriesAndDocker(SpecCase):
    """Hosted content next to Docker's images."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.local = cls.daemon.add("local/app:1", Image())

    def test_repositories_are_separate(self):
        data = self.push("1")
        blob = self.push_blob(b"only here")
        for path in ("/manifests/1", f"/manifests/{digest_of(data)}", f"/blobs/{blob}"):
            self.ask("HEAD", path, 200)
            self.ask("HEAD", f"/v2/somebody/else{path}", 404)
            self.ask("HEAD", f"{path}?ns=localhost:9", 200)

    def test_deleting_docker_images_is_405(self):
        for path in ("manifests/1", f"manifests/{self.local.digest}", f"blobs/{digest_of(self.local.layer)}"):
            with self.subTest(path):
                answer = self.ask("DELETE", f"/v2/local/app/{path}", 405)
                self.assertEqual("UNSUPPORTED", answer.code)
                self.assertIn("docker rmi", answer.detail)
                self.ask("GET", f"/v2/local/app/{path}", 200)

    def test_pushed_tag_hides_docker_image_until_deleted(self):
        before = self.ask("GET", "/v2/local/app/manifests/1", 200).body
        self.base, data = "/v2/local/app", None
        data = self.push("1")
        self.assertEqual(data, self.ask("GET", "/v2/local/app/manifests/1", 200).body)
        self.assertEqual(before, self.ask("GET", "/v2/local/app/manifests/1?ns=docker.io", 200).body)
        self.ask("DELETE", "/v2/local/app/manifests/1", 202)
        self.assertEqual(before, self.ask("GET", "/v2/local/app/manifests/1", 200).body)

    def test_blobs_of_docker_need_not_be_pushed(self):
        """They are copied before the manifest is accepted, and remain when Docker deletes them."""
        manifest = self.ask("GET", "/v2/local/app/manifests/1", 200).body
        self.push("1", manifest, json.loads(manifest)["mediaType"])
        kept = {str(path.relative_to(self.program.store / "repositories" / self.repo))
                for path in (self.program.store / "repositories" / self.repo).rglob("*") if path.is_file()}
        for blob in (self.local.config, self.local.layer):
            self.assertIn(f"_blobs/sha256/{hashlib.sha256(blob).hexdigest()}", kept)

    def test_tag_list_includes_hosted_and_docker_tags(self):
        self.base = "/v2/local/app"
        self.push("pushed")
        self.assertEqual(["1", "pushed"], self.ask("GET", "/tags/list", 200).json["tags"])
        self.assertIn("local/app", self.ask("GET", "/v2/_catalog", 200).json["repositories"])
        self.assertEqual(["1"], self.ask("GET", "/tags/list?ns=docker.io", 200).json["tags"])

    def test_catalog_lists_names_that_can_be_pulled(self):
        """Images of other registries, also local ones, are not found by their paths alone."""
        with FakeDaemon() as daemon, Program(daemon.host) as program:
            for name in ("localhost:5000/a", "localhost/b", "[::1]:5000/c", "quay.io/d", "e/f", "docker.io/library/g",
                         f"localhost:{program.port}/h"):
                daemon.add(f"{name}:1", Image())
            listed = program.get("/v2/_catalog").json["repositories"]
            self.assertEqual(["e/f", "g", "h", "localhost/b", "quay.io/d"], listed)
            for name in listed:
                with self.subTest(name):
                    self.assertEqual(["1"], program.get(f"/v2/{name}/tags/list").json["tags"])
                    self.assertEqual(200, program.get(f"/v2/{name}/manifests/1").status)

    def test_own_names_by_namespace_and_host(self):
        """Each row has the namespace and Host of a request, and True if they name this registry."""
        tagged = self.daemon.add("localhost:12345/tagged:1", Image()).digest
        pushed = digest_of(self.push("1", base="/v2/pushed"))
        for namespace, host, ours in (
                (None, "localhost:12345", True), (None, "k3d-x:12345", True), ("k3d-x:12345", "k3d-x:5000", True),
                ("localhost:12345", "k3d-x:5000", True), ("127.0.0.1:12345", "k3d-x:5000", True),
                ("k3d-y:12345", "k3d-x:5000", False), ("docker.io", "k3d-x:12345", False)):
            for name, digest in (("tagged", tagged), ("pushed", pushed)):
                with self.subTest(namespace=namespace, host=host, name=name):
                    query = f"?ns={namespace}" if namespace else ""
                    answer = self.program.get(f"/v2/{name}/manifests/1{query}", Host=host)
                    self.assertEqual(digest if ours else None, answer.headers["Docker-Content-Digest"])

    def test_head_reports_only_hosted_content(self):
        """A client does not push what HEAD reports, so Docker's images must not be reported: Docker may delete them."""
        one, many = f"{MANIFEST}, */*", f"{MANIFEST}, {INDEX}, */*"
        for agent, accept, ns, status in (
                ("crane/0.20", many, "", 404), ("oras/1.3", one, "", 404), ("containerd/2.1.4", one, "", 404),
                ("containerd/2.1.4", many, "", 200), ("docker/28.5.2 go/go1.24", many, "", 200),
                ("buildkit/v0.25", many, "", 200), ("not-containerd-at-all", many, "", 404),
                ("containerd/2.1.4", "*/*", "", 404), ("crane/0.20", one, "?ns=docker.io", 200),
                ("curl/8", "", "?ns=docker.io", 200)):
            with self.subTest(agent=agent, accept=accept, ns=ns):
                path = f"/v2/local/app/manifests/1{ns}"
                self.ask("HEAD", path, status, Accept=accept, User_Agent=agent)
                self.ask("GET", path, 200, Accept=accept, User_Agent=agent)
        blob = f"/v2/local/app/blobs/{digest_of(self.local.layer)}"
        self.ask("HEAD", blob, 404, User_Agent="containerd/2.1.4", Accept=many)
        self.ask("HEAD", f"{blob}?ns=docker.io", 200)
        self.ask("GET", blob, 200)


if __name__ == "__main__":
    unittest.main()
