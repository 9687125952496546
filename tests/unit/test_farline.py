"""The line that streaming is measured over: what it models is what it says."""

from __future__ import annotations

import socket
import threading

import pytest

from tests.support.farline import Direction, FarLine


class Clock:
    seconds = 100.0

    def __call__(self):
        return self.seconds


def test_bytes_arrive_by_rate_and_delay():
    """1000 bytes a second, 5 seconds late; whoever comes while the line is busy comes after those before."""
    clock = Clock()
    line = Direction(1000.0, 5.0, clock)
    assert line.take(500) == 105.5 and line.take(1000) == 106.5
    assert line.wait() == pytest.approx(1.5 - 0.05) and line.bytes == 1500
    clock.seconds = 110.0
    assert line.wait() == 0.0 and line.take(0) == 115.0


def echo(listener):
    while True:
        try:
            client, _ = listener.accept()
        except OSError:
            return
        with client:
            while data := client.recv(65536):
                client.sendall(data)


def test_what_goes_in_comes_out():
    """Of several connections at once, each its own bytes in order, and the end of them."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=echo, args=(listener,), daemon=True).start()
        with FarLine("127.0.0.1", listener.getsockname()[1], mbit=1000, ms=2) as line:
            for number in (1, 2):
                sent = bytes([number]) * 300_000
                with socket.create_connection(("127.0.0.1", line.port), timeout=10) as client:
                    client.sendall(sent[:100_000])
                    found = bytearray()
                    while len(found) < 100_000:
                        found += client.recv(65536)
                    client.sendall(sent[100_000:])
                    while len(found) < len(sent):
                        found += client.recv(65536)
                    assert found == sent
            assert line.down == line.up == 600_000
        listener.close()


def test_nobody_behind_the_line_is_the_end_of_a_connection():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with FarLine("127.0.0.1", port, mbit=1000, ms=2) as line:
        with socket.create_connection(("127.0.0.1", line.port), timeout=10) as client:
            assert client.recv(1) == b""
