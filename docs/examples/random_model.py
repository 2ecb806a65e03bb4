"""Write a small random x-transformers model as a folder that kvgen reads.

    python docs/examples/random_model.py rotary /tmp/rotary

The first argument is a kind of positions: absolute, rotary, alibi or none.
"""

import json
import sys
from pathlib import Path

import torch
from x_transformers import Decoder, TransformerWrapper

POSITIONS = {
    "absolute": ({"use_abs_pos_emb": True}, {}),
    "rotary": ({"use_abs_pos_emb": False}, {"rotary_pos_emb": True}),
    "alibi": ({"use_abs_pos_emb": False}, {"alibi_pos_bias": True}),
    "none": ({"use_abs_pos_emb": False}, {}),
}

kind, folder = sys.argv[1], Path(sys.argv[2])
wrapper = {"num_tokens": 256, "max_seq_len": 256, **POSITIONS[kind][0]}
decoder = {"dim": 64, "depth": 3, "heads": 4, "attn_dim_head": 16, "verbose": False, **POSITIONS[kind][1]}
torch.manual_seed(0)
net = TransformerWrapper(**wrapper, attn_layers=Decoder(**decoder))
for parameter in net.parameters():
    if parameter.ndim > 1:
        torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
folder.mkdir(parents=True, exist_ok=True)
config = {"library": "x-transformers", "wrapper": wrapper, "decoder": decoder, "tokenizer": "bytes"}
(folder / "config.json").write_text(json.dumps(config))
torch.save(net.state_dict(), folder / "model.pt")
