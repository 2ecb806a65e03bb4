"""Models behind the contract: kvgen's own decoder, the x-transformers library, a user's Python file."""
