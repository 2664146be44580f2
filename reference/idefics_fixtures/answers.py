"""Prompts with pictures through the whole reference: processor, model, generation, text.

Each entry of TINY/answers.json: `prompts`, lists of text and image segments (images by their name in processor/);
`options` of the reference's `generate`, beside those in `every_options`; and for each prompt `answers`, one for each
returned sequence:

    token_ids    new tokens, the end token included, without filler
    text         of the new tokens alone, special tokens skipped
    whole        of prompt and answer together, special tokens skipped, as the model card prints it

All prompts of an entry run as one left-padded batch. Every answer was generated in f64 too and came out the same.
"""

import copy

import torch
from transformers import IdeficsProcessor
from transformers.models.idefics.image_processing_pil_idefics import IdeficsImageProcessorPil

from .common import FIXTURES, shortest, write_json
from .prompts import ALPHA, CAPTION, CAT, DIALOGUE, DOG, E, F, I, image, segments, to_reference
from .tiny import Tiny

WEBP, GREY = image("lossy.webp"), image("grey.jpg")
QUESTION = ["User: What is in this image?", DOG, f"{E}\nAssistant:"]

# name, prompts, options
ENTRIES = {
    "tiny": [
        ("text_only", [["The weather is cold and"]], {}),
        ("one_image", [QUESTION], {}),
        ("two_images", [["User:", DOG, CAT, f"Which one is larger?{E}", "\nAssistant:"]], {}),
        ("dialogue", [DIALOGUE], {}),
        ("image_alone", [[ALPHA]], {}),
        ("image_last", [["Describe this image.", WEBP]], {}),
        ("few_shot", [CAPTION], {}),
        ("after_end", [["Image:", DOG, "a dog</s> the sea", GREY, "a hat"]], {}),
        ("batch", [QUESTION, ["The weather is cold and"], [CAT, ALPHA, GREY, "Question: how many? Answer:"]], {}),
        ("long", [["User:", CAT, f"Tell a story.{E}\nAssistant:"]], {"max_new_tokens": 40, "min_new_tokens": 40}),
        ("repetition_penalty", [QUESTION, DIALOGUE], {"repetition_penalty": 1.4}),
        ("beams", [QUESTION, ["The weather is cold and"]], {"num_beams": 3, "num_return_sequences": 2}),
    ],
    "tiny-base": [
        ("text_only", [["An old fisherman"]], {}),
        ("one_image", [[DOG, "This is an image of "]], {}),
        ("two_images", [[CAT, "a bird", DOG, "a"]], {}),
        ("batch", [[DOG, GREY, "Question: how many? Answer:"], ["An old fisherman"]], {}),
    ],
}


@torch.no_grad()
def write_answers(tiny: Tiny) -> None:
    processor = IdeficsProcessor(IdeficsImageProcessorPil(image_size=32), tiny.tokenizer)
    ids = {token: tiny.tokenizer.convert_tokens_to_ids(token) for token in tiny.added_tokens}
    # As the model card does it: no image tokens, and an utterance ends the answer.
    every = {
        "max_new_tokens": 16,
        "bad_words_ids": [[ids[I]], [ids[F]]],
        "eos_token_id": [2, ids[E]] if E in ids else [2],
    }
    exact = copy.deepcopy(tiny.model).double()
    entries = []
    for name, prompts, options in ENTRIES[tiny.name]:
        text = [[to_reference(segment) for segment in prompt] for prompt in prompts]
        # Automatic insertion as transformers 4 does it: on when the tokenizer has the token.
        inputs = dict(processor(text=text, add_end_of_utterance_token=E in ids, return_tensors="pt"))
        asked = {**every, **options}
        output = _generate(tiny.model, inputs, asked)
        check = _generate(exact, {**inputs, "pixel_values": inputs["pixel_values"].double()}, asked)
        assert torch.equal(output.sequences, check.sequences), f"{tiny.name} {name}: f32 and f64 differ"
        answers = _answers(tiny, inputs, output, asked)
        entries.append({
            "name": name, "prompts": [segments(prompt) for prompt in prompts], "options": options, "answers": answers,
        })
    write_json(FIXTURES / tiny.name / "answers.json", {"every_options": every, "entries": entries})


def _generate(model, inputs: dict, options: dict):
    return model.generate(**inputs, **options, do_sample=False, return_dict_in_generate=True, output_scores=True)


def _answers(tiny: Tiny, inputs: dict, output, options: dict) -> list[list[dict]]:
    length = inputs["input_ids"].shape[1]
    returns = options.get("num_return_sequences", 1)
    rows = []
    for index, sequence in enumerate(output.sequences):
        mask = inputs["attention_mask"][index // returns].bool()
        prompt, new = sequence[:length][mask].tolist(), sequence[length:].tolist()
        ends = [place for place, token in enumerate(new) if token in options["eos_token_id"]]
        new = new[: ends[0] + 1] if ends else new
        answer = {
            "token_ids": new,
            "text": tiny.tokenizer.decode(new, skip_special_tokens=True),
            "whole": tiny.tokenizer.decode(prompt + new, skip_special_tokens=True),
        }
        if options.get("num_beams", 1) > 1:
            answer["score"] = shortest(output.sequences_scores[index])
        rows.append(answer)
    return [rows[start : start + returns] for start in range(0, len(rows), returns)]
