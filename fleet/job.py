"""Job: request files, and the record of them in the output folder, by which a job is resumed only as itself."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyarrow import fs

from gpt2onnx.errors import OutputError, PromptError

from ..models.bundle import MANIFEST
from ..models.files import sha256_of
from ..runtime import jobs
from ..runtime.text import text_input
from .parts import Part, cut
from .storage import Place, reading, unfinished_file, writing
from .worker import Work

RECORD = "_job.json"  # readers of data folders skip names that begin with an underscore

# About a hundred parts, so that workers end together; at most 1000 requests, so that a lost part costs minutes.
_MIN_PART, _MAX_PART = 16, 1000
_BYTES = 65536  # input size per request of a part


@dataclass(frozen=True)
class Job:
    """Request files and their output folder.

    Attributes:
        input: the file or folder that the user named.
        files: its files, sorted by path.
        output: folder of the results.
        part_size: requests in a part.
        identity: all that decides the results, as JSON holds it.
        done: parts that an earlier run of the job has written.
        is_complete: whether these are all parts.
    """

    input: Place
    files: list[fs.FileInfo]
    output: Place
    part_size: int
    identity: dict[str, Any]
    done: frozenset[Part]
    is_complete: bool

    @classmethod
    def open(
        cls,
        input_name: str,
        output_name: str,
        bundle: Path,
        work: Work,
        *,
        part_size: int | None,
        encoding: str,
        resume: bool,
        force: bool,
    ) -> "Job":
        """Looks up input and output. Changes nothing.

        Args:
            part_size: requests in a part; None: the resumed job's, or by the input's size.
            encoding: of input files without a byte order mark.

        Raises:
            PromptError: the input can't be read, or isn't there.
            OutputError: the output can't be read, is a file, or holds other files, or results without leave to keep or
                replace them.
        """
        with reading(input_name):
            source = Place.of(input_name)
            files = [one for one in source.files() if not _is_hidden(one)]
        if not files:
            raise PromptError(f"can't read {source.name}: there is no such file, and no folder with files in it")
        with writing(output_name):
            output = Place.of(output_name)
            present = output.files()
            if [one.path for one in present] == [output.path]:
                raise OutputError(f"{output.name} is a file: the engine ray writes a folder")
            record = output.read(RECORD)
        if record is None and not all(map(_is_hidden, present)):
            raise OutputError(f"{output.name} holds other files: choose another output")
        if record is not None and not (resume or force):
            raise OutputError(f"{output.name} holds the results of a job: --resume continues it, --force replaces it")
        held = jobs.load(record) if resume and record is not None else None
        held = held if isinstance(held, dict) else {}  # a damaged record is no job's
        by_size = min(_MAX_PART, max(_MIN_PART, sum(one.size for one in files) // _BYTES))
        content = {
            "input": [[one.base_name, one.size, one.mtime_ns] for one in files],
            "bundle": sha256_of(bundle / MANIFEST),
            "options": work.options.to_dict(),
            "batch_size": work.batch_size,
            "part_size": part_size or held.get("part_size") or by_size,
            "format": work.format,
            "encoding": encoding,
        }
        identity = json.loads(json.dumps(content))
        differing = [name.replace("_", " ") for name, value in identity.items() if held.get(name) != value]
        if resume and record is not None and differing:
            raise OutputError(
                f"{output.name} holds results of another job, different in its {differing[0]}:"
                " choose another output, or give --force in place of --resume"
            )
        done = frozenset(part for one in present if (part := Part.named(one.base_name))) if held else frozenset()
        return cls(source, files, output, identity["part_size"], identity, done, held.get("parts") == len(done))

    def missing(self) -> Iterator[tuple[Part, list[str | PromptError]]]:
        """Reads the parts that aren't done, in order, with their request lines.

        Raises:
            PromptError: the input can't be read.
        """
        for number, one in enumerate(self.files):
            with reading(self.input.name), self.input.filesystem.open_input_stream(one.path) as stream:  # unpacks .gz
                lines = text_input.lines(stream, str(one.base_name), self.identity["encoding"])
                yield from (
                    (part, texts) for part, texts in cut(lines, number, self.part_size) if part not in self.done
                )

    def begin(self) -> None:
        """Makes the output folder, and removes parts that aren't `done` and unfinished files.

        Raises:
            OutputError: the folder can't be written.
        """
        with writing(self.output.name):
            self.output.filesystem.create_dir(self.output.path, recursive=True)
            for one in self.output.files():
                part, unfinished = Part.named(one.base_name), unfinished_file(one.base_name)
                outdated = part is not None and part not in self.done
                if outdated or (unfinished and (unfinished == RECORD or Part.named(unfinished))):
                    self.output.filesystem.delete_file(one.path)
            self._record(self.identity)

    def end(self, parts: int) -> None:
        """Records that the job is complete, and its number of parts.

        Raises:
            OutputError: the folder can't be written.
        """
        with writing(self.output.name):
            self._record({**self.identity, "parts": parts})

    def _record(self, content: dict[str, Any]) -> None:
        self.output.write(RECORD, (json.dumps(content, indent=2) + "\n").encode())


def _is_hidden(file: fs.FileInfo) -> bool:
    return str(file.base_name).startswith((".", "_"))
