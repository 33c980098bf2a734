"""Measures how long a loss and its gradient take to compile, at 4, 16 and 64 layers.

    python tests/compare_depth.py [--rounds=3]

The models are those of the tests, tiny and without weights. Times are processor
seconds of tracing, lowering and compiling together (whatever else the machine does then
counts less), each the fastest of the rounds. The ratios are of the slowest depth to the
fastest, of all depths and of the deeper two: where four layers have no two of a kind in
a row there is no loop in the program yet, and the compiler has less to do.
"""

import argparse
import os
import time

os.environ["JAX_PLATFORMS"] = "cpu"

import depths
import jax

CASES = (
    "llama/llama3-rope-biases",
    "qwen3/alternating-biases",
    "gemma2/tight-caps",
    "gemma2/no-caps",
    "gemma3_text/every-second",
    "gemma3_text/two-bases",
    "smollm3/every-third",
    "qwen2_moe/no-biases",
    "qwen2_moe/some-dense-layers",
    "qwen3_moe/every-second-normed",
    "bert/tanh-gelu/masked_lm",
    "modernbert/biases-mean/masked_lm",
    "deberta-v2/v2/masked_lm",
    "albert/two-groups-of-two/masked_lm",
    "t5/relu-tied",
    "bart/post-norm",
)


def main() -> None:
    """Compiles every kind of model at every depth and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cases", nargs="*", default=CASES)
    flags = parser.parse_args()
    columns = "".join(f"{depth:>7} s" for depth in depths.DEPTHS)
    print(f"{'layers':36}{columns}{'ratio':>8}{'deeper':>8}{'equations':>22}")
    compile_once(CASES[0], depths.DEPTHS[0])  # The first has the backend to start.
    for case in flags.cases:
        fastest = dict.fromkeys(depths.DEPTHS, float("inf"))
        counts = {}
        for _ in range(flags.rounds):
            for depth in depths.DEPTHS:
                seconds, counts[depth] = compile_once(case, depth)
                fastest[depth] = min(fastest[depth], seconds)
        times = "".join(f"{seconds:9.2f}" for seconds in fastest.values())
        _, *deeper = fastest.values()
        ratios = "".join(
            f"{max(seconds) / min(seconds):8.2f}"
            for seconds in ([*fastest.values()], deeper)
        )
        print(f"{case:36}{times}{ratios}{[*counts.values()]!s:>22}", flush=True)


def compile_once(case: str, depth: int) -> tuple[float, int]:
    """Seconds to compile, nothing kept from before; and the program's length."""
    function, params = depths.loss_and_gradient(case, depth)
    jax.clear_caches()
    started = time.process_time()
    traced = jax.jit(function).trace(params)
    traced.lower().compile()
    seconds = time.process_time() - started
    return seconds, depths.count_equations(traced.jaxpr.jaxpr)


if __name__ == "__main__":
    main()
