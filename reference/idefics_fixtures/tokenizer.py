"""A small tokenizer of LLaMA's kind: SentencePiece BPE with byte fallback, in the legacy form.

`tokenizer.model` is trained here on text.txt; `tokenizer.json` is made of its pieces by the rule of transformers'
converter (`convert_slow_tokenizer.generate_merges`) with LLaMA's normaliser and decoder of 2023.
"""

import io
import json
from pathlib import Path

import sentencepiece
from transformers import PreTrainedTokenizerFast

TEXT = Path(__file__).with_name("text.txt")
BASE_TOKENS = ["<fake_token_around_image>", "<image>"]
INSTRUCT_TOKENS = [*BASE_TOKENS, "<end_of_utterance>"]


def train_sentencepiece(vocab_size: int) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.read_text(encoding="utf-8").splitlines()),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        character_coverage=1.0,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        add_dummy_prefix=True,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def pieces_of(model: bytes) -> list[str]:
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    return [processor.id_to_piece(id) for id in range(processor.get_piece_size())]


def merges_of(pieces: list[str]) -> list[list[str]]:
    ids = {piece: id for id, piece in enumerate(pieces)}
    merges = []
    for id, piece in enumerate(pieces[259:], 259):
        splits = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        pairs = [pair for pair in splits if pair[0] in ids and pair[1] in ids]
        # The score falls with the id; among the pairs of one piece the converter prefers the longer left part.
        merges += sorted(pairs, key=lambda pair: (len(pair[0]), len(pair[1])), reverse=True)
    return [list(pair) for pair in merges]


def tokenizer_json(model: bytes, added: list[str]) -> str:
    pieces = pieces_of(model)

    def added_token(id: int, content: str) -> dict:
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        return {"id": id, "content": content, **flags, "special": True}

    specials = [*enumerate(pieces[:3]), *enumerate(added, len(pieces))]
    bos = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    sequence = {"Sequence": {"id": "A", "type_id": 0}}
    bos_b = {"SpecialToken": {"id": "<s>", "type_id": 1}}
    sequence_b = {"Sequence": {"id": "B", "type_id": 1}}
    value = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [added_token(id, content) for id, content in specials],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos, sequence],
            "pair": [bos, sequence, bos_b, sequence_b],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": {piece: id for id, piece in enumerate(pieces)},
            "merges": [" ".join(pair) for pair in merges_of(pieces)],
        },
    }
    return json.dumps(value, ensure_ascii=False, indent=1) + "\n"


def write_tokenizer(directory: Path, model: bytes, added: list[str], with_json: bool = True) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    vocab_size = len(pieces_of(model))
    (directory / "tokenizer.model").write_bytes(model)
    if with_json:
        (directory / "tokenizer.json").write_text(tokenizer_json(model, added), encoding="utf-8")
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
    files = {
        "added_tokens.json": {token: id for id, token in enumerate(added, vocab_size)},
        "special_tokens_map.json": {**special, "additional_special_tokens": added},
        "tokenizer_config.json": {
            "tokenizer_class": "LlamaTokenizer",
            "add_bos_token": True,
            "add_eos_token": False,
            **special,
            "clean_up_tokenization_spaces": False,
            "legacy": True,
            "model_max_length": 2048,
            "sp_model_kwargs": {},
        },
    }
    for name, value in files.items():
        (directory / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def load_tokenizer(model: bytes, added: list[str]) -> PreTrainedTokenizerFast:
    """The legacy tokenizer as transformers 4 ran it: transformers 5's LlamaTokenizer replaces the normaliser."""
    from tokenizers import Tokenizer

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tokenizer_json(model, added)),
        bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<unk>",
        additional_special_tokens=added,
        padding_side="left", clean_up_tokenization_spaces=False, model_max_length=2048,
    )
    check_against_sentencepiece(tokenizer, model)
    return tokenizer


def check_against_sentencepiece(tokenizer: PreTrainedTokenizerFast, model: bytes) -> None:
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    lines = TEXT.read_text(encoding="utf-8").splitlines()
    lines += ["  two  spaces\tTab é 你好 🙂 x", "\n", " ", "\n\nAssistant:", "aaaaaaaaaaaa", "ﬁ Ａ", "a b", "1234567"]
    for line in lines:
        ours, expected = tokenizer.encode(line, add_special_tokens=False), processor.encode(line)
        assert ours == expected, f"{line!r}: tokenizer.json gives {ours}, tokenizer.model {expected}"
