"""InferenceClient of huggingface_hub: both dialects."""

import asyncio

from common import KEY, NARROW_URL, URL, full_server, picture, raises, run
from huggingface_hub import AsyncInferenceClient, InferenceClient
from huggingface_hub.errors import HfHubHTTPError, OverloadedError, ValidationError

# It names its model `dummy` where it is given an address.
client = InferenceClient(base_url=URL, token=KEY, timeout=60)
generating = InferenceClient(model=URL, token=KEY, timeout=60)


def see(url):
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What is this?"}]
    return [{"role": "user", "content": parts}]


SEEN = see(picture())
PROMPT = f"User:![]({picture()})What is this?<end_of_utterance>\nAssistant:"


def chat():
    answer = client.chat_completion(SEEN, max_tokens=6)
    (choice,) = answer.choices
    assert choice.message.role == "assistant" and choice.finish_reason == "length"
    assert answer.usage.completion_tokens == 6 and answer.model == "tiny"
    assert choice.message.content == generating.text_generation(PROMPT, max_new_tokens=6).lstrip()
    named = InferenceClient(base_url=f"{URL}/v1", api_key=KEY).chat.completions.create(
        model="tiny", messages=SEEN, max_tokens=6
    )
    assert named.choices[0].message.content == choice.message.content


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
    assert detailed.generated_text == text and text
    assert detailed.details.generated_tokens == len(detailed.details.tokens) == 6
    assert detailed.details.finish_reason == "length"
    stopped = generating.text_generation(PROMPT, max_new_tokens=6, details=True, stop=[text[2:4]])
    assert stopped.details.finish_reason == "stop_sequence"
    assert stopped.generated_text == text[: text.index(text[2:4]) + 2]
    full = generating.text_generation("Hello", max_new_tokens=3, return_full_text=True)
    assert full == "Hello" + generating.text_generation("Hello", max_new_tokens=3)


def text_generation_streaming():
    text = generating.text_generation(PROMPT, max_new_tokens=6)
    assert "".join(generating.text_generation(PROMPT, max_new_tokens=6, stream=True)) == text
    events = list(generating.text_generation(PROMPT, max_new_tokens=6, stream=True, details=True))
    assert len(events) == 6 and all(event.generated_text is None for event in events[:-1])
    assert events[-1].generated_text == text and events[-1].details.generated_tokens == 6


def sampling():
    options = {"max_new_tokens": 6, "do_sample": True, "temperature": 0.9, "top_p": 0.9, "best_of": 2}
    texts = [generating.text_generation("Hello", seed=seed, **options) for seed in (3, 3, 4, 5)]
    assert texts[0] == texts[1] and len(set(texts)) > 1, texts


def information():
    endpoint = InferenceClient(model=URL, token=KEY)
    # Given an address it forgets that this is one of its own kind.
    endpoint.provider = "hf-inference"
    info = endpoint.get_endpoint_info()
    assert info["model_id"] == "tiny" and info["max_total_tokens"] == 128, info
    assert endpoint.health_check()


def asynchronous():
    async def work():
        async with AsyncInferenceClient(base_url=URL, token=KEY) as client:
            asks = [client.chat_completion(SEEN, max_tokens=6) for _ in range(4)]
            return await asyncio.gather(*asks)

    expected = client.chat_completion(SEEN, max_tokens=6).choices[0].message.content
    assert {answer.choices[0].message.content for answer in asyncio.run(work())} == {expected}


def errors():
    error = raises(ValidationError, lambda: generating.text_generation("Hello", temperature=-1.0))
    assert "temperature" in str(error)
    error = raises(ValidationError, lambda: generating.text_generation("word " * 500))
    assert "128" in str(error)
    for status, url in ((400, "https://pictures.example/a.jpg"), (415, "data:image/png;base64,AA=="), (422, picture(0.2))):
        error = raises(HfHubHTTPError, lambda: client.chat_completion(see(url)))
        assert error.response.status_code == status, error
    error = raises(HfHubHTTPError, lambda: client.chat_completion(SEEN, temperature=9, stream=True))
    assert error.response.status_code == 400


def keys():
    for token in ("wrong-key", KEY[:-1]):
        stranger = InferenceClient(base_url=URL, token=token)
        error = raises(HfHubHTTPError, lambda: stranger.chat_completion(SEEN))
        assert error.response.status_code == 401


def a_full_server():
    waiting = InferenceClient(model=NARROW_URL, token=KEY)
    with full_server():
        raises(OverloadedError, lambda: waiting.text_generation("Hello", max_new_tokens=1))
    chatting = InferenceClient(base_url=NARROW_URL, token=KEY)
    with full_server():
        error = raises(HfHubHTTPError, lambda: chatting.chat_completion(SEEN))
        assert error.response.status_code == 429 and int(error.response.headers["retry-after"]) >= 1


run(
    [
        chat,
        chat_streaming,
        text_generation,
        text_generation_streaming,
        sampling,
        information,
        asynchronous,
        errors,
        keys,
        a_full_server,
    ]
)
