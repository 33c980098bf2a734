"""Models: shared parts, and one file per family.

Axes, used in every einsum and, where shapes change, as suffixes: B batch, T query,
S key, N heads, K kv-heads, G query heads per kv-head, H head dim, D model, F mlp,
V vocab, R rank, L layers.
"""
