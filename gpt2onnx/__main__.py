"""python -m gpt2onnx: the command line."""

from gpt2onnx.cli.main import program

program()
