"""Logits against transformers, in fp32: the default model, and tiny random models of every configuration."""

from __future__ import annotations

import pytest
import torch

import kvgen
from tests.conftest import CORPUS
from tests.families import LLAMA3, YARN

# Two implementations of the same fp32 arithmetic may differ by the order of their sums: about 1e-7 relative for
# each of some hundred operations, on logits of size 10 to 30. On the machine that these were set on the default
# model is equal bit for bit.
REAL_TOLERANCE = 1e-3
TINY_TOLERANCE = 1e-4

STORY = (
    "Once upon a time, in a village between two rivers, there lived a clockmaker who had never been late. "
    "Every morning he wound forty-one clocks, and every evening he listened to them agree. "
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("prompt", "repeat"),
    [("Once upon a time,", 1), (STORY, 1), (CORPUS[6] + CORPUS[8], 1), (CORPUS[10], 3), (STORY, 25)],
    ids=["short", "story", "scripts", "code", "1000-tokens"],
)
def test_default_model_equals_transformers(
    smollm2_on_torch: kvgen.Loaded, smollm2_reference, prompt: str, repeat: int
) -> None:
    ids = torch.tensor([smollm2_on_torch.tokenizer.encode(prompt * repeat)[:1000]])
    if repeat == 25:
        assert ids.shape[1] == 1000
    with torch.inference_mode():
        expected = smollm2_reference(ids).logits
    actual = smollm2_on_torch.model.all_logits(ids)
    assert (actual - expected).abs().max() < REAL_TOLERANCE
    assert torch.equal(actual.argmax(-1), expected.argmax(-1))


def test_default_model_continues_as_published(smollm2: kvgen.Loaded) -> None:
    text = kvgen.generate(smollm2, "Once upon a time,", kvgen.Sampling(temperature=0), max_tokens=24)
    assert text == (
        " the city of Nova Haven was a thriving metropolis, with towering skyscrapers and bustling streets. "
        "But as the years went by,"
    )


CONFIGS = {
    "grouped": {},
    "one-kv-head": {"num_key_value_heads": 1},
    "all-kv-heads": {"num_key_value_heads": 4},
    "three-heads": {"num_attention_heads": 3, "num_key_value_heads": 3, "hidden_size": 30},
    "head-size-of-its-own": {"head_dim": 20},
    "head-size-six": {"head_dim": 6, "hidden_size": 36, "num_attention_heads": 6, "num_key_value_heads": 2},
    "tied": {"tie_word_embeddings": True},
    "attention-biases": {"attention_bias": True},
    "mlp-biases": {"mlp_bias": True},
    "one-layer": {"num_hidden_layers": 1},
    "large-eps": {"rms_norm_eps": 0.1},
    "large-base": {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
    "linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0}},
    "llama3": LLAMA3,
    "llama3-wide-heads": LLAMA3 | {"head_dim": 64},
    "yarn": YARN | {"head_dim": 32},
    "yarn-scaled": {"rope_parameters": YARN["rope_parameters"] | {"attention_factor": 1.3, "beta_fast": 16.0}},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_tiny_model_equals_transformers(tiny_llama, name: str) -> None:
    folder, reference = tiny_llama(seed=len(name), **CONFIGS[name])
    loaded = kvgen.load(folder)
    ids = torch.randint(0, 384, (2, 150), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = reference(ids).logits
    assert (loaded.model.all_logits(ids) - expected).abs().max() < TINY_TOLERANCE
    cache = None
    for length in (1, 2, 100, 101, 150):
        logits, cache = loaded.model(ids[:, :length], cache)
        assert (logits[:, 0] - expected[:, length - 1]).abs().max() < TINY_TOLERANCE


def test_sharded_checkpoint_equals_transformers(tiny_llama) -> None:
    folder, reference = tiny_llama(shard_size="30KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    ids = torch.arange(40)[None]
    with torch.inference_mode():
        expected = reference(ids).logits
    assert (kvgen.load(folder).model.all_logits(ids) - expected).abs().max() < TINY_TOLERANCE


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_stays_near_fp32(tiny_llama, dtype: str) -> None:
    folder, reference = tiny_llama()
    ids = torch.arange(40)[None]
    with torch.inference_mode():
        expected = reference.to(getattr(torch, dtype))(ids).logits.float()
    actual = kvgen.load(folder, dtype=dtype).model.all_logits(ids)
    assert actual.dtype == torch.float32
    # Both round to 8 (bf16) or 11 bits after each operation, in different places.
    scale = expected.abs().max()
    assert (actual - expected).abs().max() < scale * {"bfloat16": 2**-5, "float16": 2**-8}[dtype]
