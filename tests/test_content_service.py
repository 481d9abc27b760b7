"""Tests of the content service chapter: everything that a server may send, well-formed or hostile."""

import contextlib
import socket
import struct
import sys
import tempfile
import threading
import unittest
from pathlib import Path
from unittest import mock

from fake_daemon import (
    DATA,
    END_HEADERS,
    END_STREAM,
    GOAWAY,
    HEADERS,
    PING,
    PREFACE,
    RESET,
    RESPONSE_HEADERS,
    SETTINGS,
    TRAILERS_NOT_FOUND,
    TRAILERS_OK,
    frame,
    message,
    varint,
)
from program import MODULE

sys.path.insert(0, str(MODULE.parent))
import k3d_registry_dockerd as module
from k3d_registry_dockerd import ContentService, Digest, Engine, EngineHost, GrpcCall, GrpcError, Http2Error

try:
    from hypothesis import given, settings
    from hypothesis import strategies as st
except ImportError:
    given = None

ACK, PADDED, PRIORITY = 1, 8, 0x20
WINDOW_UPDATE, CONTINUATION, PUSH_PROMISE = 8, 9, 5
START = frame(SETTINGS, 0, 0) + frame(HEADERS, END_HEADERS, 1, RESPONSE_HEADERS)
END = frame(HEADERS, END_HEADERS | END_STREAM, 1, TRAILERS_OK)
NOT_FOUND = frame(HEADERS, END_HEADERS | END_STREAM, 1, TRAILERS_NOT_FOUND)
DIGEST = Digest.of(b"content")


def data(content, flags=0, stream=1):
    return frame(DATA, flags, stream, content)


def field(number, value):
    """Return a protobuf field: an integer, or bytes."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


@contextlib.contextmanager
def server(*sent):
    """Yield the client's end of a connection to a server that sends some bytes and closes, whatever it receives."""
    ours, theirs = socket.socketpair()
    received = bytearray()

    def send():
        with contextlib.suppress(OSError):
            for piece in sent:
                theirs.sendall(piece)
            theirs.shutdown(socket.SHUT_WR)

    def receive():
        with contextlib.suppress(OSError):
            while piece := theirs.recv(65536):
                received.extend(piece)

    threads = [threading.Thread(target=job) for job in (send, receive)]
    ours.settimeout(30)
    for thread in threads:
        thread.start()
    try:
        yield ours, received
    finally:
        ours.close()
        for thread in threads:
            thread.join(30)
        theirs.close()


def answers(*sent):
    """Return the messages of the answer to a call."""
    with server(*sent) as (sock, _), contextlib.closing(GrpcCall(sock)) as call:
        return [read(one) for one in call.answers("/service/method", b"question")]


def read(payload):
    out = bytearray()
    while not payload.at_end():
        out += payload.take(1)
    return bytes(out)


class TestCall(unittest.TestCase):
    def test_well_formed_answers(self):
        hello = message(b"hello")
        for what, sent, expected in (
                ("one message", data(hello), [b"hello"]),
                ("nothing", b"", []),
                ("messages that share a frame", data(hello + hello), [b"hello"] * 2),
                ("a message in many frames", b"".join(data(bytes((byte,))) for byte in hello), [b"hello"]),
                ("padding", data(b"\x03" + hello + bytes(3), PADDED), [b"hello"]),
                ("no padding, which is said", data(b"\x00" + hello, PADDED), [b"hello"]),
                ("nothing but padding", data(b"\x03" + bytes(3), PADDED) + data(hello), [b"hello"]),
                ("empty frames", data(b"") * 20 + data(hello), [b"hello"]),
                ("the flag of priority, which DATA does not have", data(hello, PRIORITY), [b"hello"]),
                ("settings, and their acknowledgement", frame(SETTINGS, 0, 0, bytes(6)) + frame(SETTINGS, ACK, 0)
                 + data(hello), [b"hello"]),
                ("window updates", frame(WINDOW_UPDATE, 0, 0, bytes(4)) + frame(WINDOW_UPDATE, 0, 1, bytes(4))
                 + data(hello), [b"hello"]),
                ("unknown frames", frame(0x63, 255, 0, b"?") + frame(0x63, 255, 1, b"?") + data(hello), [b"hello"]),
                ("another stream", data(b"?", 0, 3) + frame(HEADERS, END_STREAM | END_HEADERS, 3, b"?") + data(hello)
                 + frame(RESET, 0, 3, bytes(4)), [b"hello"]),
                ("headers with priority and padding",
                 frame(HEADERS, END_HEADERS | PRIORITY | PADDED, 1, b"\x02" + bytes(5) + RESPONSE_HEADERS + bytes(2))
                 + data(hello), [b"hello"])):
            with self.subTest(what):
                self.assertEqual(expected, answers(START, sent, END))

    def test_trailers(self):
        flags = END_STREAM | END_HEADERS
        for what, trailers, expected in (
                ("status 0", frame(HEADERS, flags, 1, TRAILERS_OK), 0),
                ("status 5", frame(HEADERS, flags, 1, TRAILERS_NOT_FOUND), 5),
                ("padding that holds a status", frame(HEADERS, flags | PADDED, 1, bytes((len(TRAILERS_OK),))
                                                      + TRAILERS_NOT_FOUND + TRAILERS_OK), 5),
                ("priority", frame(HEADERS, flags | PRIORITY, 1, bytes(5) + TRAILERS_NOT_FOUND), 5),
                ("continued", frame(HEADERS, END_STREAM, 1, TRAILERS_NOT_FOUND[:9])
                 + frame(CONTINUATION, 0, 1, TRAILERS_NOT_FOUND[9:30])
                 + frame(CONTINUATION, END_HEADERS, 1, TRAILERS_NOT_FOUND[30:]), 5)):
            with self.subTest(what):
                if expected:
                    with self.assertRaises(GrpcError) as caught:
                        answers(START, trailers)
                    self.assertEqual(expected, caught.exception.status)
                else:
                    self.assertEqual([], answers(START, trailers))

    def test_malformed_answers(self):
        status = TRAILERS_OK[:-2]  # without its value
        for what, sent, text in (
                ("nothing", b"", "ended too early"),
                ("half of a head", b"\0\0", "ended too early"),
                ("half of a frame", START + data(b"hello")[:-1], "ended too early"),
                ("no settings", frame(PING, 0, 0, bytes(8)) + START, "settings first"),
                ("HTTP/1.1", b"HTTP/1.1 400 Bad Request\r\n\r\n", "does not speak HTTP/2"),
                ("a frame above the limit", START + b"\x01\x00\x01" + bytes(6), "too large"),
                ("padding longer than the frame", START + data(b"\x05abcd", PADDED), "padding"),
                ("padding of a frame without a payload", START + data(b"", PADDED), "padding"),
                ("padding of headers without a payload", START + frame(HEADERS, END_HEADERS | PADDED, 1), "padding"),
                ("padding of trailers longer than they are",
                 START + frame(HEADERS, END_HEADERS | END_STREAM | PADDED, 1, b"\xff" + TRAILERS_OK), "padding"),
                ("trailers that are shorter than their priority",
                 START + frame(HEADERS, END_HEADERS | END_STREAM | PRIORITY, 1, b"abc"), "grpc-status"),
                ("data in the midst of headers",
                 START + frame(HEADERS, 0, 1) + data(b"") + frame(CONTINUATION, END_HEADERS, 1), "interrupts"),
                ("a continuation of another stream",
                 START + frame(HEADERS, 0, 1) + frame(CONTINUATION, END_HEADERS, 3), "interrupts"),
                ("a ping in the midst of headers",
                 START + frame(HEADERS, 0, 1) + frame(PING, 0, 0, bytes(8)), "interrupts"),
                ("headers that end with the connection", START + frame(HEADERS, 0, 1, b"abc"), "ended too early"),
                ("an end without trailers", START + data(message(b""), END_STREAM), "without a status"),
                ("trailers without a status", START + frame(HEADERS, 5, 1, b"abc"), "grpc-status"),
                ("a status without a value", START + frame(HEADERS, 5, 1, status), "grpc-status"),
                ("an empty status", START + frame(HEADERS, 5, 1, status + b"\0"), "grpc-status"),
                ("a status that is not a number", START + frame(HEADERS, 5, 1, status + b"\x01x"), "grpc-status"),
                ("a reset", START + frame(RESET, 0, 1, struct.pack(">I", 7)), "code 7"),
                ("a reset without a code", START + frame(RESET, 0, 1), "code 0"),
                ("a reset with too long a code", START + frame(RESET, 0, 1, bytes(65536)), "code 0"),
                ("a goodbye", START + frame(GOAWAY, 0, 0, bytes(8)), "closing"),
                ("a goodbye without a reason", START + frame(GOAWAY, 0, 0), "closing"),
                ("a message that ends early", START + data(message(b"hello")[:-1]) + END, "ended too early"),
                ("half of a message's head", START + data(b"\0\0") + END, "ended too early"),
                ("bytes behind a message", START + data(message(b"hello") + b"?") + END, "ended too early"),
                ("a compressed message", START + data(b"\x01" + bytes(4)), "compressed"),
                ("a message above the limit", START + data(b"\0\x01\0\0\x01"), "gRPC message")):
            with self.subTest(what), self.assertRaisesRegex(Http2Error, text):
                answers(sent)

    def test_floods_end(self):
        """A server that sends frames for ever, none of which brings anything."""
        for what, endless, text in (
                ("pings", frame(PING, 0, 0, bytes(8)), "without data"),
                ("large pings", frame(PING, 0, 0, bytes(65536)), "without data"),
                ("settings", frame(SETTINGS, 0, 0), "without data"),
                ("acknowledgements", frame(SETTINGS, ACK, 0), "without data"),
                ("window updates", frame(WINDOW_UPDATE, 0, 1, bytes(4)), "without data"),
                ("empty data", data(b""), "without data"),
                ("padding", data(b"\xff" + bytes(255), PADDED), "without data"),
                ("headers", frame(HEADERS, END_HEADERS, 1, b"abc"), "without data"),
                ("data of another stream", data(bytes(65536), 0, 3), "without data"),
                ("resets of another stream", frame(RESET, 0, 3, bytes(4)), "without data"),
                ("promises", frame(PUSH_PROMISE, END_HEADERS, 1, bytes(4)), "without data"),
                ("unknown frames", frame(0x63, 0, 1, bytes(100)), "without data"),
                ("empty continuations", frame(HEADERS, 0, 1) + frame(CONTINUATION, 0, 1) * 10_000, "without data"),
                ("continuations", frame(HEADERS, 0, 1) + frame(CONTINUATION, 0, 1, bytes(40_000)) * 10, "header block"),
                ("continuations of trailers", frame(HEADERS, END_STREAM, 1)
                 + frame(CONTINUATION, 0, 1, bytes(65536)) * 2, "header block")):
            with self.subTest(what), self.assertRaisesRegex(Http2Error, text):
                answers(START, *[endless] * 500)

    def test_connection_frames_are_answered(self):
        with server(START, frame(PING, 0, 0, b"12345678"), frame(PING, ACK, 0, b"87654321"), END) as (sock, received), \
                contextlib.closing(GrpcCall(sock)) as call:
            self.assertEqual([], list(call.answers("/service/method", b"question")))
        self.assertTrue(received.startswith(PREFACE))
        self.assertIn(b"/service/method", received)
        self.assertTrue(received.endswith(frame(SETTINGS, ACK, 0) + frame(PING, ACK, 0, b"12345678")), received[-60:])

    def test_next_message_skips_the_rest_of_the_one_before(self):
        with server(START, data(message(b"first") + message(b"second")), END) as (sock, _), \
                contextlib.closing(GrpcCall(sock)) as call:
            self.assertEqual([b"f", b"s"], [one.take(1) for one in call.answers("/", b"")])

    def test_server_that_does_not_answer(self):
        ours, theirs = socket.socketpair()
        ours.settimeout(0.05)
        with theirs, contextlib.closing(GrpcCall(ours)) as call, self.assertRaises(OSError):
            list(call.answers("/", b""))


class TestService(unittest.TestCase):
    """The answers of the content service, in well-formed HTTP/2."""

    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        engine = Engine(EngineHost(path="/nowhere"))
        self.service = ContentService(engine, Path(folder.name))
        self.sent = b""

        def connect():
            stack = contextlib.ExitStack()
            self.addCleanup(stack.close)
            return stack.enter_context(server(START, self.sent))[0]

        patch = mock.patch.object(engine, "open_grpc", connect)
        patch.start()
        self.addCleanup(patch.stop)

    def answer(self, *messages, end=END):
        content = b"".join(map(message, messages))
        self.sent = b"".join(data(content[at:at + 65536]) for at in range(0, len(content), 65536)) + end

    def error(self, call, *arguments):
        with self.assertRaises(module.RegistryError) as caught:
            call(*arguments)
        return caught.exception.code

    @staticmethod
    def info(*fields, digest=DIGEST, size=7):
        return field(1, field(1, str(digest).encode()) + field(2, size) + b"".join(fields))

    @staticmethod
    def label(name, value):
        return field(5, field(1, name) + field(2, value))

    def test_description(self):
        self.answer(self.info())
        self.assertEqual(7, self.service.find(DIGEST).size)
        self.answer(self.info(field(2, 8), field(99, 1), field(98, b"unknown")))
        self.assertEqual(8, self.service.find(DIGEST).size, "the last value counts")
        self.answer(end=NOT_FOUND)
        self.assertIsNone(self.service.find(DIGEST))

    def test_malformed_descriptions_are_errors(self):
        """None of these says that the content is not there."""
        other = frame(HEADERS, END_HEADERS | END_STREAM, 1, TRAILERS_NOT_FOUND[:-1] + b"7")
        for what, messages, end in (
                ("another status", (), other),
                ("no message", (), END),
                ("two messages", (self.info(), self.info()), END),
                ("endless messages", (self.info(),) * 1000, END),
                ("a message and an error", (self.info(),), other),
                ("an empty message", (b"",), END),
                ("an integer", (field(1, 5),), END),
                ("an empty description", (field(1, b""),), END),
                ("another digest", (self.info(digest=Digest.of(b"other")),), END),
                ("an integer for the digest", (field(1, field(1, 5) + field(2, 7)),), END),
                ("a negative size", (self.info(size=2**64 - 1),), END),
                ("a size of more than 64 bits", (self.info(size=2**65),), END),
                ("a size above the limit", (self.info(size=2**63),), END),
                ("another wire type", (b"\x09" + bytes(8),), END),
                ("the group type", (b"\x0b\x0c",), END),
                ("a varint that does not end", (b"\xff" * 20,), END),
                ("half of a varint", (b"\x0a\x80",), END),
                ("a length above that of the message", (b"\x0a\x7fabc",), END),
                ("an absurd length", (b"\x0a" + varint(2**64 - 1) + b"abc",), END),
                ("a length above that of the description", (field(1, b"\x0a\x7fabc"),), END),
                ("too many labels", (self.info(self.label(b"a", b"b") * 10_001),), END),
                ("too many fields", (b"\x18\x01" * 10_001,), END)):
            with self.subTest(what):
                self.answer(*messages, end=end)
                self.assertEqual("ENGINE_FAILED", self.error(self.service.find, DIGEST))

    def test_origins(self):
        source = b"containerd.io/distribution.source."
        for what, labels, expected in (
                ("none", (), []),
                ("several", (self.label(source + b"docker.io", b"library/a,b/c"), self.label(source + b"q.io:1", b"d")),
                 ["docker.io/library/a", "docker.io/b/c", "q.io:1/d"]),
                ("others", (self.label(b"containerd.io/uncompressed", b"sha256:"), field(5, b"")), []),
                ("an integer", (field(5, 7),), []),
                ("not UTF-8", (self.label(source + b"\xff", b"\xfe"),), ["\ufffd/\ufffd"]),
                ("longer than containerd allows", (self.label(source + b"a.b", b"," * 5000),), []),
                ("very many", (self.label(source + b"a.b", b"," * 4000),) * 1000, ["a.b/"] * 100)):
            with self.subTest(what):
                self.answer(self.info(*labels))
                self.assertEqual(expected, self.service.origins(DIGEST))
        self.answer(self.info(field(5, b"\xff")))
        self.assertEqual("ENGINE_FAILED", self.error(self.service.origins, DIGEST))

    def read(self, length=7):
        with contextlib.closing(self.service.read(DIGEST, 0, length)) as body:
            return b"".join(body)

    def test_content(self):
        for what, messages in (
                ("at once", (field(2, b"content"),)),
                ("in pieces", (field(1, 0) + field(2, b"con"), field(1, 3) + field(2, b"tent"))),
                ("with unknown fields", (field(9, b"x") + field(2, b"content") + field(9, 1),)),
                ("in two fields", (field(2, b"con") + field(2, b"tent"),))):
            with self.subTest(what):
                self.answer(*messages)
                self.assertEqual(b"content", self.read())

    def test_malformed_content(self):
        for what, messages, end, code in (
                ("too little", (field(2, b"conten"),), END, "ENGINE_FAILED"),
                ("too much", (field(2, b"contents"),), END, "ENGINE_FAILED"),
                ("a message too many", (field(2, b"content"), field(2, b"s")), END, "ENGINE_FAILED"),
                ("an empty message too many", (field(2, b"content"), b""), END, "ENGINE_FAILED"),
                ("an empty message", (b"",), END, "ENGINE_FAILED"),
                ("messages without content", (field(1, 5),) * 1000, END, "ENGINE_FAILED"),
                ("an integer", (field(2, 5),), END, "ENGINE_FAILED"),
                ("nothing", (), END, "ENGINE_FAILED"),
                ("not there", (), NOT_FOUND, "BLOB_UNKNOWN"),
                ("an error in the middle", (field(2, b"con"),), NOT_FOUND, "BLOB_UNKNOWN"),
                *((f"status {status}", (), END[:-1] + str(status).encode(), "ENGINE_FAILED")
                  for status in range(1, 10) if status != 5),
                ("an end in the middle", (field(2, b"con"),), b"", "ENGINE_FAILED"),
                ("too many fields", (b"\x18\x01" * 10_001,), END, "ENGINE_FAILED")):
            with self.subTest(what):
                self.answer(*messages, end=end)
                self.assertEqual(code, self.error(self.read))


if given:
    KINDS = st.sampled_from([DATA, HEADERS, RESET, SETTINGS, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION, 0x63])
    FLAGS = st.sampled_from([0, END_STREAM, END_HEADERS, END_STREAM | END_HEADERS, PADDED, PRIORITY, 255])
    CONTENT = st.one_of(st.binary(max_size=20), st.binary(max_size=20).map(message),
                        st.sampled_from([TRAILERS_OK, TRAILERS_NOT_FOUND, RESPONSE_HEADERS]))
    FRAMES = st.lists(st.builds(frame, KINDS, FLAGS, st.sampled_from([0, 1, 1, 1, 3]), CONTENT), max_size=12)

    class TestAnyBytes(unittest.TestCase):
        @settings(max_examples=200, deadline=None)
        @given(FRAMES.map(b"".join) | st.binary(max_size=100))
        def test_only_documented_errors(self, sent):
            with contextlib.suppress(Http2Error, GrpcError, OSError):
                answers(START, sent)


if __name__ == "__main__":
    unittest.main()
