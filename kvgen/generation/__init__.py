"""Text generation: sampling, the decoding loop, batching, and streaming text."""
