"""Load on `gpt2onnx serve` over loopback: throughput, waiting times by number of clients, memory, start-up time.

    python benchmarks/serve_load.py -m tales-int8 --clients 1 4 16 64 --seconds 8
    python benchmarks/serve_load.py -m tales-int8 --soak 40000        # requests in a row: does memory grow?
    python benchmarks/serve_load.py -m tales-int8 --join 400          # does a long prompt delay running requests?
    python benchmarks/serve_load.py -m WORK/models/gpt2onnx-int8 --peers WORK --clients 1 8 32 --max-batch 32

Starts the server with its own --max-batch and --max-queue and the given --server-options. The clients share one asyncio
process; each sends its next request when the last one is done. A gap is the time between two pieces of a text; a piece
holds several tokens if the server has fallen behind. "One by one" is the same prompts through `Model.stream` in this
process, before the server starts.

`--peers` compares with llama.cpp's server and OpenVINO's continuous batching (benchmarks/peers/openvino_server.py), in int8, from
the work folder of `benchmarks.prepare` (`python -m benchmarks.prepare llama-server` builds the first). All servers hold the
model; in each round each has its turn, while the others are stopped. Decoding is greedy there, so that no sampler is measured.
Inter-token latency is a request's mean.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import shlex
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import gpt2onnx

ROUNDS = 3  # of a comparison
START_SECONDS = 120
WORDS = ["the", "old", "king", "had", "three", "sons", "and", "a", "castle", "by", "sea", "once", "upon", "time"]


def prompt(random_: random.Random, words: int) -> str:
    return " ".join(random_.choice(WORDS) for _ in range(words))


class Client:
    """A kept connection, with its times and count of tokens."""

    def __init__(self, port: int, tokens: int, words: int, seed: int, fields: dict[str, Any] | None = None) -> None:
        self.port, self.tokens, self.words, self.random = port, tokens, words, random.Random(seed)
        self.fields = fields or {}
        self.reset()

    def reset(self) -> None:
        self.first: list[float] = []
        self.gaps: list[float] = []
        self.steps: list[float] = []
        self.count = 0

    async def open(self) -> None:
        self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port, limit=2**22)

    async def ask(self, words: int | None = None, stream: bool = True) -> None:
        text = prompt(self.random, words or self.words)
        fields = {"prompt": text, "max_tokens": self.tokens, "ignore_eos": True, "stream": stream}
        body = json.dumps(fields | {"seed": self.random.randrange(2**31)} | self.fields).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        last = time.perf_counter()
        try:
            status = await self._send(head.encode() + body)
        except (asyncio.IncompleteReadError, ConnectionError):  # llama.cpp's closes kept connections now and then
            self.writer.close()
            await self.open()
            status = await self._send(head.encode() + body)
        assert b" 200 " in status.split(b"\r\n")[0], status
        if not stream:
            length = next(line for line in status.lower().split(b"\r\n") if line.startswith(b"content-length"))
            await self.reader.readexactly(int(length.split(b":")[1]))
            self.count += self.tokens
            return
        started, first, begun = last, True, 0.0
        while size := int(await self.reader.readuntil(b"\r\n"), 16):
            chunk = await self.reader.readexactly(size + 2)
            if b'"text":' not in chunk:
                continue
            now = time.perf_counter()
            (self.first if first else self.gaps).append(now - (started if first else last))
            last, first, begun = now, False, begun or now
        await self.reader.readexactly(2)
        self.steps.append((last - begun) / max(1, self.tokens - 1))
        self.count += self.tokens  # no end token: always the full length

    async def _send(self, request: bytes) -> bytes:
        """Sends a request; returns the head of its answer."""
        self.writer.write(request)
        return await self.reader.readuntil(b"\r\n\r\n")


async def load(
    port: int, clients: int, seconds: float, tokens: int, words: int, seed: int = 0, **fields: Any
) -> dict[str, Any]:
    """Figures of clients that each send one request after another, with prompts drawn from the seed."""
    everyone = [Client(port, tokens, words, seed * clients + number, fields) for number in range(clients)]
    for client in everyone:
        await client.open()
        await asyncio.sleep(0)
    await asyncio.gather(*(client.ask() for client in everyone))  # warm
    for client in everyone:
        client.reset()
    started = time.perf_counter()

    async def go_on(client: Client) -> None:
        while time.perf_counter() < started + seconds:
            await client.ask()

    await asyncio.gather(*map(go_on, everyone))
    elapsed = time.perf_counter() - started
    for client in everyone:
        client.writer.close()
    first, gaps, steps = (
        sorted(value for client in everyone for value in getattr(client, name)) for name in ("first", "gaps", "steps")
    )
    return {
        "clients": clients,
        "requests": len(first),
        "requests_per_second": len(first) / elapsed,
        "tokens_per_second": sum(client.count for client in everyone) / elapsed,
        "first_p50": quantile(first, 0.5),
        "first_p99": quantile(first, 0.99),
        "gap_p50": quantile(gaps, 0.5),
        "gap_p99": quantile(gaps, 0.99),
        "inter_token_p50": quantile(steps, 0.5),
    }


async def join(port: int, clients: int, tokens: int, words: int, long: int) -> dict[str, Any]:
    """Gaps of running requests while another client sends long prompts, one after the other."""
    everyone = [Client(port, tokens, words, seed) for seed in range(clients)]
    intruder = Client(port, 2, long, 99)
    for client in [*everyone, intruder]:
        await client.open()
    await intruder.ask()
    result = {}
    for name in ("without", "with"):
        for client in everyone:
            client.gaps = []
        running = asyncio.gather(*(client.ask() for client in everyone))
        count = 0
        while not running.done():
            await asyncio.sleep(0.05)
            if name == "with" and not running.done():
                await intruder.ask()
                count += 1
        await running
        gaps = sorted(gap for client in everyone for gap in client.gaps)
        result[name] = {
            "gap_p50": quantile(gaps, 0.5),
            "gap_p99": quantile(gaps, 0.99),
            "gap_most": gaps[-1],
            "joined": count,
        }
    result["long_first_p50"] = quantile(sorted(intruder.first), 0.5)
    for client in [*everyone, intruder]:
        client.writer.close()
    return result


async def soak(port: int, requests: int, pid: int) -> list[tuple[int, float]]:
    """Memory after each tenth of the requests, of all kinds; 5 % of the clients leave early."""
    everyone = [Client(port, 8, 10, seed) for seed in range(16)]
    for client in everyone:
        await client.open()
    left, memory = requests, [(0, resident(pid))]
    for part in range(10):

        async def work(client: Client) -> None:
            nonlocal left
            while left > requests - (part + 1) * requests // 10:  # noqa: B023
                left -= 1
                client.tokens = client.random.randrange(1, 17)
                if client.random.random() < 0.05:  # leave in the middle
                    gone = Client(port, 200, 10, left)
                    await gone.open()
                    asking = asyncio.ensure_future(gone.ask())
                    await asyncio.sleep(0.01)
                    asking.cancel()
                    gone.writer.close()
                await client.ask(client.random.randrange(1, 60), stream=client.random.random() < 0.5)
                client.reset()

        await asyncio.gather(*map(work, everyone))
        memory.append((requests - left, resident(pid)))
    for client in everyone:
        client.writer.close()
    return memory


def quantile(values: list[float], part: float) -> float:
    return values[min(len(values) - 1, int(part * len(values)))] if values else float("nan")


def resident(pid: int) -> float:
    """Megabytes."""
    line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1000


def one_by_one(model: str, threads: int, seconds: float, tokens: int, words: int) -> dict[str, Any]:
    loaded = gpt2onnx.load(model, threads=threads or None)
    random_, first, gaps, count = random.Random(0), [], [], 0
    options: dict[str, Any] = {
        "max_new_tokens": tokens,
        "do_sample": True,
        "top_k": 0,
        "eos_token_id": -1,
    }
    list(loaded.stream(prompt(random_, words), **options))
    begin = time.perf_counter()
    while (last := time.perf_counter()) < begin + seconds:
        stream = loaded.stream(prompt(random_, words), seed=random_.randrange(2**31), **options)
        steps = [after - before for before, after in pairwise([last, *(time.perf_counter() for _ in stream)])]
        first.append(steps[0])
        gaps += steps[1:]
        count += tokens
    elapsed = time.perf_counter() - begin
    return {
        "tokens_per_second": count / elapsed,
        "first_p50": statistics.median(first),
        "gap_p50": statistics.median(gaps),
    }


def peers(work: Path, batch: int, threads: int) -> dict[str, list[str]]:
    """Command lines of the other servers, by name."""
    environments, models, here = work / "environments", work / "models", Path(__file__).parent
    llama = [environments / "llama-server", "--model", models / "gpt2-q8_0.gguf", "--parallel", batch, "--ctx-size", 256 * batch,
             "--threads", threads, "--threads-batch", threads, "--no-webui"]  # fmt: skip
    openvino = [environments / "openvino/bin/python", here / "peers/openvino_server.py", models / "openvino-int8",
                "--max-batch", batch, "--threads", threads]  # fmt: skip
    found = {"llama.cpp q8_0": list(map(str, llama)), "OpenVINO int8": list(map(str, openvino))}
    for name in [name for name, command in found.items() if not Path(command[0]).exists()]:
        print(f"{name}: left out, there is no {found.pop(name)[0]}")
    return found


@contextlib.contextmanager
def started(name: str, command: list[str]) -> Iterator[tuple[int, subprocess.Popen[bytes]]]:
    """A server's port and process, once it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen([*command, "--port", str(port)], **quiet) as server:  # type: ignore[call-overload]
        try:
            deadline = time.monotonic() + START_SECONDS
            while True:
                with contextlib.suppress(OSError):
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                    break
                if server.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit(f"{name} didn't start: {shlex.join(command)}")
                time.sleep(0.1)
            yield port, server
        finally:
            server.kill()


def compare(commands: dict[str, list[str]], clients: list[int], seconds: float, *shape: int) -> list[dict[str, Any]]:
    """Loads of all servers, in turns; the first one's ratios to the others are of the same rounds."""
    found: list[dict[str, Any]] = []
    with contextlib.ExitStack() as stack:
        servers = {name: stack.enter_context(started(name, command)) for name, command in commands.items()}
        for _, process in servers.values():
            process.send_signal(signal.SIGSTOP)
        for count in clients:
            rows: dict[str, list[dict[str, Any]]] = {name: [] for name in servers}
            for seed in range(ROUNDS):  # other prompts in each round: llama.cpp's keeps those it has seen
                for name, (port, process) in servers.items():
                    process.send_signal(signal.SIGCONT)
                    rows[name].append(asyncio.run(load(port, count, seconds, *shape, seed=seed, temperature=0)))
                    process.send_signal(signal.SIGSTOP)
            ours = next(iter(rows.values()))
            for name, theirs in rows.items():
                row: dict[str, Any] = {"server": name, "clients": count}
                for figure in ("requests_per_second", "first_p50", "inter_token_p50"):
                    row[figure] = statistics.median(one[figure] for one in theirs)
                    pairs = zip(ours, theirs, strict=True)
                    row[f"ours/theirs {figure}"] = statistics.median(
                        one[figure] / other[figure] for one, other in pairs
                    )
                row["rounds"] = theirs
                found.append(row)
                print("  ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
                                for key, value in row.items() if key != "rounds"), flush=True)  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", default="tales")
    parser.add_argument("--clients", type=int, nargs="*", default=[])
    parser.add_argument("--seconds", type=float, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--words", type=int, default=16, help="of a prompt")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--max-batch", type=int, default=16)
    parser.add_argument("--join", type=int, help="words of a long prompt")
    parser.add_argument("--soak", type=int, help="requests")
    parser.add_argument("--server-options", default="")
    parser.add_argument("--peers", type=Path, metavar="WORK", help="compare with other servers, from this work folder")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    shape = arguments.tokens, arguments.words
    report: dict[str, Any] = {"command": shlex.join(sys.argv)}
    ours = [sys.executable, "-m", "gpt2onnx", "serve", "-m", arguments.model, "--max-queue", "256", "--max-batch",
            str(arguments.max_batch), *shlex.split(arguments.server_options)]  # fmt: skip
    ours += ["--threads", str(arguments.threads)] if arguments.threads else []
    if arguments.peers:
        others = peers(arguments.peers.resolve(), arguments.max_batch, arguments.threads or os.cpu_count() or 1)
        report["servers"] = compare({"gpt2onnx": ours} | others, arguments.clients, arguments.seconds, *shape)
    else:
        report |= measure(arguments, ours, shape)
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


def measure(arguments: argparse.Namespace, command: list[str], shape: tuple[int, int]) -> dict[str, Any]:
    """Figures of our own server."""
    report: dict[str, Any] = {}
    if arguments.clients:
        report["one_by_one"] = one_by_one(arguments.model, arguments.threads, arguments.seconds, *shape)
        print("one by one", report["one_by_one"], flush=True)
    began = time.perf_counter()
    with subprocess.Popen([*command, "--port", "0"], stderr=subprocess.PIPE, text=True, env=os.environ) as server:
        try:
            assert server.stderr is not None
            line = server.stderr.readline()
            report["start_seconds"] = time.perf_counter() - began
            port = int(line.rpartition(":")[2])
            report["idle_megabytes"] = resident(server.pid)
            print(f"ready after {report['start_seconds']:.2f} s, {report['idle_megabytes']:.0f} MB", flush=True)
            report["load"] = []
            for clients in arguments.clients:
                row = asyncio.run(load(port, clients, arguments.seconds, *shape)) | {"megabytes": resident(server.pid)}
                report["load"].append(row)
                print(" ".join(f"{name} {value:.4g}" for name, value in row.items()), flush=True)
            if arguments.join:
                report["join"] = asyncio.run(join(port, 8, *shape, arguments.join))
                print(json.dumps(report["join"]))
            if arguments.soak:
                report["soak"] = asyncio.run(soak(port, arguments.soak, server.pid))
                print("requests, MB:", "  ".join(f"{count} {size:.1f}" for count, size in report["soak"]))
            server.send_signal(signal.SIGTERM)
            began = time.perf_counter()
            report["exit"] = server.wait(60)
            report["stop_seconds"] = time.perf_counter() - began
        finally:
            server.kill()
    return report


if __name__ == "__main__":
    main()
