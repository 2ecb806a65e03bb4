"""A model that someone forgot to put into evaluation mode: `kvgen compare -m docs/examples/training_mode.py:make`."""

import torch
from x_transformers import Decoder, TransformerWrapper


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        layers = Decoder(
            dim=64, depth=3, heads=4, rotary_pos_emb=True, layer_dropout=0.3, attn_dropout=0.1, verbose=False
        )
        self.net = TransformerWrapper(num_tokens=64, max_seq_len=256, attn_layers=layers)

    def forward(self, ids, cache=None):
        known = 0 if cache is None else cache.cache_length
        return self.net(ids, cache=cache, cache_age=ids.shape[1] - known, return_intermediates=True)


def make() -> Model:
    return Model()  # a new torch module is in training mode: dropout and stochastic depth are on


def make_right() -> Model:
    return Model().eval()
