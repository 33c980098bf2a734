"""Where a run stands."""

import dataclasses

from fjft.training import spikes
from fjft.training.step import StepMetrics

# Share of a step in the moving averages of noise.
_NEW = 0.05


@dataclasses.dataclass
class Progress:
    """Where a run stands, besides its arrays.

    Attributes:
      step: Optimizer steps done and found good.
      num_tokens: Tokens seen, padding not counted.
      eval_loss_before: `eval_loss` before the first step.
      judged_step: The last step whose evaluation has been logged; -1 is none.
      best_step: The step whose evaluation was the best; None before the first one.
      best_metrics: What that evaluation found.
      evaluations_without_gain: How many running were no better than the best.
      kept_step: The last step that was the best when it was saved; None is none.
      loss_sum: Of the steps since the last log line; so the next three.
      weight_sum: Trained tokens, or labels.
      correct_sum: Of them, predicted right.
      grad_norm: The last step's.
      noise_variance: A moving average of `noise.Noise.variance`; so the next.
      noise_square: Of `noise.Noise.square`.
      recent_losses: The last steps' losses.
    """

    step: int = 0
    num_tokens: int = 0
    eval_loss_before: float | None = None
    judged_step: int = -1
    best_step: int | None = None
    best_metrics: dict[str, float] = dataclasses.field(default_factory=dict)
    evaluations_without_gain: int = 0
    kept_step: int | None = None
    loss_sum: float = 0.0
    weight_sum: float = 0.0
    correct_sum: float = 0.0
    grad_norm: float = 0.0
    noise_variance: float = 0.0
    noise_square: float = 0.0
    recent_losses: list[float] = dataclasses.field(default_factory=list)

    def add(self, metrics: StepMetrics) -> None:
        """Counts one more step."""
        self.step += 1
        self.num_tokens += int(metrics.num_tokens)
        self.loss_sum += float(metrics.loss_sum)
        self.weight_sum += float(metrics.weight_sum)
        self.correct_sum += float(metrics.correct_sum)
        self.grad_norm = float(metrics.grad_norm)
        self.recent_losses.append(float(metrics.loss_sum) / float(metrics.weight_sum))
        del self.recent_losses[: -spikes.MOST]
        if metrics.noise is not None:
            variance, square = map(float, metrics.noise)
            # Their quotient is the same as if both had been divided by what is missing
            # of 1 at the start.
            self.noise_variance += _NEW * (variance - self.noise_variance)
            self.noise_square += _NEW * (square - self.noise_square)

    @property
    def gradient_noise_scale(self) -> float | None:
        """Rows above which batches gain little; None where it cannot be told yet."""
        if self.noise_square <= 0:
            return None
        return self.noise_variance / self.noise_square

    def take_window(self) -> tuple[float, float, float]:
        """The sums since the last call: loss, weight, correct."""
        window = self.loss_sum, self.weight_sum, self.correct_sum
        self.loss_sum = self.weight_sum = self.correct_sum = 0.0
        return window
