"""Batch processing: rows of JSONL in, one result per row out."""
