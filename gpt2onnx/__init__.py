"""GPT-2 on any machine, without PyTorch."""
