"""Bundle to text, with NumPy, ONNX Runtime and tokenizers alone.

Neither torch, transformers nor onnx can be imported here (linted and tested). The way of a token:

    model       text in, text out
    engine      scheduler: the sequences of the next forward pass; runner: the pass, in place on the KV cache
    ort         ONNX Runtime
    decoding    strategy: logits in, next tokens out
"""
