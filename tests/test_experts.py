"""Mixtures of experts: what is computed, how their tensors are stored, and the memory that reading them takes."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType
from safetensors.torch import load_file, save_file
from torch import Tensor

import kvgen
from kvgen.checkpoint.grouped import quantized
from kvgen.kernels.decoder import KernelDecoder
from kvgen.kernels.lacking import lacking
from kvgen.kernels.packed import PackedMatrix
from kvgen.model.config import DecoderConfig, Layer
from kvgen.model.decoder import Decoder
from kvgen.model.ffns import MLP, MoE, Router, SparseMLP
from kvgen.model.mixers import Attention
from kvgen.model.moe import MoEModule, used_share
from tests import gguf_files
from tests.families import EXPERTS, make_checkpoint, make_model
from tests.gguf_experts import is_expert

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


@pytest.mark.parametrize("kernels", ["cpp", "off"])
def test_experts_in_one_tensor_are_the_same(kernels: str, tmp_path: Path) -> None:
    make_checkpoint("qwen3_moe", 0, tmp_path)
    expected = kvgen.load(tmp_path, tokenizer="ids", kernels=kernels).model.all_logits(IDS)
    rewrite(tmp_path, fuse)
    assert torch.equal(kvgen.load(tmp_path, tokenizer="ids", kernels=kernels).model.all_logits(IDS), expected)


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


# --- On the kernels ---

WHOLE_GROUPS = EXPERTS | {"hidden_size": 64, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 96}


@pytest.mark.parametrize("type_name", ["Q4_0", "Q4_1", "Q8_0"])
def test_quantized_experts_of_a_gguf_file_stay_as_small(type_name: str, tmp_path: Path) -> None:
    reference, kind = make_model("qwen2_moe", WHOLE_GROUPS), GGMLQuantizationType[type_name]
    gguf_files.write_gguf(tmp_path / "m.gguf", "qwen2_moe", reference, type_=kind, quantized=is_expert)
    model, on_torch = (
        kvgen.load(tmp_path / "m.gguf", tokenizer="ids", kernels=kernels).model for kernels in ("cpp", "off")
    )
    assert model.engine.startswith("C++ kernels (")
    for name, weight in model.decoder.weights.items():
        if ".experts." in name:
            assert isinstance(weight, PackedMatrix)
            assert weight.nbytes < (1.1 if type_name == "Q8_0" else 0.7) * math.prod(weight.shape)
    expected = on_torch.all_logits(IDS)
    assert (model.all_logits(IDS) - expected).abs().max() < 1e-3 * expected.abs().max()
    together, cache = model.all_logits(IDS), None
    for length in range(1, IDS.shape[1] + 1):
        logits, cache = model(IDS[:, :length], cache)
        assert torch.equal(logits[0, 0], together[0, length - 1])


@pytest.mark.parametrize("bits", [8, 4])
def test_experts_are_quantized_at_load_as_on_torch(bits: int, tmp_path: Path) -> None:
    make_model("qwen2_moe", WHOLE_GROUPS).save_pretrained(tmp_path)
    model, on_torch = (
        kvgen.load(tmp_path, tokenizer="ids", kernels=kernels, quantize=f"int{bits}").model
        for kernels in ("cpp", "off")
    )
    plain = kvgen.load(tmp_path, tokenizer="ids", kernels="cpp").model
    assert model.weight_bytes < (0.4 if bits == 8 else 0.3) * plain.weight_bytes
    expected = on_torch.all_logits(IDS)
    assert (model.all_logits(IDS) - expected).abs().max() < 1e-3 * expected.abs().max()


def test_half_precision_experts_stay_as_small_and_compute_in_fp32(tmp_path: Path) -> None:
    reference = make_model("granitemoe", {"num_local_experts": 4, "hidden_size": 64, "intermediate_size": 32})
    reference.bfloat16().save_pretrained(tmp_path)
    model, on_torch = (kvgen.load(tmp_path, tokenizer="ids", kernels=kernels).model for kernels in ("cpp", "off"))
    assert (model.all_logits(IDS) - on_torch.all_logits(IDS)).abs().max() < 1e-4
    assert model.weight_bytes < 0.7 * on_torch.weight_bytes
    assert model.weight_bytes - model.step_bytes > 0.3 * model.weight_bytes  # half of the experts


@pytest.mark.parametrize("shared_gate", [False, True])
@pytest.mark.parametrize("more", [(), ("ffn_norm",), ("ffn_norm", "post_ffw_norm")])
def test_mixtures_in_other_blocks(more: tuple[str, ...], shared_gate: bool) -> None:
    """Parallel blocks, norms after mixtures, biases, no gates: what no family has yet."""
    mixture = MoE(Router(8, 3, scale=0.7), MLP(32, gated=False, activation="relu2"), MLP(64), shared_gate)
    biases = frozenset({"ffn.router", "ffn.experts.up", "ffn.experts.down", "ffn.shared.up"})
    layers = (Layer(Attention(2, 2, 16), mixture),) * 2
    sizes = DecoderConfig(50, 64, 32, layers, 1e-5, tied_head=True, biases=biases, residual_scale=0.6)
    config = replace(sizes, norms=frozenset({"attn_norm", *more}), parallel=not more)
    decoder = Decoder(config).requires_grad_(False)
    weights: dict[str, PackedMatrix | Tensor] = {}
    torch.manual_seed(0)
    for name, parameter in decoder.named_parameters():
        parameter.normal_(std=0.3)
        weights[name] = parameter
        if name.endswith(".weight") and parameter.ndim > 1:
            packed = PackedMatrix(parameter if "router" in name else quantized(parameter, 8))
            parameter.copy_(packed.unpacked())
            weights[name] = packed
    logits, expected = KernelDecoder(config, weights).all_logits(IDS), decoder.all_logits(IDS)
    assert (logits - expected).abs().max() < 1e-3 * expected.abs().max()


@pytest.mark.parametrize("part", ["mlp.gate", "mlp.shared_expert_gate"])
def test_a_router_that_is_no_number_is_not_lost(part: str, tmp_path: Path) -> None:
    reference = make_model("qwen2_moe", WHOLE_GROUPS)
    reference.get_submodule(f"model.layers.1.{part}").weight.data[0, 3] = torch.nan
    reference.save_pretrained(tmp_path)
    assert kvgen.load(tmp_path, tokenizer="ids", kernels="cpp").model(IDS, None)[0].isnan().all()


def test_equal_scores_choose_the_first_experts(tmp_path: Path) -> None:
    reference = make_model("mixtral", {"num_local_experts": 4})
    for layer in reference.model.layers:
        layer.mlp.gate.weight.data[:] = 0
        layer.mlp.experts.down_proj.data[2:] = torch.nan
    reference.save_pretrained(tmp_path)
    assert kvgen.load(tmp_path, tokenizer="ids", kernels="cpp").model(IDS, None)[0].isfinite().all()


@pytest.mark.parametrize(
    ("layers", "missing"),
    [
        ((MLP(16), MIXTURE, MIXTURE), None),
        ((MIXTURE, SparseMLP(MLP(8), 1.5), MLP(17)), "sparse MLPs"),
        ((MoE(Router(8, 2), MLP(10, activation="tanh")),), "the activation tanh"),  # type: ignore[arg-type]
    ],
)
def test_what_the_kernels_lack(layers: tuple[MLP | MoE | SparseMLP, ...], missing: str | None) -> None:
    config = replace(CONFIG, layers=tuple(Layer(ATTENTION, ffn) for ffn in layers))
    assert lacking(config) == missing


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])  # on torch, on the kernels
def test_reading_a_mixture_takes_little_more_memory_than_its_file(dtype: str, tmp_path: Path) -> None:
    small, large = tmp_path / "small", tmp_path / "large"
    make_checkpoint("qwen3_moe", 0, small)
    sizes = {"hidden_size": 512, "num_experts": 48, "moe_intermediate_size": 384, "head_dim": 64}
    make_model("qwen3_moe", sizes).bfloat16().save_pretrained(large)
    script = f"""
import kvgen, resource
for folder in ({str(small)!r}, {str(large)!r}):
    loaded = kvgen.load(folder, tokenizer="ids", dtype="{dtype}")
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    before, peak = map(int, done.stdout.split())
    assert peak - before < 1.2 * (large / "model.safetensors").stat().st_size
