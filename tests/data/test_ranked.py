"""Preferred texts are read to their ends, as trl's reward trainer reads them."""

from typing import Any

import datasets
import pytest
from trl.trainer.reward_config import RewardConfig
from trl.trainer.reward_trainer import RewardTrainer

from fjft.data import ranked
from fjft.data.config import Config
from fjft.data.examples import Example
from fjft.data.templates import MalformedError

ASKED = [{"role": "user", "content": "How are you?"}]
GOOD, BAD = ([{"role": "assistant", "content": c}] for c in ("Fine.", "Go away, user."))
ROWS = {
    "texts": {"chosen": "The quick fox", "rejected": "The lazy dog jumps"},
    "prompt": {"prompt": "2 + 2 is ", "chosen": "4", "rejected": "42, I think"},
    "messages": {"prompt": ASKED, "chosen": GOOD, "rejected": BAD},
    "chats": {"chosen": ASKED + GOOD, "rejected": ASKED + BAD},
}


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_rows_become_what_trl_makes_of_them(chatml, tmp_path, row):
    encoder = ranked.Encoder(chatml, Config(max_length=128))
    name, sample = encoder.read(row)
    assert name == "preference"
    [example] = encoder.encode([sample])
    assert isinstance(example, Example)
    trainer: Any = RewardTrainer
    [theirs] = trainer._prepare_dataset(
        None,
        datasets.Dataset.from_list([row]),
        chatml,
        RewardConfig(output_dir=str(tmp_path), use_cpu=True, report_to=[]),
        "train",
    )
    for part, column in enumerate(("chosen_ids", "rejected_ids")):
        ours = example.columns["input_ids"][example.columns["parts"] == part]
        assert ours.tolist() == theirs[column]


def test_one_text_is_too_few(chatml):
    with pytest.raises(MalformedError, match="no columns 'chosen' and 'rejected'"):
        ranked.Encoder(chatml, Config()).read({"text": "The quick fox"})
