"""gpt2onnx devices"""

from typing import Any

import click

from . import console


@click.command("devices")
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
@console.verbosity
def command(as_json: bool, quiet: bool) -> None:
    """List the devices, cores and memory that models can use here.

    Tries every execution provider of the installed ONNX Runtime with a graph of one operator.

    \b
    Examples:
      gpt2onnx devices
      gpt2onnx devices --json
    """
    from ..runtime.host import resources
    from ..runtime.ort import devices, providers

    installed = devices.packages()
    found = []
    for provider in providers.available():
        reason = providers.why_not(provider)
        found.append(
            {"device": devices.device_name(provider), "provider": provider, "loads": not reason, "reason": reason}
        )
    working = {each["provider"] for each in found if each["loads"]}
    auto = next(provider for provider in (devices.CUDA, devices.CPU) if provider in working)
    cores, memory = resources.cores(), resources.memory()
    facts: dict[str, Any] = {
        "onnxruntime": {
            "version": providers.VERSION,
            "package": providers.PACKAGE,
            "installed": installed,
            "warning": devices.conflict(installed),
        },
        "devices": found,
        "auto": devices.device_name(auto),
        "cores": {name: getattr(cores, name) for name in ("usable", "reason", "machine", "affinity", "quota")},
        "memory": memory and {"available": memory.available, "reason": memory.reason},
    }
    if as_json:
        console.print_json(facts)
    else:
        _print(facts)


def _print(facts: dict[str, Any]) -> None:
    from ..runtime.host.resources import in_words

    runtime, cores, memory = facts["onnxruntime"], facts["cores"], facts["memory"]
    click.echo(f"ONNX Runtime {runtime['version']} (package {runtime['package']})")
    if runtime["warning"]:
        click.echo(f"  warning: {runtime['warning']}")
    for each in facts["devices"]:
        state = "loads" if each["loads"] else f"doesn't load: {each['reason']}"
        click.echo(f"  {each['device']:<10} {each['provider']}: {state}")
    click.echo(f"--device auto: {facts['auto']}, if it runs the bundle")
    quota = "no quota" if cores["quota"] is None else f"a quota of {cores['quota']:g}"
    click.echo(
        f"{cores['usable']} usable cores, limited by {cores['reason']}"
        f" (machine {cores['machine']}, affinity {cores['affinity']}, {quota})"
    )
    if memory:
        click.echo(f"{in_words(memory['available'])} of memory available, limited by {memory['reason']}")
