"""Many prompts through one model: rows of JSONL in, a row of JSONL out for each."""
