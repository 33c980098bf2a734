"""Eight CPU devices and no silent promotion, for every test."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUM_CPU_DEVICES"] = "8"
os.environ["HF_HUB_OFFLINE"] = "1"

import jaxtyping

jaxtyping.install_import_hook(
    ["fjft.models", "fjft.peft", "fjft.objectives"], "beartype.beartype"
)

import jax

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
