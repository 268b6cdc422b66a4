"""Speed, memory and size of gpt2onnx and of its peers, measured side by side. Not part of the installed package."""
