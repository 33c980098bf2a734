"""Losses of labelled texts equal torch's, packed or not, gradients too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import tiny_encoders
import torch

from fjft import tree
from fjft.errors import UserError
from fjft.objectives import sequence_classification as objective

CASE = "bert/tanh-gelu/sequence_classification"
LENGTHS = [[9, 14], [6, 10, 5]]
NUM_LABELS = 5
TOKENS = ("input_ids", "positions", "segment_ids")


@pytest.fixture(scope="module")
def twins(tmp_path_factory):
    """The torch model, and ours."""
    twin = tiny_encoders.torch_model(CASE)
    directory = tiny_encoders.save(twin, tmp_path_factory.mktemp("bert"))
    return twin, tiny.build_model(directory)


def make_batch(problem_type):
    """Two rows with two and three segments, each labelled."""
    random = np.random.default_rng(0)
    batch = tiny.make_batch(LENGTHS, 24)
    # torch never trains the vector of the padding token, wherever it stands.
    batch["input_ids"] = np.where(batch["input_ids"] == 3, 4, batch["input_ids"])
    batch["token_type_ids"] = random.integers(0, 3, (2, 24)).astype(np.int32)
    shape = (2, 3, NUM_LABELS)
    if problem_type == "single_label_classification":
        labels = random.integers(0, NUM_LABELS, shape[:2]).astype(np.int32)
        labels[0, 2] = -100
    elif problem_type == "multi_label_classification":
        labels = random.integers(0, 2, shape).astype(np.int32)
        labels[0, 2] = -100
    else:
        labels = random.standard_normal(shape).astype(np.float32)
        labels[0, 2] = np.nan
    return batch | {"labels": labels}


def unpack(batch):
    """Each segment with its label, as a batch of its own."""
    parts = tiny.unpack({k: v for k, v in batch.items() if k != "labels"})
    labels = [
        y for row, n in zip(batch["labels"], (2, 3), strict=True) for y in row[:n]
    ]
    for part, label in zip(parts, labels, strict=True):
        part["labels"] = label[None, None]
    return parts


@pytest.mark.parametrize(
    "problem_type",
    ["single_label_classification", "multi_label_classification", "regression"],
)
def test_loss_and_gradients_equal_torchs(twins, problem_type):
    twin, model = twins
    batch = make_batch(problem_type)
    graphdef, params = tree.split(model)

    def mean_loss(params, batch):
        config = objective.Config()
        sums = objective.loss(tree.merge(graphdef, params), batch, config)
        return sums.loss / sums.weight

    batch = jax.tree.map(jnp.asarray, batch)
    loss, grads = jax.jit(jax.value_and_grad(mean_loss))(params, batch)

    twin.config.problem_type = problem_type
    twin.zero_grad()
    parts = unpack(jax.tree.map(np.asarray, batch))
    total = torch.zeros(())
    for part in parts:
        inputs = {
            name: torch.tensor(part[name]).long()
            for name in ("input_ids", "token_type_ids")
        }
        labels = torch.tensor(part["labels"][0])
        if problem_type == "single_label_classification":
            labels = labels.long()
        total = total + twin(**inputs, labels=labels.to(_dtype(labels))).loss
    theirs = total / len(parts)
    theirs.backward()
    assert float(loss) == pytest.approx(theirs.item(), rel=1e-5)
    arrays = {n: p.grad.numpy() for n, p in twin.named_parameters()}
    for site in model.provenance.sites:
        expected = tiny.gather(site, arrays)
        scale = max(np.abs(expected).max(), 1e-3)
        np.testing.assert_allclose(grads[site.path], expected, atol=1e-4 * scale)


def _dtype(labels):
    return torch.long if labels.dtype == torch.long else torch.float32


def test_packed_equals_unpacked(twins):
    graphdef, params = tree.split(twins[1])

    @jax.jit
    def evaluate(params, batch):
        model = tree.merge(graphdef, params)
        return objective.evaluate(model, batch, objective.Config())

    batch = make_batch("single_label_classification")
    together = evaluate(params, batch)
    apart = [evaluate(params, part) for part in unpack(batch)]
    assert float(together.loss) == pytest.approx(sum(float(a.loss) for a in apart))
    assert together.weight == sum(one.weight for one in apart) == 5
    outputs = np.concatenate([one.outputs[0] for one in apart])
    is_labelled = np.asarray(together.labels) >= 0
    np.testing.assert_allclose(together.outputs[is_labelled], outputs, atol=1e-5)


class Given:
    """A model that gives these logits."""

    def __init__(self, logits):
        self.logits = logits

    def encode(self, *args, **kwargs):
        """Nothing."""

    def predict(self, *args, **kwargs):
        """The logits."""
        return self.logits


def _loss(logits, labels, rng, **options):
    batch = {"labels": jnp.asarray(labels)[None]}
    batch |= {n: jnp.zeros((1, 1), jnp.int32) for n in TOKENS}
    config = objective.Config(**options)
    return objective.loss(Given(jnp.asarray(logits)[None]), batch, config, rng=rng)


WEIGHTS = (0.5, 2.0, 1.0, 0.25)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_class_weights_and_smoothing_are_torchs(smoothing):
    random = np.random.default_rng(0)
    logits = random.standard_normal((9, 4)).astype(np.float32)
    labels = random.integers(0, 4, 9).astype(np.int32)
    labels[3] = -100
    expected = torch.nn.CrossEntropyLoss(
        torch.tensor(WEIGHTS), label_smoothing=smoothing
    )(torch.tensor(logits), torch.tensor(labels).long())
    options = {"class_weights": WEIGHTS, "label_smoothing": smoothing}
    sums = _loss(logits, labels, jax.random.key(0), **options)
    assert float(sums.loss / sums.weight) == pytest.approx(expected.item(), rel=1e-6)
    judged = _loss(logits, labels, None, **options)
    plain = _loss(logits, labels, None, class_weights=WEIGHTS)
    assert judged == plain


def test_weights_of_several_labels_are_torchs():
    random = np.random.default_rng(0)
    logits = random.standard_normal((9, 4)).astype(np.float32)
    labels = random.integers(0, 2, (9, 4)).astype(np.int32)
    expected = torch.nn.BCEWithLogitsLoss(pos_weight=torch.tensor(WEIGHTS))(
        torch.tensor(logits), torch.tensor(labels).float()
    )
    sums = _loss(logits, labels, None, class_weights=WEIGHTS)
    assert float(sums.loss / sums.weight) == pytest.approx(expected.item(), rel=1e-6)


def test_focal_loss():
    """The paper's equation: what is sure already counts next to nothing."""
    logits = np.array([[2.0, -1.0], [0.0, 0.5]], np.float32)
    labels = np.array([0, 0], np.int32)
    p = 1 / (1 + np.exp([-3.0, 0.5]))
    sums = _loss(logits, labels, jax.random.key(0), focal_gamma=2.0)
    assert float(sums.loss) == pytest.approx((-((1 - p) ** 2) * np.log(p)).sum(), 1e-6)
    # What is certain to the last bit has a finite gradient.
    gradient = jax.grad(
        lambda x: _loss(x, labels, jax.random.key(0), focal_gamma=0.5).loss
    )(jnp.array([[200.0, 0.0], [0.0, 0.5]]))
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"label_smoothing": 1.0}, "label_smoothing"),
        ({"focal_gamma": 1.0, "label_smoothing": 0.1}, "without label_smoothing"),
        ({"class_weights": (1.0, -1.0)}, "negative"),
    ],
)
def test_options_are_checked(options, match):
    with pytest.raises(UserError, match=match):
        objective.Config(**options)


def test_there_is_a_weight_for_each_label():
    with pytest.raises(UserError, match="2 numbers, the model tells 4 labels"):
        _loss(np.ones((1, 4)), np.zeros(1, np.int32), None, class_weights=(1.0, 2.0))
