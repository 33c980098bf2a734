"""The oracle: the same training by torch, transformers and peft.

Nothing of fjft computes here: transformers makes the model and its loss, peft the
adapter, torch the optimizer and the clipping, transformers the schedule.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import transformers

Batch = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Trained:
    """Loss and gradient norm of each step, and the parameters after the last."""

    losses: list[float]
    grad_norms: list[float]
    parameters: dict[str, np.ndarray]


def packed_mask(segment_ids: np.ndarray, window: int | None = None) -> torch.Tensor:
    """Additive mask [B, 1, T, T]: causal, within segments; padding sees itself."""
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    T = segment_ids.shape[1]
    near = np.tri(T, dtype=bool) & ~np.tri(T, k=-(window or T), dtype=bool)
    seen = same & near & (segment_ids != 0)[:, None, :]
    seen |= np.eye(T, dtype=bool)
    mask = np.where(seen, 0.0, np.finfo(np.float32).min).astype(np.float32)
    return torch.tensor(mask)[:, None]


def packed_masks(config: Any, segment_ids: np.ndarray) -> Any:
    """The mask, or that of each type of layer where some have a window."""
    mask = packed_mask(segment_ids)
    if "sliding_attention" not in (getattr(config, "layer_types", None) or ()):
        return mask
    windowed = packed_mask(segment_ids, config.sliding_window)
    return {"full_attention": mask, "sliding_attention": windowed}


def count_items(batch: Batch) -> int:
    """The number of labels that count where a token predicts the next."""
    return int((batch["labels"][..., 1:] != -100).sum())


def sum_loss(model: Any, batch: Batch, num_items: int) -> torch.Tensor:
    """The loss of transformers itself, its sum divided by `num_items`."""
    return model(
        input_ids=torch.tensor(batch["input_ids"]).long(),
        position_ids=torch.tensor(batch["positions"]).long(),
        attention_mask=packed_masks(model.config, batch["segment_ids"]),
        labels=torch.tensor(batch["labels"]).long(),
        num_items_in_batch=num_items,
        use_cache=False,
    ).loss


def train(
    model: Any,
    batches: Sequence[Batch],
    *,
    learning_rate: float,
    warmup_steps: int,
    total_steps: int,
    weight_decay: float,
    max_grad_norm: float,
    accumulation_steps: int = 1,
    adam_epsilon: float = 1e-8,
    sum_loss: Callable[[Any, Batch, int], torch.Tensor] = sum_loss,
) -> Trained:
    """Trains what requires a gradient, on each batch once."""
    torch.set_num_threads(1)  # Tiny products: more threads only wait for each other.
    model.train()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    groups = [
        {"params": [p for p in trained.values() if p.ndim > 1]},
        {"params": [p for p in trained.values() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        groups, lr=learning_rate, weight_decay=weight_decay, eps=adam_epsilon
    )
    scheduler = transformers.get_scheduler(
        "linear",
        optimizer,
        num_warmup_steps=warmup_steps,
        num_training_steps=total_steps,
    )
    losses, norms = [], []
    for batch in batches:
        num_items = count_items(batch)
        optimizer.zero_grad()
        total = 0.0
        for part in range(accumulation_steps):
            rows = {k: v[part::accumulation_steps] for k, v in batch.items()}
            loss = sum_loss(model, rows, num_items)
            loss.backward()
            total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(trained.values(), max_grad_norm)
        optimizer.step()
        scheduler.step()
        losses.append(total)
        norms.append(float(norm))
    values = {n: p.detach().numpy() for n, p in trained.items()}
    return Trained(losses, norms, values)
