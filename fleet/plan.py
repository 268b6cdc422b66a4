"""What a fleet is to do, as the output folder remembers it: so that a job is only ever resumed as itself."""

import json
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pyarrow import fs

from gpt2onnx.errors import OutputError, PromptError

from ..models.bundle import MANIFEST, sha256_of
from .parts import Part
from .storage import Place, public, reason, writing
from .worker import Work

PLAN = "_job.json"  # with an underscore, which readers of folders of data pass over

# Some hundred parts, so that workers end at about the same time, but neither tiny ones nor such that take hours to repeat.
_LEAST, _MOST = 16, 1000
_BYTES = 65536  # of input for each request in a part


@dataclass(frozen=True)
class Plan:
    """A job: which requests, in which parts, carried out how.

    Attributes:
        input: what the user named.
        files: it or its files, in their order.
        digest: of the model's bundle.
        work: how the requests are carried out.
        part_size: requests of a part.
    """

    input: Place
    files: list[fs.FileInfo]
    digest: str
    work: Work
    part_size: int

    @classmethod
    def make(cls, input_name: str, bundle: Path, work: Work, part_size: int | None = None) -> "Plan":
        """Looks the input up.

        Args:
            input_name: a path or URI.
            bundle: the model's folder.
            work: how the requests are carried out.
            part_size: requests of a part; by default by the size of the input.

        Raises:
            PromptError: it can't be read, or there is none.
        """
        try:
            place = Place.of(input_name)
            files = place.files()
        except OSError as error:
            raise PromptError(f"can't read {public(input_name)}: {reason(error)}") from error
        if not files:
            raise PromptError(f"can't read {place.name}: there is no such file, and no folder with files in it")
        if part_size is None:
            part_size = min(_MOST, max(_LEAST, sum(one.size for one in files) // _BYTES))
        return cls(place, files, sha256_of(bundle / MANIFEST), work, part_size)

    @property
    def identity(self) -> dict[str, Any]:
        """All that decides about the results, as JSON holds it."""
        content = {
            "input": [[one.base_name, one.size, one.mtime_ns] for one in self.files],
            "bundle": self.digest,
            "options": asdict(self.work.options),
            "batch_size": self.work.batch_size,
            "part_size": self.part_size,
            "format": self.work.format,
        }
        return dict(json.loads(json.dumps(content)))


def look(plan: Plan, output: Place, *, resume: bool) -> list[Part]:
    """Whether the results may go to the output folder, which isn't touched.

    Args:
        plan: what is to be done.
        output: the folder.
        resume: keep the parts that are there; otherwise results of an earlier job are going to be replaced.

    Returns:
        The parts that are done already.

    Raises:
        OutputError: the folder can't be read, or holds what isn't this job's.
    """
    with writing(output):
        there = output.files()
        if [one.path for one in there] == [output.path]:
            raise OutputError(f"{output.name} is a file: the engine ray writes a folder")
        held = remembered(output)
    if held is None and there:
        raise OutputError(f"{output.name} holds other files: choose another output")
    if held is None or not resume:
        return []
    differing = [name.replace("_", " ") for name, value in plan.identity.items() if held.get(name) != value]
    if differing:
        raise OutputError(
            f"{output.name} holds results of another job, different in its {differing[0]}:"
            " choose another output, or leave out --resume"
        )
    return [part for part in (Part.named(one.base_name) for one in there) if part is not None]


def begin(plan: Plan, output: Place, done: Collection[Part]) -> None:
    """Makes the output folder ready: with the parts that are done, and no others.

    Raises:
        OutputError: the folder can't be written.
    """
    with writing(output):
        output.filesystem.create_dir(output.path, recursive=True)
        for one in output.files():
            part = Part.named(one.base_name)
            if part is not None and part not in done:
                output.remove(one.path)
        output.clear_up()
        output.write(PLAN, _to_json(plan.identity))


def end(plan: Plan, output: Place, done: Collection[Part], written: Collection[str]) -> None:
    """Notes in the output folder that the job is complete.

    Args:
        plan: what was done.
        output: the folder.
        done: the parts that were there.
        written: files of those that weren't.

    Raises:
        OutputError: the folder can't be written, or lacks something.
    """
    with writing(output):
        missing = set(written) - {one.base_name for one in output.files()}
        if missing:
            raise OutputError(f"{output.name} lacks {min(missing)}, which was written: run it again with --resume")
        output.write(PLAN, _to_json({**plan.identity, "parts": len(done) + len(written)}))


def is_complete(output: Place, parts: int) -> bool:
    """Whether the folder holds all results of its job, which are so many parts."""
    with writing(output):
        return (remembered(output) or {}).get("parts") == parts


def remembered_part_size(output: Place) -> int | None:
    """The part size of the job whose results the folder holds."""
    with writing(output):
        size = (remembered(output) or {}).get("part_size")
    return size if isinstance(size, int) and size > 0 else None


def remembered(output: Place) -> dict[str, Any] | None:
    """The identity of the job whose results the folder holds; None where there is none."""
    content = output.read(PLAN)
    try:
        held = None if content is None else json.loads(content)
    except ValueError:
        held = {}
    return held if held is None or isinstance(held, dict) else {}


def _to_json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()
