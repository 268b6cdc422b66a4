"""Named arrays, plain or quantised, to ONNX. Knows no calibration; only `portable`, which PyTorch traces, knows checkpoints."""
