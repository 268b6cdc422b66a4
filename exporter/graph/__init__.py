"""Named arrays, plain or quantised, to ONNX. Knows neither checkpoints nor calibration."""
