"""Gated delta nets: chunks equal steps, and what checkpoints of models with them hold besides."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import kvgen
from kvgen import CheckpointError
from kvgen.model.delta_net import delta_rule
from tests import gguf_delta_nets, gguf_files
from tests.families import DELTA_NETS, make_checkpoint, make_model


def inputs(length: int, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v, log_alpha, beta of two texts, and the state before them."""
    torch.manual_seed(length)
    q, k = (torch.nn.functional.normalize(torch.randn(2, length, 2, 8, dtype=dtype), dim=-1) for _ in range(2))
    v = torch.randn(2, length, 6, 5, dtype=dtype)
    log_alpha, beta = (scale * torch.rand(2, length, 6, dtype=dtype) for scale in (-0.1, 1.0))
    return [q, k, v, log_alpha, beta, torch.randn(2, 6, 8, 5, dtype=dtype)]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 5e-6), (torch.float64, 1e-14)])
@pytest.mark.parametrize("length", [2, 63, 64, 65, 150])
def test_chunks_equal_steps(length: int, dtype: torch.dtype, tolerance: float) -> None:
    *parts, state = inputs(length, dtype)
    whole, last = delta_rule(*parts, state)
    for at in range(length):
        output, state = delta_rule(*(part[:, at : at + 1] for part in parts), state)
        assert (output[:, 0] - whole[:, at]).abs().max() < tolerance
    assert (state - last).abs().max() < tolerance


def test_a_step_is_the_equation_of_the_paper() -> None:
    """Equation 10: S_t = S_(t-1) (alpha_t (I - beta_t k_t k_t^T)) + beta_t v_t k_t^T, o_t = S_t q_t."""
    q, k, v, log_alpha, beta, state = inputs(1, torch.float64)
    output, last = delta_rule(q, k, v, log_alpha, beta, state)
    for head in range(6):
        q_t, k_t, v_t = q[0, 0, head // 3], k[0, 0, head // 3], v[0, 0, head]
        alpha_t, beta_t = log_alpha[0, 0, head].exp(), beta[0, 0, head]
        erase = torch.eye(8, dtype=torch.float64) - beta_t * torch.outer(k_t, k_t)
        expected = state[0, head].T @ (alpha_t * erase) + beta_t * torch.outer(v_t, k_t)
        assert torch.allclose(last[0, head].T, expected, atol=1e-14)
        assert torch.allclose(output[0, 0, head], expected @ q_t, atol=1e-14)


def test_a_decay_to_nothing_is_finite() -> None:
    q, k, v, log_alpha, beta, state = inputs(130, torch.float32)
    output, last = delta_rule(q, k, v, 1e5 * log_alpha, beta, state)
    assert output.isfinite().all()
    assert last.isfinite().all()


def add_tensor(folder: Path, name: str) -> None:
    path = folder / "model.safetensors"
    save_file({**load_file(path), name: torch.ones(4)}, path, {"format": "pt"})


@pytest.mark.parametrize("kind", ["qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"])
def test_layers_that_predict_further_tokens_are_left_out(kind: str, tmp_path: Path) -> None:
    make_checkpoint(kind, 0, tmp_path)
    add_tensor(tmp_path, "mtp.layers.0.self_attn.q_proj.weight")
    kvgen.load(tmp_path, tokenizer="ids")
    add_tensor(tmp_path, "model.layers.0.linear_attn.smell.weight")
    with pytest.raises(CheckpointError, match=r"linear_attn\.smell\.weight' is not part"):
        kvgen.load(tmp_path, tokenizer="ids")


def test_the_first_gguf_files_have_one_tensor_of_queries_keys_values_and_gates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, options = gguf_delta_nets.CONFIGS[0]
    reference = make_model(kind, options)
    gguf_files.write_gguf(tmp_path / "new.gguf", kind, reference)

    def converted(name: str, array: Any, config: Any) -> Any:
        return [(name, array)] if ".in_proj_qkvz." in name else as_today(name, array, config)

    as_today = gguf_delta_nets.converted
    monkeypatch.setattr(gguf_delta_nets, "converted", converted)
    gguf_files.write_gguf(tmp_path / "old.gguf", kind, reference)
    names = {tensor.name for tensor in gguf.GGUFReader(tmp_path / "old.gguf").tensors}
    assert "blk.0.ssm_in.weight" in names
    assert "blk.0.attn_qkv.weight" not in names
    ids = torch.arange(2, 72)[None]
    old, new = (kvgen.load(tmp_path / f"{age}.gguf", tokenizer="ids").model for age in ("old", "new"))
    assert torch.equal(old.all_logits(ids), new.all_logits(ids))


def test_heads_of_values_that_cannot_share_heads_of_keys_are_refused(tmp_path: Path) -> None:
    make_model("qwen3_5_text", DELTA_NETS).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace('"linear_num_value_heads": 4', '"linear_num_value_heads": 5'))
    with pytest.raises(CheckpointError, match="5 heads of values cannot share 2 heads of keys"):
        kvgen.load(tmp_path, tokenizer="ids")
