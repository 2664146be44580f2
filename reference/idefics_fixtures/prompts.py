"""Prompts through the reference's IdeficsProcessor with the tokenizers of the tiny checkpoints.

Each entry of prompts.json: `tokenizer`, the checkpoint it comes from; `prompts`, lists of text and image segments
(images by their name in processor/); `options`, the processor's own keyword arguments; `texts`, what the tokenizer
was given; and the outputs. `pixel_values_sha256` is of the f32 tensor [B, N, 3, 32, 32], little-endian.
`add_end_of_utterance_token: null` means automatic, which is run as transformers 4 does it: on when the tokenizer has
the token (transformers 5 looks in a place where it no longer is).

`decoded` lists token ids with their text, special tokens kept and skipped.
"""

import torch
from transformers import IdeficsProcessor
from transformers.models.idefics.image_processing_pil_idefics import IdeficsImageProcessorPil

from .common import FIXTURES, sha256, write_json
from .pictures import picture
from .tiny import Tiny

F, I, E = "<fake_token_around_image>", "<image>", "<end_of_utterance>"


def image(name: str) -> dict:
    return {"image": name}


DOG, CAT, ALPHA = image("420.jpg"), image("rgb.png"), image("rgba.png")
DIALOGUE = [
    "User: What is in this image?", DOG, E,
    f"\nAssistant: This picture shows a small dog on the beach.{E}",
    "\nUser:", CAT, f"And who is that?{E}",
    "\nAssistant:",
]
CAPTION = ["User:", DOG, "Describe this image.\nAssistant: An image of two kittens.\n", "User:", CAT,
           "Describe this image.\nAssistant:"]
NO_E = {"add_end_of_utterance_token": False}

# name, tokenizer, prompts, options
ENTRIES = [
    ("text_only", "tiny", [["User: What is in this image?"]], {}),
    ("one_image", "tiny", [[DOG, "Question: What color is the car? Answer:"]], {}),
    ("image_alone", "tiny", [[DOG]], {}),
    ("image_last", "tiny", [["User: What is in this image?", DOG]], {}),
    ("consecutive_images", "tiny", [[DOG, CAT, ALPHA, "Question: how many?"]], {}),
    ("images_apart", "tiny", [[DOG, "a", CAT, ALPHA, "b", DOG]], {}),
    ("dialogue", "tiny", [DIALOGUE], NO_E),
    ("dialogue_automatic", "tiny", [DIALOGUE], {"add_end_of_utterance_token": None}),
    ("dialogue_always", "tiny", [DIALOGUE], {"add_end_of_utterance_token": True}),
    ("texts_in_a_row", "tiny", [["User: hello", "\nAssistant: hi", DOG, "\nUser: and", "now"]], {"add_end_of_utterance_token": True}),
    ("texts_in_a_row_never", "tiny", [["User: hello", "\nAssistant: hi", DOG, "\nUser: and", "now"]], NO_E),
    ("few_shot", "tiny", [CAPTION], NO_E),
    ("base_caption", "tiny-base", [[DOG, "This is an image of "]], {}),
    ("base_automatic", "tiny-base", [["one", "two", DOG, "three"]], {"add_end_of_utterance_token": None}),
    ("base_end_of_utterance_is_text", "tiny-base", [[DOG, f"a dog{E}"]], NO_E),
    ("spaces_are_stripped", "tiny", [["  User: a  ", DOG, " \n Answer: ", CAT, "\t b\t "]], NO_E),
    ("empty_and_blank_texts", "tiny", [["", DOG, "   ", CAT, "\n"]], NO_E),
    ("space_after_special", "tiny", [[DOG, f"a{E} \nAssistant:", f"{E}  b"]], NO_E),
    ("end_inside", "tiny", [["Image:", DOG, "a dog</s> the sea", CAT, "a hat</s>", "the end"]], NO_E),
    ("add_eos_token", "tiny", [[DOG, "a dog"], ["the sea"]], {"add_eos_token": True}),
    ("literal_image_without_image", "tiny", [[f"what is {I} here"]], {}),
    ("literal_image_beside_image", "tiny", [[f"what is {I} here", DOG, f"and {F}{I}{F} there"]], NO_E),
    ("more_literal_than_slots", "tiny", [[DOG, f"{I}{I}"], ["text"]], NO_E),
    ("special_tokens_in_text", "tiny", [["a <s> b <unk> c <0x41> <pad>"]], {}),
    ("other_scripts", "tiny", [["Où est le café? ¿Qué hay? 你好 🙂 e\u0301 \u00a0x\r\n\ttab"]], {}),
    ("url_with_a_space_is_text", "tiny", [["http://a.b/c.jpg is an address", "see C:\\x.png"]], NO_E),
    ("batch_left", "tiny", [CAPTION, ["User: hello"], [DOG, "a dog"]], NO_E),
    ("batch_right", "tiny", [CAPTION, ["User: hello"], [DOG, "a dog"]], {**NO_E, "padding_side": "right"}),
    ("batch_text_only", "tiny", [["User: hello"], ["The weather is cold and the sky is grey"]], {}),
    ("batch_images_differ", "tiny", [["no picture"], [DOG, CAT, ALPHA], [CAT, "one"]], {}),
    ("padding_max_length", "tiny", [["User: hello"], [DOG, "a dog"]], {"padding": "max_length", "max_length": 20}),
    ("padding_max_length_right", "tiny", [["User: hello"], [DOG, "a dog"]],
     {"padding": "max_length", "max_length": 20, "padding_side": "right"}),
    ("padding_off", "tiny", [[DOG, "a dog"]], {"padding": False}),
    ("truncation", "tiny", [CAPTION], {**NO_E, "truncation": True, "max_length": 12}),
    ("truncation_drops_image", "tiny", [[DOG, "a red hat and a small dog", CAT, "that"]], {"truncation": True, "max_length": 9}),
    ("truncation_drops_all_images", "tiny", [["Describe this image.", DOG, "now"], [CAT, "x"]], {"truncation": True, "max_length": 3}),
    ("truncation_batch", "tiny", [CAPTION, ["User: hello"]], {**NO_E, "truncation": True, "max_length": 16}),
]

# name, images, texts: the reference's second way of calling.
IMAGE_TEXT_ENTRIES = [
    ("images_and_texts_flat", [DOG, CAT], ["a dog", "a cat"]),
    ("images_and_texts_nested", [[DOG, CAT], [ALPHA]], ["two pictures", "one picture"]),
    ("image_and_text_single", DOG, "a dog"),
]

DECODED = [
    "<s>User: hello", f"<s>User:{F}{I}{F}And who is that?{E}\nAssistant: a dog</s>", "  two  spaces",
    "你好 🙂", "\n", " ", "", "<s>", f"{E} \nAssistant:", "a</s>b",
]


def to_reference(segment):
    return picture(segment["image"]) if isinstance(segment, dict) else segment


def segments(prompt: list) -> list[dict]:
    return [segment if isinstance(segment, dict) else {"text": segment} for segment in prompt]


class Recording:
    """The processor with the strings that its tokenizer is given."""

    def __init__(self, tiny: Tiny):
        class Tokenizer(type(tiny.tokenizer)):
            def __call__(self, texts, **kwargs):
                self.seen = list(texts)
                return super().__call__(texts, **kwargs)

        tokenizer = Tokenizer(
            tokenizer_object=tiny.tokenizer.backend_tokenizer, **tiny.tokenizer.special_tokens_map,
            padding_side="left", clean_up_tokenization_spaces=False, model_max_length=2048,
        )
        self.tokenizer = tokenizer
        self.processor = IdeficsProcessor(IdeficsImageProcessorPil(image_size=32), tokenizer)
        self.processor.tokenizer_was_trained_with_end_of_utterance_token = E in tiny.added_tokens

    def __call__(self, **kwargs) -> dict:
        outputs = self.processor(**kwargs, return_tensors="pt")
        assert list(outputs) == ["input_ids", "attention_mask", "pixel_values", "image_attention_mask"]
        return {
            "texts": self.tokenizer.seen,
            "input_ids": outputs["input_ids"].tolist(),
            "attention_mask": outputs["attention_mask"].tolist(),
            "image_attention_mask": outputs["image_attention_mask"].to(torch.long).tolist(),
            "pixel_values_shape": list(outputs["pixel_values"].shape),
            "pixel_values_sha256": sha256(outputs["pixel_values"].numpy().astype("<f4").tobytes()),
        }


def write_prompts(tinies: list[Tiny]) -> None:
    recording = {tiny.name: Recording(tiny) for tiny in tinies}
    entries = []
    for name, tokenizer, prompts, options in ENTRIES:
        text = [[to_reference(segment) for segment in prompt] for prompt in prompts]
        outputs = recording[tokenizer](text=text, **options)
        entries.append({
            "name": name, "tokenizer": tokenizer, "prompts": [segments(prompt) for prompt in prompts],
            "options": options, **outputs,
        })
    for name, images, texts in IMAGE_TEXT_ENTRIES:
        nested = [[to_reference(image) for image in row] if isinstance(row, list) else to_reference(row) for row in images] if (
            isinstance(images, list)
        ) else to_reference(images)
        outputs = recording["tiny"](images=nested, text=texts)
        entries.append({"name": name, "tokenizer": "tiny", "images": images, "text": texts, "options": {}, **outputs})

    decoded = []
    tokenizer = recording["tiny"].tokenizer
    for text in DECODED:
        ids = tokenizer.encode(text, add_special_tokens=False)
        decoded.append({
            "token_ids": ids,
            "text": tokenizer.decode(ids),
            "text_without_special_tokens": tokenizer.decode(ids, skip_special_tokens=True),
        })
    # Half a character, and a byte that no character begins with.
    for ids in ([3 + 0xE4, 3 + 0xBD], [3 + 0xFF, 3 + 0x41], [0, 1, 2]):
        decoded.append({
            "token_ids": ids,
            "text": tokenizer.decode(ids),
            "text_without_special_tokens": tokenizer.decode(ids, skip_special_tokens=True),
        })
    write_json(FIXTURES / "prompts.json", {"entries": entries, "decoded": decoded})
