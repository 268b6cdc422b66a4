"""Bundle to text, with NumPy, ONNX Runtime and tokenizers alone.

Neither torch, transformers nor onnx can be imported here (linted and tested). The way of a token:

    generator    text in, text out: encodes prompts, streams and collects results
    decode       the loop: which sequences are in the next forward pass, and in which rows
    search       one prompt's strategy: logits in, next tokens out (logits, sampling, beams)
    session      the forward pass, in place on the cache
"""
