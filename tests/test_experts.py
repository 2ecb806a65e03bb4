"""Mixtures of experts: what is computed, how their tensors are stored, and the memory that reading them takes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import kvgen
from kvgen.model.config import DecoderConfig, Layer
from kvgen.model.decoder import Decoder
from kvgen.model.ffns import MLP, MoE, Router
from kvgen.model.mixers import Attention
from kvgen.model.moe import MoEModule, used_share
from tests.families import make_checkpoint, make_model

MIXTURE = MoE(Router(8, 2, normalize=True), MLP(10), MLP(7))
ATTENTION = Attention(2, 2, 4)
CONFIG = DecoderConfig(50, 64, 24, (Layer(ATTENTION, MLP(16)), Layer(ATTENTION, MIXTURE)), 1e-5, tied_head=False)
IDS = torch.arange(2, 42)[None]


@pytest.fixture
def module() -> MoEModule:
    torch.manual_seed(0)
    module = MoEModule(MIXTURE, CONFIG).requires_grad_(False)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return module


def test_only_chosen_experts_are_computed(module: MoEModule) -> None:
    x = torch.randn(1, 24)
    expected, (chosen, weights) = module(x), module.router(x)
    assert chosen.shape == (1, 2) and chosen[0, 0] < chosen[0, 1]
    assert weights.sum() == pytest.approx(1)
    for parameter in module.experts.parameters():
        parameter[[expert for expert in range(8) if expert not in chosen]] = float("nan")
    assert torch.equal(module(x), expected)


def test_a_row_does_not_depend_on_the_rows_beside_it(module: MoEModule) -> None:
    x = torch.randn(30, 24)
    together = module(x)
    for row in range(30):
        assert (module(x[row : row + 1])[0] - together[row]).abs().max() < 1e-5


def test_a_token_uses_the_share_of_the_experts_that_it_chooses() -> None:
    with torch.device("meta"):
        names = [name for name, _ in Decoder(CONFIG).named_parameters()]
    shares = {name: used_share(CONFIG, name) for name in names}
    assert {name for name, share in shares.items() if share != 1} == {
        f"blk.1.ffn.experts.{part}.weight" for part in ("gate", "up", "down")
    }
    assert shares["blk.1.ffn.experts.up.weight"] == 0.25


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def fuse(tensors: dict[str, Tensor]) -> None:
    """Store all experts of a layer in one tensor, as newer writers do."""
    for layer in range(3):
        prefix = f"model.layers.{layer}.mlp.experts"
        parts = {
            part: torch.stack([tensors.pop(f"{prefix}.{expert}.{part}_proj.weight") for expert in range(6)])
            for part in ("gate", "up", "down")
        }
        tensors[f"{prefix}.gate_up_proj"] = torch.cat((parts["gate"], parts["up"]), dim=1)
        tensors[f"{prefix}.down_proj"] = parts["down"]


def test_experts_in_one_tensor_are_the_same(tmp_path: Path) -> None:
    make_checkpoint("qwen3_moe", 0, tmp_path)
    expected = kvgen.load(tmp_path, tokenizer="ids").model.all_logits(IDS)
    rewrite(tmp_path, fuse)
    assert torch.equal(kvgen.load(tmp_path, tokenizer="ids").model.all_logits(IDS), expected)


@pytest.mark.parametrize("expert", [0, 3, 5])
def test_a_missing_expert_is_refused(expert: int, tmp_path: Path) -> None:
    make_checkpoint("qwen3_moe", 0, tmp_path)
    name = f"model.layers.1.mlp.experts.{expert}.up_proj.weight"
    rewrite(tmp_path, lambda tensors: tensors.__delitem__(name))
    with pytest.raises(kvgen.CheckpointError, match=re.escape("model.layers.1.mlp.experts.")):
        kvgen.load(tmp_path, tokenizer="ids")


def test_layers_that_predict_further_tokens_are_ignored(tmp_path: Path) -> None:
    make_checkpoint("glm4_moe", 0, tmp_path)
    expected = kvgen.load(tmp_path, tokenizer="ids").model.all_logits(IDS)

    def add(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.3.eh_proj.weight"] = torch.ones(32, 64)
        tensors["model.layers.3.self_attn.q_proj.weight"] = torch.ones(48, 32)

    rewrite(tmp_path, add)
    assert torch.equal(kvgen.load(tmp_path, tokenizer="ids").model.all_logits(IDS), expected)
    rewrite(tmp_path, lambda tensors: tensors.update({"model.layers.2.eh_proj.weight": torch.ones(32, 64)}))
    with pytest.raises(kvgen.CheckpointError, match=r"layers\.2\.eh_proj"):
        kvgen.load(tmp_path, tokenizer="ids")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts_per_tok": 9}, "cannot choose 9 of 4 experts"),
        ({"n_group": 3}, "cannot choose 2 of 3 groups of 8 experts"),
        ({"topk_group": 5}, "cannot choose 5 of 4 groups of 8 experts"),
        ({"n_group": 8}, "groups of 1 experts are too small"),
    ],
    ids=str,
)
def test_impossible_routers_are_refused(changes: dict[str, int], message: str, tmp_path: Path) -> None:
    make_checkpoint("glm4_moe", 0, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    more = {"num_experts_per_tok": 2} if "n_group" in changes else {}
    (tmp_path / "config.json").write_text(json.dumps(config | more | changes))
    with pytest.raises(kvgen.CheckpointError, match=message):
        kvgen.load(tmp_path, tokenizer="ids")


@pytest.mark.slow
def test_reading_a_mixture_takes_little_more_memory_than_its_file(tmp_path: Path) -> None:
    small, large = tmp_path / "small", tmp_path / "large"
    make_checkpoint("qwen3_moe", 0, small)
    sizes = {"hidden_size": 512, "num_experts": 48, "moe_intermediate_size": 384, "head_dim": 64}
    make_model("qwen3_moe", sizes).bfloat16().save_pretrained(large)
    script = f"""
import kvgen, resource
for folder in ({str(small)!r}, {str(large)!r}):
    loaded = kvgen.load(folder, tokenizer="ids", dtype="bfloat16")
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    before, peak = map(int, done.stdout.split())
    assert peak - before < 1.2 * (large / "model.safetensors").stat().st_size
