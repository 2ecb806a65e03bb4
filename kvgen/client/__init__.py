"""The client of `kvgen serve`: what the command line needs of a model, from one that another process holds.

Does not import torch, and encodes no text: the server's tokenizer does.
"""
