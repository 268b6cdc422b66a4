"""What exporter and runtime agree on: configuration, tensor contract, bundle layout, the embedded model.

Knows neither onnx nor onnxruntime, and never imports from the other folders.
"""
