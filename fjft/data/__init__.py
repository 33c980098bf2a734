"""Text in, batches out.

Rows flow through one file per stage, in this order:

    sources       `files`, packages and Hugging Face datasets -> rows with file and line
    instructions  where a config has some: a row -> what is asked, and the answer
    templates     a row -> a chat, a prompt/completion pair or plain text
    shots         of a held-out question: -> the same behind answered ones
    turns         where the assistant's turns lie in a rendered chat (see `skeleton`)
    tokenize      -> token ids, and labels that are -100 where nothing is learned
    labelled      instead of these: a row -> token ids, and a label for all of it
    examples      ids and labels, spooled to disk
    kept          these, for the next start
    mixture       of several sources: -> as often as each one's examples are due
    pack          examples -> rows of fixed length with segment ids
    loader        rows -> this process's part of each global batch

`dataset.load_examples` runs the stages up to packing, `reading` those of a row;
`report` says what became of every row.
"""

from fjft.data.config import Config

__all__ = ["Config"]
