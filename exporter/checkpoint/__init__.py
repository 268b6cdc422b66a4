"""Any supported checkpoint, as named arrays: GPT2Config and NumPy arrays under transformers' names."""
