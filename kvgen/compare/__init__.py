"""Is a KV cache right? Patterns of calling a model, compared on their logits, with a verdict and a reason.

Nothing here knows which backend it runs on.
"""
