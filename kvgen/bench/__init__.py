"""How fast a model is: prefill, decode, cached against uncached, memory."""
