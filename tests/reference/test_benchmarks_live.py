"""The harness of benchmarks/ with transformers as a peer, whose tokens are to be ours."""

from pathlib import Path

from support import benchmarks
from support.checkpoints import MakeCheckpoint

import gpt2onnx


def test_a_run_beside_transformers(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(**benchmarks.CHECKPOINT)
    bundle = gpt2onnx.export(checkpoint, tmp_path / "bundle", parity=False).folder
    peer = benchmarks.contender("transformers", "transformers_peer", checkpoint, checkpoint / "model.safetensors")
    benchmarks.check_a_run(bundle, peer | {"slow": True}, tmp_path)
