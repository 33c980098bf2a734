"""No field of an encoder's config is passed over: ours follow, or loading refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import perturb
import pytest
import tiny
import tiny_encoders

from fjft.errors import UserError

# One more is of the maths of new weights only, which have their own test.
NOT_FIELDS = perturb.NOT_FIELDS | {"initializer_range"}
OTHER_VALUES = {
    "hidden_act": ["relu", "hardswish"],
    "activation": ["gelu", "hardswish"],
    "hidden_activation": ["gelu", "hardswish"],
    "classifier_activation": ["relu", "hardswish"],
    "classifier_pooling": ["cls", "mean", "max"],
    "conv_act": ["tanh", "hardswish"],
    "pooler_hidden_act": ["gelu", "hardswish"],
    "pos_att_type": [["c2p"], ["p2c"], []],
    "norm_rel_ebd": ["none", "batch_norm"],
    "position_embedding_type": ["relative_key"],
    "pad_token_id": [7],
    "layer_types": [["full_attention"] * 6],
    "local_attention": [10, 3],
    "quantization_config": [{"quant_method": "fp8"}],
    "rope_parameters": [
        {
            kind: {"rope_type": "linear", "rope_theta": 90.0, "factor": 2.0}
            for kind in ("full_attention", "sliding_attention")
        }
    ],
}
# How fields begin that only a classifying head reads.
OF_CLASSIFIERS = ("classifier", "cls", "seq_class", "summary", "pooler", "num_labels")
VARIANTS = {case.partition("/")[0]: case for case in reversed(tiny_encoders.CONFIGS)}


def _perturbations():
    for family, variant in VARIANTS.items():
        fields = tiny_encoders.make_config(f"{variant}/masked_lm").to_dict()
        fields = {**fields, "quantization_config": None}
        for name in sorted(fields.keys() - NOT_FIELDS):
            head = "masked_lm"
            if name.startswith(OF_CLASSIFIERS):
                head = "sequence_classification"
            for value in OTHER_VALUES.get(name, [None]):
                label = f"{family}-{name}" + ("" if value is None else f"-{value}")
                values = [value]
                if value is None:
                    values = perturb.other_numbers(fields[name])
                if values:
                    yield pytest.param(f"{variant}/{head}", name, values, id=label[:60])


def _perturbed_twin(case, name, values, inputs):
    """The torch model of the first value that transformers can run, and its outputs."""

    def run(value):
        config = tiny_encoders.make_config(case, **{name: value})
        twin = tiny_encoders.make_torch(case, config)
        return twin, tiny_encoders.torch_outputs(twin, **inputs)

    return perturb.first_accepted(values, run) or (None, None)


@pytest.mark.parametrize(("case", "name", "values"), list(_perturbations()))
def test_a_changed_field_changes_what_torch_changes(case, name, values):
    ids = tiny.random_ids(1, 20) // 2 + 8  # none that pads
    inputs = {"input_ids": ids, "token_type_ids": np.zeros_like(ids)}
    twin, theirs = _perturbed_twin(case, name, values, inputs)
    if twin is None:
        pytest.skip(f"transformers refuses {name}={values}")
    try:
        model = tiny.build_model(tiny.memory_files(twin))
    except UserError as refusal:
        message = str(refusal)
        assert name in message, message
        return
    # Operation by operation: what a field does not touch need not compile again.
    with jax.disable_jit():
        ours = np.asarray(model(jnp.asarray(ids)))
    assert tiny.max_error(ours, theirs) < 1e-4
