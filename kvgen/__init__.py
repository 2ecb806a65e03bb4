"""kvgen: a text generator whose KV cache you can trust.

    >>> import kvgen
    >>> loaded = kvgen.load("smollm2")
    >>> kvgen.generate(loaded, "Once upon a time,", kvgen.Sampling(temperature=0), max_tokens=13)
    ' the city of Nova Haven was a thriving metropolis, with towering'

`load` returns the model behind the contract `logits, cache = loaded.model(ids, cache)`, with `ids` always the whole
sequence. Names are imported on first use, so `import kvgen` does not import torch.
"""

import os

import lazy_loader

__version__ = "0.1.0"

# Torch reads this when it is imported. By default, waiting threads spin for milliseconds, which slows every process
# with torch, and the kernels' own threads, a hundredfold when another process is busy.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)  # public names: see __init__.pyi
