"""ONNX Runtime: its providers, devices, sessions and small graphs."""
