"""Tiny models with random weights for `make test-engines`: real architectures that a CPU serves in milliseconds.

    tiny_models.py FOLDER

writes FOLDER/chat (a two-layer Llama with a byte-level tokenizer and a chat template, room for 4 096 tokens),
FOLDER/adapter (a LoRA for it), FOLDER/embed (a BERT) and FOLDER/rank (a BERT that scores pairs). Runs in the engines'
environment, needs no network and gives the same files every time. Their words mean nothing; their token counts do.
"""
# ruff: noqa: S106 - these tokens are pieces of text

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

SEED = 7
CONTEXT_TOKENS = 4096
CHAT_TEMPLATE = (
    "{% for message in messages %}<s>{{ message.role }}\n{{ message.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
SENTENCES = (
    "The gateway counts every token that an engine reads and writes.",
    "A quick brown fox asks the model a question, and the model answers at length.",
    "Ein Satz mit Umlauten: schöne Grüße, für alle Fälle. 日本語も少し。 ¿Qué tal?",
    '{"model": "tiny", "messages": [{"role": "user", "content": "Hello!"}], "stream": true}',
    "Numbers from 0 to 9: 0123456789, and sums such as 12 + 30 = 42.",
)
"""what the tokenizers learn their pieces from; every other byte stays a piece of its own"""


def byte_level_tokenizer() -> PreTrainedTokenizerFast:
    """Every byte has a piece, so any text has tokens, and a character may end in the middle of one."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=CONTEXT_TOKENS,
    )


def word_piece_tokenizer() -> PreTrainedTokenizerFast:
    """BERT's: pairs are [CLS] a [SEP] b [SEP]."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(SENTENCES, trainer)
    begin, end = tokenizer.token_to_id("[CLS]"), tokenizer.token_to_id("[SEP]")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", begin), ("[SEP]", end)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=512,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def llama(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """Random, but its answers are text: pieces that are no whole characters are rare, and so is the end.

    The first number of every hidden state is a constant, which no layer writes to; so the output's weight for it is a
    bias of each piece.
    """
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT_TOKENS,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    biases = torch.tensor([_bias(tokenizer, piece) for piece in range(config.vocab_size)])
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 0.05
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[0] = 0
            layer.mlp.down_proj.weight[0] = 0
        # What the norm makes of the constant lies between 1 and 2.5.
        model.lm_head.weight[:, 0] = biases / 2
    return model.to(torch.bfloat16)


def _bias(tokenizer: PreTrainedTokenizerFast, piece: int) -> float:
    if piece == tokenizer.eos_token_id:
        return -8.0
    text = tokenizer.decode([piece])
    if piece >= len(tokenizer) or piece in tokenizer.all_special_ids:
        return -40.0
    return 0.0 if text.isprintable() and "\ufffd" not in text else -5.0


def adapter(folder: Path, rank: int = 8) -> None:
    """Random, and strong enough that no answer is the base model's."""
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "chat",
        "r": rank,
        "lora_alpha": 2 * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": ["q_proj", "v_proj"],
    }
    weights = {}
    for layer in range(2):
        for module, outputs in (("q_proj", 128), ("v_proj", 64)):
            place = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            weights[f"{place}.lora_A.weight"] = (torch.randn(rank, 128) / 4).to(torch.bfloat16)
            weights[f"{place}.lora_B.weight"] = (torch.randn(outputs, rank) / 4).to(torch.bfloat16)
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def bert_config(**more: int) -> BertConfig:
    return BertConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=512,
        pad_token_id=0,
        **more,
    )


def main(folder: Path) -> None:
    pieces, words = byte_level_tokenizer(), word_piece_tokenizer()
    for name, tokenizer, model in (
        ("chat", pieces, lambda: llama(pieces)),
        ("embed", words, lambda: BertModel(bert_config())),
        ("rank", words, lambda: BertForSequenceClassification(bert_config(num_labels=1))),
    ):
        torch.manual_seed(SEED)
        tokenizer.save_pretrained(folder / name)
        model().save_pretrained(folder / name)
    torch.manual_seed(SEED)
    adapter(folder / "adapter")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
