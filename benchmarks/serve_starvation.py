"""What a small request waits while other clients keep `gpt2onnx serve` busy in unfriendly ways: a table of times and memory.

    python benchmarks/serve_starvation.py -m tales

Each kind of load runs against a server of its own with 256 descriptors, and --max-body 4 MB; clients and server share the
machine. A request of 10 tokens is sent again and again, one at a time; one that is refused or not answered in 10 seconds
counts as refused.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

DESCRIPTORS = 256
PATIENCE = 10.0  # seconds
HEAD = (
    "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n"
)
Load = Callable[[int], Awaitable[None]]


def post(**fields: Any) -> bytes:
    body = json.dumps(fields).encode()
    return HEAD.format(len(body)).encode() + body


async def repeat(port: int, count: int, data: bytes, *, reads: bool = True, waits: float = 0.0) -> None:
    """`count` clients; each sends the data on a new connection as soon as the last one has ended."""

    async def client(index: int) -> None:
        while True:
            with contextlib.suppress(OSError):
                reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**16)
                try:
                    writer.write(data)
                    if reads:
                        while await asyncio.wait_for(reader.read(2**16), 60):
                            if data.startswith(b"POST"):
                                break  # the answer has begun, or is there
                    else:
                        writer.transport.pause_reading()
                        await writer.drain()
                        await asyncio.sleep(30)
                finally:
                    writer.transport.abort()
            await asyncio.sleep(waits or 0.01 + index % 7 / 1000)

    await asyncio.gather(*map(client, range(count)))


async def nothing(port: int) -> None:
    await asyncio.sleep(3600)


LOADS: dict[str, Load] = {
    "none": nothing,
    "8 clients, prompts of 250,000 emoji": lambda port: repeat(port, 8, post(prompt="😀" * 250_000, max_tokens=1)),
    "2 clients, n=16, 500 tokens": lambda port: repeat(port, 2, post(prompt="a", n=16, max_tokens=500, eos_token_id=-1)),
    "400 connections without a request": lambda port: repeat(port, 400, b""),
    "300 bodies of 1 MB, never whole": lambda port: repeat(
        port, 300, HEAD.format(2**20).encode() + b" " * (2**20 - 1), reads=False
    ),
    "200 streams that nobody reads": lambda port: repeat(
        port, 200, post(prompt="a", stream=True, max_tokens=500, eos_token_id=-1, logprobs=5), reads=False
    ),
    "40 clients, requests that are none": lambda port: repeat(port, 40, b"nonsense\r\n\r\n"),
}  # fmt: skip


async def ask(port: int) -> float | None:
    """Seconds until a small request of another client is answered; None if it is refused."""
    begin = time.perf_counter()

    async def answer() -> bool:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, local_addr=("127.0.0.2", 0))
        try:
            writer.write(post(prompt="Once upon a time", max_tokens=10, eos_token_id=-1))
            return b" 200 " in await reader.readline()
        finally:
            writer.transport.abort()

    try:
        answered = await asyncio.wait_for(answer(), PATIENCE)
    except (OSError, TimeoutError):
        return None
    return time.perf_counter() - begin if answered else None


async def measure(port: int, seconds: float) -> list[float | None]:
    times, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end:
        times.append(await ask(port))
        await asyncio.sleep(0.05)
    return times


def most_memory(pid: int) -> float:
    """Megabytes."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1000


def run_load(name: str, port: int) -> None:
    asyncio.run(LOADS[name](port))


def against_a_server(model: str, name: str, seconds: float) -> dict[str, float]:
    """Times of a small request, and the server's memory and log, under one load."""
    command = [sys.executable, "-m", "gpt2onnx", "serve", "-m", model, "--port", "0", "--max-body", str(2**22)]

    def few() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (DESCRIPTORS, DESCRIPTORS))

    with tempfile.TemporaryFile("w+") as log, subprocess.Popen(command, stderr=log, preexec_fn=few) as server:
        try:
            said = ""
            while "served at" not in said:
                time.sleep(0.1)
                log.seek(0)
                said = log.read()
            port = int(said.split("served at")[1].split()[0].rpartition(":")[2])
            # In a process of its own, so that the small request doesn't wait for these clients.
            clients = multiprocessing.get_context("spawn").Process(target=run_load, args=(name, port))
            clients.start()
            time.sleep(3)
            times = asyncio.run(measure(port, seconds))
            clients.terminate()
            clients.join()
            memory = most_memory(server.pid)
            server.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.wait(60)
            size = log.seek(0, 2)
        finally:
            server.kill()
    answered = sorted(each for each in times if each is not None)
    return {
        "median": statistics.median(answered) if answered else float("inf"),
        "slowest": answered[-1] if answered else float("inf"),
        "refused": (len(times) - len(answered)) / len(times),
        "megabytes": memory,
        "log": size,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", default="tales")
    parser.add_argument("--seconds", type=float, default=8)
    arguments = parser.parse_args()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096), hard))
    print("| load | small request, median and slowest | refused | memory | log |")
    print("|---|---|---|---|---|")
    for name in LOADS:
        row = against_a_server(arguments.model, name, arguments.seconds)
        times = f"{row['median'] * 1000:,.0f} / {row['slowest'] * 1000:,.0f} ms"
        print(
            f"| {name} | {times} | {row['refused']:.0%} | {row['megabytes']:,.0f} MB | {row['log']:,} bytes |",
            flush=True,
        )


if __name__ == "__main__":
    main()
