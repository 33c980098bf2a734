"""An experiment: a config whose every section has been checked."""

import dataclasses
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fjft import data, sharding
from fjft.checkpoint import orbax
from fjft.checkpoint.source import ModelFiles, ModelInfo, open_info, open_model
from fjft.checkpoint.untrained import open_untrained, with_tokenizer
from fjft.data import vocabulary
from fjft.data.dataset import load_examples
from fjft.data.encoders import ENCODERS
from fjft.data.examples import Labels
from fjft.data.pack import Rows
from fjft.data.report import Report
from fjft.data.sources import list_specs
from fjft.errors import UserError
from fjft.evaluate import overlap
from fjft.evaluate.metrics import METRICS
from fjft.models.attention import KERNELS, Way
from fjft.models.codes import QUANTIZATIONS
from fjft.models.narrow import KINDS
from fjft.models.splash import LANES, MOST_BLOCK
from fjft.models.stack import REMAT_POLICIES
from fjft.optimize import optimizer
from fjft.options import DTYPES, check_least, check_name
from fjft.peft.methods import METHODS


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which model, and how it is held.

    Attributes:
      source: A Hugging Face directory, a GGUF or safetensors file,
        `package:NAME/path`, or a hub id.
      revision: Branch, tag or commit of a hub id.
      dtype: Type of the frozen weights and of all activations; `auto` is the
        checkpoint's. What is trained is always float32.
      quantization: A key of `FORMATS`: linear maps that are not trained, but the
        head, lie in codes of so many bits; "" leaves them in `dtype`.
      matmuls: A key of `KINDS`: in a run, its own evaluations included, linear maps,
        but the head and routed experts, multiply in 8 bits, on hardware that does so
        faster; "" multiplies in `dtype`.
      from_scratch: Start from random weights, drawn by `train.seed`; of `source` only
        the config and the tokenizer count.
      sizes: Numbers of the config that such a model has otherwise, such as
        `num_hidden_layers`.
      tokenizer: A key of `vocabulary.KINDS`: such a model has a tokenizer trained on
        `data.train`, of at most `vocab_size` tokens; "" is that of `source`.
      attention: `auto` attends by a kernel where the device has one, as TPUs and GPUs
        since Ampere have; `xla` leaves it to the compiler.
      attention_block: Queries and keys that a TPU's kernel takes at once, a multiple
        of 128 up to 2048; 0 chooses by shape.
      remat: What the backward pass recomputes, a key of `REMAT_POLICIES`.
    """

    source: str
    revision: str = "main"
    dtype: str = "bfloat16"
    quantization: str = ""
    matmuls: str = ""
    from_scratch: bool = False
    sizes: Mapping[str, int | float] = dataclasses.field(default_factory=dict)
    tokenizer: str = ""
    attention: str = "auto"
    attention_block: int = 0
    remat: str = "full"

    def __post_init__(self):
        check_name("model.dtype", self.dtype, DTYPES)
        check_name("model.quantization", self.quantization, QUANTIZATIONS)
        check_name("model.matmuls", self.matmuls, ("", *KINDS))
        check_name("model.attention", self.attention, KERNELS)
        if self.attention_block not in range(0, MOST_BLOCK + 1, LANES):
            raise UserError(
                f"model.attention_block={self.attention_block} is not a multiple of "
                f"{LANES} up to {MOST_BLOCK}; 0 lets it be chosen by shape"
            )
        check_name("model.remat", self.remat, REMAT_POLICIES)
        if self.matmuls and self.quantization:
            raise UserError(
                f"model.quantization={self.quantization!r} holds weights in codes that "
                f"model.matmuls={self.matmuls!r} cannot multiply; set one of them"
            )
        check_name("model.tokenizer", self.tokenizer, ("", *vocabulary.KINDS))
        for name in ("sizes", "tokenizer"):
            if getattr(self, name) and not self.from_scratch:
                raise UserError(
                    f"model.{name} is of a model that starts from random weights; set "
                    "model.from_scratch=True"
                )

    @property
    def way(self) -> Way:
        """How attention is worked out."""
        return Way(self.attention, self.attention_block)

    def open(self) -> ModelFiles:
        """Opens the model where it lies; see `checkpoint.source`."""
        if self.from_scratch:
            return open_untrained(self.source, self.revision, self.sizes)
        return open_model(self.source, self.revision)

    def open_info(self) -> ModelInfo:
        """Opens it for all but its weights, which are not fetched."""
        if self.from_scratch:
            return self.open()
        return open_info(self.source, self.revision)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long, in which pieces, and what is told of it.

    Attributes:
      batch_size: Sequences (packed rows) per optimizer step over all devices.
      accumulation_steps: Microbatches that a batch is cut into.
      max_steps: Optimizer steps; 0 counts `num_epochs`.
      num_epochs: Passes over the data, when `max_steps` is 0.
      seed: Of the data order, new weights and dropout.
      ema_decay: Judges and writes an exponential moving average of what is trained,
        of which this share stays in each step, such as 0.999; 0 takes none.
      log_steps: Steps between log lines; the loss logged is of all tokens since.
      report_to: Writers besides `log.jsonl`: `tensorboard`, `wandb`, with commas.
      compilation_cache: Where compiled programs are kept for the next start; "" keeps
        none. A cache that JAX itself was given goes before.
    """

    batch_size: int
    accumulation_steps: int = 1
    max_steps: int = 0
    num_epochs: float = 1.0
    seed: int = 0
    ema_decay: float = 0.0
    log_steps: int = 1
    report_to: str = ""
    compilation_cache: str = "~/.cache/fjft/programs"

    def __post_init__(self):
        check_least("train.accumulation_steps", self.accumulation_steps, 1)
        check_least("train.max_steps", self.max_steps, 0)
        check_least("train.log_steps", self.log_steps, 1)
        if not 0 <= self.ema_decay < 1:
            raise UserError(
                f"train.ema_decay={self.ema_decay} is not in [0, 1); 0.999 averages "
                "over about a thousand steps, 0 does not"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """When and on what a run is judged.

    Attributes:
      eval_steps: Optimizer steps between evaluations; 0 is before and after only.
      batch_size: Sequences at a time over all devices; 0 is the training microbatch.
      metric_for_best_model: The metric that says which step is the best, by its name
        in the log with or without `eval_`; where there are several sets, the name of a
        metric alone, such as `loss`, means that of the first set by its letters.
      load_best_model_at_end: Saves every step that is the best so far, and writes the
        best one's weights in the end, not the last one's.
      early_stopping_patience: Stops when so many evaluations running are no better
        than the best before them; 0 does not.
      early_stopping_threshold: By how much one must be better to count.
      predict_with_generate: Let the model answer each held-out question as well, token
        by token, the likeliest each time, and compare with the right answer.
      text_metrics: How, besides token by token: keys of `overlap.METRICS`, with commas.
      prompt: A question whose answer is shown before and after training; "" is none.
      max_new_tokens: Longest answer.
    """

    eval_steps: int = 0
    batch_size: int = 0
    metric_for_best_model: str = "loss"
    load_best_model_at_end: bool = False
    early_stopping_patience: int = 0
    early_stopping_threshold: float = 0.0
    predict_with_generate: bool = False
    text_metrics: str = ""
    prompt: str = ""
    max_new_tokens: int = 64

    def __post_init__(self):
        check_least("evaluate.eval_steps", self.eval_steps, 0)
        check_least("evaluate.batch_size", self.batch_size, 0)
        check_least("evaluate.max_new_tokens", self.max_new_tokens, 1)
        for name in list_specs(self.text_metrics):
            check_name("evaluate.text_metrics", name, overlap.METRICS)
        if self.text_metrics and not self.predict_with_generate:
            raise UserError(
                f"evaluate.text_metrics={self.text_metrics!r} is of what the model "
                "writes; set evaluate.predict_with_generate=True"
            )
        patience = self.early_stopping_patience
        check_least("evaluate.early_stopping_patience", patience, 0)
        if (patience or self.load_best_model_at_end) and not self.eval_steps:
            raise UserError(
                "evaluate.eval_steps is 0, so there is one evaluation only to choose "
                "the best of; set it for evaluate.early_stopping_patience and "
                "evaluate.load_best_model_at_end"
            )


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A config whose every section has been checked.

    Attributes:
      method: The module in `peft/` that `peft.method` names, and `peft` its options.
      objective_module: What `objective.name` names, and `objective` its options.
    """

    model: ModelConfig
    method: types.ModuleType
    peft: Any
    data: data.Config
    objective_module: types.ModuleType
    objective: Any
    optimizer: optimizer.Config
    mesh: sharding.Config
    train: TrainConfig
    evaluate: EvaluateConfig
    checkpoint: orbax.Config

    def __post_init__(self):
        if self.model.from_scratch and self.method is not METHODS["full"]:
            raise UserError(
                "model.from_scratch=True leaves no weight to keep; use peft.method=full"
            )
        writes = hasattr(self.encoder_module, "ask")
        if self.evaluate.predict_with_generate and not writes:
            raise UserError(
                "evaluate.predict_with_generate=True is for objectives that learn to "
                "write, such as causal_lm and seq2seq; set it to False"
            )

    @property
    def encoder_module(self) -> types.ModuleType:
        """The module in `data/` that makes the examples that the objective needs."""
        return ENCODERS[self.objective_module.EXAMPLES]

    @property
    def metrics_module(self) -> types.ModuleType:
        """The module in `evaluate/` that makes numbers of the objective's sums."""
        return METRICS[self.objective_module.METRICS]

    @property
    def eval_batch_size(self) -> int:
        """Sequences that are judged at a time."""
        microbatch = self.train.batch_size // self.train.accumulation_steps
        return self.evaluate.batch_size or microbatch

    @property
    def tokenizer_directory(self) -> Path:
        """Where the run keeps the tokenizer that it has trained."""
        return Path(self.checkpoint.directory) / "tokenizer"

    def open_model(self) -> ModelFiles:
        """Opens the model where it lies, with the run's own tokenizer if it has one.

        Raises:
          UserError: There is no such model; or no such tokenizer, as training has not
            begun.
        """
        files = self.model.open()
        if not self.model.tokenizer:
            return files
        if not self.tokenizer_directory.is_dir():
            raise UserError(
                f"{self.tokenizer_directory} is where training puts the tokenizer that "
                f"model.tokenizer={self.model.tokenizer} asks for; run fjft train first"
            )
        return with_tokenizer(files, self.tokenizer_directory)

    def find_labels(self) -> Labels | None:
        """What whole examples are labelled with; None where they are not."""
        return self.encoder_module.find_labels(self.data)

    def count_labels(self, labels: Labels | None = None) -> int | None:
        """How many outputs the head has; None where that is not the data's to say."""
        if labels is not None:
            return len(labels.names)
        return getattr(self.objective_module, "NUM_LABELS", None)

    def load_examples(self, tokenizer: Any) -> tuple[Rows, dict[str, Rows], Report]:
        """Reads the data; see `data.dataset.load_examples`."""
        encoder = self.encoder_module.Encoder
        return load_examples(self.data, tokenizer, self.train.seed, encoder)
