"""Shared ground: the default model, and tiny random checkpoints written by transformers.

The process that hands tests to others reads this too: what takes seconds to import is imported where it is used.
"""

from __future__ import annotations

import gc
import json
import os
import runpy
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings

import kvgen

if TYPE_CHECKING:
    import tokenizers

# The scripts, signs and oddities that tokenizers and streams must get right.
CORPUS = [
    "Hello, world!",
    "The quick brown fox jumps over the lazy dog. It's 2024; we've paid $12,345.67 (10%).",
    "  two leading and two trailing spaces  ",
    "tabs\tand\n\nnewlines\r\nand \u00a0 non-breaking \u3000 wide spaces",
    "Füße naïve café ÀÉÎÕÜ ß ø å İıŞş",
    "Здравствуй, мир! Ελληνικά Հայերեն ქართული",
    "日本語のテキスト、漢字かな交じり。中文文本，混排。한국어 텍스트",
    "العربية والעברית ภาษาไทย हिन्दी தமிழ் বাংলা",
    "emoji 😀 👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇩🇪 ☺︎",
    "combining e\u0301 a\u0308 Z\u0351\u0352a\u0325l\u0346go zero\u200bwidth\u200djoin",
    "def f(x: int) -> str:\n    return f'{x:>10}'  # comment\n\tif x != 0 && y <= 1e-9: pass",
    '<html><body class="a">&amp;</body></html> {"json": [1, 2.5, null]}',
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "0 00 000 0000 12345678901234567890 3.14159 1e10 0xDEADBEEF",
    "<|im_start|>user\nhi<|im_end|> <|endoftext|> <s> </s> <unk> [INST] <|im_",
    "\x00\x01\x1b[31m\x7f\x80\x9b control",
    "don't DON'T we'll I'M they've 'quoted' ''",
    " ",
    "\n",
    "a",
]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", choices=("cpu", "cuda"), help="where the tests of models compute")


def pytest_configure(config: pytest.Config) -> None:
    """Hide GPUs, unless the tests are to run on one.

    Fast tests try fewer examples of Hypothesis; `tests.sizes.examples` where a test says how many.
    """
    os.environ["KVGEN_TEST_DEVICE"] = config.option.device
    if config.option.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    settings.register_profile("fast", max_examples=12, deadline=None)
    settings.register_profile("slow", max_examples=40, deadline=None)
    settings.load_profile("fast" if config.option.markexpr == "not slow" else "slow")


def pytest_collection_finish() -> None:
    """Leave modules and thousands of tests, which stay to the end, out of each collection of garbage from here on."""
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    """With `--device cuda`, skip what asks for the kernels of a CPU."""
    try:
        return (yield)
    except kvgen.UsageError as error:
        if item.config.option.device == "cuda" and "the kernels compute in float32 on a CPU" in str(error):
            pytest.skip("the kernels of a CPU")
        raise


@pytest.fixture(scope="session", autouse=True)
def logits_on_the_cpu() -> Iterator[None]:
    """With `--device cuda`, models compute on the GPU; their logits are compared with others on the CPU."""
    from tests.device import DEVICE

    with pytest.MonkeyPatch.context() as patch:
        if DEVICE == "cuda":
            from kvgen.model.causal_lm import CausalLM

            compute = CausalLM._logits
            patch.setattr(CausalLM, "_logits", lambda self, hidden: compute(self, hidden).cpu())
        yield


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The default model, fetched as a user would fetch it."""
    from kvgen.hub.names import resolve
    from tests.program import run

    run("generate", "-p", "x", "-n", "1", "-q").check_returncode()
    return resolve("smollm2")


@pytest.fixture(scope="session")
def smollm2(smollm2_path: Path) -> kvgen.Loaded:
    return kvgen.load(smollm2_path)


@pytest.fixture(scope="session")
def smollm2_on_torch(smollm2_path: Path) -> kvgen.Loaded:
    """The default model in torch's own operations and fp32 throughout."""
    return kvgen.load(smollm2_path, kernels="off")


@pytest.fixture(scope="session")
def smollm2_reference(smollm2_path: Path) -> Any:
    """The same file in transformers, by transformers' own GGUF reader."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(**_in_transformers(smollm2_path), dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def smollm2_reference_tokenizer(smollm2_path: Path) -> Any:
    """The file's tokenizer in transformers, whose GGUF reader forgets that the model's tokenizer.json splits digits."""
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(**_in_transformers(smollm2_path))
    splits = [pre_tokenizers.Digits(individual_digits=True), tokenizer.backend_tokenizer.pre_tokenizer]
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splits)
    return tokenizer


def _in_transformers(path: Path) -> dict[str, str]:
    return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}


@pytest.fixture(scope="session")
def x_rotary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small random x-transformers model, to copy."""
    folder = tmp_path_factory.mktemp("x-transformers") / "rotary"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["random_model.py", "rotary", str(folder)])
        runpy.run_path("docs/examples/random_model.py")
    return folder


@pytest.fixture(scope="session")
def tiny_tokenizer() -> tokenizers.Tokenizer:
    """A byte-level BPE of 384 entries, with BOS and EOS."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[AddedToken("<s>", special=True), AddedToken("</s>", special=True)],
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


@pytest.fixture
def tiny_llama(tmp_path: Path, tiny_tokenizer: tokenizers.Tokenizer) -> Callable[..., tuple[Path, Any]]:
    """Makes a folder with a random model of transformers; returns it and the model."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    def make(seed: int = 0, name: str = "tiny", shard_size: str = "1GB", **config: Any) -> tuple[Path, Any]:
        defaults: dict[str, Any] = {
            "vocab_size": 384,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "initializer_range": 0.2,
            "bos_token_id": 0,
            "eos_token_id": 1,
        }
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**defaults | config)).eval()
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("bias"):  # transformers starts them at zero, which would test nothing
                torch.nn.init.normal_(parameter, std=0.2)
        folder = tmp_path / name
        model.save_pretrained(folder, max_shard_size=shard_size)
        tiny_tokenizer.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "bos_token": "<s>"}))
        return folder, model

    return make
