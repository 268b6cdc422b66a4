"""Installs the kit that this file lies in, and tests the installation. Needs Python only, and no network.

    python3 install.py /opt/gpt2onnx

makes /opt/gpt2onnx/venv, with the command bin/gpt2onnx, and /opt/gpt2onnx/bundle. Prints JSON at the end.
"""

import argparse
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

KIT = Path(__file__).resolve().parent


def main():
    """Installs the kit; on failure says why in one line and leaves nothing behind."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", type=Path, help="folder to make")
    target = parser.parse_args().target.absolute()
    facts = json.loads((KIT / "kit.json").read_text(encoding="utf-8"))
    check_machine(facts)
    check_files()
    try:
        target.mkdir(parents=True)
    except OSError as error:
        fail("can't make {}: {}".format(target, error.strerror))
    done = False
    try:
        command = install(target)
        same = smoke_test(command, target / "bundle")
        done = True
    finally:
        if not done:
            shutil.rmtree(target, ignore_errors=True)
    report = {"command": str(command), "bundle": str(target / "bundle"), "same_tokens_as_builder": same}
    print(json.dumps({"installed": str(target)} | facts | report))


def check_machine(facts):
    """Fails if the kit is for another machine."""
    here = "{}.{}".format(*sys.version_info[:2])
    if here != facts["python"]:
        fail(
            "the kit is for Python {}, this is {}: run it with python{}".format(facts["python"], here, facts["python"])
        )
    systems = {"linux": "Linux", "macos": "Darwin", "windows": "Windows"}
    system = systems[facts["platform"].split("-")[0]]
    if (platform.system(), platform.machine()) != (system, facts["machine"]):
        fail("the kit is for {}, this is {} {}".format(facts["platform"], platform.system(), platform.machine()))
    if system == "Linux" and platform.libc_ver()[0] != "glibc":
        fail("ONNX Runtime needs a Linux with glibc; this one has another C library (musl?)")


def check_files():
    """Fails if a file has changed since the kit was built."""
    for line in (KIT / "SHA256SUMS").read_text(encoding="utf-8").splitlines():
        digest, name = line.split("  ", 1)
        try:
            content = (KIT / name).read_bytes()
        except OSError as error:
            fail("can't read {}: {}; copy the kit again".format(KIT / name, error.strerror))
        if hashlib.sha256(content).hexdigest() != digest:
            fail("{} is damaged: copy the kit again".format(KIT / name))


def install(target):
    """Makes the environment and unpacks the bundle; returns the path of the command gpt2onnx."""
    print("installing to {}".format(target), file=sys.stderr)
    # Without ensurepip, which Debian's python3 lacks: the kit brings pip.
    venv.EnvBuilder(with_pip=False, symlinks=os.name != "nt").create(target / "venv")
    programs = target / "venv" / ("Scripts" if os.name == "nt" else "bin")
    (pip,) = (KIT / "wheels").glob("pip-*.whl")
    # --isolated: ignores this machine's pip settings.
    run(
        programs / "python", pip / "pip", "--isolated", "--disable-pip-version-check", "--quiet", "install", "--no-index",
        "--find-links", KIT / "wheels", "--require-hashes", "--requirement", KIT / "requirements.txt",
    )  # fmt: skip
    run(programs / "python", pip / "pip", "--isolated", "check")
    command = programs / ("gpt2onnx.exe" if os.name == "nt" else "gpt2onnx")
    run(command, "unpack", KIT / "bundle.tar.gz", target / "bundle", "--quiet")
    return command


def smoke_test(command, bundle):
    """Verifies the bundle and generates from it; returns whether the tokens are those of the builder's machine."""
    print("testing", file=sys.stderr)
    run(command, "verify", bundle, "--quiet")
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.jsonl"
        job = ["--input", KIT / "smoke.jsonl", "--output", results, "--fail-on-error", "--quiet"]
        run(command, "generate", "-m", bundle, *job)
        found, expected = tokens(results), tokens(KIT / "smoke-results.jsonl")
    if [len(each) for each in found] != [len(each) for each in expected]:
        fail("the test requests gave {} tokens instead of {}".format(found, expected))
    return found == expected


def tokens(results):
    """Reads the tokens of a result file."""
    records = map(json.loads, results.read_text(encoding="utf-8").splitlines())
    return [record["sequences"][0]["token_ids"] for record in records]


def run(*command):
    """Runs a program; shows its output only if it fails."""
    done = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        sys.stderr.write(done.stdout.decode(errors="replace"))
        fail("'{}' failed ({})".format(" ".join(map(str, command[:3])), done.returncode))


def fail(message):
    """Ends with one line and exit code 1."""
    sys.exit("install: {}".format(message))


if __name__ == "__main__":
    main()
