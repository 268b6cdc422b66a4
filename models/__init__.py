"""Shared by exporter and runtime: configuration, tensor contract, bundle layout, the embedded model.

Knows neither onnx nor onnxruntime, and never imports from the other folders.
"""
