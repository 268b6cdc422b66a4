"""OpenVINO GenAI's continuous batching behind the least of a server that a load test needs: completions, streamed, greedy.

OpenVINO Model Server, its own, is no Python package. This one runs in the environment of openvino-genai alone.

    python openvino_server.py MODEL --max-batch 32 --threads 2 --port 8000
"""

import argparse
import asyncio
import itertools
import json
import threading

import openvino_genai

_END = b"0\r\n\r\n"
_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


class Batch:
    """The thread that runs the pipeline; each request has a queue of its texts, which ends with None."""

    def __init__(self, pipeline, loop):
        self._pipeline, self._loop, self._tokenizer = pipeline, loop, pipeline.get_tokenizer()
        self._changed, self._running, self._numbers = threading.Condition(), {}, itertools.count()
        threading.Thread(target=self._run, daemon=True).start()

    def add(self, prompt, tokens):
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos = tokens, True
        number, queue = next(self._numbers), asyncio.Queue()
        handle = self._pipeline.add_request(number, prompt, config)
        with self._changed:
            self._running[number] = handle, queue
            self._changed.notify()
        return queue

    def _run(self):
        while True:
            with self._changed:
                while not self._running:
                    self._changed.wait()
                running = list(self._running.items())
            self._pipeline.step()
            for number, (handle, queue) in running:
                while handle.can_read():
                    for output in handle.read().values():
                        self._send(queue, self._tokenizer.decode(output.generated_ids))
                if handle.get_status() != openvino_genai.GenerationStatus.RUNNING:
                    self._send(queue, None)
                    with self._changed:
                        del self._running[number]

    def _send(self, queue, text):
        self._loop.call_soon_threadsafe(queue.put_nowait, text)


async def answer(batch, reader, writer):
    """Answers the requests of a connection."""
    try:
        while True:
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            if head.startswith(b"get"):
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}")
                continue
            length = next(line for line in head.split(b"\r\n") if line.startswith(b"content-length"))
            body = json.loads(await reader.readexactly(int(length.split(b":")[1])))
            queue = batch.add(body["prompt"], body["max_tokens"])
            writer.write(_HEAD)
            while (text := await queue.get()) is not None:
                event = b"data: " + json.dumps({"choices": [{"index": 0, "text": text}]}).encode() + b"\n\n"
                writer.write(b"%x\r\n%s\r\n" % (len(event), event))
            writer.write(_END)
    except (asyncio.IncompleteReadError, ConnectionError):  # the client has left
        writer.close()


async def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--max-batch", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--port", type=int, default=8000)
    arguments = parser.parse_args()
    scheduling = openvino_genai.SchedulerConfig()
    scheduling.max_num_seqs, scheduling.cache_size = arguments.max_batch, 2  # GB
    options = {"INFERENCE_NUM_THREADS": arguments.threads}
    pipeline = openvino_genai.ContinuousBatchingPipeline(arguments.model, scheduling, "CPU", options)
    batch = Batch(pipeline, asyncio.get_running_loop())
    server = await asyncio.start_server(lambda *ends: answer(batch, *ends), "127.0.0.1", arguments.port, limit=2**22)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
