"""Compiled programs: what the compiler is told, and how they are kept."""

import functools
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# Programs that compile faster are not worth a file.
MIN_SECONDS = 0.05


def keep_programs(directory: str) -> None:
    """Keeps what XLA compiles in files, so that the next start of a run is quick.

    A cache that JAX has been given already (`JAX_COMPILATION_CACHE_DIR`) stays as it
    is, and `JAX_ENABLE_COMPILATION_CACHE=false` turns every cache off.

    Args:
      directory: Where; `~` is the user's home, and "" keeps nothing.
    """
    if not directory or jax.config.values["jax_compilation_cache_dir"] is not None:
        return
    # Deferred, as it is an experimental part of JAX.
    from jax.experimental.compilation_cache import compilation_cache

    path = Path(os.path.expanduser(directory))
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_SECONDS)
    # JAX asks for the directory once, and a notebook has compiled something before.
    compilation_cache.reset_cache()


# A TPU's compiler likes to hand a sharded weight's parts around instead of gathering
# it, and adds up what the activations make of each: by its own text the sums go through
# memory once for every device. Which is faster was never timed on a chip.
_TPU_OPTIONS = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": 1_000_000}


@functools.cache
def compiler_options(mesh: Mesh) -> dict[str, Any] | None:
    """What the compiler of a mesh's devices is told beside its defaults.

    Names of options are no promise of libtpu's: one that does not know them gets none.
    Whoever sets them by `LIBTPU_INIT_ARGS` is not overruled.

    Args:
      mesh: The devices; they need not be there.
    """
    args = os.environ.get("LIBTPU_INIT_ARGS", "")
    if mesh.devices.flat[0].platform != "tpu" or any(o in args for o in _TPU_OPTIONS):
        return None
    everywhere = NamedSharding(mesh, PartitionSpec())
    nothing = jax.ShapeDtypeStruct((), jnp.float32, sharding=everywhere)
    try:
        jax.jit(jnp.negative, compiler_options=_TPU_OPTIONS).lower(nothing).compile()
    except jax.errors.JaxRuntimeError as error:
        if "No such compile option" not in str(error):
            raise
        return None
    return _TPU_OPTIONS
