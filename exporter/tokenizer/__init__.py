"""Any GPT-2 tokenizer, as a tokenizer.json."""
