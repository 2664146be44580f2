"""InferenceClient of huggingface_hub: both dialects."""

from common import KEY, URL, picture, run
from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError, ValidationError

client = InferenceClient(base_url=URL, token=KEY)
generating = InferenceClient(model=URL, token=KEY)
SEEN = [
    {
        "role": "user",
        "content": [
            {"type": "image_url", "image_url": {"url": picture()}},
            {"type": "text", "text": "What is this?"},
        ],
    }
]
PROMPT = f"User:![]({picture()})What is this?<end_of_utterance>\nAssistant:"


def chat():
    answer = client.chat_completion(SEEN, max_tokens=6)
    assert answer.choices[0].message.content is not None
    assert answer.usage.completion_tokens <= 6


def chat_streaming():
    whole = client.chat_completion(SEEN, max_tokens=6)
    stream = client.chat_completion(SEEN, max_tokens=6, stream=True, stream_options={"include_usage": True})
    text, usage = "", None
    for chunk in stream:
        usage = chunk.usage or usage
        text += "".join(choice.delta.content or "" for choice in chunk.choices)
    assert text == whole.choices[0].message.content
    assert usage.total_tokens == whole.usage.total_tokens


def text_generation():
    text = generating.text_generation(PROMPT, max_new_tokens=6)
    detailed = generating.text_generation(PROMPT, max_new_tokens=6, details=True)
    assert detailed.generated_text == text
    assert detailed.details.generated_tokens == len(detailed.details.tokens)
    assert detailed.details.finish_reason in ("length", "eos_token")
    assert "".join(generating.text_generation(PROMPT, max_new_tokens=6, stream=True)) == text
    *_, last = generating.text_generation(PROMPT, max_new_tokens=6, stream=True, details=True)
    assert last.generated_text == text and last.details.generated_tokens == detailed.details.generated_tokens
    full = generating.text_generation("Hello", max_new_tokens=3, return_full_text=True)
    assert full.startswith("Hello")


def sampling():
    options = {"max_new_tokens": 6, "do_sample": True, "seed": 3, "temperature": 0.9, "top_p": 0.9, "best_of": 2}
    assert generating.text_generation("Hello", **options) == generating.text_generation("Hello", **options)


def errors():
    try:
        generating.text_generation("Hello", temperature=-1.0)
        raise AssertionError("a negative temperature passed")
    except ValidationError as error:
        assert "temperature" in str(error)
    try:
        InferenceClient(base_url=URL, token="wrong-key").chat_completion(SEEN)
        raise AssertionError("a wrong key passed")
    except HfHubHTTPError as error:
        assert error.response.status_code == 401


run([chat, chat_streaming, text_generation, sampling, errors])
