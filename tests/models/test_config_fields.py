"""No field of a config is passed over: logits follow torch's, or loading refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import perturb
import pytest
import tiny

from fjft.errors import UserError
from fjft.models.families import FAMILIES
from fjft.models.fields import HARMLESS, Fields

# One more is of the maths of new weights only, which have their own test.
NOT_FIELDS = perturb.NOT_FIELDS | {"initializer_range"}
OTHER_VALUES = {
    "hidden_act": ["relu", "gelu", "hardswish", "gelu_pytorch_tanh"],
    "head_dim": [14],
    "layer_types": [
        ["full_attention", "sliding_attention", "full_attention"],
        ["chunked_attention"] * 3,
    ],
    "num_key_value_heads": [3, 1],
    "pad_token_id": [7],
    "quantization_config": [{"quant_method": "fp8"}],
    "sliding_window": [3, None],
    "tie_word_embeddings": [True, False],
    "rope_parameters": [
        tiny.LLAMA3_ROPE,
        tiny.LINEAR_ROPE,
        {"rope_type": "default", "rope_theta": 77.0},
        tiny.LINEAR_ROPE | {"partial_rotary_factor": 0.5},
        {"rope_type": "yarn", "rope_theta": 5e3, "factor": 2.0}
        | {"original_max_position_embeddings": 32},
        {"rope_type": "dynamic", "rope_theta": 5e3, "factor": 2.0},
        *(
            tiny.LLAMA3_ROPE | {key: value * 1.5}
            for key, value in tiny.LLAMA3_ROPE.items()
            if isinstance(value, float)
        ),
        tiny.LLAMA3_ROPE | {"original_max_position_embeddings": 20},
    ],
}
SMALL = {"num_hidden_layers": 3, "layer_types": None}


def _small(case: str, **changes):
    family = case.partition("/")[0]
    small = SMALL if family.startswith("qwen") else {}
    return tiny.make_config(case, **(small | changes))


# Read with getattr by models whose config class does not declare them, or by loaders.
UNDECLARED = ("head_dim", "quantization_config")


def _perturbations():
    for family, variants in tiny.CONFIGS.items():
        case = f"{family}/{next(iter(variants))}"
        fields = dict.fromkeys(UNDECLARED) | _small(case).to_dict()
        # Two that are harmless in most families, and that others read.
        always_harmless = HARMLESS - {"max_position_embeddings", "pad_token_id"}
        for name in fields.keys() - always_harmless - NOT_FIELDS:
            if name not in OTHER_VALUES:
                values = perturb.other_numbers(fields[name])
                if values:  # the first that transformers takes
                    yield pytest.param(case, name, values, id=f"{family}-{name}")
                continue
            others = OTHER_VALUES[name]
            if name == "rope_parameters" and family != "llama":
                others = others[:3]
            for i, other in enumerate(others):
                yield pytest.param(case, name, [other], id=f"{family}-{name}-{i}")


PERTURBATIONS = sorted(_perturbations(), key=lambda parameters: str(parameters.id))


def _perturbed_twin(case, name, values, ids):
    """The torch model of the first value that transformers can run, and its logits."""

    def run(value):
        twin = tiny.make_torch(_small(case, **{name: value}))
        return twin, value, tiny.torch_logits(twin, ids)

    return perturb.first_accepted(values, run) or (None, None, None)


@pytest.mark.parametrize(("case", "name", "values"), PERTURBATIONS)
def test_a_changed_field_changes_our_logits_as_it_does_torchs(case, name, values):
    ids = tiny.random_ids(1, 20)
    twin, value, theirs = _perturbed_twin(case, name, values, ids)
    if twin is None:
        pytest.skip(f"transformers refuses {name}={values}")
    try:
        model = tiny.build_model(tiny.memory_files(twin))
    except UserError as refusal:
        message = str(refusal)
        keys = value if isinstance(value, dict) else ()
        assert name in message or any(key in message for key in keys), message
        return
    # Operation by operation: what a field does not touch need not compile again.
    with jax.disable_jit():
        ours = np.asarray(model(jnp.asarray(ids)))
    assert tiny.max_error(ours, theirs) < 1e-4


def _fields_that_are_read(twin):
    """What this family reads, though it is harmless in others."""
    read = set()

    class Recorder(Fields):
        def take(self, name):
            read.add(name)
            return super().take(name)

    family = FAMILIES[twin.config.model_type]
    family.architecture(Recorder(twin.config, tiny.memory_files(twin).tensors))
    return read


@pytest.mark.parametrize("family", tiny.CONFIGS)
def test_fields_called_harmless_change_nothing_in_torch(family):
    case, ids = f"{family}/{next(iter(tiny.CONFIGS[family]))}", tiny.random_ids(1, 20)
    twin = tiny.make_torch(_small(case))
    expected, fields = tiny.torch_logits(twin, ids), twin.config.to_dict()
    read = _fields_that_are_read(twin)
    for name in sorted((fields.keys() & HARMLESS) - NOT_FIELDS - read):
        other, _, _ = _perturbed_twin(
            case, name, perturb.other_numbers(fields[name]), ids
        )
        if other is not None:
            other.load_state_dict(twin.state_dict())
            np.testing.assert_array_equal(
                tiny.torch_logits(other, ids), expected, err_msg=name
            )
