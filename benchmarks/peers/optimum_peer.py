"""optimum's ORTModelForCausalLM on its own export: transformers' generate() on ONNX Runtime."""

from importlib.metadata import version

import onnxruntime
import torch
from optimum.onnxruntime import ORTModelForCausalLM
from transformers_peer import Driver as Transformers


class Driver(Transformers):
    version = f"optimum-onnx {version('optimum-onnx')}, onnxruntime {version('onnxruntime')}"

    def load(self, model, precision, threads):
        torch.set_num_threads(threads)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        # Its default on the CPU, and the faster of the two there.
        self.model = ORTModelForCausalLM.from_pretrained(model, session_options=options, use_io_binding=False)

    def can(self, task):
        return not task.prompt_lookup
