"""Token sequences that the reference's `generate` makes with the tiny checkpoints.

Each entry of generation.json: `inputs`, names of cases of expected.safetensors; `batched`, whether they ran as one
left-padded batch (otherwise each alone); `options`, the reference's own keyword arguments, everything not named being
its default (so nothing is banned); and `rows`, one for each input, each with one result per returned sequence:

    token_ids     new tokens, with the filler after the end that the reference writes
    logprobs      of the new tokens, log-softmax of the raw logits (greedy, alone)
    margins       best minus second-best processed score at each step (greedy, alone): near-ties are known
    score         sum of log-probabilities over length^length_penalty (beam search only)

Every sequence was generated in f64 too and came out the same, so f32 rounding cannot flip it.
"""

import copy

import torch

from .activations import CASES, batch_inputs, case_inputs
from .common import FIXTURES, floats, shortest, write_json
from .tiny import Tiny


LENGTH = {"max_new_tokens": 12}
# The other wiring of tiny-base needs no second run of every option.
BASE_OPTIONS = [
    ("greedy", LENGTH),
    ("greedy_uncached", {**LENGTH, "use_cache": False}),
    ("greedy_long", {**LENGTH, "min_new_tokens": 12}),
    ("repetition_penalty", {**LENGTH, "min_new_tokens": 12, "repetition_penalty": 1.3}),
    ("beams_three_returns", {**LENGTH, "num_beams": 3, "num_return_sequences": 3}),
]


def options_of(tiny: Tiny, greedy: dict[str, list[int]]) -> list[tuple[str, dict]]:
    """Names and options. End and stop tokens are taken from what greedy decoding emits, so that they occur."""
    first = greedy["two_images"]
    new = next(index for index in range(3, len(first)) if first[index] not in first[:index])
    eos = first[new]
    other_eos = next(token for token in greedy["text_only"][2:] if token != eos)
    length = LENGTH
    longest = max(case_inputs(tiny, name)["input_ids"].shape[1] for name in greedy)
    words = {token: tiny.tokenizer.convert_tokens_to_ids(token) for token in tiny.added_tokens}
    bad_words = [[id] for id in words.values()] + [[first[0]], [first[1], first[2]]]
    beam = {**length, "num_beams": 3, "num_return_sequences": 3}
    entries = [
        ("greedy", length),
        ("greedy_uncached", {**length, "use_cache": False}),
        ("eos", {**length, "eos_token_id": eos}),
        ("several_eos", {**length, "eos_token_id": [eos, other_eos]}),
        ("min_new_tokens", {**length, "eos_token_id": [eos, other_eos], "min_new_tokens": 8}),
        ("min_length", {**length, "eos_token_id": [eos, other_eos], "min_length": longest}),
        ("max_length", {"max_length": longest + 3}),
        ("repetition_penalty", {**length, "repetition_penalty": 1.3}),
        ("repetition_penalty_below_one", {**length, "repetition_penalty": 0.8}),
        ("encoder_repetition_penalty", {**length, "encoder_repetition_penalty": 1.5}),
        ("no_repeat_ngram_size", {**length, "no_repeat_ngram_size": 2}),
        ("encoder_no_repeat_ngram_size", {**length, "encoder_no_repeat_ngram_size": 2}),
        ("bad_words_ids", {**length, "bad_words_ids": bad_words}),
        ("sequence_bias", {**length, "sequence_bias": [[[first[0]], -4.0], [[first[1], first[2]], -2.5], [[300], 1.5]]}),
        ("suppress_tokens", {**length, "suppress_tokens": sorted(set(first[:3]))}),
        ("begin_suppress_tokens", {**length, "begin_suppress_tokens": [first[0]]}),
        ("forced_eos", {**length, "forced_eos_token_id": 2}),
        ("forced_bos_is_not_first", {**length, "forced_bos_token_id": 7}),
        ("exponential_decay_length_penalty", {**length, "exponential_decay_length_penalty": (3, 1.8)}),
        ("renormalize_logits", {**length, "renormalize_logits": True}),
        ("remove_invalid_values", {**length, "remove_invalid_values": True}),
        ("all_rules", {
            **length, "repetition_penalty": 1.2, "no_repeat_ngram_size": 3, "bad_words_ids": bad_words,
            "min_new_tokens": 6, "eos_token_id": [eos, other_eos], "suppress_tokens": [300, 301],
        }),
        ("beams", {**length, "num_beams": 3}),
        ("beams_three_returns", beam),
        ("beams_eos", {**beam, "eos_token_id": [eos, other_eos]}),
        ("beams_eos_early", {**beam, "eos_token_id": [eos, other_eos], "early_stopping": True}),
        ("beams_eos_never", {**beam, "eos_token_id": eos, "early_stopping": "never", "length_penalty": 2.0}),
        ("beams_short", {**beam, "eos_token_id": [eos, other_eos], "length_penalty": -1.0}),
        ("beams_long", {**beam, "eos_token_id": eos, "length_penalty": 1.5}),
        ("beams_no_length_penalty", {**beam, "eos_token_id": eos, "length_penalty": 0.0}),
        ("beams_rules", {
            **beam, "eos_token_id": [eos, other_eos], "repetition_penalty": 1.2, "no_repeat_ngram_size": 2,
            "min_new_tokens": 4, "bad_words_ids": bad_words,
        }),
        ("beams_five", {**length, "num_beams": 5, "num_return_sequences": 2, "eos_token_id": eos}),
    ]
    return entries


def stop_strings_of(tiny: Tiny, tokens: list[int]) -> list[tuple[str, list[str]]]:
    """Stop strings that end inside a token, span two, or are a whole one, and one that never comes."""
    pieces = [piece.replace("▁", " ") for piece in tiny.tokenizer.convert_ids_to_tokens(tokens)]
    spanning = pieces[3][-1] + pieces[4][0]
    assert spanning not in "".join(pieces[:4]), (spanning, pieces)
    inside = next(piece for piece in pieces[2:] if len(piece) > 2)
    return [
        ("stop_string_across_tokens", [spanning]),
        ("stop_string_inside_a_token", [inside[:-1]]),
        ("stop_string_whole_token", [pieces[5]]),
        ("stop_strings_first_wins", ["never comes", pieces[6] + pieces[7], spanning]),
        ("stop_string_absent", ["never comes"]),
    ]


@torch.no_grad()
def write_generation(tiny: Tiny) -> None:
    cases = [name for name, _, _ in CASES[tiny.name]]
    exact = copy.deepcopy(tiny.model).double()
    if tiny.name == "tiny-base":
        alone, stops, batched = BASE_OPTIONS, [], [("batch_greedy", LENGTH)]
    else:
        greedy = {
            name: _new_tokens(tiny.model, case_inputs(tiny, name), LENGTH).sequences[0].tolist() for name in cases
        }
        alone = options_of(tiny, greedy)
        stops = stop_strings_of(tiny, greedy["two_images"])
        eos = dict(alone)["several_eos"]["eos_token_id"]
        batched = [
            ("batch_greedy", LENGTH),
            ("batch_several_eos", {**LENGTH, "eos_token_id": eos}),
            ("batch_repetition_penalty", {**LENGTH, "repetition_penalty": 1.3}),
            ("batch_beams", {**LENGTH, "eos_token_id": eos, "num_beams": 3, "num_return_sequences": 2}),
        ]
    entries = [_entry(tiny, exact, name, cases, options, batched=False) for name, options in alone]
    for name, strings in stops:
        entry = _entry(tiny, exact, name, ["two_images"], {**LENGTH, "stop_strings": strings}, batched=False)
        for row in entry["rows"]:
            for result in row:
                result["text"] = tiny.tokenizer.decode(result["token_ids"])
        entries.append(entry)
    entries += [_entry(tiny, exact, name, cases, options, batched=True) for name, options in batched]
    write_json(FIXTURES / tiny.name / "generation.json", {"model": tiny.name, "entries": entries})


def _entry(tiny: Tiny, exact, name: str, cases: list[str], options: dict, batched: bool) -> dict:
    inputs = [batch_inputs(tiny, cases)] if batched else [case_inputs(tiny, case) for case in cases]
    rows = []
    for input in inputs:
        output = _new_tokens(tiny.model, input, options, tiny.tokenizer)
        double = {key: value.double() if value.is_floating_point() else value for key, value in input.items()}
        check = _new_tokens(exact, double, options, tiny.tokenizer)
        assert torch.equal(output.sequences, check.sequences), f"{tiny.name} {name}: f32 and f64 differ"
        returns = options.get("num_return_sequences", 1)
        results = _results(output, options, batched)
        rows += [results[start : start + returns] for start in range(0, len(results), returns)]
    options = {key: list(value) if isinstance(value, tuple) else value for key, value in options.items()}
    return {"name": name, "inputs": cases, "batched": batched, "options": options, "rows": rows}


def _new_tokens(model, inputs: dict, options: dict, tokenizer=None):
    extra = {"tokenizer": tokenizer} if "stop_strings" in options else {}
    output = model.generate(
        **inputs, **options, **extra, do_sample=False, return_dict_in_generate=True, output_scores=True, output_logits=True
    )
    output.sequences = output.sequences[:, inputs["input_ids"].shape[1] :]
    return output


def _results(output, options: dict, batched: bool) -> list[dict]:
    results = []
    for index, tokens in enumerate(output.sequences.tolist()):
        result = {"token_ids": tokens}
        if options.get("num_beams", 1) > 1:
            result["score"] = shortest(output.sequences_scores[index])
        elif not batched:
            logits = torch.stack([step[index] for step in output.logits]).float()
            scores = torch.stack([step[index] for step in output.scores]).float()
            logprobs = logits.log_softmax(-1)[torch.arange(len(tokens)), torch.tensor(tokens)]
            best = scores.topk(2).values
            result["logprobs"] = floats(logprobs)
            result["margins"] = floats(best[:, 0] - best[:, 1])
        results.append(result)
    return results
