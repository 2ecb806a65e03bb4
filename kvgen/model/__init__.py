"""The decoder and its KV cache. Knows nothing of files, text or model families."""
