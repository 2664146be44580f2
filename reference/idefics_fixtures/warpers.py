"""Scores after each logits processor and warper, from transformers' own classes.

warpers.json holds the rows of scores `[R][30]`, the tokens so far of each row, and for each entry the class, its
arguments (the names of `generate`'s options), what else it was told (`min_tokens_to_keep`, prompt length), and the
processed scores of every row.
"""

import torch
from transformers.generation import logits_process as lp

from .common import FIXTURES, floats, rng, write_json

WIDTH = 30
PROMPT_LENGTH = 6
TIED_ROW = 3
SORTING = ("top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "top_h")
EOS = [2, 9]
# The first row repeats bigrams; the last is as long as max_length 12 needs to force the end.
TOKENS = [
    [1, 5, 7, 5, 7, 11, 5],
    [1, 3, 3, 4, 3, 3, 3],
    [0, 0, 1, 20, 21, 22, 20],
    [1, 25, 26, 27, 28, 29, 25, 26, 27, 28, 25],
]


def rows() -> torch.Tensor:
    """Broad, peaked, nearly flat, and one whose fifth and sixth are equal, which top_k 5 keeps both: [R, 30]."""
    generator = rng("warpers")
    noise = torch.from_numpy(generator.standard_normal((len(TOKENS), WIDTH))).float()
    scores = noise * torch.tensor([[2.0], [6.0], [0.05], [1.0]])
    order = scores[TIED_ROW].argsort(descending=True)
    scores[TIED_ROW, order[5]] = scores[TIED_ROW, order[4]]
    return scores


def processors() -> list[tuple[str, dict, dict]]:
    """Option, value as `generate` takes it, keyword arguments of the class beyond it."""
    entries = [("temperature", value, {}) for value in (0.1, 0.7, 1.5)]
    for keep in (1, 2):
        extra = {"min_tokens_to_keep": keep}
        entries += [("top_k", value, extra) for value in (1, 5, 50)]
        entries += [("top_p", value, extra) for value in (0.0, 0.3, 0.9, 0.999)]
        entries += [("min_p", value, extra) for value in (0.0, 0.05, 0.5, 1.0)]
        entries += [("typical_p", value, extra) for value in (0.1, 0.5, 0.95)]
        entries += [("epsilon_cutoff", value, extra) for value in (3e-4, 0.02, 0.5)]
        entries += [("eta_cutoff", value, extra) for value in (3e-4, 0.02, 0.5)]
    entries += [("top_h", value, {}) for value in (0.05, 0.4, 0.9, 0.99)]
    entries += [
        ("repetition_penalty", 1.3, {}),
        ("repetition_penalty", 0.7, {}),
        ("encoder_repetition_penalty", 1.5, {}),
        ("no_repeat_ngram_size", 1, {}),
        ("no_repeat_ngram_size", 2, {}),
        ("no_repeat_ngram_size", 3, {}),
        ("no_repeat_ngram_size", 20, {}),
        ("encoder_no_repeat_ngram_size", 2, {}),
        ("bad_words_ids", [[4], [5, 8], [5, 7, 11, 5, 3], [2], [9], [25, 12], [28, 25, 13]], {}),
        ("sequence_bias", [[[4], 2.5], [[5, 8], -1.5], [[11, 5, 9], 0.75], [[25, 12], -10.0], [[4, 6], 1.0]], {}),
        ("min_length", 9, {}),
        ("min_new_tokens", 3, {}),
        ("forced_bos_token_id", 7, {}),
        ("forced_eos_token_id", [2, 9], {"max_length": 12}),
        ("forced_eos_token_id", [2], {"max_length": 8}),
        ("exponential_decay_length_penalty", [0, 1.5], {}),
        ("exponential_decay_length_penalty", [3, 2.0], {}),
        ("suppress_tokens", [0, 7, 29], {}),
        ("begin_suppress_tokens", [3, 5], {"begin_index": 7}),
        ("renormalize_logits", True, {}),
    ]
    return entries


def build(option: str, value, extra: dict, row: int):
    prompt = torch.tensor([TOKENS[row][:PROMPT_LENGTH]])
    eos = torch.tensor(EOS)
    padding = torch.tensor([TOKENS[row].index(1)])
    factories = {
        "temperature": lambda: lp.TemperatureLogitsWarper(value),
        "top_k": lambda: lp.TopKLogitsWarper(value, **extra),
        "top_p": lambda: lp.TopPLogitsWarper(value, **extra),
        "min_p": lambda: lp.MinPLogitsWarper(value, **extra),
        "typical_p": lambda: lp.TypicalLogitsWarper(value, **extra),
        "epsilon_cutoff": lambda: lp.EpsilonLogitsWarper(value, **extra),
        "eta_cutoff": lambda: lp.EtaLogitsWarper(value, **extra),
        "top_h": lambda: lp.TopHLogitsWarper(value),
        "repetition_penalty": lambda: lp.RepetitionPenaltyLogitsProcessor(value, prompt_ignore_length=padding),
        "encoder_repetition_penalty": lambda: lp.EncoderRepetitionPenaltyLogitsProcessor(value, prompt),
        "no_repeat_ngram_size": lambda: lp.NoRepeatNGramLogitsProcessor(value),
        "encoder_no_repeat_ngram_size": lambda: lp.EncoderNoRepeatNGramLogitsProcessor(value, prompt),
        "bad_words_ids": lambda: lp.NoBadWordsLogitsProcessor(value, eos),
        "sequence_bias": lambda: lp.SequenceBiasLogitsProcessor(value),
        "min_length": lambda: lp.MinLengthLogitsProcessor(value, eos),
        "min_new_tokens": lambda: lp.MinNewTokensLengthLogitsProcessor(PROMPT_LENGTH, value, eos),
        "forced_bos_token_id": lambda: lp.ForcedBOSTokenLogitsProcessor(value),
        "forced_eos_token_id": lambda: lp.ForcedEOSTokenLogitsProcessor(extra["max_length"], value),
        "exponential_decay_length_penalty": lambda: lp.ExponentialDecayLengthPenalty(value, eos, PROMPT_LENGTH),
        "suppress_tokens": lambda: lp.SuppressTokensLogitsProcessor(value),
        "begin_suppress_tokens": lambda: lp.SuppressTokensAtBeginLogitsProcessor(value, extra["begin_index"]),
        "renormalize_logits": lambda: lp.LogitNormalization(),
    }
    return factories[option]()


def write_warpers() -> None:
    scores = rows()
    entries = []
    for option, value, extra in processors():
        processed = []
        for row, tokens in enumerate(TOKENS):
            processor = build(option, value, extra, row)
            processed.append(processor(torch.tensor([tokens]), scores[row : row + 1].clone())[0])
        best = scores[TIED_ROW].topk(6).indices[4:]
        kept = processed[TIED_ROW][best].isfinite()
        # Between equal scores the reference's sort decides: such a result would say nothing.
        assert option not in SORTING or kept[0] == kept[1], (option, value)
        entries.append({"option": option, "value": value, **extra, "scores": [floats(row) for row in processed]})
    invalid = torch.tensor([[float("nan"), float("inf"), float("-inf"), 1.5]])
    cleaned = lp.InfNanRemoveLogitsProcessor()(torch.tensor([[1]]), invalid)
    write_json(FIXTURES / "warpers.json", {
        "eos_token_id": EOS,
        "prompt_length": PROMPT_LENGTH,
        "tokens": TOKENS,
        "scores": [floats(row) for row in scores],
        "entries": entries,
        "remove_invalid_values": {"scores": floats(invalid), "processed": floats(cleaned)},
    })
