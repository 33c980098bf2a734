"""Choosing a head, starting one anew, pooling, and training one beside LoRA."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import tiny_encoders
import torch
from flax import nnx
from safetensors.numpy import load_file, save_file
from tiny_encoders import make_config, make_torch, torch_outputs

import fjft
from fjft import tree
from fjft.errors import UserError
from fjft.models import heads
from fjft.models.pooling import embed_sentences, pool
from fjft.peft import full, last_layers, lora

IDS = tiny.random_ids(2, 12) // 2 + 8


@pytest.fixture
def saved(tmp_path):
    """Saves the torch model of a case; returns it and its directory."""

    def save(case, **changes):
        twin = make_torch(case, make_config(case, **changes))
        return twin, tiny_encoders.save(twin, tmp_path / case.replace("/", "-"))

    return save


@pytest.mark.parametrize(
    ("architecture", "head"),
    [
        ("BertModel", "base"),
        (None, "base"),
        ("RobertaForMaskedLM", "masked_lm"),
        ("ModernBertForTokenClassification", "token_classification"),
    ],
)
def test_the_class_name_tells_the_head(architecture, head):
    assert heads.find(architecture) == head


@pytest.mark.parametrize(
    "architecture", ["BertForNextSentencePrediction", "BertLMHeadModel", "Whatever"]
)
def test_an_unknown_class_lists_the_heads(architecture):
    with pytest.raises(UserError, match=r"choose a head: head= one of .*masked_lm"):
        heads.find(architecture)


@pytest.mark.parametrize("head", heads.ENCODER_HEADS)
def test_every_head_has_a_class_and_a_task(head):
    name = heads.class_name("bert", head)
    assert heads.find(name) == head
    if heads.task_type(head) is not None:
        import peft

        assert heads.task_type(head) in set(peft.TaskType)


def test_another_head_starts_anew_and_says_so(saved, tmp_path):
    twin, directory = saved("bert/tanh-gelu/masked_lm")
    model = fjft.load_model(
        str(directory), head="sequence_classification", num_labels=7
    )
    assert set(model.provenance.new) == {
        "bert.pooler.dense.weight",
        "bert.pooler.dense.bias",
        "classifier.weight",
        "classifier.bias",
    }
    assert "cls.predictions.transform.dense.weight" in model.provenance.passed_over
    assert model.config.architectures == ["BertForSequenceClassification"]
    assert model.config.num_labels == 7
    assert twin.config.architectures == ["BertForMaskedLM"]
    params = tree.split(model)[1]
    assert np.asarray(params["head.output.weight"]).std() == pytest.approx(0.2, rel=0.3)
    assert not np.asarray(params["head.output.bias"]).any()
    assert model(jnp.asarray(IDS)).shape == (2, 7)

    import transformers

    fjft.save_model(model, tmp_path / "out")
    back, report = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(report.values()), report
    theirs = torch_outputs(back.eval(), IDS)
    assert tiny.max_error(model(jnp.asarray(IDS)), theirs) < 1e-4


def test_a_checkpoint_that_lacks_its_own_head_is_refused(saved):
    _, directory = saved("bert/tanh-gelu/masked_lm")
    config = json.loads((directory / "config.json").read_text())
    config["architectures"] = ["BertForTokenClassification"]
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"missing.*classifier\.weight.*head="):
        fjft.load_model(str(directory))


def test_another_number_of_labels_starts_the_classifier_anew(saved):
    _, directory = saved("roberta/pad-3/sequence_classification")
    model = fjft.load_model(str(directory), num_labels=3)
    assert set(model.provenance.new) == {
        "classifier.out_proj.weight",
        "classifier.out_proj.bias",
    }
    assert model(jnp.asarray(IDS)).shape == (2, 3)


def test_question_answering_has_two_outputs(saved):
    _, directory = saved("bert/tanh-gelu/masked_lm")
    with pytest.raises(UserError, match="set num_labels=2"):
        fjft.load_model(str(directory), head="question_answering", num_labels=3)


@pytest.mark.parametrize("head", ["causal_lm", "nonsense"])
def test_a_head_that_the_family_lacks(saved, head):
    _, directory = saved("bert/tanh-gelu/base")
    with pytest.raises(UserError, match=f"head='{head}' is unknown.*masked_lm"):
        fjft.load_model(str(directory), head=head)


@pytest.mark.parametrize(
    "variant",
    ["bert/tanh-gelu", "roberta/pad-3", "deberta-v2/v3", "modernbert/biases-mean"],
)
def test_names_with_and_without_the_prefix(saved, variant):
    """A bare model's checkpoint serves a head, and one with a head the bare model."""
    twin, bare = saved(f"{variant}/base")
    own = fjft.load_model(str(bare))
    assert own.provenance.new == own.provenance.passed_over == ()
    model = fjft.load_model(str(bare), head="token_classification")
    hidden = own(jnp.asarray(IDS))
    encoded = model.encode(jnp.asarray(IDS), None, None, None)
    np.testing.assert_array_equal(np.asarray(hidden), np.asarray(encoded))
    assert tiny.max_error(hidden, torch_outputs(twin, IDS)) < 1e-4

    twin, headed = saved(f"{variant}/masked_lm")
    model = fjft.load_model(str(headed), head="base")
    with torch.no_grad():
        base = getattr(twin, twin.base_model_prefix)
        theirs = base(torch.tensor(IDS).long()).last_hidden_state.numpy()
    assert tiny.max_error(model(jnp.asarray(IDS)), theirs) < 1e-4
    assert model.provenance.passed_over


def test_gamma_and_beta_and_buffers_of_old_checkpoints(saved):
    twin, directory = saved("bert/tanh-gelu/masked_lm")
    tensors = load_file(directory / "model.safetensors")
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): value
        for name, value in tensors.items()
    }
    assert old.keys() != tensors.keys()
    words = tensors["bert.embeddings.word_embeddings.weight"]
    old["cls.predictions.decoder.weight"] = words
    old["bert.embeddings.position_ids"] = np.arange(40)[None]
    old["cls.seq_relationship.weight"] = np.zeros((2, 24), np.float32)
    save_file(old, directory / "model.safetensors", {"format": "pt"})
    model = fjft.load_model(str(directory))
    assert model.provenance.passed_over == ("cls.seq_relationship.weight",)
    assert tiny.max_error(model(jnp.asarray(IDS)), torch_outputs(twin, IDS)) < 1e-4


def test_a_tensor_that_the_layers_do_not_have_is_an_error(saved):
    _, directory = saved("bert/tanh-gelu/masked_lm")
    tensors = load_file(directory / "model.safetensors")
    name = "bert.encoder.layer.0.crossattention.self.query.weight"
    save_file(tensors | {name: np.zeros((2, 2))}, directory / "model.safetensors")
    with pytest.raises(UserError, match=rf"no place.*{name}"):
        fjft.load_model(str(directory))


def test_pooling_by_segment():
    x = jnp.arange(12, dtype=jnp.float32).reshape(1, 6, 2)
    segments = jnp.array([[0, 1, 1, 2, 2, 0]])
    first = pool(x, segments, "first", 2)
    mean = pool(x, segments, "mean", 3)
    np.testing.assert_array_equal(first, [[[2, 3], [6, 7]]])
    np.testing.assert_array_equal(mean, [[[3, 4], [7, 8], [0, 0]]])
    with pytest.raises(UserError, match="pooling='max'"):
        pool(x, segments, "max", 1)


def test_sentence_embeddings_equal_torch(saved):
    twin, directory = saved("bert/tanh-gelu/base")
    model = fjft.load_model(str(directory))
    mask = np.ones_like(IDS)
    mask[1, -4:] = 0
    with torch.no_grad():
        out = twin(torch.tensor(IDS).long(), attention_mask=torch.tensor(mask))
    hidden, weight = out.last_hidden_state.numpy(), mask[..., None]
    expected = {
        "mean": (hidden * weight).sum(1) / weight.sum(1),
        "first": hidden[:, 0],
        "pooler": out.pooler_output.numpy(),
    }
    for pooling, theirs in expected.items():
        ours = embed_sentences(
            model, jnp.asarray(IDS), jnp.asarray(mask), pooling=pooling
        )
        assert tiny.max_error(ours, theirs) < 1e-5
    ours = embed_sentences(model, jnp.asarray(IDS), jnp.asarray(mask), normalize=True)
    np.testing.assert_allclose(np.linalg.norm(ours, axis=-1), 1, rtol=1e-5)

    _, directory = saved("bert/tanh-gelu/masked_lm")
    model = fjft.load_model(str(directory), head="base")
    assert model.provenance.new
    with pytest.raises(UserError, match="no trained pooler"):
        embed_sentences(model, jnp.asarray(IDS), pooling="pooler")


def test_a_new_head_must_be_trained(saved):
    _, directory = saved("bert/tanh-gelu/masked_lm")
    options = {"head": "token_classification", "num_labels": 4}
    with pytest.raises(UserError, match="modules_to_save=classifier"):
        tiny.build_model(directory, lora, lora.Config(r=2), **options)
    for method, config in [
        (full, full.Config()),
        (last_layers, last_layers.Config(num_layers=1)),
        (lora, lora.Config(r=2, modules_to_save="classifier")),
    ]:
        model = tiny.build_model(directory, method, config, **options)
        trained = method.is_trainable(config, model.provenance.sites)
        assert trained("head.output.weight")
    albert = saved("albert/one-group/masked_lm")[1]
    with pytest.raises(UserError, match="share their weights"):
        tiny.build_model(albert, last_layers, last_layers.Config(num_layers=1))


@pytest.mark.parametrize(
    ("variant", "kind"),
    [
        ("bert/tanh-gelu", "token_classification"),
        ("roberta/pad-3", "sequence_classification"),
        ("albert/two-groups-of-two", "sequence_classification"),
        ("deberta-v2/v2", "sequence_classification"),
        ("distilbert/relu", "sequence_classification"),
        ("electra/factorized", "token_classification"),
        ("modernbert/biases-mean", "token_classification"),
    ],
)
def test_lora_beside_a_trained_head_round_trips_with_peft(
    saved, tmp_path, variant, kind
):
    import peft

    twin, directory = saved(f"{variant}/{kind}")
    config = lora.Config(r=3, lora_alpha=5, modules_to_save="classifier")
    model = tiny.build_model(directory, lora, config)
    graphdef, params = tree.split(model)
    trained = lora.is_trainable(config, model.provenance.sites)
    keys = iter(jax.random.split(jax.random.key(1), len(params)))
    params = {
        path: p + 0.3 * jax.random.normal(next(keys), p.shape) if trained(path) else p
        for path, p in params.items()
    }
    provenance = model.provenance
    model = tree.merge(graphdef, params)
    model.provenance = provenance
    fjft.save_adapter(model, tmp_path / "adapter")
    described = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert described["task_type"] == heads.task_type(kind)
    assert "classifier" in described["modules_to_save"]

    ours = model(jnp.asarray(IDS))
    plain = torch_outputs(twin, IDS)
    theirs = peft.PeftModel.from_pretrained(twin, str(tmp_path / "adapter"))
    assert tiny.max_error(ours, torch_outputs(theirs.eval(), IDS)) < 1e-4
    assert tiny.max_error(ours, plain) > 1e-2
    theirs.save_pretrained(tmp_path / "theirs")
    again = fjft.load_model(str(directory), adapter=tmp_path / "theirs")
    assert tiny.max_error(ours, again(jnp.asarray(IDS))) < 1e-6


def test_an_adapter_brings_the_head_that_its_base_lacks(saved, tmp_path):
    _, directory = saved("bert/tanh-gelu/base")
    options = {"head": "sequence_classification", "num_labels": 3}
    config = lora.Config(r=2, modules_to_save="classifier")
    model = tiny.build_model(directory, lora, config, **options)
    assert model.provenance.new == ("classifier.weight", "classifier.bias")
    fjft.save_adapter(model, tmp_path / "adapter")
    again = fjft.load_model(str(directory), adapter=tmp_path / "adapter", **options)
    assert again.provenance.new == ()
    assert tiny.max_error(model(jnp.asarray(IDS)), again(jnp.asarray(IDS))) < 1e-6
    assert isinstance(nnx.state(again), nnx.State)
