"""Compiled programs, kept from run to run."""

import os
from pathlib import Path

import jax

# Programs that compile faster are not worth a file.
MIN_SECONDS = 0.2


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
