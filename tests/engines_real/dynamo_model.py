"""A model's folder for Dynamo's mocker, which reads a tokenizer and a configuration and no weights.

Written without any library: every byte is a token, so a test knows by itself how many tokens a text has. The vocabulary
goes on with words that no text becomes, for the mocker writes token ids up to some tens of thousands.
"""

import json
from pathlib import Path

VOCABULARY_TOKENS = 151_000
SPECIAL = ("<pad>", "<s>", "</s>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<s>{{ message.role }}\n{{ message.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


def prompt_tokens(text: str) -> int:
    """What one user message of this text counts, by the template above."""
    return len(f"user\n{text}\nassistant\n".encode()) + len(["<s>", "</s>", "<s>"])


def write_model(folder: Path) -> Path:
    folder.mkdir(parents=True)
    _write(folder / "tokenizer.json", _tokenizer())
    named = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 4096, "chat_template": CHAT_TEMPLATE}
    _write(folder / "tokenizer_config.json", {**named, **settings})
    ids = {f"{name.removesuffix('_token')}_token_id": SPECIAL.index(token) for name, token in named.items()}
    _write(folder / "generation_config.json", ids)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 2, "max_position_embeddings": 4096, "vocab_size": VOCABULARY_TOKENS}
    _write(folder / "config.json", {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **shape, **ids})
    return folder


def _write(path: Path, tree: object) -> None:
    path.write_text(json.dumps(tree))


def _tokenizer() -> dict[str, object]:
    words = [*SPECIAL, *_byte_characters()]
    words += [f" word{number}" for number in range(len(words), VOCABULARY_TOKENS)]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "added_tokens": [{"id": id_, "content": text, "special": True, **flags} for id_, text in enumerate(SPECIAL)],
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": {word: id_ for id_, word in enumerate(words)}, "merges": []},
    }


def _byte_characters() -> list[str]:
    """The printable character that byte-level tokenizers write for each byte."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]
