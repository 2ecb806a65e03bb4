"""Models behind the contract: kvgen's own decoder, the x-transformers library, a model from a user's file."""
