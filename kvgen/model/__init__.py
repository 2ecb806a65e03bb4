"""The native decoder. It knows nothing of files, text or model families."""
