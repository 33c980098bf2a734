"""What the loop does when something is odd: in the numbers, the data or the config."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from tiny_experiment import TEXT, make_config, save_tiny_model

from fjft.checkpoint.orbax import saved_steps
from fjft.data.loader import Loader
from fjft.errors import UserError
from fjft.telemetry import read_log
from fjft.training import loop as loop_module
from fjft.training.loop import train


def losses_of(directory) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in read_log(directory) if "loss" in row}


@pytest.fixture(scope="module")
def good(llama, tmp_path_factory):
    """Ten steps, each logged."""
    directory = tmp_path_factory.mktemp("good")
    result = train(make_config(llama, directory, train__max_steps=10))
    return directory, result


def test_log_and_result(good):
    directory, result = good
    rows = read_log(directory)
    assert [row["step"] for row in rows] == [*range(11), 10]
    trained = rows[1:-1]
    assert [row["num_tokens"] for row in trained] == sorted(
        row["num_tokens"] for row in trained
    )
    # The rate that each step was taken with: three steps up from zero, seven down.
    peak = 5e-3
    expected = [0, peak / 3, peak * 2 / 3, *(peak * (1 - i / 7) for i in range(7))]
    rates = [row["learning_rate"] for row in trained]
    np.testing.assert_allclose(rates, expected, rtol=1e-6)
    assert result.metrics["eval_loss_before"] == rows[0]["eval_loss"]
    assert result.metrics["eval_loss"] == rows[-1]["eval_loss"]
    assert result.metrics["loss"] == trained[-1]["loss"]
    assert result.directory == directory
    # Time for compiling is not time for training, nor counted off twice.
    speeds = [row["tokens_per_second"] for row in trained]
    assert all(1 < speed < 1e7 for speed in speeds), speeds
    for name in ("config.json", "loss.png", "adapter/adapter_config.json"):
        assert (directory / name).stat().st_size > 0


def test_windows_are_means_over_tokens(llama, good, tmp_path):
    """`log_steps` that does not divide: three whole windows and a rest."""
    config = make_config(llama, tmp_path, train__max_steps=10, train__log_steps=3)
    train(config)
    found = losses_of(tmp_path)
    assert list(found) == [3, 6, 9, 10]
    experiment = loop_module.build_experiment(config)
    files = experiment.model.open()
    rows, _, _ = experiment.load_examples(files.load_tokenizer())
    loader = Loader(rows, 8, seed=0, num_epochs=None)
    weights = {
        n + 1: int((loader.assemble(n)["labels"] != -100).sum()) for n in range(10)
    }
    single = losses_of(good[0])
    for last, steps in {3: (1, 2, 3), 6: (4, 5, 6), 9: (7, 8, 9), 10: (10,)}.items():
        total = sum(single[n] * weights[n] for n in steps)
        mean = total / sum(weights[n] for n in steps)
        assert found[last] == pytest.approx(mean, rel=1e-12)


def poison(monkeypatch, at_step: int) -> None:
    """Makes the parameters that step `at_step` takes infinite."""
    original = loop_module.build_run

    def build_run(*args):
        run, state = original(*args)
        taken = []

        def train_step(state, frozen, batch):
            taken.append(None)
            if len(taken) == at_step:
                params = {k: v * jnp.inf for k, v in state.params.items()}
                state = dataclasses.replace(state, params=params)
            return run.train_step(state, frozen, batch)

        return dataclasses.replace(run, train_step=train_step), state

    monkeypatch.setattr(loop_module, "build_run", build_run)


@pytest.mark.parametrize("log_steps", [1, 5])
def test_nan_stops_names_the_rows_and_saves_nothing_bad(
    llama, good, tmp_path, monkeypatch, log_steps
):
    values = {
        "train__max_steps": 10,
        "train__log_steps": log_steps,
        "checkpoint__save_steps": 2,
    }
    with monkeypatch.context() as patched:
        poison(patched, at_step=6)
        with pytest.raises(UserError) as stopped:
            train(make_config(llama, tmp_path, **values))
    message = str(stopped.value)
    experiment = loop_module.build_experiment(make_config(llama, tmp_path))
    files = experiment.model.open()
    rows, _, _ = experiment.load_examples(files.load_tokenizer())
    chosen = Loader(rows, 8, seed=0, num_epochs=None).choose_rows(5).tolist()
    assert f"step 6, batch 5 (rows {chosen}): loss nan" in message
    assert "checkpoint 4 is good" in message
    assert "optimizer.learning_rate (now 0.00357" in message
    assert saved_steps(tmp_path) == [2, 4]
    assert max(losses_of(tmp_path), default=0) <= 5
    # The checkpoint is as good as it says.
    train(make_config(llama, tmp_path, checkpoint__resume=True, **values))
    if log_steps == 1:
        assert losses_of(tmp_path) == losses_of(good[0])


def test_learning_rate_that_blows_up(llama, tmp_path):
    """Nothing is saved when the first steps go wrong already."""
    config = make_config(
        llama,
        tmp_path,
        optimizer__learning_rate=1e38,
        optimizer__weight_decay=1.0,
        optimizer__schedule="constant",
        optimizer__warmup_steps=0.0,
    )
    with pytest.raises(
        UserError, match=r"step \d, batch \d \(rows .*nothing was saved.*1e\+38"
    ):
        train(config)
    assert saved_steps(tmp_path) == []


def test_bad_evaluation_is_not_saved(llama, tmp_path):
    """The step's own loss is good, what it leaves is not: the held-out rows tell."""
    config = make_config(
        llama,
        tmp_path,
        optimizer__learning_rate=1e30,
        optimizer__schedule="constant",
        optimizer__warmup_steps=0.0,
        evaluate__eval_steps=1,
        checkpoint__save_steps=1,
    )
    with pytest.raises(UserError, match="after step 1 eval_loss is nan"):
        train(config)
    assert saved_steps(tmp_path) == []


def test_batch_that_trains_nothing(llama, tmp_path, monkeypatch):
    original = Loader.assemble

    def assemble(self, number):
        batch = original(self, number)
        if number == 2 and self._shuffle:
            batch["labels"][:] = -100
        return batch

    monkeypatch.setattr(Loader, "assemble", assemble)
    config = make_config(llama, tmp_path, checkpoint__save_steps=1)
    with pytest.raises(UserError, match=r"step 3, batch 2 \(rows .*trains no token"):
        train(config)
    assert saved_steps(tmp_path) == [1, 2]


def test_nothing_held_out(llama, tmp_path):
    config = make_config(llama, tmp_path, train__max_steps=4, data__eval_size=0.0)
    result = train(config)
    assert not [key for key in result.metrics if key.startswith("eval")]
    assert [row["step"] for row in read_log(tmp_path)] == [1, 2, 3, 4]

    config = make_config(
        llama, tmp_path / "b", data__eval_size=0.0, evaluate__eval_steps=2
    )
    with pytest.raises(UserError, match=r"evaluate.eval_steps is 2, but no rows"):
        train(config)


def test_epochs_and_fractions_of_them(llama, tmp_path):
    """Half an epoch of few rows; the last batch of an epoch is partly empty."""
    path = tmp_path / "few.jsonl"
    texts = [f"number {n} of a few" for n in range(21)]
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts), "utf-8")
    tokenizer = transformers.AutoTokenizer.from_pretrained(llama)
    # One more for the end of each.
    num_tokens = sum(1 + len(tokenizer(text)["input_ids"]) for text in texts)
    values = {
        "data__train": str(path),
        "data__packing": False,
        "data__eval_size": 0.0,
        "train__max_steps": 0,
        "optimizer__warmup_steps": 0.0,
    }
    for epochs, steps in [(0.5, 2), (1.0, 3), (1.5, 5)]:
        directory = tmp_path / str(epochs)
        config = make_config(llama, directory, train__num_epochs=epochs, **values)
        train(config)
        rows = read_log(directory)
        assert [row["step"] for row in rows] == list(range(1, steps + 1))
        assert rows[-1]["epoch"] == pytest.approx(steps / 3)
        if steps > 2:
            assert rows[2]["num_tokens"] == num_tokens


def test_tokenizer_without_chat_template_answers_a_prompt(tmp_path, capsys):
    """Plain text is trained on, and the prompt is continued as it is."""
    source = save_tiny_model(tmp_path / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    tokenizer.chat_template = None
    (tmp_path / "model" / "chat_template.jinja").unlink()
    tokenizer.save_pretrained(source)
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(f"this is sentence {n}" for n in range(40)), "utf-8")
    config = make_config(
        source,
        tmp_path / "run",
        data__train=str(path),
        train__max_steps=2,
        optimizer__warmup_steps=0.0,
        evaluate__prompt="this is",
        evaluate__max_new_tokens=4,
    )
    train(config)
    shown = capsys.readouterr().out
    assert "before training\n  > this is\n" in shown
    assert "after training\n  > this is\n" in shown


def test_full_fine_tuning_writes_a_model_that_loads(llama, tmp_path):
    """The result is a Hugging Face directory whose logits are the trained model's."""
    config = make_config(
        llama,
        tmp_path,
        model__dtype="auto",  # the checkpoint's: float32
        peft__method="full",
        train__max_steps=3,
        data__eval_size=0.0,
    )
    result = train(config)
    ids = jnp.arange(12, dtype=jnp.int32)[None]
    with jax.set_mesh(loop_module.sharding.single_device_mesh()):
        ours = result.model(ids)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    import torch

    with torch.no_grad():
        theirs = again(torch.tensor(np.array(ids)).long()).logits.numpy()
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    assert TEXT in (tmp_path / "config.json").read_text("utf-8")
