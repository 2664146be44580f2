"""What transformers' whole chain of processors makes of scores, and its searches of a stub model.

processors.json   each logits processor and warper, and mixes of them, on fixed scores
generate.json     `generate()` of a model whose logits are a hash of what it has read

The stub is the one of crates/idefics/src/generate/stub.rs, bit for bit: integer hashes, then a sum in f64 that is
rounded to f32.
"""

import json
import math

import torch
from transformers import GenerationConfig, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .common import FIXTURES

DIRECTORY = FIXTURES / "generation"
MASK = (1 << 64) - 1
VOCAB = 24


def splitmix(seed):
    z = (seed + 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def uniform(seed):
    """In [-1, 1), with 24 bits."""
    return (splitmix(seed & MASK) >> 40) / (1 << 23) - 1.0


def stub_logits(history):
    of_history = 0x1DEF1C50
    for token in history:
        of_history = splitmix(of_history ^ (token << 8))
    of_last = splitmix(history[-1] + 1)
    return [3.0 * uniform(of_last + i) + uniform(of_history + i) for i in range(VOCAB)]


class StubConfig(PretrainedConfig):
    model_type = "stub"

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.vocab_size = VOCAB
        self.hidden_size = self.num_hidden_layers = self.num_attention_heads = 1


class StubModel(PreTrainedModel, GenerationMixin):
    """Reads whole sequences: it is asked without a cache."""

    config_class = StubConfig

    def __init__(self, config):
        super().__init__(config)
        self.anchor = torch.nn.Parameter(torch.zeros(1))  # transformers asks a model for its device
        self.post_init()

    def forward(self, input_ids=None, **kwargs):
        last = [stub_logits(row) for row in input_ids.tolist()]
        return CausalLMOutputWithPast(logits=torch.tensor(last, dtype=torch.float64).float()[:, None])


def scores_for(seed, scale=3.0):
    return [float(torch.tensor(scale * uniform(seed * 1000 + i)).float()) for i in range(VOCAB)]


def as_json(values):
    return [None if v == -math.inf else v for v in values]


def processors():
    model = StubModel(StubConfig())
    history = [1, 5, 9, 5, 9, 3, 5, 9, 7, 5]
    options = [
        dict(repetition_penalty=1.3),
        dict(repetition_penalty=0.7),
        dict(encoder_repetition_penalty=1.5),
        dict(no_repeat_ngram_size=1),
        dict(no_repeat_ngram_size=2),
        dict(no_repeat_ngram_size=3),
        dict(no_repeat_ngram_size=50),
        dict(encoder_no_repeat_ngram_size=1),
        dict(encoder_no_repeat_ngram_size=2),
        dict(bad_words_ids=[[3], [5, 9], [7, 5, 11], [9, 5, 12], [2]], eos_token_id=2),
        dict(sequence_bias=[[[3], -1.5], [[7, 5, 11], 2.25], [[5, 11], 0.5], [[9, 9, 4], 7.0]]),
        dict(min_length=11, eos_token_id=[2, 4]),
        dict(min_length=10, eos_token_id=[2, 4]),
        dict(min_new_tokens=7, eos_token_id=2),
        dict(min_new_tokens=6, eos_token_id=2),
        dict(forced_bos_token_id=6),
        dict(forced_eos_token_id=6, max_length=11),
        dict(forced_eos_token_id=[6, 8], max_length=11),
        dict(forced_eos_token_id=6, max_length=12),
        dict(exponential_decay_length_penalty=[3, 1.4], eos_token_id=[2, 4]),
        dict(exponential_decay_length_penalty=[6, 1.4], eos_token_id=2),
        dict(exponential_decay_length_penalty=[1, 1.4], eos_token_id=2, bad_words_ids=[[2], [3]], min_length=30),
        dict(suppress_tokens=[0, 3, 23]),
        dict(begin_suppress_tokens=[0, 3, 23]),
        dict(renormalize_logits=True),
        dict(renormalize_logits=True, bad_words_ids=[[3]]),
        dict(remove_invalid_values=True, bad_words_ids=[[3]]),
        dict(do_sample=True),
        dict(do_sample=True, top_k=0),
        dict(do_sample=True, temperature=0.6, top_k=0),
        dict(do_sample=True, top_k=1),
        dict(do_sample=True, top_k=5),
        dict(do_sample=True, top_k=5, num_beams=3, eos_token_id=[1, 2, 3, 4, 5, 6]),
        dict(do_sample=True, top_k=0, top_p=0.9),
        dict(do_sample=True, top_k=0, top_p=0.3),
        dict(do_sample=True, top_k=0, top_p=0.01, num_beams=3),
        dict(do_sample=True, top_k=0, min_p=0.1),
        dict(do_sample=True, top_k=0, min_p=0.99, num_beams=2, eos_token_id=[2, 3]),
        dict(do_sample=True, top_k=0, top_h=0.4),
        dict(do_sample=True, top_k=0, top_h=0.05),
        dict(do_sample=True, top_k=0, top_h=0.9, temperature=1.7),
        dict(do_sample=True, top_k=0, typical_p=0.5),
        dict(do_sample=True, top_k=0, typical_p=0.9),
        dict(do_sample=True, top_k=0, typical_p=0.05, num_beams=2),
        dict(do_sample=True, top_k=0, epsilon_cutoff=0.03),
        dict(do_sample=True, top_k=0, epsilon_cutoff=0.5, num_beams=2),
        dict(do_sample=True, top_k=0, eta_cutoff=0.05),
        dict(do_sample=True, top_k=0, eta_cutoff=0.6),
        dict(do_sample=True, top_k=12, top_p=0.95, temperature=0.8, repetition_penalty=1.2, renormalize_logits=True),
        dict(
            do_sample=True, top_k=20, top_h=0.95, top_p=0.97, min_p=0.005, typical_p=0.95, epsilon_cutoff=0.004,
            eta_cutoff=0.004, temperature=1.4, no_repeat_ngram_size=2, bad_words_ids=[[3]], min_new_tokens=9,
            eos_token_id=2, suppress_tokens=[1], sequence_bias=[[[8], 1.0]],
        ),
    ]  # fmt: skip
    cases = []
    for index, option in enumerate(options):
        for seed in (index + 1, index + 101):
            # The second row is as a beam search has it: log-probabilities, some of them impossible.
            scores = torch.tensor([scores_for(seed)])
            if seed > 100:
                scores[0, seed % VOCAB] = -math.inf
                scores = scores.log_softmax(-1)
            cases.append(processor_case(model, option, history, 4, scores))
    start = torch.tensor([scores_for(777)])
    cases.append(processor_case(model, dict(begin_suppress_tokens=[0, 3]), history[:4], 4, start))
    cases.append(processor_case(model, dict(forced_bos_token_id=6), history[:1], 1, start))
    first = dict(forced_bos_token_id=6, begin_suppress_tokens=[0, 3])
    cases.append(processor_case(model, first, history[:2], 1, start))
    cases.append(processor_case(model, dict(encoder_no_repeat_ngram_size=4), history[:2], 2, start))
    return cases


def processor_case(model, option, history, prompt_length, scores):
    config = GenerationConfig(**{"max_length": 100, "num_beams": 1, **option})
    for field, value in dict(top_k=50, do_sample=False).items():
        if getattr(config, field) is None:
            setattr(config, field, value)
    eos = config.eos_token_id
    eos = None if eos is None else torch.tensor([eos] if isinstance(eos, int) else eos)
    config._eos_token_tensor = eos
    if config.min_new_tokens is not None:
        config.min_length = config.min_new_tokens + prompt_length
    ids = torch.tensor([history])
    chain = model._get_logits_processor(
        config, input_ids_seq_length=prompt_length, encoder_input_ids=ids[:, :prompt_length], device="cpu"
    )
    got = chain(ids, scores.clone())[0].tolist()
    name = ", ".join(f"{k}={v}" for k, v in option.items())
    return dict(
        name=f"{name} on {'log-probabilities' if (scores <= 0).all() else 'logits'} after {len(history)}",
        config=option, prompt_length=prompt_length, max_length=config.max_length, history=history,
        scores=as_json(scores[0].tolist()), expected=as_json(got),
    )  # fmt: skip


def generations():
    model = StubModel(StubConfig())
    prompts = [[1, 5, 7], [1, 9, 9, 4, 2, 11], [3]]
    options = [
        dict(max_new_tokens=12),
        dict(),
        dict(max_length=9),
        dict(max_new_tokens=12, eos_token_id=7),
        dict(max_new_tokens=12, eos_token_id=[7, 8, 10], min_new_tokens=4),
        dict(max_new_tokens=12, repetition_penalty=1.4),
        dict(max_new_tokens=12, no_repeat_ngram_size=2),
        dict(max_new_tokens=12, no_repeat_ngram_size=1),
        dict(max_new_tokens=12, bad_words_ids=[[8], [10], [4, 13]]),
        dict(max_new_tokens=6, forced_eos_token_id=6),
        dict(max_new_tokens=8, num_beams=3),
        dict(max_new_tokens=8, num_beams=3, num_return_sequences=3, length_penalty=0.5),
        dict(max_new_tokens=12, num_beams=3, num_return_sequences=3, eos_token_id=7),
        dict(max_new_tokens=12, num_beams=3, num_return_sequences=3, eos_token_id=[7, 8], early_stopping=True),
        dict(max_new_tokens=12, num_beams=4, num_return_sequences=4, eos_token_id=[7, 8, 10], early_stopping="never",
             length_penalty=2.0),
        dict(max_new_tokens=12, num_beams=3, num_return_sequences=3, eos_token_id=7, early_stopping="never",
             length_penalty=-1.0),
        dict(max_new_tokens=12, num_beams=3, num_return_sequences=3, eos_token_id=[7, 8], length_penalty=0.0),
        dict(max_new_tokens=12, num_beams=3, num_return_sequences=3, eos_token_id=[7, 8], length_penalty=-1.0),
        dict(max_new_tokens=10, num_beams=5, num_return_sequences=2, eos_token_id=[7, 8], min_new_tokens=5,
             repetition_penalty=1.2),
        dict(max_new_tokens=10, num_beams=2, num_return_sequences=2, no_repeat_ngram_size=2, bad_words_ids=[[8]]),
        dict(max_new_tokens=10, num_beams=2, num_return_sequences=2, eos_token_id=7, forced_eos_token_id=7,
             exponential_decay_length_penalty=[2, 1.3], renormalize_logits=True),
    ]  # fmt: skip
    cases = []
    for option in options:
        for prompt in prompts:
            config = GenerationConfig(pad_token_id=0, use_cache=False, **option)
            got = model.generate(
                torch.tensor([prompt]), generation_config=config, return_dict_in_generate=True, output_scores=True
            )
            scores = got.sequences_scores.tolist() if "sequences_scores" in got else None
            rows = [row[len(prompt) :] for row in got.sequences.tolist()]
            cases.append(dict(config=option, prompt=prompt, sequences=rows, scores=scores))
    return cases


def write(name, cases):
    # One case a line keeps differences readable.
    lines = ",\n".join(json.dumps(case) for case in cases)
    (DIRECTORY / name).write_text(f"[\n{lines}\n]\n")


def write_stub_generation():
    DIRECTORY.mkdir(parents=True, exist_ok=True)
    write("processors.json", processors())
    write("generate.json", generations())
