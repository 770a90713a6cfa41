"""Makes the small Python Llama that ships with Gossamer: `python recipes/python_llama.py -o DIR`.

    tokenizer -> DIR/start (random) -> pretrain -> DIR/pretrained -> finetune twice -> DIR/tuned-twice

Everything it learns from is on any machine: this interpreter's standard library (without the held-out
files) and doctests made by `gossamer.data.doctests`. Fixed seeds; about half an hour on two idle
cores. What ships is DIR/tuned-twice.
"""

import argparse
import json
import os
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM

from gossamer.data.sources import documents
from gossamer.data.supervised import write_completions
from gossamer.job.report import Event
from gossamer.stages.finetune import Finetune, finetune
from gossamer.stages.pretrain import Pretrain, pretrain

BOS, EOS = "<s>", "</s>"
VOCAB_SIZE = 1024
CONTEXT = 512
TOKENIZER_DOCTESTS = 5000
# Split before merging: letters of a short literal one by one, words, digits one by one, punctuation with the
# quote or blank that leads to the next item, line ends with the indentation that follows, other blanks.
PIECES = (
    r"""[A-Za-z](?=[A-Za-z,.+-]{0,9}["'])"""
    r"""| ?[A-Za-z_]+"""
    r"""|[0-9]"""
    r"""| ?[^\sA-Za-z0-9_]+(?: (?=[0-9])| ["'](?=[A-Za-z]))?"""
    r"""|\s*\n\s*"""
    r"""|\s+"""
)
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'user' %}{{ '>>> ' + message.content + '\\n' }}"
    "{% elif message.role == 'assistant' %}{{ message.content.rstrip('\\n') + '\\n' }}{% endif %}"
    "{% endfor %}"
)
NUM_DOCTESTS = 180_000
NUM_REPLAY_PIECES = 3000
BASE_TEXT = ("python:stdlib@0.8", "python:doctests@0.2")


def train_tokenizer() -> Tokenizer:
    """A byte-level BPE in which short literals stay letters and numbers stay digits."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [*documents("python:stdlib"), *documents(f"python:doctests:{TOKENIZER_DOCTESTS}")]
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return tokenizer


def write_start(directory: Path) -> None:
    """A random Llama in bfloat16 with its tokenizer."""
    tokenizer = train_tokenizer()
    bos_id, eos_id = tokenizer.token_to_id(BOS), tokenizer.token_to_id(EOS)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=bos_id,
        eos_token_id=eos_id,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).bfloat16().save_pretrained(directory)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "model_max_length": CONTEXT,
        "clean_up_tokenization_spaces": False,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE)


def show(event: Event) -> None:
    """One line every 50 steps."""
    if event.done % 50 == 0:
        figures = " ".join(
            f"{name} {value:.4g}" for name, value in event.metrics.items() if value is not None
        )
        print(f"{event.stage} {event.message} {event.done:g}/{event.total:g} {figures}", flush=True)


def learn_python(start: Path, output: Path) -> None:
    """Next-token training on the library and on sessions of doctests."""
    job = Pretrain(
        str(start),
        str(output),
        dataset=BASE_TEXT,
        num_tokens=6_000_000,
        max_length=256,
        batch_tokens=2048,
        learning_rate=1.5e-3,
    )
    pretrain(job, show)


def learn_doctests(start: Path, output: Path, seed: int) -> None:
    """Training on the answers of doctests, with a fifth of the tokens from the library."""
    replay = output.with_suffix(".jsonl")
    write_completions(replay, "python:stdlib", NUM_REPLAY_PIECES, seed)
    job = Finetune(
        str(start),
        str(output),
        dataset=(f"python:doctests:{NUM_DOCTESTS}:{seed}", str(replay)),
        distill="none",
        num_train_epochs=1,
        max_length=256,
        batch_tokens=2048,
        learning_rate=1e-3,
    )
    finetune(job, show)


def main() -> None:
    parser = argparse.ArgumentParser(description="Makes the small Python Llama that ships with Gossamer.")
    parser.add_argument("-o", "--output-dir", type=Path, required=True, help="finished stages in it are kept")
    folder: Path = parser.parse_args().output_dir
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(os.cpu_count() or 1)
    start, pretrained, tuned, twice = (
        folder / name for name in ("start", "pretrained", "tuned", "tuned-twice")
    )
    if not start.exists():
        write_start(start)
    if not pretrained.exists():
        learn_python(start, pretrained)
    if not tuned.exists():
        learn_doctests(pretrained, tuned, seed=1)
    if not twice.exists():
        learn_doctests(tuned, twice, seed=2)


if __name__ == "__main__":
    main()
