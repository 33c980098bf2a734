"""The table of contents of training objectives.

Each module has a `Config`, what it needs from others by the names of their own tables
(`EXAMPLES` in `data/encoders.py`, `HEAD` in `models/heads.py`, `METRICS` in
`evaluate/metrics.py`), and

- `loss(model, batch, config, *, rng, remat) -> Sums`, for the training step;
- `evaluate(model, batch, config)`, sums from which the metrics follow, with at least
  `loss` and `weight`, or what the metrics' own `Tally` makes such sums of.

`NUM_LABELS`, where a module has it, is how many outputs its head has whatever the data.
Where a module has `REFERENCE`, both take `reference=`, the model without its adapter;
where it has `TEACHER`, `teacher=`, the model that the option `teacher` names.
"""

import types

from fjft.objectives import (
    causal_lm,
    contrastive,
    distillation,
    dpo,
    kto,
    masked_lm,
    orpo,
    question_answering,
    reward,
    seq2seq,
    sequence_classification,
    span_corruption,
    token_classification,
)

OBJECTIVES: dict[str, types.ModuleType] = {
    "causal_lm": causal_lm,
    "contrastive": contrastive,
    "distillation": distillation,
    "dpo": dpo,
    "kto": kto,
    "masked_lm": masked_lm,
    "orpo": orpo,
    "question_answering": question_answering,
    "reward": reward,
    "seq2seq": seq2seq,
    "sequence_classification": sequence_classification,
    "span_corruption": span_corruption,
    "token_classification": token_classification,
}
