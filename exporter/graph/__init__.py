"""Named arrays to ONNX. Knows neither checkpoints nor calibration."""
